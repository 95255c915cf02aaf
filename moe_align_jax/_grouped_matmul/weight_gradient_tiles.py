"""Sizes of the kernel of the weights' gradient, and which problem gets which."""

from typing import NamedTuple

from moe_align_jax._core.hopper import NUM_SMS
from moe_align_jax._grouped_matmul import inline_wgmma
from moe_align_jax._grouped_matmul.problem import WeightGradient

STEPS_OF_PIECE = 8  # a piece has at least so many
# About as many tiles as this has each CTA if one expert has all rows, cut into pieces.
_TILES_PER_CTA = 4
_CLASSES = 4  # of CTAs, by the expert of their first tile, where tiles are leveled
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
        level: CTAs that have a short first tile take more tiles, until all have about as many rows, where
            `levels` says so; see `deal`. Where such tiles were dealt, the rounds behind them are taken from
            both ends in turn: a tile of few rows takes as long to store as one of many, and is stored between
            the products of the next one.
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


def tiles_for(problem: WeightGradient) -> Tiles:
    """The tiles for a problem, as measured on an H200."""
    # Last rows to 16, beside whole steps, us, 2026-11-29: 131072 rows, 7168 x 1024, 256
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
    back = 2 * tiles_per_expert(problem, tiles) <= tiles.num_ctas
    # Of as many tiles, threads copy one of 128 columns of rhs half as often: 262144 gathered rows, 512 x
    # 4096, 128 experts, us, 2026-11-30: 1853 for 2206.
    if problem.gathered == "rhs" and -(-problem.layout.k // tiles.bm) % 2 == 0:
        tiles = tiles._replace(bm=256, bn=128)
    return tiles._replace(group=group, back=back, level=True)


def tiles_per_expert(problem: WeightGradient, tiles: Tiles) -> int:
    """Tiles of an expert's matrix."""
    return -(-problem.layout.k // tiles.bm) * -(-problem.layout.n // tiles.bn)


def levels(problem: WeightGradient, tiles: Tiles) -> bool:
    """Whether the first tiles are dealt: `tiles.level` is on, and no expert is cut; the first round has tiles
    of 2 to `_CLASSES` experts, and more than one round follows: two rounds leave nothing to deal."""
    per_expert, ctas = tiles_per_expert(problem, tiles), tiles.num_ctas
    total = problem.layout.num_experts * per_expert
    can = per_expert < ctas <= _CLASSES * per_expert and total > 2 * ctas
    return tiles.level and not tiles.pieces and can


def cutting(problem: WeightGradient) -> Tiles:
    """`tiles_for`, with hot experts cut, where a matrix has so few tiles that it pays."""
    tiles, layout = tiles_for(problem), problem.layout
    pieces = tiles.num_ctas * _TILES_PER_CTA // tiles_per_expert(problem, tiles)
    pieces = min(pieces, layout.num_rows // (STEPS_OF_PIECE * tiles.bk))
    # An expert is cut if it has two pieces' rows: with two pieces, only if it has all.
    return tiles._replace(pieces=pieces) if pieces > 2 else tiles


def gathers_first(problem: WeightGradient) -> bool:
    """Whether rows are gathered by a launch before the kernel, which reads them once per tile of the other
    operand's columns."""
    other = problem.layout.n if problem.gathered == "lhs" else problem.layout.k
    return problem.gathered is not None and other >= _COLUMNS_TO_GATHER_FIRST
