"""Products of e4m3 rows and weights with scales, in plain jax.numpy.

Sums over 128 columns are made of the codes and then scaled into float32: two levels, as DeepGEMM has them. A
code has 4 significant bits, so that each product is exact in every precision that a backend may multiply
float32 with by default, TF32 and bfloat16 among them.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._core.fp8 import GROUP, GROUPS_PER_WORD
from moe_align_jax._grouped_matmul.problem import MatmulProblem

_I32, _F32 = jnp.int32, jnp.float32


def of_rows(problem: MatmulProblem, scales: jax.Array) -> jax.Array:
    """float32 `[rows, groups]` of x's scales, whatever their layout and format."""
    how, groups = problem.scales, problem.scale_groups
    assert how
    rows = problem.num_tokens if problem.top_k else problem.num_rows
    if how.x == "tensor":
        return jnp.broadcast_to(scales, (rows, groups))
    if how.x == "column_major":
        if problem.rows == "masked":  # [e, words, pitch]
            scales = scales[..., : problem.max_rows].swapaxes(1, 2).reshape(rows, -1)
        else:
            scales = scales[:, :rows].T
    return unpack(scales)[:, :groups] if how.packed else scales


def unpack(words: jax.Array) -> jax.Array:
    """float32 `[rows, 4 w]` of int32 `[rows, w]`: each byte is an exponent, 0 that of 0."""
    shift = lax.iota(_I32, GROUPS_PER_WORD) * 8
    exponents = lax.shift_right_logical(
        jnp.broadcast_to(words[..., None], (*words.shape, GROUPS_PER_WORD)),
        jnp.broadcast_to(shift, (*words.shape, GROUPS_PER_WORD)),
    )
    bits = (exponents & 255) << 23
    return lax.bitcast_convert_type(bits, _F32).reshape(words.shape[0], -1)


def product(x: tuple[jax.Array, jax.Array], w: tuple[jax.Array, jax.Array]) -> jax.Array:
    """float32 `[rows, N]`.

    Args:
        x: e4m3 `[rows, K]`, and float32 `[rows, ceil(K / 128)]`.
        w: e4m3 `[N, K]`, and float32 `[ceil(N / 128), ceil(K / 128)]`, or `[1, 1]`.
    """
    (values, scales), (weights, w_scales) = x, w
    num_columns, k = weights.shape
    groups = scales.shape[1]
    if spare := groups * GROUP - k:
        values, weights = (jnp.pad(a, ((0, 0), (0, spare))) for a in (values, weights))
    if w_scales.shape == (1, 1):
        w_scales = jnp.broadcast_to(w_scales, (num_columns, groups))
    else:
        w_scales = jnp.repeat(w_scales, GROUP, axis=0)[:num_columns]

    def step(group, sums):
        rows, columns = (
            lax.dynamic_slice_in_dim(a, group * GROUP, GROUP, 1).astype(_F32)
            for a in (values, weights)
        )
        contracted = (((1,), (1,)), ((), ()))
        partial = lax.dot_general(rows, columns, contracted, preferred_element_type=_F32)
        of_x, of_w = (
            lax.dynamic_index_in_dim(a, group, 1, keepdims=False) for a in (scales, w_scales)
        )
        return sums + partial * (of_x[:, None] * of_w[None, :])

    sums = jnp.zeros((values.shape[0], num_columns), _F32)
    return lax.fori_loop(1, groups, step, step(0, sums)) if groups else sums
