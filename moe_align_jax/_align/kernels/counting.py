"""The two kernels of a stable counting sort over many CTAs, shared by the forms "grid" and "radix".

CTA g owns a contiguous run of pairs. The count kernel makes one histogram per CTA; the CTAs of a cluster post
theirs to each other, add them up, and write one row per cluster, and what stands before each CTA within its
cluster. The place kernel adds up the rows before and of all clusters, scans the bins, ranks its
own pairs (each warp a contiguous run, with a histogram of its own) and hands every pair its row. (Every CTA
reads every row: with a row per CTA that was the longest phase, H200.) No atomics decide an order:
deterministic.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from moe_align_jax._align.kernels import common
from moe_align_jax._core.int32 import cdiv
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, WARPGROUP, Int, Kernel, Shapes, Simt
from moe_align_jax.types import AlignProblem

type ReadBin = Callable[[Simt, SimpleNamespace, Int], Int]  # pair -> bin, -1 for none


@dataclass(frozen=True, kw_only=True)
class Partition:
    """How the pairs are cut up: CTA g owns `tiles` tiles, a warp `rounds` runs of 32 in each."""

    num_pairs: int
    num_bins: int
    num_ctas: int
    num_warpgroups: int
    rounds: int
    cluster: int = 1

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.num_warpgroups * WARPGROUP

    @property
    def num_warps(self) -> int:
        """Warps of a CTA."""
        return self.threads // WARP

    @property
    def tile(self) -> int:
        """Pairs per CTA and tile."""
        return self.rounds * self.threads

    @property
    def tiles(self) -> int:
        """Tiles of a CTA: with those of all CTAs they hold all pairs."""
        return -(-self.num_pairs // (self.tile * self.num_ctas))

    def tiles_of(self, num_pairs: Int | int) -> Int | int:
        """Tiles of a CTA for that many pairs, at most `num_pairs` of the partition."""
        return 1 if self.tiles == 1 else cdiv(num_pairs, self.tile * self.num_ctas)

    @property
    def packed(self) -> bool:
        """Whether a row packs two 16-bit counts into each word."""
        return self.cluster * self.tiles * self.tile < 1 << 16

    @property
    def num_rows(self) -> int:
        """Histograms in global memory: one per cluster."""
        return self.num_ctas // self.cluster

    @property
    def words(self) -> int:
        """Words of such a row."""
        return -(-self.num_bins // 2) if self.packed else self.num_bins

    @property
    def stride(self) -> int:
        """Words of a histogram in shared memory: whole 16 bytes."""
        return -(-self.num_bins // 4) * 4


def count_kernel(
    name: str,
    problem: AlignProblem,
    partition: Partition,
    read_bin: ReadBin,
    inputs: Shapes,
    histograms: str,
) -> Kernel:
    """Writes `histograms` `[num_ctas * words]`: the bins of each CTA's pairs."""
    threads = partition.threads

    def body(t: Simt, r: SimpleNamespace) -> None:
        tid, cta = t.thread_id(), t.cta_id()
        t.grid_dependency_wait()
        t.launch_dependents()
        tiles = partition.tiles_of(common.Sizes(t, r, problem).num_pairs)
        first = cta * (tiles * partition.tile)

        def count(bins: list[Int]) -> None:
            for bin_ in bins:  # dropped pairs have an additional bin: cheaper than a branch
                # mutant: dropped pairs are counted
                t.atomic_add(r.histogram, t.select(bin_ >= 0, bin_, partition.stride), 1)

        def read(start: Int | int) -> list[Int]:
            return [
                read_bin(t, r, first + (start + (k * threads + tid)))
                for k in range(partition.rounds)
            ]

        once = read(0) if partition.tiles == 1 else []
        collectives.fill(t, r.histogram, 0, partition.stride + 1, tid, threads, vector=True)
        # mutant: no barrier between the zeros and the atomics
        t.block_sync()
        if partition.tiles == 1:
            count(once)
        else:
            for tile in t.for_range(0, tiles):
                count(read(tile * partition.tile))
        # mutant: no barrier between the atomics and the loads
        t.block_sync()
        write_histogram(t, r, partition, histograms, r.histogram)

    return Kernel(
        name=name,
        body=body,
        inputs=inputs,
        outputs=histogram_outputs(partition, histograms),
        shared={"histogram": partition.stride + 1},
        num_warpgroups=partition.num_warpgroups,
        num_ctas=partition.num_ctas,
        cluster=partition.cluster,
        mailbox=mailbox_words(partition),
    )


def _within(histograms: str) -> str:
    """Name of `[num_ctas * num_bins]`: what the CTAs before mine in its cluster have counted."""
    return f"{histograms}_within"


def histogram_outputs(partition: Partition, histograms: str) -> dict[str, tuple[int, ...]]:
    """What `write_histogram` writes and `HistogramSums` reads."""
    outputs: dict[str, tuple[int, ...]] = {histograms: (partition.num_rows * partition.words,)}
    if partition.cluster > 1:
        outputs[_within(histograms)] = (partition.num_ctas * partition.num_bins,)
    return outputs


def mailbox_words(partition: Partition) -> int:
    """Words of the mailbox of a kernel that ends with `write_histogram`."""
    return partition.cluster * _share(partition) if partition.cluster > 1 else 0


def _share(partition: Partition) -> int:
    """Bins that a CTA adds up over its cluster: whole vectors, and whole words of a row."""
    return -(-partition.stride // (4 * partition.cluster)) * 4


def write_histogram(
    t: Simt, r: SimpleNamespace, partition: Partition, histograms: str, histogram: Any
) -> None:
    """At the end of a kernel, after a `block_sync`: what each CTA has in shared `histogram`, added up over
    its cluster. Each CTA gets its share of the bins from all of them."""
    tid, cta, cluster, threads = t.thread_id(), t.cta_id(), partition.cluster, partition.threads
    rows, words = getattr(r, histograms), partition.words
    if cluster == 1:
        for i in t.for_range(tid, words, threads):
            if partition.packed:
                low, high = (t.load(histogram, i * 2 + k) for k in range(2))
                t.store(rows, cta * words + i, low | (high << 16))
            else:
                t.store(rows, cta * words + i, t.load(histogram, i))
        return
    # mutant: mail is posted before all CTAs run
    t.cluster_ready()
    share = _share(partition)
    rank = cta & (cluster - 1)
    first = cta - rank
    for i in t.for_range(tid * 4, share * cluster, threads * 4):
        to = i // share
        there = i < partition.stride
        counts = t.values_if(there, lambda i=i: t.load4(histogram, i), [t.const(0)] * 4)
        # mutant: a cluster's shares overlap
        t.post(first + to, rank * share + (i - to * share), *counts)
    box = t.mail()
    within = getattr(r, _within(histograms))
    row = (cta >> (cluster.bit_length() - 1)) * words
    for offset in t.for_range(tid, -(-share // WARP) * WARP, threads):  # whole warps
        bin_ = rank * share + offset
        there = (offset < share) & (bin_ < partition.num_bins)
        safe = t.select(there, offset, 0)
        counts = [t.load(box, safe + k * share) for k in range(cluster)]
        running = t.const(0)
        for k, count in enumerate(counts):
            with t.if_(there):
                t.store(within, (first + k) * partition.num_bins + bin_, running)
            # mutant: the prefix within a cluster is twice as large
            running = running + count
        if partition.packed:
            running = t.select(there, running, 0)
            following = t.shfl(running, (tid + 1) & (WARP - 1))  # that of the next bin
            with t.if_(there & (bin_ & 1).eq(0)):
                t.store(rows, row + (bin_ >> 1), running | (following << 16))
        else:
            with t.if_(there):
                t.store(rows, row + bin_, running)


class HistogramSums:
    """In the place kernel: the rows summed over all clusters, and over those before mine.

    Groups of threads share the rows. `read` issues the loads, `add` uses them: what stands between
    hides their latency.
    """

    _MOST_WORDS = 24  # held in registers between `read` and `add`

    def __init__(self, t: Simt, r: SimpleNamespace, partition: Partition, histograms: str):
        self._t, self._r, self._layout, self._histograms = t, r, partition, histograms
        columns = 1 << (partition.words - 1).bit_length()
        # No more groups than rows: additional groups would only add zeros.
        most = 1 << (partition.num_rows - 1).bit_length()
        self._groups = max(1, min(partition.threads // columns, most))
        self._columns, self._rounds = columns, -(-partition.words // partition.threads)
        self._rows = -(-partition.num_rows // self._groups)
        self._held: list[list[Int]] | None = None

    def _place(self, round_: Int | int) -> tuple[Int, Int | int]:
        """(column, group) of this thread."""
        tid = self._t.thread_id()
        if self._groups > 1:
            return tid & (self._columns - 1), tid >> (self._columns.bit_length() - 1)
        return tid + round_ * self._layout.threads, 0

    def _load(self, round_: Int | int) -> list[Int]:
        """This thread's words of a column, of the first one where it has none."""
        t, partition = self._t, self._layout
        column, group = self._place(round_)
        there = self._there(column, group)
        words = []
        for j in range(self._rows):
            row, inside = self._row(j, group)
            at = t.select(there & inside, row * partition.words + column, 0)
            words.append(t.load(getattr(self._r, self._histograms), at))
        return words

    def _row(self, j: int, group: Int | int) -> tuple[Int, Int]:
        """The j-th row of a group, and whether there is one."""
        row = self._t.const(j * self._groups) + group
        return row, row < self._layout.num_rows

    def _there(self, column: Int, group: Int | int) -> Int:
        """Whether there are such a column and group: the last round of a CTA may go past the end."""
        there = column < self._layout.words
        return there if isinstance(group, int) else there & (group < self._groups)

    def read(self) -> None:
        """Starts the loads of the rows; call it after the `grid_dependency_wait`."""
        if self._rounds * self._rows <= self._MOST_WORDS:
            self._held = [self._load(k) for k in range(self._rounds)]

    def before_me(self, bin_: Int) -> Int | int:
        """What the CTAs before mine in its cluster counted of a bin (>= 0)."""
        if self._layout.cluster == 1:
            return 0
        within = getattr(self._r, _within(self._histograms))
        return self._t.load(within, self._t.cta_id() * self._layout.num_bins + bin_)

    def add(self, before: str, totals: str) -> None:
        """Into shared `totals`, and what the clusters before mine counted into `before` (both zeroed, a
        `block_sync` ago; one follows)."""
        if self._held is not None:
            for k, words in enumerate(self._held):
                self._add(k, words, before, totals)
            return
        for k in self._t.for_range(0, self._rounds):
            self._add(k, self._load(k), before, totals)

    def _add(self, round_: Int | int, words: list[Int], before: str, totals: str) -> None:
        """Adds the words of a round to the sums in shared memory.

        Args:
            round_: its number.
            words: loaded ones, one per row of this thread's group.
            before, totals: names of the sums over the clusters before this one, and over all.
        """
        t, partition = self._t, self._layout
        column, group = self._place(round_)
        my_row = t.cta_id() >> (partition.cluster.bit_length() - 1)
        halves = 2 if partition.packed else 1
        sums = [[t.const(0), t.const(0)] for _ in range(halves)]
        for j, word in enumerate(words):
            row, inside = self._row(j, group)
            # mutant: a CTA's pairs count twice
            mine = my_row > row
            for half, count in zip(
                sums, [word & 0xFFFF, word >> 16] if partition.packed else [word], strict=True
            ):
                if partition.num_rows % self._groups:
                    count = t.select(inside, count, 0)
                half[0] = half[0] + count
                half[1] = half[1] + t.select(mine, count, 0)
        with t.if_(self._there(column, group)):
            for k, (total, earlier) in enumerate(sums):
                bin_ = column * halves + k
                for name, count in ((totals, total), (before, earlier)):
                    # mutant: sums are stored, not added
                    (t.atomic_add if self._groups > 1 else t.store)(
                        getattr(self._r, name), bin_, count
                    )
