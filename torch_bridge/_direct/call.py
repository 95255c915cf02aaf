"""Runs a plan on the direct path: prepares the operands in torch, launches, finishes the rare outputs."""

from collections.abc import Mapping, Sequence

import torch

from moe_align_jax._core import checks
from moe_align_jax.types import AlignProblem as KernelProblem
from moe_align_jax.types import BatchedAlignProblem
from torch_bridge._direct import program as direct
from torch_bridge._specs import AlignProblem, BatchedProblem, Problem, SglangProblem

ID_WORDS = {torch.int32: 1, torch.uint32: 1, torch.int64: 2, torch.uint64: 2}
_STORE_BYTES = 16
_UNSIGNED = (torch.uint32, torch.uint64)


def refuses(problem: Problem, operands: Mapping[str, torch.Tensor]) -> str | None:
    """Why the direct path cannot run this call on its device, or None."""
    first = next(iter(operands.values()))
    if reason := direct.unavailable(first.device):
        return reason
    if problem.capacity > direct.MAX_CAPACITY:
        return f"{problem.capacity} rows are too many for the kernels' 32-bit loops"
    if isinstance(problem, SglangProblem) and first.dtype in _UNSIGNED:
        return f"id -1 has no bit pattern of its own in {first.dtype}"
    return direct.failure(first.device.index, kernel_problem(problem, operands))


def sized(
    num_pairs: int,
    num_experts: int,
    block_size: int,
    dtype: torch.dtype,
    *,
    expert_map: str = "",
    num_valid_pairs: bool = False,
    tokens_per_expert: bool = False,
    return_inverse: bool = False,
    minus_one: bool = False,
    tuning: str = "",
) -> KernelProblem:
    """The program for a size; with `minus_one`, num_experts does not count the bucket of id -1.

    `tuning`: `direct.tuning` of the device.
    """
    return direct.program_problem(
        num_pairs,
        num_experts + minus_one,
        block_size,
        ID_WORDS.get(dtype, 1),
        expert_map,
        num_valid_pairs,
        tokens_per_expert,
        return_inverse,
        minus_one,
        tuning,
    )


def kernel_problem(
    problem: Problem, operands: Mapping[str, torch.Tensor], has_limit: bool = False
) -> KernelProblem | BatchedAlignProblem:
    """The program that serves a call."""
    tuning = direct.tuning(next(iter(operands.values())).device)
    if isinstance(problem, BatchedProblem):
        return BatchedAlignProblem(
            problem.num_experts, problem.max_tokens_per_batch, problem.block_size, tuning
        )
    sizes = (problem.num_pairs, problem.num_experts, problem.block_size)
    dtype = operands["topk_ids"].dtype
    if isinstance(problem, SglangProblem):
        return sized(
            *sizes,
            dtype,
            tokens_per_expert=problem.with_inactive_blocks,
            minus_one=not problem.ignore_invalid_expert,
            tuning=tuning,
        )
    mode = ""
    if "expert_map" in operands:
        mode = "filter" if problem.ignore_invalid_experts else "label"
    return sized(
        *sizes,
        dtype,
        expert_map=mode,
        num_valid_pairs=has_limit or "num_valid_pairs" in operands,
        tokens_per_expert=problem.with_counts,
        return_inverse=problem.with_inverse or problem.with_scatter_idx,
        tuning=tuning,
    )


def copies(
    operands: Mapping[str, torch.Tensor], out: Sequence[torch.Tensor] | None = None
) -> dict[str, str]:
    """Which operands are copied (and "outputs" for those of `out`), and why.

    Every other one is read, or written, where it lies.
    """
    found = {}
    for name, tensor in operands.items():
        if tensor.is_neg():
            found[name] = "it is a lazy negation"
        elif name != "num_valid_pairs" and not tensor.is_contiguous():
            what = f"shape {list(tensor.shape)}, strides {list(tensor.stride())}"
            found[name] = f"it is not contiguous ({what})"
        elif tensor.dtype not in (ID_WORDS if name == "topk_ids" else (torch.int32,)):
            found[name] = f"its {tensor.dtype} is converted to int32"
    off = [f"out[{i}]" for i, tensor in enumerate(out or ()) if not _on_boundary(tensor)]
    if off:
        verb = "starts" if len(off) == 1 else "start"
        found["outputs"] = f"{', '.join(off)} {verb} off a {_STORE_BYTES}-byte boundary"
    return found


def _on_boundary(target: torch.Tensor) -> bool:
    """Whether the kernels may store into it at once."""
    return target.data_ptr() % _STORE_BYTES == 0


def _narrow(tensor: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """As contiguous int32; values outside [low, high] (compared in their own dtype) become `low`."""
    if tensor.dtype == torch.int32:
        return tensor.contiguous()
    if tensor.dtype in (torch.uint32, torch.uint64):  # torch has few operations on these
        tensor = tensor.view(torch.int32 if tensor.dtype == torch.uint32 else torch.int64)
    wide = tensor.to(torch.int64)
    return torch.where((wide < low) | (wide > high), low, wide).to(torch.int32).contiguous()


def _count(tensor: torch.Tensor) -> torch.Tensor:
    """A bound on the pairs as int32, saturated."""
    if tensor.dtype == torch.int32:
        return tensor
    unsigned = tensor.dtype in _UNSIGNED
    if unsigned:
        tensor = tensor.view(torch.int32 if tensor.dtype == torch.uint32 else torch.int64)
    wide = tensor.to(torch.int64)
    if unsigned:  # beyond the signed type: more pairs than there can be
        wide = torch.where(wide < 0, checks.INT32_MAX, wide)
    return wide.clamp(-1, checks.INT32_MAX).to(torch.int32)


def execute(
    problem: Problem,
    operands: Mapping[str, torch.Tensor],
    *,
    max_valid_pairs: int | None = None,
    out: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """The int32 tensors of `problem.outputs`, in order, or `out`, written on torch's current stream.

    Raises:
        direct.Miss, direct.Unavailable: as `direct.program_for`.
        direct.TooManyRows: the problem's rows are too many for the program.
    """
    device = next(iter(operands.values())).device
    if device.index != direct.current_device():
        with torch.cuda.device(device):
            return execute(problem, operands, max_valid_pairs=max_valid_pairs, out=out)
    if isinstance(problem, BatchedProblem):
        return _batched(problem, operands["expert_num_tokens"], out)
    needed = kernel_problem(problem, operands, max_valid_pairs is not None)
    assert isinstance(needed, KernelProblem)
    program = direct.program_for(problem.name, device.index, needed)
    if problem.capacity > program.max_capacity:
        raise direct.TooManyRows(f"{problem.capacity} rows; {program.max_capacity} are possible")

    ids = operands["topk_ids"].detach()
    if ids.is_neg():
        ids = ids.resolve_neg()
    ids = ids.contiguous() if ids.dtype in ID_WORDS else ids.to(torch.int32).contiguous()
    kept, pointers = [], []  # what lives until the launch
    if needed.expert_map:
        kept.append(_narrow(operands["expert_map"].detach(), -1, problem.num_experts - 1))
    if needed.has_num_valid_pairs:
        if max_valid_pairs is not None:
            limit = torch.full((1,), max_valid_pairs, dtype=torch.int32, device=device)
        else:
            limit = _count(operands["num_valid_pairs"].detach())
        kept.append(limit)
    pointers = [tensor.data_ptr() for tensor in kept]

    capacity = problem.capacity
    shapes = {
        "sorted_token_ids": capacity,
        "expert_ids": -(-capacity // problem.block_size),
        "num_tokens_post_padded": problem.outputs["num_tokens_post_padded"][0],
        "tokens_per_expert": needed.num_experts,
        "row_of_pair": problem.num_pairs,
    }
    given = dict(zip(problem.outputs, out or (), strict=bool(out)))
    written = {
        name: given[name]
        if name in given and _on_boundary(given[name])
        else torch.empty(shapes[name], dtype=torch.int32, device=device)
        for name in program.outputs
    }
    direct.align(program, ids, problem.num_pairs, capacity, tuple(pointers), list(written.values()))
    return finish(problem, written, given)


def is_unfinished(problem: Problem) -> bool:
    """Whether the kernels do not write all results themselves."""
    if isinstance(problem, AlignProblem):
        return problem.with_scatter_idx
    return isinstance(problem, SglangProblem) and problem.with_inactive_blocks


def finish(
    problem: Problem, written: dict[str, torch.Tensor], given: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """What the kernels do not write themselves, and copies into targets off a 16-byte boundary."""
    if isinstance(problem, AlignProblem) and problem.with_scatter_idx:
        rows = written["row_of_pair"]
        pair = torch.arange(problem.num_pairs, dtype=torch.int32, device=rows.device)
        # A dropped pair's row is -1, and so are all of its bits.
        target = given.get("scatter_idx")
        target = pair.view(-1, 1) if target is None else target
        torch.bitwise_or(pair, rows >> 31, out=target.view(-1))
        written["scatter_idx"] = target
    if isinstance(problem, SglangProblem) and problem.with_inactive_blocks:
        blocks = written["num_tokens_post_padded"][1:]  # the kernels write the first word
        if problem.ignore_invalid_expert:
            blocks.zero_()
        else:
            counts = written["tokens_per_expert"][:1]
            torch.add(counts, problem.block_size - 1, out=blocks)
            blocks.floor_divide_(problem.block_size)
    for name, target in given.items():
        if written[name] is not target:
            target.copy_(written[name])
            written[name] = target
    return [written[name] for name in problem.outputs]


def _batched(
    problem: BatchedProblem, counts: torch.Tensor, out: Sequence[torch.Tensor] | None
) -> list[torch.Tensor]:
    needed = kernel_problem(problem, {"expert_num_tokens": counts})
    program = direct.program_for(problem.name, counts.device.index, needed)
    given = counts.detach().contiguous()
    if given.dtype != torch.int32:
        if given.dtype in _UNSIGNED:
            given = _count(given)
        given = given.to(torch.int64).clamp(0, problem.max_tokens_per_batch).to(torch.int32)
    targets = dict(zip(problem.outputs, out or (), strict=bool(out)))
    written = {
        name: targets[name]
        if name in targets and _on_boundary(targets[name])
        else torch.empty(shape, dtype=torch.int32, device=counts.device)
        for name, shape in needed.outputs.items()
    }
    program.launch(given.data_ptr(), *[x.data_ptr() for x in written.values()])
    return finish(problem, written, targets)
