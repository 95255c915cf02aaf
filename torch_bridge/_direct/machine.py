"""What the direct path asks of the machine: torch's devices, streams and allocator, the driver, a compiler.

All of it is asked through one object, a `Machine`, so that tests put another one in its place.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_align_jax._align import tables
from torch_bridge._direct import compile_pool
from torch_bridge._direct.driver import Driver
from torch_bridge._direct.problems import KernelProblem


def _stream_of(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


def _empty_strided(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


_dynamo_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)


class Machine:
    """This process's GPUs, as torch and the driver show them. Device indices are torch's.

    Attributes:
        current_device: the index of torch's current device.
        current_stream: the CUstream of torch's current stream on a device.
        empty: a tensor on the current device, from torch's allocator: `empty(size, stride, dtype)`. Size and
            stride must be plain tuples: torch's fast function refuses a `torch.Size`.
        driver: loads and launches.
    """

    # What inductor's own code calls for the same: 10, 3 and 2 times as fast as the public functions.
    current_stream: Callable[[int], int] = staticmethod(
        getattr(torch._C, "_cuda_getCurrentRawStream", _stream_of)
    )
    current_device: Callable[[], int] = staticmethod(
        getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
    )
    empty: Callable[..., torch.Tensor] = staticmethod(
        getattr(_dynamo_guards, "_empty_strided_cuda", _empty_strided)
    )

    def __init__(self) -> None:
        self.driver = Driver()
        self._reasons: dict[torch.device, str | None] = {}
        self._gpus: dict[int, str] = {}
        self._tunings: dict[torch.device, str] = {}

    def unavailable(self, device: torch.device) -> str | None:
        """Why nothing can run directly on a device, or None."""
        try:
            return self._reasons[device]
        except KeyError:
            reason = self._reasons[device] = self._find_reason(device)
            return reason

    def _find_reason(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "the direct path launches CUDA kernels; these tensors are on a " + device.type
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        if torch.version.hip:
            return "the kernels are for NVIDIA GPUs; this torch is for AMD's"
        capability = torch.cuda.get_device_capability(device)
        if capability < (9, 0):
            low = ".".join(map(str, capability))
            return f"the kernels need compute capability 9.0 (Hopper) or newer; {device} has {low}"
        try:
            _ = self.driver.library
        except OSError as error:
            return f"libcuda does not load: {error}"
        return None

    def launches_on(self, device: torch.device) -> bool:
        """Whether calls with tensors on this device are launched directly."""
        return device.type == "cuda" and self.unavailable(device) is None

    def gpu(self, index: int) -> str:
        """The card, its capability and its driver: a program compiled for one is not used with another."""
        if index not in self._gpus:
            facts = torch.cuda.get_device_properties(index)
            driven_by = f"{self.driver.cuda_version()} {self.driver.release}"
            capability = f"sm_{facts.major}{facts.minor}"
            self._gpus[index] = f"{facts.name} {capability} driver {driven_by}"
        return self._gpus[index]

    def tuning(self, device: torch.device) -> str:
        """Whose tuning table chooses the sizes of kernels on this device, as kernel problems name it."""
        if device.type != "cuda":
            return ""
        if device not in self._tunings:
            name = torch.cuda.get_device_properties(device).name
            self._tunings[device] = tables.table_name(name)
        return self._tunings[device]

    def is_capturing(self) -> bool:
        """Whether torch's current stream is being captured into a CUDA graph."""
        return torch.cuda.is_current_stream_capturing()

    def on_device(self, index: int) -> contextlib.AbstractContextManager[Any]:
        """Makes a device torch's current one."""
        return torch.cuda.device(index)

    def start(self, index: int) -> None:
        """Makes sure that torch has a context on the device."""
        torch.cuda.current_stream(index)
        torch.cuda.init()

    def compile(self, index: int, problems: Sequence[KernelProblem]) -> list[compile_pool.Answer]:
        """As `compile_pool.compile_all`."""
        return compile_pool.compile_all(index, problems)
