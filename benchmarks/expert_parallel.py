"""dispatch + combine over the GPUs of one host, per transport, beside plain collectives of the same bytes.

python -m benchmarks.expert_parallel --out benchmarks/results/expert_parallel/h200-x2.jsonl

Every transport is first held against the dense sum in NumPy. Then chains of pairs are timed, each
result the next pair's input: "low_latency" sends fp8 and its scales and gets bfloat16 back, "normal" sends
bfloat16 both ways. No expert runs; what a rank hands to combine is an argument, tied to what it has received.
For the ragged transport start it with
XLA_FLAGS=--xla_gpu_unsupported_enable_ragged_all_to_all_decomposer=true.
With --packing the rows are also sent in one message, and x by itself, whatever their size.
"""

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import moe_align_jax as maj  # noqa: E402
from benchmarks import machine, timing  # noqa: E402
from moe_align_jax._cli import traces  # noqa: E402
from moe_align_jax._expert_parallel import message  # noqa: E402

AXIS = "ep"
TRANSPORTS = ("nvlink", "all_to_all", "all_gather", "ragged_all_to_all")
GPU_TRANSPORTS = ("nvlink", "ragged_all_to_all")


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

    def results(self, mesh: jax.sharding.Mesh) -> jax.Array:
        """What the experts of all ranks would hand to combine."""
        rows = mesh.size * self.tokens
        masked = self.mode == "low_latency"
        shape = (self.experts, rows, self.hidden) if masked else (mesh.size * rows, self.hidden)
        return jax.jit(
            lambda: jnp.ones(shape, jnp.bfloat16), out_shardings=NamedSharding(mesh, P(AXIS))
        )()

    def dispatch(self, x, ids, weights, **options) -> maj.Dispatched:
        return maj.dispatch(
            x, ids, weights, axis_name=AXIS, num_experts=self.experts, mode=self.mode,
            max_low_latency_tokens=1 << 20, payload=self.payload, **options,
        )  # fmt: skip


def spread(mesh: jax.sharding.Mesh, body: Callable) -> Callable:
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS)))


# -- correctness --------------------------------------------------------------------------------------


def verify(mesh: jax.sharding.Mesh, size: Size, options: dict[str, Any]) -> float:
    """Error relative to the greatest value of a layer whose expert e multiplies by 1 + e / 64."""
    local = size.experts // mesh.size

    def body(x, ids, weights):
        got = size.dispatch(x, ids, weights, **options)
        rows = got.x.astype(jnp.float32)
        if got.scales is not None:
            rows *= jnp.repeat(got.scales, 128, axis=-1)
        first = lax.axis_index(AXIS) * local
        scale = 1 + (first + jnp.arange(local, dtype=jnp.int32)).astype(jnp.float32) / 64
        if got.masked_m is not None:
            return maj.combine((rows * scale[:, None, None]).astype(jnp.bfloat16), got.handle)
        each = jnp.where(got.topk_ids < 0, 0.0, scale[jnp.maximum(got.topk_ids, 0)])
        share = jnp.sum(each * got.topk_weights, axis=1, keepdims=True)
        return maj.combine((rows * share).astype(jnp.bfloat16), got.handle)

    arguments = size.arguments(mesh, seed=1)
    run = spread(mesh, body)
    got = np.asarray(run(*arguments)).astype(np.float32)
    again = np.asarray(run(*arguments)).astype(np.float32)
    np.testing.assert_array_equal(got, again, f"{size.name} {options}: other bits the second time")
    x, ids, weights = (np.asarray(a).astype(np.float32) for a in arguments)
    want = x * (weights * (1 + ids / 64)).sum(1, keepdims=True)
    error = float(np.abs(got - want).max() / np.abs(want).max())
    limit = 0.07 if size.payload else 0.02
    if not error < limit:
        raise AssertionError(
            f"{size.name} {options}: error {error:.3g}, at most {limit} is allowed"
        )
    return error


# -- programs -------------------------------------------------------------------------------------------


def chain(mesh: jax.sharding.Mesh, one: Callable) -> Callable:
    """`(list of (x, ids, weights, y))` to everything received: each call starts from the one before."""

    def body(given):
        x, received = given[0][0], []
        for _, *rest in given:
            x, kept = one(x, *rest)
            received.append(kept)
        return x, received

    return spread(mesh, body)


def pair(size: Size, *, back: bool = True, **options) -> Callable:
    """dispatch, and combine of rows that are there before (a GEMM would write them)."""

    def one(x, ids, weights, y):
        got = size.dispatch(x, ids, weights, **options)
        kept = (got.x, got.scales, got.masked_m, got.topk_ids, got.topk_weights)
        if not back:
            x, kept = lax.optimization_barrier((x, kept))
            return x, kept
        # What is sent back exists only after what was received.
        y, kept = lax.optimization_barrier((y, kept))
        return maj.combine(y, got.handle), kept

    return one


def packing_up_to(one: Callable, num_bytes: int) -> Callable:
    """The same program, traced with another bound of what is packed into a message."""

    def changed(*arguments):
        bound = message.MAX_PACKED_BYTES
        message.MAX_PACKED_BYTES = num_bytes
        try:
            return one(*arguments)
        finally:
            message.MAX_PACKED_BYTES = bound

    return changed


def plain(size: Size, ranks: int, kind: str) -> Callable:
    """The collectives alone, of the same bytes; the sum over ranks of all_to_all is left out."""
    out_bytes, _ = size.row_bytes
    words = out_bytes // 2

    def one(x, ids, weights, y):
        del ids, weights
        y = y.reshape(-1, size.hidden)[: ranks * size.tokens]
        bits = lax.bitcast_convert_type(x, jnp.uint16)
        rows = jnp.tile(bits, (1, -(-words // size.hidden)))[:, :words]
        if kind == "all_to_all":
            copies = jnp.broadcast_to(rows, (ranks, *rows.shape))
            got = lax.all_to_all(copies, AXIS, 0, 0)
            y, got = lax.optimization_barrier((y, got))
            return lax.all_to_all(y.reshape(ranks, *x.shape), AXIS, 0, 0)[0], got
        got = lax.all_gather(rows, AXIS, axis=0, tiled=True)
        y, got = lax.optimization_barrier((y, got))
        if kind == "all_gather + all_to_all":
            return lax.all_to_all(y.reshape(ranks, *x.shape), AXIS, 0, 0)[0], got
        return lax.psum_scatter(y, AXIS, scatter_dimension=0, tiled=True), got

    return one


def providers(
    size: Size, ranks: int, platform: str, transports: Sequence[str], packing: bool
) -> Iterator[tuple[str, Callable]]:
    """Name and `(x, ids, weights) -> (x, received)`, the most telling ones first."""
    yield "plain all_to_all", plain(size, ranks, "all_to_all")
    for transport in transports:
        if platform != "gpu" and transport in GPU_TRANSPORTS:
            continue
        yield f"ours, {transport}", pair(size, transport=transport)
        if size.mode == "low_latency":
            name = f"ours, {transport}, tails unwritten"
            yield name, pair(size, transport=transport, initialize=False)
        if packing and transport != "nvlink":
            of_x = ranks * size.tokens * size.hidden * (1 if size.payload else 2)
            for name, bound in (("one message", 1 << 62), ("x by itself", of_x - 1)):
                changed = packing_up_to(pair(size, transport=transport), bound)
                yield f"ours, {transport}, {name}", changed
    for kind in ("all_gather + psum_scatter", "all_gather + all_to_all"):
        yield f"plain {kind}", plain(size, ranks, kind)
    yield "ours, all_to_all, dispatch alone", pair(size, back=False, transport="all_to_all")


def measure(
    mesh: jax.sharding.Mesh,
    size: Size,
    executions: int,
    until: float,
    transports: Sequence[str] = TRANSPORTS,
    packing: bool = False,
) -> Iterator[dict[str, Any]]:
    ranks = mesh.size
    platform = "gpu" if mesh.devices.flat[0].platform in ("gpu", "cuda") else "cpu"
    arguments = size.arguments(mesh)
    calls = 2 if platform == "cpu" else 8 if size.tokens <= 512 else 3
    given = [(*arguments, size.results(mesh))] * calls
    out_bytes, back_bytes = size.row_bytes
    ids = np.asarray(arguments[1])
    owner = ids.reshape(ranks, size.tokens, -1) // (size.experts // ranks)
    away = sum(
        int((owner[r] == j).any(1).sum()) for r in range(ranks) for j in range(ranks) if r != j
    )
    for provider, one in providers(size, ranks, platform, transports, packing):
        if time.monotonic() > until:
            yield {"case": size.name, "provider": provider, "note": "left out: no time"}
            return
        start = time.monotonic()
        row = {
            "case": size.name, **size._asdict(), "devices": ranks, "provider": provider,
            "dense_bytes": (ranks - 1) * size.tokens * (out_bytes + back_bytes),
            "useful_bytes": away * (out_bytes + back_bytes) // ranks,
        }  # fmt: skip
        try:
            program = chain(mesh, one)
            found = timing.time_jit_span(program, given, executions=executions)
        except Exception as error:  # one transport that fails must not cost the others
            yield row | {"note": f"failed: {type(error).__name__}: {str(error)[:300]}"}
            continue
        us = found.percentile(50)
        row |= {
            "us": round(us, 2),
            "p20_us": round(found.percentile(20), 2),
            "p80_us": round(found.percentile(80), 2),
            "metric": found.metric,
            "calls": calls,
            "gbps": round(row["dense_bytes"] / us / 1e3, 1),
            "note": found.note,
            "kernels": found.kernels_per_call,
        }
        if platform == "gpu" and provider.startswith("ours"):
            row["top"] = kernel_times(program, given)
        yield row | {"took_s": round(time.monotonic() - start, 1)}


def kernel_times(program: Callable, given: Any, executions: int = 3) -> dict[str, float]:
    """µs per call of the costliest kernels on the first GPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(executions):
                jax.block_until_ready(program(given))
        events = traces.gpu_events(traces.load(traces.newest_xplane(folder)))
    count = executions * len(given)
    return {t.name[:60]: round(t.total_us / count, 2) for t in traces.totals(events)[:8]}


# -- the command ------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", metavar="FILE", help="JSONL to append to")
    parser.add_argument("--cases", default="low_latency:128,normal:4096,low_latency:8,normal:128")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--devices", type=int, help="of those there are; all by default")
    parser.add_argument("--transports", default=",".join(TRANSPORTS))
    parser.add_argument("--packing", action="store_true", help="with and without one message")
    parser.add_argument("--executions", type=int, default=12)
    parser.add_argument(
        "--budget", type=float, default=100, help="seconds, then the rest is left out"
    )
    parser.add_argument("--check-tokens", type=int, default=64, help="tokens per rank of the check")
    parser.add_argument("--commit", help="the commit to record, where git is not at hand")
    options = parser.parse_args(argv)
    until = time.monotonic() + options.budget
    devices = jax.devices()[: options.devices]
    mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    sizes = {"hidden": options.hidden, "experts": options.experts, "top_k": options.top_k}
    transports = options.transports.split(",")
    facts = machine.facts(options.commit) | {"xla_flags": os.environ.get("XLA_FLAGS", "")}
    rows = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        if options.out:
            path = Path(options.out)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(facts | row) + "\n")

    failed = False
    for mode in ("low_latency", "normal"):
        size = Size(mode, options.check_tokens, **sizes)
        for transport in transports:
            for chosen in ({}, {"initialize": False}) if mode == "low_latency" else ({},):
                row = {"case": f"check {size.name}", "provider": f"{transport} {chosen or ''}"}
                try:
                    row["error"] = verify(mesh, size, {"transport": transport} | chosen)
                    print(
                        f"{row['case']:22} {row['provider']:40} error {row['error']:.2e}",
                        flush=True,
                    )
                except NotImplementedError as error:
                    print(f"{row['case']:22} {row['provider']:40} {error}", flush=True)
                    continue
                except Exception as error:
                    failed = True
                    row["note"] = f"FAILED: {type(error).__name__}: {str(error)[:500]}"
                    print(f"{row['case']:22} {row['provider']:40} {row['note']}", flush=True)
                keep(row)
    for case in options.cases.split(","):
        mode, _, tokens = case.partition(":")
        size = Size(mode, int(tokens), **sizes)
        for row in measure(mesh, size, options.executions, until, transports, options.packing):
            keep(row)
            value = f"{row['us']:10.1f} µs {row['gbps']:7.1f} GB/s" if "us" in row else " " * 26
            print(f"{row['case']:18} {row['provider']:42} {value} {row.get('kernels') or ''} "
                  f"{row['note']}", flush=True)  # fmt: skip
            for name, us in row.get("top", {}).items():
                print(f"{'':24} {us:10.2f} {name}", flush=True)
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
