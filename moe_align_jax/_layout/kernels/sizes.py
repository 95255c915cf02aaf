"""Sizes of the kernels that move rows, what they cannot take, and their grids. No Pallas here."""

from typing import NamedTuple

from moe_align_jax._core.hopper import NUM_SMS
from moe_align_jax._core.int32 import INT32_MAX

THREADS = 128  # of a CTA: one warpgroup
VECTOR_BYTES, WORD_BYTES = 16, 4

# What the kernel of the masked layout can take.
MAX_EXPERTS = 4096  # a word of shared memory each
MAX_TOP_K = 32  # a lane per pair
MAX_LEAVES = 8
# dtypes that Mosaic takes as buffers in both jax releases.
COPIED = (
    *("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32)),
)
_MOST_HELD = 32  # registers of a thread for a row on its way
_CTAS_PER_SM = 8
_FILLED_PER_THREAD = 8


class Leaf(NamedTuple):
    """Rows of one array: its dtype, and the bytes of a row."""

    dtype: str
    row_bytes: int

    @property
    def unit_bytes(self) -> int:
        """Bytes that a thread moves at once."""
        return WORD_BYTES if self.row_bytes % VECTOR_BYTES else VECTOR_BYTES

    @property
    def units(self) -> int:
        """Moves of a row."""
        return self.row_bytes // self.unit_bytes

    @property
    def words(self) -> int:
        """Words of a row."""
        return self.row_bytes // WORD_BYTES


def movable(dtype: str, row_bytes: int) -> bool:
    """Whether the kernel of the masked layout takes rows of this kind."""
    return dtype in COPIED and row_bytes > 0 and row_bytes % WORD_BYTES == 0


class MaskedCopy(NamedTuple):
    """What `permute_to_masked` has to do: T tokens of K pairs into e boxes of M rows.

    Attributes:
        num_tokens, top_k, num_experts, rows_per_expert: T, K, e, M.
        initialize: whether rows that are not in use become zero.
        leaves: the arrays whose rows move.
    """

    num_tokens: int
    top_k: int
    num_experts: int
    rows_per_expert: int
    initialize: bool
    leaves: tuple[Leaf, ...]

    @property
    def num_pairs(self) -> int:
        """Pairs of all tokens."""
        return self.num_tokens * self.top_k

    @property
    def num_rows(self) -> int:
        """Rows of all boxes."""
        return self.num_experts * self.rows_per_expert


class CopyConfig(NamedTuple):
    """Sizes of the kernel of the masked layout.

    Attributes:
        parts: CTAs that a token's row is split over.
        num_ctas: CTAs of the grid.
    """

    parts: int
    num_ctas: int


def copy_unsupported(problem: MaskedCopy) -> str | None:
    """Why the kernel does not take this problem, or None."""
    sizes = (problem.num_tokens, problem.top_k, problem.num_experts, problem.rows_per_expert)
    if not all(isinstance(size, int) for size in sizes):
        return "the kernel needs static shapes"
    if problem.num_experts > MAX_EXPERTS:
        return f"the kernel takes at most {MAX_EXPERTS} experts; these are {problem.num_experts}"
    if not 1 <= problem.top_k <= MAX_TOP_K or not problem.num_tokens:
        return f"the kernel takes tokens of 1 to {MAX_TOP_K} pairs"
    if len(problem.leaves) > MAX_LEAVES:
        return f"the kernel takes at most {MAX_LEAVES} arrays; these are {len(problem.leaves)}"
    rows = max(problem.num_tokens, problem.num_rows)
    if rows * max([1, *(leaf.words for leaf in problem.leaves)]) > INT32_MAX:
        return "the kernel counts words in int32"
    return None


def held_registers(problem: MaskedCopy, parts: int) -> int:
    """Registers of a thread for its share of a token's row."""
    return sum(
        -(-leaf.units // (parts * THREADS)) * (leaf.unit_bytes // WORD_BYTES)
        for leaf in problem.leaves
    )


def copy_config(problem: MaskedCopy) -> CopyConfig:
    """Rows are split until a thread can hold its share, and until there are CTAs enough."""
    most = max([1, *(-(-leaf.units // THREADS) for leaf in problem.leaves)])
    parts = min(most, max(1, -(-NUM_SMS * 4 // problem.num_tokens)))
    while parts < most and held_registers(problem, parts) > _MOST_HELD:
        parts += 1
    cells = problem.num_rows
    if problem.initialize:
        cells = max([cells, *(cells * leaf.units for leaf in problem.leaves)])
    wanted = max(problem.num_tokens * parts, -(-cells // (THREADS * _FILLED_PER_THREAD)))
    return CopyConfig(parts, min(wanted, NUM_SMS * _CTAS_PER_SM))


# -- the weighted sum --------------------------------------------------------------------------------

SUMMED = ("bfloat16", "float16", "float32")
MAX_SUMMED_PAIRS = 64  # of a token: the loop over them is unrolled
_TILES = (1024, 512, 256, 128)
_MOST_WASTE = 1.15  # values that tiles take, per value of a row
_MAX_SUM_CTAS = 4096  # of a tile: more take turns
_SUM_HELD = 32  # registers of a thread for rows on their way


class RowSum(NamedTuple):
    """What the weighted sum has to do: T rows of H values, each the sum of up to K of P rows.

    Attributes:
        num_tokens, top_k, num_rows, width: T, K, P, H.
        dtype: of the rows.
        out_dtype: of the sums.
        weighted: whether there are weights.
    """

    num_tokens: int
    top_k: int
    num_rows: int
    width: int
    dtype: str
    out_dtype: str
    weighted: bool

    @property
    def item_bytes(self) -> int:
        """Bytes of a value."""
        return 4 if self.dtype == "float32" else 2

    @property
    def grain(self) -> int:
        """Values that are loaded at once, a thread's share of a tile. Rows are `[H / grain, grain]` in the
        kernel: so LLVM sees that its loads and stores are aligned."""
        return VECTOR_BYTES // self.item_bytes

    def grained(self, num_rows: int) -> tuple[int, int, int]:
        """The shape of so many rows in the kernel: a vector for each `grain` values."""
        return num_rows, self.width // self.grain, self.grain


class SumConfig(NamedTuple):
    """Sizes of the kernel of the weighted sum.

    Attributes:
        tile: values of a row that a CTA takes at a time.
        num_ctas: CTAs for each tile of a row.
        ahead: pairs of a token whose rows are asked for together.
    """

    tile: int
    num_ctas: int
    ahead: int

    def parts(self, problem: RowSum) -> int:
        """Tiles of a row."""
        return -(-problem.width // self.tile)


def sum_unsupported(problem: RowSum) -> str | None:
    """Why the kernel does not take this problem, or None."""
    sizes = (problem.num_tokens, problem.top_k, problem.num_rows, problem.width)
    if not all(isinstance(size, int) for size in sizes):
        return "the kernel needs static shapes"
    if problem.dtype not in SUMMED or problem.out_dtype not in SUMMED:
        return f"the kernel adds up {', '.join(SUMMED)}"
    if not 1 <= problem.top_k <= MAX_SUMMED_PAIRS or not problem.num_tokens * problem.num_rows:
        return f"the kernel takes tokens of 1 to {MAX_SUMMED_PAIRS} pairs, and at least one row"
    if problem.width < _TILES[-1] or problem.width * problem.item_bytes % VECTOR_BYTES:
        return f"the kernel takes rows of at least {_TILES[-1]} values, a multiple of 16 bytes"
    if max(problem.num_tokens, problem.num_rows) * problem.width > INT32_MAX:
        return "the kernel counts values in int32"
    return None


def sum_config(problem: RowSum) -> SumConfig:
    """The largest tile of 16 bytes a thread that wastes little; grid and depth by registers."""
    width = problem.width
    fitting = [n for n in _TILES if n <= min(width, THREADS * VECTOR_BYTES // problem.item_bytes)]
    tile = next((n for n in fitting if -(-width // n) * n <= _MOST_WASTE * width), fitting[-1])
    held = max(1, tile // THREADS * problem.item_bytes // WORD_BYTES)
    ahead = max(1, min(problem.top_k, _SUM_HELD // held))
    return SumConfig(tile, min(problem.num_tokens, _MAX_SUM_CTAS), ahead)
