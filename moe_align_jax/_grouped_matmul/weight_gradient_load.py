"""The loop of the warpgroup that loads, of the weights' gradient."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul import inline, inline_rows
from moe_align_jax._grouped_matmul.config import UNIT
from moe_align_jax._grouped_matmul.weight_gradient_cta_tiles import CtaTiles, Tile
from moe_align_jax._grouped_matmul.weight_gradient_plan import Plan, Refs

_I32 = jnp.int32


class LoadLoop:
    """What the loading warpgroup does with its CTA's tiles; made of what is the same for all."""

    def __init__(self, plan: Plan, refs: Refs, tiles: CtaTiles):
        self.plan, self.refs, self.tiles = plan, refs, tiles

    def __call__(self) -> None:
        """All tiles, until those that multiply have left the last stage."""
        refs, tiles = self.refs, self.plan.tiles
        end = lax.fori_loop(0, self.tiles.mine, self._load, _I32(0))
        if self.plan.by_copies:
            inline.wait_for_copies(0, interpret=self.plan.interpret)
            for lag in range(tiles.lag, 0, -1):
                pl.when(end >= lag)(lambda lag=lag: self._arrived(end, lag))
        # No barrier is left in the midst of a phase.
        for stage in range(tiles.stages):
            plgpu.barrier_wait(refs.empty.at[refs.slot_of(end + stage)])

    def _load(self, i: jax.Array, ring: jax.Array) -> jax.Array:
        """Loads the steps of the i-th tile, before which the ring has `ring`; gives the next one's `ring`."""
        tile, plan, lag = self.tiles.at(i), self.plan, self.plan.tiles.lag

        def step(k: jax.Array, found: tuple[Any, ...]) -> tuple[Any, ...]:
            at = ring + k
            slot = self.refs.slot_of(at)
            plgpu.barrier_wait(self.refs.empty.at[slot])
            self._ask(tile, k, slot, found)
            if not plan.by_copies:
                return ()
            inline.commit_copies(interpret=plan.interpret)

            @pl.when(at >= lag)
            def _():
                inline.wait_for_copies(lag, interpret=plan.interpret)
                self._arrived(at, lag)

            # Ids of the next step are read while this one's rows are under way.
            return self._find(tile, jnp.minimum(k + 1, tile.steps - 1))

        @pl.when(tile.steps > 0)
        def _():
            first = self._find(tile, _I32(0)) if plan.by_copies else ()
            lax.fori_loop(0, tile.steps, step, first)

        return ring + tile.steps

    def _find(self, tile: Tile, step: jax.Array) -> tuple[Any, ...]:
        """Where the rows of a step lie: of each operand that comes by cp.async."""
        layout, bk = self.plan.problem.layout, self.plan.tiles.bk
        return tuple(
            inline_rows.find_wide_rows(
                *(self.refs.ids if side.gathered else None, tile.first + step * bk, tile.end),
                rows=bk,
                per_row=side.wide // UNIT,
                row_chunks=side.columns // UNIT,
                top_k=layout.top_k,
                num_pairs=layout.num_tokens * layout.top_k,
                interpret=self.plan.interpret,
            )
            for side in self.plan.sides
            if not side.by_tma
        )

    def _ask(self, tile: Tile, k: jax.Array, slot: jax.Array, found: tuple[Any, ...]) -> None:
        """Asks for the rows of step k of both operands, of which `_find` found some."""
        refs, rest, bk = self.refs, list(found), self.plan.tiles.bk
        each = zip(self.plan.sides, refs.sides, refs.stages, (tile.m, tile.n), strict=True)
        for side, ref, stage, place in each:
            column = place * side.wide
            if side.by_tma:
                rows = pl.ds(pl.multiple_of(tile.first + k * bk, 8), bk)
                source = ref.at[rows, pl.ds(column, side.wide)]
                plgpu.copy_gmem_to_smem(source, stage.at[slot], refs.full.at[slot])
            else:
                inline_rows.copy_wide_rows(
                    *(ref, stage.at[slot], side.like, rest.pop(0)),
                    lax.div(column, _I32(UNIT)),
                    rows=bk,
                    per_row=side.wide // UNIT,
                    row_chunks=side.columns // UNIT,
                    interpret=self.plan.interpret,
                )

    def _arrived(self, step: jax.Array, lag: int) -> None:
        """What was asked for `lag` steps before `step` is there."""
        slot = self.refs.slot_of(step - lag + self.plan.tiles.stages)
        plgpu.barrier_arrive(self.refs.full.at[slot])
