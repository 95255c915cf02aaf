"""A layer's backward step across its activation as one kernel: a primitive, and where it runs."""

import functools

import jax
import jax.numpy as jnp

from moe_align_jax._grouped_matmul import primitive
from moe_align_jax._grouped_matmul.problem import ActivationGradient
from moe_align_jax._lowering import select
from moe_align_jax._lowering.primitive import result_like

# It has been compiled, and run in the interpreter, but not on a GPU. Where this is set, layers whose
# implementation is named take it there; jax's caches keep what was traced before.
enabled = False


def runs(problem: ActivationGradient, implementation: str | None) -> bool:
    """Whether `run` is to be called: the kernel is named, and takes the problem."""
    if implementation != "emulator" and not (enabled and implementation == "mosaic_gpu"):
        return False
    from moe_align_jax._grouped_matmul import activation_gradient_kernel

    return activation_gradient_kernel.cannot(problem) is None


def _abstract(products, *rest, problem: ActivationGradient, implementation: str | None):
    del rest, implementation
    rows, n = problem.product.out_shape
    dtype = problem.product.dtype
    shapes = (((rows, 2 * n), dtype), ((rows, n), dtype), ((rows,), "float32"))
    return [result_like(products, *each) for each in shapes]


def _lowering(problem: ActivationGradient, platform: str, implementation: str | None):
    if reason := select.unavailable(str(implementation), platform):
        raise select.not_implemented(problem.product.function, str(implementation), reason)
    from moe_align_jax._grouped_matmul import activation_gradient_kernel

    return activation_gradient_kernel.run


_p = primitive.make_matmul_primitive("activation_gradient", _abstract, _lowering, results=True)


@functools.partial(jax.jit, static_argnames=("problem", "implementation"))
def run(
    operands: tuple[jax.Array, ...], *, problem: ActivationGradient, implementation: str
) -> list[jax.Array]:
    """[dh `[P, 2 N]`, s a `[P, N]`, sums of g a float32 `[P]`]; see `activation_gradient_kernel`.

    operands: products, scale (the weight of each row's pair), which rows hold one, those of the product.
    """
    from moe_align_jax._grouped_matmul import activation_gradient_kernel

    products, scale, used, *rest = operands
    scale = jnp.where(used, scale, activation_gradient_kernel.NO_PAIR)
    operands = (products, scale, *rest)
    if implementation == "emulator":
        # Pallas' interpreter works by ordered callbacks, which no lowering rule can emit.
        return list(activation_gradient_kernel.run(problem, *operands, interpret=True))
    return _p.bind(*operands, problem=problem, implementation=implementation)
