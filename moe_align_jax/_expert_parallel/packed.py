"""`pack` and `unpack` of messages, and the boxes of rows that were gathered, as primitives: by our kernels
where they run, by XLA elsewhere."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive

from moe_align_jax import block_align
from moe_align_jax._expert_parallel import message, message_kernels
from moe_align_jax._expert_parallel.message_kernels import (
    Message,
    Pack,
    Unpack,
)
from moe_align_jax._expert_parallel.row_words import Field
from moe_align_jax._layout.rows import copy_to_masked
from moe_align_jax._lowering import select
from moe_align_jax._lowering.primitive import make_primitive, result_like
from moe_align_jax._lowering.sharding import divided_by_xla, vary_together

_I32 = jnp.int32


def pack(problem: Pack, *operands: jax.Array) -> list[jax.Array]:
    """What `Pack` gives: the message `[D, T, W]` of tokens, or its halves where it swaps."""
    return _pack_p.bind(*vary_together(operands), problem=problem)


def unpack(problem: Unpack, *received: jax.Array) -> dict[str, jax.Array]:
    """By name, the outputs of `Unpack` of a message that came, not of gathered rows."""
    found = _unpack_p.bind(*vary_together(received), problem=problem)
    return dict(zip(problem.outputs, found, strict=True))


def fill_boxes(
    problem: Unpack,
    rank: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    payload: list[jax.Array],
) -> dict[str, jax.Array]:
    """By name, the outputs of a gathered `Unpack` of every rank's tokens."""
    operands = vary_together([rank, ids, weights, *payload])
    return dict(zip(problem.outputs, _gathered_p.bind(*operands, problem=problem), strict=True))


# -- by XLA ----------------------------------------------------------------------------------------------


def _pack_by_xla(problem: Pack, *operands: jax.Array):
    form = problem.message
    *rank, ids, weights = operands[: problem.swaps + 2]
    payload = operands[problem.swaps + 2 :]
    if problem.quantise:
        payload = tuple(message.quantize(payload[0]))
    ranks = jnp.arange(form.num_ranks, dtype=_I32)[:, None, None]
    local = ids[None] - ranks * form.num_local_experts
    here = (ids >= 0)[None] & (local >= 0) & (local < form.num_local_experts)
    columns = []
    for field, x in zip(
        form.fields,
        (*payload, jnp.where(here, weights, 0.0), jnp.where(here, local, -1)),
        strict=True,
    ):
        words = _words(x)
        words = jnp.pad(words, [(0, 0)] * (words.ndim - 1) + [(0, -field.words % 4)])
        columns.append(jnp.broadcast_to(words, (*here.shape[:2], words.shape[-1])))
    whole = jnp.concatenate(columns, axis=2)
    if problem.swaps:
        first = rank[0][0] == 0
        return [jnp.where(first, *halves) for halves in (whole, whole[::-1])]
    return [whole]


def _unpack_by_xla(problem: Unpack, *operands: jax.Array) -> list[jax.Array]:
    form, received = problem.message, operands[-1]
    if problem.swapped:
        rank, kept, came = operands
        received = jnp.where(rank[0] == 0, jnp.stack([kept, came]), jnp.stack([came, kept]))
    rows = received.reshape(form.num_rows, form.words)
    *payload, weights, ids = (
        _from_words(rows[:, start : start + field.words], field)
        for field, start in zip(form.fields, form.starts[:-1], strict=True)
    )
    if problem.same:
        rank, count = operands[0][0], form.num_local_experts
        local = ids - rank * count
        here = (ids >= 0) & (local >= 0) & (local < count)
        weights, ids = jnp.where(here, weights, 0.0), jnp.where(here, local, -1)
    return _boxes_by_xla(problem, payload, weights, ids)


def _fill_by_xla(problem: Unpack, rank: jax.Array, ids: jax.Array, weights: jax.Array, *given):
    payload = list(message.quantize(given[0]) if problem.quantise else given)
    count = problem.message.num_local_experts
    local = ids - rank[0] * count
    here = (ids >= 0) & (local >= 0) & (local < count)
    return _boxes_by_xla(
        problem, payload, jnp.where(here, weights, 0.0), jnp.where(here, local, -1)
    )


def _boxes_by_xla(
    problem: Unpack, payload: list[jax.Array], weights: jax.Array, ids: jax.Array
) -> list[jax.Array]:
    """Of the rows that came, with local ids."""
    aligned = block_align.moe_align_block_size(
        ids, block_size=1, num_experts=problem.message.num_local_experts, return_inverse=True
    )
    counts = aligned.tokens_per_expert
    (masked_m, row_of_pair, pair_of_row), boxes = copy_to_masked(
        *(payload, ids, aligned.sorted_token_ids, aligned.row_of_pair, counts),
        rows_per_expert=problem.rows_per_expert,
        initialize=False,
    )
    return [*boxes, masked_m, counts, row_of_pair, pair_of_row, weights, ids]


def _words(x: jax.Array) -> jax.Array:
    """`[..., c]` as int32 `[..., c * itemsize / 4]`."""
    ratio = 4 // x.dtype.itemsize
    if ratio > 1:
        x = x.reshape(*x.shape[:-1], x.shape[-1] // ratio, ratio)
    return lax.bitcast_convert_type(x, _I32)


def _from_words(words: jax.Array, field: Field) -> jax.Array:
    return lax.bitcast_convert_type(words, field.dtype).reshape(words.shape[0], field.columns)


# -- the primitives --------------------------------------------------------------------------------------


def _make(name: str, by_xla: Callable) -> Primitive:
    def abstract(*avals: Any, problem: Pack | Unpack):
        return [result_like(avals[0], *array) for array in problem.outputs.values()]

    def implement(platform: str, ctx: Any, *, problem: Pack | Unpack) -> Callable:
        # XLA cannot split a custom call where it divides a program by itself: there its own way stays.
        if select.kernels_unavailable(platform) or divided_by_xla(ctx):
            return lambda *operands: by_xla(problem, *vary_together(operands))
        from moe_align_jax._simt import mosaic

        return mosaic.launcher(message_kernels.build(problem))

    def batch(primitive: Primitive, operands: Any, dims: Any, *, problem: Pack | Unpack):
        del primitive
        return jax.vmap(functools.partial(by_xla, problem), in_axes=tuple(dims))(*operands)

    return make_primitive(name, abstract=abstract, implement=implement, batch=batch)


_pack_p = _make("moe_pack", _pack_by_xla)
_unpack_p = _make("moe_unpack", _unpack_by_xla)
_gathered_p = _make("moe_gathered", _fill_by_xla)


def problems(
    payload: list[jax.Array],
    ids: jax.Array,
    num_ranks: int,
    num_local_experts: int,
    rows_per_expert: int,
    quantise: bool,
    swaps: bool = False,
    same: bool = False,
) -> tuple[Pack, Unpack, Unpack]:
    """What the kernels of an exchange have to do: the first two of messages, or the third alone.

    Args:
        payload: `[T, c]` arrays; with `quantise` one, bfloat16.
        ids: `[T, K]`.
        num_ranks, num_local_experts: D, e.
        rows_per_expert: M, the rows of a box.
        quantise: whether the payload is quantised on the way.
        swaps: whether two ranks swap messages.
    """
    fields = tuple(Field(x.shape[1], jnp.dtype(x.dtype)) for x in payload)
    if quantise:
        fields = message_kernels.quantised(fields[0].columns)
    num_tokens, top_k = ids.shape
    form = Message(num_ranks, num_tokens, top_k, num_local_experts, fields)
    gathered = Unpack(form, rows_per_expert, gathered=True, quantise=quantise)
    unpack = Unpack(form, rows_per_expert, swapped=swaps, same=same)
    if same:
        form = form._replace(num_ranks=1, num_local_experts=num_ranks * num_local_experts)
    return Pack(form, quantise, swaps), unpack, gathered
