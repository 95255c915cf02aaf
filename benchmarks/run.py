"""Verifies every provider on the same random inputs, then times it, in one run.

python -m benchmarks.run --vllm-op .peers/vllm_moe.so --out ROWS.jsonl
python -m benchmarks.run --grid union --vllm-op .peers/vllm_moe.so --out ROWS.jsonl
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# Both frameworks share one GPU here; by default jax would take most of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks import machine, peers, report, timing  # noqa: E402
from benchmarks.cases import CASES, GRIDS, Case, Expected, expected, mismatch  # noqa: E402
from benchmarks.rows import Writer, reason_of  # noqa: E402

# A CPU needs seconds for the largest sizes, times five calls, times the repeats.
CPU_MAX_PAIRS = 32_768


def say(text: str, file: Any = None) -> None:
    """Prints at once: a run that is cut off keeps what it said."""
    print(text, file=file or sys.stdout, flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    names = ", ".join(c.name for c in CASES)
    grids = ", ".join(GRIDS)
    parser = argparse.ArgumentParser(
        prog="moe-align bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vllm-op", metavar="PATH", help="vLLM's compiled MoE library")
    parser.add_argument("--sglang-op", metavar="PATH", help="SGLang's compiled op library")
    parser.add_argument(
        "--sglang-small", metavar="PATH", help="SGLang's Triton kernel, a Python file"
    )
    parser.add_argument("--out", metavar="FILE", help="JSONL to append to; nothing is kept without")
    parser.add_argument(
        "--grid", default="", help=f"comma-separated, of: {grids}; all by default. Or union, alone"
    )
    parser.add_argument("--cases", default="", help=f"comma-separated, of: {names}")
    parser.add_argument("--providers", default="", help="comma-separated; all by default")
    parser.add_argument("--calls", type=int, default=50, help="calls, inputs, outputs per program")
    parser.add_argument("--executions", type=int, default=12, help="executions of a jit in a trace")
    parser.add_argument("--replays", type=int, default=30, help="replays of a CUDA graph")
    parser.add_argument("--budget", type=float, help="seconds after which no case is begun")
    parser.add_argument(
        "--no-jit", action="store_true", help="with --grid union: from PyTorch alone"
    )
    parser.add_argument("--commit", help="the commit to record, where git is not at hand")
    options = parser.parse_args(argv)
    unknown = set(filter(None, options.grid.split(","))) - set(GRIDS)
    if unknown and options.grid != "union":
        parser.error(f"unknown grid {', '.join(sorted(unknown))}; there are: {grids}, union")
    known = {c.name for c in CASES}
    if unknown := set(filter(None, options.cases.split(","))) - known:
        parser.error(f"unknown case {', '.join(sorted(unknown))}; there are: {names}")
    if min(options.calls, options.executions, options.replays) < 1:
        parser.error("--calls, --executions and --replays must be at least 1")
    return options


def chosen(names: str, things: Sequence[Any]) -> list[Any]:
    wanted = [n for n in names.split(",") if n]
    return [t for t in things if not wanted or t.name in wanted]


def _poison_jax_memory(case: Case, count: int) -> None:
    """Fills and frees as much device memory as the results take: XLA then reuses poisoned buffers.

    The best that a functional framework allows; the kernels' own tests poison through other ways.
    """
    import jax
    import jax.numpy as jnp

    sizes = (case.capacity, case.num_blocks, 1, case.num_experts)
    arrays = [jnp.full(s, peers.POISON, jnp.int32) for _ in range(count) for s in sizes]
    jax.block_until_ready(arrays)
    for array in arrays:
        array.delete()


def _as_numpy(result: Any) -> dict[str, np.ndarray]:
    named = result if isinstance(result, dict) else result._asdict()
    return {name: np.asarray(value) for name, value in named.items() if value is not None}


class Inputs(NamedTuple):
    """Samples of one case and their answers, which serve every provider."""

    ids: list[np.ndarray]
    answers: list[Expected]


def _first_mismatch(
    provider: peers.Provider, case: Case, answers: list[Expected], results: list[dict]
) -> str:
    for index, (want, got) in enumerate(zip(answers, results, strict=True)):
        wrong = mismatch(case, want, got, **provider.promises)
        if wrong:
            return f"input {index}: {wrong}"
    return ""


def measure_jax(
    provider: peers.Provider, case: Case, inputs: Inputs, options: argparse.Namespace
) -> tuple[str, timing.Timing | None]:
    """(what is wrong or "", the timing when nothing is)."""
    import jax

    # One jit inside the other: the call is traced and lowered once, not once per input.
    align = jax.jit(provider.make(case))  # type: ignore[misc]

    def program(many):
        return [align(one) for one in many]

    on_device = [jax.device_put(one) for one in inputs.ids]
    compiled = jax.jit(program).lower(on_device).compile()
    _poison_jax_memory(case, len(on_device))
    results = [_as_numpy(r) for r in compiled(on_device)]
    if wrong := _first_mismatch(provider, case, inputs.answers, results):
        return wrong, None
    if jax.default_backend() == "cpu":
        once = lambda: jax.block_until_ready(compiled(on_device))  # noqa: E731
        return "", timing.time_wall(once, calls=len(on_device))
    return "", timing.time_jit_span(compiled, on_device, executions=options.executions)


def measure_torch(
    provider: peers.Provider, case: Case, inputs: Inputs, options: argparse.Namespace
) -> tuple[str, timing.Timing | None]:
    """As `measure_jax`: the eager calls are verified, then the timed graph's own results."""
    import torch

    prepared: peers.TorchCalls = provider.make(case, inputs.ids)  # type: ignore[misc]
    prepared.poison()
    for call in prepared.calls:
        call()
    torch.cuda.synchronize()
    if not prepared.outputs:  # the empty kernel
        return "", timing.time_torch_graph(prepared.calls, replays=options.replays)
    if wrong := _first_mismatch(provider, case, inputs.answers, prepared.results()):
        return wrong, None
    prepared.poison()
    timed = timing.time_torch_graph(prepared.calls, replays=options.replays)
    if wrong := _first_mismatch(provider, case, inputs.answers, prepared.results()):
        return f"in its CUDA graph, {wrong}", None
    return "", timed


def row_of(
    provider: peers.Provider, case: Case, wrong: str, timed: timing.Timing | None
) -> dict[str, Any]:
    """One JSONL row, less the columns of `machine.facts`."""
    row: dict[str, Any] = {
        "case": case.name,
        "provider": provider.name,
        "version": provider.version,
        "verified": not wrong,
    }
    if wrong or timed is None:
        return {**row, "error": wrong}
    median = timed.percentile(50)
    return {
        **row,
        "metric": timed.metric,
        "p20_us": round(timed.percentile(20), 3),
        "p50_us": round(median, 3),
        "p80_us": round(timed.percentile(80), 3),
        "bytes": case.bytes_moved,
        "gbps": round(case.bytes_moved / median / 1e3, 1),
        "samples": len(timed.samples_us),
        "calls": timed.calls,
        "kernels_per_call": timed.kernels_per_call,
        "note": timed.note,
    }


def calls_for(case: Case, most: int) -> int:
    """Calls per program: fewer where one takes long, and its answer by NumPy a second."""
    return min(most, max(10, (1 << 23) // case.num_pairs))


def run_case(
    case: Case, providers: Sequence[peers.Provider], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Every provider on the same inputs, one after the other."""
    rows = []
    calls = calls_for(case, options.calls)
    ids = [case.topk_ids(seed) for seed in range(calls)]
    answers = [expected(case, one) for one in ids]
    for provider in providers:
        count = min(provider.calls or calls, calls)
        if refusal := provider.refuses(case):
            say(f"  {provider.name}: {refusal}", file=sys.stderr)
            continue
        measure = measure_jax if provider.kind == "jax" else measure_torch
        try:
            wrong, timed = measure(provider, case, Inputs(ids[:count], answers[:count]), options)
        except Exception as error:  # one provider's failure must not cost the others their run
            wrong, timed = reason_of(error), None
        rows.append(row_of(provider, case, wrong, timed))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when a provider gave a wrong answer or failed, else 0."""
    import jax

    options = arguments(argv)
    if options.grid == "union":
        from benchmarks import union

        return union.run(options)
    facts = machine.facts(options.commit)
    out = Writer(options.out, facts)
    grids = [g for g in options.grid.split(",") if g] or list(GRIDS)
    cases = chosen(options.cases, [case for grid in grids for case in GRIDS[grid]])
    where = facts["gpu"] or f"{jax.default_backend().upper()} ({facts['cpu']})"
    say(f"moe-align bench on {where}, jax {facts['jax']}, torch {facts['torch']}")
    everyone = [
        *peers.jax_providers(),
        *peers.torch_providers(options.vllm_op, options.sglang_op, options.sglang_small),
    ]
    names = {p.name for p in everyone}
    if unknown := set(filter(None, options.providers.split(","))) - names:
        say(f"unknown provider {', '.join(sorted(unknown))}; there are: {', '.join(sorted(names))}")
        return 2
    providers = chosen(options.providers, everyone)
    for provider in providers:
        state = f"absent: {provider.absent}" if provider.absent else provider.version
        say(f"  {provider.name:12} {provider.what}; {state}")
    present = [p for p in providers if not p.absent]
    if facts["gpu"] is None:
        say(
            "No GPU here: no kernel time and no peer can be measured. What follows is wall time\n"
            f"of the jnp implementations on the {jax.default_backend().upper()}, "
            f"up to {CPU_MAX_PAIRS} pairs: no claim about a GPU."
        )
        cases = [c for c in cases if c.num_pairs <= CPU_MAX_PAIRS]
    rows, started = [], time.monotonic()
    if any(p.name == "torch_bridge" for p in present):
        if reason := peers.prepare_direct(cases):
            say(f"  torch_bridge: {reason}", file=sys.stderr)
    for case in cases:
        begun = time.monotonic()
        if options.budget and begun - started > options.budget:
            say(f"  {case.name}: not begun, the budget is spent")
            continue
        for row in run_case(case, present, options):
            rows.append({**facts, **row})
            out.write([row])
            if not row["verified"]:
                say(f"  {case.name} {row['provider']}: {row['error']}", file=sys.stderr)
        seconds = time.monotonic() - begun
        say(f"  {case.name}: {seconds:.0f} s", file=sys.stderr)
    say(report.text_table(rows))
    for note in sorted({f"{r['provider']}: {r['note']}" for r in rows if r.get("note")}):
        say(f"note: {note}")
    failed = [r for r in rows if not r["verified"]]
    verified = len(rows) - len(failed)
    say(
        f"{verified} results verified against NumPy and timed, {len(failed)} failed, "
        f"{time.monotonic() - started:.0f} s"
    )
    if options.out:
        say(f"appended to {options.out}")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
