"""How a call of DeepGEMM's products that is like an earlier one is launched, past all checks but a few.

The checks, the program and the order of its values depend on the tensors' shapes, strides and dtypes and on
the options alone. A call whose tensors all lay as the kernel reads them is kept (`remember`). A later one
with the same key is compared with it (`repeat`): whether its tensors are alike, lie on the same boundaries,
and share no memory with d.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from torch_bridge._direct import fast_path, store

_MAX_KNOWN = 1024


class _Known(NamedTuple):
    """A call that was launched.

    Attributes:
        programs: where its program is loaded.
        device: of its tensors.
        matches: whether other tensors are like its own.
        masks: of each tensor's pointer, the bits that must be 0.
        spans: bytes that each of them reaches over; d is the last.
        scales: which of them has scales that lie in columns, and the bytes that its memory must have behind
            its first; None if there is none.
        pick: from (numbers, then pointers) the values of the launch, in order.
        numbers: those of the values that are no pointers.
        launch: the program's.
        apart: pointers of which it is known that d shares no byte with another.
    """

    programs: Any
    device: int
    matches: Callable[..., bool]
    masks: tuple[int, ...]
    spans: tuple[int, ...]
    scales: tuple[int, int] | None
    pick: Callable[[tuple[int, ...]], tuple[int, ...]]
    numbers: tuple[int, ...]
    launch: Callable[..., None]
    apart: set[tuple[int, ...]]


class Launched(NamedTuple):
    """What a program got in a launch.

    Attributes:
        order: names of its values.
        pointers: those of them that are pointers.
        numbers: the others.
        needed: bytes that each pointer must be a multiple of.
        scale_bytes: of the scales of a, as far as the kernel may read.
        launch: the program's.
    """

    order: tuple[str, ...]
    pointers: Mapping[str, int]
    numbers: Mapping[str, int]
    needed: Mapping[str, int]
    scale_bytes: int
    launch: Callable[..., None]


_known: dict[Any, _Known] = {}


def forget_all() -> None:
    """Every call takes the ordinary way again."""
    _known.clear()


def repeat(options: tuple[Any, ...], tensors: Sequence[Any]) -> bool:
    """Launches a call like an earlier one; False for every other call, valid or not.

    Args:
        options: of the call, by which it is known together with the shapes of a and b.
        tensors: what the caller gave, unchecked: a, b, more, d.
    """
    # Asked first: what is known would otherwise be a part of what a compiled graph depends on.
    if not fast_path.open_to_all() or not _known:
        return False
    for tensor in tensors:
        if type(tensor) not in fast_path.PLAIN or tensor.is_nested:
            return False
    known = _known.get((options, tensors[0].shape, tensors[1].shape))
    if known is None or known.programs is not store.here:
        return False
    if known.programs.machine.current_device() != known.device or not known.matches(*tensors):
        return False
    pointers = tuple([tensor.data_ptr() for tensor in tensors])
    for pointer, mask in zip(pointers, known.masks, strict=True):
        if pointer & mask:
            return False
    if known.scales is not None:
        which, needed = known.scales
        storage = tensors[which].untyped_storage()
        if pointers[which] + needed > storage.data_ptr() + storage.nbytes():
            return False
    if pointers not in known.apart and not fast_path.last_is_apart(
        known.apart, pointers, known.spans
    ):
        return False
    known.launch(*known.pick(known.numbers + pointers))
    return True


def remember(
    options: tuple[Any, ...],
    tensors: Sequence[torch.Tensor],
    launched: Launched,
    scales: int | None,
) -> None:
    """Lets `repeat` do calls like one that was just launched. Not where something of it was copied.

    Args:
        options: as for `repeat`.
        tensors: those of the call, as the caller gave them: a, b, more, d.
        launched: what the program got.
        scales: which of the tensors has scales that lie in columns.
    """
    if any(type(tensor) not in fast_path.PLAIN for tensor in tensors):
        return
    which = {tensor.data_ptr(): k for k, tensor in enumerate(tensors)}
    if len(which) < len(tensors) or not set(launched.pointers.values()) <= set(which):
        return
    count = len(launched.numbers)
    place = {name: k for k, name in enumerate(launched.numbers)}
    masks, spans, pitched = [0] * len(tensors), [tensor.nbytes for tensor in tensors], None
    for name, pointer in launched.pointers.items():
        place[name] = count + which[pointer]
        masks[which[pointer]] = launched.needed[name] - 1
    if scales is not None:  # up to the end of the last column
        pitched = scales, launched.scale_bytes
        spans[scales] = launched.scale_bytes
    if len(_known) >= _MAX_KNOWN:
        _known.clear()
    _known[options, tensors[0].shape, tensors[1].shape] = _Known(
        store.here,
        tensors[-1].get_device(),
        fast_path.matcher(*tensors),
        tuple(masks),
        tuple(spans),
        pitched,
        operator.itemgetter(*[place[name] for name in launched.order]),
        tuple(launched.numbers.values()),
        launched.launch,
        set(),
    )
