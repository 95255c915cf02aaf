"""The expert layer from PyTorch: `torch_bridge.fused_moe` beside what vLLM's `fused_experts` launches.

    python -m benchmarks.torch_layer --peers .peers --tokens 1 16 128 1024 --out ROWS.jsonl

Two figures for each: the host's time per eager call, and the time per call in a CUDA graph. Four sets of
weights are taken in turn. "vllm" is what its layer launches, without the Python around it (the look-up of
sizes, its workspace, the checks). "vllm, apply" is its class `TritonExperts` out of its files, and "patched"
the same call with ours in its place, by `torch_bridge.vllm.patch`; both by the host's clock alone. Results
are verified first. Without vLLM's files (`python -m benchmarks.fetch vllm vllm_layer`) its rows say so.
"""

import argparse
import contextlib
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import host, machine, timing
from benchmarks.moe_cases import LAYERS, MODELS, Model, routing
from benchmarks.rows import Writer, failed

_BOUND = 1e-2
_SAMPLED = 4
_DEVICE = "cuda"


class Operands:
    """One batch size of a model, on the GPU."""

    def __init__(self, model: Model, tokens: int, sets: Sequence[tuple[Any, Any]]):
        import torch

        self.model, self.tokens, self.sets = model, tokens, sets
        weights, ids = routing(model, tokens)
        torch.manual_seed(1)
        self.x = torch.randn(tokens, model.hidden, device=_DEVICE).bfloat16()
        self.weights, self.ids = (torch.from_numpy(array).to(_DEVICE) for array in (weights, ids))

    def wrong(self, layer: int, out: Any) -> str:
        """ "" where the first rows of a layer's result are right, of float32."""
        import torch

        w13, w2 = self.sets[layer]
        for t in range(min(_SAMPLED, self.tokens)):
            want = torch.zeros(self.model.hidden, device=_DEVICE)
            for k in range(self.model.top_k):
                expert = int(self.ids[t, k])
                gate, up = (w13[expert].float() @ self.x[t].float()).chunk(2)
                down = w2[expert].float() @ (torch.nn.functional.silu(gate) * up)
                want += self.weights[t, k] * down
            error = float((out[t].float() - want).norm() / want.norm())
            if not error < _BOUND:
                return f"token {t} of layer {layer}: relative error {error:.2e}"
        return ""


def make_sets(model: Model) -> list[tuple[Any, Any]]:
    """`LAYERS` times (w13 `[E, 2 N, H]`, w2 `[E, H, N]`), bfloat16."""
    import torch

    experts, hidden, ffn = model.experts, model.hidden, model.ffn

    def make(*shape: int) -> Any:
        w = torch.empty(shape, dtype=torch.bfloat16, device=_DEVICE).uniform_(-1, 1)
        return w.mul_((3 / shape[2]) ** 0.5)

    return [(make(experts, 2 * ffn, hidden), make(experts, hidden, ffn)) for _ in range(LAYERS)]


def ours_of(case: Operands, outs: Sequence[Any]) -> list[Callable[[], Any]]:
    """A call of `fused_moe` for each set of weights."""
    import torch_bridge

    def call_of(w13: Any, w2: Any, out: Any) -> Callable[[], Any]:
        return lambda: torch_bridge.fused_moe(
            case.x, w13, w2, case.weights, case.ids, transpose_rhs=True, out=out
        )

    return [call_of(*pair, out) for pair, out in zip(case.sets, outs, strict=True)]


def theirs_of(case: Operands, outs: Sequence[Any], folder: str) -> list[Callable[[], Any]]:
    """vLLM's launches for each set of weights."""
    from benchmarks import vllm_moe

    model = case.model
    layer = vllm_moe.Layer(folder, case.tokens, model.top_k, model.experts, model.hidden, model.ffn)
    return vllm_moe.calls(layer, case.x, case.sets, case.weights, case.ids, outs)


def of_class(case: Operands, outs: Sequence[Any], folder: str, module: Any) -> list[Callable]:
    """A call of vLLM's class for each set of weights; `module` of `vllm_experts.imported`."""
    from benchmarks import vllm_experts

    model = case.model
    sizes = (case.tokens, model.top_k, model.experts, model.hidden, model.ffn)
    layer = vllm_experts.Layer(module, folder, *sizes)
    return [
        functools.partial(layer.run, case.x, *pair, case.weights, case.ids, out)
        for pair, out in zip(case.sets, outs, strict=True)
    ]


def class_rows(case: Operands, folder: str) -> Iterator[dict[str, Any]]:
    """vLLM's class, then ours in its place."""
    import torch

    import torch_bridge
    from benchmarks import vllm_experts

    name = f"{case.model.name}, {case.tokens} tokens"
    found: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        for provider in ("vllm, apply", "patched"):
            row: dict[str, Any] = {"case": name, "provider": provider, "metric": "host_us"}
            try:
                if provider == "vllm, apply":
                    module = stack.enter_context(vllm_experts.imported(folder))
                else:
                    stack.enter_context(torch_bridge.vllm.patch())
                outs = [torch.full_like(case.x, float("nan")) for _ in case.sets]
                calls = of_class(case, outs, folder, module)
                for call in calls:
                    call()
                if reason := next(filter(None, map(case.wrong, range(len(outs)), outs)), ""):
                    raise ValueError(reason)
                us = host.host_us({provider: in_turn(calls)}, calls=40, repeats=25)[provider]
            except Exception as error:
                yield row | failed(error)
                return
            found[provider] = us
            row["us"] = round(us, 2)
            if provider == "patched":
                row |= {"peer": "vllm, apply", "ratio": round(us / found["vllm, apply"], 3)}
            yield row


def in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """One call that does the next of these each time."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def rows_of(case: Operands, folder: str) -> Iterator[dict[str, Any]]:
    import torch

    made = {"torch_bridge": ours_of, "vllm": lambda c, o: theirs_of(c, o, folder)}
    calls: dict[str, list[Callable[[], Any]]] = {}
    name = f"{case.model.name}, {case.tokens} tokens"
    for provider, make in made.items():
        outs = [torch.full_like(case.x, float("nan")) for _ in case.sets]
        try:
            found = make(case, outs)
            for call in found:
                call()
        except Exception as error:
            yield {"case": name, "provider": provider, "status": "failed", "reason": str(error)}
            continue
        if reason := next(filter(None, map(case.wrong, range(len(outs)), outs)), ""):
            yield {"case": name, "provider": provider, "status": "failed", "reason": reason}
            continue
        calls[provider] = found
    # Few calls between two waits: the driver's queue holds about a thousand launches.
    named = {provider: in_turn(found) for provider, found in calls.items()}
    measured = host.host_us(named, calls=40, repeats=25)
    graphs = [(timing.capture_torch(found), len(found)) for found in calls.values()]
    spans = timing.time_torch_graphs(graphs, replays=20)
    for metric, values in (
        ("host_us", measured),
        (
            "graph_us",
            {p: statistics.median(s.samples_us) for p, s in zip(calls, spans, strict=True)},
        ),
    ):
        for provider, value in values.items():
            row = {"case": name, "provider": provider, "metric": metric, "us": round(value, 2)}
            if provider != "vllm" and "vllm" in values:
                row |= {"peer": "vllm", "ratio": round(value / values["vllm"], 3)}
            yield row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", default=".peers", help="folder of benchmarks.fetch")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 1024])
    parser.add_argument("--models", nargs="+", default=[m.name for m in MODELS], metavar="NAME")
    parser.add_argument("--out", metavar="FILE", help="JSONL to append to")
    parser.add_argument("--commit", help="the commit to record, where git is not at hand")
    options = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("benchmarks.torch_layer: a CUDA device must be there; got none. Run it on a GPU.")
        return 2
    writer = Writer(options.out, machine.facts(options.commit))
    failed = False
    for model in MODELS:
        if model.name not in options.models:
            continue
        sets = make_sets(model)
        for tokens in options.tokens:
            case = Operands(model, tokens, sets)
            rows = [*rows_of(case, options.peers), *class_rows(case, options.peers)]
            for row in rows:
                said = row.get("reason") or f"{row['us']:9.2f} µs {row['metric']}"
                beside = f"  {row['ratio']:5.2f} of {row['peer']}'s" if "ratio" in row else ""
                print(f"{row['case']:32} {row['provider']:14} {said}{beside}", flush=True)
                failed |= row.get("status") == "failed" and "vllm" not in row["provider"]
            writer.write(rows)
        del sets
        torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
