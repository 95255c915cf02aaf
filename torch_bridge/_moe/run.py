"""Decides a call of the expert layer and runs it: launched directly on a Hopper GPU, by jax elsewhere."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from moe_align_jax._grouped_matmul.direct_problem import DirectMatmul
from torch_bridge import _checks, _plan, dlpack
from torch_bridge._direct import known_calls, store
from torch_bridge._moe import direct
from torch_bridge._moe.calls import Call, Layer, Matmul
from torch_bridge._moe.programs import LayerPrograms, layer_programs, matmul_program
from torch_bridge._resolved import Plan

_REMEDY = "Call it once with these shapes and options before the capture (or warmup_fused_moe)."


class Decided(NamedTuple):
    """How a call runs.

    Attributes:
        plan: the path, and why not another.
        programs: on the direct path, which problems' programs serve it; None elsewhere.
    """

    plan: Plan
    programs: DirectMatmul | LayerPrograms | None


def resolve(call: Call, operands: Mapping[str, torch.Tensor], path: str = "auto") -> Decided:
    """Decides a call. Copies nothing, compiles nothing, runs nothing.

    Raises:
        NotImplementedError: path is "direct" and that cannot run here.
        RuntimeError: the path is "dlpack" and torch's current stream is captured.
    """
    programs, refusal = programs_for(call, operands)
    if path == "dlpack":
        refusal = refusal or "path='dlpack' was asked for"
    if _is_nothing(call, operands):
        chosen = "dlpack" if refusal else "direct"
        reasons = {"xla": "there is nothing to compute"}
        return Decided(Plan(chosen, "none", {}, reasons), None)
    if refusal is None:
        assert programs is not None
        reasons = {"dlpack": "the direct path runs here, and costs the host less"}
        copies = _direct_copies(operands)
        return Decided(Plan("direct", "mosaic_gpu", copies, reasons), programs)
    if path == "direct":
        raise NotImplementedError(_plan.direct_refused(call.function, refusal))
    return Decided(_dlpack_plan(call, operands, {"direct": refusal}), None)


def _is_nothing(call: Call, operands: Mapping[str, torch.Tensor]) -> bool:
    """Whether there are no rows, no columns, or no pairs."""
    if isinstance(call, Layer) and not operands["topk_ids"].numel():
        return True
    return 0 in call.shape


def programs_for(
    call: Call, operands: Mapping[str, torch.Tensor]
) -> tuple[DirectMatmul | LayerPrograms | None, str | None]:
    """(The problems whose programs serve the call on the direct path, None), or (None, why not)."""
    if forced := _plan.forced_implementation():
        return None, f"{forced!r} was asked for"
    x, here = operands["x"], store.here
    if reason := here.machine.unavailable(x.device):
        return None, reason
    if x.dtype == torch.float32:
        return None, "the kernels multiply bfloat16 and float16; x is float32"
    if _is_nothing(call, operands) or not x.shape[1]:
        return None, "there is nothing to launch"
    index = x.get_device()
    kind = gpu_kind(index)
    problems: tuple[Any, ...]
    if isinstance(call, Matmul):
        programs: Any = matmul_program(call, dict(operands), kind)
        problems = (programs,)
    else:
        tuning = here.machine.tuning(x.device)
        programs = layer_programs(call, dict(operands), kind, tuning)
        problems = programs.each
    reason = programs.refusal or next(
        filter(None, (here.failure(index, p) for p in problems)), None
    )
    return (None, reason) if reason else (programs, None)


def gpu_kind(index: int) -> str:
    """Whose tiles the kernels take: the name by which jax knows the card."""
    return store.here.machine.gpu(index).split(" sm_")[0]


def _direct_copies(operands: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Which operands are copied, as far as that is known without the programs."""
    found = {}
    for name, tensor in operands.items():
        boundary = 16 if name in ("w", "gate", "up", "w_down") else 256
        if name == "topk_ids":
            boundary = tensor.element_size()
        if reason := direct.copy_reason(tensor, boundary):
            found[name] = reason
    return found


def _dlpack_plan(
    call: Call, operands: Mapping[str, torch.Tensor], reasons: Mapping[str, str]
) -> Plan:
    device = operands["x"].device
    dlpack.check_not_capturing(call.function, device)
    platform = dlpack.jax_platform(call.function, device)
    from torch_bridge._dlpack_path import moe

    implementation, others = moe.select(call, operands, platform)
    boundary = dlpack.alignment(device.type, implementation)
    copies = {}
    for name, tensor in operands.items():
        if reason := dlpack.copy_reason(tensor, boundary):
            copies[name] = reason
    if device.type == "cuda":
        copies["outputs"] = (
            "they are copied into torch's memory: XLA may reuse its own before torch has read it"
        )
    return Plan("dlpack", implementation, copies, {**reasons, **others})


def run(
    call: Call,
    operands: dict[str, torch.Tensor],
    path: str = "auto",
    out: torch.Tensor | None = None,
    key: "Key | None" = None,
) -> tuple[torch.Tensor, ...]:
    """The results of a call whose arguments were checked: the product or the layer's, then the counts.

    Args:
        call, operands: what is asked.
        path: as for `moe_align_block_size`.
        out: to be written instead of a new tensor.
        key: by which `repeat` shall know later calls like this one; None for not at all.
    """
    for name, tensor in operands.items():
        dlpack.check_tensor(call.function, name, tensor)
    decided = resolve(call, operands, path)
    if decided.plan.implementation == "none":
        return _nothing(call, operands, out)
    if decided.programs is not None:
        try:
            return _launch(call, decided.programs, operands, out, key)
        except store.Unavailable as reason:
            if path == "direct":
                text = _plan.direct_refused(call.function, str(reason))
                raise NotImplementedError(text) from None
            store.here.warn_once(str(reason))
        decided = resolve(call, operands, "dlpack")
    from torch_bridge._dlpack_path import moe

    return moe.run(call, operands, decided.plan, out)


def _nothing(
    call: Call, operands: Mapping[str, torch.Tensor], out: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    device = operands["x"].device
    if out is None:
        out = torch.zeros(call.shape, dtype=call.out_dtype, device=device)
    else:
        out.zero_()
    if isinstance(call, Layer) and call.counted:
        return out, torch.zeros(call.num_experts, dtype=torch.int32, device=device)
    return (out,)


def _launch(
    call: Call,
    programs: DirectMatmul | LayerPrograms,
    operands: dict[str, torch.Tensor],
    out: torch.Tensor | None,
    key: "Key | None",
) -> tuple[torch.Tensor, ...]:
    here, index = store.here, operands["x"].get_device()
    with here.machine.on_device(index):
        if isinstance(programs, DirectMatmul):
            assert isinstance(call, Matmul)
            program = here.program_for(call.function, index, programs, _REMEDY)
            bound: Bound = direct.BoundMatmul(here.machine, call, programs, program, operands)
        else:
            assert isinstance(call, Layer)
            missing = [p for p in programs.each if (index, p) not in here.programs]
            if len(missing) > 1 and not here.machine.is_capturing():
                here.prepare(index, missing)  # at once: one by one, each costs a process
            loaded = [here.program_for(call.function, index, p, _REMEDY) for p in programs.each]
            bound = direct.BoundLayer(here.machine, call, programs, loaded, operands)
        results = bound.run(operands, out)
    if key is not None and bound.is_plain:
        _remember(key, bound, operands, out)
    return results


# -- calls like earlier ones ---------------------------------------------------------------------------

# What a call is known by: shapes and the caller's options.
type Key = tuple[Any, ...]
type Bound = direct.BoundLayer | direct.BoundMatmul

_calls = known_calls.KnownCalls[Bound]()


def repeat(key: Key, tensors: Sequence[Any]) -> torch.Tensor | None:
    """The result of a call like an earlier one; None for every other call, valid or not.

    Args:
        key: shapes, and the options as the caller gave them, unchecked.
        tensors: what the caller gave, unchecked, in the order of the bound call; then `out`, if given.
    """
    found = _calls.find(key, tensors)
    if found is None or _checks.may_be_differentiated(tensors):
        return None
    bound, pointers = found
    if len(pointers) > len(bound.order):
        return bound.run_plain(pointers[:-1], tensors[-1])
    return bound.run_plain(pointers)


def _remember(
    key: Key,
    bound: Bound,
    operands: Mapping[str, torch.Tensor],
    out: torch.Tensor | None,
) -> None:
    """Lets `repeat` do calls like this one, which has just been launched. Not where a tensor was copied."""
    tensors = [operands[name] for name in bound.order]
    masks = [bound.needed[name] - 1 for name in bound.order]
    if out is not None:
        tensors.append(out)
        masks.append(bound.needed["out"] - 1)
    for tensor, mask in zip(tensors, masks, strict=True):
        if direct.copy_reason(tensor, mask + 1):
            return
    _calls.keep(key, tensors, bound, masks=masks, writes=out is not None)


def forget_all() -> None:
    """Every call takes the ordinary way again."""
    _calls.forget_all()
