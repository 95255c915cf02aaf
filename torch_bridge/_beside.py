"""What launches beside the alignment share: a problem's program, or None, and memory on the boundary."""

from collections.abc import Callable

import torch

from torch_bridge import _plan
from torch_bridge._direct import store
from torch_bridge._direct.problems import KernelProblem
from torch_bridge._direct.program import LoadedProgram

# Kernels take their pointers for 256-byte aligned.
ALIGNMENT = 256


def program_for[P: KernelProblem](
    function: str,
    problem: P,
    tensor: torch.Tensor,
    unsupported: Callable[[P], str | None],
    remedy: str,
    instead: str = "DLPack is used",
) -> LoadedProgram | None:
    """A program, ready to launch on a tensor's device; None where that is not possible: something else
    computes.

    Args:
        function, remedy: for the error of a program that is not loaded while a stream is captured.
        problem: what it is compiled for.
        tensor: an operand.
        unsupported: why the kernels do not take a problem, or None.
        instead: what is done where there is no program.

    Raises:
        Miss: the program is not loaded, and torch's current stream is captured.
    """
    programs, index = store.here, tensor.get_device()
    if _plan.forced_implementation() or programs.machine.unavailable(tensor.device):
        return None
    if programs.failure(index, problem):
        return None
    if reason := unsupported(problem):
        programs.warn_once(reason, instead)
        return None
    try:
        return programs.program_for(function, index, problem, remedy)
    except store.Unavailable as reason:
        programs.warn_once(str(reason), instead)
        return None


def memory_beside(tensor: torch.Tensor) -> torch.Tensor:
    """Another one of its shape and dtype, which torch's allocator puts on the boundary."""
    return store.here.machine.empty(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def on_boundary(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where it does not begin on the boundary."""
    return memory_beside(tensor).copy_(tensor) if tensor.data_ptr() % ALIGNMENT else tensor
