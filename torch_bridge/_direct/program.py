"""The direct path: our kernels on torch's current stream, launched by the driver. No jax in this process.

A program is compiled in a process of its own (launch.py), for all sizes of a bucket, and kept on disk
(modules.py); this process loads machine code, takes memory from torch's allocator and launches. The stream
is asked for at every call, so launches are captured into CUDA graphs like any of torch's own.
"""

import contextlib
import functools
import operator
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Sequence

import torch

from moe_align_jax._align import tables
from moe_align_jax._core import checks
from moe_align_jax.types import AlignProblem
from torch_bridge._direct import compile_pool, disk_cache, driver

# Beyond, offsets could wrap inside a kernel's loops.
MAX_CAPACITY = 2**31 - 2**24
_ONE = (1,)

type Problem = compile_pool.Problem


def _raw_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# What inductor's own code calls for the same, 10 and 3 times as fast as the public functions above.
raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _raw_stream)
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_dynamo = getattr(torch._C, "_dynamo", None)


def _empty_strided(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


# A tensor on the current device, from torch's allocator: (size, stride, dtype).
empty_strided: Callable[..., torch.Tensor] = getattr(
    getattr(_dynamo, "guards", None), "_empty_strided_cuda", _empty_strided
)


with contextlib.suppress(OSError, ValueError):  # said again, and louder, by the first call
    disk_cache.code_digest()
    tables.preload()


class Unavailable(RuntimeError):
    """The direct path cannot run this; the message is the reason."""


class TooManyRows(RuntimeError):
    """The caller's buffers have more rows than this program takes."""


class Miss(RuntimeError):
    """A program that is not loaded was needed while a stream is captured."""


# -- whether it can run here --------------------------------------------------------------------


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why nothing can run directly on this device, or None."""
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
        driver.library()
    except OSError as error:
        return f"libcuda does not load: {error}"
    return None


def launches_on(index: int) -> bool:
    """Whether the direct path can run on that CUDA device."""
    return unavailable(torch.device("cuda", index)) is None


# torch.compiler.assume_constant_result sets this too, but imports the compiler: 2 s that eager users need not
# wait for.
launches_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def tuning(device: torch.device) -> str:
    """Whose table chooses the sizes of kernels on this device, as problems name it."""
    if device.type != "cuda":
        return ""
    return tables.table_name(torch.cuda.get_device_properties(device).name)


@functools.cache
def _gpu(index: int) -> str:
    facts = torch.cuda.get_device_properties(index)
    driven_by = f"{driver.driver_version()} {driver.release()}"
    return f"{facts.name} sm_{facts.major}{facts.minor} driver {driven_by}"


# -- programs -----------------------------------------------------------------------------------


class Program:
    """A loaded program on one device: kernels, and what each of their parameters is.

    Attributes:
        outputs: names of its results.
        max_capacity: the most rows that a launch may ask for.

    And what `launch` is made of, for those who cannot spare the time of its call:
        threads: a thread's `launches`, once it has called `enter`.
        pack: writes a launch's values, `pack(launches.values, 0, *values)`.
        between: None where there is no memory between kernels.
    """

    def __init__(self, index: int, problem: Problem, entry: disk_cache.Entry):
        self.outputs = tuple(problem.outputs)
        ends = (*problem.inputs, *self.outputs)
        names = (*ends, *entry.between)
        words, starts = 0, {}
        for name, shape in entry.between.items():
            starts[name] = words * 4
            # Pointers count as 256-byte aligned.
            words += -(-functools.reduce(operator.mul, shape, 1) // 64) * 64
        # Kernels stride over any number of rows; buffers between them, but for counts, end where they were
        # compiled to end.
        bounded = any(not name.startswith("histograms") for name in entry.between)
        self.max_capacity = problem.capacity if bounded else MAX_CAPACITY
        self._num_values = len(names)
        self.pack = struct.Struct(f"{len(ends)}Q").pack_into
        self._between_size = (words,) if words else None
        self._between_starts = tuple(starts[name] for name in entry.between)
        self._between_at = 8 * len(ends)
        self._pack_between = struct.Struct(f"{len(starts)}Q").pack_into
        self.between = self._between if words else None
        self._specs = []
        for kernel, cubin in zip(entry.kernels, entry.cubins, strict=True):
            function = driver.Function(cubin, kernel["entry"])
            function.allow_shared(kernel["shared_bytes"])
            positions = tuple(names.index(name) for name in kernel["parameters"])
            self._specs.append(
                driver.LaunchSpec(
                    function,
                    kernel["grid"],
                    kernel["cluster"],
                    kernel["block"],
                    kernel["shared_bytes"],
                    positions,
                )
            )
        self.threads, self._index = threading.local(), index

    def launch(self, *values: int) -> None:
        """Enqueues the kernels on torch's current stream of the current device, which is the program's.

        `values` in the order of inputs and outputs. Buffers between the kernels come from torch's
        allocator, which hands them out again in this stream's order only.
        """
        try:
            launches = self.threads.launches
        except AttributeError:
            launches = self.enter()
        stream = raw_stream(self._index)
        # Held until all kernels are enqueued: another thread on this stream may not get it before.
        held = self.between and self.between(launches, stream)
        self.pack(launches.values, 0, *values)
        launches.enqueue(stream)
        del held

    def enter(self) -> driver.Launches:
        """A thread has its own argument memory, and the driver's context may be new to it."""
        driver.enter(self._index)
        launches = driver.Launches(self._specs, self._num_values)
        self.threads.launches = launches
        return launches

    def _between(self, launches: driver.Launches, stream: int) -> torch.Tensor | None:
        """Points the next launch on `stream` at memory between its kernels: to be held until then."""
        if stream:
            buffer = empty_strided(self._between_size, _ONE, torch.int32)
        elif launches.kept_is_next:
            return None
        else:  # The default stream outlives every thread and is never captured: keep the buffer.
            if launches.kept is None:
                launches.kept = empty_strided(self._between_size, _ONE, torch.int32)
            buffer = launches.kept
        start = buffer.data_ptr()
        addresses = [start + offset for offset in self._between_starts]
        self._pack_between(launches.values, self._between_at, *addresses)
        launches.kept_is_next = not stream
        return buffer


_programs: dict[tuple[int, Problem], Program] = {}
_failures: dict[tuple[int, Problem], str] = {}
# Of a device, why nothing can be compiled for it; None once the disk knows no reason.
_verdicts: dict[int, str | None] = {}
_lock = threading.Lock()
_compile = compile_pool.compile_all


def loaded(index: int, problem: Problem) -> Program | None:
    return _programs.get((index, problem))


def failure(index: int, problem: Problem) -> str | None:
    """Why this program cannot be made, as far as that was tried: here, or by a process before this one."""
    at = (index, problem)
    if reason := _failures.get(at):
        return reason
    if index not in _verdicts:
        _verdicts.setdefault(index, disk_cache.load_verdict(_verdict_key(index)))
    reason = _verdicts.get(index)
    if (
        reason
        and at not in _programs
        and not disk_cache.holds(disk_cache.key_of(problem, _gpu(index)))
    ):
        _failures[at] = reason
        return reason
    return None


def _verdict_key(index: int) -> str:
    """A verdict is about this Python's packages too, and whether the GPU lets a second process in."""
    mode = driver.compute_mode(index)
    return disk_cache.verdict_key(f"{_gpu(index)} compute mode {mode} {sys.executable}")


def _keep(index: int, verdict: compile_pool.Verdict) -> str:
    """Keeps a verdict; the first reason of several stands for the device."""
    if verdict.lasting and not _verdicts.get(index):
        disk_cache.store_verdict(_verdict_key(index), verdict.reason)
    reason = _verdicts[index] = _verdicts.get(index) or verdict.reason
    return reason


def _forget(index: int) -> None:
    """Lets the device be tried again, for every program that its verdict kept from it."""
    disk_cache.forget_verdict(_verdict_key(index))
    reason = _verdicts.pop(index, None)
    for at in [at for at, why in _failures.items() if at[0] == index and why == reason]:
        del _failures[at]


def prepare(index: int, problems: list[Problem], *, again: bool = False) -> None:
    """Loads programs, from disk where they are, compiling the others in processes of their own.

    What failed before is not tried again (a call must not compile each time), unless `again`: the
    reason may have been a GPU without memory for the compiling process. A reason that holds for any program
    is not tried again with another one either, and one that will last, not by other processes.

    Raises:
        Unavailable: one of them could not be compiled or proved right.
    """
    with _lock, torch.cuda.device(index):
        missing = [p for p in problems if (index, p) not in _programs]
        if not missing:
            return
        torch.cuda.current_stream(index)  # makes sure that torch's context is there
        torch.cuda.init()
        keys = {problem: disk_cache.key_of(problem, _gpu(index)) for problem in missing}
        absent = []
        if again:
            _forget(index)
        for problem in missing:
            if again:
                _failures.pop((index, problem), None)
            if reason := _failures.get((index, problem)):
                raise Unavailable(reason)
            entry = disk_cache.load(keys[problem])
            if entry is None:
                absent.append(problem)
            else:
                _load(index, problem, entry)
        if absent:
            reason = _verdicts.get(index) or disk_cache.load_verdict(_verdict_key(index))
            _verdicts[index] = reason
            if reason:
                _failures.update(((index, problem), reason) for problem in absent)
                raise Unavailable(reason)
            for problem, entry in zip(absent, _compile(index, absent), strict=True):
                if isinstance(entry, compile_pool.Verdict):
                    entry = _keep(index, entry)
                if isinstance(entry, str):
                    _failures[index, problem] = entry
                    continue
                disk_cache.store(keys[problem], entry)
                _load(index, problem, entry)
            for problem in absent:
                if reason := _failures.get((index, problem)):
                    raise Unavailable(reason)


def _load(index: int, problem: Problem, entry: disk_cache.Entry) -> None:
    driver.enter(index)
    _programs[index, problem] = Program(index, problem, entry)


@functools.cache
def warn_once(reason: str) -> None:
    warnings.warn(
        f"torch_bridge: the direct path cannot run, DLPack is used: {reason}", stacklevel=4
    )


# -- one alignment ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1 << 16)
def program_problem(
    num_pairs: int,
    num_experts: int,
    block_size: int,
    id_words: int,
    expert_map: str,
    has_num_valid_pairs: bool,
    return_counts: bool,
    return_inverse: bool,
    minus_one: bool,
    tuning: str = "",
) -> AlignProblem:
    """The program that serves this size: that of its bucket's end."""
    end = tables.size_bucket(num_pairs, num_experts, block_size, tuning)
    # The most that any entry point asks for: SGLang counts a bucket more and takes whole 16-byte stores.
    capacity = checks.round_up(
        checks.capacity(
            end, block_size=block_size, num_experts=num_experts + 1, pad_sorted_ids=False
        ),
        4,
    )
    return AlignProblem(
        end,
        num_experts,
        block_size,
        capacity,
        id_words,
        expert_map,
        has_num_valid_pairs,
        return_inverse,
        minus_one,
        return_counts,
        sized_at_launch=True,
        tuning=tuning,
    )


def bucket_ends(most: int, num_experts: int, block_size: int, tuning: str = "") -> list[int]:
    """The largest sizes of the buckets that hold 1 .. most pairs."""
    ends = [tables.size_bucket(1, num_experts, block_size, tuning)]
    while ends[-1] < most:
        ends.append(tables.size_bucket(ends[-1] + 1, num_experts, block_size, tuning))
    return ends


def program_for(function: str, index: int, problem: Problem) -> Program:
    """The loaded program; loads or compiles it unless the stream is being captured.

    Raises:
        Miss: it is not loaded and torch's current stream is captured.
        Unavailable: it cannot be had.
    """
    program = _programs.get((index, problem))
    if program is not None:
        return program
    if torch.cuda.is_current_stream_capturing():
        sizes = f"num_experts={problem.num_experts}, block_size={problem.block_size}"
        if isinstance(problem, AlignProblem):
            sizes += f", up to {problem.num_pairs} pairs"
        raise Miss(
            checks.message(
                function,
                "a call in a CUDA-graph capture",
                "find its kernels loaded",
                f"none for {sizes}",
                "Call torch_bridge.warmup(...) with these sizes and options before the capture.",
            )
        )
    prepare(index, [problem])
    return _programs[index, problem]


def align(
    program: Program,
    ids: torch.Tensor,
    num_pairs: int,
    capacity: int,
    options: Sequence[int],
    results: Sequence[torch.Tensor],
) -> None:
    """Launches an alignment.

    Args:
        program: from `program_for`.
        ids: contiguous, of 4- or 8-byte integers, on the program's device, which is current.
        num_pairs, capacity: n >= 1 and P, at most the program's `max_capacity`.
        options: pointers of expert_map and num_valid_pairs, as the program has them.
        results: contiguous int32 tensors, 16-byte aligned, for the program's outputs.
    """
    pointer = ids.data_ptr()
    behind = pointer & 255
    first_id = behind // ids.element_size()
    targets = [x.data_ptr() for x in results]
    program.launch(
        pointer - behind, *options, num_pairs << 8, capacity << 8, first_id << 8, *targets
    )
