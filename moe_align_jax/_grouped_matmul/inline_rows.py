"""Rows from global memory into a tile by cp.async, which TMA cannot copy: rows by their indices, and matrices
whose rows are no whole tiles of columns.

As in `inline`, each function has two bodies: MLIR, and plain Pallas for the interpreter. A thread first finds
the rows of which it moves chunks (`find_rows`), and copies from them in every step over k (`copy_rows`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from moe_align_jax._grouped_matmul.inline import (
    BYTES_TO_NEXT,
    CHUNK_BYTES,
    CHUNKS_PER_ROW,
    LANES,
    ROWS_TO_NEXT,
    THREADS,
    bound,
    bound_of,
    chunk_offset,
    emits,
    first_chunk_of_thread,
    global_address,
    i32,
    i64,
    int32,
    int32_array,
    int32_register,
    int64,
    less,
    scalar_of,
    shared_address,
    thread_index,
)

_I32 = jnp.int32


def _copy_async(target: Any, source: Any, there: Any) -> None:
    """16 bytes from global to shared memory; zeros where there are none."""
    mgpu_utils.inline_ptx(
        "cp.async.cg.shared.global [$0], [$1], 16, $2;",
        *(target, source, arith.select(there, int32(CHUNK_BYTES), int32(0))),
        has_side_effects=True,
    )


def _copy_async_if(inside: Any, target: Any, source: Any, there: Any) -> None:
    """The same by the threads that are `inside` the tile; None: all are."""
    if inside is None:
        return _copy_async(target, source, there)
    with mgpu_utils.when(inside):
        _copy_async(target, source, there)


def _copy_found(
    ref: Any,
    places: Any,
    first: Any,
    has_column: Any,
    target_of: Callable[[int], Any],
    inside_of: Callable[[int], Any] = lambda i: None,
) -> None:
    """Asks for a thread's chunks of the rows that were found, one of each.

    Args:
        ref: the array, in global memory.
        places: Mosaic's array of where each row begins, in chunks, or -1.
        first: chunks from there to the thread's.
        has_column: whether the array has columns there; None: it has.
        target_of: the address of the thread's i-th chunk in the tile.
        inside_of: whether the tile has such a chunk; None: it has.
    """
    for i, register in enumerate(places.registers.flat):
        place = vector.extract(register, [], [0])
        there = arith.cmpi(arith.CmpIPredicate.sge, place, int32(0))
        if has_column is not None:
            there = arith.andi(there, has_column)
        chunk = arith.select(there, arith.addi(place, first), int32(0))
        target, source = target_of(i), global_address(ref, chunk, CHUNK_BYTES)
        _copy_async_if(inside_of(i), target, source, there)


# -- rows by their indices -------------------------------------------------------------------------


def find_rows(
    ids_ref: Any,
    start: jax.Array,
    end: jax.Array,
    *,
    rows: int,
    row_chunks: int,
    top_k: int,
    num_pairs: Any,
    interpret: bool,
) -> jax.Array:
    """Where the rows of a tile lie: for each row of which this thread moves chunks, its place in x.

    In chunks, from x's start to this thread's chunk of the row; -1 where there is no row: the id is no pair,
    or the row is not below `end`. In the interpreter: a token per row.

    Args:
        ids_ref: `[.]` int32 in global memory, at least `start + rows` of them.
        start, end: rows of the tile.
        rows: of the tile.
        row_chunks: chunks of a row of x.
        top_k: pairs per token.
        num_pairs: ids at or past it are none. An int, or an int32 that the launch gives.
        interpret: whether Pallas' interpreter runs it.
    """
    if interpret:
        return _find_plainly(ids_ref, start, end, rows, top_k, num_pairs)
    count = -(-rows * CHUNKS_PER_ROW // THREADS)
    layout = plgpu.Layout.WG_STRIDED((count * THREADS,), vec_size=1)
    scalar = plgpu.Layout.WG_SPLAT(())

    more, types = bound(num_pairs)

    @emits(
        arg_types=(plgpu.RefType(), scalar, scalar, *types),
        return_type=plgpu.ShapeDtypeStruct((count * THREADS,), jnp.dtype(_I32), layout=layout),
    )
    def emit(_, ids, first, stop, *limit):
        most = bound_of(num_pairs, limit)
        row, column, _offset = first_chunk_of_thread()
        registers = []
        for i in range(count):
            here = arith.addi(row, int32(i * ROWS_TO_NEXT))
            inside = less(here, int32(rows))
            # Threads without a row read the id of the first.
            at = arith.addi(scalar_of(first), arith.select(inside, here, int32(0)))
            pair = memref.load(ids, [arith.index_cast(ir.IndexType.get(), at)])
            there = arith.cmpi(arith.CmpIPredicate.ult, pair, most)
            there = arith.andi(there, arith.andi(inside, less(at, scalar_of(stop))))
            token = arith.divui(pair, int32(top_k))
            chunk = arith.addi(arith.muli(token, int32(row_chunks)), column)
            chosen = arith.select(there, chunk, int32(-1))
            registers.append(int32_register(chosen))
        return int32_array(registers, layout)

    return emit(ids_ref, start, end, *more)


def count_rows(
    ids_ref: Any, first: jax.Array, limit: Any, *, rows: int, interpret: bool
) -> jax.Array:
    """How many of `rows` ids from `first` on are in [0, limit), as an int32.

    Every warp counts all of them, by votes: a number takes one register, a vector of ids as many as a tile
    has rows.

    Args:
        ids_ref: `[.]` int32 in global memory, at least `first + rows` of them.
        first: of the ids.
        limit: int32.
        rows: a number.
        interpret: whether Pallas' interpreter runs it.
    """
    if interpret:
        ids = ids_ref[pl.ds(first, rows)]
        return jnp.sum((ids >= 0) & (ids < limit), dtype=_I32)
    scalar = plgpu.Layout.WG_SPLAT(())
    result = plgpu.ShapeDtypeStruct((), jnp.dtype(_I32), layout=scalar)

    @emits(arg_types=(plgpu.RefType(), scalar, scalar), return_type=result)
    def emit(_, ids, begin, most):
        lane = arith.remui(thread_index(), int32(LANES))
        total = int32(0)
        for done in range(0, rows, LANES):
            here = arith.addi(lane, int32(done))
            inside = less(here, int32(rows))
            at = arith.addi(scalar_of(begin), arith.select(inside, here, int32(0)))
            pair = memref.load(ids, [arith.index_cast(ir.IndexType.get(), at)])
            below = arith.andi(less(pair, scalar_of(most)), less(int32(-1), pair))
            there = arith.select(arith.andi(inside, below), int32(1), int32(0))
            count = mgpu_utils.inline_ptx(
                "{ .reg .pred p; .reg .b32 votes; setp.ne.b32 p, $1, 0; "
                "vote.sync.ballot.b32 votes, p, 0xffffffff; popc.b32 $0, votes; }",
                there,
                result_types=i32(),
                has_side_effects=True,
                convergent=True,
            )
            total = arith.addi(total, count)
        return mgpu.FragmentedArray.splat(total, (), is_signed=True)

    return emit(ids_ref, first, limit)


def copy_rows(
    x_ref: Any,
    tile_ref: Any,
    transforms: tuple[Any, ...],
    found: jax.Array,
    step: jax.Array,
    *,
    rows: int,
    row_chunks: int,
    whole: bool,
    interpret: bool,
) -> None:
    """Asks for columns `[64 step, 64 step + 64)` of the rows that `find_rows` found: a tile `[rows, 64]`.

    They are there after `commit_copies` and `wait_for_copies`. Rows that there are none of become zeros, as
    do columns that x does not have; `whole`: x has all columns that are ever asked for.
    """
    if interpret:
        return _copy_plainly(x_ref, tile_ref, found, step * tile_ref.shape[-1], rows)
    count = -(-rows * CHUNKS_PER_ROW // THREADS)
    layout = plgpu.Layout.WG_STRIDED((count * THREADS,), vec_size=1)
    scalar = plgpu.Layout.WG_SPLAT(())

    @emits(arg_types=(plgpu.RefType(), plgpu.RefType(transforms), layout, scalar))
    def emit(_, x, tile, places, at):
        row, column, offset = first_chunk_of_thread()
        base = arith.addi(shared_address(tile), offset)
        first = arith.muli(scalar_of(at), int32(CHUNKS_PER_ROW))
        has_column = less(arith.addi(first, column), int32(row_chunks))

        def target_of(i):
            return arith.addi(base, int32(i * BYTES_TO_NEXT))

        def inside_of(i):
            if (i + 1) * ROWS_TO_NEXT <= rows:
                return None
            return less(arith.addi(row, int32(i * ROWS_TO_NEXT)), int32(rows))

        _copy_found(x, places, first, None if whole else has_column, target_of, inside_of)

    emit(x_ref, tile_ref, found, step)


# -- matrices --------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """A matrix in global memory, of rows whose 16-byte chunks TMA cannot count in whole tiles.

    Attributes:
        rows: that there are.
        chunks: of a row, that there are.
        stride: chunks from a row to the next.
        first: chunks before the first row's.
    """

    rows: int
    chunks: int
    stride: int
    first: int = 0


def copy_matrix(
    ref: Any,
    tile_ref: Any,
    transforms: tuple[Any, ...],
    matrix: Matrix,
    base: jax.Array,
    row: jax.Array,
    chunk: jax.Array,
    *,
    shape: tuple[int, int],
) -> None:
    """Asks for a tile of `shape` (rows, chunks) of a matrix, from (row, chunk) on; zeros where it ends.

    `base`: rows of the array before the matrix. Not for the interpreter, whose copies know no
    such limit.
    """
    scalar = plgpu.Layout.WG_SPLAT(())
    rows, per_row = shape

    @emits(
        arg_types=(plgpu.RefType(), plgpu.RefType(transforms), scalar, scalar, scalar),
    )
    def emit(_, memory, tile, before, first_row, first_chunk):
        thread, shared = thread_index(), shared_address(tile)
        pointer = llvm.ptrtoint(i64(), mgpu_utils.memref_ptr(memory))
        for i in range(-(-rows * per_row // THREADS)):
            index = arith.addi(thread, int32(i * THREADS))
            r, c = arith.divui(index, int32(per_row)), arith.remui(index, int32(per_row))
            at_row = arith.addi(scalar_of(first_row), r)
            at_chunk = arith.addi(scalar_of(first_chunk), c)
            there = arith.andi(
                less(at_row, int32(matrix.rows)), less(at_chunk, int32(matrix.chunks))
            )
            far = arith.addi(scalar_of(before), arith.select(there, at_row, int32(0)))
            wide = arith.muli(arith.extsi(i64(), far), int64(matrix.stride))
            near = arith.addi(arith.select(there, at_chunk, int32(0)), int32(matrix.first))
            wide = arith.addi(wide, arith.extsi(i64(), near))
            source = arith.addi(pointer, arith.muli(wide, int64(CHUNK_BYTES)))
            target = arith.addi(shared, chunk_offset(r, c, per_row))
            inside = None
            if (i + 1) * THREADS > rows * per_row:
                inside = less(index, int32(rows * per_row))
            _copy_async_if(inside, target, source, there)

    emit(ref, tile_ref, base, row, chunk)


# -- rows into tiles of more than 64 columns -------------------------------------------------------
#
# Such a tile is `[rows, 8 per_row]` values of 16 bits: tiles of 8 rows by 64 columns, row after row of tiles.
# A thread's chunks are counted row after row of the whole tile.


def find_wide_rows(
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
        return _find_plainly(ids_ref, first, end, rows, top_k, num_pairs)
    count = rows * per_row // THREADS
    layout = plgpu.Layout.WG_STRIDED((count * THREADS,), vec_size=1)
    scalar = plgpu.Layout.WG_SPLAT(())
    given = () if ids_ref is None else (plgpu.RefType(),)

    @emits(
        arg_types=(*given, scalar, scalar),
        return_type=plgpu.ShapeDtypeStruct((count * THREADS,), jnp.dtype(_I32), layout=layout),
    )
    def emit(_, *operands):
        *ids, begin, stop = operands
        row = arith.addi(scalar_of(begin), arith.divui(thread_index(), int32(per_row)))
        registers = []
        for i in range(count):
            at = arith.addi(row, int32(i * (THREADS // per_row)))
            there = less(at, scalar_of(stop))
            if ids:
                pair = memref.load(ids[0], [arith.index_cast(ir.IndexType.get(), at)])
                valid = arith.cmpi(arith.CmpIPredicate.ult, pair, int32(num_pairs))
                there = arith.andi(there, valid)
                at = arith.divui(pair, int32(top_k))
            place = arith.muli(at, int32(row_chunks))
            chosen = arith.select(there, place, int32(-1))
            registers.append(int32_register(chosen))
        return int32_array(registers, layout)

    return emit(*(() if ids_ref is None else (ids_ref,)), first, end)


def copy_wide_rows(
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
    """Asks for the columns from `chunk` on of the rows that `find_wide_rows` found.

    They are there after `commit_copies` and `wait_for_copies`. Rows that there are none of become
    zeros, and columns that the array does not have.
    """
    if interpret:
        values = tile_ref.shape[-1] // per_row  # of a chunk
        return _copy_plainly(ref, tile_ref, found, chunk * values, rows)
    count = rows * per_row // THREADS
    layout = plgpu.Layout.WG_STRIDED((count * THREADS,), vec_size=1)
    scalar = plgpu.Layout.WG_SPLAT(())

    @emits(arg_types=(plgpu.RefType(), plgpu.RefType(transforms), layout, scalar))
    def emit(_, memory, tile, places, start):
        row = arith.divui(thread_index(), int32(per_row))
        column = arith.remui(thread_index(), int32(per_row))
        base = shared_address(tile)
        at = arith.addi(scalar_of(start), column)
        has_column = less(at, int32(row_chunks))

        def target_of(i):
            here = arith.addi(row, int32(i * (THREADS // per_row)))
            return arith.addi(base, chunk_offset(here, column, per_row))

        _copy_found(memory, places, at, has_column, target_of)

    emit(ref, tile_ref, found, chunk)


# -- for the interpreter, which runs none of that --------------------------------------------------


def _find_plainly(
    ids_ref: Any, first: jax.Array, end: jax.Array, rows: int, top_k: int, num_pairs: Any
) -> jax.Array:
    """What `find_rows` and `find_wide_rows` say: the array's row of each row of a tile, or -1."""

    def one(r, found):
        row = first + r
        there = row < end
        if ids_ref is not None:
            pair = ids_ref[row]
            there = there & (pair >= 0) & (pair < num_pairs)
            row = lax.div(pair, _I32(top_k))
        return jnp.where(jnp.arange(rows) == r, jnp.where(there, row, -1), found)

    return lax.fori_loop(0, rows, one, jnp.full(rows, -1, _I32))


def _copy_plainly(ref: Any, tile_ref: Any, found: jax.Array, column: jax.Array, rows: int) -> None:
    """What `copy_rows` and `copy_wide_rows` do, from a column on. The array has whole tiles there."""
    width = tile_ref.shape[-1]

    def one(r, _):
        row = ref[jnp.maximum(found[r], 0), pl.ds(column, width)]
        tile_ref[r, :] = jnp.where(found[r] >= 0, row, jnp.zeros_like(row))
        return ()

    lax.fori_loop(0, rows, one, ())
