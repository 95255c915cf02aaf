"""Grouped matrix multiplication with its derivative: products and weight gradients on the same rows.

    products' derivative    of the epilogue, row by row, from the products, which are computed again
    of x                    those times the weights, read the other way; a token's rows are summed in order
    of the weights          the rows of x times those, for each expert over its rows
    of bias, row weights    sums of them

Nothing is atomic, and nothing has an axis of experts beside one of rows. Rows that are not in use are left
out by selection, whatever they hold.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._core import checks
from moe_align_jax._grouped_matmul import config, primitive, reference, weight_gradient
from moe_align_jax._grouped_matmul.problem import MatmulProblem, WeightGradient, Weights
from moe_align_jax._lowering.sharding import vary_together

_I32, _F32 = jnp.int32, jnp.float32


def implementation_for(problem: MatmulProblem, implementation: str | None) -> str | None:
    """Of a product within a derivative: the named one, if it takes the sizes, which may be others."""
    if implementation in (None, "xla") or config.unsupported(problem) is None:
        return implementation
    return "xla"


def product(
    problem: MatmulProblem,
    implementation: str | None,
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    where: tuple[jax.Array, ...],
) -> jax.Array:
    """`[num_rows, n]` of a problem without activation and row weights."""
    operands = (x, w, *(() if bias is None else (bias,)), *where)
    name = implementation_for(problem, implementation)
    return run(operands, problem=problem, implementation=name)


def biases(problem: MatmulProblem, bias: jax.Array | None) -> list[jax.Array | None]:
    """Of each array of the weights."""
    if bias is None:
        return [None] * (1 + problem.weights.pair)
    return [bias[:, : problem.n], bias[:, problem.n :]] if problem.weights.pair else [bias]


def products(
    problem: MatmulProblem,
    implementation: str | None,
    x: jax.Array,
    w: tuple[jax.Array, ...],
    bias: jax.Array | None,
    where: tuple[jax.Array, ...],
) -> jax.Array:
    """`[num_rows, w_columns]` that the epilogue gets, in x's dtype; gate, then up, of a pair."""
    found = [
        product(problem.plain, implementation, x, each, own, where)
        for each, own in zip(w, biases(problem, bias), strict=True)
    ]
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=1)


def split(problem: MatmulProblem, rows: jax.Array) -> list[jax.Array]:
    """The columns of each array of the weights."""
    if not problem.weights.pair:
        return [rows]
    return [rows[:, : problem.n], rows[:, problem.n :]]


def input_rows(
    problem: MatmulProblem,
    implementation: str | None,
    rows: jax.Array,
    w: tuple[jax.Array, ...],
    where: tuple[jax.Array, ...],
) -> jax.Array:
    """`[num_rows, k]`: the derivative by each row of x, for that by each row of products."""
    flipped = problem.input_gradient
    found = [
        product(flipped, implementation, part, each, None, where)
        for part, each in zip(split(problem, rows), w, strict=True)
    ]
    if len(found) == 1:
        return found[0]
    return (found[0].astype(_F32) + found[1].astype(_F32)).astype(problem.dtype)


def weights(
    problem: MatmulProblem,
    implementation: str | None,
    x: jax.Array,
    rows: jax.Array,
    like: tuple[jax.Array, ...],
    where: tuple[jax.Array, ...],
) -> list[jax.Array]:
    """The derivative by each array of the weights, in its dtype, for that by each row of products."""
    return [
        _weights(problem, problem.weight_gradient, implementation, x, part, each, where)
        for part, each in zip(split(problem, rows), like, strict=True)
    ]


def weights_by_rows(
    problem: MatmulProblem,
    implementation: str | None,
    x: jax.Array,
    rows: jax.Array,
    like: jax.Array,
    where: tuple[jax.Array, ...],
) -> jax.Array:
    """`weights`, of one array, where x has a row for each row of products.

    problem: with num_tokens and top_k, `rows` are those of tokens.
    """
    gathered = "lhs" if problem.weights.transposed else "rhs"
    gradient = problem.weight_gradient._replace(gathered=gathered if problem.top_k else None)
    return _weights(problem, gradient, implementation, x, rows, like, where)


def _weights(
    problem: MatmulProblem,
    gradient: WeightGradient,
    implementation: str | None,
    x: jax.Array,
    rows: jax.Array,
    like: jax.Array,
    where: tuple[jax.Array, ...],
) -> jax.Array:
    """The gradient of the weights, in the dtype and layout of `like`."""
    layout = gradient.layout._replace(out_dtype=str(like.dtype))
    gradient = gradient._replace(layout=layout)
    operands = (rows, x) if problem.weights.transposed else (x, rows)
    name = weight_gradient.implementation_for(gradient, implementation)
    return run_weight_gradient((*operands, *where), problem=gradient, implementation=name)


def bias(problem: MatmulProblem, rows: jax.Array, where: tuple[jax.Array, ...]) -> jax.Array:
    """float32 `[E, w_columns]`: sums of each expert's rows, which are zero where they are not in use."""
    rows, experts, columns = rows.astype(_F32), problem.num_experts, rows.shape[1]
    if problem.rows == "masked":
        return jnp.sum(rows.reshape(experts, problem.max_rows, columns), axis=1)
    block, blocks = problem.block_size, problem.num_blocks
    spare = blocks * block - problem.num_rows
    rows = jnp.pad(rows, ((0, spare), (0, 0)))
    sums = jnp.sum(rows.reshape(blocks, block, columns), axis=1)
    # A product with ones and zeros: a scatter would add in any order.
    mine = where[1][None, :] == jnp.arange(experts, dtype=_I32)[:, None]
    return jnp.dot(mine.astype(_F32), sums, precision=lax.Precision.HIGHEST)


def row_of_pair(problem: MatmulProblem, used: jax.Array, ids: jax.Array) -> jax.Array:
    """`[num_tokens, top_k]` int32: the row of each pair, -1 for one without."""
    pairs = problem.num_tokens * problem.top_k
    row = jnp.arange(problem.num_rows, dtype=_I32)
    empty = jnp.full(pairs, -1, _I32)
    found = empty.at[jnp.where(used, ids, pairs)].set(row, mode="drop", unique_indices=True)
    return found.reshape(problem.num_tokens, problem.top_k)


def sum_of_rows(rows: jax.Array, row_of: jax.Array, dtype: Any) -> jax.Array:
    """`[T, .]`: for each token the sum of its rows, in order, in float32; -1 for none."""
    kept = row_of >= 0
    found = rows.at[jnp.where(kept, row_of, 0)].get(mode="promise_in_bounds").astype(_F32)
    return jnp.sum(jnp.where(kept[..., None], found, 0.0), axis=1).astype(dtype)


def backward(
    problem: MatmulProblem,
    implementation: str | None,
    floats: tuple[jax.Array, ...],
    where: tuple[jax.Array, ...],
    ct: jax.Array,
) -> tuple[tuple[jax.Array, ...], tuple[None, ...]]:
    """Cotangents of a product's floats, each in its primal's dtype, for the result's."""
    together = vary_together([ct, *floats, *where])
    ct, floats, where = (
        together[0],
        tuple(together[1 : 1 + len(floats)]),
        tuple(together[1 + len(floats) :]),
    )
    given = reference.named(problem, (*cast(problem, floats), *where))
    primal = floats[1 : 1 + len(given.w)]
    with jax.named_scope("derivative"):
        used = reference.row_mask(problem, *where)
        toward = jnp.where(used[:, None], ct, jnp.zeros_like(ct))
        scales: Any = None
        if problem.weights.activation is None and given.row_weights is None:
            rows = toward.astype(problem.dtype)
        else:
            found = products(problem, implementation, given.x, given.w, given.bias, where)
            found = jnp.where(used[:, None], found, jnp.zeros_like(found))

            def finish(parts, scales):
                return reference.epilogue_of_parts(problem, parts, used, scales)

            parts = tuple(part.astype(_F32) for part in reference.parts(problem, found))
            _, pull = jax.vjp(finish, parts, given.row_weights)
            parts, scales = pull(toward.astype(_F32))
            parts = tuple(part.astype(problem.dtype) for part in parts)
            rows = reference.columns_of_parts(problem, parts)
        dx = input_rows(problem, implementation, rows, given.w, where)
        if problem.top_k:
            dx = sum_of_rows(dx, row_of_pair(problem, used, where[0]), problem.dtype)
        else:
            dx = jnp.where(used[:, None], dx, jnp.zeros_like(dx))
        gradients = [dx, *weights(problem, implementation, given.x, rows, primal, where)]
        if given.bias is not None:
            gradients.append(bias(problem, rows, where))
        if given.row_weights is not None:
            gradients.append(scales)
    return tuple(gradients), tuple(None for _ in where)


# -- the product ------------------------------------------------------------------------------------


def cast(problem: MatmulProblem, floats: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The operands as they are multiplied: float32 weights in x's dtype."""
    wanted = [dtype for _, dtype in problem.inputs.values()][: problem.num_floats]
    return tuple(x.astype(dtype) for x, dtype in zip(floats, wanted, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(problem: MatmulProblem, implementation: str | None, floats, where):
    """The product as a function whose derivative is defined here: of floats, and of where rows belong."""
    return primitive.bind(problem, implementation, *cast(problem, floats), *where)


def _forward(problem, implementation, floats, where):
    """The product, and its operands for `_backward`. Raises NotImplementedError for e4m3."""
    if problem.scales:
        rule, remedy = "not be differentiated", "Train in bfloat16, or pass jax.lax.stop_gradient."
        rule = checks.message(problem.function, "e4m3 x", rule, "a tangent", remedy)
        raise NotImplementedError(rule)
    return _differentiable(problem, implementation, floats, where), (floats, where)


def _backward(problem, implementation, kept, ct):
    """The cotangents of the operands."""
    floats, where = kept
    if not problem.inverse:
        return backward(problem, implementation, floats, where, ct)
    problem = problem._replace(inverse=False)
    found, none = backward(problem, implementation, floats, where[:-1], ct)
    return found, (*none, None)


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
            primitive.choose(problem, "cpu", implementation)
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


# -- the weights' gradient, which has a derivative too ---------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable_gradient(problem: WeightGradient, implementation: str | None, floats, where):
    """The gradient of the weights as a function whose derivative is defined here."""
    return weight_gradient.bind(problem, implementation, *floats, *where)


def _gradient_forward(problem, implementation, floats, where):
    """The gradient of the weights, and its operands for the way back."""
    return _differentiable_gradient(problem, implementation, floats, where), (floats, where)


def _gradient_backward(problem, implementation, kept, ct):
    """Products of one operand's rows with the result's derivative, for the other's."""
    (lhs, rhs), where = kept
    layout = problem.layout
    ct, lhs, rhs, *where = vary_together([ct, lhs, rhs, *where])
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
        rows = product(toward, implementation, other, ct, None, tuple(where))
        if problem.gathered == name:
            of_pair = row_of_pair(layout, used, where[0])
            found.append(sum_of_rows(rows, of_pair, layout.dtype))
        else:
            found.append(jnp.where(used[:, None], rows, jnp.zeros_like(rows)))
    return tuple(found), tuple(None for _ in where)


_differentiable_gradient.defvjp(_gradient_forward, _gradient_backward)


@functools.partial(jax.jit, static_argnames=("problem", "implementation"))
def run_weight_gradient(
    operands: tuple[jax.Array, ...], *, problem: WeightGradient, implementation: str | None
) -> jax.Array:
    """`[E, k, n]` of `problem.inputs`; zeros for an expert without rows."""
    with jax.named_scope("weight_gradient"):
        lhs, rhs, *where = vary_together(list(operands))
        layout = problem.layout
        groups = layout.num_groups if layout.rows == "ragged" else 1
        if 0 in (*problem.out_shape, lhs.shape[0], rhs.shape[0], layout.num_rows, groups):
            zero = jnp.sum(lhs.reshape(-1)[:0]).astype(problem.layout.out_dtype)
            return jnp.zeros(problem.out_shape, problem.layout.out_dtype) + zero
        if implementation == "emulator":
            weight_gradient.choose(problem, "cpu", implementation)
        return _differentiable_gradient(problem, implementation, (lhs, rhs), tuple(where))
