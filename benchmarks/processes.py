"""One program of several processes on this host, a GPU each, as servers and trainers run it."""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, default=1, help="of this host, a GPU each")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)


def run(module: str, argv: Sequence[str], count: int) -> int:
    """Runs `python -m module argv` as so many processes. When one fails the others are ended, as they would
    wait for it.

    Returns:
        The greatest exit code.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
    command = [sys.executable, "-m", module, *argv, "--coordinator", coordinator, "--process"]
    running = [
        subprocess.Popen(
            [*command, str(number)], env=os.environ | {"CUDA_VISIBLE_DEVICES": gpus[number]}
        )
        for number in range(count)
    ]
    try:
        while any(codes := [process.poll() for process in running]) or None in codes:
            if any(codes):
                return max(abs(code) for code in codes if code is not None)
            time.sleep(0.1)
        return 0
    finally:
        for process in running:
            process.kill()


def join(options: argparse.Namespace) -> None:
    """Makes this process one of those; before anything else asks jax for a device."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(options.coordinator, options.processes, options.process)
