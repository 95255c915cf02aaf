"""Losses that keep a router's load even, and the update of DeepSeek-V3's bias, which needs no loss.

Functions of the router's logits and of the pairs that each expert got, which `fused_moe` returns. They carry
no coefficient: multiply them by the model's own, and add them to its loss.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_align_jax._align.arguments import narrow_count
from moe_align_jax._core import checks
from moe_align_jax._core.int32 import INT32_MAX
from moe_align_jax._grouped_matmul import arguments
from moe_align_jax._lowering.sharding import check_axis, vary_together
from moe_align_jax._moe_layer.arguments import check_tokens

_I32, _F32 = jnp.int32, jnp.float32
type _AxisName = str | tuple[str, ...]


def load_balancing_loss(
    logits: jax.Array,
    tokens_per_expert: jax.Array,
    *,
    scoring: Literal["softmax", "sigmoid"] = "softmax",
    num_valid_tokens: int | jax.Array | None = None,
    axis_name: _AxisName | None = None,
) -> jax.Array:
    """The load-balancing loss of Switch Transformer: `E * sum over e of f[e] * p[e]`.

    f[e] is the share of all pairs that expert e got, and p[e] the mean over tokens of the router's
    probability for e. It is 1 where both are even, and up to E where one expert gets everything. The gradient
    passes through p alone, since f is made of counts.

    Args:
        logits: `[T, E]` floating point, of the router; computed with in float32.
        tokens_per_expert: `[E]` integer or floating point: pairs of each expert. Those that the router chose,
            before any was dropped for capacity.
        scoring: "softmax", or "sigmoid" for scores that are divided by their sum, as DeepSeek-V3 has them.
            Static.
        num_valid_tokens: None, a Python int or a scalar integer array: tokens from this one on are not real.
        axis_name: inside `jax.shard_map`, the axes that the tokens are split over: the loss is that of all of
            them, the same on each device. None: of these tokens.

    Returns:
        float32 scalar; 0 without tokens or pairs.

    Raises:
        TypeError: a wrong dtype.   ValueError: shapes that do not fit, or an unknown scoring.

    Example:
        >>> float(load_balancing_loss(jnp.zeros((4, 2)), jnp.array([4, 4])))
        1.0
        >>> loss = load_balancing_loss(jnp.array([[8.0, 0.0]] * 3), jnp.array([6, 0]))
        >>> round(float(loss), 2)
        2.0

    In other libraries: transformers' `load_balancing_loss_func` is K times this, since its f adds up to K; so
    is that of Mixtral's paper. Megatron's is this one.

    Source: equation 4 of "Switch Transformers" (arXiv 2101.03961).
    """
    function = "load_balancing_loss"
    logits = _check_logits(function, logits)
    counts = _check_counts(function, tokens_per_expert, logits.shape[1], floats=True)
    _check_axis(function, axis_name)
    if not checks.is_one_of(scoring, ("softmax", "sigmoid")):
        rule, remedy = "be 'softmax' or 'sigmoid'", "Pass the router's own."
        raise ValueError(checks.message(function, "scoring", rule, checks.shown(scoring), remedy))
    real, number = _tokens(function, logits, num_valid_tokens)
    with jax.named_scope(function):
        # Rows that are not real may hold NaN, also in a derivative.
        wide = jnp.where(real[:, None], logits.astype(_F32), 0.0)
        if scoring == "softmax":
            scores = jax.nn.softmax(wide, axis=-1)
        else:
            scores = jax.nn.sigmoid(wide)
            scores = scores / jnp.maximum(jnp.sum(scores, axis=-1, keepdims=True), _F32(1e-15))
        total = jnp.sum(jnp.where(real[:, None], scores, 0.0), axis=0)
        counts = lax.stop_gradient(counts.astype(_F32))
        if axis_name is not None:
            total, counts, number = (_sum_over(x, axis_name) for x in (total, counts, number))
        pairs = jnp.sum(counts)
        share = counts / jnp.maximum(pairs, 1.0)
        mean = total / jnp.maximum(number, 1.0)
        return logits.shape[1] * jnp.sum(share * mean)


def router_z_loss(
    logits: jax.Array,
    *,
    num_valid_tokens: int | jax.Array | None = None,
    axis_name: _AxisName | None = None,
) -> jax.Array:
    """The z-loss of ST-MoE: the mean over tokens of `log(sum over e of exp(logits[t, e])) ** 2`.

    It keeps logits small, so that their rounding in bfloat16 does not change the choice of experts.

    Args:
        logits, num_valid_tokens, axis_name: as for `load_balancing_loss`.

    Returns:
        float32 scalar; 0 without tokens.

    Raises:
        TypeError, ValueError: as `load_balancing_loss`.

    Example:
        >>> round(float(router_z_loss(jnp.zeros((3, 4)))), 4)  # log(4) ** 2
        1.9218

    Source: equation 5 of "ST-MoE" (arXiv 2202.08906).
    """
    function = "router_z_loss"
    logits = _check_logits(function, logits)
    _check_axis(function, axis_name)
    real, number = _tokens(function, logits, num_valid_tokens)
    with jax.named_scope(function):
        wide = jnp.where(real[:, None], logits.astype(_F32), 0.0)
        z = jax.nn.logsumexp(wide, axis=-1)
        total = jnp.sum(jnp.where(real, z * z, 0.0))
        if axis_name is not None:
            total, number = (_sum_over(x, axis_name) for x in (total, number))
        return total / jnp.maximum(number, 1.0)


def update_router_bias(
    bias: jax.Array,
    tokens_per_expert: jax.Array,
    *,
    rate: float | jax.Array = 0.001,
    axis_name: _AxisName | None = None,
) -> jax.Array:
    """DeepSeek-V3's balancing without a loss: the router's bias moves by a step against each expert's load.

        bias[e] + rate where expert e got fewer pairs than the mean, - rate where it got more

    The bias steers the choice of experts alone (`correction_bias` of `route_topk`), not their weights. Call
    it once per training step, outside of what is differentiated: the bias is a state and not a parameter.

    Args:
        bias: `[E]` floating point.
        tokens_per_expert: `[E]` any integer dtype: pairs of each expert in this step.
        rate: of the step, a float or a float scalar; DeepSeek-V3 took 0.001, and 0 at the end.
        axis_name: inside `jax.shard_map`, the axes that the tokens are split over: the counts are added up
            over them. None: they are those of all tokens.

    Returns:
        `[E]` of bias' dtype. An expert with exactly the mean keeps its bias. The comparison is exact.

    Raises:
        TypeError: a wrong dtype, or no number.   ValueError: shapes that do not fit, or a rate that is not
            finite.

    Example:
        >>> update_router_bias(jnp.zeros(3), jnp.array([5, 3, 1]), rate=0.5).tolist()
        [-0.5, 0.0, 0.5]

    Source: "Auxiliary-Loss-Free Load Balancing" (arXiv 2408.15664); section 2.1.2 of DeepSeek-V3 (arXiv
    2412.19437).
    """
    function = "update_router_bias"
    bias = arguments.check_array(function, "bias", bias)
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        rule, remedy = "be a float array", "It is added to scores."
        raise TypeError(checks.message(function, "bias", rule, checks.describe(bias), remedy))
    if bias.ndim != 1:
        rule, remedy = "have shape [E]", "Call it for each layer, or with jax.vmap."
        raise ValueError(checks.message(function, "bias", rule, checks.describe(bias), remedy))
    counts = _check_counts(function, tokens_per_expert, bias.shape[0])
    rate = _check_rate(function, rate, bias.dtype)
    _check_axis(function, axis_name)
    with jax.named_scope(function):
        counts = counts.astype(_I32)
        if axis_name is not None:
            counts = _sum_over(counts, axis_name)
        experts = _I32(max(1, bias.shape[0]))
        # The mean as a whole part and a rest: the sum of the counts may not fit int32.
        rest = jnp.sum(lax.rem(counts, jnp.full_like(counts, experts)), dtype=_I32)
        whole = jnp.sum(lax.div(counts, jnp.full_like(counts, experts)), dtype=_I32)
        whole, rest = whole + lax.div(rest, experts), lax.rem(rest, experts)
        less = (counts < whole) | ((counts == whole) & (rest > 0))
        direction = jnp.where(counts > whole, -1.0, jnp.where(less, 1.0, 0.0)).astype(bias.dtype)
        return jnp.asarray(bias) + jnp.asarray(rate, bias.dtype) * direction


def _sum_over(x: jax.Array, axis_name: _AxisName) -> jax.Array:
    """Over the devices; a value that is the same on all of them counts once for each."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    return lax.psum(vary_together(x, *names), names)


def _check_axis(function: str, axis_name: Any) -> None:
    if axis_name is not None:
        remedy = "Call it inside jax.shard_map over that axis, or leave it out."
        check_axis(function, axis_name, remedy)


def _check_rate(function: str, rate: Any, of_bias: Any) -> Any:
    """A real number that is finite in the bias' dtype, or an array of one."""
    remedy = "Pass the step, e.g. 0.001."
    dtype: Any = getattr(rate, "dtype", None)
    array = checks.is_array(rate) or isinstance(rate, np.generic)
    real = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if array:
        kinds = (jnp.floating, jnp.integer)
        real = any(jnp.issubdtype(dtype, kind) for kind in kinds)
    if not real:
        got = checks.describe(rate)
        raise TypeError(checks.message(function, "rate", "be a real number", got, remedy))
    if array and np.shape(rate) != ():
        got = checks.describe(rate)
        raise ValueError(checks.message(function, "rate", "be a scalar", got, remedy))
    if not isinstance(rate, jax.Array):
        number: Any = np.asarray(rate).item() if array else rate
        most = float(jnp.finfo(of_bias).max)
        if not checks.is_finite(number) or abs(number) > most:
            got = number if isinstance(number, int) else str(rate)
            rule = f"be finite in {of_bias}, the bias' dtype"
            raise ValueError(checks.message(function, "rate", rule, got, remedy))
    return rate


def _check_logits(function: str, logits: Any) -> Any:
    logits = arguments.check_array(function, "logits", logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        rule, remedy = "be a float array", "Pass the router's logits, not its ids."
        raise TypeError(checks.message(function, "logits", rule, checks.describe(logits), remedy))
    if logits.ndim != 2 or not logits.shape[1]:
        rule, remedy = "have shape [T, E]", "Flatten the axes in front of the experts."
        raise ValueError(checks.message(function, "logits", rule, checks.describe(logits), remedy))
    return logits


def _check_counts(function: str, value: Any, experts: int, *, floats: bool = False) -> Any:
    argument = "tokens_per_expert"
    value = arguments.check_array(function, argument, value)
    kinds = (jnp.integer, jnp.floating) if floats else (jnp.integer,)
    if not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
        rule = f"be an integer{' or float' if floats else ''} array"
        remedy = "Pass the counts of fused_moe(..., return_tokens_per_expert=True)."
        raise TypeError(checks.message(function, argument, rule, checks.describe(value), remedy))
    if value.shape != (experts,):
        rule, remedy = f"have shape [{experts}]", "Pass one count for each expert of the router."
        raise ValueError(checks.message(function, argument, rule, checks.describe(value), remedy))
    kind = np.dtype(value.dtype) if jnp.issubdtype(value.dtype, jnp.integer) else None
    if kind is None or jnp.iinfo(kind).max <= INT32_MAX:
        return jnp.asarray(value)
    # Before jax narrows or wraps it.
    most = kind.type(INT32_MAX)
    if isinstance(value, np.ndarray):
        return jnp.asarray(np.clip(value, 0, most).astype(np.int32))
    return jnp.minimum(value, most).astype(_I32)


def _tokens(function: str, logits: Any, limit: Any) -> tuple[jax.Array, jax.Array]:
    """(`[T]` bool, which are real; how many, float32)."""
    tokens = logits.shape[0]
    if limit is None:
        return jnp.ones(tokens, bool), jnp.asarray(tokens, _F32)
    count = narrow_count(jnp.asarray(check_tokens(function, limit)))[0]
    real = lax.iota(_I32, tokens) < count
    return real, jnp.sum(real.astype(_F32))
