"""The fast path: how an alignment that is like an earlier one is launched. Every entry point tries it first.

The checks, the plan and the size arithmetic of a call depend on its shape, dtype, device and options alone.
Once a call has succeeded, `_direct/call.py` keeps it here as a `KnownCall`. A later call with the same
shape, dtype, device and options is looked up (`attempt`) and launched. Only what can still differ is asked
again: the layout and memory of the tensors, and the current device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_bridge._direct import derived
from torch_bridge._direct.machine import Machine
from torch_bridge._direct.problems import ID_WORDS, KernelProblem
from torch_bridge._direct.program import LoadedProgram
from torch_bridge._specs import AlignSpec, BatchedSpec, SglangSpec, Spec

_MAX_KNOWN, _MAX_APART = 1 << 14, 16
_INT32, _ONE = torch.int32, (1,)

# A call's form: whose convention it follows, what it returns besides the three results, and whether it
# fills the caller's buffers to their end.
_COUNTS, _INVERSE, SCATTER, SGLANG, _INACTIVE, BATCHED, IN_PLACE = (1 << bit for bit in range(7))

# A call's key: (num_experts, block_size, pad_sorted_ids, ignore_invalid_experts, topk, form). For the
# batched layout, max_tokens_per_batch stands in place of num_experts. Entry points write it as a plain
# tuple, for speed; `key_of` makes the same from a spec.
type Key = tuple[Any, ...]

# By shape, dtype and device of the ids, and by the key. Behind a key stand, where the call has a map or a
# bound, whether it has each of them; and in place, the rows of the buffer.
_known: dict[tuple[Any, Any, int, Key], "KnownCall"] = {}
# By key alone, the one that served the last such call: a layer of a model mostly calls as the layer before
# it.
recent: dict[Key, "KnownCall"] = {}

# Dynamo takes it for True. Other tracers have a dispatch mode, which is asked for below, but for torch.jit's.
_is_tracing = torch.compiler.is_dynamo_compiling
_jit_traced: Callable[[], bool] = torch._C._is_tracing

try:  # those who record or transform operators must see ours
    from torch._C import _len_torch_dispatch_stack as _watched
except ImportError:  # pragma: no cover

    def _watched() -> int:
        """Whether a torch dispatch mode is active; unknown here, so every call goes by the dispatcher."""
        return 1


try:  # inside torch.func's transforms tensors look plain, and have no pointer or one of 0
    from torch._C._functorch import maybe_current_level as _transformed  # type: ignore[import]
except ImportError:  # pragma: no cover

    def _transformed() -> int | None:
        """The level of torch.func's transforms, or None; unknown here, as above."""
        return 1


def open_to_all() -> bool:
    """Whether a call may go past torch's dispatcher: nothing traces, records or transforms operators."""
    return not (_is_tracing() or _watched() or _jit_traced()) and _transformed() is None


def _matches_nothing(*tensors: torch.Tensor) -> bool:
    """The test of a call that nothing is known to match yet."""
    del tensors
    return False


def matcher(*tensors: torch.Tensor) -> Callable[..., bool]:
    """A test whether other tensors are like these.

    It compares type, dtype, device, sizes, strides, and the dispatch keys, which tell a lazy negation.
    Torch's compiler asks this of a graph's inputs; it takes a third of the time that asking one by one
    takes.
    """
    try:
        guards = torch._C._dynamo.guards.TensorGuards  # type: ignore[reportAttributeAccessIssue]
        check = guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        return check if check(*tensors) is True else _matches_nothing
    except Exception:  # another torch has it elsewhere, or otherwise
        return _matches_nothing


# Types of a tensor that a repeated call takes: a subclass may compute with the call in its own way.
PLAIN = (torch.Tensor, torch.nn.Parameter)


def _is_plain(tensor: Any, shape: Sequence[int] | None, device: int) -> bool:
    """Whether it is a dense, row-major int32 tensor on the device that holds what its memory holds.

    Without a shape it must have one element.
    """
    return (
        type(tensor) is torch.Tensor
        and tensor.dtype is _INT32
        and (tensor.shape == shape if shape is not None else tensor.numel() == 1)
        and tensor.get_device() == device
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


def _has_derived(spec: Spec) -> bool:
    """Whether some result, or a part of one, is not written by the kernels (derived.py)."""
    if isinstance(spec, AlignSpec):
        return spec.with_scatter_idx
    return isinstance(spec, SglangSpec) and spec.with_inactive_blocks


class KnownCall:
    """A call that has been decided: spec, program and device are bound, and only tensors are missing.

    Args:
        machine: where the program is loaded.
        program: what is launched.
        spec, problem: what is asked, and what the program was compiled for.
        operands: the call's tensors by name, as the kernels read them; only their sizes and dtypes count.

    Attributes:
        run: `run(ids, options, out, checked)` launches on torch's current stream and returns the results, or
            None where the device is not the current one, or `out` may not be written as it lies. `options`
            are expert_map and num_valid_pairs as far as the call has them. `out` is None for new tensors.
            `checked` says that `out` is known to be fit to write.
        matches, matches_out: whether tensors are certain to be fit for `run`: ids and options, or these and
            `out`. To be asked of dense tensors only: torch's function behind them ends the process at a
            nested one. They may say no where `accepts` says yes.
        num_out: length of `out`.
    """

    def __init__(
        self,
        machine: Machine,
        program: LoadedProgram,
        spec: Spec,
        problem: KernelProblem,
        operands: dict[str, torch.Tensor],
    ):
        ids, *options = operands.values()
        self.device = ids.get_device()
        self._option_shapes = [(spec.num_experts,)] if "expert_map" in operands else []
        self._option_shapes += [None] * (len(options) - len(self._option_shapes))
        self._shapes = list(spec.outputs.values())
        self.num_out = len(self._shapes)
        # Bytes of ids, options, `out`.
        self._sizes = [x.numel() * x.element_size() for x in operands.values()]
        self._sizes += [4 * math.prod(shape) for shape in self._shapes]
        # Pointers of these that were seen to overlap nowhere: an allocator hands them out again and again.
        self._apart: set[tuple[int, ...]] = set()
        self.run = self._runner(machine, program, spec, problem, ids.element_size())
        self.matches: Callable[..., bool] = _matches_nothing
        self.matches_out: Callable[..., bool] = _matches_nothing

    def _runner(
        self,
        machine: Machine,
        program: LoadedProgram,
        spec: Spec,
        problem: KernelProblem,
        id_bytes: int,
    ) -> Callable[..., Any]:
        """`run`. All that it needs is bound here, since looking an attribute up takes time in every call."""
        device, targets_of = self.device, self._targets
        rows_shape, blocks_shape, count_shape = self._shapes[:3]
        # What the launch writes besides the first three.
        lengths = {"tokens_per_expert": problem.num_experts, "row_of_pair": spec.num_pairs}
        more = [(lengths[name],) for name in program.outputs[3:]]
        is_derived = _has_derived(spec)
        outputs, names = program.outputs, tuple(spec.outputs)
        wanted = len(names)
        current_device, empty, launch = machine.current_device, machine.empty, program.launch
        is_sized = not isinstance(spec, BatchedSpec)
        is_short = is_sized and not more and not is_derived
        # A launch gives a size times 256, and where the ids start behind a 256-byte boundary in elements.
        num_pairs, rows_in_all = spec.num_pairs << 8, rows_shape[0] << 8
        shift = 8 - (id_bytes.bit_length() - 1)

        def run(
            ids: torch.Tensor,
            options: Sequence[torch.Tensor] = (),
            out: Sequence[torch.Tensor] | None = None,
            checked: bool = False,
        ) -> Any:
            if current_device() != device:
                return None
            pointer = ids.data_ptr()
            given = [option.data_ptr() for option in options] if options else ()
            if out is None:
                rows = empty(rows_shape, _ONE, _INT32)
                blocks = empty(blocks_shape, _ONE, _INT32)
                count = empty(count_shape, _ONE, _INT32)
                a, b, c = rows.data_ptr(), blocks.data_ptr(), count.data_ptr()
                if is_short and not options:  # the most frequent call, without the questions below
                    behind = pointer & 255
                    launch(pointer - behind, num_pairs, rows_in_all, behind << shift, a, b, c)
                    return rows, blocks, count
                targets, results = (a, b, c), (rows, blocks, count)
            else:
                targets = targets_of(pointer, given, out, checked)
                if targets is None:
                    return None
                results = out
            if more:
                extra = [empty(shape, _ONE, _INT32) for shape in more]
                targets = (*targets[:3], *[tensor.data_ptr() for tensor in extra])
                results = (*results[:3], *extra)
            # Added tuples: Python makes a list first where a star stands among other arguments.
            if not is_sized:
                values = (pointer, *targets)
            else:
                behind = pointer & 255
                start, first = pointer - behind, behind << shift
                if given:
                    values = (start, *given, num_pairs, rows_in_all, first, *targets)
                else:
                    values = (start, num_pairs, rows_in_all, first) + targets  # noqa: RUF005
            launch(*values)
            if is_derived:
                written = dict(zip(outputs, results, strict=True))
                given_out = dict(zip(names, out or (), strict=bool(out)))
                return derived.derive(spec, written, given_out)
            return results[:wanted] if more else results

        return run

    def accepts(
        self,
        ids: torch.Tensor,
        options: Sequence[torch.Tensor],
        out: Sequence[torch.Tensor] | None,
    ) -> bool:
        """What `matches` answers, asked one by one, of ids of the right shape, dtype and device."""
        if not ids.is_contiguous() or ids.is_neg():
            return False
        device = self.device
        if options and not all(map(_is_plain, options, self._option_shapes, [device] * 2)):
            return False
        if out is None:
            return True
        right = len(out) == self.num_out
        return right and all(map(_is_plain, out, self._shapes, [device] * self.num_out))

    def _targets(
        self, ids: int, options: Sequence[int], out: Sequence[torch.Tensor], checked: bool
    ) -> tuple[int, ...] | None:
        """Pointers of `out`; None where two tensors overlap, or one starts off a 16-byte boundary.

        Args:
            ids, options: pointers of the inputs.
            checked: neither is the case.
        """
        targets = tuple([tensor.data_ptr() for tensor in out])
        if checked:
            return targets
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
    key: Key,
    ids: Any,
    expert_map: Any = None,
    num_valid_pairs: Any = None,
    out: Any = None,
    scratch: Any = None,
    least: int = 0,
) -> Any:
    """The results of a call like an earlier one; None for every other call, valid or not.

    Args:
        key: what the caller gave, unchecked. With IN_PLACE in its form, the rows of `out` are the capacity.
        ids: the caller's topk_ids (of the batched layout, the counts).
        expert_map, num_valid_pairs, out: the caller's.
        scratch: a buffer that the caller must bring, though nothing touches it, and `least` its elements.
    """
    if _is_tracing() or _watched() or _jit_traced() or _transformed() is not None or not _known:
        return None  # as `open_to_all`, without the time of a call
    num_experts, block_size, pad_sorted_ids, ignore_invalid_experts, topk, form = key
    if not (
        type(ids) is torch.Tensor
        and type(num_experts) is int
        and type(block_size) is int
        and type(pad_sorted_ids) is bool
        and type(ignore_invalid_experts) is bool
        and (topk is None or type(topk) is int)
    ):
        return None
    if ids.is_nested or (scratch is not None and not _is_scratch(scratch, ids, least)):
        return None
    options = ()
    if expert_map is not None:
        is_limited = num_valid_pairs is not None
        options = (expert_map, num_valid_pairs) if is_limited else (expert_map,)
        key += (True, is_limited)
    elif num_valid_pairs is not None:
        options = (num_valid_pairs,)
        key += (False, True)
    if out is not None:
        if not (type(out) is tuple or type(out) is list):
            return None
        if form & IN_PLACE:
            if not isinstance(out[0], torch.Tensor):
                return None
            key += (out[0].numel(),)
    try:
        for tensor in options:
            if tensor.is_nested:
                return None
        if out is not None:
            for tensor in out:
                if tensor.is_nested:
                    return None
    except AttributeError:  # no tensor
        return None
    last = recent.get(key)
    if last is not None:
        if out is None:
            certain = last.matches(ids, *options)
        else:
            certain = len(out) == last.num_out and last.matches_out(ids, *options, *out)
        if certain:
            return last.run(ids, options, out)
    return find(key, ids, options, out)


def _is_scratch(buffer: Any, ids: torch.Tensor, least: int) -> bool:
    """Whether it is a dense int32 buffer of at least so many elements, on the device of the ids."""
    return (
        type(buffer) is torch.Tensor
        and buffer.dtype is _INT32
        and buffer.layout is torch.strided
        and buffer.numel() >= least
        and buffer.get_device() == ids.get_device()
        and buffer.is_contiguous()
    )


def find(
    key: Key,
    ids: torch.Tensor,
    options: Sequence[torch.Tensor] = (),
    out: Sequence[torch.Tensor] | None = None,
) -> Any:
    """`attempt` of dense tensors and a checked key, where the `recent` call is not certain about them.

    The body of the plain operator gets such from torch's dispatcher, and asks `recent` itself.
    """
    if type(ids) is not torch.Tensor:
        return None
    found = _known.get((ids.shape, ids.dtype, ids.get_device(), key))
    if found is None or not found.accepts(ids, options, out):
        return None
    if recent.get(key) is not found:
        recent[key] = found
    # The same again, or in another mode: tensors of inference mode have other keys.
    elif out is None:
        found.matches = matcher(ids, *options)
    else:
        found.matches_out = matcher(ids, *options, *out)
    return found.run(ids, options, out)


def keep(key: Key, call: KnownCall, operands: dict[str, torch.Tensor], rows: int = 0) -> None:
    """Lets later calls like this one, which has just succeeded, take the fast path.

    Not where a tensor was converted: the kernels read ids of ID_WORDS, and int32 for the others.

    Args:
        key: the call's, from `key_of`.
        call: what ran.
        operands: the tensors that the caller gave.
        rows: with IN_PLACE, those of the caller's buffer.
    """
    ids, *options = operands.values()
    dtypes = (_INT32,) if "expert_num_tokens" in operands else ID_WORDS
    if type(ids) is not torch.Tensor or ids.dtype not in dtypes:
        return
    for option in options:
        if option.dtype is not _INT32:
            return
    if len(_known) >= _MAX_KNOWN:
        forget_all()
    if options:
        key += ("expert_map" in operands, "num_valid_pairs" in operands)
    if rows:
        key += (rows,)
    _known[ids.shape, ids.dtype, call.device, key] = call


def known_calls() -> list[KnownCall]:
    """All calls that the fast path knows."""
    return list(_known.values())


def forget_all() -> None:
    """Every call takes the ordinary way again."""
    _known.clear()
    recent.clear()


def align_form(with_counts: bool, with_inverse: bool, with_scatter_idx: bool = False) -> int:
    """The form of an `AlignSpec` with these results."""
    return _COUNTS * with_counts | _INVERSE * with_inverse | SCATTER * with_scatter_idx


def sglang_form(with_inactive_blocks: bool = False) -> int:
    """The form of an `SglangSpec`."""
    return SGLANG | _INACTIVE * with_inactive_blocks


def key_of(spec: Spec, topk: int | None = None, in_place: bool = False) -> Key:
    """The key of calls that ask for this spec, as their entry points write it."""
    first, pads, ignores = spec.num_experts, False, False
    if isinstance(spec, AlignSpec):
        pads, ignores = spec.pad_sorted_ids, spec.ignore_invalid_experts
        form = align_form(spec.with_counts, spec.with_inverse, spec.with_scatter_idx)
    elif isinstance(spec, SglangSpec):
        ignores, form = spec.ignore_invalid_expert, sglang_form(spec.with_inactive_blocks)
    else:
        first, form = spec.max_tokens_per_batch, BATCHED
    return (first, spec.block_size, pads, ignores, topk, form | IN_PLACE * in_place)
