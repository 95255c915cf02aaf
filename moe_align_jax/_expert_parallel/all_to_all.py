"""A dense all_to_all of `[D, T, W]`: each token goes to each rank once, at a place that is known beforehand.

Bytes into a rank: (D - 1) * T rows each way, as with all_gather; a rank has a token once, however many of its
experts the token chose. The sum over ranks is ours: in float32, in the order of the ranks, the same bits
every time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._expert_parallel.rows import accumulator
from moe_align_jax._expert_parallel.transport import Group


class AllToAll:
    name = "all_to_all"

    def unavailable(self, platform: str) -> str | None:
        del platform
        return None

    def plan(self, topk_ids: jax.Array, group: Group) -> Any:
        del topk_ids, group
        return ()

    def send(self, rows: jax.Array, plan: Any, group: Group) -> jax.Array:
        del plan
        num_tokens, width = rows.shape
        copies = jnp.broadcast_to(rows, (group.size, num_tokens, width))
        return self._exchange(copies, group).reshape(group.size * num_tokens, width)

    def num_received(self, plan: Any) -> None:
        del plan

    def give_back(self, rows: jax.Array, plan: Any, group: Group) -> jax.Array:
        del plan
        parts = self._exchange(rows.reshape(group.size, -1, rows.shape[1]), group)
        dtype = accumulator(rows.dtype)
        total = parts[0].astype(dtype)
        for part in parts[1:]:
            total += part.astype(dtype)
        return total.astype(rows.dtype)

    def _exchange(self, parts: jax.Array, group: Group) -> jax.Array:
        return lax.all_to_all(parts, group.axis_name, split_axis=0, concat_axis=0)
