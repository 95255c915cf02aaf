"""One of several processes that check expert parallelism together: `python -m tests.expert_parallel.process
COORDINATOR PROCESSES NUMBER`. It ends with an error where a result is not one device's.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj

TOKENS, HIDDEN, FFN, TOP_K, EXPERTS = 8, 128, 128, 2, 4
LAYERS = 2


def mesh_of(devices):
    return jax.make_mesh((len(devices),), ("ep",), axis_types=(AxisType.Auto,), devices=devices)


SPLIT = P("ep")


def place(mesh, array, spec=SPLIT):
    """A global array of what every process holds whole."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def on_host(tree):
    return multihost_utils.process_allgather(tree, tiled=True)


def given(mesh):
    """x, weights of the pairs and of the experts, and ids, one of them of no expert: NumPy, of all tokens."""
    rng, total = np.random.default_rng(0), TOKENS * mesh.size
    x = rng.normal(size=(total, HIDDEN)).astype(np.float32)
    ids = np.argsort(rng.random((total, EXPERTS)), axis=1)[:, :TOP_K].astype(np.int32)
    ids[3, 1] = -1
    weights = rng.random(ids.shape).astype(np.float32)
    first = rng.normal(size=(EXPERTS, HIDDEN, 2 * FFN)).astype(np.float32) / HIDDEN**0.5
    second = rng.normal(size=(EXPERTS, FFN, HIDDEN)).astype(np.float32) / FFN**0.5
    return x, weights, first, second, ids


def exchange(mode, x, weights, factors, ids):
    """By dispatch and combine, on one device: expert e makes `tanh(factors[e] * x)` of x."""
    got = maj.dispatch(x, ids, weights, axis_name="ep", num_experts=EXPERTS, mode=mode)
    if got.masked_m is not None:
        return maj.combine(jnp.tanh(got.x * factors[:, None]), got.handle)
    each = jnp.tanh(got.x[:, None] * factors[jnp.maximum(got.topk_ids, 0)])
    return maj.combine(jnp.sum(each * got.topk_weights[..., None], axis=1), got.handle)


def compare(mesh, alone, layer_over, *arrays):
    """The layer and its gradients over all processes, beside one device's; `arrays` end with the ids."""
    direction = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)

    def run(where):
        layer = layer_over(where)

        def loss(*arrays):
            *arrays, direction = arrays
            y = layer(*arrays)
            return jnp.sum(y * direction), y

        step = jax.jit(jax.grad(loss, argnums=range(len(arrays) - 1), has_aux=True))
        return step(*(place(where, a) for a in (*arrays, direction)))

    found = jax.tree.leaves(on_host(run(mesh)))
    if jax.process_index() == 0:
        for ours, one in zip(found, jax.tree.leaves(run(alone)), strict=True):
            np.testing.assert_allclose(ours, one, rtol=2e-4, atol=2e-4)


def over(mesh, body):
    return jax.shard_map(body, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))


def sharded(mesh, method):
    def layer(x, weights, first, second, ids):
        return maj.sharded_fused_moe(
            x, first, second, weights, ids, mesh=mesh, expert_axis="ep", method=method
        )

    return layer


def check_weights(mesh):
    """Experts change places, and so processes."""
    rng = np.random.default_rng(2)
    old = np.stack([np.arange(EXPERTS)] * LAYERS)
    new = np.stack([rng.permutation(EXPERTS) for _ in range(LAYERS)])
    new[0] = np.roll(old[0], 1)
    moves = maj.plan_expert_moves(old, new, num_gpus=mesh.size)
    before = rng.normal(size=(LAYERS, EXPERTS, 3, 5)).astype(np.float32)
    weights = place(mesh, before, P(None, "ep"))
    after = on_host(maj.update_expert_weights({"up": weights}, moves)["up"])
    np.testing.assert_array_equal(after, np.take_along_axis(before, new[..., None, None], 1))


def check_load(mesh, local_experts):
    """Each process reads its own shards' sums; together all of them."""
    width = EXPERTS // mesh.size if local_experts else EXPERTS
    load = maj.init_expert_load(
        "stat", num_layers=1, num_physical_experts=EXPERTS, num_passes=4, num_shards=mesh.size,
        local_experts=local_experts, sharding=NamedSharding(mesh, P("ep")), recording=True,
    )  # fmt: skip
    counts = np.random.default_rng(3).integers(0, 99, (mesh.size, width)).astype(np.int32)
    record = jax.jit(over(mesh, lambda load, count: maj.record_expert_load(load, None, count)))
    load = record(load, place(mesh, counts))
    mine = [d.id for d in mesh.devices.flat].index(jax.local_devices()[0].id)
    if local_experts:
        want, own = counts.reshape(-1), np.zeros((mesh.size, width), np.int64)
        own[mine] = counts[mine]
    else:
        want, own = counts.sum(0), counts[mine]
    everything = maj.collect_expert_load(load, all_processes=True)
    np.testing.assert_array_equal(everything.physical_count, want[None, None])
    alone = maj.collect_expert_load(load)
    np.testing.assert_array_equal(alone.physical_count, own.reshape(1, 1, -1))


def check_windows(mesh):
    """On GPUs of one host low-latency exchanges go through them, in the bits of "all_to_all"."""
    reason = maj.connect_windows(mesh)
    if mesh.devices.flat[0].platform != "gpu":
        assert reason == "process 0: Mosaic GPU kernels run on NVIDIA GPUs only, not on 'cpu'", (
            reason
        )
        return
    assert reason is None, reason
    assert maj.connect_windows(mesh) is None
    x, weights, _, _, ids = given(mesh)
    asked = maj.select_transport(8, top_k=TOP_K, num_ranks=mesh.size, mesh=mesh)
    assert asked.transport == ("nvlink_window" if mesh.size == 2 else "all_to_all"), asked

    def exchanged(transport, payload, mode, x, weights, ids):
        got = maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=EXPERTS, mode=mode, payload=payload,
            transport=transport,
        )  # fmt: skip
        y = got.x.astype(jnp.bfloat16)
        if got.masked_m is not None:  # the rest is not written
            used = jnp.arange(y.shape[1])[None] < got.masked_m[:, None]
            y = jnp.where(used[..., None], y, 0)
            return y, got.masked_m, maj.combine(y, got.handle)
        y = jnp.where(jnp.any(got.topk_ids >= 0, axis=1)[:, None], y, 0)
        return y, got.topk_ids, got.topk_weights, maj.combine(y, got.handle)

    arrays = [place(mesh, a) for a in (x.astype(jnp.bfloat16), weights, ids)]
    for payload, mode in ((None, "low_latency"), ("fp8", "low_latency"), ("fp8", "normal")):
        results = []
        for transport in ("nvlink_window", "nvlink_window", "all_to_all"):
            body = functools.partial(exchanged, transport, payload, mode)
            results.append(jax.tree.leaves(on_host(jax.jit(over(mesh, body))(*arrays))))
        for ours, again, theirs in zip(*results, strict=True):
            np.testing.assert_array_equal(ours, again)
            np.testing.assert_array_equal(ours, theirs, f"{payload} {mode}")
    body = functools.partial(exchange, "low_latency")
    alone = mesh_of(jax.local_devices()[:1])
    x, weights, first, _, ids = given(mesh)
    compare(mesh, alone, lambda m: over(m, body), x, weights, first[:, :, 0], ids)


def check_choice(mesh):
    """The transport is XLA's collectives; our kernels refuse by name, in our words."""
    asked = maj.select_transport(8, top_k=TOP_K, num_ranks=mesh.size, mesh=mesh)
    assert asked.transport == "all_to_all", asked
    reason = asked.reasons["nvlink"]
    if mesh.devices.flat[0].platform == "gpu":
        assert f"{jax.process_count()} processes" in reason, reason
        assert "across processes" in asked.reasons["all_to_all"], asked
    x, weights, _, _, ids = given(mesh)
    options = {"axis_name": "ep", "num_experts": EXPERTS, "transport": "nvlink"}
    try:
        jax.eval_shape(over(mesh, lambda *a: maj.dispatch(*a, **options).x), x, ids, weights)
    except NotImplementedError as error:
        assert str(error).startswith("dispatch: transport must be able to run on"), error
        assert reason in str(error), error
    else:
        raise AssertionError("nvlink ran across processes")


def main() -> None:
    coordinator, processes, number = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, int(processes), int(number))
    mesh, alone = mesh_of(jax.devices()), mesh_of(jax.local_devices()[:1])
    assert mesh.size == jax.process_count() == int(processes)
    on_gpu = mesh.devices.flat[0].platform == "gpu"
    with jax.default_matmul_precision("highest"):
        x, weights, first, second, ids = given(mesh)
        for mode in ("normal", "low_latency"):
            body = functools.partial(exchange, mode)
            compare(
                mesh, alone, lambda m, body=body: over(m, body), x, weights, first[:, :, 0], ids
            )
        for method in ("dispatch", "replicate") if on_gpu else ("dispatch",):
            layer = functools.partial(sharded, method=method)
            compare(mesh, alone, layer, x, weights, first, second, ids)
    check_weights(mesh)
    for local_experts in (False, True):
        check_load(mesh, local_experts)
    check_choice(mesh)
    check_windows(mesh)
    print(f"process {number} of {processes}: right, on {mesh.devices.flat[0].device_kind}")


if __name__ == "__main__":
    main()
