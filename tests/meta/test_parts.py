"""How CI's three runs share out the cases of a test function."""

import itertools
import pathlib
import re
from types import SimpleNamespace

import pytest

from tests import parts

ROOT = pathlib.Path(__file__).parents[2]

LIBRARY = "tests/align/test_example.py::test_function"
ONCE = "tests/bridge/test_example.py::test_function"


def shares(function, count, cost):
    got = parts.share(function, count, cost)
    assert set(got) == set(parts.NAMES)
    assert all(0 <= i < count for taken in got.values() for i in taken)
    return got


@pytest.mark.parametrize("cost", [0.0, 0.2, 1.5, 20.0])
@pytest.mark.parametrize("function", [LIBRARY, LIBRARY + "s", ONCE])
def test_the_first_run_has_a_case_of_every_function(function, cost):
    for count in range(1, 100):
        assert shares(function, count, cost)["newest-jax"]


@pytest.mark.parametrize("function", [LIBRARY, ONCE])
def test_every_case_of_a_cheap_function_runs_and_only_the_first_twice(function):
    for count in range(1, 100):
        taken = [i for part in shares(function, count, 0.0).values() for i in part]
        assert set(taken) == set(range(count))
        assert set(i for i in taken if taken.count(i) > 1) <= {0}


def test_library_functions_run_on_the_oldest_jax_or_with_x64():
    seen = set()
    for number, count, cost in itertools.product(
        range(20), range(1, 50), (0.0, 0.2, parts.LONG - 0.1)
    ):
        got = shares(f"{LIBRARY}{number}", count, cost)
        others = [name for name in parts.NAMES[1:] if got[name]]
        assert others, (number, count)
        seen |= set(others)
        if cost and count > 1 or count > 3:  # cases that the first run has not
            assert not got["newest-jax"] & (got["oldest-jax"] | got["x64"])
        if cost:  # and none that it does not have of a cheap function
            cheap = shares(f"{LIBRARY}{number}", count, 0.0)
            assert all(got[name] <= cheap[name] for name in parts.NAMES)
    assert seen == {"oldest-jax", "x64"}


def test_only_a_long_case_is_not_repeated():
    assert sum(map(len, shares(LIBRARY, 1, parts.LONG).values())) == 1
    assert sum(map(len, shares(LIBRARY, 1, parts.LONG - 0.1).values())) == 2


@pytest.mark.parametrize("part", parts.NAMES)
def test_a_run_takes_no_case_of_a_file_that_it_does_not_read(part):
    for function in (LIBRARY, ONCE, "tests/meta/test_cli.py::test_function"):
        taken = [shares(f"{function}{i}", 9, 0.2)[part] for i in range(9)]
        assert parts.reads(part, function.split("::")[0]) == any(taken)
    assert parts.reads(part, "tests/bridge/test_align.py") == (part != "x64")


@pytest.mark.parametrize(
    ("function", "count", "cost", "taken"),
    [
        *(
            (LIBRARY, 4, 0.2, 2),
            (LIBRARY, 8, 0.2, 4),
            (LIBRARY, 8, parts.SPARSE, 2),
            (LIBRARY, 8, 2.0, 1),
        ),
        *((LIBRARY, 456, 0.2, 4 + 28 + 28), (ONCE, 8, 0.2, 2), (ONCE, 8, 2.0, 1)),
        (ONCE, 88, 0.2, 2 + 10),
    ],
)
def test_of_a_costly_function_a_part_runs(function, count, cost, taken):
    got = shares(function, count, cost)
    assert len(set().union(*got.values())) == sum(map(len, got.values())) == taken


def item(nodeid, *marks):
    return SimpleNamespace(nodeid=nodeid, get_closest_marker=lambda name: name in marks)


def test_what_no_run_takes_is_counted(monkeypatch):
    monkeypatch.setattr(parts, "read_costs", lambda: {LIBRARY: 0.2})
    items = [item(f"{LIBRARY}[{i}]") for i in range(8)] + [item(f"{ONCE}[{i}]") for i in range(8)]
    chosen = {name: parts.choose(items, name) for name in parts.NAMES}
    assert {got.left for got in chosen.values()} == {4}
    run = [x.nodeid for got in chosen.values() for x in got.cases]
    assert len(run) == len(set(run)) == 12
    marked = [item(x.nodeid, "every_case") for x in items]
    assert all(parts.choose(marked, name).left == 0 for name in parts.NAMES)


def test_each_very_long_function_of_the_first_runs_own_files_has_one_turn(monkeypatch):
    long = {f"{ONCE}{i}": parts.VERY_LONG + i for i in range(7)}
    others = {f"{LIBRARY}{i}": 0.2 for i in range(3)} | {f"{LIBRARY}_long": 20.0}
    others |= {f"{ONCE}_short": parts.VERY_LONG - 0.1}
    pages = "tests/meta/test_docs.py::test_pages"
    monkeypatch.setattr(parts, "read_costs", lambda: long | others | {pages: 8.0})
    items = [item(name) for name in (*long, *others)]
    items += [item(f"{pages}[{i}]", "every_case") for i in range(5)]
    everything = parts.choose(items, "newest-jax")
    assert everything.waiting == 0 and len(everything.cases) == len(items)
    halves = [parts.choose(items, "newest-jax", turn) for turn in range(parts.TURNS)]
    names = [{x.nodeid for x in half.cases} for half in halves]
    assert names[0] | names[1] == {x.nodeid for x in items} and names[0] & names[1] == set(others)
    for half in halves:
        assert half.left == everything.left and half.waiting + len(half.cases) == len(items)
        assert {sum(x.nodeid.startswith(pages) for x in half.cases)} <= {2, 3}
    for part in parts.NAMES[1:]:
        assert [parts.choose(items, part, turn) for turn in range(parts.TURNS)] == [
            parts.choose(items, part)
        ] * 2


def test_the_other_runs_repeat_long_functions_in_turns(monkeypatch):
    long = {f"{LIBRARY}{i}": parts.LONG for i in range(6)}
    short = {f"{LIBRARY}_short{i}": parts.LONG - 0.1 for i in range(6)}
    monkeypatch.setattr(parts, "read_costs", lambda: long | short)
    items = [item(f"{name}[{i}]") for name in (*long, *short) for i in range(8)]
    for part in parts.NAMES[1:]:
        everything = {x.nodeid for x in parts.choose(items, part).cases}
        halves = [parts.choose(items, part, turn) for turn in range(parts.TURNS)]
        names = [{x.nodeid for x in half.cases} for half in halves]
        assert names[0] | names[1] == everything
        in_both = {parts.function_of(name) for name in names[0] & names[1]}
        assert in_both == {parts.function_of(name) for name in everything} & set(short) != set()
        assert [half.waiting for half in halves] == [len(everything - have) for have in names]
    first = [parts.choose(items, "newest-jax", turn) for turn in (None, *range(parts.TURNS))]
    assert first[0] == first[1] == first[2]


@pytest.mark.parametrize("part", parts.NAMES)
def test_both_turns_cost_about_the_same(part):
    costs = parts.read_costs()
    turn_of = parts.turns(costs, part)
    sums = [sum(costs[n] for n in turn_of if turn_of[n] == turn) for turn in range(parts.TURNS)]
    assert min(sums) > 0.9 * max(sums) > 0


def test_costs_are_read_as_they_were_written(monkeypatch, tmp_path):
    monkeypatch.setattr(parts, "COSTS", tmp_path / "costs.txt")
    parts.write_costs({"b": [1.0, 2.0], "cheap": [0.01, 0.02], "a": [0.5]})
    assert parts.read_costs() == {"a": 0.5, "b": 1.5}
    parts.write_costs({"b": [0.01]})
    assert parts.read_costs() == {}


def test_the_costs_are_those_of_this_suite():
    """Most of the rows: a function may be renamed, or go, before the next measurement."""
    costs = parts.read_costs()
    texts = {name.split("::")[0]: "" for name in costs}
    for file in texts:
        if (ROOT / file).exists():
            texts[file] = (ROOT / file).read_text()
    found = [
        n for n in costs if re.search(rf"^def {n.split('::')[1]}\(", texts[n.split("::")[0]], re.M)
    ]
    assert len(found) > 0.8 * len(costs) > 100
    assert min(costs.values()) >= parts.COSTLY
