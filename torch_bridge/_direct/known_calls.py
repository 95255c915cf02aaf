"""Calls that were launched on their tensors as they lay: one like an earlier one needs no checks and no plan.

The alignment's calls are kept in `fast_path.py` instead: there a repeated one took 1.7 us of host time up
to its launch, and through `KnownCalls` it took 2.8 (2026-11-30).
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from torch_bridge._direct import store
from torch_bridge._direct.fast_path import PLAIN, matcher, open_to_all

_MAX_KNOWN, _MAX_FIT = 1 << 12, 64


def launch_of(
    enqueue: Callable[..., None],
    order: Sequence[str],
    tensors: Mapping[str, int],
    numbers: Mapping[str, int],
) -> Callable[[tuple[int, ...]], None]:
    """A program's launch as a function of the pointers of a call's tensors.

    Args:
        enqueue: the program's.
        order: names of its values, at least two.
        tensors: which of the call's tensors those are that are pointers.
        numbers: the others.
    """
    place = {name: k for k, name in enumerate(numbers)}
    place |= {name: len(numbers) + which for name, which in tensors.items()}
    pick, given = operator.itemgetter(*[place[name] for name in order]), tuple(numbers.values())
    return lambda pointers: enqueue(*pick(given + pointers))


class _Known[Bound](NamedTuple):
    """A call that was launched.

    Attributes:
        programs: the store of its programs.
        device: its tensors' index.
        matches: whether other tensors are like its own, but for where they lie.
        bound: what launches it.
        masks: of each tensor's pointer, the bits that must be 0.
        spans: bytes that each of them reaches over.
        writes: whether one of the tensors is written.
        fit: pointers that were seen to lie well where one is.
    """

    programs: store.Store
    device: int
    matches: Callable[..., bool]
    bound: Bound
    masks: Sequence[int]
    spans: Sequence[int]
    writes: bool
    fit: set[tuple[int, ...]]

    def lie_well(self, pointers: tuple[int, ...]) -> bool:
        """Whether tensors at these pointers lie on their boundaries, and none overlaps another if one of them
        is written."""
        if any(map(operator.and_, pointers, self.masks)):
            return False
        if not self.writes:
            return True
        end = 0
        for start, size in sorted(zip(pointers, self.spans, strict=True)):
            if start < end:
                return False
            end = start + size
        if len(self.fit) >= _MAX_FIT:  # an allocator hands the same ones out again and again
            self.fit.clear()
        self.fit.add(pointers)
        return True


class KnownCalls[Bound]:
    """Known calls of some ops, and what launches each of them.

    Args:
        num_shapes: a call is known by its key, and by the shapes of so many of its first tensors.
    """

    def __init__(self, num_shapes: int = 0) -> None:
        self._known: dict[Any, _Known[Bound]] = {}
        self._num_shapes = num_shapes

    def find(self, key: Any, tensors: Sequence[Any]) -> tuple[Bound, tuple[int, ...]] | None:
        """What launches a call like an earlier one, and its tensors' pointers; None for every other call,
        valid or not.

        Args:
            key: what the call is known by, unchecked.
            tensors: what the caller gave, unchecked.
        """
        # Asked first: what is known would otherwise be a part of what a compiled graph depends on.
        if not open_to_all() or not self._known:
            return None
        for tensor in tensors:
            if type(tensor) not in PLAIN or tensor.is_nested:
                return None
        for tensor in tensors[: self._num_shapes]:
            key = key, tensor.shape
        try:
            known = self._known.get(key)
        except TypeError:  # an option that is no key
            return None
        if (
            known is None
            or known.programs is not store.here
            or known.programs.machine.current_device() != known.device
            or not known.matches(*tensors)
        ):
            return None
        pointers = tuple([tensor.data_ptr() for tensor in tensors])
        # A call that writes to none of them looks nothing up: that would take as long as it saves.
        if not (known.writes and pointers in known.fit) and not known.lie_well(pointers):
            return None
        return known.bound, pointers

    def keep(
        self,
        key: Any,
        tensors: Sequence[torch.Tensor],
        bound: Bound,
        *,
        masks: Sequence[int],
        writes: bool,
        spans: Sequence[int] = (),
    ) -> None:
        """Lets `find` find calls like one that was just launched on these tensors as they lay.

        Args:
            key, tensors: as `find` gets them.
            bound: what launches it.
            masks, writes: see `_Known`.
            spans: likewise; if none are given, each tensor's elements lie without gaps.
        """
        if any(type(tensor) not in PLAIN for tensor in tensors):
            return
        for tensor in tensors[: self._num_shapes]:
            key = key, tensor.shape
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[key] = _Known(
            *(store.here, tensors[0].get_device(), matcher(*tensors), bound),
            *(masks, spans or [tensor.nbytes for tensor in tensors], writes, set()),
        )

    def forget_all(self) -> None:
        """Every call takes the ordinary way again."""
        self._known.clear()
