"""From a problem's operands to the kernels' launches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_align_jax._grouped_matmul import (
    cut_list,
    kernel,
    reference,
    spread,
    spread_kernel,
    tile_list,
    tile_order,
)
from moe_align_jax._grouped_matmul.choose_tiles import config_for, permutes_first, spreads_first
from moe_align_jax._grouped_matmul.config import Config, unshared
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._grouped_matmul.shape import Shape, shape_of
from moe_align_jax._simt.language import Program


def run(
    problem: MatmulProblem,
    *operands: jax.Array,
    gpu_kind: str | None = None,
    interpret: bool = False,
    config: Config | None = None,
) -> jax.Array:
    """`[num_rows, n]` of `problem.inputs`, by the kernel.

    Args:
        problem: one that `config.unsupported` has nothing against.
        operands: as `problem.inputs` names them.
        gpu_kind: whose tuning to use.
        interpret: run it in Pallas' interpreter, on a CPU.
        config: tiles; None for the usual ones.
    """
    named = dict(zip(problem.inputs, operands, strict=True))
    if config is None and not interpret and spreads_first(problem, gpu_kind):
        problem, named = spread_out(problem, named)
    elif config is None and not interpret and permutes_first(problem, gpu_kind):
        problem, named = permuted(problem, named)
    config = config or (_small_grid(problem) if interpret else config_for(problem, gpu_kind))
    launch = kernel.build(problem, config, interpret=interpret)
    with jax.enable_x64(False):  # its indices are int32; plgpu makes 64-bit ones otherwise
        listed = not config.finds and (config.heights or problem.rows != "blocks")
        where = _list(problem, config, named, interpret) if listed else None
        out = launch(*arguments(problem, config, named, where, interpret=interpret))
    return out.reshape(problem.out_shape)


def permuted(
    problem: MatmulProblem, named: dict[str, jax.Array]
) -> tuple[MatmulProblem, dict[str, jax.Array]]:
    """The same product of rows in aligned order: `[num_rows, k]`, gathered by XLA."""
    sizes = {"num_tokens": problem.num_tokens, "top_k": problem.top_k}
    x = reference.rows_of_pairs(named["x"], named["sorted_token_ids"], **sizes)
    return problem.permuted, named | {"x": x}


def spread_out(
    problem: MatmulProblem, named: dict[str, jax.Array], interpret: bool = False
) -> tuple[MatmulProblem, dict[str, jax.Array]]:
    """The same as `permuted` by the kernel of `spread`, by `row_of_pair`. Rows of no pair hold anything."""
    x = spread_rows(spread.of(problem), named["x"], named["row_of_pair"], interpret)
    return problem.permuted, named | {"x": x}


def spread_rows(
    copy: spread.Spread, tokens: jax.Array, row_of_pair: jax.Array, interpret: bool = False
) -> jax.Array:
    """`[num_rows, width]`: each pair's row of tokens, by the kernel. Rows of no pair hold anything."""
    with jax.enable_x64(False):
        launch = spread_kernel.build(copy, spread.config_for(copy), interpret=interpret)
        rows = launch(row_of_pair.reshape(-1), tokens.reshape(copy.grained(copy.num_tokens)))
    return rows.reshape(copy.num_rows, copy.width)


def _small_grid(problem: MatmulProblem) -> Config:
    """The interpreter runs a thread for each warpgroup of a cluster: few machines have as many."""
    return unshared(config_for(problem))._replace(num_ctas=2)


def arguments(
    problem: MatmulProblem,
    config: Config,
    named: dict[str, jax.Array],
    where: list[jax.Array] | None,
    *,
    interpret: bool,
) -> list[jax.Array]:
    """The kernel's operands, of the problem's; `where`: the list of tiles, if there is one."""
    shape, weights = shape_of(problem, config), problem.weights
    names = ("num_tokens_post_padded", "expert_ids")
    if problem.rows == "ragged" and config.cuts:
        names = ("group_sizes", "group_offset")
    elif config.finds and not config.cuts:
        names = ("masked_m",)
    found = list(where or [named[name] for name in names if name in named])
    # A tile may reach past the last row: what it reads there is not used.
    spare = config.bm if shape.partial else 0
    if shape.reads_ids:
        found.append(_pad(named["sorted_token_ids"], spare, -1))
    if problem.row_weights:
        found.append(_pad(named["row_weights"], spare, 0))
    if weights.bias:
        found.append(bias(problem, shape, named["bias"]))
    found += [array for name, array in named.items() if name.endswith("_scales")]
    found.append(_x(problem, config, named["x"], interpret))
    arrays = [named[name] for name in (("gate", "up") if weights.pair else ("w",))]
    if weights.interleaved and weights.transposed:  # gate and up in turn, by an axis of their own
        [w] = arrays
        arrays = [w.reshape(problem.num_experts, problem.n, 2, problem.k)]
    return [*found, *arrays]


def _pad(x: jax.Array, count: int, value: Any) -> jax.Array:
    """A vector with `count` more elements of that value behind it."""
    return jnp.pad(x, (0, count), constant_values=value) if count else x


def bias(problem: MatmulProblem, shape: Shape, given: jax.Array) -> jax.Array:
    """Whole tiles of columns; gate, then up, but where the kernel itself parts them."""
    weights, experts = problem.weights, problem.num_experts
    columns = shape.n_tiles * shape.columns
    if not weights.gated:
        return jnp.pad(given, ((0, 0), (0, columns - problem.n)))
    if weights.interleaved and not weights.transposed:
        return jnp.pad(given, ((0, 0), (0, 2 * (columns - problem.n))))
    if weights.interleaved:
        given = given.reshape(experts, problem.n, 2).swapaxes(1, 2)
    given = given.reshape(experts, 2, problem.n)
    given = jnp.pad(given, ((0, 0), (0, 0), (0, columns - problem.n)))
    return given.reshape(experts, 2 * columns)


def _x(problem: MatmulProblem, config: Config, x: jax.Array, interpret: bool) -> jax.Array:
    """x in the shape that the kernel reads."""
    if problem.rows == "masked":
        return x.reshape(problem.num_experts, problem.max_rows, problem.k)
    if interpret and problem.top_k and problem.k % config.bk:
        # The interpreter's loads by index know no bounds.
        return jnp.pad(x, ((0, 0), (0, -problem.k % config.bk)))
    if interpret and config.heights:  # and a tile may reach past the last row
        return jnp.pad(x, ((0, config.bm), (0, 0)))
    return x


def list_of(problem: MatmulProblem, config: Config) -> Program:
    """The launch that makes the list of tiles, for tiles that come from one."""
    if config.heights:
        a_round = 0
        if config.falling and not config.group:
            n_tiles = shape_of(problem, config).n_tiles
            a_round = tile_order.whole_round(config.num_ctas, n_tiles)
        order = config.exact, config.falling, a_round
        return cut_list.build(cut_list.of(problem, config.heights, *order))
    return tile_list.build(tile_list.of(problem, config.bm))


def _list(
    problem: MatmulProblem, config: Config, named: dict[str, jax.Array], interpret: bool
) -> list[jax.Array]:
    """The list of tiles, as `cut_list.build` gives it of blocks, or `tile_list.build` of an operand that says
    how many rows the groups have."""
    program = list_of(problem, config)
    names = {"ragged": ("group_sizes", "group_offset"), "masked": ("masked_m",)}
    operands = [named[name] for name in names.get(problem.rows, tuple(program.inputs))]
    if not interpret:
        from moe_align_jax._simt import mosaic

        return list(mosaic.run(program, operands))
    from moe_align_jax._simt import emulator

    def on_host(*arrays):
        return tuple(emulator.run(program, [np.asarray(a) for a in arrays]))

    shapes = program.kernels[0].outputs
    results = [jax.ShapeDtypeStruct(shapes[name], np.int32) for name in program.results]
    return list(jax.pure_callback(on_host, results, *operands))
