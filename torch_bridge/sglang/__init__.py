"""SGLang's function on our kernels: signature, order, defaults, shapes of sglang 0.5.23.

    from torch_bridge.sglang import moe_align_block_size

`ops_moe_align_block_size` is its compiled op, which fills the caller's buffers:

    from torch_bridge.sglang import ops_moe_align_block_size as moe_align_block_size

in place of `from sglang.kernels.ops.moe import moe_align_block_size` (sgl_kernel's, in older ones).

`silu_and_mul_masked_post_quant_fwd` is its activation and quantisation of the masked layout
(`torch_bridge/sglang/masked_quant.py`).

`ExpertDistributionRecorder` is its recorder of expert load (`torch_bridge/sglang/recorder.py`).

SGLang itself is not imported. Combinations that SGLang refuses (off CUDA, above 8191 experts) work
here, and every slot is written: tails of `sorted_token_ids` read n and of `expert_ids` -1, always.
"""

import torch

from moe_align_jax._core import checks
from torch_bridge import _checks, _ops
from torch_bridge._direct import fast_path, inplace
from torch_bridge._specs import SglangSpec
from torch_bridge.sglang.masked_quant import (
    silu_and_mul_masked_post_quant_fwd as silu_and_mul_masked_post_quant_fwd,
)
from torch_bridge.sglang.metrics import ExpertDistributionMetrics as ExpertDistributionMetrics
from torch_bridge.sglang.recorder import ExpertDistributionRecorder as ExpertDistributionRecorder
from torch_bridge.sglang.recorder import (
    get_global_expert_distribution_recorder as get_global_expert_distribution_recorder,
)
from torch_bridge.sglang.recorder import (
    set_global_expert_distribution_recorder as set_global_expert_distribution_recorder,
)

_IN_PLACE = fast_path.SGLANG | fast_path.IN_PLACE


def moe_align_block_size(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    ignore_invalid_expert: bool = False,
    *,
    return_inactive_prefix_count: bool = False,
    pad_expert_ids: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SGLang's `moe_align_block_size`: id -1 (on another rank) has blocks of its own.

    Args:
        topk_ids: `[num_tokens, topk]` (or any shape), any integer dtype. Ids below -1 or >=
            num_experts are dropped.
        block_size: rows per GEMM block.
        num_experts: number of experts, without the bucket of id -1.
        ignore_invalid_expert: drop id -1 too. Otherwise its pairs stand ahead of expert 0, in
            blocks that read -1.
        return_inactive_prefix_count: the count gets a second word: the blocks (not rows) of id -1.
        pad_expert_ids: accepted; the tail of `expert_ids` reads -1 either way.

    Returns:
        `(sorted_token_ids [P], expert_ids [cdiv(P, block_size)], num_tokens_post_pad [1] or [2])`,
        int32, with P = n + min(n, num_experts + 1) * (block_size - 1), rounded up to a multiple
        of 4.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as `torch_bridge.moe_align_block_size`.

    Example:
        >>> ids = torch.tensor([[1, -1], [0, 1]], dtype=torch.int32)
        >>> sorted_ids, expert_ids, count = moe_align_block_size(
        ...     ids, 2, 2, return_inactive_prefix_count=True)
        >>> sorted_ids.tolist(), expert_ids.tolist(), count.tolist()
        ([1, 4, 2, 4, 0, 3, 4, 4], [-1, 0, 1, -1], [6, 1])

    Source: sglang 0.5.23 `srt/layers/moe/moe_runner/triton_utils/moe_align_block_size.py`
    (Apache-2.0), its signature and contract; no code taken.
    """
    if type(return_inactive_prefix_count) is bool and type(pad_expert_ids) is bool:
        form = fast_path.sglang_form(return_inactive_prefix_count)
        key = (num_experts, block_size, False, ignore_invalid_expert, None, form)
        results = fast_path.attempt(key, topk_ids)
        if results is not None:
            return results
    function = "moe_align_block_size"
    topk_ids = _checks.check_integer_tensor(function, "topk_ids", topk_ids, _checks.IDS_REMEDY)
    block_size = checks.check_block_size(function, block_size)
    num_experts = checks.check_num_experts(function, num_experts)
    _checks.check_bool(function, "ignore_invalid_expert", ignore_invalid_expert)
    _checks.check_bool(function, "return_inactive_prefix_count", return_inactive_prefix_count)
    _checks.check_bool(function, "pad_expert_ids", pad_expert_ids)
    if _checks.sizes_are_known():
        spec = SglangSpec(topk_ids.numel(), num_experts, block_size)
        spec.check_capacity(function, "topk_ids")
    op = _ops.chosen("sglang_block_align", topk_ids.device)
    return op(
        topk_ids, num_experts, block_size, ignore_invalid_expert, return_inactive_prefix_count
    )


def ops_moe_align_block_size(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    cumsum_buffer: torch.Tensor,
    pad_sorted_token_ids: bool = False,
    ignore_invalid_expert: bool = False,
) -> None:
    """SGLang's compiled op `moe_align_block_size`: writes into the caller's buffers.

    The capacity is the buffers': larger ones are filled to their end. Every slot is written.

    Args:
        topk_ids: `[num_tokens, topk]` (or any shape), any integer dtype, n pairs.
        num_experts: E + 1: the experts and the bucket of id -1. At least 2.
        block_size: rows per GEMM block.
        sorted_token_ids: at least P = n + min(n, E + 1) * (block_size - 1) elements; n past the
            result.
        experts_ids: at least P // block_size elements; -1 past the last used block.
        num_tokens_post_pad: one element.
        cumsum_buffer: scratch of the original, at least E + 2 elements of int32. Not touched.
        pad_sorted_token_ids: accepted; the tail of `sorted_token_ids` reads n either way.
        ignore_invalid_expert: drop id -1. Otherwise its pairs stand ahead of expert 0, in blocks
            that read -1.

    The buffers are contiguous int32 on the device of `topk_ids`, and overlap neither each other nor an
    input. Nothing is written when an error is raised.

    Returns:
        None.

    Raises:
        TypeError: a buffer is no int32 tensor.
        ValueError: a buffer is too small, on another device, not contiguous, or overlaps.
        NotImplementedError, RuntimeError: as `torch_bridge.moe_align_block_size`.

    Example:
        >>> ids = torch.tensor([[1, -1], [0, 1]], dtype=torch.int32)
        >>> sorted_ids, expert_ids, count, scratch = (
        ...     torch.empty(n, dtype=torch.int32) for n in (8, 4, 1, 4))
        >>> ops_moe_align_block_size(ids, 2 + 1, 2, sorted_ids, expert_ids, count, scratch, True)
        >>> sorted_ids.tolist(), expert_ids.tolist(), count.tolist()
        ([1, 4, 2, 4, 0, 3, 4, 4], [-1, 0, 1, -1], [6])

    Source: the op's schema as sglang 0.5.23 calls it (Apache-2.0), signature and contract; no code
    taken.
    """
    buffers = (sorted_token_ids, experts_ids, num_tokens_post_pad)
    # A scratch that is None has to be refused below.
    is_known = type(num_experts) is int and type(pad_sorted_token_ids) is bool
    if is_known and cumsum_buffer is not None:
        key = (num_experts - 1, block_size, False, ignore_invalid_expert, None, _IN_PLACE)
        scratch = cumsum_buffer, num_experts + 1
        if fast_path.attempt(key, topk_ids, None, None, buffers, *scratch) is not None:
            return
    function = "ops_moe_align_block_size"
    topk_ids = _checks.check_integer_tensor(function, "topk_ids", topk_ids, _checks.IDS_REMEDY)
    buckets = checks.check_num_experts(function, num_experts)
    block_size = checks.check_block_size(function, block_size)
    _checks.check_bool(function, "pad_sorted_token_ids", pad_sorted_token_ids)
    _checks.check_bool(function, "ignore_invalid_expert", ignore_invalid_expert)
    if buckets < 2:
        rule, remedy = "be at least 2", "Pass the number of experts plus one."
        raise ValueError(checks.message(function, "num_experts", rule, buckets, remedy))
    device = topk_ids.device
    inplace.check_buffer(function, "sorted_token_ids", sorted_token_ids, device)
    inplace.check_buffer(function, "experts_ids", experts_ids, device)
    inplace.check_buffer(function, "num_tokens_post_pad", num_tokens_post_pad, device)
    inplace.check_buffer(function, "cumsum_buffer", cumsum_buffer, device)
    if cumsum_buffer.numel() < buckets + 1:
        rule, what = f"have at least {buckets + 1} elements", checks.describe(cumsum_buffer)
        remedy = "Pass num_experts + 1 of them."
        raise ValueError(checks.message(function, "cumsum_buffer", rule, what, remedy))
    if _checks.sizes_are_known():
        spec = SglangSpec(topk_ids.numel(), buckets - 1, block_size)
        spec.check_capacity(function, "topk_ids")
    _ops.chosen("sglang_block_align_into", device)(
        topk_ids,
        buckets - 1,
        block_size,
        ignore_invalid_expert,
        *buffers,
    )
