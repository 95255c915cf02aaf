"""benchmarks/case_processes.py: a process for each size, whose rows are appended and whose failure counts."""

import argparse
import json
import subprocess
from types import SimpleNamespace

import pytest

from benchmarks import case_processes

SIZES = [SimpleNamespace(name=name) for name in ("small", "large", "huge")]


def run(run_case=None, argv=None, **given):
    options = argparse.Namespace(**{"child": None, "sizes": "", "out": None, "timeout": 5} | given)
    ratios = lambda rows: [f"{len(rows)} rows"]  # noqa: E731
    return case_processes.run("benchmarks.some", argv or [], options, SIZES, run_case, ratios)


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("failed", 1)])
def test_a_child_appends_its_rows(status, code, tmp_path, capsys):
    file = tmp_path / "folder" / "rows.jsonl"
    for _ in range(2):
        case = lambda size, options: [{"size": size.name, "status": status}]  # noqa: E731
        assert run(case, child=1, out=str(file)) == code
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    assert [(row["size"], row["status"]) for row in rows] == [("large", status)] * 2
    assert "1 rows" in capsys.readouterr().out


def test_every_size_runs_although_one_hangs_and_one_fails(monkeypatch, capsys):
    commands = []

    def fake(command, timeout):
        commands.append(command[2:])
        if command[-1] == "0":
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=int(command[-1]) - 1)

    monkeypatch.setattr(subprocess, "run", fake)
    assert run(argv=["--calls", "3"]) == 1
    assert commands == [["benchmarks.some", "--calls", "3", "--child", k] for k in "012"]
    assert "small: not done after 5 s" in capsys.readouterr().out
    assert run(sizes="1") == 0
