"""Grouped products of e4m3 with block scales, under jit and from PyTorch, beside bfloat16 and DeepGEMM.

python -m benchmarks.fp8_matmul --out ROWS.jsonl [--deep-gemm FOLDER] [--variants]

x has a float32 scale for each row and 128 columns, w one for each 128 x 128 (weights `[E, N, K]`); results
are bfloat16. In the masked layout the mean rows are told, as DeepGEMM is told them. The bfloat16 products get
the same values, dequantised and rounded, in the blocks of `benchmarks.grouped_matmul`. Before a time is
taken, sampled rows are compared with NumPy's product of the dequantised operands by DeepGEMM's own rule.
Clocks, counts and processes are those of that benchmark: ours inside one jit (device span), DeepGEMM in one
CUDA graph. "torch_bridge" is `torch_bridge.deep_gemm`: the same function, called with DeepGEMM's own tensors,
in such a graph.

With `--wall` a row also has the host's time of a call in steady steps after each other, of as many calls as
take about 0.4 ms: under jit with the results of the step before donated, or a graph's replays.

Beside the share of a long read's rate each line has the time of a plain read of the bytes that its product
moves, out of memory, over the product's time: a short read does not reach that rate either.

FOLDER holds the package `deep_gemm`, as `python -m benchmarks.fetch deep_gemm` leaves it in .peers (see
benchmarks/deep_gemm_peer.py for what it needs); without the option it is left out. torch's
`_scaled_grouped_mm` has no block scales on Hopper, and is not run.
"""

import argparse
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks import (  # noqa: E402
    case_processes,
    children,
    deep_gemm_peer,
    grouped_matmul,
    timing,
)
from benchmarks.grouped_matmul import Size  # noqa: E402
from benchmarks.rows import reason_of  # noqa: E402

_SAMPLED_ROWS = 24
_BOUND = 1e-3  # of DeepGEMM's rule
_MASKED_ROWS = 4096
_STEP_US, _MOST_CALLS = 400, 32
# DeepGEMM's own cases: (groups, mean rows), (N, K).
_GROUPS = ((32, 192), (6, 1024), (32, 20), (6, 20))
_WEIGHTS = ((6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048))

SIZES = (
    Size(32768, 7168, 4096, 8),
    Size(32768, 2048, 7168, 8),
    Size(32768, 2048, 1536, 128),
    *(
        Size(groups * mean, k, n, groups, max_rows=_MASKED_ROWS)
        for groups, mean in _GROUPS
        for n, k in _WEIGHTS
    ),
    Size(8192, 7168, 4096, 8),
    Size(8192, 2048, 7168, 8),
    Size(6 * 1024, 7168, 6144, 6, max_rows=1024),  # full groups: all of exactly 1024 rows
)


def calc_diff(found: np.ndarray, want: np.ndarray) -> float:
    """DeepGEMM's measure: 1 - 2 xy / (xx + yy)."""
    found, want = found.astype(np.float64), want.astype(np.float64)
    return float(1 - 2 * (found * want).sum() / ((found**2).sum() + (want**2).sum()))


class Inputs:
    """The arrays of a case, on jax's device: quantised, and dequantised to bfloat16 when asked for."""

    def __init__(self, size: Size, calls: int):
        import jax
        import jax.numpy as jnp

        import moe_align_jax as maj

        self.size = size
        rng = np.random.default_rng(0)
        mean = size.rows // size.experts
        if mean == size.max_rows:
            self.counts = np.full(size.experts, mean, np.int32)
        elif size.max_rows:  # as DeepGEMM draws them
            self.counts = (mean * rng.uniform(0.7, 1.3, size.experts)).astype(np.int32)
        else:
            self.counts = np.bincount(size.expert_of_row(), minlength=size.experts).astype(np.int32)
        self.hit = int((self.counts > 0).sum())
        self.rows = int(self.counts.sum())
        self.expert = np.repeat(np.arange(size.experts), self.counts)
        self.within = np.concatenate([np.arange(c) for c in self.counts])
        keys = jax.random.split(jax.random.key(0), calls + 1)
        shape = (self.rows, size.k)
        self.x = [
            maj.quantize_rowwise(jax.random.normal(key, shape, jnp.bfloat16)) for key in keys[1:]
        ]
        shape = (size.experts, size.n, size.k)
        w = jax.random.normal(keys[0], shape, jnp.bfloat16) * jnp.bfloat16(size.k**-0.5)
        self.w = maj.quantize_blockwise(w)
        chosen = np.random.default_rng(1).choice(self.rows, min(_SAMPLED_ROWS, self.rows), False)
        chosen[0] = self.rows - 1
        self.sample = chosen
        rows = self._wide(*(np.asarray(a[chosen]) for a in self.x[0]))
        self.answers = np.empty((len(chosen), size.n), np.float32)
        for e in set(self.expert[chosen].tolist()):
            mine = self.expert[chosen] == e
            values, scales = (np.asarray(a[e]) for a in self.w)
            scales = np.repeat(scales, 128, axis=0)[: size.n]
            self.answers[mine] = rows[mine] @ self._wide(values, scales).T

    @staticmethod
    def _wide(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
        return values.astype(np.float32) * np.repeat(scales, 128, axis=-1)

    def bfloat16(self) -> tuple[list[Any], Any]:
        """x and w without scales."""
        import jax.numpy as jnp

        def rows(values, scales):
            wide = values.astype(jnp.float32) * jnp.repeat(scales, 128, axis=-1)
            return wide.astype(jnp.bfloat16)

        values, scales = self.w
        w = [  # an expert at a time: float32 of all would not fit
            rows(v, jnp.repeat(s, 128, axis=0)[: self.size.n])
            for v, s in zip(values, scales, strict=True)
        ]
        return [rows(*x) for x in self.x], jnp.stack(w)

    @property
    def calls_of_step(self) -> int:
        """Of a steady step, in whole turns of the inputs: so many that it takes about 0.4 ms or more, several
        times what the host's launch takes, at rates that no product exceeds."""
        us = max(self.flops / 1.5e9, self.bytes(1) / 4.5e6)
        turns = min(_STEP_US / us, _MOST_CALLS) / len(self.x)
        return max(1, math.ceil(turns)) * len(self.x)

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.size.k * self.size.n

    def bytes(self, item: int) -> int:
        """Of rows, weights of the experts hit, and the result."""
        size = self.size
        return item * (self.hit * size.k * size.n + self.rows * size.k) + 2 * self.rows * size.n

    def wrong(self, rows: Any) -> str:
        """Of the sampled rows, in order; "" where they are right."""
        difference = calc_diff(np.asarray(rows).astype(np.float32), self.answers)
        return "" if difference < _BOUND else f"difference {difference:.2e}"


# -- providers: (call of x and w, all x, w, the sampled rows of a result) --------------------------


def _take(inputs: Inputs, x: Any, rows: np.ndarray) -> Any:
    import jax

    return jax.tree.map(lambda a: a[rows], x)


def of_blocks(inputs: Inputs, block: int, *, e4m3: bool, layout: str = "column_major") -> Any:
    """Rows in aligned order, permuted beforehand."""
    import jax.numpy as jnp

    import moe_align_jax as maj

    aligned = maj.moe_align_block_size(
        inputs.expert[:, None].astype(np.int32),
        block_size=block,
        num_experts=inputs.size.experts,
        return_inverse=True,
    )
    take = np.minimum(np.asarray(aligned.sorted_token_ids), inputs.rows - 1)
    xs, w = (inputs.x, inputs.w) if e4m3 else inputs.bfloat16()
    xs = [_take(inputs, x, take) for x in xs]
    options: dict[str, Any] = {"block_size": block, "transpose_rhs": True}
    if e4m3:
        options |= {"implementation": "mosaic_gpu", "scale_layout": layout}
        if layout == "column_major":
            pad = ((0, 0), (0, -len(take) % 4))
            xs = [(values, jnp.pad(scales.T, pad)) for values, scales in xs]

    def call(x, w):
        return maj.grouped_matmul(x, w, aligned, **options)

    rows = np.asarray(aligned.row_of_pair)[inputs.sample]
    return call, xs, w, lambda out: out[rows]


def of_masked(inputs: Inputs, *, e4m3: bool, layout: str = "column_major") -> Any:
    import jax.numpy as jnp

    import moe_align_jax as maj

    size, counts = inputs.size, jnp.asarray(inputs.counts)
    starts = np.concatenate([[0], np.cumsum(inputs.counts)[:-1]])
    rows = np.minimum(starts[:, None] + np.arange(size.max_rows)[None], inputs.rows - 1)
    xs, w = (inputs.x, inputs.w) if e4m3 else inputs.bfloat16()
    xs = [_take(inputs, x, rows) for x in xs]
    options: dict[str, Any] = {"transpose_rhs": True, "expected_m": size.rows // size.experts}
    if e4m3:
        options |= {"implementation": "mosaic_gpu", "scale_layout": layout}
        if layout == "column_major":
            xs = [(values, scales.swapaxes(1, 2)) for values, scales in xs]

    def call(x, w):
        return maj.masked_grouped_matmul(x, w, counts, **options)

    where = inputs.expert[inputs.sample], inputs.within[inputs.sample]
    return call, xs, w, lambda out: out[where]


def lower(call: Callable, given: Any, tiles: Any, **options: Any) -> Any:
    """One program of all calls, whose kernels take these tiles; None for the usual ones."""
    import jax

    from moe_align_jax._grouped_matmul import launch

    traced = jax.jit(lambda many: [call(x, w) for x, w in many]).trace(given)
    usual = launch.config_for  # asked when the program is lowered
    if tiles is not None:
        launch.config_for = lambda *_: tiles
    try:
        return traced.lower(**options)
    finally:
        launch.config_for = usual


def lower_step(call: Callable, xs: list[Any], w: Any, calls: int) -> Any:
    """`step(outs, xs, w) -> outs`: so many calls, one after the other, over the inputs in turns."""
    import jax

    def step(outs, xs, w):
        del outs  # donated: the results may stand where those of the step before stood
        found: list[Any] = []
        for i in range(calls):
            x = xs[i % len(xs)]
            if found:  # equal calls would be one otherwise
                x, found[-1] = jax.lax.optimization_barrier((x, found[-1]))
            found.append(call(x, w))
        return found

    outs = [jax.eval_shape(call, xs[0], w)] * calls
    return jax.jit(step, donate_argnums=0, keep_unused=True).lower(outs, xs, w)


def prepare_jax(
    inputs: Inputs, made: Any, options: argparse.Namespace, tiles: Any, pool: Executor
) -> Callable:
    """Compiles a program, in another thread. Returns what measures it: (what is wrong, or "", the device's
    timing, and with `--wall` what times steady steps, else None)."""
    call, xs, w, sampled = made
    given = [(x, w) for x in xs]
    compiling = pool.submit(lower(call, given, tiles).compile)
    calls, steps = inputs.calls_of_step, None
    if options.wall and tiles is None:
        steps = pool.submit(lower_step(call, xs, w, calls).compile)

    def steady(step: Callable, us: float) -> timing.Timing:
        import jax
        import jax.numpy as jnp

        out = jax.eval_shape(call, xs[0], w)
        held = [[jnp.full(out.shape, jnp.nan, out.dtype) for _ in range(calls)]]

        def run():
            held[0] = step(held[0], xs, w)

        samples = timing.steady_steps(run, lambda: jax.block_until_ready(held[0]), us, calls)
        if wrong := inputs.wrong(sampled(held[0][0])):
            raise ValueError(f"later: {wrong}")
        return timing.Timing("wall_us", samples, calls)

    def measure() -> tuple[str, Any, Any]:
        compiled = compiling.result()
        if wrong := inputs.wrong(sampled(compiled(given)[0])):
            return wrong, None, None
        taken = timing.time_jit_span(compiled, given, executions=options.executions)
        if not steps:
            return "", taken, None
        return "", taken, functools.partial(steady, steps.result(), taken.percentile(50))

    return measure


def of_torch(inputs: Inputs) -> Any:
    """(Function, arguments of each call, the sampled rows of a result), by DeepGEMM's names: of its masked
    product, or of its contiguous one, whose blocks are of 128 rows."""
    import jax
    import jax.numpy as jnp
    import torch

    from torch_bridge import to_torch

    def e4m3(values):  # DLPack knows no float8 in older releases of torch
        raw = jax.lax.bitcast_convert_type(values, jnp.uint8)
        return to_torch(raw).view(torch.float8_e4m3fn)

    size = inputs.size
    if size.max_rows:
        _, xs, w, sampled = of_masked(inputs, e4m3=True)
        shape = (size.experts, size.max_rows, size.n)
        more: tuple[Any, ...] = (to_torch(jnp.asarray(inputs.counts)), size.rows // size.experts)
        function = "m_grouped_fp8_gemm_nt_masked"
    else:
        source, expert = deep_gemm_peer.contiguous_layout(inputs.counts)
        xs = [(values[source], scales[source].T) for values, scales in inputs.x]
        w, shape = inputs.w, (len(source), size.n)
        more = (to_torch(jnp.asarray(expert)),)
        function = "m_grouped_fp8_gemm_nt_contiguous"
        where = np.flatnonzero(expert >= 0)[inputs.sample]

        def sampled(out):
            return out[where]

    weights, calls = (e4m3(w[0]), to_torch(w[1])), []
    for values, scales in xs:
        # Columns of scales, seen as rows: what DeepGEMM calls MN-major, and reads where they lie.
        turned = to_torch(scales).transpose(-1, -2)
        out = torch.empty(shape, dtype=torch.bfloat16, device=turned.device)
        calls.append(((e4m3(values), turned), weights, out, *more))
    return function, calls, sampled


def prepare_torch(
    inputs: Inputs, made: Any, library: Any, options: argparse.Namespace, pool: Executor
) -> Callable:
    """Has a library that has DeepGEMM's functions compile, in another thread. Returns as `prepare_jax`."""
    function, given, sampled = made
    multiply = getattr(library, function)
    calls = [functools.partial(multiply, *each, disable_ue8m0_cast=True) for each in given]
    compiling = pool.submit(calls[0])

    def wrong_now() -> str:
        return inputs.wrong(sampled(given[0][2]).float().cpu().numpy())

    def steady(us: float) -> timing.Timing:
        import torch

        many = calls * (inputs.calls_of_step // len(calls))
        graph = timing.capture_torch(many)
        samples = timing.steady_steps(graph.replay, torch.cuda.synchronize, us, len(many))
        if wrong := wrong_now():
            raise ValueError(f"later: {wrong}")
        return timing.Timing("wall_us", samples, len(many))

    def measure() -> tuple[str, Any, Any]:
        compiling.result()
        given[0][2].fill_(np.nan)  # other libraries have written it
        calls[0]()
        if wrong := wrong_now():
            return wrong, None, None
        taken = timing.time_torch_graph(calls, replays=options.replays)
        if not options.wall:
            return "", taken, None
        return "", taken, functools.partial(steady, taken.percentile(50))

    return measure


# -- a case ----------------------------------------------------------------------------------------


def variants(size: Size) -> list[tuple[int, Any]]:
    """(Block, tiles): what a tuning table chooses from."""
    from moe_align_jax._grouped_matmul.config import Config

    mean, found = size.rows / size.experts, []
    masked = size.max_rows > 0
    if mean > 128:
        for group in (0, 4, 8, 16):
            tall = Config("m", 192, 128, 128, 4, group=group, computing=3, skips=masked)
            wide = Config("m", 128, 192, 128, 4, group=group, skips=masked)
            square = Config("m", 128, 128, 128, 5, group=group, skips=masked)
            for block, tiles in ((192, tall), (128, wide), (128, square)):
                for sharing in (0, 1, 2):
                    found.append((block, tiles._replace(sharing=sharing)))
                for early, sharing in itertools.product((False, True), (0, 1, 2)):
                    ahead = tiles._replace(sharing=sharing, ahead=True, early=early)
                    found.append((block, ahead))
                    if sharing > 1:
                        found.append((block, ahead._replace(shared="w")))
            late = square._replace(late=True)
            found += [(128, late), (128, late._replace(sharing=2))]
    if 16 < mean < 400:
        for group in (0, 8):
            tiles = Config("n", 64, 256, 128, 4, group=group)
            for each in (tiles, tiles._replace(ahead=True), tiles._replace(ahead=True, early=True)):
                found.append((64, each))
    if mean < 64:
        for bm in (8, 16, 32, 40):
            if mean / 2 < bm < max(17, 4 * mean):
                for stages, ahead in itertools.product((6, 8), (False, True)):
                    tiles = Config("swap", bm, 128, 128, stages, group=0, ahead=ahead, early=ahead)
                    found.append((bm, tiles))
                    found.append((bm, tiles._replace(bn=64, computing=1, stages=2 * stages)))
                # Two CTAs of an SM: one stores a tile while the other multiplies.
                narrow = Config(
                    "swap", bm, 64, 128, 8, group=0, ahead=True, early=True, computing=1
                )
                found += [(bm, narrow._replace(stages=s, num_ctas=264)) for s in (6, 8)]
    if masked:
        found += [(block, tiles._replace(finds=True)) for block, tiles in found]
    return found


def providers(size: Size, options: argparse.Namespace) -> dict[str, Callable]:
    """By name: called with inputs and threads, what measures. Names with e4m3 are ours under jit."""

    made: dict[Any, Any] = {}  # operands, which several tiles, or libraries, share

    def by_jax(make: Callable, *given: Any, tiles: Any = None, **more: Any) -> Callable:
        def prepare(inputs: Inputs, pool: Executor) -> Callable:
            key = (make, given, *more.items())
            if key not in made:
                made[key] = make(inputs, *given, **more)
            return prepare_jax(inputs, made[key], options, tiles, pool)

        return prepare

    def by_torch(load: Callable[[], Any]) -> Callable:
        def prepare(inputs: Inputs, pool: Executor) -> Callable:
            if of_torch not in made:
                made[of_torch] = of_torch(inputs)
            return prepare_torch(inputs, made[of_torch], load(), options, pool)

        return prepare

    found: dict[str, Callable] = {}
    given: tuple[Any, ...] = ()
    make: Callable = of_masked
    if not size.max_rows:
        # Of two alignments the one that its tiles fill: see choose_e4m3_tiles.py.
        given, make = (192 if size.rows / size.experts >= 1000 else 128,), of_blocks
    name = f"blocks of {given[0]}" if given else "masked"
    found[f"e4m3, {name}"] = by_jax(make, *given, e4m3=True)
    found[f"e4m3, {name}, scales by rows"] = by_jax(make, *given, e4m3=True, layout="row_major")
    if given and given != (128,):
        found["e4m3, blocks of 128"] = by_jax(make, 128, e4m3=True)
    for block in grouped_matmul.blocks_of(size) if given else ():
        found[f"ours, bfloat16, blocks of {block}"] = by_jax(make, block, e4m3=False)
    if not given:
        found["ours, bfloat16"] = by_jax(make, e4m3=False)
    found["torch_bridge"] = by_torch(_torch_bridge)
    if options.deep_gemm:
        found["DeepGEMM"] = by_torch(lambda: deep_gemm_peer.load(options.deep_gemm))
    if options.variants:
        for block, tiles in sorted(variants(size), key=lambda v: (v[1].shares_weights, v[0])):
            more = (block,) if given else ()
            found[f"e4m3, {tiles.name}"] = by_jax(make, *more, e4m3=True, tiles=tiles)
    wanted = options.only.split(";")

    def is_wanted(name: str) -> bool:
        return any(
            name.endswith(part[:-1]) if part.endswith("$") else part in name for part in wanted
        )

    return {name: measure for name, measure in found.items() if is_wanted(name)}


def _torch_bridge() -> Any:
    from torch_bridge import deep_gemm

    return deep_gemm


def run_case(size: Size, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compiles everything, waits for its turn, and gives a row for each provider.

    With `--wall` everybody's steady steps come behind all other times: they reach the GPU's power limit, and
    it keeps its lower clock for a while.
    """
    inputs = Inputs(size, options.calls)
    work: list[tuple[str, Any]] = []
    with ThreadPoolExecutor(4) as pool:
        for provider, make in providers(size, options).items():
            try:
                work.append((provider, make(inputs, pool)))
            except Exception as error:  # one that cannot be built leaves the others
                work.append((provider, error))
    children.wait_for_turn()
    rate, rate_of = timing.read_rate(), functools.cache(timing.read_rate)
    rows, walls = [], []
    for provider, measure in work:
        row, steady = _row(inputs, provider, measure, rate, rate_of)
        if steady:
            rows.append(row)
            walls.append(steady)
        else:
            yield row
    if not walls:
        return
    for i, taken in timing.in_turns(walls, 2, order=timing.behind_each_other):
        row = rows[i]
        if isinstance(taken, Exception):
            yield row | {"status": "failed", "reason": reason_of(taken)}
        else:
            more = {"wall_us": round(taken.percentile(50), 2), "calls_of_step": taken.calls}
            yield row | more


def _row(
    inputs: Inputs, provider: str, measure: Any, rate: float, rate_of: Callable[[int], float]
) -> tuple[dict[str, Any], Any]:
    """A row of the results, and what times steady steps, or None.

    `rate`: GB/s of a long read; `rate_of(bytes)`: of one of so many.
    """
    size = inputs.size
    row = {"case": size.name, **size._asdict(), "provider": provider, "experts_hit": inputs.hit}
    row |= {"rows_in_use": inputs.rows, "read_gbps": round(rate, 1)}
    try:
        if isinstance(measure, Exception):
            raise measure
        wrong, taken, steady = measure()
    except Exception as error:  # one provider's failure leaves the others their time
        wrong, taken, steady = reason_of(error), None, None
    if taken is None:
        return row | {"status": "failed", "reason": wrong}, None
    us = taken.percentile(50)
    moved = inputs.bytes(2 if "bfloat16" in provider else 1)
    row |= {"status": "ok", "metric": taken.metric, "us": round(us, 2)}
    row |= {f"p{p}_us": round(taken.percentile(p), 2) for p in (20, 80)}
    row |= {"tflops": round(inputs.flops / us / 1e6, 1), "calls": taken.calls}
    row |= {"gbps": round(moved / us / 1e3, 1), "note": taken.note}
    row |= {"of_read": round(row["gbps"] / rate, 3)}
    row |= {"same_read_us": round(moved / rate_of(moved) / 1e3, 2)}
    return row, steady


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    text = grouped_matmul.line(row)
    if "us" not in row:
        return text
    text += f", {row['same_read_us'] / row['us']:6.1%} of one of its {row['same_read_us']} us"
    return text + (f", wall {row['wall_us']} us" if "wall_us" in row else "")


def ratios(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """How many times as fast as the others our fastest under jit is, and ours from PyTorch; of bfloat16 the
    fastest is named."""
    for case in dict.fromkeys(row["case"] for row in rows):
        timed = {r["provider"]: r["us"] for r in rows if r["case"] == case and "us" in r}
        by_jit = [name for name in timed if name.startswith("e4m3")]
        from_torch = [name for name in timed if name == "torch_bridge"]
        others = [name for name in timed if name not in (*by_jit, *from_torch)]
        wide = sorted((name for name in others if "bfloat16" in name), key=lambda n: timed[n])
        others = [name for name in others if name not in wide[1:]]
        for ours in (by_jit, from_torch):
            if not ours:
                continue
            us, name = min((timed[name], name) for name in ours)
            times = [f"{timed[n] / us:.3f}x {n} ({timed[n]:.1f})" for n in others]
            yield ", ".join([f"{case}: {name} {us:.1f} us", *times])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", default="", help="numbers of the sizes to run, e.g. 0,1,4")
    parser.add_argument("--variants", action="store_true", help="also other tiles of the kernel")
    parser.add_argument("--wall", action="store_true", help="also the wall clock of steady steps")
    parser.add_argument("--deep-gemm", help="folder that holds the package deep_gemm")
    parser.add_argument(
        "--only",
        default="",
        help="providers whose name holds this, or this;or that; ends with this$",
    )
    parser.add_argument("--calls", type=int, default=2, help="inputs, and calls in a program")
    parser.add_argument("--executions", type=int, default=12)
    parser.add_argument("--replays", type=int, default=12)
    case_processes.add_arguments(parser, together=4, timeout="patience")
    options = parser.parse_args(argv)
    return case_processes.run(
        *("benchmarks.fp8_matmul", argv, options, SIZES, run_case, line, ratios),
        case_processes.chosen(options, SIZES),
    )


if __name__ == "__main__":
    sys.exit(main())
