"""Up to about 2K pairs, in one launch: count -> scan over warps -> scan over experts -> scatter.

Each warp owns a contiguous run of pairs and a histogram of its own in shared memory, so the order is stable
and nothing is atomic. One SM is slow at writing (scattered 4-byte stores take 1.4 to 2.8 cycles each), so
several CTAs may do the same counting and write a slice of the rows each, without communication.
Sentinels are written before the first barrier, 16 bytes at a time, and the pairs scattered over them.
Bytes: ids read once per CTA, outputs written once (the rows in use twice). Deterministic.
"""

from types import SimpleNamespace

from moe_align_jax._align.kernels import common
from moe_align_jax._align.tables import BlockAlignMosaicConfig
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, WARPGROUP, Kernel, Program, Simt
from moe_align_jax.types import AlignProblem


def build(problem: AlignProblem, config: BlockAlignMosaicConfig, *, vector: bool) -> Program:
    """The one kernel of this form. `vector`: every output starts at a multiple of 16 bytes."""
    num_experts, block_size = problem.num_experts, problem.block_size
    threads = config.num_warpgroups * WARPGROUP
    num_warps = threads // WARP
    stride = -(-num_experts // 4) * 4  # words of a warp's histogram
    per_thread = -(-num_experts // threads)  # experts
    rounds = -(-problem.num_pairs // threads)  # of 32 pairs per warp
    bits = common.bin_bits(num_experts)

    def body(t: Simt, r: SimpleNamespace) -> None:
        tid, lane, warp = common.thread_ids(t)
        cta = t.cta_id()
        row_of_warp = warp * stride
        sizes = common.Sizes(t, r, problem)
        t.grid_dependency_wait()
        t.launch_dependents()
        limit = common.pair_limit(t, r, problem)
        pairs = [warp * (rounds * WARP) + (k * WARP + lane) for k in range(rounds)]
        experts = [common.read_expert(t, r, problem, sizes, pair, limit) for pair in pairs]
        collectives.fill(t, r.histogram, 0, num_warps * stride, tid, threads, vector=True)
        rows = common.Slice(t, sizes.capacity)
        rows.fill(r.sorted_token_ids, sizes.num_pairs, vector=vector)
        # mutant: no barrier after the fills
        t.block_sync()

        # 1. Each warp counts its pairs, and ranks them among themselves.
        ranks = [collectives.tally(t, r.histogram, row_of_warp, e, lane, *bits) for e in experts]
        # mutant: the barrier before the column scan is a warp barrier
        t.block_sync()

        # 2. Where each expert starts, and each warp within it.
        mine = [tid * per_thread + k for k in range(per_thread)]
        counts = [
            collectives.value_if(
                t,
                e < num_experts,
                lambda e=e: collectives.column_scan(t, r.histogram, e, num_warps, stride),
                0,
            )
            for e in mine
        ]
        padded = [common.padded(count, block_size) for count in counts]
        start, total = collectives.block_exclusive_scan(t, sum(padded, t.const(0)), r.scratch)
        for e, count, size in zip(mine, counts, padded, strict=True):
            with t.if_(e < num_experts):
                t.store(r.start, e, start)
                if problem.return_counts:
                    with t.if_(cta.eq(0)):
                        t.store(r.tokens_per_expert, e, count)
            start = start + size
        with t.if_(cta.eq(0) & tid.eq(0)):
            t.store(r.num_tokens_post_padded, 0, total)
        # mutant: no barrier before the starts are read
        t.block_sync()

        # 3. Every pair to its row; blocks that no pair names read -1.
        for pair, e, rank in zip(pairs, experts, ranks, strict=True):
            row = collectives.value_if(
                t,
                e >= 0,
                lambda e=e, rank=rank: (
                    t.load(r.start, e) + t.load(r.histogram, row_of_warp + e) + rank
                ),
                -1,
            )
            with rows.holding(row, e >= 0):
                t.store(r.sorted_token_ids, row, pair)
                common.name_block(t, r, problem, row, e)
            with t.if_(cta.eq(0)):
                common.write_inverse(t, r, problem, sizes, pair, e, row)
        me, everyone = cta * threads + tid, t.num_ctas * threads
        for b in collectives.strided(t, total // block_size + me, sizes.num_blocks, everyone):
            t.store(r.expert_ids, b, -1)

    kernel = Kernel(
        name="moe_align_block",
        body=body,
        inputs=problem.inputs,
        outputs=problem.outputs,
        shared={"histogram": num_warps * stride, "start": num_experts, "scratch": WARP},
        num_warpgroups=config.num_warpgroups,
        num_ctas=config.num_ctas,
    )
    return Program(inputs=problem.inputs, kernels=(kernel,), results=tuple(problem.outputs))
