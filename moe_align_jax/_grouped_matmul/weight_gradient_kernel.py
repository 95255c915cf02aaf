"""The kernel of the weights' gradient, in Pallas Mosaic GPU: for each expert lhs^T rhs over its rows.

A persistent CTA has two warpgroups that multiply and one that loads, as the kernel of the product has. A tile
is bm columns of lhs by bn of rhs, and a stage of the ring has bk rows of both: wgmma reads lhs as its first
operand with the columns as rows, so that nothing is transposed in memory. Experts have any number of rows;
those with the most come first, and the CTAs take tiles in turn, forth and back, so that all have about as
many rows. Where a hot expert's tiles make some CTAs late, the others take more tiles (`deal`). An expert
without rows gets zeros.

The kernel reads an expert's rows from the first to the last. Where they may not follow each other (a caller's
alignment, an expert map that gives two experts one local id) that is tested on the device, and the loop of
`reference` runs instead.

    rows by TMA       where every expert's first row is a multiple of 8: what stands behind an expert's last
                      row is overwritten with zeros in shared memory, since it may be NaN (0 * NaN)
    rows by cp.async  of a gathered operand, and of groups that begin anywhere: zeros behind the last row

Of an expert's last rows, which do not fill a stage, only as many as fill 16 are multiplied, and made zero
where they are none of its own (`Tiles.short`).

A `late` tile stays in registers, rounded, and is stored in bands of columns between the products of the next
one. Where a matrix has fewer tiles than the GPU has multiprocessors, an expert with most of the rows would
leave some without work: its rows are cut into pieces. A first launch sums each piece, into float32, and the
second adds an expert's pieces up in their order, in place of multiplying. Nothing is atomic: each sum is made
by one warpgroup, in the order of the rows. Needs sm_90a: wgmma, TMA.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._core.hopper import NUM_SMS
from moe_align_jax._grouped_matmul import (
    inline,
    inline_rows,
    inline_stores,
    inline_wgmma,
    launch,
    memory,
    products,
    reference,
    tile_order,
)
from moe_align_jax._grouped_matmul.config import UNIT, unsupported
from moe_align_jax._grouped_matmul.problem import WeightGradient
from moe_align_jax._lowering.sharding import vary_together

_I32, _F32 = jnp.int32, jnp.float32
# Registers of a thread that loads, and of one that multiplies, without cp.async and with it.
_REGISTERS = {False: (40, 232), True: (56, 224)}
_SLOTS = 2  # bands of the result in shared memory, per warpgroup
_COMPUTING = 2  # warpgroups that multiply
_WM = 64  # columns of lhs that a warpgroup has
_SHORT = 16  # rows of a wgmma
_TILES_PER_CTA = (
    4  # about as many tiles as this has each CTA if one expert has all rows, cut into pieces
)
_STEPS_OF_PIECE = 8  # a piece has at least so many
_CLASSES = 4  # of CTAs, by the expert of their first tile
_LISTED = 64  # tiles of a CTA that `deal` lists, at most
# The time that a tile takes beside that of its rows, in rows: 1.03 us, and 0.693 us for 64 rows, fitted to
# uniform times of three sizes (H200, 2026-11-30, 04:43). 160 rows took as long.
_ROWS_OF_TILE = 96
# On an H200, 2026-11-29, 16384 rows, 8 experts, us, device span under jit:
#   4096 x 28672: all n tiles of an m tile, then the next 6191, in groups of 8 4914, of 16 4779;
#     rows gathered by the kernel 6864 and in groups of 16 5813, gathered before it 4855
#   14336 x 4096: 2452, in groups of 8 2394, of 16 2392; rows of 14336 gathered by the kernel 2722, first 2737
_COLUMNS_TO_GATHER_FIRST = 8192  # of the operand that is not gathered
_COLUMNS_IN_A_ROUND = 4096  # of fewer, all n tiles are done before the next m tile


class Tiles(NamedTuple):
    """Sizes of the kernel.

    Attributes:
        bm, bn: columns of lhs and of rhs that a tile has.
        bk: rows of a stage.
        stages: of the ring.
        late: a finished tile is stored between the products of the next one. Not of float32 results.
        lag: with cp.async, steps between asking for rows and saying that they are there. At most stages - 2:
            a stage is free again when the next one has been multiplied.
        num_ctas: of the grid.
        pieces: that the rows of all hot experts are cut into, at most; 0: no expert is cut.
        group: m tiles that are done together for each n tile, so that both operands are read from L2; 0: all
            n tiles of an m tile, then the next.
        back: the CTAs take the first round of tiles forth and all others back, so that who had a tile of the
            expert with the most rows gets the shortest of every later one; otherwise forth and back in turn.
        short: of an expert's last rows that fill no stage, only as many as fill 16 are multiplied. bk is 64.
        level: CTAs that have a short first tile take more tiles, until all have about as many rows; see
            `deal`. Where the first round has tiles of 2 to `_CLASSES` experts. Where such tiles were dealt,
            the rounds behind them are taken from both ends in turn: a tile of few rows takes as long to store
            as one of many, and is stored between the products of the next one.
    """

    bm: int = 128
    bn: int = 256
    bk: int = 64
    stages: int = 4
    late: bool = True
    lag: int = 2
    num_ctas: int = NUM_SMS
    pieces: int = 0
    group: int = 0
    back: bool = False
    short: bool = False
    level: bool = False

    @property
    def name(self) -> str:
        """For tables: `128x256x64s4-late`."""
        more = f"-g{self.group}" if self.group else ""
        more += ("-late" if self.late else "") + ("-back" if self.back else "")
        more += ("-short" if self.short else "") + ("-level" if self.level else "")
        return f"{self.bm}x{self.bn}x{self.bk}s{self.stages}{more}"


def cannot(problem: WeightGradient) -> str | None:
    """Why the kernel does not take this problem, or None."""
    layout = problem.layout
    if reason := unsupported(layout):
        return reason
    if layout.rows == "blocks" and layout.block_size == 1:
        return "the kernel needs an expert's rows beside each other; blocks of one row may lie anywhere"
    if max(layout.num_rows, layout.num_tokens) * (layout.n // UNIT) > 2**31 - 1:
        return "the kernel counts units of 16 bytes of rhs in int32; these are too many"
    return None


def tiles_for(problem: WeightGradient) -> Tiles:
    """The tiles for a problem, as measured on an H200."""
    # Last rows to 16, beside whole steps, us, 2026-11-29, 19:44 and 20:10: 131072 rows, 7168 x 1024, 256
    # experts 2781, 2864 (Zipf 3217, 3249); 262144 rows, 4096 x 1536, 128 experts 4316, 4344; 65536 rows,
    # 768 x 2048, 128 experts 317, 330; 16384 rows, 4096 x 28672, 8 experts 4853, 4913.
    # Of 131072 gathered rows, 7168 x 1024, 256 experts, on an H200: lag 1 3545 us, lag 2 3709.
    tiles = Tiles(
        late=problem.layout.out_dtype != "float32",
        lag=1 if problem.gathered else 2,
        short=inline_wgmma.multiplies_rows(),
    )
    # As many tiles as CTAs run at once: of a wide matrix, all its columns and one or two m tiles. They would
    # read the whole of an expert's rows again for each m tile.
    group = 16 if problem.layout.n >= _COLUMNS_IN_A_ROUND else 0
    # With few tiles, those of the expert with the most rows do not fill a round. us, 2026-11-30, 65536 rows,
    # 128 experts, leveled and before: 768 x 2048, Zipf, 332 and 374, uniform 307.8 and 307.0; 2048 x 1536 626
    # and 658, uniform 595 and 595. Back in all rounds, or in turn, leveled: 768 x 2048, uniform, 308 and 313;
    # 2048 x 1536, Zipf, 655 and 625.
    per_expert = _per_expert(problem, tiles)
    level = per_expert < tiles.num_ctas <= _CLASSES * per_expert
    return tiles._replace(group=group, back=2 * per_expert <= tiles.num_ctas, level=level)


def _per_expert(problem: WeightGradient, tiles: Tiles) -> int:
    """Tiles of an expert's matrix."""
    return -(-problem.layout.k // tiles.bm) * -(-problem.layout.n // tiles.bn)


def cutting(problem: WeightGradient) -> Tiles:
    """`tiles_for`, with hot experts cut, where a matrix has so few tiles that it pays."""
    tiles, layout = tiles_for(problem), problem.layout
    pieces = tiles.num_ctas * _TILES_PER_CTA // _per_expert(problem, tiles)
    pieces = min(pieces, layout.num_rows // (_STEPS_OF_PIECE * tiles.bk))
    # An expert is cut if it has two pieces' rows: with two pieces, only if it has all.
    return tiles._replace(pieces=pieces, level=False) if pieces > 2 else tiles


class Experts(NamedTuple):
    """Each expert's rows, int32 `[E]`: the first, how many, and the experts by how many, most first."""

    start: jax.Array
    count: jax.Array
    order: jax.Array


def experts_of(problem: WeightGradient, *where: jax.Array) -> Experts:
    """From the arrays that say whose rows are where. An expert's rows follow each other."""
    return _experts_of(problem, *where)[0]


def _experts_of(problem: WeightGradient, *where: jax.Array) -> tuple[Experts, jax.Array | None]:
    """`experts_of`, and whether it is true of "blocks" that an expert's rows follow each other."""
    layout, consecutive = problem.layout, None
    every = jnp.arange(layout.num_experts, dtype=_I32)
    if layout.rows == "masked":
        start, count = every * layout.max_rows, jnp.clip(where[0], 0, layout.max_rows)
    elif layout.rows == "ragged":
        ends = reference.group_ends(where[0], layout.num_rows)
        begins = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
        # Far offsets would wrap.
        group = every + jnp.clip(where[1][0], -layout.num_experts, layout.num_groups)
        there = (group >= 0) & (group < layout.num_groups)
        group = jnp.where(there, group, 0)
        start = jnp.where(there, begins[group], 0)
        count = jnp.where(there, (ends - begins)[group], 0)
    else:
        block, blocks = layout.block_size, layout.num_blocks
        used = reference.row_mask(layout, *where).astype(_I32)
        used = jnp.pad(used, (0, blocks * block - layout.num_rows))
        pairs = jnp.sum(used.reshape(blocks, block), axis=1, dtype=_I32)
        # A block has its pairs first: those of an expert's blocks follow each other, but for the last's end.
        mine = (where[1][None, :] == every[:, None]) & (pairs > 0)[None, :]
        count = jnp.sum(jnp.where(mine, pairs[None, :], 0), axis=1, dtype=_I32)
        first = jnp.min(
            jnp.where(mine, jnp.arange(blocks, dtype=_I32)[None, :], blocks), axis=1, initial=blocks
        )
        start = jnp.where(count > 0, first * block, 0)
        block_of_row = jnp.arange(blocks * block, dtype=_I32) // block
        expert = jnp.clip(where[1], 0, layout.num_experts - 1)[block_of_row]
        rank = jnp.arange(blocks * block, dtype=_I32) - start[expert]
        # An expert has as many rows as it counts: they are its first ones, or some lie elsewhere.
        consecutive = jnp.all((used == 0) | (rank < count[expert]))
    experts = Experts(start, count, jnp.argsort(-count, stable=True).astype(_I32))
    return experts, consecutive


class Dealt(NamedTuple):
    """What `deal` found: how many tiles of a CTA are listed, and the first tile that is nobody's yet."""

    listed: Any
    begin: Any


def deal(
    cta: jax.Array,
    rows_of: Callable[[Any], jax.Array],
    note: Callable[[jax.Array, jax.Array], None],
    *,
    num_experts: int,
    per_expert: int,
    num_ctas: int,
) -> Dealt:
    """Deals the first tiles, so that no CTA is behind the others by the rows of a hot expert.

    The CTAs whose first tiles are of one expert are a class. The class that has the fewest rows takes the
    next tiles, one for each of its CTAs, until all have about the same. Every CTA computes the same, and
    notes its own tiles. There are more tiles than CTAs.

    Args:
        cta: whose tiles are noted.
        rows_of: of the expert with that rank; they fall.
        note: called with (place in the CTA's list, tile).
        num_experts, per_expert: and tiles of each.
        num_ctas: that share the tiles.
    """
    total = num_experts * per_expert
    sizes = [min(per_expert, num_ctas - at) for at in range(0, num_ctas, per_expert)]
    own = lax.div(cta, _I32(per_expert))
    place = cta - own * per_expert

    def cost(rank: Any) -> jax.Array:
        return rows_of(rank) + _ROWS_OF_TILE

    # Two tiles of the median: where one expert is hot, that is little. Half as much gained nothing.
    slack = 2 * cost(num_experts // 2)
    note(_I32(0), cta)

    def spread(loads: tuple[jax.Array, ...]) -> jax.Array:
        return functools.reduce(jnp.maximum, loads) - functools.reduce(jnp.minimum, loads)

    def goes_on(state: Any) -> jax.Array:
        deals, _, begin, *loads = state
        return (spread(tuple(loads)) > slack) & (begin < total) & (deals < _LISTED - 1)

    def one(state: Any) -> Any:
        deals, listed, begin, *loads = state
        least = functools.reduce(jnp.minimum, loads)
        chosen, size = _I32(0), _I32(sizes[0])
        for k in range(len(sizes) - 1, 0, -1):
            here = loads[k] == least
            chosen, size = jnp.where(here, k, chosen), jnp.where(here, sizes[k], size)
        tile = begin + jnp.where(lax.rem(listed, _I32(2)) == 0, place, size - 1 - place)
        mine = (chosen == own) & (tile < total)
        pl.when(mine)(lambda: note(listed, tile))
        more = cost(lax.div(begin, _I32(per_expert)))
        loads = [x + jnp.where(chosen == k, more, 0) for k, x in enumerate(loads)]
        return deals + 1, listed + mine.astype(_I32), begin + size, *loads

    state = (_I32(0), _I32(1), _I32(num_ctas), *(cost(k) for k in range(len(sizes))))
    _, listed, begin, *_ = lax.while_loop(goes_on, one, state)
    return Dealt(listed, jnp.minimum(begin, total))


class Turns:
    """Which tiles a CTA has, one after the other.

    Attributes:
        mine: how many.
    """

    def __init__(
        self,
        cta: jax.Array,
        num_ctas: int,
        in_use: Any,
        *,
        back: bool,
        dealt: Dealt | None = None,
        tile_listed: Callable[[jax.Array], jax.Array] | None = None,
    ):
        """
        Args:
            cta: whose tiles these are.
            num_ctas: that share the tiles.
            in_use: tiles that there are; an int where it is known.
            back: as for `Tiles`.
            dealt: what `deal` found, if the first tiles are dealt.
            tile_listed: the tile at that place of the CTA's list.
        """
        self._cta, self._num_ctas, self._back = cta, num_ctas, back
        self._dealt, self._tile_listed = dealt, tile_listed
        if dealt is not None:
            self._any_dealt = dealt.begin > num_ctas
            in_use = in_use - dealt.begin
        if isinstance(in_use, int):
            self._rounds, rest = divmod(in_use, num_ctas)
        else:
            self._rounds = lax.div(in_use, _I32(num_ctas))
            rest = in_use - self._rounds * num_ctas
        last = _I32(self._rounds)
        at_last = self._place(last if dealt is None else last + 1)
        self.mine = last + (at_last < rest).astype(_I32)
        if dealt is not None:
            self.mine += dealt.listed

    def tile(self, i: jax.Array) -> jax.Array:
        """The i-th of this CTA's tiles."""
        if self._dealt is None:
            return self._in_round(i)
        return lax.cond(self._any_dealt, lambda: self._leveled(i), lambda: self._in_round(i))

    def _leveled(self, i: jax.Array) -> jax.Array:
        """The same where some were dealt."""
        assert self._dealt is not None and self._tile_listed is not None
        (listed, begin), tile_listed = self._dealt, self._tile_listed
        back = i - listed  # a round of those that were not
        half = lax.div(back, _I32(2))
        ends = jnp.where(lax.rem(back, _I32(2)) == 1, self._rounds - 1 - half, half)
        back = jnp.where(back < self._rounds, ends, back)
        return lax.cond(
            i < listed,
            lambda: tile_listed(i),
            lambda: begin - self._num_ctas + self._in_round(back + 1),
        )

    def _in_round(self, i: jax.Array) -> jax.Array:
        """The tile of round i, where each CTA has one in each."""
        return i * self._num_ctas + self._place(i)

    def _place(self, i: jax.Array) -> jax.Array:
        """Every other round is taken backwards: who had the longest tile gets the shortest next."""
        forth = i == 0 if self._back else lax.rem(i, _I32(2)) == 0
        return jnp.where(forth, self._cta, self._num_ctas - 1 - self._cta)


class Pieces(NamedTuple):
    """The rows of hot experts, cut.

    Attributes:
        experts: the pieces as if they were experts, `[pieces]`, in the order of their experts and rows.
        used: int32 `[1]`, how many there are; the others are empty.
        begin, end: int32 `[E]`, the pieces of each expert; the same for one that is not cut.
    """

    experts: Experts
    used: jax.Array
    begin: jax.Array
    end: jax.Array


def cut(experts: Experts, pieces: int, bk: int) -> tuple[Experts, Pieces]:
    """The experts, without the rows of those that are cut, and the pieces of these."""
    start, count, _ = experts
    total = jnp.sum(count, dtype=_I32)
    bound = jnp.maximum(lax.div(total + (pieces - 1), _I32(pieces)), _I32(_STEPS_OF_PIECE * bk))
    # Rounded down: the pieces of all experts are at most as many as bounds are in all rows.
    parts = jnp.where(count >= 2 * bound, lax.div(count, bound), 0)
    end = jnp.cumsum(parts, dtype=_I32)
    begin, used = end - parts, end[-1:]
    # A piece begins at a whole step behind its expert's first row, as TMA needs it.
    steps = lax.div(count + (bk - 1), _I32(bk))
    steps = lax.div(steps + (parts - 1), jnp.maximum(parts, 1))
    piece = lax.iota(_I32, pieces)
    expert = jnp.sum(end[None, :] <= piece[:, None], axis=1, dtype=_I32)
    expert = jnp.minimum(expert, end.shape[0] - 1)
    rows = steps[expert] * bk
    skipped = (piece - begin[expert]) * rows
    there = jnp.where(piece < used, jnp.clip(count[expert] - skipped, 0, rows), 0)
    of_pieces = Experts(jnp.where(there > 0, start[expert] + skipped, 0), there, piece)
    count = jnp.where(parts > 0, 0, count)
    left = Experts(start, count, jnp.argsort(-count, stable=True).astype(_I32))
    return left, Pieces(of_pieces, used, begin, end)


class _Operand(NamedTuple):
    """How the rows of lhs or of rhs come into shared memory.

    Attributes:
        columns: of the array.
        wide: of a tile.
        gathered: row r is that of a token.
        by_tma: whole tiles by TMA.
    """

    columns: int
    wide: int
    gathered: bool
    by_tma: bool


def _operand(problem: WeightGradient, tiles: Tiles, name: str) -> _Operand:
    """How the kernel reads "lhs" or "rhs": its columns, those of a tile, whether it gathers rows, whether TMA
    loads it."""
    layout, gathered = problem.layout, problem.gathered == name
    columns, wide = (layout.k, tiles.bm) if name == "lhs" else (layout.n, tiles.bn)
    step = {"blocks": layout.block_size, "masked": layout.max_rows, "ragged": 1}[layout.rows]
    aligned = step % 8 == 0 and layout.num_rows % 8 == 0 and columns % 64 == 0
    # TMA's box is not larger than the array.
    holds = layout.num_rows >= tiles.bk and columns >= wide
    return _Operand(columns, wide, gathered, aligned and holds and not gathered)


def run(
    problem: WeightGradient,
    *operands: jax.Array,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> jax.Array:
    """`[E, k, n]` of `problem.inputs`, by the kernel.

    problem: one that `cannot` has nothing against.
    """
    if tiles is None and gathers_first(problem):
        problem, operands = gathered(problem, *operands)
    tiles = tiles or tiles_for(problem)
    if interpret:  # it runs a thread for each warpgroup of each CTA
        tiles = tiles._replace(num_ctas=2)

    def by_kernel(experts: Experts, operands: tuple[jax.Array, ...]) -> jax.Array:
        given = functools.partial(arguments, problem, tiles, interpret=interpret)
        with jax.enable_x64(False):  # its indices are int32; plgpu makes 64-bit ones otherwise
            if not tiles.pieces:
                return build(problem, tiles, interpret=interpret)(*given(experts, *operands))
            experts, pieces = cut(experts, tiles.pieces, tiles.bk)
            sums = build_pieces(problem, tiles, interpret=interpret)(
                *given(pieces.experts, *operands, more=(pieces.used,))
            )
            more = (pieces.begin, pieces.end)
            given_all = given(experts, *operands, more=more, sums=sums)
            return build(problem, tiles, interpret=interpret)(*given_all)

    def by_loop(experts: Experts, operands: tuple[jax.Array, ...]) -> jax.Array:
        del experts
        return reference.weight_gradient(problem, *operands)

    experts, consecutive = _experts_of(problem, *operands[2:])
    if consecutive is None or problem.layout.consecutive:
        return by_kernel(experts, operands)

    def typed(way: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """Under shard_map with check_vma a kernel's result varies over no axis, and the loop's does."""
        return lambda *given: vary_together([way(*given), *operands])[0]

    return lax.cond(consecutive, typed(by_kernel), typed(by_loop), experts, operands)


def gathers_first(problem: WeightGradient) -> bool:
    """Whether rows are gathered by a launch before the kernel, which reads them once per tile of the other
    operand's columns."""
    other = problem.layout.n if problem.gathered == "lhs" else problem.layout.k
    return problem.gathered is not None and other >= _COLUMNS_TO_GATHER_FIRST


def gathered(
    problem: WeightGradient, lhs: jax.Array, rhs: jax.Array, *where: jax.Array
) -> tuple[WeightGradient, tuple[jax.Array, ...]]:
    """The same sums of rows in aligned order, gathered by XLA. The kernel leaves out the rows of no pair: the
    other operand's may hold NaN there."""
    layout = problem.layout
    pairs = layout.num_tokens * layout.top_k
    tokens = lhs if problem.gathered == "lhs" else rhs
    sizes = {"num_tokens": layout.num_tokens, "top_k": layout.top_k}
    rows = launch.rows_of_pairs(tokens, where[0], **sizes)
    operands = (rows, rhs) if problem.gathered == "lhs" else (lhs, rows)
    layout = layout._replace(num_tokens=0, top_k=0, num_pairs=pairs)
    return WeightGradient(layout), (*operands, *where)


def arguments(
    problem: WeightGradient,
    tiles: Tiles,
    experts: Experts,
    *operands: jax.Array,
    interpret: bool,
    more: tuple[jax.Array, ...] = (),
    sums: jax.Array | None = None,
) -> list[jax.Array]:
    """The kernel's operands, of the problem's.

    more: with pieces, how many are used for the first launch, and which are whose for the second.
    sums: the pieces' sums, for the second.
    """
    lhs, rhs, *where = operands
    found = [*experts, *more]
    if problem.gathered:
        # A stage may reach past the last row: the ids that it reads there are not used.
        found.append(jnp.pad(where[0], (0, tiles.bk), constant_values=-1))
    if interpret:  # its loads by index know no bounds
        lhs, rhs = (
            jnp.pad(x, ((0, tiles.bk), (0, -x.shape[1] % wide)))
            for x, wide in ((lhs, tiles.bm), (rhs, tiles.bn))
        )
    return [*found, lhs, rhs, *(() if sums is None else (sums,))]


def unread_stores(n: int, bn: int, piece: int) -> int:
    """How many of the latest stores may still read their slot when the next band is put.

    Band q of a tile takes slot q modulo the slots. Where a tile has a number of bands that is no multiple of
    the slots, two stores in a row read the same slot, and the second one must wait for the first.
    """
    bands = (bn // piece, -(-n // piece))
    return 0 if any(count % _SLOTS for count in bands) else _SLOTS - 1


def build_pieces(
    problem: WeightGradient, tiles: Tiles, *, interpret: bool = False
) -> Callable[..., jax.Array]:
    """The launch that sums the pieces: float32 `[pieces, k, n]`, with k and n those of whole tiles."""
    layout = problem.layout._replace(num_experts=tiles.pieces, out_dtype="float32")
    tiles = tiles._replace(late=False, pieces=0, level=False)
    of_pieces = problem._replace(layout=layout)
    return build(of_pieces, tiles, of_pieces=True, interpret=interpret)


def build(
    problem: WeightGradient, tiles: Tiles, *, of_pieces: bool = False, interpret: bool = False
) -> Callable[..., jax.Array]:
    """The kernel as a function of what `arguments` gives."""
    if tiles.lag > tiles.stages - 2:
        raise ValueError(f"the loads would wait for products that wait for them: {tiles}")
    if tiles.short and not inline_wgmma.multiplies_rows():
        raise ValueError(
            f"this jax does not have what {tiles.name} are made of; take `short=False`"
        )
    if tiles.short and tiles.bk != 64:
        raise ValueError(f"`short` tiles have stages of 64 rows, not of {tiles.bk}")
    layout = problem.layout
    k, n, stages, bk = layout.k, layout.n, tiles.stages, tiles.bk
    dtype, out_dtype = jnp.dtype(layout.dtype), jnp.dtype(layout.out_dtype)
    piece = 128 // out_dtype.itemsize
    left, right = (_operand(problem, tiles, name) for name in ("lhs", "rhs"))
    likes = [memory.transforms(each.wide, dtype) for each in (left, right)]
    o_like = memory.transforms(piece, out_dtype)
    m_tiles, n_tiles = -(-k // tiles.bm), -(-n // tiles.bn)
    by_copies = not (left.by_tma and right.by_tma)
    per_expert = m_tiles * n_tiles
    total = layout.num_experts * per_expert
    # TMA stores of a single piece lose the dimension of pieces, and with it their index.
    by_rows = not of_pieces and (k % _WM != 0 or n % piece != 0 or n == piece)
    out_shape = problem.out_shape
    if of_pieces:  # whole tiles, so that they can be read without a look at the edges
        out_shape = layout.num_experts, m_tiles * tiles.bm, n_tiles * tiles.bn
    memory_registers, compute_registers = _REGISTERS[by_copies]
    # At most two rounds leave nothing to deal.
    level = tiles.level and per_expert < tiles.num_ctas <= _CLASSES * per_expert
    level = level and total > 2 * tiles.num_ctas

    def body(*given):
        refs = list(given)
        start_ref, count_ref, order_ref = refs.pop(0), refs.pop(0), refs.pop(0)
        used_ref = refs.pop(0) if of_pieces else None
        of_expert = (refs.pop(0), refs.pop(0)) if tiles.pieces else None
        ids_ref = refs.pop(0) if problem.gathered else None
        left_ref, right_ref = refs.pop(0), refs.pop(0)
        sums_ref = refs.pop(0) if tiles.pieces else None
        out_ref, left_tiles, right_tiles, o_tiles, full, empty, *lists = refs
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        in_use, dealt, tile_listed = total, None, None
        if used_ref is not None:
            in_use = used_ref[0] * per_expert
        if level:
            own_list = warpgroup * _LISTED  # each notes all of them: none waits for another

            def note(place, tile):
                lists[0][own_list + place] = tile

            def noted(place):
                return lists[0][own_list + place]

            tile_listed = noted
            dealt = deal(
                *(cta, lambda rank: count_ref[order_ref[rank]], note),
                num_experts=layout.num_experts,
                per_expert=per_expert,
                num_ctas=tiles.num_ctas,
            )
            plgpu.commit_smem()  # all threads of the warpgroup have noted them
        turns = Turns(
            *(cta, tiles.num_ctas, in_use),
            back=tiles.back,
            dealt=dealt,
            tile_listed=tile_listed,
        )
        sides = ((left, left_ref, left_tiles), (right, right_ref, right_tiles))

        def tile_at(i):
            """(expert, m tile, n tile, its rows' first and end, steps) of this CTA's i-th tile."""
            t = turns.tile(i)
            rank = lax.div(t, _I32(per_expert))
            rest = t - rank * per_expert
            m, n = tile_order.in_groups(tiles.group, rest, m_tiles, n_tiles)
            expert = order_ref[rank]
            first, count = start_ref[expert], count_ref[expert]
            steps = lax.div(count + (bk - 1), _I32(bk))
            return expert, m, n, first, first + count, steps

        def slot_of(step):
            return lax.rem(step, _I32(stages))

        def compute():
            plgpu.set_max_registers(compute_registers, action="increase")
            for stage in range(stages):
                plgpu.barrier_arrive(empty.at[stage])

            def multiply(tile, ring, between):
                *_, first, end, steps = tile

                def scope(sums):
                    def step(k, _):
                        slot = slot_of(ring + k)
                        plgpu.barrier_wait(full.at[slot])
                        rows = end - first - k * bk
                        if not tiles.short:
                            pl.when(rows < bk)(lambda: clear(slot, rows))
                        a = left_tiles.at[slot, :, pl.ds(warpgroup * _WM, _WM)]
                        plgpu.wgmma(sums, a.transpose((1, 0)), right_tiles.at[slot])
                        between(k)
                        # All but this step's are done, so that their stage can be loaded again.
                        plgpu.wgmma_wait(1)

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[slot_of(ring + k + stages - 1)])

                        return ()

                    # The wait belongs to the branch: see the kernel of the product.
                    whole = whole_steps(tile)

                    @pl.when(whole > 0)
                    def _():
                        lax.fori_loop(0, whole, step, ())
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[slot_of(ring + whole + stages - 1)])

                    return sums[...]

                sums = pl.run_scoped(scope, products.accumulator((_WM, tiles.bn), _F32))
                if not tiles.short:
                    return sums
                slot, rest = slot_of(ring + steps - 1), end - first - whole_steps(tile) * bk

                def last(most, sums):
                    """The rows behind the whole steps, which are `most` at most."""

                    def these(sums):
                        clear(slot, rest, most - _SHORT, most)
                        return inline_wgmma.multiply_rows(
                            *(sums, left_tiles.at[slot], right_tiles.at[slot], likes, warpgroup),
                            rows=most,
                            interpret=interpret,
                        )

                    if most == bk:
                        return these(sums)
                    return lax.cond(
                        rest <= most, these, functools.partial(last, most + _SHORT), sums
                    )

                def some(sums):
                    plgpu.barrier_wait(full.at[slot])
                    sums = last(_SHORT, sums)
                    plgpu.barrier_arrive(empty.at[slot])
                    return sums

                return lax.cond(rest > 0, some, lambda sums: sums, sums)

            def clear(slot, rows, before=0, most=bk):
                """Zeros into a stage's rows from `rows` on, up to `most`, none of the `before` first."""
                # Both warpgroups write the same zeros: each waits for its own.
                for (side, _, stage), like in zip(sides, likes, strict=True):
                    if side.by_tma:
                        inline_stores.clear_rows(
                            *(stage.at[slot], like, rows),
                            shape=(most, side.wide),
                            interpret=interpret,
                            before=before,
                        )
                plgpu.commit_smem()

            def whole_steps(tile):
                """Of a tile's steps those that the loop takes: with `short`, those of a whole stage."""
                *_, first, end, steps = tile
                return lax.div(end - first, _I32(bk)) if tiles.short else steps

            def bands(tile, sums):
                """The sums in bands of columns, rounded; of an expert that is cut, those of its pieces."""
                expert, row, column = place(tile)
                found = []
                for c in range(0, tiles.bn, piece):
                    band = sums[:, c : c + piece]
                    if of_expert is not None and sums_ref is not None:
                        (begin_ref, end_ref), parts_ref = of_expert, sums_ref
                        rows = pl.ds(pl.multiple_of(row, _WM), _WM)
                        columns = pl.ds(pl.multiple_of(column + c, piece), piece)

                        def add(p, band, ref=parts_ref, rows=rows, columns=columns):
                            return band + load_sums(ref.at[p, rows, columns])

                        band = lax.fori_loop(begin_ref[expert], end_ref[expert], add, band)
                    found.append(band.astype(out_dtype))
                return found

            def load_sums(ref):
                if interpret:
                    return ref[...]
                return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)

            unread = unread_stores(n, tiles.bn, piece)

            def put(q, value, at):
                """Band q of a tile at (expert, first row, first column), if the result has it."""
                expert, row, column = at
                column = column + piece * q

                @pl.when((row < k) & (column < n))
                def _():
                    tile = o_tiles.at[warpgroup, q % _SLOTS]
                    plgpu.wait_smem_to_gmem(unread, wait_read_only=True)
                    tile[...] = value
                    plgpu.commit_smem()
                    if by_rows:
                        inline_stores.store_rows(
                            *(tile, o_like, out_ref, expert * k + row, (expert + 1) * k, column),
                            rows=_WM,
                            max_rows=k,
                            interpret=interpret,
                        )
                        plgpu.commit_smem()  # other threads than read the slot write to it next
                    else:
                        rows = pl.ds(pl.multiple_of(row, _WM), _WM)
                        columns = pl.ds(pl.multiple_of(column, piece), piece)
                        plgpu.copy_smem_to_gmem(tile, out_ref.at[expert, rows, columns])

            def place(tile):
                expert, m, n_tile, *_ = tile
                return expert, m * tiles.bm + warpgroup * _WM, n_tile * tiles.bn

            def now(i, ring):
                tile = tile_at(i)
                at = place(tile)
                for q, value in enumerate(bands(tile, multiply(tile, ring, lambda k: None))):
                    put(q, value, at)
                return ring + tile[-1]

            def later(i, carry):
                ring, waits, at, last = carry
                tile = tile_at(i)

                def between(k):
                    for q in range(len(last)):
                        pl.when((k == q) & (waits > 0))(lambda q=q: put(q, last[q], at))

                sums = multiply(tile, ring, between)
                for q in range(len(last)):
                    late = (whole_steps(tile) <= q) & (waits > 0)
                    pl.when(late)(lambda q=q: put(q, last[q], at))
                return ring + tile[-1], _I32(1), place(tile), bands(tile, sums)

            if not tiles.late:
                lax.fori_loop(0, turns.mine, now, _I32(0))
            else:
                zeros = jnp.zeros((_WM, piece), out_dtype)
                if not interpret:
                    zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
                zero = _I32(0)
                none = [zeros] * (tiles.bn // piece)
                carry = (zero, zero, (zero, zero, zero), none)
                _, waits, at, last = lax.fori_loop(0, turns.mine, later, carry)

                @pl.when(waits > 0)
                def _():
                    for q, value in enumerate(last):
                        put(q, value, at)

            plgpu.wait_smem_to_gmem(0)

        def load():
            plgpu.set_max_registers(memory_registers, action="decrease")

            def arrived(step, lag):
                """What was asked for `lag` steps before `step` is there."""
                plgpu.barrier_arrive(full.at[slot_of(step - lag + stages)])

            def one(i, ring):
                _, m, n_tile, first, end, steps = tile_at(i)

                def find(step):
                    """Where the rows of a step lie: of each operand that comes by cp.async."""
                    return tuple(
                        inline_rows.find_wide_rows(
                            *(ids_ref if side.gathered else None, first + step * bk, end),
                            rows=bk,
                            per_row=side.wide // UNIT,
                            row_chunks=side.columns // UNIT,
                            top_k=layout.top_k,
                            num_pairs=layout.num_tokens * layout.top_k,
                            interpret=interpret,
                        )
                        for side, *_ in sides
                        if not side.by_tma
                    )

                def step(k, found):
                    at = ring + k
                    slot, rest = slot_of(at), list(found)
                    plgpu.barrier_wait(empty.at[slot])
                    for (side, ref, stage), like, tile in zip(
                        sides, likes, (m, n_tile), strict=True
                    ):
                        column = tile * side.wide
                        if side.by_tma:
                            rows = pl.ds(pl.multiple_of(first + k * bk, 8), bk)
                            source = ref.at[rows, pl.ds(column, side.wide)]
                            plgpu.copy_gmem_to_smem(source, stage.at[slot], full.at[slot])
                        else:
                            inline_rows.copy_wide_rows(
                                *(ref, stage.at[slot], like, rest.pop(0)),
                                lax.div(column, _I32(UNIT)),
                                rows=bk,
                                per_row=side.wide // UNIT,
                                row_chunks=side.columns // UNIT,
                                interpret=interpret,
                            )
                    if not by_copies:
                        return ()
                    inline.commit_copies(interpret=interpret)

                    @pl.when(at >= tiles.lag)
                    def _():
                        inline.wait_for_copies(tiles.lag, interpret=interpret)
                        arrived(at, tiles.lag)

                    # Ids of the next step are read while this one's rows are under way.
                    return find(jnp.minimum(k + 1, steps - 1))

                @pl.when(steps > 0)
                def _():
                    lax.fori_loop(0, steps, step, find(_I32(0)) if by_copies else ())

                return ring + steps

            end = lax.fori_loop(0, turns.mine, one, _I32(0))
            if by_copies:
                inline.wait_for_copies(0, interpret=interpret)
                for lag in range(tiles.lag, 0, -1):
                    pl.when(end >= lag)(lambda lag=lag: arrived(end, lag))
            # No barrier is left in the midst of a phase.
            for stage in range(stages):
                plgpu.barrier_wait(empty.at[slot_of(end + stage)])

        lax.cond(warpgroup < _COMPUTING, compute, load)

    options: dict[str, Any] = {"interpret": plgpu.InterpretGPUParams()} if interpret else {}
    arrivals = left.by_tma + right.by_tma + by_copies
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(out_shape, out_dtype),
        scratch_types=[
            plgpu.SMEM((stages, bk, tiles.bm), dtype, transforms=likes[0]),
            plgpu.SMEM((stages, bk, tiles.bn), dtype, transforms=likes[1]),
            plgpu.SMEM((_COMPUTING, _SLOTS, _WM, piece), out_dtype, transforms=o_like),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
            plgpu.Barrier(num_arrivals=_COMPUTING, num_barriers=stages),
            *([plgpu.SMEM(((_COMPUTING + 1) * _LISTED,), _I32)] if level else []),
        ],
        grid=(tiles.num_ctas,),
        grid_names=("cta",),
        num_threads=_COMPUTING + 1,
        thread_name="warpgroup",
        kernel_name="grouped_weight_gradient" + ("_of_pieces" if of_pieces else ""),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        **options,
    )
