"""The loop of the warpgroup that loads: it fills the ring of stages, tile after tile."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul import (
    inline,
    inline_scales,
    inline_stores,
    loads,
    scaled_products,
    tile_order,
)
from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.cta_tiles import CtaTiles, Tile
from moe_align_jax._grouped_matmul.memory import Refs
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._grouped_matmul.shape import Shape

_I32 = jnp.int32


class LoadLoop:
    """What the loading warpgroup does with its CTA's tiles; made of what is the same for all.

    What cp.async copies is there some steps after it was asked for (`Config.lag`): then those that multiply
    are told. `ring` counts the steps before a tile's, and `said` those of which nothing is left to be told.
    """

    def __init__(
        self,
        problem: MatmulProblem,
        config: Config,
        shape: Shape,
        refs: Refs,
        interpret: bool,
        *,
        tiles: CtaTiles,
        loader: loads.Loader,
        scaled: scaled_products.ScaledProducts | None,
    ):
        """
        Args:
            problem, config, shape, refs, interpret: of the kernel.
            tiles: of the CTA.
            loader: loads a step.
            scaled: multiplies operands with scales, and copies those; None: there are none.
        """
        self.problem, self.config, self.shape, self.refs = problem, config, shape, refs
        self.interpret, self.tiles, self.loader, self.scaled = interpret, tiles, loader, scaled
        # A mask is one instruction in place of five, of about 50 for a step: masked products of 6 x 1024 rows
        # took 0.8% less, and of 32 x 192 rows 0.1 to 0.7% (H200, 2026-11-30).
        power_of_two = not config.stages & (config.stages - 1)
        self.masks = problem.rows == "masked" and config.ahead and power_of_two
        self.clears = bool(config.heights) and not problem.leaves_padding
        # Tiles that are stored at once pause at their end. Late ones do not: there this warpgroup has time
        # once the ring is full.
        self.clears_amid = self.clears and config.late

    def __call__(self) -> None:
        """All tiles, until those that multiply have left the last stage."""
        config, refs, tiles = self.config, self.refs, self.tiles
        how = None
        if config.mixes:
            rounds = self.problem, tiles.clusters, tiles.n_tiles
            a_round = tile_order.a_round_of(*rounds) if config.deals else 0
            given = refs.experts, self.problem.num_experts, tiles.row_tiles, a_round
            how = tile_order.mixing(config.group, *given)

        def one(i, carry):
            ring, said = carry
            tile, steps, said = self._next(i, ring, said, how)
            self._load(tile, steps, ring, said)
            return ring + steps, said

        end, said = lax.fori_loop(0, tiles.mine, one, (_I32(0), _I32(0)))
        if self.shape.by_copies:
            self._all_arrived(end, said)
        # No barrier is left in the midst of a phase.
        for stage in range(config.stages):
            plgpu.barrier_wait(refs.empty.at[refs.slot_of(end + stage)])
        if refs.told is not None:
            refs.told.end(tiles.mine)

    def _next(
        self, i: jax.Array, ring: jax.Array, said: jax.Array, how: tile_order.Mixing | None
    ) -> tuple[Tile, jax.Array, jax.Array]:
        """The i-th tile, its steps, and `said`; tells it, where those that multiply are told."""
        by_copies = self.shape.by_copies
        if self.config.heights:
            # A tile's last steps are said to be there during the next tile's steps. A tile of no steps would
            # leave them unsaid: those that multiply would wait for them, and this warpgroup for those.
            rest = (lambda: self._all_arrived(ring, said)) if by_copies else (lambda: None)
            tile, steps = self.tiles.tell_height(i, rest, how)
            return tile, steps, jnp.where(tile.valid, said, ring) if by_copies else said
        tile, steps = self.tiles.at(i)
        if not self.config.ahead:
            return tile, steps, said
        if by_copies:  # see above; fewer steps than `lag` do not say all of the last tile's
            rest = (steps == 0) | (self.shape.k_steps < self.config.lag)
            pl.when(rest)(lambda: self._all_arrived(ring, said))
            said = jnp.where(rest, ring, said)
        self.tiles.tell(i, tile, lambda slot: self._fetch_scales(tile, slot))
        return tile, steps, said

    def _fetch_scales(self, tile: Tile, slot: jax.Array) -> None:
        """Copies the scales of a tile's weights, where those that multiply read them."""
        assert self.scaled
        for owner in range(scaled_products.owners_of(self.config)):
            self.scaled.fetch(tile, _I32(owner), slot)
        inline_scales.await_groups(interpret=self.interpret)

    def _load(self, tile: Tile, steps: jax.Array, ring: jax.Array, said: jax.Array) -> None:
        """The steps of a tile, and zeros into its share of the rows that no tile has."""
        rows, shape = self.loader.find(self.refs, tile), self.shape
        first = self.tiles.rank * shape.k_steps if self.config.split > 1 else None

        def step(k: jax.Array, _: Any = ()) -> tuple[()]:
            at = ring + k
            slot = at & (self.config.stages - 1) if self.masks else self.refs.slot_of(at)
            plgpu.barrier_wait(self.refs.empty.at[slot])
            of_row = k if first is None else first + k
            self.loader.load(self.refs, tile, rows, slot, of_row, self.refs.full.at[slot])
            if self.clears_amid:
                behind = min(self.config.stages, shape.k_steps) - 1
                pl.when(k == behind)(lambda: self._clear(tile))
            if shape.by_copies:
                self._commit(at, said)
            return ()

        if self.config.computing == 3:  # the loader has 32 registers
            inline.loop(steps, step, interpret=self.interpret)
        else:
            lax.fori_loop(0, steps, step, ())
        if self.clears_amid:
            pl.when(steps == 0)(lambda: self._clear(tile))
        elif self.clears:
            self._clear(tile)

    def _clear(self, tile: Tile) -> None:
        """Zeros into the rows of a tile's run that are in use and no tile's, a share of them."""
        columns = tile.n * self.shape.columns, self.shape.columns
        where = self.refs.out, tile.empty, tile.behind, *columns
        inline_stores.store_zeros(*where, interpret=self.interpret)

    # -- cp.async

    def _commit(self, step: jax.Array, said: jax.Array) -> None:
        """All of a step was asked for: those that multiply are told of the one `lag` steps before."""
        lag = self.config.lag
        inline.commit_copies(interpret=self.interpret)

        @pl.when(step - lag >= said)
        def _():
            inline.wait_for_copies(lag, interpret=self.interpret)
            self._arrived(step, lag)

    def _arrived(self, step: jax.Array, lag: int) -> None:
        """What was asked for `lag` steps before `step` is there."""
        plgpu.barrier_arrive(self.refs.full.at[self.refs.slot_of(step - lag + self.config.stages)])

    def _all_arrived(self, ring: jax.Array, said: jax.Array) -> None:
        """What was asked for before step `ring` is there, of which steps before `said` were said."""
        inline.wait_for_copies(0, interpret=self.interpret)
        for lag in range(self.config.lag, 0, -1):
            pl.when(ring - lag >= said)(lambda lag=lag: self._arrived(ring, lag))
