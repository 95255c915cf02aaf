"""Alignment, router, recorder and masked activation in a jitted step, by both clocks, beside XLA. One GPU.

python -m benchmarks.jit_clocks --output ROWS.jsonl

Steps of many calls (`benchmarks.clocks`): of alignments, each one's ids follow from all results of the one
before, as layers depend on each other; so a call's time has the small kernel in it that makes the next ids,
whose own row is "nothing". What the first step gives is held to NumPy first. Each launch (flags of XLA) is a
process of its own.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks import clocks, masked_quant, peers, router  # noqa: E402
from benchmarks.cases import Case, expected  # noqa: E402

CALLS = 58  # layers of DeepSeek-V3
COMPOSITE_CALLS = (
    8  # of a composite of ten kernels and more: what a jit call costs is small beside it
)
CASES = (
    Case(num_pairs=64, num_experts=256, block_size=16),
    Case(num_pairs=1024, num_experts=256, block_size=16),
    Case(num_pairs=8192, num_experts=64, block_size=128, top_k=2),
    Case(num_pairs=32768, num_experts=256, block_size=64),
)
ROUTED = (
    router.Size(1, 256, block_size=16),
    router.Size(64, 256, block_size=16),
    router.Size(64, 256, block_size=64),
    router.Size(8192, 256, block_size=64),
)
MASKED = (masked_quant.SIZES[0], masked_quant.SIZES[1])
QUICK_CASES, QUICK_ROUTED, QUICK_MASKED = CASES[:1], ROUTED[:1], ()


# -- the alignment -----------------------------------------------------------------------------------------


def align_ours(case: Case, implementation: str) -> Callable:
    import moe_align_jax as maj

    def align(ids):
        found = maj.moe_align_block_size(
            ids,
            block_size=case.block_size,
            num_experts=case.num_experts,
            return_inverse=True,
            implementation=implementation,
        )
        return found._asdict()

    return align


def align_argsort(case: Case) -> Callable:
    """The composite that a JAX model writes by hand, with the inverse."""
    import jax.numpy as jnp

    plain = peers.xla_argsort(case)

    def align(ids):
        found = plain(ids)
        rows = jnp.arange(case.capacity, dtype=jnp.int32)
        empty = jnp.zeros(case.num_pairs, jnp.int32)
        inverse = empty.at[found["sorted_token_ids"]].set(rows, mode="drop")
        return found | {"row_of_pair": inverse}

    return align


def following(case: Case, ids: Any, total: Any, row_of_pair: Any) -> Any:
    """The ids of the next call: of arrays of jax or NumPy."""
    return (ids + total % 3 + row_of_pair.reshape(ids.shape) % 2) % case.num_experts


def chain_by_numpy(case: Case, ids: np.ndarray, calls: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """(the ids behind so many calls, the counts of each)."""
    counts = []
    for _ in range(calls):
        want = expected(case, ids)
        counts.append(want.tokens_per_expert)
        ids = following(case, ids, want.num_tokens_post_padded, want.row_of_pair).astype(np.int32)
    return ids, counts


def align_chain(case: Case, align: Callable | None, calls: int) -> Callable:
    """`ids -> (ids, counts of every call)`; without `align` the ids change alone."""

    import jax

    @jax.jit
    def one(ids):
        if align is None:
            return following(case, ids, ids.reshape(-1)[0], ids), None
        found = {name: x for name, x in align(ids).items() if x is not None}
        found = jax.lax.optimization_barrier(found)
        ids = following(case, ids, found["num_tokens_post_padded"][0], found["row_of_pair"])
        return ids + clocks.zero_reading(found), found["tokens_per_expert"]

    def run(ids):
        counts = []
        for _ in range(calls):
            ids, count = one(ids)
            counts.append(count)
        return ids, counts

    return run


def alignment_steps(case: Case, calls: int, composite_calls: int) -> list[clocks.Step]:
    import jax.numpy as jnp

    ids = case.topk_ids(0)
    providers = [
        *[(name, align_ours(case, name), calls) for name in ("mosaic_gpu", "xla")],
        ("xla_argsort", align_argsort(case), composite_calls),
    ]
    steps = []
    for name, align, count in providers:
        want, _ = chain_by_numpy(case, ids, count)

        def check(carry, want=want, name=name):
            np.testing.assert_array_equal(np.asarray(carry), want, f"{case.name} {name}")

        chain = align_chain(case, align, count)
        function = lambda x, chain=chain: chain(x)[0]  # noqa: E731
        steps.append(clocks.Step(name, function, jnp.asarray(ids), (), count, check_first=check))
    chain = align_chain(case, None, calls)
    steps.append(clocks.Step("nothing", lambda x: chain(x)[0], jnp.asarray(ids), (), calls))
    return steps


# -- the router ---------------------------------------------------------------------------------------------


def top_k_by_hand(size: router.Size) -> Callable:
    """What a JAX model writes by hand for renormalised softmax weights."""
    import jax

    def route(logits):
        chosen, ids = jax.lax.top_k(logits, size.top_k)
        return jax.nn.softmax(chosen, axis=-1), ids

    return route


def routers(size: router.Size, implementations: Sequence[str]) -> dict[str, Callable]:
    """What is timed by name: each gives the weights, the ids and, of those that align, `AlignedBlocks`."""
    import moe_align_jax as maj

    sizes: dict[str, Any] = {"top_k": size.top_k, **size.options}
    found: dict[str, Callable] = {"top_k and softmax": top_k_by_hand(size)}
    for name in implementations:

        def alone(logits, name=name):
            return maj.route_topk(logits, **sizes, implementation=name)

        def together(logits, name=name):
            block = {"block_size": size.block_size, "implementation": name}
            return maj.route_and_align(logits, **sizes, **block)

        def apart(logits, name=name):
            weights, ids = maj.route_topk(logits, **sizes, implementation=name)
            aligned = maj.moe_align_block_size(
                ids,
                block_size=size.block_size,
                num_experts=size.experts,
                return_inverse=True,
                implementation=name,
            )
            return weights, ids, aligned

        found |= {f"router, {name}": alone, f"router and alignment, {name}": together}
        found[f"the two apart, {name}"] = apart
    return found


def wrongly_routed(size: router.Size, logits: np.ndarray, found: Sequence[Any]) -> str:
    """What is wrong with a result, or ""."""
    weights, ids, *aligned = found
    weights, ids = np.asarray(weights), np.asarray(ids)
    wrong = router.mismatch(size, logits, None, weights, ids)
    if wrong or not aligned:
        return wrong
    return router.misaligned(size, ids, aligned[0])


def router_steps(
    size: router.Size, implementations: Sequence[str], calls: int, composite_calls: int
) -> list[clocks.Step]:
    """Calls whose logits, all but one as they were, wait for all results of the call before."""
    import jax

    logits = jax.random.normal(jax.random.key(0), (size.tokens, size.experts))
    given = np.asarray(logits)
    provided = {**routers(size, implementations), "nothing": None}
    steps = []
    for name, route in provided.items():

        @jax.jit
        def one(x, route=route):
            found = (x[0, 0],)
            if route is not None:
                found = route(x)
                x, found = jax.lax.optimization_barrier((x, found))
            return x.at[0, 0].add(clocks.zero_reading(found).astype(x.dtype))

        count = calls if name == "nothing" or name.endswith("mosaic_gpu") else composite_calls

        def function(x, one=one, count=count):
            for _ in range(count):
                x = one(x)
            return x

        def check(x):
            np.testing.assert_array_equal(np.asarray(x), given, size.name)

        def check_first(x, route=route, name=name):
            check(x)
            if route is not None and (wrong := wrongly_routed(size, given, jax.jit(route)(logits))):
                raise AssertionError(f"{size.name}, {name}: {wrong}")

        steps.append(clocks.Step(name, function, logits, (), count, check, check_first))
    return steps


# -- the recorder -------------------------------------------------------------------------------------------


def recorder_steps(case: Case, layers: int, implementation: str) -> list[clocks.Step]:
    """A pass through `layers` alignments with counts: alone, recorded, and with a histogram per layer.

    Times are per pass.
    """
    import jax.numpy as jnp

    import moe_align_jax as maj

    ids = case.topk_ids(0)
    last, counts = chain_by_numpy(case, ids, layers)
    chain = align_chain(case, align_ours(case, implementation), layers)

    def load(mode):
        sizes = {"num_layers": layers, "num_physical_experts": case.num_experts, "num_passes": 8}
        return maj.init_expert_load(mode, recording=True, **sizes)

    def recorded(carry):
        state, ids, number = carry
        ids, found = chain(ids)
        state = maj.record_expert_load(state, None, found, forward_pass_id=number)
        return state, ids, number + 1

    def off(carry):
        rows, ids, number = carry
        return rows, chain(ids)[0], number + 1

    def scattered(carry):
        rows, ids, number = carry
        found = []
        for row in rows:
            found.append(row.at[ids.reshape(-1)].add(1))
            ids, _ = align_layer(ids)
        return found, ids, number + 1

    align_layer = align_chain(case, align_ours(case, implementation), 1)

    def check(of_state):
        def first(carry):
            np.testing.assert_array_equal(np.asarray(carry[1]), last, f"recorder {case.name}")
            if of_state is not None:
                got = of_state(carry[0])
                np.testing.assert_array_equal(got, np.stack(counts), f"recorder {case.name}")

        return first

    def last_pass(state):
        return np.asarray(maj.collect_expert_load(state).logical_count[-1])

    zero = jnp.int32(0)
    rows = [jnp.zeros(case.num_experts, jnp.int32) for _ in range(layers)]
    given = [
        ("off", off, (), check(None)),
        ("on", recorded, load("stat"), check(last_pass)),
        ("scatter-add per layer", scattered, rows, check(lambda rows: np.stack(list(map(np.asarray, rows))))),
    ]  # fmt: skip
    return [
        clocks.Step(name, function, (state, jnp.asarray(ids), zero), (), 1, check_first=first)
        for name, function, state, first in given
    ]


# -- the masked activation ----------------------------------------------------------------------------------


def masked_steps(
    size: masked_quant.Size, implementations: Sequence[str], copies: int | None = None
) -> list[clocks.Step]:
    """Calls over inputs that the L2 cache cannot hold, one after the other."""
    import jax

    import moe_align_jax as maj

    inputs = masked_quant.Inputs(size, copies)
    count = 2 * len(inputs.x)
    steps = []
    for implementation in implementations:

        def call(x, m, implementation=implementation):
            return maj.silu_and_mul_masked_quant(x, m, implementation=implementation)

        @jax.jit
        def one(m, x, call=call):
            found = call(x, m)
            m, found = jax.lax.optimization_barrier((m, found))
            return m + clocks.zero_reading(found)

        def function(m, *many, one=one):
            for k in range(count):
                m = one(m, many[k % len(many)])
            return m

        def check(m):
            np.testing.assert_array_equal(np.asarray(m), inputs.masked_m, size.name)

        def check_first(m, call=call):
            check(m)
            run = jax.jit(call)
            if wrong := inputs.wrong([run(x, inputs.m) for x in inputs.x]):
                raise AssertionError(f"{size.name}: {wrong}")

        steps.append(
            clocks.Step(
                implementation, function, inputs.m, tuple(inputs.x), count, check, check_first
            )
        )
    return steps


# -- the command --------------------------------------------------------------------------------------------


def groups(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], list[clocks.Step]]]]:
    """(case, what makes its steps), the most telling ones first."""
    cases = QUICK_CASES if options.quick else CASES
    calls = options.calls or CALLS
    parts = options.parts.split(",")
    for case in cases if "alignment" in parts else ():
        yield case.name, lambda c=case: alignment_steps(c, calls, min(calls, COMPOSITE_CALLS))
    for size in (QUICK_ROUTED if options.quick else ROUTED) * ("router" in parts):
        names = ("mosaic_gpu", "xla") if options.gpu else ("xla",)
        make = lambda s=size, n=names: router_steps(s, n, calls, min(calls, COMPOSITE_CALLS))  # noqa: E731
        yield f"router {size.name}", make
    first = cases[min(1, len(cases) - 1)]
    for implementation in (("mosaic_gpu", "xla")[not options.gpu],) * ("recorder" in parts):
        name = f"pass of {calls} alignments {first.name}, {implementation}"
        yield name, lambda i=implementation: recorder_steps(first, calls, i)
    for size in (QUICK_MASKED if options.quick else MASKED) * ("masked" in parts):
        yield f"masked {size.name}", lambda s=size: masked_steps(s, ("mosaic_gpu", "xla"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    clocks.add_arguments(parser, budget=95, launches="default,no-graphs")
    parser.add_argument("--calls", type=int, help="alignments in a step")
    parser.add_argument("--parts", default="alignment,router,recorder,masked")
    parser.add_argument("--only", default="", help="what a case's name must hold, e.g. 8192x256")
    options = parser.parse_args(argv)
    if options.launch is None:
        given = sys.argv[1:] if argv is None else argv
        return clocks.run_launches("benchmarks.jit_clocks", given, options)
    import jax

    options.gpu = jax.default_backend() == "gpu"
    until, keep, failed = time.monotonic() + options.budget, clocks.keeper(options), False
    repeated = clocks.repetitions(options, (4, 2), options.gpu)
    for name, make in groups(options):
        if options.only not in name:
            continue
        if time.monotonic() > until:
            keep({"case": name, "provider": "all", "note": "left out: no time"})
            continue
        for row in clocks.rows_of(make(), **repeated, until=until):
            failed |= "AssertionError" in row.get("note", "")
            keep({"case": name} | row)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
