"""Which implementation of the activation and quantisation runs: a primitive with a lowering per platform."""

import functools
import math
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax import lax
from jax.extend.core import Primitive

from moe_align_jax._core import checks
from moe_align_jax._lowering import select
from moe_align_jax._lowering.primitive import (
    batch_first,
    batch_size,
    make_primitive,
    result_like,
)
from moe_align_jax._lowering.sharding import divided_by_xla, on_each_shard
from moe_align_jax._masked_quant.problem import MaskedQuantProblem


def unsupported(problem: MaskedQuantProblem) -> str | None:
    """Why the kernel does not take this problem, or None."""
    from moe_align_jax._masked_quant import launch as kernels

    return kernels.unsupported(problem)


def _abstract(x, masked_m, *, problem: MaskedQuantProblem, implementation: str | None):
    """Shape and dtype of each result, for tracing."""
    del masked_m, implementation
    return [result_like(x, *result) for result in problem.outputs.values()]


def _implement(
    platform: str, ctx: Any, *, problem: MaskedQuantProblem, implementation: str | None
) -> Callable:
    """The function of the operands that quantises on this platform."""
    because = functools.partial(unsupported, problem)
    choice = select.choose(problem.name, platform, implementation, because)
    # A cast that XLA divides over devices stays with XLA.
    if not problem.activates and divided_by_xla(ctx):
        choice = "xla"
    if choice != "mosaic_gpu" or not math.prod(problem.outputs["q"][0]):  # nothing to launch for
        from moe_align_jax._masked_quant import reference

        call = reference.masked_quant if problem.activates else reference.without_activation
        return functools.partial(call, problem)
    from moe_align_jax._masked_quant import launch as kernels

    return functools.partial(kernels.run, problem)


def _batch(primitive: Primitive, operands: Any, dims: Any, **parameters: Any) -> list[jax.Array]:
    """A batch of problems is one problem with the experts of all."""
    call = functools.partial(_flat_batch, primitive, dims=dims, **parameters)
    return on_each_shard(call, operands, dims)


def _flat_batch(primitive: Primitive, *operands, dims, problem: MaskedQuantProblem, implementation):
    """The rule of vmap: the experts of a batch are the experts of one larger problem."""
    size = batch_size(operands, dims)
    flat = []
    for operand, dim in zip(operands, dims, strict=True):
        operand = batch_first(operand, dim, size)
        flat.append(lax.reshape(operand, (size * operand.shape[1], *operand.shape[2:])))
    experts = problem.num_experts
    problem = problem._replace(num_experts=size * experts)
    results = primitive.bind(*flat, problem=problem, implementation=implementation)
    return [lax.reshape(r, (size, experts, *r.shape[1:])) for r in results]


def _refuse_derivative(primitive: Any, primals: Any, tangents: Any, **parameters: Any) -> NoReturn:
    """Raises NotImplementedError: quantisation has no derivative."""
    del primitive, primals, tangents, parameters
    remedy = "Quantise what needs no gradient, or pass jax.lax.stop_gradient(x)."
    name = MaskedQuantProblem.name
    checks.fail(name, "x", "not be differentiated", "a tangent", remedy, NotImplementedError)


masked_quant_p = make_primitive(
    MaskedQuantProblem.name,
    abstract=_abstract,
    implement=_implement,
    batch=_batch,
    jvp=_refuse_derivative,
)
