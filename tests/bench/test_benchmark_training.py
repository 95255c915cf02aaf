"""benchmarks/training.py: its inputs, its checks, the layers of other libraries, its ratios."""

import argparse
import importlib.util
import io
import json
import re
import sys
import types

import jax
import numpy as np
import pytest

from benchmarks import training as bench
from benchmarks import training_peers as peers
from moe_align_jax._grouped_matmul import activation_gradient

OPTIONS = argparse.Namespace(
    only="ours, xla",
    passes="",
    variants=True,
    peers=True,
    executions=1,
    replays=1,
    threads=1,
    rounds=2,
)


@pytest.fixture(autouse=True)
def its_turn(monkeypatch):
    """What a case that runs in the test's own process reads when it waits for its turn.

    What a layer's provider switches on is off again for the tests that come next in the process.
    """
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr(activation_gradient, "enabled", activation_gradient.enabled)


def test_a_model_of_peers_layers_lowers_one():
    """Eight layers of a kernel that takes a second to lower would take eight."""
    like, layer = jax.ShapeDtypeStruct, dict(peers.layers(4, 8, 8, 2, 1))["lax.ragged_dot"]()
    gate_up, down = like((2, 8, 16), "float32"), like((2, 8, 8), "float32")
    x, weights, ids = (
        like(s, d) for s, d in (((4, 8), "float32"), ((4, 1), "float32"), ((4, 1), "int32"))
    )

    def model(x, *given):
        return layer(layer(x, *given), *given)

    text = jax.jit(model).trace(x, gate_up, down, weights, ids).lower().as_text()
    assert text.count("call @run(") == 2 and text.count("func.func private @run(") == 1


@pytest.mark.parametrize("kind", peers.KINDS)
def test_sampled_answers_are_those_of_a_dense_product(kind):
    inputs = bench.Inputs(bench.Product(kind, 64, 16, 8, 4))
    left, right = (np.asarray(a).astype(np.float64) for a in inputs.operands)
    expert = np.repeat(np.arange(4), inputs.counts)
    if kind == "weight gradient":
        out = np.zeros((4, 16, 8))
        for row, e in enumerate(expert):
            out[e] += np.outer(left[row], right[row])
    else:
        turned = right.transpose(0, 2, 1) if kind == "input gradient" else right
        out = np.stack([left[row] @ turned[e] for row, e in enumerate(expert)])
    found = inputs.sampled(out)
    assert inputs.wrong(found) == ""
    assert "relative error" in inputs.wrong(np.roll(found, 1, axis=0))
    assert "relative error" in inputs.wrong(np.full_like(found, np.nan))


def test_the_loop_is_right_and_what_fails_is_a_row():
    size = bench.Product("weight gradient", 64, 16, 8, 4)
    [row] = [r for r in bench.run_product(size, OPTIONS) if r["provider"] == "ours, xla"]
    assert row["status"] == "ok" and row["us"] > 0
    failing = argparse.Namespace(**vars(OPTIONS) | {"only": "haliax triton_tile_map"})
    [failed] = [r for r in bench.run_product(size, failing) if "haliax" in r["provider"]]
    assert failed["status"] == "failed" and "haliax" in bench.line(failed)


def test_a_layer_on_ragged_dot_has_our_gradients():
    """Against the first provider's, which is ours; without the libraries each of theirs is a failed row."""
    options = argparse.Namespace(**vars(OPTIONS) | {"only": ""})
    rows = bench.run_layer(bench.Layer("tiny", 32, 2, 4, 16, 8), options)
    by = {(r["provider"], r["passes"]): r for r in rows}
    both = "forward and backward"
    assert by["ours, default", both]["errors"] == [0.0] * 5
    assert max(by["lax.ragged_dot", both]["errors"]) < 1e-2
    assert by["lax.ragged_dot", both]["temp_mib"] >= 0
    assert by["tokamax mosaic", both]["status"] == "failed"


def test_a_layer_that_does_not_fit_is_a_row_that_says_what_it_wants(monkeypatch):
    """It is not compiled further, and the others keep their rows."""
    options = argparse.Namespace(**vars(OPTIONS) | {"only": "default|lax", "passes": "^forward$"})
    monkeypatch.setattr(bench, "_memory_limit", lambda: 1000)
    size = bench.Layer("tiny", 32, 2, 4, 16, 8)
    ours, lax = bench.run_layer(size, options)
    assert ours["status"] == "ok"
    assert lax["status"] == "failed" and "us" not in lax
    operands = sum(a.nbytes for a in bench.layer_arrays(size))
    wanted, limit = re.fullmatch(r"out of memory: (\S+) GiB .* of (\S+)", lax["reason"]).groups()
    assert (wanted, limit) == ("0.0", "0.0") and lax["temp_mib"] == 0 and operands > 1000
    assert bench.line(lax).endswith(f"{lax['reason']}, 0 MiB beside")
    monkeypatch.setattr(bench, "_memory_limit", lambda: 2**40)
    assert [row["status"] for row in bench.run_layer(size, options)] == ["ok", "ok"]


def test_tuned_tiles_are_those_of_the_nearest_sizes(monkeypatch):
    def entry(m, k, n, experts, tiles):
        numbers = {"dot_dimension_numbers": [[[0], [0]], [[], []]]}
        given = {"lhs": f"bf16[{m},{k}]", "rhs": f"bf16[{m},{n}]", "return_residuals": False}
        given |= {"group_sizes": {"num_groups": experts}, "ragged_dot_dimension_numbers": numbers}
        return {json.dumps(given): tiles}

    slow, fast = {"evaluation_times_ms": [9.0, 8.0]}, {"evaluation_times_ms": [7.0, 30.0]}
    file = entry(1024, 64, 32, 8, {'"near, slow"': slow, '"near"': fast})
    file |= entry(1024, 64, 320, 8, {'"far"': fast})
    monkeypatch.setattr(peers, "_tuned", lambda implementation: file)
    op_type = type("Op", (), {"config_cls": str})
    api = types.SimpleNamespace(IMPLEMENTATIONS={"triton": op_type()})
    monkeypatch.setattr(peers, "_tokamax", lambda: api)
    pytest.importorskip("pydantic")
    assert peers.tokamax_config("triton", "weight gradient", 1024, 64, 48, 8) == "near"
    assert "tokamax" not in sys.modules


def test_ratios_are_to_the_best_peers_and_to_dense():
    head = {"case": "c"}
    times = {"torch.mm, dense": 50.0, "ours, a": 60.0, "ours, b": 55.0, "x": 110.0, "y": 99.0}
    rows = [head | {"provider": name, "us": us} for name, us in times.items()]
    rows.append(head | {"provider": "z", "status": "failed", "reason": "no memory"})
    [text] = bench.ratios(rows)
    assert text == "c: ours, b 55.0 us; 1.80x of y (99.0); 2.00x of x (110.0); 0.91 of dense (50.0)"
    assert "no memory" in bench.line(rows[-1])


def test_providers_of_a_layer_are_timed_forth_and_back(monkeypatch):
    """Whoever always came last would be slowed by the GPU's power limit; one that fails leaves the others."""
    order = []

    def span(program, given, *, executions):
        order.append(program)
        if program == "b" and order.count("b") == 2:
            raise MemoryError("none left")
        return bench.timing.Timing("span_us", [10.0 * len(order)] * executions)

    monkeypatch.setattr(bench.timing, "time_jit_span", span)
    a, b, c = bench.timing.time_jit_spans_in_turns("abc", [[]] * 3, executions=4, rounds=2)
    assert order == [*"abc", *"cba"]
    assert isinstance(a, bench.timing.Timing) and isinstance(c, bench.timing.Timing)
    assert (a.samples_us, c.samples_us) == ([10, 10, 60, 60], [30, 30, 40, 40])
    assert a.percentile(50) == c.percentile(50) and isinstance(b, MemoryError)


def test_providers_of_a_product_are_timed_forth_and_back(monkeypatch):
    """Ours, the peers' and torch's alike, each in as many parts as there are rounds."""
    size, order = bench.Product("forward", 64, 16, 8, 4), []

    def taken(name, samples):
        order.append((name, samples))
        return bench.timing.Timing("span_us", [1.0 * len(order)] * samples)

    def by_torch(inputs):
        yield "torch.mm, dense", lambda: ("", lambda replays: taken("torch", replays))
        yield "torch._grouped_mm", lambda: ("relative error 1", None)

    def span(program, given, *, executions):
        return taken(program([given[0]])[0], executions)

    inputs = bench.Inputs(size)
    right = inputs.answers

    def by_jax(given, options):
        for name in ("ours, blocks", "peer"):
            yield name, bench.Work(lambda *arrays: None, (), lambda out: right)

    monkeypatch.setattr(bench, "torch_calls", by_torch)
    monkeypatch.setattr(bench, "by_jax", by_jax)
    monkeypatch.setattr(bench.timing, "time_jit_span", span)
    monkeypatch.setattr(bench, "compiled", lambda work, threads: [lambda a, n=n: [n] for n in "ab"])
    more = {"only": "", "executions": 5, "replays": 4, "rounds": 2}
    rows = list(bench.run_product(size, argparse.Namespace(**vars(OPTIONS) | more)))
    assert order == [(n, 2 if n == "torch" else 3) for n in ("a", "b", "torch", "torch", "b", "a")]
    us = {row["provider"]: row.get("us", row.get("reason")) for row in rows}
    assert us == {
        "torch._grouped_mm": "relative error 1",
        **dict.fromkeys(("ours, blocks", "peer", "torch.mm, dense"), 3.5),
    }


def test_a_second_try_of_tokamax_says_what_the_first_said(monkeypatch):
    """Stubs of xprof that a failed import leaves behind are found by the next one."""
    for name in [n for n in sys.modules if n.split(".")[0] == "xprof"]:
        monkeypatch.delitem(sys.modules, name)
    wanted = []

    def import_module(name):
        wanted.append(name)
        raise ModuleNotFoundError("one of its parts is not installed")

    monkeypatch.setattr(peers.importlib, "import_module", import_module)
    monkeypatch.setattr(peers.importlib.util, "find_spec", _spec_without_triton)
    peers._tokamax.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(ModuleNotFoundError, match="one of its parts"):
                peers._tokamax()
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "xprof"]:
            del sys.modules[name]
    assert wanted == ["tokamax._src.ops.ragged_dot.api"] * 2


_FIND_SPEC = importlib.util.find_spec


def _spec_without_triton(name):
    return None if name == "triton" else _FIND_SPEC(name)


def test_our_rows_lie_in_the_blocks_of_the_size():
    """P = n + min(n, E) (block - 1) rows, of which those in use are where `sampled` looks."""
    size = bench.Product("forward", 64, 16, 8, 4, block=24)
    inputs = bench.Inputs(size)
    name, work = next(bench.ours(inputs, False))
    assert name == "ours, blocks"
    rows, ids, experts = (np.asarray(work.arrays[i]) for i in (0, 2, 3))
    assert rows.shape == (64 + 4 * 23, size.k)
    for block, expert in enumerate(experts):
        real = ids[24 * block : 24 * (block + 1)]
        assert (inputs.expert_of_pair[real[real < 64]] == expert).all()
    assert (ids < 64).sum() == 64
    # The rows are those of the pairs, which stand in the order of experts in `operands`.
    place = {pair: i for i, pair in enumerate(inputs.order.tolist())}
    left = np.asarray(inputs.operands[0]).astype(np.float32)
    for row, pair in zip(rows.astype(np.float32), ids.tolist(), strict=True):
        assert pair >= 64 or (row == left[place[pair]]).all()


def test_sizes():
    names = [size.name for size in bench.SIZES]
    assert len(set(names)) == len(names)
    for size in bench.SIZES:
        if isinstance(size, bench.Product):
            assert size.rows % 8 == 0 and size.kind in peers.KINDS
    qwen = next(size for size in bench.SIZES if isinstance(size, bench.Layer))
    # Two products forward and twice as many backward, of 2 m k n each.
    rows = qwen.tokens * qwen.top_k
    forward = 2 * rows * qwen.hidden * (2 * qwen.ffn) + 2 * rows * qwen.ffn * qwen.hidden
    assert qwen.flops == 3 * forward
