"""`moe-align profile --model NAME`: a layer's forward and backward under jax.profiler, stage by stage."""

import dataclasses
import functools
import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_align_jax import _traces as traces
from moe_align_jax import fused_moe, route_topk, select_moe_implementation
from moe_align_jax._cli import folders, profile
from moe_align_jax.types import Implementation

_SHOWN = 12  # operations in the table; the rest is summed


@dataclasses.dataclass(frozen=True)
class Layer:
    """Sizes of one expert layer, and the options of its router."""

    experts: int
    top_k: int
    hidden: int
    ffn: int
    routing: tuple[tuple[str, Any], ...] = (("renormalize", True),)

    def scaled(self, scale: int) -> "Layer":
        """Hidden and width divided by `scale`, to multiples of 8; experts and top_k stay."""
        hidden, ffn = (max(8, size // scale // 8 * 8) for size in (self.hidden, self.ffn))
        return dataclasses.replace(self, hidden=hidden, ffn=ffn)


_DEEPSEEK = {
    "scoring": "sigmoid",
    "num_groups": 8,
    "topk_groups": 4,
    "renormalize": True,
    "scaling_factor": 2.5,
}
MODELS = {
    "qwen3-30b-a3b": Layer(128, 8, 2048, 768),
    "mixtral-8x7b": Layer(8, 2, 4096, 14336),
    "deepseek-v3": Layer(256, 8, 7168, 2048, tuple(_DEEPSEEK.items())),
}


# -- the program ------------------------------------------------------------------------------------------


def _make(layer: Layer, tokens: int, dtype: str, implementation: Implementation | None):
    """(the jitted step, its arguments): the output, and the derivatives in the weights and the tokens."""

    def block(weights, x):
        router, gate_up, down = weights
        with jax.named_scope("route"):
            logits = x.astype(jnp.float32) @ router
            shares, ids = route_topk(
                logits,
                top_k=layer.top_k,
                implementation=implementation,
                correction_bias=bias,
                **dict(layer.routing),
            )
        with jax.named_scope("experts"):
            y, counts = fused_moe(
                x,
                gate_up,
                down,
                shares,
                ids,
                return_tokens_per_expert=True,
                implementation=implementation,
            )
        return y, counts

    def moe_layer(weights, x, dy):
        y, backward, counts = jax.vjp(block, weights, x, has_aux=True)
        return y, backward(dy), counts

    grouped = dict(layer.routing).get("num_groups")
    bias = jnp.zeros(layer.experts, jnp.float32) if grouped else None
    keys = jax.random.split(jax.random.key(0), 5)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def random(key, shape, kind):
        return (jax.random.normal(key, shape, jnp.float32) / shape[-2] ** 0.5).astype(kind)

    e, h, n = layer.experts, layer.hidden, layer.ffn
    weights = (
        random(keys[0], (h, e), "float32"),
        random(keys[1], (e, h, 2 * n), dtype),
        random(keys[2], (e, n, h), dtype),
    )
    x, dy = (random(key, (tokens, h), dtype) * jnp.sqrt(tokens).astype(dtype) for key in keys[3:])
    return jax.jit(moe_layer), (weights, x, dy)


# -- what the compiled program says of its operations -----------------------------------------------------


class Operation(NamedTuple):
    """An instruction of the compiled program: its opcode, and the scopes that it was traced under."""

    opcode: str
    path: str


_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$")
_CONTAINERS = {"while", "call", "conditional"}  # their time is that of what they hold


def operations(text: str) -> dict[str, Operation]:
    """The instructions of a program's HLO text, by name."""
    found = {}
    for line in text.splitlines():
        if not (named := _INSTRUCTION.match(line)):
            continue
        opcode = re.search(r"\s([a-z][\w-]*)\(", f" {named[2]}")
        path = re.search(r'op_name="([^"]*)"', named[2])
        if opcode:
            found[named[1]] = Operation(opcode[1], path[1] if path else "")
    return found


# In a path the first of these that is found is the stage.
_STAGES = (
    ("moe_align_block_size", "align"),
    ("gate_up", "gate and up"),
    ("down", "down"),
    ("combine", "combine"),
    ("route", "route"),
    ("route_topk", "route"),
    ("experts", "experts, other"),
    ("fused_moe", "experts, other"),
)
_ORDER = ("route", "align", "gate and up", "down", "combine", "experts, other", "not attributed")


def stage_of(path: str) -> tuple[str, str]:
    """(stage, "forward" or "backward") of the scopes that an operation was traced under."""
    # transpose(jvp(experts))/fused_moe/gate_up/...: the names, without what they are wrapped in.
    names = set(re.findall(r"[\w.]+", path))
    stage = next((stage for name, stage in _STAGES if name in names), "not attributed")
    if stage == "not attributed":
        return stage, ""
    return stage, "backward" if "transpose" in path else "forward"


# -- the roofline -----------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """What this machine does at best, measured in this process."""

    flops: float
    bytes: float


_REST = 0.05  # seconds


def _seconds(program: Callable[..., Any], calls: int, *arguments: Any) -> float:
    """Of one call; the shortest of several runs of `calls` of them, by the host's clock.

    A call takes what the one before gives in place of its first argument. One alone would take the host about
    as long to launch and to wait for as it takes the GPU. The card rests before each run, as it does before
    the layer's: after tens of milliseconds of products it draws all the power it may, and lowers its clock.
    """

    @jax.jit
    def chain(first: Any, *rest: Any) -> Any:
        for _ in range(calls):
            first = program(first, *rest)
        return first

    jax.block_until_ready(chain(*arguments))
    times = []
    for _ in range(5):
        time.sleep(_REST)
        began = time.perf_counter()
        jax.block_until_ready(chain(*arguments))
        times.append(time.perf_counter() - began)
    return min(times) / calls


def measure_rates(dtype: str, on_gpu: bool) -> Rates:
    """A dense product of random numbers, and a sum of a large array, of this device."""
    size, elements, products, reads = (8192, 2**29, 6, 24) if on_gpu else (768, 2**24, 2, 2)
    keys = jax.random.split(jax.random.key(0))
    a = jax.random.normal(keys[0], (size, size), dtype)
    b = jax.random.normal(keys[1], (size, size), dtype) * size**-0.5
    product = _seconds(lambda a, b: a @ b, products, a, b)
    # It reads the array again each time: the least value that counts is the sum before, of zeros.
    values = jnp.zeros(elements, jnp.float32)
    read = _seconds(lambda least, x: jnp.sum(jnp.maximum(x, least)), reads, jnp.float32(0), values)
    return Rates(2.0 * size**3 / product, 4.0 * elements / read)


class Work(NamedTuple):
    """What a stage must do at least."""

    flops: float
    bytes: float


def least_work(
    layer: Layer, tokens: int, pairs: int, hit: int, itemsize: int
) -> dict[tuple[str, str], Work]:
    """Of each stage and direction: operations on real pairs, and bytes if each array is moved once.

    Of the weights, forward and the derivative in the tokens read those of the experts that got a token;
    the derivative in the weights is written for all experts.
    """
    h, n = layer.hidden, layer.ffn
    matrices = {"gate and up": 2 * h * n, "down": n * h}
    rows = {"gate and up": (tokens * h, pairs * n), "down": (pairs * n, pairs * h)}
    found = {}
    for stage, matrix in matrices.items():
        given, made = rows[stage]
        product = 2.0 * pairs * matrix
        found[stage, "forward"] = Work(product, (given + hit * matrix + made) * itemsize)
        # Read: rows, the result's derivative, weights. Written: the rows' derivative, the weights'.
        moved = 2 * given + made + (hit + layer.experts) * matrix
        found[stage, "backward"] = Work(2 * product, moved * itemsize)
    logits = 4.0 * tokens * layer.experts
    router = 4.0 * h * layer.experts
    product = 2.0 * tokens * h * layer.experts
    shares = 8.0 * pairs  # a weight and an id of each pair
    x = tokens * h * itemsize
    found["route", "forward"] = Work(product, x + router + shares)
    found["route", "backward"] = Work(2 * product, 2 * x + 2 * router + logits + shares)
    found["combine", "forward"] = Work(2.0 * pairs * h, (pairs + tokens) * h * itemsize + shares)
    found["combine", "backward"] = Work(4.0 * pairs * h, (2 * pairs + tokens) * h * itemsize)
    return found


# -- the tables -------------------------------------------------------------------------------------------


# Twice the roofline: kernels of other stages do most of this one's work.
_ELSEWHERE = 2.0


def _stage_table(
    times: dict[tuple[str, str], float], work: dict[tuple[str, str], Work], rates: Rates
) -> Table:
    """`times` in µs per call."""
    total = sum(times.values())
    table = Table(title="time per stage", title_justify="left")
    table.add_column("stage")
    table.add_column("direction")
    for title in ("µs per call", "share", "GFLOP/s", "GB/s", "bound by", "of the roofline"):
        table.add_column(title, justify="right")
    for key in sorted(times, key=lambda k: (_ORDER.index(k[0]), k[1] != "forward")):
        us = times[key]
        cells = [f"{us:.2f}", f"{us / total:.1%}"]
        if key in work and us > 0:
            flops, moved = work[key]
            by_flops, by_bytes = flops / rates.flops, moved / rates.bytes
            cells += [f"{flops / us / 1e3:,.1f}", f"{moved / us / 1e3:,.1f}"]
            cells += ["arithmetic" if by_flops > by_bytes else "memory"]
            share = max(by_flops, by_bytes) * 1e6 / us
            cells += [f"{share:.1%}" if share < _ELSEWHERE else "elsewhere"]
        else:
            cells += ["-"] * 4
        table.add_row(*key, *cells)
    return table


class Total(NamedTuple):
    """All events of one operation."""

    name: str
    stage: str
    count: int
    total_us: float


def _operation_table(totals: list[Total], repeats: int, on_gpu: bool) -> Table:
    kind = "kernel" if on_gpu else "XLA operation"
    table = Table(title=f"time per {kind}", title_justify="left")
    table.add_column("name", overflow="fold")
    table.add_column("stage")
    for title in ("events", "µs per call", "share"):
        table.add_column(title, justify="right")
    everything = sum(row.total_us for row in totals)
    rest = totals[_SHOWN:]
    if rest:
        count, us = sum(r.count for r in rest), sum(r.total_us for r in rest)
        totals = [*totals[:_SHOWN], Total(f"{len(rest)} others", "", count, us)]
    for row in totals:
        table.add_row(
            escape(row.name),
            row.stage,
            str(row.count),
            f"{row.total_us / repeats:.2f}",
            f"{row.total_us / everything:.1%}",
        )
    return table


def attribute(
    events: Iterable[traces.Event], program: dict[str, Operation]
) -> tuple[dict[tuple[str, str], float], list[Total]]:
    """µs of each stage and direction, and the totals of each operation, the costliest first.

    An event whose operation the program does not name is "not attributed", and stays in the sums.
    """
    stages: dict[tuple[str, str], float] = {}
    sums: dict[tuple[str, str], tuple[int, float]] = {}
    for event in events:
        operation = program.get(event.operation or event.name, Operation("", ""))
        if operation.opcode in _CONTAINERS:
            continue
        us = event.duration_ns / 1e3
        stage, direction = stage_of(operation.path)
        stages[stage, direction] = stages.get((stage, direction), 0.0) + us
        key = event.name, f"{stage}, {direction}" if direction else stage
        count, total = sums.get(key, (0, 0.0))
        sums[key] = count + 1, total + us
    totals = [Total(*key, *value) for key, value in sums.items()]
    return stages, sorted(totals, key=lambda row: -row.total_us)


def run(
    console: Console,
    *,
    model: str,
    scale: int,
    num_tokens: int,
    repeats: int,
    implementation: Implementation | None,
    folder: Path,
) -> int:
    """Prints the tables and names the trace; 1 when the trace shows no work, else 0.

    Raises:
        OSError: the folder cannot be written to; nothing has run then.
    """
    folders.check(folder)
    layer = MODELS[model].scaled(scale)
    on_gpu = jax.default_backend() == "gpu"
    dtype = "bfloat16" if on_gpu else "float32"
    shape = (layer.experts, layer.ffn, layer.hidden)
    selection = select_moe_implementation(
        (num_tokens, layer.hidden),
        shape,
        top_k=layer.top_k,
        dtype=dtype,
        implementation=implementation,
    )
    rates = measure_rates(dtype, on_gpu)
    step, arguments = _make(layer, num_tokens, dtype, implementation)
    lowered = step.lower(*arguments)
    # A trace does not tell which operation a kernel within a CUDA graph belongs to: no graphs.
    options = {"xla_gpu_enable_command_buffer": ""} if on_gpu else {}
    compiled = lowered.compile(compiler_options=options)
    _, _, counts = compiled(*arguments)
    file = profile.trace(folder, lambda: compiled(*arguments), repeats, "moe_layer")
    text = compiled.as_text() or ""
    named = re.match(r"HloModule ([\w.-]+)", text)
    trace = traces.load(file)
    if on_gpu:
        events = traces.gpu_events(trace, operations=True)
    else:
        module = named[1] if named else ""
        events = [e for e in traces.cpu_events(trace) if e.module == module]
    device = jax.devices()[0]
    smaller = f" (hidden and width divided by {scale})" if scale > 1 else ""
    console.print(
        f"{model}{smaller} on {device.device_kind}: {num_tokens} tokens, top-{layer.top_k} of "
        f"{layer.experts} experts, hidden {layer.hidden}, width {layer.ffn}, {dtype}, {repeats} calls\n"
        f"experts forward by {selection.implementation} ({selection.form})",
        highlight=False,
    )
    if not events:
        console.print(f"The trace shows no {'kernel' if on_gpu else 'operation'} of this program.")
        profile.print_trace(console, file, folder)
        return 1
    stages, totals = attribute(events, operations(text))
    times = {key: us / repeats for key, us in stages.items()}
    pairs, hit = int(counts.sum()), int((counts > 0).sum())
    work = least_work(layer, num_tokens, pairs, hit, jnp.dtype(dtype).itemsize)
    console.print(_stage_table(times, work, rates))
    console.print(
        f"roofline: {rates.flops / 1e9:,.0f} GFLOP/s, by a dense {dtype} product, and "
        f"{rates.bytes / 1e9:,.0f} GB/s, by reading a large array, both measured in this run\n"
        f"rates: of the {pairs} pairs and of each array moved once ({hit} experts hit), over the stage's "
        f"time; elsewhere: other stages' kernels do most of this one's work",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_operation_table(totals, repeats, on_gpu))
    lost = sum(us for (stage, _), us in times.items() if stage == "not attributed")
    total = sum(times.values())
    console.print(
        f"sum: {total:.2f} µs per call, {1 - lost / total:.1%} of it attributed to a stage"
        + ("" if on_gpu else "; operations on several threads count each"),
        highlight=False,
    )
    if on_gpu:
        as_usual = lowered.compile()
        [spans], _ = traces.record([lambda _: as_usual(*arguments)], [[None]], repeats)
        note = f" ({spans.note})" if spans.note else ""
        median = statistics.median(spans.us_per_call)
        text = f"device span: {median:.2f} µs per call, median, with XLA's CUDA graphs{note}"
        console.print(text, highlight=False, soft_wrap=True)
    profile.print_trace(console, file, folder)
    return 0
