"""In which order a launch takes its tiles: neighbours in time share weights or rows in L2."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.problem import MatmulProblem

_I32 = jnp.int32


class Mixing(NamedTuple):
    """Two parts of the tiles of rows, or of whole groups of them, which are taken in turns; see `mixed`.

    Attributes:
        small: of the small part; 0: all keep their order.
        large_from, small_from: the first of either part.
        units: of both parts.
    """

    small: jax.Array
    large_from: jax.Array
    small_from: jax.Array
    units: jax.Array


def in_groups(
    group: int, t: jax.Array, row_tiles: Any, n_tiles: int, known: Mixing | None = None
) -> tuple[Any, Any]:
    """(Tile of rows, n tile) of the t-th tile. In groups of `group` row tiles: n outer, rows inner.

    `known`: how tiles of rows, or groups of them, are mixed.
    """
    if not group:
        at = lax.div(t, _I32(n_tiles))
        return mixed(known, at) if known else at, lax.rem(t, _I32(n_tiles))
    each = _I32(group * n_tiles)
    first = lax.div(t, each)
    rest = t - first * each
    if known:
        first = mixed(known, first)
    size = jnp.minimum(row_tiles - first * group, group)
    n = lax.div(rest, size)
    return first * group + (rest - n * size), n


def mixing(group: int, experts: Any, num_experts: int, row_tiles: jax.Array) -> Mixing:
    """How tiles of blocks are mixed: not at all, but where the experts seem to be sorted by their rows.

    Then the tile at two thirds of the rows is of an expert of the first half, or that at one third of one of
    the second half. Two loads, side by side.
    """
    units = row_tiles if not group else lax.div(row_tiles, _I32(group))
    third = lax.div(units, _I32(3))
    last = jnp.maximum(row_tiles - 1, 0)
    near, far = (jnp.minimum(at * max(1, group), last) for at in (third, units - third))
    falls = (experts[far] >= 0) & (experts[far] * 2 < num_experts)
    rises = (experts[near] * 2 > num_experts) & (experts[near] < num_experts)
    small = jnp.where(falls | rises, third, 0)
    return Mixing(
        small, jnp.where(falls, 0, small), jnp.where(falls, units - small, 0).astype(_I32), units
    )


def mixed(known: Mixing, at: jax.Array) -> jax.Array:
    """Which unit (tile of rows, or whole group of them) is the at-th: after two of the large part one of the
    small part; what is left of the large part, and a group that is not whole, come last."""
    turn = lax.div(at, _I32(3))
    place = at - turn * 3
    both = turn < known.small
    of_small = both & (place == 2)
    of_large = jnp.where(both, turn * 2 + place, at - known.small) + known.large_from
    found = jnp.where(of_small, turn + known.small_from, of_large)
    return jnp.where(at < known.units, found, at)


def in_expert(
    problem: MatmulProblem, config: Config, refs: Any, t: jax.Array, n_tiles: int
) -> tuple[Any, Any]:
    """(Tile of rows, n tile) of the t-th tile, in groups of up to `group` row tiles of one expert.

    As all n tiles of a group follow each other, tile t // n_tiles of the rows is one of t's group.
    """
    near = lax.div(t, _I32(n_tiles))
    begin = refs.experts[near] * problem.max_rows
    before = lax.div(refs.starts[near] - begin, _I32(config.bm))  # tiles of the expert
    count = lax.div(refs.ends[near] - begin + (config.bm - 1), _I32(config.bm))
    inside = lax.div(before, _I32(config.group)) * config.group
    size = jnp.minimum(count - inside, config.group)
    first = near - before + inside
    rest = t - first * n_tiles
    n = lax.div(rest, size)
    return first + (rest - n * size), n
