"""Named shapes and skews, their inputs, the NumPy answer, and the bytes that a call must move."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

# "zipf": expert of rank r drawn with weight 1/r; "zipf1.3": with 1/r**1.3.
_EXPONENTS = {"zipf": 1.0, "zipf1.3": 1.3}
SKEWS = ("uniform", *_EXPONENTS, "one")
_COVER = Path(__file__).resolve().parent.parent / "tests" / "cover.json"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input distribution.

    Attributes:
        num_pairs: n = tokens * top_k.
        num_experts: E.
        block_size: rows per block.
        top_k: the width of `topk_ids`; divides num_pairs.
        skew: "uniform", "zipf", "zipf1.3" or "one" (all to one expert).
        with_options: with an expert map that renames every expert before counting, a bound on the
            pairs that lets all through, and `row_of_pair`: the work of a plain call and the options'.
    """

    num_pairs: int
    num_experts: int
    block_size: int
    top_k: int = 8
    skew: str = "uniform"
    with_options: bool = False

    def __post_init__(self) -> None:
        if self.skew not in SKEWS:
            raise ValueError(f"Case: skew must be one of {SKEWS}; got {self.skew!r}.")
        if self.num_pairs % self.top_k:
            raise ValueError(f"Case: top_k must divide num_pairs; got {self.top_k}.")

    @property
    def name(self) -> str:
        suffix = "" if self.skew == "uniform" else f"-{self.skew}"
        suffix += "-options" * self.with_options
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
        words = self.num_pairs + self.capacity + self.num_blocks + 1 + self.num_experts
        if self.with_options:
            words += self.num_experts + 1 + self.num_pairs
        return 4 * words

    @property
    def expert_map(self) -> np.ndarray:
        """`[num_experts]` int32 of a case with options: every expert is here, under another id."""
        return np.arange(self.num_experts, dtype=np.int32)[::-1].copy()

    def topk_ids(self, seed: int) -> np.ndarray:
        """`[num_pairs / top_k, top_k]` int32, another sample per seed."""
        rng = np.random.default_rng([seed, self.num_pairs, self.num_experts])
        shape = (self.num_pairs // self.top_k, self.top_k)
        if self.skew == "one":
            return np.full(shape, seed % self.num_experts, np.int32)
        if self.skew == "uniform":
            return rng.integers(0, self.num_experts, shape, dtype=np.int32)
        weight = 1.0 / np.arange(1, self.num_experts + 1) ** _EXPONENTS[self.skew]
        order = rng.permutation(self.num_experts)
        drawn = rng.choice(self.num_experts, shape, p=weight / weight.sum())
        return order[drawn].astype(np.int32)


# The rows of the first H200 measurements.
_TABLE = (
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
    Case(num_pairs=8192, num_experts=1000, block_size=16),
    Case(num_pairs=32768, num_experts=256, block_size=64),
    Case(num_pairs=131072, num_experts=256, block_size=128),
    Case(num_pairs=524288, num_experts=256, block_size=128),
    Case(num_pairs=2097152, num_experts=256, block_size=128),
)
# Skews at the sizes where they hurt.
_SKEWED = tuple(
    Case(num_pairs=n, num_experts=256, block_size=128, skew=skew)
    for n in (131072, 524288)
    for skew in ("one", "zipf", "zipf1.3")
)
# More experts than vLLM's op takes (992), then than SGLang's does (1023).
_MANY_EXPERTS = tuple(
    Case(num_pairs=n, num_experts=num_experts, block_size=16)
    for num_experts in (1024, 2048, 4095, 9000, 65535)
    for n in (8, 64, 512, 8192, 131072)
)
# The skews that have a goal at the sizes of the other forms, which are measured plain above.
_SKEWED_FORMS = tuple(
    replace(case, skew=skew)
    for case in (*_TABLE, *_MANY_EXPERTS)
    for skew in ("one", "zipf1.3")
    if case.name
    in (
        *("32x256x16", "64x256x16", "512x256x16", "2048x128x64", "8192x64x128", "8192x1000x16"),
        *("64x9000x16", "512x9000x16", "8192x9000x16", "131072x9000x16"),
    )
)
_OPTIONS = tuple(
    Case(num_pairs=n, num_experts=num_experts, block_size=block, with_options=True)
    for n, num_experts, block in (
        *((8, 256, 16), (512, 256, 16), (2048, 128, 64), (8192, 64, 128)),
        *((32768, 256, 64), (131072, 256, 128)),
    )
)
GRIDS = {
    **{"table": _TABLE, "skew": _SKEWED, "skew_forms": _SKEWED_FORMS},
    **{"experts": _MANY_EXPERTS, "options": _OPTIONS},
}
CASES = tuple(case for grid in GRIDS.values() for case in grid)


def union_grid() -> list[Case]:
    """The sizes of the committed cover of what peers test and benchmark (tests/cover.json), each once."""
    sizes: dict[tuple[int, int, int], Case] = {}
    for row in json.loads(_COVER.read_text()):
        n, top_k = row["num_tokens"] * row["top_k"], row["top_k"]
        key = (n, row["num_experts"], row["block_size"])
        if n and key not in sizes:
            sizes[key] = Case(num_pairs=n, num_experts=key[1], block_size=key[2], top_k=top_k)
    return sorted(sizes.values(), key=lambda c: (c.num_pairs, c.num_experts, c.block_size))


@dataclass(frozen=True)
class Expected:
    """The contract's answer for one input, by NumPy: stable order within an expert."""

    sorted_token_ids: np.ndarray
    expert_ids: np.ndarray
    num_tokens_post_padded: int
    tokens_per_expert: np.ndarray
    row_of_pair: np.ndarray


def expected(case: Case, topk_ids: np.ndarray) -> Expected:
    """The answer, with nothing of ours in it."""
    flat, block = topk_ids.ravel(), case.block_size
    if case.with_options:
        flat = case.expert_map[flat]
    counts = np.bincount(flat, minlength=case.num_experts)
    padded = -(-counts // block) * block
    starts = np.cumsum(padded) - padded
    order = np.argsort(flat, kind="stable")
    rank = np.arange(flat.size) - (np.cumsum(counts) - counts)[flat[order]]
    sorted_token_ids = np.full(case.capacity, flat.size, np.int32)
    sorted_token_ids[starts[flat[order]] + rank] = order
    row_of_pair = np.empty(flat.size, np.int32)
    row_of_pair[order] = starts[flat[order]] + rank
    labels = np.repeat(np.arange(case.num_experts), padded // block)
    expert_ids = np.full(case.num_blocks, -1, np.int32)
    expert_ids[: labels.size] = labels
    total, counts = int(padded.sum()), counts.astype(np.int32)
    return Expected(sorted_token_ids, expert_ids, total, counts, row_of_pair)


def mismatch(
    case: Case,
    want: Expected,
    got: dict[str, np.ndarray],
    *,
    stable: bool = True,
    expert_tail: bool = True,
    row_tail: bool = True,
) -> str:
    """What is wrong with a result, "" when nothing is.

    Args:
        case: the shape.
        want: `expected(case, ids)`.
        got: int32 arrays "sorted_token_ids", "expert_ids", "num_tokens_post_padded" and, when the
            provider counts, "tokens_per_expert"; "row_of_pair" for a case with options. Buffers may
            be longer than ours.
        stable: whether the order within an expert must be ascending; otherwise any order passes.
        expert_tail: whether `expert_ids` past the last used block must be -1.
        row_tail: whether `sorted_token_ids` past the rows in use must hold the sentinel.
    """
    used = want.num_tokens_post_padded
    if int(got["num_tokens_post_padded"].ravel()[0]) != used:
        return f"num_tokens_post_padded is {got['num_tokens_post_padded'].ravel()[0]}, not {used}"
    blocks = case.num_blocks if expert_tail else used // case.block_size
    labels, want_labels = got["expert_ids"][:blocks], want.expert_ids[:blocks]
    if not np.array_equal(labels, want_labels):
        return f"expert_ids differ first at block {_first(labels, want_labels)}"
    rows = np.array(got["sorted_token_ids"])
    if not row_tail and rows.size >= case.capacity:
        rows[used:] = case.num_pairs
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
    if case.with_options and not np.array_equal(got["row_of_pair"], want.row_of_pair):
        return f"row_of_pair differ first at {_first(got['row_of_pair'], want.row_of_pair)}"
    return ""


def _first(a: np.ndarray, b: np.ndarray) -> int:
    if a.shape != b.shape:
        return min(a.size, b.size)
    return int(np.flatnonzero(a != b)[0])
