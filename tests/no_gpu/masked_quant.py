"""Compiles the kernel of silu_and_mul_masked_quant without a GPU, and checks the result.

    python -m tests.no_gpu.masked_quant

As `compile` does for the alignment: nothing spills, the launch that
`torch_bridge/_direct/compile_worker.py` reads is the one
that jaxlib makes, the kernel waits where PDL needs it, x is loaded 16 bytes at a time. Exit code 1 otherwise.
"""

import functools
import sys
from collections.abc import Iterator

from tests.no_gpu import ptx, script, worker


def problems() -> list:
    """Every tile, scale format and activation, and the sizes that are measured."""
    from moe_align_jax._masked_quant.problem import MaskedQuantProblem as Problem

    packed = {"scale_format": "ue8m0_packed", "scale_layout": "column_major"}
    return [
        Problem(32, 1024, 2048),
        Problem(6, 4096, 3072),
        Problem(8, 1024, 7168),
        Problem(256, 128, 2048, scale_layout="column_major"),
        Problem(1024, 4096, 7168),
        Problem(1, 1, 128),
        Problem(3, 33, 640, scale_format="ue8m0"),
        Problem(17, 31, 1152, "float16", swiglu_limit=7.0),
        Problem(32, 1024, 2048, **packed),
        Problem(8, 33, 512, **packed, swiglu_alpha=1.702, swiglu_limit=7.0),
        Problem(32, 1024, 4096, swiglu_alpha=1.0, divide=True),
    ]


def kernels() -> Iterator[tuple[str, object, bool, int]]:
    """(what it is, the kernel, whether it is launched with PDL, groups of a tile)."""
    from moe_align_jax._masked_quant import kernel
    from moe_align_jax._masked_quant import launch as masked_quant
    from moe_align_jax._masked_quant.config import Config, config_for

    for problem in problems():
        plain, direct = config_for(problem), masked_quant.direct_kernel(problem)
        yield f"{problem}, direct", direct, True, plain.tile
        yield f"{problem}", direct._replace(call=kernel.build(problem, plain)), False, plain.tile
    problem = problems()[0]
    for tile in (8, 16):
        for prefetch in (False, True):
            call = kernel.build(problem, config := Config(tile, 1056, prefetch))
            direct = masked_quant.direct_kernel(problem)._replace(call=call)
            yield f"{problem}, {config}", direct, False, tile


def faults(kernel, pdl: bool, tile: int, text: str, launch, used: ptx.Usage) -> Iterator[str]:
    yield from worker.resource_faults(used, 128, text)
    yield from worker.order_faults(text, pdl=pdl, first=True)
    if launch.block != (128, 1, 1) or launch.cluster != (1, 1, 1):
        yield f"block {launch.block}, cluster {launch.cluster}"
    if set(launch.parameters) != {"x", "masked_m", "q", "scales"}:
        yield f"parameters {launch.parameters}"
    at = launch.parameters.index("x")
    widths = {a.bytes for a in ptx.global_accesses(text) if at in a.parameters}
    if widths != {{0: 16, 4: 8}.get(tile % 8, 2)}:
        yield f"x is loaded {sorted(widths)} bytes at a time, in tiles of {tile}"


def check(plugin: str, runtime: str) -> Iterator[script.Report]:
    yield from script.direct(
        plugin,
        runtime,
        (
            (what, kernel, functools.partial(faults, kernel, pdl, tile))
            for what, kernel, pdl, tile in kernels()
        ),
    )


if __name__ == "__main__":
    sys.exit(script.main("tests.no_gpu.masked_quant", check))
