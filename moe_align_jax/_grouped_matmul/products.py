"""What a warpgroup multiplies where operands have 16 bits: wgmma's own sums, over all steps of a tile.

Those of e4m3 operands: scaled_products.py.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.memory import Refs
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._grouped_matmul.shape import Shape

_F32 = jnp.float32
# wgmma's sums, of a shape and a type. plgpu exports it, but not by a name that pyright takes for public.
accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


class Products:
    """Multiplies a tile: made of what is the same for every tile."""

    def __init__(
        self, problem: MatmulProblem, config: Config, shape: Shape, refs: Refs, warpgroup: jax.Array
    ):
        self.problem, self.config, self.shape = problem, config, shape
        self.refs, self.warpgroup = refs, warpgroup

    def __call__(
        self, tile: Any, ring: jax.Array, between: Callable[[jax.Array], None], rows: int
    ) -> list[jax.Array]:
        """The warpgroup's sums, in one accumulator or two.

        Args:
            tile: rows and columns.
            ring: steps of the ring before this tile's.
            between: called while a product of step k runs.
            rows: columns of an accumulator: of a swapped tile the first so many rows of x, otherwise
                `shape.wn`.
        """
        shape, refs = self.shape, self.refs

        def leave(step: jax.Array) -> None:
            """Step `step` of the tile was read: its stage can be loaded again."""
            plgpu.barrier_arrive(refs.empty.at[refs.slot_of(step)])

        def scope(*accumulators):
            def step(k, _):
                slot = refs.slot_of(ring + k)
                plgpu.barrier_wait(refs.full.at[slot])
                for part in range(shape.k_parts):
                    for a, acc in enumerate(accumulators):
                        plgpu.wgmma(acc, *self._operands(slot, part, a, rows))
                between(k)
                # All but this step's are done, so that their stage can be loaded again.
                plgpu.wgmma_wait(shape.k_parts * len(accumulators))
                pl.when(k > 0)(lambda: leave(ring + k + refs.stages - 1))
                return ()

            # The wait belongs to the branch: where the paths with and without wgmma met ahead of it, ptxas
            # moved conversions of the sums ahead of it (CUDA 13.0, a tile of 16 rows: wrong results that
            # changed from run to run).
            @pl.when(tile.valid)
            def _():
                lax.fori_loop(0, shape.k_steps, step, ())
                plgpu.wgmma_wait(0)
                leave(ring + (shape.k_steps + refs.stages - 1))

            return [acc[...] for acc in accumulators]

        like = accumulator((shape.wm, rows), _F32)
        return pl.run_scoped(scope, *[like] * shape.accumulators)

    def _operands(self, slot: jax.Array, part: int, which: int, height: int) -> tuple[Any, Any]:
        """wgmma's two operands, for 64 columns of x.

        Args:
            slot: the stage.
            part: which of its `k_parts`.
            which: the accumulator: 0, or 1 where gate and up lie apart.
            height: of tiles of several heights, how many rows of x.
        """
        problem, config, shape, refs = self.problem, self.config, self.shape, self.refs
        warpgroup = self.warpgroup
        x = refs.x_tiles.at[slot, part]
        if config.heights and height < config.bm:
            x = refs.x_tiles.at[slot, part, pl.ds(0, height)]
        if config.form == "m":
            x = refs.x_tiles.at[slot, part, pl.ds(warpgroup * shape.wm, shape.wm)]
        ks = pl.ds(64 * part, 64)
        width = config.bn // config.computing
        if problem.weights.transposed:  # [columns, k]
            rows = slice(None) if config.form == "m" else pl.ds(warpgroup * width, width)
            w = refs.w_tiles.at[slot, 0, rows, ks]
            if config.form == "swap":
                return w, x.transpose((1, 0))
            return x, w.transpose((1, 0))
        if shape.w_parts > 1:
            own = which if config.form == "m" else warpgroup * shape.accumulators + which
            w = refs.w_tiles.at[slot, own, ks]
        else:
            columns = slice(None) if config.form == "m" else pl.ds(warpgroup * width, width)
            w = refs.w_tiles.at[slot, 0, ks, columns]
        if config.form == "swap":
            return w.transpose((1, 0)), x.transpose((1, 0))
        return x, w
