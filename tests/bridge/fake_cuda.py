"""A machine whose CUDA driver runs on a CPU: modules hold kernels of ours, and a launch runs the emulator.

It reads the launch as the driver does, from the addresses that it is given, so that the packing of
arguments is tested too; a launch that a GPU would not take is an AssertionError.
"""

import contextlib
import ctypes
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moe_align_jax._align.vllm.problem import AdaptersProblem, ReceivedProblem
from moe_align_jax._router import kernel as router_kernel
from moe_align_jax._router.problem import RouteProblem
from moe_align_jax._simt import emulator
from moe_align_jax._simt.language import Kernel, Program
from moe_align_jax.types import LAUNCH_SIZES
from tests import oracle
from tests.bridge import fake_layer
from torch_bridge import _ops
from torch_bridge._direct import compile_worker, disk_cache, driver, fast_path, problems, store
from torch_bridge._direct.call import Buffers
from torch_bridge._direct.machine import Machine
from torch_bridge._specs import BatchedSpec

GARBAGE = 0x5EED5EED
UNWRITTEN = -77_777
# What C makes of an argument that was converted before.
_as_pointer = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda pointer: pointer)


def value_of(argument: Any) -> int:
    """An integer that came as itself or as a ctypes object."""
    if type(argument) is type(ctypes.c_void_p.from_param(1)):
        return _as_pointer(argument) or 0
    return getattr(argument, "value", argument)


def words_at(address: int, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_int32 * max(count, 1)).from_address(address))[:count]


class FakeCuda:
    """The functions of libcuda that driver.py calls."""

    def __init__(self) -> None:
        self.kernels: list[tuple[Kernel, Any, compile_worker.KernelLaunch]] = []
        self.launched: list[tuple[str, int]] = []  # kernel and stream
        self.described: list[tuple] = []  # the arguments of each descriptor
        self.loads = 0
        self.result = 0
        self.compute_mode = 0
        self._memory: dict[int, Any] = {}
        self._sizes: dict[str, int] = {}
        self._problem: Any = None

    # -- the other side: what a compiler hands over

    def compiled(self, problem: Any) -> tuple[list[dict], list[bytes], dict]:
        """(launches, cubins, shapes), as compile_worker.py makes them."""
        self._problem = problem
        launches, texts, shapes = compile_worker.compile_program(self._compile, problem)  # type: ignore[arg-type]
        return launches, [text.encode() for text in texts], shapes

    def entry(self, problem: Any) -> disk_cache.Entry:
        launches, cubins, shapes = self.compiled(problem)
        ends = (*problem.inputs, *problem.outputs)
        between = {name: list(shape) for name, shape in shapes.items() if name not in ends}
        return disk_cache.Entry(launches, between, cubins)

    def _compile(self, kernels: Sequence[Kernel]) -> list[tuple[str, compile_worker.KernelLaunch]]:
        return [self._compile_one(kernel) for kernel in kernels]

    def _compile_one(self, kernel: Any) -> tuple[str, compile_worker.KernelLaunch]:
        if hasattr(kernel, "structs"):
            how = fake_layer.launch_of(kernel, self._problem)
            self.kernels.append((kernel, self._problem, how))
            return f"kernel {len(self.kernels) - 1}", how
        how = compile_worker.KernelLaunch(
            kernel.name,
            (kernel.num_ctas, 1, 1),
            (kernel.cluster, 1, 1),
            (kernel.num_threads, 1, 1),
            4 * kernel.shared_words,
            (*kernel.inputs, *kernel.outputs),
        )
        self.kernels.append((kernel, self._problem, how))
        return f"kernel {len(self.kernels) - 1}", how

    # -- libcuda

    def cuInit(self, flags) -> int:
        return 0

    def cuDeviceGet(self, handle, device) -> int:
        return 0

    def cuDeviceGetAttribute(self, value, attribute, handle) -> int:
        assert attribute == 20  # the one that the user's process asks for
        value._obj.value = self.compute_mode
        return 0

    def cuDevicePrimaryCtxRetain(self, context, handle) -> int:
        context._obj.value = 1
        return 0

    def cuCtxSetCurrent(self, context) -> int:
        return 0

    def cuModuleLoadData(self, module, image) -> int:
        self.loads += 1
        module._obj.value = int(image.split()[1]) + 1
        return 0

    def cuModuleUnload(self, module) -> int:
        self.loads -= 1
        return 0

    def cuModuleGetFunction(self, function, module, name) -> int:
        kernel = self.kernels[value_of(module) - 1][0]
        assert name.decode() == kernel.name
        function._obj.value = value_of(module)
        return 0

    def cuFuncSetAttribute(self, function, attribute, size) -> int:
        assert (attribute, size) == (8, self.kernels[value_of(function) - 1][2].shared_bytes)
        return 0

    def cuGetErrorString(self, result, text) -> int:
        text._obj.value = b"a fake failure"
        return 0

    def cuMemAlloc_v2(self, address, size) -> int:
        memory = ctypes.create_string_buffer(value_of(size) + 256)
        address._obj.value = -(-ctypes.addressof(memory) // 256) * 256
        self._memory[address._obj.value] = memory
        return 0

    def cuMemFree_v2(self, address) -> int:
        del self._memory[value_of(address)]
        return 0

    def cuMemsetD32_v2(self, address, word, count) -> int:
        words_at(value_of(address), value_of(count))[:] = np.uint32(value_of(word)).view(np.int32)
        return 0

    def cuMemcpyHtoD_v2(self, target, source, size) -> int:
        ctypes.memmove(value_of(target), value_of(source), value_of(size))
        return 0

    cuMemcpyDtoH_v2 = cuMemcpyHtoD_v2

    def cuCtxSynchronize(self) -> int:
        return 0

    def cuTensorMapEncodeTiled(self, target, *described) -> int:
        """Leaves the number of the description where the descriptor would be."""
        dtype, rank, address, sizes, strides, box, steps, interleave, swizzle, *rest = described
        assert value_of(target) % 64 == 0 and interleave == 0 and rest == [0, 0]
        assert list(steps) == [1] * rank
        found = (dtype, value_of(address), tuple(sizes), tuple(strides), tuple(box), swizzle)
        self.described.append(found)
        ctypes.memset(value_of(target), 0, 128)
        ctypes.c_uint64.from_address(value_of(target)).value = len(self.described) - 1
        return self.result

    def cuLaunchKernelEx(self, config, function, arguments, extra) -> int:
        if self.result:
            return self.result
        kernel, problem, how = self.kernels[value_of(function) - 1]
        given = driver.LaunchConfig.from_address(value_of(config))
        assert (given.grid_x, given.grid_y, given.grid_z) == how.grid
        assert (given.block_x, given.block_y, given.block_z) == how.block
        assert given.shared_bytes == how.shared_bytes and value_of(extra) == 0
        pointers = (ctypes.c_void_p * len(how.parameters)).from_address(value_of(arguments))
        if hasattr(kernel, "structs"):
            assert given.num_attributes == 0 and not how.waits
            self.launched.append((kernel.name, given.stream or 0))
            fake_layer.run(self, kernel, problem, how, pointers)
            return 0
        pdl, cluster = given.attributes[0], given.attributes[1]
        assert (pdl.id, pdl.value[0]) == (6, 1)
        assert given.num_attributes == (2 if kernel.cluster > 1 else 1)
        if kernel.cluster > 1:
            assert (cluster.id, tuple(cluster.value[:3])) == (4, how.cluster)
        values = [ctypes.c_uint64.from_address(pointer).value for pointer in pointers]
        self.launched.append((kernel.name, given.stream or 0))
        self._run(kernel, problem, dict(zip(how.parameters, values, strict=True)))
        return 0

    def _run(self, kernel: Kernel, problem: Any, values: dict[str, int]) -> None:
        """The emulator on the very memory. Sizes are exact, so that it sees each access beside them."""
        is_route = isinstance(problem, RouteProblem)
        is_vllms = isinstance(problem, ReceivedProblem | AdaptersProblem)
        by_value = ("num_tokens",) if is_route else LAUNCH_SIZES
        if is_vllms:
            by_value = problem.launch_sizes
        for name in by_value:
            if name in values:
                assert values[name] % 256 == 0
                self._sizes[name] = values[name] >> 8
        is_sized = getattr(problem, "sized_at_launch", False)
        if is_route:
            exact = exact_route_shapes(problem, self._sizes["num_tokens"])
        elif is_vllms:
            sized = problem.sized(self._sizes)
            exact = {**sized.inputs, **sized.outputs}
        else:
            sizes = {name: self._sizes[name] for name in by_value if is_sized}
            exact = exact_shapes(problem, **sizes) if is_sized else {}
        shapes = {**kernel.inputs, **kernel.outputs}
        shapes |= {name: exact[name] for name in shapes if name in exact}
        held = {}
        for name, shape in shapes.items():
            if name in by_value:
                held[name] = np.array([self._sizes[name]], np.int32)
            else:
                on_boundary = is_vllms and name not in kernel.partial or name == "topk_ids"
                on_boundary |= is_route and name in ("logits", "topk_weights")
                assert values[name] % (256 if on_boundary else 4) == 0, name
                assert values[name] % 16 == 0 or name in problem.inputs, name
                held[name] = words_at(values[name], math.prod(shape)).reshape(shape)
        program = resized(Program(inputs=kernel.inputs, kernels=(kernel,), results=()), shapes)
        if is_route:
            tails = route_tails(problem, self._sizes["num_tokens"])
            [one] = program.kernels
            program = dataclasses.replace(program, kernels=(dataclasses.replace(one, tails=tails),))
        program = dataclasses.replace(program, results=tuple(kernel.outputs))
        before = {name: held[name] for name in kernel.partial}
        results = emulator.run(
            program, [held[name].copy() for name in kernel.inputs], before=before
        )
        for name, result in zip(kernel.outputs, results, strict=True):
            held[name][...] = result


class FakeMachine(FakeCuda, Machine):
    """A machine of CPU tensors: their device, -1, is the current one, and its driver is the fake.

    Attributes:
        stream: torch's current stream. device: torch's current device. capturing: whether it is captured.
        launches_directly: whether CPU tensors count as tensors on a GPU that can launch directly. Otherwise
            operators go to their twins through DLPack, and only what asks for it is launched.
        name: of the card. compiles: the problems of each compile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.driver = driver.Driver(self)
        self.stream, self.device, self.capturing, self.launches_directly = 7, -1, False, False
        self.name, self.compiles = "fake sm_90", []

    def current_device(self) -> int:  # type: ignore[override]
        return self.device

    def current_stream(self, index) -> int:  # type: ignore[override]
        return self.stream

    def empty(self, size, stride, dtype) -> torch.Tensor:  # type: ignore[override]
        """On 256 bytes, as torch's allocator of a GPU; a `torch.Size` is refused, as by torch's function."""
        if type(size) is not tuple or type(stride) is not tuple:
            raise RuntimeError("Expected Py_IS_TYPE(((PyObject*)(((obj)))), (&PyTuple_Type))")
        words = math.prod(size) * dtype.itemsize // 4 + 1
        room = torch.full((words + 64,), UNWRITTEN, dtype=torch.int32)
        start = -room.data_ptr() % 256 // 4
        bytes_of = room[start : start + words].view(torch.uint8)
        return bytes_of[: math.prod(size) * dtype.itemsize].view(dtype).view(size)

    def unavailable(self, device) -> None:
        return None

    def launches_on(self, device) -> bool:
        return self.launches_directly

    def gpu(self, index) -> str:
        return self.name

    def tuning(self, device) -> str:
        return ""

    def is_capturing(self) -> bool:
        return self.capturing

    @contextlib.contextmanager
    def on_device(self, index):
        before, self.device = self.device, index
        try:
            yield
        finally:
            self.device = before

    def start(self, index) -> None:
        pass

    def compile(self, index, problems):
        self.compiles.append(list(problems))
        return [self.entry(problem) for problem in problems]


def problem_of(spec, operands, has_limit=False):
    """The kernel problem that serves a call."""
    device = next(iter(operands.values())).device
    tuning = store.here.machine.tuning(device)
    return problems.problem_for(spec, operands, tuning, has_limit)


def remember(fake, spec, operands, topk=None, rows=0):
    """Makes a call for the first time, so that the fast path knows it; `rows`: in place, into so many.

    Its launches are forgotten.
    """
    out = larger = None
    if rows:
        sized = spec if isinstance(spec, BatchedSpec) else dataclasses.replace(spec, rows=rows)
        out, buffers = (
            [torch.empty(shape, dtype=torch.int32) for shape in one.outputs.values()]
            for one in (spec, sized)
        )
        larger = Buffers(sized, buffers)
    key = fast_path.key_of(spec, topk, in_place=rows > 0)
    _ops.run(spec, operands, out=out, key=key, larger=larger)
    fake.launched.clear()


def exact_shapes(problem: Any, *, num_pairs: int, capacity: int, first_id: int) -> dict:
    """What the buffers of a program that is sized at launch really hold."""
    rows = first_id + num_pairs
    blocks = -(-capacity // problem.block_size)
    return {
        "topk_ids": (rows,) if problem.id_words == 1 else (rows, problem.id_words),
        "sorted_token_ids": (capacity,),
        "expert_ids": (blocks,),
        "row_of_pair": (num_pairs,),
        "block_expert": (blocks,),
        **{f"{kind}{i}": (num_pairs,) for kind in ("keys", "pairs") for i in range(8)},
        **{kind: (num_pairs,) for kind in ("keys", "pairs")},
    }


def exact_route_shapes(problem: RouteProblem, num_tokens: int) -> dict:
    """As `exact_shapes`, of a router's program: words, flat."""
    sized = problem._replace(num_tokens=num_tokens)
    return {**router_kernel.kernel_inputs(sized), **router_kernel.outputs(sized)[0]}


def route_tails(problem: RouteProblem, num_tokens: int) -> dict[str, int]:
    """Bytes of the last word of what torch's tensors end within one."""
    size = 4 if problem.dtype == "float32" else 2
    sizes = {"logits": num_tokens * problem.num_experts * size, "is_padding": num_tokens}
    return {name: bytes_ % 4 for name, bytes_ in sizes.items() if bytes_ % 4}


def resized(program: Program, shapes: dict) -> Program:
    """The program with other lengths of its buffers, as a launch on a smaller size has them."""

    def other(given):
        return {name: shapes.get(name, shape) for name, shape in given.items()}

    kernels = tuple(
        dataclasses.replace(k, inputs=other(k.inputs), outputs=other(k.outputs))
        for k in program.kernels
    )
    return dataclasses.replace(program, inputs=other(program.inputs), kernels=kernels)


# -- what such a call must give ---------------------------------------------------------------------


def want_of(problem, array, operands, limit=None):
    options = {}
    if "expert_map" in operands:
        options["expert_map"] = operands["expert_map"].tolist()
        options["ignore_invalid_experts"] = problem.ignore_invalid_experts
    if "num_valid_pairs" in operands:
        limit = int(operands["num_valid_pairs"])
    return oracle.align(
        array.ravel().tolist(),
        block_size=problem.block_size,
        num_experts=problem.num_experts,
        pad_sorted_ids=problem.pad_sorted_ids,
        num_valid_pairs=limit,
        return_inverse=True,
        **options,
    )


def assert_results(problem, results, want):
    assert len(results) == len(problem.outputs)
    for (name, shape), got in zip(problem.outputs.items(), results, strict=True):
        assert tuple(got.shape) == shape and got.dtype == torch.int32, name
        if name == "scatter_idx":
            expect = [i if row >= 0 else -1 for i, row in enumerate(want.row_of_pair)]
        else:
            expect = getattr(want, name)
        np.testing.assert_array_equal(got.flatten().numpy(), expect, err_msg=name)
