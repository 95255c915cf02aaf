"""examples/expert_rebalancing.py: its step against NumPy, and what a run says."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj

FOLDER = Path(__file__).resolve().parents[2] / "examples"
LAYERS, EXPERTS, SLOTS, TOKENS, TOP_K, HIDDEN = 2, 6, 8, 20, 2, 4


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("expert_rebalancing")


def dense(model, first_slot, x, popularity):
    """float64 NumPy: every token by a loop, and `[L, El]` how many chose each expert."""
    x, counts = x.astype(np.float64), np.zeros((LAYERS, EXPERTS), int)
    router = np.asarray(model.router, np.float64)
    weights = {k: np.asarray(v, np.float64) for k, v in model.experts.items()}
    for layer in range(LAYERS):
        logits = x @ router[layer] + popularity[layer]
        share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        out = x.copy()
        for token in range(TOKENS):
            for expert in np.argsort(-share[token])[:TOP_K]:
                counts[layer, expert] += 1
                gate, up, down = (
                    weights[k][layer, first_slot[layer][expert]] for k in ("gate", "up", "down")
                )
                g = x[token] @ gate
                hidden = g / (1 + np.exp(-g)) * (x[token] @ up)
                out[token] += share[token, expert] * (hidden @ down)
        x = out
    return x, counts


def test_step_equals_a_loop_over_tokens_and_records_what_it_did(example):
    mesh = jax.make_mesh((8,), ("ep",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu"))
    location = maj.ExpertLocation.trivial(LAYERS, EXPERTS, SLOTS)
    rng = np.random.default_rng(0)
    model = example.init(rng, mesh, location, hidden=HIDDEN, ffn=6)
    x = rng.normal(size=(TOKENS, HIDDEN)).astype(np.float32)
    popularity = example.zipf(rng, LAYERS, EXPERTS, 1.0)
    load = maj.init_expert_load(
        "stat",
        num_layers=LAYERS,
        num_physical_experts=SLOTS,
        num_logical_experts=EXPERTS,
        num_shards=8,
        local_experts=True,
        sharding=NamedSharding(mesh, P("ep")),
        recording=True,
    )
    step, traced = example.make_step(mesh, top_k=TOP_K)
    with jax.default_matmul_precision("highest"):
        y, load = step(model, location, load, np.int32(7), x, popularity)
    want, counts = dense(model, [range(EXPERTS)] * LAYERS, x, popularity)
    np.testing.assert_allclose(y, want, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(maj.collect_expert_load(load).logical_count, counts[None])

    new = np.array([[5, 4, 3, 2, 1, 0, 0, 1], [2, 2, 0, 1, 3, 5, 4, 2]])
    moves = maj.plan_expert_moves(location.physical_to_logical_map, new, num_gpus=8)
    moved = model._replace(experts=maj.update_expert_weights(model.experts, moves))
    with jax.default_matmul_precision("highest"):
        location = maj.ExpertLocation.from_map(new, EXPERTS)
        y, load = step(moved, location, load, np.int32(8), x, popularity)
    np.testing.assert_allclose(y, want, rtol=2e-5, atol=2e-5)
    record = maj.collect_expert_load(load)
    np.testing.assert_array_equal(record.logical_count[1], counts)
    assert record.forward_pass_id.tolist() == [7, 8]
    assert len(traced) == 1


def test_a_picture_without_matplotlib_is_refused_before_the_run(monkeypatch, capsys, example):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["expert_rebalancing.py", "--picture", "load.png"])
    monkeypatch.setattr(example, "serve", lambda *_: pytest.fail("it served"))
    with pytest.raises(SystemExit):
        example.main()
    said = capsys.readouterr().err
    assert "matplotlib" in said and "pip install -e '.[plot]'" in said


@pytest.mark.parametrize("name", ["moe_layer", "expert_parallel_layer", "expert_rebalancing"])
@pytest.mark.parametrize("top_k", ["99", "0", "-1"])
def test_more_choices_than_experts_are_refused(monkeypatch, capsys, name, top_k):
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--top-k", top_k])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert (
        f"--top-k must be from 1 to --experts ({32 if 'rebal' in name else 16}); got {top_k}"
        in said
    )


SIZES = {
    "moe_layer": ["--tokens", "--experts", "--hidden"],
    "fp8_expert_parallel_layer": ["--tokens", "--hidden"],
    "expert_rebalancing": ["--passes", "--every", "--layers", "--tokens"],
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_an_example_are_at_least_1(monkeypatch, capsys, name):
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module(name)
    for option in SIZES[name]:
        monkeypatch.setattr(sys, "argv", [name, option, "0"])
        with pytest.raises(SystemExit) as stopped:
            module.main()
        assert stopped.value.code == 2
        assert f"{option} must be at least 1; got 0" in capsys.readouterr().err


def test_a_run_balances_the_stream_and_compiles_once(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    picture = tmp_path / "load.png"
    command = [sys.executable, str(FOLDER / "expert_rebalancing.py"), "--picture", str(picture)]
    command += ["--passes", "16", "--every", "4", "--layers", "1", "--hidden", "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ +(\d+)-(\d+) +(\S+) +(\S+) +(\d+)(.*)$", done.stdout, re.M)
    assert [(int(a), int(b)) for a, b, *_ in rows] == [(1, 4), (5, 8), (9, 12), (13, 16)]
    even = [float(row[2]) for row in rows]
    # Skewed, balanced, skewed anew, balanced: of the same traffic, so that it is no luck.
    assert even[1] > even[0] + 0.2 and even[3] > even[2] + 0.2 and even[1] > even[2] + 0.2
    assert "the stream turns" in rows[2][5] and int(rows[0][4]) > 0
    assert float(re.search(r"outputs differ by (\S+)", done.stdout)[1]) < 1e-5
    assert "the step was compiled 1 time\n" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
