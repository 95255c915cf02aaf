"""Checks of fused_moe's arguments."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_align_jax._core import checks
from moe_align_jax._core.fp8 import GROUP
from moe_align_jax._grouped_matmul import arguments, quantized
from moe_align_jax._grouped_matmul.problem import E4M3, Scales, Weights


def check_experts(
    function: str, hidden: int, dtype: Any, w_gate_up: Any, w_down: Any, **options: Any
) -> tuple[Weights, tuple[Any, ...], Any, int]:
    """(How gate and up lie, their array or two, w_down, N): of shapes that fit each other and x."""
    pair = isinstance(w_gate_up, (tuple, list))
    weights = arguments.make_weights(function, pair=pair, **options)
    if pair and (len(w_gate_up) != 2 or not weights.gated):
        rule = "be an array or a pair (gate, up)" if weights.gated else "be one array"
        got = f"{type(w_gate_up).__name__} of {len(w_gate_up)}"
        remedy = "Pass gate and up." if weights.gated else "A pair needs a gated activation."
        checks.refuse(ValueError, function, "w_gate_up", rule, got, remedy)
    first = tuple(
        arguments.check_array(function, f"w_gate_up[{i}]" if pair else "w_gate_up", each)
        for i, each in enumerate(w_gate_up if pair else (w_gate_up,))
    )
    w_down = arguments.check_array(function, "w_down", w_down)
    named = [(f"w_gate_up[{i}]" if pair else "w_gate_up", each) for i, each in enumerate(first)]
    for name, each in [*named, ("w_down", w_down)]:
        if each.dtype not in (dtype, np.float32):
            rule = f"have the dtype of x, {dtype}, or float32"
            checks.refuse(TypeError, function, name, rule, each, "Cast one.")
    axes = (2, 1) if weights.transposed else (1, 2)
    columns = "2 N" if weights.gated and not pair else "N"
    shape = f"[E, {columns}, H]" if weights.transposed else f"[E, H, {columns}]"
    other = f"Pass transpose_rhs={not weights.transposed} where the other axis is H."
    if dtype == E4M3:
        other = arguments.TO_E4M3_LAYOUT
    for name, each in named:
        if each.ndim != 3 or each.shape[axes[0]] != hidden:
            checks.refuse(
                ValueError, function, name, f"have shape {shape} with H = {hidden}", each, other
            )
        if each.shape != first[0].shape:
            rule = f"have the shape of gate, {list(first[0].shape)}"
            checks.refuse(ValueError, function, name, rule, each, "Pass gate and up.")
    experts, width = first[0].shape[0], first[0].shape[axes[1]]
    if not experts:
        rule = "hold at least one expert"
        checks.refuse(
            ValueError, function, named[0][0], rule, first[0], "Pass this device's experts."
        )
    if weights.gated and not pair:
        if width % 2:
            rule = f"have shape {shape}"
            checks.refuse(
                ValueError, function, "w_gate_up", rule, first[0], "It holds gate and up."
            )
        width //= 2
    want = (experts, hidden, width) if weights.transposed else (experts, width, hidden)
    if w_down.shape != want:
        shape = "[E, H, N]" if weights.transposed else "[E, N, H]"
        rule = f"have shape {shape} = {list(want)}, as w_gate_up has"
        remedy = "Both follow transpose_rhs."
        found = w_down.shape[axes[0]] if w_down.ndim == 3 else 0
        if weights.gated and not pair and found == 2 * width:
            remedy = "w_gate_up holds gate and up, 2 N columns: pass gated=False for one matrix."
        elif not weights.gated and width == 2 * found:
            remedy = "w_gate_up holds gate and up only with gated=True and an activation."
        checks.refuse(ValueError, function, "w_down", rule, w_down, remedy)
    return weights, first, w_down, width


class Scaled(NamedTuple):
    """The scales of a layer's operands.

    Attributes:
        scales: how those of x, and of gate and up, lie; None where nothing is quantised.
        down: "tensor" or "blocks".
        arrays: of x, then of gate and up.
        down_arrays: of w_down.
    """

    scales: Scales | None
    down: str
    arrays: tuple[Any, ...]
    down_arrays: tuple[Any, ...]


def check_scales(
    function: str, x: Any, first: Any, w_down: Any, width: int, given: Any, layout: Any
) -> Scaled:
    """`given`: the scales of x, of gate and up, and of w_down, or None for each of them."""
    if given[0] is None:
        quantized.check_unused_layout(function, layout)
        return Scaled(None, "", (), ())
    scales, of_x = quantized.check_x_scales(function, given[0], x.shape[:1], x.shape[1], layout)
    names = [f"w_gate_up[{i}]" for i in range(2)] if len(first) == 2 else ["w_gate_up"]
    kind, of_first = quantized.check_w_scales(function, names, first, given[1])
    down, of_down = quantized.check_w_scales(function, ["w_down"], (w_down,), given[2])
    scales = scales._replace(w=kind)
    quantized.check_groups(function, "x", scales, x.shape[1])
    if width % GROUP:
        rule = f"have an N that is a multiple of {GROUP}: a scale belongs to as many columns"
        remedy = "Pad N with zeros in both weights: what lies between the products is quantised."
        checks.refuse(ValueError, function, "w_down", rule, f"N = {width}", remedy)
    return Scaled(scales, down, (of_x, *of_first), tuple(of_down))


def check_bias(function: str, argument: str, value: Any, shape: tuple[int, ...]) -> Any:
    """float32, or None."""
    if value is None:
        return None
    value = arguments.check_array(function, argument, value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        rule, remedy = "be a float array", "It is used as float32."
        checks.refuse(TypeError, function, argument, rule, value, remedy)
    if value.shape != shape:
        rule, remedy = f"have shape {list(shape)}", "One value for each column of the weights."
        checks.refuse(ValueError, function, argument, rule, value, remedy)
    return value.astype(np.float32)


def check_routing(function: str, x: Any, topk_weights: Any, topk_ids: Any) -> tuple[Any, Any]:
    """Both `[T, K]`."""
    if not checks.is_array(topk_ids) or not jnp.issubdtype(topk_ids.dtype, jnp.integer):
        remedy = "Pass the expert ids that top_k returned, not their weights."
        remedy = checks.array_remedy(topk_ids, remedy)
        checks.refuse(TypeError, function, "topk_ids", "be an integer array", topk_ids, remedy)
    if topk_ids.ndim != 2 or topk_ids.shape[0] != x.shape[0]:
        rule = f"have shape [T, K] with T = {x.shape[0]}, as x has"
        checks.refuse(
            ValueError, function, "topk_ids", rule, topk_ids, "Pass one row of ids per token."
        )
    topk_weights = arguments.check_array(function, "topk_weights", topk_weights)
    if not jnp.issubdtype(topk_weights.dtype, jnp.floating):
        rule, remedy = "be a float array", "Pass the weights that the router gave."
        checks.refuse(TypeError, function, "topk_weights", rule, topk_weights, remedy)
    if topk_weights.shape != topk_ids.shape:
        rule = f"have the shape of topk_ids, {list(topk_ids.shape)}"
        checks.refuse(
            ValueError, function, "topk_weights", rule, topk_weights, "One weight for each id."
        )
    return topk_weights.astype(np.float32), topk_ids


def check_tokens(function: str, value: Any) -> Any:
    """num_valid_tokens: an int32 scalar on the host, or an integer array of one value."""
    remedy = "Pass the number of tokens in use, as an int or a scalar integer array."
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return np.int32(min(max(int(value), 0), checks.INT32_MAX))
    if not checks.is_array(value) or not jnp.issubdtype(value.dtype, jnp.integer):
        checks.refuse(TypeError, function, "num_valid_tokens", "be an integer", value, remedy)
    if np.size(value) != 1:
        checks.refuse(ValueError, function, "num_valid_tokens", "be a scalar", value, remedy)
    if isinstance(value, np.ndarray):
        return np.int32(min(max(int(value.item()), 0), checks.INT32_MAX))
    return value
