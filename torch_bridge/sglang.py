"""SGLang's function on our kernels: signature, order, defaults, shapes of sglang 0.5.23.

    from torch_bridge.sglang import moe_align_block_size

SGLang itself is not imported. Combinations that SGLang refuses (off CUDA, above 8191 experts) work
here, and every slot is written: tails of `sorted_token_ids` read n and of `expert_ids` -1, always.
"""

import torch

from moe_align_jax import _checks
from torch_bridge import checks, ops
from torch_bridge.problems import SglangProblem


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
        As `torch_bridge.moe_align_block_size`.

    Example:
        >>> ids = torch.tensor([[1, -1], [0, 1]], dtype=torch.int32)
        >>> sorted_ids, expert_ids, count = moe_align_block_size(
        ...     ids, 2, 2, return_inactive_prefix_count=True)
        >>> sorted_ids.tolist(), expert_ids.tolist(), count.tolist()
        ([1, 4, 2, 4, 0, 3, 4, 4], [-1, 0, 1, -1], [6, 1])

    Source: sglang 0.5.23 `srt/layers/moe/moe_runner/triton_utils/moe_align_block_size.py`
    (Apache-2.0), its signature and contract; no code taken.
    """
    function = "moe_align_block_size"
    topk_ids = checks.check_topk_ids(function, topk_ids)
    block_size = _checks.check_block_size(function, block_size)
    num_experts = _checks.check_num_experts(function, num_experts)
    checks.check_bool(function, "ignore_invalid_expert", ignore_invalid_expert)
    checks.check_bool(function, "return_inactive_prefix_count", return_inactive_prefix_count)
    checks.check_bool(function, "pad_expert_ids", pad_expert_ids)
    if not torch.compiler.is_compiling():
        problem = SglangProblem(topk_ids.numel(), num_experts, block_size)
        checks.check_capacity(function, "topk_ids", problem.capacity)
    op = ops.chosen("sglang_block_align", topk_ids.device)
    return op(
        topk_ids, num_experts, block_size, ignore_invalid_expert, return_inactive_prefix_count
    )
