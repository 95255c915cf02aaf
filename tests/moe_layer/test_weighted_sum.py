"""The sum of a token's rows, at the end of fused_moe, against NumPy; its derivative; its one kernel."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_align_jax._moe_layer.combine import weighted_sum


def operands(tokens, top_k, width, dtype, seed=0):
    """(y, weights, row_of_pair): rows of no pair, and weights of dropped pairs, are NaN or infinite."""
    rng = np.random.default_rng(seed)
    pairs = tokens * top_k
    y = rng.normal(size=(pairs + pairs // 4 + 1, width)).astype(np.float32)
    rows = rng.permutation(len(y))[:pairs].astype(np.int32).reshape(tokens, top_k)
    rows[rng.random(rows.shape) < 0.2] = -1
    unused = np.setdiff1d(np.arange(len(y)), rows)
    y[unused] = np.where(unused % 2, np.nan, np.inf)[:, None]
    weights = rng.normal(size=rows.shape).astype(np.float32)
    weights[rows < 0] = rng.choice([np.nan, np.inf, 1.0], (rows < 0).sum())
    return jnp.asarray(y, dtype), jnp.asarray(weights), jnp.asarray(rows)


def in_order(y, weights, rows):
    """float32, a product and a sum after the other, k ascending."""
    y, weights, rows = (np.asarray(x, t) for x, t in zip((y, weights, rows), "ffi", strict=True))
    total = np.zeros((len(rows), y.shape[1]), np.float32)
    for k, row in enumerate(rows.T):
        total[row >= 0] += y[row[row >= 0]] * weights[row >= 0, k, None]
    return total


def assert_sum(found, *given):
    """A compiler may fuse a product with its sum: not bit for bit."""
    room = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-20}[found.dtype.name]
    found, want = np.asarray(found, np.float32), in_order(*given)
    np.testing.assert_allclose(found, want, rtol=room, atol=8 * room)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("tokens", "top_k", "width"), [(1, 1, 8), (37, 8, 136), (300, 2, 7), (9, 17, 6)]
)
def test_sums_leave_out_what_is_dropped(tokens, top_k, width, dtype):
    given = operands(tokens, top_k, width, dtype)
    found = jax.jit(weighted_sum, static_argnums=0)(dtype, *given)
    assert found.dtype == dtype
    assert_sum(found, *given)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_derivative_is_that_of_the_sum(dtype):
    y, weights, rows = operands(5, 3, 4, dtype)
    toward = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), dtype)

    def loss(y, weights):
        return jnp.vdot(weighted_sum(dtype, y, weights, rows), toward).astype(jnp.float32)

    to_y, to_weights = (np.asarray(x, np.float32) for x in jax.grad(loss, (0, 1))(y, weights))
    y, toward = np.asarray(y, np.float32), np.asarray(toward, np.float32)
    want_y, want_weights = np.zeros(y.shape, np.float32), np.zeros(weights.shape, np.float32)
    for (t, k), row in np.ndenumerate(np.asarray(rows)):
        if row >= 0:
            want_y[row] += toward[t] * np.float32(weights[t, k])
            want_weights[t, k] = np.vdot(toward[t], y[row])
    room = 1e-5 if dtype == "float32" else 2**-7
    np.testing.assert_allclose(to_weights, want_weights, rtol=room, atol=room)
    np.testing.assert_allclose(to_y, want_y, rtol=room, atol=room)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "top_k", "width"), [(16, 8, 7168), (128, 8, 7168), (1024, 8, 2048), (8192, 8, 2048)]
)
def test_is_one_kernel(tokens, top_k, width):
    """With a comparison XLA made a kernel of the mask, but for few tokens."""
    given = operands(tokens, top_k, width, "bfloat16")
    compiled = jax.jit(weighted_sum, static_argnums=0).lower("bfloat16", *given).compile()
    assert_sum(compiled(*given), *given)
    text = compiled.as_text()
    assert text is not None
    entry = text[text.index("ENTRY") :]
    assert len(re.findall(r" (?:fusion|reduce|gather|custom-call)\(", entry)) == 1, entry
