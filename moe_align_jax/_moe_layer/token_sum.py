"""The product of blocks of one pair, and the weighted sum of each token's rows of it, in one.

"xla" makes them after each other. It has no derivative: the layer that it is a part of has one.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._grouped_matmul import primitive, reference
from moe_align_jax._grouped_matmul.problem import TokenSum
from moe_align_jax._grouped_matmul.token_sum_config import config_for
from moe_align_jax._lowering.primitive import result_like
from moe_align_jax._moe_layer.combine import weighted_sum

_I32, _F32 = jnp.int32, jnp.float32


def takes(problem: TokenSum) -> bool:
    """Whether the kernel of both takes this problem, and was found faster than two."""
    return config_for(problem) is not None


def _abstract(x, *rest, problem: TokenSum, implementation: str | None):
    """Shape and dtype of the result, for tracing."""
    del rest, implementation
    return result_like(x, problem.out_shape, problem.out_dtype)


def _lowering(problem: TokenSum, platform: str, implementation: str | None):
    """The function of the operands that computes the sums on this platform."""
    if primitive.choose(problem.product, platform, implementation) == "xla":
        return _one_by_one
    from moe_align_jax._grouped_matmul import token_sum_kernel

    return token_sum_kernel.run


def _one_by_one(problem: TokenSum, *operands: jax.Array) -> jax.Array:
    """The products, rounded, and then their sums."""
    product, pairs = problem.product, problem.num_tokens * problem.top_k
    *floats, expert_ids, shares = operands
    pair = lax.iota(_I32, pairs)
    where = (pair, expert_ids, jnp.full(1, pairs, _I32))
    y = reference.grouped_matmul(product, *floats, *where)
    there = (expert_ids >= 0) & (expert_ids < product.num_experts)
    rows = jnp.where(there, pair, -1).reshape(shares.shape)
    return weighted_sum(jnp.dtype(problem.out_dtype), y, shares, rows)


_p = primitive.make_matmul_primitive("token_sum", _abstract, _lowering, results=False)


def bind(problem: TokenSum, implementation: str | None, *operands: jax.Array) -> jax.Array:
    """`[T, n]` of `problem.inputs`. Without a derivative."""
    if implementation == "emulator":
        # Pallas' interpreter works by ordered callbacks, which no lowering rule can emit.
        from moe_align_jax._grouped_matmul import token_sum_kernel

        return token_sum_kernel.run(problem, *operands, interpret=True)
    return _p.bind(*operands, problem=problem, implementation=implementation)
