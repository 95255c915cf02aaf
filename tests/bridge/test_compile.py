"""The operators under torch's tracers: fakes, opcheck, torch.compile, torch.export."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_bridge
from tests import oracle
from tests.bridge.helpers import assert_triple, ids_of
from torch_bridge import _ops, dlpack, sglang, vllm
from torch_bridge._direct import fast_path

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
BACKENDS = ["eager", "aot_eager", "inductor"]

OPS = torch.ops.moe_align_jax


def _map(device="cpu"):
    return torch.from_numpy(oracle.local_map("second", 16, 1)).to(device)


# Each entry point as f(ids) for 16 experts and blocks of 8: what traces, and what the oracle compares.
ENTRIES = {
    "plain": lambda x: torch_bridge.moe_align_block_size(x, 16, 8, 3),
    "options": lambda x: torch_bridge.moe_align_block_size(
        x, 16, 8, expert_map=_map(x.device), pad_sorted_ids=True, num_valid_pairs=20
    ),
    "device count": lambda x: torch_bridge.moe_align_block_size(
        x, 16, 8, ignore_invalid_experts=True, num_valid_pairs=torch.full((), 20, device=x.device)
    ),
    "blocks": lambda x: tuple(
        torch_bridge.align_blocks(x, num_experts=16, block_size=8, return_inverse=True)
    ),
    "vllm": lambda x: vllm.moe_align_block_size(x, 8, 16, _map(x.device), True, True, True),
    "batched": lambda x: vllm.batched_moe_align_block_size(40, 8, x.flatten()),
    "sglang": lambda x: sglang.moe_align_block_size(x, 8, 16, return_inactive_prefix_count=True),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("num_tokens", [0, 1, 37])
def test_fakes_have_the_shapes_of_the_results(entry, num_tokens, monkeypatch):
    if entry == "batched" and num_tokens == 0:
        with pytest.raises(ValueError, match="at least one expert"):
            ENTRIES[entry](torch.zeros(0, 3, dtype=torch.int64))
        return
    _, ids = ids_of(torch.int64, num_tokens=num_tokens)
    real = ENTRIES[entry](ids)

    def never(*arguments, **options):
        pytest.fail("a fake tensor reached DLPack")

    monkeypatch.setattr(dlpack, "share", never)
    monkeypatch.setattr(_ops._plan, "resolve", never)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(ids)
        faked = ENTRIES[entry](fake)
    on_meta = ENTRIES[entry](ids.to("meta"))
    for got in (faked, on_meta):
        assert [x.shape for x in got] == [x.shape for x in real]
        assert [x.dtype for x in got] == [x.dtype for x in real]
    assert {x.device.type for x in on_meta} == {"meta"}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("compiled", [False, True])
def test_vmap_is_a_call_for_each_element(entry, compiled):
    """Torch has no rule of its own for operators with a list of results: its error named the operator."""
    _, ids = ids_of(torch.int64, num_tokens=37)
    many = torch.stack([ids, ids.flip(0), ids // 2], dim=1)
    run = torch.func.vmap(ENTRIES[entry], in_dims=1)
    found = (torch.compile(run, backend="aot_eager") if compiled else run)(many)
    for index in range(3):
        one = ENTRIES[entry](many.select(1, index).contiguous())
        assert len(found) == len(one)
        for got, want in zip(found, one, strict=True):
            assert got[index].tolist() == want.tolist() and got.dtype == want.dtype
    if entry != "batched":
        assert [len(part) for part in run(many[:, :0])] == [0] * len(found)


def _op_cases():
    _, ids = ids_of(torch.int32)
    yield "plain", OPS.block_align_dlpack.default, (ids, 16, 8)
    yield "int64", OPS.block_align_dlpack.default, (ids.long(), 16, 8)
    yield (
        "all",
        OPS.block_align_dlpack.options,
        (ids, 16, 8, None, None, None, False, False, True, True, True),
    )
    yield "transposed", OPS.block_align_dlpack.default, (ids.t(), 16, 8)
    yield "no pairs", OPS.block_align_dlpack.default, (ids[:0], 16, 8)
    yield (
        "empty",
        OPS.block_align_dlpack.options,
        (ids[:0], 16, 8, None, None, None, False, False, True, True, True),
    )
    full = (16, 8, _map(), torch.tensor(9), None, True, True)
    yield "map", OPS.block_align_dlpack.options, (ids, *full)
    limited = (16, 8, _map(), None, 9, False, True)
    yield "limit", OPS.block_align_dlpack.options, (ids, *limited)
    sizes = (oracle.capacity(111, 8, 16, False), 28, 1)
    out = tuple(torch.zeros(k, dtype=torch.int32) for k in sizes)
    yield "out", OPS.block_align_out_dlpack.default, (ids, 16, 8, *out)
    yield "sglang", OPS.sglang_block_align_dlpack.default, (ids, 16, 8, False, True)
    yield "batched", OPS.batched_block_align_dlpack.default, (torch.arange(7), 12, 8)


@pytest.mark.parametrize("case", [name for name, _, _ in _op_cases()])
def test_opcheck(case):
    [(op, arguments)] = [(op, arguments) for name, op, arguments in _op_cases() if name == case]
    results = torch.library.opcheck(op, arguments)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


def test_opcheck_reports_a_wrong_fake():
    """What the checks above rest on: a fake with other shapes is found."""
    with torch.library._scoped_library("bridge_test", "FRAGMENT") as library:
        library.define("wrong(Tensor topk_ids) -> Tensor", tags=_ops._COMPLIANT)
        library.impl(
            "wrong",
            lambda x: OPS.block_align_dlpack.default(x, 16, 8)[0],
            "CPU",
        )
        torch.library.register_fake(
            "bridge_test::wrong", lambda x: x.new_empty(3, dtype=torch.int32), lib=library
        )
        with pytest.raises(Exception, match="shape|size|Shapes"):
            torch.library.opcheck(torch.ops.bridge_test.wrong.default, (ids_of(torch.int32)[1],))


def test_operators_through_dlpack_are_kept_out_of_cuda_graphs():
    """All that the library holds, so also those that no list here knows; and the direct ones are not."""
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip(f"torch {torch.__version__} has no Tag.cudagraph_unsafe")
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    names = [name.split("::")[1] for name in names if name.startswith("moe_align_jax::")]
    assert set(names) == set(_ops._OPERATORS) and len(names) >= 16
    for name, op in _ops._OPERATORS.items():
        unsafe = torch.Tag.cudagraph_unsafe in op.tags
        assert unsafe == name.partition(".")[0].endswith("_dlpack"), name
        twin = name if unsafe else _ops.dlpack_name(name)
        assert torch.Tag.cudagraph_unsafe in _ops._OPERATORS[twin].tags


# Each entry with each backend, and with and without dynamic shapes.
COMPILED = [
    (entry, backend, bool((i + j) % 2))
    for i, entry in enumerate(ENTRIES)
    for j, backend in enumerate(BACKENDS[1:])  # "aot_eager" does all that "eager" does
]


@pytest.mark.parametrize(("entry", "backend", "dynamic"), COMPILED)
def test_compile_fullgraph(entry, backend, dynamic):
    compiled = torch.compile(ENTRIES[entry], backend=backend, fullgraph=True, dynamic=dynamic)
    for num_tokens in (37, 5, 64):
        _, ids = ids_of(torch.int64, num_tokens=num_tokens, seed=num_tokens)
        for got, want in zip(compiled(ids), ENTRIES[entry](ids), strict=True):
            assert got.dtype == torch.int32 and torch.equal(got, want)


@pytest.mark.parametrize(
    "backend, dynamic", [(BACKENDS[1], True), *((BACKENDS[2], x) for x in (False, True))]
)
def test_compile_against_the_oracle_in_a_larger_graph(backend, dynamic):
    """Work of torch's own before and after, sizes passed as arguments, a tuple unpacked."""

    def layer(ids, num_experts, block_size):
        sorted_ids, expert_ids, count = torch_bridge.moe_align_block_size(
            ids + 1, num_experts, block_size, ids.shape[1]
        )
        return sorted_ids * 2, expert_ids, count

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    for num_tokens in (5, 9):
        array, ids = ids_of(torch.int64, "uniform", num_tokens=num_tokens)
        want = oracle.align((array + 1).ravel(), block_size=8, num_experts=16)
        doubled = want._replace(sorted_token_ids=[2 * x for x in want.sorted_token_ids])
        assert_triple(tuple(compiled(ids, 16, 8)), doubled)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_out(backend, dynamic):
    def layer(ids, out):
        torch_bridge.moe_align_block_size(ids, 16, 8, out=out)
        return out[2] + 1

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    for num_tokens in (37, 12):
        array, ids = ids_of(torch.int32, num_tokens=num_tokens)
        want = oracle.align(array.ravel(), block_size=8, num_experts=16)
        out = tuple(torch.full((len(x),), -7, dtype=torch.int32) for x in want[:3])
        more = compiled(ids, out)
        assert_triple(out, want)
        assert more.tolist() == [want.num_tokens_post_padded[0] + 1]


def test_compile_dynamic_does_not_compile_again():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(ENTRIES["plain"], backend=counter, fullgraph=True, dynamic=True)
    for num_tokens in (37, 40, 64, 99):
        compiled(ids_of(torch.int64, num_tokens=num_tokens)[1])
    assert counter.frame_count == 1


class Layer(torch.nn.Module):
    def forward(self, ids):
        return torch_bridge.moe_align_block_size(ids, 16, 8, 3)


def test_export_keeps_one_node_and_serves_other_sizes():
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    example = ids_of(torch.int32, num_tokens=40)[1]
    exported = torch.export.export(Layer(), (example,), dynamic_shapes={"ids": {0: tokens}})
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count(OPS.block_align_dlpack.default) == 1
    for num_tokens in (40, 6, 300):
        array, ids = ids_of(torch.int32, num_tokens=num_tokens)
        want = oracle.align(array.ravel(), block_size=8, num_experts=16)
        assert_triple(tuple(exported.module()(ids)), want)


def test_inference_mode():
    array, ids = ids_of(torch.int32)
    want = oracle.align(array.ravel(), block_size=8, num_experts=16)
    with torch.inference_mode():
        assert_triple(torch_bridge.moe_align_block_size(ids.clone(), 16, 8), want)


# -- torch.jit.trace -------------------------------------------------------------------------------

JIT_CALLS = {
    "moe_align_block_size": lambda ids: torch_bridge.moe_align_block_size(ids, 4, 4),
    "with topk": lambda ids: torch_bridge.moe_align_block_size(ids, 4, 4, 2),
    "with a map": lambda ids: torch_bridge.moe_align_block_size(
        ids, 4, 4, expert_map=torch.tensor([1, -1, 0, 2]), ignore_invalid_experts=True
    ),
    "align_blocks": lambda ids: tuple(
        torch_bridge.align_blocks(ids, num_experts=4, block_size=4, return_inverse=True)
    ),
    "vllm": lambda ids: torch_bridge.vllm.moe_align_block_size(ids, 4, 4),
    "sglang": lambda ids: torch_bridge.sglang.moe_align_block_size(ids, 4, 4),
    "batched": lambda ids: torch_bridge.vllm.batched_moe_align_block_size(4, 4, ids[:, 0]),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # topk is compared with a size
@pytest.mark.parametrize("name", JIT_CALLS)
def test_jit_trace_records_the_operator_and_holds_for_other_sizes(name):
    function = JIT_CALLS[name]
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(-1, 5, (n, 2), generator=generator).int() for n in (3, 7)]
    traced = torch.jit.trace(function, (ids[0],))
    assert "moe_align_jax::" in str(traced.graph)
    for given in ids:
        for got, want in zip(traced(given), function(given), strict=True):
            assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
def test_jit_trace_of_a_call_that_took_the_fast_path_before(fake):
    """The fast path launches past the dispatcher: a trace would hold its results as constants."""
    ids = torch.tensor([[1, 0], [1, 3]], dtype=torch.int32)
    for _ in range(3):
        torch_bridge.moe_align_block_size(ids, 4, 4)
    assert fast_path.open_to_all()
    seen = []

    def function(ids):
        seen.append(fast_path.open_to_all())
        return ids + 1

    torch.jit.trace(function, (ids,), check_trace=False)
    assert seen == [False]
