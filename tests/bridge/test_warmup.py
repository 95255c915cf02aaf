"""warmup on the fake driver: what it loads is what calls need."""

import pytest
import torch

import torch_bridge
from tests import oracle
from tests.bridge.fake_cuda import assert_results, want_of
from tests.bridge.helpers import assert_format, ids_of
from torch_bridge import _ops, _specs, vllm
from torch_bridge._direct import store

ALIGN = {"num_experts": 16, "block_size": 8, "max_tokens": 4}
LAYER = {"num_experts": 4, "topk": 2, "hidden": 128, "ffn": 128, "max_tokens": 4}
ROUTER = {"op": "grouped_topk", "num_experts": 8, "topk": 2, "max_tokens": 4}
WARMUPS = {
    "warmup": (torch_bridge.warmup, ALIGN),
    "warmup_fused_moe": (torch_bridge.warmup_fused_moe, LAYER),
    "warmup_router": (vllm.warmup_router, ROUTER),
}
NO_DEVICES = {
    "": ValueError,
    "gpu": ValueError,
    -1: ValueError,
    2**31: ValueError,
    10**30: ValueError,
}
NO_DEVICES |= {"cuda:x": ValueError, True: TypeError, 1.5: TypeError, ("cuda", 0): TypeError}
# The first argument of a case is the one that the error names.
WRONG = {
    "warmup": {
        TypeError: [
            *({"dtypes": v} for v in (None, torch.int32, (), (torch.float32,), ["int32"])),
            *({"expert_map": v} for v in (1, "yes")),
            *({"num_valid_pairs": v} for v in (1.0, "yes")),
            *({flag: 1} for flag in ("ignore_invalid_experts", "pad_sorted_ids", "sglang")),
            *({flag: None} for flag in ("tokens_per_expert", "return_inverse", "batched")),
        ],
        ValueError: [{"max_tokens": 2**30, "topk": 8}],
    },
    "warmup_fused_moe": {
        TypeError: [
            *({"dtype": v} for v in ("bfloat16", torch.float64, torch.float8_e4m3fn)),
            *({"id_dtypes": v} for v in (torch.int32, (), [torch.bool])),
            *({flag: 1} for flag in ("gated", "pair", "bias_gate_up", "bias_down")),
            *({flag: 1} for flag in ("transpose_rhs", "num_valid_tokens", "weights_on_input")),
            {"block_size": "16"},
            *({"preferred_element_type": v} for v in ("float32", 10**5000)),
        ],
        ValueError: [{"activation": ["silu"]}, {"num_global_experts": 3}, {"swiglu_limit": -1}],
    },
    "warmup_router": {
        TypeError: [
            *({"dtype": v} for v in ("float32", [torch.float32], torch.float64)),
            *({"routed_scaling_factor": v} for v in (None, "2", True)),
            {"ids_dtype": "int32"},
        ],
        ValueError: [
            {"op": ["grouped_topk"]},
            {"topk": 9, "op": "topk_softmax"},
            *({"scoring_func": v} for v in (2, True, "sigmoid")),
            *({"num_expert_group": v} for v in (3, 0)),
            {"topk_group": 2},
            {"num_expert_group": 2, "op": "topk_softmax"},
            {"scoring_func": 1, "op": "topk_sigmoid"},
            {"topk": 2, "num_expert_group": 8},
            {"routed_scaling_factor": float("nan")},
        ],
    },
}


@pytest.mark.parametrize("name", WARMUPS)
def test_warmups_refuse_wrong_values_on_every_machine(name):
    """This one has no GPU: what is wrong with an argument is said before that."""
    call, given = WARMUPS[name]
    wrong = [*WRONG[name].items()]
    wrong += [(kind, [{"device": value}]) for value, kind in NO_DEVICES.items()]
    for kind, cases in wrong:
        for changed in cases:
            with pytest.raises(kind) as caught:
                call(**given | changed)
            argument = next(iter(changed))
            assert str(caught.value).startswith(f"{name}: {argument} must "), caught.value
            assert_format(caught.value)


@pytest.mark.parametrize("kind", ["plain", "sglang", "batched"])
def test_warmup_is_enough_for_a_capture(kind, fake):
    sizes = {"num_experts": 16, "block_size": 8}
    if kind == "batched":
        assert torch_bridge.warmup(**sizes, max_tokens=15, batched=True, device="cpu") == 1
    else:
        sglang_too = kind == "sglang"
        torch_bridge.warmup(**sizes, max_tokens=12, topk=3, sglang=sglang_too, device="cpu")
    # Loaded for device 0; a CPU tensor's is -1.
    programs = store.here.programs
    programs.update({(-1, problem): program for (_, problem), program in programs.items()})
    fake.capturing = True
    compiles = len(fake.compiles)
    if kind == "batched":
        problem = _specs.BatchedSpec(16, 15, 8)
        counts = torch.arange(16) * 3 - 5
        want = oracle.align_batched(counts.tolist(), max_tokens_per_batch=15, block_size=8)
        for given in (counts, counts.int(), counts.to(torch.int16)):
            results = _ops.run(problem, {"expert_num_tokens": given})
            assert_results(problem, results, want)
        other = _specs.BatchedSpec(16, 14, 8)
        with pytest.raises(store.Miss, match="warmup"):
            _ops.run(other, {"expert_num_tokens": counts})
    else:
        for num_tokens in range(1, 13):
            array, ids = ids_of(torch.int64, num_tokens=num_tokens)
            if kind == "sglang":
                problem = _specs.SglangSpec(ids.numel(), 16, 8)
                got = _ops.run(problem, {"topk_ids": ids})
                shifted = [x + 1 if -1 <= x < 16 else 17 for x in array.ravel().tolist()]
                want = oracle.align(shifted, block_size=8, num_experts=17)
                used = int(got[2])
                assert used == want.num_tokens_post_padded[0]
                assert got[0][:used].tolist() == list(want.sorted_token_ids[:used])
            else:
                problem = _specs.AlignSpec(ids.numel(), 16, 8)
                results = _ops.run(problem, {"topk_ids": ids})
                assert_results(problem, results, want_of(problem, array, {}))
    assert len(fake.compiles) == compiles


def test_warmup_of_the_batched_op_takes_no_option_of_the_others(fake):
    sizes = {"num_experts": 16, "block_size": 8, "max_tokens": 4, "batched": True, "device": "cpu"}
    for name, value in (("topk", 2), ("expert_map", True), ("return_inverse", True)):
        with pytest.raises(ValueError, match=name) as caught:
            torch_bridge.warmup(**sizes | {name: value})
        assert_format(caught.value)
    with pytest.raises(ValueError, match="max_tokens") as caught:
        torch_bridge.warmup(**sizes | {"max_tokens": 2**28})
    assert_format(caught.value)
    assert not fake.compiles
