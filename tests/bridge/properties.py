"""What the peers' own tests assert of an alignment, as one check; and selections of their grids."""

import itertools
import math
import random

import numpy as np
import pytest
import torch


def thin(grid: dict[str, list], count: int, seed: int) -> list[tuple]:
    """`count` cells of the grid or fewer, in which each level of each factor comes about equally often.

    The whole grid where it is no larger.
    """
    if math.prod(map(len, grid.values())) <= count:
        return list(itertools.product(*grid.values()))
    rng = random.Random(seed)
    columns = []
    for levels in grid.values():
        rounds = [rng.sample(levels, len(levels)) for _ in range(-(-count // len(levels)))]
        columns.append([level for one in rounds for level in one][:count])
    return list(dict.fromkeys(zip(*columns, strict=True)))


def on_devices(grid: dict[str, list], *, cpu: int, gpu: int, seed: int):
    """Parametrizes `device` and the grid's factors: a few cells on a CPU, more on a GPU."""

    def name(device, cell):
        return "-".join([device, *(f"{x}" for x in cell)])

    cells = [pytest.param("cpu", *cell, id=name("cpu", cell)) for cell in thin(grid, cpu, seed)] + [
        pytest.param("cuda", *cell, id=name("cuda", cell), marks=pytest.mark.gpu)
        for cell in thin(grid, gpu, seed + 1)
    ]
    return pytest.mark.parametrize(["device", *grid], cells)


def place(array: np.ndarray, device: str) -> torch.Tensor:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return torch.from_numpy(array.copy()).to(device)


def distinct_ids(num_tokens, top_k, num_experts, seed, dtype=np.int32) -> np.ndarray:
    """`[num_tokens, top_k]`, each row without repetition, as a router gives them."""
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :top_k].astype(dtype)


def assert_aligned(
    got, buckets: np.ndarray, *, block_size: int, labels: np.ndarray, rows: int, blocks: int
) -> None:
    """The contract in array form, from the ids alone.

    Args:
        got: sorted_token_ids, expert_ids, num_tokens_post_pad.
        buckets: the bucket of each pair; outside [0, len(labels)) it is dropped.
        labels: what the blocks of each bucket read.
        rows, blocks: lengths of the first two.
    """
    assert [x.dtype for x in got] == [torch.int32] * 3
    sorted_ids, expert_ids, count = (x.cpu().numpy() for x in got)
    buckets = buckets.ravel().astype(np.int64)
    n, kept = buckets.size, (buckets >= 0) & (buckets < len(labels))
    assert sorted_ids.shape == (rows,) and expert_ids.shape == (blocks,)

    counts = np.bincount(buckets[kept], minlength=len(labels))
    used = -(-counts // block_size)
    post_pad = int(used.sum()) * block_size
    assert count[0] == post_pad
    assert post_pad % block_size == 0 and kept.sum() <= post_pad <= rows

    tail = np.full(blocks - used.sum(), -1)
    np.testing.assert_array_equal(expert_ids, np.concatenate([np.repeat(labels, used), tail]))

    # Each kept pair once; all else is the sentinel, to the very end.
    live, padding = sorted_ids[:post_pad], sorted_ids[post_pad:]
    np.testing.assert_array_equal(np.sort(live[live < n]), np.flatnonzero(kept))
    assert live.max(initial=0) <= n and (padding == n).all()

    # Each row belongs to its block's bucket: the pairs ascend there, and padding comes last.
    owner = np.repeat(np.arange(len(labels)), used * block_size)
    np.testing.assert_array_equal(buckets[live[live < n]], owner[live < n])
    step, inside = np.diff(live), np.diff(owner) == 0
    assert (((step > 0) | (live[1:] == n)) & (step >= 0))[inside].all()
