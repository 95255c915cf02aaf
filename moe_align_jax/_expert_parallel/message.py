"""One message per token: its payload, the scales of an fp8 payload, its ids and weights, side by side.

One collective instead of three or four, while packing costs less than a collective. A message's words are
unsigned integers as wide as the narrowest field's dtype.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._core import checks
from moe_align_jax._core.fp8 import E4M3_MAX, GROUP, GROUPS_PER_WORD
from moe_align_jax._masked_quant.reference import power_of_two_above

FP8 = jnp.float8_e4m3fn
# Below it a group's scale no longer follows its greatest value: DeepEP's and DeepGEMM's floor.
AMAX_FLOOR = 1e-4
# What a caller may ask for, and the format of its scales: the names of silu_and_mul_masked_quant.
PAYLOADS = {"fp8": "float32", "fp8_ue8m0": "ue8m0", "fp8_ue8m0_packed": "ue8m0_packed"}
# A field of which a rank receives more travels by itself. Packing and unpacking read and write a message some
# three times; at 3 TB/s and this size that takes 16 us, and a small collective more takes 15 to 20.
MAX_PACKED_BYTES = 16 << 20
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def travels_alone(field: Any, num_ranks: int) -> bool:
    """Whether a `[T, c]` field is too large to be copied into a message."""
    return field.size * jnp.dtype(field.dtype).itemsize * num_ranks > MAX_PACKED_BYTES


def move(
    fields: list[jax.Array], num_ranks: int, send: Callable[[jax.Array], jax.Array]
) -> list[jax.Array]:
    """`send` of every field: the large ones as they are, the others in one message."""
    alone = [travels_alone(field, num_ranks) for field in fields]
    small = [field for field, large in zip(fields, alone, strict=True) if not large]
    received = iter(unpack(send(pack(small)), small) if small else ())
    return [
        send(field) if large else next(received) for field, large in zip(fields, alone, strict=True)
    ]


def pack(fields: list[jax.Array]) -> jax.Array:
    """`[T, c_i]` arrays, side by side, as `[T, W]` unsigned words of the narrowest one's width."""
    word = _WORDS[min(4, *(field.dtype.itemsize for field in fields))]
    columns = []
    for field in fields:
        words = lax.bitcast_convert_type(field, word)
        columns.append(words.reshape(field.shape[0], _width(field, word)))
    return jnp.concatenate(columns, axis=1)


def unpack(message: jax.Array, like: list[Any]) -> list[jax.Array]:
    """The fields of `[R, W]` words, with the columns and dtypes of those that were packed."""
    fields, start = [], 0
    word = message.dtype
    for field in like:
        width = _width(field, word)
        words = message[:, start : start + width]
        start += width
        ratio = jnp.dtype(field.dtype).itemsize // word.itemsize
        if ratio > 1:
            words = words.reshape(message.shape[0], field.shape[1], ratio)
        fields.append(lax.bitcast_convert_type(words, field.dtype))
    return fields


def _width(field: Any, word: Any) -> int:
    return field.shape[1] * (jnp.dtype(field.dtype).itemsize // jnp.dtype(word).itemsize)


def columns_per_scale(scales_dtype: Any) -> int:
    """Of H, to one element of the scales: a group's, or those of the four exponents of an int32."""
    return GROUP * (GROUPS_PER_WORD if scales_dtype == jnp.int32 else 1)


def quantize(x: jax.Array, scale_format: str = "float32") -> tuple[jax.Array, jax.Array]:
    """(e4m3 `[T, H]`, scales), per token and 128 columns: `x ~ q * scale`.

    "float32": `scale = max(amax, 1e-4) * (1 / 448)`, with the reciprocal rounded to float32, and
    `q = e4m3(x * (448 / max(amax, 1e-4)))`, scales `[T, G]`.
    "ue8m0": the power of two at or above that scale, and `q = e4m3(x / scale)`.
    "ue8m0_packed": its biased exponent, four to an int32, the first in the lowest byte: `[T, G / 4]`.
    """
    num_tokens, hidden = x.shape
    groups = x.astype(jnp.float32).reshape(num_tokens, hidden // GROUP, GROUP)
    amax = jnp.maximum(jnp.max(jnp.abs(groups), axis=-1), jnp.float32(AMAX_FLOOR))
    scales = amax * jnp.float32(1 / E4M3_MAX)
    factor = jnp.float32(E4M3_MAX) / amax
    if scale_format != "float32":
        scales = power_of_two_above(scales)
        factor = 1 / scales
    # The product may round to just above 448, which e4m3 still rounds to 448: nothing has to be clamped.
    q = (groups * factor[..., None]).astype(FP8).reshape(num_tokens, hidden)
    if scale_format == "ue8m0_packed":
        exponents = (lax.bitcast_convert_type(scales, jnp.int32) >> 23).astype(jnp.uint8)
        words = exponents.reshape(num_tokens, scales.shape[1] // GROUPS_PER_WORD, GROUPS_PER_WORD)
        return q, lax.bitcast_convert_type(words, jnp.int32)
    return q, scales


@jax.custom_vjp
def without_gradient(tree: Any) -> Any:
    """Its argument; taking its gradient is an error."""
    return tree


def _refuse(*_: Any) -> NoReturn:
    rule = checks.message(
        "dispatch",
        "x",
        "not be differentiated when its payload is fp8",
        "a gradient through the quantisation",
        "Train with payload=None, or stop the gradient of x with jax.lax.stop_gradient.",
    )
    raise NotImplementedError(rule)


without_gradient.defvjp(_refuse, _refuse)
