"""Runs a call on the direct path for the first time: prepares its tensors, launches, and remembers it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from moe_align_jax._core import checks
from torch_bridge._direct import fast_path
from torch_bridge._direct.problems import ID_WORDS
from torch_bridge._direct.store import Store
from torch_bridge._specs import BatchedSpec, Spec

if TYPE_CHECKING:
    from torch_bridge._resolved import Resolved

# The kernels store 16 bytes at a time.
_STORE_BYTES = 16
_UNSIGNED = (torch.uint32, torch.uint64)


class Buffers(NamedTuple):
    """The caller's buffers of the in-place form, which may have more rows than the result.

    Attributes:
        spec: what is asked, with the rows that the buffers have.
        out: the buffers in the shapes of `spec.outputs`.
    """

    spec: Spec
    out: Sequence[torch.Tensor]


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
    if out is not None:
        off = [f"out[{i}]" for i, x in enumerate(out) if x.data_ptr() % _STORE_BYTES]
        if off:
            verb = "starts" if len(off) == 1 else "start"
            found["outputs"] = f"{', '.join(off)} {verb} off a {_STORE_BYTES}-byte boundary"
    return found


def first_launch(
    store: Store,
    decided: "Resolved",
    operands: dict[str, torch.Tensor],
    max_valid_pairs: int | None = None,
    out: Sequence[torch.Tensor] | None = None,
    larger: Buffers | None = None,
) -> Sequence[torch.Tensor]:
    """Does what was decided, on torch's current stream, and lets the fast path know the call.

    Args:
        store: has the program.
        decided: what is asked, and which program serves it.
        operands: the tensors by name, on one device, with data.
        max_valid_pairs: num_valid_pairs as an int.
        out: tensors of the results to write; they overlap nothing. None for new ones.
        larger: buffers around `out`. The launch fills them to their end if the program takes so many rows;
            their tensors are returned then.

    Returns:
        The int32 tensors of the results, in order.

    Raises:
        Miss, Unavailable: as `Store.program_for`. Nothing is written then.
    """
    index = next(iter(operands.values())).get_device()
    if index != store.machine.current_device():
        with store.machine.on_device(index):
            return first_launch(store, decided, operands, max_valid_pairs, out, larger)
    spec, problem = decided.spec, decided.problem
    assert problem is not None
    program = store.program_for(decided.function, index, problem)
    rows = 0
    if larger is not None and larger.spec.capacity <= program.max_capacity:
        (spec, out), rows = larger, larger.spec.capacity
    given, targets = operands, out
    if decided.plan.copies or max_valid_pairs is not None:
        given = _as_the_kernels_read_them(spec, operands, max_valid_pairs)
    if out is not None:
        # torch writes scatter_idx, wherever it lies; the kernels write the others.
        targets = [
            torch.empty_like(x) if x.data_ptr() % _STORE_BYTES and name != "scatter_idx" else x
            for name, x in zip(spec.outputs, out, strict=True)
        ]
    call = fast_path.KnownCall(store.machine, program, spec, problem, given)
    ids, *options = given.values()
    results = call.run(ids, options, targets, True)
    if max_valid_pairs is None and (larger is None or rows):
        fast_path.keep(decided.key, call, operands, rows)
    if out is None:
        return results
    for target, result in zip(out, results, strict=True):
        if target is not result:
            target.copy_(result)
    return list(out)


def _as_the_kernels_read_them(
    spec: Spec, operands: Mapping[str, torch.Tensor], max_valid_pairs: int | None
) -> dict[str, torch.Tensor]:
    """The operands, converted where `copies` says so; a bound that is an int becomes a tensor."""
    operands = {name: x.detach().resolve_neg() for name, x in operands.items()}
    if isinstance(spec, BatchedSpec):
        counts = operands["expert_num_tokens"].contiguous()
        if counts.dtype != torch.int32:
            counts = bound(counts).to(torch.int64).clamp(0, spec.max_tokens_per_batch)
        return {"expert_num_tokens": counts.to(torch.int32)}
    ids = operands["topk_ids"]
    if ids.dtype not in ID_WORDS:
        ids = ids.to(torch.int32)
    given = {"topk_ids": ids.contiguous()}
    if "expert_map" in operands:
        expert_map = operands["expert_map"]
        if expert_map.dtype != torch.int32:
            expert_map = narrow(expert_map, -1, spec.num_experts - 1)
        given["expert_map"] = expert_map.contiguous()
    if max_valid_pairs is not None:
        given["num_valid_pairs"] = torch.full(
            (1,), max_valid_pairs, dtype=torch.int32, device=ids.device
        )
    elif "num_valid_pairs" in operands:
        given["num_valid_pairs"] = bound(operands["num_valid_pairs"])
    return given


def narrow(tensor: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """As int32; values outside [low, high], compared in their own dtype, become `low`."""
    if tensor.dtype in _UNSIGNED:  # torch has few operations on these
        tensor = tensor.view(torch.int32 if tensor.dtype == torch.uint32 else torch.int64)
    wide = tensor.to(torch.int64)
    return torch.where((wide < low) | (wide > high), low, wide).to(torch.int32)


def bound(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers that bound something, as int32: what exceeds int32 becomes its largest value."""
    if tensor.dtype == torch.int32:
        return tensor
    is_unsigned = tensor.dtype in _UNSIGNED
    if is_unsigned:
        tensor = tensor.view(torch.int32 if tensor.dtype == torch.uint32 else torch.int64)
    wide = tensor.to(torch.int64)
    if is_unsigned:  # beyond the signed type: more than there can be
        wide = torch.where(wide < 0, checks.INT32_MAX, wide)
    return wide.clamp(-1, checks.INT32_MAX).to(torch.int32)
