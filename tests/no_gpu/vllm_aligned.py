"""Compiles the kernels of vLLM's two other aligned ops without a GPU, and checks the result.

    python -m tests.no_gpu.vllm_aligned

As `compile` does for the alignment: nothing spills, the launch is the kernel's and the one that jaxlib makes,
the kernel waits where PDL needs it, and a mailbox's words are counted. Exit code 1 otherwise.
"""

import functools
import sys
from collections.abc import Iterator
from typing import Any

from tests.no_gpu import ptx, script, worker


def problems() -> list:
    """Each form of the alignment, with every option of the ops."""
    from moe_align_jax._align.vllm.problem import AdaptersProblem, ReceivedProblem

    def capacity(n: int, experts: int, block_size: int) -> int:
        return -(-(n + (experts + 1) * (block_size - 1)) // 4) * 4

    received = [
        ReceivedProblem(n, experts, block, capacity(n, experts, block), 8, words, 8, scatter)
        for n, experts, block, words, scatter in (
            (32, 32, 64, 1, False),
            (512, 32, 128, 2, True),
            (2048, 32, 64, 1, False),
            (8192, 32, 64, 1, True),
            (65536, 32, 64, 1, False),
            (64, 600, 16, 1, False),
        )
    ]
    adapters = [
        AdaptersProblem(n, experts, 16, capacity(n, experts, 16), 8, loras, loras + 1, *options)
        for n, experts, loras, options in (
            (32, 64, 4, (1, False, True)),
            (64, 64, 1, (2, True, False)),
            (512, 128, 8, (1, False, True)),
            (2048, 64, 4, (1, True, True)),
            (8192, 64, 1, (1, False, False)),
            (8192, 128, 40, (1, False, True)),
            (16384, 128, 8, (2, False, True)),
        )
    ]
    return [*received, *adapters]


def faults(kernel: Any, first: bool, text: str, launch: Any, used: ptx.Usage) -> Iterator[str]:
    yield from worker.launch_faults(kernel, "direct", launch)
    yield from worker.resource_faults(used, launch.block[0], text)
    yield from worker.order_faults(text, pdl=True, first=first)
    yield from worker.mail_faults(text, kernel.mailbox)


def check(plugin: str, runtime: str) -> Iterator[script.Report]:
    from moe_align_jax._align.vllm import kernel

    yield from script.direct(
        plugin,
        runtime,
        (
            (f"{one.name}, {problem}", one, functools.partial(faults, one, position == 0))
            for problem in problems()
            for position, one in enumerate(kernel.build(problem).kernels)
        ),
    )


if __name__ == "__main__":
    sys.exit(script.main("tests.no_gpu.vllm_aligned", check))
