"""`moe-align eplb`: a placement of experts from recorded loads, and what it is worth."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_align_jax import (
    MoveKind,
    balancedness,
    expected_physical_count,
    plan_expert_moves,
    rebalance_experts,
)
from moe_align_jax._cli import heatmap
from moe_align_jax._core.checks import fail
from moe_align_jax._core.files import is_pipe
from moe_align_jax._eplb import loads, maps, placement_files
from moe_align_jax._expert_load.files import read_dump, write_atomically

_FUNCTION = "moe-align eplb"


class Options(NamedTuple):
    """What the command was asked for; the names are its options."""

    num_gpus: int
    num_redundant: int = 0
    num_nodes: int = 1
    num_groups: int = 1
    algorithm: Any = "auto"
    spread_replicas: bool = False
    previous: Path | None = None
    previous_num_gpus: int | None = None
    out: Path | None = None
    format: placement_files.Format = "sglang"
    first_layer: int = 0
    report: Path | None = None
    heatmap: Path | None = None
    overwrite: bool = False

    @property
    def placement(self) -> Path:
        """The file that the placement is written to."""
        if self.out is not None:
            return self.out
        return Path("placement.yaml" if self.format == "tensorrt-llm" else "placement.json")

    @property
    def picture(self) -> Path:
        """The file that the heat map is written to: beside the placement unless told."""
        return self.placement.with_suffix(".png") if self.heatmap is None else self.heatmap


class _InForce(NamedTuple):
    """The placement that serves now: `[L, slots]`, -1 where a slot holds nothing, and its GPUs."""

    slots: np.ndarray
    num_gpus: int


def run(console: Console, files: Sequence[Path], options: Options) -> int:
    """Reads loads, writes the placement and its picture, prints what changes; 1 on a refusal."""
    try:
        named = {str(file): _read(file) for file in files}
        if len(named) < len(files):
            fail(_FUNCTION, "FILE", "be given once", "one twice", "Pass one of each process.")
        history = loads.sum_of_files(named, function=_FUNCTION, remedy=_LOADS)
        _check_sizes(history, options)
        in_force = _in_force(named, history, options)
        _check_outputs(files, options)
        placement = rebalance_experts(
            history,
            history.shape[2] + options.num_redundant,
            options.num_groups,
            options.num_nodes,
            options.num_gpus,
            algorithm=options.algorithm,
            previous=None if in_force is None else in_force.slots,
            previous_num_gpus=None if in_force is None else in_force.num_gpus,
            spread_replicas=options.spread_replicas,
        )
    except (OSError, ValueError, TypeError, ImportError) as error:
        console.print(f"[bold red]No placement:[/] {escape(str(error))}", highlight=False)
        return 1
    new = placement.physical_to_logical_map
    old = in_force or _InForce(_trivial(history, new.shape[1]), options.num_gpus)
    sides = [
        _worth(history, slots, num_gpus)
        for slots, num_gpus in (old, _InForce(new, options.num_gpus))
    ]
    moves, lost = None, 0
    if in_force is not None and options.num_gpus % options.num_nodes == 0:
        moves, lost = _moves(in_force, new, options)

    names = ("trivial" if in_force is None else "in force", "EPLB")
    # Before anything is printed: who reads that may be gone (`| head -1`), and the disk under it full.
    lines, failed = _write_files(files, options, new, sides, names)
    console.print(_table(history, placement.expert_count, sides, moves, names))
    _print_summary(console, sides, moves, names)
    if lost:
        console.print(
            f"experts that no slot in force holds: {lost}, counted over layers; load them from the "
            "checkpoint",
            highlight=False,
            soft_wrap=True,
        )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if failed is not None:
        console.print(
            f"[bold red]Not written:[/] {escape(str(failed))}", highlight=False, soft_wrap=True
        )
        return 1
    return 0


def _write_files(
    files: Sequence[Path],
    options: Options,
    slots: np.ndarray,
    sides: "list[_Worth]",
    names: tuple[str, str],
) -> tuple[list[str], OSError | None]:
    """(what to say of each file; what stopped the first that could not be written)."""
    text = placement_files.to_text(slots, options.num_gpus, options.format, options.first_layer)
    texts: list[tuple[str, Path, str]] = [("placement", options.placement, text)]
    if options.report is not None:
        texts.append(("report", options.report, _report(options, files, sides, names)))
    lines: list[str] = []
    try:
        for what, path, contents in texts:
            _write(path, contents)
            lines.append(f"{what}: {path}")
        titles = tuple(
            f"{name}: balancedness {_number(side.mean)}"
            for name, side in zip(names, sides, strict=True)
        )
        heatmap.draw(sides[0].per_gpu, sides[1].per_gpu, options.picture, (titles[0], titles[1]))
        lines.append(f"heat map: {options.picture}")
    except ImportError:
        lines.append(heatmap.MISSING)
    except OSError as error:
        return lines, error
    return lines, None


# -- reading ----------------------------------------------------------------------------------------------

_LOADS = "Pass loads: a recorder's dump, or JSON with logical_count. A placement in force goes to --previous."


def _read(file: Path) -> dict[str, Any]:
    return read_dump(file, function=_FUNCTION)


def _in_force(
    named: dict[str, dict[str, Any]], history: np.ndarray, options: Options
) -> _InForce | None:
    """The placement that serves now, by `--previous` or, if they hold one that fits, by the files."""
    layers, num_logical = history.shape[1:]
    if options.previous is None:
        slots = loads.map_of_files(named, function=_FUNCTION)
        if slots is not None:
            slots, _ = maps.check_map(_FUNCTION, slots, num_logical)
        num_gpus = options.previous_num_gpus or options.num_gpus
        if slots is None or len(slots) != layers or slots.shape[1] % num_gpus:
            if options.previous_num_gpus is not None:
                got = "none" if slots is None else f"{slots.shape[1]} slots in {len(slots)} layers"
                rule = f"come with a placement in force of {layers} layers on {num_gpus} GPUs"
                remedy = "Name it with --previous, or leave the option out."
                fail(_FUNCTION, "--previous-num-gpus", rule, got, remedy)
            return None
        return _InForce(slots, num_gpus)
    option = f"--previous {str(options.previous)!r}"
    contents = placement_files.read(options.previous, function=_FUNCTION)
    function = f"{_FUNCTION}: {option}"
    found = placement_files.find(contents, function=function)
    if found is None:
        rule, got = "hold a physical_to_logical_map", ", ".join(map(str, contents)) or "nothing"
        remedy = "Pass a placement, such as this command writes, and loads as FILE."
        fail(_FUNCTION, option, rule, got, remedy)
    slots = found.slots
    if slots.ndim != 2 or slots.dtype.kind not in "iu":
        rule = "hold a physical_to_logical_map of integers, [layers, slots]"
        got = f"{slots.dtype.name} {list(slots.shape)}"
        fail(_FUNCTION, option, rule, got, "Pass what is in force.")
    if options.previous_num_gpus is not None and found.num_gpus not in (
        None,
        options.previous_num_gpus,
    ):
        rule = f"be for --previous-num-gpus {options.previous_num_gpus}"
        got = f"{found.num_gpus} devices"
        fail(_FUNCTION, option, rule, got, "Leave the option out.")
    num_gpus = options.previous_num_gpus or found.num_gpus or options.num_gpus
    if len(slots) != layers or slots.shape[1] % num_gpus:
        rule = f"place {layers} layers on {num_gpus} GPUs"
        remedy = "Pass what is in force, and --previous-num-gpus where it is for other GPUs."
        got = f"{slots.shape[1]} slots in {len(slots)} layers"
        fail(_FUNCTION, option, rule, got, remedy)
    low, high = int(slots.min()), int(slots.max())
    if low < -1 or high >= num_logical:
        rule = f"hold experts in [0, {num_logical}), or -1 where a slot holds nothing"
        fail(_FUNCTION, option, rule, f"[{low}, {high}]", "Pass what is in force.")
    if low >= 0:  # without dead GPUs, every expert is somewhere
        slots, _ = maps.check_map(function, slots, num_logical)
    return _InForce(slots, num_gpus)


def _trivial(history: np.ndarray, num_slots: int) -> np.ndarray:
    return np.tile(np.arange(num_slots) % history.shape[2], (history.shape[1], 1))


def _moves(in_force: _InForce, new: np.ndarray, options: Options) -> tuple[Any, int]:
    """(the plan, 0); or (None, the experts that no slot in force holds, counted over the layers)."""
    pairs = zip(in_force.slots.tolist(), new.tolist(), strict=True)
    lost = sum(len({*after} - {*before}) for before, after in pairs)
    if lost:
        return None, lost
    plan = plan_expert_moves(
        in_force.slots,
        new,
        num_gpus=options.num_gpus,
        num_nodes=options.num_nodes,
        old_num_gpus=in_force.num_gpus,
    )
    return plan, 0


# -- checks, in the words of the options -----------------------------------------------------------------


def _check_sizes(history: np.ndarray, options: Options) -> None:
    """What `rebalance_experts` would refuse, by the names of its arguments."""
    num_logical = history.shape[2]
    slots = num_logical + options.num_redundant
    gpus, nodes, groups = options.num_gpus, options.num_nodes, options.num_groups
    hierarchical = options.algorithm.endswith("hierarchical") or (
        options.algorithm == "auto" and groups % nodes == 0
    )
    if slots % gpus:
        rule = f"fill {gpus} GPUs (--num-gpus) evenly"
        got = f"{options.num_redundant} for {num_logical} experts: {slots} slots"
        remedy = f"The next number that does is {options.num_redundant + -slots % gpus}."
        fail(_FUNCTION, "--num-redundant", rule, got, remedy)
    most = num_logical * (gpus - 1)
    if options.num_redundant > most:
        rule, remedy = f"be at most {most}", "With that many every GPU holds every expert once."
        fail(_FUNCTION, "--num-redundant", rule, options.num_redundant, remedy)
    if hierarchical:
        if num_logical % groups:
            rule = f"divide the {num_logical} experts"
            fail(_FUNCTION, "--num-groups", rule, groups, "Pass 1 for a model without groups.")
        if groups % nodes:
            rule = f"be a multiple of --num-nodes ({nodes})"
            remedy = "Pass --algorithm deepseek to ignore the nodes."
            fail(_FUNCTION, "--num-groups", rule, groups, remedy)
        if gpus % nodes:
            rule = f"be a multiple of --num-nodes ({nodes})"
            fail(_FUNCTION, "--num-gpus", rule, gpus, "Each node has the same number of GPUs.")


def _check_outputs(files: Sequence[Path], options: Options) -> None:
    """No file is written over unasked, none twice, none over an input, and none in the place of a folder."""
    given = {"--out": options.out, "--heatmap": options.heatmap, "--report": options.report}
    for option, path in given.items():
        if path is not None and path.is_dir():
            fail(_FUNCTION, option, "be a file", f"the folder {path}", "Name a file in it.")
    outputs = {"--out": options.placement, "--heatmap": options.picture}
    if options.report is not None:
        outputs["--report"] = options.report
    for option, path in outputs.items():
        if path.exists() and is_pipe(path):
            # A file would take the place of the pipe or device itself, even of /dev/null.
            remedy = "Name a file, and print that."
            fail(_FUNCTION, option, "be a file", f"the pipe or device {path}", remedy)
    inputs = {file.resolve() for file in files}
    taken: dict[Path, str] = {}
    for option, path in outputs.items():
        where = path.resolve()
        if where in taken:
            rule = f"be another file than {taken[where]}"
            fail(_FUNCTION, option, rule, str(path), "Name two files.")
        taken[where] = option
        if where in inputs:
            rule = "be another file than FILE"
            fail(_FUNCTION, option, rule, str(path), "Name a new file.")
        if path.exists() and not options.overwrite:
            rule = "be a file that is not there yet"
            remedy = f"Name another with {option}, or pass --overwrite."
            fail(_FUNCTION, option, rule, str(path), remedy)


# -- what a placement is worth ----------------------------------------------------------------------------


class _Worth(NamedTuple):
    """Expected under a placement: loads `[L, D]`, balancedness `[L]` of the sum, and means of it.

    A layer without tokens is neither even nor uneven: its balancedness is NaN, and the means leave it out.
    They are NaN where no layer has tokens.

    Attributes:
        mean: over the layers with tokens.
        per_pass: for each pass the mean over the layers that have tokens in it; the mean of those passes.
        passes: how many passes have tokens.
    """

    per_gpu: np.ndarray
    whole: np.ndarray
    mean: float
    per_pass: float
    passes: int


def _worth(history: np.ndarray, slots: np.ndarray, num_gpus: int) -> _Worth:
    whole = expected_physical_count(history.sum(axis=0, dtype=np.float64), slots)
    of_layers = _of_live(whole, num_gpus)
    of_passes = [
        np.nanmean(_of_live(expected, num_gpus))
        for expected in (expected_physical_count(step, slots) for step in history)
        if expected.any()
    ]
    live = of_layers[~np.isnan(of_layers)]
    return _Worth(
        whole.reshape(len(whole), num_gpus, -1).sum(axis=2),
        of_layers,
        float(live.mean()) if live.size else np.nan,
        float(np.mean(of_passes)) if of_passes else np.nan,
        len(of_passes),
    )


def _of_live(count: np.ndarray, num_gpus: int) -> np.ndarray:
    """Balancedness `[L]`, NaN for a layer without tokens."""
    return np.where(count.any(axis=1), balancedness(count, num_gpus), np.nan)


def _number(value: float, digits: int = 3) -> str:
    return "idle" if np.isnan(value) else f"{value:.{digits}f}"


def _table(
    history: np.ndarray, count: np.ndarray, sides: list[_Worth], moves: Any, names: tuple[str, str]
) -> Table:
    load = history.sum(axis=0, dtype=np.float64)
    table = Table(title="expected balancedness (1 is even)", title_justify="left")
    for title in ("layer", "hottest expert", "replicas of it", *names):
        table.add_column(title, justify="right")
    if moves is not None:
        table.add_column("experts received", justify="right")
    for layer in range(len(load)):
        hottest, total = int(load[layer].argmax()), load[layer].sum()
        cells = [str(layer), "none", "-"]
        if total:
            share = load[layer, hottest] / total
            cells = [str(layer), f"{hottest} ({share:.1%})", str(count[layer, hottest])]
        cells += [_number(side.whole[layer], 4) for side in sides]
        if moves is not None:
            cells.append(str(int((moves.kind[layer] >= MoveKind.SAME_NODE).sum())))
        table.add_row(*cells)
    return table


def _print_summary(
    console: Console, sides: list[_Worth], moves: Any, names: tuple[str, str]
) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    before, after = sides
    idle = int(np.isnan(after.whole).sum())
    live = len(after.whole) - idle
    without = f" ({idle} without tokens left out)" if idle else ""
    if live:
        say(
            f"mean of {live} layers{without}: {names[0]} {_number(before.mean, 4)}, "
            f"{names[1]} {_number(after.mean, 4)}; worst layer: "
            f"{_number(_least(before.whole), 4)}, {_number(_least(after.whole), 4)}"
        )
    else:
        say(f"no layer has tokens: nothing is known about the balance of {idle} layers")
    if after.passes > 1:
        say(
            f"pass by pass, mean of {after.passes}: {names[0]} {_number(before.per_pass, 4)}, "
            f"{names[1]} {_number(after.per_pass, 4)}"
        )
    if moves is not None:
        kinds = ", ".join(
            f"{kind.name.lower().replace('_', ' ')} {moves.count(kind)}" for kind in MoveKind
        )
        say(f"moves of {moves.kind.size} slots: {kinds}")


def _least(values: np.ndarray) -> float:
    live = values[~np.isnan(values)]
    return float(live.min()) if live.size else np.nan


def _report(
    options: Options, files: Sequence[Path], sides: list[_Worth], names: tuple[str, str]
) -> str:
    """JSON; null for the balancedness of a layer without tokens, and for the mean of none."""

    def or_null(value: float) -> float | None:
        return None if np.isnan(value) else round(float(value), 6)

    before, after = sides
    document = {
        "placement": str(options.placement),
        "format": options.format,
        "num_gpus": options.num_gpus,
        "num_nodes": options.num_nodes,
        "num_groups": options.num_groups,
        "num_redundant": options.num_redundant,
        "algorithm": options.algorithm,
        "spread_replicas": options.spread_replicas,
        "loads": ", ".join(file.name for file in files),
        "compared_with": names[0],
        "idle_layers": int(np.isnan(after.whole).sum()),
        "mean_balancedness_before": or_null(before.mean),
        "mean_balancedness_after": or_null(after.mean),
        "balancedness_before": [or_null(x) for x in before.whole],
        "balancedness_after": [or_null(x) for x in after.whole],
    }
    return json.dumps(document) + "\n"


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda opened: opened.write(text.encode()))
