"""Host time per call from PyTorch, and the first call of a fresh process, beside vLLM's compiled op.

python -m benchmarks.host --vllm-op .peers/vllm_moe.so --out benchmarks/results/host/NAME.jsonl
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine

# One kernel, two kernels: pairs, experts, block.
SIZES = ((512, 256, 16), (8192, 256, 16))
_FIRST_CALL = """
import json, sys, time
import torch
{imports}
topk_ids = torch.randint(0, 64, (4096 * 2,), dtype=torch.int32, device="cuda")
torch.cuda.synchronize()
start = time.perf_counter()
{call}
torch.cuda.synchronize()
first = time.perf_counter() - start
start = time.perf_counter()
{call}
torch.cuda.synchronize()
second = time.perf_counter() - start
print(json.dumps([first * 1e3, second * 1e3, "jax" in sys.modules]))
"""
_OURS = ("import torch_bridge", "torch_bridge.moe_align_block_size(topk_ids, 64, 128, 2)")


def host_us(
    named: dict[str, Callable[[], Any]], *, calls: int = 300, repeats: int = 15
) -> dict[str, float]:
    """Median over repeats of the host time per call; the GPU is waited for between repeats only.

    The providers take turns, so that a slow moment of the machine meets all of them.
    """
    import torch

    for call in named.values():
        for _ in range(100):
            call()
    samples: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(repeats):
        for name, call in named.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            samples[name].append((time.perf_counter() - start) * 1e6 / calls)
    torch.cuda.synchronize()
    return {name: statistics.median(times) for name, times in samples.items()}


def vllm_call(topk_ids: Any, num_experts: int, block_size: int) -> Callable[[], Any]:
    """vLLM's op with the three allocations that its Python layer makes."""
    import torch

    op = torch.ops._moe_C.moe_align_block_size
    n, device = topk_ids.numel(), topk_ids.device
    capacity = n + min(n, num_experts) * (block_size - 1)
    blocks = -(-capacity // block_size)

    def call():
        rows = torch.empty((capacity,), dtype=torch.int32, device=device)
        experts = torch.empty((blocks,), dtype=torch.int32, device=device)
        count = torch.empty((1,), dtype=torch.int32, device=device)
        op(topk_ids, num_experts, block_size, rows, experts, count, None, None)
        return rows, experts, count

    return call


def calls_of(topk_ids: Any, num_experts: int, block_size: int, vllm: bool) -> dict[str, Callable]:
    import torch

    import torch_bridge

    sizes = (topk_ids, num_experts, block_size)
    out = torch_bridge.moe_align_block_size(*sizes)
    operator = torch.ops.moe_align_jax.block_align  # looked up once, as vLLM's is
    calls: dict[str, Callable] = {
        "torch_bridge": lambda: torch_bridge.moe_align_block_size(*sizes),
        "torch_bridge, out=": lambda: torch_bridge.moe_align_block_size(*sizes, out=out),
        "torch.ops": lambda: operator(*sizes),
        "torch_bridge.vllm": lambda: torch_bridge.vllm.moe_align_block_size(
            topk_ids, block_size, num_experts
        ),
        "torch_bridge.vllm in place": lambda: torch_bridge.vllm.ops_moe_align_block_size(
            *sizes, *out
        ),
    }
    if vllm:
        in_place = torch.ops._moe_C.moe_align_block_size
        calls["vllm"] = vllm_call(*sizes)
        calls["vllm in place"] = lambda: in_place(*sizes, *out, None, None)
    return calls


def first_call(script: str, cache: str) -> list[Any]:
    """[first call ms, second call ms, whether jax was imported] of a fresh process."""
    environment = os.environ | {"TORCH_BRIDGE_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def cold_starts(vllm_op: str | None, repeats: int = 5) -> list[dict[str, Any]]:
    rows = []
    ours = _FIRST_CALL.format(imports=_OURS[0], call=_OURS[1])
    with tempfile.TemporaryDirectory() as cache:
        cases = [
            ("torch_bridge, empty cache", ours, 1),
            ("torch_bridge, warm cache", ours, repeats),
        ]
        if vllm_op:
            imports = (
                f"torch.ops.load_library({vllm_op!r})\nfrom benchmarks.host import vllm_call\n"
            )
            call = "vllm_call(topk_ids.view(4096, 2), 64, 128)()"
            cases.append(("vllm", _FIRST_CALL.format(imports=imports, call=call), repeats))
        for name, script, count in cases:
            runs = [first_call(script, cache) for _ in range(count)]
            first, second = (statistics.median(run[k] for run in runs) for k in range(2))
            rows.append(
                {
                    "case": "first call, 8192x64x128",
                    "provider": name,
                    "metric": "first_call_ms",
                    "ms": round(first, 2),
                    "second_call_ms": round(second, 3),
                    "imports_jax": any(run[2] for run in runs),
                    "processes": count,
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-op", metavar="PATH", help="vLLM's compiled MoE library")
    parser.add_argument("--out", metavar="FILE", help="JSONL to append to")
    parser.add_argument("--commit", help="the commit to record, where git is not at hand")
    options = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("benchmarks.host: a CUDA device must be there; got none. Run it on a GPU machine.")
        return 2
    if options.vllm_op:
        torch.ops.load_library(options.vllm_op)
    rows = []
    for num_pairs, num_experts, block_size in SIZES:
        shape = (num_pairs // 8, 8)
        topk_ids = torch.randint(0, num_experts, shape, dtype=torch.int32, device="cuda")
        calls = calls_of(topk_ids, num_experts, block_size, bool(options.vllm_op))
        measured = host_us(calls)
        for name, value in measured.items():
            peer = "vllm in place" if name.endswith("in place") else "vllm"
            ratio = value / measured.get(peer, float("nan"))
            case = f"{num_pairs}x{num_experts}x{block_size}"
            rows.append(
                {"case": case, "provider": name, "metric": "host_us", "us": round(value, 2)}
            )
            print(f"{case:14} {name:26} {value:7.2f} µs  {ratio:5.2f} of vLLM's")
    for row in cold_starts(options.vllm_op):
        rows.append(row)
        print(
            f"{row['case']:24} {row['provider']:26} {row['ms']:9.2f} ms; second {row['second_call_ms']}"
        )
    if options.out:
        facts = machine.facts(options.commit)
        with Path(options.out).open("a") as file:
            file.writelines(json.dumps({**facts, **row}) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
