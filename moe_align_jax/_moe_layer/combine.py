"""The weighted sum of the experts' results of each token. No atomics.

XLA makes one fusion of the sum, at about the memory's rate on an H200, so that there is no kernel of ours but
within the second product of pairs (token_sum.py). Rows of no pair and weights of dropped pairs may hold NaN:
they are left out by selection, not by a product with zero.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_F32, _I32, _U32 = jnp.float32, jnp.int32, jnp.uint32
# Pairs of a token up to which its rows are loaded side by side. Measured: 2 and 8.
_MOST_PAIRS = 16


def weighted_sum(dtype: Any, y: jax.Array, weights: jax.Array, row_of_pair: jax.Array) -> jax.Array:
    """`[T, H]`: for each token, the sum over k, in order, of its rows of y times their weights, in float32.

    Args:
        dtype: of the result. Static.
        y: `[P, H]`. Rows that no pair has are not used.
        weights: `[T, K]` float32. Those of dropped pairs are not used.
        row_of_pair: `[T, K]` int32, -1 for a dropped pair.
    """
    several, even = row_of_pair.shape[1] <= _MOST_PAIRS, y.shape[1] % 2 == 0
    if several and even and y.dtype == jnp.bfloat16 and jnp.dtype(dtype) == jnp.bfloat16:
        return _of_words(y, weights, row_of_pair)
    return _by_selection(dtype, y, weights, row_of_pair)


@jax.custom_jvp
def _of_words(y: jax.Array, weights: jax.Array, row_of_pair: jax.Array) -> jax.Array:
    """The sum of bfloat16, two columns of which are a word: a thread moves 16 bytes of many, not 8."""
    words = lax.bitcast_convert_type(y.reshape(y.shape[0], -1, 2), _U32)
    halves = words << 16, words & _U32(0xFFFF0000)
    sums = (_by_bits(lax.bitcast_convert_type(x, _F32), weights, row_of_pair) for x in halves)
    low, high = (
        lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(_U32) for x in sums
    )
    both = lax.bitcast_convert_type(low | (high << 16), jnp.bfloat16)
    return both.reshape(row_of_pair.shape[0], y.shape[1])


@_of_words.defjvp
def _tangent(primals, tangents):
    """The bits of a product have no derivative."""
    return jax.jvp(functools.partial(_by_selection, jnp.bfloat16), primals, tangents)


def _by_bits(y: jax.Array, weights: jax.Array, row_of_pair: jax.Array) -> jax.Array:
    """float32 `[T, .]` of float32 rows, a pair of each token after the other: all rows are asked for at once.

    A product of no pair loses its bits. Of a comparison in place of the shift XLA makes a kernel of its own,
    ahead of the sum, but for few tokens; of the shift only for 4,096 and more of some models.
    """
    row, total = jnp.maximum(row_of_pair, 0), jnp.zeros((), _F32)
    for k in range(row.shape[1]):
        rows = y.at[row[:, k]].get(mode="promise_in_bounds")
        bits = lax.bitcast_convert_type(rows * weights[:, k, None].astype(_F32), _I32)
        total = total + lax.bitcast_convert_type(bits & ~(row_of_pair[:, k, None] >> 31), _F32)
    return total


def _by_selection(
    dtype: Any, y: jax.Array, weights: jax.Array, row_of_pair: jax.Array
) -> jax.Array:
    """The same sum of any rows."""
    kept = row_of_pair >= 0
    rows = y.at[jnp.where(kept, row_of_pair, 0)].get(mode="promise_in_bounds").astype(_F32)
    rows = jnp.where(kept[..., None], rows, 0.0)
    return jnp.sum(rows * jnp.where(kept, weights, 0.0)[..., None], axis=1).astype(dtype)
