"""The two directions, each the gradient of the other: rows out to the experts, and results back."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._expert_parallel.choice import TRANSPORTS
from moe_align_jax._expert_parallel.transport import Group
from moe_align_jax._layout.rows import sum_copies, sum_rows
from moe_align_jax._lowering import export
from moe_align_jax._lowering.sharding import vary_together

_I32 = jnp.int32


@export.register_static
@dataclass(frozen=True)
class DispatchInfo:
    """What is static about a dispatch.

    Attributes:
        mode: "normal" or "low_latency".
        transport: the name of the transport.
        group: the ranks.
        num_tokens: T.
        quantise: whether the transport turns a bfloat16 x into e4m3 and scales.
        initialize: whether a transport that fills boxes clears the rows that are not in use.
    """

    mode: str
    transport: str
    group: Group
    num_tokens: int
    quantise: bool = False
    initialize: bool = False


def _fields(*given: jax.Array | None) -> list[jax.Array]:
    """What travels of a token: payload, perhaps its scales, weights and ids."""
    return [field for field in given if field is not None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def send(info: DispatchInfo, x, scales, weights, ids, plan):
    """(x, scales, weights, local ids) as received, `[R, ...]`."""
    fields = _fields(x, scales, weights, ids)
    transport, group = TRANSPORTS[info.transport], info.group
    if info.quantise:
        received = transport.send_quantised(x, weights, ids, group)
    else:
        received = transport.send_fields(fields, plan, group)
    x, scales, (weights, ids) = received[0], None, received[-2:]
    if len(received) == 4:
        scales = received[1]
    if transport.localises:
        return x, scales, weights, ids
    local = ids - lax.axis_index(group.axis_name).astype(_I32) * _I32(group.num_local_experts)
    mine = (ids >= 0) & (local >= 0) & (local < group.num_local_experts)
    count = transport.num_received(plan)
    if count is not None:
        mine &= (jnp.arange(ids.shape[0], dtype=_I32) < count)[:, None]
    return x, scales, jnp.where(mine, weights, 0.0), jnp.where(mine, local, -1)


def _send_forward(info, x, scales, weights, ids, plan):
    received = send(info, x, scales, weights, ids, plan)
    return received, (plan, received[3] >= 0)


def _send_backward(info, saved, cotangents):
    plan, mine = saved
    d_x, d_scales, d_weights, _ = cotangents
    transport, group = TRANSPORTS[info.transport], info.group
    d_weights = transport.return_rows(jnp.where(mine, d_weights, 0.0), plan, group)
    if d_scales is not None:
        # An fp8 payload: without_gradient stands before it and lets no cotangent through.
        return None, None, d_weights, None, None
    d_x = transport.return_rows(d_x, plan, group, jnp.any(mine, axis=1))
    return d_x, None, d_weights, None, None


send.defvjp(_send_forward, _send_backward)


def fills_boxes(info: DispatchInfo, x, scales, weights, ids, rows_per_expert: int) -> bool:
    """Whether `send_to_boxes` takes these."""
    fields = _fields(x, scales, weights, ids)
    transport = TRANSPORTS[info.transport]
    return transport.fills_boxes(fields, info.group, rows_per_expert, info.quantise)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def send_to_boxes(info: DispatchInfo, rows_per_expert: int, x, scales, weights, ids, plan):
    """`send`, then `permute_to_masked` of what came: (x, scales, weights, ids, layout)."""
    del plan
    fields = _fields(x, scales, weights, ids)
    transport = TRANSPORTS[info.transport]
    options = {"initialize": True} if info.initialize else {}
    boxes, layout, received = transport.send_to_boxes(
        fields, info.group, rows_per_expert, info.quantise, **options
    )
    return boxes[0], boxes[1] if len(boxes) > 1 else None, *received, layout


def _boxes_forward(info, rows_per_expert, *operands):
    results = send_to_boxes(info, rows_per_expert, *operands)
    ids, (_, _, row_of_pair, _) = results[3:]
    return results, (operands[-1], ids >= 0, row_of_pair)


def _boxes_backward(info, rows_per_expert, saved, cotangents):
    del rows_per_expert
    plan, mine, row_of_pair = saved
    d_x, d_scales, d_weights, *_ = cotangents
    if d_scales is None:
        d_x = sum_copies(d_x, row_of_pair)
    return _send_backward(info, (plan, mine), (d_x, d_scales, d_weights, None))


send_to_boxes.defvjp(_boxes_forward, _boxes_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def return_rows(info: DispatchInfo, rows, in_use, plan):
    """`[T, H]` of `[R, H]`, of which rows not in use count as zero.

    `in_use` None: they are zero, and their cotangents are of no interest to the caller.
    """
    return TRANSPORTS[info.transport].return_rows(rows, plan, info.group, in_use)


def _return_rows_forward(info, rows, in_use, plan):
    return return_rows(info, rows, in_use, plan), (in_use, plan)


def _return_rows_backward(info, saved, d_out):
    in_use, plan = saved
    d_rows = TRANSPORTS[info.transport].send(d_out, plan, info.group)
    if in_use is not None:
        d_rows = jnp.where(in_use[:, None], d_rows, jnp.zeros((), d_rows.dtype))
    return d_rows, None, None


return_rows.defvjp(_return_rows_forward, _return_rows_backward)


def return_sums(info: DispatchInfo, y, weights, ids, layout, plan):
    """`[T, H]`: the weighted sum of each token's rows of y `[e, M, H]`, given back and summed over ranks.

    `weights` and local `ids` `[R, K]` as they were received.
    """
    flat = y.reshape(-1, *y.shape[2:])
    operands = flat, weights, layout.row_of_pair, layout.pair_of_row.reshape(-1), plan
    if TRANSPORTS[info.transport].sums_pairs(flat, layout.row_of_pair, info.group):
        return _in_one_step(info, *vary_together((*operands, ids)))
    return _in_two_steps(info, *vary_together(operands))


def _in_two_steps(info, y, weights, row_of_pair, pair_of_row, plan):
    rows = sum_rows(y, weights, row_of_pair, pair_of_row, y.dtype)
    with jax.named_scope("return_rows"):
        return return_rows(info, rows, None, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_one_step(info, y, weights, row_of_pair, pair_of_row, plan, ids):
    del pair_of_row
    transport = TRANSPORTS[info.transport]
    return transport.sum_pairs(y, weights, row_of_pair, ids, plan, info.group)


def _in_one_step_forward(info, *operands):
    return _in_one_step(info, *operands), operands


def _in_one_step_backward(info, operands, d_out):
    y, weights, *places, _ = operands
    _, pull = jax.vjp(lambda y, weights: _in_two_steps(info, y, weights, *places), y, weights)
    return *pull(d_out), None, None, None, None


_in_one_step.defvjp(_in_one_step_forward, _in_one_step_backward)
