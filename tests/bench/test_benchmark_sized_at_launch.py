"""benchmarks.sized_at_launch on this machine: its choice of sizes, its checks and its verdict."""

import pytest

from benchmarks import sized_at_launch
from benchmarks.cases import Case
from moe_align_jax._align import tables

torch = pytest.importorskip("torch")

from benchmarks import peers, union  # noqa: E402
from tests.helpers import torch_on_cpu  # noqa: E402
from torch_bridge._direct import problems, store  # noqa: E402


def test_places_are_both_ends_and_the_middle_of_each_bucket():
    found = sized_at_launch.places([1, 2, 8, 32], 60, 16)
    assert [(p.before, p.end, p.case.num_pairs) for p in found] == [
        *((0, 1, 1), (1, 2, 2), (2, 8, 3), (2, 8, 5), (2, 8, 8)),
        *((8, 32, 9), (8, 32, 20), (8, 32, 32)),
    ]
    assert {(p.case.num_experts, p.case.block_size) for p in found} == {(60, 16)}


@pytest.mark.parametrize(("num_experts", "block_size"), sized_at_launch.MODELS)
def test_every_bucket_of_the_table_is_measured(num_experts, block_size):
    """Each size lies in its bucket, and the one before it in another."""
    most = sized_at_launch.MOST_PAIRS
    ends = problems.bucket_ends(most, num_experts, block_size)
    found = sized_at_launch.places(ends, num_experts, block_size)
    bucket = lambda n: tables.size_bucket(n, num_experts, block_size)  # noqa: E731
    assert {p.end for p in found} == {bucket(n) for n in range(1, most + 1, 7)} | {8}
    for before, case, end in ((p.before, p.case, p.end) for p in found):
        assert before < case.num_pairs <= end == bucket(case.num_pairs)
        assert before == 0 or bucket(before) == before
    for end in ends:
        sizes = [p.case.num_pairs for p in found if p.end == end]
        assert bucket(sizes[0]) == bucket(sizes[-1]) and sizes[-1] == end and len(sizes) >= 2


def test_models_reach_every_form():
    """The exact program is that of the size alone, with the results of a plain call."""
    forms = set()
    for sizes in sized_at_launch.MODELS:
        for place in sized_at_launch.places(problems.bucket_ends(131_072, *sizes), *sizes):
            problem = sized_at_launch.exact_problem(place.case, "")
            assert not problem.sized_at_launch and problem.num_pairs == place.case.num_pairs
            shared = problems.bucket_problem(place.case.num_pairs, *sizes)
            assert list(shared.outputs) == list(problem.outputs)
            assert shared.num_pairs == place.end
            forms.add(tables.config_for(problem).form)
    assert forms == {row.config.form for row in tables.table("").rows}


@pytest.fixture
def on_cpu(monkeypatch):
    """Tensors meant for the GPU lie here, and a graph's calls run once."""
    torch_on_cpu(monkeypatch, "full", "arange", "zeros", "randint")
    taken = iter([1.0, 1.1] * 99)

    def run_calls(calls, replays):
        for call in calls:
            call()
        return union.timing.Timing("graph_us", [next(taken)] * replays, len(calls))

    monkeypatch.setattr(sized_at_launch.timing, "time_torch_graph", run_calls)


def by_torch(ids, outputs):
    """What the exact program does."""
    prepared = peers.torch_sort(CASE, [ids])
    prepared.calls[0]()
    for name, tensor in outputs.items():
        tensor.copy_(prepared.outputs[0][name])


CASE = Case(num_pairs=300, num_experts=7, block_size=8, top_k=1)


def test_both_programs_are_checked_and_timed_in_turn(on_cpu):
    row = sized_at_launch.measure(CASE, by_torch)
    assert row["verified"] and (row["exact_us"], row["sized_us"]) == (1.0, 1.1)
    assert row["ratio"] == pytest.approx(1.1) and (row["samples"], row["calls"]) == (21, 50)

    def spoilt(ids, outputs):
        by_torch(ids, outputs)
        outputs["sorted_token_ids"][0] += 1

    row = sized_at_launch.measure(CASE, spoilt)
    assert not row["verified"] and row["error"] == "exact: sorted_token_ids differ"
    row = sized_at_launch.measure(CASE, lambda ids, outputs: None)  # writes nothing
    assert row["error"] == "exact: num_tokens_post_padded is not " + row["error"].split()[-1]


def test_exact_programs_are_compiled_and_the_buckets_warmed_up(monkeypatch):
    """Each place's own program is launched, on the pointers of ids and results in order."""
    prepared, warmed, launched = [], [], []

    class Program:
        def __init__(self, problem):
            self.problem = problem

        def launch(self, *pointers):
            launched.append((self.problem, pointers))

    def prepare(index, wanted):
        prepared.extend(wanted)
        store.here.programs.update({(index, problem): Program(problem) for problem in wanted})

    monkeypatch.setattr(store, "here", store.Store(store.here.machine))
    monkeypatch.setattr(store.here, "prepare", prepare)
    monkeypatch.setattr("torch_bridge.warmup", lambda **given: warmed.append(given))
    every = sized_at_launch.places([8, 16], 60, 16) + sized_at_launch.places([8, 32], 9000, 4)
    align = sized_at_launch.prepare(0, every, "")
    sized = {(p.num_experts, p.num_pairs) for p in prepared if p.sized_at_launch}
    assert sized == {(60, 8), (60, 16), (9000, 8), (9000, 32)}  # the ends of the table's buckets
    exact = [p for p in prepared if not p.sized_at_launch]
    assert exact == [sized_at_launch.exact_problem(place.case, "") for place in every]
    most = {(w["num_experts"], w["block_size"]): w["max_tokens"] for w in warmed}
    assert most == {(60, 16): 16, (9000, 4): 32}
    ids, outputs = torch.zeros(20), {name: torch.zeros(1) for name in exact[0].outputs}
    for place, problem in zip(every, exact, strict=True):
        align[place](ids, outputs)
        pointers = (ids.data_ptr(), *(tensor.data_ptr() for tensor in outputs.values()))
        assert launched[-1] == (problem, pointers)


def test_verdict_names_the_worst_and_what_was_compiled():
    rows = [
        {"case": "9x8x4", "form": "block", "verified": True, "ratio": ratio, "bucket": [8, 16]}
        for ratio in (1.0, 1.08)
    ]
    assert "2 of 2 sizes" in (text := sized_at_launch.verdict(rows, 0))
    assert "1.080x (9x8x4, block)" in text and text.endswith(
        "0 programs compiled after warmup: met"
    )
    assert sized_at_launch.verdict(rows, 1).endswith("missed")
    slow = [*rows, {**rows[0], "ratio": 1.09}]
    assert "2 of 3" in (text := sized_at_launch.verdict(slow, 0)) and text.endswith("missed")
    failed = {**rows[0], "verified": False, "error": "sized: expert_ids differ"}
    assert sized_at_launch.verdict([*rows, failed], 0).endswith("missed")
    assert sized_at_launch.verdict([], 0) == "nothing was measured"
    shown = sized_at_launch.line({**rows[0], "exact_us": 2.0, "sized_us": 2.1})
    assert shown.split() == ["9x8x4", "block", "9..16", "2.00", "2.10", "1.000"]
    assert sized_at_launch.line(failed).endswith("expert_ids differ")


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    facts = {"gpu": None}
    monkeypatch.setattr(sized_at_launch.machine, "facts", lambda commit: facts)
    assert sized_at_launch.main([]) == 2 and "there is none here" in capsys.readouterr().out
