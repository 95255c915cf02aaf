"""From about 2K pairs: two kernels over many CTAs, a counting sort by expert (see counting.py).

With several rounds per warp a CTA first sorts its pairs by expert in shared memory, so that its stores run
along each expert (`local_sort`). Inputs of any length go through in tiles.
Bytes: ids read twice, histograms (num_ctas * E * 2 B) written once and read by every CTA, every output
written once. Deterministic.
"""

from types import SimpleNamespace

from moe_align_jax._kernels.block_align import common, counting
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, Int, Kernel, Program, Simt
from moe_align_jax._tuning import BlockAlignMosaicConfig
from moe_align_jax.types import AlignProblem


def build(problem: AlignProblem, config: BlockAlignMosaicConfig, *, vector: bool) -> Program:
    del vector  # its stores are 4 bytes wide
    num_experts, block_size = problem.num_experts, problem.block_size
    layout = counting.Layout(
        num_pairs=problem.num_pairs,
        num_bins=num_experts,
        num_ctas=config.num_ctas,
        num_warpgroups=config.num_warpgroups,
        rounds=config.rounds,
    )
    threads, num_warps, stride = layout.threads, layout.num_warps, layout.stride
    per_thread = -(-num_experts // threads)  # experts
    bits = common.bin_bits(num_experts)
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
        mine = [tid * per_thread + k for k in range(per_thread)]  # experts of this thread

        def read_tile(tile: Int | int) -> tuple[list[Int], list[Int]]:
            first = cta * (tiles * layout.tile) + tile * layout.tile + warp * (layout.rounds * WARP)
            pairs = [first + (k * WARP + lane) for k in range(layout.rounds)]
            return pairs, [common.read_expert(t, r, problem, sizes, pair, limit) for pair in pairs]

        def clear_histogram() -> None:
            collectives.fill(t, r.histogram, 0, num_warps * stride, tid, threads, vector=True)

        def rank(experts: list[Int]) -> list[Int]:
            return [collectives.tally(t, r.histogram, row_of_warp, e, lane, bits) for e in experts]

        def scan_warps() -> list[Int]:
            """Each warp's place within each expert; returns the tile's counts of this thread's experts."""
            counts = [
                t.value_if(
                    e < num_experts,
                    lambda e=e: collectives.column_scan(t, r.histogram, e, num_warps, stride),
                    0,
                )
                for e in mine
            ]
            if local_sort:
                at, in_tile = collectives.block_exclusive_scan(
                    t, sum(counts, t.const(0)), r.scratch
                )
                for e, count in zip(mine, counts, strict=True):
                    with t.if_(e < num_experts):
                        t.store(r.local_start, e, at)
                    at = at + count
                with t.if_(tid.eq(0)):
                    t.store(r.in_tile, 0, in_tile)
            return counts

        def scan_experts() -> Int:
            """Where each expert's rows start, for this CTA, and end; returns the rows in use."""
            totals = [t.value_if(e < num_experts, lambda e=e: t.load(r.filled, e), 0) for e in mine]
            padded = [common.padded(total, block_size) for total in totals]
            start, in_use = collectives.block_exclusive_scan(t, sum(padded, t.const(0)), r.scratch2)
            for e, total, size in zip(mine, totals, padded, strict=True):
                with t.if_(e < num_experts):
                    t.store(r.start, e, start + t.load(r.start, e))
                    t.store(r.filled, e, start + total)
                    t.store(r.end, e, start + size)
                    if problem.return_counts:
                        with t.if_(cta.eq(0)):
                            t.store(r.tokens_per_expert, e, total)
                start = start + size
            with t.if_(cta.eq(0) & tid.eq(0)):
                t.store(r.num_tokens_post_padded, 0, in_use)
            return in_use

        def scatter(pairs: list[Int], experts: list[Int], ranks: list[Int]) -> None:
            for pair, e, in_warp in zip(pairs, experts, ranks, strict=True):
                local = (
                    t.value_if(e >= 0, lambda e=e: t.load(r.histogram, row_of_warp + e), 0)
                    + in_warp
                )
                row = t.value_if(e >= 0, lambda e=e: t.load(r.start, e), 0) + local
                with t.if_(e >= 0):
                    if local_sort:
                        at = t.load(r.local_start, e) + local
                        t.store(r.sorted_rows, at, row)
                        t.store(r.sorted_pairs, at, pair)
                    else:
                        t.store(r.sorted_token_ids, row, pair)
                    common.name_block(t, r, problem, row, e)
                common.write_inverse(t, r, problem, sizes, pair, e, row)
            if local_sort:
                t.block_sync()
                for i in t.for_range(tid, t.load(r.in_tile, 0), threads):
                    t.store(r.sorted_token_ids, t.load(r.sorted_rows, i), t.load(r.sorted_pairs, i))

        clear_histogram()
        for sums in (r.start, r.filled):
            collectives.fill(t, sums, 0, stride, tid, threads, vector=True)
        if one_tile:  # ranking needs nothing of the count kernel: it runs beside it
            pairs, experts = read_tile(0)
            t.block_sync()
            ranks = rank(experts)
        else:
            t.block_sync()
        t.grid_dependency_wait()
        counting.sum_histograms(t, r, layout, "histograms", before="start", totals="filled")
        t.block_sync()
        if one_tile:
            scan_warps()
            in_use = scan_experts()
            t.block_sync()
            scatter(pairs, experts, ranks)
        else:
            in_use = scan_experts()
            for tile in t.for_range(0, tiles):
                pairs, experts = read_tile(tile)
                ranks = rank(experts)
                t.block_sync()
                counts = scan_warps()
                t.block_sync()
                scatter(pairs, experts, ranks)
                t.block_sync()
                for e, count in zip(mine, counts, strict=True):
                    with t.if_(e < num_experts):
                        t.store(r.start, e, t.load(r.start, e) + count)
                clear_histogram()
                t.block_sync()

        # Blocks and rows that no pair takes.
        everyone = layout.num_ctas * threads
        me = cta * threads + tid
        for b in collectives.strided(t, in_use // block_size + me, sizes.num_blocks, everyone):
            t.store(r.expert_ids, b, -1)
        warps = layout.num_ctas * num_warps
        for e in t.for_range(cta * num_warps + warp, num_experts, warps):
            for i in t.for_range(t.load(r.filled, e) + lane, t.load(r.end, e), WARP):
                t.store(r.sorted_token_ids, i, sizes.num_pairs)
        for i in collectives.strided(t, in_use + me, sizes.capacity, everyone):
            t.store(r.sorted_token_ids, i, sizes.num_pairs)

    count = counting.count_kernel(
        "moe_align_grid_count", problem, layout, read_bin, problem.inputs, "histograms"
    )
    shared = {
        "histogram": num_warps * stride,
        "start": stride,  # before this CTA, then the row of the expert's next pair
        "filled": stride,  # all pairs, then the row past the last pair
        "end": stride,
        "scratch": WARP,
        "scratch2": WARP,
    }
    if local_sort:
        tile = layout.tile
        shared |= {"local_start": stride, "sorted_rows": tile, "sorted_pairs": tile, "in_tile": 1}
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
