"""Cases of a benchmark, each in a process of its own: one that hangs costs its case alone.

Several prepare side by side, which is mostly compiling; then one after the other has the GPU for itself. A
case is a generator of rows that calls `children.wait_for_turn` when it is prepared.

With `--turns FILE` several such programs may run at once: one shares the file's lock while its processes
prepare, and holds it alone while one of them measures. Another program that must not run beside a timing
shares it too: `flock --shared FILE COMMAND`.
"""

import argparse
import contextlib
import fcntl
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Any

from benchmarks import children
from benchmarks.children import Child
from benchmarks.rows import Writer


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    patience: float = 30,
    preparing: float = 120,
    together: int = 1,
    budget: float = math.inf,
    timeout: str = "",
) -> None:
    """The options that `run` reads, with a benchmark's defaults; `timeout` is the one that this benchmark's
    earlier command lines call `--timeout`."""
    if timeout:
        hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        parser.add_argument("--timeout", dest=timeout, type=float, **hidden)
    parser.add_argument("--out", metavar="FILE", help="JSONL to append to")
    parser.add_argument("--patience", type=float, default=patience, help="seconds without a row")
    seconds: dict[str, Any] = {"type": float, "default": preparing}
    # --compiling: its name in earlier command lines.
    parser.add_argument("--preparing", "--compiling", help="seconds until prepared", **seconds)
    parser.add_argument(
        "--together", type=int, default=together, help="processes that prepare side by side"
    )
    parser.add_argument("--budget", type=float, default=budget, help="seconds in all")
    parser.add_argument(
        "--turns", default="", metavar="FILE", help="whose lock is held while one measures"
    )
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)


def chosen(options: argparse.Namespace, cases: Sequence[Any]) -> list[int]:
    """Numbers of the cases that `--sizes` names; all by default."""
    return [int(k) for k in options.sizes.split(",") if k] or [*range(len(cases))]


def run(
    module: str,
    argv: Sequence[str] | None,
    options: argparse.Namespace,
    cases: Sequence[Any],
    run_case: Callable[[Any, argparse.Namespace], Iterable[dict[str, Any]]],
    line: Callable[[dict[str, Any]], str],
    ratios: Callable[[list[dict[str, Any]]], Iterable[str]],
    numbers: Sequence[int] | None = None,
) -> int:
    """Runs `python -m MODULE ARGV --child K` for each case, or, as that process, the case K.

    Args:
        module: the benchmark's name, `benchmarks.NAME`.
        argv: its command line; None for this process's own.
        options: of that command line: those of `add_arguments`.
        cases: all cases; each has a `name`.
        run_case: the rows of a case, as they come.
        line: a row as it is printed.
        ratios: the lines that are printed of a case's rows.
        numbers: of the cases to run; all by default.

    Returns:
        The exit code: 1 when a case failed or was not done in time.
    """
    if options.child is not None:
        children.give(run_case(cases[options.child], options))
        return 0
    given, failed = list(sys.argv[1:] if argv is None else argv), False
    numbers = range(len(cases)) if numbers is None else numbers
    until, out = time.monotonic() + options.budget, Writer(options.out or None)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(open(options.turns, "a")) if options.turns else None
        # Nobody else may measure while one prepares: with turns all prepare first.
        together = max(1, len(numbers)) if lock else options.together
        for some in itertools.batched(numbers, together):
            _lock(lock, fcntl.LOCK_SH, until)
            started = {k: Child(module, [*given, "--child", str(k)]) for k in some}
            wait_until_ready(started.values(), options.preparing, until)
            for k, child in started.items():
                _lock(lock, fcntl.LOCK_EX, until)
                limits = (options.patience, until)
                rows, ended = measured(child, cases[k].name, *limits, out, line, ratios)
                if lock:
                    fcntl.flock(lock, fcntl.LOCK_UN)
                    time.sleep(0.05)  # others who wait for it come first
                failed |= not ended or any(row["status"] == "failed" for row in rows)
    return 1 if failed else 0


def _lock(file: IO[str] | None, kind: int, until: float) -> None:
    """Takes that lock of the file, if there is one; no longer tried when the time is up."""
    while file is not None:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                return
            time.sleep(0.02)


def wait_until_ready(started: Iterable[Child], preparing: float, until: float) -> None:
    """Waits until all are prepared, or their time is up. What does not become ready `measured` will say."""
    until = min(until, time.monotonic() + preparing)
    for child in started:
        with contextlib.suppress(TimeoutError):
            child.ready(preparing, until)


def measured(
    child: Child,
    name: str,
    patience: float,
    until: float,
    out: Writer,
    line: Callable[[dict[str, Any]], str],
    ratios: Callable[[list[dict[str, Any]]], Iterable[str]],
) -> tuple[list[dict[str, Any]], bool]:
    """The rows of a child that is prepared, and whether it ended in order. They are printed, and written to
    `out`; `patience` and `until` are those of `Child.ready`."""
    rows: list[dict[str, Any]] = []
    reason = ""
    try:
        child.ready(1.0, until)
        if time.monotonic() > until:  # without the lock, too: another program may be measuring
            raise TimeoutError("no time was left")
        child.go()
        for row in child.rows(patience, until):
            rows.append(row)
            keep(row, out, line)
    except TimeoutError as error:
        reason = str(error)
    code = child.end()
    if code or reason:
        print(f"{name}: {reason or f'its process ended with {code}'}", flush=True)
    for text in ratios(rows):
        print(text, flush=True)
    return rows, not code and not reason


def keep(row: dict[str, Any], out: Writer, line: Callable[[dict[str, Any]], str]) -> None:
    """Prints a row, and writes it to `out`: at once, as what runs on may be ended at its limit."""
    print(line(row), flush=True)
    out.write([row])
