"""grouped_matmul, masked_grouped_matmul, ragged_dot, gmm: "xla", and the kernel on a GPU, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

import moe_align_jax as maj
from tests.matmul import oracle

gpu = pytest.param("mosaic_gpu", marks=pytest.mark.gpu)
BOUND = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 1e-5}


def bound(implementation, dtype):
    # A GPU multiplies float32 in parts by default.
    return BOUND[dtype] if dtype != "float32" or jax.default_backend() == "cpu" else 2e-3


def normal(rng, shape, dtype, scale=1.0):
    return jnp.asarray(rng.standard_normal(shape, np.float32) * np.float32(scale), dtype)


def ids_of(name, tokens, top_k, experts, seed=0):
    rng = np.random.default_rng(seed)
    match name:
        case "uniform":
            ids = rng.integers(0, experts, (tokens, top_k))
        case "hot":
            ids = np.full((tokens, top_k), experts - 1)
        case "half":  # the other experts are empty
            ids = rng.integers(0, max(1, experts // 2), (tokens, top_k)) * 2 % experts
        case _:  # "dropped"
            ids = rng.integers(-2, experts + 2, (tokens, top_k))
    return ids.astype(np.int32)


@pytest.mark.parametrize("implementation", ["xla", gpu])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("inverse", [False, True])
def test_an_alignment_cut_to_its_rows(inverse, block, implementation):
    """The last block is full, so that the last slot holds a pair; other blocks have padding or not."""
    rng = np.random.default_rng(0)
    for ids in (
        [[1, 0], [1, 1], [1, 0]],
        [[0, 0], [1, 1], [1, 0], [1, 0]],
        [[-1, 1], [1, 1], [1, -1]],
    ):
        ids = np.array(ids, np.int32)
        aligned = maj.moe_align_block_size(
            *(ids,), block_size=block, num_experts=2, return_inverse=inverse, implementation="xla"
        )
        used = int(aligned.num_tokens_post_padded[0])
        cut = aligned._replace(
            sorted_token_ids=aligned.sorted_token_ids[:used],
            expert_ids=aligned.expert_ids[: used // block],
        )
        x, w = normal(rng, (used, 8), "bfloat16"), normal(rng, (2, 8, 8), "bfloat16")
        found = maj.grouped_matmul(x, w, cut, block_size=block, implementation=implementation)
        real = np.asarray(cut.sorted_token_ids) < ids.size
        want = np.zeros((used, 8))
        for row in np.flatnonzero(real):
            want[row] = oracle.row(x[row], w[int(cut.expert_ids[row // block])])
        assert oracle.error(found, want) < bound(implementation, "bfloat16")


PADDED_FIRST = np.array(
    [5, 0, 1, 5, 2, 5, 3, 4], np.int32
)  # padding is 5: slots 0 and 5 are in front of pairs


@pytest.mark.parametrize("top_k", [None, 1])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_padding_ahead_of_a_pair_is_refused(array, inverse, top_k):
    """The kernels take what is behind a block's first padding for padding, and lost the pairs there."""
    x, w = np.ones((5 if top_k else 8, 8), np.float32), np.ones((2, 8, 8), np.float32)
    experts, used = np.array([0, 1], np.int32), np.array([8], np.int32)
    rows = np.array([1, 2, 4, 6, 7], np.int32)

    def blocks(ids, experts=experts, used=used):
        given = maj.AlignedBlocks(ids, experts, used, np.array([2, 3], np.int32))
        given = given._replace(row_of_pair=rows if inverse else None)
        return maj.AlignedBlocks(*(None if part is None else array(part) for part in given))

    multiply = functools.partial(maj.grouped_matmul, x, w, block_size=4, top_k=top_k)
    rule = "must have the pairs of each block ahead of its padding"
    got = "got padding in slot 0 and pair 0 in slot 1"
    with pytest.raises(
        ValueError, match=rf"^grouped_matmul: aligned.sorted_token_ids {rule}; {got}\. "
    ):
        multiply(blocks(PADDED_FIRST))
    in_order = np.array([0, 1, 5, 5, 2, 3, 4, 5], np.int32)
    np.testing.assert_array_equal(multiply(blocks(in_order))[:, 0], [8, 8, 0, 0, 8, 8, 8, 0])
    # Of blocks that are not in use, or have no expert here, nothing is said.
    half = np.array([0, 1, 5, 5, 5, 2, 5, 5], np.int32)
    for other in ({"used": np.array([4], np.int32)}, {"experts": np.array([0, -1], np.int32)}):
        found = multiply(blocks(half, **other))
        np.testing.assert_array_equal(found[:4, 0], [8, 8, 0, 0])


def routed(name, tokens, top_k, experts, block, seed=0):
    """The alignment of such ids, and which of its rows hold a pair."""
    ids = ids_of(name, tokens, top_k, experts, seed)
    aligned = maj.moe_align_block_size(
        ids, block_size=block, num_experts=experts, implementation="xla"
    )
    is_pair = np.asarray(aligned.sorted_token_ids) < tokens * top_k
    is_pair[int(aligned.num_tokens_post_padded[0]) :] = False
    return aligned, is_pair


def columns_of(n, pair, options):
    """(Whether n columns come of 2 n, columns of one array of weights): a pair has n in each of two."""
    gated = options.get("gated", True) and options.get("activation") is not None
    return gated, 2 * n if gated and not pair else n


def make_case(
    tokens,
    top_k,
    experts,
    k,
    n,
    block,
    *,
    routing="uniform",
    dtype="bfloat16",
    gather=True,
    pair=False,
    bias=False,
    row_weights=False,
    seed=0,
    **options,
):
    """(operands, options) of a `grouped_matmul`, with NaN wherever nothing may be read."""
    rng = np.random.default_rng(seed)
    aligned, real = routed(routing, tokens, top_k, experts, block, seed)
    sorted_ids = np.asarray(aligned.sorted_token_ids)
    gated, columns = columns_of(n, pair, options)
    shape = (experts, columns, k) if options.get("transpose_rhs") else (experts, k, columns)
    w = [normal(rng, shape, dtype, k**-0.5) for _ in range(1 + pair)]
    w = tuple(w) if pair else w[0]
    x = normal(rng, (tokens, k), dtype)
    if not gather:
        rows = np.asarray(x)[np.where(real, sorted_ids // top_k, 0)]
        x = jnp.asarray(np.where(real[:, None], rows, np.asarray(np.nan, rows.dtype)))
    given = dict(options, block_size=block)
    if gather:
        given["top_k"] = top_k
    if bias:
        given["bias"] = normal(rng, (experts, 2 * n if gated else n), "float32")
    if row_weights:
        values = rng.uniform(0.2, 1.5, len(sorted_ids)).astype(np.float32)
        given["row_weights"] = jnp.asarray(np.where(real, values, np.nan))
    return (x, w, aligned), given


def check_blocks(operands, options, implementation, dtype="bfloat16"):
    x, w, aligned = operands
    out = maj.grouped_matmul(x, w, aligned, implementation=implementation, **options)
    options = dict(options)
    wanted = options.pop("preferred_element_type", None) or dtype
    assert out.dtype == jnp.dtype(wanted)
    assert out.shape[0] == aligned.sorted_token_ids.shape[0]
    numpy_w = tuple(map(np.asarray, w)) if isinstance(w, tuple) else np.asarray(w)
    want = oracle.blocks(np.asarray(x), numpy_w, aligned, **options)
    assert oracle.error(out[: len(want)], want) < bound(implementation, dtype)
    return out


SIZES = [
    # tokens, top_k, experts, K, N, block_size
    (33, 2, 4, 64, 48, 16),
    (7, 3, 5, 24, 40, 8),
    (50, 1, 1, 72, 8, 64),
    (1, 2, 8, 32, 16, 16),
    (20, 2, 512, 16, 24, 4),
    (19, 4, 3, 40, 56, 12),
    (9, 2, 6, 8, 16, 1),
    (130, 2, 4, 136, 264, 128),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("gather", [True, False], ids=["gather", "permuted"])
@pytest.mark.parametrize("implementation", ["xla", gpu])
def test_sizes(size, gather, implementation):
    check_blocks(*make_case(*size, gather=gather), implementation)


@pytest.mark.parametrize("routing", ["hot", "half", "dropped"])
@pytest.mark.parametrize("implementation", ["xla", gpu])
def test_routings(routing, implementation):
    """One expert with all rows, experts without rows, pairs that are dropped."""
    for size in ((40, 2, 6, 32, 24, 16), (150, 2, 5, 64, 128, 64)):
        for gather in (True, False):
            case = make_case(*size, routing=routing, gather=gather, bias=True, row_weights=True)
            check_blocks(*case, implementation)


EPILOGUES = [
    {"activation": "silu"},
    {"activation": "silu", "gated": False},
    {"activation": "gelu"},
    {"activation": "gelu", "gated": False},
    {"activation": "gelu_tanh"},
    {"activation": "relu2", "gated": False},
    {"activation": "relu2"},
    {"activation": "silu", "interleaved": True},
    {"activation": "silu", "pair": True},
    {"activation": "silu", "swiglu_limit": 0.5},
    {"activation": "silu", "swiglu_limit": 0.5, "swiglu_alpha": 1.702, "interleaved": True},
    {"gated": True},
]


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize("implementation", ["xla", gpu])
def test_epilogues(epilogue, transpose_rhs, implementation):
    for bias, row_weights in ((False, False), (True, True)):
        for block in (16,) if implementation == "xla" else (16, 64, 128):  # xla has one form
            case = make_case(
                *(40, 2, 5, 64, 72, block),
                transpose_rhs=transpose_rhs,
                bias=bias,
                row_weights=row_weights,
                **epilogue,
            )
            check_blocks(*case, implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [64, 128, 192])
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("n", [64, 128])
def test_tiles_wider_than_x_or_the_result(k, block, n):
    """A tile of 128 or 256 columns, of a result with 64, is not stored over its first ones; nor are
    columns read that x does not have, of which the last row's lie behind the array."""
    for gather in (True, False):
        for epilogue in ({}, {"activation": "silu"}, {"activation": "silu", "pair": True}):
            for tokens in (40, 300):
                case = make_case(tokens, 2, 5, k, n, block, gather=gather, **epilogue)
                check_blocks(*case, "mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("block", [1, 3, 7])
def test_rows_of_odd_blocks_begin_anywhere(block):
    """Ids and weights of two rows are not loaded at once where a block may begin at an odd row."""
    for gather in (True, False):
        for row_weights in (True, False):
            for bias in (True, False):
                case = make_case(
                    *(9, 2, 6, 72, 64, block), gather=gather, row_weights=row_weights, bias=bias
                )
                check_blocks(*case, "mosaic_gpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("out", ["bfloat16", "float16", "float32"])
def test_dtypes_by_xla(dtype, out):
    case = make_case(*(40, 2, 5, 64, 72, 16), dtype=dtype, preferred_element_type=out)
    check_blocks(*case, "xla", min(dtype, out, key=lambda name: jnp.finfo(name).nmant))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("out", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_dtypes_by_the_kernel(dtype, out, block):
    case = make_case(*(40, 2, 5, 64, 72, block), dtype=dtype, preferred_element_type=out)
    check_blocks(*case, "mosaic_gpu", min(dtype, out, key=lambda name: jnp.finfo(name).nmant))


def test_blocks_of_remote_experts_are_zero():
    """expert_map names experts that are elsewhere -1."""
    ids = ids_of("uniform", 30, 2, 6)
    expert_map = np.array([-1, 0, -1, 1, 2, -1], np.int32)
    x = normal(np.random.default_rng(1), (30, 16), "float32")
    w = normal(np.random.default_rng(2), (3, 16, 8), "float32")
    bias = jnp.full((3, 8), 5.0)
    for ignore in (False, True):
        aligned = maj.moe_align_block_size(
            ids,
            block_size=8,
            num_experts=6,
            expert_map=expert_map,
            ignore_invalid_experts=ignore,
        )
        assert (np.asarray(aligned.expert_ids) == -1).any()
        case = (x, w, aligned), {"block_size": 8, "top_k": 2, "bias": bias}
        out = check_blocks(*case, "xla", "float32")
        used = int(aligned.num_tokens_post_padded[0])
        remote = np.repeat(np.asarray(aligned.expert_ids) == -1, 8)[:used]
        assert not np.asarray(out)[:used][remote].any()


def test_what_is_behind_the_rows_in_use_is_not_read():
    """Their expert, their ids and their rows may be anything."""
    (x, w, aligned), options = make_case(*(20, 2, 4, 16, 24, 8), gather=False, dtype="float32")
    used = int(aligned.num_tokens_post_padded[0])
    ids = np.asarray(aligned.sorted_token_ids).copy()
    ids[used:-1] = -7
    experts = np.asarray(aligned.expert_ids).copy()
    experts[used // 8 :] = 99
    changed = aligned._replace(sorted_token_ids=ids, expert_ids=experts)
    want = maj.grouped_matmul(x, w, aligned, **options)
    got = maj.grouped_matmul(x, w, changed, **options)
    np.testing.assert_array_equal(got[:used], want[:used])
    assert np.isfinite(np.asarray(got)).all()


def test_no_rows_no_columns_no_tokens():
    aligned = maj.moe_align_block_size(jnp.zeros((0, 2), jnp.int32), block_size=8, num_experts=3)
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    ones = functools.partial(jnp.ones, dtype=jnp.float32)
    x, w = zeros((0, 16)), zeros((3, 16, 8))
    for options in ({}, {"top_k": 2}):
        assert maj.grouped_matmul(x, w, aligned, block_size=8, **options).shape == (0, 8)
    y = maj.masked_grouped_matmul(zeros((3, 0, 16)), w, jnp.zeros(3, jnp.int32))
    assert y.shape == (3, 0, 8)
    assert maj.ragged_dot(x, w, jnp.zeros(3, jnp.int32)).shape == (0, 8)
    assert maj.ragged_dot(ones((4, 16)), w[:, :, :0], jnp.ones(3, jnp.int32)).shape == (4, 0)
    full = maj.ragged_dot(ones((4, 0)), w[:, :0], jnp.ones(3, jnp.int32))
    assert full.shape == (4, 8) and not full.any()


# -- groups ----------------------------------------------------------------------------------------

GROUPS = [
    ([3, 0, 7, 5], 15),
    ([3, 0, 7, 5], 22),
    ([0, 0, 9], 9),
    ([300, 1, 0, 129], 430),
    ([130], 130),
    ([1] * 40, 40),
    ([5, 9, 3], 10),  # more than there are
    ([0, 0], 6),
    ([4, -3, 2], 8),
]


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("implementation", ["xla", gpu])
def test_ragged_dot(groups, implementation):
    sizes, rows = groups
    rng = np.random.default_rng(0)
    lhs = normal(rng, (rows, 40), "bfloat16")
    rhs = normal(rng, (len(sizes), 40, 72), "bfloat16", 40**-0.5)
    total = sum(max(s, 0) for s in sizes)
    if total < rows:
        lhs = lhs.at[total:].set(jnp.nan)
    out = maj.ragged_dot(lhs, rhs, np.array(sizes), implementation=implementation)
    want = oracle.ragged(np.asarray(lhs), np.asarray(rhs), np.maximum(sizes, 0))
    assert oracle.error(out, want) < 5e-3
    assert not np.asarray(out)[total:].any()


def test_ragged_dot_equals_jax():
    rng = np.random.default_rng(3)
    lhs, rhs = normal(rng, (50, 24), "float32"), normal(rng, (6, 24, 16), "float32")
    sizes = jnp.array([5, 0, 20, 1, 9, 3])
    want = jax.lax.ragged_dot(lhs, rhs, sizes)
    np.testing.assert_allclose(maj.ragged_dot(lhs, rhs, sizes), want, rtol=1e-5, atol=1e-5)
    for precision in (None, "highest", jax.lax.Precision.HIGH):
        got = maj.ragged_dot(lhs, rhs, sizes, precision, jnp.bfloat16)
        assert got.dtype == jnp.bfloat16


@pytest.mark.parametrize("offset", [0, 1, 2, 4, -1, np.int64(3), jnp.array([2])], ids=str)
@pytest.mark.parametrize("implementation", ["xla", gpu])
def test_group_offset(offset, implementation):
    """rhs holds 3 of 5 groups, of which some may be none."""
    rng = np.random.default_rng(4)
    lhs, rhs = normal(rng, (60, 32), "bfloat16"), normal(rng, (3, 32, 16), "bfloat16")
    sizes = np.array([11, 7, 0, 25, 9])
    out = maj.ragged_dot(lhs, rhs, sizes, None, None, offset, implementation=implementation)
    start = int(np.asarray(offset).reshape(()))
    want = oracle.ragged(np.asarray(lhs), np.asarray(rhs), sizes, group_offset=start)
    assert oracle.error(out, want) < 5e-3


def test_gmm_is_megablox_call():
    """Positions, the default dtype, the layout, and what is kept of an existing result."""
    rng = np.random.default_rng(5)
    lhs, rhs = normal(rng, (40, 24), "bfloat16"), normal(rng, (2, 16, 24), "bfloat16")
    sizes = np.array([8, 13, 9, 4])
    old = normal(rng, (40, 16), "float32")
    out = maj.gmm(lhs, rhs, sizes, jnp.float32, (8, 8, 8), jnp.array([1]), old, True, True)
    assert out.dtype == jnp.float32
    want = oracle.ragged(
        np.asarray(lhs), np.asarray(rhs), sizes, group_offset=1, transpose_rhs=True
    )
    want[:8], want[30:] = old[:8], old[30:]
    assert oracle.error(out, want) < 1e-5
    np.testing.assert_array_equal(out[:8], old[:8])
    np.testing.assert_array_equal(out[30:], old[30:])
    plain = maj.gmm(lhs, rhs.swapaxes(1, 2), sizes[:2])
    want = oracle.ragged(np.asarray(lhs), np.asarray(rhs.swapaxes(1, 2)), sizes[:2])
    assert oracle.error(plain, want) < 1e-5


# -- the masked layout -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counts", [[3, 0, 17, 20], [0, 0, 0, 0], [20] * 4, [25, -3, 1, 9]], ids=str
)
@pytest.mark.parametrize("epilogue", [{}, {"activation": "silu", "bias": True}], ids=str)
@pytest.mark.parametrize("implementation", ["xla", gpu])
def test_masked(counts, epilogue, implementation):
    rng = np.random.default_rng(6)
    options, bias = dict(epilogue), None
    n = 48 if "activation" in options else 24
    if options.pop("bias", False):
        bias = normal(rng, (4, n), "float32")
    valid = np.clip(counts, 0, 20)
    x = np.array(normal(rng, (4, 20, 40), "bfloat16"))
    for expert, count in enumerate(valid):
        x[expert, count:] = np.nan
    w = normal(rng, (4, 40, n), "bfloat16", 40**-0.5)
    y = maj.masked_grouped_matmul(
        x, w, np.array(counts), bias=bias, implementation=implementation, **options
    )
    assert y.shape == (4, 20, 24)
    want = oracle.masked(x, np.asarray(w), valid, bias=bias, **options)
    for expert, rows in enumerate(want):
        if len(rows):
            assert oracle.error(y[expert, : len(rows)], rows) < 5e-3


@pytest.mark.parametrize("implementation", ["xla", gpu])
def test_masked_of_many_rows(implementation):
    """Several tiles of an expert, of which the last reaches past its rows."""
    rng = np.random.default_rng(7)
    x, w = normal(rng, (3, 300, 16), "bfloat16"), normal(rng, (3, 16, 24), "bfloat16")
    counts = np.array([300, 129, 0])
    y = maj.masked_grouped_matmul(x, w, counts, implementation=implementation)
    for expert, rows in enumerate(oracle.masked(np.asarray(x), np.asarray(w), counts)):
        if len(rows):
            assert oracle.error(y[expert, : len(rows)], rows) < 5e-3


# -- derivatives -----------------------------------------------------------------------------------


def dense_blocks(x, w, bias, scale, aligned, block, top_k, options):
    """Differentiable, every row by itself."""
    used = int(aligned.num_tokens_post_padded[0])
    ids = np.asarray(aligned.sorted_token_ids)[:used]
    expert = np.asarray(aligned.expert_ids)[np.arange(used) // block]
    real = (ids < x.shape[0] * top_k) & (expert >= 0)
    rows = x[np.where(real, ids // top_k, 0)]
    product = jnp.einsum("rk,rkn->rn", rows, w[np.maximum(expert, 0)], precision="highest")
    product = product + bias[np.maximum(expert, 0)]
    half = product.shape[1] // 2
    gate, up = product[:, :half], product[:, half:]
    if options.get("interleaved"):
        gate, up = product[:, 0::2], product[:, 1::2]
    y = jax.nn.silu(gate) * up * jnp.where(real, scale[:used], 0)[:, None]
    return jnp.where(real[:, None], y, 0)


@pytest.mark.parametrize("options", [{}, {"interleaved": True}], ids=str)
def test_derivatives_of_blocks(options):
    """NaN weights of rows without a pair reach no derivative."""
    (x, w, aligned), given = make_case(
        *(12, 2, 4, 16, 8, 8),
        routing="dropped",
        dtype="float32",
        bias=True,
        row_weights=True,
        activation="silu",
        **options,
    )
    used = int(aligned.num_tokens_post_padded[0])
    direction = normal(np.random.default_rng(8), (used, 8), "float32")
    bias, scale = given.pop("bias"), given.pop("row_weights")

    def ours(x, w, bias, scale):
        y = maj.grouped_matmul(x, w, aligned, bias=bias, row_weights=scale, **given)
        return jnp.sum(y[:used] * direction)

    def theirs(x, w, bias, scale):
        y = dense_blocks(x, w, bias, scale, aligned, 8, 2, options)
        return jnp.sum(y * direction)

    got = jax.jit(jax.grad(ours, argnums=(0, 1, 2, 3)))(x, w, bias, scale)
    safe = jnp.nan_to_num(scale)
    want = jax.grad(theirs, argnums=(0, 1, 2, 3))(x, w, bias, safe)
    for name, g, t in zip(("x", "w", "bias", "row_weights"), got, want, strict=True):
        np.testing.assert_allclose(g, t, rtol=1e-4, atol=1e-5, err_msg=name)


def test_derivatives_of_groups_and_of_the_masked_layout():
    rng = np.random.default_rng(9)
    lhs, rhs = normal(rng, (30, 16), "float32"), normal(rng, (4, 16, 8), "float32")
    sizes = jnp.array([7, 0, 12, 4])
    direction = normal(rng, (30, 8), "float32")
    got = jax.grad(lambda a, b: jnp.sum(maj.ragged_dot(a, b, sizes) * direction), (0, 1))(lhs, rhs)
    want = jax.grad(lambda a, b: jnp.sum(jax.lax.ragged_dot(a, b, sizes) * direction), (0, 1))(
        lhs, rhs
    )
    for g, t in zip(got, want, strict=True):
        np.testing.assert_allclose(g, t, rtol=1e-4, atol=1e-5)
    x, counts = normal(rng, (4, 9, 16), "float32"), np.array([9, 0, 4, 2])
    valid = (np.arange(9)[None] < counts[:, None])[..., None]
    toward = jnp.where(valid, normal(rng, (4, 9, 8), "float32"), jnp.nan)

    def ours(x, w):
        y = maj.masked_grouped_matmul(x, w, counts)
        return jnp.sum(jnp.where(valid, y * jnp.where(valid, toward, 0), 0))

    def theirs(x, w):
        y = jnp.einsum("emk,ekn->emn", x, w, precision="highest")
        return jnp.sum(y * jnp.where(valid, toward, 0))

    for g, t in zip(jax.grad(ours, (0, 1))(x, rhs), jax.grad(theirs, (0, 1))(x, rhs), strict=True):
        np.testing.assert_allclose(g, t, rtol=1e-4, atol=1e-5)


# -- transformations -------------------------------------------------------------------------------


def small():
    """(x, w, sizes, want) of a ragged_dot."""
    rng = np.random.default_rng(10)
    lhs, rhs = normal(rng, (12, 16), "float32"), normal(rng, (3, 16, 8), "float32")
    return lhs, rhs, jnp.array([4, 0, 6]), jax.lax.ragged_dot(lhs, rhs, jnp.array([4, 0, 6]))


def test_vmap_of_any_operand():
    lhs, rhs, sizes, _ = small()
    more = jnp.stack([sizes, jnp.array([1, 2, 3])])
    got = jax.vmap(maj.ragged_dot, (None, None, 0))(lhs, rhs, more)
    for k in range(2):
        want = jax.lax.ragged_dot(lhs, rhs, more[k])
        np.testing.assert_allclose(got[k], want, rtol=1e-5, atol=1e-5)
    both = jnp.stack([lhs, 2 * lhs], axis=1)
    got = jax.jit(jax.vmap(jax.vmap(maj.ragged_dot, (None, None, 0)), (1, None, None)))(
        both, rhs, more
    )
    assert got.shape == (2, 2, 12, 8)
    np.testing.assert_allclose(
        got[1, 0], 2 * jax.lax.ragged_dot(lhs, rhs, sizes), rtol=1e-5, atol=1e-5
    )
    grads = jax.vmap(jax.grad(lambda x: maj.ragged_dot(x, rhs, sizes).sum()))(jnp.stack([lhs] * 3))
    assert grads.shape == (3, 12, 16)


def test_scan_remat_and_jit():
    lhs, rhs, sizes, want = small()

    @jax.jit
    def layers(x):
        @jax.checkpoint
        def layer(x, _):
            y = maj.ragged_dot(x, rhs, sizes)
            return x + jnp.tile(y, (1, 2)), y

        return jax.lax.scan(layer, x, None, length=3)[1]

    np.testing.assert_allclose(layers(lhs)[0], want, rtol=1e-5, atol=1e-5)
    grad = jax.grad(lambda x: layers(x).sum())(lhs)
    assert np.isfinite(np.asarray(grad)).all()


def test_repeated_layers_are_lowered_once():
    lhs, rhs, sizes, _ = small()
    square = jnp.ones((3, 16, 16), jnp.float32)

    def program(count):
        def run(x):
            for _ in range(count):
                x = maj.ragged_dot(x, square, sizes)
            return x

        return jax.jit(run).lower(lhs).as_text()

    # A call of the shared function takes 200 characters, and with x64 its operands' constants 500.
    call = 600 if jax.config.jax_enable_x64 else 200
    assert len(program(60)) < 1.5 * len(program(1)) + 60 * call


def test_shard_map_with_check_vma():
    lhs, rhs, sizes, _ = small()
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(Spec("x"), Spec(), Spec("x")), out_specs=Spec("x")
    )
    def run(x, w, sizes):
        return maj.ragged_dot(x, w, sizes)

    both, counts = jnp.concatenate([lhs, 3 * lhs]), jnp.concatenate([sizes, jnp.array([1, 5, 2])])
    got = jax.jit(run)(both, rhs, counts)
    np.testing.assert_allclose(
        got[12:], jax.lax.ragged_dot(3 * lhs, rhs, counts[3:]), rtol=1e-5, atol=1e-5
    )
    grad = jax.grad(lambda w: run(both, w, counts).sum())(rhs)
    want = jax.grad(
        lambda w: (
            jax.lax.ragged_dot(lhs, w, sizes).sum()
            + jax.lax.ragged_dot(3 * lhs, w, counts[3:]).sum()
        )
    )(rhs)
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-5)


def test_shard_map_of_blocks():
    (x, w, aligned), options = make_case(
        *(16, 2, 4, 16, 8, 8), dtype="float32", bias=True, row_weights=True, activation="silu"
    )
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(Spec(),) * 3, out_specs=Spec("x"))
    def run(x, w, aligned):
        y = maj.grouped_matmul(x, w, aligned, **options)
        return jax.lax.pcast(y, "x", to="varying")

    want = maj.grouped_matmul(x, w, aligned, **options)
    used = int(aligned.num_tokens_post_padded[0])
    got = jax.jit(run)(x, w, aligned)
    np.testing.assert_array_equal(got[:used], want[:used])


def test_export_for_two_platforms():
    lhs, rhs, sizes, want = small()
    call = jax.jit(maj.ragged_dot)
    exported = jax.export.export(call, platforms=["cpu", "cuda"])(
        *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (lhs, rhs, sizes))
    )
    np.testing.assert_allclose(exported.call(lhs, rhs, sizes), want, rtol=1e-5, atol=1e-5)


def _symbolic(call, *operands):
    """call, exported and called. Of operands (array, True) the last axis but one has the symbolic size m."""
    scope, shapes = jax.export.SymbolicScope(), []
    for array, symbolic in operands:
        sizes = [str(size) for size in array.shape]
        if symbolic:
            sizes[-2] = "m"
        shape = jax.export.symbolic_shape(",".join(sizes), scope=scope)
        shapes.append(jax.ShapeDtypeStruct(shape, array.dtype))
    return jax.export.export(jax.jit(call))(*shapes).call(*(array for array, _ in operands))


@pytest.mark.parametrize("dtype", ["int32", "int8", "uint16"])
def test_export_for_any_number_of_rows(dtype):
    """The kernels refuse symbolic rows and name "xla", which then compared them with the rows of a tile."""
    lhs, rhs, sizes, want = small()
    sizes, close = sizes.astype(dtype), functools.partial(np.testing.assert_allclose, rtol=1e-5)
    out = jnp.full(want.shape, 7.0, jnp.float32)
    behind = np.arange(len(lhs)) >= int(sizes.sum())

    got = _symbolic(maj.ragged_dot, (lhs, True), (rhs, False), (sizes, False))
    close(got, want, atol=1e-5)
    got = _symbolic(
        lambda lhs, out: maj.gmm(lhs, rhs, np.asarray(sizes), existing_out=out),
        *((lhs, True), (out, True)),
    )
    close(got, np.where(behind[:, None], 7.0, want), atol=1e-5)

    def sum_of_squares(lhs, rhs, sizes):
        return jnp.sum(maj.ragged_dot(lhs, rhs, sizes) ** 2)

    derivative = jax.grad(sum_of_squares, argnums=(0, 1))
    got = _symbolic(derivative, (lhs, True), (rhs, False), (sizes, False))
    dense = np.asarray(want, np.float64)
    group = np.repeat(np.arange(len(sizes) + 1), [*np.asarray(sizes, int), int(behind.sum())])
    for g in range(len(sizes)):
        rows = group == g
        close(got[0][rows], 2 * dense[rows] @ np.asarray(rhs[g], float).T, rtol=1e-4, atol=1e-4)
        want_w = np.asarray(lhs, float)[rows].T @ (2 * dense[rows])
        close(got[1][g], want_w, rtol=1e-4, atol=1e-4)
    tgmm = _symbolic(
        lambda lhs, toward: maj.tgmm(lhs.T, toward, sizes), (lhs, True), (2 * want, True)
    )
    close(tgmm, got[1], rtol=1e-4, atol=1e-4)

    x = jnp.stack([lhs] * len(sizes))
    got = _symbolic(
        lambda x, sizes: maj.masked_grouped_matmul(x, rhs, sizes, expected_m=2),
        *((x, True), (sizes, False)),
    )
    for g, size in enumerate(np.asarray(sizes)):
        close(got[g, :size], np.asarray(lhs[:size] @ rhs[g]), atol=1e-5)


def test_export_of_blocks_of_any_number_of_tokens():
    """Alignment and product wrote the number of blocks in two ways, which of symbols are not equal."""
    rng = np.random.default_rng(0)
    x, w = normal(rng, (6, 8), "float32"), normal(rng, (3, 8, 8), "float32")
    ids = jnp.asarray(ids_of("uniform", 6, 2, 3))

    def multiply(x, ids):
        aligned = maj.moe_align_block_size(ids, block_size=4, num_experts=3)
        return maj.grouped_matmul(x, w, aligned, block_size=4, top_k=2)

    found = _symbolic(multiply, (x, True), (ids, True))
    aligned = maj.moe_align_block_size(ids, block_size=4, num_experts=3)
    for row in range(int(aligned.num_tokens_post_padded[0])):
        pair, want = int(aligned.sorted_token_ids[row]), np.zeros(8)
        if pair < 12:
            want = oracle.row(x[pair // 2], w[int(aligned.expert_ids[row // 4])])
        np.testing.assert_allclose(found[row], want, rtol=1e-5, atol=1e-5)


def test_explicit_meshes_are_refused_with_a_remedy():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    lhs, rhs, sizes, _ = small()
    sharded = jax.device_put(lhs, NamedSharding(mesh, Spec("x")))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="x must not be sharded over Explicit"):
        maj.ragged_dot(sharded, rhs, sizes)


def test_out_sharding():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    lhs, rhs, sizes, want = small()
    with jax.set_mesh(mesh):
        out = jax.jit(lambda *a: maj.ragged_dot(*a, out_sharding=NamedSharding(mesh, Spec("x"))))(
            lhs, rhs, sizes
        )
        assert jax.typeof(out).sharding.spec == Spec("x", None)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


# -- asking, and errors ----------------------------------------------------------------------------


def test_select_says_what_runs_and_why():
    sizes = {"block_size": 128, "top_k": 8, "platform": "cuda"}
    chosen = maj.select_matmul_implementation((4096, 2048), (128, 2048, 1536), **sizes)
    assert chosen.implementation == "mosaic_gpu" and "128x256" in chosen.form
    assert set(chosen.reasons) == {"xla", "emulator"}
    few = maj.select_matmul_implementation((16, 2048), (128, 2048, 1536), **sizes)
    assert few.implementation == "mosaic_gpu" and few.form != chosen.form
    odd = maj.select_matmul_implementation((64, 20), (4, 20, 16), block_size=16, platform="cuda")
    assert odd.implementation == "xla" and "multiple of 8" in odd.reasons["mosaic_gpu"]
    f32 = maj.select_matmul_implementation(
        (64, 16), (4, 16, 16), block_size=16, platform="cuda", dtype="float32"
    )
    assert f32.implementation == "xla" and "float32" in f32.reasons["mosaic_gpu"]
    cpu = maj.select_matmul_implementation((64, 16), (4, 16, 16), block_size=16, platform="cpu")
    assert cpu[:2] == ("xla", "loop")
    with pytest.raises(NotImplementedError, match="multiple of 8"):
        maj.select_matmul_implementation(
            (64, 20), (4, 20, 16), block_size=16, platform="cuda", implementation="mosaic_gpu"
        )


X, W = np.zeros((8, 16), np.float32), np.zeros((2, 16, 24), np.float32)
SIZES_OF_2 = np.array([3, 2])


def aligned_of_8():
    """One token per row, block size 4."""
    return maj.moe_align_block_size(np.array([[0], [1], [1], [1]]), block_size=4, num_experts=2)


BAD_BLOCKS = [
    (TypeError, "x must be an array", {"x": [[1.0]]}),
    (TypeError, "x must be one of bfloat16", {"x": X.astype(np.int32)}),
    (ValueError, r"x must have shape \[rows, K\]", {"x": X[None]}),
    (ValueError, "x must have 10 rows", {"x": X[:5]}),
    (TypeError, "w must have the dtype of the rows", {"w": W.astype(np.float16)}),
    (ValueError, r"w must have shape \[E, K, N\] with K = 16", {"w": W[:, :8]}),
    (ValueError, r"w must have shape \[E, N, K\] with K = 16", {"transpose_rhs": True}),
    (ValueError, r"w must have shape \[E, K, 2 N\]", {"w": W[..., :23], "activation": "silu"}),
    (ValueError, "w must be one array", {"w": (W, W)}),
    (ValueError, "w must be an array or a pair", {"w": (W,) * 3, "activation": "silu"}),
    (ValueError, r"w\[1\] must have the shape of gate", {"w": (W, W[:1]), "activation": "silu"}),
    (TypeError, "aligned must be an AlignedBlocks", {"aligned": 3}),
    (ValueError, "block_size must be the alignment's", {"block_size": 8}),
    (TypeError, "block_size must be a static Python int", {"block_size": 4.0}),
    (TypeError, "top_k must be a static Python int", {"top_k": 1.5}),
    (ValueError, "x must give at most 10 pairs", {"top_k": 2}),
    (ValueError, "activation must be None or one of", {"activation": "tanh"}),
    (TypeError, "gated must be a static bool", {"gated": 1}),
    (ValueError, "interleaved must be False", {"interleaved": True}),
    (ValueError, "swiglu_limit must be None but", {"swiglu_limit": 7.0}),
    (
        ValueError,
        "swiglu_alpha must be None or positive",
        {"activation": "silu", "swiglu_alpha": 0},
    ),
    (ValueError, r"bias must have shape \[2, 24\]", {"bias": np.zeros((2, 12))}),
    (TypeError, "bias must be a float array", {"bias": np.zeros((2, 24), np.int32)}),
    (ValueError, r"row_weights must have shape \[10\]", {"row_weights": np.zeros(8)}),
    (TypeError, "preferred_element_type must be", {"preferred_element_type": "int8"}),
    (ValueError, "implementation must be None or one of", {"implementation": "cuda"}),
]


@pytest.mark.parametrize(("kind", "text", "change"), BAD_BLOCKS, ids=[b[1] for b in BAD_BLOCKS])
def test_errors_of_blocks(kind, text, change):
    aligned = aligned_of_8()
    rows = aligned.sorted_token_ids.shape[0]
    given = {"x": np.zeros((rows, 16), np.float32), "w": W, "aligned": aligned, "block_size": 4}
    if "x" not in change and "top_k" in change:
        given["x"] = X
    given |= change
    with pytest.raises(kind, match=f"^grouped_matmul: {text}.*; got "):
        maj.grouped_matmul(given.pop("x"), given.pop("w"), given.pop("aligned"), **given)


BAD_GROUPS = [
    (TypeError, "group_sizes must be an integer array", {"group_sizes": np.zeros(2)}),
    (ValueError, "group_sizes must have one axis", {"group_sizes": np.zeros((2, 1), np.int32)}),
    (ValueError, "group_sizes must have one group per", {"group_sizes": np.zeros(3, np.int32)}),
    (TypeError, "group_offset must be an integer", {"group_offset": 1.5}),
    (ValueError, "group_offset must be a scalar", {"group_offset": np.zeros(2, np.int32)}),
    (ValueError, "rhs must have shape", {"rhs": W[:, :4]}),
    (ValueError, "rhs must be one array", {"rhs": (W, W)}),
    (TypeError, "precision must be static", {"precision": {}}),
]


@pytest.mark.parametrize(("kind", "text", "change"), BAD_GROUPS, ids=[b[1] for b in BAD_GROUPS])
def test_errors_of_groups(kind, text, change):
    given = {"lhs": X, "rhs": W, "group_sizes": SIZES_OF_2} | change
    with pytest.raises(kind, match=f"^ragged_dot: {text}.*; got "):
        maj.ragged_dot(**given)


def test_errors_of_gmm_and_of_the_masked_layout():
    with pytest.raises(ValueError, match="^gmm: existing_out must be float32"):
        maj.gmm(X, W, SIZES_OF_2, existing_out=np.zeros((8, 23), np.float32))
    x = np.zeros((2, 4, 16), np.float32)
    for text, change in (
        (r"x must have shape \[e, M, K\]", {"x": X}),
        ("w must have 2 experts", {"w": np.zeros((3, 16, 24), np.float32)}),
        ("masked_m must have 2 experts", {"masked_m": np.zeros(3, np.int32)}),
        ("masked_m must have one axis", {"masked_m": np.int32(3) * np.ones((2, 1), np.int32)}),
    ):
        given = {"x": x, "w": W, "masked_m": SIZES_OF_2} | change
        with pytest.raises(ValueError, match=f"^masked_grouped_matmul: {text}.*; got "):
            maj.masked_grouped_matmul(**given)


def test_a_kernel_that_cannot_run_here_says_so():
    if jax.default_backend() != "cpu":
        pytest.skip("needs a process without a GPU")
    with pytest.raises(NotImplementedError, match="^ragged_dot: implementation must be"):
        maj.ragged_dot(X, W, SIZES_OF_2, implementation="mosaic_gpu")


def test_a_result_that_no_device_holds():
    w = jax.ShapeDtypeStruct((1, 8, 2**30), jnp.float32)
    x = jax.ShapeDtypeStruct((2**30, 8), jnp.float32)
    with pytest.raises(ValueError, match="the result must fit the"):
        jax.eval_shape(lambda x, w: maj.ragged_dot(x, w, np.array([5])), x, w)
