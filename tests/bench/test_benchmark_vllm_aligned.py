"""The benchmark of vLLM's two other aligned ops: what it holds results to."""

import numpy as np
import pytest

from benchmarks import vllm_aligned
from benchmarks.vllm_aligned import Size
from tests import oracle
from torch_bridge import vllm


@pytest.mark.parametrize("size", [Size("globalize", 16, 4, 64, 4), Size("lora", 9, 2, 6, 4, 3)])
def test_a_fault_is_found(size):
    call = vllm_aligned.Call(size, 1, 8, "cpu")
    call.run(getattr(vllm, vllm_aligned.OPS[size.op]))
    assert call.wrong(stable=True) == ""
    rows, blocks, _ = call.buffers
    # Two rows of the first expert that has two.
    want = oracle.align(
        call.wanted[0].tolist(), block_size=size.block_size, num_experts=size.experts
    )
    first = int(np.flatnonzero(np.array(want.tokens_per_expert) > 1)[0])
    at = list(want.expert_ids).index(first) * size.block_size
    rows[0, [at, at + 1]] = rows[0, [at + 1, at]]
    assert call.wrong(stable=False) == "" and "row" in call.wrong(stable=True)
    rows[0, at] = rows[0, at + 1]
    assert "row" in call.wrong(stable=False)
    blocks[0, 0] += 1
    assert "blocks" in call.wrong(stable=False)
