"""A GPU's own clock around a step: a kernel ahead of it and one behind it, which store `%globaltimer`.

No profiler runs. CUPTI, which the profiler's spans come from, slows the launch of CUDA graphs and kernels, so
that a span under it can exceed the wall clock of the same program.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_align_jax._simt import mosaic

# XLA 0.11.2 and 0.12 make one fusion of a slice and a custom call that reads it, even where that call hands
# the slice on in its own memory. The fusion's result is other memory, which then nothing writes.
_OPTIONS = {"xla_gpu_enable_dynamic_slice_fusion": False}
_WORDS = 2  # of a time: the lower 32 bits of the nanoseconds first
_FIRST = (
    ".reg .pred first; .reg .u32 me; mov.u32 me, %tid.x; setp.eq.u32 first, me, 0; "
    "@!first bra done; "
)
_NOW = f"{{ .reg .u64 now; {_FIRST} mov.u64 now, %globaltimer; st.u64 [$0], now; done: }}"
# The least step of the timer that is seen in 2**16 readings, some 10 of its steps if they are 100 ns.
_TICK = (
    f"{{ .reg .u64 now, last, step, least; .reg .u32 n; .reg .pred moved, more; {_FIRST} "
    "mov.u64 last, %globaltimer; mov.u64 least, -1; mov.u32 n, 0; "
    "again: mov.u64 now, %globaltimer; sub.u64 step, now, last; mov.u64 last, now; "
    "setp.ne.u64 moved, step, 0; @moved min.u64 least, least, step; "
    "add.u32 n, n, 1; setp.lt.u32 more, n, 65536; @more bra again; st.u64 [$0], least; done: }"
)


def stamped(tree: Any) -> tuple[Any, jax.Array]:
    """(the tree, the time `[1, 2]` int32) when all of it is there, ahead of what uses the tree returned."""
    leaves, kind = jax.tree.flatten(tree)
    *leaves, now = mosaic.run_between(leaves, "benchmark_time", _NOW, _WORDS)
    return jax.tree.unflatten(kind, leaves), now


def tick_ns() -> int:
    """The least step of the first GPU's timer."""
    with jax.default_device(jax.local_devices()[0]):
        [words] = jax.jit(lambda: mosaic.run_between([], "benchmark_tick", _TICK, _WORDS))()
    return int(nanoseconds(np.asarray(words))[0])


def around(function: Callable, carry: Any) -> Callable:
    """`(carry, *rest) -> (carry, starts, ends)` of a step `(carry, *rest) -> carry`.

    Starts and ends are `[D, 2]` int32, a time of each device that holds the carry. Donate the carry: the
    timer's kernels hand it on in its own memory, for which XLA makes a copy of one that is not donated.
    """
    shardings = [leaf.sharding for leaf in jax.tree.leaves(carry)]
    stamp = lambda tree: stamped(tree)  # noqa: E731  (what a test puts in its place counts)
    if isinstance(shardings[0], NamedSharding) and shardings[0].mesh.size > 1:
        mesh = shardings[0].mesh
        specs = jax.tree.map(lambda leaf: leaf.sharding.spec, carry)
        stamp = jax.shard_map(
            stamp,
            mesh=mesh,
            in_specs=(specs,),
            out_specs=(specs, P(mesh.axis_names)),
            check_vma=False,
        )

    def timed(carry, *rest):
        carry, starts = stamp(carry)
        carry, ends = stamp(function(carry, *rest))
        return carry, starts, ends

    return timed


def jitted(function: Callable, carry: Any) -> Callable:
    """`around` as a jitted function whose carry is donated."""
    return jax.jit(around(function, carry), donate_argnums=0, compiler_options=_OPTIONS)


def nanoseconds(times: np.ndarray) -> np.ndarray:
    """`[D]` uint64 of `[D, 2]` int32."""
    low, high = np.asarray(times).view(np.uint32).astype(np.uint64).T
    return low | high << np.uint64(32)


def span_ns(starts: np.ndarray, ends: np.ndarray) -> tuple[int, int]:
    """(the time on the GPU that began last, by how much longer any other GPU took).

    A GPU that begins earlier waits for that one in its first exchange, and all end together: so the one that
    began last took the least time. No GPU's timer is held against another one's.
    """
    taken = nanoseconds(ends) - nanoseconds(starts)
    return int(taken.min()), int(taken.max() - taken.min())
