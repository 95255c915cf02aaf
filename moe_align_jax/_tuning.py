"""Which form and sizes a problem takes: a table per kind of GPU, a rule where there is none. A leaf, no jax.

The tables are `data/tuning/*.json`, written by `moe-align tune`. `AlignProblem.tuning` names the one that
counts: that of the process's (or torch's) CUDA device, found by `table_name`; "" is the default table, for
lowering where no GPU is at hand.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_align_jax.types import AlignProblem, BatchedAlignProblem

DEFAULT_TABLE = "nvidia_h200"
HEURISTIC = "heuristic"  # in place of a table's name
FOLDER_VARIABLE = "MOE_ALIGN_TUNING_DIR"  # a folder of tables that come before the package's own

# Limits of the kernels, whatever a table says.
MAX_WARP_PAIRS = 32  # of "warp": a lane each
MAX_COMPARED_PAIRS = 256  # of "pairs", which compares each with all
MAX_SORTED_PAIRS = 16_384  # of "sorted": under skew one CTA's shared memory holds all, three times
MAX_HISTOGRAM_EXPERTS = 4096  # of WITH_HISTOGRAMS: one per warp has to fit
WITH_HISTOGRAMS = ("block", "cluster", "grid")
MAX_CLUSTER = 8  # CTAs that every GPU with clusters puts into one
_MAX_GRID_ROUNDS = 8  # of "grid", which keeps a tile in registers and shared memory
_MAX_SORTED_ROUNDS = 16  # of "sorted", which keeps all ids in registers
_MAX_DIGIT_BITS = 8  # of "sorted"
_MOST_CELLS = 2**31 - 2**24  # of "sorted": beyond, its loops over rows could wrap
_SHARED_WORDS = 232_448 // 4
# Of the heuristic: where "block" ends.
MAX_BLOCK_PAIRS = 2048


@dataclass(frozen=True, kw_only=True)
class BlockAlignMosaicConfig:
    """One way to run the alignment on a GPU. In a table sizes are upper bounds, which `fit` lowers.

    Attributes:
        form: "warp", "pairs", "block", "cluster", "grid", "sorted", "radix" or "batched": a file of
            `_kernels/block_align`.
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


_NOT_OF_A_NAME = re.compile(r"[^a-z0-9]+")
_CONFIG_FIELDS = frozenset(field.name for field in dataclasses.fields(BlockAlignMosaicConfig))


_RADIX = BlockAlignMosaicConfig(form="radix", num_warpgroups=2, num_ctas=128, rounds=8)  # any size


class Row(NamedTuple):
    """A line of a table.

    Attributes:
        first_expert, last_expert: the E that it serves, both included; None for no end.
        num_pairs: up to this many pairs, from the line before on; None for no end.
        config: its choice, before `fit`.
        us: device time per call that was measured at its largest size, None where it was not.
    """

    first_expert: int
    last_expert: int | None
    num_pairs: int | None
    config: BlockAlignMosaicConfig
    us: float | None = None


class Table(NamedTuple):
    """The choices for one kind of GPU.

    Attributes:
        gpu: its kind, as CUDA names it.
        jax: the release that it was measured with.
        date: day of the measurement, ISO.
        made_by: the program, or who.
        batched: the choice for `batched_moe_align_block_size`.
        rows: by first_expert, then num_pairs; every (E, pairs) has one.
    """

    gpu: str
    jax: str
    date: str
    made_by: str
    batched: BlockAlignMosaicConfig
    rows: tuple[Row, ...]


# -- reading and writing tables -------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def parse_table(text: str, source: str = "the table") -> Table:
    """A table from its JSON; see `write_table`.

    Raises:
        ValueError: an unknown or missing field, or sizes without a row; the message names the place.
    """
    content = json.loads(text)
    wanted = set(Table._fields)
    if set(content) != wanted:
        raise ValueError(f"{source} must have the fields {sorted(wanted)}; got {sorted(content)}.")
    rows = [_parse_row(row, f"{source}, row {i}") for i, row in enumerate(content["rows"])]
    _check_cover(rows, source)
    return Table(
        **{name: str(content[name]) for name in ("gpu", "jax", "date", "made_by")},
        batched=_parse_config(content["batched"], f"{source}, batched"),
        rows=tuple(rows),
    )


def _parse_row(row: Mapping[str, Any], place: str) -> Row:
    needed, known = {"num_experts", "num_pairs", "config"}, {"us"}
    if not needed <= set(row) <= needed | known:
        fields = sorted(needed | known)
        raise ValueError(f"{place}: the fields must be {fields}; got {sorted(row)}.")
    first, last = row["num_experts"]
    config = _parse_config(row["config"], place)
    pairs = row["num_pairs"]
    if reason := refusal(config, last, pairs):
        raise ValueError(f"{place}: {reason}.")
    return Row(first, last, pairs, config, row.get("us"))


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
        if config.num_ctas not in (2, 4, MAX_CLUSTER) or num_pairs is None or num_pairs > most:
            return (
                f"'cluster' must have 2, 4 or {MAX_CLUSTER} CTAs and one tile; "
                f"got {config.num_ctas} CTAs, which hold {most} pairs, for {num_pairs}"
            )
    if config.cluster > MAX_CLUSTER:
        return f"a cluster must have at most {MAX_CLUSTER} CTAs; got {config.cluster}"
    return None


def _parse_config(config: Mapping[str, Any], place: str) -> BlockAlignMosaicConfig:
    if unknown := sorted(config.keys() - _CONFIG_FIELDS):
        known = sorted(_CONFIG_FIELDS)
        raise ValueError(f"{place}: a config has the fields {known}; got {unknown}.")
    try:
        return BlockAlignMosaicConfig(**config)
    except TypeError as error:
        raise ValueError(f"{place}: {error}.") from None


def _check_cover(rows: list[Row], source: str) -> None:
    """Every E from 1 on in one range, every number of pairs from 1 on in one row of it."""
    ranges = list(dict.fromkeys((row.first_expert, row.last_expert) for row in rows))
    ends = [0, *(last for _, last in ranges)]
    starts = [first for first, _ in ranges]
    if (
        not rows
        or ends[-1] is not None
        or starts != [None if e is None else e + 1 for e in ends[:-1]]
    ):
        raise ValueError(f"{source}: the rows must serve every num_experts once; got {ranges}.")
    for which in ranges:
        pairs = [row.num_pairs for row in rows if (row.first_expert, row.last_expert) == which]
        bounded = pairs[:-1]
        if pairs[-1] is not None or None in bounded or bounded != sorted(set(bounded)):  # type: ignore[type-var]
            raise ValueError(
                f"{source}: num_pairs must ascend to null for num_experts {list(which)}; got {pairs}."
            )


def format_table(table: Table) -> str:
    """The JSON of a table, a line per row; defaults are left out."""

    def config_of(config: BlockAlignMosaicConfig) -> dict[str, Any]:
        return {
            field.name: value
            for field in dataclasses.fields(config)
            if (value := getattr(config, field.name)) != field.default
        }

    facts = [
        f' "{name}": {json.dumps(getattr(table, name))},'
        for name in ("gpu", "jax", "date", "made_by")
    ]
    lines = []
    for row in table.rows:
        line = {
            "num_experts": [row.first_expert, row.last_expert],
            "num_pairs": row.num_pairs,
            "config": config_of(row.config),
        }
        lines.append(json.dumps(line if row.us is None else {**line, "us": row.us}))
    batched = f' "batched": {json.dumps(config_of(table.batched))},'
    rows = ",\n".join(f"  {line}" for line in lines)
    return "\n".join(["{", *facts, batched, ' "rows": [', rows, " ]", "}", ""])


def folders() -> list[Path]:
    """Where tables are looked for, in this order."""
    given = os.environ.get(FOLDER_VARIABLE)
    own = Path(__file__).parent / "data" / "tuning"
    return [Path(given), own] if given else [own]


def _tables_in(folder: Path) -> list[Path]:
    # Not by glob: the first one of a process compiles its pattern, and a first call waits for it.
    return [x for x in folder.iterdir() if x.suffix == ".json"] if folder.is_dir() else []


@functools.cache
def _paths() -> dict[str, Path]:
    return {path.stem: path for folder in reversed(folders()) for path in _tables_in(folder)}


def preload() -> None:
    """Parses the package's own tables, so that a later `table` need not: of text that it meets again."""
    for path in _tables_in(folders()[-1]):
        parse_table(path.read_text(), path.name)


@functools.cache
def table(name: str) -> Table | None:
    """The table of `AlignProblem.tuning`: "" is the default one, "heuristic" none."""
    if name == HEURISTIC:
        return None
    path = _paths()[name or DEFAULT_TABLE]
    return parse_table(path.read_text(), path.name)


def stem_of(device_kind: str) -> str:
    """The file name, without ".json", for a kind of GPU."""
    return _NOT_OF_A_NAME.sub("_", device_kind.lower()).strip("_")


@functools.cache
def table_name(device_kind: str | None) -> str:
    """Which table serves a GPU, as `AlignProblem.tuning` has it.

    The longest name that begins the kind's: "nvidia_h100" serves "NVIDIA H100 80GB HBM3" unless there is
    an "nvidia_h100_80gb_hbm3". None is no GPU: "", the default table.
    """
    if device_kind is None:
        return ""
    stem = stem_of(device_kind)
    fitting = [name for name in _paths() if f"{stem}_".startswith(f"{name}_")]
    return max(fitting, key=len, default=HEURISTIC)


def describe(name: str) -> str:
    """One line about what `AlignProblem.tuning` names."""
    found = table(name)
    if found is None:
        return "a rule by size: this kind of GPU has no table (`moe-align tune` makes one)"
    why = "" if name else "no GPU here, so the default: "
    return f"{why}the table of {found.gpu}, {found.date}, jax {found.jax}"


# -- choosing -------------------------------------------------------------------------------------


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def row_for(num_pairs: int, num_experts: int, tuning: str = "") -> Row:
    """The row that serves a size, of a table or of the heuristic."""
    chosen = table(tuning)
    if chosen is None:
        return heuristic(num_pairs, num_experts)
    for row in chosen.rows:
        if row.last_expert is not None and num_experts > row.last_expert:
            continue
        if row.num_pairs is None or num_pairs <= row.num_pairs:
            return row
    raise ValueError(f"the table {tuning!r} has no row for {num_pairs} pairs, E = {num_experts}.")


def heuristic(num_pairs: int, num_experts: int) -> Row:
    """For a GPU without a table: work for every thread before more CTAs, up to one CTA per SM.

    The numbers are shares of work, not sizes at which forms were seen to cross on one card.
    """
    end = max(MAX_WARP_PAIRS, _power_of_two(num_pairs))
    if num_pairs <= MAX_WARP_PAIRS:
        config = BlockAlignMosaicConfig(
            form="warp", num_warpgroups=1, num_ctas=64, cells_per_cta=8192
        )
    elif num_experts > MAX_HISTOGRAM_EXPERTS and num_pairs <= MAX_COMPARED_PAIRS:
        config = BlockAlignMosaicConfig(
            form="pairs", num_warpgroups=4, num_ctas=64, cells_per_cta=8192
        )
    elif num_experts > MAX_HISTOGRAM_EXPERTS and num_pairs <= MAX_SORTED_PAIRS:
        groups = min(8, max(1, end // 128))  # a pair per thread
        cluster = 1 if end <= 512 else MAX_CLUSTER  # its barrier against the length of the sort
        config = BlockAlignMosaicConfig(
            form="sorted", num_warpgroups=groups, num_ctas=64, cluster=cluster, cells_per_cta=1024
        )
    elif num_experts > MAX_HISTOGRAM_EXPERTS:
        config = _RADIX
    elif num_pairs <= MAX_BLOCK_PAIRS:
        groups = min(4, max(1, end // 256))  # two pairs per thread
        config = BlockAlignMosaicConfig(
            form="block", num_warpgroups=groups, num_ctas=16, cells_per_cta=1024
        )
    else:
        # 256 threads with a pair each, then more rounds, then more threads.
        ctas = min(128, end // 256)
        groups = min(8, max(2, end // (ctas * 128 * _MAX_GRID_ROUNDS)))
        config = BlockAlignMosaicConfig(
            form="grid",
            num_warpgroups=groups,
            num_ctas=ctas,
            rounds=_MAX_GRID_ROUNDS,
            local_sort=True,
            cluster=8,
        )
    return Row(1, None, end, config)


def config_for(problem: AlignProblem | BatchedAlignProblem) -> BlockAlignMosaicConfig:
    """The configuration that `problem.tuning` chooses, fitted to the problem."""
    if isinstance(problem, BatchedAlignProblem):
        return fit((table(problem.tuning) or table("")).batched, problem)  # type: ignore[union-attr]
    return fit(row_for(problem.num_pairs, problem.num_experts, problem.tuning).config, problem)


def fit(
    config: BlockAlignMosaicConfig, problem: AlignProblem | BatchedAlignProblem
) -> BlockAlignMosaicConfig:
    """`config` with its sizes lowered to what the problem needs and shared memory holds."""
    return _FITS[config.form](config, problem)


def _fit_warp(config: BlockAlignMosaicConfig, problem: Any) -> BlockAlignMosaicConfig:
    # 128 threads write 2K cells in a few rounds; more cells take more CTAs.
    ctas = max(problem.capacity, problem.num_experts) // config.cells_per_cta
    return dataclasses.replace(config, num_ctas=min(config.num_ctas, max(1, ctas)))


def _fit_pairs(config: BlockAlignMosaicConfig, problem: Any) -> BlockAlignMosaicConfig:
    groups = max(config.num_warpgroups, _cdiv(_power_of_two(problem.num_pairs), 128))
    return dataclasses.replace(_fit_warp(config, problem), num_warpgroups=groups)


def _fit_block(config: BlockAlignMosaicConfig, problem: Any) -> BlockAlignMosaicConfig:
    # Every CTA does all the counting; one per share of rows saves more on writing than its launch costs.
    num_experts = problem.num_experts
    return dataclasses.replace(
        config,
        num_warpgroups=_warpgroups_that_fit(
            num_experts, config.num_warpgroups, other_words=num_experts + 64
        ),
        num_ctas=min(config.num_ctas, _cdiv(problem.capacity, config.cells_per_cta)),
    )


def _fit_grid(config: BlockAlignMosaicConfig, problem: Any) -> BlockAlignMosaicConfig:
    stride = _cdiv(problem.num_experts, 4) * 4
    tile_words = 2 * config.rounds * config.num_warpgroups * 128
    groups = _warpgroups_that_fit(
        problem.num_experts, config.num_warpgroups, other_words=4 * stride + tile_words + 128
    )
    rounds = min(config.rounds, _cdiv(problem.num_pairs, config.num_ctas * groups * 128))
    sort = config.local_sort and rounds >= 2
    cluster = _cluster_within(config.cluster, config.num_ctas)
    return dataclasses.replace(
        config, num_warpgroups=groups, rounds=rounds, local_sort=sort, cluster=cluster
    )


def _fit_cluster(config: BlockAlignMosaicConfig, problem: Any) -> BlockAlignMosaicConfig:
    fitted = _fit_grid(dataclasses.replace(config, cluster=config.num_ctas), problem)
    tile = fitted.num_ctas * fitted.num_warpgroups * 128 * fitted.rounds
    # Many experts leave room for few warps; "grid" takes several tiles.
    return dataclasses.replace(fitted, form="grid") if problem.num_pairs > tile else fitted


def _cluster_within(wanted: int, num_ctas: int) -> int:
    """The largest power of two up to `wanted` that divides the CTAs."""
    return min(wanted, num_ctas & -num_ctas)


def sorted_range(num_experts: int, num_ctas: int, cluster: int) -> int:
    """Experts whose pairs one CTA of "sorted" sorts: whole slices of the counts, of a multiple of 4."""
    return _cdiv(num_experts, num_ctas * 4) * 4 * (num_ctas // cluster)


def sorted_digits(num_keys: int) -> list[tuple[int, int]]:
    """(shift, bits) of each pass of "sorted" over the keys 0 .. num_keys - 1."""
    key_bits = (num_keys - 1).bit_length()
    bits = _cdiv(key_bits, max(1, _cdiv(key_bits, _MAX_DIGIT_BITS)))
    return [(shift, min(bits, key_bits - shift)) for shift in range(0, key_bits, bits or 1)]


def _fit_sorted(config: BlockAlignMosaicConfig, problem: Any) -> BlockAlignMosaicConfig:
    n, num_experts = problem.num_pairs, problem.num_experts
    most = _power_of_two(_cdiv(n, 128))  # a pair per thread
    groups = max(min(config.num_warpgroups, most), _cdiv(most, _MAX_SORTED_ROUNDS))
    cluster = 1 << (config.cluster.bit_length() - 1)
    cells = max(problem.capacity, num_experts)
    ctas = min(config.num_ctas, _cdiv(cells, config.cells_per_cta))
    while True:
        copies = max(1, ctas // cluster)
        experts = sorted_range(num_experts, copies * cluster, cluster)
        if experts <= 1 << 16 or cluster == MAX_CLUSTER:
            break
        cluster *= 2
    bins = sum(1 << bits for _, bits in sorted_digits(experts))
    words = 3 * _cdiv(n, groups * 128) * groups * 128 + (groups * 4 + 1) * bins + 128
    # An expert's place in its range and a pair share a word.
    if n > MAX_SORTED_PAIRS or experts > 1 << 16 or words > _SHARED_WORDS or cells > _MOST_CELLS:
        return _fit_radix(_RADIX, problem)
    return dataclasses.replace(
        config, num_warpgroups=groups, num_ctas=copies * cluster, cluster=cluster
    )


def _fit_radix(config: BlockAlignMosaicConfig, problem: Any) -> BlockAlignMosaicConfig:
    threads = config.num_warpgroups * 128
    ctas = min(config.num_ctas, _cdiv(problem.num_pairs, threads))
    rounds = min(config.rounds, _cdiv(problem.num_pairs, ctas * threads))
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
    stride = _cdiv(num_experts, 4) * 4
    while wanted > 1 and wanted * 4 * stride + other_words > _SHARED_WORDS:
        wanted //= 2
    return wanted


# -- programs that are sized at launch ------------------------------------------------------------


def _pairs_per_round(config: BlockAlignMosaicConfig) -> int | None:
    """Pairs that a one-tile program takes in one round of all its threads; None where rounds do not count."""
    form, ctas = config.form, config.num_ctas
    ctas = {"block": 1, "sorted": 1, "cluster": ctas, "grid": ctas}.get(form)
    return ctas and ctas * config.num_warpgroups * 128


def size_bucket(num_pairs: int, num_experts: int, block_size: int, tuning: str = "") -> int:
    """The size up to which one program that is sized at launch serves `num_pairs` pairs.

    A bucket lies within one row of the table, so `config_for` at its end is the configuration of all of it.
    Such a program does the work of its largest size in rounds of 32 pairs per warp, so buckets end where
    one more round begins, at most two per power of two. Elsewhere (several tiles are counted at launch)
    buckets are powers of two.
    """
    row, power = row_for(num_pairs, num_experts, tuning), _power_of_two(num_pairs)
    end = power if row.num_pairs is None else row.num_pairs
    capacity = end + num_experts * (block_size - 1)
    config = fit(row.config, AlignProblem(end, num_experts, block_size, capacity, tuning=tuning))
    step = _pairs_per_round(config)
    several_tiles = config.form == "grid" and step and num_pairs > row.config.rounds * step
    if step is None or several_tiles:
        bucket = max(8, power)
    else:
        step = max(step, power // 4)
        bucket = _cdiv(num_pairs, step) * step
    return bucket if row.num_pairs is None else min(bucket, row.num_pairs)
