"""ragged_all_to_all: each token goes to the ranks that hold its experts, and to no other.

Bytes into a rank: the rows that it has experts for. A count of them goes first: `C[r, j]`, the rows that
rank r sends to rank j, gathered on all. One slice per pair of ranks.

On rank r:         to the experts               back
input_offsets[j]   sum_{j' < j} C[r, j']        sum_{r' < j} C[r', r]
send_sizes[j]      C[r, j]                      C[j, r]
output_offsets[j]  sum_{r' < r} C[r', j]        sum_{j' < r} C[j, j']
recv_sizes[j]      C[j, r]                      C[r, j]
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax import block_align
from moe_align_jax._expert_parallel import message
from moe_align_jax._expert_parallel.transport import Group, Transport, ranks_of_tokens
from moe_align_jax._layout.rows import accumulator, take_rows
from moe_align_jax._lowering import export
from moe_align_jax._lowering.sharding import vary_together

_I32 = jnp.int32


@export.register_namedtuple
class RaggedPlan(NamedTuple):
    """What one rank knows of an exchange.

    Attributes:
        counts: `[D, D]` C, the same on all ranks.
        rank: `[]` r.
        row_of_copy: `[T, D]` the row in the send buffer of each token's copy for each rank, -1 for none.
        copy_of_row: `[S]` the flat (token, rank) of each row of the send buffer, T * D for none;
            S = T * min(K, D).
    """

    counts: Any
    rank: Any
    row_of_copy: Any
    copy_of_row: Any


def offsets(counts: Any, rank: Any, *, back: bool) -> tuple[Any, Any, Any, Any]:
    """input_offsets, send_sizes, output_offsets, recv_sizes of a rank, each `[D]`: the table above."""
    # On the way back rank r sends to j what j had sent to r, to where it had been in j's send buffer.
    counts = (counts.T if back else counts).astype(_I32)
    # [r, j]: the rows of r for the ranks before j, and those for j of the ranks before r.
    within = jnp.cumsum(counts, axis=1, dtype=_I32) - counts
    before = jnp.cumsum(counts, axis=0, dtype=_I32) - counts

    def line(table: Any, axis: int) -> Any:
        return lax.dynamic_index_in_dim(table, rank, axis, keepdims=False)

    return line(within, 0), line(counts, 0), line(before, 0), line(counts, 1)


class RaggedAllToAll(Transport):
    name = "ragged_all_to_all"

    def unavailable(self, platform: str) -> str | None:
        if platform == "cpu":
            return "XLA:CPU does not implement ragged_all_to_all"
        return None

    def plan(self, topk_ids: jax.Array, group: Group) -> RaggedPlan:
        num_tokens, top_k = topk_ids.shape
        ranks = jnp.arange(group.size, dtype=_I32)[None]
        ranks = jnp.where(ranks_of_tokens(topk_ids, group), ranks, -1)
        aligned = block_align.moe_align_block_size(
            ranks, block_size=1, num_experts=group.size, return_inverse=True
        )
        counts = lax.all_gather(aligned.tokens_per_expert, group.axis_name, axis=0)
        most = num_tokens * min(top_k, group.size)
        row_of_copy = aligned.row_of_pair.reshape(num_tokens, group.size)
        rank = lax.axis_index(group.axis_name)
        return RaggedPlan(counts, rank, row_of_copy, aligned.sorted_token_ids[:most])

    def send_fields(
        self, fields: list[jax.Array], plan: RaggedPlan, group: Group
    ) -> list[jax.Array]:
        return message.move(fields, group.size, lambda rows: self.send(rows, plan, group))

    def send(self, rows: jax.Array, plan: RaggedPlan, group: Group) -> jax.Array:
        packed = take_rows(rows, plan.row_of_copy, plan.copy_of_row)
        out = (rows.shape[0] * group.size, rows.shape[1])
        return exchange(packed, out, offsets(plan.counts, plan.rank, back=False), group)

    def num_received(self, plan: RaggedPlan) -> jax.Array:
        mine = lax.dynamic_index_in_dim(plan.counts, plan.rank, 1, keepdims=False)
        return jnp.sum(mine, dtype=_I32)

    def return_rows(
        self, rows: jax.Array, plan: RaggedPlan, group: Group, in_use: jax.Array | None = None
    ) -> jax.Array:
        del in_use  # the rows that travel are the ones in use
        out = (plan.copy_of_row.shape[0], rows.shape[1])
        packed = exchange(rows, out, offsets(plan.counts, plan.rank, back=True), group)
        dtype = accumulator(rows.dtype)
        total = jnp.zeros((plan.row_of_copy.shape[0], rows.shape[1]), dtype)
        for rank in range(group.size):
            row = plan.row_of_copy[:, rank]
            row = jnp.where(row < 0, packed.shape[0], row)
            total += packed.at[row].get(mode="fill", fill_value=0).astype(dtype)
        return total.astype(rows.dtype)


def exchange(
    rows: jax.Array, shape: tuple[int, int], where: tuple[Any, Any, Any, Any], group: Group
) -> jax.Array:
    """One ragged_all_to_all into a buffer of the given shape, whose other rows are unspecified."""
    out = lax.empty(shape, rows.dtype)  # pyright: ignore[reportAttributeAccessIssue]
    rows, out, *placed = vary_together((rows, out, *where))
    return lax.ragged_all_to_all(rows, out, *placed, axis_name=group.axis_name)
