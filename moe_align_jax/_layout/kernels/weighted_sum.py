"""The kernel of the weighted sum of each token's rows, in Pallas Mosaic GPU.

A CTA of one warpgroup takes a tile of a token's row: it asks for that of all pairs before it uses any, and
adds up in float32, k ascending. LLVM fuses a product with its sum; XLA's own kernel rounds the product.

Reads the rows of pairs and writes T rows; a row's last tile may overlap the one before: both write the same
bits. Nothing is atomic. Needs sm_90.

T tokens, K top_k, P rows, H values of a row, g values in 16 bytes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._layout.kernels.sizes import THREADS, RowSum, SumConfig
from moe_align_jax._lowering.launch_value import launch_value

_I32, _F32 = jnp.int32, jnp.float32

# `store(token, first, value)`: value `[tile / g, g]`, in the dtype of the result, goes to the token's row
# `[H / g, g]`, from `first` on.
type Store = Callable[[jax.Array, jax.Array, jax.Array], None]


def build(
    problem: RowSum,
    config: SumConfig,
    *,
    interpret: bool = False,
    sized_at_launch: bool = False,
) -> Callable[..., jax.Array]:
    """`(y [P, H / g, g], row_of_pair [T, K] int32, weights [T, K] float32 if weighted) -> [T, H / g, g]`.

    `sized_at_launch`: for a launch outside XLA. The problem's tokens are the most that a launch has; how many
    it has rides in the place of a first operand's pointer, times 256.
    """

    def body(*given):
        tokens: Any = problem.num_tokens
        if sized_at_launch:
            size_ref, *given = given
            tokens = launch_value(size_ref)
        y_ref, rows_ref, *refs = given

        def store(token, first, value):
            put(out_ref.at[token, pl.ds(first, value.shape[0])], value, interpret=interpret)

        *weights_ref, out_ref = refs
        every = (y_ref, rows_ref, *weights_ref)
        add_up(problem, config, every, store, interpret=interpret, tokens=tokens)

    options: dict[str, Any] = {"interpret": plgpu.InterpretGPUParams()} if interpret else {}
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(problem.grained(problem.num_tokens), problem.out_dtype),
        grid=(config.num_ctas, config.parts(problem)),
        grid_names=("cta", "part"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="sum_rows",
        # What is read is never written, and no memory is shared.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        **options,
    )


def add_up(
    problem: RowSum,
    config: SumConfig,
    refs: tuple[Any, ...],
    store: Store,
    *,
    interpret: bool,
    tokens: Any = None,
) -> None:
    """This CTA's share of all rows: a tile of every num_ctas-th, by `lax.axis_index` of "cta" and "part".

    Args:
        problem, config: what to do, and in what pieces.
        refs: y, row_of_pair and, if weighted, weights, in global memory.
        store: where a tile goes.
        interpret: whether Pallas' interpreter runs it, which knows no layouts.
        tokens: how many there are; None for those of the problem.
    """
    tokens = problem.num_tokens if tokens is None else tokens
    grain, ctas = problem.grain, config.num_ctas
    # The last tile overlaps the one before where tiles do not divide a row.
    tile, last = config.tile // grain, (problem.width - config.tile) // grain
    first = jnp.minimum(lax.axis_index("part") * tile, last)
    cta = lax.axis_index("cta")

    def row(step, _):
        token = cta + step * ctas
        store(token, first, _tile(problem, config, refs, token, first, interpret))
        return ()

    if isinstance(tokens, int) and tokens == ctas:
        row(0, ())
    else:
        lax.fori_loop(0, lax.div(tokens - cta + ctas - 1, _I32(ctas)), row, ())


def put(ref: Any, value: jax.Array, *, interpret: bool) -> None:
    """Stores a tile."""
    if not interpret and hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)  # jax 0.12
    else:
        ref[...] = value


def _tile(
    problem: RowSum,
    config: SumConfig,
    refs: tuple[Any, ...],
    token: jax.Array,
    first: jax.Array,
    interpret: bool,
) -> jax.Array:
    """The sums of a tile's values of a token, from value `first` of its row on, as a warpgroup holds them."""
    y_ref, rows_ref, *weights_ref = refs
    tile, top_k = config.tile, problem.top_k
    shape = (tile // problem.grain, problem.grain)
    layout = plgpu.Layout.WG_STRIDED(shape, tile // THREADS)

    def in_layout(value):
        return value if interpret else plgpu.layout_cast(value, layout)

    def load(row):
        ref = y_ref.at[row, pl.ds(first, shape[0])]
        return ref[...] if interpret else plgpu.load(ref, layout=layout, optimized=False)

    total = in_layout(jnp.zeros(shape, _F32))
    for begin in range(0, top_k, config.ahead):
        pairs = range(begin, min(begin + config.ahead, top_k))
        rows = [rows_ref[token, k] for k in pairs]
        weights = [ref[token, k] for ref in weights_ref for k in pairs]
        # Without branches, into which LLVM would move the loads: all are on their way at once. A pair without
        # a row reads that of another one, which the cache gives, and does not use it.
        some = jnp.maximum(functools.reduce(jnp.maximum, rows), 0)
        values = [load(jnp.where(row < 0, some, row)) for row in rows]
        for k, value in enumerate(values):
            each = value.astype(_F32)
            more = total + (each * weights[k] if weights else each)
            total = lax.select(in_layout(lax.broadcast(rows[k] >= 0, shape)), more, total)
    return total.astype(problem.out_dtype)
