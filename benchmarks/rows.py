"""Files of measured rows: JSON lines, where a line of facts says once what all rows behind it share.

A run's date, GPU and versions are the same in each of its rows. A file therefore begins with
`{"facts": {...}}`, and its rows hold the rest. A later run that is appended writes facts of its own.
"""

import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine

FACTS = "facts"
OURS = ("mosaic_gpu", "xla")  # what ratios refer to: the first that was measured,
OURS_IN_GRAPHS = (
    "torch_bridge"  # and for PyTorch's ops in CUDA graphs this one, where it was measured
)
NO_COLUMN = ("empty",)
_MOST_TOLD = 500  # letters of an error

type Row = dict[str, Any]


def statistics_of(samples: Sequence[float]) -> Row:
    """The columns of a row that are times, in µs per call."""
    low, middle, high = (round(float(np.percentile(samples, p)), 2) for p in (20, 50, 80))
    return {"us": middle, "p20_us": low, "p80_us": high, "samples": len(samples)}


def reason_of(error: BaseException) -> str:
    """What a row says of an error: its type and the beginning of its text."""
    return f"{type(error).__name__}: {error}"[:_MOST_TOLD]


def failed(error: BaseException) -> Row:
    """The columns of a row that has no times, for this error."""
    return {"status": "failed", "reason": reason_of(error)}


class Writer:
    """Appends rows to a file, with what they share in front of the first of them.

    Args:
        path: the file; it and its folder are made at once, so that nobody measures for a file that cannot
            be written: then this ends the program with one line. None writes nothing.
        facts: what every row of this run shares: date, GPU, versions, launch. None: each row brings these
            with it, under `machine.NAMES`, as it was measured by a process of its own; those of the first row
            that has any are the run's.
    """

    def __init__(self, path: str | Path | None, facts: Mapping[str, Any] | None = None):
        self._path = None if path is None else Path(path)
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.open("a").close()
            except OSError as error:
                raise SystemExit(f"Cannot write: {self._path}: {error.strerror}") from None
        self._facts = None if facts is None else dict(facts)
        self._written: dict[str, Any] | None = None

    def write(self, rows: Iterable[Row]) -> None:
        """Appends the rows; a value that is the run's own is not repeated, another one stands in the row."""
        if self._path is None:
            return
        with self._path.open("a") as file:
            for row in rows:
                if self._facts is None:
                    brought = {name: row[name] for name in machine.NAMES if name in row}
                    self._facts = brought or None
                facts = self._facts or {}
                if self._written != facts:
                    file.write(json.dumps({FACTS: facts}) + "\n")
                    self._written = facts
                own = {k: v for k, v in row.items() if k not in facts or facts[k] != v}
                file.write(json.dumps(own) + "\n")


def parse(lines: Iterable[str]) -> list[Row]:
    """Every row of these lines, with the facts that stand before it."""
    found, facts = [], {}
    for line in lines:
        if line.strip():
            row = json.loads(line)
            if row.keys() == {FACTS}:
                facts = row[FACTS]
            else:
                found.append(facts | row)
    return found


def read(paths: Iterable[str | Path]) -> list[Row]:
    """Every row of the files, in order."""
    return [row for path in paths for row in parse(Path(path).read_text().splitlines())]


def median_rows(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    """(case, provider) -> the row of its median run by p50 (of two, the slower one)."""
    runs = collections.defaultdict(list)
    for row in rows:
        if row["verified"]:
            runs[row["case"], row["provider"]].append(row)
    by_time = {key: sorted(group, key=lambda r: r["p50_us"]) for key, group in runs.items()}
    return {key: group[len(group) // 2] for key, group in by_time.items()}


def base_of(rows: Iterable[Row]) -> str:
    """Our implementation that the others are compared with."""
    present = {r["provider"] for r in rows}
    return next((name for name in OURS if name in present), OURS[0])


def base_for(provider: str, rows: Sequence[Row]) -> str | None:
    """Whom a provider is compared with: ours, timed in the same way where that was done; None for
    those of ours that the others are compared with."""
    base = base_of(rows)
    graphs = {r["provider"] for r in rows if r.get("metric") == "graph_us"}
    if provider in (base, OURS_IN_GRAPHS, *NO_COLUMN):
        return None
    return OURS_IN_GRAPHS if graphs >= {provider, OURS_IN_GRAPHS} else base
