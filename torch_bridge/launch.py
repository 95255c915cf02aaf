"""Compiles our Pallas kernels for a launch outside XLA. Run as a process of its own; imports no torch.

The one file that uses private symbols: jaxlib's `MosaicGpuCompile` (in the CUDA plugin), the attribute
of the lowered custom call that holds the module, and the host code that Mosaic dumps, from which the
launch is read: grid, block, shared memory, and which buffer each parameter is. Whatever does not look
as in the releases that we checked is refused. Every program is run on the GPU against NumPy before it is
handed over: a defect ends this process, never the user's.

Protocol: a JSON request on standard input, files in the folder that it names, a JSON answer on standard
output's last line. An "error" of the whole answer holds for any program "until" the machine is "changed" or
the asking process "restart"ed; without an "until" it may pass by itself, as a lack of memory does.
"""

import ctypes
import importlib.util
import itertools
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

# The plugins whose compiler was checked: [oldest, first unknown).
OLDEST_JAXLIB, UNKNOWN_JAXLIB = (0, 11, 2), (0, 13, 0)
_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
_MASKED_QUANT = "silu_and_mul_masked_quant"


class CompileError(RuntimeError):
    """A program could not be compiled or proved right."""


class MachineError(CompileError):
    """No program can be compiled here, because of what is installed or how the GPU is set up."""


class KernelLaunch(NamedTuple):
    """How a compiled kernel is launched.

    Attributes:
        entry: its symbol in the cubin.
        grid, cluster, block: CTAs of the grid and of a cluster, and threads, in x, y, z.
        shared_bytes: dynamic shared memory.
        parameters: for each 64-bit parameter, the name of its buffer.
    """

    entry: str
    grid: tuple[int, int, int]
    cluster: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    parameters: tuple[str, ...]


# -- reading Mosaic's host code ------------------------------------------------------------------

_LOAD = re.compile(r"(%\w+) = load ptr, ptr (%\w+)")
_SLOT = re.compile(r"(%\w+) = getelementptr \{ ptr[^}]*\}, ptr %\w+, i32 0, i32 (\d+)")
_STORE = re.compile(r"store ptr (%\w+), ptr (%\w+)")
# jaxlib 0.11 launches there; 0.12 hands the same numbers (and one more) to its runtime.
_CALL = re.compile(
    r"@mosaic_gpu_(?:launch_kernel|build_kernel_spec)\(ptr %\w+, ((?:i32 -?\d+, )+)"
    r"ptr %\w+, ptr %\w+\)"
)


def read_launch(host_llvm: str, entry: str, buffers: tuple[str, ...]) -> KernelLaunch:
    """The launch of the one kernel in Mosaic's host code; `buffers` are the custom call's, in order."""
    body = host_llvm[host_llvm.index("define ") :].split("\n}\n")[0]
    calls = _CALL.findall(body)
    if len(calls) != 1:
        raise CompileError(f"expected one launch in the host code of {entry}; got {len(calls)}")
    numbers = [int(x) for x in re.findall(r"-?\d+", calls[0].replace("i32", ""))]
    cluster = [max(size, 1) for size in numbers[3:6]]  # 0, 0, 0: none
    divides = all(size % part == 0 for size, part in zip(numbers[:3], cluster, strict=True))
    if len(numbers) not in (11, 12) or not divides or cluster[0] * cluster[1] * cluster[2] > 8:
        raise CompileError(f"the launch of {entry} has an unknown form: {numbers}")
    loads = _LOAD.findall(body)
    table = loads[0][1]  # the array of buffers: its first one is loaded first
    index_of = {name: 0 for name, address in loads if address == table}
    at = re.compile(rf"(%\w+) = getelementptr ptr, ptr {table}, i32 (\d+)")
    addresses = {name: int(index) for name, index in at.findall(body)}
    index_of |= {name: addresses[address] for name, address in loads if address in addresses}
    slots = {name: int(index) for name, index in _SLOT.findall(body)}
    parameters: dict[int, str] = {}
    for value, address in _STORE.findall(body):
        if address in slots:
            if value not in index_of or index_of[value] >= len(buffers):
                raise CompileError(f"a parameter of {entry} is no buffer of the call: {value}")
            parameters[slots[address]] = buffers[index_of[value]]
    if sorted(parameters) != list(range(len(parameters))) or not parameters:
        raise CompileError(f"the parameters of {entry} are not understood: {parameters}")
    return KernelLaunch(
        entry,
        (numbers[0], numbers[1], numbers[2]),
        (cluster[0], cluster[1], cluster[2]),
        (numbers[6], numbers[7], numbers[8]),
        numbers[9],
        tuple(parameters[i] for i in range(len(parameters))),
    )


# -- compiling -----------------------------------------------------------------------------------


def _custom_call_modules(operation: Any) -> list[bytes]:
    found = []
    for region in operation.regions:
        for block in region:
            for op in block:
                name = op.operation.name
                if name == "stablehlo.custom_call" and "mosaic_gpu" in str(
                    op.attributes["call_target_name"]
                ):
                    found.append(op.attributes["mhlo.backend_config"]["module"].value_bytes)
                found += _custom_call_modules(op.operation)
    return found


def lower(kernel: Any) -> bytes:
    """The serialised Mosaic module of one kernel, launched with PDL. Starts no backend but the CPU's."""
    import jax
    import jax.numpy as jnp

    from moe_align_jax._simt import mosaic

    if hasattr(kernel, "call"):  # written in Pallas itself
        program, structs = jax.jit(kernel.call), kernel.structs
    else:
        structs = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in kernel.inputs.values()]
        program = jax.jit(mosaic.launcher(kernel, pdl=True))
    module = program.trace(*structs).lower(lowering_platforms=("cuda",)).compiler_ir()
    assert module is not None  # StableHLO, the dialect that is there always
    with module.context:
        found = _custom_call_modules(module.operation)
    if len(found) != 1:
        raise CompileError(f"expected one Mosaic call in {kernel.name}; got {len(found)}")
    return found[0]


class Compiler:
    """jaxlib's Mosaic compiler; needs a current CUDA context.

    Attributes:
        lower_seconds: what lowering, up to Mosaic's module, has taken so far.
    """

    def __init__(self, plugin: str | None = None):
        import jaxlib.version

        self.lower_seconds = 0.0
        version = tuple(int(x) for x in re.findall(r"\d+", jaxlib.version.__version__)[:3])
        if not OLDEST_JAXLIB <= version < UNKNOWN_JAXLIB:
            low, high = (".".join(map(str, v)) for v in (OLDEST_JAXLIB, UNKNOWN_JAXLIB))
            raise MachineError(f"needs jaxlib >= {low}, < {high}; this is {version}")
        try:
            self._compile = ctypes.CDLL(plugin or _plugin_library()).MosaicGpuCompile
        except (OSError, AttributeError) as error:
            raise MachineError(f"jax's CUDA plugin does not load: {error}") from None
        self._compile.argtypes = [ctypes.c_char_p, ctypes.c_int]
        self._compile.restype = ctypes.c_void_p

    def __call__(self, kernel: Any) -> tuple[str, KernelLaunch]:
        """(PTX, launch) of a kernel."""
        begun = time.monotonic()
        module = lower(kernel)
        self.lower_seconds += time.monotonic() - begun
        with tempfile.TemporaryDirectory() as folder:
            dump = {
                "MOSAIC_GPU_DUMP_TO": folder,
                "MOSAIC_GPU_DUMP_PTX": "1",
                "MOSAIC_GPU_DUMP_HOST_LLVM": "1",
            }
            os.environ.update(dump)
            try:
                compiled = self._compile(module, len(module))
            finally:
                for name in dump:  # lowering the next kernel would dump too
                    del os.environ[name]
            if not compiled:
                raise CompileError(f"MosaicGpuCompile refused {kernel.name}")
            ptx, host = (list(Path(folder).glob(f"*.{kind}")) for kind in ("ptx", "ll"))
            if len(ptx) != 1 or len(host) != 1:
                raise CompileError(f"Mosaic dumped {len(ptx)} PTX and {len(host)} LLVM files")
            text = ptx[0].read_text()
            [entry] = re.findall(r"\.visible \.entry (\w+)\(", text)
            buffers = (*kernel.inputs, *kernel.outputs)
            launch = read_launch(host[0].read_text(), entry, buffers)
            if text.split(")")[0].count(".param .u64") != len(launch.parameters):
                raise CompileError(f"{entry} takes other parameters than its launch passes")
            return text, launch


def _plugin_library() -> str:
    for name in _PLUGINS:
        if importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(name):
            return importlib.import_module(name)._get_library_path()
    raise MachineError("no CUDA plugin of jax is installed: install the extra cuda13 or cuda12")


# -- proving a program ---------------------------------------------------------------------------


def _launches(driver: Any, kernels: list[dict], cubins: list[bytes], names: list[str]) -> Any:
    specs = []
    for kernel, cubin in zip(kernels, cubins, strict=True):
        function = driver.Function(cubin, kernel["entry"])
        function.allow_shared(kernel["shared_bytes"])
        positions = tuple(names.index(name) for name in kernel["parameters"])
        specs.append(
            driver.LaunchSpec(
                function,
                kernel["grid"],
                kernel["cluster"],
                kernel["block"],
                kernel["shared_bytes"],
                positions,
            )
        )
    return driver.Launches(specs, len(names))


def _prove_masked_quant(driver: Any, problem: Any, launches: Any, names: list[str]) -> None:
    from moe_align_jax._kernels.masked_quant import trial

    given, buffers = trial.arrays(problem), {}
    try:
        for name, array in given.items():
            buffers[name] = driver.Memory(array.nbytes)
            buffers[name].write(array)
        for name, size in trial.sizes(problem, given).items():
            buffers[name] = driver.Memory(size)
            buffers[name].fill(0x5EED5EED)
        launches.values[:] = [buffers[name].address for name in names]
        launches.enqueue(0)
        driver.synchronize()
        wrong = trial.mismatch(problem, given, lambda name, into: buffers[name].read(into))
    finally:
        for memory in buffers.values():
            memory.free()
    if wrong:
        raise CompileError(f"{problem}: {wrong}")


def prove(
    driver: Any, problem: Any, kernels: list[dict], cubins: list[bytes], shapes: dict
) -> None:
    """Runs a program on random input, at its largest size and, if it can, a smaller one, against NumPy."""
    import numpy as np

    names, inputs = list(shapes), _beside("trials")
    launches = _launches(driver, kernels, cubins, names)
    if problem.name == _MASKED_QUANT:
        return _prove_masked_quant(driver, problem, launches, names)
    if problem.name == "moe_align_block_size":
        n = problem.num_pairs
        sizes = sorted({n, max(1, n * 3 // 4 - 5)}) if problem.sized_at_launch else [n]
        trials = [inputs.align_trial(problem, n, seed) for seed, n in enumerate(sizes)]
    else:
        trials = [inputs.batched_trial(problem, seed) for seed in range(2)]
    for trial in trials:
        buffers: dict[str, Any] = {}
        try:
            for name, shape in shapes.items():
                if name in trial.words:
                    continue
                if name in trial.arrays:
                    buffers[name] = driver.Memory(trial.arrays[name].nbytes)
                    buffers[name].write(trial.arrays[name])
                else:
                    words = trial.want[name].size if name in problem.outputs else np.prod(shape)
                    buffers[name] = driver.Memory(4 * int(words))
                    buffers[name].fill(0x5EED5EED)
            values = {name: memory.address for name, memory in buffers.items()}
            values |= {name: word << 8 for name, word in trial.words.items()}
            launches.values[:] = [values.get(name, 0) for name in names]
            launches.enqueue(0)
            driver.synchronize()
            for name in problem.outputs:
                got = buffers[name].read(np.empty(trial.want[name].shape, np.int32))
                if (wrong := np.flatnonzero(got != trial.want[name])).size:
                    at = int(wrong[0])
                    raise CompileError(
                        f"{problem} gives {name}[{at}] = {got[at]}, not {trial.want[name][at]}"
                    )
        finally:
            for memory in buffers.values():
                memory.free()


# -- the process ---------------------------------------------------------------------------------


def compile_program(compiler: Compiler, problem: Any) -> tuple[list[dict], list[str], dict]:
    """(launches as dicts, PTX of each kernel, shape of every buffer between the kernels)."""
    if problem.name == _MASKED_QUANT:
        from moe_align_jax._kernels import masked_quant

        try:
            kernel = masked_quant.direct_kernel(problem)
        except NotImplementedError as reason:
            raise CompileError(str(reason)) from None
        ptx, launch = compiler(kernel)
        return [launch._asdict()], [ptx], {**kernel.inputs, **kernel.outputs}
    from moe_align_jax import _tuning
    from moe_align_jax._kernels import block_align

    program = block_align.build(problem, _tuning.config_for(problem))
    shapes: dict[str, tuple[int, ...]] = dict(program.inputs)
    launches, texts = [], []
    for kernel in program.kernels:
        shapes |= kernel.outputs
        ptx, launch = compiler(kernel)
        launches.append(launch._asdict())
        texts.append(ptx)
    return launches, texts, shapes


def _beside(name: str) -> Any:
    """The module of that file here. By path: the package `torch_bridge` would import torch."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _enter(driver: Any, device: int) -> None:
    try:
        driver.enter(device)
    except driver.DriverError as error:
        if error.code == driver.DEVICE_UNAVAILABLE and driver.compute_mode(device):
            raise MachineError(
                f"{error} Its compute mode keeps a second process out: `nvidia-smi -c DEFAULT` lets it in."
            ) from None
        raise


def _serve(request: dict) -> list[dict]:
    driver = _beside("driver")
    # What is kept under a key comes from the sources in it. (A benchmark keeps nothing.)
    if "sources" in request and request["sources"] != _beside("modules").source_digest():
        raise CompileError(
            "moe_align_jax or its tuning tables were changed after this process had imported them: "
            "start a new process"
        )
    from moe_align_jax import _quant, types

    _enter(driver, request["device"])
    compiler, answers = Compiler(), []
    for index, (kind, fields) in enumerate(request["problems"]):
        module = _quant if hasattr(_quant, kind) else types
        problem, lowered_before = getattr(module, kind)(**fields), compiler.lower_seconds
        times = [time.monotonic()]
        try:
            launches, texts, shapes = compile_program(compiler, problem)
            times.append(time.monotonic())
            cubins = [driver.assemble(ptx) for ptx in texts]
            times.append(time.monotonic())
            prove(driver, problem, launches, cubins, shapes)
            times.append(time.monotonic())
        except CompileError as error:
            answers.append({"error": str(error)})
            continue
        files = []
        for k, cubin in enumerate(cubins):
            files.append(f"{index}-{k}.cubin")
            Path(request["folder"], files[-1]).write_bytes(cubin)
        between = {
            name: shape
            for name, shape in shapes.items()
            if name not in problem.inputs and name not in problem.outputs
        }
        lower = compiler.lower_seconds - lowered_before
        compiled, assemble, proof = (b - a for a, b in itertools.pairwise(times))
        steps = {"lower": lower, "compile": compiled - lower, "assemble": assemble, "prove": proof}
        answers.append(
            {
                "kernels": launches,
                "files": files,
                "between": between,
                "seconds": {step: round(seconds, 3) for step, seconds in steps.items()},
            }
        )
    return answers


def main() -> int:
    """Reads the request, writes the cubins, prints the answer."""
    here = str(Path(__file__).parent)
    sys.path[:] = [p for p in sys.path if p != here]  # its files are no top-level modules
    sys.path.insert(0, str(Path(here).parent))
    os.environ["JAX_PLATFORMS"] = "cpu"  # jax is only a compiler here
    try:
        answer: dict[str, Any] = {"programs": _serve(json.load(sys.stdin))}
    except Exception as error:  # the parent shows it; a traceback helps nobody there
        answer = {"error": f"{type(error).__name__}: {error}"}
        if isinstance(error, MachineError):
            answer["until"] = "changed"
        elif isinstance(error, CompileError | ImportError):
            answer["until"] = "restart"
    print("\n" + json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # no atexit of jax or CUDA: the answer is out
