"""fused_moe beside vLLM's expert layer: the same weights, ids and routing weights, by two clocks.

python -m benchmarks.moe_layer --peers .peers --out results/moe_layer.jsonl

A layer is everything behind the router: the alignment where there is one, two grouped matrix
multiplications, the activation and the weighted sum. A measured step is four layers with weights of their
own, since repeated ones would be read from the L2 cache; both frameworks read the same memory. Theirs is one
CUDA graph of what `fused_experts` launches (benchmarks.vllm_moe says what stands in for what). Ours is one
jitted program. Before a time is taken, sampled tokens of the first and last layer are compared with float32
products of torch's.

    span   the device's time: of a graph by CUDA events around a replay; of a jitted step from its first
           kernel to its last one, by the profiler; replays and steps rest for 2 ms behind each
    wall   the host's time of steady steps after each other, without what a round of them costs once, in
           turns; ours with the results of the step before donated, and without

A model is a child process. All of them compile at the same time; then they measure one after the other. One
that hangs or dies in a case is started again behind it.
"""

import argparse
import concurrent.futures
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

# Both frameworks share one GPU here; by default jax would take most of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks import case_processes, children, timing  # noqa: E402
from benchmarks.children import Child  # noqa: E402
from benchmarks.moe_cases import (  # noqa: E402
    LAYERS,
    MODELS,
    OTHERS,
    Case,
    Model,
    layer_bytes,
    make_sets,
)
from benchmarks.rows import Writer, failed, statistics_of  # noqa: E402

MODULE = "benchmarks.moe_layer"
_TOKENS = (1, 16, 128, 1024, 8192)
_TURNS = 2  # by the host's clock: each of three follows each other
_COOL_S = 0.5  # behind steps at the power limit, whose clock the GPU keeps for a while


# -- clocks --------------------------------------------------------------------------------------------


def spans(run: Callable[[], Any], executions: int) -> tuple[list[float], dict[str, Any]]:
    """µs per layer on the device, a value per step; and the kernels of a layer and their times."""
    import jax

    from moe_align_jax import _traces as traces

    for _ in range(4):  # XLA records its CUDA graph after the first executions
        jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(executions):
                jax.block_until_ready(run())
                time.sleep(traces.REST_S)
        events = traces.gpu_events(traces.load(traces.newest_xplane(folder)))
    found = traces.span_per_call(events, executions=executions, calls=LAYERS)
    each = executions * LAYERS
    parts = {t.name[:60]: round(t.total_us / each, 2) for t in traces.totals(events)[:8]}
    facts = {"kernels": found.kernels_per_call, "parts": parts, "note": found.note}
    return found.us_per_call, facts


# -- providers -----------------------------------------------------------------------------------------


def step_of(block_size: int | None) -> Callable:
    """`step(outs, x, weights, ids, sets) -> outs`: four layers, one after the other."""
    import jax

    import moe_align_jax as maj

    def step(outs, x, weights, ids, sets):
        del outs  # donated: the results may stand where those of the step before stood
        found = []
        for (w13, w2), own in zip(sets, ids, strict=True):
            if found:  # the next layer waits for this one, as in a model
                x, found[-1] = jax.lax.optimization_barrier((x, found[-1]))
            found.append(
                maj.fused_moe(x, w13, w2, weights, own, transpose_rhs=True, block_size=block_size)
            )
        return found

    return step


def rest_of(case: Case) -> tuple:
    """A step's arguments behind the first. Each layer has ids of its own, so that XLA cannot align once for
    all of them."""
    return (case.x, case.weights, [case.ids] * LAYERS, list(case.sets))


def structs_of(model: Model, tokens: int) -> tuple:
    """The arguments of a step without their values, the first included."""
    import jax

    def struct(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    x = struct("bfloat16", tokens, model.hidden)
    pairs = (tokens, model.top_k)
    first = struct("bfloat16", model.experts, 2 * model.ffn, model.hidden)
    second = struct("bfloat16", model.experts, model.hidden, model.ffn)
    sets = [(first, second)] * LAYERS
    return [x] * LAYERS, x, struct("float32", *pairs), [struct("int32", *pairs)] * LAYERS, sets


def compile_ours(
    cases: Sequence[Case], block_sizes: Sequence[int | None], both: bool
) -> dict[tuple[int, int | None, str], Any]:
    """Programs by (tokens, block size, way), or the error that one ended with; compiled side by side."""
    import jax

    found, compiling = {}, {}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for case in cases:
            for block_size in block_sizes:
                step, structs = step_of(block_size), structs_of(case.model, case.tokens)
                for way in ("donated", "not donated") if both else ("donated",):
                    key = case.tokens, block_size, way
                    given: dict[str, Any] = {"donate_argnums": 0} if way == "donated" else {}
                    try:
                        lowered = jax.jit(step, keep_unused=True, **given).lower(*structs)
                        compiling[key] = pool.submit(lowered.compile)
                    except Exception as error:  # one that cannot be built leaves the others
                        found[key] = error
        for key, future in compiling.items():
            found[key] = future.exception() or future.result()
    return found


class Wall(NamedTuple):
    """Steps that follow each other, to be timed by the host's clock.

    Attributes:
        way: how they are called.
        run: one step.
        wait: until the last one has ended.
        layer_us: about the time of a layer.
        wrong: "" where the last results are right.
    """

    way: str
    run: Callable[[], Any]
    wait: Callable[[], Any]
    layer_us: float
    wrong: Callable[[], str]

    def time(self) -> timing.Timing:
        """
        Raises:
            ValueError: the results are wrong.
        """
        samples = timing.steady_steps(self.run, self.wait, self.layer_us, LAYERS)
        if wrong := self.wrong():
            raise ValueError(f"later: {wrong}")
        return timing.Timing("wall_us", samples, LAYERS)


def measure_ours(
    case: Case, programs: dict[str, Any], executions: int, clocks: bool
) -> Iterator[dict[str, Any] | Wall]:
    import jax
    import jax.numpy as jnp

    rest = rest_of(case)
    span_us = 100.0
    for way, program in programs.items():
        if isinstance(program, BaseException):
            raise program
        held = [[jnp.full_like(case.x, jnp.nan) for _ in range(LAYERS)]]

        def run(program=program, held=held):
            held[0] = program(held[0], *rest)
            return held[0]

        def wrong_now(held=held):
            return case.wrong(lambda layer: np.asarray(held[0][layer][case.sample]))

        jax.block_until_ready(run())
        if wrong := wrong_now():
            yield {"clock": "span", "way": way, "status": "failed", "reason": wrong}
            return
        if way == "donated":
            samples, facts = spans(run, executions)
            if samples:
                row = statistics_of(samples)
                span_us = row["us"]
                yield {"clock": "span", "way": way} | row | facts
            else:
                yield {"clock": "span", "way": way, "status": "failed", "reason": facts["note"]}
        if clocks:
            wait = lambda held=held: jax.block_until_ready(held[0])  # noqa: E731
            yield Wall(way, run, wait, span_us, wrong_now)


class Vllm:
    """vLLM's layer of a case, its kernels compiled."""

    def __init__(self, case: Case, folder: str):
        import torch

        from benchmarks import vllm_moe

        model = case.model
        self.case = case
        self.layer = vllm_moe.Layer(
            folder, case.tokens, model.top_k, model.experts, model.hidden, model.ffn
        )
        self.outs = [torch.full_like(case.torch_x, float("nan")) for _ in range(LAYERS)]
        self.calls = vllm_moe.calls(
            self.layer,
            *(case.torch_x, case.torch_sets, case.torch_weights, case.torch_ids, self.outs),
        )
        self.calls[0]()

    def measure(self, replays: int) -> Iterator[dict[str, Any] | Wall]:
        import torch

        case, layer = self.case, self.layer
        graph = timing.capture_torch(self.calls)
        for out in self.outs:
            out.fill_(float("nan"))
        graph.replay()
        rows = torch.from_numpy(case.sample).cuda()

        def wrong_now():
            return case.wrong(lambda i: self.outs[i][rows].float().cpu().numpy())

        if wrong := wrong_now():
            yield {"clock": "span", "way": "graph", "status": "failed", "reason": wrong}
            return
        [taken] = timing.time_torch_graphs([(graph, LAYERS)], replays=replays)
        row = statistics_of(taken.samples_us)
        facts = {"config": layer.config, "config_from": layer.source, "aligned": layer.aligns}
        yield {"clock": "span", "way": "graph"} | row | facts
        yield Wall("graph", graph.replay, torch.cuda.synchronize, row["us"], wrong_now)


def measured_in_turns(
    work: Sequence[tuple[dict[str, Any], Callable[[], Iterable[dict[str, Any] | Wall]]]],
) -> Iterator[dict[str, Any]]:
    """Rows of `(what they begin with, measure)`: spans as they come; then everybody's wall clock, in turns.

    In steps after each other long products reach the GPU's power limit, and the warmer it is, the lower is
    its clock: whoever comes later would be slower. So each follows each other as often. The first one does
    too: the steps of whoever is ahead of it in later rounds run before it, untimed.
    """
    walls: list[tuple[dict[str, Any], Wall]] = []
    for head, measure in work:
        try:
            for more in measure():
                if isinstance(more, Wall):
                    walls.append((head, more))
                else:
                    yield head | more
        except Exception as error:  # one provider's failure leaves the others their time
            yield head | failed(error)
    if len(walls) > 1:
        last = timing.behind_each_other(len(walls), _TURNS - 1)[-1]
        with contextlib.suppress(Exception):  # its own turns say what is wrong
            walls[last][1].time()
    measures = [each.time for _, each in walls]
    for i, taken in timing.in_turns(measures, _TURNS, order=timing.behind_each_other):
        head, each = walls[i]
        row = head | {"clock": "wall", "way": each.way}
        if isinstance(taken, Exception):
            yield row | failed(taken)
        else:
            yield row | statistics_of(taken.samples_us)
    if walls:
        time.sleep(_COOL_S)  # the next case's spans are of a card that rests between executions


# -- a child per model ---------------------------------------------------------------------------------


def block_sizes_of(case: Case) -> list[int]:
    """Those that may suit a case beside the usual one, for `--variants`."""
    import moe_align_jax as maj

    model = case.model
    mean = case.tokens * model.top_k / model.experts
    usual = maj.moe_block_size(case.tokens, top_k=model.top_k, num_experts=model.experts)
    most = 6 * mean if mean <= 8 else 3 * mean if mean < 64 else 2.2 * mean
    least = min(1.2 * mean, 128)
    sizes = (48, 64, 80, 128, 144, 176, 192) if mean >= 8 else ()
    return [b for b in sizes if b != usual and least <= b <= most]


def run_model(model: Model, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compiles everything, waits for its turn, and gives the rows of every batch size."""
    import moe_align_jax as maj

    sets = make_sets(model)
    cases = [Case(model, tokens, sets) for tokens in options.tokens]
    programs: dict[Any, Any] = {}
    if options.variants != "only":
        programs = compile_ours(cases, [None], both=True)
    if options.variants:
        for case in cases:
            programs |= compile_ours([case], block_sizes_of(case), both=False)
    peers: dict[int, Any] = {}
    for case in cases if options.variants != "only" else ():
        try:
            peers[case.tokens] = Vllm(case, options.peers)
        except Exception as error:
            peers[case.tokens] = error
    children.wait_for_turn()
    rate = timing.read_rate()
    for case in cases:
        tokens = case.tokens
        floor_us = layer_bytes(model, tokens, case.hit) / rate / 1e3
        head = {"model": model.name, **model._asdict(), "tokens": tokens, "experts_hit": case.hit}
        del head["name"]
        head |= {"read_gbps": round(rate, 1), "floor_us": round(floor_us, 2)}
        shape = (model.experts, model.hidden, model.ffn)
        form = maj.select_moe_implementation(
            (tokens, model.hidden), shape, top_k=model.top_k, transpose_rhs=True
        )
        work: list[tuple[dict[str, Any], Callable]] = []
        head |= {"status": "ok"}
        if tokens in peers:
            rows = lambda c=case: _vllm_rows(peers[c.tokens], options.replays)  # noqa: E731
            work.append((head | {"provider": "vllm"}, rows))
        for block_size in dict.fromkeys(key[1] for key in programs if key[0] == tokens):
            mine = {k[2]: p for k, p in programs.items() if k[:2] == (tokens, block_size)}
            if mine:
                more = f", blocks of {block_size}" if block_size else ""
                rows = lambda c=case, m=mine: measure_ours(c, m, options.executions, len(m) > 1)  # noqa: E731
                row = head | {"provider": f"fused_moe{more}"}
                row |= {} if more else {"form": form.form}
                work.append((row, rows))
        yield from measured_in_turns(work)


def _vllm_rows(peer: Any, replays: int) -> Iterator[dict[str, Any] | Wall]:
    if isinstance(peer, BaseException):
        raise peer
    yield from peer.measure(replays)


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
    [model] = [m for m in MODELS + OTHERS if m.name == options.child]
    children.give(run_model(model, options), options.commit)
    return 0


def measured(
    model: Model, child: Child, argv: Sequence[str], options: argparse.Namespace, until: float
) -> Iterator[dict[str, Any]]:
    """Rows of a model. Behind a case in which a child hangs or dies, another one goes on."""
    tokens = list(options.tokens)
    while True:
        seen, reason = [], ""
        try:
            child.ready(options.patience + options.preparing, until)
            child.go()
            for row in child.rows(options.patience, until):
                seen.append(row["tokens"])
                yield row
        except TimeoutError as error:
            reason = str(error)
        code = child.end()
        if not code and not reason:
            return
        at = tokens.index(seen[-1]) if seen else 0
        reason = reason or f"its process ended with {code}"
        row = {"model": model.name, "tokens": tokens[at], "provider": "child"}
        yield row | {"status": "failed", "reason": f"{reason}, in this case or behind it"}
        tokens = tokens[at + 1 :]
        if not tokens or time.monotonic() > until:
            return
        child = Child(MODULE, arguments(model, argv, tokens))


def arguments(model: Model, argv: Sequence[str], tokens: Sequence[int]) -> list[str]:
    """A child's."""
    return [*argv, "--child", model.name, "--tokens", ",".join(map(str, tokens))]


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
    seconds: dict[str, Any] = {"type": float, "default": 100.0}
    # --compiling: its name in earlier command lines.
    parser.add_argument("--preparing", "--compiling", help="seconds for compiling", **seconds)
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
    models = [m for m in MODELS + OTHERS if any(part in m.name for part in wanted)]
    models = models if wanted else list(MODELS)
    if not models:
        parser.error(f"no model of {', '.join(m.name for m in MODELS + OTHERS)} is named so")
    begun, rows, out = time.monotonic(), [], Writer(options.out or None)
    until = begun + options.budget
    # They compile side by side; then one after the other has the GPU for itself.
    started = [Child(MODULE, arguments(model, argv, options.tokens)) for model in models]
    case_processes.wait_until_ready(started, options.preparing, until)
    print(f"compiled within {time.monotonic() - begun:.0f} s", flush=True)
    for i, (model, each) in enumerate(zip(models, started, strict=True)):
        # What one model leaves of its share is the next one's.
        share = (until - time.monotonic()) / (len(models) - i)
        for row in measured(model, each, argv, options, time.monotonic() + share):
            rows.append(row)
            case_processes.keep(row, out, line)
    print("\n".join(ratios(rows)))
    return 0 if any("us" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
