"""Compiles dispatch and combine of "all_to_all" for H200s with XLA itself, without a GPU, and counts kernels.

    python -m tests.no_gpu.exchanges

Two pairs, each of which sends what came back from the one before, as the layers of a decode step do: the
collectives that XLA makes of them (it combines the gathers of a token's fields), and the kernels between.
What tells a rank its number stands once in a program. XLA
launches an exchange on a stream of its own where anything could run beside it, and then each stream waits for
the other: nothing of ours is to be there. The first gather has the rank's number beside it.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.no_gpu import recording, script

PAIRS = 2
TOP_K, HIDDEN, EXPERTS = 8, 7168, 256
# ranks, tokens per rank, payload, whether tokens are gathered as they are (None: as the transport chooses):
# the kernels of a pair. A fusion adds up over more than two ranks.
WANTED = {
    (2, 8, "fp8", None): {"all-gather": 1, "custom-call": 2, "reduce-scatter": 1},
    (2, 32, "fp8", None): {"all-gather": 1, "custom-call": 2, "reduce-scatter": 1},
    (2, 32, None, None): {"all-gather": 1, "custom-call": 2, "reduce-scatter": 1},
    (2, 64, "fp8", None): {"all-gather": 1, "custom-call": 3, "reduce-scatter": 1},
    (2, 128, "fp8", None): {"all-gather": 1, "custom-call": 3, "reduce-scatter": 1},
    (8, 4, "fp8", None): {"all-gather": 1, "custom-call": 2, "all-to-all": 1, "fusion": 1},
    (8, 128, "fp8", None): {"all-gather": 1, "all-to-all": 1, "custom-call": 3, "fusion": 1},
    (2, 8, "fp8", False): {"all-gather": 1, "custom-call": 3, "reduce-scatter": 1},
    (4, 32, "fp8", None): {"all-gather": 1, "all-to-all": 1, "custom-call": 3, "fusion": 1},
    (4, 64, "fp8", None): {"all-gather": 1, "all-to-all": 1, "custom-call": 3, "fusion": 1},
}
# Of a pair besides: what reads the rows that came.
READING = {"fusion": 1}
# Without that. XLA leaves out no kernel of ours, nor an exchange of what they take.
NOTHING_BETWEEN = {sizes: WANTED[sizes] for sizes in ((2, 8, "fp8", None), (2, 8, "fp8", False))}
# Of a program that reads nothing: ids that it hands on as they came.
PASSED_ON = {"copy": 1}
# The two exchanges alone, which pairs are compared with, and what reads the rows and makes the next ones.
BARE = {
    "all_to_all": {"all-to-all": 2, "fusion": 1},
    "all_gather": {"all-gather": 1, "reduce-scatter": 1, "fusion": 1},
}
# Of a program of bare exchanges: what makes the first rows.
FIRST = {"fusion": 1}
# Of a program: a rank's number, and its conversion to int32.
ONCE = {"partition-id": 1, "fusion": 1}


def kernels(text: str) -> Counter:
    """What runs on the GPU, asynchronous collectives as the others."""
    found = Counter(name.removesuffix("-start") for name in recording.kernels(text))
    return Counter({name: n for name, n in found.items() if not name.endswith("-done")})


def times(of_a_pair: Mapping[str, int]) -> Counter:
    """The kernels of all pairs."""
    return Counter({name: PAIRS * count for name, count in of_a_pair.items()})


def differ(wanted: Counter, found: Counter) -> list[str]:
    """What is wrong, if anything is."""
    return [] if found == wanted else [f"{dict(wanted)} are wanted; got {dict(found)}"]


def mesh_of(ranks: int) -> Any:
    """So many GPUs of one host that is not here."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    topology = topologies.get_topology_desc(
        "", platform="cuda", target_config=recording.H200, topology=f"1x1x{ranks}"
    )
    return Mesh(np.array(topology.devices), ("ep",))


def lowered(pairs: Any, ranks: int, tokens: int, *rows: int) -> Any:
    """`pairs(x, ids, weights, y)`, jitted and lowered. `rows`: the shape of a rank's y, but for columns."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = mesh_of(ranks)

    def placed(dtype, first, *shape):
        sharding = NamedSharding(mesh, P("ep"))
        return jax.ShapeDtypeStruct((ranks * first, *shape), dtype, sharding=sharding)

    body = jax.shard_map(pairs, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    shapes = (
        placed(jnp.bfloat16, tokens, HIDDEN),
        placed(jnp.int32, tokens, TOP_K),
        placed(jnp.float32, tokens, TOP_K),
        placed(jnp.bfloat16, *rows, HIDDEN),
    )
    return jax.jit(body, donate_argnums=0).lower(*shapes)


def program(
    ranks: int, tokens: int, payload: str | None, gathers: bool | None, reads: bool = True
) -> Any:
    """Our pairs, lowered. Without `reads` nothing stands between the exchanges of a pair."""
    import jax

    import moe_align_jax as maj
    from benchmarks import clocks
    from moe_align_jax._expert_parallel.transports import all_to_all

    all_to_all.GATHERS = gathers

    def pairs(x, ids, weights, y):
        for _ in range(PAIRS):
            got = maj.dispatch(
                x, ids, weights, axis_name="ep", num_experts=EXPERTS, payload=payload,
                mode="low_latency", initialize=False, transport="all_to_all",
            )  # fmt: skip
            if not reads:
                x, ids, weights = jax.lax.optimization_barrier(
                    (maj.combine(y, got.handle), ids, weights)
                )
                continue
            # What the experts make of it is there once it has come, and is read.
            zero = clocks.zero_reading((got.x, got.scales))
            given = y, ids + zero, weights + zero.astype(weights.dtype)
            y, ids, weights = jax.lax.optimization_barrier(given)
            x = maj.combine(y, got.handle)
        return x, ids

    return lowered(pairs, ranks, tokens, EXPERTS // ranks, ranks * tokens)


def bare(kind: str, ranks: int = 2, tokens: int = 8) -> Any:
    """Pairs of bare exchanges, lowered."""
    import jax

    from benchmarks import clocks, exchanges

    exchange = exchanges.bare(exchanges.Size("low_latency", tokens, HIDDEN), ranks, kind)

    def pairs(x, ids, weights, y):
        for _ in range(PAIRS):
            received, handle = exchange.out(x, ids, weights)
            y, received = jax.lax.optimization_barrier((y, received))
            zero = clocks.zero_reading(received)
            x = exchange.back(y, handle) + zero.astype(x.dtype)
        return x

    return lowered(pairs, ranks, tokens, ranks * tokens)


def timed_slice(ranks: int) -> Any:
    """A step between two readings of the timer, lowered. Its result is a slice of what an exchange gives."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from benchmarks import device_timer

    mesh = mesh_of(ranks)

    def step(x):
        rows = x.reshape(1, -1, HIDDEN).repeat(ranks, 0)
        return jax.lax.all_to_all(rows, "ep", 0, 0)[0]

    x = jax.ShapeDtypeStruct(
        (ranks * 8, HIDDEN), jnp.bfloat16, sharding=NamedSharding(mesh, P("ep"))
    )
    body = jax.shard_map(step, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    return device_timer.jitted(body, x).lower(x)


def check(plugin: str, runtime: str) -> Iterator[script.Report]:
    del runtime
    sys.path.append(str(Path(plugin).parents[2]))  # where jax finds its plugins
    for sizes, of_a_pair in script.one_in_sample(WANTED.items()):
        wanted = times(of_a_pair) + times(READING) + Counter(ONCE)
        text = program(*sizes).compile().as_text()
        found = kernels(text)
        wrong = differ(wanted, found)
        beside = sum(name.endswith("-start") for name in recording.kernels(text))
        if beside > 1:
            wrong.append(f"{beside} exchanges run beside other work, each on a stream of its own")
        yield (
            f"{found.total()} kernels  {PAIRS} exchanges, (ranks, tokens, payload, gathered) {sizes}",
            wrong,
        )
    for sizes, of_a_pair in script.one_in_sample(NOTHING_BETWEEN.items()):
        found = kernels(program(*sizes, reads=False).compile().as_text())
        wanted = times(of_a_pair) + Counter(PASSED_ON) + Counter(ONCE)
        yield f"{found.total()} kernels  {PAIRS} exchanges, nothing between", differ(wanted, found)
    for kind, of_a_pair in script.one_in_sample(BARE.items()):
        found = kernels(bare(kind).compile().as_text())
        wanted = times(of_a_pair) + Counter(FIRST)
        yield f"{found.total()} kernels  {PAIRS} bare exchanges, {kind}", differ(wanted, found)
    text = timed_slice(2).compile().as_text()
    stamps = recording.kernels(text).count("custom-call")
    wrong = [] if stamps == 2 else [f"two readings of the timer are wanted; got {stamps}"]
    yield "the timer around a step that keeps a slice", wrong


if __name__ == "__main__":
    sys.exit(script.main("tests.no_gpu.exchanges", check))
