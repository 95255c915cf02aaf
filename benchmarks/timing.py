"""Time per call: a CUDA graph for torch callables, a profiler trace for jit, wall time on a CPU."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_align_jax import _traces as traces

_READ_BYTES = 1 << 30
_READ_ROWS = (1024, 4096, 16384)  # of a read's shapes, the fastest of which counts
_READ_IN_TURN = 1 << 29  # bytes: far more than L2 holds
_ROUNDS = 2  # of steady steps
_WAIT_CYCLES = 200_000  # 0.1 ms, several times the host's time of a launch


@dataclass(frozen=True)
class Timing:
    """Samples of one provider on one case, in microseconds per call.

    Attributes:
        metric: "graph_us" (CUDA graph replay), "span_us" (device span under jit) or "wall_us".
        samples_us: one value per replay, execution or repeat.
        calls: calls in each sample.
        note: anything a reader must know, "" otherwise.
        kernels_per_call: kernels that the trace showed, None where none is kept.
    """

    metric: str
    samples_us: list[float] = field(repr=False)
    calls: int = 1
    note: str = ""
    kernels_per_call: float | None = None

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.samples_us, percent))


def capture_torch(calls: Sequence[Callable[[], None]]) -> Any:
    """All calls, over as many inputs and outputs, in one CUDA graph, which has been replayed.

    The graph keeps the calls, and so what they read and write: a replay goes to the same addresses, and the
    capture of another graph gives memory that nothing holds back to the GPU.
    """
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph: Any = torch.cuda.CUDAGraph()
    # "thread_local": what jax's own threads do on the GPU meanwhile must not break the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    graph.calls = calls
    return graph


def time_torch_graph(calls: Sequence[Callable[[], None]], *, replays: int = 30) -> Timing:
    """Captures all calls in one CUDA graph and times its replays.

    The outputs are written by the last replay: the caller poisons before and verifies after.
    """
    return time_torch_graphs([(capture_torch(calls), len(calls))], replays=replays)[0]


def read_rate(size: int = _READ_BYTES) -> float:
    """GB/s of a kernel that reads so many bytes: sums of float32 rows, by torch, the fastest of three shapes.

    The calls of a CUDA graph read buffers in turn: of a short read so many that L2 holds none of them.
    """
    import torch

    count = max(2, -(-_READ_IN_TURN // size))
    buffers = [torch.zeros(size // 4, device="cuda") for _ in range(count)]
    graphs, read = [], []
    for rows in _READ_ROWS:
        width = size // rows // 16 * 4  # whole vectors of 16 bytes
        out = torch.empty(rows, device="cuda")
        many = [buffer[: rows * width].view(rows, width) for buffer in buffers]
        calls: Any = [functools.partial(torch.sum, x, 1, out=out) for x in many]
        graphs.append((capture_torch(calls), count))
        read.append(4 * rows * width)
    taken = time_torch_graphs(graphs, replays=8)
    return max(n / each.percentile(50) for n, each in zip(read, taken, strict=True)) / 1e3


def time_torch_graphs(graphs: Sequence[tuple[Any, int]], *, replays: int) -> list[Timing]:
    """Times graphs of so many calls each. Of several the replays take turns, each behind one that is not
    timed: what disturbs the GPU for a few milliseconds costs each a sample, not one of them its median.
    Of a single one each is behind a kernel that waits: the host's time of a launch is no part of it.
    Behind each the GPU rests as behind an execution under jit: without a rest long calls reach its power
    limit.
    """
    import torch

    taken: list[list[float]] = [[] for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(replays):
        for (graph, calls), samples in zip(graphs, taken, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if len(graphs) > 1:
                graph.replay()
            else:
                torch.cuda._sleep(_WAIT_CYCLES)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples.append(start.elapsed_time(end) * 1e3 / calls)
            time.sleep(traces.REST_S)
    counts = [calls for _, calls in graphs]
    return [
        Timing("graph_us", samples, calls) for samples, calls in zip(taken, counts, strict=True)
    ]


def time_jit_span(program: Callable, arguments: Sequence[Any], *, executions: int = 12) -> Timing:
    """As `time_jit_spans`, of one program."""
    return time_jit_spans([program], [arguments], executions=executions)[0]


def time_jit_spans(
    programs: Sequence[Callable], arguments: Sequence[Sequence[Any]], *, executions: int = 12
) -> list[Timing]:
    """Device span per call of jitted programs that make one call per argument each, from one trace.

    The host waits after every execution, which sets them apart in the trace. Without a kernel in
    the trace (a profiler blind to CUDA graphs), the wall time is returned, and named so.
    """
    import jax

    recorded, holds = traces.record(programs, arguments, executions)
    timings = []
    for program, given, spans in zip(programs, arguments, recorded, strict=True):
        calls = len(given)
        if spans.us_per_call:
            note, kernels = spans.note, spans.kernels_per_call
            timings.append(Timing("span_us", spans.us_per_call, calls, note, kernels))
            continue
        wall = time_wall(lambda p=program, g=given: jax.block_until_ready(p(g)), calls=calls)
        note = f"{spans.note}; wall time instead; it holds {holds[:400]}"
        timings.append(Timing(wall.metric, wall.samples_us, wall.calls, note))
    return timings


def time_jit_spans_in_turns(
    programs: Sequence[Callable],
    arguments: Sequence[Sequence[Any]],
    *,
    executions: int = 12,
    rounds: int = 2,
) -> list[Timing | Exception]:
    """As `time_jit_span` of each program, in rounds, every second one backward.

    See `in_turns`. A program that fails has its error instead, and no further turn.
    """
    each = -(-executions // rounds)
    measures = [
        functools.partial(time_jit_span, program, given, executions=each)
        for program, given in zip(programs, arguments, strict=True)
    ]
    found = dict(in_turns(measures, rounds))
    return [found[i] for i in range(len(measures))]


def forth_and_back(count: int, number: int) -> list[int]:
    """The order of round `number`: every second one goes backward, so that each has the same mean place."""
    return list(range(count))[:: 1 if number % 2 == 0 else -1]


def behind_each_other(count: int, number: int) -> list[int]:
    """The order of round `number`: in every second one the others of the first go backward.

    Over two rounds, and the first of them again, each of three follows each other once and never itself:
    0, 1, 2, 0, 2, 1, 0. Where the GPU's power bounds steps that follow each other without a pause, their
    clock depends on who ran before.
    """
    first, *others = range(count)
    return [first, *others[:: 1 if number % 2 == 0 else -1]]


def in_turns(
    measures: Sequence[Callable[[], Timing]],
    rounds: int,
    *,
    told: Callable[[int, Timing], None] = lambda index, turn: None,
    order: Callable[[int, int], Sequence[int]] = forth_and_back,
) -> Iterator[tuple[int, Timing | Exception]]:
    """(index, timing of all its rounds) of each measure, as the last of its rounds ends.

    Long products reach the GPU's power limit, which then lowers its clock: whoever comes later is slower. A
    measure that fails has its error instead, at once, and no further turn. `told`: called with each turn but
    the last ones. `order`: of the measures, by their number and that of the round.
    """
    turns: list[list[Timing]] = [[] for _ in measures]
    failed = set[int]()
    for number in range(rounds):
        for i in order(len(measures), number):
            if i in failed:
                continue
            try:
                turns[i].append(measures[i]())
            except Exception as error:  # one measure's failure leaves the others their time
                failed.add(i)
                yield i, error
                continue
            if number < rounds - 1:
                told(i, turns[i][-1])
            else:
                yield i, _together(turns[i])


def _together(turns: Sequence[Timing]) -> Timing:
    """The samples of one measure's turns; those by a trace alone, where some were not."""
    by_trace = [turn for turn in turns if turn.metric == "span_us"]
    kept = by_trace or turns
    notes = dict.fromkeys(turn.note for turn in turns if turn.note)
    samples = [sample for turn in kept for sample in turn.samples_us]
    first = kept[0]
    note = "; ".join(notes)
    return Timing(first.metric, samples, first.calls, note, first.kernels_per_call)


def steady_steps(
    run: Callable[[], Any], wait: Callable[[], Any], us: float, calls: int
) -> list[float]:
    """µs per call of steady steps, by the host's clock: how much longer a round takes that has about 200 ms
    of further steps.

    What a round costs once is not a step's: with jax 0.6 to 1 ms, most of it in the first call behind a wait,
    up to 0.5% of a round of 200 ms; with a CUDA graph of torch's 0.06 to 0.26 ms. As many steps run first,
    untimed: those that reach the GPU's power limit settle at a clock of their own, whoever ran before.

    Args:
        run: one step of so many calls.
        wait: until the last one has ended.
        us: about the time of a call.
        calls: in a step.
    """
    steps = int(np.clip(200_000 / (calls * max(us, 1.0)), 3, 1500))
    few = max(2, steps // 8)

    def taken(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            run()
        wait()
        return (time.perf_counter() - start) * 1e6

    taken(steps)
    samples = []
    for _ in range(_ROUNDS):
        short = taken(few)
        samples.append((taken(few + steps) - short) / steps / calls)
    return samples


def time_wall(run: Callable[[], Any], *, calls: int, repeats: int = 10) -> Timing:
    """Wall time on the host, dispatch included: for machines without a GPU."""
    run()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        samples.append((time.perf_counter() - start) * 1e6 / calls)
    return Timing("wall_us", samples, calls, "host wall time, dispatch included")
