"""Tiles of two shapes for the masked layout, found in `masked_m` by votes of a warp (`Config.turned`).

A group's rows are counted in blocks of 64. A pair of tiles of 128 x 192 holds four of them, and a tile of
192 rows x 128 columns ("turned") three. A group of n > 5 blocks has (-n mod 4) turned tiles of rows, and
pairs for the rest, so that no block is too many. Three blocks are a turned tile, four a pair, five two turned
ones; one or two are a tile of 128 rows without another.

A unit is what a cluster has at a time: a pair for an n tile, or a turned tile, or one alone, for two n tiles.
All take about as long. Groups that have no pair come first. The last turn of all clusters often has few
units: where it has at most half as many as there are clusters, each is divided among two clusters, whose
tiles have 64 rows.
"""

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
FOUND = 6  # values of a unit
BLOCK, PAIR, TURNED = 64, 256, 192  # rows
IS_PAIR, IS_ALONE, IS_TURNED, IS_HALF = range(4)


class Units(NamedTuple):
    """What units follow from.

    Attributes:
        groups, max_rows: of the masked layout.
        wide: n tiles of 192 columns.
        twos: two n tiles of 128 columns.
        clusters: of the launch.
        halves: how many units of a last turn may be divided.
    """

    groups: int
    max_rows: int
    wide: int
    twos: int
    clusters: int
    halves: int


def units_of(problem: MatmulProblem, config: Config, n_tiles: int) -> Units:
    """Those of a product with so many n tiles of 192 columns."""
    clusters = config.num_ctas // config.sharing
    # The last units are those of a pair and all n tiles.
    sizes = n_tiles, problem.n // 256, clusters, min(clusters // 2, n_tiles)
    return Units(problem.num_experts, problem.max_rows, *sizes)


def find(
    problem: MatmulProblem, config: Config, n_tiles: int, masked_m: Any, at: jax.Array
) -> list[jax.Array]:
    """What `unit_of` says, in the kernel of that problem; `masked_m`: in global memory."""

    def compute(t: Simt, r: SimpleNamespace, at: Int) -> tuple[Int, ...]:
        return unit_of(t, r, units_of(problem, config, n_tiles), at)

    shapes = {"masked_m": (problem.num_experts,)}
    return inline_scalars(problem, config, compute, FOUND, (at,), shapes, masked_m=masked_m)


def unit_of(t: Simt, r: SimpleNamespace, units: Units, at: Int) -> tuple[Int, ...]:
    """(Group, first row, row behind the last in use, n, kind) of unit `at`; and units of all groups. Behind
    the last unit, those of some group."""
    groups, lane = units.groups, t.thread_id() % WARP
    inside = lane < groups
    rows = t.load(r.masked_m, t.select(inside, lane, 0))
    rows = t.select(inside & (rows > 0), rows, 0)
    rows = t.select(rows < units.max_rows, rows, units.max_rows)
    blocks = (rows + (BLOCK - 1)) // BLOCK
    blocks = t.select(blocks.eq(5), 6, blocks)
    few = blocks < 3
    turned = t.select(few, 0, (blocks * 3) & 3)
    pairs = t.select(few, 0, (blocks - turned * 3) >> 2)
    places = turned * units.twos + pairs * units.wide
    places = t.select(few & (rows > 0), -(-units.wide // 2), places)
    later = pairs > 0
    first, second = t.select(later, 0, places), t.select(later, places, 0)
    through = [warp_inclusive_scan(t, each, lane, groups) for each in (first, second)]
    of_first, of_second = (t.shfl(each, groups - 1) for each in through)
    before = t.select(later, of_first + through[1] - second, through[0] - first)
    total = of_first + of_second
    whole = total // units.clusters * units.clusters
    rest = total - whole
    split = (of_second > 0) & (rest <= units.halves)
    halves = split & (at >= whole)
    place = t.select(halves, whole + ((at - whole) >> 1), at)
    votes = t.ballot((place >= before) & (place < before + places))
    winner = t.select(votes.eq(0), 0, t.highest_bit(votes))
    mine = (t.shfl(each, winner) for each in (rows, before, turned, pairs))
    rows, before, turned, pairs = mine
    place = place - before
    of_turned = turned * units.twos
    is_turned, is_alone = place < of_turned, (turned + pairs).eq(0)
    behind = place - of_turned
    size = t.select(is_turned, turned, t.select(is_alone, 1, pairs))
    place = t.select(is_turned, place, behind)
    n = place // size
    row = place - n * size
    row = t.select(is_turned, row * TURNED, turned * TURNED + row * PAIR)
    n = t.select(is_alone, n * 2, n)
    kind = t.select(is_turned, IS_TURNED, t.select(is_alone, IS_ALONE, IS_PAIR))
    row = t.select(halves, row + ((at - whole) & 1) * (PAIR // 2), row)
    kind = t.select(halves, IS_HALF, kind)
    total = t.select(split, total + rest, total)
    start = winner * units.max_rows
    return winner, start + row, start + rows, n, kind, total


def find_plainly(
    problem: MatmulProblem, config: Config, n_tiles: int, masked_m: Any, at: jax.Array
) -> tuple[Any, ...]:
    """The same for the interpreter: one group after the other, first those without a pair."""
    units = units_of(problem, config, n_tiles)
    twos, wide, clusters = _I32(units.twos), _I32(units.wide), _I32(units.clusters)

    def cut(group):
        """Rows, turned tiles, pairs and units of a group."""
        rows = jnp.clip(masked_m[group], 0, units.max_rows)
        blocks = lax.div(rows + (BLOCK - 1), _I32(BLOCK))
        turned = jnp.where(blocks == 5, 2, lax.rem(4 - lax.rem(blocks, _I32(4)), _I32(4)))
        pairs = jnp.maximum(lax.div(blocks - 3 * turned, _I32(4)), 0)
        turned = jnp.where(blocks < 3, 0, turned)
        alone = jnp.where((turned + pairs == 0) & (blocks > 0), _I32(-(-units.wide // 2)), 0)
        return rows, turned, pairs, turned * twos + pairs * wide + alone

    def count(group, totals):
        _, _, pairs, places = cut(group)
        later = (pairs > 0).astype(_I32)
        return totals[0] + places, totals[1] + later * places

    total, of_later = lax.fori_loop(0, units.groups, count, (_I32(0), _I32(0)))
    whole = lax.div(total, clusters) * clusters
    rest = total - whole
    split = (of_later > 0) & (rest <= units.halves)
    half = split & (at >= whole)
    place = jnp.where(half, whole + lax.div(at - whole, _I32(2)), at)
    down = jnp.where(half, lax.rem(at - whole, _I32(2)) * (PAIR // 2), 0)

    def step(i, carry):
        before, *found = carry
        group = lax.rem(i.astype(_I32), _I32(units.groups))
        rows, turned, pairs, places = cut(group)
        places = jnp.where((pairs > 0) == (i >= units.groups), places, 0)
        inside = place - before
        behind = inside - turned * twos
        is_turned, is_alone = behind < 0, turned + pairs == 0
        across, along = jnp.maximum(turned, 1), jnp.maximum(pairs, 1)
        n = jnp.where(is_turned, lax.div(inside, across), lax.div(behind, along))
        row = turned * TURNED + lax.rem(behind, along) * PAIR
        row = jnp.where(is_turned, lax.rem(inside, across) * TURNED, row)
        n = jnp.where(is_alone, 2 * n, n)
        kind = jnp.where(is_turned, IS_TURNED, jnp.where(is_alone, IS_ALONE, IS_PAIR))
        kind = jnp.where(half, IS_HALF, kind)
        start, mine = group * units.max_rows, (inside >= 0) & (inside < places)
        values = group, start + row + down, start + rows, n, kind
        found = [jnp.where(mine, a, b) for a, b in zip(values, found, strict=True)]
        return before + places, *found

    zero = _I32(0)
    _, *unit = lax.fori_loop(0, 2 * units.groups, step, (zero,) * FOUND)
    return *unit, jnp.where(split, total + rest, total)
