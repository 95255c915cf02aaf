"""The way of a call that was seen before: same shape, dtype, device and sizes.

Checks, plan and size arithmetic depend on these alone; once they have passed, a later call needs only the
launch. What is asked again is what can differ: the tensors' layout and memory, and the current device.
"""

from collections.abc import Sequence
from typing import Any

import torch

from torch_bridge import direct, direct_call
from torch_bridge.problems import AlignProblem, Problem

_MAX_KEPT = 1 << 14
_kept: dict[tuple, "Shortcut"] = {}
_INT32, _ONE = torch.int32, (1,)
# Dynamo takes it for True. Other tracers have a dispatch mode, which is asked for below.
_is_tracing = torch.compiler.is_dynamo_compiling

try:  # who records or transforms operators must see ours
    from torch._C import _len_torch_dispatch_stack as _watched
except ImportError:  # pragma: no cover

    def _watched() -> int:
        """Whether a torch dispatch mode is active; unknown, so every call goes by the dispatcher."""
        return 1


try:  # inside torch.func's transforms tensors look plain, and have no pointer or one of 0
    from torch._C._functorch import maybe_current_level as _transformed  # type: ignore[import]
except ImportError:  # pragma: no cover

    def _transformed() -> int | None:
        """The level of torch.func's transforms, or None; unknown, as above."""
        return 1


def open_to_all() -> bool:
    """Whether a call may pass by torch's dispatcher: nobody traces, records or transforms operators."""
    return not (_is_tracing() or _watched()) and _transformed() is None


class Shortcut:
    """An alignment of one size on one device, with or without an expert map."""

    def __init__(
        self, problem: AlignProblem, ids: torch.Tensor, program: direct.Program, capacity: int
    ):
        self._device = ids.get_device()
        self._num_experts = problem.num_experts
        self._input_bytes = problem.num_pairs * ids.element_size()
        # From bytes to elements, as a launch gives a size: times 256.
        self._shift = 8 - (ids.element_size().bit_length() - 1)
        self._num_pairs, self._capacity = problem.num_pairs << 8, capacity << 8
        lengths = (capacity, -(-capacity // problem.block_size), 1)
        self._shapes = [(length,) for length in lengths]
        self._sizes = [4 * length for length in lengths]
        self._launch = program.launch

    def run(
        self, ids: torch.Tensor, expert_map: torch.Tensor | None, out: Sequence[torch.Tensor] | None
    ) -> Any:
        """The three results; None where the ordinary way has to look (and to complain)."""
        if direct.current_device() != self._device or not ids.is_contiguous() or ids.is_neg():
            return None
        if expert_map is not None and not self._fits(expert_map):
            return None
        pointer = ids.data_ptr()
        if out is None:
            empty = direct.empty_strided
            rows, blocks, count = self._shapes
            out = (
                empty(rows, _ONE, _INT32),
                empty(blocks, _ONE, _INT32),
                empty(count, _ONE, _INT32),
            )
            rows, blocks, count = out
            rows, blocks, count = rows.data_ptr(), blocks.data_ptr(), count.data_ptr()
        else:
            targets = self._targets(pointer, expert_map, out)
            if targets is None:
                return None
            rows, blocks, count = targets
        behind = pointer & 255
        pairs, capacity, first = self._num_pairs, self._capacity, behind << self._shift
        if expert_map is None:
            self._launch(pointer - behind, pairs, capacity, first, rows, blocks, count)
        else:
            local = expert_map.data_ptr()
            self._launch(pointer - behind, local, pairs, capacity, first, rows, blocks, count)
        return out

    def _fits(self, expert_map: Any) -> bool:
        return (
            type(expert_map) is torch.Tensor
            and expert_map.dtype is torch.int32
            and expert_map.dim() == 1
            and expert_map.shape[0] == self._num_experts
            and expert_map.get_device() == self._device
            and expert_map.is_contiguous()
            and not expert_map.is_neg()
        )

    def _targets(
        self, pointer: int, expert_map: torch.Tensor | None, out: Sequence[torch.Tensor]
    ) -> list[int] | None:
        """Pointers of a fitting `out`, which overlaps nothing."""
        if type(out) not in (tuple, list) or len(out) != 3:
            return None
        targets, ends, device = [], [], self._device
        for target, shape, size in zip(out, self._shapes, self._sizes):  # noqa: B905 - 3 each
            if (
                type(target) is not torch.Tensor
                or target.dtype is not _INT32
                or target.shape != shape
                or target.get_device() != device
                or not target.is_contiguous()
                or target.is_neg()
            ):
                return None
            start = target.data_ptr()
            if start & 15:
                return None
            targets.append(start)
            ends.append(start + size)
        a, b, c = targets
        end_a, end_b, end_c = ends
        if a < end_b and b < end_a or a < end_c and c < end_a or b < end_c and c < end_b:
            return None
        end = pointer + self._input_bytes
        if (
            a < end
            and pointer < end_a
            or b < end
            and pointer < end_b
            or c < end
            and pointer < end_c
        ):
            return None
        if expert_map is not None:
            first = expert_map.data_ptr()
            end = first + 4 * self._num_experts
            if a < end and first < end_a or b < end and first < end_b or c < end and first < end_c:
                return None
        return targets


def attempt(
    ids: Any,
    num_experts: Any,
    block_size: Any,
    pad_sorted_ids: Any,
    expert_map: Any = None,
    ignore_invalid_experts: Any = False,
    topk: Any = None,
    out: Any = None,
    capacity: int = 0,
) -> Any:
    """The three results of a call like one that was kept; None for every other call.

    `capacity`: rows of the caller's buffers in the in-place form, 0 in the others.
    """
    if (
        _kept
        and type(ids) is torch.Tensor
        and type(num_experts) is int
        and type(block_size) is int
        and type(pad_sorted_ids) is bool
        and type(ignore_invalid_experts) is bool
        and (topk is None or type(topk) is int)
    ):
        mode = None if expert_map is None else ignore_invalid_experts
        options = (pad_sorted_ids, mode, topk, capacity)
        try:
            found = _kept.get(
                (ids.shape, ids.dtype, ids.get_device(), num_experts, block_size, options)
            )
        except RuntimeError:  # a nested tensor has no shape
            return None
        if found is not None:
            return found.run(ids, expert_map, out)
    return None


def keep(
    problem: Problem,
    operands: dict[str, torch.Tensor],
    topk: int | None = None,
    capacity: int = 0,
) -> None:
    """After all checks: the next call like this one may take the shortcut, if its program is loaded."""
    ids = operands.get("topk_ids")
    if (
        not isinstance(problem, AlignProblem)
        or ids is None
        or type(ids) is not torch.Tensor
        or "num_valid_pairs" in operands
        or problem.with_counts
        or problem.with_inverse
        or problem.with_scatter_idx
        or ids.dtype not in direct_call.ID_WORDS
        or problem.num_pairs == 0
    ):
        return
    needed = direct_call.kernel_problem(problem, operands)
    program = direct.loaded(ids.get_device(), needed)
    rows = capacity or problem.capacity
    if program is None or rows > program.max_capacity:
        return
    if len(_kept) >= _MAX_KEPT:
        _kept.clear()
    mode = problem.ignore_invalid_experts if "expert_map" in operands else None
    options = (problem.pad_sorted_ids, mode, topk, capacity)
    key = (ids.shape, ids.dtype, ids.get_device(), problem.num_experts, problem.block_size, options)
    _kept[key] = Shortcut(problem, ids, program, rows)
