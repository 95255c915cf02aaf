"""MaxText's grouped matrix multiplication and its sparse MoE block, with MaxText's own arguments.

`from moe_align_jax.adapters import maxtext` stands where MaxText imports `maxtext.kernels.megablox.ops`:
`gmm` takes the arguments that MaxText passes, in its order, also inside its own `shard_map`.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from moe_align_jax import matmul, moe_layer, router
from moe_align_jax._core import checks
from moe_align_jax.types import Implementation

__all__ = ["gmm", "sparse_matmul"]

_SCORES = ("", "softmax", "sigmoid", "sqrtsoftplus")


def gmm(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    preferred_element_type: Any = jnp.float32,
    tiling: tuple[int, ...] = (128,) * 9,
    group_offset: jax.Array | int | None = None,
    existing_out: jax.Array | None = None,
    transpose_rhs: bool = False,
    interpret: bool | None = None,
    lhs_quantize_dtype: Any = None,
    rhs_quantize_dtype: Any = None,
    use_qwix_quantization: bool = False,
    use_tokamax_backend: bool = False,
    weight_gather_axes: list[tuple[str, int]] | None = None,
    lhs_vma_axes: tuple[str, ...] = (),
    rhs_vma_axes: tuple[str, ...] = (),
    qwix_rule: Any = None,
    use_manual_quantization: bool = False,
    use_gmm_v2: bool = False,
    use_gmm_v2_heuristic_tiling: bool = False,
    partial_sum: jax.Array | None = None,
) -> jax.Array:
    """`moe_align_jax.gmm` with the arguments of MaxText's own `gmm`, in their order.

    Args:
        lhs: `[m, k]` bfloat16, float16 or float32: the rows, group after group.
        rhs: `[g, k, n]` of lhs' dtype, or `[g, n, k]` with `transpose_rhs`.
        group_sizes: `[G]` any integer dtype, G >= g.
        preferred_element_type: the result's dtype, bfloat16, float16 or float32; None for lhs'. Static.
        group_offset: the group that `rhs[0]` belongs to, a scalar or `[1]`; None for 0. Rows of the groups
            that rhs has no matrix for are zero, or those of `existing_out`.
        existing_out: `[m, n]` of the result's dtype, as for `moe_align_jax.gmm`.
        transpose_rhs: see rhs. Static.
        partial_sum: `[m, n]` any float dtype, added to the product in float32. Not beside `existing_out`.
        tiling, interpret, use_tokamax_backend, use_gmm_v2, use_gmm_v2_heuristic_tiling, lhs_vma_axes,
            rhs_vma_axes: accepted and ignored. Tiles follow from the sizes, and jax knows which arrays vary
            over the axes of a mesh.
        lhs_quantize_dtype, rhs_quantize_dtype, use_qwix_quantization, qwix_rule, use_manual_quantization,
            weight_gather_axes: of quantised training, which is not done here: None, False or empty.

    Returns:
        `[m, n]`. Rows past the sum of `group_sizes` are zero (or of `existing_out`, or `partial_sum`).

    Raises:
        NotImplementedError: quantisation, or weights to be gathered, were asked for.
        TypeError, ValueError: as `moe_align_jax.ragged_dot`.

    Example:
        >>> from moe_align_jax.adapters import maxtext
        >>> lhs, rhs = jnp.ones((3, 2)), jnp.stack([jnp.eye(2), 5 * jnp.eye(2)])
        >>> maxtext.gmm(lhs, rhs, jnp.array([1, 1]), partial_sum=jnp.ones((3, 2))).tolist()
        [[2.0, 2.0], [6.0, 6.0], [1.0, 1.0]]

    Source: the contract of `maxtext.kernels.megablox.ops.gmm` (Apache-2.0, commit e591f30); no code taken.
    """
    function = "adapters.maxtext.gmm"
    if not isinstance(use_gmm_v2_heuristic_tiling, bool):
        # Earlier commits of MaxText have partial_sum in this place.
        rule, argument = "be True or False", "use_gmm_v2_heuristic_tiling"
        got, remedy = checks.describe(use_gmm_v2_heuristic_tiling), "Pass partial_sum by its name."
        raise TypeError(checks.message(function, argument, rule, got, remedy))
    del tiling, interpret, use_tokamax_backend, use_gmm_v2, lhs_vma_axes, rhs_vma_axes
    for argument, value in (
        ("lhs_quantize_dtype", lhs_quantize_dtype),
        ("rhs_quantize_dtype", rhs_quantize_dtype),
        ("use_qwix_quantization", _asked_for(use_qwix_quantization)),
        ("qwix_rule", qwix_rule),
        ("use_manual_quantization", _asked_for(use_manual_quantization)),
        ("weight_gather_axes", _asked_for(weight_gather_axes)),
    ):
        if value is not None:
            rule, remedy = "be left out", "Train without quantization: bfloat16 rows and weights."
            got = checks.describe(value)
            raise NotImplementedError(checks.message(function, argument, rule, got, remedy))
    if partial_sum is None:
        return matmul.gmm(
            lhs,
            rhs,
            group_sizes,
            preferred_element_type,
            group_offset=0 if group_offset is None else group_offset,
            existing_out=existing_out,
            transpose_rhs=transpose_rhs,
        )
    if existing_out is not None:
        rule, got = "be None beside partial_sum", checks.describe(existing_out)
        remedy = "Pass one of them."
        raise ValueError(checks.message(function, "existing_out", rule, got, remedy))

    def product(dtype: Any) -> jax.Array:
        return matmul.gmm(
            lhs,
            rhs,
            group_sizes,
            dtype,
            group_offset=0 if group_offset is None else group_offset,
            transpose_rhs=transpose_rhs,
        )

    out = product(jnp.float32)
    # Rounded once, behind the sum, to what the product alone would have.
    out_dtype = jax.eval_shape(lambda: product(preferred_element_type)).dtype
    got, remedy = checks.describe(partial_sum), "Pass the product of the other part of k."
    if not checks.is_array(partial_sum) or not jnp.issubdtype(partial_sum.dtype, jnp.floating):
        rule = "be a float array"
        raise TypeError(checks.message(function, "partial_sum", rule, got, remedy))
    if partial_sum.shape != out.shape:
        rule = f"have shape {list(out.shape)}"
        raise ValueError(checks.message(function, "partial_sum", rule, got, remedy))
    return (out + partial_sum.astype(jnp.float32)).astype(out_dtype)


def sparse_matmul(
    inputs: jax.Array,
    gate_logits: jax.Array,
    pre_bias_logits: jax.Array | None,
    w0_kernel: jax.Array,
    w1_kernel: jax.Array,
    wo_kernel: jax.Array,
    w0_bias: jax.Array | None = None,
    w1_bias: jax.Array | None = None,
    wo_bias: jax.Array | None = None,
    input_ids: jax.Array | None = None,
    *,
    num_experts_per_tok: int,
    norm_topk_prob: bool = False,
    routed_score_func: Literal["", "softmax", "sigmoid", "sqrtsoftplus"] = "",
    routed_scaling_factor: float = 1.0,
    n_routing_groups: int = -1,
    topk_routing_group: int = -1,
    load_balance_loss_weight: float = 0.0,
    routed_bias_update_rate: float = 0.0,
    activation: Literal["silu", "gelu", "gelu_tanh", "relu2"] = "silu",
    swiglu_limit: float | None = None,
    swiglu_alpha: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """MaxText's `RoutedMoE.sparse_matmul` as a function of arrays: routing, experts and the weighted sum.

    The positional arguments are the method's own. What it reads from `self.config` are keyword arguments,
    with the names of MaxText's configuration. On one device, or inside `jax.shard_map` with all experts on
    each; MaxText's own expert parallelism goes on with `gmm`, which it calls inside its `shard_map`.

    Args:
        inputs: `[batch, length, H]` bfloat16, float16 or float32.
        gate_logits: `[batch, length, E]` floating point: the gate's outputs, after its score function and
            with its bias, as MaxText's `GateLogit` returns them.
        pre_bias_logits: the scores before the bias (DeepSeek-V3: `GateLogit` returns them second), of which
            the weights are made; None for the other models, whose weights are the softmax of the chosen
            logits.
        w0_kernel, w1_kernel: gate and up, `[E, H, N]` floating point; used in inputs' dtype.
        wo_kernel: `[E, N, H]`.
        w0_bias, w1_bias, wo_bias: `[E, N]`, `[E, N]` and `[E, H]`, or None.
        input_ids: must be None: it belongs to hash routing.
        num_experts_per_tok: K. Static.
        norm_topk_prob: divide the softmax by its sum once more, which changes nothing but rounding; accepted
            for MaxText's sake. Static.
        routed_score_func: "", "softmax", "sigmoid" or "sqrtsoftplus". With `pre_bias_logits`: weights of the
            last two are divided by their sum. Static.
        routed_scaling_factor: of the weights, with `pre_bias_logits`. Static.
        n_routing_groups, topk_routing_group: with `pre_bias_logits`: choose among the best groups; -1 for no
            groups. Static.
        load_balance_loss_weight: 0 for no loss. Static.
        routed_bias_update_rate: 0 for no update of the gate's bias. Static.
        activation, swiglu_limit, swiglu_alpha: of the first product, as for `fused_moe` (GPT-OSS: 7.0 and
            1.702). Static.
        implementation: as for `fused_moe`. Static.

    Returns:
        The output `[batch, length, H]` of inputs' dtype; the load-balancing loss, a float32 scalar (0 without
        tokens), or None;
        the update to add to the gate's bias, `[E]` float32, or None.

    Raises:
        NotImplementedError: hash routing was asked for.
        TypeError, ValueError: a number of the configuration is none that float32 holds, K is above E,
            `routed_score_func` has another name; or as `fused_moe`.

    Example:
        >>> from moe_align_jax.adapters import maxtext
        >>> x, logits = jnp.ones((1, 3, 2)), jnp.array([[[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]]])
        >>> up, down = jnp.stack([jnp.eye(2)] * 2), jnp.stack([jnp.eye(2), 10 * jnp.eye(2)])
        >>> out, loss, update = maxtext.sparse_matmul(
        ...     x, logits, None, up, up, down, num_experts_per_tok=1, activation="relu2"
        ... )
        >>> out[0, :, 0].tolist(), loss, update
        ([1.0, 10.0, 1.0], None, None)

    Source: the contract of MaxText's `RoutedMoE.sparse_matmul` (Apache-2.0, August 2026); no code taken.
    """
    function = "adapters.maxtext.sparse_matmul"
    del norm_topk_prob
    if input_ids is not None:
        rule, remedy = "be None", "Hash routing is not done here: call fused_moe with the ids."
        got = checks.describe(input_ids)
        raise NotImplementedError(checks.message(function, "input_ids", rule, got, remedy))
    for argument, value in (("inputs", inputs), ("gate_logits", gate_logits)):
        if not checks.is_array(value):
            rule, remedy = "be a jax array", checks.array_remedy(value, "Pass what the block gets.")
            got = checks.describe(value)
            raise TypeError(checks.message(function, argument, rule, got, remedy))
        if value.ndim != 3:
            rule = f"have shape [batch, length, {'H' if argument == 'inputs' else 'E'}]"
            remedy = "Pass what the block gets, not flattened."
            got = checks.describe(value)
            raise ValueError(checks.message(function, argument, rule, got, remedy))
    if gate_logits.shape[:2] != inputs.shape[:2]:
        rule = f"have shape {checks.leading(inputs.shape[:2], 'E')}, as inputs has"
        got, remedy = checks.describe(gate_logits), "Pass the gate's outputs of these tokens."
        raise ValueError(checks.message(function, "gate_logits", rule, got, remedy))
    experts = gate_logits.shape[2]
    for argument, value in (
        ("w0_kernel", w0_kernel),
        ("w1_kernel", w1_kernel),
        ("wo_kernel", wo_kernel),
    ):
        if not checks.is_array(value) or not jnp.issubdtype(value.dtype, jnp.floating):
            rule, remedy = "be a float array", "Pass the kernels of all experts of the router."
            remedy, got = checks.array_remedy(value, remedy), checks.describe(value)
            raise TypeError(checks.message(function, argument, rule, got, remedy))
        if value.ndim != 3 or value.shape[0] != experts:
            rule = f"have 3 dimensions, of {experts} experts as gate_logits"
            remedy = "Pass the kernels of all experts of the router."
            got = checks.describe(value)
            raise ValueError(checks.message(function, argument, rule, got, remedy))
    top_k = checks.check_positive_int(
        function, "num_experts_per_tok", num_experts_per_tok, "Pass K, experts per token."
    )
    if top_k > experts:
        rule, remedy = f"be at most {experts}, the experts of gate_logits", "Pass the model's own."
        raise ValueError(checks.message(function, "num_experts_per_tok", rule, top_k, remedy))
    if not checks.is_one_of(routed_score_func, _SCORES):
        # Taken as no name, the weights of a sigmoid would not be divided by their sum.
        rule, got = f"be one of {', '.join(map(repr, _SCORES))}", checks.shown(routed_score_func)
        remedy = "Pass that of MaxText's configuration."
        raise ValueError(checks.message(function, "routed_score_func", rule, got, remedy))
    for argument, value in (
        ("routed_scaling_factor", routed_scaling_factor),
        ("load_balance_loss_weight", load_balance_loss_weight),
        ("routed_bias_update_rate", routed_bias_update_rate),
    ):
        _check_number(function, argument, value)
    factors = (routed_scaling_factor, load_balance_loss_weight, routed_bias_update_rate)
    scaling, loss_weight, rate = map(float, factors)  # jax takes no int beyond int32
    for argument, value in (
        ("n_routing_groups", n_routing_groups),
        ("topk_routing_group", topk_routing_group),
    ):
        checks.check_int(function, argument, value, -1, "Pass the model's own.")
    bias_gate_up = None
    if w0_bias is not None and w1_bias is not None:
        parts = (("w0_bias", w0_bias, w0_kernel), ("w1_bias", w1_bias, w1_kernel))
        biases = [_check_bias(function, *part, axis=2) for part in parts]
        # Each may have a dtype of its own, and jax may be configured to promote none.
        bias_gate_up = jnp.concatenate([bias.astype(jnp.float32) for bias in biases], axis=1)
    elif w0_bias is not None or w1_bias is not None:
        rule, got = "be there with w0_bias", "one of them"
        raise ValueError(checks.message(function, "w1_bias", rule, got, "Pass both, or none."))
    if wo_bias is not None:
        _check_bias(function, "wo_bias", wo_bias, wo_kernel, axis=2)
    with jax.named_scope("route"):
        flat = gate_logits.reshape(-1, experts)
        if pre_bias_logits is None:
            # The softmax of the chosen logits: what MaxText computes, and what a sum would divide by is 1.
            weights, ids = router.route_topk(
                flat, top_k=top_k, softmax_after_topk=True, implementation=implementation
            )
        else:
            scores = _check_scores(function, pre_bias_logits, gate_logits).reshape(-1, experts)
            kept = _check_groups(function, experts, top_k, n_routing_groups, topk_routing_group)
            weights, ids = _choose_by_scores(flat, scores, top_k, n_routing_groups, kept)
            if routed_score_func in ("sigmoid", "sqrtsoftplus"):
                weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
            weights = weights * scaling
    dtype = inputs.dtype
    out, counts = moe_layer.fused_moe(
        inputs.reshape(-1, inputs.shape[2]),
        (w0_kernel.astype(dtype), w1_kernel.astype(dtype)),
        wo_kernel.astype(dtype),
        weights,
        ids,
        activation=activation,
        swiglu_limit=swiglu_limit,
        swiglu_alpha=swiglu_alpha,
        bias_gate_up=bias_gate_up,
        bias_down=wo_bias,
        return_tokens_per_expert=True,
        implementation=implementation,
    )
    loss = update = None
    if loss_weight > 0:
        with jax.named_scope("load_balance_loss"):
            per_sequence = ids.reshape(*gate_logits.shape[:2], top_k)
            loss = _load_balance_loss(per_sequence, gate_logits) * loss_weight
    if rate > 0:
        mean = ids.size / experts
        update = jnp.sign(mean - counts.astype(jnp.float32)) * rate
    return out.reshape(inputs.shape), loss, update


def _asked_for(value: Any) -> Any:
    """None for what says no: None, False, and lists and tuples without elements. No array has a truth."""
    if value is None or value is False or isinstance(value, (list, tuple)) and not value:
        return None
    return value


def _check_bias(function: str, argument: str, bias: Any, kernel: Any, axis: int) -> Any:
    """`[E, columns]`: a value for each column of the kernel, which lie along its axis."""
    shape, remedy = (
        (kernel.shape[0], kernel.shape[axis]),
        "One value for each column of its kernel.",
    )
    if not checks.is_array(bias) or not jnp.issubdtype(bias.dtype, jnp.floating):
        got = checks.describe(bias)
        raise TypeError(checks.message(function, argument, "be a float array", got, remedy))
    if bias.shape != shape:
        rule, got = f"have shape {list(shape)}", checks.describe(bias)
        raise ValueError(checks.message(function, argument, rule, got, remedy))
    return bias


def _check_number(function: str, argument: str, value: Any) -> None:
    """That it is a static number which float32 holds."""
    numbers = (int, float, np.integer, np.floating)
    remedy = "Pass that of MaxText's configuration."
    if isinstance(value, bool) or not isinstance(value, numbers):
        rule, got = "be a static number", checks.describe(value)
        raise TypeError(checks.message(function, argument, rule, got, remedy))
    if not checks.is_finite_float32(value):
        raise ValueError(checks.message(function, argument, "be a finite float32", value, remedy))


def _check_scores(function: str, scores: Any, gate_logits: jax.Array) -> jax.Array:
    if not checks.is_array(scores) or not jnp.issubdtype(scores.dtype, jnp.floating):
        rule, remedy = "be a float array", "Pass both results of the gate."
        got = checks.describe(scores)
        raise TypeError(checks.message(function, "pre_bias_logits", rule, got, remedy))
    if scores.shape != gate_logits.shape:
        rule = f"have shape {list(gate_logits.shape)}, as gate_logits has"
        got, remedy = checks.describe(scores), "Pass both results of the gate."
        raise ValueError(checks.message(function, "pre_bias_logits", rule, got, remedy))
    return scores


def _check_groups(function: str, experts: int, top_k: int, groups: int, kept: int) -> int:
    """How many groups stay; whatever it is without groups."""
    if groups == -1:
        return -1
    if groups < 1 or experts % groups:
        rule, remedy = f"be -1 or a divisor of the {experts} experts", "Pass the model's own."
        raise ValueError(checks.message(function, "n_routing_groups", rule, groups, remedy))
    least = checks.cdiv(top_k, experts // groups)
    if not least <= kept <= groups:
        rule = f"be from {least} (for {top_k} experts per token) to {groups}, the number of groups"
        remedy = "Pass the model's own."
        raise ValueError(checks.message(function, "topk_routing_group", rule, kept, remedy))
    return kept


def _choose_by_scores(
    biased: jax.Array, scores: jax.Array, top_k: int, groups: int, kept: int
) -> tuple[jax.Array, jax.Array]:
    """The top_k of `biased`, of the best groups where there are any: their float32 scores, and their ids."""
    biased = jax.lax.stop_gradient(biased.astype(jnp.float32))
    if groups > 0:
        parts = biased.reshape(len(biased), groups, -1)
        best, _ = jax.lax.top_k(parts, min(2, parts.shape[2]))
        _, chosen = jax.lax.top_k(jnp.sum(best, axis=2), kept)
        stays = jnp.any(
            chosen[:, :, None] == jnp.arange(groups, dtype=jnp.int32)[None, None], axis=1
        )
        biased = jnp.where(stays[:, :, None], parts, -jnp.inf).reshape(biased.shape)
    _, ids = jax.lax.top_k(biased, top_k)
    return jnp.take_along_axis(scores.astype(jnp.float32), ids, axis=1), ids


def _load_balance_loss(ids: jax.Array, logits: jax.Array) -> jax.Array:
    """The mean over sequences of E times the sum over experts of its pairs per token times its mean share."""
    experts = logits.shape[2]
    if 0 in logits.shape:  # the mean of nothing is NaN
        return jnp.sum(logits.astype(jnp.float32))
    density = jnp.mean(jax.nn.one_hot(ids, experts, dtype=jnp.float32).sum(axis=2), axis=1)
    mean = jnp.mean(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), axis=1)
    return jnp.mean(density * mean) * experts**2
