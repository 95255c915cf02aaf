"""A small Mixture-of-Experts layer in JAX: route_topk, and fused_moe.

The shortest complete use, meant for reading. Every stage stands under `jax.named_scope`, so that a profile
shows it. Run it: `python examples/moe_layer.py`.

T tokens, K top_k, E experts, H hidden size, F size within an expert.
"""

import argparse
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_align_jax import fused_moe, route_topk, select_moe_implementation


class MoEParams(NamedTuple):
    """Weights of the layer.

    Attributes:
        router: `[H, E]`.
        gate: `[E, H, F]`.
        up: `[E, H, F]`.
        down: `[E, F, H]`.
    """

    router: jax.Array
    gate: jax.Array
    up: jax.Array
    down: jax.Array


def init(
    key: jax.Array, *, hidden: int, ffn: int, num_experts: int, dtype=jnp.float32
) -> MoEParams:
    """Random weights, scaled by the square root of what each multiplies."""
    keys = jax.random.split(key, 4)
    shapes = [
        (hidden, num_experts),
        (num_experts, hidden, ffn),
        (num_experts, hidden, ffn),
        (num_experts, ffn, hidden),
    ]
    return MoEParams(
        *[
            (jax.random.normal(k, s) / jnp.sqrt(s[-2])).astype(dtype)
            for k, s in zip(keys, shapes, strict=True)
        ]
    )


def route(router: jax.Array, x: jax.Array, *, top_k: int) -> tuple[jax.Array, jax.Array]:
    """The top_k experts of each token: weights `[T, K]` that sum to 1, and ids `[T, K]` int32."""
    with jax.named_scope("route"):
        logits = x.astype(jnp.float32) @ router.astype(jnp.float32)
        return route_topk(logits, top_k=top_k, renormalize=True)


def apply_experts(
    params: MoEParams,
    x: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    *,
    block_size: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The weighted sum of each token's experts; an id outside `[0, E)` adds zero.

    Args:
        params: the weights; the router is not used.
        x: `[T, H]` floating point.
        topk_weights: `[T, K]` floating point.
        topk_ids: `[T, K]` integers.
        block_size: rows per block: each expert's rows are padded to a multiple of it. None for what suits
            the sizes. Static.
        implementation: None for the best available.

    Returns:
        `[T, H]`, dtype of x.
    """
    with jax.named_scope("experts"):
        # Gate and up are two arrays here; fused_moe also takes them side by side in one.
        return fused_moe(  # pyright: ignore[reportReturnType] (a pair only with the counts)
            x,
            (params.gate, params.up),
            params.down,
            topk_weights,
            topk_ids,
            block_size=block_size,
            implementation=implementation,
        )


def moe_layer(
    params: MoEParams,
    x: jax.Array,
    *,
    top_k: int,
    block_size: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`[T, H]` -> `[T, H]`: route, then the experts, with SwiGLU."""
    weights, topk_ids = route(params.router, x, top_k=top_k)
    return apply_experts(
        params, x, weights, topk_ids, block_size=block_size, implementation=implementation
    )


def dense_moe_layer(params: MoEParams, x: jax.Array, *, top_k: int) -> jax.Array:
    """The same by running every expert on every token: E / K times the work, no alignment."""
    weights, topk_ids = route(params.router, x, top_k=top_k)
    gate = jnp.einsum("th,ehf->tef", x, params.gate)
    up = jnp.einsum("th,ehf->tef", x, params.up)
    each = jnp.einsum("tef,efh->teh", jax.nn.silu(gate) * up, params.down)
    chosen = jax.nn.one_hot(topk_ids, params.gate.shape[0], dtype=weights.dtype)
    share = (chosen * weights[..., None]).sum(1)
    return jnp.einsum("te,teh->th", share, each).astype(x.dtype)


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of this process's command line, of sizes that a layer can have."""
    options = parser.parse_args()
    for name in ("tokens", "experts", "hidden"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(options, name)}")
    if not 1 <= options.top_k <= options.experts:
        parser.error(
            f"--top-k must be from 1 to --experts ({options.experts}); got {options.top_k}"
        )
    return options


def main() -> None:
    """Runs the layer and its gradient under jit, and compares both with the dense layer."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64)
    options = parse(parser)

    key_params, key_x = jax.random.split(jax.random.key(0))
    params = init(
        key_params, hidden=options.hidden, ffn=2 * options.hidden, num_experts=options.experts
    )
    x = jax.random.normal(key_x, (options.tokens, options.hidden), jnp.float32)
    sizes = {"top_k": options.top_k}

    def loss(params, x):
        return jnp.mean(moe_layer(params, x, **sizes) ** 2)

    def dense_loss(params, x):
        return jnp.mean(dense_moe_layer(params, x, top_k=options.top_k) ** 2)

    # Full float32 products, so that the two ways of summing differ by rounding only.
    with jax.default_matmul_precision("highest"):
        y = jax.jit(lambda p, x: moe_layer(p, x, **sizes))(params, x)
        dense = jax.jit(lambda p, x: dense_moe_layer(p, x, top_k=options.top_k))(params, x)
        gradients = jax.jit(jax.grad(loss))(params, x)
        dense_gradients = jax.jit(jax.grad(dense_loss))(params, x)

    def relative_error(a, b):
        return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))

    selection = select_moe_implementation(
        x.shape, params.down.shape, top_k=options.top_k, dtype=x.dtype, pair=True
    )
    device = jax.devices()[0]
    print(
        f"MoE layer on {device.device_kind}: {options.tokens} tokens, top-{options.top_k} of "
        f"{options.experts} experts, hidden {options.hidden}"
    )
    print(f"experts by {selection.implementation} ({selection.form})")
    print(
        f"against the dense layer, largest error relative to the largest value: y "
        f"{relative_error(y, dense):.1e}"
    )
    for name, ours, reference in zip(params._fields, gradients, dense_gradients, strict=True):
        print(f"  gradient of {name:6} {str(ours.shape):16} {relative_error(ours, reference):.1e}")


if __name__ == "__main__":
    main()
