"""Which implementation runs: primitives with a lowering rule per platform, a derivative, a loop for vmap."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from moe_align_jax._grouped_matmul import config, reference
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._lowering import select


def unavailable(problem: MatmulProblem, implementation: str, platform: str) -> str | None:
    """Why a named implementation cannot run this for `platform`, or None."""
    if reason := select._unavailable(implementation, platform):
        return reason
    return None if implementation == "xla" else config.unsupported(problem)


def choose(problem: MatmulProblem, platform: str, implementation: str | None) -> str:
    """The implementation that runs; NotImplementedError where the named one cannot."""
    if implementation is None:
        return "xla" if unavailable(problem, "mosaic_gpu", platform) else "mosaic_gpu"
    if reason := unavailable(problem, implementation, platform):
        raise select._not_implemented(problem.function, implementation, reason)
    return implementation


def _make(
    name: str, abstract: Callable, lower_as: Callable[..., Callable], results: bool
) -> Primitive:
    """A primitive whose parameters are a problem and an implementation's name."""
    primitive = Primitive(name)
    primitive.multiple_results = results
    primitive.def_abstract_eval(abstract)
    primitive.def_impl(functools.partial(select.run_eagerly, primitive))

    def lower(platform: str, ctx, *operands, problem: MatmulProblem, implementation: str | None):
        call = functools.partial(lower_as(problem, platform, implementation), problem)
        return mlir.lower_fun(call, multiple_results=results)(ctx, *operands)

    for platform in ("cpu", "tpu", "rocm", "cuda"):
        rule = functools.partial(lower, platform)
        mlir.register_lowering(primitive, rule, platform=platform)
    mlir.register_lowering(primitive, functools.partial(lower, "another platform"))

    def batch(operands, dims, **params):
        """One after the other: a kernel fills the GPU by itself."""
        batched = [
            jnp.moveaxis(x, dim, 0) if dim else x
            for x, dim in zip(operands, dims, strict=True)
            if dim is not None
        ]

        def one(slices):
            rest = iter(slices)
            given = [
                x if dim is None else next(rest) for x, dim in zip(operands, dims, strict=True)
            ]
            return primitive.bind(*select._vary_together(given), **params)

        out: Any = lax.map(one, batched)
        return (out, [0] * len(out)) if results else (out, 0)

    batching.primitive_batchers[primitive] = batch
    return primitive


def _forward_abstract(x, *rest, problem: MatmulProblem, implementation: str | None):
    del rest, implementation
    return select.result_like(x, problem.out_shape, problem.out_dtype)


def _forward_lowering(problem: MatmulProblem, platform: str, implementation: str | None):
    if choose(problem, platform, implementation) == "xla":
        return reference.grouped_matmul
    from moe_align_jax._grouped_matmul import launch

    return functools.partial(launch.run, gpu_kind=select.gpu_kind())


_forward_p = _make("grouped_matmul", _forward_abstract, _forward_lowering, results=False)


def cast(problem: MatmulProblem, floats: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The operands as they are multiplied: float32 weights in x's dtype."""
    wanted = [dtype for _, dtype in problem.inputs.values()][: problem.num_floats]
    return tuple(x.astype(dtype) for x, dtype in zip(floats, wanted, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(problem: MatmulProblem, implementation: str | None, floats, where):
    operands = (*cast(problem, floats), *where)
    if implementation == "emulator":
        # Pallas' interpreter works by ordered callbacks, which no lowering rule can emit.
        from moe_align_jax._grouped_matmul import launch

        return launch.run(problem, *operands, interpret=True)
    return _forward_p.bind(*operands, problem=problem, implementation=implementation)


def _forward(problem, implementation, floats, where):
    return _differentiable(problem, implementation, floats, where), (floats, where)


def _backward(problem, implementation, kept, ct):
    from moe_align_jax._grouped_matmul import derivative

    floats, where = kept
    return derivative.backward(problem, implementation, floats, where, ct)


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
        given = select._vary_together(list(operands))
        floats = problem.num_floats
        return _differentiable(
            problem, implementation, tuple(given[:floats]), tuple(given[floats:])
        )


def _nothing(problem: MatmulProblem, operands: tuple[jax.Array, ...]) -> jax.Array:
    """No rows, columns or experts: there is nothing to multiply."""
    x, *_ = select._vary_together(list(operands))
    some = x.reshape(-1)[:0].astype(problem.out_dtype)
    return jnp.zeros(problem.out_shape, problem.out_dtype) + jnp.sum(some).astype(problem.out_dtype)
