"""Has programs compiled by other processes, which run compile_worker.py.

Whatever goes wrong there is an answer, not an error.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from torch_bridge._direct import disk_cache
from torch_bridge._direct.problems import KernelProblem

_COMPILE_SECONDS = 300


class DeviceFailure(NamedTuple):
    """Why nothing at all can be compiled for this device by this process."""

    reason: str


# A program; or why this one could not be had; or why none can.
type Answer = disk_cache.Entry | str | DeviceFailure


def compile_all(index: int, problems: Sequence[KernelProblem]) -> list[Answer]:
    """Compiles and self-tests programs for a device, many of them in several processes at once.

    Returns:
        An answer per problem, in order.
    """
    workers = max(1, min(8, len(os.sched_getaffinity(0)) // 2, len(problems) // 4))
    shares = [problems[k::workers] for k in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(functools.partial(_compile_share, index), shares))
    answers: list[Answer] = [""] * len(problems)
    for k, share in enumerate(done):
        answers[k::workers] = share
    return answers


def _compile_share(index: int, problems: Sequence[KernelProblem]) -> list[Answer]:
    """As `compile_all`, in one process."""
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            return _ask(index, problems, folder)
    except subprocess.TimeoutExpired:
        failure = DeviceFailure(f"compiling took over {_COMPILE_SECONDS} s")
    except OSError as error:
        failure = DeviceFailure(f"there is no process to compile in: {error}")
    return [failure] * len(problems)


def _ask(index: int, problems: Sequence[KernelProblem], folder: str) -> list[Answer]:
    """As `compile_all`, in one process that leaves its machine code in `folder`."""
    request = {
        "device": index,
        "folder": folder,
        "sources": disk_cache.source_digest(),
        "problems": [[type(p).__name__, p._asdict()] for p in problems],
    }
    done = subprocess.run(
        [sys.executable or "", str(Path(__file__).with_name("compile_worker.py"))],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_COMPILE_SECONDS,
    )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        tail = " ".join(done.stderr.split()[-40:])
        reason = f"the compiling process ended with status {done.returncode}: {tail}"
        return [reason] * len(problems)
    if "error" in answer:
        reason = answer["error"]
        failure = DeviceFailure(reason) if answer.get("for_every_program") else reason
        return [failure] * len(problems)
    entries: list[Answer] = []
    for one in answer["programs"]:
        if "error" in one:
            entries.append(one["error"])
            continue
        cubins = [Path(folder, name).read_bytes() for name in one["files"]]
        entries.append(disk_cache.Entry(one["kernels"], one["between"], cubins))
    return entries
