"""From about 2K pairs: two kernels over many CTAs, a counting sort by expert (see counting.py).

With several rounds per warp a CTA first sorts its pairs by expert in shared memory, so that its stores run
along each expert (`local_sort`). Inputs of any length go through in tiles.
Bytes: ids read twice, histograms (num_ctas / cluster * E * 2 B) written once and read by every CTA, every
output written once. Deterministic.
"""

from types import SimpleNamespace
from typing import Any

from moe_align_jax._kernels.block_align import common, counting
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, Int, Kernel, Program, Simt
from moe_align_jax._tuning import BlockAlignMosaicConfig
from moe_align_jax.types import AlignProblem

_HALF = 16  # a column and a rank (or a place in the tile) share a word
_LOW = (1 << _HALF) - 1
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
        """-1 of -1."""
        if self.per_thread == 1:
            return expert
        column = (expert & (self.per_thread - 1)) * self.run + (expert >> self._shift)
        return t.select(expert >= 0, column, -1)

    def expert(self, column: Int) -> Int:
        if self.per_thread == 1:
            return column
        return column % self.run * self.per_thread + column // self.run


def build(problem: AlignProblem, config: BlockAlignMosaicConfig, *, vector: bool) -> Program:
    del vector  # its stores are 4 bytes wide
    num_experts, block_size = problem.num_experts, problem.block_size
    layout = counting.Layout(
        num_pairs=problem.num_pairs,
        num_bins=num_experts,
        num_ctas=config.num_ctas,
        num_warpgroups=config.num_warpgroups,
        rounds=config.rounds,
        cluster=config.cluster,
    )
    threads, num_warps, rounds = layout.threads, layout.num_warps, layout.rounds
    columns = Columns(num_experts, threads)
    stride = columns.stride
    local_sort, one_tile = config.local_sort, layout.tiles == 1

    def read_bin(t: Simt, r: SimpleNamespace, pair: Int) -> Int:
        sizes, limit = common.Sizes(t, r, problem), common.pair_limit(t, r, problem)
        return common.read_expert(t, r, problem, sizes, pair, limit)

    def place(t: Simt, r: SimpleNamespace) -> None:
        tid, lane, warp = common.thread_ids(t)
        cta = t.cta_id()
        row_of_warp = warp * stride
        sizes, limit = common.Sizes(t, r, problem), common.pair_limit(t, r, problem)
        tiles = layout.tiles_of(sizes.num_pairs)
        mine = [tid * columns.per_thread + k for k in range(columns.per_thread)]  # experts
        my_columns = [tid + k * columns.run for k in range(columns.per_thread)]
        valid = [e < num_experts for e in mine]
        places = [warp * (rounds * WARP) + (k * WARP + lane) for k in range(rounds)]  # in a tile

        def first_of(tile: Int | int) -> Int:
            return cta * (tiles * layout.tile) + tile * layout.tile

        def read_tile(first: Int) -> list[Int]:
            return [common.read_expert(t, r, problem, sizes, first + p, limit) for p in places]

        def clear_histogram() -> None:
            collectives.fill(t, r.histogram, 0, num_warps * stride, tid, threads, vector=True)

        def rank(experts: list[Int]) -> list[Int]:
            """Each pair's column and its rank in the warp, in one word; negative for a dropped pair."""
            held = []
            for expert in experts:
                column = columns.of(t, expert)
                place = collectives.tally(
                    t, r.histogram, row_of_warp, column, lane, columns.bits
                )
                held.append((column << _HALF) | place)
            return held

        def count_of(k: int) -> Int:
            """Pairs of the tile of my k-th expert."""
            cells = [my_columns[k] + w * stride for w in range(num_warps)]
            return t.value_if(
                valid[k], lambda: sum((t.load(r.histogram, c) for c in cells), t.const(0)), 0
            )

        def scan_experts(in_tile: list[Int]) -> tuple[list[Int], Int, tuple[Int, Int] | None]:
            """Where this CTA's pairs of my experts begin, and the rows in use; the scan of `in_tile`."""
            safe = [t.select(ok, e, 0) for ok, e in zip(valid, mine, strict=True)]
            totals = [
                t.select(ok, t.load(r.filled, e), 0) for ok, e in zip(valid, safe, strict=True)
            ]
            before = [t.load(r.start, e) for e in safe]
            padded = [common.padded(total, block_size) for total in totals]
            scans = [sum(padded, t.const(0))] + ([sum(in_tile, t.const(0))] if in_tile else [])
            (start, in_use), *local = collectives.block_exclusive_scans(t, scans, r.scratch)
            starts = []
            for k, (e, total, size) in enumerate(zip(mine, totals, padded, strict=True)):
                starts.append(start + before[k] + within[k])
                with t.if_(valid[k]):
                    t.store(r.filled, e, start + total)
                    t.store(r.end, e, start + size)
                    if problem.return_counts:
                        with t.if_(cta.eq(0)):
                            t.store(r.tokens_per_expert, e, total)
                start = start + size
            with t.if_(cta.eq(0) & tid.eq(0)):
                t.store(r.num_tokens_post_padded, 0, in_use)
            return starts, in_use, local[0] if local else None

        def place_columns(k: int, start: Int, local_start: Int | None) -> Int:
            """Turns my k-th expert's counts into the first row (with `local_sort`, the first place in the
            sorted tile) of each warp; returns their sum."""

            def scan() -> Int:
                cells = [my_columns[k] + w * stride for w in range(num_warps)]
                counts = [t.load(r.histogram, cell) for cell in cells]
                running = first = start if local_start is None else local_start
                for cell, count in zip(cells, counts, strict=True):
                    t.store(r.histogram, cell, running)
                    running = running + count
                if local_start is not None:
                    t.store(r.delta, my_columns[k], start - local_start)
                return running - first

            return t.value_if(valid[k], scan, 0)

        def write_row(row: Int, pair: Int, column: Int) -> None:
            t.store(r.sorted_token_ids, row, pair)
            common.name_block(t, r, problem, row, columns.expert(column))

        def scatter(first: Int, held: list[Int], in_tile: Int | None) -> None:
            """Every pair of the tile to its row."""
            for place, word in zip(places, held, strict=True):
                kept, column = word >= 0, word >> _HALF
                at = t.value_if(
                    kept,
                    lambda c=column, w=word: t.load(r.histogram, row_of_warp + c) + (w & _LOW),
                    0,
                )
                row = at
                if local_sort:
                    with t.if_(kept):
                        t.store(r.sorted, at, (column << _HALF) | place)
                    if problem.return_inverse:
                        row = at + t.value_if(kept, lambda c=column: t.load(r.delta, c), 0)
                else:
                    with t.if_(kept):
                        write_row(row, first + place, column)
                common.write_inverse(t, r, problem, sizes, first + place, word, row)
            if in_tile is None:
                return
            t.block_sync()
            with t.if_(in_tile > 0):
                for begin in range(0, rounds, _WRITE_ROUNDS):
                    chunk = range(begin, min(begin + _WRITE_ROUNDS, rounds))
                    cells = [tid + k * threads for k in chunk]
                    words = [t.load(r.sorted, t.select(c < in_tile, c, 0)) for c in cells]
                    rows = [
                        cell + t.load(r.delta, word >> _HALF)
                        for cell, word in zip(cells, words, strict=True)
                    ]
                    for cell, word, row in zip(cells, words, rows, strict=True):
                        with t.if_(cell < in_tile):
                            write_row(row, first + (word & _LOW), word >> _HALF)

        def place_tile(first: Int, held: list[Int], starts: list[Int], local: Any) -> list[Int]:
            """After the tile was ranked and counted; returns the counts of my experts."""
            local_start, in_tile = local if local_sort else (None, None)
            counts = []
            for k, start in enumerate(starts):
                counts.append(place_columns(k, start, local_start))
                if local_sort:
                    local_start = local_start + counts[-1]
            t.block_sync()
            scatter(first, held, in_tile)
            return counts

        experts = read_tile(first_of(0)) if one_tile else []
        clear_histogram()
        sums = counting.HistogramSums(t, r, layout, "histograms")
        for zeroed in (r.start, r.filled):
            collectives.fill(t, zeroed, 0, stride, tid, threads, vector=True)
        t.grid_dependency_wait()
        t.launch_dependents()
        sums.read()
        within = [sums.before_me(t.select(ok, e, 0)) for ok, e in zip(valid, mine, strict=True)]
        t.block_sync()
        held = rank(experts)
        sums.add(before="start", totals="filled")
        t.block_sync()
        counted = [count_of(k) for k in range(columns.per_thread)] if local_sort and one_tile else []
        starts, in_use, local = scan_experts(counted)
        if one_tile:
            place_tile(first_of(0), held, starts, local)
        else:
            for e, ok, start in zip(mine, valid, starts, strict=True):
                with t.if_(ok):
                    t.store(r.start, e, start)
            for tile in t.for_range(0, tiles):
                held = rank(read_tile(first_of(tile)))
                t.block_sync()
                if local_sort:
                    in_tile = sum((count_of(k) for k in range(columns.per_thread)), t.const(0))
                    local = collectives.block_exclusive_scan(t, in_tile, r.scratch)
                starts = [
                    t.value_if(ok, lambda e=e: t.load(r.start, e), 0)
                    for ok, e in zip(valid, mine, strict=True)
                ]
                counts = place_tile(first_of(tile), held, starts, local)
                for e, ok, start, count in zip(mine, valid, starts, counts, strict=True):
                    with t.if_(ok):
                        t.store(r.start, e, start + count)
                t.block_sync()
                clear_histogram()
                t.block_sync()

        # Blocks and rows that no pair takes.
        everyone = layout.num_ctas * threads
        me = cta * threads + tid
        for b in collectives.strided(t, in_use // block_size + me, sizes.num_blocks, everyone):
            t.store(r.expert_ids, b, -1)
        fill_padding(t, r, me, sizes.num_pairs)
        for i in collectives.strided(t, in_use + me, sizes.capacity, everyone):
            t.store(r.sorted_token_ids, i, sizes.num_pairs)

    def fill_padding(t: Simt, r: SimpleNamespace, me: Int, sentinel: Int | int) -> None:
        """A group of lanes per expert, no wider than a block."""
        width = min(WARP, 1 << max(block_size - 1, 1).bit_length() - 1)
        groups = layout.num_ctas * threads // width
        group, lane = me >> (width.bit_length() - 1), me & (width - 1)
        for first in range(0, num_experts, groups):
            e = group + first
            inside = e < num_experts
            safe = t.select(inside, e, 0)
            start, end = t.load(r.filled, safe), t.load(r.end, safe)
            end = t.select(inside, end, start)
            if block_size <= 4 * width:
                for step in range(0, block_size - 1, width):
                    with t.if_(start + (lane + step) < end):
                        t.store(r.sorted_token_ids, start + (lane + step), sentinel)
            else:
                for i in t.for_range(start + lane, end, width):
                    t.store(r.sorted_token_ids, i, sentinel)

    count = counting.count_kernel(
        "moe_align_grid_count", problem, layout, read_bin, problem.inputs, "histograms"
    )
    shared = {
        "histogram": num_warps * stride,
        "start": stride,  # pairs of the clusters before mine, then the row of the next tile's first pair
        "filled": stride,  # all pairs, then the row past the last pair
        "end": stride,
        "scratch": 2 * WARP,
    }
    if local_sort:
        shared |= {"delta": stride, "sorted": layout.tile}  # row of a pair - its place in the tile
    kernel = Kernel(
        name="moe_align_grid_place",
        body=place,
        inputs={**problem.inputs, **count.outputs},
        outputs=problem.outputs,
        shared=shared,
        num_warpgroups=config.num_warpgroups,
        num_ctas=config.num_ctas,
    )
    return Program(inputs=problem.inputs, kernels=(count, kernel), results=tuple(problem.outputs))
