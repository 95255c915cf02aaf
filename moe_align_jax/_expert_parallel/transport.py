"""What a transport is: how rows go from the rank that has a token to those of its experts, and back.

Some steps of a dispatch, a transport may do on the way: `quantises`, `fills_boxes` and `sums_pairs` say where
it does. Where they say no, as by default, the steps are done before or after.

D ranks, T tokens per rank, K top_k, e experts per rank. Rank r gets R = D * T rows at most, in the order
of their source rank and then of the token; a row without an expert of r is unspecified, its ids are -1.
"""

import functools
import operator
from typing import Any, NamedTuple, NoReturn, Protocol

import jax
import jax.numpy as jnp

from moe_align_jax._layout.rows import accumulator
from moe_align_jax._lowering import export


@export.register_static_field
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


def ranks_of_tokens(topk_ids: jax.Array, group: Group) -> jax.Array:
    """`[T, D]` bool: whether the token has an expert on the rank. Ids as for `Transport.plan`."""
    ranks = jnp.arange(group.size, dtype=jnp.int32)[None, None]
    valid = (topk_ids >= 0) & (topk_ids < group.size * group.num_local_experts)
    owner = jnp.where(valid, topk_ids // group.num_local_experts, -1)
    return jnp.any(owner[:, :, None] == ranks, axis=1)


def sum_over_ranks(parts: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`[D, T, c]` to `[T, c]` in the order of the ranks, in float32. `mask` `[T, D]`: which parts count."""
    dtype = accumulator(parts.dtype)
    each = [part.astype(dtype) for part in parts]
    if mask is not None:
        # Here, as part of the sum: before the exchange it would be a pass of its own.
        zero = jnp.zeros((), dtype)
        each = [jnp.where(mask[:, r, None], part, zero) for r, part in enumerate(each)]
    return functools.reduce(operator.add, each).astype(parts.dtype)


def _refuse(transport: str, step: str) -> NoReturn:
    raise NotImplementedError(f"transport {transport!r} has no {step}: it was not asked first")


class Transport(Protocol):
    """One way to move rows. Stateless: what it must remember between the two directions is its plan.

    `send` and `return_rows` are linear and each other's transpose up to rows without an expert, which
    the caller keeps out: the gradient of either is the other.
    """

    name: str
    # Whether the last two fields, weights and ids, arrive as the receiver's own: ids local, and -1 and 0 for
    # pairs of other ranks.
    localises: bool = False
    # Whether it drops int32 ids outside `[0, D * e)` by itself: the caller need not make them -1.
    checks_ids: bool = False

    # Whether `send_to_boxes` takes `initialize=True`, and writes zeros to the rows that are not in use.
    clears_boxes: bool = False

    def unavailable(self, platform: str) -> str | None:
        """Why it cannot run on this platform, or None."""
        ...

    def refuses(self, axis_name: Any) -> str | None:
        """Why not over these axes of the enclosing mesh, or None."""
        del axis_name
        return None

    def check_mesh(self, mesh: Any) -> None:
        """Raises where a concrete mesh has its devices in an order that it cannot take."""
        del mesh

    def plan(self, topk_ids: jax.Array, group: Group) -> Any:
        """Integers and bools. `topk_ids` `[T, K]` int32, global; an id outside `[0, D * e)` has no rank."""
        ...

    def send_fields(self, fields: list[jax.Array], plan: Any, group: Group) -> list[jax.Array]:
        """`[T, c_i]` arrays of any dtypes, the payload first, to `[R, c_i]`: a token's fields together."""
        ...

    def send(self, rows: jax.Array, plan: Any, group: Group) -> jax.Array:
        """One `[T, c]` array to `[R, c]`."""
        ...

    def num_received(self, plan: Any) -> jax.Array | None:
        """How many rows came; None where each of the R rows is a token."""
        ...

    def return_rows(
        self, rows: jax.Array, plan: Any, group: Group, in_use: jax.Array | None = None
    ) -> jax.Array:
        """`[R, c]` floating point to `[T, c]`, summed over the ranks that a token went to.

        Rows that came without an expert of this rank count as zero, whatever they hold: `in_use` `[R]` says
        which have one; None if the others hold zeros already.
        """
        ...

    # -- steps that it may do on the way

    def quantises(self, x: jax.Array, payload: str | None) -> bool:
        """Whether `send_quantised` takes this x `[T, H]`, for this payload of `dispatch`."""
        del x, payload
        return False

    def send_quantised(
        self, x: jax.Array, weights: jax.Array, ids: jax.Array, group: Group
    ) -> list[jax.Array]:
        """As `send_fields` of e4m3 codes and float32 scales of x, weights and ids."""
        _refuse(self.name, "send_quantised")

    def fills_boxes(
        self, fields: list[jax.Array], group: Group, rows_per_expert: int, quantise: bool
    ) -> bool:
        """Whether `send_to_boxes` takes these."""
        del fields, group, rows_per_expert, quantise
        return False

    def send_to_boxes(
        self, fields: list[jax.Array], group: Group, rows_per_expert: int, quantise: bool
    ) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
        """(the payload in boxes `[e, M, c]`, the four fields of their `MaskedLayout`, [weights, ids] as of
        `send_fields`). Rows from `masked_m` on are not written, or zeros: `clears_boxes`.

        Args:
            fields: the payload, weights and ids.
            group: the ranks.
            rows_per_expert: M, the rows of a box.
            quantise: whether the payload, one array, becomes e4m3 codes and float32 scales.
        """
        _refuse(self.name, "send_to_boxes")

    def sums_pairs(self, y: jax.Array, row_of_pair: jax.Array, group: Group) -> bool:
        """Whether `sum_pairs` takes these."""
        del y, row_of_pair, group
        return False

    def sum_pairs(
        self,
        y: jax.Array,
        weights: jax.Array,
        row_of_pair: jax.Array,
        local_ids: jax.Array,
        plan: Any,
        group: Group,
    ) -> jax.Array:
        """The weighted sum of each received token's rows of y, given back and summed over ranks: `[T, H]`.

        Args:
            y: `[num_rows, H]`.
            weights: `[R, K]` float32.
            row_of_pair: `[R, K]` int32, -1 for none.
            local_ids: `[R, K]` int32, as received: -1 for other ranks' experts.
            plan: of the tokens.
            group: the ranks.
        """
        _refuse(self.name, "sum_pairs")
