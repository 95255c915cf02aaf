"""Reads back what `jax.profiler.trace` wrote: kernels on a GPU, operations on a CPU.

A trace folder holds `plugins/profile/<time>/<host>.xplane.pb`: planes (a GPU, the host), lines in
them (a CUDA stream, a thread) and events in those. A GPU plane has one line per stream; the derived
lines that some versions add ("XLA Ops", "XLA Modules", ...) repeat the same time and are left out.
The commands `moe-align profile` and benchmarks/ use it.
"""

import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# What Pallas' Mosaic GPU lowering appends to the name of a kernel body.
OUR_KERNEL = re.compile(r"_mosaic_gpu_kernel")
# Seconds between executions: far more than between two kernels. A GPU that is given no rest reaches its power
# limit, and lowers its clock: benchmarks let every provider's executions rest as long.
REST_S = 0.002
_DERIVED_LINES = {
    "Framework Name Scope",
    "Framework Ops",
    "Launch Stats",
    "Source code",
    "Steps",
    "TensorFlow Name Scope",
    "TensorFlow Ops",
    "XLA Modules",
    "XLA Ops",
    "XLA TraceMe",
}
_HOST_COPY = re.compile(r"memcpy\s*\(?(h2d|d2h|htod|dtoh)", re.IGNORECASE)
# What XLA's host threads say of its CUDA graphs ("command buffers"): how their events' names begin.
GRAPH_EVENTS = {
    "launched": "command_buffer::execute",
    "updated": "command_buffer::update",
    "recorded": "command_buffer::initialize",
    "left_out": "WARNING: CommandBuffer disabled when profiling",
}


class Event(NamedTuple):
    """One kernel, copy or CPU operation; times in nanoseconds on the trace's own clock.

    `operation` is the HLO instruction that a kernel was launched for, where it was asked for and is known.
    """

    name: str
    start_ns: float
    end_ns: float
    module: str = ""
    operation: str = ""

    @property
    def duration_ns(self) -> float:
        return self.end_ns - self.start_ns


class NameTotal(NamedTuple):
    """All events of one name: how many, and their summed time."""

    name: str
    count: int
    total_us: float


class Spans(NamedTuple):
    """What one call costs, once per execution of a program that makes many calls.

    Attributes:
        us_per_call: a value per execution; empty when the trace shows no kernel.
        kernels_per_call: kernels (and copies and fills) per call.
        note: how the values were found when it is not the plain span; "" otherwise.
    """

    us_per_call: list[float]
    kernels_per_call: float
    note: str


def newest_xplane(folder: str | Path) -> Path:
    """The newest `*.xplane.pb` under `folder`.

    Raises:
        FileNotFoundError: the profiler wrote none there.
    """
    files = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"no *.xplane.pb under {folder}: jax.profiler wrote no trace")
    return files[-1]


def load(path: str | Path) -> Any:
    """The trace in a file, as `jax.profiler.ProfileData`."""
    from jax.profiler import ProfileData

    return ProfileData.from_file(str(path))


def gpu_events(profile: Any, device: int = 0, *, operations: bool = False) -> list[Event]:
    """Kernels, copies and fills of one GPU in order of start; empty without such a plane.

    Copies between host and device are among them: a program that waits for one (the metadata of a collective
    kernel, say) waits on the device. With `operations` also the HLO module and instruction of each, which
    the trace does not know of kernels within a CUDA graph.
    """
    lines = [
        line
        for plane in profile.planes
        if re.match(rf"/device:GPU:{device}\b", plane.name)
        for line in plane.lines
    ]
    streams = [line for line in lines if line.name.lower().startswith("stream")]
    streams = streams or [line for line in lines if line.name not in _DERIVED_LINES]
    events = []
    for line in streams:
        for event in line.events:
            stats = _stats(event) if operations else {}
            known = str(stats.get("hlo_module", "")), str(stats.get("hlo_op", ""))
            events.append(Event(event.name, event.start_ns, event.end_ns, *known))
    return sorted(events, key=lambda e: (e.start_ns, e.end_ns))


def gpus(profile: Any) -> list[int]:
    """The numbers of the GPUs that the trace knows, in order."""
    found = (re.match(r"/device:GPU:(\d+)", plane.name) for plane in profile.planes)
    return sorted({int(match[1]) for match in found if match})


def is_host_copy(event: Event) -> bool:
    """Whether the event is a copy between host and device."""
    return bool(_HOST_COPY.search(event.name))


def _num_kernels(events: Iterable[Event]) -> int:
    """Kernels, device copies and fills. XLA makes some host copies in the first executions alone."""
    return sum(not is_host_copy(event) for event in events)


def annotated(profile: Any, annotation: str) -> list[Event]:
    """The `jax.profiler.TraceAnnotation`s of that name, by the host's clock, in order of start."""
    found = [
        Event(event.name, event.start_ns, event.end_ns)
        for plane in profile.planes
        if plane.name.startswith("/host:")
        for line in plane.lines
        for event in line.events
        if event.name == annotation
    ]
    return sorted(found, key=lambda e: e.start_ns)


def graphs_during(profile: Any, windows: Iterable[Event]) -> list[dict[str, int]]:
    """For each of `windows`, how many CUDA graphs XLA launched, updated, recorded ahead of the step and,
    because a profiler ran, left out. All devices of the process together."""
    graphs = [
        (kind, event.start_ns)
        for plane in profile.planes
        if plane.name.startswith("/host:")
        for line in plane.lines
        for event in line.events
        for kind, name in GRAPH_EVENTS.items()
        if event.name.startswith(name)
    ]
    return [
        {
            kind: sum(k == kind and w.start_ns <= at <= w.end_ns for k, at in graphs)
            for kind in GRAPH_EVENTS
        }
        for w in windows
    ]


def contents(profile: Any) -> str:
    """Planes, their lines and event counts, in one line: to say what a trace holds instead."""
    planes = (
        f"{plane.name} [{', '.join(f'{x.name}: {len(list(x.events))}' for x in plane.lines)}]"
        for plane in profile.planes
    )
    return "; ".join(planes)


def cpu_events(profile: Any) -> list[Event]:
    """XLA:CPU's operations (the host events that name an HLO operation), in order of start.

    A parallel operation has an event per thread, and one around them: overlapping events of one
    operation are merged.
    """
    events: list[Event] = []
    for plane in profile.planes:
        if not plane.name.startswith("/host:CPU"):
            continue
        for line in plane.lines:
            for event in line.events:
                stats = _stats(event)
                if "hlo_op" in stats:
                    module = str(stats.get("hlo_module", ""))
                    name = str(stats["hlo_op"])
                    events.append(Event(name, event.start_ns, event.end_ns, module))
    merged: list[Event] = []
    latest: dict[tuple[str, str], int] = {}
    for event in sorted(events, key=lambda e: (e.start_ns, e.end_ns)):
        at = latest.get((event.module, event.name))
        if at is not None and event.start_ns < merged[at].end_ns:
            merged[at] = merged[at]._replace(end_ns=max(merged[at].end_ns, event.end_ns))
        else:
            latest[event.module, event.name] = len(merged)
            merged.append(event)
    return merged


def _stats(event: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        # jaxlib's stats iterator trips a DeprecationWarning of Python's about its own type.
        warnings.simplefilter("ignore", DeprecationWarning)
        return dict(event.stats)


def totals(events: Iterable[Event]) -> list[NameTotal]:
    """Time per name, the costliest first."""
    sums: dict[str, tuple[int, float]] = {}
    for event in events:
        count, total = sums.get(event.name, (0, 0.0))
        sums[event.name] = count + 1, total + event.duration_ns / 1e3
    rows = [NameTotal(name, *value) for name, value in sums.items()]
    return sorted(rows, key=lambda row: -row.total_us)


def record(
    programs: Sequence[Callable], arguments: Sequence[Sequence[Any]], executions: int
) -> tuple[list[Spans], str]:
    """Runs jitted programs under the profiler, one after the other; what one call of each costs.

    Program i takes the list `arguments[i]` and makes one call per entry. The host waits after each execution.

    Returns:
        The spans of each program, and what the trace held, for a message.
    """
    import jax

    for program, given in zip(programs, arguments, strict=True):
        for _ in range(4):  # XLA records its CUDA graph after the first executions
            jax.block_until_ready(program(given))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for program, given in zip(programs, arguments, strict=True):
                for _ in range(executions):
                    jax.block_until_ready(program(given))
                    time.sleep(REST_S)
        profile = load(newest_xplane(folder))
    events, calls = gpu_events(profile), [len(given) for given in arguments]
    if len(programs) == 1:
        return [span_per_call(events, executions=executions, calls=calls[0])], contents(profile)
    return spans_in_order(events, executions=executions, calls=calls), contents(profile)


def spans_in_order(
    events: Sequence[Event], *, executions: int, calls: Sequence[int]
) -> list[Spans]:
    """As `span_per_call`, for programs that ran one after the other, each `executions` times.

    Cut at the widest gaps. Where the parts of a program hold different numbers of kernels the cut is not to
    be trusted, and that program has no value.
    """
    note = "the trace could not be cut into executions"
    cuts = _widest_gaps(events, executions * len(calls) - 1)
    if cuts is None:
        return [Spans([], 0.0, note)] * len(calls)
    edges = [0, *cuts, len(events)]
    parts = [events[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    found = []
    for k, count in enumerate(calls):
        mine = parts[k * executions : (k + 1) * executions]
        if len({_num_kernels(part) for part in mine}) != 1:
            found.append(Spans([], 0.0, note))
            continue
        spans = [(max(e.end_ns for e in p) - p[0].start_ns) / 1e3 / count for p in mine]
        found.append(Spans(spans, len(mine[0]) / count, ""))
    return found


def _widest_gaps(events: Sequence[Event], count: int) -> list[int] | None:
    """Where to cut time-ordered events at the `count` widest gaps, ascending; None with too few events."""
    if count >= len(events):
        return None
    gaps, busy_until = [], events[0].end_ns
    for i, event in enumerate(events[1:], start=1):
        gaps.append((event.start_ns - busy_until, i))
        busy_until = max(busy_until, event.end_ns)
    return sorted(i for _, i in sorted(gaps, reverse=True)[:count])


def split_executions(events: Sequence[Event], executions: int) -> list[list[Event]] | None:
    """Cuts time-ordered events at the `executions - 1` widest gaps.

    The host waits between executions, so those gaps are far wider than any inside. None when the
    parts hold different numbers of kernels: then the cut is not to be trusted.
    """
    if not events or executions < 1 or _num_kernels(events) % executions:
        return None
    cuts = [0, *(_widest_gaps(events, executions - 1) or []), len(events)]
    parts = [list(events[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    return parts if len({_num_kernels(part) for part in parts}) == 1 else None


def span_per_call(events: Sequence[Event], *, executions: int, calls: int) -> Spans:
    """Device span per call: first start to last end of each execution, over its `calls` calls.

    When all events do not split into equal executions, the same is tried with our own kernels
    alone, and last their summed time is taken; `note` says so.
    """
    if not events:
        return Spans([], 0.0, "the trace shows no kernel on a GPU stream")
    per_call = len(events) / (executions * calls)
    ours = [e for e in events if OUR_KERNEL.search(e.name)]
    fallback = "span of our named kernels only: other work did not split into equal executions"
    attempts = [(list(events), ""), (ours, fallback)]
    for chosen, note in attempts:
        if parts := split_executions(chosen, executions):
            spans = [(max(e.end_ns for e in p) - p[0].start_ns) / 1e3 / calls for p in parts]
            busy = sum(e.duration_ns for e in chosen) / 1e3 / (executions * calls)
            if not note and busy > 1.02 * sum(spans) / len(spans):
                note = "kernels overlapped: the span is shorter than their sum"
            return Spans(spans, len(chosen) / (executions * calls), note)
    total = sum(e.duration_ns for e in ours or events) / 1e3
    note = "sum of kernel times, not a span: executions could not be told apart"
    return Spans([total / (executions * calls)], per_call, note)
