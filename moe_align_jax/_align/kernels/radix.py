"""Any number of experts: a radix sort of the pairs by expert, then every row looks its pair up.

1. Per digit of at most 10 bits (least significant first): the two kernels of counting.py. Dropped pairs
   have the key E, so they come last.
2. `first`: each expert's first position among the sorted pairs, by binary search; padded rows per chunk
   of experts.
3. `scan`: each expert's first row; names the blocks.
4. `rows`: every row reads its pair, or the sentinel.
Bytes: per pass keys and pairs read twice and written once; every output written once. Deterministic: the
sort is stable and no cell has two writers, whatever the skew.
"""

from types import SimpleNamespace

from moe_align_jax._align.kernels import common, counting
from moe_align_jax._align.tables import BlockAlignMosaicConfig
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, WARPGROUP, Int, Kernel, Program, Simt
from moe_align_jax.types import AlignProblem

MAX_DIGIT_BITS = 10
_FINISH_WARPGROUPS = 4
_MAX_CHUNKS = 128  # of experts; at most a thread each in the scan


class _Pass:
    """One stable pass by a digit, `bits` of `key >> shift`, from keys and pairs `index` to `index + 1`."""

    def __init__(
        self,
        problem: AlignProblem,
        partition: counting.Partition,
        index: int,
        shift: int,
        bits: int,
    ):
        self.problem, self.partition, self.index = problem, partition, index
        self.shift, self.bits = shift, bits
        self.keys, self.pairs = f"keys{index}", f"pairs{index}"
        self.next_keys, self.next_pairs = f"keys{index + 1}", f"pairs{index + 1}"
        self.histograms = f"histograms{index}"

    def kernels(self) -> list[Kernel]:
        """The one that counts, and the one that places."""
        n, partition, stride = self.problem.num_pairs, self.partition, self.partition.stride
        inputs = self.problem.inputs
        if self.index:
            sizes = common.launch_sizes(self.problem)
            inputs = {self.keys: (n,), self.pairs: (n,), **sizes}
        count = counting.count_kernel(
            f"moe_align_radix_count{self.index}",
            self.problem,
            partition,
            lambda t, r, position: self.read(t, r, position)[2],
            inputs,
            self.histograms,
        )
        place = Kernel(
            name=f"moe_align_radix_place{self.index}",
            body=lambda t, r: _Placing(self, t, r)(),
            inputs={**inputs, **count.outputs},
            outputs={self.next_keys: (n,), self.next_pairs: (n,)},
            shared={
                "histogram": partition.num_warps * stride,
                "start": stride,
                "totals": stride,
                "scratch": WARP,
            },
            num_warpgroups=partition.num_warpgroups,
            num_ctas=partition.num_ctas,
        )
        return [count, place]

    def read(self, t: Simt, r: SimpleNamespace, position: Int) -> tuple[Int, Int, Int]:
        """(key, pair, digit); the digit is -1 past the end."""
        problem = self.problem
        sizes = common.Sizes(t, r, problem)
        inside = position.below(sizes.num_pairs)
        if self.index == 0:
            limit = common.pair_limit(t, r, problem)
            expert = common.read_expert(t, r, problem, sizes, position, limit)
            key, pair = t.select(expert >= 0, expert, problem.num_experts), position
        else:
            at = common.at_most(t, position, sizes.num_pairs - 1)
            key, pair = t.load(getattr(r, self.keys), at), t.load(getattr(r, self.pairs), at)
        return key, pair, t.select(inside, (key >> self.shift) & ((1 << self.bits) - 1), -1)


class _Placing:
    """What a thread of the kernel that places does: it writes keys and pairs in the order of their digits."""

    def __init__(self, this: _Pass, t: Simt, r: SimpleNamespace):
        self.this, self.partition, self.t, self.r = this, this.partition, t, r
        self.tid, self.lane, self.warp = common.thread_ids(t)
        self.cta = t.cta_id()
        self.row_of_warp = self.warp * self.partition.stride
        per_thread = -(-self.partition.num_bins // self.partition.threads)
        self.mine = [self.tid * per_thread + k for k in range(per_thread)]  # bins

    def __call__(self) -> None:
        """All tiles of the CTA."""
        t, r, partition = self.t, self.r, self.partition
        for sums in (r.start, r.totals):
            collectives.fill(t, sums, 0, partition.stride, self.tid, partition.threads, vector=True)
        t.block_sync()
        t.grid_dependency_wait()
        t.launch_dependents()
        tiles = partition.tiles_of(common.Sizes(t, r, self.this.problem).num_pairs)
        once = self._read_tile(tiles, 0) if partition.tiles == 1 else None
        self._find_starts()
        for tile in t.for_range(0, tiles):
            # Before a barrier, so that all loads start together: behind it ptxas would spread them.
            self._place_tile(once or self._read_tile(tiles, tile))

    def _read_tile(self, tiles: Int | int, tile: Int | int) -> list[tuple[Int, Int, Int]]:
        """(key, pair, digit) of this thread's positions of a tile; `tiles`: of the CTA."""
        partition = self.partition
        first = (
            self.cta * (tiles * partition.tile)
            + tile * partition.tile
            + self.warp * (partition.rounds * WARP)
        )
        return [
            self.this.read(self.t, self.r, first + (k * WARP + self.lane))
            for k in range(partition.rounds)
        ]

    def _find_starts(self) -> None:
        """Into `start`, where this CTA writes its first pair of each bin."""
        t, r, num_bins = self.t, self.r, self.partition.num_bins
        sums = counting.HistogramSums(t, r, self.partition, self.this.histograms)
        sums.read()
        sums.add(before="start", totals="totals")
        t.block_sync()
        totals = [
            collectives.value_if(t, d < num_bins, lambda d=d: t.load(r.totals, d), 0)
            for d in self.mine
        ]
        start, _ = collectives.block_exclusive_scan(t, sum(totals, t.const(0)), r.scratch)
        for d, total in zip(self.mine, totals, strict=True):
            with t.if_(d < num_bins):
                t.store(r.start, d, start + t.load(r.start, d) + sums.before_me(d))
            start = start + total

    def _place_tile(self, read_pairs: list[tuple[Int, Int, Int]]) -> None:
        """Writes the pairs of a tile, and moves `start` behind them."""
        t, r, partition, row_of_warp = self.t, self.r, self.partition, self.row_of_warp
        num_bins, num_warps, stride = partition.num_bins, partition.num_warps, partition.stride
        words = num_warps * stride
        collectives.fill(t, r.histogram, 0, words, self.tid, partition.threads, vector=True)
        t.block_sync()
        bin_bits = common.bin_bits(num_bins)
        ranks = [
            collectives.tally(t, r.histogram, row_of_warp, digit, self.lane, *bin_bits)
            for _, _, digit in read_pairs
        ]
        t.block_sync()
        counts = [
            collectives.value_if(
                t,
                d < num_bins,
                lambda d=d: collectives.column_scan(t, r.histogram, d, num_warps, stride),
                0,
            )
            for d in self.mine
        ]
        t.block_sync()
        for (key, pair, digit), rank in zip(read_pairs, ranks, strict=True):
            with t.if_(digit >= 0):
                row = t.load(r.start, digit) + t.load(r.histogram, row_of_warp + digit) + rank
                t.store(getattr(r, self.this.next_keys), row, key)
                t.store(getattr(r, self.this.next_pairs), row, pair)
        t.block_sync()
        for d, count in zip(self.mine, counts, strict=True):
            with t.if_(d < num_bins):
                t.store(r.start, d, t.load(r.start, d) + count)


def _first_kernel(problem: AlignProblem, keys: str, num_chunks: int) -> Kernel:
    """`first` `[E + 1]`: where each expert's pairs start (E: the dropped ones); `chunk_rows` `[chunks]`."""
    n, num_experts = problem.num_pairs, problem.num_experts
    chunk = -(-num_experts // num_chunks)
    threads = _FINISH_WARPGROUPS * WARPGROUP

    def lower_bound(t: Simt, r: SimpleNamespace, key: Int) -> Int:
        """Number of sorted keys below `key`."""
        num_keys = common.Sizes(t, r, problem).num_pairs
        at: Int = t.const(0)
        step = 1 << (n.bit_length() - 1)
        while step:
            probe = at + step
            # mutant: the search leaves out the last key
            inside = probe <= num_keys
            smaller = t.load(getattr(r, keys), t.select(inside, probe - 1, 0)) < key
            at = t.select(inside & smaller, probe, at)
            step //= 2
        return at

    def body(t: Simt, r: SimpleNamespace) -> None:
        tid, cta = t.thread_id(), t.cta_id()
        t.grid_dependency_wait()
        t.launch_dependents()
        with t.if_(tid.eq(0)):
            t.store(r.rows, 0, 0)
        # mutant: rows are added before they are zero
        t.block_sync()
        begin = cta * chunk
        for i in t.for_range(tid, chunk, threads):
            expert = begin + i
            with t.if_(expert < num_experts):
                start, stop = lower_bound(t, r, expert), lower_bound(t, r, expert + 1)
                t.store(r.first, expert, start)
                t.atomic_add(r.rows, 0, common.padded(stop - start, problem.block_size))
                with t.if_(expert.eq(num_experts - 1)):
                    t.store(r.first, num_experts, stop)
        t.block_sync()
        with t.if_(tid.eq(0)):
            t.store(r.chunk_rows, cta, t.load(r.rows, 0))

    return Kernel(
        name="moe_align_radix_first",
        body=body,
        inputs={keys: (n,), **common.launch_sizes(problem)},
        outputs={"first": (num_experts + 1,), "chunk_rows": (num_chunks,)},
        shared={"rows": 1},
        num_warpgroups=_FINISH_WARPGROUPS,
        num_ctas=num_chunks,
    )


def _scan_kernel(problem: AlignProblem, num_chunks: int) -> Kernel:
    """Each expert's first row and count; the expert and the label of every block."""
    num_experts, block_size = problem.num_experts, problem.block_size
    chunk = -(-num_experts // num_chunks)
    threads = _FINISH_WARPGROUPS * WARPGROUP
    inputs = {
        "first": (num_experts + 1,),
        "chunk_rows": (num_chunks,),
        **common.launch_sizes(problem),
    }
    outputs = {
        "start": (num_experts,),
        "block_expert": (problem.num_blocks,),
        **{
            name: problem.outputs[name]
            for name in ("expert_ids", "tokens_per_expert", "num_tokens_post_padded")
            if name in problem.outputs
        },
    }
    if problem.expert_map == "label":
        inputs["expert_map"] = (num_experts,)

    def body(t: Simt, r: SimpleNamespace) -> None:
        tid, lane, _ = common.thread_ids(t)
        cta = t.cta_id()
        t.grid_dependency_wait()
        t.launch_dependents()
        rows = collectives.value_if(t, tid < num_chunks, lambda: t.load(r.chunk_rows, tid), 0)
        before, in_use = collectives.block_exclusive_scan(t, rows, r.scratch)
        with t.if_(tid.eq(cta)):  # num_chunks is at most the number of threads
            t.store(r.carry, 0, before)
        t.block_sync()
        for base in t.for_range(0, chunk, threads):
            expert = cta * chunk + (base + tid)
            inside = (base + tid < chunk) & (expert < num_experts)
            count = collectives.value_if(
                t, inside, lambda e=expert: t.load(r.first, e + 1) - t.load(r.first, e), 0
            )
            size = common.padded(count, block_size)
            offset, added = collectives.block_exclusive_scan(t, size, r.scratch2)
            start = t.load(r.carry, 0) + offset
            label = collectives.value_if(
                t, inside, lambda e=expert: common.block_label(t, r, problem, e), -1
            )
            with t.if_(inside):
                t.store(r.start, expert, start)
                if problem.return_counts:
                    t.store(r.tokens_per_expert, expert, count)
            # A warp names the blocks of its 32 experts together, because one expert may have all of them.
            for j in range(WARP):
                first_block = t.shfl(start, j) // block_size
                past = first_block + t.shfl(size, j) // block_size
                owner, name = t.shfl(expert, j), t.shfl(label, j)
                for b in t.for_range(first_block + lane, past, WARP):
                    t.store(r.block_expert, b, owner)
                    t.store(r.expert_ids, b, name)
            # mutant: a lane changes the carry while others read it
            t.block_sync()  # all threads have read the carry
            with t.if_(tid.eq(0)):
                t.store(r.carry, 0, t.load(r.carry, 0) + added)
            t.block_sync()
        me, everyone = cta * threads + tid, num_chunks * threads
        for b in collectives.strided(
            t, in_use // block_size + me, common.Sizes(t, r, problem).num_blocks, everyone
        ):
            t.store(r.block_expert, b, -1)
            t.store(r.expert_ids, b, -1)
        with t.if_(me.eq(0)):
            t.store(r.num_tokens_post_padded, 0, in_use)

    return Kernel(
        name="moe_align_radix_scan",
        body=body,
        inputs=inputs,
        outputs=outputs,
        shared={"scratch": WARP, "scratch2": WARP, "carry": 1},
        num_warpgroups=_FINISH_WARPGROUPS,
        num_ctas=num_chunks,
    )


def _rows_kernel(problem: AlignProblem, pairs: str, num_ctas: int) -> Kernel:
    """Every row reads its pair: start and first of its block's expert say where it stands."""
    n, num_experts, block_size = problem.num_pairs, problem.num_experts, problem.block_size
    threads = _FINISH_WARPGROUPS * WARPGROUP
    outputs = {"sorted_token_ids": (problem.capacity,)}
    if problem.return_inverse:
        outputs["row_of_pair"] = (n,)

    def body(t: Simt, r: SimpleNamespace) -> None:
        me, everyone = t.cta_id() * threads + t.thread_id(), num_ctas * threads
        sizes = common.Sizes(t, r, problem)
        # mutant: the last kernel does not wait
        t.grid_dependency_wait()
        t.launch_dependents()
        for row in collectives.strided(t, me, sizes.capacity, everyone):
            expert = t.load(r.block_expert, row // block_size)
            e = t.select(expert >= 0, expert, 0)
            at = t.load(r.first, e) + (row - t.load(r.start, e))
            real = (expert >= 0) & (at < t.load(r.first, e + 1))
            pair = collectives.value_if(
                t, real, lambda at=at: t.load(getattr(r, pairs), at), sizes.num_pairs
            )
            t.store(r.sorted_token_ids, row, pair)
            if problem.return_inverse:
                with t.if_(real):
                    t.store(r.row_of_pair, pair, row)
        if problem.return_inverse:
            kept = t.load(r.first, num_experts)
            for at in collectives.strided(t, kept + me, sizes.num_pairs, everyone):
                t.store(r.row_of_pair, t.load(getattr(r, pairs), at), -1)

    return Kernel(
        name="moe_align_radix_rows",
        body=body,
        inputs={
            pairs: (n,),
            "first": (num_experts + 1,),
            "start": (num_experts,),
            "block_expert": (problem.num_blocks,),
            **common.launch_sizes(problem),
        },
        outputs=outputs,
        num_warpgroups=_FINISH_WARPGROUPS,
        num_ctas=num_ctas,
    )


def digits(num_experts: int) -> list[tuple[int, int]]:
    """(shift, bits) of each pass over the keys 0 .. E."""
    key_bits = num_experts.bit_length()
    passes = -(-key_bits // MAX_DIGIT_BITS)
    bits = -(-key_bits // passes)
    return [(shift, min(bits, key_bits - shift)) for shift in range(0, key_bits, bits)]


def build(problem: AlignProblem, config: BlockAlignMosaicConfig, *, vector: bool) -> Program:
    """Two kernels per digit, then `first`, `scan` and `rows`. Their stores do not depend on `vector`."""
    del vector
    kernels: list[Kernel] = []
    passes = digits(problem.num_experts)
    for index, (shift, bits) in enumerate(passes):
        partition = counting.Partition(
            num_pairs=problem.num_pairs,
            num_bins=1 << bits,
            num_ctas=config.num_ctas,
            num_warpgroups=config.num_warpgroups,
            rounds=config.rounds,
            cluster=config.cluster,
        )
        kernels += _Pass(problem, partition, index, shift, bits).kernels()
    last = len(passes)
    chunk_threads = _FINISH_WARPGROUPS * WARPGROUP
    num_chunks = min(_MAX_CHUNKS, -(-problem.num_experts // chunk_threads))
    kernels.append(_first_kernel(problem, f"keys{last}", num_chunks))
    kernels.append(_scan_kernel(problem, num_chunks))
    num_ctas = min(4 * _MAX_CHUNKS, -(-problem.capacity // chunk_threads))
    kernels.append(_rows_kernel(problem, f"pairs{last}", num_ctas))
    return Program(inputs=problem.inputs, kernels=tuple(kernels), results=tuple(problem.outputs))
