"""The alignment of ids that a router has just chosen, up to 64 tokens: each expert's tokens as a mask's bits.

A token names an expert at most once, so the pairs of an expert are told by its tokens alone: the bits of a
word, or of two. A bit is set by an atomic addition in shared memory, which no order changes. An expert's
count is the number of its bits, a pair's rank that of the bits before its token's. Every warp then
adds up the padded counts of all experts itself, a few in each lane, so one barrier is enough.

What needs no id comes first (`begin`): the caller lets it run while its logits are on their way.

Bytes: every output written once, the rows and blocks in use twice. Every CTA writes its slice. Deterministic.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from moe_align_jax._align.kernels import common
from moe_align_jax._core.int32 import cdiv
from moe_align_jax._simt import collectives
from moe_align_jax._simt.language import WARP, Int, Simt
from moe_align_jax.types import AlignProblem

MAX_TOKENS = 2 * WARP


def takes(align: AlignProblem, num_tokens: int) -> bool:
    """Whether no token can have two pairs in one group: ids that are mapped before they are counted may."""
    return num_tokens <= MAX_TOKENS and not align.dispatch and align.expert_map != "filter"


class Masks:
    """The code of one CTA.

    Args:
        align: the alignment, of ids that are not sized at launch.
        num_tokens, num_warps: of the ids, and of a CTA.
    """

    def __init__(self, align: AlignProblem, num_tokens: int, num_warps: int):
        self.align, self.num_tokens, self.num_warps = align, num_tokens, num_warps
        self.top_k = align.num_pairs // num_tokens
        self.words = cdiv(num_tokens, WARP)
        self.each = cdiv(align.num_experts, 4 * WARP) * 4  # experts of a lane
        self.stride = self.each * WARP

    @property
    def shared(self) -> dict[str, int]:
        """Words of each shared-memory array."""
        return {"masks": self.words * self.stride, "starts": self.num_warps * self.stride}

    def begin(self, t: Simt, r: SimpleNamespace) -> None:
        """Sentinels, and masks without a bit. A `block_sync` follows before `end`."""
        align = self.align
        size = self.words * self.stride
        collectives.fill(t, r.masks, 0, size, t.thread_id(), t.num_threads, vector=True)
        common.Slice(t, align.capacity).fill(r.sorted_token_ids, align.num_pairs, vector=True)
        common.Slice(t, align.num_blocks).fill(r.expert_ids, -1, vector=True)

    def end(self, t: Simt, r: SimpleNamespace, meanwhile: Callable[[], None]) -> None:
        """The alignment of `r.topk_ids`. `meanwhile` is work that nothing here needs: it runs while bits are
        set."""
        align, threads = self.align, t.num_threads
        tid, lane, warp = common.thread_ids(t)
        sizes = common.Sizes(t, r, align)
        pairs = [tid + k for k in range(0, align.num_pairs, threads)]
        limit = common.pair_limit(t, r, align)
        experts = [common.read_expert(t, r, align, sizes, pair, limit) for pair in pairs]
        tokens = [pair // self.top_k for pair in pairs]
        for token, expert in zip(tokens, experts, strict=True):
            with t.if_(expert >= 0):
                cell = expert + (token >> 5) * self.stride
                t.atomic_add(r.masks, cell, t.const(1) << (token & (WARP - 1)))
        meanwhile()
        t.block_sync()

        first = lane * self.each
        counts = self._counts(t, r, first)
        padded = [common.padded(count, align.block_size) for count in counts]
        mine = sum(padded, t.const(0))
        upto = collectives.warp_inclusive_scan(t, mine, lane)
        total = t.shfl(upto, WARP - 1)
        starts, running = [], upto - mine
        for size in padded:
            starts.append(running)
            running = running + size
        own = warp * self.stride
        for k in range(0, self.each, 4):
            t.store4(r.starts, own + first + k, tuple(starts[k : k + 4]))
        t.warp_sync()

        rows, blocks = common.Slice(t, align.capacity), common.Slice(t, align.num_blocks)
        for pair, token, expert in zip(pairs, tokens, experts, strict=True):
            kept = expert >= 0
            safe = t.select(kept, expert, 0)
            row = t.load(r.starts, own + safe) + self._rank(t, r, safe, token)
            with rows.holding(row, kept):
                t.store(r.sorted_token_ids, row, pair)
            block = row // align.block_size
            with blocks.holding(block, kept & (row % align.block_size).eq(0)):
                t.store(r.expert_ids, block, common.block_label(t, r, align, safe))
            with t.if_(t.cta_id().eq(0)):
                common.write_inverse(t, r, align, sizes, pair, expert, row)
        with t.if_(t.cta_id().eq(0) & warp.eq(0)):
            if align.return_counts:
                for k, count in enumerate(counts):
                    with t.if_(first + k < align.num_experts):
                        t.store(r.tokens_per_expert, first + k, count)
            with t.if_(lane.eq(0)):
                t.store(r.num_tokens_post_padded, 0, total)

    def _counts(self, t: Simt, r: SimpleNamespace, first: Int) -> list[Int]:
        """Tokens of each of a lane's experts."""
        counts: list[Any] = [t.const(0)] * self.each
        for word in range(self.words):
            for k in range(0, self.each, 4):
                four = t.load4(r.masks, first + (word * self.stride + k))
                for j, mask in enumerate(four):
                    counts[k + j] = counts[k + j] + t.popc(mask)
        return counts

    def _rank(self, t: Simt, r: SimpleNamespace, expert: Int, token: Int) -> Int:
        """The tokens of the expert before that one."""
        below = (t.const(1) << (token & (WARP - 1))) - 1
        if self.words == 1:
            return t.popc(t.load(r.masks, expert) & below)
        high = token >= WARP
        low, more = t.select(high, -1, below), t.select(high, below, 0)
        return t.popc(t.load(r.masks, expert) & low) + t.popc(
            t.load(r.masks, expert + self.stride) & more
        )
