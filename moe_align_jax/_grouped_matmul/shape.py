"""What follows from a problem and its tiles: how memory is cut, and who has what. No jax here."""

from typing import NamedTuple

from moe_align_jax._grouped_matmul.config import Config, counts_rows, piece_rows, tests_rows
from moe_align_jax._grouped_matmul.problem import MatmulProblem

ROW_BYTES = 128  # of a row of a tile in shared memory
CHUNK_BYTES = 16
_BYTES = {"float8_e4m3fn": 1, "bfloat16": 2, "float16": 2, "float32": 4}


class Shape(NamedTuple):
    """What follows from a problem and its tiles.

    Attributes:
        columns: of the result that a tile has.
        n_tiles: tiles that the columns make.
        k_steps: stages of the ring that a tile takes; of a CTA, where several share its k.
        k_parts: tiles of 128 bytes of columns of x that a stage has.
        w_parts: tiles of the weights that a stage has; more than one where gate and up lie apart.
        parts: tiles of a block's rows; 0 where tiles come from a list, as those of several heights do.
        partial: whether a tile may end before its last row.
        wm, wn: a warpgroup's accumulator: rows and columns, of the tile or, swapped, of its transpose.
        accumulators: of a warpgroup: 2 where gate and up lie apart.
        piece: columns of the result that are stored at a time.
        piece_rows: rows of them: 64; of swapped tiles all, or half of many, which leaves room for a stage.
        parted: whether the kernel itself parts interleaved columns.
        tests_rows: whether sorted_token_ids say which rows of the result are zero.
        counts_rows: whether a tile's pairs are counted for that: they come first.
        reads_ids: whether they are read at all.
        x_by_rows, w_by_rows: loaded by cp.async, 16 bytes at a time.
        x_by_token: of each tile one row of x is loaded, by TMA; what the others hold is not used.
        scales_by_rows: of x, loaded by cp.async, one at a time.
        out_by_rows: stored 16 bytes at a time: TMA counts whole rows of 128 bytes, and needs two of them.
        store_rows: a tile's rows are stored so many at a time, and those of which none holds a pair are not;
            0: all of them at once.
    """

    columns: int
    n_tiles: int
    k_steps: int
    k_parts: int
    w_parts: int
    parts: int
    partial: bool
    wm: int
    wn: int
    accumulators: int
    piece: int
    piece_rows: int
    parted: bool
    tests_rows: bool
    counts_rows: bool
    reads_ids: bool
    x_by_rows: bool
    x_by_token: bool
    w_by_rows: bool
    scales_by_rows: bool
    out_by_rows: bool
    store_rows: int

    @property
    def by_copies(self) -> bool:
        """Whether anything is loaded by cp.async."""
        return self.x_by_rows or self.w_by_rows or self.scales_by_rows


def shape_of(problem: MatmulProblem, config: Config) -> Shape:
    """The sizes that follow from a problem and its tiles."""
    bm, bn, weights = config.bm, config.bn, problem.weights
    columns = bn // 2 if weights.gated else bn
    parted = weights.gated and weights.interleaved and not weights.transposed
    # Of weights [E, K, N], a tile's gate and up are two tiles in shared memory, for each warpgroup its own.
    apart = weights.gated and not weights.interleaved and not weights.transposed
    accumulators = 2 if apart else 1
    wm, wn = {
        "m": (bm // config.computing, bn // accumulators),
        "n": (bm, bn // config.computing // accumulators),
        "swap": (bn // config.computing // accumulators, bm),
    }[config.form]
    owners = 1 if config.form == "m" else config.computing
    row = ROW_BYTES // _BYTES[problem.dtype]
    out_row = ROW_BYTES // _BYTES[problem.out_dtype]
    blocks = problem.rows == "blocks" and not config.heights
    parts = -(-problem.block_size // bm) if blocks else 0
    tests, of_token = tests_rows(problem), by_token(problem, config)
    # Of a single piece, Mosaic leaves TMA's dimension out, and with it the index: pieces of a tile that
    # the result does not have would be stored over the one that it has.
    out_by_rows = problem.n % out_row != 0 or problem.n == out_row
    store_rows = 0 if out_by_rows else _store_rows(problem, config)
    return Shape(
        columns,
        -(-problem.n // columns),
        -(-problem.k // config.bk) // config.split,
        config.bk // row,
        accumulators * owners if apart else 1,
        parts,
        {
            "blocks": blocks and parts * bm != problem.block_size,
            "masked": problem.max_rows % bm != 0,
            "ragged": True,
        }[problem.rows],
        wm,
        wn,
        accumulators,
        out_row,
        _piece_rows(config),
        parted,
        tests,
        blocks and config.form == "swap" and bm > 64 and counts_rows(problem, bm),
        bool(
            (tests and not config.heights)
            or (problem.top_k and not of_token)
            or store_rows
            or (config.cuts and problem.rows == "blocks")
            or (parts > 1 and not problem.whole_blocks)
            or (blocks and config.skips and not problem.row_labels)
        ),
        (problem.top_k > 0 and not of_token) or problem.k % row != 0,
        of_token,
        (problem.k if weights.transposed else problem.n) % row != 0,
        _scales_by_rows(problem, config),
        out_by_rows,
        store_rows,
    )


def by_token(problem: MatmulProblem, config: Config) -> bool:
    """What `Shape.x_by_token` says: a gathered row whose token is known, which TMA can read."""
    known = problem.in_order and problem.top_k > 0 and problem.block_size == 1
    fits = config.form == "swap" and problem.k % 64 == 0 and not problem.scales
    return known and fits and problem.rows == "blocks"


def _piece_rows(config: Config) -> int:
    """What `Shape.piece_rows` says."""
    if config.form != "swap":
        return 64
    # Of higher tiles, halves of some heights are no multiple of 8; they leave no room for a stage.
    return config.bm if config.heights and config.bm > 144 else piece_rows(config.bm)


def _store_rows(problem: MatmulProblem, config: Config) -> int:
    """What `Shape.store_rows` says: a block that is one tile has its pairs in front."""
    bm = config.bm
    left = problem.leaves_padding and problem.rows == "blocks" and not problem.scales
    left = left and not config.heights
    whole = problem.block_size == bm == piece_rows(bm) and bm % 8 == 0 and bm > 8
    if not (left and whole and config.form == "swap") or config.late or config.split > 1:
        return 0
    return 16 if bm >= 32 and bm % 16 == 0 else 8


def has_scale_rows(problem: MatmulProblem) -> bool:
    """Whether each row of x has scales of its own."""
    return problem.scales is not None and problem.scales.x != "tensor"


def _scales_by_rows(problem: MatmulProblem, config: Config) -> bool:
    """TMA reads scales that lie next to each other, at a pitch of 16 bytes, of at least a tile's rows.

    Where a tile began between multiples of 4 rows (blocks of one), the H200 said "illegal instruction".
    """
    scales = problem.scales
    if not scales or not has_scale_rows(problem):
        return False
    if scales.x == "row_major" or problem.top_k or scales.pitch * 4 % CHUNK_BYTES:
        return True
    return scales.pitch < config.bm or problem.block_size % 4 != 0
