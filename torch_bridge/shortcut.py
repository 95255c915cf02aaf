"""The way of a call that was seen before: same shape, dtype, device and sizes, no options.

Checks, plan and size arithmetic depend on these alone; once they have passed, a later call needs only the
launch. What is asked again is what can differ: the tensor's layout and memory, and the current device.
"""

from collections.abc import Sequence
from typing import Any

import torch

from torch_bridge import direct, direct_call
from torch_bridge.problems import AlignProblem, Problem

_MAX_KEPT = 1 << 14
_kept: dict[tuple, "Shortcut"] = {}

try:  # who records or transforms operators must see ours
    from torch.utils._python_dispatch import _len_torch_dispatch_stack as watched
except ImportError:  # pragma: no cover

    def watched() -> int:
        """Whether a torch dispatch mode is active; unknown, so every call goes by the dispatcher."""
        return 1


class Shortcut:
    """A plain alignment of one size on one device."""

    def __init__(self, problem: AlignProblem, ids: torch.Tensor, program: direct.Program):
        capacity = problem.capacity
        self._device = ids.get_device()
        self._item_size = ids.element_size()
        self._input_bytes = problem.num_pairs * self._item_size
        self._sizes = (problem.num_pairs << 8, capacity << 8)
        self._lengths = (capacity, -(-capacity // problem.block_size), 1)
        self._program = program

    def __call__(self, ids: torch.Tensor, out: Sequence[torch.Tensor] | None = None) -> Any:
        """The three results; None where the ordinary way has to look (and to complain)."""
        if torch.cuda.current_device() != self._device or not ids.is_contiguous() or ids.is_neg():
            return None
        pointer = ids.data_ptr()
        if out is None:
            empty = direct.empty_int32
            rows, blocks, count = self._lengths
            results = (empty(rows), empty(blocks), empty(count))
            x, y, z = results
            targets = (x.data_ptr(), y.data_ptr(), z.data_ptr())
        else:
            targets = self._targets(pointer, out)
            if targets is None:
                return None
            results = out
        program, behind = self._program, pointer & 255
        first_id = behind // self._item_size << 8
        values = (pointer - behind, *self._sizes, first_id, *targets)
        if program.between_words:
            between = direct.empty_int32(program.between_words)
            start = between.data_ptr()
            values += tuple([start + offset for offset in program.between_starts])
        stream = direct.raw_stream(self._device)
        for launch, slots in program.launches():
            launch(stream, *slots(values))
        return results

    def _targets(self, pointer: int, out: Sequence[torch.Tensor]) -> tuple[int, ...] | None:
        """Pointers of a fitting `out`."""
        if type(out) not in (tuple, list) or len(out) != 3:
            return None
        spans = [(pointer, pointer + self._input_bytes)]
        for target, length in zip(out, self._lengths, strict=True):
            if (
                type(target) is not torch.Tensor
                or target.dtype is not torch.int32
                or target.dim() != 1
                or target.shape[0] != length
                or target.get_device() != self._device
                or not target.is_contiguous()
            ):
                return None
            start = target.data_ptr()
            spans.append((start, start + 4 * length))
        spans_in_order = sorted(spans)
        for (_, end), (start, _) in zip(spans_in_order, spans_in_order[1:], strict=False):
            if start < end:
                return None
        targets = tuple([start for start, _ in spans[1:]])
        return None if any(start & 15 for start in targets) else targets


def _key(ids: torch.Tensor, num_experts: Any, block_size: Any, pad: Any, topk: Any) -> tuple:
    return (ids.shape, ids.dtype, ids.get_device(), num_experts, block_size, pad, topk)


def find(
    ids: Any, num_experts: Any, block_size: Any, pad_sorted_ids: Any, topk: Any = None
) -> Shortcut | None:
    """The shortcut of a call like this one, if one was kept."""
    if (
        type(ids) is torch.Tensor
        and type(num_experts) is int
        and type(block_size) is int
        and type(pad_sorted_ids) is bool
        and (topk is None or type(topk) is int)
        and ids.is_cuda
    ):
        return _kept.get(_key(ids, num_experts, block_size, pad_sorted_ids, topk))
    return None


def keep(problem: Problem, operands: dict[str, torch.Tensor], topk: int | None = None) -> None:
    """After all checks: the next call like this one may take the shortcut, if its program is loaded."""
    ids = operands.get("topk_ids")
    if (
        not isinstance(problem, AlignProblem)
        or ids is None
        or type(ids) is not torch.Tensor
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
    key = _key(ids, problem.num_experts, problem.block_size, problem.pad_sorted_ids, topk)
    _kept[key] = Shortcut(problem, ids, program)
