"""From float32 sums in registers to pieces of the result: bias, activation, row weights, zeros, rounding."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul import inline_rows, inline_wgmma
from moe_align_jax._grouped_matmul.problem import MatmulProblem, Weights
from moe_align_jax._grouped_matmul.shape import Shape

_I32, _F32 = jnp.int32, jnp.float32


class Vectors(NamedTuple):
    """What the epilogue reads, in global memory; None where there is none.

    Attributes:
        ids: `[.]` int32, sorted_token_ids.
        row_weights: `[.]` float32.
        bias: `[E, .]` float32, with whole tiles of columns; gate, then up, but where they are parted.
        bound: what the launch gives instead of the problem's sizes, see `num_pairs`; None for nothing.
    """

    ids: Any
    row_weights: Any
    bias: Any
    bound: Any = None


class Place(NamedTuple):
    """Where a warpgroup's sums belong.

    Attributes:
        expert, valid: of the tile.
        row, column: the first, of the result.
        swap: whether rows of the sums are columns of the result.
        pairs: how many of the rows hold a pair, where the list of tiles tells it; they come first.
    """

    expert: jax.Array
    valid: jax.Array
    row: jax.Array
    column: jax.Array
    swap: bool
    pairs: Any = None


class Ending(NamedTuple):
    """What becomes of a tile's sums, in place of the epilogue.

    Attributes:
        name: of the kernel.
        inputs: operands that stand in front of the problem's.
        outputs: results that stand in front of the problem's.
        piece: columns that are stored at a time.
        slots: such pieces in shared memory, per warpgroup.
        finish: called with (refs, sums, tile, place of the warpgroup's part, warpgroup). `refs.more` holds
            inputs and outputs. It stores through `refs.o_tiles`.
    """

    name: str
    inputs: int
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    piece: int
    slots: int
    finish: Callable[..., None]


def num_pairs(problem: MatmulProblem, vectors: Vectors) -> jax.Array | int:
    """Ids below it are pairs (see reference.ids_bound).

    A launch of any size gives the pairs where `problem.counts_pairs`, else the rows.
    """
    bound, ids = vectors.bound, vectors.ids
    if bound is not None and problem.counts_pairs:
        return bound
    if problem.top_k:
        return problem.num_tokens * problem.top_k
    if problem.num_pairs and bound is None:
        return problem.num_pairs
    rows = problem.num_rows if bound is None else bound
    return rows if problem.block_size == 1 else ids[rows - 1]


def activate(weights: Weights, gate: jax.Array, up: jax.Array | None) -> jax.Array:
    """The activation of a tile of float32 sums, times `up` where the weights are gated.

    Args:
        weights: which activation, and its limit and alpha.
        gate: the sums; of gated weights those of the gate.
        up: of the same shape, or None.
    """
    limit, alpha = weights.swiglu_limit, weights.swiglu_alpha
    if limit is not None and up is not None:
        gate = jnp.minimum(gate, _F32(limit))
        up = jnp.maximum(jnp.minimum(up, _F32(limit)), _F32(-limit))
    if alpha is not None and up is not None:
        return gate * (1.0 / (1.0 + jnp.exp(gate * _F32(-alpha)))) * (up + 1.0)
    match weights.activation:
        case None:
            value = gate
        case "silu":
            value = gate * (1.0 / (1.0 + jnp.exp(-gate)))
        case "gelu":
            value = 0.5 * gate * (1.0 + _erf(gate * _F32(0.5**0.5)))
        case "gelu_tanh":
            # tanh(z) = 1 - 2 / (exp(2 z) + 1), which does not overflow.
            z = gate * (_F32(0.7978845608) + _F32(0.7978845608 * 0.044715) * gate * gate)
            value = gate * (1.0 - 1.0 / (jnp.exp(2.0 * z) + 1.0))
        case _:
            value = jnp.maximum(gate, 0.0)
            value = value * value
    return value if up is None else value * up


def _erf(x: jax.Array) -> jax.Array:
    """To 1.5e-7 (Abramowitz and Stegun, 7.1.26): jax 0.11.2 lowers no erf here."""
    size = jnp.abs(x)
    t = 1.0 / (1.0 + _F32(0.3275911) * size)
    sum_ = _F32(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        sum_ = sum_ * t + _F32(coefficient)
    value = 1.0 - sum_ * t * jnp.exp(-x * x)
    return jnp.where(x < 0, -value, value)


def nothing(problem: MatmulProblem, shape: Shape, swap: bool, interpret: bool) -> list[jax.Array]:
    """Zeros, like the pieces of a tile."""
    gated = 2 if problem.weights.gated else 1
    columns, rows = shape.wn * shape.accumulators // gated, shape.wm
    if swap:
        columns, rows = shape.wm * shape.accumulators // gated, shape.wn
    size = (shape.piece_rows, shape.piece)
    zeros = jnp.zeros(size[::-1] if swap else size, problem.out_dtype)
    if not interpret:
        zeros = plgpu.layout_cast(
            zeros, inline_wgmma.PARTED if shape.parted else plgpu.Layout.WGMMA
        )
    return [zeros] * (rows // shape.piece_rows * (columns // shape.piece))


def pieces(
    problem: MatmulProblem,
    shape: Shape,
    place: Place,
    sums: list[jax.Array],
    vectors: Vectors,
    interpret: bool,
) -> list[jax.Array]:
    """The result of a warpgroup's sums, rounded: `[64, piece]` each, row after row.

    Swapped, `[piece, piece_rows]` each, column after column of the result.
    """
    gated, piece = problem.weights.gated, shape.piece
    finish = _Finish(problem, place, vectors, shape, interpret)
    first, second, second_at = sums[0], sums[-1], 0
    if gated and len(sums) == 1 and not shape.parted:  # up is behind gate
        second_at = first.shape[0 if place.swap else 1] // 2
    if place.swap:
        found, most = [], shape.piece_rows
        for c in range(0, second_at or first.shape[0], piece):
            up = second[second_at + c : second_at + c + piece] if gated else None
            value = finish.swapped(first[c : c + piece], up, c)
            found += [value[:, r : r + most] for r in range(0, value.shape[1], most)]
        return found
    found = []
    for r in range(0, first.shape[0], 64):
        row = place.row + r
        if shape.parted:
            for c in range(0, first.shape[1], 2 * piece):
                found.append(finish.parted(first[r : r + 64, c : c + 2 * piece], row, c))
            continue
        if not gated:
            for i, some in enumerate(sums):  # side by side
                for c in range(0, some.shape[1], piece):
                    value, column = some[r : r + 64, c : c + piece], i * some.shape[1] + c
                    found.append(finish.plain(value, None, row, column))
            continue
        for c in range(0, second_at or first.shape[1], piece):
            up = second[r : r + 64, second_at + c : second_at + c + piece]
            found.append(finish.plain(first[r : r + 64, c : c + piece], up, row, c))
    return found


class _Finish:
    """The end of a warpgroup's sums: bias, activation, row weights, and the cast to the result's dtype."""

    def __init__(
        self,
        problem: MatmulProblem,
        place: Place,
        vectors: Vectors,
        shape: Shape,
        interpret: bool,
    ):
        self.problem, self.place, self.vectors = problem, place, vectors
        self.tests_rows, self.interpret = shape.tests_rows, interpret
        self.pairs = place.pairs  # of the tile's rows: how many hold one, and come first
        if shape.counts_rows:
            limit = jnp.where(place.valid, num_pairs(problem, vectors), 0)
            self.pairs = inline_rows.count_rows(
                vectors.ids, place.row, limit, rows=shape.wn, interpret=interpret
            )
        self.dtype = problem.out_dtype
        # For gated weights that are not interleaved, bias has gate, then up, each in whole tiles.
        bias = vectors.bias
        self.up = bias.shape[1] // 2 if bias is not None and problem.weights.gated else 0

    # -- vectors

    def load(self, ref: Any, layout: Any, axis: int, shape: tuple[int, ...]) -> jax.Array:
        """A vector along `axis` of values of `shape` in `layout`, as values of it."""
        if self.interpret:
            vector = ref[...]
        else:
            other = layout.reduce(1 - axis)
            vector = plgpu.load(ref, layout=other, optimized=False)
        return lax.broadcast_in_dim(vector, shape, (axis,))

    def with_bias(self, x: jax.Array, column: jax.Array, axis: int) -> jax.Array:
        """`x` plus the expert's bias from `column` on, which lies along `axis`; `x` itself without a bias."""
        if self.vectors.bias is None:
            return x
        count = x.shape[axis]
        # A tile without an expert reads some expert's, and does not use it.
        expert = jnp.clip(self.place.expert, 0, self.problem.num_experts - 1)
        ref = self.vectors.bias.at[expert, pl.ds(column, count)]
        return x + self.load(ref, plgpu.Layout.WGMMA, axis, x.shape)

    def scaled(self, x: jax.Array, first: jax.Array, layout: Any, axis: int) -> jax.Array:
        """Times the row weights; zero where a row holds no pair, or the tile has no expert."""
        count, wanted = x.shape[axis], None
        if self.vectors.row_weights is not None:
            ref = self.vectors.row_weights.at[pl.ds(first, count)]
            x = x * self.load(ref, layout, axis, x.shape)
        if self.pairs is not None and axis == 0:
            return inline_wgmma.keep_rows(
                x, self.pairs - (first - self.place.row), interpret=self.interpret
            )
        if self.pairs is not None:
            return inline_wgmma.keep_columns(x, self.pairs, interpret=self.interpret)
        if self.tests_rows:
            ref = self.vectors.ids.at[pl.ds(first, count)]
            ids = self.load(ref, layout, axis, x.shape)
            limit = jnp.where(self.place.valid, num_pairs(self.problem, self.vectors), 0)
            wanted = (ids >= 0) & (ids < limit)
        elif self.vectors.bias is not None or self.problem.row_weights:
            limit = jnp.where(self.place.valid, _I32(1), 0)
            # An array's predicate: Mosaic selects arrays by arrays.
            wanted = lax.broadcast(limit > 0, x.shape)
            if not self.interpret:
                wanted = plgpu.layout_cast(wanted, layout)
        if wanted is None:
            return x
        zeros = jnp.zeros(x.shape, _F32)
        if not self.interpret:
            zeros = plgpu.layout_cast(zeros, layout)
        return lax.select(wanted, x, zeros)

    # -- pieces

    def plain(self, gate: jax.Array, up: jax.Array | None, row: jax.Array, c: int) -> jax.Array:
        """A piece whose rows are those of the result: gate and up from column `c` of the tile on, rows from
        `row` on."""
        column = self.place.column + c
        gate = self.with_bias(gate, column, 1)
        if up is not None:
            up = self.with_bias(up, column + self.up, 1)
        value = activate(self.problem.weights, gate, up)
        return self.scaled(value, row, plgpu.Layout.WGMMA, 0).astype(self.dtype)

    def parted(self, product: jax.Array, row: jax.Array, c: int) -> jax.Array:
        """A piece of interleaved gate and up, from the tile's column `c` of these on, parted."""
        product = self.with_bias(product, 2 * self.place.column + c, 1)
        gate, up = inline_wgmma.part_columns(product, interpret=self.interpret)
        value = activate(self.problem.weights, gate, up)
        return self.scaled(value, row, inline_wgmma.PARTED, 0).astype(self.dtype)

    def swapped(self, gate: jax.Array, up: jax.Array | None, c: int) -> jax.Array:
        """A piece whose columns are the result's rows; rows of gate and up are its columns from `c` on."""
        column = self.place.column + c
        gate = self.with_bias(gate, column, 0)
        if up is not None:
            up = self.with_bias(up, column + self.up, 0)
        value = activate(self.problem.weights, gate, up)
        return self.scaled(value, self.place.row, plgpu.Layout.WGMMA, 1).astype(self.dtype)
