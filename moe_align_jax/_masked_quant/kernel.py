"""The kernel of silu_and_mul_masked_quant, in Pallas Mosaic GPU.

Work is cut into tiles, each so many groups of one valid row, which a CTA of one warpgroup does one by one.
CTAs take equal shares of the tiles of all experts, in order of (expert, row, tile): few experts with many
rows keep as many CTAs busy as many with few do.

Reads 4 N bytes and writes N + 4 N / 128 per valid row, each once. No other row is read or written, nothing is
atomic, and the result does not depend on the shares. Needs sm_90: e4m3 conversions, bfloat16 products.

e experts, M rows, N = 128 G values of a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._core.fp8 import GROUP, GROUPS_PER_WORD
from moe_align_jax._masked_quant.config import Config
from moe_align_jax._masked_quant.problem import MaskedQuantProblem, bits_over_448
from moe_align_jax._masked_quant.quotient import nearest_quotient, nearest_reciprocal
from moe_align_jax._masked_quant.share import Share, Work

_I32, _F32 = jnp.int32, jnp.float32
_MANTISSA_BITS = 23
# 448 = 1.75 * 2**8.
_E4M3_EXPONENT, _E4M3_MANTISSA = 8, 0x600000
_BIAS = 127


def _layout(tile: int) -> Any:
    """The layout of values `[tile, 128]` over 4 warps: a group within one warp if the tile allows it."""
    if tile % 8 == 0:  # 2 groups to a warp, 16 lanes of 8 values: 16-byte loads
        tiling = plgpu.Tiling(((8, GROUP), (2, GROUP), (8,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
    if tile % 4 == 0:  # a group to a warp, 32 lanes of 4 values
        tiling = plgpu.Tiling(((4, GROUP), (4,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    # A group to all four warps.
    tiling = plgpu.Tiling(((1, GROUP), (GROUP // 4,), (1,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def build(
    problem: MaskedQuantProblem, config: Config, *, interpret: bool = False
) -> Callable[[jax.Array, jax.Array], list[jax.Array]]:
    """`(x [e, M, 2, G, 128], masked_m [e] int32) -> [q [e, M, G, 128], scales]`; without an activation
    x is `[e, M, 1, G, 128]`."""
    experts, rows, groups = problem.num_experts, problem.max_rows, problem.num_groups
    tile, down = config.tile, config.down
    if down and (problem.activates or problem.packed or tile > rows):
        raise ValueError(f"{problem} has no tiles of {tile} rows")
    per_row, rows_per_tile = (groups, tile) if down else (-(-groups // tile), 1)
    work = Work(experts, rows, per_row, config.num_ctas, rows_per_tile)

    def body(*refs):
        _Loop(problem, config, work, _Refs(*refs), interpret)()

    q = jax.ShapeDtypeStruct((experts, rows, groups, GROUP), jnp.float8_e4m3fn)
    scales = jax.ShapeDtypeStruct(problem.scales_shape, _I32 if problem.packed else _F32)
    options: dict[str, Any] = {"interpret": plgpu.InterpretGPUParams()} if interpret else {}
    return plgpu.kernel(
        body,
        out_type=[q, scales],
        scratch_types=[plgpu.SMEM((tile,), _I32)] if problem.packed else [],
        grid=(config.num_ctas,),
        grid_names=("cta",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name=problem.kernel_name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # What is read from global memory is never written: only shared memory needs barriers, for the
            # words of packed scales and a maximum over several warps.
            unsafe_no_auto_barriers=tile % 4 == 0 and not problem.packed,
        ),
        **options,
    )


class _Refs(NamedTuple):
    """The kernel's operands and results, in order, and words of packed scales in shared memory."""

    x: Any
    masked_m: Any
    q: Any
    scales: Any
    words: Any = None


class _Loop:
    """The loop of a CTA over its share of the tiles.

    A tile is known by its expert and by its number `at` among those of the expert, of which there are `end`.
    """

    def __init__(
        self,
        problem: MaskedQuantProblem,
        config: Config,
        work: Work,
        refs: _Refs,
        interpret: bool,
    ):
        self.problem, self.config, self.work = problem, config, work
        self.refs, self.interpret = refs, interpret
        self.memory = _Memory(config.tile, interpret)

    def __call__(self) -> None:
        """All tiles of the share."""
        if self.config.pdl:
            plgpu.griddepcontrol_wait()
        find = _find_plainly if self.interpret else _find
        expert, at, count, end = find(self.problem, self.work, self.refs.masked_m)
        if not self.config.prefetch:
            lax.fori_loop(0, count, self._one, (expert, at, end))
            return

        @pl.when(count > 0)
        def _():
            first = (expert, at, end, *self._load(expert, at))
            expert_, at_, _, *values = lax.fori_loop(0, count - 1, self._ahead, first)
            self._finish(expert_, at_, *values)

    def _one(self, _: jax.Array, carry: Any) -> Any:
        """The next tile."""
        expert, at, end = self._settle(*carry)
        self._finish(expert, at, *self._load(expert, at))
        return expert, at + 1, end

    def _ahead(self, _: jax.Array, carry: Any) -> Any:
        """A tile whose values are there; those of the next one are loaded first."""
        expert, at, end, *values = carry
        following = self._settle(expert, at + 1, end)
        loaded = self._load(*following[:2])
        self._finish(expert, at, *values)
        return (*following, *loaded)

    def _settle(self, expert: jax.Array, at: jax.Array, end: jax.Array) -> Any:
        """Skips experts whose tiles are used up; callers ensure that a tile remains."""

        def next_expert(state):
            expert = state[0] + 1
            return expert, _I32(0), _tiles_of(self.work, self.refs.masked_m[expert])

        return lax.while_loop(lambda s: s[1] >= s[2], next_expert, (expert, at, end))

    def _place(self, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Row, and the tile's first group. A row's last tile overlaps the one before where tiles do not
        divide it, as do the last rows of tiles of several: both write the same bits."""
        tile, groups = self.config.tile, self.problem.num_groups
        row, part = lax.div(at, self.work.tiles_per_row), lax.rem(at, self.work.tiles_per_row)
        if self.config.down:
            return jnp.minimum(row * tile, self.problem.max_rows - tile), part
        return row, jnp.minimum(part * tile, groups - tile) if groups % tile else part * tile

    def _cut(self, row: jax.Array, first: jax.Array) -> tuple[Any, Any]:
        """The tile's rows and groups: several of one, and one of the other."""
        tile = self.config.tile
        return (pl.ds(row, tile), first) if self.config.down else (row, pl.ds(first, tile))

    def _load(self, expert: jax.Array, at: jax.Array) -> list[jax.Array]:
        """A tile's values: gate and up, or without an activation one of them."""
        row, first = self._place(at)
        halves, (at_row, at_group) = range(1 + self.problem.activates), self._cut(row, first)
        return [self.memory.load(self.refs.x.at[expert, at_row, k, at_group]) for k in halves]

    def _finish(self, expert: jax.Array, at: jax.Array, *values: jax.Array) -> None:
        """Quantises a tile, and stores its codes and scales."""
        problem, refs, memory = self.problem, self.refs, self.memory
        row, first = self._place(at)
        at_row, at_group = self._cut(row, first)
        if problem.activates:
            gate, up = values
            value = _activation(problem, gate, up, self.interpret)
        else:
            value = values[0].astype(_F32)
        q, scale = _quantise(problem, value, self.interpret)
        memory.store(refs.q.at[expert, at_row, at_group], q)
        if problem.packed:
            _store_words(memory, refs.scales, refs.words, scale, expert, row, first)
        elif problem.scale_layout == "row_major":
            memory.store(refs.scales.at[expert, at_row, at_group], scale)
        else:
            memory.store(refs.scales.at[expert, at_group, at_row], scale)


class _Memory:
    """Loads and stores, in the layout of tiles; the interpreter knows no layouts."""

    def __init__(self, tile: int, interpret: bool):
        self._layout = None if interpret else _layout(tile)

    def load(self, ref: Any) -> jax.Array:
        """The values of a ref, in this layout."""
        if self._layout is None:
            return ref[...]
        return plgpu.load(ref, layout=self._layout, optimized=False)

    def store(self, ref: Any, value: jax.Array) -> None:
        """Stores values of this layout to a ref."""
        if self._layout is not None and hasattr(plgpu, "store"):
            # jax 0.12 has this one, and refuses the plain one for runs of few bytes.
            plgpu.store(ref, value, optimized=False)
        else:
            ref[...] = value


def _store_words(memory: _Memory, s_ref, shared, scale, expert, row, first) -> None:
    """Four exponents to a word; those of a word lie in several warps."""
    memory.store(shared, lax.bitcast_convert_type(scale, _I32) >> _MANTISSA_BITS)
    for word in range(shared.shape[0] // GROUPS_PER_WORD):
        exponents = [shared[word * GROUPS_PER_WORD + k] for k in range(GROUPS_PER_WORD)]
        value = exponents[0]
        for k, exponent in enumerate(exponents[1:], 1):
            value = value | (exponent << (8 * k))
        s_ref[expert, lax.div(first, GROUPS_PER_WORD) + word, row] = value


# -- shares ----------------------------------------------------------------------------------------


def _tiles_of(work: Work, valid: jax.Array) -> jax.Array:
    """Tiles of so many rows."""
    valid = jnp.clip(valid, 0, work.rows)
    if work.rows_per_tile > 1:
        valid = lax.div(valid + (work.rows_per_tile - 1), _I32(work.rows_per_tile))
    return valid * work.tiles_per_row


def _find(problem: MaskedQuantProblem, work: Work, masked_m_ref) -> list[jax.Array]:
    """The share of this CTA: the values of `Share`, found from the experts' sizes."""
    from moe_align_jax._simt import mosaic

    return mosaic.inline_scalars(
        work.kernel(problem.name), work.find, len(Share._fields), masked_m=masked_m_ref
    )


def _find_plainly(problem: MaskedQuantProblem, work: Work, masked_m_ref) -> list[jax.Array]:
    """The same share by a loop, for Pallas' interpreter, which cannot run `_simt` code."""
    del problem
    cta = lax.axis_index("cta")

    def tiles_of(expert):
        return _tiles_of(work, masked_m_ref[expert])

    total = lax.fori_loop(0, work.experts, lambda i, n: n + tiles_of(i), _I32(0))
    each, more = lax.div(total, work.num_ctas), lax.rem(total, work.num_ctas)
    begin = cta * each + jnp.minimum(cta, more)

    def find(i, state):
        before, expert, start, tiles = state
        end = before + tiles_of(i)
        here = (before <= begin) & (begin < end)
        chosen = jnp.where(here, i, expert), jnp.where(here, before, start)
        return end, *chosen, jnp.where(here, end - before, tiles)

    zero = _I32(0)
    _, expert, start, tiles = lax.fori_loop(0, work.experts, find, (zero, zero, zero, zero))
    return [expert, begin - start, each + (cta < more).astype(_I32), tiles]


# -- arithmetic --------------------------------------------------------------------------------------


def _activation(
    problem: MaskedQuantProblem, gate: jax.Array, up: jax.Array, interpret: bool
) -> jax.Array:
    """float32 values to quantise. `1 / x` is one instruction on a GPU, good to the last bit but one."""
    dtype, limit = gate.dtype, problem.swiglu_limit
    gate = gate.astype(_F32)
    if problem.swiglu_alpha is not None:
        up = up.astype(_F32)
        if limit is not None:
            gate, up = jnp.minimum(gate, _F32(limit)), _clip(up, _F32(limit))
        inner = gate * _F32(problem.swiglu_alpha)
        return gate * (1.0 / (1.0 + jnp.exp(-inner))) * (up + 1.0)
    if limit is not None:
        # Rounded on the host, to what x could hold.
        bound = _F32(float(jnp.dtype(dtype).type(limit)))
        gate, up = jnp.minimum(gate, bound), _clip(up.astype(_F32), bound).astype(dtype)
    silu = gate * (1.0 / (1.0 + jnp.exp(-gate)))
    # XLA, which runs the interpreter, may drop a rounding between two operations.
    keep = lax.optimization_barrier if interpret else lambda x: x
    return keep(keep(silu.astype(dtype)) * up).astype(_F32)


def _clip(x: jax.Array, bound: Any) -> jax.Array:
    """`x` within `-bound` and `bound`."""
    return jnp.maximum(jnp.minimum(x, bound), -bound)


def _quantise(
    problem: MaskedQuantProblem, value: jax.Array, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """e4m3 codes `[tile, 128]` and float32 scales `[tile]` of finite values.

    Nothing is clipped: a quotient is over 448 by an error of rounding at most, and 464 would still give 448.
    """
    amax = jnp.maximum(jnp.max(jnp.abs(value), axis=1), _F32(problem.amax_floor))
    bits = lax.bitcast_convert_type(amax, _I32)
    if problem.scale_format == "float32":
        bits = bits_over_448(bits, lambda a, b: lax.div(a, lax.broadcast(_I32(b), a.shape)))
        scale = lax.bitcast_convert_type(bits, _F32)
        inverse = 1.0 / scale
        if not problem.activates:
            inverse = nearest_reciprocal(bits, inverse)
    else:  # both exactly, by their exponents
        above = (bits & ((1 << _MANTISSA_BITS) - 1)) > _E4M3_MANTISSA
        exponent = (bits >> _MANTISSA_BITS) - _E4M3_EXPONENT + above.astype(_I32)
        scale, inverse = (
            lax.bitcast_convert_type(e << _MANTISSA_BITS, _F32)
            for e in (exponent, 2 * _BIAS - exponent)
        )
    scales, inverses = (lax.broadcast_in_dim(a, value.shape, (0,)) for a in (scale, inverse))
    if not problem.divide or problem.scale_format != "float32":
        scaled = value * inverses
    elif problem.activates:
        scaled = value / scales
    else:
        layout = None if interpret else _layout(value.shape[0])
        scaled = nearest_quotient(value, scales, inverses, layout)
    return scaled.astype(jnp.float8_e4m3fn), scale
