"""The kernel that copies each token's row to the rows of its pairs, by TMA alone.

A CTA takes a token at a time: one warpgroup loads the row into shared memory once, and stores it once per
pair. With `clears` another one looks for rows of blocks in use that hold no pair: they get zeros, so that a
product of them takes little power. No other row is written.

Reads T rows; writes a row per pair, and those zeros. Nothing is atomic, every row is written once. Needs
sm_90: TMA.

T tokens, K top_k, P rows, H values of a row, in g values each.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul.spread import CHECKED_ROWS, Spread, SpreadConfig

_I32 = jnp.int32


def build(
    problem: Spread, config: SpreadConfig, *, interpret: bool = False
) -> Callable[..., jax.Array]:
    """`(row_of_pair [T K] int32, sorted_token_ids [P], num_tokens_post_padded [1], x [T, H / g, g]) ->
    [P, H / g, g]`. Dropped pairs have row -1; of each block the pairs come first."""
    slots, ahead, ctas, top_k = config.slots, config.ahead, config.num_ctas, problem.top_k
    behind = slots - ahead  # stores that may still read while a row is asked for
    pairs, num_rows, each = problem.num_tokens * top_k, problem.num_rows, CHECKED_ROWS

    def body(row_ref, id_ref, used_ref, x_ref, out_ref, rows, zeros, full):
        cta = lax.axis_index("cta")
        mine = lax.div(problem.num_tokens - cta + (ctas - 1), _I32(ctas))

        def slot_of(i):
            return lax.rem(i, _I32(slots))

        def ask(i):
            slot = slot_of(i)
            plgpu.copy_gmem_to_smem(x_ref.at[cta + i * ctas], rows.at[slot], full.at[slot])

        def put(source, row):
            plgpu.copy_smem_to_gmem(source, out_ref.at[row], commit_group=False)

        def first(i, _):
            pl.when(i < mine)(lambda: ask(i))
            return ()

        def spread(i, _):
            token, slot = cta + i * ctas, slot_of(i)
            targets = [row_ref[token * top_k + k] for k in range(top_k)]
            plgpu.barrier_wait(full.at[slot])
            for row in targets:
                pl.when(row >= 0)(lambda row=row: put(rows.at[slot], row))
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(behind, wait_read_only=True)
            pl.when(i + ahead < mine)(lambda: ask(i + ahead))
            return ()

        def is_pair(row):
            pair = id_ref[row]
            return (pair >= 0) & (pair < pairs)

        def clear(i, _):
            row = (cta + i * ctas) * each

            # Whether the last of them is a pair's tells of all: of a block the pairs come first.
            @pl.when(jnp.logical_not(is_pair(jnp.minimum(row + (each - 1), num_rows - 1))))
            def _():
                for k in range(each):
                    there = row + k < num_rows
                    empty = there & jnp.logical_not(is_pair(jnp.minimum(row + k, num_rows - 1)))
                    pl.when(empty)(lambda k=k: put(zeros.at[0], row + k))

            return ()

        def copies():
            lax.fori_loop(0, ahead, first, ())
            lax.fori_loop(0, mine, spread, ())
            plgpu.wait_smem_to_gmem(0)

        def clears():
            nothing = jnp.zeros(zeros.shape, zeros.dtype)
            if not interpret:  # one at a time: rows need not be multiples of more
                layout = plgpu.Layout.WG_STRIDED(zeros.shape, vec_size=1)
                nothing = plgpu.layout_cast(nothing, layout)
            zeros[...] = nothing
            plgpu.commit_smem()
            used = jnp.clip(used_ref[0], 0, num_rows)
            chunks = lax.div(used + (each - 1), _I32(each))
            own = jnp.maximum(lax.div(chunks - cta + (ctas - 1), _I32(ctas)), 0)
            lax.fori_loop(0, own, clear, ())
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0)

        if problem.clears:
            lax.cond(lax.axis_index("warpgroup") == 0, copies, clears)
        else:
            copies()

    shape, dtype = problem.grained(1)[1:], jnp.dtype(problem.dtype)
    options: dict[str, Any] = {"interpret": plgpu.InterpretGPUParams()} if interpret else {}
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(problem.grained(num_rows), dtype),
        scratch_types=[
            plgpu.SMEM((slots, *shape), dtype),
            plgpu.SMEM((problem.zero_rows, *shape), dtype),
            plgpu.Barrier(num_barriers=slots),
        ],
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=1 + problem.clears,
        thread_name="warpgroup",
        kernel_name="spread_rows",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        **options,
    )
