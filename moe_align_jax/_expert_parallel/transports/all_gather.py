"""Every rank gets every token, and a reduce-scatter sums what the ranks made of them.

Bytes into a rank: (D - 1) * T rows each way, whatever the routing. Nothing is planned or copied beforehand.
The way back adds in the rows' own dtype, in the order of the backend's reduce-scatter.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._expert_parallel import message
from moe_align_jax._expert_parallel.transport import Group, Transport


class AllGather(Transport):
    name = "all_gather"

    def unavailable(self, platform: str) -> str | None:
        del platform
        return None

    def plan(self, topk_ids: jax.Array, group: Group) -> Any:
        del topk_ids, group
        return ()

    def send_fields(self, fields: list[jax.Array], plan: Any, group: Group) -> list[jax.Array]:
        return message.move(fields, group.size, lambda rows: self.send(rows, plan, group))

    def send(self, rows: jax.Array, plan: Any, group: Group) -> jax.Array:
        del plan
        if rows.shape[0] == 0:
            return rows  # a gather of no rows is refused
        return lax.all_gather(rows, group.axis_name, axis=0, tiled=True)

    def num_received(self, plan: Any) -> None:
        del plan

    def return_rows(
        self, rows: jax.Array, plan: Any, group: Group, in_use: jax.Array | None = None
    ) -> jax.Array:
        del plan
        if rows.shape[0] == 0:
            return rows
        if in_use is not None:
            rows = jnp.where(in_use[:, None], rows, jnp.zeros((), rows.dtype))
        return lax.psum_scatter(rows, group.axis_name, scatter_dimension=0, tiled=True)
