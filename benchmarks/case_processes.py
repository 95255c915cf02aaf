"""Sizes of a benchmark, each in a process of its own: one that hangs costs its size alone."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine


def run(
    module: str,
    argv: list[str] | None,
    options: argparse.Namespace,
    sizes: Sequence[Any],
    run_case: Callable[[Any, argparse.Namespace], list[dict[str, Any]]],
    ratios: Callable[[list[dict[str, Any]]], Iterable[str]],
) -> int:
    """Runs `python -m MODULE ARGV --child K` for each size, or, as that process, the size K.

    Args:
        module: the benchmark's name, `benchmarks.NAME`.
        argv: its command line; None for this process's own.
        options: of that command line: `sizes`, `timeout`, `out` and `child`.
        sizes: all sizes; each has a `name`.
        run_case: the rows of a size.
        ratios: the lines that are printed of these rows.

    Returns:
        The exit code: 1 when a size failed or was not done in time.
    """
    if options.child is not None:
        rows = run_case(sizes[options.child], options)
        if options.out:
            facts = machine.facts()
            Path(options.out).parent.mkdir(parents=True, exist_ok=True)
            with open(options.out, "a") as file:
                file.writelines(json.dumps(row | facts) + "\n" for row in rows)
        print("\n".join(ratios(rows)), flush=True)
        return 1 if any(row["status"] == "failed" for row in rows) else 0
    failed = 0
    for k in [int(k) for k in options.sizes.split(",") if k] or range(len(sizes)):
        given = list(argv if argv is not None else sys.argv[1:])
        command = [sys.executable, "-m", module, *given, "--child", str(k)]
        try:
            failed += subprocess.run(command, timeout=options.timeout).returncode != 0
        except subprocess.TimeoutExpired:
            failed += 1
            print(f"{sizes[k].name}: not done after {options.timeout} s", flush=True)
    return 1 if failed else 0
