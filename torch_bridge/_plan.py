"""Decides a call before it runs: what is asked, on which path, by which program, and why.

`resolve` decides once, and its answer is handed down: `_ops.run` obeys it, and `torch_bridge.explain` shows
its plan.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence

import torch

from moe_align_jax._core import checks
from torch_bridge import dlpack
from torch_bridge._direct import call, fast_path, store
from torch_bridge._direct.problems import MAX_CAPACITY, KernelProblem, problem_for
from torch_bridge._resolved import Plan, Resolved
from torch_bridge._specs import AlignSpec, SglangSpec, Spec

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


def forced_implementation() -> str | None:
    """The one of `force_implementation`, or None outside of it."""
    return _forced_implementation


def resolve(
    function: str,
    spec: Spec,
    operands: Mapping[str, torch.Tensor],
    *,
    key: fast_path.Key | None = None,
    path: str = "auto",
    out: Sequence[torch.Tensor] | None = None,
    has_limit: bool = False,
) -> Resolved:
    """Decides one call. Copies nothing, compiles nothing, runs nothing.

    Args:
        function: the name that errors begin with.
        spec: what is asked.
        operands: its tensors by name, with data.
        key: how the fast path knows the call; None for that of the spec.
        path: as for `moe_align_block_size`.
        out: tensors to write, if the caller brings them.
        has_limit: num_valid_pairs is given as a Python int.

    Raises:
        NotImplementedError: path is "direct" and that cannot run here.
        RuntimeError: the path is "dlpack" and torch's current stream is captured; jax is not touched then.
    """
    key = fast_path.key_of(spec) if key is None else key
    problem, refusal = _direct_problem(spec, operands, has_limit)
    if path == "dlpack":
        refusal = refusal or "path='dlpack' was asked for"
    if refusal is None:
        assert problem is not None
        if spec.num_pairs == 0:
            return Resolved(function, spec, key, _nothing_to_do("direct", {}), problem)
        reasons = {"dlpack": "the direct path runs here, and costs the host less"}
        plan = Plan("direct", "mosaic_gpu", call.copies(operands, out), reasons)
        return Resolved(function, spec, key, plan, problem)
    if path == "direct":
        raise NotImplementedError(direct_refused(function, refusal))
    plan = _dlpack_plan(function, spec, operands, out, {"direct": refusal})
    return Resolved(function, spec, key, plan, None)


def _direct_problem(
    spec: Spec, operands: Mapping[str, torch.Tensor], has_limit: bool
) -> tuple[KernelProblem | None, str | None]:
    """The problem whose program serves the call on the direct path, or why none can: (problem, None) or
    (None, reason)."""
    if _forced_implementation:
        return None, f"{_forced_implementation!r} was asked for"
    first, programs = next(iter(operands.values())), store.here
    if reason := programs.machine.unavailable(first.device):
        return None, reason
    if spec.capacity > MAX_CAPACITY:
        return None, f"{spec.capacity} rows are too many for the kernels' 32-bit loops"
    if isinstance(spec, SglangSpec) and first.dtype in (torch.uint32, torch.uint64):
        return None, f"id -1 has no bit pattern of its own in {first.dtype}"
    problem = problem_for(spec, operands, programs.machine.tuning(first.device), has_limit)
    reason = programs.failure(first.get_device(), problem)
    return (None, reason) if reason else (problem, None)


def direct_refused(function: str, reason: str) -> str:
    """The text of the error where path="direct" cannot run."""
    remedy = f"{reason[0].upper()}{reason[1:].rstrip('.')}. Pass path='auto' or 'dlpack'."
    return checks.message(function, "path", "be one that can run here", "'direct'", remedy)


def _nothing_to_do(path: str, reasons: Mapping[str, str]) -> Plan:
    """The plan of a call with no pairs."""
    return Plan(path, "none", {}, {**reasons, "xla": "there are no pairs: nothing to compute"})


def _dlpack_plan(
    function: str,
    spec: Spec,
    operands: Mapping[str, torch.Tensor],
    out: Sequence[torch.Tensor] | None,
    reasons: Mapping[str, str],
) -> Plan:
    """The plan of a call on the DLPack path; `reasons` says why not on the direct one."""
    if spec.num_pairs == 0:
        return _nothing_to_do("dlpack", reasons)
    device = next(iter(operands.values())).device
    dlpack.check_not_capturing(function, device)
    platform = dlpack.jax_platform(spec.name, device)
    # Only an alignment's implementation depends on sizes; that of the others depends on the platform alone.
    is_align = isinstance(spec, AlignSpec)
    sizes = (spec.num_pairs, spec.block_size, spec.num_experts) if is_align else (1, 1, 1)
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
    return Plan("dlpack", implementation, copies, {**reasons, **others})


@functools.lru_cache(maxsize=4096)
def _select(
    num_pairs: int, block_size: int, num_experts: int, platform: str, forced: str | None
) -> tuple[str, Mapping[str, str]]:
    """`select_implementation` of these sizes: the implementation, and why not each other one."""
    from moe_align_jax import select_implementation

    selection = select_implementation(
        (num_pairs,),
        block_size=block_size,
        num_experts=num_experts,
        platform=platform,
        implementation=forced,
    )
    return selection.implementation, selection.reasons
