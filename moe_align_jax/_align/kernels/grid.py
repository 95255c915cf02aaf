"""From about 2K pairs: two kernels over many CTAs, a counting sort by expert (see counting.py).

With several rounds per warp a CTA first sorts its pairs by expert in shared memory, so that its stores run
along each expert (`local_sort`). Inputs of any length go through in tiles.
Bytes: ids read twice, histograms (num_ctas / cluster * E * 2 B) written once and read by every CTA, every
output written once. Deterministic.
"""

from types import SimpleNamespace

from moe_align_jax._align.kernels import common, counting, placing
from moe_align_jax._align.tables import BlockAlignMosaicConfig
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import Int, Kernel, Program, Simt
from moe_align_jax.types import AlignProblem


def build(problem: AlignProblem, config: BlockAlignMosaicConfig, *, vector: bool) -> Program:
    """The count kernel and the place kernel. Their stores do not depend on `vector`."""
    del vector  # its stores are 4 bytes wide
    partition = placing.partition_of(problem, config)
    local_sort, one_tile = config.local_sort, partition.tiles == 1

    def read_bin(t: Simt, r: SimpleNamespace, pair: Int) -> Int:
        sizes, limit = common.Sizes(t, r, problem), common.pair_limit(t, r, problem)
        return common.read_expert(t, r, problem, sizes, pair, limit)

    def place(t: Simt, r: SimpleNamespace) -> None:
        p = placing.Placer(t, r, problem, partition, local_sort=local_sort)
        tile: placing.Tile | None = None
        experts = p.read_tile(p.first_of(0)) if one_tile else []
        if one_tile:
            p.clear_histogram()
        for zeroed in (r.start, r.filled):
            collectives.fill(t, zeroed, 0, p.columns.stride, p.tid, partition.threads, vector=True)
        t.block_sync()
        if one_tile:  # what needs nothing of the count kernel runs beside it
            tile = p.rank(p.first_of(0), experts)
            if local_sort:
                # mutant: pairs take their places before all of a tile are counted
                t.block_sync()
                tile = p.sort(tile)
        # mutant: no wait for the count kernel
        # mutant: two warps wait, not all
        t.grid_dependency_wait()
        t.launch_dependents()
        sums = counting.HistogramSums(t, r, partition, "histograms")
        sums.read()
        safe = [t.select(ok, e, 0) for ok, e in zip(p.valid, p.mine, strict=True)]
        within = [sums.before_me(e) for e in safe]
        sums.add(before="start", totals="filled")
        t.block_sync()
        totals = [t.select(ok, t.load(r.filled, e), 0) for ok, e in zip(p.valid, safe, strict=True)]
        before = [t.load(r.start, e) + inside for e, inside in zip(safe, within, strict=True)]
        starts, in_use = p.scan(totals, before)
        if tile is not None:
            p.scatter(tile, starts)
        else:
            for e, ok, start in zip(p.mine, p.valid, starts, strict=True):
                with t.if_(ok):
                    t.store(r.start, e, start)
            for index in t.for_range(0, p.tiles):
                first = p.first_of(index)
                # Before a barrier, so that all loads start together: behind it ptxas would spread them.
                experts = p.read_tile(first)
                p.clear_histogram()
                t.block_sync()
                tile = p.rank(first, experts)
                t.block_sync()
                if local_sort:
                    tile = p.sort(tile)
                starts = [
                    collectives.value_if(t, ok, lambda e=e: t.load(r.start, e), 0)
                    for ok, e in zip(p.valid, p.mine, strict=True)
                ]
                counts = p.scatter(tile, starts)
                for e, ok, start, count in zip(p.mine, p.valid, starts, counts, strict=True):
                    with t.if_(ok):
                        t.store(r.start, e, start + count)
                # mutant: the next tile begins without a barrier
                t.block_sync()
        p.fill(in_use)

    count = counting.count_kernel(
        "moe_align_grid_count", problem, partition, read_bin, problem.inputs, "histograms"
    )
    # Pairs of the clusters before mine, then the row of the next tile's first pair.
    start = {"start": placing.Columns(problem.num_experts, partition.threads).stride}
    kernel = Kernel(
        name="moe_align_grid_place",
        body=place,
        inputs={**problem.inputs, **count.outputs},
        outputs=problem.outputs,
        shared=placing.shared_of(partition, local_sort=local_sort) | start,
        num_warpgroups=config.num_warpgroups,
        num_ctas=config.num_ctas,
    )
    return Program(inputs=problem.inputs, kernels=(count, kernel), results=tuple(problem.outputs))
