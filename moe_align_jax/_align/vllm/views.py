"""What lets a kernel body of the alignment run as a part of another kernel: refs that stand for others.

A body asks the machine for its CTA, and loads from and stores to refs by name. `PartOfGrid` answers for the
machine: the body sees a grid of its own, and refs that are computed, or lie further on in a larger buffer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_align_jax._simt.language import Int, Simt


@dataclass(frozen=True)
class Computed:
    """A ref that is no memory: what a load gives is computed of the index.

    Attributes:
        word: `word(index)`, for a ref that is loaded from.
        put: `put(index, value)`, for one that is stored to.
    """

    word: Callable[[Any], Int] | None = None
    put: Callable[[Any, Any], None] | None = None


@dataclass(frozen=True)
class Further:
    """A part of a larger ref, from the word `start` on.

    Attributes:
        ref: of one dimension.
        start: a value, or a number.
        whole: whether `start` is a multiple of 4, so that four words can be stored at once.
        where: stores are made where this holds; None for everywhere.
    """

    ref: Any
    start: Any
    whole: bool
    where: Int | None = None


class PartOfGrid:
    """The machine, as `num_ctas` neighbouring CTAs of its grid see it; what is not said here is the grid's.

    Args:
        t: the machine.
        num_ctas: CTAs of the part, a multiple of the cluster.
        number: which part my CTA belongs to, 0 where there is one.
        waited: whether the kernel that runs the body has waited for the kernels before it.
    """

    def __init__(self, t: Simt, num_ctas: int, number: Int | int = 0, *, waited: bool):
        self._t, self.num_ctas, self._waited = t, num_ctas, waited
        self._first = number * num_ctas

    def __getattr__(self, name: str) -> Any:
        return getattr(self._t, name)

    def cta_id(self) -> Int:
        """Index of the CTA within its part."""
        return self._t.cta_id() - self._first

    def post(self, cta: Int | int, index: Int | int, *values: Int | int) -> None:
        """Sends values to the mailbox of a CTA of the same part, counted within it."""
        self._t.post(cta + self._first, index, *values)

    def grid_dependency_wait(self) -> None:
        """Waits for the kernels before this one, unless the kernel around the body has."""
        if not self._waited:
            self._t.grid_dependency_wait()

    def launch_dependents(self) -> None:
        """Lets the next kernel start, unless the kernel around the body has."""
        if not self._waited:
            self._t.launch_dependents()

    def launch_value(self, ref: Any) -> Int:
        """A value that the launch gives, or its stand-in's first word."""
        return self.load(ref, 0) if isinstance(ref, Computed) else self._t.launch_value(ref)

    def load(self, ref: Any, index: Any) -> Int:
        """The word at an index of a ref; where the ref stands for another, computed or read there."""
        if isinstance(ref, Computed):
            assert ref.word is not None
            return ref.word(index)
        if isinstance(ref, Further):
            return self._t.load(ref.ref, ref.start + index)
        return self._t.load(ref, index)

    def load4(self, ref: Any, index: Int | int) -> tuple[Int, ...]:
        """Four neighbouring words: in one load, unless a part of a ref does not start at a multiple of 4."""
        if not isinstance(ref, Further):
            return self._t.load4(ref, index)
        if ref.whole:
            return self._t.load4(ref.ref, ref.start + index)
        return tuple(self._t.load(ref.ref, ref.start + index + k) for k in range(4))

    def store(self, ref: Any, index: Any, value: Int | int) -> None:
        """Stores a word at an index of a ref, or gives it to the function that stands for the ref."""
        if isinstance(ref, Computed):
            assert ref.put is not None
            ref.put(index, value)
        elif not isinstance(ref, Further):
            self._t.store(ref, index, value)
        elif ref.where is None:
            self._t.store(ref.ref, ref.start + index, value)
        else:
            with self._t.if_(ref.where):
                self._t.store(ref.ref, ref.start + index, value)

    def store4(self, ref: Any, index: Int | int, value: Any) -> None:
        """Stores four words, or one word four times, at an index that is a multiple of 4."""
        if not isinstance(ref, Further):
            self._t.store4(ref, index, value)
        elif ref.whole:
            self._t.store4(ref.ref, ref.start + index, value)
        else:
            for k in range(4):
                self.store(ref, index + k, value[k] if isinstance(value, tuple) else value)
