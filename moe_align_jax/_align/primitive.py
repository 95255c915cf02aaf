"""The alignment's primitive: how each implementation computes a problem, and a batch of problems."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive

from moe_align_jax._align import tables
from moe_align_jax._core import checks
from moe_align_jax._lowering import select
from moe_align_jax._lowering.primitive import (
    batch_size,
    make_primitive,
    no_tangents,
    result_like,
)
from moe_align_jax._lowering.sharding import on_each_shard, vary_together
from moe_align_jax.types import AlignProblem, BatchedAlignProblem

type AnyAlignProblem = AlignProblem | BatchedAlignProblem

# CUDA allows 65,535 along grid.y, where a vmapped batch goes.
MAX_KERNEL_BATCH = 65_535


def align(problem: AnyAlignProblem, implementation: str | None, *operands: jax.Array):
    """Binds the primitive: the results of `problem.outputs`, in order."""
    return block_align_p.bind(
        *vary_together(list(operands)),
        problem=problem,
        implementation=implementation,
        batched=(False,) * len(operands),
    )


# -- how each implementation computes a problem, unbatched ---------------------------------------


def _reference_call(problem: AnyAlignProblem, *operands: jax.Array) -> tuple[jax.Array, ...]:
    from moe_align_jax._align import reference

    named = dict(zip(problem.inputs, operands, strict=True))
    if isinstance(problem, BatchedAlignProblem):
        return reference.batched_block_align(problem, **named)
    return reference.block_align(problem, **named)


def _kernel_call(
    problem: AnyAlignProblem, batched: bool, *operands: jax.Array
) -> tuple[jax.Array, ...]:
    from moe_align_jax._align import kernels
    from moe_align_jax._simt import mosaic

    problem = problem._replace(tuning=tables.table_name(select.gpu_kind()))
    program = kernels.build(problem, tables.config_for(problem), batched=batched)
    return mosaic.run(program, operands)


def _emulator_call(problem: AnyAlignProblem, batched: tuple[bool, ...], *operands: jax.Array):
    from moe_align_jax._align import kernels
    from moe_align_jax._simt import emulator

    program = kernels.build(problem, tables.config_for(problem), batched=any(batched))

    def on_host(*arrays):
        arrays = [np.asarray(a) for a in arrays]
        if not any(batched):
            return tuple(emulator.run(program, arrays))
        size = next(a.shape[0] for a, b in zip(arrays, batched, strict=True) if b)
        rows = [
            emulator.run(program, [a[i] if b else a for a, b in zip(arrays, batched, strict=True)])
            for i in range(size)
        ]
        return tuple(np.stack(column) for column in zip(*rows, strict=True))

    batch = next((a.shape[:1] for a, b in zip(operands, batched, strict=True) if b), ())
    shapes = [jax.ShapeDtypeStruct(batch + s, np.int32) for s in problem.outputs.values()]
    return jax.pure_callback(on_host, tuple(shapes), *operands)


def call_of(
    choice: str, problem: AnyAlignProblem, batched: tuple[bool, ...] | None = None
) -> Callable:
    """The function of the operands by which the chosen implementation computes the problem.

    `batched`: which operands have a batch as their first axis; None for none of them.
    """
    batched = batched or (False,) * len(problem.inputs)
    if choice == "emulator":
        return functools.partial(_emulator_call, problem, batched)
    if choice == "xla":
        return _over_batch(functools.partial(_reference_call, problem), batched)
    return _over_batch(functools.partial(_kernel_call, problem, any(batched)), batched)


def _over_batch(call: Callable, batched: tuple[bool, ...]) -> Callable:
    if not any(batched):
        return call
    return jax.vmap(call, in_axes=tuple(0 if b else None for b in batched))


# -- the primitive -------------------------------------------------------------------------------


def _batch_shape(problem: AnyAlignProblem, avals: Any) -> tuple[Any, ...]:
    for shape, aval in zip(problem.inputs.values(), avals, strict=True):
        if aval.ndim > len(shape):
            return aval.shape[:1]
    return ()


def _abstract(
    *avals: Any, problem: AnyAlignProblem, implementation: str | None, batched: tuple[bool, ...]
):
    del implementation, batched
    batch = _batch_shape(problem, avals)
    return [result_like(avals[0], batch + s, np.int32) for s in problem.outputs.values()]


def _implement(
    platform: str,
    ctx: Any,
    *,
    problem: AnyAlignProblem,
    implementation: str | None,
    batched: tuple[bool, ...],
) -> Callable:
    choice = select.choose(problem.name, platform, implementation)
    if choice == "mosaic_gpu":
        check_kernel_sizes(problem, _batch_shape(problem, ctx.avals_in))
    return call_of(choice, problem, batched)


def check_kernel_sizes(problem: AnyAlignProblem, batch: tuple[Any, ...]) -> None:
    """Raises where the kernels do not take symbolic sizes, or so large a batch."""
    sizes = [d for shape in (*problem.inputs.values(), batch) for d in shape]
    if not all(isinstance(d, (int, np.integer)) for d in sizes):
        raise select.not_implemented(
            problem.name,
            "mosaic_gpu",
            "the kernels need static shapes; export a symbolic shape with 'xla'",
        )
    if batch and batch[0] > MAX_KERNEL_BATCH:
        raise ValueError(
            checks.message(
                problem.name,
                "a vmapped batch",
                f"be at most {MAX_KERNEL_BATCH} on a GPU",
                batch[0],
                "Use jax.lax.map with batch_size, or implementation='xla'.",
            )
        )


def _batch(primitive: Primitive, operands: Any, dims: Any, **parameters: Any) -> list[jax.Array]:
    """Any depth of vmap becomes one leading batch axis."""
    call = functools.partial(_flat_batch, primitive, dims=dims, **parameters)
    return on_each_shard(call, operands, dims)


def _flat_batch(primitive: Primitive, *operands, dims, problem, implementation, batched):
    size = batch_size(operands, dims)
    inner = next(
        (
            a.shape[0 if d is None or d > 0 else 1]
            for a, d, b in zip(operands, dims, batched, strict=True)
            if b
        ),
        None,
    )
    flat, flat_batched = [], []
    for operand, dim, has_inner in zip(operands, dims, batched, strict=True):
        if dim:
            operand = jnp.moveaxis(operand, dim, 0)
        if inner is not None and (dim is not None or has_inner):
            core = operand.shape[int(dim is not None) + int(has_inner) :]
            axes = tuple(i for i, there in enumerate((dim is not None, has_inner)) if there)
            rest = tuple(range(2, 2 + len(core)))
            operand = lax.broadcast_in_dim(operand, (size, inner, *core), axes + rest)
            operand = lax.reshape(operand, (size * inner, *core))
        flat.append(operand)
        flat_batched.append(dim is not None or has_inner)
    results = primitive.bind(
        *flat, problem=problem, implementation=implementation, batched=tuple(flat_batched)
    )
    if inner is not None:
        results = [lax.reshape(r, (size, inner, *r.shape[1:])) for r in results]
    return results


block_align_p = make_primitive(
    "moe_align_block_size",
    abstract=_abstract,
    implement=_implement,
    batch=_batch,
    jvp=no_tangents,
)
