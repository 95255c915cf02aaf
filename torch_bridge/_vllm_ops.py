"""vLLM's compiled ops on our kernels: they write into the caller's buffers.

Public as names of `torch_bridge.vllm`. They stand here because `torch_bridge/vllm_patch.py` puts them into an
installed vLLM and `torch_bridge/vllm.py` imports that patch.
"""

import torch

from moe_align_jax._core import checks
from torch_bridge import _checks, _ops
from torch_bridge._direct import fast_path, inplace
from torch_bridge._specs import BatchedSpec


def check_batched(
    function: str, expert_num_tokens: object, max_tokens_per_batch: object, block_size: object
) -> tuple[torch.Tensor, int, int]:
    remedy = "Pass the row count of each expert."
    counts = _checks.check_integer_tensor(function, "expert_num_tokens", expert_num_tokens, remedy)
    rows = checks.check_positive_int(
        function, "max_tokens_per_batch", max_tokens_per_batch, "Pass the rows per expert."
    )
    block_size = checks.check_block_size(function, block_size)
    if counts.dim() != 1 or counts.shape[0] < 1:
        what, rule = checks.describe(counts), "have shape [num_experts] with at least one expert"
        raise ValueError(checks.message(function, "expert_num_tokens", rule, what, remedy))
    if _checks.sizes_are_known():
        spec = BatchedSpec(counts.shape[0], rows, block_size)
        spec.check_capacity(function, "max_tokens_per_batch")
    return counts, rows, block_size


def ops_moe_align_block_size(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    scatter_idx: torch.Tensor | None = None,
) -> None:
    """vLLM's compiled op `_moe_C.moe_align_block_size`: writes into the caller's buffers.

    The capacity is the buffers': larger ones are filled to their end. Every slot is written.

    Args:
        topk_ids: `[num_tokens, topk]` (or any shape), any integer dtype, n pairs.
        num_experts: number of global experts.
        block_size: rows per GEMM block.
        sorted_token_ids: at least P = `max_num_tokens_padded(n, ...)` elements; n past the result.
        experts_ids: at least P // block_size elements; -1 past the last used block.
        num_tokens_post_pad: one element.
        expert_map: `[num_experts]` any integer dtype. Given, it filters: pairs of experts that it
            maps to -1 are dropped before counting, and blocks carry local ids. (vLLM's Python
            function passes it with ignore_invalid_experts=True only, and otherwise maps the
            finished ids itself.)
        scatter_idx: n elements: a pair's own index, -1 where the pair is dropped.

    The buffers are contiguous int32 on the device of `topk_ids`, and overlap neither each other nor an
    input. Nothing is written when an error is raised.

    Returns:
        None.

    Raises:
        TypeError: a buffer is no int32 tensor.
        ValueError: a buffer is too small, on another device, not contiguous, or overlaps.
        NotImplementedError, RuntimeError: as `torch_bridge.moe_align_block_size`.

    Example:
        >>> ids = torch.tensor([[2, 3], [1, 2]], dtype=torch.int32)
        >>> sorted_ids, expert_ids, count = (torch.empty(n, dtype=torch.int32) for n in (10, 5, 1))
        >>> ops_moe_align_block_size(ids, 4, 2, sorted_ids, expert_ids, count)
        >>> sorted_ids.tolist(), expert_ids.tolist(), count.tolist()
        ([2, 4, 0, 3, 1, 4, 4, 4, 4, 4], [1, 2, 3, -1, -1], [6])

    Source: vllm 0.33 `_custom_ops.py` and its op's schema (Apache-2.0), signature and contract; no
    code taken.
    """
    buffers = (sorted_token_ids, experts_ids, num_tokens_post_pad)
    out, form = buffers, fast_path.IN_PLACE
    if scatter_idx is not None:
        out, form = (*buffers, scatter_idx), fast_path.IN_PLACE | fast_path.SCATTER
    key = (num_experts, block_size, False, expert_map is not None, None, form)
    if fast_path.attempt(key, topk_ids, expert_map, None, out) is not None:
        return
    function = "ops_moe_align_block_size"
    spec, operands, _ = _checks.check_alignment(
        function, topk_ids, num_experts, block_size, None, expert_map, False, False, None
    )
    device = topk_ids.device
    inplace.check_buffer(function, "sorted_token_ids", sorted_token_ids, device)
    inplace.check_buffer(function, "experts_ids", experts_ids, device)
    inplace.check_buffer(function, "num_tokens_post_pad", num_tokens_post_pad, device)
    if scatter_idx is not None:
        inplace.check_buffer(function, "scatter_idx", scatter_idx, device)
    _ops.chosen("block_align_into", device)(
        topk_ids,
        operands.get("expert_map"),
        spec.num_experts,
        spec.block_size,
        *buffers,
        scatter_idx,
    )


def ops_batched_moe_align_block_size(
    max_tokens_per_batch: int,
    block_size: int,
    expert_num_tokens: torch.Tensor,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
) -> None:
    """vLLM's compiled op `_moe_C.batched_moe_align_block_size`: writes into the caller's buffers.

    Args:
        max_tokens_per_batch, block_size, expert_num_tokens: as for `batched_moe_align_block_size`.
        sorted_token_ids: at least P = num_experts * round_up(max_tokens_per_batch, block_size)
            elements; num_experts * max_tokens_per_batch past the result.
        experts_ids: at least P // block_size elements; -1 past the last used block.
        num_tokens_post_pad: one element. For all three: as for `ops_moe_align_block_size`.

    Returns:
        None.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as `ops_moe_align_block_size`.

    Example:
        >>> counts = torch.tensor([1, 0, 3], dtype=torch.int32)
        >>> sorted_ids, expert_ids, count = (torch.empty(n, dtype=torch.int32) for n in (12, 6, 1))
        >>> ops_batched_moe_align_block_size(4, 2, counts, sorted_ids, expert_ids, count)
        >>> sorted_ids[:6].tolist(), expert_ids.tolist(), count.tolist()
        ([0, 12, 8, 9, 10, 12], [0, 2, 2, -1, -1, -1], [6])

    Source: as `ops_moe_align_block_size`.
    """
    buffers = (sorted_token_ids, experts_ids, num_tokens_post_pad)
    form = fast_path.BATCHED | fast_path.IN_PLACE
    key = (max_tokens_per_batch, block_size, False, False, None, form)
    if fast_path.attempt(key, expert_num_tokens, None, None, buffers) is not None:
        return
    function = "ops_batched_moe_align_block_size"
    counts, max_tokens_per_batch, block_size = check_batched(
        function, expert_num_tokens, max_tokens_per_batch, block_size
    )
    inplace.check_buffer(function, "sorted_token_ids", sorted_token_ids, counts.device)
    inplace.check_buffer(function, "experts_ids", experts_ids, counts.device)
    inplace.check_buffer(function, "num_tokens_post_pad", num_tokens_post_pad, counts.device)
    op = _ops.chosen("batched_block_align_into", counts.device)
    op(counts, max_tokens_per_batch, block_size, *buffers)
