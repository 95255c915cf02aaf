"""The layer's torch operators, with fakes, for torch's tracers and what else watches operators."""

from collections.abc import Sequence
from typing import Any

import torch

from moe_align_jax._grouped_matmul.problem import Weights
from torch_bridge import _checks, _ops, _plan, dlpack
from torch_bridge._direct import store
from torch_bridge._moe import checks, run
from torch_bridge._moe.calls import ALIGNED, Layer, Matmul, weights_of

_WEIGHTS = (
    "bool transposed, str activation, bool gated, bool interleaved, float swiglu_limit, "
    "float swiglu_alpha"
)
_MATMUL = (
    "(Tensor x, Tensor[] w, Tensor[] aligned, Tensor? bias, Tensor? row_weights, "
    f"{_WEIGHTS}, int block_size, int top_k, ScalarType out_dtype)"
)
_LAYER = (
    "(Tensor x, Tensor[] w_gate_up, Tensor w_down, Tensor topk_weights, Tensor topk_ids, "
    "Tensor? bias_gate_up, Tensor? bias_down, Tensor? expert_map, Tensor? num_valid_tokens, "
    f"Tensor[] aligned, {_WEIGHTS}, bool weights_on_input, SymInt max_valid_tokens, bool counted, "
    "int block_size, ScalarType out_dtype)"
)


def _with_out(schema: str) -> str:
    return schema.replace("(Tensor x", "(Tensor(a!) out, Tensor x") + " -> ()"


def _options_of(weights: Weights) -> tuple[Any, ...]:
    """As the schemas take them: "" and -1 for None."""
    limit, alpha = weights.swiglu_limit, weights.swiglu_alpha
    return (
        *(weights.transposed, weights.activation or "", weights.gated, weights.interleaved),
        *(-1.0 if limit is None else limit, -1.0 if alpha is None else alpha),
    )


def _weights_from(pair: bool, bias: bool, options: Sequence[Any]) -> Weights:
    transposed, activation, gated, interleaved, limit, alpha = options
    return Weights(
        *(transposed, pair, activation or None, gated, interleaved),
        *(None if limit < 0 else limit, None if alpha < 0 else alpha, bias),
    )


def _named(w: Sequence[torch.Tensor], others: dict[str, Any]) -> dict[str, torch.Tensor]:
    arrays = dict(zip(("gate", "up") if len(w) == 2 else ("w",), w, strict=True))
    return arrays | {name: x for name, x in others.items() if x is not None}


def _matmul_call(x, w, aligned, bias, row_weights, *options):
    *of_weights, block_size, top_k, out_dtype = options
    weights = _weights_from(len(w) == 2, bias is not None, of_weights)
    where = dict(zip(ALIGNED, aligned, strict=False))
    operands = {"x": x} | _named(w, {"bias": bias, "row_weights": row_weights}) | where
    width = w[0].shape[1 if weights.transposed else 2]
    columns = width // 2 if weights.gated and len(w) == 1 else width
    rows = aligned[0].shape[0]
    return Matmul(block_size, top_k, weights, out_dtype, (rows, columns)), operands


def _layer_call(
    *arguments: Any,
) -> tuple[Layer, dict[str, torch.Tensor]]:
    x, w, down, shares, ids, bias, bias_down, expert_map, limit, aligned, *options = arguments
    *of_weights, on_input, most, counted, block_size, out_dtype = options
    weights = _weights_from(len(w) == 2, bias is not None, of_weights)
    operands = {"x": x} | _named(w, {"w_down": down, "topk_weights": shares, "topk_ids": ids})
    more = {"bias": bias, "bias_down": bias_down, "expert_map": expert_map}
    operands |= {n: t for n, t in {**more, "num_valid_tokens": limit}.items() if t is not None}
    operands |= dict(zip((*ALIGNED, "tokens_per_expert"), aligned, strict=False))
    ffn = down.shape[2 if weights.transposed else 1]
    shape = tuple(x.shape)
    sizes = (on_input, most, counted, block_size, out_dtype, shape)
    return Layer(ffn, down.shape[0], weights, *sizes), operands  # type: ignore[arg-type]


def _matmul(path, *arguments):
    call, operands = _matmul_call(*arguments)
    return run.run(call, operands, path)[0]


def _matmul_out(path, out, *arguments):
    call, operands = _matmul_call(*arguments)
    checks.check_no_overlap(call.function, out, operands)
    run.run(call, operands, path, out)


def _layer(path, *arguments):
    call, operands = _layer_call(*arguments)
    results = run.run(call, operands, path)
    # An operator's result may not be a part of an input.
    return [
        results[0],
        *[x.clone() if call.counted and "row_of_pair" in operands else x for x in results[1:]],
    ]


def _layer_out(path, out, *arguments):
    call, operands = _layer_call(*arguments)
    checks.check_no_overlap(call.function, out, operands)
    run.run(call, operands, path, out)


def _matmul_fake(*arguments):
    call, operands = _matmul_call(*arguments)
    return operands["x"].new_empty(call.shape, dtype=call.out_dtype)


def _layer_fake(*arguments):
    call, operands = _layer_call(*arguments)
    x = operands["x"]
    results = [x.new_empty(call.shape, dtype=call.out_dtype)]
    if call.counted:
        # An alignment made before counts as many experts as it was made for.
        counts = operands.get("tokens_per_expert")
        size = call.num_experts if counts is None else counts.shape[0]
        results.append(x.new_empty((size,), dtype=torch.int32))
    return results


for _name, _schema, _body, _fake in (
    ("grouped_matmul", f"{_MATMUL} -> Tensor", _matmul, _matmul_fake),
    ("grouped_matmul_into", _with_out(_MATMUL), _matmul_out, _ops.returns_nothing),
    ("fused_moe", f"{_LAYER} -> Tensor[]", _layer, _layer_fake),
    ("fused_moe_into", _with_out(_LAYER), _layer_out, _ops.returns_nothing),
):
    _ops.register(_name, _schema, _ops.both(_body), _fake)


def _arguments(call: Matmul | Layer, operands: dict[str, torch.Tensor]) -> tuple[Any, ...]:
    """A call as its operator takes it."""
    given, get = [operands[name] for name in weights_of(operands)], operands.get
    if isinstance(call, Matmul):
        where = [operands[name] for name in ALIGNED[:3]]
        return (
            *(operands["x"], given, where, get("bias"), get("row_weights")),
            *(*_options_of(call.weights), call.block_size, call.top_k, call.out_dtype),
        )
    names = (*ALIGNED, *(("tokens_per_expert",) if call.counted else ()))
    where = [operands[name] for name in names] if ALIGNED[0] in operands else []
    return (
        *(operands["x"], given, operands["w_down"]),
        *(operands["topk_weights"], operands["topk_ids"]),
        *map(get, ("bias", "bias_down", "expert_map", "num_valid_tokens")),
        *(where, *_options_of(call.weights)),
        *(call.weights_on_input, call.max_valid_tokens, call.counted),
        *(call.block_size, call.out_dtype),
    )


def results_of(
    call: Matmul | Layer,
    operands: dict[str, torch.Tensor],
    out: torch.Tensor | None,
    path: str,
    key: run.Key | None = None,
) -> Sequence[torch.Tensor]:
    """Does a call that was checked: at once, or by its operator.

    Raises:
        NotImplementedError: `path` is "direct" and that cannot run here.
    """
    x = operands["x"]
    given = () if out is None else (out,)
    if _ops.launches_at_once(operands, given):
        if out is not None:
            checks.check_no_overlap(call.function, out, operands)
        return run.run(call, operands, path, out, key)
    if path == "direct" and not store.launches_on(x.device.type, x.device.index):
        reason = store.unavailable(x.device) or "it cannot"
        raise NotImplementedError(_plan.direct_refused(call.function, reason))
    arguments = _arguments(call, operands)
    counted = isinstance(call, Layer) and call.counted
    if out is not None and counted:  # an operator that writes out returns nothing
        if _checks.sizes_are_known() and not any(map(dlpack.is_fake, (out, *operands.values()))):
            checks.check_no_overlap(call.function, out, operands)
        y, counts = _ops.chosen(call.function, x.device, path)(*arguments)
        return out.copy_(y), counts
    if out is not None:
        _ops.chosen(f"{call.function}_into", x.device, path)(out, *arguments)
        return (out,)
    results = _ops.chosen(call.function, x.device, path)(*arguments)
    return (results,) if isinstance(results, torch.Tensor) else results
