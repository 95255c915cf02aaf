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


def _pass_kernels(
    problem: AlignProblem, partition: counting.Partition, index: int, shift: int, bits: int
) -> list[Kernel]:
    """One stable pass by the digit `key >> shift`, from keys and pairs `index` to `index + 1`."""
    n = problem.num_pairs
    threads, num_warps, stride = partition.threads, partition.num_warps, partition.stride
    num_bins = partition.num_bins
    per_thread = -(-num_bins // threads)
    histograms = f"histograms{index}"
    keys, pairs = f"keys{index}", f"pairs{index}"
    inputs = (
        problem.inputs if index == 0 else {keys: (n,), pairs: (n,), **common.launch_sizes(problem)}
    )
    outputs = {f"keys{index + 1}": (n,), f"pairs{index + 1}": (n,)}

    def read(t: Simt, r: SimpleNamespace, position: Int) -> tuple[Int, Int, Int]:
        """(key, pair, digit); the digit is -1 past the end."""
        sizes = common.Sizes(t, r, problem)
        inside = position.below(sizes.num_pairs)
        if index == 0:
            limit = common.pair_limit(t, r, problem)
            expert = common.read_expert(t, r, problem, sizes, position, limit)
            key, pair = t.select(expert >= 0, expert, problem.num_experts), position
        else:
            at = common.at_most(t, position, sizes.num_pairs - 1)
            key, pair = t.load(getattr(r, keys), at), t.load(getattr(r, pairs), at)
        return key, pair, t.select(inside, (key >> shift) & ((1 << bits) - 1), -1)

    def read_digit(t: Simt, r: SimpleNamespace, position: Int) -> Int:
        return read(t, r, position)[2]

    def place(t: Simt, r: SimpleNamespace) -> None:
        tid, lane, warp = common.thread_ids(t)
        cta = t.cta_id()
        row_of_warp = warp * stride
        mine = [tid * per_thread + k for k in range(per_thread)]

        def clear_histogram() -> None:
            collectives.fill(t, r.histogram, 0, num_warps * stride, tid, threads, vector=True)

        for sums in (r.start, r.totals):
            collectives.fill(t, sums, 0, stride, tid, threads, vector=True)
        t.block_sync()
        t.grid_dependency_wait()
        t.launch_dependents()
        tiles = partition.tiles_of(common.Sizes(t, r, problem).num_pairs)

        def read_tile(tile: Int | int) -> list[tuple[Int, Int, Int]]:
            first = (
                cta * (tiles * partition.tile)
                + tile * partition.tile
                + warp * (partition.rounds * WARP)
            )
            return [read(t, r, first + (k * WARP + lane)) for k in range(partition.rounds)]

        once = read_tile(0) if partition.tiles == 1 else None
        sums = counting.HistogramSums(t, r, partition, histograms)
        sums.read()
        sums.add(before="start", totals="totals")
        t.block_sync()
        totals = [
            collectives.value_if(t, d < num_bins, lambda d=d: t.load(r.totals, d), 0) for d in mine
        ]
        start, _ = collectives.block_exclusive_scan(t, sum(totals, t.const(0)), r.scratch)
        for d, total in zip(mine, totals, strict=True):
            with t.if_(d < num_bins):
                t.store(r.start, d, start + t.load(r.start, d) + sums.before_me(d))
            start = start + total

        for tile in t.for_range(0, tiles):
            # Before a barrier, so that all loads start together: behind it ptxas would spread them.
            read_pairs = once or read_tile(tile)
            clear_histogram()
            t.block_sync()
            bin_bits = common.bin_bits(num_bins)
            ranks = [
                collectives.tally(t, r.histogram, row_of_warp, digit, lane, *bin_bits)
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
                for d in mine
            ]
            t.block_sync()
            for (key, pair, digit), rank in zip(read_pairs, ranks, strict=True):
                with t.if_(digit >= 0):
                    row = t.load(r.start, digit) + t.load(r.histogram, row_of_warp + digit) + rank
                    t.store(getattr(r, f"keys{index + 1}"), row, key)
                    t.store(getattr(r, f"pairs{index + 1}"), row, pair)
            t.block_sync()
            for d, count in zip(mine, counts, strict=True):
                with t.if_(d < num_bins):
                    t.store(r.start, d, t.load(r.start, d) + count)

    count = counting.count_kernel(
        f"moe_align_radix_count{index}", problem, partition, read_digit, inputs, histograms
    )
    placed = Kernel(
        name=f"moe_align_radix_place{index}",
        body=place,
        inputs={**inputs, **count.outputs},
        outputs=outputs,
        shared={
            "histogram": num_warps * stride,
            "start": stride,
            "totals": stride,
            "scratch": WARP,
        },
        num_warpgroups=partition.num_warpgroups,
        num_ctas=partition.num_ctas,
    )
    return [count, placed]


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
        kernels += _pass_kernels(problem, partition, index, shift, bits)
    last = len(passes)
    chunk_threads = _FINISH_WARPGROUPS * WARPGROUP
    num_chunks = min(_MAX_CHUNKS, -(-problem.num_experts // chunk_threads))
    kernels.append(_first_kernel(problem, f"keys{last}", num_chunks))
    kernels.append(_scan_kernel(problem, num_chunks))
    num_ctas = min(4 * _MAX_CHUNKS, -(-problem.capacity // chunk_threads))
    kernels.append(_rows_kernel(problem, f"pairs{last}", num_ctas))
    return Program(inputs=problem.inputs, kernels=tuple(kernels), results=tuple(problem.outputs))
