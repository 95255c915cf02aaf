"""What the project wants of its speed, held against rows: met or missed, with the number."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import union
from benchmarks.cases import CASES, GRIDS, VLLM_GEOMEAN, VLLM_LEAST, Case

PYTORCH, JIT = "torch_bridge", "mosaic_gpu"
_SKEW_FACTOR = 1.2  # of the uniform figure
_OPTIONS_FACTOR, _OPTIONS_MORE_US = 1.15, 0.25  # of the plain call: the larger
_XLA_LIMIT_US = {"8192x64x128": 50.0}
_PEERS = ("vllm", "sglang", "sglang_small", "sglang_small_pdl")
# Above the most experts of any peer (SGLang's JIT op: 8191): µs, and times the outputs' one write.
_BEYOND_PEERS, _BEYOND_US, _BEYOND_WRITES = 8191, 5.0, 3.0
_WRITE_GBPS = 4300.0  # a large copy between two places of an H200's memory

type Median = dict[tuple[str, str], dict[str, Any]]


def _said(name: str, value: str, met: bool) -> str:
    return f"- {'met' if met else '**missed**'}: {name}: {value}"


def _named(cases: Sequence[tuple[str, float]], limit: int = 12) -> str:
    return ", ".join(f"{name} {ratio:.2f}x" for name, ratio in cases[:limit])


def targets(median: Median, verdicts: Callable) -> list[str]:
    """The table of targets."""
    found = [(c.name, v) for c in CASES for v in verdicts(c.name, median)]
    missed = [f"{name} ({what}, {goal:.2f})" for name, (what, goal, met) in found if not met]
    if not found:
        return []
    value = f"{len(found) - len(missed)} of {len(found)}"
    value += f"; missed: {', '.join(missed)}" if missed else ""
    return [_said("targets in µs per call", value, not missed)]


def against_vllm(median: Median) -> list[str]:
    """The geometric mean over the rows that vLLM takes, and the least."""
    ratios = {
        case.name: median[case.name, "vllm"]["p50_us"] / ours["p50_us"]
        for case in CASES
        if (ours := median.get((case.name, PYTORCH))) and (case.name, "vllm") in median
    }
    table = [ratios[case.name] for case in GRIDS["table"] if case.name in ratios]
    lines = []
    if table:
        mean, least = union.geomean(table), min(ratios, key=ratios.__getitem__)
        lines.append(
            _said(
                f"{PYTORCH} against vLLM's op, geometric mean over {len(table)} rows at least "
                f"{VLLM_GEOMEAN}x",
                f"{mean:.2f}x",
                mean >= VLLM_GEOMEAN,
            )
        )
        lines.append(
            _said(
                f"no row under {VLLM_LEAST}x",
                f"the least is {ratios[least]:.2f}x ({least})",
                ratios[least] >= VLLM_LEAST,
            )
        )
    return lines


def _against_plain(
    median: Median, pick: Callable[[Case], bool], allowed: Callable[[float], float], name: str
) -> list[str]:
    lines = []
    plain = {
        (c.num_pairs, c.num_experts, c.block_size): c.name
        for c in CASES
        if c.skew == "uniform" and not c.with_options
    }
    for provider in (PYTORCH, JIT):
        missed, worst, count = [], 0.0, 0
        for case in filter(pick, CASES):
            own = median.get((case.name, provider))
            size = (case.num_pairs, case.num_experts, case.block_size)
            other = median.get((plain.get(size, ""), provider))
            if own is None or other is None:
                continue
            count += 1
            ratio = own["p50_us"] / other["p50_us"]
            worst = max(worst, ratio)
            if own["p50_us"] > allowed(other["p50_us"]):
                missed.append((case.name, ratio))
        if count:
            value = f"worst of {count} {worst:.2f}x" + (
                f"; missed: {_named(missed)}" if missed else ""
            )
            lines.append(_said(f"{name} ({provider})", value, not missed))
    return lines


def skew_and_options(median: Median) -> list[str]:
    skewed = _against_plain(
        median,
        lambda c: c.skew in ("one", "zipf1.3"),
        lambda us: us * _SKEW_FACTOR,
        f"all pairs on one expert, and Zipf(1.3), at most {_SKEW_FACTOR}x uniform",
    )
    options = _against_plain(
        median,
        lambda c: c.with_options,
        lambda us: max(us * _OPTIONS_FACTOR, us + _OPTIONS_MORE_US),
        f"every option on at most {_OPTIONS_FACTOR}x the plain call, or {_OPTIONS_MORE_US} µs more",
    )
    return skewed + options


def many_experts(median: Median) -> list[str]:
    """E from 1024: faster than any peer, never worse than "xla", and bounded where no peer goes."""
    slower_than_peer, slower_than_xla, slow, seen = [], [], [], 0
    for case in GRIDS["experts"]:
        ours, jit = median.get((case.name, PYTORCH)), median.get((case.name, JIT))
        best = ours or jit
        if best is None:
            continue
        seen += 1
        for peer in _PEERS:
            row = median.get((case.name, peer))
            if row and row["p50_us"] <= best["p50_us"]:
                slower_than_peer.append((f"{case.name} ({peer})", row["p50_us"] / best["p50_us"]))
        xla = median.get((case.name, "xla"))
        if xla and jit and xla["p50_us"] < jit["p50_us"]:
            slower_than_xla.append((case.name, xla["p50_us"] / jit["p50_us"]))
        if case.num_experts > _BEYOND_PEERS:
            written = case.bytes_moved - 4 * case.num_pairs
            bound = _BEYOND_US + _BEYOND_WRITES * written / _WRITE_GBPS / 1e3
            if best["p50_us"] > bound:
                slow.append((case.name, best["p50_us"] / bound))
    if not seen:
        return []
    return [
        _said(f"E from 1024 ({seen} rows): {what}", _named(found) or "none", not found)
        for what, found in (
            ("slower than a peer", slower_than_peer),
            ("slower than xla", slower_than_xla),
            (
                f"above {_BEYOND_PEERS} experts slower than {_BEYOND_US:g} µs + "
                f"{_BEYOND_WRITES:g} x the outputs' write",
                slow,
            ),
        )
    ]


def xla(median: Median) -> list[str]:
    return [
        _said(
            f'"xla" at {name} at most {limit:g} µs',
            f"{row['p50_us']:.1f}",
            row["p50_us"] <= limit,
        )
        for name, limit in _XLA_LIMIT_US.items()
        if (row := median.get((name, "xla"))) and row["metric"] == "span_us"
    ]


def lines_of(median: Median, verdicts: Callable) -> list[str]:
    """A line per goal that these rows say something about."""
    return [
        *targets(median, verdicts),
        *against_vllm(median),
        *skew_and_options(median),
        *many_experts(median),
        *xla(median),
    ]


def markdown(median: Median, verdicts: Callable) -> str:
    lines = lines_of(median, verdicts)
    return "\n".join(["Goals:", "", *lines, ""]) if lines else ""


def union_markdown(gpu: str, rows: Sequence[dict[str, Any]]) -> str:
    """The union grid in a few lines: a summary per peer and the three worst sizes."""
    summary = [f"- {line}" for line in union.summary(rows)]
    worst = [f"- `{line}`" for line in union.listing(rows)[:3]]
    sizes = len({r["case"] for r in rows})
    head = f"Union grid, **{gpu}**, {rows[-1]['date'][:10]}, {sizes} sizes:"
    return "\n".join([head, "", *summary, "", "The three worst sizes:", "", *worst, ""])
