"""Moving rows by XLA: gathers, and one scatter of whole rows.

T tokens, K top_k, n = T * K pairs, P rows, e experts, M rows per expert. `row_of_pair` `[T, K]`: the row of
each pair, -1 for none. `pair_of_row` `[P]`: the pair of each row, n for none.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._lowering.sharding import vary_together

_I32 = jnp.int32


def accumulator(dtype: Any) -> Any:
    """float32, or float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def masked_layout(
    topk_ids: jax.Array,
    order: jax.Array,
    place_of_pair: jax.Array,
    counts: jax.Array,
    rows_per_expert: int,
) -> list[jax.Array]:
    """`[masked_m [e], row_of_pair [T, K], pair_of_row [e, M]]` of pairs in order of their experts.

    Args:
        topk_ids: `[T, K]`, any integer dtype; what stands in dropped pairs is not used.
        order: `[n]` int32, the pairs by expert, the dropped ones left out.
        place_of_pair: `[n]` int32, its inverse, -1 for a dropped pair.
        counts: `[e]` int32, pairs of each expert.
        rows_per_expert: M.
    """
    ids, num_experts = topk_ids, counts.shape[0]
    first = jnp.cumsum(counts, dtype=_I32) - counts
    masked_m = jnp.minimum(counts, _I32(rows_per_expert))
    if ids.size == 0:
        empty = jnp.zeros((num_experts, rows_per_expert), _I32)
        return [masked_m, jnp.zeros(ids.shape, _I32), empty]
    place = jnp.arange(rows_per_expert, dtype=_I32)[None]
    pair = order.at[first[:, None] + place].get(mode="clip")
    pair_of_row = jnp.where(place < masked_m[:, None], pair, _I32(ids.size))
    row = place_of_pair.reshape(ids.shape)
    # A kept pair's id is in range, whatever its dtype; a dropped one's is not used.
    expert = jnp.where(row < 0, 0, ids.astype(_I32))
    place = row - first.at[expert].get(mode="clip")
    kept = (row >= 0) & (place < rows_per_expert)
    row_of_pair = jnp.where(kept, expert * _I32(rows_per_expert) + place, -1)
    return [masked_m, row_of_pair, pair_of_row]


def take(
    x: jax.Array, row_of_pair: jax.Array, pair_of_row: jax.Array, initialize: bool
) -> jax.Array:
    """`[P, ...]`: the token of each row's pair; without a pair zero, or unwritten."""
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
    pair = jnp.arange(num_tokens * top_k, dtype=_I32).reshape(num_tokens, top_k)
    row = jnp.where(row_of_pair < 0, num_rows + pair, row_of_pair)
    out = lax.empty(shape, x.dtype)  # pyright: ignore[reportAttributeAccessIssue]
    out, x, row = vary_together((out, x, row))
    copies = jnp.broadcast_to(x[:, None], (num_tokens, top_k, *x.shape[1:]))
    return out.at[row].set(copies, mode="drop", unique_indices=True)


def pick(y: jax.Array, row: jax.Array) -> jax.Array:
    """`[T, ...]` rows of y, zero for row -1."""
    if y.shape[0] == 0:
        return jnp.zeros((*row.shape, *y.shape[1:]), y.dtype)
    return y.at[jnp.where(row < 0, y.shape[0], row)].get(mode="fill", fill_value=0)


def weighted_sum(y: jax.Array, weights: jax.Array | None, row_of_pair: jax.Array) -> jax.Array:
    """`[T, ...]` in the accumulator's dtype: `sum_k weights[t, k] * y[row_of_pair[t, k]]`, k ascending.

    A pair without a row adds zero, whatever its weight: also NaN or infinity.
    """
    dtype = accumulator(y.dtype)
    total = jnp.zeros((row_of_pair.shape[0], *y.shape[1:]), dtype)
    # One pair of each token after the other: K gathers that fuse, in an order that is always the same.
    for k in range(row_of_pair.shape[1]):
        row = row_of_pair[:, k]
        each = pick(y, row).astype(dtype)
        if weights is not None:
            # Selected before the product: 0 * NaN and 0 * inf are NaN.
            weight = jnp.where(row < 0, jnp.zeros((), dtype), weights[:, k].astype(dtype))
            each *= weight.reshape(-1, *(1,) * (each.ndim - 1))
        total += each
    return total
