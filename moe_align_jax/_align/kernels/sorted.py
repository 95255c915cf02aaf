"""Up to 16K pairs of very many experts, in one launch: each CTA sorts the pairs of a range of experts.

The CTAs of a cluster own a range of experts each. A CTA reads every id and keeps its range's pairs, in
order, in shared memory; sorts them by expert, by comparing each with all where they are few, else a digit
of at most 8 bits at a time; and finds the pairs that open a block (every block_size-th of an expert). Sorted,
a block holds the pairs from its opener to the next one's: the openers are all that writing needs, but for
the number of blocks of the ranges before, the one word that a cluster exchanges. Several clusters (num_ctas /
cluster) do the same work and write a share of it each. Nothing is as long as E but the counts that are
written. Under skew one CTA may hold every pair: several times slower, and right.
Bytes: ids read once per CTA, every output written once (counts twice where they are not 0). Deterministic.
"""

import contextlib
import math
from types import SimpleNamespace

from moe_align_jax._align.config import BlockAlignMosaicConfig, sorted_digits, sorted_range
from moe_align_jax._align.kernels import common
from moe_align_jax._core.int32 import cdiv
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, WARPGROUP, Int, Kernel, Program, Simt
from moe_align_jax.types import AlignProblem

_HALF = 16  # an expert's place in its range and a pair share a word
_LOW = (1 << _HALF) - 1
_MOST_COMPARED = 192  # pairs, beyond which two passes by digits are faster
_MOST_MASKS = 8  # that a thread keeps in registers beside its keys


def _last_of(t: Simt, mask: Int, first: Int, otherwise: Int) -> Int:
    """The place of a mask's highest bit, bit 0 being the place `first`; `otherwise` for an empty mask."""
    return t.select(mask.eq(0), otherwise, first + t.highest_bit(mask))


def _over_warps(t: Simt, count: Int, scratch: object) -> tuple[Int, Int]:
    """(sum of the counts of the warps before mine, sum over all), of one count per warp; one barrier."""
    _, lane, warp = common.thread_ids(t)
    num_warps = t.num_threads // WARP
    with t.if_(lane.eq(0)):
        t.store(scratch, warp, count)
    t.block_sync()
    counts = collectives.value_if(t, lane < num_warps, lambda: t.load(scratch, lane), 0)
    running = collectives.warp_inclusive_scan(t, counts, lane, num_warps)
    return t.shfl(running - counts, warp), t.shfl(running, num_warps - 1)


def compared_pairs(num_pairs: int, threads: int, cluster: int) -> int:
    """Up to how many pairs of a range are compared with each other instead of sorted by digits: an even share
    plus three standard deviations; 0 if that is more than `_MOST_COMPARED`."""
    share = -(-num_pairs // cluster)
    most = -(-min(num_pairs, share + 3 * math.isqrt(share)) // WARP) * WARP
    return most if most <= min(_MOST_COMPARED, threads) else 0


class _Sorter:
    """The body on one machine, a phase per method."""

    def __init__(
        self, t: Simt, r: SimpleNamespace, problem: AlignProblem, rounds: int, *, vector: bool
    ):
        self.t, self.r, self.problem, self.rounds = t, r, problem, rounds
        self.tid, self.lane, self.warp = common.thread_ids(t)
        self.threads, self.num_warps = t.num_threads, t.num_threads // WARP
        self.sizes = common.Sizes(t, r, problem)
        # Ranks share a cluster's experts, copies share a range's output.
        cta, self.copies = t.cta_id(), t.num_ctas // t.cluster
        self.cta = cta
        self.rank, self.copy = cta & (t.cluster - 1), cta >> (t.cluster.bit_length() - 1)
        self.wide = vector and problem.block_size % 4 == 0
        # 16-byte stores of the counts: vmap's rows start at any word without `vector`.
        self.vector = vector
        self.counts = common.Slice(t, problem.num_experts)
        self.counts.base = (self.rank * self.copies + self.copy) * self.counts.length
        self.length = sorted_range(problem.num_experts, t.num_ctas, t.cluster)
        # Enough looks for an even share of the pairs plus an eighth.
        self.looks = min(4, -(-problem.num_pairs * 9 // (8 * t.cluster * self.threads)))
        self.looks = min(self.looks, rounds)
        self.first_expert = self.rank * self.length

    def collect(self) -> Int:
        """My range's pairs, in order, into `words0`; returns their number."""
        t, r, problem, sizes = self.t, self.r, self.problem, self.sizes
        limit = common.pair_limit(t, r, problem)
        first = self.warp * (self.rounds * WARP) + self.lane
        pairs = [first + k * WARP for k in range(self.rounds)]
        experts = [common.read_expert(t, r, problem, sizes, pair, limit) for pair in pairs]
        if problem.return_counts:
            self.counts.fill(r.tokens_per_expert, 0, vector=self.vector)
        if problem.return_inverse:
            mine = common.Slice(t, sizes.num_pairs)
            for pair, expert in zip(pairs, experts, strict=True):
                with mine.holding(pair, pair.below(sizes.num_pairs) & (expert < 0)):
                    t.store(r.row_of_pair, pair, -1)
        keys = [expert - self.first_expert for expert in experts]

        def votes() -> list[Int]:
            return [t.ballot(key.below(self.length)) for key in keys]

        masks = votes()
        added = sum((t.popc(mask) for mask in masks), t.const(0))
        at, number = _over_warps(t, added, r.scratch)
        if self.rounds > _MOST_MASKS:
            masks = votes()
        below = collectives.lanes_below(t, self.lane)
        for pair, key, mask in zip(pairs, keys, masks, strict=True):
            with t.if_(key.below(self.length)):
                t.store(r.words0, at + t.popc(mask & below), (key << _HALF) | pair)
            at = at + t.popc(mask)
        return number

    def compare(self, compared: int, target: object, number: Int) -> None:
        """Sorts up to `compared` pairs by comparing each with all: a word says expert, then pair. Behind
        the last are words of all ones. Neighbouring lanes share a pair, each looks at a part of the others.
        """
        t, words = self.t, self.r.words0
        shift = min(3, (self.threads // compared).bit_length() - 1)
        parts = 1 << shift
        place, part = self.tid >> shift, self.tid & (parts - 1)
        word = t.load(words, t.select(place < compared, place, 0))

        def rank() -> Int:
            below = t.const(0)
            for k in range(0, compared, parts):
                # mutant: a pair is below itself
                below = below + t.select(t.load(words, part + k).below(word), 1, 0)
            for k in range(shift):
                below = below + t.shfl(below, self.lane ^ (1 << k))
            return below

        found = collectives.value_if(
            t, (self.tid - self.lane) >> shift < number, rank, 0
        )  # for whole warps
        # mutant: pairs take their places while others are compared with them
        t.block_sync()  # all have read, and the target may be the source
        with t.if_(part.eq(0) & (place < number)):
            t.store(target, found, word)
        t.block_sync()

    def sort(self, index: int, shift: int, bits: int, number: Int) -> None:
        """One stable pass by a digit, from words `index` to the other ones; its histogram is cleared, a
        `block_sync` ago. Each warp has a contiguous run and a column of the histogram."""
        t, r = self.t, self.r
        source, target = (getattr(r, f"words{(index + k) % 2}") for k in range(2))
        histogram = getattr(r, f"histogram{index}")
        # Odd: a warp's bins lie in different banks, and differ in their low bits still.
        stride = self.num_warps + 1
        rounds = cdiv(number, self.threads)
        first = self.warp * (rounds * WARP) + self.lane

        def bin_of(word: Int) -> Int:
            return ((word >> (_HALF + shift)) & ((1 << bits) - 1)) * stride

        def load_at(at: Int) -> Int:
            return t.load(source, t.select(at < number, at, 0))

        for k in t.for_range(0, rounds):
            at = first + k * WARP
            with t.if_(at - self.lane < number):  # for whole warps
                # Past the end a word of all ones: it sorts behind every pair, so it changes no pair's rank.
                # mutant: what is past the end comes first
                word = t.select(at < number, load_at(at), -1)
                rank = collectives.tally(t, histogram, self.warp, bin_of(word), self.lane, bits)
                t.store(r.ranks, at, rank)
        # mutant: counts are added up before all have counted
        t.block_sync()
        # The warps' counts of a bin are neighbours: one scan over all of them.
        cells = self.num_warps << bits
        per_thread = -(-cells // self.threads)
        places = [self.tid * per_thread + k for k in range(per_thread)]
        places = [place + place // self.num_warps for place in places]
        inside = self.tid < cells  # where a thread has one cell; else all have as many

        def count_at(place: Int) -> Int:
            if cells >= self.threads:
                return t.load(histogram, place)
            return collectives.value_if(t, inside, lambda: t.load(histogram, place), 0)

        counts = [count_at(place) for place in places]
        running, _ = collectives.block_exclusive_scan(t, sum(counts, t.const(0)), r.scratch)
        for place, count in zip(places, counts, strict=True):
            with t.if_(inside) if cells < self.threads else contextlib.nullcontext():
                t.store(histogram, place, running)
            running = running + count
        # mutant: places are read before they are written
        t.block_sync()
        for k in t.for_range(0, rounds):
            at = first + k * WARP
            with t.if_(at < number):
                word = t.load(source, at)
                place = t.load(histogram, bin_of(word) + self.warp) + t.load(r.ranks, at)
                t.store(target, place, word)
        # mutant: the next pass begins without a barrier
        t.block_sync()

    def find_blocks(self, words: object, spare: object, number: Int) -> None:
        """Openers of my range's blocks into `ranks`, `number` behind them, and how many into `blocks`.
        `spare`: at each expert's last pair its count, else 0, for the experts of my share.

        A warp looks at `looks` times 32 positions of a chunk, which holds the pairs of any range unless
        they are skewed. What is known before a chunk stands in `before`, two words per chunk: the openers
        so far, and the place of the last expert's first pair.
        """
        t, r, tid, lane, warp = self.t, self.r, self.tid, self.lane, self.warp
        block_size, threads, looks = self.problem.block_size, self.threads, self.looks
        below = collectives.lanes_below(t, lane)
        chunks = cdiv(number, threads * looks)
        for chunk in t.for_range(0, chunks):
            firsts = [
                (chunk * self.num_warps + warp) * (looks * WARP) + k * WARP for k in range(looks)
            ]
            places = [first + lane for first in firsts]

            def key_at(place: Int) -> Int:
                there = place.below(number)
                return t.select(there, t.load(words, t.select(there, place, 0)) >> _HALF, -1)

            keys = [key_at(at) for at in places]
            heads = [
                t.ballot((at < number) & key.ne(key_at(at - 1)))
                for at, key in zip(places, keys, strict=True)
            ]
            last = t.const(-1)
            for mask, first in zip(heads, firsts, strict=True):
                last = _last_of(t, mask, first, last)
            with t.if_(lane.eq(0)):
                t.store(r.heads, warp, last)
            # mutant: the warps' last heads are read before they are written
            t.block_sync()
            lasts = t.load(r.heads, t.select(lane < self.num_warps, lane, 0))
            earlier = t.ballot((lasts >= 0) & (lane < warp))
            start = t.shfl(lasts, t.highest_bit(earlier) & (WARP - 1))
            start = t.select(earlier.eq(0), t.load(r.before, chunk * 2 + 1), start)
            starts = []
            upto = below | (t.const(1) << lane)
            for mask, first in zip(heads, firsts, strict=True):
                starts.append(_last_of(t, mask & upto, first, start))
                start = _last_of(t, mask, first, start)

            opens = [
                (at < number) & ((at - first) % block_size).eq(0)
                for at, first in zip(places, starts, strict=True)
            ]
            openers = [t.ballot(condition) for condition in opens]
            added = [t.popc(mask) for mask in openers]
            index, all_added = _over_warps(t, sum(added, t.const(0)), r.scratch)
            known = t.load(r.before, chunk * 2)
            index = known + index
            for at, condition, mask, more in zip(places, opens, openers, added, strict=True):
                with t.if_(condition):
                    t.store(r.ranks, index + t.popc(mask & below), at)
                index = index + more
            if self.problem.return_counts:
                for at, key, first in zip(places, keys, starts, strict=True):
                    mine = (key + self.first_expert - self.counts.base).below(self.counts.length)
                    last_pair = key.ne(key_at(at + 1)) & mine
                    with t.if_(at < number):
                        t.store(spare, at, t.select(last_pair, at - first + 1, 0))
            with t.if_(tid.eq(threads - 1)):
                t.store(r.before, chunk * 2 + 2, known + all_added)
                # mutant: a later chunk forgets where its first expert begins
                t.store(r.before, chunk * 2 + 3, start)
        with t.if_(tid.eq(threads - 1)):
            blocks = t.load(r.before, chunks * 2)
            t.store(r.blocks, 0, blocks)
            t.store(r.ranks, blocks, number)

    def exchange(self) -> tuple[Int, Int]:
        """(blocks of the ranges before mine, of all)."""
        t, r = self.t, self.r
        t.block_sync()
        if t.cluster == 1:
            return t.const(0), t.load(r.blocks, 0)
        # mutant: mail is posted before all CTAs run
        t.cluster_ready()
        # mutant: a CTA of the cluster is told nothing
        with t.if_(self.tid < t.cluster):
            t.post(self.cta - self.rank + self.tid, self.rank, t.load(r.blocks, 0))
        box = t.mail()
        theirs = collectives.value_if(t, self.lane < t.cluster, lambda: t.load(box, self.lane), 0)
        running = collectives.warp_inclusive_scan(t, theirs, self.lane, t.cluster)
        # mutant: a range's own blocks are before it
        return t.shfl(running - theirs, self.rank), t.shfl(running, t.cluster - 1)

    def write(self, words: object, spare: object, number: Int, first_block: Int) -> None:
        """My share of my range: its rows, blocks and counts."""
        t, r, problem = self.t, self.r, self.problem
        n, block_size = self.sizes.num_pairs, problem.block_size
        blocks = t.load(r.blocks, 0)
        me, step = self.copy * self.threads + self.tid, self.copies * self.threads
        width = 4 if self.wide else 1

        def write_row(row: Int, place: Int, end: Int) -> None:
            real = place < end
            pair = collectives.value_if(t, real, lambda: t.load(words, place) & _LOW, n)
            t.store(r.sorted_token_ids, row, pair)
            if problem.return_inverse:
                with t.if_(real):
                    t.store(r.row_of_pair, pair, row)

        per_block = block_size // width
        for i in t.for_range(me, blocks * per_block, step):
            block = i // per_block
            place = t.load(r.ranks, block) + (i - block * per_block) * width
            end = t.load(r.ranks, block + 1)
            row = first_block * block_size + i * width
            if not self.wide:
                write_row(row, place, end)
                continue
            with t.if_(place >= end):
                t.store4(r.sorted_token_ids, row, n)
            with t.if_(place < end):
                for k in range(4):
                    write_row(row + k, place + k, end)
        for block in t.for_range(me, blocks, step):
            expert = self.first_expert + (t.load(words, t.load(r.ranks, block)) >> _HALF)
            label = common.block_label(t, r, problem, expert)
            t.store(r.expert_ids, first_block + block, label)
        if problem.return_counts:
            for at in t.for_range(self.tid, number, self.threads):
                count = t.load(spare, at)
                with t.if_(count > 0):
                    expert = self.first_expert + (t.load(words, at) >> _HALF)
                    t.store(r.tokens_per_expert, expert, count)

    def fill(self, in_use: Int) -> None:
        """Writes -1 and the sentinel behind the `in_use` blocks."""
        t, r, sizes = self.t, self.r, self.sizes
        me, everyone = self.cta * self.threads + self.tid, t.num_ctas * self.threads
        for block in collectives.strided(t, in_use + me, sizes.num_blocks, everyone):
            t.store(r.expert_ids, block, -1)
        row, capacity = in_use * self.problem.block_size, sizes.capacity
        if self.wide:  # then `row` is a multiple of 4
            whole = capacity // 4 * 4
            for i in collectives.strided(t, row + me * 4, whole, everyone * 4):
                t.store4(r.sorted_token_ids, i, sizes.num_pairs)
            row = t.const(0) + whole
        for i in collectives.strided(t, row + me, capacity, everyone):
            t.store(r.sorted_token_ids, i, sizes.num_pairs)


def build(problem: AlignProblem, config: BlockAlignMosaicConfig, *, vector: bool) -> Program:
    """The one kernel of this form. `vector`: every output starts at a multiple of 16 bytes."""
    threads = config.num_warpgroups * WARPGROUP
    rounds = -(-problem.num_pairs // threads)
    digits = sorted_digits(sorted_range(problem.num_experts, config.num_ctas, config.cluster))
    compared = compared_pairs(problem.num_pairs, threads, config.cluster) if digits else 0
    bins = {f"histogram{k}": (threads // WARP + 1) << bits for k, (_, bits) in enumerate(digits)}

    def body(t: Simt, r: SimpleNamespace) -> None:
        s = _Sorter(t, r, problem, rounds, vector=vector)
        for name, words in bins.items():
            collectives.fill(t, getattr(r, name), 0, words, s.tid, threads, vector=True)
        collectives.fill(t, r.words0, -1, compared, s.tid, threads, vector=True)
        with t.if_(s.tid < 2):
            t.store(r.before, s.tid, 0)
        t.grid_dependency_wait()
        t.launch_dependents()
        number = s.collect()
        # mutant: pairs are sorted before all are collected
        # mutant: openers are read before all are there
        t.block_sync()
        words, spare = (getattr(r, f"words{(len(digits) + k) % 2}") for k in range(2))
        if compared:
            with t.if_(number <= compared):
                s.compare(compared, words, number)
        if compared < problem.num_pairs:
            with t.if_(compared < number):
                for index, (shift, bits) in enumerate(digits):
                    s.sort(index, shift, bits, number)
        s.find_blocks(words, spare, number)
        first_block, in_use = s.exchange()
        s.write(words, spare, number, first_block)
        s.fill(in_use)
        with t.if_(s.cta.eq(0) & s.tid.eq(0)):
            t.store(r.num_tokens_post_padded, 0, in_use * problem.block_size)

    words = rounds * threads
    kernel = Kernel(
        name="moe_align_sorted",
        body=body,
        inputs=problem.inputs,
        outputs=problem.outputs,
        shared={
            "words0": words,
            "words1": words,
            "ranks": words + 1,  # then the openers, and their end
            "before": 2 * rounds + 2,
            "blocks": 1,
            "scratch": WARP,
            "heads": WARP,
            **bins,
        },
        num_warpgroups=config.num_warpgroups,
        num_ctas=config.num_ctas,
        cluster=config.cluster,
        mailbox=config.cluster if config.cluster > 1 else 0,
    )
    return Program(inputs=problem.inputs, kernels=(kernel,), results=tuple(problem.outputs))
