"""The kernels of a layer's backward step across its activation: against float64 NumPy, and within a layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from moe_align_jax._grouped_matmul import across_activation_kernel as rows_kernel
from moe_align_jax._grouped_matmul import activation_gradient, derivative, reference
from moe_align_jax._grouped_matmul import activation_gradient_kernel as kernel
from moe_align_jax._grouped_matmul.problem import ActivationGradient, MatmulProblem, Weights
from tests.matmul.oracle import error
from tests.matmul.test_matmul import ids_of, normal


def make_case(tokens, top_k, experts, hidden, ffn, *, transposed=True, block=128, dtype="bfloat16"):
    """(problem, operands), with NaN in the products of rows that hold no pair; some pairs are dropped."""
    ids = ids_of("dropped", tokens, top_k, experts)
    aligned = maj.moe_align_block_size(
        ids, block_size=block, num_experts=experts, pad_sorted_ids=True, implementation="xla"
    )
    where, rows = aligned[:3], aligned[0].shape[0]
    product = MatmulProblem(
        *("test", "blocks", rows, hidden, ffn, experts, dtype, dtype),
        *(Weights(transposed=transposed), block),
        num_tokens=tokens,
        top_k=top_k,
        zero_padding=False,
    )
    rng = np.random.default_rng(0)
    real = np.asarray(where[0]) < tokens * top_k
    products = jnp.where(real[:, None], normal(rng, (rows, 2 * ffn), dtype), jnp.nan)
    scale = np.where(real, rng.uniform(0.2, 1.0, rows), kernel.NO_PAIR).astype(np.float32)
    pairs = np.flatnonzero(real)
    scale[pairs[0]] = 0.0  # a pair whose weight is zero still has a gradient of it
    if len(pairs) > 2:
        scale[pairs[-1]] = np.nan  # no padding
    shape = (experts, ffn, hidden) if transposed else (experts, hidden, ffn)
    toward, w = normal(rng, (tokens, hidden), dtype), normal(rng, shape, dtype, 0.05)
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
        same_bits(found, again, int(operands[-1][0]))
    compare(problem, operands, found, of_sums=1e-4)


def on_cpu(*arrays):
    """Copies on the default device, which the caller has made the CPU."""
    return tuple(jnp.asarray(np.asarray(x)) for x in arrays)


def same_bits(found, again, used):
    """In the rows in use."""
    for a, b in zip(found, again, strict=True):
        assert np.asarray(a)[:used].tobytes() == np.asarray(b)[:used].tobytes()


def check_rows(problem, operands, *, interpret):
    """Of the kernel that takes row by row what the product gives.

    Padding rows hold NaN, and the rows in use end with the last pair, within a block. Rows behind the blocks
    in use look like rows with a pair, and are not written (the interpreter's arrays begin as NaN).
    """
    assert rows_kernel.cannot(problem) is None
    products, scale, toward, w, *where = operands
    has_pair, end = np.asarray(scale) != rows_kernel.NO_PAIR, int(where[2][0])
    last = int(np.flatnonzero(has_pair)[-1]) + 1
    assert last < end < len(has_pair)
    behind = np.arange(len(has_pair)) >= end
    with jax.default_device(jax.devices("cpu")[0]):
        g = derivative.product(problem.product, "xla", *on_cpu(toward, w), None, on_cpu(*where))
        g = jnp.where(has_pair[:, None], g, jnp.nan).at[end:].set(1)
        products = on_cpu(products)[0].at[end:].set(1)
        scale = np.where(behind, np.float32(1), np.asarray(scale))
    products, g = np.asarray(products), np.asarray(g)
    run = jax.jit(functools.partial(rows_kernel.run, problem, interpret=interpret))
    given = (products, g, scale, np.array([last], np.int32))
    found = run(*given)
    # g is rounded before it is multiplied.
    compare(problem, operands, found, of_sums=5e-3)
    assert not np.asarray(found[2])[~has_pair & ~behind].any()
    if interpret:
        assert all(np.isnan(np.asarray(x)[end:].astype(np.float32)).all() for x in found)
    else:
        same_bits(found, run(*given), end)


def compare(problem, operands, found, *, of_sums):
    """A pair whose weight is NaN has NaN in its first two results, and in no other's."""
    # Rows behind the blocks in use hold what the memory held: NumPy warns of casting a signalling NaN.
    with np.errstate(invalid="ignore"):
        toward, scaled_rows, row_sums = (np.asarray(x).astype(np.float64) for x in found)
    dh, scaled, sums, real = by_numpy(problem, operands)
    assert error(row_sums[real], sums[real]) < of_sums
    bad = real & np.isnan(np.asarray(operands[1]))
    assert np.isnan(toward[bad]).all() and np.isnan(scaled_rows[bad]).all()
    good = real & ~bad
    assert error(toward[good], dh[good]) < 5e-3
    assert error(scaled_rows[good], scaled[good]) < 5e-3
    # Padding rows of blocks in use are zero: products with the weights' gradient read them.
    experts, used = np.asarray(operands[-2]), int(operands[-1][0])
    padding = (
        ~real
        & (np.arange(len(real)) < used)
        & (np.repeat(experts, problem.product.block_size) >= 0)
    )
    assert padding.any()
    assert not toward[padding].any()
    assert not scaled_rows[padding].any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("way", ["loop", "fusions"])
def test_without_the_kernel(way, transposed):
    """The sums of rows that hold no pair are zero as well: what such rows hold is NaN."""
    problem, operands = make_case(40, 2, 3, 64, 96, transposed=transposed)
    products, scale, *rest = operands
    used = scale != kernel.NO_PAIR
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
        check(*make_case(12, 2, 2, 64, 256), interpret=True)


@pytest.mark.parametrize("columns", [128, 256])
def test_row_by_row_in_the_interpreter(columns):
    """Rows of three parts of three tiles."""
    with jax.default_device(jax.devices("cpu")[0]):
        problem, operands = make_case(12, 1, 2, 32, 9 * columns, block=4)
        assert rows_kernel.sizes_of(problem)[:3] == (columns, 3, 3)
        check_rows(problem, operands, interpret=True)


def test_how_rows_are_cut():
    problem, _ = make_case(12, 2, 2, 8, 8)
    for n, sizes in {
        128: (128, 1, 1),
        256: (256, 1, 1),
        768: (256, 3, 1),
        1408: (128, 1, 11),
        2048: (256, 4, 2),
        14336: (256, 7, 8),
    }.items():
        product = problem.product._replace(n=n)
        assert rows_kernel.sizes_of(problem._replace(product=product))[:3] == sizes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "size",
    [(12, 2, 2, 64, 512, 16), (300, 4, 8, 256, 1536, 128), (60, 1, 8, 64, 14336, 48)],
    ids=str,
)
def test_row_by_row_on_a_gpu(size, dtype):
    *sizes, block = size
    check_rows(*make_case(*sizes, block=block, dtype=dtype), interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "size", [(12, 2, 2, 64, 256), (700, 4, 8, 512, 768), (300, 1, 40, 200, 512)], ids=str
)
def test_on_a_gpu(size, transposed):
    check(*make_case(*size, transposed=transposed), interpret=False)


def test_what_they_take(monkeypatch):
    problem, _ = make_case(12, 2, 2, 64, 512)
    choose = activation_gradient.choose
    on_gpus = (("cuda", None), ("cuda", "mosaic_gpu"))
    others = (("cpu", None), ("cuda", "xla"))

    def ways(problem, where=on_gpus):
        return {choose(problem, *each) for each in where}

    assert ways(problem) == {"rows"} and ways(problem, others) == {"loop"}
    product, weights = problem
    for change in (
        {"weights": weights._replace(interleaved=True)},
        {"weights": weights._replace(activation="gelu")},
        {"weights": weights._replace(gated=False)},
        {"weights": weights._replace(swiglu_limit=7.0)},
        {"weights": weights._replace(swiglu_alpha=1.7)},
        {"product": product._replace(n=192)},
        {"product": product._replace(num_rows=product.num_rows + 2)},
        {"product": product._replace(block_size=2)},
        {"product": product._replace(num_rows=1 << 21)},  # 2**31 values of products
    ):
        assert ways(problem._replace(**change)) == {"fusions"}, change
    wide = product._replace(dtype="float32")
    assert rows_kernel.cannot(problem._replace(product=wide))
    for dtype in ("float16", "bfloat16"):
        half = product._replace(dtype=dtype, out_dtype=dtype, block_size=64)
        assert ways(problem._replace(product=half)) == {"rows"}

    monkeypatch.setattr(activation_gradient, "enabled", True)
    assert ways(problem) == {"kernel"} and ways(problem, others) == {"loop"}
    for change in (
        {"weights": weights._replace(interleaved=True)},
        {"weights": weights._replace(activation="gelu")},
        {"weights": weights._replace(swiglu_limit=7.0)},
        {"product": product._replace(n=264)},
        {"product": product._replace(block_size=64)},
        {"product": wide},
    ):
        assert kernel.cannot(problem._replace(**change))


def check_second_derivative(problem, operands, implementation):
    """With the kernel it is that of the step by "xla", to the step's four operands; none goes forward."""
    assert activation_gradient._by_kernels(problem) == "rows"
    products, scale, toward, w, *where = operands
    used = scale != kernel.NO_PAIR
    # Padding rows of products get a derivative as well, and it is no number where they are none.
    floats = (
        jnp.where(used[:, None], products, 0),
        jnp.where(used, jnp.nan_to_num(scale), 0.0),
        toward,
        w,
    )

    def step(implementation, products, scale, toward, w):
        given = (products, scale, used, toward, w, *where)
        found = activation_gradient.run(given, problem=problem, implementation=implementation)
        # Rows behind the blocks in use are unspecified.
        rows = [jnp.where(used.reshape(-1, *[1] * (x.ndim - 1)), x, 0) for x in found]
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in rows)

    def gradients(implementation):
        of_step = functools.partial(step, implementation)
        return jax.jit(jax.grad(of_step, (0, 1, 2, 3)))(*floats)

    for a, b in zip(gradients(implementation), gradients("xla"), strict=True):
        assert np.asarray(b, np.float64).any()
        assert error(a, np.asarray(b, np.float64)) < 2e-2
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(functools.partial(step, implementation), floats, floats)


def test_second_derivative_in_the_interpreter(monkeypatch):
    """Products by "xla": their kernels, which have tests of their own, take the interpreter a minute."""
    monkeypatch.setattr(derivative, "implementation_for", lambda problem, implementation: "xla")
    with jax.default_device(jax.devices("cpu")[0]):
        check_second_derivative(*make_case(12, 1, 2, 64, 512, block=4), "emulator")


@pytest.mark.gpu
def test_second_derivative_on_a_gpu():
    check_second_derivative(*make_case(40, 2, 3, 64, 512, block=16), "mosaic_gpu")


def layer_gradients(operands, options, implementation, block_size):
    """Of a loss of `fused_moe`, to x, both weights and the pairs' weights: a function of these, and them."""
    x, first, second, weights, ids = operands
    direction = normal(np.random.default_rng(1), x.shape, "float32")

    def loss(x, first, second, weights):
        given = {"block_size": block_size, "implementation": implementation} | options
        y = maj.fused_moe(x, first, second, weights, ids, **given)
        return jnp.sum(y.astype(jnp.float32) * direction)

    return jax.jit(jax.grad(loss, (0, 1, 2, 3))), (x, first, second, weights)


def compare_layer(operands, options, block_size):
    """The gradients with kernels against those by "xla"; the program with kernels."""
    texts, found = [], []
    for name in ("mosaic_gpu", "xla"):
        call, floats = layer_gradients(operands, options, name, block_size)
        lowered = call.lower(*floats)
        texts.append(lowered.as_text())
        found.append(jax.tree.leaves(lowered.compile()(*floats)))
    for a, b in zip(*found, strict=True):
        assert error(a, np.asarray(b, np.float64)) < 1e-2
    return texts[0]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("ffn", "options", "by_rows"),
    [
        (512, {}, True),
        (1024, {"bias": True, "pair": True}, True),
        (512, {"weights_on_input": True}, True),
        (512, {"activation": "gelu"}, False),
        (512, {"swiglu_limit": 1.0}, False),
        (512, {"interleaved": True}, False),
        (192, {}, False),
    ],
    ids=str,
)
def test_a_layer_takes_it_on_a_gpu(ffn, options, by_rows):
    from tests.moe_layer.test_moe_layer import make_layer

    more = {"dtype": "bfloat16", "routing": "dropped"}
    operands, options = make_layer(200, 2, 4, 256, ffn, **more, **options)
    assert ("across_activation" in compare_layer(operands, options, 64)) == by_rows


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
    compare_layer(operands, options, 128)
