"""Weight gradients: for each expert lhs^T rhs over its rows. A primitive, and which implementation runs."""

import functools

import jax

from moe_align_jax._grouped_matmul import primitive, reference
from moe_align_jax._grouped_matmul.problem import WeightGradient
from moe_align_jax._lowering import select
from moe_align_jax._lowering.primitive import result_like


def _unsupported(problem: WeightGradient) -> str | None:
    """Why the kernel does not take the problem, or None."""
    from moe_align_jax._grouped_matmul import weight_gradient_kernel

    return weight_gradient_kernel.cannot(problem)


def choose(problem: WeightGradient, platform: str, implementation: str | None) -> str:
    """The implementation that runs; NotImplementedError where the named one cannot."""
    unsupported = functools.partial(_unsupported, problem)
    return select.choose(problem.function, platform, implementation, unsupported)


def implementation_for(problem: WeightGradient, implementation: str | None) -> str | None:
    """Within a derivative: the named one, if it takes the sizes, which may be others."""
    if implementation in (None, "xla"):
        return implementation
    return "xla" if _unsupported(problem) else str(implementation)


def _abstract(lhs, *rest, problem: WeightGradient, implementation: str | None):
    """Shape and dtype of the result, for tracing."""
    del rest, implementation
    return result_like(lhs, problem.out_shape, problem.layout.out_dtype)


def _lowering(problem: WeightGradient, platform: str, implementation: str | None):
    """The function of the operands that computes the gradient on this platform."""
    if choose(problem, platform, implementation) == "xla":
        return reference.weight_gradient
    from moe_align_jax._grouped_matmul import weight_gradient_kernel

    return weight_gradient_kernel.run


_p = primitive.make_matmul_primitive("grouped_weight_gradient", _abstract, _lowering, results=False)


def bind(problem: WeightGradient, implementation: str | None, *operands: jax.Array) -> jax.Array:
    """`[E, k, n]` of `problem.inputs`. Without a derivative."""
    if implementation == "emulator":
        # Pallas' interpreter works by ordered callbacks, which no lowering rule can emit.
        from moe_align_jax._grouped_matmul import weight_gradient_kernel

        return weight_gradient_kernel.run(problem, *operands, interpret=True)
    return _p.bind(*operands, problem=problem, implementation=implementation)
