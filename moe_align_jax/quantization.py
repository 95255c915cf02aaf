"""quantize_rowwise, quantize_blockwise: e4m3 codes and scales, as the fp8 grouped products take them."""

from typing import Any

import jax
import numpy as np

from moe_align_jax._core import checks
from moe_align_jax._core.fp8 import GROUP, GROUPS_PER_WORD
from moe_align_jax._lowering.sharding import explicit_parts
from moe_align_jax._masked_quant import casts
from moe_align_jax._masked_quant.problem import (
    FORMATS,
    LAYOUTS,
    LEAST_FLOOR,
    ScaleFormat,
    ScaleLayout,
)

_DTYPES = ("bfloat16", "float16", "float32")


def quantize_rowwise(
    x: jax.Array,
    *,
    scale_format: ScaleFormat = "float32",
    scale_layout: ScaleLayout | None = None,
    amax_floor: float = 1e-4,
    divide: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Rows as e4m3 codes, with one scale for each row and 128 columns: `x ~ q * scale`.

    For x of `grouped_matmul`, `masked_grouped_matmul`, `fused_moe` and `dispatch`. In float32, for a group:

        scale = max(max(|x|), amax_floor) / 448                    rounded once
        q     = e4m3(clip(x * (1 / scale), -448, 448))             to nearest even

    The defaults are the codes of DeepGEMM's cast; `amax_floor=1e-10, divide=True` are those of SGLang's
    per-token-group quantisation. DeepEP's cast (`dispatch(..., payload="fp8")`) multiplies by
    `448 / amax` instead, which may give a neighbouring code.

    Args:
        x: `[..., M, K]` bfloat16, float16 or float32; K a multiple of 128. G = K / 128.
        scale_format: "float32"; "ue8m0", the power of two at or above that scale, as float32; or
            "ue8m0_packed", the exponents of the latter: byte i of int32 word j is that of group 4 j + i, of
            value 2**(byte - 127). Bytes behind the last group are 0. Static.
        scale_layout: "row_major" `[..., M, G]` (the default), or "column_major"
            `[..., G, round_up(M, 4)]`, whose rows TMA reads; columns from M on are unspecified. Packed scales
            are column-major `[..., ceil(G / 4), M]` by default, as `silu_and_mul_masked_quant` makes them, or
            row-major `[..., M, ceil(G / 4)]`, as `dispatch` takes them. Static.
        amax_floor: least maximum of a group: 1e-4 as DeepGEMM and DeepEP have it, 1e-10 as SGLang. Static.
        divide: `x / scale` instead of `x * (1 / scale)`. Static.

    Returns:
        `(q, scales)`: float8_e4m3fn of x's shape, and the scales, float32, or int32 if packed. A group with
        an infinity or a NaN has codes and a scale that are unspecified. There is no gradient: a derivative
        with respect to x is zero. On a Hopper GPU a kernel casts bfloat16 and float16, to the same bits as
        a CPU. XLA casts elsewhere, and float32, packed scales in rows, and an x that it divides over devices:
        with a GPU's division, good to two units in the last place, a code may then differ by one step.

    Raises:
        TypeError: x has another dtype, or an option is not static.
        ValueError: K is no multiple of 128 (on each device of Explicit mesh axes that it is split over; 512
            for packed scales), or an option is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> q, scales = quantize_rowwise(jnp.full((2, 256), 3.5))
        >>> q.shape, str(q.dtype), float(q[0, 0]), scales.shape, float(scales[0, 0])
        ((2, 256), 'float8_e4m3fn', 448.0, (2, 2), 0.0078125)

    Source: the contracts of DeepGEMM 2.8 `per_token_cast_to_fp8` (MIT) and SGLang 0.5.23
    `per_token_group_quant_8bit` (Apache-2.0); no code taken.
    """
    function = "quantize_rowwise"
    x = _check_values(function, "x", x, "[..., M, K]")
    _check_choice(function, "scale_format", scale_format, FORMATS)
    packed = scale_format == "ue8m0_packed"
    if scale_layout is None:
        scale_layout = "column_major" if packed else "row_major"
    _check_choice(function, "scale_layout", scale_layout, LAYOUTS)
    if x.shape[-1] % GROUP:
        rule = f"have a last dimension that is a multiple of {GROUP}"
        remedy = "Pad K with zeros: a scale belongs to 128 columns."
        raise ValueError(checks.message(function, "x", rule, checks.describe(x), remedy))
    _check_parts(function, "x", x, -1, GROUP * GROUPS_PER_WORD if packed else GROUP)
    return casts.rowwise(
        x,
        scale_format=scale_format,
        scale_layout=scale_layout,
        floor=_check_floor(function, amax_floor),
        divide=checks.check_bool(function, "divide", divide),
    )


def quantize_blockwise(
    w: jax.Array,
    *,
    scale_format: ScaleFormat = "float32",
    amax_floor: float = 1e-4,
    divide: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Weights as e4m3 codes, with one scale for each block of 128 x 128: `w ~ q * scale`.

    For the weights of `grouped_matmul`, `masked_grouped_matmul` and `fused_moe`: `[E, N, K]`. Weights
    `[E, K, N]` are turned first, `quantize_blockwise(w.swapaxes(1, 2))`. The arithmetic is that of
    `quantize_rowwise`, over a block.

    Args:
        w: `[..., N, K]` bfloat16, float16 or float32, of any N and K: the last blocks of a row or a column
            may be smaller.
        scale_format: "float32", or "ue8m0": powers of two, as float32. Static.
        amax_floor, divide: as for `quantize_rowwise`. Static.

    Returns:
        `(q, scales)`: float8_e4m3fn of w's shape, and float32 `[..., ceil(N / 128), ceil(K / 128)]`. A block
        with an infinity or a NaN has codes and a scale that are unspecified. There is no gradient: a
        derivative with respect to w is zero.

    Raises:
        TypeError: w has another dtype, or an option is not static.
        ValueError: w has fewer than two axes; N or K is split over Explicit mesh axes otherwise than in whole
            blocks; or an option is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> q, scales = quantize_blockwise(jnp.full((4, 200, 256), -7.0))
        >>> q.shape, float(q[0, 0, 0]), scales.shape, float(scales[0, 1, 1])
        ((4, 200, 256), -448.0, (4, 2, 2), 0.015625)

    Source: the contract of DeepGEMM 2.8 `per_block_cast_to_fp8` (MIT); no code taken.
    """
    function = "quantize_blockwise"
    w = _check_values(function, "w", w, "[..., N, K]")
    _check_choice(function, "scale_format", scale_format, FORMATS[:2])
    for axis in (-2, -1):
        _check_parts(function, "w", w, axis, GROUP)
    return casts.blockwise(
        w,
        scale_format=scale_format,
        floor=_check_floor(function, amax_floor),
        divide=checks.check_bool(function, "divide", divide),
    )


# -- checks ----------------------------------------------------------------------------------------


def _check_values(function: str, argument: str, value: Any, shape: str) -> Any:
    got = checks.describe(value)
    if not checks.is_array(value):
        remedy = checks.array_remedy(value)
        raise TypeError(checks.message(function, argument, "be an array", got, remedy))
    if str(value.dtype) not in _DTYPES:
        rule, remedy = f"be one of {', '.join(_DTYPES)}", "Cast it first."
        raise TypeError(checks.message(function, argument, rule, got, remedy))
    if value.ndim < 2:
        rule, remedy = f"have shape {shape}", "Scales belong to rows and columns."
        raise ValueError(checks.message(function, argument, rule, got, remedy))
    return value


def _check_parts(function: str, argument: str, value: Any, axis: int, size: int) -> None:
    """Where Explicit mesh axes divide a dimension, each device has whole scales of it."""
    parts = explicit_parts(value, axis)
    if parts > 1 and value.shape[axis] % (parts * size):
        rule = f"have a multiple of {size} in dimension {axis} on each device of Explicit mesh axes"
        got = f"{value.shape[axis]} over {parts} devices"
        remedy = "Call it inside jax.shard_map, or gather that dimension with jax.reshard."
        raise ValueError(checks.message(function, argument, rule, got, remedy))


def _check_choice(function: str, argument: str, value: object, choices: tuple[str, ...]) -> None:
    if not checks.is_one_of(value, choices):
        rule = f"be one of {', '.join(map(repr, choices))}"
        got, remedy = checks.shown(value), "It is a static string."
        raise ValueError(checks.message(function, argument, rule, got, remedy))


def _check_floor(function: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        rule, remedy = "be a static number", "It is compiled into the program: pass a Python float."
        got = checks.describe(value)
        raise TypeError(checks.message(function, "amax_floor", rule, got, remedy))
    if not checks.is_finite_float32(value) or value < LEAST_FLOOR:
        rule, remedy = (
            f"be at least {LEAST_FLOOR} and a finite float32",
            "1e-4 and 1e-10 are usual.",
        )
        raise ValueError(checks.message(function, "amax_floor", rule, value, remedy))
    return float(value)
