"""grouped_matmul, ragged_dot and masked_grouped_matmul beside the grouped GEMMs of other libraries.

python -m benchmarks.grouped_matmul --out ROWS.jsonl

With --deep-gemm DeepGEMM is among them, as `python -m benchmarks.fetch deep_gemm` leaves it in .peers.
Every provider multiplies the same rows, uniform over the experts, with the same weights, bfloat16. Before a
time is taken, sampled rows of the result are compared with NumPy's in float32. Ours and jax's run inside one
jit (device span), torch's in one CUDA graph; several calls each, over as many inputs. TFLOP/s count rows in
use, not padding. GB/s count the weights of the experts hit, and the rows, each once. "Of a read" is that rate
over the rate of a kernel that reads 1 GiB and writes nothing, measured in the same run.

A child process takes each case: one that reads where it must not would spoil the others. Some of them prepare
side by side, operands and compilation, then one after the other measures.
"""

import argparse
import concurrent.futures
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

# Both frameworks share one GPU here; by default jax would take most of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks import case_processes, children, deep_gemm_peer, timing, training_peers  # noqa: E402
from benchmarks.rows import failed  # noqa: E402

_SAMPLED_ROWS = 24
_BOUND = 1e-2
# (block_m, block_n, max_concurrent_steps, grid_block_n) of jax's example, block_k = 64.
_JAX_CONFIGS = [(64, 128, 4, 2), (128, 128, 4, 4), (64, 192, 5, 2), (128, 192, 4, 2)]


class Size(NamedTuple):
    """`rows` rows of k values, uniform over the experts, times `[experts, k, n]`.

    Attributes:
        zipf: expert i is chosen in proportion to 1 / (i + 1), in place of uniformly.
        max_rows: of an expert, in the masked layout; 0 elsewhere.
    """

    rows: int
    k: int
    n: int
    experts: int
    zipf: bool = False
    max_rows: int = 0

    @property
    def name(self) -> str:
        more = ", zipf" if self.zipf else f", masked {self.max_rows}" if self.max_rows else ""
        return f"{self.rows}x{self.k}x{self.n}, {self.experts} experts{more}"

    def expert_of_row(self, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        if not self.zipf:
            return rng.integers(0, self.experts, self.rows).astype(np.int32)
        share = 1 / np.arange(1, self.experts + 1)
        return rng.choice(self.experts, self.rows, p=share / share.sum()).astype(np.int32)


SIZES = (
    Size(32768, 2048, 1536, 128),
    Size(32768, 4096, 14336, 8),
    Size(8192, 7168, 512, 256),
    Size(512, 2048, 1536, 128),
    Size(64, 7168, 4096, 32),
    Size(32768, 2048, 1536, 128, zipf=True),
    Size(276, 7168, 4096, 32, max_rows=128),
    Size(1986, 7168, 4096, 32, max_rows=1024),
    Size(15876, 7168, 4096, 32, max_rows=1024),
    Size(8192, 7168, 512, 256, zipf=True),
    # The sizes that tokamax 0.0.17 brings its own timings of, on an H100.
    Size(131072, 7168, 1024, 256),
    Size(131072, 7168, 2048, 128),
    Size(131072, 1024, 7168, 256),
    Size(262144, 7168, 512, 256),
    Size(131072, 4096, 1536, 128),
    Size(8192, 4096, 14336, 8),
)


class Inputs:
    """The arrays of a case, on jax's device."""

    def __init__(self, size: Size, calls: int):
        import jax
        import jax.numpy as jnp

        self.size = size
        self._permuted: dict[int, Any] = {}
        self.expert = np.sort(size.expert_of_row())
        self.counts = np.bincount(self.expert, minlength=size.experts).astype(np.int32)
        if size.max_rows:
            self.counts = np.minimum(self.counts, size.max_rows)
        self.hit = int((self.counts > 0).sum())
        self.x = [
            jax.random.normal(jax.random.key(i), (size.rows, size.k), jnp.bfloat16)
            for i in range(calls)
        ]
        scale = jnp.bfloat16(size.k**-0.5)
        shape = (size.experts, size.k, size.n)
        self.w = jax.random.normal(jax.random.key(99), shape, jnp.bfloat16) * scale
        # Sampled rows of the first input, in the order of experts.
        starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        within = np.concatenate([np.arange(c) for c in self.counts])
        expert = np.repeat(np.arange(size.experts), self.counts)
        rng = np.random.default_rng(1)
        chosen = rng.choice(len(expert), min(_SAMPLED_ROWS, len(expert)), False)
        chosen[0] = len(expert) - 1
        self.sample = [
            (int(expert[c]), int(within[c]), int(starts[expert[c]] + within[c])) for c in chosen
        ]
        rows = np.asarray(self.x[0][np.array([r for _, _, r in self.sample])]).astype(np.float32)
        self.answers = np.empty((len(rows), size.n), np.float32)
        for expert in {e for e, _, _ in self.sample}:
            mine = [i for i, (e, _, _) in enumerate(self.sample) if e == expert]
            self.answers[mine] = rows[mine] @ np.asarray(self.w[expert]).astype(np.float32)

    def permuted(self, block: int) -> tuple[Any, np.ndarray, list[Any]]:
        """(Alignment, the aligned row of each row in the order of experts, x in aligned order)."""
        if block not in self._permuted:
            import jax.numpy as jnp

            aligned, row_of = _aligned(self, block)
            take = jnp.minimum(aligned.sorted_token_ids, self.size.rows - 1)
            self._permuted[block] = aligned, row_of, [x[take] for x in self.x]
        return self._permuted[block]

    @property
    def flops(self) -> int:
        return 2 * int(self.counts.sum()) * self.size.k * self.size.n

    @property
    def bytes(self) -> int:
        size = self.size
        return 2 * (self.hit * size.k * size.n + int(self.counts.sum()) * (size.k + size.n))

    def wrong(self, rows: np.ndarray) -> str:
        """Of the sampled rows, in order; "" where they are right."""
        found = np.asarray(rows).astype(np.float32)
        error = np.linalg.norm(found - self.answers) / np.linalg.norm(self.answers)
        return "" if error < _BOUND else f"relative error {error:.2e}"


# -- providers -------------------------------------------------------------------------------------


def _aligned(inputs: Inputs, block: int) -> tuple[Any, np.ndarray]:
    """The alignment, and the aligned row of each row in the order of experts."""
    import moe_align_jax as maj

    ids = inputs.expert[:, None]
    aligned = maj.moe_align_block_size(
        ids, block_size=block, num_experts=inputs.size.experts, return_inverse=True
    )
    return aligned, np.asarray(aligned.row_of_pair)


def ours_aligned(inputs: Inputs, block: int, config: Any = None) -> Iterator[Any]:
    """x permuted into aligned order beforehand."""
    import moe_align_jax as maj

    aligned, row_of, xs = inputs.permuted(block)

    def call(x, w):
        if config is None:
            return maj.grouped_matmul(x, w, aligned, block_size=block)
        return _with_config("blocks", inputs, config, block, x, w, aligned)

    yield call, xs, lambda out: out[np.array([row_of[r] for _, _, r in inputs.sample])]


def _with_config(
    rows: str, inputs: Inputs, config: Any, block: int, x: Any, w: Any, where: Any
) -> Any:
    from moe_align_jax._grouped_matmul import launch
    from moe_align_jax._grouped_matmul.problem import MatmulProblem

    size = inputs.size
    given: dict[str, Any] = {"k": size.k, "n": size.n, "num_experts": size.experts}
    given |= {"dtype": "bfloat16", "out_dtype": "bfloat16", "function": "benchmark", "rows": rows}
    if rows == "blocks":
        operands = (where.sorted_token_ids, where.expert_ids, where.num_tokens_post_padded)
        given |= {"num_rows": x.shape[0], "block_size": block, "zero_padding": False}
    elif rows == "masked":
        operands = (where,)
        given |= {"num_rows": size.experts * size.max_rows, "max_rows": size.max_rows}
        x = x.reshape(-1, size.k)
    else:
        operands = where
        given |= {"num_rows": x.shape[0], "num_groups": size.experts}
    return launch.run(MatmulProblem(**given), x, w, *operands, config=config)


def ours_ragged(inputs: Inputs, config: Any = None) -> Iterator[Any]:
    import jax.numpy as jnp

    import moe_align_jax as maj

    sizes = jnp.asarray(inputs.counts)

    def call(x, w):
        if config is None:
            return maj.ragged_dot(x, w, sizes)
        where = (sizes, jnp.zeros(1, jnp.int32))
        return _with_config("ragged", inputs, config, 0, x, w, where)

    yield call, inputs.x, lambda out: out[np.array([r for _, _, r in inputs.sample])]


def ours_masked(inputs: Inputs, config: Any = None) -> Iterator[Any]:
    import jax.numpy as jnp

    import moe_align_jax as maj

    size, counts = inputs.size, jnp.asarray(inputs.counts)
    starts = np.concatenate([[0], np.cumsum(inputs.counts)[:-1]])
    rows = np.minimum(starts[:, None] + np.arange(size.max_rows)[None], size.rows - 1)
    xs = [x[rows] for x in inputs.x]

    def call(x, w):
        if config is None:
            return maj.masked_grouped_matmul(x, w, counts)
        out = _with_config("masked", inputs, config, 0, x, w, counts)
        return out.reshape(size.experts, size.max_rows, size.n)

    experts, within = (np.array([s[i] for s in inputs.sample]) for i in (0, 1))
    yield call, xs, lambda out: out[experts, within]


def lax_ragged(inputs: Inputs) -> Iterator[Any]:
    import jax
    import jax.numpy as jnp

    sizes = jnp.asarray(inputs.counts)
    call = lambda x, w: jax.lax.ragged_dot(x, w, sizes)  # noqa: E731
    yield call, inputs.x, lambda out: out[np.array([r for _, _, r in inputs.sample])]


def jax_example(inputs: Inputs, config: tuple[int, int, int, int]) -> Iterator[Any]:
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    sizes = jnp.asarray(inputs.counts)
    block_m, block_n, steps, grid_block_n = config

    def call(x, w):
        return ragged_dot_mgpu.ragged_dot(
            x,
            w,
            group_sizes=sizes,
            block_m=block_m,
            block_n=block_n,
            block_k=64,
            max_concurrent_steps=steps,
            grid_block_n=grid_block_n,
        )

    yield call, inputs.x, lambda out: out[np.array([r for _, _, r in inputs.sample])]


def other_library(inputs: Inputs, product: Callable) -> Iterator[Any]:
    import jax.numpy as jnp

    sizes = jnp.asarray(inputs.counts)
    call = lambda x, w: product(x, w, sizes)  # noqa: E731
    yield call, inputs.x, lambda out: out[np.array([r for _, _, r in inputs.sample])]


def prepare_jax(
    inputs: Inputs, provider: Callable, executions: int, pool: concurrent.futures.Executor
) -> Callable[[], tuple[str, Any]]:
    """Lowers a provider, has it compiled by the pool, and gives what measures it."""
    import jax

    [(call, xs, sampled)] = provider(inputs)

    def program(many):  # the weights are an argument: a closure would make them a constant
        return [call(x, w) for x, w in many]

    given = [(x, inputs.w) for x in xs]
    made = pool.submit(jax.jit(program).lower(given).compile)

    def measure() -> tuple[str, Any]:
        compiled: Any = made.result()
        if wrong := inputs.wrong(sampled(compiled(given)[0])):
            return wrong, None
        return "", timing.time_jit_span(compiled, given, executions=executions)

    return measure


def measure_torch(inputs: Inputs, kind: str, replays: int) -> tuple[str, Any]:
    import torch

    from torch_bridge import to_torch

    xs, w = [to_torch(x) for x in inputs.x], to_torch(inputs.w)
    if kind == "dense":  # the same m, k and n, one matrix
        outs = [torch.empty(x.shape[0], w.shape[2], dtype=x.dtype, device=x.device) for x in xs]
        calls = [functools.partial(torch.mm, x, w[0], out=o) for x, o in zip(xs, outs, strict=True)]
        return "", timing.time_torch_graph(calls, replays=replays)
    ends = torch.cumsum(to_torch_counts(inputs), 0, dtype=torch.int32)
    first = torch._grouped_mm(xs[0], w, offs=ends)
    rows = torch.tensor([r for _, _, r in inputs.sample], device=first.device)
    if wrong := inputs.wrong(first[rows].float().cpu().numpy()):
        return wrong, None
    calls = [functools.partial(torch._grouped_mm, x, w, offs=ends) for x in xs]
    return "", timing.time_torch_graph(calls, replays=replays)


def measure_deep_gemm(inputs: Inputs, folder: str, replays: int) -> tuple[str, Any]:
    """DeepGEMM's masked kernel, or its contiguous one, whose blocks are of 128 rows; weights `[E, N, K]`."""
    import torch

    from torch_bridge import to_torch

    deep_gemm = deep_gemm_peer.load(folder)
    size, counts = inputs.size, inputs.counts
    weights = to_torch(inputs.w).transpose(1, 2).contiguous()
    if size.max_rows:
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        source = np.minimum(starts[:, None] + np.arange(size.max_rows)[None], size.rows - 1)
        shape = (size.experts, size.max_rows, size.n)
        more: tuple[Any, ...] = (to_torch_counts(inputs), max(1, size.rows // size.experts))
        multiply = deep_gemm.m_grouped_bf16_gemm_nt_masked
        where: Any = tuple(np.array([s[i] for s in inputs.sample]) for i in (0, 1))
    else:
        source, expert = deep_gemm_peer.contiguous_layout(counts)
        shape, more = (len(source), size.n), (torch.from_numpy(expert).cuda(),)
        multiply = deep_gemm.m_grouped_bf16_gemm_nt_contiguous
        where = np.flatnonzero(expert >= 0)[[r for _, _, r in inputs.sample]]
    xs = [to_torch(x[source]) for x in inputs.x]
    outs = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in xs]
    calls = [
        functools.partial(multiply, x, weights, o, *more) for x, o in zip(xs, outs, strict=True)
    ]
    calls[0]()
    if wrong := inputs.wrong(outs[0].float().cpu().numpy()[where]):
        return wrong, None
    return "", timing.time_torch_graph(calls, replays=replays)


def to_torch_counts(inputs: Inputs) -> Any:
    import torch

    return torch.from_numpy(inputs.counts).cuda()


# -- a case ----------------------------------------------------------------------------------------


def variants(size: Size) -> list[tuple[str, int, Any]]:
    """(kind, block, tiles): what a tuning table chooses from."""
    from moe_align_jax._grouped_matmul.config import Config

    mean, found = size.rows / size.experts, []
    kind = "masked" if size.max_rows else "blocks"
    if mean > 48:
        for group in (0, 4, 8) if size.n <= 512 else (4, 8):
            found.append((kind, 128, Config("m", 128, 256, 64, 4, group=group, late=True)))
    # Swapped tiles of many rows, with as many stages as fit: a mean expert and half a dozen rows more.
    most = (96, 144) if 100 < mean < 1000 else (176, 192) if mean >= 1000 else ()
    for bm, group in itertools.product(most, (0, 4, 8) if mean < 1000 else (8, 16)):
        tiles = Config("swap", bm, 256, 64, 4 if bm in (96, 144) else 3, group=group)
        found.append((kind, bm, tiles))
        if bm in (96, 144) and group:
            found.append((kind, bm, tiles._replace(late=True)))
        if kind == "blocks" and bm in (144, 192) and group in (4, 8):
            found.append(("ragged", 0, tiles))
    if 4 < mean < 100:
        found += [(kind, 64, Config("n", 64, 256, 64, 4, group=group)) for group in (0, 4)]
    if mean < 64:
        for bm in [b for b in (8, 16, 32, 40, 64) if mean / 2 < b < max(17, 4 * mean)]:
            stages = 5 if bm < 64 else 4
            found.append((kind, bm, Config("swap", bm, 128, 128, stages, group=0)))
    return found


Prepare = Callable[["Inputs", concurrent.futures.Executor], Callable[[], tuple[str, Any]]]


def providers(size: Size, options: argparse.Namespace) -> dict[str, Prepare]:
    """By name: (inputs, pool) to what measures, and tells what is wrong, and the timing."""

    def by_jax(provider: Callable, *given: Any) -> Prepare:
        bound = lambda inputs: provider(inputs, *given)  # noqa: E731
        return lambda inputs, pool: prepare_jax(inputs, bound, options.executions, pool)

    def by_torch(measure: Callable, *given: Any) -> Prepare:
        return lambda inputs, pool: functools.partial(measure, inputs, *given, options.replays)

    found: dict[str, Prepare] = {"torch.mm, dense": by_torch(measure_torch, "dense")}
    if size.max_rows:
        found["ours, masked"] = by_jax(ours_masked)
    else:
        found["torch._grouped_mm"] = by_torch(measure_torch, "grouped")
        for block in blocks_of(size):
            found[f"ours, blocks of {block}"] = by_jax(ours_aligned, block)
        found["ours, ragged_dot"] = by_jax(ours_ragged)
        if options.jax_example:
            for config in _JAX_CONFIGS:
                if size.n % (config[1] * config[3]) == 0:
                    found[f"jax ragged_dot_mgpu {config}"] = by_jax(jax_example, config)
        if options.libraries:
            wanted = training_peers.products("forward", size.rows, size.k, size.n, size.experts)
            for name, product in wanted:
                if not name.startswith("jax example"):
                    found[name] = by_jax(other_library, product)
        if options.lax:
            found["lax.ragged_dot"] = by_jax(lax_ragged)
    if options.deep_gemm:
        found["DeepGEMM"] = by_torch(measure_deep_gemm, options.deep_gemm)
    if options.variants:
        for kind, block, tiles in variants(size):
            name = f"ours, {'ragged, ' if kind == 'ragged' else ''}{tiles.name}"
            if kind == "blocks":
                found[name] = by_jax(ours_aligned, block, tiles)
            else:
                found[name] = by_jax(ours_masked if kind == "masked" else ours_ragged, tiles)
    return {k: v for k, v in found.items() if not options.only or options.only in k}


def blocks_of(size: Size) -> list[int]:
    """What the layer takes; a power of two, for which all libraries make alignments; two blocks of 144."""
    import moe_align_jax as maj

    mean = 1.5 * size.rows / size.experts
    power = next((b for b in (8, 16, 32, 64) if mean <= b), 128)
    own = maj.moe_block_size(size.rows, top_k=1, num_experts=size.experts)
    two = (144,) if 200 < size.rows / size.experts <= 270 else ()  # rows that 288 hold, as a rule
    return list(dict.fromkeys((own, *two, power)))


def run_case(size: Size, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Prepares everything, waits for its turn, and gives a row for each provider."""
    inputs, work = Inputs(size, options.calls), []
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for provider, prepare in providers(size, options).items():
            try:
                measure: Any = prepare(inputs, pool)
            except Exception as error:  # one that cannot be built leaves the others
                measure = error
            work.append((provider, measure))
    children.wait_for_turn()
    rate = timing.read_rate()
    names = [provider for provider, _ in work]

    def told(i: int, turn: timing.Timing) -> None:
        print(f"{size.name} {names[i]}: {turn.percentile(50):.1f} us", flush=True)

    measures = [functools.partial(_timing_of, measure) for _, measure in work]
    for i, found in timing.in_turns(measures, options.rounds, told=told):
        row = {"case": size.name, **size._asdict(), "provider": names[i]}
        row |= {"experts_hit": inputs.hit, "read_gbps": round(rate, 1)}
        row |= {"rows_in_use": int(inputs.counts.sum()), "rounds": options.rounds}
        if isinstance(found, Exception):
            yield row | failed(found)
        else:
            yield row | _figures(inputs, found, rate)


def _timing_of(measure: Any) -> timing.Timing:
    """What a measure of `Prepare` takes. Raises where its result is wrong, or if it is an error itself."""
    if isinstance(measure, Exception):
        raise measure
    wrong, taken = measure()
    if wrong:
        raise AssertionError(wrong)
    return taken


def _figures(inputs: Inputs, taken: timing.Timing, rate: float) -> dict[str, Any]:
    low, us, high = (round(taken.percentile(p), 2) for p in (20, 50, 80))
    row: dict[str, Any] = {"status": "ok", "metric": taken.metric, "us": us}
    row |= {"p20_us": low, "p80_us": high, "calls": taken.calls, "note": taken.note}
    row |= {"tflops": round(inputs.flops / us / 1e6, 1)}
    gbps = round(inputs.bytes / us / 1e3, 1)
    return row | {"gbps": gbps, "of_read": round(gbps / rate, 3)}


def line(row: dict[str, Any]) -> str:
    name = f"{row['case']:34} {row['provider']:36}"
    if "us" not in row:
        return f"{name} {row['status']}: {row['reason']}"
    return (
        f"{name} {row['us']:9.2f} us {row['tflops']:7.1f} TFLOP/s {row['gbps']:7.1f} GB/s "
        f"{row['of_read']:6.1%} of a read"
    )


def ratios(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Our time over the best grouped peer's, and over dense, per case."""
    for case in dict.fromkeys(row["case"] for row in rows):
        timed = {r["provider"]: r["us"] for r in rows if r["case"] == case and "us" in r}
        ours = {name: us for name, us in timed.items() if name.startswith("ours")}
        peers = {n: us for n, us in timed.items() if n not in ours and "dense" not in n}
        if not ours:
            continue
        name, us = min(ours.items(), key=lambda item: item[1])
        text = f"{case}: {name} {us:.1f} us"
        if peers:
            peer, theirs = min(peers.items(), key=lambda item: item[1])
            text += f", {us / theirs:.3f} of {peer} ({theirs:.1f})"
        if dense := timed.get("torch.mm, dense"):
            text += f", {us / dense:.3f} of dense ({dense:.1f})"
        yield text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", default="", help="numbers of the sizes to run, e.g. 0,1,4")
    parser.add_argument("--variants", action="store_true", help="also other tiles of the kernel")
    parser.add_argument("--jax-example", action="store_true", help="also jax's ragged_dot_mgpu")
    parser.add_argument("--deep-gemm", help="also DeepGEMM, out of this folder")
    parser.add_argument("--libraries", action="store_true", help="also tokamax and haliax")
    parser.add_argument("--lax", action="store_true", help="also jax.lax.ragged_dot: slow")
    parser.add_argument("--only", default="", help="providers whose name holds this")
    parser.add_argument("--calls", type=int, default=2, help="inputs, and calls in a program")
    parser.add_argument("--executions", type=int, default=12)
    parser.add_argument("--replays", type=int, default=12)
    parser.add_argument(
        "--rounds", type=int, default=1, help="times that each is measured, in turn"
    )
    case_processes.add_arguments(parser, patience=20, budget=600, together=6)
    options = parser.parse_args(argv)
    return case_processes.run(
        *("benchmarks.grouped_matmul", argv, options, SIZES, run_case, line, ratios),
        case_processes.chosen(options, SIZES),
    )


if __name__ == "__main__":
    sys.exit(main())
