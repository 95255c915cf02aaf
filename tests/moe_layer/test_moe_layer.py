"""fused_moe: "xla", the kernels' bodies in the interpreter, and the kernels on a GPU, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

import moe_align_jax as maj
from moe_align_jax._grouped_matmul import kernel
from moe_align_jax._moe_layer import plan
from tests.matmul.oracle import ACTIVATIONS, error
from tests.moe_layer import oracle

gpu = pytest.param("mosaic_gpu", marks=pytest.mark.gpu)
# Two products, each rounded, and the sum.
BOUND = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 1e-5}


def bound(dtype):
    # A GPU multiplies float32 in parts by default.
    return BOUND[dtype] if dtype != "float32" or jax.default_backend() == "cpu" else 2e-3


def normal(rng, shape, dtype, scale=1.0):
    return jnp.asarray(rng.standard_normal(shape, np.float32) * np.float32(scale), dtype)


def make_layer(
    tokens=13,
    top_k=2,
    experts=4,
    hidden=24,
    ffn=16,
    *,
    dtype="float32",
    routing="uniform",
    pair=False,
    bias=False,
    experts_of_ids=None,
    seed=0,
    **options,
):
    """(Operands, options) of `fused_moe`; NaN in the weights of dropped pairs."""
    rng = np.random.default_rng(seed)
    slots = experts_of_ids or experts
    ids = {
        "uniform": rng.integers(0, slots, (tokens, top_k)),
        "hot": np.full((tokens, top_k), slots - 1),
        "dropped": rng.integers(-3, slots + 3, (tokens, top_k)),
        "none": np.full((tokens, top_k), -1),
    }[routing].astype(np.int32)
    gated = options.get("gated", True) and options.get("activation", "silu") is not None
    columns = 2 * ffn if gated and not pair else ffn
    transposed = options.get("transpose_rhs", False)
    shape = (experts, columns, hidden) if transposed else (experts, hidden, columns)
    first = tuple(normal(rng, shape, dtype, hidden**-0.5) for _ in range(1 + pair))
    shape = (experts, hidden, ffn) if transposed else (experts, ffn, hidden)
    w_down = normal(rng, shape, dtype, ffn**-0.5)
    x = normal(rng, (tokens, hidden), dtype)
    pairs = oracle.experts_of_pairs(
        ids,
        experts,
        expert_map=options.get("expert_map"),
        num_valid_tokens=options.get("num_valid_tokens"),
    )
    weights = rng.uniform(0.2, 1.5, ids.shape).astype(np.float32)
    weights = np.where(pairs >= 0, weights, np.nan)
    if bias:
        both = 2 * ffn if gated else ffn
        options["bias_gate_up"] = normal(rng, (experts, both), "float32", 0.5)
        options["bias_down"] = normal(rng, (experts, hidden), "float32", 0.5)
    operands = (x, first if pair else first[0], w_down, jnp.asarray(weights), jnp.asarray(ids))
    return operands, options


def wanted(operands, options):
    x, first, *rest = (
        tuple(map(np.asarray, a)) if isinstance(a, tuple) else np.asarray(a) for a in operands
    )
    names = ("block_size", "preferred_element_type", "aligned", "return_tokens_per_expert")
    options = {name: value for name, value in options.items() if name not in names}
    return oracle.layer(x, first, *rest, **options)


def check(operands, options, implementation="xla", dtype="float32"):
    y, counts = maj.fused_moe(
        *operands, implementation=implementation, return_tokens_per_expert=True, **options
    )
    want, pairs = wanted(operands, options)
    assert error(y, want) < bound(dtype)
    np.testing.assert_array_equal(counts, pairs)
    assert counts.dtype == jnp.int32
    preferred = options.get("preferred_element_type")
    assert y.dtype == jnp.dtype(preferred or dtype)
    return y


OPTIONS = {
    "plain": {},
    "transposed": {"transpose_rhs": True},
    "pair": {"pair": True},
    "transposed pair": {"pair": True, "transpose_rhs": True},
    "interleaved": {"interleaved": True},
    "interleaved, transposed": {"interleaved": True, "transpose_rhs": True},
    "bias": {"bias": True},
    "gelu": {"activation": "gelu"},
    "gelu_tanh, not gated, bias": {"activation": "gelu_tanh", "gated": False, "bias": True},
    "relu2, not gated": {"activation": "relu2", "gated": False},
    "linear": {"activation": None},
    "limit": {"swiglu_limit": 0.7},
    "gpt-oss": {
        **{"interleaved": True, "swiglu_limit": 0.7, "swiglu_alpha": 1.702, "bias": True},
    },
    "weights on input": {"weights_on_input": True},
    "weights on input, bias": {"weights_on_input": True, "bias": True, "routing": "dropped"},
    "one expert a token": {"top_k": 1, "weights_on_input": True},
    "K = 1": {"top_k": 1},
    "one hot expert": {"routing": "hot"},
    "ids out of range": {"routing": "dropped"},
    "no expert at all": {"routing": "none"},
    "one expert": {"experts": 1, "top_k": 1},
    "many experts": {"experts": 100, "tokens": 30, "routing": "dropped"},
    "valid tokens": {"num_valid_tokens": 7},
    "no valid token": {"num_valid_tokens": 0},
    "more valid tokens than there are": {"num_valid_tokens": 2**40},
    "block size": {"block_size": 12, "routing": "dropped"},
    "blocks of one row": {"block_size": 1},
    "float32 result": {"preferred_element_type": "float32"},
    "bfloat16 result": {"preferred_element_type": "bfloat16", "dtype": "float32"},
    "expert map": {"experts_of_ids": 8, "expert_map": np.array([-1, 2, 0, -1, 3, 1, 9, -5])},
    "expert map, bias, dropped": {
        **{"experts_of_ids": 8, "expert_map": np.array([3, 2, 0, -1, -1, 1, -1, -1])},
        **{"bias": True, "routing": "dropped", "num_valid_tokens": 9, "transpose_rhs": True},
    },
    # So few pairs that there is no alignment.
    "pairs": {"tokens": 2, "experts": 16, "routing": "dropped"},
    "pairs, bias, transposed": {
        **{"tokens": 3, "experts": 24, "bias": True, "transpose_rhs": True},
    },
    "pairs, weights on input": {"tokens": 3, "experts": 24, "weights_on_input": True},
    "pairs, expert map": {
        **{"tokens": 2, "experts": 4, "experts_of_ids": 16, "routing": "dropped"},
        **{"expert_map": np.array([-1, 2, 0, -1, 3, 1, 9, -5] * 2), "num_valid_tokens": 1},
    },
    "one pair": {"tokens": 1, "experts": 8, "top_k": 1},
    "one token": {"tokens": 1, "experts": 8},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_alone_and_in_pairs(name):
    options = dict(OPTIONS[name])
    dtype = options.get("dtype", "float32")
    operands, options = make_layer(**options)
    wide = options.get("preferred_element_type", dtype)
    check(operands, options, dtype="bfloat16" if wide == "bfloat16" else dtype)


SIZES = [
    # tokens, top_k, experts, H, N
    (33, 2, 4, 64, 48),
    (1, 2, 8, 128, 64),
    (4, 2, 64, 64, 72),
    (7, 3, 5, 24, 40),
    (50, 1, 1, 72, 8),
    (40, 2, 512, 16, 24),
    (130, 2, 4, 136, 264),
    (300, 2, 2, 128, 64),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("implementation", ["xla", gpu])
def test_sizes_and_dtypes(size, dtype, implementation):
    operands, options = make_layer(*size, dtype=dtype, routing="dropped")
    check(operands, options, implementation, dtype)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.gpu
def test_every_option_on_a_gpu(name):
    options = {**OPTIONS[name], "dtype": "bfloat16"}
    operands, options = make_layer(**options)
    y = check(operands, options, "mosaic_gpu", "bfloat16")
    again = maj.fused_moe(*operands, implementation="mosaic_gpu", **options)
    assert np.asarray(y).tobytes() == np.asarray(again).tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 128, 700])
@pytest.mark.parametrize("routing", ["uniform", "hot", "dropped"])
def test_models_sizes_on_a_gpu(tokens, routing):
    """Against "xla", whose values the tests above hold to NumPy's."""
    operands, options = make_layer(
        tokens, 8, 128, 2048, 768, dtype="bfloat16", routing=routing, transpose_rhs=True
    )
    want = maj.fused_moe(*operands, implementation="xla", **options)
    y = maj.fused_moe(*operands, implementation="mosaic_gpu", **options)
    assert error(y, np.asarray(want, np.float64)) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "routing"), [(12, "uniform"), (16, "dropped"), (32, "hot"), (120, "uniform")]
)
def test_two_ctas_for_each_tile_on_a_gpu(tokens, routing):
    """Against "xla", and of the same bits twice, where two CTAs share each tile of gate and up."""
    operands, options = make_layer(
        tokens, 8, 256, 5120, 64, dtype="bfloat16", routing=routing, transpose_rhs=True
    )
    shapes = (tokens, 5120), (256, 5120, 64)
    form = maj.select_moe_implementation(
        *shapes, top_k=8, transpose_rhs=True, implementation="mosaic_gpu"
    ).form
    assert form.split(", ")[:2] == ["blocks of 8", "8x256x128s3swap-g0-k2"]
    want = maj.fused_moe(*operands, implementation="xla", **options)
    y = maj.fused_moe(*operands, implementation="mosaic_gpu", **options)
    assert error(y, np.asarray(want, np.float64)) < 5e-3
    again = maj.fused_moe(*operands, implementation="mosaic_gpu", **options)
    assert np.asarray(y).tobytes() == np.asarray(again).tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "experts", "rows"),
    [(60, 8, 48), (500, 8, 144), (1500, 8, 176), (4096, 8, 176), (4600, 9, 192)],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_few_experts_on_a_gpu(tokens, experts, rows, transposed):
    """Each size of a block; of the last three, rows are copied to their pairs before the product."""
    assert maj.moe_block_size(tokens, top_k=2, num_experts=experts) == rows
    operands, options = make_layer(
        *(tokens, 2, experts, 512, 5120),
        dtype="bfloat16",
        routing="uniform",
        transpose_rhs=transposed,
    )
    want = maj.fused_moe(*operands, implementation="xla", **options)
    y = maj.fused_moe(*operands, implementation="mosaic_gpu", **options)
    assert error(y, np.asarray(want, np.float64)) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "rows"),
    [(7000, 128, 8, 184), (24100, 128, 8, 192), (3500, 32, 4, 144)],
)
@pytest.mark.parametrize("routing", ["uniform", "hot", "dropped"])
def test_rows_that_are_copied_on_a_gpu(tokens, experts, top_k, rows, routing):
    """Of many experts, ahead of the first product; its tiles have several heights. The same bits again."""
    assert maj.moe_block_size(tokens, top_k=top_k, num_experts=experts) == rows
    operands, options = make_layer(
        tokens, top_k, experts, 512, 768, dtype="bfloat16", routing=routing, transpose_rhs=True
    )
    want = maj.fused_moe(*operands, implementation="xla", **options)
    layer = jax.jit(functools.partial(maj.fused_moe, implementation="mosaic_gpu", **options))
    assert "spread_rows" in layer.lower(*operands).as_text()
    y = layer(*operands)
    assert error(y, np.asarray(want, np.float64)) < 5e-3
    assert np.asarray(y).tobytes() == np.asarray(layer(*operands)).tobytes()


@pytest.mark.parametrize("tokens", [1, 9], ids=["pairs", "blocks"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_kernels_bodies_in_the_interpreter(tokens, transposed):
    operands, options = make_layer(
        tokens, 2, 8, 72, 64, dtype="bfloat16", routing="dropped", transpose_rhs=transposed
    )
    check(operands, options, "emulator", "bfloat16")


# -- alignments made before ---------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["plain", "label", "filter", "valid"])
def test_an_alignment_made_before(use):
    expert_map = np.array([-1, 2, 0, -1, 3, 1, -1, -1]) if use in ("label", "filter") else None
    more = {} if expert_map is None else {"expert_map": expert_map, "experts_of_ids": 8}
    if use == "valid":
        more["num_valid_tokens"] = 5
    operands, options = make_layer(routing="dropped", bias=True, **more)
    given = dict(options)
    for name in ("expert_map", "num_valid_tokens"):
        given.pop(name, None)
    aligned = maj.moe_align_block_size(
        operands[4],
        block_size=8,
        num_experts=8 if expert_map is not None else 4,
        expert_map=expert_map,
        ignore_invalid_experts=use == "filter",
        num_valid_pairs=10 if use == "valid" else None,
        return_inverse=True,
    )
    y, counts = maj.fused_moe(
        *operands, aligned=aligned, block_size=8, return_tokens_per_expert=True, **given
    )
    want, _ = wanted(operands, options)
    assert error(y, want) < 1e-5
    np.testing.assert_array_equal(counts, aligned.tokens_per_expert)


def edited(aligned, first, second, *, inverse):
    """The alignment with two of its slots exchanged, and its inverse told so or not."""
    ids = np.asarray(aligned.sorted_token_ids).copy()
    ids[[first, second]] = ids[[second, first]]
    rows = np.asarray(aligned.row_of_pair).copy()
    for row in (first, second):
        if inverse and ids[row] < rows.size:
            rows[ids[row]] = row
    return aligned._replace(sorted_token_ids=ids, row_of_pair=rows)


def test_an_edited_alignment():
    """Any order of an expert's pairs is right; what kernels or the derivative would misread is refused."""
    operands, options = make_layer(13, 2, 4)
    ids = operands[4]
    aligned = maj.moe_align_block_size(ids, block_size=8, num_experts=4, return_inverse=True)
    want, _ = wanted(operands, options)

    def layer(aligned):
        return maj.fused_moe(*operands, aligned=aligned, block_size=8, **options)

    [count] = np.nonzero(np.asarray(aligned.sorted_token_ids)[:8] == ids.size)
    assert count.size and count[0] >= 2  # the first block has pairs, and padding behind them
    assert error(layer(edited(aligned, 0, 1, inverse=True)), want) < 1e-5
    name = "fused_moe: aligned"
    with pytest.raises(
        ValueError, match=f"{name}.sorted_token_ids must have the pairs .* in slot 1"
    ):
        layer(edited(aligned, 0, 7, inverse=True))
    with pytest.raises(
        ValueError,
        match=f"{name}.row_of_pair must be the inverse of .*; got pair .* in row 0, which",
    ):
        layer(edited(aligned, 0, 1, inverse=False))
    behind = np.where(np.asarray(aligned.row_of_pair) == 0, 1000, aligned.row_of_pair)
    with pytest.raises(
        ValueError, match=f"{name}.row_of_pair must .*; got pair .* in row 1000, of .* rows"
    ):
        layer(aligned._replace(row_of_pair=behind.astype(np.int32)))


@pytest.mark.parametrize("tokens", [2, 13], ids=["pairs", "blocks"])
@pytest.mark.parametrize("dispatch", ["dynamic", "round_robin"])
def test_an_expert_location(tokens, dispatch):
    """Slots are replicas: of equal weights, so that the replica that a pair takes changes nothing."""
    logical = np.arange(20) % 16
    location = maj.ExpertLocation.from_map([logical], dispatch=dispatch).layer(0)
    operands, options = make_layer(tokens, experts=16, routing="dropped")
    x, w_gate_up, w_down, weights, ids = operands
    y, counts = maj.fused_moe(
        x,
        w_gate_up[logical],
        w_down[logical],
        weights,
        ids,
        expert_location=location,
        return_tokens_per_expert=True,
    )
    want, pairs = wanted(operands, options)
    assert error(y, want) < 1e-5
    np.testing.assert_array_equal(np.bincount(logical, weights=counts), pairs)


def test_ids_outside_the_experts_are_dropped_where_each_pair_is_a_block():
    """No kernel of its own replaces them there: the products test their range."""
    operands, options = make_layer(2, 3, experts=24)
    ids = np.array([[3, -1, 2**31 - 1], [24, 0, -(2**31)]], np.int32)
    operands = (*operands[:4], ids)
    want, _ = wanted(operands, options)
    assert error(maj.fused_moe(*operands), want) < 1e-5


def test_int64_and_unsigned_ids():
    operands, options = make_layer(routing="dropped")
    ids = np.asarray(operands[4], np.int64)
    want, _ = wanted(operands, options)
    for some in (np.where(ids < 0, 2**33 + 1, ids), ids.astype(np.int8), ids.astype(np.uint16)):
        y = maj.fused_moe(*operands[:4], some)
        assert error(y, want) < 1e-5
    few, options = make_layer(2, experts=16, routing="dropped")
    ids = np.asarray(few[4], np.int64)
    wide = np.where(ids < 0, 2**33 + 1, ids)
    assert error(maj.fused_moe(*few[:4], wide), wanted(few, options)[0]) < 1e-5


def test_num_valid_tokens_is_a_value_of_the_device():
    operands, options = make_layer()
    layer = jax.jit(lambda count: maj.fused_moe(*operands, num_valid_tokens=count))
    for count in (0, 5, 13, 10**6):
        want, _ = wanted(operands, {**options, "num_valid_tokens": count})
        assert error(layer(jnp.int32(count)), want) < 1e-5
    assert layer._cache_size() == 1
    few, options = make_layer(3, experts=24)
    want, _ = wanted(few, {**options, "num_valid_tokens": 2})
    y = maj.fused_moe(*few, num_valid_tokens=np.int64(2))
    assert error(y, want) < 1e-5


@pytest.mark.parametrize("shape", [(0, 2), (5, 0)])
def test_no_tokens_or_no_experts_of_a_token(shape):
    operands, _ = make_layer(*shape)
    y, counts = maj.fused_moe(*operands, return_tokens_per_expert=True)
    assert y.shape == (shape[0], 24) and not np.any(y)
    assert counts.tolist() == [0] * 4
    gradients = jax.grad(lambda x: maj.fused_moe(x, *operands[1:]).sum())(operands[0])
    assert gradients.shape == operands[0].shape and not np.any(gradients)


def test_the_same_bits_in_every_run():
    operands, options = make_layer(60, 4, dtype="bfloat16")
    found = {np.asarray(maj.fused_moe(*operands, **options)).tobytes() for _ in range(3)}
    assert len(found) == 1


# -- derivatives ----------------------------------------------------------------------------------------


def dense(x, w_gate_up, w_down, weights, ids, bias_gate_up, bias_down, on_input=False):
    """Every expert on every token, in plain jax.numpy; NaN weights of dropped pairs are selected away."""
    out = 0.0
    for e in range(w_down.shape[0]):
        for k in range(ids.shape[1]):
            hit = ids[:, k] == e
            share = jnp.where(hit, weights[:, k], 0.0)[:, None]
            rows = x * share if on_input else x
            product = rows @ w_gate_up[e] + bias_gate_up[e][None]
            gate, up = jnp.split(product, 2, axis=1)
            y = (gate * jax.nn.sigmoid(gate) * up) @ w_down[e] + bias_down[e][None]
            out += jnp.where(hit[:, None], y if on_input else y * share, 0.0)
    return out


# Two tokens are laid out in blocks of one pair each, 13 are aligned.
@pytest.mark.parametrize(
    ("routing", "tokens", "on_input"),
    [
        ("uniform", 13, False),
        ("uniform", 2, True),
        ("dropped", 13, True),
        ("dropped", 2, False),
        ("hot", 13, False),
        ("none", 13, True),
    ],
)
def test_derivatives_are_those_of_dense_experts(routing, tokens, on_input):
    operands, options = make_layer(tokens, experts=16, routing=routing, bias=True)
    x, w_gate_up, w_down, weights, ids = operands
    direction = normal(np.random.default_rng(9), x.shape, "float32")
    floats = (x, w_gate_up, w_down, weights, options["bias_gate_up"], options["bias_down"])

    def ours(x, first, second, weights, bias_first, bias_second):
        y = maj.fused_moe(
            x,
            first,
            second,
            weights,
            ids,
            bias_gate_up=bias_first,
            bias_down=bias_second,
            weights_on_input=on_input,
        )
        return jnp.sum(y * direction)

    def theirs(x, first, second, weights, *biases):
        y = dense(x, first, second, weights, ids, *biases, on_input=on_input)
        return jnp.sum(y * direction)

    every = tuple(range(6))
    got = jax.jit(jax.grad(ours, every))(*floats)
    want = jax.jit(jax.grad(theirs, every))(*floats)
    for name, a, b in zip(("x", "first", "second", "weights", "b1", "b2"), got, want, strict=True):
        assert np.all(np.isfinite(a)), name
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("tokens", [2, 13], ids=["pairs", "blocks"])
def test_nan_of_what_has_no_pair_reaches_no_derivative(tokens):
    """In rows of padding tokens, of x and of the result's cotangent, and in an expert without a token."""
    operands, options = make_layer(tokens, experts=16, routing="uniform", bias=True)
    *_, ids = operands
    ids = jnp.where(ids == 15, 14, ids)
    floats = (*operands[:4], options["bias_gate_up"], options["bias_down"])
    direction = normal(np.random.default_rng(9), floats[0].shape, "float32")

    def gradients(floats, direction):
        def run(*floats):
            *head, b1, b2 = floats
            biases = {"bias_gate_up": b1, "bias_down": b2}
            return maj.fused_moe(*head, ids, num_valid_tokens=tokens - 1, **biases)

        return jax.vjp(run, *floats)[1](direction)

    x, first, second, weights, *biases = floats
    dirty = (
        x.at[-1].set(jnp.nan),
        *(w.at[15].set(jnp.nan) for w in (first, second)),
        weights.at[-1].set(jnp.nan),
        *(b.at[15].set(jnp.inf) for b in biases),
    )
    want = gradients(floats, direction)
    for got, clean in zip(gradients(dirty, direction.at[-1].set(jnp.nan)), want, strict=True):
        np.testing.assert_array_equal(got, clean)


# -- transformations -----------------------------------------------------------------------------------


def test_scan_and_remat_over_layers():
    layers = 3
    made = [make_layer(seed=s)[0] for s in range(layers)]
    x, ids = made[0][0], made[0][4]
    weights = made[0][3]
    stacked = [jnp.stack([m[i] for m in made]) for i in (1, 2)]

    @jax.remat
    def one(x, w):
        return x + maj.fused_moe(x, *w, weights, ids), None

    def loss(x, stacked):
        y, _ = jax.lax.scan(one, x, tuple(stacked))
        return jnp.sum(y**2), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(x, stacked)
    want = np.asarray(x, np.float64)
    for m in made:
        want = want + oracle.layer(want, *map(np.asarray, m[1:3]), np.asarray(weights), ids)[0]
    assert error(y, want) < 1e-5

    def unrolled(x):
        for m in made:
            x = x + maj.fused_moe(x, m[1], m[2], weights, ids)
        return jnp.sum(x**2)

    np.testing.assert_allclose(gradient, jax.grad(unrolled)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [2, 13], ids=["pairs", "blocks"])
def test_vmap(tokens):
    made = [make_layer(tokens, experts=16, routing="dropped", seed=s)[0] for s in range(3)]
    first, second = made[0][1:3]
    x, weights, ids = (jnp.stack([m[i] for m in made]) for i in (0, 3, 4))
    y = jax.vmap(lambda x, w, i: maj.fused_moe(x, first, second, w, i))(x, weights, ids)
    for i, m in enumerate(made):
        want, _ = wanted((m[0], first, second, *m[3:]), {})
        assert error(y[i], want) < 1e-5
    slope = jax.vmap(
        jax.grad(lambda x, w, i: maj.fused_moe(x, first, second, w, i).sum()), (0, 0, 0)
    )(x, weights, ids)
    one = jax.grad(lambda x: maj.fused_moe(x, first, second, weights[1], ids[1]).sum())(x[1])
    np.testing.assert_allclose(slope[1], one, rtol=1e-5, atol=1e-6)


def mesh_of(count, axis_type):
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices")
    return jax.make_mesh((count,), ("ep",), axis_types=(axis_type,))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_every_activation_where_tokens_are_split(activation):
    """jax 0.12.0's derivative of erf, and so that of "gelu", does not trace in such a map."""
    mesh, rng = mesh_of(2, AxisType.Auto), np.random.default_rng(3)
    x, first, second = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((8, 4), (2, 4, 6), (2, 6, 4))
    )
    ids, weights = np.arange(8, dtype=np.int32)[:, None] % 2, np.ones((8, 1), np.float32)

    def layer(*operands):
        return maj.fused_moe(*operands, activation=activation, gated=False)

    specs = (Spec("ep"), Spec(), Spec(), Spec("ep"), Spec("ep"))
    split = jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=Spec("ep"))
    total = jax.jit(jax.grad(lambda x, first: split(x, first, second, weights, ids).sum(), (0, 1)))
    d_x, d_first = total(x, first)
    wanted_x, wanted_first = np.zeros((8, 4)), np.zeros((2, 4, 6))
    for t, e in enumerate(ids[:, 0]):
        before, step = x[t].astype(float) @ first[e], 1e-6
        act = ACTIVATIONS[activation]
        slope = (act(before + step) - act(before - step)) / (2 * step) * second[e].sum(axis=1)
        wanted_x[t] = first[e].astype(float) @ slope
        wanted_first[e] += np.outer(x[t], slope)
    np.testing.assert_allclose(d_x, wanted_x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_first, wanted_first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 13], ids=["pairs", "blocks"])
def test_shard_map_splits_the_experts(tokens):
    """Expert parallelism by a map: each device its experts, and one sum over the devices."""
    mesh = mesh_of(2, AxisType.Auto)
    operands, options = make_layer(tokens, experts=16, routing="dropped")
    x, first, second, weights, ids = operands

    def body(x, first, second, weights, ids):
        local = jnp.arange(16, dtype=jnp.int32) - 8 * jax.lax.axis_index("ep")
        expert_map = jnp.where((local >= 0) & (local < 8), local, -1)
        y = maj.fused_moe(x, first, second, weights, ids, expert_map=expert_map)
        return jax.lax.psum(y, "ep")

    specs = (Spec(), Spec("ep"), Spec("ep"), Spec(), Spec())
    layer = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=Spec()))
    want, _ = wanted(operands, options)
    assert error(layer(*operands), want) < 1e-5

    def loss(layer):
        return lambda x, first, second: jnp.sum(layer(x, first, second, weights, ids) ** 2)

    got = jax.grad(loss(layer), (0, 1, 2))(x, first, second)
    alone = jax.grad(loss(maj.fused_moe), (0, 1, 2))(x, first, second)
    for a, b in zip(got, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_weights_sharded_over_explicit_axes_are_refused():
    mesh = mesh_of(2, AxisType.Explicit)
    operands, _ = make_layer()
    sharded = jax.device_put(operands[1], NamedSharding(mesh, Spec("ep")))
    message = r"^fused_moe: w_gate_up must not be sharded over Explicit mesh axes; got .*shard_map"
    with pytest.raises(ValueError, match=message):
        maj.fused_moe(operands[0], sharded, *operands[2:])
    down = jax.device_put(operands[2], NamedSharding(mesh, Spec(None, "ep")))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"^fused_moe: w_down must not be"):
        jax.jit(lambda d: maj.fused_moe(*operands[:2], d, *operands[3:]))(down)


def test_weights_sharded_over_auto_axes_are_gathered():
    mesh = mesh_of(2, AxisType.Auto)
    operands, options = make_layer()
    place = NamedSharding(mesh, Spec("ep"))
    x, first, second, *routing = operands
    layer = jax.jit(maj.fused_moe)
    y = layer(x, jax.device_put(first, place), jax.device_put(second, place), *routing)
    assert error(y, wanted(operands, options)[0]) < 1e-5


@pytest.mark.parametrize("symbolic", [False, True])
def test_export(symbolic):
    operands, options = make_layer(routing="dropped")
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands]
    if symbolic:
        [tokens] = jax.export.symbolic_shape("tokens")
        for i in (0, 3, 4):
            shape = (tokens, *structs[i].shape[1:])
            structs[i] = jax.ShapeDtypeStruct(shape, structs[i].dtype)
    layer = jax.jit(functools.partial(maj.fused_moe, implementation="xla"))
    exported = jax.export.export(layer, platforms=("cpu", "cuda"))(*structs)
    y = jax.export.deserialize(exported.serialize()).call(*operands)
    assert error(y, wanted(operands, options)[0]) < 1e-5


# -- programs ---------------------------------------------------------------------------------------------


def lowered(layers, platform, tokens=256, implementation=None):
    """The module of so many equal layers, for bf16 weights that nobody has made."""
    like = jax.ShapeDtypeStruct
    x, ids = like((tokens, 256), "bfloat16"), like((tokens, 2), "int32")
    weights = like((tokens, 2), "float32")
    first, second = like((8, 256, 256), "bfloat16"), like((8, 128, 256), "bfloat16")

    def model(x, ids, weights, experts):
        for first, second in experts:
            x = x + maj.fused_moe(x, first, second, weights, ids, implementation=implementation)
        return x

    traced = jax.jit(model).trace(x, ids, weights, [(first, second)] * layers)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("tokens", [1, 256], ids=["pairs", "blocks"])
def test_sixty_equal_layers_lower_to_little_more_than_one(tokens):
    """The inner jits are lowered once: a further layer is a call of theirs."""
    one, sixty = (lowered(layers, "cuda", tokens) for layers in (1, 60))
    assert "mosaic_gpu" in one
    assert one.count("@mosaic_gpu") == sixty.count("@mosaic_gpu")
    assert len(sixty) < 1.5 * len(one)


def test_a_gpu_program_has_no_loop_and_no_scatter():
    text = lowered(1, "cuda")
    assert "mosaic_gpu" in text
    for operation in ("stablehlo.while", "stablehlo.scatter", "stablehlo.sort"):
        assert operation not in text, operation
    assert "stablehlo.while" in lowered(1, "cuda", implementation="xla")
    assert "stablehlo.while" in lowered(1, "cpu")


def kernels_of(model, transposed, batches=None, **options):
    """{(product, blocks, tiles)}: over batch sizes of up to 16384 tokens, those around which forms change
    among them. Of rows that are copied, the tiles of copied rows."""
    experts, top_k, hidden, ffn = model
    w_down = (experts, hidden, ffn) if transposed else (experts, ffn, hidden)
    ends = [
        int(mean * experts / top_k) + more
        for mean in (1 / 4, 16 / 3, 32 / 3, 36, 66, 80, 200, 270, 430)
        for more in (0, 1)
    ]
    spread = [*range(1, 130), *range(130, 1100, 9), *range(1100, 16385, 48)]
    usual = [1 << i for i in range(15)]
    found = set()
    for tokens in batches or [*spread, *usual, *(n for n in ends if 0 < n <= 16384)]:
        given = {"top_k": top_k, "transpose_rhs": transposed, "platform": "cuda"} | options
        form = maj.select_moe_implementation((tokens, hidden), w_down, **given).form
        blocks, first, second = form.split(", ")
        found |= {("first", blocks, first), ("second", blocks, second)}
    return found


OF_GPT_OSS = {"interleaved": True, "bias_gate_up": True, "bias_down": True}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "model",
    [
        *((128, 8, 2048, 768), (8, 2, 4096, 14336), (256, 8, 7168, 256), (128, 8, 4096, 512)),
        *((32, 4, 2880, 2880), (128, 4, 2880, 2880), (16, 2, 4096, 4096), (32, 1, 2048, 2048)),
        *((128, 8, 4096, 1536), (256, 8, 7168, 2048), (160, 8, 5120, 1536), (512, 10, 2048, 512)),
        *((16, 1, 5120, 8192), (128, 1, 5120, 8192), (64, 8, 3584, 2560), (384, 8, 7168, 256)),
    ],
    ids=str,
)
def test_a_model_takes_at_most_twelve_kernels(model, transposed):
    """Of both products, over its batch sizes; in either layout, and as GPT-OSS has gate, up and biases."""
    for options in ({}, OF_GPT_OSS):
        found = kernels_of(model, transposed, **options)
        assert 2 <= len(found) <= 12, sorted(found)


def test_few_tokens_have_few_forms_where_a_model_would_need_more_kernels():
    """GPT-OSS 120B would need 15, or with biases 14, for six forms of few tokens; the layers that were
    measured beside vLLM's keep theirs."""
    for options in ({}, OF_GPT_OSS):
        few = kernels_of((128, 4, 2880, 2880), True, range(1, 9), **options)
        assert {blocks for _, blocks, _ in few} == {"pairs"} and len(few) == 3
    for transposed, most in ((True, 3), (False, 2)):
        assert len(kernels_of((32, 1, 2048, 2048), transposed, range(1, 9))) == most
    assert len(kernels_of((256, 8, 7168, 256), True, range(1, 9))) == 4
    assert len(kernels_of((128, 8, 2048, 768), True, range(1, 5))) == 4


def test_a_form_is_that_of_the_kernels_that_run(monkeypatch):
    """Where rows are copied, by the first product's launch; of the emulator, which copies none."""
    x, ids, weights = (8192, 128), (8192, 2), (8, 128, 2560)
    like = jax.ShapeDtypeStruct
    operands = (like(x, "bfloat16"), like((8, 5120, 128), "bfloat16"), like(weights, "bfloat16"))
    operands = (*operands, like(ids, "float32"), like(ids, "int32"))
    built, build = [], kernel.build

    def recorded(problem, config, **options):
        built.append((problem.top_k, config.name))
        return build(problem, config, **options)

    monkeypatch.setattr(kernel, "build", recorded)
    layer = functools.partial(maj.fused_moe, transpose_rhs=True)
    jax.jit(layer).trace(*operands).lower(lowering_platforms=("cuda",))
    given = {"top_k": 2, "transpose_rhs": True, "platform": "cuda"}
    form = maj.select_moe_implementation(x, weights, **given).form
    assert [top_k for top_k, _ in built] == [0, 0]
    assert form.split(", ")[1:] == [name for _, name in built]


def test_largest_blocks_by_the_number_of_experts():
    """Means just above and far above 270 rows; e4m3 has powers of two, and biases tiles of one height."""

    def found(experts, **dtype):
        means = (271, 1024, 1057, 4096)
        given = {"top_k": 1, "num_experts": experts} | dtype
        return {maj.moe_block_size(mean * experts, **given) for mean in means}

    assert found(1) == found(8) == {176}
    assert found(9) == found(16) == {192}
    assert found(17) == found(256) == {144} and found(128) == {144, 184, 192}
    assert found(8, dtype="float8_e4m3fn") == found(17, dtype="float8_e4m3fn") == {128}
    shapes = {"x_shape": (8192, 512), "w_down_shape": (64, 512, 512), "top_k": 4}
    tanh = {"activation": "gelu_tanh", "gated": False}
    for options in ({"bias_gate_up": True}, {"bias_down": True}, tanh):
        form = maj.select_moe_implementation(**shapes, **options, platform="cuda").form
        assert form.startswith("blocks of 128, 128x256x64s4m")
    form = maj.select_moe_implementation(**shapes, platform="cuda").form
    assert form.startswith("blocks of 144") and form.count("late-finds") == 2


def test_block_size_is_what_fused_moe_takes():
    for tokens in (3, 40, 300):
        operands, _ = make_layer(tokens, dtype="bfloat16")
        rows = maj.moe_block_size(tokens, top_k=2, num_experts=4)
        aligned = maj.moe_align_block_size(
            operands[4], block_size=rows, num_experts=4, return_inverse=True
        )
        y = maj.fused_moe(*operands, aligned=aligned, block_size=rows)
        own = maj.fused_moe(*operands)
        assert np.asarray(y).tobytes() == np.asarray(own).tobytes()


def test_without_alignment_where_vllm_leaves_it_out():
    assert plan.without_alignment(32, 128) and not plan.without_alignment(33, 128)
    text = lowered(1, "cpu", tokens=1)
    assert "stablehlo.sort" not in text and "stablehlo.sort" in lowered(1, "cpu", tokens=2)


def test_select_moe_implementation():
    shapes = {"x_shape": (128, 2048), "w_down_shape": (128, 768, 2048), "top_k": 8}
    on_gpu = maj.select_moe_implementation(**shapes, platform="cuda")
    assert on_gpu.implementation == "mosaic_gpu" and on_gpu.form.startswith("blocks of 16, ")
    assert set(on_gpu.reasons) == {"xla", "emulator"}
    on_cpu = maj.select_moe_implementation(**shapes, platform="cpu")
    assert on_cpu[:2] == ("xla", "blocks of 16, loop")
    assert "run on NVIDIA GPUs only" in on_cpu.reasons["mosaic_gpu"]
    wide = maj.select_moe_implementation(**shapes, platform="cuda", dtype="float32")
    assert wide.implementation == "xla" and "float32" in wide.reasons["mosaic_gpu"]
    odd = maj.select_moe_implementation((128, 2044), (128, 768, 2044), top_k=8, platform="cuda")
    assert odd.implementation == "xla" and "multiple of 8" in odd.reasons["mosaic_gpu"]
    given = maj.select_moe_implementation(
        (1, 64), (64, 32, 64), top_k=1, has_aligned=True, block_size=16, platform="cuda"
    )
    assert given.form.startswith("blocks of 16")
    message = "^select_moe_implementation: implementation must be one that can run here"
    with pytest.raises(NotImplementedError, match=message):
        maj.select_moe_implementation(**shapes, platform="cpu", implementation="mosaic_gpu")


# -- errors -------------------------------------------------------------------------------------------------


def replaced(**changes):
    """A call of a right layer with other arguments."""
    operands, _ = make_layer()
    names = ("x", "w_gate_up", "w_down", "topk_weights", "topk_ids")
    return dict(zip(names, operands, strict=True)) | changes


ERRORS = {
    "x": (lambda: {"x": jnp.zeros((13, 24), jnp.int32)}, TypeError, "x must be one of"),
    "x_axes": (lambda: {"x": np.zeros((2, 13, 24), np.float32)}, ValueError, r"x must have shape"),
    "w_dtype": (
        lambda: {"w_down": jnp.zeros((4, 16, 24), jnp.bfloat16)},
        TypeError,
        "w_down must have the dtype of x, float32",
    ),
    "w_transposed": (
        lambda: {"transpose_rhs": True},
        ValueError,
        r"w_gate_up must have shape \[E, 2 N, H\] with H = 24",
    ),
    "w_down": (
        lambda: {"w_down": np.zeros((4, 24, 16), np.float32)},
        ValueError,
        r"w_down must have shape \[E, N, H\] = \[4, 16, 24\], as w_gate_up has",
    ),
    "no_experts": (
        lambda: {
            "w_gate_up": np.zeros((0, 24, 32), np.float32),
            "w_down": np.zeros((0, 16, 24), np.float32),
        },
        ValueError,
        "w_gate_up must hold at least one expert",
    ),
    "odd": (
        lambda: {"w_gate_up": np.zeros((4, 24, 33), np.float32)},
        ValueError,
        "w_gate_up must have shape",
    ),
    "pair": (
        lambda: {"w_gate_up": (np.zeros((4, 24, 16), np.float32),)},
        ValueError,
        r"w_gate_up must be an array or a pair \(gate, up\)",
    ),
    "pair_shapes": (
        lambda: {
            "w_gate_up": (np.zeros((4, 24, 16), np.float32), np.zeros((4, 24, 8), np.float32))
        },
        ValueError,
        r"w_gate_up\[1\] must have the shape of gate",
    ),
    "pair_not_gated": (
        lambda: {"w_gate_up": (np.zeros((4, 24, 16), np.float32),) * 2, "gated": False},
        ValueError,
        "w_gate_up must be one array",
    ),
    "activation": (lambda: {"activation": "swish"}, ValueError, "activation must be None or one"),
    "interleaved": (
        lambda: {"activation": "relu2", "gated": False, "interleaved": True},
        ValueError,
        "interleaved must be False",
    ),
    "limit": (
        lambda: {"activation": "gelu", "swiglu_limit": 7.0},
        ValueError,
        "swiglu_limit must be None",
    ),
    "bias": (
        lambda: {"bias_gate_up": np.zeros((4, 16), np.float32)},
        ValueError,
        r"bias_gate_up must have shape \[4, 32\]",
    ),
    "bias_down": (
        lambda: {"bias_down": jnp.zeros((4, 24), jnp.int32)},
        TypeError,
        "bias_down must be a float array",
    ),
    "ids": (lambda: {"topk_ids": jnp.zeros((13, 2))}, TypeError, "topk_ids must be an integer"),
    "ids_list": (lambda: {"topk_ids": [[0, 1]] * 13}, TypeError, "topk_ids must be an integer"),
    "ids_shape": (
        lambda: {"topk_ids": jnp.zeros((12, 2), jnp.int32)},
        ValueError,
        r"topk_ids must have shape \[T, K\] with T = 13",
    ),
    "weights": (
        lambda: {"topk_weights": jnp.zeros((13, 2), jnp.int32)},
        TypeError,
        "topk_weights must be a float array",
    ),
    "weights_shape": (
        lambda: {"topk_weights": np.zeros((13, 3), np.float32)},
        ValueError,
        r"topk_weights must have the shape of topk_ids, \[13, 2\]",
    ),
    "flag": (lambda: {"weights_on_input": 1}, TypeError, "weights_on_input must be a static bool"),
    "counts": (
        lambda: {"return_tokens_per_expert": None},
        TypeError,
        "return_tokens_per_expert must be a static bool",
    ),
    "map": (
        lambda: {"expert_map": np.zeros(3, np.int32)},
        ValueError,
        r"expert_map must have shape \[G\] with G at least 4",
    ),
    "valid": (lambda: {"num_valid_tokens": 1.5}, TypeError, "num_valid_tokens must be an integer"),
    "valid_shape": (
        lambda: {"num_valid_tokens": jnp.zeros(2, jnp.int32)},
        ValueError,
        "num_valid_tokens must be a scalar",
    ),
    "block": (lambda: {"block_size": 0}, ValueError, "block_size must be at least 1"),
    "dtype": (
        lambda: {"preferred_element_type": "int8"},
        TypeError,
        "preferred_element_type must be None or one of",
    ),
    "implementation": (
        lambda: {"implementation": "triton"},
        ValueError,
        "implementation must be None or one of",
    ),
    "aligned_block": (
        lambda: {"aligned": align()},
        ValueError,
        "block_size must be given with aligned",
    ),
    "aligned_other_block": (
        lambda: {"aligned": align(), "block_size": 16},
        ValueError,
        "block_size must be the alignment's",
    ),
    "aligned_inverse": (
        lambda: {"aligned": align()._replace(row_of_pair=None), "block_size": 8},
        ValueError,
        "aligned.row_of_pair must be there",
    ),
    "aligned_pairs": (
        lambda: {"aligned": align(12), "block_size": 8},
        ValueError,
        "aligned.row_of_pair must be int32 and of 26 pairs",
    ),
    "aligned_map": (
        lambda: {"aligned": align(), "block_size": 8, "expert_map": np.arange(4)},
        ValueError,
        "expert_map must be left out with aligned",
    ),
    "aligned_valid": (
        lambda: {"aligned": align(), "block_size": 8, "num_valid_tokens": 3},
        ValueError,
        "num_valid_tokens must be left out with aligned",
    ),
}


def align(tokens=13):
    ids = np.zeros((tokens, 2), np.int32)
    return maj.moe_align_block_size(ids, block_size=8, num_experts=4, return_inverse=True)


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument_and_a_remedy(name):
    changes, kind, text = ERRORS[name]
    with pytest.raises(kind, match=rf"^fused_moe: {text}.*; got .*\. .+\.?$"):
        maj.fused_moe(**replaced(**changes()))


def test_one_matrix_in_place_of_gate_and_up_is_told_apart_from_transposed_ones():
    """The remedy spoke of transpose_rhs alone."""
    for changes, remedy in (
        (
            {"w_down": np.zeros((4, 32, 24), np.float32)},
            "holds gate and up, 2 N columns: pass gated=False",
        ),
        ({"activation": None}, "holds gate and up only with gated=True and an activation"),
        ({"w_down": np.zeros((4, 24, 16), np.float32)}, "Both follow transpose_rhs"),
    ):
        with pytest.raises(ValueError, match=rf"^fused_moe: w_down must .*; got .*\. .*{remedy}"):
            maj.fused_moe(**replaced(**changes))


def test_a_named_implementation_that_cannot_run():
    message = r"^fused_moe: implementation must be one that can run here; got 'mosaic_gpu'"
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match=message):
            maj.fused_moe(**replaced(implementation="mosaic_gpu"))
    with pytest.raises(NotImplementedError, match="float32"):
        lowered_float32 = jax.jit(functools.partial(maj.fused_moe, implementation="mosaic_gpu"))
        operands, _ = make_layer(70)
        lowered_float32.trace(*operands).lower(lowering_platforms=("cuda",))


def test_more_than_memory_holds():
    like = jax.ShapeDtypeStruct
    tokens = 1 << 27
    shapes = [(tokens, 1 << 22), (1, 1 << 22, 8), (1, 4, 1 << 22)]
    floats = [like(s, "bfloat16") for s in shapes]
    routing = [like((tokens, 1), "float32"), like((tokens, 1), "int32")]
    with pytest.raises(ValueError, match="^fused_moe: the result must fit the .* of a device"):
        jax.eval_shape(maj.fused_moe, *floats, *routing)


@pytest.mark.parametrize("traced", [False, True])
def test_ids_that_are_weights_have_the_same_remedy_under_jit(traced):
    """What jit traces is an array, and not one that a framework wraps."""
    operands = replaced(topk_ids=replaced()["topk_weights"])
    layer = jax.jit(maj.fused_moe) if traced else maj.fused_moe
    with pytest.raises(TypeError, match=r"^fused_moe: topk_ids .* Pass the expert ids that top_k"):
        layer(**operands)
