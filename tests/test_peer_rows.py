"""The kernels that write rows into other devices' memory: on the emulator, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from moe_align_jax._expert_parallel.nvlink import MAX_DEVICES, NvLink
from moe_align_jax._expert_parallel.transport import Group
from moe_align_jax._kernels import peer_rows
from moe_align_jax._kernels.peer_rows import Field, GiveBack, Send
from moe_align_jax._simt import emulator, faults
from moe_align_jax._simt.language import Devices, Kernel


def words_of(rng, rows: int, field: Field) -> np.ndarray:
    return rng.integers(1, 1 << 31, (rows, field.words)).astype(np.int32)


@given(
    devices=st.integers(1, 8),
    tokens=st.integers(1, 9),
    top_k=st.integers(1, 5),
    local=st.integers(1, 4),
    columns=st.sampled_from([4, 6, 8, 514, 1028]),
    seed=st.integers(0, 99),
)
def test_send_puts_each_token_where_its_experts_are(devices, tokens, top_k, local, columns, seed):
    rng = np.random.default_rng(seed)
    fields = (
        Field(columns, np.dtype("uint16"), True),
        Field(3, np.dtype("float32"), True),
        Field(top_k, np.dtype("int32"), False),
    )
    ids = rng.integers(-1, devices * local + 2, (devices, tokens, top_k)).astype(np.int32)
    rows = [[words_of(rng, tokens, f) for f in fields] for _ in range(devices)]
    kernel = peer_rows.build(Send(tokens, top_k, fields, Devices(devices), local))
    got = emulator.run_on_devices(kernel, [[ids[d], *rows[d]] for d in range(devices)])

    for receiver in range(devices):
        for number, field in enumerate(fields):
            received = got[receiver][number].reshape(devices, tokens, -1)
            for sender in range(devices):
                for token in range(tokens):
                    wanted = any(i // local == receiver and i >= 0 for i in ids[sender, token])
                    want = rows[sender][number][token] if wanted or not field.sparse else 0
                    np.testing.assert_array_equal(received[sender, token], want)


@given(
    devices=st.integers(1, 8),
    tokens=st.integers(1, 9),
    columns=st.sampled_from([2, 8, 514, 2056]),
    seed=st.integers(0, 99),
)
def test_give_back_returns_every_row_to_its_token(devices, tokens, columns, seed):
    rng, field = np.random.default_rng(seed), Field(columns, np.dtype("uint16"), False)
    rows = [words_of(rng, devices * tokens, field) for _ in range(devices)]
    kernel = peer_rows.build(GiveBack(tokens, field, Devices(devices)))
    got = emulator.run_on_devices(kernel, [[x] for x in rows])
    for home in range(devices):
        parts = got[home][0].reshape(devices, tokens, -1)
        for rank in range(devices):
            want = rows[rank].reshape(devices, tokens, -1)[home]
            np.testing.assert_array_equal(parts[rank], want)


def test_more_tokens_than_ctas(monkeypatch):
    monkeypatch.setattr(peer_rows, "MAX_CTAS", 3)
    problem = GiveBack(8, Field(4, np.dtype("int32"), False), Devices(2))
    rows = [np.arange(64, dtype=np.int32).reshape(16, 4) + 100 * d for d in range(2)]
    got = emulator.run_on_devices(peer_rows.build.__wrapped__(problem), [[x] for x in rows])
    for home in range(2):
        want = np.stack([x.reshape(2, 8, 4)[home] for x in rows])
        np.testing.assert_array_equal(got[home][0].reshape(2, 8, 4), want)


def test_a_cta_that_does_not_meet_its_peers_is_found():
    def body(t, r):
        with t.if_(t.thread_id().eq(0)):
            t.store(t.remote(r.out, 0), t.rank(), 1)

    kernel = Kernel(
        name="k",
        body=body,
        inputs={},
        outputs={"out": (2,)},
        num_warpgroups=1,
        devices=Devices(2),
        partial=frozenset(["out"]),
    )
    with pytest.raises(faults.RaceError, match="it ends without device_sync"):
        emulator.run_on_devices(kernel, [[], []])


@pytest.mark.parametrize(
    ("shape", "names", "stride"),
    [((8,), ("ep",), 1), ((2, 4), ("dp", "ep"), 1), ((4, 2), ("ep", "dp"), 2)],
)
def test_a_round_trip_lowers_to_our_kernels_alone(shape, names, stride):
    mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
    transport, count = NvLink(), mesh.shape["ep"]

    def both(x, scales, weights, ids):
        assert transport.unavailable("gpu") is None
        group = Group("ep", count, 4)
        plan = transport.plan(ids, group)
        x, scales, *_ = transport.send_fields([x, scales, weights, ids], plan, group)
        return transport.give_back(x.astype(jnp.float32) + scales.sum(), plan, group)

    spec, tokens = P(names), 3 * mesh.size
    shapes = [((tokens, 6), jnp.float8_e4m3fn), ((tokens, 2), jnp.float32)]
    shapes += [((tokens, 5), jnp.float32), ((tokens, 5), jnp.int32)]
    structs = [jax.ShapeDtypeStruct(*one) for one in shapes]
    step = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec))
    text = step.trace(*structs).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2
    assert "all_to_all" not in text and "all_gather" not in text


def test_where_it_cannot_run_it_says_why():
    transport = NvLink()
    assert "NVIDIA GPUs only" in str(transport.unavailable("cpu"))
    mesh = jax.sharding.AbstractMesh((MAX_DEVICES + 1,), ("ep",))
    with jax.sharding.use_abstract_mesh(mesh):
        assert f"at most {MAX_DEVICES} devices" in str(transport.unavailable("gpu"))
    mesh = jax.sharding.AbstractMesh((2, 2), ("ep", "tp"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert "manual in shard_map" in str(transport.unavailable("gpu"))
