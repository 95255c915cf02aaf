"""Our own kernels write rows straight into the peers' buffers over NVLink: the GPUs of one process.

A token's row goes only to the ranks that have one of its experts, each to its place at once: nothing is
packed, and nothing is counted first. The sum over ranks is ours: float32, in the order of the ranks.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from moe_align_jax import _dispatch
from moe_align_jax._expert_parallel.axes import vary_together
from moe_align_jax._expert_parallel.transport import Group, ranks_of_tokens, sum_over_ranks
from moe_align_jax._kernels import peer_rows
from moe_align_jax._simt.language import Devices

# XLA keeps the addresses of at most so many devices of a process for a kernel.
MAX_DEVICES = 8
_WORD = 4


class NvLink:
    name = "nvlink"

    def unavailable(self, platform: str) -> str | None:
        if reason := _dispatch.kernels_unavailable("cuda" if platform == "gpu" else platform):
            return reason
        if jax.process_count() > 1:
            return "it writes to the GPUs of its own process, and there is more than one process"
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.size > MAX_DEVICES:
            return f"it takes meshes of at most {MAX_DEVICES} devices; this one has {mesh.size}"
        sizes = zip(mesh.axis_names, mesh.axis_sizes, strict=True)
        if auto := [n for n, size in sizes if size > 1 and n not in mesh.manual_axes]:
            return f"every axis of the mesh must be manual in shard_map; {auto} are not"
        return None

    def plan(self, topk_ids: jax.Array, group: Group) -> jax.Array:
        """The ids, by which a token's rank itself can tell which results count."""
        del group
        return topk_ids

    def send_fields(
        self, fields: list[jax.Array], plan: jax.Array, group: Group
    ) -> list[jax.Array]:
        # The payload and its scales travel where they are wanted; ids and weights say who wanted them.
        sparse = [i < len(fields) - 2 for i in range(len(fields))]
        return self._send(fields, sparse, plan, group)

    def send(self, rows: jax.Array, plan: jax.Array, group: Group) -> jax.Array:
        return self._send([rows], [True], plan, group)[0]

    def _send(
        self, fields: list[jax.Array], sparse: list[bool], ids: jax.Array, group: Group
    ) -> list[jax.Array]:
        num_tokens, top_k = ids.shape
        if num_tokens * top_k == 0:
            return [jnp.zeros((group.size * num_tokens, *f.shape[1:]), f.dtype) for f in fields]
        words = [_in_words(field) for field in fields]
        kinds = tuple(
            peer_rows.Field(field.shape[1], np.dtype(field.dtype), is_sparse)
            for field, is_sparse in zip(words, sparse, strict=True)
        )
        problem = peer_rows.Send(num_tokens, top_k, kinds, _devices(group), group.num_local_experts)
        received = _launch(problem, ids, *words)
        return [_out_of_words(got, field) for got, field in zip(received, fields, strict=True)]

    def num_received(self, plan: Any) -> None:
        del plan

    def give_back(
        self, rows: jax.Array, plan: jax.Array, group: Group, in_use: jax.Array | None = None
    ) -> jax.Array:
        if rows.size == 0:
            return jnp.zeros((rows.shape[0] // group.size, *rows.shape[1:]), rows.dtype)
        words = _in_words(rows)
        kind = peer_rows.Field(words.shape[1], np.dtype(words.dtype), False)
        problem = peer_rows.GiveBack(rows.shape[0] // group.size, kind, _devices(group))
        [parts] = _launch(problem, words)
        mask = None if in_use is None else ranks_of_tokens(plan, group)
        return _out_of_words(sum_over_ranks(parts, mask), rows)


def _devices(group: Group) -> Devices:
    """Where the ranks of an axis (or of neighbouring axes) stand among the mesh's devices."""
    mesh = jax.sharding.get_abstract_mesh()
    names = group.axis_name if isinstance(group.axis_name, tuple) else (group.axis_name,)
    last = mesh.axis_names.index(names[-1])
    return Devices(group.size, int(np.prod(mesh.axis_sizes[last + 1 :], dtype=int)))


def _in_words(x: jax.Array) -> jax.Array:
    """`[T, c]` whose rows are multiples of 4 bytes: itself, or padded."""
    pad = -x.shape[1] * x.dtype.itemsize % _WORD // x.dtype.itemsize
    return jnp.pad(x, ((0, 0), (0, pad))) if pad else x


def _out_of_words(x: jax.Array, like: jax.Array) -> jax.Array:
    return x[:, : like.shape[1]]


# -- the primitive ---------------------------------------------------------------------------------

peer_rows_p = Primitive("moe_peer_rows")
peer_rows_p.multiple_results = True


type Problem = peer_rows.Send | peer_rows.GiveBack


def _launch(problem: Problem, *operands: jax.Array) -> list[jax.Array]:
    return peer_rows_p.bind(*vary_together(list(operands)), problem=problem)


@peer_rows_p.def_abstract_eval
def _abstract_eval(*avals, problem: Problem):
    like = avals[0]  # carries the manual-axis type and the mesh

    def out(shape, dtype):
        sharding = NamedSharding(like.sharding.mesh, PartitionSpec(*[None] * len(shape)))
        return like.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)

    return [out(*array) for array in problem.outputs]


def _lower(ctx, *operands, problem: Problem):
    from moe_align_jax._simt import mosaic

    launcher = mosaic.launcher(peer_rows.build(problem))
    return mlir.lower_fun(launcher, multiple_results=True)(ctx, *operands)


mlir.register_lowering(peer_rows_p, _lower, platform="cuda")
