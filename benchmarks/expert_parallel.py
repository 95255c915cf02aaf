"""dispatch + combine over the GPUs of one host, per transport, beside plain collectives, by both clocks.

python -m benchmarks.expert_parallel --output benchmarks/results/expert_parallel/h200-x2-clocks.jsonl

Everything that does the job is first held against the dense sum in NumPy. Then jitted steps are timed
(`benchmarks.clocks`): a chain of pairs, each result the next pair's input. "low_latency" sends fp8 and its
scales and gets bfloat16 back, "normal" sends bfloat16 both ways. No expert runs; what a rank hands to combine
is an argument, tied to what it has received. Beside our transports stand

- "plain job": the same job in jax.numpy on plain collectives: quantise, exchange, lay out; weight, exchange,
  add up. Rows are laid out by expert without gaps (as `ragged_dot` takes them), or in the masked layout's
  boxes;
- "bare": the two exchanges of the same dense bytes and nothing else;
- "nothing": what every step has beside, the small kernel that reads an element of what was received.

Each launch (flags of XLA) is a process of its own. Ragged: `--transports ragged_all_to_all --launches
ragged-decomposed`. With --packing our rows are also sent in one message, and x by itself, whatever the size.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import moe_align_jax as maj  # noqa: E402
from benchmarks import clocks  # noqa: E402
from moe_align_jax._expert_parallel import message  # noqa: E402

AXIS = "ep"
TRANSPORTS = ("nvlink", "all_to_all", "all_gather")
GPU_TRANSPORTS = ("nvlink", "ragged_all_to_all")
GROUP, E4M3_MAX, FLOOR = 128, 448.0, 1e-4  # of the fp8 payload, as DeepEP quantises
# A message of which a rank receives more is not packed: x travels by itself.
MOST_PACKED_BYTES = 16 << 20


class Size(NamedTuple):
    """One exchange: T tokens per rank."""

    mode: str
    tokens: int
    hidden: int = 7168
    top_k: int = 8
    experts: int = 256

    @property
    def payload(self) -> str | None:
        return "fp8" if self.mode == "low_latency" else None

    @property
    def name(self) -> str:
        return f"{self.mode} {self.tokens}"

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Of a token: out (payload, scales, ids, weights), and back."""
        out = self.hidden + self.hidden // 32 if self.payload else 2 * self.hidden
        return out + 8 * self.top_k, 2 * self.hidden

    def arguments(self, mesh: jax.sharding.Mesh, seed: int = 0) -> tuple[jax.Array, ...]:
        """x, ids and weights of all ranks; no expert twice in a token."""
        rng = np.random.default_rng(seed)
        total = self.tokens * mesh.size
        x = rng.standard_normal((total, self.hidden), np.float32)
        score = rng.random((total, self.experts), np.float32)
        ids = np.argpartition(score, self.top_k, axis=1)[:, : self.top_k].astype(np.int32)
        weights = rng.random((total, self.top_k), np.float32)
        sharding = NamedSharding(mesh, P(AXIS))
        place = functools.partial(jax.device_put, device=sharding)
        return place(x.astype(jnp.bfloat16)), place(ids), place(weights)

    def dispatch(self, x, ids, weights, **options) -> maj.Dispatched:
        return maj.dispatch(
            x, ids, weights, axis_name=AXIS, num_experts=self.experts, mode=self.mode,
            max_low_latency_tokens=1 << 20, payload=self.payload, **options,
        )  # fmt: skip


def spread(mesh: jax.sharding.Mesh, body: Callable) -> Callable:
    return jax.shard_map(body, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))


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

    def changed(function):
        def run(*arguments):
            bound = message.MAX_PACKED_BYTES
            message.MAX_PACKED_BYTES = num_bytes
            try:
                return function(*arguments)
            finally:
                message.MAX_PACKED_BYTES = bound

        return run

    out, back = changed(exchange.out), changed(exchange.back)
    return exchange._replace(name=name, out=out, back=back)


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
        q, scales = (p.at[token].get(mode="fill", fill_value=0) for p in payload)
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


def exchanges(
    size: Size, ranks: int, platform: str, transports: Sequence[str], packing: bool
) -> Iterator[Exchange]:
    """The most telling ones first. Our kernels are left out where there is no GPU."""
    transports = [t for t in transports if platform == "gpu" or t not in GPU_TRANSPORTS]
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


# -- correctness ------------------------------------------------------------------------------------------


def check_program(
    mesh: jax.sharding.Mesh, size: Size, exchange: Exchange
) -> tuple[Any, tuple, Callable[[Any], float]]:
    """(a jitted function, its arguments, what tells its result's error or raises AssertionError).

    It is a layer whose expert e multiplies by 1 + e / 64; of bare exchanges, every row that is received, and
    every one that comes back.
    """
    arguments = size.arguments(mesh, seed=1)
    if exchange.experts is None:
        return _check_bare(mesh, size, exchange, arguments)
    local, experts = size.experts // mesh.size, exchange.experts

    def body(x, ids, weights):
        received, handle = exchange.out(x, ids, weights)
        first = lax.axis_index(AXIS) * local
        scale = 1 + (first + jnp.arange(local, dtype=jnp.int32)).astype(jnp.float32) / 64
        return exchange.back(experts(received, handle, scale), handle)

    def error(result):
        x, ids, weights = (np.asarray(a).astype(np.float32) for a in arguments)
        want = x * (weights * (1 + ids / 64)).sum(1, keepdims=True)
        got = np.asarray(result).astype(np.float32)
        return _within(got, want, 0.07 if size.payload else 0.02, f"{size.name} {exchange.name}")

    return jax.jit(spread(mesh, body)), arguments, error


def _check_bare(mesh, size: Size, exchange: Exchange, arguments):
    ranks, y = mesh.size, np.random.default_rng(2).normal(size=(mesh.size, *exchange.rows))
    y = jnp.asarray(y, jnp.bfloat16).reshape(-1, size.hidden)
    y = jax.device_put(y, NamedSharding(mesh, P(AXIS)))

    def body(x, ids, weights, y):
        received, handle = exchange.out(x, ids, weights)
        return received.reshape(ranks * size.tokens, -1), exchange.back(y, handle)

    def error(result):
        received, got = (np.asarray(a) for a in result)
        bits = np.asarray(arguments[0]).view(np.uint16)
        words = size.row_bytes[0] // 2
        rows = np.concatenate([bits] * -(-words // size.hidden), axis=1)[:, :words]
        what = f"{size.name} {exchange.name}"
        np.testing.assert_array_equal(received, np.tile(rows, (ranks, 1)), what)
        parts = np.asarray(y).astype(np.float32).reshape(ranks, -1, size.hidden)
        want = parts[0] if "all_to_all" in exchange.name else parts.sum(0)
        return _within(got.astype(np.float32), want, 0.02, what)

    return jax.jit(spread(mesh, body)), (*arguments, y), error


def verify(
    mesh: jax.sharding.Mesh, size: Size, chosen: Sequence[Exchange]
) -> Iterator[dict[str, Any]]:
    """A row for each: its error, or a note why there is none. Every program runs twice, for the same bits."""
    programs = [check_program(mesh, size, exchange) for exchange in chosen]
    failed = clocks.compile_together([(jitted, given) for jitted, given, _ in programs])
    for exchange, (jitted, given, error), failure in zip(chosen, programs, failed, strict=True):
        row: dict[str, Any] = {"case": f"check {size.name}", "provider": exchange.name}
        try:
            if failure is not None:
                raise failure
            results = [jax.tree.leaves(jitted(*given)) for _ in range(2)]
            for one, other in zip(*results, strict=True):
                np.testing.assert_array_equal(
                    np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8), "other bits"
                )
            row["error"] = error(jitted(*given))
            yield row | {"note": f"right, error {row['error']:.2e}"}
        except NotImplementedError as cannot:
            yield row | {"note": f"does not run here: {cannot}"}
        except Exception as wrong:
            yield row | {"note": f"WRONG: {type(wrong).__name__}: {str(wrong)[:500]}"}


def _within(got: np.ndarray, want: np.ndarray, limit: float, what: str) -> float:
    error = float(np.abs(got - want).max() / np.abs(want).max())
    if not error < limit:
        raise AssertionError(f"{what}: error {error:.3g}, at most {limit} is allowed")
    return error


# -- steps ------------------------------------------------------------------------------------------------


def wanted(mesh: jax.sharding.Mesh, size: Size, options: argparse.Namespace) -> list[Exchange]:
    """Those that the options ask for: whose name begins with one of `--providers`."""
    transports, beginnings = options.transports.split(","), tuple(options.providers.split(";"))
    every = exchanges(size, mesh.size, _platform(mesh), transports, options.packing)
    return [exchange for exchange in every if exchange.name.startswith(beginnings)]


def step(mesh: jax.sharding.Mesh, size: Size, exchange: Exchange, calls: int) -> clocks.Step:
    """`((x, ids), weights, y) -> (x, ids)` through a chain of pairs: what is sent back exists only after what
    was received, and each pair sends what came back from the one before. An element of everything received is
    read, as the experts would read it."""

    @jax.jit  # traced and lowered once, not once per pair
    def pair(x, ids, weights, y):
        received, handle = exchange.out(x, ids, weights)
        y, received = lax.optimization_barrier((y, received))
        return exchange.back(y, handle), ids + clocks.zero_reading(received)

    def body(carry, weights, y):
        x, ids = carry
        for _ in range(calls):
            x, ids = pair(x, ids, weights, y)
        return x, ids

    x, ids, weights = size.arguments(mesh)
    shape = (mesh.size * exchange.rows[0], *exchange.rows[1:])
    sharding = NamedSharding(mesh, P(AXIS))
    y = jax.jit(lambda: jnp.ones(shape, jnp.bfloat16), out_shardings=sharding)()
    want = exchange.ones(np.asarray(ids), np.asarray(weights))
    # "nothing" hands x on as it was.
    want = np.broadcast_to(want, x.shape) if want.size else np.asarray(x).astype(np.float32)

    def check(carry):
        what = f"{size.name} {exchange.name}, after its steps"
        _within(np.asarray(carry[0]).astype(np.float32), want, 0.02, what)
        np.testing.assert_array_equal(np.asarray(carry[1]), np.asarray(ids), what)

    function = spread(mesh, body)
    return clocks.Step(exchange.name, function, (x, ids), (weights, y), calls, check)


def calls_of(size: Size, platform: str, quick: bool) -> int:
    """Pairs in a step: so many that what a jit call costs by itself is small beside them."""
    if platform != "gpu":
        return 2
    return (8 if quick else 40) if size.tokens <= 512 else (4 if quick else 8)


def measure(
    mesh: jax.sharding.Mesh, size: Size, options: argparse.Namespace, until: float
) -> Iterator[dict[str, Any]]:
    ranks, platform = mesh.size, _platform(mesh)
    calls = options.calls or calls_of(size, platform, options.quick)
    chosen = [*wanted(mesh, size, options), nothing(size)]
    steps = [step(mesh, size, exchange, calls) for exchange in chosen]
    out_bytes, back_bytes = size.row_bytes
    ids = np.asarray(size.arguments(mesh)[1])
    owner = ids.reshape(ranks, size.tokens, -1) // (size.experts // ranks)
    away = sum(
        int((owner[r] == j).any(1).sum()) for r in range(ranks) for j in range(ranks) if r != j
    )
    shared = {
        "case": size.name, **size._asdict(), "devices": ranks,
        "dense_bytes": (ranks - 1) * size.tokens * (out_bytes + back_bytes),
        "useful_bytes": away * (out_bytes + back_bytes) // ranks,
    }  # fmt: skip
    executions, rounds = (4, 2) if options.quick or platform != "gpu" else (20, 5)
    for row in clocks.rows_of(steps, executions=executions, rounds=rounds, until=until):
        yield shared | row


def _platform(mesh: jax.sharding.Mesh) -> str:
    return "gpu" if mesh.devices.flat[0].platform in ("gpu", "cuda") else "cpu"


# -- the command ------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    clocks.add_arguments(parser, budget=185)
    parser.add_argument("--cases", default="low_latency:8,low_latency:128,normal:4096")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--devices", type=int, help="of those there are; all by default")
    parser.add_argument("--transports", default=",".join(TRANSPORTS))
    parser.add_argument(
        "--providers", default="", help='by how their names begin: "ours, nvlink;bare"'
    )
    parser.add_argument("--packing", action="store_true", help="with and without one message")
    parser.add_argument("--calls", type=int, help="pairs in a step")
    parser.add_argument("--check-tokens", type=int, default=64, help="tokens per rank of the check")
    options = parser.parse_args(argv)
    if options.launch is None:
        given = sys.argv[1:] if argv is None else argv
        return clocks.run_launches("benchmarks.expert_parallel", given, options)
    until = time.monotonic() + options.budget
    devices = jax.devices()[: options.devices]
    mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    sizes = {"hidden": options.hidden, "experts": options.experts, "top_k": options.top_k}
    keep = clocks.keeper(options)
    failed = False
    # The flags of a launch change no value: one launch holds a layer to NumPy, every one what its steps give.
    first = options.launch == options.launches.split(",")[0]
    for mode in ("low_latency", "normal") if first else ():
        size = Size(mode, options.check_tokens, **sizes)
        for row in verify(mesh, size, wanted(mesh, size, options)):
            failed |= row["note"].startswith("WRONG")
            keep(row)
    for case in options.cases.split(","):
        mode, _, tokens = case.partition(":")
        for row in measure(mesh, Size(mode, int(tokens), **sizes), options, until):
            failed |= "AssertionError" in row.get("note", "")
            keep(row)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
