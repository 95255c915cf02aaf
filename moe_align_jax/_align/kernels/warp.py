"""Up to 32 pairs: every warp sorts them by expert, a lane each, with no histogram over the experts.

Sorted, the first pair of every block_size of an expert opens a block, and the openers before a pair say where
its block lies: two ballots and their bits give all rows. (`match_any`, and shuffles from every pair to every
other, took 600 cycles more at 32 pairs: H200, 2026-11-21.)
Grid: num_ctas CTAs, each of which writes its own slice of every output (all compute the same rows, so
they need not talk). Bytes: the ids read per warp (one line), every output written once. Deterministic.
"""

from types import SimpleNamespace

from moe_align_jax._align.config import MAX_WARP_EXPERTS, BlockAlignMosaicConfig
from moe_align_jax._align.kernels import common
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, WARPGROUP, Int, Kernel, Program, Simt
from moe_align_jax.types import AlignProblem

_LANE_BITS = WARP.bit_length() - 1  # a key says expert, then pair
_DROPPED = MAX_WARP_EXPERTS << _LANE_BITS  # sorts behind every expert


def _sort(t: Simt, r: SimpleNamespace, key: Int, num_pairs: int) -> tuple[Int, Int, Int]:
    """The warp's keys in ascending order, to each lane: (its own, the one before, the one after); at the ends
    its own again. All keys differ; the keys of lanes from num_pairs on come last, in order."""
    _, lane, warp = common.thread_ids(t)
    first, count = warp * WARP, -(-num_pairs // 4) * 4
    t.store(r.keys, first + lane, key)
    # mutant: keys are compared before all are there
    t.warp_sync()
    place = t.const(0)
    for start in range(0, count, 4):
        for other in t.load4(r.keys, first + start):
            place = place + t.select(other < key, 1, 0)
    if count < WARP:
        place = t.select(lane < count, place, lane)
    t.store(r.sorted, first + place, key)
    # mutant: keys are read before they have their places
    t.warp_sync()
    around = lane, t.select(lane > 0, lane - 1, 0), t.select(lane < WARP - 1, lane + 1, lane)
    mine, before, after = (t.load(r.sorted, first + at) for at in around)
    return mine, before, after


def build(problem: AlignProblem, config: BlockAlignMosaicConfig, *, vector: bool) -> Program:
    """The one kernel of this form. `vector`: every output starts at a multiple of 16 bytes."""
    block_size, num_ctas = problem.block_size, config.num_ctas

    def body(t: Simt, r: SimpleNamespace) -> None:
        tid, lane, _ = common.thread_ids(t)
        cta = t.cta_id()
        sizes = common.Sizes(t, r, problem)
        n = sizes.num_pairs
        t.grid_dependency_wait()
        t.launch_dependents()
        limit, read_map = common.pair_limit(t, r, problem), common.map_from_lanes(t, r, problem)
        loaded = common.load_id(t, r, problem, sizes, lane)

        # Runs while the ids are loaded.
        rows, blocks, counts = common.fill_slices(t, r, problem, sizes, vector=vector)

        expert = common.expert_of(t, r, problem, loaded, limit, read_map)
        kept = expert >= 0
        label = common.block_label(t, r, problem, t.select(kept, expert, 0), read_map)
        key = t.select(kept, (expert << _LANE_BITS) | lane, lane | _DROPPED)
        mine, before, after = _sort(t, r, key, problem.num_pairs)
        pair, expert, kept = mine & (WARP - 1), mine >> _LANE_BITS, mine < _DROPPED
        upto = collectives.lanes_below(t, lane) | (t.const(1) << lane)
        heads = t.ballot(lane.eq(0) | expert.ne(before >> _LANE_BITS))
        # mutant: an expert's first pair follows the expert before
        rank = lane - t.highest_bit(heads & upto)
        within = rank % block_size
        opens = kept & within.eq(0)
        openers = t.ballot(opens)
        # mutant: a block's first pair does not count as its opener
        block = t.popc(openers & upto) - 1
        row = block * block_size + within
        label = t.shfl(label, pair)

        # mutant: no barrier between the sentinels and the pairs
        t.block_sync()  # the sentinels of this CTA's slice are in place
        with t.if_(tid < WARP):
            with rows.holding(row, kept):
                t.store(r.sorted_token_ids, row, pair)
            with blocks.holding(block, opens):
                t.store(r.expert_ids, block, label)
            if problem.return_counts:
                last = kept & (lane.eq(WARP - 1) | expert.ne(after >> _LANE_BITS))
                with counts.holding(expert, last):
                    t.store(r.tokens_per_expert, expert, rank + 1)
            if problem.return_inverse:
                with t.if_(cta.eq(0) & (pair < n)):
                    t.store(r.row_of_pair, pair, t.select(kept, row, -1))
        with t.if_(cta.eq(0) & tid.eq(0)):
            t.store(r.num_tokens_post_padded, 0, t.popc(openers) * block_size)

    cells = config.num_warpgroups * WARPGROUP
    kernel = Kernel(
        name="moe_align_warp",
        body=body,
        inputs=problem.inputs,
        outputs=problem.outputs,
        shared={"keys": cells, "sorted": cells},
        num_warpgroups=config.num_warpgroups,
        num_ctas=num_ctas,
    )
    return Program(inputs=problem.inputs, kernels=(kernel,), results=tuple(problem.outputs))
