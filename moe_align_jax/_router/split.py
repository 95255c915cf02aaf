"""One launch whose warps have two tasks: some choose experts, a token each; the others align what was chosen.

A token names an expert at most once, so the pairs of an expert are told by its tokens alone, up to 64 of
them: the bits of a word, or of two. Atomic additions in shared memory set the bits, which no order changes.
The number of an expert's bits is its count, unless its tokens are counted beside them, and a pair's rank is
the number of those before its token's.

While the routing warps wait for logits, the aligning warps write all that needs no id: sentinels, and masks
without a bit. In one CTA the routing warps set the bits themselves, and compute the weights while the others
align. In a cluster they post their ids to every CTA, in messages of 4 words, and compute the weights while
these are on their way; the aligning warps of each CTA set the bits of all and write a slice of each output.
They have a barrier of their own, so that no routing warp waits for them.

Every aligning warp adds up the blocks of all experts itself: a lane has a few neighbouring experts, and the
sum over the lanes before it comes from one ballot for each bit of a lane's sum.

Bytes: every output written once, the rows and blocks in use twice. Grid: one cluster. Deterministic.
"""

import functools
import operator
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from moe_align_jax._align.kernels import common
from moe_align_jax._core.int32 import cdiv
from moe_align_jax._router import fixed_point, warp_router
from moe_align_jax._router import kernel as routing
from moe_align_jax._router.problem import RouteProblem
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, WARPGROUP, Int, Simt
from moe_align_jax.types import AlignProblem

MAX_TOKENS = 2 * WARP
_BYTE, _ONES = 255, 0x01010101
_COUNT_SHIFT = 24
_MOST_STORES = 8  # of a thread that fills, one after the other
_MOST_BALLOTS = 9  # a scan takes five shuffles, each of which waits for the one before


def takes(align: AlignProblem, num_tokens: int) -> bool:
    """Whether no token can have two pairs in one group: ids that are mapped before they are counted may."""
    return num_tokens <= MAX_TOKENS and not align.dispatch and align.expert_map != "filter"


class Split:
    """The code of one CTA: its last warpgroup aligns, the warps of the others have a token each."""

    def __init__(
        self,
        problem: RouteProblem,
        align: AlignProblem,
        *,
        num_warpgroups: int,
        num_ctas: int,
    ):
        self.problem, self.align, self.num_ctas = problem, align, num_ctas
        self.routers = (num_warpgroups - 1) * WARPGROUP // WARP
        self.first_thread, self.threads = self.routers * WARP, WARPGROUP
        self.words = cdiv(problem.num_tokens, WARP)  # of an expert's mask
        self.each = cdiv(align.num_experts, 4 * WARP) * 4  # experts of a lane
        self.stride = self.each * WARP
        # The barrier of the cluster empties the L1 cache, so that a logit that is loaded again comes from L2.
        # Where two routing warps share a scheduler, it is faster to keep all logits in shared memory:
        # 64 tokens take 2.06 us instead of 2.09 (E = 256, H200, under jit, device spans, 2026-11-29).
        self.keeps = (
            self.routers > WARPGROUP // WARP and num_ctas > 1 and warp_router.can_keep(problem)
        )
        self.row = problem.top_k  # words of a token's ids
        if num_ctas > 1:
            self.row = cdiv(problem.top_k, fixed_point.MESSAGE) * fixed_point.MESSAGE
        # Two ids to a word of the mail; a thread then has neighbouring pairs.
        self.packs = num_ctas > 1 and fixed_point.packs_ids(problem)
        if self.packs:
            self.row = problem.top_k // 2
        self.num_words = problem.num_tokens * self.row
        self.most_blocks = cdiv(problem.num_tokens, align.block_size)  # of an expert
        # Where an expert may have several blocks, its tokens are counted beside its bits: in the same word,
        # where that has room, so that one addition does both, or in a byte or a word of their own.
        self.packed = self.most_blocks > 1 and problem.num_tokens <= _COUNT_SHIFT
        self.counted = self.most_blocks > 1 and not self.packed
        self.in_lanes = self.each <= 8 and self.each * self.most_blocks <= _BYTE
        size = align.block_size
        if self.words > 1 and self.most_blocks == 1:
            # A byte is shorter to read than two words of bits: 64 tokens in blocks of 64 rows take 2.16 us
            # instead of 2.28 (E = 256, H200, under jit, device spans, 2026-11-29).
            fits_bytes = size & (size - 1) == 0 and problem.num_tokens + size - 1 <= _BYTE
            self.counted = self.in_lanes and fits_bytes
        # Four counts to a word, which `_starts` rounds up to blocks at once.
        self.bytes = self.counted and self.in_lanes and size & (size - 1) == 0
        # Of more than 32 tokens an aligning thread reads counts and first blocks of its pairs' experts as
        # bytes (`_starts_by_bytes`); up to 32 it has fewer pairs, and shuffles bring them.
        self.by_bytes = self.bytes and self.words > 1

    @property
    def _cells(self) -> int:
        """Words of the masks, and of the counts behind them."""
        counts = self.stride // 4 if self.bytes else self.stride
        return self.words * self.stride + self.counted * counts

    @property
    def _late_outputs(self) -> list[str]:
        """What every aligning thread writes behind the mail."""
        inverse = ["row_of_pair"] if self.align.return_inverse else []
        return ["sorted_token_ids", "expert_ids", *inverse]

    @property
    def shared(self) -> dict[str, int]:
        """Words of each shared-memory array."""
        arrays = {"masks": self._cells}
        if self.num_ctas == 1:
            arrays["chosen"] = self.num_words
        if self.keeps:
            arrays["kept"] = self.routers * self.problem.num_experts
        if self.by_bytes:
            # Of each aligning warp: the first block of each expert among its lane's, and each lane's blocks.
            arrays["firsts"] = self.threads // WARP * self.stride // 4
            arrays["sums"] = self.threads // WARP * WARP // 4
        if not self.in_lanes:
            arrays["starts"] = self.threads // WARP * self.stride
        return arrays

    def body(self, t: Simt, r: SimpleNamespace) -> None:
        """The kernel's body: the first warps choose the experts of a token each, the last warpgroup aligns
        them."""
        problem = self.problem
        tid = t.thread_id()
        lane, warp = tid & (WARP - 1), tid >> 5
        t.grid_dependency_wait()
        t.launch_dependents()
        router: warp_router.Router
        if warp_router.shortens(problem):
            router = fixed_point.FixedPointRouter(t, r, problem, lane)
        else:
            router = warp_router.Router(t, r, problem, lane)
        # Dealt out to the CTAs in turns: of 33 to 63 tokens as few schedulers as may be have two routing
        # warps, which wait for each other. 33 tokens take 1.92 us instead of 1.95 (E = 256, H200, under jit,
        # device spans, 2026-11-29).
        token = warp * self.num_ctas + t.cta_id()
        routes = (warp < self.routers) & (token < problem.num_tokens)
        loaded = router.load(t.select(routes, token, 0))
        run = self._in_one_cta if self.num_ctas == 1 else self._in_a_cluster
        run(t, r, router, loaded, token, routes, warp >= self.routers)

    def _in_a_cluster(
        self,
        t: Simt,
        r: SimpleNamespace,
        router: warp_router.Router,
        loaded: warp_router.Loaded,
        token: Int,
        routes: Int,
        aligns: Int,
    ) -> None:
        """With several CTAs: routers post their tokens' ids to the CTAs that align, then write the weights.
        No warp of one task waits for one of the other before that: each waits for the cluster by itself.

        Args:
            t, r: as of a body.
            router, loaded: of this warp, with its token's logits under way.
            token: the warp's.
            routes, aligns: whether the warp has a token, whether it aligns.
        """
        # Behind the loads of the logits, which would wait for it.
        t.open_mailbox()
        with t.if_(routes):
            t.cluster_ready()
            self._route(t, r, router, loaded, token)
        if self.problem.num_tokens < self.routers * self.num_ctas:
            with t.if_((t.thread_id() < self.first_thread) & (token >= self.problem.num_tokens)):
                t.cluster_ready()
        with t.if_(aligns):
            self._align_mail(t, r)

    def _route(
        self,
        t: Simt,
        r: SimpleNamespace,
        router: warp_router.Router,
        loaded: warp_router.Loaded,
        token: Int,
    ) -> None:
        """A routing warp of a cluster, with its logits under way."""
        if self.keeps:
            start = (t.thread_id() >> 5) * self.problem.num_experts
            router.keep(loaded, r.kept, start)
        send = functools.partial(self._send, t, token, router.lane)
        if self.packs:
            # Its address is there before the message is.
            place = t.mail_place(router.lane, token * self.row)
            send = functools.partial(self._send_packed, t, router.lane, place)
        if fixed_point.sends_early(self.problem):
            assert isinstance(router, fixed_point.FixedPointRouter)
            found = router.find(loaded, send)
        else:
            found = router.find(loaded)
            self._post(t, token, found.expert, router.lane)
        # Otherwise the assembler moves the load of the logit, and what waits for it, ahead of messages.
        t.warp_sync()
        routing.store(router, token, router.weigh(found), found.expert)

    def _align_mail(self, t: Simt, r: SimpleNamespace) -> None:
        """An aligning warp of a cluster."""
        one = warp_router.hidden_one(t)
        self._clear(t, r)
        before = self._lanes_before(t) if self.by_bytes else []
        self._fill(t, r)
        # Else their addresses are loaded again behind the mail.
        outputs = {name: t.held(getattr(r, name), one - 1) for name in self._late_outputs}
        r = SimpleNamespace(**{**vars(r), **outputs})
        t.cluster_ready(has_first=False)
        t.tail_sync()
        pairs = self._experts(t, r, t.mail())
        for pair, expert in pairs:
            self._set_bit(t, r, pair // self.problem.top_k, expert)
        t.tail_sync()
        self._align(t, r, pairs, before)

    def _in_one_cta(
        self,
        t: Simt,
        r: SimpleNamespace,
        router: warp_router.Router,
        loaded: warp_router.Loaded,
        token: Int,
        routes: Int,
        aligns: Int,
    ) -> None:
        """With one CTA: all routers set their tokens' bits in shared memory, then the last warpgroup aligns.

        The arguments are those of `_in_a_cluster`.
        """
        with t.if_(aligns):
            self._clear(t, r)
        t.block_sync()
        with t.if_(aligns):
            self._fill(t, r)

        def choose() -> list[Int]:
            found = router.find(loaded)
            self._keep(t, r, token, found.expert, router.lane)
            return warp_router.values_of(found)

        chosen = t.values_if(routes, choose, [0] * warp_router.num_values(self.problem))
        t.block_sync()
        with t.if_(routes):
            found = router.found_of(loaded, chosen)
            routing.store(router, token, router.weigh(found), found.expert)
        with t.if_(aligns):
            self._align(t, r, self._experts(t, r, r.chosen))

    # -- the routing warps

    def _post(self, t: Simt, token: Int, expert: Int, lane: Int) -> None:
        """The ids of a token to every CTA: a lane sends a message of them to one."""
        parts = self.row // fixed_point.MESSAGE
        width = 1 << (parts - 1).bit_length()
        part = lane & (width - 1)
        source = t.select(part < parts, part * fixed_point.MESSAGE, 0)
        ids = [t.shfl(expert, source + k) for k in range(fixed_point.MESSAGE)]
        self._send(t, token, lane, ids)

    def _send(self, t: Simt, token: Int, lane: Int, ids: list[Int]) -> None:
        """As `_post`, of a lane's message."""
        parts = self.row // fixed_point.MESSAGE
        width = 1 << (parts - 1).bit_length()
        part, first = lane & (width - 1), lane >> (width.bit_length() - 1)
        for cta in range(0, self.num_ctas, WARP // width):
            to = first + cta
            with t.if_((part < parts) & (to < self.num_ctas)):
                t.post(to, token * self.row + part * fixed_point.MESSAGE, *ids)

    def _send_packed(self, t: Simt, lane: Int, place: Any, words: list[Int]) -> None:
        """All ids of a token, two to a word: a lane sends them to one CTA."""
        with t.if_(lane < self.num_ctas):
            t.post_at(place, *words)

    def _keep(self, t: Simt, r: SimpleNamespace, token: Int, expert: Int, lane: Int) -> None:
        """The ids of a token in the one CTA's shared memory, and their bits."""
        with t.if_(lane < self.problem.top_k):
            t.store(r.chosen, token * self.row + lane, expert)
            pair = token * self.problem.top_k + lane
            limit = common.pair_limit(t, r, self.align)
            loaded = common.LoadedId(pair, lane < self.problem.top_k, (expert,))
            self._set_bit(t, r, token, common.expert_of(t, r, self.align, loaded, limit))

    def _set_bit(self, t: Simt, r: SimpleNamespace, token: Int, expert: Int) -> None:
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

    # -- the aligning warps

    def _mine(self, t: Simt) -> dict[str, Any]:
        """Who I am among the aligning threads, for a fill."""
        return {"thread": t.thread_id() - self.first_thread, "threads": self.threads}

    def _clear(self, t: Simt, r: SimpleNamespace) -> None:
        """Masks without a bit."""
        collectives.fill(t, r.masks, 0, self._cells, vector=True, **self._mine(t))
        if self.by_bytes:
            word = t.thread_id() - self.first_thread
            with t.if_(word < self.threads // 4):
                t.store(r.sums, word, 0)

    def _lanes_before(self, t: Simt) -> list[Int]:
        """A byte for each lane of the warp, 1 for those before mine and 0 for the others. Made ahead of the
        mail, and hidden, so that none of it is left to do behind it."""
        lane = (t.thread_id() - self.first_thread) & (WARP - 1)
        words = []
        for k in range(WARP // 4):
            below = (t.const(1) << ((lane & 3) << 3)) - 1  # in the word that has my own lane
            own = t.select((lane >> 2).eq(k), below & _ONES, 0)
            words.append(t.hidden(t.select((lane >> 2) > k, t.const(_ONES), own)))
        return words

    def _fill(self, t: Simt, r: SimpleNamespace) -> None:
        """Sentinels, in my CTA's slices."""
        align = self.align
        self._fill_slice(t, r.sorted_token_ids, align.capacity, align.num_pairs)
        self._fill_slice(t, r.expert_ids, align.num_blocks, -1)

    def _fill_slice(self, t: Simt, ref: Any, size: int, value: int) -> None:
        """As `common.Slice.fill`; but in a cluster without a loop, where a thread has few stores. A turn of a
        loop loads the output's address and asks for the CTA's number again: five turns, as of 64 tokens in
        blocks of 64 rows, ended behind the mail."""
        part = common.Slice(t, size)
        thread = t.thread_id() - self.first_thread
        step = self.threads * 4
        if self.num_ctas == 1 or part.length > _MOST_STORES * step:
            part.fill(ref, value, vector=True, thread=thread, threads=self.threads)
            return
        whole, own = size // 4 * 4, thread * 4
        first = t.hidden(part.base + own)
        for start in range(0, part.length, step):
            inside = (first + start).below(whole)
            if start + step > part.length:
                inside = inside & (own < part.length - start)
            with t.if_(inside):
                t.store4(ref, first + start, value)
        if size > whole:
            with part.holding(thread + whole, thread < size - whole):
                t.store(ref, thread + whole, value)

    def _experts(self, t: Simt, r: SimpleNamespace, ids: Any) -> list[tuple[Int, Int]]:
        """(pair, its group) of each of my pairs, -1 past the end and for one that is dropped."""
        align = self.align
        first = t.thread_id() - self.first_thread
        limit = common.pair_limit(t, r, align)
        if self.packs:
            return self._packed_experts(t, r, ids, first, limit)
        pairs = [first + start for start in range(0, align.num_pairs, self.threads)]
        insides = [pair < align.num_pairs for pair in pairs]
        words = self._ids(t, ids, [t.select(i, p, 0) for i, p in zip(insides, pairs, strict=True)])
        found = []
        for pair, inside, word in zip(pairs, insides, words, strict=True):
            loaded = common.LoadedId(pair, inside, (word,))
            found.append((pair, common.expert_of(t, r, align, loaded, limit)))
        return found

    def _packed_experts(
        self, t: Simt, r: SimpleNamespace, ids: Any, first: Int, limit: Any
    ) -> list[tuple[Int, Int]]:
        """As `_experts`, of words with two ids. `first`: my first word."""
        align, found = self.align, []
        starts = range(0, cdiv(align.num_pairs, 2), self.threads)
        insides = [(first + start) * 2 < align.num_pairs for start in starts]  # a token has 8 pairs
        words = [
            t.load(ids, t.select(inside, first + start, 0))
            for start, inside in zip(starts, insides, strict=True)
        ]
        if fixed_point.inverts_ids(self.problem):
            words = [word ^ -1 for word in words]
        id_bits = (1 << (self.problem.num_experts - 1).bit_length()) - 1
        for start, inside, word in zip(starts, insides, words, strict=True):
            for half in (0, 1):
                pair = first * 2 + (2 * start + half)
                if self.problem.may_drop:
                    expert = word >> 16 if half else (word << 16) >> 16  # with the sign of -1
                else:
                    expert = (word >> 16 if half else word) & id_bits
                loaded = common.LoadedId(pair, inside, (expert,))
                found.append((pair, common.expert_of(t, r, align, loaded, limit)))
        return found

    def _ids(self, t: Simt, ids: Any, pairs: list[Int]) -> list[Int]:
        """Of pairs."""
        top_k = self.problem.top_k
        places = pairs
        if self.row != top_k:
            places = [pair // top_k * self.row + pair % top_k for pair in pairs]
        words = [t.load(ids, place) for place in places]
        if self.problem.may_drop:
            return words
        # The same words; but of so few bits the compiler knows that they need no check.
        bits = (self.problem.num_experts - 1).bit_length()
        return [word & ((1 << bits) - 1) for word in words]

    def _align(
        self,
        t: Simt,
        r: SimpleNamespace,
        pairs: list[tuple[Int, Int]],
        before: Sequence[Int] = (),
    ) -> None:
        """`pairs`: `_experts`; `before`: `_lanes_before`."""
        align, problem = self.align, self.problem
        tid = t.thread_id() - self.first_thread
        lane, warp = tid & (WARP - 1), tid >> 5
        first = lane * self.each
        if self.bytes:
            at = lane * (self.each // 4) + self._first_counted
            masks = [[t.load(r.masks, at + k) for k in range(self.each // 4)]]
        else:
            masks = [
                [x for k in range(0, self.each, 4) for x in t.load4(r.masks, first + (at + k))]
                for at in range(self._first_counted, self._cells, self.stride)
            ]
        safe = [t.select(expert >= 0, expert, 0) for _, expert in pairs]
        ranks = [
            self._rank(t, r, expert, pair // problem.top_k, number)
            for number, ((pair, _), expert) in enumerate(zip(pairs, safe, strict=True))
        ]
        starts, total = self._starts(t, r, masks, safe, lane, warp, before)

        rows, names = common.Slice(t, align.capacity), common.Slice(t, align.num_blocks)
        sizes = common.Sizes(t, r, align)
        for (pair, expert), own, rank, start in zip(pairs, safe, ranks, starts, strict=True):
            kept = expert >= 0
            row = start * align.block_size + rank
            with rows.holding(row, kept):
                t.store(r.sorted_token_ids, row, pair)
            block, opens = start, rank.eq(0)
            if self.most_blocks > 1:
                block = start + rank // align.block_size
                opens = (rank % align.block_size).eq(0)
            with names.holding(block, kept & opens):
                t.store(r.expert_ids, block, common.block_label(t, r, align, own))
            # Each CTA writes the rows of as many tokens as it has routing warps: neighbours, whichever CTA
            # routed them.
            with t.if_((pair // (problem.top_k * self.routers)).eq(t.cta_id())):
                common.write_inverse(t, r, align, sizes, pair, expert, row)
        with t.if_(t.cta_id().eq(0) & warp.eq(0)):
            if align.return_counts:
                for j in range(self.each):
                    with t.if_(first + j < align.num_experts):
                        count = self._count(
                            t, [word[j // 4 if self.bytes else j] for word in masks], j
                        )
                        t.store(r.tokens_per_expert, first + j, count)
            with t.if_(lane.eq(WARP - 1)):
                t.store(r.num_tokens_post_padded, 0, total * align.block_size)

    @property
    def _first_counted(self) -> int:
        """Where the words begin that say how many tokens an expert has."""
        return self.words * self.stride if self.counted else 0

    def _count(self, t: Simt, words: list[Int], number: int) -> Int:
        """The tokens of an expert, of a lane's `number`-th."""
        if self.bytes:
            return (words[0] >> 8 * (number & 3)) & _BYTE
        if self.counted:
            return words[0]
        if self.packed:
            return (words[0] >> _COUNT_SHIFT) & _BYTE
        return sum((t.popc(word) for word in words), t.const(0))

    def _used(self, t: Simt, words: list[Int]) -> Int:
        """1 where an expert has a token, else 0."""
        either = functools.reduce(operator.or_, words)
        return t.select(either.ne(0), 1, 0)

    def _rank(self, t: Simt, r: SimpleNamespace, expert: Int, token: Int, number: int) -> Int:
        """The tokens of the expert before that one. `number`: which of a thread's pairs it is, which says in
        part what token it may be."""
        below = (t.const(1) << (token & (WARP - 1))) - 1
        side, threads = (number // 2, 2 * self.threads) if self.packs else (number, self.threads)
        first = side * threads // self.problem.top_k
        last = (side * threads + threads - 1) // self.problem.top_k
        if self.words == 1 or last < WARP:
            return t.popc(t.load(r.masks, expert) & below)
        if self.by_bytes and first >= WARP:
            # Without the word of the first 32 tokens: all but those from this one on.
            count = t.load_byte(r.masks, expert + self._first_counted * 4)
            return count - t.popc(t.load(r.masks, expert + self.stride) & (below ^ -1))
        low, more = t.const(-1), below
        if first < WARP:
            high = token >= WARP
            low, more = t.select(high, -1, below), t.select(high, below, 0)
        return t.popc(t.load(r.masks, expert) & low) + t.popc(
            t.load(r.masks, expert + self.stride) & more
        )

    def _sum_below(self, t: Simt, mine: Int, lane: Int) -> Int:
        """The sum over the lanes before mine."""
        bits = (self.each * self.most_blocks).bit_length()
        if bits > _MOST_BALLOTS:
            return collectives.warp_inclusive_scan(t, mine, lane) - mine
        below, total = collectives.lanes_below(t, lane), t.const(0)
        votes = [t.ballot((mine & (1 << bit)).ne(0)) for bit in range(bits)]
        for bit, vote in enumerate(votes):
            total = total + (t.popc(vote & below) << bit)
        return total

    def _starts(
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
        `masks`: of a lane's own experts; `before`: `_lanes_before`."""
        if self.bytes:
            # Rounded up to blocks, four experts at once: no sum of a byte comes to 256.
            size = self.align.block_size
            shift = size.bit_length() - 1
            rounded = [(word + _ONES * (size - 1)) >> shift for word in masks[0]]
            words = [word & (_ONES * (_BYTE >> shift)) for word in rounded]
            if self.by_bytes:
                return self._starts_by_bytes(t, r, words, experts, lane, warp, before)
            return self._starts_in_lanes(t, words, experts, lane)
        of_expert = [[word[j] for word in masks] for j in range(self.each)]
        if self.most_blocks == 1 and self.each <= 8:
            # A bit says that an expert has its one block.
            used = functools.reduce(
                operator.or_, (self._used(t, x) << j for j, x in enumerate(of_expert))
            )
            mine = t.popc(used)
            base = self._sum_below(t, mine, lane)
            both, found = (base << 8) | used, []
            for expert in experts:
                word = t.shfl(both, expert >> self._shift)
                below = (t.const(1) << (expert & (self.each - 1))) - 1
                found.append((word >> 8) + t.popc(word & below))
            return found, base + mine
        size = self.align.block_size
        if self.most_blocks == 1:
            blocks = [self._used(t, words) for words in of_expert]
        else:
            blocks = [
                (self._count(t, words, j) + (size - 1)) // size for j, words in enumerate(of_expert)
            ]
        fours = [blocks[k : k + 4] for k in range(0, self.each, 4)]
        if not self.in_lanes:
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
        return self._starts_in_lanes(t, four_in_one, experts, lane)

    def _starts_in_lanes(
        self, t: Simt, blocks: list[Int], experts: list[Int], lane: Int
    ) -> tuple[list[Int], Int]:
        """As `_starts`, from the blocks of a lane's own experts, a byte each."""
        words, mine = self._running_sums(t, blocks)
        base = self._sum_below(t, mine, lane)
        found = []
        for expert in experts:
            source = expert >> self._shift
            word = t.shfl(words[0], source)
            if len(words) > 1:
                word = t.select((expert & 4).ne(0), t.shfl(words[1], source), word)
            inside = (word >> ((expert & 3) << 3)) & _BYTE
            found.append(t.shfl(base, source) + inside)
        return found, base + mine

    def _running_sums(self, t: Simt, blocks: list[Int]) -> tuple[list[Int], Int]:
        """For each byte the sum of the bytes before it, in words as they are; and the sum of all."""
        # The bytes of a word times 0x01010101 are their running sums.
        words, total = [], t.const(0)
        for counts in blocks:
            sums = counts * _ONES + total * _ONES
            words.append(sums - counts)
            total = (sums >> 24) & _BYTE
        return words, total

    def _starts_by_bytes(
        self,
        t: Simt,
        r: SimpleNamespace,
        blocks: list[Int],
        experts: list[Int],
        lane: Int,
        warp: Int,
        before: Sequence[Int],
    ) -> tuple[list[Int], Int]:
        """As `_starts_in_lanes`, but by shared memory, where four pairs of a thread would take 12 shuffles.
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
