"""What a warpgroup multiplies where operands are e4m3 with scales: sums of two levels.

wgmma's own sums of e4m3 keep about 14 bits. So each step of the ring, 128 columns of x, gets an accumulator
of its own, which is scaled into float32 registers: `sum + partial * (scale of the row * scale of the block)`.

Where gate and up are multiplied, a warpgroup has 64 columns of each, with scales of their own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._core.fp8 import GROUP, GROUPS_PER_WORD
from moe_align_jax._grouped_matmul import inline, inline_scales
from moe_align_jax._grouped_matmul.config import E4M3_COLUMNS, Config
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._grouped_matmul.shape import Shape

_I32, _F32 = jnp.int32, jnp.float32
_LEAST_ROWS = 32  # of a stage's scales: TMA writes to multiples of 128 bytes


def x_scales_memory(problem: MatmulProblem, config: Config) -> Any:
    """Scales of a tile's rows for each stage, in shared memory."""
    assert problem.scales
    most = config.bn if config.turned else config.bm
    rows = -(-most // _LEAST_ROWS) * _LEAST_ROWS
    return plgpu.SMEM((config.stages, rows), _I32 if problem.scales.packed else _F32)


def sums_of(problem: MatmulProblem, config: Config, shape: Shape) -> int:
    """How many scales the weights of a warpgroup's tile have, in a step."""
    if problem.weights.gated:
        return 2
    # Sums side by side, each of columns that share a scale: a tile of 192 columns has parts of 3 blocks.
    parted = config.form != "swap" and shape.wn % GROUP and shape.wn > E4M3_COLUMNS
    return shape.wn // E4M3_COLUMNS if parted else 1


def w_scales_memory(problem: MatmulProblem, config: Config, shape: Shape) -> Any:
    """Scales of the weights of two tiles, this one and the next, for each warpgroup, in shared memory."""
    sums = sums_of(problem, config, shape)
    groups = -(-problem.scale_groups // _LEAST_ROWS) * _LEAST_ROWS
    return plgpu.SMEM((owners_of(config), 2, sums, groups), _F32)


def owners_of(config: Config) -> int:
    """Warpgroups that have scales of the weights for themselves; 1 where they share them."""
    return 1 if config.form == "m" else config.computing


class ScaledProducts:
    """Multiplies a tile: called with what is the same for every tile."""

    def __init__(
        self, problem: MatmulProblem, config: Config, shape: Shape, refs: Any, interpret: bool
    ):
        assert problem.scales
        self.problem, self.config, self.shape = problem, config, shape
        self.scales = problem.scales
        self.refs, self.interpret = refs, interpret
        self.swap = config.form == "swap"
        self.gated = problem.weights.gated
        self.beside = 1 if self.gated else sums_of(problem, config, shape)

    def __call__(
        self,
        tile: Any,
        warpgroup: jax.Array,
        ring: jax.Array,
        between: Callable[[jax.Array], None],
        scales_at: jax.Array | None = None,
        before: jax.Array | int = 0,
    ) -> list[jax.Array]:
        """The warpgroup's sums: gate and up, or one.

        Args:
            tile: rows and columns.
            warpgroup: which one this is.
            ring: steps of the ring before this tile's.
            between: called while a product of step k runs.
            scales_at: which of the two rows of scales in shared memory `fetch` wrote for this tile; None
                where the scales are read from global memory.
            before: steps of the tile's K before this CTA's, where several share it.
        """
        if self.scales.w == "tensor":  # one for all steps
            scales_at = None
        given = self, tile, warpgroup, ring, between, scales_at, before
        if self.config.turned:
            turned = _TurnedProducts(*given)
            return list(lax.cond(tile.turned, turned.sums, _TileProducts(*given).sums))
        return _TileProducts(*given).sums()

    def leave(self, slot: jax.Array) -> None:
        """This warpgroup has read a stage: it can be loaded again.

        In a cluster one thread says so for its warpgroup (Mosaic's collective barriers), and the other warps
        may be behind it: they must have read their scales, and seen the stage, before. Otherwise every
        thread says so itself.
        """
        if self.config.sharing > 1:
            inline.meet_warpgroup(interpret=self.interpret)
        plgpu.barrier_arrive(self.refs.empty.at[slot])

    def holds_rows(self, tile: Any, warpgroup: jax.Array) -> jax.Array:
        """Whether any of this warpgroup's rows are in use: the first of them, if any is."""
        if tile.holds is not None:
            return (warpgroup == 0) | tile.holds
        return tile.row + warpgroup * self.shape.wm < tile.used

    # -- products

    def operands(self, warpgroup: jax.Array, slot: jax.Array, part: int) -> tuple[Any, Any]:
        """wgmma's two, for a step."""
        x, shape = self.refs.x_tiles.at[slot, 0], self.shape
        if self.config.form == "m":
            x = self.refs.x_tiles.at[slot, 0, pl.ds(warpgroup * shape.wm, shape.wm)]
        width = self.config.bn // self.config.computing
        rows: Any = slice(None)
        if self.swap:
            rows = pl.ds(warpgroup * width + 64 * part, 64)
        elif self.config.form == "n":
            rows = pl.ds(warpgroup * width, width)
        w = self.refs.w_tiles.at[slot, 0, rows]
        return (w, x.transpose((1, 0))) if self.swap else (x, w.transpose((1, 0)))

    def shapes(self) -> list[tuple[int, int]]:
        """Of the sums."""
        if self.swap:
            return [(64, self.shape.wn)] * (self.shape.wm // 64)
        if self.gated:
            return [(64, self.shape.wn // 2)] * 2
        return [(64, self.shape.wn // self.beside)] * self.beside

    def pieces(self, product: jax.Array, part: int) -> list[tuple[int, jax.Array]]:
        """(Which sum, what is added to it) of accumulator `part`."""
        if self.swap or (not self.gated and self.beside == 1):
            return [(part, product)]
        count = 2 if self.gated else self.beside
        width = self.shape.wn // count
        return [(i, product[:, i * width : (i + 1) * width]) for i in range(count)]

    def zeros(self, shape: tuple[int, int]) -> jax.Array:
        """Float32 zeros as a warpgroup holds its sums."""
        zeros = jnp.zeros(shape, _F32)
        return zeros if self.interpret else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)

    def add(
        self, total: jax.Array | None, piece: jax.Array, of_x: jax.Array | None, of_w: jax.Array
    ) -> jax.Array:
        """One multiplication and addition for each value: ptxas makes an FFMA of them. No `total` is 0."""
        scale: Any = of_w
        if of_x is not None:
            axis = 1 if self.swap else 0
            scale = lax.broadcast_in_dim(of_x * of_w, piece.shape, (axis,))
        return piece * scale if total is None else total + piece * scale

    # -- scales

    def of_rows(self, warpgroup: jax.Array, slot: jax.Array, k: jax.Array) -> jax.Array:
        """float32 of this warpgroup's rows of x."""
        if self.config.form == "m":
            wm = self.shape.wm
            return self.of_some_rows(slot, k, warpgroup * wm, wm)
        return self.of_some_rows(slot, k, 0, self.config.bm)

    def of_some_rows(self, slot: jax.Array, k: jax.Array, first: Any, count: int) -> jax.Array:
        """float32 of so many rows of x, from one on."""
        ref = self.refs.scale_rows.at[slot, pl.ds(first, count)]
        if self.interpret:
            scales = ref[...]
        else:
            layout = plgpu.Layout.WGMMA.reduce(0 if self.swap else 1)
            scales = plgpu.load(ref, layout=layout, optimized=False)
        if not self.scales.packed:
            return scales
        shift = lax.rem(k, _I32(GROUPS_PER_WORD)) * 8
        exponents = lax.shift_right_logical(scales, lax.broadcast(shift, scales.shape)) & 255
        return lax.bitcast_convert_type(exponents << 23, _F32)

    def fetch(self, tile: Any, warpgroup: jax.Array, place: jax.Array) -> None:
        """Asks for the scales of a tile's weights."""
        if self.scales.w == "tensor":
            return
        for i, (ref, expert, block) in enumerate(self._blocks(tile, warpgroup)):
            inline_scales.copy_groups(
                ref,
                self.refs.w_scale_rows.at[self._owner(warpgroup), place, i],
                (expert * ref.shape[1] + block) * ref.shape[2],
                count=ref.shape[2],
                interpret=self.interpret,
            )

    def fetched(
        self, warpgroup: jax.Array, place: jax.Array, k: jax.Array
    ) -> tuple[jax.Array, ...]:
        """The weights' scales of step k in a slot: one for each of the warpgroup's sums."""
        count = sums_of(self.problem, self.config, self.shape)
        owner = self._owner(warpgroup)
        return tuple(self.refs.w_scale_rows[owner, place, i, k] for i in range(count))

    def _owner(self, warpgroup: Any) -> Any:
        """Where the scales of a warpgroup's weights are."""
        return 0 if owners_of(self.config) == 1 else warpgroup

    def of_blocks(
        self, tile: Any, warpgroup: jax.Array, k: jax.Array | int
    ) -> tuple[jax.Array, ...]:
        """float32 scalars, of each sum's weights."""
        if self.scales.w == "tensor":
            return tuple(ref[expert, 0, 0] for ref, expert, _ in self._blocks(tile, warpgroup))
        return tuple(ref[expert, block, k] for ref, expert, block in self._blocks(tile, warpgroup))

    def _blocks(self, tile: Any, warpgroup: jax.Array) -> list[tuple[Any, jax.Array, jax.Array]]:
        """(Array of scales, expert, block of its columns) of each sum."""
        problem, weights, refs = self.problem, self.problem.weights, self.refs
        # A tile without an expert reads some expert's, and does not use it.
        expert = jnp.clip(tile.expert, 0, problem.num_experts - 1)
        column = tile.n * self.shape.columns
        if self.config.form != "m":
            column = column + warpgroup * (self.shape.columns // self.config.computing)
        found = []
        for i in range(2 if self.gated else self.beside):
            # Of a turned tile there is one block of columns.
            ref = refs.w_scales[i if weights.pair else 0]
            first = column
            if not self.gated:
                first = column + i * E4M3_COLUMNS
            elif weights.interleaved:
                first = 2 * column
            elif i and not weights.pair:
                first = column + problem.n
            if self.config.turned:
                first = jnp.where(tile.turned, tile.n * self.config.bm, first)
            # A tile may have columns that there are none of.
            block = jnp.minimum(lax.div(first, _I32(GROUP)), ref.shape[1] - 1)
            found.append((ref, expert, block))
        return found


class _TileProducts:
    """The products of one tile, of one warpgroup: step after step, or two steps in a turn.

    A loop carries the sums, the scales of the step's weights, and its stage. The next step's stage is found,
    and its scales are read, while this one's product runs.
    """

    def __init__(
        self,
        products: ScaledProducts,
        tile: Any,
        warpgroup: jax.Array,
        ring: jax.Array,
        between: Callable[[jax.Array], None],
        scales_at: jax.Array | None,
        before: jax.Array | int,
    ):
        """As for `ScaledProducts.__call__`."""
        self.products, self.refs, self.config = products, products.refs, products.config
        self.tile, self.warpgroup, self.ring = tile, warpgroup, ring
        self.between, self.scales_at, self.before = between, scales_at, before
        self.steps = products.shape.k_steps
        # Both stages of a turn follow each other: each tile begins at an even one.
        paired = self.config.paired and self.steps % 2 == 0 and self.config.stages % 2 == 0
        self.of_turn, self.turn = (2, self._two_steps) if paired else (1, self._one_step)
        # Whether the scales of the weights are read in the step itself, behind its product.
        self.in_step = scales_at is not None and (not self.config.early or paired)
        # The scale of all of x, if there is one only.
        self.of_all = self.refs.x_scales[0] if products.scales.x == "tensor" else None

    def sums(self) -> list[jax.Array]:
        """Those of all steps."""
        config, refs, mine = self.config, self.refs, self.tile.valid
        if config.skips:
            mine = mine & self.products.holds_rows(self.tile, self.warpgroup)
        if config.early:  # of the first step; of the next ones each behind the product before it
            pl.when(mine)(lambda: plgpu.barrier_wait(refs.full.at[refs.slot_of(self.ring)]))
        return list(self._peeled(mine) if config.peeled else self._looped(mine))

    def _looped(self, mine: jax.Array) -> Sequence[jax.Array]:
        """The sums by one loop, which begins with zeros. Its steps are none if the tile is not `mine`."""
        zeros = self._zeros()
        turns = jnp.where(mine, _I32(self.steps // self.of_turn), 0)
        sums, *_ = lax.fori_loop(0, turns, self.turn, self._begin(zeros))
        self._pass_others(mine)
        return sums

    def _peeled(self, mine: jax.Array) -> Sequence[jax.Array]:
        """The sums by a first turn, which adds to nothing, and a loop behind it."""

        def multiplied():
            none = (None,) * len(self.products.shapes())
            carry = self.turn(_I32(0), self._begin(none))
            turns = _I32(self.steps // self.of_turn)
            turns = inline.hidden(turns, interpret=self.products.interpret)
            return lax.fori_loop(1, turns, self.turn, carry)[0]

        def passed():
            self._pass_others(mine)
            return self._zeros()

        return lax.cond(mine, multiplied, passed)

    def _zeros(self) -> tuple[jax.Array, ...]:
        """Sums of nothing."""
        return tuple(self.products.zeros(shape) for shape in self.products.shapes())

    def _begin(self, sums: Any) -> tuple[Any, ...]:
        """What a loop carries into the first turn."""
        return sums, () if self.in_step else self._of_weights(0), self.refs.slot_of(self.ring)

    # -- the steps that are multiplied

    def _one_step(self, k: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        """Step k."""
        sums, of_w, slot = carry
        following = jnp.where(slot == self.config.stages - 1, 0, slot + 1)
        more = k < self.steps - 1
        return *self._step(k, sums, of_w, slot, following, more), following

    def _two_steps(self, i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        """Steps 2 i and 2 i + 1: where the second's operands lie is found beside the sums of the first."""
        sums, of_w, slot = carry
        following = jnp.where(slot == self.config.stages - 2, 0, slot + 2)
        sums, of_w = self._step(2 * i, sums, of_w, slot, slot + 1, True)
        more = i < self.steps // 2 - 1
        return *self._step(2 * i + 1, sums, of_w, slot + 1, following, more), following

    def _step(
        self, k: jax.Array, sums: Any, of_w: Any, slot: jax.Array, following: jax.Array, more: Any
    ) -> tuple[Any, Any]:
        """The sums with those of step k, and the scales of the next step's weights, if they are known.

        Args:
            k: the step.
            sums: of the steps before it; None for those that there are not yet.
            of_w: the scales of its weights; nothing where they are read in the step itself.
            slot: its stage.
            following: the next step's stage.
            more: whether there is a next step.
        """
        products, shape = self.products, self.products.shape
        count = shape.wm // 64 if products.swap else 1  # accumulators, one after the other
        like = plgpu.ACC((64, shape.wn), _F32)  # pyright: ignore[reportPrivateImportUsage]
        if not self.config.early:
            plgpu.barrier_wait(self.refs.full.at[slot])
        found, of_x, coming = list(sums), None, of_w
        for part in range(count):

            def scope(partial, part=part):
                plgpu.wgmma(partial, *products.operands(self.warpgroup, slot, part))
                # The first part's product runs meanwhile.
                scales = self._beside_product(k, slot, following, more) if part == 0 else ()
                return partial[...], scales

            product, scales = pl.run_scoped(scope, like)
            if part == 0:
                of_x, coming = scales
                if self.in_step:
                    of_w, coming = coming, ()
            if part == count - 1:
                products.leave(slot)
            for i, piece in products.pieces(product, part):
                scale = of_w[i] if self.of_all is None else of_w[i] * self.of_all
                found[i] = products.add(found[i], piece, of_x, scale)
        return tuple(found), coming

    def _of_rows(self, slot: jax.Array, k: jax.Array) -> Any:
        """The scales of the rows of x in step k."""
        return self.products.of_rows(self.warpgroup, slot, self.before + k)

    def _beside_product(
        self, k: jax.Array, slot: jax.Array, following: jax.Array, more: Any
    ) -> tuple[Any, Any]:
        """What is done while the product of step k runs; the scales of its rows, and of weights: its own
        where they are read in the step itself, otherwise the next step's."""
        self.between(k)
        of_x = None
        if self.of_all is None:
            of_x = self._of_rows(slot, k)
        last = self.steps - 1
        of_w = self._of_weights(k if self.in_step else jnp.minimum(k + 1, last))
        if self.config.early:
            pl.when(more)(lambda: plgpu.barrier_wait(self.refs.full.at[following]))
        return of_x, of_w

    def _of_weights(self, k: Any) -> tuple[jax.Array, ...]:
        """The scales of the weights in step k."""
        if self.scales_at is None:
            return self.products.of_blocks(self.tile, self.warpgroup, self.before + k)
        return self.products.fetched(self.warpgroup, self.scales_at, k)

    # -- the steps that are not

    def _pass_others(self, mine: jax.Array) -> None:
        """Lets the steps pass that other warpgroups or CTAs multiply, if the tile is not `mine`."""
        if not (self.config.skips or self.config.shares_weights):
            return
        busy = self.tile.busy if self.config.shares_weights else self.tile.valid
        others = busy & jnp.logical_not(mine)
        passed = jnp.where(others, _I32(self.steps), 0)
        inline.loop(passed, self._pass, interpret=self.products.interpret)

    def _pass(self, k: jax.Array) -> None:
        """Step k: its stage is waited for, and left."""
        slot = self.refs.slot_of(self.ring + k)
        plgpu.barrier_wait(self.refs.full.at[slot])
        self.between(k)
        self.products.leave(slot)


class _TurnedProducts(_TileProducts):
    """The same of a turned tile: 192 rows of x, which lie where other tiles have weights, by 128 columns.

    A warpgroup multiplies 64 rows with all columns, and of the last 64 rows half of the columns: three sums
    of 64 x 64, as many as of another tile. Both products run at once.
    """

    def sums(self) -> list[jax.Array]:
        """Those of all steps."""
        turns = _I32(self.steps // self.of_turn)
        return list(lax.fori_loop(0, turns, self.turn, self._begin(self._zeros()))[0])

    def _operands(self, slot: jax.Array) -> list[tuple[Any, Any]]:
        """wgmma's two of each product."""
        each = self.products.shape.wm
        own, last = pl.ds(self.warpgroup * each, each), pl.ds(2 * each, each)
        x_own, x_last = (self.refs.w_tiles.at[slot, 0, rows] for rows in (own, last))
        w, w_own = (self.refs.x_tiles.at[slot, 0, rows] for rows in (slice(None), own))
        return [(x_own, w.transpose((1, 0))), (x_last, w_own.transpose((1, 0)))]

    def _of_rows(self, slot: jax.Array, k: jax.Array) -> Any:
        """The scales of the rows of both products."""
        each, k = self.products.shape.wm, self.before + k
        own = self.products.of_some_rows(slot, k, self.warpgroup * each, each)
        return own, self.products.of_some_rows(slot, k, 2 * each, each)

    def _step(
        self, k: jax.Array, sums: Any, of_w: Any, slot: jax.Array, following: jax.Array, more: Any
    ) -> tuple[Any, Any]:
        """As that of other tiles."""
        each = self.products.shape.wm
        plgpu.barrier_wait(self.refs.full.at[slot])

        def scope(*partial):
            for sum_, operands in zip(partial, self._operands(slot), strict=True):
                plgpu.wgmma(sum_, *operands)
            scales = self._beside_product(k, slot, following, more)
            return [product[...] for product in partial], scales

        kind: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
        likes = [kind((each, columns), _F32) for columns in (2 * each, each)]
        (first, second), (of_x, of_w) = pl.run_scoped(scope, *likes)
        self.products.leave(slot)
        parts = (first[:, :each], of_x[0]), (first[:, each:], of_x[0]), (second, of_x[1])
        found = [
            self.products.add(total, part, scale, of_w[0])
            for total, (part, scale) in zip(sums, parts, strict=True)
        ]
        return tuple(found), ()
