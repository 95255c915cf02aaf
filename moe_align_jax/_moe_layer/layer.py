"""The layer itself: two grouped matrix multiplications and a weighted sum, of operands that were checked."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._grouped_matmul import primitive, scaled
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._lowering.sharding import vary_together
from moe_align_jax._masked_quant import casts
from moe_align_jax._moe_layer.combine import weighted_sum
from moe_align_jax._moe_layer.plan import LayerProblem

_I32, _F32 = jnp.int32, jnp.float32
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


def blocks_of_pairs(expert_of_pair: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """(`Operands.where`, `row_of_pair`) with block i for pair i: int32 `[n]`, -1 for a dropped pair."""
    [n] = expert_of_pair.shape
    pair = lax.iota(_I32, n)
    count = jnp.full(1, n, _I32)
    return (pair, expert_of_pair, count), jnp.where(expert_of_pair >= 0, pair, -1)


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
        kept = rows >= 0
        weights, x, scales = given.topk_weights, given.x, given.scales
        if problem.weights_on_input:
            with jax.named_scope("weights"):
                x, scales = _weighted_input(problem, x, scales, jnp.where(kept, weights, 0.0))
            weights = jnp.ones_like(weights)
        with jax.named_scope("gate_up"):
            first = (x, given.w_gate_up, given.bias_gate_up, scales)
            hidden = _multiply(problem.first, implementation, given, *first)
        scales = given.down_scales
        if problem.scales:
            hidden, of_hidden = casts.rowwise(
                hidden,
                scale_format="float32",
                scale_layout=problem.between_layout,
                floor=_AMAX_FLOOR,
                divide=False,
            )
            scales = (of_hidden, *scales)
        with jax.named_scope("down"):
            second = (hidden, (given.w_down,), given.bias_down, scales)
            y = _multiply(problem.second, implementation, given, *second)
        with jax.named_scope("combine"):
            pair_of_row, _, num_rows = given.where
            dtype = jnp.dtype(problem.out_dtype)
            return weighted_sum(dtype, y, weights, rows, pair_of_row, num_rows)


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
    return primitive.run(operands, problem=problem, implementation=implementation)


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
