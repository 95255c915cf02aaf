"""Tiles of several heights that the product itself finds, without a launch that lists them.

As many tiles as blocks: tile b is one of those that the run of block b is cut into. A run is a stretch of
blocks of one expert, all full but perhaps the last one. Each warp of the loading warpgroup asks for the
experts of the 32 blocks on either side of b, and for the last id of each, side by side: votes tell where the
run begins and ends. Then the ids of the run's last block tell its pairs. So two loads wait for each other,
which the stages of the ring hide. The warpgroups that multiply read the result in shared memory.

Where blocks of a run are not full, it ends there: a caller may have made such blocks, or an expert map.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, scf

from moe_align_jax._grouped_matmul import inline
from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.cut_list import STEP
from moe_align_jax._grouped_matmul.inline import int32, scalar_of
from moe_align_jax._grouped_matmul.problem import MatmulProblem

_I32 = jnp.int32
_LANES = 32  # of a warp
SLOTS = 2  # of what is told: the tile that is multiplied, and the next one
WORDS = 8  # of a slot: first row, rows, n tile, pairs


def find(
    problem: MatmulProblem,
    config: Config,
    experts: Any,
    ids: Any,
    at: jax.Array,
    used: jax.Array,
    limit: Any,
    *,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """(expert, first row, end, pairs, row behind those that follow and hold none) of tile `at`.

    Args:
        problem, config: of the kernel.
        experts, ids: `expert_ids` and `sorted_token_ids`, in global memory.
        at: less than `used`, or the rows are of no use.
        used: blocks in use, all of whose rows are there.
        limit: ids below it are pairs.
        interpret: whether Pallas' interpreter runs it.
    """
    block = problem.block_size
    limit = jnp.maximum(_I32(limit), 0)
    there = problem.num_rows // block
    find_run = _plain_run if interpret else _run
    expert, before, after = find_run(experts, ids, at, used, limit, block=block, there=there)
    valid = (expert >= 0) & (expert < problem.num_experts)
    before, after = jnp.where(valid, before, 0), jnp.where(valid, after, 1)
    first, count = at - before, before + after
    held = inline.count_rows(
        ids, (first + count - 1) * block, limit, rows=block, interpret=interpret
    )
    pairs = jnp.where(valid, (count - 1) * block + held, 0)
    start, rows = _cut(config, pairs, count, before)
    left = jnp.maximum(pairs - start, 0)
    rows_there = jnp.where(left > 0, rows, 0)
    row = first * block + start
    last = before == count - 1
    behind = jnp.where(last, (first + count) * block, row + rows)
    return expert, row, row + rows_there, jnp.minimum(left, rows), behind


def _cut(config: Config, pairs: Any, count: Any, place: Any) -> tuple[jax.Array, jax.Array]:
    """(First row, height) of the place-th of `count` tiles that share so many pairs: as `cut_list` has it."""

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
    more = units - low * count  # so many tiles, the first ones, are a step higher
    lower, higher = height(low * STEP), height((low + 1) * STEP)
    start = place * lower + jnp.minimum(place, more) * (higher - lower)
    return start, jnp.where(place < more, higher, lower)


def _plain_run(
    experts: Any, ids: Any, at: Any, used: Any, limit: Any, *, block: int, there: int
) -> tuple[jax.Array, ...]:
    """What `_run` says, one block after the other, for the interpreter."""
    expert = experts[at]

    def goes_on(block_):
        """Whether the block behind it is of its run."""
        inside = (block_ >= 0) & (block_ + 1 < used)
        here = jnp.clip(block_, 0, there - 1)
        pair = ids[here * block + block - 1]
        full = (pair >= 0) & (pair < limit)
        behind = experts[jnp.minimum(here + 1, there - 1)]
        return inside & full & (experts[here] == expert) & (behind == expert)

    before = lax.while_loop(lambda k: goes_on(at - k - 1), lambda k: k + 1, _I32(0))
    after = lax.while_loop(lambda k: goes_on(at + k - 1), lambda k: k + 1, _I32(1))
    return expert, before, after


def _run(
    experts: Any, ids: Any, at: Any, used: Any, limit: Any, *, block: int, there: int
) -> tuple[jax.Array, ...]:
    """(Expert of block `at`, blocks of its run before it, blocks from it on)."""
    scalar = plgpu.Layout.WG_SPLAT(())
    result = plgpu.ShapeDtypeStruct((), jnp.dtype(_I32), layout=scalar)
    types = (plgpu.RefType(), plgpu.RefType(), scalar, scalar, scalar)

    @inline.emits(arg_types=types, return_type=(result, result, result))
    def emit(_, experts_, ids_, at_, used_, limit_):
        begin, stop, most = scalar_of(at_), scalar_of(used_), scalar_of(limit_)
        lane = arith.remui(inline.thread_index(), int32(_LANES))

        def load(array, place):
            return memref.load(array, [arith.index_cast(ir.IndexType.get(), place)])

        def expert_of(one):
            """Of a block; -2 where there is none: no block's."""
            inside = _below(one, int32(there))
            found = load(experts_, arith.select(inside, one, int32(0)))
            return arith.select(arith.andi(inside, inline.less(one, stop)), found, int32(-2))

        def full(one):
            inside = _below(one, int32(there))
            row = arith.muli(arith.select(inside, one, int32(0)), int32(block))
            pair = load(ids_, arith.addi(row, int32(block - 1)))
            return arith.andi(inside, _below(pair, most))

        def ahead(first):
            """(Experts of 32 blocks from there on, whether each block before them is full)."""
            one = arith.addi(first, lane)
            return expert_of(one), full(arith.subi(one, int32(1)))

        def back(behind):
            """(Experts of the 32 blocks before that one, the nearest first, whether each is full)."""
            one = arith.subi(arith.subi(behind, int32(1)), lane)
            return expert_of(one), full(one)

        near, far = ahead(begin), back(begin)
        expert = _first_lane(near[0])

        def count(window, own=None):
            """How many of a warp's blocks, the first ones, belong to the run."""
            whose, before = window
            before = before if own is None else arith.ori(before, own)
            same = arith.cmpi(arith.CmpIPredicate.eq, whose, expert)
            return _leading(arith.andi(same, before))

        own = arith.cmpi(arith.CmpIPredicate.eq, lane, int32(0))
        after = _go_on(count(near, own), lambda done: count(ahead(arith.addi(begin, done))))
        before = _go_on(count(far), lambda done: count(back(arith.subi(begin, done))))
        return tuple(
            mgpu.FragmentedArray.splat(each, (), is_signed=True) for each in (expert, before, after)
        )

    return emit(experts, ids, at, used, limit)


def _below(a: Any, b: Any) -> Any:
    """`0 <= a < b` of two MLIR values, of which b is not negative."""
    return arith.cmpi(arith.CmpIPredicate.ult, a, b)


def _first_lane(value: Any) -> Any:
    """The value of the warp's first lane."""
    return mgpu_utils.inline_ptx(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;",
        value,
        result_types=inline.i32(),
        has_side_effects=True,
        convergent=True,
    )


def _leading(holds: Any) -> Any:
    """Of the warp's lanes, from the first on, how many say so."""
    return mgpu_utils.inline_ptx(
        "{ .reg .pred p; .reg .b32 votes; setp.eq.b32 p, $1, 0; "
        "vote.sync.ballot.b32 votes, p, 0xffffffff; brev.b32 votes, votes; clz.b32 $0, votes; }",
        arith.extui(inline.i32(), holds),
        result_types=inline.i32(),
        has_side_effects=True,
        convergent=True,
    )


def _go_on(first: Any, more: Any) -> Any:
    """`first`, and where that is all 32 what `more(blocks so far)` adds, until that is fewer."""
    types = [inline.i32(), inline.i32()]  # blocks so far, of which the last window
    loop = scf.WhileOp(types, [first, first])
    asked = loop.before.blocks.append(*types)
    with ir.InsertionPoint.at_block_begin(asked):
        done, last = asked.arguments
        goes = arith.cmpi(arith.CmpIPredicate.eq, last, int32(_LANES))
        scf.condition(goes, [done, last])
    body = loop.after.blocks.append(*types)
    with ir.InsertionPoint.at_block_begin(body):
        done, _ = body.arguments
        found = more(done)
        scf.yield_([arith.addi(done, found), found])
    return loop.results[0]


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

    def tell(self, i: Any, *values: jax.Array) -> None:
        """The loading warpgroup says so of its i-th tile."""
        slot = lax.rem(i, _I32(SLOTS))
        plgpu.barrier_wait(self.was_read.at[slot])
        for place, value in enumerate(values):
            self.words[slot * WORDS + place] = value
        plgpu.barrier_arrive(self.told.at[slot])

    def hear(self, i: Any, count: int) -> list[jax.Array]:
        """What was told of the i-th tile."""
        slot = lax.rem(i, _I32(SLOTS))
        plgpu.barrier_wait(self.told.at[slot])
        found = [self.words[slot * WORDS + place] for place in range(count)]
        plgpu.barrier_arrive(self.was_read.at[slot])
        return found

    def end(self, count: Any) -> None:
        """The loading warpgroup leaves no barrier in the midst of a phase, after so many tiles."""
        for ahead in range(SLOTS):
            plgpu.barrier_wait(self.was_read.at[lax.rem(count + ahead, _I32(SLOTS))])
