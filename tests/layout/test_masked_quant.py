"""silu_and_mul_masked_quant: every implementation against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

import moe_align_jax as maj
from moe_align_jax import masked_quant
from moe_align_jax._masked_quant import launch as kernels
from moe_align_jax._masked_quant import selftest
from moe_align_jax._masked_quant.config import Config
from moe_align_jax._masked_quant.share import Share, Work
from moe_align_jax._simt import emulator
from moe_align_jax._simt.language import Program
from tests.layout import masked_quant_oracle as oracle

quant = maj.silu_and_mul_masked_quant
gpu = pytest.param("mosaic_gpu", marks=pytest.mark.gpu)


def inputs(experts, rows, width, *, dtype="bfloat16", seed=0, powers=0):
    """x whose rows are scaled by 2**1 .. 2**powers as the authors' tests do, and counts."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((experts, rows, 2 * width), np.float32)
    if powers:
        x *= 2.0 ** rng.integers(1, powers + 1, (experts, rows, 1))
    masked_m = rng.integers(0, rows + 1, experts).astype(np.int32)
    return x.astype(jnp.dtype(dtype)), masked_m


def row_major(scales, rows, scale_format="float32", scale_layout=None):
    """float32 `[e, M, G]` of whatever was returned."""
    scales = np.asarray(scales)
    if scale_format == "ue8m0_packed":
        return oracle.unpack(scales)
    return scales.transpose(0, 2, 1)[:, :rows] if scale_layout == "column_major" else scales


def check(x, masked_m, *, implementation=None, scale_layout=None, **options):
    q, scales = quant(
        x, masked_m, implementation=implementation, scale_layout=scale_layout, **options
    )
    assert q.dtype == jnp.float8_e4m3fn and q.shape == (*x.shape[:2], x.shape[2] // 2)
    found = row_major(scales, x.shape[1], options.get("scale_format", "float32"), scale_layout)
    want_q, want_scales = oracle.expected(x, masked_m, **options)
    oracle.assert_close(q, found, want_q, want_scales, masked_m)
    return q, scales, found


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0", "ue8m0_packed"])
@pytest.mark.parametrize("shape", [(3, 0, 1024), (0, 4, 1024)])
def test_boxes_without_rows_have_scales_without_rows(shape, scale_format):
    x, masked_m = np.zeros(shape, jnp.bfloat16), np.zeros(shape[0], np.int32)
    q, scales = quant(x, masked_m, scale_format=scale_format, implementation="xla")
    assert q.shape == (*shape[:2], 512) and scales.size == 0 and scales.shape[0] == shape[0]


# -- values ----------------------------------------------------------------------------------------

# The authors' sizes (E, T, H), from the least to those of a model, with fewer rows where NumPy would be slow.
AUTHORS = [(1, 1, 128), (17, 31, 768), (8, 12, 128 * 33), (8, 3, 7168), (256, 3, 512)]


@pytest.mark.parametrize("size", AUTHORS)
@pytest.mark.parametrize("implementation", ["xla", gpu])
def test_authors_cases(size, implementation):
    x, masked_m = inputs(*size, powers=19)
    check(x, masked_m, implementation=implementation)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "size", [(8, 128, 128 * 33), (8, 64, 7168), (32, 65, 2048), (256, 8, 3072)]
)
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_authors_cases_on_a_gpu(size, scale_format):
    x, masked_m = inputs(*size, powers=19)
    check(x, masked_m, implementation="mosaic_gpu", scale_format=scale_format)


# SGLang's sizes: 288 experts over so many ranks, each with room for 768 rows of every rank, N = 2048.
RANKS = (8, 16, 32, 48)
MASKS = {
    "balanced": lambda rng, e, total: np.full(e, total // e),
    "imbalanced": lambda rng, e, total: total * (share := rng.random(e) ** 3) / share.sum(),
    "extreme": lambda rng, e, total: np.where(np.arange(e) == 0, total, 0),
}


def masked_rows(mask, ranks, tokens):
    """int32 `[e]`: rows of each expert of one rank, to which 8 pairs of each of `tokens` tokens go."""
    experts, room = 288 // ranks, 768 * ranks
    rows = MASKS[mask](np.random.default_rng(tokens), experts, 8 * tokens)
    return np.minimum(np.rint(rows), room).astype(np.int32)


def sampled_check(x, masked_m, *, implementation="mosaic_gpu", **options):
    """As `check`, of the first, the last and other valid rows of each expert."""
    q, scales = quant(x, masked_m, implementation=implementation, **options)
    rng = np.random.default_rng(0)
    count, last = 256 // len(masked_m) + 2, np.maximum(masked_m, 1) - 1
    rows = rng.integers(0, last[:, None] + 1, (len(masked_m), count))
    rows[:, 0], rows[:, 1] = 0, last
    at = (np.arange(len(masked_m))[:, None], rows)
    valid = np.where(masked_m > 0, count, 0)
    want = oracle.expected(np.asarray(x[at]), valid, **options)
    oracle.assert_close(np.asarray(q[at]), np.asarray(scales[at]), *want, valid)


def test_masks_follow_their_names():
    assert masked_rows("balanced", 8, 6144).tolist() == [1365] * 36
    imbalanced = masked_rows("imbalanced", 16, 6144)
    assert imbalanced.max() > 2 * imbalanced.mean() > 4 * imbalanced.min()
    assert masked_rows("extreme", 48, 6144).tolist() == [36864, 0, 0, 0, 0, 0]
    assert masked_rows("imbalanced", 48, 1).sum() <= 11


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", RANKS)
def test_sglangs_cases_on_a_gpu(ranks):
    """1.8 GB of x, whose rows past `masked_m` are NaN; every mask and number of tokens."""
    shape = (288 // ranks, 768 * ranks, 4096)
    for mask in MASKS:
        for tokens in (1, 4, 16, 64, 256, 1024, 4096, 6144):
            masked_m = masked_rows(mask, ranks, tokens)
            sampled_check(gpu_input(shape, masked_m), masked_m)


@functools.partial(jax.jit, static_argnums=0)
def gpu_input(shape, masked_m):
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    past = jnp.arange(shape[1], dtype=jnp.int32)[None] >= masked_m[:, None]
    return jnp.where(past[..., None], jnp.bfloat16(jnp.nan), x)


# vLLM's greatest, with every row scaled by 2**1 .. 2**19.
@pytest.mark.gpu
@pytest.mark.parametrize("size", [(8, 1024, 7168), (256, 64, 7168), (8, 128, 128 * 33)], ids=str)
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_vllms_largest_cases_on_a_gpu(size, scale_format):
    x, masked_m = inputs(*size, powers=19)
    sampled_check(jnp.asarray(x), masked_m, scale_format=scale_format)


@pytest.mark.parametrize(
    ("width", "implementation"),
    [
        *((width, "emulator") for width in (384, 1152)),
        *(pytest.param(w, "mosaic_gpu", marks=pytest.mark.gpu) for w in range(128, 1281, 128)),
    ],
)
def test_every_tile_width(width, implementation):
    x, masked_m = inputs(3, 5, width, powers=4)
    with jax.default_device(jax.devices("cpu")[0] if implementation == "emulator" else None):
        check(x, masked_m, implementation=implementation)


OPTIONS = [
    {"scale_format": "ue8m0"},
    {"scale_format": "ue8m0_packed"},
    {"scale_layout": "column_major"},
    {"scale_format": "ue8m0", "scale_layout": "column_major"},
    {"swiglu_limit": 0.7},
    {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    {"swiglu_alpha": 1.0},
    {"amax_floor": 1e-4, "divide": True},
    {"dtype": "float16", "swiglu_limit": 1.3},
]


@pytest.mark.parametrize(
    ("options", "implementation"),
    [
        *((options, "xla") for options in OPTIONS),
        *((options, "emulator") for options in [OPTIONS[k] for k in (1, 3, 5, 8)]),
        *(pytest.param(o, "mosaic_gpu", marks=pytest.mark.gpu) for o in OPTIONS),
    ],
    ids=str,
)
def test_options(options, implementation):
    options = dict(options)
    x, masked_m = inputs(3, 5, 512, dtype=options.pop("dtype", "bfloat16"), seed=1)
    masked_m[0] = 5
    with jax.default_device(jax.devices("cpu")[0] if implementation == "emulator" else None):
        q, _, _ = check(x, masked_m, implementation=implementation, **options)
        if "swiglu_limit" in options or "swiglu_alpha" in options:
            plain = quant(x, masked_m, implementation=implementation)
            assert (oracle.steps(plain[0]) != oracle.steps(q)).any(), "the option does nothing"


@pytest.mark.parametrize("group_size", [32, 64, 256])
def test_other_group_sizes_by_xla(group_size):
    x, masked_m = inputs(2, 4, 512)
    check(x, masked_m, implementation="xla", group_size=group_size)


@pytest.mark.parametrize("masked_m", [[0, 0, 0], [7, 7, 7], [0, 7, 0], [-3, 99, 1]], ids=str)
@pytest.mark.parametrize("implementation", ["xla", "emulator", gpu])
def test_counts_at_their_ends_and_beyond(masked_m, implementation):
    x, _ = inputs(3, 7, 1024)
    masked_m = np.array(masked_m, np.int32)
    with jax.default_device(jax.devices("cpu")[0] if implementation == "emulator" else None):
        q, scales, _ = check(x, masked_m, implementation=implementation)
    if implementation == "xla":
        past = np.arange(7) >= np.clip(masked_m, 0, 7)[:, None]
        assert not np.asarray(q).view(np.uint8)[past].any() and not np.asarray(scales)[past].any()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint32", "uint64"])
def test_counts_of_any_integer_dtype(dtype):
    x, _ = inputs(3, 200, 128)
    masked_m = np.array([0, 3, np.iinfo(dtype).max], dtype)
    want = oracle.expected(x, np.array([0, 3, min(200, np.iinfo(dtype).max)]))
    got = quant(x, masked_m)
    oracle.assert_close(*got, *want, masked_m=np.array([0, 3, min(200, np.iinfo(dtype).max)]))
    if np.dtype(dtype).itemsize < 8:
        again = quant(jnp.asarray(x), jnp.asarray(masked_m))
        np.testing.assert_array_equal(np.asarray(again[1]), np.asarray(got[1]))


def all_bfloat16():
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(jnp.bfloat16)
    return values[np.isfinite(values.astype(np.float32))]


def test_bfloat16_gates_of_every_size():
    """Up is 1, and each gate the value of a group of its own."""
    gates = all_bfloat16()
    # Beyond, the reciprocal of the scale is subnormal. Every fifth: each exponent with other mantissas.
    gates = gates[np.abs(gates.astype(np.float32)) < 3e36][::5]
    x = np.ones((1, gates.size, 256), jnp.bfloat16)
    x[0, :, :128] = 0
    x[0, :, 5] = gates
    check(x, np.array([gates.size]), implementation="xla")


# -- golden values -----------------------------------------------------------------------------------


def golden_row(*amax):
    """A row whose groups have these maxima: silu(40) is 40, and up brings it to the value."""
    x = np.zeros((1, 1, 2 * 128 * len(amax)), jnp.bfloat16)
    for g, value in enumerate(amax):
        x[0, 0, g * 128 + 3] = 64.0
        x[0, 0, (len(amax) + g) * 128 + 3] = value / 64.0
    return x


@pytest.mark.parametrize("implementation", ["xla", "emulator", gpu])
def test_scales_by_hand(implementation):
    x = golden_row(448.0, 450.0, 1.75, 0.0)
    run = functools.partial(quant, x, np.array([1]), implementation=implementation)
    with jax.default_device(jax.devices("cpu")[0] if implementation == "emulator" else None):
        q, scales = run()
        np.testing.assert_allclose(scales[0, 0], [1.0, 450 / 448, 2.0**-8, 1e-10 / 448], rtol=1e-6)
        assert np.asarray(q, np.float32)[0, 0, 3::128].tolist() == [448, 448, 448, 0]
        # Exponents 127, 128, 119, 85 from the lowest byte on.
        _, words = run(scale_format="ue8m0_packed")
        assert words.shape == (1, 1, 1) and words.dtype == jnp.int32
        assert int(words[0, 0, 0]) == 127 + (128 << 8) + (119 << 16) + (85 << 24)
        if implementation == "emulator":
            return
        _, scales = run(scale_format="ue8m0")
        assert scales[0, 0].tolist() == [1.0, 2.0, 2.0**-8, 2.0**-42]
        _, scales = run(amax_floor=1e-4, scale_format="ue8m0")
        assert float(scales[0, 0, 3]) == 2.0**-22


def test_column_major_scales_lie_as_tma_reads_them():
    x, _ = inputs(2, 5, 384)
    _, scales = quant(x, np.array([5, 5]), scale_layout="column_major", implementation="xla")
    plain = quant(x, np.array([5, 5]), implementation="xla")[1]
    assert scales.shape == (2, 3, 8)  # M = 5 in steps of 16 bytes
    np.testing.assert_array_equal(scales[:, :, :5], plain.transpose(0, 2, 1))


def test_rounding_of_float16_products():
    """Subnormal float16 values, which XLA's reduce_precision would flush."""
    x = np.zeros((1, 1, 256), np.float16)
    x[0, 0, :128] = np.linspace(-18, -8, 128)
    x[0, 0, 128:] = np.linspace(0.5, 2.0, 128)
    assert (np.abs(oracle.row_values(x[0, 0, :128], x[0, 0, 128:], np.float16)) < 2**-14).any()
    check(x, np.array([1]), implementation="xla")


# -- transforms --------------------------------------------------------------------------------------


def test_under_jit_and_vmap_it_is_the_same():
    batches = [inputs(3, 5, 256, seed=seed) for seed in range(2)]
    x, masked_m = (jnp.stack([jnp.asarray(b[k]) for b in batches]) for k in range(2))
    run = functools.partial(quant, scale_layout="column_major")
    alone = [run(a, b) for a, b in zip(x, masked_m, strict=True)]
    got = jax.jit(jax.vmap(run))(x, masked_m)
    for k in range(2):
        want = np.stack([np.asarray(a[k]) for a in alone])
        assert np.asarray(got[k]).tobytes() == want.tobytes()
    deep = jax.vmap(jax.vmap(run))(x.reshape(1, 2, 3, 5, 512), masked_m.reshape(1, 2, 3))
    assert np.asarray(deep[0]).tobytes() == np.stack([np.asarray(a[0]) for a in alone]).tobytes()
    one_x = jax.vmap(run, in_axes=(None, 0))(x[0], masked_m)
    np.testing.assert_array_equal(one_x[1][0], alone[0][1])
    behind = jax.vmap(run, in_axes=(2, 1))(jnp.moveaxis(x, 0, 2), jnp.moveaxis(masked_m, 0, 1))
    np.testing.assert_array_equal(behind[1][1], alone[1][1])


def test_experts_over_devices():
    mesh = jax.make_mesh((4,), ("ep",), axis_types=(AxisType.Auto,))
    x, masked_m = inputs(8, 5, 256)
    sharded = jax.shard_map(
        quant, mesh=mesh, in_specs=(Spec("ep"), Spec("ep")), out_specs=Spec("ep")
    )
    want = quant(x, masked_m)
    got = jax.jit(sharded)(x, masked_m)
    for a, b in zip(got, want, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_explicit_sharding_is_refused_with_the_way_out():
    mesh = jax.make_mesh((4,), ("ep",), axis_types=(AxisType.Explicit,))
    x, masked_m = inputs(8, 5, 256)
    x = jax.device_put(x, NamedSharding(mesh, Spec("ep")))
    with pytest.raises(ValueError, match=r"x must not be sharded .* Call it inside jax.shard_map"):
        quant(x, masked_m)


def test_no_rows_and_no_experts():
    for shape in ((0, 4, 512), (3, 0, 512)):
        q, scales = quant(np.zeros(shape, jnp.bfloat16), np.zeros(shape[0], np.int32))
        assert q.shape == (*shape[:2], 256) and scales.shape == (*shape[:2], 2)


# -- shares ------------------------------------------------------------------------------------------


def plain_shares(work, masked_m):
    """Every CTA's tiles as (expert, tile), by loops."""
    valid = np.clip(masked_m, 0, work.rows) * work.tiles_per_row
    tiles = [(i, k) for i, n in enumerate(valid) for k in range(n)]
    cuts = [
        len(tiles) // work.num_ctas + (c < len(tiles) % work.num_ctas) for c in range(work.num_ctas)
    ]
    ends = np.cumsum(cuts)
    return [tiles[end - cut : end] for cut, end in zip(cuts, ends, strict=True)]


@pytest.mark.parametrize(
    "work",
    [
        Work(1, 5, 1, 3),
        Work(5, 9, 2, 7),
        Work(32, 6, 2, 12),
        Work(33, 6, 1, 40),
        Work(64, 5, 3, 5),
        Work(256, 4, 1, 9),
        Work(1000, 3, 1, 6),
    ],
    ids=str,
)
def test_shares_in_the_emulator(work):
    """What a warp finds by shuffles, where every tile is in one CTA's share, in order."""
    shape = {"out": (work.num_ctas, 32, 4)}

    def body(t, r):
        share = work.find(t, r)
        lane = t.thread_id() & 31
        with t.if_(t.thread_id() < 32):
            for k, value in enumerate(share):
                t.store(r.out, (t.cta_id(), lane, k), value)

    kernel = work.kernel("shares", body, shape)
    program = Program(inputs=kernel.inputs, kernels=(kernel,), results=("out",))
    rng = np.random.default_rng(work.experts)
    full, none = np.full(work.experts, work.rows), np.zeros(work.experts, int)
    one = none.copy()
    one[work.experts // 2] = 99
    sparse = rng.integers(-1, work.rows + 2, work.experts) * (rng.random(work.experts) < 0.3)
    for masked_m in (full, none, one, sparse):
        [out] = emulator.run(program, [masked_m.astype(np.int32)])
        assert (out == out[:, :1]).all(), "lanes differ"
        for (expert, at, count, end), want in zip(
            out[:, 0], plain_shares(work, masked_m), strict=True
        ):
            assert count == len(want)
            if want:
                assert (expert, at) == want[0]
                assert end == min(max(masked_m[expert], 0), work.rows) * work.tiles_per_row


@pytest.mark.parametrize(("tile", "num_ctas", "prefetch"), [(16, 3, False), (4, 40, True)])
def test_any_config_gives_the_same(tile, num_ctas, prefetch):
    x, _ = inputs(4, 3, 2048 if tile == 16 else 1152)
    masked_m = jnp.array([2, 0, 3, 1], "int32")
    problem = masked_quant.make_problem(
        "test", x.shape, "bfloat16", group_size=128, scale_format="float32", scale_layout=None
    )
    config = Config(tile, num_ctas, prefetch)
    run = functools.partial(kernels.run, problem, interpret=True, config=config)
    q, scales = jax.jit(run)(jnp.asarray(x), masked_m)
    want_q, want_scales = oracle.expected(x, np.asarray(masked_m))
    oracle.assert_close(q, scales, want_q, want_scales, np.asarray(masked_m))


# -- dispatch ----------------------------------------------------------------------------------------


def lowered_for_cuda(shape, **options):
    x = jax.ShapeDtypeStruct(shape, options.pop("dtype", jnp.bfloat16))
    masked_m = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    run = jax.jit(functools.partial(quant, **options))
    return run.trace(x, masked_m).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((32, 1024, 4096), {}),
        ((6, 4096, 6144), {"scale_layout": "column_major"}),
        ((256, 33, 2048), {"scale_format": "ue8m0_packed"}),
        ((1, 1, 256), {"dtype": jnp.float16, "swiglu_limit": 7.0}),
    ],
)
def test_lowers_for_cuda_to_one_kernel(shape, options):
    text = lowered_for_cuda(shape, **options)
    assert text.count("mosaic_gpu") >= 1 and text.count("stablehlo.custom_call") == 1
    assert "stablehlo.exponential" not in text


@pytest.mark.parametrize("dtype", ["int32", "int8", "uint32"])
def test_export_for_any_number_of_rows(dtype):
    x, _ = inputs(4, 3, 256)
    masked_m = np.array([2, 0, 3, 1], dtype)
    shapes = jax.export.symbolic_shape("4, m, 512"), (4,)
    structs = map(jax.ShapeDtypeStruct, shapes, (x.dtype, masked_m.dtype))
    exported = jax.export.export(jax.jit(quant))(*structs)
    q, scales = exported.call(jnp.asarray(x), jnp.asarray(masked_m))
    want_q, want_scales = oracle.expected(x, masked_m)
    oracle.assert_close(q, scales, want_q, want_scales, masked_m)


def test_what_the_kernel_cannot_take_goes_to_xla():
    text = lowered_for_cuda((4, 16, 1024), group_size=64)
    assert "mosaic_gpu" not in text and "stablehlo.exponential" in text
    chosen = masked_quant.select_quant_implementation((4, 16, 1024), platform="cuda", group_size=64)
    assert chosen.implementation == "xla" and "groups of 128" in chosen.reasons["mosaic_gpu"]
    many = masked_quant.select_quant_implementation((1025, 4, 256), platform="cuda")
    assert many.implementation == "xla" and "at most 1024 experts" in many.reasons["mosaic_gpu"]
    chosen = masked_quant.select_quant_implementation((4, 16, 2048), platform="cuda")
    assert chosen[:2] == ("mosaic_gpu", "tile8")
    with pytest.raises(NotImplementedError, match="run on NVIDIA GPUs only, not on 'cpu'"):
        masked_quant.select_quant_implementation(
            (4, 16, 2048), platform="cpu", implementation="mosaic_gpu"
        )
    assert masked_quant.select_quant_implementation((4, 16, 2048), platform="cpu").form == "whole"


X, M = np.zeros((2, 4, 512), jnp.bfloat16), np.zeros(2, np.int32)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "text"),
    [
        ((X.astype(np.float32), M), {}, TypeError, "x must be bfloat16 or float16; got float32"),
        ((X, M.astype(np.float32)), {}, TypeError, "masked_m must be an integer array"),
        (([1, 2], M), {}, TypeError, "x must be an array; got list"),
        ((X[0], M), {}, ValueError, r"x must have shape \[e, M, 2 N\]"),
        ((X[..., :511], M), {}, ValueError, r"x must have shape \[e, M, 2 N\]"),
        ((X, M[:1]), {}, ValueError, r"masked_m must have shape \[2\]"),
        ((X, M), {"group_size": 96}, ValueError, "N a positive multiple of 96"),
        ((X, M), {"group_size": 0}, ValueError, "group_size must be at least 1"),
        ((X, M), {"group_size": 1.5}, TypeError, "group_size must be a static Python int"),
        ((X, M), {"scale_format": "fp32"}, ValueError, "scale_format must be one of 'float32'"),
        ((X, M), {"scale_layout": "tma"}, ValueError, "scale_layout must be one of"),
        ((X, M), {"scale_format": "ue8m0_packed"}, ValueError, "N a multiple of 512"),
        ((X, M), {"swiglu_limit": -1}, ValueError, "swiglu_limit must be None or at least 0"),
        ((X, M), {"swiglu_limit": "7"}, TypeError, "swiglu_limit must be a static number"),
        ((X, M), {"swiglu_alpha": 0.0}, ValueError, "swiglu_alpha must be None or positive"),
        ((X, M), {"amax_floor": 0}, ValueError, "amax_floor must be at least 1e-30"),
        ((X, M), {"amax_floor": float("nan")}, ValueError, "amax_floor must be at least 1e-30"),
        ((X, M), {"divide": 1}, TypeError, "divide must be a static bool"),
        ((X, M), {"implementation": "cuda"}, ValueError, "implementation must be None or one of"),
    ],
)
def test_errors_say_what_to_do(arguments, options, kind, text):
    with pytest.raises(kind, match=f"silu_and_mul_masked_quant: .*{text}.*[.]$"):
        quant(*arguments, **options)


def test_packed_scales_have_one_layout():
    with pytest.raises(ValueError, match="scale_layout must be column_major for packed scales"):
        quant(np.zeros((1, 1, 1024), jnp.bfloat16), M[:1],
              scale_format="ue8m0_packed", scale_layout="row_major")  # fmt: skip


def test_a_named_implementation_runs_or_says_why_not():
    with pytest.raises(NotImplementedError, match="groups of 128; group_size is 64"):
        quant(X, M, group_size=64, implementation="emulator")


def test_a_derivative_is_refused():
    with pytest.raises(
        NotImplementedError, match="silu_and_mul_masked_quant: x must not be .*stop_gradient"
    ):
        jax.grad(lambda x: quant(x, M)[1].sum())(jnp.asarray(X, jnp.bfloat16))


def test_fields_of_a_share_are_those_that_are_found():
    assert Share._fields == ("expert", "at", "count", "end")


# -- the trial of a compiled kernel ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "options"), [(1, OPTIONS[1]), *((3, options) for options in OPTIONS)], ids=str
)
def test_the_trial_takes_right_results_and_no_others(experts, options):
    """What runs ahead of a kernel's first launch from PyTorch, on the reference's results."""
    options = dict(options)
    shape, dtype = (experts, 7, 1024), options.pop("dtype", "bfloat16")
    defaults = {"group_size": 128, "scale_format": "float32", "scale_layout": None}
    problem = masked_quant.make_problem("test", shape, dtype, **(defaults | options))
    given = selftest.arrays(problem)
    assert given["masked_m"].tolist() == [5, 3, 0][:experts]
    x = np.zeros((experts * 7, 1024), given["x"].dtype)
    x[: len(given["x"])] = given["x"]
    q, scales = quant(x.reshape(shape), given["masked_m"], implementation="xla", **options)
    results = {"q": np.asarray(q).view(np.uint8), "scales": np.asarray(scales)}

    def wrong(**changed):
        memory = {name: a.tobytes() for name, a in (results | changed).items()}
        for name, size in selftest.sizes(problem, given).items():
            memory[name] = memory[name][:size]

        def read(name, into):
            into[...] = np.frombuffer(memory[name], into.dtype, into.size).reshape(into.shape)
            return into

        return selftest.mismatch(problem, given, read)

    assert wrong() == ""
    q = results["q"].copy()
    q[0, 4, 300] ^= 2
    assert "a code of expert 0 is off by" in wrong(q=q)
    scales = results["scales"].copy()
    scales[0, 0, 0] += np.array(1, scales.dtype)
    assert "a scale of expert 0 is" in wrong(scales=scales)
