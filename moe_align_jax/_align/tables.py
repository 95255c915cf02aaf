"""Which form and sizes a problem takes: a table per kind of GPU, a rule where there is none. A leaf, no jax.

The tables are `data/tuning/*.json`, written by `python -m benchmarks.tune`. `AlignProblem.tuning` names the
one that counts: that of the process's (or torch's) CUDA device, found by `table_name`; "" is the default
table, for lowering where no GPU is at hand.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_align_jax._align.config import (
    MAX_COMPARED_PAIRS,
    MAX_GRID_ROUNDS,
    MAX_HISTOGRAM_EXPERTS,
    MAX_SORTED_PAIRS,
    MAX_WARP_PAIRS,
    PORTABLE_CLUSTER,
    RADIX,
    BlockAlignMosaicConfig,
    fit,
    pairs_per_round,
    power_of_two,
    refusal,
)
from moe_align_jax._core.int32 import cdiv
from moe_align_jax.types import AlignProblem, BatchedAlignProblem

DEFAULT_TABLE = "nvidia_h200"
HEURISTIC = "heuristic"  # in place of a table's name
# GPUs with the same chip and other memory: they use this table until they have their own.
SAME_CHIP = {
    "nvidia_h100": "nvidia_h200",
    "nvidia_h800": "nvidia_h200",
    "nvidia_gh200": "nvidia_h200",
}
FOLDER_VARIABLE = "MOE_ALIGN_TUNING_DIR"  # a folder of tables that come before the package's own

# Of the heuristic: where "block" ends.
MAX_BLOCK_PAIRS = 2048


_NOT_OF_A_NAME = re.compile(r"[^a-z0-9]+")
_CONFIG_FIELDS = frozenset(field.name for field in dataclasses.fields(BlockAlignMosaicConfig))


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
    own = Path(__file__).parents[1] / "data" / "tuning"
    return [Path(given), own] if given else [own]


def _tables_in(folder: Path) -> list[Path]:
    # Not by glob: its first use in a process compiles a pattern, which a first call would wait for.
    return [x for x in folder.iterdir() if x.suffix == ".json"] if folder.is_dir() else []


@functools.cache
def _paths() -> dict[str, Path]:
    return {path.stem: path for folder in reversed(folders()) for path in _tables_in(folder)}


def preload() -> None:
    """Parses the package's own tables, so that a later call of `table` finds them parsed."""
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
    an "nvidia_h100_80gb_hbm3". Without one, that of another GPU with the same chip, then the heuristic. None
    is no GPU: "", the default table.
    """
    if device_kind is None:
        return ""
    stem = f"{stem_of(device_kind)}_"
    fitting = [name for name in _paths() if stem.startswith(f"{name}_")]
    fitting = fitting or [name for kind, name in SAME_CHIP.items() if stem.startswith(f"{kind}_")]
    return max(fitting, key=len, default=HEURISTIC)


def describe(name: str) -> str:
    """One line that describes the table named by `AlignProblem.tuning`."""
    found = table(name)
    if found is None:
        return (
            "a rule by size: this kind of GPU has no table (`python -m benchmarks.tune` makes one)"
        )
    why = "" if name else "no GPU here, so the default: "
    return f"{why}the table of {found.gpu}, {found.date}, jax {found.jax}"


# -- choosing -------------------------------------------------------------------------------------


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
    end = max(MAX_WARP_PAIRS, power_of_two(num_pairs))
    if num_pairs <= MAX_WARP_PAIRS:
        config = BlockAlignMosaicConfig(
            form="warp", num_warpgroups=1, num_ctas=64, cells_per_cta=8192
        )
    elif num_experts > MAX_HISTOGRAM_EXPERTS and num_pairs <= MAX_COMPARED_PAIRS:
        config = BlockAlignMosaicConfig(
            form="pairs", num_warpgroups=4, num_ctas=64, cells_per_cta=8192
        )
    elif num_experts > MAX_HISTOGRAM_EXPERTS and num_pairs <= MAX_SORTED_PAIRS:
        groups = 4 if end <= MAX_SORTED_PAIRS // 2 else 8  # 16 pairs to read per thread at most
        config = BlockAlignMosaicConfig(
            form="sorted",
            num_warpgroups=groups,
            num_ctas=64,
            cluster=PORTABLE_CLUSTER,
            cells_per_cta=1024,
        )
    elif num_experts > MAX_HISTOGRAM_EXPERTS:
        config = RADIX
    elif num_pairs <= MAX_BLOCK_PAIRS:
        groups = min(4, max(1, end // 256))  # two pairs per thread
        config = BlockAlignMosaicConfig(
            form="block", num_warpgroups=groups, num_ctas=16, cells_per_cta=1024
        )
    else:
        # 256 threads with a pair each, then more threads, then more rounds. Clusters pay where they are many.
        ctas = min(64, end // 256)
        groups = min(8, max(2, end // (ctas * 128 * MAX_GRID_ROUNDS // 2)))
        config = BlockAlignMosaicConfig(
            form="grid",
            num_warpgroups=groups,
            num_ctas=ctas,
            rounds=MAX_GRID_ROUNDS,
            local_sort=True,
            cluster=PORTABLE_CLUSTER if ctas == 64 else 1,
        )
    return Row(1, None, end, config)


def config_for(problem: AlignProblem | BatchedAlignProblem) -> BlockAlignMosaicConfig:
    """The configuration that `problem.tuning` chooses, fitted to the problem."""
    if isinstance(problem, BatchedAlignProblem):
        return fit((table(problem.tuning) or table("")).batched, problem)  # type: ignore[union-attr]
    return fit(row_for(problem.num_pairs, problem.num_experts, problem.tuning).config, problem)


# -- programs that are sized at launch ------------------------------------------------------------


def size_bucket(num_pairs: int, num_experts: int, block_size: int, tuning: str = "") -> int:
    """The size up to which one program that is sized at launch serves `num_pairs` pairs.

    A bucket lies within one row of the table, so `config_for` at its end is the configuration of all of it.
    Such a program does the work of its largest size in rounds of 32 pairs per warp, so buckets end where
    one more round begins, at most two per power of two; four of "sorted", whose every round is dear.
    Elsewhere (several tiles are counted at launch) buckets are powers of two.
    """
    row, power = row_for(num_pairs, num_experts, tuning), power_of_two(num_pairs)
    end = power if row.num_pairs is None else row.num_pairs
    capacity = end + num_experts * (block_size - 1)
    config = fit(row.config, AlignProblem(end, num_experts, block_size, capacity, tuning=tuning))
    step = pairs_per_round(config)
    several_tiles = config.form == "grid" and step and num_pairs > row.config.rounds * step
    if step is None or several_tiles:
        bucket = max(8, power)
    else:
        step = max(step, power // (8 if config.form == "sorted" else 4))
        bucket = cdiv(num_pairs, step) * step
    return bucket if row.num_pairs is None else min(bucket, row.num_pairs)
