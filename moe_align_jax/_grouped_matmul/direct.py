"""The kernels of the grouped matrix multiplication for a launch outside XLA (`torch_bridge`)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe_align_jax._grouped_matmul import kernel, launch, tile_list
from moe_align_jax._grouped_matmul.direct_problem import (
    LAUNCH_VALUES,
    NUM_PAIRS,
    NUM_ROWS,
    SCALE_PITCH,
    DirectMatmul,
)
from moe_align_jax._lowering.direct_kernel import DirectKernel
from moe_align_jax._simt.language import Kernel


def kernels(direct: DirectMatmul) -> tuple[Any, ...]:
    """In the order of their launches: that of the list of tiles, if there is one, and the products'.

    Raises:
        NotImplementedError: there is no such program; the message says why.
    """
    if reason := direct.refusal:
        raise NotImplementedError(reason)
    problem, config = direct.problem, direct.tiles
    named = {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        for name, (shape, dtype) in problem.inputs.items()
    }
    first: tuple[Any, ...] = ()
    where = None
    if problem.rows != "blocks" and not config.finds:
        program = tile_list.build(tile_list.of(problem, config.bm))
        [listing] = program.kernels
        first = (_of_masked(listing),)
        where = {
            name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in listing.outputs.items()
        }

    def arguments(*arrays):
        given = dict(zip(named, arrays, strict=True))
        listed = [jnp.zeros(s.shape, s.dtype) for s in where.values()] if where else None
        return launch.arguments(problem, config, given, listed, interpret=False)

    structs = jax.eval_shape(arguments, *named.values())
    names = [name for name in direct.inputs if name not in LAUNCH_VALUES]
    if where:
        names = [*where, *[name for name in names if name != "masked_m"]]
    if direct.sized_at_launch:
        names.insert(0, NUM_PAIRS if problem.counts_pairs else NUM_ROWS)
        structs = [jax.ShapeDtypeStruct((1,), jnp.int32), *structs]
    rows = {}
    if direct.sized_at_launch:
        rows = {"out": NUM_ROWS} if problem.top_k else {"x": NUM_ROWS, "out": NUM_ROWS}
    call = kernel.build(problem, config, sized_at_launch=direct.sized_at_launch)
    shapes = {name: tuple(s.shape) for name, s in zip(names, structs, strict=True)}
    name = f"grouped_matmul_{config.form}{'_e4m3' if problem.scales else ''}"
    pitches = {"x_scales": SCALE_PITCH} if direct.pitched else {}
    return (*first, DirectKernel(name, shapes, direct.outputs, call, list(structs), rows, pitches))


def _of_masked(listing: Kernel) -> Kernel:
    """The kernel of the list of tiles, with the operand's name of the problem."""

    def body(t, refs):
        refs.sizes = refs.masked_m
        listing.body(t, refs)

    return dataclasses.replace(listing, inputs={"masked_m": listing.inputs["sizes"]}, body=body)
