"""The transport "nvlink" on GPUs of one host, against NumPy and against NCCL's collectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax._expert_parallel.nvlink import NvLink
from moe_align_jax._kernels.peer_rows import dispatch

pytestmark = pytest.mark.gpu
HIDDEN, LOCAL = 256, 4


@pytest.fixture(params=["all", "2x2"])
def mesh(request):
    """Of all GPUs: the transport takes no fewer."""
    devices = jax.devices("gpu")
    shape = {"2x2": (2, 2), "all": (1, len(devices))}[request.param]
    if len(devices) < 2 or shape[0] * shape[1] != len(devices):
        pytest.skip(f"not for {len(devices)} GPUs")
    axes = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(shape, ("dp", "ep"), axes, devices=devices)


class Tokens:
    """Random tokens of all ranks; some ids are nobody's."""

    def __init__(
        self, mesh, tokens: int, top_k: int, seed: int, dtype=jnp.bfloat16, hidden: int = HIDDEN
    ):
        rng = np.random.default_rng(seed)
        self.experts, self.mesh = LOCAL * mesh.shape["ep"], mesh
        total = tokens * mesh.size
        score = rng.random((total, self.experts + 3))
        self.ids = np.argsort(score, axis=1)[:, :top_k].astype(np.int32) - 1
        self.x = rng.standard_normal((total, hidden)).astype(dtype)
        self.weights = rng.random((total, top_k)).astype(np.float32)

    def placed(self, array):
        return jax.device_put(array, NamedSharding(self.mesh, P(("dp", "ep"))))

    def run(self, body):
        spec = P(("dp", "ep"))
        step = jax.jit(jax.shard_map(body, mesh=self.mesh, in_specs=spec, out_specs=spec))
        return step(*map(self.placed, (self.x, self.ids, self.weights)))

    def dispatch(self, x, ids, weights, **options):
        return maj.dispatch(x, ids, weights, axis_name="ep", num_experts=self.experts, **options)

    def layer(self, **options):
        """An expert e multiplies by 1 + e."""

        def body(x, ids, weights):
            got = self.dispatch(x, ids, weights, **options)
            first = jax.lax.axis_index("ep") * LOCAL
            scale = (1 + first + jnp.arange(LOCAL)).astype(jnp.float32)
            rows = got.x.astype(jnp.float32)
            if got.scales is not None:
                rows *= jnp.repeat(got.scales, 128, axis=-1)
            if got.masked_m is not None:
                return maj.combine((rows * scale[:, None, None]).astype(x.dtype), got.handle)
            each = jnp.where(got.topk_ids < 0, 0, scale[jnp.maximum(got.topk_ids, 0)])
            share = jnp.sum(each * got.topk_weights, axis=1, keepdims=True)
            return maj.combine((rows * share).astype(x.dtype), got.handle)

        return body

    def expected(self):
        valid = (self.ids >= 0) & (self.ids < self.experts)
        share = np.where(valid, self.weights * (1 + self.ids), 0).sum(1, keepdims=True)
        return self.x.astype(np.float32) * share


@pytest.mark.parametrize("payload", [None, "fp8"])
@pytest.mark.parametrize("mode", ["normal", "low_latency"])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (128, 3), (300, 6)])
def test_a_layer_equals_numpy(mesh, tokens, top_k, mode, payload):
    given = Tokens(mesh, tokens, top_k, seed=tokens)
    options = dict(mode=mode, payload=payload, transport="nvlink", max_low_latency_tokens=512)
    body = given.layer(**options)
    got = np.asarray(given.run(body)).astype(np.float32)
    want = given.expected()
    np.testing.assert_allclose(got, want, atol=(0.08 if payload else 0.02) * np.abs(want).max())
    np.testing.assert_array_equal(np.asarray(given.run(body)).astype(np.float32), got)


@pytest.mark.parametrize("payload", [None, "fp8", "fp8_ue8m0_packed"])
@pytest.mark.parametrize("room", [None, 3])
@pytest.mark.parametrize("tokens", [1, 8, 128, 250])
def test_boxes_filled_by_one_kernel_are_those_of_four(mesh, monkeypatch, tokens, room, payload):
    """Bit for bit, and again. Rows of 7168 columns are cut into parts where tokens are few."""
    given = Tokens(mesh, tokens, 4, seed=tokens, hidden=7168)
    filled, fill = [], NvLink.send_to_boxes
    spy = lambda *args: filled.append(1) or fill(*args)  # noqa: E731
    monkeypatch.setattr(NvLink, "send_to_boxes", spy)

    def body(x, ids, weights):
        options = dict(mode="low_latency", transport="nvlink", max_low_latency_tokens=512)
        got = given.dispatch(
            x,
            ids,
            weights,
            payload=payload,
            max_tokens_per_expert=room,
            initialize=False,
            **options,
        )
        layout, scales = got.handle.layout, got.scales
        if payload == "fp8_ue8m0_packed":
            scales = jnp.swapaxes(scales, 1, 2)
        used = jnp.arange(got.x.shape[1], dtype=jnp.int32)[None] < got.masked_m[:, None]
        rows = [r.view(jnp.uint8) for r in (got.x, scales) if r is not None]
        rows = [jnp.where(used[..., None], r, 0) for r in rows]
        return rows, got.masked_m, tuple(layout), got.handle.in_use, got.handle.topk_weights

    runs = [given.run(lambda *operands: body(*operands)) for _ in range(2)]
    assert len(filled) == 2
    monkeypatch.setattr(dispatch, "MAX_PAIRS", 0)
    runs.append(given.run(lambda *operands: body(*operands)))
    assert len(filled) == 2
    for other in runs[1:]:
        jax.tree.map(np.testing.assert_array_equal, runs[0], other)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("tokens", [7, 260])
def test_rows_and_sums_are_those_of_all_to_all(mesh, tokens, dtype):
    """Normal mode: every received row in use, its ids and weights, and the sum over ranks, bit for bit."""
    given = Tokens(mesh, tokens, 3, seed=1, dtype=dtype)

    def body(transport, x, ids, weights):
        got = given.dispatch(x, ids, weights, mode="normal", transport=transport)
        used = jnp.any(got.topk_ids >= 0, axis=1, keepdims=True)
        x = jnp.where(used, got.x, 0)
        return x, got.topk_ids, got.topk_weights, maj.combine(got.x * 2, got.handle)

    ours, theirs = (given.run(functools.partial(body, t)) for t in ("nvlink", "all_to_all"))
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))


@pytest.mark.parametrize(
    ("mode", "initialize"), [("normal", None), ("low_latency", True), ("low_latency", False)]
)
def test_gradients_are_those_of_all_to_all(mesh, mode, initialize):
    given = Tokens(mesh, 9, 3, seed=2, dtype=jnp.float32)

    def body(transport, x, ids, weights):
        def loss(x, weights):
            layer = given.layer(mode=mode, transport=transport, initialize=initialize)
            return jnp.sum(jnp.sin(layer(x, ids, weights)))

        return jax.grad(loss, argnums=(0, 1))(x, weights)

    ours, theirs = (given.run(functools.partial(body, t)) for t in ("nvlink", "all_to_all"))
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(mine), np.asarray(other), rtol=1e-4, atol=1e-4)


def test_padding_tokens_and_ranks_without_any(mesh):
    given = Tokens(mesh, 6, 2, seed=3)

    def body(x, ids, weights):
        count = jax.lax.axis_index("ep") * 4
        got = given.dispatch(x, ids, weights, transport="nvlink", num_valid_tokens=count)
        return got.masked_m[None], maj.combine(got.x.astype(x.dtype), got.handle)

    used, out = given.run(body)
    rank = np.arange(mesh.size) % mesh.shape["ep"]
    real = (np.arange(6)[None] < 4 * rank[:, None]).reshape(-1)
    valid = real[:, None] & (given.ids >= 0) & (given.ids < given.experts)
    assert int(np.asarray(used).sum()) == int(valid.sum())
    want = given.x.astype(np.float32) * np.where(valid, given.weights, 0).sum(1, keepdims=True)
    np.testing.assert_allclose(np.asarray(out).astype(np.float32), want, atol=0.05)


@pytest.mark.parametrize("initialize", [True, False])
@pytest.mark.parametrize("tokens", [3, 33, 140])
def test_many_steps_in_one_program(mesh, tokens, initialize):
    """Each step starts from the one before: a row that came late would show."""
    given = Tokens(mesh, tokens, 2, seed=4, hidden=3072)
    given.ids = np.abs(given.ids) % given.experts

    def body(x, ids, weights):
        share = 1 / weights.sum(1, keepdims=True)

        def step(i, x):
            turned = (ids + i) % given.experts
            options = dict(mode="low_latency", max_low_latency_tokens=512, initialize=initialize)
            got = given.dispatch(x, turned, weights * share, transport="nvlink", **options)
            return maj.combine(got.x, got.handle)

        return jax.lax.fori_loop(0, 100, step, x)

    given.x = np.ones_like(given.x)
    got = np.asarray(given.run(body)).astype(np.float32)
    np.testing.assert_allclose(got, 1, atol=0.05)
