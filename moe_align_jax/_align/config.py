"""The forms of the alignment's kernels: their sizes, their limits, and sizes that fit a problem.

`_align.tables` chooses the form and sizes of a problem. Imports no jax.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from moe_align_jax._core.hopper import MAX_SHARED_BYTES
from moe_align_jax._core.int32 import cdiv
from moe_align_jax.types import AlignProblem, BatchedAlignProblem

# Limits of the kernels, whatever a table says.
MAX_WARP_PAIRS = 32  # of "warp": a lane each
MAX_WARP_EXPERTS = 2**26 - 1  # of "warp", whose sort has expert and lane in one word
MAX_COMPARED_PAIRS = 256  # of "pairs", which compares each with all
MAX_SORTED_PAIRS = 16_384  # of "sorted": under skew one CTA's shared memory holds all, three times
MAX_HISTOGRAM_EXPERTS = 4096  # of WITH_HISTOGRAMS: one per warp has to fit
WITH_HISTOGRAMS = ("block", "cluster", "grid")
PORTABLE_CLUSTER = 8  # the largest cluster that every GPU with clusters supports
MAX_GRID_ROUNDS = 8  # of "grid", which keeps a tile in registers and shared memory
_MOST_ROUNDS_OF_1024 = 6  # of "grid" with the inverse: a thread of 1024 has 64 registers
_MAX_SORTED_ROUNDS = 16  # of "sorted", which keeps all ids in registers
_MAX_DIGIT_BITS = 8  # of "sorted"
_MOST_CELLS = 2**31 - 2**24  # of "sorted": with more, its loop counters over rows could wrap
_SHARED_WORDS = MAX_SHARED_BYTES // 4


@dataclass(frozen=True, kw_only=True)
class BlockAlignMosaicConfig:
    """One way to run the alignment on a GPU. In a table sizes are upper bounds, which `fit` lowers.

    Attributes:
        form: "warp", "pairs", "block", "cluster", "grid", "sorted", "radix" or "batched": a file in
            `_align/kernels`.
        num_warpgroups: warpgroups (of 128 threads) per CTA.
        num_ctas: CTAs of each kernel.
        rounds: pairs per thread and tile ("cluster", "grid", "radix").
        local_sort: sort each tile by expert in shared memory before it is written ("cluster", "grid").
        cluster: CTAs that add up their histograms through each other's shared memory, a power of two up
            to 8; 1 for none ("grid", "radix"). Of "sorted": CTAs that share the experts.
        cells_per_cta: rows of output that make another CTA worth its launch ("warp", "pairs", "block",
            "sorted", "batched").
    """

    form: str
    num_warpgroups: int
    num_ctas: int = 1
    rounds: int = 1
    local_sort: bool = False
    cluster: int = 1
    cells_per_cta: int = 1


RADIX = BlockAlignMosaicConfig(form="radix", num_warpgroups=2, num_ctas=128, rounds=8)  # any size


def refusal(
    config: BlockAlignMosaicConfig, last_expert: int | None, num_pairs: int | None
) -> str | None:
    """Why a config cannot serve up to that many experts and pairs (None: any number), or None."""
    form = config.form
    if form not in _FITS or form == "batched":
        return f"the form must be one of {sorted(_FITS)}; got {form!r}"
    if form == "warp" and (num_pairs is None or num_pairs > MAX_WARP_PAIRS):
        return f"'warp' must end at {MAX_WARP_PAIRS} pairs; got {num_pairs}"
    if form == "pairs" and (num_pairs is None or num_pairs > MAX_COMPARED_PAIRS):
        return f"'pairs' must end at {MAX_COMPARED_PAIRS} pairs; got {num_pairs}"
    if form == "sorted" and (num_pairs is None or num_pairs > MAX_SORTED_PAIRS):
        return f"'sorted' must end at {MAX_SORTED_PAIRS} pairs; got {num_pairs}"
    if form in WITH_HISTOGRAMS and (last_expert is None or last_expert > MAX_HISTOGRAM_EXPERTS):
        return f"{form!r} must end at {MAX_HISTOGRAM_EXPERTS} experts; got {last_expert}"
    if form == "cluster":
        most = config.num_ctas * config.num_warpgroups * 128 * config.rounds
        if config.num_ctas not in (2, 4, PORTABLE_CLUSTER) or num_pairs is None or num_pairs > most:
            return (
                f"'cluster' must have 2, 4 or {PORTABLE_CLUSTER} CTAs and one tile; "
                f"got {config.num_ctas} CTAs, which hold {most} pairs, for {num_pairs}"
            )
    if config.cluster > PORTABLE_CLUSTER:
        return f"a cluster must have at most {PORTABLE_CLUSTER} CTAs; got {config.cluster}"
    return None


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def fit(
    config: BlockAlignMosaicConfig, problem: AlignProblem | BatchedAlignProblem
) -> BlockAlignMosaicConfig:
    """`config` with its sizes lowered to what the problem needs and shared memory holds."""
    return _FITS[config.form](config, problem)


def _fit_warp(config: BlockAlignMosaicConfig, problem: Any) -> BlockAlignMosaicConfig:
    if problem.num_experts > MAX_WARP_EXPERTS:
        config = dataclasses.replace(config, form="pairs")
    # 128 threads write 2K cells in a few rounds; more cells take more CTAs.
    ctas = max(problem.capacity, problem.num_experts) // config.cells_per_cta
    return dataclasses.replace(config, num_ctas=min(config.num_ctas, max(1, ctas)))


def _fit_pairs(config: BlockAlignMosaicConfig, problem: Any) -> BlockAlignMosaicConfig:
    groups = max(config.num_warpgroups, cdiv(power_of_two(problem.num_pairs), 128))
    return dataclasses.replace(_fit_warp(config, problem), num_warpgroups=groups)


def _fit_block(config: BlockAlignMosaicConfig, problem: Any) -> BlockAlignMosaicConfig:
    # Every CTA does all the counting; one per share of rows saves more on writing than its launch costs.
    num_experts = problem.num_experts
    return dataclasses.replace(
        config,
        num_warpgroups=_warpgroups_that_fit(
            num_experts, config.num_warpgroups, other_words=num_experts + 64
        ),
        num_ctas=min(config.num_ctas, cdiv(problem.capacity, config.cells_per_cta)),
    )


def _fit_grid(
    config: BlockAlignMosaicConfig, problem: Any, mailbox: int = 0
) -> BlockAlignMosaicConfig:
    stride = cdiv(problem.num_experts, 4) * 4
    tile_words = 2 * config.rounds * config.num_warpgroups * 128
    groups = _warpgroups_that_fit(
        problem.num_experts,
        config.num_warpgroups,
        other_words=4 * stride + tile_words + mailbox + 128,
    )
    rounds = min(config.rounds, cdiv(problem.num_pairs, config.num_ctas * groups * 128))
    if groups == 8 and problem.return_inverse:
        rounds = min(rounds, _MOST_ROUNDS_OF_1024)
    sort = config.local_sort and rounds >= 2
    cluster = _cluster_within(config.cluster, config.num_ctas)
    return dataclasses.replace(
        config, num_warpgroups=groups, rounds=rounds, local_sort=sort, cluster=cluster
    )


def _fit_cluster(config: BlockAlignMosaicConfig, problem: Any) -> BlockAlignMosaicConfig:
    mailbox = config.num_ctas * problem.num_experts  # every CTA's counts
    fitted = _fit_grid(dataclasses.replace(config, cluster=config.num_ctas), problem, mailbox)
    tile = fitted.num_ctas * fitted.num_warpgroups * 128 * fitted.rounds
    # Many experts leave room for few warps; "grid" takes several tiles.
    return dataclasses.replace(fitted, form="grid") if problem.num_pairs > tile else fitted


def _cluster_within(wanted: int, num_ctas: int) -> int:
    """The largest power of two up to `wanted` that divides the CTAs."""
    return min(wanted, num_ctas & -num_ctas)


def sorted_range(num_experts: int, num_ctas: int, cluster: int) -> int:
    """Experts whose pairs one CTA of "sorted" sorts: whole slices of the counts, of a multiple of 4."""
    return cdiv(num_experts, num_ctas * 4) * 4 * (num_ctas // cluster)


def sorted_digits(num_keys: int) -> list[tuple[int, int]]:
    """(shift, bits) of each pass of "sorted" over the keys 0 .. num_keys - 1."""
    key_bits = (num_keys - 1).bit_length()
    bits = cdiv(key_bits, max(1, cdiv(key_bits, _MAX_DIGIT_BITS)))
    return [(shift, min(bits, key_bits - shift)) for shift in range(0, key_bits, bits or 1)]


def _fit_sorted(config: BlockAlignMosaicConfig, problem: Any) -> BlockAlignMosaicConfig:
    n, num_experts = problem.num_pairs, problem.num_experts
    most = power_of_two(cdiv(n, 128))  # a pair per thread
    groups = max(min(config.num_warpgroups, most), cdiv(most, _MAX_SORTED_ROUNDS))
    cluster = 1 << (config.cluster.bit_length() - 1)
    cells = max(problem.capacity, num_experts)
    ctas = min(config.num_ctas, cdiv(cells, config.cells_per_cta))
    while True:
        copies = max(1, ctas // cluster)
        experts = sorted_range(num_experts, copies * cluster, cluster)
        if experts <= 1 << 16 or cluster == PORTABLE_CLUSTER:
            break
        cluster *= 2
    bins = sum(1 << bits for _, bits in sorted_digits(experts))
    words = 3 * cdiv(n, groups * 128) * groups * 128 + (groups * 4 + 1) * bins + 384
    # An expert's place in its range and a pair share a word.
    if n > MAX_SORTED_PAIRS or experts > 1 << 16 or words > _SHARED_WORDS or cells > _MOST_CELLS:
        return _fit_radix(RADIX, problem)
    return dataclasses.replace(
        config, num_warpgroups=groups, num_ctas=copies * cluster, cluster=cluster
    )


def _fit_radix(config: BlockAlignMosaicConfig, problem: Any) -> BlockAlignMosaicConfig:
    threads = config.num_warpgroups * 128
    ctas = min(config.num_ctas, cdiv(problem.num_pairs, threads))
    rounds = min(config.rounds, cdiv(problem.num_pairs, ctas * threads))
    cluster = _cluster_within(config.cluster, ctas)
    return dataclasses.replace(config, num_ctas=ctas, rounds=rounds, cluster=cluster)


def _fit_batched(config: BlockAlignMosaicConfig, problem: Any) -> BlockAlignMosaicConfig:
    ctas = problem.capacity // config.cells_per_cta
    return dataclasses.replace(config, num_ctas=min(config.num_ctas, max(1, ctas)))


_FITS = {
    "warp": _fit_warp,
    "pairs": _fit_pairs,
    "block": _fit_block,
    "cluster": _fit_cluster,
    "grid": _fit_grid,
    "sorted": _fit_sorted,
    "radix": _fit_radix,
    "batched": _fit_batched,
}


def _warpgroups_that_fit(num_experts: int, wanted: int, *, other_words: int) -> int:
    """Warpgroups whose warps' histograms fit beside `other_words` of shared memory."""
    stride = cdiv(num_experts, 4) * 4
    while wanted > 1 and wanted * 4 * stride + other_words > _SHARED_WORDS:
        wanted //= 2
    return wanted


def pairs_per_round(config: BlockAlignMosaicConfig) -> int | None:
    """Pairs that a one-tile program takes in one round of all its threads; None where rounds do not count."""
    form, ctas = config.form, config.num_ctas
    ctas = {"block": 1, "sorted": 1, "cluster": ctas, "grid": ctas}.get(form)
    return ctas and ctas * config.num_warpgroups * 128
