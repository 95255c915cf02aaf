"""The peers' in-place op forms: capacity of the given buffers, fills, errors, tracers."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import oracle
from tests.bridge.helpers import DTYPES, assert_format, ids_of
from tests.bridge.test_sglang import sglang_expected
from tests.bridge.test_vllm import vllm_expected
from torch_bridge import _ops, _plan, dlpack, sglang, vllm

POISON = -7777

OPS = torch.ops.moe_align_jax


def poisoned(*sizes):
    return [torch.full((size,), POISON, dtype=torch.int32) for size in sizes]


def padded(values, size, fill):
    return list(values) + [fill] * (size - len(values))


# -- vLLM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more_rows, more_blocks", [(0, 0), (1, 0), (37, 5), (3000, 1)])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize(
    "num_tokens, num_experts, block_size", [(37, 16, 8), (2, 300, 7), (5, 1, 1)]
)
def test_vllm_fills_buffers_to_their_end(
    more_rows, more_blocks, mapped, scattered, num_tokens, num_experts, block_size
):
    array, ids = ids_of(torch.int64, "outside", num_tokens, 3, num_experts)
    local = oracle.local_map("second", num_experts, 0) if mapped else None
    rows, experts, count, scatter = vllm_expected(
        array.ravel().tolist(), block_size, num_experts, local, ignore=True
    )
    buffers = poisoned(len(rows) + more_rows, len(experts) + more_blocks, 1)
    scatter_idx = torch.full((ids.numel(), 1), POISON, dtype=torch.int32) if scattered else None
    got = vllm.ops_moe_align_block_size(
        ids,
        num_experts,
        block_size,
        *buffers,
        torch.from_numpy(local) if mapped else None,
        scatter_idx,
    )
    assert got is None
    assert buffers[0].tolist() == padded(rows, buffers[0].numel(), ids.numel())
    assert buffers[1].tolist() == padded(experts, buffers[1].numel(), -1)
    assert buffers[2].tolist() == count
    if scattered:
        assert scatter_idx.tolist() == scatter


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vllm_ops_of_every_dtype(dtype):
    array, ids = ids_of(dtype)
    rows, experts, count, _ = vllm_expected(array.ravel().tolist(), 4, 16)
    buffers = poisoned(len(rows), len(experts), 1)
    vllm.ops_moe_align_block_size(ids, 16, 4, *buffers)
    assert [x.tolist() for x in buffers] == [rows, experts, count]


def test_vllm_ops_without_pairs_fill_everything():
    buffers, scatter = poisoned(9, 4, 1), torch.empty(0, 1, dtype=torch.int32)
    ids = torch.zeros(0, 2, dtype=torch.int32)
    vllm.ops_moe_align_block_size(ids, 5, 4, *buffers, None, scatter)
    assert [x.tolist() for x in buffers] == [[0] * 9, [-1] * 4, [0]]


def test_the_last_partial_block_may_be_missing():
    """P rows hold P // block_size whole blocks: no pair can reach the one after them."""
    ids = torch.tensor([0, 1, 2, 3, 3], dtype=torch.int32)  # P = 5 + 4 * 3 = 17, 4 blocks used
    rows, experts, count, _ = vllm_expected(ids.tolist(), 4, 4)
    assert len(experts) == 5 and count == [16]
    buffers = poisoned(17, 4, 1)
    vllm.ops_moe_align_block_size(ids, 4, 4, *buffers)
    assert [x.tolist() for x in buffers] == [rows, experts[:4], count]


@pytest.mark.parametrize("more_rows, more_blocks", [(0, 0), (5, 0), (64, 3)])
@pytest.mark.parametrize("max_tokens, block_size", [(13, 8), (16, 16), (5, 1), (1, 64)])
def test_vllm_batched_fills_buffers_to_their_end(more_rows, more_blocks, max_tokens, block_size):
    counts = [3, 0, max_tokens, 1, max_tokens + 9, -4]
    want = oracle.align_batched(counts, max_tokens_per_batch=max_tokens, block_size=block_size)
    rows, experts = len(want.sorted_token_ids), len(want.expert_ids)
    buffers = poisoned(rows + more_rows, experts + more_blocks, 1)
    got = vllm.ops_batched_moe_align_block_size(
        max_tokens, block_size, torch.tensor(counts, dtype=torch.int32), *buffers
    )
    assert got is None
    sentinel = len(counts) * max_tokens
    assert buffers[0].tolist() == padded(want.sorted_token_ids, rows + more_rows, sentinel)
    assert buffers[1].tolist() == padded(want.expert_ids, experts + more_blocks, -1)
    assert buffers[2].tolist() == want.num_tokens_post_padded


# -- SGLang ---------------------------------------------------------------------------------------


def sglang_rows(numel, num_experts, block_size):
    """Rows as its Python layer allocates them for the op: not rounded to whole stores."""
    if numel < num_experts + 1:
        return numel * block_size
    return numel + (num_experts + 1) * (block_size - 1)


@pytest.mark.parametrize("more", [0, 1, 50])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("routing", ["uniform", "outside", "minus_30", "minus_all"])
@pytest.mark.parametrize(
    "num_tokens, num_experts, block_size", [(32, 8, 4), (5, 14, 7), (5, 16, 7), (3, 1, 3)]
)
def test_sglang_fills_buffers_to_their_end(
    more, pad, ignore, routing, num_tokens, num_experts, block_size
):
    array, ids = ids_of(torch.int32, routing, num_tokens, 3, num_experts)
    rows, experts, count = sglang_expected(array.ravel().tolist(), block_size, num_experts, ignore)
    least = sglang_rows(ids.numel(), num_experts, block_size)
    assert set(rows[least:]) <= {ids.numel()}
    buffers = poisoned(least + more, least // block_size + more, 1)
    (scratch,) = poisoned(num_experts + 2)
    got = sglang.ops_moe_align_block_size(
        ids, num_experts + 1, block_size, *buffers, scratch, pad, ignore
    )
    assert got is None
    assert buffers[0].tolist() == padded(rows[:least], least + more, ids.numel())
    assert buffers[1].tolist() == padded(experts, least + more, -1)[: buffers[1].numel()]
    assert buffers[2].tolist() == count[:1]


# -- errors ---------------------------------------------------------------------------------------

IDS = torch.tensor([[2, 3, 1], [1, 2, 0]], dtype=torch.int32)  # 6 pairs, E 4, blocks of 4: P = 18
SIZES = {"sorted_token_ids": 18, "experts_ids": 4, "num_tokens_post_pad": 1}


def call_vllm(buffers, **more):
    vllm.ops_moe_align_block_size(IDS, 4, 4, **(buffers | more))


def call_sglang(buffers, **more):
    scratch = torch.zeros(5, dtype=torch.int32)
    given = {"cumsum_buffer": scratch} | buffers | more
    sglang.ops_moe_align_block_size(IDS, 3 + 1, 4, **given)


def call_batched(buffers, **more):
    counts = torch.tensor([1, 2, 3], dtype=torch.int32)  # 3 * 6 rows in blocks of 3: P = 18
    vllm.ops_batched_moe_align_block_size(6, 3, counts, **(buffers | more))


CALLS = {"vllm": call_vllm, "sglang": call_sglang, "batched": call_batched}


def right(name):
    sizes = SIZES | ({"experts_ids": 6} if name == "batched" else {})
    return {key: torch.full((size,), POISON, dtype=torch.int32) for key, size in sizes.items()}


def spoiled(buffers, what, argument):
    good = buffers[argument]
    n = good.numel()
    match what:
        case "type":
            return [0] * n
        case "dtype":
            return good.long()
        case "short":
            return good[:-1]
        case "strided":
            return torch.full((2 * n + 2,), POISON, dtype=torch.int32)[: 2 * n + 2 : 2]
        case "device":
            return good.to("meta")
        case "negative":
            return torch._neg_view(good)
        case "shared":
            other = "experts_ids" if argument == "sorted_token_ids" else "sorted_token_ids"
            both = torch.full((64,), POISON, dtype=torch.int32)
            buffers[other] = both[: buffers[other].numel()]
            return both[:n]


@pytest.mark.parametrize("argument", SIZES)
@pytest.mark.parametrize(
    "what, kind",
    [
        ("type", TypeError),
        ("dtype", TypeError),
        ("short", ValueError),
        ("strided", ValueError),
        ("device", ValueError),
        ("negative", ValueError),
        ("shared", ValueError),
    ],
)
@pytest.mark.parametrize("name", CALLS)
def test_bad_buffers_are_refused_before_anything_is_written(name, what, kind, argument):
    CALLS[name](right(name))  # the sizes of SIZES are enough
    buffers = right(name)
    buffers[argument] = spoiled(buffers, what, argument)
    with pytest.raises(kind) as caught:
        CALLS[name](buffers)
    assert_format(caught.value)
    assert str(caught.value).startswith("ops_")
    assert what == "shared" or argument in str(caught.value)
    written = [
        x for x in buffers.values() if isinstance(x, torch.Tensor) and x.device.type == "cpu"
    ]
    assert all((x.resolve_neg().abs() == -POISON).all() for x in written)


@pytest.mark.parametrize(
    "name, more, kind",
    [
        ("vllm", {"scatter_idx": torch.zeros(5, dtype=torch.int32)}, ValueError),
        ("vllm", {"scatter_idx": torch.zeros(6, dtype=torch.int64)}, TypeError),
        ("vllm", {"expert_map": torch.zeros(5, dtype=torch.int32)}, ValueError),
        ("vllm", {"expert_map": torch.zeros(4)}, TypeError),
        ("vllm", {"num_tokens_post_pad": torch.zeros(2, dtype=torch.int32)}, ValueError),
        ("sglang", {"cumsum_buffer": torch.zeros(4, dtype=torch.int32)}, ValueError),
        ("sglang", {"cumsum_buffer": torch.zeros(5)}, TypeError),
        ("sglang", {"pad_sorted_token_ids": 1}, TypeError),
    ],
)
def test_other_bad_arguments(name, more, kind):
    buffers = right(name)
    with pytest.raises(kind) as caught:
        CALLS[name](buffers, **more)
    assert_format(caught.value)
    assert next(iter(more)) in str(caught.value)
    assert all((x == POISON).all() for x in buffers.values())


def test_a_buffer_may_not_hold_the_ids():
    buffers = right("vllm")
    ids = buffers["sorted_token_ids"][6:12]
    with pytest.raises(ValueError, match="sorted_token_ids must not overlap topk_ids"):
        vllm.ops_moe_align_block_size(ids, 4, 4, *buffers.values())
    with pytest.raises(ValueError, match="num_experts must be at least 2"):
        sglang.ops_moe_align_block_size(IDS, 1, 4, *right("sglang").values(), poisoned(9)[0])


# -- tracers --------------------------------------------------------------------------------------


def _op_cases():
    _, ids = ids_of(torch.int32)
    local = torch.from_numpy(oracle.local_map("second", 16, 1))
    scatter = torch.zeros(ids.numel(), 1, dtype=torch.int32)
    yield (
        "plain",
        OPS.block_align_into_dlpack.default,
        (ids, None, 16, 8, *poisoned(300, 40, 1), None),
    )
    yield (
        "all",
        OPS.block_align_into_dlpack.default,
        (ids.t(), local, 16, 8, *poisoned(300, 40, 1), scatter),
    )
    yield (
        "sglang",
        OPS.sglang_block_align_into_dlpack.default,
        (ids, 16, 8, False, *poisoned(230, 29, 1)),
    )
    counts = torch.arange(7)
    yield (
        "batched",
        OPS.batched_block_align_into_dlpack.default,
        (counts, 12, 8, *poisoned(112, 14, 1)),
    )


@pytest.mark.parametrize("case", [name for name, _, _ in _op_cases()])
def test_opcheck(case):
    [(op, arguments)] = [(op, arguments) for name, op, arguments in _op_cases() if name == case]
    results = torch.library.opcheck(op, arguments)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4
    mutated = [x.alias_info.is_write for x in op._schema.arguments if x.alias_info]
    assert mutated in ([True] * 3, [True] * 4) and op._schema.returns == []


def test_fake_buffers_reach_no_jax(monkeypatch):
    monkeypatch.setattr(dlpack, "share", lambda *_: pytest.fail("a fake tensor reached DLPack"))
    monkeypatch.setattr(_ops._plan, "resolve", lambda *_: pytest.fail("a plan for a fake tensor"))
    with FakeTensorMode() as mode:
        buffers = [mode.from_tensor(x) for x in poisoned(18, 5, 1)]
        assert vllm.ops_moe_align_block_size(mode.from_tensor(IDS), 4, 4, *buffers) is None
    meta = [x.to("meta") for x in poisoned(18, 5, 1)]
    assert vllm.ops_moe_align_block_size(IDS.to("meta"), 4, 4, *meta) is None


def vllm_layer(ids, out):
    scatter = torch.empty(ids.numel(), 1, dtype=torch.int32)
    vllm.ops_moe_align_block_size(ids + 0, 16, 8, *out, None, scatter)
    return out[2] + 1, scatter


def sglang_layer(ids, out):
    scratch = torch.empty(18, dtype=torch.int32)
    sglang.ops_moe_align_block_size(ids + 0, 17, 8, *out, scratch, True)
    return out[2] + 1, scratch[:0]


def batched_layer(ids, out):
    vllm.ops_batched_moe_align_block_size(20, 8, ids.flatten()[:9] + 0, *out)
    return out[2] + 1, out[0][:0]


LAYERS = (vllm_layer, sglang_layer, batched_layer)
# Each layer with each backend, and with and without dynamic shapes.
COMPILED = [
    pytest.param(layer, backend, bool((i + j) % 2), id=f"{layer.__name__}-{backend}")
    for i, layer in enumerate(LAYERS)
    for j, backend in enumerate(["aot_eager", "inductor"])
]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("layer", "backend", "dynamic"), COMPILED)
def test_compile_fullgraph(layer, backend, dynamic):
    """Each compiled layer beside the same calls in eager, which the tests above hold to oracles."""
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    for num_tokens in (37, 5, 64):
        _, ids = ids_of(torch.int64, "uniform", num_tokens=num_tokens)
        out, want = poisoned(400, 60, 1), poisoned(400, 60, 1)
        got = compiled(ids, out)
        for one, other in zip([*got, *out], [*layer(ids, want), *want], strict=True):
            assert torch.equal(one, other)
        assert not (out[0] == POISON).any() and out[2].item() > 0


def test_through_the_emulated_kernels():
    array, ids = ids_of(torch.int64, num_tokens=20)
    rows, experts, count, _ = vllm_expected(array.ravel().tolist(), 4, 16)
    buffers = poisoned(len(rows) + 3, len(experts) + 2, 1)
    with _plan.force_implementation("emulator"):
        vllm.ops_moe_align_block_size(ids, 16, 4, *buffers)
    assert buffers[0].tolist() == [*rows, *[ids.numel()] * 3]
    np.testing.assert_array_equal(buffers[1], [*experts, -1, -1])
    assert buffers[2].tolist() == count
