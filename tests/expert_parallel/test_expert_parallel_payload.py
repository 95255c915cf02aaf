"""What dispatch sends: quantised payloads and their scales, in a message or by themselves, not copied."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import moe_align_jax as maj
from moe_align_jax._expert_parallel import message
from tests.expert_parallel import exchanges
from tests.expert_parallel.exchanges import Batch, jit, layer, mesh_of, over, scale_of, split

E4M3 = ml_dtypes.float8_e4m3fn


@pytest.fixture
def emulated_ragged(monkeypatch):
    exchanges.emulate_ragged(monkeypatch)


# -- codes and scales ------------------------------------------------------------------------------


def test_quantisation_is_that_of_deepep():
    """Scales exactly, codes exactly but for ties of the product's rounding; floor, zero, the largest."""
    rng = np.random.default_rng(7)
    x = (rng.normal(size=(6, 256)) * 2.0 ** rng.integers(-20, 19, (6, 1))).astype(np.float32)
    x[1, :128] = 0
    x[2, :128] = 1e-6
    x[3, 5] = np.float32(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    q, scales = message.quantize(jnp.asarray(x))
    amax = np.maximum(np.abs(x.reshape(6, 2, 128)).max(-1), np.float32(1e-4))
    np.testing.assert_allclose(scales, amax / 448, rtol=1e-6)
    exact = x.reshape(6, 2, 128).astype(np.float64) * (448 / amax.astype(np.float64))[..., None]
    want = exact.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).reshape(6, 256)
    apart = np.asarray(q).view(np.uint8).astype(int) - want.view(np.uint8)
    assert np.abs(apart).max() <= 1 and (apart != 0).mean() < 0.005
    assert not np.isnan(np.asarray(q, np.float32)).any()


def power_of_two_scales(x):
    """(codes, biased exponents) of float32 [T, H], by NumPy: no logarithm, no bits."""
    groups = x.reshape(len(x), -1, 128)
    amax = np.maximum(np.abs(groups).max(-1), np.float32(1e-4))
    mantissa, exponent = np.frexp(amax * np.float32(1 / 448))
    exponent -= mantissa == 0.5
    codes = np.ldexp(groups, -exponent[..., None]).astype(E4M3).reshape(x.shape)
    return codes.view(np.uint8), (exponent + 127).astype(np.uint8)


@pytest.mark.parametrize("payload", message.PAYLOADS)
def test_a_step_without_tokens_has_scales_without_rows(payload):
    """T = 0 in both modes: as a server's step with no request, or a shape that is probed."""
    for mode in ("normal", "low_latency"):

        def body(x, ids, weights, mode=mode):
            got = maj.dispatch(
                x, ids, weights, axis_name="ep", num_experts=4, payload=payload, mode=mode
            )
            return got.x, got.scales, maj.combine(got.x.astype(jnp.float32), got.handle)

        given = (
            np.zeros((0, 512), np.float32),
            np.zeros((0, 2), np.int32),
            np.zeros((0, 2), np.float32),
        )
        x, scales, out = jax.eval_shape(over(mesh_of(2), body), *given)
        assert out.shape == (0, 512) and x.dtype == E4M3
        packed = payload == "fp8_ue8m0_packed"
        rows = x.shape[:-1]
        want = (*rows, 1 if packed else 4)
        if packed and mode == "low_latency":
            want = (rows[0], 1, rows[1])
        assert scales.shape == want


def test_scales_that_are_powers_of_two_are_exact():
    """Codes too; a group whose greatest value is 448 * 2^k, one just above, zero, and the largest."""
    rng = np.random.default_rng(20)
    x = (rng.normal(size=(9, 512)) * 2.0 ** rng.integers(-30, 100, (9, 1))).astype(np.float32)
    x[:6, :128] = np.float32([448, 450, 7 * 2.0**-9, 1e-6, 0, 3.38e38])[:, None]
    codes, exponents = power_of_two_scales(x)
    q, scales = message.quantize(jnp.asarray(x), "ue8m0")
    np.testing.assert_array_equal(np.asarray(q).view(np.uint8), codes)
    np.testing.assert_array_equal(scales, np.ldexp(np.float32(1), exponents.astype(int) - 127))
    assert exponents[:2, 0].tolist() == [127, 128] and exponents.min() >= 1
    q, words = message.quantize(jnp.asarray(x), "ue8m0_packed")
    np.testing.assert_array_equal(np.asarray(q).view(np.uint8), codes)
    assert words.dtype == np.int32 and words.shape == (9, 1)
    np.testing.assert_array_equal(np.asarray(words).view(np.uint8), exponents)


@pytest.mark.parametrize(
    ("payload", "transport", "mode"),
    [
        ("fp8_ue8m0", "all_to_all", "low_latency"),
        ("fp8_ue8m0_packed", "all_gather", "low_latency"),
        ("fp8_ue8m0_packed", "ragged_all_to_all", "normal"),
        ("a packed pair", "all_to_all", "low_latency"),
    ],
)
def test_power_of_two_scales_arrive_with_their_rows(emulated_ragged, payload, transport, mode):
    size, num_experts = 2, 4
    batch = Batch(size, 6, 512, 2, num_experts, seed=21)
    codes, exponents = power_of_two_scales(batch.x)
    pair = payload == "a packed pair"
    options = {} if pair else {"payload": payload}

    def body(x, ids, weights):
        got = maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=num_experts,
            mode=mode, transport=transport, **options,
        )  # fmt: skip
        marks = got.topk_ids if got.masked_m is None else got.masked_m
        return lax.bitcast_convert_type(got.x, jnp.uint8), got.scales, marks

    x = (codes.view(E4M3), exponents.view(np.int32)) if pair else batch.x
    got, scales, marks = map(np.asarray, over(mesh_of(size), body)(x, *batch.args[1:]))
    if payload == "fp8_ue8m0":
        found = (np.frexp(scales)[1] + 126).astype(np.uint8)
    else:
        # [e, G / 4, M] of the masked layout, [R, G / 4] otherwise.
        assert scales.dtype == np.int32 and scales.shape[1] == 1
        words = np.swapaxes(scales, 1, 2) if mode == "low_latency" else scales
        found = np.ascontiguousarray(words).view(np.uint8)
    for place in range(num_experts if mode == "low_latency" else size):
        if mode == "low_latency":
            sent = np.flatnonzero((batch.ids == place).any(1))
            used = np.arange(marks[place])
        else:
            sent = np.flatnonzero((batch.valid & (batch.ids // 2 == place)).any(1))
            used = np.flatnonzero((marks.reshape(size, 12, 2)[place] >= 0).any(1))
        assert len(used) == len(sent)
        rows = got.reshape(-1, 12, 512)[place][used]
        np.testing.assert_array_equal(rows, codes[sent])
        np.testing.assert_array_equal(found.reshape(-1, 12, 4)[place][used], exponents[sent])


# -- one message, or several -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_message_keeps_every_bit(dtype):
    rng = np.random.default_rng(8)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x = rng.integers(0, 256, (5, 6, 2)).astype(np.uint8).view(kind)[..., 0]
    scales, ids = (
        rng.normal(size=(5, 3)).astype(np.float32),
        np.arange(10, dtype=np.int32).reshape(5, 2),
    )
    fields = [jnp.asarray(a) for a in (x, scales, ids)]
    words = message.pack(fields)
    assert words.shape == (5, 6 + 6 + 4) and words.dtype == np.uint16
    for got, want in zip(message.unpack(words, fields), (x, scales, ids), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize(
    ("transport", "mode", "payload"),
    [
        ("all_gather", "normal", "fp8"),
        ("all_to_all", "normal", None),
        ("all_to_all", "low_latency", "fp8"),
        ("ragged_all_to_all", "low_latency", None),
    ],
)
def test_large_fields_travel_by_themselves(emulated_ragged, monkeypatch, transport, mode, payload):
    """x alone, after the rest in one message."""
    monkeypatch.setattr(message, "MAX_PACKED_BYTES", 1 << 10)
    size = 4
    batch = Batch(size, 5, 128, 3, 8, seed=22)
    run = over(mesh_of(size), layer(batch, mode=mode, transport=transport, payload=payload))
    got = run(*batch.args)
    want = batch.combined(lambda e, x: x * scale_of(e))
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, atol=scale * (0.07 if payload else 1e-6))
    if not transport.startswith("ragged"):
        text = run.lower(*batch.args).as_text()
        moved = re.findall(r"stablehlo\.(all_to_all|all_gather|reduce_scatter)", text)
        back = "all_to_all" if transport == "all_to_all" else "reduce_scatter"
        out = ["all_to_all", "all_gather"] if transport == "all_to_all" else ["all_gather"] * 2
        assert moved == [*out, back]


def test_gradients_of_fields_that_travel_by_themselves(monkeypatch):
    """The transpose of the all_gather too: both directions, against the dense sum."""
    monkeypatch.setattr(message, "MAX_PACKED_BYTES", 1)
    batch = Batch(4, 5, 16, 2, 8, seed=23)
    run = split(mesh_of(4), layer(batch, mode="normal", transport="all_to_all"))
    direction = np.random.default_rng(24).normal(size=batch.x.shape).astype(np.float32)
    got = jit(jax.grad(lambda x, w: jnp.sum(run(x, batch.ids, w) * direction), argnums=(0, 1)))(
        batch.x, batch.weights
    )
    scales = np.where(batch.valid, scale_of(batch.ids), 0)
    want = direction * (scales * batch.weights).sum(1, keepdims=True)
    np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-6)
    want = scales * (direction * batch.x).sum(1, keepdims=True)
    np.testing.assert_allclose(got[1], want, rtol=1e-5, atol=1e-5)


def test_no_copy_of_all_rows_beside_the_exchanges(monkeypatch):
    """In a compiled step nothing else is that large, but for slices that XLA:CPU makes for its all_to_all."""
    monkeypatch.setattr(message, "MAX_PACKED_BYTES", 1 << 10)
    size, count, hidden = 4, 32, 256

    def body(x, ids, weights, y):
        got = maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=8, mode="normal", transport="all_to_all"
        )
        y, received = lax.optimization_barrier((y, got.x))
        return received, got.topk_ids, maj.combine(y, got.handle)

    rows = size * size * count
    shapes = [((size * count, hidden), "float32"), ((size * count, 2), "int32")]
    shapes += [((size * count, 2), "float32"), ((rows, hidden), "float32")]
    given = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    text = jax.jit(split(mesh_of(size), body)).lower(*given).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    whole = re.findall(rf"= f32\[{size * count},{hidden}\]\S* ([\w-]+)\(", entry)
    assert sorted(whole) == ["all-gather", "parameter"]
    # Back: a slice for each rank, the exchange, and one fusion that masks, adds and rounds.
    assert entry.count(" all-to-all(") == 1
    parts = re.findall(rf"= f32\[1?,?{count},{hidden}\]\S* ([\w-]+)\(", entry)
    parts = [kind for kind in parts if kind not in ("get-tuple-element", "bitcast", "parameter")]
    assert parts in (["slice"] * size + ["fusion"], ["fusion"] * (size + 1)), parts


# -- what docs/expert_parallel.md shows ---------------------------------------------------------------


def test_layer_of_the_page_equals_a_loop_over_pairs():
    page = (Path(__file__).resolve().parents[2] / "docs" / "expert_parallel.md").read_text()
    [snippet] = [
        block
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        if "def layer_of_a_device(" in block
    ]
    scope = {}
    exec(snippet, scope)
    scope["num_experts"] = 8  # the layer's own, of the batch below
    rng = np.random.default_rng(25)
    batch = Batch(4, 3, 16, 2, 8, "bfloat16", seed=26)
    gate_up = (rng.normal(size=(8, 16, 256)) / 4).astype(batch.x.dtype)
    down = (rng.normal(size=(8, 128, 16)) / 11).astype(batch.x.dtype)
    got = over(mesh_of(4), scope["layer_of_a_device"])(*batch.args, gate_up, down)

    def expert(e, x):
        gate, up = np.split(x @ gate_up[e].astype(np.float64), 2)
        return (gate / (1 + np.exp(-gate)) * up) @ down[e].astype(np.float64)

    want = batch.combined(expert)
    worst = np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
    assert worst < 0.05, worst
