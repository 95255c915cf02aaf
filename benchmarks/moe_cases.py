"""Models whose expert layers are measured: their sizes, operands in both frameworks, and right values."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

LAYERS = 4  # of a step, each with weights of its own
_SAMPLED_TOKENS = 8
_BOUND = 1e-2


class Model(NamedTuple):
    """E experts of which a token takes K; H hidden, N within an expert."""

    name: str
    experts: int
    top_k: int
    hidden: int
    ffn: int


MODELS = (
    Model("Qwen3-30B-A3B", 128, 8, 2048, 768),
    Model("DeepSeek-V3 TP8", 256, 8, 7168, 256),
    Model("Mixtral 8x7B", 8, 2, 4096, 14336),
)
# The layer that SonicMoE's paper times: 32,768 tokens in 6.6 ms on an H100 (arXiv 2512.14080, figure 14).
OTHERS = (Model("SonicMoE 30B", 128, 8, 4096, 512),)


def routing(model: Model, tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(weights float32, ids int32) `[T, K]`: distinct experts, uniform; weights that sum to 1."""
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((tokens, model.experts)), axis=1)
    ids = order[:, : model.top_k].astype(np.int32)
    weights = rng.uniform(0.2, 1.0, ids.shape).astype(np.float32)
    return weights / weights.sum(1, keepdims=True), ids


def layer_bytes(model: Model, tokens: int, hit: int) -> int:
    """The weights of the experts hit, once, and x and the result."""
    return 2 * (3 * hit * model.hidden * model.ffn + 2 * tokens * model.hidden)


def make_sets(model: Model) -> list[tuple[Any, Any]]:
    """`LAYERS` times (w13 `[E, 2 N, H]`, w2 `[E, H, N]`), bfloat16, on jax's device."""
    import functools

    import jax
    import jax.numpy as jnp

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def make(key, shape, scale):
        # Uniform bits are many times cheaper than normal values; the spread is that of 1 / sqrt(fan in).
        values = jax.random.uniform(key, shape, jnp.bfloat16, -1.0, 1.0)
        return values * jnp.bfloat16(scale * 3**0.5)

    first = (model.experts, 2 * model.ffn, model.hidden)
    second = (model.experts, model.hidden, model.ffn)
    return [
        (
            make(jax.random.key(2 * i), first, model.hidden**-0.5),
            make(jax.random.key(2 * i + 1), second, model.ffn**-0.5),
        )
        for i in range(LAYERS)
    ]


class Case:
    """The operands of one batch size, in both frameworks, and what sampled tokens should give."""

    def __init__(self, model: Model, tokens: int, sets: Sequence[tuple[Any, Any]]):
        import jax
        import jax.numpy as jnp

        from torch_bridge import to_torch

        self.model, self.tokens, self.sets = model, tokens, sets
        weights, ids = routing(model, tokens)
        self.hit = len(np.unique(ids))
        shape = (tokens, model.hidden)
        self.x = jax.random.normal(jax.random.key(77), shape, jnp.bfloat16)
        self.weights, self.ids = jnp.asarray(weights), jnp.asarray(ids)
        self.torch_sets = [tuple(map(to_torch, pair)) for pair in sets]
        self.torch_x, self.torch_weights, self.torch_ids = map(
            to_torch, (self.x, self.weights, self.ids)
        )
        rng = np.random.default_rng(1)
        self.sample = np.sort(rng.choice(tokens, min(_SAMPLED_TOKENS, tokens), False))
        self.answers = {i: self._answer(i, weights, ids) for i in (0, LAYERS - 1)}

    def _answer(self, layer: int, weights: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """float32 `[sampled, H]`, an expert of a token at a time."""
        import torch

        w13, w2 = self.torch_sets[layer]
        rows = []
        for t in self.sample:
            x, total = self.torch_x[int(t)].float(), torch.zeros((), device=self.torch_x.device)
            for k, expert in enumerate(ids[t]):
                product = w13[int(expert)].float() @ x
                gate, up = product[: self.model.ffn], product[self.model.ffn :]
                hidden = torch.nn.functional.silu(gate) * up
                total = total + float(weights[t, k]) * (w2[int(expert)].float() @ hidden)
            rows.append(total.cpu().numpy())
        return np.stack(rows)

    def wrong(self, rows_of: Callable[[int], np.ndarray]) -> str:
        """`rows_of(layer)`: the sampled rows of a layer's result. "" where they are right."""
        for layer, want in self.answers.items():
            found = np.asarray(rows_of(layer)).astype(np.float32)
            error = np.linalg.norm(found - want) / np.linalg.norm(want)
            if not error < _BOUND:
                return f"layer {layer}: relative error {error:.2e}"
        return ""
