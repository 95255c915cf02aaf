"""What devices that run a kernel together do to each other, in NumPy: each has a thread of the host."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from moe_align_jax._simt.faults import DivergentBarrier, RaceError, Undefined
from moe_align_jax._simt.language import WARP, Int, Simt
from moe_align_jax._simt.memory import Buffer
from moe_align_jax._simt.races import Clock, Told
from moe_align_jax._simt.values import Scope, array_of


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
        told: what all have told.
    """

    rank: int
    outputs: list[dict[str, Buffer]]
    meet: Callable[[], Any]
    told: Told


class AmongDevices(Simt):
    """The part of the machine that knows other devices."""

    name: str
    scope: Scope
    _clock: Clock
    _inside: Callable[..., Any]
    _chosen: Callable[..., Scope]
    _whole: Callable[[int, str], Any]

    def _join(self, peers: Peers | None, num_warps: int) -> None:
        self._peers = peers
        # Which warps have stored to a device, and not told of it since.
        self._untold = np.zeros((len(peers.outputs) if peers else 0, num_warps), bool)

    def _others(self) -> Peers:
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
            with self._inside(self._chosen(self.scope, ref.ranks == rank)) as scope:
                warps = slice(None) if scope.lanes is None else scope.lanes // WARP
                self._untold[rank, warps] = True
                yield outputs[rank][ref.name]

    def _tell(self, told: np.ndarray, warps: np.ndarray | slice, what: str) -> None:
        mine = told[self._others().rank].reshape(-1)
        if mine[warps].any():
            raise DivergentBarrier(f"{self.name}: a warp comes to {what} once.")
        self._clock.warp_barrier(warps)
        mine[warps] = self._clock.tick

    def tell_peers(self) -> None:
        warps = self._whole(WARP, "tell_peers")
        self._tell(self._others().told.peers, warps, "tell_peers")
        self._untold[:, warps] = False

    def tell_everyone(self, rank: Int | int) -> None:
        self._whole(WARP, "tell_everyone")
        ranks = array_of(rank)
        for one in np.unique(self.scope.active(ranks)):
            with self._inside(self._chosen(self.scope, ranks == one)):
                warps = self._whole(WARP, "tell_everyone")
                self._tell(self._others().told.everyone[one], warps, "tell_everyone")
                self._untold[one, warps] = False

    def wait_for_peers(self, count: int) -> None:
        warps = self._whole(WARP, "wait_for_peers")
        self._others().meet()
        each = (self._others().told.peers != 0).sum(axis=2)
        if (each != count).any():
            raise DivergentBarrier(
                f"{self.name}: wait_for_peers is for {count} warps of each CTA; {each.min()} to "
                f"{each.max()} of them have told."
            )
        self._clock.heard_peers.reshape(-1)[warps] = True
        self._clock.warp_barrier(warps)

    def wait_for_everyone(self, count: int) -> None:
        warps = self._whole(WARP, "wait_for_everyone")
        self._others().meet()
        told = (self._others().told.everyone[self._others().rank] != 0).sum()
        if told != count:
            raise DivergentBarrier(
                f"{self.name}: wait_for_everyone is for {count} warps; {told} have told."
            )
        self._clock.heard_everyone.reshape(-1)[warps] = True
        self._clock.warp_barrier(warps)

    def device_sync(self) -> None:
        if self.scope.lanes is not None:
            raise DivergentBarrier(f"{self.name}: device_sync is for all threads.")
        self.block_sync()
        self._tell(self._others().told.peers, slice(None), "device_sync")
        self._untold[:] = False
        self.wait_for_peers(self.num_threads // WARP)
        self.block_sync()

    def _check_devices_end(self) -> None:
        """All that others wrote to this device is there when the kernel ends: later ones may read it."""
        if self._peers is None:
            return
        everyone, clock = self._peers.told.everyone[self._peers.rank], self._clock
        if not clock.heard_peers.any(axis=1).all():
            raise RaceError(f"{self.name}: it ends without device_sync, or wait_for_peers.")
        if everyone.any() and not clock.heard_everyone.any(axis=1).all():
            raise RaceError(f"{self.name}: it ends without wait_for_everyone.")
        if self._untold.any():
            raise RaceError(
                f"{self.name}: it ends with stores to other devices that it told nobody of."
            )
