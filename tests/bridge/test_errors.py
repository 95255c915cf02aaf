"""out=, and every error: its kind, its format, and that nothing was written."""

import numpy as np
import pytest
import torch

import torch_bridge
from tests import oracle
from tests.bridge.helpers import assert_format, assert_triple, ids_of
from torch_bridge import _ops, deep_gemm, dlpack, sglang, vllm


def outputs_for(n=12, num_experts=4, block_size=4, fill=-7):
    rows = oracle.capacity(n, block_size, num_experts, False)
    return tuple(torch.full((k,), fill, dtype=torch.int32) for k in (rows, -(-rows // 4), 1))


IDS = torch.tensor([[2, 3, 4], [1, 2, 0], [1, 3, 0], [1, 2, 3]], dtype=torch.int32)
WANT = oracle.align(IDS.flatten().tolist(), block_size=4, num_experts=4)


@pytest.mark.parametrize("container", [tuple, list])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_out_is_written_and_returned(dtype, container):
    out = outputs_for()
    pointers = [x.data_ptr() for x in out]
    got = torch_bridge.moe_align_block_size(IDS.to(dtype), 4, 4, out=container(out))
    assert all(a is b for a, b in zip(got, out, strict=True))
    assert [x.data_ptr() for x in out] == pointers
    assert_triple(got, WANT)


def test_out_with_every_option_and_no_pairs():
    array, ids = ids_of(torch.int64)
    local = oracle.local_map("second", 16, 1)
    options = {"ignore_invalid_experts": True, "pad_sorted_ids": True, "num_valid_pairs": 50}
    want = oracle.align(array.ravel(), block_size=4, num_experts=16, expert_map=local, **options)
    out = tuple(torch.full((len(x),), -7, dtype=torch.int32) for x in want[:3])
    options["expert_map"] = torch.from_numpy(local)
    assert_triple(torch_bridge.moe_align_block_size(ids, 16, 4, out=out, **options), want)
    out = tuple(torch.full((k,), -7, dtype=torch.int32) for k in (0, 0, 1))
    empty = oracle.align([], block_size=4, num_experts=16)
    assert_triple(torch_bridge.moe_align_block_size(ids[:0], 16, 4, out=out), empty)


def test_out_may_be_slices_of_one_buffer_beside_the_ids():
    """They share a storage and no byte; the ids are strided and step over nothing of theirs."""
    sizes = [x.numel() for x in outputs_for()]
    buffer = torch.full((64,), -7, dtype=torch.int32)
    ids = buffer[-24::2].copy_(IDS.flatten())
    out = torch.split(buffer[: sum(sizes)], sizes)
    assert_triple(torch_bridge.moe_align_block_size(ids, 4, 4, out=out), WANT)


def _overlapping(case):
    out, ids = list(outputs_for()), IDS.clone().flatten()
    if case == "each other":
        out[1] = out[0][: out[1].numel()]
    elif case == "the last":
        out[2] = out[0][-1:]
    elif case == "topk_ids":
        out[2] = ids[5:6]
    elif case == "strided topk_ids":
        ids = torch.stack([ids, ids], 1)[:, 0]
        out[2] = ids[3:4].contiguous() if ids.stride() == (1,) else ids.as_strided((1,), (1,), 6)
    options = {}
    if case == "expert_map":
        options["expert_map"] = torch.arange(4, dtype=torch.int32)
        out[2] = options["expert_map"][2:3]
    elif case == "num_valid_pairs":
        out[2] = options["num_valid_pairs"] = torch.tensor([12], dtype=torch.int32)
    return ids, out, options


OVERLAPS = [
    "each other",
    "the last",
    "topk_ids",
    "strided topk_ids",
    "expert_map",
    "num_valid_pairs",
]


@pytest.mark.parametrize("case", OVERLAPS)
def test_out_must_not_overlap(case):
    ids, out, options = _overlapping(case)
    before = [x.clone() for x in (ids, *out)]
    with pytest.raises(ValueError, match="must not overlap") as caught:
        torch_bridge.moe_align_block_size(ids, 4, 4, out=out, **options)
    assert_format(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, (ids, *out), strict=True))


@pytest.mark.parametrize("case", OVERLAPS)
def test_without_the_overlap_guard_memory_is_overwritten(case, monkeypatch):
    monkeypatch.setattr(_ops, "check_no_overlap", lambda *arguments: None)
    ids, out, options = _overlapping(case)
    before = [x.clone() for x in (ids, *options.values()) if isinstance(x, torch.Tensor)]
    got = torch_bridge.moe_align_block_size(ids, 4, 4, out=out, **options)
    after = [x for x in (ids, *options.values()) if isinstance(x, torch.Tensor)]
    intact = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    right = all(x.tolist() == list(y) for x, y in zip(got, WANT[:3], strict=True))
    assert not (intact and right) or case == "num_valid_pairs"  # 12 is written over 12


def test_strided_inputs_between_which_out_lies_do_not_overlap():
    """Exact, not by span: rows of one matrix, the ids in its left half and a result in its right."""
    matrix = torch.full((4, 6), -7, dtype=torch.int32)
    matrix[:, :3] = IDS
    out = list(outputs_for())
    out[2] = matrix[1, 4:5]
    assert_triple(torch_bridge.moe_align_block_size(matrix[:, :3], 4, 4, out=out), WANT)


def _bad_outs():
    good = outputs_for()
    spread = torch.full((good[0].numel(), 2), -7, dtype=torch.int32)[:, 0]
    return {
        "two tensors": (good[:2], TypeError),
        "one tensor": (good[0], TypeError),
        "an array": ((good[0].numpy(), *good[1:]), TypeError),
        "int64": ((good[0].long(), *good[1:]), TypeError),
        "short": ((good[0][1:], *good[1:]), ValueError),
        "2-D": ((good[0], good[1], good[2][None]), ValueError),
        "strided": ((spread, *good[1:]), ValueError),
        "device": ((good[0].to("meta"), *good[1:]), ValueError),
    }


@pytest.mark.parametrize("case", _bad_outs())
def test_out_must_fit(case):
    out, kind = _bad_outs()[case]
    with pytest.raises(kind) as caught:
        torch_bridge.moe_align_block_size(IDS, 4, 4, out=out)
    assert_format(caught.value)
    for tensor in out if isinstance(out, tuple) else [out]:
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
            assert (tensor == -7).all()


META_MAP = torch.zeros(4, dtype=torch.int32, device="meta")


def _quantized():
    return torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)


BAD_CALLS = {
    "array ids": ((IDS.numpy(), 4, 4), {}, TypeError),
    "float ids": ((IDS.float(), 4, 4), {}, TypeError),
    "bool ids": ((IDS.bool(), 4, 4), {}, TypeError),
    "sparse ids": ((IDS.to_sparse(), 4, 4), {}, TypeError),
    "quantized ids": ((_quantized, 4, 4), {}, TypeError),
    "num_experts 0": ((IDS, 0, 4), {}, ValueError),
    "num_experts bool": ((IDS, True, 4), {}, TypeError),
    "num_experts float": ((IDS, 4.0, 4), {}, TypeError),
    "block_size 0": ((IDS, 4, 0), {}, ValueError),
    "block_size negative": ((IDS, 4, -4), {}, ValueError),
    "block_size text": ((IDS, 4, "4"), {}, TypeError),
    "block_size too large": ((IDS, 4, 2**30), {}, ValueError),
    "topk 2-D": ((IDS, 4, 4, 2), {}, ValueError),
    "topk 1-D": ((IDS.flatten(), 4, 4, 5), {}, ValueError),
    "topk 0-D": ((IDS[0, 0], 4, 4, 1), {}, ValueError),
    "topk 0": ((IDS, 4, 4, 0), {}, ValueError),
    "topk float": ((IDS, 4, 4, 3.0), {}, TypeError),
    "map type": ((IDS, 4, 4), {"expert_map": [0, 1, 2, 3]}, TypeError),
    "map dtype": ((IDS, 4, 4), {"expert_map": torch.zeros(4)}, TypeError),
    "map shape": ((IDS, 4, 4), {"expert_map": torch.arange(3)}, ValueError),
    "map rank": ((IDS, 4, 4), {"expert_map": torch.arange(4)[None]}, ValueError),
    "map device": ((IDS, 4, 4), {"expert_map": META_MAP}, ValueError),
    "ignore flag": ((IDS, 4, 4), {"ignore_invalid_experts": 1}, TypeError),
    "pad flag": ((IDS, 4, 4), {"pad_sorted_ids": None}, TypeError),
    "limit bool": ((IDS, 4, 4), {"num_valid_pairs": True}, TypeError),
    "limit float": ((IDS, 4, 4), {"num_valid_pairs": 2.0}, TypeError),
    "limit vector": ((IDS, 4, 4), {"num_valid_pairs": torch.arange(2)}, ValueError),
    "limit dtype": ((IDS, 4, 4), {"num_valid_pairs": torch.tensor(1.0)}, TypeError),
    "path": ((IDS, 4, 4), {"path": "xla"}, ValueError),
    "path direct": ((IDS, 4, 4), {"path": "direct"}, NotImplementedError),
}


def _bad_call(case):
    arguments, options, kind = BAD_CALLS[case]
    return tuple(x() if callable(x) else x for x in arguments), options, kind


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("entry", ["moe_align_block_size", "explain"])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_errors(case, entry):
    arguments, options, kind = _bad_call(case)
    with pytest.raises(kind) as caught:
        getattr(torch_bridge, entry)(*arguments, **options)
    assert_format(caught.value)
    assert str(caught.value).startswith(f"{entry}: ")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("case", [x for x in BAD_CALLS if x not in ("path", "path direct")])
def test_nothing_is_written_on_error(case):
    arguments, options, kind = _bad_call(case)
    out = outputs_for()
    with pytest.raises(kind):
        torch_bridge.moe_align_block_size(*arguments, out=out, **options)
    assert all((x == -7).all() for x in out)


def test_capture_is_refused_before_jax_is_touched(monkeypatch):
    """Where no GPU is: the guard itself, and that it comes ahead of planning and running."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="capture") as caught:
        dlpack.check_not_capturing("moe_align_block_size", torch.device("cuda", 0))
    assert_format(caught.value)
    dlpack.check_not_capturing("moe_align_block_size", torch.device("cpu"))

    def refuse(function, device):
        raise RuntimeError("capturing")

    monkeypatch.setattr(dlpack, "check_not_capturing", refuse)
    monkeypatch.setattr(dlpack, "jax_platform", lambda *a: pytest.fail("asked jax"))
    monkeypatch.setattr(_ops.dlpack_call, "run_in_jax", lambda *a, **k: pytest.fail("ran"))
    with pytest.raises(RuntimeError, match="capturing"):
        torch_bridge.moe_align_block_size(IDS, 4, 4)


def test_warmup_says_why_not():
    with pytest.raises(NotImplementedError) as caught:
        torch_bridge.warmup(num_experts=8, block_size=16, max_tokens=64)
    assert_format(caught.value)


DROP_IN_ERRORS = {
    "vllm ids": (lambda: vllm.moe_align_block_size(IDS.float(), 4, 4), TypeError),
    "vllm flag": (
        lambda: vllm.moe_align_block_size(IDS, 4, 4, return_scatter_idx=1),  # type: ignore
        TypeError,
    ),
    "vllm scatter": (
        lambda: vllm.moe_align_block_size(IDS, 4, 4, torch.arange(4), False, False, True),
        ValueError,
    ),
    "batched rank": (
        lambda: vllm.batched_moe_align_block_size(4, 4, torch.zeros(2, 2, dtype=torch.int32)),
        ValueError,
    ),
    "batched empty": (
        lambda: vllm.batched_moe_align_block_size(4, 4, torch.zeros(0, dtype=torch.int32)),
        ValueError,
    ),
    "batched size": (lambda: vllm.batched_moe_align_block_size(0, 4, torch.arange(3)), ValueError),
    "batched too large": (
        lambda: vllm.batched_moe_align_block_size(2**30, 4, torch.arange(3)),
        ValueError,
    ),
    "sglang ids": (lambda: sglang.moe_align_block_size(IDS.float(), 4, 4), TypeError),
    "sglang flag": (lambda: sglang.moe_align_block_size(IDS, 4, 4, 1), TypeError),  # type: ignore
    "sglang size": (lambda: sglang.moe_align_block_size(IDS, 2**30, 4), ValueError),
}


@pytest.mark.parametrize("case", DROP_IN_ERRORS)
def test_errors_of_the_drop_ins(case):
    call, kind = DROP_IN_ERRORS[case]
    with pytest.raises(kind) as caught:
        call()
    assert_format(caught.value)


def test_default_tensors_of_this_file_are_right():
    assert WANT.num_tokens_post_padded == [16]
    np.testing.assert_array_equal(WANT.tokens_per_expert, [2, 3, 3, 3])


HUGE = {
    "moe_align_block_size": lambda ids, n: torch_bridge.moe_align_block_size(ids, n, 4),
    "align_blocks": lambda ids, n: torch_bridge.align_blocks(ids, num_experts=n, block_size=4),
    "explain": lambda ids, n: torch_bridge.explain(ids, n, 4),
    "vllm": lambda ids, n: torch_bridge.vllm.moe_align_block_size(ids, 4, n),
    "sglang": lambda ids, n: torch_bridge.sglang.moe_align_block_size(ids, 4, n),
    "warmup": lambda ids, n: torch_bridge.warmup(num_experts=n, block_size=4, max_tokens=4),
}


@pytest.mark.parametrize("size", [2**31, 10**30], ids=str)
@pytest.mark.parametrize("tokens", [0, 4])
@pytest.mark.parametrize("name", HUGE)
def test_more_experts_than_int32_holds_are_refused(name, tokens, size):
    ids = torch.zeros(tokens, 2, dtype=torch.int32)
    with pytest.raises(ValueError) as raised:
        HUGE[name](ids, size)
    text = str(raised.value)
    assert f": num_experts must be at most 2**31 - 1; got {size}. " in text
    assert_format(text)


X, UP = torch.zeros(4, 128, dtype=torch.bfloat16), torch.zeros(4, 128, 128, dtype=torch.bfloat16)
ALIGNED = torch_bridge.align_blocks(IDS, num_experts=4, block_size=4, return_inverse=True)
PATHS = {
    "moe_align_block_size": lambda path: torch_bridge.moe_align_block_size(IDS, 4, 4, path=path),
    "align_blocks": lambda path: torch_bridge.align_blocks(
        IDS, num_experts=4, block_size=4, path=path
    ),
    "explain": lambda path: torch_bridge.explain(IDS, 4, 4, path=path),
    "grouped_matmul": lambda path: torch_bridge.grouped_matmul(
        X, UP, ALIGNED, block_size=4, top_k=IDS.shape[1], path=path
    ),
    "fused_moe": lambda path: torch_bridge.fused_moe(
        X, UP, UP, IDS.float(), IDS, gated=False, path=path
    ),
}


@pytest.mark.parametrize("name", PATHS)
def test_what_is_no_name_is_no_path(name):
    """An array was compared with "auto" value by value, ahead of the check."""
    for value in (np.zeros((2, 2)), np.array(["auto", "direct"]), ["auto"], b"auto", None, 1):
        with pytest.raises(ValueError, match=f"^{name}: path must be one of ") as caught:
            PATHS[name](value)
        assert_format(caught.value)


OF_NESTED = {
    "topk_weights": lambda n: vllm.topk_softmax(n, zeros(2, 1), zeros(2, 1), torch.zeros(2, 2)),
    "topk_ids": lambda n: vllm.topk_sigmoid(
        torch.zeros(2, 1), n.int(), zeros(2, 1), torch.zeros(2, 2)
    ),
    "sf": lambda n: deep_gemm.transform_sf_into_required_layout(n, 128, 128, (1, 128)),
    "output_scale": lambda n: sglang.silu_and_mul_masked_post_quant_fwd(
        *(torch.ones(2, 4, 256).bfloat16(), torch.zeros(2, 4, 128, dtype=torch.float8_e4m3fn)),
        *(n, 128, zeros(2)),
    ),
}


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("argument", OF_NESTED)
def test_a_nested_tensor_is_asked_for_no_shape(argument):
    """It raises what PyTorch calls an internal error."""
    with pytest.raises(
        TypeError, match=f": {argument} must be a dense tensor; got a nested"
    ) as got:
        OF_NESTED[argument](torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    assert_format(got.value)


def test_explanations_know_the_options_of_what_they_explain():
    """Unknown and missing ones were a TypeError of a function that users do not know."""
    x, weights, ids = torch.ones(1, 8), torch.ones(1, 1), zeros(1, 1)
    layer = x, torch.ones(2, 8, 16), torch.ones(2, 8, 8), weights, ids
    with pytest.raises(
        TypeError, match="^explain_fused_moe: options must .*; got topk, fast"
    ) as got:
        torch_bridge.explain_fused_moe(*layer, topk=1, fast=True)
    assert_format(got.value)
    aligned = torch_bridge.align_blocks(ids, block_size=2, num_experts=2)
    with pytest.raises(TypeError, match="^explain_grouped_matmul: block_size must be given") as got:
        torch_bridge.explain_grouped_matmul(x, layer[1], aligned, top_k=1)
    assert_format(got.value)


def test_an_array_that_is_no_tensor_is_told_from_one():
    """It was "must be an integer torch.Tensor; got int32 [4, 3]" of a NumPy array of int32."""
    x, w = torch.ones(4, 8), torch.ones(4, 8, 8)
    layer = (x, w[:, :, :4].repeat(1, 1, 2), w[:, :4], torch.ones(4, 3), IDS)
    rows = w[:, :4].to(torch.bfloat16)
    calls = {
        "topk_ids": lambda: torch_bridge.moe_align_block_size(IDS.numpy(), 4, 4),
        "x": lambda: torch_bridge.fused_moe(x.numpy(), *layer[1:]),
        "gating_output": lambda: vllm.topk_softmax(layer[3], IDS, IDS.clone(), x.numpy()),
        "masked_m": lambda: sglang.silu_and_mul_masked_post_quant_fwd(
            *(rows, rows, x, 128, np.ones(4, np.int32))
        ),
        "b": lambda: deep_gemm.m_grouped_bf16_gemm_nt_masked(
            *(rows, w.numpy(), rows.clone(), torch.ones(4, dtype=torch.int32), 1)
        ),
    }
    for name, call in calls.items():
        with pytest.raises(
            TypeError, match=rf"{name} must .*; got an array of NumPy, \w+ \["
        ) as seen:
            call()
        assert_format(seen.value)
    with pytest.raises(
        ValueError, match="topk_ids must be on the same device as the other tensors"
    ):
        torch_bridge.fused_moe(*layer[:4], IDS.to("meta"))


def test_what_overlaps_is_not_asked_to_be_int32():
    x = torch.zeros(2, 4, 256, dtype=torch.bfloat16)
    codes = x.view(torch.uint8).flatten()[: 2 * 4 * 128].view(2, 4, 128).view(torch.float8_e4m3fn)
    counts = torch.ones(2, dtype=torch.int32)
    with pytest.raises(
        ValueError, match="output must not overlap input; .* Pass a buffer of its own"
    ):
        sglang.silu_and_mul_masked_post_quant_fwd(x, codes, torch.zeros(2, 4, 1), 128, counts)
