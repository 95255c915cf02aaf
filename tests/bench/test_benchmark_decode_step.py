"""The benchmark of the decode step on CPU devices: what it verifies, what a wrong one gives, and its rows."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from benchmarks import decode_step
from benchmarks import rows as rows_of

MODEL = decode_step.MODELS["tiny"]


@pytest.fixture(scope="module")
def mesh():
    kind = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((2,), ("ep",), axis_types=kind, devices=jax.devices()[:2])


def reference_by_numpy(stack, x0):
    """float64: what the last layer's experts add, a pair at a time."""
    x0 = np.asarray(x0).astype(np.float64)

    def normalised(x):
        return x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-6)

    x, added = x0, None
    for number in range(stack.layers):
        w = stack.sets[number % len(stack.sets)]
        gate_up, down = (np.asarray(a).astype(np.float64) for a in w)
        router = np.asarray(stack.routers[number % len(stack.sets)]).astype(np.float64)
        logits, h, added = normalised(x0) @ router, normalised(x), np.zeros(x0.shape)
        for t, chosen in enumerate(np.argsort(-logits, axis=1)[:, : stack.model.top_k]):
            share = np.exp(logits[t, chosen] - logits[t].max())
            for e, weight in zip(chosen, share / share.sum(), strict=True):
                gate, up = np.split(h[t] @ gate_up[e], 2)
                added[t] += weight * (gate / (1 + np.exp(-gate)) * up) @ down[e]
        x = x0 + added
    return added


def test_the_reference_is_what_numpy_computes_and_finds_what_is_not(mesh):
    stack = decode_step.Stack(mesh, MODEL, "bf16", layers=2, sets=2)
    step = next(decode_step.steps_of(stack, 4, None, "cpu", ("ours",)))
    x0, load = step.carry
    assert load is None
    added, counts = stack.reference(x0)
    assert decode_step.difference(added, reference_by_numpy(stack, x0)) < 1e-3
    assert np.asarray(counts).sum(1).tolist() == [8 * MODEL.top_k] * 2
    for factor, fails in ((1.0, False), (1.25, True)):
        x = x0 + jnp.asarray(factor * added, x0.dtype)
        for check, text in (
            (step.check_first, "from float32"),
            (step.check, "of what they should"),
        ):
            with pytest.raises(AssertionError, match=text) if fails else contextlib.nullcontext():
                check((x, None))


def test_the_load_of_a_step_is_recorded_and_held_to_its_ids(mesh):
    stack = decode_step.Stack(mesh, MODEL, "fp8", layers=2, sets=2)
    name = "ours, all_to_all, load recorded"
    [step] = decode_step.steps_of(stack, 4, None, "cpu", (name,))
    x, load = jax.jit(step.function)(step.carry, *step.rest)
    step.check_first((x, load))
    step.check((x, load))
    recorded = maj.collect_expert_load(load).logical_count
    assert recorded.shape == (1, 2, MODEL.experts)
    assert recorded.sum((0, 2)).tolist() == [8 * MODEL.top_k] * 2
    with pytest.raises(AssertionError, match="other counts than those of the ids"):
        step.check((x, stack.load()))


def test_rows_and_what_communication_costs(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    given = ["--launch", "default", "--models", "tiny", "--formats", "fp8", "--tokens", "3"]
    given += ["--layers", "1", "--devices", "2", "--quick", "--providers", "ours;no communication"]
    assert decode_step.main([*given, "--output", str(out), "--commit", "x"]) == 0
    rows = rows_of.read([out])
    assert len(rows) == 3 * 3 and all(row["us"] > 0 and row["sets"] == 2 for row in rows)
    told = capsys.readouterr().out
    assert "tiny fp8 3, donated: µs a layer beyond" in told and "ours, all_to_all" in told

    def row(provider, us):
        return {"case": "c", "provider": provider, "clock": "wall", "way": "donated", "us": us}

    made = [row("ours, a", 30.0), row("no communication", 10.0), row("plain, b", 50.0)]
    made += [row("plain, c", 60.0), {"case": "c", "provider": "plain, d", "note": "failed"}]
    [line] = decode_step.communication(made)
    assert "ours, a 20.0 (0.50 of plain); plain, b 40.0; plain, c 50.0" in line
