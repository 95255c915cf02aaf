"""Ranks the pairs of a CTA within each expert, sorts them, and writes every pair to its row.

The forms "grid" and "cluster" share this. They differ in how a CTA learns the counts of the other CTAs.
docs/kernels.md draws how a tile is sorted.
"""

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace

from moe_align_jax._align.kernels import common, counting
from moe_align_jax._align.tables import BlockAlignMosaicConfig
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, Int, Simt
from moe_align_jax.types import AlignProblem

_HALF = 16  # a column and a rank (or a place in the tile) share a word
_LOW = (1 << _HALF) - 1
_MOST_WORDS = 40  # in a thread's registers: its pairs, the warps' counts of its experts
_LOADS_AT_ONCE = 16  # of the warps' counts, where they are read again
_WRITE_ROUNDS = 4  # loads of a tile in flight at a time when it is written


class Columns:
    """Where an expert's counts stand in a warp's histogram.

    A thread scans `per_thread` neighbouring experts. They stand `run` words apart, so that the threads of a
    warp meet no bank twice.
    """

    def __init__(self, num_experts: int, threads: int):
        self.per_thread = 1 << (-(-num_experts // threads) - 1).bit_length()
        self.run = -(-num_experts // self.per_thread)
        self.count = self.per_thread * self.run
        self.stride = -(-self.count // 4) * 4
        self.bits = common.bin_bits(self.count)
        self._shift = self.per_thread.bit_length() - 1

    def of(self, t: Simt, expert: Int) -> Int:
        """The expert's column; -1 for a dropped pair (expert -1)."""
        if self.per_thread == 1:
            return expert
        column = (expert & (self.per_thread - 1)) * self.run + (expert >> self._shift)
        return t.select(expert >= 0, column, -1)

    def expert(self, column: Int) -> Int:
        """The expert whose counts stand in a column: the inverse of `of`."""
        if self.per_thread == 1:
            return column
        return column % self.run * self.per_thread + column // self.run


@dataclass(frozen=True)
class Tile:
    """A tile of a CTA's pairs after they were ranked.

    Attributes:
        first: its first pair.
        held: each pair's column and rank in its warp, in one word; negative for a dropped pair.
        counts: pairs of each expert of this thread; None where they were not needed.
        by_warp: the same for each warp, where there are registers for them.
        local_starts: with `local_sort`, their first places in the sorted tile.
        kept: with `local_sort`, pairs that are not dropped.
    """

    first: Int
    held: list[Int]
    counts: list[Int] | None = None
    by_warp: list[list[Int]] | None = None
    local_starts: list[Int] | None = None
    kept: Int | None = None


class Placer:
    """The body of the place kernel, one phase per method.

    Within a method "my" experts are those that this thread scans, and "my" pairs those of this CTA.
    """

    def __init__(
        self,
        t: Simt,
        r: SimpleNamespace,
        problem: AlignProblem,
        partition: counting.Partition,
        *,
        local_sort: bool,
    ):
        self.t, self.r, self.problem, self.partition, self.local_sort = (
            t,
            r,
            problem,
            partition,
            local_sort,
        )
        self.tid, self.lane, self.warp = common.thread_ids(t)
        self.cta = t.cta_id()
        self.columns = columns = Columns(problem.num_experts, partition.threads)
        self.row_of_warp = self.warp * columns.stride
        self.sizes, self.limit = common.Sizes(t, r, problem), None
        self.tiles = partition.tiles_of(self.sizes.num_pairs)
        numbers = range(columns.per_thread)
        self.mine = [self.tid * columns.per_thread + k for k in numbers]  # experts
        self.my_columns = [self.tid + k * columns.run for k in numbers]
        self.valid = [e < problem.num_experts for e in self.mine]
        run = self.warp * (partition.rounds * WARP)
        self.places = [run + (k * WARP + self.lane) for k in range(partition.rounds)]  # in a tile

    # -- the pairs of this CTA alone

    def first_of(self, tile: Int | int) -> Int:
        """The first pair of this CTA's tile of that number."""
        return self.cta * (self.tiles * self.partition.tile) + tile * self.partition.tile

    def read_tile(self, first: Int) -> list[Int]:
        """Loads the experts of this thread's pairs of the tile that starts at pair `first`: -1 for a dropped
        pair."""
        t, r, problem = self.t, self.r, self.problem
        self.limit = common.pair_limit(t, r, problem)
        return [
            common.read_expert(t, r, problem, self.sizes, first + p, self.limit)
            for p in self.places
        ]

    def clear_histogram(self) -> None:
        """Zeros to the histograms of all warps."""
        words = self.partition.num_warps * self.columns.stride
        collectives.fill(
            self.t, self.r.histogram, 0, words, self.tid, self.partition.threads, vector=True
        )

    def rank(self, first: Int, experts: list[Int]) -> Tile:
        """Counts the pairs into the warps' histograms (cleared, a `block_sync` ago; one follows)."""
        t, columns, held = self.t, self.columns, []
        for expert in experts:
            column = columns.of(t, expert)
            place = collectives.tally(
                t, self.r.histogram, self.row_of_warp, column, self.lane, *columns.bits
            )
            held.append((column << _HALF) | place)
        return Tile(first, held)

    def _cells(self, k: int) -> list[Int]:
        """My k-th expert's counts of all warps."""
        stride = self.columns.stride
        return [self.my_columns[k] + w * stride for w in range(self.partition.num_warps)]

    def count(self, tile: Tile) -> Tile:
        """The tile with `counts`, sums over the warps' histograms; with `by_warp` where registers hold the
        parts."""
        t = self.t
        zero, words = (
            t.const(0),
            self.partition.num_warps * len(self.mine) + 2 * self.partition.rounds,
        )
        keep = words <= _MOST_WORDS
        counts, by_warp = [], []
        for k, ok in enumerate(self.valid):
            if keep:
                safe = t.select(ok, self.my_columns[k], 0)
                stride = self.columns.stride
                cells = [safe + w * stride for w in range(self.partition.num_warps)]
                by_warp.append([t.load(self.r.histogram, cell) for cell in cells])
                counts.append(t.select(ok, sum(by_warp[k], zero), 0))
            else:
                total = lambda k=k: sum((t.load(self.r.histogram, c) for c in self._cells(k)), zero)  # noqa: E731
                counts.append(collectives.value_if(t, ok, total, 0))
        return dataclasses.replace(tile, counts=counts, by_warp=by_warp if keep else None)

    def sort(self, tile: Tile) -> Tile:
        """Sorts a tile by expert in shared memory; a `block_sync` follows."""
        t, r = self.t, self.r
        tile = self.count(tile)
        assert tile.counts is not None  # for the type checker
        start, kept = collectives.block_exclusive_scan(t, sum(tile.counts, t.const(0)), r.scratch)
        starts = []
        for k, count in enumerate(tile.counts):
            starts.append(start)
            self._spread(tile, k, start)
            start = start + count
        t.block_sync()
        for place, word in zip(self.places, tile.held, strict=True):
            with t.if_(word >= 0):
                t.store(r.sorted, self._at(word), (word ^ (word & _LOW)) | place)
        return dataclasses.replace(tile, local_starts=starts, kept=kept)

    def _spread(self, tile: Tile, k: int, start: Int) -> Int:
        """Replaces each warp's count of my k-th expert by the place of its first pair, from `start` on.

        Returns the sum of the counts.
        """
        t, r = self.t, self.r

        def scan() -> Int:
            cells, running = self._cells(k), start
            for first in range(0, len(cells), _LOADS_AT_ONCE):
                some = cells[first : first + _LOADS_AT_ONCE]
                counts = (
                    [t.load(r.histogram, cell) for cell in some]
                    if tile.by_warp is None
                    else tile.by_warp[k][first : first + _LOADS_AT_ONCE]
                )
                for cell, count in zip(some, counts, strict=True):
                    t.store(r.histogram, cell, running)
                    running = running + count
            return running - start

        return collectives.value_if(t, self.valid[k], scan, 0)

    def _at(self, word: Int) -> Int:
        """The place of a pair: its warp's first place for the expert (`_spread`), plus its rank there."""
        return self.t.load(self.r.histogram, self.row_of_warp + (word >> _HALF)) + (word & _LOW)

    # -- all pairs

    def scan(self, totals: list[Int], before: list[Int]) -> tuple[list[Int], Int]:
        """The row of this CTA's first pair of each of my experts, and the rows in use.

        `totals`: all pairs of an expert; `before`: those of the CTAs before mine.
        """
        t, r, problem = self.t, self.r, self.problem
        padded = [common.padded(total, problem.block_size) for total in totals]
        start, in_use = collectives.block_exclusive_scan(t, sum(padded, t.const(0)), r.scratch2)
        starts = []
        for k, (e, total, size) in enumerate(zip(self.mine, totals, padded, strict=True)):
            starts.append(start + before[k])
            with t.if_(self.valid[k]):
                t.store(r.filled, e, start + total)
                # mutant: an expert's padding ends one row early
                t.store(r.end, e, start + size)
                if problem.return_counts:
                    with t.if_(self.cta.eq(0)):
                        t.store(r.tokens_per_expert, e, total)
            start = start + size
        with t.if_(self.cta.eq(0) & self.tid.eq(0)):
            t.store(r.num_tokens_post_padded, 0, in_use)
        return starts, in_use

    def _write_row(self, row: Int, pair: Int, column: Int) -> None:
        """Writes a pair to its row; a block's first row also names the block's expert, that of `column`."""
        self.t.store(self.r.sorted_token_ids, row, pair)
        common.name_block(self.t, self.r, self.problem, row, self.columns.expert(column))

    def scatter(self, tile: Tile, starts: list[Int]) -> list[Int]:
        """Every pair of a tile to its row; returns the counts of my experts."""
        return (self._scatter_sorted if self.local_sort else self._scatter_unsorted)(tile, starts)

    def _scatter_unsorted(self, tile: Tile, starts: list[Int]) -> list[Int]:
        """Writes a tile's pairs straight to their rows, which begin at `starts` for this thread's experts.

        Gives the counts of these experts in the tile.
        """
        t = self.t
        counts = [self._spread(tile, k, start) for k, start in enumerate(starts)]
        # mutant: places are read before they are written
        t.block_sync()
        for place, word in zip(self.places, tile.held, strict=True):
            row = collectives.value_if(t, word >= 0, lambda w=word: self._at(w), 0)
            with t.if_(word >= 0):
                self._write_row(row, tile.first + place, word >> _HALF)
            self._write_inverse(tile.first + place, word, row)
        return counts

    def _scatter_sorted(self, tile: Tile, starts: list[Int]) -> list[Int]:
        """As `_scatter_unsorted`, of a tile that is sorted in shared memory: neighbouring threads write
        neighbouring rows."""
        t, r = self.t, self.r
        assert tile.counts is not None and tile.local_starts is not None and tile.kept is not None
        for k, (start, local) in enumerate(zip(starts, tile.local_starts, strict=True)):
            with t.if_(self.valid[k]):
                t.store(r.delta, self.my_columns[k], start - local)
        # mutant: the sorted tile is read without a barrier
        t.block_sync()
        rounds, threads = self.partition.rounds, self.partition.threads
        with t.if_(tile.kept > 0):
            for begin in range(0, rounds, _WRITE_ROUNDS):
                cells = [
                    self.tid + k * threads for k in range(begin, min(begin + _WRITE_ROUNDS, rounds))
                ]
                words = [t.load(r.sorted, t.select(c < tile.kept, c, 0)) for c in cells]
                rows = [
                    cell + t.load(r.delta, word >> _HALF)
                    for cell, word in zip(cells, words, strict=True)
                ]
                for cell, word, row in zip(cells, words, rows, strict=True):
                    with t.if_(cell < tile.kept):
                        self._write_row(row, tile.first + (word & _LOW), word >> _HALF)
        if self.problem.return_inverse:
            for place, word in zip(self.places, tile.held, strict=True):
                row = collectives.value_if(
                    t, word >= 0, lambda w=word: self._at(w) + t.load(r.delta, w >> _HALF), 0
                )
                self._write_inverse(tile.first + place, word, row)
        return tile.counts

    def _write_inverse(self, pair: Int, word: Int, row: Int) -> None:
        """Writes the row of a pair, or -1 of a dropped one (`word` negative), where it is asked for."""
        common.write_inverse(self.t, self.r, self.problem, self.sizes, pair, word, row)

    def fill(self, in_use: Int) -> None:
        """Writes -1 and the sentinel to the blocks and rows without a pair; `in_use` rows are taken."""
        t, r, sizes = self.t, self.r, self.sizes
        everyone = self.partition.num_ctas * self.partition.threads
        me = self.cta * self.partition.threads + self.tid
        first_block = in_use // self.problem.block_size
        for b in collectives.strided(t, first_block + me, sizes.num_blocks, everyone):
            t.store(r.expert_ids, b, -1)
        self._fill_padding(me, everyone)
        for i in collectives.strided(t, in_use + me, sizes.capacity, everyone):
            t.store(r.sorted_token_ids, i, sizes.num_pairs)

    def _fill_padding(self, me: Int, everyone: int) -> None:
        """Writes the sentinel behind each expert's last pair; a group of lanes per expert, within a block."""
        t, r, problem = self.t, self.r, self.problem
        width = min(WARP, 1 << (problem.block_size - 1).bit_length())
        group, lane = me >> (width.bit_length() - 1), me & (width - 1)
        for first in range(0, problem.num_experts, everyone // width):
            e = group + first
            inside = e < problem.num_experts
            safe = t.select(inside, e, 0)
            start, end = t.load(r.filled, safe), t.load(r.end, safe)
            end = t.select(inside, end, start)
            if problem.block_size <= 4 * width:
                cells = [start + (lane + step) for step in range(0, problem.block_size - 1, width)]
                for i in cells:
                    with t.if_(i < end):
                        t.store(r.sorted_token_ids, i, self.sizes.num_pairs)
            else:
                for i in t.for_range(start + lane, end, width):
                    t.store(r.sorted_token_ids, i, self.sizes.num_pairs)


def partition_of(problem: AlignProblem, config: BlockAlignMosaicConfig) -> counting.Partition:
    """How the kernels cut up the pairs of a problem, with the sizes of that configuration."""
    return counting.Partition(
        num_pairs=problem.num_pairs,
        num_bins=problem.num_experts,
        num_ctas=config.num_ctas,
        num_warpgroups=config.num_warpgroups,
        rounds=config.rounds,
        cluster=config.cluster,
    )


def shared_of(partition: counting.Partition, *, local_sort: bool) -> dict[str, int]:
    """Words of each shared-memory array that a `Placer` needs, by name."""
    stride = Columns(partition.num_bins, partition.threads).stride
    shared = {
        "histogram": partition.num_warps * stride,
        "filled": stride,  # all pairs, then the row past the last pair
        "end": stride,
        "scratch": WARP,
        "scratch2": WARP,
    }
    if local_sort:
        shared |= {
            "delta": stride,
            "sorted": partition.tile,
        }  # row of a pair - its place in the tile
    return shared
