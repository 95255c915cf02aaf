"""The layer of moe_layer.py with its experts split over devices: dispatch, experts, combine.

On one machine (on a CPU, `--devices` makes as many): `python examples/expert_parallel_layer.py --devices 8`.
On several, or as several processes, the same program, started once per process:
`python examples/expert_parallel_layer.py --coordinator HOST:PORT --processes 2 --process 0` (and 1).

D devices, T tokens on each, K top_k, E experts, e = E / D on each, H hidden, F size within an expert.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from moe_layer import MoEParams, dense_moe_layer, init, parse, route

from moe_align_jax import (
    combine,
    dispatch,
    masked_grouped_matmul,
    permute_to_contiguous,
    ragged_dot,
    select_transport,
    unpermute_from_contiguous,
)

AXIS = "ep"
# The router is the same on all devices; each holds its own experts.
PARAM_SPECS = MoEParams(router=P(), gate=P(AXIS), up=P(AXIS), down=P(AXIS))


def masked_experts(
    params: MoEParams, rows: jax.Array, masked_m: jax.Array, expected_m: int | None
) -> jax.Array:
    """`[e, M, H]` to `[e, M, H]`: every expert on the rows of its box that are in use."""
    # Tiles are chosen for the rows of a mean expert.
    matmul = functools.partial(masked_grouped_matmul, expected_m=expected_m)
    hidden = matmul(rows, (params.gate, params.up), masked_m, activation="silu")
    return matmul(hidden, params.down, masked_m)


def grouped_experts(params: MoEParams, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """`[P, H]` to `[P, H]`: each segment through its expert."""
    gate = ragged_dot(rows, params.gate, group_sizes)
    up = ragged_dot(rows, params.up, group_sizes)
    return ragged_dot(jax.nn.silu(gate) * up, params.down, group_sizes)


def layer_of_one_device(
    params: MoEParams, x: jax.Array, *, top_k: int, alignment: int = 16, **options
) -> jax.Array:
    """`[T, H]` to `[T, H]`, with this device's experts: the body of shard_map.

    Args:
        params: the router whole; `[e, ...]` of the experts.
        x: this device's tokens.
        top_k: K. Static.
        alignment: rows per block of the contiguous layout. Static.
        options: of `dispatch`: mode, transport, payload...
    """
    local = params.gate.shape[0]
    weights, topk_ids = route(params.router, x, top_k=top_k)
    num_experts = local * jax.lax.axis_size(AXIS)
    got = dispatch(x, topk_ids, weights, axis_name=AXIS, num_experts=num_experts, **options)
    tokens = got.x
    if got.scales is not None:  # an fp8 payload: a real layer hands both to its fp8 GEMM
        scales = jnp.repeat(got.scales, 128, axis=-1)
        tokens = (tokens.astype(jnp.float32) * scales).astype(x.dtype)
    with jax.named_scope("experts"):
        if got.masked_m is not None:
            y = masked_experts(params, tokens, got.masked_m, got.expected_m)
            return combine(y, got.handle)
        rows, layout = permute_to_contiguous(
            tokens, got.topk_ids, num_experts=local, expert_alignment=alignment
        )
        out = grouped_experts(params, rows, layout.group_sizes)
        return combine(unpermute_from_contiguous(out, layout, got.topk_weights), got.handle)


def expert_parallel_layer(mesh: jax.sharding.Mesh, **options):
    """`(params, x)` to `y`, over the mesh: experts and tokens split along "ep"."""
    body = functools.partial(layer_of_one_device, **options)
    return jax.shard_map(body, mesh=mesh, in_specs=(PARAM_SPECS, P(AXIS)), out_specs=P(AXIS))


def place(mesh: jax.sharding.Mesh, tree, specs):
    """Arrays that every process holds whole, as global arrays over the mesh."""

    def one(spec, leaf):
        host = np.asarray(leaf)
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, specs, tree, is_leaf=lambda leaf: isinstance(leaf, P))


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """The options by which a program becomes one of several processes."""
    parser.add_argument("--devices", type=int, help="CPU devices of this process")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0, help="the number of this one")


def join_processes(options: argparse.Namespace) -> None:
    """Before anything else asks jax for a device."""
    if options.devices:
        jax.config.update("jax_num_cpu_devices", options.devices)
    if options.coordinator:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)


def main() -> None:
    """Runs the layer and its gradient over all devices, and compares both with the dense layer."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add_process_arguments(parser)
    parser.add_argument("--tokens", type=int, default=32, help="per device")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--mode", default="auto", choices=("auto", "normal", "low_latency"))
    parser.add_argument("--transport")
    options = parse(parser)
    join_processes(options)

    devices = jax.devices()
    if options.experts % len(devices):
        parser.error(f"--experts must be a multiple of the {len(devices)} devices")
    mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    key_params, key_x = jax.random.split(jax.random.key(0))
    params = init(
        key_params, hidden=options.hidden, ffn=2 * options.hidden, num_experts=options.experts
    )
    x = jax.random.normal(key_x, (options.tokens * len(devices), options.hidden), jnp.float32)
    layer = expert_parallel_layer(
        mesh, top_k=options.top_k, mode=options.mode, transport=options.transport
    )

    def loss(layer, params, x):
        y = layer(params, x)
        return jnp.mean(y**2), y

    def step(layer):
        """`(params, x)` to the gradient of the loss, and y."""
        return jax.jit(jax.grad(functools.partial(loss, layer), has_aux=True))

    placed = place(mesh, params, PARAM_SPECS), place(mesh, x, P(AXIS))
    # Full float32 products, so that the two ways of summing differ by rounding only.
    with jax.default_matmul_precision("highest"):
        gradients, y = step(layer)(*placed)
        dense_layer = functools.partial(dense_moe_layer, top_k=options.top_k)
        dense_gradients, dense = step(dense_layer)(params, x)
    # What lies on the devices of other processes too, as NumPy arrays.
    y, gradients = multihost_utils.process_allgather((y, gradients), tiled=True)

    choice = select_transport(
        options.tokens,
        top_k=options.top_k,
        num_ranks=len(devices),
        mesh=mesh,
        mode=options.mode,
        transport=options.transport,
    )
    print(
        f"expert parallel layer on {len(devices)} x {devices[0].device_kind} in "
        f"{jax.process_count()} process(es): {options.tokens} tokens each, top-{options.top_k} of "
        f"{options.experts} experts; mode {choice.mode}, transport {choice.transport}"
    )

    def relative_error(a, b):
        a, b = np.asarray(a), np.asarray(b)
        return float(np.abs(a - b).max() / np.abs(b).max())

    print(f"largest error relative to the largest value: y {relative_error(y, dense):.1e}")
    for name, ours, reference in zip(params._fields, gradients, dense_gradients, strict=True):
        print(f"  gradient of {name:6} {str(ours.shape):16} {relative_error(ours, reference):.1e}")


if __name__ == "__main__":
    main()
