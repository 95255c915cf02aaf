"""The loop of a warpgroup that multiplies, of the weights' gradient."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul import (
    inline_stores,
    inline_wgmma,
    late_tiles,
    memory,
    products,
)
from moe_align_jax._grouped_matmul.late_tiles import Waiting
from moe_align_jax._grouped_matmul.weight_gradient_cta_tiles import CtaTiles, Tile
from moe_align_jax._grouped_matmul.weight_gradient_plan import SLOTS, WM, Plan, Refs

_I32, _F32 = jnp.int32, jnp.float32
_SHORT = 16  # rows of a wgmma


class ComputeLoop:
    """What a warpgroup that multiplies does with its CTA's tiles; made of what is the same for all."""

    def __init__(self, plan: Plan, refs: Refs, tiles: CtaTiles, warpgroup: jax.Array):
        self.plan, self.refs, self.tiles, self.warpgroup = plan, refs, tiles, warpgroup
        self.bk, self.short = plan.tiles.bk, plan.tiles.short
        layout, piece = plan.problem.layout, plan.piece
        self.across = plan.tiles.bn // piece  # bands of a tile, side by side
        self.out_dtype = jnp.dtype(layout.out_dtype)
        self.out_like = memory.transforms(piece, self.out_dtype)
        self.unread = unread_stores(layout.n, plan.tiles.bn, piece)

    def __call__(self) -> None:
        """All tiles, until the last one's stores are done."""
        for stage in range(self.plan.tiles.stages):
            plgpu.barrier_arrive(self.refs.empty.at[stage])
        if self.plan.tiles.late:
            self._all_late()
        else:
            lax.fori_loop(0, self.tiles.mine, self._now, _I32(0))
        plgpu.wait_smem_to_gmem(0)

    def _now(self, i: jax.Array, ring: jax.Array) -> jax.Array:
        """Multiplies the i-th tile and stores it at once; gives the next one's `ring`."""
        tile = self.tiles.at(i)
        at = self._place(tile)
        sums = self._multiply(tile, ring, lambda k: None)
        for q, value in enumerate(self._bands(tile, sums)):
            self._put(q, value, at)
        return ring + tile.steps

    def _all_late(self) -> None:
        """The loop over late tiles, and the last one's stores."""
        zeros = jnp.zeros((WM, self.plan.piece), self.out_dtype)
        if not self.plan.interpret:
            zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        nothing = [zeros] * (self.plan.wm // WM * self.across)
        late_tiles.all_tiles(self.tiles.mine, self._later, self._put_waiting, nothing)

    def _later(self, i: jax.Array, waiting: Waiting) -> Waiting:
        """Multiplies the i-th tile, and stores the one that waits between its products."""
        tile = self.tiles.at(i)

        def put_if(when: Callable[[int], Any]) -> None:
            late_tiles.put_if(waiting, self._put_waiting, when)

        sums = self._multiply(tile, waiting.ring, lambda k: put_if(lambda q: k == q))
        put_if(lambda q: self._whole_steps(tile) <= q)
        ring, at = waiting.ring + tile.steps, self._place(tile)
        return Waiting(ring, _I32(1), at, self._bands(tile, sums))

    def _put_waiting(self, waiting: Waiting, q: int) -> None:
        """Stores band q of the tile that waits."""
        self._put(q, waiting.pieces[q], waiting.at)

    # -- products

    def _multiply(
        self, tile: Tile, ring: jax.Array, between: Callable[[jax.Array], None]
    ) -> jax.Array:
        """The warpgroup's sums. `between` is called while a product of step k runs."""
        refs, stages = self.refs, self.plan.tiles.stages
        left, right = refs.stages

        def leave(step: jax.Array) -> None:
            """The stage of a step was read: it can be loaded again."""
            plgpu.barrier_arrive(refs.empty.at[refs.slot_of(step)])

        def scope(sums):
            def step(k, _):
                slot = refs.slot_of(ring + k)
                plgpu.barrier_wait(refs.full.at[slot])
                rows = tile.end - tile.first - k * self.bk
                if not self.short:
                    pl.when(rows < self.bk)(lambda: self._clear(slot, rows))
                a = left.at[slot, :, pl.ds(self.warpgroup * self.plan.wm, self.plan.wm)]
                plgpu.wgmma(sums, a.transpose((1, 0)), right.at[slot])
                between(k)
                # All but this step's are done, so that their stage can be loaded again.
                plgpu.wgmma_wait(1)
                pl.when(k > 0)(lambda: leave(ring + k + stages - 1))
                return ()

            # The wait belongs to the branch: see products.py.
            whole = self._whole_steps(tile)

            @pl.when(whole > 0)
            def _():
                lax.fori_loop(0, whole, step, ())
                plgpu.wgmma_wait(0)
                leave(ring + whole + stages - 1)

            return sums[...]

        sums = pl.run_scoped(scope, products.accumulator((self.plan.wm, self.plan.tiles.bn), _F32))
        return self._with_last_rows(tile, ring, sums) if self.short else sums

    def _with_last_rows(self, tile: Tile, ring: jax.Array, sums: jax.Array) -> jax.Array:
        """The sums of the whole steps, and of the rows behind them: of these, as many as fill 16."""
        refs, bk, (left, right) = self.refs, self.bk, self.refs.stages
        slot = refs.slot_of(ring + tile.steps - 1)
        rest = tile.end - tile.first - self._whole_steps(tile) * bk
        likes = [side.like for side in self.plan.sides]

        def last(most: int, sums: jax.Array) -> jax.Array:
            """With those rows, which are `most` at most."""

            def these(sums: jax.Array) -> jax.Array:
                self._clear(slot, rest, most - _SHORT, most)
                return inline_wgmma.multiply_rows(
                    *(sums, left.at[slot], right.at[slot], likes, self.warpgroup),
                    rows=most,
                    interpret=self.plan.interpret,
                )

            if most == bk:
                return these(sums)
            return lax.cond(rest <= most, these, functools.partial(last, most + _SHORT), sums)

        def some(sums: jax.Array) -> jax.Array:
            plgpu.barrier_wait(refs.full.at[slot])
            sums = last(_SHORT, sums)
            plgpu.barrier_arrive(refs.empty.at[slot])
            return sums

        return lax.cond(rest > 0, some, lambda sums: sums, sums)

    def _whole_steps(self, tile: Tile) -> jax.Array:
        """Of a tile's steps those that the loop takes: with `short`, those of a whole stage."""
        return lax.div(tile.end - tile.first, _I32(self.bk)) if self.short else tile.steps

    def _clear(self, slot: jax.Array, rows: jax.Array, before: int = 0, most: int = 0) -> None:
        """Zeros into a stage's rows from `rows` on, up to `most` (0: all), none of the `before` first."""
        # Both warpgroups write the same zeros: each waits for its own.
        for side, stage in zip(self.plan.sides, self.refs.stages, strict=True):
            if side.by_tma:
                inline_stores.clear_rows(
                    *(stage.at[slot], side.like, rows),
                    shape=(most or self.bk, side.wide),
                    interpret=self.plan.interpret,
                    before=before,
                )
        plgpu.commit_smem()

    # -- what becomes of the sums

    def _place(self, tile: Tile) -> tuple[jax.Array, ...]:
        """(Expert, first row, first column) of what this warpgroup has of a tile."""
        row = tile.m * self.plan.tiles.bm + self.warpgroup * self.plan.wm
        return tile.expert, row, tile.n * self.plan.tiles.bn

    def _bands(self, tile: Tile, sums: jax.Array) -> list[jax.Array]:
        """The sums in bands of columns, rounded; of an expert that is cut, those of its pieces."""
        refs, piece = self.refs, self.plan.piece
        expert, row, column = self._place(tile)
        found = []
        for q in range(self.plan.wm // WM * self.across):
            r, c = q // self.across * WM, q % self.across * piece
            band = sums[r : r + WM, c : c + piece]
            if refs.sums is not None:
                rows = pl.ds(pl.multiple_of(row + r, WM), WM)
                columns = pl.ds(pl.multiple_of(column + c, piece), piece)

                def add(p, band, rows=rows, columns=columns):
                    return band + self._load_sums(refs.sums.at[p, rows, columns])

                band = lax.fori_loop(refs.begin[expert], refs.end[expert], add, band)
            found.append(band.astype(self.out_dtype))
        return found

    def _load_sums(self, ref: Any) -> jax.Array:
        """A band of a piece's sums."""
        if self.plan.interpret:
            return ref[...]
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)

    def _put(self, q: int, value: jax.Array, at: tuple[jax.Array, ...]) -> None:
        """Stores band q of a tile at (expert, first row, first column), if the result has it."""
        refs, piece = self.refs, self.plan.piece
        k, n = self.plan.problem.layout.k, self.plan.problem.layout.n
        expert, row, column = at
        row, column = row + q // self.across * WM, column + q % self.across * piece

        @pl.when((row < k) & (column < n))
        def _():
            band = refs.bands.at[self.warpgroup, q % SLOTS]
            plgpu.wait_smem_to_gmem(self.unread, wait_read_only=True)
            band[...] = value
            plgpu.commit_smem()
            if self.plan.by_rows:
                inline_stores.store_rows(
                    *(band, self.out_like, refs.out),
                    *(expert * k + row, (expert + 1) * k, column),
                    rows=WM,
                    max_rows=k,
                    interpret=self.plan.interpret,
                )
                plgpu.commit_smem()  # other threads than read the slot write to it next
            else:
                rows = pl.ds(pl.multiple_of(row, WM), WM)
                columns = pl.ds(pl.multiple_of(column, piece), piece)
                plgpu.copy_smem_to_gmem(band, refs.out.at[expert, rows, columns])


def unread_stores(n: int, bn: int, piece: int) -> int:
    """How many of the latest stores may still read their slot when the next band is put.

    Band q of a tile takes slot q modulo the slots. Where a tile has a number of bands that is no multiple of
    the slots, two stores in a row read the same slot, and the second one must wait for the first.
    """
    bands = (bn // piece, -(-n // piece))
    return 0 if any(count % SLOTS for count in bands) else SLOTS - 1
