"""One problem or more for each form of the kernels: what lowering, vmap and the sanitizers go through."""

import itertools
from typing import Any, NamedTuple

from moe_align_jax import _checks, _tuning
from moe_align_jax.types import AlignProblem, BatchedAlignProblem


class Size(NamedTuple):
    """The static size of a call, and the form that it is there to reach."""

    form: str
    num_pairs: int
    num_experts: int
    block_size: int


# Sizes at and beside the thresholds of _tuning, and the E that issue and peers name.
SIZES = (
    Size("warp", 1, 1, 1),
    Size("warp", 8, 256, 16),
    Size("warp", 32, 65_535, 4),
    Size("block", 33, 64, 16),
    Size("block", 512, 256, 16),
    Size("block", 1000, 1000, 64),
    Size("block", 1024, 4095, 16),
    Size("grid", 1025, 1, 64),
    Size("grid", 2048, 128, 64),
    Size("grid", 8192, 64, 128),
    Size("grid", 8192, 4095, 8),
    Size("grid", 70_000, 256, 128),
    Size("radix", 33, 4097, 16),
    Size("radix", 5000, 65_535, 4),
    Size("radix", 70_000, 9000, 8),
)

# Every combination of what changes the program. Values are made by `arguments` in helpers.
OPTIONS: tuple[dict[str, Any], ...] = tuple(
    {"map": mode, "num_valid_pairs": valid, "return_inverse": inverse, "pad_sorted_ids": pad}
    for mode, valid, inverse, pad in itertools.product(
        ("", "label", "filter"), (False, True), (False, True), (False, True)
    )
)

BATCHED_SIZES = ((8, 16, 8), (64, 1, 4), (256, 512, 64), (1000, 13, 16))  # E, max_tokens, block


def problem(size: Size, options: dict[str, Any], id_words: int = 1) -> AlignProblem:
    padded = _checks.max_num_tokens_padded(
        size.num_pairs,
        block_size=size.block_size,
        num_experts=size.num_experts,
        pad_sorted_ids=options["pad_sorted_ids"],
    )
    return AlignProblem(
        num_pairs=size.num_pairs,
        num_experts=size.num_experts,
        block_size=size.block_size,
        capacity=padded,
        id_words=id_words,
        expert_map=options["map"],
        has_num_valid_pairs=options["num_valid_pairs"],
        return_inverse=options["return_inverse"],
    )


def form_of(size: Size | tuple[int, int, int]) -> str:
    if isinstance(size, Size):
        return _tuning.config_for(problem(size, OPTIONS[0])).form
    return _tuning.config_for(BatchedAlignProblem(*size)).form
