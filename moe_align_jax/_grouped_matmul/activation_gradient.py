"""A layer's backward step across its activation: a product, the derivative of the activation, sums of rows.

loop       "xla": block after block, so that nothing is kept of the product, nor of what is between
rows       on a GPU with kernels: the product's kernel, and one for the rest, `across_activation_kernel`
fusions    where that one does not take the problem: the product's kernel, and what XLA makes of the rest
kernel     all of it in one, where `enabled`: see `activation_gradient_kernel`

The second derivative is that of the fusions.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe_align_jax._grouped_matmul import derivative, primitive, reference
from moe_align_jax._grouped_matmul.problem import ActivationGradient
from moe_align_jax._lowering.primitive import result_like
from moe_align_jax._lowering.sharding import vary_together

_F32 = jnp.float32
# The one kernel needs no g in memory and is not faster: on an H200 it was measured between 1 % faster and 5 %
# slower than the fusions. jax's caches keep what was traced before this is set.
enabled = False


def choose(problem: ActivationGradient, platform: str, implementation: str | None) -> str:
    """ "loop", "rows", "fusions" or "kernel"."""
    if primitive.choose(problem.product, platform, implementation) == "xla":
        return "loop"
    return _by_kernels(problem)


def _by_kernels(problem: ActivationGradient) -> str:
    """Of the ways with kernels, on a GPU and in the interpreter, the one that runs."""
    from moe_align_jax._grouped_matmul import across_activation_kernel, activation_gradient_kernel

    if enabled and activation_gradient_kernel.cannot(problem) is None:
        return "kernel"
    return "rows" if across_activation_kernel.cannot(problem) is None else "fusions"


def _abstract(products, *rest, problem: ActivationGradient, implementation: str | None):
    """Shape and dtype of each result, for tracing."""
    del rest, implementation
    rows, n = problem.product.out_shape
    dtype = problem.product.dtype
    columns = 2 * n if problem.weights.gated else n
    shapes = (((rows, columns), dtype), ((rows, n), dtype), ((rows,), "float32"))
    return [result_like(products, *each) for each in shapes]


def _lowering(problem: ActivationGradient, platform: str, implementation: str | None):
    """The function of the operands that computes the gradient on this platform."""
    way = choose(problem, platform, implementation)
    if way == "loop":
        return reference.activation_gradient
    return functools.partial(_WAYS[way], implementation)


def _by_fusions(
    implementation: str | None, problem: ActivationGradient, *operands: jax.Array
) -> list[jax.Array]:
    """The gradient by a grouped product and XLA's fusions."""
    products, scale, used, toward, w, *where = operands
    g = _product(implementation, problem, toward, w, where)
    first = problem.product._replace(weights=problem.weights)
    with jax.named_scope("gate_up"):
        found = reference.across_activation(first, products, g.astype(_F32), scale, used)
    return list(found)


def _by_rows(
    implementation: str | None, problem: ActivationGradient, *operands: jax.Array
) -> list[jax.Array]:
    """The gradient by a grouped product and a kernel that takes its rows one by one."""
    from moe_align_jax._grouped_matmul import across_activation_kernel as kernel

    products, scale, used, toward, w, *where = operands
    g = _product(implementation, problem, toward, w, where)
    with jax.named_scope("gate_up"):
        scale = jnp.where(used, scale, kernel.NO_PAIR)
        given = (products, g, scale, where[2])
        return list(kernel.run(problem, *given, interpret=implementation == "emulator"))


def _product(
    implementation: str | None,
    problem: ActivationGradient,
    toward: jax.Array,
    w: jax.Array,
    where: list[jax.Array],
) -> jax.Array:
    """g `[P, N]`: the cotangent of what the second product multiplied, by the product's implementation."""
    with jax.named_scope("down"):
        return derivative.product(problem.product, implementation, toward, w, None, tuple(where))


def _by_kernel(
    implementation: str | None, problem: ActivationGradient, *operands: jax.Array
) -> list[jax.Array]:
    """The gradient by one kernel."""
    from moe_align_jax._grouped_matmul import activation_gradient_kernel

    products, scale, used, *rest = operands
    scale = jnp.where(used, scale, activation_gradient_kernel.NO_PAIR)
    given, interpret = (products, scale, *rest), implementation == "emulator"
    return list(activation_gradient_kernel.run(problem, *given, interpret=interpret))


_WAYS = {"rows": _by_rows, "fusions": _by_fusions, "kernel": _by_kernel}
_p = primitive.make_matmul_primitive("activation_gradient", _abstract, _lowering, results=True)


def _bind(problem: ActivationGradient, implementation: str | None, *operands: jax.Array) -> Any:
    """The results by the primitive, or in the interpreter at once."""
    if implementation == "emulator":
        # Pallas' interpreter works by ordered callbacks, which no lowering rule can emit.
        return _WAYS[_by_kernels(problem)](implementation, problem, *operands)
    name = derivative.implementation_for(problem.product, implementation)
    return _p.bind(*operands, problem=problem, implementation=name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(problem: ActivationGradient, implementation: str | None, floats, rest):
    """The results as a function whose derivative is defined below: of floats, and of the rest."""
    products, scale, toward, w = floats
    used, *where = rest
    return tuple(_bind(problem, implementation, products, scale, used, toward, w, *where))


def _forward(problem, implementation, floats, rest):
    """The results, and what `_backward` needs of the operands."""
    return _differentiable(problem, implementation, floats, rest), (floats, rest)


def _backward(problem, implementation, kept, cts):
    """The cotangents of the operands, by the derivative of `_by_fusions`."""
    leaves, tree = jax.tree.flatten((cts, *kept))
    cts, floats, rest = jax.tree.unflatten(tree, vary_together(leaves))
    used, *where = rest

    def fusions(products, scale, toward, w):
        given = (products, scale, used, toward, w, *where)
        return tuple(_by_fusions(implementation, problem, *given))

    _, pull = jax.vjp(fusions, *floats)
    return pull(cts), tuple(None for _ in rest)


_differentiable.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames=("problem", "implementation"))
def run(
    operands: tuple[jax.Array, ...], *, problem: ActivationGradient, implementation: str | None
) -> tuple[jax.Array, ...]:
    """(dh `[P, 2 N]`, s a `[P, N]`, sums of g a float32 `[P]`); see `across_activation_kernel`.

    The kernels leave rows behind the blocks in use unspecified. Within these blocks, rows without a pair are
    zero in the first two.

    operands: products, scale (the weight of each row's pair), which rows hold one, those of the product.
    """
    products, scale, used, toward, w, *where = vary_together(list(operands))
    floats = (products, scale, toward, w)
    return _differentiable(problem, implementation, floats, (used, *where))
