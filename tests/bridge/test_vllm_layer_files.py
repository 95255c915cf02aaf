"""torch_bridge.vllm.patch over vLLM's own `TritonExperts`, out of its files (benchmarks/vllm_experts.py).

`python -m benchmarks.fetch vllm vllm_layer` gets them; without them these tests are skipped.
"""

import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from benchmarks import vllm_experts  # noqa: E402
from tests.bridge import vllm_layer_interpreted  # noqa: E402
from tests.gpu import graphs  # noqa: E402
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


def test_every_module_around_the_layer_is_there():
    """vLLM's own layer in Triton's interpreter: what nothing stands in for would not show before the GPU."""
    command = [sys.executable, "-m", "tests.bridge.vllm_layer_interpreted"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=PEERS.parent)
    assert ran.returncode == 0, ran.stderr
    errors = dict(line.split(": ") for line in ran.stdout.splitlines())
    assert tuple(errors) == vllm_layer_interpreted.FORMS
    assert all(float(error) < 1e-3 for error in errors.values()), errors


@pytest.mark.gpu
@pytest.mark.parametrize("form", [*vllm_layer_interpreted.FORMS, "graph"])
def test_a_layer_gives_what_vllms_does(form, monkeypatch):
    """vLLM's own first, then ours in its place, of the same operands; both near the oracle in float64."""
    case = vllm_layer_interpreted.Case(form, torch.bfloat16)
    given = case.operands("cuda")
    expert_map = None if case.expert_map is None else case.expert_map.cuda()
    launched = []
    ours = _vllm_experts.moe.fused_moe
    monkeypatch.setattr(
        *(_vllm_experts.moe, "fused_moe"), lambda *a, **k: launched.append(k) or ours(*a, **k)
    )
    found = []
    with vllm_experts.imported(PEERS) as module, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # where ours refuses, it says so
        layer = vllm_experts.Layer(module, str(PEERS), *case.sizes, expert_map=expert_map)
        for patched in (False, True):
            out = torch.full_like(given[0], float("nan"))
            if patched:
                with vllm.patch():
                    layer.run(*given, out, case.on_input)
                    if form == "graph":
                        out.fill_(float("nan"))
                        graph = torch.cuda.CUDAGraph()
                        with graphs.capture(graph):
                            layer.run(*given, out, case.on_input)
                        graph.replay()
            else:
                layer.run(*given, out, case.on_input)
            torch.cuda.synchronize()
            found.append(out)
            assert bool(launched) is patched
    for out in found:
        assert case.error(out) < 1e-2
