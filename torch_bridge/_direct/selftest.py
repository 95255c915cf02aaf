"""What a compiled program is tested with before its first use: random inputs, and NumPy's results.

`compile_worker.py` loads this file by path, in a process that imports no torch.
"""

from typing import Any, NamedTuple

import numpy as np


class Example(NamedTuple):
    """One input of a program, and what it must give.

    Attributes:
        inputs: an array for each operand.
        sizes: a number for each size that the launch gives.
        expected: an array for each result, by NumPy.
    """

    inputs: dict[str, Any]
    sizes: dict[str, int]
    expected: dict[str, Any]


def align_example(problem: Any, n: int, seed: int) -> Example:
    """An alignment of random ids, some of them out of range, with a random map and a bound if it has them.

    Args:
        problem: the `AlignProblem` of the program.
        n: pairs; those of a problem that is not sized at launch are its own.
        seed: of the random numbers.
    """
    from moe_align_jax._core import checks

    num_experts, block_size = problem.num_experts, problem.block_size
    rng = np.random.default_rng(seed)
    capacity = problem.capacity
    if problem.sized_at_launch:
        capacity = checks.capacity(
            n, block_size=block_size, num_experts=num_experts, pad_sorted_ids=False
        )
    shift = 1 if problem.minus_one else 0
    ids = rng.integers(-2, num_experts + 2, n) - shift
    expert_map = rng.integers(-2, num_experts + 1, num_experts)
    limit = n - n // 8 if problem.has_num_valid_pairs else n

    group = ids + shift
    kept = (group >= 0) & (group < num_experts) & (np.arange(n) < limit)
    group = np.where(kept, group, 0)
    if problem.expert_map == "filter":
        group = expert_map[group]
        kept &= (group >= 0) & (group < problem.num_mapped)
    group = np.where(kept, group, num_experts)
    counts = np.bincount(group, minlength=num_experts + 1)[:num_experts]
    padded = -(-counts // block_size) * block_size
    start, before = np.cumsum(padded) - padded, np.cumsum(counts) - counts
    order = np.argsort(group, kind="stable")[: counts.sum()]
    rows = start[group[order]] + np.arange(order.size) - before[group[order]]
    label = np.arange(num_experts) - shift
    if problem.expert_map == "label":
        label = np.where((expert_map >= 0) & (expert_map < num_experts), expert_map, -1)
    used = np.repeat(label, padded // block_size)
    want = {
        "sorted_token_ids": np.full(capacity, n),
        "expert_ids": np.full(-(-capacity // block_size), -1),
        "num_tokens_post_padded": padded.sum(keepdims=True),
        "tokens_per_expert": counts,
        "row_of_pair": np.full(n, -1),
    }
    want["sorted_token_ids"][rows] = order
    want["expert_ids"][: used.size] = used
    want["row_of_pair"][order] = rows

    first_id = 3 if problem.sized_at_launch else 0
    held = np.zeros(n + first_id, np.int64 if problem.id_words == 2 else np.int32)
    held[first_id:] = ids
    inputs = {
        "topk_ids": held,
        "expert_map": expert_map.astype(np.int32),
        "num_valid_pairs": np.array([limit], np.int32),
    }
    sizes = {"num_pairs": n, "capacity": capacity, "first_id": first_id}
    return Example(inputs, sizes, want)


def batched_example(problem: Any, seed: int) -> Example:
    """A batched alignment of random counts, some of them out of range; arguments as for `align_example`."""
    most, block_size = problem.max_tokens_per_batch, problem.block_size
    given = np.random.default_rng(seed).integers(-2, most + 3, problem.num_experts)
    counts = np.clip(given, 0, most)
    padded = -(-counts // block_size) * block_size
    want = {
        "sorted_token_ids": np.full(problem.capacity, problem.num_pairs),
        "expert_ids": np.full(problem.num_blocks, -1),
        "num_tokens_post_padded": padded.sum(keepdims=True),
        "tokens_per_expert": counts,
    }
    start = np.cumsum(padded) - padded
    expert = np.repeat(np.arange(problem.num_experts), counts)
    within = np.arange(expert.size) - (np.cumsum(counts) - counts)[expert]
    want["sorted_token_ids"][start[expert] + within] = expert * most + within
    blocks = np.repeat(np.arange(problem.num_experts), padded // block_size)
    want["expert_ids"][: blocks.size] = blocks
    return Example({"expert_num_tokens": given.astype(np.int32)}, {}, want)
