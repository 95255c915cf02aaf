"""The `moe-align` command, run as its users run it, and the reader of profiler traces behind it."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import moe_align_jax
from moe_align_jax import _traces as traces
from moe_align_jax import cli
from moe_align_jax._cli import checkout, demo, info
from moe_align_jax._cli.app import app
from moe_align_jax.types import AlignedBlocks
from tests.helpers import unwritable


@pytest.fixture
def moe_align(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, list(arguments), catch_exceptions=False)


def test_demo_shows_both_routings_and_says_correct(moe_align):
    done = moe_align("demo")
    assert done.exit_code == 0
    text = done.output
    assert text.count("equal to a plain NumPy loop, bit for bit") == 2
    assert "64 experts, top-2" in text and "256 experts, top-8" in text
    assert jax.devices()[0].device_kind in text
    best = moe_align_jax.select_implementation((4096, 2), block_size=128, num_experts=64)
    assert f"ran {best.implementation} (form '{best.form}')" in text
    # The figures shown, from the same routing by other means.
    ids = np.asarray(demo.route(demo.ROUTINGS[0], 0))
    blocks = -(-np.bincount(ids.ravel(), minlength=64) // 128)
    share = 1 - 8192 / (blocks.sum() * 128)
    assert f"8192 pairs in {blocks.sum()} blocks" in text
    assert f"padding share {share:.1%}" in text


def test_demo_says_what_its_routings_are(moe_align):
    done = moe_align("demo", "--seed", "3")
    assert "Two random routings, of the sizes of real layers" in done.output
    assert "(seed 3)" in done.output and "real routing" not in done.output
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert "real routing" not in readme and "real routing" not in moe_align("--help").output


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30])
def test_a_seed_that_jax_does_not_take_is_a_usage_error(moe_align, seed):
    done = moe_align("demo", "--seed", str(seed))
    assert done.exit_code == 2 and "Invalid value for '--seed'" in done.output


def test_demo_fails_when_a_result_is_wrong(moe_align, monkeypatch):
    real = demo.moe_align_block_size

    def swapped(ids, **options):
        out = real(ids, **options)
        rows = out.sorted_token_ids
        return out._replace(sorted_token_ids=rows.at[0].set(rows[1]).at[1].set(rows[0]))

    monkeypatch.setattr(demo, "moe_align_block_size", swapped)
    done = moe_align("demo")
    assert done.exit_code == 1
    assert done.output.count("WRONG") == 2 and "sorted_token_ids[0] is" in done.output


def test_demo_loop_gives_the_worked_example():
    out = demo.plain_loop(np.array([[2, 3], [1, 2], [1, 3]]), block_size=4, num_experts=4)
    assert out.sorted_token_ids.tolist() == [2, 4, 6, 6, 0, 3, 6, 6, 1, 5, 6, 6] + [6] * 6
    assert out.expert_ids.tolist() == [1, 2, 3, -1, -1]
    assert out.num_tokens_post_padded.tolist() == [12]
    assert out.tokens_per_expert.tolist() == [0, 2, 2, 2]


def test_demo_differences_name_field_and_place():
    want = demo.plain_loop(np.array([0, 1, 1]), block_size=2, num_experts=2)
    assert demo.differences(want, want) == []
    counts = want.tokens_per_expert + np.array([0, 1], np.int32)
    got = want._replace(tokens_per_expert=counts, sorted_token_ids=want.sorted_token_ids[:-1])
    assert isinstance(got, AlignedBlocks)
    found = demo.differences(got, want)
    assert found == [
        "sorted_token_ids is int32 (4,), not int32 (5,)",
        "tokens_per_expert[1] is 3, not 2",
    ]


def test_demo_refuses_an_unknown_implementation(moe_align):
    done = moe_align("demo", "--implementation", "cuda")
    assert done.exit_code == 2
    assert "none of mosaic_gpu, xla, emulator" in done.output


def test_demo_says_why_a_named_implementation_cannot_run(moe_align):
    if jax.default_backend() == "gpu":
        pytest.skip("the kernels run on this machine")
    done = moe_align("demo", "--implementation", "mosaic_gpu")
    assert done.exit_code == 1
    assert "Cannot run here" in done.output and "NVIDIA GPUs only" in done.output


def test_info_names_versions_devices_and_reasons(moe_align):
    done = moe_align("info")
    assert done.exit_code == 0
    assert jax.__version__ in done.output and moe_align_jax.__version__ in done.output
    assert jax.devices()[0].device_kind in done.output
    for name in ("mosaic_gpu", "xla", "emulator"):
        assert name in done.output
    in_part = "run on GPUs of ours in part" in done.output
    assert in_part == (not jax.__version__.startswith("0.11.2"))


def test_info_reports_what_select_implementation_says():
    found = info.implementations("cpu")
    assert found["xla"] == (True, "the default")
    assert found["emulator"][0]
    assert found["mosaic_gpu"] == (
        False,
        "Mosaic GPU kernels run on NVIDIA GPUs only, not on 'cpu'",
    )


def test_info_says_which_jax_has_run_on_a_gpu(monkeypatch):
    monkeypatch.setattr(info, "jax_version", lambda: (0, 11, 2))
    assert info.gpu_experience() == ""
    monkeypatch.setattr(info, "jax_version", lambda: (0, 12, 0))
    assert "in part: the library's tests on an H100, and the first 76 of" in info.gpu_experience()
    # What it says is what the notebook says: of each release that it names, and of no other one.
    pages = (Path(__file__).parents[2] / "docs" / "notebook").glob("*.md")
    measured = " ".join(" ".join(page.read_text().split()) for page in pages)  # lines are wrapped
    for release in info.JAX_RUN_ON_A_GPU:
        assert f"jax {'.'.join(map(str, release))}" in measured
    assert "of the bridge's the first 76 passed" in measured
    assert 'and the tests of "nvlink_window" on two' in info.gpu_experience()
    assert 'all 13 tests of "nvlink_window" for two GPUs passed' in measured
    monkeypatch.setattr(info, "jax_version", lambda: (0, 12, 5))
    said = info.gpu_experience()
    assert "lowered only, never run on a GPU of ours (0.11.2, 0.12.0 were)" in said


def test_profile_reads_its_own_trace_back(moe_align, tmp_path):
    sizes = ["--num-tokens", "512", "--num-experts", "32", "--top-k", "2", "--repeats", "3"]
    done = moe_align("profile", *sizes, "--out", str(tmp_path))
    assert done.exit_code == 0
    assert "µs per call" in done.output and "sum:" in done.output
    file = traces.newest_xplane(tmp_path)
    assert str(file.parent) in done.output
    assert list(file.parent.glob("*.trace.json.gz")), "Perfetto's file is missing"
    if jax.default_backend() == "cpu":
        events = [e for e in traces.cpu_events(traces.load(file)) if "moe_align" in e.module]
        sort = next(row for row in traces.totals(events) if row.name.startswith("sort"))
        assert sort.name in done.output
        assert sort.count % 3 == 0 and sort.total_us > 0


def test_profile_says_before_the_run_that_its_folder_cannot_be_written(
    moe_align, tmp_path, monkeypatch
):
    monkeypatch.setattr(jax.profiler, "trace", lambda *_: pytest.fail("it ran"))
    for folder in unwritable(tmp_path):
        done = moe_align("profile", "--num-tokens", "8", "--out", str(folder))
        assert done.exit_code == 1
        assert done.output.startswith("Cannot write: ") and str(folder.parent) in done.output


def test_a_full_stdout_is_one_line_on_stderr():
    """It was a traceback, and one more by the line that said so."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "moe_align_jax.cli", "info"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("Cannot write: ") and "No space left" in done.stderr


def test_an_interrupt_while_jax_is_imported_is_no_traceback(monkeypatch):
    """jax takes most of a second to import, in which typer catches nothing."""
    monkeypatch.delitem(sys.modules, "moe_align_jax._cli.app")

    class Interrupting:
        def find_spec(self, name, path=None, target=None):
            if name == "moe_align_jax._cli.app":
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    assert raised.value.code == 130


def test_profile_refuses_more_choices_than_experts(moe_align):
    done = moe_align("profile", "--num-experts", "4", "--top-k", "8")
    assert done.exit_code == 2 and "--top-k 8" in done.output


@pytest.mark.parametrize(
    "size",
    [
        ("--num-experts", 10**30),
        ("--num-tokens", 10**30),
        ("--block-size", 2**31),
        ("--block-size", 2**30),
        ("--repeats", 10**30),
    ],
    ids=str,
)
def test_profile_refuses_sizes_beyond_int32_by_its_options(moe_align, size):
    done = moe_align("profile", *map(str, size))
    assert done.exit_code == 2 and size[0] in done.output and "Traceback" not in done.output


def test_bench_outside_a_checkout_says_so(moe_align, monkeypatch, tmp_path):
    package = tmp_path / "moe_align_jax" / "__init__.py"
    monkeypatch.setattr(moe_align_jax, "__file__", str(package))
    assert checkout.find() is None
    done = moe_align("bench")
    assert done.exit_code == 1 and "needs a checkout" in done.output


def test_bench_says_before_the_run_that_its_file_cannot_be_written(
    moe_align, tmp_path, monkeypatch
):
    """It told so by a traceback, when the first case had been timed."""
    from benchmarks import run

    monkeypatch.setattr(run, "run_case", lambda *_: pytest.fail("it ran"))
    for folder in unwritable(tmp_path):
        done = moe_align("bench", "--cases", "8x256x16", "--out", str(folder / "rows.jsonl"))
        assert done.exit_code == 1
        assert f"Cannot write: {folder / 'rows.jsonl'}: " in done.output


def test_bench_hands_its_options_on(monkeypatch, moe_align):
    seen = []
    monkeypatch.setattr(checkout, "run", lambda *call: seen.append(call) or 3)
    done = moe_align("bench", "--cases", "8x256x16", "--calls", "2", "--help")
    root = Path(__file__).resolve().parents[2]
    assert seen == [(root, "benchmarks.run", ["--cases", "8x256x16", "--calls", "2", "--help"])]
    assert done.exit_code == 3


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_entry_point_names_the_extra(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from moe_align_jax.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"needs {missing}" in done.stderr and "moe-align-jax[cli]" in done.stderr
    assert "pip install -e '.[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_messages_that_name_a_package_of_ours_name_the_checkout_too():
    """The package is not on PyPI yet."""
    root = Path(moe_align_jax.__file__).parents[1]
    sources = [*(root / "moe_align_jax").rglob("*.py"), *(root / "torch_bridge").rglob("*.py")]
    named = set()
    for path in sources:
        source = path.read_text()
        for extra in re.findall(r"pip install 'moe-align-jax\[(\w+)\]'", source):
            assert f"pip install -e '.[{extra}]'" in source, path
            named.add(extra)
    assert named == {"torch", "cli", "plot", "arrow", "metrics", "yaml"}


def test_entry_point_prints_the_version():
    command = [sys.executable, "-m", "moe_align_jax.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, moe_align_jax.__version__)


# -- traces -----------------------------------------------------------------------------------


def gpu_trace(lines: dict[str, list[tuple[str, float, float]]]):
    """A trace of one GPU: line name -> (kernel, start µs, duration µs)."""
    names = sorted({name for events in lines.values() for name, _, _ in events})
    text = []
    for number, (line, events) in enumerate(lines.items()):
        inside = "".join(
            f"events {{ metadata_id: {names.index(name) + 1} "
            f"offset_ps: {int(start * 1e6)} duration_ps: {int(length * 1e6)} }} "
            for name, start, length in events
        )
        text.append(f'lines {{ id: {number} name: "{line}" timestamp_ns: 0 {inside} }}')
    text += [
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}'
        for i, name in enumerate(names, start=1)
    ]
    plane = f'planes {{ id: 1 name: "/device:GPU:0" {" ".join(text)} }}'
    return jax.profiler.ProfileData.from_text_proto(plane)


OURS = "block_align_mosaic_gpu_kernel"


def executions_of(calls: int, *, starts=(0.0, 5000.0, 12000.0), kernel=OURS):
    """Each execution: `calls` kernels of 2 µs, 3 µs apart."""
    return [(kernel, start + 3 * i, 2.0) for start in starts for i in range(calls)]


def test_span_is_first_start_to_last_end_over_calls():
    events = traces.gpu_events(gpu_trace({"Stream #14(Compute)": executions_of(10)}))
    spans = traces.span_per_call(events, executions=3, calls=10)
    # Ten kernels: nine steps of 3 µs and one kernel of 2 µs.
    assert spans.us_per_call == pytest.approx([2.9] * 3)
    assert spans.kernels_per_call == 1 and spans.note == ""


def test_span_leaves_out_derived_lines():
    profile = gpu_trace(
        {
            "Stream #14(Compute)": executions_of(4),
            "XLA Ops": [("fusion", 0.0, 20000.0)],
            "XLA Modules": [("jit_program", 0.0, 20000.0)],
        }
    )
    spans = traces.span_per_call(traces.gpu_events(profile), executions=3, calls=4)
    assert spans.us_per_call == pytest.approx([(3 * 3 + 2) / 4] * 3)


@pytest.mark.parametrize("stream", ["Stream #14(Compute,MemcpyH2D)", "Stream #15(MemcpyH2D)"])
def test_span_counts_host_copies(stream):
    """The first execution copies metadata 5 µs ahead of its first kernel, the second 6 behind its last."""
    copies = [("MemcpyH2D", -5.0 + 100, 1.0), ("Memcpy (HtoD)", 5011.0 + 6 + 100, 2.0)]
    later = [(kernel, start + 100, length) for kernel, start, length in executions_of(4)]
    lines = {"Stream #14(Compute,MemcpyH2D)": later}
    lines[stream] = lines.get(stream, []) + copies
    events = traces.gpu_events(gpu_trace(lines))
    spans = traces.span_per_call(events, executions=3, calls=1)
    assert spans.us_per_call == pytest.approx([16, 19, 11]) and spans.note == ""
    assert [traces.is_host_copy(event) for event in events].count(True) == 2
    [by_gaps] = traces.spans_in_order(events, executions=3, calls=[1])
    assert by_gaps.us_per_call == pytest.approx([16, 19, 11])


def test_events_are_those_of_one_gpu():
    text = "".join(
        f'planes {{ id: {i} name: "/device:GPU:{i}" lines {{ id: 0 name: "Stream #1" timestamp_ns: 0 '
        f"events {{ metadata_id: 1 offset_ps: {i} duration_ps: 5000 }} }} "
        f'event_metadata {{ key: 1 value {{ id: 1 name: "k{i}" }} }} }} '
        for i in (1, 10, 11)
    )
    profile = jax.profiler.ProfileData.from_text_proto(text)
    assert [e.name for e in traces.gpu_events(profile, 1)] == ["k1"]
    assert traces.gpu_events(profile, 0) == []


def test_span_takes_other_lines_where_none_is_called_a_stream():
    lines = {"compute 7": executions_of(4), "XLA Ops": [("fusion", 0.0, 20000.0)]}
    profile = gpu_trace(lines)
    spans = traces.span_per_call(traces.gpu_events(profile), executions=3, calls=4)
    assert spans.us_per_call == pytest.approx([11 / 4] * 3)
    assert traces.contents(profile) == "/device:GPU:0 [compute 7: 12, XLA Ops: 1]"


def test_span_joins_the_streams_of_one_execution():
    second = [(kernel, start + 30, length) for kernel, start, length in executions_of(1)]
    profile = gpu_trace({"Stream #1(Compute)": executions_of(2), "Stream #2(Compute)": second})
    spans = traces.span_per_call(traces.gpu_events(profile), executions=3, calls=3)
    assert spans.us_per_call == pytest.approx([32 / 3] * 3)


def test_span_falls_back_to_our_named_kernels_and_says_so():
    lines = executions_of(4) + [("stray_memset", 7000.0, 1.0)]
    events = traces.gpu_events(gpu_trace({"Stream #1(Compute)": lines}))
    spans = traces.span_per_call(events, executions=3, calls=4)
    assert spans.us_per_call == pytest.approx([11 / 4] * 3)
    assert "named kernels only" in spans.note


def test_span_falls_back_to_sums_when_executions_cannot_be_told_apart():
    lines = executions_of(4)[:-1]
    events = traces.gpu_events(gpu_trace({"Stream #1(Compute)": lines}))
    spans = traces.span_per_call(events, executions=3, calls=4)
    assert spans.us_per_call == pytest.approx([11 * 2 / 12])
    assert "sum of kernel times" in spans.note


def test_span_notes_kernels_that_overlap():
    lines = {f"Stream #{i}(Compute)": executions_of(4) for i in range(3)}
    events = traces.gpu_events(gpu_trace(lines))
    spans = traces.span_per_call(events, executions=3, calls=12)
    assert spans.us_per_call == pytest.approx([11 / 12] * 3)
    assert "overlapped" in spans.note


def test_span_of_nothing_is_empty():
    spans = traces.span_per_call([], executions=3, calls=4)
    assert spans.us_per_call == [] and "no kernel" in spans.note


def test_totals_put_the_costliest_first():
    lines = [("small", 0.0, 1.0), ("big", 10.0, 5.0), ("small", 20.0, 2.0)]
    rows = traces.totals(traces.gpu_events(gpu_trace({"Stream #1": lines})))
    assert [(r.name, r.count, r.total_us) for r in rows] == [("big", 1, 5.0), ("small", 2, 3.0)]


def test_newest_xplane_without_a_trace_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no trace"):
        traces.newest_xplane(tmp_path)
