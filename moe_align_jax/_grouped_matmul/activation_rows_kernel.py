"""The derivative of a layer's activation, row by row, in one launch: what XLA makes two fusions of.

With g the cotangent of a row's s a, and (gate, up) its first products:

    dh = s g * (derivative of silu(gate) * up)          [P, 2 N]
    s a = s silu(gate) * up                              [P, N]
    sum over N of g a                                    [P]

A CTA of one warpgroup takes a part of a row at a time, and asks for the next values of the three arrays
before it uses the last. Reads 6 N bytes and writes 6 N per row in use, each once: two fusions read twice as
much. The sum over N is made in parts, which are added up in their order: nothing is atomic.

P rows, N = 128 G values of a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._core.hopper import NUM_SMS
from moe_align_jax._core.int32 import INT32_MAX
from moe_align_jax._grouped_matmul.problem import ActivationGradient

_I32, _F32 = jnp.int32, jnp.float32
GROUP = 128  # values that are added up together
NO_PAIR = float(jnp.finfo(_F32).min)  # in place of the weight of a row without a pair
_MOST_CHUNKS = 7  # of a part of a row


class Sizes(NamedTuple):
    """How a row is cut.

    Attributes:
        tile: groups of 128 values that a CTA takes at a time, 8 or 4.
        chunks: tiles of a part of a row.
        parts: of a row.
        num_ctas: of the grid.
    """

    tile: int
    chunks: int
    parts: int
    num_ctas: int


def cannot(problem: ActivationGradient) -> str | None:
    """Why the kernel does not take this problem, or None."""
    product, weights = problem.product, problem.weights
    sizes = (product.num_rows, product.n)
    if not all(isinstance(size, int) for size in sizes):
        return "the kernel needs static shapes"
    usual = weights.activation == "silu" and weights.gated and not weights.interleaved
    if not usual or weights.swiglu_limit is not None or weights.swiglu_alpha is not None:
        return "the kernel has the derivative of silu(gate) * up alone, with all of gate first"
    if product.rows != "blocks" or product.dtype not in ("bfloat16", "float16"):
        return "the kernel takes blocks of bfloat16 or float16"
    if product.n % (4 * GROUP):
        return f"the kernel needs N a multiple of {4 * GROUP}"
    if product.num_rows * product.n > INT32_MAX:
        return "the kernel counts values in int32"
    return None


def sizes_of(problem: ActivationGradient) -> Sizes:
    """The cut of a row of this problem."""
    groups = problem.product.n // GROUP
    tile = 8 if groups % 8 == 0 else 4
    tiles = groups // tile
    chunks = next(n for n in range(_MOST_CHUNKS, 0, -1) if tiles % n == 0)
    return Sizes(tile, chunks, tiles // chunks, NUM_SMS * 5)


def run(
    problem: ActivationGradient,
    products: jax.Array,
    g: jax.Array,
    scale: jax.Array,
    num_rows: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dh `[P, 2 N]`, s a `[P, N]`, float32 `[P]`): unspecified from row `num_rows[0]` on.

    Args:
        problem: one that `cannot` has nothing against.
        products: `[P, 2 N]`.
        g: `[P, N]`.
        scale: float32 `[P]`, `NO_PAIR` for rows without a pair: they are zero in the first two results.
        num_rows: int32 `[1]`, rows in use.
        interpret: whether Pallas' interpreter runs it, on a CPU.
    """
    rows, n = problem.product.out_shape
    sizes = sizes_of(problem)
    if interpret:
        sizes = sizes._replace(num_ctas=2)
    with jax.enable_x64(False):  # its indices are int32; plgpu makes 64-bit ones otherwise
        toward, scaled, parts = build(problem, sizes, interpret=interpret)(
            num_rows,
            scale,
            products.reshape(rows, 2, n // GROUP, GROUP),
            g.reshape(rows, n // GROUP, GROUP),
        )
    sums = jnp.sum(parts.reshape(rows, -1), axis=1)
    return toward.reshape(rows, 2 * n), scaled.reshape(rows, n), sums


def build(
    problem: ActivationGradient, sizes: Sizes, *, interpret: bool = False
) -> Callable[..., Any]:
    """`(num_rows [1], scale [P], products [P, 2, G, 128], g [P, G, 128]) -> [dh, s a, parts of sums]`."""
    rows, n = problem.product.out_shape
    dtype, groups, tile = jnp.dtype(problem.product.dtype), n // GROUP, sizes.tile
    layout: Any = None
    if not interpret:
        layout = _layout(tile)

    def load(ref: Any) -> jax.Array:
        if interpret:
            return ref[...]
        return plgpu.load(ref, layout=layout, optimized=False)

    def store(ref: Any, value: jax.Array) -> None:
        if not interpret and hasattr(plgpu, "store"):
            plgpu.store(ref, value, optimized=False)  # jax 0.12
        else:
            ref[...] = value

    def constant(value: jax.Array, reduced: bool = False) -> jax.Array:
        if interpret:
            return value
        return plgpu.layout_cast(value, layout.reduce(1) if reduced else layout)

    def body(count_ref, scale_ref, products_ref, g_ref, toward_ref, scaled_ref, parts_ref):
        cta, chunks = lax.axis_index("cta"), sizes.chunks
        count = jnp.clip(count_ref[0], 0, rows) * sizes.parts
        mine = lax.div(count - cta + (sizes.num_ctas - 1), _I32(sizes.num_ctas))
        total_steps = jnp.maximum(mine, 0) * chunks
        zeros, no_sums = constant(jnp.zeros((tile, GROUP), _F32)), jnp.zeros(tile, _F32)
        no_sums = constant(no_sums, reduced=True)

        def place(step):
            """Row, part, and first group of a step of this CTA."""
            i = lax.div(step, _I32(chunks))
            item = cta + i * sizes.num_ctas
            row, part = lax.div(item, _I32(sizes.parts)), lax.rem(item, _I32(sizes.parts))
            return row, part, (part * chunks + (step - i * chunks)) * tile

        def ask(step):
            """A step's scale and values. Those of rows without a pair are not used."""
            row, _, first = place(step)
            at = pl.ds(first, tile)
            gate, up = (load(products_ref.at[row, k, at]) for k in range(2))
            return scale_ref[row], load(g_ref.at[row, at]), gate, up

        def finish(step, total, scale, *values):
            row, part, first = place(step)
            at, c = pl.ds(first, tile), lax.rem(step, _I32(chunks))
            here = constant(lax.broadcast(scale > NO_PAIR, (tile, GROUP)))
            g, gate, up = (lax.select(here, x.astype(_F32), zeros) for x in values)
            scale = jnp.where(scale > NO_PAIR, scale, 0.0)
            sigmoid = 1.0 / (1.0 + jnp.exp(-gate))
            active = gate * sigmoid
            value = active * up
            first_one = constant(lax.broadcast(c == 0, (tile,)), reduced=True)
            total = lax.select(first_one, no_sums, total) + jnp.sum(g * value, axis=1)
            toward = g * scale
            slope = sigmoid + active * (1.0 - sigmoid)
            store(scaled_ref.at[row, at], (value * scale).astype(dtype))
            store(toward_ref.at[row, 0, at], (toward * up * slope).astype(dtype))
            store(toward_ref.at[row, 1, at], (toward * active).astype(dtype))
            pl.when(c == chunks - 1)(lambda: store(parts_ref.at[row, part], total))
            return total

        def one(step, carry):
            total, *values = carry
            following = ask(step + 1)
            return finish(step, total, *values), *following

        @pl.when(total_steps > 0)
        def _():
            first = (no_sums, *ask(_I32(0)))
            last = lax.fori_loop(0, total_steps - 1, one, first)
            finish(total_steps - 1, *last)

    like = jax.ShapeDtypeStruct
    options: dict[str, Any] = {"interpret": plgpu.InterpretGPUParams()} if interpret else {}
    return plgpu.kernel(
        body,
        out_type=[
            like((rows, 2, groups, GROUP), dtype),
            like((rows, groups, GROUP), dtype),
            like((rows, sizes.parts, tile), _F32),
        ],
        grid=(sizes.num_ctas,),
        grid_names=("cta",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="activation_gradient_rows",
        # What is read is never written, and no memory is shared.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **options,
    )


def _layout(tile: int) -> Any:
    """Of `[tile, 128]` values: a group within a warp, 16 or 8 bytes of 16 bits for a thread."""
    if tile == 8:
        tiling = plgpu.Tiling(((8, GROUP), (2, GROUP), (8,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
    tiling = plgpu.Tiling(((4, GROUP), (4,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
