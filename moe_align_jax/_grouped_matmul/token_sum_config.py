"""Tiles of the kernel that sums up each token's pairs, and what it cannot take. No jax here."""

from moe_align_jax._core.hopper import MAX_SHARED_BYTES, NUM_SMS
from moe_align_jax._grouped_matmul import config as products
from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.problem import TokenSum

COLUMNS = 64  # of a tile
_ROWS = 8  # of x in a tile
_DEEP = 128  # of k in a stage
_SPLITS = (4, 2)  # CTAs of a cluster
# Two CTAs of a cluster of four must fit into an SM: not all SMs of a GPU can be filled with such clusters.
_STAGES, _STAGES_OF_HALF = 12, 6


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


def refused(problem: TokenSum, tiles: Config) -> str | None:
    """Why these tiles, given by name, cannot be this problem's, or None."""
    if reason := unsupported(problem):
        return reason
    if (tiles.form, tiles.bm, tiles.bn, tiles.computing) != ("swap", _ROWS, COLUMNS, 1):
        return "a token's pairs are summed up in swapped tiles of 64 columns, by one warpgroup"
    if tiles.bk % 64 or not _shares(problem, tiles.bk, tiles.split):
        return "each CTA of a cluster has as many pairs, or as many steps of one"
    if stage_bytes(tiles.bk) * tiles.stages + 8192 > MAX_SHARED_BYTES:
        return "the ring does not fit into shared memory"
    return None


def stage_bytes(bk: int) -> int:
    """Shared memory of a stage of the ring."""
    return 2 * bk * (COLUMNS + _ROWS)


def _shares(problem: TokenSum, bk: int, split: int) -> bool:
    """Whether so many CTAs can share a tile evenly. A bias is added to the products of all of k."""
    if problem.top_k % split == 0:
        return True
    steps, pieces = -(-problem.product.k // bk), split // problem.top_k
    even = split % problem.top_k == 0 and steps % pieces == 0
    return even and not problem.product.weights.bias


def config_for(problem: TokenSum) -> Config | None:
    """Tiles for a problem; None where the kernel does not take it, or where it was not found faster."""
    if unsupported(problem):
        return None
    tiles = problem.num_tokens * -(-problem.product.n // COLUMNS)
    split = next((s for s in _SPLITS if s * tiles <= NUM_SMS and _shares(problem, _DEEP, s)), 1)
    stages = _STAGES_OF_HALF if split > 2 else _STAGES
    found = Config("swap", _ROWS, COLUMNS, _DEEP, stages, group=0, computing=1)
    return found._replace(split=split, num_ctas=NUM_SMS // split * split)
