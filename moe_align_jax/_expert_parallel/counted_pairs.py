"""Counts pairs of an expert, in a kernel whose warps hold the ids of all pairs together.

The place of a pair in its expert's box is the number of pairs of the same expert before it. Each warp counts
what it holds, and leaves it in shared memory, where the warps' counts are summed up. Nothing is atomic.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

from moe_align_jax._simt.language import Int, Simt

# Ids that a thread holds, and which pair the first of them is.
type Held = list[tuple[Int, Sequence[Int]]]


def counted(t: Simt, held: Held, expert: Int, end: Int | int) -> Int:
    """How many of the ids that the warp holds are the expert's and stand before the end."""
    total = t.const(0)
    for first, ids in held:
        before = end - first
        for k, one in enumerate(ids):
            # mutant: a pair is counted before itself
            total = total + t.select(one.eq(expert) & (before > k), 1, 0)
    return t.warp_sum(total)


def summed(t: Simt, ref: Any, at: Int, stride: int, warps: int) -> Int:
    """The sum of what so many warps have left, `stride` words apart, from `at` on."""
    return functools.reduce(operator.add, [t.load(ref, at + k * stride) for k in range(warps)])
