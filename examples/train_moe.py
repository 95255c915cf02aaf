"""Trains a small Mixture-of-Experts language model in Flax NNX, saves it, restores it, and decodes with it.

Bytes in, bytes out: the text is this repository's own documentation and licence, or any file. The experts are
`moe_align_jax.fused_moe` behind `moe_align_jax.route_topk`; attention, norms and the optimiser are ordinary
JAX, Flax and optax. On a CPU the small model learns in a minute; on a GPU the large one runs on the kernels.
Run it: `python examples/train_moe.py --out trained`, or `make train-example`. A second run with the same
folder goes on from the newest checkpoint.

B sequences, S positions, T = B * S tokens, H hidden, E experts, K top_k, N within an expert, L layers,
V = 256 bytes.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_align_jax import fused_moe, route_topk, select_moe_implementation
from moe_align_jax._cli import heatmap

ROOT = Path(__file__).resolve().parents[1]
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


# The model, sequences in a batch, and their length.
SIZES = {
    "small": (Config(2, 64, 4, 8, 2, 64, "float32"), 16, 64),
    "large": (Config(8, 1024, 16, 64, 8, 512, "bfloat16"), 32, 512),
}


# -- the model --------------------------------------------------------------------------------------------


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


# -- training ---------------------------------------------------------------------------------------------


def balance_loss(router_logits: jax.Array, tokens_per_expert: jax.Array) -> jax.Array:
    """Switch Transformer's load-balancing loss, the mean over the layers: 1 for an even load."""
    experts = router_logits.shape[-1]
    mean_score = jax.nn.softmax(router_logits, axis=-1).mean(axis=1)
    counts = tokens_per_expert.astype(jnp.float32)
    share = counts / counts.sum(axis=1, keepdims=True)
    return experts * jnp.mean(jnp.sum(share * mean_score, axis=1))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Nats per byte."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@functools.partial(nnx.jit, donate_argnums=(0, 1))
def train_step(
    model: Model, optimizer: nnx.Optimizer, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One update on `[B, S + 1]` tokens; nats per byte, and the load `[L, E]`."""

    def loss(model: Model) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        out = model(tokens[:, :-1])
        nats = cross_entropy(out.logits, tokens[:, 1:])
        balance = balance_loss(out.router_logits, out.tokens_per_expert)
        return nats + 0.01 * balance, (nats, out.tokens_per_expert)

    gradients, (nats, load) = nnx.grad(loss, has_aux=True)(model)
    optimizer.update(model, gradients)
    return nats, load


@nnx.jit
def forward(model: Model, tokens: jax.Array) -> jax.Array:
    """The logits `[B, S, V]` of the byte after each of `[B, S]` tokens."""
    return model(tokens).logits


@functools.cache  # the same object each time: it is part of what `train_step` is compiled for
def _update_rule(rate: float) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.linear_schedule(0.0, rate, 20), b2=0.95, weight_decay=0.01),
    )


def make(config: Config, *, seed: int, rate: float) -> tuple[Model, nnx.Optimizer]:
    """A model with random weights, and its optimiser."""
    model = Model(config, nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, _update_rule(rate), wrt=nnx.Param)
    # Tied to its device, as restored arrays are: one compiled step serves both.
    state = jax.device_put(nnx.state((model, optimizer)), jax.devices()[0])
    nnx.update((model, optimizer), state)
    return model, optimizer


def read_text(path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """The bytes to learn, and the held-out ones, which are the last twentieth of each file.

    Without a path the files are this repository's documentation and its licence, both under Apache-2.0.
    """
    files = [path] if path else [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "LICENSE"]
    parts = [
        (data[: (cut := len(data) * 19 // 20)], data[cut:]) for data in map(Path.read_bytes, files)
    ]
    training, held_out = (b"".join(part) for part in zip(*parts, strict=True))
    return np.frombuffer(training, np.uint8), np.frombuffer(held_out, np.uint8)


def batch_of(text: np.ndarray, number: int, *, batch: int, length: int, seed: int) -> np.ndarray:
    """The batch of a step, `[B, S + 1]` int32: it depends on the step's number alone, so that runs resume."""
    starts = np.random.default_rng((seed, number)).integers(0, len(text) - length, batch)
    return np.stack([text[s : s + length + 1] for s in starts]).astype(np.int32)


# -- checkpoints ------------------------------------------------------------------------------------------


class Checkpoints:
    """The newest two states of model and optimiser in a folder, by Orbax."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def save(self, step: int, model: Model, optimizer: nnx.Optimizer) -> None:
        state = nnx.to_pure_dict(nnx.state((model, optimizer)))
        self._manager.save(step, args=ocp.args.StandardSave(state))
        self._manager.wait_until_finished()

    def restore(self, model: Model, optimizer: nnx.Optimizer) -> int:
        """Reads the newest state into both; the step that it was saved after, 0 without one."""
        step = self._manager.latest_step()
        if step is None:
            return 0
        state = nnx.state((model, optimizer))
        args = ocp.args.StandardRestore(nnx.to_pure_dict(state))
        nnx.replace_by_pure_dict(state, self._manager.restore(step, args=args))
        nnx.update((model, optimizer), state)
        return step

    def close(self) -> None:
        self._manager.close()


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


# -- the program ------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What `train` returns: nats per byte after each step of this run, the load `[steps, L, E]`, the number
    of the last step, the held-out nats per byte, and the model."""

    losses: list[float]
    loads: np.ndarray
    step: int
    held_out: float
    model: Model


def draw_losses(losses: Sequence[float], first: int, held_out: float, path: Path) -> None:
    """Writes the loss curve as a PNG."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = np.arange(first, first + len(losses))
    axes.plot(steps, losses, linewidth=1, label="training batch")
    axes.axhline(held_out, color="tab:orange", linestyle="--", label="held-out text, at the end")
    axes.set(xlabel="step", ylabel="nats per byte")
    axes.legend()
    figure.savefig(path, dpi=120, format="png", metadata={"Software": None})


def train(options: argparse.Namespace, console: Console) -> Result:
    """Trains up to step `options.steps`, from the newest checkpoint in `options.out` if there is one."""
    config, batch, length = SIZES[options.size]
    training, held_out = read_text(options.text)
    if len(held_out) <= length:
        total = len(training) + len(held_out)
        raise ValueError(f"--text must hold at least {20 * (length + 1)} bytes; got {total}")
    model, optimizer = make(config, seed=options.seed, rate=options.rate)
    checkpoints = Checkpoints(options.out / "checkpoints")
    start = checkpoints.restore(model, optimizer)
    count = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    selection = select_moe_implementation(
        (batch * length, config.hidden),
        (config.experts, config.ffn, config.hidden),
        top_k=config.top_k,
        dtype=config.dtype,
    )
    console.print(
        f"{count:,} parameters, {config.layers} layers of {config.experts} experts, top-{config.top_k}, "
        f"{config.dtype}, on {jax.devices()[0].device_kind}\n"
        f"{len(training):,} bytes of text, {batch} x {length} of them a step\n"
        f"experts by {selection.implementation} ({selection.form})",
        highlight=False,
    )
    if start:
        console.print(f"goes on after step {start}, from {options.out / 'checkpoints'}")
    losses: list[jax.Array] = []
    loads: list[jax.Array] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("compiling", total=options.steps, completed=start)
        began = time.perf_counter()
        for number in range(start, options.steps):
            tokens = batch_of(training, number, batch=batch, length=length, seed=options.seed)
            nats, load = train_step(model, optimizer, tokens)
            losses.append(nats)
            loads.append(load)
            if (
                number % 10 == 0 or number + 1 == options.steps
            ):  # else the device would wait for the host
                progress.update(task, description=f"{float(nats):.3f} nats per byte")
            progress.update(task, completed=number + 1)
            if (number + 1) % options.save_every == 0 and number + 1 < options.steps:
                checkpoints.save(number + 1, model, optimizer)
        jax.block_until_ready(losses)
        seconds = time.perf_counter() - began
    step = max(start, options.steps)
    if losses:
        checkpoints.save(step, model, optimizer)
    checkpoints.close()
    tokens = batch_of(held_out, 0, batch=batch, length=length, seed=options.seed)
    result = Result(
        [float(nats) for nats in losses],
        np.array([np.asarray(load) for load in loads]).reshape(-1, config.layers, config.experts),
        step,
        float(cross_entropy(forward(model, tokens[:, :-1]), tokens[:, 1:])),
        model,
    )
    if losses:
        console.print(
            f"step {step}: {np.mean(result.losses[-10:]):.3f} nats per byte, over its last 10 batches; "
            f"{seconds:.1f} s with compiling, {len(losses) * batch * length / seconds:,.0f} bytes a second",
            highlight=False,
        )
    console.print(f"held-out text: {result.held_out:.3f} nats per byte", highlight=False)
    return result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    size = "large" if jax.default_backend() == "gpu" else "small"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default=size, help=f"here {size} by default")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=None, help="the greatest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="a file to learn, in place of the documentation")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--prompt", action="append", help="to continue at the end; up to four")
    parser.add_argument(
        "--out", type=Path, default=Path("trained"), help="checkpoints and pictures"
    )
    options = parser.parse_args(arguments)
    if min(options.steps, options.save_every) < 1:
        parser.error("--steps and --save-every must be at least 1")
    options.rate = options.rate or (6e-3 if options.size == "small" else 3e-4)
    options.prompt = options.prompt or ["The kernel ", "Each expert gets ", "`topk_ids`"]
    if len(options.prompt) > 4:
        parser.error(f"--prompt can be given four times; got {len(options.prompt)}")
    return options


def main(arguments: Sequence[str] | None = None) -> Result:
    """Trains, writes `losses.png` and `expert_load.png`, and continues some prompts."""
    options, console = parse(arguments), Console()
    options.out.mkdir(parents=True, exist_ok=True)
    result = train(options, console)
    if result.losses:
        first = result.step - len(result.losses) + 1
        draw_losses(result.losses, first, result.held_out, options.out / "losses.png")
        part = max(1, len(result.losses) // 10)
        heatmap.draw(
            result.loads[:part].sum(axis=0),
            result.loads[-part:].sum(axis=0),
            options.out / "expert_load.png",
            (
                f"steps {first} to {first + part - 1}",
                f"steps {result.step - part + 1} to {result.step}",
            ),
            across="expert",
        )
        console.print(f"wrote losses.png and expert_load.png into {options.out}", highlight=False)
    texts = complete(result.model, options.prompt, rows=4, width=32, num_tokens=48)
    for prompt, text in zip(options.prompt, texts, strict=True):
        console.print(f"{prompt!r} -> {text!r}", highlight=False, markup=False)
    return result


if __name__ == "__main__":
    main()
