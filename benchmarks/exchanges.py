"""Ways to make dispatch + combine on one rank: ours per transport, plain collectives, and bare exchanges.

`benchmarks.expert_parallel` says what each is, verifies and times them.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax._core.fp8 import E4M3_MAX, GROUP
from moe_align_jax._expert_parallel import message, packed
from moe_align_jax._expert_parallel.transports import all_to_all

AXIS = "ep"
TRANSPORTS = ("nvlink_window", "nvlink", "all_to_all", "all_gather")
GPU_TRANSPORTS = ("nvlink_window", "nvlink", "ragged_all_to_all")
FLOOR = 1e-4  # of the fp8 payload, as DeepEP quantises
# A message of which a rank receives more is not packed: x travels by itself.
MOST_PACKED_BYTES = 16 << 20


def placed(mesh: jax.sharding.Mesh, x: np.ndarray) -> jax.Array:
    """An array that every process holds whole, over the devices of all of them."""
    sharding = NamedSharding(mesh, P(AXIS))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def whole(x: jax.Array) -> np.ndarray:
    """All of an array, of which each process may hold a part."""
    if jax.process_count() == 1:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


class Size(NamedTuple):
    """One exchange: T tokens per rank. In mode "low_latency" they travel as fp8, unless `plain`."""

    mode: str
    tokens: int
    hidden: int = 7168
    top_k: int = 8
    experts: int = 256
    plain: bool = False

    @property
    def payload(self) -> str | None:
        return None if self.plain or self.mode != "low_latency" else "fp8"

    @property
    def name(self) -> str:
        return f"{self.mode} {self.tokens}"

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Of a token: out (payload, scales, ids, weights), and back."""
        out = self.hidden + self.hidden // 32 if self.payload else 2 * self.hidden
        return out + 8 * self.top_k, 2 * self.hidden

    def values(self, ranks: int, seed: int = 0) -> tuple[np.ndarray, ...]:
        """x, ids and weights of all ranks; no expert twice in a token."""
        rng = np.random.default_rng(seed)
        total = self.tokens * ranks
        x = rng.standard_normal((total, self.hidden), np.float32)
        score = rng.random((total, self.experts), np.float32)
        ids = np.argpartition(score, self.top_k, axis=1)[:, : self.top_k].astype(np.int32)
        return x.astype(jnp.bfloat16), ids, rng.random((total, self.top_k), np.float32)

    def arguments(self, mesh: jax.sharding.Mesh, seed: int = 0) -> tuple[jax.Array, ...]:
        """`values`, on the devices of the mesh."""
        return tuple(placed(mesh, x) for x in self.values(mesh.size, seed))

    def dispatch(self, x, ids, weights, **options) -> maj.Dispatched:
        return maj.dispatch(
            x, ids, weights, axis_name=AXIS, num_experts=self.experts, mode=self.mode,
            max_low_latency_tokens=1 << 20, payload=self.payload, **options,
        )  # fmt: skip


class Exchange(NamedTuple):
    """A way to do the job, on one rank.

    Attributes:
        name: the provider.
        out: `(x, ids, weights) -> (received, handle)`: what a grouped GEMM reads, what the way back needs.
        back: `(y, handle) -> [T, H]`.
        rows: shape of y, what the rank's experts hand back.
        experts: `(received, handle, scale) -> y` of a layer whose local expert i multiplies by scale[i]; None
            for one that only moves bytes.
        ones: `(ids, weights) -> [T of all ranks, 1]`, by NumPy: what comes back where y is all ones.
    """

    name: str
    out: Callable
    back: Callable
    rows: tuple[int, ...]
    experts: Callable | None
    ones: Callable[[np.ndarray, np.ndarray], np.ndarray]


# -- ours ------------------------------------------------------------------------------------------------


def ours(size: Size, ranks: int, name: str, **options) -> Exchange:
    masked, local = size.mode == "low_latency", size.experts // ranks
    rows = ranks * size.tokens

    def out(x, ids, weights):
        got = size.dispatch(x, ids, weights, **options)
        return (got.x, got.scales, got.masked_m, got.topk_ids, got.topk_weights), got.handle

    def experts(received, handle, scale):
        del handle
        x, scales, masked_m, topk_ids, topk_weights = received
        x = dequantised(x, scales)
        if masked_m is not None:
            return (x * scale[:, None, None]).astype(jnp.bfloat16)
        each = jnp.where(topk_ids < 0, 0.0, scale[jnp.maximum(topk_ids, 0)])
        share = jnp.sum(each * topk_weights, axis=1, keepdims=True)
        return (x * share).astype(jnp.bfloat16)

    shape = (local, rows, size.hidden) if masked else (rows, size.hidden)
    return Exchange(name, out, maj.combine, shape, experts, functools.partial(_ones, size, ranks))


def packing_up_to(exchange: Exchange, name: str, num_bytes: int) -> Exchange:
    """The same, traced with another bound of what is packed into a message."""
    return _traced_with(exchange, name, message, "MAX_PACKED_BYTES", num_bytes)


def message_kernels(exchange: Exchange, *, ours: bool) -> Exchange:
    """The same with our kernels beside the exchanges of "all_to_all", or with what XLA makes of it."""
    name = f"{exchange.name}, {'message kernels' if ours else 'by XLA'}"
    return _traced_with(exchange, name, all_to_all, "MESSAGE_KERNELS", ours)


def gathers(size: Size, ranks: int) -> bool:
    """Whether "all_to_all" gathers tokens of that size as they are, where no one says otherwise."""
    payload: Any = [jax.ShapeDtypeStruct((size.tokens, size.hidden), jnp.bfloat16)]
    ids: Any = jax.ShapeDtypeStruct((size.tokens, size.top_k), jnp.int32)
    boxes = size.experts // ranks, ranks * size.tokens
    *_, gathered = packed.problems(payload, ids, ranks, *boxes, size.payload is not None)
    return all_to_all.gathers_all(gathered)


def gathering(exchange: Exchange, *, gathers: bool) -> Exchange:
    """The same with rows that are gathered as they are, or packed before the way out."""
    name = f"{exchange.name}, {'gathered' if gathers else 'packed'}"
    return _traced_with(exchange, name, all_to_all, "GATHERS", gathers)


def _traced_with(exchange: Exchange, name: str, module: Any, setting: str, value: Any) -> Exchange:
    def changed(function):
        def run(*arguments):
            usual = getattr(module, setting)
            setattr(module, setting, value)
            try:
                return function(*arguments)
            finally:
                setattr(module, setting, usual)

        return run

    return exchange._replace(name=name, out=changed(exchange.out), back=changed(exchange.back))


def _ones(size: Size, ranks: int, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Rows of ones come back weighted (low latency), or once per rank that has an expert of the token."""
    if size.mode == "low_latency":
        return weights.sum(1, keepdims=True)
    owner = ids // (size.experts // ranks)
    return sum(
        ((owner == rank).any(1, keepdims=True).astype(np.float32) for rank in range(ranks)),
        start=np.zeros((len(ids), 1), np.float32),
    )


# -- the same job on plain collectives ---------------------------------------------------------------------


def quantised(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """e4m3 `[T, H]` and float32 scales `[T, H / 128]`."""
    groups = x.astype(jnp.float32).reshape(x.shape[0], -1, GROUP)
    amax = jnp.maximum(jnp.abs(groups).max(-1), jnp.float32(FLOOR))
    q = (groups * (jnp.float32(E4M3_MAX) / amax)[..., None]).astype(jnp.float8_e4m3fn)
    return q.reshape(x.shape), amax * jnp.float32(1 / E4M3_MAX)


def dequantised(x: jax.Array, scales: jax.Array | None) -> jax.Array:
    x = x.astype(jnp.float32)
    return x if scales is None else x * jnp.repeat(scales, GROUP, axis=-1)


def _as_bytes(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint8).reshape(x.shape[0], -1)


def _from_bytes(columns: jax.Array, like: jax.Array) -> jax.Array:
    width = like.dtype.itemsize
    shape = (columns.shape[0], like.shape[1], *([width] if width > 1 else []))
    return lax.bitcast_convert_type(columns.reshape(shape), like.dtype)


def plain_job(size: Size, ranks: int, kind: str, layout: str) -> Exchange:
    """What a JAX model would write by hand.

    Args:
        size: the job.
        ranks: of the axis.
        kind: "all_to_all" both ways (every rank gets every token's row), or "all_gather + psum_scatter".
        layout: "sorted" (rows by expert without gaps), "boxes" (`[e, R, H]`); "" in mode "normal".
    """
    local, rows = size.experts // ranks, ranks * size.tokens
    capacity = local * rows if layout == "boxes" else rows * min(size.top_k, local)

    def everywhere(x):
        if kind == "all_to_all":
            copies = jnp.broadcast_to(x[None], (ranks, *x.shape))
            return lax.all_to_all(copies, AXIS, 0, 0).reshape(rows, *x.shape[1:])
        return lax.all_gather(x, AXIS, axis=0, tiled=True)

    def exchanged(fields):
        packed = [f for f in fields if rows * f.nbytes // f.shape[0] <= MOST_PACKED_BYTES]
        got = everywhere(jnp.concatenate([_as_bytes(f) for f in packed], axis=1))
        found, start = [], 0
        for f in fields:
            if not any(f is p for p in packed):
                found.append(everywhere(f))
                continue
            width = f.shape[1] * f.dtype.itemsize
            found.append(_from_bytes(got[:, start : start + width], f))
            start += width
        return found

    def out(x, ids, weights):
        payload = quantised(x) if size.payload else (x,)
        *payload, weights, ids = exchanged([*payload, weights, ids])
        mine = ids - (lax.axis_index(AXIS) * local).astype(jnp.int32)
        mine = jnp.where((mine >= 0) & (mine < local), mine, -1)
        if size.mode == "normal":
            return (payload[0], None, mine, weights), mine
        # A pair's place among its expert's: how many before it have the same one.
        flat = mine.reshape(-1)
        pair = jnp.arange(flat.size, dtype=jnp.int32)
        same = (flat[:, None] == flat[None]) & (pair[None] < pair[:, None])
        place = jnp.sum(same, axis=1, dtype=jnp.int32)
        of_expert = flat[None] == jnp.arange(local, dtype=jnp.int32)[:, None]
        counts = jnp.sum(of_expert, axis=1, dtype=jnp.int32)
        first = jnp.arange(local, dtype=jnp.int32) * rows
        if layout == "sorted":
            first = jnp.cumsum(counts, dtype=jnp.int32) - counts
        row = jnp.where(flat < 0, capacity, first[jnp.maximum(flat, 0)] + place)
        token = jnp.full(capacity, rows, jnp.int32).at[row].set(pair // size.top_k, mode="drop")
        rows_of = [p.at[token].get(mode="fill", fill_value=0) for p in payload]
        q, scales = (*rows_of, None)[:2]
        return (q, scales, row, flat, counts), (row, weights)

    def back(y, handle):
        if size.mode == "normal":
            sums = jnp.where((handle >= 0).any(1, keepdims=True), y, jnp.bfloat16(0))
        else:
            row, weights = handle
            picked = y.at[row].get(mode="fill", fill_value=0).astype(jnp.float32)
            picked = picked.reshape(rows, size.top_k, size.hidden) * weights[..., None]
            sums = picked.sum(1).astype(jnp.bfloat16)
        if kind != "all_to_all":
            return lax.psum_scatter(sums, AXIS, scatter_dimension=0, tiled=True)
        parts = lax.all_to_all(sums.reshape(ranks, size.tokens, size.hidden), AXIS, 0, 0)
        return parts.astype(jnp.float32).sum(0).astype(jnp.bfloat16)

    def experts(received, handle, scale):
        if size.mode == "normal":
            x, _, mine, weights = received
            each = jnp.where(mine < 0, 0.0, scale[jnp.maximum(mine, 0)])
            return (dequantised(x, None) * (each * weights).sum(1, keepdims=True)).astype(
                jnp.bfloat16
            )
        q, scales, row, flat, _ = received
        of_row = jnp.zeros(capacity, jnp.float32)
        of_row = of_row.at[row].set(scale[jnp.maximum(flat, 0)], mode="drop")
        return (dequantised(q, scales) * of_row[:, None]).astype(jnp.bfloat16)

    shape = (rows if size.mode == "normal" else capacity, size.hidden)
    name = f"plain job, {kind}" + f", {layout}" * bool(layout)
    return Exchange(name, out, back, shape, experts, functools.partial(_ones, size, ranks))


def bare(size: Size, ranks: int, kind: str) -> Exchange:
    """The collectives alone, of the same bytes; of the way back of all_to_all rank 0's part is kept."""
    words = size.row_bytes[0] // 2
    shape = (ranks * size.tokens, size.hidden)

    def out(x, ids, weights):
        del ids, weights
        bits = lax.bitcast_convert_type(x, jnp.uint16)
        rows = jnp.tile(bits, (1, -(-words // size.hidden)))[:, :words]
        if kind == "all_to_all":
            return lax.all_to_all(jnp.broadcast_to(rows, (ranks, *rows.shape)), AXIS, 0, 0), None
        return lax.all_gather(rows, AXIS, axis=0, tiled=True), None

    def back(y, handle):
        del handle
        if kind == "all_to_all":
            return lax.all_to_all(y.reshape(ranks, -1, size.hidden), AXIS, 0, 0)[0]
        return lax.psum_scatter(y, AXIS, scatter_dimension=0, tiled=True)

    def ones(ids, weights):
        del weights
        return np.full((len(ids), 1), 1 if kind == "all_to_all" else ranks, np.float32)

    names = {"all_to_all": "all_to_all twice", "all_gather": "all_gather + psum_scatter"}
    return Exchange(f"bare {names[kind]}", out, back, shape, None, ones)


def nothing(size: Size) -> Exchange:
    """What every step costs without an exchange: the kernel that reads what was received."""

    def back(y, handle):
        del y
        return handle

    def ones(ids, weights):
        del weights
        return np.zeros((len(ids), 0), np.float32)

    def out(x, ids, weights):
        del weights
        return ids, x

    return Exchange("nothing", out, back, (1, size.hidden), None, ones)


# -- which ------------------------------------------------------------------------------------------------


def runs(transport: str, ranks: int, platform: str) -> bool:
    """Whether a transport can run there at all: our kernels between GPUs need two."""
    return transport not in GPU_TRANSPORTS or (platform == "gpu" and ranks > 1)


def every(
    size: Size, ranks: int, platform: str, transports: Sequence[str], packing: bool
) -> Iterator[Exchange]:
    """The most telling ones first. Our kernels are left out where there is no GPU."""
    transports = [t for t in transports if runs(t, ranks, platform)]
    for transport in transports[:1]:
        yield ours(size, ranks, f"ours, {transport}", transport=transport)
    for kind in ("all_to_all", "all_gather"):
        yield bare(size, ranks, kind)
    layouts = ("sorted", "boxes") if size.mode == "low_latency" else ("",)
    kinds = ("all_to_all", "all_gather + psum_scatter")
    for kind in kinds:
        yield plain_job(size, ranks, kind, layouts[0])
    for transport in transports[1:]:
        yield ours(size, ranks, f"ours, {transport}", transport=transport)
    if "all_to_all" in transports and size.mode == "low_latency":
        same = ours(size, ranks, "ours, all_to_all", transport="all_to_all")
        yield gathering(same, gathers=not gathers(size, ranks))
        yield message_kernels(same, ours=not all_to_all.MESSAGE_KERNELS)
    for layout in layouts[1:]:
        for kind in kinds:
            yield plain_job(size, ranks, kind, layout)
    for transport in transports if packing else ():
        if transport == "nvlink":
            continue
        of_x = ranks * size.tokens * size.hidden * (1 if size.payload else 2)
        for name, bound in (("one message", 1 << 62), ("x by itself", of_x - 1)):
            same = ours(size, ranks, "", transport=transport)
            yield packing_up_to(same, f"ours, {transport}, {name}", bound)
