"""`moe-align profile`: the op under jax.profiler, and time per kernel read back from the trace."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_align_jax import _traces as traces
from moe_align_jax import moe_align_block_size, select_implementation
from moe_align_jax._cli import folders
from moe_align_jax._cli.demo import Routing, route

_SHOWN = 12  # names in the table; the rest is summed


def trace(folder: Path, call: Callable[[], Any], repeats: int, name: str) -> Path:
    """Warms a call up and runs it `repeats` times under the profiler, as steps of that name; the file."""
    for _ in range(3):
        jax.block_until_ready(call())
    with jax.profiler.trace(str(folder)):
        for step in range(repeats):
            with jax.profiler.StepTraceAnnotation(name, step_num=step):
                jax.block_until_ready(call())
    return traces.newest_xplane(folder)


def print_trace(console: Console, file: Path, folder: Path) -> None:
    """Says where the trace is and what opens it."""
    console.print(
        f"trace left in {escape(str(file.parent))}\n"
        f"  Perfetto: open its *.trace.json.gz at ui.perfetto.dev\n"
        f"  XProf:    xprof --logdir {escape(str(folder))}",
        soft_wrap=True,
        highlight=False,
    )


def run(
    console: Console,
    *,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    block_size: int,
    repeats: int,
    implementation: str | None,
    folder: Path,
) -> int:
    """Prints the table and names the trace; 1 when the trace shows no work, else 0.

    Raises:
        OSError: the folder cannot be written to; nothing has run then.
    """
    folders.check(folder)
    topk_ids = route(Routing("", num_tokens, num_experts, top_k, block_size), seed=0)
    sizes = {"block_size": block_size, "num_experts": num_experts, "implementation": implementation}
    selection = select_implementation(topk_ids, **sizes)

    @jax.jit
    def moe_align(ids):
        return moe_align_block_size(ids, **sizes)

    file = trace(folder, lambda: moe_align(topk_ids), repeats, "align")
    profile = traces.load(file)
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu:
        events = traces.gpu_events(profile)
    else:
        events = [e for e in traces.cpu_events(profile) if "moe_align" in e.module]
    device = jax.devices()[0]
    console.print(
        f"{selection.implementation} (form {selection.form!r}) on {device.device_kind}: "
        f"{num_tokens} tokens, top-{top_k} of {num_experts} experts, blocks of {block_size}, "
        f"{repeats} calls",
        highlight=False,
    )
    if not events:
        console.print(f"The trace shows no {'kernel' if on_gpu else 'operation'} of this program.")
        console.print(f"trace: {escape(str(file.parent))}", soft_wrap=True, highlight=False)
        return 1
    rows = traces.totals(events)
    total = sum(row.total_us for row in rows)
    table = Table(title=f"time per {'kernel' if on_gpu else 'XLA operation'}", title_justify="left")
    table.add_column("name", overflow="fold")
    for title in ("events", "µs each", "µs per call", "share"):
        table.add_column(title, justify="right")
    rest = rows[_SHOWN:]
    if rest:
        count, time_us = sum(r.count for r in rest), sum(r.total_us for r in rest)
        rows = [*rows[:_SHOWN], traces.NameTotal(f"{len(rest)} others", count, time_us)]
    for row in rows:
        table.add_row(
            escape(row.name),
            str(row.count),
            f"{row.total_us / row.count:.2f}",
            f"{row.total_us / repeats:.2f}",
            f"{row.total_us / total:.1%}",
        )
    console.print(table)
    console.print(f"sum: {total / repeats:.2f} µs per call", highlight=False)
    if on_gpu:
        spans = traces.span_per_call(events, executions=repeats, calls=1)
        note = f" ({spans.note})" if spans.note else ""
        median = statistics.median(spans.us_per_call)
        console.print(f"device span: {median:.2f} µs per call, median{note}", highlight=False)
    print_trace(console, file, folder)
    return 0
