"""The few functions of the CUDA driver that a launch takes, called through ctypes. No torch, no jax.

Two kinds of processes use it: the user's, which loads and launches, and the one that compiles
(compile_worker.py), which also assembles and tests. Everything here is the driver's public API (cuda.h).

Why not `cuda.bindings`: torch's wheels on PyPI require it (2.11 to 2.14, Linux, from 2.13 on for Python
below 3.15), but a torch from elsewhere (conda, a container, a build from source) need not bring
it. The launch itself would stay in ctypes, where arguments are prepared once and a call converts nothing.
Two bindings to one library would be more to trust than these functions are.
"""

import ctypes
import functools
import os
import re
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
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
_MAX_BLOCKS = 1024  # of descriptors of a kernel that a thread keeps
KERNEL_MODULE_VERSION = Path("/proc/driver/nvidia/version")


class DriverError(RuntimeError):
    """A call of the CUDA driver failed, with this `code`."""

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.code = code


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z")),
        *((name, ctypes.c_uint) for name in ("block_x", "block_y", "block_z")),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    ]


class _LibraryOf(ctypes.Structure):
    """Dl_info of dlfcn.h."""

    _fields_ = [("file", ctypes.c_char_p), *((x, ctypes.c_void_p) for x in ("at", "name", "value"))]


def file_of(function: Any) -> str:
    """The file that a ctypes function was loaded from; "" where the C library does not say."""
    found, address = _LibraryOf(), ctypes.cast(function, ctypes.c_void_p)
    try:
        known = ctypes.CDLL(None).dladdr(address, ctypes.byref(found))
    except AttributeError:  # another C library than glibc
        known = 0
    return os.path.realpath(os.fsdecode(found.file)) if known and found.file else ""


# The parameter of a kernel that holds its TMA descriptors (host_code.py), and its place in a `LaunchSpec`.
_TENSOR_MAPS, _BY_VALUE = "*tensor maps", -1
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64  # of CUtensorMap
_SIZE_SHIFT = 8  # a size is given times 256, like the pointers beside it


class BoundTensorMap(NamedTuple):
    """How an array is copied by TMA: the arguments of `cuTensorMapEncodeTiled`, but for its address.

    Attributes:
        address: position of the array's pointer among the program's values.
        rows: position of the value that tells the size of dimension `axis`, times 256; -1 for none.
        axis: see `rows`.
        dtype, sizes, strides, box, swizzle: as in `host_code.TensorMap`.
    """

    address: int
    rows: int
    axis: int
    dtype: int
    sizes: Sequence[int]
    strides: Sequence[int]
    box: Sequence[int]
    swizzle: int


class LaunchSpec(NamedTuple):
    """A loaded kernel and how it is launched.

    Attributes:
        function: the kernel's CUfunction.
        grid, cluster, block: CTAs of the grid and of a cluster, and threads, in x, y, z.
        shared_bytes: dynamic shared memory.
        parameters: for each 64-bit parameter, its position among the program's values; -1 for the
            parameter that holds the descriptors.
        tensor_maps: these, in order.
        waits: whether the kernel itself waits for the one ahead of it (programmatic dependent launch).
    """

    function: int
    grid: Sequence[int]
    cluster: Sequence[int]
    block: Sequence[int]
    shared_bytes: int
    parameters: tuple[int, ...]
    tensor_maps: tuple[BoundTensorMap, ...] = ()
    waits: bool = True


class Driver:
    """The CUDA driver of this process.

    Args:
        library: libcuda, or in tests an object with the same functions. None loads libcuda at its first use.

    A method that calls the driver raises DriverError where that call fails.
    """

    def __init__(self, library: Any = None):
        if library is not None:
            self.library = library
        self._contexts: dict[int, ctypes.c_void_p] = {}

    @functools.cached_property
    def library(self) -> Any:
        """libcuda.

        Raises:
            OSError: there is none.
        """
        cuda = ctypes.CDLL("libcuda.so.1")
        for name in ("cuModuleLoadData", "cuModuleUnload", "cuCtxSetCurrent"):
            getattr(cuda, name).argtypes = [ctypes.c_void_p] * (2 if "Load" in name else 1)
        return cuda

    def check(self, result: int, what: str) -> None:
        """Raises DriverError unless `result` is CUDA_SUCCESS; `what` names what was tried."""
        if result == _SUCCESS:
            return
        text = ctypes.c_char_p()
        self.library.cuGetErrorString(result, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown error"
        hint = _CAPTURE_HINT if result == _CAPTURE_INVALIDATED else ""
        raise DriverError(f"{what} failed: {reason} (CUDA driver error {result}).{hint}", result)

    # -- what is installed ----------------------------------------------------------------------

    def cuda_version(self) -> int:
        """The newest CUDA that the driver supports, such as 13000."""
        version = ctypes.c_int()
        self.check(self.library.cuDriverGetVersion(ctypes.byref(version)), "asking for the version")
        return version.value

    @functools.cached_property
    def release(self) -> str:
        """The driver's release, such as 580.159.04; "" where nothing tells it.

        Many releases share one `cuda_version`, and each may bring another assembler. The file that is loaded
        tells it by its name; if not, the version file of the kernel module does.
        """
        if named := re.search(
            r"libcuda\.so\.(\d{3,}\.\d[\d.]*)$", file_of(self.library.cuDriverGetVersion)
        ):
            return named[1]
        try:
            said = re.search(r"\s(\d{3,}\.\d[\d.]*)\s", KERNEL_MODULE_VERSION.read_text())
        except (OSError, ValueError):
            return ""
        return said[1] if said else ""

    def capability(self, device: int) -> tuple[int, int]:
        """Compute capability, such as (9, 0)."""
        return self._attribute(device, _CAPABILITY_MAJOR), self._attribute(
            device, _CAPABILITY_MINOR
        )

    def compute_mode(self, device: int) -> int:
        """0 lets any number of processes use the device; other modes let in one, or none."""
        return self._attribute(device, _COMPUTE_MODE)

    def _attribute(self, device: int, attribute: int) -> int:
        cuda, handle, value = self.library, ctypes.c_int(), ctypes.c_int()
        self.check(cuda.cuInit(0), "cuInit")
        self.check(cuda.cuDeviceGet(ctypes.byref(handle), device), f"cuDeviceGet({device})")
        self.check(
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle),
            "cuDeviceGetAttribute",
        )
        return value.value

    # -- contexts, code, memory -----------------------------------------------------------------

    def enter(self, device: int) -> None:
        """Makes the device's primary context, which torch uses too, current in this thread."""
        context = self._contexts.get(device) or self._retain_context(device)
        if result := self.library.cuCtxSetCurrent(context):
            self.check(result, "cuCtxSetCurrent")

    def _retain_context(self, device: int) -> ctypes.c_void_p:
        """The device's primary context, kept for the life of the process."""
        cuda, context, handle = self.library, ctypes.c_void_p(), ctypes.c_int()
        if result := cuda.cuInit(0):
            self.check(result, "cuInit")
        if result := cuda.cuDeviceGet(ctypes.byref(handle), device):
            self.check(result, f"cuDeviceGet({device})")
        if result := cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle):
            self.check(result, "cuDevicePrimaryCtxRetain")
        self._contexts[device] = context
        return context

    def assemble(self, ptx: str) -> bytes:
        """A kernel as `load_kernels` loads it: a cubin for the current context's device, or its PTX.

        The driver's own assembler makes the cubin. PTX for which that would be slow code stays as it is (see
        `is_linked`): the driver assembles it when it is loaded, and keeps the result in its cache on disk.
        """
        if not is_linked(ptx):
            return ptx.encode() + b"\0"
        cuda = self.library
        state, image, size = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()
        self.check(cuda.cuLinkCreate_v2(0, None, None, ctypes.byref(state)), "cuLinkCreate")
        try:
            text = ptx.encode() + b"\0"
            self.check(
                cuda.cuLinkAddData_v2(
                    *(state, _JIT_INPUT_PTX, text, ctypes.c_size_t(len(text)), b"kernel"),
                    *(0, None, None),
                ),
                "assembling the kernel (cuLinkAddData)",
            )
            self.check(
                cuda.cuLinkComplete(state, ctypes.byref(image), ctypes.byref(size)),
                "cuLinkComplete",
            )
            return ctypes.string_at(image, size.value)
        finally:
            cuda.cuLinkDestroy(state)

    def load_kernels(
        self, kernels: Sequence[Mapping[str, Any]], cubins: Sequence[bytes], names: Sequence[str]
    ) -> list[LaunchSpec]:
        """Loads kernels into the current context, ready to launch.

        Args:
            kernels: for each, the fields of `compile_worker.KernelLaunch`.
            cubins: of `assemble`.
            names: of the program's values, in order; a kernel's parameters are among them.

        Where one of them does not load, those before it are unloaded again.
        """
        modules: list[ctypes.c_void_p] = []
        try:
            return [
                self._load_kernel(kernel, cubin, names, modules)
                for kernel, cubin in zip(kernels, cubins, strict=True)
            ]
        except BaseException:
            # Nobody would have their functions. What failed is told, not that a module does not unload.
            for module in modules:
                self.library.cuModuleUnload(module)
            raise

    def _load_kernel(
        self,
        kernel: Mapping[str, Any],
        cubin: bytes,
        names: Sequence[str],
        modules: list[ctypes.c_void_p],
    ) -> LaunchSpec:
        """One kernel of `load_kernels`; its module is appended to `modules` as soon as it is loaded."""
        cuda, entry, shared = self.library, kernel["entry"], kernel["shared_bytes"]
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        if result := cuda.cuModuleLoadData(ctypes.byref(module), cubin):
            self.check(result, f"loading {entry}")
        modules.append(module)
        if result := cuda.cuModuleGetFunction(ctypes.byref(function), module, entry.encode()):
            self.check(result, f"finding {entry}")
        if result := cuda.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared):
            self.check(result, f"asking for {shared} bytes of shared memory")
        assert function.value is not None
        shape = kernel["grid"], kernel["cluster"], kernel["block"]
        at = {name: position for position, name in enumerate(names)} | {_TENSOR_MAPS: _BY_VALUE}
        positions = tuple([at[name] for name in kernel["parameters"]])
        maps = [
            BoundTensorMap(
                at[one["buffer"]],
                at[one["rows"]] if one["rows"] else -1,
                *[one[field] for field in BoundTensorMap._fields[2:]],
            )
            for one in kernel.get("tensor_maps", ())
        ]
        waits = kernel.get("waits", True)
        return LaunchSpec(function.value, *shape, shared, positions, tuple(maps), waits)

    def synchronize(self) -> None:
        """Waits for all work of the current context."""
        self.check(self.library.cuCtxSynchronize(), "running a kernel")


def is_linked(ptx: str) -> bool:
    """Whether a kernel passes the driver's linker, the only function of the driver that gives a cubin.

    The linker assembles a file as one of several. It ignores setmaxnreg there, "to maintain compatibility
    across compilation units": warpgroups that multiply then have 168 registers each, not 232. Sums were
    spilled, each wgmma waited for the one before it, and a product of e4m3 took four times as long.
    """
    return "setmaxnreg" not in ptx


class Memory:
    """Device memory of our own, for the self-test of a program; at least 4 bytes."""

    def __init__(self, driver: Driver, size: int):
        self._driver, self._address, self._size = driver, ctypes.c_uint64(), max(size, 4)
        driver.check(
            driver.library.cuMemAlloc_v2(ctypes.byref(self._address), ctypes.c_size_t(self._size)),
            f"allocating {size} bytes",
        )

    @property
    def address(self) -> int:
        return self._address.value

    def fill(self, word: int) -> None:
        """Sets every 32-bit word."""
        cuda, count = self._driver.library, ctypes.c_size_t(self._size // 4)
        self._driver.check(
            cuda.cuMemsetD32_v2(self._address, ctypes.c_uint(word), count), "cuMemset"
        )

    def write(self, array) -> None:
        """From a contiguous NumPy array."""
        source, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self._driver.check(
            self._driver.library.cuMemcpyHtoD_v2(self._address, source, size), "cuMemcpyHtoD"
        )

    def read(self, array):
        """Into a contiguous NumPy array, which is returned."""
        target, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self._driver.check(
            self._driver.library.cuMemcpyDtoH_v2(target, self._address, size), "cuMemcpyDtoH"
        )
        return array

    def free(self) -> None:
        self._driver.library.cuMemFree_v2(self._address)


class TensorMaps:
    """The TMA descriptors of one kernel, encoded anew only for addresses and sizes that were not seen before.

    Not for two threads at once.
    """

    def __init__(self, driver: Driver, maps: Sequence[BoundTensorMap]):
        self._driver, self._maps = driver, maps
        self._positions = [x for one in maps for x in (one.address, one.rows) if x >= 0]
        # By the values that they were encoded from: where they lie, and the memory.
        self._blocks: dict[tuple[int, ...], tuple[int, Any]] = {}

    def address(self, values: Any) -> int:
        """Where the descriptors for these values of the program lie, one behind the other.

        Raises:
            DriverError: the driver takes no such descriptor.
        """
        key = tuple([values[position] for position in self._positions])
        found = self._blocks.get(key)
        if found is None:
            if len(self._blocks) >= _MAX_BLOCKS:
                self._blocks.clear()
            found = self._blocks[key] = self._encode(values)
        return found[0]

    def _encode(self, values: Any) -> tuple[int, Any]:
        memory = ctypes.create_string_buffer(_MAP_BYTES * len(self._maps) + _MAP_ALIGNMENT)
        start = -(-ctypes.addressof(memory) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
        for k, one in enumerate(self._maps):
            rank, sizes, strides = len(one.sizes), list(one.sizes), list(one.strides)
            if one.rows >= 0:
                size = sizes[one.axis] = values[one.rows] >> _SIZE_SHIFT
                if one.axis == 0:
                    strides = [step // one.sizes[0] * size for step in strides]
            result = self._driver.library.cuTensorMapEncodeTiled(
                *(ctypes.c_void_p(start + _MAP_BYTES * k), one.dtype, rank),
                ctypes.c_void_p(values[one.address]),
                (ctypes.c_uint64 * rank)(*sizes),
                (ctypes.c_uint64 * rank)(*strides),
                (ctypes.c_uint32 * rank)(*one.box),
                (ctypes.c_uint32 * rank)(*[1] * rank),
                # No interleaving, no promotion in L2; what lies outside is zero. As Mosaic's runtime has it.
                *(0, one.swizzle, 0, 0),
            )
            if result:
                self._driver.check(result, f"describing an array of sizes {sizes} for TMA")
        return start, memory


class Launches:
    """The kernels of a program, launched one after the other, with the memory that holds their arguments.

    Not for two threads at once: a thread makes its own. A kernel that waits for the one ahead of it may start
    before that one has ended (programmatic dependent launch); every other one starts behind it.

    Attributes:
        values: a 64-bit word per value of the program. The driver copies them at each launch.
        write: `write(*given)` puts the first `num_given` of them there; all of them where that is None.
        kept, kept_is_next: memory of the thread that `values` may point to, and whether they do.
    """

    kept: Any = None
    kept_is_next = False

    def __init__(
        self,
        driver: Driver,
        specs: Sequence[LaunchSpec],
        num_values: int,
        num_given: int | None = None,
    ):
        self.values = (ctypes.c_uint64 * num_values)()
        words = num_values if num_given is None else num_given
        # With its place bound, `write(*given)` passes the tuple on; beside other arguments, Python would make
        # a list and another tuple of it first.
        self.write = functools.partial(struct.Struct(f"{words}Q").pack_into, self.values, 0)
        self._driver, self._stream = driver, None
        self._configs, self._pointers, self._arguments, self._attributes = [], [], [], []
        # For each kernel with descriptors: its parameters, which of them they are, and what encodes them.
        self._maps: list[tuple[Any, int, TensorMaps]] = []
        start = ctypes.addressof(self.values)
        # Without argtypes, and with arguments made once, ctypes converts nothing at a call: half the time.
        pointer = ctypes.c_void_p.from_param
        for spec in specs:
            places = [start + 8 * position for position in spec.parameters]
            pointers = (ctypes.c_void_p * len(places))(*places)
            if spec.tensor_maps:
                slot = spec.parameters.index(_BY_VALUE)
                self._maps.append((pointers, slot, TensorMaps(driver, spec.tensor_maps)))
            attributes, count = (LaunchAttribute * 2)(), 0
            if spec.waits:
                attributes[0].id, attributes[0].value[0] = _PROGRAMMATIC_STREAM_SERIALIZATION, 1
                count = 1
            if max(spec.cluster) > 1:
                attributes[count].id = _CLUSTER_DIMENSION
                attributes[count].value[:3] = list(spec.cluster)
                count += 1
            config = LaunchConfig(
                *spec.grid, *spec.block, spec.shared_bytes, None, attributes, count
            )
            self._attributes.append(attributes)
            self._configs.append(config)
            self._pointers.append(pointers)
            addresses = ctypes.addressof(config), spec.function, ctypes.addressof(pointers), 0
            self._arguments.append(tuple([pointer(address) for address in addresses]))
        self._launch = driver.library.cuLaunchKernelEx

    def enqueue(self, stream: int) -> None:
        """Enqueues the kernels on a stream, with what `values` holds now."""
        for pointers, slot, maps in self._maps:
            pointers[slot] = maps.address(self.values)
        if stream != self._stream:
            for config in self._configs:
                config.stream = stream
            self._stream = stream
        launch = self._launch
        for config, function, arguments, extra in self._arguments:
            if result := launch(config, function, arguments, extra):
                self._driver.check(result, "launching a kernel")


def launcher(
    driver: Driver,
    device: int,
    specs: Sequence[LaunchSpec],
    num_given: int,
    num_values: int,
    current_stream: Callable[[int], int],
    take_between: Callable[[Launches, int], Any] | None,
) -> Callable[..., None]:
    """How a program is launched, whoever asks for it: `launch(*values)`.

    Its steps: the thread's argument memory, the current stream, memory between the kernels, the values, the
    kernels. All of them are host time of every call, so what they need is bound here once.

    Args:
        driver: loaded the kernels.
        device: the program's device, which is current in every launch.
        specs: the kernels.
        num_given: how many values the caller gives: pointers, and sizes.
        num_values: how many with the pointers to buffers between the kernels, which come last.
        current_stream: the stream to launch on, of a device.
        take_between: `take_between(launches, stream)` points the next launch on a stream at memory between
            its kernels and returns what holds that memory. Not called where `launches` keeps it for the
            default stream. None for a program that has no such memory.
    """
    threads = threading.local()

    def launch(*values: int) -> None:
        try:
            launches = threads.launches
        except AttributeError:  # a new thread, to which the context may be new too
            driver.enter(device)
            launches = threads.launches = Launches(driver, specs, num_values, num_given)
        stream = current_stream(device)
        held = None  # until all kernels are enqueued: another thread on this stream may not get it before
        if take_between is not None and (stream or not launches.kept_is_next):
            held = take_between(launches, stream)
        launches.write(*values)
        launches.enqueue(stream)
        del held

    return launch
