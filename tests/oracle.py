"""The truth: alignment as slow plain-Python loops over Python ints, and the inputs to try it on.

`align` and `align_batched` are written from the contract alone and share nothing with the library.
`align_numpy` says the same in NumPy for large shapes; test_oracle.py holds it to `align`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

ID_DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
ROUTINGS = ("uniform", "zipf", "one", "distinct", "minus_30", "minus_all", "dropped", "outside")


class Expected(NamedTuple):
    """The fields of `AlignedBlocks`, in order, as flat sequences of ints."""

    sorted_token_ids: Any
    expert_ids: Any
    num_tokens_post_padded: Any
    tokens_per_expert: Any
    row_of_pair: Any = None


def capacity(num_pairs: int, block_size: int, num_experts: int, pad_sorted_ids: bool) -> int:
    rows = num_pairs + min(num_pairs, num_experts) * (block_size - 1)
    while pad_sorted_ids and rows % block_size:
        rows += 1
    return rows


def align(
    ids: Sequence[int],
    *,
    block_size: int,
    num_experts: int,
    expert_map: Sequence[int] | None = None,
    ignore_invalid_experts: bool = False,
    pad_sorted_ids: bool = False,
    num_valid_pairs: int | None = None,
    return_inverse: bool = False,
) -> Expected:
    ids = [int(x) for x in ids]
    local = None if expert_map is None else [int(x) for x in expert_map]
    groups: list[list[int]] = [[] for _ in range(num_experts)]
    for pair, expert in enumerate(ids):
        if num_valid_pairs is not None and pair >= num_valid_pairs:
            continue
        if not 0 <= expert < num_experts:
            continue
        if local is not None and ignore_invalid_experts:
            expert = local[expert]
            if not 0 <= expert < num_experts:
                continue
        groups[expert].append(pair)
    rows: list[int] = []
    blocks: list[int] = []
    for expert, pairs in enumerate(groups):
        label = expert
        if local is not None and not ignore_invalid_experts:
            label = local[expert] if 0 <= local[expert] < num_experts else -1
        for start in range(0, len(pairs), block_size):
            block = pairs[start : start + block_size]
            rows += block + [len(ids)] * (block_size - len(block))
            blocks.append(label)
    used = len(rows)
    total = capacity(len(ids), block_size, num_experts, pad_sorted_ids)
    rows += [len(ids)] * (total - used)
    blocks += [-1] * (-(-total // block_size) - len(blocks))
    inverse = None
    if return_inverse:
        inverse = [-1] * len(ids)
        for row, pair in enumerate(rows):
            if pair < len(ids):
                inverse[pair] = row
    return Expected(rows, blocks, [used], [len(g) for g in groups], inverse)


def align_batched(counts: Sequence[int], *, max_tokens_per_batch: int, block_size: int) -> Expected:
    sentinel = len(counts) * max_tokens_per_batch
    rows: list[int] = []
    blocks: list[int] = []
    kept = [min(max(int(c), 0), max_tokens_per_batch) for c in counts]
    for expert, count in enumerate(kept):
        for start in range(0, count, block_size):
            for i in range(start, start + block_size):
                rows.append(expert * max_tokens_per_batch + i if i < count else sentinel)
            blocks.append(expert)
    used = len(rows)
    total = len(counts) * -(-max_tokens_per_batch // block_size) * block_size
    rows += [sentinel] * (total - used)
    blocks += [-1] * (total // block_size - len(blocks))
    return Expected(rows, blocks, [used], kept)


def align_numpy(
    ids: Any,
    *,
    block_size: int,
    num_experts: int,
    expert_map: Any = None,
    ignore_invalid_experts: bool = False,
    pad_sorted_ids: bool = False,
    num_valid_pairs: int | None = None,
    return_inverse: bool = False,
) -> Expected:
    ids = np.asarray(ids).ravel()
    n = ids.size
    kept = (ids >= 0) & (ids < num_experts)
    if num_valid_pairs is not None:
        kept[max(num_valid_pairs, 0) :] = False
    expert = np.where(kept, ids, 0).astype(np.int64)
    local = None
    if expert_map is not None:
        local = np.array([x if 0 <= x < num_experts else -1 for x in map(int, expert_map)])
        if ignore_invalid_experts:
            expert = local[expert]
            kept &= expert >= 0
    pairs = np.flatnonzero(kept)
    pairs = pairs[np.argsort(expert[pairs], kind="stable")]
    counts = np.bincount(expert[kept], minlength=num_experts)
    blocks_each = -(-counts // block_size)
    starts = (np.cumsum(blocks_each) - blocks_each) * block_size
    rows = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(pairs.size)
    total = capacity(n, block_size, num_experts, pad_sorted_ids)
    sorted_ids = np.full(total, n)
    sorted_ids[rows] = pairs
    labels = np.arange(num_experts)
    if local is not None and not ignore_invalid_experts:
        labels = local
    used = np.repeat(labels, blocks_each)
    blocks = np.full(-(-total // block_size), -1)
    blocks[: used.size] = used
    inverse = None
    if return_inverse:
        inverse = np.full(n, -1)
        inverse[pairs] = rows
    return Expected(sorted_ids, blocks, [int(blocks_each.sum()) * block_size], counts, inverse)


def expected(ids: Any, **options: Any) -> Expected:
    """`align` where a loop is quick enough, otherwise `align_numpy`."""
    flat = np.asarray(ids).ravel()
    if flat.size <= 20_000 and options["num_experts"] <= 10_000:
        return align(flat.tolist(), **options)
    return align_numpy(flat, **options)


def assert_same(got: Any, want: Expected) -> None:
    """Every field bit for bit, int32, with the first bad coordinate."""
    assert (got.row_of_pair is None) == (want.row_of_pair is None), "row_of_pair"
    for field in Expected._fields:
        expect = getattr(want, field)
        if expect is None:
            continue
        have, expect = np.asarray(getattr(got, field)), np.asarray(expect, dtype=np.int64)
        assert have.dtype == np.int32, f"{field} is {have.dtype}"
        assert have.shape == expect.shape, f"{field} has shape {have.shape}, want {expect.shape}"
        bad = np.flatnonzero(have != expect)
        if bad.size:
            i = bad[0]
            raise AssertionError(
                f"{field}[{i}] is {have[i]}, want {expect[i]}; {bad.size} of {have.size} differ"
            )


# -- logical experts to physical slots -------------------------------------------------------------


def replica_by_hash(token: int, count: int) -> int:
    hashed = (token % 2**32 * 2654435761 % 2**32) >> 16
    return hashed * count >> 16


def physical_ids(
    ids: np.ndarray,
    physical: np.ndarray,
    dispatch: str,
    *,
    first_token: int = 0,
    static: Any = None,
    shared: int = 0,
) -> np.ndarray:
    """`ids` `[..., K]`, or one per token, by `physical` `[Ep]`: the map of one layer; `static` `[El]`."""
    slots: dict[int, list[int]] = {}
    for slot, expert in enumerate(physical.tolist()):
        slots.setdefault(expert, []).append(slot)
    top_k = ids.shape[-1] if ids.ndim > 1 else 1
    seen: dict[int, int] = {}
    out = []
    for pair, expert in enumerate(ids.ravel().tolist()):
        token, k = divmod(pair, top_k)
        if k >= top_k - shared:
            out.append(expert)
        elif expert not in slots:
            out.append(-1)
        elif dispatch == "static":
            out.append(int(static[expert]))
        else:
            mine = slots[expert]
            if dispatch == "dynamic":
                replica = replica_by_hash(first_token + token, len(mine))
            else:
                begin = replica_by_hash(first_token, len(mine))
                replica = (seen.get(expert, 0) + begin) % len(mine)
                seen[expert] = seen.get(expert, 0) + 1
            out.append(mine[replica])
    return np.array(out, np.int32).reshape(ids.shape)


# -- inputs ---------------------------------------------------------------------------------------


def route(
    routing: str, *, num_tokens: int, top_k: int, num_experts: int, dtype: str, seed: int
) -> np.ndarray:
    """`[num_tokens, top_k]` ids of `dtype`; ids that `dtype` cannot hold are brought into its range."""
    rng = np.random.default_rng(seed)
    shape = (num_tokens, top_k)
    info = np.iinfo(dtype)
    minus_one = (
        -1 if info.min < 0 else int(info.max)
    )  # an unsigned type has no -1: its largest value
    largest = min(num_experts - 1, int(info.max))
    ids = rng.integers(0, largest, shape, endpoint=True).astype(object)
    if routing == "zipf":
        weights = 1.0 / np.arange(1, num_experts + 1)
        ids = rng.choice(num_experts, shape, p=weights / weights.sum()).astype(object)
    elif routing == "one":
        ids[:] = int(rng.integers(0, largest, endpoint=True))
    elif routing == "distinct":
        step = np.arange(top_k) * max(1, num_experts // top_k)  # a row's ids differ where k <= E
        ids = ((rng.integers(0, num_experts, (num_tokens, 1)) + step) % num_experts).astype(object)
    elif routing == "minus_30":
        ids[rng.random(shape) < 0.3] = minus_one
    elif routing == "minus_all":
        ids[:] = minus_one
    elif routing in ("dropped", "outside"):
        # Values that a careless narrowing to int32 would bring back into range are among them.
        far = [-1, -num_experts, num_experts, num_experts + 1, info.min, info.max, 2**31, 2**32]
        far += [2**32 + num_experts // 2, -(2**32) + num_experts // 2, 2**63 + 1]
        far = [x for x in far if info.min <= x <= info.max and not 0 <= x < num_experts]
        if far:
            drop = np.ones(shape, bool) if routing == "dropped" else rng.random(shape) < 0.5
            ids[drop] = np.array(far, dtype=object)[rng.integers(0, len(far), int(drop.sum()))]
    elif routing != "uniform":
        raise ValueError(routing)
    return np.clip(ids, int(info.min), int(info.max)).astype(dtype)


def local_map(kind: str, num_experts: int, seed: int) -> np.ndarray | None:
    """`[num_experts]` int32: "second" keeps every second expert, "any" holds whatever may come."""
    if kind == "second":
        experts = np.arange(num_experts)
        return np.where(experts % 2 == 0, experts // 2, -1).astype(np.int32)
    if kind == "any":
        rng = np.random.default_rng(seed)
        return rng.integers(-3, num_experts + 3, num_experts).astype(np.int32)
    return None
