"""One launch whose warps have two tasks: some choose experts, a token each; the others align what was chosen.

A token names an expert at most once, so that bits in shared memory, one for each token of an expert, tell
counts and ranks (token_bits.py), and these where each expert's blocks begin (first_blocks.py).

While the routing warps wait for logits, the aligning warps write all that needs no id: sentinels, and masks
without a bit. In one CTA the routing warps set the bits themselves, and compute the weights while the others
align. In a cluster they post their ids to every CTA, in messages of 4 words, and compute the weights while
these are on their way; the aligning warps of each CTA set the bits of all and write a slice of each output.
They have a barrier of their own, so that no routing warp waits for them.

Bytes: every output written once, the rows and blocks in use twice. Grid: one cluster. Deterministic.
"""

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from moe_align_jax._align.kernels import common
from moe_align_jax._core.int32 import cdiv
from moe_align_jax._router import fixed_point, warp_router
from moe_align_jax._router import kernel as routing
from moe_align_jax._router.first_blocks import FirstBlocks
from moe_align_jax._router.problem import RouteProblem
from moe_align_jax._router.token_bits import TokenBits
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, WARPGROUP, Int, Simt
from moe_align_jax.types import AlignProblem

MAX_TOKENS = 2 * WARP
_MOST_STORES = 8  # of a thread that fills, one after the other


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
        self.bits = TokenBits(problem, align, self.packs)
        self.blocks = FirstBlocks(self.bits, align)

    @property
    def _late_outputs(self) -> list[str]:
        """What every aligning thread writes behind the mail."""
        inverse = ["row_of_pair"] if self.align.return_inverse else []
        return ["sorted_token_ids", "expert_ids", *inverse]

    @property
    def shared(self) -> dict[str, int]:
        """Words of each shared-memory array."""
        arrays = {"masks": self.bits.cells}
        if self.num_ctas == 1:
            arrays["chosen"] = self.num_words
        if self.keeps:
            arrays["kept"] = self.routers * self.problem.num_experts
        return arrays | self.blocks.shared

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
        before = self.blocks.lanes_before(t, self._thread(t))
        self._fill(t, r)
        # Else their addresses are loaded again behind the mail.
        outputs = {name: t.held(getattr(r, name), one - 1) for name in self._late_outputs}
        r = SimpleNamespace(**{**vars(r), **outputs})
        t.cluster_ready(has_first=False)
        t.tail_sync()
        pairs = self._experts(t, r, t.mail())
        for pair, expert in pairs:
            self.bits.add(t, r, pair // self.problem.top_k, expert)
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
            self.bits.add(t, r, token, common.expert_of(t, r, self.align, loaded, limit))

    # -- the aligning warps

    def _thread(self, t: Simt) -> Int:
        """My number among the aligning threads."""
        return t.thread_id() - self.first_thread

    def _clear(self, t: Simt, r: SimpleNamespace) -> None:
        """Masks without a bit."""
        thread = self._thread(t)
        mine = {"thread": thread, "threads": self.threads}
        collectives.fill(t, r.masks, 0, self.bits.cells, vector=True, **mine)
        self.blocks.clear(t, r, thread)

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
        thread = self._thread(t)
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
        first = self._thread(t)
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
        """`pairs`: `_experts`; `before`: `FirstBlocks.lanes_before`."""
        align, problem = self.align, self.problem
        tid = self._thread(t)
        lane, warp = tid & (WARP - 1), tid >> 5
        first = lane * self.bits.each
        masks = self.bits.of_lane(t, r, lane, first)
        safe = [t.select(expert >= 0, expert, 0) for _, expert in pairs]
        ranks = [
            self.bits.rank(t, r, expert, pair // problem.top_k, number)
            for number, ((pair, _), expert) in enumerate(zip(pairs, safe, strict=True))
        ]
        starts, total = self.blocks.starts(t, r, masks, safe, lane, warp, before)

        rows, names = common.Slice(t, align.capacity), common.Slice(t, align.num_blocks)
        sizes = common.Sizes(t, r, align)
        for (pair, expert), own, rank, start in zip(pairs, safe, ranks, starts, strict=True):
            kept = expert >= 0
            row = start * align.block_size + rank
            with rows.holding(row, kept):
                t.store(r.sorted_token_ids, row, pair)
            block, opens = start, rank.eq(0)
            if self.bits.most_blocks > 1:
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
                for j in range(self.bits.each):
                    with t.if_(first + j < align.num_experts):
                        count = self.bits.count(
                            t, [word[j // 4 if self.bits.bytes else j] for word in masks], j
                        )
                        t.store(r.tokens_per_expert, first + j, count)
            with t.if_(lane.eq(WARP - 1)):
                t.store(r.num_tokens_post_padded, 0, total * align.block_size)
