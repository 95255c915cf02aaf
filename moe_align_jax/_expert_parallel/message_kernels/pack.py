"""The kernel that makes messages of tokens, quantised on the way if asked: a copy for each rank.

A CTA of one warpgroup takes a token, or a part of its row, reads it once and writes it D times. Nothing is
atomic, every word is written by one thread.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from moe_align_jax._core.fp8 import GROUP
from moe_align_jax._expert_parallel import e4m3, row_words
from moe_align_jax._expert_parallel.message_kernels import rows
from moe_align_jax._expert_parallel.message_kernels.problems import Pack
from moe_align_jax._expert_parallel.row_words import Piece, words
from moe_align_jax._simt.language import WARP, Int, Kernel, Simt


def build(problem: Pack) -> Kernel:
    """The kernel that writes the messages.

    Takes `problem.inputs`: `topk_ids`, `weights` and `field0`, `field1`, ...; gives `problem.outputs`. of a message that belong to no field are not written.
    """
    message = problem.message
    return Kernel(
        name="moe_pack_swapped" if problem.swaps else "moe_pack",
        body=lambda t, r: _Body(t, r, problem).run(),
        inputs={name: (words(array),) for name, array in problem.inputs.items()},
        outputs={name: (words(array),) for name, array in problem.outputs.items()},
        arrays={**problem.inputs, **problem.outputs},
        num_warpgroups=1,
        num_ctas=problem.num_ctas,
        partial=frozenset(problem.outputs) if message.padded else frozenset(),
    )


class _Body:
    """What a CTA does, for one unit after the other: a token, or a part of its row."""

    def __init__(self, t: Simt, r: SimpleNamespace, problem: Pack):
        self.t, self.r, self.problem, self.message = t, r, problem, problem.message
        self.thread = t.thread_id()

    def run(self) -> None:
        """Packs the units of my CTA."""
        t, units = self.t, self.message.num_tokens * self.problem.parts
        t.grid_dependency_wait()
        if self.problem.swaps:
            self.rank = t.load(self.r.rank, 0)
        if units == t.num_ctas:
            self.pack(t.cta_id())
        else:
            for unit in t.for_range(t.cta_id(), units, t.num_ctas):
                self.pack(unit)

    def pack(self, unit: Int) -> None:
        """Writes a unit's part of its token's messages to all ranks; the first part also ids and weights."""
        t, r, message, parts = self.t, self.r, self.message, self.problem.parts
        token = unit // parts if parts > 1 else unit
        part = unit - token * parts
        batches = row_words.batches(rows.pieces(t, self.problem.given, part, parts))
        # All loads first: none waits for another.
        held = self.load(batches[0], token)
        mine = self.thread < message.top_k
        pair = token * message.top_k + t.select(mine, self.thread, 0)
        expert, weight = t.load(r.topk_ids, pair), t.load(r.weights, pair)
        put = self.quantise if self.problem.quantise else self.copy
        put(batches[0], held, token)
        for batch in batches[1:]:
            put(batch, self.load(batch, token), token)
        # mutant: every part of a row writes its ids
        with t.if_(mine & part.eq(0)):
            count = message.num_local_experts
            weights, ids = message.starts[-3:-1]
            for rank, to, row in self.copies(token):
                local = expert - rank * count
                here = local.below(count)
                # mutant: ids are those of rank 0
                t.store(to, row + ids + self.thread, t.select(here, local, -1))
                # mutant: weights of others' experts are kept
                t.store(to, row + weights + self.thread, t.select(here, weight, 0))

    def copies(self, token: Int) -> Iterator[tuple[Int, Any, Int]]:
        """(rank, array, word of it where the token's message to that rank begins)."""
        if self.problem.swaps:
            yield self.rank, self.r.kept, token * self.message.words
            # mutant: the other gets what is kept
            yield 1 - self.rank, self.r.sent, token * self.message.words
            return
        for rank in self.t.for_range(0, self.message.num_ranks):
            row = (rank * self.message.num_tokens + token) * self.message.words
            yield rank, self.r.message, row

    def load(self, batch: list[Piece], token: Int) -> list[Any]:
        """Loads my moves of a token's row: a value for each piece of the batch."""
        given = self.problem.given
        return [
            rows.load(self.t, getattr(self.r, f"field{p.field}"), token * given[p.field].words, p)
            for p in batch
        ]

    def copy(self, batch: list[Piece], held: list[Any], token: Int) -> None:
        """Stores the loaded values of a batch into the token's message to each rank."""
        t, message = self.t, self.message
        for _, to, row in self.copies(token):
            for piece, value in zip(batch, held, strict=True):
                # mutant: a row ends one move late
                with t.if_(piece.inside):
                    row_words.store(t, to, piece, row + message.starts[piece.field], value)

    def quantise(self, batch: list[Piece], held: list[Any], token: Int) -> None:
        """16 lanes hold a group of 128 columns, 8 each."""
        t, message = self.t, self.message
        lane = self.thread & (WARP - 1)
        opens = (lane & (GROUP // e4m3.VALUES - 1)).eq(0)
        done = [e4m3.codes(t, value, lane) for value in held]
        for _, to, row in self.copies(token):
            for piece, (codes, scale) in zip(batch, done, strict=True):
                with t.if_(piece.inside):
                    t.store2(to, row + piece.first // 2, codes)
                    # mutant: a scale is that of another group
                    with t.if_(opens):
                        group = piece.first // (GROUP // 2)
                        t.store(to, row + message.starts[1] + group, scale)
