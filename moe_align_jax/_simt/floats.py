"""The float32 primitives of the kernel language."""

import abc

from moe_align_jax._simt.ints import Int


class FloatBits(abc.ABC):
    """float32 arithmetic. A float32 is an `Int` that holds its bits: `+` would add the bits, `fadd` adds."""

    @abc.abstractmethod
    def fma(self, a: Int, b: Int, c: Int | int) -> Int:
        """`a * b + c`, rounded once."""

    @abc.abstractmethod
    def fma_saturated(self, a: Int, b: Int, c: Int) -> Int:
        """As `fma`, but 0 of what is less or a NaN, and 1 of what is greater than 1."""

    @abc.abstractmethod
    def fadd(self, a: Int, b: Int) -> Int:
        """`a + b`."""

    @abc.abstractmethod
    def fmul(self, a: Int, b: Int | int) -> Int:
        """`a * b`."""

    @abc.abstractmethod
    def fdiv(self, a: Int | int, b: Int) -> Int:
        """`a / b`, rounded to nearest."""

    @abc.abstractmethod
    def fmax(self, a: Int, b: Int) -> Int:
        """The greater of the two; where one is a NaN, the other. Of 0 and -0 it may be either."""

    @abc.abstractmethod
    def fmin(self, a: Int, b: Int) -> Int:
        """The lesser of the two, otherwise as `fmax`."""

    @abc.abstractmethod
    def exp2(self, a: Int) -> Int:
        """`2**a`, with a relative error of at most 2**-22; a subnormal result is 0."""

    @abc.abstractmethod
    def reciprocal(self, a: Int) -> Int:
        """`1 / a`, with a relative error of at most 2**-23; a subnormal operand or result counts as 0."""

    @abc.abstractmethod
    def fsqrt(self, a: Int) -> Int:
        """The square root, with a relative error of at most 2**-22; a subnormal operand counts as 0."""

    @abc.abstractmethod
    def from_float16(self, word: Int) -> Int:
        """The float16 in the low half of a word, as float32."""

    @abc.abstractmethod
    def bfloat16_pair(self, low: Int, high: Int) -> Int:
        """Two float32, rounded to bfloat16, in one word."""

    @abc.abstractmethod
    def e4m3_pair(self, low: Int, high: Int) -> Int:
        """Two float32, rounded to e4m3 and no greater than 448, in the low half of a word."""
