"""Compiles the kernels that write into other GPUs without a GPU, and checks the result.

    python -m tests.no_gpu.peer_rows

Lowered for a mesh of 2, 4 and 8 devices: nothing spills, rows move 16 bytes at a time where their length
allows, and each CTA has a fence for all devices before it counts its arrival. Exit code 1 otherwise.
"""

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.no_gpu import ptx, toolchain, worker


def problems() -> Iterator:
    """Payloads as they are sent, sizes that are measured, and rows of odd lengths."""
    import numpy as np

    from moe_align_jax._kernels.peer_rows import Field, GiveBack, Send
    from moe_align_jax._simt.language import Devices

    f32, i32 = np.dtype("float32"), np.dtype("int32")
    e4m3, bf16 = np.dtype("uint8"), np.dtype("uint16")
    for count in (2, 4, 8):
        devices = Devices(count)
        pair = (Field(8, f32, False), Field(8, i32, False))
        fp8 = (Field(7168, e4m3, True), Field(56, f32, True), *pair)
        for tokens in (8, 128):
            yield Send(tokens, 8, fp8, devices, 256 // count)
            yield GiveBack(tokens, Field(7168, bf16, False), devices)
        yield Send(4096, 8, (Field(7168, bf16, True), *pair), devices, 256 // count)
        yield GiveBack(4096, Field(7168, bf16, False), devices)
        odd = (Field(6, bf16, True), Field(3, f32, False), Field(3, i32, False))
        yield Send(5, 3, odd, devices, 3)
        yield GiveBack(5, Field(6, bf16, False), devices)


def lowered(problem) -> bytes:
    """The Mosaic module of a problem in a mesh of its devices."""
    import jax
    from jax.sharding import PartitionSpec as P

    from moe_align_jax._expert_parallel import nvlink
    from moe_align_jax._kernels import peer_rows

    kernel = peer_rows.build(problem)
    count = problem.devices.count
    mesh = jax.make_mesh(
        (count,), ("ep",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
    )
    given = [kernel.arrays[name] for name in kernel.inputs]
    structs = [jax.ShapeDtypeStruct((s[0] * count, *s[1:]), dtype) for s, dtype in given]
    call = jax.shard_map(
        lambda *x: nvlink._launch(problem, *x), mesh=mesh, in_specs=P("ep"), out_specs=P("ep")
    )
    program = jax.jit(call).trace(*structs).lower(lowering_platforms=("cuda",))
    [module] = worker._load_launch()._custom_call_modules(program.compiler_ir().operation)
    return module


def compiled(compile_module, module: bytes) -> str:
    """Its PTX."""
    with tempfile.TemporaryDirectory() as folder:
        dump = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTX": "1"}
        os.environ |= dump
        done = compile_module(module, len(module))
        for name in dump:  # lowering the next kernel would dump too
            del os.environ[name]
        if not done:
            raise RuntimeError("MosaicGpuCompile refused the kernel")
        [text] = [path.read_text() for path in Path(folder).glob("*.ptx")]
    return text


def faults(problem, text: str, used: ptx.Usage) -> Iterator[str]:
    yield from worker.resource_faults(used, 128, text)
    fences = re.findall(r"fence\.acq_rel\.sys", text)
    signals, waits = re.findall(r"red\.relaxed\.sys", text), re.findall(r"ld\.acquire\.sys", text)
    if (len(fences), len(signals), len(waits)) != (1, 1, 1):
        yield f"{len(fences)} fences, {len(signals)} signals, {len(waits)} waits; one of each"
    fields = problem.fields if hasattr(problem, "fields") else (problem.field,)
    wide = any(field.words % 4 == 0 for field in fields)
    if wide != bool(re.search(r"st\.(?:global\.)?v4", text)):
        yield f"16-byte stores: {not wide}, in rows of {[field.words for field in fields]} words"


def check(plugin: str, runtime: str) -> int:
    import jax
    from jax.experimental.mosaic import gpu  # noqa: F401  (it sets the variable below)

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = runtime
    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    compile_module = ctypes.CDLL(plugin).MosaicGpuCompile
    compile_module.argtypes = [ctypes.c_char_p, ctypes.c_int]
    compile_module.restype = ctypes.c_void_p
    wrong = count = 0
    for problem in problems():
        text = compiled(compile_module, lowered(problem))
        used = ptx.usage(worker._ptxas(text))
        found = [*faults(problem, text, used)]
        print(f"{used.registers:3} registers  {problem}"[:150], flush=True)
        for fault in found:
            print(f"    {fault}", file=sys.stderr, flush=True)
        wrong, count = wrong + len(found), count + 1
    print(f"{count} kernels, {wrong} faults")
    return wrong


def main() -> int:
    try:
        tools = toolchain.set_up()
    except toolchain.Missing as missing:
        print(f"tests.no_gpu.peer_rows: {missing}", file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "tests.no_gpu.peer_rows"]
    command += [str(tools.plugin), str(tools.runtime)]
    return subprocess.run(command, cwd=tools.folder, env=tools.environment()).returncode


if __name__ == "__main__":
    if len(sys.argv) == 3:
        status = 1 if check(*sys.argv[1:]) else 0
        sys.stdout.flush()
        os._exit(status)  # without the destructors of a driver that is none
    sys.exit(main())
