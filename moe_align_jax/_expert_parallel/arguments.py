"""Checks of the arguments of dispatch, combine and the layouts: static facts only."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_align_jax._align.arguments import check_count, check_integer_array, narrow_count
from moe_align_jax._core import checks
from moe_align_jax._expert_parallel import message
from moe_align_jax._lowering import select

_I32 = jnp.int32
_PAYLOADS = ("bfloat16", "float16", "float32", "float64")


def check_ids(function: str, topk_ids: Any) -> Any:
    """`[T, K]` integers."""
    remedy = "Pass the expert ids that top_k returned, [num_tokens, top_k]."
    ids = check_integer_array(function, "topk_ids", topk_ids, remedy)
    if ids.ndim != 2:
        rule, got = "have two dimensions", checks.describe(ids)
        raise ValueError(checks.message(function, "topk_ids", rule, got, remedy))
    return ids


def check_rows(
    function: str,
    argument: str,
    tree: Any,
    shape: tuple[int, ...],
    remedy: str,
    *,
    floating: bool = False,
) -> Any:
    """Arrays `[*shape, ...]` as jax arrays; exactly one, of a float dtype, if `floating`."""
    leaves, kind = jax.tree.flatten(tree)
    if floating and (len(leaves) != 1 or leaves[0] is not tree):
        got = checks.describe(tree)
        raise TypeError(checks.message(function, argument, "be one array", got, remedy))
    for leaf in leaves:
        got = checks.describe(leaf)
        if not checks.is_array(leaf) or _holds_no_numbers(leaf):
            raise TypeError(checks.message(function, argument, "be jax arrays", got, remedy))
        if floating and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(checks.message(function, argument, "be floating point", got, remedy))
        if leaf.shape[: len(shape)] != shape:
            rule = f"have shape {checks.leading(shape)}"
            raise ValueError(checks.message(function, argument, rule, got, remedy))
    return jax.tree.unflatten(kind, [jnp.asarray(leaf) for leaf in leaves])


def _holds_no_numbers(array: Any) -> bool:
    """NumPy's arrays of objects, text, dates, records and long doubles, which jax has no like of."""
    return isinstance(array, np.ndarray) and (
        array.dtype.kind in "OSUMm"
        or array.dtype.names is not None
        or array.dtype.type in (np.longdouble, np.clongdouble)
    )


def check_out_dtype(function: str, value: Any, default: Any) -> Any:
    """A floating point dtype; `default` for None."""
    if value is None:
        return jnp.dtype(default)
    dtype = select.dtype_of(value)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        rule, got = "be a floating point dtype", checks.describe(value if dtype is None else dtype)
        remedy = "Sums of floating point rows are floating point: round or convert them afterwards."
        raise TypeError(checks.message(function, "out_dtype", rule, got, remedy))
    return dtype


def check_layout(function: str, layout: Any, kind: type, maker: str) -> None:
    if not isinstance(layout, kind):
        got = checks.describe(layout)
        rule, remedy = f"be a {kind.__name__}", f"Pass the one that {maker} returned."
        raise TypeError(checks.message(function, "layout", rule, got, remedy))


def check_local_experts(function: str, num_experts: Any, size: int) -> int:
    num_experts = checks.check_num_experts(function, num_experts)
    if num_experts % size:
        rule = f"be a multiple of the {size} ranks"
        remedy = "Every rank holds as many experts: add redundant or empty ones."
        raise ValueError(checks.message(function, "num_experts", rule, num_experts, remedy))
    return num_experts // size


def check_x(function: str, x: Any, payload: Any) -> tuple[jax.Array, jax.Array | None]:
    """(x, None), or (q, scales) from a caller who has quantised."""
    if payload is not None and not checks.is_one_of(payload, message.PAYLOADS):
        rule = f"be None or one of {', '.join(message.PAYLOADS)}"
        got, remedy = checks.shown(payload), "None sends x as it is."
        raise ValueError(checks.message(function, "payload", rule, got, remedy))
    if isinstance(x, (tuple, list)):
        remedy = (
            "Pass (e4m3 [T, H], float32 scales [T, H / 128] or int32 [T, H / 512]), or x alone."
        )
        got = f"({', '.join(checks.describe(part) for part in x)})"
        dtypes = [getattr(part, "dtype", None) for part in x]
        known = [[message.FP8, kind] for kind in (jnp.float32, jnp.int32)]
        if payload is not None or dtypes not in known or not all(map(checks.is_array, x)):
            rule = "be one array, or (float8_e4m3fn, float32 or int32) without payload"
            raise TypeError(checks.message(function, "x", rule, got, remedy))
        q, scales = (jnp.asarray(part) for part in x)
        group = message.columns_per_scale(scales.dtype)
        if q.ndim != 2 or q.shape[1] % group or scales.shape != (q.shape[0], q.shape[1] // group):
            rule = f"have shapes [T, H] and [T, H / {group}]"
            raise ValueError(checks.message(function, "x", rule, got, remedy))
        return q, scales
    remedy = "Pass this rank's tokens, [num_tokens, hidden]."
    got = checks.describe(x)
    if not checks.is_array(x) or x.dtype.name not in _PAYLOADS:
        rule = f"be an array of {', '.join(_PAYLOADS[:-1])}"
        raise TypeError(checks.message(function, "x", rule, got, remedy))
    if x.ndim != 2:
        raise ValueError(checks.message(function, "x", "have two dimensions", got, remedy))
    packed = payload is not None and message.PAYLOADS[payload] == "ue8m0_packed"
    group = message.columns_per_scale(jnp.int32 if packed else jnp.float32)
    if payload is not None and (x.shape[1] % group or x.shape[1] == 0):
        rule = f"have a multiple of {group} columns for payload {payload!r}"
        remedy = f"{group} columns share an element of the scales: pad H, or send payload=None."
        raise ValueError(checks.message(function, "x", rule, got, remedy))
    return jnp.asarray(x), None


def check_pairs(function: str, ids: Any, weights: Any, num_tokens: int) -> jax.Array:
    """Weights as float32."""
    if ids.shape[0] != num_tokens or ids.shape[1] == 0:
        rule, got = f"have shape [{num_tokens}, top_k]", checks.describe(ids)
        remedy = "Pass the experts of each row of x."
        raise ValueError(checks.message(function, "topk_ids", rule, got, remedy))
    remedy = "Pass one weight per pair of topk_ids."
    weights = check_rows(function, "topk_weights", weights, ids.shape, remedy, floating=True)
    if weights.ndim != 2:
        rule, got = f"have shape {list(ids.shape)}", checks.describe(weights)
        raise ValueError(checks.message(function, "topk_weights", rule, got, remedy))
    return weights.astype(jnp.float32)


def check_num_valid_tokens(value: Any) -> Any:
    """A scalar; what the host knows as int32, saturated."""
    remedy = "Pass the number of tokens in use on this rank, as an int or a scalar integer array."
    if value is not None and getattr(value, "ndim", 0):
        rule, got = "be a scalar", checks.describe(value)
        raise ValueError(checks.message("dispatch", "num_valid_tokens", rule, got, remedy))
    if value is None:
        return None
    return check_count("dispatch", "num_valid_tokens", value, remedy)


def global_ids(ids: Any, num_experts: int, num_valid_tokens: Any, num_tokens: int) -> jax.Array:
    """int32 ids, -1 where nothing is to be sent."""
    # In their own dtype, before narrowing: an unsigned or 64-bit id must not wrap into range.
    valid = (ids >= 0) & (ids < num_experts)
    if num_valid_tokens is not None:
        # Saturated, whatever its dtype: a count beyond int32 keeps every token.
        count = narrow_count(jnp.asarray(num_valid_tokens))[0]
        valid &= (jnp.arange(num_tokens, dtype=_I32) < count)[:, None]
    return jnp.where(valid, jnp.asarray(ids).astype(_I32), -1)
