"""The kernel of the grouped matrix multiplication, in Pallas Mosaic GPU.

A persistent CTA has two warpgroups that multiply and one that loads. They share a ring of stages in shared
memory, each with bk columns of a tile of x and of the weights, that runs on from tile to tile: the next tile
is loaded while the last is stored. Whose weights each tile uses is read on the device, and how many tiles
there are, unless all rows are known to be in use (`MatmulProblem.all_rows`).

    form "m":     each warpgroup multiplies half of the tile's rows with all of its columns;
    form "n":     all rows, half of the columns;
    form "swap":  the weights are wgmma's first operand, so that rows of x, its second, may be as few as 8.

A `late` tile stays in registers, rounded, and is stored in pieces between the products of the next one.

Where tiles are fewer than SMs, a cluster of CTAs shares each of them: every CTA has a part of k (`split`),
and the first one adds the parts up, in order (cluster_sum.py).

Reads each tile of x once per n tile, and weights once per tile of rows (from L2 where neighbours share them);
writes the rows of tiles in use. Nothing is atomic: the same bits in every run. Needs sm_90a: wgmma, TMA.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul import epilogue, loads, memory, scaled_products, stores
from moe_align_jax._grouped_matmul.cluster_sum import AXIS
from moe_align_jax._grouped_matmul.compute_loop import ComputeLoop
from moe_align_jax._grouped_matmul.config import Config, refused
from moe_align_jax._grouped_matmul.cta_tiles import CtaTiles
from moe_align_jax._grouped_matmul.heights_loop import HeightsLoop
from moe_align_jax._grouped_matmul.load_loop import LoadLoop
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._grouped_matmul.shape import Shape, shape_of

# Registers of a thread that loads, and of one that multiplies, without cp.async and with it; by how many
# warpgroups multiply.
_REGISTERS = {
    1: {False: (0, 0), True: (0, 0)},  # there are enough for both
    2: {False: (40, 232), True: (56, 224)},
    3: {False: (32, 160), True: (56, 152)},
}


def build(
    problem: MatmulProblem,
    config: Config,
    *,
    interpret: bool = False,
    sized_at_launch: bool = False,
    ending: epilogue.Ending | None = None,
) -> Callable[..., Any]:
    """The kernel as a function of the operands that `launch` gives it, in this order:

    num_tokens_post_padded `[1]` and expert_ids `[B]` (the latter alone with `row_labels`), or count `[1]`
    and expert, start and end of each tile (with `heights` also pairs, empty and behind), or, with
    `Config.finds`, masked_m `[e]` or group_sizes `[G]` and group_offset `[1]`; sorted_token_ids,
    row_weights, bias, scales of x and of each array of weights, those that there are; x; the weights, one
    array or two.
    With an `ending`, for tiles neither late nor shared, its operands come first, and its results are returned
    before the problem's.

    `sized_at_launch`: for a launch outside XLA, of "blocks". The problem's rows and tokens are the most that
    a launch has. What it has of pairs (of rows, where x is not gathered) rides in the place of a first
    operand's pointer, times 256, and descriptors are made of its rows.
    """
    if reason := refused(problem, config):
        raise ValueError(f"tiles {config.name}: {reason}")
    if sized_at_launch and problem.in_order:
        raise ValueError("a launch that says its rows has sorted_token_ids")
    shape = shape_of(problem, config)
    if ending:
        shape = shape._replace(piece=ending.piece)
    if shape.by_copies and config.lag > config.stages - 2:
        raise ValueError(
            f"a ring of {config.stages} stages would wait for itself, {config.lag} steps behind"
        )
    loader = loads.Loader(problem, config, shape, interpret)
    memory_registers, compute_registers = _registers(problem, config, shape)
    clustered = config.split > 1 or config.sharing

    def body(*given):
        refs = memory.Refs(
            *(problem, config, shape, given),
            interpret=interpret,
            sized_at_launch=sized_at_launch,
            ending=ending,
        )
        usual = problem, config, shape, refs, interpret
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        rank = lax.axis_index(AXIS) if clustered else jnp.int32(0)
        tiles = CtaTiles(*usual, cta, rank)
        scaled = scaled_products.ScaledProducts(*usual) if problem.scales else None

        def compute():
            if compute_registers:
                plgpu.set_max_registers(compute_registers, action="increase")
            loop = HeightsLoop if config.heights else ComputeLoop
            loop(*usual, tiles=tiles, warpgroup=warpgroup, scaled=scaled, ending=ending)()

        def load():
            if memory_registers:
                plgpu.set_max_registers(memory_registers, action="decrease")
            LoadLoop(*usual, tiles=tiles, loader=loader, scaled=scaled)()

        lax.cond(warpgroup < config.computing, compute, load)

    options: dict[str, Any] = {"interpret": plgpu.InterpretGPUParams()} if interpret else {}
    launch = plgpu.kernel(
        body,
        out_type=memory.results(problem, config, ending, interpret),
        scratch_types=memory.scratch(
            *(problem, config, shape),
            slots=ending.slots if ending else stores.slots_of(config, shape),
            arrivals=loader.copies + shape.by_copies,
            interpret=interpret,
        ),
        num_threads=config.computing + 1,
        thread_name="warpgroup",
        kernel_name=ending.name
        if ending
        else f"grouped_matmul_{config.form}{'_e4m3' if problem.scales else ''}",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **_grid(config),
        **options,
    )
    if not (interpret and config.split > 1):
        return launch
    return lambda *operands: launch(*operands)[0]


def _registers(problem: MatmulProblem, config: Config, shape: Shape) -> tuple[int, int]:
    """Of a thread that loads, and of one that multiplies; 0: as many as the compiler takes."""
    # Many experts' loads take registers of the loader; small tiles leave enough.
    finds_many = config.finds and config.form == "swap" and not config.cuts
    return _REGISTERS[config.computing][shape.by_copies or finds_many]


def _grid(config: Config) -> dict[str, Any]:
    """CTAs, or clusters of them that share a tile's k, or what they load."""
    each = config.split * max(1, config.sharing)
    found: dict[str, Any] = {"grid": (config.num_ctas // each,), "grid_names": ("cta",)}
    if config.split > 1 or config.sharing:
        found |= {"cluster": (each,), "cluster_names": (AXIS,)}
    return found
