"""MLIR inside a kernel of Pallas: what the functions of the modules `inline_*` have in common.

    inline_rows.py    copies of rows, found by their indices, and of matrices into a tile, by cp.async;
    inline_stores.py  stores of single rows, of zeros, and of columns that were parted;
    inline_wgmma.py   values in the layout of wgmma's sums, and wgmma of a few rows;
    inline_scales.py  scales of e4m3 operands;
    inline_sums.py    sums of a token's pairs.

Their functions have two bodies each: MLIR inside `plgpu.inline_mgpu`, and plain Pallas for the interpreter,
which takes no inline code. Checked with jax 0.11.2 and 0.12.

Tiles in shared memory are made of rows of 128 bytes, 8 rows after each other, with 16-byte chunk c of row r
at place `c ^ (r % 8)`: TMA's 128-byte swizzle. Thread t of the 128 moves the chunks t, t + 128, ... of a
tile, counted row after row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector

_I32 = jnp.int32
THREADS, CHUNK_BYTES, CHUNKS_PER_ROW = 128, 16, 8
LANES = 32  # of a warp
TILE_BYTES = 1024  # 8 rows of 128 bytes


# -- MLIR ------------------------------------------------------------------------------------------


def emits(**types: Any) -> Any:
    """A decorator: the function is called with Pallas values, and emits MLIR for them."""
    return plgpu.inline_mgpu(**types)


def i32() -> ir.Type:
    """MLIR's type int32."""
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    """MLIR's type int64."""
    return ir.IntegerType.get_signless(64)


def int32(value: int) -> Any:
    """An int32 constant in MLIR."""
    return arith.constant(i32(), value)


def int64(value: int) -> Any:
    """An int64 constant in MLIR."""
    return arith.constant(i64(), value)


def scalar_of(array: Any) -> Any:
    """The MLIR value of Mosaic's array of one value."""
    return array.registers.item()


def int32_register(value: Any) -> Any:
    """A register of Mosaic's arrays that holds one int32."""
    return vector.broadcast(ir.VectorType.get((1,), i32()), value)


def int32_array(registers: Sequence[Any], layout: Any) -> mgpu.FragmentedArray:
    """Mosaic's array of a thread's int32 registers, as `layout` of Pallas has them."""
    return mgpu.FragmentedArray(
        _registers=np.array(registers, dtype=object), _layout=layout.to_mgpu(), _is_signed=True
    )


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
    base = llvm.ptrtoint(i64(), mgpu_utils.memref_ptr(ref))
    return arith.addi(base, arith.muli(arith.extsi(i64(), units), int64(unit_bytes)))


# -- chunks of a tile ------------------------------------------------------------------------------


def chunk_offset(row: Any, column: Any, per_row: int) -> Any:
    """Bytes from a tile's start to chunk `column` of a row of `per_row` chunks."""
    in_eight = arith.remui(row, int32(8))
    tile = arith.divui(row, int32(8))
    if per_row > CHUNKS_PER_ROW:
        tiles = arith.muli(tile, int32(per_row // CHUNKS_PER_ROW))
        tile = arith.addi(tiles, arith.divui(column, int32(8)))
    chunk = arith.xori(arith.remui(column, int32(8)), in_eight)
    within = arith.addi(arith.muli(in_eight, int32(128)), arith.muli(chunk, int32(CHUNK_BYTES)))
    return arith.addi(arith.muli(tile, int32(TILE_BYTES)), within)


# Of a tile with 8 chunks in a row: a thread's chunks are this far from each other.
ROWS_TO_NEXT, BYTES_TO_NEXT = THREADS // CHUNKS_PER_ROW, THREADS * CHUNK_BYTES


def first_chunk_of_thread() -> tuple[Any, Any, Any]:
    """(row, chunk of the row, bytes from the tile's start) of this thread's first chunk of such a tile."""
    thread = thread_index()
    row, column = arith.divui(thread, int32(8)), arith.remui(thread, int32(8))
    return row, column, chunk_offset(row, column, CHUNKS_PER_ROW)


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


# -- bounds that a launch gives --------------------------------------------------------------------


def bound(limit: Any) -> tuple[tuple[jax.Array, ...], tuple[Any, ...]]:
    """(Operands, their types) of an inline function that compares with a bound: none if it is a number."""
    if isinstance(limit, int):
        return (), ()
    return (limit,), (plgpu.Layout.WG_SPLAT(()),)


def bound_of(limit: Any, operands: tuple[Any, ...]) -> Any:
    """The bound in MLIR; `operands` are those that `bound` gave."""
    return scalar_of(operands[0]) if operands else int32(limit)


# -- waits -----------------------------------------------------------------------------------------


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
