"""Runs every kernel form under NVIDIA's compute-sanitizer and prints a table of what it found.

    python -m tests.gpu.sanitize [--path jit|direct] [--tools memcheck,racecheck,...] [--sanitizer PATH]

One child process per tool runs all forms, checks each result with the oracle, and names the form on a line
of its own, so that a report is counted for the form it stands under. Exit code 1 when anything was found.
"jit" is the way through jax; "direct" that of torch_bridge's own launches, with ids of both widths that start
off a boundary, the peers' forms and a side stream. There only our kernels are looked at, by their names,
and a first child without the sanitizer leaves the compiled programs on disk.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
MARK = "### form "
# The first line of one report, of any of the four tools.
REPORT = re.compile(
    r"^=+ (?:Invalid|Error: |Warning: |Race reported|Uninitialized|Barrier error|Program hit|Host API)"
)
KERNEL = "### kernel "
SUMMARY = re.compile(r"SUMMARY: (\d+) (?:error|hazard)")


def cases() -> Iterator[tuple[str, object, dict]]:
    """(form, size, options), plain and with all options: the largest size below 8,192 pairs of each form, or
    its smallest. (racecheck takes minutes over a sort of more in shared memory.)"""
    from tests import forms

    by_form: dict = {}
    for size in sorted(forms.SIZES):
        if size.form not in by_form or size.num_pairs < 8192:
            by_form[size.form] = size
    for form, size in by_form.items():
        for options in (forms.OPTIONS[0], forms.OPTIONS[-1]):
            yield form, size, options
    yield "batched", forms.BATCHED_SIZES[2], {}


def run_forms() -> None:
    """The child: each form once."""
    import functools

    import jax
    import numpy as np

    import moe_align_jax as maj
    from tests import oracle

    for form, size, options in cases():
        print(f"{MARK}{form}", flush=True)
        if form == "batched":
            num_experts, max_tokens, block_size = size
            counts = np.random.default_rng(0).integers(0, max_tokens + 1, num_experts)
            sizes = {"max_tokens_per_batch": max_tokens, "block_size": block_size}
            got = maj.batched_moe_align_block_size(counts, implementation="mosaic_gpu", **sizes)
            want = oracle.align_batched(counts.tolist(), **sizes)
        else:
            ids = oracle.route(
                "outside",
                num_tokens=size.num_pairs,
                top_k=1,
                num_experts=size.num_experts,
                dtype="int32",
                seed=0,
            )
            given = {
                "block_size": size.block_size,
                "num_experts": size.num_experts,
                "expert_map": oracle.local_map("second", size.num_experts, 0)
                if options["map"]
                else None,
                "ignore_invalid_experts": options["map"] == "filter",
                "num_valid_pairs": size.num_pairs // 2 if options["num_valid_pairs"] else None,
                "return_inverse": options["return_inverse"],
                "pad_sorted_ids": options["pad_sorted_ids"],
            }
            call = functools.partial(maj.moe_align_block_size, implementation="mosaic_gpu")
            got, want = call(ids, **given), oracle.expected(ids, **given)
        jax.block_until_ready(got)
        oracle.assert_same(got, want)
    print(f"{MARK}end", flush=True)


def run_direct() -> None:
    """The child: each form once or more, launched by torch_bridge; then the names of its kernels."""
    from tests.gpu import direct_forms
    from torch_bridge import direct

    load, names = direct._load, set()

    def named(index, problem, entry):
        names.update(kernel["entry"] for kernel in entry.kernels)
        load(index, problem, entry)

    direct._load = named
    direct_forms.load(cases())
    for form, size, options in cases():
        print(f"{MARK}{form}", flush=True)
        if form == "batched":
            direct_forms.run_batched("cuda", *size)
        else:
            direct_forms.run_form("cuda", size, options)
    for name in sorted(names):
        print(f"{KERNEL}{name}")
    print(f"{MARK}end", flush=True)


def count_reports(output: str) -> dict[str, int]:
    """Reports under each form; those before the first one stand under "start"."""
    form, found = "start", {"start": 0}
    for line in output.splitlines():
        if line.startswith(MARK):
            form = line.removeprefix(MARK)
            found.setdefault(form, 0)
        elif REPORT.match(line):
            found[form] += 1
    return found


def settings(path: str, tool: str, kernels: list[str]) -> tuple[dict[str, str], list[str]]:
    """Environment and options of the sanitizer."""
    if path == "direct":
        # Each tensor its own cudaMalloc, of the exact size.
        options = ["--target-processes", "application-only", "--report-api-errors", "no"]
        options += [f"--kernel-name=kne={name}" for name in kernels]
        if tool != "memcheck":
            options.remove("--report-api-errors")
            options.remove("no")
        return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, options
    # Each buffer its own cudaMalloc, so that one past the end is outside; no CUDA graphs around kernels.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=".strip()
    environment = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_FLAGS": flags}
    return environment, ["--target-processes", "all"]


def child(path: str) -> list[str]:
    return [sys.executable, "-m", "tests.gpu.sanitize", "--child", "--path", path]


def kernel_names(path: str) -> list[str]:
    """Runs the child once without the sanitizer, so that everything is compiled: the kernels it launched.

    Raises:
        RuntimeError: it fails; there is nothing to sanitize then.
    """
    done = subprocess.run(child(path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    names = [x.removeprefix(KERNEL) for x in done.stdout.splitlines() if x.startswith(KERNEL)]
    if done.returncode or not names:
        raise RuntimeError(f"the run without the sanitizer failed:\n{done.stdout[-6000:]}")
    return names


def run_tool(
    sanitizer: str, tool: str, path: str, kernels: list[str]
) -> tuple[dict[str, int], str | None, str]:
    """(reports by form, what went wrong or None, output)."""
    environment, options = settings(path, tool, kernels)
    command = [sanitizer, "--tool", tool, "--print-limit", "1000", *options]
    done = subprocess.run(
        [*command, *child(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )
    found = count_reports(done.stdout)
    summary = SUMMARY.search(done.stdout)
    problem = None
    if done.returncode or "end" not in found:
        problem = f"the run did not finish (exit code {done.returncode})"
    elif summary is None:
        problem = "the sanitizer printed no summary"
    elif int(summary[1]) != 0:
        problem = f"{summary[1]} in its summary"
    return found, problem, done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--path", choices=("jit", "direct"), default="jit")
    parser.add_argument("--sanitizer", default=None, help="path of compute-sanitizer")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        (run_direct if arguments.path == "direct" else run_forms)()
        return 0
    sanitizer = arguments.sanitizer or shutil.which("compute-sanitizer")
    sanitizer = sanitizer or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        print(
            "compute-sanitizer is not on PATH: it comes with the CUDA toolkit, or name it with --sanitizer"
        )
        return 1
    kernels = []
    if arguments.path == "direct":
        kernels = kernel_names(arguments.path)
        print(f"{len(kernels)} kernels: {' '.join(kernels)}", flush=True)
    names = list(dict.fromkeys(form for form, _, _ in cases()))
    print(f"{'tool':<12}" + "".join(f"{name:>9}" for name in names) + "   seconds  verdict")
    failed = False
    for tool in arguments.tools.split(","):
        start = time.monotonic()
        found, problem, output = run_tool(sanitizer, tool, arguments.path, kernels)
        failed |= problem is not None
        cells = "".join(f"{found.get(name, '-'):>9}" for name in names)
        print(
            f"{tool:<12}{cells}{time.monotonic() - start:>10.0f}  {problem or 'clean'}", flush=True
        )
        if problem:
            print(output[-6000:])
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
