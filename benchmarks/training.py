"""Gradients of grouped products, and a layer's forward and backward pass, beside those of other libraries.

python -m benchmarks.training --out ROWS.jsonl

Products: tokamax's own sizes for an H100. Every provider has the same rows, in the order of their experts,
which are drawn uniformly; bfloat16. Sampled values of each result are compared with NumPy's in float32 before
a time is taken. TFLOP/s count rows in use, not padding. Ours and jax's: device span of one call under jit;
torch's: one call in a CUDA graph. Providers take turns, forth and back: at the GPU's power limit whoever
comes later has a lower clock.

Layers: `jax.vjp` of the layer by x, the weights and topk_weights, and the result: device span under jit, and
what the compiled program allocates beside operands and results. Gradients are compared with the first
provider's. Ours also as the gradient of a loss. Providers are timed in turn, forth and back.

A provider that fails, or runs out of memory, is a row that says so. A child process takes each size.
"""

import argparse
import concurrent.futures
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

# Both frameworks share one GPU here; by default jax would take most of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks import case_processes, children, timing, training_peers  # noqa: E402
from benchmarks.rows import failed  # noqa: E402

_BOUND, _LAYER_BOUND = 1e-2, 3e-2
# Of "forward and backward" the cotangent is an operand, so that XLA may begin the backward pass before the
# result is complete, and keep more at once. A loss' cotangent comes after the result.
_OF_A_LOSS = "value and gradient of a loss"
_TOP_K = 8  # of the tokens whose rows these are
_SAMPLED = 24


class Product(NamedTuple):
    """`kind` of `rows` rows of k values times `[experts, k, n]`; see `training_peers.products`.

    Attributes:
        routing: "uniform"; "zipf": expert i is chosen in proportion to 1 / (i + 1); "one": expert 0 has all.
        block: rows per block of ours, where rows lie in blocks.
    """

    kind: str
    rows: int
    k: int
    n: int
    experts: int
    routing: str = "uniform"
    block: int = 128

    @property
    def name(self) -> str:
        more = "" if self.routing == "uniform" else f", {self.routing}"
        return f"{self.kind} {self.rows}: {self.k}x{self.n}, {self.experts} experts{more}"

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.k * self.n


class Layer(NamedTuple):
    """A layer of a model: T tokens, K experts of E for each, H hidden, N within an expert."""

    model: str
    tokens: int
    top_k: int
    experts: int
    hidden: int
    ffn: int

    @property
    def name(self) -> str:
        return f"layer {self.model}, T {self.tokens}"

    @property
    def flops(self) -> int:
        """Forward and backward: three products' worth of each of three matrices."""
        return 18 * self.tokens * self.top_k * self.hidden * self.ffn


# Blocks of 128 rows, but for the sizes where another one was measured to be faster (one H200, 2026-11-29; in
# TFLOP/s). Experts of 1024 rows fill six blocks of 176 (1056 rows) as a rule: 749 in place of 729 with 128
# experts and 1536 columns, 756 in place of 730 with 2048 columns, 778 in place of 747 with 8 experts. Experts
# of 512 rows fill three blocks of 184 (552 rows) as a rule, and five of 128 as often as four: 714 in place of
# 664, of the input's gradient 707 in place of 663. Since listed tiles are dealt out, three of 192 are faster:
# 769 beside 767, of the gradient 761 beside 752 (2026-11-30). Since tiles of several heights find themselves,
# blocks of 144 are faster where K is shorter: from 1024 to 7168 columns 717 beside 687 of 184 and 657 of 128,
# from 4096 to 1536 772 beside 749 of 176, and from 1536 to 4096, the other's input gradient in another
# layout, 767 beside 742 of 128.
SIZES: tuple[Product | Layer, ...] = (
    Product("weight gradient", 131072, 7168, 1024, 256),
    Product("weight gradient", 262144, 4096, 1536, 128),
    Product("input gradient", 131072, 1024, 7168, 256, block=192),
    Product("input gradient", 262144, 4096, 1536, 128, block=144),
    Product("forward", 131072, 7168, 2048, 128, block=176),
    Product("forward", 131072, 7168, 1024, 256, block=192),
    Product("forward", 131072, 1024, 7168, 256, block=144),
    Product("forward", 131072, 4096, 1536, 128, block=144),
    Product("forward", 8192, 4096, 14336, 8, block=176),
    Product("weight gradient", 131072, 7168, 1024, 256, "zipf"),
    Product("weight gradient", 262144, 4096, 1536, 128, "zipf"),
    Layer("Qwen3-30B-A3B", 8192, 8, 128, 2048, 768),
    Layer("Mixtral 8x7B", 8192, 2, 8, 4096, 14336),
    Layer("SonicMoE", 32768, 8, 128, 4096, 512),
    Product("weight gradient", 65536, 2048, 1536, 128),
    Product("weight gradient", 65536, 768, 2048, 128),
    Product("input gradient", 131072, 1024, 7168, 256, "zipf"),
    Product("forward", 131072, 7168, 1024, 256, "zipf"),
    Product("weight gradient", 65536, 2048, 1536, 128, "zipf"),
    Product("weight gradient", 65536, 768, 2048, 128, "zipf"),
    Product("weight gradient", 65536, 2048, 1536, 128, "one"),
    Product("weight gradient", 65536, 768, 2048, 128, "one"),
    Product("weight gradient", 16384, 4096, 28672, 8),
    Product("weight gradient", 16384, 14336, 4096, 8),
)


class Work(NamedTuple):
    """A provider's call under jit, its arrays, and how sampled values are read from its result."""

    call: Callable[..., Any]
    arrays: tuple[Any, ...]
    sampled: Callable[[Any], np.ndarray]


class Inputs:
    """The arrays of a product: tokens of which each has `_TOP_K` pairs, and rows in the order of experts.

    Attributes:
        tokens: `[rows / 8, k]`, and x: `[rows, k]` in the order of experts; not of an input gradient.
        toward: `[rows, n]` in that order; not of a forward product.
        w: `[experts, k, n]`; not of a weight gradient.
    """

    def __init__(self, size: Product):
        import jax
        import jax.numpy as jnp

        self.size = size
        rng = np.random.default_rng(0)
        first = np.arange(size.experts) == 0
        share = {
            "uniform": np.ones(size.experts),
            "zipf": 1 / np.arange(1, size.experts + 1),
            "one": first.astype(np.float64),
        }[size.routing]
        expert = rng.choice(size.experts, size.rows, p=share / share.sum()).astype(np.int32)
        self.expert_of_pair = expert
        self.order = np.argsort(expert, kind="stable").astype(np.int32)
        self.counts = np.bincount(expert, minlength=size.experts).astype(np.int32)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.sizes = jnp.asarray(self.counts)
        keys = jax.random.split(jax.random.key(0), 3)
        contracted = size.n if size.kind == "input gradient" else size.k

        @functools.partial(jax.jit, static_argnums=(1, 2))
        def normal(key: Any, shape: tuple[int, ...], scale: float = 1.0) -> Any:
            return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(scale)

        # Several sizes may be in the GPU's memory at once: what a kind does not read is not made.
        if size.kind != "input gradient":
            self.tokens = normal(keys[0], (size.rows // _TOP_K, size.k))
            self.x = self.tokens[self.order // _TOP_K]
        if size.kind != "forward":
            self.toward = normal(keys[1], (size.rows, size.n))
        if size.kind != "weight gradient":
            self.w = normal(keys[2], (size.experts, size.k, size.n), contracted**-0.5)
        self._sample(np.random.default_rng(1))

    def _sample(self, rng: np.random.Generator) -> None:
        size, left, right = self.size, *self.operands
        if size.kind == "weight gradient":
            experts = {0, int(np.argmax(self.counts)), int(np.argmin(self.counts))}
            self.experts = sorted(experts | {size.experts - 1})
            self.columns = np.sort(rng.choice(size.k, 16, False))
            answers = []
            for expert in self.experts:
                mine = slice(int(self.starts[expert]), int(self.starts[expert + 1]))
                rows = np.asarray(left[mine][:, self.columns]).astype(np.float32)
                answers.append(rows.T @ np.asarray(right[mine]).astype(np.float32))
            self.answers = np.stack(answers)
            return
        self.rows = np.sort(rng.choice(size.rows, _SAMPLED, False))
        values = np.asarray(left[self.rows]).astype(np.float32)
        experts_of = np.searchsorted(self.starts, self.rows, side="right") - 1
        answers = []
        for row, expert in zip(values, experts_of, strict=True):
            matrix = np.asarray(right[int(expert)]).astype(np.float32)
            answers.append(row @ (matrix.T if size.kind == "input gradient" else matrix))
        self.answers = np.stack(answers)

    @property
    def operands(self) -> tuple[Any, Any]:
        """In the order of `training_peers.products`."""
        if self.size.kind == "weight gradient":
            return self.x, self.toward
        return (self.x if self.size.kind == "forward" else self.toward), self.w

    def sampled(self, out: Any, row_of: np.ndarray | None = None) -> np.ndarray:
        """Of a result in the order of experts, or whose row i of that order is `row_of[i]`."""
        if self.size.kind == "weight gradient":
            return np.stack([np.asarray(out[e][self.columns]) for e in self.experts])
        rows = self.rows if row_of is None else row_of[self.rows]
        return np.asarray(out[rows])

    def wrong(self, found: np.ndarray) -> str:
        """ "" where sampled values are right."""
        found = np.asarray(found).astype(np.float32)
        error = np.linalg.norm(found - self.answers) / np.linalg.norm(self.answers)
        return "" if error < _BOUND else f"relative error {error:.2e}"


# -- ours ----------------------------------------------------------------------------------------------


def _problem(size: Product, rows: str, num_rows: int, gathered: bool) -> Any:
    from moe_align_jax._grouped_matmul.problem import MatmulProblem, Weights

    flipped = size.kind == "input gradient"
    k, n = (size.n, size.k) if flipped else (size.k, size.n)
    more: dict[str, Any] = {"num_groups": size.experts}
    if rows == "blocks":
        more = {"block_size": size.block, "zero_padding": False}
        more |= {"num_pairs": size.rows, "consecutive": True}
    if gathered:
        more |= {"num_tokens": size.rows // _TOP_K, "top_k": _TOP_K}
    given = ("benchmark", rows, num_rows, k, n, size.experts, "bfloat16", "bfloat16")
    return MatmulProblem(*given, weights=Weights(transposed=flipped), **more)


def variants(size: Product) -> list[Any]:
    """Tiles of our kernels; None for the usual ones."""
    from moe_align_jax._grouped_matmul.config import Config
    from moe_align_jax._grouped_matmul.weight_gradient_tiles import Tiles

    if size.kind == "weight gradient":
        usual = Tiles(short=True)
        more: list[dict[str, Any]] = [{"late": False}, {"lag": 1}, {"back": True}]
        more += [{"group": 8}, {"group": 16}, {"short": False}, {"level": True}]
        return [None, *(usual._replace(**each) for each in more)]
    late = Config("m", 128, 256, 64, 4, late=True)
    return [None, late._replace(late=False, group=8), *(late._replace(group=g) for g in (4, 8, 16))]


def ours(inputs: Inputs, many: bool) -> Iterator[tuple[str, Work]]:
    """Our kernels: rows aligned to the size's blocks; gathered by the kernel; groups that begin anywhere."""
    import jax.numpy as jnp

    import moe_align_jax as maj
    from moe_align_jax._grouped_matmul import (
        launch,
        reference,
        weight_gradient_kernel,
        weight_gradient_tiles,
    )
    from moe_align_jax._grouped_matmul.problem import WeightGradient

    size = inputs.size
    aligned = maj.moe_align_block_size(
        inputs.expert_of_pair.reshape(-1, _TOP_K),
        block_size=size.block,
        num_experts=size.experts,
        return_inverse=True,
    )
    where = aligned[:3]
    row_of = np.asarray(aligned.row_of_pair)[inputs.order]
    rows = aligned.sorted_token_ids.shape[0]
    rank = np.zeros(size.rows, np.int32)
    rank[inputs.order] = np.arange(size.rows, dtype=np.int32)
    take = jnp.minimum(aligned.sorted_token_ids, size.rows - 1)
    gradient = size.kind == "weight gradient"
    left, right = inputs.operands
    in_blocks = left[jnp.asarray(rank)[take]]
    if gradient:
        right = right[jnp.asarray(rank)[take]]

    def named(tiles: Any) -> str:
        return "" if tiles is None else f", {tiles.name}{_lag(tiles)}"

    def work(layout: Any, gathers: str | None, tiles: Any, arrays: tuple[Any, ...]) -> Work:
        if gradient:
            problem: Any = WeightGradient(layout, gathers)
            call = functools.partial(weight_gradient_kernel.run, problem, tiles=tiles)
        else:
            call = functools.partial(launch.run, layout, config=tiles)
        mine = row_of if layout.rows == "blocks" else None
        return Work(call, arrays, lambda out: inputs.sampled(out, mine))

    choices = variants(size) if many else [None]
    layout = _problem(size, "blocks", rows, False)
    for tiles in choices:
        yield f"ours, blocks{named(tiles)}", work(layout, None, tiles, (in_blocks, right, *where))
    if gradient:
        cut = weight_gradient_tiles.cutting(WeightGradient(layout))
        if cut.pieces:
            made = work(layout, None, cut, (in_blocks, right, *where))
            yield "ours, blocks, hot experts cut", made
    if size.kind != "input gradient":  # there each pair has a row of its own
        for tiles in choices if gradient else [None]:
            if tiles is None or tiles.late:
                args = (inputs.tokens, right, *where)
                made = work(_problem(size, "blocks", rows, True), "lhs", tiles, args)
                yield f"ours, gathered{named(tiles)}", made
    groups = (inputs.sizes, jnp.zeros(1, jnp.int32))
    layout = _problem(size, "ragged", size.rows, False)
    for tiles in choices:
        if tiles is None or tiles.late:
            made = work(layout, None, tiles, (*inputs.operands, *groups))
            yield f"ours, ragged{named(tiles)}", made
    if gradient:  # what runs where no kernel is named
        problem = WeightGradient(_problem(size, "blocks", rows, False))
        call = functools.partial(reference.weight_gradient, problem)
        yield "ours, xla", Work(call, (in_blocks, right, *where), inputs.sampled)


def _lag(tiles: Any) -> str:
    return f", lag {tiles.lag}" if tiles.lag != 2 else ""


# -- a product -----------------------------------------------------------------------------------------


def by_jax(inputs: Inputs, options: argparse.Namespace) -> Iterator[tuple[str, Work]]:
    size = inputs.size
    yield from ours(inputs, options.variants)
    if not options.peers:
        return
    arrays = (*inputs.operands, inputs.sizes)
    for name, call in training_peers.products(size.kind, *size[1:5]):
        yield name, Work(call, arrays, inputs.sampled)


def compiled(wanted: Sequence[tuple[Callable[..., Any], Any]], threads: int) -> list[Any]:
    """Programs of (call, its arrays), or the errors that they ended with; compiled side by side.

    A program takes a list of arrays, one entry for each call that it makes, as `timing` has it.
    """
    import jax

    def lower(call: Callable[..., Any], arrays: Any) -> Any:
        return jax.jit(lambda many: [call(*each) for each in many]).lower([arrays])

    found: list[Any] = []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for call, arrays in wanted:
            try:
                found.append(pool.submit(lower(call, arrays).compile))
            except Exception as error:  # one that cannot be built leaves the others
                found.append(error)
        done = [f if isinstance(f, Exception) else f.exception() or f.result() for f in found]
    return done


def torch_calls(inputs: Inputs) -> Iterator[tuple[str, Callable[[], tuple[str, Any]]]]:
    """torch's grouped product, and a dense one of the same m, k and n.

    Each is a name, and what gives "" and a measure of so many replays, or says what is wrong.
    """
    size = inputs.size

    def operands() -> tuple[Any, Any]:
        from torch_bridge import to_torch

        left, right = map(to_torch, inputs.operands)
        if size.kind == "weight gradient":
            return left.t(), right
        return left, right.transpose(1, 2) if size.kind == "input gradient" else right

    def replayed(call: Callable[[], Any]) -> Callable[[int], timing.Timing]:
        graph = timing.capture_torch([call])
        return lambda replays: timing.time_torch_graphs([(graph, 1)], replays=replays)[0]

    def dense() -> tuple[str, Any]:
        import torch

        left, right = operands()
        other = right if size.kind == "weight gradient" else right[0]
        out = torch.empty(left.shape[0], other.shape[1], dtype=left.dtype, device=left.device)
        return "", replayed(functools.partial(torch.mm, left, other, out=out))

    def grouped() -> tuple[str, Any]:
        import torch

        left, right = operands()
        ends = torch.from_numpy(np.cumsum(inputs.counts, dtype=np.int32)).to(left.device)
        out = torch._grouped_mm(left, right, offs=ends)
        if size.kind == "weight gradient":
            found = np.stack([out[e][inputs.columns].float().cpu().numpy() for e in inputs.experts])
        else:
            found = out[torch.from_numpy(inputs.rows).to(left.device)].float().cpu().numpy()
        if wrong := inputs.wrong(found):
            return wrong, None
        return "", replayed(functools.partial(torch._grouped_mm, left, right, offs=ends))

    yield "torch.mm, dense", dense
    yield "torch._grouped_mm", grouped


def run_product(size: Product, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    inputs = Inputs(size)
    work = [(n, w) for n, w in by_jax(inputs, options) if re.search(options.only, n)]
    programs = compiled([(w.call, w.arrays) for _, w in work], options.threads)
    turn_of = {n: -(-n // options.rounds) for n in (options.executions, options.replays)}

    def by_span(program: Any, each: Work) -> tuple[str, Any]:
        if isinstance(program, BaseException):
            raise program
        if wrong := inputs.wrong(each.sampled(program([each.arrays])[0])):
            return wrong, None
        span = functools.partial(timing.time_jit_span, program, [each.arrays])
        return "", functools.partial(span, executions=turn_of[options.executions])

    def in_graph(make: Callable[[], tuple[str, Any]]) -> tuple[str, Any]:
        wrong, replayed = make()
        return wrong, replayed and functools.partial(replayed, turn_of[options.replays])

    def row_of(name: str, take: Callable[[], Any]) -> dict[str, Any]:
        row = {"case": size.name, **size._asdict(), "provider": name}
        return _measured(row, take, size.flops)

    right: list[tuple[str, Callable[[], timing.Timing]]] = []

    def rows_of_wrong(makers: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
        """Those that are right are in `right` then."""
        for name, make in makers:
            try:
                wrong, measure = make()
            except Exception as error:  # one provider's failure leaves the others their time
                yield row_of(name, functools.partial(_raise, error))
                continue
            if wrong:
                yield row_of(name, lambda wrong=wrong: (wrong, None))
            else:
                right.append((name, measure))

    made = zip(work, programs, strict=True)
    yield from rows_of_wrong((w[0], functools.partial(by_span, p, w[1])) for w, p in made)
    children.wait_for_turn()
    if options.peers:
        by_torch = torch_calls(inputs)
        yield from rows_of_wrong((name, functools.partial(in_graph, m)) for name, m in by_torch)
    for index, found in timing.in_turns([measure for _, measure in right], options.rounds):
        failed = isinstance(found, Exception)
        take = functools.partial(_raise, found) if failed else lambda found=found: ("", found)
        yield row_of(right[index][0], take)


def _raise(error: Exception) -> Any:
    raise error


def _measured(row: dict[str, Any], take: Callable[[], Any], flops: int) -> dict[str, Any]:
    try:
        wrong, taken = take()
    except Exception as error:  # one provider's failure leaves the others their time
        return row | failed(error)
    if taken is None:
        return row | {"status": "failed", "reason": wrong}
    us = taken.percentile(50)
    row |= {"status": "ok", "metric": taken.metric, "us": round(us, 2)}
    row |= {f"p{p}_us": round(taken.percentile(p), 2) for p in (20, 80)}
    return row | {"tflops": round(flops / us / 1e6, 1), "note": taken.note}


# -- a layer -------------------------------------------------------------------------------------------


def layer_arrays(size: Layer) -> tuple[Any, ...]:
    """(x, gate_up, down, topk_weights, ids, the result's cotangent)."""
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    order = np.argsort(rng.random((size.tokens, size.experts)), axis=1)
    ids = order[:, : size.top_k].astype(np.int32)
    weights = rng.uniform(0.2, 1.0, ids.shape).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4)
    bf16, experts = jnp.bfloat16, size.experts
    x = jax.random.normal(keys[0], (size.tokens, size.hidden), bf16)
    shape = (experts, size.hidden, 2 * size.ffn)
    gate_up = jax.random.normal(keys[1], shape, bf16) * bf16(size.hidden**-0.5)
    down = jax.random.normal(keys[2], (experts, size.ffn, size.hidden), bf16)
    down = down * bf16(size.ffn**-0.5)
    toward = jax.random.normal(keys[3], x.shape, bf16)
    weights = jnp.asarray(weights / weights.sum(1, keepdims=True))
    return x, gate_up, down, weights, jnp.asarray(ids), toward


def across_the_activation() -> Callable[..., Any]:
    """Our layer with the product that ends in the derivative of the activation, which is not the default."""
    import jax

    import moe_align_jax as maj
    from moe_align_jax._grouped_matmul import activation_gradient

    activation_gradient.enabled = True
    jax.clear_caches()  # they may hold the layer as it was traced without
    return functools.partial(maj.fused_moe, implementation="mosaic_gpu")


def layer_providers(size: Layer) -> Iterator[tuple[str, Callable[[], Callable[..., Any]]]]:
    import moe_align_jax as maj

    def named(implementation: Any) -> Callable[..., Any]:
        return functools.partial(maj.fused_moe, implementation=implementation)

    yield "ours, mosaic_gpu named", lambda: named("mosaic_gpu")
    yield "ours, default", lambda: named(None)
    yield "ours, activation gradient", across_the_activation
    yield from training_peers.layers(size.tokens, size.hidden, size.ffn, size.experts, size.top_k)


def run_layer(size: Layer, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    arrays = layer_arrays(size)

    def call_of(make: Callable[[], Callable[..., Any]], passes: str) -> Callable[..., Any]:
        def call(x, gate_up, down, weights, ids, toward):
            run = make()
            if passes == "forward":
                return run(x, gate_up, down, weights, ids)
            given = (x, gate_up, down, weights)
            if passes == _OF_A_LOSS:

                def loss(*floats):
                    return jnp.mean(jnp.square(run(*floats, ids).astype(jnp.float32)))

                return jax.value_and_grad(loss, (0, 1, 2, 3))(*given)
            y, pull = jax.vjp(lambda *floats: run(*floats, ids), *given)
            return y, *pull(toward)

        return call

    wanted = [
        (name, call_of(make, passes), passes)
        for name, make in layer_providers(size)
        for passes in ("forward", "forward and backward", _OF_A_LOSS)
        if re.search(options.passes, passes)
        if (options.peers or name.startswith("ours")) and re.search(options.only, name)
        if passes != _OF_A_LOSS or name == "ours, default"
    ]
    # XLA tries variants of what it compiles on the GPU: those of `lax.ragged_dot` want tens of GiB, alone.
    side_by_side = [not name.startswith("lax.") for name, _, _ in wanted]
    rest = [(call, arrays) for (_, call, _), many in zip(wanted, side_by_side, strict=True) if many]
    made = iter(compiled(rest, options.threads))
    programs = [next(made) if many else None for many in side_by_side]
    children.wait_for_turn()
    yield from _run_layer(size, options, arrays, wanted, programs)


def _run_layer(
    size: Layer,
    options: argparse.Namespace,
    arrays: tuple[Any, ...],
    wanted: list[tuple[str, Callable[..., Any], str]],
    programs: list[Any],
) -> Iterator[dict[str, Any]]:
    """The rows of `run_layer`; a program that is None is compiled when its turn comes, behind all others."""
    import jax

    first: list[np.ndarray] = []

    def check(program: Any, row: dict[str, Any]) -> str:
        if isinstance(program, BaseException):
            raise program
        memory = program.memory_analysis()
        row["temp_mib"] = round(memory.temp_size_in_bytes / 2**20)
        [found] = jax.block_until_ready(program([arrays]))
        if row["passes"] != "forward and backward":
            return ""
        some = [np.asarray(g.reshape(-1)[:: max(1, g.size // 4096)], np.float32) for g in found]
        first.extend([] if first else some)
        errors = [
            float(np.linalg.norm(a - b) / np.linalg.norm(b))
            for a, b in zip(some, first, strict=True)
        ]
        row["errors"] = [round(e, 5) for e in errors]
        if max(errors) < _LAYER_BOUND:
            return ""
        return f"relative errors {row['errors']} against the first provider"

    def rows_of(chosen: list[tuple[Any, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        """Checks all, then times those that are right, in turns."""
        right = []
        for program, row in chosen:
            flops = size.flops if row["passes"] != "forward" else size.flops // 3
            try:
                wrong = check(program, row)
            except Exception as error:  # one provider's failure leaves the others their time
                yield _measured(row, functools.partial(_raise, error), flops)
                continue
            if wrong:
                yield _measured(row, lambda wrong=wrong: (wrong, None), flops)
            else:
                right.append((program, row, flops))
        taken = timing.time_jit_spans_in_turns(
            [program for program, *_ in right],
            [[arrays]] * len(right),
            executions=options.executions,
            rounds=options.rounds,
        )
        for (_, row, flops), found in zip(right, taken, strict=True):
            failed = isinstance(found, Exception)
            take = functools.partial(_raise, found) if failed else lambda found=found: ("", found)
            yield _measured(row, take, flops)

    rows = [
        {"case": size.name, **size._asdict(), "provider": name, "passes": passes}
        for name, _, passes in wanted
    ]
    made = zip(programs, rows, strict=True)
    yield from rows_of([(program, row) for program, row in made if program is not None])
    for (_, call, _), program, row in zip(wanted, programs, rows, strict=True):
        if program is not None:
            continue
        try:
            if reason := too_large(call, arrays, row):
                yield row | {"status": "failed", "reason": reason}
                continue
        except Exception as error:  # one provider's failure leaves the others their time
            yield _measured(row, functools.partial(_raise, error), 0)
            continue
        [program] = compiled([(call, arrays)], 1)
        yield from rows_of([(program, row)])


def _memory_limit() -> int | None:
    """Bytes that jax may have of the device; None where it does not say."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def too_large(call: Callable[..., Any], arrays: Any, row: dict[str, Any]) -> str:
    """Why a program does not fit into the device's memory, or ""; the row has what it wants then.

    XLA plans its memory without trying variants, each of which would want as much: then nothing is allocated.
    """
    import jax

    limit = _memory_limit()
    if limit is None:
        return ""
    lowered = jax.jit(lambda many: [call(*each) for each in many]).lower([arrays])
    memory = lowered.compile(compiler_options={"xla_gpu_autotune_level": "0"}).memory_analysis()
    assert memory is not None
    size = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    if size <= limit:
        return ""
    row["temp_mib"] = round(memory.temp_size_in_bytes / 2**20)
    return f"out of memory: {size / 2**30:.1f} GiB are wanted of {limit / 2**30:.1f}"


# -- all -----------------------------------------------------------------------------------------------


def run_case(size: Product | Layer, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    return run_layer(size, options) if isinstance(size, Layer) else run_product(size, options)


def line(row: dict[str, Any]) -> str:
    name = f"{row['case']:46} {row['provider']:42} {row.get('passes', '')}"
    beside = f" {row['temp_mib']} MiB beside" if "temp_mib" in row else ""
    if "us" not in row:
        return f"{name} {row['status']}: {row['reason']}{beside and ','}{beside}"
    return f"{name} {row['us']:10.1f} us {row['tflops']:7.1f} TFLOP/s{beside}"


def ratios(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The best peer's time over ours, and ours over dense, per case."""
    for case in dict.fromkeys((row["case"], row.get("passes", "")) for row in rows):
        timed = {
            r["provider"]: r["us"]
            for r in rows
            if (r["case"], r.get("passes", "")) == case and "us" in r
        }
        mine = {name: us for name, us in timed.items() if name.startswith("ours")}
        peers = {n: us for n, us in timed.items() if n not in mine and "dense" not in n}
        if not mine:
            continue
        name, us = min(mine.items(), key=lambda item: item[1])
        text = f"{' '.join(case).strip()}: {name} {us:.1f} us"
        for peer, theirs in sorted(peers.items(), key=lambda item: item[1])[:3]:
            text += f"; {theirs / us:.2f}x of {peer} ({theirs:.1f})"
        if dense := timed.get("torch.mm, dense"):
            text += f"; {dense / us:.2f} of dense ({dense:.1f})"
        yield text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", default="", help="numbers of the sizes to run, e.g. 0,1,4")
    parser.add_argument("--variants", action="store_true", help="also other tiles of our kernels")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="ours alone")
    parser.add_argument("--only", default="", help="regular expression of the providers' names")
    parser.add_argument("--passes", default="", help="regular expression of a layer's passes")
    parser.add_argument("--executions", type=int, default=8)
    parser.add_argument("--replays", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2, help="of providers, forth and back")
    parser.add_argument("--threads", type=int, default=8, help="that compile")
    case_processes.add_arguments(parser, patience=120)
    options = parser.parse_args(argv)
    return case_processes.run(
        *("benchmarks.training", argv, options, SIZES, run_case, line, ratios),
        case_processes.chosen(options, SIZES),
    )


if __name__ == "__main__":
    sys.exit(main())
