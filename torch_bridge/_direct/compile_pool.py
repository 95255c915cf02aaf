"""Asks processes of their own (launch.py) for compiled programs; whatever goes wrong there is an answer."""

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

from moe_align_jax.types import AlignProblem, BatchedAlignProblem
from torch_bridge._direct import disk_cache

_COMPILE_SECONDS = 300

type Problem = AlignProblem | BatchedAlignProblem


class Verdict(NamedTuple):
    """Why no program at all can be compiled; `lasting`: by the next process neither."""

    reason: str
    lasting: bool


type Answer = disk_cache.Entry | str | Verdict


def compile_all(index: int, problems: Sequence[Problem]) -> list[Answer]:
    """Compiles and proves programs: entries, or reasons why not. Many go to several processes."""
    workers = max(1, min(8, len(os.sched_getaffinity(0)) // 2, len(problems) // 4))
    shares = [problems[k::workers] for k in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(functools.partial(_compile_share, index), shares))
    answers: list[Answer] = [""] * len(problems)
    for k, share in enumerate(done):
        answers[k::workers] = share
    return answers


def _compile_share(index: int, problems: Sequence[Problem]) -> list[Answer]:
    """In one process of its own."""
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            return _ask(index, problems, folder)
    except subprocess.TimeoutExpired:
        verdict = Verdict(f"compiling took over {_COMPILE_SECONDS} s", lasting=False)
    except OSError as error:
        verdict = Verdict(f"there is no process to compile in: {error}", lasting=False)
    return [verdict] * len(problems)


def _ask(index: int, problems: Sequence[Problem], folder: str) -> list[Answer]:
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
        reason, until = answer["error"], answer.get("until")
        return [Verdict(reason, until == "changed") if until else reason] * len(problems)
    entries: list[Answer] = []
    for one in answer["programs"]:
        if "error" in one:
            entries.append(one["error"])
            continue
        cubins = [Path(folder, name).read_bytes() for name in one["files"]]
        entries.append(disk_cache.Entry(one["kernels"], one["between"], cubins))
    return entries
