"""The weighted sum of the experts' results of each token. No atomics.

XLA makes one fusion of the sum: it was measured at the memory's rate on an H200, so that there is no kernel
of ours but within the second product of pairs (token_sum.py). Rows of no pair and weights of dropped pairs
may hold NaN: they are left out by selection, not by a product with zero.
"""

from typing import Any

import jax
import jax.numpy as jnp

_F32 = jnp.float32


def weighted_sum(dtype: Any, y: jax.Array, weights: jax.Array, row_of_pair: jax.Array) -> jax.Array:
    """`[T, H]`: for each token, the sum over k, in order, of its rows of y times their weights, in float32.

    Args:
        dtype: of the result. Static.
        y: `[P, H]`. Rows that no pair has are not read.
        weights: `[T, K]` float32. Those of dropped pairs are not used.
        row_of_pair: `[T, K]` int32, -1 for a dropped pair.
    """
    kept = row_of_pair >= 0
    rows = y.at[jnp.where(kept, row_of_pair, 0)].get(mode="promise_in_bounds").astype(_F32)
    rows = jnp.where(kept[..., None], rows, 0.0)
    return jnp.sum(rows * jnp.where(kept, weights, 0.0)[..., None], axis=1).astype(dtype)
