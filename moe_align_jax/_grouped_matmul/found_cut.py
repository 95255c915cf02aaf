"""Tiles of several heights that the product itself finds, without a launch that lists them.

As many tiles as blocks: tile b is one of those that the run of block b is cut into. A run is a stretch of
blocks of one expert, all full but perhaps the last one. Each warp of the loading warpgroup asks for the
experts of the 32 blocks on either side of b, and for the last id of each, side by side: votes tell where the
run begins and ends. Then the ids of the run's last block tell its pairs. So two loads wait for each other,
which the stages of the ring hide. The warpgroups that multiply read the result in shared memory.

Where blocks of a run are not full, it ends there: a caller may have made such blocks, or an expert map.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul import cut_list
from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.cut_list import STEP, CutList
from moe_align_jax._grouped_matmul.found_inline import inline_scalars
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._simt.language import WARP, Int, Simt

_I32 = jnp.int32
SLOTS = 2  # of what is told: the tile that is multiplied, and the next one
WORDS = 8  # of a slot: first row, rows, n tile, pairs
FOUND = 6  # values of a tile


def find(
    problem: MatmulProblem,
    config: Config,
    experts: Any,
    ids: Any,
    at: jax.Array,
    used: jax.Array,
    limit: jax.Array,
) -> list[jax.Array]:
    """What `tile_of` says, in the kernel of that problem; `experts`, `ids`: in global memory.

    A launch of another size has fewer blocks than the problem: none is read that is not in use.
    """
    cut = cut_list.of(problem, config.heights, config.exact)
    shapes = {"sorted_token_ids": (cut.num_rows,), "expert_ids": (cut.num_blocks,)}

    def compute(t: Simt, r: SimpleNamespace, *values: Int) -> tuple[Int, ...]:
        return tile_of(t, r, cut, *values)

    refs = {"sorted_token_ids": ids, "expert_ids": experts}
    return inline_scalars(problem, config, compute, FOUND, (at, used, limit), shapes, **refs)


def tile_of(
    t: Simt, r: SimpleNamespace, cut: CutList, at: Int, used: Int, limit: Int
) -> tuple[Int, ...]:
    """(Expert, first row, end, pairs, and the first row and end of those that it clears) of tile `at`.

    By whole warps, of which each finds the same. `used`: blocks in use, all of whose rows are there; `at` is
    one of them. Ids below `limit` are pairs.
    """
    expert, before, after = _run_of(t, r, cut, at, used, limit)
    valid = expert.below(cut.num_experts)
    before, after = t.select(valid, before, 0), t.select(valid, after, 1)
    first, count = at - before, before + after
    held = _held(t, r, cut, first + (count - 1), used, limit)
    pairs = t.select(valid, (count - 1) * cut.block + held, 0)
    start, rows = cut_list.share(t, cut, pairs, count, before)
    left = t.select(pairs > start, pairs - start, 0)
    row = first * cut.block + start
    end = row + t.select(left > 0, rows, 0)
    base = first * cut.block
    empty, behind = cut_list.padding(t, cut, pairs, count, before)
    return expert, row, end, t.select(left < rows, left, rows), base + empty, base + behind


def _run_of(
    t: Simt, r: SimpleNamespace, cut: CutList, at: Int, used: Int, limit: Int
) -> tuple[Int, Int, Int]:
    """(Expert of block `at`, blocks of its run before it, blocks from it on); a window of 32 at a time."""
    lane = t.thread_id() % WARP

    def expert_of(block: Int) -> Int:
        """-2 where there is no such block, which is no block's expert."""
        inside = block.below(used)
        expert = t.load(r.expert_ids, t.select(inside, block, 0))
        return t.select(inside, expert, -2)

    def full(block: Int) -> Int:
        inside = block.below(used)
        row = t.select(inside, block, 0) * cut.block + (cut.block - 1)
        return inside & t.load(r.sorted_token_ids, row).below(limit)

    def ahead(first: Int) -> tuple[Int, Int]:
        """(Experts of 32 blocks from there on, whether the block before each is full)."""
        block = first + lane
        return expert_of(block), full(block - 1)

    def back(behind: Int) -> tuple[Int, Int]:
        """(Experts of the 32 blocks before that one, the nearest first, whether each is full)."""
        block = behind - 1 - lane
        return expert_of(block), full(block)

    near, far = ahead(at), back(at)  # their loads run side by side
    expert = t.shfl(near[0], 0)

    def count(window: tuple[Int, Int]) -> Int:
        """How many of them, the first ones, belong to the run."""
        whose, filled = window
        breaks = t.ballot(whose.eq(expert) & filled) ^ -1
        least = t.highest_bit(breaks & (0 - breaks))
        return t.select(breaks.eq(0), WARP, least)

    def go_on(found: Int, window: Callable[[Int], tuple[Int, Int]]) -> Int:
        """Blocks of the run, of which the first window has so many."""

        def step(values):
            more = count(window(values[0]))
            return values[0] + more, more

        return t.values_while((found, found), lambda values: values[1].eq(WARP), step)[0]

    # A block belongs to its own run, whatever the one before it holds.
    own = near[0], near[1] | lane.eq(0)
    after = go_on(count(own), lambda done: ahead(at + done))
    return expert, go_on(count(far), lambda done: back(at - done)), after


def _held(t: Simt, r: SimpleNamespace, cut: CutList, block: Int, used: Int, limit: Int) -> Int:
    """Pairs of a block; they come first, and votes count them."""
    lane, total = t.thread_id() % WARP, t.const(0)
    inside = block.below(used)
    first = t.select(inside, block, 0) * cut.block
    for done in range(0, cut.block, WARP):
        row = lane + done
        there = row < cut.block
        pair = t.load(r.sorted_token_ids, first + t.select(there, row, 0))
        total = total + t.popc(t.ballot(there & pair.below(limit)))
    return total


# -- for the interpreter, which runs none of that -----------------------------------------------


def find_plainly(
    problem: MatmulProblem,
    config: Config,
    experts: Any,
    ids: Any,
    at: jax.Array,
    used: jax.Array,
    limit: jax.Array,
) -> tuple[jax.Array, ...]:
    """What `find` says, one block after the other."""
    block = problem.block_size
    there = problem.num_rows // block
    expert = experts[at]
    valid = (expert >= 0) & (expert < problem.num_experts)

    def goes_on(one):
        """Whether the block behind it is of its run."""
        inside = valid & (one >= 0) & (one + 1 < used)
        here = jnp.clip(one, 0, there - 1)
        pair = ids[here * block + block - 1]
        full = (pair >= 0) & (pair < limit)
        behind = experts[jnp.minimum(here + 1, there - 1)]
        return inside & full & (experts[here] == expert) & (behind == expert)

    before = lax.while_loop(lambda k: goes_on(at - k - 1), lambda k: k + 1, _I32(0))
    after = lax.while_loop(lambda k: goes_on(at + k - 1), lambda k: k + 1, _I32(1))
    first, count = at - before, before + after
    last = ids[pl.ds((first + count - 1) * block, block)]
    held = jnp.sum((last >= 0) & (last < limit), dtype=_I32)
    pairs = jnp.where(valid, (count - 1) * block + held, 0)
    start, rows = share_plainly(config, pairs, count, before)
    left = jnp.maximum(pairs - start, 0)
    base = first * block
    row = base + start
    last, height = share_plainly(config, pairs, count, count - 1)
    used_rows = last + jnp.where(pairs > last, height, 0)
    each = lax.div(count * block - used_rows + (count - 1), count)
    empty = used_rows + before * each
    behind = jnp.minimum(empty + each, count * block)
    end = row + jnp.where(left > 0, rows, 0)
    return expert, row, end, jnp.minimum(left, rows), base + empty, base + behind


def share_plainly(
    config: Config, pairs: Any, count: Any, place: Any
) -> tuple[jax.Array, jax.Array]:
    """What `cut_list.share` says."""

    def height(rows: Any) -> Any:
        found = _I32(config.heights[0])
        for each in config.heights[1:]:
            found = jnp.where(rows <= each, each, found)
        return found

    units = lax.div(pairs + (STEP - 1), _I32(STEP))
    if not config.exact:
        rows = height(lax.div(units + (count - 1), count) * STEP)
        return place * rows, rows
    low = lax.div(units, count)
    more = units - low * count
    lower, higher = height(low * STEP), height((low + 1) * STEP)
    start = place * lower + jnp.minimum(place, more) * (higher - lower)
    return start, jnp.where(place < more, higher, lower)


# -- from the warpgroup that loads to those that multiply -----------------------------------------


class Told:
    """What the loading warpgroup says about its tile, in shared memory, to those that multiply.

    Each slot has two barriers: it is told, and it was read.
    """

    def __init__(self, words: Any, told: Any, read: Any):
        self.words, self.told, self.was_read = words, told, read

    def allow(self) -> None:
        """A warpgroup that multiplies lets the first tiles be told."""
        for slot in range(SLOTS):
            plgpu.barrier_arrive(self.was_read.at[slot])

    def tell(
        self, i: Any, *values: jax.Array, more: Callable[[jax.Array], None] | None = None
    ) -> None:
        """The loading warpgroup says so of its i-th tile; `more(slot)` writes what else belongs to it."""
        slot = lax.rem(i, _I32(SLOTS))
        plgpu.barrier_wait(self.was_read.at[slot])
        for place, value in enumerate(values):
            self.words[slot * WORDS + place] = value
        if more:
            more(slot)
        plgpu.barrier_arrive(self.told.at[slot])

    def hear(self, i: Any, count: int, *, keep: bool = False) -> list[jax.Array]:
        """What was told of the i-th tile. `keep`: nothing else is told in its place before `done`."""
        slot = lax.rem(i, _I32(SLOTS))
        plgpu.barrier_wait(self.told.at[slot])
        found = [self.words[slot * WORDS + place] for place in range(count)]
        if not keep:
            self.done(i)
        return found

    def done(self, i: Any) -> None:
        """A warpgroup that multiplies has read what belongs to its i-th tile."""
        plgpu.barrier_arrive(self.was_read.at[lax.rem(i, _I32(SLOTS))])

    def end(self, count: Any) -> None:
        """The loading warpgroup leaves no barrier in the midst of a phase, after so many tiles."""
        for ahead in range(SLOTS):
            plgpu.barrier_wait(self.was_read.at[lax.rem(count + ahead, _I32(SLOTS))])
