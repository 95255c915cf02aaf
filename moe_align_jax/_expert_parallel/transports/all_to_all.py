"""Each token goes to each rank once, to a place known beforehand; results return by a dense all_to_all.

Bytes into a rank: (D - 1) * T rows each way, as with all_gather; a rank has a token once, however many of its
experts the token chose. The sum over ranks is ours: in float32, in the order of the ranks, the same bits
every time.

The way out is an all_to_all of `[D, T, W]` while that is small. As all ranks get the same rows, it is an
all_gather as well, which needs no D copies of them: so large fields go.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._expert_parallel import message
from moe_align_jax._expert_parallel.transport import (
    Group,
    Transport,
    ranks_of_tokens,
    sum_over_ranks,
)


class AllToAll(Transport):
    name = "all_to_all"

    def unavailable(self, platform: str) -> str | None:
        del platform
        return None

    def plan(self, topk_ids: jax.Array, group: Group) -> jax.Array:
        """`[T, D]` bool, by which the tokens' rank itself can tell which results count."""
        return ranks_of_tokens(topk_ids, group)

    def send_fields(self, fields: list[jax.Array], plan: Any, group: Group) -> list[jax.Array]:
        return message.move(fields, group.size, lambda rows: self.send(rows, plan, group))

    def send(self, rows: jax.Array, plan: Any, group: Group) -> jax.Array:
        del plan
        if rows.shape[0] == 0:
            return rows
        if message.travels_alone(rows, group.size):
            return lax.all_gather(rows, group.axis_name, axis=0, tiled=True)
        num_tokens, width = rows.shape
        copies = jnp.broadcast_to(rows, (group.size, num_tokens, width))
        return self._exchange(copies, group).reshape(group.size * num_tokens, width)

    def num_received(self, plan: Any) -> None:
        del plan

    def return_rows(
        self, rows: jax.Array, plan: jax.Array, group: Group, in_use: jax.Array | None = None
    ) -> jax.Array:
        parts = self._exchange(rows.reshape(group.size, -1, rows.shape[1]), group)
        return sum_over_ranks(parts, None if in_use is None else plan)

    def _exchange(self, parts: jax.Array, group: Group) -> jax.Array:
        return lax.all_to_all(parts, group.axis_name, split_axis=0, concat_axis=0)
