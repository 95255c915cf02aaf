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
_is_tracing = torch.compiler.is_compiling

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
        self._item_size = ids.element_size()
        self._input_bytes = problem.num_pairs * self._item_size
        self._sizes = (problem.num_pairs << 8, capacity << 8)
        self._lengths = (capacity, -(-capacity // problem.block_size), 1)
        self._program = program

    def __call__(
        self,
        ids: torch.Tensor,
        expert_map: torch.Tensor | None = None,
        out: Sequence[torch.Tensor] | None = None,
    ) -> Any:
        """The three results; None where the ordinary way has to look (and to complain)."""
        if direct.current_device() != self._device or not ids.is_contiguous() or ids.is_neg():
            return None
        pointer = ids.data_ptr()
        behind = pointer & 255
        if expert_map is None:
            inputs = (pointer - behind, *self._sizes, behind // self._item_size << 8)
        elif self._fits(expert_map):
            first_id = behind // self._item_size << 8
            inputs = (pointer - behind, expert_map.data_ptr(), *self._sizes, first_id)
        else:
            return None
        if out is None:
            empty = direct.empty_int32
            rows, blocks, count = self._lengths
            out = x, y, z = empty(rows), empty(blocks), empty(count)
            targets = (x.data_ptr(), y.data_ptr(), z.data_ptr())
        else:
            targets = self._targets(pointer, expert_map, out)
            if targets is None:
                return None
        self._program.launch(inputs + targets)
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
    ) -> tuple[int, ...] | None:
        """Pointers of a fitting `out`, which overlaps nothing."""
        if type(out) not in (tuple, list) or len(out) != 3:
            return None
        spans = [(pointer, pointer + self._input_bytes)]
        if expert_map is not None:
            spans.append((expert_map.data_ptr(), expert_map.data_ptr() + 4 * self._num_experts))
        targets = []
        for target, length in zip(out, self._lengths, strict=True):
            if (
                type(target) is not torch.Tensor
                or target.dtype is not torch.int32
                or target.dim() != 1
                or target.shape[0] != length
                or target.get_device() != self._device
                or not target.is_contiguous()
                or target.is_neg()
            ):
                return None
            start = target.data_ptr()
            if start & 15:
                return None
            targets.append(start)
            spans.append((start, start + 4 * length))
        spans.sort()
        for (_, end), (start, _) in zip(spans, spans[1:], strict=False):
            if start < end:
                return None
        return tuple(targets)


def _key(ids: torch.Tensor, *sizes: Any) -> tuple:
    return (ids.shape, ids.dtype, ids.get_device(), *sizes)


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
        sizes = (num_experts, block_size, pad_sorted_ids, mode, topk, capacity)
        try:
            found = _kept.get(_key(ids, *sizes))
        except RuntimeError:  # a nested tensor has no shape
            return None
        if found is not None:
            return found(ids, expert_map, out)
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
    if program is None:
        return
    if len(_kept) >= _MAX_KEPT:
        _kept.clear()
    mode = problem.ignore_invalid_experts if "expert_map" in operands else None
    sizes = (problem.num_experts, problem.block_size, problem.pad_sorted_ids, mode, topk, capacity)
    _kept[_key(ids, *sizes)] = Shortcut(problem, ids, program, capacity or problem.capacity)
