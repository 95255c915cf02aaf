"""moe_align_jax: the routing core of Mixture-of-Experts models for JAX.

Names are resolved on first use (PEP 562), so that the jax-free leaves (`moe_align_jax.types`,
`moe_align_jax._core.checks`) can be imported without jax.
"""

import importlib
import sys

if "jax.core" in sys.modules:
    # Our modules need it, and it adds to the keys of jit's caches (jax 0.12): imported in the midst of a
    # step's first trace, where a name of ours may be resolved, it would have that step traced again.
    importlib.import_module("jax.extend.core")

# From now on records whether this process is forked while jax runs.
importlib.import_module("moe_align_jax._core.fork")

__version__ = "0.1.0"

_MODULE_OF = {
    "AlignedBlocks": "types",
    "ContiguousLayout": "masked_layout",
    "DispatchHandle": "expert_parallel",
    "Dispatched": "expert_parallel",
    "ExpertDistributionRecorder": "recorder",
    "ExpertLoad": "expert_load",
    "ExpertLocation": "expert_location",
    "ExpertMoves": "eplb",
    "ExpertPlacement": "eplb",
    "ExpertWeights": "moe_layer",
    "Implementation": "types",
    "LoadRecord": "_expert_load.ring",
    "MaskedLayout": "masked_layout",
    "MoveKind": "eplb",
    "Selection": "types",
    "TransportChoice": "_expert_parallel.choice",
    "balancedness": "eplb",
    "batched_moe_align_block_size": "block_align",
    "collect_expert_load": "expert_load",
    "combine": "expert_parallel",
    "commit_expert_load": "expert_load",
    "dispatch": "expert_parallel",
    "expected_physical_count": "eplb",
    "fused_moe": "moe_layer",
    "gmm": "matmul",
    "grouped_matmul": "matmul",
    "init_expert_load": "expert_load",
    "masked_grouped_matmul": "matmul",
    "max_num_tokens_padded": "_core.checks",
    "moe_align_block_size": "block_align",
    "moe_block_size": "moe_layer",
    "padded_group_sizes": "block_align",
    "permute_to_contiguous": "masked_layout",
    "permute_to_masked": "masked_layout",
    "plan_expert_moves": "eplb",
    "ragged_dot": "matmul",
    "rebalance_experts": "eplb",
    "record_expert_load": "expert_load",
    "route_and_align": "router",
    "route_topk": "router",
    "select_implementation": "_lowering.select",
    "select_matmul_implementation": "matmul",
    "select_moe_implementation": "moe_layer",
    "select_router_implementation": "router",
    "silu_and_mul_masked_quant": "masked_quant",
    "select_transport": "expert_parallel",
    "to_physical_ids": "expert_dispatch",
    "unpermute_from_contiguous": "masked_layout",
    "unpermute_from_masked": "masked_layout",
    "update_expert_weights": "expert_weights",
    "update_expert_weights_by_chunks": "expert_weights",
}

# Modules that do without jax, and the ones that tell jax.export about their types.
_EXPORTED_BY = {
    "types": "block_align",
    "eplb": "expert_location",
    "_expert_load.ring": "expert_load",
}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'moe_align_jax' has no attribute {name!r}")
    module = _MODULE_OF[name]
    if module in _EXPORTED_BY and "jax.core" in sys.modules:
        importlib.import_module(f"moe_align_jax.{_EXPORTED_BY[module]}")
    value = getattr(importlib.import_module(f"moe_align_jax.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
