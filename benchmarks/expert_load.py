"""What recording expert load costs a forward pass: paired runs of a jitted program with and without it.

python -m benchmarks.expert_load --sglang-eplb .peers/sgl_eplb.py --out ROWS.jsonl

One program aligns L layers, unrolled or scanned. Recording is compiled out ("off"), or writes the row
of the pass ("on"); baselines beside it add to a histogram in every layer, in jax, and from PyTorch as
one CUDA graph of L hooks: a masked scatter-add as SGLang began with, its present Triton kernel that maps
and counts, and ours. Every count is compared with NumPy's before anything is timed.
"""

import argparse
import functools
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

# Both frameworks share one GPU here; by default jax would take most of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks import machine, timing  # noqa: E402
from benchmarks.rows import Row, Writer  # noqa: E402
from moe_align_jax import _traces as traces  # noqa: E402

BLOCK = 16
RING = 8  # passes: enough to wrap


class Size(NamedTuple):
    """One forward pass: L layers of `[tokens, top_k]` ids over E experts."""

    name: str
    tokens: int
    layers: int = 58
    experts: int = 256
    top_k: int = 8

    def ids(self, seed: int = 0) -> np.ndarray:
        """`[L, tokens, top_k]` int32; no expert twice in a token, some tokens are padding (-1)."""
        rng = np.random.default_rng(seed)
        score = rng.random((self.layers, self.tokens, self.experts))
        ids = np.argpartition(score, self.top_k - 1, axis=-1)[..., : self.top_k].astype(np.int32)
        ids[:, self.tokens - self.tokens // 16 :] = -1
        return ids

    def counts(self, ids: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(i[i >= 0], minlength=self.experts) for i in ids])


SIZES = (Size("decode", 128), Size("prefill", 4096))


# -- jax ------------------------------------------------------------------------------------------


class StatefulStep(NamedTuple):
    """A jitted `(state, ids, maps, pass_id) -> (outputs, state)`, its fresh state, its counts.

    `counts(state)` is the last pass's `[L, E]`, or None where nothing was recorded.
    """

    name: str
    step: Callable
    state: Any
    counts: Callable[[Any], np.ndarray | None]


def programs(size: Size, scanned: bool) -> list[StatefulStep]:
    import jax
    import jax.numpy as jnp

    import moe_align_jax as maj

    align = functools.partial(maj.moe_align_block_size, block_size=BLOCK, num_experts=size.experts)
    make = functools.partial(
        maj.init_expert_load,
        num_layers=size.layers,
        num_physical_experts=size.experts,
        num_passes=RING,
        recording=True,
    )

    def last(load):
        return maj.collect_expert_load(load).logical_count[-1]

    def layers(ids, with_counts):
        """Every layer's blocks, and their counts where these are asked for."""
        if not scanned:
            found = [align(one) for one in ids]
            return [x[:3] for x in found], [x.tokens_per_expert for x in found]

        def body(carry, one):
            found = align(one)
            return carry, (found[:3], found.tokens_per_expert if with_counts else None)

        return jax.lax.scan(body, 0, ids)[1]

    def record(load, ids, maps, pass_id, *, own=False):
        blocks, counts = layers(ids, load.mode is not None)
        load = maj.record_expert_load(
            load,
            None,
            counts,
            physical_to_logical_map=maps if load.layout and load.layout.has_map else None,
            forward_pass_id=None if own else pass_id,
        )
        return blocks, load

    def scatter(data, ids, maps, pass_id):
        """A histogram beside the alignment, which does not know that it has one."""

        def add(row, one):
            slot = jnp.where(one < 0, size.experts, one).reshape(-1)
            return row.at[slot].add(1, mode="drop")

        if scanned:

            def body(data, given):
                layer, one = given
                return data.at[layer].set(add(data[layer], one)), align(one)[:3]

            data, blocks = jax.lax.scan(body, data, (jnp.arange(size.layers), ids))
            return blocks, data
        blocks = [align(one)[:3] for one in ids]
        return blocks, [add(row, one) for row, one in zip(data, ids, strict=True)]

    jit = functools.partial(jax.jit, donate_argnums=0)
    rows = jnp.zeros((size.layers, size.experts), jnp.int32)
    found = [
        StatefulStep("off", jit(record), make(None), lambda load: None),
        StatefulStep("on", jit(record), make("stat"), last),
        StatefulStep(
            "on, with a map", jit(record), make("stat", num_logical_experts=size.experts), last
        ),
        StatefulStep(
            "on, counting passes", jit(functools.partial(record, own=True)), make("stat"), last
        ),
    ]
    state = rows if scanned else list(rows)
    found.append(
        StatefulStep(
            "scatter-add per layer", jit(scatter), state, lambda d: np.stack(jax.device_get(d))
        )
    )
    return found


def measure(size: Size, scanned: bool, executions: int) -> list[dict[str, Any]]:
    """Runs all programs in turn, again and again, in one trace: the pairs share whatever drifts."""
    import jax
    import jax.numpy as jnp

    host = size.ids()
    ids = jnp.asarray(host) if scanned else [jnp.asarray(one) for one in host]
    maps = jnp.tile(jnp.arange(size.experts, dtype=jnp.int32), (size.layers, 1))
    numbers = [jnp.int32(i) for i in range(executions + 5)]
    chosen = programs(size, scanned)
    states = [program.state for program in chosen]
    on_gpu = jax.devices()[0].platform != "cpu"

    def run(i: int, number: int) -> float:
        start = time.perf_counter()
        outputs, states[i] = chosen[i].step(states[i], ids, maps, numbers[number])
        jax.block_until_ready((outputs, states[i]))
        return (time.perf_counter() - start) * 1e6

    for i, program in enumerate(chosen):
        run(i, 0)
        found = program.counts(states[i])
        if found is not None:
            np.testing.assert_array_equal(found, size.counts(host), program.name)
        for warm in range(1, 5):  # XLA records its CUDA graph after the first executions
            run(i, warm)
    walls: list[list[float]] = [[] for _ in chosen]
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for execution in range(executions):
                for i in range(len(chosen)):
                    walls[i].append(run(i, 5 + execution))
                    if on_gpu:
                        time.sleep(traces.REST_S)
        events = traces.gpu_events(traces.load(traces.newest_xplane(folder)))
    spans = traces.spans_in_order(events, executions=1, calls=[1] * (executions * len(chosen)))
    rows = []
    per_program = [
        [spans[e * len(chosen) + i] for e in range(executions)] for i in range(len(chosen))
    ]
    traced = all(s.us_per_call for mine in per_program for s in mine)
    samples = [[s.us_per_call[0] for s in mine] if traced else wall
               for mine, wall in zip(per_program, walls, strict=True)]  # fmt: skip
    kernels = [sorted({s.kernels_per_call for s in mine}) if traced else [] for mine in per_program]
    for program, mine, seen in zip(chosen, samples, kernels, strict=True):
        row = _row(size, "scanned" if scanned else "unrolled", program.name, mine)
        row["metric"] = "span_us" if traced else "wall_us"
        row["extra_us"] = _median(a - b for a, b in zip(mine, samples[0], strict=True))
        if len(seen) == 1 and len(kernels[0]) == 1:
            row["kernels"] = int(seen[0])
            row["extra_kernels"] = int(seen[0] - kernels[0][0])
        rows.append(row)
    return rows


def _row(size: Size, program: str, provider: str, samples: Sequence[float]) -> dict[str, Any]:
    return {
        "case": size.name,
        **{k: getattr(size, k) for k in ("tokens", "layers", "experts", "top_k")},
        "program": program,
        "provider": provider,
        "us": _median(samples),
        "p20_us": round(float(np.percentile(samples, 20)), 3),
        "p80_us": round(float(np.percentile(samples, 80)), 3),
        "samples": len(samples),
    }


def _median(samples: Any) -> float:
    return round(statistics.median(samples), 3)


# -- torch ----------------------------------------------------------------------------------------


def torch_rows(size: Size, eplb_file: str | None, replays: int) -> list[dict[str, Any]]:
    """One forward pass of hooks as a CUDA graph; on a CPU the same calls by wall time."""
    import torch

    from torch_bridge import sglang

    device = "cuda" if torch.cuda.is_available() else "cpu"
    host = size.ids()
    ids = [torch.from_numpy(one).to(device) for one in host]
    data = torch.zeros(size.layers, size.experts, dtype=torch.int32, device=device)

    def scatter_add() -> None:
        for layer, one in enumerate(ids):
            flat = one.flatten()
            valid = flat != -1
            slot = torch.where(valid, flat, 0).long()
            data[layer].scatter_add_(0, slot, valid.int())

    every = torch.arange(size.experts, dtype=torch.int32, device=device)
    location = SimpleNamespace(
        physical_to_logical_map=every.repeat(size.layers, 1),
        num_logical_experts=size.experts,
        ep_size=1,
    )
    recorder = sglang.ExpertDistributionRecorder.init_new(
        location, 0, mode="stat", buffer_size=RING
    )
    recorder.start_record()
    buffers = [recorder.get_current_pass_count_buffer(layer) for layer in range(size.layers)]
    counts = torch.from_numpy(size.counts(host)).int().to(device)

    def ours() -> None:
        for layer, one in enumerate(ids):
            with recorder.with_current_layer(layer):
                recorder.on_select_experts(one)

    def ours_from_counts() -> None:
        for layer in range(size.layers):
            with recorder.with_current_layer(layer):
                recorder.on_tokens_per_expert(counts[layer])

    def of_ours() -> torch.Tensor:
        return torch.stack([buffer for buffer in buffers if buffer is not None])

    def clear() -> None:
        for buffer in (data, *buffers):
            if buffer is not None:
                buffer.zero_()

    providers: list[tuple[str, Callable[[], None], Callable[[], torch.Tensor]]] = [
        ("torch: masked scatter-add per layer", scatter_add, lambda: data),
        ("torch_bridge.sglang recorder, from ids", ours, of_ours),
        ("torch_bridge.sglang recorder, from counts", ours_from_counts, of_ours),
    ]
    if eplb_file and device == "cuda":
        record_fused = _fused(eplb_file)
        dispatch = SimpleNamespace(
            ep_dispatch_algorithm="static",
            partial_logical_to_rank_dispatch_physical_map=every,
        )

        def fused() -> None:
            for layer, one in enumerate(ids):
                record_fused(one, dispatch, data[layer], None)

        providers.append(
            ("SGLang: map and count, one Triton launch per layer", fused, lambda: data)
        )
    rows = []
    for name, call, result in providers:
        clear()
        call()
        np.testing.assert_array_equal(result().cpu().numpy(), size.counts(host), name)
        if device == "cuda":
            found = timing.time_torch_graph([call] * 4, replays=replays)
        else:
            found = timing.time_wall(call, calls=1, repeats=3)
        row = _row(size, "hooks alone", name, found.samples_us)
        rows.append(row | {"metric": found.metric, "extra_us": row["us"]})
    return rows


def _fused(path: str) -> Callable[..., Any]:
    """`eplb_map_and_record_fused` of the file that `benchmarks.fetch` keeps."""
    spec = importlib.util.spec_from_file_location("sgl_eplb", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"--sglang-eplb must be a Python file; got {path}. Fetch it.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.eplb_map_and_record_fused


# -- the command ----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", metavar="FILE", help="JSONL to append to")
    parser.add_argument("--sglang-eplb", metavar="PATH", help="SGLang's eplb_map_record_fused.py")
    parser.add_argument("--cases", default="", help="of decode, prefill; both by default")
    parser.add_argument("--programs", default="unrolled,scanned,torch")
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--tokens", type=int, help="instead of each case's own")
    parser.add_argument("--executions", type=int, default=30, help="paired runs in a trace")
    parser.add_argument("--commit", help="the commit to record, where git is not at hand")
    options = parser.parse_args(argv)
    wanted = [name for name in options.cases.split(",") if name]
    rows: list[Row] = []
    out = Writer(options.out, machine.facts(options.commit))
    for size in SIZES:
        if wanted and size.name not in wanted:
            continue
        size = size._replace(
            layers=options.layers,
            experts=options.experts,
            top_k=options.top_k,
            tokens=options.tokens or size.tokens,
        )
        for program in options.programs.split(","):
            if program == "torch":
                found = torch_rows(size, options.sglang_eplb, options.executions)
            else:
                found = measure(size, program == "scanned", options.executions)
            for row in found:
                kernels = f"{row['extra_kernels']:+d}" if "extra_kernels" in row else "?"
                print(
                    f"{row['case']:8} {row['program']:11} {row['provider']:50} {row['us']:10.2f} µs  "
                    f"more: {row['extra_us']:9.2f} µs, {kernels} kernels",
                    flush=True,
                )
            rows += found
            out.write(found)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
