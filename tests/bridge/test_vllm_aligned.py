"""vLLM's aligned ops for DeepEP and for LoRA: what its compiled ops gave on an H200, plain oracles, errors.

vLLM places the pairs of one expert by atomics, in any order; its results are compared as sets per block of
rows, ours with the oracle exactly.
"""

import pathlib
import re

import numpy as np
import pytest
import torch

from tests import oracle
from tests.bridge.helpers import assert_format
from torch_bridge import vllm

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / "router" / "vllm_golden.npz"))
GLOBALIZED = sorted({key.rpartition(".")[0] for key in GOLDEN if key.startswith("glob-")})
LORA = sorted({key.rpartition(".")[0] for key in GOLDEN if key.startswith("lora-")})


def tensor(array):
    return torch.from_numpy(np.array(array))


def unwritten(*shape):
    return torch.full(shape, -7, dtype=torch.int32)


def assert_same_rows(rows, blocks, count, theirs, block_size):
    """Each expert has the same pairs; all else is equal."""
    want_rows, want_blocks, want_count = theirs
    np.testing.assert_array_equal(count, want_count)
    np.testing.assert_array_equal(blocks, want_blocks)
    used = int(want_count[0]) if want_count.size else 0
    np.testing.assert_array_equal(rows[used:], want_rows[used:])
    for expert in set(want_blocks[: used // block_size].tolist()):
        of_expert = np.repeat(want_blocks[: used // block_size] == expert, block_size)
        got, want = (np.sort(x[:used][of_expert]) for x in (rows, want_rows))
        np.testing.assert_array_equal(got, want)


def assert_aligned(ids, rows, blocks, count, block_size, num_experts):
    """Exactly the oracle's alignment, in buffers of just these sizes."""
    want = oracle.align(ids, block_size=block_size, num_experts=num_experts)
    used = want.num_tokens_post_padded[0]
    assert count == used
    assert rows[:used].tolist() == list(want.sorted_token_ids[:used])
    assert (rows[used:] == len(ids)).all()
    labels = list(want.expert_ids[: used // block_size])
    assert blocks.tolist() == labels + [-1] * (len(blocks) - len(labels))


@pytest.fixture
def path(request):
    """The device: on a CPU the alignment in the middle is launched on a fake GPU, or runs by jax."""
    if request.param == "gpu":
        yield "cuda"
    elif request.param == "direct":
        fake = request.getfixturevalue("fake")
        fake.launches_directly = True
        yield "cpu"
        assert fake.launched
    else:
        yield "cpu"


def on_paths(keys):
    """(key, path) of every golden case on a GPU, real and fake, and of two by jax, each of which compiles."""
    cases = [(key, "direct") for key in keys] + [(key, "jax") for key in keys[1::6][:2]]
    cases += [pytest.param(key, "gpu", marks=pytest.mark.gpu) for key in keys]
    return pytest.mark.parametrize(("key", "path"), cases, indirect=["path"])


@on_paths(GLOBALIZED)
def test_globalize_gives_what_vllms_gave(key, path):
    numbers = re.fullmatch(r"glob-(\d+)-(\d+)-(\d+)-(\d+)-(\d+)-(\d+)-(\d+)-(True|False)", key)
    tokens, top_k, local, first, everyone, block_size, received = map(int, numbers.groups()[:7])
    shapes = [GOLDEN[f"{key}.{name}"].shape for name in ("so", "ex", "nu")]
    if f"{key}.s" in GOLDEN:
        shapes.append((tokens * top_k, 1))
    out = [unwritten(*shape).to(path) for shape in shapes]
    idx = tensor(GOLDEN[f"{key}.inp"]).to(path)
    psum = torch.tensor([0, received // 2, received], dtype=torch.int32, device=path)
    sizes = (first, everyone, local, block_size)
    vllm.fused_globalize_align_block_size(idx, psum, *sizes, *out)
    idx, (rows, blocks, count, *scatter) = idx.cpu(), [x.cpu() for x in out]
    np.testing.assert_array_equal(idx.numpy(), GOLDEN[f"{key}.i"])
    theirs = [GOLDEN[f"{key}.{name}"] for name in ("so", "ex", "nu")]
    assert_same_rows(rows.numpy(), blocks.numpy(), count.numpy(), theirs, block_size)
    for got in scatter:
        np.testing.assert_array_equal(got.numpy(), GOLDEN[f"{key}.s"])
    ids = [
        int(i) if 0 <= i < local and i + first < everyone and pair // top_k < received else -1
        for pair, i in enumerate(GOLDEN[f"{key}.inp"].ravel())
    ]
    want = np.where(np.array(ids) >= 0, np.array(ids) + first, -1)
    np.testing.assert_array_equal(idx.numpy().ravel(), want)
    assert_aligned(ids, rows, blocks, count.item(), block_size, local)


def test_globalize_takes_what_vllms_wraps():
    """An id of 2**32 is no expert, and a group that ends below its first expert has none."""
    idx = torch.tensor([[2**32, 0], [1, -(2**32)]])
    rows, blocks, count = unwritten(8), unwritten(8), unwritten(1)
    psum = torch.tensor([9])
    vllm.fused_globalize_align_block_size(idx, psum, 6, 8, 2, 1, rows, blocks, count)
    assert idx.tolist() == [[-1, 6], [7, -1]] and count.item() == 2
    vllm.fused_globalize_align_block_size(idx, psum, 6, 3, 2, 1, rows, blocks, count)
    assert idx.tolist() == [[-1, -1], [-1, -1]] and count.item() == 0
    none = torch.empty(0, 2, dtype=torch.int64)
    vllm.fused_globalize_align_block_size(none, psum, 6, 8, 2, 1, rows, blocks, count)
    assert count.item() == 0 and (blocks == -1).all()


@on_paths(LORA)
def test_lora_gives_what_vllms_gave(key, path):
    numbers = re.fullmatch(
        r"lora-(\d+)-(\d+)-(\d+)-(\d+)-(\d+)-torch\.int\d+-(True|False)-[01]", key
    )
    _, top_k, experts, block_size, loras = map(int, numbers.groups()[:5])
    given = {name: GOLDEN[f"{key}.{name}"] for name in ("ids", "m", "so", "ex", "nu", "en", "lid")}
    out = [unwritten(*given[name].shape).to(path) for name in ("so", "ex", "nu")]
    local = GOLDEN.get(f"{key}.em")
    vllm.moe_lora_align_block_size(
        tensor(given["ids"]).to(path),
        tensor(given["m"]).to(path),
        experts,
        block_size,
        loras,
        given["so"].shape[1],
        given["ex"].shape[1],
        *out,
        tensor(given["en"]).to(path),
        tensor(given["lid"]).to(path),
        None if local is None else tensor(local).to(path),
    )
    rows, blocks, count = (x.cpu() for x in out)
    for adapter in range(loras):
        mine = rows[adapter].numpy(), blocks[adapter].numpy(), count[adapter : adapter + 1].numpy()
        theirs = [given[name][adapter] for name in ("so", "ex")] + [given["nu"][adapter][None]]
        if not given["en"][adapter]:
            assert all((x == -7).all() for x in (*mine, *theirs))
            continue
        assert_same_rows(*mine, theirs, block_size)
        ids = [
            int(e if local is None else local[e]) if given["m"][pair // top_k] == adapter else -1
            for pair, e in enumerate(given["ids"].ravel())
        ]
        assert_aligned(
            ids, rows[adapter], blocks[adapter], count[adapter].item(), block_size, experts
        )


def lora_arguments(**changed):
    named = {
        "topk_ids": torch.tensor([[1], [0], [3]], dtype=torch.int32),
        "token_lora_mapping": torch.tensor([1, 0, 1]),
        "num_experts": 4,
        "block_size": 2,
        "max_loras": 2,
        "max_num_tokens_padded": 6,
        "max_num_m_blocks": 3,
        "sorted_token_ids": unwritten(2, 6),
        "experts_ids": unwritten(2, 3),
        "num_tokens_post_pad": unwritten(2),
        "adapter_enabled": torch.tensor([True, True, False]),
        "lora_ids": torch.tensor([-1, 0, 1]),
    }
    return {**named, **changed}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint32, torch.uint64])
def test_lora_takes_other_integers_and_unused_adapters(dtype):
    ids = torch.tensor([[1], [0], [3]], dtype=torch.int64).to(dtype)
    named = lora_arguments(topk_ids=ids, lora_ids=torch.tensor([1, 7, -1]))
    vllm.moe_lora_align_block_size(**named)
    assert named["sorted_token_ids"].tolist() == [[-7] * 6, [0, 3, 2, 3, 3, 3]]
    assert named["experts_ids"].tolist() == [[-7] * 3, [1, 3, -1]]
    assert named["num_tokens_post_pad"].tolist() == [-7, 4]


@pytest.mark.parametrize(
    ("kind", "argument", "changed"),
    [
        (TypeError, "topk_ids", {"topk_ids": torch.zeros(3, 1)}),
        (ValueError, "topk_ids", {"topk_ids": torch.zeros(3, dtype=torch.int32)}),
        (ValueError, "max_loras", {"max_loras": 0}),
        (ValueError, "max_num_tokens_padded", {"max_num_tokens_padded": 5}),
        (ValueError, "max_num_m_blocks", {"max_num_m_blocks": 2}),
        (ValueError, "sorted_token_ids", {"sorted_token_ids": unwritten(2, 7)}),
        (TypeError, "experts_ids", {"experts_ids": torch.zeros(2, 3)}),
        (ValueError, "num_tokens_post_pad", {"num_tokens_post_pad": unwritten(3)}),
        (
            ValueError,
            "token_lora_mapping",
            {"token_lora_mapping": torch.zeros(4, dtype=torch.int32)},
        ),
        (ValueError, "adapter_enabled", {"adapter_enabled": torch.ones(1, dtype=torch.int32)}),
        (TypeError, "lora_ids", {"lora_ids": torch.zeros(3)}),
        (ValueError, "expert_map", {"expert_map": torch.zeros(3, dtype=torch.int32)}),
    ],
)
def test_lora_refuses(kind, argument, changed):
    named = lora_arguments(**changed)
    with pytest.raises(kind, match=f"^moe_lora_align_block_size: {argument} must") as caught:
        vllm.moe_lora_align_block_size(**named)
    assert_format(caught.value)
    if "num_tokens_post_pad" not in changed:
        assert (named["num_tokens_post_pad"] == -7).all()


@pytest.mark.parametrize(
    ("kind", "argument", "changed"),
    [
        (TypeError, "topk_idx", {"topk_idx": torch.zeros(2, 2, dtype=torch.int32)}),
        (ValueError, "topk_idx", {"topk_idx": torch.zeros(4, dtype=torch.int64)}),
        (TypeError, "psum", {"psum": torch.zeros(2)}),
        (ValueError, "psum", {"psum": torch.tensor(3)}),
        (ValueError, "rank_expert_offset", {"rank_expert_offset": -1}),
        (TypeError, "local_num_experts", {"local_num_experts": 2.0}),
        (ValueError, "block_size", {"block_size": 0}),
        (ValueError, "sorted_ids", {"sorted_ids": unwritten(5)}),
        (ValueError, "num_tokens_post_pad", {"num_tokens_post_pad": unwritten(2)}),
        (ValueError, "scatter_idx", {"scatter_idx": unwritten(5)}),
    ],
)
def test_globalize_refuses(kind, argument, changed):
    idx = torch.zeros(2, 2, dtype=torch.int64)
    named = {"topk_idx": idx, "psum": torch.tensor([2]), "rank_expert_offset": 2}
    named |= {"global_num_experts": 4, "local_num_experts": 2, "block_size": 2}
    named |= {"sorted_ids": unwritten(6), "expert_ids": unwritten(3)}
    named |= {"num_tokens_post_pad": unwritten(1), **changed}
    with pytest.raises(kind, match=f"^fused_globalize_align_block_size: {argument} must") as caught:
        vllm.fused_globalize_align_block_size(**named)
    assert_format(caught.value)
    assert not idx.any()


def test_globalize_refuses_overlap():
    shared = torch.zeros(12, dtype=torch.int32)
    idx = shared[:8].view(torch.int64).view(2, 2)
    with pytest.raises(ValueError, match="must not overlap"):
        vllm.fused_globalize_align_block_size(
            idx, torch.tensor([2]), 0, 2, 2, 2, shared[6:], unwritten(3), unwritten(1)
        )
    assert not shared.any()


def test_under_torch_compile(fresh_dynamo):
    def globalize(idx, psum, *out):
        vllm.fused_globalize_align_block_size(idx, psum, 4, 8, 4, 2, *out)
        return idx + 1

    def align(named):
        vllm.moe_lora_align_block_size(**named)
        return named["experts_ids"] + 1

    start = torch.tensor([[3, 0], [-1, 2], [1, 4]])
    results = []
    for one in (globalize, torch.compile(globalize, backend="aot_eager", fullgraph=True)):
        idx, out = start.clone(), [unwritten(n) for n in (10, 5, 1)]
        results.append([one(idx, torch.tensor([2]), *out), idx, *out])
    for one in (align, torch.compile(align, backend="aot_eager", fullgraph=True)):
        named = lora_arguments()
        results.append([one(named), *named.values()])
    for want, got in (results[:2], results[2:]):
        for mine, theirs in zip(got, want, strict=True):
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))
