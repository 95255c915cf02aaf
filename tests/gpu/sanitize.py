"""Runs every kernel under NVIDIA's compute-sanitizer and prints a table of what it found.

    python -m tests.gpu.sanitize [--path jit|direct|peers] [--tools memcheck,racecheck,...] [--sanitizer PATH]
        [--only PART_OF_A_NAME]

One child process per tool makes the calls of sanitizer_cases.py, checks each result with the oracle, and
names the kernels on a line of its own, so that a report is counted for what it stands under. Exit code 1
when anything was found. A "-" in the table was not run.
"jit" is the way through jax, where all tools but initcheck look at our kernels only; "direct" that of
torch_bridge's own launches, with ids of both widths that start off a boundary, the peers' forms, a side
stream, and vLLM's router and aligned ops. There only our kernels are looked at, by their names, and a first
child without the sanitizer leaves the compiled programs on disk.
"peers" is dispatch and combine by the transports "nvlink", "nvlink_window" and "all_to_all", over two GPUs or
more; there, too, only our kernels are looked at, as NCCL's take the tools minutes.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
MARK = "### form "
# The first line of one report, of any of the four tools.
REPORT = re.compile(
    r"^=+ (?:Invalid|Error: |Warning: |Race reported|Uninitialized|Barrier error|Program hit|Host API)"
)
KERNEL = "### kernel "
SUMMARY = re.compile(r"SUMMARY: (\d+) (?:error|hazard)")


def run_jit(path: str, tool: str, only: str) -> None:
    """The child: everything once, whose name holds `only`."""
    from tests.gpu import sanitizer_cases

    for name, run in sanitizer_cases.runs(path, tool):
        if only not in name:
            continue
        print(f"{MARK}{name}", flush=True)
        run()
    print(f"{MARK}end", flush=True)


def run_direct(tool: str, only: str) -> None:
    """The child: each case once or more, launched by torch_bridge; then the names of its kernels."""
    from tests.gpu import direct_forms, direct_vllm, sanitizer_cases
    from torch_bridge._direct import store

    driver, names = store.here.machine.driver, set()
    load = driver.load_kernels

    def named(kernels, *others):
        names.update(kernel["entry"] for kernel in kernels)
        return load(kernels, *others)

    driver.load_kernels = named
    cases = [case for case in sanitizer_cases.cases(tool) if only in case.name]
    direct_forms.load(cases)
    for case in cases:
        print(f"{MARK}{case.name}", flush=True)
        direct_forms.run("cuda", case)
    for name, step in direct_vllm.STEPS.items():
        if only in name:
            print(f"{MARK}{name}", flush=True)
            step("cuda")
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


def reported(output: str) -> list[str]:
    """The sanitizer's own lines, and our marks between them, without the host's stack."""
    own = [line for line in output.splitlines() if line.startswith(("=========", MARK))]
    return [line for line in own if " Host Frame:" not in line]


def settings(path: str, tool: str, kernels: list[str]) -> tuple[dict[str, str], list[str]]:
    """Environment and options of the sanitizer."""
    # torch and NCCL ask the driver for what is not there; only memcheck looks at that, and knows the option.
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" and path != "jit" else []
    if path == "direct":
        # Each tensor its own cudaMalloc, of the exact size.
        options = ["--target-processes", "application-only", *quiet]
        options += [f"--kernel-name=kne={name}" for name in kernels]
        return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, options
    # Each buffer its own cudaMalloc, so that one past the end is outside; no CUDA graphs around kernels; XLA
    # does not try kernels of its own, of which one failed under racecheck.
    flags = "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    environment = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_FLAGS": flags}
    # initcheck must see what XLA's own kernels write.
    of_ours = path == "peers" or tool != "initcheck"
    ours = ["--kernel-regex", "kns=_mosaic_gpu_kernel"] if of_ours else []
    return environment, ["--target-processes", "application-only", *quiet, *ours]


def child(path: str, tool: str = "", only: str = "") -> list[str]:
    """The command that makes a path's calls, but for those that `tool` takes too long over."""
    command = [sys.executable, "-m", "tests.gpu.sanitize", "--child", "--path", path]
    return [*command, "--tools", tool, "--only", only]


def kernel_names(path: str, only: str = "") -> list[str]:
    """Runs the child once without the sanitizer, so that everything is compiled: the kernels it launched.

    Raises:
        RuntimeError: it fails; there is nothing to sanitize then.
    """
    command = child(path, "", only)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    names = [x.removeprefix(KERNEL) for x in done.stdout.splitlines() if x.startswith(KERNEL)]
    if done.returncode or not names:
        raise RuntimeError(f"the run without the sanitizer failed:\n{done.stdout[-6000:]}")
    return names


def run_tool(
    sanitizer: str, tool: str, path: str, kernels: list[str], only: str = ""
) -> tuple[dict[str, int], str | None, str]:
    """(reports by form, what went wrong or None, output)."""
    environment, options = settings(path, tool, kernels)
    command = [sanitizer, "--tool", tool, "--print-limit", "1000", *options]
    done = subprocess.run(
        [*command, *child(path, tool, only)],
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


def table(names: Sequence[str], found: dict[str, dict[str, int]]) -> list[str]:
    """A line per kernel with the reports of each tool; `found` by tool."""
    width = max(map(len, names)) + 2
    lines = [f"{'':{width}}" + "".join(f"{tool:>11}" for tool in found)]
    for name in names:
        cells = "".join(f"{counts.get(name, '-'):>11}" for counts in found.values())
        lines.append(f"{name:{width}}{cells}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--path", choices=("jit", "direct", "peers"), default="jit")
    parser.add_argument("--sanitizer", default=None, help="path of compute-sanitizer")
    parser.add_argument("--only", default="", help="what a step's name must hold")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        if arguments.path == "direct":
            run_direct(arguments.tools, arguments.only)
        else:
            run_jit(arguments.path, arguments.tools, arguments.only)
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
        kernels = kernel_names(arguments.path, arguments.only)
        print(f"{len(kernels)} kernels: {' '.join(kernels)}", flush=True)
    from tests.gpu import sanitizer_cases

    found, failed = {}, False
    for tool in arguments.tools.split(","):
        start = time.monotonic()
        found[tool], problem, output = run_tool(
            sanitizer, tool, arguments.path, kernels, arguments.only
        )
        failed |= problem is not None
        seconds = time.monotonic() - start
        print(f"{tool:<12}{seconds:>6.0f} s  {problem or 'clean'}", flush=True)
        if problem:
            print("\n".join([*reported(output)[:200], output[-2000:]]))
    print("\nReports:")
    names = [name for name in sanitizer_cases.names(arguments.path) if arguments.only in name]
    print("\n".join(table(names, found)))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
