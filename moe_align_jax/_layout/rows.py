"""Moving rows between tokens and expert layouts, with gradients: by gathers alone in both.

The transpose of a gather is a scatter-add, whose order, and so whose bits, a GPU does not fix. Each layout
knows its inverse, so that the gradient of either direction is a gather by the other index.

T tokens, K top_k, n = T * K pairs, P rows. `row_of_pair` `[T, K]`: the row of each pair, -1 for none.
`pair_of_row` `[P]`: the pair of each row, n for none.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_align_jax._layout import gathers, primitives
from moe_align_jax._layout.gathers import accumulator as accumulator
from moe_align_jax._lowering.sharding import vary_together


def copy_to_masked(
    leaves: list[jax.Array],
    topk_ids: jax.Array,
    order: jax.Array,
    place_of_pair: jax.Array,
    counts: jax.Array,
    *,
    rows_per_expert: int,
    initialize: bool,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """`([masked_m, row_of_pair, pair_of_row], rows of each leaf [e, M, ...])`.

    Args:
        leaves: `[T, ...]` each.
        topk_ids, order, place_of_pair, counts, rows_per_expert: as for `gathers.masked_layout`.
        initialize: whether rows that are not in use are zero. If not, they are not even written.
    """
    indices = vary_together((topk_ids, order, place_of_pair, counts))
    together = primitives.movable(leaves)  # the others by themselves
    # A gradient rule wants x to vary as its rows do, over the axes of the ids, too.
    moved = [vary_together((leaves[k], indices[0]))[0] for k in together]
    layout, rows = _copy(rows_per_expert, initialize, moved, indices)
    done = dict(zip(together, rows, strict=True))
    _, row_of_pair, pair_of_row = layout
    for k, x in enumerate(leaves):
        if k not in done:
            each = take_rows(x, row_of_pair, pair_of_row.reshape(-1), initialize=initialize)
            done[k] = each.reshape(*pair_of_row.shape, *x.shape[1:])
    return layout, [done[k] for k in range(len(leaves))]


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
        return gathers.take(x, row_of_pair, pair_of_row, initialize)
    return _take_rows(initialize, *vary_together((x, row_of_pair, pair_of_row)))


def sum_rows(
    y: jax.Array,
    weights: jax.Array | None,
    row_of_pair: jax.Array,
    pair_of_row: jax.Array,
    out_dtype: Any = None,
) -> jax.Array:
    """`[T, ...]`: `sum_k weights[t, k] * y[row_of_pair[t, k]]` in float32, k ascending; no row adds zero.

    Args:
        y: `[P, ...]`, any float dtype.
        weights: `[T, K]`; None for ones.
        row_of_pair: `[T, K]` int32.
        pair_of_row: `[P]` int32.
        out_dtype: of the result, rounded to once; None for float32 (float64 for float64).
    """
    out_dtype = jnp.dtype(accumulator(y.dtype) if out_dtype is None else out_dtype)
    if weights is None:
        y, row_of_pair, pair_of_row = vary_together((y, row_of_pair, pair_of_row))
        return _sum_rows(out_dtype, y, None, row_of_pair, pair_of_row)
    return _sum_rows(out_dtype, *vary_together((y, weights, row_of_pair, pair_of_row)))


# -- gradients -------------------------------------------------------------------------------------


def _copy_body(rows_per_expert, initialize, leaves, indices):
    layout_and_rows = primitives.copy(indices, leaves, rows_per_expert, initialize)
    return layout_and_rows[:3], layout_and_rows[3:]


def _copy_forward(rows_per_expert, initialize, leaves, indices):
    layout, rows = _copy_body(rows_per_expert, initialize, leaves, indices)
    return (layout, rows), layout[1]


def _copy_backward(rows_per_expert, initialize, row_of_pair, cotangents):
    del rows_per_expert, initialize
    _, d_rows = cotangents
    return [sum_copies(d, row_of_pair) for d in d_rows], None


def sum_copies(d_rows, row_of_pair):
    """The cotangent `[T, ...]` of rows that were copied to boxes `[e, M, ...]`; None of integers."""
    if not jnp.issubdtype(d_rows.dtype, jnp.floating):
        return None
    flat = d_rows.reshape(-1, *d_rows.shape[2:])
    flat, row_of_pair = vary_together((flat, row_of_pair))
    return gathers.weighted_sum(flat, None, row_of_pair).astype(d_rows.dtype)


_copy = jax.custom_vjp(_copy_body, nondiff_argnums=(0, 1))
_copy.defvjp(_copy_forward, _copy_backward)


def _sum_rows_body(out_dtype, y, weights, row_of_pair, pair_of_row):
    del pair_of_row
    return primitives.weighted_sum(y, weights, row_of_pair, out_dtype)


def _sum_rows_forward(out_dtype, y, weights, row_of_pair, pair_of_row):
    total = _sum_rows_body(out_dtype, y, weights, row_of_pair, pair_of_row)
    return total, (y, weights, row_of_pair, pair_of_row)


def _sum_rows_backward(out_dtype, saved, d_out):
    del out_dtype
    y, weights, row_of_pair, pair_of_row = saved
    dtype = accumulator(y.dtype)
    d_out = d_out.astype(dtype)
    d_rows = gathers.take(d_out, row_of_pair, pair_of_row, True)
    if weights is None:
        return d_rows.astype(y.dtype), None, None, None
    flat = weights.reshape(-1)
    if flat.size:
        each = flat.at[pair_of_row].get(mode="fill", fill_value=0).astype(dtype)
        d_rows *= each.reshape(-1, *(1,) * (d_rows.ndim - 1))
    rest = tuple(range(1, d_out.ndim))
    columns = [
        jnp.sum(gathers.pick(y, row_of_pair[:, k]).astype(dtype) * d_out, axis=rest)
        for k in range(row_of_pair.shape[1])
    ]
    d_weights = jnp.stack(columns, axis=1) if columns else jnp.zeros(weights.shape, dtype)
    # No derivative by the weight of a pair without a row, also where the cotangent is NaN or infinite.
    d_weights = jnp.where(row_of_pair < 0, jnp.zeros((), dtype), d_weights)
    return d_rows.astype(y.dtype), d_weights.astype(weights.dtype), None, None


_sum_rows = jax.custom_vjp(_sum_rows_body, nondiff_argnums=(0,))
_sum_rows.defvjp(_sum_rows_forward, _sum_rows_backward)


def _take_rows_body(initialize, x, row_of_pair, pair_of_row):
    return gathers.take(x, row_of_pair, pair_of_row, initialize)


def _take_rows_forward(initialize, x, row_of_pair, pair_of_row):
    return gathers.take(x, row_of_pair, pair_of_row, initialize), row_of_pair


def _take_rows_backward(initialize, row_of_pair, d_rows):
    del initialize
    return gathers.weighted_sum(d_rows, None, row_of_pair).astype(d_rows.dtype), None, None


_take_rows = jax.custom_vjp(_take_rows_body, nondiff_argnums=(0,))
_take_rows.defvjp(_take_rows_forward, _take_rows_backward)
