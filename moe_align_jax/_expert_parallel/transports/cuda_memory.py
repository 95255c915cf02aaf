"""Memory by CUDA's driver (cuda.h), at addresses that are asked for."""

import ctypes
from collections.abc import Sequence
from typing import Any

VMM_SUPPORTED, FILES_SUPPORTED = 102, 103  # CU_DEVICE_ATTRIBUTE_*
FILE_DESCRIPTOR = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_DEVICE_MEMORY, _PINNED, _READ_WRITE = 1, 1, 3


class Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("win32_metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", Location), ("flags", ctypes.c_int)]


class Driver:
    def __init__(self, cuda: Any):
        self._cuda = cuda
        self("cuInit", 0)

    def __call__(self, name: str, *arguments: Any) -> None:
        function = getattr(self._cuda, name, None)
        if function is None:
            raise OSError(f"it has no {name}")
        if error := function(*arguments):
            raise OSError(f"{name} failed (CUDA driver error {error})")

    def number(self, name: str, *arguments: Any) -> int:
        """What the driver writes to the first argument."""
        value = ctypes.c_int()
        self(name, ctypes.byref(value), *arguments)
        return value.value

    def word(self, name: str, *arguments: Any) -> int:
        """The same of 64 bits."""
        value = ctypes.c_uint64()
        self(name, ctypes.byref(value), *arguments)
        return value.value

    def device(self, ordinal: int) -> int:
        return self.number("cuDeviceGet", ordinal)


def properties(device: int, handle_types: int = 0) -> Properties:
    """Of memory on a device, which can leave the process by handles of these types."""
    location = Location(_DEVICE_MEMORY, device)
    return Properties(type=_PINNED, handle_types=handle_types, location=location)


def give_access(
    driver: Driver, address: int, num_bytes: int, locations: Sequence[Location]
) -> None:
    """Lets devices read and write all of a range of addresses."""
    access = (Access * len(locations))(*[Access(one, _READ_WRITE) for one in locations])
    u64 = ctypes.c_uint64
    driver("cuMemSetAccess", u64(address), u64(num_bytes), access, u64(len(locations)))


def clear(driver: Driver, ordinal: int, address: int, size: int) -> None:
    # The context that XLA has, too; it is never given back, as the window is not.
    context = driver.word("cuDevicePrimaryCtxRetain", driver.device(ordinal))
    driver("cuCtxPushCurrent_v2", ctypes.c_uint64(context))
    try:
        driver("cuMemsetD32_v2", ctypes.c_uint64(address), 0, ctypes.c_uint64(size // 4))
        driver("cuStreamSynchronize", None)
    finally:
        driver.word("cuCtxPopCurrent_v2")
