"""moe_align_jax: the expert layer of Mixture-of-Experts models for JAX.

Names are resolved on first use (PEP 562), so that the jax-free leaves (`moe_align_jax.types`,
`moe_align_jax._core.checks`) can be imported without jax.
"""

import importlib
import sys
from typing import TYPE_CHECKING

if "jax.core" in sys.modules:
    # Our modules need it, and it adds to the keys of jit's caches (jax 0.12): imported in the midst of a
    # step's first trace, where a name of ours may be resolved, it would have that step traced again.
    importlib.import_module("jax.extend.core")

# From now on records whether this process is forked while jax runs.
importlib.import_module("moe_align_jax._core.fork")

__version__ = "0.1.0"

_MODULE_OF = {
    "AlignedBlocks": "types",
    "CappedPairs": "capacity",
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
    "connect_windows": "expert_windows",
    "dispatch": "expert_parallel",
    "drop_over_capacity": "capacity",
    "expected_physical_count": "eplb",
    "expert_capacity": "capacity",
    "fused_moe": "moe_layer",
    "gmm": "matmul",
    "grouped_matmul": "matmul",
    "init_expert_load": "expert_load",
    "load_balancing_loss": "losses",
    "masked_grouped_matmul": "matmul",
    "max_num_tokens_padded": "_core.checks",
    "moe_align_block_size": "block_align",
    "moe_block_size": "moe_layer",
    "padded_group_sizes": "block_align",
    "permute_to_contiguous": "masked_layout",
    "permute_to_masked": "masked_layout",
    "plan_expert_moves": "eplb",
    "quantize_blockwise": "quantization",
    "quantize_rowwise": "quantization",
    "ragged_dot": "matmul",
    "ragged_dot_general": "matmul_gradient",
    "rebalance_experts": "eplb",
    "record_expert_load": "expert_load",
    "route_and_align": "router",
    "route_topk": "router",
    "router_z_loss": "losses",
    "select_implementation": "block_align",
    "select_matmul_implementation": "matmul",
    "select_moe_implementation": "moe_layer",
    "select_router_implementation": "router",
    "sharded_fused_moe": "sharded_layer",
    "silu_and_mul_masked_quant": "masked_quant",
    "select_transport": "expert_parallel",
    "tgmm": "matmul_gradient",
    "to_physical_ids": "expert_dispatch",
    "unpermute_from_contiguous": "masked_layout",
    "unpermute_from_masked": "masked_layout",
    "update_expert_weights": "expert_weights",
    "update_expert_weights_by_chunks": "expert_weights",
    "update_router_bias": "losses",
}

if TYPE_CHECKING:
    # The same names for type checkers and editors, which do not run `__getattr__`; `as` makes them public.
    from moe_align_jax._core.checks import max_num_tokens_padded as max_num_tokens_padded
    from moe_align_jax._expert_load.ring import LoadRecord as LoadRecord
    from moe_align_jax._expert_parallel.choice import TransportChoice as TransportChoice
    from moe_align_jax.block_align import (
        batched_moe_align_block_size as batched_moe_align_block_size,
    )
    from moe_align_jax.block_align import moe_align_block_size as moe_align_block_size
    from moe_align_jax.block_align import padded_group_sizes as padded_group_sizes
    from moe_align_jax.block_align import select_implementation as select_implementation
    from moe_align_jax.capacity import CappedPairs as CappedPairs
    from moe_align_jax.capacity import drop_over_capacity as drop_over_capacity
    from moe_align_jax.capacity import expert_capacity as expert_capacity
    from moe_align_jax.eplb import ExpertMoves as ExpertMoves
    from moe_align_jax.eplb import ExpertPlacement as ExpertPlacement
    from moe_align_jax.eplb import MoveKind as MoveKind
    from moe_align_jax.eplb import balancedness as balancedness
    from moe_align_jax.eplb import expected_physical_count as expected_physical_count
    from moe_align_jax.eplb import plan_expert_moves as plan_expert_moves
    from moe_align_jax.eplb import rebalance_experts as rebalance_experts
    from moe_align_jax.expert_dispatch import to_physical_ids as to_physical_ids
    from moe_align_jax.expert_load import ExpertLoad as ExpertLoad
    from moe_align_jax.expert_load import collect_expert_load as collect_expert_load
    from moe_align_jax.expert_load import commit_expert_load as commit_expert_load
    from moe_align_jax.expert_load import init_expert_load as init_expert_load
    from moe_align_jax.expert_load import record_expert_load as record_expert_load
    from moe_align_jax.expert_location import ExpertLocation as ExpertLocation
    from moe_align_jax.expert_parallel import Dispatched as Dispatched
    from moe_align_jax.expert_parallel import DispatchHandle as DispatchHandle
    from moe_align_jax.expert_parallel import combine as combine
    from moe_align_jax.expert_parallel import dispatch as dispatch
    from moe_align_jax.expert_parallel import select_transport as select_transport
    from moe_align_jax.expert_weights import update_expert_weights as update_expert_weights
    from moe_align_jax.expert_weights import (
        update_expert_weights_by_chunks as update_expert_weights_by_chunks,
    )
    from moe_align_jax.expert_windows import connect_windows as connect_windows
    from moe_align_jax.losses import load_balancing_loss as load_balancing_loss
    from moe_align_jax.losses import router_z_loss as router_z_loss
    from moe_align_jax.losses import update_router_bias as update_router_bias
    from moe_align_jax.masked_layout import ContiguousLayout as ContiguousLayout
    from moe_align_jax.masked_layout import MaskedLayout as MaskedLayout
    from moe_align_jax.masked_layout import permute_to_contiguous as permute_to_contiguous
    from moe_align_jax.masked_layout import permute_to_masked as permute_to_masked
    from moe_align_jax.masked_layout import unpermute_from_contiguous as unpermute_from_contiguous
    from moe_align_jax.masked_layout import unpermute_from_masked as unpermute_from_masked
    from moe_align_jax.masked_quant import silu_and_mul_masked_quant as silu_and_mul_masked_quant
    from moe_align_jax.matmul import gmm as gmm
    from moe_align_jax.matmul import grouped_matmul as grouped_matmul
    from moe_align_jax.matmul import masked_grouped_matmul as masked_grouped_matmul
    from moe_align_jax.matmul import ragged_dot as ragged_dot
    from moe_align_jax.matmul import select_matmul_implementation as select_matmul_implementation
    from moe_align_jax.matmul_gradient import ragged_dot_general as ragged_dot_general
    from moe_align_jax.matmul_gradient import tgmm as tgmm
    from moe_align_jax.moe_layer import ExpertWeights as ExpertWeights
    from moe_align_jax.moe_layer import fused_moe as fused_moe
    from moe_align_jax.moe_layer import moe_block_size as moe_block_size
    from moe_align_jax.moe_layer import select_moe_implementation as select_moe_implementation
    from moe_align_jax.quantization import quantize_blockwise as quantize_blockwise
    from moe_align_jax.quantization import quantize_rowwise as quantize_rowwise
    from moe_align_jax.recorder import ExpertDistributionRecorder as ExpertDistributionRecorder
    from moe_align_jax.router import route_and_align as route_and_align
    from moe_align_jax.router import route_topk as route_topk
    from moe_align_jax.router import select_router_implementation as select_router_implementation
    from moe_align_jax.sharded_layer import sharded_fused_moe as sharded_fused_moe
    from moe_align_jax.types import AlignedBlocks as AlignedBlocks
    from moe_align_jax.types import Implementation as Implementation
    from moe_align_jax.types import Selection as Selection

# Modules that do without jax, and the ones that tell jax.export about their types.
_EXPORTED_BY = {
    "types": "block_align",
    "eplb": "expert_location",
    "_expert_load.ring": "expert_load",
}

__all__ = ["__version__", *_MODULE_OF]


if not TYPE_CHECKING:  # to a type checker, a name that is not imported above is a mistake

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
