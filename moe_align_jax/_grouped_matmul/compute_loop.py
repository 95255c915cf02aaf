"""The loop of a warpgroup that multiplies: tile after tile, products, and what becomes of their sums."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul import epilogue, late_tiles, products, scaled_products, stores
from moe_align_jax._grouped_matmul.cluster_sum import ClusterSum
from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.cta_tiles import CtaTiles, Tile
from moe_align_jax._grouped_matmul.late_tiles import Waiting
from moe_align_jax._grouped_matmul.memory import Refs
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._grouped_matmul.shape import Shape

_I32 = jnp.int32


class ComputeLoop:
    """What a warpgroup that multiplies does with its CTA's tiles; made of what is the same for all."""

    def __init__(
        self,
        problem: MatmulProblem,
        config: Config,
        shape: Shape,
        refs: Refs,
        interpret: bool,
        *,
        tiles: CtaTiles,
        warpgroup: jax.Array,
        scaled: scaled_products.ScaledProducts | None,
        ending: epilogue.Ending | None,
    ):
        """
        Args:
            problem, config, shape, refs, interpret: of the kernel.
            tiles: of the CTA.
            warpgroup: number of this one.
            scaled: multiplies operands with scales; None: they have none.
            ending: what becomes of the sums in place of the epilogue, or None.
        """
        self.problem, self.config, self.shape, self.refs = problem, config, shape, refs
        self.interpret, self.tiles, self.warpgroup = interpret, tiles, warpgroup
        self.scaled, self.ending, self.swap = scaled, ending, config.form == "swap"
        self.products = products.Products(problem, config, shape, refs, warpgroup)
        self.store = stores.Store(problem, config, shape, refs, warpgroup, interpret)

    def __call__(self) -> None:
        """All tiles, until the last one's stores are done."""
        for stage in range(self.config.stages):
            plgpu.barrier_arrive(self.refs.empty.at[stage])
        if self.refs.told is not None:
            self.refs.told.allow()
        self.all_tiles()
        plgpu.wait_smem_to_gmem(0)

    def all_tiles(self) -> None:
        """The loop over the tiles, of one height."""
        config, mine = self.config, self.tiles.mine
        if config.ahead or config.shares_weights:
            assert self.scaled and config.ahead and not (config.late or self.ending)
            by_ids = self.shape.parts > 1 and self.shape.reads_ids
            assert not (config.shares_weights and by_ids)
            lax.fori_loop(0, mine, self._as_told, _I32(0))
        elif config.late:
            self.all_late(self._later)
        else:
            lax.fori_loop(0, mine, self._together if config.split > 1 else self._now, _I32(0))

    # -- parts of each loop

    def multiply(
        self,
        tile: Tile,
        ring: jax.Array,
        between: Callable[[jax.Array], None] = lambda k: None,
        *,
        scales_at: jax.Array | None = None,
        rows: int = 0,
    ) -> list[jax.Array]:
        """The warpgroup's sums of a tile.

        Args:
            tile: rows and columns.
            ring: steps of the ring before this tile's.
            between: called while a product of step k runs.
            scales_at: where the scales of the weights lie that were told of.
            rows: of a swapped tile, the first ones; 0: all.
        """
        if self.scaled is None:
            return self.products(tile, ring, between, rows or self.shape.wn)
        before = self.tiles.rank * self.shape.k_steps if self.config.split > 1 else 0
        return self.scaled(tile, self.warpgroup, ring, between, scales_at, before)

    def place(self, tile: Tile) -> tuple[jax.Array, ...]:
        """(First row, first column, end) of what this warpgroup has of a tile."""
        row, column = tile.row, tile.n * self.shape.columns
        if self.config.form == "m":
            row = row + self.warpgroup * self.shape.wm
        else:
            column = column + self.warpgroup * (self.shape.columns // self.config.computing)
        return row, column, tile.end

    def finish(
        self,
        sums: list[jax.Array],
        tile: Tile,
        at: tuple[jax.Array, ...],
        shape: Shape | None = None,
        pairs: Any = None,
    ) -> list[jax.Array]:
        """The pieces of the result of a tile's sums; `shape`: of other sums than all tiles have."""
        here = epilogue.Place(tile.expert, tile.valid, at[0], at[1], self.swap, pairs)
        given = self.problem, shape or self.shape, here, sums, self.refs.vectors
        return epilogue.pieces(*given, self.interpret)

    def store_all(
        self, pieces: Sequence[jax.Array], at: tuple[jax.Array, ...], **options: Any
    ) -> None:
        """Stores a tile's pieces, one after the other."""
        for q, piece in enumerate(pieces):
            self.store(q, piece, at, **options)

    # -- tiles that are stored at once

    def _now(self, i: jax.Array, ring: jax.Array) -> jax.Array:
        """Multiplies the i-th tile and stores it at once; gives the next one's `ring`."""
        tile, steps = self.tiles.at(i)
        holds = stores.holds_pairs(self.problem, self.shape, self.refs, tile)
        sums, at = self.multiply(tile, ring), self.place(tile)
        if self.ending:
            self.ending.finish(self.refs, sums, tile, at, self.warpgroup)
        else:
            self.store_all(self.finish(sums, tile, at), at, holds=holds)
        return ring + steps

    def _as_told(self, i: jax.Array, ring: jax.Array) -> jax.Array:
        """The same of a tile that the loading warpgroup tells."""
        tile, steps = self.tiles.hear(i)
        sums, at = self.multiply(tile, ring, scales_at=i & 1), self.place(tile)
        self.refs.told.done(i)
        plain = self.shape._replace(tests_rows=False)

        def store_held(held: jax.Array | None = None) -> None:
            """Stores the first `held` rows, and zeros behind them; with None all rows, as multiplied."""
            self.store_all(self.finish(sums, tile, at, plain, held), at)

        def store_tile() -> None:
            if not self.shape.tests_rows:
                return store_held()
            # In form "m" alone a warpgroup has rows of its own.
            rows = self.shape.wn if self.swap else self.shape.wm
            before = self.warpgroup * self.shape.wm if self.config.form == "m" else 0
            held = tile.pairs - before
            return lax.cond(held >= rows, store_held, lambda: store_held(held))

        if self.config.turned:
            self._store_either(tile, self.finish(sums, tile, at, plain), at)
            return ring + steps
        pl.when(tile.there)(store_tile) if self.config.shares_weights else store_tile()
        return ring + steps

    def _store_either(
        self, tile: Tile, pieces: Sequence[jax.Array], at: tuple[jax.Array, ...]
    ) -> None:
        """Stores the three pieces of a tile, or of a turned one, whose last one has other rows; none of rows
        that are not in use, which may be another tile's."""
        each, bm, turned = self.shape.wm, self.config.bm, tile.turned
        row, column, end = at
        column = jnp.where(turned, tile.n * bm, column)
        last_row = jnp.where(turned, tile.row + 2 * each, row)
        # `Store` adds the columns of the pieces before.
        last_column = column + jnp.where(turned, (self.warpgroup - 2) * each, 0)

        @pl.when(tile.there & (turned | (row < tile.used)))
        def _():
            for q, piece in enumerate(pieces):
                last = q == len(pieces) - 1
                where = (last_row, last_column, end) if last else (row, column, end)
                self.store(q, piece, where)

    def _together(self, i: jax.Array, ring: jax.Array) -> jax.Array:
        """The same of a tile that the CTAs of a cluster share: the first one stores it."""
        tile, steps = self.tiles.at(i)
        sums, at = self.multiply(tile, ring), self.place(tile)
        added = self._cluster_sum()
        added.put(sums)

        @pl.when(self.tiles.rank == 0)
        def _():
            totals = added.take([part.shape for part in sums])
            added.taken()
            self.store_all(self.finish(totals, tile, at), at)

        pl.when(self.tiles.rank != 0)(added.taken)
        added.wait()
        return ring + steps

    def _cluster_sum(self) -> ClusterSum:
        """The sum over the same warpgroups of the cluster's CTAs."""
        refs, warpgroup, computing = self.refs, self.warpgroup, self.config.computing
        mine = (self.tiles.cta, slice(None), warpgroup) if self.interpret else (warpgroup,)
        ready, free = (refs.shared.at[k * computing + warpgroup] for k in range(2))
        return ClusterSum(self.config.split, refs.parts.at[mine], ready, free, self.interpret)

    # -- late tiles, which are stored between the products of the next one

    def all_late(self, later: Callable[[jax.Array, Waiting], Waiting]) -> None:
        """The loop over late tiles; `later` as for `late_tiles.all_tiles`."""
        nothing = epilogue.nothing(self.problem, self.shape, self.swap, self.interpret)
        late_tiles.all_tiles(self.tiles.mine, later, self.put, nothing)

    def put(self, waiting: Waiting, q: int) -> None:
        """Stores piece q of the tile that waits."""
        height = waiting.rows if self.config.heights else None
        self.store(q, waiting.pieces[q], waiting.at, whole=True, height=height)

    def put_if(self, waiting: Waiting, when: Callable[[int], Any]) -> None:
        """See `late_tiles.put_if`."""
        late_tiles.put_if(waiting, self.put, when)

    def _later(self, i: jax.Array, waiting: Waiting) -> Waiting:
        """Multiplies the i-th tile, and stores the one that waits."""
        ring, shape = waiting.ring, self.shape
        tile, steps = self.tiles.at(i)
        sums = self.multiply(tile, ring, lambda k: self.put_if(waiting, lambda q: k == q))
        self.put_if(waiting, lambda q: steps <= q)
        at = self.place(tile)
        pieces = self.finish(sums, tile, at)
        if not shape.partial:
            return Waiting(ring + steps, _I32(1), at, pieces)
        # Stored at once: single rows take registers that the next tile's products need.
        rows = shape.wn if self.swap else shape.wm  # swapped: a warpgroup has all of a tile's
        whole = at[0] + rows <= at[2]
        pl.when(jnp.logical_not(whole))(lambda: self.store_all(pieces, at))
        return Waiting(ring + steps, whole.astype(_I32), at, pieces)
