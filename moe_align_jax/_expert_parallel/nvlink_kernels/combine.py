"""Weighted sums of the experts' rows, back to their tokens' ranks, and summed there: one kernel.

A CTA takes the same units on every device: a part of a token's row, so that many SMs share few tokens and
their shares differ little. Each of its warpgroups sums the pairs of another home rank; after all devices'
CTAs of this index have met, the CTA adds up what came for its own units. (Over windows, rows of few tokens
carry their epoch: they are awaited word by word, and the devices meet at the end.) A rank sends what it has
an expert for, and the home knows which ranks these are: from its tokens' ids.
"""

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

from moe_align_jax._expert_parallel import row_words
from moe_align_jax._expert_parallel.nvlink_kernels import copying
from moe_align_jax._expert_parallel.nvlink_kernels.problems import Combine
from moe_align_jax._expert_parallel.row_words import Piece
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, WARPGROUP, Int, Kernel, Simt

_HIGH = 0xFFFF0000
# Added to anything, also to -0.0, it changes nothing.
_NEGATIVE_ZERO = 0x80000000
# Of an SM, at 64 registers a thread: what the compiler takes (`tests.no_gpu.peer_rows` looks).
_RESIDENT_WARPGROUPS = 8
# 16-byte words of a row's part that a thread has, 8 float32 sums each.
WORDS_PER_THREAD = 1
# Rows whose loads are under way at a time: more pairs of a token on one rank are rare.
ROWS_AT_A_TIME = 4
# Words of a unit, of which the last of a row may use fewer.
_UNIT_WORDS = WORDS_PER_THREAD * WARPGROUP * 4
# So many ranks' words, and where they are, fit into the registers of a thread that awaits them together. A
# warpgroup for each of 8 ranks leaves it 64.
_MAX_TAGGED_RANKS = 4


def part_words(columns: int) -> int:
    """4-byte words of a unit's part of a row of bfloat16; the last part of a row may be shorter."""
    return min(columns // 2, WORDS_PER_THREAD * WARPGROUP * 4)


def build(problem: Combine) -> Kernel:
    """The kernel that every device launches: weighted sums of rows, back at their tokens' ranks."""

    def body(t: Simt, r: SimpleNamespace) -> None:
        _Combiner(t, r, problem).run()

    groups = problem.devices.count  # at most 8, as the transport takes
    parts = -(-(problem.columns // 2) // part_words(problem.columns))
    most = copying.MIN_SMS * (_RESIDENT_WARPGROUPS // groups)
    return copying.kernel(
        "moe_combine",
        problem,
        body,
        num_warpgroups=groups,
        num_ctas=min(problem.num_tokens * parts, most),
    )


def _floats(words: list[Int]) -> list[Int]:
    """bfloat16 pairs as float32."""
    return [half for word in words for half in (word << 16, word & _HIGH)]


class _Pairs(NamedTuple):
    """Up to 32 pairs of a token, one per lane.

    Attributes:
        count: how many, static.
        inside: whether the lane has one.
        expert: its local expert, -1 for another rank's.
        row: its row of y, -1 for none: another rank's, or there was no room.
        weight: its weight.
    """

    count: int
    inside: Int
    expert: Int
    row: Int
    weight: Int


class _Combiner:
    """What a CTA does: its warpgroups send sums to the home ranks, and add up what came for its units."""

    def __init__(self, t: Simt, r: SimpleNamespace, problem: Combine):
        self.t, self.r, self.problem = t, r, problem
        self.row_words = problem.columns // 2
        self.part_words = part_words(problem.columns)
        self.parts = -(-self.row_words // self.part_words)
        self.num_units = problem.num_tokens * self.parts
        thread = t.thread_id()
        self.lane = thread & (WARP - 1)
        self.group_thread = thread & (WARPGROUP - 1)
        self.group = thread >> (WARPGROUP.bit_length() - 1)
        # Whether sums travel in tagged words. Each warpgroup then adds up at most one unit: a second one
        # would be awaited only after the first.
        ranks = problem.devices.count
        fits = ranks * self.num_units * _UNIT_WORDS <= t.tagged_words and ranks <= _MAX_TAGGED_RANKS
        self.tagged = fits and self.num_units <= ranks * t.num_ctas

    def run(self) -> None:
        """Sends the sums of the CTA's units, waits for the other devices, and adds up what they sent."""
        t, count = self.t, self.problem.devices.count
        t.grid_dependency_wait()
        copying.for_tokens(t, self.num_units, self._send)
        # A warpgroup adds up every so many of my units.
        first, step = t.cta_id() + self.group * t.num_ctas, count * t.num_ctas
        if self.num_units <= step:
            inside = first < self.num_units
            unit = t.select(inside, first, 0)
            wanted = self._ranks(unit)  # while the last rows are on their way
            if self.tagged:
                t.device_begun()
                with t.if_(inside):
                    self._sum_tagged(unit, wanted)
                # Peers have begun this kernel, and read nothing any more of the one before.
                with t.if_(self.group.eq(0) & (self.group_thread < WARP)):
                    t.device_wait()
            else:
                collectives.device_sync(t)
                with t.if_(inside):
                    self._sum_ranks(unit, wanted)
        else:
            collectives.device_sync(t)
            for unit in t.for_range(first, self.num_units, step):
                self._sum_ranks(unit, self._ranks(unit))

    # -- to the home ranks

    def _send(self, unit: Int) -> None:
        """A unit's sum over the pairs of a token of my warpgroup's home rank, to that rank."""
        t = self.t
        pairs = self._load_pairs(self.group, unit // self.parts)
        wanted, masks = self._votes(pairs)
        with t.if_(wanted):
            sums = self._sum_pairs(unit, pairs, masks)
            # My rank, and where the other one's memory is, are loads: beside the rows, not ahead of them.
            if self.tagged:
                self._put_tagged(unit, sums)
            else:
                there, me = t.remote(self.r.parts, self.group), t.rank()
                self._store(there, me * self.problem.num_tokens, unit, sums)

    def _load_pairs(self, home: Int, token: Int) -> list[_Pairs]:
        """Loads a lane's pairs of a token of the home rank, 32 of the token at a time."""
        t, r, top_k = self.t, self.r, self.problem.top_k
        first, found = (home * self.problem.num_tokens + token) * top_k, []
        for start in range(0, top_k, WARP):
            inside = self.lane < top_k - start
            at = first + t.select(inside, self.lane + start, 0)
            loaded = [t.load(ref, at) for ref in (r.local_ids, r.row_of_pair, r.weights)]
            found.append(_Pairs(min(WARP, top_k - start), inside, *loaded))
        return found

    def _votes(self, pairs: list[_Pairs]) -> tuple[Int, list[Int]]:
        """Whether the token has an expert here, with or without room for it; and masks of pairs with a row.

        The masks before any branch, or the loads of rows would be behind it: a latency more.
        """
        t, votes = self.t, self.t.const(0)
        masks = [t.ballot(some.inside & (some.row >= 0)) for some in pairs]
        for some in pairs:
            votes = votes | t.ballot(some.inside & (some.expert >= 0))
        return votes.ne(0), masks

    def _sum_pairs(self, unit: Int, pairs: list[_Pairs], masks: list[Int]) -> list[Int]:
        """The float32 sums of a unit over the pairs that the masks name: 8 for each piece of this thread."""
        t, pieces = self.t, self._pieces(unit)
        sums = [t.const(0)] * (8 * len(pieces))
        for some, mask in zip(pairs, masks, strict=True):
            for start in range(0, some.count, ROWS_AT_A_TIME):
                count = min(ROWS_AT_A_TIME, some.count - start)

                def add(some=some, count=count, mask=mask, sums=sums):
                    return self._add_rows(some, count, mask, sums, pieces)

                first = some is pairs[0] and start == 0
                *sums, mask = add() if first else t.values_if(mask.ne(0), add, [*sums, mask])
        return sums

    def _add_rows(
        self, pairs: _Pairs, count: int, mask: Int, sums: list[Int], pieces: list[Piece]
    ) -> list[Int]:
        """Adds the first `count` pairs of the mask, and takes them out; where there are fewer, nothing."""
        t, rows = self.t, []
        for _ in range(count):
            there, rest = mask.ne(0), mask - 1
            lane = t.popc((mask ^ -1) & rest) & (WARP - 1)
            row, weight = t.shfl(pairs.row, lane), t.shfl(pairs.weight, lane)
            mask = mask & rest
            rows.append((self._load(self.r.y, pieces, row, there), there, weight))
        for held, there, weight in rows:
            factor = t.select(there, weight, _NEGATIVE_ZERO)
            values = zip(_floats(held), sums, strict=True)
            sums = [t.fma(value, factor, old) for value, old in values]
        return [*sums, mask]

    # -- over the ranks

    def _ranks(self, unit: Int) -> list[Int]:
        """For each rank whether it has an expert of the unit's token."""
        t, top_k = self.t, self.problem.top_k
        first, lane = unit // self.parts * top_k, self.lane
        starts = range(0, top_k, WARP)
        inside = [lane < top_k - start for start in starts]
        ids = [
            t.load(self.r.topk_ids, first + t.select(there, lane + start, 0))
            for start, there in zip(starts, inside, strict=True)
        ]
        found = []
        for rank in range(self.problem.devices.count):
            votes = t.const(0)
            for expert, there in zip(ids, inside, strict=True):
                local = expert - rank * self.problem.num_local_experts
                votes = votes | t.ballot(there & local.below(self.problem.num_local_experts))
            found.append(votes.ne(0))
        return found

    def _sum_ranks(self, unit: Int, wanted: list[Int]) -> None:
        """Adds up what the ranks sent for a unit, those that `wanted` names, and writes the result."""
        pieces, tokens = self._pieces(unit), self.problem.num_tokens
        token = unit // self.parts
        held = [
            self._load(self.r.parts, pieces, token + rank * tokens, there)
            for rank, there in enumerate(wanted)
        ]
        self._add_up(unit, held)

    def _add_up(self, unit: Int, held: list[list[Int]]) -> None:
        """Stores the sum of a unit's words of all ranks, in the ranks' order."""
        t = self.t
        sums = _floats(held[0])
        for words in held[1:]:
            sums = [t.fadd(a, b) for a, b in zip(sums, _floats(words), strict=True)]
        self._store(self.r.out, 0, unit, sums)

    # -- sums in tagged words

    def _tagged_at(self, rank: Int | int, unit: Int) -> list[Int]:
        """Where this thread's four words of a rank's unit are: two, and half a unit behind them two more. So
        the threads of a warp store to places next to each other."""
        first = (unit + rank * self.num_units) * _UNIT_WORDS + self.group_thread * 2
        return [first, first + _UNIT_WORDS // 2]

    def _put_tagged(self, unit: Int, sums: list[Int]) -> None:
        """Sends the sums of a unit to the rank of this warpgroup's number."""
        t, [piece] = self.t, self._pieces(unit)
        words = [t.bfloat16_pair(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
        with t.if_(piece.inside):
            for at, *pair in zip(
                self._tagged_at(t.rank(), unit), words[::2], words[1::2], strict=True
            ):
                t.put_tagged(self.group, at, *pair)

    def _sum_tagged(self, unit: Int, wanted: list[Int]) -> None:
        """Adds up what the ranks sent of a unit. All words are awaited together. In place of a rank's that
        sends none, another rank's are awaited, and count as zeros."""
        t, [piece] = self.t, self._pieces(unit)
        any_wanted, given = wanted[-1], t.const(len(wanted) - 1)
        for rank in reversed(range(len(wanted) - 1)):
            given = t.select(wanted[rank], rank, given)
            any_wanted = any_wanted | wanted[rank]

        def take() -> list[Int]:
            ranks = [t.select(there, rank, given) for rank, there in enumerate(wanted)]
            places = [(at, 2) for rank in ranks for at in self._tagged_at(rank, unit)]
            return [word for words in t.take_tagged(places) for word in words]

        count = 4 * len(wanted)
        came = t.values_if(any_wanted & piece.inside, take, [t.const(0)] * count)
        held = [
            [t.select(there, word, 0) for word in came[4 * rank : 4 * rank + 4]]
            for rank, there in enumerate(wanted)
        ]
        self._add_up(unit, held)

    # -- parts of rows

    def _pieces(self, unit: Int) -> list[Piece]:
        """This thread's moves of a unit's part of a row."""
        first = unit % self.parts * self.part_words + self.group_thread * 4
        return [
            Piece(0, 4, first + start, first + start < self.row_words)
            for start in range(0, self.part_words, WARPGROUP * 4)
        ]

    def _load(self, ref: Any, pieces: list[Piece], row: Int, there: Int) -> list[Int]:
        """My words of a row, zeros where it is not there."""
        t, start, words = self.t, row * self.row_words, []
        for piece in pieces:
            load = functools.partial(t.load4, ref, start + piece.first)
            words += t.values_if(there & piece.inside, load, [t.const(0)] * 4)
        return words

    def _store(self, ref: Any, first: Int | int, unit: Int, sums: list[Int]) -> None:
        """Rounded, to the row of the unit's token after row `first`."""
        t, start = self.t, (unit // self.parts + first) * self.row_words
        words = [t.bfloat16_pair(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
        for number, piece in enumerate(self._pieces(unit)):
            with t.if_(piece.inside):
                row_words.store(t, ref, piece, start, tuple(words[4 * number : 4 * number + 4]))
