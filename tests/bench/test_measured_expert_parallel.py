"""What the docs say of dispatch and combine on two GPUs is what the benchmark's rows say, by each clock."""

import re
from pathlib import Path

from benchmarks import decode_step
from benchmarks import rows as rows_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/nvidia_h200"
PAGE = (ROOT / "docs/expert_parallel.md").read_text()
# The columns of a table, by their heads: clock and way.
COLUMNS = {
    "wall clock, donated": ("wall", "donated"),
    "wall clock, not donated, not waiting": ("wall", "not waiting"),
    "wall clock, waiting": ("wall", "waiting"),
    "device span, donated": ("span", "donated"),
}
CASES = ("low_latency 8", "low_latency 128")
DECODE, DECODE_CASES = "decode-step-x2-2026-11-29", (
    "deepseek-v3 fp8 128", "qwen3-30b-a3b fp8 128")  # fmt: skip


def measured(*names):
    """µs by (case, provider, launch, clock, way), of files of one run."""
    rows = rows_of.read([RESULTS / f"{name}.jsonl" for name in names])
    keys = ("case", "provider", "launch", "clock", "way")
    return {tuple(row[k] for k in keys): row["us"] for row in rows if "us" in row}


def tables():
    """Of the page: (heads, rows of cells)."""
    for text in re.findall(r"(?:^\|.*\n)+", PAGE, re.M):
        heads, _, *rows = [
            [c.strip() for c in line.strip("|\n").split("|")] for line in text.splitlines()
        ]
        if set(COLUMNS) <= set(heads):
            yield heads, rows


def provider(cell):
    """How the benchmark names it."""
    name = re.sub(r'^`"(\w+)"`', r"ours, \1", cell)
    return name.removesuffix(", the default").replace("steps by XLA", "by XLA")


def _pair(cell):
    return ["-", "-"] if cell == "-" else cell.split(" / ")


def compared(heads, rows, found, digits, cases=CASES):
    """How many cells of a table were held to the rows."""
    count = 0
    for row in rows:
        cells = dict(zip(heads, row, strict=True))
        for head, (clock, way) in COLUMNS.items():
            for case, text in zip(cases, _pair(cells[head]), strict=True):
                if text == "-":  # not measured
                    continue
                key = case, provider(row[0]), cells.get("launch", "default"), clock, way
                assert f"{found[key]:.{digits}f}" == text, key
                count += 1
    return count


def test_every_table_of_two_clocks_is_that_of_its_rows():
    given = [*tables()]
    pairs = "expert-parallel-x2"
    files = [
        (f"{pairs}-windows-2026-11-28", 1, 48, CASES),
        (f"{pairs}-fallback-2026-11-29", 1, 48, CASES),
        (f"{pairs}-fallback-2026-11-29-b", 1, 24, CASES),
        (DECODE, 1, 49, DECODE_CASES),
        (f"{pairs}-clocks-2026-11-28", 0, 60, CASES),
    ]
    for (heads, rows), (name, digits, cells, cases) in zip(given, files, strict=True):
        found = measured(name)
        if "clocks" in name:  # our kernels beside the exchange of "all_to_all" came later
            found |= {(c, f"{p}, by XLA", *k): us for (c, p, *k), us in found.items()}
        assert compared(heads, rows, found, digits, cases) >= cells, name


def test_the_fallback_beside_bare_exchanges_is_that_of_its_rows():
    found = measured("expert-parallel-x2-fallback-2026-11-29-b")
    names = ("ours, all_to_all", "bare all_to_all twice", "bare all_gather + psum_scatter")
    texts = [
        "Without waiting it takes {:.1f} and {:.1f} times the two bare exchanges",
        "With donation it takes {:.1f} and {:.1f} times.",
    ]
    for way, text in zip(("not waiting", "donated"), texts, strict=True):
        ours, *bare = (found[CASES[0], name, "default", "wall", way] for name in names)
        assert text.format(*(ours / one for one in bare)) in " ".join(PAGE.split())


def test_what_the_decode_step_pays_for_communication_is_that_of_its_rows():
    """By the benchmark's own subtraction."""
    lines = list(decode_step.communication(rows_of.read([RESULTS / f"{DECODE}.jsonl"])))
    text = " ".join(PAGE.split())

    def beyond(case, way):
        (line,) = (line for line in lines if line.startswith(f"{case}, {way}: "))
        parts = line.partition("µs a layer beyond")[2].partition(": ")[2].split("; ")
        return {m[1]: m.groups()[1:] for m in (re.fullmatch(
            r"(.+) ([\d.]+)(?: \((.+) of plain\))?", part) for part in parts)}  # fmt: skip

    first, second = (beyond(case, "donated") for case in DECODE_CASES)
    (a, of_a), (b, of_b) = (one["ours, nvlink_window"] for one in (first, second))
    plain = [one["plain, all_to_all, boxes"][0] for one in (first, second)]
    said = f"adds {a} and {b} µs a layer to the last: {of_a} and {of_b} of what the faster plain "
    said += f"exchange adds ({plain[0]} and {plain[1]}). "
    gathered = (one["gathered tokens, boxes"][0] for one in (first, second))
    assert said + "Gathered tokens add {} and {}.".format(*gathered) in text
    waiting = beyond(DECODE_CASES[0], "waiting")
    nvlink, plain = (waiting[name][0] for name in ("ours, nvlink", "plain, all_to_all, boxes"))
    assert f"({nvlink} for {plain})" in text


def test_mode_normal_is_that_of_its_rows():
    found = measured("expert-parallel-x2-normal-2026-11-29")
    ours, bare = (
        [found["normal 4096", name, "default", *column] for column in COLUMNS.values()]
        for name in ("ours, nvlink", "bare all_to_all twice")
    )
    text = " ".join(PAGE.split())
    assert (
        '`"nvlink"` {:.0f} µs donated, {:.0f} not waiting, {:.0f} waiting, span {:.0f};'.format(
            *ours
        )
        in text
    )
    assert "two bare all_to_all {:.0f}, {:.0f}, {:.0f} and {:.0f}.".format(*bare) in text
    assert (
        f"{ours[0] / bare[0]:.2f} of their wall clock and {ours[3] / bare[3]:.2f} of their span"
        in text
    )


def test_readme_says_what_the_rows_say():
    found = measured("expert-parallel-x2-windows-2026-11-28")

    def pair(name):
        return " / ".join(
            f"{found[case, name, 'default', 'wall', 'donated']:.0f}" for case in CASES
        )

    text = " ".join((ROOT / "README.md").read_text().split())
    plain = min("all_to_all", "all_gather + psum_scatter", key=lambda kind: found[
        CASES[1], f"plain job, {kind}, sorted", "default", "wall", "donated"])  # fmt: skip
    said = f"donated (2026-11-28): {pair('ours, nvlink_window')} µs; two bare all_to_all "
    said += (
        f"{pair('bare all_to_all twice')}, plain collectives {pair(f'plain job, {plain}, sorted')}"
    )
    assert said in text
