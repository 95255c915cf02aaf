"""fused_moe beside vLLM's expert layer: the same weights, ids and routing weights, by two clocks.

python -m benchmarks.moe_layer --peers .peers --out results/moe_layer.jsonl

A layer is everything behind the router: the alignment where there is one, two grouped matrix
multiplications, the activation and the weighted sum. A measured step is four layers with weights of their
own, since repeated ones would be read from the L2 cache; both frameworks read the same memory. Theirs is one
CUDA graph of what `fused_experts` launches (benchmarks.vllm_moe says what stands in for what). Ours is one
jitted program. Before a time is taken, sampled tokens of the first and last layer are compared with float32
products of torch's.

    span   the device's time: of a graph by CUDA events around a replay; of a jitted step from its first
           kernel to its last one, by the profiler
    wall   the host's time of many steps after each other, of which it waits for the last one; ours with the
           results of the step before donated, and without

A model is a child process, and one that hangs or dies in a case is started again behind it.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Both frameworks share one GPU here; by default jax would take most of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks import machine, timing  # noqa: E402

LAYERS = 4  # of a step, each with weights of its own
_SAMPLED_TOKENS = 8
_BOUND = 1e-2
_TOKENS = (1, 16, 128, 1024, 8192)
_READ_BYTES = 1 << 30


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
            x, total = self.torch_x[int(t)].float(), 0.0
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


# -- clocks --------------------------------------------------------------------------------------------


def wall(run: Callable[[], Any], wait: Callable[[], Any], layer_us: float) -> list[float]:
    """µs per layer by the host's clock: steps after each other for about 50 ms a round."""
    steps = int(np.clip(50_000 / (LAYERS * max(layer_us, 1.0)), 3, 300))
    for _ in range(6):
        run()
    wait()
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(steps):
            run()
        wait()
        samples.append((time.perf_counter() - start) * 1e6 / steps / LAYERS)
    return samples


def spans(run: Callable[[], Any], executions: int) -> tuple[list[float], dict[str, Any]]:
    """µs per layer on the device, a value per step; and the kernels of a layer and their times."""
    import jax

    from moe_align_jax._cli import traces

    for _ in range(4):  # XLA records its CUDA graph after the first executions
        jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(executions):
                jax.block_until_ready(run())
                time.sleep(0.002)
        events = traces.gpu_events(traces.load(traces.newest_xplane(folder)))
    found = traces.span_per_call(events, executions=executions, calls=LAYERS)
    each = executions * LAYERS
    parts = {t.name[:60]: round(t.total_us / each, 2) for t in traces.totals(events)[:8]}
    facts = {"kernels": found.kernels_per_call, "parts": parts, "note": found.note}
    return found.us_per_call, facts


def read_rate() -> float:
    """GB/s of a kernel that reads 1 GiB: sums of float32 rows, by torch."""
    import torch

    shape = (4096, _READ_BYTES // 4 // 4096)
    many = [torch.zeros(shape, device="cuda") for _ in range(2)]
    outs = [torch.empty(shape[0], device="cuda") for _ in many]
    calls = [lambda x=x, o=o: torch.sum(x, 1, out=o) for x, o in zip(many, outs, strict=True)]
    return _READ_BYTES / timing.time_torch_graph(calls, replays=20).percentile(50) / 1e3


def statistics_of(samples: Sequence[float]) -> dict[str, Any]:
    low, middle, high = (round(float(np.percentile(samples, p)), 2) for p in (20, 50, 80))
    return {"us": middle, "p20_us": low, "p80_us": high, "samples": len(samples)}


# -- providers -----------------------------------------------------------------------------------------


def make_step(case: Case, block_size: int | None) -> tuple[Callable, tuple]:
    """(`step(outs, *rest) -> outs`, rest): four layers, one after the other."""
    import jax

    import moe_align_jax as maj

    def step(outs, x, weights, ids, sets):
        del outs  # donated: the results may stand where those of the step before stood
        found = []
        for w13, w2 in sets:
            if found:  # the next layer waits for this one, as in a model
                x, found[-1] = jax.lax.optimization_barrier((x, found[-1]))
            found.append(
                maj.fused_moe(x, w13, w2, weights, ids, transpose_rhs=True, block_size=block_size)
            )
        return found

    return step, (case.x, case.weights, case.ids, list(case.sets))


def measure_ours(
    case: Case, block_size: int | None, executions: int, clocks: bool
) -> Iterator[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    step, rest = make_step(case, block_size)
    programs = {
        "donated": jax.jit(step, donate_argnums=0, keep_unused=True),
        "not donated": jax.jit(step, keep_unused=True),
    }
    if not clocks:
        programs.pop("not donated")
    span_us = 100.0
    for way, program in programs.items():
        held = [[jnp.full_like(case.x, jnp.nan) for _ in range(LAYERS)]]

        def run(program=program, held=held, way=way):
            outs = program(held[0], *rest)
            held[0] = outs
            return outs

        begun = time.perf_counter()
        first = jax.block_until_ready(run())
        compiled_s = round(time.perf_counter() - begun, 2)
        if wrong := case.wrong(lambda layer, outs=first: np.asarray(outs[layer][case.sample])):
            yield {"clock": "span", "way": way, "status": "failed", "reason": wrong}
            return
        if way == "donated":
            samples, facts = spans(run, executions)
            if not samples:
                yield {"clock": "span", "way": way, "status": "failed", "reason": facts["note"]}
            else:
                row = statistics_of(samples)
                span_us = row["us"]
                yield {"clock": "span", "way": way, "compiled_s": compiled_s} | row | facts
        if clocks:
            samples = wall(run, lambda held=held: jax.block_until_ready(held[0]), span_us)
            yield {"clock": "wall", "way": way} | statistics_of(samples)
        last = held[0]
        if wrong := case.wrong(lambda layer, outs=last: np.asarray(outs[layer][case.sample])):
            yield {"clock": "wall", "way": way, "status": "failed", "reason": f"later: {wrong}"}


def measure_vllm(case: Case, folder: str, replays: int) -> Iterator[dict[str, Any]]:
    import torch

    from benchmarks import vllm_moe

    model = case.model
    layer = vllm_moe.Layer(folder, case.tokens, model.top_k, model.experts, model.hidden, model.ffn)
    outs = [torch.full_like(case.torch_x, float("nan")) for _ in range(LAYERS)]
    calls = vllm_moe.calls(
        layer, case.torch_x, case.torch_sets, case.torch_weights, case.torch_ids, outs
    )
    graph = timing.capture_torch(calls)
    for out in outs:
        out.fill_(float("nan"))
    graph.replay()
    rows = torch.from_numpy(case.sample).cuda()
    if wrong := case.wrong(lambda i: outs[i][rows].float().cpu().numpy()):
        yield {"clock": "span", "way": "graph", "status": "failed", "reason": wrong}
        return
    [taken] = timing.time_torch_graphs([(graph, LAYERS)], replays=replays)
    row = statistics_of(taken.samples_us)
    facts = {"config": layer.config, "config_from": layer.source, "aligned": layer.aligns}
    yield {"clock": "span", "way": "graph"} | row | facts
    samples = wall(graph.replay, torch.cuda.synchronize, row["us"])
    yield {"clock": "wall", "way": "graph"} | statistics_of(samples)


# -- a child per model ---------------------------------------------------------------------------------


def run_model(model: Model, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of every batch size, as they come."""
    import torch

    import moe_align_jax as maj

    rate = read_rate()
    sets = make_sets(model)
    for tokens in options.tokens:
        case = Case(model, tokens, sets)
        floor_us = layer_bytes(model, tokens, case.hit) / rate / 1e3
        head = {"model": model.name, **model._asdict(), "tokens": tokens, "experts_hit": case.hit}
        del head["name"]
        head |= {"read_gbps": round(rate, 1), "floor_us": round(floor_us, 2)}
        shape = (model.experts, model.hidden, model.ffn)
        form = maj.select_moe_implementation(
            (tokens, model.hidden), shape, top_k=model.top_k, transpose_rhs=True
        )
        providers: dict[str, Callable] = {
            "vllm": lambda case=case: measure_vllm(case, options.peers, options.replays),
            "fused_moe": lambda case=case: measure_ours(case, None, options.executions, True),
        }
        if options.variants:
            pairs = tokens * model.top_k
            providers = {} if options.variants == "only" else providers
            for block in (8, 16, 32, 64, 128):
                if 4 * pairs > model.experts and pairs / 4 < block * model.experts < 40 * pairs:
                    name = f"fused_moe, blocks of {block}"
                    providers[name] = lambda case=case, block=block: measure_ours(
                        case, block, options.executions, False
                    )
        for provider, measure in providers.items():
            row = head | {"provider": provider, "status": "ok"}
            row |= {"form": form.form} if provider == "fused_moe" else {}
            try:
                for more in measure():
                    yield row | more
            except Exception as error:  # one provider's failure leaves the others their time
                text = f"{type(error).__name__}: {error}"[:600]
                yield row | {"status": "failed", "reason": text}
        del case
        torch.cuda.empty_cache()


def line(row: dict[str, Any]) -> str:
    name = f"{row['model']:16} T {row['tokens']:5} {row['provider']:26}"
    if "us" not in row:
        return f"{name} {row.get('clock', '')} {row['status']}: {row.get('reason', '')}"
    more = f"  {row['us'] / row['floor_us']:.2f} of the read"
    if row.get("parts"):
        parts = ", ".join(f"{n[:28]} {us}" for n, us in row["parts"].items())
        more += f"  {row['kernels']:g} kernels: {parts}"
    elif "config" in row:
        more += f"  {row['config_from']}"
    return f"{name} {row['clock']} {row['way']:11} {row['us']:9.2f} us{more}"


def ratios(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """vLLM's time over ours, per case and clock, and the geometric means."""
    every: dict[str, list[float]] = {}
    for key in dict.fromkeys((r["model"], r["tokens"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["tokens"]) == key and "us" in r]
        text = []
        for clock, way in (("span", "donated"), ("wall", "donated"), ("wall", "not donated")):
            timed = {(r["provider"], r["clock"], r["way"]): r["us"] for r in mine}
            ours, theirs = timed.get(("fused_moe", clock, way)), timed.get(("vllm", clock, "graph"))
            if ours and theirs:
                text.append(f"{clock} {way} {theirs / ours:.3f} ({theirs:.1f} / {ours:.1f})")
                every.setdefault(f"{clock} {way}", []).append(theirs / ours)
        yield f"{key[0]:16} T {key[1]:5}  " + ", ".join(text)
    for name, found in every.items():
        mean = float(np.exp(np.mean(np.log(found))))
        yield f"geometric mean of {len(found)}, {name}: {mean:.3f}; least {min(found):.3f}"


def child(options: argparse.Namespace) -> int:
    [model] = [m for m in MODELS if m.name == options.child]
    facts = machine.facts(options.commit)
    for row in run_model(model, options):
        print("ROW " + json.dumps(facts | row), flush=True)
    return 0


def children(
    model: Model, argv: Sequence[str], options: argparse.Namespace, until: float
) -> Iterator[dict[str, Any]]:
    """Rows of a model. A child that is silent for too long is ended, and another goes on behind its case."""
    tokens, start = list(options.tokens), time.monotonic()
    while tokens and time.monotonic() < until:
        chosen = ",".join(map(str, tokens))
        command = [sys.executable, "-m", "benchmarks.moe_layer", *argv]
        command += ["--child", model.name, "--tokens", chosen]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=machine.ROOT)
        lines: queue.Queue = queue.Queue()

        def read(process=process, lines=lines):
            with process.stdout:
                for text in process.stdout:
                    lines.put(text)
            lines.put(None)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        seen: list[int] = []
        reason, patience = "", options.patience + 30  # its imports and weights
        while True:
            left = min(patience, until - time.monotonic())
            try:
                text = lines.get(timeout=max(left, 0.1))
            except queue.Empty:
                reason = f"silent for {left:.0f} s" if left >= patience else "no time was left"
                process.kill()
                break
            if text is None:
                break
            patience = options.patience
            if text.startswith("ROW "):
                row = json.loads(text[4:])
                seen.append(row["tokens"])
                yield row
            else:
                print(text, end="", flush=True)
        code = process.wait()
        reader.join(timeout=5)
        if not code and not reason:
            return
        # The case behind the last row, or the one that was under way.
        at = tokens.index(seen[-1]) if seen else 0
        reason = reason or f"its process ended with {code}"
        row = {"model": model.name, "tokens": tokens[at], "provider": "child", "status": "failed"}
        yield row | {"reason": f"{reason}, after {time.monotonic() - start:.0f} s, in or behind it"}
        tokens = tokens[at + 1 :]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    numbers = lambda text: [int(t) for t in text.split(",")]  # noqa: E731
    parser.add_argument("--peers", default=".peers", help="folder of benchmarks.fetch")
    parser.add_argument("--out", metavar="FILE", help="JSONL to append to")
    parser.add_argument("--models", default="", help="parts of names, comma-separated; all")
    parser.add_argument("--tokens", type=numbers, default=list(_TOKENS), help="batch sizes")
    parser.add_argument("--executions", type=int, default=10, help="traced steps")
    parser.add_argument("--replays", type=int, default=20, help="timed replays of a graph")
    parser.add_argument("--patience", type=float, default=25.0, help="seconds without a row")
    parser.add_argument("--budget", type=float, default=230.0, help="seconds in all")
    parser.add_argument("--commit", help="the commit to record, where git is not at hand")
    parser.add_argument(
        "--variants", nargs="?", const="also", choices=("also", "only"), help="other block sizes"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(argv)
    if options.child:
        return child(options)
    wanted = [part for part in options.models.split(",") if part]
    models = [m for m in MODELS if not wanted or any(part in m.name for part in wanted)]
    if not models:
        parser.error(f"no model of {', '.join(m.name for m in MODELS)} is named so")
    until, rows = time.monotonic() + options.budget, []
    for i, model in enumerate(models):
        # What one model leaves of its share is the next one's.
        share = (until - time.monotonic()) / (len(models) - i)
        for row in children(model, argv, options, time.monotonic() + share):
            rows.append(row)
            print(line(row), flush=True)
            if options.out:
                with Path(options.out).open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print("\n".join(ratios(rows)))
    return 0 if any("us" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
