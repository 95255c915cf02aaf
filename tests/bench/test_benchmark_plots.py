"""The points of the pictures, and that the pictures are drawn from them."""

import json

import pytest

from benchmarks import plots, report
from benchmarks.cases import CASES


def row(case, provider, p50, metric="graph_us", **more):
    facts = {"date": "2026-11-21T10:00:00+00:00", "gpu": "NVIDIA H100", "driver": "1", "jax": "1"}
    facts |= {"torch": "2", "commit": "abc", "version": "v", "metric": metric}
    return {**facts, "case": case, "provider": provider, "verified": True, "p50_us": p50, **more}


ROWS = [
    row("8x256x16", "torch_bridge", 1.0),
    row("8x256x16", "mosaic_gpu", 1.5, metric="span_us"),
    row("8x256x16", "vllm", 4.0),
    row("8x256x16", "xla", 15.0, metric="span_us"),
    row("8x256x16", "empty", 0.8),
    row("512x256x16", "torch_bridge", 2.0),
    row("512x256x64", "torch_bridge", 1.8),
    row("512x256x16", "vllm", 6.0),
    row("512x64x16", "torch_bridge", 9.0),
    row("131072x256x128", "torch_bridge", 5.0),
    row("131072x256x128-one", "torch_bridge", 6.0),
    row("131072x256x128-options", "torch_bridge", 7.0),
]


def test_points_are_those_of_the_rows():
    assert plots.time_against_pairs(ROWS, "torch_bridge") == {
        "E = 256": [(8, 1.0), (512, 1.8), (131072, 5.0)]
    }
    # Each against ours timed in the same way; the empty kernel is no peer.
    assert plots.ratio_to_peers(ROWS) == {"vllm": [(8, 4.0), (512, 3.0)], "xla": [(8, 10.0)]}
    assert plots.time_under_skew(ROWS) == {
        "131072x256x128": {"torch_bridge": {"uniform": 5.0, "one": 6.0}}
    }


def test_many_skewed_sizes_share_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    skewed = [c for c in CASES if c.skew != "uniform"]
    sizes = {c.name.removesuffix(f"-{c.skew}") for c in skewed}
    rows = [row(name, "torch_bridge", 2.0) for name in (*sizes, *(c.name for c in skewed))]
    assert set(plots.time_under_skew(rows)) == sizes and len(sizes) > 5
    [picture] = [p for p in plots.draw("NVIDIA H100", rows, tmp_path) if "skew" in p.name]
    assert picture.stat().st_size < 200_000


def test_every_bar_under_skew_shows_and_every_provider_is_named(tmp_path, monkeypatch):
    """Times below 1 µs beside some far above; one provider is measured in the first picture alone."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: drawn.append((path, self)))
    skewed = [c for c in CASES if c.skew != "uniform"]
    names = sorted({c.name.removesuffix(f"-{c.skew}") for c in skewed})
    names += [c.name for c in skewed]
    rows = [row(name, "torch_bridge", 0.86) for name in names]
    rows += [row(name, "xla_argsort", 450.0) for name in names]
    size = min(plots.time_under_skew(rows), key=lambda s: [c.name for c in CASES].index(s))
    rows += [row(name, "sglang_small", 1.9) for name in names if name.startswith(size)]
    plots.draw("NVIDIA H100", rows, tmp_path)
    [figure] = [figure for path, figure in drawn if "skew" in path.name]
    heights = []
    for axis in figure.axes:
        low, high = axis.get_ylim()
        for bar in axis.patches:
            heights.append(bar.get_height())
            assert low < bar.get_height() <= high
            # From the bottom of the picture up: visibly.
            assert bar.get_height() / low >= 1.5
    assert {0.86, 1.9, 450.0} == {*heights}
    [legend] = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
    named = {
        text.get_text(): patch.get_facecolor()
        for text, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)
    }
    assert set(named) == {"ours from PyTorch", "argsort under jit", "SGLang, one launch"}
    bars = {bar.get_height(): bar.get_facecolor() for a in figure.axes for bar in a.patches}
    assert named["SGLang, one launch"] == bars[1.9] and len({*named.values()}) == 3


def test_pictures_are_drawn_small_and_the_readme_takes_a_few_sizes_and_one_picture(
    tmp_path, capsys
):
    pytest.importorskip("matplotlib")
    results, readme, page = (tmp_path / name for name in ("rows.jsonl", "README.md", "page.md"))
    results.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    for path in (readme, page):
        path.write_text("\n".join(report.MARKS) + "\n")
    folder = tmp_path / "figures"
    arguments = [str(results), "--readme", str(readme), "--update", str(page)]
    assert report.main([*arguments, "--plots", str(folder)]) == 0
    files = sorted(folder.iterdir())
    assert [f.name for f in files] == [f"nvidia_h100_{w}.png" for w in ("ratio", "skew", "time")]
    assert all(f.read_bytes()[:4] == b"\x89PNG" and f.stat().st_size < 100_000 for f in files)
    assert "-one" in page.read_text()
    assert "![nvidia_h100_time](figures/nvidia_h100_time.png)" in page.read_text()
    assert readme.read_text().count("![") == 1
    assert "![nvidia_h100_ratio](figures/nvidia_h100_ratio.png)" in readme.read_text()
    assert "-one" not in readme.read_text() and "| 8x256x16 |" in readme.read_text()
    first = [f.read_bytes() for f in files]
    report.main([*arguments, "--plots", str(folder)])
    assert [f.read_bytes() for f in files] == first
    assert plots.draw("NVIDIA H100", [row("a", "b", 1.0)], tmp_path / "none") == []
