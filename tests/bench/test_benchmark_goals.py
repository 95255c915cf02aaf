"""The union grid's checks and ratios, and the project's goals held against rows."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import compile_time, goals, peers, report, run, timing, union
from benchmarks.cases import CASES, Case, expected
from moe_align_jax._align import tables
from tests.helpers import torch_on_cpu

CASE = Case(num_pairs=96, num_experts=7, block_size=8)


def row(case, provider, p50, **more):
    facts = {"date": "2026-11-21T10:00:00+00:00", "gpu": "H100", "driver": "1", "jax": "0.11.2"}
    facts |= {"torch": "2.11.0", "commit": "abc", "version": "v", "metric": "graph_us"}
    return {**facts, "case": case, "provider": provider, "verified": True, "p50_us": p50, **more}


def tensors(case, ids):
    torch = pytest.importorskip("torch")
    want = expected(case, ids)
    return {
        "sorted_token_ids": torch.from_numpy(want.sorted_token_ids.copy()),
        "expert_ids": torch.from_numpy(want.expert_ids.copy()),
        "num_tokens_post_padded": torch.tensor([want.num_tokens_post_padded], dtype=torch.int32),
    }


STRICT = {"stable": True, "expert_tail": True, "row_tail": True}
LOOSE = dict.fromkeys(STRICT, False)


def test_comparison_on_the_gpu_finds_what_the_one_by_numpy_finds():
    """Each change of one word, strictly and loosely, against cases.mismatch."""
    from benchmarks.cases import mismatch

    ids = CASE.topk_ids(1)
    want = tensors(CASE, ids)
    rng = np.random.default_rng(0)
    for promises in (STRICT, LOOSE):
        found = {"": 0, "something": 0}
        for _ in range(150):
            got = tensors(CASE, ids)
            name = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")[rng.integers(3)]
            at, other = rng.integers(got[name].numel(), size=2)
            if rng.integers(2):
                got[name][at] = int(rng.integers(-2, 100))
            else:  # a swap, which only order can tell
                got[name][[at, other]] = got[name][[other, at]]
            ours = union.differs(CASE, want, got, promises)
            arrays = {k: t.numpy() for k, t in got.items()}
            theirs = mismatch(CASE, expected(CASE, ids), arrays, **promises)
            assert bool(ours) == bool(theirs), (promises, name, at, ours, theirs)
            found["something" if ours else ""] += 1
        assert min(found.values()) > 10


def test_reference_on_the_gpu_is_held_to_numpy(monkeypatch):
    torch = torch_on_cpu(monkeypatch, "full", "arange", "zeros")
    ids = [torch.from_numpy(CASE.topk_ids(seed)) for seed in range(2)]
    wrong, want = union.reference_of(CASE, ids)
    assert wrong == ""
    for one, got in zip(ids, want, strict=True):
        assert union.differs(CASE, tensors(CASE, one.numpy()), got, STRICT) == ""
    monkeypatch.setattr(
        peers,
        "_torch_sort",
        lambda case, ids: peers.TorchCalls([], [tensors(CASE, 6 - CASE.topk_ids(0))]),
    )
    assert "torch's sort" in union.reference_of(CASE, ids)[0]


def test_calls_are_many_where_they_are_short():
    assert union.calls_for(Case(num_pairs=8, num_experts=8, block_size=4)) == 20
    assert union.calls_for(Case(num_pairs=1 << 22, num_experts=65535, block_size=256)) == 4


ROWS = [
    row("a", "torch_bridge", 2.0, grid="union"),
    row("a", "mosaic_gpu", 4.0, grid="union"),
    row("a", "vllm", 8.0, grid="union"),
    row("b", "torch_bridge", 2.0, grid="union"),
    row("b", "vllm", 1.0, grid="union"),
    row("b", "sglang", 6.0, grid="union"),
    {**row("c", "vllm", 1.0, grid="union"), "verified": False, "error": "x"},
]


def test_union_ratios_are_worst_first_with_the_geometric_mean():
    found = union.ratios(ROWS)
    assert found["torch_bridge", "vllm"] == [(0.5, "b"), (4.0, "a")]
    assert found["mosaic_gpu", "vllm"] == [(2.0, "a")]
    assert union.geomean([0.5, 4.0]) == pytest.approx(math.sqrt(2))
    [line] = [x for x in union.summary(ROWS) if x.startswith("vllm against torch_bridge")]
    assert "2 sizes, geometric mean 1.41x, worst 0.50x (b), slower than it at 1" in line
    [sglang] = [x for x in union.summary(ROWS) if x.startswith("sglang")]
    assert sglang.endswith("slower than it at 0")
    listing = union.listing(ROWS)
    assert [x.split()[0] for x in listing] == ["b", "a"]
    assert "sglang / torch_bridge 3.00x" in listing[0]
    text = report.markdown(ROWS)
    assert "Union grid, **H100**, 2026-11-21, 3 sizes" in text and "0.50x" in text
    assert "| a |" not in text  # no row of the main table


def test_union_needs_a_gpu(capsys):
    import jax

    if jax.default_backend() == "gpu":
        pytest.skip("this machine has one")
    assert run.main(["--grid", "union"]) == 2
    assert "a GPU must be there" in capsys.readouterr().out


# -- goals --------------------------------------------------------------------------------------------


def said(rows):
    return goals.lines_of(report.median_rows(rows), report.verdicts)


def test_goals_say_met_or_missed_with_the_number():
    rows = [
        row("8x256x16", "torch_bridge", 1.2),
        row("8x256x16", "empty", 0.8),
        row("8x256x16", "vllm", 4.8),
        row("64x256x16", "torch_bridge", 2.0),
        row("64x256x16", "mosaic_gpu", 2.2, metric="span_us"),
        row("64x256x16", "vllm", 3.0),
        row("8192x64x128", "xla", 60.0, metric="span_us"),
    ]
    lines = said(rows)
    assert lines[0] == (
        "- **missed**: targets in µs per call: 2 of 3; missed: 64x256x16 (graph, 1.50)"
    )
    assert lines[1].startswith("- **missed**") and lines[1].endswith(": 2.45x")  # sqrt(4 * 1.5)
    assert lines[2].endswith("no row under 2.0x: the least is 1.50x (64x256x16)")
    assert lines[3] == '- **missed**: "xla" at 8192x64x128 at most 50 µs: 60.0'
    assert len(lines) == 4
    assert said([row("7x7x7", "vllm", 1.0)]) == []


def test_goals_of_skew_and_options_are_against_the_plain_case():
    rows = [
        row("131072x256x128", "torch_bridge", 5.0),
        row("131072x256x128-one", "torch_bridge", 5.5),
        row("131072x256x128-zipf1.3", "torch_bridge", 6.5),
        row("131072x256x128-zipf", "torch_bridge", 50.0),  # no goal of ours
        row("131072x256x128-options", "torch_bridge", 5.7),
        row("8x256x16", "torch_bridge", 1.0),
        row("8x256x16-options", "torch_bridge", 1.24),
    ]
    lines = {line.split(": ", 1)[1]: line.split(":")[0] for line in said(rows)}
    skew = next(k for k in lines if k.startswith("all pairs"))
    assert (
        "worst of 2 1.30x; missed: 131072x256x128-zipf1.3 1.30x" in skew and "missed" in lines[skew]
    )
    options = next(k for k in lines if k.startswith("every option"))
    assert "worst of 2 1.24x" in options and lines[options] == "- met"


def test_goal_of_skew_holds_for_every_form():
    """Each size has its plain case, in both skews; one slow row of any of them misses the goal."""
    skewed = [c for c in CASES if c.skew in ("one", "zipf1.3")]
    plain = {c.name for c in CASES if c.skew == "uniform" and not c.with_options}
    names = [c.name.removesuffix(f"-{c.skew}") for c in skewed]
    assert set(names) <= plain and all(names.count(name) == 2 for name in names)
    forms = {tables.config_for(compile_time.problem_of(c, "")).form for c in skewed}
    assert forms == {line.config.form for line in tables.table("").rows}
    rows = [row(name, "torch_bridge", 2.0) for name in set(names)]
    for slow in skewed:
        rest = [row(c.name, "torch_bridge", 2.4 if c != slow else 2.5) for c in skewed]
        [line] = [x for x in said(rows + rest) if "Zipf" in x]
        assert line.startswith("- **missed**") and f"missed: {slow.name} 1.25x" in line
        assert f"worst of {len(skewed)} 1.25x" in line
    rest = [row(c.name, "torch_bridge", 2.4) for c in skewed]
    [line] = [x for x in said(rows + rest) if "Zipf" in x]
    assert line.startswith("- met")


def test_goals_of_many_experts():
    rows = [
        row("8x1024x16", "torch_bridge", 2.0),
        row("8x1024x16", "sglang_small", 1.5),
        row("64x65535x16", "mosaic_gpu", 20.0, metric="span_us"),
        row("64x65535x16", "xla", 15.0, metric="span_us"),
    ]
    lines = [line for line in said(rows) if "E from 1024" in line]
    assert [line.split(":")[0] for line in lines] == ["- **missed**"] * 3
    assert "8x1024x16 (sglang_small) 0.75x" in lines[0] and "64x65535x16 0.75x" in lines[1]
    # 64 pairs, 1,024 rows, 64 blocks, the total, 65,535 counts: 66,624 words at 4.3 TB/s, three times
    bound = 5 + 3 * 4 * 66_624 / 4.3e6
    assert f"64x65535x16 {20 / bound:.2f}x" in lines[2]


def test_union_measures_verifies_and_reports_each_provider(monkeypatch):
    """The whole of one size on a CPU, with a stand-in for the CUDA graph that runs the calls."""
    torch_on_cpu(monkeypatch, "full", "arange", "zeros", "randint")

    def run_calls(graphs, replays):
        for calls, _ in graphs:
            for call in calls:
                call()
        return [union.timing.Timing("graph_us", [1.0, 2.0, 3.0], count) for _, count in graphs]

    monkeypatch.setattr(union.timing, "capture_torch", lambda calls: calls)
    monkeypatch.setattr(union.timing, "time_torch_graphs", run_calls)

    def lies(case, ids):
        made = peers._torch_sort(case, ids)
        spoil = made.outputs[-1]["expert_ids"]
        return peers.TorchCalls(
            [*made.calls[:-1], lambda: (made.calls[-1](), spoil.fill_(0))], made.outputs
        )

    def breaks(case, ids):
        raise RuntimeError("no such op")

    def leaves_out(case, ids):
        made = peers._torch_sort(case, ids)
        outputs = [*made.outputs]

        def last():
            made.calls[-1]()
            outputs[-1] = {k: x for k, x in made.outputs[-1].items() if k != "sorted_token_ids"}

        return peers.TorchCalls([*made.calls[:-1], last], outputs)

    providers = [
        peers.Provider("lacking", "torch", "", make=leaves_out),
        peers.Provider("right", "torch", "", make=peers._torch_sort),
        peers.Provider("wrong", "torch", "", make=lies),
        peers.Provider("broken", "torch", "", make=breaks),
        peers.Provider("small", "torch", "", make=breaks, max_pairs=8),
    ]
    rows = union.measure_graphs(CASE, providers)
    found = {r["provider"]: r for r in rows}
    assert set(found) == {"lacking", "right", "wrong", "broken"} and len(rows) == 4
    assert found["lacking"]["error"] == "KeyError: 'sorted_token_ids'"
    assert found["right"]["verified"] and not found["wrong"]["verified"]
    assert (found["right"]["p50_us"], found["right"]["calls"]) == (2.0, 20)
    assert (
        found["wrong"]["error"] == "expert_ids differ" and "no such op" in found["broken"]["error"]
    )
    assert all(r["grid"] == "union" and r["case"] == "96x7x8" for r in rows)


def test_sizes_whose_samples_scatter_are_measured_again_whoever_they_favour(monkeypatch):
    torch_on_cpu(monkeypatch, "full", "arange", "zeros", "randint")
    scattered, quiet = [1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0], [2.0] * 7
    tries = []

    def run_calls(graphs, replays):
        for calls, _ in graphs:
            for call in calls:
                call()
        tries.append([quiet, scattered if len(tries) < 2 else [1.5] * 7])
        return [union.timing.Timing("graph_us", samples, 20) for samples in tries[-1]]

    monkeypatch.setattr(union.timing, "capture_torch", lambda calls: calls)
    monkeypatch.setattr(union.timing, "time_torch_graphs", run_calls)
    monkeypatch.setattr(union, "_PAUSE_S", 0)
    both = [peers.Provider(name, "torch", "", make=peers._torch_sort) for name in ("one", "other")]
    rows = union.measure_graphs(CASE, both)
    assert len(tries) == 3 and [row["p50_us"] for row in rows] == [2.0, 1.5]
    tries[:] = []
    monkeypatch.setattr(union, "_ATTEMPTS", 2)  # it may never be quiet: then what was seen last
    rows = union.measure_graphs(CASE, both)
    assert len(tries) == 2 and [row["p50_us"] for row in rows] == [2.0, 3.0]


def test_graphs_are_timed_in_turns(monkeypatch):
    """A disturbance of a few milliseconds costs every graph a sample, not one its median."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            self.at = math.nan

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at  # ms

    class Graph:
        def __init__(self, ms):
            self.ms = ms

        def replay(self):
            clock[0] += self.ms * (10 if 13 < clock[0] < 50 else 1)

    cuda = SimpleNamespace(Event=Event, synchronize=lambda: None)
    monkeypatch.setattr("torch.cuda", cuda)
    slow, fast = timing.time_torch_graphs([(Graph(2.0), 4), (Graph(1.0), 2)], replays=9)
    assert slow.percentile(50) == fast.percentile(50) == 500.0 and slow.calls == 4
    assert max(slow.samples_us) == max(fast.samples_us) == 5000.0
    [alone] = timing.time_torch_graphs([(Graph(1.0), 1)], replays=3)
    assert alone.samples_us == [1000.0] * 3


def test_union_under_jit_verifies_and_wants_a_device_span(monkeypatch):
    monkeypatch.setattr(union, "_CALLS", (2, 3))
    provider = next(p for p in peers.jax_providers() if p.name == "xla")
    cases = [CASE, Case(num_pairs=16, num_experts=300, block_size=4)]

    def spans(programs, given, executions):
        return [union.timing.Timing("span_us", [2.0, 1.0, 3.0], len(g)) for g in given]

    monkeypatch.setattr(union.timing, "time_jit_spans", spans)
    rows = union.measure_jit(cases, provider)
    assert [(r["case"], r["verified"], r["p50_us"]) for r in rows] == [
        ("96x7x8", True, 2.0),
        ("16x300x4", True, 2.0),
    ]
    wall = union.timing.Timing("wall_us", [1.0], 1, "no kernel in the trace")
    monkeypatch.setattr(
        union.timing, "time_jit_spans", lambda programs, *a, **k: [wall] * len(programs)
    )
    monkeypatch.setattr(union.timing, "time_jit_span", lambda *a, **k: wall)
    [row_] = union.measure_jit(cases[:1], provider)
    assert not row_["verified"] and row_["error"] == "no kernel in the trace"
    wrong = peers.Provider("wrong", "jax", "", make=lambda case: provider.make(cases[1]))
    assert not union.measure_jit(cases[:1], wrong)[0]["verified"]
