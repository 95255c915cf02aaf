"""The expert layer on torch tensors: grouped_matmul, fused_moe, and what they would run."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from moe_align_jax._core import checks as core_checks
from moe_align_jax._grouped_matmul.problem import Activation
from moe_align_jax.types import AlignedBlocks
from torch_bridge import _checks
from torch_bridge._moe import checks, ops, run
from torch_bridge._resolved import Plan
from torch_bridge.align import Path

type _Weights = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def grouped_matmul(
    x: torch.Tensor,
    w: _Weights,
    aligned: AlignedBlocks | tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    block_size: int,
    top_k: int | None = None,
    transpose_rhs: bool = False,
    activation: Activation | None = None,
    gated: bool = True,
    interleaved: bool = False,
    swiglu_limit: float | None = None,
    swiglu_alpha: float | None = None,
    bias: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    preferred_element_type: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    path: Path = "auto",
) -> torch.Tensor:
    """`moe_align_jax.grouped_matmul` in torch: each aligned row times the weights of its block's expert.

    On a Hopper GPU one launch on torch's current stream, which the host does not wait for; elsewhere
    jax computes, over DLPack. Works under torch.compile (fullgraph), and in a CUDA-graph capture
    once its program is loaded, which an eager call does. It has no derivative.

    Args:
        x: `[T, K]` with `top_k`, else `[P, K]`, rows in aligned order. bfloat16, float16 or float32
            (which the kernels do not multiply: jax does).
        w: `[E, K, N]` of x's dtype, with `transpose_rhs` `[E, N, K]`; or a pair (gate, up) of these.
            Gated, one tensor has 2 N columns.
        aligned: of `align_blocks`, or the three results of `moe_align_block_size`. In each block the pairs
            come ahead of the padding. Without `top_k`, pass all of its rows: the last one tells what is
            padding.
        block_size: the one that `aligned` was made with.
        top_k: row r of the product is that of token `sorted_token_ids[r] // top_k` of x.
        transpose_rhs, activation, gated, interleaved, swiglu_limit, swiglu_alpha: as for
            `moe_align_jax.grouped_matmul`.
        bias: `[E, N]` (gated `[E, 2 N]`), any float dtype.
        row_weights: `[P]`, any float dtype: each row of the result is multiplied by its own.
        preferred_element_type: dtype of the result; None for x's.
        out: `[P, N]` to be written instead of a new tensor, contiguous, overlapping no input.
        path: "auto" takes the best: "direct", a launch on torch's current stream, or "dlpack", through
            jax. A named path is taken, or an error is raised.

    Returns:
        `[P, N]`, or `out`. Rows in use that hold no pair, and blocks of expert -1, are zero; rows behind
        `num_tokens_post_padded` are unspecified.

    Raises:
        TypeError, ValueError: as `moe_align_jax.grouped_matmul`; `out` does not fit, or devices differ.
        NotImplementedError: a gradient is needed, or `path="direct"` cannot run here.
        RuntimeError: torch's current stream is captured, and the program is not loaded (or the path is
            "dlpack").

    Example:
        >>> from torch_bridge import align_blocks
        >>> ids = torch.tensor([[1], [0], [1]])
        >>> aligned = align_blocks(ids, block_size=2, num_experts=2)
        >>> w = torch.stack([torch.eye(2), 10 * torch.eye(2)])
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> grouped_matmul(x, w, aligned, block_size=2, top_k=1)[:4].tolist()
        [[3.0, 4.0], [0.0, 0.0], [10.0, 20.0], [50.0, 60.0]]
    """
    key = None
    if type(path) is str and path == "auto" and bias is None and row_weights is None:
        first = _arrays(w)
        where = tuple(aligned[:3]) if isinstance(aligned, (tuple, list)) else ()
        tensors = (x, *first, *where) if out is None else (x, *first, *where, out)
        # The pairs are checked against an inverse, which the launch does not read.
        inverse = getattr(aligned, "row_of_pair", None)
        key = _key(
            *(x, where[0] if where else None, len(first), out is None, block_size, top_k),
            None if inverse is None else getattr(inverse, "shape", ()),
            *(transpose_rhs, activation, gated, interleaved, swiglu_limit, swiglu_alpha),
            preferred_element_type,
        )
        if key is not None and (result := run.repeat(key, tensors)) is not None:
            return result
    path = _checks.check_path("grouped_matmul", path)  # type: ignore[assignment]
    call, operands = checks.check_matmul(
        x,
        w,
        aligned,
        block_size=block_size,
        top_k=top_k,
        transpose_rhs=transpose_rhs,
        activation=activation,
        gated=gated,
        interleaved=interleaved,
        swiglu_limit=swiglu_limit,
        swiglu_alpha=swiglu_alpha,
        bias=bias,
        row_weights=row_weights,
        preferred_element_type=preferred_element_type,
    )
    if out is not None:
        out = checks.check_out("grouped_matmul", out, call, x)
    return ops.results_of(call, operands, out, path, key)[0]


def fused_moe(
    x: torch.Tensor,
    w_gate_up: _Weights,
    w_down: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: Activation | None = "silu",
    gated: bool = True,
    interleaved: bool = False,
    swiglu_limit: float | None = None,
    swiglu_alpha: float | None = None,
    bias_gate_up: torch.Tensor | None = None,
    bias_down: torch.Tensor | None = None,
    transpose_rhs: bool = False,
    weights_on_input: bool = False,
    aligned: AlignedBlocks | None = None,
    expert_map: torch.Tensor | None = None,
    num_valid_tokens: int | torch.Tensor | None = None,
    return_tokens_per_expert: bool = False,
    preferred_element_type: torch.dtype | None = None,
    block_size: int | None = None,
    out: torch.Tensor | None = None,
    path: Path = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`moe_align_jax.fused_moe` in torch: the experts of a Mixture-of-Experts layer in one call.

    On a Hopper GPU four steps on torch's current stream (the alignment, a matrix multiplication that
    gathers the tokens and applies the activation, one back to H columns, the weighted sum), which the
    host does not wait for; elsewhere jax computes, over DLPack. Works under torch.compile (fullgraph),
    and in a CUDA-graph capture once its programs are loaded, which an eager call of that size does. It
    has no derivative. The same call gives the same bits in every run.

    Args:
        x: `[T, H]` bfloat16, float16 or float32 (which the kernels do not multiply: jax does).
        w_gate_up: `[E, H, 2 N]` of x's dtype, gate in the first N columns, or a pair (gate, up) of
            `[E, H, N]`; without `gated` `[E, H, N]`.
        w_down: `[E, N, H]` of x's dtype.
        topk_weights: `[T, K]`, any float dtype. Those of dropped pairs are not used, and may be NaN.
        topk_ids: `[T, K]`, any integer dtype. Ids outside `[0, E)` are dropped.
        activation, gated, interleaved, swiglu_limit, swiglu_alpha, bias_gate_up, bias_down,
            weights_on_input: as for `moe_align_jax.fused_moe`.
        transpose_rhs: weights are `[E, 2 N, H]` (`[E, N, H]`, each of a pair) and `[E, H, N]`, as Hugging
            Face and vLLM keep them.
        aligned: an alignment of topk_ids made before, of `align_blocks(..., return_inverse=True)`. It
            needs `block_size`; expert_map and num_valid_tokens are then the alignment's. Of one made by
            hand the same is asked as by `moe_align_jax.fused_moe`.
        expert_map: `[G]`, any integer dtype: the local id of each of G experts, -1 for those of other
            devices. topk_ids are then in `[0, G)`. Pairs of a local id of E or more are dropped, too.
        num_valid_tokens: None, an int or a scalar integer tensor: tokens from this one on are not real,
            and their results are zero.
        return_tokens_per_expert: also return the pairs that each expert got.
        preferred_element_type: dtype of the result; None for x's.
        block_size: rows per block of the alignment; None for what suits the sizes.
        out: `[T, H]` to be written instead of a new tensor, contiguous, overlapping no input.
        path: as for `grouped_matmul`.

    Returns:
        `[T, H]`, or `out`; with `return_tokens_per_expert` also int32 `[E]`.

    Raises:
        TypeError, ValueError: as `moe_align_jax.fused_moe`; `out` does not fit, or devices differ.
        NotImplementedError, RuntimeError: as `grouped_matmul`.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> w_up = torch.stack([torch.eye(2), 2 * torch.eye(2)])
        >>> w_down = torch.stack([torch.eye(2), 10 * torch.eye(2)])
        >>> weights, ids = torch.tensor([[1.0, 0.5], [1.0, 0.5]]), torch.tensor([[0, 1], [1, -1]])
        >>> fused_moe(x, w_up, w_down, weights, ids, activation="relu2", gated=False).tolist()
        [[21.0, 84.0], [360.0, 640.0]]

    Source: contract of vLLM 0.33 `fused_experts` (Apache-2.0); no code taken.
    """
    key = None
    if type(path) is str and path == "auto" and aligned is None and num_valid_tokens is None:
        first = _arrays(w_gate_up)
        tensors = (x, *first, w_down, topk_weights, topk_ids)
        if expert_map is not None:
            tensors = (*tensors, expert_map)
        if out is not None:
            tensors = (*tensors, out)
        key = _key(
            *(
                x,
                topk_ids,
                len(first),
                expert_map is None,
                out is None,
                activation,
                gated,
                interleaved,
                swiglu_limit,
                swiglu_alpha,
            ),
            *(transpose_rhs, weights_on_input, preferred_element_type, block_size),
            *(bias_gate_up is None and bias_down is None, return_tokens_per_expert),
        )
        if key is not None and (result := run.repeat(key, tensors)) is not None:
            return result
    function = "fused_moe"
    path = _checks.check_path(function, path)  # type: ignore[assignment]
    call, operands = checks.check_layer(
        x,
        w_gate_up,
        w_down,
        topk_weights,
        topk_ids,
        activation=activation,
        gated=gated,
        interleaved=interleaved,
        swiglu_limit=swiglu_limit,
        swiglu_alpha=swiglu_alpha,
        bias_gate_up=bias_gate_up,
        bias_down=bias_down,
        transpose_rhs=transpose_rhs,
        weights_on_input=weights_on_input,
        aligned=aligned,
        expert_map=expert_map,
        num_valid_tokens=num_valid_tokens,
        return_tokens_per_expert=return_tokens_per_expert,
        preferred_element_type=preferred_element_type,
        block_size=block_size,
    )
    if out is not None:
        out = checks.check_out(function, out, call, x)
    results = ops.results_of(call, operands, out, path, key)
    return (results[0], results[1]) if call.counted else results[0]


def _arrays(w: Any) -> tuple[Any, ...]:
    """The arrays of weights: two of a pair, or what else was given, as one."""
    return tuple(w) if isinstance(w, (tuple, list)) and len(w) == 2 else (w,)


def _key(x: Any, ids: Any, *options: Any) -> run.Key | None:
    """How a call is known: by x's and the ids' shapes and the options, with their types."""
    try:
        return (x.shape, ids.shape, *options, *map(type, options))
    except (AttributeError, RuntimeError):  # no tensor, or a nested one
        return None


def _check_options(function: str, explained: Callable, options: dict[str, Any]) -> None:
    """That they are of the function that is explained, whose parameters check what they are."""
    known = inspect.signature(explained).parameters
    needed = [n for n, p in known.items() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if missing := [name for name in needed if name not in options]:
        rule = f"be given, as to {explained.__name__}"
        core_checks.fail(function, ", ".join(missing), rule, "none", "Pass it.", TypeError)
    if unknown := [name for name in options if name not in known]:
        rule, remedy = f"be those of {explained.__name__}", "See its documentation."
        core_checks.fail(function, "options", rule, ", ".join(unknown), remedy, TypeError)


def explain_grouped_matmul(x: Any, w: Any, aligned: Any, **options: Any) -> Plan:
    """What `grouped_matmul` with these arguments would do, without doing it.

    Args:
        As for `grouped_matmul`.

    Returns:
        As `torch_bridge.explain`.

    Raises:
        As `grouped_matmul`.
    """
    _check_options("explain_grouped_matmul", grouped_matmul, options)
    path = _checks.check_path("explain_grouped_matmul", options.pop("path", "auto"))
    options.pop("out", None)
    defaults = {
        "top_k": None,
        "transpose_rhs": False,
        "activation": None,
        "bias": None,
        "row_weights": None,
        "preferred_element_type": None,
    }
    call, operands = checks.check_matmul(x, w, aligned, **{**defaults, **options})
    return run.resolve(call, operands, path).plan


def explain_fused_moe(
    x: Any, w_gate_up: Any, w_down: Any, topk_weights: Any, topk_ids: Any, **options: Any
) -> Plan:
    """What `fused_moe` with these arguments would do, without doing it.

    Args:
        As for `fused_moe`.

    Returns:
        As `torch_bridge.explain`.

    Raises:
        As `fused_moe`.

    Example:
        >>> x, w_up, w_down = torch.ones(1, 8), torch.ones(2, 8, 16), torch.ones(2, 8, 8)
        >>> weights, ids = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
        >>> plan = explain_fused_moe(x, w_up, w_down, weights, ids)
        >>> plan.path, plan.implementation
        ('dlpack', 'xla')
    """
    _check_options("explain_fused_moe", fused_moe, options)
    path = _checks.check_path("explain_fused_moe", options.pop("path", "auto"))
    call, operands = checked_layer(x, w_gate_up, w_down, topk_weights, topk_ids, **options)
    return run.resolve(call, operands, path).plan


def checked_layer(*arguments: Any, **options: Any) -> Any:
    """What `fused_moe` with these arguments asks for, and its tensors by name."""
    options.pop("out", None)
    defaults = {
        "activation": "silu",
        "bias_gate_up": None,
        "bias_down": None,
        "transpose_rhs": False,
        "weights_on_input": False,
        "aligned": None,
        "expert_map": None,
        "num_valid_tokens": None,
        "return_tokens_per_expert": False,
        "preferred_element_type": None,
        "block_size": None,
    }
    return checks.check_layer(*arguments, **{**defaults, **options})
