"""quantize_rowwise and quantize_blockwise against NumPy, code by code; nothing is off by one."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import moe_align_jax as maj
from moe_align_jax._masked_quant import casts, launch
from moe_align_jax._masked_quant.config import config_for
from moe_align_jax._masked_quant.quotient import nearest_reciprocal

E4M3 = ml_dtypes.float8_e4m3fn
F32 = np.float32


def oracle_codes(values, scale, divide):
    scaled = values / scale if divide else values * (F32(1) / scale)
    return np.clip(scaled, F32(-448), F32(448)).astype(E4M3)


def oracle_scale(values, floor, power_of_two):
    scale = np.maximum(np.abs(values).max(), F32(floor)) / F32(448)
    if power_of_two:
        mantissa, exponent = np.frexp(scale)  # scale = mantissa * 2**exponent, mantissa in [0.5, 1)
        scale = np.ldexp(F32(1), int(exponent) - (mantissa == 0.5))
    return F32(scale)


def oracle_rowwise(x, floor, power_of_two, divide):
    """q `[M, K]` and scales `[M, G]`, a group at a time."""
    rows, k = x.shape
    q, scales = np.zeros(x.shape, E4M3), np.zeros((rows, k // 128), F32)
    for r in range(rows):
        for g in range(k // 128):
            values = x[r, 128 * g : 128 * g + 128].astype(F32)
            scales[r, g] = oracle_scale(values, floor, power_of_two)
            q[r, 128 * g : 128 * g + 128] = oracle_codes(values, scales[r, g], divide)
    return q, scales


def oracle_blockwise(w, floor, power_of_two, divide):
    """q `[N, K]` and scales `[ceil(N / 128), ceil(K / 128)]`, a block at a time."""
    n, k = w.shape
    q, scales = np.zeros(w.shape, E4M3), np.zeros((-(-n // 128), -(-k // 128)), F32)
    for i, j in np.ndindex(*scales.shape):
        where = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
        values = w[where].astype(F32)
        scales[i, j] = oracle_scale(values, floor, power_of_two)
        q[where] = oracle_codes(values, scales[i, j], divide)
    return q, scales


def rows(dtype, count=40, k=512, seed=0):
    """Rows of every size that the dtype has, and rows whose scaled values lie halfway between two codes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, k), F32) * (2.0 ** rng.integers(-30, 9, (count, 1))).astype(F32)
    codes = np.arange(1, 0x7E, dtype=np.uint8).view(E4M3).astype(F32)
    halves = (codes[1:] + codes[:-1]) / 2
    x[0, :128] = np.concatenate([[448], halves, [0, -448, 1]])[:128]
    x[1, :128] = x[0, :128] * F32(1 + 2**-20)
    x[2, :128] = x[0, :128] * F32(1 - 2**-20)
    x[3] = 0
    x[4, 0] = -0.0
    x[5] = 1e-7
    x[6, :] = np.where(np.arange(k) % 128 == 5, 3e4, 1e-3)
    return x.astype(dtype)


def bytes_of(q):
    return np.asarray(q).view(np.uint8)


DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32)
CASTS = {  # DeepGEMM's, SGLang's, and both with powers of two
    "DeepGEMM": {},
    "SGLang": {"amax_floor": 1e-10, "divide": True},
    "DeepGEMM, ue8m0": {"scale_format": "ue8m0"},
    "SGLang, ue8m0": {"amax_floor": 1e-10, "divide": True, "scale_format": "ue8m0"},
}


def named(options):
    power_of_two = options.get("scale_format") == "ue8m0"
    return options.get("amax_floor", 1e-4), power_of_two, options.get("divide", False)


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [*((cast, DTYPES[0]) for cast in CASTS), ("DeepGEMM", DTYPES[1]), ("SGLang", DTYPES[2])],
    ids=lambda v: v if isinstance(v, str) else np.dtype(v).name,
)
def test_rows_and_blocks_are_numpys_to_the_bit(cast, dtype):
    x = rows(dtype)
    q, scales = maj.quantize_rowwise(x, **CASTS[cast])
    want_q, want_scales = oracle_rowwise(x, *named(CASTS[cast]))
    np.testing.assert_array_equal(np.asarray(scales), want_scales)
    np.testing.assert_array_equal(bytes_of(q), bytes_of(want_q))
    w = rows(dtype, count=150, k=200, seed=1)  # no multiples of 128
    q, scales = maj.quantize_blockwise(w, **CASTS[cast])
    want_q, want_scales = oracle_blockwise(w, *named(CASTS[cast]))
    assert want_scales.shape == (2, 2)
    np.testing.assert_array_equal(np.asarray(scales), want_scales)
    np.testing.assert_array_equal(bytes_of(q), bytes_of(want_q))


def test_scales_in_each_layout_and_format():
    x = np.stack([rows(np.float32, 7, 640, seed) for seed in (1, 2)])  # 5 groups
    both = [oracle_rowwise(each, 1e-4, False, False) for each in x]
    want = np.stack([scales for _, scales in both])
    for options in ({"scale_layout": "row_major"}, {"scale_layout": "column_major"}):
        q, scales = maj.quantize_rowwise(x, **options)
        np.testing.assert_array_equal(bytes_of(q), bytes_of(np.stack([q for q, _ in both])))
        if options["scale_layout"] == "row_major":
            np.testing.assert_array_equal(scales, want)
        else:
            assert scales.shape == (2, 5, 8)
            np.testing.assert_array_equal(scales[..., :7].swapaxes(1, 2), want)
    powers = np.stack([oracle_rowwise(each, 1e-4, True, False)[1] for each in x])
    exponents = (powers.view(np.int32) >> 23).astype(np.uint8)
    packed = np.zeros((2, 7, 8), np.uint8)
    packed[..., :5] = exponents
    want = packed.view(np.int32)  # little endian: the first group in the lowest byte
    _, words = maj.quantize_rowwise(x, scale_format="ue8m0_packed")
    assert words.dtype == jnp.int32 and words.shape == (2, 2, 7)
    np.testing.assert_array_equal(np.asarray(words).swapaxes(1, 2), want)
    _, words = maj.quantize_rowwise(x, scale_format="ue8m0_packed", scale_layout="row_major")
    np.testing.assert_array_equal(words, want)


@pytest.mark.parametrize("scale_layout", ["row_major", "column_major"])
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0", "ue8m0_packed"])
def test_export_for_any_number_of_rows(scale_format, scale_layout):
    """Exponents were packed by a bitcast, whose symbolic sizes XLA could not refine."""
    options = {"scale_format": scale_format, "scale_layout": scale_layout}
    x = jnp.asarray(rows(np.float32, 7, 640))
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("m, 640"), x.dtype)
    exported = jax.export.export(jax.jit(lambda x: maj.quantize_rowwise(x, **options)))(shape)
    want_q, want = oracle_rowwise(np.asarray(x), 1e-4, scale_format != "float32", False)
    q, scales = exported.call(x)
    np.testing.assert_array_equal(bytes_of(q), bytes_of(want_q))
    if scale_format == "ue8m0_packed":
        packed = np.zeros((7, 8), np.uint8)
        packed[:, :5] = want.view(np.int32) >> 23
        want = packed.view(np.int32)
    scales = np.asarray(scales)
    np.testing.assert_array_equal(scales.T[:7] if scale_layout == "column_major" else scales, want)


def test_a_cast_of_dispatch_is_within_a_step():
    """DeepEP multiplies by 448 / amax: the same scales to the last place, codes a step off at the most."""
    from moe_align_jax._expert_parallel import message
    from tests.layout.masked_quant_oracle import steps

    x = jnp.asarray(rows(ml_dtypes.bfloat16))
    q, scales = maj.quantize_rowwise(x)
    other, other_scales = message.quantize(x)
    np.testing.assert_allclose(scales, other_scales, rtol=2**-23)
    off = np.abs(steps(q) - steps(other))
    assert off.max() <= 1 and off.mean() < 0.005


# Tiles of groups of a row, the last of which overlaps another, and of rows of a group.
KERNELS = {
    "groups": (7, 1152, 3, {}),
    "groups, packed": (
        7,
        1024,
        5,
        {"scale_format": "ue8m0_packed", "scale_layout": "column_major"},
    ),
    "rows": (9, 256, 4, {"scale_layout": "column_major"}),
    "rows, divided": (8, 128, 3, {"divide": True}),
    "rows, powers of two": (20, 128, 2, {"scale_format": "ue8m0"}),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_gives_the_same_bits(name):
    """Of so many rows in use, by a grid of so many CTAs."""
    count, k, num_ctas, options = KERNELS[name]
    x = jnp.asarray(rows(ml_dtypes.bfloat16, count, max(k, 512), seed=4)[:, :k])
    layout = options.get("scale_layout", "row_major")
    how = {"scale_format": options.get("scale_format", "float32"), "scale_layout": layout}
    divide = options.get("divide", False)
    problem = casts._of_kernel(x, how["scale_format"], layout, 1e-4, divide)
    config = config_for(problem)._replace(num_ctas=num_ctas)
    assert config.down == name.startswith("rows")
    used, run = count - 2, functools.partial(launch.run, problem, interpret=True, config=config)
    q, scales = jax.jit(run)(x[None], jnp.full(1, used, jnp.int32))
    how |= {"floor": 1e-4, "divide": divide}
    want, want_scales = casts.rowwise(x, implementation="xla", **how)
    np.testing.assert_array_equal(bytes_of(q[0, :used]), bytes_of(want[:used]))
    here = (slice(used),) if layout == "row_major" else (slice(None), slice(used))
    np.testing.assert_array_equal(scales[0][here], want_scales[here])


def test_a_reciprocal_is_the_nearest():
    rng = np.random.default_rng(0)
    x = np.exp2(rng.uniform(-100, 100, 20_000)).astype(F32)
    x[:200] = np.exp2(np.arange(-100, 100)).astype(F32)
    x[200:400], x[400:600] = np.nextafter(x[:200], F32(0)), np.nextafter(x[:200], F32(np.inf))
    want = F32(1) / x
    for off in (-2, -1, 0, 1, 2):
        near = (want.view(np.int32) + off).view(F32)
        found = nearest_reciprocal(jnp.asarray(x.view(np.int32)), jnp.asarray(near))
        np.testing.assert_array_equal(found, want)


@pytest.mark.gpu
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("shape", [(40, 512), (1, 7168), (333, 256), (2, 3, 2048)], ids=str)
def test_rows_on_a_gpu_are_numpys_to_the_bit(shape, cast):
    *_, count, k = shape
    x = np.stack([rows(ml_dtypes.bfloat16, 40, 7168, seed) for seed in range(9)])
    x = x.reshape(-1)[: math.prod(shape)].reshape(shape)
    q, want = oracle_rowwise(x.reshape(-1, k), *named(CASTS[cast]))
    for layout in ("row_major", "column_major"):
        found, scales = maj.quantize_rowwise(x, scale_layout=layout, **CASTS[cast])
        np.testing.assert_array_equal(bytes_of(found), bytes_of(q.reshape(shape)))
        if layout == "column_major":
            scales = scales[..., :count].swapaxes(-1, -2)
        np.testing.assert_array_equal(scales, want.reshape(*shape[:-1], -1))
    if named(CASTS[cast])[1]:
        packed = CASTS[cast] | {"scale_format": "ue8m0_packed"}
        found, words = maj.quantize_rowwise(x, **packed)
        np.testing.assert_array_equal(bytes_of(found), bytes_of(q.reshape(shape)))
        exponents = np.asarray(words).swapaxes(-1, -2).copy().view(np.uint8)[..., : k // 128]
        np.testing.assert_array_equal(
            exponents, (want.view(np.int32) >> 23).reshape(exponents.shape)
        )


def test_transformations():
    x = jnp.asarray(rows(np.float32))
    q, scales = maj.quantize_rowwise(x)
    vq, vscales = jax.jit(jax.vmap(maj.quantize_rowwise))(jnp.stack([x, 2 * x]))
    np.testing.assert_array_equal(bytes_of(vq[0]), bytes_of(q))
    np.testing.assert_array_equal(vscales[0], scales)

    def loss(x):
        q, scales = maj.quantize_rowwise(x)
        return jnp.sum(jnp.repeat(scales, 128, axis=-1) * q.astype(jnp.float32)) + jnp.sum(x)

    np.testing.assert_array_equal(jax.grad(loss)(x), np.ones(x.shape))
    for function in (maj.quantize_rowwise, maj.quantize_blockwise):
        empty, none = function(np.zeros((0, 256), np.float32))
        assert empty.shape == (0, 256) and none.shape == (0, 2)


BAD = [
    (TypeError, "x must be an array", [[1.0] * 128], {}),
    (TypeError, "x must be one of bfloat16, float16, float32", np.zeros((2, 128), np.int8), {}),
    (ValueError, r"x must have shape \[..., M, K\]", np.zeros(128, np.float32), {}),
    (ValueError, "x must have a last dimension that is a multiple of 128", (2, 192), {}),
    (ValueError, "scale_format must be one of 'float32'", (2, 128), {"scale_format": "fp32"}),
    (ValueError, "scale_layout must be one of", (2, 128), {"scale_layout": None.__class__}),
    (ValueError, "amax_floor must be at least 1e-30", (2, 128), {"amax_floor": 0.0}),
    (ValueError, "amax_floor must be at least 1e-30", (2, 128), {"amax_floor": float("nan")}),
    (TypeError, "amax_floor must be a static number", (2, 128), {"amax_floor": "1e-4"}),
    (TypeError, "divide must be a Python bool", (2, 128), {"divide": 1}),
]


@pytest.mark.parametrize(("kind", "text", "x", "options"), BAD, ids=[b[1] for b in BAD])
def test_errors(kind, text, x, options):
    x = np.zeros(x, np.float32) if isinstance(x, tuple) else x
    with pytest.raises(kind, match=f"^quantize_rowwise: {text}.*; got .*\\. "):
        maj.quantize_rowwise(x, **options)


def test_errors_of_blocks():
    with pytest.raises(ValueError, match="^quantize_blockwise: scale_format must be one of"):
        maj.quantize_blockwise(np.zeros((128, 128), np.float32), scale_format="ue8m0_packed")
    with pytest.raises(ValueError, match=r"^quantize_blockwise: w must have shape \[..., N, K\]"):
        maj.quantize_blockwise(np.zeros(128, np.float32))


def split_explicitly(array, *spec):
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,))
    return jax.device_put(array, jax.NamedSharding(mesh, jax.P(*spec)))


def same(got, want):
    return all(
        (np.asarray(a, np.float32) == np.asarray(b, np.float32)).all()
        for a, b in zip(got, want, strict=True)
    )


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((4, 130, 140), ("a",)),  # experts
        ((512, 256), ("a",)),
        ((200, 512), (None, "a")),
        ((3, 512, 130), (None, "a")),
    ],
)
def test_blocks_of_weights_split_over_explicit_axes(shape, spec):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    got = maj.quantize_blockwise(split_explicitly(w, *spec))
    assert same(got, maj.quantize_blockwise(w))


def test_scales_that_explicit_axes_would_divide_are_refused():
    words = (
        "must have a multiple of {} in dimension {} on each device of Explicit mesh axes; got {}"
    )
    x = np.ones((8, 1024), np.float32)
    assert same(maj.quantize_rowwise(split_explicitly(x, None, "a")), maj.quantize_rowwise(x))
    with pytest.raises(ValueError, match=words.format(512, -1, "1024 over 4 devices")):
        maj.quantize_rowwise(split_explicitly(x, None, "a"), scale_format="ue8m0_packed")
    with pytest.raises(ValueError, match=words.format(128, -1, "256 over 4 devices")):
        maj.quantize_rowwise(split_explicitly(x[:, :256], None, "a"))
    with pytest.raises(ValueError, match=words.format(128, -2, "8 over 4 devices")):
        maj.quantize_blockwise(split_explicitly(x, "a"))
