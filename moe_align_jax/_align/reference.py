"""Alignment in plain jax.numpy: the specification, and what CPUs, TPUs and other GPUs run.

One sort of the pairs by expert gives each pair's rank within its expert;
the rest are sums over experts and two scatters. No double argsort, no 64-bit arithmetic.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._align import replicas
from moe_align_jax.types import AlignProblem, BatchedAlignProblem

_I32 = jnp.int32


def _exclusive_sum(x: jax.Array) -> jax.Array:
    return jnp.cumsum(x, dtype=_I32) - x


def _local_experts(
    problem: AlignProblem,
    topk_ids: jax.Array,
    expert_map: jax.Array | None,
    limit: jax.Array | None,
    tables: dict[str, jax.Array],
) -> jax.Array:
    """`[n]` the group of each pair, E where it is dropped."""
    num_experts = problem.num_experts
    if problem.id_words == 2:
        low, high = topk_ids[:, 0], topk_ids[:, 1]
        expert = jnp.where(high == 0, low, -1)
    else:
        expert = topk_ids
    kept = (expert >= 0) & (expert < (problem.num_logical if problem.dispatch else num_experts))
    pair = jnp.arange(problem.num_pairs, dtype=_I32)
    if problem.num_shared:
        shared = lax.rem(pair, _I32(problem.top_k)) >= problem.top_k - problem.num_shared
        kept |= shared  # shared columns hold slots, compared below
    if limit is not None:
        kept &= pair < limit
    if problem.dispatch:
        mapped = replicas.of_pairs(problem, pair, jnp.where(kept, expert, 0), **tables)
        expert = jnp.where(shared, expert, mapped) if problem.num_shared else mapped
        kept &= (expert >= 0) & (expert < num_experts)
    if problem.expert_map == "filter":
        expert = expert_map[jnp.where(kept, expert, 0)]  # type: ignore[index]
        kept &= (expert >= 0) & (expert < problem.num_mapped)
    return jnp.where(kept, expert, num_experts)


def _sort_pairs(
    expert: jax.Array, pair: jax.Array, num_experts: int
) -> tuple[jax.Array, jax.Array]:
    """Both, by expert (0 .. E) and then by pair."""
    n = pair.shape[0]
    bits = max(n - 1, 1).bit_length() if isinstance(n, int) else 32  # a symbolic size may be any
    if (num_experts + 1) << bits > 2**31:
        sorted_expert, sorted_pair = lax.sort((expert, pair), num_keys=1, is_stable=True)
        return sorted_expert, sorted_pair
    # One word holds both, and one operand sorts faster than two. No two words are equal.
    words = lax.sort(expert << bits | pair, is_stable=False)
    return words >> bits, words & ((1 << bits) - 1)


def _label_blocks(
    padded_ends: jax.Array, num_blocks: int, block_size: int, expert_map: jax.Array | None
) -> jax.Array:
    """`[B]` the expert of each block, -1 past the last used one."""
    num_experts = padded_ends.shape[0]
    # A block's expert is the number of experts that end at or before it: a histogram and its sum.
    ends_at = jnp.zeros(num_blocks, _I32).at[padded_ends // block_size].add(1, mode="drop")
    block_expert = jnp.cumsum(ends_at, dtype=_I32)
    if expert_map is not None:
        mapped = expert_map[jnp.minimum(block_expert, num_experts - 1)]
        mapped = jnp.where((mapped >= 0) & (mapped < num_experts), mapped, -1)
    else:
        mapped = block_expert
    return jnp.where(block_expert < num_experts, mapped, -1)


def block_align(problem: AlignProblem, **operands: jax.Array) -> tuple[jax.Array, ...]:
    """The results of `problem.outputs`, in order."""
    n, num_experts, block_size = problem.num_pairs, problem.num_experts, problem.block_size
    ids, expert_map = operands.pop("topk_ids"), operands.pop("expert_map", None)
    limit = operands.pop("num_valid_pairs", None)
    expert = _local_experts(problem, ids, expert_map, limit, operands)

    pair = jnp.arange(n, dtype=_I32)
    sorted_expert, sorted_pair = _sort_pairs(expert, pair, num_experts)
    counts = jnp.zeros(num_experts, _I32).at[expert].add(1, mode="drop")
    padded = (counts + (block_size - 1)) // block_size * block_size
    padded_ends = jnp.cumsum(padded, dtype=_I32)
    # row = start of the expert + rank within it; the rank is the sorted position less the pairs before.
    shift = padded_ends - padded - _exclusive_sum(counts)
    kept = sorted_expert < num_experts
    row = pair + shift[jnp.where(kept, sorted_expert, 0)]
    row = jnp.where(kept, row, problem.capacity)

    sentinel = jnp.full(problem.capacity, n, _I32)
    sorted_token_ids = sentinel.at[row].set(sorted_pair, mode="drop", unique_indices=False)
    label_map = expert_map if problem.expert_map == "label" else None
    expert_ids = _label_blocks(padded_ends, problem.num_blocks, block_size, label_map)
    results = (sorted_token_ids, expert_ids, padded_ends[-1:], counts)
    if problem.return_inverse:
        row_of_pair = jnp.zeros(n, _I32).at[sorted_pair].set(jnp.where(kept, row, -1))
        results += (row_of_pair,)
    return results


def batched_block_align(
    problem: BatchedAlignProblem, expert_num_tokens: jax.Array
) -> tuple[jax.Array, ...]:
    """The `[E, max_tokens]` layout: every expert's rows are already together."""
    max_tokens, block_size = problem.max_tokens_per_batch, problem.block_size
    counts = jnp.clip(expert_num_tokens, 0, max_tokens)
    padded = (counts + (block_size - 1)) // block_size * block_size
    padded_ends = jnp.cumsum(padded, dtype=_I32)
    starts = padded_ends - padded
    token = jnp.arange(max_tokens, dtype=_I32)[None, :]
    row = jnp.where(token < counts[:, None], starts[:, None] + token, problem.capacity)
    slot = jnp.arange(problem.num_pairs, dtype=_I32)
    sentinel = jnp.full(problem.capacity, problem.num_pairs, _I32)
    sorted_token_ids = sentinel.at[row.ravel()].set(slot, mode="drop")
    expert_ids = _label_blocks(padded_ends, problem.num_blocks, block_size, None)
    return sorted_token_ids, expert_ids, padded_ends[-1:], counts
