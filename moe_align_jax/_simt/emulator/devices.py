"""What devices that run a kernel together do to each other, in NumPy: each has a thread of the host."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from moe_align_jax._simt.emulator.faults import DivergentBarrier, OutOfBounds, RaceError, Undefined
from moe_align_jax._simt.emulator.memory import Buffer
from moe_align_jax._simt.emulator.races import Clock
from moe_align_jax._simt.emulator.values import Scope, Value, array_of
from moe_align_jax._simt.language import WARP, Int, Simt


class Remote(NamedTuple):
    """An output of other devices; each thread has the rank of its own."""

    name: str
    ranks: np.ndarray


class Peers(NamedTuple):
    """The other devices, as one of them sees them.

    Attributes:
        rank: which one it is.
        outputs: all devices' outputs, by name.
        meet: how to wait for the others.
        arrived: for each device the tick of its `device_arrive`, 0 before it.
        inboxes: all devices' inboxes, `[devices, words]`, 0 where nothing has been put.
        taken: which words of mine have been taken.
    """

    rank: int
    outputs: list[dict[str, Buffer]]
    meet: Callable[[], Any]
    arrived: np.ndarray
    inboxes: np.ndarray
    taken: np.ndarray

    @property
    def inbox(self) -> np.ndarray:
        """Mine."""
        return self.inboxes[self.rank]


class AmongDevices(Simt):
    """The part of the machine that knows other devices."""

    name: str
    scope: Scope
    _clock: Clock
    _inside: Callable[..., Any]
    _chosen: Callable[..., Scope]
    _whole: Callable[[int, str], Any]
    _full: Callable[[np.ndarray], np.ndarray]

    def _join(self, peers: Peers | None) -> None:
        """Takes the other devices that run the kernel, None for none."""
        self._peers = peers
        self._untold = False  # whether it has stored to other devices since its `device_arrive`

    def _others(self) -> Peers:
        """The devices that run the kernel. Raises where there is one alone."""
        if self._peers is None:
            raise Undefined(f"{self.name}: it runs on one device.")
        return self._peers

    def remote(self, ref: Buffer, rank: Int | int) -> Remote:
        return Remote(ref.name, array_of(rank))

    def _each_device(self, ref: Remote) -> Iterator[Buffer]:
        """The buffers behind a remote ref, each with the lanes that mean it."""
        outputs = self._others().outputs
        for rank in np.unique(self.scope.active(ref.ranks)):
            if not 0 <= rank < len(outputs) or ref.name not in outputs[rank]:
                raise Undefined(f"{self.name}: {ref.name} is no output of a device {rank}.")
            with self._inside(self._chosen(self.scope, ref.ranks == rank)):
                self._untold = True
                yield outputs[rank][ref.name]

    def device_arrive(self) -> None:
        if self.scope.lanes is not None:
            raise DivergentBarrier(f"{self.name}: device_arrive is for all threads.")
        peers = self._others()
        if peers.arrived[peers.rank]:
            raise DivergentBarrier(f"{self.name}: there is one device_arrive.")
        self.block_sync()
        peers.arrived[peers.rank] = self._clock.tick
        self._untold = False

    def device_wait(self) -> None:
        warps = self._whole(WARP, "device_wait")
        self._others().meet()
        if not self._others().arrived.all():
            raise DivergentBarrier(f"{self.name}: device_wait before device_arrive.")
        self._clock.heard.reshape(-1)[warps] = True
        self._clock.warp_barrier(warps)

    def put(self, rank: Int | int, index: Int | int, value: Int) -> None:
        operands = (self._full(array_of(x)) for x in (rank, index, value))
        ranks, at, words = map(self.scope.active, operands)
        inboxes = self._others().inboxes
        outside = (ranks < 0) | (ranks >= len(inboxes)) | (at < 0) | (at >= inboxes.shape[1])
        if outside.any():
            raise OutOfBounds(f"{self.name}: put into word {at[outside.argmax()]} of an inbox.")
        if (words == 0).any():
            raise Undefined(f"{self.name}: a word that is put is not 0.")
        if inboxes[ranks, at].any() or len(set(zip(ranks, at, strict=True))) < len(at):
            raise RaceError(f"{self.name}: a word is put once.")
        inboxes[ranks, at] = words

    def take(self, places: Sequence[tuple[Int, int]]) -> list[tuple[Int, ...]]:
        peers, results = self._others(), []
        peers.meet()
        inbox = peers.inbox
        for index, width in places:
            first = self._full(array_of(index))
            at = self.scope.active(first)
            if (at % width).any() or (at < 0).any() or (at + width > len(inbox)).any():
                raise OutOfBounds(f"{self.name}: takes {width} words from {at} on.")
            cells = at[:, None] + np.arange(width)
            if not inbox[cells].all():
                raise DivergentBarrier(f"{self.name}: takes a word that nobody puts.")
            peers.taken[cells] = True
            inside, machine = first.clip(0, len(inbox) - width), cast(Any, self)
            results.append(tuple(Value(inbox[inside + k], machine) for k in range(width)))
        return results

    def _check_devices_end(self) -> None:
        """All that others wrote to this device is there when the kernel ends: later ones may read it."""
        if self._peers is None:
            return
        if not self._clock.heard.any(axis=1).all():
            raise RaceError(f"{self.name}: it ends without device_wait.")
        if ((self._peers.inbox != 0) & ~self._peers.taken).any():
            raise RaceError(f"{self.name}: it ends before a word that was put was taken.")
        if self._untold:
            raise RaceError(
                f"{self.name}: it ends with stores to other devices that it told nobody of."
            )
