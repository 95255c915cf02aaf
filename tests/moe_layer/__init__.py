"""The MoE layer: fused_moe, converters of checkpoints."""
