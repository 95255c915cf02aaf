"""fused_moe in e4m3 beside vLLM's Triton layer in e4m3: the same weights, ids and routing weights.

python -m benchmarks.fp8_layer --peers .peers --out ROWS.jsonl

A layer begins with tokens in bfloat16 and contains their cast, the alignment, two grouped products with
scales of 128 x 128, the activation, the cast of what lies between, and the weighted sum. A measured step is
four layers with weights of their own. Ours is one jitted program, theirs one CUDA graph of what
`fused_experts` launches (benchmarks.vllm_moe_e4m3 says what stands in for what). Before a time is taken,
sampled tokens of the first and last layer are compared with float32 products of the dequantised operands,
by DeepGEMM's rule. Clocks are those of `benchmarks.moe_layer`.

DeepSeek-V3's experts, as one of 8 GPUs has them: with tensor parallelism all 256, an eighth as wide; with
expert parallelism 32 of 256, and an expert map that drops the pairs of the others.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

# Both frameworks share one GPU here; by default jax would take most of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks import case_processes, children, moe_layer, timing  # noqa: E402
from benchmarks.fp8_matmul import calc_diff  # noqa: E402
from benchmarks.moe_cases import LAYERS, Model, routing  # noqa: E402
from benchmarks.rows import statistics_of  # noqa: E402
from moe_align_jax._core.fp8 import E4M3_MAX, GROUP  # noqa: E402

_SAMPLED_TOKENS = 8
_BOUND = 1e-3  # of DeepGEMM's rule
_TOKENS = (1, 16, 128, 1024, 8192)


class Size(NamedTuple):
    """`of` experts, of which a token takes K, and of which the first E are here; H hidden, N within one."""

    name: str
    of: int
    top_k: int
    hidden: int
    ffn: int
    experts: int


SIZES = (
    Size("DeepSeek-V3 TP8", 256, 8, 7168, 256, 256),
    Size("DeepSeek-V3 EP8", 256, 8, 7168, 2048, 32),
)


def make_sets(size: Size) -> list[tuple[Any, Any]]:
    """`LAYERS` times ((w13, scales), (w2, scales)), on jax's device."""
    import jax
    import jax.numpy as jnp

    import moe_align_jax as maj

    def one(key, n, k):
        # Uniform bits are many times cheaper than normal values; the spread is that of 1 / sqrt(fan in).
        values = jax.random.uniform(key, (n, k), jnp.bfloat16, -1.0, 1.0)
        return maj.quantize_blockwise(values * jnp.bfloat16((3 / k) ** 0.5))

    @jax.jit
    def make(key):
        def expert(key):
            first, second = jax.random.split(key)
            return one(first, 2 * size.ffn, size.hidden), one(second, size.hidden, size.ffn)

        return jax.lax.map(expert, jax.random.split(key, size.experts))

    return [make(jax.random.key(i)) for i in range(LAYERS)]


def to_torch(pair: Any) -> Any:
    """(values, scales) of jax's, as torch's; DLPack knows no float8 in older releases of torch."""
    import jax
    import jax.numpy as jnp
    import torch

    from torch_bridge import to_torch as share

    values, scales = pair
    raw = jax.lax.bitcast_convert_type(values, jnp.uint8)
    return share(raw).view(torch.float8_e4m3fn), share(scales)


class Case:
    """The operands of one batch size, in both frameworks, and what sampled tokens should give."""

    def __init__(self, size: Size, tokens: int, sets: Sequence[Any], torch_sets: Sequence[Any]):
        import jax
        import jax.numpy as jnp
        import torch

        from torch_bridge import to_torch as share

        self.size, self.tokens, self.sets, self.torch_sets = size, tokens, sets, torch_sets
        every = Model(size.name, size.of, size.top_k, size.hidden, size.ffn)
        for seed in range(1000):  # some token has an expert here
            weights, ids = routing(every, tokens, seed)
            if (ids < size.experts).any():
                break
        self.hit = len(np.unique(ids[ids < size.experts]))
        self.x = jax.random.normal(jax.random.key(77), (tokens, size.hidden), jnp.bfloat16)
        self.weights, self.ids = jnp.asarray(weights), jnp.asarray(ids)
        self.expert_map = self.torch_map = None
        if size.of > size.experts:
            ids_of = np.arange(size.of, dtype=np.int32)
            self.expert_map = jnp.asarray(np.where(ids_of < size.experts, ids_of, -1))
            self.torch_map = share(self.expert_map)
        self.torch_x, self.torch_weights, self.torch_ids = map(
            share, (self.x, self.weights, self.ids)
        )
        rng = np.random.default_rng(1)
        self.sample = np.sort(rng.choice(tokens, min(_SAMPLED_TOKENS, tokens), False))
        self.rows = torch.from_numpy(self.sample).to(self.torch_x.device)
        self.answers = {i: self._answer(i, weights, ids) for i in (0, LAYERS - 1)}

    def _answer(self, layer: int, weights: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """float32 `[sampled, H]`, an expert of a token at a time."""
        import torch

        w13, w2 = self.torch_sets[layer]
        rows = []
        for t in self.sample:
            x = _rounded(self.torch_x[int(t)].float())
            total = torch.zeros(self.size.hidden, device=x.device)
            for k, expert in enumerate(ids[t].tolist()):
                if expert >= self.size.experts:
                    continue
                product = _wide(w13, expert) @ x
                gate, up = product[: self.size.ffn], product[self.size.ffn :]
                hidden = (torch.nn.functional.silu(gate) * up).bfloat16().float()
                total = total + float(weights[t, k]) * (_wide(w2, expert) @ _rounded(hidden))
            rows.append(total.cpu().numpy())
        return np.stack(rows)

    def wrong(self, rows_of: Callable[[int], np.ndarray]) -> str:
        """`rows_of(layer)`: the sampled rows of a layer's result. "" where they are right."""
        for layer, want in self.answers.items():
            difference = calc_diff(np.asarray(rows_of(layer)).astype(np.float32), want)
            if not difference < _BOUND:
                return f"layer {layer}: difference {difference:.2e}"
        return ""

    @property
    def bytes(self) -> int:
        """Of the weights of the experts hit, once, and of x and the result."""
        size = self.size
        return 3 * self.hit * size.hidden * size.ffn + 4 * self.tokens * size.hidden


def _wide(w: Any, expert: int) -> Any:
    """float32 `[N, K]` of an expert's weights."""
    values, scales = w[0][expert].float(), w[1][expert]
    scales = scales.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
    return values * scales[: values.shape[0], : values.shape[1]]


def _rounded(x: Any) -> Any:
    """A vector through e4m3 and back, with a scale for each 128 values."""
    import torch

    groups = x.reshape(-1, GROUP)
    scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-10) / E4M3_MAX
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).reshape(-1)


def step_of(case: Case) -> tuple[Callable, tuple]:
    """(`step(outs, *rest) -> outs`, rest): four layers, one after the other.

    Each has ids of its own, so that XLA cannot align once for all of them.
    """
    import jax

    import moe_align_jax as maj

    expert_map = case.expert_map

    def step(outs, x, weights, ids, sets):
        del outs  # donated: the results may stand where those of the step before stood
        found = []
        for (w13, w2), own in zip(sets, ids, strict=True):
            if found:  # the next layer waits for this one, as in a model
                x, found[-1] = jax.lax.optimization_barrier((x, found[-1]))
            q = maj.quantize_rowwise(x, amax_floor=1e-10, divide=True)
            given = (q, w13, w2, weights, own)
            found.append(maj.fused_moe(*given, transpose_rhs=True, expert_map=expert_map))
        return found

    return step, (case.x, case.weights, [case.ids] * LAYERS, list(case.sets))


def _ours(
    case: Case, program: Any, options: argparse.Namespace
) -> Iterator[dict[str, Any] | moe_layer.Wall]:
    import jax
    import jax.numpy as jnp

    _, rest = step_of(case)
    held = [[jnp.full_like(case.x, jnp.nan) for _ in range(LAYERS)]]

    def run():
        held[0] = program(held[0], *rest)
        return held[0]

    def wrong_now():
        return case.wrong(lambda layer: np.asarray(held[0][layer][case.sample]))

    jax.block_until_ready(run())
    if wrong := wrong_now():
        yield {"clock": "span", "way": "donated", "status": "failed", "reason": wrong}
        return
    samples, facts = moe_layer.spans(run, options.executions)
    row = statistics_of(samples)
    yield {"clock": "span", "way": "donated"} | row | facts
    wait = lambda: jax.block_until_ready(held[0])  # noqa: E731
    yield moe_layer.Wall("donated", run, wait, row["us"], wrong_now)


class _Theirs:
    """vLLM's layer of a case, its kernels compiled."""

    def __init__(self, case: Case, folder: str):
        import torch

        from benchmarks import vllm_moe, vllm_moe_e4m3

        self.case, size = case, case.size
        self.layer = vllm_moe_e4m3.Layer(
            *(folder, case.tokens, size.top_k, size.experts, size.hidden, size.ffn),
            expert_map=case.torch_map,
        )
        self.outs = [torch.full_like(case.torch_x, float("nan")) for _ in range(LAYERS)]
        given = (case.torch_x, case.torch_sets, case.torch_weights, case.torch_ids, self.outs)
        self.calls = vllm_moe.calls(self.layer, *given)
        self.calls[0]()

    def measure(self, options: argparse.Namespace) -> Iterator[dict[str, Any] | moe_layer.Wall]:
        import torch

        case, layer, outs = self.case, self.layer, self.outs
        graph = timing.capture_torch(self.calls)
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()

        def wrong_now():
            return case.wrong(lambda i: outs[i][case.rows].float().cpu().numpy())

        if wrong := wrong_now():
            yield {"clock": "span", "way": "graph", "status": "failed", "reason": wrong}
            return
        [taken] = timing.time_torch_graphs([(graph, LAYERS)], replays=options.replays)
        row = statistics_of(taken.samples_us)
        facts = {"config": layer.config, "config_from": layer.source, "aligned": layer.aligns}
        yield {"clock": "span", "way": "graph"} | row | facts
        wait = torch.cuda.synchronize
        yield moe_layer.Wall("graph", graph.replay, wait, row["us"], wrong_now)


def compiled(cases: Sequence[Case]) -> list[Any]:
    """A program per case, or the error that it ended with; compiled side by side."""
    import jax

    with ThreadPoolExecutor(8) as pool:
        waiting = []
        for case in cases:
            step, rest = step_of(case)
            outs = [jax.ShapeDtypeStruct(case.x.shape, case.x.dtype)] * LAYERS
            lowered = jax.jit(step, keep_unused=True, donate_argnums=0).lower(outs, *rest)
            waiting.append(pool.submit(lowered.compile))
        return [each.exception() or each.result() for each in waiting]


def run_case(size: Size, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compiles everything, waits for its turn, and gives rows as they come."""
    sets = make_sets(size)
    torch_sets = [tuple(map(to_torch, pair)) for pair in sets]
    cases = [Case(size, tokens, sets, torch_sets) for tokens in options.tokens]
    peers: list[Any] = []
    for case in cases:
        try:
            peers.append(_Theirs(case, options.peers))
        except Exception as error:  # one that cannot be built leaves the others
            peers.append(error)
    programs = compiled(cases)
    children.wait_for_turn()
    rate = timing.read_rate()
    for case, peer, program in zip(cases, peers, programs, strict=True):
        head = _head(case, rate) | {"status": "ok"}
        theirs = lambda p=peer: _built(p).measure(options)  # noqa: E731
        ours = lambda c=case, p=program: _ours(c, _built(p), options)  # noqa: E731
        mine = head | {"provider": "fused_moe"} | _form(case)
        yield from moe_layer.measured_in_turns(
            [(head | {"provider": "vllm"}, theirs), (mine, ours)]
        )


def _built(found: Any) -> Any:
    """What was built; raises the error that building ended with."""
    if isinstance(found, BaseException):
        raise found
    return found


def _head(case: Case, rate: float) -> dict[str, Any]:
    size = case.size
    head = {"model": size.name, "experts_here": size.experts, "of": size.of, "tokens": case.tokens}
    head |= {"top_k": size.top_k, "hidden": size.hidden, "ffn": size.ffn, "experts_hit": case.hit}
    floor_us = case.bytes / rate / 1e3
    return head | {"read_gbps": round(rate, 1), "floor_us": round(floor_us, 2)}


def _form(case: Case) -> dict[str, Any]:
    """What `fused_moe` says that it runs."""
    import moe_align_jax as maj

    size = case.size
    chosen = maj.select_moe_implementation(
        (case.tokens, size.hidden),
        (size.experts, size.hidden, size.ffn),
        top_k=size.top_k,
        dtype="float8_e4m3fn",
        transpose_rhs=True,
        num_global_experts=size.of if size.of > size.experts else None,
    )
    return {"form": chosen.form}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    numbers = lambda text: [int(t) for t in text.split(",")]  # noqa: E731
    parser.add_argument("--peers", default=".peers", help="folder of benchmarks.fetch")
    parser.add_argument("--sizes", default="", help="numbers of the sizes to run, e.g. 0,1")
    parser.add_argument("--tokens", type=numbers, default=list(_TOKENS), help="batch sizes")
    parser.add_argument("--executions", type=int, default=8, help="traced steps")
    parser.add_argument("--replays", type=int, default=20, help="timed replays of a graph")
    case_processes.add_arguments(parser, together=2, timeout="patience")
    options = parser.parse_args(argv)
    return case_processes.run(
        *("benchmarks.fp8_layer", argv, options, SIZES, run_case),
        *(moe_layer.line, moe_layer.ratios, case_processes.chosen(options, SIZES)),
    )


if __name__ == "__main__":
    sys.exit(main())
