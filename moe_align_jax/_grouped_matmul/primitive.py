"""Which implementation runs: primitives with a lowering rule per platform, a derivative, a loop for vmap."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive

from moe_align_jax._core import checks
from moe_align_jax._grouped_matmul import config, reference
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._lowering import select
from moe_align_jax._lowering.primitive import make_primitive, result_like
from moe_align_jax._lowering.sharding import vary_together


def unavailable(problem: MatmulProblem, implementation: str, platform: str) -> str | None:
    """Why a named implementation cannot run this for `platform`, or None."""
    unsupported = functools.partial(config.unsupported, problem)
    return select.unavailable(implementation, platform, unsupported)


def choose(problem: MatmulProblem, platform: str, implementation: str | None) -> str:
    """The implementation that runs; NotImplementedError where the named one cannot."""
    if implementation is None and config.named_only(problem):
        return "xla"
    unsupported = functools.partial(config.unsupported, problem)
    return select.choose(problem.function, platform, implementation, unsupported)


def _make(
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
    """A batch, one after the other: a kernel fills the GPU by itself."""
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
    del rest, implementation
    return result_like(x, problem.out_shape, problem.out_dtype)


def _forward_lowering(problem: MatmulProblem, platform: str, implementation: str | None):
    if choose(problem, platform, implementation) == "xla":
        return reference.grouped_matmul
    from moe_align_jax._grouped_matmul import launch

    return functools.partial(launch.run, gpu_kind=select.gpu_kind())


def _backward_abstract(ct, *operands, problem: MatmulProblem, implementation: str | None):
    del ct, implementation
    floats = operands[: problem.num_floats]
    return [result_like(x, x.shape, x.dtype) for x in floats]


def _backward_lowering(problem: MatmulProblem, platform: str, implementation: str | None):
    del problem, platform, implementation
    return reference.grouped_matmul_backward


_forward_p = _make("grouped_matmul", _forward_abstract, _forward_lowering, results=False)
_backward_p = _make("grouped_matmul_backward", _backward_abstract, _backward_lowering, results=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(problem: MatmulProblem, implementation: str | None, floats, where):
    operands = (*floats, *where)
    if implementation == "emulator":
        # Pallas' interpreter works by ordered callbacks, which no lowering rule can emit.
        from moe_align_jax._grouped_matmul import launch

        return launch.run(problem, *operands, interpret=True)
    return _forward_p.bind(*operands, problem=problem, implementation=implementation)


def _forward(problem, implementation, floats, where):
    if problem.scales:
        rule, remedy = "not be differentiated", "Train in bfloat16, or pass jax.lax.stop_gradient."
        rule = checks.message(problem.function, "e4m3 x", rule, "a tangent", remedy)
        raise NotImplementedError(rule)
    return _differentiable(problem, implementation, floats, where), (floats, where)


def _backward(problem, implementation, kept, ct):
    """The "xla" reference's, on every platform."""
    floats, where = kept
    operands = vary_together([ct, *floats, *where])
    found = _backward_p.bind(*operands, problem=problem, implementation=implementation)
    return tuple(found), tuple(None for _ in where)


_differentiable.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames=("problem", "implementation"))
def run(
    operands: tuple[jax.Array, ...], *, problem: MatmulProblem, implementation: str | None
) -> jax.Array:
    """`[num_rows, n]` of `problem.inputs`. One cached trace per problem: repeated layers reuse it."""
    with jax.named_scope(problem.function):
        if 0 in problem.out_shape or not problem.num_experts:
            return _nothing(problem, operands)
        if implementation == "emulator":
            choose(problem, "cpu", implementation)
        given = vary_together(list(operands))
        floats = problem.num_floats
        return _differentiable(
            problem, implementation, tuple(given[:floats]), tuple(given[floats:])
        )


def _nothing(problem: MatmulProblem, operands: tuple[jax.Array, ...]) -> jax.Array:
    """No rows, columns or experts: there is nothing to multiply."""
    x, *_ = vary_together(list(operands))
    some = x.reshape(-1)[:0].astype(problem.out_dtype)
    return jnp.zeros(problem.out_shape, problem.out_dtype) + jnp.sum(some).astype(problem.out_dtype)
