"""`dispatch` over NVLink in one kernel, on CPUs: what surrounds the kernel, which XLA stands in for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax import expert_parallel
from moe_align_jax._expert_parallel import message, nvlink_kernels
from moe_align_jax._expert_parallel.transports import nvlink

HIDDEN, LOCAL, TOKENS, TOP_K = 512, 3, 4, 3


def launched_by_xla(problem, *operands):
    """The outputs of a kernel, in order, over the axis "ep"."""
    gather = lambda x: lax.all_gather(x, "ep", tiled=True)  # noqa: E731
    if isinstance(problem, nvlink_kernels.ReturnRows):
        [rows] = operands
        return [lax.all_to_all(rows.reshape(-1, problem.num_tokens, rows.shape[1]), "ep", 0, 0)]
    if isinstance(problem, nvlink_kernels.Send) and not problem.routing:
        return [gather(operands[1])]
    assert isinstance(problem, nvlink_kernels.Dispatch)
    ids, weights, *fields = operands
    if problem.send.quantise is not None:
        fields = message.quantize(fields[0], message.PAYLOADS["fp8"])
    local = gather(ids) - lax.axis_index("ep") * LOCAL
    mine = (local >= 0) & (local < LOCAL)
    local, weights = jnp.where(mine, local, -1), jnp.where(mine, gather(weights), 0)
    received = [gather(x) for x in fields]
    boxes, layout = maj.permute_to_masked(
        received, local, num_experts=LOCAL, max_tokens_per_expert=problem.rows_per_expert
    )
    given = dict(layout._asdict(), local_ids=local, local_weights=weights)
    given |= {f"received{k}": x for k, x in enumerate(received)}
    given |= {f"boxes{k}": x for k, x in enumerate(boxes)}
    return [given[name] for name in problem.outputs]


@pytest.fixture
def launches(monkeypatch):
    """The problems of all launches."""
    seen = []

    def launch(problem, *operands):
        seen.append(type(problem))
        return launched_by_xla(problem, *operands)

    monkeypatch.setattr(expert_parallel, "mesh_platform", lambda: "gpu")
    monkeypatch.setattr(nvlink, "_launch", launch)
    monkeypatch.setattr(nvlink.NvLink, "sums_pairs", lambda *_: False)
    return seen


def run(body):
    """The body over all devices: x, ids (some of no expert, some twice in a token), weights."""
    mesh = jax.make_mesh((jax.device_count(),), ("ep",), (jax.sharding.AxisType.Auto,))
    rng, rows = np.random.default_rng(0), mesh.size * TOKENS
    x = rng.standard_normal((rows, HIDDEN)).astype(jnp.bfloat16)
    ids = rng.integers(-1, mesh.size * LOCAL + 1, (rows, TOP_K)).astype(np.int32)
    weights = rng.random((rows, TOP_K), np.float32)
    step = jax.shard_map(body, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=False)
    return jax.jit(step)(x, ids, weights)


def dispatch(transport, x, ids, weights, **options):
    experts = jax.device_count() * LOCAL
    return maj.dispatch(
        x, ids, weights, axis_name="ep", num_experts=experts, transport=transport, **options
    )


@pytest.mark.parametrize(
    "payload, room",
    [(None, None), (None, 2), ("fp8", 2), ("fp8_ue8m0", None), ("fp8_ue8m0_packed", 2)],
)
def test_it_gives_what_all_to_all_gives(launches, payload, room):
    options = {"payload": payload, "max_tokens_per_expert": room, "initialize": False}

    def body(transport, *operands):
        got = dispatch(transport, *operands, **options)
        used = jnp.arange(got.x.shape[1], dtype=jnp.int32)[None] < got.masked_m[:, None]
        scales = got.scales
        if payload == "fp8_ue8m0_packed":
            scales = jnp.swapaxes(scales, 1, 2)
        rows = [jnp.where(used[..., None], r, 0) for r in (got.x, scales) if r is not None]
        out = maj.combine(got.x.astype(jnp.float32), got.handle)
        return rows, got.masked_m, got.handle.layout, got.handle.in_use, out

    ours, theirs = (
        run(lambda *operands, t=t: body(t, *operands)) for t in ("nvlink", "all_to_all")
    )
    assert launches == [nvlink_kernels.Dispatch, nvlink_kernels.ReturnRows]
    as_bytes = lambda x: np.asarray(x).view(np.uint8)  # noqa: E731
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(as_bytes(a), as_bytes(b)), ours, theirs)


@pytest.mark.parametrize("payload", [None, "fp8"])
def test_gradients_are_those_of_all_to_all(launches, payload):
    def body(transport, x, ids, weights):
        def loss(x, weights):
            options = {"payload": payload, "initialize": False, "max_tokens_per_expert": 5}
            got = dispatch(transport, x, ids, weights, **options)
            used = jnp.arange(got.x.shape[1], dtype=jnp.int32)[None] < got.masked_m[:, None]
            rows = jnp.where(used[..., None], got.x.astype(jnp.float32), 0)
            return jnp.sum(jnp.cos(maj.combine(jnp.sin(rows), got.handle)))

        both = (0, 1) if payload is None else (1,)
        return jax.grad(loss, argnums=both)(x, weights)

    ours, theirs = (
        run(lambda *operands, t=t: body(t, *operands)) for t in ("nvlink", "all_to_all")
    )
    assert nvlink_kernels.Dispatch in launches and nvlink_kernels.ReturnRows in launches
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(
    "options",
    [{"initialize": True}, {"mode": "normal"}, {}],
    ids=["rows to clear", "no boxes", "rows to clear by default"],
)
def test_it_is_for_boxes_whose_other_rows_are_not_cleared(launches, options):
    with pytest.raises(AssertionError):  # another kernel, which nobody plays here
        run(lambda *operands: dispatch("nvlink", *operands, **options).x)
    assert launches == [nvlink_kernels.Send]


def test_many_pairs_take_the_other_way(launches, monkeypatch):
    monkeypatch.setattr(
        nvlink_kernels.dispatch, "MAX_PAIRS", jax.device_count() * TOKENS * TOP_K - 1
    )
    with pytest.raises(AssertionError):
        run(lambda *operands: dispatch("nvlink", *operands, initialize=False).x)
    assert launches == [nvlink_kernels.Send]
