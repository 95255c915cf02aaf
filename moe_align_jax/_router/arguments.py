"""What the router's functions check of their arguments, and the problem that they make of them."""

from typing import Any, NamedTuple

import numpy as np

from moe_align_jax._align.arguments import check_count
from moe_align_jax._align.location import tables_of_layer
from moe_align_jax._core import checks
from moe_align_jax._router.problem import DTYPES, SCORINGS, RouteProblem


class Options(NamedTuple):
    """What `route_topk` and `route_and_align` are given beside the logits, as their callers wrote it.

    The arrays come last; what is before them is static, with the defaults that the functions have.
    """

    top_k: Any
    scoring: Any = "softmax"
    softmax_after_topk: Any = False
    renormalize: Any = False
    num_groups: Any = 1
    topk_groups: Any = 1
    scaling_factor: Any = 1.0
    correction_bias: Any = None
    token_mask: Any = None
    num_valid_tokens: Any = None


# Those of them that `select_router_implementation` passes on.
STATIC = Options._fields[1:-3]


def check_route(
    function: str, logits: Any, options: Options
) -> tuple[RouteProblem, dict[str, Any]]:
    """The checked problem, and the operands by name as they were given."""
    remedy = "Pass the gate's outputs as a jax or NumPy array."
    _check_array(function, "logits", logits, remedy)
    check_logits(function, logits)
    problem = make_problem(function, logits, options)
    operands: dict[str, Any] = {"logits": logits}
    num_tokens, num_experts = logits.shape
    correction_bias, token_mask, num_valid_tokens = options[-3:]
    if correction_bias is not None:
        remedy = "Pass one number for each expert, or None."
        _check_floats(function, "correction_bias", correction_bias, remedy)
        _check_array(function, "correction_bias", correction_bias, remedy)
        _check_shape(function, "correction_bias", correction_bias, (num_experts,), remedy)
        operands["correction_bias"] = correction_bias
    if token_mask is not None:
        remedy = "True says that a token is real."
        if getattr(token_mask, "dtype", None) != np.bool_:
            got = checks.describe(token_mask)
            rule = "be a bool array"
            raise TypeError(checks.message(function, "token_mask", rule, got, remedy))
        _check_array(function, "token_mask", token_mask, remedy)
        _check_shape(function, "token_mask", token_mask, (num_tokens,), remedy)
        operands["token_mask"] = token_mask
    if num_valid_tokens is not None:
        operands["num_valid_tokens"] = check_count(
            function,
            "num_valid_tokens",
            num_valid_tokens,
            "Pass the number of real tokens, as an int or a scalar integer array.",
        )
    problem = problem._replace(
        bias_rows=int(correction_bias is not None),
        has_token_mask=token_mask is not None,
        has_num_valid_tokens=num_valid_tokens is not None,
    )
    return problem, operands


def _check_array(function: str, argument: str, value: Any, remedy: str) -> None:
    """Raises TypeError unless it is an array."""
    if not checks.is_array(value):
        remedy, got = checks.array_remedy(value, remedy), checks.describe(value)
        raise TypeError(checks.message(function, argument, "be an array", got, remedy))


def _check_floats(function: str, argument: str, value: Any, remedy: str) -> None:
    """Raises TypeError unless it is an array of a dtype that the router takes."""
    if str(getattr(value, "dtype", "")) not in DTYPES:
        rule, got = "be float32, bfloat16 or float16", checks.describe(value)
        raise TypeError(checks.message(function, argument, rule, got, remedy))


def _check_shape(
    function: str, argument: str, value: Any, shape: tuple[Any, ...], remedy: str
) -> None:
    """Raises ValueError unless the array has this shape."""
    if value.shape != shape:
        rule, got = f"have shape {list(shape)}", checks.describe(value)
        raise ValueError(checks.message(function, argument, rule, got, remedy))


def check_logits(function: str, logits: Any) -> None:
    """Raises unless they are floats `[num_tokens, num_experts]` with at least one expert."""
    remedy = "Pass the gate's outputs, a row for each token."
    _check_floats(function, "logits", logits, remedy)
    if len(logits.shape) != 2 or logits.shape[1] == 0:
        rule = "have shape [num_tokens, num_experts] with at least one expert"
        got = checks.describe(logits)
        raise ValueError(checks.message(function, "logits", rule, got, remedy))


def make_problem(function: str, logits: Any, options: Options) -> RouteProblem:
    """Of the static options, checked."""
    num_tokens, num_experts = logits.shape

    remedy = "Pass the number of experts of each token."
    top_k = checks.check_positive_int(function, "top_k", options.top_k, remedy)
    remedy = "Pass the number of groups that the experts are divided into."
    groups = checks.check_positive_int(function, "num_groups", options.num_groups, remedy)
    remedy = "Pass the number of groups that may be chosen from."
    stay = checks.check_positive_int(function, "topk_groups", options.topk_groups, remedy)
    scoring = options.scoring
    if not checks.is_one_of(scoring, SCORINGS):
        got = checks.shown(scoring)
        rule = f"be one of {', '.join(map(repr, SCORINGS))}"
        checks.fail(function, "scoring", rule, got, "It is a static string.")
    flags = {
        "softmax_after_topk": options.softmax_after_topk,
        "renormalize": options.renormalize,
    }
    checks.check_bools(function, flags)
    if options.softmax_after_topk and scoring != "softmax":
        got, remedy = f"True with {scoring!r}", "Other scores do not depend on each other."
        checks.fail(
            function, "softmax_after_topk", "be False unless scoring is 'softmax'", got, remedy
        )
    if num_experts % groups:
        got = f"{groups} for {num_experts} experts"
        checks.fail(
            function, "num_groups", "divide the number of experts", got, "Groups are of one size."
        )
    if stay > groups:
        got = f"{stay} of {groups}"
        checks.fail(
            function,
            "topk_groups",
            "be at most num_groups",
            got,
            "Pass num_groups to choose from all.",
        )
    candidates = num_experts // groups * stay
    if top_k > candidates:
        got = f"{top_k} of {candidates}"
        remedy = "No expert is chosen twice."
        checks.fail(
            function, "top_k", "be at most the number of experts that can be chosen", got, remedy
        )
    scaling_factor = options.scaling_factor
    if isinstance(scaling_factor, (bool, np.bool_)) or not isinstance(
        scaling_factor, (int, float, np.integer, np.floating)
    ):
        rule, got = "be a static number", checks.describe(scaling_factor)
        remedy = "It is compiled into the kernel: pass a Python float."
        raise TypeError(checks.message(function, "scaling_factor", rule, got, remedy))
    if not checks.is_finite_float32(scaling_factor):
        checks.fail(
            function, "scaling_factor", "be a finite float32", scaling_factor, "Pass 1.0 for none."
        )
    return RouteProblem(
        num_tokens=num_tokens,
        num_experts=num_experts,
        top_k=top_k,
        dtype=str(logits.dtype),
        scoring=scoring,
        softmax_after_topk=bool(options.softmax_after_topk),
        renormalize=bool(options.renormalize),
        num_groups=groups,
        topk_groups=stay,
        scaling_factor=float(np.float32(scaling_factor)),
    )


def check_location(
    function: str, location: Any, num_experts: int
) -> tuple[str, dict[str, Any], int]:
    """Its dispatch and tables for the alignment, and the number of its slots."""
    if location is None:
        return "", {}, num_experts
    slots = getattr(location, "num_physical_experts", 1)
    dispatch, tables = tables_of_layer(function, location, slots)
    if location.num_logical_experts != num_experts:
        rule = f"have {num_experts} logical experts, as the logits have"
        remedy = "The router chooses logical experts."
        got = location.num_logical_experts
        raise ValueError(checks.message(function, "expert_location", rule, got, remedy))
    return dispatch, tables, slots
