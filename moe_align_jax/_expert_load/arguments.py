"""Checks of what `record_expert_load` is given, on static facts; every array becomes int32."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_align_jax._core import checks
from moe_align_jax._expert_load.ring import Layout
from moe_align_jax._lowering.sharding import replicate


def check_layer(function: str, layer: Any, num_layers: int) -> int:
    remedy = "Under lax.scan return the counts from the body, and record all layers with None."
    try:
        number = checks.index(layer)
    except TypeError:
        got = checks.describe(layer)
        raise TypeError(
            checks.message(function, "layer", "be a Python int or None", got, remedy)
        ) from None
    if not 0 <= number < num_layers:
        rule = f"be in [0, {num_layers})"
        raise ValueError(checks.message(function, "layer", rule, number, "Layers count from 0."))
    return number


def integers(function: str, argument: str, value: Any) -> jax.Array:
    """Any integer array as int32; 64-bit values are saturated, so that they stay out of range.

    It is gathered where it is split over Explicit mesh axes: it becomes part of a row.
    """
    remedy = {
        "tokens_per_expert": "Pass AlignedBlocks.tokens_per_expert.",
        "topk_ids": "Mode per_token records ids: pass the topk_ids that were aligned.",
        "physical_to_logical_map": "This state records one with every pass: pass that in force.",
    }.get(argument, "Pass integers.")
    kind: Any = getattr(value, "dtype", None)
    array = checks.is_array(value) or isinstance(value, np.generic)
    if not array or not jnp.issubdtype(kind, jnp.integer):
        got = "None" if value is None else checks.describe(value)
        rule = "be an integer array"
        if checks.package_of(value) == "torch":
            rule, got = "be an integer array of jax or NumPy", f"a torch.Tensor {got}"
            remedy = "Pass jax.dlpack.from_dlpack(tensor)."
        raise TypeError(checks.message(function, argument, rule, got, remedy))
    if value.dtype == np.int32:
        return replicate(jnp.asarray(value))
    own, words = jnp.iinfo(kind), np.iinfo(np.int32)
    low, high = (
        np.array(f(own_, word), value.dtype)
        for f, own_, word in ((max, own.min, words.min), (min, own.max, words.max))
    )
    clip: Any = np.clip if isinstance(value, (np.ndarray, np.generic)) else jnp.clip
    return replicate(jnp.asarray(clip(value, low, high).astype(np.int32)))


def _layer_shape(argument: str, layout: Layout) -> tuple[str, tuple[int | None, ...]]:
    if argument == "topk_ids":
        return f"[num_tokens, {layout.top_k}]", (None, layout.top_k)
    return f"[{layout.width}]", (layout.width,)


def check_layer_array(function: str, argument: str, value: Any, layout: Layout) -> jax.Array:
    array = integers(function, argument, value)
    text, shape = _layer_shape(argument, layout)
    if len(array.shape) != len(shape) or array.shape[-1] != shape[-1]:
        got, remedy = checks.describe(array), "It is the state's size of one layer."
        raise ValueError(checks.message(function, argument, f"have shape {text}", got, remedy))
    return array


def check_all_layers(function: str, argument: str, value: Any, layout: Layout) -> Any:
    """`[L, E]` as it is, otherwise a list of L arrays."""
    text, shape = _layer_shape(argument, layout)
    rule = f"be {layout.num_layers} arrays {text}, or one of them stacked"
    remedy = "One for each layer of init_expert_load."
    if isinstance(value, Sequence):
        if len(value) != layout.num_layers:
            raise ValueError(checks.message(function, argument, rule, len(value), remedy))
        return [check_layer_array(function, argument, one, layout) for one in value]
    array = integers(function, argument, value)
    wrong = len(array.shape) != len(shape) + 1 or array.shape[-1] != shape[-1]
    if wrong or array.shape[0] != layout.num_layers:
        got = checks.describe(array)
        raise ValueError(checks.message(function, argument, rule, got, remedy))
    return array if argument == "tokens_per_expert" else list(array)


def check_map(function: str, value: Any, layout: Layout) -> jax.Array:
    value = getattr(value, "physical_to_logical_map", value)
    array = integers(function, "physical_to_logical_map", value)
    shape = (layout.num_layers, layout.num_physical_experts)
    if array.shape != shape:
        rule, got = f"have shape {list(shape)}", checks.describe(array)
        remedy = "One row per layer, one column per physical expert."
        raise ValueError(checks.message(function, "physical_to_logical_map", rule, got, remedy))
    return array


def pass_id(function: str, value: Any) -> jax.Array:
    """A scalar as int32, modulo 2**32."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return jnp.asarray(np.uint32(int(value) & 0xFFFFFFFF).astype(np.int32))
    kind: Any = getattr(value, "dtype", None)
    if not checks.is_array(value) or not jnp.issubdtype(kind, jnp.integer):
        rule, remedy = "be a scalar integer or None", "None counts the passes."
        got = checks.describe(value)
        raise TypeError(checks.message(function, "forward_pass_id", rule, got, remedy))
    if value.size != 1:
        rule, got = "be a scalar", checks.describe(value)
        raise ValueError(checks.message(function, "forward_pass_id", rule, got, "One id per pass."))
    return jnp.asarray(value.astype(np.int32)).reshape(())
