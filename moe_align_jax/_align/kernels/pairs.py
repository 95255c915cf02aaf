"""Up to 256 pairs of any number of experts, in one launch: every pair is compared with every other.

No histogram, so the time does not depend on E but for the counts that are written. A pair's row is the
padded sizes of the lower experts, each taken once at its first pair, plus the equal pairs before it.
Grid: num_ctas CTAs, each of which writes its own slice of every output (all compute the same rows, without
communication). Bytes: the ids read per CTA, every output written once. Deterministic.
"""

from types import SimpleNamespace

from moe_align_jax._align.kernels import common
from moe_align_jax._align.tables import BlockAlignMosaicConfig
from moe_align_jax._simt.language import WARP, WARPGROUP, Int, Kernel, Program, Simt
from moe_align_jax.types import AlignProblem


def build(problem: AlignProblem, config: BlockAlignMosaicConfig, *, vector: bool) -> Program:
    """The one kernel of this form. `vector`: every output starts at a multiple of 16 bytes."""
    block_size = problem.block_size
    threads = config.num_warpgroups * WARPGROUP
    most = max(WARP, 1 << (problem.num_pairs - 1).bit_length())
    # Neighbouring lanes share a pair: lane `part` looks at every `parts`-th of the others.
    parts = min(8, threads // most)
    if not parts:
        raise ValueError(f"'pairs' must have a thread per pair; got {threads} for {most}.")
    looks = most // parts

    def body(t: Simt, r: SimpleNamespace) -> None:
        tid, lane, _ = common.thread_ids(t)
        cta = t.cta_id()
        sizes = common.Sizes(t, r, problem)
        n = sizes.num_pairs
        pair, part = tid >> (parts.bit_length() - 1), tid & (parts - 1)
        others = [part + k * parts for k in range(looks)]

        def over_parts(x: Int) -> Int:
            distance = 1
            while distance < parts:
                x = x + t.shfl(x, lane ^ distance)
                distance *= 2
            return x

        t.grid_dependency_wait()
        t.launch_dependents()
        limit = common.pair_limit(t, r, problem)
        expert = common.read_expert(t, r, problem, sizes, pair, limit)
        kept = expert >= 0
        label = common.block_label(t, r, problem, t.select(kept, expert, 0))
        mine = part.eq(0) & (pair < most)
        with t.if_(mine):
            t.store(r.experts, pair, expert)

        rows, blocks, counts = common.fill_slices(t, r, problem, sizes, vector=vector)
        # mutant: the others are read before all are there
        t.block_sync()

        # Sums as they go: lists of 64 values would not fit into registers.
        zero = t.const(0)
        same, rank = zero, zero
        for j in others:
            equal = t.load(r.experts, j).eq(expert)
            same = same + t.select(equal, 1, 0)
            # mutant: equal pairs after one's own are before it
            rank = rank + t.select(equal & (j < pair), 1, 0)
        same, rank = over_parts(same), over_parts(rank)
        first = kept & rank.eq(0)
        with t.if_(mine):
            t.store(r.padded, pair, t.select(first, common.padded(same, block_size), 0))
        # mutant: sizes are read before all are there
        t.block_sync()
        start, total = zero, zero
        for j in others:
            size = t.load(r.padded, j)
            start = start + t.select(t.load(r.experts, j) < expert, size, 0)
            total = total + size
        row, total = over_parts(start) + rank, over_parts(total)

        chosen = mine & kept
        with rows.holding(row, chosen):
            t.store(r.sorted_token_ids, row, pair)
        with blocks.holding(row // block_size, chosen & (row % block_size).eq(0)):
            t.store(r.expert_ids, row // block_size, label)
        if problem.return_counts:
            with counts.holding(expert, mine & first):
                t.store(r.tokens_per_expert, expert, same)
        with t.if_(cta.eq(0) & tid.eq(0)):
            t.store(r.num_tokens_post_padded, 0, total)
        if problem.return_inverse:
            with t.if_(cta.eq(0) & mine & (pair < n)):
                t.store(r.row_of_pair, pair, t.select(kept, row, -1))

    kernel = Kernel(
        name="moe_align_pairs",
        body=body,
        inputs=problem.inputs,
        outputs=problem.outputs,
        shared={"experts": most, "padded": most},
        num_warpgroups=config.num_warpgroups,
        num_ctas=config.num_ctas,
    )
    return Program(inputs=problem.inputs, kernels=(kernel,), results=tuple(problem.outputs))
