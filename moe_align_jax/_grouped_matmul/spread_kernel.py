"""The kernel that copies each token's row to the rows of its pairs, by TMA alone.

A CTA takes a token at a time: it loads the row into shared memory once, and stores it once per pair. Rows of
no pair are not written.

Reads T rows; writes one per pair. Nothing is atomic, every row is written once. Needs sm_90: TMA.

T tokens, K top_k, P rows, H values of a row, in g values each.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul.spread import Spread, SpreadConfig

_I32 = jnp.int32


def build(
    problem: Spread, config: SpreadConfig, *, interpret: bool = False
) -> Callable[..., jax.Array]:
    """`(row_of_pair [T K] int32, x [T, H / g, g]) -> [P, H / g, g]`. Dropped pairs have row -1."""
    slots, ahead, ctas, top_k = config.slots, config.ahead, config.num_ctas, problem.top_k
    behind = slots - ahead  # stores that may still read while a row is asked for

    def body(row_ref, x_ref, out_ref, rows, full):
        cta = lax.axis_index("cta")
        mine = lax.div(problem.num_tokens - cta + (ctas - 1), _I32(ctas))

        def slot_of(i):
            return lax.rem(i, _I32(slots))

        def ask(i):
            slot = slot_of(i)
            plgpu.copy_gmem_to_smem(x_ref.at[cta + i * ctas], rows.at[slot], full.at[slot])

        def first(i, _):
            pl.when(i < mine)(lambda: ask(i))
            return ()

        def spread(i, _):
            token, slot = cta + i * ctas, slot_of(i)
            targets = [row_ref[token * top_k + k] for k in range(top_k)]
            plgpu.barrier_wait(full.at[slot])

            def put(row):
                source = rows.at[slot]
                plgpu.copy_smem_to_gmem(source, out_ref.at[row], commit_group=False)

            for row in targets:
                pl.when(row >= 0)(lambda row=row: put(row))
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(behind, wait_read_only=True)
            pl.when(i + ahead < mine)(lambda: ask(i + ahead))
            return ()

        lax.fori_loop(0, ahead, first, ())
        lax.fori_loop(0, mine, spread, ())
        plgpu.wait_smem_to_gmem(0)

    shape, dtype = problem.grained(1)[1:], jnp.dtype(problem.dtype)
    options: dict[str, Any] = {"interpret": plgpu.InterpretGPUParams()} if interpret else {}
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(problem.grained(problem.num_rows), dtype),
        scratch_types=[
            plgpu.SMEM((slots, *shape), dtype),
            plgpu.Barrier(num_barriers=slots),
        ],
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="spread_rows",
        # Only TMA writes to shared memory, and only TMA reads it.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        **options,
    )
