"""dispatch + combine over the GPUs of one host, per transport, beside plain collectives, by each clock.

python -m benchmarks.expert_parallel --output ROWS.jsonl

Everything that does the job is first held against the dense sum in NumPy. Then jitted steps are timed
(`benchmarks.clocks`): a chain of pairs, each result the next pair's input. "low_latency" sends fp8 and its
scales and gets bfloat16 back, "normal" sends bfloat16 both ways. No expert runs; what a rank hands to combine
is an argument, tied to what it has received. Beside our transports stand

- "plain job": the same job in jax.numpy on plain collectives: quantise, exchange, lay out; weight, exchange,
  add up. Rows are laid out by expert without gaps (as `ragged_dot` takes them), or in the masked layout's
  boxes;
- "bare": the two exchanges of the same dense bytes and nothing else; "read between" with the kernel that the
  others have between the two, which reads what was received and makes the next pair's ids and weights;
- "nothing": what every step has beside, the small kernel that reads an element of what was received.

Each launch (flags of XLA) is a process of its own, or with `--processes 2` a process for each of two GPUs.
Ragged: `--transports ragged_all_to_all --launches ragged-decomposed`. With --packing our rows are also sent
in one message, and x by itself, whatever the size.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import moe_align_jax as maj  # noqa: E402
from benchmarks import clocks, exchanges, processes  # noqa: E402
from benchmarks.exchanges import AXIS, Exchange, Size, placed, whole  # noqa: E402


def spread(mesh: jax.sharding.Mesh, body: Callable) -> Callable:
    return jax.shard_map(body, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))


# -- correctness ------------------------------------------------------------------------------------------


def check_program(
    mesh: jax.sharding.Mesh, size: Size, exchange: Exchange
) -> tuple[Any, tuple, Callable[[Any], float]]:
    """(a jitted function, its arguments, what tells its result's error or raises AssertionError).

    It is a layer whose expert e multiplies by 1 + e / 64; of bare exchanges, every row that is received, and
    every one that comes back.
    """
    arguments = size.arguments(mesh, seed=1)
    values = size.values(mesh.size, seed=1)
    if exchange.experts is None:
        return _check_bare(mesh, size, exchange, arguments, values)
    local, experts = size.experts // mesh.size, exchange.experts

    def body(x, ids, weights):
        received, handle = exchange.out(x, ids, weights)
        first = lax.axis_index(AXIS) * local
        scale = 1 + (first + jnp.arange(local, dtype=jnp.int32)).astype(jnp.float32) / 64
        return exchange.back(experts(received, handle, scale), handle)

    def error(result):
        x, ids, weights = (a.astype(np.float32) for a in values)
        want = x * (weights * (1 + ids / 64)).sum(1, keepdims=True)
        got = whole(result).astype(np.float32)
        return _within(got, want, 0.07 if size.payload else 0.02, f"{size.name} {exchange.name}")

    return jax.jit(spread(mesh, body)), arguments, error


def _check_bare(mesh, size: Size, exchange: Exchange, arguments, values):
    ranks, y = mesh.size, np.random.default_rng(2).normal(size=(mesh.size, *exchange.rows))
    y = y.astype(jnp.bfloat16).reshape(-1, size.hidden)

    def body(x, ids, weights, y):
        received, handle = exchange.out(x, ids, weights)
        return received.reshape(ranks * size.tokens, -1), exchange.back(y, handle)

    def error(result):
        received, got = (whole(a) for a in result)
        bits = values[0].view(np.uint16)
        words = size.row_bytes[0] // 2
        rows = np.concatenate([bits] * -(-words // size.hidden), axis=1)[:, :words]
        what = f"{size.name} {exchange.name}"
        np.testing.assert_array_equal(received, np.tile(rows, (ranks, 1)), what)
        parts = y.astype(np.float32).reshape(ranks, -1, size.hidden)
        want = parts[0] if "all_to_all" in exchange.name else parts.sum(0)
        return _within(got.astype(np.float32), want, 0.02, what)

    return jax.jit(spread(mesh, body)), (*arguments, placed(mesh, y)), error


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
                    whole(one).view(np.uint8), whole(other).view(np.uint8), "other bits"
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
    every = exchanges.every(size, mesh.size, _platform(mesh), transports, options.packing)
    return [exchange for exchange in every if exchange.name.startswith(beginnings)]


def step(
    mesh: jax.sharding.Mesh,
    size: Size,
    exchange: Exchange,
    calls: int,
    reads: bool = True,
    between: bool = False,
) -> clocks.Step:
    """`((x, ids, weights), y) -> (x, ids, weights)` through a chain of pairs, each of which sends what came
    back from the one before. An element of everything received is read, as the experts would read it, ahead
    of what is sent back; between bare exchanges nothing needs to stand, and XLA reads it when it likes. Ids
    and weights are those of the pair before with a zero added that comes of the reading: as a layer's router
    gives them, no pair's have travelled with those of another.

    No operation is left that could run beside an exchange, as none is in a layer. Beside one XLA would launch
    the exchange on a stream of its own, and have each stream wait for the other.

    Without `reads` nothing stands between the exchanges of a pair that does the job, as nothing need between
    bare ones: for kernels of ours, of which XLA leaves out none, read or not. Ids and weights are then those
    of the pair before, behind its result.

    With `between` the rows of a bare pair, too, are read ahead of its way back, by the kernel that stands
    there in pairs that do the job: like is compared with like.
    """
    stands_between = between or exchange.experts is not None

    @jax.jit  # traced and lowered once, not once per pair
    def pair(x, ids, weights, y):
        received, handle = exchange.out(x, ids, weights)
        if not reads:
            return lax.optimization_barrier((exchange.back(y, handle), ids, weights))
        if not stands_between:
            y, received = lax.optimization_barrier((y, received))
        zero = clocks.zero_reading(received)
        ids, weights = ids + zero, weights + zero.astype(weights.dtype)
        if stands_between:
            y, ids, weights = lax.optimization_barrier((y, ids, weights))
        return exchange.back(y, handle), ids, weights

    def body(carry, y):
        for _ in range(calls):
            carry = pair(*carry, y)
        return carry

    carry = size.arguments(mesh)
    shape = (mesh.size * exchange.rows[0], *exchange.rows[1:])
    sharding = NamedSharding(mesh, P(AXIS))
    y = jax.jit(lambda: jnp.ones(shape, jnp.bfloat16), out_shardings=sharding)()
    before, chosen, shares = size.values(mesh.size)
    want = exchange.ones(chosen, shares)
    # "nothing" hands x on as it was.
    want = np.broadcast_to(want, before.shape) if want.size else before.astype(np.float32)

    def check(carry):
        what = f"{size.name} {exchange.name}, after its steps"
        _within(whole(carry[0]).astype(np.float32), want, 0.02, what)
        np.testing.assert_array_equal(whole(carry[1]), chosen, what)
        np.testing.assert_array_equal(whole(carry[2]), shares, what)

    name = exchange.name
    if between or not reads:
        name += ", read between" if between else ", nothing between"
    return clocks.Step(name, spread(mesh, body), carry, (y,), calls, check)


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
    chosen = [*wanted(mesh, size, options), exchanges.nothing(size)]
    steps = [step(mesh, size, exchange, calls) for exchange in chosen]
    bare = [exchange for exchange in chosen if exchange.name.startswith("bare")]
    steps += [step(mesh, size, exchange, calls, between=True) for exchange in bare]
    if options.nothing_between and platform == "gpu" and size.mode == "low_latency":
        kernels = ("ours, nvlink_window", "ours, all_to_all", "ours, all_to_all, packed")
        alone = [e for e in chosen if e.name.removesuffix(", gathered") in kernels]
        steps += [step(mesh, size, exchange, calls, reads=False) for exchange in alone]
    out_bytes, back_bytes = size.row_bytes
    _, ids, _ = size.values(ranks)
    owner = ids.reshape(ranks, size.tokens, -1) // (size.experts // ranks)
    away = sum(
        int((owner[r] == j).any(1).sum()) for r in range(ranks) for j in range(ranks) if r != j
    )
    shared = {
        "case": size.name, **size._asdict(), "devices": ranks,
        "dense_bytes": (ranks - 1) * size.tokens * (out_bytes + back_bytes),
        "useful_bytes": away * (out_bytes + back_bytes) // ranks,
    }  # fmt: skip
    repeated = clocks.repetitions(options, (4, 2), platform == "gpu")
    for row in clocks.rows_of(steps, **repeated, until=until):
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
    parser.add_argument("--transports", default=",".join(exchanges.TRANSPORTS))
    parser.add_argument(
        "--providers", default="", help='by how their names begin: "ours, nvlink;bare"'
    )
    parser.add_argument("--packing", action="store_true", help="with and without one message")
    parser.add_argument(
        "--nothing-between",
        action="store_true",
        help="pairs of our kernels also without the small kernel that reads what came",
    )
    parser.add_argument("--calls", type=int, help="pairs in a step")
    parser.add_argument("--check-tokens", type=int, default=64, help="tokens per rank of the check")
    processes.add_arguments(parser)
    options = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    if options.launch is None:
        return clocks.run_launches("benchmarks.expert_parallel", given, options)
    until = time.monotonic() + options.budget
    if options.processes > 1:
        if options.process is None:
            return processes.run("benchmarks.expert_parallel", given, options.processes)
        processes.join(options)
        until = math.inf  # each would leave out other steps than the others do
    devices = jax.devices()[: options.devices]
    mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    if options.processes > 1 and (reason := maj.connect_windows(mesh)):
        print(f"no windows: {reason}", flush=True)
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
