"""vLLM's two other aligned ops launched directly: into the caller's buffers, with no work of torch's around.

Each function returns whether it has done the call; where it has not, nothing is written and torch composes
(`_vllm_aligned.py`). All arguments have passed their op's checks.
"""

from collections.abc import Mapping
from typing import Any

import torch

from moe_align_jax._align.vllm.problem import AdaptersProblem, ReceivedProblem
from moe_align_jax._core import checks
from torch_bridge import _single_launch
from torch_bridge._direct import call as direct_call
from torch_bridge._direct import problems, store

calls = _single_launch.KnownCalls()
_REMEDY = "Make a call of this size before the capture."
_INSTEAD = "torch's operations stand around the alignment"
_SAME = {"local_ids": "topk_idx"}  # an input and an output that are one piece of memory
_MOST_PAIRS = 2**29  # whose words an int32 still counts


def globalize(
    function: str,
    ids: torch.Tensor,
    psum: torch.Tensor,
    buffers: Mapping[str, torch.Tensor],
    *,
    first: int,
    everyone: int,
    experts: int,
    block_size: int,
    key: _single_launch.Key | None,
) -> bool:
    """`fused_globalize_align_block_size`.

    Args:
        ids: `topk_idx`.
        buffers: `sorted_ids`, `expert_ids`, `num_tokens_post_pad` and, if wanted, `scatter_idx`.
        first, everyone, experts: `rank_expert_offset`, `global_num_experts` and `local_num_experts`.
        key: by which `calls` shall know later calls like this one; None for not at all.
    """
    rows, blocks, count, *scatter = buffers.values()
    n, capacity = ids.numel(), rows.numel()
    if not _takes(n, capacity, capacity, blocks.numel(), block_size):
        return False
    if psum.dtype not in (torch.int32, torch.int64):
        psum, key = psum.to(torch.int64), None
    problem = problems.received_bucket(
        n,
        experts,
        block_size,
        store.here.machine.tuning(ids.device),
        top_k=ids.shape[1],
        psum_words=psum.dtype.itemsize // 4,
        num_ranks=psum.shape[0],
        with_scatter=bool(scatter),
    )
    sizes = {
        "num_pairs": n,
        "capacity": capacity,
        "first_expert": first,
        "bound": max(0, min(experts, everyone - first)),
        "last_rank": psum.shape[0] - 1,
    }
    written = {
        "topk_idx": ids,
        "sorted_token_ids": rows,
        "expert_ids": blocks,
        "num_tokens_post_padded": count,
        **dict(zip(("scatter_idx",), scatter, strict=False)),
    }
    given: dict[str, Any] = {"topk_idx": ids, "psum": psum, **written}
    given.setdefault("scatter_idx", None)
    return _launch(function, problem, {"psum": psum}, written, sizes, key, given)


def align_adapters(
    function: str,
    operands: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    *,
    experts: int,
    block_size: int,
    adapters: int,
    capacity: int,
    blocks: int,
    key: _single_launch.Key | None,
) -> bool:
    """`moe_lora_align_block_size`.

    Args:
        operands: `topk_ids`, `token_lora_mapping`, `adapter_enabled`, `lora_ids` and, if given, `expert_map`.
        buffers: `sorted_token_ids`, `expert_ids` and `num_tokens_post_padded`.
        experts, block_size, adapters: numbers of experts and of adapters, and rows per block.
        capacity, blocks: `max_num_tokens_padded` and `max_num_m_blocks`.
        key: as for `globalize`.
    """
    ids = operands["topk_ids"]
    n = ids.numel()
    if not _takes(n, capacity, adapters * capacity, blocks, block_size):
        return False
    if not operands["lora_ids"].numel():
        return False
    given = dict(operands)
    for name in ("token_lora_mapping", "lora_ids"):
        if given[name].dtype != torch.int32:
            given[name] = direct_call.narrow(given[name], -1, adapters - 1)
    if given["adapter_enabled"].dtype != torch.int32:
        given["adapter_enabled"] = (given["adapter_enabled"].to(torch.int64) != 0).to(torch.int32)
    if "expert_map" in given and given["expert_map"].dtype != torch.int32:
        given["expert_map"] = direct_call.narrow(given["expert_map"], -1, experts - 1)
    problem = problems.adapters_bucket(
        n,
        experts,
        block_size,
        store.here.machine.tuning(ids.device),
        top_k=ids.shape[1],
        num_adapters=adapters,
        num_lora_ids=given["lora_ids"].shape[0],
        id_words=problems.ID_WORDS[ids.dtype],
        has_expert_map="expert_map" in given,
        whole_rows=capacity % 4 == 0,
    )
    if any(given[name] is not x for name, x in operands.items()):
        key = None
    sizes = {"num_pairs": n, "capacity": capacity}
    tensors = {**given, "expert_map": given.get("expert_map"), **buffers}
    return _launch(function, problem, given, buffers, sizes, key, tensors)


def _takes(n: int, capacity: int, cells: int, blocks: int, block_size: int) -> bool:
    """Whether one launch fills buffers of these sizes to their end."""
    return (
        0 < n <= _MOST_PAIRS
        and cells <= problems.MAX_CAPACITY
        and blocks == checks.cdiv(capacity, block_size)
    )


def _launch(
    function: str,
    problem: ReceivedProblem | AdaptersProblem,
    operands: Mapping[str, torch.Tensor],
    written: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int],
    key: _single_launch.Key | None,
    tensors: Mapping[str, torch.Tensor | None],
) -> bool:
    """Launches on torch's current stream, if the program can be had.

    `written`: the program's outputs by name. What does not lie as the kernels take it is copied; an output
    there and back, for it is not written in full. `tensors`: what the caller gave, as `calls` gets it.
    """
    from moe_align_jax._align.vllm import kernel

    some = next(iter(written.values()))
    program = _single_launch.program_for(
        function, problem, some, kernel.unsupported, _REMEDY, instead=_INSTEAD
    )
    if program is None or sizes["capacity"] > program.max_capacity:
        return False
    with store.here.machine.on_device(some.get_device()):
        given: dict[str, torch.Tensor] = {
            name: _single_launch.on_boundary(x.detach().resolve_neg().contiguous())
            for name, x in operands.items()
        }
        targets = {name: _single_launch.on_boundary(x.contiguous()) for name, x in written.items()}
        values: dict[str, Any] = {name: x.data_ptr() for name, x in {**given, **targets}.items()}
        values |= {name: size << 8 for name, size in sizes.items()}
        names = [_SAME.get(name, name) for name in (*problem.inputs, *problem.outputs)]
        program.launch(*[values[name] for name in names])
        for name, target in targets.items():
            if target.data_ptr() != written[name].data_ptr():
                written[name].copy_(target)
    if key is not None:
        calls.remember(key, program, tensors, names, sizes)
    return True
