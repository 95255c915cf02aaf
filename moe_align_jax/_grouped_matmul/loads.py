"""What the loading warpgroup does for a stage of the ring: TMA, or cp.async where TMA cannot count."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._core.fp8 import GROUPS_PER_WORD
from moe_align_jax._grouped_matmul import inline, inline_rows, inline_scales, memory
from moe_align_jax._grouped_matmul.cluster_sum import AXIS
from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._grouped_matmul.shape import Shape, has_scale_rows

_I32 = jnp.int32


class Found(NamedTuple):
    """Where a tile's rows are that are copied one by one; None for those that TMA reads.

    Attributes:
        rows: of x.
        scales: the row of x of each scale.
    """

    rows: jax.Array | None
    scales: jax.Array | None


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
        interpret: bool,
    ):
        self.problem, self.config, self.shape = problem, config, shape
        likes = memory.likes_of(problem, config, shape)
        self.x_like, self.w_like, self.interpret = likes.x, likes.weights, interpret
        self.item = jnp.dtype(problem.dtype).itemsize
        self.chunks = problem.k * self.item // inline.CHUNK_BYTES  # of a row of x
        # The interpreter's copies know no limits of TMA's.
        self.x_by_matrix = shape.x_by_rows and not problem.top_k and not interpret
        self.w_by_matrix = shape.w_by_rows and not interpret
        self.pieces = self._pieces()
        gathered = problem.top_k > 0 and not shape.x_by_token
        x_copies = 0 if gathered or self.x_by_matrix else shape.k_parts
        self.by_halves = problem.rows == "blocks" and config.skips
        if self.by_halves:
            x_copies *= 2
        self.scales_by_tma = has_scale_rows(problem) and not shape.scales_by_rows
        w_copies = 0 if self.w_by_matrix else len(self.pieces)
        self.copies = x_copies + w_copies + self.scales_by_tma
        self.width = inline.CHUNKS_PER_ROW * inline.CHUNK_BYTES // self.item  # columns of a part

    def find(self, refs: Any, tile: Any) -> Found:
        """Where the rows of a tile lie."""
        problem, rows, scales = self.problem, None, None
        bound = refs.vectors.bound
        if bound is None:
            bound = problem.num_tokens * problem.top_k if problem.top_k else problem.num_rows
        if problem.top_k and not self.shape.x_by_token:
            rows = inline_rows.find_rows(
                *(refs.ids, tile.row, tile.end),
                rows=self.config.bm,
                row_chunks=self.chunks,
                top_k=problem.top_k,
                num_pairs=bound,
                interpret=self.interpret,
            )
        if self.shape.scales_by_rows:
            scales = inline_scales.find(
                *(refs.ids if problem.top_k else None, tile.row, tile.end),
                rows=self.config.bm,
                top_k=problem.top_k,
                limit=bound,
                interpret=self.interpret,
            )
        return Found(rows, scales)

    def load(
        self, refs: Any, tile: Any, found: Found, slot: jax.Array, k: jax.Array, barrier: Any
    ) -> None:
        """Step k of a tile into a stage."""
        if self.config.turned:
            return self._load_either(refs, tile, slot, k, barrier)
        self.load_weights(refs, tile, slot, k, barrier)
        for part in range(self.shape.k_parts):
            step = k * self.shape.k_parts + part
            if found.rows is not None:
                inline_rows.copy_rows(
                    *(refs.x, refs.x_tiles.at[slot, part], self.x_like, found.rows, step),
                    rows=self.config.bm,
                    row_chunks=self.chunks,
                    whole=self.problem.k % self.config.bk == 0,
                    interpret=self.interpret,
                )
            elif self.x_by_matrix:
                self._rows_by_matrix(refs, tile, slot, step, part)
            elif self.shape.x_by_token:
                self.load_row(refs, self._token(tile), slot, step, part, barrier)
            else:
                self._rows(refs, tile, slot, step, part, barrier)
        if self.scales_by_tma:
            self._scales(refs, tile, slot, k, barrier)
        elif self.shape.scales_by_rows:
            self._scales_by_rows(refs, tile, found, slot, k)

    def load_weights(
        self, refs: Any, tile: Any, slot: jax.Array, k: jax.Array, barrier: Any
    ) -> None:
        """The weights of step k of a tile into a stage."""
        for piece in self.pieces:
            if self.w_by_matrix:
                self._weights_by_matrix(refs, tile, slot, k, *piece)
            else:
                self._weights(refs, tile, slot, k, barrier, *piece)

    # -- tiles of two shapes

    def _load_either(
        self, refs: Any, tile: Any, slot: jax.Array, k: jax.Array, barrier: Any
    ) -> None:
        """Step k of a tile of bm x bn, or of a turned one: its weights, bm rows, lie where the others have x,
        and its bn rows of x, which the cluster shares, where the others have weights."""
        config, most = self.config, _I32(self.problem.max_rows)
        row = tile.row - tile.expert * most

        def ask(turned: bool, shared: bool) -> None:
            ks, ns = pl.ds(k * config.bk, config.bk), config.bm if turned else config.bn
            rows = config.bn if turned else config.bm
            first = pl.multiple_of(row, 8) if turned else row  # for TMA's tiles of 8 rows
            x = refs.x.at[tile.expert, pl.ds(first, rows), ks]
            w = refs.weights[0].at[tile.expert, pl.ds(tile.n * ns, ns), ks]
            both, own = (x, w) if turned else (w, x)
            axes = AXIS if shared and not self.interpret else None
            target = refs.w_tiles.at[slot, 0]
            plgpu.copy_gmem_to_smem(both, target, barrier, collective_axes=axes)
            plgpu.copy_gmem_to_smem(own, refs.x_rows.at[slot, 0], barrier)
            scales = refs.x_scales.at[tile.expert, k, pl.ds(row, rows)]
            target = refs.scale_rows.at[slot, pl.ds(0, rows)]
            plgpu.copy_gmem_to_smem(scales, target, barrier)

        def ask_usual() -> None:
            lax.cond(tile.together, lambda: ask(False, True), lambda: ask(False, False))

        lax.cond(tile.turned, lambda: ask(True, True), ask_usual)

    # -- x

    def _token(self, tile: Any) -> jax.Array:
        """That of the tile's first row, which is a pair."""
        return lax.div(tile.row, _I32(self.problem.top_k))

    def load_row(
        self,
        refs: Any,
        row: jax.Array,
        slot: jax.Array,
        step: jax.Array,
        part: int,
        barrier: Any,
    ) -> None:
        """Asks TMA for one part of a step of a row of x, which becomes the first of a slot."""
        source = refs.x.at[pl.ds(row, 1), pl.ds(step * self.width, self.width)]
        plgpu.copy_gmem_to_smem(source, refs.x_rows.at[slot, part, pl.ds(0, 1)], barrier)

    def _rows(
        self, refs: Any, tile: Any, slot: jax.Array, step: jax.Array, part: int, barrier: Any
    ) -> None:
        """Asks TMA for the tile's rows of x, one part of a step of them, into a slot."""
        rows, ks = self.config.bm, pl.ds(step * self.width, self.width)
        if self.problem.rows == "masked":
            most = _I32(self.problem.max_rows)
            expert = lax.div(tile.row, most)
            if self.config.trims:
                return self._some(refs, tile, expert, slot, ks, part, barrier)
            source = refs.x.at[expert, pl.ds(tile.row - expert * most, rows), ks]
        elif self.by_halves:
            return self._halves(refs, tile, slot, ks, part, barrier)
        else:
            if self.config.trims:
                for height in self.config.heights:
                    copy = functools.partial(
                        self._first_rows, refs, tile, slot, ks, part, barrier, height
                    )
                    pl.when(tile.end - tile.row == height)(copy)
                return
            source = refs.x.at[pl.ds(tile.row, rows), ks]
        shared = self.config.sharing > 1 and not self.config.shares_weights and not self.interpret
        plgpu.copy_gmem_to_smem(
            *(source, refs.x_rows.at[slot, part], barrier), collective_axes=AXIS if shared else None
        )

    def _first_rows(
        self, refs: Any, tile: Any, slot: jax.Array, ks: Any, part: int, barrier: Any, rows: int
    ) -> None:
        """The same for a tile of so many rows, the first ones of a slot."""
        source, target = (
            refs.x.at[pl.ds(tile.row, rows), ks],
            refs.x_rows.at[slot, part, pl.ds(0, rows)],
        )
        plgpu.copy_gmem_to_smem(source, target, barrier)

    def _some(
        self,
        refs: Any,
        tile: Any,
        expert: jax.Array,
        slot: jax.Array,
        ks: Any,
        part: int,
        barrier: Any,
    ) -> None:
        """The same in the masked layout, but for the second warpgroup's rows where none of them is in use."""
        row, half = tile.row - expert * self.problem.max_rows, self.shape.wm

        def copy(count: int) -> None:
            source = refs.x.at[expert, pl.ds(row, count), ks]
            plgpu.copy_gmem_to_smem(source, refs.x_rows.at[slot, part, pl.ds(0, count)], barrier)

        holds = tile.row + half < tile.used
        lax.cond(holds, lambda: copy(self.config.bm), lambda: copy(half))

    def _halves(
        self, refs: Any, tile: Any, slot: jax.Array, ks: Any, part: int, barrier: Any
    ) -> None:
        """The same, each warpgroup's rows by a copy of their own.

        Of rows that hold no pair only the arrival is made: what the slot holds in their place is not read.
        """
        each = self.shape.wm

        def copy(first: int) -> None:
            source = refs.x.at[pl.ds(tile.row + first, each), ks]
            target = refs.x_rows.at[slot, part, pl.ds(first, each)]
            plgpu.copy_gmem_to_smem(source, target, barrier)

        copy(0)
        lax.cond(tile.holds, lambda: copy(each), lambda: plgpu.barrier_arrive(barrier))

    def _rows_by_matrix(
        self, refs: Any, tile: Any, slot: jax.Array, step: jax.Array, part: int
    ) -> None:
        """The same by cp.async: for rows whose pitch TMA does not take."""
        # Rows behind a group's are some other's, or zeros: they are not stored.
        matrix = inline_rows.Matrix(self.problem.num_rows, self.chunks, self.chunks)
        inline_rows.copy_matrix(
            *(refs.x, refs.x_tiles.at[slot, part], self.x_like, matrix),
            *(_I32(0), tile.row, step * inline.CHUNKS_PER_ROW),
            shape=(self.config.bm, inline.CHUNKS_PER_ROW),
        )

    def _word(self, k: jax.Array) -> jax.Array:
        """Where the scales of step k are, counted in scales or in words of them."""
        assert self.problem.scales
        return lax.div(k, _I32(GROUPS_PER_WORD)) if self.problem.scales.packed else k

    def _scales(self, refs: Any, tile: Any, slot: jax.Array, k: jax.Array, barrier: Any) -> None:
        """Asks TMA for the scales of the tile's rows in step k, of scales by columns."""
        rows, word = self.config.bm, self._word(k)
        if self.problem.rows == "masked":
            most = _I32(self.problem.max_rows)
            expert = lax.div(tile.row, most)
            source = refs.x_scales.at[expert, word, pl.ds(tile.row - expert * most, rows)]
        else:
            source = refs.x_scales.at[word, pl.ds(tile.row, rows)]
        plgpu.copy_gmem_to_smem(source, refs.scale_rows.at[slot, pl.ds(0, rows)], barrier)

    def _scales_by_rows(
        self, refs: Any, tile: Any, found: Found, slot: jax.Array, k: jax.Array
    ) -> None:
        """The same by cp.async, from where `find` has found the rows."""
        problem, scales, word = self.problem, self.problem.scales, self._word(k)
        assert scales and found.scales is not None
        shape = problem.inputs["x_scales"][0]
        first, stride = word, shape[-1]
        if scales.x == "column_major":
            first, stride = word * scales.pitch, 1
            if problem.rows == "masked":
                expert = lax.div(tile.row, _I32(problem.max_rows))
                first = first + expert * (shape[1] * scales.pitch - problem.max_rows)
        inline_scales.copy(
            *(refs.x_scales, refs.scale_rows.at[slot], found.scales, first),
            stride=stride,
            rows=self.config.bm,
            interpret=self.interpret,
        )

    # -- the weights

    def _pieces(self) -> list[tuple[int, int, int, int, int, int | None]]:
        """(array, part of the stage, first column or row there, first column, columns, gate 0 or up 1)."""
        weights, shape, bn = self.problem.weights, self.shape, self.config.bn
        if not weights.gated or shape.parted:
            return [(0, 0, 0, 0, bn, None)]
        # Each warpgroup's accumulators get their own gate and up.
        owners = 1 if self.config.form == "m" else self.config.computing
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
        """Asks TMA for a piece of the tile's weights in step k; the last six arguments are a row of
        `_pieces`."""
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
        if not self.config.shares_weights or self.interpret:
            plgpu.copy_gmem_to_smem(source, target, barrier)
            return
        pl.when(tile.together)(
            lambda: plgpu.copy_gmem_to_smem(source, target, barrier, collective_axes=AXIS)
        )
        pl.when(jnp.logical_not(tile.together))(
            lambda: plgpu.copy_gmem_to_smem(source, target, barrier)
        )

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
        """The same by cp.async: for weights whose pitch TMA does not take."""
        problem, weights, bk = self.problem, self.problem.weights, self.config.bk
        first = self._first(tile, column, which)
        values = inline.CHUNK_BYTES // self.item
        columns = problem.n if weights.pair else problem.w_columns
        ref = refs.weights[array]
        if not weights.transposed:
            matrix = inline_rows.Matrix(problem.k, columns // values, columns // values)
            target, shape = refs.w_tiles.at[slot, part], (bk, size // values)
            before, row, chunk = tile.expert * problem.k, k * bk, lax.div(first, _I32(values))
        else:
            target = refs.w_tiles.at[slot, part, pl.ds(inside, size)]
            shape, row, chunk = (size, bk // values), first, k * (bk // values)
            chunks = self.chunks
            if weights.interleaved and which is not None:
                matrix = inline_rows.Matrix(problem.n, chunks, 2 * chunks, which * chunks)
                before = tile.expert * problem.n
            else:
                matrix, before = inline_rows.Matrix(columns, chunks, chunks), tile.expert * columns
        inline_rows.copy_matrix(
            *(ref, target, self.w_like, matrix, before, row, chunk), shape=shape
        )
