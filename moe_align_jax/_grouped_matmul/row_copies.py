"""Rows of any array into tiles that are wider than 64 columns, by cp.async; and zeros into their last rows.

As in `inline`: each function has a body in MLIR, and one in plain Pallas for the interpreter. A tile is
`[rows, 8 * per_row]` values of 16 bits: tiles of 8 rows by 64 columns, row after row of tiles, with TMA's
128-byte swizzle. Thread t of the 128 moves its chunks t, t + 128, ..., counted row after row.
"""

from typing import Any

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

from moe_align_jax._grouped_matmul.inline import (
    CHUNK_BYTES,
    THREADS,
    _copy_async,
    _global_address,
    _i32,
    _inline,
    _int,
    _less,
    _place,
    _scalar,
    _shared_address,
    _thread,
)

_I32 = jnp.int32


def find(
    ids_ref: Any,
    first: jax.Array,
    end: jax.Array,
    *,
    rows: int,
    per_row: int,
    row_chunks: int,
    top_k: int,
    num_pairs: int,
    interpret: bool,
) -> jax.Array:
    """Where the rows `[first, first + rows)` begin, in chunks: for each of which this thread moves a chunk.

    -1 where there is none: it is not below `end`, or its id is no pair. In the interpreter: a row of the
    array for each.

    Args:
        ids_ref: `[.]` int32 in global memory: the array's row is `ids[row] // top_k`; None: it is the row.
        first, end: rows.
        rows: of the tile.
        per_row: chunks of a row of the tile.
        row_chunks: chunks of a row of the array.
        top_k: pairs per token.
        num_pairs: ids at or past it are none.
        interpret: whether Pallas' interpreter runs it.
    """
    if interpret:

        def one(r, found):
            row = first + r
            there = row < end
            if ids_ref is not None:
                pair = ids_ref[row]
                there = there & (pair >= 0) & (pair < num_pairs)
                row = lax.div(pair, _I32(top_k))
            return jnp.where(jnp.arange(rows) == r, jnp.where(there, row, -1), found)

        return lax.fori_loop(0, rows, one, jnp.full(rows, -1, _I32))
    count = rows * per_row // THREADS
    layout = plgpu.Layout.WG_STRIDED((count * THREADS,), vec_size=1)
    scalar = plgpu.Layout.WG_SPLAT(())
    given = () if ids_ref is None else (plgpu.RefType(),)

    @_inline(
        arg_types=(*given, scalar, scalar),
        return_type=plgpu.ShapeDtypeStruct((count * THREADS,), jnp.dtype(_I32), layout=layout),
    )
    def emit(_, *operands):
        *ids, begin, stop = operands
        row = arith.addi(_scalar(begin), arith.divui(_thread(), _int(per_row)))
        registers = []
        for i in range(count):
            at = arith.addi(row, _int(i * (THREADS // per_row)))
            there = _less(at, _scalar(stop))
            if ids:
                pair = memref.load(ids[0], [arith.index_cast(ir.IndexType.get(), at)])
                valid = arith.cmpi(arith.CmpIPredicate.ult, pair, _int(num_pairs))
                there = arith.andi(there, valid)
                at = arith.divui(pair, _int(top_k))
            place = arith.muli(at, _int(row_chunks))
            chosen = arith.select(there, place, _int(-1))
            registers.append(vector.broadcast(ir.VectorType.get((1,), _i32()), chosen))
        return mgpu.FragmentedArray(
            _registers=np.array(registers, dtype=object),
            _layout=layout.to_mgpu(),
            _is_signed=True,
        )

    return emit(*(() if ids_ref is None else (ids_ref,)), first, end)


def copy(
    ref: Any,
    tile_ref: Any,
    transforms: tuple[Any, ...],
    found: jax.Array,
    chunk: jax.Array,
    *,
    rows: int,
    per_row: int,
    row_chunks: int,
    interpret: bool,
) -> None:
    """Asks for the columns from `chunk` on of the rows that `find` found.

    They are there after `inline.commit_copies` and `wait_for_copies`. Rows that there are none of become
    zeros, and columns that the array does not have.
    """
    if interpret:  # the array has whole tiles of columns there
        width = tile_ref.shape[-1]
        values = width // per_row

        def one(r, _):
            at = found[r]
            row = ref[jnp.maximum(at, 0), pl.ds(chunk * values, width)]
            tile_ref[r, :] = jnp.where(at >= 0, row, jnp.zeros_like(row))
            return ()

        lax.fori_loop(0, rows, one, ())
        return
    count = rows * per_row // THREADS
    layout = plgpu.Layout.WG_STRIDED((count * THREADS,), vec_size=1)
    scalar = plgpu.Layout.WG_SPLAT(())

    @_inline(arg_types=(plgpu.RefType(), plgpu.RefType(transforms), layout, scalar))
    def emit(_, memory, tile, places, start):
        row = arith.divui(_thread(), _int(per_row))
        column = arith.remui(_thread(), _int(per_row))
        base = _shared_address(tile)
        at = arith.addi(_scalar(start), column)
        inside = _less(at, _int(row_chunks))
        for i, register in enumerate(places.registers.flat):
            place = vector.extract(register, [], [0])
            there = arith.cmpi(arith.CmpIPredicate.sge, place, _int(0))
            there = arith.andi(there, inside)
            source = arith.select(there, arith.addi(place, at), _int(0))
            here = arith.addi(row, _int(i * (THREADS // per_row)))
            target = arith.addi(base, _place(here, column, per_row))
            _copy_async(target, _global_address(memory, source, CHUNK_BYTES), there)

    emit(ref, tile_ref, found, chunk)


def clear(
    tile_ref: Any,
    transforms: tuple[Any, ...],
    first: jax.Array,
    *,
    shape: tuple[int, int],
    interpret: bool,
) -> None:
    """Zeros into a tile's rows from `first` on. Values have 16 bits."""
    rows, columns = shape
    if interpret:

        def one(r, _):
            @pl.when(r >= first)
            def _():
                tile_ref[r, :] = jnp.zeros(columns, tile_ref.dtype)

            return ()

        lax.fori_loop(0, rows, one, ())
        return
    per_row = columns * 2 // CHUNK_BYTES

    @_inline(arg_types=(plgpu.RefType(transforms), plgpu.Layout.WG_SPLAT(())))
    def emit(_, tile, start):
        # The swizzle stays within a row: chunks are taken as they lie, 8 rows of 128 bytes after each other.
        base = arith.addi(_shared_address(tile), arith.muli(_thread(), _int(CHUNK_BYTES)))
        zero = _int(0)
        for i in range(rows * per_row // THREADS):
            index = arith.addi(_thread(), _int(i * THREADS))
            group = arith.muli(arith.divui(index, _int(8 * per_row)), _int(8))
            row = arith.addi(group, arith.remui(arith.divui(index, _int(8)), _int(8)))
            with mgpu_utils.when(arith.cmpi(arith.CmpIPredicate.sge, row, _scalar(start))):
                mgpu_utils.inline_ptx(
                    "st.shared.v4.b32 [$0], {$1, $1, $1, $1};",
                    *(arith.addi(base, _int(i * THREADS * CHUNK_BYTES)), zero),
                    has_side_effects=True,
                )

    emit(tile_ref, first)
