"""The fp8 payload in our kernels: bfloat16 rows to e4m3 codes and scales, as `message.quantize` does."""

import numpy as np

from moe_align_jax._core.fp8 import E4M3_MAX
from moe_align_jax._simt.language import Int, Simt

# DeepEP's and DeepGEMM's floor of a group's greatest value, the greatest e4m3, and its inverse: the bits of
# float32.
_FLOOR, _MOST, _INVERSE = (
    np.array([1e-4, E4M3_MAX, 1 / E4M3_MAX], np.float32).view(np.int32).tolist()
)
_LOW, _MAGNITUDE = 0xFFFF, 0x7FFF
VALUES = 8  # bfloat16 of a 16-byte word


def codes(t: Simt, words: tuple[Int, ...], lane: Int) -> tuple[tuple[Int, ...], Int]:
    """e4m3 codes of 8 bfloat16, in two words, and the scale of their group, which 16 lanes hold together.

    Magnitudes of bfloat16 order as their bits do. NaN is above all, so its group becomes NaN.
    """
    halves = [half for word in words for half in (word & _LOW, word >> 16)]
    most = halves[0] & _MAGNITUDE
    for half in halves[1:]:
        most = _greater(t, most, half & _MAGNITUDE)
    for distance in (8, 4, 2, 1):
        most = _greater(t, most, t.shfl(most, lane ^ distance))
    most = _greater(t, most << 16, t.const(_FLOOR))
    factor = t.fdiv(t.const(_MOST), most)
    values = [t.fmul(half << 16, factor) for half in halves]
    packed = [
        t.e4m3_pair(values[i], values[i + 1]) | (t.e4m3_pair(values[i + 2], values[i + 3]) << 16)
        for i in (0, 4)
    ]
    return tuple(packed), t.fmul(most, t.const(_INVERSE))


def _greater(t: Simt, a: Int, b: Int) -> Int:
    """The greater of two signed values."""
    return t.select(a < b, b, a)
