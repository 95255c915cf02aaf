"""to_jax, to_torch: tensors across DLPack, with no silent copy and no silently wrong value.

What DLPack and its two ends get wrong, and the guard here (each has a test in tests/bridge):
- jax narrows 64-bit values when x64 is off, without a word: imported under a local x64 context.
- a FakeTensor is imported as garbage: refused. A neg-bit view loses its sign: copied or refused.
- a CPU pointer off a 64-byte boundary, and any stride but the compact one: copied or refused.
- torch's stream protocol needs the tensor's device to be current: it is made so.
"""

import contextlib
import ctypes
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor  # type: ignore[import]
from torch._subclasses.fake_tensor import is_fake as torch_is_fake

from moe_align_jax._core import checks, fork
from torch_bridge import _checks

if TYPE_CHECKING:
    import jax
else:

    class _Jax:
        """jax, imported when an annotation is resolved (typing.get_type_hints), not before."""

        def __getattr__(self, name: str) -> Any:
            import jax

            return getattr(jax, name)

    jax = _Jax()

# XLA's own rule for sharing CPU memory. On CUDA, XLA refuses to run a program on arguments that are
# not on 16 bytes ("Address of buffer ... must be a multiple of 10"), and a Mosaic GPU kernel is
# compiled for pointers on 256 bytes (its lowering declares so, and LLVM drops the low bits).
_CPU_ALIGNMENT = 64
_XLA_CUDA_ALIGNMENT = 16
MOSAIC_ALIGNMENT = 256

# The 64 bytes of DLPack's structure DLManagedTensor end with its deleter.
_CAPSULE, _STRUCT_BYTES = b"dltensor", 64
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))
_allocate = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(
    ("PyMem_RawMalloc", ctypes.pythonapi)
)
_FREE = ctypes.cast(ctypes.pythonapi.PyMem_RawFree, ctypes.c_void_p).value

_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
)
_DTYPE_NAMES = frozenset(str(dtype).removeprefix("torch.") for dtype in _DTYPES)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no data of its own: fake, meta, or a wrapper of a torch transform."""
    return (
        tensor.device.type == "meta" or torch_is_fake(tensor) or is_functorch_wrapped_tensor(tensor)
    )


def alignment(device_type: str, implementation: str | None = None) -> int:
    """Bytes that a pointer must be a multiple of, to be used where it lies."""
    if device_type == "cpu":
        return _CPU_ALIGNMENT
    return MOSAIC_ALIGNMENT if implementation == "mosaic_gpu" else _XLA_CUDA_ALIGNMENT


def copy_reason(tensor: torch.Tensor, boundary: int) -> str | None:
    """Why a tensor cannot be shared where it lies, or None when it can."""
    if tensor.is_neg() or tensor.is_conj():
        return "its negative or conjugate bit is set, which DLPack does not carry"
    if not tensor.is_contiguous():
        return f"it is not contiguous (shape {list(tensor.shape)}, strides {list(tensor.stride())})"
    if tensor.numel() and tensor.data_ptr() % boundary:
        return f"its pointer is not on a {boundary}-byte boundary"
    return None


def compact_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A fresh row-major copy, in memory of torch's allocator (which is aligned)."""
    tensor = tensor.resolve_conj().resolve_neg()
    dtype = tensor.dtype
    # torch has few operations on these; their bits can travel as signed integers.
    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
    bits = tensor.view(signed[dtype]) if dtype in signed else tensor
    copy = torch.empty(bits.shape, dtype=bits.dtype, device=bits.device)
    return copy.copy_(bits).view(dtype)


def compact(tensor: torch.Tensor, boundary: int) -> torch.Tensor:
    """The tensor itself where it can be shared as it lies, else a compact copy."""
    return compact_copy(tensor) if copy_reason(tensor, boundary) else tensor


def on_device(device: torch.device) -> Any:
    """Makes a CUDA device current: torch exports no tensor of another one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def current_device_kept() -> Iterator[None]:
    """Keeps torch's current device around code that may start jax's GPU client, which leaves the last GPU
    current in this thread (jax 0.11.2, two GPUs): torch would allocate there from then on."""
    if not torch.cuda.is_initialized():
        yield
        return
    before = torch.cuda.current_device()
    try:
        yield
    finally:
        torch.cuda.set_device(before)


class _Lent:
    """A tensor for jax to import, whose memory jax uses and does not hold.

    DLPack's consumer owns what it imports until it calls the deleter. jax does that when its programs have
    ended, at a moment that no one can tell. So jax gets a copy of the structure that torch made, whose
    deleter frees this copy and nothing else. XLA calls it in any thread: PyMem_RawFree needs no GIL.
    """

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor

    def __dlpack_device__(self) -> tuple[Any, int]:
        return self._tensor.__dlpack_device__()

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        # torch's capsule stays unused, and is kept during the import: the shape lies in its memory.
        self._capsule = self._tensor.__dlpack__(stream=stream)
        copy = _allocate(_STRUCT_BYTES)
        if copy is None:
            raise MemoryError
        ctypes.memmove(copy, _pointer_of(self._capsule, _CAPSULE), _STRUCT_BYTES)
        ctypes.c_void_p.from_address(copy + _STRUCT_BYTES - 8).value = _FREE
        return _new_capsule(copy, _CAPSULE, None)


def share(tensor: torch.Tensor) -> "jax.Array":
    """A jax array on an operator's tensor, for `call_jax`: on CUDA jax does not hold the memory."""
    return _imported(tensor, _Lent(tensor) if tensor.is_cuda else tensor)


def call_jax(
    program: Callable[[dict[str, Any]], Sequence[Any]], inputs: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """The results of a jax program, in XLA's memory. On CUDA torch's current stream waits for it.

    Behind that wait torch may use the inputs' memory again, as behind any operator on its current stream.
    It is given back when the operator and its caller drop the inputs, not when jax has seen its program
    end: torch's CUDA-graph trees need inputs to die at the same point of every call. Keep the inputs until
    the results have been copied: a program may return one of them.

    Args:
        program: called with the arrays, by name.
        inputs: checked tensors of one device, compact.
    """
    arrays = {name: share(tensor) for name, tensor in inputs.items()}
    try:
        return [to_torch(result) for result in program(arrays)]
    except BaseException:
        # The program may be running, and no stream waits for it: the host does.
        device = next(iter(inputs.values())).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        raise


def _imported(tensor: torch.Tensor, source: Any) -> "jax.Array":
    """`source` (the tensor, which was checked, or its `_Lent`) as a jax array. A copy would be an error."""
    import jax

    wide = tensor.dtype.itemsize >= 8
    with (
        current_device_kept(),
        on_device(tensor.device),
        jax.enable_x64(True) if wide else contextlib.nullcontext(),
    ):
        return jax.dlpack.from_dlpack(source, copy=False)


def check_not_capturing(function: str, device: torch.device) -> None:
    """Refuses a CUDA-graph capture before XLA, which runs on a stream of its own, is touched."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            checks.message(
                function,
                "the call",
                "be outside a CUDA-graph capture on the DLPack path",
                f"a capturing stream on {device}",
                "XLA runs on a stream of its own: call it before the capture, or outside of the "
                "captured region.",
            )
        )


@functools.cache
def _configure_jax_memory() -> None:
    """Keeps jax's GPU client from reserving 75% of the memory; call it before the client starts.

    Too late when the program has used jax on the GPU before; `_warn_of_preallocation` then says so.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@functools.cache
def _warn_of_preallocation(device: Any) -> None:
    stats = device.memory_stats() or {}
    pool, limit = stats.get("pool_bytes", 0), stats.get("bytes_limit", 0)
    if limit and pool > 0.9 * limit:
        warnings.warn(
            f"torch_bridge: jax has reserved {pool / 2**30:.0f} GiB on {device} for itself. "
            "Set XLA_PYTHON_CLIENT_PREALLOCATE=false before jax first uses the GPU.",
            stacklevel=2,
        )


@functools.cache
def _platform(device_type: str, index: int | None) -> str | None:
    """The platform to lower for, or None when jax has no such device here."""
    if device_type == "cuda":
        _configure_jax_memory()
    import jax

    try:
        with current_device_kept():
            devices = jax.local_devices(backend="cpu" if device_type == "cpu" else "gpu")
    except RuntimeError:
        return None
    if device_type == "cpu":
        return "cpu" if devices else None
    for device in devices:
        if device.local_hardware_id == index:
            _warn_of_preallocation(device)
            return "rocm" if torch.version.hip else "cuda"
    return None


def jax_platform(function: str, device: torch.device) -> str:
    """The platform that jax lowers for on this device.

    Raises:
        NotImplementedError: it has none.
        RuntimeError: this process was forked while jax was running, so that jax would hang.
    """
    fork.check(function)
    platform = _platform(device.type, device.index) if device.type in ("cpu", "cuda") else None
    if platform is None:
        remedy = {
            "cpu": "JAX_PLATFORMS leaves the CPU out: add cpu to it.",
            "cuda": "Install jax[cuda13] or jax[cuda12], and leave the GPU visible to jax.",
        }.get(device.type, "Move the tensor to a CPU or a CUDA device.")
        raise NotImplementedError(
            checks.message(
                function, "the tensors' device", "be one that jax has too", device, remedy
            )
        )
    return platform


def to_jax(tensor: torch.Tensor, *, allow_copy: bool = False) -> "jax.Array":
    """The same memory as a jax array, on the same device, 64-bit dtypes included (x64 stays off).

    On CUDA, jax's stream waits for the work that torch's current stream holds now; the host does
    not block. Keep the tensor alive, and unchanged, until the jax work that reads it is done. jax's
    GPU client lives in the process from then on: capture CUDA graphs with
    `capture_error_mode="thread_local"` (docs/pytorch.md).

    Args:
        tensor: any shape; bool, any integer, float16, bfloat16, float32, float64, complex or
            float8 (e4m3fn, e5m2, e8m0fnu).
        allow_copy: copy where the memory cannot be shared (not contiguous, neg or conj bit set, a
            pointer not on 64 bytes on a CPU or 16 bytes on CUDA). Otherwise that is an error.

    Returns:
        A `jax.Array` of the tensor's shape and dtype, committed to its device.

    Raises:
        TypeError: not a dense tensor with data, or its dtype has no jax counterpart.
        ValueError: it requires grad, or a copy is needed and not allowed.
        NotImplementedError: jax has no device that matches the tensor's.
        RuntimeError: the current stream is being captured into a CUDA graph, or this process was forked
            while jax was running.

    Example:
        >>> import torch
        >>> to_jax(torch.tensor([2**40 + 7])).item() == 2**40 + 7
        True
    """
    function = "to_jax"
    check_tensor(function, "tensor", tensor)
    if tensor.dtype not in _DTYPES:
        what, remedy = checks.describe(tensor), "Convert it, or view() it as integers."
        raise TypeError(
            checks.message(function, "tensor", "have a dtype that jax has too", what, remedy)
        )
    if tensor.requires_grad:
        rule, remedy = "not require grad", "No gradient crosses: pass tensor.detach()."
        raise ValueError(checks.message(function, "tensor", rule, checks.describe(tensor), remedy))
    if _checks.has_tangent(tensor):
        rule, remedy = "have no tangent", "No gradient crosses: pass tensor.detach()."
        raise ValueError(checks.message(function, "tensor", rule, checks.describe(tensor), remedy))
    check_not_capturing(function, tensor.device)
    jax_platform(function, tensor.device)
    if reason := copy_reason(tensor, alignment(tensor.device.type)):
        if not allow_copy:
            what = f"{checks.describe(tensor)}: {reason}"
            remedy = "Pass allow_copy=True, or tensor.clone(memory_format=torch.contiguous_format)."
            raise ValueError(
                checks.message(function, "tensor", "be shareable without a copy", what, remedy)
            )
        with on_device(tensor.device):
            tensor = compact_copy(tensor)
    return _imported(tensor, tensor)  # jax holds the memory


def check_tensor(function: str, argument: str, tensor: object) -> None:
    """Checks that a tensor is dense and has data. (DLPack would read garbage from a FakeTensor.)"""
    if not isinstance(tensor, torch.Tensor):
        what, remedy = _checks.describe(tensor), "Pass a PyTorch tensor."
        raise TypeError(checks.message(function, argument, "be a torch.Tensor", what, remedy))
    if is_fake(tensor):
        what = f"a fake, meta or transformed tensor, {checks.describe(tensor)}"
        remedy = "Call it on real tensors; under torch.compile, call torch_bridge's operations."
        raise TypeError(checks.message(function, argument, "have data", what, remedy))
    if what := _checks.not_dense(tensor):
        remedy = "Call to_dense() or dequantize() first."
        raise TypeError(checks.message(function, argument, "be a dense tensor", what, remedy))


def to_torch(array: "jax.Array") -> torch.Tensor:
    """The same memory as a torch tensor, on the same device.

    On CUDA, torch's current stream waits for the array; the host does not block. On a CPU the call
    returns when the array is ready. jax takes its arrays for immutable: do not write to the tensor
    while the array is in use. On CUDA, finish the torch work that reads the tensor before dropping
    it: XLA may give the memory to its next program at once.

    Args:
        array: a concrete `jax.Array` on one device, of a dtype that DLPack carries (no keys, int4).

    Returns:
        A tensor of the array's shape and dtype that shares its memory.

    Raises:
        TypeError: not a concrete jax.Array, or its dtype has no torch counterpart.
        ValueError: the array lies on several devices or was deleted.
        RuntimeError: this process was forked while jax was running.

    Example:
        >>> import jax.numpy as jnp
        >>> to_torch(jnp.arange(3)).tolist()
        [0, 1, 2]
    """
    import jax
    from jax.core import Tracer

    function = "to_torch"
    fork.check(function)
    if not isinstance(array, jax.Array) or isinstance(array, Tracer):
        what = type(array).__name__
        remedy = "Pass a concrete array: not a NumPy array, and not from inside jit or vmap."
        raise TypeError(checks.message(function, "array", "be a jax.Array", what, remedy))
    if array.is_deleted():
        remedy = "It was donated or deleted: compute it again."
        raise ValueError(checks.message(function, "array", "be alive", "a deleted array", remedy))
    if len(array.devices()) != 1:
        what, remedy = f"{len(array.devices())} devices", "Pass one shard, or gather it first."
        raise ValueError(checks.message(function, "array", "lie on one device", what, remedy))
    if str(array.dtype) not in _DTYPE_NAMES:
        what, remedy = checks.describe(array), "Convert it first; key arrays: jax.random.key_data."
        raise TypeError(
            checks.message(function, "array", "have a dtype that torch has too", what, remedy)
        )
    with on_device(_torch_device(next(iter(array.devices())))):
        return torch.from_dlpack(array)


def _torch_device(device: Any) -> torch.device:
    if device.platform == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", device.local_hardware_id or 0)
