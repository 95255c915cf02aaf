"""Who touched each cell since the last barrier.

Two accesses to a cell by different threads, one of them a write, need a barrier between them:
`warp_sync` or `block_sync` within a warp, `block_sync` between the warps of a CTA, or `tail_sync` between
those of its tail. Two CTAs, also those of two devices, are ordered only by a `device_arrive` that the other
one has waited for. Atomics do not conflict with each other, only with plain accesses.

A *mark* is one int64 saying who touched a cell and when: `stamp << 35 | thread << 3 | span`.
Every barrier takes the next tick of one clock as the stamp of the warps that arrive. So an access
came before the CTA's last block barrier exactly when its mark is below the CTA's *floor*, before the last
barrier of its tail when its stamp is below the tail's, and before the warp's last barrier when it is below
the warp's. `span` widens a mark to several lanes of the warp since its last barrier, several warps of the
tail since its last one, several warps of the CTA since the last block barrier, or several CTAs: all
that a later write needs to know of all the reads, so that one mark per cell and kind of access is
exact. Mark 0 is an untouched cell; stamps start at 1. Where several devices run a kernel, their threads are
counted on from device to device.
"""

from typing import NamedTuple

import numpy as np

from moe_align_jax._simt.language import WARP

STAMP, THREAD = 35, 3
ONE_THREAD, ONE_WARP, ONE_TAIL, ONE_CTA, SEVERAL_CTAS = range(5)

SPAN = (1 << THREAD) - 1  # the bits of a mark that hold it

type Floor = np.ndarray | int


def _at(floor: Floor, lanes: np.ndarray) -> Floor:
    """The floors of some lanes."""
    return floor if isinstance(floor, int) else floor[lanes]


class Threads(NamedTuple):
    """Who makes an access: each lane's mark, the floor of its CTA (an int when all agree), and the clock that
    knows what their warps have waited for."""

    marks: np.ndarray
    floor: Floor
    clock: "Clock"

    def at(self, lanes: np.ndarray) -> "Threads":
        """Those of some lanes."""
        return Threads(self.marks[lanes], _at(self.floor, lanes), self.clock)

    def times(self, n: int) -> "Threads":
        """Each of them n times in a row: for n neighbouring cells."""
        floor = self.floor if isinstance(self.floor, int) else self.floor.repeat(n)
        return Threads(self.marks.repeat(n), floor, self.clock)


class Clock:
    """Barriers passed by every warp and CTA of the grid of device `rank`.

    `arrived`: the tick of each device's `device_arrive`, 0 before it: all its CTAs come there at once.
    `tail`: threads at the end of each CTA that have a barrier of their own.
    """

    def __init__(
        self,
        num_ctas: int,
        num_threads: int,
        rank: int = 0,
        arrived: np.ndarray | None = None,
        tail: int = 0,
    ):
        self.num_threads, self._tail = num_threads, tail
        self.tick = 1
        self._arrived, self._rank = arrived, rank
        # Which warps have waited, by themselves or through a barrier of their CTA.
        self.heard = np.zeros((num_ctas, num_threads // WARP), bool)
        self._of_warp = np.ones((num_ctas, num_threads // WARP), np.int64)
        self._of_cta = np.ones(num_ctas, np.int64)
        self._of_tail = np.ones(num_ctas, np.int64)
        total = num_ctas * num_threads
        self._thread = np.arange(rank * total, (rank + 1) * total, dtype=np.int64) << THREAD
        self._threads: Threads | None = None

    def block_barrier(self, ctas: np.ndarray | slice) -> None:
        """All threads of these CTAs have met."""
        self.tick += 1
        self._of_cta[ctas] = self._of_tail[ctas] = self.tick
        self._of_warp[ctas] = self.tick
        if self._arrived is not None:
            self.heard[ctas] = self.heard[ctas].any(axis=1, keepdims=True)
        self._threads = None

    def tail_barrier(self, ctas: np.ndarray | slice) -> None:
        """All threads of these CTAs' tails have met."""
        self.tick += 1
        first = (self.num_threads - self._tail) // WARP
        self._of_tail[ctas] = self._of_warp[ctas, first:] = self.tick
        if self._arrived is not None:
            heard = self.heard[ctas, first:]
            self.heard[ctas, first:] = heard.any(axis=1, keepdims=True)
        self._threads = None

    def warp_barrier(self, warps: np.ndarray | slice) -> None:
        """All lanes of these warps have met."""
        self.tick += 1
        self._of_warp.reshape(-1)[warps] = self.tick
        self._threads = None

    def _floor(self, of_cta: np.ndarray) -> Floor:
        """The floor of each thread: the last barrier of its CTA; an int where all agree."""
        floor = of_cta.reshape(-1) << STAMP
        uniform = (floor == floor[0]).all()
        return int(floor[0]) if uniform else floor.repeat(self.num_threads)

    def threads(self) -> Threads:
        """All threads of the grid, now."""
        if self._threads is None:
            marks = self._thread + (self._of_warp << STAMP).repeat(WARP)
            self._threads = Threads(marks, self._floor(self._of_cta), self)
        return self._threads

    def both_in_tail(self, me: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Which pairs of threads have a barrier of their tail between them."""
        first = self.num_threads - self._tail
        n = self.num_threads
        return (me // n == other // n) & (me % n >= first) & (other % n >= first)

    def before_tail_barrier(self, me: np.ndarray, old: np.ndarray) -> np.ndarray:
        """Which accesses, by their marks, the tails of these threads have put behind them."""
        if not self._tail:
            return np.zeros(me.shape, bool)
        cta = me // self.num_threads - self._rank * self._of_tail.size
        past = (old & SPAN <= ONE_TAIL) & (old >> STAMP < self._of_tail[cta])
        return past & self.both_in_tail(me, thread_of(old))

    def told_before(self, me: np.ndarray, old: np.ndarray) -> np.ndarray:
        """Which accesses, by their marks, were told of to the warps of these threads."""
        if self._arrived is None:
            return np.zeros(me.shape, bool)
        num_ctas, warps = self.heard.shape
        mine = me // WARP - self._rank * num_ctas * warps
        other, stamp, span = thread_of(old) // WARP, old >> STAMP, old & SPAN
        peers = (mine // warps == other // warps % num_ctas) & (span <= ONE_CTA)
        told = stamp < self._arrived[other // warps // num_ctas]
        return peers & told & self.heard.reshape(-1)[mine]


def thread_of(marks):
    """Index in the grid."""
    return (marks >> THREAD) & 0xFFFFFFFF


class Touches:
    """The marks of one kind of access to one buffer.

    `reach`: who else can touch a cell: "cta", only threads of its CTA; "grid", all, with nothing to order
    CTAs but `device_arrive`.
    """

    def __init__(self, num_cells: int, num_threads: int, reach: str):
        self.marks = np.zeros(num_cells, np.int64)
        self._num_threads, self._reach = num_threads, reach

    def conflict(self, cells: np.ndarray, threads: Threads) -> tuple[int, int] | None:
        """The first lane that no barrier orders after an earlier access, and that one's mark."""
        old = self.marks.take(cells)
        maybe = old >= (threads.floor if self._reach == "cta" else 1)
        if not maybe.any():
            return None
        [lanes] = maybe.nonzero()
        old, (marks, floor, clock) = old[lanes], threads.at(lanes)
        me, other, span = thread_of(marks), thread_of(old), old & SPAN
        same_warp = me // WARP == other // WARP
        past_barrier = same_warp & (span <= ONE_WARP) & (old >> STAMP < marks >> STAMP)
        myself = (span == ONE_THREAD) & (me == other)
        bad = (old >= floor) & ~past_barrier & ~myself & ~clock.before_tail_barrier(me, old)
        if self._reach != "cta":
            bad |= (me // self._num_threads != other // self._num_threads) | (span == SEVERAL_CTAS)
            if bad.any():
                bad &= ~clock.told_before(me, old)
        if not bad.any():
            return None
        first = int(bad.argmax())
        return int(lanes[first]), int(old[first])

    def replace(self, cells: np.ndarray, marks: np.ndarray) -> tuple[int, int] | None:
        """The lanes are the last to have touched the cells. Returns two lanes that share one."""
        self.marks[cells] = marks
        won = self.marks.take(cells)
        twice = won != marks
        if not twice.any():
            return None
        first = int(twice.argmax())
        return first, int(won[first])

    def add(self, cells: np.ndarray, threads: Threads) -> None:
        """The lanes join those that touched the cells."""
        marks, floor, clock = threads
        old = self.marks.take(cells)
        self.marks[cells] = marks
        won = self.marks.take(cells)
        since = floor if self._reach == "cta" else 1
        shared = ((old >= since) & (old != marks)) | (won != marks)
        if not shared.any():
            return
        [lanes] = shared.nonzero()
        cells, old, won = cells[lanes], old[lanes], won[lanes]
        marks, floor, _ = threads.at(lanes)
        me, other, winner, span = thread_of(marks), thread_of(old), thread_of(won), old & SPAN
        # With the lanes of this instruction.
        reach = np.where(me == winner, ONE_THREAD, ONE_WARP)
        apart = me // WARP != winner // WARP
        reach[apart] = np.where(clock.both_in_tail(me, winner), ONE_TAIL, ONE_CTA)[apart]
        # With those before it, as far as no barrier lies between.
        recent = (old >= floor) & ~clock.before_tail_barrier(me, old)
        same_warp = me // WARP == other // WARP
        same_time = old >> STAMP == marks >> STAMP
        in_warp = recent & same_warp & same_time & ((span == ONE_WARP) | (me != other))
        reach[in_warp] = np.maximum(reach[in_warp], ONE_WARP)
        wide = np.where(clock.both_in_tail(me, other) & (span <= ONE_TAIL), ONE_TAIL, ONE_CTA)
        beyond = recent & (~same_warp | (span > ONE_WARP))
        reach[beyond] = np.maximum(reach, wide)[beyond]
        if self._reach != "cta":
            cta = me // self._num_threads
            apart = (cta != other // self._num_threads) | (span == SEVERAL_CTAS)
            reach[(cta != winner // self._num_threads) | (apart & (old > 0))] = SEVERAL_CTAS
        # The widest that a lane found stays.
        for span in (ONE_WARP, ONE_TAIL, ONE_CTA, SEVERAL_CTAS):
            wide_lanes = reach == span
            self.marks[cells[wide_lanes]] = marks[wide_lanes] | span
