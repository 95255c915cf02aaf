"""A layer's backward step across its activation, in one kernel: a product that ends in the derivative.

With d the cotangent of a token's result, s the weight of a row's pair, (gate, up) the row's first products:

    g = d @ w_down^T            not stored: it stays in registers
    dh = s g * (derivative of silu(gate) * up)          [P, 2 N]
    s a = s silu(gate) * up                              [P, N], for the gradient of w_down
    sum over N of g a                                    [P], for the gradient of the weights

The product is `kernel`'s, of gathered rows of d. A warpgroup reads its part of the first products from
global memory when its sums are complete. The sum over N is made in parts, one for each tile of columns,
which are added up in their order: nothing is atomic.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul import epilogue, kernel, launch
from moe_align_jax._grouped_matmul.config import Config, unsupported
from moe_align_jax._grouped_matmul.problem import ActivationGradient
from moe_align_jax._grouped_matmul.shape import shape_of

_I32, _F32 = jnp.int32, jnp.float32
TILE = Config("m", 128, 128, 64, 5)  # of 256 columns, the compiler of jax 0.11 spills registers
NO_PAIR = float(jnp.finfo(_F32).min)  # times a zero it is zero, which no infinity and no NaN is
PIECE = 16  # columns that are finished at a time: of 64, registers were spilled
_SLOTS = 8  # pieces of results in shared memory, per warpgroup


class Found(NamedTuple):
    """dh `[P, 2 N]` and s a `[P, N]` of the products' dtype, and float32 `[P]`, the sums of g a.

    Rows behind those in use are unspecified; padding rows of blocks in use are zero in the first two.
    """

    products: jax.Array
    scaled: jax.Array
    sums: jax.Array


def cannot(problem: ActivationGradient) -> str | None:
    """Why the kernel does not take this problem, or None."""
    product, weights = problem.product, problem.weights
    if reason := unsupported(product):
        return reason
    usual = weights.activation == "silu" and weights.gated and not weights.interleaved
    if not usual or weights.swiglu_limit is not None or weights.swiglu_alpha is not None:
        return "the kernel has the derivative of silu(gate) * up alone, with all of gate first"
    if product.rows != "blocks" or product.block_size % TILE.bm or not product.top_k:
        return f"the kernel needs blocks of a multiple of {TILE.bm} rows, gathered"
    if product.n % TILE.bn or product.num_rows % product.block_size:
        return f"the kernel needs N a multiple of {TILE.bn}, and whole blocks"
    return None


def run(
    problem: ActivationGradient,
    products: jax.Array,
    scale: jax.Array,
    *operands: jax.Array,
    interpret: bool = False,
) -> Found:
    """By the kernel.

    Args:
        problem: one that `cannot` has nothing against.
        products: `[P, 2 N]`, the first products.
        scale: float32 `[P]`, the weight of each row's pair, `NO_PAIR` for rows without one.
        operands: as `problem.product.inputs` names them.
    """
    config = TILE._replace(num_ctas=2) if interpret else TILE
    with jax.enable_x64(False):  # its indices are int32; plgpu makes 64-bit ones otherwise
        given = arguments(problem, products, scale, *operands, interpret=interpret)
        parts, toward, scaled = build(problem, config, interpret=interpret)(*given)
    return Found(toward, scaled, jnp.sum(parts, axis=0))


def arguments(
    problem: ActivationGradient,
    products: jax.Array,
    scale: jax.Array,
    *operands: jax.Array,
    interpret: bool = False,
) -> list[jax.Array]:
    """The kernel's operands."""
    named = dict(zip(problem.product.inputs, operands, strict=True))
    more = launch.arguments(problem.product, TILE, named, None, interpret=interpret)
    return [scale, products, *more]


def build(
    problem: ActivationGradient, config: Config, *, interpret: bool = False
) -> Callable[..., Any]:
    """The kernel as a function of what `arguments` gives: parts of the sums, dh, s a."""
    ending = _ending(problem, config, interpret)
    return kernel.build(problem.product, config, interpret=interpret, ending=ending)


def _ending(problem: ActivationGradient, config: Config, interpret: bool) -> epilogue.Ending:
    """What is made of a tile's sums: the gradient of gate and up, and a part of that of the row weights."""
    product = problem.product
    shape, piece = shape_of(product, config), 64 if interpret else PIECE
    rows, n = product.num_rows, product.n
    like = jax.ShapeDtypeStruct
    outputs = (like((shape.n_tiles, rows), _F32), like((rows, 2 * n), product.dtype))

    def load(ref: Any) -> jax.Array:
        if interpret:
            return ref[...].astype(_F32)
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False).astype(_F32)

    def vector(ref: Any) -> jax.Array:
        if interpret:
            found = ref[...]
        else:
            found = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        return lax.broadcast_in_dim(found, (64, piece), (0,))

    def finish(refs: Any, sums: list[jax.Array], tile: Any, at: Any, warpgroup: Any) -> None:
        scale_ref, products_ref, parts_ref, toward_ref = refs.more
        row, column, _ = at
        here = pl.ds(pl.multiple_of(row, 64), 64)
        stored = 0

        def put(value, ref, start):
            nonlocal stored
            slot = stored % _SLOTS
            stored += 1
            plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
            refs.o_tiles.at[warpgroup, slot][...] = value.astype(product.dtype)
            plgpu.commit_smem()
            columns = pl.ds(pl.multiple_of(start, piece), piece)
            plgpu.copy_smem_to_gmem(refs.o_rows.at[warpgroup, slot], ref.at[here, columns])

        [g_tile], total = sums, None
        scale = vector(scale_ref.at[here])
        zeros, lowest = jnp.zeros((64, piece), _F32), jnp.full((64, piece), NO_PAIR, _F32)
        if not interpret:
            zeros, lowest = (plgpu.layout_cast(v, plgpu.Layout.WGMMA) for v in (zeros, lowest))
        for c in range(0, g_tile.shape[1], piece):
            start = pl.multiple_of(column + c, piece)
            g = g_tile[:, c : c + piece]
            # Rows without a pair may hold anything. Of d they have zeros, so that g is zero.
            has_pair = scale != lowest  # a weight of NaN is one
            gate = load(products_ref.at[here, pl.ds(start, piece)])
            gate = lax.select(has_pair, gate, zeros)
            sigmoid = 1.0 / (1.0 + jnp.exp(-gate))
            active = gate * sigmoid
            up = load(products_ref.at[here, pl.ds(pl.multiple_of(n + start, piece), piece)])
            up = lax.select(has_pair, up, zeros)
            found = jnp.sum(g * active * up, axis=1)
            total = found if total is None else total + found
            put(active * up * scale, refs.out, start)
            toward = g * scale
            put(toward * active, toward_ref, n + start)
            put(toward * up * (sigmoid + active * (1.0 - sigmoid)), toward_ref, start)
        parts_ref[tile.n, here] = total

    return epilogue.Ending("activation_gradient", 2, outputs, piece, _SLOTS, finish)
