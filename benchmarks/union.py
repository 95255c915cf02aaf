"""The committed cover of the union grid: sizes that peers test, ours against theirs, the worst ratio first.

python -m benchmarks.run --grid union --vllm-op .peers/vllm_moe.so --sglang-small .peers/sgl_small.py \\
    --budget 240 --out ROWS.jsonl

Uniform ids. Everything is made, checked and timed on the GPU in groups, with few replays: the whole cover
takes minutes. Checked: torch's stable sort on the same ids, itself held to NumPy where that is quick, and
every provider, over poisoned outputs, to that.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks import machine, peers, timing
from benchmarks.cases import Case, expected, mismatch, union_grid
from benchmarks.rows import Writer, reason_of

OURS, OURS_JIT = "torch_bridge", "mosaic_gpu"
_GRAPH_WORDS = 1 << 25  # of output in one graph: 128 MB
_CALLS = (4, 20)  # calls in one graph or jit: least and most
_REPLAYS = 7
# A graph is short: where the host is held up for some milliseconds, all samples scatter. Then every
# provider's of that size are taken again, whoever they favour.
_STEADY, _ATTEMPTS, _PAUSE_S = 1.2, 5, 0.02
_EXECUTIONS = 5
_GROUP = 12  # programs in one trace
_NUMPY_PAIRS = 1 << 16  # up to here the reference is held to NumPy


def calls_for(case: Case, calls: tuple[int, int] | None = None) -> int:
    """Calls in one graph, of (least, most): many where a call is short, few where its output is large."""
    least, most = calls or _CALLS
    return min(most, max(least, _GRAPH_WORDS // (case.capacity + case.num_pairs)))


def row_of(case: Case, provider: peers.Provider, timed: timing.Timing) -> dict[str, Any]:
    return {
        "grid": "union",
        "case": case.name,
        "provider": provider.name,
        "version": provider.version,
        "verified": True,
        "metric": timed.metric,
        "p20_us": round(timed.percentile(20), 3),
        "p50_us": round(timed.percentile(50), 3),
        "p80_us": round(timed.percentile(80), 3),
        "samples": len(timed.samples_us),
        "calls": timed.calls,
    }


def failed_row(case: Case, provider: peers.Provider, wrong: str) -> dict[str, Any]:
    row = {"grid": "union", "case": case.name, "provider": provider.name}
    return {**row, "version": provider.version, "verified": False, "error": wrong[:300]}


# -- checking on the GPU ----------------------------------------------------------------------------


def differs(
    case: Case, want: dict[str, Any], got: dict[str, Any], promises: dict[str, bool]
) -> str:
    """As `cases.mismatch`, on torch tensors where they lie; `want` is in stable order and complete."""
    import torch

    used = int(want["num_tokens_post_padded"])
    if int(got["num_tokens_post_padded"].view(-1)[0]) != used:
        return f"num_tokens_post_padded is not {used}"
    blocks = case.num_blocks if promises["expert_tail"] else used // case.block_size
    if not torch.equal(got["expert_ids"][:blocks], want["expert_ids"][:blocks]):
        return "expert_ids differ"
    rows = got["sorted_token_ids"]
    if promises["row_tail"] and bool((rows[used:] != case.num_pairs).any()):
        return "the end of sorted_token_ids is not the sentinel"
    rows, right = rows[:used], want["sorted_token_ids"][:used]
    if not promises["stable"] and used:
        if int(rows.min()) < 0 or int(rows.max()) > case.num_pairs:
            return "sorted_token_ids holds neither pair nor sentinel"
        expert = want["expert_ids"][: used // case.block_size].to(torch.int64)
        offset = expert.repeat_interleave(case.block_size) * (case.num_pairs + 1)
        rows = (torch.sort(offset + rows).values - offset).to(torch.int32)
    return "" if torch.equal(rows, right) else "sorted_token_ids differ"


def reference_of(case: Case, ids: list[Any]) -> tuple[str, list[dict[str, Any]]]:
    """(what is wrong with it, torch's stable sort of each input)."""
    prepared = peers.torch_sort(case, ids)
    for call in prepared.calls:
        call()
    if case.num_pairs <= _NUMPY_PAIRS:
        first = {k: t.cpu().numpy() for k, t in prepared.outputs[0].items()}
        wrong = mismatch(case, expected(case, ids[0].cpu().numpy()), first)
        if wrong:
            return f"torch's sort: {wrong}", prepared.outputs
    return "", prepared.outputs


# -- from PyTorch -----------------------------------------------------------------------------------


def steady(timings: Iterable[timing.Timing]) -> bool:
    """Whether no graph's samples scatter."""
    return all(t.percentile(80) <= _STEADY * t.percentile(20) for t in timings)


def measure_graphs(case: Case, providers: Sequence[peers.Provider]) -> list[dict[str, Any]]:
    """Each provider's CUDA graph over the same inputs, in turns, verified by what its last replay wrote."""
    import torch

    generator = torch.Generator("cuda").manual_seed(case.num_pairs)
    shape = (case.num_pairs // case.top_k, case.top_k)
    ids = [
        torch.randint(
            0, case.num_experts, shape, dtype=torch.int32, device="cuda", generator=generator
        )
        for _ in range(calls_for(case))
    ]
    wrong, want = reference_of(case, ids)
    rows, ready = [], []
    for provider in providers:
        if provider.refuses(case):
            continue
        try:
            prepared = provider.make(case, ids)  # type: ignore[misc]
            prepared.poison()
            ready.append((provider, prepared, timing.capture_torch(prepared.calls)))
        except Exception as error:  # one provider's failure must not cost the others their run
            rows.append(failed_row(case, provider, reason_of(error)))
    graphs = [(graph, len(prepared.calls)) for _, prepared, graph in ready]
    timings = timing.time_torch_graphs(graphs, replays=_REPLAYS)
    for attempt in range(1, _ATTEMPTS):
        if steady(timings):
            break
        time.sleep(_PAUSE_S * attempt)
        timings = timing.time_torch_graphs(graphs, replays=_REPLAYS)
    for (provider, prepared, _), timed in zip(ready, timings, strict=True):
        try:
            pairs = zip(want, prepared.outputs, strict=True)
            faults = (differs(case, right, got, provider.promises) for right, got in pairs)
            found = wrong or next(filter(None, faults), "")
        except Exception as error:  # outputs that cannot even be compared
            found = reason_of(error)
        rows.append(failed_row(case, provider, found) if found else row_of(case, provider, timed))
    return rows


# -- under jit --------------------------------------------------------------------------------------


def measure_jit(cases: Sequence[Case], provider: peers.Provider) -> list[dict[str, Any]]:
    """A group of programs, checked against NumPy where that is quick, then timed in one trace."""
    import jax

    def compile_one(case: Case, ids: list[Any]) -> Any:
        align: Callable = jax.jit(provider.make(case))  # type: ignore[misc]
        return jax.jit(lambda many: [align(one) for one in many]).lower(ids).compile()

    programs, arguments, rows = [], [], []
    ready: list[Case] = []
    inputs = [
        [jax.device_put(case.topk_ids(seed)) for seed in range(min(10, calls_for(case)))]
        for case in cases
    ]
    with ThreadPoolExecutor(8) as pool:
        compiling = [pool.submit(compile_one, *pair) for pair in zip(cases, inputs, strict=True)]
    for case, ids, future in zip(cases, inputs, compiling, strict=True):
        try:
            compiled = future.result()
            results = compiled(ids)
            wrong = ""
            if case.num_pairs <= _NUMPY_PAIRS:
                got = {k: np.asarray(v) for k, v in results[0]._asdict().items() if v is not None}
                wrong = mismatch(case, expected(case, case.topk_ids(0)), got)
            del results
        except Exception as error:
            wrong = reason_of(error)
        if wrong:
            rows.append(failed_row(case, provider, wrong))
            continue
        ready.append(case)
        programs.append(compiled)
        arguments.append(ids)
    timings = timing.time_jit_spans(programs, arguments, executions=_EXECUTIONS)
    for k, timed in enumerate(timings):
        if timed.metric != "span_us":  # the trace could not be cut: this one in a trace of its own
            timings[k] = timing.time_jit_span(programs[k], arguments[k], executions=_EXECUTIONS)
    return rows + [
        row_of(case, provider, timed)
        if timed.metric == "span_us"
        else failed_row(case, provider, timed.note)
        for case, timed in zip(ready, timings, strict=True)
    ]


# -- ratios -----------------------------------------------------------------------------------------


def ratios(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[tuple[float, str]]]:
    """(ours, peer) -> (peer's time over ours, case), the worst first."""
    times = {(r["case"], r["provider"]): r["p50_us"] for r in rows if r["verified"]}
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for (case, provider), us in times.items():
        if provider in (OURS, OURS_JIT):
            continue
        for ours in (OURS, OURS_JIT):
            if (case, ours) in times:
                found.setdefault((ours, provider), []).append((us / times[case, ours], case))
    return {key: sorted(group) for key, group in sorted(found.items())}


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line per peer: cases, geometric mean, worst, how many we lose."""
    lines = []
    for (ours, provider), group in ratios(rows).items():
        values = [ratio for ratio, _ in group]
        lost = sum(value < 1 for value in values)
        mean = geomean(values)
        lines.append(
            f"{provider} over {ours}: {len(group)} sizes, geometric mean {mean:.2f}x, least "
            f"{values[0]:.2f}x ({group[0][1]}), {ours} is slower at {lost}"
        )
    return lines


def markdown(gpu: str, rows: Sequence[dict[str, Any]]) -> str:
    """The union grid in a few lines: a summary per peer, with the worst size of each."""
    sizes = len({r["case"] for r in rows})
    head = f"Union grid, **{gpu}**, {rows[-1]['date'][:10]}, {sizes} sizes:"
    lines = [f"- {line}" for line in summary(rows)]
    return "\n".join([head, "", *lines, ""])


def listing(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line per case with every ratio to `torch_bridge`, the worst case first."""
    by_case: dict[str, list[tuple[float, str]]] = {}
    for (ours, provider), group in ratios(rows).items():
        for ratio, case in group:
            by_case.setdefault(case, []).append((ratio, f"{provider} / {ours}"))
    worst_first = sorted((min(group)[0], case) for case, group in by_case.items())
    return [
        f"{case:22} " + "  ".join(f"{what} {ratio:.2f}x" for ratio, what in sorted(by_case[case]))
        for _, case in worst_first
    ]


# -- the run ----------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Runs the cover within the budget; 1 when something was wrong or nothing was measured, else 0."""

    def say(text: str) -> None:
        print(text, flush=True)

    facts = machine.facts(options.commit)
    if facts["gpu"] is None:
        say("moe-align bench --grid union: a GPU must be there; got none. Run it on a GPU machine.")
        return 2
    started = time.monotonic()
    left = (options.budget or math.inf).__sub__
    torch_peers = peers.torch_providers(options.vllm_op, options.sglang_op, options.sglang_small)
    wanted = [n for n in options.providers.split(",") if n]
    skipped = ("torch_sort", "empty")
    graph = [p for p in torch_peers if p.name not in skipped and (not wanted or p.name in wanted)]
    [jit] = [p for p in peers.jax_providers() if p.name == OURS_JIT]
    for provider in graph if options.no_jit else [*graph, jit]:
        say(f"  {provider.name:16} {provider.absent or provider.version}")
    graph = [p for p in graph if not p.absent]
    # In a fixed random order: a budget that ends early leaves a fair sample.
    cases = union_grid()
    random.Random(2026).shuffle(cases)
    rows: list[dict[str, Any]] = []
    out = Writer(options.out, facts)

    def keep(new: list[dict[str, Any]]) -> None:
        for row in new:
            rows.append({**facts, **row})
            out.write([row])
            if not row["verified"]:
                print(f"  {row['case']} {row['provider']}: {row['error']}", file=sys.stderr)

    if any(p.name == OURS for p in graph):
        if reason := peers.prepare_direct(cases):
            say(f"  {OURS}: {reason}")
        say(f"  programs of torch_bridge compiled: {time.monotonic() - started:.0f} s")
    done = 0
    for start in range(0, len(cases), _GROUP):
        if left(time.monotonic() - started) <= 0:
            break
        group = cases[start : start + _GROUP]
        for case in group:
            keep(measure_graphs(case, graph))
        if not options.no_jit and not jit.absent:
            keep(measure_jit(group, jit))
        done += len(group)
    for line in listing(rows):
        say(line)
    for line in summary(rows):
        say(line)
    wrong = sum(not row["verified"] for row in rows)
    say(
        f"{done} of {len(cases)} sizes, {len(rows) - wrong} results verified and timed, {wrong} failed, "
        f"{time.monotonic() - started:.0f} s"
    )
    return 1 if wrong or not rows else 0
