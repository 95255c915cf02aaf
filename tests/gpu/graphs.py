"""CUDA-graph captures in a process that jax's GPU client may live in."""

import sys

import torch


def capture(graph: torch.cuda.CUDAGraph) -> torch.cuda.graph:
    """`torch.cuda.graph(graph)`; beside jax in a mode in which other threads may call the driver meanwhile.

    jax's client asks its streams how they are every few seconds, from a thread of its own. torch's mode,
    "global", takes that for a fault: the capture ends with error 901, jax's stream counts as broken from then
    on, and the process may die in jaxlib (jax 0.11.2; 3 of 6 processes within 75 s, H100).
    """
    mode = "thread_local" if "jax" in sys.modules else "global"
    return torch.cuda.graph(graph, capture_error_mode=mode)
