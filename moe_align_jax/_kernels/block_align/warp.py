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
    n, block_size, num_ctas = problem.num_pairs, problem.block_size, config.num_ctas

    def body(t: Simt, r: SimpleNamespace) -> None:
        tid, lane, _ = common.thread_ids(t)
        cta = t.cta_id()
        t.grid_dependency_wait()
        expert = common.read_expert(t, r, problem, lane, common.pair_limit(t, r, problem))
        kept = expert >= 0
        label = common.block_label(t, r, problem, t.select(kept, expert, 0))

        def prefill(ref, value: int, size: int):
            """Fills this CTA's slice; returns the test whether a cell lies in it."""
            if num_ctas == 1:
                collectives.fill(t, ref, value, size, tid, t.num_threads, vector=vector)
                return lambda index: index >= 0
            # All CTAs take interleaved pieces of 4 cells per thread.
            threads = num_ctas * t.num_threads
            mine = cta * t.num_threads + tid
            for i in collectives.strided(t, mine * 4, size // 4 * 4, threads * 4):
                if vector:
                    t.store4(ref, i, value)
                else:
                    for k in range(4):
                        t.store(ref, i + k, value)
            rest = size // 4 * 4
            with t.if_((cta.eq(rest // 4 // t.num_threads % num_ctas)) & (tid < size % 4)):
                t.store(ref, tid + rest, value)
            return lambda index: ((index // 4 // t.num_threads) % num_ctas).eq(cta)

        in_sorted = prefill(r.sorted_token_ids, n, problem.capacity)
        in_blocks = prefill(r.expert_ids, -1, problem.num_blocks)
        in_counts = prefill(r.tokens_per_expert, 0, problem.num_experts)

        same = t.match_any(expert)
        rank, count = t.popc(same & collectives.lanes_below(t, lane)), t.popc(same)
        first = kept & rank.eq(0)
        own = t.select(first, common.padded(count, block_size), 0)  # once per expert
        start: Int = t.const(0)
        total: Int = t.const(0)
        for j in range(n):
            other, rows = t.shfl(expert, j), t.shfl(own, j)
            start = start + t.select(other < expert, rows, 0)
            total = total + rows
        row = start + rank

        t.block_sync()  # the sentinels of this CTA's slice are in place
        with t.if_((tid < WARP) & kept):
            with t.if_(in_sorted(row)):
                t.store(r.sorted_token_ids, row, lane)
            with t.if_((rank % block_size).eq(0) & in_blocks(row // block_size)):
                t.store(r.expert_ids, row // block_size, label)
            with t.if_(first & in_counts(expert)):
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
