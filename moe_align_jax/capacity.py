"""Capacity: the most pairs that an expert takes, and which are dropped beyond it.

Dropping stands in front of the layer, as a function of the router's ids and weights: a dropped pair has id
-1, which everything behind it leaves out. So one function serves `fused_moe`, `dispatch`, `grouped_matmul`
and a layer of one's own, and the kernels stay dropless.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_align_jax import block_align
from moe_align_jax._align.arguments import narrow_count, narrow_map
from moe_align_jax._core import checks
from moe_align_jax._core.int32 import INT32_MAX, narrow_on_host
from moe_align_jax._grouped_matmul import arguments
from moe_align_jax._lowering import export
from moe_align_jax._lowering.sharding import replicate
from moe_align_jax._moe_layer.arguments import check_tokens

_I32 = jnp.int32
DropRule = Literal["position", "choice", "weight"]
_RULES = ("position", "choice", "weight")


@export.register_namedtuple
class CappedPairs(NamedTuple):
    """What `drop_over_capacity` kept, and how much it did not.

    Attributes:
        topk_ids: int32 `[T, K]`: those given, -1 where a pair was dropped, or was none.
        tokens_per_expert: int32 `[E]`: pairs that each expert keeps, at most the capacity.
        dropped_per_expert: int32 `[E]`: pairs that each expert lost. The sum of both is what the router
            chose, for `load_balancing_loss` and `update_router_bias`.
    """

    topk_ids: jax.Array
    tokens_per_expert: jax.Array
    dropped_per_expert: jax.Array


def expert_capacity(
    num_tokens: int, *, top_k: int, num_experts: int, capacity_factor: float
) -> int:
    """Pairs that an expert takes: `ceil(T * K / E * capacity_factor)`, and one at the least.

    Args:
        num_tokens: T, >= 0.
        top_k: K.
        num_experts: E.
        capacity_factor: above 0: 1.0 is what an even load needs, 1.25 and 2.0 are usual.

    Returns:
        A Python int, at most 2**31 - 1.

    Raises:
        TypeError, ValueError: an argument is not a number, or is out of range.

    Example:
        >>> expert_capacity(4096, top_k=2, num_experts=64, capacity_factor=1.25)
        160

    Source: section 2.2 of "Switch Transformers" (arXiv 2101.03961); rounded up, as Megatron-Core does.
    """
    function, remedy = "expert_capacity", "Pass the shapes of topk_ids and of the weights."
    num_tokens = checks.check_int(function, "num_tokens", num_tokens, 0, remedy)
    top_k = checks.check_positive_int(function, "top_k", top_k, remedy)
    num_experts = checks.check_num_experts(function, num_experts)
    return _capacity(function, num_tokens * top_k, num_experts, capacity_factor)


def _capacity(function: str, pairs: int, num_experts: int, factor: float) -> int:
    argument, remedy = "capacity_factor", "Pass a Python float, for example 1.25."
    kinds = (int, float, np.integer, np.floating)
    if isinstance(factor, bool) or not isinstance(factor, kinds):
        got = checks.describe(factor)
        raise TypeError(checks.message(function, argument, "be a static number", got, remedy))
    if not checks.is_finite(factor) or factor <= 0:
        raise ValueError(
            checks.message(function, argument, "be above 0 and finite", factor, remedy)
        )
    if not isinstance(pairs, int):
        rule, got = "be left out where the number of tokens is symbolic", checks.describe(factor)
        raise ValueError(checks.message(function, argument, rule, got, "Pass capacity instead."))
    # A factor such as 1.1 is a float below or above it: exact products must not be rounded up by that.
    wanted = min(pairs * float(factor) / num_experts, float(INT32_MAX))
    nearest = round(wanted)
    most = nearest if abs(wanted - nearest) <= 1e-9 * max(1.0, wanted) else math.ceil(wanted)
    return min(max(1, most), INT32_MAX)


def drop_over_capacity(
    topk_ids: jax.Array | np.ndarray,
    topk_weights: jax.Array | None = None,
    *,
    num_experts: int,
    capacity_factor: float | None = None,
    capacity: int | None = None,
    drop: DropRule = "position",
    num_valid_tokens: int | jax.Array | None = None,
) -> CappedPairs:
    """Keeps at most a capacity of pairs for each expert, by giving the others the id -1.

    What is kept is the same in every run and on every platform. Weights are not changed: those of pairs that
    were dropped are not used by what follows, and have no gradient. A token that lost all of its experts gets
    zeros from the layer: what is left of it is the residual.

    Args:
        topk_ids: `[T, K]` any integer dtype; ids outside `[0, E)` are no pairs, and count nowhere.
        topk_weights: `[T, K]` floating point. Needed for drop="weight" alone.
        num_experts: E. Static.
        capacity_factor: the capacity is `expert_capacity(T, ...)`. Static.
        capacity: or the capacity itself. One of the two. Static.
        drop: who keeps a place where an expert has too many. Static.
            "position": the earlier token, as MaxText and Megatron-Core's "position" have it.
            "choice": the first choices of all tokens before any second choice, and so on; among them the
            earlier token, as GShard and Switch Transformer's successors have it.
            "weight": the greater weight, as V-MoE and Megatron-Core's "probs" have it; of equal ones the
            earlier pair. NaN comes last.
        num_valid_tokens: None, a Python int or a scalar integer array (a device value): tokens from this one
            on are no pairs. A capacity_factor counts all T tokens, since shapes are static.

    Returns:
        `CappedPairs`. Inside `jax.shard_map` each device drops among its own tokens.

    Raises:
        TypeError: a wrong dtype, or an option is not static.
        ValueError: shapes do not fit each other, or an option is out of range.

    Example:
        >>> ids = jnp.array([[0, 1], [0, 1], [0, 2]])
        >>> kept = drop_over_capacity(ids, num_experts=3, capacity=2)
        >>> kept.topk_ids.tolist(), kept.dropped_per_expert.tolist()
        ([[0, 1], [0, 1], [-1, 2]], [1, 0, 0])
        >>> weights = jnp.array([[0.1, 0.9], [0.6, 0.4], [0.7, 0.3]])
        >>> drop_over_capacity(ids, weights, num_experts=3, capacity=2, drop="weight").topk_ids.tolist()
        [[-1, 1], [0, 1], [0, 2]]

    Sources: the rules of "GShard" (arXiv 2006.16668), "Scaling Vision with Sparse Mixture of Experts"
    (arXiv 2106.05974) and Megatron-Core's `moe_token_drop_policy`; no code taken.
    """
    function = "drop_over_capacity"
    num_experts = checks.check_num_experts(function, num_experts)
    topk_ids = arguments.check_array(function, "topk_ids", topk_ids)
    if not jnp.issubdtype(topk_ids.dtype, jnp.integer):
        rule, remedy = "be an integer array", "Pass the ids that the router chose."
        got = checks.describe(topk_ids)
        raise TypeError(checks.message(function, "topk_ids", rule, got, remedy))
    if topk_ids.ndim != 2:
        rule, remedy = "have shape [T, K]", "Pass one row of ids per token."
        got = checks.describe(topk_ids)
        raise ValueError(checks.message(function, "topk_ids", rule, got, remedy))
    if not checks.is_one_of(drop, _RULES):
        rule, remedy = f"be one of {', '.join(map(repr, _RULES))}", "See its documentation."
        raise ValueError(checks.message(function, "drop", rule, checks.shown(drop), remedy))
    if (capacity is None) == (capacity_factor is None):
        rule = "be given, or capacity_factor, and not both"
        got = f"{checks.describe(capacity)} and {checks.describe(capacity_factor)}"
        raise ValueError(checks.message(function, "capacity", rule, got, "Pass one of them."))
    if capacity_factor is not None:
        capacity = _capacity(function, topk_ids.size, num_experts, capacity_factor)
    else:
        remedy = "Pass the most pairs of an expert."
        capacity = checks.check_positive_int(function, "capacity", capacity, remedy)
    if drop == "weight":
        if topk_weights is None:
            rule, remedy = 'be given for drop="weight"', "Pass the router's weights."
            raise ValueError(checks.message(function, "topk_weights", rule, "None", remedy))
        given = arguments.check_array(function, "topk_weights", topk_weights)
        if not jnp.issubdtype(given.dtype, jnp.floating):
            rule, remedy = "be a float array", "Pass the router's weights."
            got = checks.describe(given)
            raise TypeError(checks.message(function, "topk_weights", rule, got, remedy))
        if given.shape != topk_ids.shape:
            rule, remedy = f"have the shape of topk_ids, {list(topk_ids.shape)}", "One for each."
            got = checks.describe(given)
            raise ValueError(checks.message(function, "topk_weights", rule, got, remedy))
        topk_weights = lax.stop_gradient(jnp.asarray(given).astype(jnp.float32))
    limit = None
    if num_valid_tokens is not None:
        limit = check_tokens(function, num_valid_tokens)
    return _drop(
        jnp.asarray(narrow_on_host(topk_ids, num_experts)),
        topk_weights if drop == "weight" else None,
        None if limit is None else jnp.asarray(limit),
        num_experts=num_experts,
        capacity=capacity,
        drop=drop,
    )


@functools.partial(jax.jit, static_argnames=("num_experts", "capacity", "drop"))
def _drop(
    topk_ids: jax.Array,
    topk_weights: Any,
    limit: jax.Array | None,
    *,
    num_experts: int,
    capacity: int,
    drop: str,
) -> CappedPairs:
    with jax.named_scope("drop_over_capacity"):
        shape, pairs = topk_ids.shape, topk_ids.size
        if not pairs:
            none = jnp.zeros(num_experts, _I32)
            return CappedPairs(jnp.zeros(shape, _I32), none, none)
        ids = narrow_map(lax.reshape(replicate(topk_ids), (pairs,)), num_experts)
        ids = jnp.where((ids >= 0) & (ids < num_experts), ids, -1)
        if limit is not None:
            tokens = narrow_count(limit)[0]
            ids = jnp.where(lax.div(lax.iota(_I32, pairs), _I32(shape[1])) < tokens, ids, -1)
        order = None  # the pairs by who comes first
        if drop == "choice":
            order = lax.iota(_I32, pairs).reshape(shape).T.reshape(-1)
        elif drop == "weight":
            keys = -replicate(topk_weights).reshape(-1)
            order = jnp.argsort(keys, stable=True).astype(_I32)
        in_order = ids if order is None else ids[order]
        aligned = block_align.moe_align_block_size(
            in_order, block_size=1, num_experts=num_experts, return_inverse=True
        )
        chosen = aligned.tokens_per_expert
        first_row = jnp.cumsum(chosen, dtype=_I32) - chosen
        place = aligned.row_of_pair - first_row[jnp.maximum(in_order, 0)]
        kept = jnp.where(place < capacity, in_order, -1)
        if order is not None:
            kept = jnp.zeros_like(kept).at[order].set(kept, unique_indices=True)
        stay = jnp.minimum(chosen, capacity)
        return CappedPairs(kept.reshape(shape), stay, chosen - stay)
