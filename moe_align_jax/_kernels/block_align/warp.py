"""Up to 32 pairs: every warp finds all rows in registers, with no histogram over the experts.

Grid: num_ctas CTAs, each of which writes its own slice of every output (all compute the same rows, so
they need not talk). Bytes: the ids read per warp (one line), every output written once. Deterministic.
"""

from types import SimpleNamespace

from moe_align_jax._kernels.block_align import common
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, Int, Kernel, Program, Simt
from moe_align_jax._tuning import BlockAlignMosaicConfig
from moe_align_jax.types import AlignProblem


def build(problem: AlignProblem, config: BlockAlignMosaicConfig, *, vector: bool) -> Program:
    block_size, num_ctas = problem.block_size, config.num_ctas

    def body(t: Simt, r: SimpleNamespace) -> None:
        tid, lane, _ = common.thread_ids(t)
        cta = t.cta_id()
        sizes = common.Sizes(t, r, problem)
        n = sizes.num_pairs
        t.grid_dependency_wait()
        t.launch_dependents()
        limit, read_map = common.pair_limit(t, r, problem), common.map_from_lanes(t, r, problem)
        expert = common.read_expert(t, r, problem, sizes, lane, limit, read_map)
        kept = expert >= 0
        label = common.block_label(t, r, problem, t.select(kept, expert, 0), read_map)

        rows = common.Slice(t, sizes.capacity)
        blocks = common.Slice(t, sizes.num_blocks)
        counts = common.Slice(t, problem.num_experts if problem.return_counts else 0)
        rows.fill(r.sorted_token_ids, n, vector=vector)
        blocks.fill(r.expert_ids, -1, vector=vector)
        if problem.return_counts:
            counts.fill(r.tokens_per_expert, 0, vector=vector)

        same = t.match_any(expert)
        rank, count = t.popc(same & collectives.lanes_below(t, lane)), t.popc(same)
        first = kept & rank.eq(0)
        own = t.select(first, common.padded(count, block_size), 0)  # once per expert
        start: Int = t.const(0)
        total: Int = t.const(0)
        for j in range(problem.num_pairs):
            other, size = t.shfl(expert, j), t.shfl(own, j)
            start = start + t.select(other < expert, size, 0)
            total = total + size
        row = start + rank

        t.block_sync()  # the sentinels of this CTA's slice are in place
        with t.if_(tid < WARP):
            with rows.holding(row, kept):
                t.store(r.sorted_token_ids, row, lane)
            with blocks.holding(row // block_size, kept & (rank % block_size).eq(0)):
                t.store(r.expert_ids, row // block_size, label)
            if problem.return_counts:
                with counts.holding(expert, first):
                    t.store(r.tokens_per_expert, expert, count)
        with t.if_(cta.eq(0) & tid.eq(0)):
            t.store(r.num_tokens_post_padded, 0, total)
        if problem.return_inverse:
            with t.if_(cta.eq(0) & (tid < n)):
                t.store(r.row_of_pair, tid, t.select(kept, row, -1))

    kernel = Kernel(
        name="moe_align_warp",
        body=body,
        inputs=problem.inputs,
        outputs=problem.outputs,
        num_warpgroups=config.num_warpgroups,
        num_ctas=num_ctas,
    )
    return Program(inputs=problem.inputs, kernels=(kernel,), results=tuple(problem.outputs))
