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


def pack(problem: Pack, ids: jax.Array, weights: jax.Array, payload: list[jax.Array]) -> jax.Array:
    """The message `[T, W]` of tokens: see `Pack`."""
    return _pack_p.bind(*vary_together([ids, weights, *payload]), problem=problem)[0]


def unpack(problem: Unpack, rank: jax.Array, received: jax.Array) -> dict[str, jax.Array]:
    """By name, the outputs of `Unpack` of the messages that came."""
    found = _unpack_p.bind(*vary_together([rank, received]), problem=problem)
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


def _pack_by_xla(problem: Pack, ids: jax.Array, weights: jax.Array, *payload: jax.Array):
    form = problem.message
    if problem.quantise:
        payload = message.quantize(payload[0])
    columns = []
    for field, x in zip(form.fields, (*payload, weights, ids), strict=True):
        columns.append(jnp.pad(_words(x), [(0, 0), (0, -field.words % 4)]))
    return [jnp.concatenate(columns, axis=1)]


def _unpack_by_xla(problem: Unpack, rank: jax.Array, received: jax.Array) -> list[jax.Array]:
    form = problem.message
    *payload, weights, ids = (
        _from_words(received[:, start : start + field.words], field)
        for field, start in zip(form.fields, form.starts[:-1], strict=True)
    )
    return _boxes_by_xla(problem, rank, payload, weights, ids)


def _fill_by_xla(problem: Unpack, rank: jax.Array, ids: jax.Array, weights: jax.Array, *given):
    payload = list(message.quantize(given[0]) if problem.quantise else given)
    return _boxes_by_xla(problem, rank, payload, weights, ids)


def _boxes_by_xla(
    problem: Unpack,
    rank: jax.Array,
    payload: list[jax.Array],
    weights: jax.Array,
    ids: jax.Array,
) -> list[jax.Array]:
    """Of the rows that came, with global ids."""
    count = problem.message.num_local_experts
    local = ids - rank[0] * count
    here = (ids >= 0) & (local >= 0) & (local < count)
    weights, ids = jnp.where(here, weights, 0.0), jnp.where(here, local, -1)
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
) -> tuple[Pack, Unpack, Unpack]:
    """What the kernels of an exchange have to do: the first two of messages, or the third alone.

    Args:
        payload: `[T, c]` arrays; with `quantise` one, bfloat16.
        ids: `[T, K]`.
        num_ranks, num_local_experts: D, e.
        rows_per_expert: M, the rows of a box.
        quantise: whether the payload is quantised on the way.
    """
    fields = tuple(Field(x.shape[1], jnp.dtype(x.dtype)) for x in payload)
    if quantise:
        fields = message_kernels.quantised(fields[0].columns)
    num_tokens, top_k = ids.shape
    form = Message(num_ranks, num_tokens, top_k, num_local_experts, fields)
    gathered = Unpack(form, rows_per_expert, gathered=True, quantise=quantise)
    return Pack(form, quantise), Unpack(form, rows_per_expert), gathered
