"""Each token goes to each rank once, to a place known beforehand; results return by a dense all_to_all.

Bytes into a rank: (D - 1) * T rows each way, as with all_gather; a rank has a token once, however many of its
experts the token chose. The sum over ranks is ours: in float32, in the order of the ranks, the same bits
every time.

The way out is an all_to_all of `[D, T, W]` while that is small. As all ranks get the same rows, it is an
all_gather as well, which needs no D copies of them: so large fields go.

A low-latency exchange whose boxes are not cleared takes few launches: one kernel before the way out, which
quantises and packs, and one behind it, which fills the experts' boxes (`message_kernels`). Every rank
gathers the messages of all: one call of NCCL, where an all_to_all is 2 D of them. Where a rank receives few
bytes, all of a token's fields are gathered as they are instead, which XLA makes one collective of, and one
kernel quantises what came. What XLA makes of those steps are some nine small kernels, and launching them
takes longer than the exchanges.

Between two ranks the way back is a reduce-scatter where it can be: the sum of two numbers has one order, and
rounds to the same bits (twice as many bits as bfloat16 or float16 have, and two more, are enough for float32
to round a sum a second time without harm).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._expert_parallel import message, message_kernels, packed
from moe_align_jax._expert_parallel.transport import (
    Group,
    Transport,
    ranks_of_tokens,
    sum_over_ranks,
)
from moe_align_jax._layout.kernels import movable

# Whether low-latency exchanges use our kernels beside the collectives, where they run, for all but the sums.
MESSAGE_KERNELS = True
# Whether those gather tokens as they are, rather than pack and unpack them; None: while a rank receives at
# most MOST_GATHERED_BYTES of their rows so.
GATHERS: bool | None = None
# On two H200, fp8 out and bfloat16 back, 2026-11-29, not waiting, us a pair, gathered and packed: 60.9
# and 66.8 with 8 tokens per rank, 54.8 and 56.3 with 64, 72.7 and 59.7 with 128, of which the GPUs take 70
# gathered. On a slower host: 73.0 and 79.9 with 8 tokens, 73.8 and 83.1 with 32, 73.2 and 80.0 with
# 128. A layer of DeepSeek-V3's decode step: 147.7 and 147.8 with 8 tokens; with 64 on 2026-11-30
# 204.9 and 196.6, though pairs of 64 took 64.6 and 72.8: a step's other kernels keep the GPUs
# busy, and a launch more costs it less than bytes.
MOST_GATHERED_BYTES = 512 << 10


class AllToAll(Transport):
    name = "all_to_all"
    checks_ids = True  # the receiver keeps its own ids and no others

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
        if group.size == 2 and in_use is None and rows.size:
            return lax.psum_scatter(rows, group.axis_name, scatter_dimension=0, tiled=True)
        parts = self._exchange(rows.reshape(group.size, -1, rows.shape[1]), group)
        return sum_over_ranks(parts, None if in_use is None else plan)

    def quantises(self, x: jax.Array, payload: str | None) -> bool:
        return MESSAGE_KERNELS and payload == "fp8" and x.dtype == jnp.bfloat16

    def send_quantised(
        self, x: jax.Array, weights: jax.Array, ids: jax.Array, group: Group
    ) -> list[jax.Array]:
        return self.send_fields([*message.quantize(x), weights, ids], None, group)

    def fills_boxes(
        self, fields: list[jax.Array], group: Group, rows_per_expert: int, quantise: bool
    ) -> bool:
        if not MESSAGE_KERNELS:
            return False
        *payload, _, ids = fields
        problems = self._problems(payload, ids, group, rows_per_expert, quantise)
        form = problems[0].message
        if not all(movable(f.dtype.name, f.columns * f.dtype.itemsize) for f in form.payload):
            return False
        if 4 * form.words * form.num_rows > message.MAX_PACKED_BYTES:
            return False
        return message_kernels.unsupported(*problems) is None

    def send_to_boxes(
        self, fields: list[jax.Array], group: Group, rows_per_expert: int, quantise: bool
    ) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
        *payload, weights, ids = fields
        pack, unpack, gathered = self._problems(payload, ids, group, rows_per_expert, quantise)
        rank = lax.axis_index(group.axis_name).astype(jnp.int32)[None]
        if gathers_all(gathered):
            *payload, weights, ids = self._gather([*payload, weights, ids], group)
            found = packed.fill_boxes(gathered, rank, ids, weights, payload)
        else:
            [received] = self._gather([packed.pack(pack, ids, weights, payload)], group)
            found = packed.unpack(unpack, rank, received)
        *boxes, masked_m, counts, row_of_pair, pair_of_row, weights, ids = found.values()
        return boxes, [masked_m, counts, row_of_pair, pair_of_row], [weights, ids]

    def _problems(
        self,
        payload: list[jax.Array],
        ids: jax.Array,
        group: Group,
        rows_per_expert: int,
        quantise: bool,
    ) -> tuple[message_kernels.Pack, message_kernels.Unpack, message_kernels.Unpack]:
        return packed.problems(
            payload, ids, group.size, group.num_local_experts, rows_per_expert, quantise
        )

    def _gather(self, fields: list[jax.Array], group: Group) -> list[jax.Array]:
        return [lax.all_gather(field, group.axis_name, axis=0, tiled=True) for field in fields]

    def _exchange(self, parts: jax.Array, group: Group) -> jax.Array:
        return lax.all_to_all(parts, group.axis_name, split_axis=0, concat_axis=0)


def gathers_all(problem: message_kernels.Unpack) -> bool:
    """Whether the tokens travel as they are given: no kernel packs them."""
    if GATHERS is not None:
        return GATHERS
    form = problem.message
    row = sum(field.columns * field.dtype.itemsize for field in problem.given)
    return (form.num_ranks - 1) * form.num_tokens * row <= MOST_GATHERED_BYTES
