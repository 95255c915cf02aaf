"""Pictures of rows: time against pairs, ratio to each peer, time under skew. PNGs, named after the GPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import union
from benchmarks.cases import CASES, SKEWS
from benchmarks.rows import base_for, median_rows
from moe_align_jax._align import tables

OURS = ("torch_bridge", "mosaic_gpu")
_COLOUR = {
    "torch_bridge": "#d62728",
    "mosaic_gpu": "#ff7f0e",
    "vllm": "#1f77b4",
    "sglang": "#2ca02c",
    "sglang_small": "#98df8a",
    "sglang_small_pdl": "#bcbd22",
    "xla": "#7f7f7f",
    "xla_argsort": "#c7c7c7",
    "torch_sort": "#9467bd",
}
_LABEL = {
    "torch_bridge": "ours from PyTorch",
    "mosaic_gpu": "ours under jit",
    "vllm": "vLLM",
    "sglang": "SGLang",
    "sglang_small": "SGLang, one launch",
    "sglang_small_pdl": "SGLang, one launch, PDL",
    "xla": 'ours, implementation="xla"',
    "xla_argsort": "argsort under jit",
    "torch_sort": "torch.sort",
}
_MOST_LINES = 6  # of experts in one picture
_COLUMNS = 5  # pictures side by side

type Points = dict[str, list[tuple[float, float]]]


def _size_of(name: str) -> tuple[int, int, int] | None:
    """(pairs, E, block) of a plain case's name."""
    parts = name.split("x")
    return tuple(map(int, parts)) if len(parts) == 3 and all(p.isdigit() for p in parts) else None  # type: ignore[return-value]


def _median(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    return {key: row["p50_us"] for key, row in median_rows(rows).items()}


def time_against_pairs(rows: Sequence[dict[str, Any]], provider: str) -> Points:
    """E -> (pairs, µs) of one provider, for the E with the most sizes; several blocks: the fastest."""
    found: dict[int, dict[int, float]] = {}
    for (name, who), us in _median(rows).items():
        size = _size_of(name)
        if who == provider and size is not None:
            line = found.setdefault(size[1], {})
            line[size[0]] = min(us, line.get(size[0], us))
    most = sorted(found, key=lambda e: (-len(found[e]), e))[:_MOST_LINES]
    return {f"E = {e}": sorted(found[e].items()) for e in sorted(most) if len(found[e]) > 1}


def ratio_to_peers(rows: Sequence[dict[str, Any]]) -> Points:
    """Peer -> (pairs, its time over ours, timed in the same way as in the tables), a point per size."""
    median = _median(rows)
    found: Points = {}
    for (name, who), us in median.items():
        size, ours = _size_of(name), median.get((name, base_for(who, rows) or ""))
        if size is not None and ours is not None and who not in OURS:
            found.setdefault(who, []).append((size[0], us / ours))
    return {who: sorted(points) for who, points in sorted(found.items())}


def time_under_skew(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Size -> provider -> skew -> µs, where a size was measured under more than one skew."""
    median, found = _median(rows), {}
    for case in CASES:
        if case.with_options:
            continue
        size = f"{case.num_pairs}x{case.num_experts}x{case.block_size}"
        for (name, who), us in median.items():
            if name == case.name and who != "empty":
                found.setdefault(size, {}).setdefault(who, {})[case.skew] = us
    several = {
        size: {who: skews for who, skews in by.items() if len(skews) > 1}
        for size, by in found.items()
    }
    return {size: by for size, by in several.items() if by}


def draw(gpu: str, rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws what the rows of one GPU hold; the files that were written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    matplotlib.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    stem, written = tables.stem_of(gpu), []
    rows = [r for r in rows if "p50_us" in r and r.get("grid") != "union"]
    last = max((r["date"][:10] for r in rows), default="")

    def save(figure: Any, what: str, title: str) -> None:
        figure.suptitle(f"{title}. {gpu}, {last}", fontsize=10)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{stem}_{what}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None}, bbox_inches="tight")
        plt.close(figure)
        written.append(path)

    lines = {provider: time_against_pairs(rows, provider) for provider in (*OURS, "vllm")}
    lines = {provider: points for provider, points in lines.items() if points}
    if lines:
        figure, axes = plt.subplots(
            layout="constrained",
            nrows=1,
            ncols=len(lines),
            figsize=(3.4 * len(lines), 3.2),
            sharey=True,
            squeeze=False,
        )
        for axis, (provider, points) in zip(axes[0], lines.items(), strict=True):
            for label, line in points.items():
                axis.plot(*zip(*line, strict=True), marker="o", markersize=3, label=label)
            axis.set(xscale="log", yscale="log", xlabel="pairs", title=_LABEL[provider])
            axis.legend(fontsize=7)
        axes[0][0].set_ylabel("µs per call")
        save(figure, "time", "Time against pairs")

    ratios = ratio_to_peers(rows)
    if ratios:
        figure, axis = plt.subplots(layout="constrained", figsize=(6, 3.4))
        for provider, points in ratios.items():
            mean = union.geomean(ratio for _, ratio in points)
            axis.plot(
                *zip(*points, strict=True),
                linestyle="none",
                marker=".",
                markersize=5,
                color=_COLOUR.get(provider),
                label=f"{_LABEL.get(provider, provider)}: {mean:.1f}x",
            )
        axis.axhline(1, color="black", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="pairs", ylabel="its time / ours")
        axis.legend(fontsize=7, title="geometric mean", loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, "ratio", "How many times faster ours is; below 1 it is slower")

    skewed = time_under_skew(rows)
    if skewed:
        measured = {provider for by in skewed.values() for provider in by}
        # One place for each in all pictures; those without a colour of their own at the end.
        providers = [p for p in _COLOUR if p in measured] + sorted(measured - _COLOUR.keys())
        colour = {p: _COLOUR.get(p, f"C{k}") for k, p in enumerate(providers)}
        columns = min(len(skewed), _COLUMNS)
        rows_of_them = -(-len(skewed) // columns)
        figure, axes = plt.subplots(
            layout="constrained",
            nrows=rows_of_them,
            ncols=columns,
            figsize=(4.2 * columns, 3.2 * rows_of_them),
            squeeze=False,
        )
        for axis in axes.flat[len(skewed) :]:
            axis.set_axis_off()
        for axis, (size, by) in zip(axes.flat, skewed.items(), strict=False):
            shown = [skew for skew in SKEWS if any(skew in skews for skews in by.values())]
            width = 0.8 / len(providers)
            for k, provider in enumerate(providers):
                skews = by.get(provider, {})
                places = [i + k * width for i, skew in enumerate(shown) if skew in skews]
                heights = [skews[skew] for skew in shown if skew in skews]
                axis.bar(places, heights, width, color=colour[provider])
            centre = (len(providers) - 1) * width / 2
            axis.set_xticks([i + centre for i in range(len(shown))], shown)
            # A bar begins at the lower end of a logarithmic axis: at half of the shortest, so that it shows.
            shortest = min(us for skews in by.values() for us in skews.values())
            axis.set(yscale="log", title=size, ylim=(shortest / 2, None))
        for line in axes:
            line[0].set_ylabel("µs per call")
        # Of all providers, also those that the picture beside it does not have.
        named = [Patch(color=colour[p], label=_LABEL.get(p, p)) for p in providers]
        axes[0][-1].legend(handles=named, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, "skew", "Time under skew")
    return written
