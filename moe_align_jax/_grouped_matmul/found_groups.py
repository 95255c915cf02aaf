"""Tiles of several heights of "ragged" rows, that the product itself finds, without a launch that lists them.

A group is cut into as few tiles as its rows allow, which share them evenly, to 8 rows; each has the least
height for its share. Where a tile would reach behind its group, it begins so many rows earlier: the tiles of
a group may overlap, and compute rows twice, with the same bits. So a tile is stored whole, but that of a
group with fewer rows than the tile.

Each warp of the loading warpgroup looks at all groups, each lane at every 32nd: scans tell where rows and
tiles begin, a vote tells whose tile it is. All groups' loads run side by side.

Tiles are taken group by group, but not in the groups' order: lane by lane, by the lanes' reversed bits.
Groups of few rows, whose tiles wait for their weights, then run beside those of many, whose tiles wait for
the tensor cores, also where the groups are sorted by their rows.
"""

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._grouped_matmul import cut_list
from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.cut_list import CutList
from moe_align_jax._grouped_matmul.found_cut import FOUND, share_plainly
from moe_align_jax._grouped_matmul.found_inline import inline_scalars
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._simt.collectives import warp_inclusive_scan
from moe_align_jax._simt.language import WARP, Int, Simt

_I32 = jnp.int32


class Groups(NamedTuple):
    """Groups, and what their tiles may have.

    Attributes:
        count: G.
        num_experts: weights that there are.
        num_rows: of the array, below 2**30.
        heights: of tiles, falling; the first decides how many tiles a group has.
        exact: as for `Config`.
    """

    count: int
    num_experts: int
    num_rows: int
    heights: tuple[int, ...]
    exact: bool

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the operands that tell the groups."""
        return {"sizes": (self.count,), "offset": (1,)}

    @property
    def cut(self) -> CutList:
        """What `cut_list.share` is told."""
        sizes = self.num_rows, self.heights[0], 0, self.num_experts, 0
        return CutList(*sizes, self.heights, self.exact)


def of(problem: MatmulProblem, config: Config) -> Groups:
    """Those of a problem whose rows are "ragged"."""
    sizes = problem.num_groups, problem.num_experts, problem.num_rows
    return Groups(*sizes, config.heights, config.exact)


def find(
    problem: MatmulProblem, config: Config, sizes: Any, offset: Any, at: jax.Array
) -> list[jax.Array]:
    """What `tile_of` says, in the kernel of that problem; `sizes`, `offset`: in global memory."""
    groups = of(problem, config)

    def compute(t: Simt, r: SimpleNamespace, tile: Int) -> tuple[Int, ...]:
        return tile_of(t, r, groups, tile)

    shapes, refs = groups.inputs, {"sizes": sizes, "offset": offset}
    return inline_scalars(problem, config, compute, FOUND, (at,), shapes, **refs)


def count(problem: MatmulProblem, config: Config, sizes: Any, offset: Any) -> jax.Array:
    """Tiles that there are, in the kernel of that problem."""
    groups = of(problem, config)

    def compute(t: Simt, r: SimpleNamespace) -> tuple[Int]:
        return (count_of(t, r, groups),)

    shapes, refs = groups.inputs, {"sizes": sizes, "offset": offset}
    [found] = inline_scalars(problem, config, compute, 1, (), shapes, **refs)
    return found


class _Scanned(NamedTuple):
    """What a lane knows: of its groups, and the sums over all.

    Attributes:
        begins: the first row of each.
        firsts: tiles before each, and those up to the last.
        rows, tiles: of all groups.
    """

    begins: list[Int]
    firsts: list[Int]
    rows: Int
    tiles: Int


def count_of(t: Simt, r: SimpleNamespace, groups: Groups) -> Int:
    """Tiles that there are: of the groups, and of the rows behind them. By whole warps."""
    found = _scan(t, r, groups)
    return found.tiles + _tiles(groups, groups.num_rows - found.rows)


def tile_of(t: Simt, r: SimpleNamespace, groups: Groups, at: Int) -> tuple[Int, ...]:
    """(Expert, first row, the row behind its height, rows that are its group's, and the first row and end of
    those that it zeroes) of tile `at`, which there must be.

    By whole warps, of which each finds the same. A tile without weights has no height.
    """
    found, lane = _scan(t, r, groups), t.thread_id() % WARP
    each = len(found.firsts) - 1
    mine = [found.firsts[0], found.begins[0], lane]
    for k in range(1, each):
        # Of the groups that begin with this tile, the last has it: others before it are empty.
        later = at >= found.firsts[k]
        values = found.firsts[k], found.begins[k], lane + k * WARP
        mine = [t.select(later, new, old) for new, old in zip(values, mine, strict=True)]
    has = (at >= found.firsts[0]) & (at < found.firsts[each])
    votes = t.ballot(has)
    whose = t.select(votes.eq(0), 0, t.highest_bit(votes))
    first, begin, group = [t.shfl(value, whose) for value in mine]
    # Read again: the ends of all groups would take more registers than there are.
    end = _sum(t, groups, begin, _clipped(t, groups, t.load(r.sizes, group)))
    behind = at >= found.tiles  # of all groups
    first = t.select(behind, found.tiles, first)
    begin, end = t.select(behind, found.rows, begin), t.select(behind, groups.num_rows, end)
    mine = group - t.load(r.offset, 0)
    valid = mine.below(groups.num_experts) & (at < found.tiles)
    pairs, place = end - begin, at - first
    start, height = cut_list.share(t, groups.cut, pairs, _tiles(groups, pairs), place)
    latest = t.select(pairs > height, pairs - height, 0)
    start = t.select(start < latest, start, latest)
    row = begin + t.select(valid, start, place * groups.heights[0])
    stop = row + groups.heights[0]
    stop = t.select(stop < end, stop, end)
    own = t.select(pairs < height, pairs, height)
    return (
        t.select(valid, mine, -1),
        row,
        t.select(valid, row + height, row),
        t.select(valid, own, 0),
        row,
        t.select(valid, row, stop),
    )


def _sum(t: Simt, groups: Groups, a: Int, b: Int) -> Int:
    """Of values in [0, num_rows]: at most num_rows."""
    total = a + b
    return t.select(total < groups.num_rows, total, groups.num_rows)


def _clipped(t: Simt, groups: Groups, size: Int) -> Int:
    """A group's size as it counts: in [0, num_rows]."""
    size = t.select(size > 0, size, 0)
    return t.select(size < groups.num_rows, size, groups.num_rows)


def _tiles(groups: Groups, rows: Int) -> Int:
    """Of so many rows."""
    return (rows + (groups.heights[0] - 1)) // groups.heights[0]


def _scan(t: Simt, r: SimpleNamespace, groups: Groups) -> _Scanned:
    """Where the rows and the tiles of each of the lane's groups begin."""
    lane = t.thread_id() % WARP
    each = -(-groups.count // WARP)

    add = functools.partial(_sum, t, groups)
    loaded = []
    for k in range(each):
        group = lane + k * WARP
        there = group < groups.count
        loaded.append((there, t.load(r.sizes, t.select(there, group, 0))))
    sums, distance = [], 1
    for there, size in loaded:
        sums.append(t.select(there, _clipped(t, groups, size), 0))
    while distance < WARP:  # the scans of all k side by side
        others = [t.shfl_up(value, distance) for value in sums]
        sums = [
            add(value, t.select(lane >= distance, other, 0))
            for value, other in zip(sums, others, strict=True)
        ]
        distance *= 2
    rows, begins, tiles = t.const(0), [], [t.const(0)]
    for value in sums:
        before = t.shfl_up(value, 1)
        begins.append(add(rows, t.select(lane > 0, before, 0)))
        tiles.append(tiles[-1] + _tiles(groups, add(rows, value) - begins[-1]))
        rows = add(rows, t.shfl(value, WARP - 1))
    place = _reversed(lane)
    counts = t.shfl(tiles[-1], place)  # of the lane that is taken at this place
    through = warp_inclusive_scan(t, counts, lane)
    first = t.shfl(through - counts, place)
    firsts = [first + value for value in tiles]
    return _Scanned(begins, firsts, rows, t.shfl(through, WARP - 1))


def _reversed(lane: Any) -> Any:
    """A lane's five bits from the last to the first, of any integers."""
    low = ((lane & 1) << 4) | ((lane & 2) << 2)
    return low | (lane & 4) | ((lane >> 2) & 2) | ((lane >> 4) & 1)


# -- for the interpreter, which runs none of that -----------------------------------------------


def count_plainly(problem: MatmulProblem, config: Config, sizes: Any, offset: Any) -> jax.Array:
    """What `count` says."""
    del offset

    def step(group, before):
        begin, end = _rows_plainly(problem, sizes, group, before[0])
        return end, before[1] + _tiles_plainly(config, end - begin)

    rows, tiles = lax.fori_loop(0, problem.num_groups, step, (_I32(0), _I32(0)))
    return tiles + _tiles_plainly(config, problem.num_rows - rows)


def find_plainly(
    problem: MatmulProblem, config: Config, sizes: Any, offset: Any, at: jax.Array
) -> tuple[jax.Array, ...]:
    """What `find` says, one group after the other, in the order of their tiles."""
    zero, most = _I32(0), config.heights[0]
    each = -(-problem.num_groups // WARP)

    def look(place, carry):
        before, found = carry
        turn = lax.div(place, _I32(each))
        group = (place - turn * each) * WARP + _reversed(turn)
        there = group < problem.num_groups

        def up_to(other, rows):
            return _rows_plainly(problem, sizes, other, rows)[1]

        begin = lax.fori_loop(0, jnp.where(there, group, 0), up_to, zero)
        own = jnp.minimum(group, problem.num_groups - 1)
        end = jnp.where(there, _rows_plainly(problem, sizes, own, begin)[1], begin)
        after = before + _tiles_plainly(config, end - begin)
        mine = (at >= before) & (at < after)
        here = before, begin, end, group
        return after, tuple(jnp.where(mine, a, b) for a, b in zip(here, found, strict=True))

    nothing = zero, zero, zero, _I32(-1)
    tiles, found = lax.fori_loop(0, each * WARP, look, (zero, nothing))
    first, begin, end, group = found
    rows = lax.fori_loop(
        0, problem.num_groups, lambda g, rows: _rows_plainly(problem, sizes, g, rows)[1], zero
    )
    behind = at >= tiles
    first, begin = jnp.where(behind, tiles, first), jnp.where(behind, rows, begin)
    end = jnp.where(behind, problem.num_rows, end)
    mine = group - offset[0]
    valid = (mine >= 0) & (mine < problem.num_experts) & jnp.logical_not(behind)
    pairs, place = end - begin, at - first
    shared = jnp.maximum(_tiles_plainly(config, pairs), 1)
    start, height = share_plainly(config, pairs, shared, place)
    start = jnp.minimum(start, jnp.maximum(pairs - height, 0))
    row = begin + jnp.where(valid, start, place * most)
    stop = jnp.minimum(row + most, end)
    return (
        jnp.where(valid, mine, -1),
        row,
        jnp.where(valid, row + height, row),
        jnp.where(valid, jnp.minimum(pairs, height), 0),
        row,
        jnp.where(valid, row, stop),
    )


def _rows_plainly(problem: MatmulProblem, sizes: Any, group: Any, begin: Any) -> tuple[Any, Any]:
    """(First row, the row behind the last) of a group that begins there."""
    return begin, begin + jnp.clip(sizes[group], 0, problem.num_rows - begin)


def _tiles_plainly(config: Config, rows: Any) -> jax.Array:
    """Of so many rows."""
    return lax.div(rows + (config.heights[0] - 1), _I32(config.heights[0]))
