"""The kernel of a product whose rows are pairs, and of the weighted sum of each token's rows.

A tile is some columns of one token's result. Its loop over k runs through the token's pairs: through the
weights of each one's expert, and its row of x. Behind a pair, what its products made is multiplied by its
weight and added to the tile's sums, in registers; no row of the products is written to memory. One
warpgroup loads, and one multiplies: the weights are wgmma's first operand, rows of x its second. Where
tiles of 64 columns are few, two or four pairs are multiplied together, of 32 or 16 columns each:

    64 rows of weights:   16 columns of pair 0 | 16 of pair 1 | 16 of pair 2 | 16 of pair 3
    8 rows of x:          those of pairs 0, 1, 2, 3, and four that hold anything

Of the 64 x 8 sums, those of a pair's rows and its own column are used. The others may be NaN.

Reads the weights of the experts hit once for each pair, and x once for each tile of columns. Nothing is
atomic, and the order of each sum is fixed: the same bits in every run. Needs sm_90a: wgmma, TMA.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul import inline_sums, memory
from moe_align_jax._grouped_matmul.problem import TokenSum
from moe_align_jax._grouped_matmul.products import accumulator
from moe_align_jax._grouped_matmul.token_sum_config import (
    WEIGHT_ROWS,
    X_ROWS,
    Tiles,
    config_for,
    refused,
)

_I32, _F32 = jnp.int32, jnp.float32
_WIDTH = 64  # columns of 128 bytes


class _Refs(NamedTuple):
    """The kernel's refs by name.

    Attributes:
        experts: `[T K]` int32, of each pair.
        shares: `[T K]` float32, the pairs' weights.
        bias: `[E, n]` float32, or None.
        x, w, out: operands and result.
        x_tiles, x_rows: the ring's rows of x for wgmma and for TMA: the same memory.
        w_tiles: the ring's weights.
        sums: `[64]` float32, where warps meet; None in the interpreter.
        full, empty: barriers of the ring.
    """

    experts: Any
    shares: Any
    bias: Any
    x: Any
    w: Any
    out: Any
    x_tiles: Any
    x_rows: Any
    w_tiles: Any
    sums: Any
    full: Any
    empty: Any


def _refs(problem: TokenSum, given: Sequence[Any], interpret: bool) -> _Refs:
    """The kernel's refs, which come in the order of operands, results and scratch memory."""
    rest = iter(given)
    experts, shares = next(rest), next(rest)
    bias = next(rest) if problem.product.weights.bias else None
    x, w, out, tiles = (next(rest) for _ in range(4))
    x_tiles, x_rows = (tiles, tiles) if interpret else tiles
    w_tiles, full, empty = (next(rest) for _ in range(3))
    sums = None if interpret else next(rest)
    return _Refs(experts, shares, bias, x, w, out, x_tiles, x_rows, w_tiles, sums, full, empty)


class _Sizes(NamedTuple):
    """What follows from a problem and its tiles.

    Attributes:
        n_tiles: tiles of a token's columns.
        count: tiles of all tokens.
        ctas: of the grid.
        groups: of a token's pairs, those that are multiplied together.
        k_steps: steps over k of a group.
        k_parts: parts of a step, each of 64 columns of x.
    """

    n_tiles: int
    count: int
    ctas: int
    groups: int
    k_steps: int
    k_parts: int


def _sizes_of(problem: TokenSum, tiles: Tiles) -> _Sizes:
    """The sizes that follow from a problem and its tiles."""
    n_tiles = -(-problem.product.n // tiles.columns)
    count = problem.num_tokens * n_tiles
    return _Sizes(
        n_tiles=n_tiles,
        count=count,
        ctas=min(tiles.num_ctas, count),
        groups=-(-problem.top_k // tiles.pairs),
        k_steps=-(-problem.product.k // tiles.bk),
        k_parts=tiles.bk // _WIDTH,
    )


def build(problem: TokenSum, tiles: Tiles, *, interpret: bool = False) -> Callable[..., jax.Array]:
    """The kernel as a function of expert_ids `[T K]`, topk_weights `[T K]`, bias if there is one, x and w."""
    if reason := refused(problem, tiles):
        raise ValueError(f"tiles {tiles.name}: {reason}")
    sizes, stages, dtype = _sizes_of(problem, tiles), tiles.stages, jnp.dtype(problem.product.dtype)

    def body(*given):
        refs = _refs(problem, given, interpret)
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        loops = _Loops(problem, tiles, sizes, refs, cta, interpret)
        lax.cond(warpgroup < 1, loops.compute, loops.load)

    transposed = problem.product.weights.transposed
    w_tile = (WEIGHT_ROWS, tiles.bk) if transposed else (tiles.bk, WEIGHT_ROWS)
    options: dict[str, Any] = {"interpret": plgpu.InterpretGPUParams()} if interpret else {}
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(problem.out_shape, jnp.dtype(problem.out_dtype)),
        scratch_types=[
            memory.views((stages, sizes.k_parts, X_ROWS, _WIDTH), dtype, interpret),
            plgpu.SMEM((stages, *w_tile), dtype, transforms=memory.transforms(w_tile[1], dtype)),
            plgpu.Barrier(num_arrivals=sizes.k_parts + tiles.pairs, num_barriers=stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            *([] if interpret else [plgpu.SMEM((WEIGHT_ROWS,), _F32)]),
        ],
        grid=(sizes.ctas,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="grouped_matmul_token_sum",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **options,
    )


class _Loops:
    """The loops of a CTA's two warpgroups over its tiles, and over the groups of each tile's token.

    `ring` counts the steps of the ring before a group's.
    """

    def __init__(
        self,
        problem: TokenSum,
        tiles: Tiles,
        sizes: _Sizes,
        refs: _Refs,
        cta: jax.Array,
        interpret: bool,
    ):
        self.problem, self.tiles, self.sizes, self.refs = problem, tiles, sizes, refs
        self.cta, self.interpret = cta, interpret
        self.mine = lax.div(sizes.count - cta + (sizes.ctas - 1), _I32(sizes.ctas))

    # -- the warpgroup that multiplies

    def compute(self) -> None:
        """Adds up the products of each tile's pairs, and stores the sums."""
        for stage in range(self.tiles.stages):
            plgpu.barrier_arrive(self.refs.empty.at[stage])
        lax.fori_loop(0, self.mine, self._sum_tile, _I32(0))

    def _sum_tile(self, i: jax.Array, ring: jax.Array) -> jax.Array:
        """The i-th tile; gives the next one's `ring`."""
        refs, interpret = self.refs, self.interpret
        token, n = self._place(i)

        def add(group, carry):
            ring, total = carry

            def added():
                return inline_sums.add(
                    *(total, self._products(ring), group, refs.bias, n),
                    columns=self.tiles.columns,
                    interpret=interpret,
                )

            total = lax.cond(group.some, added, lambda: total)
            return ring + self._steps(group), total

        zeros = jnp.zeros((WEIGHT_ROWS, X_ROWS), _F32)
        if not interpret:
            zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        ring, total = self._over_groups(token, add, (ring, zeros))
        inline_sums.store(
            *(refs.out, refs.sums, total, token, n), pairs=self.tiles.pairs, interpret=interpret
        )
        return ring

    def _products(self, ring: jax.Array) -> jax.Array:
        """Of a group, complete."""
        refs, stages = self.refs, self.tiles.stages
        k_steps, k_parts = self.sizes.k_steps, self.sizes.k_parts
        transposed = self.problem.product.weights.transposed

        def scope(acc):
            def step(k, _):
                slot = self._slot_of(ring + k)
                plgpu.barrier_wait(refs.full.at[slot])
                for part in range(k_parts):
                    plgpu.wgmma(acc, *_operands(refs, slot, part, transposed))
                # All but this step's are done, so that their stage can be loaded again.
                plgpu.wgmma_wait(k_parts)

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_arrive(refs.empty.at[self._slot_of(ring + k + stages - 1)])

                return ()

            lax.fori_loop(0, k_steps, step, ())
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(refs.empty.at[self._slot_of(ring + (k_steps + stages - 1))])
            return acc[...]

        return pl.run_scoped(scope, accumulator((WEIGHT_ROWS, X_ROWS), _F32))

    # -- the warpgroup that loads

    def load(self) -> None:
        """Fills the ring, until the other warpgroup has left the last stage."""
        end = lax.fori_loop(0, self.mine, self._load_tile, _I32(0))
        # No barrier is left in the midst of a phase.
        for stage in range(self.tiles.stages):
            plgpu.barrier_wait(self.refs.empty.at[self._slot_of(end + stage)])

    def _load_tile(self, i: jax.Array, ring: jax.Array) -> jax.Array:
        """The i-th tile; gives the next one's `ring`."""
        token, n = self._place(i)

        def ask(group, ring):
            def step(k, _):
                slot = self._slot_of(ring + k)
                plgpu.barrier_wait(self.refs.empty.at[slot])
                _ask(self.problem, self.tiles, self.refs, group, n, slot, k)
                return ()

            steps = self._steps(group)
            lax.fori_loop(0, steps, step, ())
            return ring + steps

        return self._over_groups(token, ask, ring)

    # -- what both do

    def _place(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(Token, n tile) of this CTA's i-th tile."""
        n_tiles, ctas = self.sizes.n_tiles, self.sizes.ctas
        token = lax.div(self.cta + i * ctas, _I32(n_tiles))
        return token, self.cta + i * ctas - token * n_tiles

    def _slot_of(self, step: jax.Array) -> jax.Array:
        """The stage of a step of the ring."""
        return lax.rem(step, _I32(self.tiles.stages))

    def _steps(self, group: inline_sums.Group) -> jax.Array:
        """Steps of the ring that a group takes: none if no pair of it is there."""
        return jnp.where(group.some, _I32(self.sizes.k_steps), 0)

    def _over_groups(
        self, token: jax.Array, step: Callable[[inline_sums.Group, Any], Any], first: Any
    ) -> Any:
        """`step(group, carry)` for each group of a token; what the next one is, is read ahead."""

        def one(j, given):
            carry, *known = given
            following = self._read(token, j + 1)
            return step(self._group_of(token, j, *known), carry), *following

        return lax.fori_loop(0, self.sizes.groups, one, (first, *self._read(token, 0)))[0]

    def _read(self, token: jax.Array, j: Any) -> tuple[tuple[jax.Array, ...], ...]:
        """What memory tells of a token's j-th group: experts and weights; behind the last, anything."""
        top_k, together = self.problem.top_k, self.tiles.pairs
        last = _I32(self.problem.num_tokens * top_k - 1)
        pairs = [jnp.minimum(token * top_k + j * together + b, last) for b in range(together)]
        return tuple(self.refs.experts[p] for p in pairs), tuple(self.refs.shares[p] for p in pairs)

    def _group_of(
        self,
        token: jax.Array,
        j: jax.Array,
        experts: tuple[jax.Array, ...],
        shares: tuple[jax.Array, ...],
    ) -> inline_sums.Group:
        """A token's j-th group, of what `_read` gave."""
        top_k, together, there = self.problem.top_k, self.tiles.pairs, []
        for b, expert in enumerate(experts):
            is_one = (expert >= 0) & (expert < self.problem.product.num_experts)
            if top_k % together:
                is_one = is_one & (j * together + b < top_k)
            there.append(is_one)
        return inline_sums.Group(token * top_k + j * together, experts, shares, tuple(there))


def _ask(
    problem: TokenSum,
    tiles: Tiles,
    refs: _Refs,
    group: inline_sums.Group,
    n: jax.Array,
    slot: jax.Array,
    k: jax.Array,
) -> None:
    """Asks TMA for step k of a group: weights of each of its pairs, and their rows of x.

    Of a pair that is not there only the arrival is made: what the slot holds in its place is not used.
    """
    barrier, columns = refs.full.at[slot], tiles.columns
    ks, ns = pl.ds(k * tiles.bk, tiles.bk), pl.ds(n * columns, columns)
    for b, expert in enumerate(group.experts):
        if problem.product.weights.transposed:
            source = refs.w.at[expert, ns, ks]
            target = refs.w_tiles.at[slot, pl.ds(b * columns, columns)]
        else:
            source, target = refs.w.at[expert, ks, ns], refs.w_tiles.at[slot]
        copy = functools.partial(plgpu.copy_gmem_to_smem, source, target, barrier)
        if tiles.pairs == 1:
            copy()
            continue
        lax.cond(group.there[b], copy, lambda: plgpu.barrier_arrive(barrier))
    for part in range(tiles.bk // _WIDTH):
        ks = pl.ds(k * tiles.bk + part * _WIDTH, _WIDTH)
        source = refs.x.at[pl.ds(group.pair, tiles.pairs), ks]
        target = refs.x_rows.at[slot, part, pl.ds(0, tiles.pairs)]
        plgpu.copy_gmem_to_smem(source, target, barrier)


def _operands(refs: _Refs, slot: jax.Array, part: int, transposed: bool) -> tuple[Any, Any]:
    """wgmma's two, for 64 columns of x."""
    x, ks = refs.x_tiles.at[slot, part], pl.ds(_WIDTH * part, _WIDTH)
    if transposed:
        return refs.w_tiles.at[slot, :, ks], x.transpose((1, 0))
    return refs.w_tiles.at[slot, ks].transpose((1, 0)), x.transpose((1, 0))


def run(
    problem: TokenSum,
    *operands: jax.Array,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> jax.Array:
    """`[T, n]` of `problem.inputs`, by the kernel; `tiles`: None for the usual ones."""
    named = dict(zip(problem.inputs, operands, strict=True))
    if tiles is None:
        tiles = config_for(problem)
        assert tiles
        if interpret:  # which runs a thread for each warpgroup
            tiles = tiles._replace(num_ctas=2)
    named["topk_weights"] = named["topk_weights"].reshape(-1)
    names = [name for name in ("expert_ids", "topk_weights", "bias", "x", "w") if name in named]
    with jax.enable_x64(False):  # its indices are int32; plgpu makes 64-bit ones otherwise
        return build(problem, tiles, interpret=interpret)(*[named[name] for name in names])
