"""Who touched each cell since the last barrier.

Two accesses to a cell by different threads, one of them a write, need a barrier between them:
`warp_sync` or `block_sync` within a warp, `block_sync` between the warps of a CTA; nothing orders
two CTAs of a kernel. Atomics do not conflict with each other, only with plain accesses.

A *mark* is one int64 saying who touched a cell and when: `stamp << 34 | thread << 2 | span`.
Every barrier takes the next tick of one clock as the stamp of the warps that arrive. So an access
came before the CTA's last block barrier exactly when its mark is below the CTA's *floor*, and
before the warp's last barrier when its stamp is below the warp's. `span` widens a mark to several
lanes of the warp since its last barrier, or several warps of the CTA since the last block barrier:
all that a later write needs to know of all the reads, so that one mark per cell and kind of access
is exact. Mark 0 is an untouched cell; stamps start at 1.
"""

from typing import NamedTuple

import numpy as np

from moe_align_jax._simt.language import WARP

STAMP, THREAD = 34, 2
ONE_THREAD, ONE_WARP, ONE_CTA = range(3)


class Threads(NamedTuple):
    """Who makes an access: each lane's mark, and the floor of its CTA (an int when all agree)."""

    marks: np.ndarray
    floor: np.ndarray | int

    def at(self, lanes: np.ndarray) -> "Threads":
        floor = self.floor
        return Threads(self.marks[lanes], floor if isinstance(floor, int) else floor[lanes])

    def times(self, n: int) -> "Threads":
        floor = self.floor
        return Threads(self.marks.repeat(n), floor if isinstance(floor, int) else floor.repeat(n))


class Clock:
    """Barriers passed by every warp and CTA of a grid."""

    def __init__(self, num_ctas: int, num_threads: int):
        self.num_threads = num_threads
        self.tick = 1
        self._of_warp = np.ones((num_ctas, num_threads // WARP), np.int64)
        self._of_cta = np.ones(num_ctas, np.int64)
        self._thread = np.arange(num_ctas * num_threads, dtype=np.int64) << THREAD
        self._threads: Threads | None = None

    def block_barrier(self, ctas: np.ndarray | slice) -> None:
        self.tick += 1
        self._of_cta[ctas] = self._of_warp[ctas] = self.tick
        self._threads = None

    def warp_barrier(self, warps: np.ndarray | slice) -> None:
        self.tick += 1
        self._of_warp.reshape(-1)[warps] = self.tick
        self._threads = None

    def threads(self) -> Threads:
        """All threads of the grid, now."""
        if self._threads is None:
            marks = self._thread + (self._of_warp << STAMP).repeat(WARP)
            floor = self._of_cta << STAMP
            uniform = (floor == floor[0]).all()
            self._threads = Threads(
                marks, int(floor[0]) if uniform else floor.repeat(self.num_threads)
            )
        return self._threads


def thread_of(marks):
    """Index in the grid."""
    return (marks >> THREAD) & 0xFFFFFFFF


class Touches:
    """The marks of one kind of access to one buffer."""

    def __init__(self, num_cells: int, num_threads: int, across_ctas: bool):
        self.marks = np.zeros(num_cells, np.int64)
        self._num_threads = num_threads
        self._across = across_ctas  # CTAs share the cells

    def conflict(self, cells: np.ndarray, threads: Threads) -> tuple[int, int] | None:
        """The first lane that no barrier orders after an earlier access, and that one's mark."""
        old = self.marks.take(cells)
        maybe = old != 0 if self._across else old >= threads.floor
        if not maybe.any():
            return None
        [lanes] = maybe.nonzero()
        old, (marks, floor) = old[lanes], threads.at(lanes)
        me, other, span = thread_of(marks), thread_of(old), old & 3
        same_warp = me // WARP == other // WARP
        past_barrier = same_warp & (span <= ONE_WARP) & (old >> STAMP < marks >> STAMP)
        myself = (span == ONE_THREAD) & (me == other)
        bad = (old >= floor) & ~past_barrier & ~myself
        if self._across:
            bad |= me // self._num_threads != other // self._num_threads
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
        """The lanes join those that touched the cells.

        All are of one CTA: what can be read was written by a CTA, and the reads of others are races.
        """
        marks, floor = threads
        old = self.marks.take(cells)
        self.marks[cells] = marks
        won = self.marks.take(cells)
        shared = ((old >= floor) & (old != marks)) | (won != marks)
        if not shared.any():
            return
        [lanes] = shared.nonzero()
        cells, old, won = cells[lanes], old[lanes], won[lanes]
        marks, floor = threads.at(lanes)
        me, other, winner, span = thread_of(marks), thread_of(old), thread_of(won), old & 3
        # With the lanes of this instruction.
        reach = np.where(me == winner, ONE_THREAD, ONE_WARP)
        reach[me // WARP != winner // WARP] = ONE_CTA
        # With those before it, as far as no barrier lies between.
        recent = old >= floor
        same_warp = me // WARP == other // WARP
        same_time = old >> STAMP == marks >> STAMP
        in_warp = recent & same_warp & same_time & ((span == ONE_WARP) | (me != other))
        reach[in_warp] = np.maximum(reach[in_warp], ONE_WARP)
        reach[recent & (~same_warp | (span >= ONE_CTA))] = ONE_CTA
        for span in (ONE_WARP, ONE_CTA):  # the widest that a lane found stays
            wide = reach == span
            self.marks[cells[wide]] = marks[wide] | span
