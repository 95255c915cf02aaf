"""A Mixture-of-Experts block as an Equinox module, trained for a few steps.

Equinox needs no adapter: a module is a pytree of arrays, and `route_topk` and `fused_moe` take arrays. What
changes the program is a static field; what is learned is an array. Run it: `python examples/equinox_moe.py`.

T tokens, H hidden, E experts, K top_k, N within an expert.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from moe_align_jax import fused_moe, route_topk


class MoE(eqx.Module):
    """A router and its experts, `[T, H]` -> `[T, H]`.

    Attributes:
        router: `[H, E]` float32.
        gate_up: `[E, H, 2 N]`, gate in the first N columns.
        down: `[E, N, H]`.
        top_k: K.
    """

    router: jax.Array
    gate_up: jax.Array
    down: jax.Array
    top_k: int = eqx.field(static=True)

    def __init__(self, hidden: int, ffn: int, experts: int, top_k: int, *, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.router = jax.random.normal(keys[0], (hidden, experts), jnp.float32) / hidden**0.5
        shape = (experts, hidden, 2 * ffn)
        self.gate_up = jax.random.normal(keys[1], shape, jnp.float32) / hidden**0.5
        self.down = jax.random.normal(keys[2], (experts, ffn, hidden), jnp.float32) / ffn**0.5
        self.top_k = top_k

    def __call__(self, x: jax.Array) -> jax.Array:
        logits = x.astype(jnp.float32) @ self.router
        weights, ids = route_topk(logits, top_k=self.top_k, renormalize=True)
        # Not cast to x's dtype here: that would round the gradient of float32 weights.
        y = fused_moe(x, self.gate_up, self.down, weights, ids)
        return y  # pyright: ignore[reportReturnType] (a pair only with the counts)


@eqx.filter_jit
def step(block: MoE, x: jax.Array, wanted: jax.Array, rate: float) -> tuple[MoE, jax.Array]:
    """One step of gradient descent towards the wanted outputs; the mean square error before it."""

    @eqx.filter_value_and_grad
    def loss(block: MoE) -> jax.Array:
        return jnp.mean((block(x) - wanted) ** 2)

    error, gradients = loss(block)
    updates = jax.tree.map(lambda g: -rate * g, gradients)
    return eqx.apply_updates(block, updates), error


def main(steps: int = 30) -> list[float]:
    """A block learns a function of its inputs; its mean square errors."""
    keys = jax.random.split(jax.random.key(0), 2)
    block = MoE(32, 32, 4, 2, key=keys[0])
    x = jax.random.normal(keys[1], (128, 32), jnp.float32)
    wanted = jnp.abs(x)
    errors = []
    for _ in range(steps):
        block, error = step(block, x, wanted, 1.0)
        errors.append(float(error))
    print(f"mean square error {errors[0]:.3f} -> {errors[-1]:.3f}, in {steps} steps")
    return errors


if __name__ == "__main__":
    main()
