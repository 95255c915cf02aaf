"""Reciprocals and quotients of float32 arrays in a Pallas kernel, rounded to nearest.

The GPU's own division is good to two units in the last place, which gives a neighbouring code now and then.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import math as scalar_math

_I32, _F32 = jnp.int32, jnp.float32
_MANTISSA_BITS, _BIAS = 23, 127


def nearest_reciprocal(bits: jax.Array, near: jax.Array) -> jax.Array:
    """1 / x, rounded to nearest, of the bits of a positive float32 x, and of a float32 that is at most two
    units in the last place off. Both, and the result, are normal numbers.

    With significands m of x and q of 1 / x as integers, 2**47 - q m is what the quotient leaves. It has few
    bits, and is found modulo 2**32, of which 2**47 is 0. It is never half of m.
    """
    one = 1 << _MANTISSA_BITS
    m = (bits & (one - 1)) | one
    found = lax.bitcast_convert_type(near, _I32)
    below = 2 * _BIAS - 1 - (bits >> _MANTISSA_BITS)  # the exponent, but where x is a power of two
    # `near` may be on the other side of a power of two.
    q = (((found & (one - 1)) | one) << ((found >> _MANTISSA_BITS) - below + 1)) >> 1
    half = m >> 1
    for _ in range(4):  # two units above a power of two are four below it
        rest = -(q * m)
        q = q + (rest > half).astype(_I32) - (rest < -half).astype(_I32)
    return lax.bitcast_convert_type((below << _MANTISSA_BITS) + (q - one), _F32)


def nearest_quotient(x: jax.Array, y: jax.Array, inverse: jax.Array, layout: Any) -> jax.Array:
    """x / y, rounded to nearest, of the nearest 1 / y; a zero keeps its sign.

    What x leaves of y times the product is exact in a fused multiplication (Markstein's theorem). Not for
    results below normal numbers. layout: of the three arrays; None in Pallas' interpreter.
    """
    if layout is None:
        # XLA would make a division by a broadcast array a product with its reciprocal.
        return x / jnp.where(x == x, y, 1.0)

    like: Any = plgpu.ShapeDtypeStruct(x.shape, jnp.dtype(_F32), layout=layout)
    emits: Any = plgpu.inline_mgpu(arg_types=(layout,) * 3, return_type=like)

    @emits
    def emit(_, x, y, inverse):
        registers = np.empty_like(x.registers)
        for at in np.ndindex(registers.shape):
            value, divisor, factor = (a.registers[at] for a in (x, y, inverse))
            near = arith.mulf(value, factor)
            rest = scalar_math.fma(near, divisor, arith.negf(value))
            registers[at] = scalar_math.fma(arith.negf(factor), rest, near)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return emit(x, y, inverse)
