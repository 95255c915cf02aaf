"""Soaks the direct path on a GPU: calls, threads, replays, memory under pressure, and beside jax. Prints a
table.

    python -m tests.gpu.soak [--seconds N] [--calls N] [--replays N] [--parts calls,threads,...]

"calls" runs alone, since it watches time and memory; the other parts run at once, a process each. Results are
compared on the GPU with an alignment in torch operations (`align_torch`), which is held to the oracle first.
Exit code 1 on any mismatch or growth.
"""

import argparse
import concurrent.futures
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import torch_bridge
from tests import oracle
from tests.gpu.graphs import capture

PARTS = ("calls", "threads", "replays", "pressure", "beside_jax")
# num_experts, block_size, most pairs: every form, and both dtypes of ids.
LAYERS = ((64, 16, 20_000), (256, 64, 4096), (5000, 4, 600))
MIB = 1 << 20


# -- the answer, on the GPU ------------------------------------------------------------------------


def align_torch(ids: torch.Tensor, num_experts: int, block_size: int) -> list[torch.Tensor]:
    """The three results by torch operations. The host does not wait, so that it can be captured."""
    n, device = ids.numel(), ids.device
    total_rows = oracle.capacity(n, block_size, num_experts, False)
    flat = ids.flatten().long()
    key = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    key, order = torch.sort(key, stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.long, device=device)
    counts.scatter_add_(0, key, torch.ones_like(key))
    before = torch.cumsum(counts, 0) - counts
    padded = (counts + (block_size - 1)) // block_size * block_size
    padded[num_experts:] = 0
    ends = torch.cumsum(padded, 0)
    rows = (ends - padded)[key] + torch.arange(n, device=device) - before[key]
    rows = torch.where(key < num_experts, rows, total_rows)  # dropped pairs: past the end
    sorted_ids = torch.full((total_rows + 1,), n, dtype=torch.long, device=device)
    sorted_ids.scatter_(0, rows, order)
    sorted_ids[total_rows:] = n
    starts = torch.arange(-(-total_rows // block_size), device=device) * block_size
    experts = torch.searchsorted(ends[:num_experts].contiguous(), starts, right=True)
    used = ends[-1:]
    experts = torch.where(starts < used, experts, -1)
    return [x.to(torch.int32) for x in (sorted_ids[:total_rows], experts, used)]


def check_align_torch(device: str) -> None:
    """Holds `align_torch` to the NumPy oracle."""
    for seed, (num_experts, block_size, most) in enumerate(LAYERS):
        for n in (1, 9, 100, most):
            ids = random_ids(n, num_experts, torch.int64, device, seed)
            want = oracle.align_numpy(ids.cpu(), block_size=block_size, num_experts=num_experts)
            for got, expect in zip(
                align_torch(ids, num_experts, block_size), want[:3], strict=True
            ):
                np.testing.assert_array_equal(got.cpu().numpy(), expect)


def random_ids(n: int, num_experts: int, dtype: torch.dtype, device: str, seed: int | None = None):
    """Some of them out of range."""
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    return torch.randint(-1, num_experts + 1, (n,), dtype=dtype, device=device, generator=generator)


def count_wrong(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], wrong: torch.Tensor):
    """Adds 1 to `wrong` if any word differs; the host does not wait."""
    for a, b in zip(got, want, strict=True):
        wrong += (a != b).any()


def warm_up() -> int:
    return sum(
        torch_bridge.warmup(num_experts=experts, block_size=block, max_tokens=most)
        for experts, block, most in LAYERS
    )


# -- the parts: each returns what it saw ------------------------------------------------------------


def sample() -> dict[str, int]:
    free, total = torch.cuda.mem_get_info()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "torch bytes": torch.cuda.memory_allocated(),
        "GPU bytes": total - free,
        "handles": len(os.listdir("/proc/self/fd")),
        "host bytes": resident,
    }


def find_growth(samples: list[dict[str, int]], micros: list[float]) -> list[str]:
    """What grew from the second tenth to the last. Host memory and time vary a little by themselves."""
    found = []
    slack = {"host bytes": 16 * MIB}
    for name in samples[0]:
        first, last = samples[1][name], samples[-1][name]
        if last > first + slack.get(name, 0):
            found.append(f"{name}: {first} -> {last}")
    middle = sorted(micros)[len(micros) // 2]
    if micros[-1] > 1.5 * middle and micros[-2] > 1.5 * middle:
        found.append(f"time: {micros[-1]:.1f} us a call, median {middle:.1f}")
    return found


def run_calls(calls: int) -> dict[str, Any]:
    """A million calls of a few kinds."""
    warm_up()
    small = random_ids(512, 64, torch.int32, "cuda", 0)
    large = random_ids(8192, 64, torch.int64, "cuda", 1)
    mapped = torch.arange(64, dtype=torch.int32, device="cuda")
    operator = torch.ops.moe_align_jax.block_align
    kinds: list[Callable[[], Any]] = [
        lambda: torch_bridge.moe_align_block_size(small, 64, 16),
        lambda: torch_bridge.moe_align_block_size(large, 64, 16),
        lambda: torch_bridge.moe_align_block_size(small, 64, 16, expert_map=mapped),
        lambda: operator(large, 64, 16),
        lambda: torch_bridge.moe_align_block_size(large[1:], 64, 16, path="direct"),
    ]
    samples, micros, thousands = [], [], max(1, calls // 10_000)
    for call in kinds:
        call()
    torch.cuda.synchronize()
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(thousands):
            for k in range(1000):
                kinds[k % len(kinds)]()
            torch.cuda.synchronize()
        micros.append((time.perf_counter() - start) / (thousands * 1000) * 1e6)
        samples.append(sample())
    wrong = torch.zeros((), dtype=torch.long, device="cuda")
    count_wrong(kinds[0](), align_torch(small, 64, 16), wrong)
    count_wrong(kinds[3](), align_torch(large, 64, 16), wrong)
    return {
        "done": thousands * 10_000,
        "wrong": int(wrong),
        "growth": find_growth(samples, micros),
        "note": " ".join(f"{x:.1f}" for x in micros) + " us a call",
    }


def run_threads(seconds: float, num_threads: int = 8) -> dict[str, Any]:
    """Random sizes on 4 streams: odd threads share theirs (one is the default), even ones have their own."""
    warm_up()
    shared = [torch.cuda.default_stream(), *(torch.cuda.Stream() for _ in range(3))]
    stop = time.monotonic() + seconds
    barrier = threading.Barrier(num_threads)

    def work(thread: int) -> tuple[int, int]:
        torch.cuda.set_device(0)
        rng = random.Random(thread)
        streams = shared if thread % 2 else [torch.cuda.Stream() for _ in range(4)]
        wrongs = [torch.zeros((), dtype=torch.long, device="cuda") for _ in streams]
        torch.cuda.synchronize()
        done = bad = 0
        barrier.wait()
        while time.monotonic() < stop:
            k = rng.randrange(4)
            num_experts, block_size, most = rng.choice(LAYERS)
            n = rng.randint(1, most) if rng.random() < 0.5 else rng.randint(1, min(most, 600))
            dtype = rng.choice((torch.int32, torch.int64))
            with torch.cuda.stream(streams[k]):
                ids = random_ids(n + 3, num_experts, dtype, "cuda")[rng.randrange(4) :][:n]
                given = ids.clone() if rng.random() < 0.5 else ids
                got = torch_bridge.moe_align_block_size(given, num_experts, block_size)
                if given is not ids:
                    given.fill_(0)
                count_wrong(got, align_torch(ids, num_experts, block_size), wrongs[k])
                if done % 200 == 0:
                    want = oracle.align_numpy(
                        ids.cpu(), block_size=block_size, num_experts=num_experts
                    )
                    for a, b in zip(got, want[:3], strict=True):
                        bad += not np.array_equal(a.cpu().numpy(), b)
            done += 1
        torch.cuda.synchronize()
        return done, bad + sum(int(x) for x in wrongs)

    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        results = list(pool.map(work, range(num_threads)))
    return {"done": sum(d for d, _ in results), "wrong": sum(w for _, w in results), "growth": []}


def run_replays(replays: int) -> dict[str, Any]:
    """Three graphs a turn: new ids, our kernels alone, the check. One set for each form."""
    warm_up()
    cases = [(20, 64, 16), (500, 64, 16), (5000, 64, 16), (20_000, 64, 16), (300, 5000, 4)]
    wrong = torch.zeros((), dtype=torch.long, device="cuda")
    turn = torch.zeros((), dtype=torch.long, device="cuda")
    done = changed = 0
    for n, num_experts, block_size in cases:
        ids = random_ids(n, num_experts, torch.int64, "cuda", n)
        position = torch.arange(n, device="cuda")

        def renew(ids=ids, position=position, num_experts=num_experts):
            turn.add_(1)
            mixed = (position * 2_654_435_761 + turn * 40_503 * (position % 7 + 1)) >> 9
            ids.copy_(mixed % (num_experts + 2) - 1)

        def align(ids=ids, num_experts=num_experts, block_size=block_size):
            return torch_bridge.moe_align_block_size(ids, num_experts, block_size)

        def check(results, ids=ids, num_experts=num_experts, block_size=block_size):
            count_wrong(results, align_torch(ids, num_experts, block_size), wrong)

        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # what torch's own operations want before a capture
            renew()
            check(align())
        torch.cuda.synchronize()
        renewing, aligning, checking = (torch.cuda.CUDAGraph() for _ in range(3))
        with capture(renewing):
            renew()
        with capture(aligning):
            results = align()
        with capture(checking):
            check(results)
        before = None
        for i in range(replays // len(cases)):
            renewing.replay()
            aligning.replay()
            checking.replay()
            if i % 1000 == 0:
                now = results[0].tolist()
                changed += now != before
                before = now
            done += 1
        torch.cuda.synchronize()
    note = f"{changed} of {len(cases) * -(-(replays // len(cases)) // 1000)} looks saw new results"
    return {"done": done, "wrong": int(wrong), "growth": [], "note": note}


def run_pressure(seconds: float) -> dict[str, Any]:
    """Tensors freed at once after the call, their memory taken and scribbled over, torch short of memory."""
    warm_up()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1024 * MIB / total))
    rng, stop = random.Random(0), time.monotonic() + seconds
    streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    wrongs = [torch.zeros((), dtype=torch.long, device="cuda") for _ in streams]
    torch.cuda.synchronize()
    done = starved = 0
    ballast: list[torch.Tensor] = []

    def turn(wrong: torch.Tensor) -> None:
        num_experts, block_size, most = rng.choice(LAYERS)
        n = rng.randint(1, most)
        base = random_ids(n, num_experts, torch.int64, "cuda")
        want = align_torch(base, num_experts, block_size)
        got = torch_bridge.moe_align_block_size(base.clone(), num_experts, block_size)
        scribbled = [torch.full((n,), 3, dtype=torch.int64, device="cuda") for _ in range(3)]
        strided = torch.stack([base, base], 1)[:, 0]  # its copy lives in the call alone
        again = torch_bridge.moe_align_block_size(strided, num_experts, block_size)
        del scribbled, strided
        scribbled = [torch.full_like(x, -7) for x in got]
        count_wrong(got, want, wrong)
        count_wrong(again, want, wrong)
        # Results that nobody reads: freed while the kernel may still be to run.
        torch_bridge.moe_align_block_size(base, num_experts, block_size)
        scribbled += [torch.full_like(x, -8) for x in got]
        count_wrong(got, want, wrong)
        size = rng.randrange(4, 64) * MIB
        ballast.append(torch.empty(size, dtype=torch.uint8, device="cuda"))

    while time.monotonic() < stop:
        k = rng.randrange(3)
        with torch.cuda.stream(streams[k]):
            try:
                turn(wrongs[k])
                done += 3
            except torch.cuda.OutOfMemoryError:
                starved += 1
                del ballast[: -(-len(ballast) // 2)]
        if done % 3000 == 0:
            torch.cuda.empty_cache()
    torch.cuda.synchronize()
    note = f"torch ran out of memory {starved} times"
    growth = [] if starved or seconds < 5 else ["no pressure: torch never ran out of memory"]
    return {"done": done, "wrong": sum(int(x) for x in wrongs), "growth": growth, "note": note}


def run_beside_jax(seconds: float) -> dict[str, Any]:
    """Captures and replays, and between them calls on the DLPack path, whose jax looks at its streams about
    every 5 s from a thread of its own."""
    ids = random_ids(3000, 64, torch.int32, "cuda", 0)
    stop, wrong, done = time.monotonic() + seconds, 0, 0
    while time.monotonic() < stop:
        for _ in range(5):
            got = torch_bridge.moe_align_block_size(ids, 64, 16, path="dlpack")
        seen = run_replays(100)
        wrong += seen["wrong"] + (not torch.equal(got[0], align_torch(ids, 64, 16)[0]))
        done += seen["done"] + 5
    return {"done": done, "wrong": wrong, "growth": []}


# -- the command ------------------------------------------------------------------------------------


def run_part(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    check_align_torch("cuda")
    if part == "calls":
        seen = run_calls(arguments.calls)
    elif part == "threads":
        seen = run_threads(arguments.seconds)
    elif part == "replays":
        seen = run_replays(arguments.replays)
    elif part == "pressure":
        seen = run_pressure(arguments.seconds)
    else:
        seen = run_beside_jax(arguments.seconds)
    if part != "beside_jax" and "jax" in sys.modules:  # then this was not the direct path alone
        seen["growth"].append("jax was imported")
    return seen


def start(part: str, arguments: argparse.Namespace) -> tuple[float, subprocess.Popen]:
    command = [sys.executable, "-m", "tests.gpu.soak", "--child", part]
    for name in ("seconds", "calls", "replays"):
        command += [f"--{name}", str(getattr(arguments, name))]
    return time.monotonic(), subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(part: str, began: float, process: subprocess.Popen) -> bool:
    """Prints the part's line; whether it passed."""
    output, _ = process.communicate()
    seconds = time.monotonic() - began
    try:
        seen = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        print(
            f"{part:<11}{'-':>12}{'-':>8}{seconds:>9.0f}  died with {process.returncode}",
            flush=True,
        )
        return False
    passed = (
        not process.returncode and seen["done"] > 0 and not seen["wrong"] and not seen["growth"]
    )
    verdict = "passed" if passed else "FAILED " + "; ".join(seen["growth"])
    note = seen.get("note", "")
    print(
        f"{part:<11}{seen['done']:>12,}{seen['wrong']:>8}{seconds:>9.0f}  {verdict}  {note}",
        flush=True,
    )
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=20, help="of threads, pressure and beside_jax"
    )
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--replays", type=int, default=10_000)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print("\n" + json.dumps(run_part(arguments.child, arguments)), flush=True)
        return 0
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        print("torch sees no GPU: nothing was soaked")
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {warm_up()} programs")
    print(f"{'part':<11}{'calls':>12}{'wrong':>8}{'seconds':>9}  verdict")
    passed = True
    if "calls" in parts:
        passed &= finish("calls", *start("calls", arguments))
    running = {part: start(part, arguments) for part in parts if part != "calls"}
    for part, (began, process) in running.items():
        passed &= finish(part, began, process)
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
