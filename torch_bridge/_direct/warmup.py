"""warmup: the programs of calls to come, compiled and loaded ahead of them."""

from collections.abc import Sequence
from typing import Any

import torch

from moe_align_jax._core import checks
from moe_align_jax.types import BatchedAlignProblem
from torch_bridge import _checks
from torch_bridge._direct import problems
from torch_bridge._direct.warmup_device import check_device, loading_on
from torch_bridge._specs import AlignSpec, BatchedSpec


def warmup(
    *,
    num_experts: int,
    block_size: int,
    max_tokens: int,
    topk: int = 1,
    device: Any = None,
    dtypes: Sequence[torch.dtype] = (torch.int32, torch.int64),
    expert_map: bool | torch.Tensor | None = None,
    ignore_invalid_experts: bool = False,
    pad_sorted_ids: bool = False,
    num_valid_pairs: bool | int | torch.Tensor | None = None,
    tokens_per_expert: bool = False,
    return_inverse: bool = False,
    sglang: bool = False,
    batched: bool = False,
) -> int:
    """Compiles and loads what calls with these options need: afterwards no size compiles.

    One program serves a range of sizes, about 20 of them all sizes up to half a million pairs. They are
    kept on disk (`TORCH_BRIDGE_CACHE_DIR`), so that the next process only loads them. Needed before
    a capture into a CUDA graph; elsewhere the first call with a size does the same for its range.

    Args:
        num_experts, block_size: as for `moe_align_block_size`.
        max_tokens, topk: sizes from 1 up to max_tokens * topk pairs.
        device: a CUDA device; None for the current one.
        dtypes: of `topk_ids`. Those of up to 32 bits share programs, and those of 64 bits.
        expert_map, num_valid_pairs: whether calls pass one (the value itself does not matter).
        ignore_invalid_experts, pad_sorted_ids: as for `moe_align_block_size`.
        tokens_per_expert, return_inverse: what `align_blocks` returns besides; vLLM's
            `return_scatter_idx` needs return_inverse.
        sglang: for `torch_bridge.sglang.moe_align_block_size`; `ignore_invalid_experts` stands for its
            `ignore_invalid_expert`, tokens_per_expert for its `return_inactive_prefix_count`.
        batched: for `torch_bridge.vllm.batched_moe_align_block_size` instead, of `num_experts` counts
            and `max_tokens` as its `max_tokens_per_batch`: exactly that size, one program. Takes none of
            the options above but device.

    Returns:
        The number of programs that are now loaded for these options.

    Raises:
        TypeError, ValueError: a size is not an int >= 1, an option is of another type, torch has no such
            device, or batched comes with an option of the others.
        NotImplementedError: the direct path cannot run on this device; the message says why.

    Example:
        >>> warmup(num_experts=64, block_size=16, max_tokens=256, topk=8)  # doctest: +SKIP
        18
    """
    function = "warmup"
    num_experts = checks.check_num_experts(function, num_experts)
    block_size = checks.check_block_size(function, block_size)
    remedy = "Pass the most tokens of a call, and the experts per token."
    max_tokens = checks.check_positive_int(function, "max_tokens", max_tokens, remedy)
    topk = checks.check_positive_int(function, "topk", topk, remedy)
    most = max_tokens * topk
    device = check_device(function, device)
    dtypes = _checks.check_integer_dtypes(function, "dtypes", dtypes)
    _checks.check_bool(function, "batched", batched)
    with_map = _is_passed(function, "expert_map", expert_map, (torch.Tensor,))
    with_limit = _is_passed(function, "num_valid_pairs", num_valid_pairs, (int, torch.Tensor))
    flags = {
        "ignore_invalid_experts": ignore_invalid_experts,
        "pad_sorted_ids": pad_sorted_ids,
        "tokens_per_expert": tokens_per_expert,
        "return_inverse": return_inverse,
        "sglang": sglang,
    }
    _checks.check_bools(function, flags)
    options = {
        "topk": topk > 1,
        "expert_map": with_map,
        "num_valid_pairs": with_limit,
        **flags,
    }
    if batched and (given := [name for name, on in options.items() if on]):
        raise ValueError(
            checks.message(
                function,
                "batched",
                "come without options of the other ops",
                ", ".join(given),
                "Leave them out, or warm the ops up one by one.",
            )
        )
    if batched:
        spec = BatchedSpec(num_experts, max_tokens, block_size)
        spec.check_capacity(function, "max_tokens")
    else:
        AlignSpec(most, num_experts, block_size).check_capacity(function, "max_tokens")
    with loading_on(function, device, "the kernels") as programs:
        tuning = programs.machine.tuning(device)
        if batched:
            sizes = (num_experts, max_tokens, block_size)
            wanted = {BatchedAlignProblem(*sizes, tuning=tuning)}
        else:
            minus_one = sglang and not ignore_invalid_experts
            counted = num_experts + minus_one
            options = {
                "expert_map": problems.map_use(ignore_invalid_experts) if with_map else "",
                "has_num_valid_pairs": with_limit,
                "return_counts": tokens_per_expert,
                "return_inverse": return_inverse,
                "minus_one": minus_one,
                "tuning": tuning,
            }
            words = {problems.ID_WORDS.get(dtype, 1) for dtype in dtypes}
            wanted = {
                problems.bucket_problem(n, counted, block_size, id_words, **options)
                for n in problems.bucket_ends(most, counted, block_size, tuning)
                for id_words in words
            }
        programs.prepare(device.index or 0, sorted(wanted), again=True)
    return len(wanted)


def _is_passed(function: str, argument: str, value: object, kinds: tuple[type, ...]) -> bool:
    """Whether calls pass it, as a bool or a value of it says."""
    if value is not None and not isinstance(value, (bool, *kinds)):
        rule, remedy = "be None, a bool or a value of it", "Pass True where calls pass one."
        checks.refuse(TypeError, function, argument, rule, value, remedy)
    return value is not None and value is not False
