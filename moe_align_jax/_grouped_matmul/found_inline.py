"""What the ways to find tiles inside the product share: scalars that its warps compute in the language."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from moe_align_jax._grouped_matmul.config import Config
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._simt.language import Int, Kernel


def inline_scalars(
    problem: MatmulProblem,
    config: Config,
    compute: Callable[..., tuple[Int, ...]],
    results: int,
    values: Sequence[jax.Array],
    shapes: Mapping[str, tuple[int, ...]],
    **refs: Any,
) -> list[jax.Array]:
    """What `compute(t, r, *values)` gives, in the kernel of that problem, by whole warpgroups.

    Args:
        problem, config: of the product.
        compute: in the language; `r` holds the arrays.
        results: how many int32 scalars it gives.
        values: int32 scalars that it is told.
        shapes: of the arrays, int32.
        refs: they themselves, in global memory, by the same names.
    """
    from moe_align_jax._simt import mosaic

    machine = Kernel(
        name=f"grouped_matmul_{config.form}",
        body=lambda t, r: None,
        inputs=dict(shapes),
        outputs={"out": problem.out_shape},
        num_warpgroups=config.computing + 1,
        num_ctas=config.num_ctas,
    )
    return mosaic.inline_scalars(machine, compute, results, values=tuple(values), **refs)
