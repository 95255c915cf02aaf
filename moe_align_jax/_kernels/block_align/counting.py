"""The two kernels of a stable counting sort over many CTAs, shared by the forms "grid" and "radix".

CTA g owns a contiguous run of pairs. The count kernel writes one histogram per CTA. The place kernel adds
up the histograms before and of all CTAs, scans the bins, ranks its own pairs (each warp a contiguous run,
with a histogram of its own) and hands every pair its row. No atomics decide an order: deterministic.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from moe_align_jax._kernels.block_align import common
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, WARPGROUP, Int, Kernel, Shapes, Simt
from moe_align_jax.types import AlignProblem

type ReadBin = Callable[[Simt, SimpleNamespace, Int], Int]  # pair -> bin, -1 for none


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the pairs are cut up: CTA g owns `tiles` tiles, a warp `rounds` runs of 32 in each."""

    num_pairs: int
    num_bins: int
    num_ctas: int
    num_warpgroups: int
    rounds: int

    @property
    def threads(self) -> int:
        return self.num_warpgroups * WARPGROUP

    @property
    def num_warps(self) -> int:
        return self.threads // WARP

    @property
    def tile(self) -> int:
        """Pairs per CTA and tile."""
        return self.rounds * self.threads

    @property
    def tiles(self) -> int:
        return -(-self.num_pairs // (self.tile * self.num_ctas))

    def tiles_of(self, num_pairs: Int | int) -> Int | int:
        """Tiles of a CTA for that many pairs, at most `num_pairs` of the layout."""
        return 1 if self.tiles == 1 else common.cdiv(num_pairs, self.tile * self.num_ctas)

    @property
    def packed(self) -> bool:
        """Two counts of 16 bits per word."""
        return self.tiles * self.tile < 1 << 16

    @property
    def words(self) -> int:
        """Words of a CTA's histogram in global memory."""
        return -(-self.num_bins // 2) if self.packed else self.num_bins

    @property
    def stride(self) -> int:
        """Words of a histogram in shared memory: room for the packed pair of the last bin."""
        return -(-self.num_bins // 4) * 4


def count_kernel(
    name: str,
    problem: AlignProblem,
    layout: Layout,
    read_bin: ReadBin,
    inputs: Shapes,
    histograms: str,
) -> Kernel:
    """Writes `histograms` `[num_ctas * words]`: the bins of each CTA's pairs."""
    threads, words = layout.threads, layout.words

    def body(t: Simt, r: SimpleNamespace) -> None:
        tid, cta = t.thread_id(), t.cta_id()
        t.grid_dependency_wait()
        t.launch_dependents()
        tiles = layout.tiles_of(common.Sizes(t, r, problem).num_pairs)
        first = cta * (tiles * layout.tile)

        def count(bins: list[Int]) -> None:
            for bin_ in bins:
                with t.if_(bin_ >= 0):
                    t.atomic_add(r.histogram, bin_, 1)

        def read(start: Int | int) -> list[Int]:
            return [
                read_bin(t, r, first + (start + (k * threads + tid))) for k in range(layout.rounds)
            ]

        once = read(0) if layout.tiles == 1 else []
        collectives.fill(t, r.histogram, 0, layout.stride, tid, threads, vector=True)
        t.block_sync()
        if layout.tiles == 1:
            count(once)
        else:
            for tile in t.for_range(0, tiles):
                count(read(tile * layout.tile))
        t.block_sync()
        for i in t.for_range(tid, words, threads):
            if layout.packed:
                low, high = (t.load(r.histogram, i * 2 + k) for k in range(2))
                t.store(getattr(r, histograms), cta * words + i, low | (high << 16))
            else:
                t.store(getattr(r, histograms), cta * words + i, t.load(r.histogram, i))

    return Kernel(
        name=name,
        body=body,
        inputs=inputs,
        outputs={histograms: (layout.num_ctas * words,)},
        shared={"histogram": -(-layout.stride // 8) * 8},
        num_warpgroups=layout.num_warpgroups,
        num_ctas=layout.num_ctas,
    )


def sum_histograms(
    t: Simt, r: SimpleNamespace, layout: Layout, histograms: str, before: str, totals: str
) -> None:
    """Adds the CTAs' histograms into shared `totals`, and those of the CTAs before mine into `before`
    (both zeroed, a `block_sync` ago). Groups of threads share the rows."""
    tid, cta = t.thread_id(), t.cta_id()
    words, num_ctas, threads = layout.words, layout.num_ctas, layout.threads
    columns = 1 << (words - 1).bit_length()
    # No more groups than rows: the others would only add zeros.
    groups = max(1, min(threads // columns, 1 << (num_ctas - 1).bit_length()))
    source, halves = getattr(r, histograms), 2 if layout.packed else 1

    def add(column: Int, group: Int | int, atomic: bool) -> None:
        sums = [[t.const(0), t.const(0)] for _ in range(halves)]
        for j in range(-(-num_ctas // groups)):
            row = j * groups + group
            at = row * words + column
            if num_ctas % groups == 0:
                word = t.load(source, at)
            else:
                there = row < num_ctas
                word = t.value_if(there, lambda at=at: t.load(source, at), 0)  # type: ignore[arg-type]
            mine = cta > row
            for half, count in zip(
                sums, [word & 0xFFFF, word >> 16] if halves == 2 else [word], strict=True
            ):
                half[0] = half[0] + count
                half[1] = half[1] + t.select(mine, count, 0)
        for k, (total, earlier) in enumerate(sums):
            bin_ = column * halves + k
            if atomic:
                t.atomic_add(getattr(r, totals), bin_, total)
                t.atomic_add(getattr(r, before), bin_, earlier)
            else:
                t.store(getattr(r, totals), bin_, total)
                t.store(getattr(r, before), bin_, earlier)

    if groups == 1:
        for column in t.for_range(tid, words, threads):
            add(column, 0, atomic=False)
    else:
        column, group = tid & (columns - 1), tid >> (columns.bit_length() - 1)
        with t.if_((column < words) & (group < groups)):
            add(column, group, atomic=True)
