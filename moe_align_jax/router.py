"""route_topk, route_and_align, select_router_implementation: contract, checks, hand-off."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_align_jax import block_align
from moe_align_jax._align import location
from moe_align_jax._align import tables as tuning_tables
from moe_align_jax._align.arguments import (
    capacity_of,
    check_expert_map,
    narrow_count,
    narrow_map,
)
from moe_align_jax._core import checks, fork
from moe_align_jax._lowering import select
from moe_align_jax._lowering.sharding import replicate, vary_together
from moe_align_jax._router import arguments, primitives
from moe_align_jax._router.problem import DTYPES, RouteProblem, Scoring
from moe_align_jax.expert_location import ExpertLocation
from moe_align_jax.types import AlignedBlocks, AlignProblem, Implementation, Selection

_I32 = jnp.int32


def route_topk(
    logits: jax.Array | np.ndarray,
    *,
    top_k: int,
    scoring: Scoring = "softmax",
    softmax_after_topk: bool = False,
    renormalize: bool = False,
    correction_bias: jax.Array | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    scaling_factor: float = 1.0,
    token_mask: jax.Array | None = None,
    num_valid_tokens: int | jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The router of a Mixture-of-Experts layer: each token's top_k experts, and their weights.

    All of it in float32. With l a token's logits:

        score  = softmax(l), sigmoid(l), or sqrt(log(1 + exp(l)))     over all experts
        ids    = the top_k greatest of score + correction_bias
        weight = score[ids], divided by their sum with `renormalize`, times `scaling_factor`

    Without a bias the ids are those of the greatest logits, which is the same order and the finer one. Ids
    are in descending order of what they were chosen by, and equal ones in ascending order of the id. So
    weights descend where there is no bias. An infinite logit counts as the greatest finite number of its
    dtype, and a NaN as the least: no result is NaN, no id is out of range and none comes twice.

    Args:
        logits: `[T, E]` float32, bfloat16 or float16, the gate's outputs.
        top_k: K, experts per token, in [1, E]. Static.
        scoring: "softmax" (Mixtral, Qwen3), "sigmoid" (DeepSeek-V3) or "sqrtsoftplus" (DeepSeek-V4). Static.
        softmax_after_topk: with "softmax": choose by the logits (and the bias), and take the softmax of the
            K chosen ones alone (GPT-OSS). Static.
        renormalize: divide the weights of a token by their sum (plus 1e-20, but for "softmax"). Static.
        correction_bias: `[E]` float32, bfloat16 or float16. It steers the choice; weights are those of the
            scores without it. A NaN counts as -infinity, which is the last choice.
        num_groups: G, a divisor of E: groups of E / G neighbouring experts. Static.
        topk_groups: so many groups stay, and only their experts can be chosen. A group counts as much as the
            sum of its two best choices with a bias (DeepSeek-V3), else as its best one (DeepSeek-V2). Static.
        scaling_factor: of the weights, a finite number. Static.
        token_mask: `[T]` bool, True for a real token (the opposite of vLLM's `is_padding`).
        num_valid_tokens: None, a Python int or a scalar integer array (a device value, not static): tokens
            from this one on are not real.
        implementation: None for the best available ("mosaic_gpu" on a Hopper or newer GPU for up to 1024
            experts, top-32 and 32 groups, else "xla"), or a name, which runs or raises. Static.

    Returns:
        `(topk_weights, topk_ids)`, `[T, K]` float32 and int32. A token that is not real has ids of -1, which
        the alignment drops, and weights of 0. Implementations may differ in the last bits of a weight:
        relative to float64, an error of 1e-6, and 6e-8 for each unit that a logit lies below the greatest.

    Differentiable in the logits (reverse and forward, under vmap too): the derivative is that of the weights
    with the ids held. The bias has none.

    Raises:
        TypeError: an array has another dtype, or an option is not static.
        ValueError: a shape does not fit, or an option is out of range.
        NotImplementedError: the named implementation cannot run here (eagerly at the call, under jit at
            lowering); the message says why.
        RuntimeError: this process was forked while jax was running, so that the call would hang.

    Example:
        >>> logits = jnp.log(jnp.array([[1.0, 3.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0]]))
        >>> weights, ids = route_topk(logits, top_k=2)
        >>> ids.tolist(), weights.round(4).tolist()
        ([[1, 2], [0, 1]], [[0.375, 0.25], [0.25, 0.25]])
        >>> bias = jnp.array([1.0, 0.0, 0.0, 0.0])
        >>> weights, ids = route_topk(logits, top_k=2, renormalize=True, correction_bias=bias)
        >>> ids.tolist(), weights.round(4).tolist()
        ([[0, 1], [0, 1]], [[0.25, 0.75], [0.5, 0.5]])

    Source: contract of vLLM 0.33 `topk_softmax`, `topk_sigmoid`, `grouped_topk` (Apache-2.0), which are
    DeepSeek's; no code taken.
    """
    function = "route_topk"
    fork.check(function)
    select.check_implementation(function, implementation)
    options = arguments.Options(
        top_k=top_k,
        scoring=scoring,
        softmax_after_topk=softmax_after_topk,
        renormalize=renormalize,
        num_groups=num_groups,
        topk_groups=topk_groups,
        scaling_factor=scaling_factor,
        correction_bias=correction_bias,
        token_mask=token_mask,
        num_valid_tokens=num_valid_tokens,
    )
    problem, operands = arguments.check_route(function, logits, options)
    return _route(operands, problem=problem, implementation=implementation)


@functools.partial(jax.jit, static_argnames=("problem", "implementation"))
def _route(
    operands: dict[str, jax.Array], *, problem: RouteProblem, implementation: str | None
) -> tuple[jax.Array, jax.Array]:
    """One cached trace per static size: eager calls and repeated layers reuse it."""
    with jax.named_scope("route_topk"):
        arrays = vary_together(_prepare(problem, operands))
        weights, ids = primitives.route_p.bind(
            *arrays, problem=problem, implementation=implementation
        )
        return weights, ids


def _prepare(problem: RouteProblem, operands: dict[str, jax.Array]) -> list[jax.Array]:
    """The operands of `problem.inputs`, in order."""
    given = {name: replicate(operands[name]) for name in problem.inputs}
    if problem.bias_rows:
        bias = given["correction_bias"].astype(jnp.float32)
        given["correction_bias"] = lax.reshape(bias, (1, problem.num_experts))
    if problem.has_token_mask:
        given["token_mask"] = given["token_mask"].astype(_I32)
    if problem.has_num_valid_tokens:
        given["num_valid_tokens"] = narrow_count(given["num_valid_tokens"])
    return list(given.values())


def route_and_align(
    logits: jax.Array | np.ndarray,
    *,
    top_k: int,
    block_size: int,
    scoring: Scoring = "softmax",
    softmax_after_topk: bool = False,
    renormalize: bool = False,
    correction_bias: jax.Array | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    scaling_factor: float = 1.0,
    token_mask: jax.Array | None = None,
    num_valid_tokens: int | jax.Array | None = None,
    expert_map: jax.Array | np.ndarray | None = None,
    ignore_invalid_experts: bool = False,
    expert_location: ExpertLocation | None = None,
    return_inverse: bool = True,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array, AlignedBlocks]:
    """`route_topk`, and `moe_align_block_size` of what it chose: one launch for up to 64 tokens.

    The results are those of the two apart, bit for bit; beyond 64 tokens or 2048 pairs they are two calls.

    Args:
        logits, top_k, scoring, softmax_after_topk, renormalize, correction_bias, num_groups, topk_groups,
            scaling_factor, token_mask, num_valid_tokens: as for `route_topk`. Tokens that are not real have
            no rows.
        block_size, expert_map, ignore_invalid_experts, return_inverse: as for `moe_align_block_size`.
        expert_location: of one layer (`location.layer(i)`), with E logical experts: blocks are of its slots,
            and so is `expert_map`. `topk_ids` stay logical.
        implementation: as for `route_topk`.

    Returns:
        `(topk_weights, topk_ids, aligned)`: `[T, K]` float32 and int32, and an `AlignedBlocks` of int32
        arrays.

    Differentiable in the logits, as `route_topk`.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as the two functions.

    Example:
        >>> logits = jnp.array([[0.0, 3.0, 2.0], [1.0, 0.0, 2.0]])
        >>> weights, ids, aligned = route_and_align(logits, top_k=2, block_size=2)
        >>> ids.tolist(), aligned.expert_ids.tolist()
        ([[1, 2], [2, 0]], [0, 1, 2, -1])
        >>> aligned.sorted_token_ids.tolist()
        [3, 4, 0, 4, 1, 2, 4]
    """
    function = "route_and_align"
    fork.check(function)
    select.check_implementation(function, implementation)
    options = arguments.Options(
        top_k=top_k,
        scoring=scoring,
        softmax_after_topk=softmax_after_topk,
        renormalize=renormalize,
        num_groups=num_groups,
        topk_groups=topk_groups,
        scaling_factor=scaling_factor,
        correction_bias=correction_bias,
        token_mask=token_mask,
        num_valid_tokens=num_valid_tokens,
    )
    problem, operands = arguments.check_route(function, logits, options)
    block_size = checks.check_block_size(function, block_size)
    flags = {
        "ignore_invalid_experts": ignore_invalid_experts,
        "return_inverse": return_inverse,
    }
    checks.check_bools(function, flags)
    dispatch, tables, slots = arguments.check_location(
        function, expert_location, problem.num_experts
    )
    if expert_map is not None:
        expert_map = check_expert_map(function, expert_map, slots)
    pairs = problem.num_tokens * problem.top_k
    capacity = capacity_of(function, pairs, block_size, slots, False)
    if dispatch == "round_robin" or (isinstance(pairs, int) and not pairs):
        # A pair's turn is known once all pairs before it are; or there is nothing to align.
        weights, ids = _route(operands, problem=problem, implementation=implementation)
        aligned = block_align.moe_align_block_size(
            ids,
            block_size=block_size,
            num_experts=slots,
            expert_map=expert_map,
            ignore_invalid_experts=ignore_invalid_experts,
            return_inverse=return_inverse,
            expert_location=expert_location,
            implementation=implementation,
        )
        return weights, ids, aligned
    if expert_map is not None:
        tables["expert_map"] = expert_map
    return _route_and_align(
        operands,
        tables,
        problem=problem,
        block_size=block_size,
        num_slots=slots,
        capacity=capacity,
        ignore_invalid_experts=bool(ignore_invalid_experts),
        return_inverse=bool(return_inverse),
        dispatch=dispatch,
        implementation=implementation,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "problem",
        "block_size",
        "num_slots",
        "capacity",
        "ignore_invalid_experts",
        "return_inverse",
        "dispatch",
        "implementation",
    ),
)
def _route_and_align(
    operands: dict[str, jax.Array],
    tables: dict[str, jax.Array],
    *,
    problem: RouteProblem,
    block_size: int,
    num_slots: int,
    capacity: Any,
    ignore_invalid_experts: bool,
    return_inverse: bool,
    dispatch: str,
    implementation: str | None,
) -> tuple[jax.Array, jax.Array, AlignedBlocks]:
    with jax.named_scope("route_and_align"):
        tables = {name: replicate(x) for name, x in tables.items()}
        shape = (problem.num_tokens, problem.top_k)
        ids = {"topk_ids": jax.ShapeDtypeStruct(shape, _I32)}
        sizes, arrays = location.arrays_of({**ids, **tables}, dispatch, 0)  # type: ignore[arg-type]
        use = ""
        if "expert_map" in tables:
            use = "filter" if ignore_invalid_experts else "label"
            arrays.append(narrow_map(tables["expert_map"], num_slots))
        align = AlignProblem(
            num_pairs=problem.num_tokens * problem.top_k,
            num_experts=num_slots,
            block_size=block_size,
            capacity=capacity,
            expert_map=use,
            return_inverse=return_inverse,
            **sizes,
        )
        weights, chosen, *aligned = primitives.route_and_align_p.bind(
            *vary_together([*_prepare(problem, operands), *arrays]),
            problem=problem,
            align=align,
            implementation=implementation,
        )
        return weights, chosen, AlignedBlocks(*aligned)


def select_router_implementation(
    shape: tuple[int, int],
    *,
    top_k: int,
    block_size: int | None = None,
    dtype: Any = "float32",
    has_bias: bool = False,
    platform: str | None = None,
    implementation: Implementation | None = None,
    **options: Any,
) -> Selection:
    """Says what `route_topk`, or with a block_size `route_and_align`, would run, and why nothing else.

    Args:
        shape: of the logits, `(T, E)`.
        top_k: K.
        block_size: rows per block of `route_and_align`; None for `route_topk`.
        dtype: of the logits.
        has_bias: whether there is a correction bias.
        platform: "cuda" (or "gpu"), "cpu", "tpu" or "rocm", for which to lower; None for this process's
            default backend.
        implementation: as for `route_topk`.
        options: `route_topk`'s static ones: scoring, renormalize, num_groups, ...

    Returns:
        `Selection(implementation, form, reasons)`. The form is "sort" for "xla", "warp" for the router's
        kernel; with a block_size, "one launch" where it is one, else "warp" and the alignment's form.

    Raises:
        NotImplementedError: the named implementation cannot run for that platform and size.
        TypeError, ValueError: as `route_topk`.

    Example:
        >>> select_router_implementation((64, 256), top_k=8, block_size=64, platform="cuda")[:2]
        ('mosaic_gpu', 'one launch')
        >>> select_router_implementation((8192, 256), top_k=8, platform="cuda")[:2]
        ('mosaic_gpu', 'warp')
    """
    function = "select_router_implementation"
    select.check_implementation(function, implementation)
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        rule, got = "be a pair of ints", checks.describe(shape)
        raise TypeError(checks.message(function, "shape", rule, got, "Pass (T, E)."))
    sizes = [checks.check_int(function, "shape", size, 0, "Pass (T, E).") for size in shape]
    logits = jax.ShapeDtypeStruct(tuple(sizes), select.check_dtype(function, dtype, DTYPES))
    arguments.check_logits(function, logits)
    if unknown := sorted(options.keys() - set(arguments.STATIC)):
        rule, got = f"be among {sorted(arguments.STATIC)}", unknown
        raise TypeError(checks.message(function, "options", rule, got, "They are route_topk's."))
    problem = arguments.make_problem(function, logits, arguments.Options(top_k, **options))
    problem = problem._replace(bias_rows=int(checks.check_bool(function, "has_bias", has_bias)))
    platform = select.check_platform(function, platform)
    choice = primitives.choose(function, problem, platform, implementation)
    reasons = select.reasons_against_others(
        choice,
        platform,
        implementation,
        functools.partial(primitives.unsupported, problem),
        better="the Mosaic GPU kernel runs here, and is one launch",
    )
    form = "sort" if choice == "xla" else "warp"
    if block_size is not None:
        block_size = checks.check_block_size(function, block_size)
        pairs = problem.num_tokens * problem.top_k
        capacity = capacity_of(function, pairs, block_size, problem.num_experts, False)
        tuning = "" if choice == "emulator" else tuning_tables.table_name(select.gpu_kind())
        align = AlignProblem(pairs, problem.num_experts, block_size, capacity, tuning=tuning)
        if pairs and primitives.fused_config(problem, align, choice):
            form = "one launch"
        elif pairs and choice != "xla":
            form = f"warp, {tuning_tables.config_for(align).form}"
    return Selection(choice, form if problem.num_tokens else "empty", reasons)
