"""silu_and_mul_masked_quant beside SGLang's Triton kernel and a device-to-device copy.

python -m benchmarks.masked_quant --sglang-masked .peers/sgl_masked.py --out ROWS.jsonl

Every provider runs over the same inputs, as many as the L2 cache cannot hold: ours as calls inside one jit
(device span), SGLang's in one CUDA graph. Before a time is taken, the codes and scales of sampled rows are
compared with NumPy's. Bytes are those of the valid rows: 4 N read, N + 4 N / 128 written. "Of a copy" is
their rate over that of a kernel that copies 1 GiB, bytes read and written both counted; a row of its own
is the copy of as many bytes as the case moves.
"""

import argparse
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_align_jax._core.fp8 import E4M3_MAX, GROUP

# Both frameworks share one GPU here; by default jax would take most of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks import machine, timing  # noqa: E402
from benchmarks.rows import Writer, reason_of  # noqa: E402

FLOOR = 1e-10
_L2_BYTES = 50 << 20
_COPY_BYTES = 1 << 30
_SAMPLED_ROWS = 256
# (groups of a tile, CTAs for each SM, whether a tile is loaded ahead): as many CTAs as an SM holds by
# their registers, and fewer.
VARIANTS = [
    *((8, per_sm, False) for per_sm in (10, 8, 5)),
    *((8, per_sm, True) for per_sm in (9, 6)),
    *((16, per_sm, False) for per_sm in (7, 5)),
    *((16, per_sm, True) for per_sm in (6, 4)),
]


class Size(NamedTuple):
    """e experts with M rows each, about `mean` of them valid, and N values of a result row."""

    experts: int
    rows: int
    width: int
    mean: int

    @property
    def name(self) -> str:
        return f"{self.experts}x{self.rows}x{self.width}, {self.mean} rows"

    def masked_m(self, seed: int = 0) -> np.ndarray:
        """`[e]` int32, uniform within 30% of the mean."""
        share = np.random.default_rng(seed).uniform(0.7, 1.3, self.experts)
        return np.minimum(np.rint(share * self.mean), self.rows).astype(np.int32)

    def bytes_moved(self, masked_m: np.ndarray) -> int:
        return int(masked_m.sum()) * (5 * self.width + 4 * self.width // GROUP)

    def copies(self, masked_m: np.ndarray) -> int:
        """Inputs whose valid rows fill the L2 cache more than once."""
        return int(np.clip(3 * _L2_BYTES / max(self.bytes_moved(masked_m), 1) + 1, 4, 12))


# Five sizes whose times for SGLang's kernel are known from earlier runs, then one expert alone and many.
SIZES = (
    Size(32, 1024, 2048, 20),
    Size(32, 1024, 2048, 192),
    Size(32, 1024, 2048, 1024),
    Size(6, 4096, 3072, 1024),
    Size(8, 1024, 7168, 512),
    Size(1, 8192, 2048, 4096),
    Size(256, 128, 2048, 8),
)


# -- right ---------------------------------------------------------------------------------------


def expected_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float8 codes `[k, N]` and float32 scales `[k, G]` of rows `[k, 2 N]`, with SGLang's rounding."""
    import ml_dtypes

    width = rows.shape[1] // 2
    gate, up = rows[:, :width].astype(np.float32), rows[:, width:]
    with np.errstate(over="ignore"):
        silu = (gate / (1 + np.exp(-gate))).astype(rows.dtype)
    value = (silu * up).astype(rows.dtype).astype(np.float32).reshape(len(rows), -1, GROUP)
    amax = np.maximum(np.abs(value).max(axis=-1), np.float32(FLOOR))
    scale = amax / np.float32(E4M3_MAX)
    scaled = np.clip(value * (1 / scale)[..., None], -E4M3_MAX, E4M3_MAX)
    return scaled.astype(ml_dtypes.float8_e4m3fn).reshape(len(rows), width), scale


def mismatch(q: np.ndarray, scales: np.ndarray, want: tuple[np.ndarray, np.ndarray]) -> str:
    """What is wrong with the codes (as bytes) and scales of some rows, "" when nothing is.

    No code is off by more than one step, under 0.5% by one; a scale is off by one step of bfloat16 at most,
    1% of them by more than float32's rounding.
    """
    found = [np.where(c & 0x80, -(c & 0x7F), c & 0x7F) for c in
             (x.view(np.uint8).astype(np.int32) for x in (q, want[0]))]  # fmt: skip
    off = np.abs(found[0] - found[1])
    if off.max(initial=0) > 1:
        at = np.unravel_index(off.argmax(), off.shape)
        return f"code {found[0][at]} for {found[1][at]} at {tuple(map(int, at))}"
    if off.mean() >= 0.005:
        return f"{off.mean():.2%} of the codes are off by one step"
    off = np.abs(scales / want[1] - 1)
    if not off.max(initial=0) <= 2**-7:  # a NaN is not
        return f"a scale is off by {off.max():.2e}"
    if (off > 1e-6).mean() > 0.01:
        return f"{(off > 1e-6).mean():.2%} of the scales are off"
    return ""


class Inputs:
    """x of every copy, on jax's device, and what NumPy makes of sampled rows of the first and last."""

    def __init__(self, size: Size, copies: int | None = None):
        import jax
        import jax.numpy as jnp

        self.size, self.masked_m = size, size.masked_m()
        count = copies or size.copies(self.masked_m)
        shape = (size.experts, size.rows, 2 * size.width)

        @jax.jit
        def make(key):
            x = jax.random.normal(key, shape, jnp.bfloat16)
            past = jnp.arange(size.rows, dtype="int32")[None] >= self.masked_m[:, None]
            return jnp.where(past[..., None], jnp.bfloat16(jnp.nan), x)  # nothing may read these

        self.x = [make(jax.random.key(k)) for k in range(count)]
        self.m = jnp.asarray(self.masked_m)
        valid = np.argwhere(np.arange(size.rows)[None] < self.masked_m[:, None])
        rng = np.random.default_rng(1)
        self.sample = valid[
            rng.choice(len(valid), min(_SAMPLED_ROWS, len(valid)), False, shuffle=False)
        ]
        at = tuple(self.sample.T)
        self.answers = {
            k: expected_rows(np.asarray(self.x[k][at])) for k in sorted({0, len(self.x) - 1})
        }

    def wrong(self, results: Sequence[tuple[Any, Any]]) -> str:
        """Compares `(q, row-major scales)` of each copy; q may be bytes or float8."""
        at = tuple(self.sample.T)
        for k, want in self.answers.items():
            q, scales = (np.asarray(a[at]) for a in results[k])
            if text := mismatch(q, scales, want):
                return f"input {k}: {text}"
        return ""


# -- providers -----------------------------------------------------------------------------------


def ours(size: Size, variant: tuple[int, int, bool] | None) -> Callable:
    """`(x, masked_m) -> (q, scales)`: as anybody calls it, or with given sizes of the kernel."""
    import jax

    import moe_align_jax as maj

    if variant is None:
        return maj.silu_and_mul_masked_quant
    from moe_align_jax import masked_quant
    from moe_align_jax._core.hopper import NUM_SMS
    from moe_align_jax._masked_quant import launch as kernels
    from moe_align_jax._masked_quant.config import Config

    tile, per_sm, prefetch = variant
    shape = (size.experts, size.rows, 2 * size.width)
    problem = masked_quant.make_problem(
        "benchmark", shape, "bfloat16", group_size=GROUP, scale_format="float32", scale_layout=None
    )
    config = Config(tile, NUM_SMS * per_sm, prefetch)
    return jax.jit(functools.partial(kernels.run, problem, config=config))


def measure_ours(inputs: Inputs, variant: Any, executions: int) -> tuple[str, Any]:
    import jax

    call = ours(inputs.size, variant)
    m = inputs.m

    def program(many):
        return [tuple(call(x, m)) for x in many]

    compiled = jax.jit(program).lower(inputs.x).compile()
    if wrong := inputs.wrong(compiled(inputs.x)):
        return wrong, None
    if jax.default_backend() == "cpu":
        run = lambda: jax.block_until_ready(compiled(inputs.x))  # noqa: E731
        return "", timing.time_wall(run, calls=len(inputs.x), repeats=3)
    return "", timing.time_jit_span(compiled, inputs.x, executions=executions)


@functools.cache
def _sglang(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("sgl_masked", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _torch_call(path: str) -> Callable:
    """`(input, output, scale, group, masked_m)`, writing in place: SGLang's, or ours from PyTorch."""
    if path:
        return _sglang(path).silu_and_mul_masked_post_quant_fwd
    from torch_bridge import sglang

    return sglang.silu_and_mul_masked_post_quant_fwd


def measure_torch(inputs: Inputs, path: str, replays: int) -> tuple[str, Any]:
    import torch

    from torch_bridge import to_torch

    call, size = _torch_call(path), inputs.size
    m = to_torch(inputs.m)
    calls, results = [], []
    for x in map(to_torch, inputs.x):
        shape = (size.experts, size.rows, size.width)
        q = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)
        s = torch.empty((*shape[:2], size.width // GROUP), dtype=torch.float32, device=x.device)
        calls.append(functools.partial(call, x, q, s, GROUP, m))
        results.append((q, s))
    calls[0]()
    taken = timing.time_torch_graph(calls, replays=replays)
    at = tuple(torch.from_numpy(inputs.sample.T.copy()).to(m.device))
    found = [(q.view(torch.uint8)[at].cpu().numpy(), s[at].cpu().numpy()) for q, s in results]
    for k, want in inputs.answers.items():
        if text := mismatch(*found[k], want):
            return f"input {k}: {text}", None
    return "", taken


def copy_calls(kind: str, bytes_moved: int, device: str = "cuda") -> list[Callable[[], Any]]:
    """Copies that read and write so many bytes together, from buffers that the L2 cache cannot all hold.

    "kernel": torch's addition of zero to float32, 16 bytes to a thread: what SMs can move. "memcpy": torch's
    copy_, which the driver carries out: in a CUDA graph on an H200 at 2.7 TB/s.
    """
    import torch

    count = max(2, min(12, 4 * _L2_BYTES // max(bytes_moved, 1) + 1))
    words = bytes_moved // 32 * 4  # of one side, both of them on 16-byte boundaries
    pairs = [torch.zeros(2, words, device=device) for _ in range(count)]
    if kind == "memcpy":
        return [functools.partial(b.copy_, a) for a, b in pairs]
    return [functools.partial(torch.add, a, 0.0, out=b) for a, b in pairs]


def time_copy(kind: str, bytes_moved: int, replays: int = 20) -> Any:
    return timing.time_torch_graph(copy_calls(kind, bytes_moved), replays=replays)


# -- a run ---------------------------------------------------------------------------------------


def run_size(size: Size, options: argparse.Namespace, peak: float | None) -> list[dict[str, Any]]:
    inputs = Inputs(size, options.copies)
    moved = size.bytes_moved(inputs.masked_m)
    tasks: dict[str, Callable[[], tuple[str, Any]]] = {
        "ours": lambda: measure_ours(inputs, None, options.executions)
    }
    for variant in VARIANTS if options.variants else []:
        name = f"ours, tile {variant[0]}, {variant[1]} CTAs an SM{', prefetch' * variant[2]}"
        tasks[name] = functools.partial(measure_ours, inputs, variant, options.executions)
    if options.sglang_masked:
        path = options.sglang_masked
        tasks["sglang"] = lambda: measure_torch(inputs, path, options.replays)
    if options.torch:
        tasks["ours from torch"] = lambda: measure_torch(inputs, "", options.replays)
    if peak:
        tasks["copy of as many bytes"] = lambda: ("", time_copy("kernel", moved, options.replays))
    rows = []
    for provider, measure in tasks.items():
        row = {"case": size.name, **size._asdict(), "provider": provider, "bytes": moved}
        row["valid_rows"] = int(inputs.masked_m.sum())
        try:
            wrong, taken = measure()
        except Exception as error:  # one provider's failure leaves the others their time
            wrong, taken = reason_of(error), None
        if taken is None:
            row |= {"status": "failed", "reason": wrong}
        else:
            us = taken.percentile(50)
            row |= {"status": "ok", "metric": taken.metric, "us": round(us, 3)}
            row |= {f"p{p}_us": round(taken.percentile(p), 3) for p in (20, 80)}
            row |= {"gbps": round(moved / us / 1e3, 1), "calls": taken.calls, "note": taken.note}
            row["kernels_per_call"] = taken.kernels_per_call
            if peak:
                row["of_copy"] = round(row["gbps"] / peak, 3)
        rows.append(row)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line per provider and case, with its ratio to SGLang's time."""
    peer = {r["case"]: r["us"] for r in rows if r["provider"] == "sglang" and "us" in r}
    lines = []
    for row in rows:
        if "us" not in row:
            lines.append(
                f"{row['case']:28} {row['provider']:36} {row['status']}: {row.get('reason')}"
            )
            continue
        ratio = f"{peer[row['case']] / row['us']:5.2f}x" if row["case"] in peer else "      "
        share = f"{row['of_copy']:6.1%} of a copy" if "of_copy" in row else ""
        lines.append(
            f"{row['case']:28} {row['provider']:36} {row['us']:9.2f} us {row['gbps']:8.1f} GB/s "
            f"{ratio} {share}"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sglang-masked", help="SGLang's file, as benchmarks.fetch leaves it")
    parser.add_argument("--variants", action="store_true", help="also other sizes of the kernel")
    parser.add_argument("--torch", action="store_true", help="also our function from PyTorch")
    parser.add_argument("--sizes", default="", help="numbers of the sizes to run, e.g. 0,1,4")
    parser.add_argument("--size", help="one size instead: experts,rows,width,mean")
    parser.add_argument("--copies", type=int, help="inputs per program")
    parser.add_argument("--executions", type=int, default=12)
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument("--out", help="JSONL file to append to")
    options = parser.parse_args(argv)
    sizes = [SIZES[int(k)] for k in options.sizes.split(",") if k] or list(SIZES)
    if options.size:
        sizes = [Size(*map(int, options.size.split(",")))]
    if options.sglang_masked and not Path(options.sglang_masked).is_file():
        parser.error(f"--sglang-masked names no file: {options.sglang_masked}")
    import jax

    peak = None
    facts: dict[str, Any] = machine.facts()
    if jax.default_backend() == "gpu":
        rates = {
            kind: 2 * _COPY_BYTES / time_copy(kind, 2 * _COPY_BYTES).percentile(50) / 1e3
            for kind in ("kernel", "memcpy")
        }
        peak = rates["kernel"]
        facts |= {f"copy_{kind}_gbps": round(rate, 1) for kind, rate in rates.items()}
        print(f"copy of {_COPY_BYTES >> 20} MiB, read and written, GB/s: {rates}", flush=True)
    failed, out = 0, Writer(options.out, facts)
    for size in sizes:
        rows = run_size(size, options, peak)
        print("\n".join(summary(rows)), flush=True)
        failed += sum(row["status"] == "failed" for row in rows)
        out.write(rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
