"""benchmarks.compile_time on this machine: lowering is measured, and the goal is held against rows."""

import json
import subprocess

import jax

from benchmarks import compile_time
from benchmarks import rows as rows_of
from moe_align_jax._align import tables


def test_every_form_of_the_tables_is_among_the_cases():
    """As jit has it, and as PyTorch does."""
    table = tables.table("")
    forms = {row.config.form for row in table.rows} | {table.batched.form}
    measured = compile_time.programs("")
    assert {tables.config_for(one.jit).form for one in measured} == forms
    assert {tables.config_for(one.direct).form for one in measured} == forms
    assert len({one.name for one in measured}) == len({one.jit for one in measured})
    assert len({one.name for one in measured}) == len(measured) == len({o.direct for o in measured})


def test_lowering_is_measured_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compile_time, "CASES", compile_time.CASES[:1])
    enabled = jax.config.jax_enable_compilation_cache
    out = tmp_path / "new" / "rows.jsonl"
    try:
        arguments = ["--repeats", "2", "--no-direct", "--commit", "abc", "--out", str(out)]
        assert compile_time.main(arguments) == 0
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
    rows = rows_of.read([out])
    assert [r["provider"] for r in rows] == ["mosaic_gpu, first", "mosaic_gpu", "mosaic_gpu"]
    assert [r["form"] for r in rows] == ["warp", "warp", "batched"]
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


def test_rows_hold_the_median_of_each_step():
    runs = [
        {"lower_s": lower, "compile_s": compiled, "first_run_s": 0.01}
        for lower, compiled in ((0.1, 0.2), (0.3, 0.1), (0.2, 0.9))
    ]
    row = compile_time.row_of("c", "p", "f", runs)
    assert (row["lower_s"], row["compile_s"], row["first_run_s"]) == (0.2, 0.2, 0.01)
    assert row["total_s"] == 0.41 and row["samples"] == 3
    assert "total_s" not in compile_time.row_of("c", "p", "f", [{"lower_s": 0.1}])


def test_rows_of_pytorchs_programs_separate_the_self_test(monkeypatch):
    """From an answer as compile_worker.py gives it; its own test says that it does."""
    measured = compile_time.programs("")[-2:]
    seconds = {"lower": 0.1, "compile": 0.2, "assemble": 0.03, "self_test": 0.004}
    asked = []

    def run(command, input, **options):
        asked.append(json.loads(input)["problems"])
        answer = {"programs": [{"error": "no memory"}, {"seconds": seconds}]}
        return subprocess.CompletedProcess(command, 0, "words\n" + json.dumps(answer))

    monkeypatch.setattr(subprocess, "run", run)
    whole, failed, row = compile_time.direct_rows(measured)
    assert [name for name, _ in asked[0]] == ["AlignProblem", "BatchedAlignProblem"]
    assert whole["case"] == "all of these" and failed["error"] == "no memory"
    assert (row["case"], row["form"]) == ("batched 256x512x64", "batched")
    assert (row["lower_s"], row["compile_s"]) == (0.1, 0.2)
    assert (row["assemble_s"], row["self_test_s"], row["total_s"]) == (0.03, 0.004, 0.334)
    assert "1 of 1 programs within" in compile_time.verdict([whole, failed, row])
