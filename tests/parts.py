"""Which cases each of CI's three runs of the suite takes: `--part` of tests/conftest.py.

CI runs the suite with the newest jax, with the oldest that we support, and with 64-bit jax. Every test
function runs in the first of them (in turns, see below). Its cases are shared out by what they cost:

- A function whose cases cost little runs them all: of every four the first run takes two, the others one
  each. Where there are fewer, one of the others repeats the first case.
- A function of `costs.txt` costs more. The first run takes one case in four (in eight, where a case takes
  `SPARSE`), and of those beyond the eighth one in sixteen. One of the others takes as many of the rest,
  unless a case takes `VERY_LONG`; the only case of a function repeats there unless it takes `LONG`. `make
  test-whole` runs what is left, and each run says how many cases of the files that it reads that is. The
  mark `every_case` takes a function out of this: its cases are no sample.

What depends neither on the release of jax nor on its width runs in the first run alone: files about NumPy,
shell, processes, command line, benchmarks and text, the files of PyTorch, and the examples that train and
generate. There it takes, of those beyond the eighth of a function that costs more, one in eight.

Two turns: of these functions, those whose cases take `VERY_LONG` run in one of two turns (`--turn`), and so
do the cases that the other two runs repeat of functions whose cases take `LONG`. `make test` runs both
turns; CI runs the one that the hash of the commit gives (see `.ci/run`), so that over the commits each case
has its turn. Which one that is follows from `costs.txt`; of a function with the mark `every_case` each turn
takes half of the cases.

`costs.txt` comes from `make test-costs`. A function that is new is not in it, and costs little until it is.
"""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("newest-jax", "oldest-jax", "x64")
# They run as where PyTorch is not installed: while CI installs it.
WITHOUT_TORCH = ("x64",)
COSTS = Path(__file__).with_name("costs.txt")
# Seconds of CPU per case from which a function costs more.
COSTLY = 0.05
# Seconds of CPU of a case from which a run takes one in eight.
SPARSE = 0.25
# Seconds of CPU of a case that one run of CI is enough for, and of one whose function the first runs alone.
LONG = 0.5
VERY_LONG = 2.0
# CI runs the very long functions of the first run's own files in this many turns, and the long ones that the
# other runs repeat, too.
TURNS = 2

_ONCE = re.compile(
    r"tests/(bench|bridge|gpu|no_gpu)/|test_(cli|docs|emulator|eplb|files|fork|gpu_test|language_traps|layering|"
    r"make_venv|messages|oracle|package|project_files|sanitize|soak|train_moe|transformers|tun|two_processes|"
    r"type_hints)[^/]*\.py"
)
_WITH_OLDEST_JAX = "tests/bridge/test_align.py"  # PyTorch through the oldest jax
# The cases that a costly function surely shares out; of those that follow one in sixteen runs.
_FEW = 8


def function_of(nodeid: str) -> str:
    return nodeid.split("[")[0]


def by_function(items: list) -> Iterator[tuple[str, list]]:
    """The cases of each test function in an order that does not follow the order of their parameters."""
    functions: dict[str, list] = {}
    for item in items:
        functions.setdefault(function_of(item.nodeid), []).append(item)
    for name, cases in functions.items():
        yield name, sorted(cases, key=lambda item: zlib.crc32(item.nodeid.encode()))


def read_costs() -> dict[str, float]:
    """Seconds of CPU per case of the functions that cost more."""
    rows = (line.split() for line in COSTS.read_text().splitlines() if line[:1] != "#")
    return {name: float(seconds) for seconds, name in rows}


def write_costs(measured: dict[str, list[float]]) -> None:
    """Writes `costs.txt` anew, from the seconds of CPU of cases of every function."""
    rows = {name: sum(seconds) / len(seconds) for name, seconds in measured.items()}
    costly = sorted((name, seconds) for name, seconds in rows.items() if seconds >= COSTLY)
    head = "# Seconds of CPU per case of the test functions that cost more than others: `make test-costs`."
    COSTS.write_text("\n".join([head, *(f"{s:6.2f} {name}" for name, s in costly)]) + "\n")


def turns(costs: dict[str, float], part: str) -> dict[str, int]:
    """The turn of each function that a run of CI takes in turns: both cost about the same.

    Dealt out from the longest on as 0, 1, 1, 0, 0, 1, 1, 0 and so on.
    """
    if part == "newest-jax":
        long = [name for name in costs if costs[name] >= VERY_LONG and _ONCE.search(name)]
    else:
        long = [name for name in costs if costs[name] >= LONG and not _ONCE.search(name)]
    long.sort(key=lambda name: (-costs[name], name))
    return {name: (i + 1) // 2 % TURNS for i, name in enumerate(long)}


def reads(part: str, file: str) -> bool:
    """Whether a run takes cases of this file, or folder ("tests/gpu/"): it need not import the others."""
    if part == "oldest-jax" and file in (_WITH_OLDEST_JAX, "tests/bridge/"):
        return True
    return part == "newest-jax" or not _ONCE.search(file)


def share(function: str, count: int, cost: float = 0.0) -> dict[str, set[int]]:
    """Which of a function's `count` cases each run takes, by their position in `by_function`.

    Args:
        function: its name behind its file's.
        count: how many cases it has.
        cost: seconds of CPU of a case; 0 where all are to run.
    """
    few = range(min(count, _FEW) if cost else count)
    more = range(len(few), count)
    step = 8 if cost >= SPARSE else 4
    if _ONCE.search(function):
        first = {*few[:: step if cost else 1], *more[::8]}
        return {"newest-jax": first, "oldest-jax": set(), "x64": set()}
    again, other, place = "oldest-jax", "x64", 2
    if cost >= VERY_LONG:
        return {"newest-jax": {*few[::step], *more[::16]}, again: set(), other: set()}
    if zlib.crc32(function.encode()) % 2:
        again, other, place = "x64", "oldest-jax", 3
    if cost and count <= place:  # the others have the first case
        first = {0} if count == 1 else {1}
        return {
            "newest-jax": first,
            again: {0} if cost < LONG or count > 1 else set(),
            other: set(),
        }
    if cost:
        return {
            "newest-jax": {*few[::step], *more[::16]},
            again: {*few[place::step], *more[8 + place :: 32]},
            other: {*more[29 - place :: 32]},
        }
    return {
        "newest-jax": {i for i in few if i % 4 < 2},
        again: {*few[place::4]} or {0},
        other: {*few[5 - place :: 4]},
    }


class Chosen(NamedTuple):
    """What `choose` gives."""

    cases: list[Any]
    left: int  # cases that run in none of the three runs
    waiting: int  # cases of this run that the other turn runs


def choose(items: list[Any], part: str, turn: int | None = None) -> Chosen:
    """The cases of one of the three runs.

    Args:
        items: what pytest has collected.
        part: one of `NAMES`.
        turn: which of the `TURNS`; None for all of them.
    """
    costs = read_costs()
    turn_of = turns(costs, part)
    chosen, left, waiting = [], 0, 0
    for function, cases in by_function(items):
        if part == "x64" and "test_doctests" in function:
            continue  # jnp.ones() of an example is float64 there, which grouped products refuse
        whole = cases[0].get_closest_marker("every_case")
        cost = 0.0 if whole else costs.get(function, 0.0)
        shares = share(function, len(cases), cost)
        if _WITH_OLDEST_JAX in function:
            shares["oldest-jax"] = set(range(-(-len(cases) // (16 if cost else 4))))
        ours = sorted(shares[part])
        left += len(cases) - len(set().union(*shares.values()))
        if turn is not None and function in turn_of:
            theirs = len(ours)
            ours = ours[turn::TURNS] if whole else ours if turn_of[function] == turn else []
            waiting += theirs - len(ours)
        chosen += [cases[i] for i in ours]
    return Chosen(chosen, left, waiting)
