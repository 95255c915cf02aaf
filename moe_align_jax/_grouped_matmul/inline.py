"""What the kernel does that Pallas has no word for: rows by cp.async, stores of single rows, parted columns.

Each is a function with two bodies: MLIR inside `plgpu.inline_mgpu`, and plain Pallas for the interpreter,
which takes no inline code. Checked with jax 0.11.2 and 0.12.

Tiles in shared memory are made of rows of 128 bytes, 8 rows after each other, with 16-byte chunk c of row r
at place `c ^ (r % 8)`: TMA's 128-byte swizzle. Thread t of the 128 moves the chunks t, t + 128, ... of a
tile, counted row after row.
"""

from collections.abc import Callable, Sequence
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
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, vector

_descriptor: Any
_wgmma: Any
try:  # what Mosaic makes its own wgmma of; a later jax may have it elsewhere
    from jax.experimental.mosaic.gpu.mma_utils import create_descriptor as _descriptor
    from jax.experimental.mosaic.gpu.wgmma import wgmma_m64 as _wgmma
except ImportError:
    _descriptor = _wgmma = None

_I32 = jnp.int32
THREADS, CHUNK_BYTES, CHUNKS_PER_ROW = 128, 16, 8
_LANES = 32  # of a warp
_ROW_AXIS = 4  # of the registers of wgmma's layout: rows 8 of each 16
_COLUMNS = 8  # of a tile of wgmma's layout, of which a thread has two
_TILE_BYTES = 1024  # 8 rows of 128 bytes

# wgmma's accumulator, of which each thread has two neighbouring columns, after these were parted: 4 lanes
# have 4 neighbouring columns of a row.
_PARTED = (((64, 4), (16, 4), (8, 4), (1,)), (-7,), (-3, -2), -1)
PARTED = plgpu.Layout.TILED(
    plgpu.Tiling(_PARTED[0]), warp_dims=_PARTED[1], lane_dims=_PARTED[2], vector_dim=_PARTED[3]
)


# -- MLIR ------------------------------------------------------------------------------------------


def emits(**types: Any) -> Any:
    """A decorator: the function is called with Pallas values, and emits MLIR for them."""
    return plgpu.inline_mgpu(**types)


def i32() -> ir.Type:
    """MLIR's type int32."""
    return ir.IntegerType.get_signless(32)


def _i64() -> ir.Type:
    """MLIR's type int64."""
    return ir.IntegerType.get_signless(64)


def int32(value: int) -> Any:
    """An int32 constant in MLIR."""
    return arith.constant(i32(), value)


def _long(value: int) -> Any:
    """An int64 constant in MLIR."""
    return arith.constant(_i64(), value)


def scalar_of(array: Any) -> Any:
    """The MLIR value of Mosaic's array of one value."""
    return array.registers.item()


def thread_index() -> Any:
    """Index of the thread in its warpgroup."""
    return arith.remui(arith.index_cast(i32(), gpu.thread_id(gpu.Dimension.x)), int32(THREADS))


def less(a: Any, b: Any) -> Any:
    """Signed `a < b` of two MLIR values."""
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)


def shared_address(ref: Any) -> Any:
    """The address of a ref in shared memory, as int32."""
    return llvm.ptrtoint(i32(), mgpu_utils.memref_ptr(ref))


def global_address(ref: Any, units: Any, unit_bytes: int) -> Any:
    """The address `units` (int32, of `unit_bytes` each) behind the start of a ref in global memory."""
    base = llvm.ptrtoint(_i64(), mgpu_utils.memref_ptr(ref))
    return arith.addi(base, arith.muli(arith.extsi(_i64(), units), _long(unit_bytes)))


def _place(row: Any, column: Any, per_row: int) -> Any:
    """Bytes from a tile's start to chunk `column` of a row of `per_row` chunks."""
    in_eight = arith.remui(row, int32(8))
    tile = arith.divui(row, int32(8))
    if per_row > CHUNKS_PER_ROW:
        tiles = arith.muli(tile, int32(per_row // CHUNKS_PER_ROW))
        tile = arith.addi(tiles, arith.divui(column, int32(8)))
    chunk = arith.xori(arith.remui(column, int32(8)), in_eight)
    within = arith.addi(arith.muli(in_eight, int32(128)), arith.muli(chunk, int32(CHUNK_BYTES)))
    return arith.addi(arith.muli(tile, int32(_TILE_BYTES)), within)


# Of a tile with 8 chunks in a row: a thread's chunks are this far from each other.
_ROWS_TO_NEXT, _BYTES_TO_NEXT = THREADS // CHUNKS_PER_ROW, THREADS * CHUNK_BYTES


def _first_chunk() -> tuple[Any, Any, Any]:
    """(row, chunk of the row, bytes from the tile's start) of this thread's first chunk of such a tile."""
    thread = thread_index()
    row, column = arith.divui(thread, int32(8)), arith.remui(thread, int32(8))
    return row, column, _place(row, column, CHUNKS_PER_ROW)


def _copy_async(target: Any, source: Any, there: Any) -> None:
    """16 bytes from global to shared memory; zeros where there are none."""
    mgpu_utils.inline_ptx(
        "cp.async.cg.shared.global [$0], [$1], 16, $2;",
        *(target, source, arith.select(there, int32(CHUNK_BYTES), int32(0))),
        has_side_effects=True,
    )


# -- loops -----------------------------------------------------------------------------------------


def loop(count: jax.Array, step: Callable[[jax.Array], Any], *, interpret: bool) -> None:
    """`step(0)` to `step(count - 1)`: a loop that neither LLVM nor ptxas unrolls.

    Unrolled, a short loop's addresses are all computed ahead of it, and may take more registers than there
    are.
    """
    if interpret:

        def plain(k, _):
            step(k)

        lax.fori_loop(0, count, plain, None)
        return

    def body(k, _):
        not_unrolled(interpret=interpret)
        step(k)

    lax.fori_loop(0, hidden(count, interpret=interpret), body, None)


def hidden(count: jax.Array, *, interpret: bool) -> jax.Array:
    """The same number. LLVM unrolls a loop where it sees which constants its count may be."""
    if interpret:
        return count
    scalar = plgpu.Layout.WG_SPLAT(())

    @emits(
        arg_types=(scalar,),
        return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(_I32), layout=scalar),
    )
    def emit(_, value):
        same = llvm.inline_asm(
            i32(), [scalar_of(value)], "mov.b32 $0, $1;", "=r,r", has_side_effects=True
        )
        return mgpu.FragmentedArray.splat(same, (), is_signed=True)

    return emit(count)


def not_unrolled(*, interpret: bool) -> None:
    """Said to ptxas in the block that a loop begins with."""
    if interpret:
        return

    @emits()
    def emit(_):
        mgpu_utils.inline_ptx('.pragma "nounroll";', has_side_effects=True)

    emit()


# -- bounds that a launch gives -------------------------------------------------------------------


def bound(limit: Any) -> tuple[tuple[jax.Array, ...], tuple[Any, ...]]:
    """(Operands, their types) of an inline function that compares with a bound: none if it is a number."""
    if isinstance(limit, int):
        return (), ()
    return (limit,), (plgpu.Layout.WG_SPLAT(()),)


def bound_of(limit: Any, operands: tuple[Any, ...]) -> Any:
    """The bound in MLIR; `operands` are those that `bound` gave."""
    return scalar_of(operands[0]) if operands else int32(limit)


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

        def one(r, found):
            pair = ids_ref[start + r]
            there = (pair >= 0) & (pair < num_pairs) & (start + r < end)
            token = jnp.where(there, lax.div(pair, _I32(top_k)), -1)
            return jnp.where(jnp.arange(rows) == r, token, found)

        return lax.fori_loop(0, rows, one, jnp.full(rows, -1, _I32))
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
        row, column, _offset = _first_chunk()
        registers = []
        for i in range(count):
            here = arith.addi(row, int32(i * _ROWS_TO_NEXT))
            inside = less(here, int32(rows))
            # Threads without a row read the id of the first.
            at = arith.addi(scalar_of(first), arith.select(inside, here, int32(0)))
            pair = memref.load(ids, [arith.index_cast(ir.IndexType.get(), at)])
            there = arith.cmpi(arith.CmpIPredicate.ult, pair, most)
            there = arith.andi(there, arith.andi(inside, less(at, scalar_of(stop))))
            token = arith.divui(pair, int32(top_k))
            chunk = arith.addi(arith.muli(token, int32(row_chunks)), column)
            chosen = arith.select(there, chunk, int32(-1))
            registers.append(vector.broadcast(ir.VectorType.get((1,), i32()), chosen))
        return mgpu.FragmentedArray(
            _registers=np.array(registers, dtype=object),
            _layout=layout.to_mgpu(),
            _is_signed=True,
        )

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
        lane = arith.remui(thread_index(), int32(_LANES))
        total = int32(0)
        for done in range(0, rows, _LANES):
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


def keep_columns(x: jax.Array, count: jax.Array, *, interpret: bool) -> jax.Array:
    """Float32 `[64 i, 8 j]` in wgmma's layout with zeros from column `count` on.

    A thread has columns 8 j + 2 (lane % 4) and the next one. It compares numbers with one register, which the
    compiler must take for another one each time: it would keep a predicate for each column.
    """
    if interpret:
        columns = lax.broadcasted_iota(_I32, x.shape, 1)
        return jnp.where(columns < count, x, jnp.zeros_like(x))
    scalar = plgpu.Layout.WG_SPLAT(())
    like = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=plgpu.Layout.WGMMA)

    @emits(arg_types=(plgpu.Layout.WGMMA, scalar), return_type=like)
    def emit(_, values, most):
        first = arith.muli(arith.remui(thread_index(), int32(4)), int32(2))
        left = mgpu_utils.inline_ptx(
            "sub.s32 $0, $1, $2;",
            *(scalar_of(most), first),
            result_types=i32(),
            has_side_effects=True,
        )
        zero = arith.constant(ir.F32Type.get(), 0.0)
        registers = np.empty_like(values.registers)
        for at in np.ndindex(values.registers.shape):
            found = values.registers[at]
            for k in range(2):
                kept = less(int32(_COLUMNS * at[1] + k), left)
                value = arith.select(kept, vector.extract(found, [], [k]), zero)
                found = vector.insert(value, found, [], [k])
            registers[at] = found
        return mgpu.FragmentedArray(
            _registers=registers, _layout=values.layout, _is_signed=values.is_signed
        )

    return emit(x, count)


def keep_rows(x: jax.Array, count: jax.Array, *, interpret: bool) -> jax.Array:
    """Float32 `[64, 8 j]` in wgmma's layout with zeros from row `count` on.

    A thread has row 16 (warp) + (lane / 4) and the eighth row behind it.
    """
    if interpret:
        rows = lax.broadcasted_iota(_I32, x.shape, 0)
        return jnp.where(rows < count, x, jnp.zeros_like(x))
    scalar = plgpu.Layout.WG_SPLAT(())
    like = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=plgpu.Layout.WGMMA)

    @emits(arg_types=(plgpu.Layout.WGMMA, scalar), return_type=like)
    def emit(_, values, most):
        lane = arith.remui(thread_index(), int32(_LANES))
        warp = arith.divui(thread_index(), int32(_LANES))
        first = arith.addi(arith.muli(warp, int32(16)), arith.divui(lane, int32(4)))
        kept = [less(arith.addi(first, int32(8 * k)), scalar_of(most)) for k in range(2)]
        kind = values.registers.flat[0].type
        zero = ir.FloatAttr.get(ir.F32Type.get(), 0.0)
        zeros = arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, zero))
        registers = np.empty_like(values.registers)
        for at in np.ndindex(values.registers.shape):
            registers[at] = arith.select(kept[at[_ROW_AXIS]], values.registers[at], zeros)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=values.layout, _is_signed=values.is_signed
        )

    return emit(x, count)


def widen(x: jax.Array, columns: int, *, interpret: bool) -> jax.Array:
    """`[64 i, 8 j]` in wgmma's layout with as many columns, of zeros behind its own."""
    more = columns - x.shape[1]
    if not more:
        return x
    if interpret:
        return jnp.pad(x, ((0, 0), (0, more)))
    layout = plgpu.Layout.WGMMA
    like = plgpu.ShapeDtypeStruct((x.shape[0], columns), x.dtype, layout=layout)

    @emits(arg_types=(layout,), return_type=like)
    def emit(_, values):
        zero = arith.constant(values.mlir_dtype, 0.0)
        wide = mgpu.FragmentedArray.splat(
            zero, like.shape, layout=values.layout, is_signed=values.is_signed
        )
        registers = wide.registers.copy()
        registers[:, : values.registers.shape[1]] = values.registers
        return mgpu.FragmentedArray(
            _registers=registers, _layout=values.layout, _is_signed=values.is_signed
        )

    return emit(x)


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
    if interpret:  # x has whole tiles of columns there
        width = tile_ref.shape[-1]

        def one(r, _):
            token = found[r]
            row = x_ref[jnp.maximum(token, 0), pl.ds(step * width, width)]
            tile_ref[r, :] = jnp.where(token >= 0, row, jnp.zeros_like(row))
            return ()

        lax.fori_loop(0, rows, one, ())
        return
    count = -(-rows * CHUNKS_PER_ROW // THREADS)
    layout = plgpu.Layout.WG_STRIDED((count * THREADS,), vec_size=1)
    scalar = plgpu.Layout.WG_SPLAT(())

    @emits(arg_types=(plgpu.RefType(), plgpu.RefType(transforms), layout, scalar))
    def emit(_, x, tile, places, at):
        row, column, offset = _first_chunk()
        base = arith.addi(shared_address(tile), offset)
        first = arith.muli(scalar_of(at), int32(CHUNKS_PER_ROW))
        inside = less(arith.addi(first, column), int32(row_chunks))
        for i, register in enumerate(places.registers.flat):
            place = vector.extract(register, [], [0])
            there = arith.cmpi(arith.CmpIPredicate.sge, place, int32(0))
            if not whole:
                there = arith.andi(there, inside)
            chunk = arith.select(there, arith.addi(place, first), int32(0))
            target = arith.addi(base, int32(i * _BYTES_TO_NEXT))
            source = global_address(x, chunk, CHUNK_BYTES)
            if (i + 1) * _ROWS_TO_NEXT <= rows:
                _copy_async(target, source, there)
            else:
                here = arith.addi(row, int32(i * _ROWS_TO_NEXT))
                with mgpu_utils.when(less(here, int32(rows))):
                    _copy_async(target, source, there)

    emit(x_ref, tile_ref, found, step)


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
        pointer = llvm.ptrtoint(_i64(), mgpu_utils.memref_ptr(memory))
        for i in range(-(-rows * per_row // THREADS)):
            index = arith.addi(thread, int32(i * THREADS))
            r, c = arith.divui(index, int32(per_row)), arith.remui(index, int32(per_row))
            at_row = arith.addi(scalar_of(first_row), r)
            at_chunk = arith.addi(scalar_of(first_chunk), c)
            there = arith.andi(
                less(at_row, int32(matrix.rows)), less(at_chunk, int32(matrix.chunks))
            )
            far = arith.addi(scalar_of(before), arith.select(there, at_row, int32(0)))
            wide = arith.muli(arith.extsi(_i64(), far), _long(matrix.stride))
            near = arith.addi(arith.select(there, at_chunk, int32(0)), int32(matrix.first))
            wide = arith.addi(wide, arith.extsi(_i64(), near))
            source = arith.addi(pointer, arith.muli(wide, _long(CHUNK_BYTES)))
            target = arith.addi(shared, _place(r, c, per_row))
            if (i + 1) * THREADS <= rows * per_row:
                _copy_async(target, source, there)
            else:
                with mgpu_utils.when(less(index, int32(rows * per_row))):
                    _copy_async(target, source, there)

    emit(ref, tile_ref, base, row, chunk)


def commit_copies(*, interpret: bool) -> None:
    """What this thread asked for since the last time belongs together."""
    if interpret:
        return

    @emits()
    def emit(_):
        mgpu_utils.inline_ptx("cp.async.commit_group;", has_side_effects=True)

    emit()


def meet_warpgroup(*, interpret: bool) -> None:
    """The threads of a warpgroup wait for each other."""
    if interpret:
        return

    @emits()
    def emit(_):
        mgpu_utils.warpgroup_barrier()

    emit()


def wait_for_copies(lag: int, *, interpret: bool) -> None:
    """Until all but the last `lag` of what was committed is there, for wgmma to read."""
    if interpret:
        plgpu.commit_smem()
        return

    @emits()
    def emit(_):
        mgpu_utils.inline_ptx(f"cp.async.wait_group {lag};", has_side_effects=True)
        mgpu_utils.inline_ptx("fence.proxy.async.shared::cta;", has_side_effects=True)

    emit()


# -- single rows of a tile -------------------------------------------------------------------------


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
        in_tile, chunk, offset = _first_chunk()
        base = arith.addi(shared_address(tile), offset)
        at = arith.addi(scalar_of(start), arith.muli(chunk, int32(values)))
        inside = less(at, int32(columns))
        for i in range(-(-rows * CHUNKS_PER_ROW // THREADS)):
            here = arith.addi(in_tile, int32(i * _ROWS_TO_NEXT))
            target_row = arith.addi(scalar_of(first), here)
            mine = arith.andi(inside, less(target_row, scalar_of(stop)))
            if (i + 1) * THREADS > rows * CHUNKS_PER_ROW:
                mine = arith.andi(mine, less(here, int32(rows)))
            with mgpu_utils.when(mine):
                words = mgpu_utils.inline_ptx(
                    "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
                    arith.addi(base, int32(i * _BYTES_TO_NEXT)),
                    result_types=[i32()] * 4,
                    has_side_effects=True,
                )
                # Rows times columns may be more than int32 holds.
                wide = arith.muli(arith.extsi(_i64(), target_row), _long(columns))
                wide = arith.addi(wide, arith.extsi(_i64(), at))
                pointer = llvm.ptrtoint(_i64(), mgpu_utils.memref_ptr(out))
                size = _long(CHUNK_BYTES // values)
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
            wide = arith.muli(arith.extsi(_i64(), mine), _long(limit))
            wide = arith.addi(wide, arith.extsi(_i64(), at))
            pointer = llvm.ptrtoint(_i64(), mgpu_utils.memref_ptr(out))
            pointer = arith.addi(pointer, arith.muli(wide, _long(CHUNK_BYTES // values)))
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


# -- columns that are gate and up in turn ----------------------------------------------------------


def part_columns(product: jax.Array, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Columns 0, 2, 4, ... and 1, 3, 5, ... of float32 `[64, 2 c]`, in the layout PARTED.

    A thread has both of each pair: no value moves.
    """
    if interpret:
        return product[:, 0::2], product[:, 1::2]
    rows, columns = product.shape
    half = plgpu.ShapeDtypeStruct((rows, columns // 2), jnp.dtype(jnp.float32), layout=PARTED)

    @emits(arg_types=(plgpu.Layout.WGMMA,), return_type=[half, half])
    def emit(_, given):
        layout = PARTED.to_mgpu()
        shape = layout.registers_shape((rows, columns // 2))
        kind = ir.VectorType.get((1,), ir.F32Type.get())
        parts = []
        for k in range(2):
            registers = [
                vector.broadcast(kind, vector.extract(register, [], [k]))
                for register in given.registers.flat
            ]
            parts.append(
                mgpu.FragmentedArray(
                    _registers=np.array(registers, dtype=object).reshape(shape),
                    _layout=layout,
                    _is_signed=None,
                )
            )
        return parts

    gate, up = emit(product)
    return gate, up


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
            arith.addi(shared_address(tile), arith.muli(warp, int32(2 * _TILE_BYTES))),
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
                    *(arith.addi(at, int32(half * _TILE_BYTES)), bits),
                    has_side_effects=True,
                )

    emit(tile_ref, value)


# -- rows into tiles of more than 64 columns, and zeros into their last rows ------------------------
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
            registers.append(vector.broadcast(ir.VectorType.get((1,), i32()), chosen))
        return mgpu.FragmentedArray(
            _registers=np.array(registers, dtype=object),
            _layout=layout.to_mgpu(),
            _is_signed=True,
        )

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

    @emits(arg_types=(plgpu.RefType(), plgpu.RefType(transforms), layout, scalar))
    def emit(_, memory, tile, places, start):
        row = arith.divui(thread_index(), int32(per_row))
        column = arith.remui(thread_index(), int32(per_row))
        base = shared_address(tile)
        at = arith.addi(scalar_of(start), column)
        inside = less(at, int32(row_chunks))
        for i, register in enumerate(places.registers.flat):
            place = vector.extract(register, [], [0])
            there = arith.cmpi(arith.CmpIPredicate.sge, place, int32(0))
            there = arith.andi(there, inside)
            source = arith.select(there, arith.addi(place, at), int32(0))
            here = arith.addi(row, int32(i * (THREADS // per_row)))
            target = arith.addi(base, _place(here, column, per_row))
            _copy_async(target, global_address(memory, source, CHUNK_BYTES), there)

    emit(ref, tile_ref, found, chunk)


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


def multiplies_rows() -> bool:
    """Whether this jax has what `multiply_rows` is made of."""
    return _wgmma is not None


def multiply_rows(
    sums: jax.Array,
    left_ref: Any,
    right_ref: Any,
    likes: Sequence[tuple[Any, ...]],
    band: jax.Array,
    *,
    rows: int,
    interpret: bool,
) -> jax.Array:
    """`sums + left[:rows, 64 band:][:, :64]^T right[:rows]`, complete; `rows` is a multiple of 16.

    Mosaic's own wgmma takes 64 rows of tiles with TMA's 128-byte swizzle, or multiples of them.
    """
    if interpret:
        left = left_ref[:rows, pl.ds(band * 64, 64)].astype(jnp.float32)
        return sums + jnp.dot(left.T, right_ref[:rows, :].astype(jnp.float32))
    like = plgpu.ShapeDtypeStruct(sums.shape, sums.dtype, layout=plgpu.Layout.WGMMA)
    scalar = plgpu.Layout.WG_SPLAT(())
    kinds = plgpu.RefType(likes[0]), plgpu.RefType(likes[1]), plgpu.Layout.WGMMA, scalar

    @emits(arg_types=kinds, return_type=like)
    def emit(_, left, right, values, which):
        group, per_instruction = 64, 16
        which = arith.index_cast(ir.IndexType.get(), scalar_of(which))
        left = mgpu.memref_slice(left, (slice(None), mgpu.ds(which, 1)))
        left = mgpu.memref_transpose(left, (1, 0, 3, 2))
        kind = ir.MemRefType(left.type).element_type
        more = {"swizzle": 128, "large_tile": (group, group)}
        (a, (_, (a_step, *_))), *_ = _descriptor(
            left, group_size=(group, group), logical_k_major=False, **more
        )
        (b, (_, (b_step, *_))), *_ = _descriptor(
            right, group_size=(group, sums.shape[1]), logical_k_major=True, **more
        )
        given = mgpu.WGMMAAccumulator.from_registers(values)
        registers = _wgmma(
            given._value.registers,
            *(a, b, True, True, a_step, b_step),
            n=sums.shape[1],
            swizzle=rows // per_instruction * 32,  # which tells how many instructions there are
            a_element_type=kind,
            b_element_type=kind,
        )
        for order in ("commit_group.sync.aligned", "wait_group.sync.aligned 0"):
            mgpu_utils.inline_ptx(f"wgmma.{order};", has_side_effects=True)
        found = mgpu.FragmentedArray(
            _registers=registers, _layout=given._value.layout, _is_signed=values.is_signed
        )
        return mgpu.optimization_barrier(found).to_layout(values.layout)

    return emit(left_ref, right_ref, sums, band)
