"""Stores that Pallas has no word for: single rows of a tile, zeros, and parted columns.

As in `inline`, each function has two bodies: MLIR, and plain Pallas for the interpreter.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from moe_align_jax._grouped_matmul.inline import (
    BYTES_TO_NEXT,
    CHUNK_BYTES,
    CHUNKS_PER_ROW,
    ROWS_TO_NEXT,
    THREADS,
    TILE_BYTES,
    emits,
    first_chunk_of_thread,
    i32,
    i64,
    int32,
    int64,
    less,
    scalar_of,
    shared_address,
    thread_index,
)
from moe_align_jax._grouped_matmul.inline_wgmma import PARTED

_I32 = jnp.int32


# -- into global memory ----------------------------------------------------------------------------


def store_rows(
    tile_ref: Any,
    transforms: tuple[Any, ...],
    out_ref: Any,
    row: jax.Array,
    end: jax.Array,
    column: jax.Array,
    *,
    rows: int,
    max_rows: int,
    interpret: bool,
) -> None:
    """A tile's rows `row + i` below `end`, to `out_ref` `[., N]` in global memory, from `column` on.

    `out_ref` may be `[e, max_rows, N]`: rows are counted over all of e. Columns that the result does not have
    are left out: N and `column` are multiples of 8.
    """
    columns = out_ref.shape[-1]
    values = CHUNK_BYTES // jnp.dtype(out_ref.dtype).itemsize  # of a chunk
    if interpret:

        def one(r, _):
            for chunk in range(CHUNKS_PER_ROW):
                at = column + chunk * values

                @pl.when((row + r < end) & (at < columns))
                def _(chunk=chunk, at=at):
                    part = tile_ref[r, pl.ds(chunk * values, values)]
                    where = (row + r,)
                    if max_rows:
                        where = lax.div(row + r, _I32(max_rows)), lax.rem(row + r, _I32(max_rows))
                    out_ref[*where, pl.ds(at, values)] = part

            return ()

        lax.fori_loop(0, rows, one, ())
        return
    scalar = plgpu.Layout.WG_SPLAT(())

    @emits(
        arg_types=(plgpu.RefType(transforms), plgpu.RefType(), scalar, scalar, scalar),
    )
    def emit(_, tile, out, first, stop, start):
        in_tile, chunk, offset = first_chunk_of_thread()
        base = arith.addi(shared_address(tile), offset)
        at = arith.addi(scalar_of(start), arith.muli(chunk, int32(values)))
        inside = less(at, int32(columns))
        for i in range(-(-rows * CHUNKS_PER_ROW // THREADS)):
            here = arith.addi(in_tile, int32(i * ROWS_TO_NEXT))
            target_row = arith.addi(scalar_of(first), here)
            mine = arith.andi(inside, less(target_row, scalar_of(stop)))
            if (i + 1) * THREADS > rows * CHUNKS_PER_ROW:
                mine = arith.andi(mine, less(here, int32(rows)))
            with mgpu_utils.when(mine):
                words = mgpu_utils.inline_ptx(
                    "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
                    arith.addi(base, int32(i * BYTES_TO_NEXT)),
                    result_types=[i32()] * 4,
                    has_side_effects=True,
                )
                # Rows times columns may be more than int32 holds.
                wide = arith.muli(arith.extsi(i64(), target_row), int64(columns))
                wide = arith.addi(wide, arith.extsi(i64(), at))
                pointer = llvm.ptrtoint(i64(), mgpu_utils.memref_ptr(out))
                size = int64(CHUNK_BYTES // values)
                pointer = arith.addi(pointer, arith.muli(wide, size))
                mgpu_utils.inline_ptx(
                    "st.global.v4.b32 [$0], {$1, $2, $3, $4};",
                    *(pointer, *words),
                    has_side_effects=True,
                )

    emit(tile_ref, out_ref, row, end, column)


def store_zeros(
    out_ref: Any,
    row: jax.Array,
    end: jax.Array,
    column: jax.Array,
    columns: int,
    *,
    interpret: bool,
) -> None:
    """Zeros into rows `[row, end)` of `out_ref` `[., N]` in global memory, into so many columns from `column`
    on: none, where `end` is not behind `row`.

    Columns that the result does not have are left out: N and `column` are multiples of 8.
    """
    limit = out_ref.shape[-1]
    values = CHUNK_BYTES // jnp.dtype(out_ref.dtype).itemsize  # of a chunk
    if interpret:

        def one(r, _):
            for chunk in range(columns // values):
                at = column + chunk * values

                @pl.when(at < limit)
                def _(at=at):
                    out_ref[r, pl.ds(at, values)] = jnp.zeros(values, out_ref.dtype)

            return ()

        lax.fori_loop(row, end, one, ())
        return
    per_row = columns // values
    assert THREADS % per_row == 0
    each = THREADS // per_row  # rows at a time
    scalar = plgpu.Layout.WG_SPLAT(())

    @emits(arg_types=(plgpu.RefType(), scalar, scalar, scalar))
    def emit(_, out, first, stop, start):
        chunk = arith.remui(thread_index(), int32(per_row))
        mine = arith.addi(scalar_of(first), arith.divui(thread_index(), int32(per_row)))
        at = arith.addi(scalar_of(start), arith.muli(chunk, int32(values)))
        there = arith.andi(less(mine, scalar_of(stop)), less(at, int32(limit)))
        with mgpu_utils.when(there):
            # Rows times columns may be more than int32 holds.
            wide = arith.muli(arith.extsi(i64(), mine), int64(limit))
            wide = arith.addi(wide, arith.extsi(i64(), at))
            pointer = llvm.ptrtoint(i64(), mgpu_utils.memref_ptr(out))
            pointer = arith.addi(pointer, arith.muli(wide, int64(CHUNK_BYTES // values)))
            mgpu_utils.inline_ptx(
                "st.global.v4.b32 [$0], {$1, $1, $1, $1};",
                *(pointer, int32(0)),
                has_side_effects=True,
            )

    def some(k, _):
        emit(out_ref, row + k * each, end, column)
        return ()

    rounds = lax.div(jnp.maximum(end - row, 0) + (each - 1), _I32(each))
    lax.fori_loop(0, rounds, some, ())


# -- into a tile -----------------------------------------------------------------------------------


def store_parted(
    tile_ref: Any, transforms: tuple[Any, ...], value: jax.Array, *, interpret: bool
) -> None:
    """`tile_ref[...] = value`, `[64, 128 bytes]` in the layout PARTED, in which Pallas stores nothing."""
    if interpret:
        tile_ref[...] = value
        return
    size = jnp.dtype(value.dtype).itemsize

    @emits(arg_types=(plgpu.RefType(transforms), PARTED))
    def emit(_, tile, given):
        thread = thread_index()
        warp, lane = arith.divui(thread, int32(32)), arith.remui(thread, int32(32))
        in_eight, column = arith.divui(lane, int32(4)), arith.remui(lane, int32(4))
        # Rows 16 warp + 8 half + in_eight: tile 2 warp + half of 8 rows.
        base = arith.addi(
            arith.addi(shared_address(tile), arith.muli(warp, int32(2 * TILE_BYTES))),
            arith.muli(in_eight, int32(128)),
        )
        word = ir.IntegerType.get_signless(8 * size)
        columns = given.shape[1] // 4
        registers = given.registers.reshape(columns, 2)
        for four in range(columns):
            first = 4 * four * size  # bytes of the four columns' beginning
            place = arith.xori(int32(first // CHUNK_BYTES), in_eight)
            within = arith.addi(int32(first % CHUNK_BYTES), arith.muli(column, int32(size)))
            at = arith.addi(base, arith.addi(arith.muli(place, int32(CHUNK_BYTES)), within))
            for half in range(2):
                bits = llvm.bitcast(word, vector.extract(registers[four, half], [], [0]))
                mgpu_utils.inline_ptx(
                    f"st.shared.b{8 * size} [$0], $1;",
                    *(arith.addi(at, int32(half * TILE_BYTES)), bits),
                    has_side_effects=True,
                )

    emit(tile_ref, value)


def clear_rows(
    tile_ref: Any,
    transforms: tuple[Any, ...],
    first: jax.Array,
    *,
    shape: tuple[int, int],
    interpret: bool,
    before: int = 0,
) -> None:
    """Zeros into a tile's rows from `first` on, none of which is one of the `before` first. Values have 16
    bits. `shape`: up to which row, and of how many columns."""
    rows, columns = shape
    if interpret:

        def one(r, _):
            @pl.when(r >= first)
            def _():
                tile_ref[r, :] = jnp.zeros(columns, tile_ref.dtype)

            return ()

        lax.fori_loop(before, rows, one, ())
        return
    per_row = columns * 2 // CHUNK_BYTES

    @emits(arg_types=(plgpu.RefType(transforms), plgpu.Layout.WG_SPLAT(())))
    def emit(_, tile, start):
        # The swizzle stays within a row: chunks are taken as they lie, 8 rows of 128 bytes after each other.
        base = arith.addi(shared_address(tile), arith.muli(thread_index(), int32(CHUNK_BYTES)))
        zero = int32(0)
        for i in range(before * per_row // THREADS, rows * per_row // THREADS):
            index = arith.addi(thread_index(), int32(i * THREADS))
            group = arith.muli(arith.divui(index, int32(8 * per_row)), int32(8))
            row = arith.addi(group, arith.remui(arith.divui(index, int32(8)), int32(8)))
            with mgpu_utils.when(arith.cmpi(arith.CmpIPredicate.sge, row, scalar_of(start))):
                mgpu_utils.inline_ptx(
                    "st.shared.v4.b32 [$0], {$1, $1, $1, $1};",
                    *(arith.addi(base, int32(i * THREADS * CHUNK_BYTES)), zero),
                    has_side_effects=True,
                )

    emit(tile_ref, first)
