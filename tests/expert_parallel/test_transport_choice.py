"""Which transport runs: what select_transport says, what dispatch took, and what the driver is asked."""

import ctypes
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax import expert_parallel
from moe_align_jax._expert_parallel import choice
from moe_align_jax._expert_parallel.transports import peer_access, windows
from moe_align_jax._lowering import select
from tests.expert_parallel.exchanges import jit, mesh_of, over, split


@pytest.fixture
def on_gpus(monkeypatch):
    """As where the eight devices are GPUs and our kernels have run with this jax."""
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)
    monkeypatch.setattr(expert_parallel, "mesh_platform", lambda: "gpu")
    for releases in ("NVLINK_RUN_WITH", "WINDOW_RUN_WITH"):
        monkeypatch.setattr(choice, releases, (select.jax_version()[:2],))
    monkeypatch.setattr(choice, "WINDOW_GPUS", 8)


def taken(mesh, names="ep", rows=2, **options):
    """The choice of a dispatch that is traced over the mesh."""
    found = []

    def body(x, ids, weights):
        got = maj.dispatch(x, ids, weights, axis_name=names, num_experts=8, **options)
        found.append(got.choice)
        return maj.combine(got.x, got.handle)

    rows *= mesh.size
    given = [((rows, 8), "float32"), ((rows, 2), "int32"), ((rows, 2), "float32")]
    spec = P(mesh.axis_names)
    run = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec)
    jax.eval_shape(run, *[jax.ShapeDtypeStruct(*one) for one in given])
    return found[0]


@pytest.mark.parametrize(
    ("shape", "names", "transport"),
    [
        ((8,), ("ep",), "nvlink_window"),
        ((4,), ("ep",), "all_to_all"),
        ((2, 4), ("dp", "ep"), "nvlink_window"),
        ((1,), ("ep",), "all_to_all"),
    ],
)
def test_select_transport_agrees_with_dispatch(on_gpus, shape, names, transport):
    """Of the mesh it is told of; and what dispatch took stands in its result."""
    mesh = mesh_of(shape=shape, names=names)
    asked = maj.select_transport(2, top_k=2, num_ranks=mesh.shape["ep"], mesh=mesh)
    assert asked == taken(mesh) and asked.transport == transport
    if shape == (4,):
        for ours in ("nvlink", "nvlink_window"):
            assert "all 8 devices of the process; this one has 4" in asked.reasons[ours]


@pytest.mark.parametrize(("shape", "names"), [((8,), ("ep",)), ((4, 2), ("dp", "ep"))])
def test_windows_are_named_on_more_gpus_than_they_ran_on(on_gpus, monkeypatch, shape, names):
    """Groups of two ranks of a larger mesh are other kernels, too."""
    monkeypatch.setattr(choice, "WINDOW_GPUS", 2)
    mesh = mesh_of(shape=shape, names=names)
    ask = functools.partial(maj.select_transport, 2, top_k=2, num_ranks=shape[-1], mesh=mesh)
    assert ask() == taken(mesh) and ask().transport == "nvlink"
    assert "has run on 2 GPUs" in ask().reasons["nvlink_window"]
    assert ask(transport="nvlink_window").transport == "nvlink_window"


def test_what_a_window_cannot_do_nvlink_does(on_gpus, monkeypatch):
    """Mode "normal", and a driver that has no memory for windows."""
    many = functools.partial(maj.select_transport, 129, top_k=2, num_ranks=8, mesh=mesh_of(8))
    asked = many()
    assert asked == taken(mesh_of(8), rows=129) and asked.transport == "nvlink"
    assert "more rows than a window holds" in asked.reasons["nvlink_window"]
    assert many(max_low_latency_tokens=129).transport == "nvlink_window"
    monkeypatch.setattr(windows, "missing", lambda: "no memory at an address")
    asked = many(max_low_latency_tokens=129)
    assert asked.transport == "nvlink"
    assert asked.reasons["nvlink_window"] == "no memory at an address"
    monkeypatch.setattr(windows, "missing", lambda: None)
    monkeypatch.setattr(choice, "NVLINK_RUN_WITH", ((0, 1), (1, 2)))
    monkeypatch.setattr(choice, "WINDOW_RUN_WITH", ((0, 3),))
    asked = many()
    assert asked.transport == "all_to_all"
    assert "seen running with jax 0.1 and 1.2 only" in asked.reasons["nvlink"]
    assert "seen running with jax 0.3 only" in asked.reasons["nvlink_window"]


@pytest.mark.parametrize(
    ("release", "taken"),
    [
        # Two GPUs in mode "low_latency", two in "normal", eight in "low_latency".
        ((0, 11, 2), ["nvlink_window", "nvlink", "nvlink"]),
        ((0, 12, 0), ["nvlink_window", "nvlink", "nvlink"]),
        ((0, 13, 0), ["all_to_all", "all_to_all", "all_to_all"]),
    ],
)
def test_the_rule_by_jax_release_is_the_one_documented(monkeypatch, release, taken):
    """Each transport where all its tests have run on GPUs."""
    ask = functools.partial(maj.select_transport, 8, top_k=2, platform="gpu")
    monkeypatch.setattr(choice.select, "jax_version", lambda: release)
    # A release that nobody has seen is refused elsewhere, too: here only the rule is asked.
    for transport in choice.TRANSPORTS.values():
        monkeypatch.setattr(type(transport), "unavailable", lambda self, platform: None)
    asked = [ask(num_ranks=2), ask(num_ranks=2, mode="normal"), ask(num_ranks=8)]
    assert [one.transport for one in asked] == taken
    why = [asked[1].reasons["nvlink"], asked[0].reasons["nvlink"]]
    seen = "seen running with jax 0.11 and 0.12 only"
    assert all((seen in one) == (release[1] == 13) for one in why)


def test_the_platform_of_a_mesh_is_its_own(monkeypatch):
    for releases in ("NVLINK_RUN_WITH", "WINDOW_RUN_WITH"):
        monkeypatch.setattr(choice, releases, (select.jax_version()[:2],))
    asked = maj.select_transport(2, top_k=2, num_ranks=8, mesh=mesh_of())
    assert asked == taken(mesh_of()) and asked.transport == "all_to_all"
    assert "not on 'cpu'" in asked.reasons["nvlink"]


def test_devices_in_another_order_are_refused_as_by_dispatch(on_gpus):
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[::-1]), ("ep",))
    with pytest.raises(NotImplementedError, match="in the order of their ids"):
        maj.select_transport(2, top_k=2, num_ranks=8, mesh=mesh)
    named = maj.select_transport(2, top_k=2, num_ranks=8, mesh=mesh, transport="all_to_all")
    assert named.transport == "all_to_all" and named.reasons["all_to_all"] == "named"


def test_the_choice_is_static():
    """It leaves jit and shard_map with the arrays, and is the same in every trace."""

    def body(x, ids, weights):
        return maj.dispatch(x, ids, weights, axis_name="ep", num_experts=4)

    given = (np.ones((4, 8), np.float32), np.zeros((4, 1), np.int32), np.ones((4, 1), np.float32))
    run = split(mesh_of(2), body)
    first, again = jit(run)(*given), jit(lambda *given: run(*given))(*given)
    assert first.choice == maj.select_transport(2, top_k=1, num_ranks=2, mesh=mesh_of(2))
    assert first.choice == again.choice and hash(first.choice) == hash(again.choice)
    assert jax.tree.structure(first) == jax.tree.structure(again)
    assert not jax.tree.leaves(first.choice)


# -- what the driver is asked -------------------------------------------------------------------------


class Driver:
    """libcuda, of GPUs of which some pairs do not reach each other; handles are ordinals + 100."""

    def __init__(self, apart=(), no_atomics=(), error=0):
        self.apart, self.no_atomics, self.error, self.calls = apart, no_atomics, error, 0

    def cuInit(self, flags):
        return self.error

    def cuDeviceGet(self, out, ordinal):
        return self._write(out, ordinal + 100)

    def cuDeviceCanAccessPeer(self, out, a, b):
        return self._write(out, (a - 100, b - 100) not in self.apart)

    def cuDeviceGetP2PAttribute(self, out, attribute, a, b):
        assert attribute == 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
        return self._write(out, (a - 100, b - 100) not in self.no_atomics)

    def cuDeviceGetAttribute(self, out, attribute, device):
        assert attribute == 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        return self._write(out, 1)

    def _write(self, out, value):
        self.calls += 1
        ctypes.cast(out, ctypes.POINTER(ctypes.c_int))[0] = value
        return 0


@pytest.fixture
def gpus(monkeypatch):
    """A process that has GPUs 2, 3 and 5 and a driver: `gpus(driver)`, forgotten afterwards."""

    def make(driver, ordinals=(2, 3, 5)):
        devices = [types.SimpleNamespace(platform="gpu", local_hardware_id=k) for k in ordinals]
        monkeypatch.setattr(jax, "local_devices", lambda: devices)
        monkeypatch.setattr(peer_access, "library", lambda: driver)
        peer_access.missing.cache_clear()
        windows.missing.cache_clear()

    yield make
    monkeypatch.undo()
    peer_access.missing.cache_clear()
    windows.missing.cache_clear()


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (Driver(), None),
        (Driver(apart=[(5, 2)]), "GPU 5 cannot reach the memory of GPU 2"),
        (Driver(no_atomics=[(2, 3)]), "GPU 2 cannot add atomically in the memory of GPU 3"),
        (Driver(error=100), "cannot be asked .*cuInit failed .CUDA driver error 100"),
    ],
)
def test_without_peer_access_the_choice_is_all_to_all(on_gpus, gpus, driver, reason):
    gpus(driver)
    asked = maj.select_transport(8, top_k=2, num_ranks=3)
    assert asked.transport == ("all_to_all" if reason else "nvlink_window")
    if reason:
        with pytest.raises(NotImplementedError, match=reason):
            maj.select_transport(8, top_k=2, num_ranks=3, transport="nvlink")
    calls = driver.calls
    assert maj.select_transport(8, top_k=2, num_ranks=3) == asked and driver.calls == calls


def test_without_a_driver_the_reason_says_so(on_gpus, gpus, monkeypatch):
    gpus(None)

    def nothing():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(peer_access, "library", nothing)
    asked = maj.select_transport(8, top_k=2, num_ranks=3)
    assert asked.transport == "all_to_all" and "libcuda.so.1" in asked.reasons["nvlink"]


def test_one_gpu_or_none_asks_nobody(gpus):
    gpus(None, ordinals=(4,))
    assert peer_access.missing() is None


@pytest.mark.gpu
def test_this_hosts_driver_answers():
    """GPUs that NVLink joins have peer access; a driver that cannot be asked is a fault of ours."""
    assert "cannot be asked" not in (peer_access.missing() or "")


# -- what the result says of room --------------------------------------------------------------------


def test_one_call_serves_decode_and_prefill():
    """ "auto" with max_tokens_per_expert: counted where rows are dropped, of no effect in "normal"."""

    def body(x, ids, weights):
        got = maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=4, max_tokens_per_expert=3,
            max_low_latency_tokens=4,
        )  # fmt: skip
        if got.masked_m is None:
            assert got.tokens_per_expert is None
            return got.topk_ids[:, 0]
        assert got.x.shape == (2, 3, 8)
        return jnp.stack([got.masked_m, got.tokens_per_expert])

    def run(tokens):
        ids = np.where(np.arange(2 * tokens) % 4 == 3, 2, 1).astype(np.int32)[:, None]
        x, weights = np.ones((2 * tokens, 8), np.float32), np.ones((2 * tokens, 1), np.float32)
        return np.asarray(over(mesh_of(2), body)(x, ids, weights))

    # Of the eight tokens expert 1 gets six, for three of which there is room, and expert 2 two.
    assert run(4).reshape(2, 2, 2).tolist() == [[[0, 3], [0, 6]], [[2, 0], [2, 0]]]
    assert (run(5).reshape(2, 10) >= 0).sum(1).tolist() == [8, 2]
