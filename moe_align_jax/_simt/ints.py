"""The values of the kernel language: an int32 or a boolean for each thread, and what its operators mean."""

import abc
from typing import NoReturn

from moe_align_jax._simt.jumps import BodyError


def _refuse(what: str, remedy: str) -> NoReturn:
    """Raises `BodyError`: Python would take one answer for all threads."""
    raise BodyError(f"kernel body: {what} must not be used on a value of the threads. {remedy}")


class Int(abc.ABC):
    """An int32 (or, from a comparison, a boolean) value, one per thread. Arithmetic wraps.

    ===========  ===============================================  ==================================
    sign         operators                                        as in C
    ===========  ===============================================  ==================================
    either       `+` `-` `*` `&` `|` `^` `<<` `.eq(y)` `.ne(y)`   the same bits for both
    signed       `<` `<=` `>` `>=`                                `(int32_t)x < (int32_t)y`
    unsigned     `//` `%` `>>` `.below(y)`                        `(uint32_t)x / (uint32_t)y`, ...
    ===========  ===============================================  ==================================

    `&`, `|` and `^` also combine booleans. `==`, `!=`, `bool()` and `hash()` raise `BodyError`.
    """

    @abc.abstractmethod
    def _binary(self, name: str, other: "Int | int", reverse: bool = False) -> "Int":
        """`self name other`, or with `reverse` `other name self`, for each thread.

        Args:
            name: "add", "sub", "mul", "udiv", "urem", "and", "or", "xor", "shl", "shr"; of comparisons "eq",
                "ne", "slt", "sle", "sgt", "sge", "ult".
            other: a value, or a static int.
            reverse: whether `other` is the left operand.
        """

    # -- the same for signed and unsigned

    def __add__(self, other):
        return self._binary("add", other)

    __radd__ = __add__

    def __sub__(self, other):
        return self._binary("sub", other)

    def __rsub__(self, other):
        return self._binary("sub", other, reverse=True)

    def __mul__(self, other):
        return self._binary("mul", other)

    __rmul__ = __mul__

    def __and__(self, other):
        return self._binary("and", other)

    def __or__(self, other):
        return self._binary("or", other)

    def __xor__(self, other):
        return self._binary("xor", other)

    def __lshift__(self, other):
        return self._binary("shl", other)

    def eq(self, other):
        """Whether both are equal, for each thread."""
        return self._binary("eq", other)

    def ne(self, other):
        """Whether both differ, for each thread."""
        return self._binary("ne", other)

    # -- signed

    def __lt__(self, other):
        return self._binary("slt", other)

    def __le__(self, other):
        return self._binary("sle", other)

    def __gt__(self, other):
        return self._binary("sgt", other)

    def __ge__(self, other):
        return self._binary("sge", other)

    # -- unsigned

    def __floordiv__(self, other):
        return self._binary("udiv", other)

    def __mod__(self, other):
        return self._binary("urem", other)

    def __rshift__(self, other):
        return self._binary("shr", other)

    def below(self, other):
        """Unsigned `<`: `x.below(n)` is `0 <= x < n` in one comparison."""
        return self._binary("ult", other)

    # -- what Python would answer for all threads at once

    def __bool__(self) -> NoReturn:
        _refuse(
            "a truth value (`if`, `and`, `or`, `not`, `while`, `a < b < c`, `min`)",
            "Each thread has its own: write `with t.if_(c):` or `t.select(c, a, b)`, and combine conditions "
            "with `&` and `|`.",
        )

    def __eq__(self, other: object) -> NoReturn:
        _refuse("`==`", "Write `x.eq(y)`.")

    def __ne__(self, other: object) -> NoReturn:
        _refuse("`!=`", "Write `x.ne(y)`.")

    def __hash__(self) -> NoReturn:
        _refuse(
            "a hash (a key of a dict, a member of a set)",
            "Each thread has its own: compare with `x.eq(y)`, and keep values in a list.",
        )
