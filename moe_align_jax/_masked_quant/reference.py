"""silu_and_mul_masked_quant in plain jax.numpy: the specification, and implementation="xla".

Whole arrays, whatever `masked_m` says; rows at or past it are zero, and so are their scales.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._core.fp8 import E4M3_MAX, GROUP, GROUPS_PER_WORD
from moe_align_jax._masked_quant.problem import (
    COLUMN_MULTIPLE,
    MaskedQuantProblem,
    bits_over_448,
)

_EXPONENT_BITS, _MANTISSA = 23, (1 << 23) - 1


def activation(problem: MaskedQuantProblem, gate: jax.Array, up: jax.Array) -> jax.Array:
    """float32 values to quantise, of gate and up as x holds them."""
    dtype = gate.dtype
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    if problem.swiglu_alpha is not None:
        if problem.swiglu_limit is not None:
            limit = jnp.float32(problem.swiglu_limit)
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        inner = gate * jnp.float32(problem.swiglu_alpha)
        return gate / (1.0 + jnp.exp(-inner)) * (up + 1.0)
    if problem.swiglu_limit is not None:
        limit = jnp.asarray(problem.swiglu_limit, dtype).astype(jnp.float32)
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    silu = gate / (1.0 + jnp.exp(-gate))
    # Each of the two is rounded to x's dtype; in float32 the product of two rounded factors is exact.
    product = round_to(silu, dtype) * up
    return round_to(product, dtype)


def round_to(values: jax.Array, dtype) -> jax.Array:
    """float32 values rounded to what `dtype` can hold. XLA may drop a pair of converts, not this."""
    info = jnp.finfo(dtype)
    rounded = lax.reduce_precision(values, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    if info.nexp == jnp.finfo(jnp.float32).nexp:
        return rounded
    # Below its normal numbers, where values lie evenly, reduce_precision gives 0.
    step = jnp.float32(info.smallest_subnormal)
    even = lax.round(values / step, lax.RoundingMethod.TO_NEAREST_EVEN) * step
    return jnp.where(jnp.abs(values) < jnp.float32(info.tiny), even, rounded)


def power_of_two_above(scale: jax.Array) -> jax.Array:
    """2**ceil(log2(scale)) of positive float32, by its bits: the exponent, plus one above a power of two."""
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    exponent = (bits >> _EXPONENT_BITS) + ((bits & _MANTISSA) != 0).astype(jnp.int32)
    exponent = jnp.clip(exponent, 1, 254)
    return lax.bitcast_convert_type(exponent << _EXPONENT_BITS, jnp.float32)


def scale_of(amax: jax.Array, floor: float, scale_format: str) -> jax.Array:
    """float32 scale of values with that absolute maximum, as float32 also where it will be packed."""
    bits = lax.bitcast_convert_type(jnp.maximum(amax, jnp.float32(floor)), jnp.int32)
    bits = bits_over_448(bits, lambda a, b: lax.div(a, jnp.full_like(a, b)))
    scale = lax.bitcast_convert_type(bits, jnp.float32)
    return scale if scale_format == "float32" else power_of_two_above(scale)


def codes(values: jax.Array, scale: jax.Array, *, divide: bool) -> jax.Array:
    """e4m3 of float32 values, for scales that broadcast against them."""
    if divide:
        # XLA turns a division by a broadcast array into a product with its reciprocal, which is off by one
        # in the last place at times; not a division by a selection. A NaN's code is unspecified.
        scaled = values / jnp.where(values == values, scale, 1.0)
    else:
        scaled = values * (1.0 / scale)
    return jnp.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)


def masked_quant(
    problem: MaskedQuantProblem, x: jax.Array, masked_m: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(codes `[e, M, N]`, scales `[e, M, G]` as stored) of x `[e, M, 2 N]`; zeros at or past `masked_m`."""
    experts, rows, groups = problem.num_experts, problem.max_rows, problem.num_groups
    gate, up = x[..., : problem.width], x[..., problem.width :]
    shape = (experts, rows, groups, problem.group_size)
    values = activation(problem, gate, up).reshape(shape)
    scale = scale_of(jnp.max(jnp.abs(values), axis=-1), problem.amax_floor, problem.scale_format)
    q = codes(values, scale[..., None], divide=problem.divide)
    valid = jnp.arange(rows, dtype=jnp.int32)[None] < masked_m.astype(jnp.int32)[:, None]
    q = jnp.where(valid[..., None, None], q, jnp.zeros((), q.dtype))
    return q.reshape(experts, rows, problem.width), _stored(problem, scale, valid)


def _stored(problem: MaskedQuantProblem, scale: jax.Array, valid: jax.Array) -> jax.Array:
    """[e, M, G] float32 scales in the format and layout that was asked for."""
    if problem.packed:
        exponent = lax.bitcast_convert_type(scale, jnp.int32) >> _EXPONENT_BITS
        exponent = jnp.where(valid[..., None], exponent, 0)
        return _words(exponent).transpose(0, 2, 1)
    scale = jnp.where(valid[..., None], scale, jnp.float32(0))
    if problem.scale_layout == "row_major":
        return scale
    padding = -problem.max_rows % COLUMN_MULTIPLE
    return jnp.pad(scale.transpose(0, 2, 1), ((0, 0), (0, 0), (0, padding)))


def _words(exponents: jax.Array) -> jax.Array:
    """int32 `[..., w]` of exponents `[..., 4 w]` in [0, 255]: byte i of word j is that of 4 j + i.

    By shifts: a bitcast of four bytes to a word has no symbolic sizes.
    """
    *lead, groups = exponents.shape
    parts = exponents.reshape(*lead, groups // GROUPS_PER_WORD, GROUPS_PER_WORD)
    shift = jnp.broadcast_to(jnp.arange(GROUPS_PER_WORD, dtype=jnp.int32) * 8, parts.shape)
    return jnp.sum(parts << shift, axis=-1, dtype=jnp.int32)


def rows_quantised(
    x: jax.Array, scale_format: str, scale_layout: str, floor: float, divide: bool
) -> tuple[jax.Array, jax.Array]:
    """`quantize_rowwise` of x `[..., M, K]`."""
    shape = x.shape
    groups = x.astype(jnp.float32).reshape(*shape[:-1], shape[-1] // GROUP, GROUP)
    scale = scale_of(jnp.max(jnp.abs(groups), axis=-1, initial=0.0), floor, scale_format)
    q = codes(groups, scale[..., None], divide=divide).reshape(shape)
    columns = scale_layout == "column_major"
    if scale_format != "ue8m0_packed":
        if columns:
            scale = _pad_last(scale.swapaxes(-1, -2), COLUMN_MULTIPLE)
        return q, scale
    exponents = lax.bitcast_convert_type(scale, jnp.int32) >> _EXPONENT_BITS
    words = _words(_pad_last(exponents, GROUPS_PER_WORD))
    return q, words.swapaxes(-1, -2) if columns else words


def without_activation(
    problem: MaskedQuantProblem, x: jax.Array, masked_m: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of a problem that does not activate: all rows."""
    del masked_m
    how = problem.scale_format, problem.scale_layout, problem.amax_floor, problem.divide
    return rows_quantised(x, *how)


def _pad_last(array: jax.Array, multiple: int) -> jax.Array:
    """The array with zeros behind its last dimension, up to a multiple."""
    spare = -array.shape[-1] % multiple
    return jnp.pad(array, (*[(0, 0)] * (array.ndim - 1), (0, spare))) if spare else array
