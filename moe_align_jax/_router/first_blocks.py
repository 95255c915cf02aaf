"""Where each expert's blocks begin, where router and alignment are one launch.

Every aligning warp adds up the blocks of all experts itself: a lane has a few neighbouring experts, and the
sum over the lanes before it comes from one ballot for each bit of a lane's sum, or from products of bytes.
"""

import functools
import operator
from collections.abc import Sequence
from types import SimpleNamespace

from moe_align_jax._router.token_bits import BYTE, TokenBits
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, WARPGROUP, Int, Simt
from moe_align_jax.types import AlignProblem

_ONES = 0x01010101
_MOST_BALLOTS = 9  # a scan takes five shuffles, each of which waits for the one before


class FirstBlocks:
    """What the aligning warps compute of the counts in `TokenBits`."""

    def __init__(self, bits: TokenBits, align: AlignProblem):
        self.bits, self.block_size = bits, align.block_size
        self.each, self.stride = bits.each, bits.stride

    @property
    def shared(self) -> dict[str, int]:
        """Words of each shared-memory array."""
        arrays, warps = {}, WARPGROUP // WARP
        if self.bits.by_bytes:
            # Of each aligning warp: the first block of each expert among its lane's, and each lane's blocks.
            arrays["firsts"] = warps * self.stride // 4
            arrays["sums"] = warps * WARP // 4
        if not self.bits.in_lanes:
            arrays["starts"] = warps * self.stride
        return arrays

    def clear(self, t: Simt, r: SimpleNamespace, thread: Int) -> None:
        """Ahead of everything else, by the aligning threads, of which this is the thread-th."""
        if self.bits.by_bytes:
            with t.if_(thread < WARPGROUP // 4):
                t.store(r.sums, thread, 0)

    def lanes_before(self, t: Simt, thread: Int) -> list[Int]:
        """What `starts` needs of a thread's lane: a byte for each lane of the warp, 1 for those before mine
        and 0 for the others. Made ahead of the mail, and hidden, so that none of it is left to do behind
        it."""
        if not self.bits.by_bytes:
            return []
        lane, words = thread & (WARP - 1), []
        for k in range(WARP // 4):
            below = (t.const(1) << ((lane & 3) << 3)) - 1  # in the word that has my own lane
            own = t.select((lane >> 2).eq(k), below & _ONES, 0)
            words.append(t.hidden(t.select((lane >> 2) > k, t.const(_ONES), own)))
        return words

    def _sum_below(self, t: Simt, mine: Int, lane: Int) -> Int:
        """The sum over the lanes before mine."""
        bits = (self.each * self.bits.most_blocks).bit_length()
        if bits > _MOST_BALLOTS:
            return collectives.warp_inclusive_scan(t, mine, lane) - mine
        below, total = collectives.lanes_below(t, lane), t.const(0)
        votes = [t.ballot((mine & (1 << bit)).ne(0)) for bit in range(bits)]
        for bit, vote in enumerate(votes):
            total = total + (t.popc(vote & below) << bit)
        return total

    def starts(
        self,
        t: Simt,
        r: SimpleNamespace,
        masks: list[list[Int]],
        experts: list[Int],
        lane: Int,
        warp: Int,
        before: Sequence[Int],
    ) -> tuple[list[Int], Int]:
        """The first block of each of these experts; and, in the last lane, the blocks of all experts.
        `masks`: of a lane's own experts; `before`: `lanes_before`."""
        if self.bits.bytes:
            # Rounded up to blocks, four experts at once: no sum of a byte comes to 256.
            size = self.block_size
            shift = size.bit_length() - 1
            rounded = [(word + _ONES * (size - 1)) >> shift for word in masks[0]]
            words = [word & (_ONES * (BYTE >> shift)) for word in rounded]
            if self.bits.by_bytes:
                return self._by_bytes(t, r, words, experts, lane, warp, before)
            return self._in_lanes(t, words, experts, lane)
        of_expert = [[word[j] for word in masks] for j in range(self.each)]
        if self.bits.most_blocks == 1 and self.each <= 8:
            # A bit says that an expert has its one block.
            used = functools.reduce(
                operator.or_, (self.bits.used(t, x) << j for j, x in enumerate(of_expert))
            )
            mine = t.popc(used)
            base = self._sum_below(t, mine, lane)
            both, found = (base << 8) | used, []
            for expert in experts:
                word = t.shfl(both, expert >> self._shift)
                below = (t.const(1) << (expert & (self.each - 1))) - 1
                found.append((word >> 8) + t.popc(word & below))
            return found, base + mine
        size = self.block_size
        if self.bits.most_blocks == 1:
            blocks = [self.bits.used(t, words) for words in of_expert]
        else:
            blocks = [
                (self.bits.count(t, words, j) + (size - 1)) // size
                for j, words in enumerate(of_expert)
            ]
        fours = [blocks[k : k + 4] for k in range(0, self.each, 4)]
        if not self.bits.in_lanes:
            mine = sum(blocks, t.const(0))
            base = running = self._sum_below(t, mine, lane)
            own = warp * self.stride
            for k, four in enumerate(fours):
                starts = []
                for count in four:
                    starts.append(running)
                    running = running + count
                t.store4(r.starts, own + lane * self.each + 4 * k, tuple(starts))
            t.warp_sync()
            return [t.load(r.starts, own + expert) for expert in experts], base + mine
        four_in_one = [(a | (b << 8)) | ((c | (d << 8)) << 16) for a, b, c, d in fours]
        return self._in_lanes(t, four_in_one, experts, lane)

    def _in_lanes(
        self, t: Simt, blocks: list[Int], experts: list[Int], lane: Int
    ) -> tuple[list[Int], Int]:
        """As `starts`, from the blocks of a lane's own experts, a byte each."""
        words, mine = self._running_sums(t, blocks)
        base = self._sum_below(t, mine, lane)
        found = []
        for expert in experts:
            source = expert >> self._shift
            word = t.shfl(words[0], source)
            if len(words) > 1:
                word = t.select((expert & 4).ne(0), t.shfl(words[1], source), word)
            inside = (word >> ((expert & 3) << 3)) & BYTE
            found.append(t.shfl(base, source) + inside)
        return found, base + mine

    def _running_sums(self, t: Simt, blocks: list[Int]) -> tuple[list[Int], Int]:
        """For each byte the sum of the bytes before it, in words as they are; and the sum of all."""
        # The bytes of a word times 0x01010101 are their running sums.
        words, total = [], t.const(0)
        for counts in blocks:
            sums = counts * _ONES + total * _ONES
            words.append(sums - counts)
            total = (sums >> 24) & BYTE
        return words, total

    def _by_bytes(
        self,
        t: Simt,
        r: SimpleNamespace,
        blocks: list[Int],
        experts: list[Int],
        lane: Int,
        warp: Int,
        before: Sequence[Int],
    ) -> tuple[list[Int], Int]:
        """As `_in_lanes`, but by shared memory, where four pairs of a thread would take 12 shuffles.
        The sum over the lanes before mine comes from products of bytes, not from ballots."""
        words, mine = self._running_sums(t, blocks)
        t.store_byte(r.sums, warp * WARP + lane, mine)
        at = warp * (self.stride // 4) + lane * len(words)
        if len(words) == 2:
            t.store2(r.firsts, at, tuple(words))
        else:
            t.store(r.firsts, at, words[0])
        t.warp_sync()
        sums = [x for k in (0, 4) for x in t.load4(r.sums, warp * (WARP // 4) + k)]
        halves = []
        for k in (0, 4):
            total = t.const(0)
            for word, mask in zip(sums[k : k + 4], before[k : k + 4], strict=True):
                total = t.dot_bytes(word, mask, total)
            halves.append(total)
        base = halves[0] + halves[1]
        found = []
        for expert in experts:
            source = expert >> self._shift
            inside = t.load_byte(r.firsts, warp * self.stride + expert)
            found.append(t.shfl(base, source) + inside)
        return found, base + mine

    @property
    def _shift(self) -> int:
        """Of an expert, to the lane that has it."""
        return self.each.bit_length() - 1
