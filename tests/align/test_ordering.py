"""complete_first: two arrays as they are, of which the second waits for the first."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from moe_align_jax._lowering.ordering import complete_first

FIRST = np.array([[0.5, -2.0], [np.nan, 3.0], [1.5, -0.0]], np.float32)
OTHER = np.array([7, -1, 2**31 - 1], np.int32)


@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "checkpoint"]
)
def test_both_are_as_they_were(wrap):
    first, other = wrap(complete_first)(jnp.asarray(FIRST), jnp.asarray(OTHER))
    assert first.dtype == np.float32 and other.dtype == np.int32
    assert np.asarray(first).tobytes() == FIRST.tobytes()
    assert np.asarray(other).tobytes() == OTHER.tobytes()


@pytest.mark.parametrize("axes", [(0, None), (1, 0), (None, 0)])
def test_a_batch_of_either(axes):
    other = np.arange(4, dtype=np.float32).reshape(2, 2) if axes == (1, 0) else OTHER
    got = jax.vmap(complete_first, axes)(jnp.asarray(FIRST), jnp.asarray(other))
    for array, given, axis in zip(got, (FIRST, other), axes, strict=True):
        size = FIRST.shape[axes[0]] if axes[0] is not None else len(other)
        want = np.stack([given] * size) if axis is None else np.moveaxis(given, axis, 0)
        np.testing.assert_array_equal(array, want)


def mixed(x, y):
    """sin(x) and 3 y with an order between them; d/dx = cos(x) 3 y, d/dy = 3 sin(x)."""
    first, other = complete_first(jnp.sin(x), 3 * y)
    return jnp.sum(first * other)


def test_derivatives_pass_through():
    x, y = np.float32([0.25, -1.5]), np.float32([2.0, 0.5])
    want = np.cos(x) * 3 * y, 3 * np.sin(x)
    for f in (mixed, jax.checkpoint(mixed)):
        for got, gradient in zip(jax.jit(jax.grad(f, (0, 1)))(x, y), want, strict=True):
            np.testing.assert_allclose(got, gradient, rtol=1e-6)
    _, tangent = jax.jvp(mixed, (x, y), (np.float32([1, 0]), np.float32([0, 1])))
    np.testing.assert_allclose(tangent, want[0][0] + want[1][1], rtol=1e-6)
    hessian = jax.hessian(mixed)(x, y)
    np.testing.assert_allclose(hessian, np.diag(-np.sin(x) * 3 * y), rtol=1e-6, atol=1e-7)


def program(f, *arguments) -> str:
    return jax.jit(f).lower(*arguments).as_text()


def test_who_uses_the_second_waits_for_the_first():
    """The barrier of the lowered program holds both, and both results are its."""
    text = program(lambda x, y: complete_first(jnp.sin(x), y), jnp.ones(2), jnp.ones(3))
    [barrier] = re.findall(r"(%\S+):2 = stablehlo.optimization_barrier (\S+), (\S+) :", text)
    [sine] = re.findall(r"(%\S+) = stablehlo.sine", text)
    assert barrier[1] == sine
    assert f"return {barrier[0]}#0, {barrier[0]}#1" in text


@pytest.mark.parametrize("position", [0, 1])
def test_what_nothing_uses_is_not_computed(position):
    """As where jax.checkpoint computes again what the gradients need. XLA's own barrier keeps all."""

    def one(barrier):
        def f(x):
            return barrier((jnp.sin(x), jnp.cos(x)))[position]

        return program(jax.checkpoint(f), jnp.ones(2))

    ours, theirs = one(lambda pair: complete_first(*pair)), one(lax.optimization_barrier)
    counts = {text: len(re.findall(r"stablehlo\.(?:co)?sine", text)) for text in (ours, theirs)}
    assert counts == {ours: 1, theirs: 2}
