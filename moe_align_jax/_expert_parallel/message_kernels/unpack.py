"""The kernel that puts the rows that came into the experts' boxes, and makes the layout.

They came as messages, or every rank's tokens as separate arrays, which are quantised here if asked.

A CTA of one warpgroup takes a row, or a part of it. Its loads come first; while they are on their
way it reads the ids of all rows and counts: the place of a pair in its expert's box is the number of pairs of
the same expert before it. Every CTA reads all ids: this is for small batches. The experts' counts are shared
out among the CTAs. Nothing is atomic, every word is written by one thread.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from moe_align_jax._core.fp8 import GROUP
from moe_align_jax._expert_parallel import e4m3, row_words
from moe_align_jax._expert_parallel.counted_pairs import Held, counted, summed
from moe_align_jax._expert_parallel.message_kernels import rows
from moe_align_jax._expert_parallel.message_kernels.problems import THREADS, Unpack
from moe_align_jax._expert_parallel.row_words import Piece, words
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, Int, Kernel, Simt

_WARPS = THREADS // WARP
_TARGETS_AHEAD = 8


def build(problem: Unpack) -> Kernel:
    """The kernel that fills the boxes.

    Takes `problem.inputs`: `message`, or the gathered arrays; gives `boxes0`, `boxes1`, ..., the fields of
    the layout, `weights` and `ids`. Rows of a box that are not in use are not written.
    """
    message = problem.message
    boxes = (f"boxes{number}" for number in range(len(message.payload)))
    experts = -(-message.num_local_experts // problem.num_ctas)
    body = _GatheredBody if problem.gathered else _Body
    return Kernel(
        name="moe_gathered" if problem.gathered else "moe_unpack",
        body=lambda t, r: body(t, r, problem, experts).run(),
        inputs={name: (words(array),) for name, array in problem.inputs.items()},
        outputs={name: (words(array),) for name, array in problem.outputs.items()},
        arrays={**problem.inputs, **problem.outputs},
        shared={"places": _WARPS * message.top_k, "totals": _WARPS * experts},
        num_warpgroups=1,
        num_ctas=problem.num_ctas,
        partial=frozenset(boxes),
    )


class _Body:
    """Of rows that came in messages."""

    def __init__(self, t: Simt, r: SimpleNamespace, problem: Unpack, experts: int):
        self.t, self.r, self.problem, self.message = t, r, problem, problem.message
        self.experts = experts  # of a CTA
        self.thread, self.cta = t.thread_id(), t.cta_id()
        self.lane, self.warp = self.thread & (WARP - 1), self.thread // WARP

    # -- what came

    def ids(self, row: Int, k: Int) -> tuple[Any, Int]:
        """(array, word) of an id of a row."""
        return self.r.message, row * self.message.words + self.message.starts[-2] + k

    def weights(self, row: Int, k: Int) -> tuple[Any, Int]:
        """(array, word) of the weight of a row's pair k."""
        return self.r.message, row * self.message.words + self.message.starts[-3] + k

    def field(self, number: int, row: Int) -> tuple[Any, Int]:
        """(array, word) where a row of the payload begins."""
        return self.r.message, row * self.message.words + self.message.starts[number]

    def local(self, expert: Int) -> Int:
        """An id that came as one of this rank, -1 for others."""
        found = expert - self.first
        # mutant: an expert of another rank is kept
        here = found.below(self.message.num_local_experts)
        return self.t.select(here, found, -1)

    def weighed(self, expert: Int, weight: Int) -> Int:
        """The weight of a local id: 0 for -1."""
        # mutant: the weight of another rank's expert is kept
        return self.t.select(expert >= 0, weight, 0)

    def run(self) -> None:
        """Unpacks the units of my CTA: rows, or parts of rows."""
        t, units = self.t, self.message.num_rows * self.problem.parts
        t.grid_dependency_wait()
        self.first = t.load(self.r.rank, 0) * self.message.num_local_experts
        if units == t.num_ctas:
            self.unpack(self.cta)
        else:
            ids = self.load_ids()
            self.lay_out_experts(ids)
            for unit in t.for_range(self.cta, units, t.num_ctas):
                self.unpack(unit, ids)
                # mutant: places are overwritten before all have read them
                t.block_sync()

    def unpack(self, unit: Int, ids: Held | None = None) -> None:
        """With the experts' counts, unless all `ids` are at hand and those are done."""
        t, message, parts = self.t, self.message, self.problem.parts
        row = unit // parts if parts > 1 else unit
        part = unit - row * parts
        batches = row_words.batches(rows.pieces(t, self.problem.given, part, parts))
        # All loads first: none waits for another.
        held = self.load(batches[0], row)
        mine = self.lane < message.top_k
        asked = t.select(mine, self.lane, 0)
        came, weight = t.load(*self.ids(row, asked)), t.load(*self.weights(row, asked))
        expert = self.local(came)
        weight = self.weighed(expert, weight)
        kept = mine & (expert >= 0)
        every = self.load_ids() if ids is None else ids
        self.count(every, t.select(kept, expert, -1), row)
        if ids is None:
            self.lay_out_experts(every)
        else:
            # mutant: places are read before all warps have counted them
            t.block_sync()
        target = self.find(expert, kept)
        self.lay_out(row, part, mine, expert, weight, target)
        self.put(batches[0], held, target)
        for batch in batches[1:]:
            self.put(batch, self.load(batch, row), target)

    # -- places

    def load_ids(self) -> Held:
        """The thread's share of the ids of all rows; -1 past the last."""
        t, message = self.t, self.message
        width = 1 if message.top_k % 4 else 4
        held = []
        for start in range(0, message.num_pairs, THREADS * width):
            pair = self.thread * width + start
            inside = pair < message.num_pairs
            at = t.select(inside, pair, 0)
            row = at // message.top_k
            where = self.ids(row, at - row * message.top_k)
            ids = t.load4(*where) if width == 4 else (t.load(*where),)
            held.append((pair, tuple(t.select(inside, self.local(one), -1) for one in ids)))
        return held

    def count(self, held: Held, expert: Int, row: Int) -> None:
        """What this warp holds of the pairs before each of the row's pairs."""
        t, top_k = self.t, self.message.top_k
        kept = t.ballot(expert >= 0)
        for k in t.for_range(0, top_k):
            with t.if_(((kept >> k) & 1).ne(0)):
                count = counted(t, held, t.shfl(expert, k), row * top_k + k)
                with t.if_(self.lane.eq(0)):
                    # mutant: a warp's counts are those of the first warp
                    t.store(self.r.places, self.warp * top_k + k, count)

    def find(self, expert: Int, kept: Int) -> Int:
        """The row in the boxes of lane k's pair, -1 for none."""
        t, rows_per_expert, top_k = self.t, self.problem.rows_per_expert, self.message.top_k
        lane = t.select(kept, self.lane, 0)
        count = lambda: summed(t, self.r.places, lane, top_k, _WARPS)  # noqa: E731
        place = collectives.value_if(t, kept, count, rows_per_expert)
        # mutant: a row past the box's room is written
        return t.select(place < rows_per_expert, expert * rows_per_expert + place, -1)

    # -- the layout

    def lay_out_experts(self, held: Held) -> None:
        """How many pairs each of my experts has, and the rows of its box that are not in use. All threads
        meet here: what the warps counted before can be read afterwards."""
        t, r, count = self.t, self.r, self.message.num_local_experts
        rows_per_expert = self.problem.rows_per_expert
        for number in t.for_range(0, self.experts):
            expert = self.cta + number * t.num_ctas
            with t.if_(expert < count):
                total = counted(t, held, expert, self.message.num_pairs)
                with t.if_(self.lane.eq(0)):
                    t.store(r.totals, self.warp * self.experts + number, total)
        # mutant: totals are read before all warps have counted
        t.block_sync()
        for number in t.for_range(0, self.experts):
            expert = self.cta + number * t.num_ctas
            with t.if_(expert < count):
                total = summed(t, r.totals, number, self.experts, _WARPS)
                with t.if_(self.thread.eq(0)):
                    t.store(r.tokens_per_expert, expert, total)
                    used = t.select(total < rows_per_expert, total, rows_per_expert)
                    t.store(r.masked_m, expert, used)
                for place in t.for_range(total + self.thread, rows_per_expert, THREADS):
                    # mutant: an unused row says that it is pair 0's
                    t.store(r.pair_of_row, expert * rows_per_expert + place, self.message.num_pairs)

    def lay_out(
        self, row: Int, part: Int, mine: Int, expert: Int, weight: Int, target: Int
    ) -> None:
        """Writes what the layout has of a row's pairs, a lane each; one warp of the row's first part does.

        Args:
            row, part: of the unit.
            mine: whether the lane has a pair.
            expert, weight: the pair's.
            target: its row in the boxes, -1 for none.
        """
        t, r = self.t, self.r
        pair = row * self.message.top_k + self.lane
        with t.if_(mine & self.warp.eq(0) & part.eq(0)):
            t.store(r.ids, pair, expert)
            t.store(r.weights, pair, weight)
            t.store(r.row_of_pair, pair, target)
            with t.if_(target >= 0):
                t.store(r.pair_of_row, target, pair)

    # -- the rows

    def load(self, batch: list[Piece], row: Int) -> list[Any]:
        """Loads my moves of a row that came: a value for each piece of the batch."""
        starts = {piece.field: self.field(piece.field, row) for piece in batch}
        return [rows.load(self.t, starts[p.field][0], p, starts[p.field][1]) for p in batch]

    def put(self, batch: list[Piece], held: list[Any], target: Int) -> None:
        """Writes the row's moves once per pair."""
        t, payload = self.t, self.message.payload
        for box in self.boxes(target):
            for piece, value in zip(batch, held, strict=True):
                ref = getattr(self.r, f"boxes{piece.field}")
                with t.if_(piece.inside):
                    row_words.store(t, ref, piece, box * payload[piece.field].words, value)

    def boxes(self, target: Int) -> Iterator[Int]:
        """The rows in the boxes that the lanes of my warp know."""
        t, top_k = self.t, self.message.top_k
        for start in t.for_range(0, top_k, _TARGETS_AHEAD):
            ahead = range(min(top_k, _TARGETS_AHEAD))
            for box in [t.shfl(target, start + k) for k in ahead]:  # -1 of lanes without a pair
                with t.if_(box >= 0):
                    yield box


class _GatheredBody(_Body):
    """Of every rank's tokens, in separate arrays."""

    def ids(self, row: Int, k: Int) -> tuple[Any, Int]:
        return self.r.topk_ids, row * self.message.top_k + k

    def weights(self, row: Int, k: Int) -> tuple[Any, Int]:
        return self.r.pair_weights, row * self.message.top_k + k

    def field(self, number: int, row: Int) -> tuple[Any, Int]:
        return getattr(self.r, f"field{number}"), row * self.problem.given[number].words

    def put(self, batch: list[Piece], held: list[Any], target: Int) -> None:
        if not self.problem.quantise:
            super().put(batch, held, target)
            return
        # 16 lanes hold a group of 128 columns, 8 each.
        t, (codes_of, scales_of) = self.t, self.message.payload
        opens = (self.lane & (GROUP // e4m3.VALUES - 1)).eq(0)
        done = [e4m3.codes(t, value, self.lane) for value in held]
        for box in self.boxes(target):
            for piece, (codes, scale) in zip(batch, done, strict=True):
                with t.if_(piece.inside):
                    t.store2(self.r.boxes0, box * codes_of.words + piece.first // 2, codes)
                    # mutant: every lane of a group writes its scale
                    with t.if_(opens):
                        group = piece.first // (GROUP // 2)
                        t.store(self.r.boxes1, box * scales_of.words + group, scale)
