"""Weighted sums of the experts' rows, back to their tokens' ranks, and summed there: one kernel.

A warpgroup of a CTA takes the tokens of one home rank after the other; after all devices' CTAs of this index
have met, the CTA adds up what came for its own tokens.
"""

from collections.abc import Sequence
from types import SimpleNamespace

from moe_align_jax._kernels.peer_rows import copying
from moe_align_jax._kernels.peer_rows.problems import Combine, Field
from moe_align_jax._simt.language import WARPGROUP, Int, Kernel, Simt

_HIGH = 0xFFFF0000
_MAX_WARPGROUPS = 4
# 16-byte words of a row that a thread sums at a time: 8 float32 each.
_MOST_SUMMED = 7


def build(problem: Combine) -> Kernel:
    def body(t: Simt, r: SimpleNamespace) -> None:
        _Combiner(t, r, problem).run()

    groups = min(problem.devices.count, _MAX_WARPGROUPS)
    return copying.kernel("moe_combine", problem, body, num_warpgroups=groups)


def _floats(words: Sequence[Int]) -> list[Int]:
    """bfloat16 pairs as float32."""
    return [half for word in words for half in (word << 16, word & _HIGH)]


class _Combiner:
    def __init__(self, t: Simt, r: SimpleNamespace, problem: Combine):
        self.t, self.r, self.problem = t, r, problem
        self.row_words = problem.columns // 2
        self.field = [Field(problem.columns, problem.dtype)]

    def run(self) -> None:
        t, count = self.t, self.problem.devices.count
        t.grid_dependency_wait()
        thread, groups = t.thread_id(), t.num_threads // WARPGROUP
        lane, group = thread & (WARPGROUP - 1), thread >> (WARPGROUP.bit_length() - 1)
        # No rank is written by all at a time: mine first.
        shares = [(t.rank() + group + k) % count for k in range(0, count, groups)]
        inside = [group + k < count for k in range(0, count, groups)]

        def one(token: Int) -> None:
            for rank, valid in zip(shares, inside, strict=True):
                with t.if_(valid):
                    self._sum_pairs(rank, token, lane)

        copying.for_tokens(t, self.problem.num_tokens, one)
        t.device_sync()
        copying.for_tokens(t, self.problem.num_tokens, self._sum_ranks)

    def _sum_pairs(self, rank: Int, token: Int, lane: Int) -> None:
        """The sum of a token of a rank, to that rank."""
        t, r, problem = self.t, self.r, self.problem
        there = t.remote(r.parts, rank)
        first = (rank * problem.num_tokens + token) * problem.top_k
        pairs = range(problem.top_k)
        rows = [t.load(r.row_of_pair, first + k) for k in pairs]
        weights = [t.load(r.weights, first + k) for k in pairs]
        target = (t.rank() * problem.num_tokens + token) * self.row_words
        all_pieces = list(copying.pieces(t, self.field, lane, WARPGROUP))
        for start in range(0, len(all_pieces), _MOST_SUMMED):
            pieces = all_pieces[start : start + _MOST_SUMMED]
            sums = [t.const(0)] * (8 * len(pieces))
            for row, weight in zip(rows, weights, strict=True):
                sums = t.values_if(
                    row >= 0,
                    lambda row=row, weight=weight, sums=sums, pieces=pieces: self._add(
                        sums, pieces, row, weight
                    ),
                    sums,
                )
            for number, piece in enumerate(pieces):
                words = self._rounded(sums[8 * number : 8 * number + 8])
                with t.if_(piece.inside):
                    copying.store(t, there, piece, target, words)

    def _add(
        self, sums: list[Int], pieces: list[copying.Piece], row: Int, weight: Int
    ) -> list[Int]:
        t = self.t
        held = [copying.load(t, self.r.y, piece, row * self.row_words) for piece in pieces]
        values = [value for words in held for value in _floats(words)]
        return [t.fma(value, weight, old) for value, old in zip(values, sums, strict=True)]

    def _rounded(self, values: Sequence[Int]) -> tuple[Int, ...]:
        pairs = zip(values[::2], values[1::2], strict=True)
        return tuple(self.t.bfloat16_pair(low, high) for low, high in pairs)

    def _sum_ranks(self, token: Int) -> None:
        t, r, problem = self.t, self.r, self.problem
        for piece in copying.pieces(t, self.field, t.thread_id(), t.num_threads):
            held = [
                copying.load(
                    t, r.parts, piece, (rank * problem.num_tokens + token) * self.row_words
                )
                for rank in range(problem.devices.count)
            ]
            sums = _floats(held[0])
            for words in held[1:]:
                sums = [t.fadd(a, b) for a, b in zip(sums, _floats(words), strict=True)]
            with t.if_(piece.inside):
                copying.store(t, r.out, piece, token * self.row_words, self._rounded(sums))
