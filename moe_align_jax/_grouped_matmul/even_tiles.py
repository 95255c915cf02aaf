"""Tiles of about the same height for the blocks of each expert: the list that `Config.heights` needs.

An expert's rows follow each other from its first block on, and padding is behind the last of them. So they
may be cut anew, into as many tiles as there are blocks: of 512 rows in three blocks of 184, three tiles of
176 rows in place of 184, 184 and 144. Tiles of one height keep the CTAs that use the same weights at the
same step.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._grouped_matmul import reference
from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.problem import MatmulProblem

_I32 = jnp.int32
_STEP = 8  # rows


def find(problem: MatmulProblem, config: Config, named: dict[str, jax.Array]) -> list[jax.Array]:
    """[count `[1]`, expert, first row and end of each tile `[B]`], int32; an expert of -1 for zeros."""
    names = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")
    ids, expert_ids, num_rows = (named[name] for name in names)
    blocks, block = problem.num_blocks, problem.block_size
    used = reference.row_mask(problem, ids, expert_ids, num_rows)
    used = jnp.pad(used, (0, blocks * block - problem.num_rows))
    pairs = jnp.sum(used.reshape(blocks, block), axis=1, dtype=_I32)
    every = jnp.arange(blocks, dtype=_I32)
    there = (expert_ids >= 0) & (expert_ids < problem.num_experts) & (every * block < num_rows[0])
    expert = jnp.where(there, expert_ids, -1)
    # `[B, B]`: blocks of one expert.
    mine = (expert[:, None] == expert[None, :]) & there[None, :]
    first = jnp.min(jnp.where(mine, every[None, :], blocks), axis=1)
    count = jnp.maximum(jnp.sum(mine, axis=1, dtype=_I32), 1)
    ends = every * block + pairs
    end = jnp.max(jnp.where(mine, ends[None, :], 0), axis=1)
    first, end = jnp.where(there, first, every), jnp.where(there, end, 0)
    units = lax.div(jnp.maximum(end - first * block, 1) + (_STEP - 1), _I32(_STEP))
    place = every - first

    def height(least):
        found = _I32(config.heights[0])
        for each in config.heights[1:]:
            found = jnp.where(least <= each, _I32(each), found)
        return found

    if config.exact:
        low = lax.div(units, count)
        more = units - low * count  # so many tiles are a step higher: the first ones
        lower, higher = height(low * _STEP), height((low + 1) * _STEP)
        start = first * block + place * lower + jnp.minimum(place, more) * (higher - lower)
        rows = jnp.where(place < more, higher, lower)
    else:
        rows = height(lax.div(units + (count - 1), count) * _STEP)
        start = first * block + place * rows
    start = jnp.where(there, start, every * block)
    rows = jnp.where(there, rows, _I32(block))
    tiles = lax.div(num_rows + (block - 1), _I32(block))
    return [jnp.clip(tiles, 0, blocks), expert, start, start + rows]
