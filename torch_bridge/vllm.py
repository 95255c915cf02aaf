"""vLLM's functions on our kernels: signatures, order, defaults, shapes and fill values of vllm
0.33.

    from torch_bridge.vllm import moe_align_block_size

`ops_moe_align_block_size` and `ops_batched_moe_align_block_size` are its compiled ops, which fill
the caller's buffers; `patch` and `patch_for_good` make an installed vLLM call them.

vLLM itself is imported by these two alone. One quirk is not copied: with a map and
ignore_invalid_experts=False, vLLM's unused blocks read expert_map[-1]; ours read -1. What vLLM
refuses works here: 1-D ids, no pairs, any number of experts, every integer dtype.
"""

import dataclasses

import torch

from moe_align_jax._core import checks as _checks
from torch_bridge import _checks as checks
from torch_bridge import _ops, align
from torch_bridge._direct import fast_path, inplace
from torch_bridge._specs import BatchedProblem
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
    if (return_scatter_idx is False or scattered) and fast_path.open_to_all():
        results = fast_path.attempt(
            topk_ids,
            num_experts,
            block_size,
            pad_sorted_ids,
            expert_map,
            ignore_invalid_experts,
            form=fast_path.SCATTER if scattered else 0,
        )
        if results is not None:
            return results
    function = "moe_align_block_size"
    checks.check_bool(function, "return_scatter_idx", return_scatter_idx)
    problem, operands, limit = align.check(
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
            _checks.message(
                function,
                "return_scatter_idx",
                "come with ignore_invalid_experts=True when there is an expert_map",
                "ignore_invalid_experts=False",
                "Pass ignore_invalid_experts=True, or leave scatter_idx out.",
            )
        )
    problem = dataclasses.replace(problem, with_scatter_idx=return_scatter_idx)
    return tuple(align.aligned(problem, operands, limit, "auto"))


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
    if fast_path.open_to_all():
        results = fast_path.attempt(
            expert_num_tokens, max_tokens_per_batch, block_size, form=fast_path.BATCHED
        )
        if results is not None:
            return results
    function = "batched_moe_align_block_size"
    counts, max_tokens_per_batch, block_size = _check_batched(
        function, expert_num_tokens, max_tokens_per_batch, block_size
    )
    op = _ops.chosen("batched_block_align", counts.device)
    return op(counts, max_tokens_per_batch, block_size)


def _check_batched(
    function: str, expert_num_tokens: object, max_tokens_per_batch: object, block_size: object
) -> tuple[torch.Tensor, int, int]:
    remedy = "Pass the row count of each expert."
    counts = checks.check_integer_tensor(function, "expert_num_tokens", expert_num_tokens, remedy)
    rows = _checks.check_positive_int(
        function, "max_tokens_per_batch", max_tokens_per_batch, "Pass the rows per expert."
    )
    block_size = _checks.check_block_size(function, block_size)
    if counts.dim() != 1 or counts.shape[0] < 1:
        what, rule = _checks.describe(counts), "have shape [num_experts] with at least one expert"
        raise ValueError(_checks.message(function, "expert_num_tokens", rule, what, remedy))
    if checks.sizes_are_known():
        problem = BatchedProblem(counts.shape[0], rows, block_size)
        checks.check_capacity(function, "max_tokens_per_batch", problem.capacity)
    return counts, rows, block_size


# -- the compiled ops' forms -----------------------------------------------------------------------


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
    if fast_path.open_to_all():
        done = fast_path.attempt(
            topk_ids,
            num_experts,
            block_size,
            False,
            expert_map,
            expert_map is not None,
            None,
            buffers if scatter_idx is None else (*buffers, scatter_idx),
            None,
            0 if scatter_idx is None else fast_path.SCATTER,
            True,
        )
        if done is not None:
            return
    function = "ops_moe_align_block_size"
    problem, operands, _ = align.check(
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
        problem.num_experts,
        problem.block_size,
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
    if fast_path.open_to_all():
        done = fast_path.attempt(
            expert_num_tokens,
            max_tokens_per_batch,
            block_size,
            out=buffers,
            form=fast_path.BATCHED,
            in_place=True,
        )
        if done is not None:
            return
    function = "ops_batched_moe_align_block_size"
    counts, max_tokens_per_batch, block_size = _check_batched(
        function, expert_num_tokens, max_tokens_per_batch, block_size
    )
    inplace.check_buffer(function, "sorted_token_ids", sorted_token_ids, counts.device)
    inplace.check_buffer(function, "experts_ids", experts_ids, counts.device)
    inplace.check_buffer(function, "num_tokens_post_pad", num_tokens_post_pad, counts.device)
    op = _ops.chosen("batched_block_align_into", counts.device)
    op(counts, max_tokens_per_batch, block_size, *buffers)
