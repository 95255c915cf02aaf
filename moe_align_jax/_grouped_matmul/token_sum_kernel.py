"""The kernel of a product whose rows are pairs, and of the weighted sum of each token's rows.

A tile is 64 columns of one token's result. Its loop over k runs through the token's pairs, one after the
other: through the weights of each one's expert, and its row of x. Behind each pair, what its products made is
multiplied by its weight and added to the tile's sums, in registers; no row of the products is written to
memory. One warpgroup loads, and one multiplies: the weights are wgmma's first operand, and the pair's row is
the first of the eight columns of its second; what the others hold is computed, and not stored.

Where tiles are fewer than SMs, a cluster of CTAs shares each of them (`Config.split`): every CTA has as many
of the pairs, or a part of one pair's k, and the first one adds up what all have, in order (cluster_sum.py).

Reads the weights of the experts hit once for each pair, and x once for each tile of columns. Nothing is
atomic: the same bits in every run. Needs sm_90a: wgmma, TMA.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

from moe_align_jax._grouped_matmul import inline, kernel, launch, loads
from moe_align_jax._grouped_matmul.cluster_sum import AXIS, ClusterSum
from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.problem import TokenSum
from moe_align_jax._grouped_matmul.shape import Shape, shape_of
from moe_align_jax._grouped_matmul.token_sum_config import config_for, refused

_I32, _F32 = jnp.int32, jnp.float32
_ROWS = 8  # of x in a tile: wgmma's least; one of them is a pair's
_COLUMNS = 64  # of a tile: wgmma's rows


class _Refs(NamedTuple):
    """The kernel's refs by name.

    Attributes:
        experts: `[T K]` int32, of each pair.
        shares: `[T K]` float32, the pairs' weights.
        bias: `[E, .]` float32, with whole tiles of columns, or None.
        x, weights: the product's operands; a list of one array of weights, as `loads` has them.
        out: the result.
        x_tiles, x_rows: the ring's rows of x for wgmma and for TMA: the same memory.
        w_tiles: the ring's weights.
        parts: what a CTA of a cluster puts, or None.
        full, empty: barriers of the ring.
        shared: barriers of the cluster, or None.
    """

    experts: Any
    shares: Any
    bias: Any
    x: Any
    weights: Any
    out: Any
    x_tiles: Any
    x_rows: Any
    w_tiles: Any
    parts: Any
    full: Any
    empty: Any
    shared: Any


def _refs(problem: TokenSum, given: list[Any], split: int, interpret: bool) -> _Refs:
    """The kernel's refs, which come in the order of operands, results and scratch memory."""
    experts, shares = given.pop(0), given.pop(0)
    bias = given.pop(0) if problem.product.weights.bias else None
    x, w, out = given.pop(0), given.pop(0), given.pop(0)
    parts = given.pop(0) if split > 1 and interpret else None
    tiles = given.pop(0)
    x_tiles, x_rows = (tiles, tiles) if interpret else tiles
    w_tiles, full, empty = given.pop(0), given.pop(0), given.pop(0)
    shared = given.pop(0) if split > 1 else None
    if split > 1 and not interpret:
        parts = given.pop(0)
    return _Refs(
        *(experts, shares, bias, x, [w], out, x_tiles, x_rows, w_tiles, parts, full, empty, shared)
    )


class _Part(NamedTuple):
    """What one CTA of a cluster has of a tile.

    Attributes:
        pairs: how many of the token's pairs.
        steps: of each of these pairs' k.
        pieces: CTAs that share one pair's k.
    """

    pairs: int
    steps: int
    pieces: int


def _part(problem: TokenSum, shape: Shape, split: int) -> _Part:
    """Of a cluster of `split` CTAs."""
    pieces = max(1, split // problem.top_k)
    return _Part(max(1, problem.top_k // split), shape.k_steps // pieces, pieces)


def build(
    problem: TokenSum, config: Config, *, interpret: bool = False
) -> Callable[..., jax.Array]:
    """The kernel as a function of expert_ids `[T K]`, topk_weights `[T K]`, bias if there is one, x and w."""
    if reason := refused(problem, config):
        raise ValueError(f"tiles {config.name}: {reason}")
    product, split, stages = problem.product, config.split, config.stages
    # `split` shares pairs among CTAs here, and not the steps of one product.
    shape = shape_of(product, config._replace(split=1))
    part, tiles = _part(problem, shape, split), problem.num_tokens * shape.n_tiles
    clusters = min(config.num_ctas // split, tiles)
    dtype, width = jnp.dtype(product.dtype), config.bk // shape.k_parts
    transposed = product.weights.transposed
    w_tile = (_COLUMNS, config.bk) if transposed else (config.bk, _COLUMNS)
    w_like = kernel.transforms(w_tile[1], dtype)
    loader = loads.Loader(
        *(product, config, shape, kernel.transforms(width, dtype), w_like, interpret)
    )

    def body(*given):
        refs = _refs(problem, list(given), split, interpret)
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        rank = lax.axis_index(AXIS) if split > 1 else _I32(0)
        mine = lax.div(tiles - cta + (clusters - 1), _I32(clusters))
        first_step = lax.rem(rank, _I32(part.pieces)) * part.steps

        def place(i):
            """(Token, n tile, this CTA's first pair) of its i-th tile."""
            t = cta + i * clusters
            token = lax.div(t, _I32(shape.n_tiles))
            first = token * problem.top_k + lax.div(rank * problem.top_k, _I32(split))
            return token, t - token * shape.n_tiles, first

        def at_most(pair):
            """The pair, or the last one: what is read ahead may lie behind it."""
            return jnp.minimum(pair, _I32(problem.num_tokens * problem.top_k - 1))

        def there(expert):
            return (expert >= 0) & (expert < product.num_experts)

        def slot_of(step):
            return lax.rem(step, _I32(stages))

        def of_pair(ring):
            """The products of a pair whose expert there is, complete."""

            def scope(acc):
                def step(k, _):
                    slot = slot_of(ring + k)
                    plgpu.barrier_wait(refs.full.at[slot])
                    for each in range(shape.k_parts):
                        plgpu.wgmma(acc, *_operands(refs, slot, each, transposed))
                    # All but this step's are done, so that their stage can be loaded again.
                    plgpu.wgmma_wait(shape.k_parts)

                    @pl.when(k > 0)
                    def _():
                        plgpu.barrier_arrive(refs.empty.at[slot_of(ring + k + stages - 1)])

                    return ()

                lax.fori_loop(0, part.steps, step, ())
                plgpu.wgmma_wait(0)
                last = ring + (part.steps + stages - 1)
                plgpu.barrier_arrive(refs.empty.at[slot_of(last)])
                return acc[...]

            return pl.run_scoped(scope, kernel.accumulator((_COLUMNS, _ROWS), _F32))

        def with_bias(value, expert, n):
            """The expert's bias lies along the columns of the result."""
            if refs.bias is None:
                return value
            ref = refs.bias.at[expert, pl.ds(n * _COLUMNS, _COLUMNS)]
            if interpret:
                bias = ref[...]
            else:
                layout = plgpu.Layout.WGMMA.reduce(1)
                bias = plgpu.load(ref, layout=layout, optimized=False)
            return value + lax.broadcast_in_dim(bias, value.shape, (0,))

        def compute():
            for stage in range(stages):
                plgpu.barrier_arrive(refs.empty.at[stage])

            def one(i, ring):
                token, n, first = place(i)

                def pair(j, carry):
                    ring, total, expert, share = carry
                    ahead = at_most(first + j + 1)
                    following = refs.experts[ahead], refs.shares[ahead]

                    def added():
                        return total + share * with_bias(of_pair(ring), expert, n)

                    total = lax.cond(there(expert), added, lambda: total)
                    steps = jnp.where(there(expert), _I32(part.steps), 0)
                    return ring + steps, total, *following

                zeros = jnp.zeros((_COLUMNS, _ROWS), _F32)
                if not interpret:
                    zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
                begin = ring, zeros, refs.experts[first], refs.shares[first]
                ring, total = lax.fori_loop(0, part.pairs, pair, begin)[:2]
                if split == 1:
                    _store(problem, refs.out, total, token, n, interpret)
                    return ring
                parts = refs.parts.at[(cta, slice(None), 0) if interpret else (0,)]
                ready, free = refs.shared.at[0], refs.shared.at[1]
                cluster = ClusterSum(split, parts, ready, free, interpret)
                cluster.put([total])

                @pl.when(rank == 0)
                def _():
                    [sums] = cluster.take([total.shape])
                    cluster.taken()
                    _store(problem, refs.out, sums, token, n, interpret)

                pl.when(rank != 0)(cluster.taken)
                cluster.wait()
                return ring

            lax.fori_loop(0, mine, one, _I32(0))

        def load():
            def one(i, ring):
                _, n, first = place(i)

                def pair(j, carry):
                    ring, expert = carry
                    row = first + j
                    following = refs.experts[at_most(row + 1)]
                    tile = kernel.Tile(there(expert), expert, row, row + 1, n, row + 1)

                    def step(k, _):
                        slot, at = slot_of(ring + k), first_step + k
                        barrier = refs.full.at[slot]
                        plgpu.barrier_wait(refs.empty.at[slot])
                        loader.load_weights(refs, tile, slot, at, barrier)
                        for each in range(shape.k_parts):
                            loader.load_row(
                                refs, row, slot, at * shape.k_parts + each, each, barrier
                            )
                        return ()

                    steps = jnp.where(tile.valid, _I32(part.steps), 0)
                    lax.fori_loop(0, steps, step, ())
                    return ring + steps, following

                begin = ring, refs.experts[first]
                return lax.fori_loop(0, part.pairs, pair, begin)[0]

            end = lax.fori_loop(0, mine, one, _I32(0))
            # No barrier is left in the midst of a phase.
            for stage in range(stages):
                plgpu.barrier_wait(refs.empty.at[slot_of(end + stage)])

        lax.cond(warpgroup < 1, compute, load)

    options: dict[str, Any] = {"interpret": plgpu.InterpretGPUParams()} if interpret else {}
    out_type: Any = jax.ShapeDtypeStruct(problem.out_shape, jnp.dtype(problem.out_dtype))
    scratch = [
        kernel.views((stages, shape.k_parts, _ROWS, width), dtype, interpret),
        plgpu.SMEM((stages, 1, *w_tile), dtype, transforms=w_like),
        plgpu.Barrier(num_arrivals=shape.k_parts + 1, num_barriers=stages),
        plgpu.Barrier(num_arrivals=1, num_barriers=stages),
    ]
    if split > 1:
        options |= {"cluster": (split,), "cluster_names": (AXIS,)}
        scratch.append(plgpu.ClusterBarrier(collective_axes=(AXIS,), num_barriers=2))
        words = _COLUMNS * _ROWS
        if interpret:  # its CTAs have no memory in common but global memory
            in_memory = jax.ShapeDtypeStruct((clusters, split, 1, words), _F32)
            out_type = [out_type, in_memory]
        else:
            scratch.append(plgpu.SMEM((1, words), _F32))
    call = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(clusters,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="grouped_matmul_token_sum",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **options,
    )
    if not (interpret and split > 1):
        return call
    return lambda *operands: call(*operands)[0]


def _operands(refs: _Refs, slot: jax.Array, each: int, transposed: bool) -> tuple[Any, Any]:
    """wgmma's two, for 64 columns of x."""
    x, ks = refs.x_tiles.at[slot, each], pl.ds(64 * each, 64)
    if transposed:
        return refs.w_tiles.at[slot, 0, :, ks], x.transpose((1, 0))
    return refs.w_tiles.at[slot, 0, ks].transpose((1, 0)), x.transpose((1, 0))


def _store(
    problem: TokenSum,
    out_ref: Any,
    sums: jax.Array,
    token: jax.Array,
    n: jax.Array,
    interpret: bool,
) -> None:
    """The first column of `[64, 8]` sums, rounded, to the token's row, from column 64 n on.

    Threads store single values: a tile has 64 of them. Columns that the result does not have are left out.
    """
    columns, rounded = problem.product.n, sums.astype(problem.out_dtype)
    if interpret:
        for c in range(0, _COLUMNS, _ROWS):  # there are multiples of 8 columns
            at = n * _COLUMNS + c

            @pl.when(at < columns)
            def _(c=c, at=at):
                out_ref[token, pl.ds(at, _ROWS)] = rounded[c : c + _ROWS, 0]

        return
    scalar = plgpu.Layout.WG_SPLAT(())

    @inline.emits(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, scalar, scalar))
    def emit(_, out, values, row, tile):
        thread, index = inline.thread_index(), ir.IndexType.get()
        # A warp has 16 rows of the sums, of which lanes 0, 4, 8, ... have the first column.
        warp, lane = arith.divui(thread, inline.int32(32)), arith.remui(thread, inline.int32(32))
        within = arith.addi(arith.muli(warp, inline.int32(16)), arith.divui(lane, inline.int32(4)))
        first = arith.muli(inline.scalar_of(tile), inline.int32(_COLUMNS))
        first = arith.addi(first, within)
        owns = arith.cmpi(
            arith.CmpIPredicate.eq, arith.remui(lane, inline.int32(4)), inline.int32(0)
        )
        to_row = arith.index_cast(index, inline.scalar_of(row))
        for i, register in enumerate(values.registers.flat):
            at = arith.addi(first, inline.int32(8 * i))
            mine = arith.andi(owns, inline.less(at, inline.int32(columns)))
            with mgpu_utils.when(mine):
                value = vector.extract(register, [], [0])
                memref.store(value, out, [to_row, arith.index_cast(index, at)])

    emit(out_ref, rounded, token, n)


def run(
    problem: TokenSum,
    *operands: jax.Array,
    interpret: bool = False,
    config: Config | None = None,
) -> jax.Array:
    """`[T, n]` of `problem.inputs`, by the kernel; `config`: tiles, None for the usual ones."""
    named = dict(zip(problem.inputs, operands, strict=True))
    if config is None:
        config = config_for(problem)
        assert config
        if interpret:  # which runs a thread for each warpgroup of a cluster
            config = config._replace(split=1, num_ctas=2)
    pairs = problem.num_tokens * problem.top_k
    given = [named["expert_ids"], named["topk_weights"].reshape(pairs)]
    with jax.enable_x64(False):  # its indices are int32; plgpu makes 64-bit ones otherwise
        if problem.product.weights.bias:
            shape = shape_of(problem.product, config._replace(split=1))
            given.append(launch.bias(problem.product, shape, named["bias"]))
        return build(problem, config, interpret=interpret)(*given, named["x"], named["w"])
