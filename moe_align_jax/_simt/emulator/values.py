"""Values of the emulator: an array over the grid's threads, or of size 1 where all agree."""

import functools
import operator
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from moe_align_jax._simt.emulator.faults import EscapedValue, Undefined
from moe_align_jax._simt.emulator.races import Clock, Threads
from moe_align_jax._simt.language import Int

# What a lane holds where it was not active: a value that stands out.
NOTHING = 0x5EED5EED


def _unsigned(operation: Callable) -> Callable:
    """The operation on int32 arrays whose bits are unsigned."""
    return lambda a, b: operation(a.view(np.uint32), b.view(np.uint32)).view(np.int32)


_ARITHMETIC = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "udiv": _unsigned(np.floor_divide),
    "urem": _unsigned(np.remainder),
    "shl": np.left_shift,
    "shr": _unsigned(np.right_shift),
    "slt": np.less,
    "sle": np.less_equal,
    "sgt": np.greater,
    "sge": np.greater_equal,
    "ult": lambda a, b: a.view(np.uint32) < b.view(np.uint32),
}
_LOGIC = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "eq": np.equal,
    "ne": np.not_equal,
}


@functools.lru_cache(4096)
def constant(value: int) -> np.ndarray:
    """A static int as an array of one int32; unsigned ones of 32 bits keep their bits."""
    if not -(2**31) <= value < 2**32:
        raise Undefined(f"{value} is no 32-bit integer.")
    array = np.array([value & 0xFFFFFFFF], np.uint32).view(np.int32)
    array.flags.writeable = False
    return array


class Scope:
    """The active lanes of a stretch of the body (sorted; None = all); `alive` while it runs."""

    __slots__ = ("lanes", "count", "alive", "_threads", "_tick")

    def __init__(self, lanes: np.ndarray | None, total: int):
        self.lanes = None if lanes is None or lanes.size == total else lanes
        self.count = total if self.lanes is None else self.lanes.size
        self.alive = True
        self._tick = 0

    def active(self, array: np.ndarray) -> np.ndarray:
        """The values of the lanes that are active, of an array with one for each lane or for all."""
        if self.lanes is None or array.size == 1:
            return array
        return array.take(self.lanes)

    def threads(self, clock: Clock) -> Threads:
        """The threads that are active, with their marks of now."""
        if self._tick != clock.tick:
            self._tick = clock.tick
            everyone = clock.threads()
            self._threads = everyone if self.lanes is None else everyone.at(self.lanes)
        return self._threads


class ScopedMachine(Protocol):
    """What a value asks of the machine that it was computed on.

    Attributes:
        name: of the kernel, for messages.
        scope: the lanes that are active now.
    """

    name: str
    scope: Scope


class Value(Int):
    """One int32 or bool per thread."""

    def __init__(self, array: np.ndarray, machine: ScopedMachine):
        self.array, self.machine, self.scope = array, machine, machine.scope

    def _binary(self, name: str, other: Int | int, reverse: bool = False) -> "Value":
        machine = self.machine
        a, b = array_of(self), array_of(other)
        if reverse:
            a, b = b, a
        if operation := _LOGIC.get(name):
            if a.dtype != b.dtype:
                raise Undefined(f"{machine.name}: `{name}` of {a.dtype} and {b.dtype}.")
            return Value(operation(a, b), machine)
        if a.dtype == bool or b.dtype == bool:
            raise Undefined(f"{machine.name}: `{name}` takes int32 values; got a boolean.")
        if name in ("udiv", "urem") and not machine.scope.active(b).all():
            raise Undefined(f"{machine.name}: division by zero.")
        if name in ("shl", "shr") and (machine.scope.active(b).view(np.uint32) >= 32).any():
            raise Undefined(f"{machine.name}: shift by 32 or more.")
        return Value(_ARITHMETIC[name](a, b), machine)


def array_of(x: Any) -> np.ndarray:
    """The array of a value or of a static int."""
    if not isinstance(x, Value):
        return constant(operator.index(x))
    if not x.scope.alive:
        raise EscapedValue(
            f"{x.machine.name}: a value is used outside the if_, value_if or loop iteration that "
            "computed it (a body is traced once: nothing is carried out of it)."
        )
    return x.array
