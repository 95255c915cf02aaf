"""Compiles the kernels that write into other GPUs without a GPU, and checks the result.

    python -m tests.no_gpu.peer_rows

Lowered for meshes of 2 to 8 devices: nothing spills, all CTAs are resident on the smallest GPU with NVLink,
rows move 16 bytes at a time where their length allows, and each CTA has a fence for all devices before it
counts its arrival. A wait that takes over a minute traps. Exit code 1 otherwise.
"""

import itertools
import re
import sys
from collections.abc import Iterator

from tests.no_gpu import ptx, script, worker

# The limit of a wait, in nanoseconds, that docs/expert_parallel.md names.
MINUTE = 60 * 10**9


def problems() -> Iterator:
    """Payloads as they are sent, sizes that are measured, and rows of odd lengths."""
    import jax.numpy as jnp
    import numpy as np

    from moe_align_jax._expert_parallel.nvlink_kernels import (
        Combine,
        Dispatch,
        Field,
        ReturnRows,
        Send,
    )
    from moe_align_jax._simt.language import Devices

    f32, bf16, e4m3 = (np.dtype(name) for name in ("float32", jnp.bfloat16, jnp.float8_e4m3fn))
    for count in (2, 8):
        devices, local = Devices(count), 256 // count
        plain, quantised = Field(7168, bf16), (Field(7168, e4m3), Field(56, f32))
        yield Send(128, 8, (plain,), devices, local, True, e4m3)
        yield Send(128, 8, quantised, devices, local, True)
        for tokens in (8, 128):
            yield Dispatch(Send(tokens, 8, (plain,), devices, local, True, e4m3), count * tokens)
        yield Dispatch(Send(128, 8, (plain,), devices, local, True), count * 128)
        yield Dispatch(Send(64, 8, (plain,), devices, local, True), count * 64, True)
        yield Dispatch(Send(512 // count * 4, 4, quantised, devices, local, True), 128)
        yield Dispatch(Send(512 // count * 2, 4, quantised, devices, local, True), 128)
        for tokens in (8, 128):
            yield Combine(tokens, 8, local * count * tokens, 7168, bf16, devices, local)
        yield Send(4096, 8, (plain,), devices, local, True)
        yield ReturnRows(4096, plain, devices)
        odd = (Field(6, bf16), Field(3, f32))
        yield Send(5, 3, odd, devices, 3, False)
        yield ReturnRows(5, Field(6, bf16), devices)
        yield Dispatch(Send(5, 3, odd, devices, 3, True), 4)
        yield Combine(5, 3, 15, 24, bf16, devices, 3)
    for count in (3, 4, 6):  # by how many warpgroups a CTA has
        yield Combine(128, 8, 85 * count * 128, 7168, bf16, Devices(count), 85)


def lowered(problem, windowed: bool) -> bytes:
    """The Mosaic module of a problem in a mesh of its devices, with a window at an address without memory."""
    import jax
    from jax.sharding import PartitionSpec as P

    from moe_align_jax._expert_parallel.transports import nvlink, windows
    from moe_align_jax._simt.window import Window

    windows.for_kernel = lambda *_: Window(windows.FIRST_ADDRESS, windows.SIZES[-1])
    count = problem.devices.count
    mesh = jax.make_mesh(
        (count,), ("ep",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
    )
    given = problem.inputs.values()
    structs = [jax.ShapeDtypeStruct((s[0] * count, *s[1:]), dtype) for s, dtype in given]
    call = jax.shard_map(
        lambda *x: nvlink._launch(problem, *x, windowed=windowed),
        mesh=mesh,
        in_specs=P("ep"),
        out_specs=P("ep"),
    )
    program = jax.jit(call).trace(*structs).lower(lowering_platforms=("cuda",))
    ir = program.compiler_ir()
    by_xla = "uses_xla_collective_metadata = true" in str(ir)
    assert by_xla != windowed, f"XLA is asked for addresses: {by_xla}"
    [module] = worker._load_launch()._custom_call_modules(ir.operation)
    return module


def faults(problem, windowed: bool, text: str, used: ptx.Usage) -> Iterator[str]:
    from moe_align_jax._expert_parallel import nvlink_kernels
    from moe_align_jax._expert_parallel.nvlink_kernels.copying import MIN_SMS

    kernel = nvlink_kernels.build(problem)
    threads = kernel.num_threads
    yield from worker.resource_faults(used, threads, text)
    resident = worker.REGISTERS_PER_SM // (-(-used.registers // 8) * 8 * threads)
    if kernel.num_ctas > resident * MIN_SMS:
        yield f"{kernel.num_ctas} CTAs, of which {resident} are resident on an SM"
    # Rows of few tokens carry their epoch: they need no fence, and the flag says that the kernel has begun.
    tagged = windowed and problem.num_tokens <= 8
    tagged &= not (isinstance(problem, nvlink_kernels.Combine) and problem.devices.count > 4)
    fences = re.findall(r"fence\.acq_rel\.sys", text)
    signal = r"acq_rel\.sys; st\.relaxed\.sys" if windowed else r"red\.relaxed\.sys"
    signal = r"st\.relaxed\.sys\.global\.u32" if tagged else signal
    signals, waits = re.findall(signal, text), re.findall(r"ld\.acquire\.sys", text)
    if (len(fences), len(signals), len(waits)) != (not tagged, 1, 1):
        yield f"{len(fences)} fences, {len(signals)} signals, {len(waits)} waits; tagged {tagged}"
    moves = [re.search(rf"{what}\.relaxed\.sys\.global\.v2\.u64", text) for what in ("st", "ld")]
    if tagged and problem.num_tokens == 8 and not all(moves):  # the rows of 5 are of odd lengths
        yield "tagged words are put or taken 8 bytes at a time"
    tickets = re.findall(r"atom\.add\.acq_rel\.gpu", text)
    if len(tickets) != windowed:
        yield f"{len(tickets)} tickets of CTAs"
    if not re.search(rf"setp\.gt\.u64 late, now, {MINUTE}; @late trap;", text):
        yield "it waits for another device for ever, or longer than the docs say"
    if isinstance(problem, nvlink_kernels.Dispatch):
        width = "u64" if windowed else "u32"
        puts = re.findall(rf"st\.relaxed\.sys\.global\.{width}", text)
        takes = re.findall(rf"ld\.relaxed\.sys\.global\S*\.{width}", text)
        if not puts or not takes:
            yield f"{len(puts)} puts, {len(takes)} takes"
        if early := re.findall(r"ld\.global\.nc\S*", text):
            yield f"{early} may read what has not come yet"
    first = next(iter(problem.outputs.values()))
    width = {0: "v4"}.get(first[0][-1] * first[1].itemsize % 16, "b32")
    width = "v2" if getattr(problem, "quantise", None) else width
    if not re.search(rf"st\.(?:global\.)?{width}", text):
        yield f"rows of {first} are not stored by {width}"


def check(plugin: str, runtime: str) -> Iterator[script.Report]:
    import jax

    from moe_align_jax._expert_parallel import nvlink_kernels
    from moe_align_jax._simt import window

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    checker = worker.Checker(plugin, runtime)
    for problem, windowed in script.one_in_sample(itertools.product(problems(), (False, True))):
        kernel = nvlink_kernels.build(problem)
        if windowed and (not kernel.staged or window.unsupported(kernel)):
            continue
        dump = checker.compiler.dump([lowered(problem, windowed)], [str(problem)])
        [(text, _)] = checker.launch.read_dump(dump).values()
        used = ptx.usage(worker._ptxas(text))
        where = "windows" if windowed else "outputs"
        wrong = [*faults(problem, windowed, text, used)]
        yield f"{used.registers:3} registers  {where}  {problem}"[:150], wrong


if __name__ == "__main__":
    sys.exit(script.main("tests.no_gpu.peer_rows", check))
