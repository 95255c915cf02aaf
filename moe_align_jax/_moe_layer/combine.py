"""The weighted sum of the experts' results of each token, and its derivative. No atomics in either.

XLA makes one fusion of the sum: it was measured at the memory's rate on an H200, so that there is no kernel
of ours. Rows of no pair and weights of dropped pairs may hold NaN: they are left out by selection, not by a
product with zero.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_F32 = jnp.float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_sum(
    dtype: Any,
    y: jax.Array,
    weights: jax.Array,
    row_of_pair: jax.Array,
    pair_of_row: jax.Array,
    num_rows: jax.Array,
) -> jax.Array:
    """`[T, H]`: for each token, the sum over k, in order, of its rows of y times their weights, in float32.

    Args:
        dtype: of the result. Static.
        y: `[P, H]`. Rows that no pair has are not read.
        weights: `[T, K]` float32. Those of dropped pairs are not used.
        row_of_pair: `[T, K]` int32, -1 for a dropped pair.
        pair_of_row: `[P]` int32, for the derivative: outside `[0, T K)` for rows without a pair.
        num_rows: `[1]` int32, for the derivative: rows in use.
    """
    del pair_of_row, num_rows
    rows = _rows_of_pairs(y, row_of_pair)
    return jnp.sum(rows * _kept(weights, row_of_pair)[..., None], axis=1).astype(dtype)


def _rows_of_pairs(y: jax.Array, row_of_pair: jax.Array) -> jax.Array:
    """float32 `[T, K, H]`, zero for dropped pairs."""
    kept = row_of_pair >= 0
    rows = y.at[jnp.where(kept, row_of_pair, 0)].get(mode="promise_in_bounds").astype(_F32)
    return jnp.where(kept[..., None], rows, 0.0)


def _kept(weights: jax.Array, row_of_pair: jax.Array) -> jax.Array:
    return jnp.where(row_of_pair >= 0, weights, 0.0)


def _forward(dtype, y, weights, row_of_pair, pair_of_row, num_rows):
    operands = (y, weights, row_of_pair, pair_of_row, num_rows)
    return weighted_sum(dtype, *operands), operands


def _backward(dtype, operands, ct):
    del dtype
    y, weights, row_of_pair, pair_of_row, num_rows = operands
    tokens, top_k = weights.shape
    ct = ct.astype(_F32)
    # Each row belongs to one pair at most: a gather, no scatter.
    row = lax.broadcasted_iota(jnp.int32, pair_of_row.shape, 0)
    has_pair = (pair_of_row >= 0) & (pair_of_row < tokens * top_k) & (row < num_rows)
    pair = jnp.where(has_pair, pair_of_row, 0)
    share = jnp.where(has_pair, _kept(weights, row_of_pair).reshape(-1)[pair], 0.0)
    token = lax.div(pair, jnp.int32(top_k))
    dy = jnp.where(has_pair[:, None], ct[token] * share[:, None], 0.0).astype(y.dtype)
    dweights = jnp.sum(_rows_of_pairs(y, row_of_pair) * ct[:, None, :], axis=-1)
    return dy, dweights, None, None, None


weighted_sum.defvjp(_forward, _backward)
