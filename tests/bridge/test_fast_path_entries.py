"""Each entry point's calls seen before, on a fake driver: right results, and the ordinary way for all others.

Here the ordinary way is DLPack's, on CPU tensors; what launches is the fast path.
"""

import collections

import numpy as np
import pytest
import torch

import torch_bridge
from tests import oracle
from tests.bridge.fake_cuda import remember as remember_call
from tests.bridge.helpers import assert_format, ids_of
from tests.bridge.test_sglang import sglang_expected
from tests.bridge.test_vllm import vllm_expected
from tests.gpu.graphs import capture
from torch_bridge import sglang, vllm
from torch_bridge._direct import call as direct_call
from torch_bridge._direct import fast_path
from torch_bridge._specs import AlignSpec, BatchedSpec, SglangSpec

E, BLOCK = 16, 8
ARRAY, IDS = ids_of(torch.int32, "minus_30")
N, FLAT = IDS.numel(), ARRAY.ravel().tolist()
MAP = torch.from_numpy(oracle.local_map("second", E, 1).astype("int32"))
LIMIT = torch.tensor(70, dtype=torch.int32)
COUNTS = torch.tensor([3, 0, 13, 1, 20, -4], dtype=torch.int32)

Entry = collections.namedtuple("Entry", "problem operands call want")


def blocks_entry(limited=False, **options):
    """`align_blocks`."""
    operands = {"topk_ids": IDS}
    if "expert_map" in options:
        operands["expert_map"] = options["expert_map"]
    if limited:
        operands["num_valid_pairs"] = options["num_valid_pairs"] = LIMIT
    inverse = options.pop("return_inverse", False)
    ignore = options.get("ignore_invalid_experts", False)
    pad = options.get("pad_sorted_ids", False)
    problem = AlignSpec(N, E, BLOCK, ignore, pad, with_counts=True, with_inverse=inverse)
    plain = {k: x.tolist() if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    want = oracle.align(FLAT, block_size=BLOCK, num_experts=E, return_inverse=inverse, **plain)

    def call(ids, *tensors):
        given = options | dict(zip(list(operands)[1:], tensors, strict=True))
        sizes = {"block_size": BLOCK, "num_experts": E, "return_inverse": inverse}
        return tuple(x for x in torch_bridge.align_blocks(ids, **sizes, **given) if x is not None)

    return Entry(problem, operands, call, [list(x) for x in want if x is not None])


def limited_entry():
    """The three results with a bound on the device."""
    want = oracle.align(FLAT, block_size=BLOCK, num_experts=E, num_valid_pairs=70)
    return Entry(
        AlignSpec(N, E, BLOCK),
        {"topk_ids": IDS, "num_valid_pairs": LIMIT},
        lambda ids, limit: torch_bridge.moe_align_block_size(ids, E, BLOCK, num_valid_pairs=limit),
        [list(x) for x in want[:3]],
    )


def scatter_entry(mapped):
    *three, scatter = vllm_expected(FLAT, BLOCK, E, MAP.numpy() if mapped else None, ignore=mapped)
    operands = {"topk_ids": IDS, "expert_map": MAP} if mapped else {"topk_ids": IDS}

    def call(ids, local=None):
        return vllm.moe_align_block_size(ids, BLOCK, E, local, False, mapped, True)

    problem = AlignSpec(N, E, BLOCK, mapped, with_scatter_idx=True)
    return Entry(problem, operands, call, [*three, scatter])


def sglang_entry(ignore, inactive):
    rows, experts, count = sglang_expected(FLAT, BLOCK, E, ignore)

    def call(ids):
        return sglang.moe_align_block_size(
            ids, BLOCK, E, ignore, return_inactive_prefix_count=inactive
        )

    problem = SglangSpec(N, E, BLOCK, ignore, inactive)
    return Entry(problem, {"topk_ids": IDS}, call, [rows, experts, count[: 1 + inactive]])


def batched_entry():
    want = oracle.align_batched(COUNTS.tolist(), max_tokens_per_batch=13, block_size=BLOCK)
    problem = BatchedSpec(6, 13, BLOCK)
    return Entry(
        problem,
        {"expert_num_tokens": COUNTS},
        lambda counts: vllm.batched_moe_align_block_size(13, BLOCK, counts),
        [list(x) for x in want[:3]],
    )


ENTRIES = {
    "limit": limited_entry(),
    "blocks": blocks_entry(),
    "blocks, inverse": blocks_entry(return_inverse=True),
    "blocks, map": blocks_entry(expert_map=MAP, return_inverse=True),
    "blocks, all": blocks_entry(
        True,
        expert_map=MAP,
        ignore_invalid_experts=True,
        pad_sorted_ids=True,
        return_inverse=True,
    ),
    "scatter": scatter_entry(False),
    "scatter, map": scatter_entry(True),
    "sglang": sglang_entry(False, False),
    "sglang, ignore": sglang_entry(True, False),
    "sglang, inactive": sglang_entry(False, True),
    "sglang, ignore, inactive": sglang_entry(True, True),
    "batched": batched_entry(),
}


def buffers_of(want):
    """One for each result, as the peers' Python layers make them: `scatter_idx` is `[n, 1]`."""
    sizes = [len(x) for x in want]
    return [
        torch.full((n, 1) if i == 3 else (n,), -7, dtype=torch.int32) for i, n in enumerate(sizes)
    ]


def filled(call):
    """An in-place call as one that returns what it filled."""

    def functional(*tensors, buffers):
        assert call(*tensors, *buffers) is None
        return tuple(buffers)

    return functional


def into(name, call, want=None):
    entry = ENTRIES[name]
    return entry._replace(call=filled(call), want=want or entry.want)


def sglang_into(ids, *buffers):
    scratch = torch.zeros(E + 2, dtype=torch.int32, device=ids.device)
    sglang.ops_moe_align_block_size(ids, E + 1, BLOCK, *buffers, scratch)


IN_PLACE = {
    "vllm": Entry(
        AlignSpec(N, E, BLOCK),
        {"topk_ids": IDS},
        filled(lambda ids, *buffers: vllm.ops_moe_align_block_size(ids, E, BLOCK, *buffers)),
        list(vllm_expected(FLAT, BLOCK, E)[:3]),
    ),
    "scatter": into(
        "scatter",
        lambda ids, a, b, c, s: vllm.ops_moe_align_block_size(ids, E, BLOCK, a, b, c, None, s),
    ),
    "scatter, map": into(
        "scatter, map",
        lambda ids, local, a, b, c, s: vllm.ops_moe_align_block_size(
            ids, E, BLOCK, a, b, c, local, s
        ),
    ),
    "sglang": into("sglang", sglang_into),
    "batched": into(
        "batched",
        lambda counts, *buffers: vllm.ops_batched_moe_align_block_size(13, BLOCK, counts, *buffers),
    ),
}


def remember(fake, entry, rows=0):
    """The entry's call as one that was seen before; in place, into so many rows."""
    remember_call(fake, entry.problem, entry.operands, rows=rows)
    assert len(fast_path._known) == 1


def flattened(want):
    return [np.asarray(x).ravel().tolist() for x in want]


def values(results):
    return [x.flatten().tolist() for x in results]


def others(tensor):
    """Tensors that are unlike the one of the kept call."""
    yield tensor.long()
    yield torch._neg_view(-tensor)
    yield torch.nn.Parameter(tensor, requires_grad=False)
    wide = torch.stack([tensor, tensor], -1)
    if tensor.dim():
        yield wide[..., 0]


@pytest.mark.parametrize("name", ENTRIES)
def test_results_and_other_tensors(name, fake):
    """Kept, then recent, then guarded; between them what is unlike it."""
    entry = ENTRIES[name]
    flat = flattened(entry.want)
    remember(fake, entry)
    tensors = list(entry.operands.values())
    for _ in range(3):
        fake.launched.clear()
        got = entry.call(*tensors)
        assert fake.launched and type(got) is tuple
        assert values(got) == flat
        assert values(entry.call(*[x.clone() for x in tensors])) == flat
        for position, tensor in enumerate(tensors):
            for other in others(tensor):
                fake.launched.clear()
                got = entry.call(*tensors[:position], other, *tensors[position + 1 :])
                assert not fake.launched
                assert values(got) == flat


@pytest.mark.parametrize("name", ENTRIES)
def test_only_on_the_current_device_and_unwatched(name, fake):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    entry, seen = ENTRIES[name], []
    remember(fake, entry)
    for _ in range(3):
        entry.call(*entry.operands.values())
    fake.launched.clear()
    with Watch():
        entry.call(*entry.operands.values())
    assert any(func.namespace == "moe_align_jax" for func in seen)
    fake.device = 1
    entry.call(*entry.operands.values())
    assert not fake.launched


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_reach_no_guard(fake):
    """Torch's guards end the process at one, so all tensors are asked before."""
    problem, operands = AlignSpec(N, E, BLOCK), {"topk_ids": IDS, "expert_map": MAP}
    operands["num_valid_pairs"] = LIMIT
    remember(fake, Entry(problem, operands, None, None))
    out = tuple(torch.zeros(shape, dtype=torch.int32) for shape in problem.outputs.values())

    def attempt(ids, local, limit, out):
        key = (E, BLOCK, False, False, None, 0)
        return fast_path.attempt(key, ids, local, limit, out)

    for _ in range(3):
        for given in (None, out):
            assert attempt(IDS, MAP, LIMIT, given) is not None
    [kept] = fast_path._known.values()
    assert fast_path._matches_nothing not in (kept.matches, kept.matches_out)
    fake.launched.clear()
    nested = torch.nested.nested_tensor([MAP, MAP])
    for given in (None, out):
        assert attempt(nested, MAP, LIMIT, given) is None
        assert attempt(IDS, nested, LIMIT, given) is None
        assert attempt(IDS, MAP, nested, given) is None
    for position in range(3):
        spoiled = [nested if i == position else x for i, x in enumerate(out)]
        assert attempt(IDS, MAP, LIMIT, spoiled) is None
    for few in ((), out[:2], (*out, out[0])):  # and they raise at another number of tensors
        assert attempt(IDS, MAP, LIMIT, few) is None
    assert not fake.launched


@pytest.mark.parametrize("name", ["sglang", "blocks, inverse", "scatter"])
def test_inference_mode(name, fake):
    entry = ENTRIES[name]
    remember(fake, entry)
    outside = entry.call(*entry.operands.values())
    for _ in range(3):
        with torch.inference_mode():
            fake.launched.clear()
            inside = entry.call(*[x.clone() for x in entry.operands.values()])
            assert fake.launched
        assert values(inside) == values(outside)
        assert values(entry.call(*entry.operands.values())) == values(outside)


@pytest.mark.parametrize(
    "call",
    [
        lambda ids: torch_bridge.align_blocks(
            ids, block_size=BLOCK, num_experts=E, return_inverse=1
        ),
        lambda ids: sglang.moe_align_block_size(ids, BLOCK, E, return_inactive_prefix_count=1),
        lambda ids: sglang.moe_align_block_size(ids, BLOCK, E, pad_expert_ids=0),
        lambda ids: sglang.moe_align_block_size(ids, BLOCK, E, 0),
        lambda ids: vllm.moe_align_block_size(ids, BLOCK, E, return_scatter_idx=1),
    ],
)
def test_ints_for_flags_are_refused_as_ever(call, fake):
    for name in ("blocks, inverse", "sglang", "sglang, inactive", "scatter"):
        fast_path._known.clear()
        remember(fake, ENTRIES[name])
        with pytest.raises(TypeError, match="bool") as caught:
            call(IDS)
        assert_format(caught.value)
    assert not fake.launched


@pytest.mark.parametrize("calls", [0, 3], ids=["kept", "guarded"])
def test_two_bounds_are_refused_as_ever(calls, fake):
    entry = ENTRIES["limit"]
    remember(fake, entry)
    for _ in range(calls):
        entry.call(IDS, LIMIT)
    fake.launched.clear()
    with pytest.raises(ValueError, match="num_valid_pairs must be a scalar"):
        entry.call(IDS, torch.stack([LIMIT, LIMIT]))
    assert not fake.launched


def test_scatter_idx_with_a_map_that_labels_is_refused_as_ever(fake):
    """Though the operator gives both."""
    problem = AlignSpec(N, E, BLOCK, with_scatter_idx=True)
    operands = {"topk_ids": IDS, "expert_map": MAP}
    remember(fake, Entry(problem, operands, None, None))
    with pytest.raises(ValueError, match="return_scatter_idx"):
        vllm.moe_align_block_size(IDS, BLOCK, E, MAP, False, False, True)
    assert not fake.launched


# -- in place --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more"), [(x, k) for x in IN_PLACE for k in (0, 40) if (x, k) != ("batched", 40)]
)
def test_in_place(name, more, fake):
    """The buffers' rows are the capacity; those of the batched form are compiled in."""
    entry = IN_PLACE[name]
    rows, blocks, *rest = entry.want
    sentinel = entry.problem.num_pairs
    rows = [*rows, *[sentinel] * more]
    blocks = [*blocks, *[-1] * (-(-len(rows) // BLOCK) - len(blocks))]
    want = [rows, blocks, *rest]
    flat = flattened(want)
    remember(fake, entry, rows=len(rows))
    tensors = list(entry.operands.values())
    for _ in range(4):
        fake.launched.clear()
        assert values(entry.call(*tensors, buffers=buffers_of(want))) == flat
        assert fake.launched


@pytest.mark.parametrize("calls", [0, 1, 3], ids=["kept", "recent", "guarded"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_other_buffers(name, calls, fake):
    """They get the errors and the results of the ordinary way."""
    entry = IN_PLACE[name]
    remember(fake, entry, rows=len(entry.want[0]))
    tensors, want = list(entry.operands.values()), entry.want
    flat = flattened(want)
    for _ in range(calls):
        entry.call(*tensors, buffers=buffers_of(want))
    fake.launched.clear()
    for position in range(len(want)):
        good = buffers_of(want)
        whole = torch.full((2 * len(good[0]),), -7, dtype=torch.int32)
        other = whole[: good[position].numel()].view(good[position].shape)
        spoiled = {
            "int64": (good[position].long(), TypeError),
            "negated": (torch._neg_view(-good[position]), ValueError),
            "strided": (torch.stack([good[position]] * 2, -1)[..., 0], ValueError),
            "short": (good[position][:-4], ValueError),
            "no tensor": (good[position].tolist(), TypeError),
            "shared": (other, ValueError),
        }
        for what, (buffer, kind) in spoiled.items():
            given = list(good)
            given[position] = buffer
            if what == "shared":
                neighbour = (position + 1) % len(good)
                given[neighbour] = whole[: good[neighbour].numel()].view(good[neighbour].shape)
            if what == "strided" and buffer.numel() == 1:
                continue  # one element is contiguous
            with pytest.raises(kind) as caught:
                entry.call(*tensors, buffers=given)
            assert_format(caught.value)
            assert all((x == -7).all() for x in good)
        wide = torch.full((good[position].numel() + 1,), -7, dtype=torch.int32)
        good[position] = wide[1:].view(good[position].shape)
        assert values(entry.call(*tensors, buffers=good)) == flat
    assert not fake.launched
    assert values(entry.call(*tensors, buffers=buffers_of(want))) == flat
    assert fake.launched


@pytest.mark.parametrize("bad", ["short", "int64", "strided", "no tensor"])
def test_sglangs_scratch_is_looked_at_each_time(bad, fake):
    entry = IN_PLACE["sglang"]
    remember(fake, entry, rows=len(entry.want[0]))
    entry.call(IDS, buffers=buffers_of(entry.want))
    fake.launched.clear()
    scratch = torch.zeros(E + 2, dtype=torch.int32)
    wrong = {
        "short": scratch[1:],
        "int64": scratch.long(),
        "strided": torch.zeros(2 * E + 4, dtype=torch.int32)[::2],
        "no tensor": None,
    }
    with pytest.raises((TypeError, ValueError), match="cumsum_buffer"):
        sglang.ops_moe_align_block_size(IDS, E + 1, BLOCK, *buffers_of(entry.want), wrong[bad])
    assert not fake.launched
    sglang.ops_moe_align_block_size(
        IDS, E + 1, BLOCK, *buffers_of(entry.want), torch.zeros(99, dtype=torch.int32), True
    )
    assert fake.launched


# -- on a GPU --------------------------------------------------------------------------------------

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.fixture
def only_known(monkeypatch):
    """From when it is called on, a call by the ordinary way fails."""

    def fail(*arguments, **options):
        pytest.fail("the ordinary way")

    return lambda: monkeypatch.setattr(direct_call, "first_launch", fail)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("name", ENTRIES)
def test_gpu_known_calls(name, only_known):
    """Eagerly, on a stream of their own and captured. The first call loads, the second keeps."""
    entry, stream = ENTRIES[name], torch.cuda.Stream()
    flat, tensors = flattened(entry.want), [x.cuda() for x in entry.operands.values()]
    for _ in range(2):
        assert values(entry.call(*tensors)) == flat
    only_known()
    for _ in range(3):
        assert values(entry.call(*tensors)) == flat
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            assert values(entry.call(*tensors)) == flat
    static, graph = [torch.zeros_like(x) for x in tensors], torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with capture(graph):
        got = entry.call(*static)
    for one, x in zip(static, tensors, strict=True):
        one.copy_(x)
    for _ in range(2):
        for result in got:
            result.fill_(-9)
        graph.replay()
        assert values(got) == flat


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("name", IN_PLACE)
def test_gpu_known_calls_in_place(name, only_known):
    entry = IN_PLACE[name]
    flat, tensors = flattened(entry.want), [x.cuda() for x in entry.operands.values()]
    kept = [x.cuda() for x in buffers_of(entry.want)]
    for k in range(6):
        if k == 2:
            only_known()
        for buffers in (kept, [x.cuda() for x in buffers_of(entry.want)]):
            for buffer in buffers:
                buffer.fill_(-7)
            assert values(entry.call(*tensors, buffers=buffers)) == flat
