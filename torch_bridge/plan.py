"""Plan: what a call does, decided before it runs. `call.execute` obeys it; `explain` shows it."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from torch_bridge import call, checks, dlpack
from torch_bridge.problems import AlignProblem, Problem


class Plan(NamedTuple):
    """How one call runs.

    Attributes:
        path: "dlpack", or "direct" in a later version.
        implementation: the one of moe_align_jax: "mosaic_gpu" or "xla"; "none" for zero pairs.
        copies: for each argument that is copied (and "outputs" where the results are), why.
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
    path: str = "dlpack",
    has_out: bool = False,
) -> Plan:
    """The plan of one call on these tensors, which have data. Copies nothing, runs nothing."""
    reasons = {"direct": checks.DIRECT_UNAVAILABLE}
    if problem.num_pairs == 0:
        return Plan(path, "none", {}, reasons | {"xla": "there are no pairs: nothing to compute"})
    device = next(iter(operands.values())).device
    platform = call.jax_platform(problem.name, device)
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
    if has_out:
        copies["outputs"] = "they are written into the tensors of out="
    elif device.type == "cuda":
        copies["outputs"] = (
            "they are copied into torch's memory: XLA may reuse its own before torch has read it"
        )
    return Plan(path, implementation, copies, reasons | dict(others))
