"""The JAX side of the router's ops. Imported with the first call."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._router import primitives
from moe_align_jax._router.problem import RouteProblem


@functools.partial(jax.jit, static_argnames=("problem", "implementation"))
def run(
    logits: jax.Array, bias: jax.Array | None, *, problem: RouteProblem, implementation: str
) -> list[jax.Array]:
    """(topk_weights, topk_ids), `[T, K]` float32 and int32, of a problem without a mask."""
    operands = [logits]
    if bias is not None:
        operands.append(lax.reshape(bias.astype(jnp.float32), (1, problem.num_experts)))
    return list(primitives.route_p.bind(*operands, problem=problem, implementation=implementation))


def implementation_for(
    function: str, problem: RouteProblem, platform: str, named: str | None
) -> str:
    """The one that runs on a platform; `named` is asked for by tests."""
    return primitives.choose(function, problem, platform, named)
