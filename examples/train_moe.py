"""Trains a small Mixture-of-Experts language model in Flax NNX, saves it, restores it, and decodes with it.

Bytes in, bytes out: the text is this repository's own documentation and licence, or any file. The model is
`moe_language_model.py`: its experts are `moe_align_jax.fused_moe` behind `moe_align_jax.route_topk`. On a CPU
the small one learns in a minute; on a GPU the large one runs on the kernels.
Run it: `python examples/train_moe.py --out trained`, or `make train-example`. A second run with the same
folder goes on from the newest checkpoint.

B sequences, S positions, T = B * S tokens, E experts, L layers, V = 256 bytes.
"""

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from moe_language_model import Config, Model, complete, forward
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_align_jax import load_balancing_loss, select_moe_implementation

_HELD_OUT_BATCHES = 8
ROOT = Path(__file__).resolve().parents[1]
# The model, sequences in a batch, and their length.
SIZES = {
    "small": (Config(2, 64, 4, 8, 2, 64, "float32"), 16, 64),
    "large": (Config(8, 1024, 16, 64, 8, 512, "bfloat16"), 32, 512),
}


# -- training ---------------------------------------------------------------------------------------------


def balance_loss(router_logits: jax.Array, tokens_per_expert: jax.Array) -> jax.Array:
    """Switch Transformer's load-balancing loss, the mean over the layers: 1 for an even load."""
    return jnp.mean(jax.vmap(load_balancing_loss)(router_logits, tokens_per_expert))


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


def draw_load(loads: dict[str, np.ndarray], path: Path) -> None:
    """Writes heat maps of layers x experts as a PNG, by title, each layer relative to its own mean."""
    figure = Figure(figsize=(11, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(loads), sharey=True)
    relative = [
        load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9) for load in loads.values()
    ]
    most = max(part.max() for part in relative)
    for axis, part, title in zip(axes, relative, loads, strict=True):
        image = axis.imshow(part, aspect="auto", interpolation="nearest", vmin=0, vmax=most)
        axis.set(title=title, xlabel="expert")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes), label="load / mean load of the layer")
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
    # Of one batch alone the mean would depend on which few places of the text it happens to have.
    held = [
        batch_of(held_out, number, batch=batch, length=length, seed=options.seed)
        for number in range(_HELD_OUT_BATCHES)
    ]
    result = Result(
        [float(nats) for nats in losses],
        np.array([np.asarray(load) for load in loads]).reshape(-1, config.layers, config.experts),
        step,
        float(np.mean([cross_entropy(forward(model, t[:, :-1]), t[:, 1:]) for t in held])),
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
        loads = {
            f"steps {first} to {first + part - 1}": result.loads[:part].sum(axis=0),
            f"the last {part}, to {result.step}": result.loads[-part:].sum(axis=0),
        }
        draw_load(loads, options.out / "expert_load.png")
        console.print(f"wrote losses.png and expert_load.png into {options.out}", highlight=False)
    texts = complete(result.model, options.prompt, rows=4, width=32, num_tokens=48)
    for prompt, text in zip(options.prompt, texts, strict=True):
        console.print(f"{prompt!r} -> {text!r}", highlight=False, markup=False)
    return result


if __name__ == "__main__":
    main()
