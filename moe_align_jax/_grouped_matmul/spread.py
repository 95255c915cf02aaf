"""Copies of tokens' rows to the rows of their pairs: sizes, and what the kernel cannot take. No jax here."""

from typing import NamedTuple

from moe_align_jax._core.hopper import NUM_SMS
from moe_align_jax._core.int32 import INT32_MAX
from moe_align_jax._grouped_matmul.problem import MatmulProblem

DTYPES = ("bfloat16", "float16")
MAX_TOP_K = 64  # the loop over a token's pairs is unrolled
_MOST_BOX = 256  # of TMA, in each dimension
_ALIGNED = 64  # values in 128 bytes: where TMA writes, a row begins at a multiple of them
_SHARED_BYTES = 72 * 1024  # of shared memory of a CTA, of which an SM has three
_MOST_SLOTS, _LEAST_SLOTS = 12, 3


class Spread(NamedTuple):
    """What the copy of tokens' rows to those of their pairs has to do.

    Attributes:
        num_tokens, top_k, num_rows, width: T, K, P, H.
        dtype: of the rows.
    """

    num_tokens: int
    top_k: int
    num_rows: int
    width: int
    dtype: str

    @property
    def grain(self) -> int:
        """Values of a row that TMA counts along one dimension of a box."""
        return next(g for g in range(_MOST_BOX, 0, -8) if self.width % g == 0)

    def grained(self, num_rows: int) -> tuple[int, int, int]:
        """The shape of so many rows in the kernel."""
        return num_rows, self.width // self.grain, self.grain


class SpreadConfig(NamedTuple):
    """Sizes of that kernel.

    Attributes:
        slots: rows in shared memory.
        ahead: rows that are asked for ahead of the one that is stored.
        num_ctas: of the grid.
    """

    slots: int
    ahead: int
    num_ctas: int

    @property
    def name(self) -> str:
        """For tables."""
        return f"spread-{self.slots}-{self.ahead}-{self.num_ctas}"


def of(problem: MatmulProblem) -> Spread:
    """The copy ahead of a product."""
    sizes = problem.num_tokens, problem.top_k, problem.num_rows, problem.k
    return Spread(*sizes, problem.dtype)


def unsupported(problem: Spread) -> str | None:
    """Why the kernel does not take this problem, or None."""
    sizes = (problem.num_tokens, problem.top_k, problem.num_rows, problem.width)
    if not all(isinstance(size, int) for size in sizes):
        return "the kernel needs static shapes"
    if problem.dtype not in DTYPES or not 1 <= problem.top_k <= MAX_TOP_K:
        return f"the kernel copies {' and '.join(DTYPES)}, to at most {MAX_TOP_K} rows"
    if not problem.num_tokens * problem.num_rows or not problem.width or problem.width % _ALIGNED:
        return f"the kernel takes at least one row, of a multiple of {_ALIGNED} values"
    if problem.width // problem.grain > _MOST_BOX or _slots(problem) < _LEAST_SLOTS:
        return "the kernel takes rows that fit into shared memory several times"
    if problem.num_tokens * problem.top_k > INT32_MAX:
        return "the kernel counts pairs in int32"
    return None


def _slots(problem: Spread) -> int:
    """Rows that shared memory holds."""
    return min(_MOST_SLOTS, _SHARED_BYTES // (2 * problem.width))


def config_for(problem: Spread) -> SpreadConfig:
    """As many rows as fit, half of them on their way in."""
    slots = _slots(problem)
    return SpreadConfig(slots, max(1, slots // 2), min(problem.num_tokens, 3 * NUM_SMS))
