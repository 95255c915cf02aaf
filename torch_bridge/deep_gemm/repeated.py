"""How a call of DeepGEMM's products that is like an earlier one is launched, past all checks but a few.

The checks, the program and the order of its values depend on the tensors' shapes, strides and dtypes and on
the options alone. A call whose tensors all lay as the kernel reads them is kept (`remember`), for later ones
like it (`repeat`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from torch_bridge import _checks
from torch_bridge._direct import known_calls


class _Product(NamedTuple):
    """What launches a call.

    Attributes:
        launch: the program's launch, of the tensors' pointers.
        scales: which tensor has scales that lie in columns, and the bytes that its memory must have behind
            its first; None if there is none.
    """

    launch: Callable[[tuple[int, ...]], None]
    scales: tuple[int, int] | None


class Launched(NamedTuple):
    """What a program got in a launch.

    Attributes:
        order: names of its values.
        pointers: those of them that are pointers.
        numbers: the others.
        needed: bytes that each pointer must be a multiple of.
        scale_bytes: of the scales of a, as far as the kernel may read.
        launch: the program's.
    """

    order: tuple[str, ...]
    pointers: Mapping[str, int]
    numbers: Mapping[str, int]
    needed: Mapping[str, int]
    scale_bytes: int
    launch: Callable[..., None]


# Known by their options, and by the shapes of a and b.
calls = known_calls.KnownCalls[_Product](num_shapes=2)


def repeat(options: tuple[Any, ...], tensors: Sequence[Any]) -> bool:
    """Launches a call like an earlier one; False for every other call, valid or not.

    Args:
        options: of the call.
        tensors: what the caller gave, unchecked: a, b, more, d.
    """
    found = calls.find(options, tensors)
    if found is None or _checks.may_be_differentiated(tensors):
        return False
    (launch, scales), pointers = found
    if scales is not None:
        which, needed = scales
        storage = tensors[which].untyped_storage()
        if pointers[which] + needed > storage.data_ptr() + storage.nbytes():
            return False
    launch(pointers)
    return True


def remember(
    options: tuple[Any, ...],
    tensors: Sequence[torch.Tensor],
    launched: Launched,
    scales: int | None,
) -> None:
    """Lets `repeat` do calls like one that was just launched. Not where something of it was copied.

    Args:
        options, tensors: as for `repeat`.
        launched: what the program got.
        scales: which of the tensors has scales that lie in columns.
    """
    at = {tensor.data_ptr(): k for k, tensor in enumerate(tensors)}
    if len(at) < len(tensors) or not set(launched.pointers.values()) <= set(at):
        return
    which = {name: at[pointer] for name, pointer in launched.pointers.items()}
    masks, spans, pitched = [0] * len(tensors), [tensor.nbytes for tensor in tensors], None
    for name, k in which.items():
        masks[k] = launched.needed[name] - 1
    if scales is not None:  # up to the end of the last column
        pitched = scales, launched.scale_bytes
        spans[scales] = launched.scale_bytes
    launch = known_calls.launch_of(launched.launch, launched.order, which, launched.numbers)
    bound = _Product(launch, pitched)
    calls.keep(options, tensors, bound, masks=masks, spans=spans, writes=True)
