"""Which implementation runs: primitives with a lowering rule per platform, and a loop for vmap."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive

from moe_align_jax._grouped_matmul import config, reference
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._lowering import select
from moe_align_jax._lowering.primitive import make_primitive, result_like
from moe_align_jax._lowering.sharding import on_each_shard, vary_together


def choose(problem: MatmulProblem, platform: str, implementation: str | None) -> str:
    """The implementation that runs; NotImplementedError where the named one cannot."""
    unsupported = functools.partial(config.unsupported, problem)
    return select.choose(problem.function, platform, implementation, unsupported)


def make_matmul_primitive(
    name: str, abstract: Callable, lower_as: Callable[..., Callable], results: bool
) -> Primitive:
    """A primitive whose parameters are a problem and an implementation's name."""

    def implement(
        platform: str, ctx: Any, *, problem: MatmulProblem, implementation: str | None
    ) -> Callable:
        del ctx
        return functools.partial(lower_as(problem, platform, implementation), problem)

    return make_primitive(
        name, abstract=abstract, implement=implement, batch=_one_by_one, multiple_results=results
    )


def _one_by_one(primitive: Primitive, operands: Any, dims: Any, **parameters: Any) -> Any:
    """A batch, one after the other (a kernel fills the GPU by itself); each device has its part of it."""
    loop = functools.partial(_loop, primitive, dims, parameters)
    return on_each_shard(loop, operands, dims)


def _loop(primitive: Primitive, dims: Any, parameters: dict[str, Any], *operands: Any) -> Any:
    """The rule of vmap: one call after the other, over the leading dimension of the batched operands."""
    batched = [
        jnp.moveaxis(x, dim, 0) if dim else x
        for x, dim in zip(operands, dims, strict=True)
        if dim is not None
    ]

    def one(slices):
        rest = iter(slices)
        given = [x if dim is None else next(rest) for x, dim in zip(operands, dims, strict=True)]
        return primitive.bind(*vary_together(given), **parameters)

    return lax.map(one, batched)


def _forward_abstract(x, *rest, problem: MatmulProblem, implementation: str | None):
    """Shape and dtype of the result, for tracing."""
    del rest, implementation
    return result_like(x, problem.out_shape, problem.out_dtype)


def _forward_lowering(problem: MatmulProblem, platform: str, implementation: str | None):
    """The function of the operands that computes the product on this platform."""
    if choose(problem, platform, implementation) == "xla":
        return reference.grouped_matmul
    from moe_align_jax._grouped_matmul import launch

    return functools.partial(launch.run, gpu_kind=select.gpu_kind())


_forward_p = make_matmul_primitive(
    "grouped_matmul", _forward_abstract, _forward_lowering, results=False
)


def bind(problem: MatmulProblem, implementation: str | None, *operands: jax.Array) -> jax.Array:
    """`[num_rows, n]` of `problem.inputs`. Without a derivative."""
    if implementation == "emulator":
        # Pallas' interpreter works by ordered callbacks, which no lowering rule can emit.
        from moe_align_jax._grouped_matmul import launch

        return launch.run(problem, *operands, interpret=True)
    return _forward_p.bind(*operands, problem=problem, implementation=implementation)
