"""A small Mixture-of-Experts language model in Flax NNX: the model, and decoding with it under jit.

The experts are `moe_align_jax.fused_moe` behind `moe_align_jax.route_topk`; attention and norms are ordinary
JAX. `train_moe.py` trains it.

B sequences, S positions, T = B * S tokens, H hidden, E experts, K top_k, N within an expert, L layers,
V = 256 bytes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_align_jax import fused_moe, route_topk

VOCABULARY = 256  # bytes


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model. Products are made in `dtype`; weights and the optimiser's state are float32."""

    layers: int
    hidden: int
    heads: int
    experts: int
    top_k: int
    ffn: int
    dtype: str

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


def _weight(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    """Random, scaled by the square root of the rows that each column multiplies."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) / shape[-2] ** 0.5)


def _norm(x: jax.Array, scale: nnx.Param) -> jax.Array:
    """RMSNorm over the last dimension, in float32."""
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide * scale[...].reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def _rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding of `[B, S, heads, D]` at positions `[B, S]`."""
    half = x.shape[-1] // 2
    rate = jnp.exp(
        jnp.arange(half, dtype=jnp.float32) * (-np.log(10000.0) / half).astype(np.float32)
    )
    angle = positions.astype(jnp.float32)[:, :, None, None] * rate[None, None, None, :]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Cache(NamedTuple):
    """Keys and values of one layer, `[B, slots, heads, D]`; slot s belongs to position s."""

    keys: jax.Array
    values: jax.Array


class Attention(nnx.Module):
    """Causal self-attention, with or without a cache."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.qkv = _weight(rngs, config.hidden, 3 * config.hidden)
        self.out = _weight(rngs, config.hidden, config.hidden)

    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache]:
        """`[B, S, H]` -> `[B, S, H]`, and the cache with the new keys and values in their slots."""
        batch, length, hidden = x.shape
        qkv = (x @ self.qkv[...].astype(x.dtype)).reshape(batch, length, 3, self.config.heads, -1)
        query, key, value = (qkv[:, :, i] for i in range(3))
        query, key = _rotate(query, positions), _rotate(key, positions)
        if cache is None:
            cache = Cache(key, value)
        else:
            row = jnp.arange(batch, dtype=jnp.int32)[:, None]
            cache = Cache(
                cache.keys.at[row, positions].set(key), cache.values.at[row, positions].set(value)
            )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, cache.keys).astype(jnp.float32)
        slots = jnp.arange(cache.keys.shape[1], dtype=jnp.int32)
        seen = slots[None, None, None, :] <= positions[:, None, :, None]
        scores = jnp.where(seen, scores / self.config.head_size**0.5, -1e30)
        shares = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", shares, cache.values).reshape(batch, length, hidden)
        return y @ self.out[...].astype(x.dtype), cache


class MoEBlock(nnx.Module):
    """A router and its experts: what replaces the feed-forward network of a dense model."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.router = _weight(rngs, config.hidden, config.experts)
        self.gate_up = _weight(rngs, config.experts, config.hidden, 2 * config.ffn)
        self.down = _weight(rngs, config.experts, config.ffn, config.hidden)

    def __call__(
        self, x: jax.Array, real: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Each token through its K experts.

        Args:
            x: `[T, H]`.
            real: `[T]` bool; a token that is not real goes to no expert, and its result is zero.

        Returns:
            `[T, H]`; the router's logits `[T, E]` float32; the tokens of each expert `[E]` int32.
        """
        with jax.named_scope("route"):
            # In float32: two experts that are close must not swap places by rounding.
            logits = x.astype(jnp.float32) @ self.router[...]
            weights, ids = route_topk(
                logits, top_k=self.config.top_k, renormalize=True, token_mask=real
            )
        with jax.named_scope("experts"):
            y, counts = fused_moe(
                x,
                self.gate_up[...].astype(x.dtype),
                self.down[...].astype(x.dtype),
                weights,
                ids,
                return_tokens_per_expert=True,
            )
        return y, logits, counts


class Layer(nnx.Module):
    """Attention and experts, each behind a norm and beside a residual."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.attention_norm = nnx.Param(jnp.ones(config.hidden, jnp.float32))
        self.attention = Attention(config, rngs)
        self.moe_norm = nnx.Param(jnp.ones(config.hidden, jnp.float32))
        self.moe = MoEBlock(config, rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, cache: Cache | None, real: Any):
        attended, cache = self.attention(_norm(x, self.attention_norm), positions, cache)
        x = x + attended
        tokens = _norm(x, self.moe_norm).reshape(-1, x.shape[-1])
        y, logits, counts = self.moe(tokens, real)
        return x + y.reshape(x.shape), cache, logits, counts


class Output(NamedTuple):
    """What the model returns.

    Attributes:
        logits: `[B, S, V]` float32, of the next byte.
        router_logits: `[L, T, E]` float32.
        tokens_per_expert: `[L, E]` int32.
        caches: one per layer.
    """

    logits: jax.Array
    router_logits: jax.Array
    tokens_per_expert: jax.Array
    caches: list[Cache]


class Model(nnx.Module):
    """A decoder of L layers over bytes."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.embedding = _weight(rngs, VOCABULARY, config.hidden)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.Param(jnp.ones(config.hidden, jnp.float32))
        self.head = _weight(rngs, config.hidden, VOCABULARY)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        caches: Sequence[Cache] | None = None,
        real: jax.Array | None = None,
    ) -> Output:
        """
        Args:
            tokens: `[B, S]` integers in [0, 256).
            positions: `[B, S]` int32; None for 0 .. S - 1.
            caches: of the positions before these; None to attend to `tokens` alone.
            real: `[B, S]` bool; None where all tokens are.
        """
        batch, length = tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
        x = self.embedding[...][tokens].astype(self.config.dtype)
        mask = None if real is None else real.reshape(-1)
        new, router_logits, counts = [], [], []
        for i, layer in enumerate(self.layers):
            cache = None if caches is None else caches[i]
            x, cache, logits, count = layer(x, positions, cache, mask)
            new.append(cache)
            router_logits.append(logits)
            counts.append(count)
        x = _norm(x, self.norm)
        logits = (x @ self.head[...].astype(x.dtype)).astype(jnp.float32)
        return Output(logits, jnp.stack(router_logits), jnp.stack(counts), new)


@nnx.jit
def forward(model: Model, tokens: jax.Array) -> jax.Array:
    """The logits `[B, S, V]` of the byte after each of `[B, S]` tokens."""
    return model(tokens).logits


# -- decoding ---------------------------------------------------------------------------------------------


@functools.partial(nnx.jit, static_argnames="num_tokens")
def generate(model: Model, prompts: jax.Array, lengths: jax.Array, *, num_tokens: int) -> jax.Array:
    """The most probable continuation of each prompt, in a batch whose shape is static.

    Prompts of other lengths, and fewer prompts, run in the same program: padding goes to no expert, so that
    it costs the experts nothing and changes no row beside it.

    Args:
        prompts: `[B, P]` integers, prompt b in the first lengths[b] columns.
        lengths: `[B]` int32; 0 for a row that is not used.
        num_tokens: how many to add. Static.

    Returns:
        `[B, num_tokens]` int32; anything in rows that are not used.
    """
    config = model.config
    batch, width = prompts.shape
    shape = (batch, width + num_tokens, config.heads, config.head_size)
    empty = jnp.zeros(shape, config.dtype)
    columns = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (batch, width))
    real = columns < lengths[:, None]
    # Slots behind a prompt get what padding gives. Each is written anew before a position may look at it.
    out = model(prompts, columns, [Cache(empty, empty)] * config.layers, real)
    last = jnp.maximum(lengths - 1, 0)
    logits = jnp.take_along_axis(out.logits, last[:, None, None], axis=1)[:, 0]
    first = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        caches, token, position = carry
        out = model(token[:, None], position[:, None], caches, (lengths > 0)[:, None])
        following = jnp.argmax(out.logits[:, 0], axis=-1).astype(jnp.int32)
        return (out.caches, following, position + 1), token

    carry = (out.caches, first, lengths.astype(jnp.int32))
    _, tokens = jax.lax.scan(step, carry, None, length=num_tokens)
    return tokens.T


def complete(model: Model, prompts: Sequence[str], *, rows: int, width: int, num_tokens: int):
    """Continues up to `rows` prompts of up to `width` bytes each; a list of texts."""
    tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        data = np.frombuffer(prompt.encode()[-width:], np.uint8)
        tokens[row, : len(data)], lengths[row] = data, len(data)
    out = np.asarray(generate(model, tokens, lengths, num_tokens=num_tokens))
    return [
        bytes(out[row].astype(np.uint8)).decode(errors="replace") for row in range(len(prompts))
    ]
