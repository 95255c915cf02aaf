"""torch_bridge.vllm against vLLM's contract, written here a second time from its documentation."""

import inspect

import numpy as np
import pytest
import torch

from tests import oracle
from tests.bridge.helpers import DTYPES, assert_triple, ids_of
from torch_bridge import vllm


def vllm_rows(numel, num_experts, block_size, pad):
    """Its own arithmetic for the length of sorted_token_ids."""
    rows = numel + num_experts * (block_size - 1)
    if pad:
        rows = -(-rows // block_size) * block_size
    return min(numel * block_size, rows) if numel < num_experts else rows


def vllm_expected(ids, block_size, num_experts, expert_map=None, pad=False, ignore=False):
    """sorted ids, expert ids, count, scatter: buckets in a dict, filled in pair order."""
    numel, buckets, scatter = len(ids), {}, []
    for pair, expert in enumerate(ids):
        valid = 0 <= expert < num_experts
        if valid and expert_map is not None and ignore:
            expert = expert_map[expert]
            valid = expert != -1
        scatter.append([pair if valid else -1])
        if valid:
            buckets.setdefault(expert, []).append(pair)
    rows, experts = [], []
    for expert in sorted(buckets):
        while len(buckets[expert]) % block_size:
            buckets[expert].append(numel)
        rows += buckets[expert]
        label = expert if expert_map is None or ignore else expert_map[expert]
        experts += [label] * (len(buckets[expert]) // block_size)
    total = vllm_rows(numel, num_experts, block_size, pad)
    count = len(rows)
    rows += [numel] * (total - count)
    experts += [-1] * (-(-total // block_size) - len(experts))
    return rows, experts, [count], scatter


def test_signatures_are_those_of_vllm():
    parameters = inspect.signature(vllm.moe_align_block_size).parameters.values()
    assert [(p.name, p.default) for p in parameters] == [
        ("topk_ids", inspect.Parameter.empty),
        ("block_size", inspect.Parameter.empty),
        ("num_experts", inspect.Parameter.empty),
        ("expert_map", None),
        ("pad_sorted_ids", False),
        ("ignore_invalid_experts", False),
        ("return_scatter_idx", False),
    ]
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)
    batched = inspect.signature(vllm.batched_moe_align_block_size).parameters
    assert list(batched) == ["max_tokens_per_batch", "block_size", "expert_num_tokens"]


@pytest.mark.parametrize("routing", ["uniform", "outside", "minus_30", "dropped", "one"])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("num_experts, block_size", [(8, 4), (64, 16), (300, 7), (1, 128)])
def test_vllm_plain(routing, pad, num_experts, block_size):
    array, ids = ids_of(torch.int32, routing, num_tokens=32, num_experts=num_experts)
    rows, experts, count, scatter = vllm_expected(
        array.ravel().tolist(), block_size, num_experts, None, pad
    )
    got = vllm.moe_align_block_size(ids, block_size, num_experts, None, pad)
    assert_triple(got, oracle.Expected(rows, experts, count, None))
    got = vllm.moe_align_block_size(ids, block_size, num_experts, None, pad, False, True)
    assert type(got) is tuple and got[3].dtype == torch.int32
    assert_triple(got[:3], oracle.Expected(rows, experts, count, None))
    assert got[3].tolist() == scatter


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("scatter_too", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_vllm_expert_map(ignore, scatter_too, dtype):
    array, ids = ids_of(dtype, "outside", num_tokens=40)
    local = oracle.local_map("second", 16, 0)
    if scatter_too and not ignore:
        with pytest.raises(ValueError, match="ignore_invalid_experts"):
            vllm.moe_align_block_size(ids, 8, 16, torch.from_numpy(local), True, False, True)
        return
    rows, experts, count, scatter = vllm_expected(
        array.ravel().tolist(), 8, 16, local.tolist(), True, ignore
    )
    got = vllm.moe_align_block_size(
        ids,
        8,
        16,
        expert_map=torch.from_numpy(local),
        pad_sorted_ids=True,
        ignore_invalid_experts=ignore,
        return_scatter_idx=scatter_too,
    )
    assert_triple(got[:3], oracle.Expected(rows, experts, count, None))
    assert len(got) == 3 + scatter_too
    if scatter_too:
        assert got[3].tolist() == scatter


def test_vllm_unused_blocks_read_minus_one_with_a_map():
    """The one quirk that is not copied: there they read expert_map[-1]."""
    local = torch.tensor([0, 1, 2, 9 - 6], dtype=torch.int32)
    got = vllm.moe_align_block_size(torch.zeros(4, 2, dtype=torch.int32), 4, 4, local)
    assert got[1].tolist() == [0, 0, -1, -1, -1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vllm_scatter_idx_of_every_dtype(dtype):
    array, ids = ids_of(dtype)
    *_, scatter = vllm_expected(array.ravel().tolist(), 4, 16)
    assert vllm.moe_align_block_size(ids, 4, 16, None, False, False, True)[3].tolist() == scatter


@pytest.mark.parametrize("numel", [0, 1])
def test_vllm_takes_what_vllm_refuses(numel):
    ids = torch.zeros(numel, dtype=torch.int64)
    rows, experts, count, scatter = vllm_expected([0] * numel, 4, 1000)
    got = vllm.moe_align_block_size(ids, 4, 1000, None, False, False, True)
    assert [x.tolist() for x in got] == [rows, experts, count, scatter]
    assert got[3].shape == (numel, 1)


@pytest.mark.parametrize(
    "dtype, max_tokens, block_size",
    [(x, 13, 8) for x in DTYPES] + [(torch.int64, *x) for x in [(16, 16), (5, 1), (1, 64)]],
    ids=str,
)
def test_vllm_batched(dtype, max_tokens, block_size):
    info = np.iinfo(str(dtype).removeprefix("torch."))
    counts = [3, 0, max_tokens, 1, max_tokens + 9, info.min, info.max, 2**32 + 1]
    counts = [x for x in counts if info.min <= x <= info.max]
    tensor = torch.from_numpy(np.array(counts, dtype=info.dtype))
    want = oracle.align_batched(counts, max_tokens_per_batch=max_tokens, block_size=block_size)
    assert_triple(vllm.batched_moe_align_block_size(max_tokens, block_size, tensor), want)


def test_vllm_batched_example_of_its_documentation():
    """Counts [2, 3, 0, 6, 8], with the expert ids that its own inputs give (its text prints others)."""
    counts = torch.tensor([2, 3, 0, 6, 8], dtype=torch.int32)
    got = vllm.batched_moe_align_block_size(8, 4, counts)
    assert got[0][:12].tolist() == [0, 1, 40, 40, 8, 9, 10, 40, 24, 25, 26, 27]
    assert got[1].tolist() == [0, 1, 3, 3, 4, 4, -1, -1, -1, -1] and got[2].tolist() == [24]
