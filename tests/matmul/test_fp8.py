"""Products of e4m3 with scales, by "xla" and by the kernel on a GPU, against NumPy's of the same values."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec

import moe_align_jax as maj
from moe_align_jax._grouped_matmul import choose_tiles, kernel, launch, stores
from moe_align_jax._grouped_matmul import config as tiles
from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.problem import MatmulProblem, Scales, Weights
from moe_align_jax._grouped_matmul.shape import shape_of
from tests.matmul import oracle
from tests.matmul.test_matmul import columns_of, routed
from tests.matmul.test_matmul_forms import check as check_form
from tests.matmul.test_matmul_forms import made
from tests.no_gpu import matmul_cases

gpu = pytest.param("mosaic_gpu", marks=pytest.mark.gpu)
E4M3 = ml_dtypes.float8_e4m3fn
BOUND = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 2e-5}
LAYOUTS = (
    {},
    {"scale_layout": "column_major"},
    {"scale_format": "ue8m0_packed"},
    {"scale_format": "ue8m0_packed", "scale_layout": "row_major"},
    {"scale_format": "ue8m0"},
)
# Forms of the weights' scales.
BLOCKS, OF_EXPERTS, OF_ALL = "blocks", "experts", "all"


def codes(rng, shape):
    """Every finite e4m3 code, subnormals included."""
    found = rng.integers(0, 256, shape).astype(np.uint8)
    return np.where(found & 0x7F == 0x7F, np.uint8(0x08), found).view(E4M3)


def scales_of(rng, shape):
    """Of many sizes, some of them 0 or subnormal."""
    scales = np.exp2(rng.uniform(-11, -6, shape)).astype(np.float32)
    odd = rng.integers(0, 40, shape)
    return np.where(odd == 0, 0, np.where(odd == 1, np.float32(1e-40), scales)).astype(np.float32)


def rounded_up(scales):
    """To powers of two, as the exponents of packed scales can tell: 0 stays 0."""
    mantissa, exponent = np.frexp(scales)
    powers = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
    return np.where(scales < np.float32(2**-126), 0, powers).astype(np.float32)


def laid_out(scales, scale_format="float32", scale_layout=None):
    """`[..., M, G]` scales as `quantize_rowwise` lays them out, by NumPy alone."""
    packed = scale_format == "ue8m0_packed"
    layout = scale_layout or ("column_major" if packed else "row_major")
    if packed:
        exponents = (scales.view(np.int32) >> 23).astype(np.uint8)
        spare = -scales.shape[-1] % 4
        exponents = np.pad(exponents, [*[(0, 0)] * (scales.ndim - 1), (0, spare)])
        scales = np.ascontiguousarray(exponents).view(np.int32)
    if layout == "row_major":
        return scales
    spare = 0 if packed else -scales.shape[-2] % 4
    columns = np.swapaxes(scales, -1, -2)
    return np.pad(
        columns, [*[(0, 0)] * (scales.ndim - 1), (0, spare)], constant_values=np.nan if spare else 0
    )


def of_columns(values, scales):
    """float64 `[..., K]`: rows with a scale for every 128 columns."""
    each = np.repeat(scales.astype(np.float64), 128, axis=-1)[..., : values.shape[-1]]
    return values.astype(np.float64) * each


def make_w(rng, experts, n, k, kind):
    """((values, scales), float64 weights `[E, N, K]`)."""
    values = codes(rng, (experts, n, k))
    blocks = experts, -(-n // 128), -(-k // 128)
    if kind == BLOCKS:
        scales = scales_of(rng, blocks)
        each = np.repeat(np.repeat(scales, 128, 1)[:, :n], 128, 2)[..., :k]
    else:
        scales = np.exp2(rng.uniform(-9, -5, experts if kind == OF_EXPERTS else ())).astype(
            np.float32
        )
        each = np.broadcast_to(np.reshape(scales, (-1, 1, 1)), values.shape)
    return (values, scales), values.astype(np.float64) * each.astype(np.float64)


def make_x(rng, rows, k, layout, padding=None):
    """((values, scales), float64 rows); `padding`: rows that hold NaN and infinity."""
    values, layout = codes(rng, (*rows, k)), dict(layout)
    if layout.pop("single", False):
        scale = np.float32(0.031)
        return (values, np.array([scale])), values.astype(np.float64) * np.float64(scale)
    scales = scales_of(rng, (*rows, -(-k // 128)))
    if layout.get("scale_format"):
        scales = rounded_up(scales)
    wide = of_columns(values, scales)
    if padding is not None:
        values = values.copy()
        values.view(np.uint8)[padding] = 0x7F
        if not layout.get("scale_format"):
            scales[padding] = np.inf
    return (values, laid_out(scales, **layout)), wide


def make_case(
    tokens,
    top_k,
    experts,
    k,
    n,
    block,
    *,
    layout=None,
    weights=BLOCKS,
    gather=True,
    pair=False,
    routing="uniform",
    bias=False,
    row_weights=False,
    answers=True,
    seed=0,
    **options,
):
    """(Operands and options of `grouped_matmul`, float64 result of the rows in use)."""
    rng = np.random.default_rng(seed)
    aligned, real = routed(routing, tokens, top_k, experts, block, seed)
    gated, columns = columns_of(n, pair, options)
    made = [make_w(rng, experts, columns, k, weights) for _ in range(1 + pair)]
    w, wide_w = (tuple(each) if pair else each[0] for each in zip(*made, strict=True))
    rows = tokens if gather else len(real)
    x, wide_x = make_x(rng, (rows,), k, layout or {}, None if gather else ~real)
    given = dict(options, block_size=block, transpose_rhs=True)
    if gather:
        given["top_k"] = top_k
    if bias:
        given["bias"] = rng.standard_normal((experts, 2 * n if gated else n)).astype(np.float32)
    if row_weights:
        given["row_weights"] = np.where(real, rng.uniform(0.2, 1.5, len(real)), np.nan).astype(
            np.float32
        )
    if not answers:
        return (x, w, aligned), given, None
    wanted = {k: v for k, v in given.items() if k != "preferred_element_type"}
    return (x, w, aligned), given, oracle.blocks(wide_x, wide_w, aligned, **wanted)


def calc_diff(found, want):
    """DeepGEMM's measure of a difference."""
    found, want = np.asarray(found).astype(np.float64), np.asarray(want, np.float64)
    return 1 - 2 * (found * want).sum() / ((found**2).sum() + (want**2).sum())


def check(operands, options, want, implementation="xla"):
    out = maj.grouped_matmul(*operands, implementation=implementation, **options)
    dtype = options.get("preferred_element_type", "bfloat16")
    assert out.dtype == jnp.dtype(dtype)
    found = np.asarray(out)[: len(want)].astype(np.float64)
    assert calc_diff(found, want) < 1e-3
    # wgmma's sums of e4m3 keep 14 bits: 2.1e-4 was seen on an H200.
    of_wgmma = 5e-4 if implementation == "mosaic_gpu" else 0
    assert oracle.error(found, want) < max(BOUND[dtype], of_wgmma)


SIZE = 23, 2, 4, 256, 192, 16
CASES = {
    "scales by rows": {"row_weights": True, "routing": "dropped"},
    "by columns": {"gather": False, "layout": LAYOUTS[1]},
    "packed": {"layout": LAYOUTS[2], "preferred_element_type": "float32"},
    "packed, 5 groups": {"size": (9, 2, 3, 640, 64, 8), "layout": LAYOUTS[3], "gather": False},
    "a scale for each expert": {"weights": OF_EXPERTS, "layout": LAYOUTS[4]},
    "single scales, K of 72": {
        **{"layout": {"single": True}, "weights": OF_ALL, "size": (9, 2, 3, 72, 40, 8)},
    },
    "silu, one scale of x": {
        **{"activation": "silu", "bias": True, "row_weights": True, "layout": {"single": True}},
        **{"size": (9, 2, 3, 128, 128, 8)},
    },
    "silu, N of 96": {"activation": "silu", "size": (9, 2, 3, 128, 96, 8)},
    "silu, pair": {"activation": "silu", "pair": True, "gather": False},
    "silu, interleaved": {"activation": "silu", "interleaved": True, "routing": "hot"},
}


def by_the_kernel(case):
    """Whether it takes K and N of the case: multiples of 128 and of 64."""
    *_, k, n, _ = case.get("size", SIZE)
    return k % 128 == 0 and n % 64 == 0


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        *[("xla", name) for name in CASES],
        *[
            pytest.param("mosaic_gpu", name, marks=pytest.mark.gpu)
            for name, case in CASES.items()
            if by_the_kernel(case)
        ],
    ],
)
def test_blocks(implementation, name):
    case = dict(CASES[name])
    check(*make_case(*case.pop("size", SIZE), **case), implementation)


COUNTS = np.array([3, 0, 17, 20], np.int32)


def make_masked(layout, k=256, n=192, counts=COUNTS, most=20, seed=3, answers=True, **options):
    """(x, w, options, a list of float64 rows in use for each expert); NaN behind the rows in use."""
    rng = np.random.default_rng(seed)
    gated = options.get("activation") is not None
    padding = np.arange(most)[None] >= counts[:, None]
    x, wide_x = make_x(rng, (len(counts), most), k, layout, padding)
    w, wide_w = make_w(rng, len(counts), 2 * n if gated else n, k, BLOCKS)
    options["transpose_rhs"] = True
    want = oracle.masked(wide_x, wide_w, counts, **options) if answers else None
    return x, w, options, want


MASKED = [("xla", LAYOUTS[1], "silu"), ("xla", LAYOUTS[2], None)]
MASKED += [
    pytest.param("mosaic_gpu", layout, activation, marks=pytest.mark.gpu)
    for layout in LAYOUTS
    for activation in (None, "silu")
]


@pytest.mark.parametrize(("implementation", "layout", "activation"), MASKED, ids=str)
def test_masked(implementation, layout, activation):
    x, w, options, want = make_masked(layout, activation=activation)
    out = maj.masked_grouped_matmul(x, w, COUNTS, implementation=implementation, **options)
    assert out.shape == (4, 20, 192) and out.dtype == jnp.bfloat16
    for rows, count, expected in zip(np.asarray(out), COUNTS, want, strict=True):
        if count:
            assert calc_diff(rows[:count], expected) < 1e-3
            assert oracle.error(rows[:count], expected) < BOUND["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [(32, 192), (6, 1024), (32, 20), (6, 20)], ids=str)
@pytest.mark.parametrize("size", [(6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048)], ids=str)
def test_masked_cases_of_deepgemm(groups, size):
    """Its own cases, M = 4096, by its own rule, and the same bits in a second run."""
    (experts, mean), (n, k) = groups, size
    rng = np.random.default_rng(experts + n)
    counts = (mean * rng.uniform(0.7, 1.3, experts)).astype(np.int32)
    x = jax.random.normal(jax.random.key(0), (experts, 4096, k), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (experts, n, k), jnp.bfloat16)
    qx, qw = maj.quantize_rowwise(x), maj.quantize_blockwise(w)
    run = functools.partial(maj.masked_grouped_matmul, transpose_rhs=True)
    run = jax.jit(functools.partial(run, implementation="mosaic_gpu"))
    out = run(qx, qw, counts)
    assert bool((out == run(qx, qw, counts))[:, : int(counts.min())].all())
    for expert, count in enumerate(counts):
        rows = np.asarray(qx[0][expert, :count]), np.asarray(qx[1][expert, :count])
        each = np.repeat(np.repeat(np.asarray(qw[1][expert]), 128, 0), 128, 1)
        wide = np.asarray(qw[0][expert]).astype(np.float32) * each
        want = of_columns(*rows).astype(np.float32) @ wide.T
        assert calc_diff(out[expert, :count], want) < 1e-3


def test_nothing_in_use_and_no_rows():
    x, w, options, _ = make_masked({}, counts=np.zeros(4, np.int32))
    out = maj.masked_grouped_matmul(x, w, np.zeros(4, np.int32), **options)
    assert out.shape == (4, 20, 192)
    empty = (x[0][:, :0], x[1][:, :0])
    assert maj.masked_grouped_matmul(empty, w, COUNTS, **options).shape == (4, 0, 192)


def test_scales_that_fit_two_layouts_are_asked_for():
    """4 rows of 512 columns: 4 scales either way."""
    rng = np.random.default_rng(0)
    (values, scales), _ = make_x(rng, (4,), 512, {})
    w, _ = make_w(rng, 1, 8, 512, BLOCKS)
    aligned = maj.moe_align_block_size(
        np.zeros((4, 1), np.int32), block_size=4, num_experts=1, implementation="xla"
    )
    given = {"block_size": 4, "top_k": 1, "transpose_rhs": True}
    with pytest.raises(ValueError, match="^grouped_matmul: scale_layout must be given where"):
        maj.grouped_matmul((values, scales), w, aligned, **given)
    rows = maj.grouped_matmul((values, scales), w, aligned, scale_layout="row_major", **given)
    turned = np.ascontiguousarray(scales.T)
    columns = maj.grouped_matmul((values, turned), w, aligned, scale_layout="column_major", **given)
    np.testing.assert_array_equal(rows, columns)
    assert (np.asarray(rows) != 0).any()


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0_packed"])
def test_one_scale_lies_alike_in_both_layouts(scale_format):
    """One row of 128 columns, a decode step of a small model, was asked for its layout."""
    rng = np.random.default_rng(1)
    (values, scales), wide = make_x(rng, (1,), 128, {"scale_format": scale_format})
    w, wide_w = make_w(rng, 1, 8, 128, BLOCKS)
    aligned = maj.moe_align_block_size(np.zeros((1, 1), np.int32), block_size=1, num_experts=1)
    got = maj.grouped_matmul(
        *((values, scales), w, aligned), block_size=1, top_k=1, transpose_rhs=True
    )
    np.testing.assert_allclose(np.asarray(got, np.float64)[0], wide_w[0] @ wide[0], rtol=0.02)


def test_transformations():
    """jit, vmap, scan, shard_map with check_vma, and export for two platforms."""
    x, w, options, want = make_masked({"scale_layout": "column_major"}, k=128, n=8)
    run = functools.partial(maj.masked_grouped_matmul, **options)
    arrays = jax.tree.map(jnp.asarray, (x, w, COUNTS))
    out = jax.jit(run)(*arrays)
    twice = jax.tree.map(lambda a: jnp.stack([a, a]), arrays[0])
    batched = jax.jit(jax.vmap(run, (0, None, None)))(twice, *arrays[1:])
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    specs = jax.tree.map(lambda _: Spec("x"), arrays)
    split = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=Spec("x"))
    sharded = jax.jit(split)(*arrays)
    for expert, count in enumerate(COUNTS):
        assert not count or oracle.error(out[expert, :count], want[expert]) < BOUND["bfloat16"]
        for other in (batched[0], batched[1], sharded):
            np.testing.assert_array_equal(other[expert, :count], out[expert, :count])
    structs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
    exported = jax.export.export(jax.jit(run), platforms=["cpu", "cuda"])(*structs)
    np.testing.assert_array_equal(exported.call(*arrays)[0, :3], out[0, :3])


@pytest.mark.parametrize("layout", ["row_major", "column_major"])
def test_export_for_any_number_of_rows(layout):
    """The casts and the products wrote the pitch of scales in two ways, which of symbols are not equal."""
    x, w, _, want = make_masked({"scale_layout": layout}, k=128, n=8)
    wide = jnp.asarray(x[0], jnp.float32) * 3.0

    def run(wide, counts):
        rows = maj.quantize_rowwise(wide, scale_layout=layout)
        return maj.masked_grouped_matmul(rows, w, counts, transpose_rhs=True, scale_layout=layout)

    experts, _, k = wide.shape
    shape = jax.export.symbolic_shape(f"{experts},m,{k}")
    structs = jax.ShapeDtypeStruct(shape, wide.dtype), jax.ShapeDtypeStruct((experts,), jnp.int32)
    exported = jax.export.export(jax.jit(run))(*structs)
    found, same = (f(wide, jnp.asarray(COUNTS)) for f in (exported.call, run))
    for expert, count in enumerate(COUNTS):
        np.testing.assert_array_equal(found[expert, :count], same[expert, :count])


def test_there_is_no_derivative_and_the_error_says_so():
    x, w, options, _ = make_masked({})

    def loss(scales):
        return maj.masked_grouped_matmul((x[0], scales), w, COUNTS, **options).sum()

    with pytest.raises(
        NotImplementedError, match="^masked_grouped_matmul: e4m3 x must not be diff"
    ):
        jax.grad(loss)(jnp.asarray(x[1]))


def test_select_names_the_kernel_and_why_not():
    shapes = (4096, 2048), (128, 1536, 2048)
    options = {"block_size": 128, "top_k": 8, "transpose_rhs": True, "dtype": "float8_e4m3fn"}
    chosen = maj.select_matmul_implementation(*shapes, platform="cuda", **options)
    assert chosen.implementation == "mosaic_gpu" and chosen.form.startswith("128x128x128")
    odd = (4096, 2048), (128, 1500, 2048)
    other = maj.select_matmul_implementation(*odd, platform="cuda", **options)
    assert other.implementation == "xla" and "N one of 64" in other.reasons["mosaic_gpu"]
    with pytest.raises(NotImplementedError, match="N one of 64"):
        maj.select_matmul_implementation(
            *odd, platform="cuda", implementation="mosaic_gpu", **options
        )


GATED = Weights(transposed=True, activation="silu", gated=True)


TWO_SHAPES = "128x192x128s4m-g8-skips-c2w-ahead-finds-paired-experts-turned"
ONE_SHAPE = "128x192x128s4m-g0-skips-c2w-ahead-finds-paired"
OF_COLUMNS = Scales("column_major", "blocks", pitch=4096)


@pytest.mark.parametrize(
    ("rows", "changes", "form"),
    [
        ("masked", {"expected_rows": 20}, "32x128x128s6swap-g0-early-finds"),
        ("masked", {"expected_rows": 20, "num_experts": 40}, "32x128x128s6swap-g0-early"),
        (
            "masked",
            {"expected_rows": 20, "num_experts": 6},
            "32x128x128s6swap-g0-early-finds-96",  # 192 tiles
        ),
        (
            "masked",
            {"expected_rows": 20, "num_experts": 6, "n": 7168},
            "32x128x128s6swap-g0-early-finds-112",  # 336
        ),
        (
            "masked",
            {"expected_rows": 20, "num_experts": 5},  # 160: too few for every second SM
            "32x64x128s8swap-g0-w1-early-finds-264",
        ),
        (
            "masked",
            {"expected_rows": 1024, "num_experts": 6},
            "192x128x128s4m-g8-w3-skips-c2-early-finds-experts-peeled",
        ),
        (
            "masked",
            {"expected_rows": 1024, "num_experts": 33},
            "192x128x128s4m-g8-w3-skips-c2-early-peeled",
        ),
        ("masked", {"expected_rows": 22}, "32x128x128s6swap-g0-early-finds"),
        ("masked", {"expected_rows": 32}, "48x128x128s6swap-g0-early-finds-128"),
        ("masked", {"expected_rows": 60, "num_experts": 8}, "80x128x128s6swap-g0-early-finds-128"),
        (
            "masked",
            {"expected_rows": 60, "num_experts": 8, "n": 7168, "k": 2048},
            "80x128x128s6swap-g0-early-finds-112",  # 448 tiles
        ),
        ("masked", {"expected_rows": 60, "max_rows": 64}, "64x128x128s6swap-g0-early-finds-128"),
        ("masked", {"expected_rows": 60}, "80x128x128s6swap-g0-early-finds-128"),
        ("masked", {"expected_rows": 80, "num_experts": 8}, "112x128x128s6swap-g0-early-finds-128"),
        ("masked", {"expected_rows": 100, "num_experts": 6}, "128x128x128s5swap-g0-early-finds-96"),
        ("masked", {"expected_rows": 60, "num_experts": 33}, "128x192x128s4m-g8-skips-ahead-trims"),
        ("masked", {"expected_rows": 32, "k": 1920}, "64x256x128s4n-g8"),
        (
            "masked",
            {"expected_rows": 60, "out_dtype": "float32"},
            "128x192x128s4m-g8-skips-ahead-finds-trims",
        ),
        ("masked", {"expected_rows": 61}, "128x192x128s4m-g8-skips-ahead-finds-trims"),
        (
            "masked",
            {"expected_rows": 101, "num_experts": 8},
            "128x192x128s4m-g8-skips-ahead-finds-trims",
        ),
        (
            "masked",
            {"expected_rows": 128, "num_experts": 8},
            "128x192x128s4m-g8-skips-ahead-finds-trims",
        ),
        ("masked", {"expected_rows": 192}, "128x192x128s4m-g0-skips-c2w-ahead-finds-paired"),
        (
            "masked",
            {"expected_rows": 192, "num_experts": 33},
            "128x192x128s4m-g0-skips-c2w-ahead-paired",
        ),
        ("masked", {"expected_rows": 192, "k": 1024}, "128x192x128s4m-g0-skips-c2w-ahead-finds"),
        ("masked", {"expected_rows": 192, "scales": OF_COLUMNS}, TWO_SHAPES),
        ("masked", {"expected_rows": 128, "scales": OF_COLUMNS, "num_experts": 24}, TWO_SHAPES),
        ("masked", {"expected_rows": 224, "scales": OF_COLUMNS, "n": 6144}, TWO_SHAPES),
        ("masked", {"expected_rows": 225, "scales": OF_COLUMNS}, ONE_SHAPE),
        ("masked", {"expected_rows": 192, "scales": OF_COLUMNS, "num_experts": 23}, ONE_SHAPE),
        ("masked", {"expected_rows": 192, "scales": OF_COLUMNS, "n": 4224}, ONE_SHAPE),
        ("masked", {"scales": OF_COLUMNS, "max_rows": 1536}, ONE_SHAPE),  # 192 rows, not told
        (
            "masked",
            {"expected_rows": 192, "scales": OF_COLUMNS, "k": 1024},
            "128x192x128s4m-g0-skips-c2w-ahead-finds",
        ),
        (
            "masked",
            {"expected_rows": 127, "scales": OF_COLUMNS},
            "128x192x128s4m-g8-skips-ahead-finds-trims",
        ),
        (
            "blocks",
            {
                "num_rows": 8,
                "block_size": 1,
                "n": 256,
                "num_tokens": 1,
                "top_k": 8,
                "weights": GATED,
            },
            "8x256x128s5swap-g0-k4",
        ),
        ("blocks", {"num_rows": 33280}, "128x192x128s4m-g0-c2w-early-paired"),
        ("blocks", {"num_rows": 33280, "k": 2176}, "128x192x128s4m-g0-c2w-early"),
        ("blocks", {"num_rows": 33280, "k": 1024}, "128x192x128s4m-g0-c2w-early"),
        ("blocks", {"num_rows": 2048}, "128x192x128s4m-g0-skips-ahead"),
        ("blocks", {"num_rows": 2048, "n": 25152}, "128x192x128s4m-g0-skips-ahead"),
        ("blocks", {"num_rows": 2048, "n": 25153}, "128x192x128s4m-g8-skips-ahead"),
        ("blocks", {"num_rows": 2048, "whole_blocks": True}, "128x192x128s4m-g8-ahead"),
        ("blocks", {"num_rows": 33280, "k": 256}, "128x128x128s5m-g8-late"),
        ("blocks", {"num_rows": 33280, "num_tokens": 4096, "top_k": 8}, "128x128x128s5m-g8-late"),
        ("blocks", {"num_rows": 33408, "block_size": 192}, "192x128x128s4m-g8-w3"),
    ],
)
def test_tiles_follow_the_rows_of_an_expert(rows, changes, form):
    """Those that were the fastest on an H200; "c2w" where two tiles of an expert lie side by side."""
    sizes = {
        "num_rows": 32 * 4096,
        "k": 7168,
        "n": 4096,
        "num_experts": 32 if rows == "masked" else 8,
    }
    lie = {"weights": Weights(transposed=True), "scales": Scales("row_major", "blocks")}
    given = {"max_rows": 4096} if rows == "masked" else {"block_size": 128}
    given |= sizes | lie | {"dtype": "float8_e4m3fn", "out_dtype": "bfloat16"} | changes
    assert choose_tiles.config_for(MatmulProblem("test", rows, **given)).name == form


def bad_cases():
    """(Kind, text, what is changed)."""
    rng = np.random.default_rng(0)
    (x, s), (w, t) = make_x(rng, (20,), 256, {})[0], make_w(rng, 2, 192, 256, BLOCKS)[0]
    f32 = np.float32
    return [
        (TypeError, "x must be one of bfloat16.*; got float8.*quantize_rowwise", {"x": x}),
        (TypeError, "x must be an array, or", {"x": (x.astype(f32), s)}),
        (TypeError, "x must be an array, or", {"x": (x, s, s)}),
        (TypeError, r"x must be \(values, scales\), as w is", {"x": x.astype(f32)}),
        (TypeError, r"w must be \(values, scales\), as x is", {"w": w.astype(f32)}),
        (TypeError, r"w must be \(values, scales\) where", {"w": w}),
        (TypeError, r"w must be \(values, scales\) where", {"w": (w, w), "activation": "silu"}),
        (TypeError, r"w\[1\] must be \(values, scales\), as", {"w": ((w, t), w)}),
        (ValueError, "transpose_rhs must be True.*laid_out", {"transpose_rhs": False}),
        (ValueError, r"w must have shape \[E, N, K\].*laid_out", {"w": (w.swapaxes(1, 2), t)}),
        (ValueError, r"x must have values of shape \[rows, K\]", {"x": (x[None], s)}),
        (ValueError, r"scales of x must have shape \[20, 2\] row", {"x": (x, s[:, :1])}),
        (
            ValueError,
            r"scales of x must have shape \[2, 20\] col",
            {"scale_layout": "column_major"},
        ),
        (TypeError, "scales of x must be float32, or int32", {"x": (x, s.astype(np.float16))}),
        (ValueError, r"scales of w must have shape \[2, 2, 2\]", {"w": (w, t[:, :1])}),
        (TypeError, "scales of w must be float32", {"w": (w, t.astype(np.int32))}),
        (ValueError, "scale_layout must be None or one of", {"scale_layout": "rows"}),
        (
            ValueError,
            r"scales of w\[1\] must be both of blocks",
            {"w": ((w, t), (w, t[:, 0, 0])), "activation": "silu"},
        ),
        (
            ValueError,
            "x must have a K that is a multiple of 128",
            {"x": (x[:, :200], s), "w": (w[:, :, :200], t)},
        ),
        (TypeError, "preferred_element_type must be", {"preferred_element_type": "float8_e4m3fn"}),
        (
            ValueError,
            "scale_layout must be None but for",
            {"x": x.astype(f32), "w": w.astype(f32), "scale_layout": "row_major"},
        ),
    ]


BAD = bad_cases()


@pytest.mark.parametrize(("kind", "text", "change"), BAD, ids=[b[1][:40] for b in BAD])
def test_errors(kind, text, change):
    rng = np.random.default_rng(0)
    aligned = maj.moe_align_block_size(
        np.zeros((20, 1), np.int32), block_size=4, num_experts=2, implementation="xla"
    )
    given = {"x": make_x(rng, (20,), 256, {})[0], "w": make_w(rng, 2, 192, 256, BLOCKS)[0]}
    given |= {"block_size": 4, "top_k": 1, "transpose_rhs": True} | change
    with pytest.raises(kind, match=rf"^grouped_matmul: {text}"):
        maj.grouped_matmul(given.pop("x"), given.pop("w"), aligned, **given)


# -- the kernel's body -----------------------------------------------------------------------------

SWAP = tiles.Config("swap", 16, 128, 128, 6, group=0)
WIDE = tiles.Config("swap", 16, 256, 128, 5, group=0)
N = tiles.Config("n", 64, 256, 128, 4)
M = tiles.Config("m", 128, 128, 128, 5, late=True)
HALVES = tiles.Config("m", 128, 192, 128, 4, group=0, ahead=True, skips=True)
TALL = tiles.Config("m", 192, 128, 128, 4, computing=3)
BROAD = tiles.Config("m", 128, 192, 128, 4, sharing=2)  # three scales of w for each row
BESIDE = BROAD._replace(shared="w", ahead=True)
EARLY = BESIDE._replace(early=True)
ALONE = tiles.Config("swap", 16, 64, 128, 12, group=0, computing=1, ahead=True, early=True)
COLUMNS, PACKED, PACKED_ROWS = LAYOUTS[1:4]
SILU = {"activation": "silu"}
# (Sizes and options of make_case, tiles): tokens, top_k, experts, K, N, block_size.
FORMS = {
    "swap, silu, gathered": (
        *((9, 2, 3, 256, 128, 8), SILU | {"bias": True, "row_weights": True}),
        WIDE._replace(bm=8),
    ),
    "swap, gathered, packed": ((5, 2, 3, 256, 192, 8), {"layout": PACKED}, SWAP._replace(bm=8)),
    "n, interleaved, scales of experts": (
        (9, 1, 1, 256, 128, 64),
        SILU | {"interleaved": True, "layout": {"single": True}, "gather": False},
        N,
    ),
    "m, late, columns": ((20, 1, 2, 256, 192, 128), {"gather": False, "layout": COLUMNS}, M),
    "skips, columns": (
        (20, 1, 2, 128, 192, 128),
        {"gather": False, "layout": COLUMNS, "row_weights": True},
        HALVES,
    ),
    "broad, an odd number of tiles": (
        (20, 1, 2, 256, 448, 128),
        {"gather": False, "layout": COLUMNS},
        BROAD,
    ),
    "broad, weights shared": (
        (50, 2, 3, 512, 192, 128),  # two turns of two steps
        {"gather": False, "layout": COLUMNS, "row_weights": True, "routing": "dropped"},
        EARLY._replace(paired=True),
    ),
    "swap, a warpgroup alone": (
        (9, 2, 3, 256, 192, 16),
        {"gather": False, "layout": PACKED},
        ALONE,
    ),
    "swap, ahead": (
        (9, 2, 3, 256, 192, 16),
        {"gather": False, "layout": PACKED},
        ALONE._replace(bn=128, stages=6, computing=2),
    ),
    "n, ahead": ((9, 2, 3, 256, 192, 64), {"gather": False}, N._replace(ahead=True)),
    "swap, silu, gathered, a warpgroup alone": (
        (9, 2, 3, 256, 192, 8),
        SILU,
        ALONE._replace(bm=8, bn=128, stages=6),
    ),
    "swap, silu, k in 2": (
        (5, 2, 3, 512, 128, 8),
        SILU | {"layout": PACKED},
        WIDE._replace(bm=8, split=2, num_ctas=4),
    ),
    "tall, alone in its cluster": (
        (20, 1, 2, 128, 192, 192),
        {"gather": False, "layout": COLUMNS},
        TALL._replace(sharing=1, ahead=True),
    ),
    "tall, a first turn, one step behind the copies": (
        (20, 1, 2, 128, 192, 192),
        {"gather": False, "layout": PACKED_ROWS, "routing": "dropped"},
        TALL._replace(ahead=True, early=True, peeled=True),
    ),
    "tall, pair": ((9, 1, 1, 128, 128, 192), SILU | {"pair": True, "gather": False}, TALL),
}


def in_the_interpreter(monkeypatch, function, config, *args, **options):
    """What a public function would run, by the kernel's body with these tiles."""
    problem, operands = made(monkeypatch, function, *args, **options)
    assert not tiles.unsupported(problem)
    run = functools.partial(launch.run, problem, config=config._replace(num_ctas=2), interpret=True)
    with jax.default_device(jax.devices("cpu")[0]):
        return np.asarray(jax.jit(run)(*operands))


@pytest.mark.parametrize("name", FORMS)
def test_forms_in_the_interpreter(name, monkeypatch):
    size, options, config = FORMS[name]
    operands, given, want = make_case(*size, **options)
    out = in_the_interpreter(monkeypatch, maj.grouped_matmul, config, *operands, **given)
    found = out[: len(want)].astype(np.float64)
    assert oracle.error(found, want) < BOUND[given.get("preferred_element_type", "bfloat16")]


@pytest.mark.parametrize("finds", [0, 4, 10], ids=["a list", "4 experts", "10 experts"])
def test_masked_in_the_interpreter(finds, monkeypatch):
    """Tiles of 16 of 20 rows: the second reaches into the next expert's. The list of tiles is a launch of its
    own, or each CTA finds its own among so many experts."""
    counts = np.resize(COUNTS, finds or 4)
    x, w, options, want = make_masked(COLUMNS, n=64, k=128, counts=counts)
    given, config = (x, w, counts), SWAP._replace(finds=finds > 0)
    out = in_the_interpreter(monkeypatch, maj.masked_grouped_matmul, config, *given, **options)
    for rows, count, expected in zip(out.reshape(-1, 20, 64), counts, want, strict=True):
        if count and np.abs(expected).max() > 1e-30:  # scales may be subnormal numbers
            assert oracle.error(rows[:count], expected) < BOUND["bfloat16"]


def test_weights_are_shared_by_neighbours_of_one_expert(monkeypatch):
    """Tiles of 128 rows: two of the first expert, one of the second, which is the last and has no other. The
    second warpgroup has rows in the first of them alone, and passes stages on elsewhere. One step
    is no pair."""
    counts = np.array([150, 20], np.int32)
    x, w, options, want = make_masked(COLUMNS, n=64, k=128, counts=counts, most=256)
    config = EARLY._replace(skips=True, finds=True, paired=True)
    given = x, w, counts
    out = in_the_interpreter(monkeypatch, maj.masked_grouped_matmul, config, *given, **options)
    for rows, count, expected in zip(out.reshape(2, 256, 64), counts, want, strict=True):
        assert not count or oracle.error(rows[:count], expected) < BOUND["bfloat16"]


BY_GROUP = {
    "weights shared": EARLY._replace(skips=True, finds=True, paired=True, group=2, trims=True),
    "x shared": TALL._replace(skips=True, finds=True, sharing=2, ahead=True, peeled=True, group=2),
    "alone": HALVES._replace(finds=True, group=1, trims=True),
}


@pytest.mark.parametrize("name", BY_GROUP)
def test_masked_tiles_are_taken_group_by_group(name, monkeypatch):
    """Of three n tiles, or seven halves of two: a group's last tile without another beside it has its n tiles
    by twos, of which the very last is none. The bits are those of tiles in the usual order, which load halves
    without a row in use."""
    counts = np.array([130, 0, 65], np.int32)
    columns = 448 if name != "alone" else 192
    x, w, options, want = make_masked(COLUMNS, n=columns, k=128, counts=counts, most=192)
    run = functools.partial(in_the_interpreter, monkeypatch, maj.masked_grouped_matmul)
    config = BY_GROUP[name]
    out = run(config._replace(by_expert=True), x, w, counts, **options)
    usual = run(config._replace(trims=False), x, w, counts, **options)
    for e, count in enumerate(counts):
        rows = out.reshape(3, 192, columns)[e, :count]
        assert (rows == usual.reshape(3, 192, columns)[e, :count]).all()
        assert not count or oracle.error(rows, want[e]) < BOUND["bfloat16"]


@pytest.mark.parametrize("bm", [48, 112])
def test_swapped_masked_tiles_of_many_rows(bm, monkeypatch):
    """Groups of as many rows as a tile, of one more, of few, and of none; 112 rows are stored by halves."""
    counts = np.array([bm, 0, bm + 1, 3], np.int32)
    x, w, options, want = make_masked(COLUMNS, n=448, k=256, counts=counts, most=256)
    config = SWAP._replace(bm=bm, ahead=True, early=True, finds=True)
    given = x, w, counts
    out = in_the_interpreter(monkeypatch, maj.masked_grouped_matmul, config, *given, **options)
    for rows, count, expected in zip(out.reshape(4, 256, 448), counts, want, strict=True):
        assert not count or oracle.error(rows[:count], expected) < BOUND["bfloat16"]


TURNED = BESIDE._replace(skips=True, finds=True, group=8, by_expert=True, turned=True)


@pytest.mark.parametrize(
    ("counts", "ctas", "paired"),
    [([150, 0, 130, 64, 256, 300, 370, 192], 2, True), ([1, 0, 200], 4, False)],
)
def test_masked_tiles_of_two_shapes(counts, ctas, paired, monkeypatch):
    """Groups of one to six blocks of 64 rows: turned tiles, pairs, and tiles without another. In the second
    case two clusters have five units, the last of which, a pair, they divide."""
    counts = np.array(counts, np.int32)
    x, w, options, want = make_masked(COLUMNS, n=512, k=256, counts=counts, most=512)
    given = x, w, counts
    problem, operands = made(monkeypatch, maj.masked_grouped_matmul, *given, **options)
    config = TURNED._replace(paired=paired, num_ctas=ctas)
    run = functools.partial(launch.run, problem, config=config, interpret=True)
    with jax.default_device(jax.devices("cpu")[0]):
        out = np.asarray(jax.jit(run)(*operands))
    for rows, count, expected in zip(out.reshape(-1, 512, 512), counts, want, strict=True):
        assert not count or oracle.error(rows[:count], expected) < BOUND["bfloat16"]


@pytest.mark.parametrize("layout", [COLUMNS, {}], ids=["columns", "rows"])
def test_halves_of_tiles_without_pairs_are_left_out(layout, monkeypatch):
    """Experts of every number of pairs around a warpgroup's 64 rows, and a block without an expert: the bits
    of tiles whose warpgroups all multiply, and zeros in all rows of padding, where x is NaN. Where rows of
    padding need not be zero, they are products of it, but for the halves that nothing multiplies."""
    counts = [0, 1, 63, 64, 65, 127, 128, 3]
    ids = np.repeat(np.arange(8), counts)[:, None]
    ids = np.random.default_rng(3).permutation(ids).astype(np.int32)

    def routing(*_):
        aligned = maj.moe_align_block_size(ids, block_size=128, num_experts=8)
        used = int(aligned.num_tokens_post_padded[0])
        experts = np.array(aligned.expert_ids)
        experts[used // 128 - 1] = -1
        is_pair = np.asarray(aligned.sorted_token_ids) < len(ids)
        is_pair[used - 128 :] = False
        return aligned._replace(expert_ids=jnp.asarray(experts)), is_pair

    monkeypatch.setattr("tests.matmul.test_fp8.routed", routing)
    operands, given, want = make_case(len(ids), 1, 8, 256, 192, 128, gather=False, layout=layout)
    holds = routing()[1][: len(want)]
    problem, operands = made(monkeypatch, maj.grouped_matmul, *operands, **given)

    def run(config, **changes):
        changed = problem._replace(**changes)
        call = functools.partial(launch.run, changed, config=config._replace(num_ctas=2))
        with jax.default_device(jax.devices("cpu")[0]):
            out = jax.jit(functools.partial(call, interpret=True))(*operands)
        return np.asarray(out)[: len(want)].view(np.uint16)

    found = run(HALVES)
    assert oracle.error(found.view(jnp.bfloat16).astype(np.float64), want) < BOUND["bfloat16"]
    assert not (found[~holds] & 0x7FFF).any()
    assert (found == run(HALVES._replace(skips=False))).all()
    loose = run(HALVES, zero_padding=False)
    assert (loose[holds] == found[holds]).all()
    halves = loose.reshape(-1, 64, 192)
    empty = ~holds.reshape(-1, 64).any(1)
    assert empty.sum() == 5  # of the tiles with 1, 63 and 64 pairs, and both of no expert
    assert not (halves[empty] & 0x7FFF).any()
    assert np.isnan(halves[~empty].view(jnp.bfloat16).astype(np.float32)).any()
    # By rows' labels: of all rows of the result, -1 where one holds no pair.
    *arrays, _, experts, _ = operands
    every = np.zeros(problem.num_rows, bool)
    every[: len(holds)] = holds
    labels = np.where(every, np.repeat(experts, 128)[: problem.num_rows], -1)
    operands = *arrays, jnp.asarray(labels, jnp.int32)
    labelled = {"zero_padding": False, "whole_blocks": True, "row_labels": True, "all_rows": True}
    assert (run(HALVES, **labelled) == loose).all()
    whole = run(HALVES._replace(skips=False), **labelled)
    assert (whole[holds] == found[holds]).all() and (whole != loose)[~holds].any()


def test_halves_are_left_out_of_tiles_that_can_do_without():
    """Others read no id of the second half, or load for another CTA, too."""
    lie = {"weights": Weights(transposed=True), "scales": Scales("row_major", "blocks")}
    sizes = {"num_rows": 4096, "k": 1024, "n": 192, "num_experts": 8, "block_size": 128}
    given = sizes | lie | {"dtype": "float8_e4m3fn", "out_dtype": "bfloat16"}
    problem = MatmulProblem("test", "blocks", **given)
    for changes in ({}, {"whole_blocks": True, "row_labels": True}):
        assert not tiles.refused(problem._replace(**changes), HALVES)
    tall = TALL._replace(ahead=True, skips=True)
    for changes, config, reason in [
        ({"num_tokens": 2048, "top_k": 2}, HALVES, "in order"),
        ({"whole_blocks": True}, HALVES, "ids, or labels, tell padding"),
        ({"block_size": 192}, tall, "second of two warpgroups"),
        ({}, N._replace(skips=True, ahead=True, bm=128), "second of two warpgroups"),
        ({"block_size": 256}, HALVES, "that are a block"),
        ({"block_size": 68}, HALVES, "that are a block"),
        ({}, M._replace(skips=True), "read ahead"),
        ({}, HALVES._replace(sharing=1), "of one CTA"),
        ({}, BESIDE._replace(skips=True), "of one CTA"),
        ({}, BESIDE._replace(paired=True, peeled=True), "spill"),
    ]:
        with pytest.raises(ValueError, match=reason):
            kernel.build(problem._replace(**changes), config)


def test_pieces_in_shared_memory_divide_those_of_a_tile():
    """A slot is otherwise written for the next tile while the last store may still read it."""
    for _, problem, config in matmul_cases.problems():
        if not isinstance(config, Config):  # of the kernel that sums up a token's pairs: no pieces
            continue
        shape = shape_of(problem, config)
        columns = shape.columns // (1 if config.form == "m" else config.computing)
        pieces = columns // shape.piece * (shape.wm // 64)
        if config.form != "swap":
            assert pieces % stores.slots_of(config, shape) == 0, config


def test_the_emulator_by_its_name():
    counts = np.array([3, 2], np.int32)
    x, w, options, want = make_masked(PACKED, k=128, n=64, counts=counts, most=8)
    run = functools.partial(maj.masked_grouped_matmul, implementation="emulator", **options)
    with jax.default_device(jax.devices("cpu")[0]):
        out = jax.jit(run)(x, w, counts)
    for expert, count in enumerate(counts):
        assert oracle.error(out[expert, :count], want[expert]) < BOUND["bfloat16"]


# -- on a GPU --------------------------------------------------------------------------------------


_LAYOUTS = {"rows": {}, "columns": COLUMNS, "packed": PACKED, "packed rows": PACKED_ROWS}
_EVERY_LAYOUT = [*_LAYOUTS.items(), ("one scale", {"single": True})]
# Cases: (what it is, a function that makes (problem, operands), tiles).


def in_blocks(name, config, *size, **options):
    """A case of `grouped_matmul`."""

    def make(patch):
        operands, given, _ = make_case(*size, answers=False, **options)
        return made(patch, maj.grouped_matmul, *operands, **given)

    return f"{name}, {config.name}", make, config


def of_masked(name, config, layout, counts, most, **sizes):
    """A case of `masked_grouped_matmul`."""

    def make(patch):
        rows, given = np.array(counts, np.int32), {"most": most, "answers": False} | sizes
        x, w, options, _ = make_masked(layout, counts=rows, **given)
        return made(patch, maj.masked_grouped_matmul, x, w, rows, **options)

    return f"{name}, {config.name}", make, config


def every_layout_of_blocks():
    """Scales of every layout in tiles of every height, with and without an activation."""
    of_block = {
        8: SWAP._replace(bm=8),
        16: SWAP,
        40: SWAP._replace(bm=40),
        64: N,
        128: M,
        192: TALL,
    }
    silus = [{}, {"interleaved": True}, {"pair": True, "weights": OF_EXPERTS}] * 2
    for (name, layout), silu in zip(_EVERY_LAYOUT, silus[:5], strict=True):
        for gather in (False, True):
            for block, config in of_block.items():
                size = (90, 2, 7, 384, 320, block)
                text = f"{name}{', gathered' if gather else ''}"
                yield in_blocks(text, config, *size, gather=gather, layout=layout)
                wide = config if block >= 64 else WIDE._replace(bm=block, stages=4)
                both = {"bias": True, "row_weights": True, "routing": "dropped"}
                more = SILU | both | silu | {"gather": gather, "layout": layout}
                yield in_blocks(f"{text}, silu", wide, *size, **more)
    for config in (N, M._replace(late=False), TALL):
        float32 = {"preferred_element_type": "float32", "gather": False}
        yield in_blocks("float32", config, 90, 2, 7, 256, 192, config.bm, **float32)
        yield in_blocks("partial", config, 90, 2, 7, 256, 192, config.bm - 12, gather=False)
    for name, layout in _EVERY_LAYOUT:
        for routing in ("uniform", "dropped"):
            more = {"gather": False, "routing": routing, "layout": layout}
            yield in_blocks(f"halves, {name}, {routing}", HALVES, 300, 2, 9, 384, 448, 128, **more)


def shared_blocks():
    """Tiles of clusters: CTAs that share what they load, or a tile's k; and tiles of one warpgroup."""
    tall = TALL._replace(sharing=2, ahead=True)
    early = TALL._replace(ahead=True, early=True)
    peeled = early._replace(sharing=2, peeled=True)
    for config in (BROAD, BESIDE, EARLY, TALL._replace(sharing=1), tall, early, peeled):
        for name, layout in _LAYOUTS.items():
            size = (300, 2, 3, 384, 448, config.bm)
            yield in_blocks(f"sharing, {name}", config, *size, gather=False, layout=layout)
    for config in (BESIDE, EARLY, tall._replace(early=True)):
        config = config._replace(paired=True)
        for name, layout in _LAYOUTS.items():
            size = (300, 2, 3, 384 if name == "packed rows" else 2048, 448, config.bm)
            text = f"paired, {name}, {size[3]}"
            yield in_blocks(text, config, *size, gather=False, layout=layout)
    for config in (BESIDE, EARLY):
        size, float32 = (300, 2, 3, 384, 448, 128), {"preferred_element_type": "float32"}
        yield in_blocks("sharing, float32", config, *size, gather=False, **float32)
        single = {"single": True}
        yield in_blocks("sharing, one scale", config, *size, gather=False, layout=single)
    for name, layout in _LAYOUTS.items():
        for gated in (False, True):
            config = (WIDE if gated else SWAP)._replace(bm=8, stages=4, split=4, num_ctas=128)
            more = (SILU if gated else {}) | {"layout": layout}
            yield in_blocks(f"k in 4, {name}", config, 5, 8, 7, 1536, 320, 1, **more)
            config = ALONE._replace(bm=8, bn=128 if gated else 64, stages=6, num_ctas=264)
            yield in_blocks(f"alone, {name}", config, 90, 2, 7, 384, 320, 8, gather=gated, **more)
    yield in_blocks("one piece", M, 90, 2, 7, 256, 64, 128)
    yield in_blocks("parts", M, 300, 2, 3, 256, 192, 256, gather=False)


def masked_tiles():
    """(Rows of the largest expert, tiles) of the masked layout."""
    of_most = [
        (20, SWAP),
        (20, ALONE),
        (200, N),
        (200, N._replace(ahead=True, early=True)),
        (512, M),
        (500, TALL),
    ]
    of_most += [(most, config._replace(skips=True)) for most, config in of_most[-2:]]
    both = {"skips": True, "ahead": True}
    shared = [BROAD._replace(**both), BESIDE._replace(**both), EARLY._replace(**both)]
    shared.append(TALL._replace(**both, sharing=2, early=True))
    shared.append(shared[-1]._replace(peeled=True))
    alone = shared[0]._replace(sharing=0)
    finds = (SWAP, ALONE, ALONE._replace(stages=8, num_ctas=264), alone, *shared[2:], N, M)
    of_most += [(200, config._replace(finds=True)) for config in finds]
    of_most += [(512, config) for config in shared]
    of_group = [*shared[1:], alone, TALL._replace(**both)]
    of_group = [config._replace(finds=True, by_expert=True, group=2) for config in of_group]
    of_most += [(500, config) for config in of_group]
    trims = [c._replace(finds=True, trims=True) for c in (*shared[1:3], alone)]
    of_most += [(512, config) for config in trims]
    swapped = SWAP._replace(ahead=True, early=True, finds=True)
    of_most += [(200, swapped._replace(bm=bm)) for bm in (48, 80, 104, 112, 120)]
    return [*of_most, (200, swapped._replace(bm=128, stages=5))]


def masked():
    """Cases of the masked layout."""
    for name, layout in _LAYOUTS.items():
        for most, config in masked_tiles():
            counts = [most, 0, 3, most // 2]
            yield of_masked(f"masked {most}, {name}", config, layout, counts, most)
    for name in ("columns", "packed", "rows"):
        for config in (BESIDE, EARLY, TALL._replace(sharing=2, ahead=True, early=True)):
            config = config._replace(skips=True, finds=True)
            config = config._replace(paired=config.bm == 128, peeled=config.bm == 192)
            given = (_LAYOUTS[name], [600, 0, 3, 300], 600)
            yield of_masked(f"paired, masked 600, {name}", config, *given, k=2048, n=448)
    for most, n, k in ((512, 768, 384), (1024, 512, 2048), (384, 256, 256)):
        counts = [
            most,
            0,
            1,
            63,
            64,
            65,
            129,
            150,
            192,
            193,
            256,
            257,
            320,
            321,
            384,
            385,
            most - 1,
        ]
        counts = np.minimum(counts, most)
        for each in (
            counts,
            [200, 0, 0],
            [130, 0, 200, 5],
            [0, 0],
        ):  # none of the last turn, or a few
            for paired in (False, True):
                given = TURNED._replace(paired=paired), COLUMNS, each, most
                yield of_masked(f"masked {most}, of two shapes", *given, k=k, n=n)
    counts = np.resize([30, 0, 3, 17, 64], 30)
    for config in (SWAP, ALONE, M, BESIDE._replace(skips=True), EARLY._replace(peeled=True)):
        config = config._replace(finds=True)
        yield of_masked("masked, 30 experts", config, COLUMNS, counts, 64)


ON_A_GPU = [*every_layout_of_blocks(), *shared_blocks(), *masked()]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("make", "config"), [c[1:] for c in ON_A_GPU], ids=[c[0] for c in ON_A_GPU]
)
def test_forms_on_a_gpu(make, config, monkeypatch):
    """Against "xla", into poisoned memory, twice with the same bits."""
    check_form(*make(monkeypatch), config, interpret=False)
