"""Arrays of ids, maps and counts as arguments: what is checked of them, and how they become int32.

Ids are compared in their own dtype: what is out of range stays out of range when it is narrowed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_align_jax._core import checks
from moe_align_jax._core.int32 import INT32_MAX, narrow_on_host, saturate

_I32 = jnp.int32


# -- checks on static facts -----------------------------------------------------------------------


def check_integer_array(function: str, argument: str, value: Any, remedy: str) -> Any:
    if not (checks.is_array(value) or isinstance(value, np.generic)):
        remedy, got = checks.array_remedy(value, remedy), checks.describe(value)
        raise TypeError(checks.message(function, argument, "be an integer array", got, remedy))
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        got = checks.describe(value)
        raise TypeError(checks.message(function, argument, "be an integer array", got, remedy))
    return value


def capacity_of(function: str, num_pairs: Any, block_size: int, num_experts: int, pad: bool) -> Any:
    """P. Symbolic sizes (shape-polymorphic export) stay symbolic and are not bounded here."""
    if isinstance(num_pairs, int):
        capacity = checks.capacity(
            num_pairs, block_size=block_size, num_experts=num_experts, pad_sorted_ids=pad
        )
        return checks.check_fits_int32(function, "topk_ids", capacity, "a padded length P")
    return checks.capacity(
        num_pairs,
        block_size=block_size,
        num_experts=num_experts,
        pad_sorted_ids=pad,
        minimum=jax.core.min_dim,  # pyright: ignore[reportAttributeAccessIssue]
    )


def check_expert_map(function: str, value: Any, num_experts: int) -> Any:
    remedy = "Pass one local id (or -1) per global expert."
    value = check_integer_array(function, "expert_map", value, remedy)
    if value.shape != (num_experts,):
        raise ValueError(
            checks.message(
                function,
                "expert_map",
                f"have shape [{num_experts}]",
                checks.describe(value),
                remedy,
            )
        )
    return narrow_on_host(value, num_experts)


def check_count(function: str, argument: str, value: Any, remedy: str, least: int = -1) -> Any:
    """An int or an array of one integer; what the host knows as int32, saturated at `least` and 2**31 - 1."""
    if isinstance(value, (bool, np.bool_)):
        checks.fail(function, argument, "be an integer", checks.describe(value), remedy, TypeError)
    if isinstance(value, int):
        return saturate(value, least)
    value = check_integer_array(function, argument, value, remedy)
    if value.size != 1:
        checks.fail(function, argument, "be a scalar", checks.describe(value), remedy)
    return saturate(value.item(), least) if isinstance(value, np.ndarray) else value


# -- narrowing to int32 without changing what is in range --------------------------------------------


def as_int32_words(ids: jax.Array) -> jax.Array:
    """`[n]` int32, or for 64-bit ids `[n, 2]` int32 words, low first. Out-of-range stays out of range."""
    if ids.dtype == _I32:
        return ids
    if ids.dtype.itemsize >= 4:
        # uint32 above int32 reads as negative; 64-bit ids need no arithmetic (which jax would narrow).
        return lax.bitcast_convert_type(ids, _I32)
    return lax.convert_element_type(ids, _I32)


def narrow_map(expert_map: jax.Array, num_experts: int) -> jax.Array:
    words = as_int32_words(expert_map)
    if words.ndim == 1:
        return words
    low, high = words[:, 0], words[:, 1]
    return jnp.where((high == 0) & (low < num_experts), low, -1)


def narrow_count(count: jax.Array) -> jax.Array:
    """`[k]` int32 with values beyond int32 saturated: 2**31 - 1 above, -1 below."""
    count = lax.reshape(count, (max(count.size, 1),))
    unsigned = jnp.issubdtype(count.dtype, jnp.unsignedinteger)
    words = as_int32_words(count)
    if words.ndim == 1:
        if unsigned and count.dtype.itemsize == 4:
            return jnp.where(words < 0, _I32(INT32_MAX), words)
        return words
    low, high = words[:, 0], words[:, 1]
    small = (high == 0) & (low >= 0)
    negative = jnp.bool_(False) if unsigned else high < 0
    return jnp.where(small, low, jnp.where(negative, _I32(-1), _I32(INT32_MAX)))
