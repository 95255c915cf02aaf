"""Moving rows by a kernel of our own where one runs, by XLA elsewhere: a lowering rule per platform.

The kernels stand in a program as custom calls, which XLA cannot split: where it divides a program over
devices by itself (a mesh's axes that are not manual), XLA's own way stays.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad

from moe_align_jax._layout import gathers, kernels
from moe_align_jax._lowering import select
from moe_align_jax._lowering.primitive import make_primitive, no_tangent, result_like
from moe_align_jax._lowering.sharding import divided_by_xla, explicitly_sharded, vary_together


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _make(name: str, abstract: Callable, reference: Callable, launch: Callable) -> Primitive:
    """A primitive with one parameter, `problem`: `reference(problem, *operands)` by XLA, or `launch`."""

    def implement(platform: str, ctx: Any, *, problem: Any) -> Callable:
        by_xla = select.kernels_unavailable(platform) or divided_by_xla(ctx)
        call = functools.partial(reference if by_xla else launch, problem)
        return lambda *operands: call(*vary_together(operands))

    def batch(primitive: Primitive, operands: Any, dims: Any, *, problem: Any) -> Any:
        del primitive
        return jax.vmap(functools.partial(reference, problem), in_axes=tuple(dims))(*operands)

    return make_primitive(
        name,
        abstract=abstract,
        implement=implement,
        batch=batch,
        jvp=functools.partial(_differentiate, reference),
    )


def _differentiate(reference: Callable, primitive: Primitive, primals, tangents, *, problem):
    """By XLA's gathers: a gradient of a gradient comes here, the rules of `rows` make the first."""
    results = primitive.bind(*primals, problem=problem)
    given = [
        jnp.zeros_like(x) if isinstance(t, ad.Zero) and _is_float(x) else t
        for x, t in zip(primals, tangents, strict=True)
    ]
    places = [k for k, x in enumerate(primals) if _is_float(x)]

    def of_floats(*floats):
        operands = list(primals)
        for k, x in zip(places, floats, strict=True):
            operands[k] = x
        return [r for r in reference(problem, *operands) if _is_float(r)]

    floats, directions = ([a[k] for k in places] for a in (primals, given))
    derivatives = iter(jax.jvp(of_floats, floats, directions)[1])
    return results, [next(derivatives) if _is_float(r) else no_tangent(r) for r in results]


# -- into the masked layout ------------------------------------------------------------------------


def _copy_abstract(topk_ids, order, place_of_pair, counts, *leaves, problem: kernels.MaskedCopy):
    del order, place_of_pair, counts
    boxes = (problem.num_experts, problem.rows_per_expert)
    layout = ((problem.num_experts,), topk_ids.shape, boxes)
    return [
        *(result_like(topk_ids, shape, jnp.int32) for shape in layout),
        *(result_like(leaf, (*boxes, *leaf.shape[1:]), leaf.dtype) for leaf in leaves),
    ]


def _copy_reference(problem: kernels.MaskedCopy, topk_ids, order, place_of_pair, counts, *leaves):
    layout = gathers.masked_layout(topk_ids, order, place_of_pair, counts, problem.rows_per_expert)
    _, row_of_pair, pair_of_row = layout
    boxes = pair_of_row.shape
    rows = (
        gathers.take(x, row_of_pair, pair_of_row.reshape(-1), problem.initialize) for x in leaves
    )
    return [
        *layout,
        *(row.reshape(*boxes, *x.shape[1:]) for row, x in zip(rows, leaves, strict=True)),
    ]


def _copy_launch(problem: kernels.MaskedCopy, topk_ids, order, place_of_pair, counts, *leaves):
    del order
    return kernels.run_copy(problem, topk_ids, place_of_pair, counts, *leaves)


_copy_p = _make("permute_to_masked", _copy_abstract, _copy_reference, _copy_launch)


def movable(leaves: list[jax.Array]) -> list[int]:
    """Which arrays' rows the kernel takes."""
    found = []
    for k, leaf in enumerate(leaves):
        if all(isinstance(size, int) for size in leaf.shape) and not explicitly_sharded(leaf):
            if kernels.movable(leaf.dtype.name, _row_bytes(leaf)):
                found.append(k)
    return found[: kernels.MAX_LEAVES]


def _row_bytes(leaf: jax.Array) -> int:
    return leaf.dtype.itemsize * math.prod(leaf.shape[1:])


def copy(
    indices: tuple[jax.Array, ...], leaves: list[jax.Array], rows_per_expert: int, initialize: bool
) -> list[jax.Array]:
    """`[*gathers.masked_layout(*indices, M), rows [e, M, ...] of each leaf]`, without a gradient.

    `leaves` are `movable`, and vary over a shard_map's axes at least as the ids do.
    """
    topk_ids, order, place_of_pair, counts = indices
    num_tokens, top_k = topk_ids.shape
    problem = kernels.MaskedCopy(
        num_tokens,
        top_k,
        counts.shape[0],
        rows_per_expert,
        initialize,
        tuple(kernels.Leaf(x.dtype.name, _row_bytes(x)) for x in leaves),
    )
    given = (order, place_of_pair, counts, *leaves)
    if kernels.copy_unsupported(problem) or explicitly_sharded(topk_ids):
        return _copy_reference(problem, topk_ids, *given)
    return _copy_p.bind(topk_ids.astype(jnp.int32), *given, problem=problem)


# -- back, as weighted sums ------------------------------------------------------------------------


def _sum_abstract(y, row_of_pair, *weights, problem: kernels.RowSum):
    del weights
    return [result_like(y, (row_of_pair.shape[0], *y.shape[1:]), problem.out_dtype)]


def _sum_reference(problem: kernels.RowSum, y, row_of_pair, *weights):
    total = gathers.weighted_sum(y, weights[0] if weights else None, row_of_pair)
    return [total.astype(problem.out_dtype)]


def _sum_launch(problem: kernels.RowSum, y, row_of_pair, *weights):
    return [kernels.run_sum(problem, y, row_of_pair, *weights)]


_sum_p = _make("sum_rows", _sum_abstract, _sum_reference, _sum_launch)


def weighted_sum(
    y: jax.Array, weights: jax.Array | None, row_of_pair: jax.Array, out_dtype: Any
) -> jax.Array:
    """`gathers.weighted_sum` in a dtype, without a gradient. All vary alike over a shard_map's axes."""
    given = (y, row_of_pair) if weights is None else (y, row_of_pair, weights)
    num_tokens, top_k = row_of_pair.shape
    problem = kernels.RowSum(
        num_tokens,
        top_k,
        y.shape[0],
        math.prod(y.shape[1:]),
        y.dtype.name,
        jnp.dtype(out_dtype).name,
        weights is not None,
    )
    if kernels.sum_unsupported(problem) or explicitly_sharded(*given):
        return _sum_reference(problem, *given)[0]
    if weights is not None:
        given = (y, row_of_pair, weights.astype(jnp.float32))
    return _sum_p.bind(*given, problem=problem)[0]
