"""Tiles of the kernel that sums up each token's pairs, and what it cannot take. No jax here."""

from typing import NamedTuple

from moe_align_jax._core.hopper import MAX_SHARED_BYTES, NUM_SMS
from moe_align_jax._grouped_matmul import choose_tiles, config
from moe_align_jax._grouped_matmul.problem import MatmulProblem, TokenSum

WEIGHT_ROWS = 64  # wgmma's: columns of the result times pairs
X_ROWS = 8  # wgmma's least
# Tiles that keep the memory busy, each of a CTA: where a pair's k is one stage, and where it is more.
_ENOUGH, _ENOUGH_OF_STAGES = 100, 190
_DEEP = 256  # of k in a stage
_SPARE_BYTES = 4096  # of shared memory, for what is not the ring
# One H200, 2026-11-29, device span under jit in us, of the second product and the sum of a layer;
# "two": a product and XLA's sum. By pairs x columns x bk, stages, and CTAs, where these are not 264.
#   DeepSeek-V3 TP8, 1 token: two 11.0; 1x64x256 s3 8.8, s2 8.9, s6 (132) 9.2; 2x32x256 s3 9.1
#   2 tokens: two 17.6; 1x64x256 s3 15.4, 1x64x128 s6 15.7; 4 tokens: two 31.8; 28.8, 28.8; 8: two 57.6; 52.7
#   Qwen3-30B-A3B, 1 token: two 9.6; 4x16x128 s6 7.9, 4x16x256 s3 8.0, 4x16x384 s2 8.6, 2x32x256 s6 (132) 8.3
#   2 tokens: two 15.3; 2x32x256 s3 14.0, 4x16x256 s3 13.7, 1x64x256 s3 16.3
#   4 tokens: two 24.8; 2x32x256 s3 22.7, 1x64x256 s3 23.4
#   Mixtral 8x7B, 1 token: two 57.3; 2x32x256 s3 55.3, s6 (132) 54.3; 2x32x128 s12 (132) 54.6
#   GPT-OSS 120B, 1 token: two 19.4; 4x16x256 s3 18.0, 2x32x256 s6 (132) 17.8, s3 19.9, 1x64x256 s3 27.9
# Clusters of two or four CTAs that share a tile's pairs lost: Qwen3, 1 token 10.1, two 9.9.


class Tiles(NamedTuple):
    """Sizes of the kernel.

    Attributes:
        pairs: of a token that are multiplied together; each has 64 / pairs columns of the result.
        bk: of k that a stage of the ring in shared memory holds.
        stages: of the ring.
        num_ctas: of the grid.
    """

    pairs: int
    bk: int
    stages: int
    num_ctas: int = 2 * NUM_SMS

    @property
    def columns(self) -> int:
        """Of the result, of a tile."""
        return WEIGHT_ROWS // self.pairs

    @property
    def name(self) -> str:
        """For tables: `2x32x256s3-sums-264`."""
        return f"{self.pairs}x{self.columns}x{self.bk}s{self.stages}-sums-{self.num_ctas}"


def unsupported(problem: TokenSum) -> str | None:
    """Why the kernel does not take this problem, or None."""
    product = problem.product
    if reason := config.unsupported(product):
        return reason
    if product.scales or product.row_weights or product.top_k or product.weights.activation:
        return "the sum of a token's pairs is of rows as they are, without scales"
    if product.rows != "blocks" or product.block_size != 1:
        return "the sum of a token's pairs is of blocks of one pair"
    if product.k % 64 or (product.n % 64 and not product.weights.transposed):
        return "the sum of a token's pairs reads 128 bytes of a row of x and of the weights"
    if not problem.num_tokens or problem.top_k < 2:
        return "there is nothing to sum up"
    return None


def refused(problem: TokenSum, tiles: Tiles) -> str | None:
    """Why these tiles, given by name, cannot be this problem's, or None."""
    if reason := unsupported(problem):
        return reason
    if tiles.pairs not in (1, 2, 4) or tiles.pairs > problem.top_k:
        return "1, 2 or 4 of a token's pairs are multiplied together"
    if tiles.pairs > 1 and not problem.product.weights.transposed:
        return "of weights [E, K, N] TMA reads 64 columns, for one pair"
    if tiles.bk % 64 or tiles.bk > 512:
        return "a stage holds multiples of 128 bytes of a row"
    if stage_bytes(tiles.bk) * tiles.stages + _SPARE_BYTES > MAX_SHARED_BYTES:
        return "the ring does not fit into shared memory"
    return None


def stage_bytes(bk: int) -> int:
    """Shared memory of a stage of the ring."""
    return 2 * bk * (WEIGHT_ROWS + X_ROWS)


def config_for(problem: TokenSum) -> Tiles | None:
    """Tiles for a problem; None where the kernel does not take it, or two launches may be faster."""
    if unsupported(problem):
        return None
    product = problem.product
    of_token = -(-product.n // WEIGHT_ROWS)  # tiles of one pair
    whole = problem.num_tokens * of_token
    choices = [
        p for p in (1, 2, 4) if p <= problem.top_k and (p == 1 or product.weights.transposed)
    ]
    enough = _ENOUGH if product.k <= _DEEP else _ENOUGH_OF_STAGES
    counted = of_token if product.few_forms else whole
    pairs = next((p for p in choices if p * counted >= enough), choices[-1])
    if pairs * whole < min(_ENOUGH, _ctas_of_product(product)):
        return None
    return Tiles(pairs, _DEEP, 3)


def _ctas_of_product(product: MatmulProblem) -> int:
    """That have a tile of the product alone, or a part of one."""
    tiles = choose_tiles.config_for(product)
    return product.num_blocks * -(-product.n // tiles.bn) * tiles.split
