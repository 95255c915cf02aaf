"""One problem or more for each form of the kernels: what lowering, vmap and the sanitizers go through."""

import itertools
from typing import Any, NamedTuple

import numpy as np

from moe_align_jax._align import kernels, tables
from moe_align_jax._align.config import BlockAlignMosaicConfig, pairs_per_round
from moe_align_jax._core import checks
from moe_align_jax._core.int32 import cdiv
from moe_align_jax.types import AlignProblem
from tests import oracle


class Variant(NamedTuple):
    """What differs between the kernels of one form, beyond numbers.

    Attributes:
        form: of the config, as are `clusters` (there are any) and `local_sort`.
        ctas, rounds, tiles: whether there are several: CTAs, pairs per thread, and tiles of them.
        num_kernels: launches of a call.
    """

    form: str
    ctas: bool
    clusters: bool
    local_sort: bool
    rounds: bool
    tiles: bool
    num_kernels: int

    def __str__(self) -> str:
        words = [self.form]
        words += ["cluster"] * (self.clusters and self.form != "cluster")
        words += ["ctas"] * (self.ctas and not self.clusters and self.form not in ("grid", "radix"))
        words += ["local_sort"] * self.local_sort
        words += ["tiles" if self.tiles else "rounds"] * (self.rounds and not self.local_sort)
        words += ["tiles"] * (self.tiles and self.local_sort)
        words += [f"{self.num_kernels} kernels"] * (self.num_kernels > 2)
        return " ".join(words)


class Size(NamedTuple):
    """The static size of a call."""

    num_pairs: int
    num_experts: int
    block_size: int

    @property
    def form(self) -> str:
        return tables.config_for(problem(self, OPTIONS[0])).form

    @property
    def variant(self) -> Variant:
        return variant_of(self, tables.config_for(problem(self, OPTIONS[0])))


WARP, BLOCK = tables.MAX_WARP_PAIRS, tables.MAX_BLOCK_PAIRS
EXPERTS = tables.MAX_HISTOGRAM_EXPERTS

# Both sides of each threshold of _align.tables, and the E that the peers name.
SIZES = (
    *(Size(1, 1, 1), Size(8, 256, 16), Size(WARP, 65_535, 4)),
    *(Size(WARP + 1, 64, 16), Size(512, 256, 16), Size(1000, 1000, 64)),
    *(Size(BLOCK, EXPERTS, 16), Size(BLOCK, 1, 64), Size(BLOCK + 1, 1, 64)),
    *(Size(4000, 128, 64), Size(8192, 64, 128), Size(8192, EXPERTS, 8), Size(70_000, 256, 128)),
    *(Size(140_000, 60, 64), Size(WARP + 1, EXPERTS + 1, 16), Size(200, 3000, 8)),
    *(Size(300, 9000, 16), Size(16_000, 65_535, 4), Size(17_000, 9000, 8)),
    # The variants that the thresholds leave out; the last but one has several tiles.
    *(Size(40, 64, 128), Size(270, 60, 1), Size(33, 65_535, 4), Size(1100, 256, 16)),
    *(Size(1100, 64, 16), Size(2100, 600, 16), Size(8200, 100, 32)),
    *(Size(4100, 100, 16), Size(32_600, 9000, 8)),
    *(Size(66_000, EXPERTS, 8), Size(33_000, 9000, 8)),
)

# Every combination of what changes the program. Values are made by `arguments` in helpers.
OPTIONS: tuple[dict[str, Any], ...] = tuple(
    {"map": mode, "num_valid_pairs": valid, "return_inverse": inverse, "pad_sorted_ids": pad}
    for mode, valid, inverse, pad in itertools.product(
        ("", "label", "filter"), (False, True), (False, True), (False, True)
    )
)
# The fewest in which every two values of different options meet.
PAIRWISE = tuple(OPTIONS[i] for i in (0, 7, 11, 12, 18, 21))

BATCHED_SIZES = ((8, 16, 8), (64, 1, 4), (256, 512, 64), (1000, 13, 16))  # E, max_tokens, block


def ids_of(size: Size, seed: int = 0, dtype: str = "int32") -> np.ndarray:
    """`[n, 1]` random ids, half of them out of range."""
    return oracle.route(
        "outside",
        num_tokens=size.num_pairs,
        top_k=1,
        num_experts=size.num_experts,
        dtype=dtype,
        seed=seed,
    )


def location_sizes(
    size: Size, dispatch: str, num_layers: int = 0, num_shared: int = 0
) -> dict[str, Any]:
    """The fields of AlignProblem for logical ids: top-4, up to 32 redundant slots."""
    if not dispatch:
        return {}
    num_logical = size.num_experts - min(size.num_experts - 1, 32)
    width = size.num_experts - num_logical + 1 if dispatch == "dynamic" else 0
    return {
        "dispatch": dispatch,
        "num_logical": num_logical,
        "replica_width": width,
        "top_k": 4 if dispatch == "dynamic" or num_shared else 1,
        "num_layers": num_layers,
        "num_shared": num_shared,
    }


def problem(size: Size, options: dict[str, Any], id_words: int = 1) -> AlignProblem:
    padded = checks.max_num_tokens_padded(
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


def variant_of(size: Size, config: BlockAlignMosaicConfig) -> Variant:
    """Of the kernels that a fitted config makes for a size."""
    threads = pairs_per_round(config) or 0
    if config.form == "radix":
        threads = config.num_ctas * config.num_warpgroups * 128
    rounds = cdiv(size.num_pairs, threads) if threads else 1
    tiled = config.form in ("cluster", "grid", "radix")
    return Variant(
        form=config.form,
        ctas=config.num_ctas > 1,
        clusters=config.cluster > 1,
        local_sort=config.local_sort,
        rounds=rounds > 1,
        tiles=tiled and rounds > config.rounds,
        num_kernels=len(kernels.build(problem(size, OPTIONS[0]), config).kernels),
    )


def sizes_and_options() -> list[tuple[Size, dict[str, Any]]]:
    """Every combination of options for one size of each form, every two values together for the others."""
    whole: dict[str, Size] = {}
    for size in sorted(SIZES, key=lambda size: (size.num_experts == 1, size.num_pairs)):
        whole.setdefault(size.form, size)
    return [
        (size, options)
        for size in SIZES
        for options in (OPTIONS if size in whole.values() else PAIRWISE)
    ]
