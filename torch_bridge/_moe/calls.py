"""What a call of the expert layer asks for, with its tensors by name."""

from typing import NamedTuple

import torch

from moe_align_jax._grouped_matmul.problem import Weights

# As jax names them.
DTYPES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}


class Matmul(NamedTuple):
    """A `grouped_matmul`.

    Attributes:
        block_size: rows per block of the alignment.
        top_k: pairs per token of a gathered x; 0 where x has a row for each of the alignment.
        weights: how they lie, and the epilogue.
        out_dtype: of the result.
        shape: of the result.
    """

    block_size: int
    top_k: int
    weights: Weights
    out_dtype: torch.dtype
    shape: tuple[int, int]

    function = "grouped_matmul"


class Layer(NamedTuple):
    """A `fused_moe`.

    Attributes:
        ffn: N, columns between the two products.
        num_experts: E, of the weights.
        weights: how those of gate and up lie, and the activation.
        weights_on_input: the routing weights multiply x, and not the experts' results.
        max_valid_tokens: num_valid_tokens as an int; -1 for none.
        counted: whether the pairs of each expert are returned too.
        block_size: as the caller gave it; 0 for what suits the sizes.
        out_dtype: of the result.
        shape: of the result.
    """

    ffn: int
    num_experts: int
    weights: Weights
    weights_on_input: bool
    max_valid_tokens: int
    counted: bool
    block_size: int
    out_dtype: torch.dtype
    shape: tuple[int, int]

    function = "fused_moe"


type Call = Matmul | Layer

# The names of a call's tensors, in the order of the operators' schemas.
ALIGNED = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", "row_of_pair")


def weights_of(operands: dict[str, torch.Tensor]) -> list[str]:
    """The names of the first product's arrays: "w", or "gate" and "up"."""
    return [name for name in ("w", "gate", "up") if name in operands]
