"""Which replica of its expert a token takes, in plain jax.numpy: for `to_physical_ids` and the alignment."""

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax.types import HASH_MULTIPLIER, AlignProblem

_I32 = jnp.int32


def token_hash(token: jax.Array) -> jax.Array:
    """16 hash bits of token numbers, int32 arrays, in int32 arithmetic with wrap-around."""
    return ((token * _I32(HASH_MULTIPLIER)) >> _I32(16)) & _I32(0xFFFF)


def take(table: jax.Array, index: jax.Array) -> jax.Array:
    """`table[index]`, sharded as the index is."""
    sharding = jax.typeof(index).sharding
    where = None if all(axes is None for axes in sharding.spec) else sharding
    return jnp.asarray(table).at[index].get(mode="clip", out_sharding=where)


def dynamic(
    token: jax.Array, expert: jax.Array, slots: jax.Array, num_replicas: jax.Array, width: int
) -> jax.Array:
    """The slot for each token of its expert (>= 0); `slots` `[El * width]`, `num_replicas` `[El]`."""
    shift = jnp.full_like(expert, 16)
    replica = lax.shift_right_logical(token_hash(token) * take(num_replicas, expert), shift)
    # Clamp: a corrupt replica count must not lead to another expert.
    replica = jnp.where((replica >= 0) & (replica < width), replica, 0)
    return take(slots, expert * _I32(width) + replica)


def of_pairs(
    problem: AlignProblem, pair: jax.Array, expert: jax.Array, **tables: jax.Array
) -> jax.Array:
    """The slot of each pair, for logical experts in `[0, El)`; `tables` are of `problem.inputs`."""
    layer = jnp.zeros(1, _I32)
    if problem.num_layers:
        layer = jnp.clip(tables["layer"], 0, problem.num_layers - 1)
        expert = expert + layer * _I32(problem.num_logical)
    if problem.dispatch == "static":
        return take(tables["static_dispatch_map"], expert)
    token = take(tables["first_token"], layer) + pair // _I32(problem.top_k)
    slots, counts = tables["logical_to_physical_map"], tables["num_replicas"]
    return dynamic(token, expert, slots, counts, problem.replica_width)
