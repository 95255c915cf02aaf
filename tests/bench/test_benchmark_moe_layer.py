"""benchmarks.moe_layer: what it holds results to, how it tells them, and vLLM's files as it reads them."""

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the benchmark compares with PyTorch")

from benchmarks import children, fetch, moe_cases, moe_layer, vllm_moe  # noqa: E402

MODEL = moe_cases.Model("small", 16, 2, 64, 32)
SOURCE = """
import triton


@triton.jit
def write_zeros_to_output(c):
    pass


@triton.jit
def other(c):
    pass


@triton.jit
def fused_moe_kernel(a):
    write_zeros_to_output(a)


def get_default_config(M, E, N, K, topk, dtype, block_shape=None):
    if envs.VLLM_BATCH_INVARIANT or current_platform.is_rocm():
        return {}
    return {"BLOCK_SIZE_M": M}
"""


@pytest.fixture(scope="module")
def sets():
    return moe_cases.make_sets(MODEL)


@pytest.mark.parametrize("tokens", [1, 40])
def test_ours_is_held_to_products_in_float32(sets, tokens):
    case = moe_cases.Case(MODEL, tokens, sets)
    programs = moe_layer.compile_ours([case], [None], both=True)
    mine = {key[2]: program for key, program in programs.items()}
    measure = lambda: moe_layer.measure_ours(case, mine, 2, True)  # noqa: E731
    rows = list(moe_layer.measured_in_turns([({"provider": "fused_moe"}, measure)]))
    timed = [row for row in rows if "us" in row]
    assert {(row["clock"], row["way"]) for row in timed} == {
        ("wall", "donated"),
        ("wall", "not donated"),
    }
    # A CPU has no kernels in its trace, and nothing else is wrong.
    assert [row["reason"] for row in rows if "us" not in row] == [
        "the trace shows no kernel on a GPU stream"
    ]
    wrong = case.wrong(lambda layer: np.ones((len(case.sample), MODEL.hidden)))
    assert wrong.startswith("layer 0: relative error")
    swapped = case.wrong(lambda layer: case.answers[moe_cases.LAYERS - 1 - layer])
    assert swapped.startswith("layer 0")
    assert "nan" in case.wrong(lambda layer: case.answers[layer] * np.nan)


def test_wall_clock_leaves_out_what_a_round_costs_once(monkeypatch):
    """Steps of 4 layers of 500 us, 1 ms behind each wait, and a first round that the GPU is slow in."""
    now, waited, rounds = [0.0], [True], [0]
    monkeypatch.setattr(moe_layer.timing.time, "perf_counter", lambda: now[0])

    def run():
        now[0] += (0.002 if rounds[0] else 0.003) + (0.001 if waited[0] else 0)
        waited[0] = False

    def wait():
        waited[0] = True
        rounds[0] += 1

    samples = moe_layer.timing.steady_steps(run, wait, 510.0, 4)
    np.testing.assert_allclose(samples, 500.0)
    assert rounds[0] == 1 + 2 * len(samples)
    assert now[0] > 0.2 * len(samples)


def test_everybody_takes_turns_by_the_wall_clock(monkeypatch):
    monkeypatch.setattr(moe_layer.timing, "steady_steps", lambda run, wait, us, calls: [run()])
    order = []

    def measure(name, wrong=""):
        yield {"clock": "span", "us": 1.0}
        run = lambda: order.append(name) or float(len(order))  # noqa: E731
        yield moe_layer.Wall(name, run, lambda: None, 1.0, lambda: wrong)

    work = [({"provider": name}, lambda name=name: measure(name)) for name in "ab"]
    work.append(({"provider": "c"}, lambda: measure("c", "not right")))
    rows = list(moe_layer.measured_in_turns(work))
    assert [row["clock"] for row in rows[:3]] == ["span"] * 3
    assert order == ["b", "a", "b", "c", "a", "b"]  # the first b is not timed; c was wrong
    found = {row["provider"]: row for row in rows[3:]}
    assert found["a"]["us"] == 3.5 and found["b"]["us"] == 4.5  # of 2 and 5, of 3 and 6
    assert found["c"]["status"] == "failed" and "later: not right" in found["c"]["reason"]


def test_each_of_three_follows_each_other_by_the_wall_clock(monkeypatch):
    monkeypatch.setattr(moe_layer.timing, "steady_steps", lambda run, wait, us, calls: [run()])
    order = []

    def measure(name):
        yield moe_layer.Wall(name, lambda: order.append(name) or 1.0, lambda: None, 1.0, lambda: "")

    work = [({"provider": name}, lambda name=name: measure(name)) for name in "abc"]
    rows = list(moe_layer.measured_in_turns(work))
    assert [row["samples"] for row in rows] == [2] * 3
    pairs = list(itertools.pairwise(order))
    assert sorted(pairs) == sorted(itertools.permutations("abc", 2))


def test_routing_draws_distinct_experts_and_shares():
    weights, ids = moe_cases.routing(MODEL, 100)
    assert all(len(set(row)) == MODEL.top_k for row in ids)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    assert len(np.unique(ids)) == MODEL.experts


def test_ratios_are_theirs_over_ours():
    head = {"model": "m", "tokens": 1, "floor_us": 1.0, "status": "ok"}
    rows = [
        head | {"provider": "vllm", "clock": "span", "way": "graph", "us": 30.0},
        head | {"provider": "fused_moe", "clock": "span", "way": "donated", "us": 20.0},
        head | {"provider": "vllm", "clock": "wall", "way": "graph", "us": 40.0},
        head | {"provider": "fused_moe", "clock": "wall", "way": "donated", "us": 50.0},
        head | {"provider": "fused_moe", "clock": "wall", "way": "not donated", "us": 80.0},
        head | {"provider": "fused_moe", "status": "failed", "reason": "why"},
    ]
    text = "\n".join(moe_layer.ratios(rows))
    assert "span donated 1.500 (30.0 / 20.0)" in text
    assert "wall donated 0.800" in text and "wall not donated 0.500" in text
    assert "geometric mean of 1, span donated: 1.500; least 1.500" in text
    assert all(moe_layer.line(row) for row in rows)


CHILD = """
import json, os, sys, time
tokens = [int(t) for t in sys.argv[-1].split(",")]
print("READY", flush=True)
assert sys.stdin.readline() == "go\\n"
for t in tokens:
    row = {"model": "small", "tokens": t, "provider": "p", "status": "ok"}
    print("ROW " + json.dumps(row), flush=True)
    if t == 1:
        time.sleep(60)
    if t == 2:
        os._exit(7)
"""


def test_behind_a_case_that_hangs_or_dies_another_child_goes_on(tmp_path, monkeypatch):
    (tmp_path / "fake_child.py").write_text(CHILD)
    monkeypatch.setattr(moe_layer, "MODULE", "fake_child")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = argparse.Namespace(tokens=[1, 2, 3, 4], patience=1.0, preparing=60.0)
    child = children.Child("fake_child", moe_layer.arguments(MODEL, [], options.tokens))
    child.ready(60, time.monotonic() + 60)
    found = list(moe_layer.measured(MODEL, child, [], options, time.monotonic() + 120))
    assert [(row["tokens"], row["status"]) for row in found] == [
        *((1, "ok"), (1, "failed"), (2, "ok"), (2, "failed"), (3, "ok"), (4, "ok")),
    ]
    assert found[1]["reason"].startswith("silent for 1 s")
    assert found[3]["reason"].startswith("its process ended with 7")


def test_the_kernel_is_cut_out_as_it_stands():
    text = vllm_moe.cut(SOURCE)
    assert "@triton.jit\ndef fused_moe_kernel(a):\n    write_zeros_to_output(a)" in text
    assert "def other" not in text
    compile(text, "cut", "exec")
    with pytest.raises(ValueError, match="lacks fused_moe_kernel"):
        vllm_moe.cut(SOURCE.replace("fused_moe_kernel", "renamed"))


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "E=8,N=32,device_name=NVIDIA_H200.json"),
        ("NVIDIA H200 NVL", "E=8,N=32,device_name=NVIDIA_H200.json"),
        ("NVIDIA H100 80GB HBM3", "E=8,N=32,device_name=NVIDIA_H100_80GB_HBM3.json"),
    ],
)
def test_tuned_sizes_are_those_of_the_card(tmp_path, device, name):
    pytest.importorskip("triton", reason="Triton is not installed")
    assert vllm_moe.config_name(8, 32, device) == name
    (tmp_path / vllm_moe.FILE).write_text(SOURCE)
    table = {"triton_version": "3", "1": {"BLOCK_SIZE_M": 16}, "64": {"BLOCK_SIZE_M": 64}}
    (tmp_path / vllm_moe.CONFIGS).write_text(json.dumps({name: table}))
    chosen = vllm_moe.choose_config(str(tmp_path), 40, 2, 8, 64, 32, device)
    assert chosen == ({"BLOCK_SIZE_M": 64}, name)
    default = vllm_moe.choose_config(str(tmp_path), 40, 2, 16, 64, 32, device)
    assert default == ({"BLOCK_SIZE_M": 40}, "vLLM's default")


def test_fetch_keeps_the_tables_of_sizes_in_one_file(tmp_path):
    import zipfile

    wheel = fetch.WHEELS["vllm"]
    folder = "vllm/model_executor/layers/fused_moe/configs/"
    names = [f"E=8,N=32,device_name=NVIDIA_{card}.json" for card in ("H200", "H100_80GB", "A100")]
    with zipfile.ZipFile(tmp_path / "vllm.whl", "w") as archive:
        for member, _ in [(wheel.member, ""), *wheel.python]:
            archive.writestr(member, "text")
        for name in names:
            archive.writestr(folder + name, json.dumps({"1": {"BLOCK_SIZE_M": 16}}))
    fetch.extract(tmp_path, wheel, tmp_path / "out")
    tables = json.loads(Path(tmp_path, "out", vllm_moe.CONFIGS).read_text())
    assert sorted(tables) == sorted(names[:2])
    assert tables[names[0]] == {"1": {"BLOCK_SIZE_M": 16}}
    versions = json.loads(Path(tmp_path, "out", "versions.json").read_text())
    assert versions[vllm_moe.CONFIGS] == "vllm 0.33.0"
