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
from moe_align_jax._core.files import read_file
from moe_align_jax._eplb import loads, maps
from moe_align_jax._expert_load.files import read_table, write_atomically

_FUNCTION = "moe-align eplb"


class Options(NamedTuple):
    """What the command was asked for; the names are its options."""

    num_gpus: int
    num_redundant: int = 0
    num_nodes: int = 1
    num_groups: int = 1
    algorithm: Any = "auto"
    previous: Path | None = None
    out: Path = Path("placement.json")
    heatmap: Path = Path("placement.png")


def run(console: Console, files: Sequence[Path], options: Options) -> int:
    """Reads loads, writes the placement and its picture, prints what changes; 1 on a refusal."""
    try:
        named = {str(file): _read(file) for file in files}
        if len(named) < len(files):
            maps.fail(_FUNCTION, "FILE", "be given once", "one twice", "Pass one of each process.")
        history = loads.sum_of_files(named, function=_FUNCTION)
        in_force = _in_force(loads.map_of_files(named, function=_FUNCTION), history, options)
        placement = rebalance_experts(
            history,
            history.shape[2] + options.num_redundant,
            options.num_groups,
            options.num_nodes,
            options.num_gpus,
            algorithm=options.algorithm,
            previous=_same_size(in_force, history.shape[2] + options.num_redundant),
        )
    except (OSError, ValueError, TypeError, ImportError) as error:
        console.print(f"[bold red]No placement:[/] {escape(str(error))}", highlight=False)
        return 1
    new = placement.physical_to_logical_map
    old = _trivial(history, new.shape[1]) if in_force is None else in_force
    sides = [_worth(history, slots, options.num_gpus) for slots in (old, new)]
    moves = None
    if _same_size(in_force, new.shape[1]) is not None and options.num_gpus % options.num_nodes == 0:
        moves = plan_expert_moves(old, new, num_gpus=options.num_gpus, num_nodes=options.num_nodes)

    names = ("trivial" if in_force is None else "in force", "EPLB")
    console.print(_table(history, placement.expert_count, sides, moves, names))
    _print_summary(console, history, sides, moves, names)
    try:
        _write_json(options, files, new, sides)
    except OSError as error:
        console.print(f"[bold red]Not written:[/] {escape(str(error))}", highlight=False)
        return 1
    console.print(f"placement: {escape(str(options.out))}", highlight=False, soft_wrap=True)
    try:
        titles = tuple(
            f"{name}: balancedness {side.whole.mean():.3f}"
            for name, side in zip(names, sides, strict=True)
        )
        heatmap.draw(sides[0].per_gpu, sides[1].per_gpu, options.heatmap, (titles[0], titles[1]))
    except ImportError:
        console.print(heatmap.MISSING, markup=False, highlight=False, soft_wrap=True)
    except OSError as error:
        console.print(f"[bold red]Not written:[/] {escape(str(error))}", highlight=False)
        return 1
    else:
        console.print(f"heat map: {escape(str(options.heatmap))}", highlight=False, soft_wrap=True)
    return 0


# -- reading ----------------------------------------------------------------------------------------------


def _read(file: Path) -> dict[str, Any]:
    with open(file, "rb") as opened:
        start = opened.read(6)
    if start.startswith((b"PAR1", b"ARROW1")):
        return read_table(file)
    return read_file(file, function=_FUNCTION)


def _in_force(slots: np.ndarray | None, history: np.ndarray, options: Options) -> np.ndarray | None:
    """The placement that serves now, if the files (`slots`) or `--previous` say so and it fits the GPUs."""
    if options.previous is not None:
        slots = loads.map_in_force(_read(options.previous))
        if slots is None:
            rule = "hold a physical_to_logical_map"
            maps.fail(_FUNCTION, "--previous", rule, options.previous, "Pass a placement.")
    if slots is None:
        return None
    slots, _ = maps.check_map(_FUNCTION, slots, history.shape[2])
    if len(slots) != history.shape[1] or slots.shape[1] % options.num_gpus:
        if options.previous is not None:
            rule = f"place {history.shape[1]} layers on {options.num_gpus} GPUs"
            maps.fail(_FUNCTION, "--previous", rule, list(slots.shape), "Pass what is in force.")
        return None
    return slots


def _same_size(slots: np.ndarray | None, num_slots: int) -> np.ndarray | None:
    return slots if slots is not None and slots.shape[1] == num_slots else None


def _trivial(history: np.ndarray, num_slots: int) -> np.ndarray:
    return np.tile(np.arange(num_slots) % history.shape[2], (history.shape[1], 1))


# -- what a placement is worth ----------------------------------------------------------------------------


class _Worth(NamedTuple):
    """Expected under a placement: loads `[L, D]`, balancedness `[L]` of the sum, and mean of the passes."""

    per_gpu: np.ndarray
    whole: np.ndarray
    per_pass: float


def _worth(history: np.ndarray, slots: np.ndarray, num_gpus: int) -> _Worth:
    whole = expected_physical_count(history.sum(axis=0, dtype=np.float64), slots)
    per_pass = [
        balancedness(expected_physical_count(step, slots), num_gpus).mean()
        for step in history
        if step.any()
    ]
    return _Worth(
        whole.reshape(len(whole), num_gpus, -1).sum(axis=2),
        balancedness(whole, num_gpus),
        float(np.mean(per_pass)) if per_pass else 1.0,
    )


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
        hottest = int(load[layer].argmax())
        share = load[layer, hottest] / max(load[layer].sum(), 1e-9)
        cells = [str(layer), f"{hottest} ({share:.1%})", str(count[layer, hottest])]
        cells += [f"{side.whole[layer]:.4f}" for side in sides]
        if moves is not None:
            cells.append(str(int((moves.kind[layer] >= MoveKind.SAME_NODE).sum())))
        table.add_row(*cells)
    return table


def _print_summary(
    console: Console, history: np.ndarray, sides: list[_Worth], moves: Any, names: tuple[str, str]
) -> None:
    before, after = sides
    console.print(
        f"mean of {len(before.whole)} layers: {names[0]} {before.whole.mean():.4f}, "
        f"{names[1]} {after.whole.mean():.4f}; worst layer: {before.whole.min():.4f}, "
        f"{after.whole.min():.4f}",
        highlight=False,
        soft_wrap=True,
    )
    if len(history) > 1:
        console.print(
            f"pass by pass, mean of {len(history)}: {names[0]} {before.per_pass:.4f}, "
            f"{names[1]} {after.per_pass:.4f}",
            highlight=False,
            soft_wrap=True,
        )
    if moves is not None:
        kinds = ", ".join(
            f"{kind.name.lower().replace('_', ' ')} {moves.count(kind)}" for kind in MoveKind
        )
        console.print(f"moves of {moves.kind.size} slots: {kinds}", highlight=False, soft_wrap=True)


def _write_json(
    options: Options, files: Sequence[Path], slots: np.ndarray, sides: list[_Worth]
) -> None:
    document = {
        "physical_to_logical_map": slots.tolist(),
        "num_gpus": options.num_gpus,
        "num_nodes": options.num_nodes,
        "num_groups": options.num_groups,
        "algorithm": options.algorithm,
        "loads": ", ".join(file.name for file in files),
        "balancedness_before": [round(float(x), 6) for x in sides[0].whole],
        "balancedness_after": [round(float(x), 6) for x in sides[1].whole],
    }
    text = json.dumps(document) + "\n"
    write_atomically(options.out, lambda opened: opened.write(text.encode()))
