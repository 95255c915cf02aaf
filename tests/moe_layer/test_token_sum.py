"""The second product of a layer of pairs, which sums up each token's pairs: in the interpreter and on a GPU.

What it must give is computed in float64, a pair at a time. Dropped pairs have NaN in their row of x and in
their weight.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from moe_align_jax._grouped_matmul import token_sum_config, token_sum_kernel
from moe_align_jax._grouped_matmul.problem import MatmulProblem, TokenSum, Weights
from moe_align_jax._grouped_matmul.token_sum_config import Tiles
from moe_align_jax._moe_layer import forms, token_sum
from tests.matmul.oracle import error
from tests.moe_layer.test_moe_layer import make_layer, wanted

PLAIN = Tiles(1, 128, 6, num_ctas=2)
BOUND = {"bfloat16": 4e-3, "float16": 6e-4, "float32": 2e-6}


def make(
    tokens: int,
    top_k: int,
    experts: int,
    k: int,
    n: int,
    *,
    transposed: bool = True,
    bias: bool = False,
    dtype: str = "bfloat16",
    out: str = "bfloat16",
    dropped: bool = True,
) -> tuple[TokenSum, list[Any], np.ndarray]:
    """(Problem, its operands, the float64 result)."""
    rng = np.random.default_rng(0)
    pairs = tokens * top_k
    ids = rng.integers(-2 * dropped, experts + 2 * dropped, (tokens, top_k)).astype(np.int32)
    if dropped and tokens > 1:
        ids[0] = (-1, experts, *[-7] * top_k)[:top_k]  # a token without an expert
    ids = ids.reshape(-1)
    there = (ids >= 0) & (ids < experts)
    x = rng.standard_normal((pairs, k), np.float32)
    shares = rng.uniform(-1, 1, pairs).astype(np.float32)
    x[~there], shares[~there] = np.nan, np.nan
    shape = (experts, n, k) if transposed else (experts, k, n)
    x = x.astype(jnp.dtype(dtype))
    w = (rng.standard_normal(shape, np.float32) * k**-0.5).astype(jnp.dtype(dtype))
    biases = rng.standard_normal((experts, n), np.float32)
    want = np.zeros((tokens, n))
    for pair in np.flatnonzero(there):
        matrix = w[ids[pair]].astype(np.float64)
        row = x[pair].astype(np.float64) @ (matrix.T if transposed else matrix)
        want[pair // top_k] += shares[pair] * (row + bias * biases[ids[pair]])
    product = MatmulProblem(
        *("test", "blocks", pairs, k, n, experts, dtype, dtype, Weights(transposed, bias=bias)),
        block_size=1,
        num_pairs=pairs,
        zero_padding=False,
        all_rows=True,
    )
    problem = TokenSum(product, tokens, top_k, out)
    named = {"x": x, "w": w, "bias": biases, "expert_ids": ids}
    named["topk_weights"] = shares.reshape(tokens, top_k)
    return problem, [jnp.asarray(named[name]) for name in problem.inputs], want


def check(given, tiles: Tiles | None, *, interpret: bool) -> None:
    problem, operands, want = given
    run = functools.partial(token_sum_kernel.run, problem, tiles=tiles, interpret=interpret)
    run = jax.jit(run)
    poison = jnp.full(problem.out_shape, jnp.nan, problem.out_dtype)
    jax.block_until_ready(poison).delete()  # the allocator gives this memory to the result
    got = np.asarray(run(*operands))
    if not interpret:
        for _ in range(3):
            assert np.asarray(run(*operands)).tobytes() == got.tobytes()
    without = ~want.any(axis=1)
    assert not got[without].any()
    # Products are not rounded before they are summed up.
    assert error(got, want) < BOUND[problem.out_dtype]


CASES: dict[str, tuple[dict[str, Any], Tiles]] = {
    "usual": ({"tokens": 3, "top_k": 3, "experts": 5, "k": 256, "n": 128}, PLAIN),
    "columns end in a tile": ({"tokens": 1, "top_k": 4, "experts": 9, "k": 64, "n": 200}, PLAIN),
    "not transposed": (
        {"tokens": 2, "top_k": 2, "experts": 4, "k": 192, "n": 64, "transposed": False},
        PLAIN,
    ),
    "two pairs together": (
        {"tokens": 3, "top_k": 4, "experts": 5, "k": 192, "n": 72, "bias": True},
        PLAIN._replace(pairs=2),
    ),
    "two of three pairs": (
        {"tokens": 3, "top_k": 3, "experts": 5, "k": 128, "n": 96},
        PLAIN._replace(pairs=2),
    ),
    "four of six pairs": (
        {"tokens": 3, "top_k": 6, "experts": 5, "k": 128, "n": 40, "bias": True},
        PLAIN._replace(pairs=4),
    ),
    "bias": ({"tokens": 3, "top_k": 2, "experts": 4, "k": 128, "n": 72, "bias": True}, PLAIN),
    "few columns": ({"tokens": 1, "top_k": 2, "experts": 4, "k": 64, "n": 8, "bias": True}, PLAIN),
    "float32": (
        {"tokens": 2, "top_k": 3, "experts": 4, "k": 320, "n": 64, "out": "float32"},
        PLAIN._replace(bk=64, stages=2),
    ),
    "float16": (
        {"tokens": 2, "top_k": 3, "experts": 4, "k": 256, "n": 64}
        | {"dtype": "float16", "out": "float16"},
        PLAIN._replace(bk=256, stages=2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_sums_in_the_interpreter(name):
    sizes, tiles = CASES[name]
    check(make(**sizes), tiles, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_sums_on_a_gpu(name):
    sizes, tiles = CASES[name]
    check(make(**sizes), tiles, interpret=False)


# Shapes of models, in the usual tiles and in others.
ON_A_GPU: dict[str, tuple[dict[str, Any], Tiles | None]] = {}
for tiles in (None, Tiles(1, 128, 12), Tiles(2, 256, 3), Tiles(4, 384, 2), Tiles(4, 64, 6, 5)):
    for name, sizes in {
        "DeepSeek": {"tokens": 1, "top_k": 8, "experts": 16, "k": 256, "n": 7168},
        "Qwen3": {"tokens": 2, "top_k": 8, "experts": 16, "k": 768, "n": 2048},
        "Mixtral": {"tokens": 1, "top_k": 2, "experts": 8, "k": 14336, "n": 4096},
        "GPT-OSS": {"tokens": 2, "top_k": 4, "experts": 8, "k": 2880, "n": 2880, "bias": True},
        "K = 6, bias": {"tokens": 9, "top_k": 6, "experts": 8, "k": 320, "n": 200, "bias": True},
        "many tokens": {"tokens": 40, "top_k": 8, "experts": 16, "k": 256, "n": 1024},
    }.items():
        if tiles is None or tiles.pairs <= sizes["top_k"]:
            ON_A_GPU[f"{name}, {tiles.name if tiles else 'usual'}"] = sizes, tiles


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_models_on_a_gpu(name):
    sizes, tiles = ON_A_GPU[name]
    check(make(**sizes), tiles, interpret=False)


# -- within the layer ------------------------------------------------------------------------------

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {"tokens": 1, "experts": 8},
    "dropped": {"tokens": 2, "experts": 16, "routing": "dropped"},
    "no expert at all": {"tokens": 1, "experts": 8, "routing": "none"},
    "biases": {"tokens": 2, "experts": 16, "routing": "dropped", "bias": True},
    "not gated": {"tokens": 1, "experts": 8, "gated": False, "activation": "relu2"},
    "weights on input": {"tokens": 1, "experts": 8, "weights_on_input": True, "bias": True},
    "expert map, valid tokens": {
        **{"tokens": 4, "experts": 4, "experts_of_ids": 32, "routing": "dropped"},
        **{"expert_map": np.array([-1, 2, 0, -1, 3, 1, 9, -5] * 4), "num_valid_tokens": 3},
    },
    "float32 result": {"tokens": 1, "experts": 8, "preferred_element_type": "float32"},
    "not transposed": {"tokens": 1, "experts": 8, "transpose_rhs": False, "hidden": 128},
    # Gate and up in narrow tiles.
    "narrow": {"tokens": 2, "experts": 16, "routing": "dropped", "hidden": 128, "ffn": 128},
    "narrow, pair": {"tokens": 1, "experts": 8, "hidden": 256, "pair": True, "bias": True},
    "narrow, interleaved": {
        **{"tokens": 1, "experts": 8, "hidden": 128, "interleaved": True, "bias": True},
        **{"swiglu_limit": 0.7, "swiglu_alpha": 1.702},
    },
}


def layer(name: str) -> tuple[tuple, dict[str, Any]]:
    given = {"transpose_rhs": True, "hidden": 72, "ffn": 64} | LAYERS[name]
    return make_layer(top_k=2, dtype="bfloat16", **given)


@pytest.fixture
def runs(monkeypatch) -> list[TokenSum]:
    """The problems that the kernel was run for."""
    found, usual = [], token_sum_kernel.run

    def run(problem, *operands, **options):
        found.append(problem)
        return usual(problem, *operands, **options)

    monkeypatch.setattr(token_sum_kernel, "run", run)
    jax.clear_caches()  # of traces with another run
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_pairs(runs, name):
    operands, options = layer(name)
    got = maj.fused_moe(*operands, implementation="emulator", **options)
    want, pairs = wanted(operands, options)
    assert [problem.num_tokens for problem in runs] == [len(want)]
    assert got.dtype == options.get("preferred_element_type", "bfloat16")
    assert error(got, want) < 5e-3 if pairs.any() else not np.any(got)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_pairs_on_a_gpu(name):
    operands, options = layer(name)
    run = jax.jit(functools.partial(maj.fused_moe, implementation="mosaic_gpu", **options))
    got = np.asarray(run(*operands))
    want, pairs = wanted(operands, options)
    assert error(got, want) < 5e-3 if pairs.any() else not np.any(got)
    assert np.asarray(run(*operands)).tobytes() == got.tobytes()


def check_few_forms(monkeypatch, name: str, implementation: str) -> None:
    """A layer with the tiles of the fewest forms, as if its model would need too many kernels."""
    monkeypatch.setattr(forms, "MOST_KERNELS", 0)
    if name == "one pair of a token":  # two CTAs share each of more tiles than are taken at once
        sizes = {"tokens": 8, "top_k": 1, "experts": 32, "hidden": 1280, "ffn": 768}
        operands, options = make_layer(**sizes, dtype="bfloat16", transpose_rhs=True)
    else:
        operands, options = layer(name)
    run = jax.jit(functools.partial(maj.fused_moe, implementation=implementation, **options))
    got = np.asarray(run(*operands))
    want, _ = wanted(operands, options)
    assert np.any(want) and error(got, want) < 5e-3
    if implementation == "mosaic_gpu":
        assert all(np.asarray(run(*operands)).tobytes() == got.tobytes() for _ in range(3))


@pytest.mark.parametrize("name", ["dropped", "narrow, interleaved"])
def test_layers_in_few_forms(monkeypatch, name):
    check_few_forms(monkeypatch, name, "emulator")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dropped", "expert map, valid tokens", "one pair of a token"])
def test_layers_in_few_forms_on_a_gpu(monkeypatch, name):
    check_few_forms(monkeypatch, name, "mosaic_gpu")


@pytest.mark.parametrize("name", ["dropped", "biases", "weights on input"])
def test_derivatives(name):
    """They are those of "xla", which makes products and sums after each other."""
    operands, options = layer(name)
    x, first, down, shares, ids = operands
    shares = jnp.nan_to_num(shares)

    def loss(implementation, *floats):
        run = functools.partial(maj.fused_moe, implementation=implementation, **options)
        return jnp.sum(jnp.sin(run(*floats, ids).astype(jnp.float32)))

    grad = jax.grad(loss, argnums=(1, 2, 3, 4))
    got, want = (grad(name, x, first, down, shares) for name in ("emulator", "xla"))
    for mine, theirs in zip(got, want, strict=True):
        assert np.any(theirs) and error(mine, np.asarray(theirs, np.float64)) < 1e-2


def test_xla_makes_products_and_sums_after_each_other():
    problem, operands, want = make(3, 2, 4, 128, 64, bias=True)
    got = token_sum.bind(problem, "xla", *operands)
    assert error(got, want) < 5e-3
    batch = [jnp.stack([a, a[::-1]]) if i == 0 else a for i, a in enumerate(operands)]
    axes = (0, *[None] * (len(operands) - 1))
    both = jax.vmap(functools.partial(token_sum.bind, problem, "xla"), axes)(*batch)
    np.testing.assert_array_equal(both[0], got)


# -- which sizes get it ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ((1, 256, 8, 7168, 256), ("8x128x128s6swap-g0-w1-k2", "1x64x256s3-sums-264")),
        ((4, 256, 8, 7168, 256), ("8x128x128s6swap-g0-w1", "1x64x256s3-sums-264")),
        ((8, 256, 8, 7168, 256), ("8x128x128s3swap-g0-w1-264", "1x64x256s3-sums-264")),
        ((1, 128, 8, 2048, 768), ("8x128x128s6swap-g0-w1", "4x16x256s3-sums-264")),
        ((2, 128, 8, 2048, 768), ("8x128x128s3swap-g0-w1-264", "4x16x256s3-sums-264")),
        ((4, 128, 8, 2048, 768), ("8x128x128s6swap-g0-w1", "2x32x256s3-sums-264")),
        ((1, 8, 2, 4096, 14336), ("8x256x128s3swap-g0", "2x32x256s3-sums-264")),
        ((1, 128, 4, 2880, 2880), ("8x128x64s6swap-g0-w1-264", "4x16x256s3-sums-264")),
        ((5, 128, 8, 2048, 768), ("16x256x128s3swap-g0", "16x128x128s5swap-g0")),  # aligned
    ],
    ids=str,
)
def test_tiles_of_models(sizes, names):
    """As measured on an H200."""
    tokens, experts, top_k, hidden, ffn = sizes
    form = maj.select_moe_implementation(
        (tokens, hidden), (experts, hidden, ffn), top_k=top_k, transpose_rhs=True, platform="cuda"
    ).form
    assert form.split(", ")[1:] == [*names]


def test_fewer_tiles_than_the_product_alone_has():
    """Of weights that are not transposed, whose pairs are not multiplied together."""
    problem = product_of(weights=Weights(False), num_rows=2, k=1024, n=2048)
    assert token_sum_config.config_for(problem) is None
    assert token_sum_config.config_for(product_of(num_rows=2, k=1024, n=2048)) is not None


def product_of(**changes) -> TokenSum:
    problem, *_ = make(1, 2, 3, 128, 64)
    out, changes = changes.pop("out", "bfloat16"), dict(changes)
    return problem._replace(product=problem.product._replace(**changes), out_dtype=out)


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 136},
        {"n": 72, "weights": Weights(False)},
        {"dtype": "float32"},
        {"block_size": 8},
        {"weights": Weights(True, activation="silu")},
    ],
    ids=str,
)
def test_what_the_kernel_does_not_take(changes):
    assert token_sum_config.unsupported(product_of()) is None
    assert token_sum_config.unsupported(product_of(**changes))
    assert token_sum_config.config_for(product_of(**changes)) is None


@pytest.mark.parametrize(
    "tiles",
    [
        PLAIN._replace(pairs=3),
        PLAIN._replace(pairs=4),
        PLAIN._replace(bk=96),
        PLAIN._replace(stages=13),
    ],
    ids=lambda tiles: tiles.name,
)
def test_tiles_that_are_refused(tiles):
    problem = product_of()  # of two pairs
    assert token_sum_config.refused(problem, PLAIN) is None
    with pytest.raises(ValueError, match="tiles"):
        token_sum_kernel.build(problem, tiles)


def test_weights_that_are_not_transposed_are_read_for_one_pair():
    problem = product_of(weights=Weights(False))
    assert token_sum_config.refused(problem, PLAIN) is None
    assert token_sum_config.refused(problem, PLAIN._replace(pairs=2))
