"""float32 functions in the kernel language: order, exp, sigmoid, softplus, sums over a warp.

Values are the bits of a float32 in an int32, as everywhere in the language.
"""

import struct

from moe_align_jax._simt.language import WARP, Int, Simt

SIGN = -(2**31)


def bits(x: float) -> int:
    """Those of a number rounded to float32."""
    return struct.unpack("<i", struct.pack("<f", x))[0]


ONE = bits(1.0)
_LOG2_E = 1.4426950408889634
_HIGH = bits(_LOG2_E)
_LOW = bits(_LOG2_E - struct.unpack("<f", struct.pack("<f", _LOG2_E))[0])
_LN_2 = bits(0.6931471805599453)
_LEAST_EXPONENT = bits(-200.0)  # exp of it is 0
# 2 atanh(s) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...), to 1e-8 for s <= 1/3.
_ATANH = [bits(1 / (2 * k + 1)) for k in range(8)]


def order(x: Int) -> Int:
    """An int32 that is ordered as the float32 is (-0 below +0); and back again."""
    return x ^ ((0 - (x >> 31)) & ~SIGN)


def subtract(t: Simt, a: Int, b: Int) -> Int:
    """`a - b`."""
    return t.fadd(a, b ^ SIGN)


def fast_exp(t: Simt, x: Int) -> Int:
    """To a relative 2**-22 + |x| 2**-24."""
    return t.exp2(t.fmul(x, _HIGH))


def exp(t: Simt, x: Int) -> Int:
    """To a relative 2**-21, for any x up to 0 or little above it."""
    x = t.fmax(x, t.const(_LEAST_EXPONENT))
    high = t.fmul(x, _HIGH)
    low = t.fma(x, t.const(_LOW), t.fma(x, t.const(_HIGH), high ^ SIGN))
    power = t.exp2(high)
    return t.fma(power, t.fmul(low, _LN_2), power)


def sigmoid(t: Simt, x: Int) -> Int:
    """To a relative 2**-20, also where it is small."""
    power = exp(t, x | SIGN)
    inverse = t.reciprocal(t.fadd(power, t.const(ONE)))
    return t.select(x < 0, t.fmul(power, inverse), inverse)


def softplus(t: Simt, x: Int) -> Int:
    """`log(1 + exp(x))`, to a relative 2**-20, also where it is small."""
    power = exp(t, x | SIGN)
    s = t.fmul(power, t.reciprocal(t.fadd(power, t.const(bits(2.0)))))
    square = t.fmul(s, s)
    series = t.const(_ATANH[-1])
    for coefficient in _ATANH[-2::-1]:
        series = t.fma(series, square, t.const(coefficient))
    return t.fma(t.fadd(s, s), series, t.fmax(x, t.const(0)))


def score(t: Simt, scoring: str, x: Int) -> Int:
    """ "sigmoid" or "sqrtsoftplus" of a logit; "none": the logit."""
    if scoring == "none":
        return x
    return sigmoid(t, x) if scoring == "sigmoid" else t.fsqrt(softplus(t, x))


def sum_over_warp(t: Simt, x: Int, lane: Int, width: int = WARP) -> Int:
    """The sum over each `width` neighbouring lanes (a power of two), to each of them: the same bits."""
    distance = 1
    while distance < width:
        x = t.fadd(x, t.shfl(x, lane ^ distance))
        distance *= 2
    return x
