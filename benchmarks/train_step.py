"""A whole training step of the example's model (examples/train_moe.py) by wall clock, its experts by several
libraries.

python -m benchmarks.train_step --out ROWS.jsonl

Everything but the experts is the same: Flax NNX, attention, AdamW, the text of the documentation. The peers'
experts are `training_peers.layer`: sort, gather, two grouped products, a weighted sum. `--size large` is 8
layers of 64 experts, 16,384 tokens in a batch; `small` is for a CPU.

Each library trains for `--steps` steps from the same weights on the same batches. Time: of a step, the host
waiting behind each, median. Each row holds the losses, which are compared with those of the first library,
the most memory that jax had on the device, and XLA_FLAGS. With --xla_gpu_enable_triton_gemm=false there the
dense products are cuBLAS': XLA's own, in Triton, take tens of seconds to tune. A library that fails, or runs
out of memory, is a row that says so.
"""

import argparse
import functools
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks import case_processes, children, training_peers  # noqa: E402
from benchmarks.rows import failed, read  # noqa: E402

_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# The losses of bfloat16 steps differ by the order of sums alone.
_BOUND = 2e-2


class Experts(NamedTuple):
    """By which library; `training_peers.layers` names the peers."""

    name: str


PROVIDERS = (
    Experts("ours"),
    Experts("tokamax mosaic, weights' gradient triton"),
    Experts("tokamax triton"),
    Experts("haliax triton_tile_map"),
    Experts("lax.ragged_dot"),
)


def experts_by(name: str, config: Any, tokens: int) -> Callable[..., Any] | None:
    """What takes the place of `fused_moe` in the model; None for ours."""
    import jax.numpy as jnp

    if name == "ours":
        return None
    sizes = (tokens, config.hidden, config.ffn, config.experts, config.top_k)
    layer = dict(training_peers.layers(*sizes))[name]()

    def experts(x, gate_up, down, weights, ids, *, return_tokens_per_expert):
        assert return_tokens_per_expert
        counts = jnp.bincount(ids.reshape(-1), length=config.experts).astype(jnp.int32)
        return layer(x, gate_up, down, weights, ids), counts

    return experts


def case_of(options: argparse.Namespace) -> str:
    return f"training step, {options.size}"


def run_case(provider: Experts, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row."""
    row: dict[str, Any] = {"case": case_of(options), "provider": provider.name}
    row["xla_flags"] = os.environ.get("XLA_FLAGS", "")  # they may say whose dense products run
    try:
        row |= _train(provider, options)
    except Exception as error:
        row |= failed(error)
    yield row


def _train(provider: Experts, options: argparse.Namespace) -> dict[str, Any]:
    if str(_EXAMPLES) not in sys.path:
        sys.path.insert(0, str(_EXAMPLES))
    import jax

    moe_language_model: Any = importlib.import_module("moe_language_model")
    train_moe: Any = importlib.import_module("train_moe")
    config, batch, length = train_moe.SIZES[options.size]
    ours = moe_language_model.fused_moe
    text, _ = train_moe.read_text(None)
    make_batch = functools.partial(train_moe.batch_of, text, batch=batch, length=length, seed=0)
    batches = [jax.device_put(make_batch(step)) for step in range(options.steps)]
    model, optimizer = train_moe.make(config, seed=0, rate=1e-3)
    count = sum(p.size for p in jax.tree.leaves(train_moe.nnx.state(model, train_moe.nnx.Param)))
    try:
        experts = experts_by(provider.name, config, batch * length)
        if experts is not None:
            moe_language_model.fused_moe = experts
        # A program of its own: the example's is compiled once, whatever the experts are by then.
        jitted = train_moe.nnx.jit(train_moe.train_step.__wrapped__, donate_argnums=(0, 1))
        step = functools.partial(jitted, model, optimizer)
        losses = [jax.block_until_ready(step(batches[0]))[0]]  # compiles
        seconds = []
        children.wait_for_turn()
        for tokens in batches[1:]:
            begun = time.perf_counter()
            loss, _ = jax.block_until_ready(step(tokens))
            seconds.append(time.perf_counter() - begun)
            losses.append(loss)
    finally:
        moe_language_model.fused_moe = ours
    memory = jax.devices()[0].memory_stats() or {}
    taken = (
        np.percentile(seconds[len(seconds) // 3 :], (50, 20, 80)) * 1e6
    )  # the first are not steady
    return {
        "status": "ok",
        "metric": "wall_us",
        **dict(zip(("us", "p20_us", "p80_us"), taken.round(1).tolist(), strict=True)),
        "tokens": batch * length,
        "parameters": int(count),
        "peak_mib": round(memory.get("peak_bytes_in_use", 0) / 2**20),
        "losses": [round(float(loss), 4) for loss in losses],
    }


def line(row: dict[str, Any]) -> str:
    name = f"{row['case']:24} {row['provider']:42}"
    if "us" not in row:
        return f"{name} {row['status']}: {row['reason']}"
    first, last = row["losses"][0], row["losses"][-1]
    return f"{name} {row['us']:10.1f} us {row['peak_mib']:8} MiB, loss {first} to {last}"


def ratios(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Nothing of one row: `compare` reads the file that all are in."""
    yield from ()


def compare(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Each library's time over ours, and where its losses are others."""
    ours = next((row for row in rows if row["provider"] == "ours" and "us" in row), None)
    if ours is None:
        return
    for row in rows:
        if row is ours or "us" not in row:
            continue
        far = float(np.max(np.abs(np.array(row["losses"]) - np.array(ours["losses"]))))
        wrong = "" if far < _BOUND else f", but its losses differ by up to {far:.3f}"
        yield f"{row['provider']}: {row['us'] / ours['us']:.2f} of ours{wrong}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=["small", "large"], default="large")
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--sizes", default="", help="numbers of the libraries to run, e.g. 0,4")
    case_processes.add_arguments(parser, patience=120)
    options = parser.parse_args(argv)
    code = case_processes.run(
        *("benchmarks.train_step", argv, options, PROVIDERS, run_case, line, ratios),
        case_processes.chosen(options, PROVIDERS),
    )
    if options.child is None and options.out and Path(options.out).exists():
        rows = read([options.out])
        newest = {row["provider"]: row for row in rows if row["case"] == case_of(options)}
        print("\n".join(compare([*newest.values()])), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
