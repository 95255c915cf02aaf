"""The `[E, max_tokens]` layout: every expert's rows are already together, so the counts say it all.

Every CTA scans all the counts (E words) and writes the rows of its share of the experts: one launch.
Bytes: the counts read once per CTA, every output written once. Deterministic.
"""

from types import SimpleNamespace

from moe_align_jax._align.kernels import common
from moe_align_jax._align.tables import BlockAlignMosaicConfig
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, WARPGROUP, Kernel, Program, Simt
from moe_align_jax.types import BatchedAlignProblem


def build(problem: BatchedAlignProblem, config: BlockAlignMosaicConfig, *, vector: bool) -> Program:
    """The one kernel of the `[E, max_tokens]` layout. Its stores do not depend on `vector`."""
    del vector
    num_experts, max_tokens = problem.num_experts, problem.max_tokens_per_batch
    block_size, sentinel = problem.block_size, problem.num_pairs
    threads = config.num_warpgroups * WARPGROUP
    num_ctas = config.num_ctas
    warps = num_ctas * threads // WARP

    def body(t: Simt, r: SimpleNamespace) -> None:
        tid, lane, warp = common.thread_ids(t)
        cta = t.cta_id()
        t.grid_dependency_wait()
        t.launch_dependents()
        with t.if_(tid.eq(0)):
            t.store(r.carry, 0, 0)
        for base in t.for_range(0, num_experts, threads):
            e = base + tid
            given = collectives.value_if(
                t, e < num_experts, lambda e=e: t.load(r.expert_num_tokens, e), 0
            )
            count = t.select(given < 0, 0, t.select(given > max_tokens, max_tokens, given))
            size = common.padded(count, block_size)
            offset, added = collectives.block_exclusive_scan(t, size, r.scratch)
            t.store(r.start, tid, t.load(r.carry, 0) + offset)
            t.store(r.count, tid, count)
            with t.if_(cta.eq(0) & (e < num_experts)):
                t.store(r.tokens_per_expert, e, count)
            # mutant: rows are written before the starts are there
            t.block_sync()
            # A warp per expert, the warps of all CTAs in turn.
            for i in t.for_range(cta * (threads // WARP) + warp, threads, warps):
                with t.if_(base + i < num_experts):
                    start, rows = t.load(r.start, i), t.load(r.count, i)
                    past = common.padded(rows, block_size)
                    first_slot = (base + i) * max_tokens
                    for k in t.for_range(lane, past, WARP):
                        slot = t.select(k < rows, first_slot + k, sentinel)
                        t.store(r.sorted_token_ids, start + k, slot)
                    for b in t.for_range(lane, past // block_size, WARP):
                        t.store(r.expert_ids, start // block_size + b, base + i)
            with t.if_(tid.eq(0)):
                t.store(r.carry, 0, t.load(r.carry, 0) + added)
            t.block_sync()
        in_use = t.load(r.carry, 0)
        me, everyone = cta * threads + tid, num_ctas * threads
        for b in collectives.strided(t, in_use // block_size + me, problem.num_blocks, everyone):
            t.store(r.expert_ids, b, -1)
        for i in collectives.strided(t, in_use + me, problem.capacity, everyone):
            t.store(r.sorted_token_ids, i, sentinel)
        with t.if_(me.eq(0)):
            t.store(r.num_tokens_post_padded, 0, in_use)

    kernel = Kernel(
        name="moe_align_batched",
        body=body,
        inputs=problem.inputs,
        outputs=problem.outputs,
        shared={"start": threads, "count": threads, "scratch": WARP, "carry": 1},
        num_warpgroups=config.num_warpgroups,
        num_ctas=num_ctas,
    )
    return Program(inputs=problem.inputs, kernels=(kernel,), results=tuple(problem.outputs))
