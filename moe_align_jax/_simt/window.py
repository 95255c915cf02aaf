"""Windows: memory of ours on every device of a mesh, through which the devices that run a kernel meet.

XLA knows nothing of it. A kernel that lets peers write to its outputs needs to be told their addresses before
each launch, and needs zeroed counters and a barrier of all devices ahead of it. A window's address never
changes, and what is in it says for which launch it is, so nothing is told, cleared or waited for beforehand.

A window holds, in words of 4 bytes:

    EPOCH    how many kernels have used it on this device.
    TICKET   how many CTAs of the kernel that runs have read the epoch.
    FLAGS    [2, MAX_RANKS, MAX_CTAS]: the epoch in which the CTA of that index of that rank last arrived.
    INBOX    [2, MAX_INBOX, 2]: words that peers put, each with the epoch that it is for.
    DATA     2 halves: the staged arrays of a kernel, and at the end [TAGGED, 2]: words that peers put, each
             with the epoch that it is for.

The first index of each is the half, `epoch % 2`. A kernel's epoch is one more than the one that it finds. All
devices of a group launch the same kernels over a window in the same order, each device one after the other,
so a kernel has the same epoch on all of them. Words are told from older ones by being *equal* to the epoch,
never by being at least as great: after 2**31 launches "greater" would be wrong. Equal could be wrong for a
word that was last written exactly 2**32 - 2 launches before, and not once since.

Why a half can be used again. Let p and q be devices of a group, and E an epoch.
1. Kernel E + 1 ends on p only after each of its CTAs has seen the flag of q's CTA of that index, in E + 1.
2. So kernel E + 1 has begun on q, and kernel E has ended there, with all its reads of its half.
3. p stores to q's half of E again in E + 2, which on p begins after E + 1 has ended. That is after (2).
With one half in place of two, p would store in E + 1, while q may still read in E: step (2) needs a whole
kernel in between. A flag of E + 1, though, may come while q is in E: it is in the other half.

Why nothing comes late. A CTA raises its flags after all its stores and puts (`device_arrive`), and a kernel
ends only when each CTA has seen those of its peers. All CTAs have peers of their index, so when a kernel has
ended all that was stored to this device in its epoch is there. A kernel whose rows are tagged
(`device_begun`) takes them without a flag, and its flags say only what (1) needs. Some of its words may not
be taken (a row that has no place in its box), and come here after this device's kernel of E has ended. They
come before the peer's kernel of E has ended, whose stores are all performed then, so before its flag of
E + 1, for which (1) waits.

Why the epoch can be advanced in the middle of a kernel. The CTA that takes the last ticket does it, and a CTA
takes its ticket when all its threads have read the epoch.
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moe_align_jax._simt.language import WARP, Int, Kernel, Simt

MAX_RANKS, MAX_CTAS = 8, 1024
# With more, what a thread takes would stand beside its epochs in so many registers that a CTA less is
# resident.
MAX_INBOX = 4096
EPOCH, TICKET = 0, 32  # in cache lines of their own
FLAGS = 1024
INBOX = FLAGS + 2 * MAX_RANKS * MAX_CTAS
DATA = 1 << 16
assert INBOX + 2 * MAX_INBOX * 2 <= DATA
# Each takes 8 bytes of the link's time for 4 of rows, which pays only for few tokens. Of 7168 columns and
# two ranks: up to 36 tokens of each rank back in bfloat16, and some 70 there in e4m3.
TAGGED = 1 << 18
_ALIGNED = 64  # words that a staged array is a multiple of


@dataclass(frozen=True)
class Window:
    """The windows of a mesh's devices, one after the other in one range of addresses.

    Attributes:
        address: of the first device's.
        num_bytes: of each.
        patience: how many times `PATIENCE` in `mlir.py` a kernel waits for another device.
    """

    address: int
    num_bytes: int
    patience: int = 1

    @property
    def half_words(self) -> int:
        """Words of a half, which kernels use in turn."""
        return (self.num_bytes // 4 - DATA) // 2 // _ALIGNED * _ALIGNED


def places(kernel: Kernel) -> dict[str, int]:
    """Where each staged array begins in a half; "" where the last one ends."""
    found, end = {}, 0
    for name, shape in kernel.staged.items():
        [words] = shape
        found[name], end = end, end + -(-words // _ALIGNED) * _ALIGNED
    return found | {"": end}


def bytes_needed(kernel: Kernel) -> int:
    """Of a window that the kernel can use."""
    return 4 * (DATA + 2 * (places(kernel)[""] + 2 * TAGGED))


def unsupported(kernel: Kernel) -> str | None:
    """Why the kernel cannot use a window, or None."""
    assert kernel.devices is not None
    if kernel.devices.count > MAX_RANKS:
        return f"a window is for at most {MAX_RANKS} ranks"
    if kernel.num_ctas > MAX_CTAS:
        return f"a window is for at most {MAX_CTAS} CTAs"
    if kernel.inbox > MAX_INBOX:
        return f"a window's inbox has at most {MAX_INBOX} words"
    return None


class Windowed(Simt):
    """`PeerDevices` over a window. A backend gives the accesses, whose offsets are in words of a window."""

    num_threads: int
    num_ctas: int

    def open_window(self, kernel: Kernel, place: Int, half_words: int) -> None:
        """First of all, by all threads. `place`: the index of my device among the windows'."""
        devices = kernel.devices
        assert devices is not None
        self._group, self._place, self._places = devices, place, places(kernel)
        self._me = place // devices.stride % devices.count
        before = self._now(EPOCH)
        # Halves go on to take turns after the greatest epoch, and 0, as of a word never written, is none.
        self._epoch = self.select(before.eq(-1), 2, before + 1)
        # mutant: there is one half
        self._half = self._epoch & 1
        self._half_words = half_words

    def _at_rank(self, rank: Int | int) -> Int:
        """The place of a rank's device."""
        return self._place + (rank - self._me) * self._group.stride

    def staged(self, name: str, rank: Int | int | None = None) -> Any:
        """A staged array, mine or of the device of that rank; that one is to be stored to."""
        place = self._place if rank is None else self._at_rank(rank)
        offset = self._half * self._half_words + (DATA + self._places[name])
        return self._array(name, place, offset)

    def rank(self) -> Int:
        return self._me

    def device_arrive(self) -> None:
        # mutant: peers are told without a fence
        self._arrive(self._tell)

    def device_begun(self) -> None:
        self._arrive(self._tell_alone)

    def _arrive(self, tell: Callable[[Int, Int, Int], None]) -> None:
        """Raises my flags on all devices by `tell`, which takes a place, an offset and a value; the CTA that
        takes the last ticket advances the epoch."""
        self.block_sync()  # all threads have stored, and have read the epoch
        thread = self.thread_id()
        with self.if_(thread < self._group.count):
            tell(self._at_rank(thread), self._flag(self._me), self._epoch)
        with self.if_(thread.eq(self.num_threads - 1)):
            last = self._add(TICKET, 1).eq(self.num_ctas - 1)
            with self.if_(last):
                # mutant: tickets are not taken back
                self._set(TICKET, self.const(0))
                # mutant: the epoch stays
                self._set(EPOCH, self._epoch)

    def device_wait(self) -> None:
        lane = self.thread_id() & (WARP - 1)
        with self.if_(lane < self._group.count):
            # mutant: no device is waited for
            self._watch(self._flag(lane), self._epoch)
        self.warp_sync()

    def put(self, rank: Int | int, index: Int | int, value: Int) -> None:
        # mutant: a word is put without its epoch
        self._put(self._at_rank(rank), self._mail(index), value, self._epoch)

    def take(self, places: Sequence[tuple[Int, int]]) -> list[tuple[Int, ...]]:
        return self._take([(self._mail(index), width) for index, width in places], self._epoch)

    tagged_words = TAGGED

    def put_tagged(self, rank: Int | int, index: Int, *words: Int) -> None:
        place, at, [first, *more] = self._at_rank(rank), self._tagged(index), words
        # mutant: tagged words are put without their epoch
        epoch = self._epoch
        if more:
            self._put_two(place, at, first, more[0], epoch)
        else:
            self._put(place, at, first, epoch)

    def take_tagged(self, places: Sequence[tuple[Int, int]]) -> list[tuple[Int, ...]]:
        return self._take([(self._tagged(index), width) for index, width in places], self._epoch)

    def _tagged(self, index: Int) -> Int:
        """The offset of a tagged word. They end where a half ends, at the same places for every kernel: where
        an epoch stands has never stood anything else."""
        return (self._half + 1) * self._half_words + (DATA - 2 * TAGGED) + index * 2

    def _flag(self, rank: Int) -> Int:
        """Of my index's CTA on that rank."""
        return (self._half * MAX_RANKS + rank) * MAX_CTAS + self.cta_id() + FLAGS

    def _mail(self, index: Int | int) -> Int:
        """The offset of a word of the inbox: in the half of this epoch, two words each."""
        return (self._half * MAX_INBOX + index) * 2 + INBOX

    # -- of the backend

    @abc.abstractmethod
    def _array(self, name: str, place: Int, offset: Int) -> Any:
        """The words of a staged array in the window of a device."""

    @abc.abstractmethod
    def _now(self, offset: int) -> Int:
        """A word of my window as it is now."""

    @abc.abstractmethod
    def _set(self, offset: int, value: Int) -> None:
        """A word of my window, for the next kernel."""

    @abc.abstractmethod
    def _add(self, offset: int, value: int) -> Int:
        """Adds to a word of my window, atomic and ordered among its CTAs; what it was before."""

    @abc.abstractmethod
    def _tell(self, place: Int, offset: Int, value: Int) -> None:
        """A word of a device's window, after all that my CTA stored before."""

    @abc.abstractmethod
    def _tell_alone(self, place: Int, offset: Int, value: Int) -> None:
        """A word of a device's window; orders nothing else."""

    @abc.abstractmethod
    def _put_two(self, place: Int, offset: Int, first: Int, second: Int, epoch: Int) -> None:
        """As `_put` of neighbours, one access of 16 bytes, of which each 8 bytes are whole."""

    @abc.abstractmethod
    def _watch(self, offset: Int, value: Int) -> None:
        """Waits until a word of my window is the value, and for what was stored before it was told. A wait
        longer than `PATIENCE` in `mlir.py` is an error."""

    @abc.abstractmethod
    def _put(self, place: Int, offset: Int, value: Int, epoch: Int) -> None:
        """Two words of a device's window at once; orders nothing else."""

    @abc.abstractmethod
    def _take(self, offsets: Sequence[tuple[Int, int]], epoch: Int) -> list[tuple[Int, ...]]:
        """Waits until so many pairs of words from each offset on have come with the epoch: their values."""
