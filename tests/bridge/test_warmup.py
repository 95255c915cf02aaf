"""warmup on the fake driver: what it loads is what calls need."""

import pytest
import torch

import torch_bridge
from tests import oracle
from tests.bridge.fake_cuda import assert_results, want_of
from tests.bridge.helpers import assert_format, ids_of
from torch_bridge import _ops, _specs
from torch_bridge._direct import store


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
