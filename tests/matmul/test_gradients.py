"""Derivatives of grouped products, tgmm and ragged_dot_general, against float64 NumPy and jax's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from tests.matmul.test_matmul import make_case, normal

RNG = np.random.default_rng


def sums(lhs, rhs, sizes, offset=0, count=None):
    """float64 `[count, k, n]`: rows `[m, k]` and `[m, n]`, one group after the other."""
    lhs, rhs = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)
    count = len(sizes) if count is None else count
    out, start = np.zeros((count, lhs.shape[1], rhs.shape[1])), 0
    for group, size in enumerate(np.maximum(sizes, 0)):
        end = min(start + int(size), len(lhs))
        if 0 <= group - offset < count:
            out[group - offset] = lhs[start:end].T @ rhs[start:end]
        start = end
    return out


def close(found, want, dtype="float32"):
    bound = {"float32": 1e-5, "bfloat16": 5e-3}[dtype]
    found = np.asarray(found).astype(np.float64)
    assert found.shape == want.shape
    assert np.linalg.norm(found - want) <= bound * np.linalg.norm(want) + 1e-30


@pytest.mark.parametrize(
    ("sizes", "offset", "count", "dtype"),
    [
        ([3, 0, 300, 5], 0, None, "bfloat16"),
        ([4, -3, 2], 1, 1, "float32"),
        ([0, 0], 0, None, "float32"),
        ([9, 8, 300], -1, 5, "bfloat16"),
    ],
    ids=str,
)
def test_tgmm(sizes, offset, count, dtype):
    """A hot group, empty ones, sizes below 0 and beyond the rows; NaN behind the groups."""
    rng, rows = RNG(0), 310
    total = min(rows, int(np.maximum(sizes, 0).sum()))
    x, toward = normal(rng, (rows, 16), dtype), normal(rng, (rows, 8), dtype)
    x, toward = x.at[total:].set(jnp.nan), toward.at[total:].set(jnp.nan)
    out = maj.tgmm(x.T, toward, np.array(sizes), dtype, (8, 8, 8), offset, count)
    assert out.dtype == jnp.dtype(dtype)
    close(out, sums(x, toward, sizes, offset, count), dtype)


def test_tgmm_adds_to_an_existing_result():
    """In float32, rounded once; float32 is the default dtype, as megablox has it."""
    rng = RNG(1)
    x, toward = normal(rng, (12, 16), "bfloat16"), normal(rng, (12, 8), "bfloat16")
    old, sizes = normal(rng, (3, 16, 8), "float32"), np.array([5, 0, 7])
    add = jax.jit(lambda old: maj.tgmm(x.T, toward, sizes, existing_out=old), donate_argnums=0)
    want = sums(x, toward, sizes) + np.asarray(old, np.float64)
    out = add(old)
    assert out.dtype == jnp.float32 and old.is_deleted()
    close(out, want)
    half = jnp.asarray(want, jnp.bfloat16)
    more = maj.tgmm(x.T, toward, sizes, jnp.bfloat16, existing_out=half)
    close(more, np.asarray(half, np.float64) + sums(x, toward, sizes), "bfloat16")


def test_tgmm_has_derivatives():
    rng, sizes = RNG(2), np.array([5, 0, 6])
    x, toward = normal(rng, (13, 16), "float32"), normal(rng, (13, 8), "float32")
    ct = normal(rng, (3, 16, 8), "float32")
    ours = jax.grad(lambda a, b: jnp.sum(maj.tgmm(a.T, b, sizes) * ct), (0, 1))(x, toward)
    expert = np.repeat(np.arange(3), sizes)
    want_x = np.zeros((13, 16))
    want_x[:11] = np.einsum("rn,rkn->rk", toward[:11], np.asarray(ct)[expert])
    want_toward = np.zeros((13, 8))
    want_toward[:11] = np.einsum("rk,rkn->rn", x[:11], np.asarray(ct)[expert])
    close(ours[0], want_x)
    close(ours[1], want_toward)


@pytest.mark.parametrize(("contracted", "flipped"), [(1, True), (2, False)])
def test_ragged_dot_general_is_jax(contracted, flipped):
    """Both kinds, with each operand either way round."""
    rng, sizes = RNG(3), jnp.array([5, 0, 6])
    shape = (3, 16, 8) if contracted == 1 else (3, 8, 16)
    lhs, rhs = normal(rng, (13, 16), "float32"), normal(rng, shape, "float32")
    dims = 0 if flipped else 1
    product = jax.lax.RaggedDotDimensionNumbers(
        (((dims,), (contracted,)), ((), ())), [1 - dims], [0]
    )
    given = (lhs.T if flipped else lhs, rhs, sizes, product)
    ours = maj.ragged_dot_general(*given)
    np.testing.assert_allclose(ours, jax.lax.ragged_dot_general(*given), rtol=1e-5, atol=1e-5)
    rows = normal(rng, (13, 8), "float32")
    gradient = jax.lax.RaggedDotDimensionNumbers((((1 - dims,), (0,)), ((), ())), [1 - dims], [])
    given = (lhs.T if flipped else lhs, rows, sizes, gradient)
    ours = maj.ragged_dot_general(*given)
    close(ours, sums(lhs, rows, np.asarray(sizes)))


def test_no_groups():
    """There is no row of any group: the result's matrices are zero, and so are the derivatives."""
    x, toward, none = (
        np.ones((6, 4), np.float32),
        np.ones((6, 5), np.float32),
        np.zeros(0, np.int32),
    )

    def total(x):
        return jnp.sum(maj.tgmm(x.T, toward, none, num_actual_groups=2))

    assert maj.tgmm(x.T, toward, none).shape == (0, 4, 5)
    assert not np.asarray(maj.tgmm(x.T, toward, none, num_actual_groups=2)).any()
    assert total(x) == 0 and not np.asarray(jax.grad(total)(x)).any()


@pytest.mark.parametrize(
    ("contract", "ragged", "groups", "text"),
    [
        (((-1,), (1,)), [0], [0], "name dimensions of lhs from 0 to 1"),  # gave lhs.T @ rhs
        (((2,), (1,)), [0], [0], "name dimensions of lhs from 0 to 1"),
        (((1,), (1,)), [-2], [0], "name dimensions of lhs from 0 to 1"),
        (((1,), (3,)), [0], [0], "name dimensions of rhs from 0 to 2"),
        (((1,), (1,)), [0], [-3], "name dimensions of rhs from 0 to 2"),
        (((1,), (1,)), [0], [1], "name each dimension of rhs once"),
    ],
    ids=str,
)
def test_dimensions_that_there_are_not(contract, ragged, groups, text):
    """jax refuses them too. With as many rows as columns no shape tells."""
    x, w, sizes = jnp.ones((8, 8)), jnp.ones((3, 8, 8)), jnp.array([5, 0, 3])
    numbers = jax.lax.RaggedDotDimensionNumbers((contract, ((), ())), ragged, groups)
    wanted = f"^ragged_dot_general: ragged_dot_dimension_numbers must {text}.*; got .*[.] .+"
    with pytest.raises(ValueError, match=wanted):
        maj.ragged_dot_general(x, w, sizes, numbers)


def test_errors_of_tgmm_and_ragged_dot_general():
    x, toward, sizes = np.zeros((16, 8), np.float32), np.zeros((8, 4), np.float32), np.array([3, 2])
    for kind, text, change in (
        (ValueError, r"rhs must have shape \[m, n\] with m = 8", {"rhs": toward[:7]}),
        (TypeError, "rhs must have the dtype of lhs", {"rhs": toward.astype(np.float16)}),
        (TypeError, "num_actual_groups must be", {"num_actual_groups": 1.5}),
        (ValueError, "existing_out must be float32", {"existing_out": np.zeros((1, 16, 4))}),
        (TypeError, "group_sizes must be an integer", {"group_sizes": np.zeros(2)}),
    ):
        given = {"lhs": x, "rhs": toward, "group_sizes": sizes} | change
        with pytest.raises(kind, match=f"^tgmm: {text}.*; got "):
            maj.tgmm(**given)
    numbers = jax.lax.RaggedDotDimensionNumbers((((2,), (1,)), ((0,), (0,))), [1], [])
    batch = np.zeros((2, 3, 4), np.float32)
    with pytest.raises(NotImplementedError, match="^ragged_dot_general: ragged_dot_dim.*; got .*v"):
        maj.ragged_dot_general(batch, batch, sizes, numbers)
    with pytest.raises(TypeError, match="^ragged_dot_general: ragged_dot_dimension_numbers must"):
        maj.ragged_dot_general(x, toward, sizes, None)


def test_gradients_have_their_primals_dtype():
    """bfloat16 rows with float32 master weights: their gradient is a float32 sum that nothing rounded."""
    rng, sizes = RNG(4), np.array([150, 0, 7])
    lhs = normal(rng, (160, 16), "bfloat16")
    master = normal(rng, (3, 8, 16), "float32")
    direction = normal(rng, (160, 8), "bfloat16")

    def loss(lhs, w):
        out = maj.gmm(lhs, w, sizes, jnp.bfloat16, transpose_rhs=True)
        return jnp.sum((out * direction).astype(jnp.float32))

    d_lhs, d_master = jax.jit(jax.grad(loss, (0, 1)))(lhs, master)
    d_half = jax.grad(loss, 1)(lhs, master.astype("bfloat16"))
    assert (d_lhs.dtype, d_master.dtype, d_half.dtype) == ("bfloat16", "float32", "bfloat16")
    want = sums(direction, lhs, sizes)
    close(d_master, want)
    close(d_half, want, "bfloat16")
    rounded = np.asarray(master.astype("bfloat16"), np.float64)
    of_row = rounded[np.repeat(np.arange(3), sizes)]
    want = np.zeros((160, 16))
    want[:157] = np.einsum("rn,rnk->rk", np.asarray(direction, np.float64)[:157], of_row)
    close(d_lhs, want, "bfloat16")


def test_rows_that_are_not_in_use_reach_no_gradient():
    """NaN in x and in the cotangent, behind each expert's rows."""
    rng, counts = RNG(5), np.array([3, 0, 5, 9])
    there = (np.arange(9)[None] < counts[:, None])[..., None]
    x = jnp.where(there, normal(rng, (4, 9, 16), "float32"), jnp.nan)
    w, direction = normal(rng, (4, 16, 12), "float32"), normal(rng, (4, 9, 6), "float32")
    direction = jnp.where(there, direction, jnp.nan)
    call = functools.partial(maj.masked_grouped_matmul, activation="silu")
    _, pull = jax.vjp(lambda x, w: call(x, w, counts), x, w)
    dx, dw = pull(direction)
    assert not np.asarray(dx)[~np.broadcast_to(there, dx.shape)].any()

    def dense(x, w):
        gate, up = jnp.split(jnp.einsum("emk,ekn->emn", x, w, precision="highest"), 2, axis=-1)
        return jnp.where(there, jax.nn.silu(gate) * up, 0.0)

    _, pull = jax.vjp(dense, jnp.nan_to_num(x), w)
    for found, want in zip((dx, dw), pull(jnp.nan_to_num(direction)), strict=True):
        close(found, np.asarray(want, np.float64))


def test_gradients_equal_differences():
    """Along one direction of all operands at once, by central differences; of a pair, transposed."""
    (x, w, aligned), given = make_case(
        *(12, 2, 4, 16, 8, 8),
        dtype="float32",
        routing="dropped",
        activation="silu",
        pair=True,
        transpose_rhs=True,
    )
    used = int(aligned.num_tokens_post_padded[0])
    rng, point = RNG(6), (x, w)
    direction = jax.tree.map(lambda a: normal(rng, a.shape, "float32"), point)
    weight = normal(rng, (used, 8), "float32")

    @jax.jit
    def loss(point):
        y = maj.grouped_matmul(*point, aligned, **given)
        return jnp.sum(y[:used] * weight)

    def at(step):
        moved = jax.tree.map(lambda a, b: a + np.float32(step) * b, point, direction)
        return float(loss(moved))

    slope = jax.tree.map(lambda a, b: float(jnp.sum(a * b)), jax.grad(loss)(point), direction)
    found = sum(jax.tree.leaves(slope))
    difference = (at(1e-2) - at(-1e-2)) / 2e-2
    assert abs(found - difference) < 2e-3 * (abs(difference) + 10)
