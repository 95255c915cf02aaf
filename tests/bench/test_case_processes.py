"""benchmarks/case_processes.py: a process for each size, whose rows are appended and whose failure counts."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
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


_SLEEPER = """
import argparse, sys, time
from benchmarks import case_processes

parser = argparse.ArgumentParser()
parser.add_argument("--child", type=int)
case_processes.add_turns(parser)
options = parser.parse_args()
time.sleep(0.4 * options.child)  # prepares
with open(sys.argv[0] + ".log", "a") as log:
    print("prepared", options.child, file=log, flush=True)
    with case_processes.turn(options):
        print("begins", options.child, file=log, flush=True)
        time.sleep(0.2)
        print("ends", options.child, file=log, flush=True)
sys.exit(options.child == 1)
"""


def test_all_are_prepared_before_one_is_timed_and_no_two_are_timed_at_once(tmp_path, monkeypatch):
    module = tmp_path / "sleeper.py"
    module.write_text(_SLEEPER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(case_processes.__file__).parents[1]}")
    given = {"sizes": "0,1", "turns": str(tmp_path / "turns"), "timeout": 30}
    options = argparse.Namespace(**{"child": None, "out": None} | given)
    assert case_processes.run("sleeper", [], options, SIZES, None, None) == 1
    lines = [line.split() for line in Path(f"{module}.log").read_text().splitlines()]
    assert sorted(lines[:2]) == [["prepared", "0"], ["prepared", "1"]]
    assert [what for what, _ in lines[2:]] == ["begins", "ends"] * 2
    assert lines[2][1] == lines[3][1] != lines[4][1] == lines[5][1]


SIDE = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from benchmarks import case_processes

sizes = [SimpleNamespace(name=name) for name in ("small", "large", "huge")]
number = int(sys.argv[-1]) if "--child" in sys.argv else None
folder = sys.argv[1]


def prepare(size, options):
    (Path(folder) / size.name).touch()
    if size.name == "large":
        raise SystemExit(3)

    def rows():
        there = all((Path(folder) / each.name).exists() for each in sizes)
        yield {"case": size.name, "status": "ok" if there else "failed"}
        if size.name == "huge":
            time.sleep(60)

    return rows


options = SimpleNamespace(
    child=number, sizes="", out=folder + "/rows.jsonl", timeout=2, together=3, preparing=30
)
ratios = lambda rows: [f"{len(rows)} of them"]
line = lambda row: f"{row['case']} is {row['status']}"
sys.exit(
    case_processes.run_side_by_side("side", sys.argv[1:], options, sizes, prepare, line, ratios)
)
"""


def test_sizes_prepare_side_by_side_and_measure_in_turn(tmp_path, monkeypatch):
    """One ends while it prepares, one hangs behind its row: the others' rows come, and both are told."""
    (tmp_path / "side.py").write_text(SIDE)
    path = f"{tmp_path}:{case_processes.machine.ROOT}"
    monkeypatch.setenv("PYTHONPATH", path)
    command = [sys.executable, "-m", "side", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines() == [
        *("small is ok", "1 of them"),
        *("large: its process ended with 3", "0 of them"),
        *("huge is ok", "huge: silent for 2 s", "1 of them"),
    ]
    rows = [json.loads(text) for text in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == ["small", "huge"]
