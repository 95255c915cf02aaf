"""benchmarks.compile_time on this machine: lowering is measured, and the goal is held against rows."""

import json

import jax

from benchmarks import compile_time
from moe_align_jax import _tuning


def test_every_form_of_the_tables_is_among_the_cases():
    forms = {row.config.form for row in _tuning.table("").rows}
    seen = {
        _tuning.config_for(compile_time.problem_of(case, "")).form for case in compile_time.CASES
    }
    assert seen == forms


def test_lowering_is_measured_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compile_time, "CASES", compile_time.CASES[:2])
    enabled = jax.config.jax_enable_compilation_cache
    out = tmp_path / "new" / "rows.jsonl"
    try:
        arguments = ["--repeats", "2", "--no-direct", "--commit", "abc", "--out", str(out)]
        assert compile_time.main(arguments) == 0
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["provider"] for r in rows] == ["mosaic_gpu, first", "mosaic_gpu", "mosaic_gpu"]
    assert [r["samples"] for r in rows] == [1, 2, 2] and rows[0]["commit"] == "abc"
    assert all(0 < r["lower_s"] < 30 for r in rows)
    if jax.default_backend() == "cpu":
        assert not any("compile_s" in r for r in rows)
        assert "nothing was compiled here" in capsys.readouterr().out


def test_verdict_counts_ordinary_programs():
    def row(provider, total):
        return {"case": "c", "form": "grid", "provider": provider, "total_s": total}

    rows = [row("mosaic_gpu, first", 9), row("mosaic_gpu", 0.2), row("torch_bridge", 0.7)]
    assert compile_time.verdict(rows) == (
        "1 of 2 programs within 0.5 s; the slowest takes 0.70 s (c, grid, torch_bridge)"
    )
    made = compile_time.row_of(
        compile_time.CASES[0], "p", "f", [(0.1, 0.2), (0.3, 0.1), (0.2, 0.9)]
    )
    assert (made["lower_s"], made["compile_s"], made["total_s"]) == (0.2, 0.2, 0.4)
