"""The expert-parallel layer in e4m3 (examples/fp8_expert_parallel_layer.py): values, load, no re-layout."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType

import moe_align_jax as maj
from tests.layout.masked_quant_oracle import group_scale
from tests.matmul.test_fp8 import calc_diff

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TOKENS, HIDDEN, FFN, EXPERTS, TOP_K = 4, 256, 128, 16, 2


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import fp8_expert_parallel_layer

    return fp8_expert_parallel_layer


def dequantized(values, scales):
    each = np.repeat(np.repeat(np.asarray(scales, np.float64), 128, 1), 128, 2)
    return np.asarray(values).astype(np.float64) * each


def rounded(row):
    """A float row through e4m3 and back, in groups of 128, by NumPy."""
    out = np.zeros(row.shape)
    for g in range(0, len(row), 128):
        group = row[g : g + 128].astype(np.float32)
        scale = group_scale(group, floor=1e-10)
        out[g : g + 128] = (group / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        out[g : g + 128] *= np.float64(scale)
    return out


def dense(params, x):
    """float64 `[T, H]`, a pair at a time, and the pairs of each expert."""
    gate_up, down = dequantized(*params.gate_up), dequantized(*params.down)
    logits = x.astype(np.float64) @ np.asarray(params.router, np.float64)
    want, counts = np.zeros(x.shape), np.zeros(EXPERTS, np.int64)
    for t, chosen in enumerate(np.argsort(-logits, axis=1)[:, :TOP_K]):
        shares = np.exp(logits[t, chosen] - logits[t].max())
        row = rounded(x[t].astype(np.float64))
        for e, share in zip(chosen, shares / shares.sum(), strict=True):
            gate, up = np.split(row @ gate_up[e].T, 2)
            want[t] += share * (rounded(gate / (1 + np.exp(-gate)) * up) @ down[e].T)
            counts[e] += 1
    return want, counts


def test_layer_over_eight_devices(example):
    """Its values, and the load that its own step records: the counts of the ids."""
    mesh = jax.make_mesh((8,), ("ep",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    shapes = {"router": (HIDDEN, EXPERTS), "gate": (EXPERTS, HIDDEN, FFN)}
    shapes |= {"up": (EXPERTS, HIDDEN, FFN), "down": (EXPERTS, FFN, HIDDEN)}
    given = {k: (rng.normal(size=s) / s[-2] ** 0.5).astype(np.float32) for k, s in shapes.items()}
    params = example.quantize(example.MoEParams(**given))
    step = jax.jit(example.fp8_layer(mesh, top_k=TOP_K))
    load = example.init_load(mesh, num_experts=EXPERTS)
    every = []
    for seed in (1, 2):
        x = jax.random.normal(jax.random.key(seed), (8 * TOKENS, HIDDEN), jnp.bfloat16)
        y, load = step(params, x, load)
        want, counts = dense(params, np.asarray(x))
        every.append(counts)
        # DeepEP bounds its fp8 exchange alone by 9e-4. A bfloat16 between the stages may round to the
        # next code.
        assert calc_diff(y, want) < 4e-4
    recorded = maj.collect_expert_load(load).logical_count
    np.testing.assert_array_equal(recorded[:, 0], every)
    assert recorded.sum() == 2 * 8 * TOKENS * TOP_K


def test_no_array_is_copied_or_turned_between_the_stages(example):
    """The stages as they are lowered for a GPU: kernels, and reshapes, which move nothing."""
    e, m = 4, 256
    f32, f8 = jnp.float32, jnp.float8_e4m3fn

    def quantized(*shape, blocks):
        return jax.ShapeDtypeStruct(shape, f8), jax.ShapeDtypeStruct(blocks, f32)

    params = example.Fp8Params(
        None,
        quantized(e, 512, 512, blocks=(e, 4, 4)),
        quantized(e, 512, 256, blocks=(e, 4, 2)),
    )
    rows = quantized(e, m, 512, blocks=(e, m, 4))
    counts = jax.ShapeDtypeStruct((e,), jnp.int32)
    run = jax.jit(lambda *a: example.experts(*a, implementation="mosaic_gpu"))
    text = run.trace(params, rows, counts).lower(lowering_platforms=("cuda",)).as_text()
    # Two products, which find their tiles themselves at so few experts, and the activation between them.
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 3
    found = set(re.findall(r"stablehlo\.(\w+)", text)) - {"custom_call", "reshape", "constant"}
    assert not found & {"transpose", "convert", "pad", "concatenate", "copy", "gather", "slice"}, (
        found
    )


@pytest.mark.gpu
def test_layer_over_two_gpus_by_the_kernels(example):
    """DeepEP's low-latency path in e4m3, by our kernels, beside the same products by "xla"."""
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    mesh = jax.make_mesh((2,), ("ep",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sizes = {"hidden": 7168, "ffn": 2048, "num_experts": 16}
    params = example.quantize(example.init(jax.random.key(0), **sizes))
    x = jax.random.normal(jax.random.key(1), (2 * 128, 7168), jnp.bfloat16)
    outs = []
    for implementation in ("mosaic_gpu", "mosaic_gpu", "xla"):
        step = jax.jit(example.fp8_layer(mesh, top_k=8, implementation=implementation))
        y, load = step(params, x, example.init_load(mesh, num_experts=16))
        assert maj.collect_expert_load(load).logical_count.sum() == 2 * 128 * 8
        outs.append(np.asarray(y))
    assert outs[0].tobytes() == outs[1].tobytes()
    assert calc_diff(outs[0], outs[2]) < 1e-4
