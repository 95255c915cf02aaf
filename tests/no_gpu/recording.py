"""Compiles the recording of expert load for an H200 with XLA itself, without a GPU, and counts its kernels.

    python -m tests.no_gpu.recording

Of 58 layers and 256 experts, from counts that are there: one kernel where the step passes its number, two
where the state counts passes, and no copy of the ring.
"""

import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.no_gpu import script

LAYERS, EXPERTS, PASSES = 58, 256, 100
# What XLA needs to know of a GPU that is not here.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4814000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 149000000000
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 13 }
device_description_str: "sm_90"
"""
# Instructions that launch nothing.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
    *("opt-barrier", "after-all"),
}


def kernels(text: str) -> list[str]:
    """The instructions of a compiled program's entry that run on the GPU."""
    entry = text[text.index("\nENTRY ") :].split("\n}")[0]
    found = re.findall(r"^\s+(?:ROOT )?%?\S+ = .*?(?<=[\]})]) ([a-z][\w-]*)\(", entry, re.M)
    return [name for name in found if name not in _FREE]


def cases() -> Iterator[tuple[str, int, Any, tuple]]:
    """(what it is, kernels, `(load, ...) -> load`, shapes)."""
    import jax
    import jax.numpy as jnp

    import moe_align_jax as maj

    def record(load, counts, maps=None, number=None):
        return maj.record_expert_load(
            load, None, counts, physical_to_logical_map=maps, forward_pass_id=number
        )

    def shaped(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    make = functools.partial(
        maj.init_expert_load,
        num_layers=LAYERS,
        num_physical_experts=EXPERTS,
        num_passes=PASSES,
    )
    state = jax.eval_shape(functools.partial(make, "stat"))
    mapped = jax.eval_shape(functools.partial(make, "stat", num_logical_experts=EXPERTS - 32))
    layers, stacked = [shaped(EXPERTS)] * LAYERS, shaped(LAYERS, EXPERTS)
    yield "with an id", 1, record, (state, layers, None, shaped())
    yield "with an id and a map", 1, record, (mapped, layers, stacked, shaped())
    yield "with an id, stacked counts", 1, record, (state, stacked, None, shaped())
    yield "the state counts", 2, record, (state, layers)
    yield "the state counts, with a map", 2, record, (mapped, layers, stacked)


def check(plugin: str, runtime: str) -> Iterator[script.Report]:
    del runtime
    sys.path.append(str(Path(plugin).parents[2]))  # where jax finds its plugins
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    topology = topologies.get_topology_desc(
        "", platform="cuda", target_config=H200, topology="1x1x1"
    )
    where = SingleDeviceSharding(topology.devices[0])
    for what, wanted, function, shapes in script.one_in_sample(cases()):
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes
        )
        program = jax.jit(function, donate_argnums=0).lower(*placed)
        found = kernels(program.compile().as_text())
        wrong = [] if len(found) == wanted else [f"{wanted} kernels are wanted; got {found}"]
        yield f"{len(found)} kernels  recording, {what}", wrong


if __name__ == "__main__":
    sys.exit(script.main("tests.no_gpu.recording", check))
