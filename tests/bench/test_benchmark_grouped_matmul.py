"""benchmarks/grouped_matmul.py: its cases, its check of a result, its ratios. Nothing is timed."""

import argparse
import io

import numpy as np
import pytest

from benchmarks import grouped_matmul as bench
from moe_align_jax._core.hopper import MAX_SHARED_BYTES

SMALL = bench.Size(40, 32, 16, 4)
MASKED = bench.Size(30, 32, 16, 4, max_rows=16)
OPTIONS = argparse.Namespace(
    **{"only": "", "variants": True, "jax_example": True, "lax": True, "libraries": True},
    **{"deep_gemm": "", "executions": 1, "replays": 1},
)


@pytest.mark.parametrize("size", [SMALL, MASKED], ids=str)
def test_ours_is_right_and_a_wrong_row_is_seen(size):
    inputs = bench.Inputs(size, 2)
    assert inputs.counts.sum() == size.rows and inputs.hit == (inputs.counts > 0).sum()
    makers = [lambda i: bench.ours_masked(i)] if size.max_rows else []
    if not size.max_rows:
        makers = [lambda i: bench.ours_aligned(i, 16), bench.ours_ragged, bench.lax_ragged]
    for make in makers:
        [(call, xs, sampled)] = make(inputs)
        rows = np.asarray(sampled(call(xs[0], inputs.w))).astype(np.float32)
        assert inputs.wrong(rows) == ""
        assert "relative error" in inputs.wrong(np.roll(rows, 1, axis=0))
        assert "relative error" in inputs.wrong(np.full_like(rows, np.nan))


def test_counts_of_bytes_and_operations():
    inputs = bench.Inputs(SMALL, 1)
    assert inputs.flops == 2 * 40 * 32 * 16
    assert inputs.bytes == 2 * (inputs.hit * 32 * 16 + 40 * (32 + 16))


def test_zipf_prefers_the_first_experts():
    counts = np.bincount(bench.SIZES[5].expert_of_row(), minlength=128)
    assert counts[0] > 4 * counts[8] > 8 * counts[127] > 0


def test_every_variant_has_a_provider_and_fits_its_block():
    for size in bench.SIZES:
        names = bench.providers(size, OPTIONS)
        assert any(name.startswith("ours") for name in names)
        for kind, block, tiles in bench.variants(size):
            more = "ragged, " if kind == "ragged" else ""
            assert f"ours, {more}{tiles.name}" in names
            assert kind != "blocks" or block % tiles.bm == 0
            many = tiles.bm > 96 and tiles.bm % 16 == 0
            rows, slots = (tiles.bm // (1 + many), 1) if tiles.form == "swap" else (64, 2)
            used = tiles.stages * tiles.bk * (tiles.bm + tiles.bn) * 2 + 2 * slots * rows * 128
            assert used + 1024 <= MAX_SHARED_BYTES


def test_ratios_are_to_the_best_grouped_peer():
    rows = [
        {"case": "c", "provider": "torch.mm, dense", "us": 50.0},
        {"case": "c", "provider": "torch._grouped_mm", "us": 120.0},
        {"case": "c", "provider": "lax.ragged_dot", "us": 900.0},
        {"case": "c", "provider": "ours, ragged_dot", "us": 60.0},
        {"case": "c", "provider": "ours, broken", "reason": "wrong"},
    ]
    [text] = bench.ratios(rows)
    assert "0.500 of torch._grouped_mm" in text and "1.200 of dense" in text


def test_rounds_go_forth_and_back_and_one_that_fails_leaves_the_others(monkeypatch, capsys):
    order = []

    def prepared(name):
        def measure():
            order.append(name)
            turn = order.count(name)
            if name == "wrong" and turn == 2:
                return "relative error 1.0", None
            metric = "wall_us" if (name, turn) == ("blind", 1) else "span_us"
            return "", bench.timing.Timing(metric, [10.0 * len(order)] * 3, note=metric)

        def fail():
            raise MemoryError("none left")

        return lambda inputs, pool: fail() if name == "large" else measure

    names = ("first", "wrong", "large", "blind")
    monkeypatch.setattr(bench, "providers", lambda *_: {name: prepared(name) for name in names})
    monkeypatch.setattr(bench.timing, "read_rate", lambda: 1000.0)
    monkeypatch.setattr("sys.stdin", io.StringIO("go\n"))
    given = vars(OPTIONS) | {"calls": 1, "rounds": 3}
    rows = {row["provider"]: row for row in bench.run_case(SMALL, argparse.Namespace(**given))}
    assert order == ["first", "wrong", "blind", "blind", "wrong", "first", "first", "blind"]
    assert rows["first"]["us"] == 60  # of 10, 60 and 70
    # The samples that are no span are left out, and its note says that there were some.
    assert (rows["blind"]["us"], rows["blind"]["metric"]) == (60, "span_us")
    assert rows["blind"]["note"] == "wall_us; span_us"
    assert rows["wrong"]["reason"] == "AssertionError: relative error 1.0"
    assert rows["large"]["reason"] == "MemoryError: none left"
    assert capsys.readouterr().out.count(" us") == 5  # every turn but the last ones


def test_a_case_prepares_waits_and_measures(monkeypatch, capsys):
    monkeypatch.setattr(bench.timing, "read_rate", lambda: 1000.0)
    monkeypatch.setattr("sys.stdin", io.StringIO("go\n"))
    given = vars(OPTIONS) | {"only": "ours, ragged_dot", "variants": False, "calls": 1, "rounds": 2}
    rows = list(bench.run_case(SMALL, argparse.Namespace(**given)))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "READY" and len(printed) == 2 and " us" in printed[1]
    [row] = rows
    assert row["status"] == "ok" and row["us"] > 0 and row["rows_in_use"] == SMALL.rows
    assert bench.line(row).startswith(SMALL.name)
