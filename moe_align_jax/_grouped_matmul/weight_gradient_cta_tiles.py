"""Which tiles of a weight gradient a CTA has, one after another: in turn, or dealt by their experts' rows."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul import tile_order
from moe_align_jax._grouped_matmul.weight_gradient_plan import LISTED, Plan, Refs

_I32 = jnp.int32
# The time that a tile takes beside that of its rows, in rows: 1.03 us, and 0.693 us for 64 rows, fitted to
# uniform times of three sizes (H200, 2026-11-30). With 160 here products took as long.
ROWS_OF_TILE = 96


class Dealt(NamedTuple):
    """What `deal` found.

    Attributes:
        listed: how many tiles the CTA's list has.
        begin: the first tile that no CTA was dealt.
    """

    listed: Any
    begin: Any


def deal(
    cta: jax.Array,
    rows_of: Callable[[Any], jax.Array],
    note: Callable[[jax.Array, jax.Array], None],
    *,
    num_experts: int,
    per_expert: int,
    num_ctas: int,
) -> Dealt:
    """Deals the first tiles, so that no CTA is behind the others by the rows of a hot expert.

    The CTAs whose first tiles are of one expert are a class. The class that has the fewest rows takes the
    next tiles, one for each of its CTAs, until all have about the same. Every CTA computes the same, and
    notes its own tiles. There are more tiles than CTAs.

    Args:
        cta: whose tiles are noted.
        rows_of: of the expert with that rank; they fall.
        note: called with (place in the CTA's list, tile).
        num_experts, per_expert: and tiles of each.
        num_ctas: that share the tiles.
    """
    total = num_experts * per_expert
    sizes = [min(per_expert, num_ctas - at) for at in range(0, num_ctas, per_expert)]
    own = lax.div(cta, _I32(per_expert))
    place = cta - own * per_expert

    def cost(rank: Any) -> jax.Array:
        return rows_of(rank) + ROWS_OF_TILE

    # Two tiles of the median: where one expert is hot, that is little. Half as much gained nothing.
    slack = 2 * cost(num_experts // 2)
    note(_I32(0), cta)

    def spread(loads: tuple[jax.Array, ...]) -> jax.Array:
        return functools.reduce(jnp.maximum, loads) - functools.reduce(jnp.minimum, loads)

    def goes_on(state: Any) -> jax.Array:
        deals, _, begin, *loads = state
        return (spread(tuple(loads)) > slack) & (begin < total) & (deals < LISTED - 1)

    def one(state: Any) -> Any:
        deals, listed, begin, *loads = state
        least = functools.reduce(jnp.minimum, loads)
        chosen, size = _I32(0), _I32(sizes[0])
        for k in range(len(sizes) - 1, 0, -1):
            here = loads[k] == least
            chosen, size = jnp.where(here, k, chosen), jnp.where(here, sizes[k], size)
        tile = begin + jnp.where(lax.rem(listed, _I32(2)) == 0, place, size - 1 - place)
        mine = (chosen == own) & (tile < total)
        pl.when(mine)(lambda: note(listed, tile))
        more = cost(lax.div(begin, _I32(per_expert)))
        loads = [x + jnp.where(chosen == k, more, 0) for k, x in enumerate(loads)]
        return deals + 1, listed + mine.astype(_I32), begin + size, *loads

    state = (_I32(0), _I32(1), _I32(num_ctas), *(cost(k) for k in range(len(sizes))))
    _, listed, begin, *_ = lax.while_loop(goes_on, one, state)
    return Dealt(listed, jnp.minimum(begin, total))


class Turns:
    """The numbers of a CTA's tiles, among those of all experts, one after the other.

    Attributes:
        mine: how many.
    """

    def __init__(
        self,
        cta: jax.Array,
        num_ctas: int,
        in_use: Any,
        *,
        back: bool,
        dealt: Dealt | None = None,
        tile_listed: Callable[[jax.Array], jax.Array] | None = None,
    ):
        """
        Args:
            cta: whose tiles these are.
            num_ctas: that share the tiles.
            in_use: tiles that there are; an int where it is known.
            back: as for `Tiles`.
            dealt: what `deal` found, if the first tiles are dealt.
            tile_listed: the tile at that place of the CTA's list.
        """
        self._cta, self._num_ctas, self._back = cta, num_ctas, back
        self._dealt, self._tile_listed = dealt, tile_listed
        if dealt is not None:
            self._any_dealt = dealt.begin > num_ctas
            in_use = in_use - dealt.begin
        if isinstance(in_use, int):
            self._rounds, rest = divmod(in_use, num_ctas)
        else:
            self._rounds = lax.div(in_use, _I32(num_ctas))
            rest = in_use - self._rounds * num_ctas
        last = _I32(self._rounds)
        at_last = self._place(last if dealt is None else last + 1)
        self.mine = last + (at_last < rest).astype(_I32)
        if dealt is not None:
            self.mine += dealt.listed

    def tile(self, i: jax.Array) -> jax.Array:
        """The i-th of this CTA's tiles."""
        if self._dealt is None:
            return self._in_round(i)
        return lax.cond(self._any_dealt, lambda: self._leveled(i), lambda: self._in_round(i))

    def _leveled(self, i: jax.Array) -> jax.Array:
        """The same where some were dealt."""
        assert self._dealt is not None and self._tile_listed is not None
        (listed, begin), tile_listed = self._dealt, self._tile_listed
        back = i - listed  # a round of those that were not
        half = lax.div(back, _I32(2))
        ends = jnp.where(lax.rem(back, _I32(2)) == 1, self._rounds - 1 - half, half)
        back = jnp.where(back < self._rounds, ends, back)
        return lax.cond(
            i < listed,
            lambda: tile_listed(i),
            lambda: begin - self._num_ctas + self._in_round(back + 1),
        )

    def _in_round(self, i: jax.Array) -> jax.Array:
        """The tile of round i, where each CTA has one in each."""
        return i * self._num_ctas + self._place(i)

    def _place(self, i: jax.Array) -> jax.Array:
        """Every other round is taken backwards: who had the longest tile gets the shortest next."""
        forth = i == 0 if self._back else lax.rem(i, _I32(2)) == 0
        return jnp.where(forth, self._cta, self._num_ctas - 1 - self._cta)


class Tile(NamedTuple):
    """A tile of an expert's matrix, and the expert's rows.

    Attributes:
        expert, m, n: which one.
        first, end: the expert's first row, and the row behind its last.
        steps: of the ring.
    """

    expert: jax.Array
    m: jax.Array
    n: jax.Array
    first: jax.Array
    end: jax.Array
    steps: jax.Array


class CtaTiles:
    """The tiles of a CTA: each warpgroup finds out for itself which they are.

    Attributes:
        mine: how many.
    """

    def __init__(self, plan: Plan, refs: Refs, warpgroup: jax.Array, cta: jax.Array):
        self.plan, self.refs = plan, refs
        in_use = refs.used[0] * plan.per_expert if plan.of_pieces else plan.total
        dealt = None
        if plan.level:
            self._own_list = warpgroup * LISTED  # each notes all of them: none waits for another
            dealt = self._deal(cta)
        self._turns = Turns(
            *(cta, plan.tiles.num_ctas, in_use),
            back=plan.tiles.back,
            dealt=dealt,
            tile_listed=lambda place: refs.lists[self._own_list + place],
        )
        self.mine = self._turns.mine

    def _deal(self, cta: jax.Array) -> Dealt:
        """Deals the first tiles, and lists those of this CTA."""
        plan, refs = self.plan, self.refs

        def note(place: jax.Array, tile: jax.Array) -> None:
            refs.lists[self._own_list + place] = tile

        dealt = deal(
            *(cta, lambda rank: refs.count[refs.order[rank]], note),
            num_experts=plan.problem.layout.num_experts,
            per_expert=plan.per_expert,
            num_ctas=plan.tiles.num_ctas,
        )
        plgpu.commit_smem()  # all threads of the warpgroup have noted them
        return dealt

    def at(self, i: jax.Array) -> Tile:
        """The i-th tile."""
        plan, refs = self.plan, self.refs
        t = self._turns.tile(i)
        rank = lax.div(t, _I32(plan.per_expert))
        rest = t - rank * plan.per_expert
        m, n = tile_order.in_groups(plan.tiles.group, rest, plan.m_tiles, plan.n_tiles)
        expert = refs.order[rank]
        first, count = refs.start[expert], refs.count[expert]
        steps = lax.div(count + (plan.tiles.bk - 1), _I32(plan.tiles.bk))
        return Tile(expert, m, n, first, first + count, steps)
