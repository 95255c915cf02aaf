"""The primitives of the router: which implementation runs, their batches, and their derivative."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad

from moe_align_jax._align import primitive as align_primitive
from moe_align_jax._lowering import select
from moe_align_jax._lowering.primitive import (
    batch_first,
    batch_size,
    make_primitive,
    no_tangent,
    result_like,
)
from moe_align_jax._lowering.sharding import on_each_shard, vary_together
from moe_align_jax._router import reference
from moe_align_jax._router.problem import RouteProblem
from moe_align_jax.types import AlignProblem

_I32 = jnp.int32


def unsupported(problem: RouteProblem) -> str | None:
    """Why the kernel does not take this, or None."""
    sizes = (problem.num_tokens, problem.num_experts)
    if not all(isinstance(size, (int, np.integer)) for size in sizes):
        return "the kernels need static shapes; export a symbolic shape with 'xla'"
    from moe_align_jax._router import kernel

    return kernel.unsupported(problem)


def choose(function: str, problem: RouteProblem, platform: str, implementation: str | None) -> str:
    """The implementation of the router that runs.

    Raises:
        NotImplementedError: the named one cannot run.
    """
    return select.choose(
        function, platform, implementation, functools.partial(unsupported, problem)
    )


# -- running a program of the kernel language -------------------------------------------------------


def _flat(x: jax.Array) -> jax.Array:
    """As whole words."""
    x = lax.reshape(x, (x.size,))
    return jnp.pad(x, (0, 1)) if x.dtype.itemsize == 2 and x.size % 2 else x


def _run(program: Any, choice: str, dtypes: list[str], operands: tuple[jax.Array, ...]) -> Any:
    """The program's results, flat."""
    given = [_flat(x) for x in operands]
    if choice == "mosaic_gpu":
        from moe_align_jax._simt import mosaic

        return mosaic.run(program, given)
    from moe_align_jax._simt import emulator

    shapes = [{**program.inputs, **program.kernels[-1].outputs}[name] for name in program.results]

    def on_host(*arrays):
        words = [np.ascontiguousarray(a).view(np.int32) for a in arrays]
        results = emulator.run(program, words)
        return tuple(x.view(dtype) for x, dtype in zip(results, dtypes, strict=True))

    kinds = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    return jax.pure_callback(on_host, tuple(kinds), *given)


def _route(problem: RouteProblem, choice: str, *operands: jax.Array) -> Any:
    """`[weights, ids]` of a problem, each `[T, K]`, by the implementation `choice`."""
    if choice == "xla" or not problem.num_tokens:  # nothing to launch for
        return reference.route(problem, **dict(zip(problem.inputs, operands, strict=True)))
    from moe_align_jax._router import kernel

    dtypes = [dtype for _, dtype in problem.outputs.values()]
    results = _run(kernel.build(problem), choice, dtypes, operands)
    shape = (problem.num_tokens, problem.top_k)
    return [lax.reshape(x, shape) for x in results]


# -- the derivative ----------------------------------------------------------------------------------


def _weights_tangent(
    problem: RouteProblem, logits: jax.Array, tangent: jax.Array, topk_ids: jax.Array
) -> jax.Array:
    """The tangent of the weights, with the chosen ids as constants."""

    def weights(x):
        return reference.weights_of(problem, x, topk_ids)

    return jax.jvp(weights, (logits,), (tangent,))[1]


def _jvp(primitive: Primitive, primals: Any, tangents: Any, problem: RouteProblem, **params: Any):
    """Weights follow the logits; ids, and all that is aligned by them, do not move."""
    results = primitive.bind(*primals, problem=problem, **params)
    moved: list[Any] = [no_tangent(r) for r in results]
    if not isinstance(tangents[0], ad.Zero):
        moved[0] = _weights_tangent(problem, primals[0], tangents[0], results[1])
    return results, moved


# -- route_topk --------------------------------------------------------------------------------------


def _abstract(logits, *rest, problem: RouteProblem, implementation: str | None):
    """Shape and dtype of each result, for tracing."""
    del rest, implementation
    return [result_like(logits, *result) for result in problem.outputs.values()]


def _implement(
    platform: str, ctx: Any, *, problem: RouteProblem, implementation: str | None
) -> Callable:
    """The function of the operands that computes the router on this platform."""
    del ctx
    choice = choose(problem.name, problem, platform, implementation)
    return functools.partial(_route, problem, choice)


def _batch(primitive: Primitive, operands: Any, dims: Any, **parameters: Any) -> list[jax.Array]:
    """The rule of vmap: a batch's tokens are those of one longer problem, on each shard by itself."""
    call = functools.partial(_flat_batch, primitive, dims=dims, **parameters)
    return on_each_shard(call, operands, dims)


def _flat_batch(
    primitive: Primitive, *operands, dims, problem: RouteProblem, implementation: str | None
):
    """A batch is so many more tokens; a bound on the tokens of each becomes a mask of all."""
    size = batch_size(operands, dims)
    given = dict(zip(problem.inputs, zip(operands, dims, strict=True), strict=True))
    tokens = problem.num_tokens
    changed: dict[str, Any] = {"num_tokens": size * tokens}
    flat = [lax.reshape(batch_first(*given["logits"], size), (size * tokens, problem.num_experts))]
    if problem.bias_rows:
        bias, dim = given["correction_bias"]
        if dim is None and problem.bias_rows == 1:
            flat.append(bias)
        else:
            rows = size * problem.bias_rows
            flat.append(lax.reshape(batch_first(bias, dim, size), (rows, problem.num_experts)))
            changed["bias_rows"] = rows
    mask = None
    if problem.has_token_mask:
        mask = lax.reshape(batch_first(*given["token_mask"], size), (size, tokens)) != 0
    if problem.has_num_valid_tokens:
        bound = batch_first(*given["num_valid_tokens"], size)
        within = lax.broadcasted_iota(_I32, (size, tokens), 1) < bound
        mask = within if mask is None else mask & within
        changed |= {"has_num_valid_tokens": False, "has_token_mask": True}
    if mask is not None:
        flat.append(lax.reshape(mask.astype(_I32), (size * tokens,)))
    results = primitive.bind(
        *vary_together(flat),
        problem=problem._replace(**changed),
        implementation=implementation,
    )
    shape = (size, tokens, problem.top_k)
    return [lax.reshape(r, shape) for r in results]


route_p = make_primitive(
    "route_topk", abstract=_abstract, implement=_implement, batch=_batch, jvp=_jvp
)


# -- route_and_align -----------------------------------------------------------------------------------


def _fused_abstract(
    logits, *rest, problem: RouteProblem, align: AlignProblem, implementation: str | None
):
    """Shape and dtype of each result, for tracing."""
    del rest, implementation
    kinds = [*problem.outputs.values(), *((s, "int32") for s in align.outputs.values())]
    return [result_like(logits, *kind) for kind in kinds]


def _apart(
    problem: RouteProblem,
    align: AlignProblem,
    route_call: Callable,
    align_call: Callable,
    *operands: jax.Array,
) -> list[jax.Array]:
    """The router, then the alignment."""
    mine = len(problem.inputs)
    weights, ids = route_call(*operands[:mine])
    aligned = align_call(lax.reshape(ids, (align.num_pairs,)), *operands[mine:])
    return [weights, ids, *aligned]


def _fused(
    problem: RouteProblem, align: AlignProblem, choice: str, config: Any, *operands: jax.Array
) -> list[jax.Array]:
    """`[weights, ids, *alignment]` of one launch for both."""
    from moe_align_jax._router import fused

    program = fused.build(problem, align, config)
    dtypes = ["float32", *["int32"] * (len(program.results) - 1)]
    weights, ids, *aligned = _run(program, choice, dtypes, operands)
    shape = (problem.num_tokens, problem.top_k)
    return [lax.reshape(weights, shape), lax.reshape(ids, shape), *aligned]


def fused_config(problem: RouteProblem, align: AlignProblem, choice: str) -> Any:
    """How one launch does both, or None where it does not."""
    if choice == "xla":
        return None
    from moe_align_jax._router import fused

    return fused.config_for(problem, align)


def _implement_fused(
    platform: str,
    ctx: Any,
    *,
    problem: RouteProblem,
    align: AlignProblem,
    implementation: str | None,
) -> Callable:
    """The function of the operands that routes and aligns on this platform, in one launch where that is
    possible."""
    del ctx
    choice = choose("route_and_align", problem, platform, implementation)
    if config := fused_config(problem, align, choice):
        return functools.partial(_fused, problem, align, choice, config)
    # The alignment's kernels take more than the router's.
    aligning = select.choose("route_and_align", platform, implementation)
    if aligning == "mosaic_gpu":
        align_primitive.check_kernel_sizes(align, ())
    route_call = functools.partial(_route, problem, choice)
    return functools.partial(
        _apart, problem, align, route_call, align_primitive.call_of(aligning, align)
    )


def _batch_fused(
    primitive: Primitive,
    operands: Any,
    dims: Any,
    *,
    problem: RouteProblem,
    align: AlignProblem,
    implementation: str | None,
) -> list[jax.Array]:
    """Each row of a batch has an alignment of its own: the two apart."""
    del primitive
    route_call = functools.partial(route_p.bind, problem=problem, implementation=implementation)
    align_call = functools.partial(align_primitive.align, align, implementation)
    call = functools.partial(_apart, problem, align, route_call, align_call)
    return on_each_shard(jax.vmap(call, in_axes=tuple(dims)), operands, dims)


route_and_align_p = make_primitive(
    "route_and_align",
    abstract=_fused_abstract,
    implement=_implement_fused,
    batch=_batch_fused,
    jvp=_jvp,
)
