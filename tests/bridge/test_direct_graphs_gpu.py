"""The direct path in CUDA graphs and under torch's compiler, on a GPU."""

import pytest
import torch
from torch._dynamo.utils import counters

import torch_bridge
from tests import oracle
from tests.bridge.helpers import assert_format, assert_triple, ids_of, load_programs
from tests.gpu.graphs import capture
from torch_bridge import dlpack
from torch_bridge._direct import store

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
OPS = torch.ops.moe_align_jax


# -- torch.cuda.graph ---------------------------------------------------------------------------------

# n, num_experts, block_size: each form, with one kernel and with more.
SIZES = [(20, 16, 8), (500, 16, 8), (5000, 16, 8), (70_000, 64, 64), (300, 5000, 4)]
OPTIONS = {
    "plain": {},
    "label": {"expert_map": "any"},
    "filter": {"expert_map": "any", "ignore_invalid_experts": True},
    "limit": {"num_valid_pairs": 15},
    "limit tensor": {"num_valid_pairs": torch.tensor(15)},
    "padded": {"pad_sorted_ids": True},
}


def _on_gpu(options, num_experts):
    """The options with tensors on the GPU, and as the oracle takes them."""
    given, plain = dict(options), dict(options)
    if "expert_map" in options:
        plain["expert_map"] = oracle.local_map(options["expert_map"], num_experts, 1)
        given["expert_map"] = torch.from_numpy(plain["expert_map"]).cuda()
    if isinstance(options.get("num_valid_pairs"), torch.Tensor):
        plain["num_valid_pairs"] = int(options["num_valid_pairs"])
        given["num_valid_pairs"] = options["num_valid_pairs"].cuda()
    return given, plain


@pytest.fixture(scope="module")
def options_loaded():
    load_programs(SIZES, OPTIONS.values(), return_counts=True, return_inverse=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("n", "num_experts", "block_size"), SIZES)
def test_gpu_graph_replays_with_changed_inputs(n, num_experts, block_size, options, options_loaded):
    given, plain = _on_gpu(options, num_experts)
    sizes = {"num_experts": num_experts, "block_size": block_size, "return_inverse": True}
    static = torch.zeros(n, dtype=torch.int64, device="cuda")
    torch_bridge.align_blocks(static, **sizes, **given)  # loads, as warmup would
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        got = torch_bridge.align_blocks(static, path="direct", **sizes, **given)
    for seed in range(5):
        array, ids = ids_of(torch.int64, "outside", n, 1, num_experts, seed=seed)
        static.copy_(ids.flatten())
        graph.replay()
        want = oracle.align_numpy(array, **sizes, **plain)
        oracle.assert_same(type(got)(*[x.cpu() for x in got]), want)
        for tensor in got:
            tensor.fill_(-9)


def test_gpu_warmup_is_enough_for_captures_of_every_size(monkeypatch):
    torch_bridge.warmup(num_experts=24, block_size=8, max_tokens=700, topk=4)
    monkeypatch.setattr(store.here.machine, "compile", lambda *a: pytest.fail("compiled"))
    graphs = []
    for n in (1, 8, 9, 32, 33, 64, 65, 512, 513, 2047, 2048, 2049, 2800):
        static = torch.zeros(n, dtype=torch.int32, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with capture(graph):
            got = torch_bridge.moe_align_block_size(static, 24, 8)
        graphs.append((n, static, graph, got))
    for n, static, graph, got in graphs * 2:
        array, ids = ids_of(torch.int32, "outside", n, 1, 24, seed=n)
        static.copy_(ids.flatten())
        graph.replay()
        assert_triple(got, oracle.align(array.ravel(), block_size=8, num_experts=24))


def test_gpu_graph_with_out_and_other_work_around():
    """Ids made and results used within the graph; two calls that share no memory."""
    scores = torch.rand(600, 16, device="cuda")
    rows = oracle.capacity(1200, 8, 16, False)
    out = tuple(torch.empty(k, dtype=torch.int32, device="cuda") for k in (rows, -(-rows // 8), 1))

    def layer():
        ids = torch.topk(scores, 2).indices
        torch_bridge.moe_align_block_size(ids, 16, 8, 2, out=out)
        sorted_ids, _, count = torch_bridge.moe_align_block_size(ids.flatten()[1:], 16, 8)
        return ids, sorted_ids + 1, count * 2

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        ids, shifted, doubled = layer()
    for _ in range(4):
        scores.uniform_()
        graph.replay()
        flat = ids.cpu().flatten()
        assert_triple(out, oracle.align(flat.tolist(), block_size=8, num_experts=16))
        want = oracle.align(flat[1:].tolist(), block_size=8, num_experts=16)
        assert (shifted - 1).tolist() == want.sorted_token_ids
        assert (doubled // 2).tolist() == want.num_tokens_post_padded


def test_gpu_graphs_replay_between_eager_calls_and_on_other_streams():
    """The buffers between two kernels are the graph's own."""
    graphs = []
    for seed in range(3):
        array, ids = ids_of(torch.int32, num_tokens=3000, seed=seed)
        ids = ids.cuda()
        torch_bridge.moe_align_block_size(ids, 16, 8)
        graph = torch.cuda.CUDAGraph()
        with capture(graph):
            got = torch_bridge.moe_align_block_size(ids, 16, 8)
        want = oracle.align_numpy(array, block_size=8, num_experts=16)
        graphs.append((graph, ids, got, want, torch.cuda.Stream()))
    torch.cuda.synchronize()
    eager = []
    for _ in range(50):
        for graph, ids, _, want, stream in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
            eager.append((torch_bridge.moe_align_block_size(ids, 16, 8), want))
    torch.cuda.synchronize()
    for _, _, got, want, _ in graphs:
        assert_triple(got, want)
    for got, want in eager:
        assert_triple(got, want)


def test_gpu_drop_ins_in_a_graph():
    static = torch.zeros(300, 3, dtype=torch.int64, device="cuda")
    local = torch.from_numpy(oracle.local_map("second", 16, 1)).cuda()
    counts = torch.zeros(16, dtype=torch.int32, device="cuda")
    vllm, sglang = torch_bridge.vllm, torch_bridge.sglang
    calls = [
        lambda x, c, m: vllm.moe_align_block_size(x, 8, 16, m, True, True, True),
        lambda x, c, m: sglang.moe_align_block_size(x, 8, 16, return_inactive_prefix_count=True),
        lambda x, c, m: vllm.batched_moe_align_block_size(30, 8, c),
    ]
    graph = torch.cuda.CUDAGraph()
    for call in calls:
        call(static, counts, local)
    torch.cuda.synchronize()
    with capture(graph):
        results = [call(static, counts, local) for call in calls]
    for seed in range(3):
        _, ids = ids_of(torch.int64, "minus_30", 300, seed=seed)
        some = torch.randint(-2, 40, (16,), dtype=torch.int32)
        static.copy_(ids)
        counts.copy_(some)
        graph.replay()
        for call, result in zip(calls, results, strict=True):
            on_cpu = call(ids, some, local.cpu())
            assert all(torch.equal(a.cpu(), b) for a, b in zip(result, on_cpu, strict=True))


def test_gpu_miss_in_a_capture_names_warmup_and_the_context_works_on():
    array, ids = ids_of(torch.int32, num_tokens=333, num_experts=61)
    want, ids = oracle.align(array.ravel(), block_size=7, num_experts=61), ids.cuda()
    out = tuple(torch.full((len(x),), -7, dtype=torch.int32).cuda() for x in want[:3])
    number = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with capture(graph):
        number += 1
        for given in ({}, {"out": out}, {"path": "direct"}):
            with pytest.raises(RuntimeError, match=r"torch_bridge\.warmup") as caught:
                torch_bridge.moe_align_block_size(ids, 61, 7, **given)
            assert_format(caught.value)
        number += 1
    graph.replay()  # the capture went on and is whole
    assert number.item() == 2 and all((x == -7).all() for x in out)
    assert_triple(torch_bridge.moe_align_block_size(ids, 61, 7), want)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        got = torch_bridge.moe_align_block_size(ids, 61, 7)
    graph.replay()
    assert_triple(got, want)


# -- torch's compiler ---------------------------------------------------------------------------------


def _layer(ids, num_experts=16, block_size=8):
    """Work of torch's own before and after."""
    sorted_ids, expert_ids, count = torch_bridge.moe_align_block_size(
        ids + 1, num_experts, block_size
    )
    return sorted_ids * 2, expert_ids, count


def _check_layer(got, array):
    want = oracle.align((array + 1).ravel(), block_size=8, num_experts=16)
    doubled = want._replace(sorted_token_ids=[2 * x for x in want.sorted_token_ids])
    assert_triple(tuple(got), doubled)


@pytest.mark.parametrize("dynamic", [False, True])
def test_gpu_compile_fullgraph(dynamic):
    compiled = torch.compile(_layer, fullgraph=True, dynamic=dynamic)
    for num_tokens in (37, 5, 900):
        array, ids = ids_of(torch.int64, "uniform", num_tokens)
        _check_layer(compiled(ids.cuda()), array)


@pytest.mark.parametrize("dynamic", [False, True])
def test_gpu_compile_reduce_overhead_replays_graphs(dynamic):
    """Inductor's CUDA graphs hold our kernels: right over several replays, and none was left out."""
    counters.clear()
    compiled = torch.compile(_layer, fullgraph=True, dynamic=dynamic, mode="reduce-overhead")
    for seed in range(8):
        for num_tokens in (37, 1000):
            torch.compiler.cudagraph_mark_step_begin()
            array, ids = ids_of(torch.int64, "uniform", num_tokens, seed=seed)
            _check_layer(compiled(ids.cuda()), array)
    assert counters["inductor"]["cudagraph_skips"] == 0


def _dlpack_layer(ids):
    """DLPack's operator between operators of torch's own."""
    sorted_ids, expert_ids, count = torch_bridge.moe_align_block_size(ids + 1, 16, 8, path="dlpack")
    return sorted_ids * 2, expert_ids, count


@pytest.mark.parametrize("dynamic", [False, True])
def test_gpu_compile_reduce_overhead_splits_its_graphs_around_dlpack(dynamic, monkeypatch):
    """Inductor replays one graph before it and one behind, and jax runs between them in every call."""
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip(f"torch {torch.__version__} has no Tag.cudagraph_unsafe")
    seen, replay, share = [], torch.cuda.CUDAGraph.replay, dlpack.share
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (seen.append("graph"), replay(graph))[1]
    )
    monkeypatch.setattr(dlpack, "share", lambda x: (seen.append("jax"), share(x))[1])
    compiled = torch.compile(_dlpack_layer, fullgraph=True, dynamic=dynamic, mode="reduce-overhead")
    for seed in range(8):
        for num_tokens in (37, 1000):
            torch.compiler.cudagraph_mark_step_begin()
            array, ids = ids_of(torch.int64, "uniform", num_tokens, seed=seed)
            ids = ids.cuda()
            seen.clear()
            got = compiled(ids)
            if seed >= 4:  # warmed up and recorded
                assert seen == ["graph", "jax", "graph"]
            _check_layer(got, array)


def test_gpu_compile_with_every_option():
    local = torch.from_numpy(oracle.local_map("any", 16, 1))

    def layer(ids, expert_map, count):
        return torch_bridge.align_blocks(
            ids,
            num_experts=16,
            block_size=8,
            expert_map=expert_map,
            ignore_invalid_experts=True,
            pad_sorted_ids=True,
            num_valid_pairs=count,
            return_inverse=True,
        )

    compiled = torch.compile(layer, fullgraph=True)
    for seed in range(3):
        array, ids = ids_of(torch.int64, seed=seed)
        got = compiled(ids.cuda(), local.cuda(), torch.tensor(70).cuda())
        want = oracle.align(
            array.ravel(),
            num_experts=16,
            block_size=8,
            expert_map=local.tolist(),
            ignore_invalid_experts=True,
            pad_sorted_ids=True,
            num_valid_pairs=70,
            return_inverse=True,
        )
        oracle.assert_same(type(got)(*[x.cpu() for x in got]), want)


def test_gpu_compile_out():
    def layer(ids, out):
        torch_bridge.moe_align_block_size(ids, 16, 8, out=out)
        return out[2] + 1

    compiled = torch.compile(layer, fullgraph=True)
    for seed in range(3):
        array, ids = ids_of(torch.int32, seed=seed)
        want = oracle.align(array.ravel(), block_size=8, num_experts=16)
        out = tuple(torch.full((len(x),), -7, dtype=torch.int32).cuda() for x in want[:3])
        more = compiled(ids.cuda(), out)
        assert_triple(out, want)
        assert more.tolist() == [want.num_tokens_post_padded[0] + 1]


class Layer(torch.nn.Module):
    def forward(self, ids):
        return torch_bridge.moe_align_block_size(ids, 16, 8, 3)


def test_gpu_export_keeps_the_direct_operator():
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    example = ids_of(torch.int32, num_tokens=40)[1].cuda()
    exported = torch.export.export(Layer(), (example,), dynamic_shapes={"ids": {0: tokens}})
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count(OPS.block_align.default) == 1
    for num_tokens in (40, 6, 1300):
        array, ids = ids_of(torch.int32, num_tokens=num_tokens)
        want = oracle.align_numpy(array, block_size=8, num_experts=16)
        assert_triple(tuple(exported.module()(ids.cuda())), want)


@pytest.mark.parametrize("mode", ["autocast", "inference_mode", "no_grad"])
def test_gpu_modes(mode):
    array, ids = ids_of(torch.int32)
    want = oracle.align(array.ravel(), block_size=8, num_experts=16)
    modes = {
        "autocast": lambda: torch.autocast("cuda", dtype=torch.bfloat16),
        "inference_mode": torch.inference_mode,
        "no_grad": torch.no_grad,
    }
    for _ in range(2):  # eagerly, as a call seen before, and compiled
        with modes[mode]():
            given = ids.cuda()
            for path in ("direct", "auto"):
                assert_triple(torch_bridge.moe_align_block_size(given, 16, 8, path=path), want)
    compiled = torch.compile(Layer(), fullgraph=True)
    with modes[mode]():
        assert_triple(tuple(compiled(ids.cuda())), want)


def _op_cases():
    _, ids = ids_of(torch.int32)
    ids = ids.cuda()
    local = torch.from_numpy(oracle.local_map("second", 16, 1)).cuda()
    everything = (16, 8, None, None, None, False, False, True, True, True)
    yield "plain", OPS.block_align.default, (ids, 16, 8)
    yield "int64", OPS.block_align.default, (ids.long(), 16, 8)
    yield "all", OPS.block_align.options, (ids, *everything)
    yield "transposed", OPS.block_align.default, (ids.t(), 16, 8)
    full = (16, 8, local, torch.tensor(9).cuda(), None, True, True)
    yield "map", OPS.block_align.options, (ids, *full)
    limited = (16, 8, local, None, 9, False, True)
    yield "limit", OPS.block_align.options, (ids, *limited)
    rows = oracle.capacity(111, 8, 16, False)
    out = tuple(torch.zeros(k, dtype=torch.int32).cuda() for k in (rows, -(-rows // 8), 1))
    yield "out", OPS.block_align_out.default, (ids, 16, 8, *out)
    yield "sglang", OPS.sglang_block_align.default, (ids, 16, 8, False, True)
    yield "batched", OPS.batched_block_align.default, (torch.arange(7).cuda(), 12, 8)
    into = tuple(x.clone() for x in out)
    yield "into", OPS.block_align_into.default, (ids, local, 16, 8, *into, None)


CASES = ["plain", "int64", "all", "transposed", "map", "limit", "out", "sglang", "batched", "into"]


@pytest.mark.parametrize("case", CASES)
def test_gpu_opcheck(case):
    cases = {name: (op, arguments) for name, op, arguments in _op_cases()}
    assert list(cases) == CASES
    op, arguments = cases[case]
    results = torch.library.opcheck(op, arguments)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4
