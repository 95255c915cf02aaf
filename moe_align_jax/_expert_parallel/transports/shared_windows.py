"""Windows on the GPUs of several processes of one host.

Each process makes the memory of its own GPUs and hands it to the others as file descriptors, through a socket
of this host. All of them map all of it at the same address, in the order of the mesh: a program that holds
the address is the same program in every process.

Nothing of this happens while a program is traced or lowered, where a process may be alone: `connect` is a
call of its own, which every process makes, and all of them get the same answer.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_align_jax._expert_parallel.transports import cuda_memory, peer_access
from moe_align_jax._lowering import select
from moe_align_jax._simt.language import Devices
from moe_align_jax._simt.window import Window

FIRST_ADDRESS = 0x2800_0000_0000  # above the windows of a process by itself
# Processes start, compile and write files each for itself: a kernel waits ten minutes for another process.
PATIENCE = 10
_WAIT_S = 60  # for another process at its socket
_MOST_TOLD = 4096

_connected: dict[tuple[int, ...], tuple[Devices, Window]] = {}
_next_address = FIRST_ADDRESS


def find(devices: Sequence[Any], group: Devices, num_bytes: int) -> Window | None:
    """The window of a mesh's devices, if they are connected for that group of ranks and it has room."""
    found, window = _connected.get(_key(devices), (None, None))
    return window if window and found == group and window.num_bytes >= num_bytes else None


def room(group: Devices) -> int:
    """Bytes of the window of all devices; 0 where they are not connected for that group of ranks. Where
    meshes of two orders are, the fewest: a trace does not know the order."""
    return min((w.num_bytes for found, w in _connected.values() if found == group), default=0)


def connect(devices: Sequence[Any], num_bytes: int) -> str | None:
    """Makes a window for all these devices, as one group of ranks: those of all processes, in the order of
    the mesh. Every process calls it, as often as the others do.

    Returns:
        None, or why there can be none: the same text in every process.
    """
    global _next_address
    if _key(devices) in _connected:
        return None
    address = _next_address
    shared = _Shared(devices, num_bytes, address)
    try:
        every, reason = _told(shared.make)
        if reason is None:
            _, reason = _told(lambda: shared.map(every))
        if reason is None:
            _connected[_key(devices)] = (
                Devices(len(devices), 1),
                Window(address, num_bytes, PATIENCE),
            )
            # Behind an attempt that failed, in which sizes may have differed, all begin at one address again.
            _next_address = address + num_bytes * len(devices)
        return reason
    finally:
        shared.close(keep=_key(devices) in _connected)


def _key(devices: Sequence[Any]) -> tuple[int, ...]:
    return tuple(device.id for device in devices)


def _told(step: Callable[[], Any]) -> tuple[list[Any], str | None]:
    """Takes a step, and says how it went: what it gave in every process, and the first reason of any process
    against it, or None."""
    try:
        mine = {"reason": None, "gave": step()}
    except Exception as error:  # the others wait for this process' answer, whatever went wrong
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        reason = f"process {jax.process_index()}: {kind}{error}"
        mine = {"reason": reason[: _MOST_TOLD // 8], "gave": None}  # a letter is 6 bytes at most
    every = [json.loads(text) for text in _every_text(json.dumps(mine))]
    reasons = [one["reason"] for one in every if one["reason"]]
    return [one["gave"] for one in every], next(iter(reasons), None)


def _every_text(text: str) -> list[str]:
    """The texts of all processes, in order."""
    given = np.zeros(_MOST_TOLD, np.uint8)
    said = np.frombuffer(text.encode()[:_MOST_TOLD], np.uint8)
    given[: len(said)] = said
    found = multihost_utils.process_allgather(given)
    return [bytes(one).rstrip(b"\0").decode() for one in np.asarray(found)]


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

    def make(self) -> dict[str, Any]:
        """The memory of my own devices, and the socket by which others get it; what they need to know."""
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
        host = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        places = [place for place, _ in self._mine]
        # A digest: ids of many devices would not fit into what is told.
        asked = hashlib.sha256(repr((_key(self._devices), self._num_bytes)).encode()).hexdigest()
        return {"host": host, "asked": asked, "folder": self._folder.name, "places": places}

    def _serve(self, listener: socket.socket) -> None:
        for _ in range(jax.process_count() - 1):
            try:
                peer, _ = listener.accept()
            except OSError:  # closed
                return
            # One that has gone says so itself; the others still wait.
            with peer, contextlib.suppress(OSError):
                socket.send_fds(peer, [b"w"], self._files)

    def map(self, every: Sequence[dict[str, Any]]) -> None:
        """The memory of others' devices beside mine; mine is cleared."""
        driver, u64 = self._driver, ctypes.c_uint64
        me = every[jax.process_index()]
        for process, other in enumerate(every):
            if process == jax.process_index():
                continue
            if other["asked"] != me["asked"]:
                raise OSError(f"process {process} asked for other windows")
            if other["host"] != me["host"]:
                raise OSError(f"process {process} is on another host")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
                peer.settimeout(_WAIT_S)
                peer.connect(str(Path(other["folder"]) / "windows"))
                most = len(other["places"])
                _, files, _, _ = socket.recv_fds(peer, 1, most, socket.MSG_CMSG_CLOEXEC)
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
