"""benchmarks/clocks.py, and the two benchmarks that use it, on this machine."""

import argparse
import json
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    clocks,
    device_timer,
    exchanges,
    expert_parallel,
    jit_clocks,
    masked_quant,
    processes,
    router,
)
from benchmarks import rows as rows_of
from benchmarks.cases import Case
from moe_align_jax._cli.demo import plain_loop

TINY = Case(num_pairs=24, num_experts=5, block_size=4, top_k=2)


def counting(name="plus one", by=1, **options):
    return clocks.Step(name, lambda x, d: x + d, jnp.int32(0), (jnp.int32(by),), 2, **options)


# -- steps by the host's clock --------------------------------------------------------------------------


@pytest.mark.parametrize("way", clocks.WAYS)
def test_a_step_hands_its_result_on(way):
    [program] = clocks.compile_all([counting(by=3)])
    assert int(program.run(way, program.fresh(), 7)) == 21
    assert int(program.step.carry) == 0  # never donated itself
    seen = []
    step = counting(check=lambda carry: seen.append(int(carry)))
    [program] = clocks.compile_all([step])
    samples = clocks.wall(program, way, executions=6, rounds=3)
    # One round that is not timed, then three.
    assert seen == [24] and len(samples) == 3 and min(samples) > 0


def test_only_one_way_donates_and_only_one_waits(monkeypatch):
    [program] = clocks.compile_all([counting()])
    calls = []
    for donated, jitted in list(program.jitted.items()):
        program.jitted[donated] = lambda *a, d=donated, f=jitted: calls.append(d) or f(*a)
    waits = []
    real = jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waits.append(1) or real(x))
    for way, donated, waited in (
        ("donated", True, 1),
        ("not waiting", False, 1),
        ("waiting", False, 5),
    ):
        calls.clear()
        waits.clear()
        program.run(way, program.fresh(), 4)
        assert calls == [donated] * 4 and len(waits) == waited


def test_wall_time_is_per_call(monkeypatch):
    [program] = clocks.compile_all([counting()])
    real = program.jitted[True]
    program.jitted[True] = lambda *a: time.sleep(0.004) or real(*a)
    samples = clocks.wall(program, "donated", executions=2, rounds=2)
    # 4 ms a call; a sleep may take longer on a busy machine, but not the factor of a wrong divisor.
    assert all(2000 <= s for s in samples) and min(samples) < 20_000


def test_statistics():
    row = rows_of.statistics_of([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert row == {"us": 3.5, "p20_us": 2.0, "p80_us": 5.0, "samples": 6}


def test_rows_name_clock_and_way_and_one_failure_costs_nobody_else():
    def wrong(carry):
        raise AssertionError(f"got {int(carry)}")

    def refuses(x, d):
        raise NotImplementedError("not here")

    steps = [
        counting("first is wrong", check_first=wrong),
        clocks.Step("refuses", refuses, jnp.int32(0), (jnp.int32(1),)),
        counting("later is wrong", check=wrong),
        counting("right"),
    ]
    rows = list(clocks.rows_of(steps, executions=2, rounds=2, until=time.monotonic() + 60))
    by_name = {}
    for row in rows:
        by_name.setdefault(row["provider"], []).append(row)
    assert [r["note"] for r in by_name["first is wrong"]] == ["failed: AssertionError: got 1"]
    assert by_name["refuses"][0]["note"] == "does not run here: not here"
    # Rounds of 5 and of 2 and 2 steps.
    assert by_name["later is wrong"][0]["note"] == "failed: AssertionError: got 9"
    right = [row for row in by_name["right"] if row["clock"] == "wall"]
    assert [row["way"] for row in right] == list(clocks.WAYS)
    for row in right:
        assert row["calls"] == 2 and row["samples"] == 2 and row["note"] == ""
        assert 0 < row["p20_us"] <= row["us"] <= row["p80_us"]
    late = list(clocks.rows_of([counting()], executions=1, rounds=1, until=0.0))
    assert [row["note"] for row in late] == ["left out: no time"]


def test_steps_take_turns_by_the_host_s_clock(monkeypatch):
    """A round of every step in every way, then the next round: what slows the host slows all of them."""
    ran, real = [], clocks.CompiledStep.run

    def run(program, way, carry, executions):
        ran.append((program.step.name, way))
        return real(program, way, carry, executions)

    monkeypatch.setattr(clocks.CompiledStep, "run", run)
    rows = list(clocks.rows_of([counting("a"), counting("b")], executions=7, rounds=3, until=1e18))
    each = [(name, way) for name in "ab" for way in clocks.WAYS]
    # Both programs' first results and a round of each way that is not timed; then the rounds.
    assert ran[10:28] == each * 3
    assert [(r["provider"], r["way"], r["samples"]) for r in rows if r["clock"] == "wall"] == [
        (*one, 3) for one in each
    ]


@pytest.mark.parametrize("devices", [1, 2])
def test_rows_by_the_devices_own_timer(monkeypatch, devices):
    """A reading ahead of a step and one behind it. The time is that of the device that took the least: the
    other one waited for it."""
    asked = []

    def stamped(tree):
        """Starts at 2**32 ns, and ends 8 µs later; device 1 1 µs after device 0."""
        asked.append(tree)
        late = (
            0 if len(asked) % 2 else 8000 + (1000 * jax.lax.axis_index("ep") if devices > 1 else 0)
        )
        return tree, jnp.stack([jnp.int32(late), jnp.int32(1)])[None]

    monkeypatch.setattr(device_timer, "stamped", stamped)
    monkeypatch.setattr(device_timer, "tick_ns", lambda: 32)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    mesh = jax.make_mesh((devices,), ("ep",), devices=jax.devices()[:devices])
    carry = jax.device_put(jnp.arange(2, dtype=jnp.int32), jax.NamedSharding(mesh, jax.P("ep")))
    seen = []
    step = clocks.Step("s", lambda x: x + 1, carry, (), 2, check=lambda x: seen.append(x.tolist()))
    rows = clocks.rows_of([step], executions=1, rounds=1, until=1e18, clocks=("wall", "timer"))
    [row] = [row for row in rows if row["clock"] == "timer"]
    assert (row["us"], row["apart_us"], row["tick_ns"], row["samples"]) == (
        4.0,
        devices - 1,
        32,
        20,
    )
    assert seen[-1] == [25, 26]  # 5 steps to warm up, 20 that count
    assert clocks.text_of({"case": "c", **row}).split()[2:5] == ["timer", "donated", "4.00"]


def test_the_timer_is_read_where_the_step_waits_for_it():
    """Lowered for a GPU: both kernels hand all of the step's state on in its own memory."""
    carry = {"x": jnp.zeros((2, 128), jnp.bfloat16), "ids": jnp.zeros(3, jnp.int32)}
    around = device_timer.around(
        lambda c, d: jax.tree.map(lambda x: x + d.astype(x.dtype), c), carry
    )
    traced = jax.jit(around, donate_argnums=0).trace(carry, jnp.int32(1))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 2 and text.count("output_operand_alias<") == 2 * 2
    starts = np.array([[-1, 0], [5, 1]], np.int32)
    ends = np.array([[7, 1], [5, 2]], np.int32)
    # 2**32 - 1 to 2**32 + 7; 2**32 + 5 to 2**33 + 5.
    assert device_timer.span_ns(starts, ends) == (8, 2**32 - 8)


@pytest.mark.parametrize("read", [False, True])
def test_what_nobody_reads_is_dropped_and_zero_reading_reads_it(read):
    def step(x, y):
        received = {"a": jnp.sort(x), "none": None, "empty": x[:0]}
        y, received = jax.lax.optimization_barrier((y, received))
        return y + clocks.zero_reading(received) if read else y + 1

    given = jnp.arange(100, dtype=jnp.float32), jnp.zeros(3, jnp.int32)
    compiled = jax.jit(step).lower(*given).compile()
    assert (" sort(" in compiled.as_text()) == read
    assert compiled(*given).tolist() == [0 if read else 1] * 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int32", "float8_e4m3fn", "uint8"])
def test_zero_reading_is_zero_whatever_the_bits(dtype):
    width = jnp.dtype(dtype).itemsize
    bits = np.array([0, 2 ** (8 * width) - 1, 2 ** (8 * width - 1)], f"u{width}")
    for x in bits.view(jnp.dtype(dtype)):
        assert int(jax.jit(clocks.zero_reading)([x.reshape(1, 1)])) == 0


# -- the trace ------------------------------------------------------------------------------------------


def plane(name: str, lines: dict[str, list[tuple[str, float, float]]], number: int) -> str:
    """(event, start µs, duration µs) in lines."""
    names = sorted({event for events in lines.values() for event, _, _ in events})
    text = [
        f'lines {{ id: {i} name: "{line}" timestamp_ns: 0 '
        + "".join(
            f"events {{ metadata_id: {names.index(event) + 1} offset_ps: {round(start * 1e6)} "
            f"duration_ps: {round(length * 1e6)} }} "
            for event, start, length in events
        )
        + "}"
        for i, (line, events) in enumerate(lines.items())
    ]
    text += [
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{event}" }} }}'
        for i, event in enumerate(names, start=1)
    ]
    return f'planes {{ id: {number} name: "{name}" {" ".join(text)} }}'


def two_steps():
    """Two programs of two calls, two executions each: the first copies metadata in its first one alone, where
    XLA updates its graphs on both GPUs."""
    compute = [
        *[("ours_mosaic_gpu_kernel", 1000.0 + at, 3.0) for at in (0, 10)],
        *[("ours_mosaic_gpu_kernel", 4000.0 + at, 3.0) for at in (0, 10)],
        *[("nccl", 8000.0 + at, 4.0) for at in (0, 5, 10)],
        *[("nccl", 12000.0 + at, 6.0) for at in (0, 5, 10)],
    ]
    copies = [("MemcpyH2D", 990.0, 2.0), ("MemcpyH2D", 1005.0, 2.0)]
    threads = {
        "python": [
            ("benchmark step", 900.0, 200.0),
            ("benchmark step", 3900.0, 200.0),
            ("benchmark step", 7900.0, 200.0),
            ("benchmark step", 11900.0, 200.0),
            ("something else", 900.0, 20000.0),
        ],
        "XLA device 0": [
            ("command_buffer::update", 950.0, 20.0),
            ("command_buffer::execute", 980.0, 5.0),
            ("command_buffer::execute", 3980.0, 5.0),
            ("command_buffer::execute", 6000.0, 5.0),  # between two steps
            ("WARNING: CommandBuffer disabled when profiling", 7950.0, 5.0),
        ],
        "XLA device 1": [
            ("command_buffer::update", 951.0, 20.0),
            ("command_buffer::initialize#device=1#", 940.0, 5.0),
            ("command_buffer::execute", 981.0, 5.0),
        ],
    }
    text = plane(
        "/device:GPU:0", {"Stream #1(Compute)": compute, "Stream #2(MemcpyH2D)": copies}, 1
    )
    text += plane("/device:GPU:1", {"Stream #1(Compute)": [("nccl", 5000.0, 900.0)]}, 2)
    return jax.profiler.ProfileData.from_text_proto(text + plane("/host:CPU", threads, 3))


def test_a_trace_gives_spans_with_host_copies_and_graphs():
    first, second = clocks.read_trace(two_steps(), [2, 2], 2)
    assert first.spans_us == pytest.approx([(1013 - 990) / 2, 13 / 2])
    assert first.kernels == [1, 1] and first.host_copies == [1, 0]
    assert first.apart_us == [0, 0]  # of two GPUs one alone had a part in it
    assert first.graphs == [
        {"launched": 2, "updated": 2, "recorded": 1, "left_out": 0},
        {"launched": 1, "updated": 0, "recorded": 0, "left_out": 0},
    ]
    assert second.spans_us == pytest.approx([14 / 2, 16 / 2]) and second.kernels == [1.5, 1.5]
    assert second.graphs[0] == {"launched": 0, "updated": 0, "recorded": 0, "left_out": 1}
    row = clocks._span_row(counting("ours"), first)
    assert (row["clock"], row["way"], row["first_us"], row["us"]) == ("span", "donated", 11.5, 9.0)
    assert (row["kernels"], row["host_copies"], row["graphs_updated"]) == (1, 0.5, 1)


def test_a_span_is_that_of_the_gpu_that_begins_last():
    """The other one waits within its first kernel, for as long as the launch takes, in the first execution;
    in the second one the other is the one that waits."""
    late = [("exchange", 490.0, 8.0), ("expert", 499.0, 5.0), ("exchange", 4010.0, 40.0)]
    early = [("exchange", 100.0, 397.0), ("expert", 498.0, 5.0), ("exchange", 4042.0, 7.0)]
    steps = [("benchmark step", start, 900.0) for start in (90.0, 4000.0)]
    planes = [("/device:GPU:0", early), ("/device:GPU:1", late), ("/device:GPU:2", [])]
    lines = [(name, {"Stream #1(Compute)": events}) for name, events in planes]
    lines.append(("/host:CPU", {"python": steps}))
    text = "".join(plane(*line, number) for number, line in enumerate(lines, start=1))
    profile = jax.profiler.ProfileData.from_text_proto(text)
    [found] = clocks.read_trace(profile, [2], 2)
    assert found.spans_us == [14 / 2, 7 / 2] and found.apart_us == [390, 32]
    assert found.kernels == [1, 0.5]
    assert clocks._span_row(counting("ours"), found)["apart_us"] == 211


def test_a_trace_that_cannot_be_cut_gives_nothing():
    assert clocks.read_trace(two_steps(), [2, 2], 3) == [None, None]


def test_a_step_of_which_the_trace_shows_nothing_costs_only_its_own_span():
    text = plane(
        "/device:GPU:0", {"Stream #1(Compute)": [("ours", 10.0, 1.0), ("ours", 60.0, 1.0)]}, 1
    )
    steps = [("benchmark step", start, 90.0) for start in (0.0, 5000.0)]
    profile = jax.profiler.ProfileData.from_text_proto(
        text + plane("/host:CPU", {"python": steps}, 2)
    )
    first, second = clocks.read_trace(profile, [1, 1], 1)
    assert first.spans_us == [51] and second is None


def test_a_host_that_stops_within_a_step_does_not_cut_it():
    kernels = [("ours", start, 1.0) for start in (10.0, 4000.0, 9000.0)]
    text = plane("/device:GPU:0", {"Stream #1(Compute)": kernels}, 1)
    steps = [("benchmark step", 0.0, 4100.0), ("benchmark step", 8990.0, 90.0)]
    profile = jax.profiler.ProfileData.from_text_proto(
        text + plane("/host:CPU", {"python": steps}, 2)
    )
    [found] = clocks.read_trace(profile, [1], 2)
    assert found.spans_us == [3991, 1] and found.kernels == [2, 1]


def test_tracing_runs_every_program_the_host_waiting():
    seen = []
    step = counting(check=lambda carry: seen.append(int(carry)))
    found = clocks.traced(clocks.compile_all([step, step]), executions=3)
    assert seen == [5 + 3] * 2 and len(found) == 2
    if jax.default_backend() != "gpu":
        assert found == [None, None]


# -- launches and tables --------------------------------------------------------------------------------


def options(**more):
    parser = argparse.ArgumentParser()
    clocks.add_arguments(parser, budget=30)
    return parser.parse_args([f"--{key}={value}" for key, value in more.items()])


def test_each_launch_is_a_child_with_its_own_flags(monkeypatch, tmp_path, capsys):
    ran = []

    def child(command, env, check):
        ran.append((command, env["XLA_FLAGS"]))
        given = dict(zip(command[3::2], command[4::2], strict=True))
        row = {"case": "c", "provider": "p", "launch": given["--launch"], "clock": "wall"}
        row |= {"way": "donated", "us": 1.25, "gpu": "H200", "date": "2026-11-28T1", "jax": "0"}
        with open(given["--output"], "a") as file:
            file.write(json.dumps(row) + "\n")
        return subprocess.CompletedProcess(command, 3 if given["--launch"] == "no-graphs" else 0)

    monkeypatch.setattr(subprocess, "run", child)
    monkeypatch.setenv("XLA_FLAGS", "--mine")
    out = tmp_path / "rows" / "file.jsonl"
    out.parent.mkdir()
    out.write_text('{"case": "older"}\n')
    given = options(output=out)
    assert clocks.run_launches("benchmarks.x", ["--cases", "a"], given) == 3
    assert [flags for _, flags in ran] == [
        "--mine",
        "--mine --xla_gpu_enable_command_buffer=+COLLECTIVES",
        "--mine --xla_gpu_enable_command_buffer=",
    ]
    assert ran[0][0][1:5] == ["-m", "benchmarks.x", "--cases", "a"]
    assert len(out.read_text().splitlines()) == 4
    text = capsys.readouterr().out
    assert "| p | default | 1.2 | - | - | - | - | - |" in text and "older" not in text
    assert clocks.run_launches("x", [], options(launches="nowhere")) == 2


class FakeProcess:
    """One that ends with this code, or never."""

    def __init__(self, code):
        self.code, self.killed = code, False

    def poll(self):
        return self.code

    def kill(self):
        self.killed = True


@pytest.mark.parametrize(("codes", "wanted"), [((0, 0), 0), ((None, 3), 3), ((-9, 0), 9)])
def test_processes_have_a_gpu_each_and_end_together(monkeypatch, codes, wanted):
    started, running = [], []

    def popen(command, env):
        started.append((command, env["CUDA_VISIBLE_DEVICES"]))
        running.append(FakeProcess(codes[len(running)]))
        return running[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert processes.run("benchmarks.x", ["--cases", "a"], 2) == wanted
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases")
    processes.add_arguments(parser)
    given = [parser.parse_args(command[3:]) for command, _ in started]
    assert [(g.cases, g.process) for g in given] == [("a", 0), ("a", 1)]
    assert given[0].coordinator == given[1].coordinator != ""
    assert [gpus for _, gpus in started] == ["4", "6"] and all(p.killed for p in running)


def test_markdown_has_a_column_for_each_clock_and_way():
    shared = {"case": "c", "gpu": "H200", "date": "2026-11-28T10", "jax": "0.11.2"}
    shared |= {"provider": "ours", "launch": "default"}
    rows = [shared | {"clock": "wall", "way": w, "us": us} for w, us in
            zip(clocks.WAYS, (47.0, 52.0, 59.0), strict=True)]  # fmt: skip
    span = {"clock": "span", "way": "donated", "us": 18.0, "first_us": 54.0}
    rows.append(shared | span | {"kernels": 4, "host_copies": 0.5})
    rows.append(shared | {"clock": "timer", "way": "donated", "us": 21.0, "apart_us": 3.0})
    rows.append(shared | {"note": "left out: no time"})
    lines = clocks.markdown(rows).splitlines()
    assert lines[0] == "**c**; H200, 2026-11-28, jax 0.11.2; µs a call:"
    assert lines[2].startswith("| | launch | wall, donated | wall, not waiting | wall, waiting |")
    assert lines[4] == "| ours | default | 47.0 | 52.0 | 59.0 | 21.0 | 18.0 | 54.0 | 4 + 0.5 |"


# -- expert parallelism ---------------------------------------------------------------------------------

SIZES = {"hidden": 256, "top_k": 2, "experts": 8}
SMALL = ["--hidden", "256", "--experts", "8", "--top-k", "2", "--devices", "2", "--quick"]


def mesh_of(count):
    axis_types = (jax.sharding.AxisType.Auto,)
    devices = jax.devices()[:count]
    return jax.make_mesh((count,), (exchanges.AXIS,), axis_types, devices=devices)


def chosen(size, ranks, packing=False):
    return list(exchanges.every(size, ranks, "cpu", ("all_to_all",), packing))


@pytest.mark.parametrize("mode", ["low_latency", "normal"])
def test_every_exchange_is_right_and_a_wrong_one_is_found(mode):
    mesh, size = mesh_of(4), exchanges.Size(mode, 6, **SIZES)
    every = chosen(size, 4)
    names = [e.name for e in every]
    assert "ours, all_to_all" in names and len([n for n in names if n.startswith("bare")]) == 2
    assert len([n for n in names if n.startswith("plain job")]) == (
        4 if mode == "low_latency" else 2
    )
    rows = list(expert_parallel.verify(mesh, size, every))
    assert [row["note"].split(",")[0] for row in rows] == ["right"] * len(every)

    def broken(exchange):
        return exchange._replace(back=lambda y, h: jnp.roll(exchange.back(y, h), 1, 0))

    some = [every[0], every[1], every[-1]]
    wrong = list(expert_parallel.verify(mesh, size, [broken(e) for e in some]))
    assert len(wrong) == 3 and all(row["note"].startswith("WRONG") for row in wrong)


@pytest.mark.parametrize("mode", ["low_latency", "normal"])
def test_a_step_makes_every_exchange_and_its_result_is_checked(mode):
    """No collective may be dropped because nothing reads what it has brought."""
    mesh, size, calls = mesh_of(2), exchanges.Size(mode, 4, **SIZES), 3
    every = [e for e in chosen(size, 2) if "boxes" not in e.name]
    every.append(exchanges.nothing(size))
    programs = clocks.compile_all([expert_parallel.step(mesh, size, e, calls) for e in every])
    for program in programs:
        assert program.error is None
        carry = program.run("donated", program.fresh(), 2)
        program.step.check(carry)
        for k, part in enumerate(carry):  # x, ids, weights
            other = (*carry[:k], part + jnp.ones((), part.dtype), *carry[k + 1 :])
            with pytest.raises(AssertionError, match="after its steps"):
                program.step.check(other)
        if program.step.name.startswith("bare"):
            step = program.step
            text = program.jitted[False].lower(step.carry, *step.rest).compile().as_text()
            kinds = (" all-to-all(", " all-gather(", " reduce-scatter(", " all-reduce(")
            assert sum(text.count(kind) for kind in kinds) == 2 * calls


def test_bytes_of_a_case():
    size = exchanges.Size("low_latency", 128)
    assert size.row_bytes == (7168 + 224 + 64, 14336)
    assert exchanges.Size("normal", 4096).row_bytes == (14336 + 64, 14336)


def test_rows_of_expert_parallelism(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    given = [*SMALL, "--cases", "low_latency:3", "--check-tokens", "3", "--launch", "default"]
    given += ["--providers", "ours, all_to_all;bare"]
    assert expert_parallel.main([*given, "--output", str(out), "--commit", "x"]) == 0
    rows = rows_of.read([out])
    assert all(
        r["launch"] == "default" and r["date"] and "gpu" in r and "xla_flags" in r for r in rows
    )
    checks = [r for r in rows if r["case"].startswith("check")]
    # In "low_latency" our own transport stands there in all four forms.
    assert len(checks) == 6 + 3 and all("error" in r for r in checks)
    timed = [r for r in rows if "clock" in r and r["clock"] == "wall"]
    assert {r["way"] for r in timed} == set(clocks.WAYS) and len(timed) == 3 * 9
    assert all(r["us"] > 0 and r["calls"] == 2 and r["devices"] == 2 for r in timed)
    assert "ours, all_to_all" in capsys.readouterr().out


def test_a_wrong_value_fails_the_run(monkeypatch, tmp_path):
    real = exchanges._ones
    monkeypatch.setattr(exchanges, "_ones", lambda *a: real(*a) * 1.5)
    given = [*SMALL, "--cases", "low_latency:2", "--check-tokens", "2", "--launch", "no-graphs"]
    given += ["--providers", "ours, all_to_all;plain job, all_to_all, sorted;bare all_to_all"]
    out = tmp_path / "rows.jsonl"
    assert expert_parallel.main([*given, "--output", str(out)]) == 1
    rows = rows_of.read([out])
    # Another launch than the first holds no layer to NumPy, but what its steps give.
    assert not [r for r in rows if r["case"].startswith("check")]
    failed = [r for r in rows if "AssertionError" in r["note"]]
    # So few tokens are gathered where no one says otherwise.
    forms = ("", ", packed", ", sums by a kernel of ours", ", by XLA")
    job = {f"ours, all_to_all{form}" for form in forms}
    job |= {"plain job, all_to_all, sorted"}
    assert {r["provider"] for r in failed} == job
    assert all("us" not in r for r in failed)


# -- one GPU --------------------------------------------------------------------------------------------


def test_the_chain_of_alignments_by_numpy_is_a_plain_loops():
    ids = TINY.topk_ids(3)
    last, counts = jit_clocks.chain_by_numpy(TINY, ids, 2)
    for layer in range(2):
        out = plain_loop(ids, TINY.block_size, TINY.num_experts)
        np.testing.assert_array_equal(counts[layer], out.tokens_per_expert)
        row_of_pair = np.empty(TINY.num_pairs, int)
        for row, pair in enumerate(out.sorted_token_ids):
            if pair < TINY.num_pairs:
                row_of_pair[pair] = row
        total = int(out.num_tokens_post_padded[0])
        ids = (ids + total % 3 + row_of_pair.reshape(ids.shape) % 2) % TINY.num_experts
    np.testing.assert_array_equal(last, ids)


def test_alignments_and_recorder_of_one_gpu_are_right():
    steps = jit_clocks.alignment_steps(TINY, 2, 1)
    assert [(s.name, s.calls) for s in steps] == [
        *(("mosaic_gpu", 2), ("xla", 2), ("xla_argsort", 1)),
        ("nothing", 2),
    ]
    steps = [*steps[1:3], *jit_clocks.recorder_steps(TINY, 2, "xla")]
    for program in clocks.compile_all(steps):
        assert program.error is None
        carry = program.run("donated", program.fresh(), 1)
        program.step.check_first(carry)
        again = program.run("donated", carry, 1)
        with pytest.raises(AssertionError):  # a second step gives other ids and counts
            program.step.check_first(again)


def test_the_router_of_one_gpu_is_right():
    size = router.Size(5, 16, 2, block_size=4)
    steps = jit_clocks.router_steps(size, ("xla",), 2, 1)
    assert [(s.name, s.calls) for s in steps] == [
        ("top_k and softmax", 1),
        ("router, xla", 1),
        ("router and alignment, xla", 1),
        ("the two apart, xla", 1),
        ("nothing", 2),
    ]
    [program] = clocks.compile_all(steps[:1])
    carry = program.run("donated", program.fresh(), 2)
    program.step.check_first(carry)
    with pytest.raises(AssertionError):
        program.step.check(carry + 1)
    logits = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    apart = jax.jit(jit_clocks.routers(size, ["xla"])["the two apart, xla"])
    weights, ids, aligned = apart(logits)
    assert jit_clocks.wrongly_routed(size, logits, (weights, ids, aligned)) == ""
    assert "weight" in jit_clocks.wrongly_routed(size, logits, (weights * 1.01, ids))
    turned = aligned._replace(row_of_pair=aligned.row_of_pair[::-1])
    assert "row_of_pair" in jit_clocks.wrongly_routed(size, logits, (weights, ids, turned))


def test_the_masked_activation_of_one_gpu_is_right(monkeypatch):
    size = masked_quant.Size(3, 8, 256, 5)
    steps = jit_clocks.masked_steps(size, ("xla",), copies=2)
    [program] = clocks.compile_all(steps)
    carry = program.run("waiting", program.fresh(), 2)
    program.step.check(carry)
    program.step.check_first(carry)
    assert program.step.calls == 4
    with pytest.raises(AssertionError):
        program.step.check(carry + 1)
    monkeypatch.setattr(masked_quant.Inputs, "wrong", lambda self, results: "code 3 for 4")
    with pytest.raises(AssertionError, match="code 3 for 4"):
        program.step.check_first(carry)


def test_a_run_of_one_gpu_through_its_children(tmp_path):
    """The command as a user gives it: a process per launch."""
    out = tmp_path / "rows.jsonl"
    given = ["--quick", "--calls", "1", "--parts", "alignment", "--output", str(out)]
    assert jit_clocks.main(given) == 0
    rows = rows_of.read([out])
    assert {r["launch"] for r in rows} == {"default", "no-graphs"}
    flags = {r["launch"]: r["xla_flags"] for r in rows}
    assert flags["no-graphs"].endswith("--xla_gpu_enable_command_buffer=")
    assert "command_buffer" not in flags["default"]
    timed = {(r["launch"], r["case"], r["provider"]) for r in rows if "us" in r}
    for launch in flags:
        assert (launch, "64x256x16", "xla") in timed
