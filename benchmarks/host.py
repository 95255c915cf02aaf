"""Host time per call from PyTorch, and the first call of a fresh process, beside the peers' compiled ops.

python -m benchmarks.host --vllm-op .peers/vllm_moe.so --sglang-op .peers/sgl_ops.so \\
    --out ROWS.jsonl

vLLM's own Python function is timed too, on its op and patched to ours, if its file lies beside the op.
"""

import argparse
import contextlib
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

from benchmarks import machine, vllm_file
from benchmarks.rows import Writer

# One kernel, two kernels: pairs, experts, block.
SIZES = ((512, 256, 16), (8192, 256, 16))
# The process that compiles says how long it took, and how much of that was the self-test on the GPU.
_FIRST_CALL = """
import json, subprocess, sys, time
import torch
{imports}
programs, run = [], subprocess.run
def listen(command, **options):
    done = run(command, **options)
    if "compile_worker.py" in str(command):
        answer = json.loads(done.stdout.splitlines()[-1])
        programs.extend(one for one in answer.get("programs", ()) if "seconds" in one)
    return done
subprocess.run = listen
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
whole = sum(sum(one["seconds"].values()) for one in programs)
self_test = sum(one["seconds"]["self_test"] for one in programs)
times = {{"ms": first, "second_call_ms": second}}
times |= {{"compile_ms": whole - self_test, "self_test_ms": self_test}}
times = {{name: seconds * 1e3 for name, seconds in times.items()}}
print(json.dumps(times | {{"imports_jax": "jax" in sys.modules}}))
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


def vllm_call(
    topk_ids: Any, num_experts: int, block_size: int, *, scatter_idx: bool = False
) -> Callable[[], Any]:
    """vLLM's op with the allocations that its Python layer makes: three, or four."""
    import torch

    op = torch.ops._moe_C.moe_align_block_size
    n, device = topk_ids.numel(), topk_ids.device
    capacity = n + min(n, num_experts) * (block_size - 1)
    blocks = -(-capacity // block_size)

    def call():
        scatter = None
        if scatter_idx:
            scatter = torch.empty((n, 1), dtype=torch.int32, device=device)
        rows = torch.empty((capacity,), dtype=torch.int32, device=device)
        experts = torch.empty((blocks,), dtype=torch.int32, device=device)
        count = torch.empty((1,), dtype=torch.int32, device=device)
        op(topk_ids, num_experts, block_size, rows, experts, count, None, scatter)
        return rows, experts, count

    return call


def sglang_buffers(num_pairs: int, num_experts: int, block_size: int, device: Any) -> list[Any]:
    """What SGLang's Python layer allocates for its op: three results and a scratch."""
    import torch

    buckets = num_experts + 1
    capacity = num_pairs + min(num_pairs, buckets) * (block_size - 1)
    capacity = -(-capacity // 4) * 4
    sizes = (capacity, -(-capacity // block_size), 1, buckets + 1)
    return [torch.empty((size,), dtype=torch.int32, device=device) for size in sizes]


def calls_of(topk_ids: Any, num_experts: int, block_size: int) -> dict[str, Callable]:
    """Ours, by name. `peer_of` names what each is to be read beside."""
    import torch

    import torch_bridge
    from torch_bridge import sglang, vllm

    sizes = (topk_ids, num_experts, block_size)
    named: dict[str, Any] = {"num_experts": num_experts, "block_size": block_size}
    turned = (topk_ids, block_size, num_experts)
    out = torch_bridge.moe_align_block_size(*sizes)
    buffers = sglang_buffers(topk_ids.numel(), num_experts, block_size, topk_ids.device)
    batch, counts = batch_of(topk_ids, num_experts)
    operator = torch.ops.moe_align_jax.block_align  # looked up once, as vLLM's is
    return {
        "torch_bridge": lambda: torch_bridge.moe_align_block_size(*sizes),
        "torch_bridge, out=": lambda: torch_bridge.moe_align_block_size(*sizes, out=out),
        "torch.ops": lambda: operator(*sizes),
        "align_blocks": lambda: torch_bridge.align_blocks(topk_ids, **named),
        "align_blocks, inverse": lambda: torch_bridge.align_blocks(
            topk_ids, return_inverse=True, **named
        ),
        "torch_bridge.vllm": lambda: vllm.moe_align_block_size(*turned),
        "torch_bridge.vllm in place": lambda: vllm.ops_moe_align_block_size(*sizes, *out),
        "torch_bridge.vllm, scatter_idx": lambda: vllm.moe_align_block_size(
            *turned, return_scatter_idx=True
        ),
        "torch_bridge.vllm batched": lambda: vllm.batched_moe_align_block_size(
            batch, block_size, counts
        ),
        "torch_bridge.sglang": lambda: sglang.moe_align_block_size(*turned),
        "torch_bridge.sglang in place": lambda: sglang.ops_moe_align_block_size(
            topk_ids, num_experts + 1, block_size, *buffers
        ),
    }


def batch_of(topk_ids: Any, num_experts: int) -> tuple[int, Any]:
    """max_tokens_per_batch and expert_num_tokens of as many tokens in the batched layout."""
    import torch

    counts = torch.bincount(topk_ids.flatten().long(), minlength=num_experts)
    return topk_ids.shape[0], counts.to(torch.int32)


def vllm_calls(topk_ids: Any, num_experts: int, block_size: int) -> dict[str, Callable]:
    """vLLM's compiled ops; "vllm" and what follows a comma allocate as its Python layer does."""
    import torch

    import torch_bridge

    sizes, ops = (topk_ids, num_experts, block_size), torch.ops._moe_C
    out = torch_bridge.moe_align_block_size(*sizes)
    batch, counts = batch_of(topk_ids, num_experts)
    capacity = num_experts * -(-batch // block_size) * block_size

    def batched():
        lengths = (capacity, capacity // block_size, 1)
        results = [torch.empty((n,), dtype=torch.int32, device=counts.device) for n in lengths]
        ops.batched_moe_align_block_size(batch, block_size, counts, *results)
        return results

    return {
        "vllm": vllm_call(*sizes),
        "vllm in place": lambda: ops.moe_align_block_size(*sizes, *out, None, None),
        "vllm, scatter_idx": vllm_call(*sizes, scatter_idx=True),
        "vllm batched": batched,
    }


def sglang_calls(topk_ids: Any, num_experts: int, block_size: int) -> dict[str, Callable]:
    """SGLang's compiled op, with and without its allocations."""
    import torch

    op, buckets = torch.ops.sgl_kernel.moe_align_block_size, num_experts + 1
    allocated = (topk_ids.numel(), num_experts, block_size, topk_ids.device)
    kept = sglang_buffers(*allocated)
    return {
        "sglang": lambda: op(topk_ids, buckets, block_size, *sglang_buffers(*allocated), True),
        "sglang in place": lambda: op(topk_ids, buckets, block_size, *kept, True),
    }


def peer_of(name: str) -> str:
    """The provider whose time stands below the line of a ratio."""
    if name.startswith("vllm's function"):
        return "vllm's function"
    ours, *rest = name.removeprefix("torch_bridge.").partition(" in place")
    if ours in ("vllm, scatter_idx", "vllm batched", "sglang"):
        return ours + rest[0]
    return "vllm" + rest[0]


def first_call(script: str, cache: str) -> dict[str, Any]:
    """Times of a fresh process's first and second call, and whether jax was imported."""
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
            rows.append(first_call_row(name, [first_call(script, cache) for _ in range(count)]))
    return rows


def first_call_row(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over processes. With what compiling and the self-test took, where a program was compiled."""
    times = {
        key: round(statistics.median(run[key] for run in runs), 3)
        for key in ("ms", "second_call_ms", "compile_ms", "self_test_ms")
    }
    if not times["compile_ms"]:
        del times["compile_ms"], times["self_test_ms"]
    return {
        "case": "first call, 8192x64x128",
        "provider": name,
        "metric": "first_call_ms",
        **times,
        "imports_jax": any(run["imports_jax"] for run in runs),
        "processes": len(runs),
    }


def host_rows(
    topk_ids: Any, num_experts: int, block_size: int, vllm_op: str | None, sglang_op: str | None
) -> list[dict[str, Any]]:
    """A row per provider, with its ratio to `peer_of` where that was measured."""
    sizes = (topk_ids, num_experts, block_size)
    with contextlib.ExitStack() as stack:
        calls = calls_of(*sizes)
        if vllm_op:
            calls |= vllm_calls(*sizes)
            file = Path(vllm_op).with_name(vllm_file.NAME)
            if file.is_file():
                own, patched = stack.enter_context(vllm_file.own_and_patched(file))
                turned = (topk_ids, block_size, num_experts)
                calls["vllm's function"] = lambda: own.moe_align_block_size(*turned)
                calls["vllm's function, patched"] = lambda: patched.moe_align_block_size(*turned)
        if sglang_op:
            calls |= sglang_calls(*sizes)
        measured = host_us(calls)
    rows = []
    for name, value in measured.items():
        row = {"case": f"{topk_ids.numel()}x{num_experts}x{block_size}", "provider": name}
        row |= {"metric": "host_us", "us": round(value, 2)}
        if (peer := peer_of(name)) in measured:
            row |= {"peer": peer, "ratio": round(value / measured[peer], 3)}
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vllm-op", metavar="PATH", help="vLLM's compiled MoE library")
    parser.add_argument("--sglang-op", metavar="PATH", help="SGLang's compiled library")
    parser.add_argument("--out", metavar="FILE", help="JSONL to append to")
    parser.add_argument("--commit", help="the commit to record, where git is not at hand")
    options = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("benchmarks.host: a CUDA device must be there; got none. Run it on a GPU machine.")
        return 2
    for library in filter(None, (options.vllm_op, options.sglang_op)):
        torch.ops.load_library(library)
    out = Writer(options.out, machine.facts(options.commit))
    rows = []
    for num_pairs, num_experts, block_size in SIZES:
        shape = (num_pairs // 8, 8)
        topk_ids = torch.randint(0, num_experts, shape, dtype=torch.int32, device="cuda")
        rows += host_rows(topk_ids, num_experts, block_size, options.vllm_op, options.sglang_op)
    for row in rows:
        beside = f"{row['ratio']:5.2f} of {row['peer']}'s" if "ratio" in row else ""
        print(f"{row['case']:14} {row['provider']:31} {row['us']:7.2f} µs  {beside}")
    for row in cold_starts(options.vllm_op):
        rows.append(row)
        parts = [f"{key} {row[key]}" for key in row if key.endswith("_ms")]
        print(f"{row['case']:24} {row['provider']:26} {row['ms']:9.2f} ms; {', '.join(parts)}")
    out.write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
