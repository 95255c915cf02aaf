"""Whose rows are where in a weight gradient: those of each expert, and the pieces of hot experts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._grouped_matmul import reference
from moe_align_jax._grouped_matmul.problem import WeightGradient
from moe_align_jax._grouped_matmul.weight_gradient_tiles import STEPS_OF_PIECE

_I32 = jnp.int32


class Experts(NamedTuple):
    """Each expert's rows, int32 `[E]`: the first, how many, and the experts by how many, most first."""

    start: jax.Array
    count: jax.Array
    order: jax.Array


def located(problem: WeightGradient, *where: jax.Array) -> tuple[Experts, jax.Array | None]:
    """The experts of the problem, whose rows are taken to follow each other; and whether they do.

    Args:
        problem: the weights' gradient.
        where: its inputs behind lhs and rhs, which say whose rows are where.

    Returns:
        The experts, and bool `[]`; None where an expert's rows always follow each other: not of "blocks".
    """
    layout, consecutive = problem.layout, None
    every = jnp.arange(layout.num_experts, dtype=_I32)
    if layout.rows == "masked":
        start, count = every * layout.max_rows, jnp.clip(where[0], 0, layout.max_rows)
    elif layout.rows == "ragged":
        ends = reference.group_ends(where[0], layout.num_rows)
        begins = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
        # Far offsets would wrap.
        group = every + jnp.clip(where[1][0], -layout.num_experts, layout.num_groups)
        there = (group >= 0) & (group < layout.num_groups)
        group = jnp.where(there, group, 0)
        start = jnp.where(there, begins[group], 0)
        count = jnp.where(there, (ends - begins)[group], 0)
    else:
        block, blocks = layout.block_size, layout.num_blocks
        used = reference.row_mask(layout, *where).astype(_I32)
        used = jnp.pad(used, (0, blocks * block - layout.num_rows))
        pairs = jnp.sum(used.reshape(blocks, block), axis=1, dtype=_I32)
        # A block has its pairs first: those of an expert's blocks follow each other, but for the last's end.
        mine = (where[1][None, :] == every[:, None]) & (pairs > 0)[None, :]
        count = jnp.sum(jnp.where(mine, pairs[None, :], 0), axis=1, dtype=_I32)
        first = jnp.min(
            jnp.where(mine, jnp.arange(blocks, dtype=_I32)[None, :], blocks), axis=1, initial=blocks
        )
        start = jnp.where(count > 0, first * block, 0)
        block_of_row = jnp.arange(blocks * block, dtype=_I32) // block
        expert = jnp.clip(where[1], 0, layout.num_experts - 1)[block_of_row]
        rank = jnp.arange(blocks * block, dtype=_I32) - start[expert]
        # An expert has as many rows as it counts: they are its first ones, or some lie elsewhere.
        consecutive = jnp.all((used == 0) | (rank < count[expert]))
    experts = Experts(start, count, jnp.argsort(-count, stable=True).astype(_I32))
    return experts, consecutive


class Pieces(NamedTuple):
    """The rows of hot experts, cut.

    Attributes:
        experts: the pieces as if they were experts, `[pieces]`, in the order of their experts and rows.
        used: int32 `[1]`, how many there are; the others are empty.
        begin, end: int32 `[E]`, the pieces of each expert; the same for one that is not cut.
    """

    experts: Experts
    used: jax.Array
    begin: jax.Array
    end: jax.Array


def cut(experts: Experts, pieces: int, bk: int) -> tuple[Experts, Pieces]:
    """The experts, without the rows of those that are cut, and the pieces of these."""
    start, count, _ = experts
    total = jnp.sum(count, dtype=_I32)
    bound = jnp.maximum(lax.div(total + (pieces - 1), _I32(pieces)), _I32(STEPS_OF_PIECE * bk))
    # Rounded down: the pieces of all experts are at most as many as bounds are in all rows.
    parts = jnp.where(count >= 2 * bound, lax.div(count, bound), 0)
    end = jnp.cumsum(parts, dtype=_I32)
    begin, used = end - parts, end[-1:]
    # A piece begins at a whole step behind its expert's first row, as TMA needs it.
    steps = lax.div(count + (bk - 1), _I32(bk))
    steps = lax.div(steps + (parts - 1), jnp.maximum(parts, 1))
    piece = lax.iota(_I32, pieces)
    expert = jnp.sum(end[None, :] <= piece[:, None], axis=1, dtype=_I32)
    expert = jnp.minimum(expert, end.shape[0] - 1)
    rows = steps[expert] * bk
    skipped = (piece - begin[expert]) * rows
    there = jnp.where(piece < used, jnp.clip(count[expert] - skipped, 0, rows), 0)
    of_pieces = Experts(jnp.where(there > 0, start[expert] + skipped, 0), there, piece)
    count = jnp.where(parts > 0, 0, count)
    left = Experts(start, count, jnp.argsort(-count, stable=True).astype(_I32))
    return left, Pieces(of_pieces, used, begin, end)
