"""dispatch and combine on eight CPU devices, against sums over pairs in NumPy.

XLA:CPU has no ragged_all_to_all: its transport runs here over an exchange made of all_gathers (`ragged`),
which follows the op's documented meaning; its offsets are also simulated without jax.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax import expert_parallel
from moe_align_jax._expert_parallel import choice, message
from moe_align_jax._expert_parallel.transports import ragged
from moe_align_jax._lowering import select
from tests.expert_parallel import exchanges
from tests.expert_parallel.exchanges import (
    MODES,
    TRANSPORTS,
    Batch,
    jit,
    layer,
    mesh_of,
    over,
    scale_of,
    split,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def emulated_ragged(monkeypatch):
    exchanges.emulate_ragged(monkeypatch)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_layer_equals_the_sum_over_pairs(emulated_ragged, transport, mode):
    """And twice the same bits; rank 1 has no token."""
    size = 4 if transport == "ragged_all_to_all" else 8
    batch = Batch(size, 5, 6, 3, 16)
    run = over(mesh_of(size), layer(batch, mode=mode, transport=transport))
    got = run(*batch.args)
    want = batch.combined(lambda e, x: x * scale_of(e))
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)
    assert not np.any(np.asarray(got)[5:10])
    np.testing.assert_array_equal(run(*batch.args), got)


def test_an_axis_of_one_device():
    batch = Batch(1, 6, 4, 2, 4, seed=1)
    got = over(mesh_of(1), layer(batch))(*batch.args)
    want = batch.combined(lambda e, x: x * scale_of(e))
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)


def calc_diff(a, b):
    """DeepEP's: 1 - 2<a, b> / (|a|^2 + |b|^2), of values shifted by one."""
    a, b = np.asarray(a, np.float64) + 1, np.asarray(b, np.float64) + 1
    return 1 - 2 * (a * b).sum() / (a * a + b * b).sum()


def authors_tokens(size, count, hidden):
    """`rank - 128`, and the token's number in the last 128 columns."""
    x = np.repeat(np.arange(size) - 128.0, count)[:, None] * np.ones(hidden)
    x[:, -128:] = np.tile(np.arange(count), size)[:, None]
    return x.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("transport", "payload"),
    [("all_gather", "fp8"), ("all_to_all", None), ("ragged_all_to_all", "fp8")],
)
def test_low_latency_as_its_authors_test_it(emulated_ragged, transport, payload):
    """Counts, one run per source rank in token order, values, and the identity brought back."""
    size, count, hidden, num_experts = 4 if payload else 8, 12, 256, 24
    local = num_experts // size
    batch = Batch(size, count, hidden, 8, num_experts, "bfloat16", seed=3)
    batch.x = authors_tokens(size, count, hidden)

    def body(x, ids, weights):
        got = maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=num_experts,
            mode="low_latency", payload=payload, transport=transport,
        )  # fmt: skip
        values = got.x.astype(jnp.float32)
        if payload:
            assert got.x.dtype == message.FP8 and got.scales.shape == (local, size * count, 2)
            values *= jnp.repeat(got.scales, 128, axis=-1)
        assert got.x.shape == (local, size * count, hidden)
        home = maj.combine(values.astype(jnp.bfloat16), got.handle)
        return values, got.masked_m, home

    values, masked_m, home = map(np.asarray, over(mesh_of(size), body)(*batch.args))
    for expert in range(num_experts):
        sent = [t for t in range(size * count) if expert in batch.ids[t]]
        assert masked_m[expert] == len(sent)
        rows = values[expert, : len(sent)]
        # Rank-major, then by token: what the last columns and the others say.
        tolerance = {"rtol": 2**-4, "atol": 1e-6} if payload else {"rtol": 0, "atol": 0}
        want = batch.x[sent].astype(np.float32)
        np.testing.assert_allclose(rows, want, **tolerance)
        assert not values[expert, len(sent) :].any()
    want = batch.x.astype(np.float64) * np.where(batch.valid, batch.weights, 0).sum(1)[:, None]
    assert not np.isnan(home.astype(np.float32)).any()
    assert calc_diff(home, want) < (9e-4 if payload else 1e-5)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_normal_as_its_authors_test_it(emulated_ragged, transport):
    """Order, local ids, weights, tails; the identity brought back is x times its number of ranks."""
    size, count, hidden, num_experts = 4, 9, 128, 8
    batch = Batch(size, count, hidden, 3, num_experts, seed=4)
    local = num_experts // size

    def body(x, ids, weights):
        got = maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=num_experts,
            mode="normal", transport=transport,
        )  # fmt: skip
        assert got.masked_m is None and got.scales is None
        # Rows with no local expert may hold anything.
        x = jnp.where(jnp.any(got.topk_ids >= 0, axis=1)[:, None], got.x, jnp.nan)
        weights = maj.combine(got.topk_weights, got.handle)
        return got.x, got.topk_ids, got.topk_weights, maj.combine(x, got.handle), weights

    x, ids, weights, home, home_weights = map(np.asarray, over(mesh_of(size), body)(*batch.args))
    ranks = np.zeros(size * count)
    for rank in range(size):
        mine = batch.valid & (batch.ids // local == rank)
        sent = np.flatnonzero(mine.any(1))
        ranks[sent] += 1
        part = slice(rank * size * count, (rank + 1) * size * count)
        used = np.flatnonzero((ids[part] >= 0).any(1))
        assert len(used) == len(sent)
        if transport == "ragged_all_to_all":
            np.testing.assert_array_equal(used, np.arange(len(sent)))
        np.testing.assert_array_equal(x[part][used], batch.x[sent])
        want = np.where(mine, batch.ids - rank * local, -1)[sent]
        np.testing.assert_array_equal(ids[part][used], want)
        want = np.where(mine, batch.weights, 0)[sent]
        np.testing.assert_array_equal(weights[part][used], want)
        rest = np.setdiff1d(np.arange(size * count), used)
        assert (ids[part][rest] == -1).all() and not weights[part][rest].any()
    np.testing.assert_allclose(home, batch.x * ranks[:, None], rtol=5e-6)
    np.testing.assert_allclose(home_weights, np.where(batch.valid, batch.weights, 0), atol=1e-9)


def test_masked_rows_stand_where_the_formula_says():
    """`x * M + sum_{r' < r} S[r', x] + i`, S counted before anything is sent."""
    batch = Batch(4, 7, 2, 3, 8, seed=5)
    batch.x[:, 0] = np.arange(28)

    def body(x, ids, weights):
        got = maj.dispatch(x, ids, weights, axis_name="ep", num_experts=8, mode="low_latency")
        return got.x, got.masked_m

    x, masked_m = map(np.asarray, over(mesh_of(4), body)(*batch.args))
    sizes = np.zeros((4, 8), int)
    flat = x.reshape(-1, 2)
    for t in range(28):
        for expert in batch.ids[t][batch.valid[t]]:
            row = expert * 28 + sizes[: t // 7, expert].sum() + sizes[t // 7, expert]
            assert flat[row, 0] == t
            sizes[t // 7, expert] += 1
    np.testing.assert_array_equal(masked_m, sizes.sum(0))


def test_a_caller_who_has_quantised_and_valid_tokens_of_each_rank():
    """(q, scales) travel bit by bit; rows past num_valid_tokens have no expert."""
    rng = np.random.default_rng(6)
    q = rng.integers(0, 127, (16, 128)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    scales = rng.random((16, 1)).astype(np.float32)
    ids = rng.integers(0, 4, (16, 1)).astype(np.int32)
    counts = np.array([3, 0, 8, 1], np.int32)[:2]

    def body(q, scales, ids, count):
        got = maj.dispatch(
            (q, scales), ids, jnp.ones(ids.shape), axis_name="ep", num_experts=4,
            mode="normal", num_valid_tokens=count[0],
        )  # fmt: skip
        return lax.bitcast_convert_type(got.x, jnp.uint8), got.scales, got.topk_ids

    got = map(np.asarray, over(mesh_of(2), body)(q, scales, ids, counts))
    got_q, got_scales, got_ids = (a.reshape(2, 16, -1) for a in got)
    token = np.arange(16)
    for rank in range(2):
        want = np.where(
            (token % 8 < counts[token // 8]) & (ids[:, 0] // 2 == rank), ids[:, 0] % 2, -1
        )
        np.testing.assert_array_equal(got_ids[rank, :, 0], want)
        used = want >= 0
        np.testing.assert_array_equal(got_q[rank][used], q.view(np.uint8)[used])
        np.testing.assert_array_equal(got_scales[rank][used], scales[used])


# -- the ragged plan, without jax's collectives ------------------------------------------------------


def test_ragged_offsets_by_simulation():
    """200 random exchanges there and back: every row where the dense order has it, none overwritten."""
    rng = np.random.default_rng(9)
    for _ in range(200):
        size, count = int(rng.choice([1, 2, 4, 8])), int(rng.integers(0, 7))
        hit = rng.random((size, count, size)) < rng.random()
        counts = hit.sum(1)
        sent = [
            [(r, t) for j in range(size) for t in np.flatnonzero(hit[r, :, j])] for r in range(size)
        ]
        there = move(sent, tables_of(counts, back=False), size * count)
        for j in range(size):
            want = [(r, t) for r in range(size) for t in np.flatnonzero(hit[r, :, j])]
            assert there[j][: len(want)] == want and set(there[j][len(want) :]) <= {None}
        back = move(there, tables_of(counts, back=True), size * count)
        for r in range(size):
            assert back[r][: len(sent[r])] == sent[r] and set(back[r][len(sent[r]) :]) <= {None}


def tables_of(counts, back):
    """The four rows of offsets of every rank."""
    of_rank = jax.vmap(functools.partial(ragged.offsets, back=back), in_axes=(None, 0))
    ranks = jnp.arange(len(counts), dtype=jnp.int32)
    return list(zip(*map(np.asarray, of_rank(jnp.asarray(counts, jnp.int32), ranks)), strict=True))


def move(rows, tables, length):
    """ragged_all_to_all over Python lists, one slice per pair of ranks."""
    size = len(rows)
    out = [[None] * length for _ in range(size)]
    for sender, (starts, sizes, targets, _) in enumerate(tables):
        for receiver in range(size):
            assert sizes[receiver] == tables[receiver][3][sender]
            for i in range(sizes[receiver]):
                place = targets[receiver] + i
                assert out[receiver][place] is None, "overwritten"
                out[receiver][place] = rows[sender][starts[receiver] + i]
    return out


# -- gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transport", "mode"),
    [
        ("all_gather", "low_latency"),
        ("all_to_all", "normal"),
        ("ragged_all_to_all", "normal"),
    ],
)
def test_gradients_equal_those_of_the_dense_layer(emulated_ragged, transport, mode):
    """In x, the weights and the experts' own parameters, with check_vma."""
    size, num_experts, hidden = 4, 8, 5
    batch = Batch(size, 6, hidden, 3, num_experts, seed=10)
    factors = np.random.default_rng(11).normal(size=(num_experts, hidden)).astype(np.float32)
    direction = np.random.default_rng(12).normal(size=batch.x.shape).astype(np.float32)

    def body(x, weights, factors, ids):
        got = maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=num_experts, mode=mode, transport=transport
        )
        if got.masked_m is not None:
            return maj.combine(jnp.tanh(got.x * factors[:, None]), got.handle)
        rows, found = maj.permute_to_contiguous(
            got.x, got.topk_ids, num_experts=2, expert_alignment=2
        )
        y = jnp.tanh(rows * factors[jnp.maximum(found.m_indices, 0)])
        return maj.combine(maj.unpermute_from_contiguous(y, found, got.topk_weights), got.handle)

    run = split(mesh_of(size), body)

    def loss(*args):
        return jnp.sum(run(*args, batch.ids) * direction)

    def dense(x, weights, factors):
        share = jnp.where(batch.valid, weights, 0)
        each = jnp.tanh(x[:, None] * factors[np.where(batch.valid, batch.ids, 0)])
        return jnp.sum(jnp.einsum("tk,tkh->th", share, each) * direction)

    given = batch.x, batch.weights, factors
    with jax.default_matmul_precision("highest"):
        got = jit(jax.grad(loss, argnums=(0, 1, 2)))(*given)
        want = jit(jax.grad(dense, argnums=(0, 1, 2)))(*given)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gradient_of_bfloat16_and_of_a_replicated_input():
    """A token that all ranks share gets the sum of their gradients."""
    x = np.random.default_rng(13).normal(size=(3, 4)).astype(ml_dtypes.bfloat16)
    ids = np.array([[0], [3], [-1]], np.int32)

    def body(x):
        got = maj.dispatch(
            x, ids, np.ones((3, 1), np.float32), axis_name="ep", num_experts=4, mode="normal"
        )
        return maj.combine(3 * got.x, got.handle)

    def loss(x):
        run = jax.shard_map(body, mesh=mesh_of(4), in_specs=P(), out_specs=P("ep"))
        return jnp.sum(run(x).astype(jnp.float32))

    got = jit(jax.grad(loss))(jnp.asarray(x))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, [[12.0] * 4, [12.0] * 4, [0.0] * 4])


@pytest.mark.parametrize("transport", ["all_gather", "all_to_all"])
def test_rows_with_no_local_expert_take_no_part_in_gradients(transport):
    """A dense exchange delivers them, but their tokens get nothing for it, and neither do their results."""
    size, num_experts = 4, 4
    batch = Batch(size, 5, 3, 2, num_experts, seed=17)
    direction = np.random.default_rng(18).normal(size=batch.x.shape).astype(np.float32)

    def body(x, y, ids, weights):
        got = maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=num_experts,
            mode="normal", transport=transport,
        )  # fmt: skip
        return got.x, maj.combine(y, got.handle)

    run = split(mesh_of(size), body)

    def loss(x, y):
        received, home = run(x, y, batch.ids, batch.weights)
        return jnp.sum(received) + jnp.sum(home * direction)

    y = np.ones((size * size * 5, 3), np.float32)
    d_x, d_y = jit(jax.grad(loss, argnums=(0, 1)))(batch.x, y)
    # One expert per rank: rank r has the tokens that chose expert r.
    has = np.stack([(batch.ids == rank).any(1) for rank in range(size)])
    np.testing.assert_allclose(d_x, np.repeat(has.sum(0)[:, None], 3, 1), rtol=1e-6)
    np.testing.assert_allclose(d_y, (has[:, :, None] * direction).reshape(y.shape), rtol=1e-6)


def test_fp8_payload_has_no_gradient_in_x_and_one_in_the_weights():
    batch = Batch(2, 4, 128, 2, 4, "float32", seed=14)

    def loss(x, weights, stop=False):
        run = split(mesh_of(2), layer(batch, payload="fp8", mode="low_latency"))
        return jnp.sum(run(lax.stop_gradient(x) if stop else x, batch.ids, weights))

    with pytest.raises(NotImplementedError, match="x must not be differentiated when its payload"):
        jax.grad(loss)(batch.x, batch.weights)
    got = jit(jax.grad(functools.partial(loss, stop=True), argnums=1))(batch.x, batch.weights)
    each = batch.x.sum(1, keepdims=True) * scale_of(batch.ids)
    want = np.where(batch.valid, each, 0)
    np.testing.assert_allclose(got, want, rtol=0.05, atol=0.6)


# -- meshes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check_vma", [True, False])
def test_explicit_mesh_and_two_axes(check_vma):
    """Experts over a pair of axes; and over one, with the other left to the compiler."""
    batch = Batch(8, 3, 4, 2, 16, seed=15)
    want = batch.combined(lambda e, x: 2 * x)

    def body(x, ids, weights, names):
        got = maj.dispatch(x, ids, weights, axis_name=names, num_experts=16, mode="normal")
        both = jnp.sum(got.topk_weights, axis=1, keepdims=True)
        return maj.combine(2 * got.x * both, got.handle)

    mesh = mesh_of(kind=AxisType.Explicit, shape=(4, 2), names=("node", "ep"))
    names = ("node", "ep")
    spec = P(names)
    placed = [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a in batch.args]
    run = jax.shard_map(
        functools.partial(body, names=names),
        mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma,
    )  # fmt: skip
    np.testing.assert_allclose(jit(run)(*placed), want, rtol=2e-6, atol=1e-6)
    batch = Batch(4, 3, 4, 2, 16, seed=16)
    mesh = mesh_of(shape=(4, 2), names=("ep", "tp"))
    run = jax.shard_map(
        functools.partial(body, names="ep"),
        mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), axis_names={"ep"}, check_vma=True,
    )  # fmt: skip
    want = batch.combined(lambda e, x: 2 * x)
    np.testing.assert_allclose(jit(run)(*batch.args), want, rtol=2e-6, atol=1e-6)


def test_no_token_anywhere_and_no_static_row():
    for count in (0, 2):
        batch = Batch(2, count, 4, 2, 4) if count else None
        x = np.zeros((2 * count, 4), np.float32)
        ids, weights = np.full((2 * count, 2), -1, np.int32), np.ones((2 * count, 2), np.float32)
        options = Batch(2, 1, 4, 2, 4) if batch is None else batch
        for mode in MODES if not count else ("low_latency",):
            got = over(mesh_of(2), layer(options, mode=mode))(x + 1, ids, weights)
            assert got.shape == x.shape and not np.any(got)


# -- which transport, which mode -------------------------------------------------------------------------


def test_the_rule_can_be_asked(monkeypatch):
    for releases in ("NVLINK_RUN_WITH", "WINDOW_RUN_WITH"):
        monkeypatch.setattr(choice, releases, ())  # no jax at all
    ask = functools.partial(maj.select_transport, top_k=8, num_ranks=8)
    assert ask(128).mode == "low_latency" and ask(129).mode == "normal"
    assert ask(129, max_low_latency_tokens=256).mode == "low_latency"
    assert ask(4096, platform="cpu").transport == "all_to_all"
    assert ask(64, transport="all_gather").transport == "all_gather"
    wide = ask(4096, num_ranks=32, platform="gpu")
    assert wide.transport == "all_to_all" and "no fast form" in wide.reasons["ragged_all_to_all"]
    assert set(wide.reasons) == set(choice.TRANSPORTS)


def test_our_kernels_are_the_choice_with_the_jax_they_ran_with(monkeypatch):
    ask = functools.partial(maj.select_transport, 128, top_k=8, platform="gpu")
    for releases in ("NVLINK_RUN_WITH", "WINDOW_RUN_WITH"):
        monkeypatch.setattr(choice, releases, (select.jax_version()[:2],))
    assert ask(num_ranks=2).transport == "nvlink_window"
    assert ask(num_ranks=4).transport == "nvlink"
    assert ask(num_ranks=4, mode="normal").transport == "nvlink"
    assert "at most 8 devices" in ask(num_ranks=9).reasons["nvlink"]
    assert "Mosaic GPU" in ask(num_ranks=4, platform="cpu").reasons["nvlink"]
    monkeypatch.setattr(choice, "NVLINK_RUN_WITH", ((0, 9),))
    other = ask(num_ranks=4)
    assert other.transport == "all_to_all" and "with jax 0.9 only" in other.reasons["nvlink"]
    assert ask(num_ranks=4, transport="nvlink").transport == "nvlink"


def calls(size=2, count=4, hidden=128, x=None, ids=None, weights=None, **options):
    """Traces a dispatch with one thing wrong."""
    total = size * count
    x = np.zeros((total, hidden), np.float32) if x is None else x
    ids = np.zeros((total, 2), np.int32) if ids is None else ids
    weights = np.zeros((total, 2), np.float32) if weights is None else weights
    options = {"axis_name": "ep", "num_experts": 4} | options

    def body(x, ids, weights):
        return maj.dispatch(x, ids, weights, **options).x

    jax.eval_shape(over(mesh_of(size), body), x, ids, weights)


def combine_wrong(y_shape=None, dtype=np.float32, handle=None, mode="normal"):
    def body(x, ids):
        got = maj.dispatch(x, ids, jnp.ones(ids.shape), axis_name="ep", num_experts=4, mode=mode)
        y = got.x if y_shape is None else jnp.zeros(y_shape, dtype)
        return maj.combine(y, got.handle if handle is None else handle)

    x = np.zeros((8, 16), np.float32)
    jax.eval_shape(over(mesh_of(2), body), x, np.zeros((8, 2), np.int32))


F8 = ml_dtypes.float8_e4m3fn
BAD = {
    "an axis that is not there": (
        ValueError,
        "dispatch: axis_name must name an axis of the enclosing jax.shard_map; got 'nope'",
        lambda: calls(axis_name="nope"),
    ),
    "no shard_map at all": (
        ValueError,
        "dispatch: axis_name must name an axis of the enclosing jax.shard_map; got 'ep'",
        lambda: maj.dispatch(
            np.zeros((2, 4), np.float32), np.zeros((2, 1), np.int32), np.zeros((2, 1), np.float32),
            axis_name="ep", num_experts=2,
        ),
    ),
    "an axis number": (TypeError, "axis_name must be the name", lambda: calls(axis_name=0)),
    "experts that do not split": (
        ValueError,
        "dispatch: num_experts must be a multiple of the 2 ranks; got 5",
        lambda: calls(num_experts=5),
    ),
    "too many tokens": (
        ValueError,
        r'x must have at most max_low_latency_tokens \(128\) rows in mode "low_latency"; got 129',
        lambda: calls(count=129, mode="low_latency"),
    ),
    "a mode": (ValueError, "dispatch: mode must be", lambda: calls(mode="fast")),
    "a payload": (ValueError, "dispatch: payload must be None or", lambda: calls(payload="fp4")),
    "columns for fp8": (
        ValueError,
        r"x must have a multiple of 128 columns for payload 'fp8'; got float32 \[4, 100\]",
        lambda: calls(hidden=100, payload="fp8"),
    ),
    "columns for packed scales": (
        ValueError,
        r"x must have a multiple of 512 columns for payload 'fp8_ue8m0_packed'; got float32 \[4, 128\]",
        lambda: calls(payload="fp8_ue8m0_packed"),
    ),
    "packed scales of other columns": (
        ValueError,
        r"x must have shapes \[T, H\] and \[T, H / 512\]; got \(float8_e4m3fn \[4, 512\], int32",
        lambda: calls(x=(np.zeros((8, 512), F8), np.zeros((8, 4), np.int32))),
    ),
    "integer tokens": (
        TypeError,
        r"dispatch: x must be an array of bfloat16, float16, float32; got int32",
        lambda: calls(x=np.zeros((8, 4), np.int32)),
    ),
    "fp8 without scales": (
        TypeError, "dispatch: x must be an array of", lambda: calls(x=np.zeros((8, 4), F8)),
    ),
    "ids of floats": (
        TypeError,
        "dispatch: topk_ids must be an integer array; got float32",
        lambda: calls(ids=np.zeros((8, 2), np.float32)),
    ),
    "ids of other tokens": (
        ValueError,
        r"dispatch: topk_ids must have shape \[4, top_k\]; got int32 \[3, 2\]",
        lambda: calls(ids=np.zeros((6, 2), np.int32)),
    ),
    "integer weights": (
        TypeError,
        "dispatch: topk_weights must be floating point",
        lambda: calls(weights=np.zeros((8, 2), np.int32)),
    ),
    "fewer weights": (
        ValueError,
        r"dispatch: topk_weights must have shape \[4, 2",
        lambda: calls(weights=np.zeros((8, 1), np.float32)),
    ),
    "a transport": (
        ValueError, "transport must be one of all_gather", lambda: calls(transport="pigeon"),
    ),
    "ragged on a CPU": (
        NotImplementedError,
        "must be able to run on cpu; got 'ragged_all_to_all'. XLA:CPU does not implement",
        lambda: calls(transport="ragged_all_to_all"),
    ),
    "room in normal mode": (
        ValueError,
        'max_tokens_per_expert must be left out in mode "normal"',
        lambda: calls(mode="normal", max_tokens_per_expert=4),
    ),
    "a count of floats": (
        TypeError, "num_valid_tokens must be an integer", lambda: calls(num_valid_tokens=1.5),
    ),
    "initialize as text": (
        TypeError, "dispatch: initialize must be a Python bool", lambda: calls(initialize="yes"),
    ),
    "no handle": (
        TypeError, "combine: handle must be a DispatchHandle", lambda: combine_wrong(handle=3),
    ),
    "rows of another exchange": (
        ValueError, r"combine: y must have shape \[8, \.\.\.\]", lambda: combine_wrong((7, 16)),
    ),
    "flat rows": (
        ValueError,
        r"combine: y must have shape \[2, 8, H\]",
        lambda: combine_wrong((2, 8), mode="low_latency"),
    ),
    "integer results": (
        TypeError, "combine: y must be floating point", lambda: combine_wrong((8, 16), np.int32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_argument(case):
    kind, text, call = BAD[case]
    with pytest.raises(kind, match=text):
        call()


# -- the layer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"mode": "normal"}, {"mode": "low_latency", "payload": "fp8"}])
def test_example_layer_equals_a_loop_over_pairs(monkeypatch, options):
    """float64 NumPy, one pair at a time; the fp8 payload within its rounding."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import expert_parallel_layer as example

    rng = np.random.default_rng(0)
    shapes = {"router": (128, 8), "gate": (8, 128, 8), "up": (8, 128, 8), "down": (8, 8, 128)}
    params = example.MoEParams(
        **{k: (rng.normal(size=s) / s[-2] ** 0.5).astype(np.float32) for k, s in shapes.items()}
    )
    x = rng.normal(size=(16, 128)).astype(np.float32)
    mesh = mesh_of(4)
    run = example.expert_parallel_layer(mesh, top_k=2, **options)
    with jax.default_matmul_precision("highest"):
        got = jit(run)(example.place(mesh, params, example.PARAM_SPECS), x)
    router, gate, up, down = (np.asarray(p, np.float64) for p in params)
    logits = np.asarray(x, np.float64) @ router
    want = np.zeros(x.shape)
    for t, chosen in enumerate(np.argsort(-logits, axis=1)[:, :2]):
        share = np.exp(logits[t, chosen])
        for e, w in zip(chosen, share / share.sum(), strict=True):
            g, u = np.asarray(x)[t] @ gate[e], np.asarray(x)[t] @ up[e]
            want[t] += w * ((g / (1 + np.exp(-g)) * u) @ down[e])
    worst = np.abs(np.asarray(got) - want).max() / np.abs(want).max()
    assert worst < (0.08 if options.get("payload") else 2e-6), worst


def test_example_layer_trains_its_experts_behind_an_fp8_payload(monkeypatch):
    """Rows that nothing has written are NaN here, as they may be on a GPU: no gradient may meet one."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import expert_parallel_layer as example
    from moe_layer import dense_moe_layer

    monkeypatch.setattr(lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
    rng = np.random.default_rng(1)
    # 7 is 448 / 64: these tokens' scales are powers of two, and fp8 loses nothing of them.
    x = np.clip(64 * rng.normal(size=(20, 128)), -448, 448).astype(F8).astype(np.float32) / 64
    x[:, 0] = 7
    params = example.init(jax.random.key(0), hidden=128, ffn=16, num_experts=8)
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)  # x64 draws float64
    layer = example.expert_parallel_layer(
        mesh_of(4), top_k=2, mode="low_latency", payload="fp8", transport="all_to_all"
    )

    def gradient(layer):
        return jit(jax.grad(lambda params: jnp.mean(jnp.sin(layer(params, x)))))(params)

    with jax.default_matmul_precision("highest"):
        got = gradient(layer)
        want = gradient(functools.partial(dense_moe_layer, top_k=2))
    for name, ours, theirs in zip(params._fields, got, want, strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-5, err_msg=name)


def test_code_of_the_docs_gives_what_they_say():
    text = (ROOT / "docs" / "expert_parallel.md").read_text()
    first, _layer, last = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(first, names)
    x, ids, w = (np.asarray(names[n], np.float64) for n in ("x", "topk_ids", "w"))
    want = 0.5 * np.einsum("th,tkhf->tf", x, w[ids.astype(int)])
    np.testing.assert_allclose(names["y"], want, rtol=1e-4, atol=1e-5)
    exec(last, names)
    assert names["choice"].transport in choice.TRANSPORTS


@pytest.mark.parametrize("transport", [*TRANSPORTS, "nvlink"])
def test_a_step_is_one_cuda_program_that_never_asks_the_host(monkeypatch, transport):
    """Lowered for GPUs on a machine without one: our kernels, collectives, no callback or transfer."""
    monkeypatch.setattr(ragged.RaggedAllToAll, "unavailable", lambda self, platform: None)
    monkeypatch.setattr(expert_parallel, "mesh_platform", lambda: "gpu")
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    batch = Batch(4, 64, 128, 2, 8, "bfloat16")
    options = {"payload": "fp8", "transport": transport, "initialize": False}
    run = split(mesh_of(4), layer(batch, mode="low_latency", **options))
    traced = jax.jit(run).trace(*batch.args)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # No callback among the custom calls, and no copy to the host's memory.
    calls = set(re.findall(r"custom_call @([\w.]+)", text))
    assert {"mosaic_gpu_v2"} <= calls <= {"mosaic_gpu_v2", "ragged_all_to_all", "AllocateBuffer"}
    assert not re.search(r"stablehlo\.(send|recv|infeed|outfeed)", text)
    assert not traced.jaxpr.effects
    if transport == "nvlink":
        assert not re.search(r"stablehlo\.(all_to_all|all_gather|reduce_scatter|collective)", text)
        assert "moe_combine" in text
        return
    used = {"all_gather": "all_gather", "all_to_all": "all_to_all", "ragged_all_to_all": "ragged"}
    assert used[transport] in text
    # The payload and its scales travel in one message: out, back, and the counts of "ragged". By
    # "all_to_all" tokens, ids and weights do, which XLA gathers together (tests.no_gpu.exchanges).
    rows = re.findall(r"stablehlo\.(all_to_all|all_gather|reduce_scatter)|@ragged_all_to_all", text)
    expected = {"all_gather": 2, "all_to_all": 4, "ragged_all_to_all": 3}
    assert len(rows) == expected[transport]
