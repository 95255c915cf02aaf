"""Many launches over one window, in NumPy: each CTA of each device has a thread of the host.

One CTA runs at a time, up to its next access to a window; then a schedule says who goes on. So a device may
be a whole kernel ahead of another one, and a CTA anywhere ahead of its neighbours. A store to a window waits
in its CTA until the schedule lets it through, in any order, or the CTA tells of it (`_tell`). What is not
looked for here is what `run_on_devices` finds: races within a launch.
"""

import dataclasses
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np

from moe_align_jax._simt import window
from moe_align_jax._simt.emulator.devices import Remote
from moe_align_jax._simt.emulator.faults import (
    DivergentBarrier,
    OutOfBounds,
    RaceError,
    Undefined,
)
from moe_align_jax._simt.emulator.lockstep import EmulatedSimt
from moe_align_jax._simt.emulator.memory import Buffer
from moe_align_jax._simt.emulator.races import Threads
from moe_align_jax._simt.emulator.values import Value, array_of, constant
from moe_align_jax._simt.language import Int, Kernel, Shapes, check_launch

type Actor = tuple[int, int]  # device and CTA
type Launch = tuple[Kernel, Sequence[Sequence[np.ndarray]]]
type Store = tuple[int, np.ndarray, np.ndarray]  # place, words of its window, values


class Schedule:
    """Who goes on, and which stores come through.

    Attributes:
        seed: of the choices that are left to chance.
        favoured: devices, the first of which goes on as long as it can; none: chance decides.
        promptness: how probably a store comes through at each turn.
    """

    def __init__(self, seed: int, favoured: Sequence[int] = (), promptness: float = 0.5):
        self._random = random.Random(seed)
        self._favoured, self._promptness = favoured, promptness

    def choose(self, ready: list[Actor]) -> Actor:
        """One of some."""
        for device in self._favoured:
            if mine := [actor for actor in ready if actor[0] == device]:
                return self._random.choice(mine)
        return self._random.choice(ready)

    def delivered(self, pending: list[Store]) -> Store | None:
        """A store that comes through now, if any; it is taken out."""
        if pending and self._random.random() < self._promptness:
            return pending.pop(self._random.randrange(len(pending)))
        return None


class _Board:
    """What the CTAs share: windows, turns, and stores under way."""

    def __init__(self, devices: int, actors: list[Actor], words: int, schedule: Schedule):
        self.memory = [np.zeros(words, np.int32) for _ in range(devices)]
        self.ended = Counter[tuple[int, int]]()  # CTAs, by launch and device
        self._put = set[tuple[int, int, int]]()  # launch, place and word of each word that was put
        self._pending: dict[Actor, list[Store]] = {actor: [] for actor in actors}
        self._waiting: dict[Actor, Callable[[], bool]] = {}
        self._turn = threading.Condition()
        self._running: Actor | None = None
        self._alive, self._failed, self._schedule = len(actors), False, schedule

    def pause(self, actor: Actor, ready: Callable[[], bool] = lambda: True) -> None:
        """Until the schedule says that I go on, and not before `ready`."""
        with self._turn:
            self._waiting[actor] = ready
            self._pass_on()
            self._turn.wait_for(lambda: self._running == actor or self._failed)
            if self._failed:
                raise threading.BrokenBarrierError
            self._running = None
            del self._waiting[actor]

    def leave(self, actor: Actor, *, failed: bool) -> None:
        """The CTA does nothing any more, or all are to stop."""
        with self._turn:
            self.flush(actor)
            self._alive -= 1
            self._failed |= failed
            self._turn.notify_all()
            self._pass_on()

    def _pass_on(self) -> None:
        """Lets stores through and says who goes on, as soon as all CTAs wait."""
        if self._failed or not self._waiting or len(self._waiting) < self._alive:
            return
        for pending in self._pending.values():
            if store := self._schedule.delivered(pending):
                self._write(store)
        ready = [actor for actor, test in self._waiting.items() if test()]
        if not ready:  # in the end every store comes through
            for actor in self._pending:
                self.flush(actor)
            ready = [actor for actor, test in self._waiting.items() if test()]
        self._failed = not ready
        self._turn.notify_all()
        if not ready:
            raise DivergentBarrier("All CTAs wait for what nobody does.")
        self._running = self._schedule.choose(sorted(ready))

    def store(self, actor: Actor, store: Store) -> None:
        """A store of a CTA is under way: the schedule decides when it comes through."""
        self._pending[actor].append(store)

    def first_put(self, launch: int, place: int, cell: int) -> bool:
        """Whether a word is put there for the first time in a launch. One CTA runs at a time."""
        known = len(self._put)
        self._put.add((launch, place, cell))
        return len(self._put) > known

    def flush(self, actor: Actor) -> None:
        """All that the CTA has stored comes through."""
        for store in self._pending[actor]:
            self._write(store)
        self._pending[actor].clear()

    def _write(self, store: Store) -> None:
        """Makes a store visible in its window."""
        place, cells, values = store
        self.memory[place][cells] = values


class _Staged(Buffer):
    """A staged array in the window of a device."""

    def __init__(self, cta: "_Cta", name: str, words: int, place: int, offset: int):
        super().__init__(
            name,
            (words,),
            cta.board.memory[place][offset : offset + words],
            kernel=cta.name,
            num_threads=cta.num_threads,
            writable=True,
            per_cta=False,
            reach="grid",
            check_races=False,
        )
        self._cta, self._place, self._offset = cta, place, offset

    def read(self, cells: np.ndarray, threads: Threads) -> np.ndarray:
        """The words of these cells now, after others had a turn."""
        self._cta.pause()
        return self.data.take(cells)

    def write(self, cells: np.ndarray, value: np.ndarray, threads: Threads) -> None:
        """Stores a value of each thread: under way until the schedule lets it through."""
        values = np.broadcast_to(value, cells.shape)
        self._cta.board.store(self._cta.actor, (self._place, cells + self._offset, values.copy()))


class _Cta(window.Windowed, EmulatedSimt):
    """A CTA of the launch of that number on the device of a place."""

    def __init__(self, kernel: Kernel, board: _Board, actor: Actor, half_words: int, number: int):
        EmulatedSimt.__init__(self, dataclasses.replace(kernel, num_ctas=1))
        self.board, self.actor, self._words_of = board, actor, kernel.staged
        self.num_ctas, self._cta = kernel.num_ctas, constant(actor[1])
        self._inbox_words, self._number = kernel.inbox, number
        self.open_window(kernel, self.const(actor[0]), half_words)

    @property
    def _mine(self) -> np.ndarray:
        """This device's window."""
        return self.board.memory[self.actor[0]]

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Until the schedule says that this CTA goes on, and not before `ready`."""
        self.board.pause(self.actor, ready)

    def rank(self) -> Int:  # not EmulatedSimt's
        return window.Windowed.rank(self)

    def remote(self, ref: Buffer, rank: Int | int) -> Remote:
        return Remote(ref.name, self._full(array_of(rank)))

    def _each_device(self, ref: Remote) -> Iterator[Buffer]:
        for rank in np.unique(self.scope.active(ref.ranks)):
            assert 0 <= rank < self._group.count, f"{self.name}: no rank {rank}"
            with self._inside(self._chosen(self.scope, ref.ranks == rank)):
                yield self.staged(ref.name, int(rank))

    def _array(self, name: str, place: Int, offset: Int) -> Buffer:
        [words] = self._words_of[name]
        where, first = (int(array_of(x)[0]) for x in (place, offset))
        return _Staged(self, name, words, where, first)

    def _active(self, *values: Int | int) -> list[np.ndarray]:
        """The active lanes' elements of some values."""
        return [self.scope.active(self._full(array_of(value))) for value in values]

    def _now(self, offset: int) -> Int:
        self.pause()
        return Value(constant(int(self._mine[offset])), self)

    def _set(self, offset: int, value: Int) -> None:
        if self.scope.count:
            self._mine[offset] = self._active(value)[0][0]

    def _add(self, offset: int, value: int) -> Int:
        if not self.scope.count:
            return self.const(0)
        self.pause()
        before = int(self._mine[offset])
        self._mine[offset] += value
        return self.const(before)

    def _tell(self, place: Int, offset: Int, value: Int) -> None:
        self.pause()
        self.board.flush(self.actor)
        for where, at, word in zip(*self._active(place, offset, value), strict=True):
            self.pause()
            self.board.memory[where][at] = word

    def _tell_alone(self, place: Int, offset: Int, value: Int) -> None:
        self.pause()
        for where, at, word in zip(*self._active(place, offset, value), strict=True):
            self.board.store(self.actor, (where, np.array([at]), np.array([word])))

    def _check_tagged(self, doing: str, cells: np.ndarray, width: int = 2) -> None:
        """Raises unless words stand where a word of this launch and its epoch stand: in its half, within the
        inbox or the tagged words. `width`: of the access, of which they are multiples.

        Args:
            doing: what is done, for the message.
            cells: the first word of each access, in words of a window.
            width: 2 for a word and its epoch, 4 for two of them at once.
        """
        half = int(array_of(self._half)[0])
        inbox = window.INBOX + half * 2 * window.MAX_INBOX
        tagged = window.DATA + (half + 1) * self._half_words - 2 * window.TAGGED
        fits = np.zeros(cells.shape, bool)
        for start, words in ((inbox, self._inbox_words), (tagged, window.TAGGED)):
            at = cells - start
            fits |= (at >= 0) & (at + width <= 2 * words) & (at % width == 0)
        if not fits.all():
            wrong = cells[fits.argmin()]
            raise OutOfBounds(f"{self.name}: {doing} at word {wrong} of a window, no place for it.")

    def _put_two(self, place: Int, offset: Int, first: Int, second: Int, epoch: Int) -> None:
        self._check_tagged("puts two words and their epochs", self._active(offset)[0], 4)
        self._put(place, offset, first, epoch)
        self._put(place, offset + 2, second, epoch)

    def _watch(self, offset: Int, value: Int) -> None:
        if self.scope.count:
            at, words = self._active(offset, value)
            self.pause(lambda: bool((self._mine[at] == words).all()))

    def _put(self, place: Int, offset: Int, value: Int, epoch: Int) -> None:
        self.pause()
        places, cells, values, epochs = self._active(place, offset, value, epoch)
        of_rank = [int(array_of(self._at_rank(rank))[0]) for rank in range(self._group.count)]
        if not np.isin(places, of_rank).all():
            raise OutOfBounds(f"{self.name}: puts a word into the window of no rank.")
        self._check_tagged("puts a word and its epoch", cells)
        for where, at, *words in zip(places, cells, values, epochs, strict=True):
            if not self.board.first_put(self._number, where, at):
                raise RaceError(f"{self.name}: a word is put once.")
            self.board.store(self.actor, (where, at + np.arange(2), np.array(words)))

    def _take(self, offsets: Sequence[tuple[Int, int]], epoch: Int) -> list[tuple[Int, ...]]:
        every = [self._full(array_of(offset)) for offset, _ in offsets]
        [epochs], results = self._active(epoch), []
        cells = [
            self.scope.active(first)[:, None] + 2 * np.arange(width)
            for first, (_, width) in zip(every, offsets, strict=True)
        ]
        for one in cells:
            self._check_tagged("takes a word and its epoch", one.reshape(-1))
        if self.scope.count:
            self.pause(lambda: all((self._mine[at + 1] == epochs[0]).all() for at in cells))
        for first, (_, width) in zip(every, offsets, strict=True):
            inside = first.clip(0, self._mine.size - 2 * width)
            words = [self._mine[inside + 2 * k] for k in range(width)]
            results.append(tuple(Value(one, self) for one in words))
        return results


def run_in_window(
    launches: Sequence[Launch], schedule: Schedule, *, num_bytes: int, epoch: int = 0
) -> list[list[list[np.ndarray]]]:
    """Runs kernels one after the other on each device of a group, over one window of each.

    Args:
        launches: kernels with `devices`, and their operands as for `run_on_devices`.
        schedule: who goes on.
        num_bytes: of a window.
        epoch: how many kernels have used the windows before.

    Returns:
        For each launch and device the outputs, in order.

    Raises:
        EmulatorError: as for `run`, and where all wait.
    """
    devices = len(launches[0][1])
    most = max(kernel.num_ctas for kernel, _ in launches)
    actors = [(device, cta) for device in range(devices) for cta in range(most)]
    board = _Board(devices, actors, num_bytes // 4, schedule)
    half_words = window.Window(0, num_bytes).half_words
    for memory in board.memory:
        memory[window.EPOCH] = epoch
    outputs = []
    for kernel, given in launches:
        check_launch(kernel)
        if reason := window.unsupported(kernel):
            raise Undefined(f"{kernel.name}: {reason}.")
        if window.bytes_needed(kernel) > num_bytes:
            raise OutOfBounds(f"{kernel.name}: it does not fit into a window of {num_bytes} bytes.")
        outputs.append([_buffers(kernel, kernel.outputs) for _ in given])

    def run(actor: Actor) -> None:
        device, cta = actor
        for number, (kernel, given) in enumerate(launches):
            if cta >= kernel.num_ctas:
                continue
            if number:
                before, ctas = (number - 1, device), launches[number - 1][0].num_ctas
                board.pause(actor, lambda b=before, n=ctas: board.ended[b] == n)
            machine = _Cta(kernel, board, actor, half_words, number)
            inputs = zip(kernel.inputs.items(), given[device], strict=True)
            refs = {
                name: _buffer(kernel, name, shape, np.asarray(x, np.int32).reshape(-1), False)
                for (name, shape), x in inputs
            }
            refs |= outputs[number][device] | _buffers(
                kernel, {name: (words,) for name, words in kernel.shared.items()}
            )
            refs |= {name: machine.staged(name) for name in kernel.staged}
            with np.errstate(divide="ignore"):
                kernel.body(machine, SimpleNamespace(**refs))
            machine.check_loops()
            board.flush(actor)
            board.ended[number, device] += 1

    def run_and_leave(actor: Actor) -> None:
        ended = False
        try:
            board.pause(actor)
            run(actor)
            ended = True
        finally:
            board.leave(actor, failed=not ended)

    with ThreadPoolExecutor(len(actors)) as pool:
        found = [pool.submit(run_and_leave, actor).exception for actor in actors]
        errors = [error for each in found if (error := each())]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    for (kernel, _), every in zip(launches, outputs, strict=True):
        for mine in every:
            for name in set(mine) - kernel.partial:
                mine[name].check_written()
    return [
        [[mine[n].data.reshape(shape) for n, shape in kernel.outputs.items()] for mine in every]
        for (kernel, _), every in zip(launches, outputs, strict=True)
    ]


def _buffer(
    kernel: Kernel, name: str, shape: tuple[int, ...], data: np.ndarray, writable: bool
) -> Buffer:
    """A buffer of words in which races are not looked for."""
    return Buffer(
        name,
        shape,
        data,
        kernel=kernel.name,
        num_threads=kernel.num_threads,
        writable=writable,
        per_cta=False,
        reach="grid",
        check_races=False,
    )


def _buffers(kernel: Kernel, shapes: Shapes) -> dict[str, Buffer]:
    """Buffers of zeros of these shapes."""
    return {
        name: _buffer(kernel, name, shape, np.zeros(int(np.prod(shape)), np.int32), True)
        for name, shape in shapes.items()
    }
