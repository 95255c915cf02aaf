"""How a primitive of ours is made: its type, its lowering for each platform, its batch and derivative.

A primitive is used because the choice of an implementation belongs to the platform that the program is
*lowered* for, from one trace; `lax.platform_dependent` leaves `case` ops behind and breaks shard_map's
check_vma, Explicit meshes and two-platform export.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

# Those that jax lowers for under a name of its own.
PLATFORMS = ("cpu", "tpu", "rocm", "cuda")
ANOTHER_PLATFORM = "another platform"


def make_primitive(
    name: str,
    *,
    abstract: Callable[..., Any],
    implement: Callable[..., Callable],
    batch: Callable[..., Any] | None = None,
    jvp: Callable[..., Any] | None = None,
    multiple_results: bool = True,
    platforms: tuple[str, ...] | None = None,
) -> Primitive:
    """A primitive of ours. What it is bound with besides its operands are its parameters.

    Args:
        name: as it stands in a jaxpr.
        abstract: `abstract(*types, **parameters)`: the types of its results, by `result_like`.
        implement: `implement(platform, ctx, **parameters)`: the function of the operands that runs on the
            platform ("another platform" where jax has no name for it); `ctx` is the lowering rule's. It
            raises where nothing can run there.
        batch: `batch(primitive, operands, dims, **parameters)`: the results of a vmapped batch, which is
            their first axis. None: it cannot be vmapped.
        jvp: `jvp(primitive, primals, tangents, **parameters)`: results and their tangents. None: it has no
            derivative.
        multiple_results: whether it returns a list; else one array.
        platforms: those that it can be lowered for; None for all.
    """
    primitive = Primitive(name)
    primitive.multiple_results = multiple_results
    primitive.def_abstract_eval(abstract)
    primitive.def_impl(functools.partial(run_eagerly, primitive))

    def lower(platform: str, ctx: Any, *operands: Any, **parameters: Any) -> Any:
        call = implement(platform, ctx, **parameters)
        return mlir.lower_fun(call, multiple_results=multiple_results)(ctx, *operands)

    for platform in PLATFORMS if platforms is None else platforms:
        mlir.register_lowering(primitive, functools.partial(lower, platform), platform=platform)
    if platforms is None:
        mlir.register_lowering(primitive, functools.partial(lower, ANOTHER_PLATFORM))

    if batch is not None:

        def batching_rule(operands: Any, dims: Any, **parameters: Any) -> Any:
            results = batch(primitive, operands, dims, **parameters)
            return results, [0] * len(results) if multiple_results else 0

        batching.primitive_batchers[primitive] = batching_rule
    if jvp is not None:
        ad.primitive_jvps[primitive] = functools.partial(jvp, primitive)
    return primitive


def run_eagerly(primitive: Primitive, *operands: jax.Array, **parameters: Any) -> Any:
    """A primitive outside jit: a program of its own, also under `jax.disable_jit`."""
    with jax.disable_jit(False):
        return jax.jit(functools.partial(primitive.bind, **parameters))(*operands)


def result_like(aval: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """The type of a primitive's result, on the mesh of an operand, which it varies over a shard_map with."""
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec(*[None] * len(shape)))
    return aval.update(shape=shape, dtype=np.dtype(dtype), weak_type=False, sharding=sharding)


def no_tangent(x: jax.Array) -> Any:
    """The tangent of a result that has none: an integer."""
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def no_tangents(
    primitive: Primitive, primals: Any, tangents: Any, **parameters: Any
) -> tuple[list[jax.Array], list[Any]]:
    """The `jvp` of a primitive whose results are all integers."""
    del tangents
    results = primitive.bind(*primals, **parameters)
    return results, [no_tangent(r) for r in results]


def batch_size(operands: Any, dims: Any) -> Any:
    """The size of a vmapped batch; `dims` are the dimensions of the batch, None where there is none."""
    return next(x.shape[dim] for x, dim in zip(operands, dims, strict=True) if dim is not None)


def batch_first(operand: jax.Array, dim: int | None, size: Any) -> jax.Array:
    """The operand with the batch as its first axis; repeated where it has none."""
    if dim is None:
        return lax.broadcast(operand, (size,))
    return jnp.moveaxis(operand, dim, 0) if dim else operand
