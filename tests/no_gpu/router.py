"""Compiles the router's kernels without a GPU, and checks the result.

    python -m tests.no_gpu.router

As `compile` does for the alignment: nothing spills, the launch that was read is the one that jaxlib makes,
the kernel waits where PDL needs it, no barrier of the CTA holds up its loads, nor of a cluster if the body
opens the mailbox, and logits are loaded 16 bytes at a time where a lane has as many. Exit code 1 otherwise.
"""

import functools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tests.no_gpu import ptx, script, worker


class _Direct(NamedTuple):
    name: str
    mailbox: int
    starts_at_once: bool
    opens_mailbox: bool
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


def sized_problems() -> list:
    """Programs of torch_bridge: the launch gives the tokens, and all that vLLM's ops write is written."""
    from moe_align_jax._router.problem import RouteProblem as Problem

    sized = {"sized_at_launch": True, "has_padding": True, "with_order": True}
    deepseek = {"scoring": "sigmoid", "num_groups": 8, "topk_groups": 4, "bias_rows": 1}
    return [
        Problem(64, 256, 8, renormalize=True, keeps_weights=True, **sized),
        Problem(8192, 256, 8, "bfloat16", id_words=2, **sized),
        Problem(512, 60, 4, "float16", "sigmoid", bias_rows=1, id_words=2, **sized),
        Problem(64, 384, 6, scoring="sqrtsoftplus", bias_rows=1, renormalize=True, **sized),
        Problem(64, 256, 8, renormalize=True, scaling_factor=2.5, sized_at_launch=True, **deepseek),
        Problem(128, 160, 6, "bfloat16", "none", num_groups=8, topk_groups=3, bias_rows=1,
                sized_at_launch=True),
    ]  # fmt: skip


def aligned_problems() -> Iterator[tuple[Any, Any]]:
    """Routers with the alignment in the same launch: each form and cluster, every option."""
    from moe_align_jax._core import checks
    from moe_align_jax._router.problem import RouteProblem as Problem
    from moe_align_jax.types import AlignProblem

    deepseek = {"scoring": "sigmoid", "num_groups": 8, "topk_groups": 4, "bias_rows": 1}
    dynamic = {"dispatch": "dynamic", "num_logical": 256, "replica_width": 4, "top_k": 8}
    static = {"dispatch": "static", "num_logical": 60}
    for problem, block_size, slots, options in (
        (Problem(1, 256, 8), 16, 256, {}),
        (Problem(4, 256, 8, "bfloat16"), 16, 256, {"expert_map": "label"}),
        (Problem(8, 256, 8), 64, 256, {"return_inverse": True}),
        (Problem(64, 256, 8, renormalize=True), 16, 256, {"return_inverse": True}),
        (Problem(32, 256, 8, **deepseek), 64, 288, {"return_inverse": True, **dynamic}),
        (Problem(64, 256, 8, has_token_mask=True), 64, 256, {"expert_map": "filter"}),
        (Problem(64, 256, 8, "bfloat16"), 128, 256, {"return_inverse": True}),
        (Problem(50, 60, 4, "float16", has_num_valid_tokens=True), 16, 80, static),
        (Problem(64, 512, 16), 16, 512, {"return_inverse": True}),
        (Problem(64, 1024, 8, bias_rows=1), 128, 1024, {"return_inverse": True}),
    ):
        pairs = problem.num_tokens * problem.top_k
        capacity = checks.max_num_tokens_padded(pairs, block_size=block_size, num_experts=slots)
        yield problem, AlignProblem(pairs, slots, block_size, capacity, **options)


def kernels() -> Iterator[tuple[str, Any, bool, int]]:
    """(what it is, the kernel, whether it is launched with PDL, bytes of each load of logits)."""
    import jax
    import jax.numpy as jnp

    from moe_align_jax._router import fused, kernel, split
    from moe_align_jax._simt import mosaic
    from moe_align_jax._simt.language import WARP

    every = [(problem, None, None) for problem in problems()]
    for problem, align in aligned_problems():
        config = fused.config_for(problem, align)
        every.append((problem, align, config))
        if split.takes(align, problem.num_tokens):
            form = "warp" if align.num_pairs <= WARP else "block"
            every.append((problem, align, fused.FusedConfig(form, 2, config.num_ctas)))
            for routers in (1, 2):  # warpgroups
                ctas = 1 << (-(-problem.num_tokens // (4 * routers)) - 1).bit_length()
                shape = fused.FusedConfig("split", routers + 1, ctas)
                every += [(problem, align, shape)] * (ctas <= 8 and shape != config)
    for position, (problem, align, config) in enumerate(every):
        what = f"{problem}"
        if align is None:
            [one] = kernel.build(problem).kernels
        else:
            [one] = fused.build(problem, align, config).kernels
            what = f"{config}, {problem}, {align}"
        pdl = position % 2 == 1
        given, structs = {**problem.inputs, **(align.inputs if align else {})}, []
        for name in one.inputs:
            dtype = {"logits": problem.dtype, "correction_bias": "float32"}.get(name, "int32")
            size = given[name][0] * (given[name][1] if len(given[name]) > 1 else 1)
            structs.append(jax.ShapeDtypeStruct((size,), jnp.dtype(dtype)))
        call = mosaic.launcher(one, pdl=pdl)
        shapes = dict(one.inputs), dict(one.outputs)
        per_load = 4 if problem.dtype == "float32" else 8
        whole = problem.num_experts % (32 * per_load) == 0
        about = one.name, one.mailbox, one.starts_at_once, one.opens_mailbox
        yield what, _Direct(*about, *shapes, call, structs), pdl, 16 if whole else 4
    for problem in sized_problems():  # as compile_worker.py compiles them: operands are int32 words
        [one] = kernel.build(problem).kernels
        per_load = 4 if problem.dtype == "float32" else 8
        grouped = problem.num_groups if problem.limits_groups else 1
        whole = problem.num_experts % (32 * per_load) == 0 and 32 % grouped == 0
        yield f"{problem}", one, True, 16 if whole else 4


def faults(kernel, pdl: bool, width: int, text: str, launch, used: ptx.Usage) -> Iterator[str]:
    yield from worker.resource_faults(used, launch.block[0], text)
    yield from worker.order_faults(text, pdl=pdl, first=True)
    yield from worker.mail_faults(text, kernel.mailbox)
    if missing := set(kernel.outputs) - set(launch.parameters):
        yield f"outputs that are not passed: {sorted(missing)}"
    at = launch.parameters.index("logits")
    loads = [a for a in ptx.global_accesses(text) if at in a.parameters]
    widths = {a.bytes for a in loads}
    # What was not chosen by the logits loads K of them again. Two words of a lane are one load to LLVM.
    if (width == 16) != (16 in widths) or 16 in widths and widths - {16, 4, 2}:
        yield f"logits are loaded {sorted(widths)} bytes at a time, not {width}"
    barriers = re.findall(r"\b(?:bar|barrier)\.(?:cta\.)?sync", text[: loads[0].position])
    if kernel.starts_at_once and barriers:
        yield "a barrier of the CTA stands ahead of the logits' loads"
    if kernel.opens_mailbox and "barrier.cluster" in text[: loads[0].position]:
        yield "the mailbox is opened ahead of the logits' loads"
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
