"""The kernel of the grouped matrix multiplication, in Pallas Mosaic GPU.

A persistent CTA has two warpgroups that multiply and one that loads. They share a ring of stages in shared
memory, each with bk columns of a tile of x and of the weights, that runs on from tile to tile: the next tile
is loaded while the last is stored. Whose weights each tile uses is read on the device, and how many tiles
there are, unless all rows are known to be in use (`MatmulProblem.all_rows`).

    form "m":     each warpgroup multiplies half of the tile's rows with all of its columns;
    form "n":     all rows, half of the columns;
    form "swap":  the weights are wgmma's first operand, so that rows of x, its second, may be as few as 8.

A `late` tile stays in registers, rounded, and is stored in pieces between the products of the next one.

Where tiles are fewer than SMs, a cluster of CTAs shares each of them: every CTA has a part of k (`split`),
and the first one adds the parts up, in order (cluster_sum.py).

Reads each tile of x once per n tile, and weights once per tile of rows (from L2 where neighbours share them);
writes the rows of tiles in use. Nothing is atomic: the same bits in every run. Needs sm_90a: wgmma, TMA.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul import (
    epilogue,
    found_cut,
    found_groups,
    found_masked,
    inline,
    inline_rows,
    inline_scales,
    inline_stores,
    inline_wgmma,
    loads,
    scaled_products,
)
from moe_align_jax._grouped_matmul.cluster_sum import AXIS, ClusterSum
from moe_align_jax._grouped_matmul.config import Config, refused
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._grouped_matmul.shape import Shape, has_scale_rows, shape_of
from moe_align_jax._lowering.launch_value import launch_value

_I32, _F32 = jnp.int32, jnp.float32
accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
# Registers of a thread that loads, and of one that multiplies, without cp.async and with it; by how many
# warpgroups multiply.
_REGISTERS = {
    1: {False: (0, 0), True: (0, 0)},  # there are enough for both
    2: {False: (40, 232), True: (56, 224)},
    3: {False: (32, 160), True: (56, 152)},
}


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


class Mixing(NamedTuple):
    """Two parts of the tiles of rows, or of whole groups of them, which are taken in turns; see `mixed`.

    Attributes:
        small: of the small part; 0: all keep their order.
        large_from, small_from: the first of either part.
        units: of both parts.
    """

    small: jax.Array
    large_from: jax.Array
    small_from: jax.Array
    units: jax.Array


class _Refs:
    """The kernel's refs by name."""

    def __init__(
        self,
        problem: MatmulProblem,
        shape: Shape,
        refs: list[Any],
        interpret: bool,
        sized_at_launch: bool,
        config: Config,
        ending: "Ending | None" = None,
    ):
        split = config.split
        bound = launch_value(refs.pop(0)) if sized_at_launch else None
        self.more = [refs.pop(0) for _ in range(ending.inputs if ending else 0)]
        by_expert = config.finds and not config.cuts
        by_group = config.cuts and problem.rows == "ragged"
        self.sizes, self.offset = (
            (refs.pop(0), refs.pop(0)) if by_group else cast(tuple[Any, Any], (None, None))
        )
        self.masked_m: Any = refs.pop(0) if by_expert else None
        known = by_expert or by_group
        self.count: Any = None if problem.row_labels or known else refs.pop(0)
        self.experts: Any = None if known else refs.pop(0)
        listed: tuple[Any, Any] = (None, None)
        if not shape.parts and not config.finds:
            listed = refs.pop(0), refs.pop(0)
        self.starts, self.ends = listed
        more: tuple[Any, Any, Any] = (None, None, None)
        if config.heights and not config.finds:
            more = refs.pop(0), refs.pop(0), refs.pop(0)
        self.pairs, self.padding, self.behind = more
        self.ids: Any = refs.pop(0) if shape.reads_ids else None
        row_weights = refs.pop(0) if problem.row_weights else None
        bias = refs.pop(0) if problem.weights.bias else None
        self.x_scales: Any = refs.pop(0) if problem.scales else None
        self.w_scales = (
            [refs.pop(0) for _ in range(1 + problem.weights.pair)] if problem.scales else []
        )
        self.x = refs.pop(0)
        self.weights = [refs.pop(0) for _ in range(1 + problem.weights.pair)]
        self.shared: Any = refs.pop() if split > 1 else None  # barriers of the cluster
        self.told: Any = None
        if config.heights or config.ahead:
            read, told, words = refs.pop(), refs.pop(), refs.pop()
            self.told = found_cut.Told(words, told, read)
        self.empty, self.full = refs.pop(), refs.pop()
        if ending:
            self.more += [refs.pop(0) for _ in ending.outputs]
        self.parts: Any = None
        if split > 1:  # the interpreter's CTAs have no memory in common but global memory
            self.parts = refs.pop(1 if interpret else -1)
        self.w_scale_rows: Any = refs.pop() if config.ahead else None
        self.scale_rows = refs.pop() if has_scale_rows(problem) else None
        self.out, x_tiles, self.w_tiles, o_tiles = refs
        # The same memory, for wgmma and for TMA: see `views`.
        self.x_tiles, self.x_rows = (x_tiles, x_tiles) if interpret else x_tiles
        self.o_tiles, self.o_rows = (o_tiles, o_tiles) if interpret else o_tiles
        self.vectors = epilogue.Vectors(self.ids, row_weights, bias, bound)


def transforms(columns: int, dtype: Any, rows: int = 8) -> tuple[Any, ...]:
    """Of a tile in shared memory with so many columns, as wgmma and TMA want it."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * size * 8)
    kinds: Any = plgpu
    return kinds.TilingTransform((rows, swizzle // size)), kinds.SwizzleTransform(swizzle)


def views(shape: tuple[int, ...], dtype: Any, interpret: bool) -> Any:
    """Tiles with rows of 128 bytes, in tiles of 8 rows as wgmma and registers want them, and by single rows.

    The bytes are the same. TMA copies from any row on by the second, only from every eighth by the first, and
    from arrays whose rows are a multiple of 8. The interpreter has no use for two views, and no memory for
    them in common.
    """
    tiles = plgpu.SMEM(shape, dtype, transforms=transforms(shape[-1], dtype))
    if interpret:
        return tiles
    return plgpu.RefUnion(
        tiles, plgpu.SMEM(shape, dtype, transforms=transforms(shape[-1], dtype, 1))
    )


class Ending(NamedTuple):
    """What becomes of a tile's sums, in place of the epilogue.

    Attributes:
        name: of the kernel.
        inputs: operands that stand in front of the problem's.
        outputs: results that stand in front of the problem's.
        piece: columns that are stored at a time.
        slots: such pieces in shared memory, per warpgroup.
        finish: called with (refs, sums, tile, place of the warpgroup's part, warpgroup). `refs.more` holds
            inputs and outputs. It stores through `refs.o_tiles`.
    """

    name: str
    inputs: int
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    piece: int
    slots: int
    finish: Callable[..., None]


def build(
    problem: MatmulProblem,
    config: Config,
    *,
    interpret: bool = False,
    sized_at_launch: bool = False,
    ending: Ending | None = None,
) -> Callable[..., Any]:
    """The kernel as a function of the operands that `launch` gives it, in this order:

    num_tokens_post_padded `[1]` and expert_ids `[B]` (the latter alone with `row_labels`), or count `[1]`
    and expert, start and end of each tile (with `heights` also pairs, empty and behind), or, with
    `Config.finds`, masked_m `[e]` or group_sizes `[G]` and group_offset `[1]`; sorted_token_ids,
    row_weights, bias, scales of x and of each array of weights, those that there are; x; the weights, one
    array or two.
    With an `ending`, for tiles neither late nor shared, its operands come first, and its results are returned
    before the problem's.

    `sized_at_launch`: for a launch outside XLA, of "blocks". The problem's rows and tokens are the most that
    a launch has. What it has of pairs (of rows, where x is not gathered) rides in the place of a first
    operand's pointer, times 256, and descriptors are made of its rows.
    """
    if reason := refused(problem, config):
        raise ValueError(f"tiles {config.name}: {reason}")
    if sized_at_launch and problem.in_order:
        raise ValueError("a launch that says its rows has sorted_token_ids")
    shape, weights = shape_of(problem, config), problem.weights
    if ending:
        shape = shape._replace(piece=ending.piece)
    stages, bm, bn, bk = config.stages, config.bm, config.bn, config.bk
    dtype, out_dtype = jnp.dtype(problem.dtype), jnp.dtype(problem.out_dtype)
    swap = config.form == "swap"
    slots = ending.slots if ending else _slots(config, shape)
    w_tile = (bn, bk) if weights.transposed else (bk, bn // shape.w_parts)
    w_like, o_like = transforms(w_tile[1], dtype), transforms(shape.piece, out_dtype)
    by_copies = shape.x_by_rows or shape.w_by_rows or shape.scales_by_rows
    computing, x_width = config.computing, bk // shape.k_parts
    if by_copies and config.lag > stages - 2:
        raise ValueError(
            f"a ring of {stages} stages would wait for itself, {config.lag} steps behind"
        )
    # Many experts' loads take registers of the loader; small tiles leave enough.
    more = by_copies or config.finds and swap and not config.cuts
    memory_registers, compute_registers = _REGISTERS[computing][more]
    loader = loads.Loader(problem, config, shape, transforms(x_width, dtype), w_like, interpret)
    ranks, sharing = config.split, max(1, config.sharing)
    clusters = config.num_ctas // (ranks * sharing)

    def body(*given):
        refs = _Refs(problem, shape, list(given), interpret, sized_at_launch, config, ending)
        full, empty = refs.full, refs.empty
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        rank = lax.axis_index(AXIS) if ranks > 1 or config.sharing else _I32(0)
        row_tiles = _row_tiles(problem, config, shape, refs, interpret)
        pairs = config.shares_weights
        n_tiles = shape.n_tiles if pairs else -(-shape.n_tiles // sharing)
        units = lax.div(row_tiles + (sharing - 1), _I32(sharing)) if pairs else row_tiles
        total = units * n_tiles
        by_unit = config.by_expert and config.finds
        if by_unit:
            total = _found_unit(problem, config, shape, refs, _I32(0), interpret)[-1]
            mine = found_masked.units_for(total, cta, clusters)
        else:
            mine = jnp.maximum(lax.div(total - cta + (clusters - 1), _I32(clusters)), 0)

        def order(i, how=None):
            """(Tile of rows, n tile) of the i-th tile of this CTA."""
            t = cta + i * clusters
            if config.by_expert:
                at, n = _in_expert(problem, config, refs, t, n_tiles)
            else:
                at, n = in_groups(config.group, t, units, n_tiles, how)
            if pairs:
                return at * sharing + rank, n
            return at, n * sharing + rank if sharing > 1 else n

        def read(at):
            """What memory tells about a tile of rows, and about that of the other CTA."""
            if not pairs:
                return _read(problem, config, shape, refs, at, row_tiles, interpret)
            last = jnp.maximum(row_tiles - 1, 0)
            given = problem, config, shape, refs
            other = _read(*given, jnp.minimum(at ^ 1, last), row_tiles, interpret)
            return *_read(*given, jnp.minimum(at, last), row_tiles, interpret), other[0]

        def told(i, before_none, how):
            """The i-th tile, which the warpgroup that loads finds or reads in the list, and tells the others.

            `before_none` is called ahead of telling a tile of no rows.
            """
            at, n = order(i, how)
            if config.cuts and problem.rows == "ragged":
                find = found_groups.find_plainly if interpret else found_groups.find
                known = tuple(find(problem, config, refs.sizes, refs.offset, at))
            elif config.cuts:
                find = found_cut.find_plainly if interpret else found_cut.find
                limit = jnp.maximum(_I32(epilogue.num_pairs(problem, refs.vectors)), 0)
                where = refs.experts, refs.ids, at, row_tiles, limit
                known = tuple(find(problem, config, *where))
            else:
                known = read(at)
            tile = _tile(problem, config, shape, refs, at, n, known)
            pl.when(jnp.logical_not(tile.valid))(before_none)
            refs.told.tell(i, tile.row, tile.end, tile.n, tile.pairs)
            return tile, jnp.where(tile.valid, _I32(shape.k_steps), 0)

        def tile_at(i):
            if config.heights:
                row, end, n, held = refs.told.hear(i, 4)
                tile = Tile(end > row, _I32(0), row, end, n, end, held)
                return tile, jnp.where(tile.valid, _I32(shape.k_steps), 0)
            if by_unit:
                at = found_masked.unit_in_turn(i, cta, clusters)
                unit = _found_unit(problem, config, shape, refs, at, interpret)
                return _tile_of_unit(problem, config, shape, unit, rank), _I32(shape.k_steps)
            at, n = order(i)
            known = read(at)
            if not pairs:
                tile = _tile(problem, config, shape, refs, at, n, known)
                return tile, jnp.where(tile.valid, _I32(shape.k_steps), 0)
            last = jnp.maximum(row_tiles - 1, 0)
            *known, other = known
            tile = _tile(problem, config, shape, refs, jnp.minimum(at, last), n, tuple(known))
            there = at < row_tiles
            valid = tile.valid & there
            peer = (other >= 0) & (other < problem.num_experts) & ((at ^ 1) < row_tiles)
            tile = tile._replace(
                valid=valid,
                expert=jnp.clip(tile.expert, 0, problem.num_experts - 1),
                there=there,
                busy=valid | peer,
                together=valid & peer & (tile.expert == other),
            )
            return tile, jnp.where(tile.busy, _I32(shape.k_steps), 0)

        scaled: Any = None
        if problem.scales:
            scaled = scaled_products.Products(problem, config, shape, refs, interpret)

        def tell(i, tile):
            """What the others must know of the i-th tile, and the scales of its weights."""
            flags = _I32(0)
            for place, flag in enumerate((tile.valid, tile.there, tile.busy, tile.holds)):
                if flag is not None:
                    flags = flags | (flag.astype(_I32) << place)
            words = [tile.row, tile.end, tile.n, tile.used, tile.expert, flags]
            if shape.tests_rows:
                limit = jnp.where(tile.valid, epilogue.num_pairs(problem, refs.vectors), 0)
                where = refs.ids, tile.row, _I32(limit)
                words.append(inline_rows.count_rows(*where, rows=bm, interpret=interpret))

            def scales(slot):
                for owner in range(scaled_products.owners_of(config)):
                    scaled.fetch(tile, _I32(owner), slot)
                inline_scales.await_groups(interpret=interpret)

            refs.told.tell(i, *words, more=scales)

        def hear(i):
            """The i-th tile, and its steps."""
            words = refs.told.hear(i, 6 + shape.tests_rows, keep=True)
            row, end, n, used, expert, flags, *held = words
            valid, there, busy, holds = ((flags & (1 << k)) != 0 for k in range(4))
            tile = Tile(valid, expert, row, end, n, used, *held)
            if pairs:
                tile = tile._replace(there=there, busy=busy)
            if config.skips and problem.rows == "blocks":
                tile = tile._replace(holds=holds)
            return tile, jnp.where(busy if pairs else valid, _I32(shape.k_steps), 0)

        def slot_of(step):
            return lax.rem(step, _I32(stages))

        def compute():
            if compute_registers:
                plgpu.set_max_registers(compute_registers, action="increase")
            for stage in range(stages):
                plgpu.barrier_arrive(empty.at[stage])
            if config.heights or config.ahead:
                refs.told.allow()
            store = _Store(problem, config, shape, refs, o_like, warpgroup, interpret)

            def multiply(tile, ring, between, place=None, rows=shape.wn):
                """The warpgroup's sums, in one accumulator or two; of a swapped tile's first `rows` rows."""
                if scaled:
                    before = rank * shape.k_steps if ranks > 1 else 0
                    return scaled(tile, warpgroup, ring, slot_of, between, place, before)

                def scope(*accumulators):
                    def step(k, _):
                        slot = slot_of(ring + k)
                        plgpu.barrier_wait(full.at[slot])
                        for part in range(shape.k_parts):
                            for a, acc in enumerate(accumulators):
                                operands = _operands(
                                    problem, config, shape, refs, warpgroup, slot, part, a, rows
                                )
                                plgpu.wgmma(acc, *operands)
                        between(k)
                        # All but this step's are done, so that their stage can be loaded again.
                        plgpu.wgmma_wait(shape.k_parts * len(accumulators))

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[slot_of(ring + k + stages - 1)])

                        return ()

                    # The wait belongs to the branch: where the paths with and without wgmma met ahead of
                    # it, ptxas moved conversions of the sums ahead of it (CUDA 13.0, a tile of 16 rows: wrong
                    # results that changed from run to run).
                    @pl.when(tile.valid)
                    def _():
                        lax.fori_loop(0, shape.k_steps, step, ())
                        plgpu.wgmma_wait(0)
                        last = ring + (shape.k_steps + stages - 1)
                        plgpu.barrier_arrive(empty.at[slot_of(last)])

                    return [acc[...] for acc in accumulators]

                like = accumulator((shape.wm, rows), _F32)
                return pl.run_scoped(scope, *[like] * shape.accumulators)

            def place(tile):
                """(First row, first column, end) of what this warpgroup has."""
                row, column = tile.row, tile.n * shape.columns
                if config.form == "m":
                    row = row + warpgroup * shape.wm
                else:
                    column = column + warpgroup * (shape.columns // computing)
                return row, column, tile.end

            def finish(sums, tile, at):
                here = epilogue.Place(tile.expert, tile.valid, at[0], at[1], swap)
                return epilogue.pieces(problem, shape, here, sums, refs.vectors, interpret)

            def now(i, ring):
                tile, steps = tile_at(i)
                some = _holds_pairs(problem, shape, refs, tile)
                sums, at = multiply(tile, ring, lambda k: None), place(tile)
                if ending:
                    ending.finish(refs, sums, tile, at, warpgroup)
                    return ring + steps
                for q, value in enumerate(finish(sums, tile, at)):
                    store(q, value, at, some=some)
                return ring + steps

            def by_height(tile, heights, of_height, otherwise):
                """One branch within the other: none needs a tile's height behind its products."""
                first, *others = heights
                if not others:
                    there = lambda: of_height(first)  # noqa: E731
                    return lax.cond(tile.end - tile.row != first, otherwise, there)
                # Mosaic lowers the second function twice, to learn the types of its results.
                return lax.cond(
                    tile.end - tile.row != first,
                    lambda: by_height(tile, others, of_height, otherwise),
                    lambda: of_height(first),
                )

            def of_height(tile, ring, between, rows):
                """The pieces of a tile of so many rows."""
                sums, at = multiply(tile, ring, between, rows=rows), place(tile)
                pairs = tile.pairs if shape.tests_rows else None
                here = epilogue.Place(tile.expert, tile.valid, at[0], at[1], swap, pairs)
                less = shape._replace(wn=rows)
                return epilogue.pieces(problem, less, here, sums, refs.vectors, interpret)

            def now_by_height(i, ring):
                tile, steps = tile_at(i)

                def store_all(rows):
                    for q, value in enumerate(of_height(tile, ring, lambda k: None, rows)):
                        store(q, value, place(tile), rows=value.shape[1])

                by_height(tile, config.heights, store_all, lambda: None)
                return ring + steps

            def later_by_height(i, carry):
                ring, held, at, pieces = carry  # `held`: rows of the tile that waits, or none
                tile, steps = tile_at(i)

                def put(q):
                    store(q, pieces[q], at, whole=True, height=held)

                def between(k):
                    for q in range(len(pieces)):
                        pl.when((k == q) & (held > 0))(lambda q=q: put(q))

                def kept(rows):
                    found = of_height(tile, ring, between, rows)
                    for q in range(shape.k_steps, len(pieces)):
                        pl.when(held > 0)(lambda q=q: put(q))
                    return [
                        inline_wgmma.widen(value, shape.piece_rows, interpret=interpret)
                        for value in found
                    ]

                def nothing():
                    for q in range(len(pieces)):
                        pl.when(held > 0)(lambda q=q: put(q))
                    return pieces

                value = by_height(tile, config.heights, kept, nothing)
                height, here = tile.end - tile.row, place(tile)
                if problem.rows != "ragged":
                    return ring + steps, height, here, value
                # A group's only tile, of more rows than the group, is stored at once.
                less = tile.pairs < height

                @pl.when(less)
                def _():
                    for q, piece in enumerate(value):
                        store(q, piece, (here[0], here[1], tile.row + tile.pairs))

                return ring + steps, jnp.where(less, 0, height), here, value

            def now_as_told(i, ring):
                tile, steps = hear(i)
                sums, at = multiply(tile, ring, lambda k: None, i & 1), place(tile)
                refs.told.done(i)
                plain = shape._replace(tests_rows=False)

                def store_all(held=None):
                    """Of the rows, `held` have a pair, and the others are zero; all are as they are."""
                    here = epilogue.Place(tile.expert, tile.valid, at[0], at[1], swap, held)
                    found = epilogue.pieces(problem, plain, here, sums, refs.vectors, interpret)
                    for q, value in enumerate(found):
                        store(q, value, at)

                def store_tile():
                    if not shape.tests_rows:
                        return store_all()
                    # In form "m" alone a warpgroup has rows of its own.
                    rows = shape.wn if swap else shape.wm
                    before = warpgroup * shape.wm if config.form == "m" else 0
                    held = tile.pairs - before
                    return lax.cond(held >= rows, store_all, lambda: store_all(held))

                pl.when(tile.there)(store_tile) if pairs else store_tile()
                return ring + steps

            def together(i, ring):
                """A tile of the cluster's: its first CTA stores it."""
                tile, steps = tile_at(i)
                sums, at = multiply(tile, ring, lambda k: None), place(tile)
                added = cluster_sum()
                added.put(sums)

                @pl.when(rank == 0)
                def _():
                    totals = added.take([part.shape for part in sums])
                    added.taken()
                    for q, value in enumerate(finish(totals, tile, at)):
                        store(q, value, at)

                pl.when(rank != 0)(added.taken)
                added.wait()
                return ring + steps

            def cluster_sum():
                mine = (cta, slice(None), warpgroup) if interpret else (warpgroup,)
                ready, free = (refs.shared.at[k * computing + warpgroup] for k in range(2))
                return ClusterSum(ranks, refs.parts.at[mine], ready, free, interpret)

            def later(i, carry):
                ring, waits, at, pieces = carry
                tile, steps = tile_at(i)

                def put(q):
                    store(q, pieces[q], at, whole=True)

                def between(k):
                    for q in range(len(pieces)):
                        pl.when((k == q) & (waits > 0))(lambda q=q: put(q))

                sums = multiply(tile, ring, between)
                for q in range(len(pieces)):
                    pl.when((steps <= q) & (waits > 0))(lambda q=q: put(q))
                here = place(tile)
                value = finish(sums, tile, here)
                if not shape.partial:
                    return ring + steps, _I32(1), here, value
                # Stored at once: single rows take registers that the next tile's products need.
                rows = shape.wn if swap else shape.wm  # swapped: a warpgroup has all of a tile's
                whole = here[0] + rows <= here[2]

                @pl.when(jnp.logical_not(whole))
                def _():
                    for q, piece in enumerate(value):
                        store(q, piece, here)

                return ring + steps, whole.astype(_I32), here, value

            if config.ahead or pairs:
                assert scaled and config.ahead and not (config.late or ending)
                assert not (pairs and shape.parts > 1 and shape.reads_ids)
                lax.fori_loop(0, mine, now_as_told, _I32(0))
            elif config.late and config.heights:
                none = epilogue.nothing(problem, shape, swap, interpret)
                zero = _I32(0)
                first = (zero, zero, (zero, zero, zero), none)
                _, held, at, pieces = lax.fori_loop(0, mine, later_by_height, first)

                @pl.when(held > 0)
                def _():
                    for q, value in enumerate(pieces):
                        store(q, value, at, whole=True, height=held)

            elif not config.late:
                usual = now_by_height if config.heights else now
                lax.fori_loop(0, mine, together if ranks > 1 else usual, _I32(0))
            else:
                none = epilogue.nothing(problem, shape, swap, interpret)
                zero = _I32(0)
                first = (zero, zero, (zero, zero, zero), none)
                _, waits, at, pieces = lax.fori_loop(0, mine, later, first)

                @pl.when(waits > 0)
                def _():
                    for q, value in enumerate(pieces):
                        store(q, value, at, whole=True)

            plgpu.wait_smem_to_gmem(0)

        def load():
            if memory_registers:
                plgpu.set_max_registers(memory_registers, action="decrease")

            def arrived(step, lag):
                """What was asked for `lag` steps before `step` is there."""
                plgpu.barrier_arrive(full.at[slot_of(step - lag + stages)])

            def all_arrived(ring, said):
                """What was asked for before step `ring` is there, of which steps before `said` were said."""
                inline.wait_for_copies(0, interpret=interpret)
                for lag in range(config.lag, 0, -1):
                    pl.when(ring - lag >= said)(lambda lag=lag: arrived(ring, lag))

            # One instruction in place of five, of about 50 for a step: masked products of 6 x 1024 rows took
            # 0.8% less, and of 32 x 192 rows 0.1 to 0.7% (H200, 2026-11-30, 04:57 and 05:09).
            masks = problem.rows == "masked" and config.ahead and not stages & (stages - 1)
            how = None
            if config.mixes:
                how = mixing(config.group, refs.experts, problem.num_experts, row_tiles)

            def one(i, carry):
                ring, said = carry
                if config.heights:
                    # The others would wait for a tile's last steps, of which the next tile's steps say that
                    # they are there, and this warpgroup, with tiles of none to tell, for the others.
                    rest = (lambda: all_arrived(ring, said)) if by_copies else (lambda: None)
                    tile, steps = told(i, rest, how)
                    if by_copies:
                        said = jnp.where(tile.valid, said, ring)
                else:
                    tile, steps = tile_at(i)
                    if config.ahead:
                        if by_copies:  # see above; few steps do not say all of the last tile's
                            rest = (steps == 0) | (shape.k_steps < config.lag)
                            pl.when(rest)(lambda: all_arrived(ring, said))
                            said = jnp.where(rest, ring, said)
                        tell(i, tile)
                rows = loader.find(refs, tile)
                first = rank * shape.k_steps if ranks > 1 else None

                def clear():
                    columns = tile.n * shape.columns, shape.columns
                    inline_stores.store_zeros(
                        *(refs.out, tile.empty, tile.behind, *columns), interpret=interpret
                    )

                clears = bool(config.heights) and not problem.leaves_padding
                # Tiles that are stored at once pause at their end. Late ones do not: there this warpgroup has
                # time once the ring is full.
                amid = clears and config.late

                def step(k, _=()):
                    at = ring + k
                    slot = at & (stages - 1) if masks else slot_of(at)
                    plgpu.barrier_wait(empty.at[slot])
                    of_row = k if first is None else first + k
                    loader.load(refs, tile, rows, slot, of_row, full.at[slot])
                    if amid:
                        pl.when(k == min(stages, shape.k_steps) - 1)(clear)
                    if not by_copies:
                        return ()
                    inline.commit_copies(interpret=interpret)

                    @pl.when(at - config.lag >= said)
                    def _():
                        inline.wait_for_copies(config.lag, interpret=interpret)
                        arrived(at, config.lag)

                    return ()

                if computing == 3:  # the loader has 32 registers
                    inline.loop(steps, step, interpret=interpret)
                else:
                    lax.fori_loop(0, steps, step, ())
                if amid:
                    pl.when(steps == 0)(clear)
                elif clears:
                    clear()
                return ring + steps, said

            end, said = lax.fori_loop(0, mine, one, (_I32(0), _I32(0)))
            if by_copies:
                all_arrived(end, said)
            # No barrier is left in the midst of a phase.
            for stage in range(stages):
                plgpu.barrier_wait(empty.at[slot_of(end + stage)])
            if config.heights or config.ahead:
                refs.told.end(mine)

        lax.cond(warpgroup < computing, compute, load)

    out_shape = problem.out_shape
    if problem.rows == "masked":
        out_shape = (problem.num_experts, problem.max_rows, problem.n)
    options: dict[str, Any] = {"interpret": plgpu.InterpretGPUParams()} if interpret else {}
    x_tiles = (stages, shape.k_parts, bm, x_width)
    w_tiles = (stages, shape.w_parts, *w_tile)
    o_tiles = (computing, slots, shape.piece_rows, shape.piece)
    scale_rows = [scaled_products.memory(problem, config)] if has_scale_rows(problem) else []
    out_type: Any = jax.ShapeDtypeStruct(out_shape, out_dtype)
    if config.ahead:
        scale_rows.append(scaled_products.weights_memory(problem, config, shape))
    parts, shared, grid = [], [], {}
    if ranks > 1:
        words = bn // computing * bm
        if interpret:
            in_memory = (clusters, ranks, computing, words)
            out_type = [out_type, jax.ShapeDtypeStruct(in_memory, _F32)]
        else:
            parts = [plgpu.SMEM((computing, words), _F32)]
        shared = [plgpu.ClusterBarrier(collective_axes=(AXIS,), num_barriers=2 * computing)]
        grid = {"cluster": (ranks,), "cluster_names": (AXIS,)}
    empty_barriers: Any = plgpu.Barrier(num_arrivals=computing, num_barriers=stages)
    if config.sharing:
        grid = {"cluster": (sharing,), "cluster_names": (AXIS,)}
        empty_barriers = plgpu.ClusterBarrier(
            collective_axes=(AXIS,), num_arrivals=computing, num_barriers=stages
        )
    told: list[Any] = []
    if config.heights or config.ahead:
        told = [plgpu.SMEM((found_cut.SLOTS * found_cut.WORDS,), _I32)]
        for arrivals in (1, computing):
            told.append(plgpu.Barrier(num_arrivals=arrivals, num_barriers=found_cut.SLOTS))
    if ending:
        out_type = (*ending.outputs, out_type)
    launch = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[
            views(x_tiles, dtype, interpret),
            plgpu.SMEM(w_tiles, dtype, transforms=w_like),
            views(o_tiles, out_dtype, interpret),
            *scale_rows,
            *parts,
            plgpu.Barrier(num_arrivals=loader.copies + by_copies, num_barriers=stages),
            empty_barriers,
            *shared,
            *told,
        ],
        grid=(clusters,),
        grid_names=("cta",),
        **grid,
        num_threads=computing + 1,
        thread_name="warpgroup",
        kernel_name=ending.name
        if ending
        else f"grouped_matmul_{config.form}{'_e4m3' if problem.scales else ''}",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **options,
    )
    if not (interpret and ranks > 1):
        return launch
    return lambda *operands: launch(*operands)[0]


# -- which tile ------------------------------------------------------------------------------------


def _row_tiles(
    problem: MatmulProblem, config: Config, shape: Shape, refs: _Refs, interpret: bool
) -> jax.Array:
    """Tiles that the rows in use make."""
    if config.cuts and problem.rows == "ragged":
        count = found_groups.count_plainly if interpret else found_groups.count
        return count(problem, config, refs.sizes, refs.offset)
    if config.cuts:  # whose rows are all there
        blocks = lax.div(refs.count[0] + (problem.block_size - 1), _I32(problem.block_size))
        return jnp.clip(blocks, 0, problem.num_rows // problem.block_size)
    if config.finds:
        return _found(problem, config, refs, _I32(0), interpret)[-1]
    if not shape.parts:
        return refs.count[0]
    if problem.all_rows and refs.vectors.bound is None:  # else a launch may have fewer
        return _I32(problem.num_blocks * shape.parts)
    block = problem.block_size
    count = refs.vectors.bound if problem.row_labels else refs.count[0]
    blocks = lax.div(count + (block - 1), _I32(block))
    # Ids are read of whole tiles. A last block that is not whole is none of an alignment's, whose rows in use
    # are whole blocks.
    whole = shape.reads_ids and not shape.partial
    most = problem.num_rows // block if whole else problem.num_blocks
    return jnp.clip(blocks, 0, most) * shape.parts


def in_groups(
    group: int, t: jax.Array, row_tiles: Any, n_tiles: int, known: "Mixing | None" = None
) -> tuple[Any, Any]:
    """(Tile of rows, n tile) of the t-th tile. In groups of `group` row tiles: n outer, rows inner.

    `known`: how tiles of rows, or groups of them, are mixed.
    """
    if not group:
        at = lax.div(t, _I32(n_tiles))
        return mixed(known, at) if known else at, lax.rem(t, _I32(n_tiles))
    each = _I32(group * n_tiles)
    first = lax.div(t, each)
    rest = t - first * each
    if known:
        first = mixed(known, first)
    size = jnp.minimum(row_tiles - first * group, group)
    n = lax.div(rest, size)
    return first * group + (rest - n * size), n


def mixing(group: int, experts: Any, num_experts: int, row_tiles: jax.Array) -> Mixing:
    """How tiles of blocks are mixed: not at all, but where the experts seem to be sorted by their rows.

    Then the tile at two thirds of the rows is of an expert of the first half, or that at one third of one of
    the second half. Two loads, side by side.
    """
    units = row_tiles if not group else lax.div(row_tiles, _I32(group))
    third = lax.div(units, _I32(3))
    last = jnp.maximum(row_tiles - 1, 0)
    near, far = (jnp.minimum(at * max(1, group), last) for at in (third, units - third))
    falls = (experts[far] >= 0) & (experts[far] * 2 < num_experts)
    rises = (experts[near] * 2 > num_experts) & (experts[near] < num_experts)
    small = jnp.where(falls | rises, third, 0)
    return Mixing(
        small, jnp.where(falls, 0, small), jnp.where(falls, units - small, 0).astype(_I32), units
    )


def mixed(known: Mixing, at: jax.Array) -> jax.Array:
    """Which unit (tile of rows, or whole group of them) is the at-th: after two of the large part one of the
    small part; what is left of the large part, and a group that is not whole, come last."""
    turn = lax.div(at, _I32(3))
    place = at - turn * 3
    both = turn < known.small
    of_small = both & (place == 2)
    of_large = jnp.where(both, turn * 2 + place, at - known.small) + known.large_from
    found = jnp.where(of_small, turn + known.small_from, of_large)
    return jnp.where(at < known.units, found, at)


def _in_expert(
    problem: MatmulProblem, config: Config, refs: _Refs, t: jax.Array, n_tiles: int
) -> tuple[Any, Any]:
    """(Tile of rows, n tile) of the t-th tile, in groups of up to `group` row tiles of one expert.

    As all n tiles of a group follow each other, tile t // n_tiles of the rows is one of t's group.
    """
    near = lax.div(t, _I32(n_tiles))
    begin = refs.experts[near] * problem.max_rows
    before = lax.div(refs.starts[near] - begin, _I32(config.bm))  # tiles of the expert
    count = lax.div(refs.ends[near] - begin + (config.bm - 1), _I32(config.bm))
    inside = lax.div(before, _I32(config.group)) * config.group
    size = jnp.minimum(count - inside, config.group)
    first = near - before + inside
    rest = t - first * n_tiles
    n = lax.div(rest, size)
    return first + (rest - n * size), n


def _found(
    problem: MatmulProblem, config: Config, refs: _Refs, at: jax.Array, interpret: bool
) -> Sequence[Any]:
    """What `found_masked.tile_of` says of a tile of rows of the masked layout."""
    find = found_masked.find_plainly if interpret else found_masked.find
    return find(problem, config, refs.masked_m, at)


def _found_unit(
    problem: MatmulProblem,
    config: Config,
    shape: Shape,
    refs: _Refs,
    at: jax.Array,
    interpret: bool,
) -> Sequence[Any]:
    """What `found_masked.unit_of` says of a unit of the masked layout."""
    find = found_masked.find_unit_plainly if interpret else found_masked.find_unit
    return find(problem, config, shape.n_tiles, refs.masked_m, at)


def _tile_of_unit(
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


def _read(
    problem: MatmulProblem,
    config: Config,
    shape: Shape,
    refs: _Refs,
    at: jax.Array,
    row_tiles: jax.Array,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """What memory tells about a tile of rows, of so many: its expert; of a list, also the first row and the
    end; of blocks, with `skips`, the first id of the second warpgroup's rows, or their first label."""
    if config.finds:
        return tuple(_found(problem, config, refs, at, interpret)[:3])
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
    return expert, refs.ids[jnp.where(row_tiles > 0, second, 0)]


def _tile(
    problem: MatmulProblem,
    config: Config,
    shape: Shape,
    refs: _Refs,
    at: jax.Array,
    n: jax.Array,
    known: tuple[jax.Array, ...],
) -> Tile:
    """Tile `at` of the rows and n of the columns.

    Args:
        problem, config, shape: of the kernel.
        refs: in which its expert stands.
        at, n: its numbers.
        known: what `_known` has loaded of it.
    """
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
    if (
        shape.parts > 1 and shape.reads_ids
    ):  # a block's pairs come first: a later part may have none
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


def _holds_pairs(problem: MatmulProblem, shape: Shape, refs: _Refs, tile: Tile) -> list[jax.Array]:
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


# -- products, and what becomes of them ------------------------------------------------------------


def _operands(
    problem: MatmulProblem,
    config: Config,
    shape: Shape,
    refs: _Refs,
    warpgroup: jax.Array,
    slot: jax.Array,
    part: int,
    accumulator: int,
    height: int,
) -> tuple[Any, Any]:
    """wgmma's two, for 64 columns of x; of tiles of several heights, for the first `height` rows."""
    x = refs.x_tiles.at[slot, part]
    if config.heights and height < config.bm:
        x = refs.x_tiles.at[slot, part, pl.ds(0, height)]
    if config.form == "m":
        x = refs.x_tiles.at[slot, part, pl.ds(warpgroup * shape.wm, shape.wm)]
    ks = pl.ds(64 * part, 64)
    width = config.bn // config.computing
    if problem.weights.transposed:  # [columns, k]
        rows = slice(None) if config.form == "m" else pl.ds(warpgroup * width, width)
        w = refs.w_tiles.at[slot, 0, rows, ks]
        if config.form == "swap":
            return w, x.transpose((1, 0))
        return x, w.transpose((1, 0))
    if shape.w_parts > 1:
        own = accumulator if config.form == "m" else warpgroup * shape.accumulators + accumulator
        w = refs.w_tiles.at[slot, own, ks]
    else:
        columns = slice(None) if config.form == "m" else pl.ds(warpgroup * width, width)
        w = refs.w_tiles.at[slot, 0, ks, columns]
    if config.form == "swap":
        return w.transpose((1, 0)), x.transpose((1, 0))
    return x, w


def _columns(config: Config, shape: Shape) -> int:
    """Of the result, of a warpgroup."""
    return shape.columns // (1 if config.form == "m" else config.computing)


def _slots(config: Config, shape: Shape) -> int:
    """Pieces of the result in shared memory, per warpgroup.

    A tile's pieces are a multiple of them: a slot is then written again when all but the latest
    `slots - 1` stores have read theirs, in the next tile too.
    """
    if config.form == "swap":
        return 1
    pieces = shape.wm // shape.piece_rows * (_columns(config, shape) // shape.piece)
    return 2 if pieces % 2 == 0 else pieces


class _Store:
    """Stores pieces of a tile, through a slot of shared memory each."""

    def __init__(
        self,
        problem: MatmulProblem,
        config: Config,
        shape: Shape,
        refs: _Refs,
        like: tuple[Any, ...],
        warpgroup: jax.Array,
        interpret: bool,
    ):
        self.problem, self.shape, self.refs, self.like = problem, shape, refs, like
        self.swap, self.warpgroup, self.interpret = config.form == "swap", warpgroup, interpret
        self.slots, self.rows = _slots(config, shape), shape.piece_rows
        self.heights = config.heights
        self.across, self.down = _columns(config, shape) // shape.piece, config.bm // self.rows

    def __call__(
        self,
        q: int,
        value: jax.Array,
        at: tuple[jax.Array, ...],
        *,
        whole: bool = False,
        some: Sequence[jax.Array] = (),
        rows: int = 0,
        height: Any = None,
    ) -> None:
        """Piece q of a tile at (first row, first column, end): row after row; swapped, column after column.

        `whole`: all of the tile's rows are known to be stored. `some`: of `_holds_pairs`. `rows`: of a piece
        that may have fewer than the others; 0: it has as many. `height`: of the tile, one of `heights`.
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
            self._some(slot, row, column, end)
        elif whole or not self.shape.partial:
            self._whole(slot, row, column, some)
        else:
            lax.cond(
                row + self.rows <= end,
                lambda: self._whole(slot, row, column),
                lambda: self._some(slot, row, column, end),
            )

    def _first(self, slot: int, row: jax.Array, column: jax.Array, rows: int) -> None:
        """Stores a slot's first rows by TMA."""
        source = self.refs.o_rows.at[self.warpgroup, slot, pl.ds(0, rows)]
        columns = pl.ds(pl.multiple_of(column, self.shape.piece), self.shape.piece)
        plgpu.copy_smem_to_gmem(source, self.refs.out.at[pl.ds(row, rows), columns])

    def _whole(
        self, slot: int, row: jax.Array, column: jax.Array, some: Sequence[jax.Array] = ()
    ) -> None:
        """Stores a slot by TMA, all of its rows, from (row, column) of the result on.

        With `some`, it stores runs of `store_rows` rows: the first, and the further ones whose `some` holds.
        """
        rows, columns = self.rows, pl.ds(pl.multiple_of(column, self.shape.piece), self.shape.piece)
        if self.problem.rows == "masked":
            most = _I32(self.problem.max_rows)
            expert = lax.div(row, most)
            target = self.refs.out.at[expert, pl.ds(row - expert * most, rows), columns]
        else:
            target = self.refs.out.at[pl.ds(row, rows), columns]
        if not some:
            plgpu.copy_smem_to_gmem(self.refs.o_rows.at[self.warpgroup, slot], target)
        each = self.shape.store_rows
        for k, wanted in enumerate((None, *some) if some else ()):
            source = self.refs.o_rows.at[self.warpgroup, slot, pl.ds(k * each, each)]
            part = self.refs.out.at[pl.ds(row + k * each, each), columns]
            copy = functools.partial(plgpu.copy_smem_to_gmem, source, part)
            copy() if wanted is None else pl.when(wanted)(copy)

    def _some(self, slot: int, row: jax.Array, column: jax.Array, end: jax.Array) -> None:
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
