"""Runs a router's call on torch tensors: one launch on a GPU, jax over DLPack elsewhere.

`route` is what vLLM's ops (`_vllm_router.py`) share. Torch's tracers see an operator that mutates the
results, and its twin over DLPack, as in `_ops.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moe_align_jax._router.problem import RouteProblem
from torch_bridge import _checks, _ops, _plan, _single_launch, dlpack
from torch_bridge._direct import inplace, problems, store
from torch_bridge._direct.program import LoadedProgram
from torch_bridge._dlpack_path import run as dlpack_call

Key = _single_launch.Key
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# What vLLM's ops call the operands, where it is not our name.
_ARGUMENTS = {"logits": "gating_output", "correction_bias": "e_score_correction_bias"}
_OPERATOR = "route_into"
_SCHEMA = (
    "(Tensor logits, Tensor? correction_bias, Tensor? is_padding, Tensor(a!) topk_weights, "
    "Tensor(b!) topk_ids, Tensor(c!)? token_expert_indices, str scoring, bool renormalize, "
    "float scaling_factor, int num_groups, int topk_groups, bool keeps_weights) -> ()"
)


def route(
    function: str,
    operands: Mapping[str, torch.Tensor],
    results: Mapping[str, torch.Tensor],
    *,
    scoring: str,
    renormalize: bool,
    scaling_factor: float = 1.0,
    num_groups: int = 1,
    topk_groups: int = 1,
    keeps_weights: bool = False,
    key: Key | None = None,
) -> None:
    """Writes the results of a router. All arguments have passed their op's checks, but for what needs data.

    Args:
        function: the name that errors begin with.
        operands: `logits` `[T, E]` of a dtype of DTYPES and, as given, `correction_bias` `[E]` of one of them
            and `is_padding` `[T]` of one byte each.
        results: `topk_weights` `[T, K]` float32, `topk_ids` `[T, K]` of 4 or 8 bytes each and, if wanted,
            `token_expert_indices` `[T, K]` int32. Contiguous.
        scoring, renormalize, scaling_factor, num_groups, topk_groups, keeps_weights: as in `RouteProblem`.
        key: by which `repeat` shall know later calls like this one; None for not at all.
    """
    options = (scoring, renormalize, scaling_factor, num_groups, topk_groups, keeps_weights)
    given, out = dict(operands), dict(results)
    if _ops.launches_at_once(given, tuple(out.values())):
        program = _run(function, "auto", given, out, *options)
        if program is not None and key is not None:
            _remember(key, program, given, out)
        return
    if _checks.sizes_are_known() and not dlpack.is_fake(given["logits"]):
        _check_data(function, given, out)  # under the name of the caller's op, not of the operator
    bias, is_padding = (given.get(name) for name in ("correction_bias", "is_padding"))
    op = _ops.chosen(_OPERATOR, given["logits"].device)
    three = (out["topk_weights"], out["topk_ids"], out.get("token_expert_indices"))
    op(given["logits"], bias, is_padding, *three, *options)


def _check_data(
    function: str, operands: dict[str, torch.Tensor], results: dict[str, torch.Tensor]
) -> None:
    """The checks that need data."""
    named = {_ARGUMENTS.get(name, name): tensor for name, tensor in operands.items()}
    for name, tensor in {**named, **results}.items():
        dlpack.check_tensor(function, name, tensor)
    inplace.check_plain(function, results)
    inplace.check_no_overlap(function, results, named)


def _run(
    function: str,
    path: str,
    operands: dict[str, torch.Tensor],
    results: dict[str, torch.Tensor],
    *options: Any,
) -> LoadedProgram | None:
    """Does a call; returns the program that was launched, if one was."""
    _check_data(function, operands, results)
    problem = _problem(operands, results, *options)
    if not problem.num_tokens:
        return None
    operands = {name: x.detach().resolve_neg() for name, x in operands.items()}
    program = _program(function, problem, operands["logits"]) if path == "auto" else None
    if program is None:
        _by_jax(function, problem, operands, results)
    else:
        _launch(program, problem, operands, results)
    return program


def _operator(
    path,
    logits,
    correction_bias,
    is_padding,
    topk_weights,
    topk_ids,
    token_expert_indices,
    *options,
) -> None:
    operands = {"logits": logits, "correction_bias": correction_bias, "is_padding": is_padding}
    results = {
        "topk_weights": topk_weights,
        "topk_ids": topk_ids,
        "token_expert_indices": token_expert_indices,
    }
    given = {name: x for name, x in operands.items() if x is not None}
    _run(_OPERATOR, path, given, {n: x for n, x in results.items() if x is not None}, *options)


def _problem(
    operands: Mapping[str, torch.Tensor],
    results: Mapping[str, torch.Tensor],
    scoring: str,
    renormalize: bool,
    scaling_factor: float,
    num_groups: int,
    topk_groups: int,
    keeps_weights: bool,
) -> RouteProblem:
    logits, ids = operands["logits"], results["topk_ids"]
    has_padding = "is_padding" in operands
    num_tokens, num_experts = logits.shape
    return RouteProblem(
        num_tokens,
        num_experts,
        ids.shape[1],
        DTYPES[logits.dtype],
        scoring,
        renormalize=renormalize,
        num_groups=num_groups,
        topk_groups=topk_groups,
        scaling_factor=float(scaling_factor),
        bias_rows=int("correction_bias" in operands),
        has_padding=has_padding,
        keeps_weights=has_padding and keeps_weights,
        id_words=ids.element_size() // 4,
        with_order="token_expert_indices" in results,
    )


# -- calls like earlier ones ---------------------------------------------------------------------------


calls = _single_launch.KnownCalls()


def repeat(
    key: Key, operands: Sequence[torch.Tensor | None], results: Sequence[torch.Tensor]
) -> bool:
    """Does a call if an earlier one was like it. A call that is not valid is like none.

    Args:
        key: the op, and the options as the caller gave them, unchecked.
        operands, results: what the caller gave, unchecked: logits, bias and padding, in the order of
            `RouteProblem.inputs`, None where there is none; and the results in that of its outputs.
    """
    return calls.repeat(key, (*operands, *results))


def _remember(
    key: Key,
    program: LoadedProgram,
    operands: Mapping[str, torch.Tensor],
    results: Mapping[str, torch.Tensor],
) -> None:
    """Lets `repeat` do calls like this one, which has just been launched. Not where a tensor was copied."""
    bias = operands.get("correction_bias")
    if bias is not None and bias.dtype != torch.float32:
        return
    given = {name: operands.get(name) for name in ("logits", "correction_bias", "is_padding")}
    names = (*operands, "num_tokens", *results)
    sizes = {"num_tokens": operands["logits"].shape[0]}
    calls.remember(key, program, {**given, **results}, names, sizes)


# -- the direct launch -----------------------------------------------------------------------------


def _program(function: str, problem: RouteProblem, logits: torch.Tensor) -> LoadedProgram | None:
    """The kernel, ready to launch on these tensors; None where that is not possible, and jax computes."""
    from moe_align_jax._router import kernel

    remedy = "Call torch_bridge.vllm.warmup_router with these sizes and options before the capture."
    bucket = problems.route_bucket(problem)
    return _single_launch.program_for(function, bucket, logits, kernel.unsupported, remedy)


def _launch(
    program: LoadedProgram,
    problem: RouteProblem,
    operands: dict[str, torch.Tensor],
    results: dict[str, torch.Tensor],
) -> None:
    """One launch on torch's current stream. What does not lie as the kernel reads it is copied."""
    machine = store.here.machine
    with machine.on_device(operands["logits"].get_device()):
        given = {name: x.contiguous() for name, x in operands.items()}
        if "correction_bias" in given:
            given["correction_bias"] = given["correction_bias"].to(torch.float32)
        given = {name: _single_launch.on_boundary(x) for name, x in given.items()}
        targets = {
            name: _single_launch.memory_beside(x) if x.data_ptr() % _single_launch.ALIGNMENT else x
            for name, x in results.items()
        }
        pointers = {name: x.data_ptr() for name, x in {**given, **targets}.items()}
        pointers["num_tokens"] = problem.num_tokens << 8
        bucket = problems.route_bucket(problem)
        program.launch(*[pointers[name] for name in (*bucket.inputs, *bucket.outputs)])
        for name, target in targets.items():
            if target is not results[name]:
                results[name].copy_(target)


# -- over DLPack -----------------------------------------------------------------------------------


def _by_jax(
    function: str,
    problem: RouteProblem,
    operands: dict[str, torch.Tensor],
    results: dict[str, torch.Tensor],
) -> None:
    """jax chooses and weighs; torch writes what vLLM's ops write besides."""
    device = operands["logits"].device
    dlpack.check_not_capturing(function, device)
    platform = dlpack.jax_platform(function, device)
    from torch_bridge._dlpack_path import route as jax_route

    plain = problem._replace(has_padding=False, keeps_weights=False, id_words=1, with_order=False)
    forced = _plan.forced_implementation()
    implementation = jax_route.implementation_for(function, plain, platform, forced)
    boundary = dlpack.alignment(device.type, implementation)
    with dlpack.on_device(device):
        inputs = {
            name: dlpack.compact(x, boundary)
            for name, x in operands.items()
            if name != "is_padding"
        }
        views = weights, ids = dlpack.call_jax(
            lambda arrays: jax_route.run(
                arrays["logits"],
                arrays.get("correction_bias"),
                problem=plain,
                implementation=implementation,
            ),
            inputs,
        )
        if problem.has_padding:
            is_padding = operands["is_padding"].bool()[:, None]
            ids = ids.masked_fill(is_padding, -1)
            if not problem.keeps_weights:
                weights = weights.masked_fill(is_padding, 0)
        results["topk_weights"].copy_(weights)
        signed(results["topk_ids"]).copy_(ids)
        if problem.with_order:
            write_order(results["token_expert_indices"])
        if device.type == "cuda":
            dlpack_call.kept_memory.keep_until_read(views)


def signed(ids: torch.Tensor) -> torch.Tensor:
    """The same memory as signed integers: torch has few operations on unsigned ones."""
    return ids.view(torch.int32 if ids.element_size() == 4 else torch.int64)


def write_order(order: torch.Tensor) -> None:
    """`[T, K]`: k * T + t."""
    num_tokens, top_k = order.shape
    turn = torch.arange(num_tokens * top_k, dtype=torch.int32, device=order.device)
    order.copy_(turn.view(top_k, num_tokens).t())


_ops.register(_OPERATOR, _SCHEMA, _ops.both(_operator))
