"""tools/gpu_test.sh with a stand-in for Python: which processes it starts, and what it makes of their end."""

import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "tools" / "gpu_test.sh"
PYTHON = """#!/bin/sh
echo "$*" >>calls
case "$*" in
*"$FAILS"*) echo "FAILED tests/x.py::test_it"; echo "1 failed"; exit 1 ;;
esac
echo "SKIPPED [1] tests/y.py: needs two GPUs"
echo "3 passed"
"""


@pytest.fixture
def run(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(*arguments, fails="nothing"):
        command = ["sh", str(SCRIPT), *arguments]
        environment = {"FAILS": fails, "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        calls = tmp_path / "calls"
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_alone_comes_first_then_every_part_once(run):
    done, calls = run("./python", "3", "-x", "-k", "a b")
    assert done.returncode == 0, done.stderr
    assert "-m gpu and alone -x -k a b" in calls[0] and "--shard" not in calls[0]
    parts = [f"-m gpu and not alone --shard {k}/3 -x -k a b" for k in (1, 2, 3)]
    assert sorted(call[call.index("-m gpu") :] for call in calls[1:]) == parts
    assert done.stdout.count("3 passed") == done.stdout.count("needs two GPUs") == 4


@pytest.mark.parametrize("fails", ["--shard 2/4", "gpu and alone"])
def test_one_failure_is_a_failure_and_is_named(run, fails):
    done, calls = run("./python", fails=fails)
    assert done.returncode == 1 and len(calls) == 5
    assert done.stdout.count("FAILED tests/x.py::test_it") == 1
    assert done.stdout.count("3 passed") == 4


@pytest.mark.parametrize("arguments", [(), ("./python", "0"), ("./python", "x")])
def test_bad_arguments(run, arguments):
    done, calls = run(*arguments)
    assert done.returncode == 2 and calls == []
    assert "SHARDS" in done.stderr
