"""An integer that a launch outside XLA gives a Pallas kernel, without memory for it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref


def launch_value(ref: Any) -> jax.Array:
    """The int32 that rides in the place of this array's pointer, times 256.

    LLVM takes the low 8 bits of a pointer parameter for zero: it is declared 256-byte aligned.
    """

    scalar = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=plgpu.Layout.WG_SPLAT(()))
    emits: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=scalar)

    @emits
    def emit(_, memory):
        pointer = memref.extract_aligned_pointer_as_index(memory)
        word = arith.shrui(pointer, arith.constant(ir.IndexType.get(), 8))
        value = arith.index_cast(ir.IntegerType.get_signless(32), word)
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return emit(ref)
