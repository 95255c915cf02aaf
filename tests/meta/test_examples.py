"""examples/moe_layer.py against dense references that share no code with it; README's code."""

import doctest
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FILE = Path(__file__).resolve().parents[2] / "examples" / "moe_layer.py"
TOKENS, HIDDEN, FFN, EXPERTS, TOP_K = 24, 8, 12, 6, 2


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("moe_layer_example", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def inputs(example):
    params = example.init(jax.random.key(0), hidden=HIDDEN, ffn=FFN, num_experts=EXPERTS)
    x = jax.random.normal(jax.random.key(1), (TOKENS, HIDDEN), jnp.float32)
    weights = jax.nn.softmax(jax.random.normal(jax.random.key(2), (TOKENS, TOP_K), jnp.float32))
    ids = jax.random.randint(jax.random.key(3), (TOKENS, TOP_K), 0, EXPERTS)
    return params, x, weights, ids


def loop_over_pairs(params, x, weights, ids) -> np.ndarray:
    """float64 NumPy, one pair at a time; an id out of range is skipped."""
    gate, up, down = (np.asarray(p, np.float64) for p in params[1:])
    x, weights, ids = (np.asarray(a) for a in (x, weights, ids))
    y = np.zeros(x.shape)
    for token in range(x.shape[0]):
        for k in range(ids.shape[1]):
            e = int(ids[token, k])
            if not 0 <= e < gate.shape[0]:
                continue
            g = x[token] @ gate[e]
            y[token] += weights[token, k] * ((g / (1 + np.exp(-g)) * (x[token] @ up[e])) @ down[e])
    return y


def masked_dense(params, x, weights, ids):
    """Differentiable: every expert on every token, kept by a mask."""
    y = 0.0
    for e in range(EXPERTS):
        out = (jax.nn.silu(x @ params.gate[e]) * (x @ params.up[e])) @ params.down[e]
        y += out * jnp.where(ids == e, weights, 0).sum(1, keepdims=True)
    return y


ROUTINGS = {
    "all in range": lambda ids: ids,
    "some dropped": lambda ids: ids.at[::3, 0].set(-1).at[1::4, 1].set(EXPERTS),
    "one expert": lambda ids: jnp.full_like(ids, 2),
    "all dropped": lambda ids: jnp.full_like(ids, -1),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_moe_layer_values_equal_a_loop_over_pairs(example, inputs, routing, block_size):
    params, x, weights, ids = inputs
    ids = ROUTINGS[routing](ids)
    layer = jax.jit(example.apply_experts, static_argnames="block_size")
    with jax.default_matmul_precision("highest"):
        y = layer(params, x, weights, ids, block_size=block_size)
    np.testing.assert_allclose(y, loop_over_pairs(params, x, weights, ids), rtol=2e-5, atol=2e-6)
    assert y.dtype == x.dtype


@pytest.mark.parametrize("routing", ROUTINGS)
def test_moe_layer_gradients_equal_the_dense_ones(example, inputs, routing):
    params, x, weights, ids = inputs
    ids = ROUTINGS[routing](ids)
    direction = jax.random.normal(jax.random.key(4), x.shape, x.dtype)

    def loss(layer):
        return lambda params, x, weights: jnp.sum(layer(params, x, weights, ids) * direction)

    def aligned(*arguments):
        return example.apply_experts(*arguments, block_size=4)

    with jax.default_matmul_precision("highest"):
        got = jax.jit(jax.grad(loss(aligned), argnums=(0, 1, 2)))(params, x, weights)
        want = jax.grad(loss(masked_dense), argnums=(0, 1, 2))(params, x, weights)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)
    if routing == "all dropped":
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(got))


def test_moe_layer_routes_and_trains_its_router(example, inputs):
    params, x, _, _ = inputs
    logits = np.asarray(x) @ np.asarray(params.router)
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :TOP_K]
    picked = np.take_along_axis(logits, ids, 1)
    weights = np.exp(picked) / np.exp(picked).sum(1, keepdims=True)
    with jax.default_matmul_precision("highest"):
        y = example.moe_layer(params, x, top_k=TOP_K, block_size=4)
    np.testing.assert_allclose(y, loop_over_pairs(params, x, weights, ids), rtol=2e-5, atol=2e-6)

    def loss(router):
        p = params._replace(router=router)
        return jnp.sum(example.moe_layer(p, x, top_k=TOP_K, block_size=4) ** 2)

    gradient = jax.grad(loss)(params.router)
    step = 1e-3 * jax.random.normal(jax.random.key(5), params.router.shape, x.dtype)
    change = loss(params.router + step) - loss(params.router - step)
    np.testing.assert_allclose(change, 2 * jnp.sum(gradient * step), rtol=0.05)


def test_moe_layer_stages_are_named_in_the_program(example, inputs):
    params, x, _, _ = inputs
    layer = jax.jit(lambda p, x: example.moe_layer(p, x, top_k=TOP_K, block_size=4))
    text = layer.lower(params, x).compile().as_text()
    for stage in ("route", "experts", "moe_align_block_size", "gate_up", "down", "combine"):
        assert f"/{stage}/" in text, f"no operation under the scope {stage!r}"


def test_moe_layer_runs_as_a_script():
    command = [sys.executable, str(FILE), "--tokens", "32", "--experts", "4", "--hidden", "16"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = [float(line.split()[-1]) for line in done.stdout.splitlines() if "gradient of" in line]
    assert len(errors) == 4 and max(errors) < 1e-4
    assert "experts by" in done.stdout


# -- README -----------------------------------------------------------------------------------

README = FILE.parent.parent / "README.md"


def test_readme_example_prints_what_it_says():
    result = doctest.testfile(str(README), module_relative=False)
    assert result.attempted >= 5 and result.failed == 0


def readme_code(containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    [code] = [b for b in blocks if containing in b and ">>>" not in b]
    return code


def test_readme_jax_code_is_a_layer_from_logits_to_its_result(inputs):
    params, x, _, _ = inputs
    names = {}
    exec(readme_code("def experts("), names)
    router = jax.random.normal(jax.random.key(5), (HIDDEN, EXPERTS), jnp.float32)
    gate_up = jnp.concatenate([params.gate, params.up], axis=2)
    with jax.default_matmul_precision("highest"):
        y = jax.jit(names["experts"])(x, router, gate_up, params.down)
    scores = np.exp(np.asarray(x, np.float64) @ np.asarray(router, np.float64))
    ids = np.argsort(-scores, axis=1)[:, :TOP_K]
    weights = np.take_along_axis(scores, ids, axis=1) / scores.sum(1, keepdims=True)
    np.testing.assert_allclose(y, loop_over_pairs(params, x, weights, ids), rtol=2e-5, atol=2e-6)


def test_readme_torch_code_aligns():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    names = {}
    exec(readme_code("from torch_bridge").replace('device="cuda"', 'device="cpu"'), names)
    ids = names["topk_ids"].numpy()
    rows, experts = names["sorted_ids"].numpy(), names["expert_ids"].numpy()
    used = int(names["num_tokens_post_pad"][0])
    real = rows < ids.size
    np.testing.assert_array_equal(np.sort(rows[real]), np.arange(ids.size))
    assert used == (-(-np.bincount(ids, minlength=64) // 128) * 128).sum()
    np.testing.assert_array_equal(ids[rows[real]], np.repeat(experts, 128)[: rows.size][real])
