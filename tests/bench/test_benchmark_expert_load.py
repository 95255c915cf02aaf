"""benchmarks/expert_load.py on this machine: sizes, rows, and that a wrong count stops it."""

import numpy as np
import pytest

from benchmarks import expert_load, fetch
from benchmarks import rows as rows_of

SMALL = ["--layers", "2", "--experts", "8", "--top-k", "2", "--tokens", "32", "--executions", "2"]


def test_ids_are_what_a_router_gives():
    size = expert_load.Size("x", tokens=32, layers=3, experts=8, top_k=2)
    ids = size.ids(1)
    assert ids.shape == (3, 32, 2) and ids.dtype == np.int32
    assert (ids[:, 30:] == -1).all() and ids[:, :30].min() >= 0 and ids.max() < 8
    assert (ids[:, :30, 0] != ids[:, :30, 1]).all()
    loop = np.zeros((3, 8), int)
    for layer, _, expert in np.argwhere(ids[..., None] == np.arange(8))[:, [0, 1, 3]]:
        loop[layer, expert] += 1
    np.testing.assert_array_equal(size.counts(ids), loop)


def test_rows_of_a_small_run(tmp_path, capsys):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    out = tmp_path / "rows" / "small.jsonl"
    assert expert_load.main([*SMALL, "--cases", "decode", "--out", str(out), "--commit", "x"]) == 0
    rows = rows_of.read([out])
    names = ["off", "on", "on, with a map", "on, counting passes", "scatter-add per layer"]
    for program in ("unrolled", "scanned"):
        mine = [row for row in rows if row["program"] == program]
        assert [row["provider"] for row in mine] == names
        assert mine[0]["extra_us"] == 0.0
    hooks = [row["provider"] for row in rows if row["program"] == "hooks alone"]
    assert len(hooks) == 3 and len(capsys.readouterr().out.splitlines()) == len(rows)
    assert all(row["us"] > 0 and row["commit"] == "x" and row["layers"] == 2 for row in rows)


def test_a_wrong_count_is_not_timed(monkeypatch):
    real = expert_load.Size.counts
    monkeypatch.setattr(expert_load.Size, "counts", lambda self, ids: real(self, ids) + 1)
    with pytest.raises(AssertionError, match="on"):
        expert_load.main([*SMALL, "--cases", "decode", "--programs", "unrolled"])


def test_sglangs_file_is_fetched_without_its_package():
    wheel = fetch.WHEELS["sglang_eplb"]
    assert wheel.file == "sgl_eplb.py" and wheel.replace[1] == "ExpertLocationDispatchInfo = object"


def test_sglangs_recorder_is_fetched_as_it_is():
    wheel = fetch.WHEELS["sglang_recorder"]
    assert wheel.member.endswith("eplb/expert_distribution.py") and wheel.replace is None
    assert wheel.file == "sgl_expert_distribution.py" and wheel.requirement == "sglang==0.5.23"
