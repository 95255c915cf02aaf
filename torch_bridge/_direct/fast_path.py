"""The way of a call that was seen before: same shape, dtype, device and sizes. Every entry point's.

Checks, plan and size arithmetic depend on these alone; once they have passed, a later call needs only the
launch. What is asked again is what can differ: the tensors' layout and memory, and the current device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_bridge._direct import call
from torch_bridge._direct import program as direct
from torch_bridge._specs import AlignProblem, BatchedProblem, Problem, SglangProblem

_MAX_KEPT, _MAX_APART = 1 << 14, 16
_INT32, _ONE = torch.int32, (1,)
# A call's form: whose convention it follows, and what it gives besides.
_COUNTS, _INVERSE, SCATTER, SGLANG, _INACTIVE, BATCHED = (1 << bit for bit in range(6))
# num_experts and block_size; unless the call is a plain one, also pad_sorted_ids, ignore_invalid_experts,
# whether there are an expert_map and a num_valid_pairs, topk, capacity and form.
type Sizes = tuple[Any, ...]
# By shape, dtype and device of the ids, and these.
_kept: dict[tuple[Any, Any, int, Sizes], "Shortcut"] = {}
# The one that served the last call of these: a layer calls as the one before it did.
recent: dict[Sizes, "Shortcut"] = {}
# Dynamo takes it for True. Other tracers have a dispatch mode, which is asked for below, but for torch.jit's.
_is_tracing = torch.compiler.is_dynamo_compiling
_jit_traced: Callable[[], bool] = torch._C._is_tracing

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
    return not (_is_tracing() or _watched() or _jit_traced()) and _transformed() is None


def _never(*tensors: torch.Tensor) -> bool:
    del tensors
    return False


def _guard(*tensors: torch.Tensor) -> Callable[..., bool]:
    """Whether others are like them: in type, dtype, device, sizes, strides, and in the dispatch keys, which
    tell a lazy negation. Torch's compiler asks this of a graph's inputs, in a third of the time that it
    takes to ask one by one."""
    try:
        guards = torch._C._dynamo.guards.TensorGuards  # type: ignore[reportAttributeAccessIssue]
        check = guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        return check if check(*tensors) is True else _never
    except Exception:  # another torch has it elsewhere, or otherwise
        return _never


def _is_plain(tensor: Any, shape: Sequence[int] | None, device: int) -> bool:
    """Whether it is a dense, row-major int32 tensor that holds what its memory holds; without a shape, of
    one element."""
    return (
        type(tensor) is torch.Tensor
        and tensor.dtype is _INT32
        and (tensor.shape == shape if shape is not None else tensor.numel() == 1)
        and tensor.get_device() == device
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


class Shortcut:
    """A call of one size on one device.

    Attributes:
        run: called with ids, expert_map and num_valid_pairs as far as the call has them, and `out` (or
            None for new tensors), all like those of the call that was kept. The results; None where the
            ordinary way has to look (and to complain).
        fits, fits_out: whether tensors are certain to be such: ids and options, or these and `out`. Of
            dense tensors only: torch's function behind it ends the process at a nested one.
        num_out: length of `out`.
    """

    def __init__(
        self,
        problem: Problem,
        operands: dict[str, torch.Tensor],
        needed: direct.Problem,
        program: direct.Program,
        capacity: int,
    ):
        ids, *options = operands.values()
        self._device = ids.get_device()
        self._option_shapes = [(problem.num_experts,)] if "expert_map" in operands else []
        self._option_shapes += [None] * (len(options) - len(self._option_shapes))
        self._shapes = [(capacity,), (-(-capacity // problem.block_size),)]
        self._shapes += list(problem.outputs.values())[2:]
        self.num_out = len(self._shapes)
        # Bytes of ids, options, `out`.
        self._sizes = [x.numel() * x.element_size() for x in operands.values()]
        self._sizes += [4 * math.prod(shape) for shape in self._shapes]
        # Pointers of these that were seen to overlap nowhere: an allocator hands them out again and again.
        self._apart: set[tuple[int, ...]] = set()
        self.run = self._bound_to(problem, ids, needed, program, capacity)
        self.fits: Callable[..., bool] = _never
        self.fits_out: Callable[..., bool] = _never

    def _bound_to(
        self,
        problem: Problem,
        ids: torch.Tensor,
        needed: direct.Problem,
        program: direct.Program,
        capacity: int,
    ) -> Callable[..., Any]:
        """`run`. All that it needs is bound here, and it launches itself: at 5 us a call, every attribute
        and every call of a function of ours is some percent."""
        device, targets_of = self._device, self._targets
        rows_shape, blocks_shape, count_shape = self._shapes[:3]
        # What the launch writes besides the first three.
        lengths = {"tokens_per_expert": needed.num_experts, "row_of_pair": problem.num_pairs}
        more = [(lengths[name],) for name in program.outputs[3:]]
        unfinished = call.is_unfinished(problem)
        names, outputs, wanted = tuple(problem.outputs), program.outputs, len(problem.outputs)
        threads, enter = program.threads, program.enter
        pack, between = program.pack, program.between
        sized = not isinstance(problem, BatchedProblem)
        num_pairs, rows_in_all = problem.num_pairs << 8, capacity << 8
        # From bytes to elements, as a launch gives a size: times 256.
        shift = 8 - (ids.element_size().bit_length() - 1)

        def run(
            ids: torch.Tensor,
            options: Sequence[torch.Tensor] = (),
            out: Sequence[torch.Tensor] | None = None,
        ) -> Any:
            if direct.current_device() != device:
                return None
            pointer = ids.data_ptr()
            given = [option.data_ptr() for option in options] if options else ()
            empty = direct.empty_strided
            if out is None:
                rows = empty(rows_shape, _ONE, _INT32)
                blocks = empty(blocks_shape, _ONE, _INT32)
                count = empty(count_shape, _ONE, _INT32)
                results = rows, blocks, count
                targets = rows.data_ptr(), blocks.data_ptr(), count.data_ptr()
            else:
                targets = targets_of(pointer, given, out)
                if targets is None:
                    return None
                results = out
            if more:
                extra = [empty(shape, _ONE, _INT32) for shape in more]
                targets = (*targets[:3], *[tensor.data_ptr() for tensor in extra])
                results = (*results[:3], *extra)
            try:
                launches = threads.launches
            except AttributeError:
                launches = enter()
            stream = direct.raw_stream(device)
            held = None  # until the kernels are enqueued, as in `Program.launch`
            if between is not None and (stream or not launches.kept_is_next):
                held = between(launches, stream)
            values = launches.values
            if sized:
                behind = pointer & 255
                start, first = pointer - behind, behind << shift
                pack(values, 0, start, *given, num_pairs, rows_in_all, first, *targets)
            else:
                pack(values, 0, pointer, *targets)
            launches.enqueue(stream)
            del held
            if unfinished:
                written = dict(zip(outputs, results, strict=True))
                given_out = dict(zip(names, out or (), strict=bool(out)))
                return tuple(call.finish(problem, written, given_out))
            return results[:wanted] if more else results

        return run

    def accepts(
        self,
        ids: torch.Tensor,
        options: Sequence[torch.Tensor],
        out: Sequence[torch.Tensor] | None,
    ) -> bool:
        """What `fits` says, asked one by one of ids of the right shape, dtype and device."""
        if not ids.is_contiguous() or ids.is_neg():
            return False
        device = self._device
        if options and not all(map(_is_plain, options, self._option_shapes, [device] * 2)):
            return False
        if out is None:
            return True
        right = len(out) == self.num_out
        return right and all(map(_is_plain, out, self._shapes, [device] * self.num_out))

    def _targets(
        self, ids: int, options: Sequence[int], out: Sequence[torch.Tensor]
    ) -> tuple[int, ...] | None:
        """Pointers of `out`, where the launch may store there."""
        targets = tuple([tensor.data_ptr() for tensor in out])
        pointers = (ids, *options, *targets)
        if pointers not in self._apart:
            end = 0
            for start, size in sorted(zip(pointers, self._sizes)):  # noqa: B905 - for speed
                if start < end:
                    return None
                end = start + size
            for target in targets:
                if target & 15:
                    return None
            if len(self._apart) >= _MAX_APART:
                self._apart.clear()
            self._apart.add(pointers)
        return targets


def attempt(
    ids: Any,
    num_experts: Any,
    block_size: Any,
    pad_sorted_ids: Any = False,
    expert_map: Any = None,
    ignore_invalid_experts: Any = False,
    topk: Any = None,
    out: Any = None,
    num_valid_pairs: Any = None,
    form: int = 0,
    in_place: bool = False,
) -> Any:
    """The results of a call like one that was kept; None for every other call.

    `form`: the problem's. `in_place`: the rows of `out` are the capacity.
    (Of the batched layout, the counts are the ids and max_tokens_per_batch is num_experts.)
    """
    if not (
        _kept
        and type(ids) is torch.Tensor
        and type(num_experts) is int
        and type(block_size) is int
        and type(pad_sorted_ids) is bool
        and type(ignore_invalid_experts) is bool
        and (topk is None or type(topk) is int)
        and (out is None or type(out) is tuple or type(out) is list)
    ):
        return None
    mapped, limited = expert_map is not None, num_valid_pairs is not None
    flags = pad_sorted_ids or ignore_invalid_experts or mapped or limited
    sizes = (num_experts, block_size)
    capacity = 0
    if in_place and out:
        if not isinstance(out[0], torch.Tensor):
            return None
        capacity = out[0].numel()
    if form or capacity or flags or topk is not None:
        flags = (pad_sorted_ids, ignore_invalid_experts, mapped, limited)
        sizes = (num_experts, block_size, *flags, topk, capacity, form)
    options = ()
    if ids.is_nested:
        return None
    if flags or out is not None:
        if mapped:
            options = (expert_map, num_valid_pairs) if limited else (expert_map,)
        elif limited:
            options = (num_valid_pairs,)
        try:
            for tensor in (*options, *out) if out else options:
                if tensor.is_nested:
                    return None
        except AttributeError:  # no tensor
            return None
    last = recent.get(sizes)
    if last is not None:
        if out is None:
            certain = last.fits(ids, *options)
        else:
            certain = len(out) == last.num_out and last.fits_out(ids, *options, *out)
        if certain:
            return last.run(ids, options, out)
    return look_up(ids, sizes, options, out)


def is_scratch(buffer: Any, ids: Any, least: int) -> bool:
    """Whether it is a dense int32 buffer of so many elements beside the ids."""
    return (
        type(buffer) is torch.Tensor
        and type(ids) is torch.Tensor
        and buffer.dtype is _INT32
        and buffer.layout is torch.strided
        and buffer.numel() >= least
        and buffer.get_device() == ids.get_device()
        and buffer.is_contiguous()
    )


def look_up(
    ids: torch.Tensor,
    sizes: Sizes,
    options: Sequence[torch.Tensor] = (),
    out: Sequence[torch.Tensor] | None = None,
) -> Any:
    """`attempt` of dense tensors, ints and bools, when the `recent` one is not certain about them.

    The body of a plain operator gets these from torch's dispatcher, and asks itself.
    """
    if type(ids) is not torch.Tensor:
        return None
    found = _kept.get((ids.shape, ids.dtype, ids.get_device(), sizes))
    if found is None or not found.accepts(ids, options, out):
        return None
    if recent.get(sizes) is not found:
        recent[sizes] = found
    # The same again, or in another mode: tensors of inference mode have other keys.
    elif out is None:
        found.fits = _guard(ids, *options)
    else:
        found.fits_out = _guard(ids, *options, *out)
    return found.run(ids, options, out)


def keep(
    problem: Problem,
    operands: dict[str, torch.Tensor],
    topk: int | None = None,
    capacity: int = 0,
) -> None:
    """After all checks: the next call like this one may take the shortcut, if its program is loaded."""
    ids, *options = operands.values()
    dtypes = (_INT32,) if isinstance(problem, BatchedProblem) else call.ID_WORDS
    if (
        problem.num_pairs == 0
        or type(ids) is not torch.Tensor
        or ids.dtype not in dtypes
        or any(option.dtype is not _INT32 for option in options)
        or call.refuses(problem, operands) is not None
    ):
        return
    needed = call.kernel_problem(problem, operands)
    program = direct.loaded(ids.get_device(), needed)
    rows = capacity or problem.capacity
    if program is None or rows > program.max_capacity:
        return
    if len(_kept) >= _MAX_KEPT:
        _kept.clear()
        recent.clear()
    sizes = _sizes(problem, "expert_map" in operands, "num_valid_pairs" in operands, topk, capacity)
    key = (ids.shape, ids.dtype, ids.get_device(), sizes)
    _kept[key] = Shortcut(problem, operands, needed, program, rows)


def align_form(with_counts: bool, with_inverse: bool, with_scatter_idx: bool = False) -> int:
    """The form of an `AlignProblem` with these."""
    return _COUNTS * with_counts | _INVERSE * with_inverse | SCATTER * with_scatter_idx


def sglang_form(with_inactive_blocks: bool = False) -> int:
    """The form of an `SglangProblem`."""
    return SGLANG | _INACTIVE * with_inactive_blocks


def _sizes(problem: Problem, *given: Any) -> Sizes:
    """As `attempt` makes them of a call. `given`: those of expert_map, num_valid_pairs, topk, capacity."""
    first, pad, ignore = problem.num_experts, False, False
    if isinstance(problem, AlignProblem):
        pad, ignore = problem.pad_sorted_ids, problem.ignore_invalid_experts
        form = align_form(problem.with_counts, problem.with_inverse, problem.with_scatter_idx)
    elif isinstance(problem, SglangProblem):
        ignore, form = problem.ignore_invalid_expert, sglang_form(problem.with_inactive_blocks)
    else:
        first, form = problem.max_tokens_per_batch, BATCHED
    options = (pad, ignore, *given, form)
    plain = all(option in (False, None) for option in options)
    return (first, problem.block_size, *(() if plain else options))
