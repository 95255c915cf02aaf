"""Specs: what a call asks for, as static facts: its sizes and options, names and shapes of its results.

This is pure size arithmetic, which also holds for symbolic sizes (torch.SymInt): the fakes of the operators,
the plan and the call share it. It imports no jax. (What a program is compiled for is a kernel problem, of
`_direct/problems.py`: one program serves many specs.)
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moe_align_jax._core import checks

# SGLang's capacity is a whole number of 16-byte stores.
_SGLANG_MULTIPLE = 4


def _minimum(a: Any, b: Any) -> Any:
    """The smaller of two sizes.

    A size may be an int, a torch.SymInt (of which Python's `min` would fix the value by comparing) or, under
    torch.jit.trace, a tensor. Dynamo's own symbols say that they are ints; it traces them through `min`, but
    torch 2.11 does not trace plain ints through `sym_min`.
    """
    if type(a) is int and type(b) is int:
        return min(a, b)
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return min(int(a), int(b))
    return torch.sym_min(a, b)


class _Spec:
    """What the specs have in common.

    Attributes:
        outputs: name and shape of each int32 result, in order: `shapes()`, derived once.
        capacity: P, the length of `sorted_token_ids`.
    """

    def shapes(self) -> dict[str, tuple[Any, ...]]:
        """`outputs`, derived anew: for code that Dynamo traces, to which a cached property may be unknown."""
        raise NotImplementedError

    @functools.cached_property
    def outputs(self) -> dict[str, tuple[Any, ...]]:
        return self.shapes()

    @functools.cached_property
    def capacity(self) -> Any:
        return self.outputs["sorted_token_ids"][0]

    def check_capacity(self, function: str, argument: str) -> None:
        """Raises ValueError, about `argument`, where P exceeds int32."""
        checks.check_fits_int32(function, argument, self.capacity, "a padded length P")


@dataclass(frozen=True)
class AlignSpec(_Spec):
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

    def shapes(self) -> dict[str, tuple[Any, ...]]:
        rows = self.rows or checks.capacity(
            self.num_pairs,
            block_size=self.block_size,
            num_experts=self.num_experts,
            pad_sorted_ids=self.pad_sorted_ids,
            minimum=min if type(self.num_pairs) is int else _minimum,
        )
        shapes: dict[str, tuple[Any, ...]] = {
            "sorted_token_ids": (rows,),
            "expert_ids": (-(-rows // self.block_size),),
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
class SglangSpec(_Spec):
    """One alignment after SGLang: id -1 is a bucket of its own, ahead of expert 0.

    Attributes:
        ignore_invalid_expert: drop id -1 instead.
        with_inactive_blocks: the count has a second word, the blocks of the bucket of id -1.
        rows: as for `AlignSpec`.
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

    def shapes(self) -> dict[str, tuple[Any, ...]]:
        rows = self.rows or checks.round_up(self.aligned_capacity, _SGLANG_MULTIPLE)
        return {
            "sorted_token_ids": (rows,),
            "expert_ids": (-(-rows // self.block_size),),
            "num_tokens_post_padded": (2 if self.with_inactive_blocks else 1,),
        }


@dataclass(frozen=True)
class BatchedSpec(_Spec):
    """One alignment of the `[E, max_tokens_per_batch, H]` layout."""

    num_experts: Any
    max_tokens_per_batch: int
    block_size: int

    name: ClassVar[str] = "batched_moe_align_block_size"

    @property
    def num_pairs(self) -> Any:
        return self.num_experts * self.max_tokens_per_batch

    def shapes(self) -> dict[str, tuple[Any, ...]]:
        rows = self.num_experts * checks.round_up(self.max_tokens_per_batch, self.block_size)
        return {
            "sorted_token_ids": (rows,),
            "expert_ids": (-(-rows // self.block_size),),
            "num_tokens_post_padded": (1,),
        }


type Spec = AlignSpec | SglangSpec | BatchedSpec
