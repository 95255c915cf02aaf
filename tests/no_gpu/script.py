"""The command that compiles some kernels without a GPU: what its modules have in common.

A module gives `main` its own name and a check: `(plugin, runtime) -> (a line, what is wrong)` per kernel. The
command starts itself again in the folder that the toolchain has made, with these two as arguments and its own
behind them. Each takes `--sample N`, and compiles then one kernel in N.
"""

import argparse
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from tests.no_gpu import cases, ptx, toolchain, worker

type Report = tuple[str, list[str]]

INSIDE = "--inside"  # the first argument of the process that runs in the toolchain's folder


_step = 1  # of the kernels that are compiled
_listed = 0  # kernels that there are, compiled or not


def one_in_sample[T](kernels: Iterable[T]) -> Iterator[T]:
    """The kernels that the command was asked for: all, or one in N."""

    def counted() -> Iterator[T]:
        global _listed
        for kernel in kernels:
            _listed += 1
            yield kernel

    return cases.one_in(_step, counted())


def direct(
    plugin: str, runtime: str, kernels: Iterable[tuple[str, Any, Callable[..., Iterator[str]]]]
) -> Iterator[Report]:
    """Compiles (what it is, kernel, `faults(text, launch, used)`) as they are, as for a direct launch."""
    checker = worker.Checker(plugin, runtime)
    checker._mode = "direct"
    for what, kernel, faults in one_in_sample(kernels):
        [(text, launch)] = checker.compiler([kernel])
        used = ptx.usage(checker.assembled(text))
        found = [*faults(text, launch, used), *checker._recording_faults(kernel, launch)]
        yield f"{used.registers:3} registers, grid {launch.grid[0]:5}  {what}", found


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument("--sample", type=int, default=1, metavar="N", help="compile one in N")
    return parser


def _print(reports: Iterable[Report]) -> int:
    wrong = count = 0
    for line, found in reports:
        print(line, flush=True)
        for fault in found:
            print(f"    {fault}", file=sys.stderr, flush=True)
        wrong, count = wrong + len(found), count + 1
    left = f", one in {_step} of {_listed} cases" if _step > 1 else ""
    print(f"{count} kernels{left}, {wrong} faults")
    return wrong


def run_inside(name: str, check: Callable[..., Iterable[Report]], given: list[str]) -> NoReturn:
    """Runs `check(plugin, runtime, *arguments)` of the arguments given, and ends the process: status 1 when
    anything is wrong."""
    global _step
    options, rest = _parser(name).parse_known_args(given)
    _step = options.sample
    status = 1
    try:
        status = 1 if _print(check(*rest)) else 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)  # without the destructors of a driver that is none


def start_inside(name: str, given: list[str]) -> int:
    """Starts the module `name` in the toolchain's folder, with `INSIDE`, the plugin and the runtime before
    the arguments given, and returns its exit code; 1 when anything is missing."""
    try:
        tools = toolchain.set_up()
    except toolchain.Missing as missing:
        print(f"{name}: {missing}", file=sys.stderr)
        return 1
    paths = [str(tools.plugin), str(tools.runtime)]
    command = [sys.executable, "-m", name, INSIDE, *paths, *given]
    return subprocess.run(command, cwd=tools.folder, env=tools.environment()).returncode


def main(name: str, check: Callable[..., Iterable[Report]]) -> int:
    """Runs `check(plugin, runtime, *arguments of the command line)`.

    Returns:
        The exit code: 1 when anything is wrong or missing.
    """
    if sys.argv[1:2] == [INSIDE]:
        run_inside(name, check, sys.argv[2:])
    _parser(
        name
    ).parse_known_args()  # --help, and a sample that is no number, before anything is installed
    return start_inside(name, sys.argv[1:])
