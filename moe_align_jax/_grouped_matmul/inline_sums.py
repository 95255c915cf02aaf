"""Sums of a token's pairs in wgmma's layout: a pair's products are added, and its own column is stored.

Each is a function with two bodies, as those of `inline`. Of the 64 x 8 values, the rows are columns of the
result, of one pair after the other; pair b's are those of column b.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

from moe_align_jax._grouped_matmul import inline
from moe_align_jax._grouped_matmul.token_sum_config import WEIGHT_ROWS

_I32 = jnp.int32


class Group(NamedTuple):
    """Pairs of a token that are multiplied together.

    Attributes:
        pair: the first one.
        experts: of each.
        shares: their weights.
        there: whether each is a pair, and has an expert.
    """

    pair: jax.Array
    experts: tuple[jax.Array, ...]
    shares: tuple[jax.Array, ...]
    there: tuple[jax.Array, ...]

    @property
    def some(self) -> jax.Array:
        """Whether any is there."""
        return functools.reduce(jnp.logical_or, self.there)


def add(
    total: jax.Array,
    acc: jax.Array,
    group: Group,
    bias: Any,
    n: jax.Array,
    *,
    columns: int,
    interpret: bool,
) -> jax.Array:
    """`total` and a group's products, bias included, times the pairs' weights.

    Rows of a pair that is not there stay as they are.

    Args:
        total, acc: float32 `[64, 8]` in wgmma's layout.
        group: the pairs, of 64 / columns rows each.
        bias: `[E, N]` float32 in global memory, or None.
        n: the number of the tile.
        columns: of the result, of a tile.
        interpret: whether Pallas' interpreter runs it.
    """
    together = WEIGHT_ROWS // columns
    if interpret:
        rows = lax.broadcasted_iota(_I32, total.shape, 0)
        width = columns if bias is None else min(columns, bias.shape[1])
        for b in range(together):
            value = acc
            if bias is not None:  # whose columns lie along the pair's rows
                expert = jnp.clip(group.experts[b], 0, bias.shape[0] - 1)
                at = jnp.minimum(n * columns, bias.shape[1] - width)
                own = jnp.pad(bias[expert, pl.ds(at, width)], (0, columns - width))
                own = jnp.roll(own, at - n * columns)
                value = acc + jnp.tile(own, together)[:, None]
            mine = (lax.div(rows, _I32(columns)) == b) & group.there[b]
            total = jnp.where(mine, total + group.shares[b] * value, total)
        return total
    wgmma, scalar = plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT(())
    there = [one.astype(_I32) for one in group.there]
    like = plgpu.ShapeDtypeStruct(total.shape, total.dtype, layout=wgmma)
    vectors = () if bias is None else (bias,)
    types = (*[plgpu.RefType()] * len(vectors), wgmma, wgmma, *[scalar] * (1 + 3 * together))

    @inline.emits(arg_types=types, return_type=like)
    def emit(_, *given):
        ref = given[0] if vectors else None
        sums, values, tile, *rest = given[len(vectors) :]
        scalars = [inline.scalar_of(one) for one in rest]
        expert_of, share_of, there_of = (
            scalars[k * together : (k + 1) * together] for k in range(3)
        )
        kind, found = ir.VectorType.get((2,), ir.F32Type.get()), np.empty_like(sums.registers)
        for i, at in enumerate(np.ndindex(sums.registers.shape)):
            row, own = _row(i), [expert_of[0], share_of[0], there_of[0]]
            block = arith.divui(row, inline.int32(columns))
            for b in range(1, together):
                mine = arith.cmpi(arith.CmpIPredicate.eq, block, inline.int32(b))
                others = expert_of[b], share_of[b], there_of[b]
                own = [arith.select(mine, *both) for both in zip(others, own, strict=True)]
            expert, share, is_there = own
            value = values.registers[at]
            if ref is not None:
                value = arith.addf(
                    value, vector.broadcast(kind, _bias(ref, expert, row, tile, columns))
                )
            value = arith.mulf(value, vector.broadcast(kind, share))
            value = arith.addf(sums.registers[at], value)
            wanted = arith.cmpi(arith.CmpIPredicate.ne, is_there, inline.int32(0))
            found[at] = arith.select(wanted, value, sums.registers[at])
        return mgpu.FragmentedArray(
            _registers=found, _layout=sums.layout, _is_signed=sums.is_signed
        )

    return emit(*vectors, total, acc, n, *group.experts, *group.shares, *there)


def _row(i: int) -> Any:
    """The row of a thread's i-th two values of the sums: a warp has 16 rows, and a lane two of them."""
    thread = inline.thread_index()
    warp, lane = arith.divui(thread, inline.int32(32)), arith.remui(thread, inline.int32(32))
    within = arith.addi(arith.muli(warp, inline.int32(16)), arith.divui(lane, inline.int32(4)))
    return arith.addi(within, inline.int32(8 * i))


def _bias(ref: Any, expert: Any, row: Any, tile: Any, columns: int) -> Any:
    """The bias of a row of the sums; of some expert or column, where there is none."""
    [experts, width] = ref.type.shape
    within = arith.remui(row, inline.int32(columns))
    column = arith.addi(arith.muli(inline.scalar_of(tile), inline.int32(columns)), within)
    column = arith.minsi(column, inline.int32(width - 1))
    expert = arith.minsi(arith.maxsi(expert, inline.int32(0)), inline.int32(experts - 1))
    index = ir.IndexType.get()
    return memref.load(ref, [arith.index_cast(index, expert), arith.index_cast(index, column)])


def store(
    out_ref: Any,
    sums_ref: Any,
    total: jax.Array,
    token: jax.Array,
    n: jax.Array,
    *,
    pairs: int,
    interpret: bool,
) -> None:
    """Each pair's own column of the sums, added up in order and rounded, to the token's row.

    Columns that the result does not have are left out.

    Args:
        out_ref: `[T, N]` in global memory.
        sums_ref: `[64]` float32 in shared memory, where the warps meet; None in the interpreter.
        total: float32 `[64, 8]` in wgmma's layout.
        token, n: the row, and the number of the tile.
        pairs: that were multiplied together.
        interpret: whether Pallas' interpreter runs it.
    """
    width, columns = out_ref.shape[1], WEIGHT_ROWS // pairs
    if interpret:
        own = [total[b * columns : (b + 1) * columns, b] for b in range(pairs)]
        rounded = functools.reduce(jnp.add, own).astype(out_ref.dtype)
        for c in range(0, columns, 8):  # there are multiples of 8 columns
            at = n * columns + c

            @pl.when(at < width)
            def _(c=c, at=at):
                out_ref[token, pl.ds(at, 8)] = rounded[c : c + 8]

        return
    scalar = plgpu.Layout.WG_SPLAT(())

    @inline.emits(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WGMMA, scalar, scalar))
    def emit(_, out, shared, values, row, tile):
        thread, index = inline.thread_index(), ir.IndexType.get()
        equal = functools.partial(arith.cmpi, arith.CmpIPredicate.eq)
        # Lane l has columns 2 (l % 4) and the next one.
        pair_of_lane = arith.remui(thread, inline.int32(4))
        for i, register in enumerate(values.registers.flat):
            at = _row(i)
            block = arith.divui(at, inline.int32(columns))
            odd = equal(arith.remui(block, inline.int32(2)), inline.int32(1))
            first, second = (vector.extract(register, [], [k]) for k in range(2))
            owns = equal(pair_of_lane, arith.divui(block, inline.int32(2)))
            with mgpu_utils.when(owns):
                memref.store(
                    arith.select(odd, second, first), shared, [arith.index_cast(index, at)]
                )
        mgpu_utils.warpgroup_barrier()
        column = arith.addi(arith.muli(inline.scalar_of(tile), inline.int32(columns)), thread)
        mine = inline.less(thread, inline.int32(columns))
        mine = arith.andi(mine, inline.less(column, inline.int32(width)))
        with mgpu_utils.when(mine):
            sums = None
            for b in range(pairs):
                at = arith.addi(thread, inline.int32(b * columns))
                value = memref.load(shared, [arith.index_cast(index, at)])
                sums = value if sums is None else arith.addf(sums, value)
            kind = out.type.element_type
            rounded = sums if kind == ir.F32Type.get() else arith.truncf(kind, sums)
            to = [arith.index_cast(index, one) for one in (inline.scalar_of(row), column)]
            memref.store(rounded, out, to)
        mgpu_utils.warpgroup_barrier()  # the next tile's are stored behind these reads

    emit(out_ref, sums_ref, total, token, n)
