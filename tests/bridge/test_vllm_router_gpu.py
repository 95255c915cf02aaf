"""vLLM's router ops on a GPU: many sizes beside NumPy and vLLM's own ops, CUDA graphs, views, no jax.

What holds on a CPU too, the golden vectors among it, is in test_vllm_router.py and test_vllm_aligned.py.
"""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import torch_bridge
from moe_align_jax._router import selftest
from moe_align_jax._router.problem import RouteProblem
from tests.bridge.test_vllm_differential import their_ops as their_ops
from tests.bridge.test_vllm_router import OPS, SCORINGS, buffers, numbers
from tests.gpu.graphs import capture
from torch_bridge import vllm
from torch_bridge._direct import store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


def logits_of(num_tokens, num_experts, dtype=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (num_tokens, num_experts)
    return (torch.randn(shape, generator=generator, device="cuda") * 3).to(dtype)


def on_gpu(num_tokens, top_k, dtype=torch.int32):
    return [x.cuda() for x in buffers(num_tokens, top_k, dtype)]


def launched():
    """Problems of the programs of the router that are loaded."""
    return [problem for _, problem in store.here.programs if isinstance(problem, RouteProblem)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_experts", "top_k"), [(256, 8), (37, 5), (1024, 32), (8, 1)])
@pytest.mark.parametrize("num_tokens", [1, 63, 5000])
def test_gpu_sizes_beside_numpy(num_tokens, num_experts, top_k, dtype):
    """By the direct path: ids by rank, weights, and the order of vLLM."""
    x = logits_of(num_tokens, num_experts, dtype)
    got = on_gpu(num_tokens, top_k, torch.int64)
    is_padding = torch.arange(num_tokens, device="cuda") % 3 == 1
    vllm.topk_softmax(*got, x, True, is_padding=is_padding)
    names = ("topk_weights", "topk_ids", "token_expert_indices")
    found = {name: value.cpu().numpy() for name, value in zip(names, got, strict=True)}
    name = str(dtype).removeprefix("torch.")
    problem = RouteProblem(
        num_tokens, num_experts, top_k, name, renormalize=True, has_padding=True,
        keeps_weights=True, id_words=2, with_order=True,
    )  # fmt: skip
    given = {
        "logits": x.float().cpu().numpy(),
        "is_padding": is_padding.cpu().numpy().astype(np.uint8),
    }
    assert selftest.mismatch(problem, given, found) == ""
    assert any(p.num_experts == num_experts and p.top_k == top_k for p in launched())


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(7, 64, 6), (3000, 256, 8)])
def test_gpu_beside_vllms_ops(num_tokens, num_experts, top_k, op, renormalize, their_ops):
    x, bias = logits_of(num_tokens, num_experts), logits_of(1, num_experts, seed=1)[0] / 30
    is_padding = torch.arange(num_tokens, device="cuda") % 5 == 2
    theirs, ours = on_gpu(num_tokens, top_k), on_gpu(num_tokens, top_k)
    if op == "softmax":
        their_ops.topk_softmax(*theirs, x, renormalize, bias, is_padding)
        vllm.topk_softmax(*ours, x, renormalize, bias, is_padding)
    elif op == "sigmoid":
        their_ops.topk_sigmoid(*theirs, x, renormalize, bias, 2.5, is_padding)
        vllm.topk_sigmoid(*ours, x, renormalize, bias, 2.5, is_padding)
    else:
        given = (x, renormalize, 2.5, bias, None, None, is_padding)
        their_ops.topk_softplus_sqrt(*theirs, *given, None, 0)
        vllm.topk_hash_softplus_sqrt(*ours, *given)
    # What was chosen by differs in the last bits: a few tokens may differ where two are nearly equal.
    same = (ours[1] == theirs[1]).all(dim=1)
    assert same.float().mean() > 0.995, SCORINGS[op]
    torch.testing.assert_close(ours[0][same], theirs[0][same], rtol=1e-4, atol=1e-7)
    assert torch.equal(ours[2], theirs[2])


@pytest.mark.parametrize("scoring_func", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu_grouped_topk_beside_vllms(dtype, scoring_func, their_ops):
    x, bias = logits_of(2000, 256, dtype), (logits_of(1, 256, seed=1)[0] / 30).to(dtype)
    weights, ids = vllm.grouped_topk(x, 8, 4, 8, True, 2.5, bias, scoring_func)
    their_weights, their_ids = their_ops.grouped_topk(x, 8, 4, 8, True, 2.5, bias, scoring_func)
    same = (ids == their_ids).all(dim=1)
    assert same.float().mean() > 0.98
    if scoring_func == 1:  # raw scores of both signs may sum to about 0
        torch.testing.assert_close(weights[same], their_weights[same], rtol=1e-4, atol=1e-7)


def test_gpu_graph_replays_with_changed_logits():
    x, got = logits_of(100, 256), on_gpu(100, 8)
    vllm.topk_softmax(*got, x, True)  # loads the program
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        vllm.topk_softmax(*got, x, True)
    for seed in (1, 2):
        x.copy_(logits_of(100, 256, seed=seed))
        graph.replay()
        want = on_gpu(100, 8)
        vllm.topk_softmax(*want, x, True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gpu_capture_of_a_program_that_is_not_loaded_is_refused():
    x, got = logits_of(10, 250), on_gpu(10, 3)
    with pytest.raises(torch_bridge.Miss, match=r"Call torch_bridge\.vllm\.warmup_router"):
        with capture(torch.cuda.CUDAGraph()):
            vllm.topk_sigmoid(*got, x)
    torch.cuda.synchronize()
    assert (got[0] == -7).all()


def test_gpu_warmup_is_enough_for_a_capture():
    sizes = {"num_experts": 120, "topk": 6, "max_tokens": 300}
    options = {"renormalize": True, "is_padding": True, "ids_dtype": torch.int64}
    assert vllm.warmup_router("topk_sigmoid", **sizes, **options) == 4
    is_padding = torch.zeros(300, dtype=torch.bool, device="cuda")
    for num_tokens in (1, 100, 300):
        x, got = logits_of(num_tokens, 120), on_gpu(num_tokens, 6, torch.int64)
        graph = torch.cuda.CUDAGraph()
        with capture(graph):
            vllm.topk_sigmoid(*got, x, True, is_padding=is_padding[:num_tokens])
        graph.replay()
        assert torch.equal(got[1], x.topk(6).indices)


def test_gpu_aligned_ops_are_captured():
    """DeepEP's: its number of tokens is read at the replay."""
    idx = torch.randint(-1, 10, (64, 8), device="cuda")
    psum = torch.tensor([10, 50], dtype=torch.int32, device="cuda")
    start, rows = idx.clone(), 64 * 8 + 8 * 15
    out = [torch.empty(n, dtype=torch.int32, device="cuda") for n in (rows, -(-rows // 16), 1)]
    vllm.fused_globalize_align_block_size(idx, psum, 8, 32, 8, 16, *out)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        vllm.fused_globalize_align_block_size(idx, psum, 8, 32, 8, 16, *out)
    for received in (0, 7, 64):
        psum[1] = received
        idx.copy_(start)
        graph.replay()
        valid = (start >= 0) & (start < 8) & (torch.arange(64, device="cuda")[:, None] < received)
        assert torch.equal(idx, torch.where(valid, start + 8, -1))
        pairs = out[0][out[0] < 512].sort().values
        assert torch.equal(pairs.long(), valid.view(-1).nonzero()[:, 0])


def test_gpu_views_at_any_element():
    """Odd rows of halves, operands and results off every boundary, ids of 32 unsigned bits."""
    x = logits_of(40, 37, torch.bfloat16).flatten()[37 * 3 :].view(37, 37)
    room = torch.zeros(37 * 4 + 1, device="cuda")
    weights = room[1:].view(37, 4)
    ids = torch.empty(37 * 4 + 1, dtype=torch.uint32, device="cuda")[1:].view(37, 4)
    order = torch.zeros(37, 4, dtype=torch.int32, device="cuda")
    vllm.topk_softmax(weights, ids, order, x)
    want = [y.cuda() for y in buffers(37, 4)]
    vllm.topk_softmax(*want, x.clone())
    np.testing.assert_array_equal(numbers(ids.cpu()), numbers(want[1].cpu()))
    assert torch.equal(weights, want[0]) and torch.equal(order, want[2])
    assert room[0] == 0


def test_gpu_direct_call_needs_no_jax():
    code = """
        import sys, torch
        from torch_bridge import vllm
        x = torch.randn(4, 64, device="cuda")
        weights = torch.empty(4, 2, device="cuda")
        ids, order = (torch.empty(4, 2, dtype=torch.int32, device="cuda") for _ in range(2))
        vllm.topk_softmax(weights, ids, order, x)
        assert torch.equal(ids.long(), x.topk(2).indices)
        print("jax" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["False"], done.stderr[-3000:]
