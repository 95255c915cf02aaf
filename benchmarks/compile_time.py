"""Compile time of each form: tracing and lowering, then compiling, each program new to the process.

python -m benchmarks.compile_time --out benchmarks/results/compile/NAME.jsonl

jax's compilation cache is off. "mosaic_gpu" is a jit with one call, "torch_bridge" a program that is sized
at launch, in the process that compiles for PyTorch (assembling it, and proving it on the GPU, included). The
first program of a process also pays for what every compiler loads once, and is a row of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.cases import Case
from moe_align_jax import _checks, _dispatch, _tuning
from moe_align_jax.types import AlignProblem

GOAL_S = 0.5
# Sizes whose forms differ, in the tables that there are; with options the largest program of each form.
CASES = tuple(
    Case(num_pairs=n, num_experts=num_experts, block_size=block, with_options=options)
    for n, num_experts, block in (
        *(
            (32, 256, 16),
            (64, 9000, 16),
            (512, 256, 16),
            (2048, 128, 64),
            (8192, 64, 128),
            (32_768, 256, 64),
        ),
        *((32_768, 256, 64), (524_288, 256, 128), (8192, 65_535, 16), (32_768, 65_535, 16)),
    )
    for options in (False, True)
)


def problem_of(case: Case, tuning: str, *, sized_at_launch: bool = False) -> AlignProblem:
    size = (case.num_pairs, case.num_experts, case.block_size)
    n = _tuning.size_bucket(*size, tuning) if sized_at_launch else case.num_pairs
    rows = _checks.capacity(
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


def seconds_of(problem: AlignProblem, *, compile_too: bool) -> tuple[float, float | None]:
    """(tracing and lowering, compiling and the first run) of one new program, in seconds."""
    import jax
    import numpy as np

    jax.clear_caches()
    operands = [np.zeros(shape, np.int32) for shape in problem.inputs.values()]
    program = jax.jit(lambda *x: _dispatch.align(problem, "mosaic_gpu", *x))
    start = time.perf_counter()
    lowered = program.trace(*operands).lower(lowering_platforms=("cuda",))
    middle = time.perf_counter()
    if not compile_too:
        return middle - start, None
    compiled = lowered.compile()
    jax.block_until_ready(compiled(*operands))  # XLA may compile a kernel when it first runs
    return middle - start, time.perf_counter() - middle


def row_of(
    case: Case, provider: str, form: str, runs: Sequence[tuple[float, float | None]]
) -> dict:
    """The medians; the total is over what was measured."""
    lower = statistics.median(run[0] for run in runs)
    compiled = [run[1] for run in runs if run[1] is not None]
    row: dict[str, Any] = {
        "case": case.name,
        "provider": provider,
        "form": form,
        "metric": "compile_s",
        "lower_s": round(lower, 4),
        "samples": len(runs),
    }
    if compiled:
        row["compile_s"] = round(statistics.median(compiled), 4)
        row["total_s"] = round(statistics.median(sum(run) for run in runs), 4)  # type: ignore[arg-type]
    return row


def jit_rows(cases: Sequence[Case], repeats: int, *, on_gpu: bool) -> list[dict[str, Any]]:
    """Each repeat has another number of pairs: neither jax nor Mosaic has seen its program."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    tuning, rows = _tuning.table_name(_dispatch.gpu_kind()), []
    for index, case in enumerate(cases):
        problem = problem_of(case, tuning)
        form, runs = _tuning.config_for(problem).form, []
        for k in range(repeats + (index == 0)):
            one = problem._replace(num_pairs=problem.num_pairs - k)
            run = seconds_of(one, compile_too=on_gpu)
            if index == 0 and k == 0:
                rows.append(row_of(case, "mosaic_gpu, first", form, [run]))
            else:
                runs.append(run)
        rows.append(row_of(case, "mosaic_gpu", form, runs))
    return rows


def direct_rows(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The same for PyTorch, by the process that compiles for it; the whole process in the first row."""
    tuning = _tuning.table_name(_dispatch.gpu_kind())
    problems = [problem_of(case, tuning, sized_at_launch=True) for case in cases]
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "device": 0,
            "folder": folder,
            "problems": [[type(p).__name__, p._asdict()] for p in problems],
        }
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(machine.ROOT / "torch_bridge" / "launch.py")],
            input=json.dumps(request),
            capture_output=True,
            text=True,
        )
        whole = time.perf_counter() - start
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise RuntimeError(f"torch_bridge/launch.py: {answer['error']}")
    rows = []
    for case, problem, program in zip(cases, problems, answer["programs"], strict=True):
        row = {"case": case.name, "provider": "torch_bridge", "metric": "compile_s", "samples": 1}
        row["form"] = _tuning.config_for(problem).form
        row |= (
            {"error": program["error"]} if "error" in program else {"total_s": program["seconds"]}
        )
        rows.append(row)
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="new programs per case")
    parser.add_argument("--out", metavar="FILE", help="JSONL to append to")
    parser.add_argument(
        "--no-direct", action="store_true", help="leave out the programs for PyTorch"
    )
    parser.add_argument("--commit", help="the commit to record, where git is not at hand")
    options = parser.parse_args(argv)
    facts = machine.facts(options.commit)
    on_gpu = facts["gpu"] is not None
    if not on_gpu:
        print("No GPU here: tracing and lowering alone are measured.", flush=True)
    rows = jit_rows(CASES, options.repeats, on_gpu=on_gpu)
    if on_gpu and not options.no_direct:
        rows += direct_rows(CASES)
    for row in rows:
        parts = [
            f"{name} {row[name]:.3f}" for name in ("lower_s", "compile_s", "total_s") if name in row
        ]
        print(f"{row['case']:24} {row['form']:8} {row['provider']:22} {', '.join(parts)}")
    print(verdict(rows))
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        with Path(options.out).open("a") as file:
            file.writelines(json.dumps({**facts, **row}) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
