"""The device of a warm-up: read from its argument, and asked whether programs can be loaded there."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from moe_align_jax._core import checks
from torch_bridge._direct import store


def check_device(function: str, value: object) -> torch.device:
    """A device that torch has a name for; the current CUDA device for None and for "cuda"."""
    rule, remedy = "be a device of torch", 'Pass for example "cuda:0", or leave it out.'
    if value is None:
        value = "cuda"
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_int and not isinstance(value, (str, torch.device)):
        checks.refuse(TypeError, function, "device", rule, value, remedy)
    got = checks.shown(value)
    try:
        device = torch.device(int(value) if is_int else value)  # type: ignore[call-overload]
    except (RuntimeError, ValueError):
        checks.fail(function, "device", rule, got, remedy)
    if is_int and device.index != value:  # torch keeps 8 bits of it
        checks.fail(function, "device", rule, got, remedy)
    if device.type == "cuda" and torch.cuda.is_available():
        if device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        if device.index >= torch.cuda.device_count():
            rule = f"be one of the {torch.cuda.device_count()} CUDA devices that torch sees"
            checks.fail(function, "device", rule, got, remedy)
    return device


@contextlib.contextmanager
def loading_on(function: str, device: torch.device, what: str) -> Iterator[store.Store]:
    """The store to load programs from.

    Args:
        function: the warm-up.
        device: of `check_device`.
        what: is launched there, for the error.

    Raises:
        NotImplementedError: nothing can be launched on the device, or what the body asks for cannot be had.
    """
    programs = store.here
    try:
        if reason := programs.machine.unavailable(device):
            raise store.Unavailable(reason)
        yield programs
    except store.Unavailable as reason:
        text = str(reason).rstrip(".")
        rule, remedy = f"be one that {what} can be launched on", f"{text[0].upper()}{text[1:]}."
        checks.fail(function, "device", rule, str(device), remedy, NotImplementedError)
