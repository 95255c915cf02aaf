"""What follows from a weight gradient and its tiles, and the kernel's memory: operands, results, scratch."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul import memory
from moe_align_jax._grouped_matmul.problem import WeightGradient
from moe_align_jax._grouped_matmul.weight_gradient_tiles import Tiles, levels

_I32 = jnp.int32
COMPUTING = 2  # warpgroups that multiply
SLOTS = 2  # bands of the result in shared memory, per warpgroup
LISTED = 64  # tiles of a CTA that are dealt, at most
WM = 64  # columns of lhs that a band of the result has, and a wgmma


class Operand(NamedTuple):
    """How the rows of lhs or of rhs come into shared memory.

    Attributes:
        columns: of the array.
        wide: columns of a tile.
        gathered: whether row r is that of a token, which sorted_token_ids name.
        by_tma: whether TMA loads whole tiles; otherwise cp.async copies row by row.
        like: the transforms of a tile in shared memory.
    """

    columns: int
    wide: int
    gathered: bool
    by_tma: bool
    like: tuple[Any, ...]


def _operand_of(problem: WeightGradient, tiles: Tiles, name: str) -> Operand:
    """How the kernel reads the operand of that name, "lhs" or "rhs"."""
    layout, gathered = problem.layout, problem.gathered == name
    columns, wide = (layout.k, tiles.bm) if name == "lhs" else (layout.n, tiles.bn)
    step = {"blocks": layout.block_size, "masked": layout.max_rows, "ragged": 1}[layout.rows]
    aligned = step % 8 == 0 and layout.num_rows % 8 == 0 and columns % 64 == 0
    # TMA's box is not larger than the array.
    holds = layout.num_rows >= tiles.bk and columns >= wide
    by_tma, like = aligned and holds and not gathered, memory.transforms(wide, layout.dtype)
    return Operand(columns, wide, gathered, by_tma, like)


class Plan(NamedTuple):
    """What follows from a problem and its tiles.

    Attributes:
        problem, tiles: what it follows from.
        of_pieces: whether the launch sums the pieces of hot experts.
        interpret: whether Pallas' interpreter runs it.
        sides: lhs and rhs.
        m_tiles, n_tiles: tiles of an expert's matrix, down and across.
        level: whether the first tiles are dealt.
        piece: columns of the result that are stored at a time, a band.
        out_shape: of the result; of pieces, whole tiles, so that they can be read without a look at the
            edges.
        by_rows: whether threads store the bands, row by row. TMA does where bands are whole, and the result
            has more than one: of a single one Mosaic drops the dimension of bands, and with it their index.
    """

    problem: WeightGradient
    tiles: Tiles
    of_pieces: bool
    interpret: bool
    sides: tuple[Operand, Operand]
    m_tiles: int
    n_tiles: int
    level: bool
    piece: int
    out_shape: tuple[int, ...]
    by_rows: bool

    @property
    def wm(self) -> int:
        """Columns of lhs that a warpgroup has."""
        return self.tiles.bm // COMPUTING

    @property
    def per_expert(self) -> int:
        """Tiles of an expert's matrix."""
        return self.m_tiles * self.n_tiles

    @property
    def total(self) -> int:
        """Tiles of all experts."""
        return self.problem.layout.num_experts * self.per_expert

    @property
    def by_copies(self) -> bool:
        """Whether rows come by cp.async."""
        return not all(side.by_tma for side in self.sides)


def plan_of(problem: WeightGradient, tiles: Tiles, of_pieces: bool, interpret: bool) -> Plan:
    """The sizes that follow from a problem and its tiles."""
    layout = problem.layout
    k, n = layout.k, layout.n
    piece = 128 // jnp.dtype(layout.out_dtype).itemsize
    m_tiles, n_tiles = -(-k // tiles.bm), -(-n // tiles.bn)
    out_shape = problem.out_shape
    if of_pieces:
        out_shape = layout.num_experts, m_tiles * tiles.bm, n_tiles * tiles.bn
    return Plan(
        problem=problem,
        tiles=tiles,
        of_pieces=of_pieces,
        interpret=interpret,
        sides=(_operand_of(problem, tiles, "lhs"), _operand_of(problem, tiles, "rhs")),
        m_tiles=m_tiles,
        n_tiles=n_tiles,
        level=levels(problem, tiles),
        piece=piece,
        out_shape=out_shape,
        by_rows=not of_pieces and (k % WM != 0 or n % piece != 0 or n == piece),
    )


class Refs:
    """The kernel's refs by name; None for those that there are not.

    Attributes:
        start, count, order: of the experts, see `weight_gradient_experts.Experts`.
        used: how many pieces there are.
        begin, end: the pieces of each expert.
        ids: sorted_token_ids.
        sides: lhs and rhs.
        sums: those of the pieces.
        out: the result.
        stages: the stages' tiles of lhs and of rhs.
        bands: of the result, in shared memory.
        full, empty: barriers of the stages.
        lists: of the tiles that are dealt.
    """

    def __init__(self, plan: Plan, given: Iterable[Any]):
        refs, problem, cut = iter(given), plan.problem, bool(plan.tiles.pieces)
        self.num_stages = plan.tiles.stages

        def take(wanted: Any = True) -> Any:
            """The launch's next ref; None where there is no such one."""
            return next(refs) if wanted else None

        self.start, self.count, self.order = take(), take(), take()
        self.used = take(plan.of_pieces)
        self.begin, self.end = take(cut), take(cut)
        self.ids = take(problem.gathered)
        self.sides = take(), take()
        self.sums = take(cut)
        self.out = take()
        # As `scratch` has it.
        self.stages = take(), take()
        self.bands = take()
        self.full, self.empty = take(), take()
        self.lists = take(plan.level)
        assert next(refs, None) is None, "the launch has more than the kernel takes"

    def slot_of(self, step: jax.Array) -> jax.Array:
        """The stage of a step of the ring."""
        return lax.rem(step, _I32(self.num_stages))


def scratch(plan: Plan) -> list[Any]:
    """Shared memory and barriers, in the order in which `Refs` takes them."""
    layout, stages = plan.problem.layout, plan.tiles.stages
    found: list[Any] = [
        plgpu.SMEM(
            (stages, plan.tiles.bk, side.wide), jnp.dtype(layout.dtype), transforms=side.like
        )
        for side in plan.sides
    ]
    like = memory.transforms(plan.piece, layout.out_dtype)
    bands = (COMPUTING, SLOTS, WM, plan.piece)
    found.append(plgpu.SMEM(bands, jnp.dtype(layout.out_dtype), transforms=like))
    arrivals = sum(side.by_tma for side in plan.sides) + plan.by_copies
    for count in (arrivals, COMPUTING):
        found.append(plgpu.Barrier(num_arrivals=count, num_barriers=stages))
    if plan.level:  # a list for each warpgroup
        found.append(plgpu.SMEM(((COMPUTING + 1) * LISTED,), _I32))
    return found
