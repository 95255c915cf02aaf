"""vLLM's own moe_align_block_size.py on its compiled ops, without the engine around it.

What that one file imports is stood in for, no more; `python -m benchmarks.fetch vllm` gets it out of vLLM's
wheel, beside the ops.
"""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

NAME = "vllm_moe_align_block_size.py"
RELEASE = "0.33.0"


@contextlib.contextmanager
def own_and_patched(path: Path) -> Iterator[tuple[types.ModuleType, types.ModuleType]]:
    """The file's module on vLLM's own ops, and one on which `torch_bridge.vllm.patch` is in force."""
    import torch

    import torch_bridge

    compiled = torch.ops._moe_C
    loaded = []
    with mock.patch.dict(sys.modules):
        for _ in range(2):  # each on ops of its own; the last ones stay in sys.modules
            ops = custom_ops(compiled.moe_align_block_size, compiled.batched_moe_align_block_size)
            sys.modules.update(stand_ins(ops))
            loaded.append(load(path))
        with torch_bridge.vllm.patch():
            yield loaded[0], loaded[1]


def stand_ins(ops: Mapping[str, object], release: str | None = RELEASE) -> dict[str, Any]:
    """Modules by their names: what the file imports, with `ops` for `vllm._custom_ops`."""
    members: dict[str, Mapping[str, object]] = {
        "vllm": {} if release is None else {"__version__": release},
        "vllm._custom_ops": ops,
        "vllm.triton_utils": {"triton": types.SimpleNamespace(cdiv=lambda a, b: -(-a // b))},
        "vllm.utils": {},
        "vllm.utils.math_utils": {"round_up": lambda a, b: -(-a // b) * b},
    }
    modules = {name: types.ModuleType(name) for name in members}
    for name, module in modules.items():
        vars(module).update(members[name])
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(modules[parent], last, module)
    return modules


def load(path: Path) -> types.ModuleType:
    """The file as a module of its own."""
    spec = importlib.util.spec_from_file_location("vllm_moe_align_block_size", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def custom_ops(align: Callable[..., None], batched: Callable[..., None]) -> dict[str, Callable]:
    """vLLM's wrappers of its compiled ops, which pass on what they get."""

    def moe_align_block_size(
        topk_ids,
        num_experts,
        block_size,
        sorted_token_ids,
        experts_ids,
        num_tokens_post_pad,
        expert_map=None,
        scatter_idx=None,
    ):
        align(
            topk_ids,
            num_experts,
            block_size,
            sorted_token_ids,
            experts_ids,
            num_tokens_post_pad,
            expert_map,
            scatter_idx,
        )

    def batched_moe_align_block_size(
        max_tokens_per_batch,
        block_size,
        expert_num_tokens,
        sorted_ids,
        expert_ids,
        num_tokens_post_pad,
    ):
        batched(
            max_tokens_per_batch,
            block_size,
            expert_num_tokens,
            sorted_ids,
            expert_ids,
            num_tokens_post_pad,
        )

    return {
        "moe_align_block_size": moe_align_block_size,
        "batched_moe_align_block_size": batched_moe_align_block_size,
    }
