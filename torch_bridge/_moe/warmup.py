"""warmup_fused_moe: the programs of a model's layers, compiled and loaded ahead of its calls."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moe_align_jax._core import checks
from moe_align_jax._grouped_matmul.problem import Activation
from moe_align_jax._moe_layer import plan
from moe_align_jax._moe_layer.direct_problem import BUCKETS
from torch_bridge import _checks, moe
from torch_bridge._direct import problems, store
from torch_bridge._direct.warmup_device import check_device, loading_on
from torch_bridge._moe import run
from torch_bridge._moe.calls import DTYPES
from torch_bridge._moe.programs import layer_programs


def warmup_fused_moe(
    *,
    num_experts: int,
    topk: int,
    hidden: int,
    ffn: int,
    max_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    device: Any = None,
    id_dtypes: Sequence[torch.dtype] = (torch.int32, torch.int64),
    num_global_experts: int | None = None,
    activation: Activation | None = "silu",
    gated: bool = True,
    interleaved: bool = False,
    swiglu_limit: float | None = None,
    swiglu_alpha: float | None = None,
    pair: bool = False,
    bias_gate_up: bool = False,
    bias_down: bool = False,
    transpose_rhs: bool = False,
    weights_on_input: bool = False,
    num_valid_tokens: bool = False,
    return_tokens_per_expert: bool = False,
    preferred_element_type: torch.dtype | None = None,
    block_size: int | None = None,
) -> int:
    """Compiles and loads what `fused_moe` with these sizes and options needs, for 1 to max_tokens tokens.

    Needed before a capture into a CUDA graph, unless each number of tokens has been called before; elsewhere
    it takes the seconds of compiling from the first calls. Programs are compiled at the same time, in
    processes of their own, and kept on disk, so that a later process only loads them.

    Args:
        num_experts, topk, hidden, ffn: E, K, H and N of the layer.
        max_tokens: the most tokens of a call.
        dtype: of x and the weights.
        device: a CUDA device; None for the current one.
        id_dtypes: of topk_ids. Those of up to 32 bits share programs, and those of 64 bits.
        num_global_experts: G, the length of an expert_map; None without one.
        activation, gated, interleaved, swiglu_limit, swiglu_alpha, transpose_rhs, weights_on_input,
            return_tokens_per_expert, preferred_element_type, block_size: as for `fused_moe`.
        pair: whether gate and up are two tensors.
        bias_gate_up, bias_down, num_valid_tokens: whether calls pass them.

    Returns:
        The number of programs that are now loaded for these options.

    Raises:
        TypeError, ValueError: a size is not an int >= 1, an option is out of range, or torch has no such
            device.
        NotImplementedError: the direct path cannot run this, or not here; the message says why.

    Example:
        >>> warmup_fused_moe(num_experts=128, topk=8, hidden=2048, ffn=768, max_tokens=8192,
        ...                  transpose_rhs=True)  # doctest: +SKIP
        45
    """
    function = "warmup_fused_moe"
    remedy = "Pass the sizes of the layer."
    sizes = {"topk": topk, "hidden": hidden, "ffn": ffn, "max_tokens": max_tokens}
    topk, hidden, ffn, max_tokens = (
        checks.check_positive_int(function, name, size, remedy) for name, size in sizes.items()
    )
    num_experts = checks.check_num_experts(function, num_experts)
    slots = num_experts
    if num_global_experts is not None:
        remedy = "Pass the length of expert_map, or None."
        slots = checks.check_int(
            function, "num_global_experts", num_global_experts, num_experts, remedy
        )
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        rule, remedy = "be torch.bfloat16, torch.float16 or torch.float32", "It is that of x."
        checks.refuse(TypeError, function, "dtype", rule, dtype, remedy)
    id_dtypes = _checks.check_integer_dtypes(function, "id_dtypes", id_dtypes)
    flags = {
        "gated": gated,
        "pair": pair,
        "bias_gate_up": bias_gate_up,
        "bias_down": bias_down,
        "transpose_rhs": transpose_rhs,
        "num_valid_tokens": num_valid_tokens,
    }
    _checks.check_bools(function, flags)
    place = check_device(function, device)
    wanted: set[Any] = set()
    width = ffn * (2 if gated and activation is not None and not pair else 1)

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    def weights_of(columns: int, rows: int) -> torch.Tensor:
        shape = (columns, rows) if transpose_rhs else (rows, columns)
        return empty(num_experts, *shape)

    up = weights_of(width, hidden)
    options: dict[str, Any] = {
        "activation": activation,
        "gated": gated,
        "interleaved": interleaved,
        "swiglu_limit": swiglu_limit,
        "swiglu_alpha": swiglu_alpha,
        "transpose_rhs": transpose_rhs,
        "weights_on_input": weights_on_input,
        "return_tokens_per_expert": return_tokens_per_expert,
        "preferred_element_type": preferred_element_type,
        "block_size": block_size,
        "bias_gate_up": empty(num_experts, width * (2 if pair else 1)) if bias_gate_up else None,
        "bias_down": empty(num_experts, hidden) if bias_down else None,
        "num_valid_tokens": 1 if num_valid_tokens else None,
    }
    if num_global_experts is not None:
        options["expert_map"] = empty(slots, kind=torch.int32)

    def checked(tokens: int, id_dtype: torch.dtype) -> Any:
        return moe.checked_layer(
            *(empty(tokens, hidden), (up, up) if pair else up, weights_of(hidden, ffn)),
            empty(tokens, topk, kind=torch.float32),
            empty(tokens, topk, kind=id_dtype),
            function=function,
            **options,
        )

    checked(1, id_dtypes[0])  # the options that are left, whatever the machine
    with loading_on(function, place, "the layer") as programs:
        index = place.index or 0
        tuning, kind = programs.machine.tuning(place), run.gpu_kind(index)
        for tokens in _tokens(max_tokens, topk, slots, block_size, tuning):
            for id_dtype in id_dtypes:
                call, operands = checked(tokens, id_dtype)
                one = layer_programs(call, operands, kind, tuning)
                if one.refusal:
                    raise store.Unavailable(one.refusal)
                wanted.update(one.each)
        programs.prepare(index, sorted(wanted, key=repr), again=True)
    return len(wanted)


def _tokens(
    most: int, top_k: int, slots: int, block_size: int | None, tuning: str
) -> Iterator[int]:
    """Numbers of tokens that meet every program of 1 to `most` of them: the ends of all ranges."""
    # Those of every table: which one serves depends on the weights.
    kinds = plan.HEIGHTS, plan.ANY_ROWS, plan.POWERS_OF_TWO
    sizes = [each for kind in kinds for each in plan.block_sizes(slots, kind)]
    rows = [block_size] if block_size else sorted({r for _, r in sizes})
    ends = {1, most, *BUCKETS}
    ends |= {int(mean * slots) // top_k for mean, _ in sizes if mean < math.inf}
    if block_size:
        ends |= {1 << k for k in range(most.bit_length())}
    for size in rows:
        ends |= {n // top_k for n in problems.bucket_ends(most * top_k, slots, size, tuning)}
    found = {end + behind for end in ends for behind in (0, 1)}
    yield from sorted(tokens for tokens in found if 1 <= tokens <= most)
