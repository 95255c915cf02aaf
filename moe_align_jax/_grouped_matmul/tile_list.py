"""The kernel that makes the list of tiles, of groups of rows whose sizes are known on the device only.

One CTA. Each thread has some neighbouring groups: two scans over the threads tell where their rows and their
tiles begin. Then each warp writes the tiles of every num_warps-th group.

G groups; those behind the last one's rows, of "ragged", are group G, without weights.
"""

from types import SimpleNamespace
from typing import NamedTuple

from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._simt.collectives import block_exclusive_scan
from moe_align_jax._simt.language import WARP, Int, Kernel, Program, Simt

_WARPGROUPS = 4
_THREADS = 128 * _WARPGROUPS


class TileList(NamedTuple):
    """Groups, and the tiles that their rows are cut into.

    Attributes:
        ragged: groups follow each other; otherwise group g has rows `g * max_rows` on.
        num_groups: G.
        num_experts: weights that there are.
        num_rows: of the array.
        max_rows: of a group that is not ragged.
        bm: rows of a tile.
    """

    ragged: bool
    num_groups: int
    num_experts: int
    num_rows: int
    max_rows: int
    bm: int

    @property
    def capacity(self) -> int:
        """Tiles that there can be."""
        if not self.ragged:
            return self.num_groups * -(-self.max_rows // self.bm)
        return -(-self.num_rows // self.bm) + self.num_groups + 1


def of(problem: MatmulProblem, bm: int) -> TileList:
    """The list for a problem whose rows are "ragged" or "masked", with tiles of `bm` rows."""
    ragged = problem.rows == "ragged"
    groups = problem.num_groups if ragged else problem.num_experts
    return TileList(ragged, groups, problem.num_experts, problem.num_rows, problem.max_rows, bm)


def build(tiles: TileList) -> Program:
    """`(sizes [G], offset [1] if ragged) -> (count [1], expert, start and end of each tile [capacity])`.

    Rows of a tile are `[start, min(start + bm, end))`, of the masked layout those in use. An expert of -1:
    they are zero.
    """
    inputs: dict[str, tuple[int, ...]] = {"sizes": (tiles.num_groups,)}
    if tiles.ragged:
        inputs["offset"] = (1,)
    listed = ("expert", "start", "end")
    outputs = {"count": (1,)} | dict.fromkeys(listed, (tiles.capacity,))
    groups = tiles.num_groups + tiles.ragged
    kernel = Kernel(
        name="list_tiles",
        body=lambda t, r: _Body(t, r, tiles).run(),
        inputs=inputs,
        outputs=outputs,
        shared={
            "first": groups + 1,
            "begin": groups + 1,
            "row_sums": WARP,
            "tile_sums": WARP,
        },
        num_warpgroups=_WARPGROUPS,
        num_ctas=1,
        partial=frozenset(listed),
    )
    return Program(inputs=inputs, kernels=(kernel,), results=tuple(outputs))


class _Body:
    """What the one CTA does: a thread counts the tiles of neighbouring groups, then a warp writes those of a
    group."""

    def __init__(self, t: Simt, r: SimpleNamespace, tiles: TileList):
        self.t, self.r, self.tiles = t, r, tiles
        self.tid = t.thread_id()
        self.lane, self.warp = self.tid & (WARP - 1), self.tid >> 5
        self.groups = tiles.num_groups + tiles.ragged  # that have tiles
        self.each = -(-self.groups // _THREADS)  # of a thread

    def run(self) -> None:
        """Counts the tiles, and lists them."""
        t, r = self.t, self.r
        t.grid_dependency_wait()
        offset = t.load(r.offset, 0) if self.tiles.ragged else t.const(0)
        sizes = self.sizes()
        begins = self.begins(sizes)
        self.count(sizes, begins)
        t.block_sync()
        self.write(offset)

    def sizes(self) -> list[Int]:
        """Rows of each of the thread's groups, in [0, most]; those of group G are found later."""
        t, tiles, found = self.t, self.tiles, []
        most = tiles.num_rows if tiles.ragged else tiles.max_rows
        for k in range(self.each):
            group = self.tid * self.each + k
            there = group < tiles.num_groups
            size = t.load(self.r.sizes, t.select(there, group, 0))
            size = t.select(there & (size > 0), size, 0)
            found.append(t.select(size < most, size, most))
        return found

    def begins(self, sizes: list[Int]) -> list[Int]:
        """The first row of each, and the row behind the last."""
        tiles = self.tiles
        if not tiles.ragged:
            return [(self.tid * self.each + k) * tiles.max_rows for k in range(self.each)]
        total = sizes[0]
        for size in sizes[1:]:
            total = self.add(total, size)
        running = self.saturated_exclusive_scan(total)
        found = [running]
        for size in sizes:
            found.append(self.add(found[-1], size))
        return found

    def add(self, a: Int, b: Int) -> Int:
        """Of values in [0, num_rows], below 2**30: at most num_rows."""
        total = a + b
        return self.t.select(total < self.tiles.num_rows, total, self.tiles.num_rows)

    def saturated_exclusive_scan(self, x: Int) -> Int:
        """Sums over the threads before mine, cut off at num_rows."""
        t, num_warps = self.t, _THREADS // WARP
        inclusive, distance = x, 1
        while distance < WARP:
            other = t.shfl_up(inclusive, distance)
            more = self.add(inclusive, t.select(self.lane >= distance, other, 0))
            inclusive, distance = more, 2 * distance
        with t.if_(self.lane.eq(WARP - 1)):
            t.store(self.r.row_sums, self.warp, inclusive)
        t.block_sync()
        at = t.select(self.lane < num_warps, self.lane, num_warps - 1)
        sums, distance = t.load(self.r.row_sums, at), 1
        while distance < num_warps:
            other = t.shfl_up(sums, distance)
            sums = self.add(sums, t.select(self.lane >= distance, other, 0))
            distance *= 2
        before = t.shfl(sums, t.select(self.warp > 0, self.warp - 1, 0))
        before = t.select(self.warp > 0, before, 0)
        mine = t.shfl_up(inclusive, 1)
        return self.add(before, t.select(self.lane > 0, mine, 0))

    def count(self, sizes: list[Int], begins: list[Int]) -> None:
        """`first[g]`: tiles before group g; `begin[g]`: its first row. One more of each: the end.

        Of the masked layout, where the first row is known, `begin[g]` is the row behind the last in use.
        """
        t, r, tiles = self.t, self.r, self.tiles
        counts = []
        for k, size in enumerate(sizes):
            rows = size
            if tiles.ragged:
                group = self.tid * self.each + k
                rows = begins[k + 1] - begins[k]
                rest = tiles.num_rows - begins[k]
                rows = t.select(group.eq(tiles.num_groups), rest, rows)
            counts.append((rows + (tiles.bm - 1)) // tiles.bm)
        total = counts[0]
        for more in counts[1:]:
            total = total + more
        running, everything = block_exclusive_scan(t, total, r.tile_sums)
        for k, count in enumerate(counts):
            group = self.tid * self.each + k
            with t.if_(group < self.groups):
                t.store(r.first, group, running)
                t.store(r.begin, group, begins[k] if tiles.ragged else begins[k] + sizes[k])
            running = running + count
        with t.if_(self.tid.eq(0)):
            t.store(r.first, self.groups, everything)
            t.store(r.begin, self.groups, tiles.num_rows)
            t.store(r.count, 0, everything)

    def write(self, offset: Int) -> None:
        """Lists the tiles of each group; `offset` is the number of the first group whose weights are here."""
        t, r, tiles = self.t, self.r, self.tiles
        num_warps = _THREADS // WARP
        for group in t.for_range(self.warp, self.groups, num_warps):
            first, last = t.load(r.first, group), t.load(r.first, group + 1)
            begin, end, expert = group * tiles.max_rows, t.load(r.begin, group), group
            if tiles.ragged:
                begin, end = end, t.load(r.begin, group + 1)
                mine = group - offset
                expert = t.select(mine.below(tiles.num_experts), mine, -1)
                expert = t.select(group < tiles.num_groups, expert, -1)
            for tile in t.for_range(first + self.lane, last, WARP):
                t.store(r.expert, tile, expert)
                t.store(r.start, tile, begin + (tile - first) * tiles.bm)
                t.store(r.end, tile, end)
