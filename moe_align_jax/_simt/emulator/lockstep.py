"""The machine in NumPy: a grid's threads in lock step, control flow narrowing who is active."""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np

from moe_align_jax._simt.emulator.clusters import InCluster
from moe_align_jax._simt.emulator.devices import AmongDevices, Peers, Remote
from moe_align_jax._simt.emulator.faults import (
    DivergentBarrier,
    MisalignedAccess,
    OutOfBounds,
    RaceError,
    Undefined,
)
from moe_align_jax._simt.emulator.memory import Buffer
from moe_align_jax._simt.emulator.races import Clock, Threads
from moe_align_jax._simt.emulator.values import NOTHING, Scope, Value, array_of, constant
from moe_align_jax._simt.language import WARP, Int, Kernel


class EmulatedSimt(AmongDevices, InCluster):
    """All CTAs of one kernel at once.

    `behind`: the kernels of the program that have ended once `grid_dependency_wait` returns.
    `peers`: for a kernel of several devices.
    """

    def __init__(
        self,
        kernel: Kernel,
        behind: frozenset[int] = frozenset(),
        peers: Peers | None = None,
    ):
        self.name, self._behind = kernel.name, behind
        self.num_threads, self.num_ctas = kernel.num_threads, kernel.num_ctas
        self.cluster = kernel.cluster
        self._total = self.num_threads * self.num_ctas
        self._thread = np.tile(np.arange(self.num_threads, dtype=np.int32), self.num_ctas)
        self._cta = np.arange(self.num_ctas, dtype=np.int32).repeat(
            self.num_threads if self.num_ctas > 1 else 1
        )
        rank, arrived = (peers.rank, peers.arrived) if peers else (0, None)
        self._clock = Clock(self.num_ctas, self.num_threads, rank, arrived, kernel.tail_threads)
        self._tail = kernel.tail_threads
        self._waited = np.zeros(self._total, bool)
        self._join(peers)
        self._open_mailboxes(kernel)
        self.scope = Scope(None, self._total)

    @property
    def waited(self) -> bool:
        """Whether a thread has waited for the kernels before this one."""
        return bool(self._waited.any())

    # -- helpers

    def _condition(self, condition: Int) -> np.ndarray:
        """The array of a condition, one boolean for each thread or for all."""
        array = array_of(condition)
        if array.dtype != bool:
            raise Undefined(f"{self.name}: a condition must be a boolean; got an int32.")
        return array

    def _full(self, array: np.ndarray) -> np.ndarray:
        """The array with an element for each thread."""
        return array if array.size == self._total else array.repeat(self._total)

    def _spread(self, values: np.ndarray) -> Value:
        """Values of the active lanes as one value."""
        lanes = self.scope.lanes
        if lanes is None:
            return Value(values, self)
        array = np.full(self._total, NOTHING, np.int32)
        array[lanes] = values
        return Value(array, self)

    def _chosen(self, scope: Scope, chosen: np.ndarray) -> Scope:
        """The lanes of a scope where `chosen` (size 1, or of all threads) holds."""
        if chosen.size == 1:
            lanes = scope.lanes if chosen[0] else np.empty(0, np.intp)
        elif scope.lanes is None:
            [lanes] = chosen.nonzero()
        else:
            lanes = scope.lanes[chosen.take(scope.lanes)]
        return Scope(lanes, self._total)

    @contextmanager
    def _inside(self, inner: Scope) -> Iterator[Scope]:
        """Runs what follows with those lanes alone active; values of it end with it."""
        outer, self.scope = self.scope, inner
        try:
            yield inner
        finally:
            inner.alive = False
            self.scope = outer

    def _threads(self) -> Threads:
        """The threads that are active now."""
        return self.scope.threads(self._clock)

    def _whole(self, size: int, what: str) -> np.ndarray | slice:
        """The groups of `size` threads that take part: all of a group is active, or none."""
        lanes = self.scope.lanes
        if lanes is None:
            return slice(None)
        groups = lanes // size
        arrived = np.bincount(groups, minlength=self._total // size)
        partial = (arrived != 0) & (arrived != size)
        if partial.any():
            group = int(partial.argmax())
            cta, first = divmod(group * size, self.num_threads)
            inside = np.isin(np.arange(group * size, (group + 1) * size), lanes)
            missing = first + int(inside.argmin())
            raise DivergentBarrier(
                f"{self.name}: {what} is reached by {int(arrived[group])} of {size} threads "
                f"({first}..{first + size - 1} of CTA {cta}); thread {missing} is not among them."
            )
        return arrived.nonzero()[0]

    # -- who and what

    def thread_id(self) -> Int:
        return Value(self._thread, self)

    def cta_id(self) -> Int:
        return Value(self._cta, self)

    def rank(self) -> Int:
        return Value(constant(self._others().rank), self)

    def const(self, value: int) -> Int:
        return Value(constant(operator.index(value)), self)

    def select(self, condition: Int, a: Int | int, b: Int | int) -> Int:
        x, y = array_of(a), array_of(b)
        if x.dtype != y.dtype:
            raise Undefined(f"{self.name}: select of {x.dtype} and {y.dtype}.")
        return Value(np.where(self._condition(condition), x, y), self)

    # -- control flow

    @contextmanager
    def _if(self, condition: Int) -> Iterator[None]:
        with self._inside(self._chosen(self.scope, self._condition(condition))):
            yield

    def _for_range(self, start: Int | int, stop: Int | int, step: Int | int) -> Iterator[Int]:
        at, end, by = array_of(start), array_of(stop), array_of(step)
        if (self.scope.active(by) <= 0).any():
            raise Undefined(f"{self.name}: for_range takes a positive step.")
        # A lane that has left stays out, though its counter goes on.
        inside = self._chosen(self.scope, at < end)
        while inside.count:
            with self._inside(inside):
                yield Value(at, self)
            following = at + by
            if (inside.active(following) < inside.active(at)).any():
                raise Undefined(f"{self.name}: the counter of a loop overflows int32.")
            at = following
            inside = self._chosen(inside, at < end)

    def values_if(
        self, condition: Int, compute: Callable[[], Sequence[Int]], others: Sequence[Int | int]
    ) -> list[Int]:
        chosen = self._condition(condition)
        results = [self._full(array_of(other)).copy() for other in others]
        with self._inside(self._chosen(self.scope, chosen)) as inside:
            if inside.count:
                values = [self._full(array_of(value)) for value in compute()]
                for number, (value, result) in enumerate(zip(values, results, strict=True)):
                    if value.dtype != np.int32 or result.dtype != np.int32:
                        raise Undefined(f"{self.name}: value_if takes int32 values.")
                    if inside.lanes is None:
                        results[number] = value
                    else:
                        result[inside.lanes] = value.take(inside.lanes)
        return [Value(result, self) for result in results]

    def values_while(
        self,
        first: Sequence[Int],
        goes_on: Callable[[Sequence[Int]], Int],
        step: Callable[[Sequence[Int]], Sequence[Int]],
    ) -> list[Int]:
        values: list[Int] = list(first)
        while True:
            going = goes_on(values)
            if not self._chosen(self.scope, self._condition(going)).count:
                return values
            values = self.values_if(going, lambda known=values: step(known), values)

    # -- memory

    def _cells(self, ref: Buffer, index: Any, width: int = 1, narrow: bool = False) -> np.ndarray:
        """Flat cells of the active lanes (the first of each, for a vector); `narrow`: a part of each is
        read."""
        indices = index if isinstance(index, tuple) else (index,)
        if len(indices) != len(ref.shape) or (width > 1 and len(indices) > 1):
            raise Undefined(
                f"{self.name}: {ref.name} has shape {list(ref.shape)}; got {len(indices)} indices."
            )
        cells = None
        for axis, (part, size) in enumerate(zip(indices, ref.shape, strict=True)):
            at = self.scope.active(array_of(part))
            if at.dtype != np.int32:
                raise Undefined(f"{self.name}: an index of {ref.name} is a boolean.")
            whole = size - (ref.tail < 4 and not narrow)
            bad = at.view(np.uint32) >= max(whole - width + 1, 0)
            if bad.any():
                where = f"{ref.name}, axis {axis} of shape {list(ref.shape)}"
                raise OutOfBounds(
                    f"{self.name}: {self._culprit(ref, bad)} accesses index "
                    f"{int(at[bad.argmax()])}{f' and the {width - 1} after it' * (width > 1)} "
                    f"of {where}."
                )
            if width > 1 and (at & (width - 1)).any():
                odd = (at & (width - 1)) != 0
                raise MisalignedAccess(
                    f"{self.name}: {self._culprit(ref, odd)} accesses {width} words at index "
                    f"{int(at[odd.argmax()])} of {ref.name}; it must be a multiple of {width}."
                )
            cells = at.astype(np.intp) if cells is None else cells * size + at
        assert cells is not None
        if ref.per_cta and self.num_ctas > 1:
            cells = cells + self.scope.active(self._cta).astype(np.intp) * ref.words
        if cells.size != self.scope.count:
            cells = cells.repeat(self.scope.count)
        return cells

    def _culprit(self, ref: Buffer, bad: np.ndarray) -> str:
        """The first thread of an access where `bad` holds, as messages name it."""
        return ref.thread(int(self._threads().marks[bad.argmax()]))

    def _read(self, ref: Buffer, cells: np.ndarray, threads: Threads) -> np.ndarray:
        """The words of these cells; raises where a kernel before writes them that was not waited for."""
        if ref.producer is not None:
            waited = self.scope.active(self._waited)
            if ref.producer not in self._behind or not waited.all():
                lane = 0 if waited.all() else int(waited.argmin()) * (cells.size // waited.size)
                raise RaceError(
                    f"{self.name}: race on {ref.cell(int(cells[lane]))}: kernel {ref.producer} of "
                    f"the program writes it and {ref.thread(int(threads.marks[lane]))} loads it "
                    "with no grid_dependency_wait between them."
                )
        return ref.read(cells, threads)

    def load(self, ref: Buffer, index: Any) -> Int:
        if not self.scope.count:
            return Value(constant(NOTHING), self)
        return self._spread(self._read(ref, self._cells(ref, index), self._threads()))

    def store(self, ref: Buffer | Remote, index: Any, value: Int | int) -> None:
        if isinstance(ref, Remote):
            for buffer in self._each_device(ref):
                self.store(buffer, index, value)
            return
        stored = self._stored(value)
        if self.scope.count:
            ref.write(self._cells(ref, index), stored, self._threads())

    def _stored(self, value: Int | int) -> np.ndarray:
        """The active lanes' values of what is stored, which must be int32."""
        array = array_of(value)
        if array.dtype != np.int32:
            raise Undefined(f"{self.name}: memory holds int32 values; got a boolean.")
        return self.scope.active(array)

    def _vectors(self, ref: Buffer, index: Any, width: int = 4) -> np.ndarray:
        """The cells of `width` neighbouring words for each active lane."""
        return (self._cells(ref, index, width=width)[:, None] + np.arange(width)).reshape(-1)

    def load4(self, ref: Buffer, index: Int | int) -> tuple[Int, ...]:
        if not self.scope.count:
            return (Value(constant(NOTHING), self),) * 4
        words = self._read(ref, self._vectors(ref, index), self._threads().times(4))
        return tuple(self._spread(words[k::4]) for k in range(4))

    def load_narrow(self, ref: Buffer, index: Int | int, width: int) -> Int:
        if width not in (1, 2):
            raise Undefined(f"{self.name}: load_narrow reads 1 byte or 2; got {width}.")
        if not self.scope.count:
            return Value(constant(NOTHING), self)
        first = (self.const(index) if isinstance(index, int) else index) * width
        behind = self.scope.active(array_of(first)).astype(np.int64) + width
        if (bad := behind > 4 * ref.words - 4 + ref.tail).any():
            raise OutOfBounds(
                f"{self.name}: {self._culprit(ref, np.broadcast_to(bad, (self.scope.count,)))} reads "
                f"byte {int(behind[bad.argmax()]) - 1} of {ref.name}, which ends before."
            )
        word = self._read(ref, self._cells(ref, first >> 2, narrow=True), self._threads())
        return (self._spread(word) >> ((first & 3) << 3)) & ((1 << 8 * width) - 1)

    def store4(self, ref: Buffer | Remote, index: Int | int, value: Any) -> None:
        self._store_words(ref, index, value if isinstance(value, tuple) else (value,) * 4)

    def store2(self, ref: Buffer | Remote, index: Int | int, value: tuple[Int, ...]) -> None:
        self._store_words(ref, index, value)

    def _store_words(self, ref: Buffer | Remote, index: Int | int, values: tuple[Int, ...]) -> None:
        """Stores two or four neighbouring words of each active lane, also to other devices."""
        if isinstance(ref, Remote):
            for buffer in self._each_device(ref):
                self._store_words(buffer, index, values)
            return
        stored, width = [self._stored(v) for v in values], len(values)
        if self.scope.count:
            columns = [np.broadcast_to(words, (self.scope.count,)) for words in stored]
            words = np.stack(columns, axis=1).reshape(-1)
            ref.write(self._vectors(ref, index, width), words, self._threads().times(width))

    def launch_value(self, ref: Any) -> Int:
        return self.load(ref, 0)

    def atomic_add(self, ref: Buffer, index: Int | int, value: Int | int) -> None:
        added = self._stored(value)
        if self.scope.count:
            ref.atomic_add(self._cells(ref, index), added, self._threads())

    # -- float32, as the bits of an int32

    def _float(self, operation: Callable, *operands: Int | int) -> Int:
        """The bits of a float32 operation on values that hold float32 bits."""
        arrays = [array_of(x).view(np.float32) for x in operands]
        with np.errstate(all="ignore"):  # lanes that are not active may hold anything
            result = operation(*arrays)
        return Value(np.asarray(result, np.float32).view(np.int32), self)

    def fma(self, a: Int, b: Int, c: Int | int) -> Int:
        # The product of two float32 is exact in float64.
        return self._float(lambda x, y, z: x.astype(np.float64) * y + z, a, b, c)

    def fma_saturated(self, a: Int, b: Int, c: Int) -> Int:
        result = self.fma(a, b, c)  # rounded, as 0 and 1 are what they are
        return self._float(lambda x: np.where(np.isnan(x), 0, np.clip(x, 0, 1)), result)

    def fadd(self, a: Int, b: Int) -> Int:
        return self._float(np.add, a, b)

    def fmul(self, a: Int, b: Int | int) -> Int:
        return self._float(np.multiply, a, b)

    def fdiv(self, a: Int | int, b: Int) -> Int:
        return self._float(np.divide, a, b)

    def fmax(self, a: Int, b: Int) -> Int:
        return self._float(np.fmax, a, b)

    def fmin(self, a: Int, b: Int) -> Int:
        return self._float(np.fmin, a, b)

    def exp2(self, a: Int) -> Int:
        return self._float(lambda x: _without_subnormals(np.exp2(x.astype(np.float64))), a)

    def reciprocal(self, a: Int) -> Int:
        return self._float(
            lambda x: _without_subnormals(1 / _without_subnormals(x).astype(np.float64)), a
        )

    def fsqrt(self, a: Int) -> Int:
        return self._float(lambda x: np.sqrt(_without_subnormals(x)), a)

    def from_float16(self, word: Int) -> Int:
        low = array_of(word).astype(np.uint16).view(np.float16)
        return Value(low.astype(np.float32).view(np.int32), self)

    def bfloat16_pair(self, low: Int, high: Int) -> Int:
        return self._pair(low, high, ml_dtypes.bfloat16, np.uint16, 16)

    def e4m3_pair(self, low: Int, high: Int) -> Int:
        return self._pair(low, high, ml_dtypes.float8_e4m3fn, np.uint8, 8)

    def _pair(self, low: Int, high: Int, kind: Any, word: Any, bits: int) -> Int:
        """Two float32 rounded to `kind`, `bits` wide each, in one int32."""
        halves = []
        with np.errstate(all="ignore"):
            for x in (low, high):
                value = array_of(x).view(np.float32)
                if bits == 8:
                    value = np.clip(value, -448, 448)
                halves.append(value.astype(kind).view(word).astype(np.uint32))
        return Value((halves[0] | halves[1] << np.uint32(bits)).view(np.int32), self)

    # -- warp

    def shfl(self, value: Int, lane: Int | int) -> Int:
        self._whole(WARP, "shfl")
        array, source = array_of(value), array_of(lane)
        asked = self.scope.active(source).view(np.uint32)
        if (asked >= WARP).any():
            raise OutOfBounds(f"{self.name}: shfl from lane {int(asked.max())} of a warp.")
        if array.size == 1:
            return Value(array, self)
        if source.size == 1:
            return Value(array[int(source[0]) :: WARP].repeat(WARP), self)
        warp = np.arange(self._total, dtype=np.int32) & -WARP
        return Value(array.take(warp + (source & (WARP - 1))), self)

    def shfl_up(self, value: Int, delta: int) -> Int:
        self._whole(WARP, "shfl_up")
        array = array_of(value)
        if array.size == 1:
            return Value(array, self)
        rows = array.reshape(-1, WARP)
        moved = np.concatenate([rows[:, :delta], rows[:, : WARP - delta]], axis=1)
        return Value(moved.reshape(-1), self)

    def ballot(self, condition: Int) -> Int:
        self._whole(WARP, "ballot")
        return Value(_masks(self._full(self._condition(condition))).repeat(WARP), self)

    def same_bit(self, value: Int, bit: int) -> Int:
        mine = (value & (1 << bit)).ne(0)
        votes = self.ballot(mine)
        return self.select(mine, votes, votes ^ -1)

    def _over_warp(self, what: str, operation: Callable, value: Int) -> Int:
        """A reduction over each warp, all of whose lanes must be active."""
        self._whole(WARP, what)
        rows = self._full(array_of(value)).reshape(-1, WARP)
        return Value(operation(rows).repeat(WARP), self)

    def warp_sum(self, value: Int) -> Int:
        return self._over_warp("warp_sum", lambda x: x.sum(axis=1, dtype=np.int32), value)

    def warp_max(self, value: Int) -> Int:
        return self._over_warp("warp_max", lambda x: x.max(axis=1), value)

    def warp_min(self, value: Int) -> Int:
        return self._over_warp("warp_min", lambda x: x.min(axis=1), value)

    def popc(self, value: Int) -> Int:
        return Value(np.bitwise_count(array_of(value).view(np.uint32)).astype(np.int32), self)

    def highest_bit(self, value: Int) -> Int:
        _, exponent = np.frexp(array_of(value).view(np.uint32).astype(np.float64))
        return Value(exponent.astype(np.int32) - 1, self)

    # -- order

    def warp_sync(self) -> None:
        self._clock.warp_barrier(self._whole(WARP, "warp_sync"))

    def tail_sync(self) -> None:
        if not self._tail:
            raise Undefined(f"{self.name}: tail_sync is for kernels with `tail_threads`.")
        first, lanes = self.num_threads - self._tail, self.scope.lanes
        arrived = np.zeros(self._total, bool)
        arrived[slice(None) if lanes is None else lanes] = True
        rows = arrived.reshape(self.num_ctas, self.num_threads)
        if rows[:, :first].any():
            cta, thread = np.argwhere(rows[:, :first])[0]
            raise DivergentBarrier(
                f"{self.name}: tail_sync is reached by thread {thread} of CTA {cta}; it is for those "
                f"from {first} on."
            )
        count = rows[:, first:].sum(axis=1)
        if (partial := (count > 0) & (count < self._tail)).any():
            cta = int(partial.argmax())
            missing = first + int(rows[cta, first:].argmin())
            raise DivergentBarrier(
                f"{self.name}: tail_sync is reached by {count[cta]} of {self._tail} threads of CTA "
                f"{cta}; thread {missing} is not among them."
            )
        self._clock.tail_barrier(count.nonzero()[0])

    def block_sync(self) -> None:
        self._clock.block_barrier(self._whole(self.num_threads, "block_sync"))

    def check_end(self) -> None:
        """At the end of the kernel."""
        self._check_devices_end()
        self._check_mail_end()

    def grid_dependency_wait(self) -> None:
        lanes = self.scope.lanes
        self._waited[slice(None) if lanes is None else lanes] = True

    def launch_dependents(self) -> None:
        """Nothing: the next kernel is taken to start as early as it can anyway."""


def _without_subnormals(x: np.ndarray) -> np.ndarray:
    """float32, as instructions that flush subnormal numbers have it."""
    small = np.abs(x) < np.finfo(np.float32).tiny
    return np.where(small, np.copysign(0.0, x), x).astype(np.float32)


def _masks(votes: np.ndarray) -> np.ndarray:
    """Each 32 booleans, in order, as the bits of one int32."""
    packed = np.packbits(votes.reshape(-1), bitorder="little")
    return packed.view("<i4").astype(np.int32, copy=False)
