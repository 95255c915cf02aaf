"""Ours beside vLLM's compiled op on the same inputs: equal but for the order within an expert.

The op comes from MOE_ALIGN_VLLM_OP, otherwise from `.peers/vllm_moe.so`, where
`python -m benchmarks.fetch vllm` puts it. Cases: the cover of the peers' grids that vLLM takes.
"""

import functools
import os

import numpy as np
import pytest
import torch

from tests import cover, oracle
from tests.bridge import peer_files
from tests.bridge.test_vllm import vllm_rows
from torch_bridge import vllm

VARIABLE = "MOE_ALIGN_VLLM_OP"
MAX_EXPERTS = 992
POISON = -7777

# What the op has no argument for is left out: num_valid_pairs, and how the ids arrive.
CASES = [
    case for case in cover.load() if case["num_tokens"] > 0 and case["num_experts"] <= MAX_EXPERTS
]


@functools.cache
def _load(path: str):
    torch.ops.load_library(path)
    return torch.ops._moe_C


@pytest.fixture
def their_ops():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    named = os.environ.get(VARIABLE)
    return _load(named or str(peer_files.path_of("vllm_moe.so")))


def inputs(case):
    """ids and map that vLLM can take: it narrows ids to int32, and trusts all of a map but -1."""
    ids, options = cover.arguments(case)
    num_experts = case["num_experts"]
    narrowed = ids.astype(np.int32)  # wraps, as its kernel's does
    aliased = (narrowed >= 0) & (narrowed < num_experts) & (narrowed != ids)
    ids = np.where(aliased, np.iinfo(ids.dtype).max, ids)  # of 64 bits: -1 when narrowed
    local = options["expert_map"]
    if local is not None:
        local = np.where((local >= 0) & (local < num_experts), local, -1).astype(np.int32)
    return ids, local, options["ignore_invalid_experts"]


def by_expert(sorted_ids, expert_ids, count, block_size):
    """The rows in use, sorted within each expert; then the rest as it is."""
    owner = np.repeat(expert_ids[: count // block_size], block_size)
    live = sorted_ids[:count]
    return np.concatenate([live[np.lexsort((live, owner))], sorted_ids[count:]])


def compare(case, their_op, device):
    """Both ops on buffers of vLLM's sizes; then our function's labels for a map that labels."""
    array, local, filters = inputs(case)
    num_experts, block_size = case["num_experts"], case["block_size"]
    ids = torch.from_numpy(array).to(device)
    expert_map = None if local is None else torch.from_numpy(local).to(device)
    rows = vllm_rows(array.size, num_experts, block_size, case["pad_sorted_ids"])
    sizes = [(rows,), (-(-rows // block_size),), (1,), (array.size, 1)]
    results = []
    for op in (their_op, vllm.ops_moe_align_block_size):
        out = [torch.full(s, POISON, dtype=torch.int32, device=device) for s in sizes]
        scatter = out[3] if case["return_inverse"] else None
        op(ids, num_experts, block_size, *out[:3], expert_map if filters else None, scatter)
        results.append([x.cpu().numpy() for x in out])
    theirs, ours = results
    np.testing.assert_array_equal(ours[2], theirs[2], err_msg="num_tokens_post_pad")
    np.testing.assert_array_equal(ours[1], theirs[1], err_msg="expert_ids")
    np.testing.assert_array_equal(ours[3], theirs[3], err_msg="scatter_idx")
    count = int(theirs[2][0])
    grouped = [by_expert(x[0], x[1], count, block_size) for x in results]
    np.testing.assert_array_equal(grouped[1], grouped[0], err_msg="sorted_token_ids by expert")
    if local is not None and not filters:
        got = vllm.moe_align_block_size(ids, block_size, num_experts, expert_map)
        used = count // block_size
        np.testing.assert_array_equal(got[1][:used].cpu(), local[theirs[1][:used]])
        assert (got[1][used:] == -1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=cover.name)
def test_equal_to_vllms_op(case, their_ops):
    compare(case, their_ops.moe_align_block_size, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("max_tokens, block_size", [(13, 8), (512, 64), (1, 16), (100, 128)])
@pytest.mark.parametrize("num_experts", [1, 8, 65, 1024])
def test_equal_to_vllms_batched_op(num_experts, max_tokens, block_size, their_ops):
    rng = np.random.default_rng(num_experts)
    array = rng.integers(0, max_tokens, num_experts, endpoint=True).astype(np.int32)
    counts = torch.from_numpy(array).cuda()
    rows = num_experts * -(-max_tokens // block_size) * block_size
    results = []
    for op in (their_ops.batched_moe_align_block_size, vllm.ops_batched_moe_align_block_size):
        sizes = (rows, rows // block_size, 1)
        out = [torch.full((s,), POISON, dtype=torch.int32, device="cuda") for s in sizes]
        op(max_tokens, block_size, counts, *out)
        results.append(out)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# -- the comparison itself, on a stand-in for the op -----------------------------------------------


def stand_in(wrong: str):
    """vLLM's op as the oracle has it, in descending order within an expert; or made wrong."""

    def op(ids, num_experts, block_size, sorted_ids, expert_ids, count, expert_map, scatter_idx):
        array = ids.numpy().astype(np.int32).ravel()
        local = None if expert_map is None else expert_map.numpy()
        want = oracle.expected(
            array,
            block_size=block_size,
            num_experts=num_experts,
            expert_map=local,
            ignore_invalid_experts=local is not None,
            return_inverse=True,
        )
        n = array.size
        sorted_ids.fill_(n)
        rows = torch.tensor(np.asarray(want.sorted_token_ids), dtype=torch.int32)
        sorted_ids[: rows.numel()] = rows
        start = 0
        for pairs in map(int, want.tokens_per_expert):
            sorted_ids[start : start + pairs] = sorted_ids[start : start + pairs].flip(0)
            start += -(-pairs // block_size) * block_size
        expert_ids.fill_(-1)
        blocks = torch.tensor(np.asarray(want.expert_ids), dtype=torch.int32)
        expert_ids[: blocks.numel()] = blocks
        count[0] = want.num_tokens_post_padded[0]
        if scatter_idx is not None:
            kept = torch.tensor(np.asarray(want.row_of_pair)) >= 0
            scatter_idx[:, 0] = torch.where(kept, torch.arange(n), -1)
        if wrong == "sorted":
            sorted_ids[0] = n
        elif wrong == "swapped":
            sorted_ids[[0, count.item() - block_size]] = sorted_ids[[count.item() - block_size, 0]]
        elif wrong == "tail":
            sorted_ids[-1] = 0
        elif wrong == "expert_ids":
            expert_ids[-1] = 7
        elif wrong == "count":
            count += block_size

    return op


SMALL = [case for case in CASES if case["num_tokens"] * case["top_k"] <= 4096]


def test_the_cases_reach_every_size_that_vllm_takes():
    for factor in ("num_tokens", "top_k", "num_experts", "block_size", "dtype", "map"):
        levels = set(cover.FACTORS[factor])
        if factor == "num_tokens":
            levels -= {0}
        if factor == "num_experts":
            levels = {x for x in levels if x <= MAX_EXPERTS}
        assert {case[factor] for case in CASES} == levels, factor


@pytest.mark.parametrize("case", SMALL[:: max(1, len(SMALL) // 12)], ids=cover.name)
def test_comparison_accepts_another_order(case):
    compare(case, stand_in(""), "cpu")


@pytest.mark.parametrize("wrong", ["sorted", "swapped", "tail", "expert_ids", "count"])
def test_comparison_finds_a_wrong_op(wrong):
    case = {"num_tokens": 64, "top_k": 4, "num_experts": 16, "block_size": 8, "dtype": "int64"}
    case |= {"routing": "outside", "map": "none", "valid": "none", "return_inverse": True}
    case |= {"pad_sorted_ids": False, "container": "jax"}
    compare(case, stand_in(""), "cpu")
    with pytest.raises(AssertionError):
        compare(case, stand_in(wrong), "cpu")
