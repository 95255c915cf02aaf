"""benchmarks/case_processes.py: a process for each case, whose rows are appended and whose failure counts."""

import fcntl
import subprocess
import sys
import time

import pytest

from benchmarks import case_processes, rows

MODULE = """
import argparse, sys, time
from pathlib import Path
from types import SimpleNamespace
from benchmarks import case_processes, children

children.machine.facts = lambda commit: {"gpu": "none"}  # without jax
cases = [SimpleNamespace(name=name) for name in ("small", "large", "huge")]
log = Path(__file__).with_suffix(".log")


def say(*words):
    with log.open("a") as file:
        print(*words, file=file, flush=True)


def run_case(case, options):
    say("prepares", case.name)
    if case.name == options.dies:
        raise SystemExit(3)
    yield {"case": case.name, "status": "ok", "early": True}
    print("a word of", case.name, flush=True)
    children.wait_for_turn()
    say("begins", case.name)
    time.sleep(0.2)
    yield {"case": case.name, "status": "failed" if case.name == options.fails else "ok"}
    if case.name == options.hangs:
        time.sleep(60)
    say("ends", case.name)


parser = argparse.ArgumentParser()
for name in ("--sizes", "--dies", "--fails", "--hangs"):
    parser.add_argument(name, default="")
case_processes.add_arguments(parser, patience=2, timeout="patience")
options = parser.parse_args()
ratios = lambda rows: [f"{len(rows)} of them"]
line = lambda row: f"{row['case']} is {row['status']}"
sys.exit(
    case_processes.run(
        *("some", None, options, cases, run_case, line, ratios),
        case_processes.chosen(options, cases),
    )
)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    (tmp_path / "some.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{case_processes.children.machine.ROOT}")
    given = [sys.executable, "-m", "some"]
    return lambda *argv: subprocess.Popen([*given, *argv], stdout=subprocess.PIPE, text=True)


def output_of(process):
    return process.communicate(timeout=100)[0].splitlines()


def events(tmp_path):
    return [tuple(text.split()) for text in (tmp_path / "some.log").read_text().splitlines()]


def test_cases_prepare_side_by_side_and_measure_in_turn(tmp_path, start):
    """One ends while it prepares, one hangs behind its rows: the others' rows come, and both are told."""
    file = tmp_path / "folder" / "rows.jsonl"
    process = start("--together", "3", "--dies", "large", "--hangs", "huge", "--out", str(file))
    lines = output_of(process)
    assert process.returncode == 1
    words = {f"a word of {name}" for name in ("small", "huge")}
    assert words < {*lines}
    assert [text for text in lines if text not in words] == [
        *("small is ok", "small is ok", "2 of them"),
        *("large: its process ended with 3", "0 of them"),
        *("huge is ok", "huge is ok", "huge: silent for 2 s", "2 of them"),
    ]
    kept = rows.read([file])
    assert [(row["case"], "early" in row) for row in kept] == [
        *(("small", True), ("small", False), ("huge", True), ("huge", False)),
    ]
    assert all(row["gpu"] == "none" for row in kept)
    assert file.read_text().count("gpu") == 1  # what they share stands once
    seen = events(tmp_path)
    assert {what for what, _ in seen[:3]} == {"prepares"}
    assert seen[3:] == [("begins", "small"), ("ends", "small"), ("begins", "huge")]


def test_one_after_the_other_a_failed_row_and_a_choice(tmp_path, start):
    process = start("--sizes", "1,2", "--fails", "large")
    assert "large is failed" in output_of(process) and process.returncode == 1
    assert [name for _, name in events(tmp_path)] == ["large"] * 3 + ["huge"] * 3
    process = start("--sizes", "0", "--timeout", "50", "--compiling", "60")
    assert output_of(process)[-1] == "2 of them" and process.returncode == 0


def test_none_is_begun_when_the_time_is_up(tmp_path, start):
    process = start("--budget", "0")
    lines = output_of(process)
    assert process.returncode == 1
    assert [text for text in lines if "time" in text] == [
        f"{name}: no time was left" for name in ("small", "large", "huge")
    ]
    assert not (tmp_path / "some.log").exists() or "begins" not in dict(events(tmp_path))


def test_none_measures_while_another_program_holds_the_lock(tmp_path, start):
    """It waits to share the lock before it prepares, and for those who share it before a case is measured."""
    turns = tmp_path / "turns"
    with turns.open("a") as mine:
        fcntl.flock(mine, fcntl.LOCK_EX)
        process = start("--turns", str(turns), "--sizes", "0,1")
        time.sleep(1.5)  # a program that did not wait would have prepared
        assert not (tmp_path / "some.log").exists()
        fcntl.flock(mine, fcntl.LOCK_SH)
        until = time.monotonic() + 60
        while not (tmp_path / "some.log").exists() or len(events(tmp_path)) < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(0.5)
        assert {what for what, _ in events(tmp_path)} == {"prepares"}
        fcntl.flock(mine, fcntl.LOCK_UN)
        output_of(process)
    assert process.returncode == 0
    assert [what for what, _ in events(tmp_path)][2:] == ["begins", "ends"] * 2
