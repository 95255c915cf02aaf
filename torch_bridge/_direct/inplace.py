"""The in-place form: aligns into buffers that the caller brings, as vLLM's and SGLang's compiled ops do.

A buffer may be larger than the result; it is then filled to its end. The launch does that itself where the
lengths of `sorted_token_ids` and `expert_ids` fit together; otherwise torch does it afterwards. `align_into`
runs every such call; the operators around it mutate their arguments and return nothing.
"""

import dataclasses
import math
from collections.abc import Mapping

import torch

from moe_align_jax._core import checks
from torch_bridge import _ops
from torch_bridge._direct import fast_path
from torch_bridge._direct.call import Buffers
from torch_bridge._direct.problems import MAX_CAPACITY
from torch_bridge._specs import AlignSpec, BatchedSpec, SglangSpec, Spec

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
    spec: Spec,
    operands: dict[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    path: str = "auto",
) -> None:
    """Writes the results of `spec` into `buffers`, and fills what is left of each.

    Args:
        function: the name for errors.
        spec: what to compute. Its capacity is the least that is enough; the buffers may have more rows.
        operands: its tensors by name, with data, as `_ops.check_data` takes them.
        buffers: one per name of `spec.outputs`, in that order: contiguous int32 on the
            operands' device. Past the result `sorted_token_ids` gets `spec.num_pairs` and
            `expert_ids` -1.

    Raises:
        ValueError: a buffer is too small, or shares memory with another or with an operand.
        As `_ops.check_data`. Nothing is written then.
    """
    check_sizes(function, spec, buffers)
    _ops.check_data(function, spec, operands)
    check_no_overlap(function, buffers, operands)
    parts = [_first(buffers[name], shape) for name, shape in spec.outputs.items()]
    larger = _sized_by_buffers(spec, buffers)
    key = fast_path.key_of(spec, in_place=larger is not None)
    filled = _ops.run(spec, operands, None, parts, path, function, key, larger)
    if larger is not None and filled[0] is larger.out[0]:
        return
    for (name, shape), part in zip(spec.outputs.items(), parts, strict=True):
        flat, size = buffers[name].view(-1), math.prod(shape)
        if flat.numel() < size:  # `part` is not in the buffer
            flat.copy_(part.view(-1)[: flat.numel()])
        elif flat.numel() > size:
            flat[size:].fill_(-1 if name == "expert_ids" else spec.num_pairs)


def _sized_by_buffers(spec: Spec, buffers: Mapping[str, torch.Tensor]) -> Buffers | None:
    """The buffers as the outputs of one launch that fills them to their end.

    None where no launch can: `expert_ids` is not as long as the rows say, a batched program has its rows
    compiled in, and with no pairs nothing is launched. (Whether the program takes so many rows, the call
    finds out.)
    """
    rows, blocks = buffers["sorted_token_ids"].numel(), buffers["expert_ids"].numel()
    if blocks != checks.cdiv(rows, spec.block_size) or rows > MAX_CAPACITY:
        return None
    if isinstance(spec, BatchedSpec):
        if rows != spec.capacity:
            return None
        sized = spec
    elif spec.num_pairs == 0:
        return None
    else:
        sized = dataclasses.replace(spec, rows=rows)
    return Buffers(sized, [buffers[name].view(shape) for name, shape in sized.outputs.items()])


def _first(buffer: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The first elements of a buffer, in this shape; a new tensor where the buffer is too short.

    A buffer may be shorter than the result by what no pair can reach: the last, partial block, and the rows
    by which SGLang's capacity is rounded up.
    """
    size = math.prod(shape)
    if buffer.numel() < size:
        return buffer.new_empty(shape)
    return buffer.view(-1)[:size].view(shape)


# -- checks --------------------------------------------------------------------------------------


def least_sizes(spec: Spec) -> dict[str, int]:
    """Elements that each buffer must have, by the names of `spec.outputs`.

    Used blocks are whole and lie within the P rows, so that P // block_size of them are enough.
    """
    rows = spec.capacity
    if isinstance(spec, SglangSpec):
        rows = spec.aligned_capacity
    sizes = {name: math.prod(shape) for name, shape in spec.outputs.items()}
    return sizes | {"sorted_token_ids": rows, "expert_ids": rows // spec.block_size}


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


def check_sizes(function: str, spec: Spec, buffers: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError where a buffer is too small; the count and scatter_idx must have the exact size."""
    for name, least in least_sizes(spec).items():
        got, argument = buffers[name], _ARGUMENTS.get(name, name)
        check_plain(function, {argument: got})
        at_least = name in ("sorted_token_ids", "expert_ids")
        if got.numel() == least or at_least and got.numel() > least:
            continue
        rule = f"have {'at least ' if at_least else ''}{least} elements"
        what = checks.describe(got)
        raise ValueError(checks.message(function, argument, rule, what, _REMEDY))


def check_plain(function: str, buffers: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError where a buffer is a lazy negation: what is written there would be negated."""
    for argument, buffer in buffers.items():
        if buffer.is_neg():
            what, rule = "a tensor whose negative bit is set", "hold plain values"
            remedy = "Pass one from torch.empty."
            raise ValueError(checks.message(function, argument, rule, what, remedy))


def check_no_overlap(
    function: str, buffers: Mapping[str, torch.Tensor], operands: Mapping[str, torch.Tensor]
) -> None:
    """Raises ValueError where a buffer shares a byte with another one or with an input."""
    earlier = list(operands.items())
    for name, buffer in buffers.items():
        argument = _ARGUMENTS.get(name, name)
        for other_name, other in earlier:
            if _ops.overlaps(buffer, other):
                rule, what = f"not overlap {other_name}", "tensors that share memory"
                remedy = "Pass a buffer of its own memory, for example from torch.empty."
                raise ValueError(checks.message(function, argument, rule, what, remedy))
        earlier.append((argument, buffer))


# -- operators -----------------------------------------------------------------------------------


def _run(path: str, spec: Spec, operands: dict[str, torch.Tensor], buffers) -> None:
    named = dict(zip(spec.outputs, buffers, strict=True))
    align_into(f"ops_{spec.name}", spec, operands, named, path)


def _block_align_into(path, topk_ids, expert_map, num_experts, block_size, *buffers):
    *three, scatter_idx = buffers
    with_scatter = scatter_idx is not None
    spec = AlignSpec(
        topk_ids.numel(),
        num_experts,
        block_size,
        ignore_invalid_experts=expert_map is not None,
        with_scatter_idx=with_scatter,
    )
    operands = _ops.align_operands(topk_ids, expert_map, None)
    _run(path, spec, operands, buffers if with_scatter else three)


def _sglang_block_align_into(
    path, topk_ids, num_experts, block_size, ignore_invalid_expert, *buffers
):
    spec = SglangSpec(topk_ids.numel(), num_experts, block_size, ignore_invalid_expert)
    _run(path, spec, {"topk_ids": topk_ids}, buffers)


def _batched_block_align_into(path, expert_num_tokens, max_tokens_per_batch, block_size, *buffers):
    spec = BatchedSpec(expert_num_tokens.shape[0], max_tokens_per_batch, block_size)
    _run(path, spec, {"expert_num_tokens": expert_num_tokens}, buffers)


_BODIES = {
    "block_align_into": _block_align_into,
    "sglang_block_align_into": _sglang_block_align_into,
    "batched_block_align_into": _batched_block_align_into,
}
for _base, _body in _BODIES.items():
    _ops.register(_base, _SCHEMAS[_base], _ops.both(_body))
