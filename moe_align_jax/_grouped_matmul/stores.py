"""From pieces of the result in registers to global memory, through slots of shared memory."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul import epilogue, inline_stores, memory
from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._grouped_matmul.shape import Shape

_I32 = jnp.int32


def _columns(config: Config, shape: Shape) -> int:
    """Of the result, of a warpgroup."""
    return shape.columns // (1 if config.form == "m" else config.computing)


def slots_of(config: Config, shape: Shape) -> int:
    """Pieces of the result in shared memory, per warpgroup.

    A tile's pieces are a multiple of them: a slot is then written again when all but the latest
    `slots - 1` stores have read theirs, in the next tile too.
    """
    if config.form == "swap":
        return 1
    pieces = shape.wm // shape.piece_rows * (_columns(config, shape) // shape.piece)
    return 2 if pieces % 2 == 0 else pieces


def holds_pairs(
    problem: MatmulProblem, shape: Shape, refs: memory.Refs, tile: Any
) -> list[jax.Array]:
    """Of each `shape.store_rows` rows of a tile but the first ones: whether they hold a pair.

    A block's pairs come first.
    """
    rows = problem.block_size if shape.store_rows else 0
    if not rows:
        return []
    limit, found = epilogue.num_pairs(problem, refs.vectors), []
    for row in range(shape.store_rows, rows, shape.store_rows):
        pair = refs.ids[tile.row + row]
        found.append((pair >= 0) & (pair < limit))
    return found


class Store:
    """Stores a warpgroup's pieces of tiles, each through a slot of shared memory: by TMA, or by threads."""

    def __init__(
        self,
        problem: MatmulProblem,
        config: Config,
        shape: Shape,
        refs: memory.Refs,
        warpgroup: jax.Array,
        interpret: bool,
    ):
        self.problem, self.shape, self.refs = problem, shape, refs
        self.like = memory.likes_of(problem, config, shape).out
        self.swap, self.warpgroup, self.interpret = config.form == "swap", warpgroup, interpret
        self.slots, self.rows = slots_of(config, shape), shape.piece_rows
        self.heights = config.heights
        self.across, self.down = _columns(config, shape) // shape.piece, config.bm // self.rows

    def __call__(
        self,
        q: int,
        value: jax.Array,
        at: tuple[jax.Array, ...],
        *,
        whole: bool = False,
        holds: Sequence[jax.Array] = (),
        rows: int = 0,
        height: Any = None,
    ) -> None:
        """Stores piece q of a tile.

        Args:
            q: number of the piece: those of the same rows follow each other; of a swapped tile those of the
                same columns do.
            value: the piece, in registers.
            at: (first row, first column, end) of what the warpgroup has of the tile: `ComputeLoop.place`.
            whole: all of the tile's rows are known to be stored.
            holds: what `holds_pairs` says of the tile.
            rows: of a piece that may have fewer than the others; 0: it has as many.
            height: rows of the tile, one of `Config.heights`; None: it has all.
        """
        row, column, end = at
        slot, down, across = q % self.slots, q // self.across, q % self.across
        if self.swap:
            down, across = q % self.down, q // self.down
        row, column = row + self.rows * down, pl.multiple_of(column + self.shape.piece * across, 8)
        tile, less = self.refs.o_tiles.at[self.warpgroup, slot], 0 < rows < self.rows
        if less:
            tile = self.refs.o_tiles.at[self.warpgroup, slot, pl.ds(0, rows)]
        plgpu.wait_smem_to_gmem(self.slots - 1, wait_read_only=True)
        if self.shape.parted:
            inline_stores.store_parted(tile, self.like, value, interpret=self.interpret)
        elif self.swap:
            target = tile.transpose((1, 0))
            value = value if self.interpret else plgpu.layout_cast(value, plgpu.Layout.WGMMA)
            target[...] = value
        else:
            tile[...] = value
        plgpu.commit_smem()
        if less:
            self._first(slot, row, column, rows)
        elif height is not None and down == self.down - 1:
            for each in self.heights:
                first = functools.partial(self._first, slot, row, column, each - self.rows * down)
                pl.when(height == each)(first)
        elif self.shape.out_by_rows:
            self._by_threads(slot, row, column, end)
        elif whole or not self.shape.partial:
            self._whole(slot, row, column, holds)
        else:
            lax.cond(
                row + self.rows <= end,
                lambda: self._whole(slot, row, column),
                lambda: self._by_threads(slot, row, column, end),
            )

    def _first(self, slot: int, row: jax.Array, column: jax.Array, rows: int) -> None:
        """Stores a slot's first rows by TMA."""
        source = self.refs.o_rows.at[self.warpgroup, slot, pl.ds(0, rows)]
        columns = pl.ds(pl.multiple_of(column, self.shape.piece), self.shape.piece)
        plgpu.copy_smem_to_gmem(source, self.refs.out.at[pl.ds(row, rows), columns])

    def _whole(
        self, slot: int, row: jax.Array, column: jax.Array, holds: Sequence[jax.Array] = ()
    ) -> None:
        """Stores a slot by TMA, all of its rows, from (row, column) of the result on.

        With `holds`, it stores runs of `store_rows` rows: the first, and the further ones that hold a pair.
        """
        rows, columns = self.rows, pl.ds(pl.multiple_of(column, self.shape.piece), self.shape.piece)
        if self.problem.rows == "masked":
            most = _I32(self.problem.max_rows)
            expert = lax.div(row, most)
            target = self.refs.out.at[expert, pl.ds(row - expert * most, rows), columns]
        else:
            target = self.refs.out.at[pl.ds(row, rows), columns]
        if not holds:
            plgpu.copy_smem_to_gmem(self.refs.o_rows.at[self.warpgroup, slot], target)
        each = self.shape.store_rows
        for k, wanted in enumerate((None, *holds) if holds else ()):
            source = self.refs.o_rows.at[self.warpgroup, slot, pl.ds(k * each, each)]
            part = self.refs.out.at[pl.ds(row + k * each, each), columns]
            copy = functools.partial(plgpu.copy_smem_to_gmem, source, part)
            copy() if wanted is None else pl.when(wanted)(copy)

    def _by_threads(self, slot: int, row: jax.Array, column: jax.Array, end: jax.Array) -> None:
        """Stores a slot's rows that lie before `end`, by threads, from (row, column) of the result on."""
        if not self.shape.partial:
            end = row + self.rows
        inline_stores.store_rows(
            self.refs.o_tiles.at[self.warpgroup, slot],
            self.like,
            self.refs.out,
            row,
            end,
            column,
            rows=self.rows,
            max_rows=self.problem.max_rows,
            interpret=self.interpret,
        )
        # Other threads than read the slot write to it next.
        plgpu.commit_smem()
        if self.shape.partial and not self.shape.out_by_rows and self.slots > 1:
            # These stores are no group of TMA's, of which `__call__` counts the latest: an earlier tile's
            # store may still read a slot that one of the next pieces writes to.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
