"""Scales by cp.async, 4 bytes at a time: of single rows of x, which TMA cannot read, and of weights.

As in `inline`, each function has two bodies: MLIR, and plain Pallas for the interpreter. Thread t of the 128
copies the scales of rows t, t + 128, ... of a tile.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

from moe_align_jax._grouped_matmul import inline

_I32 = jnp.int32
_BYTES = 4


def _layout(rows: int) -> Any:
    """How a warpgroup's threads hold a value for each of so many rows: each every 128th."""
    count = -(-rows // inline.THREADS)
    return plgpu.Layout.WG_STRIDED((count * inline.THREADS,), vec_size=1)


def find(
    ids_ref: Any,
    start: jax.Array,
    end: jax.Array,
    *,
    rows: int,
    top_k: int,
    limit: Any,
    interpret: bool,
) -> jax.Array:
    """The row of x of each row of a tile that this thread copies the scales of; -1 where there is none.

    Args:
        ids_ref: `[.]` int32 in global memory, the pairs of the rows, at least `start + rows` of them; None
            where row `start + r` is x's own.
        start, end: rows of the tile.
        rows: of the tile.
        top_k: pairs per token.
        limit: ids, or rows, at or past it are none. An int, or an int32 that the launch gives.
        interpret: whether Pallas' interpreter runs it.
    """
    if interpret:
        place = start + jnp.arange(rows, dtype=_I32)
        row = place if ids_ref is None else ids_ref[pl.ds(start, rows)]
        there = (row >= 0) & (row < limit) & (place < end)
        return jnp.where(there, row if ids_ref is None else lax.div(row, _I32(top_k)), -1)
    layout, scalar = _layout(rows), plgpu.Layout.WG_SPLAT(())
    [size] = (-(-rows // inline.THREADS) * inline.THREADS,)
    refs = () if ids_ref is None else (plgpu.RefType(),)

    more, types = inline.bound(limit)

    @inline.emits(
        arg_types=(*refs, scalar, scalar, *types),
        return_type=plgpu.ShapeDtypeStruct((size,), jnp.dtype(_I32), layout=layout),
    )
    def emit(_, *given):
        first, stop = map(inline.scalar_of, given[len(refs) : len(refs) + 2])
        most = inline.bound_of(limit, given[len(refs) + 2 :])
        registers = []
        for i in range(size // inline.THREADS):
            here = arith.addi(inline.thread_index(), inline.int32(i * inline.THREADS))
            inside = inline.less(here, inline.int32(rows))
            # Threads without a row take the first.
            at = arith.addi(first, arith.select(inside, here, inline.int32(0)))
            row = at
            if ids_ref is not None:
                row = memref.load(given[0], [arith.index_cast(ir.IndexType.get(), at)])
            there = arith.cmpi(arith.CmpIPredicate.ult, row, most)
            there = arith.andi(there, arith.andi(inside, inline.less(at, stop)))
            if ids_ref is not None:
                row = arith.divui(row, inline.int32(top_k))
            chosen = arith.select(there, row, inline.int32(-1))
            registers.append(inline.int32_register(chosen))
        return inline.int32_array(registers, layout)

    return emit(*(() if ids_ref is None else (ids_ref,)), start, end, *more)


def copy(
    scales_ref: Any,
    tile_ref: Any,
    found: jax.Array,
    first: jax.Array,
    *,
    stride: int,
    rows: int,
    interpret: bool,
) -> None:
    """Asks for element `first + row * stride` of the scales, for each row that `find` found.

    They are there after `inline.commit_copies` and `inline.wait_for_copies`; 0 for a row that there is not.

    Args:
        scales_ref: of x, in global memory, contiguous.
        tile_ref: `[.]` in shared memory, one for each row of the tile.
        found: of `find`.
        first: the scale of row 0.
        stride: from a row's scale to the next row's.
        rows: of the tile.
        interpret: whether Pallas' interpreter runs it.
    """
    if interpret:
        every = scales_ref[...].reshape(-1)
        scales = every[jnp.where(found >= 0, first + found * stride, 0)]
        tile_ref[pl.ds(0, rows)] = jnp.where(found >= 0, scales, jnp.zeros_like(scales))
        return

    @inline.emits(
        arg_types=(
            *(plgpu.RefType(), plgpu.RefType()),
            *(_layout(rows), plgpu.Layout.WG_SPLAT(())),
        ),
    )
    def emit(_, scales, tile, places, begin):
        thread = inline.thread_index()
        base = arith.addi(inline.shared_address(tile), arith.muli(thread, inline.int32(_BYTES)))
        for i, register in enumerate(places.registers.flat):
            row = vector.extract(register, [], [0])
            there = arith.cmpi(arith.CmpIPredicate.sge, row, inline.int32(0))
            element = arith.addi(inline.scalar_of(begin), arith.muli(row, inline.int32(stride)))
            element = arith.select(there, element, inline.int32(0))
            source = inline.global_address(scales, element, _BYTES)
            target = arith.addi(base, inline.int32(i * inline.THREADS * _BYTES))
            size = arith.select(there, inline.int32(_BYTES), inline.int32(0))
            here = arith.addi(thread, inline.int32(i * inline.THREADS))
            with mgpu_utils.when(inline.less(here, inline.int32(rows))):
                mgpu_utils.inline_ptx(
                    "cp.async.ca.shared.global [$0], [$1], 4, $2;",
                    *(target, source, size),
                    has_side_effects=True,
                )

    emit(scales_ref, tile_ref, found, first)


def copy_groups(
    scales_ref: Any, row_ref: Any, first: jax.Array, *, count: int, interpret: bool
) -> None:
    """Asks for elements `first` on of an array of scales, `count` of them: one thread for each.

    They are there for this thread after `await_groups`.

    Args:
        scales_ref: in global memory, contiguous.
        row_ref: `[.]` in shared memory, at least `count`.
        first: element of the array.
        count: how many.
        interpret: whether Pallas' interpreter runs it.
    """
    if interpret:
        row_ref[pl.ds(0, count)] = scales_ref[...].reshape(-1)[first + jnp.arange(count)]
        return

    @inline.emits(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def emit(_, scales, row, begin):
        thread = inline.thread_index()
        base = inline.shared_address(row)
        for i in range(-(-count // inline.THREADS)):
            here = arith.addi(thread, inline.int32(i * inline.THREADS))
            with mgpu_utils.when(inline.less(here, inline.int32(count))):
                element = arith.addi(inline.scalar_of(begin), here)
                source = inline.global_address(scales, element, _BYTES)
                target = arith.addi(base, arith.muli(here, inline.int32(_BYTES)))
                mgpu_utils.inline_ptx(
                    "cp.async.ca.shared.global [$0], [$1], 4;",
                    *(target, source),
                    has_side_effects=True,
                )

    emit(scales_ref, row_ref, first)


def await_groups(*, interpret: bool) -> None:
    """Until what this thread asked for is there. A warpgroup that stores by TMA would wait for its stores,
    too: ptxas counts both in one place."""
    if interpret:
        return

    @inline.emits()
    def emit(_):
        mgpu_utils.inline_ptx("cp.async.wait_all;", has_side_effects=True)

    emit()
