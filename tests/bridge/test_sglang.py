"""torch_bridge.sglang against SGLang's contract, as loops of its own."""

import inspect

import numpy as np
import pytest
import torch

from tests import oracle
from tests.bridge.helpers import DTYPES, assert_triple, ids_of
from torch_bridge import sglang


def sglang_expected(ids, block_size, num_experts, ignore=False):
    """Buckets -1, 0, ..., E - 1 in order; the count, and the blocks of bucket -1."""
    numel = len(ids)
    rows, experts, inactive = [], [], 0
    for expert in range(0 if ignore else -1, num_experts):
        pairs = [pair for pair, x in enumerate(ids) if x == expert]
        blocks = (len(pairs) + block_size - 1) // block_size
        rows += pairs + [numel] * (blocks * block_size - len(pairs))
        experts += [expert] * blocks
        inactive += blocks if expert == -1 else 0
    if numel < num_experts + 1:
        total = numel * block_size
    else:
        total = numel + (num_experts + 1) * (block_size - 1)
    total = (total + 3) // 4 * 4
    count = [len(rows), inactive]
    rows += [numel] * (total - len(rows))
    experts += [-1] * (-(-total // block_size) - len(experts))
    return rows, experts, count


def test_signature_is_that_of_sglang():
    parameters = inspect.signature(sglang.moe_align_block_size).parameters.values()
    keyword, empty = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty
    assert [(p.name, p.default, p.kind is keyword) for p in parameters] == [
        ("topk_ids", empty, False),
        ("block_size", empty, False),
        ("num_experts", empty, False),
        ("ignore_invalid_expert", False, False),
        ("return_inactive_prefix_count", False, True),
        ("pad_expert_ids", False, True),
    ]


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("routing", ["uniform", "outside", "minus_30", "minus_all", "dropped"])
@pytest.mark.parametrize(
    "num_tokens, num_experts, block_size",
    [(32, 8, 4), (1, 64, 16), (5, 14, 7), (5, 15, 7), (40, 16, 1), (3, 1, 3), (1, 9000, 64)],
)
def test_sglang(ignore, routing, num_tokens, num_experts, block_size):
    array, ids = ids_of(torch.int32, routing, num_tokens, 3, num_experts)
    rows, experts, count = sglang_expected(array.ravel().tolist(), block_size, num_experts, ignore)
    got = sglang.moe_align_block_size(ids, block_size, num_experts, ignore)
    assert_triple(got, oracle.Expected(rows, experts, count[:1], None))
    for pad in (False, True):
        got = sglang.moe_align_block_size(
            ids,
            block_size,
            num_experts,
            ignore,
            return_inactive_prefix_count=True,
            pad_expert_ids=pad,
        )
        assert_triple(got, oracle.Expected(rows, experts, count, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sglang_every_dtype(dtype):
    """The largest value of an unsigned dtype is no -1; 2**32 - 1 in an int64 is none either."""
    info = np.iinfo(str(dtype).removeprefix("torch."))
    near = [-1, 0, 3, -1, 4, 5, -2, info.min, info.max, 2**32 - 1, -(2**32), 2**32 + 2, 2**31 - 1]
    values = [x for x in near if info.min <= x <= info.max]
    ids = torch.from_numpy(np.array(values, dtype=info.dtype))
    rows, experts, count = sglang_expected(values, 2, 5)
    got = sglang.moe_align_block_size(ids, 2, 5, return_inactive_prefix_count=True)
    assert_triple(got, oracle.Expected(rows, experts, count, None))


def test_sglang_capacity_of_its_documentation():
    ids = torch.zeros(4096, 2, dtype=torch.int32)
    got = sglang.moe_align_block_size(ids, 128, 64)
    assert got[0].shape == (16448,) and got[1].shape == (129,)


@pytest.mark.parametrize("ignore", [False, True])
def test_sglang_no_pairs(ignore):
    ids = torch.zeros(0, 2, dtype=torch.int64)
    got = sglang.moe_align_block_size(ids, 4, 8, ignore, return_inactive_prefix_count=True)
    assert [x.tolist() for x in got] == [[], [], [0, 0]]
