"""Our own kernels write rows straight into the peers' buffers over NVLink: the GPUs of one process.

A token's row goes only to the ranks that have one of its experts, each to its place at once: nothing is
packed, and nothing is counted first. The sum over ranks is ours: float32, in the order of the ranks. Steps
of a low-latency exchange are done on the way: the fp8 quantisation, the boxes of the experts, and the
weighted sum of a token's rows.
"""

import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_align_jax._core import checks
from moe_align_jax._core.fp8 import GROUP
from moe_align_jax._core.int32 import INT32_MAX
from moe_align_jax._expert_parallel import message, nvlink_kernels
from moe_align_jax._expert_parallel.nvlink_kernels.problems import most_words
from moe_align_jax._expert_parallel.transport import (
    Group,
    Transport,
    ranks_of_tokens,
    sum_over_ranks,
)
from moe_align_jax._expert_parallel.transports import peer_access, shared_windows, windows
from moe_align_jax._expert_parallel.transports.all_to_all import AllToAll
from moe_align_jax._lowering import select
from moe_align_jax._lowering.primitive import make_primitive, result_like
from moe_align_jax._lowering.sharding import vary_together
from moe_align_jax._simt import window
from moe_align_jax._simt.language import Devices

# XLA keeps the addresses of at most so many devices of a process for a kernel.
MAX_DEVICES = 8
_WORD = 4
# How XLA's graphs order kernels. In these modes, of which LHS is the default, those that are launched on one
# stream run one after the other.
_ORDER, _IN_TURN = "xla_gpu_command_buffer_scheduling_mode", ("LHS", "SERIALIZE")


class NvLink(Transport):
    name = "nvlink"
    localises = True
    checks_ids = True

    def unavailable(self, platform: str) -> str | None:
        if reason := select.kernels_unavailable("cuda" if platform == "gpu" else platform):
            return reason
        if (processes := jax.process_count()) > 1:
            # XLA gives a kernel the addresses of another process's buffers only where they are registered
            # with NCCL as symmetric memory, operands and results alike, which jax's buffers are not
            # ("Peer memory is not supported in multi-process mode").
            return f"it writes to the GPUs of its own process, and the program has {processes} processes"
        if reason := peer_access.missing():
            return reason
        return self._refused(jax.local_device_count(), "process")

    def _refused(self, count: int, whose: str) -> str | None:
        """Why the enclosing mesh is none of these `count` devices, or None."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.manual_axes and mesh.size == 1:
            return "one device has no peers"
        if mesh.size > MAX_DEVICES:
            return f"it takes meshes of at most {MAX_DEVICES} devices; this one has {mesh.size}"
        if mesh.manual_axes and mesh.size != count:
            return (
                f"it takes a mesh of all {count} devices of the {whose}; this one has {mesh.size}"
            )
        sizes = zip(mesh.axis_names, mesh.axis_sizes, strict=True)
        if auto := [n for n, size in sizes if size > 1 and n not in mesh.manual_axes]:
            return f"every axis of the mesh must be manual in shard_map; {auto} are not"
        return None

    def refuses(self, axis_name: Any) -> str | None:
        names = jax.sharding.get_abstract_mesh().axis_names
        axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
        places = [names.index(axis) for axis in axes]
        if places != list(range(places[0], places[0] + len(axes))):
            return f"it takes axes that are neighbours in the mesh, in its order {names}"
        return None

    def check_mesh(self, mesh: Any) -> None:
        """A kernel finds peers by their place in the mesh, XLA their addresses by the order of devices."""
        if not isinstance(mesh, jax.sharding.Mesh):
            return
        ids = [device.id for device in mesh.devices.flat]
        if ids != sorted(ids):
            rule = (
                "be over a mesh with the devices in the order of their ids for transport 'nvlink'"
            )
            remedy = "Make the mesh of jax.devices() in order, or pass transport='all_to_all'."
            raise NotImplementedError(checks.message("dispatch", "axis_name", rule, ids, remedy))

    def _launch(self, problem: nvlink_kernels.PeerProblem, *operands: jax.Array) -> list[jax.Array]:
        return _launch(problem, *operands)

    def plan(self, topk_ids: jax.Array, group: Group) -> jax.Array:
        """The ids, by which a token's rank itself can tell which results count."""
        del group
        return topk_ids

    def send_fields(
        self, fields: list[jax.Array], plan: jax.Array, group: Group
    ) -> list[jax.Array]:
        *payload, weights, ids = fields
        if ids.size == 0:
            return [_nothing(field, group) for field in fields]
        given = [_in_words(field) for field in payload]
        problem = self._problem(given, ids, group, routing=True)
        *received, weights, ids = self._launch(problem, ids, weights, *given)
        return [*map(_out_of_words, received, payload), weights, ids]

    def quantises(self, x: jax.Array, payload: str | None) -> bool:
        return payload == "fp8" and x.dtype == jnp.bfloat16

    def send_quantised(
        self, x: jax.Array, weights: jax.Array, ids: jax.Array, group: Group
    ) -> list[jax.Array]:
        if ids.size == 0:
            scales = jnp.zeros((0, x.shape[1] // GROUP), jnp.float32)
            fields = (x.astype(message.FP8), scales, weights, ids)
            return [_nothing(field, group) for field in fields]
        problem = self._problem([x], ids, group, routing=True, quantise=True)
        return self._launch(problem, ids, weights, x)

    def fills_boxes(
        self, fields: list[jax.Array], group: Group, rows_per_expert: int, quantise: bool
    ) -> bool:
        *payload, _, ids = fields
        if ids.size == 0 or any(x.shape[1] * x.dtype.itemsize % _WORD for x in payload):
            return False
        problem = self._dispatch_problem(payload, ids, group, rows_per_expert, quantise)
        return nvlink_kernels.dispatch_unsupported(problem) is None

    def send_to_boxes(
        self,
        fields: list[jax.Array],
        group: Group,
        rows_per_expert: int,
        quantise: bool,
        initialize: bool = False,
    ) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
        *payload, weights, ids = fields
        problem = self._dispatch_problem(payload, ids, group, rows_per_expert, quantise)
        problem = problem._replace(initialize=initialize)
        *boxes, masked_m, counts, row_of_pair, pair_of_row, weights, ids = self._launch(
            problem, ids, weights, *payload
        )
        return boxes, [masked_m, counts, row_of_pair, pair_of_row], [weights, ids]

    def _dispatch_problem(
        self,
        payload: list[jax.Array],
        ids: jax.Array,
        group: Group,
        rows_per_expert: int,
        quantise: bool,
    ) -> nvlink_kernels.Dispatch:
        send = self._problem(payload, ids, group, routing=True, quantise=quantise)
        return nvlink_kernels.Dispatch(send, rows_per_expert)

    def send(self, rows: jax.Array, plan: jax.Array, group: Group) -> jax.Array:
        if plan.size == 0:
            return _nothing(rows, group)
        given = _in_words(rows)
        [received] = self._launch(self._problem([given], plan, group, routing=False), plan, given)
        return _out_of_words(received, rows)

    def _problem(
        self,
        given: list[jax.Array],
        ids: jax.Array,
        group: Group,
        *,
        routing: bool,
        quantise: bool = False,
    ) -> nvlink_kernels.Send:
        fields = tuple(nvlink_kernels.Field(x.shape[1], np.dtype(x.dtype)) for x in given)
        sizes = ids.shape[0], ids.shape[1], fields
        target = np.dtype(message.FP8) if quantise else None
        return nvlink_kernels.Send(
            *sizes, _devices(group), group.num_local_experts, routing, target
        )

    def num_received(self, plan: Any) -> None:
        del plan

    def return_rows(
        self, rows: jax.Array, plan: jax.Array, group: Group, in_use: jax.Array | None = None
    ) -> jax.Array:
        num_tokens = rows.shape[0] // group.size
        if rows.size == 0:
            return jnp.zeros((num_tokens, *rows.shape[1:]), rows.dtype)
        given = _in_words(rows)
        field = nvlink_kernels.Field(given.shape[1], np.dtype(given.dtype))
        [parts] = self._launch(nvlink_kernels.ReturnRows(num_tokens, field, _devices(group)), given)
        mask = None if in_use is None else ranks_of_tokens(plan, group)
        return _out_of_words(sum_over_ranks(parts, mask), rows)

    def sums_pairs(self, y: jax.Array, row_of_pair: jax.Array, group: Group) -> bool:
        del group
        return y.dtype == jnp.bfloat16 and y.shape[1] % 8 == 0 and y.size * row_of_pair.size > 0

    def sum_pairs(
        self,
        y: jax.Array,
        weights: jax.Array,
        row_of_pair: jax.Array,
        local_ids: jax.Array,
        plan: jax.Array,
        group: Group,
    ) -> jax.Array:
        problem = self._combine_problem(y, row_of_pair, group)
        return self._launch(problem, y, row_of_pair, weights, local_ids, plan)[0]

    def _combine_problem(
        self, y: jax.Array, row_of_pair: jax.Array, group: Group
    ) -> nvlink_kernels.Combine:
        num_rows, columns = y.shape
        num_tokens, top_k = row_of_pair.shape[0] // group.size, row_of_pair.shape[1]
        sizes = num_tokens, top_k, num_rows, columns, np.dtype(y.dtype)
        return nvlink_kernels.Combine(*sizes, _devices(group), group.num_local_experts)


class NvLinkWindow(NvLink):
    """In low-latency mode the devices meet in windows, memory of ours (`_simt/window.py`): XLA then launches
    ordinary kernels. What does not fit into a window, and a program to be exported, goes as with "nvlink"."""

    name = "nvlink_window"
    clears_boxes = True

    def unavailable(self, platform: str) -> str | None:
        # The options of one compilation (`jit(compiler_options=...)`) are nowhere to be seen from here.
        given = re.findall(rf"--{_ORDER}[=\s]\s*(\w+)", os.environ.get("XLA_FLAGS", ""))
        if given and given[-1] not in _IN_TURN:
            asked = f"{_ORDER}={given[-1]}"
            return f"two kernels over one window must not run together, and XLA_FLAGS has {asked}"
        if jax.process_count() == 1:
            return super().unavailable(platform) or windows.missing()
        if reason := select.kernels_unavailable("cuda" if platform == "gpu" else platform):
            return reason
        count = jax.device_count()
        if not shared_windows.room(Devices(count, 1)):
            return f"the {jax.process_count()} processes have not called connect_windows"
        return self._refused(count, "program")

    def _launch(self, problem: nvlink_kernels.PeerProblem, *operands: jax.Array) -> list[jax.Array]:
        return _launch(problem, *operands, windowed=bool(problem.staged))

    # -- with several processes: what no window holds goes by XLA's collectives

    def _has_room(self, problem: nvlink_kernels.PeerProblem) -> bool:
        """Whether there is a window for it, or another way of ours."""
        if jax.process_count() == 1:
            return True
        kernel = nvlink_kernels.build(problem)
        if window.unsupported(kernel):
            return False
        return window.bytes_needed(kernel) <= shared_windows.room(problem.devices)

    def fills_boxes(
        self, fields: list[jax.Array], group: Group, rows_per_expert: int, quantise: bool
    ) -> bool:
        if not super().fills_boxes(fields, group, rows_per_expert, quantise):
            return False
        *payload, _, ids = fields
        problem = self._dispatch_problem(payload, ids, group, rows_per_expert, quantise)
        return self._has_room(problem)

    def sums_pairs(self, y: jax.Array, row_of_pair: jax.Array, group: Group) -> bool:
        if not super().sums_pairs(y, row_of_pair, group):
            return False
        return self._has_room(self._combine_problem(y, row_of_pair, group))

    def send_fields(
        self, fields: list[jax.Array], plan: jax.Array, group: Group
    ) -> list[jax.Array]:
        if jax.process_count() == 1:
            return super().send_fields(fields, plan, group)
        return _localised(_COLLECTIVES.send_fields(fields, None, group), group)

    def send_quantised(
        self, x: jax.Array, weights: jax.Array, ids: jax.Array, group: Group
    ) -> list[jax.Array]:
        if jax.process_count() == 1:
            return super().send_quantised(x, weights, ids, group)
        return _localised(_COLLECTIVES.send_quantised(x, weights, ids, group), group)

    def send(self, rows: jax.Array, plan: jax.Array, group: Group) -> jax.Array:
        if jax.process_count() == 1:
            return super().send(rows, plan, group)
        return _COLLECTIVES.send(rows, None, group)

    def return_rows(
        self, rows: jax.Array, plan: jax.Array, group: Group, in_use: jax.Array | None = None
    ) -> jax.Array:
        if jax.process_count() == 1:
            return super().return_rows(rows, plan, group, in_use)
        ranks = ranks_of_tokens(plan, group)
        return _COLLECTIVES.return_rows(rows, ranks, group, in_use)


_COLLECTIVES = AllToAll()


def _localised(received: list[jax.Array], group: Group) -> list[jax.Array]:
    """What came of all tokens, with ids of this rank alone, and weights of 0 for others'."""
    *payload, weights, ids = received
    local = ids - lax.axis_index(group.axis_name).astype(jnp.int32) * jnp.int32(
        group.num_local_experts
    )
    mine = (ids >= 0) & (local >= 0) & (local < group.num_local_experts)
    return [*payload, jnp.where(mine, weights, 0.0), jnp.where(mine, local, -1)]


NVLINK, NVLINK_WINDOW = NvLink(), NvLinkWindow()


def _nothing(like: jax.Array, group: Group) -> jax.Array:
    return jnp.zeros((group.size * like.shape[0], *like.shape[1:]), like.dtype)


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


def _launch(
    problem: nvlink_kernels.PeerProblem, *operands: jax.Array, windowed: bool = False
) -> list[jax.Array]:
    if (largest := most_words(problem)) > INT32_MAX:
        rule = f"move at most {INT32_MAX} 4-byte words by transport 'nvlink'"
        remedy = "Pass transport='all_to_all'."
        raise NotImplementedError(checks.message("dispatch", "x", rule, largest, remedy))
    operands = vary_together(list(operands))
    return peer_rows_p.bind(*operands, problem=problem, windowed=windowed)


def _abstract(*avals: Any, problem: nvlink_kernels.PeerProblem, windowed: bool):
    del windowed
    return [result_like(avals[0], *array) for array in problem.outputs.values()]


def _implement(
    platform: str, ctx: Any, *, problem: nvlink_kernels.PeerProblem, windowed: bool
) -> Callable:
    del platform
    from moe_align_jax._simt import mosaic

    kernel = nvlink_kernels.build(problem)
    mesh: Any = getattr(ctx.module_context.axis_context, "mesh", None)
    for_export = ctx.module_context.lowering_parameters.for_export
    if windowed and not for_export and (found := windows.for_kernel(kernel, mesh)):
        launch = mosaic.launcher(kernel, window=found)

        def in_window(*operands: jax.Array) -> list[jax.Array]:
            place = lax.axis_index(mesh.axis_names).astype(jnp.int32)
            return list(launch(*vary_together([place[None], *operands])))

        return in_window
    if jax.process_count() > 1:
        rule = "be over the mesh of devices that connect_windows was given, in that order"
        remedy = "A program to be exported has no windows, either: pass transport='all_to_all'."
        raise NotImplementedError(checks.message("dispatch", "axis_name", rule, mesh, remedy))
    NVLINK.check_mesh(mesh)
    if windowed and isinstance(problem, nvlink_kernels.Dispatch) and problem.initialize:
        return _clearing_behind(problem)
    launch = mosaic.launcher(kernel)
    # Beside its outputs: the staged arrays.
    return lambda *operands: list(launch(*operands))[: len(problem.outputs)]


def _clearing_behind(problem: nvlink_kernels.Dispatch) -> Callable:
    """A dispatch whose boxes XLA clears: the kernel has done it in windows alone."""
    from moe_align_jax._simt import mosaic

    launch = mosaic.launcher(nvlink_kernels.build(problem._replace(initialize=False)))

    def dispatch(*operands: jax.Array) -> list[jax.Array]:
        found = dict(zip(problem.outputs, launch(*operands), strict=False))
        used = (
            jnp.arange(problem.rows_per_expert, dtype=jnp.int32)[None] < found["masked_m"][:, None]
        )
        for name in problem.outputs:
            if name.startswith("boxes"):
                zero = jnp.zeros((), found[name].dtype)
                found[name] = jnp.where(used[..., None], found[name], zero)
        return list(found.values())

    return dispatch


peer_rows_p = make_primitive(
    "moe_peer_rows", abstract=_abstract, implement=_implement, platforms=("cuda",)
)
