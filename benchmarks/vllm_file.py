"""vLLM's own moe_align_block_size.py on its compiled ops, without the engine around it.

What that one file imports is stood in for, no more; `python -m benchmarks.fetch vllm` gets it out of vLLM's
wheel, beside the ops.
"""

import contextlib
import importlib.util
import inspect
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
        **{name: {} for name in _PACKAGES},
        f"{_PACKAGES[-1]}.triton_moe": {"TritonExperts": _experts()},
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


# The packages around vLLM's expert layer.
_PACKAGES = (
    *("vllm.model_executor", "vllm.model_executor.layers"),
    *("vllm.model_executor.layers.fused_moe", "vllm.model_executor.layers.fused_moe.experts"),
)


def _experts() -> type:
    """vLLM's expert layer, which the file does not call, and the patch knows."""

    class TritonExperts:
        def apply(
            self,
            output,
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            activation,
            global_num_experts,
            expert_map,
            a1q_scale,
            a2_scale,
            workspace13,
            workspace2,
            expert_tokens_meta,
            apply_router_weight_on_input,
        ):
            raise AssertionError("vLLM's own expert layer was called")

    return TritonExperts


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
        **{name: _uncalled(name, parameters) for name, parameters in _OTHERS.items()},
    }


# Parameters, and the defaults of the last ones, of the ops that the file does not call, and the patch knows.
_OTHERS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "fused_globalize_align_block_size": (
        "topk_idx psum rank_expert_offset global_num_experts local_num_experts block_size sorted_ids "
        "expert_ids num_tokens_post_pad scatter_idx",
        (None,),
    ),
    "moe_lora_align_block_size": (
        "topk_ids token_lora_mapping num_experts block_size max_loras max_num_tokens_padded "
        "max_num_m_blocks sorted_token_ids experts_ids num_tokens_post_pad adapter_enabled lora_ids "
        "expert_map",
        (None,),
    ),
    "topk_softmax": (
        "topk_weights topk_ids token_expert_indices gating_output renormalize "
        "e_score_correction_bias is_padding",
        (False, None, None),
    ),
    "topk_sigmoid": (
        "topk_weights topk_ids token_expert_indices gating_output renormalize "
        "e_score_correction_bias routed_scaling_factor is_padding",
        (False, None, 1.0, None),
    ),
    "topk_hash_softplus_sqrt": (
        "topk_weights topk_indices token_expert_indices gating_output renormalize "
        "routed_scaling_factor e_score_correction_bias input_tokens hash_indices_table is_padding "
        "bias_vl image_sentinel_lo",
        (False, 1.0, None, None, None, None, None, 0),
    ),
    "grouped_topk": (
        "scores num_expert_group topk_group topk renormalize routed_scaling_factor bias scoring_func",
        (0,),
    ),
}


def _uncalled(name: str, parameters: tuple[str, tuple[Any, ...]]) -> Callable:
    names, defaults = parameters[0].split(), parameters[1]
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    padded = [empty] * (len(names) - len(defaults)) + list(defaults)

    def op(*arguments, **named):
        raise AssertionError(f"vLLM's own {name} was called")

    op.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(n, kind, default=d) for n, d in zip(names, padded, strict=True)]
    )
    return op
