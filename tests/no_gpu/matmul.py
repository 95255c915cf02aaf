"""Compiles the kernels of the grouped matrix multiplication, and of its weights' gradient, without a GPU.

    python -m tests.no_gpu.matmul [PART_OF_A_NAME] [--sample N]

Of every form with every way to load, compute and store: nothing spills, wgmma is never serialised, the ring
fits into shared memory, and a kernel compiles in less than two seconds of CPU time, one of tiles of several
heights in three. Exit code 1 otherwise.
"""

import argparse
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.no_gpu import ptx, script, toolchain, worker
from tests.no_gpu.matmul_cases import (
    PiecesOf,
    activation_gradients,
    problems,
    spreads,
    weight_gradients,
)

MAX_SECONDS = 2.0
MAX_SECONDS_OF_HEIGHTS = 3.0  # a loop over k for each height
# Kernels that ptxas and the disassembler are given together.
_AT_ONCE = 12


def lower(problem: Any, config: Any) -> Any:
    """The kernel as `launch` calls it, lowered for a GPU."""
    import jax
    import jax.numpy as jnp

    from moe_align_jax._grouped_matmul import activation_gradient_kernel as ending
    from moe_align_jax._grouped_matmul import (
        kernel,
        launch,
        spread_kernel,
        token_sum_kernel,
        weight_gradient_experts,
        weight_gradient_kernel,
    )
    from moe_align_jax._grouped_matmul.problem import ActivationGradient, TokenSum, WeightGradient
    from moe_align_jax._grouped_matmul.spread import Spread

    if isinstance(problem, Spread):
        structs = [jax.ShapeDtypeStruct((problem.num_tokens * problem.top_k,), jnp.int32)]
        structs.append(jax.ShapeDtypeStruct(problem.grained(problem.num_tokens), problem.dtype))
        call = jax.jit(spread_kernel.build(problem, config))
        return call.trace(*structs).lower(lowering_platforms=("cuda",))

    if isinstance(problem, TokenSum):
        structs = [jax.ShapeDtypeStruct(*each) for each in problem.inputs.values()]
        call = jax.jit(functools.partial(token_sum_kernel.run, problem, tiles=config))
        return call.trace(*structs).lower(lowering_platforms=("cuda",))

    if isinstance(problem, ActivationGradient):
        structs = [jax.ShapeDtypeStruct(*each) for each in problem.inputs.values()]
        given = jax.eval_shape(functools.partial(ending.arguments, problem), *structs)
        call = jax.jit(ending.build(problem, config))
        return call.trace(*given).lower(lowering_platforms=("cuda",))

    if isinstance(problem, WeightGradient):
        structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in problem.inputs.values()]

        first = isinstance(config, PiecesOf)  # of two launches
        tiles = config.tiles if isinstance(config, PiecesOf) else config
        build = weight_gradient_kernel.build_pieces if first else weight_gradient_kernel.build
        call = jax.jit(build(problem, tiles))

        def made(*operands):
            experts, _ = weight_gradient_experts.located(problem, *operands[2:])
            given = functools.partial(
                weight_gradient_kernel.arguments, problem, tiles, interpret=False
            )
            if not tiles.pieces:
                return given(experts, *operands)
            experts, pieces = weight_gradient_experts.cut(experts, tiles.pieces, tiles.bk)
            of_pieces = given(pieces.experts, *operands, more=(pieces.used,))
            if first:
                return of_pieces
            sums = weight_gradient_kernel.build_pieces(problem, tiles)(*of_pieces)
            return given(experts, *operands, more=(pieces.begin, pieces.end), sums=sums)

        given = jax.eval_shape(made, *structs)
        return call.trace(*given).lower(lowering_platforms=("cuda",))

    def arguments(*operands):
        named = dict(zip(problem.inputs, operands, strict=True))
        where = None
        if not config.finds and (config.heights or problem.rows != "blocks"):
            [listing] = launch.list_of(problem, config).kernels
            where = [jnp.zeros(shape, jnp.int32) for shape in listing.outputs.values()]
        return launch.arguments(problem, config, named, where, interpret=False)

    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in problem.inputs.values()]
    given = jax.eval_shape(arguments, *structs)
    return jax.jit(kernel.build(problem, config)).trace(*given).lower(lowering_platforms=("cuda",))


_HGMMA = re.compile(r"[HQ]GMMA\.64x(\d+)x(?:16|32)\S* R(\d+),")
_ROW = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", re.MULTILINE)


def early_reads(sass: str) -> Iterator[str]:
    """Instructions that stand between a wgmma and the wait for all of them, and read or write its sums.

    ptxas put conversions there, of a wait in which paths with and without wgmma met.
    """
    first = last = -1
    for row in _ROW.findall(sass):
        if found := _HGMMA.search(row):
            first = int(found.group(2))
            last = first + int(found.group(1)) // 2
        elif "DEPBAR.LE gsb0, 0x0" in row:
            first = last = -1
        elif any(first <= int(r) < last for r in re.findall(r"\bR(\d+)\b", row)):
            yield row


_MEETING = re.compile(
    r"mbarrier\.try_wait|wgmma\.wait_group|bar(?:rier)?\.sync|mbarrier\.arrive\.shared::cluster"
)


def arrivals_alone(text: str) -> int:
    """Arrivals on a cluster's barrier behind a wait, ahead of which the warpgroup's threads do not meet.

    One thread arrives for its warpgroup: others may not have read yet what the next copy will overwrite.
    Several arrivals in a row are those before the first step, one for each stage.
    """
    found = [x.rpartition(".")[2] for x in _MEETING.findall(text)]
    runs = [(kind, len([*same])) for kind, same in itertools.groupby(found)]
    behind = itertools.pairwise(runs)
    waits = ("try_wait", "wait_group")
    return sum(arrival == ("shared::cluster", 1) and last in waits for (last, _), arrival in behind)


def _disassembled(cubin: Path) -> str:
    ptxas = Path("cuda_sdk_lib/bin/ptxas").resolve()
    beside = ptxas.with_name("cuobjdump")
    tool = str(beside) if beside.exists() else shutil.which("cuobjdump")
    if tool is None:
        raise toolchain.Missing(f"there is no cuobjdump beside {ptxas}, nor on PATH")
    done = subprocess.run([tool, "--dump-sass", str(cubin)], capture_output=True, text=True)
    return done.stdout


_NAME = re.compile(r"\.visible \.entry (\w+)\(")
_ABOUT = re.compile(r"\bkernel(\d+)_of_this_file_")


def in_one_file(texts: Sequence[str]) -> str:
    """PTX of several kernels as one file: names say which kernel it is, lines of the source are left out."""
    whole = []
    for place, text in enumerate(texts):
        text = text.split("\t.section", 1)[0]
        text = re.sub(r"^\s*\.(?:loc|file)\s.*\n", "", text, flags=re.MULTILINE)
        if place:
            text = re.sub(r"^\.(?:version|target|address_size)\s.*\n", "", text, flags=re.MULTILINE)
        [name] = _NAME.findall(text)
        whole.append(re.sub(rf"\b{name}", f"kernel{place}_of_this_file_{name}", text))
    return "\n".join(whole)


def of_each(log: str, count: int) -> list[str]:
    """The lines about each kernel: those that name it, and those that follow."""
    found, place = [""] * count, None
    for line in log.splitlines(keepends=True):
        if named := _ABOUT.search(line):
            place = int(named[1])
        if place is not None:
            found[place] += line
    return found


def _ptxas(texts: Sequence[str]) -> list[tuple[str, str]]:
    """ptxas' account of each kernel, and its machine code.

    All in one file: the disassembler takes longer to start than to read a dozen kernels.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernels.ptx"), Path(folder, "kernels.cubin")
        source.write_text(in_one_file(texts))
        command = ["cuda_sdk_lib/bin/ptxas", "-v", "-arch=sm_90a", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ptxas failed: {done.stderr.strip()}")
        logs = of_each(done.stderr + done.stdout, len(texts))
        return list(zip(logs, of_each(_disassembled(cubin), len(texts)), strict=True))


def _cpu_seconds() -> float:
    """Of this process, whose compiler it is, and of its children."""
    return sum(os.times()[:4])


def faults(
    log: str, sass: str, seconds: float, most: float, multiplies: bool = True
) -> Iterator[str]:
    """What is wrong with a kernel that took so many seconds of CPU time to compile, of `most`."""
    used = ptx.usage(log)
    if (spilled := used.spill_stores + used.spill_loads) or used.stack:
        yield f"{spilled} bytes spilled, {used.stack} bytes of stack"
    if "serialized" in log:
        yield next(line for line in log.splitlines() if "serialized" in line)
    if early := list(early_reads(sass)):
        yield f"{len(early)} times sums are used before the wait for them: {early[0]}"
    if multiplies and not _HGMMA.search(sass):
        yield "no wgmma"
    # CPU time rises, too, where other processes share the cores and their caches: this much at the most.
    if seconds > most * float(os.environ.get("COMPILE_PATIENCE", "1")):
        yield f"compiled in {seconds:.1f} s of CPU time"


def check(plugin: str, runtime: str, *given: str) -> Iterator[script.Report]:
    from moe_align_jax._grouped_matmul.config import may_be_late
    from moe_align_jax._grouped_matmul.problem import MatmulProblem

    parser = argparse.ArgumentParser(prog="tests.no_gpu.matmul")
    parser.add_argument("part", nargs="?", default="", help="compile what has this in its name")
    chosen = parser.parse_args(given)
    checker = worker.Checker(plugin, runtime)
    launch = checker.launch

    def compiled() -> Iterator[tuple[str, float, str]]:
        """(what it is, seconds, PTX, or what the compiler says) of each kernel."""
        every = (*problems(), *weight_gradients(), *activation_gradients(), *spreads())
        for what, problem, config in script.one_in_sample(every):
            if isinstance(problem, MatmulProblem):
                config = config._replace(late=config.late and may_be_late(problem))
            name = f"{config.name}: {what}"
            if chosen.part not in name:
                continue
            module = lower(problem, config).compiler_ir()
            with module.context:
                [found] = launch._custom_call_modules(module.operation)
            begun = _cpu_seconds()
            try:
                dump = checker.compiler.dump([found], [name])
            except launch.CompileError as error:
                yield name, 0.0, str(error)
                continue
            seconds = _cpu_seconds() - begun
            [(text, _)] = launch.read_dump(dump).values()
            yield name, seconds, text

    for some in itertools.batched(compiled(), _AT_ONCE):
        fine = [one for one in some if _NAME.search(one[2])]
        for name, _, error in some:
            if not _NAME.search(error):
                yield name, [error]
        for (name, seconds, text), (log, sass) in zip(
            fine, _ptxas([x for *_, x in fine]), strict=True
        ):
            line = f"{ptx.usage(log).registers:3} registers, {seconds:4.1f} s  {name}"
            most = MAX_SECONDS_OF_HEIGHTS if "heights" in name else MAX_SECONDS
            found = [*faults(log, sass, seconds, most, "Spread" not in name)]
            # Of CTAs that share K, those that have read nothing of the others' arrive as well.
            if "-c2" in name and (alone := arrivals_alone(text)):
                found.append(f"{alone} times a thread arrives for others that it has not met")
            yield line, found


if __name__ == "__main__":
    sys.exit(script.main("tests.no_gpu.matmul", check))
