"""The loop of a warpgroup that multiplies tiles of several heights: a branch of products for each height."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from moe_align_jax._grouped_matmul import inline_wgmma
from moe_align_jax._grouped_matmul.compute_loop import ComputeLoop
from moe_align_jax._grouped_matmul.cta_tiles import Tile
from moe_align_jax._grouped_matmul.late_tiles import Waiting


class HeightsLoop(ComputeLoop):
    """`ComputeLoop` of tiles that the loading warpgroup tells, whose rows are one of `Config.heights`."""

    def all_tiles(self) -> None:
        """The loop over the tiles."""
        if self.config.late:
            self.all_late(self._later)
        else:
            lax.fori_loop(0, self.tiles.mine, self._now, jnp.int32(0))

    def _by_height(
        self,
        tile: Tile,
        heights: Sequence[int],
        of_height: Callable[[int], Any],
        otherwise: Callable[[], Any],
    ) -> Any:
        """`of_height(h)` of a tile of h rows, one of `heights`; `otherwise()` of one of none.

        The branches stand one within the other. So each knows its tile's height where it is compiled, and
        none reads it behind the products.
        """
        first, *others = heights
        if not others:
            there = lambda: of_height(first)  # noqa: E731
            return lax.cond(tile.end - tile.row != first, otherwise, there)
        # Mosaic lowers the second function twice, to learn the types of its results.
        return lax.cond(
            tile.end - tile.row != first,
            lambda: self._by_height(tile, others, of_height, otherwise),
            lambda: of_height(first),
        )

    def _of_height(
        self, tile: Tile, ring: jax.Array, between: Callable[[jax.Array], None], rows: int
    ) -> list[jax.Array]:
        """The pieces of a tile of `rows` rows."""
        sums, at = self.multiply(tile, ring, between, rows=rows), self.place(tile)
        pairs = tile.pairs if self.shape.tests_rows else None
        return self.finish(sums, tile, at, self.shape._replace(wn=rows), pairs)

    def _now(self, i: jax.Array, ring: jax.Array) -> jax.Array:
        """Multiplies the i-th tile and stores it at once; gives the next one's `ring`."""
        tile, steps = self.tiles.hear_height(i)

        def store_tile(rows: int) -> None:
            for q, piece in enumerate(self._of_height(tile, ring, lambda k: None, rows)):
                self.store(q, piece, self.place(tile), rows=piece.shape[1])

        self._by_height(tile, self.config.heights, store_tile, lambda: None)
        return ring + steps

    def _later(self, i: jax.Array, waiting: Waiting) -> Waiting:
        """Multiplies the i-th tile, and stores the one that waits."""
        ring, shape = waiting.ring, self.shape
        tile, steps = self.tiles.hear_height(i)

        def put_from(first: int) -> None:
            """Stores the waiting tile's pieces from that one on, if a tile waits."""
            for q in range(first, len(waiting.pieces)):
                pl.when(waiting.rows > 0)(lambda q=q: self.put(waiting, q))

        def between(k: jax.Array) -> None:
            self.put_if(waiting, lambda q: k == q)

        def kept(rows: int) -> list[jax.Array]:
            found = self._of_height(tile, ring, between, rows)
            put_from(shape.k_steps)
            return [
                inline_wgmma.widen(piece, shape.piece_rows, interpret=self.interpret)
                for piece in found
            ]

        def nothing() -> list[jax.Array]:
            put_from(0)
            return waiting.pieces

        pieces = self._by_height(tile, self.config.heights, kept, nothing)
        height, at = tile.end - tile.row, self.place(tile)
        if self.problem.rows != "ragged":
            return Waiting(ring + steps, height, at, pieces)
        # A group's only tile, of more rows than the group, is stored at once.
        less = tile.pairs < height

        @pl.when(less)
        def _():
            self.store_all(pieces, (at[0], at[1], tile.row + tile.pairs))

        return Waiting(ring + steps, jnp.where(less, 0, height), at, pieces)
