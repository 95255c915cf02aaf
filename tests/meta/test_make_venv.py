"""tools/make_venv.sh with a stand-in for Python: what it installs, what it trusts and what it says."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "tools" / "make_venv.sh"
TOOLS = ("sh", "cat", "rm", "mkdir", "dirname", "tr", "cp", "printf", "echo")
PYTHON = f"""#!/bin/sh
case "$1 $2" in
"-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
"-m pip") echo "$*" >>"$LOG"; case "$3" in install) exit "${{PIP_EXIT:-0}}" ;; esac ;;
*) exec {sys.executable} "$@" ;;
esac
"""
OLD = """#!/bin/sh
[ "$1" = --version ] && echo Python 3.11.7
exit 1
"""


@pytest.fixture
def machine(tmp_path):
    """A PATH with a shell's tools and whatever Python a test puts there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return folder


def put(machine, name, text):
    path = machine / name
    path.write_text(text)
    path.chmod(0o755)


def make(machine, *extras, script=SCRIPT, pip_exit=0):
    log = machine.parent / "log"
    log.write_text("")
    environment = {"PATH": str(machine), "LOG": str(log), "PIP_EXIT": str(pip_exit)}
    done = subprocess.run(
        ["sh", str(script), str(machine.parent / "venv"), *extras],
        env=environment,
        capture_output=True,
        text=True,
    )
    installs = [line for line in log.read_text().splitlines() if "install" in line]
    return done, installs


def test_second_make_installs_nothing(machine):
    put(machine, "python3.12", PYTHON)
    done, installs = make(machine, "cli", "test")
    assert done.returncode == 0 and len(installs) == 1 and installs[0].endswith(".[cli,test]")
    done, installs = make(machine, "cli")
    assert done.returncode == 0 and installs == [] and done.stdout == ""
    done, installs = make(machine, "cli", "torch")
    assert len(installs) == 1 and installs[0].endswith(".[torch]")


@pytest.mark.parametrize("name", ["python3", "python", "python3.13"])
def test_any_python_that_is_new_enough_serves(machine, name):
    put(machine, "python3.12", OLD)  # a shim whose version is not installed
    put(machine, name, PYTHON)
    assert make(machine, "cli")[0].returncode == 0


def test_missing_and_old_python_are_named(machine):
    done, installs = make(machine, "cli")
    assert done.returncode == 1 and "Python 3.12 or newer is missing" in done.stderr
    assert "make test PYTHON=" in done.stderr and not installs
    put(machine, "python3", OLD)
    done, installs = make(machine, "cli")
    assert done.returncode == 1 and "found Python 3.11.7" in done.stderr and not installs
    assert not (machine.parent / "venv").exists()


def test_failed_install_says_what_to_do_and_is_done_anew(machine):
    put(machine, "python3.12", PYTHON)
    done, installs = make(machine, "cli", pip_exit=1)
    assert done.returncode == 1 and "pip could not install the extras [cli]" in done.stderr
    (machine.parent / "venv" / "left-over").touch()
    done, installs = make(machine, "cli")
    assert done.returncode == 0 and len(installs) == 1
    assert not (machine.parent / "venv" / "left-over").exists()


@pytest.mark.parametrize("harm", ["no python", "unfinished", "empty", "moved"])
def test_half_made_environment_is_made_anew(machine, harm):
    put(machine, "python3.12", PYTHON)
    venv = machine.parent / "venv"
    if harm == "empty":  # killed while it was made
        venv.mkdir()
    else:
        make(machine, "cli")
    (venv / "left-over").touch()
    if harm == "no python":
        (venv / "bin" / "python").unlink()
    if harm == "unfinished":
        (venv / ".unfinished").touch()
    if harm == "moved":
        (venv / ".made-in").write_text("/elsewhere\n")
    done, installs = make(machine, "cli")
    assert done.returncode == 0 and len(installs) == 1
    assert not (venv / "left-over").exists() and not (venv / ".unfinished").exists()


def test_environment_of_somebody_else_is_kept(machine):
    put(machine, "python3.12", PYTHON)
    venv = machine.parent / "venv"
    subprocess.run(["sh", str(machine / "python3.12"), "-m", "venv", str(venv)], check=True)
    (venv / "theirs").touch()
    done, installs = make(machine, "cli")
    assert done.returncode == 0 and len(installs) == 1 and (venv / "theirs").exists()
    assert make(machine, "cli")[1] == []


def test_changed_dependencies_are_installed(machine, tmp_path):
    put(machine, "python3.12", PYTHON)
    checkout = tmp_path / "checkout"
    (checkout / "tools").mkdir(parents=True)
    script = shutil.copy(SCRIPT, checkout / "tools")
    (checkout / "pyproject.toml").write_text("a = 1\n")
    assert len(make(machine, "cli", script=script)[1]) == 1
    assert make(machine, "cli", script=script)[1] == []
    (checkout / "pyproject.toml").write_text("a = 2\n")
    assert len(make(machine, "cli", script=script)[1]) == 1


def test_python_given_to_make_must_be_new_enough(tmp_path):
    old = tmp_path / "python"
    old.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 11); $2"\n'
    )
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "-s", "test", f"PYTHON={old}"],
        cwd=SCRIPT.parents[1],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "PYTHON must be 3.12 or newer" in done.stderr
