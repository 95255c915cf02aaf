"""What the loading warpgroup does for a stage of the ring: TMA, or cp.async where TMA cannot count."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul import inline
from moe_align_jax._grouped_matmul.config import COMPUTING, Config
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._grouped_matmul.shape import Shape

_I32 = jnp.int32


class Loader:
    """Loads tiles of x and of the weights.

    Attributes:
        copies: TMA's of a stage, each of which arrives at the stage's barrier.
    """

    def __init__(
        self,
        problem: MatmulProblem,
        config: Config,
        shape: Shape,
        x_like: tuple[Any, ...],
        w_like: tuple[Any, ...],
        interpret: bool,
    ):
        self.problem, self.config, self.shape = problem, config, shape
        self.x_like, self.w_like, self.interpret = x_like, w_like, interpret
        self.item = jnp.dtype(problem.dtype).itemsize
        self.chunks = problem.k * self.item // inline.CHUNK_BYTES  # of a row of x
        # The interpreter's copies know no limits of TMA's.
        self.x_by_matrix = shape.x_by_rows and not problem.top_k and not interpret
        self.w_by_matrix = shape.w_by_rows and not interpret
        self.pieces = self._pieces()
        x_copies = 0 if problem.top_k or self.x_by_matrix else shape.k_parts
        self.copies = x_copies + (0 if self.w_by_matrix else len(self.pieces))

    def find(self, refs: Any, tile: Any) -> jax.Array | None:
        """Where the rows of a tile lie, if they are gathered."""
        if not self.problem.top_k:
            return None
        return inline.find_rows(
            *(refs.ids, tile.row, tile.end),
            rows=self.config.bm,
            row_chunks=self.chunks,
            top_k=self.problem.top_k,
            num_pairs=self.problem.num_tokens * self.problem.top_k,
            interpret=self.interpret,
        )

    def load(
        self, refs: Any, tile: Any, rows: Any, slot: jax.Array, k: jax.Array, barrier: Any
    ) -> None:
        """Step k of a tile into a stage."""
        for piece in self.pieces:
            if self.w_by_matrix:
                self._weights_by_matrix(refs, tile, slot, k, *piece)
            else:
                self._weights(refs, tile, slot, k, barrier, *piece)
        for part in range(self.shape.k_parts):
            step = k * self.shape.k_parts + part
            if rows is not None:
                inline.copy_rows(
                    *(refs.x, refs.x_tiles.at[slot, part], self.x_like, rows, step),
                    rows=self.config.bm,
                    row_chunks=self.chunks,
                    whole=self.problem.k % self.config.bk == 0,
                    interpret=self.interpret,
                )
            elif self.x_by_matrix:
                self._rows_by_matrix(refs, tile, slot, step, part)
            else:
                self._rows(refs, tile, slot, step, part, barrier)

    # -- x

    def _rows(
        self, refs: Any, tile: Any, slot: jax.Array, step: jax.Array, part: int, barrier: Any
    ) -> None:
        rows, ks = self.config.bm, pl.ds(step * 64, 64)
        if self.problem.rows == "masked":
            most = _I32(self.problem.max_rows)
            expert = lax.div(tile.row, most)
            source = refs.x.at[expert, pl.ds(tile.row - expert * most, rows), ks]
        else:
            source = refs.x.at[pl.ds(tile.row, rows), ks]
        plgpu.copy_gmem_to_smem(source, refs.x_rows.at[slot, part], barrier)

    def _rows_by_matrix(
        self, refs: Any, tile: Any, slot: jax.Array, step: jax.Array, part: int
    ) -> None:
        # Rows behind a group's are some other's, or zeros: they are not stored.
        matrix = inline.Matrix(self.problem.num_rows, self.chunks, self.chunks)
        inline.copy_matrix(
            *(refs.x, refs.x_tiles.at[slot, part], self.x_like, matrix),
            *(_I32(0), tile.row, step * inline.CHUNKS_PER_ROW),
            shape=(self.config.bm, inline.CHUNKS_PER_ROW),
        )

    # -- the weights

    def _pieces(self) -> list[tuple[int, int, int, int, int, int | None]]:
        """(array, part of the stage, first column or row there, first column, columns, gate 0 or up 1)."""
        weights, shape, bn = self.problem.weights, self.shape, self.config.bn
        if not weights.gated or shape.parted:
            return [(0, 0, 0, 0, bn, None)]
        # Each warpgroup's accumulators get their own gate and up.
        owners = 1 if self.config.form == "m" else COMPUTING
        size, found = shape.columns // owners, []
        for owner in range(owners):
            for k in range(2):
                part = 2 * owner + k
                inside = (0, part * size) if weights.transposed else (part, 0)
                found.append((k if weights.pair else 0, *inside, owner * size, size, k))
        return found

    def _first(self, tile: Any, column: int, which: int | None) -> jax.Array:
        """The first column of the weights."""
        weights = self.problem.weights
        if self.shape.parted:
            return tile.n * self.config.bn
        first = tile.n * self.shape.columns + column
        apart = which == 1 and not weights.pair and not weights.interleaved
        return first + self.problem.n if apart else first

    def _weights(
        self,
        refs: Any,
        tile: Any,
        slot: jax.Array,
        k: jax.Array,
        barrier: Any,
        array: int,
        part: int,
        inside: int,
        column: int,
        size: int,
        which: int | None,
    ) -> None:
        weights, bk = self.problem.weights, self.config.bk
        ns, ks = pl.ds(self._first(tile, column, which), size), pl.ds(k * bk, bk)
        ref = refs.weights[array]
        if not weights.transposed:
            source, target = ref.at[tile.expert, ks, ns], refs.w_tiles.at[slot, part]
        else:
            target = refs.w_tiles.at[slot, part, pl.ds(inside, size)]
            if weights.interleaved and which is not None:
                source = ref.at[tile.expert, ns, which, ks]
            else:
                source = ref.at[tile.expert, ns, ks]
        plgpu.copy_gmem_to_smem(source, target, barrier)

    def _weights_by_matrix(
        self,
        refs: Any,
        tile: Any,
        slot: jax.Array,
        k: jax.Array,
        array: int,
        part: int,
        inside: int,
        column: int,
        size: int,
        which: int | None,
    ) -> None:
        problem, weights, bk = self.problem, self.problem.weights, self.config.bk
        first = self._first(tile, column, which)
        values = inline.CHUNK_BYTES // self.item
        columns = problem.n if weights.pair else problem.w_columns
        ref = refs.weights[array]
        if not weights.transposed:
            matrix = inline.Matrix(problem.k, columns // values, columns // values)
            target, shape = refs.w_tiles.at[slot, part], (bk, size // values)
            before, row, chunk = tile.expert * problem.k, k * bk, lax.div(first, _I32(values))
        else:
            target = refs.w_tiles.at[slot, part, pl.ds(inside, size)]
            shape, row, chunk = (size, bk // values), first, k * (bk // values)
            chunks = self.chunks
            if weights.interleaved and which is not None:
                matrix = inline.Matrix(problem.n, chunks, 2 * chunks, which * chunks)
                before = tile.expert * problem.n
            else:
                matrix, before = inline.Matrix(columns, chunks, chunks), tile.expert * columns
        inline.copy_matrix(*(ref, target, self.w_like, matrix, before, row, chunk), shape=shape)
