"""moe_align_block_size and align_blocks on torch tensors, and explain."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch

from moe_align_jax._core import checks as _checks
from moe_align_jax.types import AlignedBlocks
from torch_bridge import _checks as checks
from torch_bridge import _ops
from torch_bridge._direct import fast_path, program
from torch_bridge._plan import Plan
from torch_bridge._specs import AlignProblem

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
            length of a 1-D one. It is only checked.
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
            says). A name takes that one or raises.

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
    if path == "auto" and fast_path.open_to_all():
        results = fast_path.attempt(
            topk_ids,
            num_experts,
            block_size,
            pad_sorted_ids,
            expert_map,
            ignore_invalid_experts,
            topk,
            out,
            num_valid_pairs=num_valid_pairs,
        )
        if results is not None:
            return results
    function = "moe_align_block_size"
    path = checks.check_path(function, path)  # type: ignore[assignment]
    problem, operands, limit = check(
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
        results = aligned(problem, operands, limit, path)
        if topk is not None and limit is None and checks.sizes_are_known():
            fast_path.keep(problem, operands, topk)
        return results[0], results[1], results[2]
    out = check_out(function, out, problem, operands["topk_ids"].device)
    if launches_at_once(operands, out):
        _ops.run(problem, operands, limit, out, path)
    else:
        op = _ops.chosen("block_align_out", operands["topk_ids"].device, path)
        sizes = (operands["topk_ids"], problem.num_experts, problem.block_size)
        op(*sizes, *out, *op_options(problem, operands, limit))
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
    if path == "auto" and type(return_inverse) is bool and fast_path.open_to_all():
        results = fast_path.attempt(
            topk_ids,
            num_experts,
            block_size,
            pad_sorted_ids,
            expert_map,
            ignore_invalid_experts,
            num_valid_pairs=num_valid_pairs,
            form=fast_path.align_form(True, return_inverse),
        )
        if results is not None:
            return AlignedBlocks(*results)
    function = "align_blocks"
    path = checks.check_path(function, path)  # type: ignore[assignment]
    checks.check_bool(function, "return_inverse", return_inverse)
    problem, operands, limit = check(
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
    problem = dataclasses.replace(problem, with_counts=True, with_inverse=return_inverse)
    return AlignedBlocks(*aligned(problem, operands, limit, path))


def launches_at_once(operands: dict[str, torch.Tensor], out: Sequence[torch.Tensor] = ()) -> bool:
    """Whether a call may pass by torch's dispatcher (3 us of the host): plain tensors on a GPU that can
    launch directly, and nobody who records or transforms operators."""
    if not fast_path.open_to_all():
        return False
    tensors = (*operands.values(), *out)
    plain = all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in tensors)
    device = tensors[0].device
    return plain and device.type == "cuda" and program.unavailable(device) is None


def aligned(
    problem: AlignProblem, operands: dict[str, torch.Tensor], limit: int | None, path: str
) -> Sequence[torch.Tensor]:
    """The results of `problem.outputs`."""
    if launches_at_once(operands):
        return _ops.run(problem, operands, limit, path=path)
    device = operands["topk_ids"].device
    if path == "direct" and not (device.type == "cuda" and program.launches_on(device.index)):
        reason = program.unavailable(device) or "it cannot"
        remedy = f"{reason[0].upper()}{reason[1:]}. Pass path='auto' or 'dlpack'."
        raise NotImplementedError(
            _checks.message(problem.name, "path", "be one that can run here", "'direct'", remedy)
        )
    wanted = (problem.with_counts, problem.with_inverse, problem.with_scatter_idx)
    sizes = (operands["topk_ids"], problem.num_experts, problem.block_size)
    options = (*op_options(problem, operands, limit), *wanted)
    if all(option is None or option is False for option in options):
        return _ops.chosen("block_align", device, path)(*sizes)
    return _ops.chosen("block_align.options", device, path)(*sizes, *options)


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
        `Plan(path, implementation, copies, reasons)`: the very object that drives the call.
        `copies` maps each argument that would be copied, and "outputs" where the results would be,
        to the reason.

    Raises:
        As `moe_align_block_size`; TypeError for a tensor without data (fake, meta).

    Example:
        >>> explain(torch.zeros(6, 4, dtype=torch.int32)[:, ::2], 8, 16).copies
        {'topk_ids': 'it is not contiguous (shape [6, 2], strides [4, 2])'}
    """
    function = "explain"
    path = checks.check_path(function, path)  # type: ignore[assignment]
    problem, operands, _ = check(
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
        out = check_out(function, out, problem, topk_ids.device)
    return _ops.plan_call(function, problem, operands, out, path)


# -- shared by the entry points ------------------------------------------------------------------


def check(
    function,
    topk_ids,
    num_experts,
    block_size,
    topk,
    expert_map,
    ignore_invalid_experts,
    pad_sorted_ids,
    num_valid_pairs,
) -> tuple[AlignProblem, dict[str, torch.Tensor], int | None]:
    """Checks all but data: the problem, its tensors by name, num_valid_pairs if it is an int."""
    topk_ids = checks.check_topk_ids(function, topk_ids)
    num_experts = _checks.check_num_experts(function, num_experts)
    block_size = _checks.check_block_size(function, block_size)
    if topk is not None:
        checks.check_topk(function, topk, topk_ids)
    checks.check_bool(function, "ignore_invalid_experts", ignore_invalid_experts)
    checks.check_bool(function, "pad_sorted_ids", pad_sorted_ids)
    if expert_map is not None:
        checks.check_expert_map(function, expert_map, num_experts, topk_ids.device)
    count, limit = checks.check_num_valid_pairs(function, num_valid_pairs, topk_ids.device)
    problem = AlignProblem(
        topk_ids.numel(), num_experts, block_size, ignore_invalid_experts, pad_sorted_ids
    )
    if checks.sizes_are_known():
        checks.check_capacity(function, "topk_ids", problem.capacity)
    operands = {"topk_ids": topk_ids}
    if expert_map is not None:
        operands["expert_map"] = expert_map
    if count is not None:
        operands["num_valid_pairs"] = count
    return problem, operands, limit


def op_options(problem: AlignProblem, operands: dict[str, torch.Tensor], limit: int | None):
    return (
        operands.get("expert_map"),
        operands.get("num_valid_pairs"),
        limit,
        problem.ignore_invalid_experts,
        problem.pad_sorted_ids,
    )


def check_out(
    function: str, out: Sequence[torch.Tensor], problem: AlignProblem, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three contiguous int32 tensors of the exact shapes. The operator checks overlap."""
    remedy = "Pass (sorted_token_ids, expert_ids, num_tokens_post_pad) from torch.empty."
    if not isinstance(out, (tuple, list)) or len(out) != 3:
        what = f"{len(out)} items" if isinstance(out, (tuple, list)) else _checks.describe(out)
        raise TypeError(_checks.message(function, "out", "be three tensors", what, remedy))
    for i, (target, shape) in enumerate(zip(out, problem.outputs.values(), strict=True)):
        if not isinstance(target, torch.Tensor) or target.dtype != torch.int32:
            what = _checks.describe(target)
            raise TypeError(
                _checks.message(function, f"out[{i}]", "be an int32 tensor", what, remedy)
            )
        if tuple(target.shape) != shape:
            what, rule = _checks.describe(target), f"have shape {list(shape)}"
            raise ValueError(_checks.message(function, f"out[{i}]", rule, what, remedy))
        if target.device != device:
            rule = f"be on the device of topk_ids, {device}"
            raise ValueError(_checks.message(function, f"out[{i}]", rule, target.device, remedy))
        if target.layout != torch.strided or not target.is_contiguous():
            what = f"strides {list(target.stride())}"
            raise ValueError(_checks.message(function, f"out[{i}]", "be contiguous", what, remedy))
    return out[0], out[1], out[2]
