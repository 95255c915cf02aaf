"""The router, and the router with the alignment, beside SGLang's Triton router and vLLM's compiled ops.

python -m benchmarks.fetch vllm sglang_router
python -m benchmarks.router --sglang-router .peers/sgl_router.py --vllm .peers/vllm_moe.so --out router.jsonl

Every provider runs over the same logits: ours as calls inside one jit (device span; XLA puts them into a CUDA
graph), the peers' in one CUDA graph, and so with `--torch` ours by torch_bridge. Before a time is taken, ids
are compared with NumPy's, which must be the same where scores differ by more than rounding, and weights
to 1e-5.
"""

import argparse
import functools
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

# Both frameworks share one GPU here; by default jax would take most of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks import cases, machine, timing  # noqa: E402
from benchmarks.rows import Writer, reason_of  # noqa: E402

_ROUNDING = 3e-6


class Size(NamedTuple):
    """T tokens, E experts, K of them chosen; the options of `route_topk`.

    Attributes:
        kind: "softmax", renormalised; "sigmoid", with a bias; or "grouped", as DeepSeek-V3 routes.
        block_size: with the alignment behind the router; 0 for the router alone.
    """

    tokens: int
    experts: int
    top_k: int = 8
    kind: str = "softmax"
    dtype: str = "float32"
    block_size: int = 0

    @property
    def name(self) -> str:
        aligned = f", aligned to {self.block_size}" if self.block_size else ""
        return f"{self.tokens}x{self.experts}, top-{self.top_k}, {self.kind}, {self.dtype}{aligned}"

    @property
    def options(self) -> dict[str, Any]:
        if self.kind == "softmax":
            return {"renormalize": True}
        groups = {"num_groups": 8, "topk_groups": 4} if self.kind == "grouped" else {}
        return {"scoring": "sigmoid", "renormalize": True, "scaling_factor": 2.5, **groups}

    @property
    def biased(self) -> bool:
        return self.kind != "softmax"


SIZES = (
    *(Size(t, e, min(8, e)) for e in (8, 64, 128, 256, 512) for t in (1, 8, 64, 512, 8192, 16384)),
    *(Size(t, 256, dtype="bfloat16") for t in (1, 64, 8192)),
    *(Size(t, 256, kind=kind) for kind in ("sigmoid", "grouped") for t in (1, 64, 8192)),
    *(Size(t, 256, block_size=16) for t in (1, 4, 8, 16, 32, 64)),
)


# -- right -------------------------------------------------------------------------------------------


def choices(size: Size, logits: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(what each expert is chosen by, -inf where it cannot be; its score), in float64."""
    x = logits.astype(np.float64)
    if size.kind == "softmax":
        powers = np.exp(x - x.max(axis=1, keepdims=True))
        scores = powers / powers.sum(axis=1, keepdims=True)
        return scores, scores
    scores = 1 / (1 + np.exp(-x))
    choice = scores + bias
    if size.kind == "grouped":
        groups = choice.reshape(len(x), 8, -1)
        best = np.sort(groups, axis=2)[:, :, -2:].sum(axis=2)
        kept = np.argsort(-best, axis=1, kind="stable")[:, :4]
        stays = (kept[:, :, None] == np.arange(8)).any(axis=1)
        choice = np.where(stays[:, :, None], groups, -np.inf).reshape(x.shape)
    return choice, scores


def mismatch(size: Size, logits: Any, bias: Any, weights: np.ndarray, ids: np.ndarray) -> str:
    """What is wrong with the results, "" when nothing is."""
    choice, scores = choices(size, logits, bias)
    want = np.argsort(-choice, axis=1, kind="stable")[:, : size.top_k]
    if ids.min() < 0 or ids.max() >= size.experts:
        return f"an id of {ids.min()} or {ids.max()}"
    if (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
        return "an id comes twice"
    taken, best = (np.take_along_axis(choice, at, axis=1) for at in (ids, want))
    with np.errstate(invalid="ignore"):
        off = np.abs(taken - best) > _ROUNDING * (1 + np.abs(best))
    if off.any():
        token = int(off.any(axis=1).argmax())
        return f"token {token}: ids {ids[token]}, not {want[token]}"
    expected = np.take_along_axis(scores, ids, axis=1)
    expected = expected / expected.sum(axis=1, keepdims=True)
    expected *= size.options.get("scaling_factor", 1.0)
    error = np.abs(weights - expected) / expected
    return f"a weight is off by {error.max():.1e}" if not error.max() <= 1e-5 else ""


def misaligned(size: Size, ids: np.ndarray, aligned: Any) -> str:
    """What is wrong with the `AlignedBlocks` of these ids, "" when nothing is."""
    shape = {"num_experts": size.experts, "block_size": size.block_size, "top_k": size.top_k}
    case = cases.Case(num_pairs=ids.size, **shape)
    got = {name: np.asarray(x) for name, x in aligned._asdict().items() if x is not None}
    want = cases.expected(case, ids)
    if not np.array_equal(got["row_of_pair"], want.row_of_pair):
        return "row_of_pair differs"
    return cases.mismatch(case, want, got)


class Inputs:
    """Several logits of one size, on jax's device, and the bias."""

    def __init__(self, size: Size, copies: int):
        import jax
        import jax.numpy as jnp

        self.size = size
        shape = (size.tokens, size.experts)
        self.logits = [
            jax.random.normal(jax.random.key(k), shape, jnp.dtype(size.dtype))
            for k in range(copies)
        ]
        self.bias = jax.random.normal(jax.random.key(99), shape[1:])

    def wrong(self, results: Sequence[tuple[Any, Any]]) -> str:
        """Of the first and the last of the results."""
        for k in sorted({0, len(self.logits) - 1}):
            given = np.asarray(self.logits[k].astype("float32")), np.asarray(self.bias)
            weights, ids = map(np.asarray, results[k])
            if text := mismatch(self.size, *given, weights, ids):
                return f"input {k}: {text}"
        return ""


# -- providers ---------------------------------------------------------------------------------------


type Measured = tuple[str, timing.Timing | None]  # what is wrong, "" for nothing; its time

ROUTER_ALONE, APART = "router alone", "the two apart"
WHOLE_KEYS = ", whole keys"  # behind one of the names: without the short keys of float32


def fits(name: str, size: Size) -> bool:
    """Whether a shape has a routing warp for each token, and few without one."""
    config = shape_of(name)
    routers = 4 * (config.num_warpgroups - (config.form == "split")) * config.num_ctas
    return size.tokens <= routers < max(2 * size.tokens, 5)


def shape_of(name: str) -> Any:
    """A `FusedConfig` of "form:warpgroups:CTAs", such as "split:3:8"."""
    from moe_align_jax._router import fused

    form, *numbers = name.split(":")
    return fused.FusedConfig(form, *map(int, numbers))


def lower_ours(inputs: Inputs, implementation: str | None, what: str) -> Any:
    """`what`: "ours", of a size with blocks in one call; "router alone"; "the two apart"; or the name of a
    shape (`shape_of`), in one call of that shape whatever the default is. WHOLE_KEYS may follow."""
    import jax

    import moe_align_jax as maj
    from moe_align_jax._router import fused, warp_router

    short_keys = warp_router.SHORT_KEYS and not what.endswith(WHOLE_KEYS)
    what = what.removesuffix(WHOLE_KEYS)
    size = inputs.size
    options: dict[str, Any] = {"top_k": size.top_k, "implementation": implementation}
    options |= size.options
    if size.biased:
        options["correction_bias"] = inputs.bias
    route: Callable = maj.route_topk
    if size.block_size and what not in (ROUTER_ALONE, APART):
        route = functools.partial(maj.route_and_align, block_size=size.block_size)

    def call(x):
        found = route(x, **options)
        if what != APART:
            return tuple(found)
        aligned = maj.moe_align_block_size(
            found[1],
            block_size=size.block_size,
            num_experts=size.experts,
            return_inverse=True,
            implementation=implementation,
        )
        return (*found, aligned)

    def program(many):
        return [call(x) for x in many]

    default = fused.config_for
    config_for = (lambda *_: shape_of(what)) if ":" in what else default
    with (
        mock.patch.object(fused, "config_for", config_for),
        mock.patch.object(warp_router, "SHORT_KEYS", short_keys),
    ):
        jax.clear_caches()  # no key of them holds these choices
        return jax.jit(program).lower(inputs.logits)


def wrong_results(inputs: Inputs, results: Sequence[Any]) -> str:
    """What is wrong with the calls of one program, "" when nothing is."""
    if wrong := inputs.wrong([found[:2] for found in results]):
        return wrong
    for _, ids, *aligned in (results[0], results[-1]):
        if aligned and (wrong := misaligned(inputs.size, np.asarray(ids), aligned[0])):
            return wrong
    return ""


def measure_ours(inputs: Inputs, names: Sequence[str], executions: int) -> dict[str, Measured]:
    """Each of `lower_ours`, from one trace; they are compiled side by side."""
    import jax

    lowered = [lower_ours(inputs, None, name) for name in names]
    with futures.ThreadPoolExecutor(len(names)) as pool:
        jobs = [pool.submit(one.compile) for one in lowered]
    found: dict[str, Measured] = {}
    for name, job in zip(names, jobs, strict=True):
        try:
            found[name] = wrong_results(inputs, job.result()(inputs.logits)), None
        except Exception as error:  # one shape's failure leaves the others their time
            found[name] = reason_of(error), None
    right = {n: job.result() for n, job in zip(names, jobs, strict=True) if not found[n][0]}
    if jax.default_backend() == "cpu":
        count = len(inputs.logits)
        for name, compiled in right.items():
            run = lambda call=compiled: jax.block_until_ready(call(inputs.logits))  # noqa: E731
            found[name] = "", timing.time_wall(run, calls=count, repeats=3)
        return found
    given = [inputs.logits] * len(right)
    taken = timing.time_jit_spans(list(right.values()), given, executions=executions)
    return found | {name: ("", spans) for name, spans in zip(right, taken, strict=True)}


@functools.cache
def _sglang(path: str) -> Any:
    # The file asks for one switch of the rest of its package: of a way for another GPU.
    off = types.SimpleNamespace(get=lambda: False)
    stand_in: Any = types.ModuleType("sglang.srt.environ")
    stand_in.envs = types.SimpleNamespace(SGLANG_OPT_SM120_MTP_ROUTER_TOP22=off)
    for name in ("sglang", "sglang.srt"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules.setdefault(stand_in.__name__, stand_in)
    spec = importlib.util.spec_from_file_location("sgl_router", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _sglang_call(path: str, size: Size, x: Any, bias: Any) -> Callable[[], tuple[Any, Any]]:
    scale = size.options.get("scaling_factor", 1.0)
    groups = {"num_expert_group": 8, "topk_group": 4} if size.kind == "grouped" else {}
    return functools.partial(
        _sglang(path).moe_fused_gate,
        x,
        bias if size.biased else None,
        size.top_k,
        scoring_func=size.options.get("scoring", "softmax"),
        routed_scaling_factor=scale,
        apply_routed_scaling_factor_on_output=scale != 1,
        **groups,
    )


def _vllm_call(path: str, size: Size, x: Any, bias: Any) -> Callable[[], tuple[Any, Any]]:
    import torch

    torch.ops.load_library(path)
    ops = torch.ops._moe_C
    if size.kind == "grouped":
        return lambda: ops.grouped_topk(x, 8, 4, size.top_k, True, 2.5, bias, 1)
    shape = (size.tokens, size.top_k)
    weights = torch.empty(shape, device=x.device)
    ids, indices = (torch.empty(shape, dtype=torch.int32, device=x.device) for _ in range(2))

    def call():
        if size.biased:
            ops.topk_sigmoid(weights, ids, indices, x, True, bias, 2.5, None)
        else:
            ops.topk_softmax(weights, ids, indices, x, True, None, None)
        return weights, ids

    return call


def _bridge_call(path: str, size: Size, x: Any, bias: Any) -> Callable[[], tuple[Any, Any]]:
    """torch_bridge's drop-in for the op of `_vllm_call`."""
    import torch

    from torch_bridge import vllm

    del path
    if size.kind == "grouped":
        return lambda: vllm.grouped_topk(x, 8, 4, size.top_k, True, 2.5, bias, 1)
    shape = (size.tokens, size.top_k)
    weights = torch.empty(shape, device=x.device)
    ids, indices = (torch.empty(shape, dtype=torch.int32, device=x.device) for _ in range(2))

    def call():
        if size.biased:
            vllm.topk_sigmoid(weights, ids, indices, x, True, bias, 2.5)
        else:
            vllm.topk_softmax(weights, ids, indices, x, True)
        return weights, ids

    return call


def measure_torch(inputs: Inputs, make: Callable, path: str, replays: int) -> Measured:
    from torch_bridge import to_torch

    bias = to_torch(inputs.bias)
    made = [make(path, inputs.size, to_torch(x), bias) for x in inputs.logits]
    results: list[Any] = [None] * len(made)

    def call(k):
        results[k] = made[k]()

    calls = [functools.partial(call, k) for k in range(len(made))]
    taken = timing.time_torch_graph(calls, replays=replays)
    found = [tuple(x.cpu().numpy() for x in pair) for pair in results]
    return (wrong, None) if (wrong := inputs.wrong(found)) else ("", taken)


# -- a run -------------------------------------------------------------------------------------------


def run_size(size: Size, options: argparse.Namespace) -> list[dict[str, Any]]:
    inputs = Inputs(size, options.copies)
    names = ["ours"]
    if size.block_size:  # what one launch is to be held against, by the same clock
        shapes = filter(None, options.shapes.split(","))
        names += [ROUTER_ALONE, APART, *(name for name in shapes if fits(name, size))]
    if options.whole_keys:
        names += [name + WHOLE_KEYS for name in names if name != APART]
    found = measure_ours(inputs, names, options.executions)
    for name, path, make in (
        ("sglang", options.sglang_router, _sglang_call),
        ("vllm", options.vllm, _vllm_call),
        ("torch_bridge", options.torch, _bridge_call),
    ):
        if path and not size.block_size:
            try:
                found[name] = measure_torch(inputs, make, path, options.replays)
            except Exception as error:  # one provider's failure leaves the others their time
                found[name] = reason_of(error), None
    rows = []
    for provider, (wrong, taken) in found.items():
        row = {"case": size.name, **size._asdict(), "provider": provider}
        if taken is None:
            row |= {"status": "failed", "reason": wrong}
        else:
            row |= {"status": "ok", "metric": taken.metric, "us": round(taken.percentile(50), 3)}
            row |= {f"p{p}_us": round(taken.percentile(p), 3) for p in (20, 80)}
            row |= {"calls": taken.calls, "note": taken.note}
        rows.append(row)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line per provider and case."""
    return [
        f"{row['case']:58} {row['provider']:13} "
        + (f"{row['us']:9.2f} us, {row['metric']}" if "us" in row else f"failed: {row['reason']}")
        for row in rows
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sglang-router", help="SGLang's file, as benchmarks.fetch leaves it")
    parser.add_argument("--vllm", help="vLLM's library, as benchmarks.fetch leaves it")
    parser.add_argument("--torch", action="store_true", help="ours by torch_bridge.vllm, too")
    parser.add_argument(
        "--shapes",
        default="",
        help="one launch by these shapes, too: form:warpgroups:CTAs, e.g. split:3:8,block:2:8",
    )
    parser.add_argument("--whole-keys", action="store_true", help="ours without short keys, too")
    parser.add_argument(
        "--sizes", default="", help="numbers of sizes to run instead of all, e.g. 0,1,4"
    )
    parser.add_argument(
        "--size",
        action="append",
        default=[],
        help="a size instead, may be repeated: tokens,experts,top_k,kind,dtype,block_size",
    )
    parser.add_argument("--copies", type=int, default=20, help="inputs per program")
    parser.add_argument("--executions", type=int, default=12)
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument("--out", help="JSONL file to append to")
    options = parser.parse_args(argv)
    sizes = [SIZES[int(k)] for k in options.sizes.split(",") if k]
    for text in options.size:
        words = text.split(",")
        numbers = {k: int(words[k]) for k in (0, 1, 2, 5) if k < len(words)}
        sizes.append(Size(*(numbers.get(k, word) for k, word in enumerate(words))))  # type: ignore[arg-type]
    sizes = sizes or list(SIZES)
    for name in ("sglang_router", "vllm"):
        path = getattr(options, name)
        if path and not Path(path).is_file():
            parser.error(f"--{name.replace('_', '-')} names no file: {path}")
    failed, writer = 0, Writer(options.out, machine.facts())
    for size in sizes:
        rows = run_size(size, options)
        print("\n".join(summary(rows)), flush=True)
        failed += sum(row["status"] == "failed" for row in rows)
        writer.write(rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
