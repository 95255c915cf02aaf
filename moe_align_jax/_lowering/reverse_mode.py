"""Functions whose gradient rule serves reverse mode alone say so in forward mode, in our own words.

jax calls the rule of a `custom_vjp` function in either mode, and in forward mode fails with a text that names
neither the function nor a way out. Here a tangent passes through a primitive that can be transposed, as
reverse mode does, but not computed, as forward mode would.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from moe_align_jax._core import checks

_tangent_p = Primitive("reverse_mode_only")


def reverse_mode_only(function: str, tree: Any) -> Any:
    """Its argument, an error of `function` where forward mode differentiates by it."""

    def wrapped(x: Any) -> Any:
        # An array that is no tracer has no tangent.
        traced = isinstance(x, Tracer) and jnp.issubdtype(x.dtype, jnp.floating)
        return _same(function, x) if traced else x

    return jax.tree.map(wrapped, tree)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _same(function: str, x: jax.Array) -> jax.Array:
    del function
    return x


@_same.defjvp
def _same_jvp(function, primals, tangents):
    return _same(function, *primals), _tangent_p.bind(*tangents, function=function)


@contextlib.contextmanager
def in_our_words(function: str) -> Iterator[None]:
    """For what is traced within: under jit and vmap, jax finds out before the tangent is computed."""
    try:
        yield
    except TypeError as error:
        if "custom_vjp" in str(error) and "forward-mode" in str(error):
            _refuse(function=function)
        raise


def _refuse(*_: Any, function: str) -> NoReturn:
    rule, got = "be differentiated in reverse mode", "a derivative in forward mode"
    remedy = (
        "Use jax.grad, jax.vjp or jax.jacrev, and jax.jacrev(jax.jacrev(f)) for jax.hessian(f)."
    )
    raise NotImplementedError(checks.message(function, "its result", rule, got, remedy))


_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(lambda aval, *, function: aval)
mlir.register_lowering(_tangent_p, lambda ctx, *operands, function: _refuse(function=function))
ad.deflinear2(_tangent_p, lambda cotangent, _, *, function: [cotangent])
batching.primitive_batchers[_tangent_p] = lambda operands, dims, **params: (
    _tangent_p.bind(*operands, **params),
    dims[0],
)
