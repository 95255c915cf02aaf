"""Configurations of the kernels, and which one a size takes. A leaf: imports nothing of ours but types."""

from dataclasses import dataclass

from moe_align_jax.types import AlignProblem, BatchedAlignProblem

_SHARED_WORDS = 232_448 // 4


@dataclass(frozen=True, kw_only=True)
class BlockAlignMosaicConfig:
    """One way to run the alignment on a GPU.

    Attributes:
        form: "warp", "block", "grid", "radix" or "batched": a file of `_kernels/block_align`.
        num_warpgroups: warpgroups (of 128 threads) per CTA.
        num_ctas: CTAs of each kernel.
        rounds: pairs per thread and tile ("grid", "radix").
        local_sort: sort each tile by expert in shared memory before it is written ("grid").
    """

    form: str
    num_warpgroups: int
    num_ctas: int = 1
    rounds: int = 1
    local_sort: bool = False


MAX_WARP_PAIRS = 32
MAX_BLOCK_PAIRS = 2048
# "block": (up to this many pairs, warpgroups). "grid": (up to this many pairs, CTAs, warpgroups): small
# CTAs that all have work; 256 threads instead of 1,024 save 1.5 us at 8K pairs. H200, docs/measured.md.
_BLOCK_SIZES = ((64, 1), (512, 2), (MAX_BLOCK_PAIRS, 4))
_GRID_SIZES = ((4096, 16, 2), (8192, 32, 2), (32_768, 64, 2), (131_072, 128, 2), (524_288, 128, 8))
_MAX_ROUNDS = 4
MAX_HISTOGRAM_EXPERTS = 4096  # of "block" and "grid": a histogram per warp has to fit


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _warpgroups_that_fit(num_experts: int, wanted: int, other_words: int) -> int:
    """Warpgroups whose warps' histograms fit beside `other_words` of shared memory."""
    stride = _cdiv(num_experts, 4) * 4
    while wanted > 1 and wanted * 4 * stride + other_words > _SHARED_WORDS:
        wanted //= 2
    return wanted


def config_for(problem: AlignProblem | BatchedAlignProblem) -> BlockAlignMosaicConfig:
    """The heuristic: form by size, as measured on an H200 (docs/measured.md)."""
    if isinstance(problem, BatchedAlignProblem):
        ctas = min(128, max(1, problem.capacity // 4096))
        return BlockAlignMosaicConfig(form="batched", num_warpgroups=4, num_ctas=ctas)
    n, num_experts = problem.num_pairs, problem.num_experts
    if n <= MAX_WARP_PAIRS:
        # 128 threads write 2K cells in a few rounds; more cells take more CTAs.
        cells = max(problem.capacity, num_experts)
        ctas = min(64, max(1, cells // 8192))
        return BlockAlignMosaicConfig(form="warp", num_warpgroups=1, num_ctas=ctas)
    if num_experts > MAX_HISTOGRAM_EXPERTS:
        ctas = min(128, _cdiv(n, 256))
        rounds = min(8, _cdiv(n, ctas * 256))
        return BlockAlignMosaicConfig(form="radix", num_warpgroups=2, num_ctas=ctas, rounds=rounds)
    if n <= MAX_BLOCK_PAIRS:
        return _block_config(problem)
    return _grid_config(problem)


def _block_config(problem: AlignProblem) -> BlockAlignMosaicConfig:
    n, num_experts = problem.num_pairs, problem.num_experts
    wanted = next(groups for end, groups in _BLOCK_SIZES if n <= end)
    groups = _warpgroups_that_fit(num_experts, wanted, num_experts + 64)
    # Every CTA does all the counting; one per 1,024 rows saves more on writing than its launch costs.
    ctas = min(16, _cdiv(problem.capacity, 1024))
    return BlockAlignMosaicConfig(form="block", num_warpgroups=groups, num_ctas=ctas)


def _grid_config(problem: AlignProblem) -> BlockAlignMosaicConfig:
    n, num_experts = problem.num_pairs, problem.num_experts
    ctas, wanted = next((row[1:] for row in _GRID_SIZES if n <= row[0]), _GRID_SIZES[-1][1:])
    stride = _cdiv(num_experts, 4) * 4
    tile_words = 2 * _MAX_ROUNDS * wanted * 128
    groups = _warpgroups_that_fit(num_experts, wanted, 4 * stride + tile_words + 128)
    rounds = min(_MAX_ROUNDS, _cdiv(n, ctas * groups * 128))
    return BlockAlignMosaicConfig(
        form="grid",
        num_warpgroups=groups,
        num_ctas=ctas,
        rounds=rounds,
        local_sort=rounds >= 2,
    )


def size_bucket(num_pairs: int, num_experts: int, block_size: int) -> int:
    """The size up to which one program that is sized at launch serves `num_pairs` pairs.

    Such a program does the work of its largest size in rounds of 32 pairs per warp, so buckets end where
    one more round begins: `config_for` at a bucket's end is the configuration of all of it. Beyond one
    tile per CTA, tiles are counted at launch, and buckets are powers of two.
    """
    if num_pairs <= MAX_WARP_PAIRS:
        return max(8, _power_of_two(num_pairs))
    if num_experts > MAX_HISTOGRAM_EXPERTS:
        return _power_of_two(num_pairs)
    for end, *_ in (*_BLOCK_SIZES, *_GRID_SIZES):
        if num_pairs > end:
            continue
        problem = AlignProblem(end, num_experts, block_size, end + num_experts * (block_size - 1))
        config = config_for(problem)
        step = config.num_warpgroups * 128 * (config.num_ctas if config.form == "grid" else 1)
        if end > _MAX_ROUNDS * step and config.form == "grid":
            break  # several tiles
        return min(end, _cdiv(num_pairs, step) * step)
    return _power_of_two(num_pairs)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
