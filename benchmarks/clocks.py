"""The clocks of a jitted step: the host's, over many steps; the GPU's own timer around a step; and the span
of its kernels in the profiler's trace, which the profiler makes longer (`device_timer`).

A GPU's span says nothing about what the host pays to launch: kernels that XLA replays as one CUDA graph span
little, and a graph whose buffers have moved is updated by the host, kernel by kernel, before each launch. So
every figure names its clock, how the step was called and the flags of its process. Flags are read once per
process: a benchmark runs itself as a child for each launch.

python -m benchmarks.clocks FILE.jsonl ...   # the rows of a run as tables in Markdown
"""

import argparse
import concurrent.futures
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import Writer, parse, read, reason_of, statistics_of
from moe_align_jax import _traces as traces

# What XLA puts into CUDA graphs, by the flags of the process.
LAUNCHES = {
    "default": "",
    "collectives-in-graphs": "--xla_gpu_enable_command_buffer=+COLLECTIVES",
    "no-graphs": "--xla_gpu_enable_command_buffer=",
    # Not among those that run unasked: XLA maps a graph's temporary buffers to addresses that stay.
    "stable-addresses": "--xla_gpu_command_buffer_update_mode=SKIP_TEMP",
    # Not among those that run unasked: fewer than five commands next to each other make a graph, too.
    "small-graphs": "--xla_gpu_graph_min_graph_size=1",
    # The plain ragged collective is slow; with this it becomes an all_to_all of larger slices.
    "ragged-decomposed": "--xla_gpu_unsupported_enable_ragged_all_to_all_decomposer=true",
}
# How the host calls a step. Each hands its result on to the next one.
WAYS = {
    "donated": "the step's state is donated; the host does not wait between steps",
    "not waiting": "nothing is donated; the host does not wait between steps",
    "waiting": "nothing is donated; the host waits for each step",
}
_PAUSE_S = 0.002  # between two traced steps: far more than between any two kernels of a step
_ANNOTATION = "benchmark step"
_WARM = 5  # XLA records its CUDA graph after the first executions
CLOCKS = ("wall", "timer", "span")


@dataclass(frozen=True)
class Step:
    """`function(carry, *rest) -> carry`, the same shapes, dtypes and sharding as before.

    Attributes:
        name: the provider's name.
        function: can be jitted. It makes `calls` calls of what is measured.
        carry: a pytree of arrays on the devices, never donated itself: copies are.
        rest: further arguments.
        calls: how many times are divided out.
        check: takes a carry that has come out of any step; raises AssertionError where it is wrong.
        check_first: the same of the first step's.
    """

    name: str
    function: Callable
    carry: Any
    rest: tuple = ()
    calls: int = 1
    check: Callable[[Any], None] = field(default=lambda carry: None, repr=False)
    check_first: Callable[[Any], None] = field(default=lambda carry: None, repr=False)


def zero_reading(tree: Any) -> Any:
    """An int32 zero for which one element of every array is read.

    A step adds it to what the next call starts from. Otherwise XLA drops what nobody reads: an optimisation
    barrier keeps none of its results alive by itself. Adding it is one small kernel, the same for everyone.
    """
    import jax
    import jax.numpy as jnp

    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    found = jnp.bool_(False)
    for x in jax.tree.leaves(jax.lax.optimization_barrier(tree)):
        if x.size:
            first = jax.lax.bitcast_convert_type(x[(0,) * x.ndim], words[x.dtype.itemsize])
            # Never true, which XLA does not know.
            found |= (first.astype(jnp.uint32) >> 1) > jnp.uint32(0x7FFFFFFF)
    return found.astype(jnp.int32)


class CompiledStep:
    """A step, compiled twice: with its carry donated, and without. With `timer` once more, as `device_timer`
    gives it."""

    def __init__(self, step: Step, timer: bool = False):
        import jax

        self.step = step
        self.timed: Any = None
        if timer:
            from benchmarks import device_timer

            self.timed = device_timer.jitted(step.function, step.carry)
        self.error: Exception | None = None
        self.jitted = {
            True: jax.jit(step.function, donate_argnums=0),
            False: jax.jit(step.function),
        }

    def fresh(self) -> Any:
        """A copy of the step's first carry."""
        import jax

        return jax.tree.map(lambda x: jax.device_put(x.copy(), x.sharding), self.step.carry)

    def run(self, way: str, carry: Any, executions: int) -> Any:
        """The carry after so many steps, called in that way; the last one has ended."""
        import jax

        program, rest = self.jitted[way == "donated"], self.step.rest
        for _ in range(executions):
            carry = program(carry, *rest)
            if way == "waiting":
                jax.block_until_ready(carry)
        return jax.block_until_ready(carry)


def compile_together(
    programs: Sequence[tuple[Any, Sequence[Any]]], threads: int = 8
) -> list[Exception | None]:
    """Traces `(jitted function, arguments)` one after the other and compiles several at once; what failed.

    A call with such arguments finds the program compiled.
    """
    failed: list[Exception | None] = [None] * len(programs)
    compiling = {}
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for i, (jitted, arguments) in enumerate(programs):
            try:
                compiling[i] = pool.submit(jitted.lower(*arguments).compile)
            except (
                Exception
            ) as error:  # one that cannot be built must not cost the others their run
                failed[i] = error
        for i, compiled in compiling.items():
            failed[i] = compiled.exception()
    return failed


def compile_all(steps: Sequence[Step], timer: bool = False) -> list[CompiledStep]:
    """Every step, with and without donation; with `timer` also between two readings of the GPU's timer. A
    step that fails has its `error`.

    This comes before all timing: with every program that XLA loads it drops the CUDA graphs of the others.
    """
    import jax

    programs = [CompiledStep(step, timer) for step in steps]
    pairs = [(p, f) for p in programs for f in (*p.jitted.values(), p.timed) if f is not None]
    # Processes that compile together agree on what they find: one program after the other.
    threads = 8 if jax.process_count() == 1 else 1
    given = [(jitted, (p.step.carry, *p.step.rest)) for p, jitted in pairs]
    failed = compile_together(given, threads)
    for (program, _), error in zip(pairs, failed, strict=True):
        program.error = program.error or error
    return programs


# -- the host's clock ------------------------------------------------------------------------------------


def wall(program: CompiledStep, way: str, *, executions: int, rounds: int) -> list[float]:
    """µs per call by the host's clock, a value per round of `executions` steps, after one that is not timed.

    No profiler runs. The carry that came out is checked.
    """
    chain = _Chain(program, way, executions)
    for _ in range(rounds):
        chain.time()
    chain.end()
    return chain.samples


class _Chain:
    """Steps that follow each other, called in one way, in rounds of `executions`; it begins with some that
    are not timed. No profiler runs.

    Attributes:
        samples: µs per call, of each round so far.
    """

    def __init__(self, program: CompiledStep, way: str, executions: int):
        self.program, self.way, self.executions = program, way, executions
        self._carry = program.run(way, program.fresh(), max(executions, _WARM))
        self.samples: list[float] = []

    def time(self) -> None:
        start = time.perf_counter()
        self._carry = self.program.run(self.way, self._carry, self.executions)
        taken = time.perf_counter() - start
        self.samples.append(taken * 1e6 / self.executions / self.program.step.calls)

    def end(self) -> None:
        """Checks what came out."""
        self.program.step.check(self._carry)
        self._carry = None


# -- the device's timer ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """What a GPU's own timer says of one step, of each execution, on the GPU that was the last to begin.

    Attributes:
        spans_us: from before its first kernel to behind its last one, per call.
        apart_us: for how much longer any other GPU was in the step, waiting for that one.
    """

    spans_us: list[float]
    apart_us: list[float]


def timed(program: CompiledStep, *, executions: int) -> Timed:
    """Runs a program that was compiled with the timer; its carry is donated, the host waits for each step,
    and no profiler runs."""
    import jax

    from benchmarks import device_timer

    carry, found = program.fresh(), []
    for number in range(_WARM + executions):
        carry, *times = jax.block_until_ready(program.timed(carry, *program.step.rest))
        if number >= _WARM:
            found.append([_all_devices(time) for time in times])
    program.step.check(carry)
    spans, apart = zip(*(device_timer.span_ns(*times) for times in found), strict=True)
    per_call = 1e3 * program.step.calls
    return Timed([ns / per_call for ns in spans], [ns / 1e3 for ns in apart])


def _all_devices(array: Any) -> np.ndarray:
    """An array of a row per device, of all processes."""
    import jax

    if jax.process_count() == 1:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


# -- the profiler's span ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traced:
    """What a trace shows of one step, per execution, on the GPU that was the last to begin.

    One that begins before the others waits for them within its first exchange. For how long is the launch's
    affair, which the profiler slows, and the same however many layers a step has.

    Attributes:
        spans_us: first start to last end of all its kernels and copies, host copies included, per call.
        apart_us: how much earlier than that GPU the earliest one began, of each execution; 0 where one ran.
        kernels: kernels, device copies and fills per call, of each execution.
        host_copies: copies between host and device per call, of each execution.
        graphs: CUDA graphs of XLA launched, updated, recorded, and left out because of the profiler; of all
            devices together.
    """

    spans_us: list[float]
    apart_us: list[float]
    kernels: list[float]
    host_copies: list[float]
    graphs: list[dict[str, int]]


def traced(programs: Sequence[CompiledStep], *, executions: int) -> list[Traced | None]:
    """Runs the donated programs under the profiler, one after the other, the host waiting after each step.

    None for every program without a GPU, or where the trace does not show all of its steps.
    """
    import jax

    carries = [program.run("donated", program.fresh(), _WARM) for program in programs]
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for i, program in enumerate(programs):
                for _ in range(executions):
                    with jax.profiler.TraceAnnotation(_ANNOTATION):
                        carries[i] = program.run("donated", carries[i], 1)
                    time.sleep(_PAUSE_S)
        profile = traces.load(traces.newest_xplane(folder))
    for program, carry in zip(programs, carries, strict=True):
        program.step.check(carry)
    return read_trace(profile, [program.step.calls for program in programs], executions)


def read_trace(profile: Any, calls: Sequence[int], executions: int) -> list[Traced | None]:
    """The trace of steps that ran one after the other, `executions` times each, each annotated, with pauses
    between."""
    # The device has nothing else to do around a step, and its clock differs by less from the host's.
    slack = _PAUSE_S * 1e9 / 2
    windows = traces.annotated(profile, _ANNOTATION)
    if len(windows) != executions * len(calls):
        return [None] * len(calls)
    of_gpus = [traces.gpu_events(profile, gpu) for gpu in traces.gpus(profile)]
    parts = [_shares(of_gpus, w.start_ns - slack, w.end_ns + slack) for w in windows]
    graphs = traces.graphs_during(profile, windows)
    found: list[Traced | None] = []
    for k, count in enumerate(calls):
        every = parts[k * executions : (k + 1) * executions]
        if not all(every):
            found.append(None)
            continue
        mine = [shares[-1] for shares in every]
        copies = [sum(traces.is_host_copy(e) for e in part) for part in mine]
        found.append(
            Traced(
                [(max(e.end_ns for e in p) - p[0].start_ns) / 1e3 / count for p in mine],
                [(shares[-1][0].start_ns - shares[0][0].start_ns) / 1e3 for shares in every],
                [(len(p) - c) / count for p, c in zip(mine, copies, strict=True)],
                [c / count for c in copies],
                graphs[k * executions : (k + 1) * executions],
            )
        )
    return found


def _shares(
    of_gpus: Sequence[Sequence[traces.Event]], start_ns: float, end_ns: float
) -> list[list[traces.Event]]:
    """What each GPU began within that time; the GPU that was the last to begin comes last. A GPU that did
    half of what the busiest did, or less, has no part in the step, whose GPUs all run one program."""
    every = [[e for e in events if start_ns <= e.start_ns <= end_ns] for events in of_gpus]
    most = max(map(len, every), default=0)
    taking_part = (share for share in every if 2 * len(share) > most)
    return sorted(taking_part, key=lambda share: share[0].start_ns)


# -- rows ------------------------------------------------------------------------------------------------


def rows_of(
    steps: Sequence[Step],
    *,
    executions: int,
    rounds: int,
    until: float,
    traced_steps: int = 10,
    clocks: Sequence[str] = CLOCKS,
) -> Iterable[dict[str, Any]]:
    """A row per step and clock, of CLOCKS: "wall", in each of WAYS, and where there is a GPU also "timer"
    and "span".

    By the host's clock the steps take turns, a round of each in each way after the other: a host that is slow
    for a while is slow for all of them. Rounds for which no time is left are not run.

    A step that fails, or for which no time is left, has a row with a "note" and no time.
    """
    import jax

    chains: list[tuple[CompiledStep, list[_Chain]]] = []
    on_gpu = jax.default_backend() == "gpu"
    for program in compile_all(steps, on_gpu and "timer" in clocks):
        if program.error is None and time.monotonic() > until:
            yield {"provider": program.step.name, "note": "left out: no time"}
            continue
        try:
            if program.error is not None:
                raise program.error
            for way in ("donated", "waiting"):  # both programs
                program.step.check_first(program.run(way, program.fresh(), 1))
            chains.append((program, [_Chain(program, way, executions) for way in WAYS]))
        except Exception as error:  # one that fails must not cost the others their run
            yield _failure(program, error)
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        for program, mine in chains:
            if program.error is None:
                try:
                    for chain in mine:
                        chain.time()
                except Exception as error:
                    program.error = error
    ran = []
    for program, mine in chains:
        try:
            if program.error is not None:
                raise program.error
            for chain in mine:
                chain.end()
                row = {"provider": program.step.name, "clock": "wall", "way": chain.way}
                row |= {"calls": program.step.calls} | statistics_of(chain.samples)
                yield row | {"note": ""}
            ran.append(program)
        except Exception as error:
            yield _failure(program, error)
    chains.clear()
    if not ran or not on_gpu:
        return
    yield from _timer_rows([p for p in ran if p.timed is not None], 2 * traced_steps)
    if "span" not in clocks:
        return
    try:
        every = traced(ran, executions=traced_steps)
    except Exception as error:
        yield {"provider": "all", "note": f"no spans: {reason_of(error)}"}
        return
    for program, found in zip(ran, every, strict=True):
        if found is None:
            yield {"provider": program.step.name, "note": "no span: the trace could not be cut"}
        else:
            yield _span_row(program.step, found)


def _timer_rows(programs: Sequence[CompiledStep], executions: int) -> Iterable[dict[str, Any]]:
    """A row for each by the GPU's timer, with the timer's own step."""
    from benchmarks import device_timer

    tick = device_timer.tick_ns() if programs else 0
    for program in programs:
        try:
            found = timed(program, executions=executions)
        except Exception as error:
            yield {**_failure(program, error), "note": f"no timer: {str(error)[:300]}"}
            continue
        row = {"provider": program.step.name, "clock": "timer", "way": "donated"}
        row |= {"calls": program.step.calls} | statistics_of(found.spans_us)
        apart = round(statistics.median(found.apart_us), 2)
        yield row | {"apart_us": apart, "tick_ns": tick, "note": ""}


def _failure(program: CompiledStep, error: Exception) -> dict[str, Any]:
    note = f"failed: {reason_of(error)}"
    if isinstance(error, NotImplementedError):
        note = f"does not run here: {error}"
    return {"provider": program.step.name, "note": note}


def _span_row(step: Step, found: Traced) -> dict[str, Any]:
    row = {"provider": step.name, "clock": "span", "way": "donated", "calls": step.calls}
    row |= statistics_of(found.spans_us)
    row["first_us"] = round(found.spans_us[0], 2)
    row["apart_us"] = round(statistics.median(found.apart_us), 2)
    for column, values in (("kernels", found.kernels), ("host_copies", found.host_copies)):
        row[column] = round(statistics.median(values), 2)
    for kind in traces.GRAPH_EVENTS:
        counts = [graphs[kind] for graphs in found.graphs if kind in graphs]
        if counts:
            row[f"graphs_{kind}"] = statistics.median(counts)
    return row | {"note": ""}


def text_of(row: dict[str, Any]) -> str:
    """A row on one line."""
    head = f"{row['case']:18} {row['provider']:44}"
    if "us" not in row:
        return f"{head} {row['note']}"
    more = f"  {row['kernels']:g} kernels" if "kernels" in row else ""
    more += f", {row['host_copies']:g} host copies" if row.get("host_copies") else ""
    spread = f"{row['p20_us']:.2f} to {row['p80_us']:.2f}"
    return f"{head} {row['clock']:4} {row['way']:12} {row['us']:10.2f} µs ({spread}){more}"


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """A table per GPU and case: a line per provider and launch, a column per clock and way."""
    cells: dict[tuple, dict[str, str]] = {}
    where: dict[tuple, str] = {}
    for row in rows:
        if "clock" not in row:
            continue
        table = (row.get("gpu") or "no GPU", row["case"])
        where[table] = f"{table[0]}, {row.get('date', '')[:10]}, jax {row.get('jax')}"
        line = cells.setdefault((*table, row["provider"], row["launch"]), {})
        if row["clock"] == "wall":
            line[row["way"]] = f"{row['us']:.1f}"
            continue
        if row["clock"] == "timer":
            line["timer"] = f"{row['us']:.1f}"
            continue
        line["span"] = f"{row['us']:.1f}"
        line["span, first traced"] = f"{row['first_us']:.1f}"
        line["kernels"] = f"{row['kernels']:g} + {row['host_copies']:g}"
    parts = []
    titles = [*WAYS, "timer", "span", "span, first traced", "kernels"]
    header = [f"wall, {t}" for t in WAYS]
    header += ["device timer", "span", "span, first traced", "kernels + host copies"]
    for table, text in where.items():
        parts.append(f"**{table[1]}**; {text}; µs a call:\n")
        parts.append("| | launch | " + " | ".join(header) + " |")
        parts.append("|" + "---|" * (len(header) + 2))
        for key, line in cells.items():
            if key[:2] == table:
                values = " | ".join(line.get(title, "-") for title in titles)
                parts.append(f"| {key[2]} | {key[3]} | {values} |")
        parts.append("")
    return "\n".join(parts)


# -- a child for each launch -----------------------------------------------------------------------------


def add_arguments(
    parser: argparse.ArgumentParser,
    budget: float,
    launches: str = "default,collectives-in-graphs,no-graphs",
) -> None:
    """The options that both benchmarks share."""
    parser.add_argument("--output", "--out", metavar="FILE", help="JSONL to append to")
    parser.add_argument(
        "--launches",
        default=launches,
        help=f"comma-separated, of: {', '.join(LAUNCHES)}; each is a process of its own",
    )
    parser.add_argument("--launch", choices=LAUNCHES, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="few steps: to see that it works")
    parser.add_argument("--executions", type=int, help="of a step, in a round")
    parser.add_argument("--rounds", type=int, help="of each step, in each way, by the host's clock")
    parser.add_argument("--budget", type=float, default=budget, help="seconds, for all launches")
    parser.add_argument(
        "--clocks", default=",".join(CLOCKS), help="comma-separated: of a GPU timer and span"
    )
    parser.add_argument("--commit", help="the commit to record, where git is not at hand")


def repetitions(options: argparse.Namespace, few: tuple[int, int], on_gpu: bool) -> dict[str, Any]:
    """`executions`, `rounds` and `clocks` that the options ask for; `few` where a look is enough."""
    executions, rounds = few if options.quick or not on_gpu else (20, 5)
    return {
        "executions": options.executions or executions,
        "rounds": options.rounds or rounds,
        "clocks": options.clocks.split(","),
    }


def run_launches(module: str, argv: Sequence[str], options: argparse.Namespace) -> int:
    """Runs `python -m module argv` once per launch, in its share of the time left, and prints the tables.

    Returns:
        The greatest exit code.
    """
    names = [name for name in options.launches.split(",") if name]
    if unknown := [name for name in names if name not in LAUNCHES]:
        print(f"unknown launch {', '.join(unknown)}; there are: {', '.join(LAUNCHES)}")
        return 2
    until, worst = time.monotonic() + options.budget, 0
    with tempfile.TemporaryDirectory() as folder:
        output = Path(options.output or Path(folder) / "rows.jsonl")
        output.parent.mkdir(parents=True, exist_ok=True)
        before = len(output.read_text().splitlines()) if output.exists() else 0
        for i, name in enumerate(names):
            # The first one also holds every value to NumPy.
            weight = 1.6 if i == 0 and len(names) > 1 else 1.0
            share = max(1.0, weight * (until - time.monotonic()) / (len(names) - i))
            flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS", ""), LAUNCHES[name])))
            own = ["--launch", name, "--output", str(output), "--budget", f"{share:.0f}"]
            print(f"-- launch {name}: XLA_FLAGS={flags!r}, {share:.0f} s", flush=True)
            done = subprocess.run(
                [sys.executable, "-m", module, *argv, *own],
                env=os.environ | {"XLA_FLAGS": flags},
                check=False,
            )
            if done.returncode:
                print(f"-- launch {name} ended with {done.returncode}", flush=True)
            worst = max(worst, abs(done.returncode))
        lines = output.read_text().splitlines()[before:] if output.exists() else []
    print(markdown(parse(lines)))
    return worst or (0 if lines else 1)


def keeper(options: argparse.Namespace) -> Callable[[dict[str, Any]], None]:
    """Prints a row, and appends it with where and how it was measured; of several processes the first one."""
    import jax

    from benchmarks import machine

    if jax.process_index():
        return lambda row: None
    facts: dict[str, Any] = dict(machine.facts(options.commit))
    facts |= {"launch": options.launch, "xla_flags": os.environ.get("XLA_FLAGS", "")}
    if jax.process_count() > 1:
        facts["launch"] += f", {jax.process_count()} processes"

    out = Writer(options.output, facts)

    def keep(row: dict[str, Any]) -> None:
        out.write([row])
        print(text_of(row), flush=True)

    return keep


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rows of clocks as tables in Markdown.")
    parser.add_argument("files", nargs="+")
    files = parser.parse_args(argv).files
    print(markdown(read(files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
