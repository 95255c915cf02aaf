"""Compiles every kernel form with jaxlib's own compiler and ptxas, without a GPU, and checks the result.

    python -m tests.no_gpu.compile [--jobs N] [--sample N] [--verbose]

For every program of `cases`: nothing spills, registers fit the CTA, the launch that
`torch_bridge/_direct/compile_worker.py` reads is the one that jaxlib makes, kernels wait where PDL needs
it, and no load spans two ids. Exit code 1 when anything is wrong or missing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict

from tests.no_gpu import toolchain


def run(tools: toolchain.Toolchain, jobs: int, sample: int = 1) -> list[dict]:
    """One dict per case, or of one case in `sample`, from `jobs` processes."""
    logs = [tempfile.TemporaryFile("w+") for _ in range(jobs)]
    workers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.no_gpu.worker"),
                *(str(tools.plugin), str(tools.runtime)),
                *(str(sample), str(share), str(jobs)),
            ],
            cwd=tools.folder,
            env=tools.environment(),
            stdout=subprocess.PIPE,
            stderr=logs[share],
            text=True,
        )
        for share in range(jobs)
    ]
    done = []
    for worker, log in zip(workers, logs, strict=True):
        output, _ = worker.communicate()
        lines = [line for line in output.splitlines() if line.startswith("{")]
        done += [json.loads(line) for line in lines]
        if worker.returncode:
            log.seek(0)
            tail = "\n".join(log.read().splitlines()[-30:])
            done.append({"case": "a compiling process", "kernels": [], "seconds": 0})
            done[-1]["wrong"] = [f"status {worker.returncode} after {len(lines)} cases\n{tail}"]
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--sample", type=int, default=1, metavar="N", help="compile one in N")
    parser.add_argument("--verbose", action="store_true", help="a line per case")
    arguments = parser.parse_args()
    try:
        tools = toolchain.set_up()
    except toolchain.Missing as missing:
        print(f"tests.no_gpu.compile: {missing}", file=sys.stderr)
        return 1
    from tests.no_gpu import cases

    begun, done = time.monotonic(), run(tools, arguments.jobs, arguments.sample)
    most: dict[str, tuple[int, int, int, int]] = defaultdict(lambda: (0, 0, 0, 0))
    for one in done:
        if arguments.verbose:
            print(f"{one['seconds']:5.2f} s  {one['case']}")
        for name, threads, registers, shared in one["kernels"]:
            n, a, b, c = most[name]
            most[name] = (n + 1, max(a, threads), max(b, registers), max(c, shared))
    print(f"{'kernel':28} compiled  at most: threads  registers  shared bytes")
    for name, (n, threads, registers, shared) in sorted(most.items()):
        print(f"{name:28} {n:8} {threads:17} {registers:10} {shared:13}")
    wrong = [f"{one['case']}\n    {fault}" for one in done for fault in one["wrong"]]
    every = cases.all_cases()
    expected = len(list(cases.one_in(arguments.sample, every)))
    if expected != len(done):
        wrong.append(f"{len(done)} cases came back of {expected}")
    for fault in wrong:
        print(fault, file=sys.stderr)
    kernels = sum(n for n, *_ in most.values())
    print(
        f"jaxlib {tools.folder.name}: {len(done)} of {len(every)} programs, {kernels} kernels, "
        f"{len(wrong)} faults, {time.monotonic() - begun:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
