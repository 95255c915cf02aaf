"""The kernel of permute_to_masked: the layout's indices, and each token's row into the boxes of its experts.

A CTA of one warpgroup takes a token, or a part of its row: it reads the part once and writes it once per
pair. Which row a pair gets follows from its place among all pairs by expert (the alignment gives it) and
from the first place of its expert, which every CTA finds for itself by a scan of the counts. What a CTA
reads first does not depend on the scan, so that the trips to memory overlap.

Reads T rows; writes a row per pair in use, and with `initialize` every other row once. Nothing is atomic,
every word is written by one thread. Any GPU that Mosaic lowers for (sm_90).

T tokens, K top_k, n = T * K pairs, e experts, M rows per expert.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

from moe_align_jax._layout.kernels.sizes import (
    THREADS,
    VECTOR_BYTES,
    WORD_BYTES,
    CopyConfig,
    Leaf,
    MaskedCopy,
)
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, Int, Kernel, Program, Simt


def leaf_names(problem: MaskedCopy) -> list[tuple[str, str]]:
    """(input, output) of each leaf."""
    return [(f"x{k}", f"rows{k}") for k in range(len(problem.leaves))]


def build(problem: MaskedCopy, config: CopyConfig) -> Program:
    """`(topk_ids [n], place_of_pair [n], tokens_per_expert [e], x0, ...) ->
    (masked_m [e], row_of_pair [n], pair_of_row [e * M], rows0, ...)`, leaves flat.

    `place_of_pair` is the pair's place among all pairs by expert, -1 for a dropped one.
    """
    tokens, pairs, rows = problem.num_tokens, problem.num_pairs, problem.num_rows
    experts = problem.num_experts
    inputs = {"topk_ids": (pairs,), "place_of_pair": (pairs,), "tokens_per_expert": (experts,)}
    outputs = {"masked_m": (experts,), "row_of_pair": (pairs,), "pair_of_row": (rows,)}
    arrays, moved = {}, []
    for (x, target), leaf in zip(leaf_names(problem), problem.leaves, strict=True):
        inputs[x], outputs[target] = (tokens * leaf.words,), (rows * leaf.words,)
        size = leaf.row_bytes // _item_bytes(leaf.dtype)
        arrays[target] = (rows * size,), leaf.dtype
        moved.append(target)
    kernel = Kernel(
        name="permute_to_masked",
        body=lambda t, r: _Body(t, r, problem, config).run(),
        inputs=inputs,
        outputs=outputs,
        shared={"first": experts + 1, "scratch": WARP},
        num_warpgroups=1,
        num_ctas=config.num_ctas,
        arrays=arrays,
        partial=frozenset() if problem.initialize else frozenset(moved),
    )
    return Program(inputs=inputs, kernels=(kernel,), results=tuple(outputs))


def _item_bytes(dtype: str) -> int:
    return 1 if dtype.startswith("float8") else int("".join(filter(str.isdigit, dtype))) // 8


class _Unit(NamedTuple):
    """A part of a token's row on its way, and lane k's pair of the token."""

    part: Int
    held: list[tuple[Leaf, str, Int, Any]]
    pair: Int
    expert: Int
    place: Int


class _Body:
    def __init__(self, t: Simt, r: SimpleNamespace, problem: MaskedCopy, config: CopyConfig):
        self.t, self.r, self.problem = t, r, problem
        self.parts, self.num_units = config.parts, problem.num_tokens * config.parts
        self.tid = t.thread_id()
        self.lane, self.warp = self.tid & (WARP - 1), self.tid >> 5
        self.cta = t.cta_id()

    def run(self) -> None:
        t = self.t
        t.grid_dependency_wait()
        if self.num_units <= t.num_ctas:
            # The row is on its way while the counts are added up.
            mine = self.cta < self.num_units
            unit = self.load(t.select(mine, self.cta, 0))
            self.scan()
            with t.if_(mine):
                self.store(unit)
        else:
            self.scan()
            for number in t.for_range(self.cta, self.num_units, t.num_ctas):
                self.store(self.load(number))
        self.fill()

    # -- where the experts begin

    def scan(self) -> None:
        """`first[i]`: pairs of the experts before i."""
        t, r, experts = self.t, self.r, self.problem.num_experts
        each = -(-experts // THREADS)
        counts = []
        for k in range(each):
            expert = self.tid * each + k
            there = expert < experts
            count = t.load(r.tokens_per_expert, t.select(there, expert, 0))
            counts.append(t.select(there, count, 0))
        total = counts[0]
        for count in counts[1:]:
            total = total + count
        running, everything = collectives.block_exclusive_scan(t, total, r.scratch)
        for k, count in enumerate(counts):
            with t.if_(self.tid * each + k < experts):
                t.store(r.first, self.tid * each + k, running)
            running = running + count
        with t.if_(self.tid.eq(0)):
            t.store(r.first, experts, everything)
        # mutant: an expert's first place is read before it is there
        t.block_sync()  # all of `first` is there

    def used(self, expert: Int) -> Int:
        """Rows in use of an expert, if there is room."""
        return self.t.load(self.r.first, expert + 1) - self.t.load(self.r.first, expert)

    # -- rows

    def load(self, number: Int) -> _Unit:
        """Starts every load that a part of a row needs, before the first use of any."""
        t, r, top_k = self.t, self.r, self.problem.top_k
        token, part = number // self.parts, number % self.parts
        held = []
        for (x, target), leaf in zip(leaf_names(self.problem), self.problem.leaves, strict=True):
            source = getattr(r, x)
            for start in range(0, leaf.units, self.parts * THREADS):
                at = part * THREADS + self.tid + start
                # Past the end the first one is loaded again, so that no branch separates two loads.
                index = token * leaf.units + t.select(at < leaf.units, at, 0)
                if leaf.unit_bytes == VECTOR_BYTES:
                    value = t.load4(source, index * (VECTOR_BYTES // WORD_BYTES))
                else:
                    value = t.load(source, index)
                held.append((leaf, target, at, value))
        pair = token * top_k + self.lane
        asked = t.select(self.lane < top_k, pair, 0)
        return _Unit(part, held, pair, t.load(r.topk_ids, asked), t.load(r.place_of_pair, asked))

    def store(self, unit: _Unit) -> None:
        t, r, room = self.t, self.r, self.problem.rows_per_expert
        mine = self.lane < self.problem.top_k
        kept = mine & (unit.place >= 0)
        # A dropped pair's id may be anything.
        expert = t.select(kept, unit.expert, 0)
        place = unit.place - t.load(r.first, expert)
        # mutant: rows past an expert's room are copied
        kept = kept & place.below(room)
        row = t.select(kept, expert * room + place, -1)
        # mutant: every part of a row writes its place
        with t.if_(mine & self.warp.eq(0) & unit.part.eq(0)):
            t.store(r.row_of_pair, unit.pair, row)
            with t.if_(kept):
                t.store(r.pair_of_row, row, unit.pair)
        for k in t.for_range(0, self.problem.top_k):
            target_row = t.shfl(row, k)
            with t.if_(target_row >= 0):
                for leaf, target, at, value in unit.held:
                    # mutant: a row ends one unit late
                    with t.if_(at < leaf.units):
                        self.put(target, leaf, target_row * leaf.units + at, value)

    def put(self, target: str, leaf: Leaf, index: Int, value: Any) -> None:
        """A unit of a leaf's rows."""
        ref = getattr(self.r, target)
        if leaf.unit_bytes == VECTOR_BYTES:
            self.t.store4(ref, index * (VECTOR_BYTES // WORD_BYTES), value)
        else:
            self.t.store(ref, index, value)

    # -- what is not in use

    def fill(self) -> None:
        t, r, problem = self.t, self.r, self.problem
        room, everyone = problem.rows_per_expert, t.num_ctas * THREADS
        me = self.cta * THREADS + self.tid
        for expert in t.for_range(me, problem.num_experts, everyone):
            used = self.used(expert)
            t.store(r.masked_m, expert, t.select(used < room, used, room))
        for row in collectives.strided(t, me, problem.num_rows, everyone):
            expert = row // room
            with t.if_(row - expert * room >= self.used(expert)):
                t.store(r.pair_of_row, row, problem.num_pairs)
        if not problem.initialize:
            return
        for (_, target), leaf in zip(leaf_names(problem), problem.leaves, strict=True):
            units = leaf.units
            for at in collectives.strided(t, me, problem.num_rows * units, everyone):
                row = at // units
                expert = row // room
                # mutant: a row in use is cleared
                with t.if_(row - expert * room >= self.used(expert)):
                    self.put(target, leaf, at, 0)
