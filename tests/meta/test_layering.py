"""Who may import whom, read from the source: an AST walk over every module of the packages."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterable

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("moe_align_jax", "torch_bridge", "benchmarks", "examples")

# What a module, or every module under a package, may import of ours. The longest name that fits counts.
# "lazily": inside a function only, so that importing the module does not import the other.
ALLOWED: dict[str, set[str]] = {
    "moe_align_jax._core": set(),
    "moe_align_jax._lowering": set(),
    "moe_align_jax._align": set(),
    "moe_align_jax": set(),
    "moe_align_jax.types": {
        "moe_align_jax._core.int32",
    },
    "moe_align_jax._core.checks": {
        "moe_align_jax._core.int32",
    },
    "moe_align_jax._lowering.export": set(),
    "moe_align_jax._lowering.ordering": {
        "moe_align_jax._lowering.primitive",
    },
    "moe_align_jax._core.fork": {
        "moe_align_jax._core.checks",
    },
    "moe_align_jax._align.config": {
        "moe_align_jax._core.hopper",
        "moe_align_jax._core.int32",
        "moe_align_jax.types",
    },
    "moe_align_jax._align.tables": {
        "moe_align_jax._align.config",
        "moe_align_jax._core.int32",
        "moe_align_jax.types",
    },
    "moe_align_jax._core.files": {
        "moe_align_jax._core.checks",
    },
    "moe_align_jax._eplb": {
        "moe_align_jax._core.checks",
        "moe_align_jax._core.files",
        "moe_align_jax._eplb",
    },
    "moe_align_jax._eplb.placement_files": {
        "moe_align_jax._core.checks",
        "moe_align_jax._core.files",
        "moe_align_jax._eplb",
        "lazily moe_align_jax._expert_load.files",
    },
    "moe_align_jax.eplb": {
        "moe_align_jax._core.checks",
        "moe_align_jax._eplb",
    },
    "moe_align_jax.expert_location": {
        "moe_align_jax._core.checks",
        "moe_align_jax._core.files",
        "moe_align_jax._core.fork",
        "moe_align_jax._eplb",
        "moe_align_jax._lowering.export",
        "moe_align_jax.eplb",
    },
    "moe_align_jax.expert_weights": {
        "moe_align_jax._core.checks",
        "moe_align_jax._core.fork",
        "moe_align_jax._eplb",
    },
    "moe_align_jax.expert_dispatch": {
        "moe_align_jax._align.arguments",
        "moe_align_jax._align.location",
        "moe_align_jax._core",
        "moe_align_jax.expert_location",
    },
    "moe_align_jax.block_align": {
        "moe_align_jax._align.arguments",
        "moe_align_jax._align.location",
        "moe_align_jax._align.primitive",
        "moe_align_jax._align.tables",
        "moe_align_jax._core",
        "moe_align_jax._lowering",
        "moe_align_jax.expert_location",
        "moe_align_jax.types",
    },
    "moe_align_jax._lowering.select": {
        "lazily moe_align_jax._simt",
        "moe_align_jax._core.checks",
        "moe_align_jax._lowering.primitive",
        "moe_align_jax.types",
    },
    "moe_align_jax.router": {
        "moe_align_jax._align.arguments",
        "moe_align_jax._align.location",
        "moe_align_jax._align.tables",
        "moe_align_jax._core.checks",
        "moe_align_jax._core.fork",
        "moe_align_jax._lowering.select",
        "moe_align_jax._lowering.sharding",
        "moe_align_jax._router",
        "moe_align_jax.block_align",
        "moe_align_jax.expert_location",
        "moe_align_jax.types",
    },
    "moe_align_jax.matmul": {
        "moe_align_jax._core.checks",
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._lowering.reverse_mode",
        "moe_align_jax._lowering.select",
        "moe_align_jax._masked_quant.problem",
        "moe_align_jax.types",
    },
    "moe_align_jax.sharded_layer": {
        "moe_align_jax._align.arguments",
        "moe_align_jax._core",
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._lowering",
        "moe_align_jax._moe_layer",
        "moe_align_jax.expert_parallel",
        "moe_align_jax.matmul",
        "moe_align_jax.moe_layer",
        "moe_align_jax.types",
    },
    "moe_align_jax.losses": {
        "moe_align_jax._align.arguments",
        "moe_align_jax._core",
        "moe_align_jax._grouped_matmul.arguments",
        "moe_align_jax._lowering.sharding",
        "moe_align_jax._moe_layer.arguments",
    },
    "moe_align_jax.capacity": {
        "moe_align_jax._align.arguments",
        "moe_align_jax._core",
        "moe_align_jax._grouped_matmul.arguments",
        "moe_align_jax._lowering",
        "moe_align_jax._moe_layer.arguments",
        "moe_align_jax.block_align",
    },
    "moe_align_jax.matmul_gradient": {
        "moe_align_jax._core.checks",
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._lowering.reverse_mode",
        "moe_align_jax._lowering.select",
        "moe_align_jax.matmul",
        "moe_align_jax.types",
    },
    "moe_align_jax.moe_layer": {
        "lazily moe_align_jax.expert_dispatch",
        "moe_align_jax._align.arguments",
        "moe_align_jax._align.location",
        "moe_align_jax._core.checks",
        "moe_align_jax._core.int32",
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._lowering.reverse_mode",
        "moe_align_jax._lowering.select",
        "moe_align_jax._lowering.sharding",
        "moe_align_jax._masked_quant.problem",
        "moe_align_jax._moe_layer",
        "moe_align_jax.block_align",
        "moe_align_jax.expert_location",
        "moe_align_jax.types",
    },
    "moe_align_jax.adapters": {
        "moe_align_jax._core.checks",
        "moe_align_jax.matmul",
        "moe_align_jax.moe_layer",
        "moe_align_jax.router",
        "moe_align_jax.types",
    },
    "moe_align_jax._moe_layer": {
        "moe_align_jax._core.checks",
        "moe_align_jax._core.fp8",
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._lowering.ordering",
        "moe_align_jax._lowering.sharding",
        "moe_align_jax._masked_quant.casts",
        "moe_align_jax._moe_layer",
    },
    "moe_align_jax._moe_layer.plan": {
        "moe_align_jax._grouped_matmul.problem",
        "moe_align_jax._grouped_matmul.spread",
    },
    "moe_align_jax._moe_layer.combine": set(),
    "moe_align_jax._moe_layer.token_sum": {
        "lazily moe_align_jax._grouped_matmul.token_sum_kernel",
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._lowering.primitive",
        "moe_align_jax._moe_layer.combine",
    },
    "moe_align_jax._moe_layer.direct": {
        "moe_align_jax._layout.kernels",
        "moe_align_jax._lowering.direct_kernel",
        "moe_align_jax._moe_layer.direct_problem",
    },
    "moe_align_jax._moe_layer.direct_problem": set(),
    "moe_align_jax._moe_layer.checkpoints": {
        "lazily moe_align_jax._moe_layer.safetensors",
        "moe_align_jax._core.checks",
        "moe_align_jax._core.fp8",
        "moe_align_jax._grouped_matmul.problem",
    },
    "moe_align_jax._moe_layer.safetensors": {"moe_align_jax._core.checks"},
    "moe_align_jax._grouped_matmul": {
        "moe_align_jax._core.checks",
        "moe_align_jax._core.fp8",
        "moe_align_jax._grouped_matmul",
    },
    "moe_align_jax._grouped_matmul.problem": {"moe_align_jax._core.fp8"},
    "moe_align_jax._grouped_matmul.direct": {
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._lowering.direct_kernel",
        "moe_align_jax._simt.language",
    },
    "moe_align_jax._grouped_matmul.memory": {
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._lowering.launch_value",
    },
    "moe_align_jax._grouped_matmul.token_sum_config": {
        "moe_align_jax._core.hopper",
        "moe_align_jax._grouped_matmul",
    },
    "moe_align_jax._grouped_matmul.spread": {
        "moe_align_jax._core.hopper",
        "moe_align_jax._core.int32",
        "moe_align_jax._grouped_matmul.problem",
    },
    "moe_align_jax._grouped_matmul.primitive": {
        "lazily moe_align_jax._grouped_matmul.launch",
        "moe_align_jax._grouped_matmul.config",
        "moe_align_jax._grouped_matmul.problem",
        "moe_align_jax._grouped_matmul.reference",
        "moe_align_jax._lowering.primitive",
        "moe_align_jax._lowering.select",
        "moe_align_jax._lowering.sharding",
    },
    "moe_align_jax._grouped_matmul.derivative": {
        "moe_align_jax._core.checks",
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._lowering",
    },
    "moe_align_jax._grouped_matmul.arguments": {
        "moe_align_jax._core.checks",
        "moe_align_jax._core.int32",
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._lowering.select",
        "moe_align_jax._lowering.sharding",
    },
    "moe_align_jax._grouped_matmul.across_activation_kernel": {
        "moe_align_jax._core.hopper",
        "moe_align_jax._core.int32",
        "moe_align_jax._grouped_matmul",
    },
    "moe_align_jax._grouped_matmul.activation_gradient": {
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._lowering",
    },
    "moe_align_jax._grouped_matmul.weight_gradient": {
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._lowering",
    },
    "moe_align_jax._grouped_matmul.token_rows": {
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._lowering",
    },
    "moe_align_jax._grouped_matmul.weight_gradient_kernel": {
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._lowering.sharding",
    },
    "moe_align_jax._grouped_matmul.weight_gradient_tiles": {
        "moe_align_jax._core.hopper",
        "moe_align_jax._grouped_matmul",
    },
    "moe_align_jax._grouped_matmul.choice": {
        "moe_align_jax._grouped_matmul.config",
        "moe_align_jax._grouped_matmul.problem",
        "moe_align_jax._lowering.select",
    },
    "moe_align_jax._grouped_matmul.launch": {
        "lazily moe_align_jax._simt.emulator",
        "lazily moe_align_jax._simt.mosaic",
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._simt.language",
    },
    "moe_align_jax._grouped_matmul.cut_list": {
        "moe_align_jax._grouped_matmul.problem",
        "moe_align_jax._simt.collectives",
        "moe_align_jax._simt.language",
    },
    "moe_align_jax._grouped_matmul.found_inline": {
        "lazily moe_align_jax._simt.mosaic",
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._simt.language",
    },
    "moe_align_jax._grouped_matmul.found_cut": {
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._simt.language",
    },
    "moe_align_jax._grouped_matmul.found_masked": {
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._simt.collectives",
        "moe_align_jax._simt.language",
    },
    "moe_align_jax._grouped_matmul.found_turned": {
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._simt.collectives",
        "moe_align_jax._simt.language",
    },
    "moe_align_jax._grouped_matmul.found_groups": {
        "moe_align_jax._grouped_matmul",
        "moe_align_jax._simt.collectives",
        "moe_align_jax._simt.language",
    },
    "moe_align_jax._grouped_matmul.tile_list": {
        "moe_align_jax._grouped_matmul.problem",
        "moe_align_jax._simt.collectives",
        "moe_align_jax._simt.language",
    },
    "moe_align_jax._router": {
        "moe_align_jax._align.config",
        "moe_align_jax._align.kernels",
        "moe_align_jax._align.tables",
        "moe_align_jax._core.int32",
        "moe_align_jax._router",
        "moe_align_jax._simt.collectives",
        "moe_align_jax._simt.language",
        "moe_align_jax.types",
    },
    "moe_align_jax._router.arguments": {
        "moe_align_jax._align.arguments",
        "moe_align_jax._align.location",
        "moe_align_jax._core.checks",
        "moe_align_jax._router.problem",
    },
    "moe_align_jax._router.problem": set(),
    "moe_align_jax._router.reference": {
        "moe_align_jax._router.problem",
    },
    "moe_align_jax._router.primitives": {
        "lazily moe_align_jax._router",
        "lazily moe_align_jax._simt",
        "moe_align_jax._align.primitive",
        "moe_align_jax._lowering",
        "moe_align_jax._router.problem",
        "moe_align_jax._router.reference",
        "moe_align_jax.types",
    },
    "moe_align_jax._masked_quant.problem": {
        "moe_align_jax._core.fp8",
    },
    "moe_align_jax.masked_quant": {
        "lazily moe_align_jax._masked_quant",
        "moe_align_jax._core.checks",
        "moe_align_jax._core.fork",
        "moe_align_jax._lowering",
        "moe_align_jax._masked_quant.primitive",
        "moe_align_jax._masked_quant.problem",
        "moe_align_jax.types",
    },
    "moe_align_jax._masked_quant.reference": {
        "moe_align_jax._core.fp8",
        "moe_align_jax._masked_quant.problem",
    },
    "moe_align_jax._masked_quant.primitive": {
        "lazily moe_align_jax._masked_quant",
        "lazily moe_align_jax._masked_quant.reference",
        "moe_align_jax._core.checks",
        "moe_align_jax._lowering",
        "moe_align_jax._masked_quant.problem",
    },
    "moe_align_jax._masked_quant.casts": {
        "moe_align_jax._core.fp8",
        "moe_align_jax._lowering.sharding",
        "moe_align_jax._masked_quant.primitive",
        "moe_align_jax._masked_quant.problem",
        "moe_align_jax._masked_quant.reference",
    },
    "moe_align_jax.quantization": {
        "moe_align_jax._core.checks",
        "moe_align_jax._core.fp8",
        "moe_align_jax._lowering.sharding",
        "moe_align_jax._masked_quant.casts",
        "moe_align_jax._masked_quant.problem",
    },
    "moe_align_jax._align.reference": {
        "moe_align_jax._align.replicas",
        "moe_align_jax.types",
    },
    "moe_align_jax._align.replicas": {
        "moe_align_jax.types",
    },
    "moe_align_jax._align.kernels": {
        "moe_align_jax._align.config",
        "moe_align_jax._align.kernels.common",
        "moe_align_jax._align.kernels.counting",
        "moe_align_jax._align.kernels.placing",
        "moe_align_jax._align.tables",
        "moe_align_jax._core.int32",
        "moe_align_jax._simt",
        "moe_align_jax.types",
    },
    "moe_align_jax._masked_quant": {
        "lazily moe_align_jax._simt.mosaic",
        "moe_align_jax._core.fp8",
        "moe_align_jax._core.hopper",
        "moe_align_jax._core.int32",
        "moe_align_jax._lowering.direct_kernel",
        "moe_align_jax._masked_quant",
        "moe_align_jax._simt.collectives",
        "moe_align_jax._simt.language",
    },
    "moe_align_jax._layout.kernels": {
        "moe_align_jax._lowering.launch_value",
        "lazily moe_align_jax._simt.mosaic",
        "moe_align_jax._core.hopper",
        "moe_align_jax._core.int32",
        "moe_align_jax._layout.kernels",
        "moe_align_jax._simt.collectives",
        "moe_align_jax._simt.language",
    },
    "moe_align_jax._expert_parallel.nvlink_kernels": {
        "moe_align_jax._core.fp8",
        "moe_align_jax._core.hopper",
        "moe_align_jax._core.int32",
        "moe_align_jax._expert_parallel.counted_pairs",
        "moe_align_jax._expert_parallel.e4m3",
        "moe_align_jax._expert_parallel.nvlink_kernels",
        "moe_align_jax._expert_parallel.row_words",
        "moe_align_jax._simt.collectives",
        "moe_align_jax._simt.language",
    },
    "moe_align_jax._expert_parallel.e4m3": {
        "moe_align_jax._core.fp8",
        "moe_align_jax._simt.language",
    },
    "moe_align_jax._expert_parallel.row_words": {
        "moe_align_jax._simt.language",
    },
    "moe_align_jax._expert_parallel.counted_pairs": {
        "moe_align_jax._simt.language",
    },
    "moe_align_jax._expert_parallel.message_kernels": {
        "moe_align_jax._core.fp8",
        "moe_align_jax._core.hopper",
        "moe_align_jax._core.int32",
        "moe_align_jax._expert_parallel.counted_pairs",
        "moe_align_jax._expert_parallel.e4m3",
        "moe_align_jax._expert_parallel.message_kernels",
        "moe_align_jax._expert_parallel.row_words",
        "moe_align_jax._simt.collectives",
        "moe_align_jax._simt.language",
    },
    "moe_align_jax._simt": {
        "moe_align_jax._core.hopper",
        "moe_align_jax._core.int32",
        "moe_align_jax._simt",
    },
    "moe_align_jax.expert_load": {
        "moe_align_jax._core.checks",
        "moe_align_jax._core.fork",
        "moe_align_jax._core.int32",
        "moe_align_jax._expert_load.arguments",
        "moe_align_jax._expert_load.ring",
        "moe_align_jax._lowering.export",
    },
    "moe_align_jax.recorder": {
        "moe_align_jax._core.checks",
        "moe_align_jax._expert_load",
        "moe_align_jax.expert_load",
    },
    "moe_align_jax._expert_load.arguments": {
        "moe_align_jax._core.checks",
        "moe_align_jax._expert_load.ring",
        "moe_align_jax._lowering.sharding",
    },
    "moe_align_jax._expert_load": {
        "moe_align_jax._core.checks",
        "moe_align_jax._core.files",
        "moe_align_jax.eplb.balancedness",
    },
    "moe_align_jax.masked_layout": {
        "moe_align_jax._core",
        "moe_align_jax._expert_parallel",
        "moe_align_jax._layout",
        "moe_align_jax._lowering.export",
        "moe_align_jax._lowering.reverse_mode",
        "moe_align_jax._lowering.sharding",
        "moe_align_jax.block_align",
    },
    "moe_align_jax.expert_parallel": {
        "moe_align_jax._core.checks",
        "moe_align_jax._core.fork",
        "moe_align_jax._expert_parallel",
        "moe_align_jax._lowering",
        "moe_align_jax.masked_layout",
    },
    "moe_align_jax.expert_windows": {
        "moe_align_jax._core.checks",
        "moe_align_jax._core.fork",
        "moe_align_jax._expert_parallel",
    },
    "moe_align_jax._expert_parallel": {
        "lazily moe_align_jax._simt.mosaic",
        "moe_align_jax._align.arguments",
        "moe_align_jax._core",
        "moe_align_jax._expert_parallel",
        "moe_align_jax._layout",
        "moe_align_jax._lowering",
        "moe_align_jax._masked_quant.reference",
        "moe_align_jax._simt.language",
        "moe_align_jax._simt.window",
        "moe_align_jax.block_align",
    },
    "moe_align_jax._layout": {
        "moe_align_jax._layout",
        "moe_align_jax._lowering",
    },
    "moe_align_jax._layout.primitives": {
        "moe_align_jax._layout",
        "moe_align_jax._lowering",
    },
    "moe_align_jax.cli": {
        "lazily moe_align_jax._cli",
    },
    "moe_align_jax._traces": set(),
    "moe_align_jax._cli": {
        "moe_align_jax",
    },
    "torch_bridge._dlpack_path.moe": {
        "moe_align_jax",
        "torch_bridge",
    },
    "torch_bridge._direct.host_code": set(),
    "torch_bridge._dlpack_path.route": {
        "moe_align_jax._router.primitives",
        "moe_align_jax._router.problem",
    },
    "torch_bridge": {
        "moe_align_jax._grouped_matmul.choose_tiles",
        "moe_align_jax._grouped_matmul.config",
        "moe_align_jax._grouped_matmul.direct_problem",
        "moe_align_jax._grouped_matmul.options",
        "moe_align_jax._grouped_matmul.problem",
        "moe_align_jax._grouped_matmul.shape",
        "moe_align_jax._moe_layer.direct_problem",
        "moe_align_jax._moe_layer.plan",
        "lazily moe_align_jax._align.vllm.kernel",
        "lazily moe_align_jax._router.kernel",
        "lazily moe_align_jax.silu_and_mul_masked_quant",
        "moe_align_jax._align.tables",
        "moe_align_jax._align.vllm.problem",
        "moe_align_jax._core.checks",
        "moe_align_jax._core.fork",
        "moe_align_jax._core.fp8",
        "moe_align_jax._core.int32",
        "lazily moe_align_jax._grouped_matmul.primitive",
        "moe_align_jax._expert_load.files",
        "moe_align_jax._expert_load.metrics",
        "moe_align_jax._expert_load.ring",
        "moe_align_jax._masked_quant.problem",
        "moe_align_jax._router.problem",
        "moe_align_jax.batched_moe_align_block_size",
        "moe_align_jax.moe_align_block_size",
        "moe_align_jax.select_implementation",
        "moe_align_jax.types",
        "torch_bridge",
    },
    "torch_bridge._direct.compile_worker": {
        "lazily moe_align_jax._grouped_matmul",
        "lazily moe_align_jax._grouped_matmul.direct_problem",
        "lazily moe_align_jax._moe_layer",
        "lazily moe_align_jax._moe_layer.direct_problem",
        "lazily moe_align_jax._align.kernels",
        "lazily moe_align_jax._align.tables",
        "lazily moe_align_jax._align.vllm",
        "lazily moe_align_jax._align.vllm.problem",
        "lazily moe_align_jax._masked_quant",
        "lazily moe_align_jax._masked_quant.problem",
        "lazily moe_align_jax._router",
        "lazily moe_align_jax._router.problem",
        "lazily moe_align_jax._simt",
        "lazily moe_align_jax.types",
    },
    "torch_bridge._direct.selftest": {
        "lazily moe_align_jax._core.checks",
    },
    "torch_bridge._direct.driver": set(),
    "torch_bridge._direct.disk_cache": {
        "lazily moe_align_jax",
    },
    "benchmarks": {
        "benchmarks",
        "moe_align_jax",
        "torch_bridge",
    },
    "examples": {
        "moe_align_jax",
    },
    "examples.transformers_experts": {
        "moe_align_jax",
        "torch_bridge",
    },
    "moe_align_jax._lowering.launch_value": set(),
    "moe_align_jax._lowering.primitive": set(),
    "moe_align_jax._lowering.sharding": {"moe_align_jax._core.checks"},
    "moe_align_jax._lowering.reverse_mode": {"moe_align_jax._core.checks"},
    "moe_align_jax._core.int32": set(),
    "moe_align_jax._core.fp8": set(),
    "moe_align_jax._core.hopper": set(),
    "moe_align_jax._align.arguments": {
        "moe_align_jax._core",
    },
    "moe_align_jax._align.vllm.problem": {
        "moe_align_jax._core.int32",
        "moe_align_jax.types",
    },
    "moe_align_jax._align.vllm": {
        "moe_align_jax._align.kernels",
        "moe_align_jax._align.tables",
        "moe_align_jax._align.vllm",
        "moe_align_jax._core.int32",
        "moe_align_jax._simt.language",
    },
    "moe_align_jax._align.primitive": {
        "lazily moe_align_jax._align.kernels",
        "lazily moe_align_jax._align.reference",
        "lazily moe_align_jax._simt",
        "moe_align_jax._align.tables",
        "moe_align_jax._core",
        "moe_align_jax._lowering",
        "moe_align_jax.types",
    },
    "moe_align_jax._align.location": {
        "moe_align_jax._align.arguments",
        "moe_align_jax._align.primitive",
        "moe_align_jax._align.replicas",
        "moe_align_jax._core",
        "moe_align_jax._lowering.sharding",
        "moe_align_jax.expert_location",
        "moe_align_jax.types",
    },
    "moe_align_jax._grouped_matmul.config": {
        "moe_align_jax._core.fp8",
        "moe_align_jax._core.hopper",
        "moe_align_jax._core.int32",
        "moe_align_jax._grouped_matmul.problem",
    },
    "moe_align_jax._grouped_matmul.tile_rules": {
        "moe_align_jax._core.hopper",
        "moe_align_jax._grouped_matmul.config",
        "moe_align_jax._grouped_matmul.problem",
    },
    "moe_align_jax._grouped_matmul.choose_e4m3_tiles": {
        "moe_align_jax._core.fp8",
        "moe_align_jax._core.hopper",
        "moe_align_jax._grouped_matmul.config",
        "moe_align_jax._grouped_matmul.problem",
        "moe_align_jax._grouped_matmul.tile_rules",
    },
    "moe_align_jax._grouped_matmul.choose_tiles": {
        "moe_align_jax._core.hopper",
        "moe_align_jax._grouped_matmul.choose_e4m3_tiles",
        "moe_align_jax._grouped_matmul.config",
        "moe_align_jax._grouped_matmul.problem",
        "moe_align_jax._grouped_matmul.spread",
        "moe_align_jax._grouped_matmul.tile_rules",
    },
}

# Which of our modules may import these, and at which depth.
FOREIGN: dict[str, set[str]] = {
    "torch": {
        "lazily benchmarks",
        "lazily moe_align_jax._cli",
        "examples.transformers_experts",
        "torch_bridge",
    },
    "jaxlib.mlir": {
        "moe_align_jax._lowering.launch_value",
        "moe_align_jax._grouped_matmul.cluster_sum",
        "moe_align_jax._grouped_matmul.inline",
        "moe_align_jax._grouped_matmul.inline_rows",
        "moe_align_jax._grouped_matmul.inline_scales",
        "moe_align_jax._grouped_matmul.inline_stores",
        "moe_align_jax._grouped_matmul.inline_wgmma",
        "moe_align_jax._masked_quant.quotient",
        "moe_align_jax._simt.mlir",
        "moe_align_jax._simt.mosaic",
        "moe_align_jax._simt.mosaic_machine",
        "moe_align_jax._grouped_matmul.inline_sums",
    },
    "jax.experimental.mosaic": {
        "moe_align_jax._lowering.launch_value",
        "moe_align_jax._grouped_matmul.cluster_sum",
        "moe_align_jax._grouped_matmul.inline",
        "moe_align_jax._grouped_matmul.inline_rows",
        "moe_align_jax._grouped_matmul.inline_scales",
        "moe_align_jax._grouped_matmul.inline_stores",
        "moe_align_jax._grouped_matmul.inline_wgmma",
        "moe_align_jax._masked_quant.quotient",
        "moe_align_jax._simt.mlir",
        "moe_align_jax._simt.mosaic",
        "moe_align_jax._simt.mosaic_machine",
        "moe_align_jax._grouped_matmul.inline_sums",
    },
    "jax.experimental.pallas": {
        "moe_align_jax._lowering.launch_value",
        "moe_align_jax._grouped_matmul.across_activation_kernel",
        "moe_align_jax._grouped_matmul.activation_gradient_kernel",
        "moe_align_jax._grouped_matmul.weight_gradient_compute",
        "moe_align_jax._grouped_matmul.weight_gradient_kernel",
        "moe_align_jax._grouped_matmul.weight_gradient_load",
        "moe_align_jax._grouped_matmul.weight_gradient_plan",
        "moe_align_jax._grouped_matmul.weight_gradient_cta_tiles",
        "lazily benchmarks.grouped_matmul",
        "lazily benchmarks.training_peers",
        "moe_align_jax._grouped_matmul.epilogue",
        "moe_align_jax._grouped_matmul.cluster_sum",
        "moe_align_jax._grouped_matmul.inline",
        "moe_align_jax._grouped_matmul.inline_rows",
        "moe_align_jax._grouped_matmul.inline_scales",
        "moe_align_jax._grouped_matmul.inline_stores",
        "moe_align_jax._grouped_matmul.inline_wgmma",
        "moe_align_jax._grouped_matmul.found_cut",
        "moe_align_jax._grouped_matmul.compute_loop",
        "moe_align_jax._grouped_matmul.cta_tiles",
        "moe_align_jax._grouped_matmul.heights_loop",
        "moe_align_jax._grouped_matmul.kernel",
        "moe_align_jax._grouped_matmul.late_tiles",
        "moe_align_jax._grouped_matmul.load_loop",
        "moe_align_jax._grouped_matmul.loads",
        "moe_align_jax._grouped_matmul.memory",
        "moe_align_jax._grouped_matmul.products",
        "moe_align_jax._grouped_matmul.scaled_products",
        "moe_align_jax._grouped_matmul.stores",
        "moe_align_jax._layout.kernels.weighted_sum",
        "moe_align_jax._masked_quant.kernel",
        "moe_align_jax._masked_quant.quotient",
        "moe_align_jax._simt.mosaic",
        "moe_align_jax._grouped_matmul.inline_sums",
        "moe_align_jax._grouped_matmul.spread_kernel",
        "moe_align_jax._grouped_matmul.token_sum_kernel",
    },
    "jaxlib.version": {
        "lazily moe_align_jax._cli",
        "lazily torch_bridge._direct.compile_worker",
    },
    "jaxlib": set(),
    "jax._src": set(),
    "typer": {
        "lazily moe_align_jax.cli",
        "moe_align_jax._cli",
    },
    "rich": {
        "lazily benchmarks",
        "lazily moe_align_jax.cli",
        "moe_align_jax._cli",
        "examples.train_moe",
    },
    "vllm": {
        "lazily torch_bridge._vllm_experts",
        "lazily torch_bridge.vllm_patch",
    },
    "sglang": set(),
    "sgl_kernel": set(),
    "tests": set(),
}
# These may be imported where jax is not installed.
JAX_FREE = (
    "moe_align_jax",
    "moe_align_jax.types",
    "moe_align_jax._core.checks",
    "moe_align_jax._core.fork",
    "moe_align_jax._core.fp8",
    "moe_align_jax._core.hopper",
    "moe_align_jax._core.int32",
    "moe_align_jax._align.config",
    "moe_align_jax._align.tables",
    "moe_align_jax._grouped_matmul.choose_e4m3_tiles",
    "moe_align_jax._grouped_matmul.choose_tiles",
    "moe_align_jax._grouped_matmul.config",
    "moe_align_jax._grouped_matmul.direct_problem",
    "moe_align_jax._grouped_matmul.options",
    "moe_align_jax._grouped_matmul.problem",
    "moe_align_jax._grouped_matmul.shape",
    "moe_align_jax._grouped_matmul.spread",
    "moe_align_jax._grouped_matmul.tile_rules",
    "moe_align_jax._grouped_matmul.token_sum_config",
    "moe_align_jax._moe_layer.direct_problem",
    "moe_align_jax._masked_quant.problem",
    "moe_align_jax._router.kernel",
    "moe_align_jax._router.problem",
    "moe_align_jax._core.files",
    "moe_align_jax.eplb",
)


def modules() -> dict[str, pathlib.Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(tree: ast.AST, lazily: bool = False):
    """(name, whether inside a function) of each import; those for type checkers only are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazily) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from ((f"{node.module}.{alias.name}", lazily) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        else:
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports(node, lazily or inside)


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def permitted(name: str, lazily: bool, entries: set[str]) -> bool:
    return any(
        under(name, entry.removeprefix("lazily ")) and (lazily or not entry.startswith("lazily "))
        for entry in entries
    )


def rule_of(module: str) -> str:
    """The longest name in ALLOWED that fits."""
    return max((r for r in ALLOWED if under(module, r)), key=len)


def permissions(module: str, name: str) -> tuple[str, str, set[str]] | None:
    """(Key of the table, what must stand in it, its entries) where `module` imports `name`; None if it is
    free."""
    if any(under(name, package) for package in PACKAGES):
        rule = rule_of(module)
        return rule, name, ALLOWED[rule]
    owners = [f for f in FOREIGN if under(name, f)]
    owner = max(owners, key=len, default="")
    return (owner, module, FOREIGN[owner]) if owners else None


def violations(module: str, source: str) -> list[str]:
    rule = rule_of(module)
    if rule == "moe_align_jax" != module:
        return [f"{module}: no rule in ALLOWED"]
    found = []
    for name, lazily in imports(ast.parse(source)):
        asked = permissions(module, name)
        if asked and not permitted(asked[1], lazily, asked[2]):
            found.append(f"{module} imports {name}{' lazily' if lazily else ''}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_it_may(module):
    assert violations(module, MODULES[module].read_text()) == []


def unused(of_modules: dict[str, str]) -> set[tuple[str, str]]:
    """(Key, entry) of the tables that no import of these sources needs."""
    given = {(key, entry) for table in (ALLOWED, FOREIGN) for key in table for entry in table[key]}
    for module, source in of_modules.items():
        for name, lazily in imports(ast.parse(source)):
            if asked := permissions(module, name):
                key, what, entries = asked
                given -= {(key, entry) for entry in entries if permitted(what, lazily, {entry})}
    return given


def test_each_permission_is_needed():
    """Or the table would let in again what was once thrown out."""
    assert unused(sources()) == set()
    assert {rule_of(module) for module in MODULES} == set(ALLOWED)
    assert ("moe_align_jax._eplb", "moe_align_jax._core.files") in unused({})


BROKEN = [
    ("moe_align_jax.block_align", "import torch"),
    ("moe_align_jax.block_align", "def f():\n    import torch"),
    ("moe_align_jax.block_align", "from moe_align_jax._align import kernels as block_align"),
    ("moe_align_jax._lowering.select", "from moe_align_jax._simt import mosaic"),
    (
        "moe_align_jax._align.kernels.grid",
        "from moe_align_jax._align import reference as block_align",
    ),
    ("moe_align_jax._align.kernels.grid", "from jaxlib.mlir.dialects import arith"),
    ("moe_align_jax._align.kernels.grid", "import moe_align_jax._align.kernels.radix"),
    ("moe_align_jax._simt.language", "from moe_align_jax import types"),
    ("moe_align_jax._simt.language", "import jax.experimental.pallas.mosaic_gpu"),
    ("moe_align_jax._align.tables", "from moe_align_jax._core import checks as _checks"),
    ("moe_align_jax.types", "from moe_align_jax._core import checks as _checks"),
    ("moe_align_jax._lowering.primitive", "from moe_align_jax._lowering import select"),
    ("moe_align_jax._core.checks", "def f():\n    from tests import oracle"),
    ("moe_align_jax.unknown", "import numpy"),
    ("torch_bridge._ops", "from moe_align_jax._lowering import select as _dispatch"),
    ("torch_bridge.vllm", "import vllm"),
    ("torch_bridge._ops", "from jax._src import core"),
    ("benchmarks.run", "def f():\n    import vllm"),
]


@pytest.mark.parametrize(("module", "source"), BROKEN)
def test_the_walk_sees_a_forbidden_import(module, source):
    assert len(violations(module, source)) == 1


# -- circles ---------------------------------------------------------------------------------------


def imported_modules(module: str, source: str, known: Iterable[str]) -> set[str]:
    """Those of `known` that the source imports anywhere: at its top, in a function, for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            # `from package import name`: a module of that name, or what the package itself holds.
            found.add(name if name in known else name.rpartition(".")[0])
    return (found & set(known)) - {module}


def circles(sources: dict[str, str]) -> set[frozenset[str]]:
    """The strongly connected components of two modules or more: each imports each, over others or not."""
    targets = {m: imported_modules(m, source, sources) for m, source in sources.items()}
    reached = {}
    for start in sources:
        seen, todo = set(), [start]
        while todo:
            todo += (new := targets[todo.pop()] - seen)
            seen |= new
        reached[start] = seen
    groups = (
        frozenset(other for other in seen if m in reached[other]) for m, seen in reached.items()
    )
    return {group for group in groups if group}


def sources() -> dict[str, str]:
    return {module: path.read_text() for module, path in MODULES.items()}


def test_no_modules_import_each_other():
    assert circles(sources()) == set()


A_TREE = {
    "p": "from p.c import three",
    "p.a": "import p.b\nfrom p import d",
    "p.b": "def f():\n    from p import c",
    "p.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a import one",
    "p.d": "from p.e import five",
    "p.e": "import os",
}


def test_circles_are_found_through_functions_and_type_checking():
    assert circles(A_TREE) == {frozenset({"p.a", "p.b", "p.c"})}
    assert circles(A_TREE | {"p.c": "import os"}) == set()
    two = circles(A_TREE | {"p.e": "from p.d import four"})
    assert two == {frozenset({"p.a", "p.b", "p.c"}), frozenset({"p.d", "p.e"})}
    # A name of the package itself is an import of the package.
    assert circles(A_TREE | {"p.c": "from p import version"}) == {frozenset({"p", "p.c"})}


# -- private names ---------------------------------------------------------------------------------


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_uses(module: str, source: str, known: Iterable[str]) -> set[str]:
    """Names with a leading underscore that the source takes from other modules of `known`, in full.

    `from x import _y`, and `x._y` of a module x that it imported under any name. A module of a private name
    is none: folders and modules have the rules above.
    """
    tree, known = ast.parse(source), set(known)
    modules, found = {}, set()  # the module that a name stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                modules[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in known:
                    modules[alias.asname or alias.name] = name
                elif _is_private(alias.name) and node.module in known:
                    found.add(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            owner = modules.get(ast.unparse(node.value))
            if owner in known and owner != module and f"{owner}.{node.attr}" not in known:
                found.add(f"{owner}.{node.attr}")
    return found


def test_no_module_uses_private_names_of_another():
    every = sources()
    found = {(m, name) for m, text in every.items() for name in private_uses(m, text, every)}
    assert found == set()


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("from p.b import _two", {"p.b._two"}),
        ("from p import b\nb._two()", {"p.b._two"}),
        ("from p import b as other\ndef f():\n    return other._two", {"p.b._two"}),
        ("import p.b\np.b._two", {"p.b._two"}),
        ("def f():\n    from p import _hidden\n    return _hidden._three", {"p._hidden._three"}),
        ("from p import _hidden\n_hidden.three", set()),
        ("import p._hidden\np._hidden.three", set()),
        ("from p import b\nb.__name__, b.two._replace(x=1), self._two", set()),
        ("from os import _exit\nimport numpy as b\nb._core", set()),
        ("from p import a\na._one", set()),  # its own
    ],
)
def test_private_uses_are_found(source, want):
    assert private_uses("p.a", source, [*A_TREE, "p._hidden"]) == want


@pytest.mark.parametrize("module", JAX_FREE)
def test_leaf_imports_without_jax(module):
    code = f"import sys; sys.modules['jax'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_and_calling_the_library_never_imports_torch():
    code = (
        "import sys, numpy as np, moe_align_jax as m;"
        "m.moe_align_block_size(np.zeros(4, 'int32'), block_size=4, num_experts=2);"
        "print('torch' in sys.modules, 'torch_bridge' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_module_says_what_it_is(module):
    source = MODULES[module].read_text()
    assert ast.get_docstring(ast.parse(source)), "no module docstring"


# Where kernels are: their bodies, what these are made of, and what launches and replaces them.
KERNELS = (
    "moe_align_jax._align.kernels",
    "moe_align_jax._align.vllm",
    "moe_align_jax._expert_parallel.counted_pairs",
    "moe_align_jax._expert_parallel.e4m3",
    "moe_align_jax._expert_parallel.message_kernels",
    "moe_align_jax._expert_parallel.nvlink_kernels",
    "moe_align_jax._expert_parallel.row_words",
    "moe_align_jax._grouped_matmul",
    "moe_align_jax._layout.kernels",
    "moe_align_jax._masked_quant",
    "moe_align_jax._router",
    "moe_align_jax._simt",
)


def undocumented(sources: dict[str, str]) -> set[str]:
    """Functions, methods and classes that do not say what they are, as `module.name`.

    A method may leave it to the class that it inherits from. Functions within functions, and what Python
    names (`__init__`), need no words.
    """
    found, said, bases = set(), {}, {}
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                own = {n.name for n in node.body if isinstance(n, ast.FunctionDef) if _says(n)}
                said.setdefault(node.name, {})[module] = own
                bases[module, node.name] = [ast.unparse(b).rpartition(".")[2] for b in node.bases]

    def inherits(module: str, name: str, method: str) -> bool:
        for base in bases[module, name]:
            # A class of the same module, or the only ones of that name.
            owners = [module] if module in said.get(base, {}) else said.get(base, {})
            if any(method in said[base][m] or inherits(m, base, method) for m in owners):
                return True
        return False

    for module, source in sources.items():
        for node in ast.parse(source).body:
            members = node.body if isinstance(node, ast.ClassDef) else []
            for each in (node, *members):
                if not isinstance(each, (ast.FunctionDef, ast.ClassDef)) or _says(each):
                    continue
                if each is node:
                    found.add(f"{module}.{each.name}")
                elif not each.name.startswith("__") and not inherits(module, node.name, each.name):
                    found.add(f"{module}.{node.name}.{each.name}")
    return found


def _says(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return ast.get_docstring(node) is not None


def test_each_function_of_the_kernels_says_what_it_takes_and_gives():
    of_kernels = {m: text for m, text in sources().items() if any(under(m, k) for k in KERNELS)}
    assert len(of_kernels) > 70 and undocumented(of_kernels) == set()


def test_undocumented_functions_are_found():
    """Its own words, or those of a class that it inherits from: of its module, or imported."""
    first = "class A:\n    'a'\n    def f(self):\n        'f'\n    def g(self): pass\n"
    second = (
        "import p\nclass B(p.A):\n    'b'\n    def __init__(self): pass\n    def f(self): pass\n"
    )
    second += "    def g(self): pass\n    def h(self):\n        'h'\n        def i(): pass\n"
    assert undocumented({"p": first, "q": second}) == {"p.A.g", "q.B.g"}
    assert undocumented({"p": first, "q": f"{second}class A: pass\n"}) == {
        *("p.A.g", "q.A", "q.B.g", "q.B.f"),
    }
    assert undocumented({"p": "def f(): pass\ndef _g(): pass\nx = lambda: 1\n"}) == {"p.f", "p._g"}


FACES = [
    name
    for name in MODULES
    if not under(name, "benchmarks") and not any(part[0] == "_" for part in name.split("."))
]


@pytest.mark.parametrize("module", FACES)
def test_library_has_no_assert_for_its_user(module):
    """An assert may state a fact of ours; argument checks raise errors that name a remedy."""
    tree = ast.parse(MODULES[module].read_text())
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
            asserts = [n for n in ast.walk(function) if isinstance(n, ast.Assert)]
            assert not asserts, f"{function.name}, line {function.lineno}"
