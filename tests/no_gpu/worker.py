"""Compiles some of the cases and checks what comes out. Started by `compile`, in the toolchain's folder.

    python -m tests.no_gpu.worker PLUGIN RUNTIME SAMPLE FIRST STEP

It takes every STEP-th case of one in SAMPLE.

Prints a JSON line per case: its name, kernels (name, registers, shared bytes), and what is wrong.
"""

import ctypes
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.no_gpu import cases, ptx
from tests.no_gpu.cases import BATCH, Case

_MAX_PARAMETERS, _MAX_MAPS = 64, 16
_MAP = 0x7A0000  # what stands, plus its number, where a descriptor would be
REGISTERS_PER_SM = 65_536
_DESCRIBED = ("dtype", "sizes", "strides", "box", "swizzle")
# Shared memory is asked for in whole kilobytes.
_SHARED_STEP = 1024
_STREAM = 0x77


class _Map(ctypes.Structure):
    """As in recorder.c: the arguments of a `cuTensorMapEncodeTiled`."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("dtype", "rank", "interleave", "swizzle")),
        *((name, ctypes.c_int) for name in ("promotion", "fill")),
        ("address", ctypes.c_uint64),
        *((name, ctypes.c_uint64 * 5) for name in ("sizes", "strides")),
        *((name, ctypes.c_uint * 5) for name in ("box", "steps")),
    ]

    @property
    def arguments(self) -> tuple:
        rank = self.rank
        vectors = (self.sizes[:rank], self.strides[: rank - 1], self.box[:rank], self.steps[:rank])
        more = (self.interleave, self.swizzle, self.promotion, self.fill)
        return self.dtype, self.address, *map(tuple, vectors), *more


class _Recorded(ctypes.Structure):
    """As in recorder.c."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("num_parameters", "modules", "launches")),
        ("most_shared_bytes", ctypes.c_int),
        *((name, ctypes.c_uint * 3) for name in ("grid", "block", "cluster")),
        *((name, ctypes.c_uint) for name in ("shared_bytes", "programmatic")),
        ("stream", ctypes.c_uint64),
        ("parameters", ctypes.c_uint64 * _MAX_PARAMETERS),
        ("entry", ctypes.c_char * 256),
        ("num_maps", ctypes.c_int),
        ("maps", _Map * _MAX_MAPS),
    ]


def _load_launch() -> Any:
    # By path: the package `torch_bridge` would import torch.
    path = Path(__file__).parents[2] / "torch_bridge/_direct/compile_worker.py"
    spec = importlib.util.spec_from_file_location("launch", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


class Checker:
    """jaxlib's compiler over the recording libcuda."""

    def __init__(self, plugin: str, runtime: str):
        import jaxlib.version
        from jax.experimental.mosaic import gpu  # noqa: F401  (it sets the variable below)

        # jaxlib 0.12 passes the kernel and a device, too.
        self._second_abi = jaxlib.version.__version_info__ >= (0, 12)
        os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = runtime
        library = ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
        self.recorded = _Recorded.in_dll(library, "recorded")  # a real libcuda has no such thing
        self.launch, self._library = _load_launch(), library
        self.driver = self.launch._beside("driver")
        self.compiler = self.launch.Compiler(ThreadPoolExecutor(1), plugin)
        self._mode = ""
        self._compiled = 0
        compile_module = self.compiler._compile

        def remember(module: bytes, size: int) -> int:
            self._compiled = compile_module(module, size)
            return self._compiled

        self.compiler._compile = remember
        as_launched_directly = self.launch.lower
        self.launch.lower = lambda kernel: (
            as_launched_directly(kernel) if self._mode == "direct" else self._lower_for_xla(kernel)
        )

    def _lower_for_xla(self, kernel: Any) -> bytes:
        """As `jit` and `vmap` take it: without PDL."""
        import jax
        import jax.numpy as jnp

        from moe_align_jax._simt import mosaic

        call, batch = mosaic.launcher(kernel), ()
        if self._mode == "vmap":
            call, batch = jax.vmap(call), (BATCH,)
        structs = [jax.ShapeDtypeStruct(batch + s, jnp.int32) for s in kernel.inputs.values()]
        traced = jax.jit(call).trace(*structs)
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir()
        with module.context:
            [found] = self.launch._custom_call_modules(module.operation)
        return found

    def check(self, case: Case) -> dict[str, Any]:
        """One program: its kernels, and what is wrong with them."""
        from moe_align_jax._align import kernels as block_align
        from moe_align_jax._align import tables

        begun, kernels, wrong = time.monotonic(), [], []
        self._mode = case.mode
        config = tables.config_for(case.problem)
        program = block_align.build(case.problem, config, batched=case.mode == "vmap")
        for position, kernel in enumerate(program.kernels):
            try:
                [(text, launch)] = self.compiler([kernel])
                used = ptx.usage(self.assembled(text) if case.mode == "direct" else _ptxas(text))
            except self.launch.CompileError as error:
                wrong.append(f"{kernel.name}: {error}")
                continue
            faults = (
                *launch_faults(kernel, case.mode, launch),
                *self._recording_faults(kernel, launch),
                *resource_faults(used, launch.block[0], text),
                *order_faults(text, pdl=case.mode == "direct", first=position == 0),
                *load_faults(text, launch.parameters, getattr(case.problem, "id_words", 1)),
                *mail_faults(text, kernel.mailbox),
            )
            wrong += [f"{kernel.name}: {fault}" for fault in faults]
            kernels.append((kernel.name, launch.block[0], used.registers, launch.shared_bytes))
        seconds = round(time.monotonic() - begun, 2)
        return {"case": str(case), "kernels": kernels, "wrong": wrong, "seconds": seconds}

    def assembled(self, text: str) -> str:
        """ptxas' account of a kernel that is launched directly: as the driver assembles it."""
        return _ptxas(text, *["--compile-only"] * self.driver.is_linked(text))

    def _recording_faults(self, kernel: Any, launch: Any) -> Iterator[str]:
        """Launches through jaxlib's own host code, and compares with what was read from it."""
        recorded = self.recorded
        buffers = (*kernel.inputs, *kernel.outputs)
        sentinels = {name: 0x7F0000000000 + 0x1000 * i for i, name in enumerate(buffers)}
        recorded.num_parameters, recorded.launches = len(launch.parameters), 0
        recorded.num_maps = 0
        pointers = (ctypes.c_void_p * len(buffers))(*sentinels.values())
        function, host, spec = (ctypes.c_void_p * 3).from_address(self._compiled)
        arguments: list[Any] = [function, _STREAM, ctypes.cast(pointers, ctypes.c_void_p)]
        types = [ctypes.c_void_p] * 3
        if self._second_abi:
            arguments, types = [spec, *arguments, 0], [ctypes.c_void_p, *types, ctypes.c_int]
        ctypes.CFUNCTYPE(None, *types)(host)(*arguments)
        if (recorded.launches, recorded.stream) != (1, _STREAM):
            yield f"{recorded.launches} launches on stream {recorded.stream:#x}"
            return
        names = {value: name for name, value in sentinels.items()}
        names[_MAP] = self.launch._beside("host_code").TENSOR_MAPS
        passed = recorded.parameters[: len(launch.parameters)]
        pairs = {
            "entry": (launch.entry, recorded.entry.decode()),
            "grid": (launch.grid, tuple(recorded.grid)),
            "block": (launch.block, tuple(recorded.block)),
            "cluster": (launch.cluster, tuple(recorded.cluster)),
            "shared bytes": (launch.shared_bytes, recorded.shared_bytes),
            "parameters": (launch.parameters, tuple(names.get(x, hex(x)) for x in passed)),
        }
        for what, (read, happened) in pairs.items():
            if read != happened:
                yield f"{what} read as {read}; jaxlib launched with {happened}"
        yield from self._map_faults(launch, sentinels)
        if recorded.shared_bytes > 48 << 10 and recorded.most_shared_bytes < recorded.shared_bytes:
            yield f"launched with more shared memory than allowed: {recorded.most_shared_bytes}"

    def _map_faults(self, launch: Any, sentinels: dict[str, int]) -> Iterator[str]:
        """Encodes the descriptors as a launch of ours does, and compares with jaxlib's host code."""
        recorded = self.recorded
        theirs = [one.arguments for one in recorded.maps[: recorded.num_maps]]
        values = [*sentinels.values()]
        names = [*sentinels]
        maps = [
            self.driver.BoundTensorMap(
                names.index(one["buffer"]), -1, 0, *(one[x] for x in _DESCRIBED)
            )
            for one in launch.tensor_maps
        ]
        recorded.num_maps = 0
        if maps:
            self.driver.TensorMaps(self.driver.Driver(self._library), maps).address(values)
        ours = [one.arguments for one in recorded.maps[: recorded.num_maps]]
        if ours != theirs:
            yield f"descriptors {ours}; jaxlib's are {theirs}"


def _ptxas(text: str, *options: str) -> str:
    """ptxas' account of one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(text)
        command = ["cuda_sdk_lib/bin/ptxas", "-v", "-arch=sm_90a", *options, str(source), "-o"]
        done = subprocess.run(
            [*command, str(source.with_suffix(".cubin"))], capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(f"ptxas failed: {done.stderr.strip()}")
    return done.stderr + done.stdout


# -- what must hold ------------------------------------------------------------------------------


def launch_faults(kernel: Any, mode: str, launch: Any) -> Iterator[str]:
    """The launch against the kernel's own description."""
    from moe_align_jax._core.hopper import MAX_SHARED_BYTES

    grid, batch = (kernel.num_ctas, 1, 1), BATCH if mode == "vmap" else 1
    if batch > 1:  # Mosaic folds axes of one CTA or cluster
        alone = kernel.num_ctas == kernel.cluster
        grid = (batch * kernel.num_ctas, 1, 1) if alone else (kernel.num_ctas, batch, 1)
    if launch.grid != grid:
        yield f"grid {launch.grid}, not {grid}"
    if launch.cluster != (kernel.cluster, 1, 1):
        yield f"clusters of {launch.cluster}, not {kernel.cluster}"
    if launch.block != (kernel.num_threads, 1, 1):
        yield f"block {launch.block}, not {kernel.num_threads} threads"
    asked = kernel.shared_words * 4
    if not asked <= launch.shared_bytes < asked + _SHARED_STEP:
        yield f"{launch.shared_bytes} bytes of shared memory; the kernel asks for {asked}"
    if launch.shared_bytes > MAX_SHARED_BYTES:
        yield f"{launch.shared_bytes} bytes of shared memory; an SM has {MAX_SHARED_BYTES}"
    if missing := set(kernel.outputs) - set(launch.parameters):
        yield f"outputs that are not passed: {sorted(missing)}"


def resource_faults(used: ptx.Usage, threads: int, text: str) -> Iterator[str]:
    """Nothing spilled, and the CTA fits into an SM's registers."""
    if (spilled := used.spill_stores + used.spill_loads) or used.stack:
        yield f"{spilled} bytes spilled, {used.stack} bytes of stack"
    # Registers are handed out 8 at a time.
    if (taken := -(-used.registers // 8) * 8 * threads) > REGISTERS_PER_SM:
        yield f"{used.registers} registers x {threads} threads take {taken} of {REGISTERS_PER_SM}"
    if (most := ptx.max_threads(text)) != threads:
        yield f"compiled for CTAs of {most} threads, launched with {threads}"


def order_faults(text: str, *, pdl: bool, first: bool) -> Iterator[str]:
    """With PDL every kernel waits for what was launched before it; without, none does."""
    waits = text.find("griddepcontrol.wait")
    if pdl != (waits >= 0) or (not pdl and "griddepcontrol" in text):
        yield f"griddepcontrol.wait {'is missing' if pdl else 'without PDL'}"
    # Kernels behind the first may read inputs before: the first has waited for their writer.
    if pdl and waits >= 0:
        early = [a for a in ptx.global_accesses(text) if a.position < waits]
        if early := [a for a in early if first or not a.instruction.startswith("ld")]:
            yield f"{early[0].instruction} ahead of griddepcontrol.wait"


def load_faults(text: str, parameters: tuple[str, ...], id_words: int) -> Iterator[str]:
    """Ids may start at any word, though the pointer counts as aligned: no load may span two of them. And all
    must be free to be issued together (8192x64x128: 2.50 us, not 2.93, H200)."""
    if "topk_ids" not in parameters:
        return
    at = parameters.index("topk_ids")
    loads = [
        access
        for access in ptx.global_accesses(text)
        if at in access.parameters and access.instruction.startswith("ld")
    ]
    if not loads:
        yield "topk_ids is passed and never loaded: this check has gone blind"
    for load in loads:
        if load.bytes > 4 * id_words:
            yield f"{load.instruction} of {load.bytes} bytes from topk_ids"
        if any(name.startswith("selp") for name in ptx.computed_by(text, load.register)):
            yield "a load of topk_ids whose address hangs on a predicate: ptxas may put it off"


def mail_faults(text: str, mailbox: int) -> Iterator[str]:
    """The CTAs of a cluster tell each other by mail alone: a release to the cluster waits for all of a CTA's
    stores (0.3 to 0.5 us, H200)."""
    if bool(mailbox) != ("st.async" in text):
        yield f"a mailbox of {mailbox} words, and {text.count('st.async')} posts"
    # Mosaic's own barrier ahead of the body, which would keep the first loads waiting, is left out.
    if mailbox and (arrivals := text.count("barrier.cluster.arrive")) != 1:
        yield f"{arrivals} barriers of the cluster, not 1"
    found = re.findall(r"(?:fence\.acq_rel|fence\.sc|membar|barrier\.cluster\.arrive)[\w.]*", text)
    if slow := [name for name in found if not name.startswith("barrier.cluster.arrive.relaxed")]:
        yield f"{slow[0]} in an alignment kernel"


def main(plugin: str, runtime: str, sample: str, first: str, step: str) -> None:
    checker = Checker(plugin, runtime)
    chosen = list(cases.one_in(int(sample), cases.all_cases()))
    for case in chosen[int(first) :: int(step)]:
        print(json.dumps(checker.check(case)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # without the destructors of a driver that is none
