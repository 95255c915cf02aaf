"""Named shapes and skews, their inputs, the NumPy answer, and the bytes that a call must move."""

from dataclasses import dataclass

import numpy as np

SKEWS = ("uniform", "zipf", "one")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input distribution.

    Attributes:
        num_pairs: n = tokens * top_k.
        num_experts: E.
        block_size: rows per block.
        top_k: the width of `topk_ids`; divides num_pairs.
        skew: "uniform", "zipf" (drawn with weights 1, 1/2, 1/3, ...) or "one" (all to one expert).
    """

    num_pairs: int
    num_experts: int
    block_size: int
    top_k: int = 8
    skew: str = "uniform"

    def __post_init__(self) -> None:
        if self.skew not in SKEWS:
            raise ValueError(f"Case: skew must be one of {SKEWS}; got {self.skew!r}.")
        if self.num_pairs % self.top_k:
            raise ValueError(f"Case: top_k must divide num_pairs; got {self.top_k}.")

    @property
    def name(self) -> str:
        suffix = "" if self.skew == "uniform" else f"-{self.skew}"
        return f"{self.num_pairs}x{self.num_experts}x{self.block_size}{suffix}"

    @property
    def capacity(self) -> int:
        """P, as vLLM 0.33 and we compute it (written out: the benchmark checks us, too)."""
        return self.num_pairs + min(self.num_pairs, self.num_experts) * (self.block_size - 1)

    @property
    def num_blocks(self) -> int:
        return -(-self.capacity // self.block_size)

    @property
    def bytes_moved(self) -> int:
        """Least traffic of one call: the ids read once, every output written once, all int32."""
        return 4 * (self.num_pairs + self.capacity + self.num_blocks + 1 + self.num_experts)

    def topk_ids(self, seed: int) -> np.ndarray:
        """`[num_pairs / top_k, top_k]` int32, another sample per seed."""
        rng = np.random.default_rng([seed, self.num_pairs, self.num_experts])
        shape = (self.num_pairs // self.top_k, self.top_k)
        if self.skew == "one":
            return np.full(shape, seed % self.num_experts, np.int32)
        if self.skew == "uniform":
            return rng.integers(0, self.num_experts, shape, dtype=np.int32)
        weight = 1.0 / np.arange(1, self.num_experts + 1)
        order = rng.permutation(self.num_experts)
        drawn = rng.choice(self.num_experts, shape, p=weight / weight.sum())
        return order[drawn].astype(np.int32)


# The rows of the first H200 measurements, then skews at the sizes where they hurt.
CASES = (
    Case(num_pairs=8, num_experts=256, block_size=16),
    Case(num_pairs=32, num_experts=256, block_size=16),
    Case(num_pairs=64, num_experts=256, block_size=16),
    Case(num_pairs=512, num_experts=256, block_size=16),
    Case(num_pairs=512, num_experts=64, block_size=16),
    Case(num_pairs=1000, num_experts=60, block_size=16),
    Case(num_pairs=1024, num_experts=256, block_size=64),
    Case(num_pairs=2048, num_experts=128, block_size=64),
    Case(num_pairs=4096, num_experts=256, block_size=64),
    Case(num_pairs=8192, num_experts=64, block_size=128, top_k=2),
    Case(num_pairs=8192, num_experts=8, block_size=128, top_k=2),
    Case(num_pairs=32768, num_experts=256, block_size=64),
    Case(num_pairs=131072, num_experts=256, block_size=128),
    Case(num_pairs=131072, num_experts=256, block_size=128, skew="one"),
    Case(num_pairs=524288, num_experts=256, block_size=128),
    Case(num_pairs=524288, num_experts=256, block_size=128, skew="zipf"),
)

# Device span per call under jit that the project set itself (a prototype on an H200, jax 0.11.2,
# 2026-11-21); the product may take 15% more.
JIT_GOAL_US = {
    "8x256x16": 1.24,
    "512x256x16": 2.19,
    "2048x128x64": 2.72,
    "8192x64x128": 3.22,
    "32768x256x64": 4.65,
    "131072x256x128": 6.58,
    "524288x256x128": 10.3,
}


@dataclass(frozen=True)
class Expected:
    """The contract's answer for one input, by NumPy: stable order within an expert."""

    sorted_token_ids: np.ndarray
    expert_ids: np.ndarray
    num_tokens_post_padded: int
    tokens_per_expert: np.ndarray


def expected(case: Case, topk_ids: np.ndarray) -> Expected:
    """The answer, with nothing of ours in it."""
    flat, block = topk_ids.ravel(), case.block_size
    counts = np.bincount(flat, minlength=case.num_experts)
    padded = -(-counts // block) * block
    starts = np.cumsum(padded) - padded
    order = np.argsort(flat, kind="stable")
    rank = np.arange(flat.size) - (np.cumsum(counts) - counts)[flat[order]]
    sorted_token_ids = np.full(case.capacity, flat.size, np.int32)
    sorted_token_ids[starts[flat[order]] + rank] = order
    labels = np.repeat(np.arange(case.num_experts), padded // block)
    expert_ids = np.full(case.num_blocks, -1, np.int32)
    expert_ids[: labels.size] = labels
    return Expected(sorted_token_ids, expert_ids, int(padded.sum()), counts.astype(np.int32))


def mismatch(
    case: Case,
    want: Expected,
    got: dict[str, np.ndarray],
    *,
    stable: bool = True,
    expert_tail: bool = True,
) -> str:
    """What is wrong with a result, "" when nothing is.

    Args:
        case: the shape.
        want: `expected(case, ids)`.
        got: int32 arrays "sorted_token_ids", "expert_ids", "num_tokens_post_padded" and, when the
            provider counts, "tokens_per_expert". Buffers may be longer than ours.
        stable: whether the order within an expert must be ascending; otherwise any order passes.
        expert_tail: whether `expert_ids` past the last used block must be -1.
    """
    used = want.num_tokens_post_padded
    if int(got["num_tokens_post_padded"].ravel()[0]) != used:
        return f"num_tokens_post_padded is {got['num_tokens_post_padded'].ravel()[0]}, not {used}"
    blocks = case.num_blocks if expert_tail else used // case.block_size
    labels, want_labels = got["expert_ids"][:blocks], want.expert_ids[:blocks]
    if not np.array_equal(labels, want_labels):
        return f"expert_ids differ first at block {_first(labels, want_labels)}"
    rows = np.array(got["sorted_token_ids"])
    if rows.size < case.capacity or (rows[case.capacity :] != case.num_pairs).any():
        return "sorted_token_ids is too short, or its end is not the sentinel"
    rows = rows[: case.capacity]
    if not stable:
        if used and not 0 <= rows[:used].min() <= rows[:used].max() <= case.num_pairs:
            return "sorted_token_ids holds neither pair nor sentinel"
        # Ascending within each expert; the sentinel is the largest value, so padding goes last.
        expert = np.repeat(want.expert_ids[: used // case.block_size], case.block_size)
        offset = expert.astype(np.int64) * (case.num_pairs + 1)
        rows[:used] = np.sort(offset + rows[:used]) - offset
    if not np.array_equal(rows, want.sorted_token_ids):
        return f"sorted_token_ids differ first at row {_first(rows, want.sorted_token_ids)}"
    counts = got.get("tokens_per_expert")
    if counts is not None and not np.array_equal(counts, want.tokens_per_expert):
        return f"tokens_per_expert differ first at {_first(counts, want.tokens_per_expert)}"
    return ""


def _first(a: np.ndarray, b: np.ndarray) -> int:
    if a.shape != b.shape:
        return min(a.size, b.size)
    return int(np.flatnonzero(a != b)[0])
