"""One message per token: its payload, the scales of an fp8 payload, its ids and weights, side by side.

One collective instead of three or four, while packing costs less than a collective. A message's words are
unsigned integers as wide as the narrowest field's dtype.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax import _checks

FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0
# Below it a group's scale no longer follows its greatest value: DeepEP's and DeepGEMM's floor.
AMAX_FLOOR = 1e-4
GROUP = 128
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


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(e4m3 `[T, H]`, float32 scales `[T, H / 128]`), per token and 128 columns: `x ~ q * scale`.

    `scale = max(amax, 1e-4) / 448`, `q = e4m3(x * (448 / max(amax, 1e-4)))`.
    """
    num_tokens, hidden = x.shape
    groups = x.astype(jnp.float32).reshape(num_tokens, hidden // GROUP, GROUP)
    amax = jnp.maximum(jnp.max(jnp.abs(groups), axis=-1), jnp.float32(AMAX_FLOOR))
    # The product may round to just above 448, which e4m3 still rounds to 448: nothing has to be clamped.
    q = (groups * (jnp.float32(FP8_MAX) / amax)[..., None]).astype(FP8)
    return q.reshape(num_tokens, hidden), amax * jnp.float32(1 / FP8_MAX)


@jax.custom_vjp
def without_gradient(tree: Any) -> Any:
    """Its argument; taking its gradient is an error."""
    return tree


def _refuse(*_: Any) -> NoReturn:
    rule = _checks.message(
        "dispatch",
        "x",
        "not be differentiated when its payload is fp8",
        "a gradient through the quantisation",
        "Train with payload=None, or stop the gradient of x with jax.lax.stop_gradient.",
    )
    raise NotImplementedError(rule)


without_gradient.defvjp(_refuse, _refuse)
