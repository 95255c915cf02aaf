"""Which cases each of CI's three runs of the suite takes: `--part` of tests/conftest.py.

CI runs the suite with the newest jax, with the oldest that we support, and with 64-bit jax. Every test function
runs in the first of them. Its cases are shared out by what they cost:

- A function whose cases cost little runs them all: of every four the first run takes two, the others one each.
  Where there are fewer, one of the others repeats the first case.
- A function of `costs.txt` costs more. The first run takes one case in four, and of those beyond the eighth one
  in sixteen; one of the others takes half as many. `make test-whole` runs the rest, and each run says how many
  cases that is. The mark `every_case` takes a function out of this: its cases are no sample of one property.

What depends neither on the release of jax nor on its width runs in the first run alone: files about NumPy, shell,
command line, benchmarks and text, PyTorch's, and the examples that train and generate. There it takes one case
in two of a function that costs more.

`costs.txt` comes from `make test-costs`. A function that is new is not in it, and costs little until it is.
"""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("newest-jax", "oldest-jax", "x64")
COSTS = Path(__file__).with_name("costs.txt")
# Seconds of CPU per case from which a function costs more.
COSTLY = 0.1

_ONCE = re.compile(
    r"tests/(bench|bridge|gpu|no_gpu)/|test_(cli|docs|emulator|eplb|files|fork|gpu_test|language_traps|layering|"
    r"make_venv|oracle|package|project_files|sanitize|soak|train_moe|transformers|tun|"
    r"type_hints)[^/]*\.py"
)
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


def share(function: str, count: int, *, costly: bool) -> dict[str, set[int]]:
    """Which of a function's `count` cases each run takes, by their position in `by_function`."""
    few = range(min(count, _FEW) if costly else count)
    more = range(len(few), count)
    if _ONCE.search(function):
        step = 2 if costly else 1
        first = {*few[::step], *more[::_FEW]}
        return {"newest-jax": first, "oldest-jax": set(), "x64": set()}
    again, other = (
        ("oldest-jax", "x64") if zlib.crc32(function.encode()) % 2 else ("x64", "oldest-jax")
    )
    if costly:
        return {
            "newest-jax": {*few[::4], *more[::16]},
            again: {*few[1::4], *more[8::32]} or {0},
            other: {*more[24::32]},
        }
    shares = {"newest-jax": {i for i in few if i % 4 < 2}}
    shares |= {"oldest-jax": {*few[2::4]}, "x64": {*few[3::4]}}
    shares[again] = shares[again] or {0}
    return shares


def choose(items: list[Any], part: str) -> tuple[list[Any], int]:
    """The cases of one of the three runs, and how many run in none of them."""
    costs = read_costs()
    chosen, left = [], 0
    for function, cases in by_function(items):
        if part == "x64" and "test_doctests" in function:
            continue  # jnp.ones() of an example is float64 there, which grouped products refuse
        costly = function in costs and not cases[0].get_closest_marker("every_case")
        shares = share(function, len(cases), costly=costly)
        if "tests/bridge/test_align.py" in function:  # PyTorch through the oldest jax
            shares["oldest-jax"] = set(range(0, len(cases), 4 if not costly else 16))
        chosen += [cases[i] for i in sorted(shares[part])]
        left += len(cases) - len(set().union(*shares.values()))
    return chosen, left
