"""Code of a user, with mistakes that pyright must find. Read by `tools/check_user_types.py`; never run.

A line with a mistake ends in a comment that names pyright's rule. All other lines must pass.
"""

import jax.numpy as jnp
import torch

import moe_align_jax as maj
import torch_bridge
import torch_bridge.sglang
import torch_bridge.vllm

ids = jnp.zeros((3, 2), jnp.int32)
aligned = maj.moe_align_block_size(ids, block_size=4, num_experts=4)
rows: int = aligned.sorted_token_ids.shape[0]
sizes = maj.padded_group_sizes(aligned, block_size=4)

maj.moe_align_block_size(ids, blok_size=4, num_experts=4)  # error: reportCallIssue
maj.moe_align_block_size(ids, block_size="4", num_experts=4)  # error: reportArgumentType
maj.moe_align_block_sizes(ids, block_size=4, num_experts=4)  # error: reportAttributeAccessIssue
maj.rebalance_experts(num_replica=8)  # error: reportCallIssue
print(aligned.sorted_ids)  # error: reportAttributeAccessIssue
text: str = maj.max_num_tokens_padded(  # error: reportAssignmentType
    12, block_size=4, num_experts=4
)

tensor = torch.zeros(6, dtype=torch.int32)
sorted_ids, expert_ids, num_tokens = torch_bridge.moe_align_block_size(tensor, 4, 4, 2)
sorted_ids.numel()
torch_bridge.moe_align_block_size(tensor, 4, blok_size=4)  # error: reportCallIssue
torch_bridge.vllm.moe_align_block_sizes  # noqa: B018  # error: reportAttributeAccessIssue
