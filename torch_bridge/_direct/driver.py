"""The few calls of the CUDA driver that a launch takes, through ctypes. Imports neither torch nor jax.

Everything here is the driver's public API (cuda.h).
"""

import ctypes
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

_SUCCESS = 0
DEVICE_UNAVAILABLE, _CAPTURE_INVALIDATED = 46, 901  # CUDA_ERROR_*
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_*
_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # CU_LAUNCH_ATTRIBUTE_*
_JIT_INPUT_PTX = 1
_CAPTURE_HINT = (
    " Another call ended the capture, perhaps a thread of jax's GPU client: where that lives in the process, "
    'capture with torch.cuda.graph(..., capture_error_mode="thread_local").'
)
_COMPUTE_MODE, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 20, 75, 76  # CU_DEVICE_ATTRIBUTE_*
_KERNEL_MODULE = Path("/proc/driver/nvidia/version")


class DriverError(RuntimeError):
    """A call of the CUDA driver failed, with this `code`."""

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.code = code


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z")),
        *((name, ctypes.c_uint) for name in ("block_x", "block_y", "block_z")),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """libcuda; OSError where there is none."""
    cuda = ctypes.CDLL("libcuda.so.1")
    for name in ("cuModuleLoadData", "cuModuleUnload", "cuCtxSetCurrent"):
        getattr(cuda, name).argtypes = [ctypes.c_void_p] * (2 if "Load" in name else 1)
    return cuda


def check(result: int, what: str) -> None:
    if result == _SUCCESS:
        return
    text = ctypes.c_char_p()
    library().cuGetErrorString(result, ctypes.byref(text))
    reason = text.value.decode() if text.value else "unknown error"
    hint = _CAPTURE_HINT if result == _CAPTURE_INVALIDATED else ""
    raise DriverError(f"{what} failed: {reason} (CUDA driver error {result}).{hint}", result)


def driver_version() -> int:
    version = ctypes.c_int()
    check(library().cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")
    return version.value


class _LibraryOf(ctypes.Structure):
    _fields_ = [("file", ctypes.c_char_p), *((x, ctypes.c_void_p) for x in ("at", "name", "value"))]


def file_of(function: Any) -> str:
    """The file that a foreign function was loaded from; "" where that is not to be had."""
    found, address = _LibraryOf(), ctypes.cast(function, ctypes.c_void_p)
    try:
        known = ctypes.CDLL(None).dladdr(address, ctypes.byref(found))
    except AttributeError:  # another C library than glibc
        known = 0
    return os.path.realpath(os.fsdecode(found.file)) if known and found.file else ""


@functools.cache
def release() -> str:
    """The driver's release, such as 580.159.04; "" where nobody says it.

    Many releases share one `driver_version`, that of CUDA, and each may bring another assembler. What is
    loaded counts (its file is named so), then what the kernel runs.
    """
    if named := re.search(
        r"libcuda\.so\.(\d{3,}\.\d[\d.]*)$", file_of(library().cuDriverGetVersion)
    ):
        return named[1]
    try:
        said = re.search(r"\s(\d{3,}\.\d[\d.]*)\s", _KERNEL_MODULE.read_text())
    except (OSError, ValueError):
        return ""
    return said[1] if said else ""


@functools.cache
def primary_context(device: int) -> ctypes.c_void_p:
    """The context that the CUDA runtime (so torch) uses; kept for the life of the process."""
    cuda, context, handle = library(), ctypes.c_void_p(), ctypes.c_int()
    check(cuda.cuInit(0), "cuInit")
    check(cuda.cuDeviceGet(ctypes.byref(handle), device), f"cuDeviceGet({device})")
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain")
    return context


def enter(device: int) -> None:
    """Makes the device's context current in this thread."""
    check(library().cuCtxSetCurrent(primary_context(device)), "cuCtxSetCurrent")


def _attribute(device: int, attribute: int) -> int:
    cuda, handle, value = library(), ctypes.c_int(), ctypes.c_int()
    check(cuda.cuInit(0), "cuInit")
    check(cuda.cuDeviceGet(ctypes.byref(handle), device), f"cuDeviceGet({device})")
    check(cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle), "cuDeviceGetAttribute")
    return value.value


def capability(device: int) -> tuple[int, int]:
    return _attribute(device, _CAPABILITY_MAJOR), _attribute(device, _CAPABILITY_MINOR)


def compute_mode(device: int) -> int:
    """0: any number of processes. Others let in one, or none."""
    return _attribute(device, _COMPUTE_MODE)


def assemble(ptx: str) -> bytes:
    """PTX to a cubin for the current context's device, by the driver's own assembler."""
    cuda = library()
    state, image, size = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()
    check(cuda.cuLinkCreate_v2(0, None, None, ctypes.byref(state)), "cuLinkCreate")
    try:
        text = ptx.encode() + b"\0"
        check(
            cuda.cuLinkAddData_v2(
                state, _JIT_INPUT_PTX, text, ctypes.c_size_t(len(text)), b"kernel", 0, None, None
            ),
            "assembling the kernel (cuLinkAddData)",
        )
        check(cuda.cuLinkComplete(state, ctypes.byref(image), ctypes.byref(size)), "cuLinkComplete")
        return ctypes.string_at(image, size.value)
    finally:
        cuda.cuLinkDestroy(state)


def synchronize() -> None:
    check(library().cuCtxSynchronize(), "running a kernel")


class Memory:
    """Device memory of our own, for proving a program."""

    def __init__(self, size: int):
        self._address, self._size = ctypes.c_uint64(), max(size, 4)
        check(
            library().cuMemAlloc_v2(ctypes.byref(self._address), ctypes.c_size_t(self._size)),
            f"allocating {size} bytes",
        )

    @property
    def address(self) -> int:
        return self._address.value

    def fill(self, word: int) -> None:
        count = ctypes.c_size_t(self._size // 4)
        check(library().cuMemsetD32_v2(self._address, ctypes.c_uint(word), count), "cuMemset")

    def write(self, array) -> None:
        """From a contiguous NumPy array."""
        source, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        check(library().cuMemcpyHtoD_v2(self._address, source, size), "cuMemcpyHtoD")

    def read(self, array):
        """Into a contiguous NumPy array, which is returned."""
        target, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        check(library().cuMemcpyDtoH_v2(target, self._address, size), "cuMemcpyDtoH")
        return array

    def free(self) -> None:
        library().cuMemFree_v2(self._address)


class Function:
    """One kernel, loaded into the current context and ready to launch."""

    def __init__(self, cubin: bytes, entry: str):
        cuda = library()
        self._module, self.handle = ctypes.c_void_p(), ctypes.c_void_p()
        check(cuda.cuModuleLoadData(ctypes.byref(self._module), cubin), f"loading {entry}")
        check(
            cuda.cuModuleGetFunction(ctypes.byref(self.handle), self._module, entry.encode()),
            f"finding {entry}",
        )

    def allow_shared(self, size: int) -> None:
        check(
            library().cuFuncSetAttribute(self.handle, _MAX_DYNAMIC_SHARED_SIZE_BYTES, size),
            f"asking for {size} bytes of shared memory",
        )


class LaunchSpec(NamedTuple):
    """A kernel and how it is launched.

    Attributes:
        function: the loaded kernel.
        grid, cluster, block: CTAs of the grid and of a cluster, and threads, in x, y, z.
        shared_bytes: dynamic shared memory.
        parameters: for each 64-bit parameter, its position among a program's values.
    """

    function: Function
    grid: Sequence[int]
    cluster: Sequence[int]
    block: Sequence[int]
    shared_bytes: int
    parameters: tuple[int, ...]


class Launches:
    """Kernels launched one after the other, with the memory that their arguments are read from.

    Not for two threads at once: a thread makes its own. Each kernel may start before the one ahead of it
    has ended (programmatic dependent launch), and waits for it where it must.

    Attributes:
        values: a 64-bit word per value of the program. The driver copies them at each launch.
        kept, kept_is_next: for whoever fills `values`: memory that they may point to, and whether they do.
    """

    kept: Any = None
    kept_is_next = False

    def __init__(self, specs: Sequence[LaunchSpec], num_values: int):
        self.values = (ctypes.c_uint64 * num_values)()
        self._stream: int | None = None
        self._configs, self._pointers, self._arguments, self._attributes = [], [], [], []
        start = ctypes.addressof(self.values)
        # Without argtypes, and with arguments made once, ctypes converts nothing at a call: half the time.
        pointer = ctypes.c_void_p.from_param
        for spec in specs:
            places = [start + 8 * position for position in spec.parameters]
            pointers = (ctypes.c_void_p * len(places))(*places)
            attributes = (_Attribute * 2)()
            attributes[0].id, attributes[0].value[0] = _PROGRAMMATIC_STREAM_SERIALIZATION, 1
            attributes[1].id, attributes[1].value[:3] = _CLUSTER_DIMENSION, list(spec.cluster)
            in_clusters = any(size > 1 for size in spec.cluster)
            config = _LaunchConfig(
                *spec.grid, *spec.block, spec.shared_bytes, None, attributes, 1 + in_clusters
            )
            self._attributes.append(attributes)
            self._configs.append(config)
            self._pointers.append(pointers)
            addresses = (ctypes.addressof(config), spec.function.handle.value)
            addresses += (ctypes.addressof(pointers), 0)
            self._arguments.append(tuple([pointer(address) for address in addresses]))
        self._launch = library().cuLaunchKernelEx

    def enqueue(self, stream: int) -> None:
        """Enqueues the kernels, with what `values` holds now."""
        if stream != self._stream:
            for config in self._configs:
                config.stream = stream
            self._stream = stream
        launch = self._launch
        for config, function, arguments, extra in self._arguments:
            if result := launch(config, function, arguments, extra):
                check(result, "launching a kernel")
