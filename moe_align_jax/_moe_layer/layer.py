"""The layer itself: two grouped matrix multiplications and a weighted sum, of operands that were checked.

Its derivative keeps the first products alone, `[P, 2 N]`, and the operands.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moe_align_jax._grouped_matmul import (
    activation_gradient,
    derivative,
    reference,
    scaled,
    token_rows,
)
from moe_align_jax._grouped_matmul.problem import ActivationGradient, MatmulProblem
from moe_align_jax._grouped_matmul.spread import Spread
from moe_align_jax._lowering.ordering import complete_first
from moe_align_jax._lowering.sharding import vary_together
from moe_align_jax._masked_quant import casts
from moe_align_jax._moe_layer import token_sum
from moe_align_jax._moe_layer.combine import weighted_sum
from moe_align_jax._moe_layer.plan import LayerProblem, is_static

_I32, _F32 = jnp.int32, jnp.float32
# Names for the policies of `jax.checkpoint`.
PRODUCTS, RESULT = "fused_moe_gate_up", "fused_moe_out"
_AMAX_FLOOR = 1e-10  # of what lies between the products, as silu_and_mul_masked_quant has it


class Operands(NamedTuple):
    """Arrays of a layer; the legend is `LayerProblem`'s.

    Attributes:
        x: `[T, H]`.
        w_gate_up: one array, or gate and up.
        w_down: of the experts.
        bias_gate_up: float32 `[E, 2 N]` or `[E, N]`, or None.
        bias_down: float32 `[E, H]`, or None.
        topk_weights: float32 `[T, K]`.
        where: `[sorted_token_ids [P], expert_ids [B], num_tokens_post_padded [1]]`, int32.
        row_of_pair: int32 `[T K]`, -1 for dropped pairs.
        scales: of x, then of gate and up; none but for e4m3.
        down_scales: of w_down, or none.
    """

    x: jax.Array
    w_gate_up: tuple[jax.Array, ...]
    w_down: jax.Array
    bias_gate_up: jax.Array | None
    bias_down: jax.Array | None
    topk_weights: jax.Array
    where: tuple[jax.Array, jax.Array, jax.Array]
    row_of_pair: jax.Array
    scales: tuple[jax.Array, ...] = ()
    down_scales: tuple[jax.Array, ...] = ()


def blocks_of_pairs(
    expert_of_pair: jax.Array, experts: int
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """(`Operands.where`, `row_of_pair`) with block i for pair i: int32 `[n]`, outside `[0, experts)` for a
    dropped pair."""
    [n] = expert_of_pair.shape
    pair = lax.iota(_I32, n)
    count = jnp.full(1, n, _I32)
    there = (expert_of_pair >= 0) & (expert_of_pair < experts)
    return (pair, expert_of_pair, count), jnp.where(there, pair, -1)


@functools.partial(jax.jit, static_argnames=("problem", "implementation"))
def run(operands: Operands, *, problem: LayerProblem, implementation: str | None) -> jax.Array:
    """`[T, H]`. One cached trace per problem: repeated layers reuse it, and lower it once."""
    with jax.named_scope(problem.function):
        leaves, tree = jax.tree.flatten(operands)
        given = jax.tree.unflatten(tree, vary_together(leaves))
        if 0 in (problem.num_tokens, problem.top_k, problem.hidden):
            return _nothing(problem, given.x)
        row_of_pair = given.row_of_pair
        if problem.check_blocks:
            row_of_pair = _with_weights(problem, row_of_pair, given.where[1])
        rows = row_of_pair.reshape(problem.num_tokens, problem.top_k)
        x, scales = given.x, given.scales
        if problem.weights_on_input:
            with jax.named_scope("weights"):
                kept = jnp.where(rows >= 0, given.topk_weights, 0.0)
                x, scales = _weighted_input(problem, x, scales, kept)
            given = given._replace(topk_weights=jnp.ones_like(given.topk_weights))
        given = given._replace(x=x, scales=scales)
        if problem.scales:
            return _quantised(problem, implementation, given, rows)
        floats = Floats(
            given.x,
            given.w_gate_up,
            given.w_down,
            given.bias_gate_up,
            given.bias_down,
            given.topk_weights,
        )
        ids, experts, used = given.where
        where = Where(ids, experts, used, rows)
        return _differentiable(problem, implementation, floats, where)


def _quantised(
    problem: LayerProblem, implementation: str | None, given: Operands, rows: jax.Array
) -> jax.Array:
    """Of e4m3 operands, which have no derivative: what lies between the products is quantised again."""
    with jax.named_scope("gate_up"):
        first = (given.x, given.w_gate_up, given.bias_gate_up, given.scales)
        hidden = _multiply(problem.first, implementation, given, *first)
    hidden, of_hidden = casts.rowwise(
        hidden,
        given.where[2],
        scale_format="float32",
        scale_layout=problem.between_layout,
        floor=_AMAX_FLOOR,
        divide=False,
        implementation="xla" if implementation == "xla" else None,
    )
    with jax.named_scope("down"):
        second = (hidden, (given.w_down,), given.bias_down, (of_hidden, *given.down_scales))
        y = _multiply(problem.second, implementation, given, *second)
    with jax.named_scope("combine"):
        dtype = jnp.dtype(problem.out_dtype)
        return weighted_sum(dtype, y, given.topk_weights, rows)


def _multiply(
    problem: MatmulProblem,
    implementation: str | None,
    given: Operands,
    x: jax.Array,
    w: tuple[jax.Array, ...],
    bias: jax.Array | None,
    scales: tuple[jax.Array, ...],
) -> jax.Array:
    extras = () if bias is None else (bias,)
    operands = (x, *w, *extras, *scales, *given.where)
    return derivative.run(operands, problem=problem, implementation=implementation)


class Floats(NamedTuple):
    """The operands that have a derivative; x has a row per pair where the weights are on the input."""

    x: jax.Array
    w_gate_up: tuple[jax.Array, ...]
    w_down: jax.Array
    bias_gate_up: jax.Array | None
    bias_down: jax.Array | None
    topk_weights: jax.Array

    def cast(self, dtype: str) -> "Floats":
        """As they are multiplied: float32 weights in x's dtype."""
        first = tuple(w.astype(dtype) for w in self.w_gate_up)
        return self._replace(w_gate_up=first, w_down=self.w_down.astype(dtype))


class Where(NamedTuple):
    """Which rows are whose: `Operands.where`, and int32 `[T, K]`, the row of each pair or -1."""

    pair_of_row: jax.Array
    expert_ids: jax.Array
    num_rows: jax.Array
    row_of_pair: jax.Array

    @property
    def of_matmul(self) -> tuple[jax.Array, ...]:
        return self[:3]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(
    problem: LayerProblem, implementation: str | None, floats: Floats, where: Where
) -> jax.Array:
    given = floats.cast(problem.dtype)
    with jax.named_scope("gate_up"):
        extras = () if given.bias_gate_up is None else (given.bias_gate_up,)
        first, rows = problem.first_forward, where.of_matmul
        if first.inverse:
            rows = (*rows, where.row_of_pair)
        operands = (given.x, *given.w_gate_up, *extras, *rows)
        hidden = derivative.run(operands, problem=first, implementation=implementation)
    sums = problem.token_sum
    if sums is None or not token_sum.takes(sums):
        return _second_half(problem, implementation, given, where, hidden)
    with jax.named_scope("down"):
        extras = () if given.bias_down is None else (given.bias_down,)
        operands = (hidden, given.w_down, *extras, where.expert_ids, given.topk_weights)
        return token_sum.bind(sums, implementation, *operands)


def _second_half(
    problem: LayerProblem,
    implementation: str | None,
    given: Floats,
    where: Where,
    hidden: jax.Array,
) -> jax.Array:
    """From what lies between the products, `[P, N]`, to the result."""
    with jax.named_scope("down"):
        extras = () if given.bias_down is None else (given.bias_down,)
        operands = (hidden, given.w_down, *extras, *where.of_matmul)
        y = derivative.run(operands, problem=problem.second, implementation=implementation)
    with jax.named_scope("combine"):
        dtype = jnp.dtype(problem.out_dtype)
        return weighted_sum(dtype, y, given.topk_weights, where.row_of_pair)


def _forward(problem, implementation, floats: Floats, where: Where):
    """As without a derivative, but the first products are kept, rounded to x's dtype: the derivative needs
    neither what the activation made of them nor what the experts gave back."""
    given = floats.cast(problem.dtype)
    problem, where = _whole_blocks(problem, where)
    with jax.named_scope("gate_up"):
        operands = (given.x, given.w_gate_up, given.bias_gate_up, where.of_matmul)
        products = derivative.products(problem.first, implementation, *operands)
        products = checkpoint_name(products, PRODUCTS)
        hidden = _activated(problem, products).astype(problem.dtype)
    out = _second_half(problem, implementation, given, where, hidden)
    # The backward pass reads the products: not before the experts' results, `[P, H]`, are summed up.
    out, products = complete_first(out, products)
    return checkpoint_name(out, RESULT), (floats, where, products)


def _whole_blocks(problem: LayerProblem, where: Where) -> tuple[LayerProblem, Where]:
    """With rows for the whole of the last block, so that no array of rows is copied to get them."""
    spare = -problem.num_rows % problem.block_size
    if not is_static(problem.num_rows) or not spare:
        return problem, where
    pairs = problem.num_tokens * problem.top_k
    ids = jnp.pad(where.pair_of_row, (0, spare), constant_values=pairs)
    return problem._replace(num_rows=problem.num_rows + spare), where._replace(pair_of_row=ids)


def _activated(problem: LayerProblem, products: jax.Array) -> jax.Array:
    """float32 `[P, N]` of the first products."""
    every = jnp.ones(products.shape[0], bool)
    return reference.epilogue(problem.first, products.astype(_F32), every, None)


def _backward(problem, implementation, kept, ct):
    """The cotangents, each in its primal's dtype.

    With a = act(products), s the weight of a row's pair, and the result's cotangent d of its token:

        g = d @ w_down^T                the cotangent of s a
        w_down: (s a)^T d               ds = sum over N of g a
        dh = act'(products) of s g      w_gate_up: x^T dh
                                        x: dh @ w_gate_up^T, summed over a token's rows

    Rows of d, and those of x, are gathered by who reads them, or are first copied to the rows of the pairs,
    `[P, H]`: not both at once, nor beside the rows of x's cotangent.
    """
    floats, where, products = kept
    problem = problem._replace(num_rows=where.pair_of_row.shape[0])
    leaves, tree = jax.tree.flatten((ct, floats, where, products))
    ct, floats, where, products = jax.tree.unflatten(tree, vary_together(leaves))
    given = floats.cast(problem.dtype)
    first, second = problem.first, problem.second
    copies = None if implementation == "xla" else problem.copies
    wide = ct.astype(_F32)
    pair, used = where.pair_of_row, reference.row_mask(first, *where.of_matmul)
    toward = ct.astype(problem.dtype)
    # The scopes are those of the forward pass, so that a profile adds both up by stage.
    with jax.named_scope("combine"):
        # NaN weights of dropped pairs are selected away.
        share = jnp.where(where.row_of_pair >= 0, given.topk_weights, 0.0)
        scale = share.reshape(-1)[jnp.where(used, pair, 0)]
        scale = jnp.where(used, scale, 0.0)
    with jax.named_scope("down"):
        if copies:
            # Not before the experts' results of the forward pass are summed up.
            products, toward = complete_first(products, toward)
            toward = _rows_of_pairs(copies, implementation, toward, where)
        else:  # the rows are those of tokens
            second = second._replace(num_tokens=problem.num_tokens, top_k=problem.top_k)
        flipped = second.input_gradient._replace(num_tokens=second.num_tokens, top_k=second.top_k)
        across = ActivationGradient(flipped, first.weights)
        operands = (products, scale, used, toward, given.w_down, *where.of_matmul)
        rows, scaled_rows, of_row = activation_gradient.run(
            operands, problem=across, implementation=implementation
        )
        if given.bias_gate_up is not None:  # its gradient adds up all rows
            rows = jnp.where(used[:, None], rows, jnp.zeros_like(rows))
        args = (implementation, scaled_rows, toward, floats.w_down, where.of_matmul)
        d_down = derivative.weights_by_rows(second, *args)
        # The rows of d may be `[P, H]`, as those of dx are: they are read before there are any of dx.
        d_down, rows = complete_first(d_down, rows)
    with jax.named_scope("combine"):
        kept_pair = where.row_of_pair >= 0
        of_pair = of_row[jnp.where(kept_pair, where.row_of_pair, 0)]
        d_bias_down = None
        if given.bias_down is not None:
            at = lax.div(jnp.maximum(where.row_of_pair, 0), _I32(problem.block_size))
            expert = jnp.where(kept_pair, where.expert_ids[at], -1)
            every = lax.iota(_I32, problem.num_experts)[None, None]
            mine = expert[..., None] == every
            # A token without a pair may have a NaN cotangent, and an expert without one a NaN bias.
            wide = jnp.where(jnp.any(kept_pair, axis=1, keepdims=True), wide, 0.0)
            # `[T, E]` of each token: its bias' share of the weights' derivative, and its weight.
            toward_bias = jnp.dot(wide, given.bias_down.T, precision=lax.Precision.HIGHEST)
            of_pair += jnp.sum(jnp.where(mine, toward_bias[:, None, :], 0.0), axis=-1)
            weight_of = jnp.sum(jnp.where(mine, share[..., None], 0.0), axis=1)
            d_bias_down = jnp.dot(weight_of.T, wide, precision=lax.Precision.HIGHEST)
        d_weights = jnp.where(kept_pair, of_pair, 0.0)
    with jax.named_scope("gate_up"):
        args = (implementation, rows, given.w_gate_up, where.of_matmul)
        dx = derivative.input_rows(first, *args)
        row_of = where.row_of_pair.reshape(first.num_tokens, first.top_k)
        dx = derivative.sum_of_rows(dx, row_of, problem.dtype)
        dx, x = complete_first(dx, given.x)
        if copies:
            x, first = _rows_of_pairs(copies, implementation, x, where), first.permuted
        args = (implementation, x, rows, floats.w_gate_up, where.of_matmul)
        d_gate_up = derivative.weights(first, *args)
        d_bias = None
        if given.bias_gate_up is not None:
            d_bias = derivative.bias(first, rows, where.of_matmul)
    found = Floats(dx, tuple(d_gate_up), d_down, d_bias, d_bias_down, d_weights)
    return found, jax.tree.map(lambda _: None, where)


_differentiable.defvjp(_forward, _backward)


def _rows_of_pairs(
    copies: Spread, implementation: str | None, tokens: jax.Array, where: Where
) -> jax.Array:
    """`[P, H]`: each pair's row of tokens; those of no pair hold anything."""
    given = (tokens, where.row_of_pair, where.pair_of_row)
    return token_rows.run(*given, problem=copies, implementation=implementation)


def _with_weights(problem: LayerProblem, row: jax.Array, expert_ids: jax.Array) -> jax.Array:
    """row_of_pair, with -1 also where the block's expert has no weights here."""
    block = lax.div(jnp.maximum(row, 0), _I32(problem.block_size))
    expert = expert_ids[block]
    return jnp.where((expert >= 0) & (expert < problem.num_experts), row, -1)


def _weighted_input(
    problem: LayerProblem, x: jax.Array, scales: tuple[jax.Array, ...], weights: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """x times the weights, rounded: `[T, H]`, or for several pairs of a token a row for each of them.

    Of e4m3, the weights multiply the scales: nothing is rounded again.
    """
    rows = problem.num_tokens * problem.top_k
    if not problem.scales:
        product = x.astype(_F32)[:, None, :] * weights[..., None]
        return product.astype(x.dtype).reshape(rows, problem.hidden), scales
    as_given = problem.first._replace(num_tokens=problem.num_tokens, scales=problem.scales)
    of_tokens = scaled.of_rows(as_given, scales[0])
    of_pairs = of_tokens[:, None, :] * weights[..., None]
    of_pairs = of_pairs.reshape(rows, of_tokens.shape[1])
    return jnp.repeat(x, problem.top_k, axis=0), (of_pairs, *scales[1:])


def _nothing(problem: LayerProblem, x: jax.Array) -> Any:
    """No tokens, no experts of a token, or no columns. It varies over a shard_map's axes as x does."""
    zero = jnp.sum(x.reshape(-1)[:0]).astype(problem.out_dtype)
    return jnp.zeros((problem.num_tokens, problem.hidden), problem.out_dtype) + zero
