"""One of several processes that connect windows over a driver of their own making: `python -m
tests.expert_parallel.windows_process COORDINATOR PROCESSES NUMBER [what fails]`.

Memory is a file in memory, which this driver maps at places of its own: what a process writes to a window
another one is to read there. Prints what `connect` said, and what is mapped after it. What fails is a call
of the driver, or "error", an error that is not the driver's, or "size": this process asks for another one.
"""

import ctypes
import os
import sys
from pathlib import Path

import jax

from moe_align_jax._expert_parallel.transports import peer_access, shared_windows
from moe_align_jax._lowering import select
from moe_align_jax._simt.language import Devices

SIZE = 1 << 12


class Driver:
    """Of CUDA, with files for memory; a call named in `failing` fails."""

    def __init__(self, failing=""):
        self.failing, self.reserved, self.mapped = failing, None, {}
        self.access, self.cleared, self.open = [], [], 0

    def __getattr__(self, name):
        def call(*arguments):
            if name == self.failing:
                return 801
            plain = [a.value if isinstance(a, ctypes._SimpleCData) else a for a in arguments]
            found = getattr(self, f"_{name}", lambda *_: None)(*plain)
            if found is not None:
                arguments[0]._obj.value = found
            return 0

        if name.startswith("_"):
            raise AttributeError(name)
        return call

    def _cuDeviceGet(self, _, ordinal):
        return ordinal

    def _cuDeviceGetAttribute(self, *_):
        return 1

    def _cuMemAddressReserve(self, _, total, alignment, address, flags):
        self.reserved = (address, total)
        return address

    def _cuMemAddressFree(self, address, total):
        assert self.reserved == (address, total)
        self.reserved = None

    def _cuMemCreate(self, _, size, properties, flags):
        assert properties._obj.handle_types == 1
        self.open += 1
        file = os.memfd_create("window")
        os.write(file, f"of process {jax.process_index()}".encode())
        return file

    def _cuMemExportToShareableHandle(self, _, handle, kind, flags):
        assert kind == 1
        return os.dup(handle)

    def _cuMemImportFromShareableHandle(self, _, file, kind):
        assert kind == 1
        self.open += 1
        return os.dup(file)

    def _cuMemMap(self, start, size, offset, handle, flags):
        self.mapped[start] = os.pread(handle, 100, 0).decode()

    def _cuMemUnmap(self, start, size):
        del self.mapped[start]

    def _cuMemRelease(self, handle):
        self.open -= 1
        os.close(handle)

    def _cuMemSetAccess(self, address, total, access, count):
        if self.failing == "error":
            raise ValueError("not of the driver")
        self.access.append((address, total, [one.location.id for one in access]))

    def _cuDevicePrimaryCtxRetain(self, *_):
        return 7

    def _cuMemsetD32_v2(self, start, value, words):
        self.cleared.append((start, value, words))

    def _cuCtxPopCurrent_v2(self, _):
        return 7


def main() -> None:
    coordinator, processes, number, *failing = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, int(processes), int(number))
    driver = Driver(*failing)
    peer_access.library = lambda: driver
    select.kernels_unavailable = lambda platform: None  # these devices are CPUs
    devices, first = jax.devices(), shared_windows.FIRST_ADDRESS
    reason = shared_windows.connect(devices, 2 * SIZE if driver.failing == "size" else SIZE)
    print("said", reason)
    print("mapped", [driver.mapped.get(first + n * SIZE) for n in range(len(devices))])
    group = Devices(len(devices), 1)
    window = shared_windows.find(devices, group, SIZE)
    assert driver.open == 0, "a handle was not released"
    folder = Path("/proc/self/fd")
    files = [os.readlink(file) for file in folder.iterdir() if file.is_symlink() and file.exists()]
    assert not any("window" in name for name in files), "a file stays open"
    if reason is None:
        assert shared_windows.connect(devices, SIZE) is None  # once more: nothing to do
        assert window is not None and (window.address, window.num_bytes) == (first, SIZE)
        assert shared_windows.find(devices[::-1], group, SIZE) is None
        assert shared_windows.find(devices, Devices(1, 2), SIZE) is None
        assert shared_windows.find(devices, group, SIZE + 1) is None
        assert (shared_windows.room(group), shared_windows.room(Devices(1, 2))) == (SIZE, 0)
        mine = [first + devices.index(own) * SIZE for own in jax.local_devices()]
        assert driver.cleared == [(start, 0, SIZE // 4) for start in mine]
        ordinals = [own.local_hardware_id for own in jax.local_devices()]
        assert driver.access == [(first, len(devices) * SIZE, ordinals)]
    else:
        assert window is None and shared_windows.room(group) == 0
        assert driver.reserved is None and not driver.mapped
        driver.failing = ""
        assert shared_windows.connect(devices, SIZE) is None  # once more, and all at one address
        again = shared_windows.find(devices, group, SIZE)
        assert again is not None and again.address == first


if __name__ == "__main__":
    main()
