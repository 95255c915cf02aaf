"""Tables and pictures from JSONL rows: the median run of each cell, losses as plain as wins.

python -m benchmarks.report benchmarks/results/nvidia_h200/{align,union,compile}-*.jsonl \\
    --readme README.md --update docs/performance.md --plots docs/figures
"""

import argparse
import collections
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import compile_time, union
from benchmarks.cases import CASES
from benchmarks.rows import NO_COLUMN, OURS_IN_GRAPHS, base_for, base_of, median_rows, read

MARKS = "<!-- measured:begin -->", "<!-- measured:end -->"
_LABEL = {
    "span_us": "device span under jit",
    "graph_us": "CUDA graph",
    "wall_us": "host wall time",
}
# What the README shows: five sizes from a decode step to a large prefill, and these columns.
README_CASES = ("8x256x16", "512x256x16", "8192x64x128", "32768x256x64", "524288x256x128")
README_COLUMNS = {
    "torch_bridge": "ours",
    "vllm": "vLLM",
    "sglang": "SGLang",
    "torch_sort": "torch.sort",
    "mosaic_gpu": "ours under jit",
    "xla": "XLA under jit",
}
README_PICTURE = "_ratio"  # how the name of its one picture ends
# Their columns stand behind the peers', whatever was run first.
_COMPOSITES = ("torch_sort", "xla", "xla_argsort")

type Rows = Sequence[dict[str, Any]]


def cells(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Header and lines: a case per line, a provider per column, its ratio to ours behind its time.

    A ratio above 1 is a win of ours, below 1 a loss.
    """
    median = median_rows(rows)
    present = list(dict.fromkeys(r["provider"] for r in rows if r["provider"] not in NO_COLUMN))
    base = base_of(rows)
    first = [p for p in (base, OURS_IN_GRAPHS) if p in present]
    peers = [p for p in present if p not in (*first, *_COMPOSITES)]
    providers = [*first, *peers, *(p for p in _COMPOSITES if p in present and p not in first)]
    base_by_provider = {p: base_for(p, rows) for p in providers}
    order = {case.name: i for i, case in enumerate(CASES)}
    names = sorted(dict.fromkeys(r["case"] for r in rows), key=lambda n: order.get(n, len(order)))
    failed = {(r["case"], r["provider"]) for r in rows if not r["verified"]}
    metric = {p: next((m["metric"] for k, m in median.items() if k[1] == p), "") for p in providers}
    header = ["pairs x experts x block"]
    header += [f"{p} ({_LABEL.get(metric[p], 'not timed')})" for p in providers]
    lines = []
    for name in names:
        line = [name]
        for provider in providers:
            row = median.get((name, provider))
            if (name, provider) in failed:
                text = "WRONG or failed"
            elif row is None:
                text = "-"
            else:
                text = f"{row['p50_us']:.2f}"
                against = median.get((name, base_by_provider[provider] or ""))
                if against is not None:
                    text += f" ({row['p50_us'] / against['p50_us']:.2f}x)"
            line.append(text)
        lines.append(line)
    return header, lines


def text_table(rows: Rows) -> str:
    """For a terminal: a rich table where rich is installed, plain columns otherwise."""
    header, lines = cells(rows)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        padded = [
            [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
            for line in [header, *lines]
        ]
        return "\n".join("  ".join(line).rstrip() for line in padded)
    table = Table(title="µs per call, median (behind it: its time / ours; below 1 we lose)")
    for i, title in enumerate(header):
        table.add_column(title.replace(" (", "\n("), justify="right" if i else "left")
    for line in lines:
        table.add_row(*line)
    width = 100 + 12 * len(header)  # a redirected run must not fold its columns to 80 characters
    console = Console(width=None if Console().is_terminal else width)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def gpus(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """The rows of each GPU."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["gpu"] or "no GPU (CPU wall time)", []).append(row)
    return found


def _filled(text: str) -> str:
    """A paragraph of lines that fit a page."""
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False) + "\n"


def headline(rows: Rows) -> str:
    """The README's table, one per GPU: a few sizes and columns, with date, GPU, clock and launch."""
    parts = []
    for gpu, everything in gpus(rows).items():
        here = [
            row
            for row in everything
            if row["case"] in README_CASES
            and row["provider"] in README_COLUMNS
            and row.get("metric") in ("graph_us", "span_us")
            and row.get("grid") != "union"
        ]
        median = median_rows(here)
        if not median:
            continue
        columns = {
            p: title for p, title in README_COLUMNS.items() if any(k[1] == p for k in median)
        }
        lines = []
        for name in README_CASES:
            if not any(case == name for case, _ in median):
                continue
            line = [name]
            for provider in columns:
                row = median.get((name, provider))
                base = median.get((name, base_for(provider, here) or ""))
                text = "-" if row is None else f"{row['p50_us']:.2f}"
                if row is not None and base is not None:
                    text += f" ({row['p50_us'] / base['p50_us']:.2f}x)"
                line.append(text)
            lines.append(line)
        first = here[-1]
        parts.append(
            f"{gpu}, {first['date'][:10]}, jax {first['jax']}, torch {first['torch']}. "
            f"Microseconds per call, median.\n"
            f"In parentheses: that time divided by ours, by the same clock and launch; below 1 ours is "
            f"slower.\n"
            f"From PyTorch: CUDA events around the replay of a CUDA graph of 50 calls. Under jit: device "
            f"span in the\nprofiler's trace of one jitted step (of ours 50 calls, of XLA 5).\n"
        )
        parts.append("| pairs x experts x block | " + " | ".join(columns.values()) + " |")
        parts.append("|" + "---|" * (len(columns) + 1))
        parts += ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(parts).rstrip() + "\n"


def markdown(rows: Rows) -> str:
    """One table per GPU, with what it was measured on, and how many comparisons we lose."""
    parts = []
    for gpu, everything in gpus(rows).items():
        kinds = collections.defaultdict(list)
        for row in everything:
            kinds[row.get("grid") or row.get("metric") or ""].append(row)
        grid, compiled = kinds.pop("union", []), kinds.pop("compile_s", [])
        here = [row for group in kinds.values() for row in group]
        if here:
            header, lines = cells(here)
            runs = len({r["date"] for r in here})
            first = here[-1]
            facts = ", ".join(
                f"{key} {', '.join(sorted({str(r[key]) for r in here}))}"
                for key in ("driver", "jax", "torch")
                if first[key]
            )
            versions = dict.fromkeys(f"{r['provider']}: {r['version']}" for r in here)
            parts.append(
                _filled(
                    f"**{gpu}**, {first['date'][:10]}, {facts}. {runs} run(s). Each cell is the median "
                    f"run's p50, in µs per call. In parentheses: that time divided by ours, by the same "
                    f"clock and launch ({base_of(here)} under jit, {OURS_IN_GRAPHS} in CUDA graphs); below "
                    f"1 ours is slower."
                )
            )
            parts.append("| " + " | ".join(header) + " |")
            parts.append("|" + "---|" * len(header))
            parts += ["| " + " | ".join(line) + " |" for line in lines]
            parts.append("\n" + _filled(f"{losses(here)} Providers: {'; '.join(versions)}."))
        if grid:
            parts.append(union.markdown(gpu, grid))
        if compiled:
            parts.append(f"Compile time, **{gpu}**: {compile_time.verdict(compiled)}.\n")
    return "\n".join(parts).rstrip() + "\n"


def losses(rows: Rows) -> str:
    """A sentence that counts the comparisons that we lose, and names them."""
    median = median_rows(rows)
    compared, lost = 0, []
    for (case, provider), row in median.items():
        ours = median.get((case, base_for(provider, rows) or ""))
        if ours is None:
            continue
        compared += 1
        if row["p50_us"] < ours["p50_us"]:
            lost.append(f"{case} against {provider}")
    if not compared:
        return "Nothing to compare with here."
    if not lost:
        return f"Ours is slower in none of {compared} comparisons."
    return f"Ours is slower in {len(lost)} of {compared} comparisons: {', '.join(lost)}."


def update(path: str | Path, text: str) -> None:
    """Puts `text` between the two marks of a file.

    Raises:
        ValueError: the file lacks a mark.
    """
    old = Path(path).read_text()
    begin, end = MARKS
    if begin not in old or end not in old:
        raise ValueError(f"{path} must hold the lines {begin} and {end}")
    head, tail = old.split(begin, 1)[0], old.split(end, 1)[1]
    Path(path).write_text(f"{head}{begin}\n{text}{end}{tail}")


def pictures(drawn: Sequence[Path], page: str | Path) -> str:
    """Links to the pictures, relative to the page."""
    folder = Path(page).resolve().parent
    links = [f"![{p.stem}]({os.path.relpath(p.resolve(), folder)})" for p in drawn]
    return "\n" + "\n".join(links) + "\n" if links else ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("results", nargs="+", help="JSONL files")
    parser.add_argument("--update", nargs="*", default=[], metavar="FILE", help="files with marks")
    parser.add_argument(
        "--readme", nargs="*", default=[], metavar="FILE", help="the same, a few sizes alone"
    )
    parser.add_argument("--plots", metavar="FOLDER", help="where to draw (needs the extra plot)")
    options = parser.parse_args(argv)
    rows = read(options.results)
    text = markdown(rows)
    drawn: list[Path] = []
    if options.plots:
        from benchmarks import plots

        for gpu, here in gpus(rows).items():
            drawn += plots.draw(gpu, here, Path(options.plots))
    for path in options.update:
        update(path, text + pictures(drawn, path))
    for path in options.readme:
        one = [picture for picture in drawn if picture.stem.endswith(README_PICTURE)]
        update(path, headline(rows) + pictures(one, path))
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
