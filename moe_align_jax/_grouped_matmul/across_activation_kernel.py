"""The kernel of a layer's backward step across its activation, four rows at a time, in one launch.

With g `[P, N]` the cotangent of s a, s the weight of a row's pair, and (gate, up) the row's first products:

    dh = s g * (derivative of silu(gate) * up)          [P, 2 N]
    s a = s silu(gate) * up                              [P, N], for the gradient of w_down
    sum over N of g a                                    [P], for the gradient of the weights

It is `reference.across_activation`, of which XLA makes two fusions that read g, gate and up twice. Here a
value is read once and written once: 6 N bytes in and 6 N out for each row in use. Rows behind the blocks in
use are neither read nor written.

A CTA of one warpgroup takes a part of four rows, tile after tile: a warp has one of them, a thread 16 bytes
of it, or 8. It asks for the next tile's values before it uses those of this one. Each part of a row gives a
partial sum over N; XLA adds them up in their order: nothing is atomic. It shares no memory between threads.

It takes silu(gate) * up with all of gate first, in bfloat16 and float16, and N a multiple of 128. Of other
activations, of gate and up interleaved, with a limit or an alpha of SwiGLU, ungated, in float32 and with
other N, XLA's fusions remain: `cannot` says why.

P rows of N values.
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
from moe_align_jax._grouped_matmul.activation_gradient_kernel import NO_PAIR
from moe_align_jax._grouped_matmul.problem import ActivationGradient

_I32, _F32 = jnp.int32, jnp.float32
ROWS = 4  # of a tile, a warp each
_NARROW, _WIDE = 128, 256  # columns of a tile: 4 values of a thread, or 8
_CTAS_OF_SM = 5
_MOST_CHUNKS = 7


class Sizes(NamedTuple):
    """How four rows are cut, and the grid.

    Attributes:
        tile: columns that a CTA takes at a time.
        chunks: tiles of a part of the rows, which one CTA takes one after the other.
        parts: of the rows.
        num_ctas: of the grid; they take the parts of all rows in turn.
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
    dtypes = {product.dtype, product.out_dtype}
    if product.rows != "blocks" or dtypes not in ({"bfloat16"}, {"float16"}):
        return "the kernel takes blocks of bfloat16 or float16"
    if not product.n or product.n % _NARROW:
        return f"the kernel needs N a multiple of {_NARROW}"
    if product.num_rows % ROWS or product.block_size % ROWS:
        return f"the kernel needs rows, and rows of a block, in multiples of {ROWS}"
    if 2 * product.num_rows * product.n > INT32_MAX:
        return "the kernel counts values in int32"
    return None


def sizes_of(problem: ActivationGradient) -> Sizes:
    """The cut of this problem's rows, and the grid."""
    n = problem.product.n
    tile = _NARROW if n % _WIDE else _WIDE
    tiles = n // tile
    chunks = next(n for n in range(_MOST_CHUNKS, 0, -1) if tiles % n == 0)
    return Sizes(tile, chunks, tiles // chunks, NUM_SMS * _CTAS_OF_SM)


def run(
    problem: ActivationGradient,
    products: jax.Array,
    g: jax.Array,
    scale: jax.Array,
    num_rows: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dh `[P, 2 N]`, s a `[P, N]`, float32 sums of g a `[P]`): unspecified behind the blocks in use.

    Args:
        problem: one that `cannot` has nothing against.
        products: `[P, 2 N]`, the first products.
        g: `[P, N]`, in the products' dtype.
        scale: float32 `[P]`, the weight of each row's pair. Rows with `NO_PAIR` are zero in all results,
            whatever the other operands hold there.
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
            products.reshape(rows, 2, n),
            g,
        )
    return toward.reshape(rows, 2 * n), scaled, jnp.sum(parts, axis=0)


def build(
    problem: ActivationGradient, sizes: Sizes, *, interpret: bool = False
) -> Callable[..., Any]:
    """`(num_rows [1], scale [P], products [P, 2, N], g [P, N]) -> [dh, s a, partial sums]`.

    The results have the shapes of products and of g, and `[parts, P]` in float32.
    """
    rows, n = problem.product.out_shape
    dtype, like = jnp.dtype(problem.product.dtype), jax.ShapeDtypeStruct

    def body(*refs):
        _Loop(problem, sizes, _Refs(*refs), interpret)()

    options: dict[str, Any] = {"interpret": plgpu.InterpretGPUParams()} if interpret else {}
    return plgpu.kernel(
        body,
        out_type=[
            like((rows, 2, n), dtype),
            like((rows, n), dtype),
            like((sizes.parts, rows), _F32),
        ],
        grid=(sizes.num_ctas,),
        grid_names=("cta",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="across_activation",
        # What is read is never written, and no memory is shared.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **options,
    )


class _Refs(NamedTuple):
    """The kernel's operands and results, in order: see `build`."""

    num_rows: Any
    scale: Any
    products: Any
    g: Any
    toward: Any
    scaled: Any
    parts: Any


class _Loop:
    """The loop of a CTA over its parts of four rows: a step is a tile of one."""

    def __init__(self, problem: ActivationGradient, sizes: Sizes, refs: _Refs, interpret: bool):
        self.problem, self.sizes, self.refs, self.interpret = problem, sizes, refs, interpret
        self.layout: Any = None if interpret else _layout(sizes.tile)
        self.cta = lax.axis_index("cta")

    def __call__(self) -> None:
        """All steps."""
        steps = self._num_steps()
        self.zeros = self._in_layout(jnp.zeros((ROWS, self.sizes.tile), _F32))
        self.no_sums = self._in_layout(jnp.zeros(ROWS, _F32))

        def one(step, carry):
            """A step, whose values are there; those of the next one are asked for."""
            total, *values = carry
            following = self._ask(step + 1)
            return self._finish(step, total, *values), *following

        @pl.when(steps > 0)
        def _():
            """The last step asks for nothing: no row behind those in use is read."""
            first = (self.no_sums, *self._ask(_I32(0)))
            last = lax.fori_loop(0, steps - 1, one, first)
            self._finish(steps - 1, *last)

    def _num_steps(self) -> jax.Array:
        """Of this CTA."""
        rows, _ = self.problem.product.out_shape
        block, parts, num_ctas = (
            self.problem.product.block_size,
            self.sizes.parts,
            self.sizes.num_ctas,
        )
        used = jnp.clip(self.refs.num_rows[0], 0, rows)
        # Whole blocks: a product reads all rows of a block in use.
        used = jnp.minimum(lax.div(used + (block - 1), _I32(block)) * block, rows)
        items = lax.div(used, _I32(ROWS)) * parts
        mine = lax.div(items - self.cta + (num_ctas - 1), _I32(num_ctas))
        return jnp.maximum(mine, 0) * self.sizes.chunks

    def _place(self, step: jax.Array) -> tuple[Any, jax.Array, Any]:
        """Rows, part, and columns of a step."""
        parts, chunks, tile = self.sizes.parts, self.sizes.chunks, self.sizes.tile
        i = lax.div(step, _I32(chunks))
        item = self.cta + i * self.sizes.num_ctas
        row, part = lax.div(item, _I32(parts)) * ROWS, lax.rem(item, _I32(parts))
        column = (part * chunks + (step - i * chunks)) * tile
        return pl.ds(row, ROWS), part, pl.ds(column, tile)

    def _ask(self, step: jax.Array) -> tuple[jax.Array, ...]:
        """A step's scales and values (g, gate, up). Those of rows without a pair are not used."""
        refs, (rows, _, columns) = self.refs, self._place(step)
        gate, up = (self._load(refs.products.at[rows, k, columns]) for k in range(2))
        scale = self._load(refs.scale.at[rows], of_rows=True)
        return scale, self._load(refs.g.at[rows, columns]), gate, up

    def _finish(
        self, step: jax.Array, total: jax.Array, scale: jax.Array, *values: jax.Array
    ) -> jax.Array:
        """Stores a step's results; the sums `[4]` of the part up to here."""
        refs, tile, chunks = self.refs, self.sizes.tile, self.sizes.chunks
        dtype = jnp.dtype(self.problem.product.dtype)
        rows, part, columns = self._place(step)
        chunk = lax.rem(step, _I32(chunks))
        scale = self._in_layout(lax.broadcast_in_dim(scale, (ROWS, tile), (0,)))
        has_pair = scale != NO_PAIR
        g, gate, up = (lax.select(has_pair, x.astype(_F32), self.zeros) for x in values)
        scale = lax.select(has_pair, scale, self.zeros)
        sigmoid = 1.0 / (1.0 + jnp.exp(-gate))
        active = gate * sigmoid
        value = active * up
        begins = self._in_layout(lax.broadcast(chunk == 0, (ROWS,)))
        total = lax.select(begins, self.no_sums, total) + jnp.sum(g * value, axis=1)
        toward = g * scale
        slope = sigmoid + active * (1.0 - sigmoid)
        self._store(refs.scaled.at[rows, columns], (value * scale).astype(dtype))
        self._store(refs.toward.at[rows, 0, columns], (toward * up * slope).astype(dtype))
        self._store(refs.toward.at[rows, 1, columns], (toward * active).astype(dtype))
        pl.when(chunk == chunks - 1)(lambda: self._store(refs.parts.at[part, rows], total))
        return total

    # -- tiles in registers

    def _load(self, ref: Any, of_rows: bool = False) -> jax.Array:
        """A tile of values from global memory, in registers; or a value of each row."""
        if self.interpret:
            return ref[...]
        layout = self.layout.reduce(1) if of_rows else self.layout
        return plgpu.load(ref, layout=layout, optimized=False)

    def _store(self, ref: Any, value: jax.Array) -> None:
        """A tile, or a vector of its sums, to global memory."""
        if not self.interpret and hasattr(plgpu, "store"):
            plgpu.store(ref, value, optimized=False)  # jax 0.12
        else:
            ref[...] = value

    def _in_layout(self, value: jax.Array) -> jax.Array:
        """`[4, tile]` as a tile lies in registers; `[4]` as its sums do."""
        if self.interpret:
            return value
        layout = self.layout if value.ndim == 2 else self.layout.reduce(1)
        return plgpu.layout_cast(value, layout)


def _layout(tile: int) -> Any:
    """Of `[4, tile]` values: a warp has a row, a thread its values of it in one piece."""
    values = tile // 32
    tiling = plgpu.Tiling(((ROWS, tile), (values,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
