"""The programs that this process has: in memory, else on disk, else compiled in another process.

A program is compiled for a whole bucket of sizes (problems.py), by a process of its own (compile_pool.py),
and kept on disk (disk_cache.py). What cannot be had is remembered with its reason, so that no later call
compiles in vain.
"""

import contextlib
import threading
import warnings
from collections.abc import Sequence

import torch

from moe_align_jax._align import tables
from moe_align_jax._core import checks
from moe_align_jax._moe_layer.direct_problem import DirectSum
from moe_align_jax.types import AlignProblem
from torch_bridge._direct import compile_pool, disk_cache, driver
from torch_bridge._direct.machine import Machine
from torch_bridge._direct.problems import KernelProblem
from torch_bridge._direct.program import LoadedProgram

with contextlib.suppress(OSError, ValueError):  # best effort: the first call reports what fails
    disk_cache.code_digest()
    tables.preload()


class Unavailable(RuntimeError):
    """The direct path cannot run this; the message is the reason."""


class Miss(RuntimeError):
    """A program that is not loaded was needed while a stream is captured."""


class Store:
    """Programs on a machine, by device index and kernel problem.

    Attributes:
        machine: where they are loaded.
        programs: the loaded ones.
        failures: for each that cannot be had, why.
        device_failures: for a device that nothing can be compiled for, why.
    """

    def __init__(self, machine: Machine):
        self.machine = machine
        self.programs: dict[tuple[int, KernelProblem], LoadedProgram] = {}
        self.failures: dict[tuple[int, KernelProblem], str] = {}
        self.device_failures: dict[int, str] = {}
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def failure(self, index: int, problem: KernelProblem) -> str | None:
        """Why this program cannot be had, as far as this process has tried; or None."""
        at = (index, problem)
        reason = self.failures.get(at)
        if (
            reason is None
            and index in self.device_failures
            and at not in self.programs
            and not disk_cache.holds(disk_cache.key_of(problem, self.machine.gpu(index)))
        ):
            reason = self.failures[at] = self.device_failures[index]
        return reason

    def program_for(
        self, function: str, index: int, problem: KernelProblem, remedy: str | None = None
    ) -> LoadedProgram:
        """The loaded program; loads or compiles it unless the stream is being captured.

        Args:
            function, remedy: for the text of Miss; the remedy is `warmup` if None.

        Raises:
            Miss: it is not loaded and torch's current stream is captured.
            Unavailable: it cannot be had.
        """
        program = self.programs.get((index, problem))
        if program is not None:
            return program
        if self.machine.is_capturing():
            raise Miss(_miss_text(function, problem, remedy))
        self.prepare(index, [problem])
        return self.programs[index, problem]

    def prepare(
        self, index: int, problems: Sequence[KernelProblem], *, again: bool = False
    ) -> None:
        """Loads programs, from disk where they are, compiling the others in processes of their own.

        Args:
            again: try also what has failed before. (The GPU may have been without memory for the compiling
                process.) Otherwise what has failed is refused at once: a call must not compile each time.

        Raises:
            Unavailable: one of them could not be compiled or loaded, or gave a wrong result.
        """
        with self._lock, self.machine.on_device(index):
            missing = [p for p in problems if (index, p) not in self.programs]
            if not missing:
                return
            self.machine.start(index)
            if again:
                self._forget_failures(index, missing)
            gpu = self.machine.gpu(index)
            keys = {problem: disk_cache.key_of(problem, gpu) for problem in missing}
            for problem in missing:
                if reason := self.failures.get((index, problem)):
                    raise Unavailable(reason)
            entries = {problem: disk_cache.load(keys[problem]) for problem in missing}
            absent = [problem for problem in missing if entries[problem] is None]
            reason = self.device_failures.get(index)
            if not absent or reason:
                answers = [reason] * len(absent)
            else:
                answers = self.machine.compile(index, absent)
            for problem, answer in zip(absent, answers, strict=True):
                if isinstance(answer, compile_pool.DeviceFailure):
                    answer = self.device_failures.setdefault(index, answer.reason)
                if isinstance(answer, disk_cache.Entry):
                    entries[problem] = answer
                    disk_cache.store(keys[problem], answer)
                else:
                    self.failures[index, problem] = answer or "the compiler gave no reason"
            for problem, entry in entries.items():
                if entry is None:
                    continue
                try:
                    program = LoadedProgram(self.machine, index, problem, entry)
                except driver.DriverError as error:  # no memory for its code, say
                    self.failures[index, problem] = str(error)
                else:
                    self.programs[index, problem] = program
            for problem in missing:
                if reason := self.failures.get((index, problem)):
                    raise Unavailable(reason)

    def _forget_failures(self, index: int, problems: Sequence[KernelProblem]) -> None:
        """Lets these be tried again, and every program that the device's reason kept from it."""
        reason = self.device_failures.pop(index, None)
        for at, why in list(self.failures.items()):
            if at[0] == index and (why == reason or at[1] in problems):
                del self.failures[at]

    def warn_once(self, reason: str, instead: str = "DLPack is used") -> None:
        """Warns, once per reason, of what a call takes instead."""
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"torch_bridge: the direct path cannot run, {instead}: {reason}", stacklevel=4
            )


def _miss_text(function: str, problem: KernelProblem, remedy: str | None) -> str:
    sizes = []
    if problem.num_experts:
        sizes.append(f"num_experts={problem.num_experts}")
    if isinstance(problem, DirectSum):
        sizes.append(f"sums of up to {problem.num_tokens} tokens")
    if block_size := getattr(problem, "block_size", None):
        sizes.append(f"block_size={block_size}")
    if isinstance(problem, AlignProblem):
        sizes.append(f"up to {problem.num_pairs} pairs")
    return checks.message(
        function,
        "a call in a CUDA-graph capture",
        "find its kernels loaded",
        f"none for {', '.join(sizes)}",
        remedy or "Call torch_bridge.warmup(...) with these sizes and options before the capture.",
    )


here = Store(Machine())


def unavailable(device: torch.device) -> str | None:
    """Why nothing can run directly on a device of this process, or None."""
    return here.machine.unavailable(device)


def launches_on(device_type: str, index: int | None) -> bool:
    """Whether operators on that device are launched directly. (Dynamo takes the answer for a constant.)"""
    place = device_type if index is None else f"{device_type}:{index}"
    return here.machine.launches_on(torch.device(place))


# torch.compiler.assume_constant_result sets this too, but imports the compiler: 2 s that eager users need not
# wait for.
launches_on._dynamo_marked_constant = True  # type: ignore[attr-defined]
