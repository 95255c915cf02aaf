"""The kernel of a layer's backward step across its activation: against float64 NumPy, and within a layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from moe_align_jax._grouped_matmul import activation_gradient, reference
from moe_align_jax._grouped_matmul import activation_gradient_kernel as kernel
from moe_align_jax._grouped_matmul.problem import ActivationGradient, MatmulProblem, Weights
from tests.matmul.oracle import error
from tests.matmul.test_matmul import ids_of, normal


def make_case(tokens, top_k, experts, hidden, ffn, *, transposed=True, routing="dropped"):
    """(problem, operands), with NaN in the products of rows that hold no pair."""
    ids = ids_of(routing, tokens, top_k, experts)
    aligned = maj.moe_align_block_size(
        ids, block_size=128, num_experts=experts, pad_sorted_ids=True, implementation="xla"
    )
    where, rows = aligned[:3], aligned[0].shape[0]
    product = MatmulProblem(
        *("test", "blocks", rows, hidden, ffn, experts, "bfloat16", "bfloat16"),
        *(Weights(transposed=transposed), 128),
        num_tokens=tokens,
        top_k=top_k,
        zero_padding=False,
    )
    rng = np.random.default_rng(0)
    real = np.asarray(where[0]) < tokens * top_k
    products = jnp.where(real[:, None], normal(rng, (rows, 2 * ffn), "bfloat16"), jnp.nan)
    scale = np.where(real, rng.uniform(0.2, 1.0, rows), kernel.NO_PAIR).astype(np.float32)
    scale[np.flatnonzero(real)[0]] = 0.0  # a pair whose weight is zero still has a gradient of it
    shape = (experts, ffn, hidden) if transposed else (experts, hidden, ffn)
    toward, w = normal(rng, (tokens, hidden), "bfloat16"), normal(rng, shape, "bfloat16", 0.05)
    operands = (products, jnp.asarray(scale), toward, w, *where)
    return ActivationGradient(product, Weights(activation="silu", gated=True)), operands


def by_numpy(problem, operands):
    """(dh, s a, sums, which rows hold a pair) in float64."""
    products, scale, toward, w, ids, experts, used = (np.asarray(x) for x in operands)
    product = problem.product
    n, pairs = product.n, product.num_tokens * product.top_k
    dh, scaled = np.zeros((len(ids), 2 * n)), np.zeros((len(ids), n))
    sums, real = np.zeros(len(ids)), np.zeros(len(ids), bool)
    for row in range(int(used[0])):
        expert = int(experts[row // product.block_size])
        if expert < 0 or ids[row] >= pairs:
            continue
        matrix = w[expert].astype(np.float64)
        g = (matrix if product.weights.transposed else matrix.T) @ toward[
            ids[row] // product.top_k
        ].astype(np.float64)
        gate, up = np.split(products[row].astype(np.float64), 2)
        sigmoid = 1 / (1 + np.exp(-gate))
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        dh[row] = scale[row] * np.concatenate([g * up * slope, g * gate * sigmoid])
        scaled[row] = scale[row] * gate * sigmoid * up
        sums[row], real[row] = g @ (gate * sigmoid * up), True
    return dh, scaled, sums, real


def check(problem, operands, *, interpret):
    """Of the kernel."""
    run = jax.jit(functools.partial(kernel.run, problem, interpret=interpret))
    found = run(*operands)
    if not interpret:
        again = run(*operands)
        used = int(operands[-1][0])
        for a, b in zip(found, again, strict=True):
            assert np.asarray(a[:used]).tobytes() == np.asarray(b[:used]).tobytes()
    compare(problem, operands, found, of_sums=1e-4)


def compare(problem, operands, found, *, of_sums):
    toward, scaled_rows, row_sums = found
    dh, scaled, sums, real = by_numpy(problem, operands)
    assert error(np.asarray(toward)[real], dh[real]) < 5e-3
    assert error(np.asarray(scaled_rows)[real], scaled[real]) < 5e-3
    assert error(np.asarray(row_sums)[real], sums[real]) < of_sums
    # Padding rows of blocks in use are zero: products with the weights' gradient read them.
    experts, used = np.asarray(operands[-2]), int(operands[-1][0])
    padding = ~real & (np.arange(len(real)) < used) & (np.repeat(experts, 128) >= 0)
    assert padding.any()
    assert not np.asarray(toward)[padding].any()
    assert not np.asarray(scaled_rows)[padding].any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("way", ["loop", "fusions"])
def test_without_the_kernel(way, transposed):
    """The sums of rows that hold no pair are zero as well: what such rows hold is NaN."""
    problem, operands = make_case(40, 2, 3, 64, 96, transposed=transposed)
    products, scale, *rest = operands
    used = scale > kernel.NO_PAIR
    run = {
        "loop": reference.activation_gradient,
        "fusions": functools.partial(activation_gradient._by_fusions, "xla"),
    }[way]
    found = jax.jit(functools.partial(run, problem))(products, scale, used, *rest)
    # Between two fusions g is rounded.
    compare(problem, operands, found, of_sums=1e-4 if way == "loop" else 5e-3)
    assert not np.asarray(found[2])[~np.asarray(used)].any()


def test_in_the_interpreter():
    with jax.default_device(jax.devices("cpu")[0]):
        check(*make_case(12, 2, 1, 64, 256), interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "size", [(12, 2, 2, 64, 256), (700, 4, 8, 512, 768), (300, 1, 40, 200, 512)], ids=str
)
def test_on_a_gpu(size, transposed):
    check(*make_case(*size, transposed=transposed), interpret=False)


def test_what_it_takes(monkeypatch):
    problem, _ = make_case(12, 2, 2, 64, 256)
    choose = activation_gradient.choose
    assert choose(problem, "cpu", None) == choose(problem, "cuda", "xla") == "loop"
    assert choose(problem, "cuda", None) == choose(problem, "cuda", "mosaic_gpu") == "fusions"
    monkeypatch.setattr(activation_gradient, "enabled", True)
    assert choose(problem, "cuda", None) == choose(problem, "cuda", "mosaic_gpu") == "kernel"
    assert choose(problem, "cpu", None) == choose(problem, "cuda", "xla") == "loop"
    for change in (
        {"weights": problem.weights._replace(interleaved=True)},
        {"weights": problem.weights._replace(activation="gelu")},
        {"weights": problem.weights._replace(swiglu_limit=7.0)},
        {"product": problem.product._replace(n=264)},
        {"product": problem.product._replace(block_size=64)},
        {"product": problem.product._replace(dtype="float32")},
    ):
        assert kernel.cannot(problem._replace(**change))


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pair", [False, True])
def test_gradients_of_a_layer_on_a_gpu(bias, pair, monkeypatch):
    """The layer's gradients with the kernel, against "xla"."""
    from tests.moe_layer.test_moe_layer import make_layer

    monkeypatch.setattr(activation_gradient, "enabled", True)
    operands, options = make_layer(
        *(600, 2, 4, 256, 256), dtype="bfloat16", routing="dropped", bias=bias, pair=pair
    )
    x, first, second, weights, ids = operands
    direction = normal(np.random.default_rng(1), x.shape, "float32")

    def gradients(implementation):
        def loss(x, first, second, weights):
            given = {"block_size": 128, "implementation": implementation} | options
            y = maj.fused_moe(x, first, second, weights, ids, **given)
            return jnp.sum(y.astype(jnp.float32) * direction)

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(x, first, second, weights)

    found, want = (jax.tree.leaves(gradients(name)) for name in ("mosaic_gpu", "xla"))
    for a, b in zip(found, want, strict=True):
        assert error(a, np.asarray(b, np.float64)) < 1e-2
