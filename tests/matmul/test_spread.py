"""The kernel that copies tokens' rows to those of their pairs, ahead of a product: against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from moe_align_jax._grouped_matmul import (
    choose_tiles,
    derivative,
    launch,
    reference,
    spread,
    spread_kernel,
    token_rows,
)
from moe_align_jax._grouped_matmul import config as tiles
from moe_align_jax._grouped_matmul.problem import MatmulProblem, Weights
from moe_align_jax._moe_layer.plan import LayerProblem


def routed(tokens, top_k, experts, block, seed=0, dropped=0.0):
    """The alignment of a random routing."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    ids = np.where(rng.random(ids.shape) < dropped, -1, ids)
    return maj.moe_align_block_size(
        jnp.asarray(ids), block_size=block, num_experts=experts, return_inverse=True
    )


def check(
    tokens, top_k, experts, width, block, *, interpret, config=None, dropped=0.0, dtype="bfloat16"
):
    """Each row of a pair is its token's."""
    aligned = routed(tokens, top_k, experts, block, dropped=dropped)
    ids, used = np.asarray(aligned.sorted_token_ids), int(aligned.num_tokens_post_padded[0])
    problem = spread.Spread(tokens, top_k, len(ids), width, dtype)
    assert spread.unsupported(problem) is None
    config = config or spread.config_for(problem)
    launched = spread_kernel.build(problem, config, interpret=interpret)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((tokens, width), np.float32), dtype)
    with jax.enable_x64(False):
        given = jnp.asarray(aligned.row_of_pair, jnp.int32), x.reshape(problem.grained(tokens))
        # Without a GPU as it is: the interpreter works by callbacks.
        run = launched if interpret else jax.jit(lambda *given: launched(*given)[:used])
        out = np.asarray(run(*given))[:used].reshape(used, width)
    real = (ids[:used] >= 0) & (ids[:used] < tokens * top_k)
    assert real.sum() == (np.asarray(aligned.row_of_pair) >= 0).sum() > 0
    want = np.asarray(x)[ids[:used][real] // top_k]
    assert out[real].tobytes() == want.tobytes()


SMALL = spread.SpreadConfig(3, 1, 2)


@pytest.mark.parametrize(
    ("sizes", "more"),
    [
        ((13, 2, 3, 64, 16), {}),
        ((13, 2, 3, 64, 16), {"dropped": 0.4}),
        ((40, 3, 5, 576, 24), {}),
        ((5, 1, 4, 256, 8), {"dtype": "float16"}),
        ((9, 4, 4, 192, 16), {}),
        ((1, 2, 2, 64, 8), {}),
    ],
)
def test_in_the_interpreter(sizes, more):
    check(*sizes, interpret=True, config=SMALL, **more)


@pytest.mark.gpu
@pytest.mark.parametrize("dropped", [0.0, 0.3])
@pytest.mark.parametrize(
    "sizes",
    [(8192, 8, 128, 2048, 184), (3000, 2, 8, 4096, 176), (700, 6, 32, 2880, 144), (5, 1, 3, 64, 8)],
)
def test_on_a_gpu(sizes, dropped):
    check(*sizes, interpret=False, dropped=dropped)


def problem_of(tokens, top_k, experts, hidden, ffn, block, rows):
    lie = Weights(True, activation="silu", gated=True)
    given = ("test", "blocks", rows, hidden, ffn, experts, "bfloat16", "bfloat16", lie, block)
    more = {"zero_padding": False, "leaves_padding": True, "inverse": True}
    return MatmulProblem(*given, num_tokens=tokens, top_k=top_k, **more)


def test_the_product_of_copied_rows():
    """The same as of a gather within the product; what rows of no pair hold reaches no row of a pair."""
    aligned = routed(40, 2, 3, 16)
    ids, used, row_of_pair = aligned[0], aligned[2], aligned.row_of_pair
    problem = problem_of(40, 2, 3, 64, 64, 16, ids.shape[0])
    rng = np.random.default_rng(2)
    x, w = (
        jnp.asarray(rng.standard_normal(shape, np.float32), "bfloat16")
        for shape in ((40, 64), (3, 128, 64))
    )
    operands = (x, w, ids, aligned.expert_ids, used, row_of_pair.reshape(40, 2))
    named = dict(zip(problem.inputs, operands, strict=True))
    small = pytest.MonkeyPatch()
    with small.context() as patch:
        patch.setattr(spread, "config_for", lambda problem: SMALL)
        first, changed = launch.spread_out(problem, named, interpret=True)
    assert first.inputs["x"][0] == (problem.num_rows, 64) and not first.inverse
    found = reference.grouped_matmul(first, *[changed[name] for name in first.inputs])
    want = reference.grouped_matmul(problem, *operands)
    real = (np.asarray(ids) >= 0) & (np.asarray(ids) < 80)
    assert np.asarray(found)[real].tobytes() == np.asarray(want)[real].tobytes()


@pytest.mark.parametrize("gated", [True, False], ids=["gate and up", "down"])
def test_rows_of_no_pair_reach_no_row_of_a_pair(gated):
    """The kernel in the interpreter, where such rows are NaN: those behind an expert's pairs are loaded with
    a tile, of one height or of several."""
    aligned = routed(150, 2, 3, 144, dropped=0.3)
    ids = np.asarray(aligned.sorted_token_ids)
    real = (ids >= 0) & (ids < 300)
    assert not real[: np.flatnonzero(real)[-1]].all()
    problem = problem_of(150, 2, 3, 128, 128, 144, len(ids)).permuted
    if not gated:
        problem = problem._replace(weights=Weights(True))
    several = tiles.Config("swap", 144, 256, 64, 3, group=2, num_ctas=2, exact=True, finds=True)
    several = several._replace(heights=(144, 136, 128, 120, 104), trims=True, late=True)
    one = tiles.Config("swap", 144, 256, 64, 3, group=2, num_ctas=2)
    rng = np.random.default_rng(4)
    x, w = (
        jnp.asarray(rng.standard_normal(shape, np.float32), "bfloat16")
        for shape in ((len(ids), 128), problem.inputs["w"][0])
    )
    rows = jnp.where(real[:, None], x, jnp.nan)
    operands = rows, w, *(aligned[at] for at in range(3))
    want = reference.grouped_matmul(problem, *operands)
    want = np.asarray(want)[real].astype(np.float32)
    assert np.isfinite(want).all() and want.any()
    for config in (several, one):
        found = launch.run(problem, *operands, interpret=True, config=config)
        found = np.asarray(found)[real].astype(np.float32)
        assert np.abs(found - want).max() < 5e-3 * np.abs(want).max(), config.name


def lowered(change, tokens=7000):
    """How often the copy's kernel is in a program for a GPU: of a layer that `change` has made another."""
    like = jax.ShapeDtypeStruct
    x, first = like((tokens, 64), "bfloat16"), like((128, 1536, 64), "bfloat16")
    last, ids = like((128, 64, 768), "bfloat16"), like((tokens, 8), "int32")
    weights = like((tokens, 8), "float32")
    layer = functools.partial(maj.fused_moe, transpose_rhs=True)
    traced = jax.jit(change(layer)).trace(x, first, last, weights, ids)
    return traced.lower(lowering_platforms=("cuda",)).as_text().count("spread_rows")


def test_which_programs_have_the_copy():
    """In a derivative the forward pass has none; the backward pass copies x and the result's cotangent."""

    def mean(layer):
        return lambda *given: jnp.mean(layer(*given).astype(jnp.float32))

    once = lowered(lambda layer: layer)
    assert once > 0
    for change in (
        lambda layer: lambda x, *rest: layer(layer(x, *rest), *rest),
        lambda layer: lambda x, *rest: jax.lax.map(lambda one: layer(one, *rest), x[None]),
        lambda layer: functools.partial(layer, num_valid_tokens=5),
    ):
        assert lowered(change) == once
    backward = lowered(lambda layer: jax.grad(mean(layer), argnums=(0, 1, 2)))
    assert backward > 0
    assert backward == lowered(
        lambda layer: jax.grad(jax.checkpoint(mean(layer)), argnums=(0, 1, 2))
    )
    assert not lowered(lambda layer: jax.grad(mean(layer), argnums=(0, 1, 2)), tokens=5000)
    assert not lowered(lambda layer: layer, tokens=5000)


def test_the_derivative_is_the_same():
    """Of a product that knows the rows of pairs, as of one that does not."""
    aligned = routed(12, 2, 3, 16)
    ids, used, row_of_pair = aligned[0], aligned[2], aligned.row_of_pair
    problem = problem_of(12, 2, 3, 64, 64, 16, ids.shape[0])
    rng = np.random.default_rng(3)
    x, w, ct = (
        jnp.asarray(rng.standard_normal(shape, np.float32), "bfloat16")
        for shape in ((12, 64), (3, 128, 64), (ids.shape[0], 64))
    )
    where = (ids, aligned.expert_ids, used, row_of_pair.reshape(12, 2))

    def gradients(problem, where):
        def loss(x, w):
            y = derivative.run((x, w, *where), problem=problem, implementation="xla")
            return jnp.sum(y.astype(jnp.float32) * ct.astype(jnp.float32))

        return jax.grad(loss, (0, 1))(x, w)

    found = gradients(problem, where)
    want = gradients(problem._replace(inverse=False), where[:3])
    for a, b in zip(found, want, strict=True):
        assert np.asarray(a).any() and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens", "hidden", "ffn", "first"),
    [
        (128, 8, 8192, 2048, 768, True),
        (8, 2, 8192, 4096, 14336, True),
        (32, 4, 8192, 2880, 2880, True),
        (256, 8, 8192, 7168, 256, False),  # two tiles of columns
        (128, 8, 4096, 2048, 768, False),  # few rows of an expert
        (8, 2, 1024, 4096, 14336, True),  # in place of XLA's gather
    ],
)
def test_which_products_take_it(experts, top_k, tokens, hidden, ffn, first):
    block = maj.moe_block_size(tokens, top_k=top_k, num_experts=experts)
    rows = tokens * top_k + experts * (block - 1)
    problem = problem_of(tokens, top_k, experts, hidden, ffn, block, rows)
    assert choose_tiles.spreads_first(problem, "NVIDIA H200") is first
    assert not choose_tiles.spreads_first(problem._replace(inverse=False), "NVIDIA H200")
    assert not choose_tiles.spreads_first(problem._replace(leaves_padding=False), "NVIDIA H200")
    assert not choose_tiles.spreads_first(problem.permuted, "NVIDIA H200")


def test_which_layers_know_the_rows():
    """Those with an alignment, whose x has a row per token."""
    lie = Weights(True, activation="silu", gated=True)
    sizes = (64, 2, 128, 256, 8, "bfloat16", "bfloat16", lie, False)
    layer = LayerProblem(*sizes, False, 16, 256, False, False)
    assert layer.spreads
    assert not layer._replace(weights_on_input=True).spreads
    assert layer._replace(weights_on_input=True, top_k=1).spreads
    assert not layer._replace(pairs=True, block_size=1).spreads
    assert not layer.first.inverse  # which a launch from PyTorch takes, too


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens", "hidden", "ffn", "copies"),
    [
        (128, 8, 32768, 4096, 512, True),
        (128, 8, 8192, 2048, 768, True),
        (8, 2, 8192, 4096, 14336, True),
        (128, 8, 4096, 2048, 768, False),  # few rows of an expert
        (64, 8, 8192, 7168, 256, False),  # few columns
    ],
)
def test_which_backward_passes_copy_rows(experts, top_k, tokens, hidden, ffn, copies):
    lie = Weights(activation="silu", gated=True)
    block = maj.moe_block_size(tokens, top_k=top_k, num_experts=experts)
    rows = tokens * top_k + experts * (block - 1)
    sizes = (tokens, top_k, hidden, ffn, experts, "bfloat16", "bfloat16", lie, False)
    layer = LayerProblem(*sizes, False, block, rows, False, False)
    want = spread.Spread(tokens, top_k, rows, hidden, "bfloat16")
    assert layer.copies == (want if copies else None)
    assert layer._replace(dtype="float32").copies is None
    assert layer._replace(weights_on_input=True).copies is None


@pytest.mark.parametrize("implementation", [None, "emulator"])
def test_rows_copied_for_several_readers(implementation):
    """Each row of a pair is its token's; a token's cotangent is the sum of those of its rows alone."""
    aligned = routed(12, 2, 3, 16, dropped=0.2)
    ids, row_of = np.asarray(aligned.sorted_token_ids), np.asarray(aligned.row_of_pair)
    problem = spread.Spread(12, 2, len(ids), 64, "bfloat16")
    rng = np.random.default_rng(4)
    tokens, ct = (
        jnp.asarray(rng.integers(-8, 8, (n, 64)), jnp.bfloat16) for n in (12, problem.num_rows)
    )
    given = jnp.asarray(row_of.reshape(12, 2)), jnp.asarray(ids)

    def copy(tokens):
        return token_rows.run(tokens, *given, problem=problem, implementation=implementation)

    rows, pull = jax.vjp(copy, tokens)
    real = (ids >= 0) & (ids < 24)
    assert 0 < real.sum() < 24
    np.testing.assert_array_equal(np.asarray(rows)[real], np.asarray(tokens)[ids[real] // 2])
    [found] = pull(jnp.where(real[:, None], ct, jnp.nan))
    want = np.zeros((12, 64), np.float32)
    np.add.at(want, ids[real] // 2, np.asarray(ct, np.float32)[real])
    np.testing.assert_array_equal(np.asarray(found, np.float32), want)


def test_what_it_takes():
    given = spread.Spread(8, 2, 64, 2048, "bfloat16")
    assert spread.unsupported(given) is None
    for change in (
        {"dtype": "float32"},
        {"width": 72},
        {"width": 1 << 15},
        {"num_tokens": "T"},
        {"top_k": 65},
        {"num_rows": 0},
    ):
        assert spread.unsupported(given._replace(**change)), change
    for width in (64, 2048, 2880, 4096, 7168):
        problem = given._replace(width=width)
        sizes = spread.config_for(problem)
        shape = problem.grained(1)
        assert shape[1] * shape[2] == width and max(shape) <= 256
        assert 3 * 2 * width * sizes.slots <= 227 * 1024 - 3 * 2048  # of three CTAs
        assert 0 < sizes.ahead < sizes.slots
