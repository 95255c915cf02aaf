"""The kernel's memory: its operands, results and shared memory, in the order in which Pallas gives them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul import epilogue, found_cut, scaled_products
from moe_align_jax._grouped_matmul.cluster_sum import AXIS
from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._grouped_matmul.shape import Shape, has_scale_rows
from moe_align_jax._lowering.launch_value import launch_value

_I32, _F32 = jnp.int32, jnp.float32


def transforms(columns: int, dtype: Any, rows: int = 8) -> tuple[Any, ...]:
    """Of a tile in shared memory with so many columns, as wgmma and TMA want it."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * size * 8)
    kinds: Any = plgpu
    return kinds.TilingTransform((rows, swizzle // size)), kinds.SwizzleTransform(swizzle)


def views(shape: tuple[int, ...], dtype: Any, interpret: bool) -> Any:
    """Tiles with rows of 128 bytes, in tiles of 8 rows as wgmma and registers want them, and by single rows.

    The bytes are the same. TMA copies from any row on by the second, only from every eighth by the first, and
    from arrays whose rows are a multiple of 8. The interpreter has no use for two views, and no memory for
    them in common.
    """
    tiles = plgpu.SMEM(shape, dtype, transforms=transforms(shape[-1], dtype))
    if interpret:
        return tiles
    return plgpu.RefUnion(
        tiles, plgpu.SMEM(shape, dtype, transforms=transforms(shape[-1], dtype, 1))
    )


class Likes(NamedTuple):
    """The transforms of tiles in shared memory: of x, of the weights, and of pieces of the result."""

    x: tuple[Any, ...]
    weights: tuple[Any, ...]
    out: tuple[Any, ...]


def likes_of(problem: MatmulProblem, config: Config, shape: Shape) -> Likes:
    """How the kernel's tiles lie in shared memory."""
    return Likes(
        transforms(_x_columns(config, shape), problem.dtype),
        transforms(_weights_tile(problem, config, shape)[1], problem.dtype),
        transforms(shape.piece, problem.out_dtype),
    )


def _x_columns(config: Config, shape: Shape) -> int:
    """Of a tile of x in shared memory."""
    return config.bk // shape.k_parts


def _weights_tile(problem: MatmulProblem, config: Config, shape: Shape) -> tuple[int, int]:
    """Rows and columns of a tile of the weights in shared memory."""
    if problem.weights.transposed:
        return config.bn, config.bk
    return config.bk, config.bn // shape.w_parts


def _tells(config: Config) -> bool:
    """Whether the warpgroup that loads tells the others what their tiles are."""
    return bool(config.heights) or config.ahead


class Refs:
    """The kernel's refs by name; None for those that there are not.

    Attributes:
        more: the operands and results of an ending.
        sizes, offset: group_sizes and group_offset, of groups whose tiles find themselves.
        masked_m: of masked tiles that find themselves.
        count: num_tokens_post_padded, or how many tiles are listed.
        experts: of blocks, or of the list's tiles.
        starts, ends: of the list's tiles: the first row, and the row behind the last.
        pairs, padding, behind: of listed tiles of several heights: see `cta_tiles.Tile`.
        ids: sorted_token_ids.
        x_scales, w_scales: of x, and of each array of weights.
        x, weights: the operands; one array of weights or two.
        out: the result.
        x_tiles, x_rows: the stages' tiles of x, for wgmma and for TMA: see `views`.
        w_tiles: the stages' tiles of the weights.
        o_tiles, o_rows: pieces of the result, for registers and for TMA.
        scale_rows: the stages' scales of x.
        w_scale_rows: scales of the weights of two tiles.
        parts: each CTA's sums of a tile whose k several CTAs share, which the first one adds up.
        full, empty: barriers of the stages.
        shared: barriers of the cluster, for that sum.
        told: what the warpgroup that loads tells the others of each tile.
        vectors: ids, row weights and bias, which the epilogue reads.
        stages: how many the ring has.
    """

    def __init__(
        self,
        problem: MatmulProblem,
        config: Config,
        shape: Shape,
        given: Iterable[Any],
        *,
        interpret: bool,
        sized_at_launch: bool,
        ending: epilogue.Ending | None,
    ):
        refs, self.stages = iter(given), config.stages

        def take(wanted: Any = True) -> Any:
            """The launch's next ref; None where there is no such one."""
            return next(refs) if wanted else None

        bound = launch_value(take()) if sized_at_launch else None
        self.more = [take() for _ in range(ending.inputs if ending else 0)]
        by_expert = config.finds and not config.cuts
        by_group = config.cuts and problem.rows == "ragged"
        known = by_expert or by_group
        listed = not shape.parts and not config.finds
        self.sizes, self.offset = take(by_group), take(by_group)
        self.masked_m = take(by_expert)
        self.count = take(not (problem.row_labels or known))
        self.experts = take(not known)
        self.starts, self.ends = take(listed), take(listed)
        cut = config.heights and not config.finds
        self.pairs, self.padding, self.behind = take(cut), take(cut), take(cut)
        self.ids = take(shape.reads_ids)
        row_weights, bias = take(problem.row_weights), take(problem.weights.bias)
        self.vectors = epilogue.Vectors(self.ids, row_weights, bias, bound)
        arrays = range(1 + problem.weights.pair)
        self.x_scales = take(problem.scales)
        self.w_scales = [take() for _ in arrays] if problem.scales else []
        self.x = take()
        self.weights = [take() for _ in arrays]

        self.more += [take() for _ in (ending.outputs if ending else ())]
        self.out = take()
        self.parts = take(config.split > 1 and interpret)

        # As `scratch` has it.
        x_tiles, self.w_tiles, o_tiles = take(), take(), take()
        self.x_tiles, self.x_rows = (x_tiles, x_tiles) if interpret else x_tiles
        self.o_tiles, self.o_rows = (o_tiles, o_tiles) if interpret else o_tiles
        self.scale_rows = take(has_scale_rows(problem))
        self.w_scale_rows = take(config.ahead)
        if not interpret:
            self.parts = take(config.split > 1)
        self.full, self.empty = take(), take()
        self.shared = take(config.split > 1)
        self.told: Any = None
        if _tells(config):
            self.told = found_cut.Told(take(), take(), take())
        assert next(refs, None) is None, "the launch has more than the kernel takes"

    def slot_of(self, step: jax.Array) -> jax.Array:
        """The stage of a step of the ring."""
        return lax.rem(step, _I32(self.stages))


def scratch(
    problem: MatmulProblem,
    config: Config,
    shape: Shape,
    *,
    slots: int,
    arrivals: int,
    interpret: bool,
) -> list[Any]:
    """Shared memory and barriers, in the order in which `Refs` takes them.

    Args:
        problem, config, shape: of the kernel.
        slots: for pieces of the result, per warpgroup.
        arrivals: at the barrier of a stage, before it is full.
        interpret: whether Pallas' interpreter runs it.
    """
    stages, computing, likes = config.stages, config.computing, likes_of(problem, config, shape)
    x_tiles = (stages, shape.k_parts, config.bm, _x_columns(config, shape))
    w_tiles = (stages, shape.w_parts, *_weights_tile(problem, config, shape))
    o_tiles = (computing, slots, shape.piece_rows, shape.piece)
    dtype, out_dtype = jnp.dtype(problem.dtype), jnp.dtype(problem.out_dtype)
    found = [
        views(x_tiles, dtype, interpret),
        plgpu.SMEM(w_tiles, dtype, transforms=likes.weights),
        views(o_tiles, out_dtype, interpret),
    ]
    if has_scale_rows(problem):
        found.append(scaled_products.x_scales_memory(problem, config))
    if config.ahead:
        found.append(scaled_products.w_scales_memory(problem, config, shape))
    if config.split > 1 and not interpret:
        found.append(plgpu.SMEM((computing, _words_of_part(config)), _F32))
    found.append(plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages))
    if config.sharing:
        found.append(
            plgpu.ClusterBarrier(
                collective_axes=(AXIS,), num_arrivals=computing, num_barriers=stages
            )
        )
    else:
        found.append(plgpu.Barrier(num_arrivals=computing, num_barriers=stages))
    if config.split > 1:
        found.append(plgpu.ClusterBarrier(collective_axes=(AXIS,), num_barriers=2 * computing))
    if _tells(config):
        found.append(plgpu.SMEM((found_cut.SLOTS * found_cut.WORDS,), _I32))
        for count in (1, computing):
            found.append(plgpu.Barrier(num_arrivals=count, num_barriers=found_cut.SLOTS))
    return found


def results(
    problem: MatmulProblem, config: Config, ending: epilogue.Ending | None, interpret: bool
) -> Any:
    """The types of what the kernel returns, or its only one: first those of an ending.

    The interpreter's CTAs have no memory in common but global memory: there parts of a sum over them are a
    result, too.
    """
    shape = problem.out_shape
    if problem.rows == "masked":
        shape = (problem.num_experts, problem.max_rows, problem.n)
    out = jax.ShapeDtypeStruct(shape, jnp.dtype(problem.out_dtype))
    if config.split > 1 and interpret:
        clusters = config.num_ctas // (config.split * max(1, config.sharing))
        parts = (clusters, config.split, config.computing, _words_of_part(config))
        return [out, jax.ShapeDtypeStruct(parts, _F32)]
    return (*ending.outputs, out) if ending else out


def _words_of_part(config: Config) -> int:
    """Of a warpgroup's part of a tile whose k several CTAs share."""
    return config.bn // config.computing * config.bm
