"""Weight gradients: for each expert lhs^T rhs over its rows. A primitive, with a derivative."""

import functools

import jax
import jax.numpy as jnp

from moe_align_jax._grouped_matmul import primitive, reference
from moe_align_jax._grouped_matmul.problem import MatmulProblem, WeightGradient, Weights
from moe_align_jax._lowering import select


def unavailable(problem: WeightGradient, implementation: str, platform: str) -> str | None:
    """Why a named implementation cannot run this for `platform`, or None."""
    if implementation == "xla":
        return None
    if reason := select._unavailable(implementation, platform):
        return reason
    from moe_align_jax._grouped_matmul import weight_gradient_kernel

    return weight_gradient_kernel.cannot(problem)


def choose(problem: WeightGradient, platform: str, implementation: str | None) -> str:
    """The implementation that runs: "xla", unless a kernel is named. No GPU has run it yet."""
    if implementation is None:
        return "xla"
    if reason := unavailable(problem, implementation, platform):
        raise select._not_implemented(problem.function, implementation, reason)
    return implementation


def implementation_for(problem: WeightGradient, implementation: str | None) -> str:
    """Within a derivative: the kernel that is named, if it takes the sizes."""
    if implementation in (None, "xla"):
        return "xla"
    from moe_align_jax._grouped_matmul import weight_gradient_kernel

    return "xla" if weight_gradient_kernel.cannot(problem) else str(implementation)


def _abstract(lhs, *rest, problem: WeightGradient, implementation: str | None):
    del rest, implementation
    return select.result_like(lhs, problem.out_shape, problem.layout.out_dtype)


def _lowering(problem: WeightGradient, platform: str, implementation: str | None):
    if choose(problem, platform, implementation) == "xla":
        return reference.weight_gradient
    from moe_align_jax._grouped_matmul import weight_gradient_kernel

    return weight_gradient_kernel.run


_p = primitive._make("grouped_weight_gradient", _abstract, _lowering, results=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(problem: WeightGradient, implementation: str | None, floats, where):
    if implementation == "emulator":
        # Pallas' interpreter works by ordered callbacks, which no lowering rule can emit.
        from moe_align_jax._grouped_matmul import weight_gradient_kernel

        return weight_gradient_kernel.run(problem, *floats, *where, interpret=True)
    return _p.bind(*floats, *where, problem=problem, implementation=implementation)


def _forward(problem, implementation, floats, where):
    return _differentiable(problem, implementation, floats, where), (floats, where)


def _backward(problem, implementation, kept, ct):
    """Products of one operand's rows with the result's derivative, for the other's."""
    from moe_align_jax._grouped_matmul import derivative

    (lhs, rhs), where = kept
    layout = problem.layout
    ct, lhs, rhs, *where = select._vary_together([ct, lhs, rhs, *where])
    ct = ct.astype(layout.dtype)
    used = reference.row_mask(layout, *where)
    found = []
    for name, other in (("lhs", rhs), ("rhs", lhs)):
        transposed = name == "lhs"
        gathers_other = problem.gathered not in (None, name)
        k, n = (layout.n, layout.k) if transposed else (layout.k, layout.n)
        tokens = {} if gathers_other else {"num_tokens": 0, "top_k": 0}
        toward: MatmulProblem = layout._replace(
            k=k, n=n, out_dtype=layout.dtype, weights=Weights(transposed=transposed), **tokens
        )
        rows = derivative.product(toward, implementation, other, ct, None, tuple(where))
        if problem.gathered == name:
            of_pair = derivative.row_of_pair(layout, used, where[0])
            found.append(derivative.sum_of_rows(rows, of_pair, layout.dtype))
        else:
            found.append(jnp.where(used[:, None], rows, jnp.zeros_like(rows)))
    return tuple(found), tuple(None for _ in where)


_differentiable.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames=("problem", "implementation"))
def run(
    operands: tuple[jax.Array, ...], *, problem: WeightGradient, implementation: str | None
) -> jax.Array:
    """`[E, k, n]` of `problem.inputs`; zeros for an expert without rows."""
    with jax.named_scope("weight_gradient"):
        lhs, rhs, *where = select._vary_together(list(operands))
        if 0 in (*problem.out_shape, lhs.shape[0], rhs.shape[0], problem.layout.num_rows):
            zero = jnp.sum(lhs.reshape(-1)[:0]).astype(problem.layout.out_dtype)
            return jnp.zeros(problem.out_shape, problem.layout.out_dtype) + zero
        if implementation == "emulator":
            choose(problem, "cpu", implementation)
        return _differentiable(problem, implementation, (lhs, rhs), tuple(where))
