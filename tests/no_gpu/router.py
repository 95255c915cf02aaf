"""Compiles the router's kernels without a GPU, and checks the result.

    python -m tests.no_gpu.router

As `compile` does for the alignment: nothing spills, the launch that was read is the one that jaxlib makes,
the kernel waits where PDL needs it, and logits are loaded 16 bytes at a time where a lane has as many.
Exit code 1 otherwise.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tests.no_gpu import ptx, script, worker


class _Direct(NamedTuple):
    name: str
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    call: Callable
    structs: list


def problems() -> list:
    """Sizes of models, every option, every dtype and the limits."""
    from moe_align_jax._router.problem import RouteProblem as Problem

    deepseek = {"scoring": "sigmoid", "num_groups": 8, "topk_groups": 4, "bias_rows": 1}
    plain = [Problem(512, experts, 8) for experts in (8, 64, 128, 160, 256, 384, 512, 1024)]
    return [
        *plain,
        *(p._replace(dtype="bfloat16", renormalize=True) for p in plain),
        *(p._replace(dtype="float16", scoring="sigmoid", renormalize=True) for p in plain),
        Problem(64, 256, 8, "float32", renormalize=True, scaling_factor=2.5, **deepseek),
        Problem(64, 256, 8, "bfloat16", has_token_mask=True, has_num_valid_tokens=True, **deepseek),
        Problem(64, 160, 6, "bfloat16", num_groups=8, topk_groups=3, scaling_factor=16.0),
        Problem(64, 72, 3, "float16", num_groups=3, topk_groups=2, bias_rows=4),
        Problem(1, 256, 1),
        Problem(5, 1, 1),
        Problem(7, 37, 5, bias_rows=1),
        Problem(64, 896, 16, scoring="sigmoid", bias_rows=1, renormalize=True),
        Problem(64, 384, 6, scoring="sqrtsoftplus", bias_rows=1, renormalize=True),
        Problem(64, 1024, 32, "float32", softmax_after_topk=True, bias_rows=1),
        Problem(16, 32, 32, "float32", scoring="sqrtsoftplus"),
    ]


def kernels() -> Iterator[tuple[str, Any, bool, int]]:
    """(what it is, the kernel, whether it is launched with PDL, bytes of each load of logits)."""
    import jax
    import jax.numpy as jnp

    from moe_align_jax._router import kernel
    from moe_align_jax._simt import mosaic

    for position, problem in enumerate(problems()):
        [one] = kernel.build(problem).kernels
        pdl = position % 2 == 1
        structs = []
        for name, shape in problem.inputs.items():
            dtype = {"logits": problem.dtype, "correction_bias": "float32"}.get(name, "int32")
            size = shape[0] * (shape[1] if len(shape) > 1 else 1)
            structs.append(jax.ShapeDtypeStruct((size,), jnp.dtype(dtype)))
        call = mosaic.launcher(one, pdl=pdl)
        direct = _Direct(one.name, dict(one.inputs), dict(one.outputs), call, structs)
        per_load = 4 if problem.dtype == "float32" else 8
        whole = problem.num_experts % (32 * per_load) == 0
        yield f"{problem}", direct, pdl, 16 if whole else 4


def faults(kernel, pdl: bool, width: int, text: str, launch, used: ptx.Usage) -> Iterator[str]:
    yield from worker.resource_faults(used, launch.block[0], text)
    yield from worker.order_faults(text, pdl=pdl, first=True)
    if missing := set(kernel.outputs) - set(launch.parameters):
        yield f"outputs that are not passed: {sorted(missing)}"
    at = launch.parameters.index("logits")
    loads = [a for a in ptx.global_accesses(text) if at in a.parameters]
    widths = {a.bytes for a in loads}
    # What was not chosen by the logits loads K of them again. Two words of a lane are one load to LLVM.
    if (width == 16) != (16 in widths) or 16 in widths and widths - {16, 4}:
        yield f"logits are loaded {sorted(widths)} bytes at a time, not {width}"
    divided = text[: loads[0].position].count("bra")
    ahead = [a for a in loads if text[: a.position].count("bra") == divided]
    if len(ahead) < sum(a.bytes == width for a in loads if width == 16):
        yield "a branch stands between two loads of a token's logits"


def check(plugin: str, runtime: str) -> Iterator[script.Report]:
    yield from script.direct(
        plugin,
        runtime,
        (
            (what, kernel, functools.partial(faults, kernel, pdl, width))
            for what, kernel, pdl, width in kernels()
        ),
    )


if __name__ == "__main__":
    sys.exit(script.main("tests.no_gpu.router", check))
