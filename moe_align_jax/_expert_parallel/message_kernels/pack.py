"""The kernel that makes a message of tokens, quantised on the way if asked.

A CTA of one warpgroup takes a token, or a part of its row. Nothing is atomic, every word is written by one
thread.
"""

from types import SimpleNamespace
from typing import Any

from moe_align_jax._core.fp8 import GROUP
from moe_align_jax._expert_parallel import e4m3, row_words
from moe_align_jax._expert_parallel.message_kernels import rows
from moe_align_jax._expert_parallel.message_kernels.problems import Pack
from moe_align_jax._expert_parallel.row_words import Piece, words
from moe_align_jax._simt.language import WARP, Int, Kernel, Simt


def build(problem: Pack) -> Kernel:
    """The kernel that writes the message.

    Takes `problem.inputs`: `topk_ids`, `weights` and `field0`, `field1`, ...; gives `message`.
    Words that belong to no field are not written.
    """
    message = problem.message
    return Kernel(
        name="moe_pack",
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
        if units == t.num_ctas:
            self.pack(t.cta_id())
        else:
            for unit in t.for_range(t.cta_id(), units, t.num_ctas):
                self.pack(unit)

    def pack(self, unit: Int) -> None:
        """Writes a unit's part of its token's message; the first part also ids and weights."""
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
            weights, ids = message.starts[-3:-1]
            t.store(r.message, token * message.words + ids + self.thread, expert)
            # mutant: a weight is an id
            t.store(r.message, token * message.words + weights + self.thread, weight)

    def load(self, batch: list[Piece], token: Int) -> list[Any]:
        """Loads my moves of a token's row: a value for each piece of the batch."""
        given = self.problem.given
        return [
            rows.load(self.t, getattr(self.r, f"field{p.field}"), p, token * given[p.field].words)
            for p in batch
        ]

    def copy(self, batch: list[Piece], held: list[Any], token: Int) -> None:
        """Stores the loaded values of a batch into the token's message."""
        t, message = self.t, self.message
        for piece, value in zip(batch, held, strict=True):
            # mutant: a row ends one move late
            with t.if_(piece.inside):
                start = token * message.words + message.starts[piece.field]
                row_words.store(t, self.r.message, piece, start, value)

    def quantise(self, batch: list[Piece], held: list[Any], token: Int) -> None:
        """16 lanes hold a group of 128 columns, 8 each."""
        t, r, message = self.t, self.r, self.message
        lane = self.thread & (WARP - 1)
        opens = (lane & (GROUP // e4m3.VALUES - 1)).eq(0)
        done = [e4m3.codes(t, value, lane) for value in held]
        row = token * message.words
        for piece, (codes, scale) in zip(batch, done, strict=True):
            with t.if_(piece.inside):
                t.store2(r.message, row + piece.first // 2, codes)
                # mutant: a scale is that of another group
                with t.if_(opens):
                    group = piece.first // (GROUP // 2)
                    t.store(r.message, row + message.starts[1] + group, scale)
