"""For the tests of dispatch: tokens of several ranks, layers of them, and what those should give."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax._expert_parallel.transports import ragged

TRANSPORTS = ("all_gather", "all_to_all", "ragged_all_to_all")
MODES = ("normal", "low_latency")


def exchange_by_all_gather(rows, shape, where, group):
    """What lax.ragged_all_to_all says it does; NaN, or 0 (a good id), where nothing was written."""
    every, starts, sizes, targets, expected = (
        lax.all_gather(a, group.axis_name) for a in (rows, *where)
    )
    me = lax.axis_index(group.axis_name)
    place = jnp.arange(shape[0], dtype=jnp.int32)
    poison = jnp.nan if jnp.issubdtype(rows.dtype, jnp.floating) else 0
    out = jnp.full(shape, poison, rows.dtype)
    for sender in range(group.size):
        size = jnp.where(sizes[sender, me] == expected[me, sender], sizes[sender, me], 0)
        first = targets[sender, me]
        inside = (place >= first) & (place < first + size)
        moved = every[sender].at[starts[sender, me] + place - first].get(mode="clip")
        out = jnp.where(inside[:, None], moved, out)
    return out


def emulate_ragged(monkeypatch):
    """ragged_all_to_all on CPU devices, for a test."""
    monkeypatch.setattr(ragged, "exchange", exchange_by_all_gather)
    monkeypatch.setattr(ragged.RaggedAllToAll, "unavailable", lambda self, platform: None)


def mesh_of(size=8, kind=AxisType.Auto, shape=None, names=("ep",)):
    shape = shape or (size,)
    devices = jax.devices("cpu")[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=devices)


def jit(function):
    """With fewer compiler passes: for time alone."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def split(mesh, body):
    """shard_map with every argument and result split along its first dimension."""
    return jax.shard_map(body, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))


def over(mesh, body):
    """The same as one program."""
    return jit(split(mesh, body))


class Batch:
    """Tokens of all ranks, some of whose pairs go nowhere; rank 1 has none, the last rank few experts."""

    def __init__(self, size, count, hidden, top_k, num_experts, dtype="float32", seed=0):
        rng = np.random.default_rng(seed)
        total = size * count
        self.size, self.count, self.num_experts = size, count, num_experts
        self.x = rng.normal(size=(total, hidden)).astype(getattr(ml_dtypes, dtype, dtype))
        popularity = rng.random((total, num_experts)) - 0.7 * (
            np.arange(num_experts) > num_experts // 2
        )
        self.ids = np.argsort(-popularity, axis=1)[:, :top_k].astype(np.int32)
        self.ids[rng.random(self.ids.shape) < 0.15] = -1
        self.ids[0, 0] = num_experts
        if size > 1:
            self.ids[count : 2 * count] = -1
        self.weights = rng.random(self.ids.shape).astype(np.float32)
        self.valid = (self.ids >= 0) & (self.ids < num_experts)

    @property
    def args(self):
        return self.x, self.ids, self.weights

    def combined(self, expert):
        """float64 `sum_k w * expert(e, x)`."""
        out = np.zeros(self.x.shape)
        for t, k in zip(*np.nonzero(self.valid), strict=True):
            out[t] += self.weights[t, k] * expert(self.ids[t, k], self.x[t].astype(np.float64))
        return out


def scale_of(expert):
    return 1 + expert / 4


def experts_of_a_rank(got, per_rank, in_dtype=jnp.float32):
    """`x * scale_of(expert)` of what was dispatched, in either mode."""
    x = got.x
    if got.scales is not None:
        x = x.astype(in_dtype) * jnp.repeat(got.scales, 128, axis=-1).astype(in_dtype)
    first = lax.axis_index("ep") * per_rank
    scale = scale_of((first + jnp.arange(per_rank, dtype=jnp.int32)).astype(jnp.float32))
    if got.masked_m is not None:
        return (x.astype(jnp.float32) * scale[:, None, None]).astype(in_dtype)
    rows, layout = maj.permute_to_contiguous(
        x, got.topk_ids, num_experts=per_rank, expert_alignment=4
    )
    y = rows.astype(jnp.float32) * scale[jnp.maximum(layout.m_indices, 0)][:, None]
    return maj.unpermute_from_contiguous(y.astype(in_dtype), layout, got.topk_weights)


def layer(batch, **options):
    def body(x, ids, weights):
        got = maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=batch.num_experts, **options
        )
        y = experts_of_a_rank(got, batch.num_experts // batch.size, x.dtype)
        return maj.combine(y, got.handle)

    return body
