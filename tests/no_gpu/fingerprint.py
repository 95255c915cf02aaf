"""Hashes the PTX of every kernel without a GPU, to show that a change of the source changes no kernel.

    python -m tests.no_gpu.fingerprint --output before.json
    python -m tests.no_gpu.fingerprint --compare before.json [--output after.json]

Every program of `cases`, and every kernel of `masked_quant`, `rows` and `peer_rows`. Left out of the hash are
the kernels' own names, comments, and the places in our source that an instruction comes from. Exit code 1
when a kernel differs, is missing or is new.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.no_gpu import toolchain


def fingerprint(text: str) -> str:
    """A hash of PTX that depends neither on the kernel's name nor on where its source stands."""
    for number, name in enumerate(re.findall(r"\.entry (\w+)\(", text)):
        text = text.replace(name, f"kernel{number}")
    lines = (re.sub(r"\s*//.*|^\s*\.(?:file|loc)\s.*", "", line) for line in text.splitlines())
    return hashlib.sha256("\n".join(filter(None, lines)).encode()).hexdigest()[:32]


def _aligned(checker: Any) -> Iterator[tuple[str, list]]:
    from moe_align_jax._align import kernels as block_align
    from moe_align_jax._align import tables
    from tests.no_gpu import cases

    for case in cases.all_cases():
        checker._mode = case.mode
        config = tables.config_for(case.problem)
        program = block_align.build(case.problem, config, batched=case.mode == "vmap")
        # The case's name holds the sizes and options, and no name of a class.
        yield str(case), [*program.kernels]


def _others(checker: Any) -> Iterator[tuple[str, list]]:
    from tests.no_gpu import masked_quant, rows

    checker._mode = "direct"
    for number, (what, kernel, *_) in enumerate(masked_quant.kernels()):
        yield f"masked_quant {number}, {what}", [kernel]
    for kind in (rows.sums, rows.copies, rows.messages):
        for number, one in enumerate(kind()):
            yield f"rows.{kind.__name__} {number}, {one.what}", [one.kernel]


def _work(plugin: str, runtime: str, share: int, of: int) -> Iterator[tuple[str, list[str]]]:
    import jax

    from tests.no_gpu import peer_rows, worker

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    checker = worker.Checker(plugin, runtime)
    for make in (_aligned, _others):
        for number, (what, kernels) in enumerate(make(checker)):
            if number % of == share:
                texts = [checker.compiler([kernel])[0][0] for kernel in kernels]
                yield what, [fingerprint(text) for text in texts]
    for number, problem in enumerate(peer_rows.problems()):
        if number % of == share:
            dump = checker.compiler.dump(
                [peer_rows.lowered(problem, windowed=False)], [str(problem)]
            )
            [(text, _)] = checker.launch.read_dump(dump).values()
            yield f"peer_rows {number}, {problem}", [fingerprint(text)]


def _start(tools: toolchain.Toolchain, jobs: int) -> dict[str, list[str]]:
    """The fingerprints of every program's kernels, by what the program is."""
    found: dict[str, list[str]] = {}
    logs = [tempfile.TemporaryFile("w+") for _ in range(jobs)]
    command = [sys.executable, "-m", "tests.no_gpu.fingerprint", "--worker"]
    command += [str(tools.plugin), str(tools.runtime)]
    workers = [
        subprocess.Popen(
            [*command, str(share), str(jobs)],
            cwd=tools.folder,
            env=tools.environment(),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        for share, log in enumerate(logs)
    ]
    failed = False
    for worker, log in zip(workers, logs, strict=True):
        output, _ = worker.communicate()
        for line in output.splitlines():
            if line.startswith("["):
                what, prints = json.loads(line)
                found[what] = prints
        if worker.returncode:
            log.seek(0)
            print("\n".join(log.read().splitlines()[-30:]), file=sys.stderr)
            failed = True
    if failed:
        raise SystemExit("tests.no_gpu.fingerprint: a compiling process failed; see above")
    return dict(sorted(found.items()))


def differences(before: dict[str, list[str]], after: dict[str, list[str]]) -> list[str]:
    return [
        *(f"is gone: {what}" for what in before if what not in after),
        *(f"is new: {what}" for what in after if what not in before),
        *(f"differs: {what}" for what in before if after.get(what, before[what]) != before[what]),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="where the fingerprints go, as JSON")
    parser.add_argument("--compare", type=Path, help="fingerprints that must be the same")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        plugin, runtime, share, of = arguments.worker
        for result in _work(plugin, runtime, int(share), int(of)):
            print(json.dumps(result), flush=True)
        os._exit(0)  # without the destructors of a driver that is none
    try:
        tools = toolchain.set_up()
    except toolchain.Missing as missing:
        print(f"tests.no_gpu.fingerprint: {missing}", file=sys.stderr)
        return 1
    found = _start(tools, arguments.jobs)
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found)} programs, {sum(map(len, found.values()))} kernels")
    if not arguments.compare:
        return 0
    wrong = differences(json.loads(arguments.compare.read_text()), found)
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{len(wrong)} differences")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
