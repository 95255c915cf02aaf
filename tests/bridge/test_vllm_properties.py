"""The properties that vLLM's test_moe_align_block_size.py asserts, over its grids, on ours.

Its assertions are those of `properties.assert_aligned`, with any order within an expert; ours is
ascending. Its large shapes, and most of the grid, run on a GPU.
"""

import numpy as np
import pytest
import torch

from tests import oracle
from tests.bridge import properties
from tests.bridge.test_vllm import vllm_rows
from torch_bridge import vllm

GRID = {
    "num_tokens": [1, 3, 256, 2256, 4096],
    "top_k": [1, 2, 16, 32],
    "num_experts": [32, 160, 256, 257],
    "block_size": [32, 128],
    "pad": [False, True],
}
MAP_GRID = {
    "num_tokens": [16, 32, 2048],
    "top_k": [2, 4],
    "num_experts": [8, 64],
    "ignore": [False, True],
}
BATCHED_GRID = {
    "max_tokens": [13, 16, 512],
    "num_experts": [8, 16, 32, 64],
    "block_size": [8, 16, 32, 64],
    "half_empty": [False, True],
}


@properties.on_devices(GRID, cpu=16, gpu=40, seed=1)
def test_moe_align_block_size(device, num_tokens, top_k, num_experts, block_size, pad):
    array = properties.distinct_ids(num_tokens, top_k, num_experts, seed=num_tokens + top_k)
    ids = properties.place(array, device)
    got = vllm.moe_align_block_size(ids, block_size, num_experts, pad_sorted_ids=pad)
    rows = vllm_rows(array.size, num_experts, block_size, pad)
    properties.assert_aligned(
        got,
        array,
        block_size=block_size,
        labels=np.arange(num_experts),
        rows=rows,
        blocks=-(-rows // block_size),
    )


@properties.on_devices(MAP_GRID, cpu=6, gpu=12, seed=3)
def test_expert_map(device, num_tokens, top_k, num_experts, ignore):
    block_size = 64
    array = properties.distinct_ids(num_tokens, top_k, num_experts, seed=num_tokens)
    local = oracle.local_map("second", num_experts, 0)
    ids, given = properties.place(array, device), properties.place(local, device)
    got = vllm.moe_align_block_size(
        ids, block_size, num_experts, given, ignore_invalid_experts=ignore
    )
    rows = vllm_rows(array.size, num_experts, block_size, False)
    properties.assert_aligned(
        got,
        local[array] if ignore else array,
        block_size=block_size,
        labels=np.arange(num_experts) if ignore else local,
        rows=rows,
        blocks=-(-rows // block_size),
    )
    live = got[1][: got[2].item() // block_size].cpu()
    assert not ignore or (live >= 0).all()  # filtered: no -1 among the blocks in use


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("num_tokens, top_k, num_experts", [(128, 2, 32), (4096, 8, 256)])
def test_deterministic(device, num_tokens, top_k, num_experts):
    """Theirs holds for the first, small shape; ours for any."""
    rng = np.random.default_rng(42)
    array = rng.integers(0, num_experts, (num_tokens, top_k)).astype(np.int32)
    ids = properties.place(array, device)
    results = [vllm.moe_align_block_size(ids, 64, num_experts) for _ in range(5)]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    assert results[0][2].item() >= array.size


@properties.on_devices(BATCHED_GRID, cpu=14, gpu=40, seed=5)
def test_batched(device, max_tokens, num_experts, block_size, half_empty):
    rng = np.random.default_rng(max_tokens + num_experts)
    counts = rng.integers(0, max_tokens, num_experts).astype(np.int32)
    if half_empty:
        counts[rng.permutation(num_experts)[: num_experts // 2]] = 0
    got = vllm.batched_moe_align_block_size(
        max_tokens, block_size, properties.place(counts, device)
    )
    want = oracle.align_batched(counts, max_tokens_per_batch=max_tokens, block_size=block_size)
    for tensor, expect in zip(got, want[:3], strict=True):
        np.testing.assert_array_equal(tensor.cpu().numpy(), expect)


def _swap(values, i, j):
    values[[i, j]] = values[[j, i]]


# A right result (17 pairs, E 4, blocks of 4), made wrong: which of the three, and how.
WRONG = {
    "pairs of two experts swapped": (0, lambda x: _swap(x, 0, 8)),
    "order within an expert": (0, lambda x: _swap(x, 0, 1)),
    "padding ahead of a pair": (0, lambda x: _swap(x, 5, 6)),
    "a pair twice": (0, lambda x: x.__setitem__(1, x[0])),
    "a pair lost": (0, lambda x: x.__setitem__(0, 17)),
    "another sentinel": (0, lambda x: x.__setitem__(x == 17, 18)),
    "tail not filled": (0, lambda x: x.__setitem__(-1, 0)),
    "an expert's block": (1, lambda x: x.__setitem__(0, 1)),
    "expert_ids' tail": (1, lambda x: x.__setitem__(-1, 0)),
    "the count": (2, lambda x: x.add_(4)),
}


@pytest.mark.parametrize("wrong", [None, *WRONG])
def test_the_check_finds_what_is_wrong(wrong):
    array = np.array([0, 1, 2, 3, 0, 1, 0, 0, 0, 3, 3, 1, 1, 1, 2, 0, 2])
    got = vllm.moe_align_block_size(torch.from_numpy(array), 4, 4)
    assert got[2].item() == 24 and got[0][4:8].tolist() == [8, 15, 17, 17]
    options = {"block_size": 4, "labels": np.arange(4), "rows": 29, "blocks": 8}
    if wrong is None:
        properties.assert_aligned(got, array, **options)
        return
    which, change = WRONG[wrong]
    change(got[which])
    with pytest.raises(AssertionError):
        properties.assert_aligned(got, array, **options)
