"""vLLM's expert layer on ours: `fused_experts`, and what stands in for `TritonExperts.apply`.

`torch_bridge.vllm` re-exports the former; `vllm_patch` puts the latter in place. What ours cannot do is done
by vLLM's own, with one warning that names the reason.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from moe_align_jax._core import checks
from torch_bridge import moe
from torch_bridge._moe import run

_DTYPES = (torch.bfloat16, torch.float16)
SILU = "silu"  # the name of vLLM's MoEActivation.SILU
# Options of ours, by the names of vLLM's activations.
_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "silu": {"activation": "silu"},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "swigluoai": {
        "activation": "silu",
        "interleaved": True,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
    },
    "silu_no_mul": {"activation": "silu", "gated": False},
    "gelu_no_mul": {"activation": "gelu", "gated": False},
    "gelu_tanh_no_mul": {"activation": "gelu_tanh", "gated": False},
    "relu2_no_mul": {"activation": "relu2", "gated": False},
}
_ALIASES = {"gelu_pytorch_tanh": "gelu_tanh"}
_warned: set[str] = set()


class _Refused(Exception):
    """Ours cannot do this; the message is the reason."""


def _options_of(activation: Any, limit: Any = None, alpha: Any = None, beta: Any = None) -> dict:
    """Our options of an activation of vLLM's: a member of its enum, or its name.

    Args:
        activation: see above.
        limit, alpha, beta: of vLLM's ApplyMoEActivationConfig.

    Raises:
        _Refused: ours has no such activation.
    """
    name = str(getattr(activation, "value", activation))
    name = _ALIASES.get(name, name)
    if name == "swigluoai_uninterleave" and limit is not None and beta == 1.0 and alpha:
        return {"activation": "silu", "swiglu_limit": float(limit), "swiglu_alpha": float(alpha)}
    options = _ACTIVATIONS.get(name)
    if options is None:
        raise _Refused(f"the kernels have no activation {name}")
    if name == "silu" and limit is not None:
        return options | {"swiglu_limit": float(limit)}
    return options


def _biases_of(quant_config: Any) -> dict[str, torch.Tensor | None]:
    """The biases that a FusedMoEQuantConfig holds.

    Raises:
        _Refused: something is quantised.
    """
    if quant_config is None:
        return {}
    for name in ("quant_dtype", "weight_quant_dtype"):
        if (dtype := getattr(quant_config, name, None)) is not None:
            raise _Refused(f"{name} is {dtype}: quantised experts are not launched directly")
    if getattr(quant_config, "w1_scale", None) is not None:
        raise _Refused("the weights have scales")
    return {
        "bias_gate_up": getattr(quant_config, "w1_bias", None),
        "bias_down": getattr(quant_config, "w2_bias", None),
    }


def _refuse_tensors(hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> None:
    if not all(isinstance(tensor, torch.Tensor) for tensor in (hidden_states, w1, w2)):
        return  # the layer's checks name it
    if hidden_states.dtype not in _DTYPES or not w1.dtype == w2.dtype == hidden_states.dtype:
        kinds = f"{hidden_states.dtype}, {w1.dtype} and {w2.dtype}"
        raise _Refused(f"the kernels multiply bfloat16 or float16; these are {kinds}")
    if not (w1.is_contiguous() and w2.is_contiguous()):
        raise _Refused("the weights are not contiguous, and would be copied at each call")
    if getattr(w1, "_vllm_is_uva_offloaded", False) or getattr(w2, "_vllm_is_uva_offloaded", False):
        raise _Refused("the weights are in the host's memory")


def _refuse_path(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Raises _Refused where the layer cannot be launched directly."""
    call, operands = moe.checked_layer(*arguments, **options)
    _, reason = run.programs_for(call, operands)
    if reason:
        raise _Refused(reason)


def _warn(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"torch_bridge: vLLM's own expert layer runs instead of ours: {reason}", stacklevel=4
        )


def fused_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Any = SILU,
    apply_router_weight_on_input: bool = False,
    global_num_experts: int = -1,
    expert_map: torch.Tensor | None = None,
    quant_config: Any = None,
) -> torch.Tensor:
    """vLLM's `fused_experts` on our kernels: the experts of each token, and their weighted sum.

    Args:
        hidden_states: `[T, H]` bfloat16 or float16.
        w1: `[E, 2 N, H]` of the same dtype, gate first; `[E, N, H]` for an activation without gate.
        w2: `[E, H, N]`.
        topk_weights, topk_ids: `[T, K]`, as for `torch_bridge.fused_moe`.
        activation: vLLM's MoEActivation, or its name.
        apply_router_weight_on_input: the weights multiply the tokens instead of the experts' results.
        global_num_experts: the length of expert_map, or -1.
        expert_map: `[global_num_experts]`, local ids, -1 for experts of other ranks.
        quant_config: vLLM's FusedMoEQuantConfig, of which the biases are used.

    Returns:
        `[T, H]` of the dtype of hidden_states.

    What ours cannot do (quantised experts, an activation of another kind, no Hopper GPU) is done by
    vLLM's own where it is installed, with one warning that names the reason; a layer that is not quantised
    is otherwise computed by jax.

    Raises:
        NotImplementedError: ours cannot do it, and vLLM is not installed.
        TypeError, ValueError: as `torch_bridge.fused_moe`.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
        >>> w1, w2 = torch.ones(2, 4, 2).bfloat16(), torch.ones(2, 2, 2).bfloat16()
        >>> weights, ids = torch.tensor([[1.0]]), torch.tensor([[1]])
        >>> fused_experts(x, w1, w2, weights, ids).shape
        torch.Size([1, 2])

    Source: contract of vLLM 0.33 `fused_moe/fused_moe.py` (Apache-2.0); no code taken.
    """
    arguments = (hidden_states, w1, w2, topk_weights, topk_ids)
    checks.check_bool("fused_experts", "apply_router_weight_on_input", apply_router_weight_on_input)
    try:
        options = _options_of(activation) | _biases_of(quant_config)
        if apply_router_weight_on_input and options.get("bias_gate_up") is not None:
            # vLLM's kernel adds the bias before it multiplies by the router's weight; ours weights the input.
            raise _Refused("the router's weights multiply w1_bias, too")
        options |= {
            "transpose_rhs": True,
            "weights_on_input": apply_router_weight_on_input,
            "expert_map": expert_map,
        }
        _refuse_tensors(hidden_states, w1, w2)
    except _Refused as reason:
        theirs = _vllms_own()
        if theirs is None:
            raise NotImplementedError(
                checks.message(
                    *("fused_experts", "the layer", "be of a kind that our kernels compute"),
                    *(f"another: {reason}", "Install vllm, whose own layer then runs."),
                )
            ) from None
        _warn(str(reason))
        return theirs(
            *(*arguments, activation, apply_router_weight_on_input, global_num_experts),
            *(expert_map, quant_config),
        )
    return moe.fused_moe(*arguments, **options)  # type: ignore[return-value]


def _vllms_own() -> Callable[..., torch.Tensor] | None:
    try:
        from vllm.model_executor.layers.fused_moe.fused_moe import (  # type: ignore[import-not-found]
            fused_experts as theirs,
        )
    except ImportError:
        return None
    return theirs


# -- TritonExperts.apply ----------------------------------------------------------------------------------

# Its parameters in vLLM 0.33.
APPLY_PARAMETERS = (
    *("self", "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation"),
    *("global_num_experts", "expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2"),
    *("expert_tokens_meta", "apply_router_weight_on_input"),
)


def apply_instead(original: Callable[..., None], kind: type) -> Callable[..., None]:
    """What stands in for `TritonExperts.apply`; `original` is that, `kind` the class."""
    # By the experts' object: itself, its configuration, and what that means to us.
    known: dict[tuple[int, Any], tuple[Any, Any, dict | str, tuple]] = {}
    runs: set[Any] = set()

    def static(self: Any, activation: Any) -> tuple[dict | str, tuple]:
        """Our options, or the reason why there are none; and what of them a launch depends on."""
        found = known.get((id(self), activation))
        if found is not None and found[0] is self and found[1] is self.quant_config:
            return found[2:]
        answer: dict | str
        try:
            if type(self) is not kind:
                raise _Refused(f"{type(self).__name__} does more than {kind.__name__}")
            config = getattr(self, "activation_config", None)
            given = [getattr(config, name, None) for name in ("clamp_limit", "alpha", "beta")]
            answer = _options_of(activation, *given) | _biases_of(self.quant_config)
            answer |= {"transpose_rhs": True}
            form = tuple([getattr(value, "shape", value) for value in answer.values()])
        except _Refused as reason:
            answer, form = str(reason), ()
        if len(known) > 4096:
            known.clear()
        known[id(self), activation] = (self, self.quant_config, answer, form)
        return answer, form

    def apply(
        self: Any,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        options, form = static(self, activation)
        try:
            if isinstance(options, str):
                raise _Refused(options)
            if self._lora_context is not None:
                raise _Refused("a LoRA adapter is in use")
            if a1q_scale is not None or a2_scale is not None:
                raise _Refused("the activations have scales")
            hooked = getattr(self, "_uses_post_gemm2_hook", None)
            if hooked is not None and hooked(hidden_states.shape[0]):
                raise _Refused("a hook behind the second product wants its rows")
            _refuse_tensors(hidden_states, w1, w2)
            # On the input: vLLM has multiplied hidden_states by them before it calls this.
            left = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
            arguments = (hidden_states, w1, w2, left, topk_ids)
            given = {"expert_map": expert_map}
            # Tried once for each of these: whether a launch is possible depends on no more.
            asked = (
                *(hidden_states.shape, w1.shape, w2.shape, topk_ids.shape, hidden_states.device),
                *(hidden_states.dtype, topk_ids.dtype, form),
                None if expert_map is None else expert_map.shape,
            )
            path = "auto" if asked in runs else "direct"
            if path == "direct":
                _refuse_path(arguments, options | given)
            try:
                moe.fused_moe(*arguments, **options, **given, out=output, path=path)  # type: ignore[arg-type]
            except NotImplementedError as error:
                _refuse_path(arguments, options | given)  # a program that could not be had
                raise _Refused(str(error)) from None
            if len(runs) > 4096:
                runs.clear()
            runs.add(asked)
        except _Refused as reason:
            _warn(str(reason))
            original(
                *(self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation),
                *(global_num_experts, expert_map, a1q_scale, a2_scale, workspace13, workspace2),
                *(expert_tokens_meta, apply_router_weight_on_input),
            )

    return apply


def forget_warnings() -> None:
    """Each reason is told again."""
    _warned.clear()
