"""benchmarks/fp8_matmul.py: its cases, its check of a result, its ratios. Nothing is timed."""

import argparse
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from benchmarks import deep_gemm_peer, grouped_matmul, timing
from benchmarks import fp8_matmul as bench
from benchmarks.grouped_matmul import Size
from moe_align_jax._grouped_matmul import launch
from moe_align_jax._grouped_matmul.config import Config

SMALL = Size(40, 256, 128, 4)
MASKED = Size(24, 256, 128, 4, max_rows=16)
OPTIONS = argparse.Namespace(only="", variants=True, deep_gemm="x", executions=1, replays=1)


@pytest.mark.parametrize(("size", "layout"), [(SMALL, "row_major"), (MASKED, "column_major")])
def test_ours_is_right_and_a_wrong_row_is_seen(size, layout, monkeypatch):
    inputs = bench.Inputs(size, 2)
    assert inputs.hit == (inputs.counts > 0).sum() and inputs.rows == inputs.counts.sum()
    given = () if size.max_rows else (16,)
    make = bench.of_masked if size.max_rows else bench.of_blocks
    # The kernel's body is in its own tests; here runs the loop over blocks.
    from moe_align_jax._grouped_matmul import primitive

    monkeypatch.setattr(primitive, "choose", lambda *_: "xla")
    for e4m3 in (True, False):
        call, xs, w, sampled = make(inputs, *given, e4m3=e4m3, layout=layout)
        rows = np.asarray(sampled(call(xs[0], w))).astype(np.float32)
        assert inputs.wrong(rows) == ""
        assert "difference" in inputs.wrong(np.roll(rows, 1, axis=0))
        assert "difference nan" in inputs.wrong(np.full_like(rows, np.nan))


@pytest.mark.parametrize("size", [SMALL, MASKED])
def test_a_library_with_deep_gemms_functions_gets_its_tensors(size, monkeypatch):
    """Here torch_bridge, by jax on the CPU; and one whose result is wrong in one column."""
    torch = pytest.importorskip("torch")
    deep_gemm, inputs = bench._torch_bridge(), bench.Inputs(size, 2)
    function, given, sampled = made = bench.of_torch(inputs)
    assert function.endswith("masked" if size.max_rows else "contiguous") and len(given) == 2
    (_, scales), _, _, layout, *expected = given[1]
    assert scales.stride(-2) == 1 and layout.dtype == torch.int32
    assert expected == ([size.rows // size.experts] if size.max_rows else [])
    timed = []
    monkeypatch.setattr(
        timing, "time_torch_graph", lambda calls, replays: timed.append((len(calls), replays))
    )
    options = argparse.Namespace(replays=7, wall=False)

    class Wrong:
        @staticmethod
        def multiply(*given, **options):
            getattr(deep_gemm, function)(*given, **options)
            given[2][..., 5] += 1

    setattr(Wrong, function, Wrong.multiply)
    with ThreadPoolExecutor(1) as pool:
        measure, fails = (
            bench.prepare_torch(inputs, made, library, options, pool)
            for library in (deep_gemm, Wrong)
        )
    assert measure() == ("", None, None) and timed == [(2, 7)]
    assert "difference" in fails()[0] and len(timed) == 1


@pytest.mark.parametrize("size", [SMALL, MASKED])
def test_steady_steps_make_their_calls_one_after_the_other(size, monkeypatch):
    """Under jit and in a graph; a step's results are those that are compared at its end."""
    from moe_align_jax._grouped_matmul import primitive

    monkeypatch.setattr(primitive, "choose", lambda *_: "xla")
    monkeypatch.setattr(bench, "_MOST_CALLS", 4)
    inputs = bench.Inputs(size, 2)
    assert inputs.calls_of_step == 4
    make = bench.of_masked if size.max_rows else bench.of_blocks
    made = call, xs, w, sampled = make(inputs, *(() if size.max_rows else (16,)), e4m3=True)
    step = bench.lower_step(call, xs, w, 4).compile()
    outs = step([call(x, w) * np.nan for x in (*xs, *xs)], xs, w)
    assert inputs.wrong(sampled(outs[0])) == "" == inputs.wrong(sampled(outs[2]))
    assert inputs.wrong(sampled(outs[1])) and (outs[1] == outs[3]).all()
    taken = timing.Timing("span_us", [50.0])
    monkeypatch.setattr(timing, "time_jit_span", lambda *_, executions: taken)
    monkeypatch.setattr(timing, "time_torch_graph", lambda *_, replays: taken)
    monkeypatch.setattr(timing, "capture_torch", lambda calls: captured.extend(calls) or Graph)

    class Graph:
        @staticmethod
        def replay():
            for each in captured:
                each()

    captured, given = [], []

    def steady_steps(run, wait, us, calls):
        run()
        run()
        given.append((us, calls))
        return [7.0]

    monkeypatch.setattr(timing, "steady_steps", steady_steps)
    options = argparse.Namespace(executions=1, replays=1, wall=True)
    with ThreadPoolExecutor(1) as pool:
        of_torch = bench.of_torch(inputs)
        measures = [
            bench.prepare_jax(inputs, made, options, None, pool),
            bench.prepare_torch(inputs, of_torch, bench._torch_bridge(), options, pool),
        ]
    for measure in measures:
        wrong, found, steady = measure()
        assert (wrong, found) == ("", taken)
        assert steady() == timing.Timing("wall_us", [7.0], 4)
    assert given == [(50.0, 4)] * 2 and len(captured) == 4


def test_steady_steps_come_behind_all_other_times(monkeypatch):
    """They reach the power limit, whose clock the GPU keeps: a span right behind them was too long."""
    told = []

    def provider(name, error=None):
        def measure():
            told.append(f"span {name}")
            return "", timing.Timing("graph_us", [50.0]), steady

        def steady():
            told.append(f"wall {name}")
            if error:
                raise error
            return timing.Timing("wall_us", [60.0], 4)

        return lambda inputs, pool: measure

    def plain(inputs, pool):
        return lambda: ("", timing.Timing("span_us", [40.0]), None)

    providers = {"a": provider("a"), "b": provider("b", ValueError("later: no")), "c": plain}
    monkeypatch.setattr(bench, "providers", lambda *_: providers)
    monkeypatch.setattr(bench.children, "wait_for_turn", lambda: None)
    monkeypatch.setattr(timing, "read_rate", lambda *_: 4.0)
    rows = {r["provider"]: r for r in bench.run_case(SMALL, argparse.Namespace(calls=2))}
    assert told == ["span a", "span b", "wall a", "wall b", "wall a"]
    assert rows["a"]["wall_us"] == 60.0 and "wall 60.0 us" in bench.line(rows["a"])
    assert rows["b"]["status"] == "failed" and "later: no" in rows["b"]["reason"]
    assert rows["c"]["us"] == 40.0 and "wall_us" not in rows["c"]
    # A row without them comes before the next provider is measured.
    told.clear()
    providers["a"] = providers.pop("a")
    del providers["b"]
    found = bench.run_case(SMALL, argparse.Namespace(calls=2))
    assert next(found)["provider"] == "c" and told == []
    assert [row["provider"] for row in found] == ["a"] and told[0] == "span a"
    del providers["a"]
    assert [r["provider"] for r in bench.run_case(SMALL, argparse.Namespace(calls=2))] == ["c"]


def test_full_groups_have_exactly_all_rows():
    inputs = bench.Inputs(Size(32, 128, 64, 2, max_rows=16), 1)
    assert inputs.counts.tolist() == [16, 16]


def test_a_row_says_how_long_its_bytes_are_read():
    inputs = bench.Inputs(SMALL, 1)
    asked = []

    def rate_of(size):
        asked.append(size)
        return 2.0

    measure = lambda: ("", timing.Timing("graph_us", [50.0]), None)  # noqa: E731
    row, _ = bench._row(inputs, "ours, bfloat16", measure, 4.0, rate_of)
    assert asked == [inputs.bytes(2)] and row["same_read_us"] == round(inputs.bytes(2) / 2e3, 2)
    share = inputs.bytes(2) / 2e3 / 50
    assert f"{row['of_read']:.1%} of a read, {share:.1%} of one of its" in bench.line(row)
    failed, _ = bench._row(inputs, "torch_bridge", ValueError("no"), 4.0, rate_of)
    assert "failed: " in bench.line(failed) and len(asked) == 1


def test_counts_of_bytes_and_operations():
    inputs = bench.Inputs(SMALL, 1)
    assert inputs.flops == 2 * 40 * 256 * 128
    assert inputs.bytes(1) == inputs.hit * 256 * 128 + 40 * 256 + 2 * 40 * 128
    assert inputs.bytes(2) == 2 * inputs.bytes(1) - 2 * 40 * 128


def test_every_variant_has_a_provider_and_fits_its_block():
    assert len(bench.SIZES) == 3 + 16 + 3
    for size in bench.SIZES:
        names = bench.providers(size, OPTIONS)
        assert {"torch_bridge", "DeepGEMM"} <= set(names)
        blocks = [] if size.max_rows else grouped_matmul.blocks_of(size)
        wide = [f"ours, bfloat16, blocks of {block}" for block in blocks] or ["ours, bfloat16"]
        assert [name for name in names if "bfloat16" in name] == wide
        for block, tiles in bench.variants(size):
            assert f"e4m3, {tiles.name}" in names and block % tiles.bm == 0


def test_the_tiles_of_a_variant_are_those_of_its_program():
    usual = launch.config_for
    call, xs, w, _ = bench.of_blocks(bench.Inputs(SMALL, 1), 192, e4m3=True)
    texts = []
    for tiles in (None, Config("m", 128, 128, 128, 5)):
        lowered = bench.lower(call, [(xs[0], w)], tiles, lowering_platforms=("cuda",))
        texts.append(lowered.as_text())
        assert launch.config_for is usual
    assert texts[0] != texts[1]
    assert all(text.count("custom_call @mosaic_gpu") == 1 for text in texts)


def test_deep_gemms_layout_is_its_own():
    """As its tests make it: blocks of 128 rows, each of one expert, -1 in rows of padding."""
    counts = np.array([1, 0, 130], np.int32)
    source, expert = deep_gemm_peer.contiguous_layout(counts)
    assert expert.tolist() == [0] + [-1] * 127 + [2] * 130 + [-1] * 126
    assert source[expert >= 0].tolist() == list(range(131))


def test_deep_gemm_is_named_where_it_is_not(tmp_path):
    assert not deep_gemm_peer.is_in(str(tmp_path))
    with pytest.raises(ImportError, match="python -m benchmarks.fetch deep_gemm"):
        deep_gemm_peer.load(str(tmp_path))


def test_ratios_name_every_other_provider_for_jit_and_for_torch():
    rows = [
        {"case": "c", "provider": "e4m3, masked", "us": 50.0},
        {"case": "c", "provider": "e4m3, other", "us": 40.0},
        {"case": "c", "provider": "ours, bfloat16, blocks of 176", "us": 70.0},
        {"case": "c", "provider": "ours, bfloat16", "us": 60.0},
        {"case": "c", "provider": "torch_bridge", "us": 19.0},
        {"case": "c", "provider": "DeepGEMM", "us": 38.0},
        {"case": "c", "provider": "broken", "reason": "wrong"},
    ]
    by_jit, from_torch = bench.ratios(rows)
    assert (
        from_torch
        == "c: torch_bridge 19.0 us, 3.158x ours, bfloat16 (60.0), 2.000x DeepGEMM (38.0)"
    )
    assert by_jit == "c: e4m3, other 40.0 us, 1.500x ours, bfloat16 (60.0), 0.950x DeepGEMM (38.0)"
