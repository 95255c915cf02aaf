"""Windows on the GPUs of several processes of one host.

Each process makes the memory of its own GPUs and hands it to the others as file descriptors, through a socket
of this host. All of them map all of it at the same address, in the order of the mesh: a program that holds
the address is the same program in every process.

Nothing of this happens while a program is traced or lowered, where a process may be alone: `connect` is a
call of its own, which every process makes, and all of them get the same answer.
"""

import ctypes
import json
import os
import socket
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from moe_align_jax._expert_parallel.transports import cuda_memory, peer_access
from moe_align_jax._lowering import select
from moe_align_jax._simt.language import Devices
from moe_align_jax._simt.window import Window

FIRST_ADDRESS = 0x2800_0000_0000  # above the windows of a process by itself
_WAIT_S = 60  # for another process

_connected: dict[tuple[int, ...], tuple[Devices, Window]] = {}
_connects = 0
_next_address = FIRST_ADDRESS


def find(devices: Sequence[Any], group: Devices, num_bytes: int) -> Window | None:
    """The window of a mesh's devices, if they are connected for that group of ranks and it has room."""
    found, window = _connected.get(_key(devices), (None, None))
    return window if window and found == group and window.num_bytes >= num_bytes else None


def room(group: Devices) -> int:
    """Bytes of the window of all devices; 0 where they are not connected for that group of ranks."""
    return max((w.num_bytes for found, w in _connected.values() if found == group), default=0)


def connect(devices: Sequence[Any], num_bytes: int) -> str | None:
    """Makes a window for all these devices, as one group of ranks: those of all processes, in the order of
    the mesh. Every process calls it, as often as the others do.

    Returns:
        None, or why there can be none: the same text in every process.

    Raises:
        RuntimeError: a process did not come within a minute.
    """
    global _connects, _next_address
    if _key(devices) in _connected:
        return None
    number, _connects = _connects, _connects + 1
    address, _next_address = _next_address, _next_address + num_bytes * len(devices)
    every = _Every(number)
    shared = _Shared(devices, num_bytes, address)
    try:
        reason = every.tell("made", shared.make, shared.about)
        reason = reason or every.tell("mapped", lambda: shared.map(every.told["made"]), str)
        if reason is None:
            _connected[_key(devices)] = Devices(len(devices), 1), Window(address, num_bytes)
        return reason
    finally:
        shared.close(keep=_key(devices) in _connected)


def _key(devices: Sequence[Any]) -> tuple[int, ...]:
    return tuple(device.id for device in devices)


class _Every:
    """What all processes say of a step."""

    def __init__(self, number: int):
        from jax._src import distributed

        self._client = distributed.global_state.client
        self._place = f"moe_align_jax/windows/{number}"
        self.told: dict[str, list[Any]] = {}

    def tell(self, step: str, do: Any, about: Any) -> str | None:
        """Takes a step, and says how it went: the first reason of any process against it, or None."""
        try:
            do()
            mine = {"reason": None, "about": about()}
        except OSError as error:
            mine = {"reason": f"process {jax.process_index()}: {error}", "about": None}
        place = f"{self._place}/{step}"
        self._client.key_value_set(f"{place}/{jax.process_index()}", json.dumps(mine))
        try:
            every = [
                json.loads(
                    self._client.blocking_key_value_get(f"{place}/{process}", _WAIT_S * 1000)
                )
                for process in range(jax.process_count())
            ]
        except Exception as error:
            what = f"not every process has called it: {str(error)[:200]}"
            raise RuntimeError(what) from error
        self.told[step] = [one["about"] for one in every]
        return next((one["reason"] for one in every if one["reason"]), None)


class _Shared:
    """The windows of all devices, as this process has them."""

    def __init__(self, devices: Sequence[Any], num_bytes: int, address: int):
        self._devices, self._num_bytes, self._address = devices, num_bytes, address
        self._files: list[int] = []
        self._mapped: list[int] = []
        self._reserved = False
        self._folder: Any = None
        self._listener: socket.socket | None = None

    @property
    def _mine(self) -> list[tuple[int, Any]]:
        """(place in the mesh, device) of mine."""
        here = jax.process_index()
        return [(n, d) for n, d in enumerate(self._devices) if d.process_index == here]

    def make(self) -> None:
        """The memory of my own devices, and the socket by which others get it."""
        for _, device in self._mine:
            platform = "cuda" if device.platform == "gpu" else device.platform
            if reason := select.kernels_unavailable(platform):
                raise OSError(reason)
        driver = self._driver = cuda_memory.Driver(peer_access.library())
        u64 = ctypes.c_uint64
        total = self._num_bytes * len(self._devices)
        found = driver.word("cuMemAddressReserve", u64(total), u64(0), u64(self._address), u64(0))
        if found != self._address:
            driver("cuMemAddressFree", u64(found), u64(total))
            raise OSError(f"the address {self._address:#x} is taken")
        self._reserved = True
        for place, device in self._mine:
            ordinal = driver.device(device.local_hardware_id)
            for attribute in (cuda_memory.VMM_SUPPORTED, cuda_memory.FILES_SUPPORTED):
                if not driver.number("cuDeviceGetAttribute", attribute, ordinal):
                    raise OSError(f"GPU {device.local_hardware_id} cannot share memory")
            properties = cuda_memory.properties(ordinal, cuda_memory.FILE_DESCRIPTOR)
            handle = driver.word(
                "cuMemCreate", u64(self._num_bytes), ctypes.byref(properties), u64(0)
            )
            try:
                self._map(place, handle)
                self._files.append(
                    driver.number(
                        "cuMemExportToShareableHandle",
                        u64(handle),
                        cuda_memory.FILE_DESCRIPTOR,
                        u64(0),
                    )
                )
            finally:
                driver("cuMemRelease", u64(handle))
        self._folder = tempfile.TemporaryDirectory()  # for this user alone
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(Path(self._folder.name) / "windows"))
        self._listener.listen(jax.process_count())
        threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()

    def about(self) -> dict[str, Any]:
        """What others need to know."""
        host = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        places = [place for place, _ in self._mine]
        return {"host": host, "folder": self._folder.name, "places": places}

    def _serve(self, listener: socket.socket) -> None:
        for _ in range(jax.process_count() - 1):
            try:
                with listener.accept()[0] as peer:
                    socket.send_fds(peer, [b"w"], self._files)
            except OSError:
                return

    def map(self, every: Sequence[dict[str, Any]]) -> None:
        """The memory of others' devices beside mine; mine is cleared."""
        driver, u64 = self._driver, ctypes.c_uint64
        me = every[jax.process_index()]
        for process, other in enumerate(every):
            if process == jax.process_index():
                continue
            if other["host"] != me["host"]:
                raise OSError(f"process {process} is on another host")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
                peer.settimeout(_WAIT_S)
                peer.connect(str(Path(other["folder"]) / "windows"))
                _, files, _, _ = socket.recv_fds(peer, 1, len(other["places"]))
            try:
                if len(files) != len(other["places"]):
                    raise OSError(f"process {process} gave {len(files)} files")
                for place, file in zip(other["places"], files, strict=True):
                    handle = driver.word(
                        "cuMemImportFromShareableHandle",
                        ctypes.c_void_p(file),
                        cuda_memory.FILE_DESCRIPTOR,
                    )
                    try:
                        self._map(place, handle)
                    finally:
                        driver("cuMemRelease", u64(handle))
            finally:
                for file in files:
                    os.close(file)
        locations = [
            cuda_memory.properties(driver.device(d.local_hardware_id)).location
            for _, d in self._mine
        ]
        total = self._num_bytes * len(self._devices)
        cuda_memory.give_access(driver, self._address, total, locations)
        for place, device in self._mine:
            start = self._address + place * self._num_bytes
            cuda_memory.clear(driver, device.local_hardware_id, start, self._num_bytes)

    def _map(self, place: int, handle: int) -> None:
        u64, start = ctypes.c_uint64, self._address + place * self._num_bytes
        self._driver("cuMemMap", u64(start), u64(self._num_bytes), u64(0), u64(handle), u64(0))
        self._mapped.append(start)

    def close(self, *, keep: bool) -> None:
        """The socket and the files; without `keep` the memory as well."""
        if self._listener:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that listens
            self._listener.close()
        if self._folder:
            self._folder.cleanup()
        for file in self._files:
            os.close(file)
        if keep:
            return
        u64 = ctypes.c_uint64
        for start in self._mapped:
            self._driver("cuMemUnmap", u64(start), u64(self._num_bytes))
        if self._reserved:
            total = self._num_bytes * len(self._devices)
            self._driver("cuMemAddressFree", u64(self._address), u64(total))
