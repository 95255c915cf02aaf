"""What is composed of the language's primitives: choices, scans, tallies, fills, meetings of devices."""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

from moe_align_jax._core.int32 import INT32_MAX
from moe_align_jax._simt.language import WARP, Int, Simt


def lanes_below(t: Simt, lane: Int) -> Int:
    """Mask of the lanes before mine."""
    return (t.const(1) << lane) - 1


def value_if(t: Simt, condition: Int, compute: Callable[[], Int], other: Int | int) -> Int:
    """`condition ? compute() : other`, with compute() executed only where the condition holds."""
    return t.values_if(condition, lambda: [compute()], [other])[0]


def device_sync(t: Simt) -> None:
    """By all threads, once: tells my peers that my CTA stores no more there, and waits until all of them have
    told it. Then my CTA may read what its peers wrote here."""
    t.device_arrive()
    with t.if_(t.thread_id() < WARP):
        t.device_wait()
    t.block_sync()


def strided(t: Simt, start: Int, stop: Int | int, step: int) -> Iterator[Int]:
    """`start, start + step, ...` below stop. Near the int32 limit it counts rounds, which cannot wrap."""
    if not isinstance(stop, int) or stop <= INT32_MAX - 2 * step:
        yield from t.for_range(start, stop, step)
        return
    rest = t.select(start.below(stop), stop - start, 0)
    for k in t.for_range(0, -(-stop // step)):
        with t.if_((k * step).below(rest)):
            yield start + k * step


def fill(
    t: Simt,
    ref: Any,
    value: Int | int,
    count: Int | int,
    thread: Int,
    threads: int,
    *,
    vector: bool,
):
    """`ref[:count] = value` by `threads` threads; with `vector`, 16 bytes at a time."""
    if not vector:
        for i in strided(t, thread, count, threads):
            t.store(ref, i, value)
        return
    whole, first = count // 4 * 4, thread * 4
    if not isinstance(count, int):
        # Most counts are small: the loop, which the assembler unrolls, is left out then.
        with t.if_(first < whole):
            t.store4(ref, first, value)
        first = first + threads * 4
    if not isinstance(whole, int) or whole:
        for i in strided(t, first, whole, threads * 4):
            t.store4(ref, i, value)
    if not isinstance(count, int) or count % 4:
        with t.if_(thread < count - whole):
            # mutant: a fill begins one cell late
            t.store(ref, thread + whole, value)


def warp_inclusive_scan(t: Simt, x: Int, lane: Int, width: int = WARP) -> Int:
    """Over the first `width` lanes."""
    distance = 1
    while distance < width:
        y = t.shfl_up(x, distance)
        # mutant: the scan adds one lane too few
        x = x + t.select(lane >= distance, y, 0)
        distance *= 2
    return x


def block_exclusive_scan(t: Simt, x: Int, scratch: Any) -> tuple[Int, Int]:
    """(sum of x over the threads before mine, sum over all). `scratch` holds a word per warp; a
    `block_sync` must lie between two uses of one scratch."""
    [result] = block_exclusive_scans(t, [x], scratch)
    return result


def block_exclusive_scans(t: Simt, xs: list[Int], scratch: Any) -> list[tuple[Int, Int]]:
    """Several scans behind one barrier; `scratch` holds WARP words for each."""
    tid = t.thread_id()
    lane, warp = tid & (WARP - 1), tid >> 5
    num_warps = t.num_threads // WARP
    inclusive = [warp_inclusive_scan(t, x, lane) for x in xs]
    with t.if_(lane.eq(WARP - 1)):
        for k, value in enumerate(inclusive):
            t.store(scratch, warp + k * WARP, value)
    # mutant: the scan's block barrier is a warp barrier
    t.block_sync()
    results = []
    for k, (x, value) in enumerate(zip(xs, inclusive, strict=True)):
        sums = value_if(t, lane < num_warps, lambda k=k: t.load(scratch, lane + k * WARP), 0)
        running = warp_inclusive_scan(
            t, sums, lane, num_warps
        )  # every warp does it again: saves a barrier
        # mutant: the sum of the warps before includes one's own
        before = t.shfl(running - sums, warp)
        results.append((value - x + before, t.shfl(running, num_warps - 1)))
    return results


def match_bits(t: Simt, x: Int, bits: int) -> Int:
    """Mask of the lanes whose low `bits` bits equal mine: one ballot per bit. (`match_any` is 3x slower
    where a warp holds many distinct values: H200, 2026-11-21.)"""
    masks = [t.same_bit(x, bit) for bit in range(bits)]
    return functools.reduce(operator.and_, masks) if masks else t.const(-1)


def tally(
    t: Simt, histogram: Any, row: Int, bin_: Int, lane: Int, bits: int, all_used: bool = False
) -> Int:
    """Counts one bin per lane (-1 = none) into the warp's row of the histogram; returns each one's stable
    rank among the warp's so far. The row is the warp's own, so no atomics. Bins differ in their low `bits`
    bits, and so does -1 unless they take all values (`all_used`)."""
    same = match_bits(t, bin_, bits)
    counted = bin_ >= 0
    if all_used:
        same = same & t.ballot(counted)
    rank = t.popc(same & lanes_below(t, lane))
    before = value_if(t, counted, lambda: t.load(histogram, row + bin_), 0)
    # mutant: no barrier before a warp's histogram is written
    # mutant: not all lanes are at the barrier
    t.warp_sync()
    with t.if_(counted & rank.eq(0)):
        t.store(histogram, row + bin_, before + t.popc(same))
    # mutant: no barrier after a warp's histogram is written
    t.warp_sync()
    return before + rank


def column_scan(t: Simt, histogram: Any, column: Int, num_rows: int, stride: int) -> Int:
    """`histogram[w, column] := sum(histogram[:w, column])`; returns the sum of the column."""
    counts = [t.load(histogram, column + w * stride) for w in range(num_rows)]
    running = t.const(0)
    for w in range(num_rows):
        t.store(histogram, column + w * stride, running)
        running = running + counts[w]
    return running
