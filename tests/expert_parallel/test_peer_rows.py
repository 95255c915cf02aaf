"""The kernels that write rows into other devices' memory: on the emulator, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax import expert_parallel
from moe_align_jax._expert_parallel import nvlink_kernels
from moe_align_jax._expert_parallel.nvlink_kernels import (
    Combine,
    Dispatch,
    Field,
    ReturnRows,
    Send,
    combine,
    copying,
    dispatch,
)
from moe_align_jax._expert_parallel.transports import nvlink
from moe_align_jax._expert_parallel.transports.nvlink import MAX_DEVICES, NvLink
from moe_align_jax._simt import emulator
from moe_align_jax._simt.emulator import faults
from moe_align_jax._simt.language import Devices, Kernel


def sent(problem: nvlink_kernels.PeerProblem, *operands) -> list[dict[str, np.ndarray]]:
    """The outputs of every device and what was staged there, by name, in their own dtypes."""
    kernel = nvlink_kernels.build(problem)
    given = zip(*operands, strict=True)
    arrays = problem.outputs | problem.staged
    got = emulator.run_on_devices(kernel, [[a.view(np.int32) for a in mine] for mine in given])
    return [
        {
            name: words.reshape(-1).view(dtype).reshape(shape)
            for (name, (shape, dtype)), words in zip(arrays.items(), mine, strict=True)
        }
        for mine in got
    ]


def random_tokens(seed, devices, tokens, top_k, local, columns):
    """Two fields, and of all devices ids (some out of range), weights and both fields' values, none 0."""
    rng = np.random.default_rng(seed)
    fields = (Field(columns, np.dtype("uint16")), Field(3, np.dtype("float32")))
    ids = rng.integers(-1, devices * local + 2, (devices, tokens, top_k)).astype(np.int32)
    weights = rng.random((devices, tokens, top_k), np.float32) + 1
    x = rng.integers(1, 1 << 16, (devices, tokens, columns)).astype(np.uint16)
    y = rng.random((devices, tokens, 3), np.float32) + 1
    return fields, ids, weights, x, y


@given(
    devices=st.integers(1, 8),
    tokens=st.integers(1, 9),
    top_k=st.integers(1, 5),
    local=st.integers(1, 4),
    columns=st.sampled_from([4, 6, 8, 514, 1028]),
    routing=st.booleans(),
    seed=st.integers(0, 99),
)
def test_send_puts_each_token_where_its_experts_are(
    devices, tokens, top_k, local, columns, routing, seed
):
    fields, *given = random_tokens(seed, devices, tokens, top_k, local, columns)
    ids, weights, x, y = given
    problem = Send(tokens, top_k, fields, Devices(devices), local, routing)
    got = sent(problem, *((ids, weights) if routing else (ids,)), x, y)

    for receiver in range(devices):
        for row in range(devices * tokens):
            sender, token = divmod(row, tokens)
            here = [0 <= i - receiver * local < local for i in ids[sender, token]]
            for name, source in (("received0", x), ("received1", y)):
                want = source[sender, token] if any(here) else 0 * source[sender, token]
                np.testing.assert_array_equal(got[receiver][name][row], want)
            if routing:
                want = np.where(here, ids[sender, token] - receiver * local, -1)
                np.testing.assert_array_equal(got[receiver]["local_ids"][row], want)
                want = np.where(here, weights[sender, token], 0)
                np.testing.assert_array_equal(got[receiver]["local_weights"][row], want)


@given(
    devices=st.integers(1, 4),
    tokens=st.integers(1, 5),
    groups=st.sampled_from([1, 2, 3, 9, 20]),
    seed=st.integers(0, 99),
)
def test_send_quantises_as_message_does(devices, tokens, groups, seed):
    rng, columns = np.random.default_rng(seed), 128 * groups
    scale = np.exp2(rng.integers(-30, 10, (devices, tokens, groups, 1)))
    x = (rng.standard_normal((devices, tokens, groups, 128)) * scale).astype(jnp.bfloat16)
    x[:, :, 0, :3] = 0.0
    x[0, 0, 0] = -0.0
    x = x.reshape(devices, tokens, columns)
    ids = np.zeros((devices, tokens, 1), np.int32)
    field = Field(columns, np.dtype(jnp.bfloat16))
    problem = Send(tokens, 1, (field,), Devices(devices), 1, False, np.dtype(jnp.float8_e4m3fn))
    got = sent(problem, ids, x)

    values = x.astype(np.float32).reshape(devices * tokens, groups, 128)
    amax = np.maximum(np.abs(values).max(-1), np.float32(1e-4))
    codes = values * (np.float32(448) / amax)[..., None]
    want = np.clip(codes, -448, 448).astype(jnp.float8_e4m3fn).reshape(devices * tokens, columns)
    np.testing.assert_array_equal(got[0]["received0"].view(np.uint8), want.view(np.uint8))
    np.testing.assert_array_equal(got[0]["received1"], amax * np.float32(1 / 448))


def layout_of(ids, experts: int, room: int) -> dict[str, np.ndarray]:
    """The MaskedLayout of local ids `[R, K]`, a pair at a time."""
    counts = np.zeros(experts, np.int32)
    row_of_pair = np.full(ids.shape, -1, np.int32)
    pair_of_row = np.full((experts, room), ids.size, np.int32)
    for pair, expert in enumerate(ids.reshape(-1)):
        if 0 <= expert < experts:
            if counts[expert] < room:
                row_of_pair.reshape(-1)[pair] = expert * room + counts[expert]
                pair_of_row[expert, counts[expert]] = pair
            counts[expert] += 1
    return {
        "masked_m": np.minimum(counts, room),
        "tokens_per_expert": counts,
        "row_of_pair": row_of_pair,
        "pair_of_row": pair_of_row,
    }


def check_dispatch(problem: Dispatch, ids, weights, *fields) -> None:
    """Ids, weights and rows as `Send` delivers them, which is checked by itself; the boxes against NumPy."""
    send = problem.send
    experts, pairs = send.num_local_experts, (-1, send.top_k)
    got = sent(problem, ids, weights, *fields)
    alone = sent(send, ids, weights, *fields)
    for rank, (mine, plain) in enumerate(zip(got, alone, strict=True)):
        for name, array in plain.items():
            np.testing.assert_array_equal(mine[name].view(np.uint8), array.view(np.uint8), name)
        local = ids.reshape(pairs) - rank * experts
        local = np.where((local >= 0) & (local < experts), local, -1)
        np.testing.assert_array_equal(mine["local_ids"], local)
        for name, array in layout_of(local, experts, problem.rows_per_expert).items():
            np.testing.assert_array_equal(mine[name], array, name)
        pair = mine["pair_of_row"]
        for number in range(len(send.received)):
            rows, boxes = (mine[f"{name}{number}"] for name in ("received", "boxes"))
            used = rows.view(np.uint8)[np.minimum(pair, pairs[1] * len(rows) - 1) // send.top_k]
            used[pair == local.size] = 0
            np.testing.assert_array_equal(boxes.view(np.uint8), used)


@given(
    devices=st.integers(1, 8),
    tokens=st.integers(1, 9),
    top_k=st.integers(1, 5),
    local=st.integers(1, 5),
    room=st.integers(1, 30),
    columns=st.sampled_from([4, 6, 8, 514, 1028]),
    initialize=st.booleans(),
    seed=st.integers(0, 99),
)
def test_dispatch_fills_the_boxes(devices, tokens, top_k, local, room, columns, initialize, seed):
    """Ids may be out of range or occur twice in a token, and boxes be too small. Rows not in use are written
    where they are to be zero, which the emulator looks for, and nowhere else."""
    fields, *given = random_tokens(seed, devices, tokens, top_k, local, columns)
    ids, weights, x, y = given
    send = Send(tokens, top_k, fields, Devices(devices), local, True)
    check_dispatch(Dispatch(send, room, initialize), ids, weights, x, y)


@given(
    devices=st.integers(2, 4),
    tokens=st.integers(1, 5),
    top_k=st.sampled_from([1, 8, 11]),
    groups=st.sampled_from([1, 8, 16, 24, 56]),
    seed=st.integers(0, 99),
)
def test_dispatch_quantises_parts_of_rows(devices, tokens, top_k, groups, seed):
    rng, local = np.random.default_rng(seed), 7
    ids = rng.integers(0, devices * local, (devices, tokens, top_k)).astype(np.int32)
    weights = rng.random((devices, tokens, top_k), np.float32)
    x = rng.standard_normal((devices, tokens, 128 * groups)).astype(jnp.bfloat16)
    field, e4m3 = Field(128 * groups, np.dtype(jnp.bfloat16)), np.dtype(jnp.float8_e4m3fn)
    send = Send(tokens, top_k, (field,), Devices(devices), local, True, e4m3)
    problem = Dispatch(send, devices * tokens)
    assert dispatch.parts(problem) == {1: 1, 8: 1, 16: 2, 24: 3, 56: 7}[groups]
    check_dispatch(problem, ids, weights, x)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "room", "reason"),
    [
        (128, 8, 32, 1024, None),
        (129, 8, 32, 1024, "at most 8192"),
        (4, 32, 32, 4, None),
        (4, 33, 32, 4, "at most 32"),
        (1, 2, 7 * 32, 4, None),  # 7 parts of a row: 7 CTAs
        (1, 2, 7 * 32 + 1, 4, "at most 32 experts"),
        (128, 8, 32, 2**31 // (32 * 1792) + 1, "int32"),
    ],
)
def test_what_dispatch_in_one_kernel_takes(tokens, top_k, experts, room, reason):
    field, e4m3 = Field(7168, np.dtype(jnp.bfloat16)), np.dtype(jnp.float8_e4m3fn)
    send = Send(tokens, top_k, (field,), Devices(8), experts, True, e4m3)
    refused = nvlink_kernels.dispatch_unsupported(Dispatch(send, room))
    assert refused is None if reason is None else reason in str(refused)


@given(
    devices=st.integers(1, 8),
    tokens=st.integers(1, 9),
    columns=st.sampled_from([2, 8, 514, 2056]),
    seed=st.integers(0, 99),
)
def test_return_rows_brings_every_row_to_its_token(devices, tokens, columns, seed):
    rng = np.random.default_rng(seed)
    problem = ReturnRows(tokens, Field(columns, np.dtype("uint16")), Devices(devices))
    rows = rng.integers(0, 1 << 16, (devices, devices, tokens, columns)).astype(np.uint16)
    got = sent(problem, rows.reshape(devices, devices * tokens, columns))
    for home in range(devices):
        np.testing.assert_array_equal(got[home]["parts"], rows[:, home])


def check_combine(devices, tokens, top_k, columns, seed, local=2):
    """Against sums in the kernel's order: of float32 with one rounding a step, to the last bit."""
    rng, num_rows = np.random.default_rng(seed), 11
    y = rng.standard_normal((devices, num_rows, columns)).astype(jnp.bfloat16)
    y[:, 3] = np.nan  # a row of no pair
    ids = rng.integers(-1, devices * local + 2, (devices, tokens, top_k)).astype(np.int32)
    ids[0, 0] = -1
    shape = (devices, devices * tokens, top_k)
    local_ids = (
        ids.reshape(1, *shape[1:]) - local * np.arange(devices, dtype=np.int32)[:, None, None]
    )
    local_ids = np.where((local_ids >= 0) & (local_ids < local), local_ids, np.int32(-1))
    row = rng.integers(-1, num_rows, shape).astype(np.int32)  # -1: there was no room for it
    row[(row == 3) | (local_ids < 0)] = -1
    weights = rng.standard_normal(shape).astype(np.float32)
    sizes = tokens, top_k, num_rows, columns, np.dtype(jnp.bfloat16)
    problem = Combine(*sizes, Devices(devices), local)
    got = sent(problem, y, row, weights, local_ids, ids)

    def bits(array):
        return np.asarray(array).astype(jnp.bfloat16).view(np.uint16)

    for home, token in np.ndindex(devices, tokens):
        total, pair = np.zeros(columns, np.float32), home * tokens + token
        for rank in range(devices):
            part = np.zeros(columns, np.float32)
            for k in range(top_k):
                if (at := row[rank, pair, k]) >= 0:
                    product = y[rank, at].astype(np.float64) * weights[rank, pair, k]
                    part = (product + part).astype(np.float32)
            np.testing.assert_array_equal(bits(got[home]["parts"][rank, token]), bits(part))
            total += part.astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(bits(got[home]["out"][token]), bits(total))


@given(
    devices=st.integers(1, 8),
    tokens=st.integers(1, 5),
    top_k=st.sampled_from([1, 2, 4, 5, 9, 34]),
    columns=st.sampled_from([8, 24, 1032, 7176]),
    seed=st.integers(0, 99),
)
def test_combine_sums_weighted_rows_over_pairs_and_ranks(devices, tokens, top_k, columns, seed):
    check_combine(devices, tokens, top_k, columns, seed)


@pytest.mark.parametrize("words", [1, 2])
@pytest.mark.parametrize(
    ("devices", "tokens", "columns"), [(2, 5, 8), (2, 9, 2056), (3, 4, 1024), (8, 3, 2056)]
)
def test_combine_with_more_units_than_ctas(monkeypatch, devices, tokens, columns, words):
    """In one round of sums over the ranks and in several; parts of 1 and of 2 words a thread."""
    monkeypatch.setattr(copying, "MIN_SMS", 1)
    monkeypatch.setattr(combine, "WORDS_PER_THREAD", words)
    nvlink_kernels.build.cache_clear()
    check_combine(devices, tokens, 3, columns, seed=0)
    nvlink_kernels.build.cache_clear()


def test_combine_divides_few_tokens_among_many_ctas():
    def ctas(tokens, devices=4):
        sizes = tokens, 8, 64 * tokens, 7168, np.dtype(jnp.bfloat16)
        return nvlink_kernels.build(Combine(*sizes, Devices(devices), 64)).num_ctas

    assert [ctas(1), ctas(8), ctas(128), ctas(128, 8)] == [7, 56, 228, 114]


def test_a_rank_that_sends_too_little_is_found():
    """It has no id for an expert that the token's rank takes to be there."""
    problem = Combine(1, 1, 1, 8, np.dtype(jnp.bfloat16), Devices(2), 1)
    y, row = np.ones((2, 1, 8), jnp.bfloat16), np.zeros((2, 2, 1), np.int32)
    ids, weights = np.zeros((2, 1, 1), np.int32), np.ones((2, 2, 1), np.float32)
    with pytest.raises(faults.UninitialisedRead, match="parts"):
        sent(problem, y, row, weights, np.full((2, 2, 1), -1, np.int32), ids)


def test_send_with_more_tokens_than_ctas(monkeypatch):
    monkeypatch.setattr(copying, "MAX_CTAS", 3)
    nvlink_kernels.build.cache_clear()
    x = np.random.default_rng(0).integers(0, 1 << 16, (2, 8, 8)).astype(np.uint16)
    problem = Send(8, 1, (Field(8, np.dtype("uint16")),), Devices(2), 1, False)
    got = sent(problem, np.ones((2, 8, 1), np.int32), x)
    np.testing.assert_array_equal(got[1]["received0"], x.reshape(16, 8))
    nvlink_kernels.build.cache_clear()


def test_dispatch_with_more_tokens_than_ctas(monkeypatch):
    monkeypatch.setattr(copying, "MAX_CTAS", 3)
    nvlink_kernels.build.cache_clear()
    rng = np.random.default_rng(0)
    x = rng.integers(0, 1 << 16, (2, 8, 8)).astype(np.uint16)
    ids = rng.integers(-1, 19, (2, 8, 3)).astype(np.int32)
    send = Send(8, 3, (Field(8, np.dtype("uint16")),), Devices(2), 9, True)
    check_dispatch(Dispatch(send, 4), ids, rng.random(ids.shape, np.float32), x)
    nvlink_kernels.build.cache_clear()


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
    with pytest.raises(faults.RaceError, match="it ends without device_wait"):
        emulator.run_on_devices(kernel, [[], []])


@pytest.mark.parametrize("payload", [None, "fp8"])
@pytest.mark.parametrize(
    ("shape", "names"), [((8,), ("ep",)), ((2, 4), ("dp", "ep")), ((4, 2), ("ep", "dp"))]
)
def test_a_low_latency_step_lowers_to_our_kernels_alone(monkeypatch, shape, names, payload):
    monkeypatch.setattr(expert_parallel, "mesh_platform", lambda: "gpu")
    mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
    count = mesh.shape["ep"]

    def step(x, ids, weights):
        options = {"payload": payload, "transport": "nvlink"}
        got = maj.dispatch(x, ids, weights, axis_name="ep", num_experts=4 * count, **options)
        return maj.combine(got.x.astype(jnp.bfloat16), got.handle)

    spec, tokens = P(names), 3 * mesh.size
    shapes = [((tokens, 256), jnp.bfloat16), ((tokens, 5), jnp.int32), ((tokens, 5), jnp.float32)]
    structs = [jax.ShapeDtypeStruct(*one) for one in shapes]
    program = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec))
    text = program.trace(*structs).lower(lowering_platforms=("cuda",)).as_text()
    assert "moe_combine" in text
    # Without rows to be cleared one kernel does it all.
    assert ("moe_dispatch_send" in text) == (payload is None)
    assert ("permute_to_masked_mosaic" in text) == (payload is None)
    assert "all_to_all" not in text and "all_gather" not in text


def test_gradients_lower_to_our_kernels(monkeypatch):
    monkeypatch.setattr(expert_parallel, "mesh_platform", lambda: "gpu")
    mesh = jax.make_mesh((8,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(x, weights, ids):
        options = {"transport": "nvlink", "mode": "low_latency"}
        got = maj.dispatch(x, ids, weights, axis_name="ep", num_experts=16, **options)
        return jnp.sum(maj.combine(jnp.sin(got.x), got.handle).astype(jnp.float32))[None]

    def both(x, weights, ids):
        total = lambda x, weights: loss(x, weights, ids).sum()  # noqa: E731
        return jax.grad(total, argnums=(0, 1))(x, weights)

    shapes = [((24, 64), jnp.bfloat16), ((24, 2), jnp.float32), ((24, 2), jnp.int32)]
    structs = [jax.ShapeDtypeStruct(*one) for one in shapes]
    program = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
    text = program.trace(*structs).lower(lowering_platforms=("cuda",)).as_text()
    assert "moe_dispatch_send" in text and "moe_combine_return_rows" in text
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


def lowered_over(devices):
    mesh = jax.sharding.Mesh(np.array(devices), ("ep",))

    def step(x, ids, weights):
        got = maj.dispatch(x, ids, weights, axis_name="ep", num_experts=8, transport="nvlink")
        return maj.combine(got.x, got.handle)

    tokens = 2 * len(devices)
    shapes = [((tokens, 64), jnp.bfloat16), ((tokens, 2), jnp.int32), ((tokens, 2), jnp.float32)]
    program = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
    traced = program.trace(*[jax.ShapeDtypeStruct(*one) for one in shapes])
    return traced.lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("chosen", "match"),
    [
        (slice(0, 1), "one device has no peers"),
        (slice(0, 4), "all 8 devices of the process; this one has 4"),
        (slice(None, None, -1), "in the order of their ids"),
    ],
)
def test_a_mesh_of_other_devices_is_refused(monkeypatch, chosen, match):
    monkeypatch.setattr(expert_parallel, "mesh_platform", lambda: "gpu")
    with pytest.raises(NotImplementedError, match=match):
        lowered_over(jax.devices()[chosen])
    assert lowered_over(jax.devices()) is not None


def test_axes_that_are_not_neighbours_in_the_mesh_are_refused():
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("a", "b", "c"))
    with jax.sharding.use_abstract_mesh(mesh):
        transport = NvLink()
        assert [transport.refuses(x) for x in ("b", ("a", "b"), ("b", "c"))] == [None] * 3
        for axes in (("b", "a"), ("a", "c")):
            assert "neighbours in the mesh" in str(transport.refuses(axes))


def test_more_words_than_int32_counts_are_refused(monkeypatch):
    monkeypatch.setattr(expert_parallel, "mesh_platform", lambda: "gpu")
    # Of the x that a rank receives: R = 16.
    monkeypatch.setattr(nvlink, "INT32_MAX", 2 * 8 * 32 - 1)
    with pytest.raises(NotImplementedError, match="4-byte words by transport 'nvlink'"):
        lowered_over(jax.devices())
