"""What the soak on a GPU rests on: its answer in torch operations, and what it calls growth."""

import ast
import pathlib
import sys

import pytest
import torch

from tests.gpu import graphs, soak


def test_align_torch_is_what_the_oracle_says():
    soak.check_align_torch("cpu")


def test_check_of_align_torch_finds_a_wrong_answer(monkeypatch):
    right = soak.align_torch

    def wrong(ids, num_experts, block_size):
        results = right(ids, num_experts, block_size)
        results[0][0] += 1
        return results

    monkeypatch.setattr(soak, "align_torch", wrong)
    with pytest.raises(AssertionError):
        soak.check_align_torch("cpu")


def test_one_wrong_word_is_counted():
    want = soak.align_torch(torch.tensor([1, 0, 5]), 4, 2)
    wrong = torch.zeros((), dtype=torch.long)
    soak.count_wrong(want, want, wrong)
    assert wrong == 0
    soak.count_wrong([want[0], want[1] + torch.tensor([0, 0, 1]), want[2]], want, wrong)
    assert wrong == 1


STEADY = {"torch bytes": 4096, "GPU bytes": 1 << 30, "handles": 40, "host bytes": 1 << 30}


@pytest.mark.parametrize("name", STEADY)
def test_growth_is_found(name):
    samples = [dict(STEADY) for _ in range(10)]
    samples[0][name] -= 1000  # the first tenth may still be settling
    assert soak.find_growth(samples, [10.0] * 10) == []
    for k, taken in enumerate(samples):
        taken[name] += k * (4 << 20)
    assert [text.split(":")[0] for text in soak.find_growth(samples, [10.0] * 10)] == [name]


def test_growth_of_time_is_found_and_one_slow_tenth_is_not():
    samples = [dict(STEADY) for _ in range(10)]
    assert soak.find_growth(samples, [10.0] * 9 + [30.0]) == []
    [text] = soak.find_growth(samples, [10.0 + 2 * k for k in range(10)][:8] + [40.0, 44.0])
    assert text.startswith("time")


# -- captures beside jax --------------------------------------------------------------------------------

ROOT = pathlib.Path(__file__).parents[2]


def unsafe_captures(source: str) -> list[int]:
    """Lines that open torch.cuda.graph in its default mode, which a thread of jax's client breaks."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("cuda.graph")
        and "capture_error_mode" not in {keyword.arg for keyword in node.keywords}
    ]


def test_nothing_captures_in_a_mode_that_jax_breaks():
    assert unsafe_captures("with torch.cuda.graph(g):\n    pass") == [1]
    files = [
        *ROOT.glob("tests/**/*.py"),
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("examples/*.py"),
    ]
    assert len(files) > 50
    found = {str(f.relative_to(ROOT)): unsafe_captures(f.read_text()) for f in files}
    assert not {name: lines for name, lines in found.items() if lines}


def test_capture_is_thread_local_beside_jax_alone(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: made.append(options))
    assert "jax" in sys.modules
    graphs.capture(None)
    monkeypatch.delitem(sys.modules, "jax")
    graphs.capture(None)
    assert [options["capture_error_mode"] for options in made] == ["thread_local", "global"]
