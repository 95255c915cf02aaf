"""Moving rows between tokens and expert layouts, by gathers alone: forward, and in both gradients.

The transpose of a gather is a scatter-add, whose order, and so whose bits, a GPU does not fix. Each layout
knows its inverse, so that the gradient of either direction is a gather by the other index.

T tokens, K top_k, n = T * K pairs, P rows. `row_of_pair` `[T, K]`: the row of each pair, -1 for none.
`pair_of_row` `[P]`: the pair of each row, n for none.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._expert_parallel.axes import vary_together


def accumulator(dtype: Any) -> Any:
    """float32, or float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def take_rows(
    x: jax.Array, row_of_pair: jax.Array, pair_of_row: jax.Array, *, initialize: bool = True
) -> jax.Array:
    """`[P, ...]`: the token of each row's pair; without a pair zero, or unspecified.

    Args:
        x: `[T, ...]`.
        row_of_pair: `[T, K]` int32.
        pair_of_row: `[P]` int32.
        initialize: whether rows without a pair are zero. If not, they are not even written.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return _take(x, row_of_pair, pair_of_row, initialize)
    return _take_rows(initialize, *vary_together((x, row_of_pair, pair_of_row)))


def sum_rows(
    y: jax.Array, weights: jax.Array | None, row_of_pair: jax.Array, pair_of_row: jax.Array
) -> jax.Array:
    """`[T, ...]` in float32: `sum_k weights[t, k] * y[row_of_pair[t, k]]`, k ascending, no row adds zero.

    Args:
        y: `[P, ...]`, any float dtype.
        weights: `[T, K]`; None for ones.
        row_of_pair: `[T, K]` int32.
        pair_of_row: `[P]` int32.
    """
    if weights is None:
        y, row_of_pair, pair_of_row = vary_together((y, row_of_pair, pair_of_row))
        return _sum_rows(y, None, row_of_pair, pair_of_row)
    return _sum_rows(*vary_together((y, weights, row_of_pair, pair_of_row)))


def _take(x: jax.Array, row_of_pair: jax.Array, pair_of_row: jax.Array, initialize: bool):
    num_tokens, top_k = row_of_pair.shape
    shape = (*pair_of_row.shape, *x.shape[1:])
    if num_tokens * top_k == 0:
        return jnp.zeros(shape, x.dtype)
    if initialize:
        # The sentinel n gives token T, past the end: zero.
        return x.at[pair_of_row // top_k].get(mode="fill", fill_value=0)
    # Writes the rows of pairs and nothing else. A pair without a row aims past the end, each at a place of
    # its own, so that the indices are unique as promised: it is dropped.
    num_rows = shape[0]
    pair = jnp.arange(num_tokens * top_k, dtype=jnp.int32).reshape(num_tokens, top_k)
    row = jnp.where(row_of_pair < 0, num_rows + pair, row_of_pair)
    out = lax.empty(shape, x.dtype)  # pyright: ignore[reportAttributeAccessIssue]
    out, x = vary_together((out, x))
    copies = jnp.broadcast_to(x[:, None], (num_tokens, top_k, *x.shape[1:]))
    return out.at[row].set(copies, mode="drop", unique_indices=True)


def _pick(y: jax.Array, row: jax.Array) -> jax.Array:
    """`[T, ...]` rows of y, zero for row -1."""
    if y.shape[0] == 0:
        return jnp.zeros((*row.shape, *y.shape[1:]), y.dtype)
    return y.at[jnp.where(row < 0, y.shape[0], row)].get(mode="fill", fill_value=0)


def _column(weights: jax.Array, k: int, like: jax.Array, dtype: Any) -> jax.Array:
    return weights[:, k].astype(dtype).reshape(-1, *(1,) * (like.ndim - 1))


def _sum(y: jax.Array, weights: jax.Array | None, row_of_pair: jax.Array) -> jax.Array:
    dtype = accumulator(y.dtype)
    total = jnp.zeros((row_of_pair.shape[0], *y.shape[1:]), dtype)
    # One pair of each token after the other: K gathers that fuse, in an order that is always the same.
    for k in range(row_of_pair.shape[1]):
        each = _pick(y, row_of_pair[:, k]).astype(dtype)
        total += each if weights is None else each * _column(weights, k, each, dtype)
    return total


@jax.custom_vjp
def _sum_rows(y, weights, row_of_pair, pair_of_row):
    del pair_of_row
    return _sum(y, weights, row_of_pair)


def _sum_rows_forward(y, weights, row_of_pair, pair_of_row):
    return _sum(y, weights, row_of_pair), (y, weights, row_of_pair, pair_of_row)


def _sum_rows_backward(saved, d_out):
    y, weights, row_of_pair, pair_of_row = saved
    dtype = accumulator(y.dtype)
    d_rows = _take(d_out.astype(dtype), row_of_pair, pair_of_row, True)
    if weights is None:
        return d_rows.astype(y.dtype), None, None, None
    flat = weights.reshape(-1)
    if flat.size:
        each = flat.at[pair_of_row].get(mode="fill", fill_value=0).astype(dtype)
        d_rows *= each.reshape(-1, *(1,) * (d_rows.ndim - 1))
    rest = tuple(range(1, d_out.ndim))
    columns = [
        jnp.sum(_pick(y, row_of_pair[:, k]).astype(dtype) * d_out, axis=rest)
        for k in range(row_of_pair.shape[1])
    ]
    d_weights = jnp.stack(columns, axis=1) if columns else jnp.zeros(weights.shape, dtype)
    return d_rows.astype(y.dtype), d_weights.astype(weights.dtype), None, None


_sum_rows.defvjp(_sum_rows_forward, _sum_rows_backward)


def _take_rows_body(initialize, x, row_of_pair, pair_of_row):
    return _take(x, row_of_pair, pair_of_row, initialize)


def _take_rows_forward(initialize, x, row_of_pair, pair_of_row):
    return _take(x, row_of_pair, pair_of_row, initialize), row_of_pair


def _take_rows_backward(initialize, row_of_pair, d_rows):
    del initialize
    return _sum(d_rows, None, row_of_pair).astype(d_rows.dtype), None, None


_take_rows = jax.custom_vjp(_take_rows_body, nondiff_argnums=(0,))
_take_rows.defvjp(_take_rows_forward, _take_rows_backward)
