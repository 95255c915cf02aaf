"""Values in the layout of wgmma's sums: rows and columns of zeros, columns that are gate and up in turn; and
wgmma of fewer rows than Mosaic's own takes.

As in `inline`, each function has two bodies: MLIR, and plain Pallas for the interpreter.
"""

from collections.abc import Callable, Sequence
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
from jaxlib.mlir.dialects import arith, vector

from moe_align_jax._grouped_matmul.inline import (
    LANES,
    emits,
    i32,
    int32,
    less,
    scalar_of,
    thread_index,
)

_descriptor: Any
_wgmma: Any
try:  # what Mosaic makes its own wgmma of; a later jax may have it elsewhere
    from jax.experimental.mosaic.gpu.mma_utils import create_descriptor as _descriptor
    from jax.experimental.mosaic.gpu.wgmma import wgmma_m64 as _wgmma
except ImportError:
    _descriptor = _wgmma = None

_I32 = jnp.int32
_ROW_AXIS = 4  # of the registers of wgmma's layout: rows 8 of each 16
_COLUMNS = 8  # of a tile of wgmma's layout, of which a thread has two

# wgmma's accumulator, of which each thread has two neighbouring columns, after these were parted: 4 lanes
# have 4 neighbouring columns of a row.
_PARTED = (((64, 4), (16, 4), (8, 4), (1,)), (-7,), (-3, -2), -1)
PARTED = plgpu.Layout.TILED(
    plgpu.Tiling(_PARTED[0]), warp_dims=_PARTED[1], lane_dims=_PARTED[2], vector_dim=_PARTED[3]
)


def _of_registers(registers: np.ndarray, like: Any) -> mgpu.FragmentedArray:
    """Mosaic's array of a thread's registers, in the layout of `like`."""
    return mgpu.FragmentedArray(
        _registers=registers, _layout=like.layout, _is_signed=like.is_signed
    )


# -- zeros -----------------------------------------------------------------------------------------


def _keep(
    x: jax.Array,
    count: jax.Array,
    keeper: Callable[[Any, Any], Callable[[tuple[int, ...], Any], Any]],
) -> jax.Array:
    """Float32 in wgmma's layout, with zeros where there is nothing to keep.

    `keeper(values, count)` gives a function that makes a new register of (its index, the old one).
    """
    scalar = plgpu.Layout.WG_SPLAT(())
    like = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=plgpu.Layout.WGMMA)

    @emits(arg_types=(plgpu.Layout.WGMMA, scalar), return_type=like)
    def emit(_, values, most):
        kept = keeper(values, scalar_of(most))
        registers = np.empty_like(values.registers)
        for at in np.ndindex(values.registers.shape):
            registers[at] = kept(at, values.registers[at])
        return _of_registers(registers, values)

    return emit(x, count)


def _keep_plainly(x: jax.Array, count: jax.Array, axis: int) -> jax.Array:
    """`x` with zeros from `count` on, along an axis: for the interpreter."""
    at = lax.broadcasted_iota(_I32, x.shape, axis)
    return jnp.where(at < count, x, jnp.zeros_like(x))


def keep_columns(x: jax.Array, count: jax.Array, *, interpret: bool) -> jax.Array:
    """Float32 `[64 i, 8 j]` in wgmma's layout with zeros from column `count` on.

    A thread has columns 8 j + 2 (lane % 4) and the next one. It compares numbers with one register, which the
    compiler must take for another one each time: it would keep a predicate for each column.
    """
    if interpret:
        return _keep_plainly(x, count, 1)

    def keeper(values, most):
        first = arith.muli(arith.remui(thread_index(), int32(4)), int32(2))
        left = mgpu_utils.inline_ptx(
            "sub.s32 $0, $1, $2;", most, first, result_types=i32(), has_side_effects=True
        )
        zero = arith.constant(ir.F32Type.get(), 0.0)

        def kept(at, register):
            for k in range(2):
                there = less(int32(_COLUMNS * at[1] + k), left)
                value = arith.select(there, vector.extract(register, [], [k]), zero)
                register = vector.insert(value, register, [], [k])
            return register

        return kept

    return _keep(x, count, keeper)


def keep_rows(x: jax.Array, count: jax.Array, *, interpret: bool) -> jax.Array:
    """Float32 `[64, 8 j]` in wgmma's layout with zeros from row `count` on.

    A thread has row 16 (warp) + (lane / 4) and the eighth row behind it.
    """
    if interpret:
        return _keep_plainly(x, count, 0)

    def keeper(values, most):
        lane = arith.remui(thread_index(), int32(LANES))
        warp = arith.divui(thread_index(), int32(LANES))
        first = arith.addi(arith.muli(warp, int32(16)), arith.divui(lane, int32(4)))
        there = [less(arith.addi(first, int32(8 * k)), most) for k in range(2)]
        kind = values.registers.flat[0].type
        zero = ir.FloatAttr.get(ir.F32Type.get(), 0.0)
        zeros = arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, zero))
        return lambda at, register: arith.select(there[at[_ROW_AXIS]], register, zeros)

    return _keep(x, count, keeper)


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
        return _of_registers(registers, values)

    return emit(x)


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


# -- products of few rows --------------------------------------------------------------------------


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
    """`sums + left[:rows, m band:][:, :m]^T right[:rows]`, complete; `rows` is a multiple of 16. m, the rows
    of the sums, is a multiple of 64.

    Mosaic's own wgmma takes 64 rows of tiles with TMA's 128-byte swizzle, or multiples of them.
    """
    wide = sums.shape[0]
    if interpret:
        left = left_ref[:rows, pl.ds(band * wide, wide)].astype(jnp.float32)
        return sums + jnp.dot(left.T, right_ref[:rows, :].astype(jnp.float32))
    like = plgpu.ShapeDtypeStruct(sums.shape, sums.dtype, layout=plgpu.Layout.WGMMA)
    scalar = plgpu.Layout.WG_SPLAT(())
    kinds = plgpu.RefType(likes[0]), plgpu.RefType(likes[1]), plgpu.Layout.WGMMA, scalar

    @emits(arg_types=kinds, return_type=like)
    def emit(_, left, right, values, which):
        group, per_instruction = 64, 16
        bands = wide // group
        which = arith.index_cast(ir.IndexType.get(), arith.muli(scalar_of(which), int32(bands)))
        left = mgpu.memref_slice(left, (slice(None), mgpu.ds(which, bands)))
        left = mgpu.memref_transpose(left, (1, 0, 3, 2))
        kind = ir.MemRefType(left.type).element_type
        more = {"swizzle": 128, "large_tile": (group, group)}
        of_left = [
            _descriptor(
                mgpu.memref_slice(left, slice(m, m + 1)),
                group_size=(group, group),
                logical_k_major=False,
                **more,
            )[0]
            for m in range(bands)
        ]
        (b, (_, (b_step, *_))), *_ = _descriptor(
            right, group_size=(group, sums.shape[1]), logical_k_major=True, **more
        )
        given = mgpu.WGMMAAccumulator.from_registers(values)
        registers = given._value.registers.copy()
        for m, (a, (_, (a_step, *_))) in enumerate(of_left):
            registers[m : m + 1] = _wgmma(
                registers[m : m + 1],
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
