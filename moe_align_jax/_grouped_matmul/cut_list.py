"""The kernel that cuts the blocks of each expert anew, into tiles of about one height.

Blocks of one expert that follow each other are a run. Where every block of it but the last is full, its pairs
stand in neighbouring rows, with padding behind the last of them, so that the run may be cut into as many
tiles as it has blocks, none of which is much taller than it must be: 512 rows in three blocks of 184 rows
are three tiles of 176, not of 184, 184 and 144. Tiles of about one height keep the CTAs that read the same
weights at the same step. Any other block is a run of its own.

One CTA. Each thread has some neighbouring blocks. As many tiles as blocks: tile b is the place-th of its run,
or the list is sorted by height, and dealt out to the CTAs of the product.
"""

import functools
import operator
from types import SimpleNamespace
from typing import Any, NamedTuple

from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._simt.collectives import (
    block_exclusive_scan,
    block_exclusive_scans,
    value_if,
)
from moe_align_jax._simt.language import WARP, Int, Kernel, Program, Simt

_WARPGROUPS = 4
_THREADS = 128 * _WARPGROUPS
STEP = 8  # rows: heights differ by a multiple of it
_ROWS_AT_ONCE = 16  # of a block that are first asked for their last one, whether it holds a pair
_COUNT = 1 << 16  # two counts of blocks in a word: the second in units of it
_OPEN = 1 << 16  # counts blocks that are not full, above the count of runs


class CutList(NamedTuple):
    """Blocks, and the heights of the tiles that they are cut into.

    Attributes:
        num_rows: of the array.
        block: rows of a block.
        num_blocks: B, the last of which may lie partly behind the array.
        num_experts: weights that there are.
        num_pairs: ids below it are pairs; 0: the last id tells it.
        heights: of tiles, falling; the first is that of a block.
        exact: a run's pairs are shared evenly by its tiles, to 8 rows, and each tile has the least height for
            its share: a run has at most two heights. Otherwise all have that of the largest share.
        falling: tiles are listed from the tallest to the lowest, those without rows last; of one height in
            the order of their blocks. A run has one height then: its tiles remain neighbours. Not `exact`.
        a_round: with `falling`: tiles that the product's CTAs take at the same time, in rounds; see
            `_Body.dealt`. 0: they are not dealt out, but taken as they are listed.
    """

    num_rows: int
    block: int
    num_blocks: int
    num_experts: int
    num_pairs: int
    heights: tuple[int, ...]
    exact: bool
    falling: bool = False
    a_round: int = 0


def of(
    problem: MatmulProblem,
    heights: tuple[int, ...],
    exact: bool,
    falling: bool = False,
    a_round: int = 0,
) -> CutList:
    """The list for a problem of "blocks"."""
    sizes = problem.num_rows, problem.block_size, problem.num_blocks, problem.num_experts
    pairs = problem.num_tokens * problem.top_k or problem.num_pairs
    return CutList(*sizes, pairs, heights, exact, falling, a_round)


def build(cut: CutList) -> Program:
    """`(sorted_token_ids [P], expert_ids [B], num_tokens_post_padded [1]) -> (count [1], expert, start, end,
    pairs, empty and behind of each tile [B])`.

    Rows `[start, end)` are multiplied: none, or as many as one of the heights; the first `pairs` of them hold
    a pair. Rows `[empty, behind)`, if there are any, hold none, are in use and no tile's. An expert of -1:
    there are no rows to multiply.
    """
    inputs = {
        "sorted_token_ids": (cut.num_rows,),
        "expert_ids": (cut.num_blocks,),
        "num_tokens_post_padded": (1,),
    }
    listed = ("expert", "start", "end", "pairs", "empty", "behind")
    outputs = {"count": (1,)} | dict.fromkeys(listed, (cut.num_blocks,))
    kernel = Kernel(
        name="cut_blocks",
        body=lambda t, r: _Body(t, r, cut).run(),
        inputs=inputs,
        outputs=outputs,
        shared={
            "first": cut.num_blocks + 1,  # block of each run, and the end of the last one
            "open": cut.num_blocks,  # blocks before it that are not full
            "held": cut.num_blocks,  # pairs
            "sums": WARP,
        }
        | ({"class_sums": WARP * (len(cut.heights) // 2 + 1)} if cut.falling else {}),
        num_warpgroups=_WARPGROUPS,
        num_ctas=1,
        partial=frozenset(listed),
    )
    return Program(inputs=inputs, kernels=(kernel,), results=tuple(outputs))


def _height(t: Simt, cut: CutList, rows: Int) -> Int:
    """The least height that has so many rows."""
    found = t.const(cut.heights[0])
    for each in cut.heights[1:]:
        found = t.select(rows <= each, each, found)
    return found


def share(t: Simt, cut: CutList, pairs: Int, count: Int, place: Int) -> tuple[Int, Int]:
    """(First row, height) of the place-th of `count` tiles that share a run's pairs."""
    units = (pairs + (STEP - 1)) // STEP
    if not cut.exact:
        rows = _height(t, cut, (units + (count - 1)) // count * STEP)
        return place * rows, rows
    low = units // count
    more = units - low * count  # so many tiles, the first ones, are a step higher
    lower, higher = _height(t, cut, low * STEP), _height(t, cut, (low + 1) * STEP)
    start = place * lower + t.select(place < more, place, more) * (higher - lower)
    return start, t.select(place < more, higher, lower)


def padding(t: Simt, cut: CutList, pairs: Int, count: Int, place: Int) -> tuple[Int, Int]:
    """(First row, row behind the last one) of those of a run that hold no pair and are no tile's, which the
    place-th of its tiles clears: each an equal share, so that none falls behind the others."""
    start, rows = share(t, cut, pairs, count, count - 1)
    used = start + t.select(pairs > start, rows, 0)
    each = (count * cut.block - used + (count - 1)) // count
    first = used + place * each
    last = first + each
    behind = count * cut.block
    return first, t.select(last < behind, last, behind)


def limit_of(t: Simt, cut: CutList, ids: Any) -> Int:
    """Ids below it are pairs."""
    if cut.num_pairs:
        return t.const(cut.num_pairs)
    limit = t.load(ids, cut.num_rows - 1)
    return t.select(limit > 0, limit, 0)


class _Body:
    """What the one CTA does: it counts the pairs of each block and finds the runs, then cuts each of them."""

    def __init__(self, t: Simt, r: SimpleNamespace, cut: CutList):
        self.t, self.r, self.cut = t, r, cut
        each = -(-cut.num_blocks // _THREADS)  # of a thread
        self.blocks = [t.thread_id() * each + k for k in range(each)]

    def run(self) -> None:
        """Finds the runs, and cuts them."""
        t, r, cut = self.t, self.r, self.cut
        t.grid_dependency_wait()
        used = t.load(r.num_tokens_post_padded, 0)
        used = (t.select(used > 0, used, 0) + (cut.block - 1)) // cut.block
        used = t.select(used < cut.num_blocks, used, cut.num_blocks)
        limit = limit_of(t, cut, r.sorted_token_ids)
        experts = [self.expert(block, used) for block in self.blocks]
        before = self.expert(self.blocks[0] - 1, used)
        found = []  # of each block: 1 where a run begins, plus `_OPEN` where it is not full
        for block, expert in zip(self.blocks, experts, strict=True):
            held = self.held(block, limit)
            there = block < used
            begins = block.eq(0) | expert.ne(before) | (expert < 0)
            count = t.select(begins, 1, 0) + t.select(held < cut.block, _OPEN, 0)
            found.append((held, begins, t.select(there, count, 0)))
            before = expert
        total = found[0][2]
        for _, _, count in found[1:]:
            total = total + count
        running, everything = block_exclusive_scan(t, total, r.sums)
        runs = []
        for block, (held, begins, count) in zip(self.blocks, found, strict=True):
            opened, running = running // _OPEN, running + count
            runs.append(running % _OPEN - 1)
            with t.if_(block < used):
                t.store(r.held, block, held)
                t.store(r.open, block, opened)
            with t.if_((block < used) & begins):
                t.store(r.first, runs[-1], block)
        with t.if_(t.thread_id().eq(0)):
            t.store(r.first, everything % _OPEN, used)
            t.store(r.count, 0, used)
        t.block_sync()
        places = self.blocks
        if cut.falling:
            classes = [
                value_if(
                    t,
                    block < used,
                    functools.partial(self.height_class, block, expert, run),
                    len(cut.heights) + 1,
                )
                for block, expert, run in zip(self.blocks, experts, runs, strict=True)
            ]
            places = self.by_class(classes)
        if cut.a_round:
            places = self.dealt(places, used)
        for block, expert, run, place in zip(self.blocks, experts, runs, places, strict=True):
            with t.if_(block < used):
                self.tile(block, expert, run, place)

    def expert(self, block: Int, used: Int) -> Int:
        """Whose weights a block uses; -1 for none, and where there is no such block."""
        there = block.below(used)
        expert = self.t.load(self.r.expert_ids, self.t.select(there, block, 0))
        return self.t.select(there & expert.below(self.cut.num_experts), expert, -1)

    def is_pair(self, row: Int, there: Int, limit: Int) -> Int:
        """1 where a row holds a pair, else 0."""
        there = there & row.below(self.cut.num_rows)
        pair = self.t.load(self.r.sorted_token_ids, self.t.select(there, row, 0))
        return self.t.select(there & pair.below(limit), 1, 0)

    def held(self, block: Int, limit: Int) -> Int:
        """Pairs of a block; they come first. Of a full block, as most are, one row is read."""
        t, size = self.t, self.cut.block
        first, there = block * size, block < self.cut.num_blocks
        full = self.is_pair(first + (size - 1), there, limit)
        there = there & full.eq(0)
        groups = t.const(0)
        for last in range(_ROWS_AT_ONCE - 1, size - 1, _ROWS_AT_ONCE):
            groups = groups + self.is_pair(first + last, there, limit)
        before = groups * _ROWS_AT_ONCE
        found = before
        for row in range(_ROWS_AT_ONCE - 1):  # of the group that is not full
            at = before + row
            found = found + self.is_pair(first + at, there & (at < size), limit)
        return t.select(full > 0, size, found)

    def height_class(self, block: Int, expert: Int, run: Int) -> Int:
        """Which of the heights the tile of a block has; their number, of a tile without rows."""
        t, cut = self.t, self.cut
        first, behind, pairs = self.run_of(block, expert, run)
        start, rows = share(t, cut, pairs, behind - first, block - first)
        found = t.const(0)
        for each in cut.heights[1:]:
            found = found + t.select(rows <= each, 1, 0)
        return t.select(start < pairs, found, len(cut.heights))

    def by_class(self, classes: list[Int]) -> list[Int]:
        """Place of each block's tile: lower classes first, in the order of blocks."""
        t, kinds = self.t, range(0, len(self.cut.heights) + 1, 2)  # two classes a scan
        ones = [
            [t.select(c.eq(low), 1, 0) + t.select(c.eq(low + 1), _COUNT, 0) for c in classes]
            for low in kinds
        ]
        totals = [functools.reduce(operator.add, each) for each in ones]
        scans = block_exclusive_scans(t, totals, self.r.class_sums)
        places, before = [t.const(0) for _ in classes], t.const(0)
        for low, each, (running, everything) in zip(kinds, ones, scans, strict=True):
            of_low = everything % _COUNT
            for k, (kind, one) in enumerate(zip(classes, each, strict=True)):
                next_class = running // _COUNT + of_low
                here = t.select(kind.eq(low), running % _COUNT, next_class) + before
                places[k] = t.select(kind.eq(low) | kind.eq(low + 1), here, places[k])
                running = running + one
            before = before + of_low + everything // _COUNT
        return places

    def dealt(self, places: list[Int], used: Int) -> list[Int]:
        """The same places, dealt out: the CTAs that take a tile of the last round, which as a rule not all of
        them do, have the lowest tiles in all rounds, and the others the tallest ones. All have about as much
        to do then, and tiles of few rows, which wait for weights, run beside those that wait for the tensor
        cores. The order remains where these would be more than two thirds of them: the others, all of whose
        tiles are tall, would end last.
        """
        t, a_round = self.t, self.cut.a_round
        rounds = (used + (a_round - 1)) // a_round
        low = used - (rounds - 1) * a_round  # tiles of the last round
        low = t.select(low * 3 > 2 * a_round, a_round, low)  # all of them: as they are
        high = a_round - low
        tall, width = high * (rounds - 1), t.select(high > 0, high, 1)
        found = []
        for place in places:
            rest = place - tall
            of_tall = place // width * a_round + low + place % width
            of_low = rest // low * a_round + rest % low
            found.append(t.select(place < tall, of_tall, of_low))
        return found

    def run_of(self, block: Int, expert: Int, run: Int) -> tuple[Int, Int, Int]:
        """(First block, block behind the last one, pairs) of a block's run, or of it alone."""
        t, r, cut = self.t, self.r, self.cut
        first, behind = t.load(r.first, run), t.load(r.first, run + 1)
        full = t.load(r.open, behind - 1).eq(t.load(r.open, first))  # all but the last
        first, behind = t.select(full, first, block), t.select(full, behind, block + 1)
        pairs = (behind - 1 - first) * cut.block + t.load(r.held, behind - 1)
        return first, behind, t.select(expert >= 0, pairs, 0)

    def tile(self, block: Int, expert: Int, run: Int, at: Int) -> None:
        """Lists the tile of a block of that run, in place `at`."""
        t, r, cut = self.t, self.r, self.cut
        first, behind, pairs = self.run_of(block, expert, run)
        count, place = behind - first, block - first
        start, rows = share(t, cut, pairs, count, place)
        left = pairs - start
        left = t.select(left > 0, left, 0)
        base, end = first * cut.block, start + t.select(left > 0, rows, 0)
        empty, after = padding(t, cut, pairs, count, place)
        after = base + after
        t.store(r.expert, at, expert)
        t.store(r.start, at, base + start)
        t.store(r.end, at, base + end)
        t.store(r.pairs, at, t.select(left < rows, left, rows))
        t.store(r.empty, at, base + empty)
        t.store(r.behind, at, t.select(after < cut.num_rows, after, cut.num_rows))
