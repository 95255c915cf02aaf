"""The alignment on torch tensors: moe_align_block_size, align_blocks, and explain, which shows their plan."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch

from moe_align_jax._core import checks
from moe_align_jax.types import AlignedBlocks
from torch_bridge import _checks, _ops, _plan
from torch_bridge._direct import fast_path
from torch_bridge._plan import Plan
from torch_bridge._specs import AlignSpec

type Path = Literal["auto", "direct", "dlpack"]


def moe_align_block_size(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    topk: int | None = None,
    *,
    expert_map: torch.Tensor | None = None,
    ignore_invalid_experts: bool = False,
    pad_sorted_ids: bool = False,
    num_valid_pairs: int | torch.Tensor | None = None,
    out: Sequence[torch.Tensor] | None = None,
    path: Path = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups (token, expert) pairs by expert, each expert padded to whole GEMM blocks.

    `moe_align_jax.moe_align_block_size` on PyTorch tensors, on torch's current stream; the host
    does not wait for the GPU. Works under torch.compile (fullgraph, dynamic shapes) and
    torch.export; on the direct path also in a CUDA-graph capture, after `warmup`. The result is bit
    for bit the same in every run.

    Args:
        topk_ids: any shape, usually `[num_tokens, topk]` or flat, any integer dtype, on a CPU or a
            GPU. Ids outside `[0, num_experts)` are dropped, compared in their own dtype.
        num_experts: E, number of global (physical) experts, >= 1.
        block_size: rows per GEMM block, >= 1.
        topk: None, or the experts per token: the last dimension of `topk_ids`, or a divisor of the
            length of a 1-D one. Used for validation only.
        expert_map: `[E]` any integer dtype, same device: global to local id, -1 if on another rank.
        ignore_invalid_experts: False maps the finished `expert_ids`, so that remote blocks read -1;
            True drops remote pairs before counting and groups by local id.
        pad_sorted_ids: round P up to a multiple of block_size.
        num_valid_pairs: None, an int, or a scalar integer tensor on the same device: pairs at flat
            index >= it are dropped.
        out: three tensors to write instead of new ones, exact in shape, dtype (int32) and device,
            contiguous, overlapping neither each other nor an input. They are returned.
        path: "auto" takes the best: "direct", a launch on torch's current stream (Hopper or newer),
            or "dlpack", through jax (elsewhere, and where a program cannot be made, which a warning
            says). A named path is taken, or an error is raised.

    Returns:
        `(sorted_token_ids [P], expert_ids [cdiv(P, block_size)], num_tokens_post_pad [1])`, int32,
        on the device of `topk_ids`, with n pairs and P = `max_num_tokens_padded(n, ...)`:
        pair indices grouped by expert in ascending order, n in every other slot; the expert of each
        block, -1 past the last used one; rows in use.

    Raises:
        TypeError: an argument is not an integer tensor, int or bool.
        ValueError: a size, shape, device or `out` does not fit, or P exceeds int32.
        NotImplementedError: `path="direct"`, or jax has no device like that of `topk_ids`.
        RuntimeError: torch's current stream is being captured into a CUDA graph, and the kernels for
            this size are not loaded (or the path is "dlpack").
        Nothing is written when an error is raised.

    Example:
        >>> ids = torch.tensor([[2, 3], [1, 2], [1, 3]])
        >>> sorted_ids, expert_ids, num_tokens_post_pad = moe_align_block_size(ids, 4, 4, 2)
        >>> sorted_ids[:12].tolist()
        [2, 4, 6, 6, 0, 3, 6, 6, 1, 5, 6, 6]
        >>> expert_ids[:4].tolist(), num_tokens_post_pad.tolist()
        ([1, 2, 3, -1], [12])

    Source: contract of vLLM 0.33 `fused_moe/moe_align_block_size.py` (Apache-2.0); no code taken.
    """
    key = (num_experts, block_size, pad_sorted_ids, ignore_invalid_experts, topk, 0)
    if type(path) is str and path == "auto":  # an array is compared value by value
        results = fast_path.attempt(key, topk_ids, expert_map, num_valid_pairs, out)
        if results is not None:
            return results
    function = "moe_align_block_size"
    path = _checks.check_path(function, path)  # type: ignore[assignment]
    spec, operands, limit = _checks.check_alignment(
        function,
        topk_ids,
        num_experts,
        block_size,
        topk,
        expert_map,
        ignore_invalid_experts,
        pad_sorted_ids,
        num_valid_pairs,
    )
    if out is None:
        results = _ops.aligned(spec, operands, limit, path, key)
        return results[0], results[1], results[2]
    out = check_out(function, out, spec, operands["topk_ids"].device)
    if _ops.launches_at_once(operands, out):
        _ops.check_no_overlap(function, out, operands)
        _ops.run(spec, operands, limit, out, path, key=key)
    else:
        op = _ops.chosen("block_align_out", operands["topk_ids"].device, path)
        sizes = (operands["topk_ids"], spec.num_experts, spec.block_size)
        op(*sizes, *out, *_ops.op_options(spec, operands, limit))
    return out


def align_blocks(
    topk_ids: torch.Tensor,
    *,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    ignore_invalid_experts: bool = False,
    pad_sorted_ids: bool = False,
    num_valid_pairs: int | torch.Tensor | None = None,
    return_inverse: bool = False,
    path: Path = "auto",
) -> AlignedBlocks:
    """`moe_align_jax.moe_align_block_size` in torch: its arguments, and all of its results.

    Args:
        topk_ids, block_size, num_experts, expert_map, ignore_invalid_experts, pad_sorted_ids,
        num_valid_pairs, path: as for `torch_bridge.moe_align_block_size`.
        return_inverse: also return `row_of_pair`.

    Returns:
        `AlignedBlocks` of int32 tensors on the device of `topk_ids`: `sorted_token_ids` `[P]`,
        `expert_ids` `[B]`, `num_tokens_post_padded` `[1]`, `tokens_per_expert` `[E]`, and
        `row_of_pair` `[n]` or None.

    Raises:
        As `torch_bridge.moe_align_block_size`.

    Example:
        >>> ids = torch.tensor([[2, 3], [1, 2], [1, 3]])
        >>> aligned = align_blocks(ids, block_size=4, num_experts=4, return_inverse=True)
        >>> aligned.tokens_per_expert.tolist(), aligned.row_of_pair.tolist()
        ([0, 2, 2, 2], [4, 8, 0, 5, 1, 9])
    """
    if type(path) is str and path == "auto" and type(return_inverse) is bool:
        form = fast_path.align_form(True, return_inverse)
        key = (num_experts, block_size, pad_sorted_ids, ignore_invalid_experts, None, form)
        results = fast_path.attempt(key, topk_ids, expert_map, num_valid_pairs)
        if results is not None:
            return AlignedBlocks(*results)
    function = "align_blocks"
    path = _checks.check_path(function, path)  # type: ignore[assignment]
    _checks.check_bool(function, "return_inverse", return_inverse)
    spec, operands, limit = _checks.check_alignment(
        function,
        topk_ids,
        num_experts,
        block_size,
        None,
        expert_map,
        ignore_invalid_experts,
        pad_sorted_ids,
        num_valid_pairs,
    )
    spec = dataclasses.replace(spec, with_counts=True, with_inverse=return_inverse)
    return AlignedBlocks(*_ops.aligned(spec, operands, limit, path))


def explain(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    topk: int | None = None,
    *,
    expert_map: torch.Tensor | None = None,
    ignore_invalid_experts: bool = False,
    pad_sorted_ids: bool = False,
    num_valid_pairs: int | torch.Tensor | None = None,
    out: Sequence[torch.Tensor] | None = None,
    path: Path = "auto",
) -> Plan:
    """What `moe_align_block_size` with these arguments would do, without doing it.

    Args:
        As for `moe_align_block_size`.

    Returns:
        `Plan(path, implementation, copies, reasons)`: the object that a first call with these arguments is
        given and obeys. (A later call like it repeats the launch that the plan led to.) `copies` maps each
        argument that would be copied, and "outputs" where the results would be, to the reason.

    Raises:
        As `moe_align_block_size`; TypeError for a tensor without data (fake, meta).

    Example:
        >>> explain(torch.zeros(6, 4, dtype=torch.int32)[:, ::2], 8, 16).copies
        {'topk_ids': 'it is not contiguous (shape [6, 2], strides [4, 2])'}
    """
    function = "explain"
    path = _checks.check_path(function, path)  # type: ignore[assignment]
    spec, operands, limit = _checks.check_alignment(
        function,
        topk_ids,
        num_experts,
        block_size,
        topk,
        expert_map,
        ignore_invalid_experts,
        pad_sorted_ids,
        num_valid_pairs,
    )
    if out is not None:
        out = check_out(function, out, spec, topk_ids.device)
    _ops.check_data(function, spec, operands, out)
    has_limit = limit is not None
    return _plan.resolve(function, spec, operands, path=path, out=out, has_limit=has_limit).plan


def check_out(
    function: str, out: Sequence[torch.Tensor], spec: AlignSpec, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`out`, which must be three contiguous int32 tensors of the exact shapes. (Overlap is checked later.)"""
    remedy = "Pass (sorted_token_ids, expert_ids, num_tokens_post_pad) from torch.empty."
    if not isinstance(out, (tuple, list)) or len(out) != 3:
        what = f"{len(out)} items" if isinstance(out, (tuple, list)) else checks.describe(out)
        raise TypeError(checks.message(function, "out", "be three tensors", what, remedy))
    for i, (target, shape) in enumerate(zip(out, spec.shapes().values(), strict=True)):
        if not isinstance(target, torch.Tensor) or target.dtype != torch.int32:
            what = checks.describe(target)
            raise TypeError(
                checks.message(function, f"out[{i}]", "be an int32 tensor", what, remedy)
            )
        if tuple(target.shape) != shape:
            what, rule = checks.describe(target), f"have shape {list(shape)}"
            raise ValueError(checks.message(function, f"out[{i}]", rule, what, remedy))
        if target.device != device:
            rule = f"be on the device of topk_ids, {device}"
            raise ValueError(checks.message(function, f"out[{i}]", rule, target.device, remedy))
        if target.layout != torch.strided or not target.is_contiguous():
            what = f"strides {list(target.stride())}"
            raise ValueError(checks.message(function, f"out[{i}]", "be contiguous", what, remedy))
    return out[0], out[1], out[2]
