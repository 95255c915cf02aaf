"""Plan: what a call does, decided before it runs. `call.execute` obeys it; `explain` shows it."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from moe_align_jax._core import checks
from torch_bridge import dlpack
from torch_bridge._direct import call as direct_call
from torch_bridge._specs import AlignProblem, Problem


class Plan(NamedTuple):
    """How one call runs.

    Attributes:
        path: "direct", launched on torch's current stream, or "dlpack", through jax.
        implementation: the one of moe_align_jax: "mosaic_gpu" or "xla"; "none" for zero pairs.
        copies: for each argument that is copied (and "outputs" where a result is), why.
        reasons: for each path and implementation not taken, why.
    """

    path: str
    implementation: str
    copies: Mapping[str, str]
    reasons: Mapping[str, str]


# Tests run the emulator through the bridge; users name no implementation here.
_forced_implementation: str | None = None


@contextlib.contextmanager
def force_implementation(name: str) -> Iterator[None]:
    """For tests: every call inside runs this implementation."""
    global _forced_implementation
    previous, _forced_implementation = _forced_implementation, name
    try:
        yield
    finally:
        _forced_implementation = previous


@functools.lru_cache(maxsize=4096)
def _select(
    num_pairs: int, block_size: int, num_experts: int, platform: str, forced: str | None
) -> tuple[str, Mapping[str, str]]:
    from moe_align_jax import select_implementation

    selection = select_implementation(
        (num_pairs,),
        block_size=block_size,
        num_experts=num_experts,
        platform=platform,
        implementation=forced,
    )
    return selection.implementation, selection.reasons


def make_plan(
    problem: Problem,
    operands: Mapping[str, torch.Tensor],
    *,
    path: str = "auto",
    out: Sequence[torch.Tensor] | None = None,
    function: str | None = None,
) -> Plan:
    """The plan of one call on these tensors, which have data. Copies nothing, runs nothing.

    Raises:
        NotImplementedError: path is "direct" and that cannot run here.
        RuntimeError: the path is "dlpack" and torch's current stream is captured; jax is not touched then.
    """
    function = function or problem.name
    refusal = direct_call.refuses(problem, operands)
    if _forced_implementation:
        refusal = f"{_forced_implementation!r} was asked for"
    if path == "direct" and refusal:
        remedy = f"{refusal[0].upper()}{refusal[1:]}. Pass path='auto' or 'dlpack'."
        raise NotImplementedError(
            checks.message(function, "path", "be one that can run here", "'direct'", remedy)
        )
    taken = "direct" if path != "dlpack" and not refusal else "dlpack"
    reasons = {"direct": refusal or "path='dlpack' was asked for"} if taken == "dlpack" else {}
    if problem.num_pairs == 0:
        return Plan(taken, "none", {}, reasons | {"xla": "there are no pairs: nothing to compute"})
    if taken == "direct":
        reasons = {"dlpack": "the direct path runs here, and costs the host less"}
        copies = direct_call.copies(operands, out)
        return Plan(taken, "mosaic_gpu", copies, reasons)
    device = next(iter(operands.values())).device
    dlpack.check_not_capturing(function, device)
    platform = dlpack.jax_platform(problem.name, device)
    if isinstance(problem, AlignProblem):
        sizes = (problem.num_pairs, problem.block_size, problem.num_experts)
    else:
        # Chosen by platform alone.
        sizes = (1, 1, 1)
    implementation, others = _select(*sizes, platform, _forced_implementation)
    boundary = dlpack.alignment(device.type, implementation)
    copies = {}
    for name, tensor in operands.items():
        if reason := dlpack.copy_reason(tensor, boundary):
            copies[name] = reason
    if out is not None:
        copies["outputs"] = "they are written into the tensors of out="
    elif device.type == "cuda":
        copies["outputs"] = (
            "they are copied into torch's memory: XLA may reuse its own before torch has read it"
        )
    return Plan(taken, implementation, copies, reasons | dict(others))
