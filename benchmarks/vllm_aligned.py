"""vLLM's two other aligned ops, for DeepEP and for LoRA: torch_bridge's beside vLLM's compiled ones. One GPU.

python -m benchmarks.fetch vllm
python -m benchmarks.vllm_aligned --vllm .peers/vllm_moe.so --out vllm_aligned.jsonl

With --composed also what torch_bridge does where its kernels cannot run: torch's operations around an
alignment.
Every provider's calls, each with inputs and buffers of its own, stand in one CUDA graph. What the last replay
left is then compared with NumPy's: blocks, counts and ids exactly, and each expert's rows in ascending order,
of vLLM's in any order.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from benchmarks import machine, timing
from benchmarks.rows import Writer, reason_of

_POISON = -7
OPS = {"globalize": "fused_globalize_align_block_size", "lora": "moe_lora_align_block_size"}


class Size(NamedTuple):
    """One op's call. Of "globalize" the ids name 256 experts of all ranks, of which `experts` are here.

    Attributes:
        op: "globalize" or "lora".
        tokens, top_k: of the ids. Of "globalize" the last eighth of the tokens was not received.
        experts: E.
        block_size: rows per block.
        adapters: of "lora".
    """

    op: str
    tokens: int
    top_k: int
    experts: int
    block_size: int
    adapters: int = 0

    @property
    def name(self) -> str:
        adapters = f", {self.adapters} adapters" if self.adapters else ""
        sizes = f"{self.tokens}x{self.top_k} of {self.experts}, blocks of {self.block_size}"
        return f"{self.op}: {sizes}{adapters}"

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k

    @property
    def capacity(self) -> int:
        """As vLLM computes it, to whole blocks."""
        rows = self.pairs + min(self.pairs, self.experts) * (self.block_size - 1)
        return -(-rows // self.block_size) * self.block_size


EVERYONE = 256
SIZES = (
    *(Size("globalize", t, 8, 32, 64) for t in (64, 256, 1024, 4096, 8192)),
    *(Size("globalize", t, 8, 32, 128) for t in (64, 8192)),
    *(Size("lora", t, 8, 64, 16, 4) for t in (8, 64, 256, 1024, 2048)),
    *(Size("lora", t, 8, 128, 16, count) for t in (8, 256, 2048) for count in (1, 8)),
)


# -- right -------------------------------------------------------------------------------------------


def aligned(size: Size, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The alignment of flat ids, -1 for none, in buffers of `size.capacity` rows."""
    n, block = len(ids), size.block_size
    kept = np.flatnonzero(ids >= 0)
    order = kept[np.argsort(ids[kept], kind="stable")]
    counts = np.bincount(ids[kept], minlength=size.experts)
    padded = -(-counts // block) * block
    starts, before = np.cumsum(padded) - padded, np.cumsum(counts) - counts
    rows = np.full(size.capacity, n, np.int32)
    rows[starts[ids[order]] + np.arange(len(order)) - before[ids[order]]] = order
    blocks = np.full(size.capacity // block, -1, np.int32)
    labels = np.repeat(np.arange(size.experts), padded // block)
    blocks[: len(labels)] = labels
    return {"rows": rows, "blocks": blocks, "count": np.array([padded.sum()], np.int32)}


def mismatch(
    size: Size, want: dict[str, np.ndarray], got: dict[str, np.ndarray], stable: bool
) -> str:
    """What is wrong with one alignment, "" when nothing is."""
    for name in ("count", "blocks"):
        if not np.array_equal(got[name], want[name]):
            return f"{name} is {got[name][:20]}, not {want[name][:20]}"
    used, rows = int(want["count"][0]), got["rows"].astype(np.int64)
    if not stable:
        expert = np.repeat(want["blocks"][: used // size.block_size], size.block_size)
        offset = expert.astype(np.int64) * (size.pairs + 1)
        rows[:used] = np.sort(offset + rows[:used]) - offset
    off = np.flatnonzero(rows != want["rows"])
    return f"row {off[0]} is {rows[off[0]]}, not {want['rows'][off[0]]}" if off.size else ""


# -- calls ---------------------------------------------------------------------------------------------


class Call:
    """Inputs and buffers of one call on the GPU."""

    def __init__(self, size: Size, seed: int, first: int, device: str = "cuda"):
        import torch

        rng = np.random.default_rng([seed, *size[1:]])
        self.size, self.first = size, first
        shape = (size.tokens, size.top_k)
        copies = max(size.adapters, 1)
        lengths = (size.capacity, size.capacity // size.block_size, 1)
        self.buffers = [
            torch.full((copies, length), _POISON, dtype=torch.int32, device=device)
            for length in lengths
        ]
        if size.op == "globalize":
            ids = rng.integers(0, EVERYONE, shape)
            self.ids = np.where(ids < size.experts, ids, -1)
            self.received = size.tokens - size.tokens // 8
            kept = (np.arange(size.tokens) < self.received)[:, None] & (self.ids >= 0)
            self.wanted = [np.where(kept, self.ids, -1).ravel()]
            self.given: list[Any] = [
                torch.tensor(self.ids, device=device),
                torch.tensor([self.received // 2, self.received], dtype=torch.int32, device=device),
            ]
            return
        self.ids = rng.integers(0, size.experts, shape).astype(np.int32)
        mapping = rng.integers(0, size.adapters, size.tokens).astype(np.int32)
        self.wanted = [
            np.where((mapping == adapter)[:, None], self.ids, -1).ravel()
            for adapter in range(size.adapters)
        ]
        self.given = [torch.tensor(x, device=device) for x in (self.ids, mapping)]
        self.given += [
            torch.ones(size.adapters + 1, dtype=torch.int32, device=device),
            torch.arange(size.adapters, dtype=torch.int32, device=device),
        ]

    def run(self, op: Callable) -> None:
        size = self.size
        if size.op == "globalize":
            rows, blocks, count = (x.view(-1) for x in self.buffers)
            sizes = (self.first, EVERYONE, size.experts, size.block_size)
            op(*self.given, *sizes, rows, blocks, count, None)
            return
        ids, mapping, enabled, in_use = self.given
        sizes = (size.experts, size.block_size, size.adapters, size.capacity)
        rows, blocks, count = self.buffers
        sizes = (*sizes, size.capacity // size.block_size)
        op(ids, mapping, *sizes, rows, blocks, count.view(-1), enabled, in_use, None)

    def wrong(self, stable: bool) -> str:
        """What is wrong with the results of the last run."""
        rows, blocks, count = (x.cpu().numpy() for x in self.buffers)
        for k, ids in enumerate(self.wanted):
            got = {"rows": rows[k], "blocks": blocks[k], "count": count[k]}
            if text := mismatch(self.size, aligned(self.size, ids), got, stable):
                return f"alignment {k}: {text}"
        if self.size.op == "globalize":
            local = self.wanted[0].reshape(self.ids.shape)
            want = np.where(local >= 0, local + self.first, -1)
            if not np.array_equal(self.given[0].cpu().numpy(), want):
                return "the global ids are wrong"
        return ""


def measure(size: Size, op: Callable, stable: bool, copies: int, replays: int) -> tuple[str, Any]:
    """(what is wrong, or ""; the time, if a call alone was right)."""
    once = Call(size, 99, 64)
    once.run(op)
    if wrong := once.wrong(stable):
        return f"one call: {wrong}", None
    # Replays of "globalize" read what the one before wrote; rank 0's ids stay as they are.
    calls = [Call(size, k, 0) for k in range(copies)]
    taken = timing.time_torch_graph(
        [functools.partial(call.run, op) for call in calls], replays=replays
    )
    for k in range(copies):
        if wrong := calls[k].wrong(stable):
            return f"call {k} in the graph: {wrong}", taken
    return "", taken


def _composed(op: Callable, *arguments: Any) -> None:
    """The op without its own kernels."""
    from torch_bridge import _vllm_launch

    def refuse(*given: Any, **named: Any) -> bool:
        del given, named
        return False

    with (
        mock.patch.object(_vllm_launch, "globalize", refuse),
        mock.patch.object(_vllm_launch, "align_adapters", refuse),
        mock.patch.object(_vllm_launch.calls, "repeat", refuse),
    ):
        op(*arguments)


def run_size(size: Size, options: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from torch_bridge import vllm

    ours = getattr(vllm, OPS[size.op])
    ops = {"torch_bridge": ours}
    if options.composed:
        ops["composed"] = functools.partial(_composed, ours)
    if options.vllm:
        torch.ops.load_library(options.vllm)
        ops["vllm"] = getattr(torch.ops._moe_C, OPS[size.op])
    rows = []
    for provider, op in ops.items():
        row = {"case": size.name, **size._asdict(), "provider": provider}
        stable = provider != "vllm"
        try:
            wrong, taken = measure(size, op, stable, options.copies, options.replays)
        except Exception as error:  # one provider's failure leaves the other its time
            wrong, taken = reason_of(error), None
        if taken is None or wrong and provider != "vllm":
            rows.append(row | {"status": "failed", "reason": wrong})
            continue
        # A peer's time counts also where its results do not hold: it is what its callers pay.
        status = {"status": "wrong", "reason": wrong} if wrong else {"status": "ok"}
        row |= {**status, "metric": taken.metric, "us": round(taken.percentile(50), 3)}
        rows.append(row | {f"p{p}_us": round(taken.percentile(p), 3) for p in (20, 80)})
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A size's line."""
    cells = [
        f"{row['provider']} {row['us']:8.2f}" if "us" in row else f"failed: {row['reason']}"
        for row in rows
    ]
    times = {row["provider"]: row.get("us") for row in rows}
    ours, theirs = times["torch_bridge"], times.get("vllm")
    ratio = f"   {theirs / ours:.2f}x" if ours and theirs else ""
    wrong = "".join(f"   {r['provider']}: {r['reason']}" for r in rows if r["status"] == "wrong")
    return f"{rows[0]['case']:58} {'  '.join(cells)}{ratio}{wrong}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vllm", help="vLLM's library, as benchmarks.fetch leaves it")
    parser.add_argument("--composed", action="store_true", help="ours without its kernels, too")
    parser.add_argument("--sizes", default="", help="numbers of the sizes to run, e.g. 0,1,4")
    parser.add_argument("--copies", type=int, default=20, help="calls in a graph")
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument("--out", help="JSONL file to append to")
    options = parser.parse_args(argv)
    if options.vllm and not Path(options.vllm).is_file():
        parser.error(f"--vllm names no file: {options.vllm}")
    failed, writer = 0, Writer(options.out, machine.facts())
    for size in [SIZES[int(k)] for k in options.sizes.split(",") if k] or SIZES:
        rows = run_size(size, options)
        print(summary(rows), flush=True)
        failed += sum(row["status"] == "failed" for row in rows)
        writer.write(rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
