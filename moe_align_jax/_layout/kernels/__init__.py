"""Moving rows on a GPU: into the masked layout, and back as weighted sums."""

import jax

from moe_align_jax._layout.kernels.sizes import MAX_LEAVES as MAX_LEAVES
from moe_align_jax._layout.kernels.sizes import CopyConfig as CopyConfig
from moe_align_jax._layout.kernels.sizes import Leaf as Leaf
from moe_align_jax._layout.kernels.sizes import MaskedCopy as MaskedCopy
from moe_align_jax._layout.kernels.sizes import RowSum as RowSum
from moe_align_jax._layout.kernels.sizes import SumConfig as SumConfig
from moe_align_jax._layout.kernels.sizes import copy_config as copy_config
from moe_align_jax._layout.kernels.sizes import copy_unsupported as copy_unsupported
from moe_align_jax._layout.kernels.sizes import movable as movable
from moe_align_jax._layout.kernels.sizes import sum_config as sum_config
from moe_align_jax._layout.kernels.sizes import sum_unsupported as sum_unsupported


def run_copy(
    problem: MaskedCopy,
    topk_ids: jax.Array,
    place_of_pair: jax.Array,
    tokens_per_expert: jax.Array,
    *leaves: jax.Array,
    config: CopyConfig | None = None,
) -> list[jax.Array]:
    """`[masked_m [e], row_of_pair [T, K], pair_of_row [e, M], rows [e, M, ...] of each leaf]`.

    Args:
        problem: what to do.
        topk_ids: `[T, K]` int32.
        place_of_pair: `[n]` int32, the pair's place among all pairs by expert, -1 for a dropped one.
        tokens_per_expert: `[e]` int32.
        leaves: `[T, ...]` each, as `problem.leaves` says.
        config: None for the usual one.
    """
    from moe_align_jax._layout.kernels import masked_copy
    from moe_align_jax._simt import mosaic

    program = masked_copy.build(problem, config or copy_config(problem))
    flat = [x.reshape(-1) for x in (topk_ids, place_of_pair, tokens_per_expert, *leaves)]
    masked_m, row_of_pair, pair_of_row, *rows = mosaic.run(program, flat)
    boxes = (problem.num_experts, problem.rows_per_expert)
    return [
        masked_m,
        row_of_pair.reshape(problem.num_tokens, problem.top_k),
        pair_of_row.reshape(boxes),
        *(row.reshape(*boxes, *x.shape[1:]) for row, x in zip(rows, leaves, strict=True)),
    ]


def run_sum(
    problem: RowSum,
    y: jax.Array,
    row_of_pair: jax.Array,
    *weights: jax.Array,
    config: SumConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`[T, ...]`: `sum_k weights[t, k] * y[row_of_pair[t, k]]`, -1 adds nothing.

    Args:
        problem: what to do.
        y: `[P, ...]`, H values in a row.
        row_of_pair: `[T, K]` int32.
        weights: none, or `[T, K]` float32.
        config: None for the usual one.
        interpret: run it by Pallas' own interpreter, on a CPU.
    """
    from moe_align_jax._layout.kernels import weighted_sum

    launch = weighted_sum.build(problem, config or sum_config(problem), interpret=interpret)
    with jax.enable_x64(False):  # its indices are int32; plgpu makes 64-bit ones otherwise
        out = launch(y.reshape(problem.grained(problem.num_rows)), row_of_pair, *weights)
    return out.reshape(problem.num_tokens, *y.shape[1:])
