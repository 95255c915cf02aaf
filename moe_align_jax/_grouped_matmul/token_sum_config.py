"""Tiles of the kernel that sums up each token's pairs, and what it cannot take. No jax here."""

from typing import NamedTuple

from moe_align_jax._core.hopper import MAX_SHARED_BYTES, NUM_SMS
from moe_align_jax._grouped_matmul import config as products
from moe_align_jax._grouped_matmul.problem import TokenSum

WEIGHT_ROWS = 64  # wgmma's: columns of the result times pairs
X_ROWS = 8  # wgmma's least
_SPARE_BYTES = 4096  # of shared memory, for what is not the ring


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
    if reason := products.unsupported(product):
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
    """Tiles for a problem; None where the kernel does not take it, or where it was not found faster."""
    if unsupported(problem):
        return None
    return Tiles(1, 256, 3)
