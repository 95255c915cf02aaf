"""Which rows a CTA does: every warp finds its CTA's share by itself, in registers.

Written in the language of `_simt`, since Pallas has no scan: 32 experts cost a load, 5 shuffles and a ballot,
where a loop over them would take the SMs longer than the rows of a small batch do.
"""

from types import SimpleNamespace
from typing import NamedTuple

from moe_align_jax._simt.collectives import warp_inclusive_scan
from moe_align_jax._simt.language import WARP, Int, Kernel, Simt


class Share(NamedTuple):
    """Tiles of a CTA: `count` of them from tile `at` of `expert` on, which has `end` tiles.

    Only `count` means anything where it is 0.
    """

    expert: Int
    at: Int
    count: Int
    end: Int


class Work(NamedTuple):
    """What is shared out: e experts of at most `rows` valid rows, each of `tiles_per_row` tiles.

    Where a tile has `rows_per_tile` rows, so many make `tiles_per_row` tiles; the last of them may be fewer.
    """

    experts: int
    rows: int
    tiles_per_row: int
    num_ctas: int
    rows_per_tile: int = 1

    def kernel(self, name: str, body=None, outputs=None) -> Kernel:
        """Its grid, for the machine that `find` runs on."""
        return Kernel(
            name=name,
            body=body or (lambda t, r: None),
            inputs={"masked_m": (self.experts,)},
            outputs=outputs or {},
            num_warpgroups=1,
            num_ctas=self.num_ctas,
        )

    def find(self, t: Simt, r: SimpleNamespace) -> Share:
        """The share of this CTA: shares follow each other and differ by at most one tile."""
        lane = t.thread_id() & (WARP - 1)
        per_lane = -(-self.experts // WARP)
        sums, running = [], t.const(0)
        for k in range(per_lane):  # a lane has neighbouring experts
            expert = lane * per_lane + k
            there = expert < self.experts
            valid = t.load(r.masked_m, t.select(there, expert, self.experts - 1))
            valid = t.select(there & (valid > 0), valid, 0)
            valid = t.select(valid < self.rows, valid, self.rows)
            if self.rows_per_tile > 1:
                valid = (valid + (self.rows_per_tile - 1)) // self.rows_per_tile
            running = running + valid * self.tiles_per_row
            sums.append(running)
        inclusive = warp_inclusive_scan(t, running, lane)
        total = t.shfl(inclusive, WARP - 1)
        each = total // self.num_ctas
        more = total - each * self.num_ctas
        cta = t.cta_id()
        extra = cta < more
        begin = cta * each + t.select(extra, cta, more)

        # The lane, and in it the expert, behind all those that end at or before `begin`.
        owner = t.popc(t.ballot(inclusive <= begin))
        owner = t.select(owner < WARP, owner, WARP - 1)
        start = inclusive - running
        expert, at, end = lane * per_lane, begin - start, sums[0]
        for k in range(per_lane - 1):
            passed = begin - start >= sums[k]
            expert = expert + t.select(passed, 1, 0)
            at = t.select(passed, begin - start - sums[k], at)
            end = t.select(passed, sums[k + 1] - sums[k], end)
        count = each + t.select(extra, 1, 0)
        return Share(t.shfl(expert, owner), t.shfl(at, owner), count, t.shfl(end, owner))
