"""vLLM's own moe_align_block_size.py on its compiled ops, without the engine around it.

What that one file imports is stood in for, no more; `python -m benchmarks.fetch vllm` gets it out of vLLM's
wheel, beside the ops.
"""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

NAME = "vllm_moe_align_block_size.py"
RELEASE = "0.33.0"


@contextlib.contextmanager
def own_and_patched(path: Path) -> Iterator[tuple[types.ModuleType, types.ModuleType]]:
    """The file's module on vLLM's own ops, and one on which `torch_bridge.vllm.patch` is in force."""
    import torch_bridge

    with mock.patch.dict(sys.modules):
        own, patched = _load(path), _load(path)
        with torch_bridge.vllm.patch():
            yield own, patched


def _load(path: Path) -> types.ModuleType:
    """The file, on ops and helpers of its own, which stay in sys.modules."""
    vllm = types.ModuleType("vllm")
    vllm.__version__ = RELEASE  # type: ignore[attr-defined]
    helpers = {
        "_custom_ops": _custom_ops(),
        "triton_utils": {"triton": types.SimpleNamespace(cdiv=lambda a, b: -(-a // b))},
        "utils": {},
        "utils.math_utils": {"round_up": lambda a, b: -(-a // b) * b},
    }
    sys.modules["vllm"] = vllm
    for name, members in helpers.items():
        module = sys.modules[f"vllm.{name}"] = types.ModuleType(f"vllm.{name}")
        vars(module).update(members)
        if "." not in name:
            setattr(vllm, name, module)
    spec = importlib.util.spec_from_file_location("vllm_moe_align_block_size", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _custom_ops() -> dict[str, object]:
    """Its wrappers of the compiled ops, which pass on what they get."""
    import torch

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
        torch.ops._moe_C.moe_align_block_size(
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
        torch.ops._moe_C.batched_moe_align_block_size(
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
