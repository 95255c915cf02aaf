"""examples/train_moe.py: it learns, goes on where it stopped, and decodes a padded batch as single texts."""

import dataclasses
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.example import load

STEPS, SAVED = 40, 30


@pytest.fixture(scope="module")
def example():
    example = load("train_moe", "flax", "optax", "orbax.checkpoint", "rich", "matplotlib")
    config, batch, length = example.SIZES["small"]
    # A layer and half a batch less: it is compiling that takes the time.
    example.SIZES["small"] = dataclasses.replace(config, layers=1), batch // 2, length
    return example


@pytest.fixture(scope="module")
def run(example, tmp_path_factory):
    """A short training run: its result and its folder."""
    out = tmp_path_factory.mktemp("trained")
    options = ["--size", "small", "--steps", str(STEPS), "--save-every", str(SAVED)]
    with example.settings():
        return example.main([*options, "--out", str(out)]), out


def entropy(text):
    """Nats per byte of the best model that looks at no other byte."""
    share = np.bincount(text, minlength=256) / len(text)
    return -np.sum(share[share > 0] * np.log(share[share > 0]))


def test_the_model_learns_more_than_how_often_each_byte_comes(example, run):
    result, _ = run
    training, held_out = example.read_text(None)
    assert 100_000 < len(training) + len(held_out) < 1_000_000
    assert result.losses[0] > 5.2  # 5.545 = log(256): it knows nothing
    assert np.mean(result.losses[-5:]) < entropy(training) - 0.3
    assert result.held_out < entropy(held_out) - 0.2


def test_every_token_of_every_step_counts_for_its_experts(example, run):
    result, out = run
    config, batch, length = example.SIZES["small"]
    assert result.loads.shape == (STEPS, config.layers, config.experts)
    assert np.all(result.loads.sum(axis=2) == batch * length * config.top_k)
    for name in ("losses.png", "expert_load.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG"), name


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(example, run, tmp_path):
    result, out = run
    shutil.copytree(out / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / str(STEPS))
    options = ["--size", "small", "--steps", str(STEPS), "--out", str(tmp_path)]
    with example.settings():
        again = example.main(options)
    assert again.losses == result.losses[SAVED:]
    assert again.step == STEPS and again.held_out == result.held_out


def test_a_padded_batch_decodes_as_each_prompt_alone_without_a_cache(example, run):
    model = run[0].model
    _, batch, length = example.SIZES["small"]
    prompts = [b"The kernel", b"", b"# Grouped matrix multi", b"a"]
    # Shapes that are compiled already: those of the run.
    rows, lengths = np.zeros((4, 32), np.int32), np.array(list(map(len, prompts)), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = list(prompt)
    with example.settings():
        got = np.asarray(
            sys.modules["moe_language_model"].generate(model, rows, lengths, num_tokens=48)
        )
        for prompt, tokens in zip(prompts, got, strict=True):
            data = list(prompt)
            for token in tokens[:6] if prompt else []:  # a row of length 0 is not used
                alone = np.zeros((batch, length), np.int32)  # zeros behind a token do not change it
                alone[0, : len(data)] = data
                logits = example.forward(model, alone)[0, len(data) - 1]
                assert token == np.argmax(logits), prompt
                data.append(int(token))


def test_the_block_is_a_dense_mixture_of_its_experts(example, run):
    """Of the tokens that are real: the others give zero, and count for no expert."""
    block = run[0].model.layers[0].moe
    x = np.random.default_rng(0).standard_normal((9, block.config.hidden)).astype(np.float32)
    real = np.arange(9) % 4 != 1
    with example.settings(), jax.default_matmul_precision("highest"):
        y, logits, counts = block(jnp.asarray(x), jnp.asarray(real))
    router, gate_up, down = (
        np.asarray(p[...], np.float64) for p in (block.router, block.gate_up, block.down)
    )
    np.testing.assert_allclose(logits, x @ router, rtol=1e-4, atol=1e-5)
    want, hits = np.zeros(x.shape), np.zeros(block.config.experts, int)
    for token in np.flatnonzero(real):
        scores = x[token] @ router
        chosen = np.argsort(-scores)[: block.config.top_k]
        share = np.exp(scores[chosen] - scores.max())
        for e, weight in zip(chosen, share / share.sum(), strict=True):
            gate, up = np.split(x[token] @ gate_up[e], 2)
            want[token] += weight * ((gate / (1 + np.exp(-gate)) * up) @ down[e])
            hits[e] += 1
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    assert counts.tolist() == hits.tolist()


def test_the_balance_loss_is_one_for_an_even_load_and_e_for_one_expert(example):
    even = example.balance_loss(
        jnp.zeros((1, 6, 4), jnp.float32), jnp.array([[3, 3, 3, 3]], jnp.int32)
    )
    assert float(even) == pytest.approx(1.0)
    one = jnp.broadcast_to(jnp.array([30.0, 0, 0, 0], jnp.float32)[None, None], (1, 6, 4))
    hot = example.balance_loss(one, jnp.array([[12, 0, 0, 0]], jnp.int32))
    assert float(hot) == pytest.approx(4.0, rel=1e-5)
