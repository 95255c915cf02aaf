"""Checks of the layer's arguments on torch tensors: types, dtypes, shapes and devices, so that they trace."""

from typing import Any

import numpy as np
import torch

from moe_align_jax._core import checks
from moe_align_jax._grouped_matmul.options import check_flag, make_weights
from torch_bridge import _checks, _ops
from torch_bridge._moe.calls import ALIGNED, DTYPES, Layer, Matmul

_FLOATS = (*DTYPES, torch.float64)


def _tensor(function: str, argument: str, value: Any, like: torch.Tensor | None) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        remedy, what = "Call moe_align_jax for arrays of jax.", _checks.describe(value)
        checks.refuse(TypeError, function, argument, "be a torch.Tensor", what, remedy)
    if what := _checks.not_dense(value):
        remedy = "Call to_dense() or dequantize() first."
        checks.refuse(TypeError, function, argument, "be a dense tensor", what, remedy)
    if like is not None and value.device != like.device:
        rule = f"be on the device of x, {like.device}"
        checks.refuse(ValueError, function, argument, rule, str(value.device), "Move it there.")
    _checks.check_no_gradient(function, argument, value)
    return value


def _rows(function: str, argument: str, value: Any) -> torch.Tensor:
    x = _tensor(function, argument, value, None)
    if x.dtype not in DTYPES:
        rule = "be bfloat16, float16 or float32"
        checks.refuse(TypeError, function, argument, rule, x, "Cast it, and the weights.")
    if x.dim() != 2:
        rule, remedy = "have shape [rows, K]", "Flatten the axes in front of the rows."
        checks.refuse(ValueError, function, argument, rule, x, remedy)
    return x


def _out_dtype(function: str, x: torch.Tensor, given: Any) -> torch.dtype:
    if given is None:
        return x.dtype
    if not isinstance(given, torch.dtype) or given not in DTYPES:
        rule, remedy = "be None, torch.bfloat16, torch.float16 or torch.float32", "Leave it out."
        checks.refuse(TypeError, function, "preferred_element_type", rule, given, remedy)
    return given


def _array_of_weights(
    function: str, argument: str, given: Any, x: torch.Tensor, *, is_gated: bool
) -> dict[str, torch.Tensor]:
    """By name: `w`, or `gate` and `up`."""
    if not isinstance(given, (tuple, list)):
        return {"w": _tensor(function, argument, given, x)}
    if len(given) != 2 or not is_gated:
        rule = "be a tensor or a pair (gate, up)" if is_gated else "be one tensor"
        got = f"{type(given).__name__} of {len(given)}"
        remedy = "Pass gate and up." if is_gated else "A pair needs a gated activation."
        checks.refuse(ValueError, function, argument, rule, got, remedy)
    names = ("gate", "up")
    return {
        name: _tensor(function, f"{argument}[{i}]", each, x)
        for i, (name, each) in enumerate(zip(names, given, strict=True))
    }


def _check_arrays(
    function: str, argument: str, arrays: dict[str, torch.Tensor], x: torch.Tensor, weights: Any
) -> tuple[int, int]:
    """(E, columns of each): they fit each other and x."""
    axis = 2 if weights.transposed else 1
    columns = "2 N" if weights.gated and "w" in arrays else "N"
    shape = f"[E, {columns}, K]" if weights.transposed else f"[E, K, {columns}]"
    first = next(iter(arrays.values()))
    for i, each in enumerate(arrays.values()):
        name = argument if "w" in arrays else f"{argument}[{i}]"
        if each.dtype != x.dtype:
            rule = f"have the dtype of x, {x.dtype}"
            checks.refuse(TypeError, function, name, rule, each, "Cast one.")
        if each.dim() != 3 or each.shape[axis] != x.shape[1]:
            rule = f"have shape {shape} with K = {x.shape[1]}"
            remedy = f"Pass transpose_rhs={not weights.transposed} where the other axis is K."
            checks.refuse(ValueError, function, name, rule, each, remedy)
        if each.shape != first.shape:
            rule = f"have the shape of gate, {list(first.shape)}"
            checks.refuse(ValueError, function, name, rule, each, "Pass gate and up.")
    experts, width = first.shape[0], first.shape[3 - axis]
    if not experts:
        checks.refuse(
            ValueError, function, argument, "hold at least one expert", first, "Pass the experts."
        )
    if weights.gated and "w" in arrays:
        if width % 2:
            checks.refuse(
                ValueError, function, argument, f"have shape {shape}", first, "Gate and up."
            )
        width //= 2
    return experts, width


def _bias(
    function: str, argument: str, value: Any, x: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    value = _tensor(function, argument, value, x)
    if value.dtype not in _FLOATS:
        checks.refuse(
            TypeError, function, argument, "be a float tensor", value, "It is used as float32."
        )
    if tuple(value.shape) != shape:
        remedy = "One value for each column of the weights."
        if argument == "row_weights":
            remedy = "One for each row of aligned."
        checks.refuse(ValueError, function, argument, f"have shape {list(shape)}", value, remedy)
    return value


def _aligned(
    function: str, aligned: Any, x: torch.Tensor, block_size: int
) -> dict[str, torch.Tensor]:
    """The tensors of an `AlignedBlocks`, or of the first three of one."""
    parts = [getattr(aligned, name, None) for name in ALIGNED]
    if isinstance(aligned, (tuple, list)) and not hasattr(aligned, "sorted_token_ids"):
        parts = [*aligned[:3], None]
    if len(parts) < 4 or any(part is None for part in parts[:3]):
        remedy = "Pass the result of torch_bridge.align_blocks."
        checks.refuse(TypeError, function, "aligned", "be an AlignedBlocks", aligned, remedy)
    found = {}
    for name, part in zip(ALIGNED, parts, strict=True):
        if part is None:
            continue
        tensor = _tensor(function, f"aligned.{name}", part, x)
        if tensor.dtype != torch.int32:
            remedy = "Pass the result of torch_bridge.align_blocks."
            checks.refuse(TypeError, function, f"aligned.{name}", "be int32", tensor, remedy)
        found[name] = tensor
    rows, blocks = found["sorted_token_ids"], found["expert_ids"]
    if rows.dim() != 1 or blocks.dim() != 1 or blocks.shape[0] != -(-rows.shape[0] // block_size):
        rule = f"have one expert for each {block_size} of its {rows.numel()} rows"
        remedy = "Pass the block_size that aligned was made with."
        checks.refuse(ValueError, function, "aligned.expert_ids", rule, blocks, remedy)
    if found["num_tokens_post_padded"].numel() != 1:
        got = found["num_tokens_post_padded"]
        remedy = "Pass the result of torch_bridge.align_blocks."
        checks.refuse(
            ValueError, function, "aligned.num_tokens_post_padded", "have shape [1]", got, remedy
        )
    return found


def _check_pairs(
    function: str, x: torch.Tensor, top_k: int, rows: int, inverse: torch.Tensor | None
) -> None:
    """That x's tokens, each with top_k pairs, are those that were aligned."""
    pairs = x.shape[0] * top_k
    if inverse is None:
        is_off, rule = pairs > rows, f"give at most {rows} pairs, P of aligned,"
    else:
        is_off, rule = pairs != inverse.numel(), f"give {inverse.numel()} pairs, as aligned has,"
    if is_off:
        remedy = "Pass x [T, K] and top_k of the topk_ids [T, top_k] that were aligned."
        checks.refuse(ValueError, function, "x", f"{rule} with top_k", f"{pairs}", remedy)


def check_out(function: str, out: Any, call: Matmul | Layer, x: torch.Tensor) -> torch.Tensor:
    """`out`, which the result can be written to. (Overlap is checked where there is memory.)"""
    out = _tensor(function, "out", out, x)
    remedy = "Pass one from torch.empty."
    if out.dtype != call.out_dtype:
        checks.refuse(TypeError, function, "out", f"be {call.out_dtype}", out, remedy)
    if tuple(out.shape) != call.shape or not out.is_contiguous():
        rule = f"be contiguous, of shape {list(call.shape)}"
        got = f"{checks.describe(out)} with strides {list(out.stride())}"
        checks.refuse(ValueError, function, "out", rule, got, remedy)
    return out


def check_no_overlap(function: str, out: torch.Tensor, operands: dict[str, torch.Tensor]) -> None:
    """Raises ValueError where `out` shares a byte with an input."""
    for name, tensor in operands.items():
        if _ops.overlaps(out, tensor):
            remedy = "Pass a tensor of its own memory, for example from torch.empty."
            what = "tensors that share memory"
            checks.refuse(ValueError, function, "out", f"not overlap {name}", what, remedy)


def check_matmul(
    x: Any,
    w: Any,
    aligned: Any,
    *,
    block_size: Any,
    top_k: Any,
    bias: Any,
    row_weights: Any,
    preferred_element_type: Any,
    transpose_rhs: Any,
    **options: Any,
) -> tuple[Matmul, dict[str, torch.Tensor]]:
    """A `grouped_matmul`, and its tensors by name."""
    function = Matmul.function
    x = _rows(function, "x", x)
    pair = isinstance(w, (tuple, list))
    weights = make_weights(
        function, transposed=transpose_rhs, pair=pair, bias=bias is not None, **options
    )
    arrays = _array_of_weights(function, "w", w, x, is_gated=weights.gated)
    experts, columns = _check_arrays(function, "w", arrays, x, weights)
    block_size = checks.check_block_size(function, block_size)
    where = _aligned(function, aligned, x, block_size)
    inverse = where.pop("row_of_pair", None)
    rows = where["sorted_token_ids"].shape[0]
    if top_k is not None:
        remedy = "Pass the experts per token."
        top_k = checks.check_positive_int(function, "top_k", top_k, remedy)
        _check_pairs(function, x, top_k, rows, inverse)
    elif x.shape[0] != rows:
        rule = f"have a row for each of aligned, [{rows}, K]"
        checks.refuse(ValueError, function, "x", rule, x, "Pass top_k where x has a row per token.")
    operands = {"x": x, **arrays}
    if bias is not None:
        shape = (experts, columns * (2 if weights.gated else 1))
        operands["bias"] = _bias(function, "bias", bias, x, shape)
    if row_weights is not None:
        operands["row_weights"] = _bias(function, "row_weights", row_weights, x, (rows,))
    out_dtype = _out_dtype(function, x, preferred_element_type)
    call = Matmul(block_size, top_k or 0, weights, out_dtype, (rows, columns))
    return call, operands | where


def check_layer(
    x: Any,
    w_gate_up: Any,
    w_down: Any,
    topk_weights: Any,
    topk_ids: Any,
    *,
    bias_gate_up: Any,
    bias_down: Any,
    weights_on_input: Any,
    aligned: Any,
    expert_map: Any,
    num_valid_tokens: Any,
    return_tokens_per_expert: Any,
    preferred_element_type: Any,
    block_size: Any,
    transpose_rhs: Any,
    function: str = Layer.function,
    **options: Any,
) -> tuple[Layer, dict[str, torch.Tensor]]:
    """A `fused_moe`, and its tensors by name; `function`: whom the errors name."""
    x = _rows(function, "x", x)
    pair = isinstance(w_gate_up, (tuple, list))
    weights = make_weights(
        function, transposed=transpose_rhs, pair=pair, bias=bias_gate_up is not None, **options
    )
    arrays = _array_of_weights(function, "w_gate_up", w_gate_up, x, is_gated=weights.gated)
    experts, ffn = _check_arrays(function, "w_gate_up", arrays, x, weights)
    w_down = _tensor(function, "w_down", w_down, x)
    tokens, hidden = x.shape
    want = (experts, hidden, ffn) if weights.transposed else (experts, ffn, hidden)
    if w_down.dtype != x.dtype:
        rule = f"have the dtype of x, {x.dtype}"
        checks.refuse(TypeError, function, "w_down", rule, w_down, "Cast one.")
    if tuple(w_down.shape) != want:
        shape = "[E, H, N]" if weights.transposed else "[E, N, H]"
        rule = f"have shape {shape} = {list(want)}, as w_gate_up has"
        checks.refuse(ValueError, function, "w_down", rule, w_down, "Both follow transpose_rhs.")
    ids = _checks.check_integer_tensor(function, "topk_ids", topk_ids, _checks.IDS_REMEDY, x.device)
    if ids.dim() != 2 or ids.shape[0] != tokens:
        rule = f"have shape [T, K] with T = {tokens}, as x has"
        checks.refuse(ValueError, function, "topk_ids", rule, ids, "Pass one row of ids per token.")
    topk_weights = _tensor(function, "topk_weights", topk_weights, x)
    if topk_weights.dtype not in _FLOATS:
        remedy = "Pass the weights that the router gave."
        checks.refuse(
            TypeError, function, "topk_weights", "be a float tensor", topk_weights, remedy
        )
    if topk_weights.shape != ids.shape:
        rule = f"have the shape of topk_ids, {list(ids.shape)}"
        checks.refuse(
            ValueError, function, "topk_weights", rule, topk_weights, "One weight for each id."
        )
    operands = {"x": x, **arrays, "w_down": w_down, "topk_weights": topk_weights, "topk_ids": ids}
    if bias_gate_up is not None:
        shape = (experts, ffn * (2 if weights.gated else 1))
        operands["bias"] = _bias(function, "bias_gate_up", bias_gate_up, x, shape)
    if bias_down is not None:
        operands["bias_down"] = _bias(function, "bias_down", bias_down, x, (experts, hidden))
    counted = check_flag(function, "return_tokens_per_expert", return_tokens_per_expert)
    if block_size is not None:
        block_size = checks.check_block_size(function, block_size)
    limit = -1
    if aligned is not None:
        if block_size is None:
            remedy = "Pass the one that aligned was made with."
            checks.refuse(
                ValueError, function, "block_size", "be given with aligned", "None", remedy
            )
        for name, value in (("expert_map", expert_map), ("num_valid_tokens", num_valid_tokens)):
            if value is not None:
                remedy = "It is an argument of the alignment: pass it where aligned is made."
                checks.refuse(ValueError, function, name, "be left out with aligned", value, remedy)
        operands |= _layer_alignment(function, aligned, x, ids, block_size, counted)
    if expert_map is not None:
        remedy = "Pass one local id (or -1) per expert of all devices."
        expert_map = _checks.check_integer_tensor(
            function, "expert_map", expert_map, remedy, x.device
        )
        if expert_map.dim() != 1 or expert_map.shape[0] < experts:
            rule = f"have shape [G] with G at least {experts}, the experts of the weights"
            checks.refuse(ValueError, function, "expert_map", rule, expert_map, remedy)
        operands["expert_map"] = expert_map
    if num_valid_tokens is not None:
        limit = _valid_tokens(function, num_valid_tokens, x, operands)
    call = Layer(
        *(ffn, experts, weights),
        check_flag(function, "weights_on_input", weights_on_input),
        *(limit, counted, block_size or 0),
        _out_dtype(function, x, preferred_element_type),
        (tokens, hidden),
    )
    return call, operands


def _valid_tokens(
    function: str, value: Any, x: torch.Tensor, operands: dict[str, torch.Tensor]
) -> int:
    """As an int; -1 for a tensor, which joins the operands."""
    remedy = "Pass the number of tokens in use, as an int or a scalar integer tensor."
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return min(max(int(value), 0), checks.INT32_MAX)
    argument = "num_valid_tokens"
    if not isinstance(value, torch.Tensor):
        checks.refuse(TypeError, function, argument, "be an integer", value, remedy)
    tensor = _checks.check_integer_tensor(function, argument, value, remedy, x.device)
    if tensor.numel() != 1:
        checks.refuse(ValueError, function, argument, "be a scalar", tensor, remedy)
    operands[argument] = tensor
    return -1


def _layer_alignment(
    function: str, aligned: Any, x: torch.Tensor, ids: torch.Tensor, block_size: int, counted: bool
) -> dict[str, torch.Tensor]:
    found = _aligned(function, aligned, x, block_size)
    remedy = "Align with return_inverse=True."
    if "row_of_pair" not in found:
        checks.refuse(ValueError, function, "aligned.row_of_pair", "be there", "None", remedy)
    if found["row_of_pair"].numel() != ids.numel():
        rule = f"be of {ids.numel()} pairs, as topk_ids has"
        got, remedy = found["row_of_pair"], "Pass the topk_ids that were aligned."
        checks.refuse(ValueError, function, "aligned.row_of_pair", rule, got, remedy)
    if counted:
        counts = getattr(aligned, "tokens_per_expert", None)
        counts = _tensor(function, "aligned.tokens_per_expert", counts, x)
        if counts.dtype != torch.int32 or counts.dim() != 1:
            remedy = "Pass the result of torch_bridge.align_blocks."
            rule, argument = "be int32 of one dimension", "aligned.tokens_per_expert"
            checks.refuse(TypeError, function, argument, rule, counts, remedy)
        found["tokens_per_expert"] = counts
    return found
