"""What ops of a single launch share, the alignment aside: a program, known calls, memory on the boundary."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from torch_bridge import _plan
from torch_bridge._direct import fast_path, store
from torch_bridge._direct.problems import KernelProblem
from torch_bridge._direct.program import LoadedProgram

# Kernels take their pointers for 256-byte aligned.
ALIGNMENT = 256
_MAX_KNOWN, _MAX_APART = 1 << 12, 16
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


class _KnownCall(NamedTuple):
    """A call that was launched on its tensors as they lay.

    Attributes:
        programs: the store of its program.
        launch: of the program.
        device: its index.
        matches: whether other tensors are like those of the call, but for where they lie.
        values: what the launch gets, in order: (True, which tensor's pointer) or (False, a number).
        sizes: bytes of each tensor.
        apart: pointers that were seen to overlap nowhere.
    """

    programs: store.Store
    launch: Callable[..., None]
    device: int
    matches: Callable[..., bool]
    values: list[tuple[bool, int]]
    sizes: list[int]
    apart: set[tuple[int, ...]]


class KnownCalls:
    """Calls of some ops that were launched: one like an earlier one is launched without checks and plan."""

    def __init__(self) -> None:
        self._known: dict[Key, _KnownCall] = {}

    def repeat(self, key: Key, tensors: Sequence[torch.Tensor | None]) -> bool:
        """Does a call if an earlier one was like it. A call that is not valid is like none.

        Args:
            key: the op, and the options as the caller gave them, unchecked.
            tensors: what the caller gave, unchecked, None where there is none.
        """
        first = tensors[0]
        # Asked first: what is known would otherwise be a part of what a compiled graph depends on.
        if not fast_path.open_to_all() or not self._known or not isinstance(first, torch.Tensor):
            return False
        there = [x for x in tensors if x is not None]
        for tensor in there:
            if type(tensor) not in fast_path.PLAIN or tensor.is_nested:
                return False
        try:
            known = self._known.get(_full_key(key, tensors))
        except TypeError:  # an option that is no key
            return False
        if (
            known is None
            or known.programs is not store.here
            or known.programs.machine.current_device() != known.device
            or not known.matches(*there)
        ):
            return False
        pointers = tuple([tensor.data_ptr() for tensor in there])
        if pointers not in known.apart:
            end = 0
            for start, size in sorted(zip(pointers, known.sizes, strict=True)):
                if start < end or start % ALIGNMENT:
                    return False
                end = start + size
            if len(known.apart) >= _MAX_APART:
                known.apart.clear()
            known.apart.add(pointers)
        known.launch(*[pointers[n] if is_pointer else n for is_pointer, n in known.values])
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
        at = {name: index for index, name in enumerate(there)}
        values = [(name in at, at[name] if name in at else sizes[name] << 8) for name in names]
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        listed = list(there.values())
        self._known[_full_key(key, [*tensors.values()])] = _KnownCall(
            store.here,
            program.launch,
            listed[0].get_device(),
            fast_path.matcher(*listed),
            values,
            [x.nbytes for x in listed],
            set(),
        )


def _full_key(key: Key, tensors: Sequence[torch.Tensor | None]) -> Key:
    """With what else tells a call: 1, 1.0 and True are equal, so the types count."""
    assert tensors[0] is not None
    return (*key, *map(type, key), tensors[0].shape, *[x is None for x in tensors])
