"""Tokens laid out by expert, and back: the masked layout (decode) and the contiguous one (prefill).

Masked: a box of M rows per expert, of which `masked_m` are in use, for a masked grouped GEMM. Contiguous:
each expert's rows together, padded to whole GEMM blocks, with `m_indices` naming the expert of each row.
Both orders are those of `moe_align_block_size`: by expert, then by pair, so rank-major and then by token
for tokens gathered from several ranks. On a Hopper GPU one kernel makes the masked layout and another one
the weighted sums; elsewhere, and in all gradients, rows move by gathers.

T tokens, K top_k, n = T * K pairs, e (local) experts, M rows per expert, P rows, H hidden.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_align_jax import block_align
from moe_align_jax._core import checks, fork
from moe_align_jax._core.int32 import narrow_on_host
from moe_align_jax._expert_parallel.arguments import (
    check_ids,
    check_layout,
    check_out_dtype,
    check_rows,
)
from moe_align_jax._layout.rows import copy_to_masked, sum_rows, take_rows
from moe_align_jax._lowering import export
from moe_align_jax._lowering.reverse_mode import in_our_words, reverse_mode_only
from moe_align_jax._lowering.sharding import explicit_parts, replicate, vary_together

_I32 = jnp.int32


@export.register_namedtuple
class MaskedLayout(NamedTuple):
    """Where each pair stands in the `[e, M, ...]` layout.

    The example is ids `[[1, 0], [1, -1]]` with e = 2, M = 2, so n = 4:

    Attributes:
        masked_m: `[e]` int32. Rows in use = `min(tokens_per_expert, M)`. `[1, 2]`
        tokens_per_expert: `[e]` int32. Pairs of each expert; greater than `masked_m` where rows were
            dropped for want of room. `[1, 2]`
        row_of_pair: `[T, K]` int32. `expert * M + i` for the i-th pair of its expert, -1 for a dropped
            pair. `[[2, 0], [3, -1]]`
        pair_of_row: `[e, M]` int32, its inverse; n in rows that are not in use. `[[1, 4], [0, 2]]`
    """

    masked_m: Any
    tokens_per_expert: Any
    row_of_pair: Any
    pair_of_row: Any


@export.register_namedtuple
class ContiguousLayout(NamedTuple):
    """Where each pair stands in the `[P, ...]` layout of padded segments.

    The example is ids `[[1, 0], [1, -1]]` with e = 2 and an alignment of 2, so n = 4 and P = 6:

    Attributes:
        m_indices: `[P]` int32. The expert of each row, padding included; -1 past the last segment (and in
            padding rows, where that was asked for). `[0, 0, 1, 1, -1, -1]`
        group_sizes: `[e]` int32. Rows of each segment with padding, as `jax.lax.ragged_dot` wants
            them. `[2, 2]`
        tokens_per_expert: `[e]` int32. Pairs of each expert. `[1, 2]`
        row_of_pair: `[T, K]` int32, -1 for a dropped pair. `[[2, 0], [3, -1]]`
        pair_of_row: `[P]` int32, its inverse; n in padding. `[1, 4, 0, 2, 4, 4]`
    """

    m_indices: Any
    group_sizes: Any
    tokens_per_expert: Any
    row_of_pair: Any
    pair_of_row: Any


def permute_to_masked(
    x: Any,
    topk_ids: jax.Array,
    *,
    num_experts: int,
    max_tokens_per_expert: int | None = None,
    initialize: bool = True,
) -> tuple[Any, MaskedLayout]:
    """Copies each token to the box of every expert it chose: `[T, ...]` to `[e, M, ...]`.

    Args:
        x: `[T, ...]`, any dtype, or a pytree of such arrays (a payload and its scales).
        topk_ids: `[T, K]` any integer dtype, local expert ids; outside `[0, e)` a pair is dropped.
        num_experts: e, the (local) experts, >= 1. Static.
        max_tokens_per_expert: M, >= 1, static; None for T (at least 1), which is enough where the ids of a
            token are distinct. Pairs of an expert past M are dropped, the last ones first:
            `tokens_per_expert` then exceeds `masked_m`.
        initialize: whether rows >= `masked_m` are zero. False leaves them unwritten: their cost goes, and
            nothing may read them, which a dense product over all rows does in its gradient. Static.

    Returns:
        (rows, layout): rows as x, each `[e, M, ...]`; a `MaskedLayout`. Row i of an expert is its i-th pair
        in the order of `topk_ids`.

    Raises:
        TypeError: ids are not integers, a size is not a static int, or a flag no bool.
        ValueError: a shape does not fit, rows are split over Explicit mesh axes, or e * M exceeds int32.

    Example:
        >>> x = jnp.array([[1.0], [2.0]])
        >>> rows, layout = permute_to_masked(x, jnp.array([[1, 0], [1, -1]]), num_experts=2)
        >>> rows[..., 0].tolist(), layout.masked_m.tolist()
        ([[1.0, 0.0], [1.0, 2.0]], [1, 2])

    Source: the masked layout of DeepEP's low-latency dispatch and DeepGEMM (MIT); no code taken.
    """
    function = "permute_to_masked"
    fork.check(function)
    num_experts = checks.check_num_experts(function, num_experts)
    remedy = "True makes unused rows zero, False leaves them unwritten."
    initialize = checks.check_bool(function, "initialize", initialize, remedy)
    ids = check_ids(function, topk_ids)
    num_tokens, top_k = ids.shape
    x = check_rows(function, "x", x, (num_tokens,), "Pass arrays of one row per token.")
    _check_whole(function, "x", x, 1)
    rows_per_expert = check_rows_per_expert(
        function, max_tokens_per_expert, num_experts, num_tokens, top_k
    )
    ids = replicate(jnp.asarray(narrow_on_host(ids, num_experts)))
    if num_tokens == 0:
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros((num_experts, rows_per_expert, *leaf.shape[1:]), leaf.dtype), x
        )
        layout = MaskedLayout(
            *_zeros((num_experts,), (num_experts,), ids.shape, (num_experts, rows_per_expert))
        )
        return vary_together((zeros, layout, (x, ids)))[:2]
    with in_our_words(function):
        sizes = {"num_experts": num_experts, "rows_per_expert": rows_per_expert}
        return _to_masked(x, ids, **sizes, initialize=initialize)


def _zeros(*shapes: tuple[int, ...]) -> list[jax.Array]:
    """The indices of a layout without tokens.

    They do not depend on the ids: XLA folds arrays without elements to constants, and its partitioner
    refuses a shard_map's body whose arguments are all such and whose results are not.
    """
    return [jnp.zeros(shape, _I32) for shape in shapes]


def _check_whole(function: str, argument: str, tree: Any, axes: int) -> None:
    """Rows of any device may go to any: over Explicit mesh axes they are not split."""
    for leaf in jax.tree.leaves(tree):
        if any(explicit_parts(leaf, axis) > 1 for axis in range(axes)):
            rule, got = "not have rows split over Explicit mesh axes", str(jax.typeof(leaf))
            remedy = "Call it inside jax.shard_map, or gather them with jax.reshard."
            raise ValueError(checks.message(function, argument, rule, got, remedy))


def check_rows_per_expert(
    function: str, max_tokens_per_expert: Any, num_experts: int, num_tokens: int, top_k: int
) -> int:
    """M."""
    rows_per_expert, name = max(num_tokens, 1), "max_tokens_per_expert"
    if max_tokens_per_expert is not None:
        remedy = "Pass the rows per expert."
        rows_per_expert = checks.check_positive_int(function, name, max_tokens_per_expert, remedy)
    rows = num_experts * rows_per_expert + num_tokens * top_k
    checks.check_fits_int32(function, name, rows, "a number of rows")
    return rows_per_expert


@functools.partial(jax.jit, static_argnames=("num_experts", "rows_per_expert", "initialize"))
def _to_masked(
    x: Any, ids: jax.Array, *, num_experts: int, rows_per_expert: int, initialize: bool
) -> tuple[Any, MaskedLayout]:
    with jax.named_scope("permute_to_masked"):
        aligned = block_align.moe_align_block_size(
            ids, block_size=1, num_experts=num_experts, return_inverse=True
        )
        leaves, kind = jax.tree.flatten(reverse_mode_only("permute_to_masked", x))
        layout, rows = copy_to_masked(
            leaves,
            ids,
            aligned.sorted_token_ids,
            aligned.row_of_pair,
            aligned.tokens_per_expert,
            rows_per_expert=rows_per_expert,
            initialize=initialize,
        )
        masked_m, row_of_pair, pair_of_row = layout
        counts = aligned.tokens_per_expert
        layout = MaskedLayout(masked_m, counts, row_of_pair, pair_of_row)
        return jax.tree.unflatten(kind, rows), layout


def unpermute_from_masked(
    y: jax.Array,
    layout: MaskedLayout,
    topk_weights: jax.Array | None = None,
    *,
    out_dtype: Any = None,
) -> jax.Array:
    """The weighted sum of each token's rows: `[e, M, ...]` to `[T, ...]`.

    `out[t] = sum_k topk_weights[t, k] * y[row_of_pair[t, k]]`, in float32, k ascending; a dropped pair adds
    zero. Rows that are not in use are not read, whatever they hold.

    Args:
        y: `[e, M, ...]` floating point, what the experts made of the rows.
        layout: of the `permute_to_masked` that made the rows.
        topk_weights: `[T, K]` floating point; None for ones.
        out_dtype: floating point; None for the dtype of y.

    Returns:
        `[T, ...]`.

    Raises:
        TypeError: y, the weights or out_dtype are not floating point, or the layout is none.
        ValueError: a shape does not fit the layout, or y's rows are split over Explicit mesh axes.

    Example:
        >>> x = jnp.array([[1.0], [2.0]])
        >>> rows, layout = permute_to_masked(x, jnp.array([[1, 0], [1, -1]]), num_experts=2)
        >>> weights = jnp.array([[0.5, 0.25], [3.0, 9.0]])
        >>> unpermute_from_masked(10 * rows, layout, weights).tolist()
        [[7.5], [60.0]]
    """
    function = "unpermute_from_masked"
    fork.check(function)
    check_layout(function, layout, MaskedLayout, "permute_to_masked")
    shape = layout.pair_of_row.shape
    y = check_rows(function, "y", y, shape, "Pass the rows of the layout.", floating=True)
    _check_whole(function, "y", y, len(shape))
    flat = y.reshape(shape[0] * shape[1], *y.shape[2:])
    return _unpermute(function, flat, layout, topk_weights, out_dtype)


def permute_to_contiguous(
    x: Any,
    topk_ids: jax.Array,
    *,
    num_experts: int,
    expert_alignment: int = 128,
    max_num_rows: int | None = None,
    mark_padding: bool = False,
) -> tuple[Any, ContiguousLayout]:
    """Copies each token to the segment of every expert it chose: `[T, ...]` to `[P, ...]`.

    Args:
        x: `[T, ...]`, any dtype, or a pytree of such arrays.
        topk_ids: `[T, K]` any integer dtype, local expert ids; outside `[0, e)` a pair is dropped.
        num_experts: e, the (local) experts, >= 1. Static.
        expert_alignment: segments are padded to a multiple of it: the GEMM's BLOCK_M. Static.
        max_num_rows: P, a multiple of expert_alignment, static; None for the worst case,
            `max_num_tokens_padded(..., pad_sorted_ids=True)`. Pairs past P are dropped.
        mark_padding: whether `m_indices` reads -1 in padding rows too. Static.

    Returns:
        (rows, layout): rows as x, each `[P, ...]`, zero in padding; a `ContiguousLayout`.

    Raises:
        TypeError: ids are not integers, a size is not a static int, or a flag no bool.
        ValueError: a shape or a size does not fit, rows are split over Explicit mesh axes, or P exceeds
            int32.

    Example:
        >>> x = jnp.array([[1.0], [2.0]])
        >>> ids = jnp.array([[1, 0], [1, -1]])
        >>> rows, layout = permute_to_contiguous(x, ids, num_experts=2, expert_alignment=2)
        >>> rows[:, 0].tolist(), layout.m_indices.tolist()
        ([1.0, 0.0, 1.0, 2.0, 0.0, 0.0], [0, 0, 1, 1, -1, -1])

    Source: the contiguous layout of DeepGEMM and SGLang's ep_scatter (MIT, Apache-2.0); no code taken.
    """
    function = "permute_to_contiguous"
    fork.check(function)
    mark_padding = checks.check_bool(function, "mark_padding", mark_padding)
    num_experts = checks.check_num_experts(function, num_experts)
    alignment = checks.check_positive_int(
        function, "expert_alignment", expert_alignment, "Pass the rows per GEMM block."
    )
    ids = check_ids(function, topk_ids)
    x = check_rows(function, "x", x, ids.shape[:1], "Pass arrays of one row per token.")
    _check_whole(function, "x", x, 1)
    rows = None
    if max_num_rows is not None:
        remedy = "Pass a multiple of expert_alignment."
        rows = checks.check_positive_int(function, "max_num_rows", max_num_rows, remedy)
        if rows % alignment:
            rule = f"be a multiple of expert_alignment ({alignment})"
            raise ValueError(checks.message(function, "max_num_rows", rule, rows, remedy))

    ids = replicate(jnp.asarray(narrow_on_host(ids, num_experts)))
    if ids.shape[0] == 0:
        layout = ContiguousLayout(*_zeros((0,), (num_experts,), (num_experts,), ids.shape, (0,)))
        return vary_together((jax.tree.map(jnp.zeros_like, x), layout, (x, ids)))[:2]
    with in_our_words(function):
        return _to_contiguous(
            x,
            ids,
            num_experts=num_experts,
            alignment=alignment,
            limit=rows,
            mark_padding=mark_padding,
        )


@functools.partial(jax.jit, static_argnames=("num_experts", "alignment", "limit", "mark_padding"))
def _to_contiguous(
    x: Any,
    ids: jax.Array,
    *,
    num_experts: int,
    alignment: int,
    limit: int | None,
    mark_padding: bool,
) -> tuple[Any, ContiguousLayout]:
    with jax.named_scope("permute_to_contiguous"):
        aligned = block_align.moe_align_block_size(
            ids,
            block_size=alignment,
            num_experts=num_experts,
            pad_sorted_ids=True,
            return_inverse=True,
        )
        worst = aligned.sorted_token_ids.shape[0]
        rows = worst if limit is None else min(limit, worst)
        pair_of_row = aligned.sorted_token_ids[:rows]
        row = aligned.row_of_pair.reshape(ids.shape)
        row_of_pair = jnp.where(row < rows, row, -1)
        blocks = aligned.expert_ids[: rows // alignment]
        m_indices = jnp.broadcast_to(blocks[:, None], (blocks.size, alignment)).reshape(-1)
        if mark_padding:
            m_indices = jnp.where(pair_of_row < ids.size, m_indices, -1)
        sizes = block_align.padded_group_sizes(aligned, block_size=alignment)
        ends = jnp.cumsum(sizes, dtype=_I32)
        sizes = jnp.minimum(ends, _I32(rows)) - jnp.minimum(ends - sizes, _I32(rows))
        counts = aligned.tokens_per_expert
        layout = ContiguousLayout(m_indices, sizes, counts, row_of_pair, pair_of_row)
        x = reverse_mode_only("permute_to_contiguous", x)
        return jax.tree.map(lambda leaf: take_rows(leaf, row_of_pair, pair_of_row), x), layout


def unpermute_from_contiguous(
    y: jax.Array,
    layout: ContiguousLayout,
    topk_weights: jax.Array | None = None,
    *,
    out_dtype: Any = None,
) -> jax.Array:
    """The weighted sum of each token's rows: `[P, ...]` to `[T, ...]`, as `unpermute_from_masked`.

    Args:
        y: `[P, ...]` floating point, what the experts made of the rows.
        layout: of the `permute_to_contiguous` that made the rows.
        topk_weights: `[T, K]` floating point; None for ones.
        out_dtype: floating point; None for the dtype of y.

    Returns:
        `[T, ...]`.

    Raises:
        TypeError: y, the weights or out_dtype are not floating point, or the layout is none.
        ValueError: a shape does not fit the layout, or y's rows are split over Explicit mesh axes.

    Example:
        >>> x = jnp.array([[1.0], [2.0]])
        >>> ids = jnp.array([[1, 0], [1, -1]])
        >>> rows, layout = permute_to_contiguous(x, ids, num_experts=2, expert_alignment=2)
        >>> unpermute_from_contiguous(10 * rows, layout).tolist()
        [[20.0], [20.0]]
    """
    function = "unpermute_from_contiguous"
    fork.check(function)
    check_layout(function, layout, ContiguousLayout, "permute_to_contiguous")
    shape = layout.pair_of_row.shape
    y = check_rows(function, "y", y, shape, "Pass the rows of the layout.", floating=True)
    _check_whole(function, "y", y, len(shape))
    return _unpermute(function, y, layout, topk_weights, out_dtype)


def _unpermute(function: str, y: Any, layout: Any, weights: Any, out_dtype: Any) -> jax.Array:
    if weights is not None:
        shape = layout.row_of_pair.shape
        remedy = "Pass one weight per pair of topk_ids."
        weights = check_rows(function, "topk_weights", weights, shape, remedy, floating=True)
        if weights.ndim != 2:
            rule = f"have shape {list(shape)}"
            got = checks.describe(weights)
            raise ValueError(checks.message(function, "topk_weights", rule, got, remedy))
        weights = replicate(jnp.asarray(weights))
    out_dtype = check_out_dtype(function, out_dtype, y.dtype)
    rows = layout.row_of_pair, layout.pair_of_row.reshape(-1)
    with in_our_words(function):
        return _sum(y, weights, *rows, name=function, out_dtype=out_dtype)


@functools.partial(jax.jit, static_argnames=("name", "out_dtype"))
def _sum(y, weights, row_of_pair, pair_of_row, *, name: str, out_dtype: Any) -> jax.Array:
    with jax.named_scope(name):
        y, weights = reverse_mode_only(name, (y, weights))
        return sum_rows(y, weights, row_of_pair, pair_of_row, out_dtype)
