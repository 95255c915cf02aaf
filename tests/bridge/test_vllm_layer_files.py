"""torch_bridge.vllm.patch over vLLM's own `TritonExperts`, out of its files (benchmarks/vllm_experts.py).

`python -m benchmarks.fetch vllm vllm_layer` gets them; without them these tests are skipped.
"""

import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from benchmarks import vllm_experts  # noqa: E402
from tests.gpu import graphs  # noqa: E402
from tests.moe_layer import oracle  # noqa: E402
from torch_bridge import _vllm_experts, vllm  # noqa: E402

PEERS = Path(__file__).parents[2] / ".peers"
pytestmark = pytest.mark.skipif(
    not (PEERS / vllm_experts.FOLDER / "experts" / "triton_moe.py").is_file(),
    reason="python -m benchmarks.fetch vllm vllm_layer",
)


def test_the_class_is_patched_and_comes_back():
    with vllm_experts.imported(PEERS) as module:
        own = module.TritonExperts.apply
        assert tuple(inspect.signature(own).parameters) == _vllm_experts.APPLY_PARAMETERS
        with vllm.patch():
            assert module.TritonExperts.apply is not own
        assert module.TritonExperts.apply is own


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["pairs", "blocks", "map", "weights on input", "graph"])
def test_a_layer_gives_what_vllms_does(form, monkeypatch):
    """vLLM's own first, then ours in its place, of the same operands; both near the oracle in float64."""
    tokens, top_k, experts, hidden, ffn = {"pairs": (2, 2, 32, 256, 128)}.get(
        form, (40, 1 if form == "weights on input" else 2, 8, 256, 128)
    )
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return torch.from_numpy(rng.standard_normal(shape, np.float32)).cuda().bfloat16()

    x, w13 = normal(tokens, hidden), normal(experts, 2 * ffn, hidden) * hidden**-0.5
    w2, slots = normal(experts, hidden, ffn) * ffn**-0.5, experts
    expert_map = None
    if form == "map":
        slots = 2 * experts
        local = np.full(slots, -1, np.int32)
        local[rng.permutation(slots)[:experts]] = np.arange(experts)
        expert_map = torch.from_numpy(local).cuda()
    ids = np.argsort(rng.random((tokens, slots)), 1)[:, :top_k].astype(np.int32)
    weights = torch.from_numpy(rng.uniform(0.2, 1, ids.shape).astype(np.float32)).cuda()
    launched = []
    ours = _vllm_experts.moe.fused_moe
    monkeypatch.setattr(
        *(_vllm_experts.moe, "fused_moe"), lambda *a, **k: launched.append(k) or ours(*a, **k)
    )
    found = []
    with vllm_experts.imported(PEERS) as module, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # where ours refuses, it says so
        sizes = (tokens, top_k, experts, hidden, ffn)
        layer = vllm_experts.Layer(module, str(PEERS), *sizes, expert_map=expert_map)
        given = (x, w13, w2, weights, torch.from_numpy(ids).cuda())
        on_input = form == "weights on input"
        for patched in (False, True):
            out = torch.full_like(x, float("nan"))
            if patched:
                with vllm.patch():
                    layer.run(*given, out, on_input)
                    if form == "graph":
                        out.fill_(float("nan"))
                        graph = torch.cuda.CUDAGraph()
                        with graphs.capture(graph):
                            layer.run(*given, out, on_input)
                        graph.replay()
            else:
                layer.run(*given, out, on_input)
            torch.cuda.synchronize()
            found.append(out.double().cpu().numpy())
            assert bool(launched) is patched
    want, _ = oracle.layer(
        *(t.float().cpu().numpy() for t in (x, w13, w2, weights)),
        ids,
        transpose_rhs=True,
        weights_on_input=form == "weights on input",
        expert_map=None if expert_map is None else expert_map.cpu().tolist(),
    )
    for out in found:
        assert np.linalg.norm(out - want) < 1e-2 * np.linalg.norm(want)
