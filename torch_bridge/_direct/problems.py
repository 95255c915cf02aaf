"""Which compiled program serves a call: one program serves a range of sizes, a bucket."""

import functools
from collections.abc import Mapping

import torch

from moe_align_jax._align import tables
from moe_align_jax._align.vllm.problem import AdaptersProblem, ReceivedProblem
from moe_align_jax._core import checks
from moe_align_jax._grouped_matmul.direct_problem import DirectMatmul
from moe_align_jax._masked_quant.problem import MaskedQuantProblem
from moe_align_jax._moe_layer.direct_problem import DirectSum
from moe_align_jax._router.problem import RouteProblem
from moe_align_jax.types import AlignProblem, BatchedAlignProblem
from torch_bridge._specs import BatchedSpec, SglangSpec, Spec

# What a program is compiled for. (A spec, of _specs.py, is what a call asks for.)
type KernelProblem = (
    AlignProblem
    | BatchedAlignProblem
    | MaskedQuantProblem
    | RouteProblem
    | DirectMatmul
    | DirectSum
    | ReceivedProblem
    | AdaptersProblem
)

# Tokens of the least bucket of the router. The CTAs of tokens that are not there end at once.
_LEAST_TOKENS = 64
_MOST_LOGITS = 2**31 - 1
_LEAST_RANKS = 64  # of psum
# Rows beyond which offsets could wrap inside a kernel's loops.
MAX_CAPACITY = 2**31 - 2**24
# The dtypes of ids that the kernels read where they lie, and the int32 words of one id. Others are converted.
ID_WORDS = {torch.int32: 1, torch.uint32: 1, torch.int64: 2, torch.uint64: 2}


def problem_for(
    spec: Spec,
    operands: Mapping[str, torch.Tensor],
    tuning: str,
    has_limit: bool = False,
) -> KernelProblem:
    """The problem whose program serves a call.

    Args:
        spec: what is asked.
        operands: the call's tensors by name; only their presence and dtypes count.
        tuning: `Machine.tuning` of their device.
        has_limit: num_valid_pairs is given as a Python int.
    """
    if isinstance(spec, BatchedSpec):
        sizes = (spec.num_experts, spec.max_tokens_per_batch, spec.block_size)
        return BatchedAlignProblem(*sizes, tuning)
    id_words = ID_WORDS.get(operands["topk_ids"].dtype, 1)
    if isinstance(spec, SglangSpec):
        keeps_minus_one = not spec.ignore_invalid_expert
        return bucket_problem(
            spec.num_pairs,
            spec.num_experts + keeps_minus_one,
            spec.block_size,
            id_words,
            return_counts=spec.with_inactive_blocks,
            minus_one=keeps_minus_one,
            tuning=tuning,
        )
    use = map_use(spec.ignore_invalid_experts) if "expert_map" in operands else ""
    return bucket_problem(
        spec.num_pairs,
        spec.num_experts,
        spec.block_size,
        id_words,
        expert_map=use,
        has_num_valid_pairs=has_limit or "num_valid_pairs" in operands,
        return_counts=spec.with_counts,
        return_inverse=spec.with_inverse or spec.with_scatter_idx,
        tuning=tuning,
    )


def map_use(ignore_invalid_experts: bool) -> str:
    """How an expert map is used, as `AlignProblem.expert_map` names it."""
    return "filter" if ignore_invalid_experts else "label"


@functools.lru_cache(maxsize=1 << 16)
def bucket_problem(
    num_pairs: int,
    num_experts: int,
    block_size: int,
    id_words: int = 1,
    *,
    expert_map: str = "",
    has_num_valid_pairs: bool = False,
    return_counts: bool = False,
    return_inverse: bool = False,
    minus_one: bool = False,
    num_local: int = 0,
    tuning: str = "",
) -> AlignProblem:
    """The problem of the bucket that holds `num_pairs`: that of the bucket's largest size, sized at launch.

    The arguments are the fields of `AlignProblem`. With `minus_one`, num_experts counts the bucket of id -1.
    """
    end = tables.size_bucket(num_pairs, num_experts, block_size, tuning)
    # The most that any entry point asks for: SGLang counts a bucket more and takes whole 16-byte stores.
    rows = checks.capacity(
        end, block_size=block_size, num_experts=num_experts + 1, pad_sorted_ids=False
    )
    capacity = -(-rows // 4) * 4
    return AlignProblem(
        end,
        num_experts,
        block_size,
        capacity,
        id_words,
        expert_map,
        has_num_valid_pairs,
        return_inverse,
        minus_one,
        return_counts,
        sized_at_launch=True,
        num_local=num_local,
        tuning=tuning,
    )


def bucket_ends(most: int, num_experts: int, block_size: int, tuning: str = "") -> list[int]:
    """The largest sizes of the buckets that hold 1 .. most pairs."""
    ends = [tables.size_bucket(1, num_experts, block_size, tuning)]
    while ends[-1] < most:
        ends.append(tables.size_bucket(ends[-1] + 1, num_experts, block_size, tuning))
    return ends


def route_bucket(problem: RouteProblem) -> RouteProblem:
    """The problem whose program serves a router's call: that of the next power of two of tokens, sized at
    launch."""
    tokens = max(_LEAST_TOKENS, 1 << (problem.num_tokens - 1).bit_length())
    most = max(_MOST_LOGITS // problem.num_experts, problem.num_tokens)
    return problem._replace(num_tokens=min(tokens, most), sized_at_launch=True)


def received_bucket(
    num_pairs: int,
    num_experts: int,
    block_size: int,
    tuning: str,
    *,
    top_k: int,
    psum_words: int,
    num_ranks: int,
    with_scatter: bool,
) -> ReceivedProblem:
    """The problem whose program serves a call of vLLM's op for what DeepEP received."""
    one = bucket_problem(num_pairs, num_experts, block_size, tuning=tuning)
    return ReceivedProblem(
        *(one.num_pairs, one.num_experts, one.block_size, one.capacity, top_k, psum_words),
        max(_LEAST_RANKS, 1 << (num_ranks - 1).bit_length()),
        with_scatter,
        tuning,
    )


def adapters_bucket(
    num_pairs: int,
    num_experts: int,
    block_size: int,
    tuning: str,
    *,
    top_k: int,
    num_adapters: int,
    num_lora_ids: int,
    id_words: int,
    has_expert_map: bool,
    whole_rows: bool,
) -> AdaptersProblem:
    """The problem whose program serves a call of vLLM's op for LoRA adapters."""
    one = bucket_problem(num_pairs, num_experts, block_size, tuning=tuning)
    return AdaptersProblem(
        *(one.num_pairs, one.num_experts, one.block_size, one.capacity, top_k),
        *(num_adapters, num_lora_ids, id_words, has_expert_map, whole_rows, tuning),
    )
