"""How a warp chooses for one token, with all its logits in registers.

Lane by lane the experts lie in order, so that a tie between lanes or registers goes to the lower one; a
group of experts lies on neighbouring lanes, a power of two. A lane holds a key per expert, an int32 in the
order of what is chosen by, and sorts its keys in fours. Then K rounds each take the greatest of the warp: the
heads of the fours are compared, `redux.sync` finds the greatest key of all lanes and a second one the lowest
id that has it, and the four that it came from moves up. Lane k keeps what round k found.

bfloat16 and float16 logits that are chosen by leave bits for the id in a key, so that no two keys are equal,
and one `redux.sync` finds both. So do the high bits of float32 logits, where no groups are chosen first: a
round takes half the instructions then, and a lane sorts in eights. They tell all unless two of the K + 1
greatest agree in them; for such a token the whole keys decide. One launch with the alignment has short keys
of another kind (`fixed_point.py`).

T tokens, E experts, K chosen, G groups; a lane holds `each` experts of its group.
"""

import functools
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from moe_align_jax._router import arithmetic as f32
from moe_align_jax._router.lanes import MAX_EXPERTS, Layout, layout_of
from moe_align_jax._router.problem import GREATEST, SUM_FLOOR, RouteProblem
from moe_align_jax._router.sorting import (
    EIGHT,
    OUT,
    descending,
    greater,
    greatest,
    lesser,
    own,
    take,
)
from moe_align_jax._simt.language import WARP, Int, Simt

# Whether float32 logits are chosen by short keys first (`Router._take_short`).
SHORT_KEYS = True

_HALF = 0xFFFF
_MINUS_INFINITY = f32.bits(float("-inf"))


class Loaded(NamedTuple):
    """What a token needs of memory, on its way."""

    token: Int
    words: list[Int]
    bias: list[Int]
    real: list[Int]


class Found(NamedTuple):
    """What a token chose, its weights still to be computed.

    Attributes:
        expert: lane k's, -1 of a token that is not real.
        logit: that of lane k's expert. `None` where it must be loaded again: of a bias, or of short keys.
        logits: of my experts.
        greatest, total: of the softmax over all, where it is known already.
    """

    loaded: Loaded
    chosen: Int
    expert: Int
    logit: Int | None
    logits: list[Int]
    greatest: Int | None
    total: Int | None


def hidden_one(t: Simt) -> Int:
    """1, of which the compiler does not know it. By whole warps."""
    return t.ballot(t.thread_id() < t.num_threads) & 1


def shortens(problem: RouteProblem) -> bool:
    """Whether most tokens are chosen for by keys of a logit's high bits and the id.

    Not where groups are chosen first: the greatest logits of two groups may agree in their high bits, and the
    logits of the group that is left out are not among those by which a doubt would be seen.
    """
    is_plain = not problem.bias_rows and not problem.limits_groups
    return SHORT_KEYS and problem.dtype == "float32" and is_plain


def id_mask(problem: RouteProblem) -> int:
    """The bits of a key that hold an id: of a half all that it leaves free."""
    if problem.dtype == "bfloat16":
        return _HALF
    if problem.dtype == "float16":
        return MAX_EXPERTS - 1  # of 13
    return (1 << max(1, (problem.num_experts - 1).bit_length())) - 1


def can_keep(problem: RouteProblem) -> bool:
    """Whether `Router.keep` has its use, and whole vectors to store."""
    return shortens(problem) and problem.num_experts % (4 * WARP) == 0


class Router:
    """The code of one warp: `load`, then `choose`, which is `find` and `weigh`.

    `multiplies`: keys move by multiplications with 1, which the units for them execute beside what sorts and
    compares. That pays where many warps share a scheduler (`kernel.MULTIPLY_FROM`).
    """

    def __init__(
        self,
        t: Simt,
        r: SimpleNamespace,
        problem: RouteProblem,
        lane: Int,
        *,
        multiplies: bool = False,
    ):
        self.t, self.r, self.problem, self.lane = t, r, problem, lane
        self.layout = self._make_layout()
        self.halves = problem.dtype != "float32"
        # A key holds the id and all of the logit; a short one, of float32 logits, its high bits only.
        exact = problem.dtype == "bfloat16" or (SHORT_KEYS and problem.dtype == "float16")
        self.packed = exact and not problem.bias_rows
        self.short = shortens(problem)
        self.id_mask = self._make_id_mask()
        # Where in shared memory my token's logits are (`keep`).
        self.kept: tuple[Any, Int] | None = None
        # Of short keys: 1, of which the compiler does not know it; the ids of my experts as a key has them.
        self.one: Int | None = None
        self.id_bits: list[Int] = []
        if self.short:
            if multiplies:
                self.one = hidden_one(t)
            last = self._last_id_bits()
            offsets = map(self.layout.offset, range(self.layout.each))
            self.id_bits = [t.hidden(last - offset) for offset in offsets]
        self.num_tokens: Any = problem.num_tokens
        if problem.sized_at_launch:
            self.num_tokens = t.launch_value(r.num_tokens)

    def _make_layout(self) -> Layout:
        """Which experts this lane holds."""
        return layout_of(self.problem, self.lane)

    def _make_id_mask(self) -> int:
        """The bits of a key that hold an id."""
        return id_mask(self.problem)

    def _last_id_bits(self) -> Int:
        """The id of my first expert as a short key has it: inverted, so that the lower id is the greater."""
        return self.id_mask - self.layout.first

    # -- memory

    def load(self, token: Int) -> Loaded:
        """Unconditional, so that all of it is asked for before anything is waited for."""
        t, r, problem = self.t, self.r, self.problem
        words = self._row(r.logits, token * problem.num_experts, self.halves)
        bias = []
        if problem.bias_rows:
            row = token // (problem.num_tokens // problem.bias_rows) * problem.num_experts
            bias = self._row(r.correction_bias, row if problem.bias_rows > 1 else 0, False)
        real = []
        if problem.has_token_mask:
            real.append(t.load(r.token_mask, token).ne(0))
        if problem.has_num_valid_tokens:
            real.append(token < t.load(r.num_valid_tokens, 0))
        if problem.has_padding:
            real.append(t.load_narrow(r.is_padding, token, 1).eq(0))
        return Loaded(token, words, bias, real)

    def keep(self, loaded: Loaded, ref: Any, start: Int) -> None:
        """Stores the logits in shared memory, where `weigh` finds those of the chosen experts. A `warp_sync`
        must stand between the two. Only where `can_keep`."""
        self.kept = ref, start
        for k in range(0, self.layout.each, 4):
            first = self.layout.first + self.layout.offset(k)
            self.t.store4(ref, start + first, tuple(loaded.words[k : k + 4]))

    def _row(self, ref: Any, start: Any, halves: bool) -> list[Int]:
        """float32 bits of my experts, of a row that starts at that element (an even one for halves)."""
        t, layout = self.t, self.layout
        per_word = 2 if halves else 1
        if layout.whole and layout.each % (4 * per_word) == 0:
            at = (layout.first + start) >> (per_word - 1)
            starts = [layout.offset(k) // per_word for k in range(0, layout.each, 4 * per_word)]
            words = [word for start in starts for word in t.load4(ref, at + start)]
        elif layout.whole and layout.each % per_word == 0:
            at = (layout.first + start) >> (per_word - 1)
            starts = [layout.offset(k) // per_word for k in range(0, layout.each, per_word)]
            words = [t.load(ref, at + start) for start in starts]
        else:
            return [self._element(ref, start, self._expert(j), halves) for j in range(layout.each)]
        if not halves:
            return words
        return [self._half(word, high) for word in words for high in (0, 1)]

    def _expert(self, j: int) -> Int:
        """My j-th; 0 where there is none."""
        expert = self.layout.first + self.layout.offset(j)
        return expert if self.layout.whole else self.t.select(self.layout.within(j), expert, 0)

    def _element(self, ref: Any, start: Any, expert: Int, halves: bool) -> Int:
        """An expert's word of a vector that begins at `start`; of 16-bit floats (`halves`) as float32."""
        if not halves:
            return self.t.load(ref, expert + start)
        # No word: the last one of an odd number of halves is not the caller's.
        return self._half(self.t.load_narrow(ref, expert + start, 2), 0)

    def _half(self, word: Int, high: int) -> Int:
        """One of the two numbers in a word."""
        if self.problem.dtype == "bfloat16":
            return word & ~_HALF if high else word << 16
        return self.t.from_float16(word >> 16 if high else word)

    def _finite(self, x: Int) -> Int:
        """As `reference.finite`, and no -0."""
        t, greatest = self.t, f32.bits(GREATEST[self.problem.dtype])
        x = t.fmin(t.fmax(x, t.const(greatest | f32.SIGN)), t.const(greatest))
        return t.fadd(x, t.const(0))

    # -- the choice

    def choose(self, loaded: Loaded) -> tuple[Int, Int]:
        """(weight, expert) of lane k: the token's k-th. Those of the lanes from K on mean nothing."""
        found = self.find(loaded)
        return self.weigh(found), found.expert

    def find(self, loaded: Loaded) -> Found:
        """The experts of `choose`."""
        return self._find(loaded, self._take_short)

    def _find(self, loaded: Loaded, take_short: Callable[[Loaded], Int]) -> Found:
        """As `find`. `take_short`: of a token that is chosen for by short keys."""
        t, problem = self.t, self.problem
        logits = [self._finite(x) for x in loaded.words]
        total = greatest = None
        if problem.by_logits and not problem.bias_rows:
            choice = logits
        else:
            if problem.by_logits:
                scores = logits
            elif problem.scoring == "softmax":
                local = self._greatest([f32.order(x) for x in logits])
                greatest = f32.order(t.warp_max(local))
                powers = self._powers(logits, greatest)
                total = self._sum(powers)
                inverse = t.reciprocal(total)
                scores = [t.fmul(x, inverse) for x in powers]
            else:
                scores = [f32.score(t, problem.scoring, x) for x in logits]
            # A NaN gives -inf, and -0 becomes 0.
            choice = [
                t.fadd(t.fmax(t.fadd(x, b), t.const(_MINUS_INFINITY)), t.const(0))
                for x, b in zip(scores, loaded.bias, strict=True)
            ]
        logit = None
        if self.short:
            expert = take_short(loaded)
        else:
            value, expert = self._take(self._keys(choice, self.packed), self.packed)
            if not problem.bias_rows:
                logit = f32.order(value)
            if self.packed:
                logit, expert = f32.order(value) & ~self.id_mask, self._id_in(value)
        chosen = expert
        [expert] = self._real_only(loaded, [expert])
        return Found(loaded, chosen, expert, logit, logits, greatest, total)

    def _keys(self, choice: list[Int], packed: bool) -> list[Int]:
        """Of my experts, by what they are chosen by; `packed`, with ids in the low bits: of equal ones the
        lower id's is the greater then."""
        t, layout, mask = self.t, self.layout, self.id_mask
        keys = [f32.order(x) for x in choice]
        if packed:
            experts = [layout.first + layout.offset(j) for j in range(layout.each)]
            inverted = [mask - expert for expert in experts]
            keys = [(key & ~mask) | ids for key, ids in zip(keys, inverted, strict=True)]
        if not layout.whole:
            keys = [t.select(layout.within(j), key, OUT) for j, key in enumerate(keys)]
        if self.problem.limits_groups:
            stays = self._group_stays(keys)
            keys = [t.select(stays, key, OUT) for key in keys]
        return keys

    def _id_in(self, key: Int) -> Int:
        """The expert id in the low bits of a key, where it stands inverted: of equal values the lower id is
        the greater key."""
        return self.id_mask - (key & self.id_mask)

    def _short_keys(self, logits: list[Int]) -> list[Int]:
        """As packed `_keys`, in two instructions less."""
        t, layout, mask = self.t, self.layout, self.id_mask
        keys = []
        for x, bits in zip(logits, self.id_bits, strict=True):
            sign = 0 - (x >> 31)
            keys.append(t.masked_xor(sign, ~f32.SIGN & ~mask, t.masked_or(x, ~mask, bits)))
        if not layout.whole:
            keys = [t.select(layout.within(j), key, OUT) for j, key in enumerate(keys)]
        return keys

    def _take_short(self, loaded: Loaded) -> Int:
        """The expert of lane k: by short keys where they tell all, since no two of the K + 1 greatest agree
        in the logit's high bits or no logit has any low bits; else by the whole keys."""
        t, mask = self.t, self.id_mask
        # The logits as they are: where one of them is not finite, what this finds is not taken.
        choice, infinite = [t.fadd(x, t.const(0)) for x in loaded.words], t.const(0)
        for x in loaded.words:
            infinite = t.fma(x, t.const(0), infinite)  # a NaN
        bests, nearest, _ = self._rounds(self._short_keys(choice))
        expert = self._id_in(own(t, self.lane, bests))
        doubts = t.ballot(nearest.below(mask + 1) | (infinite & ~f32.SIGN).ne(0))

        def look() -> list[Int]:
            logits = [self._finite(x) for x in loaded.words]
            low = functools.reduce(operator.or_, (x & mask for x in logits))
            several = t.ballot(low.ne(0)).ne(0)
            return t.values_if(several, lambda: [self._take_whole(logits)], [expert])

        return t.values_if(doubts.ne(0), look, [expert])[0]

    def _take_whole(self, logits: list[Int]) -> Int:
        """The expert of lane k by whole keys, of float32 logits."""
        return self._take(self._keys(logits, False), False)[1]

    def _rounds(self, keys: list[Int]) -> tuple[list[Int], Int, list[list[Int]]]:
        """The K greatest of the warp's keys, no two of which are equal, in every lane; in which bits the two
        most alike differ, of them and of the greatest of this lane that is left; and what is left of each of
        `_lists`, from the greatest on."""
        t, problem = self.t, self.problem
        others = problem.top_k < problem.num_experts
        lists = self._lists(keys)
        bests, nearest = [], t.const(-1)
        for k in range(problem.top_k):
            best = t.warp_max(greatest(t, (one[0] for one in lists)))
            left = problem.top_k - 1 - k + others  # heads that are looked at later
            lists = [self._without_head(one, one[0].eq(best), left) for one in lists]
            if bests:
                nearest = self._nearer(nearest, best ^ bests[-1])
            bests.append(best)
        if others:
            head = greatest(t, (one[0] for one in lists))
            nearest = self._nearer(nearest, head ^ bests[-1])
        return bests, nearest, lists

    def _lists(self, keys: list[Int]) -> list[list[Int]]:
        """This lane's short keys in eights, each sorted, descending."""
        return [descending(self.t, keys[k : k + EIGHT]) for k in range(0, len(keys), EIGHT)]

    def _nearer(self, a: Int, b: Int) -> Int:
        """The lesser of two without a sign."""
        return self.t.select(b.below(a), b, a)

    def _without_head(self, keys: list[Int], was_taken: Int, left: int) -> list[Int]:
        """Moved up by one where the head was taken; no longer than `left`."""
        t, moved = self.t, []
        for key, after in zip(keys[:left], [*keys[1:], OUT], strict=False):
            if self.one is None or isinstance(after, int):
                moved.append(t.select(was_taken, after, key))
            else:
                moved.append(t.multiply_if(was_taken, after, self.one, key))
        return moved

    def _real_only(self, loaded: Loaded, ids: list[Int]) -> list[Int]:
        """-1 in the place of ids where the token is not real."""
        for real in loaded.real:
            ids = [self.t.select(real, word, -1) for word in ids]
        return ids

    def weigh(self, found: Found) -> Int:
        """The weight of `choose`."""
        loaded, logit = found.loaded, found.logit
        if logit is None:
            logit = self._reload(loaded.token, found.chosen)
        weight = self._weigh(found.logits, logit, found.greatest, found.total)
        for real in loaded.real:
            if not self.problem.keeps_weights:
                weight = self.t.select(real, weight, 0)
        return weight

    def found_of(self, loaded: Loaded, values: list[Int]) -> Found:
        """What `values_of` took apart."""
        given = dict(zip(_value_names(self.problem), values, strict=True))
        expert = given["expert"]
        return Found(
            loaded,
            given.get("chosen", expert),
            expert,
            given.get("logit"),
            [self._finite(x) for x in loaded.words],
            given.get("greatest"),
            given.get("total"),
        )

    def _greatest(self, keys: list[Int]) -> Int:
        """The greatest key of this lane, `OUT` where it holds none."""
        best = keys[0]
        for j, key in enumerate(keys[1:], start=1):
            if not self.layout.whole:
                key = self.t.select(self.layout.within(j), key, OUT)
            best = greater(self.t, best, key)
        if not self.layout.whole:
            best = self.t.select(self.layout.within(0), best, OUT)
        return best

    def _powers(self, logits: list[Int], greatest: Int) -> list[Int]:
        """`exp(x - greatest)` of my logits, 0 where I hold none."""
        t, layout = self.t, self.layout
        powers = [f32.fast_exp(t, f32.subtract(t, x, greatest)) for x in logits]
        if layout.whole:
            return powers
        return [t.select(layout.within(j), x, 0) for j, x in enumerate(powers)]

    def _sum(self, xs: list[Int]) -> Int:
        """Over the warp."""
        while len(xs) > 1:
            pairs = zip(xs[::2], xs[1::2], strict=False)
            xs = [self.t.fadd(a, b) for a, b in pairs] + xs[len(xs) & ~1 :]
        return f32.sum_over_warp(self.t, xs[0], self.lane)

    def _group_stays(self, keys: list[Int]) -> Int:
        """Whether my group is among the best."""
        t, problem, layout = self.t, self.problem, self.layout
        pair = problem.bias_rows and problem.group_size > 1
        first, second = keys[0], t.const(OUT)
        for key in keys[1:]:
            if pair:
                second = greater(t, second, lesser(t, first, key))
            first = greater(t, first, key)
        distance = 1
        while distance < layout.lanes:
            first_there = t.shfl(first, self.lane ^ distance)
            if pair:
                second_there = t.shfl(second, self.lane ^ distance)
                both = greater(t, second, second_there)
                second = greater(t, both, lesser(t, first, first_there))
            first = greater(t, first, first_there)
            distance *= 2
        if pair:
            total = t.fadd(f32.order(first), f32.order(second))
            # inf - inf is as bad as -inf.
            total = t.fadd(t.fmax(total, t.const(_MINUS_INFINITY)), t.const(0))
            first = f32.order(total)
        better = t.const(0)
        for group in range(problem.num_groups):
            other = t.shfl(first, group * layout.lanes)
            ahead = (other > first) | (other.eq(first) & (layout.group > group))
            better = better + t.select(ahead, 1, 0)
        return better < problem.topk_groups

    def _take(self, keys: list[Int], packed: bool) -> tuple[Int, Int]:
        """(key, expert) of lane k, as `sorting.take`."""
        offsets = map(self.layout.offset, range(len(keys)))
        items = [(key, self.layout.first + at) for key, at in zip(keys, offsets, strict=True)]
        return take(self.t, self.lane, items, self.problem.top_k, packed)

    # -- the weights

    def _reload(self, token: Int, expert: Int) -> Int:
        """The logit of lane k's expert, by which it was not chosen."""
        if self.kept is not None:
            ref, start = self.kept
            return self._finite(self.t.load(ref, start + expert))
        start = token * self.problem.num_experts
        return self._finite(self._element(self.r.logits, start, expert, self.halves))

    def _weigh(self, logits: list[Int], logit: Int, greatest: Int | None, total: Int | None) -> Int:
        """Of lane k's logit; 0 in the lanes from K on."""
        t, problem, lane = self.t, self.problem, self.lane
        inside = lane < problem.top_k
        if problem.scoring == "softmax":
            if problem.over_chosen and problem.bias_rows:
                greatest = f32.order(t.warp_max(t.select(inside, f32.order(logit), OUT)))
            elif greatest is None:  # chosen by the logits: the first is the greatest of all
                greatest = t.shfl(logit, 0)
            if not problem.over_chosen and total is None:
                total = self._sum(self._powers(logits, greatest))
            weight = f32.exp(t, f32.subtract(t, logit, greatest))
        else:
            weight = f32.score(t, problem.scoring, logit)
        weight = t.select(inside, weight, 0)
        if problem.over_chosen or (problem.renormalize and problem.scoring != "softmax"):
            width = 1 << (problem.top_k - 1).bit_length()
            total = f32.sum_over_warp(t, weight, lane, width)
            if not problem.over_chosen:
                total = t.fadd(total, t.const(f32.bits(SUM_FLOOR)))
        if total is not None:
            weight = t.fmul(weight, t.reciprocal(total))
        if problem.scaling_factor != 1:
            weight = t.fmul(weight, t.const(f32.bits(problem.scaling_factor)))
        return t.select(inside, weight, 0)


def _value_names(problem: RouteProblem) -> list[str]:
    """What `find` gives beside the logits."""
    if not problem.bias_rows and not shortens(problem):
        return ["expert", "logit"]
    names = ["expert", "chosen"]
    if not problem.by_logits and problem.scoring == "softmax":
        names += ["greatest", "total"]
    return names


def num_values(problem: RouteProblem) -> int:
    """Of `values_of`."""
    return len(_value_names(problem))


def values_of(found: Found) -> list[Int]:
    """What was found, to be carried out of a branch; `Router.found_of` puts it together again."""
    if found.logit is not None:
        return [found.expert, found.logit]
    values = [found.expert, found.chosen, found.greatest, found.total]
    return [x for x in values if x is not None]
