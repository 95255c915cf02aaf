"""The JAX side of the expert layer. Imported with the first call that takes DLPack."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import torch

import moe_align_jax
from moe_align_jax._grouped_matmul import arguments
from moe_align_jax.types import AlignedBlocks
from torch_bridge import _plan, dlpack
from torch_bridge._direct.call import bound, narrow
from torch_bridge._dlpack_path.run import hand_over
from torch_bridge._moe.calls import ALIGNED, DTYPES, Call, Layer, Matmul
from torch_bridge._resolved import Plan

_MOST_EXPERTS = 2**31 - 1  # an id


def _options(call: Call) -> dict[str, Any]:
    """The static options of the JAX function."""
    weights = call.weights
    found: dict[str, Any] = {
        "activation": weights.activation,
        "gated": weights.gated,
        "interleaved": weights.interleaved,
        "swiglu_limit": weights.swiglu_limit,
        "swiglu_alpha": weights.swiglu_alpha,
        "transpose_rhs": weights.transposed,
        "preferred_element_type": DTYPES[call.out_dtype],
        "block_size": call.block_size or None,
    }
    if isinstance(call, Matmul):
        return found | {"top_k": call.top_k or None}
    limit = None if call.max_valid_tokens < 0 else call.max_valid_tokens
    return found | {
        "weights_on_input": call.weights_on_input,
        "num_valid_tokens": limit,
        "return_tokens_per_expert": call.counted,
    }


def select(
    call: Call, operands: Mapping[str, torch.Tensor], platform: str
) -> tuple[str, Mapping[str, str]]:
    """The implementation that runs on a platform, and why not each other one."""
    weights, x = call.weights, operands["x"]
    options: dict[str, Any] = {
        "dtype": DTYPES[x.dtype],
        "preferred_element_type": DTYPES[call.out_dtype],
        "activation": weights.activation,
        "gated": weights.gated,
        "interleaved": weights.interleaved,
        "transpose_rhs": weights.transposed,
        "platform": platform,
        "implementation": _plan.forced_implementation(),
    }
    if isinstance(call, Matmul):
        w = next(operands[name] for name in ("w", "gate") if name in operands)
        chosen = moe_align_jax.select_matmul_implementation(
            tuple(x.shape),
            tuple(w.shape),
            block_size=call.block_size,
            top_k=call.top_k or None,
            num_rows=call.shape[0],
            bias=weights.bias,
            row_weights="row_weights" in operands,
            **options,
        )
    else:
        chosen = moe_align_jax.select_moe_implementation(
            tuple(x.shape),
            tuple(operands["w_down"].shape),
            top_k=operands["topk_ids"].shape[1],
            pair=weights.pair,
            bias_gate_up=weights.bias,
            bias_down="bias_down" in operands,
            weights_on_input=call.weights_on_input,
            has_aligned="sorted_token_ids" in operands,
            num_global_experts=(
                operands["expert_map"].shape[0] if "expert_map" in operands else None
            ),
            block_size=call.block_size or None,
            **options,
        )
    return chosen.implementation, chosen.reasons


@functools.partial(jax.jit, static_argnames=("call", "implementation"))
def _run(arrays: dict[str, jax.Array], *, call: Call, implementation: str) -> list[jax.Array]:
    options: dict[str, Any] = _options(call)
    options["implementation"] = implementation
    w: Any = arrays["w"] if "w" in arrays else (arrays["gate"], arrays["up"])
    aligned = None
    if "sorted_token_ids" in arrays:
        parts = [arrays.get(name) for name in ALIGNED]
        count = jnp.reshape(parts[2], (1,))  # type: ignore[arg-type]
        # Without counts the last slot tells what is padding, as it does for a direct launch.
        counts = arrays.get("tokens_per_expert")
        row_of_pair = None if parts[3] is None else jnp.reshape(parts[3], (-1,))
        aligned = AlignedBlocks(parts[0], parts[1], count, counts, row_of_pair)  # type: ignore[arg-type]
    if isinstance(call, Matmul):
        more = {name: arrays.get(name) for name in ("bias", "row_weights")}
        assert aligned is not None
        return [moe_align_jax.grouped_matmul(arrays["x"], w, aligned, **more, **options)]
    if "num_valid_tokens" in arrays:
        options["num_valid_tokens"] = jnp.reshape(arrays["num_valid_tokens"], ())
    result = moe_align_jax.fused_moe(
        *(arrays["x"], w, arrays["w_down"], arrays["topk_weights"], arrays["topk_ids"]),
        bias_gate_up=arrays.get("bias"),
        bias_down=arrays.get("bias_down"),
        aligned=aligned,
        expert_map=arrays.get("expert_map"),
        **options,
    )
    return list(result) if call.counted else [result]  # type: ignore[arg-type, list-item]


def _narrowed(call: Call, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of 64 bits, which jax has not, in 32: what is out of range is dropped, as the contract says."""
    found = {}
    for name, tensor in inputs.items():
        if tensor.dtype == torch.float64:
            found[name] = tensor.to(torch.float32)
        elif tensor.dtype.itemsize == 8 or tensor.dtype == torch.uint32:
            if name == "num_valid_tokens":
                found[name] = bound(tensor).clamp(0, call.shape[0])
            else:
                found[name] = narrow(tensor, -1, _MOST_EXPERTS)
    return found


def _check_aligned(call: Call, inputs: Mapping[str, torch.Tensor]) -> None:
    """What jax's function checks of arrays whose values it sees; here it is traced."""
    where = [inputs[name].numpy() for name in ALIGNED[:3]]
    where[2] = where[2].reshape(1)
    weights = next(inputs[name] for name in ("w", "gate") if name in inputs)
    inverse = inputs.get("row_of_pair")
    pairs = (
        inputs["x"].shape[0] * call.top_k
        if isinstance(call, Matmul)
        else inputs["topk_ids"].numel()
    )
    arguments.check_order(call.function, where, pairs, call.block_size, weights.shape[0])
    if isinstance(call, Layer) and inverse is not None:
        arguments.check_inverse(call.function, where[0], inverse.numpy())


def run(
    call: Call, operands: Mapping[str, torch.Tensor], plan: Plan, out: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """The results, by one jax program."""
    device = operands["x"].device
    with dlpack.on_device(device):
        inputs = {
            name: dlpack.compact_copy(x.detach()) if name in plan.copies else x.detach()
            for name, x in operands.items()
        }
        inputs |= _narrowed(call, inputs)
        if device.type == "cpu" and "sorted_token_ids" in inputs:
            _check_aligned(call, inputs)
        program = functools.partial(_run, call=call, implementation=plan.implementation)
        views = dlpack.call_jax(program, inputs)
        handed = hand_over(views, copy="outputs" in plan.copies, out=None)
        if out is not None:
            handed[0] = out.copy_(handed[0])
    return tuple(handed)
