"""Sizes of the kernel of silu_and_mul_masked_quant, and what it cannot take. No Pallas here."""

from typing import NamedTuple

import numpy as np

from moe_align_jax._core.fp8 import GROUP
from moe_align_jax._core.hopper import NUM_SMS
from moe_align_jax._core.int32 import INT32_MAX
from moe_align_jax._masked_quant.problem import MaskedQuantProblem

MAX_EXPERTS = 1024
# CTAs per SM that their registers allow (43 a thread with tiles of 8 groups), by groups of a tile. More CTAs
# would run in a second round, which leaves part of the memory's bandwidth unused.
_CTAS_PER_SM = {8: 10, 4: 16, 1: 16}


class Config(NamedTuple):
    """Sizes of the kernel.

    Attributes:
        tile: groups of a row that a CTA, one warpgroup, does at a time; with `down`, rows of a group.
        num_ctas: CTAs of the grid.
        prefetch: whether a tile is loaded while the one before it is computed.
        pdl: for a launch with programmatic dependent launch.
        down: a tile is one group of neighbouring rows, whose scales lie side by side in columns. It may have
            rows that are not valid. Without an activation alone.
    """

    tile: int
    num_ctas: int
    prefetch: bool = False
    pdl: bool = False
    down: bool = False

    @property
    def form(self) -> str:
        """For tables: `tile4` or `tile4-down`."""
        return f"tile{self.tile}{'-down' if self.down else ''}"


def unsupported(problem: MaskedQuantProblem) -> str | None:
    """Why the kernel does not take this problem, or None."""
    sizes = (problem.num_experts, problem.max_rows, problem.width)
    if not all(isinstance(size, (int, np.integer)) for size in sizes):
        return "the kernel needs static shapes; export a symbolic shape with 'xla'"
    if problem.group_size != GROUP:
        return f"the kernel quantises groups of {GROUP}; group_size is {problem.group_size}"
    if problem.num_experts > MAX_EXPERTS:
        return f"the kernel takes at most {MAX_EXPERTS} experts; these are {problem.num_experts}"
    tiles = problem.num_experts * problem.max_rows * problem.num_groups
    if tiles > INT32_MAX:
        return f"the kernel counts groups in int32; x has {tiles}"
    return None


def config_for(problem: MaskedQuantProblem) -> Config:
    """Tile and grid for a problem that the kernel takes."""
    groups = problem.num_groups
    if not problem.activates and not problem.packed and problem.max_rows >= 4:
        columns = problem.scale_layout == "column_major"
        if columns or groups < 8:
            tile = next(n for n in (16, 8, 4) if n <= problem.max_rows)
            tiles = problem.num_experts * -(-problem.max_rows // tile) * groups
            most = NUM_SMS * _CTAS_PER_SM[min(tile, 8)]
            return Config(tile, max(1, min(tiles, most)), down=True)
    if groups >= 8:
        tile = 8
    elif groups >= 4:
        tile = 4
    else:
        tile = 1
    tiles = problem.num_experts * problem.max_rows * -(-groups // tile)
    most = (
        _CTAS_PER_SM[tile] if problem.activates else _CTAS_PER_SM[1]
    )  # registers for half of the values
    return Config(tile, max(1, min(tiles, NUM_SMS * most)))
