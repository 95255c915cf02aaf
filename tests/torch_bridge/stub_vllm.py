"""An installed vLLM in sys.modules: its names and versions, and on top of them its own real file.

The engine does not install everywhere. What is stubbed here is what that one file imports.
"""

import importlib.util
import pathlib
import sys
import types

from tests.torch_bridge import peer_files

ROOT = pathlib.Path(__file__).parents[2]


def unreplaced(*arguments, **options):
    raise AssertionError("the patch left vLLM's own op in place")


def make(monkeypatch, version="0.33.0") -> types.ModuleType:
    """Puts the stubs into sys.modules for one test; returns `vllm._custom_ops`."""

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
        unreplaced()

    def batched_moe_align_block_size(
        max_tokens_per_batch,
        block_size,
        expert_num_tokens,
        sorted_ids,
        expert_ids,
        num_tokens_post_pad,
    ):
        unreplaced()

    names = ["vllm", "vllm._custom_ops", "vllm.triton_utils", "vllm.utils"]
    modules = {name: types.ModuleType(name) for name in [*names, "vllm.utils.math_utils"]}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(modules[parent], last, module)
    if version is not None:
        modules["vllm"].__version__ = version
    ops = modules["vllm._custom_ops"]
    ops.moe_align_block_size = moe_align_block_size
    ops.batched_moe_align_block_size = batched_moe_align_block_size
    ops.moe_lora_align_block_size = lambda: "its own"
    ops.fused_globalize_align_block_size = lambda: "its own"
    modules["vllm.triton_utils"].triton = types.SimpleNamespace(cdiv=lambda a, b: -(-a // b))
    modules["vllm.utils.math_utils"].round_up = lambda a, b: -(-a // b) * b
    return ops


def real_file() -> types.ModuleType:
    """vLLM's own moe_align_block_size.py, on the stubs; skips where it is not there."""
    path = peer_files.path_of("vllm_moe_align_block_size.py")
    spec = importlib.util.spec_from_file_location("vllm_moe_align_block_size", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
