"""The two kernels of a stable counting sort over many CTAs, shared by the forms "grid" and "radix".

CTA g owns a contiguous run of pairs. The count kernel makes one histogram per CTA; the CTAs of a cluster add
theirs up through each other's shared memory, and write one row per cluster, and what stands before each CTA
within its cluster. The place kernel adds up the rows before and of all clusters, scans the bins, ranks its
own pairs (each warp a contiguous run, with a histogram of its own) and hands every pair its row. (Every CTA
reads every row: with a row per CTA that was the longest phase, H200.) No atomics decide an order:
deterministic.
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
    cluster: int = 1

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
        """Two counts of 16 bits per word of a row."""
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
        if layout.cluster > 1:
            _add_up_cluster(t, r, layout, histograms)
            return
        t.block_sync()
        for i in t.for_range(tid, words, threads):
            if layout.packed:
                low, high = (t.load(r.histogram, i * 2 + k) for k in range(2))
                t.store(getattr(r, histograms), cta * words + i, low | (high << 16))
            else:
                t.store(getattr(r, histograms), cta * words + i, t.load(r.histogram, i))

    outputs: dict[str, tuple[int, ...]] = {histograms: (layout.num_rows * words,)}
    if layout.cluster > 1:
        outputs[_within(histograms)] = (layout.num_ctas * layout.num_bins,)
    return Kernel(
        name=name,
        body=body,
        inputs=inputs,
        outputs=outputs,
        shared={"histogram": -(-layout.stride // 8) * 8},
        num_warpgroups=layout.num_warpgroups,
        num_ctas=layout.num_ctas,
        cluster=layout.cluster,
    )


def _within(histograms: str) -> str:
    """Name of `[num_ctas * num_bins]`: what the CTAs before mine in its cluster have counted."""
    return f"{histograms}_within"


def _add_up_cluster(t: Simt, r: SimpleNamespace, layout: Layout, histograms: str) -> None:
    """Each CTA adds up its share of the bins over the cluster; adjacent lanes read one bin of its CTAs."""
    tid, cta, cluster = t.thread_id(), t.cta_id(), layout.cluster
    peer, lane = tid & (cluster - 1), tid & (WARP - 1)
    rank = cta & (cluster - 1)
    share = -(-layout.stride // (4 * cluster)) * 4  # a multiple of 4: warps are whole
    rows, within = getattr(r, histograms), getattr(r, _within(histograms))
    t.cluster_sync()
    # Every load before the first store, for cluster_arrive.
    rounds = -(-share * cluster // layout.threads)
    counted = []
    for k in range(rounds):
        offset = (tid + k * layout.threads) >> (cluster.bit_length() - 1)
        bin_ = rank * share + offset
        there = (offset < share) & (bin_ < layout.num_bins)
        count = t.value_if(there, lambda b=bin_: t.load_peer(r.histogram, b, cta - rank + peer), 0)
        counted.append((bin_, there, count))
    t.cluster_arrive()
    for bin_, there, count in counted:
        through, distance = count, 1
        while distance < cluster:
            other = t.shfl_up(through, distance)
            through = through + t.select(peer >= distance, other, 0)
            distance *= 2
        with t.if_(there):
            t.store(within, (cta - rank + peer) * layout.num_bins + bin_, through - count)
        row = (cta >> (cluster.bit_length() - 1)) * layout.words
        last = there & peer.eq(cluster - 1)
        if layout.packed:
            following = t.shfl(through, (lane + cluster) & (WARP - 1))  # that of the next bin
            with t.if_(last & (bin_ & 1).eq(0)):
                t.store(rows, row + (bin_ >> 1), through | (following << 16))
        else:
            with t.if_(last):
                t.store(rows, row + bin_, through)
    t.cluster_wait()


class HistogramSums:
    """In the place kernel: the rows summed over all clusters, and over those before mine.

    Groups of threads share the rows. `read` issues the loads, `add` uses them: what stands between
    hides their latency.
    """

    _MOST_WORDS = 24  # held in registers between the two

    def __init__(self, t: Simt, r: SimpleNamespace, layout: Layout, histograms: str):
        self._t, self._r, self._layout, self._histograms = t, r, layout, histograms
        columns = 1 << (layout.words - 1).bit_length()
        # No more groups than rows: the others would only add zeros.
        most = 1 << (layout.num_rows - 1).bit_length()
        self._groups = max(1, min(layout.threads // columns, most))
        self._columns, self._rounds = columns, -(-layout.words // layout.threads)
        self._rows = -(-layout.num_rows // self._groups)
        self._held: list[list[Int]] | None = None

    def _place(self, round_: Int | int) -> tuple[Int, Int | int]:
        """(column, group) of this thread."""
        tid = self._t.thread_id()
        if self._groups > 1:
            return tid & (self._columns - 1), tid >> (self._columns.bit_length() - 1)
        return tid + round_ * self._layout.threads, 0

    def _load(self, round_: Int | int) -> list[Int]:
        """This thread's words of a column, of the first one where it has none."""
        t, layout = self._t, self._layout
        column, group = self._place(round_)
        there = self._there(column, group)
        words = []
        for j in range(self._rows):
            row, inside = self._row(j, group)
            at = t.select(there & inside, row * layout.words + column, 0)
            words.append(t.load(getattr(self._r, self._histograms), at))
        return words

    def _row(self, j: int, group: Int | int) -> tuple[Int, Int]:
        """The j-th row of a group, and whether there is one."""
        row = self._t.const(j * self._groups) + group
        return row, row < self._layout.num_rows

    def _there(self, column: Int, group: Int | int) -> Int:
        there = column < self._layout.words
        return there if isinstance(group, int) else there & (group < self._groups)

    def read(self) -> None:
        """After the `grid_dependency_wait`."""
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
        t, layout = self._t, self._layout
        column, group = self._place(round_)
        my_row = t.cta_id() >> (layout.cluster.bit_length() - 1)
        halves = 2 if layout.packed else 1
        sums = [[t.const(0), t.const(0)] for _ in range(halves)]
        for j, word in enumerate(words):
            row, inside = self._row(j, group)
            mine = my_row > row
            for half, count in zip(
                sums, [word & 0xFFFF, word >> 16] if layout.packed else [word], strict=True
            ):
                if layout.num_rows % self._groups:
                    count = t.select(inside, count, 0)
                half[0] = half[0] + count
                half[1] = half[1] + t.select(mine, count, 0)
        with t.if_(self._there(column, group)):
            for k, (total, earlier) in enumerate(sums):
                bin_ = column * halves + k
                for name, count in ((totals, total), (before, earlier)):
                    (t.atomic_add if self._groups > 1 else t.store)(
                        getattr(self._r, name), bin_, count
                    )
