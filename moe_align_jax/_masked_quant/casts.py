"""Casts of rows and of blocks of weights to e4m3 with scales.

In plain jax.numpy; on a GPU rows of 16-bit values are cast by the kernel of `silu_and_mul_masked_quant`,
without its activation.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._core.fp8 import GROUP, GROUPS_PER_WORD
from moe_align_jax._lowering.sharding import explicitly_sharded, vary_together
from moe_align_jax._masked_quant import primitive
from moe_align_jax._masked_quant.problem import MaskedQuantProblem
from moe_align_jax._masked_quant.reference import codes, rows_quantised, scale_of

# Below, what a quotient leaves would not be a normal number.
_LEAST_DIVIDED = 1e-20
_OPTIONS = ("scale_format", "scale_layout", "floor", "divide", "implementation")


@functools.partial(jax.jit, static_argnames=_OPTIONS)
def rowwise(
    x: jax.Array,
    used: jax.Array | None = None,
    *,
    scale_format: str,
    scale_layout: str,
    floor: float,
    divide: bool,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`quantize_rowwise`, of arguments that were checked.

    Args:
        used: int32 `[1]`, how many of the first rows are wanted, of x `[M, K]`; the others are unspecified
            then. None: all.
        implementation: None for what is best, or "xla".
        x, scale_format, scale_layout, floor, divide: of `quantize_rowwise`.
    """
    with jax.named_scope("quantize_rowwise"):
        x = lax.stop_gradient(x)
        options = scale_format, scale_layout, floor, divide
        problem = None if implementation else _of_kernel(x, *options)
        if problem is None:
            return rows_quantised(x, *options)
        return _by_primitive(problem, x, used)


def _of_kernel(
    x: jax.Array, scale_format: str, scale_layout: str, floor: float, divide: bool
) -> MaskedQuantProblem | None:
    """The cast as the kernel knows it; None for one that it never takes."""
    *lead, rows, width = x.shape
    static = all(isinstance(size, int) for size in x.shape)
    if not static or not math.prod(x.shape) or explicitly_sharded(x):
        return None
    if str(x.dtype) not in ("bfloat16", "float16") or (divide and floor < _LEAST_DIVIDED):
        return None
    if scale_format == "ue8m0_packed" and (
        scale_layout != "column_major" or width % (GROUP * GROUPS_PER_WORD)
    ):
        return None
    options = GROUP, scale_format, scale_layout, None, None, floor
    boxes = math.prod(lead)
    return MaskedQuantProblem(
        *(boxes, rows, width, str(x.dtype), *options), divide=divide, activates=False
    )


def _by_primitive(
    problem: MaskedQuantProblem, x: jax.Array, used: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(codes, scales) of x by the primitive: of the first `used` rows of each box, None for all rows."""
    shape = x.shape
    boxes, rows = problem.num_experts, problem.max_rows
    if used is None:
        used = jnp.full(boxes, rows, jnp.int32)
    operands = vary_together([x.reshape(boxes, rows, problem.width), used])
    q, scales = primitive.masked_quant_p.bind(*operands, problem=problem, implementation=None)
    return q.reshape(shape), scales.reshape(*shape[:-2], *scales.shape[1:])


@functools.partial(jax.jit, static_argnames=("scale_format", "floor", "divide"))
def blockwise(
    w: jax.Array, *, scale_format: str, floor: float, divide: bool
) -> tuple[jax.Array, jax.Array]:
    """`quantize_blockwise`, of arguments that were checked."""
    with jax.named_scope("quantize_blockwise"):
        *lead, n, k = w.shape
        spare = (*[(0, 0)] * len(lead), (0, -n % GROUP), (0, -k % GROUP))
        values = jnp.pad(lax.stop_gradient(w).astype(jnp.float32), spare)
        blocks = (-(-n // GROUP), -(-k // GROUP))
        # One dimension after the other: jax has no rule for two where any is split over Explicit axes.
        values = values.reshape(*lead, blocks[0], GROUP, blocks[1] * GROUP)
        values = values.reshape(*lead, blocks[0], GROUP, blocks[1], GROUP)
        amax = jnp.max(jnp.abs(values), axis=(-3, -1), initial=0.0)
        scale = scale_of(amax, floor, scale_format)
        q = codes(values, scale[..., :, None, :, None], divide=divide)
        q = q.reshape(*lead, blocks[0] * GROUP, blocks[1], GROUP)
        q = q.reshape(*lead, blocks[0] * GROUP, blocks[1] * GROUP)
        return q[..., :n, :k], scale
