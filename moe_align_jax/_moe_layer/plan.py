"""The static description of one expert layer, and what follows from it. Imports no jax."""

import math
from typing import Any, NamedTuple

from moe_align_jax._grouped_matmul import spread
from moe_align_jax._grouped_matmul.problem import MatmulProblem, Scales, TokenSum, Weights

# With at most this share of the experts hit, pairs hardly ever meet in an expert: aligning them costs more
# than it saves. vLLM's factor.
PAIRS_PER_EXPERT = 4
# (Most pairs per expert, rows per block). An expert should rarely have more than one block where each reads
# the weights, and its blocks should have few rows without a pair where products bound. Four sizes, however
# many batch sizes a model is called with: each is a kernel of both products.
# Of many experts, one H200, 2026-11-29, device span in us, by rows: Qwen3-30B-A3B, 128 tokens: 16 291,
# 48 303, 80 307; 256: 16 323, 48 306, 80 311; 512: 48 315, 80 319; DeepSeek-V3 TP8, 512: 16 753, 48 718,
# 80 724; 1024: 48 761, 80 768. Blocks of 48 between those of 16 and 80 would be a fifth size.
# Above a mean of 66, blocks of 144 where their tiles have several heights (`HEIGHTS`), else of 128. Span,
# wall clock, 2026-11-29: DeepSeek-V3 TP8, 8192 tokens: 128 1791, 1880; 144 of one height
# 1803, 1907, of several 1699, 1823; Qwen3-30B-A3B, 4096: 613, 685; 596, 697; 592 to 594, 652 to 680. By
# rule, not measured: other means.
_MANY_EXPERTS = ((16 / 3, 8), (32 / 3, 16), (66, 80), (math.inf, 144))
# Of 128 experts with 512 pairs each: Qwen3-30B-A3B, 8192 tokens, span, then steps after each other at
# the card's power limit (means of turns): 144 1079, 1288; 184 1042, 1212; 192 1067, 1247; 128 1028, 1216. At
# 256 pairs: 144 583, 700; 184 631, 720; 128 609, 722. By rule: other means. No blocks of 8, so that a model
# needs no more than 12 kernels (see forms.py): DeepSeek-V3 TP8 with 16 tokens took 258.4 in blocks of 8, and
# 260.1 of 16.
# With 2048 pairs each, eleven blocks of 192 hold an expert where it takes twelve of 184: SonicMoE's sizes,
# 32768 tokens, forward, 2026-11-30, span, wall, three runs: 184 5555, 6237; 5493, 6216; 5893, 6171; 192
# 5340, 6067; 5388, 6125; 5933, 6067. By rule: other means above 1500.
_OF_128_EXPERTS = ((32 / 3, 16), (66, 80), (430, 144), (1500, 184), (math.inf, 192))
_MANY_OF_ONE_HEIGHT = (*_MANY_EXPERTS[:-1], (math.inf, 128))
# Up to eight experts have blocks of 176, six of which hold 1024 rows (in groups: see `choose_tiles._whole`).
# Measured of Mixtral 8x7B alone, one H200, 2026-11-29, device span in us, forward, forward and backward:
#   4096 tokens, all in groups of 8: 128 rows 4043, 12822; 176 3803, 12337; 192 4050, 13275
#   8192 tokens: groups of 8: 176 8385, 192 8293; then 192 in groups of 8, 176 in groups of 6:
#   8444, 8274; in a second run 8272, 8079, with backward 26491, 25686 (means of 12)
# By rule, not measured: every other mean above 270 (16384 tokens are 24 blocks an expert), other H and N,
# fewer experts. 192 may be faster where it needs a block less, as of 353 to 384 rows. Nine to 16 experts
# keep 192, since none were measured with 176. It is one or the other: with both, 16 experts would need 14
# kernels, as those of pairs without an alignment are more (`tile_rules._SPLITS`); a model shall need at most
# 12.
_FEW_EXPERTS = ((16 / 3, 8), (36, 48), (270, 144), (math.inf, 192))
_EIGHT_EXPERTS = (*_FEW_EXPERTS[:-1], (math.inf, 176))
_FEW, _EIGHT = 16, 8  # up to so many: their batches reach more rows per expert
# N from which on, and pairs of a mean expert above which, the backward pass copies tokens' rows. One H200,
# 2026-11-30, forward and backward, span, wall in us, gathered and copied: Qwen3-30B-A3B, 8192 tokens 4001,
# 3908 and 3610, 3701; SonicMoE's sizes (in blocks of 184 and 192) 17438, 18946 and 17188, 18224; Mixtral,
# 8192 tokens, by XLA's gather 25833, 27294 and 25857, 27256. By rule: other sizes.
_COLUMNS_TO_COPY, _PAIRS_TO_COPY = 512, 430
# Of products whose tiles have 8, 16, 64 or 128 rows: see `kind_of_blocks`.
_POWERS_OF_TWO = ((16 / 3, 8), (32 / 3, 16), (80, 64), (math.inf, 128))
# Kinds of blocks: of a few powers of two rows; of any multiple of 8 rows, which are tiles; the same, that are
# cut into tiles of several heights.
POWERS_OF_TWO, ANY_ROWS, HEIGHTS = "powers of two", "any rows", "several heights"
# Of a batch whose size is known only when an exported program runs.
UNKNOWN_ROWS = 64


class LayerProblem(NamedTuple):
    """Everything static about one `fused_moe`: the key of its cache.

    Attributes:
        num_tokens, top_k: T and K.
        hidden: H, columns of x and of the result.
        ffn: N, columns between the two products.
        num_experts: E, of the weights.
        dtype: of x and of the weights, and of what lies between the products: of e4m3, of what is quantised
            between them, the products' results being bfloat16.
        out_dtype: of the result.
        gate_up: how its weights lie, and the activation.
        bias_down: whether the second product has a bias.
        weights_on_input: the routing weights multiply x, and not the experts' results.
        block_size: rows per block of the alignment; 1 where `pairs`.
        num_rows: P, rows of the alignment; T * K where `pairs`.
        pairs: there is no alignment: block i is pair i.
        check_blocks: blocks may be of experts that there are no weights for.
        scales: of x and of gate and up, where they are e4m3.
        down_scales: "tensor" or "blocks": how those of w_down lie.
        few_forms: see `MatmulProblem.few_forms`, of both products.
    """

    num_tokens: Any
    top_k: int
    hidden: int
    ffn: int
    num_experts: int
    dtype: str
    out_dtype: str
    gate_up: Weights
    bias_down: bool
    weights_on_input: bool
    block_size: int
    num_rows: Any
    pairs: bool
    check_blocks: bool
    scales: Scales | None = None
    down_scales: str = ""
    few_forms: int = 0

    function = "fused_moe"

    @property
    def first(self) -> MatmulProblem:
        """x to what lies between the products, `[P, N]`."""
        tokens, top_k = self.num_tokens, self.top_k
        if self.weights_on_input and top_k > 1:  # x has a row per pair
            tokens, top_k = tokens * top_k, 1
        scales = self.scales
        if scales and self.weights_on_input:  # scales of each pair: with its weight
            scales = Scales("row_major", scales.w)
        sizes = {"k": self.hidden, "n": self.ffn, "num_tokens": tokens, "top_k": top_k}
        return self._matmul(self.gate_up, **sizes, scales=scales)

    @property
    def second(self) -> MatmulProblem:
        """From there to the experts' results, `[P, H]`."""
        weights = Weights(transposed=self.gate_up.transposed, bias=self.bias_down)
        scales = None
        if self.scales:
            layout, pitch = self.between_layout, 0
            if layout == "column_major":
                pitch = -(-self.num_rows // 4) * 4
            scales = Scales(layout, self.down_scales, pitch=pitch)
        return self._matmul(weights, k=self.ffn, n=self.hidden, scales=scales)

    @property
    def spreads(self) -> bool:
        """Whether the first product may copy tokens' rows to those of their pairs by `row_of_pair`, which has
        a row for each pair of a token."""
        several = self.weights_on_input and self.top_k > 1
        return not (self.pairs or self.scales or several) and is_static(self.num_tokens)

    @property
    def first_forward(self) -> MatmulProblem:
        """`first`, of which jax's launches also get `row_of_pair` where they may copy rows by it."""
        return self.first._replace(inverse=True) if self.spreads else self.first

    @property
    def copies(self) -> spread.Spread | None:
        """How the backward pass copies x, and the result's cotangent, to the rows of their pairs, so that
        their readers need not gather them; None where it does not."""
        if not self.spreads or self.ffn < _COLUMNS_TO_COPY:
            return None
        if self.num_tokens * self.top_k <= _PAIRS_TO_COPY * self.num_experts:
            return None
        found = spread.of(self.first)
        return None if spread.unsupported(found) else found

    @property
    def token_sum(self) -> TokenSum | None:
        """Of pairs: the second product and the sum of each token's rows as one problem."""
        if not self.pairs or self.scales or not is_static(self.num_tokens):
            return None
        return TokenSum(self.second, self.num_tokens, self.top_k, self.out_dtype)

    @property
    def between_layout(self) -> str:
        """Of the scales between the products: columns, which TMA reads, of rows that have a number."""
        return "column_major" if is_static(self.num_rows) else "row_major"

    @property
    def between(self) -> str:
        """The dtype of the products' results."""
        return "bfloat16" if self.scales else self.dtype

    def _matmul(self, weights: Weights, **sizes: Any) -> MatmulProblem:
        pairs = self.num_tokens * self.top_k
        # A tile is a block where the block size is the layer's own choice: fewer kernels for a model.
        widths, e4m3 = (self.hidden, self.ffn), self.scales is not None
        kind = kind_of_blocks(self.gate_up, *widths, e4m3, self.bias_down)
        chosen = block_size_for(pairs, self.num_experts, kind)
        own = is_static(pairs) and self.block_size == chosen
        return MatmulProblem(
            function=self.function,
            rows="blocks",
            num_rows=self.num_rows,
            num_experts=self.num_experts,
            dtype=self.dtype,
            out_dtype=self.between,
            weights=weights,
            block_size=self.block_size,
            zero_padding=False,  # the weighted sum reads rows of pairs alone
            leaves_padding=self.scales is None,
            num_pairs=pairs if is_static(pairs) else 0,
            expected_rows=self.block_size if own else 0,
            consecutive=not self.check_blocks,
            all_rows=self.pairs,
            in_order=self.pairs,
            few_forms=self.few_forms,
            **sizes,
        )


def is_static(size: Any) -> bool:
    """Whether it is a number, and not the name of one (of a shape-polymorphic export)."""
    return isinstance(size, int)


def without_alignment(num_pairs: Any, num_experts: int) -> bool:
    """Whether block i is pair i."""
    return is_static(num_pairs) and PAIRS_PER_EXPERT * num_pairs <= num_experts


def kind_of_blocks(
    weights: Weights, hidden: int, ffn: int, e4m3: bool = False, bias_down: bool = False
) -> str:
    """Whether blocks of any multiple of 8 rows are tiles of both products
    (`choose_tiles.takes_whole`), and whether these may have several heights (`config.with_heights`)."""
    parted = weights.gated and weights.interleaved and not weights.transposed
    whole = all(size % 64 == 0 and size > 64 for size in (hidden, ffn))
    spills = weights.activation == "gelu" or weights.activation == "gelu_tanh" and not weights.gated
    if not whole or e4m3 or parted or spills:
        return POWERS_OF_TWO
    return ANY_ROWS if weights.bias or bias_down else HEIGHTS


def block_sizes(num_experts: int, kind: str = HEIGHTS) -> tuple[tuple[float, int], ...]:
    """(Most pairs per expert, rows per block), ascending; the last one has no limit."""
    if kind == POWERS_OF_TWO:
        return _POWERS_OF_TWO
    if num_experts <= _FEW:
        return _EIGHT_EXPERTS if num_experts <= _EIGHT else _FEW_EXPERTS
    if kind != HEIGHTS:
        return _MANY_OF_ONE_HEIGHT
    return _OF_128_EXPERTS if num_experts == 128 else _MANY_EXPERTS


def block_size_for(num_pairs: Any, num_experts: int, kind: str = HEIGHTS) -> int:
    """Rows per block, of `block_sizes`."""
    if not is_static(num_pairs):
        return UNKNOWN_ROWS
    mean = num_pairs / max(1, num_experts)
    return next(rows for most, rows in block_sizes(num_experts, kind) if mean <= most)
