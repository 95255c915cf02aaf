"""SGLang's own recorder, run from its file in `.peers`; small stand-ins serve for the rest of sglang."""

import collections
import contextlib
import importlib.util
import sys
import types
from types import SimpleNamespace

import torch

from tests.bridge.peer_files import path_of


class _Withable:
    def __init__(self):
        self.value = None

    @contextlib.contextmanager
    def with_value(self, value):
        assert self.value is None
        self.value = value
        try:
            yield
        finally:
            self.value = None


def _reduce(value, pattern, how, **sizes):
    """The three patterns of einops that the file uses."""
    if "num_expert_per_gpu" in pattern:
        return value.unflatten(-1, (sizes["num_gpu"], -1)).sum(-1, dtype=value.dtype)
    return value.amax(-1) if how == "max" else value.mean(-1)


def load(monkeypatch, *, mode, metrics=False, buffer_size=4, max_tokens=16):
    """The module, with the server arguments given, on the CPU and one rank."""
    path = path_of("sgl_expert_distribution.py", "sglang_recorder")
    moe = SimpleNamespace(
        expert_distribution_recorder_mode=mode,
        expert_distribution_recorder_buffer_size=buffer_size,
        expert_balancedness_report_mode="all" if metrics else None,
        eplb_min_rebalancing_utilization_threshold=0.5,
        moe_a2a_backend="none",
        deepep_mode="normal",
        elastic_ep_backend=None,
    )
    execution = SimpleNamespace(
        moe=moe, overlap=SimpleNamespace(enable_two_batch_overlap=False), device="cpu"
    )
    schedule = SimpleNamespace(chunked_prefill_size=max_tokens)
    names = {
        "einops": {"reduce": _reduce},
        "sglang.srt.environ": {"envs": None},
        "sglang.srt.model_executor.forward_batch_info": {"ForwardBatch": 0, "ForwardMode": 0},
        "sglang.srt.observability.metrics_collector": {
            "STAT_LOGGER_ROLE_EXPERT_DISPATCH": "",
            "ExpertDispatchCollector": None,
            "resolve_collector_class": lambda *_: lambda _: None,
        },
        "sglang.srt.runtime_context": {
            "get_device": lambda: SimpleNamespace(device="cpu"),
            "get_exec": lambda: execution,
            "get_platform": lambda: SimpleNamespace(is_hip=False),
            "get_schedule": lambda: schedule,
            "logs_expert_balancedness_to_server_log": lambda: metrics,
            "reports_expert_balancedness": lambda: metrics,
        },
        "sglang.srt.utils": {
            "Withable": _Withable,
            "get_device": lambda: "cpu",
            "get_int_env_var": lambda _, default: default,
        },
        "sglang.srt.layers.moe": {"get_moe_a2a_backend": lambda: None},
    }
    for name, contents in names.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            package = ".".join(parts[:i])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    device = SimpleNamespace(is_current_stream_capturing=lambda: False, empty_cache=lambda: None)
    monkeypatch.setattr(torch, "get_device_module", lambda *_: device)
    for name in ("reduce", "all_reduce"):
        monkeypatch.setattr(torch.distributed, name, lambda value, **_: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 0)
    specification = importlib.util.spec_from_file_location("sgl_expert_distribution", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "sgl_expert_distribution", module)
    specification.loader.exec_module(module)
    return module


def recorder(module, where):
    layers, physical = where.physical_to_logical_map.shape
    facts = SimpleNamespace(
        **vars(where),
        num_layers=layers,
        num_physical_experts=physical,
        num_local_physical_experts=physical // where.ep_size,
    )
    return module.ExpertDistributionRecorder.init_new(facts, 0)


def interface(kind):
    """Public names of a class, each with the names of its parameters (None for a property)."""
    import inspect

    found = collections.OrderedDict()
    for name in sorted(dir(kind)):
        if name.startswith("_"):
            continue
        value = inspect.getattr_static(kind, name)
        if isinstance(value, property):
            found[name] = None
        elif callable(getattr(kind, name)):
            parameters = inspect.signature(getattr(kind, name)).parameters
            found[name] = [p for p in parameters if p != "self"]
    return found
