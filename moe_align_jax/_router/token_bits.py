"""Which tokens chose each expert, where router and alignment are one launch: bits in shared memory.

A token names an expert at most once, so the pairs of an expert are told by its tokens alone, up to 64 of
them: the bits of a word, or of two. Atomic additions in shared memory set the bits, which no order changes.
The number of an expert's bits is its count, unless its tokens are counted beside them, and a pair's rank is
the number of those before its token's.
"""

import functools
import operator
from types import SimpleNamespace

from moe_align_jax._core.int32 import cdiv
from moe_align_jax._router.problem import RouteProblem
from moe_align_jax._simt.language import WARP, WARPGROUP, Int, Simt
from moe_align_jax.types import AlignProblem

BYTE = 255
_COUNT_SHIFT = 24


class TokenBits:
    """The bits of all experts, and their counts.

    Attributes:
        words: of an expert's mask.
        each: experts of a lane, where a warp has all of them.
        stride: words from one word of a mask to the next.
        most_blocks: of an expert.
        packed, counted: an expert's tokens are counted in the word of its bits; apart from it.
        bytes: four counts to a word, which `FirstBlocks` rounds up to blocks at once.
        in_lanes: the blocks of a lane's experts are told by bytes.
        by_bytes: an aligning thread reads counts and first blocks of its pairs' experts as bytes.
    """

    def __init__(self, problem: RouteProblem, align: AlignProblem, packs: bool):
        """
        Args:
            problem, align: of the launch.
            packs: an aligning thread has neighbouring pairs, two to a word.
        """
        self.top_k, self.packs = problem.top_k, packs
        self.words = cdiv(problem.num_tokens, WARP)  # of an expert's mask
        self.each = cdiv(align.num_experts, 4 * WARP) * 4  # experts of a lane
        self.stride = self.each * WARP
        self.most_blocks = cdiv(problem.num_tokens, align.block_size)  # of an expert
        # Where an expert may have several blocks, its tokens are counted beside its bits: in the same word,
        # where that has room, so that one addition does both, or in a byte or a word of their own.
        self.packed = self.most_blocks > 1 and problem.num_tokens <= _COUNT_SHIFT
        self.counted = self.most_blocks > 1 and not self.packed
        self.in_lanes = self.each <= 8 and self.each * self.most_blocks <= BYTE
        size = align.block_size
        if self.words > 1 and self.most_blocks == 1:
            # A byte is shorter to read than two words of bits: 64 tokens in blocks of 64 rows take 2.16 us
            # instead of 2.28 (E = 256, H200, under jit, device spans, 2026-11-29).
            fits_bytes = size & (size - 1) == 0 and problem.num_tokens + size - 1 <= BYTE
            self.counted = self.in_lanes and fits_bytes
        # Four counts to a word, which are rounded up to blocks at once.
        self.bytes = self.counted and self.in_lanes and size & (size - 1) == 0
        # Of more than 32 tokens an aligning thread reads counts and first blocks of its pairs' experts as
        # bytes (`FirstBlocks._by_bytes`); up to 32 it has fewer pairs, and shuffles bring them.
        self.by_bytes = self.bytes and self.words > 1

    @property
    def cells(self) -> int:
        """Words of the masks, and of the counts behind them."""
        counts = self.stride // 4 if self.bytes else self.stride
        return self.words * self.stride + self.counted * counts

    def add(self, t: Simt, r: SimpleNamespace, token: Int, expert: Int) -> None:
        """Notes that the token chose the expert, and counts it where counts are kept. Nothing of an expert of
        -1."""
        with t.if_(expert >= 0):
            cell = expert
            if self.words > 1:
                cell = cell + (token >> 5) * self.stride
            bit = t.const(1) << (token & (WARP - 1))
            t.atomic_add(r.masks, cell, bit + (1 << _COUNT_SHIFT) if self.packed else bit)
            if self.bytes:
                one = t.const(1) << ((expert & 3) << 3)
                t.atomic_add(r.masks, (expert >> 2) + self.words * self.stride, one)
            elif self.counted:
                t.atomic_add(r.masks, expert + self.words * self.stride, 1)

    @property
    def first_counted(self) -> int:
        """Where the words begin that say how many tokens an expert has."""
        return self.words * self.stride if self.counted else 0

    def of_lane(self, t: Simt, r: SimpleNamespace, lane: Int, first: Int) -> list[list[Int]]:
        """The words that tell how many tokens a lane's experts have, from its `first` on: of each word of a
        mask, or of the counts."""
        if self.bytes:
            at = lane * (self.each // 4) + self.first_counted
            return [[t.load(r.masks, at + k) for k in range(self.each // 4)]]
        return [
            [x for k in range(0, self.each, 4) for x in t.load4(r.masks, first + (at + k))]
            for at in range(self.first_counted, self.cells, self.stride)
        ]

    def count(self, t: Simt, words: list[Int], number: int) -> Int:
        """The tokens of an expert, of a lane's `number`-th."""
        if self.bytes:
            return (words[0] >> 8 * (number & 3)) & BYTE
        if self.counted:
            return words[0]
        if self.packed:
            return (words[0] >> _COUNT_SHIFT) & BYTE
        return sum((t.popc(word) for word in words), t.const(0))

    def used(self, t: Simt, words: list[Int]) -> Int:
        """1 where an expert has a token, else 0."""
        either = functools.reduce(operator.or_, words)
        return t.select(either.ne(0), 1, 0)

    def rank(self, t: Simt, r: SimpleNamespace, expert: Int, token: Int, number: int) -> Int:
        """The tokens of the expert before that one. `number`: which of a thread's pairs it is, which says in
        part what token it may be."""
        below = (t.const(1) << (token & (WARP - 1))) - 1
        side, threads = (number // 2, 2 * WARPGROUP) if self.packs else (number, WARPGROUP)
        first = side * threads // self.top_k
        last = (side * threads + threads - 1) // self.top_k
        if self.words == 1 or last < WARP:
            return t.popc(t.load(r.masks, expert) & below)
        if self.by_bytes and first >= WARP:
            # Without the word of the first 32 tokens: all but those from this one on.
            count = t.load_byte(r.masks, expert + self.first_counted * 4)
            return count - t.popc(t.load(r.masks, expert + self.stride) & (below ^ -1))
        low, more = t.const(-1), below
        if first < WARP:
            high = token >= WARP
            low, more = t.select(high, -1, below), t.select(high, below, 0)
        return t.popc(t.load(r.masks, expert) & low) + t.popc(
            t.load(r.masks, expert + self.stride) & more
        )
