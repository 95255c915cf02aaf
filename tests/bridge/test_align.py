"""torch_bridge.moe_align_block_size and align_blocks against the oracle, on a CPU."""

import doctest
import importlib

import numpy as np
import pytest
import torch

import torch_bridge
from tests import oracle
from tests.bridge.helpers import DTYPES, X64, assert_triple, ids_of, misaligned
from torch_bridge import _plan


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ["uniform", "outside", "minus_30"])
def test_align_every_dtype(dtype, routing):
    array, ids = ids_of(dtype, routing)
    want = oracle.align(array.ravel(), block_size=8, num_experts=16)
    assert_triple(torch_bridge.moe_align_block_size(ids, 16, 8, 3), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_align_compares_an_id_in_its_own_dtype(dtype):
    """2**32 + 3, 2**31 and their like are out of range; they are not expert 3."""
    info = torch.iinfo(dtype)
    candidates = (3, 2**32 + 3, 2**31, -(2**32) + 3, info.min, info.max)
    values = [x for x in candidates if info.min <= x <= info.max]
    ids = torch.from_numpy(np.array(values, dtype=str(dtype).removeprefix("torch.")))
    want = oracle.align(values, block_size=2, num_experts=5)
    assert want.tokens_per_expert[3] == 1
    got = torch_bridge.moe_align_block_size(ids, 5, 2)
    assert_triple(got, want)


LAYOUTS = {
    "contiguous": lambda x: x,
    "one dimension": lambda x: x.reshape(-1),
    "three dimensions": lambda x: x.reshape(2, -1, 3),
    "sliced rows": lambda x: torch.cat([x, x])[: x.shape[0]],
    "offset rows": lambda x: torch.cat([x[:1], x])[1:],
    "misaligned": misaligned,
    "column slice": lambda x: torch.stack([x, x], 2).flatten(1)[:, ::2],
    "row step": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "size-1 stride": lambda x: x.reshape(-1).as_strided((1, x.numel()), (7, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int8, torch.uint8], ids=str)
def test_align_every_layout(layout, dtype):
    array, ids = ids_of(dtype, num_tokens=24)
    view = LAYOUTS[layout](ids)
    assert view.numel() == array.size
    want = oracle.align(array.ravel(), block_size=4, num_experts=16)
    assert_triple(torch_bridge.moe_align_block_size(view, 16, 4), want)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_align_strided_unsigned(dtype):
    array, ids = ids_of(dtype, num_tokens=24)
    want = oracle.align(array[:, ::2].ravel(), block_size=4, num_experts=16)
    assert_triple(torch_bridge.moe_align_block_size(ids[:, ::2], 16, 4), want)


def test_align_expanded_ids():
    ids = torch.tensor([2], dtype=torch.int32).expand(5, 3)
    want = oracle.align([2] * 15, block_size=4, num_experts=4)
    assert_triple(torch_bridge.moe_align_block_size(ids, 4, 4), want)


def test_align_negated_view():
    ids = torch._neg_view(torch.tensor([0, -1, -3, 5, -2]))
    want = oracle.align([0, 1, 3, -5, 2], block_size=2, num_experts=4)
    assert_triple(torch_bridge.moe_align_block_size(ids, 4, 2), want)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("kind", ["second", "any"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int8], ids=str)
def test_align_expert_map(pad, ignore, kind, dtype):
    array, ids = ids_of(torch.int32)
    local = oracle.local_map(kind, 16, 1)
    options = {"expert_map": local, "ignore_invalid_experts": ignore, "pad_sorted_ids": pad}
    want = oracle.align(array.ravel(), block_size=8, num_experts=16, **options)
    options["expert_map"] = torch.from_numpy(local).to(dtype)
    assert_triple(torch_bridge.moe_align_block_size(ids, 16, 8, **options), want)
    options["expert_map"] = torch.stack([options["expert_map"]] * 2, 1)[:, 0]  # strided
    assert_triple(torch_bridge.moe_align_block_size(ids, 16, 8, **options), want)


def test_align_expert_map_of_int64_beyond_int32():
    local = [0, 2**32 + 1, 1, -(2**40)]
    want = oracle.align([0, 1, 2, 3], block_size=2, num_experts=4, expert_map=local)
    expert_map = torch.tensor(local)
    got = torch_bridge.moe_align_block_size(torch.arange(4), 4, 2, expert_map=expert_map)
    assert_triple(got, want)


VALID_PAIRS = [0, 1, 50, 111, 10**6, -1, -(2**40), 2**40]


@pytest.mark.parametrize("limit", VALID_PAIRS)
def test_align_num_valid_pairs(limit):
    array, ids = ids_of(torch.int64)
    want = oracle.align(array.ravel(), block_size=4, num_experts=16, num_valid_pairs=limit)
    for given in (limit, torch.tensor(limit), torch.tensor([limit])):
        got = torch_bridge.moe_align_block_size(ids, 16, 4, num_valid_pairs=given)
        assert_triple(got, want)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
def test_align_blocks_returns_every_field(inverse, ignore):
    array, ids = ids_of(torch.int64)
    local = oracle.local_map("second", 16, 1)
    options = {
        "block_size": 4,
        "num_experts": 16,
        "ignore_invalid_experts": ignore,
        "return_inverse": inverse,
    }
    got = torch_bridge.align_blocks(ids, expert_map=torch.from_numpy(local), **options)
    assert isinstance(got, torch_bridge.AlignedBlocks)
    oracle.assert_same(got, oracle.align(array.ravel(), expert_map=local, **options))


@pytest.mark.parametrize("shape", [(0,), (0, 2), (4, 0)])
def test_align_no_pairs(shape):
    got = torch_bridge.align_blocks(
        torch.empty(shape, dtype=torch.int64), block_size=4, num_experts=3, return_inverse=True
    )
    want = oracle.align([], block_size=4, num_experts=3, return_inverse=True)
    oracle.assert_same(got, want)


def test_align_scalar_id():
    want = oracle.align([1], block_size=4, num_experts=3)
    assert_triple(torch_bridge.moe_align_block_size(torch.tensor(1), 3, 4), want)


@pytest.mark.parametrize("num_experts", [1, 65_535])
def test_align_fewest_and_many_experts(num_experts):
    array, ids = ids_of(torch.int32, "uniform", num_tokens=50, num_experts=num_experts)
    want = oracle.align(array.ravel(), block_size=16, num_experts=num_experts)
    assert_triple(torch_bridge.moe_align_block_size(ids, num_experts, 16), want)


def test_align_outputs_have_memory_of_their_own():
    """Where all values coincide too: one expert, blocks of one row."""
    ids = torch.zeros(1, dtype=torch.int32)
    got = torch_bridge.align_blocks(ids, block_size=1, num_experts=1, return_inverse=True)
    pointers = {x.data_ptr() for x in got} | {ids.data_ptr()}
    assert len(pointers) == len(got) + 1
    got.sorted_token_ids.fill_(-5)  # writable, and nothing else changes
    assert [x.tolist() for x in got[1:]] == [[0], [1], [1], [0]] and ids.tolist() == [0]


@pytest.mark.parametrize("topk, shape", [(2, (8, 2)), (4, (8,)), (1, (5,)), (3, (2, 2, 3))])
def test_align_accepts_topk_that_fits(topk, shape):
    array = np.arange(np.prod(shape)) % 4
    want = oracle.align(array, block_size=2, num_experts=4)
    got = torch_bridge.moe_align_block_size(torch.tensor(array).reshape(shape), 4, 2, topk)
    assert_triple(got, want)


def test_align_is_the_same_under_x64():
    import jax

    array, ids = ids_of(torch.int64)
    want = oracle.align(array.ravel(), block_size=4, num_experts=16)
    with jax.enable_x64(True):
        assert_triple(torch_bridge.moe_align_block_size(ids, 16, 4, num_valid_pairs=10**9), want)
    assert jax.config.jax_enable_x64 == X64
    assert_triple(torch_bridge.moe_align_block_size(ids, 16, 4), want)


def test_align_through_the_emulated_kernels():
    array, ids = ids_of(torch.int64, num_tokens=20)
    want = oracle.align(array.ravel(), block_size=4, num_experts=16)
    with _plan.force_implementation("emulator"):
        assert torch_bridge.explain(ids, 16, 4).implementation == "emulator"
        assert_triple(torch_bridge.moe_align_block_size(ids, 16, 4), want)


@pytest.mark.parametrize(
    "module", ["align", "dlpack", "sglang", "vllm", "_vllm_router", "_vllm_aligned"]
)
def test_examples(module):
    result = doctest.testmod(importlib.import_module(f"torch_bridge.{module}"))
    assert result.attempted > 0 and result.failed == 0
