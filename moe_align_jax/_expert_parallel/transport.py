"""What a transport is: how rows go from the rank that has a token to those of its experts, and back.

D ranks, T tokens per rank, K top_k, e experts per rank. Rank r gets R = D * T rows at most, in the order
of their source rank and then of the token; a row without an expert of r is unspecified, its ids are -1.
"""

from typing import Any, NamedTuple, Protocol

import jax


class Group(NamedTuple):
    """The ranks that exchange: a mesh axis (or several) of the enclosing shard_map.

    Attributes:
        axis_name: the axis, or a tuple of axes.
        size: D.
        num_local_experts: e; rank r holds experts `[r * e, (r + 1) * e)`.
    """

    axis_name: Any
    size: int
    num_local_experts: int


class Transport(Protocol):
    """One way to move rows. Stateless: what it must remember between the two directions is its plan.

    `send` and `give_back` are linear and each other's transpose up to rows without an expert, which
    the caller keeps at zero: the gradient of either is the other.
    """

    name: str

    def unavailable(self, platform: str) -> str | None:
        """Why it cannot run on this platform, or None."""
        ...

    def plan(self, topk_ids: jax.Array, group: Group) -> Any:
        """A pytree of int32 arrays. `topk_ids` `[T, K]` int32, global; outside `[0, D * e)` is nobody's."""
        ...

    def send(self, rows: jax.Array, plan: Any, group: Group) -> jax.Array:
        """`[T, W]` of any dtype to `[R, W]`."""
        ...

    def num_received(self, plan: Any) -> jax.Array | None:
        """How many rows came; None where every row of the R is somebody's token."""
        ...

    def give_back(self, rows: jax.Array, plan: Any, group: Group) -> jax.Array:
        """`[R, W]` floating point to `[T, W]`, summed over the ranks that a token went to."""
        ...
