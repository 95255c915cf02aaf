"""The kernel of the weights' gradient, in Pallas Mosaic GPU: for each expert lhs^T rhs over its rows.

A persistent CTA has two warpgroups that multiply and one that loads, as the kernel of the product has. A tile
is bm columns of lhs by bn of rhs, and a stage of the ring has bk rows of both: wgmma reads lhs as its first
operand with the columns as rows, so that nothing is transposed in memory. Experts have any number of rows;
those with the most come first, and the CTAs take tiles in turn, forth and back, so that all have about as
many rows. Where a hot expert's tiles make some CTAs late, the others take more tiles
(`weight_gradient_cta_tiles.deal`). An expert without rows gets zeros.

The kernel reads an expert's rows from the first to the last. Where they may not follow each other (a caller's
alignment, an expert map that gives two experts one local id) that is tested on the device, and the loop of
`reference` runs instead.

    rows by TMA       where every expert's first row is a multiple of 8: what stands behind an expert's last
                      row is overwritten with zeros in shared memory, since it may be NaN (0 * NaN)
    rows by cp.async  of a gathered operand, and of groups that begin anywhere: zeros behind the last row

Of an expert's last rows, which do not fill a stage, only as many as fill 16 are multiplied, and made zero
where they are none of its own (`Tiles.short`).

A `late` tile stays in registers, rounded, and is stored in bands of columns between the products of the next
one. Where a matrix has fewer tiles than the GPU has multiprocessors, an expert with most of the rows would
leave some without work: its rows are cut into pieces. A first launch sums each piece, into float32, and the
second adds an expert's pieces up in their order, in place of multiplying. Nothing is atomic: each sum is made
by one warpgroup, in the order of the rows. Needs sm_90a: wgmma, TMA.

Its parts are in `weight_gradient_*.py`: tiles (sizes, and which problem gets which), experts (whose rows are
where), plan (what follows from the sizes, and memory), cta_tiles (which tiles a CTA has), and the two loops,
load and compute.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_align_jax._grouped_matmul import inline_wgmma, reference
from moe_align_jax._grouped_matmul.config import UNIT, unsupported
from moe_align_jax._grouped_matmul.problem import WeightGradient
from moe_align_jax._grouped_matmul.weight_gradient_compute import ComputeLoop
from moe_align_jax._grouped_matmul.weight_gradient_cta_tiles import CtaTiles
from moe_align_jax._grouped_matmul.weight_gradient_experts import Experts, cut, located
from moe_align_jax._grouped_matmul.weight_gradient_load import LoadLoop
from moe_align_jax._grouped_matmul.weight_gradient_plan import COMPUTING, Refs, plan_of, scratch
from moe_align_jax._grouped_matmul.weight_gradient_tiles import Tiles, gathers_first, tiles_for
from moe_align_jax._lowering.sharding import vary_together

# Registers of a thread that loads, and of one that multiplies, without cp.async and with it.
_REGISTERS = {False: (40, 232), True: (56, 224)}


def cannot(problem: WeightGradient) -> str | None:
    """Why the kernel does not take this problem, or None."""
    layout = problem.layout
    if reason := unsupported(layout):
        return reason
    if layout.rows == "blocks" and layout.block_size == 1:
        return "the kernel needs an expert's rows beside each other; blocks of one row may lie anywhere"
    if max(layout.num_rows, layout.num_tokens) * (layout.n // UNIT) > 2**31 - 1:
        return "the kernel counts units of 16 bytes of rhs in int32; these are too many"
    return None


def run(
    problem: WeightGradient,
    *operands: jax.Array,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> jax.Array:
    """`[E, k, n]` of `problem.inputs`, by the kernel.

    problem: one that `cannot` has nothing against.
    """
    if tiles is None and gathers_first(problem):
        problem, operands = gathered(problem, *operands)
    tiles = tiles or tiles_for(problem)
    if interpret:  # it runs a thread for each warpgroup of each CTA
        tiles = tiles._replace(num_ctas=2)

    def by_kernel(experts: Experts, operands: tuple[jax.Array, ...]) -> jax.Array:
        given = functools.partial(arguments, problem, tiles, interpret=interpret)
        with jax.enable_x64(False):  # its indices are int32; plgpu makes 64-bit ones otherwise
            if not tiles.pieces:
                return build(problem, tiles, interpret=interpret)(*given(experts, *operands))
            experts, pieces = cut(experts, tiles.pieces, tiles.bk)
            sums = build_pieces(problem, tiles, interpret=interpret)(
                *given(pieces.experts, *operands, more=(pieces.used,))
            )
            more = (pieces.begin, pieces.end)
            given_all = given(experts, *operands, more=more, sums=sums)
            return build(problem, tiles, interpret=interpret)(*given_all)

    def by_loop(experts: Experts, operands: tuple[jax.Array, ...]) -> jax.Array:
        del experts
        return reference.weight_gradient(problem, *operands)

    experts, consecutive = located(problem, *operands[2:])
    if consecutive is None or problem.layout.consecutive:
        return by_kernel(experts, operands)

    def typed(way: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """Under shard_map with check_vma a kernel's result varies over no axis, and the loop's does."""
        return lambda *given: vary_together([way(*given), *operands])[0]

    return lax.cond(consecutive, typed(by_kernel), typed(by_loop), experts, operands)


def gathered(
    problem: WeightGradient, lhs: jax.Array, rhs: jax.Array, *where: jax.Array
) -> tuple[WeightGradient, tuple[jax.Array, ...]]:
    """The same sums of rows in aligned order, gathered by XLA. The kernel leaves out the rows of no pair: the
    other operand's may hold NaN there."""
    layout = problem.layout
    pairs = layout.num_tokens * layout.top_k
    tokens = lhs if problem.gathered == "lhs" else rhs
    sizes = {"num_tokens": layout.num_tokens, "top_k": layout.top_k}
    rows = reference.rows_of_pairs(tokens, where[0], **sizes)
    operands = (rows, rhs) if problem.gathered == "lhs" else (lhs, rows)
    layout = layout._replace(num_tokens=0, top_k=0, num_pairs=pairs)
    return WeightGradient(layout), (*operands, *where)


def arguments(
    problem: WeightGradient,
    tiles: Tiles,
    experts: Experts,
    *operands: jax.Array,
    interpret: bool,
    more: tuple[jax.Array, ...] = (),
    sums: jax.Array | None = None,
) -> list[jax.Array]:
    """The kernel's operands, of the problem's.

    more: with pieces, how many are used for the first launch, and which are whose for the second.
    sums: the pieces' sums, for the second.
    """
    lhs, rhs, *where = operands
    found = [*experts, *more]
    if problem.gathered:
        # A stage may reach past the last row: the ids that it reads there are not used.
        found.append(jnp.pad(where[0], (0, tiles.bk), constant_values=-1))
    if interpret:  # its loads by index know no bounds
        lhs, rhs = (
            jnp.pad(x, ((0, tiles.bk), (0, -x.shape[1] % wide)))
            for x, wide in ((lhs, tiles.bm), (rhs, tiles.bn))
        )
    return [*found, lhs, rhs, *(() if sums is None else (sums,))]


def build_pieces(
    problem: WeightGradient, tiles: Tiles, *, interpret: bool = False
) -> Callable[..., jax.Array]:
    """The launch that sums the pieces: float32 `[pieces, k, n]`, with k and n those of whole tiles."""
    layout = problem.layout._replace(num_experts=tiles.pieces, out_dtype="float32")
    tiles = tiles._replace(late=False, pieces=0, level=False)
    of_pieces = problem._replace(layout=layout)
    return build(of_pieces, tiles, of_pieces=True, interpret=interpret)


def build(
    problem: WeightGradient, tiles: Tiles, *, of_pieces: bool = False, interpret: bool = False
) -> Callable[..., jax.Array]:
    """The kernel as a function of what `arguments` gives."""
    if tiles.lag > tiles.stages - 2:
        raise ValueError(f"the loads would wait for products that wait for them: {tiles}")
    if tiles.short and not inline_wgmma.multiplies_rows():
        raise ValueError(
            f"this jax does not have what {tiles.name} are made of; take `short=False`"
        )
    if tiles.short and tiles.bk != 64:
        raise ValueError(f"`short` tiles have stages of 64 rows, not of {tiles.bk}")
    plan = plan_of(problem, tiles, of_pieces, interpret)
    memory_registers, compute_registers = _REGISTERS[plan.by_copies]

    def body(*given):
        refs = Refs(plan, given)
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        mine = CtaTiles(plan, refs, warpgroup, cta)

        def compute():
            plgpu.set_max_registers(compute_registers, action="increase")
            ComputeLoop(plan, refs, mine, warpgroup)()

        def load():
            plgpu.set_max_registers(memory_registers, action="decrease")
            LoadLoop(plan, refs, mine)()

        lax.cond(warpgroup < COMPUTING, compute, load)

    options: dict[str, Any] = {"interpret": plgpu.InterpretGPUParams()} if interpret else {}
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(plan.out_shape, jnp.dtype(problem.layout.out_dtype)),
        scratch_types=scratch(plan),
        grid=(tiles.num_ctas,),
        grid_names=("cta",),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        kernel_name="grouped_weight_gradient" + ("_of_pieces" if of_pieces else ""),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        **options,
    )
