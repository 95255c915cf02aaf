"""Windows over several processes: which exchanges take them, and what goes by XLA's collectives beside them.

How processes get them is in `test_two_processes.py`.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax import expert_parallel
from moe_align_jax._expert_parallel import exchange
from moe_align_jax._expert_parallel.choice import TRANSPORTS
from moe_align_jax._expert_parallel.transport import Group
from moe_align_jax._expert_parallel.transports import shared_windows
from moe_align_jax._simt import mlir
from moe_align_jax._simt.language import Devices
from moe_align_jax._simt.window import Window
from tests.expert_parallel.exchanges import Batch, mesh_of, over, split

COLLECTIVES = r"stablehlo\.(all_to_all|all_gather|reduce_scatter)\b"
KERNELS = r"custom_call @mosaic_gpu"


@pytest.fixture
def processes(monkeypatch):
    """As in two processes, each with a GPU; gives what connects them: `connect(num_bytes, mesh)`."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    monkeypatch.setattr(expert_parallel, "mesh_platform", lambda: "gpu")
    monkeypatch.setattr(shared_windows, "_connected", {})

    def connect(num_bytes=shared_windows.PATIENCE << 21, mesh=None):
        devices = [*(mesh or mesh_of(2)).devices.flat]
        window = Window(shared_windows.FIRST_ADDRESS, num_bytes, shared_windows.PATIENCE)
        ids = tuple(device.id for device in devices)
        shared_windows._connected[ids] = Devices(len(devices), 1), window

    return connect


def lowered(mesh, transport=None, mode="low_latency", payload=None) -> str:
    """Of a pair, for GPUs."""

    def body(x, ids, weights):
        got = maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=8, mode=mode, payload=payload,
            transport=transport,
        )  # fmt: skip
        return maj.combine(got.x.astype(jnp.bfloat16), got.handle)

    batch = Batch(2, 16, 256, 2, 8, "bfloat16")
    step = jax.jit(split(mesh, body)).trace(*batch.args)
    return step.lower(lowering_platforms=("cuda",)).as_text()


def test_a_connected_mesh_takes_windows(processes):
    mesh = mesh_of(2)
    ask = lambda mode: maj.select_transport(  # noqa: E731
        16, top_k=2, num_ranks=2, mesh=mesh, mode=mode
    )
    assert ask("low_latency").transport == "all_to_all"
    processes()
    assert ask("low_latency").transport == "nvlink_window"
    assert ask("normal").transport == "all_to_all"
    assert "2 processes" in ask("low_latency").reasons["nvlink"]
    for payload in (None, "fp8"):
        text = lowered(mesh, payload=payload)
        assert len(re.findall(KERNELS, text)) == 2 and not re.search(COLLECTIVES, text)
    # The kernels wait for another process for as long as it may be late.
    assert text.count(str(shared_windows.PATIENCE * mlir.PATIENCE)) >= 2


def test_what_a_window_has_no_room_for_goes_by_collectives(processes):
    processes(num_bytes=1 << 20)
    for mode in ("low_latency", "normal"):
        text = lowered(mesh_of(2), transport="nvlink_window", mode=mode)
        assert re.search(COLLECTIVES, text)
        assert "moe_dispatch" not in text and "moe_combine" not in text


def test_of_two_meshes_the_smaller_window_counts(processes):
    other = jax.make_mesh(
        (2,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[1::-1]
    )
    processes()
    processes(num_bytes=1 << 20, mesh=other)
    for mesh in (mesh_of(2), other):
        assert re.search(COLLECTIVES, lowered(mesh, transport="nvlink_window"))


def test_without_windows_the_transport_is_refused(processes):
    with pytest.raises(NotImplementedError, match="2 processes have not called connect_windows"):
        lowered(mesh_of(2), transport="nvlink_window")
    processes()
    # Over other devices, or these in another order, there is no window.
    other = jax.make_mesh(
        (2,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[1::-1]
    )
    with pytest.raises(NotImplementedError, match="in that order"):
        lowered(other, transport="nvlink_window")


@pytest.mark.parametrize("way", ["out", "quantised", "back", "gradient"])
def test_the_rest_is_what_all_gather_gives(monkeypatch, way):
    """Rows without an expert here are unspecified: they are left out."""
    mesh, batch = mesh_of(2), Batch(2, 12, 256, 3, 8, "bfloat16")
    group = Group("ep", 2, 4)

    def run(name):
        transport = TRANSPORTS[name]
        info = exchange.DispatchInfo("normal", name, group, 12, quantise=way == "quantised")

        def body(x, ids, weights):
            plan = transport.plan(ids, group)
            x, scales, weights, ids = exchange.send(info, x, None, weights, ids, plan)
            mine = jnp.any(ids >= 0, axis=1)
            if way in ("back", "gradient"):
                return exchange.return_rows(info, x, mine, plan)
            kept = [a for a in (x.astype(jnp.float32), scales) if a is not None]
            return [*(jnp.where(mine[:, None], a, 0) for a in kept), weights, ids]

        if way != "gradient":
            return over(mesh, body)(batch.x, batch.ids, batch.weights)
        loss = lambda x: jnp.sum(jnp.sin(split(mesh, body)(x, batch.ids, batch.weights)))  # noqa: E731
        return jax.jit(jax.grad(loss))(batch.x)

    if way == "quantised":  # all_gather has no such step: another of XLA's has
        want = run("all_to_all")
    else:
        want = run("all_gather")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for found, wanted in zip(*map(jax.tree.leaves, (run("nvlink_window"), want)), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_arguments():
    mesh = mesh_of(2)
    assert maj.connect_windows(mesh) is None  # one process needs none
    with pytest.raises(TypeError, match="connect_windows: mesh must be a jax.sharding.Mesh"):
        maj.connect_windows(mesh.abstract_mesh)
    with pytest.raises(ValueError, match="num_bytes must be a multiple of 2 MiB; got 3"):
        maj.connect_windows(mesh, num_bytes=3)
    spec = jax.sharding.NamedSharding(mesh, P("ep"))
    with pytest.raises(TypeError, match="must be a jax.sharding.Mesh"):
        maj.connect_windows(spec)


def test_a_mesh_has_all_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"mesh must have all 8 devices of the processes; got 2"):
        maj.connect_windows(mesh_of(2))
