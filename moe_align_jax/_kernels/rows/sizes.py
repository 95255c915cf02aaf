"""Sizes of the kernels that move rows, what they cannot take, and their grids. No Pallas here."""

from typing import NamedTuple

THREADS = 128  # of a CTA: one warpgroup
VECTOR_BYTES, WORD_BYTES = 16, 4
_INT32_MAX = 2**31 - 1
_NUM_SMS = 132  # of an H100 or H200; others run the same grid in more or fewer rounds

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
        return self.row_bytes // WORD_BYTES


def movable(dtype: str, row_bytes: int) -> bool:
    """Whether the kernel of the masked layout takes rows of this kind."""
    return dtype in COPIED and row_bytes > 0 and row_bytes % WORD_BYTES == 0


class MaskedCopy(NamedTuple):
    """What `permute_to_masked` has to do: T tokens of K pairs into e boxes of `room` rows.

    Attributes:
        num_tokens, top_k, num_experts, room: T, K, e, M.
        initialize: whether rows that are not in use become zero.
        leaves: the arrays whose rows move.
    """

    num_tokens: int
    top_k: int
    num_experts: int
    room: int
    initialize: bool
    leaves: tuple[Leaf, ...]

    @property
    def num_pairs(self) -> int:
        return self.num_tokens * self.top_k

    @property
    def num_rows(self) -> int:
        return self.num_experts * self.room


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
    sizes = (problem.num_tokens, problem.top_k, problem.num_experts, problem.room)
    if not all(isinstance(size, int) for size in sizes):
        return "the kernel needs static shapes"
    if problem.num_experts > MAX_EXPERTS:
        return f"the kernel takes at most {MAX_EXPERTS} experts; these are {problem.num_experts}"
    if not 1 <= problem.top_k <= MAX_TOP_K or not problem.num_tokens:
        return f"the kernel takes tokens of 1 to {MAX_TOP_K} pairs"
    if len(problem.leaves) > MAX_LEAVES:
        return f"the kernel takes at most {MAX_LEAVES} arrays; these are {len(problem.leaves)}"
    rows = max(problem.num_tokens, problem.num_rows)
    if rows * max([1, *(leaf.words for leaf in problem.leaves)]) > _INT32_MAX:
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
    parts = min(most, max(1, -(-_NUM_SMS * 4 // problem.num_tokens)))
    while parts < most and held_registers(problem, parts) > _MOST_HELD:
        parts += 1
    cells = problem.num_rows
    if problem.initialize:
        cells = max([cells, *(cells * leaf.units for leaf in problem.leaves)])
    wanted = max(problem.num_tokens * parts, -(-cells // (THREADS * _FILLED_PER_THREAD)))
    return CopyConfig(parts, min(wanted, _NUM_SMS * _CTAS_PER_SM))
