"""Tiles of the masked layout that the product itself finds in `masked_m`, by votes of a warp.

Lane i has the i-th of 32 groups: a scan over the lanes tells where each group's tiles begin, and a vote which
group a tile belongs to. Of more groups, 32 at a time. Each warp finds the same.

With `Config.by_expert` all tiles of a group come before those of the next one, so that its weights are read
once: what is found is a unit, which is what a cluster has at a time.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.found_inline import inline_scalars
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._simt.collectives import warp_inclusive_scan
from moe_align_jax._simt.language import WARP, Int, Simt

_I32 = jnp.int32
FOUND = 4  # values of a tile
FOUND_OF_UNIT = 6


class Units(NamedTuple):
    """What a cluster has at a time: a tile, or two side by side.

    Attributes:
        groups, max_rows: of the masked layout.
        bm: rows of a tile.
        columns: units that a tile of rows makes, or where they are pairs of such tiles, a pair.
        group: tiles of rows, or pairs, that are done together for each n.
        pairs: whether a unit is two tiles of rows and an n tile. Of a group's last tile, which may have no
            other beside it, units are two n tiles, the very last of which there may not be.
    """

    groups: int
    max_rows: int
    bm: int
    columns: int
    group: int
    pairs: bool


def units_of(problem: MatmulProblem, config: Config, n_tiles: int) -> Units:
    """Those of a product with so many n tiles."""
    pairs = config.shares_weights
    columns = n_tiles if pairs else -(-n_tiles // max(1, config.sharing))
    given = problem.num_experts, problem.max_rows, config.bm, columns
    return Units(*given, config.group or problem.max_rows, pairs)


def unit_in_turn(i: jax.Array, cluster: jax.Array, clusters: int) -> jax.Array:
    """The number of a cluster's i-th unit: in each turn of all clusters it has another place among them.

    A group's last tile of rows may take less time than the others. If each cluster kept its place, and the
    group's tiles and the clusters had a divisor in common, some would have no other tiles, and the rest wait
    for none: 6 groups of exactly 1024 rows, six tiles each, took 457.7 us with 66 clusters, and take 432.6;
    with 1024 rows on average 383.5 both (7168 -> 6144, H200, 2026-11-30).
    """
    return i * clusters + lax.rem(cluster + i, _I32(clusters))


def units_for(total: jax.Array, cluster: jax.Array, clusters: int) -> jax.Array:
    """How many of so many units a cluster has."""
    turns = lax.div(total, _I32(clusters))
    last = lax.rem(cluster + turns, _I32(clusters)) < total - turns * clusters
    return turns + last.astype(_I32)


def find(problem: MatmulProblem, config: Config, masked_m: Any, at: jax.Array) -> list[jax.Array]:
    """What `tile_of` says, in the kernel of that problem; `masked_m`: in global memory."""

    def compute(t: Simt, r: SimpleNamespace, at: Int) -> tuple[Int, ...]:
        return tile_of(t, r, problem.num_experts, problem.max_rows, config.bm, at)

    shapes = {"masked_m": (problem.num_experts,)}
    return inline_scalars(problem, config, compute, FOUND, (at,), shapes, masked_m=masked_m)


def find_unit(
    problem: MatmulProblem, config: Config, n_tiles: int, masked_m: Any, at: jax.Array
) -> list[jax.Array]:
    """What `unit_of` says, likewise."""

    def compute(t: Simt, r: SimpleNamespace, at: Int) -> tuple[Int, ...]:
        return unit_of(t, r, units_of(problem, config, n_tiles), at)

    shapes = {"masked_m": (problem.num_experts,)}
    return inline_scalars(problem, config, compute, FOUND_OF_UNIT, (at,), shapes, masked_m=masked_m)


def _vote(
    t: Simt,
    r: SimpleNamespace,
    groups: int,
    max_rows: int,
    begin: int,
    total: Int,
    at: Int,
    count: Callable[[Int], Int],
) -> tuple[Int, ...]:
    """Which of the groups from `begin` on, one a lane, holds place `at`, where a group has `count` places for
    its rows, and `total` are before these groups: (whether none does, the group, its rows, places before its
    first), and how many of these places the lane's group and those before it have."""
    lane = t.thread_id() % WARP
    mine = lane + begin
    inside = mine < groups
    rows = t.load(r.masked_m, t.select(inside, mine, 0))
    rows = t.select(inside & (rows > 0), rows, 0)
    rows = t.select(rows < max_rows, rows, max_rows)
    places = count(rows)
    through = warp_inclusive_scan(t, places, lane, min(WARP, groups - begin))
    before = total + through - places
    votes = t.ballot((at >= before) & (at < before + places))
    none = votes.eq(0)
    winner = t.select(none, 0, t.highest_bit(votes))
    return none, winner + begin, t.shfl(rows, winner), t.shfl(before, winner), through


def tile_of(
    t: Simt, r: SimpleNamespace, groups: int, max_rows: int, bm: int, at: Int
) -> tuple[Int, ...]:
    """(Group, first row, row behind the last in use) of tile `at`, of groups of `max_rows` rows that are cut
    into tiles of `bm`; and tiles of all groups. Behind the last tile, zeros."""
    total, group, first, end = (t.const(0) for _ in range(4))
    for begin in range(0, groups, WARP):
        none, it, rows, before, through = _vote(
            t, r, groups, max_rows, begin, total, at, lambda rows: (rows + (bm - 1)) // bm
        )
        start = it * max_rows
        group = t.select(none, group, it)
        first = t.select(none, first, start + (at - before) * bm)
        end = t.select(none, end, start + rows)
        total = total + t.shfl(through, min(WARP, groups - begin) - 1)
    return group, first, end, total


def unit_of(t: Simt, r: SimpleNamespace, units: Units, at: Int) -> tuple[Int, ...]:
    """(Group, first row, row behind the last in use, n, whether its second tile is the next n) of unit `at`;
    and units of all groups. Behind the last unit, zeros, and rows that are none."""

    def count(rows: Int) -> Int:
        tiles = (rows + (units.bm - 1)) // units.bm
        if units.pairs:
            return (tiles >> 1) * units.columns + (tiles & 1) * -(-units.columns // 2)
        return tiles * units.columns

    total, group, rows, rest = (t.const(0) for _ in range(4))
    for begin in range(0, units.groups, WARP):
        none, it, its_rows, before, through = _vote(
            t, r, units.groups, units.max_rows, begin, total, at, count
        )
        group = t.select(none, group, it)
        rows = t.select(none, rows, its_rows)
        rest = t.select(none, rest, at - before)
        total = total + t.shfl(through, min(WARP, units.groups - begin) - 1)
    tiles = (rows + (units.bm - 1)) // units.bm
    along = tiles >> 1 if units.pairs else tiles
    alone = rest >= along * units.columns
    place = t.select(alone, 0, rest)
    turn = place // (units.group * units.columns)
    first = turn * units.group
    size = along - first
    size = t.select(size < units.group, size, units.group)
    size = t.select(size > 0, size, 1)
    place = place - turn * (units.group * units.columns)
    n = place // size
    row = first + place - n * size
    if units.pairs:
        row = t.select(alone, tiles - 1, row * 2)
        n = t.select(alone, (rest - along * units.columns) * 2, n)
    start = group * units.max_rows
    return group, start + row * units.bm, start + rows, n, t.select(alone, 1, 0), total


def find_unit_plainly(
    problem: MatmulProblem, config: Config, n_tiles: int, masked_m: Any, at: jax.Array
) -> tuple[Any, ...]:
    """The same for the interpreter: one group after the other."""
    units = units_of(problem, config, n_tiles)
    together = 2 if units.pairs else 1

    def step(group, carry):
        before, *found = carry
        rows = jnp.clip(masked_m[group], 0, units.max_rows)
        tiles = lax.div(rows + (units.bm - 1), _I32(units.bm))
        along, odd = lax.div(tiles, _I32(together)), lax.rem(tiles, _I32(together))
        whole = along * units.columns
        count = whole + odd * -(-units.columns // 2)
        rest = at - before
        alone = rest >= whole
        turn = lax.div(rest, _I32(units.group * units.columns))
        first = turn * units.group
        size = jnp.clip(along - first, 1, units.group)
        n = lax.div(rest - first * units.columns, size)
        row = (first + lax.rem(rest - first * units.columns, size)) * together
        row = jnp.where(alone, tiles - 1, row)
        n = jnp.where(alone, (rest - whole) * 2, n)
        start = group * units.max_rows
        mine = (rest >= 0) & (rest < count)
        values = group, start + row * units.bm, start + rows, n, alone.astype(_I32)
        found = [jnp.where(mine, a, b) for a, b in zip(values, found, strict=True)]
        return before + count, *found

    zero = _I32(0)
    total, *unit = lax.fori_loop(0, problem.num_experts, step, (zero,) * FOUND_OF_UNIT)
    return *unit, total


def find_plainly(
    problem: MatmulProblem, config: Config, masked_m: Any, at: jax.Array
) -> tuple[Any, ...]:
    """The same for the interpreter, which runs none of that: one group after the other."""

    def step(group, carry):
        before, found, first, end = carry
        rows = jnp.clip(masked_m[group], 0, problem.max_rows)
        tiles = lax.div(rows + (config.bm - 1), _I32(config.bm))
        mine, start = (at >= before) & (at < before + tiles), group * problem.max_rows
        found = jnp.where(mine, group, found)
        first = jnp.where(mine, start + (at - before) * config.bm, first)
        return before + tiles, found, first, jnp.where(mine, start + rows, end)

    zero = _I32(0)
    total, *tile = lax.fori_loop(0, problem.num_experts, step, (zero, zero, zero, zero))
    return *tile, total
