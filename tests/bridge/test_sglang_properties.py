"""The properties that SGLang's tests of moe_align_block_size assert, over their grids, on ours.

Grids of its test_moe_align_block_size.py, test_moe_align_small_numel.py and test_moe_align_v2.py.
Its buckets are id + 1, so that id -1 is bucket 0, whose blocks read -1.
"""

import numpy as np
import pytest
import torch

from tests.bridge import properties
from torch_bridge import sglang

POWERS = [2**i for i in range(13)]
GRID = {
    "block_size": [32, 64, 128, 256],
    "num_tokens": POWERS,
    "top_k": [1, 2, 4, 8, 16, 32, 64],
    "num_experts": [64, 128, 160, 256, 257, 260, 264],
    "pad": [False, True],
}
# The cells that its CI runs when it runs only a few.
CHOSEN = [
    (32, 1, 1, 64, True),
    (128, 48, 1, 128, True),
    (256, 103, 4, 256, False),
    (128, 128, 1, 256, True),
    (256, 4096, 8, 256, False),
]
LARGE_GRID = {
    "block_size": [64, 128],
    "num_tokens": [1, 8, 32, 256],
    "num_experts": [1025, 2048, 4095],
}
SMALL_GRID = {
    "block_size": [16, 32, 64, 128],
    "num_experts": [8, 64, 65, 129, 1024, 9000, 65535],
    "top_k": [1, 2, 4, 6, 8],
    "num_tokens": [1, 4, 8],
    "minus": [0.0, 0.3, 1.0],
}
BULK_GRID = {
    "num_experts": [8, 64, 256, 1023],
    "top_k": [1, 2, 8],
    "num_tokens": [16, 128, 512, 4096],
    "minus": [0.0, 0.3, 1.0],
    "ignore": [False, True],
}


def op_rows(numel, num_experts, block_size):
    """Rows as its tests allocate them for the op; its blocks are the whole ones among them."""
    if numel < num_experts + 1:
        return numel * block_size
    return numel + (num_experts + 1) * (block_size - 1)


def random_ids(num_tokens, top_k, num_experts, minus, seed):
    rng = np.random.default_rng(seed)
    array = rng.integers(0, num_experts, (num_tokens, top_k)).astype(np.int32)
    array[rng.random(array.shape) < minus] = -1
    return array


def check_op(device, array, num_experts, block_size, pad, ignore=False):
    """The in-place op on buffers that its own tests would allocate, poisoned."""
    rows = op_rows(array.size, num_experts, block_size)
    sizes = (rows, rows // block_size, 1, num_experts + 2)
    ids = properties.place(array, device)
    buffers = [torch.full((s,), -7777, dtype=torch.int32, device=device) for s in sizes]
    sglang.ops_moe_align_block_size(ids, num_experts + 1, block_size, *buffers, pad, ignore)
    buckets = array.astype(np.int64) + 1
    properties.assert_aligned(
        buffers[:3],
        np.where(ignore & (array < 0), -1, buckets),
        block_size=block_size,
        labels=np.arange(-1, num_experts),
        rows=rows,
        blocks=rows // block_size,
    )
    return buffers[:3]


def check_function(device, array, num_experts, block_size, ignore=False):
    rows = -(-op_rows(array.size, num_experts, block_size) // 4) * 4
    ids = properties.place(array, device)
    got = sglang.moe_align_block_size(
        ids, block_size, num_experts, ignore, return_inactive_prefix_count=True
    )
    buckets = array.astype(np.int64) + 1
    properties.assert_aligned(
        got,
        np.where(ignore & (array < 0), -1, buckets),
        block_size=block_size,
        labels=np.arange(-1, num_experts),
        rows=rows,
        blocks=-(-rows // block_size),
    )
    inactive = 0 if ignore else -(-int((array == -1).sum()) // block_size)
    assert got[2].tolist()[1:] == [inactive]


@properties.on_devices(GRID, cpu=14, gpu=30, seed=11)
def test_compiled_op(device, block_size, num_tokens, top_k, num_experts, pad):
    array = properties.distinct_ids(num_tokens, top_k, num_experts, top_k, dtype=np.int64)
    check_op(device, array, num_experts, block_size, pad)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("block_size, num_tokens, top_k, num_experts, pad", CHOSEN)
def test_chosen_cells(device, block_size, num_tokens, top_k, num_experts, pad):
    array = properties.distinct_ids(num_tokens, top_k, num_experts, top_k, dtype=np.int64)
    check_op(device, array, num_experts, block_size, pad)
    check_function(device, array, num_experts, block_size)


@properties.on_devices(LARGE_GRID, cpu=5, gpu=8, seed=13)
def test_more_than_1024_experts(device, block_size, num_tokens, num_experts):
    array = random_ids(num_tokens, 8, num_experts, 0.0, seed=num_tokens)
    check_op(device, array, num_experts, block_size, True)


@properties.on_devices(SMALL_GRID, cpu=10, gpu=20, seed=15)
def test_few_pairs(device, block_size, num_experts, top_k, num_tokens, minus):
    array = random_ids(num_tokens, top_k, num_experts, minus, seed=num_tokens)
    check_function(device, array, num_experts, block_size)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("numel", [63, 64, 65])
def test_where_its_small_kernel_ends(device, numel):
    array = random_ids(numel, 1, 129, 0.3, seed=numel)
    check_function(device, array, 129, 16)
    check_op(device, array, 129, 16, False)


@properties.on_devices(BULK_GRID, cpu=8, gpu=20, seed=17)
def test_bulk_with_inactive_pairs(device, num_experts, top_k, num_tokens, minus, ignore):
    array = random_ids(num_tokens, top_k, num_experts, minus, seed=num_tokens)
    check_function(device, array, num_experts, 64, ignore)


@pytest.mark.parametrize(
    "device, repeats", [("cpu", 4), pytest.param("cuda", 20, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize(
    "num_tokens, top_k, num_experts, half_inactive",
    [(128, 2, 32, False), (4097, 16, 128, False), (2048, 8, 128, True)],
)
def test_deterministic(device, repeats, num_tokens, top_k, num_experts, half_inactive):
    array = properties.distinct_ids(num_tokens, top_k, num_experts, seed=42)
    if half_inactive:
        array[:, top_k // 2 :] = -1
    first = check_op(device, array, num_experts, 64, True)
    ids = properties.place(array, device)
    for _ in range(repeats - 1):
        sizes = [x.numel() for x in first]
        again = [torch.full((s,), -7777, dtype=torch.int32, device=device) for s in sizes]
        scratch = torch.empty(num_experts + 2, dtype=torch.int32, device=device)
        sglang.ops_moe_align_block_size(ids, num_experts + 1, 64, *again, scratch, True)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
