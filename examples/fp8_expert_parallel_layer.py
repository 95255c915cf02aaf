"""Decode in e4m3, experts split over devices, as one jitted step: what SGLang does by DeepEP and DeepGEMM.

    dispatch (rows as e4m3, a scale for each row and 128 columns)
    masked_grouped_matmul          [e, M, H]   -> [e, M, 2 F]  bfloat16
    silu_and_mul_masked_quant      [e, M, 2 F] -> [e, M, F]    e4m3 and scales
    masked_grouped_matmul          [e, M, F]   -> [e, M, H]    bfloat16
    combine (the weighted sum)

Each stage takes what the one before it gives, as it lies in memory. The load of the experts is recorded in
the same step. On a CPU `--devices` makes as many: `python examples/fp8_expert_parallel_layer.py --devices 8`.
As several processes, one per GPU for example, the same program, started once per process:
`python examples/fp8_expert_parallel_layer.py --coordinator HOST:PORT --processes 2 --process 0` (and 1).

D devices, T tokens on each, K top_k, E experts, e = E / D on each, M rows per expert at most, H hidden, F
size within an expert; H and F multiples of 128.
"""

import argparse
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from expert_parallel_layer import add_process_arguments, join_processes, place
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from moe_layer import MoEParams, dense_moe_layer, init, parse, route

from moe_align_jax import (
    collect_expert_load,
    combine,
    dispatch,
    init_expert_load,
    masked_grouped_matmul,
    quantize_blockwise,
    record_expert_load,
    silu_and_mul_masked_quant,
)

AXIS = "ep"


class Fp8Params(NamedTuple):
    """Weights of the layer, the experts' as (e4m3 values, float32 scales of blocks of 128 x 128).

    Attributes:
        router: `[H, E]`.
        gate_up: `[E, 2 F, H]`, gate first.
        down: `[E, H, F]`.
    """

    router: Any
    gate_up: Any
    down: Any


# The router is the same on all devices; each holds its own experts.
SPECS = Fp8Params(router=P(), gate_up=(P(AXIS), P(AXIS)), down=(P(AXIS), P(AXIS)))


def quantize(params: MoEParams) -> Fp8Params:
    """The layer's weights, turned to `[E, N, K]` and quantised."""
    gate_up = jnp.concatenate([params.gate, params.up], axis=2)
    both = (quantize_blockwise(w.swapaxes(1, 2)) for w in (gate_up, params.down))
    return Fp8Params(params.router, *both)


def experts(
    params: Fp8Params,
    rows: tuple[jax.Array, jax.Array],
    masked_m: jax.Array,
    *,
    expected_m: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`[e, M, H]` as (e4m3, scales) to `[e, M, H]` bfloat16: every expert on its rows in use.

    Tiles are chosen for `expected_m`, the rows of a mean expert.
    """
    matmul = functools.partial(
        masked_grouped_matmul,
        transpose_rhs=True,
        expected_m=expected_m,
        implementation=implementation,
    )
    hidden = matmul(rows, params.gate_up, masked_m, scale_layout="row_major")
    # Columns of scales are what the next product's kernel reads by TMA.
    hidden = silu_and_mul_masked_quant(hidden, masked_m, scale_layout="column_major")
    return matmul(hidden, params.down, masked_m, scale_layout="column_major")


def layer_of_one_device(
    params: Fp8Params, x: jax.Array, load: Any, *, top_k: int, **options: Any
) -> tuple[jax.Array, Any]:
    """`[T, H]` to `[T, H]`, and the load with this step's pass: the body of shard_map."""
    weights, topk_ids = route(params.router, x, top_k=top_k)
    num_experts = params.down[0].shape[0] * jax.lax.axis_size(AXIS)
    got = dispatch(
        *(x, topk_ids, weights),
        axis_name=AXIS,
        num_experts=num_experts,
        mode="low_latency",
        payload="fp8",
    )
    load = record_expert_load(load, None, got.masked_m[None])
    with jax.named_scope("experts"):
        options["expected_m"] = got.expected_m
        y = experts(params, (got.x, got.scales), got.masked_m, **options)
    return combine(y, got.handle, out_dtype=x.dtype), load


def fp8_layer(mesh: jax.sharding.Mesh, **options: Any):
    """`(params, x, load)` to `(y, load)`, over the mesh."""
    body = functools.partial(layer_of_one_device, **options)
    specs = (SPECS, P(AXIS), P(AXIS))
    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=(P(AXIS), P(AXIS)))


def init_load(mesh: jax.sharding.Mesh, *, num_experts: int, num_passes: int = 8) -> Any:
    """The recorder's state: each device counts the rows of its own experts."""
    return init_expert_load(
        "stat",
        num_layers=1,
        num_physical_experts=num_experts,
        num_passes=num_passes,
        num_shards=mesh.shape[AXIS],
        local_experts=True,
        sharding=NamedSharding(mesh, P(AXIS)),
        recording=True,
    )


def main() -> None:
    """Runs the layer over all devices, and compares it with the same layer in float32."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add_process_arguments(parser)
    parser.add_argument("--tokens", type=int, default=16, help="per device")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--implementation", help="of the products: mosaic_gpu on a Hopper GPU")
    options = parse(parser)
    join_processes(options)

    devices = jax.devices()
    if options.experts % len(devices):
        parser.error(f"--experts must be a multiple of the {len(devices)} devices")
    mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    key_params, key_x = jax.random.split(jax.random.key(0))
    sizes = {"hidden": options.hidden, "ffn": options.hidden, "num_experts": options.experts}
    params = init(key_params, **sizes)
    x = jax.random.normal(key_x, (options.tokens * mesh.size, options.hidden), jnp.bfloat16)
    step = jax.jit(
        fp8_layer(mesh, top_k=options.top_k, implementation=options.implementation),
        donate_argnums=2,
    )
    load = init_load(mesh, num_experts=options.experts)
    y, load = step(place(mesh, quantize(params), SPECS), place(mesh, x, P(AXIS)), load)
    # What lies on the devices of other processes too, as a NumPy array.
    y = multihost_utils.process_allgather(y, tiled=True)

    with jax.default_matmul_precision("highest"):
        want = dense_moe_layer(params, x.astype(jnp.float32), top_k=options.top_k)
    a, b = np.asarray(y, np.float64), np.asarray(want, np.float64)
    difference = 1 - 2 * (a * b).sum() / ((a * a).sum() + (b * b).sum())
    counts = collect_expert_load(load, all_processes=True).logical_count.sum(axis=(0, 1))
    print(
        f"e4m3 layer on {mesh.size} x {devices[0].device_kind} in {jax.process_count()} "
        f"process(es): difference from float32 "
        f"{difference:.1e} (1 - 2xy / (xx + yy)); {counts.sum()} pairs, at most {counts.max()} on an expert"
    )


if __name__ == "__main__":
    main()
