"""torch_bridge.grouped_matmul and fused_moe on a GPU: every form, CUDA graphs, torch's compiler, streams."""

import numpy as np
import pytest
import torch

import torch_bridge
from tests.bridge.test_moe import assert_near, plain
from tests.gpu.graphs import capture
from tests.moe_layer import oracle
from torch_bridge._direct import store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

E, K, H, N = 16, 4, 256, 128
VLLM = {"transpose_rhs": True}


def weights(dtype=torch.bfloat16, *, experts=E, seed=0):
    """w13 and w2, as vLLM keeps them."""
    rng = torch.Generator("cuda").manual_seed(seed)
    up = torch.randn(experts, 2 * N, H, generator=rng, device="cuda") / H**0.5
    down = torch.randn(experts, H, N, generator=rng, device="cuda") / N**0.5
    return up.to(dtype), down.to(dtype)


def tokens(T, dtype=torch.bfloat16, *, seed=0, ids=torch.int64, experts=E):
    """x, topk_weights and topk_ids, some ids outside of the experts."""
    rng = torch.Generator("cuda").manual_seed(1000 + seed)
    x = torch.randn(T, H, generator=rng, device="cuda").to(dtype)
    order = torch.rand(T, experts + 2, generator=rng, device="cuda").argsort(1) - 1
    return x, torch.rand(T, K, generator=rng, device="cuda"), order[:, :K].to(ids).contiguous()


def captured(call):
    """(A CUDA graph of a call, its result)."""
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        out = call()
    return graph, out


def want_of(x, up, down, shares, ids, sample=None, **options):
    """The oracle's rows of some tokens."""
    rows = range(len(x)) if sample is None else sample
    at = torch.tensor(list(rows), device="cuda")
    given = [t.cpu() for t in (x[at], up, down, shares[at], ids[at])]
    return oracle.layer(*plain(*given), transpose_rhs=True, **options)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 7, 30, 60, 200, 700])
def test_gpu_layer_is_the_oracles_in_every_size_class(T, dtype):
    """Each with tiles of its own: 8 to 144 rows."""
    up, down = weights(dtype)
    x, shares, ids = tokens(T, dtype)
    plan = torch_bridge.explain_fused_moe(x, up, down, shares, ids, **VLLM)
    assert plan.path == "direct" and not plan.copies
    first = torch_bridge.fused_moe(x, up, down, shares, ids, **VLLM)
    sample = sorted({0, T // 2, T - 1})
    assert_near(first[sample].cpu(), want_of(x, up, down, shares, ids, sample))
    for _ in range(3):  # the same bits, also of other memory
        again = torch_bridge.fused_moe(x.clone(), up, down, shares.clone(), ids.clone(), **VLLM)
        assert torch.equal(again, first)


@pytest.mark.parametrize("T", [600, 1000, 2500])
def test_gpu_layer_in_tiles_of_several_heights(T):
    """Of more experts than 16, with more than 66 pairs each; -1 and ids that no expert has among them."""
    many = 24
    up, down = weights(experts=many)
    x, shares, ids = tokens(T, experts=many)
    ids[: T // 2, 0] = 3  # a hot expert, whose run is longer than the 32 blocks of a look
    first = torch_bridge.fused_moe(x, up, down, shares, ids, **VLLM, path="direct")
    sample = [*range(0, T, T // 7), T - 1]
    assert_near(first[sample].cpu(), want_of(x, up, down, shares, ids, sample))
    graph, out = captured(lambda: torch_bridge.fused_moe(x, up, down, shares, ids, **VLLM))
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, first)


def test_gpu_options_of_the_layer():
    up, down = weights()
    x, shares, ids = tokens(30)
    bias = torch.randn(E, 2 * N, device="cuda")
    options = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "interleaved": True}
    got, counts = torch_bridge.fused_moe(
        *(x, up, down, shares, ids),
        **VLLM,
        **options,
        bias_gate_up=bias,
        num_valid_tokens=torch.tensor(20, device="cuda"),
        return_tokens_per_expert=True,
    )
    [given] = plain(bias.cpu())
    want = want_of(x, up, down, shares, ids, **options, bias_gate_up=given, num_valid_tokens=20)
    assert_near(got.cpu(), want)
    kept = ids[:20][(ids[:20] >= 0) & (ids[:20] < E)]
    assert counts.tolist() == torch.bincount(kept, minlength=E).tolist()


def test_gpu_poisoned_memory_and_weights_do_not_show():
    """NaN in what the allocator gives, in weights of dropped pairs and behind the results."""
    up, down = weights()
    x, shares, ids = tokens(100)
    want = torch_bridge.fused_moe(x, up, down, shares, ids, **VLLM)
    shares[(ids < 0) | (ids >= E)] = torch.nan
    for _ in range(3):
        poison = [torch.full((1 << 22,), torch.nan, device="cuda") for _ in range(4)]
        del poison
        held = torch.full((102, H), 7.0, device="cuda", dtype=torch.bfloat16)
        out = torch_bridge.fused_moe(x, up, down, shares, ids, **VLLM, out=held[1:101])
        assert torch.equal(out, want) and bool((held[[0, 101]] == 7).all())


@pytest.mark.parametrize("T", [1, 7, 60, 700])
def test_gpu_weights_of_local_ids_that_no_expert_has_may_be_nan(T):
    """Of an expert_map whose local ids reach beyond the experts that there are weights for."""
    up, down = weights()
    x, shares, _ = tokens(T)
    G = 3 * E
    rng = torch.Generator("cuda").manual_seed(T)
    ids = torch.rand(T, G, generator=rng, device="cuda").argsort(1)[:, :K].contiguous()
    expert_map = torch.randperm(2 * E, device="cuda", dtype=torch.int32)
    expert_map = torch.cat([expert_map, torch.full((E,), -1, device="cuda", dtype=torch.int32)])
    here = (expert_map >= 0) & (expert_map < E)
    shares = shares.masked_fill(~here[ids], torch.nan)
    options = {"expert_map": expert_map, "path": "direct"}
    got, counts = torch_bridge.fused_moe(
        *(x, up, down, shares, ids), **VLLM, **options, return_tokens_per_expert=True
    )
    sample = sorted({0, T // 2, T - 1})
    want = want_of(x, up, down, shares, ids, sample, expert_map=expert_map.tolist())
    assert_near(got[sample].cpu(), want)
    assert bool(got.isfinite().all())
    local = expert_map[ids][here[ids]]
    assert counts.tolist() == torch.bincount(local, minlength=E).tolist()
    again = torch_bridge.fused_moe(*(x, up, down, shares, ids), **VLLM, expert_map=expert_map)
    assert torch.equal(again, got)


@pytest.mark.parametrize("form", ["gathered", "rows"])
@pytest.mark.parametrize("block_size", [8, 24, 64, 128, 144, 176, 184])
def test_gpu_matmul_is_row_by_row(block_size, form):
    up, _ = weights()
    # Of blocks that are cut anew, some follow each other.
    x, _, ids = tokens(60 if block_size <= 128 else 900)
    aligned = torch_bridge.align_blocks(ids, block_size=block_size, num_experts=E)
    P = aligned.sorted_token_ids.shape[0]
    if form == "rows":
        x = torch.randn(P, H, device="cuda").bfloat16()
    out = torch.full((P + 2, 2 * N), 7.0, device="cuda", dtype=torch.bfloat16)
    got = torch_bridge.grouped_matmul(
        *(x, up, aligned),
        block_size=block_size,
        top_k=K if form == "gathered" else None,
        transpose_rhs=True,
        path="direct",
        out=out[1:-1],
    )
    assert got.data_ptr() == out[1:-1].data_ptr() and bool((out[[0, -1]] == 7).all())
    used = int(aligned.num_tokens_post_padded)
    pairs, experts = aligned.sorted_token_ids.cpu(), aligned.expert_ids.cpu()
    want = np.zeros((used, 2 * N))
    for row in range(used):
        if (pair := int(pairs[row])) < ids.numel():
            source = x[pair // K] if form == "gathered" else x[row]
            expert = up[int(experts[row // block_size])].cpu().double()
            want[row] = (expert @ source.cpu().double()).numpy()
    assert_near(got[:used].cpu(), want)


@pytest.mark.parametrize("T", [1, 30, 700])
def test_gpu_graph_replays_with_changed_inputs(T):
    up, down = weights()
    x, shares, ids = tokens(T)
    torch_bridge.fused_moe(x, up, down, shares, ids, **VLLM)
    graph, out = captured(lambda: torch_bridge.fused_moe(x, up, down, shares, ids, **VLLM))
    for seed in range(1, 4):
        for held, new in zip((x, shares, ids), tokens(T, seed=seed), strict=True):
            held.copy_(new)
        graph.replay()
        assert torch.equal(out, torch_bridge.fused_moe(x, up, down, shares, ids, **VLLM))


def test_gpu_graph_holds_layers_with_weights_of_their_own():
    """Descriptors are baked in: those of one layer are not overwritten by the next one's."""
    sets = [weights(seed=seed) for seed in range(4)]
    x, shares, ids = tokens(30)

    def model():
        y = x
        for up, down in sets:
            y = torch_bridge.fused_moe(y, up, down, shares, ids, **VLLM)
        return y

    want = model()
    graph, out = captured(model)
    out.fill_(7)
    graph.replay()
    assert torch.equal(out, want)


def test_gpu_capture_without_the_programs_names_a_remedy():
    up, down = weights(experts=E + 3)
    x, shares, ids = tokens(9)
    with (
        pytest.raises(torch_bridge.Miss, match="Call it once with these shapes"),
        capture(torch.cuda.CUDAGraph()),
    ):
        torch_bridge.fused_moe(x, up, down, shares, ids, **VLLM)


def test_gpu_other_streams_wait_for_what_is_ahead_of_them():
    up, down = weights()
    x, shares, ids = tokens(700)
    want = torch_bridge.fused_moe(x, up, down, shares, ids, **VLLM)
    late = torch.zeros_like(x)
    for _ in range(10):
        stream = torch.cuda.Stream()
        late.zero_()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            late.copy_(x)
            got = torch_bridge.fused_moe(late, up, down, shares, ids, **VLLM)
            result = got.clone()
        stream.synchronize()
        assert torch.equal(result, want)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_gpu_compiled_graph(mode, fresh_dynamo):
    up, down = weights()

    @torch.compile(fullgraph=True, mode=mode)
    def block(x, shares, ids):
        y = torch_bridge.fused_moe(x * 2, up, down, shares, ids, **VLLM)
        return torch.nn.functional.relu(y)

    for seed in range(4):
        given = tokens(30, seed=seed)
        want = torch.relu(torch_bridge.fused_moe(given[0] * 2, up, down, *given[1:], **VLLM))
        assert torch.equal(block(*given).clone(), want)


def test_gpu_changing_sizes_and_pointers_compile_nothing_more():
    """One program serves a range of sizes; descriptors follow addresses and rows."""
    up, down = weights()
    for T in (1, 7, 30, 60, 200, 700):
        torch_bridge.fused_moe(tokens(T)[0], up, down, *tokens(T)[1:], **VLLM)
    before, held = products(), []
    for T in (2, 3, 5, 20, 29, 31, 55, 90, 150, 300, 555, 699):
        x, shares, ids = tokens(T, seed=T)
        got = torch_bridge.fused_moe(x, up, down, shares, ids, **VLLM)
        assert_near(got[[T - 1]].cpu(), want_of(x, up, down, shares, ids, [T - 1]))
        held.append((x, got))  # so that addresses change
    assert products() == before


def products():
    """The programs of the products and sums that are loaded."""
    names = ("grouped_matmul", "sum_rows")
    return {problem for _, problem in store.here.programs if problem.name in names}


def test_gpu_direct_and_dlpack_agree():
    up, down = weights()
    x, shares, ids = tokens(60)
    one, other = (
        torch_bridge.fused_moe(x, up, down, shares, ids, **VLLM, path=path)
        for path in ("direct", "dlpack")
    )
    assert_near(one.cpu(), other.double().cpu().numpy())
