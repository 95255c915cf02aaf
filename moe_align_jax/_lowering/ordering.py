"""Arrays that may be used only when another one is complete, whose own operands are then free again.

XLA runs what does not depend on each other in any order. Where a program has a layer's result and, for a
cotangent that is given, its gradients, it may begin the gradients early, and keep the temporary arrays of
both at once. `jax.lax.optimization_barrier` orders them, but makes jax compute the layer's result again where
`jax.checkpoint` recomputes what the gradients need. This barrier lets go of what nothing uses.
"""

from typing import Any

import jax
from jax import lax
from jax.interpreters import partial_eval

from moe_align_jax._lowering.primitive import batch_first, batch_size, make_primitive


def complete_first(first: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as they are: who uses the second result waits for `first`, if the first result is used too."""
    first, other = _p.bind(first, other)
    return first, other


def _batch(primitive: Any, operands: Any, dims: Any) -> list[jax.Array]:
    size = batch_size(operands, dims)
    return primitive.bind(*(batch_first(x, d, size) for x, d in zip(operands, dims, strict=True)))


_p = make_primitive(
    "complete_first",
    abstract=lambda *types: list(types),
    implement=lambda platform, ctx: lambda *arrays: lax.optimization_barrier(arrays),
    batch=_batch,
    jvp=lambda primitive, primals, tangents: (primitive.bind(*primals), list(tangents)),
)


def _without_unused(used: list[bool], *given: Any) -> tuple[list[bool], Any]:
    """jax's rule for dead code: an operand whose result is not used is none. (jax 0.12 passes one more.)"""
    eqn = given[-1]
    if not any(used):
        return [False] * len(used), None
    kept = {
        name: [x for x, live in zip(getattr(eqn, name), used, strict=True) if live]
        for name in ("invars", "outvars")
    }
    return list(used), eqn.replace(**kept)


partial_eval.dce_rules[_p] = _without_unused
