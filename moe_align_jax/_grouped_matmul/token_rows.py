"""Tokens' rows copied to those of their pairs, `[P, H]`, once for readers that would gather them often.

kernel     on a GPU: `spread_kernel`, which writes no rows without a pair: they hold anything
gather     "xla": `reference.rows_of_pairs`, zeros in rows without a pair

A primitive, with a derivative.
"""

import functools

import jax

from moe_align_jax._grouped_matmul import derivative, primitive, reference, spread
from moe_align_jax._grouped_matmul.spread import Spread
from moe_align_jax._lowering import select
from moe_align_jax._lowering.primitive import result_like
from moe_align_jax._lowering.sharding import vary_together


def _abstract(tokens, *rest, problem: Spread, implementation: str | None):
    """Shape and dtype of the result, for tracing."""
    del rest, implementation
    return result_like(tokens, (problem.num_rows, problem.width), problem.dtype)


def _lowering(problem: Spread, platform: str, implementation: str | None):
    """The function of the operands that copies the rows on this platform."""
    unsupported = functools.partial(spread.unsupported, problem)
    if select.choose("fused_moe", platform, implementation, unsupported) == "xla":
        return _by_gather
    return _by_kernel


def _by_gather(
    problem: Spread, tokens: jax.Array, row_of_pair: jax.Array, pair_of_row: jax.Array
) -> jax.Array:
    """By XLA."""
    del row_of_pair
    sizes = {"num_tokens": problem.num_tokens, "top_k": problem.top_k}
    return reference.rows_of_pairs(tokens, pair_of_row, **sizes)


def _by_kernel(
    problem: Spread,
    tokens: jax.Array,
    row_of_pair: jax.Array,
    pair_of_row: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """By the kernel."""
    from moe_align_jax._grouped_matmul import launch

    del pair_of_row
    return launch.spread_rows(problem, tokens, row_of_pair, interpret)


_p = primitive.make_matmul_primitive("token_rows", _abstract, _lowering, results=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(problem: Spread, implementation: str | None, tokens, where):
    """The rows as a function whose derivative is defined below."""
    if implementation == "emulator":
        # Pallas' interpreter works by ordered callbacks, which no lowering rule can emit.
        return _by_kernel(problem, tokens, *where, interpret=True)
    return _p.bind(tokens, *where, problem=problem, implementation=implementation)


def _forward(problem, implementation, tokens, where):
    """The rows, and what `_backward` needs."""
    return _differentiable(problem, implementation, tokens, where), where


def _backward(problem, implementation, where, ct):
    """A token's cotangent is the sum of those of its pairs."""
    del implementation
    ct, *where = vary_together([ct, *where])
    rows = where[0].reshape(problem.num_tokens, problem.top_k)
    return derivative.sum_of_rows(ct, rows, problem.dtype), tuple(None for _ in where)


_differentiable.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames=("problem", "implementation"))
def run(
    tokens: jax.Array,
    row_of_pair: jax.Array,
    pair_of_row: jax.Array,
    *,
    problem: Spread,
    implementation: str | None,
) -> jax.Array:
    """`[num_rows, width]`: in each pair's row that of its token; the others hold anything, which may be NaN.

    Args:
        tokens: `[num_tokens, width]`.
        row_of_pair: int32 `[num_tokens, top_k]`, -1 for none.
        pair_of_row: int32 `[num_rows]`, anything for rows without a pair.
        problem: one that `spread.unsupported` has nothing against.
        implementation: of `fused_moe`.
    """
    tokens, row_of_pair, pair_of_row = vary_together([tokens, row_of_pair, pair_of_row])
    return _differentiable(problem, implementation, tokens, (row_of_pair, pair_of_row))
