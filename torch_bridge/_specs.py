"""What one call computes, statically: its options, and the names and shapes of its results.

Pure size arithmetic that also holds for symbolic sizes (SymInt): fakes, plans and calls share it.
No jax.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moe_align_jax._core import checks

# SGLang's capacity is a whole number of 16-byte stores.
_SGLANG_MULTIPLE = 4


def _minimum(a: Any, b: Any) -> Any:
    """For ints as for torch.SymInt, whose comparison would fix its value. (Dynamo traces its own symbols,
    which call themselves int, through `min`, and torch 2.11's not through `sym_min` of plain ints.) Under
    torch.jit.trace a size is a tensor."""
    if type(a) is int and type(b) is int:
        return min(a, b)
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return min(int(a), int(b))
    return torch.sym_min(a, b)


@dataclass(frozen=True)
class AlignProblem:
    """One alignment.

    Attributes:
        num_pairs: n, the length of the flat `topk_ids`.
        with_counts: `tokens_per_expert` is wanted.
        with_inverse: `row_of_pair` is wanted.
        with_scatter_idx: vLLM's `scatter_idx` `[n, 1]` is wanted.
        rows: P, where the caller's buffers give it; 0 for the least that is enough.
    """

    num_pairs: Any
    num_experts: int
    block_size: int
    ignore_invalid_experts: bool = False
    pad_sorted_ids: bool = False
    with_counts: bool = False
    with_inverse: bool = False
    with_scatter_idx: bool = False
    rows: int = 0

    name: ClassVar[str] = "moe_align_block_size"

    @property
    def capacity(self) -> Any:
        return self.rows or checks.capacity(
            self.num_pairs,
            block_size=self.block_size,
            num_experts=self.num_experts,
            pad_sorted_ids=self.pad_sorted_ids,
            minimum=_minimum,
        )

    @property
    def outputs(self) -> dict[str, tuple[Any, ...]]:
        """Name and shape of each int32 result, in order."""
        shapes: dict[str, tuple[Any, ...]] = {
            "sorted_token_ids": (self.capacity,),
            "expert_ids": (checks.cdiv(self.capacity, self.block_size),),
            "num_tokens_post_padded": (1,),
        }
        if self.with_counts:
            shapes["tokens_per_expert"] = (self.num_experts,)
        if self.with_inverse:
            shapes["row_of_pair"] = (self.num_pairs,)
        if self.with_scatter_idx:
            shapes["scatter_idx"] = (self.num_pairs, 1)
        return shapes


@dataclass(frozen=True)
class SglangProblem:
    """One alignment after SGLang: id -1 is a bucket of its own, ahead of expert 0.

    Attributes:
        ignore_invalid_expert: drop id -1 instead.
        with_inactive_blocks: the count has a second word, the blocks of the bucket of id -1.
        rows: as for `AlignProblem`.
    """

    num_pairs: Any
    num_experts: int
    block_size: int
    ignore_invalid_expert: bool = False
    with_inactive_blocks: bool = False
    rows: int = 0

    name: ClassVar[str] = "moe_align_block_size"

    @property
    def aligned_capacity(self) -> Any:
        """Rows that E + 1 buckets need; `capacity` rounds it up."""
        return checks.capacity(
            self.num_pairs,
            block_size=self.block_size,
            num_experts=self.num_experts + 1,
            pad_sorted_ids=False,
            minimum=_minimum,
        )

    @property
    def capacity(self) -> Any:
        return self.rows or checks.round_up(self.aligned_capacity, _SGLANG_MULTIPLE)

    @property
    def outputs(self) -> dict[str, tuple[Any, ...]]:
        return {
            "sorted_token_ids": (self.capacity,),
            "expert_ids": (checks.cdiv(self.capacity, self.block_size),),
            "num_tokens_post_padded": (2 if self.with_inactive_blocks else 1,),
        }


@dataclass(frozen=True)
class BatchedProblem:
    """One alignment of the `[E, max_tokens_per_batch, H]` layout."""

    num_experts: Any
    max_tokens_per_batch: int
    block_size: int

    name: ClassVar[str] = "batched_moe_align_block_size"

    @property
    def num_pairs(self) -> Any:
        return self.num_experts * self.max_tokens_per_batch

    @property
    def capacity(self) -> Any:
        return self.num_experts * checks.round_up(self.max_tokens_per_batch, self.block_size)

    @property
    def outputs(self) -> dict[str, tuple[Any, ...]]:
        return {
            "sorted_token_ids": (self.capacity,),
            "expert_ids": (checks.cdiv(self.capacity, self.block_size),),
            "num_tokens_post_padded": (1,),
        }


type Problem = AlignProblem | SglangProblem | BatchedProblem
