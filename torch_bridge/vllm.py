"""vLLM's functions on our kernels: signatures, order, defaults, shapes and fill values of vllm
0.33.

    from torch_bridge.vllm import moe_align_block_size

Compiled ops of vLLM, which fill the caller's buffers, are `ops_moe_align_block_size`,
`ops_batched_moe_align_block_size`, `fused_globalize_align_block_size` and `moe_lora_align_block_size`; and of
its router `topk_softmax`, `topk_sigmoid`, `topk_hash_softplus_sqrt` and `grouped_topk`. `fused_experts` is
its expert layer. `patch` and `patch_for_good` make an installed vLLM call them.

vLLM itself is imported by these two, and by `fused_experts` for what ours cannot do. One quirk is not
copied: with a map and ignore_invalid_experts=False, vLLM's unused blocks read expert_map[-1]; ours read -1.
What vLLM refuses works here: 1-D ids, no pairs, any number of experts, every integer dtype.
"""

import dataclasses

import torch

from moe_align_jax._core import checks
from torch_bridge import _checks, _ops
from torch_bridge._direct import fast_path
from torch_bridge._vllm_aligned import (
    fused_globalize_align_block_size as fused_globalize_align_block_size,
)
from torch_bridge._vllm_aligned import moe_lora_align_block_size as moe_lora_align_block_size
from torch_bridge._vllm_experts import fused_experts as fused_experts
from torch_bridge._vllm_ops import check_batched
from torch_bridge._vllm_ops import (
    ops_batched_moe_align_block_size as ops_batched_moe_align_block_size,
)
from torch_bridge._vllm_ops import ops_moe_align_block_size as ops_moe_align_block_size
from torch_bridge._vllm_router import grouped_topk as grouped_topk
from torch_bridge._vllm_router import topk_hash_softplus_sqrt as topk_hash_softplus_sqrt
from torch_bridge._vllm_router import topk_sigmoid as topk_sigmoid
from torch_bridge._vllm_router import topk_softmax as topk_softmax
from torch_bridge._vllm_warmup import warmup_router as warmup_router
from torch_bridge.vllm_patch import patch as patch
from torch_bridge.vllm_patch import patch_for_good as patch_for_good


def moe_align_block_size(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    return_scatter_idx: bool = False,
) -> tuple[torch.Tensor, ...]:
    """vLLM's `moe_align_block_size`.

    Args:
        topk_ids: `[num_tokens, topk]` (or any shape), any integer dtype.
        block_size: rows per GEMM block.
        num_experts: number of global experts.
        expert_map: `[num_experts]` any integer dtype: global to local id, -1 if on another rank.
        pad_sorted_ids: round the capacity up to a multiple of block_size.
        ignore_invalid_experts: drop pairs of remote experts before counting; otherwise their blocks
            read -1.
        return_scatter_idx: return `scatter_idx` too.

    Returns:
        `(sorted_token_ids [P], expert_ids [cdiv(P, block_size)], num_tokens_post_pad [1])`, int32,
        as `torch_bridge.moe_align_block_size`; then, if asked for, `scatter_idx` `[n, 1]` int32: a
        pair's own index, -1 where the pair is dropped.

    Raises:
        ValueError: return_scatter_idx with a map and without ignore_invalid_experts; and what
            `torch_bridge.moe_align_block_size` raises.

    Example:
        >>> ids = torch.tensor([[2, 3], [1, 9]], dtype=torch.int32)
        >>> moe_align_block_size(ids, 2, 4, return_scatter_idx=True)[3].flatten().tolist()
        [0, 1, 2, -1]

    Source: vllm 0.33 `model_executor/layers/fused_moe/moe_align_block_size.py` (Apache-2.0), its
    signature and contract; no code taken.
    """
    scattered = return_scatter_idx is True and (
        expert_map is None or ignore_invalid_experts is True
    )
    if return_scatter_idx is False or scattered:
        form = fast_path.SCATTER if scattered else 0
        key = (num_experts, block_size, pad_sorted_ids, ignore_invalid_experts, None, form)
        results = fast_path.attempt(key, topk_ids, expert_map)
        if results is not None:
            return results
    function = "moe_align_block_size"
    _checks.check_bool(function, "return_scatter_idx", return_scatter_idx)
    spec, operands, limit = _checks.check_alignment(
        function,
        topk_ids,
        num_experts,
        block_size,
        None,
        expert_map,
        ignore_invalid_experts,
        pad_sorted_ids,
        None,
    )
    if return_scatter_idx and expert_map is not None and not ignore_invalid_experts:
        raise ValueError(
            checks.message(
                function,
                "return_scatter_idx",
                "come with ignore_invalid_experts=True when there is an expert_map",
                "ignore_invalid_experts=False",
                "Pass ignore_invalid_experts=True, or leave scatter_idx out.",
            )
        )
    spec = dataclasses.replace(spec, with_scatter_idx=return_scatter_idx)
    return tuple(_ops.aligned(spec, operands, limit, "auto"))


def batched_moe_align_block_size(
    max_tokens_per_batch: int, block_size: int, expert_num_tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """vLLM's `batched_moe_align_block_size`, for the `[num_experts, max_tokens_per_batch, H]`
    layout.

    Args:
        max_tokens_per_batch: rows per expert of the layout, >= 1.
        block_size: rows per GEMM block.
        expert_num_tokens: `[num_experts]` any integer dtype: rows in use per expert, clamped to
            `[0, max_tokens_per_batch]`.

    Returns:
        `(sorted_token_ids, expert_ids, num_tokens_post_pad [1])`, int32, with
        P = num_experts * round_up(max_tokens_per_batch, block_size) rows: row i of expert e is
        `e * max_tokens_per_batch + i`, the sentinel `num_experts * max_tokens_per_batch`; unused
        blocks read -1.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as `torch_bridge.moe_align_block_size`.

    Example:
        >>> counts = torch.tensor([1, 0, 3], dtype=torch.int32)
        >>> sorted_ids, expert_ids, count = batched_moe_align_block_size(4, 2, counts)
        >>> sorted_ids[:6].tolist(), expert_ids.tolist(), count.tolist()
        ([0, 12, 8, 9, 10, 12], [0, 2, 2, -1, -1, -1], [6])

    Source: as `moe_align_block_size`.
    """
    key = (max_tokens_per_batch, block_size, False, False, None, fast_path.BATCHED)
    results = fast_path.attempt(key, expert_num_tokens)
    if results is not None:
        return results
    function = "batched_moe_align_block_size"
    counts, max_tokens_per_batch, block_size = check_batched(
        function, expert_num_tokens, max_tokens_per_batch, block_size
    )
    op = _ops.chosen("batched_block_align", counts.device)
    return op(counts, max_tokens_per_batch, block_size)
