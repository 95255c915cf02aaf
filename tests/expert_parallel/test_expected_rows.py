"""Products behind dispatch are told the rows of a mean expert, and tiles follow: by ids that NumPy draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from benchmarks import decode_layers, decode_step, exchanges
from moe_align_jax import matmul
from moe_align_jax._grouped_matmul.choose_tiles import config_for
from tests.expert_parallel.exchanges import mesh_of, over
from tests.expert_parallel.test_expert_parallel import ROOT

H200 = "NVIDIA H200"
DEEPSEEK = decode_step.MODELS["deepseek-v3"]


@pytest.fixture
def products(monkeypatch):
    """The problems of masked products, in order, which are traced and not computed."""
    found = []

    def run(problem, implementation, *operands):
        found.append(problem)
        return jnp.zeros((problem.num_rows, problem.n), problem.out_dtype)

    monkeypatch.setattr(matmul, "_run", run)
    return found


def pairs_of_experts(tokens, model):
    """`[draws, E]` of two ranks, top_k distinct experts for each token."""
    draws = np.random.default_rng(0).random((100, 2 * tokens, model.experts))
    ids = draws.argpartition(model.top_k, axis=2)[..., : model.top_k]
    return np.stack([np.bincount(each.ravel(), minlength=model.experts) for each in ids])


def reads(problem, counts):
    """How many tiles of rows an expert in use has, each of which reads all of its weights."""
    bm = config_for(problem, H200).bm
    return (-(-counts // bm)).sum() / (counts > 0).sum()


@pytest.mark.parametrize("mode", ["low_latency", "normal"])
def test_the_result_of_dispatch_tells_the_rows_of_a_mean_expert(mode):
    """5 tokens of 4 ranks choose 3 of 16: 60 / 16 pairs; and a box has no more than its rows."""
    told = []

    def body(x, ids, weights):
        for most in (None, 2):
            options = {} if mode == "normal" else {"max_tokens_per_expert": most}
            got = maj.dispatch(
                x, ids, weights, axis_name="ep", num_experts=16, mode=mode, **options
            )
            told.append(got.expected_m)
        told.append(jax.tree.map(lambda leaf: leaf, got).expected_m)
        return maj.combine(got.x, got.handle)

    ids = np.random.default_rng(0).random((20, 16)).argsort(1)[:, :3].astype(np.int32)
    x, weights = np.ones((20, 8), np.float32), np.ones((20, 3), np.float32)
    jax.eval_shape(over(mesh_of(4), body), x, ids, weights)
    assert told[:3] == (
        [None] * 3 if mode == "normal" else [round(np.bincount(ids.flat).mean()), 2, 2]
    )


def test_layers_tell_the_rows_of_a_mean_expert(monkeypatch, products):
    """Both examples and `sharded_fused_moe`, at the sizes of DeepSeek-V3's experts over two GPUs."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import expert_parallel_layer
    import fp8_expert_parallel_layer as fp8

    mesh = mesh_of(2)
    h, f, e, k = DEEPSEEK
    bf16, e4m3 = jnp.bfloat16, jnp.float8_e4m3fn
    like = jax.ShapeDtypeStruct
    params = expert_parallel_layer.MoEParams(
        *(like(shape, bf16) for shape in ((h, e), (e, h, f), (e, h, f), (e, f, h)))
    )

    def scaled(*shape):
        return like(shape, e4m3), like((shape[0], shape[1] // 128, shape[2] // 128), jnp.float32)

    quantised = fp8.Fp8Params(params.router, scaled(e, 2 * f, h), scaled(e, h, f))
    load = jax.eval_shape(lambda: fp8.init_load(mesh, num_experts=e))
    page = (ROOT / "docs/expert_parallel.md").read_text()
    for tokens in (8, 64, 128):
        counts = pairs_of_experts(tokens, DEEPSEEK)
        x = like((2 * tokens, h), bf16)
        ids, weights = like((2 * tokens, k), jnp.int32), like((2 * tokens, k), jnp.float32)
        layer = expert_parallel_layer.expert_parallel_layer(mesh, top_k=k)
        jax.eval_shape(layer, params, x)
        jax.eval_shape(fp8.fp8_layer(mesh, top_k=k), quantised, x, load)
        jax.eval_shape(
            lambda *given: maj.sharded_fused_moe(*given, mesh=mesh, expert_axis="ep"),
            *(x, like((e, h, 2 * f), bf16), params.down, weights, ids),
        )
        assert len(products) == 6 and {p.expected_rows for p in products} == {counts.mean()}
        for problem in products:
            # At 128 tokens half of the experts have a few rows more than a tile of 128.
            assert reads(problem, counts) < (1.6 if tokens == 128 else 1.05)
            untold = reads(problem._replace(expected_rows=0), counts)
            assert untold > (1.3 if tokens == 8 else 4.4)
            before, since = (
                config_for(p, H200).bm for p in (problem._replace(expected_rows=0), problem)
            )
            told = f"{before}, {since} | {untold:.1f}, {reads(problem, counts):.1f}"
            assert f"| {tokens} | {counts.mean():.0f} | {told} |" in page
        products.clear()


@pytest.mark.parametrize("model", ["deepseek-v3", "qwen3-30b-a3b"])
@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_every_layer_of_the_benchmark_tells_the_same_rows(products, model, form):
    """Ours and its peers; Qwen3's tiles are those that they were."""
    model = decode_step.MODELS[model]
    h, f, e, k = model
    like, mesh = jax.ShapeDtypeStruct, mesh_of(2)

    def weights(*shape):
        if form == "bf16":
            return like((shape[0], shape[2], shape[1]), jnp.bfloat16)
        blocks = shape[0], shape[1] // 128, shape[2] // 128
        return like(shape, jnp.float8_e4m3fn), like(blocks, jnp.float32)

    w = decode_layers.Weights(weights(e, 2 * f, h), weights(e, h, f))
    for tokens in (8, 128):
        size = exchanges.Size("low_latency", tokens, h, k, e, form == "bf16")
        rows = like((e, 2 * tokens, h), jnp.bfloat16 if form == "bf16" else jnp.float8_e4m3fn)
        scales = None if form == "bf16" else like((e, 2 * tokens, h // 128), jnp.float32)
        given = like((2 * tokens, h), jnp.bfloat16), like((2 * tokens, k), jnp.int32)
        given += like((2 * tokens, k), jnp.float32), w, (rows, scales, like((e,), jnp.int32))
        names = []
        for layer in decode_layers.every(size, 2, form, None, "cpu"):
            if "fused_moe" in layer.name or "sorted" in layer.name:
                continue
            body = jax.shard_map(
                layer.run, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=False
            )
            jax.eval_shape(body, *given)
            names.append(layer.name)
        counts = pairs_of_experts(tokens, model)
        assert len(products) == 2 * len(names) >= 10, names
        assert {p.expected_rows for p in products} == {counts.mean()}
        for problem in products:
            before = config_for(problem._replace(expected_rows=0), H200)
            assert (config_for(problem, H200) == before) == (e == 128)
        products.clear()
