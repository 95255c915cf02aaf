"""A compiled program on one device: loaded, and launched on torch's current stream.

The stream is asked for at each launch, so that a CUDA graph captures a launch like any of torch's own.
"""

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from torch_bridge._direct import disk_cache, driver
from torch_bridge._direct.problems import MAX_CAPACITY, KernelProblem

if TYPE_CHECKING:
    from torch_bridge._direct.machine import Machine

# Kernels take their pointers for 256-byte aligned: 64 int32 words.
_ALIGNED_WORDS = 64


class LoadedProgram:
    """The kernels of one program, loaded on one device.

    Args:
        machine: whose driver loads it.
        index: the device.
        problem: what it was compiled for.
        entry: its machine code.

    Attributes:
        outputs: names of its results, in order.
        specs: its kernels, and how each is launched.
        max_capacity: the most rows that a launch may ask for.
        launch: `launch(*values)` enqueues the kernels on torch's current stream of the current device, which
            must be the program's. `values` are 64-bit words in the order of the problem's inputs and outputs:
            pointers, and sizes times 256.
    """

    def __init__(
        self, machine: "Machine", index: int, problem: KernelProblem, entry: disk_cache.Entry
    ):
        self.outputs = tuple(problem.outputs)
        given = (*problem.inputs, *self.outputs)
        names = (*given, *entry.between)
        machine.driver.enter(index)
        self.specs = machine.driver.load_kernels(entry.kernels, entry.cubins, names)
        # Buffers between the kernels lie one behind the other in one piece of memory.
        words, starts, bounded = 0, [], False
        for name, shape in entry.between.items():
            starts.append(words * 4)
            size = 1
            for length in shape:
                size *= length
            words += -(-size // _ALIGNED_WORDS) * _ALIGNED_WORDS
            bounded = bounded or not name.startswith("histograms")
        # The kernels loop over any number of rows. Buffers between them, except for histograms, have the
        # length that they were compiled for.
        self.max_capacity = getattr(problem, "capacity", 0) if bounded else MAX_CAPACITY
        self.launch = driver.launcher(
            machine.driver,
            index,
            self.specs,
            len(given),
            len(names),
            machine.current_stream,
            _between_taker(machine.empty, words, starts, len(given)) if words else None,
        )


def _between_taker(
    empty: Callable[..., torch.Tensor], words: int, starts: Sequence[int], at: int
) -> Callable[[driver.Launches, int], torch.Tensor]:
    """Gives a launch its memory between the kernels: the `take_between` of `driver.launcher`.

    Args:
        empty: `Machine.empty`.
        words: the int32 words of that memory.
        starts: where each buffer starts in it, in bytes.
        at: position of the first buffer's pointer among the program's values.
    """
    size, stride, offset = (words,), (1,), 8 * at
    pack = struct.Struct(f"{len(starts)}Q").pack_into

    def take_between(launches: driver.Launches, stream: int) -> torch.Tensor:
        """The allocator hands the memory out again in this stream's order only. The default stream outlives
        every thread and is never captured, so a thread keeps its memory for that one."""
        buffer = None if stream else launches.kept
        if buffer is None:
            buffer = empty(size, stride, torch.int32)
            if not stream:
                launches.kept = buffer
        start = buffer.data_ptr()
        pack(launches.values, offset, *[start + behind for behind in starts])
        launches.kept_is_next = not stream
        return buffer

    return take_between
