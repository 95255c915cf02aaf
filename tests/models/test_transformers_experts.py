"""examples/transformers_experts.py: the MoE blocks of three of transformers' models, and their tokens.

Run again with the oldest transformers that is supported laid over the environment: make test-transformers.
"""

import json
import os
import re
import sys

import jax
import numpy as np
import pytest

from moe_align_jax._cli import profile_layer
from tests.models.example import load

MODELS = {"Qwen3-MoE": "mlp", "Mixtral": "block_sparse_moe", "DeepSeek-V3": "mlp"}


@pytest.fixture(scope="module")
def example():
    example = load("transformers_experts", "torch", "transformers", "safetensors")
    threads = example.torch.get_num_threads()
    example.torch.set_num_threads(1)  # the products are tiny: threads would wait for each other
    yield example
    example.torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=MODELS)
def model(request, example):
    with example.settings():
        return request.param, example.tiny_model(request.param)


def test_the_release_is_the_one_asked_for(example):
    version = sys.modules["transformers"].__version__  # which the example has imported
    if wanted := os.environ.get("EXPECT_TRANSFORMERS"):
        assert version == wanted
    newest = tuple(map(int, version.split(".")[:2]))
    assert newest >= (5, 17)


def files_of(example, model, folder):
    """The tensors of a model's files, by the names that they have there."""
    from safetensors.numpy import load_file

    with example.settings():
        model.save_pretrained(folder)
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
    return {key: value for name in names for key, value in load_file(folder / name).items()}


def test_a_block_of_a_checkpoint_equals_theirs(example, model, tmp_path):
    torch = example.torch
    name, model = model
    tensors = files_of(example, model, tmp_path)
    part, names = MODELS[name], ("gate_proj", "up_proj", "down_proj")
    if name == "Mixtral":
        names = ("w1", "w3", "w2")
    pattern = re.compile(rf"model\.layers\.1\.{part}\.experts\.(\d+)\.(\w+)\.weight")
    experts = [found.groups() for key in tensors if (found := pattern.fullmatch(key))]
    number = getattr(model.config, "n_routed_experts", None) or model.config.num_local_experts
    assert sorted(experts) == sorted((str(j), n) for j in range(number) for n in names)

    x = np.random.default_rng(0).standard_normal((37, model.config.hidden_size)).astype(np.float32)
    with example.settings(), torch.no_grad():
        want = model.model.layers[1].mlp(torch.from_numpy(x)[None])[0].numpy()
        got = example.moe_block(model.config, tensors, 1, jax.numpy.asarray(x))
    assert got.shape == want.shape and np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * np.abs(want).max())


def test_greedy_tokens_are_the_same_with_our_experts(example, model):
    torch = example.torch
    _, model = model
    calls = []
    with example.settings():
        theirs = example.generate(model, num_tokens=8)
        forward = example.experts_forward
        example.experts_forward = lambda *args: calls.append(args[1].shape) or forward(*args)
        try:
            example.use_in(model)
            ours = example.generate(model, num_tokens=8)
            example.experts_forward = lambda self, x, ids, weights: torch.zeros_like(x)
            example.use_in(model)
            without = example.generate(model, num_tokens=8)
        finally:
            example.experts_forward = forward
            model.set_experts_implementation("eager")
    assert ours.shape == (2, 13) and torch.equal(ours, theirs)
    assert not torch.equal(without, theirs), "the experts make no difference to these tokens"
    assert {tuple(shape) for shape in calls} == {
        (10, 32),
        (2, 32),
    }  # the prompts, then a token each


def test_masked_pairs_have_the_id_e_and_are_left_out(example):
    torch = example.torch
    ids = np.array([[0, 4], [4, 4], [1, 2], [3, 0], [4, 1], [2, 3]])
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 32)).astype(np.float32)
    weights = rng.uniform(0.2, 1.0, (6, 2)).astype(np.float32)
    with example.settings(), torch.no_grad():
        experts = example.tiny_model("Mixtral").model.layers[0].mlp.experts
        got = example.experts_forward(experts, *map(torch.from_numpy, (x, ids, weights))).numpy()
        first, down = experts.gate_up_proj.numpy(), experts.down_proj.numpy()
    want = np.zeros_like(x)
    for t, k in np.argwhere(ids < 4):
        gate, up = np.split(first[ids[t, k]] @ x[t], 2)
        want[t] += weights[t, k] * (down[ids[t, k]] @ (gate / (1 + np.exp(-gate)) * up))
    assert not np.any(got[1]) and np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_what_it_does_not_compute_is_refused(example):
    torch = example.torch
    with example.settings():
        experts = example.tiny_model("Mixtral").model.layers[0].mlp.experts
        arguments = torch.zeros(2, 32), torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2)
        with pytest.raises(NotImplementedError, match="under torch.no_grad"):
            example.experts_forward(experts, *arguments)
        experts.config.hidden_act = "gelu"
        with torch.no_grad(), pytest.raises(NotImplementedError, match="not a SwiGLU"):
            example.experts_forward(experts, *arguments)


def test_the_sizes_that_moe_align_profile_knows_are_theirs(example):
    qwen, mixtral, deepseek = (
        profile_layer.MODELS[name] for name in ("qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v3")
    )
    # The defaults of transformers' configurations are these models.
    theirs = example.Qwen3MoeConfig()
    sizes = (theirs.num_experts, theirs.num_experts_per_tok, theirs.hidden_size)
    assert (qwen.experts, qwen.top_k, qwen.hidden, qwen.ffn) == (
        *sizes,
        theirs.moe_intermediate_size,
    )
    theirs = example.MixtralConfig()
    sizes = (theirs.num_local_experts, theirs.num_experts_per_tok, theirs.hidden_size)
    got = (mixtral.experts, mixtral.top_k, mixtral.hidden, mixtral.ffn)
    assert got == (*sizes, theirs.intermediate_size)
    theirs = example.DeepseekV3Config()
    sizes = (theirs.n_routed_experts, theirs.num_experts_per_tok, theirs.hidden_size)
    got = (deepseek.experts, deepseek.top_k, deepseek.hidden, deepseek.ffn)
    assert got == (*sizes, theirs.moe_intermediate_size)
    routing = dict(deepseek.routing)
    assert (routing["num_groups"], routing["topk_groups"]) == (theirs.n_group, theirs.topk_group)
    assert routing["scaling_factor"] == theirs.routed_scaling_factor
