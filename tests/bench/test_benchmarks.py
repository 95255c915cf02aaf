"""benchmarks/: cases, verification, tables, fetching, and one run on this machine."""

import contextlib
import functools
import gc
import json
import subprocess
import sys
import weakref
import zipfile

import jax
import numpy as np
import pytest

from benchmarks import cases, fetch, peers, report, run, timing
from benchmarks import rows as rows_of
from benchmarks.cases import Case, expected, mismatch
from moe_align_jax import _traces as traces
from moe_align_jax._cli.demo import plain_loop
from tests import helpers

SMALL = [
    Case(num_pairs=24, num_experts=5, block_size=4, top_k=2),
    Case(num_pairs=64, num_experts=3, block_size=8, skew="one"),
    Case(num_pairs=96, num_experts=40, block_size=16, skew="zipf"),
    Case(num_pairs=8, num_experts=256, block_size=16),
]
WITH_OPTIONS = Case(num_pairs=96, num_experts=10, block_size=8, with_options=True)


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_expected_equals_a_plain_loop(case):
    for seed in range(3):
        ids = case.topk_ids(seed)
        assert ids.shape == (case.num_pairs // case.top_k, case.top_k) and ids.dtype == np.int32
        assert ids.min() >= 0 and ids.max() < case.num_experts
        want, loop = expected(case, ids), plain_loop(ids, case.block_size, case.num_experts)
        np.testing.assert_array_equal(want.sorted_token_ids, loop.sorted_token_ids)
        np.testing.assert_array_equal(want.expert_ids, loop.expert_ids)
        np.testing.assert_array_equal(want.tokens_per_expert, loop.tokens_per_expert)
        assert want.num_tokens_post_padded == loop.num_tokens_post_padded[0]
        np.testing.assert_array_equal(
            want.sorted_token_ids[want.row_of_pair], np.arange(case.num_pairs)
        )


def test_options_rename_every_expert_before_counting():
    ids = WITH_OPTIONS.topk_ids(0)
    assert sorted(WITH_OPTIONS.expert_map) == list(range(10)) and WITH_OPTIONS.name.endswith(
        "-options"
    )
    want = expected(WITH_OPTIONS, ids)
    loop = plain_loop(9 - ids, 8, 10)
    np.testing.assert_array_equal(want.sorted_token_ids, loop.sorted_token_ids)
    assert WITH_OPTIONS.bytes_moved == Case(
        num_pairs=96, num_experts=10, block_size=8
    ).bytes_moved + 4 * (10 + 1 + 96)


def test_union_grid_is_the_cover_each_size_once():
    sizes = {
        (row["num_tokens"] * row["top_k"], row["num_experts"], row["block_size"])
        for row in json.loads(cases._COVER.read_text())
    }
    grid = [(c.num_pairs, c.num_experts, c.block_size) for c in cases.union_grid()]
    assert sorted(grid) == sorted(s for s in sizes if s[0]) and len(grid) > 300
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)


def test_skews_are_what_they_say():
    sizes = {"num_pairs": 8192, "num_experts": 64, "block_size": 16}
    share = {}
    for skew in cases.SKEWS:
        counts = np.bincount(Case(**sizes, skew=skew).topk_ids(1).ravel(), minlength=64)
        share[skew] = np.sort(counts)[::-1] / 8192
    assert share["one"].tolist() == [1.0] + [0.0] * 63
    assert share["uniform"].max() < 2 / 64
    harmonic = (1 / np.arange(1, 65)).sum()
    np.testing.assert_allclose(share["zipf"][:3], [1 / harmonic / i for i in (1, 2, 3)], rtol=0.1)
    steep = np.array([i**-1.3 for i in range(1, 65)])
    np.testing.assert_allclose(share["zipf1.3"][:3], (steep / steep.sum())[:3], rtol=0.1)


def test_bytes_moved_count_each_array_once():
    case = Case(num_pairs=8192, num_experts=64, block_size=128, top_k=2)
    # ids, sorted_token_ids (P = 16320, as vLLM computes it), expert_ids, the total, the counts
    assert case.bytes_moved == 4 * (8192 + 16320 + 128 + 1 + 64)


def answer(case, ids):
    want = expected(case, ids)
    total = np.array([want.num_tokens_post_padded], np.int32)
    return want, {
        "sorted_token_ids": want.sorted_token_ids.copy(),
        "expert_ids": want.expert_ids.copy(),
        "num_tokens_post_padded": total,
        "tokens_per_expert": want.tokens_per_expert.copy(),
    }


@pytest.mark.parametrize(
    ("field", "place", "value", "found"),
    [
        ("num_tokens_post_padded", 0, 4, "num_tokens_post_padded is 4"),
        ("expert_ids", 0, 3, "expert_ids differ first at block 0"),
        ("expert_ids", -1, 0, "expert_ids differ first at block"),
        ("sorted_token_ids", -1, peers.POISON, "sorted_token_ids differ first at row"),
        ("sorted_token_ids", 0, 99, "sorted_token_ids differ first at row 0"),
        ("tokens_per_expert", 2, -1, "tokens_per_expert differ first at 2"),
    ],
)
def test_mismatch_finds_each_kind_of_wrong_answer(field, place, value, found):
    case = SMALL[0]
    want, got = answer(case, case.topk_ids(0))
    assert mismatch(case, want, got) == ""
    got[field][place] = value
    assert found in mismatch(case, want, got)
    assert mismatch(case, want, got, stable=False)


def test_mismatch_forgives_only_what_a_peer_does_not_promise():
    case = SMALL[0]
    want, got = answer(case, case.topk_ids(0))
    rows = got["sorted_token_ids"]
    rows[[0, 1]] = rows[[1, 0]]
    assert mismatch(case, want, got) and mismatch(case, want, got, stable=False) == ""
    start = int(np.flatnonzero(want.expert_ids != want.expert_ids[0])[0]) * case.block_size
    rows[[0, start]] = rows[[start, 0]]  # now across two experts
    assert mismatch(case, want, got, stable=False)

    want, got = answer(case, case.topk_ids(0))
    got["expert_ids"][want.num_tokens_post_padded // case.block_size :] = peers.POISON
    assert mismatch(case, want, got) and mismatch(case, want, got, expert_tail=False) == ""
    got["sorted_token_ids"][want.num_tokens_post_padded :] = peers.POISON
    assert mismatch(case, want, got, expert_tail=False)
    assert mismatch(case, want, got, expert_tail=False, row_tail=False) == ""
    want, got = answer(case, case.topk_ids(0))
    rows = got["sorted_token_ids"]
    # a longer buffer, as SGLang's, must hold the sentinel to its end
    rows = got["sorted_token_ids"]
    for tail, good in ((case.num_pairs, True), (peers.POISON, False)):
        got["sorted_token_ids"] = np.append(rows, np.int32(tail))
        assert (mismatch(case, want, got, expert_tail=False) == "") == good


@pytest.mark.parametrize("case", [*SMALL, WITH_OPTIONS], ids=lambda c: c.name)
@pytest.mark.parametrize("name", ["xla", "xla_argsort"])
def test_jax_providers_are_right(name, case):
    provider = next(p for p in peers.jax_providers() if p.name == name)
    assert provider.absent == ""
    if case.with_options and name == "xla_argsort":
        assert "options" in provider.refuses(case)
        return
    assert provider.refuses(case) == ""
    ids = case.topk_ids(7)
    result = run._as_numpy(jax.jit(provider.make(case))(ids))
    assert mismatch(case, expected(case, ids), result) == ""


@pytest.fixture
def torch_on_cpu(monkeypatch):
    """torch, with what peers.py makes on a GPU made on the CPU."""
    torch = helpers.torch_on_cpu(monkeypatch, "full", "arange", "zeros")
    monkeypatch.setattr(peers, "_on_gpu", lambda ids: [torch.from_numpy(i) for i in ids])
    return torch


def check_torch_peer(make, **promises):
    for case in SMALL:
        ids = [case.topk_ids(seed) for seed in range(2)]
        prepared = make(case, ids)
        prepared.poison()
        for call in prepared.calls:
            call()
        for one, got in zip(ids, prepared.results(), strict=True):
            assert mismatch(case, expected(case, one), got, **promises) == ""


def test_torch_sort_is_right_on_a_cpu(torch_on_cpu):
    check_torch_peer(peers.torch_sort)


# The schemas of vllm 0.33.0's and sglang-kernel 0.4.4's libraries, around a stand-in.
VLLM_OP = """moe_align_block_size(Tensor topk_ids, int num_experts, int block_size,
    Tensor(a!) sorted_token_ids, Tensor(b!) experts_ids, Tensor(c!) num_tokens_post_pad,
    Tensor? maybe_expert_map, Tensor(d!)? scatter_idx=None) -> ()"""
SGLANG_OP = """moe_align_block_size(Tensor topk_ids, int num_experts, int block_size,
    Tensor(a!) sorted_token_ids, Tensor(b!) experts_ids, Tensor(c!) num_tokens_post_pad,
    Tensor(d!) cumsum_buffer, bool pad_sorted_token_ids) -> ()"""


def fill(topk_ids, num_experts, block_size, rows, labels, total):
    """The contract, into a peer's own tensors (whose order within an expert is free: reversed)."""
    out = plain_loop(topk_ids.numpy(), block_size, num_experts)
    rows.fill_(topk_ids.numel())
    start = 0
    for count in out.tokens_per_expert:
        rows.numpy()[start : start + count] = out.sorted_token_ids[start : start + count][::-1]
        start += -(-count // block_size) * block_size
    labels.numpy()[: out.expert_ids.size] = out.expert_ids
    total.fill_(start)


def test_vllm_op_is_called_by_its_schema(torch_on_cpu):
    def op(ids, num_experts, block_size, rows, labels, total, expert_map, scatter_idx=None):
        assert ids.dim() == 2 and expert_map is None and scatter_idx is None
        fill(ids, num_experts, block_size, rows, labels, total)

    with torch_on_cpu.library._scoped_library("_moe_C", "DEF") as library:
        library.define(VLLM_OP)
        library.impl("moe_align_block_size", op, "CPU")
        check_torch_peer(peers._vllm, stable=False)


def test_sglang_op_is_called_by_its_schema(torch_on_cpu):
    def op(ids, buckets, block_size, rows, labels, total, cumsum, pad):
        assert ids.dim() == 2 and cumsum.shape == (buckets + 1,) and pad is True
        fill(ids, buckets - 1, block_size, rows, labels, total)

    with torch_on_cpu.library._scoped_library("sgl_kernel", "DEF") as library:
        library.define(SGLANG_OP)
        library.impl("moe_align_block_size", op, "CPU")
        check_torch_peer(peers._sglang, stable=False, expert_tail=False)


SMALL_TRITON = """
def is_arch_support_pdl():
    raise ImportError("SGLang is not here")

def moe_align_small_numel(ids, buckets, block_size, rows, labels, total):
    import benchmarks.test_hook as hook
    hook.seen.append((ids, buckets, block_size, rows, labels, total, is_arch_support_pdl()))
"""


@pytest.mark.parametrize("pdl", [False, True])
def test_sglang_small_is_called_as_its_file_defines_it(torch_on_cpu, tmp_path, monkeypatch, pdl):
    """A stand-in for the Triton kernel, in a file of that name; tails stay unwritten, as there."""
    import types

    hook = types.ModuleType("benchmarks.test_hook")
    hook.seen = []
    monkeypatch.setitem(sys.modules, "benchmarks.test_hook", hook)
    path = tmp_path / f"sgl_small_{pdl}.py"
    path.write_text(SMALL_TRITON)
    for case in (SMALL[0], SMALL[1], SMALL[3]):
        ids = [case.topk_ids(seed) for seed in range(2)]
        prepared = peers._sglang_small(case, ids, path=str(path), pdl=pdl)
        prepared.poison()
        for call in prepared.calls:
            call()
            given, buckets, block_size, rows, labels, total, supports = hook.seen[-1]
            assert (buckets, block_size, supports) == (case.num_experts + 1, case.block_size, pdl)
            out = plain_loop(given.numpy(), block_size, buckets - 1)
            used = int(out.num_tokens_post_padded[0])
            rows.numpy()[:used] = out.sorted_token_ids[:used]
            labels.numpy()[: used // block_size] = out.expert_ids[: used // block_size]
            total.fill_(used)
        for one, got in zip(ids, prepared.results(), strict=True):
            want = expected(case, one)
            assert mismatch(case, want, got, expert_tail=False, row_tail=False) == ""
            assert (got["sorted_token_ids"][want.num_tokens_post_padded :] == peers.POISON).all()


def test_absent_peers_say_why():
    torch_peers = peers.torch_providers("nowhere.so", None)
    assert [p.name for p in torch_peers] == [
        *("torch_bridge", "vllm", "sglang", "sglang_small", "sglang_small_pdl"),
        *("torch_sort", "empty"),
    ]
    try:
        import torch

        if torch.cuda.is_available():
            reasons = ["does not serve here", "`python -m benchmarks.fetch`"]
        else:
            reasons = ["sees no CUDA device"] * 2
    except ImportError:
        reasons = ["PyTorch is not installed"] * 2
    for peer, reason in zip(torch_peers, reasons, strict=False):
        assert reason in peer.absent


def test_a_peer_is_not_asked_for_more_experts_than_it_takes():
    by_name = {p.name: p for p in peers.torch_providers(None, None)}
    vllm, small = by_name["vllm"], by_name["sglang_small"]
    assert small.refuses(Case(num_pairs=64, num_experts=9000, block_size=16)) == ""
    assert "64 pairs" in small.refuses(Case(num_pairs=65, num_experts=8, block_size=16, top_k=1))
    assert (
        "8x256x16" in by_name["empty"].refuses(SMALL[0])
        and by_name["empty"].refuses(SMALL[3]) == ""
    )
    assert by_name["torch_bridge"].refuses(WITH_OPTIONS) == "" and vllm.refuses(WITH_OPTIONS)
    assert vllm.refuses(Case(num_pairs=8, num_experts=992, block_size=16)) == ""
    assert "992" in vllm.refuses(Case(num_pairs=8, num_experts=993, block_size=16))


def test_wall_time_is_per_call():
    import time

    timed = timing.time_wall(lambda: time.sleep(0.02), calls=10, repeats=3)
    assert timed.metric == "wall_us" and len(timed.samples_us) == 3
    assert 2000 <= timed.percentile(50) < 20_000


def test_replays_rest_as_long_as_executions_under_jit(monkeypatch):
    """Without a rest a peer's long calls reach the power limit of the GPU, which ours would not."""
    torch = pytest.importorskip("torch")
    told = []

    class Graph:
        def replay(self):
            told.append("replay")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append("event")

        def elapsed_time(self, end):
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: told.append("busy"))
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: told.append(seconds))
    timed = "event", "replay", "event", "wait", traces.REST_S
    [taken] = timing.time_torch_graphs([(Graph(), 4)], replays=2)
    assert taken.samples_us == [750.0, 750.0]
    # The GPU is busy while the host launches the replay, which is timed from its own begin on.
    assert told == ["wait", *["busy", *timed] * 2]
    told.clear()
    timing.time_torch_graphs([(Graph(), 4), (Graph(), 4)], replays=1)
    assert told == ["wait", *["replay", *timed] * 2]


def test_a_graph_keeps_what_its_calls_read_and_write(monkeypatch):
    """Replays of a graph whose result was let go wrote to memory that a later capture had given back."""
    torch = pytest.importorskip("torch")

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            pass

    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    out = torch.empty(4)
    held, made = weakref.ref(out), []
    graph = timing.capture_torch([functools.partial(lambda x: made.append(x.numel()), out)])
    del out
    gc.collect()
    assert held() is not None and made == [4, 4]
    del graph
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("size", [1 << 30, 53_000_000])
def test_a_read_is_of_memory_and_its_fastest_shape_counts(size, monkeypatch):
    torch = pytest.importorskip("torch")
    empty, captured = torch.empty, []
    for name in ("zeros", "empty"):
        monkeypatch.setattr(torch, name, lambda n, device: empty(n, device="meta"))
    monkeypatch.setattr(timing, "capture_torch", lambda calls: captured.append(calls))

    def taken(graphs, replays):
        return [timing.Timing("graph_us", [us]) for us in (300.0, 200.0, 400.0)]

    monkeypatch.setattr(timing, "time_torch_graphs", taken)
    rate = timing.read_rate(size)
    for calls in captured:
        arrays = [call.args[0] for call in calls]
        assert all(x.is_contiguous() and 0.97 * size < x.nbytes <= size for x in arrays)
        assert len({id(x._base) for x in arrays}) == len(arrays) >= 2
        assert sum(x.nbytes for x in arrays) > 450e6  # H200: 50 MB of L2
        assert all(
            call.args[1] == 1 and call.keywords["out"].numel() == len(call.args[0])
            for call in calls
        )
    assert rate == pytest.approx(captured[1][0].args[0].nbytes / 200 / 1e3) and len(captured) == 3


def test_span_without_a_gpu_is_wall_time_and_says_so():
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU, whose span is measured")
    program = jax.jit(lambda many: [x * 2 for x in many])
    timed = timing.time_jit_span(program, [np.ones(4, np.float32)] * 3, executions=2)
    assert timed.metric == "wall_us" and timed.calls == 3
    assert "no kernel" in timed.note and "wall time instead" in timed.note


def test_one_trace_of_several_programs_is_cut_into_each_ones_executions():
    """Two programs, of 2 and 3 kernels, 3 executions each, by hand."""
    from moe_align_jax._traces import Event, spans_in_order

    events, now = [], 0.0
    for kernels, length in ((2, 1000.0), (3, 500.0)):
        for _ in range(3):
            for _ in range(kernels):
                events.append(Event("k", now, now + length))
                now += length + 100
            now += 2e6
    spans = spans_in_order(events, executions=3, calls=[2, 1])
    assert spans[0].us_per_call == [pytest.approx(1.05)] * 3 and spans[0].kernels_per_call == 1.0
    assert spans[1].us_per_call == [pytest.approx(1.7)] * 3 and spans[1].kernels_per_call == 3.0
    # A kernel too many in one execution of the second: it alone has no value.
    events.append(Event("k", events[-1].end_ns + 1, events[-1].end_ns + 2))
    spans = spans_in_order(events, executions=3, calls=[2, 1])
    assert len(spans[0].us_per_call) == 3 and spans[1].us_per_call == []
    assert spans_in_order([], executions=3, calls=[1, 1])[0].us_per_call == []


def test_commit_comes_from_the_environment_where_git_is_not(monkeypatch):
    from benchmarks import machine

    monkeypatch.setenv(machine.COMMIT_VARIABLE, "abc123")
    assert machine.facts()["commit"] == "abc123" and machine.facts("other")["commit"] == "other"


def test_run_verifies_times_and_appends(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    arguments = ["--cases", "8x256x16,512x64x16", "--calls", "2", "--providers", "xla,xla_argsort"]
    for _ in range(2):
        assert (
            run.main([*arguments, "--out", str(out), "--commit", "abc", "--executions", "3"]) == 0
        )
    rows = rows_of.read([out])
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        assert row["verified"] and row["commit"] == "abc" and row["jax"] == jax.__version__
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        case = next(c for c in cases.CASES if c.name == row["case"])
        assert row["bytes"] == case.bytes_moved
        assert row["gbps"] == pytest.approx(row["bytes"] / row["p50_us"] / 1e3, abs=0.06)
    text = capsys.readouterr().out
    assert "4 results verified against NumPy and timed, 0 failed" in text
    if jax.default_backend() == "cpu":
        assert {r["metric"] for r in rows} == {"wall_us"} and rows[0]["gpu"] is None
        assert "No GPU here" in text and "no claim about a GPU" in text


def test_run_reports_a_wrong_provider_and_fails(monkeypatch, capsys, tmp_path):
    def wrong(case):
        right = peers.xla_argsort(case)

        def align(ids):
            out = right(ids)
            return {**out, "expert_ids": out["expert_ids"].at[0].add(1)}

        return align

    liar = peers.Provider("liar", "jax", "a wrong one", make=wrong)
    breaks = peers.Provider("breaks", "jax", "a broken one", make=lambda case: 1 / 0)
    monkeypatch.setattr(peers, "jax_providers", lambda: [liar, breaks])
    monkeypatch.setattr(peers, "torch_providers", lambda *paths: [])
    out = tmp_path / "rows.jsonl"
    assert run.main(["--cases", "8x256x16", "--calls", "2", "--out", str(out)]) == 1
    rows = rows_of.read([out])
    assert [r["verified"] for r in rows] == [False, False]
    assert "expert_ids differ first at block 0" in rows[0]["error"]
    assert "ZeroDivisionError" in rows[1]["error"]
    assert all("p50_us" not in r for r in rows)
    assert "0 results verified" in capsys.readouterr().out


def test_run_refuses_unknown_names(capsys):
    with pytest.raises(SystemExit):
        run.main(["--cases", "7x7x7"])
    with pytest.raises(SystemExit):
        run.main(["--grid", "union,table"])
    assert run.main(["--providers", "nobody"]) == 2
    assert "unknown provider nobody" in capsys.readouterr().out


# -- report -----------------------------------------------------------------------------------


def row(case, provider, p50, **more):
    facts = {"date": "2026-11-21T10:00:00+00:00", "gpu": "H100", "driver": "1", "jax": "0.11.2"}
    facts |= {"torch": "2.11.0", "commit": "abc", "version": "v", "metric": "graph_us"}
    return {**facts, "case": case, "provider": provider, "verified": True, "p50_us": p50, **more}


ROWS = [
    *[row("8x256x16", "mosaic_gpu", p50, metric="span_us") for p50 in (1.3, 9.0, 1.2)],
    row("8x256x16", "vllm", 3.9),
    row("8x256x16", "empty", 0.8),
    row("512x256x16", "mosaic_gpu", 4.0, metric="span_us"),
    row("512x256x16", "vllm", 3.0),
    {**row("512x256x16", "sglang", 0.0), "verified": False, "error": "wrong"},
]


def test_report_takes_the_median_run():
    median = report.median_rows(ROWS)
    assert median["8x256x16", "mosaic_gpu"]["p50_us"] == 1.3
    assert ("512x256x16", "sglang") not in median


def test_report_shows_wins_losses_and_failures():
    header, lines = report.cells(ROWS)
    assert header[1] == "mosaic_gpu (device span under jit)"
    assert lines == [
        ["8x256x16", "1.30", "3.90 (3.00x)", "-"],
        ["512x256x16", "4.00", "3.00 (0.75x)", "WRONG or failed"],
    ]
    assert report.losses(ROWS) == "Ours is slower in 1 of 2 comparisons: 512x256x16 against vllm."
    text = report.markdown(ROWS)
    assert "**H100**, 2026-11-21, driver 1, jax 0.11.2, torch 2.11.0. " in text
    assert "| 8x256x16 | 1.30 | 3.90 (3.00x) | - |" in text and "commit" not in text
    assert "Ours is slower in 1 of 2 comparisons: 512x256x16 against vllm." in text


def test_headline_shows_five_sizes_with_date_gpu_clock_and_launch():
    ours = [row(name, "torch_bridge", 2.0) for name in (*report.README_CASES, "64x256x16")]
    sizes = [*ours, *ROWS, row("8x256x16", "torch_sort", 1.0), row("8x256x16", "sglang_small", 1.0)]
    text = report.headline(sizes)
    assert "H100, 2026-11-21, jax 0.11.2, torch 2.11.0. Microseconds per call" in text
    assert "CUDA events around the replay of a CUDA graph" in text and "device span" in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    # 3.9 and 3.0 of vLLM's, and 1.0 of torch's sort, against 2.0 of ours by the same clock: a loss shows.
    assert table == [
        "| pairs x experts x block | ours | vLLM | torch.sort | ours under jit |",
        "| 8x256x16 | 2.00 | 3.90 (1.95x) | 1.00 (0.50x) | 1.30 |",
        "| 512x256x16 | 2.00 | 3.00 (1.50x) | - | 4.00 |",
        "| 8192x64x128 | 2.00 | - | - | - |",
        "| 32768x256x64 | 2.00 | - | - | - |",
        "| 524288x256x128 | 2.00 | - | - | - |",
    ]
    assert all(len(line) <= 110 for line in text.splitlines())
    assert report.headline([row("64x256x16", "vllm", 1.0)]) == "\n"


def test_report_reads_jsonl_and_fills_a_file_between_its_marks(tmp_path, capsys):
    results, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    results.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    begin, end = report.MARKS
    page.write_text(f"before\n{begin}\nold figures\n{end}\nafter\n")
    assert report.main([str(results), "--update", str(page)]) == 0
    text = page.read_text()
    assert text == f"before\n{begin}\n{capsys.readouterr().out}{end}\nafter\n"
    assert "old figures" not in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="must hold the lines"):
        report.update(page, "text")


# -- fetch ------------------------------------------------------------------------------------


def test_fetch_extracts_the_op_and_notes_its_release(tmp_path):
    wheel = fetch.WHEELS["vllm"]
    wheels, folder = tmp_path / "wheels", tmp_path / "peers"
    wheels.mkdir()
    with pytest.raises(FileNotFoundError, match="no wheel"):
        fetch.extract(wheels, wheel, folder)
    with zipfile.ZipFile(wheels / "vllm-0.33.0-cp38-abi3-linux.whl", "w") as archive:
        archive.writestr("vllm/other.so", b"no")
        archive.writestr(wheel.member, b"the op")
    with pytest.raises(FileNotFoundError, match="lacks vllm/model_executor"):
        fetch.extract(wheels, wheel, folder)
    assert not list(folder.iterdir())
    with zipfile.ZipFile(wheels / "vllm-0.33.0-cp38-abi3-linux.whl", "a") as archive:
        for member, _ in wheel.python:
            archive.writestr(member, f"source of {member}")
    target = fetch.extract(wheels, wheel, folder)
    callers = {
        "vllm_moe_align_block_size.py": "model_executor/layers/fused_moe/moe_align_block_size.py",
        "vllm_custom_ops.py": "_custom_ops.py",
    }
    for file, member in callers.items():
        assert (folder / file).read_text() == f"source of vllm/{member}"
    assert target == folder / "vllm_moe.so" and target.read_bytes() == b"the op"
    files = [target, *(folder / file for file in callers)]
    assert {peers._version_of(file) for file in files} == {"vllm 0.33.0"}
    with pytest.raises(FileNotFoundError, match="lacks sgl_kernel"):
        fetch.extract(wheels, fetch.WHEELS["sglang"], folder)


def test_fetch_keeps_a_whole_package_in_a_folder(tmp_path):
    wheel = fetch.WHEELS["deep_gemm"]
    assert wheel.package
    inside, _ = wheel.package
    with zipfile.ZipFile(tmp_path / "vllm-0.33.0-cp38-abi3-linux.whl", "w") as archive:
        for member in ("vllm/outside.py", wheel.member, f"{inside}__init__.py"):
            archive.writestr(member, f"text of {member}")
        archive.writestr(f"{inside}include/deep_gemm/a.cuh", "a header")
    target = fetch.extract(tmp_path, wheel, tmp_path / "peers")
    kept = tmp_path / "peers" / "deep_gemm"
    assert target == kept / "_C_extension.abi3.so"
    assert target.read_text() == f"text of {wheel.member}"
    assert (kept / "include" / "deep_gemm" / "a.cuh").read_text() == "a header"
    files = sorted(str(f.relative_to(kept)) for f in kept.rglob("*") if f.is_file())
    assert files == ["_C_extension.abi3.so", "__init__.py", "include/deep_gemm/a.cuh"]
    assert peers._version_of(kept) == "vllm 0.33.0"


def test_fetch_downloads_a_wheel_once_for_all_that_is_in_it(monkeypatch, tmp_path):
    asked, kept = [], []

    def run(command):
        asked.append(command[5])
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(fetch.subprocess, "run", run)
    monkeypatch.setattr(fetch, "extract", lambda folder, wheel, target: kept.append(wheel))
    peers_of = ["vllm", "sglang", "deep_gemm"]
    assert fetch.main([*peers_of, "--folder", str(tmp_path)]) == 0
    assert asked == ["vllm==0.33.0", "sglang-kernel==0.4.4"]
    assert sorted(map(str, kept)) == sorted(str(fetch.WHEELS[name]) for name in peers_of)


def test_fetch_leaves_the_index_to_pip():
    command = fetch.pip_command("vllm==0.33.0", "folder")
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command and "vllm==0.33.0" in command
    assert not any("://" in part or "index" in part for part in command)


def test_fetch_reports_a_pip_that_fails(monkeypatch, capsys, tmp_path):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(fetch.subprocess, "run", lambda command: failed)
    assert fetch.main(["vllm", "--folder", str(tmp_path)]) == 1
    assert "could not fetch vllm==0.33.0" in capsys.readouterr().err


def test_version_of_a_library_without_a_note_is_its_hash(tmp_path):
    library = tmp_path / "some.so"
    library.write_bytes(b"")
    assert peers._version_of(library) == "some.so sha256 e3b0c44298fc"


def test_host_time_is_per_call(monkeypatch):
    """`host_us` divides by its calls, and takes the median of its repeats."""
    torch = pytest.importorskip("torch")
    from benchmarks import host

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = iter([0.0, 3e-3, 10.0, 10.0 + 6e-3, 20.0, 20.0 + 9e-3])
    monkeypatch.setattr(host.time, "perf_counter", lambda: next(clock))
    made = []
    measured = host.host_us({"it": lambda: made.append(1)}, calls=3, repeats=3)
    assert measured == {"it": pytest.approx(2000)}
    assert len(made) == 100 + 9
