"""Windows on the GPUs of this process: memory of CUDA's driver (cuda.h), beside what XLA has.

One range of addresses holds the windows of a mesh, in its order; behind each is memory of its GPU, which all
of the mesh may read and write. XLA could move or free an array of its own, an allocator of its could give it
no access, and an address that changes from process to process would spoil jax's compilation cache: a program
holds the address. So the range is asked for where no other allocation is, and most often is the same in each
process.

A window lives as long as the process. Programs that were compiled for it stay right, whatever happens to
jax's caches, arrays and clients.
"""

import ctypes
import functools
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import jax

from moe_align_jax._expert_parallel.transports import cuda_memory, peer_access, shared_windows
from moe_align_jax._simt import window
from moe_align_jax._simt.language import Devices, Kernel
from moe_align_jax._simt.window import Window

# A window has the first of these sizes that is enough: few windows, for the sizes that a program has.
SIZES = tuple(megabytes << 20 for megabytes in (16, 64, 256))
FIRST_ADDRESS = 0x2000_0000_0000  # below what Linux gives to mmap, above what CUDA asks for

_windows: dict[Any, Window] = {}
_lock = threading.Lock()
_next_address = FIRST_ADDRESS


def for_kernel(kernel: Kernel, mesh: Any) -> Window | None:
    """A window that the kernel can use on the GPUs of a mesh; None where there can be none: the kernel needs
    more, or the program is not for GPUs of this process."""
    needed = window.bytes_needed(kernel)
    if window.unsupported(kernel) or needed > SIZES[-1]:
        return None
    devices = [*mesh.devices.flat] if isinstance(mesh, jax.sharding.Mesh) else []
    if jax.process_count() > 1:
        assert kernel.devices is not None
        return shared_windows.find(devices, kernel.devices, needed)
    here = set(jax.local_devices())
    if not devices or any(d.platform != "gpu" or d not in here for d in devices):
        return None
    assert kernel.devices is not None
    try:
        return find(devices, kernel.devices, needed)
    except OSError as error:
        what = (
            f"transport 'nvlink_window' has no memory of its own and goes as 'nvlink' does: {error}"
        )
        warnings.warn(what, RuntimeWarning, stacklevel=2)
        return None


def find(devices: Sequence[Any], group: Devices, num_bytes: int) -> Window:
    """The window of a mesh's devices, for the groups of ranks in it. It is made if there is none yet.

    Groups that differ have windows that differ: a window's epochs count the kernels that its groups run
    together.

    Raises:
        OSError: the driver cannot make it.
        ValueError: more bytes than windows have.
    """
    size = next((size for size in SIZES if size >= num_bytes), None)
    if size is None:
        raise ValueError(f"a window has at most {SIZES[-1]} bytes; {num_bytes} are needed")
    ordinals = tuple(device.local_hardware_id for device in devices)
    key = ordinals, group, size
    with _lock:
        if key not in _windows:
            _windows[key] = Window(
                _make(cuda_memory.Driver(peer_access.library()), ordinals, size), size
            )
        return _windows[key]


@functools.cache
def missing() -> str | None:
    """Why this process cannot make windows, or None; a process without two GPUs asks nothing."""
    gpus = [device for device in jax.local_devices() if device.platform == "gpu"]
    if len(gpus) < 2:
        return None
    try:
        driver = cuda_memory.Driver(peer_access.library())
        for device in gpus:
            if not driver.number(
                "cuDeviceGetAttribute",
                cuda_memory.VMM_SUPPORTED,
                driver.device(device.local_hardware_id),
            ):
                return f"GPU {device.local_hardware_id} cannot map memory at an address"
    except OSError as error:
        return f"the CUDA driver cannot be asked for memory: {error}"
    return None


def _make(driver: cuda_memory.Driver, ordinals: Sequence[int], size: int) -> int:
    """The address of zeroed windows, one after the other, on these GPUs."""
    global _next_address
    u64, total = ctypes.c_uint64, size * len(ordinals)
    properties = [cuda_memory.properties(driver.device(ordinal)) for ordinal in ordinals]
    address = driver.word("cuMemAddressReserve", u64(total), u64(0), u64(_next_address), u64(0))
    mapped = 0
    try:
        for one in properties:
            handle = driver.word("cuMemCreate", u64(size), ctypes.byref(one), u64(0))
            try:
                driver("cuMemMap", u64(address + mapped), u64(size), u64(0), u64(handle), u64(0))
            finally:
                driver("cuMemRelease", u64(handle))  # the mapping keeps the memory
            mapped += size
        locations = [one.location for one in properties]
        cuda_memory.give_access(driver, address, total, locations)
        for number, ordinal in enumerate(ordinals):
            cuda_memory.clear(driver, ordinal, address + number * size, size)
    except OSError:
        if mapped:
            driver("cuMemUnmap", u64(address), u64(mapped))
        driver("cuMemAddressFree", u64(address), u64(total))
        raise
    _next_address = max(_next_address, address + total)
    return address
