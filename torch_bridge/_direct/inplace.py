"""The in-place form: aligns into buffers that the caller brings, as the peers' compiled ops do.

A buffer may be larger than the result: it is filled to its end, by the launch itself where the lengths of
`sorted_token_ids` and `expert_ids` fit together, else by torch. `align_into` is the one place that
runs such a call; the operators around it mutate their arguments and return nothing.
"""

import dataclasses
import math
from collections.abc import Mapping

import torch

from moe_align_jax._core import checks
from torch_bridge import _ops
from torch_bridge._direct import fast_path, program
from torch_bridge._specs import AlignProblem, BatchedProblem, Problem, SglangProblem

_library = torch.library.Library("moe_align_jax", "FRAGMENT")
_REMEDY = "Pass the int32 buffers that the op shall fill, from torch.empty."

# What the peers' ops call the buffers, where it is not the name of the result.
_ARGUMENTS = {"expert_ids": "experts_ids", "num_tokens_post_padded": "num_tokens_post_pad"}

# Every operator has these three.
_BUFFERS = "Tensor(a!) sorted_token_ids, Tensor(b!) expert_ids, Tensor(c!) num_tokens_post_padded"
_SCHEMAS = {
    "block_align_into": (
        "(Tensor topk_ids, Tensor? expert_map, int num_experts, int block_size, "
        f"{_BUFFERS}, Tensor(d!)? scatter_idx) -> ()"
    ),
    "sglang_block_align_into": (
        "(Tensor topk_ids, int num_experts, int block_size, bool ignore_invalid_expert, "
        f"{_BUFFERS}) -> ()"
    ),
    "batched_block_align_into": (
        f"(Tensor expert_num_tokens, int max_tokens_per_batch, int block_size, {_BUFFERS}) -> ()"
    ),
}


def align_into(
    function: str,
    problem: Problem,
    operands: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    path: str = "auto",
) -> None:
    """Writes the results of `problem` into `buffers`, and fills what is left of each.

    Args:
        function: the name for errors.
        problem: what to compute. Its capacity is the least that it needs, not the buffers'.
        operands: its tensors by name, with data, as `ops.plan_call` takes them.
        buffers: one per name of `problem.outputs`, in that order: contiguous int32 on the
            operands' device. Past the result `sorted_token_ids` gets `problem.num_pairs` and
            `expert_ids` -1.

    Raises:
        ValueError: a buffer is too small, or shares memory with another or with an operand.
        As `ops.plan_call`. Nothing is written then.
    """
    check_sizes(function, problem, buffers)
    check_no_overlap(function, buffers, operands)
    parts = [_first(buffers[name], shape) for name, shape in problem.outputs.items()]
    whole = _sized_by_buffers(problem, buffers)
    filled = _ops.run(problem, dict(operands), None, parts, path, function, whole)
    if whole is not None:
        if path == "auto":
            fast_path.keep(problem, dict(operands), capacity=whole[0].capacity)
        if filled[0] is whole[1][0]:
            return
    for (name, shape), part in zip(problem.outputs.items(), parts, strict=True):
        flat, size = buffers[name].view(-1), math.prod(shape)
        if flat.numel() < size:  # `part` is not in the buffer
            flat.copy_(part.view(-1)[: flat.numel()])
        elif flat.numel() > size:
            flat[size:].fill_(-1 if name == "expert_ids" else problem.num_pairs)


def _sized_by_buffers(
    problem: Problem, buffers: Mapping[str, torch.Tensor]
) -> tuple[Problem, list[torch.Tensor]] | None:
    """The same with P from the buffers, for one launch that fills them to their end, and its outputs.

    None where a launch takes no such P: `expert_ids` is not as long as it says, a batched program has
    its P compiled in, and with no pairs nothing is launched. (`direct.TooManyRows` comes later.)
    """
    rows, blocks = buffers["sorted_token_ids"].numel(), buffers["expert_ids"].numel()
    if blocks != checks.cdiv(rows, problem.block_size) or rows > program.MAX_CAPACITY:
        return None
    if isinstance(problem, BatchedProblem):
        if rows != problem.capacity:
            return None
        sized = problem
    elif problem.num_pairs == 0:
        return None
    else:
        sized = dataclasses.replace(problem, rows=rows)
    return sized, [buffers[name].view(shape) for name, shape in sized.outputs.items()]


def _first(buffer: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The first elements of a buffer, in this shape; a tensor of its own where they do not fit.

    They may lack what no pair can reach: the last, partial block and SGLang's rounded rows.
    """
    size = math.prod(shape)
    if buffer.numel() < size:
        return buffer.new_empty(shape)
    return buffer.view(-1)[:size].view(shape)


# -- checks --------------------------------------------------------------------------------------


def least_sizes(problem: Problem) -> dict[str, int]:
    """Elements that each buffer must have, by the names of `problem.outputs`.

    Used blocks are whole and lie within the P rows, so that P // block_size of them are enough.
    """
    rows = problem.capacity
    if isinstance(problem, SglangProblem):
        rows = problem.aligned_capacity
    sizes = {name: math.prod(shape) for name, shape in problem.outputs.items()}
    return sizes | {"sorted_token_ids": rows, "expert_ids": rows // problem.block_size}


def check_buffer(function: str, argument: str, value: object, device: torch.device) -> None:
    """What tracing can check too: a contiguous int32 tensor on the device of the inputs."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int32:
        what = checks.describe(value)
        raise TypeError(checks.message(function, argument, "be an int32 tensor", what, _REMEDY))
    if value.device != device:
        rule = f"be on the same device as the inputs, {device}"
        raise ValueError(checks.message(function, argument, rule, value.device, _REMEDY))
    if value.layout != torch.strided or not value.is_contiguous():
        what = f"{checks.describe(value)} of another layout"
        raise ValueError(checks.message(function, argument, "be contiguous", what, _REMEDY))


def check_sizes(function: str, problem: Problem, buffers: Mapping[str, torch.Tensor]) -> None:
    """Each buffer holds its result; the count and scatter_idx exactly."""
    for name, least in least_sizes(problem).items():
        got, argument = buffers[name], _ARGUMENTS.get(name, name)
        if got.is_neg():
            what, rule = "a tensor whose negative bit is set", "hold plain values"
            raise ValueError(checks.message(function, argument, rule, what, _REMEDY))
        at_least = name in ("sorted_token_ids", "expert_ids")
        if got.numel() == least or at_least and got.numel() > least:
            continue
        rule = f"have {'at least ' if at_least else ''}{least} elements"
        what = checks.describe(got)
        raise ValueError(checks.message(function, argument, rule, what, _REMEDY))


def check_no_overlap(
    function: str, buffers: Mapping[str, torch.Tensor], operands: Mapping[str, torch.Tensor]
) -> None:
    """No buffer shares a byte with another one or with an input."""
    earlier = list(operands.items())
    for name, buffer in buffers.items():
        argument = _ARGUMENTS.get(name, name)
        for other_name, other in earlier:
            if _ops.overlaps(buffer, other):
                rule, what = f"not overlap {other_name}", "tensors that share memory"
                raise ValueError(checks.message(function, argument, rule, what, _REMEDY))
        earlier.append((argument, buffer))


# -- operators -----------------------------------------------------------------------------------


def _run(path: str, problem: Problem, operands: dict[str, torch.Tensor], buffers) -> None:
    named = dict(zip(problem.outputs, buffers, strict=True))
    align_into(f"ops_{problem.name}", problem, operands, named, path)


def _block_align_into(path, topk_ids, expert_map, num_experts, block_size, *buffers):
    *three, scatter_idx = buffers
    with_scatter = scatter_idx is not None
    problem = AlignProblem(
        topk_ids.numel(),
        num_experts,
        block_size,
        ignore_invalid_experts=expert_map is not None,
        with_scatter_idx=with_scatter,
    )
    operands = _ops.align_operands(topk_ids, expert_map, None)
    _run(path, problem, operands, buffers if with_scatter else three)


def _sglang_block_align_into(
    path, topk_ids, num_experts, block_size, ignore_invalid_expert, *buffers
):
    problem = SglangProblem(topk_ids.numel(), num_experts, block_size, ignore_invalid_expert)
    _run(path, problem, {"topk_ids": topk_ids}, buffers)


def _batched_block_align_into(path, expert_num_tokens, max_tokens_per_batch, block_size, *buffers):
    problem = BatchedProblem(expert_num_tokens.shape[0], max_tokens_per_batch, block_size)
    _run(path, problem, {"expert_num_tokens": expert_num_tokens}, buffers)


def _nothing(*arguments) -> None:
    """The fake of each: it returns nothing."""
    del arguments


_BODIES = {
    "block_align_into": _block_align_into,
    "sglang_block_align_into": _sglang_block_align_into,
    "batched_block_align_into": _batched_block_align_into,
}
for _base, _body in _BODIES.items():
    _ops.register(_library, _base, _SCHEMAS[_base], _ops.both(_body), _nothing)
