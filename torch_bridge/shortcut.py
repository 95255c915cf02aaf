"""The way of a call that was seen before: same shape, dtype, device and sizes.

Checks, plan and size arithmetic depend on these alone; once they have passed, a later call needs only the
launch. What is asked again is what can differ: the tensors' layout and memory, and the current device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_bridge import direct, direct_call
from torch_bridge.problems import AlignProblem, Problem

_MAX_KEPT = 1 << 14
_INT32, _ONE = torch.int32, (1,)
# The options of a call without any: pad_sorted_ids, ignore_invalid_experts (None without a map), topk,
# capacity.
_PLAIN = (False, None, None, 0)
# By shape, dtype, device, num_experts, block_size, options.
_kept: dict[tuple, "Shortcut"] = {}
# The one that served the operator's last call of these (num_experts, block_size): a layer calls as the one
# before it did.
recent: dict[tuple[int, int], "Shortcut"] = {}
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


def _never(tensor: torch.Tensor) -> bool:
    del tensor
    return False


def _guard(tensor: torch.Tensor) -> Callable[[torch.Tensor], bool]:
    """Whether another is like it: in type, dtype, device, sizes, strides, and in the dispatch keys, which
    tell a lazy negation. Torch's compiler asks this of a graph's inputs, in a third of the time that it
    takes to ask one by one."""
    try:
        guards = torch._C._dynamo.guards.TensorGuards  # type: ignore[reportAttributeAccessIssue]
        check = guards(tensor, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        return check if check(tensor) is True else _never
    except Exception:  # another torch has it elsewhere, or otherwise
        return _never


def _is_plain(tensor: Any, shape: Sequence[int], device: int) -> bool:
    """Whether it is a dense, row-major int32 tensor that holds what its memory holds."""
    return (
        type(tensor) is torch.Tensor
        and tensor.dtype is _INT32
        and tensor.shape == shape
        and tensor.get_device() == device
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


class Shortcut:
    """An alignment of one size on one device, with or without an expert map.

    Attributes:
        run: called with ids, contiguous and no lazy negation, expert_map (or None) and `out` (or None for
            new tensors). The three results; None where the ordinary way has to look (and to complain).
        fits: whether ids are certain to be such, and of this shape, dtype and device. Of dense tensors only:
            torch's function behind it ends the process at a nested one.
    """

    def __init__(
        self, problem: AlignProblem, ids: torch.Tensor, program: direct.Program, capacity: int
    ):
        self._device = ids.get_device()
        self._num_experts = problem.num_experts
        self._input_bytes = problem.num_pairs * ids.element_size()
        lengths = (capacity, -(-capacity // problem.block_size), 1)
        self._shapes = [(length,) for length in lengths]
        self._sizes = [4 * length for length in lengths]
        # From bytes to elements, as a launch gives a size: times 256.
        shift = 8 - (ids.element_size().bit_length() - 1)
        self.run = self._bound_to(program, problem.num_pairs << 8, capacity << 8, shift)
        self.fits: Callable[[torch.Tensor], bool] = _never

    def _bound_to(
        self, program: direct.Program, num_pairs: int, capacity: int, shift: int
    ) -> Callable[..., Any]:
        """`run`. All that it needs is bound here, and it launches itself: at 5 us a call, every attribute
        and every call of a function of ours is some percent."""
        device, map_shape, targets_of = self._device, (self._num_experts,), self._targets
        rows_shape, blocks_shape, count_shape = self._shapes
        threads, enter = program.threads, program.enter
        pack, between = program.pack, program.between

        def run(
            ids: torch.Tensor, expert_map: Any = None, out: Sequence[torch.Tensor] | None = None
        ) -> Any:
            if direct.current_device() != device:
                return None
            if expert_map is not None and not _is_plain(expert_map, map_shape, device):
                return None
            pointer = ids.data_ptr()
            if out is None:
                empty = direct.empty_strided
                rows = empty(rows_shape, _ONE, _INT32)
                blocks = empty(blocks_shape, _ONE, _INT32)
                count = empty(count_shape, _ONE, _INT32)
                out = rows, blocks, count
                rows, blocks, count = rows.data_ptr(), blocks.data_ptr(), count.data_ptr()
            else:
                targets = targets_of(pointer, expert_map, out)
                if targets is None:
                    return None
                rows, blocks, count = targets
            try:
                launches = threads.launches
            except AttributeError:
                launches = enter()
            stream = direct.raw_stream(device)
            held = None  # until the kernels are enqueued, as in `Program.launch`
            if between is not None and (stream or not launches.kept_is_next):
                held = between(launches, stream)
            behind = pointer & 255
            start, first = pointer - behind, behind << shift
            values = launches.values
            if expert_map is None:
                pack(values, 0, start, num_pairs, capacity, first, rows, blocks, count)
            else:
                local = expert_map.data_ptr()
                pack(values, 0, start, local, num_pairs, capacity, first, rows, blocks, count)
            launches.enqueue(stream)
            del held
            return out

        return run

    def _targets(
        self, pointer: int, expert_map: torch.Tensor | None, out: Sequence[torch.Tensor]
    ) -> tuple[int, int, int] | None:
        """Pointers of a fitting `out`, which overlaps nothing."""
        if type(out) not in (tuple, list) or len(out) != 3:
            return None
        device = self._device
        for target, shape in zip(out, self._shapes):  # noqa: B905 - 3 each
            if (  # `_is_plain`, but for the time of its calls
                type(target) is not torch.Tensor
                or target.dtype is not _INT32
                or target.shape != shape
                or target.get_device() != device
                or not target.is_contiguous()
                or target.is_neg()
            ):
                return None
        first, second, third = out
        a, b, c = first.data_ptr(), second.data_ptr(), third.data_ptr()
        if (a | b | c) & 15:
            return None
        size_a, size_b, size_c = self._sizes
        end_a, end_b, end_c = a + size_a, b + size_b, c + size_c
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
            start = expert_map.data_ptr()
            end = start + 4 * self._num_experts
            if a < end and start < end_a or b < end and start < end_b or c < end and start < end_c:
                return None
        return a, b, c


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
        if found is not None and ids.is_contiguous() and not ids.is_neg():
            return found.run(ids, expert_map, out)
    return None


def attempt_dense(ids: torch.Tensor, num_experts: int, block_size: int) -> Any:
    """`attempt` behind the dispatcher, which calls the operator's body with ints and dense tensors only.

    The body itself has asked the `recent` one, which is not certain about these ids.
    """
    found = None
    if type(ids) is torch.Tensor:
        found = _kept.get((ids.shape, ids.dtype, ids.get_device(), num_experts, block_size, _PLAIN))
    if found is None or not ids.is_contiguous() or ids.is_neg():
        return None
    if recent.get((num_experts, block_size)) is found:
        # The same again, or in another mode: tensors of inference mode have other keys.
        found.fits = _guard(ids)
    else:
        recent[num_experts, block_size] = found
    return found.run(ids)


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
        recent.clear()
    mode = problem.ignore_invalid_experts if "expert_map" in operands else None
    options = (problem.pad_sorted_ids, mode, topk, capacity)
    key = (ids.shape, ids.dtype, ids.get_device(), problem.num_experts, problem.block_size, options)
    _kept[key] = Shortcut(problem, ids, program, rows)
