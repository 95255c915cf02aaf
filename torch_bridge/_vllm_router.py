"""vLLM's router ops on our kernel: signatures, order and defaults of vllm 0.33's `_custom_ops.py`.

Public as names of `torch_bridge.vllm`. They stand here because `torch_bridge/vllm_patch.py` puts them into an
installed vLLM and `torch_bridge/vllm.py` imports that patch.
"""

from collections.abc import Mapping

import torch

from moe_align_jax._core import checks
from moe_align_jax._router.problem import GIVEN_SCORES, SUM_FLOOR
from torch_bridge import _checks, _route, dlpack
from torch_bridge._direct import inplace

_ID_DTYPES = (torch.int32, torch.int64, torch.uint32)
_REMEDY = "See torch_bridge.vllm for what each tensor holds."
# An image is so many token ids from `image_sentinel_lo` on.
_IMAGE_TOKENS = 5
_SCORINGS = {0: GIVEN_SCORES, 1: "sigmoid"}


def topk_softmax(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
) -> None:
    """vLLM's `topk_softmax`: each token's K most probable experts, into the caller's buffers.

    Args:
        topk_weights: `[T, K]` float32, written: softmax over all experts, of the chosen ones.
        topk_ids: `[T, K]` int32, int64 or uint32, written. The greatest first; of equal ones the lowest id.
        token_expert_indices: `[T, K]` int32, written: k * T + t, for token t's k-th expert.
        gating_output: `[T, E]` float32, bfloat16 or float16, the logits.
        renormalize: divide a token's weights by their sum.
        e_score_correction_bias: `[E]` of the same dtypes. It steers the choice; weights are without it.
        is_padding: `[T]` bool or uint8. The ids of a token where it is not 0 become -1; its weights stay
            those of a token that is none.

    The buffers are contiguous, on the device of `gating_output`, and overlap neither each other nor an input.
    Where logits are infinite or NaN, vLLM's op gives the ids 0 .. K - 1 and weights of 0; this one does as
    `moe_align_jax.route_topk` does. No gradient passes.

    Returns:
        None.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a shape, device or layout does not fit, or tensors share memory.
        torch_bridge.Miss: a stream is captured into a CUDA graph and the kernel for these sizes was not used
            before: call it once ahead of the capture. Nothing is written in any of these cases.
        NotImplementedError, RuntimeError: as `torch_bridge.moe_align_block_size`.

    Example:
        >>> logits = torch.tensor([[1.0, 3.0, 2.0, 2.0], [2.0, 1.0, 2.0, 3.0]]).log()
        >>> weights, ids = torch.empty(2, 2), torch.empty(2, 2, dtype=torch.int64)
        >>> order = torch.empty(2, 2, dtype=torch.int32)
        >>> topk_softmax(weights, ids, order, logits)
        >>> ids.tolist(), order.tolist()
        ([[1, 2], [3, 0]], [[0, 2], [1, 3]])
        >>> weights.mul(1000).round().tolist()
        [[375.0, 250.0], [375.0, 250.0]]

    Source: vllm 0.33 `_custom_ops.py` and its op's schema (Apache-2.0), signature and contract; no code
    taken.
    """
    function = "topk_softmax"
    key = (function, renormalize)
    given = (gating_output, e_score_correction_bias, is_padding)
    if _route.repeat(key, given, (topk_weights, topk_ids, token_expert_indices)):
        return
    results = {
        "topk_weights": topk_weights,
        "topk_ids": topk_ids,
        "token_expert_indices": token_expert_indices,
    }
    operands = _check_op(
        function, results, gating_output, renormalize, 1.0, e_score_correction_bias, is_padding
    )
    _route.route(
        function,
        operands,
        results,
        scoring="softmax",
        renormalize=renormalize,
        keeps_weights=True,
        key=key,
    )


def topk_sigmoid(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    is_padding: torch.Tensor | None = None,
) -> None:
    """vLLM's `topk_sigmoid`: as `topk_softmax`, with each expert's sigmoid for its score.

    Args:
        topk_weights, topk_ids, token_expert_indices, gating_output, renormalize, e_score_correction_bias,
            is_padding: as for `topk_softmax`. Renormalizing adds 1e-20 to the sum.
        routed_scaling_factor: of the weights, a finite number.

    Returns:
        None.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError, torch_bridge.Miss: as `topk_softmax`.

    Example:
        >>> logits = torch.tensor([[0.0, 5.0, -5.0]])
        >>> weights, ids = torch.empty(1, 2), torch.empty(1, 2, dtype=torch.int32)
        >>> topk_sigmoid(weights, ids, torch.empty_like(ids), logits, routed_scaling_factor=2.0)
        >>> ids.tolist(), weights.mul(1000).round().tolist()
        ([[1, 0]], [[1987.0, 1000.0]])

    Source: as `topk_softmax`.
    """
    function = "topk_sigmoid"
    key = (function, renormalize, routed_scaling_factor)
    given = (gating_output, e_score_correction_bias, is_padding)
    if _route.repeat(key, given, (topk_weights, topk_ids, token_expert_indices)):
        return
    results = {
        "topk_weights": topk_weights,
        "topk_ids": topk_ids,
        "token_expert_indices": token_expert_indices,
    }
    operands = _check_op(
        function,
        results,
        gating_output,
        renormalize,
        routed_scaling_factor,
        e_score_correction_bias,
        is_padding,
    )
    _route.route(
        function,
        operands,
        results,
        scoring="sigmoid",
        renormalize=renormalize,
        scaling_factor=routed_scaling_factor,
        keeps_weights=True,
        key=key,
    )


def topk_hash_softplus_sqrt(
    topk_weights: torch.Tensor,
    topk_indices: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: torch.Tensor | None = None,
    input_tokens: torch.Tensor | None = None,
    hash_indices_table: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
    bias_vl: torch.Tensor | None = None,
    image_sentinel_lo: int = 0,
) -> None:
    """vLLM's `topk_hash_softplus_sqrt` (DeepSeek-V4): scores are sqrt(log(1 + exp(logit))).

    Args:
        topk_weights, topk_indices, token_expert_indices, gating_output, renormalize, e_score_correction_bias,
            is_padding: as for `topk_softmax`, where `topk_indices` is called `topk_ids`; but the weights of a
            token that is padding are 0.
        routed_scaling_factor: of the weights, a finite number.
        input_tokens: `[T]` integers, the id of each token in the vocabulary V.
        hash_indices_table: `[V, K]` integers: a token's experts are those of its row, in that order, and
            `token_expert_indices` is left as it is. (A token or an expert that is out of range, which vLLM
            does not look for, gives an id of -1 and a weight of 0.) Needs `input_tokens`.
        bias_vl: `[E]`, with an `image_sentinel_lo` above 0: tokens with ids of image_sentinel_lo to
            image_sentinel_lo + 4, those of an image, are routed with this bias instead of
            `e_score_correction_bias`, and not by the table. Needs `input_tokens`.
        image_sentinel_lo: the first of these ids; 0 or less for none.

    The table's weights are computed by torch's own operations; all else is as in `topk_softmax`.

    Returns:
        None.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError, torch_bridge.Miss: as `topk_softmax`.

    Example:
        >>> logits = torch.zeros(2, 4)
        >>> table = torch.tensor([[0, 1], [3, 2]], dtype=torch.int32)
        >>> weights, ids = torch.empty(2, 2), torch.empty(2, 2, dtype=torch.int32)
        >>> order, tokens = torch.empty_like(ids), torch.tensor([1, 0])
        >>> topk_hash_softplus_sqrt(weights, ids, order, logits, True, 2.0, None, tokens, table)
        >>> ids.tolist(), weights.tolist()
        ([[3, 2], [0, 1]], [[1.0, 1.0], [1.0, 1.0]])

    Source: as `topk_softmax`.
    """
    function = "topk_hash_softplus_sqrt"
    key = (function, renormalize, routed_scaling_factor)
    if hash_indices_table is None and bias_vl is None:
        given = (gating_output, e_score_correction_bias, is_padding)
        if _route.repeat(key, given, (topk_weights, topk_indices, token_expert_indices)):
            return
    results = {
        "topk_weights": topk_weights,
        "topk_indices": topk_indices,
        "token_expert_indices": token_expert_indices,
    }
    operands = _check_op(
        function,
        results,
        gating_output,
        renormalize,
        routed_scaling_factor,
        e_score_correction_bias,
        is_padding,
    )
    sentinel = checks.check_int(
        function, "image_sentinel_lo", image_sentinel_lo, -(2**31), "Pass 0 for no image tokens."
    )
    of_images = bias_vl if sentinel > 0 else None
    tokens = _check_tokens(function, gating_output, input_tokens, hash_indices_table, of_images)
    shape = topk_indices.shape
    results["topk_ids"] = results.pop("topk_indices")
    options = {"renormalize": renormalize, "scaling_factor": routed_scaling_factor}
    if hash_indices_table is not None:
        assert tokens is not None
        table = _check_table(function, hash_indices_table, shape[1], gating_output.device)
        weights, ids = _by_table(gating_output, tokens, table, **options)
    elif of_images is not None:
        weights, ids = _routed(function, operands, shape, **options)
    else:
        out = {
            "topk_weights": topk_weights,
            "topk_ids": topk_indices,
            "token_expert_indices": token_expert_indices,
        }
        _route.route(function, operands, out, scoring="sqrtsoftplus", key=key, **options)
        return
    if of_images is not None:
        assert tokens is not None
        bias = _check_bias(function, "bias_vl", of_images, gating_output)
        seen = {**operands, "correction_bias": bias}
        is_image = (tokens >= sentinel) & (tokens < sentinel + _IMAGE_TOKENS)
        image_weights, image_ids = _routed(function, seen, shape, **options)
        weights = torch.where(is_image[:, None], image_weights, weights)
        ids = torch.where(is_image[:, None], image_ids, ids)
    if "is_padding" in operands:
        is_padding = operands["is_padding"].bool()[:, None]
        weights, ids = weights.masked_fill(is_padding, 0), ids.masked_fill(is_padding, -1)
    _check_apart(function, results, {"gating_output": gating_output, **operands})
    topk_weights.copy_(weights)
    _route.signed(topk_indices).copy_(ids)
    if hash_indices_table is None:
        _route.write_order(token_expert_indices)


def grouped_topk(
    scores: torch.Tensor,
    num_expert_group: int,
    topk_group: int,
    topk: int,
    renormalize: bool,
    routed_scaling_factor: float,
    bias: torch.Tensor,
    scoring_func: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's `grouped_topk` (DeepSeek-V3): experts are chosen within the best groups of them.

    Args:
        scores: `[T, E]` float32, bfloat16 or float16: logits, or scores (see `scoring_func`).
        num_expert_group: groups of E / num_expert_group neighbouring experts.
        topk_group: so many groups stay. A group counts as much as its two best experts' choices together.
        topk: K, experts per token.
        renormalize: divide a token's weights by their sum (plus 1e-20).
        routed_scaling_factor: of the weights, a finite number.
        bias: `[E]` of the dtypes of `scores`. It steers the choice; weights are without it.
        scoring_func: 0, `scores` are what they are called; 1, they are logits, and a score is their sigmoid.

    Returns:
        `(topk_weights, topk_ids)`, `[T, K]` float32 and int32, the greatest choice first.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError, torch_bridge.Miss: as `topk_softmax`.

    Example:
        >>> logits = torch.tensor([[0.0, 9.0, 2.0, 3.0]])
        >>> weights, ids = grouped_topk(logits, 2, 1, 1, True, 2.5, torch.tensor([0.0, -9.0, 0.0, 0.0]), 1)
        >>> ids.tolist(), weights.tolist()
        ([[3]], [[2.5]])

    Source: as `topk_softmax`.
    """
    function = "grouped_topk"
    _check_logits(function, "scores", scores)
    num_experts = scores.shape[1]
    groups, stay, top_k = check_groups(function, num_experts, num_expert_group, topk_group, topk)
    check_scale(function, renormalize, routed_scaling_factor)
    scoring = check_scoring(function, scoring_func)
    operands = {"logits": scores, "correction_bias": _check_bias(function, "bias", bias, scores)}
    shape = (scores.shape[0], top_k)
    results = {
        "topk_weights": scores.new_empty(shape, dtype=torch.float32),
        "topk_ids": scores.new_empty(shape, dtype=torch.int32),
    }
    key = (function, groups, stay, renormalize, routed_scaling_factor, scoring_func)
    given = (scores, operands["correction_bias"], None)
    if _route.repeat(key, given, tuple(results.values())):
        return results["topk_weights"], results["topk_ids"]
    _route.route(
        function,
        operands,
        results,
        key=key,
        scoring=scoring,
        renormalize=renormalize,
        scaling_factor=routed_scaling_factor,
        num_groups=groups,
        topk_groups=stay,
    )
    return results["topk_weights"], results["topk_ids"]


# -- by the table, and into new tensors --------------------------------------------------------------


def _routed(
    function: str,
    operands: Mapping[str, torch.Tensor],
    shape: torch.Size,
    *,
    renormalize: bool,
    scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New (weights, ids) of all tokens, padding too."""
    logits = operands["logits"]
    results = {
        "topk_weights": logits.new_empty(shape, dtype=torch.float32),
        "topk_ids": logits.new_empty(shape, dtype=torch.int32),
    }
    _route.route(
        function,
        {name: x for name, x in operands.items() if name != "is_padding"},
        results,
        scoring="sqrtsoftplus",
        renormalize=renormalize,
        scaling_factor=scaling_factor,
    )
    return results["topk_weights"], results["topk_ids"]


def _by_table(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    table: torch.Tensor,
    *,
    renormalize: bool,
    scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New (weights, ids): the ids are a token's row of the table."""
    num_tokens, num_experts = table.shape[0], logits.shape[1]
    known = (tokens >= 0) & (tokens < num_tokens)
    ids = table[torch.where(known, tokens, 0)].to(torch.int64)
    valid = known[:, None] & (ids >= 0) & (ids < num_experts)
    chosen = logits.detach().gather(1, torch.where(valid, ids, 0)).to(torch.float32)
    greatest = torch.finfo(logits.dtype).max
    chosen = chosen.nan_to_num(-greatest, greatest, -greatest)
    weights = torch.nn.functional.softplus(chosen, threshold=30.0).sqrt()
    weights = torch.where(valid, weights, 0)
    if renormalize:
        weights = weights / (weights.sum(dim=1, keepdim=True) + SUM_FLOOR)
    return weights * scaling_factor, torch.where(valid, ids, -1).to(torch.int32)


# -- checks ------------------------------------------------------------------------------------------


def _check_floats(function: str, argument: str, value: object) -> None:
    if not isinstance(value, torch.Tensor) or value.dtype not in _route.DTYPES:
        rule = "be a float32, bfloat16 or float16 torch.Tensor"
        checks.fail(function, argument, rule, _checks.describe(value), _REMEDY, TypeError)
    elif what := _checks.not_dense(value):
        checks.fail(function, argument, "be a dense tensor", what, "Call to_dense().", TypeError)


def _check_logits(function: str, argument: str, logits: torch.Tensor) -> None:
    _check_floats(function, argument, logits)
    if logits.dim() != 2 or logits.shape[1] < 1:
        rule = "have shape [num_tokens, num_experts] with at least one expert"
        checks.refuse(ValueError, function, argument, rule, logits, _REMEDY)


def _check_device(function: str, argument: str, value: torch.Tensor, device: torch.device) -> None:
    if value.device != device:
        rule, remedy = f"be on the device of the logits, {device}", "Move it there."
        checks.fail(function, argument, rule, value.device, remedy)


def _check_bias(
    function: str, argument: str, bias: torch.Tensor, logits: torch.Tensor
) -> torch.Tensor:
    _check_floats(function, argument, bias)
    if bias.dim() != 1 or bias.shape[0] != logits.shape[1]:
        checks.refuse(
            ValueError, function, argument, f"have shape [{logits.shape[1]}]", bias, _REMEDY
        )
    _check_device(function, argument, bias, logits.device)
    return bias


def check_groups(
    function: str, num_experts: int, num_expert_group: object, topk_group: object, topk: object
) -> tuple[int, int, int]:
    """Of `grouped_topk`: the number of groups, how many of them stay, and K."""
    remedy = "Pass the sizes of the model's router."
    groups = checks.check_positive_int(function, "num_expert_group", num_expert_group, remedy)
    stay = checks.check_positive_int(function, "topk_group", topk_group, remedy)
    top_k = checks.check_positive_int(function, "topk", topk, remedy)
    if num_experts % groups:
        rule = f"divide the number of experts, {num_experts}"
        checks.fail(function, "num_expert_group", rule, groups, remedy)
    if stay > groups:
        checks.fail(function, "topk_group", f"be at most {groups}, the groups", stay, remedy)
    if top_k > (most := stay * (num_experts // groups)):
        what = "the experts" if groups == 1 else "the experts of the groups that stay"
        checks.fail(function, "topk", f"be at most {most}, {what}", top_k, remedy)
    return groups, stay, top_k


def check_scoring(function: str, scoring_func: object) -> str:
    """Of `grouped_topk`: what becomes of the scores, as the kernel names it."""
    if type(scoring_func) is not int or scoring_func not in _SCORINGS:
        rule, remedy = "be 0 (scores) or 1 (sigmoid)", "Pass the one of the model's router."
        checks.fail(function, "scoring_func", rule, checks.describe(scoring_func), remedy)
    return _SCORINGS[scoring_func]


def check_scale(function: str, renormalize: object, scaling_factor: object) -> None:
    """That they are a bool and a finite number."""
    _checks.check_bool(function, "renormalize", renormalize)
    remedy, got = "It is compiled into the kernel.", checks.describe(scaling_factor)
    argument = "routed_scaling_factor"
    if not isinstance(scaling_factor, (int, float)) or isinstance(scaling_factor, bool):
        checks.fail(function, argument, "be a Python number", got, remedy, TypeError)
    if not checks.is_finite_float32(scaling_factor):
        checks.fail(function, argument, "be finite in float32", got, remedy)


def _check_op(
    function: str,
    results: Mapping[str, torch.Tensor],
    gating_output: torch.Tensor,
    renormalize: object,
    scaling_factor: object,
    bias: torch.Tensor | None,
    is_padding: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """The operands of `_route.route`; all that can be checked without data."""
    _check_logits(function, "gating_output", gating_output)
    check_scale(function, renormalize, scaling_factor)
    num_tokens, num_experts = gating_output.shape
    device = gating_output.device
    for position, (argument, tensor) in enumerate(results.items()):
        dtypes = ((torch.float32,), _ID_DTYPES, (torch.int32,))[position]
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            rule = f"be a tensor of dtype {names}"
            checks.fail(function, argument, rule, checks.describe(tensor), _REMEDY, TypeError)
        if tensor.is_nested:  # it has no shape to ask for
            rule, got = "be a dense tensor", "a nested tensor"
            checks.fail(function, argument, rule, got, _REMEDY, TypeError)
        if tensor.dim() != 2 or tensor.shape[0] != num_tokens:
            checks.refuse(
                ValueError, function, argument, f"have shape [{num_tokens}, topk]", tensor, _REMEDY
            )
        _check_device(function, argument, tensor, device)
        _checks.check_no_gradient(function, argument, tensor)
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            what = f"{checks.describe(tensor)} of another layout"
            checks.fail(function, argument, "be contiguous", what, _REMEDY)
    weights, *others = results.values()
    top_k = weights.shape[1]
    for argument, tensor in zip(list(results)[1:], others, strict=True):
        if tensor.shape[1] != top_k:
            checks.refuse(
                ValueError,
                function,
                argument,
                f"have shape [{num_tokens}, {top_k}]",
                tensor,
                _REMEDY,
            )
    if not 1 <= top_k <= num_experts:
        rule = f"have 1 to {num_experts} columns, the number of experts"
        checks.refuse(ValueError, function, "topk_weights", rule, weights, _REMEDY)
    operands = {"logits": gating_output}
    if bias is not None:
        argument = "e_score_correction_bias"
        operands["correction_bias"] = _check_bias(function, argument, bias, gating_output)
    if is_padding is not None:
        if not isinstance(is_padding, torch.Tensor) or is_padding.dtype not in (
            torch.bool,
            torch.uint8,
        ):
            argument, rule = "is_padding", "be a bool or uint8 tensor"
            checks.fail(function, argument, rule, checks.describe(is_padding), _REMEDY, TypeError)
        if is_padding.dim() != 1 or is_padding.shape[0] != num_tokens:
            checks.refuse(
                ValueError,
                function,
                "is_padding",
                f"have shape [{num_tokens}]",
                is_padding,
                _REMEDY,
            )
        _check_device(function, "is_padding", is_padding, device)
        operands["is_padding"] = is_padding
    return operands


def _check_tokens(
    function: str,
    logits: torch.Tensor,
    input_tokens: torch.Tensor | None,
    table: torch.Tensor | None,
    bias_vl: torch.Tensor | None,
) -> torch.Tensor | None:
    """The tokens' ids, where something needs them."""
    if table is None and bias_vl is None:
        return None
    remedy = "Pass the id of each token in the vocabulary."
    if input_tokens is None:
        what = "hash_indices_table" if table is not None else "bias_vl"
        checks.fail(function, "input_tokens", f"come with {what}", "None", remedy)
    tokens = _checks.check_integer_tensor(
        function, "input_tokens", input_tokens, remedy, logits.device
    )
    if tokens.dim() != 1 or tokens.shape[0] != logits.shape[0]:
        checks.refuse(
            ValueError, function, "input_tokens", f"have shape [{logits.shape[0]}]", tokens, _REMEDY
        )
    return tokens.to(torch.int64)


def _check_table(
    function: str, table: torch.Tensor, top_k: int, device: torch.device
) -> torch.Tensor:
    remedy = "Pass the experts of each token of the vocabulary."
    name = "hash_indices_table"
    table = _checks.check_integer_tensor(function, name, table, remedy, device)
    if table.dim() != 2 or table.shape[1] != top_k or table.shape[0] < 1:
        checks.refuse(
            ValueError, function, name, f"have shape [vocabulary, {top_k}]", table, _REMEDY
        )
    return table if table.dtype in (torch.int32, torch.int64) else table.to(torch.int64)


def _check_apart(
    function: str, results: Mapping[str, torch.Tensor], operands: Mapping[str, torch.Tensor]
) -> None:
    """The checks that need data, where `_route.route` does not write the results itself."""
    if not _checks.sizes_are_known() or dlpack.is_fake(next(iter(results.values()))):
        return
    for name, tensor in {**operands, **results}.items():
        dlpack.check_tensor(function, name, tensor)
    inplace.check_plain(function, results)
    inplace.check_no_overlap(function, results, operands)
