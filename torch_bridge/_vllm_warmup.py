"""warmup_router: the programs of the router's calls to come, compiled and loaded ahead of them."""

from typing import Any

import torch

from moe_align_jax._core import checks
from moe_align_jax._router.problem import GIVEN_SCORES, RouteProblem
from torch_bridge import _checks, _route
from torch_bridge._direct import problems, store
from torch_bridge._direct.warmup_device import check_device, loading_on
from torch_bridge._vllm_router import check_groups, check_scale, check_scoring

_FUNCTION = "warmup_router"
_SCORINGS = {
    "topk_softmax": "softmax",
    "topk_sigmoid": "sigmoid",
    "topk_hash_softplus_sqrt": "sqrtsoftplus",
    "grouped_topk": GIVEN_SCORES,
}


def warmup_router(
    op: str,
    *,
    num_experts: int,
    topk: int,
    max_tokens: int,
    device: Any = None,
    dtype: torch.dtype = torch.float32,
    ids_dtype: torch.dtype = torch.int32,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    correction_bias: bool = False,
    is_padding: bool = False,
    num_expert_group: int = 1,
    topk_group: int = 1,
    scoring_func: int = 0,
) -> int:
    """Compiles and loads what calls of one of vLLM's router ops need, for any number of tokens.

    Needed before a capture into a CUDA graph; elsewhere the first call with a size does the same for its
    range, which ends at a power of two.

    Args:
        op: "topk_softmax", "topk_sigmoid", "topk_hash_softplus_sqrt" (without a table or image tokens, of
            which an eager call loads the programs) or "grouped_topk".
        num_experts, topk: E and K.
        max_tokens: the most tokens of a call.
        device: a CUDA device; None for the current one.
        dtype: of the logits.
        ids_dtype: of the ids; grouped_topk's are int32.
        renormalize, routed_scaling_factor: as the calls pass them.
        correction_bias, is_padding: whether calls pass one. (grouped_topk always has a bias.)
        num_expert_group, topk_group, scoring_func: of grouped_topk.

    Returns:
        The number of programs that are now loaded for these options.

    Raises:
        TypeError, ValueError: an argument is not one that the op takes, or torch has no such device.
        NotImplementedError: the kernel cannot run on this device, or does not take these sizes; the message
            says why.

    Example:
        >>> warmup_router(
        ...     "topk_softmax", num_experts=256, topk=8, max_tokens=1024, renormalize=True
        ... )  # doctest: +SKIP
        5
    """
    from moe_align_jax._router import kernel

    if not checks.is_one_of(op, _SCORINGS):
        rule, remedy = (
            f"be one of {', '.join(map(repr, _SCORINGS))}",
            "Name an op of vLLM's router.",
        )
        checks.fail(_FUNCTION, "op", rule, checks.shown(op), remedy)
    remedy = "Pass the sizes of the model's router."
    experts, top_k, most = (
        checks.check_positive_int(_FUNCTION, argument, value, remedy)
        for argument, value in (
            ("num_experts", num_experts),
            ("topk", topk),
            ("max_tokens", max_tokens),
        )
    )
    grouped, scoring = op == "grouped_topk", _SCORINGS[op]
    groups, stay, _ = check_groups(_FUNCTION, experts, num_expert_group, topk_group, top_k)
    check_scale(_FUNCTION, renormalize, routed_scaling_factor)
    given_scoring = check_scoring(_FUNCTION, scoring_func)
    for argument, given, default in (
        ("num_expert_group", groups, 1),
        ("topk_group", stay, 1),
        ("scoring_func", scoring_func, 0),
    ):
        if not grouped and given != default:
            rule = f"be left out for {op}"
            checks.fail(_FUNCTION, argument, rule, given, "It is an option of grouped_topk.")
    flags = {"correction_bias": correction_bias, "is_padding": is_padding}
    _checks.check_bools(_FUNCTION, flags)
    for argument, given, dtypes in (
        ("dtype", dtype, tuple(_route.DTYPES)),
        ("ids_dtype", ids_dtype, (torch.int32, torch.int64, torch.uint32)),
    ):
        if not isinstance(given, torch.dtype) or given not in dtypes:
            rule = f"be one of {', '.join(map(str, dtypes))}"
            checks.refuse(TypeError, _FUNCTION, argument, rule, given, remedy)
    place = check_device(_FUNCTION, device)
    problem = RouteProblem(
        1,
        experts,
        top_k,
        _route.DTYPES[dtype],
        given_scoring if grouped else scoring,
        renormalize=renormalize,
        num_groups=groups,
        topk_groups=stay,
        scaling_factor=float(routed_scaling_factor),
        bias_rows=int(grouped or correction_bias),
        has_padding=is_padding and not grouped,
        keeps_weights=is_padding and op in ("topk_softmax", "topk_sigmoid"),
        id_words=1 if grouped else ids_dtype.itemsize // 4,
        with_order=not grouped,
    )
    wanted, tokens = [problems.route_bucket(problem)], 1
    while wanted[-1].num_tokens < most:
        tokens = wanted[-1].num_tokens + 1
        wanted.append(problems.route_bucket(problem._replace(num_tokens=tokens)))
    with loading_on(_FUNCTION, place, "the kernels") as programs:
        if reason := kernel.unsupported(wanted[-1]):
            raise store.Unavailable(reason)
        programs.prepare(place.index or 0, wanted, again=True)
    return len(wanted)
