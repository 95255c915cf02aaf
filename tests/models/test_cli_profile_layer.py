"""`moe-align profile --model`: what the tables say is what the trace and plain arithmetic say."""

import re

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from moe_align_jax import _traces as traces
from moe_align_jax._cli import profile_layer
from moe_align_jax._cli.app import app
from moe_align_jax._cli.profile_layer import Operation


@pytest.fixture
def moe_align(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, list(arguments), catch_exceptions=False)


def cells(text: str, title: str) -> list[list[str]]:
    """The rows of the table below a title."""
    body = text[text.index(title) :]
    body = body[: body.index("└")]
    return [
        [c.strip() for c in line.strip("│").split("│")] for line in body.splitlines() if "│" in line
    ]


@pytest.mark.gpu
def test_kernels_of_a_gpu_belong_to_stages(moe_align, tmp_path):
    """In a CUDA graph a kernel has no operation: the profiled program has none."""
    options = ["--model", "qwen3-30b-a3b", "--scale", "8", "--num-tokens", "512", "--repeats", "2"]
    done = moe_align("profile", *options, "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    found = {(stage, direction) for stage, direction, *_ in cells(done.output, "time per stage")}
    for stage in ("gate and up", "down", "combine"):
        assert {(stage, "forward"), (stage, "backward")} <= found
    [attributed] = re.findall(r"([\d.]+)% of it attributed", done.output)
    assert float(attributed) > 90
    [span] = re.findall(r"device span: ([\d.]+) µs", done.output)
    assert 0 < float(span) < 1e6


def test_a_redirected_table_is_not_cut(monkeypatch, tmp_path):
    """A file has no width: rich would take 80 characters, and cut the cells that do not fit."""
    monkeypatch.delenv("COLUMNS", raising=False)
    options = ["--model", "qwen3-30b-a3b", "--scale", "64", "--num-tokens", "16", "--repeats", "1"]
    done = CliRunner().invoke(app, ["profile", *options, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = cells(done.output, "time per stage")
    assert {len(row) for row in rows} == {8}
    assert {row[0] for row in rows} >= {"route", "align", "gate and up", "down", "combine"}
    assert "…" not in done.output


def test_a_layers_table_is_what_its_trace_holds(moe_align, tmp_path):
    options = ["--model", "qwen3-30b-a3b", "--scale", "64", "--num-tokens", "16", "--repeats", "2"]
    # 128 pairs of 128 experts: enough for an alignment, and few enough to be quick.
    done = moe_align("profile", *options, "--out", str(tmp_path))
    text = done.output
    assert done.exit_code == 0, text
    assert "16 tokens, top-8 of 128 experts, hidden 32, width 8, float32, 2 calls" in text
    rows = cells(text, "time per stage")
    found = {(stage, direction) for stage, direction, *_ in rows}
    assert {("align", "forward")} < found
    for stage in ("route", "gate and up", "down", "combine"):
        assert {(stage, "forward"), (stage, "backward")} <= found
    for stage, _, us, _, flops, _, _, roofline in rows:
        assert float(us) > 0
        if stage in ("gate and up", "down"):
            assert float(flops.replace(",", "")) >= 0 and 0 < float(roofline.rstrip("%")) < 1000

    # The trace, once more: every operation that holds no other ones, by the program's own module.
    events = traces.cpu_events(traces.load(traces.newest_xplane(tmp_path)))
    mine = [
        e for e in events if e.module == "jit_moe_layer" and not re.match(r"while|call", e.name)
    ]
    total = sum(e.duration_ns for e in mine) / 1e3 / 2
    printed, attributed = re.search(r"sum: ([\d.]+) µs per call, ([\d.]+)% of it", text).groups()
    assert float(printed) == pytest.approx(total, rel=1e-3)
    assert sum(float(row[2]) for row in rows) == pytest.approx(total, rel=1e-3)
    assert float(attributed) > 90
    kernels = cells(text, "time per XLA operation")
    assert sum(float(row[3]) for row in kernels) == pytest.approx(total, rel=1e-3)
    assert "ui.perfetto.dev" in text and "xprof --logdir" in text


@pytest.mark.parametrize(
    "options, said",
    [
        (
            ["--model", "gpt"],
            "'--model': 'gpt' is none of qwen3-30b-a3b, mixtral-8x7b, deepseek-v3",
        ),
        (["--model", "deepseek-v3", "--top-k", "2"], "leave them out with --model"),
        (["--scale", "2"], "name it with --model"),
    ],
    ids=["an unknown model", "a size of the model's", "a scale of no model"],
)
def test_options_that_do_not_fit(moe_align, options, said):
    done = moe_align("profile", *options)
    assert done.exit_code == 2 and said in done.output


def test_a_scaled_layer_keeps_its_experts():
    layer = profile_layer.MODELS["qwen3-30b-a3b"].scaled(20)
    assert (layer.experts, layer.top_k, layer.hidden, layer.ffn) == (128, 8, 96, 32)
    assert profile_layer.MODELS["qwen3-30b-a3b"].scaled(10**6).ffn == 8


HLO = """HloModule jit_moe_layer, entry_computation_layout={(f32[4]{0})->f32[4]{0}}
  %fusion.2 = f32[8,32]{1,0} fusion(%p), kind=kLoop, metadata={op_name="jit(f)/jvp(experts)/gate_up/dot"}
  ROOT while.43 = (s32[], f32[4]{0}, /*index=2*/pred[]) while(%tuple), metadata={op_name="a/down/while"}
  %custom-call.1 = bf16[8]{0} custom-call(%x), metadata={op_name="transpose(jvp(route))/route_topk/mul"}
  %copy.7 = f32[4]{0} copy(%y)
"""


def test_operations_are_read_from_the_programs_text():
    assert profile_layer.operations(HLO) == {
        "fusion.2": Operation("fusion", "jit(f)/jvp(experts)/gate_up/dot"),
        "while.43": Operation("while", "a/down/while"),
        "custom-call.1": Operation("custom-call", "transpose(jvp(route))/route_topk/mul"),
        "copy.7": Operation("copy", ""),
    }


@pytest.mark.parametrize(
    "path, stage",
    [
        (
            "jit(f)/jvp(experts)/jit(run)/fused_moe/gate_up/while/body/dot",
            ("gate and up", "forward"),
        ),
        ("jit(f)/transpose(jvp(experts))/fused_moe/down/add", ("down", "backward")),
        ("jit(f)/jvp(experts)/jit(_align)/moe_align_block_size/sort", ("align", "forward")),
        ("jit(f)/transpose(jvp(route))/mul", ("route", "backward")),
        ("jit(f)/jvp(experts)/jit(run)/fused_moe/copy", ("experts, other", "forward")),
        ("jit(f)/add", ("not attributed", "")),
        ("", ("not attributed", "")),
    ],
)
def test_the_stage_of_a_path(path, stage):
    assert profile_layer.stage_of(path) == stage


def gpu_trace():
    """Four kernels of 10, 20, 30 and 40 µs, with the instruction that three of them were launched for."""
    operations = ["fusion.2", "custom-call.1", "unknown.9", None]
    events, names = [], []
    for i, operation in enumerate(operations):
        stat = f'stats {{ metadata_id: 1 str_value: "{operation}" }}' if operation else ""
        start, length = i * 100_000_000, (i + 1) * 10_000_000
        events.append(
            f"events {{ metadata_id: {i + 1} offset_ps: {start} duration_ps: {length} {stat} }}"
        )
        names.append(
            f'event_metadata {{ key: {i + 1} value {{ id: {i + 1} name: "kernel_{i}" }} }}'
        )
    return jax.profiler.ProfileData.from_text_proto(
        'planes { id: 1 name: "/device:GPU:0" '
        f'lines {{ id: 1 name: "Stream #1" timestamp_ns: 0 {" ".join(events)} }} {" ".join(names)} '
        'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } } }'
    )


def test_kernels_of_a_gpu_are_attributed_by_their_instruction():
    events = traces.gpu_events(gpu_trace(), operations=True)
    assert [e.operation for e in events] == ["fusion.2", "custom-call.1", "unknown.9", ""]
    stages, totals = profile_layer.attribute(events, profile_layer.operations(HLO))
    assert stages == {
        ("gate and up", "forward"): 10.0,
        ("route", "backward"): 20.0,
        ("not attributed", ""): 70.0,
    }
    assert [(t.name, t.stage, t.count) for t in totals] == [
        ("kernel_3", "not attributed", 1),
        ("kernel_2", "not attributed", 1),
        ("kernel_1", "route, backward", 1),
        ("kernel_0", "gate and up, forward", 1),
    ]


def test_the_time_of_a_loop_is_that_of_its_body():
    program = {
        "while.1": Operation("while", "down"),
        "dot.1": Operation("dot", "x/down/while/body"),
    }
    events = [traces.Event("while.1", 0, 9000), traces.Event("dot.1", 1000, 5000)]
    stages, _ = profile_layer.attribute(events, program)
    assert stages == {("down", "forward"): 4.0}


def test_the_least_work_of_a_layer():
    """By hand: 4 tokens, 2 experts each, of which 3 of 5 are hit; hidden 16, width 8, float32."""
    layer = profile_layer.Layer(experts=5, top_k=2, hidden=16, ffn=8)
    work = profile_layer.least_work(layer, tokens=4, pairs=8, hit=3, itemsize=4)
    gate_up, down = 16 * 16, 8 * 16  # weights of an expert
    assert work["gate and up", "forward"] == (2 * 8 * gate_up, 4 * (4 * 16 + 3 * gate_up + 8 * 8))
    assert work["down", "forward"] == (2 * 8 * down, 4 * (8 * 8 + 3 * down + 8 * 16))
    moved = 2 * (8 * 8) + 8 * 16 + (3 + 5) * down
    assert work["down", "backward"] == (4 * 8 * down, 4 * moved)
    assert work["combine", "forward"] == (2 * 8 * 16, 4 * (8 * 16 + 4 * 16) + 8 * 8)
    assert work["route", "forward"][0] == 2 * 4 * 16 * 5


def test_a_rate_is_that_of_many_calls_after_each_other(monkeypatch):
    """The host pays once for all of them; each call takes what the one before gave."""
    ticks = iter([0.0, 24.0, 100.0, 112.0, 200.0, 236.0, 300.0, 324.0, 400.0, 424.0])
    monkeypatch.setattr(profile_layer.time, "perf_counter", lambda: next(ticks))
    rests = []
    monkeypatch.setattr(profile_layer.time, "sleep", rests.append)
    traced, given = [], []

    def program(x, y):
        traced.append(x)
        jax.debug.callback(lambda value: given.append(float(value)), x)
        return x + y

    assert profile_layer._seconds(program, 4, jnp.float32(1), jnp.float32(2)) == 12.0 / 4
    jax.effects_barrier()
    assert len(traced) == 4 and sorted(given) == sorted([1.0, 3.0, 5.0, 7.0] * 6)
    assert rests == [profile_layer._REST] * 5  # the card's, before each run that is timed


def test_a_stage_whose_work_is_done_by_others_has_no_share():
    """A tenth, all, and three times of the roofline."""
    rates = profile_layer.Rates(1e12, 1e12)
    times = {("combine", "forward"): 10.0, ("combine", "backward"): 1.0, ("down", "forward"): 1 / 3}
    work = dict.fromkeys(times, profile_layer.Work(1e6, 1e3))
    table = profile_layer._stage_table(times, work, rates)
    assert [*table.columns[1].cells] == ["forward", "forward", "backward"]
    assert [*table.columns[-1].cells] == ["elsewhere", "10.0%", "100.0%"]
