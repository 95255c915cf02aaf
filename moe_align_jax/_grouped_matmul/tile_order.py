"""In which order a launch takes its tiles: neighbours in time share weights or rows in L2."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.problem import MatmulProblem

_I32, _F32 = jnp.int32, jnp.float32
# How many more tiles of small experts the CTAs with one tile more get (`dealt`): so many take as much less
# time as one of the others takes.
_MORE_SMALL = 4


class Mixing(NamedTuple):
    """Two parts of the tiles of rows, or of whole groups of them, which are taken in turns; see `mixed`.

    Attributes:
        small: of the small part; 0: all keep their order.
        large_from, small_from: the first of either part.
        units: of both parts.
        a_round: units that all CTAs take in a round, where the small part is dealt out by rounds; else 0.
    """

    small: jax.Array
    large_from: jax.Array
    small_from: jax.Array
    units: jax.Array
    a_round: int = 0


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


def mixing(
    group: int, experts: Any, num_experts: int, row_tiles: jax.Array, a_round: int = 0
) -> Mixing:
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
    large_from = jnp.where(falls, 0, small)
    small_from = jnp.where(falls, units - small, 0).astype(_I32)
    return Mixing(small, large_from, small_from, units, a_round)


def whole_round(clusters: int, n_tiles: int) -> int:
    """Tiles of rows, with all their n tiles, that so many CTAs take at once; 0 if it is no whole number."""
    return 0 if clusters % n_tiles else clusters // n_tiles


def a_round_of(problem: MatmulProblem, clusters: int, n_tiles: int) -> int:
    """Blocks that the CTAs take in a round, or 0 where `mixed` deals none out: where it is no whole number,
    or where numbers of that many blocks would overflow."""
    each, blocks = whole_round(clusters, n_tiles), problem.num_blocks
    if not each:
        return 0
    turns = -(-blocks // each)
    return each if blocks * turns * turns < 1 << 31 else 0


def mixed(known: Mixing, at: jax.Array) -> jax.Array:
    """Which unit (tile of rows, or whole group of them) is the at-th.

    Dealt by rounds, where these are whole; else after two of the large part one of the small part. What is
    left of the large part, and a group that is not whole, come last then.
    """
    if known.a_round:
        some = (known.small > 0) & (at < known.units)
        return lax.cond(some, functools.partial(dealt, known), lambda at: at, at)
    turn = lax.div(at, _I32(3))
    place = at - turn * 3
    both = turn < known.small
    of_small = both & (place == 2)
    of_large = jnp.where(both, turn * 2 + place, at - known.small) + known.large_from
    found = jnp.where(of_small, turn + known.small_from, of_large)
    return jnp.where(at < known.units, found, at)


def _before(small: jax.Array, turn: Any, turns: Any, falls: jax.Array) -> jax.Array:
    """How many of so many small units stand in the rounds before that one, of so many that have some.

    They become fewer from round to round, or more, down to (or up from) none.
    """
    turn = jnp.minimum(turn, turns)
    weight = (turn * jnp.where(falls, 2 * turns - turn, turn)).astype(_F32)
    share = weight / jnp.maximum(turns * turns, 1).astype(_F32)
    return (small.astype(_F32) * share + 0.5).astype(_I32)


def dealt(known: Mixing, at: jax.Array) -> jax.Array:
    """The at-th unit, where CTAs take `a_round` units in each round: all CTAs have about as much to do.

    Places of a round that the last one has, too, take one unit more in all, and `_MORE_SMALL` more of the
    small part. In each round the units of that part go on, place by place, where they ended in the round
    before: each place gets as many of them. The rounds of the experts with most rows, which begin few
    experts' weights, have most of the small part.
    """
    each, falls = known.a_round, known.small_from > 0
    turns = lax.div(known.units + (each - 1), _I32(each))
    more = known.units - (turns - 1) * each  # places of the last round
    of_more = lax.div(more * (known.small + (each - more) * _MORE_SMALL), _I32(each))
    of_more = jnp.minimum(jnp.minimum(of_more, known.small), lax.div(more * turns, _I32(2)))
    of_less = known.small - of_more
    turn = lax.div(at, _I32(each))
    place = at - turn * each
    first, second = _before(of_more, turn, turns, falls), _before(of_less, turn, turns - 1, falls)
    added = _before(of_more, turn + 1, turns, falls) - first
    others = _before(of_less, turn + 1, turns - 1, falls) - second
    is_more = place < more
    size, start = jnp.where(is_more, more, each - more), jnp.where(is_more, first, second)
    size, count = jnp.maximum(size, 1), jnp.where(is_more, added, others)
    place = jnp.where(is_more, place, place - more) + (size - lax.rem(start, size))
    place = jnp.where(place >= size, place - size, place)  # the small ones come first
    of_small = first + second + place + jnp.where(is_more, 0, added)
    of_large = turn * each - first - second + (place - count) + jnp.where(is_more, 0, more - added)
    return jnp.where(place < count, of_small + known.small_from, of_large + known.large_from)


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
