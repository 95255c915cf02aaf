"""Which compiled programs serve a call of the expert layer: one of each kind serves a range of sizes."""

import math
from typing import NamedTuple

import torch

from moe_align_jax._core import checks
from moe_align_jax._grouped_matmul.choose_tiles import config_for
from moe_align_jax._grouped_matmul.config import unshared
from moe_align_jax._grouped_matmul.direct_problem import DirectMatmul
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._moe_layer import plan
from moe_align_jax._moe_layer.direct_problem import DirectSum, sum_bucket
from moe_align_jax._moe_layer.plan import LayerProblem
from moe_align_jax.types import AlignProblem
from torch_bridge._direct import problems
from torch_bridge._moe.calls import DTYPES, Layer, Matmul

_LEAST_ROWS = 1024
_LEAST_TOKENS = 64
# Tokens of the programs whose blocks have the most rows: their tiles are the same for any number.
_MANY_TOKENS = (1 << 16, 1 << 17, 1 << 18, 1 << 20)


class LayerPrograms(NamedTuple):
    """The problems of a layer's programs, and its sizes.

    Attributes:
        align: None where the caller brings the alignment.
        first, second: the products.
        total: the weighted sum.
        num_pairs: of the call.
        num_rows: of its alignment, whole blocks.
        block_size: rows of a block.
    """

    align: AlignProblem | None
    first: DirectMatmul
    second: DirectMatmul
    total: DirectSum
    num_pairs: int
    num_rows: int
    block_size: int

    @property
    def refusal(self) -> str | None:
        """Why it cannot run by these, or None."""
        if reason := self.first.refusal or self.second.refusal or self.total.refusal:
            return reason
        if self.num_rows > min(self.total.max_rows, self.first.problem.num_rows):
            return f"{self.num_rows} rows are too many for the kernels' int32"
        return None

    @property
    def each(self) -> tuple[problems.KernelProblem, ...]:
        """The problems, in the order of their launches."""
        first = () if self.align is None else (self.align,)
        return (*first, self.first, self.second, self.total)


def _power_of_two(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length())


def matmul_program(call: Matmul, operands: dict[str, torch.Tensor], gpu_kind: str) -> DirectMatmul:
    """The problem whose program serves a `grouped_matmul`."""
    x, where = operands["x"], operands["sorted_token_ids"]
    weights = next(operands[name] for name in ("w", "gate") if name in operands)
    exact = MatmulProblem(
        call.function,
        "blocks",
        num_rows=where.shape[0],
        k=x.shape[1],
        n=call.shape[1],
        num_experts=weights.shape[0],
        dtype=DTYPES[x.dtype],
        out_dtype=DTYPES[call.out_dtype],
        weights=call.weights,
        block_size=call.block_size,
        num_tokens=x.shape[0] if call.top_k else 0,
        top_k=call.top_k,
        row_weights="row_weights" in operands,
    )
    sizes = {"num_rows": _power_of_two(exact.num_rows, _LEAST_ROWS)}
    if call.top_k:
        sizes["num_tokens"] = _power_of_two(exact.num_tokens, _LEAST_TOKENS)
    # As they are launched: tiles that differ in how clusters share them are one program.
    tiles = unshared(config_for(exact, gpu_kind, lists=False))
    return DirectMatmul(exact._replace(**sizes), gpu_kind, tiles)


def token_bucket(tokens: int, top_k: int, num_experts: int, block_size: int, kind: str) -> int:
    """The most tokens of the program that serves so many; `block_size` 0: the layer chooses it."""
    if block_size:
        return _power_of_two(tokens, _LEAST_TOKENS)
    chosen = plan.block_size_for(tokens * top_k, num_experts, kind)
    most = next(m for m, rows in plan.block_sizes(num_experts, kind) if rows == chosen)
    if most != math.inf:
        return max(tokens, int(most * num_experts) // top_k)
    return next((n for n in _MANY_TOKENS if n >= tokens), tokens)


def layer_programs(
    call: Layer, operands: dict[str, torch.Tensor], gpu_kind: str, tuning: str
) -> LayerPrograms:
    """The problems whose programs serve a `fused_moe` with at least one pair."""
    x, ids = operands["x"], operands["topk_ids"]
    tokens, top_k = ids.shape
    aligned = operands.get("sorted_token_ids")
    slots = operands["expert_map"].shape[0] if "expert_map" in operands else call.num_experts
    has_bias_down = "bias_down" in operands
    kind = plan.kind_of_blocks(call.weights, x.shape[1], call.ffn, bias_down=has_bias_down)
    block_size = call.block_size or plan.block_size_for(tokens * top_k, slots, kind)
    most = token_bucket(tokens, top_k, slots, call.block_size, kind)
    rows = checks.capacity(
        most * top_k, block_size=block_size, num_experts=slots, pad_sorted_ids=True
    )
    if aligned is not None:
        rows = max(rows, _power_of_two(aligned.shape[0], _LEAST_ROWS))
    problem = LayerProblem(
        *(most, top_k, x.shape[1], call.ffn, call.num_experts),
        *(DTYPES[x.dtype], DTYPES[call.out_dtype], call.weights),
        has_bias_down,
        call.weights_on_input,
        block_size,
        rows,
        pairs=False,
        check_blocks=False,
    )
    num_rows = checks.capacity(
        tokens * top_k, block_size=block_size, num_experts=slots, pad_sorted_ids=True
    )
    align = None
    if aligned is None:
        # Of local ids that no expert has, the alignment knows no row: their weights may be NaN.
        num_local = call.num_experts if call.num_experts < slots else 0
        align = problems.bucket_problem(
            *(tokens * top_k, slots, block_size),
            problems.ID_WORDS.get(ids.dtype, 1),
            expert_map="filter" if "expert_map" in operands else "",
            has_num_valid_pairs=call.max_valid_tokens >= 0 or "num_valid_tokens" in operands,
            return_counts=call.counted,
            return_inverse=True,
            num_local=num_local,
            tuning=tuning,
        )
    else:
        num_rows = checks.round_up(aligned.shape[0], block_size)
    return LayerPrograms(
        align,
        DirectMatmul(problem.first, gpu_kind),
        DirectMatmul(problem.second, gpu_kind),
        sum_bucket(tokens, top_k, x.shape[1], DTYPES[x.dtype], DTYPES[call.out_dtype]),
        tokens * top_k,
        num_rows,
        block_size,
    )
