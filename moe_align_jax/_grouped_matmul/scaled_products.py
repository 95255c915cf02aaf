"""What a warpgroup multiplies where operands are e4m3 with scales: sums of two levels.

wgmma's own sums of e4m3 keep about 14 bits. So each step of the ring, 128 columns of x, gets an accumulator
of its own, which is scaled into float32 registers: `sum + partial * (scale of the row * scale of the block)`.

Where gate and up are multiplied, a warpgroup has 64 columns of each, with scales of their own.
"""

from collections.abc import Callable
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


def memory(problem: MatmulProblem, config: Config) -> Any:
    """Scales of a tile's rows for each stage, in shared memory."""
    assert problem.scales
    rows = -(-config.bm // _LEAST_ROWS) * _LEAST_ROWS
    return plgpu.SMEM((config.stages, rows), _I32 if problem.scales.packed else _F32)


def sums_of(problem: MatmulProblem, config: Config, shape: Shape) -> int:
    """How many scales the weights of a warpgroup's tile have, in a step."""
    if problem.weights.gated:
        return 2
    # Sums side by side, each of columns that share a scale: a tile of 192 columns has parts of 3 blocks.
    parted = config.form != "swap" and shape.wn % GROUP and shape.wn > E4M3_COLUMNS
    return shape.wn // E4M3_COLUMNS if parted else 1


def weights_memory(problem: MatmulProblem, config: Config, shape: Shape) -> Any:
    """Scales of the weights of two tiles, this one and the next, for each warpgroup, in shared memory."""
    sums = sums_of(problem, config, shape)
    groups = -(-problem.scale_groups // _LEAST_ROWS) * _LEAST_ROWS
    return plgpu.SMEM((owners_of(config), 2, sums, groups), _F32)


def owners_of(config: Config) -> int:
    """Warpgroups that have scales of the weights for themselves; 1 where they share them."""
    return 1 if config.form == "m" else config.computing


class Products:
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
        slot_of: Callable[[jax.Array], jax.Array],
        between: Callable[[jax.Array], None],
        place: jax.Array | None = None,
        before: jax.Array | int = 0,
    ) -> list[jax.Array]:
        """The warpgroup's sums: gate and up, or one.

        Args:
            tile: rows and columns.
            warpgroup: which one this is.
            ring: steps of the ring before this tile's.
            slot_of: the stage of a step.
            between: called while a product of step k runs.
            place: which of the two rows of scales in shared memory `fetch` wrote for this tile; None where
                the scales are read from global memory.
            before: steps of the tile's K before this CTA's, where several share it.
        """
        refs, last = self.refs, self.shape.k_steps - 1
        if self.scales.w == "tensor":  # one for all steps
            place = None
        count = self.shape.wm // 64 if self.swap else 1  # accumulators, one after the other
        like = plgpu.ACC((64, self.shape.wn), _F32)  # pyright: ignore[reportPrivateImportUsage]
        of_all = None
        if self.scales.x == "tensor":
            of_all = refs.x_scales[0]

        early, steps = self.config.early, self.shape.k_steps
        # Both stages of a turn follow each other: each tile begins at an even one.
        paired = self.config.paired and steps % 2 == 0 and self.config.stages % 2 == 0
        # Whether the scales of the weights are read in the step itself, behind its product.
        in_step = place is not None and (not early or paired)

        def more_of_w(k):
            """Of the weights in step k."""
            if place is None:
                return self._of_blocks(tile, warpgroup, before + k)
            return self._fetched(warpgroup, place, k)

        def one(k, sums, of_w, slot, following, more):
            """Step k, in stage `slot`; `more`: whether there is another, which is in stage `following`."""
            if not early:
                plgpu.barrier_wait(refs.full.at[slot])
            found, of_x, coming = list(sums), None, of_w
            for part in range(count):

                def scope(partial, part=part):
                    plgpu.wgmma(partial, *self._operands(warpgroup, slot, part))
                    scales = ()
                    if part == 0:  # behind the product that runs
                        between(k)
                        of_x = None
                        if of_all is None:
                            of_x = self._of_rows(warpgroup, slot, before + k)
                        of_next = more_of_w(k if in_step else jnp.minimum(k + 1, last))
                        scales = (of_x, of_next)
                        if early:
                            pl.when(more)(lambda: plgpu.barrier_wait(refs.full.at[following]))
                    return partial[...], scales

                product, scales = pl.run_scoped(scope, like)
                if part == 0:
                    of_x, coming = scales
                    if in_step:
                        of_w, coming = coming, ()
                if part == count - 1:
                    self._leave(slot)
                for i, piece in self._pieces(product, part):
                    scale = of_w[i] if of_all is None else of_w[i] * of_all
                    found[i] = self._add(found[i], piece, of_x, scale)
            return tuple(found), coming

        def step(k, carry):
            # The next step's stage is found while this one's product runs.
            sums, of_w, slot = carry
            following = jnp.where(slot == self.config.stages - 1, 0, slot + 1)
            return *one(k, sums, of_w, slot, following, k < last), following

        def two(i, carry):
            """Two steps: where the second one's operands lie is found beside the sums of the first."""
            sums, of_w, slot = carry
            following = jnp.where(slot == self.config.stages - 2, 0, slot + 2)
            sums, of_w = one(2 * i, sums, of_w, slot, slot + 1, True)
            more = i < steps // 2 - 1
            return *one(2 * i + 1, sums, of_w, slot + 1, following, more), following

        def pass_on(k):
            slot = slot_of(ring + k)
            plgpu.barrier_wait(refs.full.at[slot])
            between(k)
            self._leave(slot)

        all_steps, mine = _I32(steps), tile.valid
        if self.config.skips:
            mine = mine & self._holds_rows(tile, warpgroup)
        of_turn, turn = (2, two) if paired else (1, step)
        passes = self.config.skips or self.config.shares_weights

        def pass_all():
            busy = tile.busy if self.config.shares_weights else tile.valid
            others = busy & jnp.logical_not(mine)
            passed = jnp.where(others, all_steps, 0)
            inline.loop(passed, pass_on, interpret=self.interpret)

        def begin(sums):
            return sums, () if in_step else more_of_w(0), slot_of(ring)

        if early:  # of the first step; of the next ones each behind the product before it
            pl.when(mine)(lambda: plgpu.barrier_wait(refs.full.at[slot_of(ring)]))
        if self.config.peeled:

            def run():
                none = (None,) * len(self._shapes())
                carry = turn(_I32(0), begin(none))
                turns = inline.hidden(_I32(steps // of_turn), interpret=self.interpret)
                return lax.fori_loop(1, turns, turn, carry)[0]

            def other():
                if passes:
                    pass_all()
                return tuple(self._zeros(shape) for shape in self._shapes())

            return list(lax.cond(mine, run, other))
        zeros = tuple(self._zeros(shape) for shape in self._shapes())
        turns = jnp.where(mine, _I32(steps // of_turn), 0)
        sums, *_ = lax.fori_loop(0, turns, turn, begin(zeros))
        if passes:
            pass_all()
        return list(sums)

    def _leave(self, slot: jax.Array) -> None:
        """This warpgroup has read a stage: it can be loaded again.

        In a cluster one thread says so for its warpgroup (Mosaic's collective barriers), and the other warps
        may be behind it: they must have read their scales, and seen the stage, before. Otherwise every
        thread says so itself.
        """
        if self.config.sharing > 1:
            inline.meet_warpgroup(interpret=self.interpret)
        plgpu.barrier_arrive(self.refs.empty.at[slot])

    def _holds_rows(self, tile: Any, warpgroup: jax.Array) -> jax.Array:
        """Whether any of this warpgroup's rows are in use: the first of them, if any is."""
        if tile.holds is not None:
            return (warpgroup == 0) | tile.holds
        return tile.row + warpgroup * self.shape.wm < tile.used

    # -- products

    def _operands(self, warpgroup: jax.Array, slot: jax.Array, part: int) -> tuple[Any, Any]:
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

    def _shapes(self) -> list[tuple[int, int]]:
        """Of the sums."""
        if self.swap:
            return [(64, self.shape.wn)] * (self.shape.wm // 64)
        if self.gated:
            return [(64, self.shape.wn // 2)] * 2
        return [(64, self.shape.wn // self.beside)] * self.beside

    def _pieces(self, product: jax.Array, part: int) -> list[tuple[int, jax.Array]]:
        """(Which sum, what is added to it) of accumulator `part`."""
        if self.swap or (not self.gated and self.beside == 1):
            return [(part, product)]
        count = 2 if self.gated else self.beside
        width = self.shape.wn // count
        return [(i, product[:, i * width : (i + 1) * width]) for i in range(count)]

    def _zeros(self, shape: tuple[int, int]) -> jax.Array:
        """Float32 zeros as a warpgroup holds its sums."""
        zeros = jnp.zeros(shape, _F32)
        return zeros if self.interpret else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)

    def _add(
        self, total: jax.Array | None, piece: jax.Array, of_x: jax.Array | None, of_w: jax.Array
    ) -> jax.Array:
        """One multiplication and addition for each value: ptxas makes an FFMA of them. No `total` is 0."""
        scale: Any = of_w
        if of_x is not None:
            axis = 1 if self.swap else 0
            scale = lax.broadcast_in_dim(of_x * of_w, piece.shape, (axis,))
        return piece * scale if total is None else total + piece * scale

    # -- scales

    def _of_rows(self, warpgroup: jax.Array, slot: jax.Array, k: jax.Array) -> jax.Array:
        """float32 of this warpgroup's rows of x."""
        first: Any = 0
        count = self.config.bm
        if self.config.form == "m":
            first, count = warpgroup * self.shape.wm, self.shape.wm
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

    def _fetched(
        self, warpgroup: jax.Array, place: jax.Array, k: jax.Array
    ) -> tuple[jax.Array, ...]:
        """The weights' scales of step k in a slot: one for each of the warpgroup's sums."""
        count = sums_of(self.problem, self.config, self.shape)
        owner = self._owner(warpgroup)
        return tuple(self.refs.w_scale_rows[owner, place, i, k] for i in range(count))

    def _owner(self, warpgroup: Any) -> Any:
        """Where the scales of a warpgroup's weights are."""
        return 0 if owners_of(self.config) == 1 else warpgroup

    def _of_blocks(
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
            ref = refs.w_scales[i if weights.pair else 0]
            first = column
            if not self.gated:
                first = column + i * E4M3_COLUMNS
            elif weights.interleaved:
                first = 2 * column
            elif i and not weights.pair:
                first = column + problem.n
            # A tile may have columns that there are none of.
            block = jnp.minimum(lax.div(first, _I32(GROUP)), ref.shape[1] - 1)
            found.append((ref, expert, block))
        return found
