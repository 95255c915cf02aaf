"""Tiles of the masked layout that the product itself finds in `masked_m`, by votes of a warp.

Lane i has the i-th of 32 groups: a scan over the lanes tells where each group's tiles begin, and a vote which
group a tile belongs to. Of more groups, 32 at a time. Each warp finds the same.
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._simt.language import WARP, Int, Kernel, Simt

_I32 = jnp.int32
FOUND = 4  # values of a tile


def find(problem: MatmulProblem, config: Config, masked_m: Any, at: jax.Array) -> list[jax.Array]:
    """What `tile_of` says, in the kernel of that problem; `masked_m`: in global memory."""
    from moe_align_jax._simt import mosaic

    machine = Kernel(
        name=f"grouped_matmul_{config.form}",
        body=lambda t, r: None,
        inputs={"masked_m": (problem.num_experts,)},
        outputs={"out": problem.out_shape},
        num_warpgroups=config.computing + 1,
        num_ctas=config.num_ctas,
    )

    def compute(t: Simt, r: SimpleNamespace, at: Int) -> tuple[Int, ...]:
        return tile_of(t, r, problem.num_experts, problem.max_rows, config.bm, at)

    return mosaic.inline_scalars(machine, compute, FOUND, values=(at,), masked_m=masked_m)


def tile_of(
    t: Simt, r: SimpleNamespace, groups: int, max_rows: int, bm: int, at: Int
) -> tuple[Int, ...]:
    """(Group, first row, row behind the last in use) of tile `at`, of groups of `max_rows` rows that are cut
    into tiles of `bm`; and tiles of all groups. Behind the last tile, zeros."""
    lane = t.thread_id() % WARP
    total, group, first, end = (t.const(0) for _ in range(4))
    for begin in range(0, groups, WARP):
        mine = lane + begin
        inside = mine < groups
        rows = t.load(r.masked_m, t.select(inside, mine, 0))
        rows = t.select(inside & (rows > 0), rows, 0)
        rows = t.select(rows < max_rows, rows, max_rows)
        tiles = (rows + (bm - 1)) // bm
        through = tiles
        distance = 1
        while distance < min(WARP, groups - begin):
            other = t.shfl_up(through, distance)
            through = through + t.select(lane >= distance, other, 0)
            distance *= 2
        before = total + through - tiles
        votes = t.ballot((at >= before) & (at < before + tiles))
        none = votes.eq(0)
        winner = t.select(none, 0, t.highest_bit(votes))
        its_rows, its_before = t.shfl(rows, winner), t.shfl(before, winner)
        start = (winner + begin) * max_rows
        group = t.select(none, group, winner + begin)
        first = t.select(none, first, start + (at - its_before) * bm)
        end = t.select(none, end, start + its_rows)
        total = total + t.shfl(through, min(WARP, groups - begin) - 1)
    return group, first, end, total


def find_plainly(
    problem: MatmulProblem, config: Config, masked_m: Any, at: jax.Array
) -> tuple[Any, ...]:
    """The same for the interpreter, which runs none of that: one group after the other."""

    def step(group, carry):
        before, found, first, end = carry
        rows = jnp.clip(masked_m[group], 0, problem.max_rows)
        tiles = lax.div(rows + (config.bm - 1), _I32(config.bm))
        mine, start = (at >= before) & (at < before + tiles), group * problem.max_rows
        found = jnp.where(mine, group, found)
        first = jnp.where(mine, start + (at - before) * config.bm, first)
        return before + tiles, found, first, jnp.where(mine, start + rows, end)

    zero = _I32(0)
    total, *tile = lax.fori_loop(0, problem.num_experts, step, (zero, zero, zero, zero))
    return *tile, total
