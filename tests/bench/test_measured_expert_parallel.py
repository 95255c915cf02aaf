"""What the docs say of dispatch and combine on two GPUs is what the benchmark's rows say, by each clock."""

import re
from pathlib import Path

from benchmarks import decode_step
from benchmarks import rows as rows_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/nvidia_h200"
# The newest table of each claim, how a pair works, and earlier runs.
PAGE = "\n".join(
    (ROOT / f"docs/{page}.md").read_text()
    for page in ("expert_parallel", "transports", "notebook/2026-11")
)
# The columns of a table, by their heads: clock and way.
COLUMNS = {
    "wall clock, donated": ("wall", "donated"),
    "wall clock, not donated, not waiting": ("wall", "not waiting"),
    "wall clock, waiting": ("wall", "waiting"),
    "device span, donated": ("span", "donated"),
}
TIMER = {"device timer, donated": ("timer", "donated")}
CASES = ("low_latency 8", "low_latency 128")
MODELS = ("deepseek-v3", "qwen3-30b-a3b")
DECODE, DECODE_CASES = "decode-step-x2-2026-11-29", [f"{model} fp8 128" for model in MODELS]
FEW = f"{DECODE}-b"  # 8 and 64 tokens
TIMED = f"{DECODE}-c"  # 8, 64 and 128 tokens, by the device timer
BF16 = f"{DECODE}-d"  # 128 tokens, by the device timer
TOLD = f"{DECODE}-e"  # the same with `expected_m` and without
TOLD_CASES = ["deepseek-v3 bf16 128", "deepseek-v3 fp8 128", "qwen3-30b-a3b bf16 128"]
TIMED_PAIRS = "expert-parallel-x2-timer-2026-11-29"
NORMAL = "expert-parallel-x2-normal-2026-11-29-b"


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
        if {head for head, (clock, _) in COLUMNS.items() if clock == "wall"} <= set(heads):
            yield heads, rows


def provider(cell):
    """How the benchmark names it."""
    name = re.sub(r'^`"(\w+)"`', r"ours, \1", cell)
    name = name.replace("without `expected_m`", "untold").replace("with `expected_m`", "told")
    return name.removesuffix(", the default").replace("steps by XLA", "by XLA")


def compared(heads, rows, found, digits, cases=CASES):
    """How many cells of a table were held to the rows."""
    count = 0
    for row in rows:
        cells = dict(zip(heads, row, strict=True))
        for head in cells.keys() & (COLUMNS | TIMER):
            clock, way = (COLUMNS | TIMER)[head]
            if cells[head] == "-":  # not measured
                continue
            for case, text in zip(cases, cells[head].split(" / "), strict=True):
                if text == "-":
                    continue
                key = case, provider(row[0]), cells.get("launch", "default"), clock, way
                assert f"{found[key]:.{digits}f}" == text, key
                count += 1
    return count


def test_every_table_of_clocks_is_that_of_its_rows():
    given = [*tables()]
    pairs = "expert-parallel-x2"
    files = [
        (f"{pairs}-processes-2026-11-29", 1, 36, [f"low_latency {n}" for n in (8, 64, 128)]),
        (f"{TIMED_PAIRS}-b", 1, 32, CASES),
        (TIMED_PAIRS, 1, 48, CASES),  # ours and plain jobs
        (NORMAL, 1, 24, ["normal 4096"]),
        *((TIMED, 1, 68, [f"{model} fp8 {tokens}" for tokens in (8, 64, 128)]) for model in MODELS),
        (TOLD, 1, 56, TOLD_CASES),
        # The notebook's.
        (TIMED_PAIRS, 1, 92, CASES),
        (f"{pairs}-windows-2026-11-28", 1, 48, CASES),
        (f"{pairs}-clocks-2026-11-28", 0, 60, CASES),
        (f"{pairs}-fallback-2026-11-29", 1, 48, CASES),
        (f"{pairs}-fallback-2026-11-29-d", 1, 96, CASES),
        *((FEW, 1, 56, [f"{model} fp8 {tokens}" for tokens in (8, 64)]) for model in MODELS),
        (DECODE, 1, 49, DECODE_CASES),
    ]
    for (heads, rows), (name, digits, cells, cases) in zip(given, files, strict=True):
        found = measured(name)
        if "clocks" in name:  # our kernels beside the exchange of "all_to_all" came later
            found |= {(c, f"{p}, by XLA", *k): us for (c, p, *k), us in found.items()}
        assert compared(heads, rows, found, digits, cases) >= cells, name


def test_the_fallback_beside_bare_exchanges_is_that_of_its_rows():
    found = measured("expert-parallel-x2-fallback-2026-11-29-d")
    text, said = " ".join(PAGE.split()), {}
    for form in ("", ", gathered"):
        ratios = [
            us / found[case, f"bare {exchanges}", launch, *column]
            for (case, name, launch, *column), us in found.items()
            for exchanges in ("all_to_all twice", "all_gather + psum_scatter")
            if name == f"ours, all_to_all{form}" and launch.startswith("default")
            and column == ["wall", "not waiting"]
        ]  # fmt: skip
        assert len(ratios) == 6
        said[form] = f"{min(ratios):.2f} to {max(ratios):.2f} times"
    assert f"Without waiting it takes {said['']} the bare exchanges" in text
    assert f"gathered {said[', gathered']};" in text


def test_pairs_over_all_to_all_beside_bare_ones_are_those_of_the_rows():
    """The page's tables, and where the aim of 1.5 is missed."""
    rows = rows_of.read([RESULTS / "expert-parallel-x2-fallback-2026-11-30-h.jsonl"])
    found = {
        (row["processes"], row["case"], row["provider"], row["way"]): row["us"]
        for row in rows
        if "us" in row
    }
    page = (ROOT / "docs/expert_parallel.md").read_text()
    tables = {
        processes: page.split(f"| pair, {said} | 8 tokens | 64 tokens | 128 tokens |")[1]
        for processes, said in ((1, "one process"), (2, "two processes"))
    }
    a2a, gather = "bare all_to_all twice", "bare all_gather + psum_scatter"
    between = {f"{bare}, read between": f"{bare}, read between" for bare in (a2a, gather)}
    nothing = {
        a2a.replace("bare", "bare issue:"): f"{a2a}, of blocks",
        gather.replace("bare", "bare issue:"): f"{gather}, divided",
    }
    ratios: dict[int, dict[str, list[float]]] = {1: {}, 2: {}}
    for processes, table in tables.items():
        table = table.split("\n\n")[0]
        for ours, said, pairs in (
            ("chosen", "", between),
            ("issue: chosen", ", nothing between", nothing),
        ):

            def taken(provider, at=processes):
                names = [f"low_latency {tokens}" for tokens in (8, 64, 128)]
                return [found[at, name, provider, "not waiting"] for name in names]

            cells = [f"{us:.1f}" for us in taken(ours)]
            assert f'| `"all_to_all"`{said} | {" | ".join(cells)} |' in table
            for provider, head in pairs.items():
                both = [*zip(taken(ours), taken(provider), strict=True)]
                ratios[processes][head] = [us / of_bare for us, of_bare in both]
                cells = [f"{of_bare:.1f} ({us / of_bare:.2f})" for us, of_bare in both]
                assert f"| {head} | {' | '.join(cells)} |" in table
    missed = {
        (processes, head, tokens)
        for processes, of_pairs in ratios.items()
        for head, of_sizes in of_pairs.items()
        for tokens, ratio in zip((8, 64, 128), of_sizes, strict=True)
        if ratio > 1.5
    }
    blocks, divided = nothing.values()
    assert missed == {
        (2, f"{gather}, read between", 128),
        *((processes, blocks, tokens) for processes in (1, 2) for tokens in (8, 64, 128)),
        *((processes, divided, 64) for processes in (1, 2)),
    }
    text = " ".join(page.split())
    both = [ratios[at][blocks] for at in (1, 2)]
    assert f"at every size, {min(sum(both, [])):.2f} to {max(sum(both, [])):.2f}." in text
    both = [ratios[at][divided][1] for at in (1, 2)]
    assert f"missed with 64 ({both[0]:.2f} and {both[1]:.2f})" in text
    one = ratios[2][f"{gather}, read between"][2]
    assert f"with 128 tokens it takes {one:.2f} times" in text
    gathered = [
        found[at, "low_latency 64", "issue: gathered", "not waiting"]
        / found[at, "low_latency 64", "bare issue: all_to_all twice", "not waiting"]
        for at in (1, 2)
    ]
    assert f"would take {gathered[0]:.2f} and {gathered[1]:.2f} times two bare" in text
    gaps = " ".join((ROOT / "docs/performance.md").read_text().split())
    said = [
        [" / ".join(f"{ratio:.2f}" for ratio in ratios[at][head]) for at in (1, 2)]
        for head in (*between.values(), *nothing.values())
    ]
    for one_process, two_processes in said:
        assert f"{one_process} (one process) and {two_processes} (two processes)" in gaps


def test_forms_of_the_fallback_are_those_of_the_rows():
    """The table of sums by XLA and gathered messages."""
    name, forms = "expert-parallel-x2-fallback-2026-11-30", {}
    for form, of_rows in (
        ("gathered, our sums", "gathered"),
        ("gathered, sums by XLA", "gathered, XLA sums"),
        ("by all_to_all, our sums", "packed"),
        ("by all_to_all, sums by XLA", "packed, XLA sums"),
        ("swapped, our sums", "swapped"),
        ("swapped, sums by XLA", "swapped, XLA sums"),
        ("packed, sums by XLA", "same, XLA sums"),
    ):
        forms[form, "01:39"] = dict.fromkeys(("8", "64", "128"), of_rows)
    ours, kernel = "ours, all_to_all", ", sums by a kernel of ours"
    forms["as chosen now", "01:59"] = dict.fromkeys(("8", "128"), ours)
    forms["the same, our sums", "01:59"] = dict.fromkeys(("8", "128"), ours + kernel)
    forms["gathered, sums by XLA", "01:59"] = {"8": ours, "128": f"{ours}, gathered"}
    forms["packed, sums by XLA", "01:59"] = {"8": f"{ours}, packed", "128": ours}
    files, count = {"01:39": measured(name), "01:59": measured(f"{name}-b")}, 0
    for (form, run), of_sizes in forms.items():
        cells = dict.fromkeys(("8", "64", "128"), "-")
        for tokens, of_rows in of_sizes.items():
            of_size = {
                provider: us
                for (case, provider, launch, _, way), us in files[run].items()
                if (case, launch, way) == (f"low_latency {tokens}", "default", "not waiting")
            }
            if of_rows not in of_size:
                continue
            us, count = of_size[of_rows], count + 1
            bare = ("bare all_to_all twice", "bare all_gather + psum_scatter")
            cells[tokens] = f"{us:.1f} ({', '.join(f'{us / of_size[b]:.2f}' for b in bare)})"
        assert f"| {form} | {run} | {' | '.join(cells.values())} |" in PAGE
    assert count == 27


def test_what_xla_does_for_our_kernels_ahead_of_a_step_is_that_of_its_rows():
    name = "expert-parallel-x2-fallback-timeline-2026-11-29"
    rows, text = rows_of.read([RESULTS / f"{name}.jsonl"]), " ".join(PAGE.split())
    steps = {
        provider: [
            next(r["us"] for r in rows if (r["provider"], r["what"]) == (provider, f"Thunks::{w}"))
            for w in ("Prepare", "Initialize")
        ]
        for provider in ("packed", "packed, gathered", "bare all_to_all twice")
    }
    of_bare, each, said = steps.pop("bare all_to_all twice"), [], []
    for provider, taken in steps.items():
        launched = [
            r["count"] for r in rows
            if r["provider"] == provider and r["side"] == "GPU 0" and "mosaic_gpu" in r["what"]
        ]  # fmt: skip
        kernels = sum(launched) // 3  # executions
        each.append((sum(taken) - sum(of_bare)) / kernels)
        said.append((kernels, *taken))
    (many, *packed), (few, *gathered) = said
    assert (
        f"with {many} of our kernels, that took {packed[0]:.0f} and {packed[1]:.0f} µs, with {few} "
        f"(gathered) {gathered[0]:.0f} and {gathered[1]:.0f}, and {of_bare[0]:.0f} and {of_bare[1]:.0f} for"
    ) in text
    assert f"{min(each):.1f} to {max(each):.1f} µs for each of our kernels" in text
    assert f"{name}.jsonl" in text


def test_pairs_by_the_device_timer_beside_plain_jobs_are_those_of_the_rows():
    """Each at its best launch."""
    found, text = measured(TIMED_PAIRS), " ".join(PAGE.split())

    def best(beginning, case, *column):
        return min(
            us for (c, name, _, *k), us in found.items()
            if c == case and name.startswith(beginning) and k == [*column]
        )  # fmt: skip

    for column, said in (
        (("wall", "donated"), "takes {:.2f} and {:.2f} of the wall clock with donation"),
        (("wall", "not waiting"), "{:.2f} and {:.2f} without donation and waiting"),
        (("timer", "donated"), "and {:.2f} and {:.2f} by the device timer"),
    ):
        of_plain = [best("ours", c, *column) / best("plain", c, *column) for c in CASES]
        assert said.format(*of_plain) in text
    ways = [("wall", way) for way in ("donated", "not waiting", "waiting")]
    slower = [
        (case, way) for case in CASES for way in ways
        if best("ours", case, *way) > best("bare", case, *way)
    ]  # fmt: skip
    assert slower == [("low_latency 128", ("wall", "waiting"))]
    ours, bare = (best(name, *slower[0][:1], *slower[0][1]) for name in ("ours", "bare"))
    assert f"each step of 128 tokens: {ours:.1f} beside {bare:.1f}." in text


def _communication(name):
    """The benchmark's own subtraction, a line for each case and way."""
    return decode_step.communication(rows_of.read([RESULTS / f"{name}.jsonl"]))


def _of_plain(transport, line):
    return float(re.search(rf"ours, {transport} \S+ \((\S+) of plain", line)[1])


def test_what_the_decode_step_pays_by_the_device_timer_is_that_of_its_rows():
    found, fallback, text = {}, [], " ".join(PAGE.split())
    for line in _communication(TIMED):
        case, _, rest = line.partition(", ")
        found[case, rest.partition(": ")[0]] = f"{_of_plain('nvlink_window', rest):.2f}"
        if case.endswith(" 128"):
            fallback += [_of_plain(f"all_to_all{form}", rest) for form in ("", ", gathered")]
    for tokens in (8, 64, 128):
        cells = [
            " / ".join(found[f"{m} fp8 {tokens}", way] for m in MODELS)
            for way in ("donated", "not waiting", "waiting", "timer")
        ]
        assert f"| {tokens} | {' | '.join(cells)} |" in PAGE
    assert (
        f"adds {min(fallback):.2f} to {max(fallback):.2f} of what plain collectives add at" in text
    )
    every = measured(TIMED)
    for (case, name, *column), us in every.items():
        if name.startswith(("plain", "gathered")):
            assert every[case, "ours, nvlink_window", *column] < us


def test_what_the_decode_step_pays_for_communication_is_that_of_its_rows():
    """By the benchmark's own subtraction; and no plain exchange, nor gathered tokens, is faster."""
    found, fallback, nvlink = {}, [], {}
    earlier = [*_communication(FEW), *_communication(DECODE)]
    for line in earlier:
        case, _, rest = line.partition(", ")
        way = rest.partition(": ")[0]
        fallback.append(_of_plain("all_to_all", rest))
        nvlink.setdefault(way, []).append(_of_plain("nvlink", rest))
        found[case, way] = f"{_of_plain('nvlink_window', rest):.2f}"
    for tokens in (8, 64, 128):
        cells = [
            " / ".join(found.get((f"{m} fp8 {tokens}", way), "-") for m in MODELS)
            for way in ("donated", "not waiting", "waiting", "span")
        ]
        assert f"| {tokens} | {' | '.join(cells)} |" in PAGE
    assert len(found) == 4 * 6 - 1  # the first trace of Qwen3's steps at 128 tokens was not cut
    fallback += [
        _of_plain("all_to_all", line)
        for line in _communication(TIMED)
        if "ours, all_to_all " in line
    ]
    said = f"it adds {min(fallback):.2f} to {max(fallback):.2f} of what plain collectives add"
    text = " ".join(PAGE.split())
    assert said in text
    least, most = (f(nvlink["donated"] + nvlink["not waiting"]) for f in (min, max))
    assert f"where the host does not wait ({least:.2f} to {most:.2f}); waiting" in text
    for way, said in (
        ("waiting", "it adds {:.2f} to {:.2f} of"),
        ("span", "by span {:.2f} to {:.2f}."),
    ):
        assert said.format(min(nvlink[way]), max(nvlink[way])) in text
    every = measured(FEW) | measured(DECODE)
    for (case, name, *column), us in every.items():
        if name.startswith(("plain", "gathered")):
            assert every[case, "ours, nvlink_window", *column] < us


def test_how_long_gpu_0_waits_for_the_launch_on_gpu_1_is_that_of_the_rows():
    """By how much a span exceeds the wall clock with donation, in ms a step."""
    more = []
    for name, calls in ((FEW, 16), (DECODE, 16), ("expert-parallel-x2-windows-2026-11-28", 40)):
        every = measured(name)
        for (case, who, *rest), us in every.items():
            if who == "ours, nvlink_window" and rest == ["default", "span", "donated"]:
                wall = every[case, who, "default", "wall", "donated"]
                more.append((us - wall) * calls / 1e3)
    assert len(more) == 7
    assert f"by {min(more):.1f} to {max(more):.1f} ms a step" in " ".join(PAGE.split())


def test_what_clearing_in_one_kernel_takes_is_that_of_its_rows():
    found = measured("expert-parallel-x2-clears-2026-11-29")
    name = "nvlink_window, initialize=True, {} kernel{}"
    one, four = ([found[case, name.format(*kernels), "default", "wall", "donated"] for case in CASES]
                 for kernels in (("one", ""), ("four", "s")))  # fmt: skip
    text = " ".join(PAGE.split())
    assert f"took {one[0]:.0f} µs, and {four[0]:.0f} with four kernels" in text
    assert f"with 128 tokens {one[1]:.0f} and {four[1]:.0f}, most" in text


def test_what_tagged_rows_take_is_that_of_their_rows():
    found, text = measured("expert-parallel-x2-tagged-2026-11-29"), " ".join(PAGE.split())
    tagged, flags = (
        {
            way: [
                found[f"low_latency {n}", f"ours, nvlink_window, {name}", "default", "wall", way]
                for n in (8, 32)
            ]
            for way in ("donated", "not waiting")
        }
        for name in ("tagged rows", "rows ahead of a flag")
    )
    one, two = tagged["donated"]
    assert f"A pair took {one:.1f} µs at 8 tokens and {two:.1f} at 32, and " in text
    one, two = flags["donated"]
    assert f"and {one:.1f} and {two:.1f} with flags (" in text
    figures = [*tagged["not waiting"], *flags["not waiting"]]
    assert "without waiting {:.1f} and {:.1f} for {:.1f} and {:.1f}".format(*figures) in text


def test_mode_normal_is_that_of_its_rows():
    found = measured("expert-parallel-x2-normal-2026-11-29")
    ours, bare = (
        [found["normal 4096", name, "default", *column] for column in COLUMNS.values()]
        for name in ("ours, nvlink", "bare all_to_all twice")
    )
    text = " ".join(PAGE.split())
    said = "took {:.0f} µs donated, {:.0f} not waiting, {:.0f} waiting, span {:.0f}; two bare"
    assert said.format(*ours) in text
    assert "two bare all_to_all {:.0f}, {:.0f}, {:.0f} and {:.0f}.".format(*bare) in text
    found = measured(NORMAL)
    donated, not_waiting, timer = (
        "{:.2f}".format(
            found["normal 4096", "ours, nvlink", "default", *column]
            / found["normal 4096", "bare all_to_all twice", "default", *column]
        )
        for column in (("wall", "donated"), ("wall", "not waiting"), ("timer", "donated"))
    )
    assert donated == not_waiting
    assert (
        f"{donated} of two bare all_to_all's wall clock, donated and not waiting, and {timer} of"
        in text
    )


def test_the_decode_step_told_the_rows_of_a_mean_expert_is_that_of_its_rows():
    """What that changes, what it loses to, and what its communication adds."""
    found, earlier, text = measured(TOLD), measured(BF16) | measured(TIMED), " ".join(PAGE.split())
    ways = [("wall", "donated"), ("wall", "not waiting"), ("wall", "waiting"), ("timer", "donated")]
    donated, not_waiting, waiting, timer = ways
    ours = "ours, nvlink_window, told"

    def of(case, other, way):
        key = case, ours, "default", *way
        return f"{found[key] / found[case, other, 'default', *way]:.2f}"

    deepseek, e4m3, qwen = TOLD_CASES
    untold, boxes = "ours, nvlink_window, untold", "gathered tokens, boxes, told"
    both = [of(case, untold, way) for way in (donated, timer) for case in (deepseek, e4m3)]
    said = "{} of its time without `expected_m` in bfloat16 and {} in e4m3 ({} and {} by the device"
    assert said.format(*both) in text
    both = [of(case, boxes, donated) for case in (deepseek, e4m3)]
    assert "It takes {} and {} of gathered tokens in boxes.".format(*both) in text
    few = "gathered tokens, fused_moe"
    three = (donated, not_waiting, timer)
    shares = [of(case, few, way) for case in (deepseek, qwen) for way in three]
    shares += [of(case, few, waiting) for case in (deepseek, qwen)]
    assert (
        "takes {} donated, {} not waiting and {} by the device timer at DeepSeek-V3's sizes, "
        "and {}, {} and {} at Qwen3-30B-A3B's. Where the host waits for each step **it is "
        "slower**: {} and {}."
    ).format(*shares) in text
    slower = {
        (case, name, *way)
        for (case, name, _, *way), us in found.items()
        if name.startswith("gathered") and us < found[case, ours, "default", *way]
    }
    assert slower == {
        (deepseek, few, *not_waiting), (deepseek, few, *waiting), (qwen, few, *waiting)
    }  # fmt: skip
    before = [
        f"{us[0]:.1f} / {us[1]:.1f}"
        for names in (
            ["ours, nvlink_window"],
            [few],
            ["plain, all_to_all, boxes", "plain, all_gather + psum_scatter, boxes"],
            ["plain, all_to_all, sorted"],
        )
        for us in [
            [min(earlier[case, name, "default", *donated] for name in names)
             for case in (deepseek, qwen)]
        ]
    ]  # fmt: skip
    assert (
        "ours took {}, gathered tokens with `fused_moe` {}, the faster plain exchange into boxes "
        "{}, and a plain all_to_all with rows sorted for `ragged_dot` {}."
    ).format(*before) in text

    def beyond(rows, name, bare, case, way):
        us = rows.get((case, name, "default", *way))
        return us and us - rows[case, bare, "default", *way]

    def plain(case, way):
        names = {name for c, name, *_ in earlier if c == case and name.startswith("plain")}
        return min(beyond(earlier, name, "no communication", case, way) for name in names)

    def line(head, value, digits=1):
        cells = (
            " / ".join("-" if us is None else f"{us:.{digits}f}" for us in map(value, TOLD_CASES, [way] * 3))
            for way in ways
        )  # fmt: skip
        return f"| {head} | {' | '.join(cells)} |"

    def told(*at):
        return beyond(found, ours, "no communication, told", *at)

    assert line("ours, told (17:19)", told) in PAGE
    said = line(
        "ours, untold (17:19)", lambda *at: beyond(found, untold, "no communication, untold", *at)
    )
    assert said in PAGE
    assert line("the faster plain exchange, untold (16:41; e4m3 13:54)", plain) in PAGE
    said = line("ours, told, relative to that", lambda *at: told(*at) / plain(*at), 2)
    assert said in PAGE
    gaps = " ".join((ROOT / "docs/performance.md").read_text().split())
    assert (
        "µs a layer: DeepSeek-V3's sizes {:.0f}, gathered tokens with `fused_moe` {:.0f}; "
        "Qwen3-30B-A3B's {:.0f} and {:.0f}. Donated, in the same order: {:.0f} and {:.0f}, "
        "{:.0f} and {:.0f}."
    ).format(
        *(found[case, name, "default", *way]
          for way in (waiting, donated) for case in (deepseek, qwen) for name in (ours, few))
    ) in gaps  # fmt: skip
    pair = [[found[c, n, "default", *donated] for n in (ours, untold)] for c in (deepseek, e4m3)]
    assert f"without it ours takes {pair[0][1]:.0f}." in gaps
    said = "takes {:.0f} µs a layer with it and {:.0f} without (2026-11-29, jax"
    assert said.format(*pair[1]) in " ".join((ROOT / "docs/fp8.md").read_text().split())


def test_told_decode_steps_of_two_processes_are_those_of_the_rows():
    """The table's cells and prices; no plain exchange, nor gathered tokens, is faster than ours."""
    cases = [*(f"deepseek-v3 fp8 {tokens}" for tokens in (8, 64, 128)), "qwen3-30b-a3b fp8 64"]
    rows = measured("decode-step-x2-2026-11-30-b")
    found = {(case, name, way): us for (case, name, *_, way), us in rows.items()}
    names = {name for _, name, _ in found}
    others = {name for name in names if name.startswith(("plain", "gathered"))}
    plain = {name for name in others if name.startswith("plain")}
    assert len(names) == 6 and len(others) == 3 and len(plain) == 2
    prices, page = {}, (ROOT / "docs/expert_parallel.md").read_text()
    for name in names:
        ours, cells = name.startswith("ours"), []
        for way in ("donated", "not waiting", "waiting"):
            of_way = []
            for case in cases:
                us, alone = found[case, name, way], found[case, "no communication", way]
                cell = f"{us:.1f}"
                if ours:
                    assert us < min(found[case, other, way] for other in others)
                    of_plain = min(found[case, other, way] for other in plain) - alone
                    prices[name.removeprefix("ours, "), case, way] = (us - alone) / of_plain
                    cell += f" ({(us - alone) / of_plain:.2f})"
                of_way.append(cell)
            cells.append(" / ".join(of_way))
        head = re.sub(r"^ours, (\w+)$", r'`"\1"`', name)
        assert f"| {head} | {' | '.join(cells)} |" in page
    text, window = " ".join(page.split()), "nvlink_window"
    *few, odd = sorted(price for (name, *_), price in prices.items() if name == window)
    assert odd == prices[window, cases[2], "donated"]
    assert f"adds is {few[0]:.2f} to {few[-1]:.2f} of what" in text and f"adds {odd:.2f}." in text
    fallback = {key[1:]: price for key, price in prices.items() if key[0] == "all_to_all"}
    few = sorted(price for (_, way), price in fallback.items() if way != "waiting")
    assert f"adds is {few[0]:.2f} to {few[-1]:.2f} of it where the host does not wait." in text
    *few, most = sorted(price for (_, way), price in fallback.items() if way == "waiting")
    assert most == fallback[cases[0], "waiting"] > 0.8
    assert f"it is {most:.2f}: the aim is **missed**; else at most {few[-1]:.2f}." in text
    row = next(
        row
        for row in rows_of.read([RESULTS / "decode-step-x2-2026-11-30-b.jsonl"])
        if (row.get("case"), row.get("provider"), row.get("way"))
        == (cases[2], f"ours, {window}", "donated")
    )
    assert f"{row['p20_us']:.1f} at the 20th percentile, {row['p80_us']:.1f} at the 80th" in text
    earlier = measured("decode-step-x2-2026-11-30")
    now, then = (
        rows_[cases[1], "no communication", "default", "wall", "donated"]
        for rows_ in (rows, earlier)
    )
    assert f"takes {now:.1f} µs donated, and took {then:.1f} in the run" in text


def test_readme_says_what_the_rows_say():
    found = measured(TIMED_PAIRS)

    def pair(name):
        return " / ".join(
            f"{found[case, name, 'default', 'wall', 'donated']:.0f}" for case in CASES
        )

    text = " ".join((ROOT / "README.md").read_text().split())
    plain = min("all_to_all", "all_gather + psum_scatter", key=lambda kind: found[
        CASES[1], f"plain job, {kind}, sorted", "default", "wall", "donated"])  # fmt: skip
    others = pair(f"plain job, {plain}, sorted")
    ours, bare = pair("ours, nvlink_window"), pair("bare all_to_all twice")
    said = f"8 / 128 tokens a GPU | wall, 2026-11-29 | {ours} | two bare all_to_all {bare}, "
    assert f"{said}plain collectives {others} |" in text
    assert "wall clock per step of steps that follow each other without a pause, with the" in text
    quiet = measured(f"{TIMED_PAIRS}-b")
    ours, bare = (
        " / ".join(f"{quiet[case, name, 'default', 'wall', 'donated']:.0f}" for case in CASES)
        for name in ("ours, nvlink_window", "bare all_to_all twice")
    )
    assert f"without them ours took {ours} and two bare all_to_all {bare}." in text
