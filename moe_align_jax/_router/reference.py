"""The router in plain jax.numpy: the specification, and what CPUs, TPUs and other GPUs run."""

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._router.problem import GIVEN_SCORES, GREATEST, SUM_FLOOR, RouteProblem

_F32, _I32 = jnp.float32, jnp.int32
# Below the key of every number: of an expert that is out of the choice.
_OUT = -(2**31)


def finite(problem: RouteProblem, logits: jax.Array) -> jax.Array:
    """The logits as float32: infinities as the greatest numbers of their dtype, a NaN as the least."""
    greatest = _F32(GREATEST[problem.dtype])
    x = logits.astype(_F32)
    return jnp.where(jnp.isnan(x), -greatest, jnp.clip(x, -greatest, greatest))


def _scores(problem: RouteProblem, x: jax.Array) -> jax.Array:
    """Of every expert, `[T, E]`."""
    if problem.scoring == "softmax":
        return jax.nn.softmax(x, axis=-1)
    return _elementwise(problem, x)


def _elementwise(problem: RouteProblem, x: jax.Array) -> jax.Array:
    """The score of each logit, but for softmax, whose scores depend on all logits of a token."""
    if problem.scoring == "sigmoid":
        return jax.nn.sigmoid(x)
    if problem.scoring == GIVEN_SCORES:
        return x
    # Its derivative at 0, where softplus underflows, is 0 and no NaN.
    y = jax.nn.softplus(x)
    above = y > 0
    return jnp.where(above, jnp.sqrt(jnp.where(above, y, _F32(1))), _F32(0))


def _keys(x: jax.Array) -> jax.Array:
    """int32 that are ordered as the float32 are: a NaN as -inf, both zeros alike."""
    x = jnp.where(jnp.isnan(x), -jnp.inf, jnp.where(x == 0, _F32(0), x))
    bits = lax.bitcast_convert_type(x, _I32)
    return jnp.where(bits < 0, bits ^ _I32(2**31 - 1), bits)


def _of_tokens(problem: RouteProblem, bias: jax.Array) -> jax.Array:
    """`[T, E]` of the rows of a bias."""
    each = problem.num_tokens // problem.bias_rows
    shape = (problem.bias_rows, each, problem.num_experts)
    bias = lax.broadcast_in_dim(bias, shape, (0, 2))
    return bias.reshape(problem.num_tokens, problem.num_experts)


def _within_groups(problem: RouteProblem, choice: jax.Array, keys: jax.Array) -> jax.Array:
    """The keys, with those of the groups that do not stay out of the choice."""
    groups, size = problem.num_groups, problem.group_size
    shape = (problem.num_tokens, groups, size)
    if problem.bias_rows:
        best, _ = lax.top_k(choice.reshape(shape), min(2, size))
        group_keys = _keys(jnp.sum(best, axis=-1))
    else:
        group_keys = jnp.max(keys.reshape(shape), axis=-1)
    _, kept = lax.top_k(group_keys, problem.topk_groups)
    number = lax.broadcasted_iota(_I32, (1, 1, groups), 2)
    stays = jnp.any(kept[:, :, None] == number, axis=1)
    stays = lax.broadcast_in_dim(stays, shape, (0, 1)).reshape(keys.shape)
    return jnp.where(stays, keys, _I32(_OUT))


def choose(problem: RouteProblem, logits: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`[T, K]` the chosen experts."""
    x = finite(problem, logits)
    choice = x if problem.by_logits else _scores(problem, x)
    if bias is not None:
        choice = choice + _of_tokens(problem, bias)
        choice = jnp.where(jnp.isnan(choice), -jnp.inf, choice)
    keys = _keys(choice)
    if problem.limits_groups:
        keys = _within_groups(problem, choice, keys)
    # Of equal ones the lowest index comes first.
    return lax.top_k(keys, problem.top_k)[1].astype(_I32)


def _floored_sum(x: jax.Array) -> jax.Array:
    """The sums that weights are divided by, `[T, 1]`: never 0."""
    return jnp.sum(x, axis=-1, keepdims=True) + _F32(SUM_FLOOR)


@jax.custom_jvp
def _normalized(x: jax.Array) -> jax.Array:
    """Divided by the sum."""
    return x / _floored_sum(x)


@_normalized.defjvp
def _normalized_jvp(primals, tangents):
    """The derivative of `_normalized`."""
    # Without the square of the sum, which is 0 in float32 where all are about 0.
    [x], [moved] = primals, tangents
    y, total = _normalized(x), _floored_sum(x)
    return y, (moved - y * jnp.sum(moved, axis=-1, keepdims=True)) / total


def weights_of(problem: RouteProblem, logits: jax.Array, topk_ids: jax.Array) -> jax.Array:
    """`[T, K]` the weights of chosen experts (0 where the id is -1): differentiable in the logits."""
    x = finite(problem, logits)
    chosen = jnp.take_along_axis(x, jnp.maximum(topk_ids, 0), axis=-1)
    if problem.over_chosen:
        weights = jax.nn.softmax(chosen, axis=-1)
    elif problem.scoring == "softmax":
        greatest = lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
        total = jnp.sum(jnp.exp(x - greatest), axis=-1, keepdims=True)
        weights = jnp.exp(chosen - greatest) / total
    else:
        weights = _elementwise(problem, chosen)
        if problem.renormalize:
            weights = _normalized(weights)
    if problem.scaling_factor != 1:
        weights = weights * _F32(problem.scaling_factor)
    return jnp.where(topk_ids >= 0, weights, _F32(0))


def real_tokens(
    problem: RouteProblem, token_mask: jax.Array | None, num_valid_tokens: jax.Array | None
) -> jax.Array | None:
    """`[T]` bool, or None where all are."""
    real = None
    if token_mask is not None:
        real = token_mask != 0
    if num_valid_tokens is not None:
        within = jnp.arange(problem.num_tokens, dtype=_I32) < num_valid_tokens
        real = within if real is None else real & within
    return real


def route(problem: RouteProblem, **operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The results of `problem.outputs`, in order."""
    logits = operands["logits"]
    topk_ids = choose(problem, logits, operands.get("correction_bias"))
    real = real_tokens(problem, operands.get("token_mask"), operands.get("num_valid_tokens"))
    if real is not None:
        topk_ids = jnp.where(real[:, None], topk_ids, _I32(-1))
    return weights_of(problem, logits, topk_ids), topk_ids
