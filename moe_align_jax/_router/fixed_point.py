"""The router's choice in one launch with the alignment: short keys in fixed point.

Two routing warps share a scheduler there, whose integer unit both of them wait for: each of its instructions
keeps it for two cycles. So a float32 logit's short key is made by the units that multiply and add:

    fixed = saturate(logit / 256 + 1/2) + one      the low bits of this float32 are in fixed point
    key   = bits(fixed) * (ids + 1) + constant     those bits, above the inverted id

The range is -128 to 128. At E <= 256 an id has 8 bits, and the unit of the fixed point is 2**-15; each bit
more of an id doubles the unit. A logit beyond the range, or infinite, counts as its nearest end, and a NaN as
the lower one.

A token is in doubt where two of its K + 1 greatest keys agree but for their ids, and where a lane might have
to give more keys than it sorts: of each eight it sorts the greatest four only, and all four were chosen. Then
three looks follow, until one of them decides:

1. At the logits of the K + 1 greatest. Where only two neighbours at a time agree, and no key beyond these has
   a number as great as the K-th's, those two change places by their logits. Two logits that agree by chance
   are nearly always alone.
2. At what fixed point leaves of each logit that counts at least as much as the K-th. Where that is nothing,
   those that seem equal are equal, and ids decide. Logits that were bfloat16 before are equal to their
   numbers from 2**-8 to 128 at E <= 256, and from twice as much on for each bit more of an id.
3. At all logits: the token is chosen for again, by whole keys.

The first look needs a multiple of 32 experts, and K below 32.

A lane holds experts in vectors: four, then those of the 31 other lanes come, then its next four. So the loads
of a warp lie side by side. Not where a softmax adds up all experts' powers: the sum's order would be another
than that of the router alone, whose bits the one launch gives.
"""

import functools
import operator
from collections.abc import Callable

from moe_align_jax._router import arithmetic as f32
from moe_align_jax._router.lanes import Layout
from moe_align_jax._router.problem import RouteProblem
from moe_align_jax._router.sorting import EIGHT, OUT, descending, greater, greatest, lesser, own
from moe_align_jax._router.warp_router import Found, Loaded, Router, shortens
from moe_align_jax._simt.language import WARP, Int

MESSAGE = 4  # words that are sent at once
_VECTOR = 4  # words of a load
_LIMIT = 128  # the greatest logit that has a number in fixed point, and that of the least
# Of a key: the 24 others hold all that float32 leaves of a number in fixed point.
_FEWEST_ID_BITS = 8

# Sends the message of a token on: lane k has part `k % parts` of it, `MESSAGE` words.
type Send = Callable[[list[Int]], None]


def sends_early(problem: RouteProblem) -> bool:
    """Whether `FixedPointRouter.find` calls its `send`: the parts are at most two, whole ones."""
    return shortens(problem) and problem.top_k in (MESSAGE, 2 * MESSAGE)


def packs_ids(problem: RouteProblem) -> bool:
    """Whether a message has all ids of a token, 16 bits each, and not one to a word.

    From 33 tokens on. Up to 32 the aligning warps have a thread for each pair of a token's two, and unpack
    for nothing.
    """
    is_one_message = sends_early(problem) and problem.top_k == 2 * MESSAGE
    return is_one_message and problem.num_tokens > WARP


def inverts_ids(problem: RouteProblem) -> bool:
    """Whether a packed message holds the low halves of keys, whose low bits are inverted ids: what receives
    them turns them round. Not where a message may say that a token is not real."""
    return packs_ids(problem) and not problem.may_drop


class FixedPointRouter(Router):
    """A `Router` for problems of which `shortens` holds, with short keys in fixed point."""

    def _make_layout(self) -> Layout:
        layout, problem = super()._make_layout(), self.problem
        adds_all = problem.scoring == "softmax" and not problem.over_chosen
        several = layout.each % _VECTOR == 0 and layout.each > _VECTOR
        if layout.whole and several and not adds_all:
            layout = layout._replace(first=self.lane * _VECTOR, vector=_VECTOR)
        return layout

    def _make_id_mask(self) -> int:
        bits = (self.problem.num_experts - 1).bit_length()
        return (1 << max(_FEWEST_ID_BITS, bits)) - 1

    @property
    def _one(self) -> float:
        """What moves a number from 0 to 1 to where a float32 has as many bits below its exponent's as a key
        has beside its id."""
        return float((self.id_mask + 1) >> _FEWEST_ID_BITS)

    def _last_id_bits(self) -> Int:
        t, size, inverted = self.t, self.id_mask + 1, super()._last_id_bits()
        # What moves a number's bits above the id. The compiler does not know that it is a power of two, by
        # which it would shift, in the integer unit.
        self.size = t.ballot(t.thread_id() < t.num_threads) & size
        # 0 in fixed point becomes the least key of all.
        least = -(2**31) - f32.bits(self._one) * size
        return inverted + ((least + 2**31) % 2**32 - 2**31)

    def _fixed(self, logit: Int) -> Int:
        """`_one` and, in fixed point, where the logit stands between -`_LIMIT` and `_LIMIT`: from 0 to 1."""
        t = self.t
        scale, half, one = (t.const(f32.bits(x)) for x in (1 / (2 * _LIMIT), 0.5, self._one))
        return t.fadd(t.fma_saturated(logit, scale, half), one)

    def _inexact_bits(self, logit: Int) -> Int:
        """0 of a finite logit that is equal to its number in fixed point."""
        t, width = self.t, 2 * _LIMIT
        middle = t.const(f32.bits(-(self._one + 0.5) * width))
        return t.fma(self._fixed(logit), t.const(f32.bits(width)), middle) ^ logit

    def _short_keys(self, logits: list[Int]) -> list[Int]:
        t, layout = self.t, self.layout
        keys = [
            t.multiply_add(self._fixed(logit), self.size, bits)
            for logit, bits in zip(logits, self.id_bits, strict=True)
        ]
        if not layout.whole:
            keys = [t.select(layout.within(j), key, OUT) for j, key in enumerate(keys)]
        return keys

    def find(self, loaded: Loaded, send: Send | None = None) -> Found:
        """As `Router.find`. The experts are sent, too, as soon as they are known, where `sends_early`."""
        return self._find(loaded, functools.partial(self._take_short, send=send))

    def _take_short(self, loaded: Loaded, send: Send | None = None) -> Int:
        t, mask = self.t, self.id_mask
        keys = self._short_keys(loaded.words)
        bests, nearest, lists = self._rounds(keys)
        # Of a list whose four were all taken the fifth may be greater than what was taken instead.
        spent = [one[0].eq(OUT) for one in lists[: self._num_cut]]
        doubts = nearest.below(mask + 1)
        # Made ahead of the vote, so that nothing is left to do behind it.
        message = [] if send is None else [t.hidden(word) for word in self._message(bests)]
        for one in spent:
            doubts = doubts | one
        doubtful, sure = t.any_lane(doubts)
        if send is not None:
            # Ahead of the code of the doubt, which is long.
            with t.if_(sure):
                send(self._real_only(loaded, message))
            t.warp_sync()  # else the compiler makes one branch of this one and the next
        expert = self._id_in(own(t, self.lane, bests))

        def by_ids() -> list[Int]:
            logits, last = [self._finite(x) for x in loaded.words], bests[-1]
            # Only those by which the K greatest are told from the others and put in order must be exact.
            low = [
                t.select((key | mask) >= last, self._inexact_bits(x), 0)
                for key, x in zip(self._short_keys(logits), logits, strict=True)
            ]
            low = functools.reduce(operator.or_, low)
            for one in spent:
                low = low | t.select(one, 1, 0)
            several = t.ballot(low.ne(0)).ne(0)

            def whole() -> list[Int]:
                return with_message(self._take_whole(logits))

            return t.values_if(several, whole, [expert, *message])

        def with_message(chosen: Int) -> list[Int]:
            return [chosen, *(self._message_of(chosen) if message else [])]

        def look() -> list[Int]:
            if self._can_look_twice:
                unclear, chosen = self._second_look(loaded, keys, bests, lists, spent)
                chosen, *words = t.values_if(unclear, by_ids, with_message(chosen))
            else:
                chosen, *words = by_ids()
            if send is not None:
                send(self._real_only(loaded, words))
            return [chosen]

        return t.values_if(doubtful, look, [expert])[0]

    @property
    def _can_look_twice(self) -> bool:
        """Whether `_second_look` can be asked: each lane has a key, and all of them are experts', so that K
        rounds leave one that stands behind the K-th."""
        return self.layout.whole and self.problem.top_k < WARP

    def _second_look(
        self,
        loaded: Loaded,
        keys: list[Int],
        bests: list[Int],
        lists: list[list[Int]],
        spent: list[Int],
    ) -> tuple[Int, Int]:
        """Whether more must be looked at, in every lane; and the expert of lane k, where not.

        Not where at most K + 1 experts have numbers that are at least the K-th's, and no three of these have
        the same one: then neighbours that have the same one change places by their logits. Of a list that was
        cut the (K + 1)-th may be missing: then only where there are K.

        Args:
            loaded, keys: the token's logits, and the short keys of this lane.
            bests, lists: what `_rounds` found.
            spent: of each list that was cut, whether all of it was taken.
        """
        t, lane, mask, top_k = self.t, self.lane, self.id_mask, self.problem.top_k
        t.warp_sync()  # the logits that are kept have been stored
        behind = t.warp_max(greatest(t, (one[0] for one in lists)))
        counts = [t.select((key | mask) >= bests[-1], 1, 0) for key in keys]
        while len(counts) > 1:
            # A tree, and hidden: the compiler would add one after the other, and each waits for the last.
            pairs = zip(counts[::2], counts[1::2], strict=False)
            counts = [t.hidden(a + b) for a, b in pairs] + counts[len(counts) & ~1 :]
        count = t.warp_sum(counts[0])

        key = own(t, lane, [*bests, behind])
        expert = self._id_in(key)
        value = f32.order(self._reload(loaded.token, expert))
        after = (lane + 1) & (WARP - 1)
        agree = (key ^ t.shfl(key, after)).below(mask + 1) & (lane + 1 < count)
        # Equal ones stay as they are, the lower id first.
        # mutant: equal logits change places
        behind_greater = t.shfl(value, after) > value
        # Bit k: whether ranks k and k + 1 have the same number; whether they change places.
        pairs, swaps = t.ballot(agree), t.ballot(agree & behind_greater)
        # mutant: of more keys than were looked at none is the greatest
        unclear = count > top_k + 1
        # mutant: of three that agree the third is the least
        unclear = unclear | (pairs & (pairs >> 1)).ne(0)
        for one in spent:
            # mutant: no key is missing from a list that was cut
            unclear = unclear | ((count > top_k) & t.ballot(one).ne(0))
        # mutant: of two that change places the second stays
        source = lane + ((swaps >> lane) & 1) - (((swaps << 1) >> lane) & 1)
        return unclear, t.shfl(expert, source & (WARP - 1))

    @property
    def _num_cut(self) -> int:
        """Of `_lists`, those that are cut to four: whole eights. Not where a lane may hold fewer experts than
        its keys, since such a list seems to have no key left."""
        layout = self.layout
        return layout.each // EIGHT if layout.whole else 0

    def _lists(self, keys: list[Int]) -> list[list[Int]]:
        eights = [keys[k : k + EIGHT] for k in range(0, len(keys), EIGHT)]
        cut, rest = eights[: self._num_cut], eights[self._num_cut :]
        return [*map(self._greatest_four, cut), *(descending(self.t, keys) for keys in rest)]

    def _greatest_four(self, keys: list[Int]) -> list[Int]:
        """Of eight, sorted, descending: of two sorted fours the greater of each pair from opposite ends, in
        a bitonic order, which two turns of comparisons sort."""
        t = self.t
        a, b = descending(t, keys[:4]), descending(t, keys[4:])
        four = [greater(t, x, y) for x, y in zip(a, b[::-1], strict=True)]
        for distance in (2, 1):
            for k in range(4):
                if not k & distance:
                    x, y = four[k], four[k + distance]
                    four[k], four[k + distance] = greater(t, x, y), lesser(t, x, y)
        return four

    # -- messages

    def _message(self, bests: list[Int]) -> list[Int]:
        """Of the K greatest keys."""
        t, problem = self.t, self.problem
        if packs_ids(problem):
            pairs = zip(bests[::2], bests[1::2], strict=True)
            words = [t.low_halves(first, second) for first, second in pairs]
            return words if inverts_ids(problem) else [self._inverted(word) for word in words]
        ids = []
        for k, key in enumerate(bests[:MESSAGE]):
            if problem.top_k > MESSAGE:
                key = t.select((self.lane & 1).ne(0), bests[MESSAGE + k], key)
            ids.append(self._id_in(key))
        return ids

    def _message_of(self, expert: Int) -> list[Int]:
        """Of the experts, the k-th in lane k."""
        t, problem = self.t, self.problem
        if packs_ids(problem):
            firsts = range(0, problem.top_k, 2)
            words = [t.low_halves(t.shfl(expert, k), t.shfl(expert, k + 1)) for k in firsts]
            return [self._inverted(word) for word in words] if inverts_ids(problem) else words
        first = (self.lane & (problem.top_k // MESSAGE - 1)) * MESSAGE
        return [t.shfl(expert, first + k) for k in range(MESSAGE)]

    def _inverted(self, halves: Int) -> Int:
        """A word of two ids from one of two inverted ids, and the other way round."""
        both = self.id_mask * 0x10001
        return both - (halves & both)
