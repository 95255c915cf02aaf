"""Memory of the emulator: every access to a cell is checked before it is made."""

import numpy as np

from moe_align_jax._simt.emulator.faults import (
    ConflictingStores,
    RaceError,
    Undefined,
    UninitialisedRead,
    UnwrittenOutput,
)
from moe_align_jax._simt.emulator.races import ONE_THREAD, SPAN, Threads, Touches, thread_of


class Buffer:
    """A ref: its cells in one flat array, the CTAs' shared arrays one after the other.

    An input is only read and holds no marks. `check_races=False` keeps the marks of what is
    written (they say what is initialised), no more.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        data: np.ndarray,
        *,
        kernel: str,
        num_threads: int,
        writable: bool,
        per_cta: bool,
        reach: str,
        check_races: bool,
        producer: int | None = None,
        num_ctas: int = 0,
        tail: int = 4,
    ):
        self.name, self.shape, self.data, self.kernel = name, shape, data, kernel
        self.per_cta, self.producer = per_cta, producer
        self.tail = tail  # bytes of the last word that are there
        self._num_ctas = num_ctas  # of a device, where there are several
        self.words = int(np.prod(shape))
        self._num_threads, self._check = num_threads, check_races
        self._new = lambda: Touches(data.size, num_threads, reach)
        self.written: Touches | None = self._new() if writable else None
        self._read: Touches | None = None
        self._atomic: Touches | None = None

    def read(self, cells: np.ndarray, threads: Threads) -> np.ndarray:
        """The words of these cells, one for each thread. Raises on a cell without a value, and on a race."""
        if self.written is not None:
            self._check_initialised(cells, threads)
            if self._check:
                self._no_conflict("load", cells, threads, store=self.written, atomic=self._atomic)
                if self._read is None:
                    self._read = self._new()
                self._read.add(cells, threads)
        return self.data.take(cells)

    def write(self, cells: np.ndarray, value: np.ndarray, threads: Threads) -> None:
        """Stores a value of each thread to its cell. Raises on an input, and on a race."""
        written = self._writable()
        if self._check:
            self._no_conflict(
                "store", cells, threads, store=written, load=self._read, atomic=self._atomic
            )
            if clash := written.replace(cells, threads.marks):
                raise ConflictingStores(self._race("store", cells, threads, "store", *clash))
        else:
            written.marks[cells] = 1
        self.data[cells] = value

    def atomic_add(self, cells: np.ndarray, value: np.ndarray, threads: Threads) -> None:
        """Adds each thread's value to its cell of shared memory. Raises as `read` and `write` do."""
        written = self._writable()
        if not self.per_cta:
            raise Undefined(
                f"{self.kernel}: atomic_add is for shared memory; {self.name} is global."
            )
        self._check_initialised(cells, threads)
        if self._check:
            self._no_conflict("atomic", cells, threads, store=written, load=self._read)
            if self._atomic is None:
                self._atomic = self._new()
            self._atomic.add(cells, threads)
        np.add.at(self.data, cells, value)

    def check_written(self) -> None:
        """At the end of the kernel, for an output."""
        missing = self._writable().marks == 0
        if missing.any():
            cell = int(missing.argmax())
            raise UnwrittenOutput(
                f"{self.kernel}: {self.cell(cell)} was not written; an output is written in full "
                f"({int(missing.sum())} of {missing.size} cells are missing)."
            )

    def _writable(self) -> Touches:
        """Who wrote each cell; raises for an input."""
        if self.written is None:
            raise Undefined(f"{self.kernel}: {self.name} is an input, and inputs are only read.")
        return self.written

    def _check_initialised(self, cells: np.ndarray, threads: Threads) -> None:
        """Raises where a thread reads a cell that nothing has written."""
        marks = self._writable().marks.take(cells)
        if not marks.all():
            lane = int((marks == 0).argmax())
            raise UninitialisedRead(
                f"{self.kernel}: {self.thread(int(threads.marks[lane]))} reads "
                f"{self.cell(int(cells[lane]))}, which nothing has written."
            )

    def _no_conflict(
        self, action: str, cells: np.ndarray, threads: Threads, **earlier: Touches | None
    ) -> None:
        """Raises where an access and an earlier one of another thread are not ordered by a barrier."""
        for other, touches in earlier.items():
            if touches is not None and (clash := touches.conflict(cells, threads)):
                raise RaceError(self._race(action, cells, threads, other, *clash))

    # -- names for messages

    def cell(self, cell: int) -> str:
        """A cell as messages name it."""
        if self.per_cta:
            return f"{self.name}[{cell % self.words}] of CTA {cell // self.words}"
        return f"{self.name}{[int(i) for i in np.unravel_index(cell, self.shape)]}"

    def thread(self, mark: int) -> str:
        """The thread that left a mark, as messages name it."""
        cta, thread = divmod(thread_of(mark), self._num_threads)
        if self._num_ctas:
            device, cta = divmod(cta, self._num_ctas)
            return f"thread {thread} of CTA {cta} of device {device}"
        return f"thread {thread} of CTA {cta}"

    def _race(
        self, action: str, cells: np.ndarray, threads: Threads, other: str, lane: int, mark: int
    ) -> str:
        """The message of a race between an access and an earlier one."""
        others = "" if mark & SPAN == ONE_THREAD else ", with other threads,"
        return (
            f"{self.kernel}: race on {self.cell(int(cells[lane]))}: {other} by "
            f"{self.thread(mark)}{others} and {action} by {self.thread(int(threads.marks[lane]))}, "
            "with no barrier between them."
        )
