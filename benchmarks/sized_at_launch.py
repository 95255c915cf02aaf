"""A program that serves a range of sizes against one compiled for the size: at most 8% slower.

python -m benchmarks.sized_at_launch --out ROWS.jsonl

After `warmup(max_tokens=...)` the sizes of a bucket share a program that is sized at launch. Each bucket is
measured just past the end of the one before, in its middle and at its end, from PyTorch: in CUDA graphs of
many calls over different ids, which take turns and write the same buffers. Checked: both, over poisoned
outputs, against torch's stable sort, itself held to NumPy where that is quick.
"""

import argparse
import functools
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# Both frameworks share one GPU here; by default jax would take most of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks import machine, peers, timing, union  # noqa: E402
from benchmarks.cases import Case  # noqa: E402
from benchmarks.rows import Writer  # noqa: E402
from moe_align_jax._align import tables  # noqa: E402
from moe_align_jax.types import AlignProblem  # noqa: E402

GOAL = 1.08  # times the exact program's
MODELS = ((256, 64), (1000, 16), (9000, 16))  # E, block: of these every bucket
MOST_PAIRS = 131_072
_TURNS, _REPLAYS = 3, 7
_CALLS = (4, 50)  # in one graph: least and most


class Place(NamedTuple):
    """A size, and the bucket that it lies in: (before, end]."""

    case: Case
    before: int
    end: int


def places(ends: Sequence[int], num_experts: int, block_size: int) -> list[Place]:
    """Where each bucket is worst, or may be; `ends` as `problems.bucket_ends` gives them."""
    found, before = [], 0
    for end in ends:
        for n in sorted({before + 1, (before + 1 + end) // 2, end}):
            case = Case(num_pairs=n, num_experts=num_experts, block_size=block_size, top_k=1)
            found.append(Place(case, before, end))
        before = end
    return found


def exact_problem(case: Case, tuning: str) -> AlignProblem:
    """The program of this size alone, with the results of a plain call."""
    sizes = (case.num_pairs, case.num_experts, case.block_size, case.capacity)
    return AlignProblem(*sizes, return_counts=False, tuning=tuning)


def measure(case: Case, exact: Callable[[Any, dict[str, Any]], None]) -> dict[str, Any]:
    """µs per call of both programs. `exact` aligns ids into a dict of tensors."""
    import torch

    generator = torch.Generator("cuda").manual_seed(case.num_pairs)
    options = {"dtype": torch.int32, "device": "cuda", "generator": generator}
    shape, count = (case.num_pairs, 1), union.calls_for(case, _CALLS)
    ids: list[Any] = [torch.randint(0, case.num_experts, shape, **options) for _ in range(count)]
    wrong, want = union.reference_of(case, ids)
    sized = peers.direct_calls(case, ids)
    calls = {
        "exact": [functools.partial(exact, *x) for x in zip(ids, sized.outputs, strict=True)],
        "sized": sized.calls,
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    promises = {"stable": True, "expert_tail": True, "row_tail": True}
    for turn in range(_TURNS):
        for name, many in calls.items():
            sized.poison()
            samples[name] += timing.time_torch_graph(many, replays=_REPLAYS).samples_us
            if turn:
                continue
            for right, got in zip(want, sized.outputs, strict=True):
                found = union.differs(case, right, got, promises)
                wrong = wrong or (found and f"{name}: {found}")
    row = {"grid": "sized_at_launch", "case": case.name, "metric": "graph_us", "calls": count}
    if wrong:
        return {**row, "verified": False, "error": wrong}
    exact_us, sized_us = (statistics.median(samples[name]) for name in calls)
    row |= {"verified": True, "samples": len(samples["sized"]), "ratio": sized_us / exact_us}
    return {**row, "exact_us": round(exact_us, 3), "sized_us": round(sized_us, 3)}


def line(row: dict[str, Any]) -> str:
    """Of the table."""
    low, high = row["bucket"]
    head = f"{row['case']:18} {row['form']:8} {f'{low + 1}..{high}':>16}"
    if not row["verified"]:
        return f"{head}  {row['error']}"
    return f"{head} {row['exact_us']:9.2f} {row['sized_us']:9.2f} {row['ratio']:7.3f}"


def verdict(rows: Sequence[dict[str, Any]], compiled: int) -> str:
    """The worst ratio, whether all keep the goal, and whether a call compiled (`compiled` programs)."""
    timed = [row for row in rows if row["verified"]]
    if not timed:
        return "nothing was measured"
    worst = max(timed, key=lambda row: row["ratio"])
    kept = sum(row["ratio"] <= GOAL for row in timed)
    mean = union.geomean(row["ratio"] for row in timed)
    met = kept == len(rows) and not compiled
    return (
        f"{kept} of {len(rows)} sizes within {GOAL}x of the exact program; the worst {worst['ratio']:.3f}x "
        f"({worst['case']}, {worst['form']}), geometric mean {mean:.3f}x; {compiled} programs compiled "
        f"after warmup: {'met' if met else 'missed'}"
    )


def prepare(index: int, every: Sequence[Place], tuning: str) -> dict[Place, Callable]:
    """Compiles all exact programs, then warms up: what aligns by the exact program of each place."""
    import torch

    import torch_bridge
    from torch_bridge._direct import problems, store

    exact = {place: exact_problem(place.case, tuning) for place in every}
    shared = {
        problems.bucket_problem(
            place.end, place.case.num_experts, place.case.block_size, tuning=tuning
        )
        for place in every
    }
    store.here.prepare(index, [*exact.values(), *shared])  # at once: many processes compile
    for num_experts, block_size in {(p.case.num_experts, p.case.block_size) for p in every}:
        torch_bridge.warmup(
            num_experts=num_experts,
            block_size=block_size,
            max_tokens=max(p.end for p in every if p.case.num_experts == num_experts),
            dtypes=(torch.int32,),
        )

    def align(program: Any, ids: Any, outputs: dict[str, Any]) -> None:
        program.launch(ids.data_ptr(), *[tensor.data_ptr() for tensor in outputs.values()])

    programs = {place: store.here.programs[index, problem] for place, problem in exact.items()}
    return {place: functools.partial(align, program) for place, program in programs.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--most", type=int, default=MOST_PAIRS, help="pairs of the last bucket")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds; a sample then")
    parser.add_argument("--out", metavar="FILE", help="JSONL to append to")
    parser.add_argument("--commit", help="the commit to record, where git is not at hand")
    options = parser.parse_args(argv)
    facts, started = machine.facts(options.commit), time.monotonic()
    if facts["gpu"] is None:
        print("The programs are launched on a GPU: there is none here.")
        return 2
    out = Writer(options.out, facts)
    import torch

    from torch_bridge._direct import problems, store

    index = torch.cuda.current_device()
    tuning = store.here.machine.tuning(torch.device("cuda", index))
    every = [
        place
        for num_experts, block_size in MODELS
        for place in places(
            problems.bucket_ends(options.most, num_experts, block_size, tuning),
            num_experts,
            block_size,
        )
    ]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:  # hundreds of programs that nobody will load
        os.environ["TORCH_BRIDGE_CACHE_DIR"] = folder
        exact = prepare(index, every, tuning)
        print(f"{len(every)} exact programs and the buckets': {time.monotonic() - started:.0f} s")
        loaded = len(store.here.programs)
        random.Random(2026).shuffle(every)  # a budget that ends early leaves a fair sample
        for place in every:
            if time.monotonic() - started > options.budget:
                break
            row = measure(place.case, exact[place])
            form = tables.config_for(exact_problem(place.case, tuning)).form
            rows.append({**facts, **row, "form": form, "bucket": [place.before, place.end]})
        compiled = len(store.here.programs) - loaded
    print(f"{'size':18} {'form':8} {'bucket':>16} {'exact':>9} {'at launch':>9} {'ratio':>7}")
    for row in sorted(rows, key=lambda row: row.get("ratio", math.inf), reverse=True):
        print(line(row))
    if len(rows) < len(every):
        print(f"{len(every) - len(rows)} of {len(every)} sizes were left out: the time was up")
    print(verdict(rows, compiled))
    print(f"{time.monotonic() - started:.0f} s")
    out.write(rows)
    return int(not rows or not all(row["verified"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
