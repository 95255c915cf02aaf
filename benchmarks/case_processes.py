"""Sizes of a benchmark, each in a process of its own: one that hangs costs its size alone.

With a file of turns (`--turns FILE`) all sizes are prepared side by side, which is mostly compiling, and take
turns on the GPU to be timed. A process that prepares shares the file's lock; one that times holds it alone.
Another program that must not run beside a timing shares it too: `flock --shared FILE COMMAND`.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.children import Child


def run(
    module: str,
    argv: list[str] | None,
    options: argparse.Namespace,
    sizes: Sequence[Any],
    run_case: Callable[[Any, argparse.Namespace], Iterable[dict[str, Any]]],
    ratios: Callable[[list[dict[str, Any]]], Iterable[str]],
) -> int:
    """Runs `python -m MODULE ARGV --child K` for each size, or, as that process, the size K.

    Args:
        module: the benchmark's name, `benchmarks.NAME`.
        argv: its command line; None for this process's own.
        options: of that command line: `sizes`, `timeout`, `out` and `child`.
        sizes: all sizes; each has a `name`.
        run_case: the rows of a size, as they come.
        ratios: the lines that are printed of these rows.

    Returns:
        The exit code: 1 when a size failed or was not done in time.
    """
    if options.child is not None:
        rows: list[dict[str, Any]] = []
        facts = machine.facts()  # ahead of the timings: it starts processes
        for row in run_case(sizes[options.child], options):
            rows.append(row)
            if options.out:  # at once: what runs on may be ended at its limit
                Path(options.out).parent.mkdir(parents=True, exist_ok=True)
                with open(options.out, "a") as file:
                    file.write(json.dumps(row | facts) + "\n")
        print("\n".join(ratios(rows)), flush=True)
        return 1 if any(row["status"] == "failed" for row in rows) else 0
    failed = 0
    given = list(argv if argv is not None else sys.argv[1:])
    chosen = [int(k) for k in options.sizes.split(",") if k] or range(len(sizes))
    commands = {k: [sys.executable, "-m", module, *given, "--child", str(k)] for k in chosen}
    if getattr(options, "turns", ""):
        return _side_by_side(commands, options, sizes)
    for k, command in commands.items():
        try:
            failed += subprocess.run(command, timeout=options.timeout).returncode != 0
        except subprocess.TimeoutExpired:
            failed += 1
            print(f"{sizes[k].name}: not done after {options.timeout} s", flush=True)
    return 1 if failed else 0


def _side_by_side(
    commands: dict[int, list[str]], options: argparse.Namespace, sizes: Sequence[Any]
) -> int:
    children = {}
    for k, command in commands.items():
        with open(options.turns, "a") as file:
            # The child inherits the lock: no other child has a turn before this one is prepared.
            fcntl.flock(file, fcntl.LOCK_SH)
            number = file.fileno()
            command = [*command, "--turn", str(number)]
            children[k] = subprocess.Popen(command, pass_fds=[number])
    end, failed = time.monotonic() + options.timeout, 0
    for k, child in children.items():
        try:
            failed += child.wait(max(0.0, end - time.monotonic())) != 0
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            failed += 1
            print(f"{sizes[k].name}: not done after {options.timeout} s", flush=True)
    return 1 if failed else 0


def add_turns(parser: argparse.ArgumentParser) -> None:
    """The options that `run` and `turn` read."""
    parser.add_argument(
        "--turns",
        default="",
        help="file whose lock is held while a size is timed; all prepare at once",
    )
    parser.add_argument("--turn", type=int, help=argparse.SUPPRESS)


@contextlib.contextmanager
def turn(options: argparse.Namespace) -> Iterator[None]:
    """Within it a size of `run` is timed: all others are prepared, and none is timed meanwhile."""
    number = getattr(options, "turn", None)
    if number is not None:
        fcntl.flock(number, fcntl.LOCK_EX)
    yield
    if number is not None:
        fcntl.flock(number, fcntl.LOCK_UN)


def run_side_by_side(
    module: str,
    argv: list[str] | None,
    options: argparse.Namespace,
    sizes: Sequence[Any],
    prepare: Callable[[Any, argparse.Namespace], Callable[[], Iterator[dict[str, Any]]]],
    line: Callable[[dict[str, Any]], str],
    ratios: Callable[[list[dict[str, Any]]], Iterable[str]],
) -> int:
    """As `run`, of processes that prepare side by side, and measure one after the other.

    Args:
        module, argv, sizes, ratios: as for `run`.
        options: `sizes`, `out` and `child` as there; `timeout`: seconds without a row; `together`: how many
            sizes prepare side by side; `preparing`: seconds that they have for it.
        prepare: called with a size; what it returns measures, and gives rows as they come.
        line: a row as it is printed.
    """
    given = list(argv if argv is not None else sys.argv[1:])
    if options.child is not None:
        measure, facts = prepare(sizes[options.child], options), machine.facts()
        print("READY", flush=True)
        sys.stdin.readline()
        for row in measure():
            print("ROW " + json.dumps(row | facts), flush=True)
        return 0
    numbers, failed = [int(k) for k in options.sizes.split(",") if k] or range(len(sizes)), False
    for some in itertools.batched(numbers, options.together):
        children = {k: Child(module, [*given, "--child", str(k)]) for k in some}
        until = time.monotonic() + options.preparing
        for child in children.values():
            with contextlib.suppress(TimeoutError):  # its rows will not come: said below
                child.ready(options.preparing, until)
        for k, child in children.items():
            rows, ended = measured(
                child,
                sizes[k].name,
                options.timeout,
                time.monotonic() + 3600,
                options.out,
                line,
                ratios,
            )
            failed |= not ended or any(row["status"] == "failed" for row in rows)
    return 1 if failed else 0


def measured(
    child: Child,
    name: str,
    patience: float,
    until: float,
    out: str | None,
    line: Callable[[dict[str, Any]], str],
    ratios: Callable[[list[dict[str, Any]]], Iterable[str]],
) -> tuple[list[dict[str, Any]], bool]:
    """The rows of a child that is prepared, and whether it ended in order. They are printed, and appended to
    `out`; `patience` and `until` are those of `Child.rows`."""
    rows: list[dict[str, Any]] = []
    reason = ""
    try:
        child.ready(1.0, until)
        child.go()
        for row in child.rows(patience, until):
            rows.append(row)
            print(line(row), flush=True)
            if out:
                Path(out).parent.mkdir(parents=True, exist_ok=True)
                with Path(out).open("a") as file:
                    file.write(json.dumps(row) + "\n")
    except TimeoutError as error:
        reason = str(error)
    code = child.end()
    if code or reason:
        print(f"{name}: {reason or f'its process ended with {code}'}", flush=True)
    print("\n".join(ratios(rows)), flush=True)
    return rows, not code and not reason
