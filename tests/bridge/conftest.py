"""The direct path on CPU tensors."""

import pytest
import torch

from tests.bridge.fake_cuda import FakeMachine
from torch_bridge._direct import fast_path, store


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The direct path on a machine of CPU tensors, with nothing loaded, kept on disk or known."""
    fake = FakeMachine()
    monkeypatch.setenv("TORCH_BRIDGE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(store, "here", store.Store(fake))
    fast_path.forget_all()
    yield fake
    fast_path.forget_all()


@pytest.fixture
def fresh_dynamo():
    """Torch's compiler as in a new process, without what lies on disk: its keys know no operator's schema,
    so that a graph compiled for another version of ours would be run."""
    from torch._functorch import config as autograd
    from torch._inductor import config as inductor

    torch._dynamo.reset()
    with inductor.patch(fx_graph_cache=False), autograd.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()
