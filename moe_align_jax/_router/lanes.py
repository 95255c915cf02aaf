"""Which experts each lane of the warp that chooses for a token holds."""

from typing import NamedTuple

from moe_align_jax._router.problem import RouteProblem
from moe_align_jax._simt.language import WARP, Int

MAX_EXPERTS = 1024  # 32 in a lane's registers
MAX_TOP_K = WARP  # lane k keeps the k-th
MAX_GROUPS = WARP  # a lane or more each


class Layout(NamedTuple):
    """Which experts a lane holds: `first + offset(j)` for j below `each`, where `within(j)`.

    Attributes:
        each: keys of a lane.
        lanes: of a group.
        whole: every lane holds that many.
        group, first: the lane's group and its first expert.
        vector: of a lane's experts, how many lie side by side; as many of each other lane lie between them
            and its next ones. 0: all of them lie side by side.
    """

    each: int
    lanes: int
    whole: bool
    group: Int
    first: Int
    part: Int
    size: int
    num_groups: int
    vector: int = 0

    def offset(self, j: int) -> int:
        """How far the lane's j-th expert lies behind its first."""
        if not self.vector:
            return j
        return j // self.vector * self.vector * WARP + j % self.vector

    def within(self, j: int) -> Int:
        """Whether this lane holds an expert at place j: a group may have fewer than its lanes hold."""
        return (self.part * self.each + j < self.size) & (self.group < self.num_groups)


def layout_of(problem: RouteProblem, lane: Int) -> Layout:
    """Which experts each lane holds: where groups are limited, neighbouring lanes hold a group."""
    groups = problem.num_groups if problem.limits_groups else 1
    size = problem.num_experts // groups
    lanes = WARP >> (groups - 1).bit_length()
    each = -(-size // lanes)
    whole = lanes * each == size and lanes * groups == WARP
    group, part = lane >> (lanes.bit_length() - 1), lane & (lanes - 1)
    return Layout(each, lanes, whole, group, group * size + part * each, part, size, groups)
