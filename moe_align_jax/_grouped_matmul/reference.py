"""Grouped matrix multiplication in plain jax.numpy: the specification, and implementation="xla".

A loop over the blocks in use, each one product with its expert's weights: the work follows the rows in use,
not rows times experts. The weights' gradient is a loop over the same blocks, in the order of their experts.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_align_jax._grouped_matmul import scaled
from moe_align_jax._grouped_matmul.problem import (
    ActivationGradient,
    MatmulProblem,
    WeightGradient,
    Weights,
)

_I32, _F32 = jnp.int32, jnp.float32
# Most rows of a tile where no block size is given.
_TILE = 128


class Tiles(NamedTuple):
    """Which rows use which weights: tile i is rows `[start[i], min(start[i] + size, end[i]))`.

    Attributes:
        size: most rows of a tile. Static.
        count: tiles in use.
        expert: of each tile. Outside `[0, E)`: its rows are zero.
        start, end: rows.
    """

    size: int
    count: jax.Array
    expert: jax.Array
    start: jax.Array
    end: jax.Array


@jax.custom_jvp
def _erfc(x: jax.Array) -> jax.Array:
    """`lax.erfc`, whose derivative in jax 0.12.0 does not trace in a shard_map that checks what varies."""
    return lax.erfc(x)


@_erfc.defjvp
def _erfc_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The value, and the tangent times -2 / sqrt(pi) * exp(-x**2)."""
    [x], [tangent] = primals, tangents
    return _erfc(x), tangent * (_F32(-2 / math.pi**0.5) * jnp.exp(-jnp.square(x)))


def activate(weights: Weights, gate: jax.Array, up: jax.Array | None) -> jax.Array:
    """float32 in and out."""
    limit, alpha = weights.swiglu_limit, weights.swiglu_alpha
    if limit is not None and up is not None:
        gate = jnp.minimum(gate, _F32(limit))
        up = jnp.clip(up, -_F32(limit), _F32(limit))
    if alpha is not None and up is not None:
        return gate * jax.nn.sigmoid(gate * _F32(alpha)) * (up + 1.0)
    match weights.activation:
        case None:
            value = gate
        case "silu":
            value = jax.nn.silu(gate)
        case "gelu":
            value = 0.5 * gate * _erfc(-gate * _F32(0.5**0.5))
        case "gelu_tanh":
            value = jax.nn.gelu(gate, approximate=True)
        case _:
            value = jnp.square(jnp.maximum(gate, 0.0))
    return value if up is None else value * up


def tiles(problem: MatmulProblem, *where: jax.Array) -> Tiles:
    """From the arrays that say where each expert's rows are."""
    if problem.rows == "blocks":
        *_, expert_ids, used = where
        block = problem.block_size
        start = jnp.arange(problem.num_blocks, dtype=_I32) * block
        count = jnp.clip(lax.div(used[0] + (block - 1), _I32(block)), 0, problem.num_blocks)
        return Tiles(block, count, expert_ids, start, start + block)
    if problem.rows == "masked":
        size = _tile_rows(problem.max_rows)
        sizes = jnp.clip(where[0], 0, problem.max_rows)
        begin = jnp.arange(problem.num_experts, dtype=_I32) * problem.max_rows
        most = problem.num_experts * -(-problem.max_rows // size)
        expert = jnp.arange(problem.num_experts, dtype=_I32)
    else:
        size = _tile_rows(problem.num_rows)
        ends = group_ends(where[0], problem.num_rows)
        begin = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
        sizes = ends - begin
        most = -(-problem.num_rows // size) + problem.num_groups
        # A difference that wraps is outside [0, E) all the same.
        expert = jnp.arange(problem.num_groups, dtype=_I32) - where[1][0]
    each = lax.div(sizes + (size - 1), _I32(size))
    last = jnp.cumsum(each, dtype=_I32)
    index = jnp.arange(most, dtype=_I32)
    group = jnp.searchsorted(last, index, side="right").astype(_I32)
    group = jnp.minimum(group, max(sizes.shape[0] - 1, 0))
    start = begin[group] + (index - (last - each)[group]) * size
    return Tiles(size, last[-1], expert[group], start, (begin + sizes)[group])


def _tile_rows(limit: Any) -> int:
    """Rows of a tile where no block size is given. `limit`: rows that a group can have, maybe a symbol."""
    return max(1, min(_TILE, limit)) if isinstance(limit, int) else _TILE


def group_ends(sizes: jax.Array, num_rows: int) -> jax.Array:
    """The row behind each group's last; rows that the array does not have are cut off."""
    return jnp.minimum(_saturating_cumsum(jnp.maximum(sizes, 0)), num_rows)


def rows_with_matrix(
    sizes: jax.Array, offset: jax.Array, num_experts: int, num_rows: int
) -> jax.Array:
    """`[num_rows]` bool: which rows of "ragged" are products, not zeros."""
    group = jnp.arange(sizes.shape[0], dtype=_I32) - offset
    known = jnp.append((group >= 0) & (group < num_experts), False)
    row = jnp.arange(num_rows, dtype=_I32)
    return known[jnp.searchsorted(group_ends(sizes, num_rows), row, side="right")]


def _saturating_cumsum(sizes: jax.Array) -> jax.Array:
    """Running sums of values >= 0; 2**31 - 1 where they exceed it."""
    most = jnp.iinfo(_I32).max

    def add(a, b):
        return jnp.where(a > most - b, _I32(most), a + b)

    return lax.associative_scan(add, sizes)


def one_tile(
    problem: MatmulProblem,
    used: jax.Array,
    x: Any,
    w: tuple[Any, ...],
    bias: jax.Array | None,
    row_weights: jax.Array | None,
) -> jax.Array:
    """float32 `[size, n]`: rows x `[size, k]` times one expert's weights, and the epilogue.

    x and each of w are arrays, or (values, scales) as `scaled.product` takes them.

    `used` `[size]`: rows that are not zero. Nothing of the others gets into a result or a derivative.
    """
    weights = problem.weights
    x = jax.tree.map(lambda a: jnp.where(used[:, None], a, jnp.zeros_like(a)), x)
    contracted = 1 if weights.transposed else 0
    products = []
    for each in w:
        if problem.scales:
            products.append(scaled.product(x, each))
            continue
        products.append(
            lax.dot_general(
                x,
                each,
                (((1,), (contracted,)), ((), ())),
                precision=problem.precision,
                preferred_element_type=_F32,
            )
        )
    product = products[0] if len(products) == 1 else jnp.concatenate(products, axis=1)
    if bias is not None:
        product = product + bias[None, :]
    return epilogue(problem, product, used, row_weights)


def epilogue(
    problem: MatmulProblem, product: jax.Array, used: jax.Array, row_weights: jax.Array | None
) -> jax.Array:
    """float32 `[rows, n]` of float32 products `[rows, w_columns]`, bias included; zero where not `used`."""
    return epilogue_of_parts(problem, parts(problem, product), used, row_weights)


def parts(problem: MatmulProblem, product: jax.Array) -> tuple[jax.Array, ...]:
    """(gate, up) of the columns of products, or all of them where nothing is gated."""
    weights = problem.weights
    if not weights.gated:
        return (product,)
    if weights.interleaved:
        return product[:, 0::2], product[:, 1::2]
    return product[:, : problem.n], product[:, problem.n :]


def columns_of_parts(problem: MatmulProblem, found: tuple[jax.Array, ...]) -> jax.Array:
    """The inverse of `parts`. Its derivative would be a sum of two arrays that are padded with zeros."""
    if problem.weights.interleaved:
        return jnp.stack(found, axis=-1).reshape(found[0].shape[0], -1)
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=1)


def epilogue_of_parts(
    problem: MatmulProblem,
    found: tuple[jax.Array, ...],
    used: jax.Array,
    row_weights: jax.Array | None,
) -> jax.Array:
    """`epilogue` of `parts`."""
    result = activate(problem.weights, found[0], found[1] if len(found) > 1 else None)
    if row_weights is not None:
        result = result * jnp.where(used, row_weights, 0.0)[:, None]
    return jnp.where(used[:, None], result, 0.0)


class _Operands(NamedTuple):
    """The operands by name: x (with scales a pair), the weights, and what else the problem has."""

    x: Any
    w: tuple[Any, ...]
    bias: jax.Array | None
    row_weights: jax.Array | None
    where: tuple[jax.Array, ...]


def named(problem: MatmulProblem, operands: tuple[jax.Array, ...]) -> _Operands:
    """The operands of the primitive, which come in the order of `problem.inputs`, by name."""
    rest = list(operands)
    x = rest.pop(0)
    w = tuple(rest.pop(0) for _ in range(1 + problem.weights.pair))
    bias = rest.pop(0) if problem.weights.bias else None
    row_weights = rest.pop(0) if problem.row_weights else None
    if problem.scales:
        x = (x, scaled.of_rows(problem, rest.pop(0)))
        w = tuple((each, rest.pop(0)) for each in w)
    if problem.inverse:  # of the launches alone
        rest.pop()
    return _Operands(x, w, bias, row_weights, tuple(rest))


class _Rows(NamedTuple):
    """The rows of one tile.

    Attributes:
        used: `[size]`, rows that hold something.
        start: the first row.
        token: `[size]`, rows of x, or None where they are the tile's own.
    """

    used: jax.Array
    start: jax.Array
    token: jax.Array | None


def _rows(problem: MatmulProblem, tiles: Tiles, i: jax.Array, ids: jax.Array | None) -> _Rows:
    """The rows of tile i; `ids` are those of the pairs, None where rows are their own."""
    start = tiles.start[i]
    row = start + jnp.arange(tiles.size, dtype=_I32)
    expert = tiles.expert[i]
    used = (row < tiles.end[i]) & (expert >= 0) & (expert < problem.num_experts)
    if ids is None:
        return _Rows(used, start, None)
    pair = lax.dynamic_slice_in_dim(ids, start, tiles.size)
    used &= (pair >= 0) & (pair < ids_bound(problem, ids))
    if not problem.top_k:
        return _Rows(used, start, None)
    return _Rows(used, start, jnp.where(used, lax.div(pair, _I32(problem.top_k)), 0))


def ids_bound(problem: MatmulProblem, ids: jax.Array) -> jax.Array | int:
    """Ids below it are pairs.

    Where their number is not known the last slot holds it: a block of more than one row is never full where
    all of the capacity is used, since that takes experts whose last block holds one pair. An alignment that
    was cut to its rows may end with a pair: see `arguments.pairs_of`.
    """
    if problem.top_k:
        return problem.num_tokens * problem.top_k
    if problem.num_pairs:
        return problem.num_pairs
    if problem.block_size == 1:
        return problem.num_rows
    # An array, since num_rows may be a symbol of an exported program.
    return lax.dynamic_index_in_dim(ids, jnp.asarray(problem.num_rows - 1, _I32), keepdims=False)


def _padded(x: jax.Array, rows: int) -> jax.Array:
    """With `rows` more rows, so that a tile's slice never starts elsewhere than it says."""
    return jnp.pad(x, ((0, rows), *[(0, 0)] * (x.ndim - 1))) if rows else x


def _spare(problem: MatmulProblem) -> int:
    """Rows behind the last one that a tile may reach to."""
    if problem.rows == "blocks":
        return problem.num_blocks * problem.block_size - problem.num_rows
    limit = problem.max_rows if problem.rows == "masked" else problem.num_rows
    return _tile_rows(limit) - 1


def _of_expert(problem: MatmulProblem, tiles: Tiles, i: jax.Array, array: Any) -> Any:
    """Of each array of a pytree the part that belongs to the expert of tile i."""
    expert = jnp.clip(tiles.expert[i], 0, problem.num_experts - 1)
    one = functools.partial(lax.dynamic_index_in_dim, index=expert, keepdims=False)
    return jax.tree.map(one, array)


def grouped_matmul(problem: MatmulProblem, *operands: jax.Array) -> jax.Array:
    """`[num_rows, n]`, zero in rows that are not in use."""
    given, spare = named(problem, operands), _spare(problem)
    every = tiles(problem, *given.where)
    ids = None
    # Rows that need not be zero are not asked for their pair: the last slot may hold one (`ids_bound`).
    if problem.rows == "blocks" and (problem.top_k or problem.zero_padding):
        ids = given.where[0]
    x = given.x if problem.top_k else jax.tree.map(lambda a: _padded(a, spare), given.x)
    scales = None if given.row_weights is None else _padded(given.row_weights, spare)
    padded_ids = None if ids is None else jnp.pad(ids, (0, spare), constant_values=-1)

    def step(i, out):
        rows = _rows(problem, every, i, padded_ids)

        def of_tile(array):
            if rows.token is None:
                return lax.dynamic_slice_in_dim(array, rows.start, every.size)
            return array[rows.token]

        xs = jax.tree.map(of_tile, x)
        w = tuple(_of_expert(problem, every, i, each) for each in given.w)
        bias = None if given.bias is None else _of_expert(problem, every, i, given.bias)
        scale = scales
        if scale is not None:
            scale = lax.dynamic_slice_in_dim(scale, rows.start, every.size)
        result = one_tile(problem, rows.used, xs, w, bias, scale).astype(problem.out_dtype)
        if problem.rows != "blocks":  # the tile may reach into the next group's rows
            old = lax.dynamic_slice_in_dim(out, rows.start, every.size)
            result = jnp.where(rows.used[:, None], result, old)
        return lax.dynamic_update_slice_in_dim(out, result, rows.start, 0)

    shape = (problem.num_rows + spare, problem.n)
    out = lax.fori_loop(0, every.count, step, _zeros(shape, problem.out_dtype, operands))
    return out[: problem.num_rows]


def _zeros(shape: tuple[Any, ...], dtype: str, operands: tuple[jax.Array, ...]) -> jax.Array:
    """Zeros that vary over a shard_map's axes as the operands do.

    They read the operands: XLA would else write the zeros of all of a program's loops when it begins, one
    array for each loop, and keep them until the loops run.
    """
    zero = jnp.zeros((), dtype)
    for x in operands[:2]:
        if 0 not in x.shape:
            value = x[(0,) * x.ndim].astype(_F32)
            never = (value != value) & (value == 0)
            zero = jnp.where(never, jnp.ones((), dtype), zero)
    zeros = jnp.broadcast_to(zero, shape)
    axes = frozenset().union(*map(_varying, operands)) - _varying(zeros)
    return lax.pcast(zeros, tuple(sorted(axes)), to="varying") if axes else zeros


def _varying(x: jax.Array) -> frozenset[str]:
    """The axes of a shard_map that it varies over."""
    mat = getattr(jax.typeof(x), "mat", None)
    return frozenset() if mat is None else frozenset(mat.varying)


def weight_gradient(problem: WeightGradient, *operands: jax.Array) -> jax.Array:
    """`[E, k, n]`: for each expert, the transpose of its rows of lhs times its rows of rhs.

    Beside the result there is one float32 sum `[k, n]`: tiles are taken in the order of their experts, so
    that an expert's sum is complete before the next one's begins, and is rounded once.
    """
    layout, gathered = problem.layout, problem.gathered
    lhs, rhs, *where = operands
    spare = _spare(layout)
    every = tiles(layout, *where)
    ids = None
    order = jnp.arange(every.expert.shape[0], dtype=_I32)
    if layout.rows == "blocks":
        ids = jnp.pad(where[0], (0, spare), constant_values=-1)
        # Blocks behind those in use, and blocks of other devices' experts, come last.
        valid = (order < every.count) & (every.expert >= 0) & (every.expert < layout.num_experts)
        order = jnp.argsort(jnp.where(valid, every.expert, layout.num_experts), stable=True)
    lhs = lhs if gathered == "lhs" else _padded(lhs, spare)
    rhs = rhs if gathered == "rhs" else _padded(rhs, spare)

    def rows_of(array, rows, is_gathered):
        if is_gathered:
            found = array[rows.token]
        else:
            found = lax.dynamic_slice_in_dim(array, rows.start, every.size)
        return jnp.where(rows.used[:, None], found, jnp.zeros_like(found))

    def step(i, carry):
        out, total, last = carry
        tile = order[i]
        rows = _rows(layout, every, tile, ids)
        product = lax.dot_general(
            rows_of(lhs, rows, gathered == "lhs"),
            rows_of(rhs, rows, gathered == "rhs"),
            (((0,), (0,)), ((), ())),
            precision=layout.precision,
            preferred_element_type=_F32,
        )
        expert = every.expert[tile]
        there = (expert >= 0) & (expert < layout.num_experts)
        expert = jnp.where(there, expert, last)  # its product is zero: no row of it is used
        total = jnp.where(expert == last, total, 0.0) + product
        out = lax.dynamic_update_index_in_dim(out, total.astype(out.dtype), expert, 0)
        return out, total, expert

    first = (
        _zeros(problem.out_shape, layout.out_dtype, operands),
        _zeros(problem.out_shape[1:], "float32", operands),
        _zeros((), "int32", operands),
    )
    return lax.fori_loop(0, every.count, step, first)[0]


def across_activation(
    first: MatmulProblem, products: jax.Array, g: jax.Array, scale: jax.Array, used: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dh, s a, sums over the columns of g a): see `activation_gradient_kernel`.

    first: whose epilogue is differentiated. products: `[rows, w_columns]`. g: float32 `[rows, n]`. scale,
    used: `[rows]`; rows that are not used may hold anything, and are zero in the results.
    """
    every = jnp.ones(products.shape[0], bool)

    def active_of(*found):
        return epilogue_of_parts(first, found, every, None)

    active, pull = jax.vjp(active_of, *(part.astype(_F32) for part in parts(first, products)))
    dtype = products.dtype

    def rows_in_use(found):  # left out behind their last operation
        return jnp.where(used[:, None], found, 0.0).astype(dtype)

    toward = tuple(rows_in_use(part) for part in pull(scale[:, None] * g))
    sums = jnp.where(used, jnp.sum(g * active, axis=1), 0.0)
    return columns_of_parts(first, toward), rows_in_use(scale[:, None] * active), sums


def activation_gradient(problem: ActivationGradient, *operands: jax.Array) -> list[jax.Array]:
    """[dh `[P, 2 N]`, s a `[P, N]`, sums `[P]`], zero in rows that are not in use.

    Block after block: nothing as large as the results is kept beside them.
    """
    products, scale, used, toward, w, *where = operands
    product, first = problem.product, problem.product._replace(weights=problem.weights)
    every, spare = tiles(product, *where), _spare(product)
    products, scale, used = (_padded(x, spare) for x in (products, scale, used))
    toward = toward if product.top_k else _padded(toward, spare)
    ids = jnp.pad(where[0], (0, spare), constant_values=-1)

    def step(i, results):
        rows = _rows(product, every, i, ids)
        mine = functools.partial(
            lax.dynamic_slice_in_dim, start_index=rows.start, slice_size=every.size
        )
        in_use = rows.used & mine(used)
        matrix = _of_expert(product, every, i, w)
        ct = mine(toward) if rows.token is None else toward[rows.token]
        g = one_tile(product, in_use, ct, (matrix,), None, None)
        found = across_activation(first, mine(products), g, mine(scale), in_use)
        return tuple(
            lax.dynamic_update_slice_in_dim(all_rows, some, rows.start, 0)
            for all_rows, some in zip(results, found, strict=True)
        )

    num_rows = product.num_rows + spare
    shapes = ((num_rows, first.w_columns), (num_rows, product.n), (num_rows,))
    dtypes = (product.dtype, product.dtype, "float32")
    zeros = (_zeros(s, d, operands) for s, d in zip(shapes, dtypes, strict=True))
    results = lax.fori_loop(0, every.count, step, tuple(zeros))
    return [found[: product.num_rows] for found in results]


def rows_of_pairs(
    tokens: jax.Array, sorted_token_ids: jax.Array, *, num_tokens: int, top_k: int
) -> jax.Array:
    """`[num_rows, .]`: the row of each pair's token, gathered by XLA.

    Rows of no pair are zeros: the kernel's epilogue, or the reader of the result, leaves them out, and
    products of zeros take the least power. XLA's gather takes 106 us with `mode="fill"`, and 102 where
    such rows are some token's (one H200, 2026-11-29, 17,912 rows of 4,096). Products and weights' gradients
    ask for them by the same operations, so that XLA makes one array for both.
    """
    pairs, pair = num_tokens * top_k, sorted_token_ids
    there = (pair >= 0) & (pair < pairs)
    rows = jnp.where(there, lax.div(pair, jnp.int32(top_k)), num_tokens)
    return tokens.at[rows].get(mode="fill", fill_value=0)


def row_mask(problem: MatmulProblem, *where: jax.Array) -> jax.Array:
    """`[num_rows]` bool: which rows of the result are products. The others are zero or unspecified."""
    row = jnp.arange(problem.num_rows, dtype=_I32)
    if problem.rows == "ragged":
        return rows_with_matrix(where[0], where[1][0], problem.num_experts, problem.num_rows)
    if problem.rows == "masked":
        return lax.rem(row, _I32(problem.max_rows)) < jnp.repeat(where[0], problem.max_rows)
    ids, expert_ids, used = where
    expert = expert_ids[lax.div(row, _I32(problem.block_size))]
    there = (row < used[0]) & (expert >= 0) & (expert < problem.num_experts)
    return there & (ids >= 0) & (ids < ids_bound(problem, ids))
