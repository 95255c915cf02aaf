"""Expert parallelism on one GPU: the kernels beside an exchange at sizes of models, a group of one rank."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import moe_align_jax as maj
from moe_align_jax._expert_parallel import packed
from moe_align_jax._expert_parallel.transports import all_to_all
from tests.expert_parallel import test_message_kernels as of_messages
from tests.expert_parallel.exchanges import Batch, experts_of_a_rank, split
from tests.expert_parallel.test_message_kernels import BF16, E4M3, assert_same_bits
from tests.simt.mutants import MESSAGES

pytestmark = pytest.mark.gpu


def run(problem, *arrays):
    """What a kernel gives on the GPU, by name; rows of boxes that are not in use as 0."""
    operands = [jnp.asarray(a) for a in arrays]
    kernels = importlib.import_module(MESSAGES)
    if isinstance(problem, kernels.Pack):
        call = lambda ids, weights, *payload: packed.pack(problem, ids, weights, list(payload))  # noqa: E731
        return {"message": np.asarray(jax.jit(call)(*operands))}
    if not problem.gathered:
        call = lambda rank, came: packed.unpack(problem, rank, came)  # noqa: E731
    else:
        call = lambda *given: packed.fill_boxes(problem, *given[:3], list(given[3:]))  # noqa: E731
    found = jax.jit(call)(*operands)
    got = {name: np.array(array) for name, array in found.items()}
    unused = np.arange(problem.rows_per_expert) >= got["masked_m"][:, None]
    for name, array in got.items():
        if name.startswith("boxes"):
            array[unused] = np.zeros((), array.dtype)
    return got


PLAIN, FP8 = ((7168, BF16),), ((7168, E4M3), (56, np.float32))
SIZES = {  # ranks, tokens, top_k, local experts; payload; room
    "8 tokens, quantised": ((2, 8, 8, 8), FP8, 16, True),
    "128 tokens, quantised": ((2, 128, 8, 16), FP8, 140, True),
    "128 tokens, four ranks": ((4, 32, 8, 8), PLAIN, 128, False),
    "64 tokens, as they are": ((2, 64, 8, 16), FP8, 40, False),
    "odd": ((3, 5, 3, 5), ((6, BF16), (3, np.float32), (20, np.int8)), 4, False),
    "one token, long rows": ((2, 1, 32, 2), ((1 << 15, BF16),), 2, False),
    "more pairs than a thread holds at once": ((2, 1000, 4, 300), ((64, np.float32),), 50, False),
}


@pytest.mark.parametrize("size", SIZES)
def test_kernels_of_every_rank_equal_loops(monkeypatch, size):
    monkeypatch.setattr(of_messages, "run", run)
    sizes, payload, room, quantise = SIZES[size]
    most = importlib.import_module(f"{MESSAGES}.problems")._MAX_CTAS
    of_messages.check_exchange(monkeypatch, sizes, payload, room, most, quantise)


def mesh_of_one():
    devices = jax.devices("gpu")[:1]
    return jax.make_mesh((1,), ("ep",), axis_types=(AxisType.Auto,), devices=devices)


@pytest.mark.parametrize(
    ("payload", "top_k"), [("fp8", 8), ("fp8", 1), ("fp8_ue8m0_packed", 2), (None, 2)]
)
@pytest.mark.parametrize("tokens", [1, 8, 128])
def test_one_rank_gets_the_same_bits_by_every_way(monkeypatch, tokens, payload, top_k):
    """Through all_to_all. The way by XLA is given what NumPy has quantised: XLA's division errs there."""
    batch = Batch(1, tokens, 1024, top_k, 16, "bfloat16", seed=tokens)
    given, results = batch.x, []
    for way in of_messages.WAYS:
        of_messages.take(monkeypatch, way)
        options = {"payload": payload}
        if way == "by XLA" and payload == "fp8":
            given, options = of_messages.quantised(batch.x), {}
        batch.x = given
        results.append(of_messages.exchanged(batch, mesh_of_one(), **options))
    assert_same_bits(results[0], results[2])
    assert_same_bits(results[1], results[2])


@pytest.mark.parametrize("transport", [None, "all_gather"])
@pytest.mark.parametrize("mode", ["normal", "low_latency"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_layer_of_one_rank_equals_numpy(transport, mode, dtype):
    batch = Batch(1, 48, 256, 3, 8, dtype, seed=4)

    def body(x, ids, weights):
        got = maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=8, mode=mode, transport=transport
        )
        assert got.choice.transport == (transport or "all_to_all")
        return maj.combine(experts_of_a_rank(got, 8, x.dtype), got.handle)

    y = jax.jit(split(mesh_of_one(), body))(*batch.args)
    want = batch.combined(lambda e, x: (1 + e / 4) * x)
    limit = 0.02 if dtype == "bfloat16" else 1e-5
    assert np.abs(np.asarray(y).astype(np.float64) - want).max() < limit * np.abs(want).max()


def test_gradients_of_one_rank_are_those_by_xla(monkeypatch):
    batch = Batch(1, 40, 256, 4, 8, seed=5)

    def loss(x, weights, ids):
        def body(x, ids, weights):
            got = maj.dispatch(x, ids, weights, axis_name="ep", num_experts=8, initialize=False)
            used = jnp.arange(got.x.shape[1], dtype=jnp.int32)[None] < got.masked_m[:, None]
            return maj.combine(jnp.sin(jnp.where(used[..., None], got.x, 0)), got.handle)

        return jnp.sum(jnp.cos(split(mesh_of_one(), body)(x, ids, weights)))

    results = []
    for kernels in (True, False):
        monkeypatch.setattr(all_to_all, "MESSAGE_KERNELS", kernels)
        gradient = jax.jit(jax.grad(lambda *given: loss(*given), argnums=(0, 1)))
        results.append(gradient(batch.x, batch.weights, batch.ids))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"max_low_latency_tokens": 1}, {"method": "replicate"}], ids=str
)
def test_a_layer_over_one_gpu_is_fused_moe(options):
    """bfloat16 weights of 8 experts, by our kernels in both."""
    rng = np.random.default_rng(6)
    x, first, second = (
        jnp.asarray(rng.standard_normal(shape, np.float32) / 8, jnp.bfloat16)
        for shape in ((64, 256), (8, 256, 512), (8, 256, 256))
    )
    ids = jnp.asarray(np.argsort(rng.random((64, 8)), axis=1)[:, :2].astype(np.int32))
    weights = jnp.asarray(rng.random((64, 2), np.float32))
    layer = x, first, second, weights, ids
    y, counts = maj.sharded_fused_moe(
        *layer, mesh=mesh_of_one(), expert_axis="ep", return_tokens_per_expert=True, **options
    )
    want, pairs = maj.fused_moe(*layer, return_tokens_per_expert=True)
    np.testing.assert_array_equal(counts, pairs)
    y, want = (np.asarray(a).astype(np.float32) for a in (y, want))
    assert np.abs(y - want).max() < 0.02 * np.abs(want).max()


def test_one_gpu_has_no_peers():
    batch = Batch(1, 4, 256, 2, 4, "bfloat16")

    def body(transport, x, ids, weights):
        got = maj.dispatch(x, ids, weights, axis_name="ep", num_experts=4, transport=transport)
        return maj.combine(got.x, got.handle)

    for name in ("nvlink", "nvlink_window"):
        with pytest.raises(NotImplementedError, match="one device has no peers"):
            jax.jit(split(mesh_of_one(), lambda *given, name=name: body(name, *given)))(*batch.args)
    choice = maj.select_transport(8, top_k=2, num_ranks=1, mesh=mesh_of_one())
    assert choice.transport == "all_to_all"
