"""The direct path on CPU tensors."""

import contextlib

import pytest
import torch

from tests.bridge.fake_cuda import FakeCuda
from torch_bridge._direct import driver, fast_path, program

UNWRITTEN = -77_777


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The direct path on CPU tensors: the driver emulates; device -1 is the CPU's."""
    fake = FakeCuda()
    fake.stream, fake.compiles = 7, []

    def compile_(index, wanted):
        fake.compiles.append(list(wanted))
        return [fake.entry(problem) for problem in wanted]

    monkeypatch.setenv("TORCH_BRIDGE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "library", lambda: fake)
    monkeypatch.setattr(driver, "enter", lambda index: None)
    monkeypatch.setattr(program, "_compile", compile_)
    monkeypatch.setattr(program, "_gpu", lambda index: "fake sm_90")
    monkeypatch.setattr(program, "_programs", {})
    monkeypatch.setattr(program, "_failures", {})
    monkeypatch.setattr(program, "_verdicts", {})
    monkeypatch.setattr(program, "unavailable", lambda device: None)
    monkeypatch.setattr(program, "raw_stream", lambda index: fake.stream)
    monkeypatch.setattr(program, "current_device", lambda: None)
    monkeypatch.setattr(
        program, "empty_strided", lambda size, *_: torch.full(size, UNWRITTEN, dtype=torch.int32)
    )
    monkeypatch.setattr(fast_path, "_kept", {})
    monkeypatch.setattr(fast_path, "recent", {})
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: None)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    program.warn_once.cache_clear()
    yield fake
    program.warn_once.cache_clear()


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
