"""The language of our kernel bodies: values, primitives in four groups, kernels and programs.

A body is a Python function `body(t, r)`: `t` is the machine (`Simt`), `r` holds the kernel's refs by name.
It runs once per backend: `mosaic.py` traces it to MLIR inside one `plgpu.inline_mgpu` block,
`emulator/` executes it by NumPy over all threads in lock step. What a primitive means is said here, once.

A value is an `Int` (`ints.py`). The primitives stand in four classes: `Core` (threads, control flow,
memory, warps, barriers), `FloatBits` (float32 arithmetic on the bits of an int32: `floats.py`),
`ClusterMail` (the CTAs of one cluster) and `PeerDevices` (several devices that run one kernel together).
What is composed of them stands in `collectives.py`.

Control flow of Python happens once, while the body is traced: `for k in range(4)` unrolls, `if problem.x`
chooses what is compiled. What depends on a thread's values is written with `t.if_`, `t.for_range` and
`t.select`. Python would misread three things in silence, so each raises `BodyError`: a value as a truth
(`if x < y`, `and`, `or`, `not`), `==` and `!=` on a value, and a jump out of the body of an `if_` or a
`for_range` (`return`, `break`, `continue`), which would hold for all threads at once.

Memory model: threads of a warp run in lock step only as far as `warp_sync` says; shuffles and ballots
order no memory. `block_sync` orders shared and global accesses of one CTA; nothing orders two CTAs of one
kernel but what they tell each other: by mail within a cluster (CTA g is in cluster g // `cluster`), and where
several devices run it. A kernel sees what the kernels before it wrote, from its `grid_dependency_wait` on.
"""

import abc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from moe_align_jax._core.hopper import MAX_SHARED_BYTES
from moe_align_jax._simt.floats import FloatBits
from moe_align_jax._simt.ints import Int as Int
from moe_align_jax._simt.jumps import LEFT_LOOP, BodyError, refuse_jumps

WARP = 32
WARPGROUP = 128
# Limits of sm_90, which the lowering does not check (a launch over them aborts the process).
MAX_THREADS = 1024
MAX_CLUSTER = 16
MAX_GRID_X, MAX_GRID_YZ = 2**31 - 1, 65_535
MAIL_BARRIER_WORDS = 2  # in shared memory, that count what has come into a mailbox


class Core(abc.ABC):
    """Threads, control flow, memory, warps and barriers: what every kernel is made of.

    Indices are int32 values, or a tuple of them for a ref of more than one dimension.
    """

    num_threads: int
    num_ctas: int
    cluster: int
    _left_loop = False  # whether a `for_range` was left before its end

    # -- who and what
    @abc.abstractmethod
    def thread_id(self) -> Int:
        """Index of the thread in its CTA."""

    @abc.abstractmethod
    def cta_id(self) -> Int:
        """Index of the CTA in the grid."""

    @abc.abstractmethod
    def const(self, value: int) -> Int:
        """A static int as a value."""

    @abc.abstractmethod
    def select(self, condition: Int, a: Int | int, b: Int | int) -> Int:
        """`condition ? a : b`, both computed."""

    # -- one instruction, or one register, where the compiler would take another
    def multiply_if(self, condition: Int, a: Int, b: Int, other: Int) -> Int:
        """`condition ? a * b : other`, by the unit that multiplies."""
        return self.select(condition, a * b, other)

    def masked_or(self, a: Int, mask: int, b: Int) -> Int:
        """`a & mask | b`."""
        return (a & mask) | b

    def masked_xor(self, a: Int, mask: int, b: Int) -> Int:
        """`a & mask ^ b`."""
        return (a & mask) ^ b

    def multiply_add(self, a: Int, b: Int, c: Int) -> Int:
        """`a * b + c`, by the unit that multiplies."""
        return a * b + c

    def dot_bytes(self, a: Int, b: Int, c: Int) -> Int:
        """`c`, and the sum of the products of the four bytes of a and of b, without signs."""
        for k in range(0, 32, 8):
            c = c + ((a >> k) & 0xFF) * ((b >> k) & 0xFF)
        return c

    def low_halves(self, a: Int, b: Int) -> Int:
        """The low 16 bits of a, and above them those of b."""
        return (a & 0xFFFF) | (b << 16)

    def any_lane(self, condition: Int) -> tuple[Int, Int]:
        """Whether the condition holds in any lane of the warp; and whether in none. By whole warps."""
        votes = self.ballot(condition)
        return votes.ne(0), votes.eq(0)

    def hidden(self, value: Int) -> Int:
        """The value, computed here, of which the compiler knows nothing."""
        return value

    def held(self, ref: Any, zero: Int) -> Any:
        """The same output, its address in a register from here on. `zero`: 0, of which the compiler does not
        know it."""
        del zero
        return ref

    # -- control flow
    def if_(self, condition: Int) -> AbstractContextManager[None]:
        """`with t.if_(c):` runs the body where c holds.

        Raises:
            BodyError: a `return`, `break` or `continue` leads out of the body.
        """
        self.check_loops()
        refuse_jumps("t.if_", sys._getframe(1))
        return self._if(condition)

    def for_range(self, start: Int | int, stop: Int | int, step: Int | int = 1) -> Iterator[Int]:
        """`for i in t.for_range(a, b, s):` a run-time loop; the body is traced once. start < 2**31 - step.

        Raises:
            BodyError: a `return` or `break` leads out of the body. Where the loop's text does not show it (it
                runs inside another generator), the next `if_` or `for_range` raises, or the kernel's end.
        """
        self.check_loops()
        refuse_jumps("t.for_range", sys._getframe(1))
        return self._watched(self._for_range(start, stop, step))

    def _watched(self, loop: Iterator[Int]) -> Iterator[Int]:
        """The iterations of a loop; notes it when the body leaves the loop before its end."""
        ended = False
        try:
            yield from loop
            ended = True
        finally:
            # An error that passes through the loop ends it in the same way, but then nothing comes after it.
            self._left_loop |= not ended

    def check_loops(self) -> None:
        """At the end of a body, and before each `if_` and `for_range`: no loop was left before its end.

        Raises:
            BodyError: one was.
        """
        if self._left_loop:
            raise BodyError(LEFT_LOOP)

    @abc.abstractmethod
    def _if(self, condition: Int) -> AbstractContextManager[None]:
        """`if_` of the backend."""

    @abc.abstractmethod
    def _for_range(self, start: Int | int, stop: Int | int, step: Int | int) -> Iterator[Int]:
        """`for_range` of the backend."""

    @abc.abstractmethod
    def values_if(
        self, condition: Int, compute: Callable[[], Sequence[Int]], others: Sequence[Int | int]
    ) -> list[Int]:
        """For each value `condition ? computed : other`; compute() runs only where the condition holds."""

    @abc.abstractmethod
    def values_while(
        self,
        first: Sequence[Int],
        goes_on: Callable[[Sequence[Int]], Int],
        step: Callable[[Sequence[Int]], Sequence[Int]],
    ) -> list[Int]:
        """The values that `step` makes of the `first` ones, again and again while `goes_on` of them holds.

        `goes_on` depends on the values alone. Each function is traced once.
        """

    # -- memory
    @abc.abstractmethod
    def load(self, ref: Any, index: Any) -> Int:
        """`ref[index]`."""

    @abc.abstractmethod
    def store(self, ref: Any, index: Any, value: Int | int) -> None:
        """`ref[index] = value`."""

    @abc.abstractmethod
    def load4(self, ref: Any, index: Int | int) -> tuple[Int, ...]:
        """`ref[index:index+4]` in one 16-byte load; index is a multiple of 4."""

    @abc.abstractmethod
    def load_narrow(self, ref: Any, index: Int | int, width: int) -> Int:
        """The `index`-th number of `width` bytes, 1 or 2, in an input's memory; the bits above it are 0. It
        reads no byte beside it, so that an input may end within a word (`Kernel.tails`)."""

    def load_byte(self, ref: Any, index: Int) -> Int:
        """The `index`-th byte of an array of words in shared memory, without a sign."""
        return (self.load(ref, index >> 2) >> ((index & 3) << 3)) & 0xFF

    def store_byte(self, ref: Any, index: Int, value: Int) -> None:
        """Stores the low byte of a value as the `index`-th byte of an array of words in shared memory, where
        a 0 was. The other bytes of the word stay as they are."""
        self.atomic_add(ref, index >> 2, (value & 0xFF) << ((index & 3) << 3))

    @abc.abstractmethod
    def store4(self, ref: Any, index: Int | int, value: Int | int | tuple[Int, ...]) -> None:
        """`ref[index:index+4] = value` in one 16-byte store, of four words or of one four times; index is a
        multiple of 4."""

    @abc.abstractmethod
    def store2(self, ref: Any, index: Int | int, value: tuple[Int, ...]) -> None:
        """`ref[index:index+2] = value` in one 8-byte store; index is a multiple of 2."""

    @abc.abstractmethod
    def launch_value(self, ref: Any) -> Int:
        """The one word of an input that the launch passes by value (>= 0)."""

    @abc.abstractmethod
    def atomic_add(self, ref: Any, index: Int | int, value: Int | int) -> None:
        """`ref[index] += value`, atomic within the CTA (shared memory), relaxed."""

    # -- warp
    @abc.abstractmethod
    def shfl(self, value: Int, lane: Int | int) -> Int:
        """The value of another lane of the warp."""

    @abc.abstractmethod
    def shfl_up(self, value: Int, delta: int) -> Int:
        """The value of lane - delta; the thread's own where that is negative."""

    @abc.abstractmethod
    def ballot(self, condition: Int) -> Int:
        """Mask of the lanes where the condition holds."""

    @abc.abstractmethod
    def same_bit(self, value: Int, bit: int) -> Int:
        """Mask of the lanes whose value has in that bit what mine has."""

    @abc.abstractmethod
    def warp_sum(self, value: Int) -> Int:
        """The sum over the warp, to each lane."""

    @abc.abstractmethod
    def warp_max(self, value: Int) -> Int:
        """The greatest value of the warp, signed, to each lane."""

    @abc.abstractmethod
    def warp_min(self, value: Int) -> Int:
        """The least value of the warp, signed, to each lane."""

    # -- bits
    @abc.abstractmethod
    def popc(self, value: Int) -> Int:
        """Number of bits set."""

    @abc.abstractmethod
    def highest_bit(self, value: Int) -> Int:
        """Index of the highest bit set, -1 for none."""

    # -- order
    @abc.abstractmethod
    def warp_sync(self) -> None:
        """Orders memory among the threads of the warp, all of which must arrive."""

    @abc.abstractmethod
    def tail_sync(self) -> None:
        """As `block_sync`, among the last threads of the CTA, as many as `Kernel.tail_threads`."""

    @abc.abstractmethod
    def block_sync(self) -> None:
        """Orders memory among the threads of the CTA, all of which must arrive."""

    @abc.abstractmethod
    def grid_dependency_wait(self) -> None:
        """Waits until the kernels before this one have finished. Every thread calls it before its first
        access to what they wrote, or to what they may still read; does nothing without PDL."""

    @abc.abstractmethod
    def launch_dependents(self) -> None:
        """Lets the next kernel start (its `grid_dependency_wait` still waits); nothing without PDL."""


class ClusterMail(abc.ABC):
    """What the CTAs of one cluster send to each other."""

    @abc.abstractmethod
    def open_mailbox(self) -> None:
        """By every thread, once, ahead of `cluster_ready`: in the body of a kernel that `opens_mailbox`, and
        in no other."""

    @abc.abstractmethod
    def cluster_ready(self, *, has_first: bool = True) -> None:
        """By every warp, once, before its first `post` and ahead of `mail`: waits until all CTAs of the
        cluster run. `has_first`: whether the first thread may be among those that come here, which says then
        how many words its CTA waits for."""

    @abc.abstractmethod
    def post(self, cta: Int | int, index: Int | int, *values: Int | int) -> None:
        """Puts a word, or 4 from a multiple of 4 on, into the mailbox of a CTA of my cluster, by its index in
        the grid; mine is one of them. Post each word at most once per launch; a post orders no other
        memory."""

    def mail_place(self, cta: Int | int, index: Int | int) -> Any:
        """Where `post_at` puts its words; computed here, and not where they are posted."""
        return cta, index

    def post_at(self, place: Any, *values: Int | int) -> None:
        """As `post`, to a place that `mail_place` gave."""
        self.post(*place, *values)

    @abc.abstractmethod
    def mail(self) -> Any:
        """My mailbox, to be loaded from, once it is full. By whole warps; every CTA must come here."""


class PeerDevices(abc.ABC):
    """What several devices that run one kernel together do to each other."""

    @abc.abstractmethod
    def rank(self) -> Int:
        """Index of my device among the kernel's `devices`."""

    @abc.abstractmethod
    def remote(self, ref: Any, rank: Int | int) -> Any:
        """The same staged array (or output) of the launch on another device, of its rank; to be stored to."""

    @abc.abstractmethod
    def device_arrive(self) -> None:
        """Once, by all threads: tells my peers, the CTAs of my index on every device, that my CTA stores no
        more there. A `block_sync`, too."""

    @abc.abstractmethod
    def device_wait(self) -> None:
        """By whole warps: waits until all my peers have come to their `device_arrive`. What they wrote here
        the warp may read from then on, its CTA after a `block_sync`, and later kernels after this one."""

    def device_begun(self) -> None:
        """In place of `device_arrive`, where all that peers wait for is put, tagged or into the inbox. It
        orders nothing: a peer's `device_wait` then says only that this kernel has begun here."""
        raise NotImplementedError

    @abc.abstractmethod
    def put(self, rank: Int | int, index: Int | int, value: Int) -> None:
        """Puts a word, not 0, into the inbox of the device of that rank; each word of an inbox at most once.
        The word is visible to `take` without a fence, and orders no other store."""

    @abc.abstractmethod
    def take(self, places: Sequence[tuple[Int, int]]) -> list[tuple[Int, ...]]:
        """Waits until the words of my inbox at each (index, width) have been put, and returns them. A width
        is 1, or 4 at a multiple of 4. All CTAs must be resident; every word that is put must be taken."""

    # How many tagged words a kernel has on each device: words beside which stands for which launch they are.
    # They are like an inbox, but larger, may be 0, and need not be taken. Not every machine has them.
    tagged_words = 0

    def put_tagged(self, rank: Int | int, index: Int, *words: Int) -> None:
        """Puts one word, or at an even index two by one access, among the tagged words of that rank's
        device; each at most once. They are visible to `take_tagged` without a fence, and order nothing."""
        raise NotImplementedError

    def take_tagged(self, places: Sequence[tuple[Int, int]]) -> list[tuple[Int, ...]]:
        """Waits until the words from each (index, width) on have been put, and returns them. A width is 1, or
        2 or 4 at a multiple of 2. All CTAs must be resident."""
        raise NotImplementedError


class Simt(Core, FloatBits, ClusterMail, PeerDevices):
    """The machine that a body runs on: one CTA of `num_threads` threads, one of `num_ctas` in the grid."""


type Body = Callable[[Simt, SimpleNamespace], None]
type Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Devices:
    """The devices that run a kernel together: some of a mesh, whose devices are counted in row-major order.

    Attributes:
        count: how many; my rank is `device // stride % count`.
        stride: how far apart two neighbours are.
    """

    count: int
    stride: int = 1


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One launch. Every ref is int32; an output is written by this kernel alone.

    Attributes:
        name: what profilers show, `<name>_mosaic_gpu_kernel`.
        body: the body.
        inputs: name and shape of each buffer that it reads.
        outputs: name and shape of each buffer that it writes (all of it).
        shared: words of each shared-memory array. Uninitialised.
        num_warpgroups: warpgroups per CTA.
        num_ctas: CTAs in the grid.
        cluster: CTAs per cluster.
        mailbox: words that each CTA gets from the CTAs of its cluster.
        opens_mailbox: the body opens it, behind its first loads. Otherwise that is done ahead of the body.
        arrays: (shape, dtype) of buffers that are not int32 arrays outside; the body sees their words.
        partial: outputs that need not be written in full.
        devices: the devices that run the kernel together; each may write to the staged arrays of the others,
            and, where XLA tells their addresses, to the outputs.
        inbox: words that the devices may `put` here, and the body takes.
        staged: name and shape of each buffer that the devices write here and only this launch reads. They lie
            in a window (`window.py`); or they are outputs that the caller does not see.
        starts_at_once: the body does without Mosaic's barriers of the CTA ahead of it. Only what was timed
            with it says so.
        tail_threads: at the end of a CTA, whole warps, that have a barrier of their own (`tail_sync`).
        tails: bytes of an input's last word that are there, of inputs that end within a word. The emulator
            refuses whole loads of such a word.
    """

    name: str
    body: Body
    inputs: Shapes
    outputs: Shapes
    shared: Mapping[str, int] = field(default_factory=dict)
    num_warpgroups: int
    num_ctas: int = 1
    cluster: int = 1
    mailbox: int = 0
    opens_mailbox: bool = False
    arrays: Mapping[str, tuple[tuple[int, ...], Any]] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()
    devices: Devices | None = None
    inbox: int = 0
    staged: Shapes = field(default_factory=dict)
    starts_at_once: bool = False
    tail_threads: int = 0
    tails: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_threads(self) -> int:
        """Threads of a CTA."""
        return self.num_warpgroups * WARPGROUP

    @property
    def shared_arrays(self) -> dict[str, int]:
        """Words of each array in shared memory, with the mailbox and what counts its words."""
        mail = {"mailbox": self.mailbox, "mail_barrier": MAIL_BARRIER_WORDS} if self.mailbox else {}
        return {**self.shared, **mail}

    @property
    def shared_words(self) -> int:
        """Each array starts at a multiple of 16 bytes."""
        return sum(-(-words // 4) * 4 for words in self.shared_arrays.values())


@dataclass(frozen=True, kw_only=True)
class Program:
    """Kernels that run one after the other over named buffers.

    Attributes:
        inputs: name and shape of each operand, in order.
        kernels: the launches, in order.
        results: names of the buffers that are returned, in order.
    """

    inputs: Shapes
    kernels: tuple[Kernel, ...]
    results: tuple[str, ...]


class LaunchError(ValueError):
    """A kernel asks for more than the chip has."""


def check_launch(kernel: Kernel, batch: int = 1) -> None:
    """Refuses what the chip refuses. `batch` goes along grid.y."""
    for what, value, limit in (
        ("threads per CTA", kernel.num_threads, MAX_THREADS),
        ("bytes of shared memory", kernel.shared_words * 4, MAX_SHARED_BYTES),
        ("CTAs per cluster", kernel.cluster, MAX_CLUSTER),
        ("CTAs along grid.x", kernel.num_ctas, MAX_GRID_X),
        ("CTAs along grid.y", batch, MAX_GRID_YZ),
    ):
        if not 1 <= value <= limit and not (value == 0 and what.startswith("bytes")):
            raise LaunchError(f"{kernel.name}: {what} must be within 1..{limit}; got {value}.")
    if kernel.tail_threads % WARP or not 0 <= kernel.tail_threads <= kernel.num_threads:
        raise LaunchError(
            f"{kernel.name}: tail_threads must be a multiple of {WARP}, up to the {kernel.num_threads} of "
            f"a CTA; got {kernel.tail_threads}."
        )
    if kernel.num_ctas % kernel.cluster:
        raise LaunchError(
            f"{kernel.name}: num_ctas must be a multiple of the cluster; "
            f"got {kernel.num_ctas} CTAs in clusters of {kernel.cluster}."
        )
