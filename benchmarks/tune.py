"""Which form and sizes of the alignment are fastest on this GPU, measured; writes the table of its kind.

    python -m benchmarks.tune --experts 256,64 --budget 600

For each (pairs, experts) it starts from what is chosen today and from its neighbours' winners, and climbs:
every field of the config halved, doubled or flipped, for as long as that pays. A config counts after its
results equalled NumPy's; a winner is written where it beats its neighbours' and today's choice by over 2%.

Times are device spans under jit. What serves calls from PyTorch's graphs best may be another choice.
"""

import argparse
import dataclasses
import datetime
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

import moe_align_jax
from moe_align_jax._align import tables
from moe_align_jax._align.tables import BlockAlignMosaicConfig as Config
from moe_align_jax._align.tables import Row, Table
from moe_align_jax._cli import folders
from moe_align_jax._core import checks
from moe_align_jax.types import AlignProblem

# Important experts first: a budget may end early.
EXPERTS = (256, 64, 1024, 8, 65_535, 4096)
SIZES = (8, *(2**k for k in range(5, 22)))  # a row of the table ends at each
HYSTERESIS = 0.02
_MOST_STEPS = 2
# Beyond these a launch fails or nothing is gained; fields that are not named stay below 2**20.
_LIMITS = {"num_warpgroups": 8, "num_ctas": 256, "rounds": 8, "cluster": 8}
_EXECUTIONS = 7
_CALL_WORDS = 1 << 25  # of output in one program


class Cell(NamedTuple):
    """A size that is measured."""

    num_pairs: int
    num_experts: int
    block_size: int

    @property
    def problem(self) -> AlignProblem:
        rows = checks.capacity(
            self.num_pairs,
            block_size=self.block_size,
            num_experts=self.num_experts,
            pad_sorted_ids=False,
        )
        return AlignProblem(self.num_pairs, self.num_experts, self.block_size, rows)


class Winner(NamedTuple):
    """What a cell's row will say."""

    config: Config
    us: float


# µs per call of each fitted config, or why it has none.
type Measure = Callable[[Cell, Sequence[Config]], list[float | str]]


def block_size_for(num_pairs: int) -> int:
    """The rows per block that a grouped GEMM of this size has, about."""
    return 16 if num_pairs <= 1024 else 64 if num_pairs <= 32_768 else 128


# -- the search -------------------------------------------------------------------------------------


def neighbours(config: Config) -> list[Config]:
    """Each field halved, doubled or flipped, one at a time."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            options = [not value]
        elif isinstance(value, int):
            limit = _LIMITS.get(field.name, 1 << 20)
            options = [v for v in (value // 2, value * 2) if 1 <= v <= limit]
        else:
            continue
        found += [dataclasses.replace(config, **{field.name: option}) for option in options]
    return found


def other_forms(cell: Cell) -> list[Config]:
    """Where forms meet, the heuristic's choice for the sizes on both sides, and the default table's."""
    n, num_experts = cell.num_pairs, cell.num_experts
    near = {n // 4, n // 2, n, n * 2, n * 4}
    found = [tables.heuristic(max(1, size), num_experts).config for size in sorted(near)]
    found.append(tables.row_for(n, num_experts).config)  # the default table's, of another GPU maybe
    if 1024 <= num_experts <= tables.MAX_HISTOGRAM_EXPERTS:
        found.append(tables.heuristic(n, tables.MAX_HISTOGRAM_EXPERTS + 1).config)
    if n > tables.MAX_WARP_PAIRS:  # one cluster, with a round or two for all its threads
        groups = min(4, max(1, n // (tables.PORTABLE_CLUSTER * 256)))
        rounds = -(-n // (tables.PORTABLE_CLUSTER * 128 * groups))
        if rounds <= _LIMITS["rounds"]:
            ctas = tables.PORTABLE_CLUSTER
            found.append(
                Config(form="cluster", num_warpgroups=groups, num_ctas=ctas, rounds=rounds)
            )
    return list(dict.fromkeys(found))


def allowed(config: Config, cell: Cell) -> bool:
    """Whether a row of a table may say so: a launch that no GPU takes would end the process."""
    return tables.refusal(config, cell.num_experts, cell.num_pairs) is None


def search(cell: Cell, preferred: Sequence[Config], measure: Measure) -> Winner | None:
    """The config of a cell: the first of `preferred` within 2% of the best, else the best.

    None when nothing could be measured.
    """
    times: dict[Config, float] = {}  # by fitted config: many configs come to the same
    tried: dict[Config, Config] = {}

    def try_all(configs: Iterable[Config]) -> None:
        new: dict[Config, Config] = {}
        for config in configs:
            if allowed(config, cell):
                fitted = _fitted(config, cell)
                if fitted not in tried:
                    new.setdefault(fitted, config)
        tried.update(new)
        for fitted, result in zip(new, measure(cell, list(new)) if new else [], strict=True):
            if isinstance(result, float):
                times[fitted] = result

    try_all([*preferred, *other_forms(cell)])
    for _ in range(_MOST_STEPS):
        if not times:
            return None
        best = min(times, key=times.__getitem__)
        try_all(neighbours(tried[best]))
        if times[min(times, key=times.__getitem__)] > times[best] * (1 - HYSTERESIS):
            break
    best = min(times, key=times.__getitem__)
    for config in preferred:
        us = times.get(_fitted(config, cell)) if allowed(config, cell) else None
        if us is not None and us <= times[best] * (1 + HYSTERESIS):
            return Winner(config, us)
    return Winner(tried[best], times[best])


def _fitted(config: Config, cell: Cell) -> Config:
    """As it will run; what `fit` alone reads is left out, so that equal programs are equal."""
    return dataclasses.replace(tables.fit(config, cell.problem), cells_per_cta=1)


def cells_of(experts: Sequence[int], max_pairs: int, block_size: int | None = None) -> list[Cell]:
    """Every cell, by experts in the order given, then by pairs."""
    return [
        Cell(n, num_experts, block_size or block_size_for(n))
        for num_experts in experts
        for n in SIZES
        if n <= max_pairs
    ]


def tune(
    cells: Sequence[Cell],
    measure: Measure,
    *,
    tuning: str,
    seconds: float | None = None,
    report: Callable[[Cell, Winner | None], None] = lambda cell, winner: None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[Cell, Winner]:
    """The winners of the cells that were reached within `seconds`.

    A cell prefers the choice of the next smaller size, then that of the experts before, then that of the
    table `tuning`.
    """
    winners: dict[Cell, Winner] = {}
    started = clock()
    for cell in cells:
        if seconds is not None and clock() - started > seconds:
            break
        smaller = [w for c, w in winners.items() if c.num_experts == cell.num_experts]
        before = [w for c, w in winners.items() if c.num_pairs == cell.num_pairs]
        today = tables.row_for(cell.num_pairs, cell.num_experts, tuning).config
        preferred = [w.config for w in (*smaller[-1:], *before[-1:])] + [today]
        winner = search(cell, preferred, measure)
        if winner is not None:
            winners[cell] = winner
        report(cell, winner)
    return winners


# -- the table --------------------------------------------------------------------------------------


def table_of(
    winners: dict[Cell, Winner], *, gpu: str, jax_version: str, tuning: str, date: str
) -> Table:
    """Winners where there are any, what `tuning` chooses elsewhere; equal neighbours are one row.

    A range of experts ends at each E that was measured, whose choices it takes (what fits there fits below),
    and where one of today's ends.
    """
    limit = tables.MAX_HISTOGRAM_EXPERTS
    today = tables.table(tuning)
    measured = {cell.num_experts for cell in winners}
    measured |= {row.last_expert for row in today.rows if row.last_expert} if today else set()
    ends: list[int] = sorted(measured | {limit})
    beyond = [e for e in ends if e > limit] or [limit + 1]
    ranges = [e for e in ends if e <= limit] + beyond
    rows: list[Row] = []
    first = 1
    for end in ranges:
        last = None if end == ranges[-1] else end
        mine = {cell.num_pairs: w for cell, w in winners.items() if cell.num_experts == end}
        lines = [_row(n, end, mine.get(n), tuning) for n in SIZES]
        # The largest size and all beyond.
        lines[-1] = lines[-1]._replace(num_pairs=None)
        merged = [
            line
            for line, following in zip(lines, [*lines[1:], None], strict=True)
            if following is None or line.config != following.config
        ]
        shape = [(row.num_pairs, row.config) for row in merged]
        above = [row for row in rows if row.last_expert == first - 1]
        if above and [(r.num_pairs, r.config) for r in above] == shape:
            start = above[0].first_expert
            rows = [row for row in rows if row.last_expert != first - 1]
        else:
            start = first
        rows += [r._replace(first_expert=start, last_expert=last) for r in merged]
        first = end + 1
    base = tables.table(tuning) or tables.table("")
    assert base is not None  # the default table is part of the package
    made_by = f"moe-align tune, {moe_align_jax.__version__}"
    return Table(gpu, jax_version, date, made_by, base.batched, tuple(rows))


def _row(num_pairs: int, num_experts: int, winner: Winner | None, tuning: str) -> Row:
    if winner is None:
        config, us = tables.row_for(num_pairs, num_experts, tuning).config, None
    else:
        config, us = winner.config, round(winner.us, 2)
    return Row(0, None, num_pairs, config, us)


def write(path: Path, text: str) -> None:
    """All or nothing: another process may read the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".new")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


# -- measuring --------------------------------------------------------------------------------------


def answer(cell: Cell, ids: np.ndarray) -> list[np.ndarray]:
    """The four results by NumPy, in the order of `AlignProblem.outputs`."""
    n, block = cell.num_pairs, cell.block_size
    counts = np.bincount(ids, minlength=cell.num_experts)
    padded = -(-counts // block) * block
    order = np.argsort(ids, kind="stable")
    shift = np.cumsum(padded) - padded - (np.cumsum(counts) - counts)
    rows = np.full(cell.problem.capacity, n)
    rows[np.arange(n) + shift[ids[order]]] = order
    labels = np.full(cell.problem.num_blocks, -1)
    labels[: padded.sum() // block] = np.repeat(np.arange(cell.num_experts), padded // block)
    return [rows, labels, padded.sum(keepdims=True), counts]


def measure_on_gpu(cell: Cell, configs: Sequence[Config]) -> list[float | str]:
    """Compiles, verifies and times each config: device span per call within one jit, in one trace."""
    import jax

    from moe_align_jax import _traces as traces
    from moe_align_jax._align import kernels as block_align
    from moe_align_jax._simt import mosaic

    problem = cell.problem
    calls = min(20, max(4, _CALL_WORDS // problem.capacity))
    rng = np.random.default_rng(cell)

    def draw() -> np.ndarray:
        return rng.integers(0, cell.num_experts, cell.num_pairs, dtype=np.int32)

    arguments = [jax.device_put(draw()) for _ in range(calls)]

    def lowered(config: Config):
        kernels = block_align.build(problem, config)
        align = jax.jit(lambda ids: mosaic.run(kernels, (ids,)))
        return jax.jit(lambda many: [align(ids) for ids in many]).lower(arguments)

    results: list[float | str] = []
    programs = []
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        compiling = []
        for config in configs:
            try:
                compiling.append(pool.submit(lowered(config).compile))
            except Exception as error:  # a config that cannot be built is no candidate
                failed: Future = Future()
                failed.set_exception(error)
                compiling.append(failed)
    for future in compiling:
        try:
            compiled = future.result()
            # Ids of its own: memory may still hold what another config wrote for the arguments.
            ids = draw()
            got = compiled([jax.device_put(ids)] * calls)[-1]
            for name, want, array in zip(problem.outputs, answer(cell, ids), got, strict=True):
                if not np.array_equal(np.asarray(array), want):
                    raise ValueError(f"wrong {name}")
        except Exception as error:  # nor is one that does not compile, run, or give NumPy's answer
            results.append(f"{type(error).__name__}: {error}"[:200])
            continue
        results.append("")
        programs.append(compiled)
    if not programs:
        return results
    spans, _ = traces.record(programs, [arguments] * len(programs), _EXECUTIONS)
    timed = iter(spans)
    return [text or _median(next(timed)) for text in results]


def _median(spans) -> float | str:
    return statistics.median(spans.us_per_call) if spans.us_per_call else spans.note


# -- the command ------------------------------------------------------------------------------------


def run(
    say: Callable[[str], None] = print,
    *,
    experts: Sequence[int],
    max_pairs: int,
    block_size: int | None,
    seconds: float | None,
    out: Path | None,
    measure: Measure = measure_on_gpu,
    gpu: str | None = None,
) -> int:
    """Tunes and writes; 0, or 1 when nothing was measured.

    Raises:
        NotImplementedError: the kernels cannot run here; the message says why.
        OSError: the table's folder cannot be written to; nothing was measured then.
    """
    import jax

    from moe_align_jax._lowering import select

    if gpu is None:
        gpu = select.gpu_kind()
        reason = select.kernels_unavailable("cuda")
        if gpu is None or reason:
            raise NotImplementedError(
                checks.message(
                    "benchmarks.tune",
                    "this process",
                    "have a GPU that runs the kernels",
                    reason or "no CUDA device",
                    "Tables are made on the GPU that they are for.",
                )
            )
    tuning = tables.table_name(gpu)
    path = out or Path(f"{tables.stem_of(gpu)}.json")
    folders.check(path.parent)
    say(f"{gpu}: today {tables.describe(tuning)}")
    cells = cells_of(experts, max_pairs, block_size)
    reached: dict[Cell, Winner] = {}

    def keep() -> Table:
        date = datetime.date.today().isoformat()
        made = table_of(reached, gpu=gpu, jax_version=jax.__version__, tuning=tuning, date=date)
        text = tables.format_table(made)
        tables.parse_table(text, str(path))  # what is written can be read
        write(path, text)
        return made

    def report(cell: Cell, winner: Winner | None) -> None:
        found = "nothing could be measured"
        if winner is not None:
            found = f"{winner.us:.2f} µs, {describe(winner.config)}"
            reached[cell] = winner
            keep()  # a launch that fails ends the process: what was found stays
        say(f"{'x'.join(map(str, cell)):>18}  {found}")

    tune(cells, measure, tuning=tuning, seconds=seconds, report=report)
    if not reached:
        say("nothing was measured; nothing is written")
        return 1
    rows = len(keep().rows)
    say(
        f"{len(reached)} of {len(cells)} sizes measured, {rows} rows written to {path}. It is "
        f"used from moe_align_jax/data/tuning/, or with {tables.FOLDER_VARIABLE} set to its folder."
    )
    return 0


def describe(config: Config) -> str:
    """The fields that are not as they are by default."""
    fields = dataclasses.fields(config)
    values = [(f.name, getattr(config, f.name)) for f in fields if f.name != "form"]
    changed = [f"{name} {value}" for name, value in values if value not in (False, 1)]
    return f"{config.form}: {', '.join(changed)}"


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if min(sizes) < 1:
        raise ValueError
    return list(dict.fromkeys(sizes))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--experts",
        type=_sizes,
        default=list(EXPERTS),
        help="E to measure, comma-separated, the important ones first",
    )
    parser.add_argument(
        "--max-pairs", type=int, default=SIZES[-1], help="no size beyond is measured"
    )
    parser.add_argument("--block-size", type=int, help="rows per block; by size without it")
    parser.add_argument(
        "--budget",
        type=float,
        help="seconds after which no size is begun; the rest stays as it is",
    )
    parser.add_argument("--out", type=Path, help="the table's file; named after the GPU without it")
    options = parser.parse_args(argv)
    if options.max_pairs < SIZES[0]:
        parser.error(f"--max-pairs must be at least {SIZES[0]}")
    if options.block_size is not None and options.block_size < 1:
        parser.error("--block-size must be at least 1")
    try:
        return run(
            experts=options.experts,
            max_pairs=options.max_pairs,
            block_size=options.block_size,
            seconds=options.budget,
            out=options.out,
        )
    except NotImplementedError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"benchmarks.tune cannot write: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
