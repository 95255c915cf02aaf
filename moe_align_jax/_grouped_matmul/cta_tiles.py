"""Which tiles a CTA has, one after another, and what each of them is.

Tiles of blocks follow from their number. Others come from a list in global memory, or are found by the CTA
itself (found_masked.py, found_groups.py, found_cut.py). Either each warpgroup finds out what the CTA's next
tile is, or the one that loads does, and tells those that multiply (`found_cut.Told`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from moe_align_jax._grouped_matmul import (
    epilogue,
    found_cut,
    found_groups,
    found_masked,
    found_turned,
    inline_rows,
    tile_order,
)
from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.memory import Refs
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._grouped_matmul.shape import Shape

_I32 = jnp.int32


class Tile(NamedTuple):
    """A tile of the result: rows [row, min(row + bm, end)) by the n-th columns.

    Attributes:
        valid: whether it has anything but zeros.
        expert: whose weights it uses, where valid.
        row, end, n: see above.
        used: the row behind the last one in use, as far as the list of tiles tells; else as `end`.
        pairs: of tiles of several heights: rows that hold a pair, or are the group's; of blocks, with
            `Config.ahead`, where padding is zero: rows that hold a pair.
        empty, behind: of those: the first row, and the row behind the last one, of the tile's share of its
            run's rows that are in use and no tile's.
        there: whether there is such a tile: of two CTAs that share weights, the last may have none.
        busy: whether either of the two multiplies; both pass stages on then.
        together: whether they use the same weights.
        holds: of blocks, with `Config.skips`: whether the second warpgroup's rows hold a pair.
        turned: of `Config.turned`: whether it has bn rows, and bm columns.
    """

    valid: jax.Array
    expert: jax.Array
    row: jax.Array
    end: jax.Array
    n: jax.Array
    used: jax.Array
    pairs: Any = None
    empty: Any = None
    behind: Any = None
    there: Any = None
    busy: Any = None
    together: Any = None
    holds: Any = None
    turned: Any = None


class CtaTiles:
    """The tiles of a CTA.

    Attributes:
        mine: how many.
        row_tiles: tiles that the rows in use make, of all CTAs.
    """

    def __init__(
        self,
        problem: MatmulProblem,
        config: Config,
        shape: Shape,
        refs: Refs,
        interpret: bool,
        cta: jax.Array,
        rank: jax.Array,
    ):
        """
        Args:
            problem, config, shape, refs, interpret: of the kernel.
            cta: number of the CTA, or of its cluster.
            rank: of the CTA in its cluster.
        """
        self.problem, self.config, self.shape, self.refs = problem, config, shape, refs
        self.interpret, self.cta, self.rank = interpret, cta, rank
        self.sharing = max(1, config.sharing)
        self.clusters = config.num_ctas // (config.split * self.sharing)
        self.row_tiles = self._row_tiles()
        self.units, self.n_tiles = self.row_tiles, -(-shape.n_tiles // self.sharing)
        if config.shares_weights:
            self.units = lax.div(self.row_tiles + (self.sharing - 1), _I32(self.sharing))
            self.n_tiles = shape.n_tiles
        total = self.units * self.n_tiles
        self.by_unit = config.by_expert and config.finds
        if self.by_unit:
            total = self._found_unit(_I32(0))[-1]
            self.mine = found_masked.units_for(total, cta, self.clusters)
        else:
            rest = lax.div(total - cta + (self.clusters - 1), _I32(self.clusters))
            self.mine = jnp.maximum(rest, 0)

    # -- by each warpgroup

    def at(self, i: jax.Array) -> tuple[Tile, jax.Array]:
        """The i-th tile, and its steps: none of a tile without products."""
        if self.by_unit:
            at = found_masked.unit_in_turn(i, self.cta, self.clusters)
            unit = self._found_unit(at)
            of_unit = turned_tile_of_unit if self.config.turned else tile_of_unit
            tile = of_unit(self.problem, self.config, self.shape, unit, self.rank)
            return tile, _I32(self.shape.k_steps)
        at, n = self._place(i)
        if self.config.shares_weights:
            return self._beside_other(at, n)
        tile = self._tile(at, n, self._read(at))
        return tile, self._steps_if(tile.valid)

    def _steps_if(self, some: jax.Array) -> jax.Array:
        """The steps of a tile that has some, or none."""
        return jnp.where(some, _I32(self.shape.k_steps), 0)

    def _place(self, i: jax.Array, how: tile_order.Mixing | None = None) -> tuple[Any, Any]:
        """(Tile of rows, n tile) of the i-th tile. `how`: tiles of rows are mixed."""
        t = self.cta + i * self.clusters
        if self.config.by_expert:
            at, n = tile_order.in_expert(self.problem, self.config, self.refs, t, self.n_tiles)
        else:
            at, n = tile_order.in_groups(self.config.group, t, self.units, self.n_tiles, how)
        if self.config.shares_weights:
            return at * self.sharing + self.rank, n
        return at, n * self.sharing + self.rank if self.sharing > 1 else n

    def _beside_other(self, at: jax.Array, n: jax.Array) -> tuple[Tile, jax.Array]:
        """The same of one of two CTAs that share weights: both have the steps of either."""
        experts, last = self.problem.num_experts, jnp.maximum(self.row_tiles - 1, 0)
        other = self._read(jnp.minimum(at ^ 1, last))[0]
        mine = jnp.minimum(at, last)
        tile = self._tile(mine, n, self._read(mine))
        there = at < self.row_tiles
        valid = tile.valid & there
        peer = (other >= 0) & (other < experts) & ((at ^ 1) < self.row_tiles)
        tile = tile._replace(
            valid=valid,
            expert=jnp.clip(tile.expert, 0, experts - 1),
            there=there,
            busy=valid | peer,
            together=valid & peer & (tile.expert == other),
        )
        return tile, self._steps_if(tile.busy)

    # -- by the warpgroup that loads, which tells the others

    def tell_height(
        self, i: jax.Array, before_none: Callable[[], None], how: tile_order.Mixing | None
    ) -> tuple[Tile, jax.Array]:
        """Finds the i-th tile, of several heights, or reads it in the list, and tells the others.

        Args:
            i: which one.
            before_none: called ahead of telling a tile of no rows.
            how: tiles of rows are mixed.
        """
        at, n = self._place(i, how)
        problem, config, refs = self.problem, self.config, self.refs
        if config.cuts and problem.rows == "ragged":
            find = found_groups.find_plainly if self.interpret else found_groups.find
            known = tuple(find(problem, config, refs.sizes, refs.offset, at))
        elif config.cuts:
            find = found_cut.find_plainly if self.interpret else found_cut.find
            limit = jnp.maximum(_I32(epilogue.num_pairs(problem, refs.vectors)), 0)
            where = refs.experts, refs.ids, at, self.row_tiles, limit
            known = tuple(find(problem, config, *where))
        else:
            known = self._read(at)
        tile = self._tile(at, n, known)
        pl.when(jnp.logical_not(tile.valid))(before_none)
        refs.told.tell(i, tile.row, tile.end, tile.n, tile.pairs)
        return tile, self._steps_if(tile.valid)

    def hear_height(self, i: jax.Array) -> tuple[Tile, jax.Array]:
        """What `tell_height` told of the i-th tile, and its steps."""
        row, end, n, held = self.refs.told.hear(i, 4)
        tile = Tile(end > row, _I32(0), row, end, n, end, held)
        return tile, self._steps_if(tile.valid)

    def tell(self, i: jax.Array, tile: Tile, scales: Callable[[jax.Array], None]) -> None:
        """What the others must know of the i-th tile.

        `scales(slot)` copies those of its weights, which `hear` finds there, too.
        """
        flags = _I32(0)
        for place, flag in enumerate((tile.valid, tile.there, tile.busy, tile.holds, tile.turned)):
            if flag is not None:
                flags = flags | (flag.astype(_I32) << place)
        words = [tile.row, tile.end, tile.n, tile.used, tile.expert, flags]
        if self.shape.tests_rows:
            pairs = epilogue.num_pairs(self.problem, self.refs.vectors)
            where = self.refs.ids, tile.row, _I32(jnp.where(tile.valid, pairs, 0))
            rows = {"rows": self.config.bm, "interpret": self.interpret}
            words.append(inline_rows.count_rows(*where, **rows))
        self.refs.told.tell(i, *words, more=scales)

    def hear(self, i: jax.Array) -> tuple[Tile, jax.Array]:
        """What `tell` told of the i-th tile, and its steps. It stays there until `told.done`."""
        words = self.refs.told.hear(i, 6 + self.shape.tests_rows, keep=True)
        row, end, n, used, expert, flags, *held = words
        valid, there, busy, holds, turned = ((flags & (1 << k)) != 0 for k in range(5))
        tile = Tile(valid, expert, row, end, n, used, *held)
        if self.config.shares_weights:
            tile = tile._replace(there=there, busy=busy)
        if self.config.turned:
            tile = tile._replace(turned=turned)
        if self.config.skips and self.problem.rows == "blocks":
            tile = tile._replace(holds=holds)
        return tile, self._steps_if(busy if self.config.shares_weights else valid)

    # -- what memory says

    def _row_tiles(self) -> jax.Array:
        """Tiles that the rows in use make."""
        problem, config, shape, refs = self.problem, self.config, self.shape, self.refs
        if config.cuts and problem.rows == "ragged":
            count = found_groups.count_plainly if self.interpret else found_groups.count
            return count(problem, config, refs.sizes, refs.offset)
        if config.cuts:  # whose rows are all there
            blocks = lax.div(refs.count[0] + (problem.block_size - 1), _I32(problem.block_size))
            return jnp.clip(blocks, 0, problem.num_rows // problem.block_size)
        if config.finds:
            return self._found(_I32(0))[-1]
        if not shape.parts:
            return refs.count[0]
        if problem.all_rows and refs.vectors.bound is None:  # else a launch may have fewer
            return _I32(problem.num_blocks * shape.parts)
        block = problem.block_size
        count = refs.vectors.bound if problem.row_labels else refs.count[0]
        blocks = lax.div(count + (block - 1), _I32(block))
        # Ids are read of whole tiles. A last block that is not whole is none of an alignment's, whose rows in
        # use are whole blocks.
        whole = shape.reads_ids and not shape.partial
        most = problem.num_rows // block if whole else problem.num_blocks
        return jnp.clip(blocks, 0, most) * shape.parts

    def _found(self, at: jax.Array) -> Sequence[Any]:
        """What `found_masked.tile_of` says of a tile of rows of the masked layout."""
        find = found_masked.find_plainly if self.interpret else found_masked.find
        return find(self.problem, self.config, self.refs.masked_m, at)

    def _found_unit(self, at: jax.Array) -> Sequence[Any]:
        """What `found_masked.unit_of` says of a unit of the masked layout."""
        find = found_masked.find_unit_plainly if self.interpret else found_masked.find_unit
        if self.config.turned:
            find = found_turned.find_plainly if self.interpret else found_turned.find
        masked_m = self.refs.masked_m
        return find(self.problem, self.config, self.shape.n_tiles, masked_m, at)

    def _read(self, at: jax.Array) -> tuple[jax.Array, ...]:
        """What memory tells about a tile of rows: its expert; of a list, also the first row and the end; of
        blocks, with `skips`, the first id of the second warpgroup's rows, or their first label."""
        problem, config, shape, refs = self.problem, self.config, self.shape, self.refs
        if config.finds:
            return tuple(self._found(at)[:3])
        if config.heights:
            found = refs.experts[at], refs.starts[at], refs.ends[at]
            return *found, refs.pairs[at], refs.padding[at], refs.behind[at]
        if not shape.parts:
            return refs.experts[at], refs.starts[at], refs.ends[at]
        block = lax.div(at, _I32(shape.parts)) if shape.parts > 1 else at
        expert = refs.experts[block * problem.block_size if problem.row_labels else block]
        if not config.skips:
            return (expert,)
        second = at * config.bm + shape.wm
        if problem.row_labels:  # a last block need not be whole
            bound = problem.num_rows if refs.vectors.bound is None else refs.vectors.bound
            return expert, refs.experts[jnp.clip(second, 0, jnp.maximum(bound - 1, 0))]
        # Without a tile there may be no such row.
        return expert, refs.ids[jnp.where(self.row_tiles > 0, second, 0)]

    def _tile(self, at: jax.Array, n: jax.Array, known: tuple[jax.Array, ...]) -> Tile:
        """Tile `at` of the rows and n of the columns, of which `_read` gave what is `known`."""
        problem, config, shape, refs = self.problem, self.config, self.shape, self.refs
        if config.heights:
            expert, row, end, *more = known
            return Tile(end > row, expert, row, end, n, end, *more)
        if not shape.parts:
            expert, row, used = known
            # In the masked layout a tile may write to all of its expert's rows.
            end = (expert + 1) * problem.max_rows if problem.rows == "masked" else used
            return Tile(expert >= 0, expert, row, end, n, used)
        block = lax.div(at, _I32(shape.parts)) if shape.parts > 1 else at
        part = at - block * shape.parts
        row, end = block * problem.block_size + part * config.bm, (block + 1) * problem.block_size
        expert, *first_id = known
        valid = (expert >= 0) & (expert < problem.num_experts)
        if shape.parts > 1 and shape.reads_ids:
            # A block's pairs come first: a later part may have none.
            limit = epilogue.num_pairs(problem, refs.vectors)
            pair = refs.ids[row]
            valid = valid & (pair >= 0) & (pair < limit)
        tile = Tile(valid, expert, row, end, n, end)
        if first_id:  # the same of the second half
            [pair] = first_id
            limit = problem.num_experts
            if not problem.row_labels:
                limit = epilogue.num_pairs(problem, refs.vectors)
            tile = tile._replace(holds=(pair >= 0) & (pair < limit))
        return tile


def tile_of_unit(
    problem: MatmulProblem, config: Config, shape: Shape, unit: Sequence[Any], rank: jax.Array
) -> Tile:
    """The tile of a unit that this CTA of a cluster has."""
    expert, row, used, n, alone, _ = unit
    end, true = (expert + 1) * problem.max_rows, jnp.bool_(True)
    if not config.shares_weights:
        n = n * config.sharing + rank if config.sharing > 1 else n
        return Tile(true, expert, row, end, n, used)
    apart = alone != 0
    row = row + jnp.where(apart, 0, rank * config.bm)
    n = n + jnp.where(apart, rank, 0)
    there = n < shape.n_tiles
    n = jnp.minimum(n, shape.n_tiles - 1)
    more = {"there": there, "busy": true, "together": jnp.logical_not(apart)}
    return Tile(there, expert, row, end, n, used, **more)


def turned_tile_of_unit(
    problem: MatmulProblem, config: Config, shape: Shape, unit: Sequence[Any], rank: jax.Array
) -> Tile:
    """The same of `Config.turned`. Where two clusters divide a pair, the second warpgroup's rows are another
    tile's."""
    expert, row, used, n, kind, _ = unit
    turned, alone = kind == found_turned.IS_TURNED, kind == found_turned.IS_ALONE
    half = kind == found_turned.IS_HALF
    by_columns = turned | alone
    row = row + rank * jnp.where(by_columns, 0, jnp.where(half, config.bm // 2, config.bm))
    n = jnp.where(turned, 2 * n, n) + jnp.where(by_columns, rank, 0)
    used = jnp.where(half, jnp.minimum(used, row + config.bm // 2), used)
    there = turned | (n < shape.n_tiles)
    n = jnp.where(turned, n, jnp.minimum(n, shape.n_tiles - 1))
    more = {"there": there, "busy": jnp.bool_(True), "together": jnp.logical_not(by_columns)}
    end = (expert + 1) * problem.max_rows
    return Tile(there, expert, row, end, n, used, **more, turned=turned)
