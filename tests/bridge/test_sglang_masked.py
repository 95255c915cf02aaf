"""silu_and_mul_masked_post_quant_fwd from PyTorch, against NumPy."""

import inspect
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_align_jax import silu_and_mul_masked_quant
from moe_align_jax._masked_quant.problem import MaskedQuantProblem
from tests.gpu.graphs import capture
from tests.layout import masked_quant_oracle as oracle
from torch_bridge import dlpack, sglang
from torch_bridge.sglang import masked_quant

quant = sglang.silu_and_mul_masked_post_quant_fwd
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
UNTOUCHED = 0x55


def buffers(experts, rows, width, *, dtype=torch.bfloat16, device="cpu", group=128, packed=False):
    torch.manual_seed(experts)
    x = (torch.randn(experts, rows, 2 * width) * 3).to(dtype).to(device)
    q = torch.full((experts, rows, width), UNTOUCHED, dtype=torch.uint8, device=device)
    groups = width // group
    shape = (experts, groups // 4, rows) if packed else (experts, rows, groups)
    scales = torch.full(shape, 7, dtype=torch.int32 if packed else torch.float32, device=device)
    counts = torch.arange(experts, dtype=torch.int32) * 2 % (rows + 1)
    return x, q.view(torch.float8_e4m3fn), scales, counts.to(device)


def numpy_of(x):
    """bfloat16 by its bits."""
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        return x.cpu().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.cpu().numpy()


def check(x, q, scales, masked_m, *, packed=False, **options):
    counts = masked_m.cpu().numpy()
    want_q, want_scales = oracle.expected(numpy_of(x), counts, **options)
    codes, found = q.cpu().view(torch.uint8).numpy(), scales.cpu().contiguous().numpy()
    past = np.arange(x.shape[1]) >= np.clip(counts, 0, x.shape[1])[:, None]
    assert (codes[past] == UNTOUCHED).all(), "a row that is not valid was written"
    if packed:
        assert (found.transpose(0, 2, 1)[past] == 7).all()
        found = oracle.unpack(found)
    else:
        assert (found[past] == 7).all()
    oracle.assert_close(codes, found, want_q, want_scales, counts)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {}),
        ({"scale_ue8m0": True}, {"scale_format": "ue8m0"}),
        (
            {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0},
            {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        ),
        ({"gemm1_alpha": None, "gemm1_clamp_limit": 0.1}, {}),  # no limit without alpha
        ({"num_real_tokens": 3, "topk": 2}, {}),
    ],
    ids=str,
)
def test_it_writes_valid_rows_in_place(given, options, device):
    x, q, scales, masked_m = buffers(4, 7, 512, device=device)
    assert quant(x, q, scales, 128, masked_m, **given) is None
    check(x, q, scales, masked_m, **options)


@pytest.mark.parametrize("device", DEVICES)
def test_packed_scales(device):
    x, q, scales, masked_m = buffers(3, 5, 1024, device=device, packed=True)
    quant(x, q, scales, 128, masked_m, True, num_real_tokens=8, topk=1)
    check(x, q, scales, masked_m, packed=True, scale_format="ue8m0")


@pytest.mark.parametrize("device", DEVICES)
def test_column_major_scales_and_float16(device):
    x, q, _, masked_m = buffers(3, 5, 384, device=device, dtype=torch.float16)
    scales = torch.full((3, 3, 8), 7.0, device=device).transpose(1, 2)[:, :5]
    quant(x, q, scales, 128, masked_m)
    check(x, q, scales, masked_m)


@pytest.mark.filterwarnings("ignore:torch_bridge. the direct path cannot run")
@pytest.mark.parametrize("device", DEVICES)
def test_other_groups_and_counts(device):
    x, q, scales, masked_m = buffers(3, 5, 256, device=device, group=64)
    quant(x, q, scales, 64, masked_m.to(torch.int64) * 1000 - 1)
    check(x, q, scales, masked_m * 1000 - 1, group_size=64)


def test_a_view_that_is_not_aligned():
    x, q, scales, masked_m = buffers(2, 4, 128)
    memory = torch.zeros(x.numel() + 1, dtype=x.dtype)
    shifted = memory[1:].view(x.shape).copy_(x)
    quant(shifted, q, scales, 128, masked_m)
    check(x, q, scales, masked_m)


def test_no_rows():
    x, _, _, masked_m = buffers(2, 0, 128)
    _, q, scales, _ = buffers(2, 1, 128)
    quant(x, q[:, :0], scales[:, :0], 128, masked_m)
    assert (q.view(torch.uint8) == UNTOUCHED).all() and (scales == 7).all()


def test_a_new_field_of_the_kernel_is_no_option_of_the_function():
    """By jax the call passes on every option of the function, and nothing that it does not take."""
    wider = namedtuple("Wider", [*MaskedQuantProblem._fields, "new"])
    problem = wider(*MaskedQuantProblem(2, 4, 256, group_size=64), new=3)
    compiled = masked_quant._compiled.__wrapped__(problem)
    named = inspect.signature(silu_and_mul_masked_quant).parameters
    options = compiled.__wrapped__.keywords
    assert {*options} == {*named} - {"x", "masked_m", "implementation"}
    x, _, _, masked_m = buffers(2, 4, 256, group=64)
    x, counts = numpy_of(x), masked_m.numpy()
    codes, scales = map(np.asarray, compiled(x, counts))
    oracle.assert_close(
        codes.view(np.uint8), scales, *oracle.expected(x, counts, group_size=64), counts
    )


def test_a_view_that_is_negated():
    x, q, scales, masked_m = buffers(2, 4, 128)
    quant(torch._neg_view(x), q, scales, 128, masked_m)
    check(-x, q, scales, masked_m)


# -- under torch's tracers -------------------------------------------------------------------------

OPS = torch.ops.moe_align_jax


def column_major(experts, rows, width, device="cpu"):
    x, q, _, masked_m = buffers(experts, rows, width, device=device)
    shape = (experts, width // 128, -(-rows // 4) * 4)
    return x, q, torch.full(shape, 7.0, device=device).transpose(1, 2)[:, :rows], masked_m


# Buffers; arguments past them; what the oracle is told.
FORMS = {
    "plain": (buffers, {}, {}),
    "packed": (
        lambda *sizes, **options: buffers(*sizes, packed=True, **options),
        {"scale_ue8m0": True, "num_real_tokens": 5, "topk": 2},
        {"packed": True, "scale_format": "ue8m0"},
    ),
    "column-major": (
        column_major,
        {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7},
        {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    ),
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("form", "backend", "dynamic"),
    [
        ("plain", "eager", True),
        ("packed", "aot_eager", True),
        ("packed", "inductor", False),
        ("column-major", "aot_eager", False),
        ("column-major", "inductor", True),
    ],
)
def test_compile_fullgraph(form, backend, dynamic, device):
    """Between work of torch's own, whose results it takes and which takes its results."""
    make, options, expected = FORMS[form]

    def layer(x, q, scales, masked_m):
        quant(x + x, q, scales, 128, masked_m, **options)
        return q.float().abs().amax()

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    for experts, rows in ((3, 5), (4, 6)):
        x, q, scales, masked_m = make(experts, rows, 512, device=device)
        q.view(torch.uint8).fill_(UNTOUCHED)
        greatest = compiled(x, q, scales, masked_m)
        check(x + x, q, scales, masked_m, **expected)
        assert greatest == q.float().abs().amax() > 200


@pytest.mark.usefixtures("fresh_dynamo")
def test_other_numbers_of_rows_are_not_compiled_again():
    counter = CompileCounter()
    compiled = torch.compile(quant, backend=counter, fullgraph=True, dynamic=True)
    for rows in (5, 6, 9):
        x, q, scales, masked_m = buffers(3, rows, 256)
        compiled(x, q, scales, 128, masked_m)
        check(x, q, scales, masked_m)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    make, given, _ = FORMS[form]
    x, q, scales, masked_m = make(2, 4, 512)
    options = [float(given.get(name, 0)) for name in ("gemm1_alpha", "gemm1_clamp_limit")]
    arguments = (x, masked_m, q, scales, 128, given.get("scale_ue8m0", False), *options)
    op = OPS.silu_and_mul_masked_quant_into_dlpack.default
    # Not test_schema, which multiplies float8: the operator's inputs are compared here.
    utils = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    before = x.clone(), masked_m.clone()
    results = torch.library.opcheck(op, arguments, test_utils=utils)
    assert list(results.values()) == ["SUCCESS"] * 3
    assert torch.equal(x, before[0]) and torch.equal(masked_m, before[1])


def test_fakes_touch_no_data(monkeypatch):
    monkeypatch.setattr(dlpack, "share", lambda tensor: pytest.fail("a fake tensor reached DLPack"))
    given = buffers(2, 4, 256)
    with FakeTensorMode() as mode:
        x, q, scales, masked_m = map(mode.from_tensor, given)
        assert quant(x, q, scales, 128, masked_m) is None
        with pytest.raises(ValueError, match=r"output_scale must have shape \[2, 4, 2\]"):
            quant(x, q, scales[:1], 128, masked_m)
    x, q, scales, masked_m = (tensor.to("meta") for tensor in given)
    assert quant(x, q, scales, 128, masked_m) is None
    assert (given[1].view(torch.uint8) == UNTOUCHED).all()


def test_the_operator_checks_what_it_is_given():
    """It can be called by torch.ops too."""
    x, q, scales, masked_m = buffers(2, 4, 256)
    with pytest.raises(ValueError, match=r"masked_m must have shape \[2\]"):
        OPS.silu_and_mul_masked_quant_into(x, masked_m[:1], q, scales, 128, False, 0.0, 0.0)
    assert (q.view(torch.uint8) == UNTOUCHED).all()
    OPS.silu_and_mul_masked_quant_into_dlpack(x, masked_m, q, scales, 128, False, 0.0, 0.0)
    check(x, q, scales, masked_m)


def test_only_its_twin_is_kept_out_of_cuda_graphs():
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip(f"torch {torch.__version__} has no Tag.cudagraph_unsafe")
    unsafe = torch.Tag.cudagraph_unsafe
    assert unsafe in OPS.silu_and_mul_masked_quant_into_dlpack.default.tags
    assert unsafe not in OPS.silu_and_mul_masked_quant_into.default.tags


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("device", "mode"),
    [("cpu", None), pytest.param("cuda", "reduce-overhead", marks=pytest.mark.gpu)],
)
def test_inductor_allocates_what_it_writes(device, mode):
    """On a GPU inside inductor's CUDA graph, which replays with other values and counts."""

    # float8 from the start: Triton has no constants of it, and inductor drops a copy that is viewed as
    # another dtype and then written (torch 2.15).
    untouched = torch.full((4, 6, 256), UNTOUCHED, dtype=torch.uint8, device=device)
    untouched = untouched.view(torch.float8_e4m3fn)

    def layer(x, masked_m):
        codes, scales = untouched.clone(), torch.full((4, 6, 2), 7.0, device=device)
        quant(x + x, codes, scales, 128, masked_m)
        return codes, scales

    compiled = torch.compile(layer, mode=mode, fullgraph=True)
    x, _, _, masked_m = buffers(4, 6, 256, device=device)
    for sign in (1, -1, 1, -1):
        masked_m = 6 - masked_m
        codes, found = compiled(sign * x, masked_m)
        check(sign * (x + x), codes, found, masked_m)


# -- graphs and streams ----------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_graph_replays_with_other_counts():
    x, q, scales, masked_m = buffers(8, 64, 2048, device="cuda")
    with pytest.raises(RuntimeError, match="Call it once with these shapes"):
        with capture(torch.cuda.CUDAGraph()):
            quant(x[:, :33].contiguous(), q[:, :33].contiguous(), scales[:, :33].contiguous(), 128,
                  masked_m)  # fmt: skip
    quant(x, q, scales, 128, masked_m)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        quant(x, q, scales, 128, masked_m)
    masked_m.copy_(64 - masked_m)
    q.view(torch.uint8).fill_(UNTOUCHED)
    scales.fill_(7)
    graph.replay()
    torch.cuda.synchronize()
    check(x, q, scales, masked_m)


@pytest.mark.gpu
def test_it_is_ordered_on_the_current_stream():
    x, q, scales, masked_m = buffers(8, 64, 2048, device="cuda")
    other, stream = x.clone(), torch.cuda.Stream()
    quant(x, q, scales, 128, masked_m)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.copy_(-other)
        quant(x, q, scales, 128, masked_m)
        found = q.view(torch.uint8).clone()
        x.fill_(0)
    stream.synchronize()
    check(-other, found.view(torch.float8_e4m3fn), scales, masked_m)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"input": torch.zeros(2, 4, 256)}, TypeError, "input must be bfloat16 or float16"),
        ({"input": [1]}, TypeError, "input must be a torch.Tensor"),
        ({"output": torch.zeros(2, 4, 128)}, TypeError, "output must be float8_e4m3fn"),
        ({"output_scale": torch.zeros(2, 4, 1).double()}, TypeError, "output_scale must be float32"),
        ({"output_scale": torch.zeros(2, 4, 2)}, ValueError, r"output_scale must have shape \[2, 4, 1\]"),
        (
            {"output_scale": torch.zeros(2, 1, 4).int()},
            ValueError,
            "output_scale must be float32 unless scale_ue8m0",
        ),
        ({"masked_m": torch.zeros(3).int()}, ValueError, r"masked_m must have shape \[2\]"),
        ({"masked_m": torch.zeros(2)}, TypeError, "masked_m must be an integer torch.Tensor"),
        ({"quant_group_size": 96}, ValueError, "input must have shape .* N a multiple of 96"),
        ({"gemm1_alpha": -1.0}, ValueError, "gemm1_alpha must be at least 0"),
        ({"gemm1_alpha": "x"}, TypeError, "gemm1_alpha must be a Python number"),
        ({"gemm1_alpha": False}, TypeError, "gemm1_alpha must be a Python number"),
        ({"gemm1_clamp_limit": torch.zeros(2)}, TypeError, "gemm1_clamp_limit must be a Python number"),
        ({"gemm1_clamp_limit": 10**400}, ValueError, "gemm1_clamp_limit must be at least 0"),
        ({"scale_ue8m0": 1}, TypeError, "scale_ue8m0 must be a Python bool"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do_and_write_nothing(change, kind, text):
    x, q, scales, masked_m = buffers(2, 4, 128)
    given = {"input": x, "output": q, "output_scale": scales, "masked_m": masked_m}
    given |= {"quant_group_size": 128} | change
    with pytest.raises(kind, match=f"silu_and_mul_masked_post_quant_fwd: {text}.*[.]$"):
        quant(**given)
    assert (q.view(torch.uint8) == UNTOUCHED).all() and (scales == 7).all()


def test_layouts_and_memory_that_do_not_fit():
    x, q, scales, masked_m = buffers(2, 4, 256)
    strided = torch.zeros(2, 8, 512, dtype=x.dtype)[:, ::2]
    with pytest.raises(ValueError, match="input must be contiguous"):
        quant(strided, q, scales, 128, masked_m)
    with pytest.raises(ValueError, match="output_scale must be contiguous, or column-major"):
        quant(x, q, torch.zeros(2, 4, 4)[..., ::2], 128, masked_m)
    inside = x.view(torch.uint8).view(-1)[: q.numel()].view(q.shape).view(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="output must not overlap input"):
        quant(x, inside, scales, 128, masked_m)
