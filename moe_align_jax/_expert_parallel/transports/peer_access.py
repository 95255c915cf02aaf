"""Whether the GPUs of this process reach each other's memory, asked of the CUDA driver (cuda.h) once."""

import ctypes
import functools
import itertools
from typing import Any

import jax

_NATIVE_ATOMIC_SUPPORTED = 3  # CU_DEVICE_P2P_ATTRIBUTE_*


@functools.cache
def missing() -> str | None:
    """Why a kernel on one GPU cannot write to another's memory, or None.

    Atomic additions count too, by which the kernels signal: NVLink has them, PCIe has not. A process without
    two GPUs, which lowers for some that are elsewhere, asks nothing and gets None.
    """
    gpus = [device for device in jax.local_devices() if device.platform == "gpu"]
    if len(gpus) < 2:
        return None
    try:
        return _ask(library(), [device.local_hardware_id for device in gpus])
    except OSError as error:
        return f"the CUDA driver cannot be asked whether GPUs reach each other: {error}"


def library() -> Any:
    """The CUDA driver. OSError: there is none."""
    return ctypes.CDLL("libcuda.so.1")


def _ask(cuda: Any, ordinals: list[int]) -> str | None:
    def call(name: str, *arguments: Any) -> int:
        """The int that the driver writes to the first argument."""
        value = ctypes.c_int()
        if error := getattr(cuda, name)(ctypes.byref(value), *arguments):
            raise OSError(f"{name} failed (CUDA driver error {error})")
        return value.value

    if error := cuda.cuInit(0):
        raise OSError(f"cuInit failed (CUDA driver error {error})")
    handles = {ordinal: call("cuDeviceGet", ordinal) for ordinal in ordinals}
    for a, b in itertools.permutations(ordinals, 2):
        if not call("cuDeviceCanAccessPeer", handles[a], handles[b]):
            return f"GPU {a} cannot reach the memory of GPU {b}"
        attribute = _NATIVE_ATOMIC_SUPPORTED
        if not call("cuDeviceGetP2PAttribute", attribute, handles[a], handles[b]):
            return f"GPU {a} cannot add atomically in the memory of GPU {b}: no NVLink joins them"
    return None
