"""The language in NumPy: runs a program's kernel bodies on a CPU, a grid's threads in lock step.

What the machine does not define is an `EmulatorError` (`faults.py` lists them). `lockstep.py` runs
the primitives, `memory.py` checks each access, `races.py` knows who touched a cell since a barrier.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np

from moe_align_jax._simt.emulator.devices import Peers
from moe_align_jax._simt.emulator.faults import EmulatorError
from moe_align_jax._simt.emulator.lockstep import EmulatedSimt
from moe_align_jax._simt.emulator.memory import Buffer
from moe_align_jax._simt.language import Kernel, Program, check_launch


def _check_program(program: Program, arrays: Sequence[np.ndarray], batch: int) -> None:
    """Raises `EmulatorError` unless the arrays and the kernels of a program fit each other."""
    shapes = dict(program.inputs)
    for (name, shape), array in zip(program.inputs.items(), arrays, strict=True):
        if array.shape != tuple(shape) or array.dtype != np.int32:
            raise EmulatorError(
                f"{name} must be int32 {list(shape)}; got {array.dtype} {list(array.shape)}."
            )
    for kernel in program.kernels:
        check_launch(kernel, batch)
        for name, shape in kernel.inputs.items():
            if shapes.get(name) != shape:
                raise EmulatorError(
                    f"{kernel.name}: input {name} must be an operand or an earlier kernel's output "
                    f"of shape {list(shape)}; got {shapes.get(name)}."
                )
        if taken := set(kernel.outputs) & set(shapes):
            raise EmulatorError(
                f"{kernel.name}: an output is written by one kernel alone; got {sorted(taken)}."
            )
        shapes.update(kernel.outputs)


def _common(kernel: Kernel, check_races: bool) -> dict[str, Any]:
    """What all buffers of a kernel are made with."""
    return {
        "kernel": kernel.name,
        "num_threads": kernel.num_threads,
        "check_races": check_races,
        "num_ctas": kernel.num_ctas if kernel.devices else 0,
    }


def _outputs(
    kernel: Kernel, check_races: bool, before: Mapping[str, np.ndarray] | None = None
) -> dict[str, Buffer]:
    """A buffer for each output, with what `before` says that it holds, else zeros."""
    held = before or {}
    return {
        name: Buffer(
            name,
            shape,
            held[name].reshape(-1).copy()
            if name in held
            else np.zeros(int(np.prod(shape)), np.int32),
            writable=True,
            per_cta=False,
            reach="grid" if kernel.num_ctas > 1 or kernel.devices else "cta",
            **_common(kernel, check_races),
        )
        for name, shape in (*kernel.outputs.items(), *kernel.staged.items())
    }


def _run_kernel(
    kernel: Kernel,
    machine: EmulatedSimt,
    data: dict[str, np.ndarray],
    outputs: dict[str, Buffer],
    producers: dict[str, int],
    check_races: bool,
) -> None:
    """Runs the kernel's body on `machine`, over its inputs and into its outputs."""
    common = _common(kernel, check_races)
    refs = {
        name: Buffer(
            name,
            shape,
            data[name],
            writable=False,
            per_cta=False,
            reach="cta",
            producer=producers.get(name),
            tail=kernel.tails.get(name, 4),
            **common,
        )
        for name, shape in kernel.inputs.items()
    } | outputs
    for name, words in kernel.shared.items():
        cells = np.zeros(words * kernel.num_ctas, np.int32)
        refs[name] = Buffer(
            name, (words,), cells, writable=True, per_cta=True, reach="cta", **common
        )
    with np.errstate(divide="ignore"):  # lanes that are not active may divide by anything
        kernel.body(machine, SimpleNamespace(**refs))
    machine.check_loops()
    machine.check_end()


def _finish(kernel: Kernel, outputs: dict[str, Buffer]) -> dict[str, np.ndarray]:
    """The arrays of the outputs, each of which must be written in full unless it is a partial or a staged
    one."""
    for name, buffer in outputs.items():
        if name not in kernel.partial and name not in kernel.staged:
            buffer.check_written()
    return {name: buffer.data for name, buffer in outputs.items()}


def run_on_devices(
    kernel: Kernel, arrays: Sequence[Sequence[np.ndarray]], *, check_races: bool = True
) -> list[list[np.ndarray]]:
    """Runs a kernel of several devices, each in a thread of its own.

    Args:
        kernel: with `devices`.
        arrays: for each device the operands, int32, in the order and shapes of `kernel.inputs`.
        check_races: as for `run`. A read of what another device wrote is a race until it was told of.

    Returns:
        For each device the outputs, then the staged arrays, in order; 0 where nothing was written.

    Raises:
        EmulatorError: as for `run`.
    """
    check_launch(kernel)
    outputs = [_outputs(kernel, check_races) for _ in arrays]
    together = threading.Barrier(len(arrays))
    arrived = np.zeros(len(arrays), np.int64)
    inboxes = np.zeros((len(arrays), kernel.inbox), np.int32)

    def run_one(rank: int) -> None:
        data = {
            name: np.asarray(array, np.int32).reshape(-1)
            for name, array in zip(kernel.inputs, arrays[rank], strict=True)
        }
        taken = np.zeros(kernel.inbox, bool)
        peers = Peers(rank, outputs, together.wait, arrived, inboxes, taken)
        machine = EmulatedSimt(kernel, peers=peers)
        try:
            _run_kernel(kernel, machine, data, outputs[rank], {}, check_races)
        except BaseException:
            together.abort()
            raise

    with ThreadPoolExecutor(len(arrays)) as pool:
        ended = [pool.submit(run_one, rank).exception for rank in range(len(arrays))]
        errors = [error for each in ended if (error := each())]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    done = [_finish(kernel, mine) for mine in outputs]
    shapes = {**kernel.outputs, **kernel.staged}
    return [[mine[n].reshape(shape) for n, shape in shapes.items()] for mine in done]


def run(
    program: Program,
    arrays: Sequence[np.ndarray],
    *,
    batch: int = 1,
    check_races: bool = True,
    before: Mapping[str, np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Runs a program by NumPy.

    Every kernel is taken to be launched with programmatic dependent launch: what it does before its
    `grid_dependency_wait` runs beside all kernels before it.

    Args:
        program: the kernels.
        arrays: the operands, int32, in the order and shapes of `program.inputs`. Not written.
        batch: rows of the vmapped batch that these arrays are one of (only checked: grid.y).
        check_races: False leaves out races between threads (not bounds or uninitialised reads).
        before: what outputs that need not be written in full hold before, by name; otherwise 0.

    Returns:
        The results, in the order of `program.results`, int32.

    Raises:
        EmulatorError: a body does what the machine does not define; its subclasses say what.
        LaunchError: a kernel asks for more than the chip has.
    """
    arrays = [np.asarray(array) for array in arrays]
    _check_program(program, arrays, batch)
    shapes = {**program.inputs}
    data = {name: array.reshape(-1) for name, array in zip(program.inputs, arrays, strict=True)}
    producers: dict[str, int] = {}
    behind: frozenset[int] = frozenset()
    for position, kernel in enumerate(program.kernels):
        machine = EmulatedSimt(kernel, behind)
        outputs = _outputs(kernel, check_races, before)
        _run_kernel(kernel, machine, data, outputs, producers, check_races)
        data.update(_finish(kernel, outputs))
        # A wait covers the kernel before, and through it those that this one waited for in turn.
        behind = (behind if machine.waited else frozenset()) | {position}
        producers.update(dict.fromkeys(kernel.outputs, position))
        shapes.update(kernel.outputs)
    return [data[name].reshape(shapes[name]) for name in program.results]
