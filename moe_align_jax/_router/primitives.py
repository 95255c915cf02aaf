"""The primitives of the router: which implementation runs, their batches, and their derivative."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from moe_align_jax._lowering import select
from moe_align_jax._router import reference
from moe_align_jax._router.problem import RouteProblem
from moe_align_jax.types import AlignProblem

_I32 = jnp.int32


def unavailable(problem: RouteProblem, implementation: str, platform: str) -> str | None:
    """Why a named implementation cannot run this for `platform`, or None."""
    if reason := select._unavailable(implementation, platform):
        return reason
    if implementation == "xla":
        return None
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
    if implementation is None:
        return "xla" if unavailable(problem, "mosaic_gpu", platform) else "mosaic_gpu"
    if reason := unavailable(problem, implementation, platform):
        raise select._not_implemented(function, implementation, reason)
    return implementation


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
    if choice == "xla" or not problem.num_tokens:  # nothing to launch for
        return reference.route(problem, **dict(zip(problem.inputs, operands, strict=True)))
    from moe_align_jax._router import kernel

    dtypes = [dtype for _, dtype in problem.outputs.values()]
    results = _run(kernel.build(problem), choice, dtypes, operands)
    shape = (problem.num_tokens, problem.top_k)
    return [lax.reshape(x, shape) for x in results]


def _align(problem: AlignProblem, choice: str, *operands: jax.Array) -> Any:
    if choice == "xla":
        return select._reference_call(problem, *operands)
    if choice == "mosaic_gpu":
        return select._kernel_call(problem, False, *operands)
    return select._emulator_call(problem, (False,) * len(operands), *operands)


# -- the derivative ----------------------------------------------------------------------------------


def _weights_tangent(
    problem: RouteProblem, logits: jax.Array, tangent: jax.Array, topk_ids: jax.Array
) -> jax.Array:
    def weights(x):
        return reference.weights_of(problem, x, topk_ids)

    return jax.jvp(weights, (logits,), (tangent,))[1]


def _jvp(primitive: Primitive, primals: Any, tangents: Any, problem: RouteProblem, **params: Any):
    """Weights follow the logits; ids, and all that is aligned by them, do not move."""
    results = primitive.bind(*primals, problem=problem, **params)
    moved: list[Any] = [select.no_tangent(r) for r in results]
    if not isinstance(tangents[0], ad.Zero):
        moved[0] = _weights_tangent(problem, primals[0], tangents[0], results[1])
    return results, moved


# -- route_topk --------------------------------------------------------------------------------------

route_p = Primitive("route_topk")
route_p.multiple_results = True


@route_p.def_abstract_eval
def _route_abstract(logits, *rest, problem: RouteProblem, implementation: str | None):
    del rest, implementation
    return [select.result_like(logits, *result) for result in problem.outputs.values()]


route_p.def_impl(functools.partial(select.run_eagerly, route_p))


def _lower_route(platform: str, ctx, *operands, problem: RouteProblem, implementation):
    choice = choose(problem.name, problem, platform, implementation)
    call = functools.partial(_route, problem, choice)
    return mlir.lower_fun(call, multiple_results=True)(ctx, *operands)


def _leading(operand: jax.Array, dim: int | None, size: int) -> jax.Array:
    """With the batch as its first axis."""
    return lax.broadcast(operand, (size,)) if dim is None else jnp.moveaxis(operand, dim, 0)


def _batch_route(operands, dims, *, problem: RouteProblem, implementation):
    call = functools.partial(_flat_batch, dims=dims, problem=problem, implementation=implementation)
    results = select.on_each_shard(call, operands, dims)
    return results, [0] * len(results)


def _flat_batch(*operands, dims, problem: RouteProblem, implementation):
    """A batch is so many more tokens; a bound on the tokens of each becomes a mask of all."""
    [size] = {a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None}
    given = dict(zip(problem.inputs, zip(operands, dims, strict=True), strict=True))
    tokens = problem.num_tokens
    changed: dict[str, Any] = {"num_tokens": size * tokens}
    flat = [lax.reshape(_leading(*given["logits"], size), (size * tokens, problem.num_experts))]
    if problem.bias_rows:
        bias, dim = given["correction_bias"]
        if dim is None and problem.bias_rows == 1:
            flat.append(bias)
        else:
            rows = size * problem.bias_rows
            flat.append(lax.reshape(_leading(bias, dim, size), (rows, problem.num_experts)))
            changed["bias_rows"] = rows
    mask = None
    if problem.has_token_mask:
        mask = lax.reshape(_leading(*given["token_mask"], size), (size, tokens)) != 0
    if problem.has_num_valid_tokens:
        bound = _leading(*given["num_valid_tokens"], size)
        within = lax.broadcasted_iota(_I32, (size, tokens), 1) < bound
        mask = within if mask is None else mask & within
        changed |= {"has_num_valid_tokens": False, "has_token_mask": True}
    if mask is not None:
        flat.append(lax.reshape(mask.astype(_I32), (size * tokens,)))
    results = route_p.bind(
        *select._vary_together(flat),
        problem=problem._replace(**changed),
        implementation=implementation,
    )
    shape = (size, tokens, problem.top_k)
    return [lax.reshape(r, shape) for r in results]


# -- route_and_align -----------------------------------------------------------------------------------

route_and_align_p = Primitive("route_and_align")
route_and_align_p.multiple_results = True


@route_and_align_p.def_abstract_eval
def _fused_abstract(
    logits, *rest, problem: RouteProblem, align: AlignProblem, implementation: str | None
):
    del rest, implementation
    kinds = [*problem.outputs.values(), *((s, "int32") for s in align.outputs.values())]
    return [select.result_like(logits, *kind) for kind in kinds]


route_and_align_p.def_impl(functools.partial(select.run_eagerly, route_and_align_p))


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


def _lower_fused(
    platform: str, ctx, *operands, problem: RouteProblem, align: AlignProblem, implementation
):
    choice = choose("route_and_align", problem, platform, implementation)
    if config := fused_config(problem, align, choice):
        call = functools.partial(_fused, problem, align, choice, config)
    else:
        # The alignment's kernels take more than the router's.
        aligning = select._choose(platform, implementation)
        call = functools.partial(
            _apart,
            problem,
            align,
            functools.partial(_route, problem, choice),
            functools.partial(_align, align, aligning),
        )
    return mlir.lower_fun(call, multiple_results=True)(ctx, *operands)


def _batch_fused(operands, dims, *, problem: RouteProblem, align: AlignProblem, implementation):
    """Each row of a batch has an alignment of its own: the two apart."""
    route_call = functools.partial(route_p.bind, problem=problem, implementation=implementation)
    align_call = functools.partial(select.align, align, implementation)
    call = functools.partial(_apart, problem, align, route_call, align_call)
    batched = jax.vmap(call, in_axes=tuple(dims))
    results = select.on_each_shard(batched, operands, dims)
    return results, [0] * len(results)


for _primitive, _lower, _batch in (
    (route_p, _lower_route, _batch_route),
    (route_and_align_p, _lower_fused, _batch_fused),
):
    for _platform in select.PLATFORMS:
        mlir.register_lowering(_primitive, functools.partial(_lower, _platform), platform=_platform)
    mlir.register_lowering(_primitive, functools.partial(_lower, "another platform"))
    batching.primitive_batchers[_primitive] = _batch
    ad.primitive_jvps[_primitive] = functools.partial(_jvp, _primitive)
