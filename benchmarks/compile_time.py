"""Compile time of each form, step by step, each program new to the process.

python -m benchmarks.compile_time --out ROWS.jsonl

jax's compilation cache is off. "mosaic_gpu" is a jit with one call: tracing and lowering, compiling (Mosaic
and ptxas), the first run. "torch_bridge" is a program that is sized at launch, in the process that compiles
for PyTorch: tracing and lowering, Mosaic's compiler, assembling by the driver, the self-test on the GPU. The
first program of a process also pays for what every compiler loads once: under jit a row of its own.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks import machine
from benchmarks.cases import Case
from benchmarks.rows import Writer
from moe_align_jax._align import tables
from moe_align_jax._align.primitive import AnyAlignProblem, align
from moe_align_jax._core import checks
from moe_align_jax._lowering import select
from moe_align_jax.types import AlignProblem, BatchedAlignProblem

GOAL_S = 0.5
# The steps of a program, in order; a total is over those that were measured.
STEPS = ("lower_s", "compile_s", "first_run_s", "assemble_s", "self_test_s")
# Sizes whose forms differ, in the tables that there are; with options the largest program of each form.
CASES = tuple(
    Case(num_pairs=n, num_experts=num_experts, block_size=block, with_options=options)
    for n, num_experts, block in (
        *((32, 256, 16), (64, 9000, 16), (512, 256, 16), (512, 9000, 16), (2048, 128, 64)),
        *((8192, 64, 128), (8192, 65_535, 16), (32_768, 256, 64), (32_768, 65_535, 16)),
        (524_288, 256, 128),
    )
    for options in (False, True)
)
BATCHED = ((256, 512, 64),)  # E, the most tokens of an expert, block

type Steps = dict[str, float]


class Measured(NamedTuple):
    """A row's program: under jit, and as PyTorch has it."""

    name: str
    jit: AnyAlignProblem
    direct: AnyAlignProblem


def programs(tuning: str) -> list[Measured]:
    found = [
        Measured(c.name, problem_of(c, tuning), problem_of(c, tuning, sized_at_launch=True))
        for c in CASES
    ]
    for sizes in BATCHED:
        problem = BatchedAlignProblem(*sizes, tuning=tuning)
        found.append(Measured(f"batched {'x'.join(map(str, sizes))}", problem, problem))
    return found


def problem_of(case: Case, tuning: str, *, sized_at_launch: bool = False) -> AlignProblem:
    size = (case.num_pairs, case.num_experts, case.block_size)
    n = tables.size_bucket(*size, tuning) if sized_at_launch else case.num_pairs
    rows = checks.capacity(
        n, block_size=case.block_size, num_experts=case.num_experts, pad_sorted_ids=False
    )
    return AlignProblem(
        n,
        case.num_experts,
        case.block_size,
        rows,
        expert_map="filter" * case.with_options,
        has_num_valid_pairs=case.with_options,
        return_inverse=case.with_options,
        return_counts=not sized_at_launch or case.with_options,
        sized_at_launch=sized_at_launch,
        tuning=tuning,
    )


def another(problem: AnyAlignProblem, k: int) -> AnyAlignProblem:
    """The same with k pairs, or tokens of an expert, fewer: neither jax nor Mosaic has seen its program."""
    if isinstance(problem, BatchedAlignProblem):
        return problem._replace(max_tokens_per_batch=problem.max_tokens_per_batch - k)
    return problem._replace(num_pairs=problem.num_pairs - k)


def steps_of(problem: AnyAlignProblem, *, compile_too: bool) -> Steps:
    """Seconds of each step of one new program under jit."""
    import jax
    import numpy as np

    jax.clear_caches()
    operands = [np.zeros(shape, np.int32) for shape in problem.inputs.values()]
    program = jax.jit(lambda *x: align(problem, "mosaic_gpu", *x))
    times = [time.perf_counter()]
    lowered = program.trace(*operands).lower(lowering_platforms=("cuda",))
    times.append(time.perf_counter())
    if compile_too:
        compiled = lowered.compile()
        times.append(time.perf_counter())
        jax.block_until_ready(compiled(*operands))  # XLA may compile a kernel when it first runs
        times.append(time.perf_counter())
    taken = (end - begin for begin, end in itertools.pairwise(times))
    return dict(zip(STEPS, taken, strict=False))


def row_of(name: str, provider: str, form: str, runs: Sequence[Steps]) -> dict[str, Any]:
    """The medians of each step, and of the total where anything was compiled."""
    row: dict[str, Any] = {"case": name, "provider": provider, "form": form}
    row |= {"metric": "compile_s", "samples": len(runs)}
    for step in STEPS:
        if step in runs[0]:
            row[step] = round(statistics.median(run[step] for run in runs), 4)
    if "compile_s" in runs[0]:
        row["total_s"] = round(statistics.median(sum(run.values()) for run in runs), 4)
    return row


def jit_rows(measured: Sequence[Measured], repeats: int, *, on_gpu: bool) -> list[dict[str, Any]]:
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    rows = []
    for index, one in enumerate(measured):
        form, runs = tables.config_for(one.jit).form, []
        for k in range(repeats + (index == 0)):
            run = steps_of(another(one.jit, k), compile_too=on_gpu)
            if index == 0 and k == 0:
                rows.append(row_of(one.name, "mosaic_gpu, first", form, [run]))
            else:
                runs.append(run)
        rows.append(row_of(one.name, "mosaic_gpu", form, runs))
    return rows


def direct_rows(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The same for PyTorch, by the process that compiles for it; the whole process in the first row."""
    problems = [one.direct for one in measured]
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "device": 0,
            "folder": folder,
            "problems": [[type(p).__name__, p._asdict()] for p in problems],
        }
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(machine.ROOT / "torch_bridge" / "_direct" / "compile_worker.py")],
            input=json.dumps(request),
            capture_output=True,
            text=True,
        )
        whole = time.perf_counter() - start
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise RuntimeError(f"torch_bridge/_direct/compile_worker.py: {answer['error']}")
    rows = []
    for one, program in zip(measured, answer["programs"], strict=True):
        form = tables.config_for(one.direct).form
        if "error" in program:
            row = {"case": one.name, "provider": "torch_bridge", "form": form}
            rows.append({**row, "metric": "compile_s", "samples": 1, "error": program["error"]})
            continue
        steps = {f"{step}_s": seconds for step, seconds in program["seconds"].items()}
        rows.append(row_of(one.name, "torch_bridge", form, [steps]))
    first = {"case": "all of these", "provider": "torch_bridge, process", "form": "all"}
    return [{**first, "metric": "compile_s", "samples": 1, "total_s": round(whole, 3)}, *rows]


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Whether every program keeps the goal, and the slowest."""
    ordinary = [r for r in rows if "total_s" in r and "," not in r["provider"]]
    if not ordinary:
        return "nothing was compiled here"
    slowest = max(ordinary, key=lambda r: r["total_s"])
    over = sum(r["total_s"] > GOAL_S for r in ordinary)
    return (
        f"{len(ordinary) - over} of {len(ordinary)} programs within {GOAL_S} s; the slowest takes "
        f"{slowest['total_s']:.2f} s ({slowest['case']}, {slowest['form']}, {slowest['provider']})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="new programs per case")
    parser.add_argument("--out", metavar="FILE", help="JSONL to append to")
    parser.add_argument(
        "--no-direct", action="store_true", help="leave out the programs for PyTorch"
    )
    parser.add_argument("--commit", help="the commit to record, where git is not at hand")
    options = parser.parse_args(argv)
    facts = machine.facts(options.commit)
    out = Writer(options.out, facts)
    on_gpu = facts["gpu"] is not None
    if not on_gpu:
        print("No GPU here: tracing and lowering alone are measured.", flush=True)
    measured = programs(tables.table_name(select.gpu_kind()))
    rows = jit_rows(measured, options.repeats, on_gpu=on_gpu)
    if on_gpu and not options.no_direct:
        rows += direct_rows(measured)
    for row in rows:
        parts = [f"{name} {row[name]:.3f}" for name in (*STEPS, "total_s") if name in row]
        print(f"{row['case']:24} {row['form']:8} {row['provider']:22} {', '.join(parts)}")
    print(verdict(rows))
    out.write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
