"""MoE models of transformers on moe_align_jax: the whole block in JAX, or their experts alone by ours.

Two ways, for Qwen3-MoE, Mixtral and DeepSeek-V3:

- `moe_block`: the block of a checkpoint, router, experts and shared expert, as a JAX function of the arrays
  that the file holds.
- `use_in`: a PyTorch model stays as it is, but for its experts, which run by `fused_moe` on the same memory.
  transformers keeps a registry of such functions, so that nothing is patched.

Run it: `python examples/transformers_experts.py`. It makes a small random model of each kind (nothing is
downloaded), and generates the same tokens with its own experts and with ours.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.mixtral import MixtralConfig, MixtralForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

import torch_bridge
from moe_align_jax import ExpertWeights, fused_moe, route_topk

NAME = "moe_align_jax"


def routing(config: Any) -> dict[str, Any]:
    """The options of `route_topk` for a model's configuration."""
    if config.model_type == "deepseek_v3":
        return {
            "top_k": config.num_experts_per_tok,
            "scoring": "sigmoid",
            "num_groups": config.n_group,
            "topk_groups": config.topk_group,
            "renormalize": config.norm_topk_prob,
            "scaling_factor": config.routed_scaling_factor,
        }
    # Mixtral always divides by the sum, and has no option for it.
    return {
        "top_k": config.num_experts_per_tok,
        "renormalize": getattr(config, "norm_topk_prob", True),
    }


def moe_block(config: Any, tensors: Mapping[str, Any], layer: int, x: jax.Array) -> jax.Array:
    """The Mixture-of-Experts block of one layer, without the norm before it.

    Args:
        config: the model's configuration.
        tensors: what the checkpoint's files hold, by name, NumPy's or jax's: such names as
            `model.layers.{layer}.mlp.experts.{j}.gate_proj.weight`, and for Mixtral
            `model.layers.{layer}.block_sparse_moe.experts.{j}.w1.weight`.
        layer: which.
        x: `[T, H]`.

    Returns:
        `[T, H]`.
    """
    part = "block_sparse_moe" if config.model_type == "mixtral" else "mlp"
    prefix = f"model.layers.{layer}.{part}."
    options = routing(config)
    if (bias := tensors.get(f"{prefix}gate.e_score_correction_bias")) is not None:
        options["correction_bias"] = jnp.asarray(bias)
    logits = x.astype(jnp.float32) @ jnp.asarray(tensors[f"{prefix}gate.weight"]).T
    topk_weights, topk_ids = route_topk(logits, **options)
    experts = ExpertWeights.from_hugging_face(tensors, f"{prefix}experts.")
    w_gate_up, w_down = experts
    y: Any = fused_moe(x, w_gate_up, w_down, topk_weights, topk_ids, **experts.options)
    shared = f"{prefix}shared_experts."
    if f"{shared}gate_proj.weight" in tensors:
        gate, up, down = (
            jnp.asarray(tensors[f"{shared}{name}_proj.weight"]).T for name in ("gate", "up", "down")
        )
        y = y + (jax.nn.silu(x @ gate) * (x @ up)) @ down
    return y


@functools.partial(jax.jit, static_argnames="transpose_rhs")
def _experts(x, gate_up, down, weights, ids, *, transpose_rhs):
    return fused_moe(x, gate_up, down, weights, ids, transpose_rhs=transpose_rhs)


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What transformers calls in place of an experts module's own `forward`.

    For modules with `gate_up_proj` `[E, 2 N, H]` and `down_proj` `[E, H, N]` and SiLU. Ids of `E` and beyond
    are those of masked pairs: they are left out. It is for inference: no gradient flows through it.
    """
    given = (hidden_states, top_k_weights, *self.parameters())
    if torch.is_grad_enabled() and any(each.requires_grad for each in given):
        raise NotImplementedError(
            f"{NAME} experts are for inference: call the model under torch.no_grad(), or train with "
            "another experts implementation"
        )
    if self.has_bias or not self.is_concatenated or self.config.hidden_act != "silu":
        raise NotImplementedError(
            f"{type(self).__name__} is not a SwiGLU of gate, then up, without biases"
        )
    # On a CPU a tensor at an address that XLA cannot use (not on 64 bytes) is copied.
    arrays = [
        torch_bridge.to_jax(tensor.detach().contiguous(), allow_copy=True)
        for tensor in (hidden_states, self.gate_up_proj, self.down_proj, top_k_weights)
    ]
    ids = torch_bridge.to_jax(top_k_index.to(torch.int32).contiguous(), allow_copy=True)
    y = _experts(*arrays, ids, transpose_rhs=not self.is_transposed)
    return torch_bridge.to_torch(y)


def use_in(model: PreTrainedModel) -> None:
    """Has all Mixture-of-Experts layers of a model run their experts by `experts_forward`."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    model.set_experts_implementation(NAME)


# -- small random models ----------------------------------------------------------------------------------

_COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_MODELS = {
    "Qwen3-MoE": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    "Mixtral": (
        MixtralConfig,
        MixtralForCausalLM,
        {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "DeepSeek-V3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "moe_intermediate_size": 24,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
        },
    ),
}


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A small model of a kind ("Qwen3-MoE", "Mixtral", "DeepSeek-V3") with random weights, float32."""
    config_class, model_class, sizes = _MODELS[name]
    torch.manual_seed(seed)
    model = model_class(config_class(**_COMMON, **sizes)).eval()
    for module in model.modules():
        bias = getattr(module, "e_score_correction_bias", None)
        if bias is not None:
            bias.data.normal_(std=0.1)
    return model


def generate(model: Any, *, num_tokens: int) -> torch.Tensor:
    """Greedy continuations of two fixed prompts, `[2, 5 + num_tokens]`."""
    prompts = torch.tensor([[1, 2, 3, 4, 5], [50, 40, 30, 20, 10]])
    with torch.no_grad():
        return model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=num_tokens,
            pad_token_id=0,
        )


def main() -> None:
    """Generates with each kind of model, with its own experts and with ours."""
    for name in _MODELS:
        model = tiny_model(name)
        theirs = generate(model, num_tokens=16)
        use_in(model)
        ours = generate(model, num_tokens=16)
        same = "the same tokens" if torch.equal(ours, theirs) else "OTHER TOKENS"
        print(f"{name}: {same} with our experts: {ours[0, 5:].tolist()}")


if __name__ == "__main__":
    main()
