"""What ops of a single launch share, the alignment aside: a program, known calls, memory on the boundary."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torch_bridge import _plan
from torch_bridge._direct import known_calls, store
from torch_bridge._direct.problems import KernelProblem
from torch_bridge._direct.program import LoadedProgram

# Kernels take their pointers for 256-byte aligned.
ALIGNMENT = 256
# What a call is known by: the op's name and the caller's options.
type Key = tuple[Any, ...]


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


class KnownCalls:
    """Calls of some ops that were launched: one like an earlier one is launched without checks and plan."""

    def __init__(self) -> None:
        self._calls = known_calls.KnownCalls[Callable[[tuple[int, ...]], None]](num_shapes=1)

    def repeat(self, key: Key, tensors: Sequence[torch.Tensor | None]) -> bool:
        """Does a call if an earlier one was like it. A call that is not valid is like none.

        Args:
            key: the op, and the options as the caller gave them, unchecked.
            tensors: what the caller gave, unchecked, None where there is none.
        """
        there = [x for x in tensors if x is not None]
        found = self._calls.find(_full_key(key, tensors), there)
        if found is None:
            return False
        launch, pointers = found
        launch(pointers)
        return True

    def remember(
        self,
        key: Key,
        program: LoadedProgram,
        tensors: Mapping[str, torch.Tensor | None],
        names: Sequence[str],
        sizes: Mapping[str, int],
    ) -> None:
        """Lets `repeat` do calls like this one, which has just been launched. Not where a tensor was copied.

        Args:
            key: as `repeat` gets it.
            program: that was launched.
            tensors: as `repeat` gets them, by name.
            names: of the values of the launch, in order: of a tensor, or of `sizes`.
            sizes: numbers that the launch gives, which follow from the key and the tensors' shapes.
        """
        there = {name: x for name, x in tensors.items() if x is not None}
        for x in there.values():
            if x.data_ptr() % ALIGNMENT or not x.is_contiguous() or x.is_neg() or not x.numel():
                return
        which = {name: k for k, name in enumerate(there)}
        numbers = {name: size << 8 for name, size in sizes.items()}
        launch = known_calls.launch_of(program.launch, names, which, numbers)
        full, listed = _full_key(key, [*tensors.values()]), [*there.values()]
        self._calls.keep(full, listed, launch, masks=[ALIGNMENT - 1] * len(listed), writes=True)


def _full_key(key: Key, tensors: Sequence[torch.Tensor | None]) -> Key:
    """With what else tells a call: 1, 1.0 and True are equal, so the types count."""
    return (*key, *map(type, key), *[x is None for x in tensors])
