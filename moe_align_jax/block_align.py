"""moe_align_block_size, batched_moe_align_block_size, padded_group_sizes: contract, checks, hand-off."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_align_jax._align import location
from moe_align_jax._align import tables as tuning_tables
from moe_align_jax._align.arguments import (
    as_int32_words,
    capacity_of,
    check_count,
    check_expert_map,
    check_integer_array,
    narrow_count,
    narrow_map,
)
from moe_align_jax._align.primitive import align
from moe_align_jax._core import checks, fork
from moe_align_jax._core.int32 import narrow_on_host
from moe_align_jax._lowering import export, select
from moe_align_jax._lowering.sharding import replicate
from moe_align_jax.expert_location import ExpertLocation
from moe_align_jax.types import (
    AlignedBlocks,
    AlignProblem,
    BatchedAlignProblem,
    Implementation,
    Selection,
)

_I32 = jnp.int32

export.register_namedtuple(AlignedBlocks)


def moe_align_block_size(
    topk_ids: jax.Array | np.ndarray,
    *,
    block_size: int,
    num_experts: int,
    expert_map: jax.Array | np.ndarray | None = None,
    ignore_invalid_experts: bool = False,
    pad_sorted_ids: bool = False,
    num_valid_pairs: int | jax.Array | None = None,
    return_inverse: bool = False,
    expert_location: ExpertLocation | None = None,
    layer: int | jax.Array | None = None,
    num_fused_shared_experts: int = 0,
    implementation: Implementation | None = None,
) -> AlignedBlocks:
    """Groups (token, expert) pairs by expert, each expert padded to whole GEMM blocks.

    The grouped GEMM that follows reads one expert's weights per block, so no block may mix experts.
    The order is stable: the same input gives the same bits on every implementation, run and GPU.

    Args:
        topk_ids: any shape (usually `[num_tokens, top_k]`, flattened in row-major order), any integer
            dtype: the chosen experts. Ids outside `[0, num_experts)` are dropped. Ids are compared in
            their own dtype. Without x64, jax narrows a 64-bit NumPy array that is an argument of a
            transformed function (`jax.jit`; `jax.vmap`, also eagerly) to its low 32 bits before this
            function sees it; of one that the function closes over, all 64 bits are compared.
            Sharded over devices under plain jit, the result is the global one (ids are gathered);
            per-shard results are shard_map's.
        block_size: rows per GEMM block (its BLOCK_M), >= 1. Static.
        num_experts: E, number of global (physical) experts, >= 1. Static.
        expert_map: `[E]` any integer dtype, global to local id, -1 if on another rank; entries outside
            `[-1, E)` count as -1. A 64-bit NumPy array as for topk_ids.
        ignore_invalid_experts: False aligns all experts and then maps `expert_ids`, so that remote
            blocks read -1; True drops remote pairs before counting and groups by local id.
        pad_sorted_ids: round P up to a multiple of block_size. Static.
        num_valid_pairs: None, a Python int or a scalar integer array (a device value, not static):
            pairs at flat index >= it are dropped; a negative one drops all.
        return_inverse: also return `row_of_pair`. Static.
        expert_location: ids are logical experts, in `[0, El)`; each pair takes the replica that
            `to_physical_ids` gives it, within the same kernels. E, expert_map and the results are of
            physical slots. Its arrays are not static: an update compiles nothing. With "static" dispatch,
            that of one GPU (`for_rank`). "round_robin" costs a mapping and an alignment beforehand.
        layer: the layer of an expert_location of all layers, an int or an integer scalar (clamped). The
            tables are then read where they lie: slices of them can cost XLA a kernel each.
        num_fused_shared_experts: with an expert_location, the last so many columns of topk_ids
            `[..., top_k]` are slots already, and left as they are. E may then exceed the location's
            slots: those behind them are the shared experts'. Static.
        implementation: None for the best available ("mosaic_gpu" on a Hopper or newer GPU, else "xla"),
            or a name, which runs or raises. Static.

    Returns:
        `AlignedBlocks` of int32 arrays, with P = `max_num_tokens_padded(...)` and
        B = cdiv(P, block_size). `sorted_token_ids` `[P]`: pair indices, ascending within an expert;
        n = topk_ids.size in every other slot. `expert_ids` `[B]`: -1 past the last used block.
        `num_tokens_post_padded` `[1]`: rows in use. `tokens_per_expert` `[E]`: pairs kept.
        `row_of_pair` `[n]` or None: the row of each pair, -1 for a dropped one.

    Raises:
        TypeError: an array is not an integer array, or a size is not a static int.
        ValueError: a size is out of range, a shape does not fit, or P exceeds int32; num_experts is not
            the location's, or its layer or GPU is not chosen.
        NotImplementedError: the named implementation cannot run here (eagerly at the call, under jit
            at lowering); the message says why.
        RuntimeError: this process was forked while jax was running, so that the call would hang.

    Example:
        >>> out = moe_align_block_size(jnp.array([[2, 3], [1, 2], [1, 3]]), block_size=4, num_experts=4)
        >>> out.sorted_token_ids[:12].tolist()
        [2, 4, 6, 6, 0, 3, 6, 6, 1, 5, 6, 6]
        >>> out.expert_ids[:4].tolist(), out.num_tokens_post_padded.tolist()
        ([1, 2, 3, -1], [12])

    Source: contract of vLLM 0.33 `fused_moe/moe_align_block_size.py` (Apache-2.0); no code taken.
    """
    function = "moe_align_block_size"
    fork.check(function)
    block_size = checks.check_block_size(function, block_size)
    num_experts = checks.check_num_experts(function, num_experts)
    select.check_implementation(function, implementation)
    topk_ids = check_integer_array(
        function,
        "topk_ids",
        topk_ids,
        "Pass the expert ids that top_k returned, not their weights.",
    )
    flags = {
        "ignore_invalid_experts": ignore_invalid_experts,
        "pad_sorted_ids": pad_sorted_ids,
        "return_inverse": return_inverse,
    }
    checks.check_bools(function, flags)

    dispatch, tables, shared = "", {}, 0
    if expert_location is not None:
        shared = location.check_shared(function, num_fused_shared_experts, topk_ids.shape)
        dispatch, tables = location.alignment_tables(
            function, expert_location, layer, num_experts, shared
        )
        num_logical = expert_location.num_logical_experts
        topk_ids = location.narrow_on_host(topk_ids, num_logical, shared)
        if dispatch == "round_robin":  # a pair's replica depends on all pairs before it
            rows: Any = topk_ids if topk_ids.ndim else topk_ids.reshape(1)
            if expert_location.num_layers is not None:
                expert_location = expert_location.layer(layer)
            topk_ids = location.slots_of(rows, expert_location, dispatch=dispatch, shared=shared)
            dispatch, tables, shared = "", {}, 0
    else:
        given = location.check_shared(function, num_fused_shared_experts, topk_ids.shape)
        for argument, value, remedy in (
            ("layer", layer, "It is the layer of an expert_location."),
            (
                "num_fused_shared_experts",
                given or None,
                "They are columns that an expert_location leaves alone.",
            ),
        ):
            if value is not None:
                got = checks.describe(value)
                raise ValueError(checks.message(function, argument, "be left out", got, remedy))

    num_pairs = functools.reduce(operator.mul, topk_ids.shape, 1)
    capacity = capacity_of(function, num_pairs, block_size, num_experts, bool(pad_sorted_ids))
    operands: dict[str, Any] = {"topk_ids": narrow_on_host(topk_ids, num_experts), **tables}
    if expert_map is not None:
        operands["expert_map"] = check_expert_map(function, expert_map, num_experts)
    if num_valid_pairs is not None:
        operands["num_valid_pairs"] = check_count(
            function,
            "num_valid_pairs",
            num_valid_pairs,
            "Pass the number of pairs in use, as an int or a scalar integer array.",
        )
    return _align(
        operands,
        block_size=block_size,
        num_experts=num_experts,
        capacity=capacity,
        ignore_invalid_experts=bool(ignore_invalid_experts),
        return_inverse=bool(return_inverse),
        dispatch=dispatch,
        shared=shared,
        implementation=implementation,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "block_size",
        "num_experts",
        "capacity",
        "ignore_invalid_experts",
        "return_inverse",
        "dispatch",
        "shared",
        "implementation",
    ),
)
def _align(
    operands: dict[str, jax.Array],
    *,
    block_size: int,
    num_experts: int,
    capacity: Any,
    ignore_invalid_experts: bool,
    return_inverse: bool,
    dispatch: str,
    shared: int,
    implementation: str | None,
) -> AlignedBlocks:
    """One cached trace per static size: eager calls and repeated layers reuse it."""
    operands = {name: replicate(x) for name, x in operands.items()}
    topk_ids = operands["topk_ids"]
    num_pairs = functools.reduce(operator.mul, topk_ids.shape, 1)
    with jax.named_scope("moe_align_block_size"):
        if isinstance(num_pairs, int) and num_pairs == 0:
            empty, none = jnp.zeros(0, _I32), jnp.zeros(num_experts, _I32)
            inverse = empty if return_inverse else None
            return AlignedBlocks(empty, empty, jnp.zeros(1, _I32), none, inverse)
        ids = as_int32_words(lax.reshape(topk_ids, (num_pairs,)))
        sizes, tables = location.arrays_of(operands, dispatch, shared)
        arrays = [ids, *tables]
        expert_map = operands.get("expert_map")
        if expert_map is not None:
            arrays.append(narrow_map(expert_map, num_experts))
        num_valid_pairs = operands.get("num_valid_pairs")
        if num_valid_pairs is not None:
            arrays.append(narrow_count(num_valid_pairs))
        problem = AlignProblem(
            num_pairs=num_pairs,
            num_experts=num_experts,
            block_size=block_size,
            capacity=capacity,
            id_words=ids.shape[1] if ids.ndim == 2 else 1,
            expert_map=("filter" if ignore_invalid_experts else "label")
            if expert_map is not None
            else "",
            has_num_valid_pairs=num_valid_pairs is not None,
            return_inverse=return_inverse,
            **sizes,
        )
        return AlignedBlocks(*align(problem, implementation, *arrays))


def batched_moe_align_block_size(
    expert_num_tokens: jax.Array | np.ndarray,
    *,
    max_tokens_per_batch: int,
    block_size: int,
    implementation: Implementation | None = None,
) -> AlignedBlocks:
    """Aligns the batched `[E, max_tokens_per_batch, H]` layout, where each expert's rows lie together.

    Args:
        expert_num_tokens: `[E]` any integer dtype, rows in use per expert; counts outside
            `[0, max_tokens_per_batch]` are clamped.
        max_tokens_per_batch: rows per expert of the layout, >= 1. Static.
        block_size: rows per GEMM block, >= 1. Static.
        implementation: as for `moe_align_block_size`.

    Returns:
        `AlignedBlocks` with P = E * round_up(max_tokens_per_batch, block_size). Row i of expert e is
        `e * max_tokens_per_batch + i`; the sentinel is `E * max_tokens_per_batch`. `row_of_pair` is None.

    Raises:
        TypeError, ValueError, NotImplementedError: as `moe_align_block_size`.

    Example:
        >>> out = batched_moe_align_block_size(jnp.array([1, 0, 3]), max_tokens_per_batch=4, block_size=2)
        >>> out.sorted_token_ids.tolist()
        [0, 12, 8, 9, 10, 12, 12, 12, 12, 12, 12, 12]
        >>> out.expert_ids.tolist(), out.num_tokens_post_padded.tolist()
        ([0, 2, 2, -1, -1, -1], [6])

    Source: contract of vLLM 0.33 `batched_moe_align_block_size` (Apache-2.0); no code taken.
    """
    function = "batched_moe_align_block_size"
    fork.check(function)
    block_size = checks.check_block_size(function, block_size)
    max_tokens_per_batch = checks.check_positive_int(
        function,
        "max_tokens_per_batch",
        max_tokens_per_batch,
        "Pass the static rows per expert of the [E, max_tokens, H] layout.",
    )
    select.check_implementation(function, implementation)
    counts = check_integer_array(
        function, "expert_num_tokens", expert_num_tokens, "Pass the row count of each expert."
    )
    if counts.ndim != 1 or counts.shape[0] < 1:
        raise ValueError(
            checks.message(
                function,
                "expert_num_tokens",
                "have shape [num_experts] with at least one expert",
                checks.describe(counts),
                "Pass the row count of each expert.",
            )
        )
    problem = BatchedAlignProblem(counts.shape[0], max_tokens_per_batch, block_size)
    checks.check_fits_int32(function, "max_tokens_per_batch", problem.capacity, "a padded length P")
    if isinstance(counts, np.ndarray):
        counts = np.clip(counts, 0, min(max_tokens_per_batch, int(jnp.iinfo(counts.dtype).max)))
        counts = counts.astype(np.int32)
    return _batched_align(counts, problem=problem, implementation=implementation)


@functools.partial(jax.jit, static_argnames=("problem", "implementation"))
def _batched_align(
    counts: jax.Array, *, problem: BatchedAlignProblem, implementation: str | None
) -> AlignedBlocks:
    with jax.named_scope("batched_moe_align_block_size"):
        counts = narrow_count(replicate(counts))
        return AlignedBlocks(*align(problem, implementation, counts))


def padded_group_sizes(aligned: AlignedBlocks, *, block_size: int) -> jax.Array:
    """Rows per expert with padding, as `jax.lax.ragged_dot` wants its group sizes.

    Args:
        aligned: the result of an alignment.
        block_size: the one it was aligned with.

    Returns:
        `[E]` int32, `round_up(tokens_per_expert, block_size)`; they sum to `num_tokens_post_padded`.

    Raises:
        TypeError, ValueError: block_size is not an int >= 1.

    Example:
        >>> out = moe_align_block_size(jnp.array([[2, 3], [1, 2], [1, 3]]), block_size=4, num_experts=4)
        >>> padded_group_sizes(out, block_size=4).tolist()
        [0, 4, 4, 4]
    """
    function = "padded_group_sizes"
    fork.check(function)
    block_size = checks.check_block_size(function, block_size)
    counts = getattr(aligned, "tokens_per_expert", None)
    if counts is None:
        got, remedy = checks.describe(aligned), "Pass what moe_align_block_size returned."
        checks.fail(function, "aligned", "be an AlignedBlocks", got, remedy, TypeError)
    return (counts + (block_size - 1)) // block_size * block_size


def select_implementation(
    topk_ids_or_shape: Any,
    *,
    block_size: int,
    num_experts: int,
    platform: str | None = None,
    implementation: str | None = None,
) -> Selection:
    """Says what `moe_align_block_size` would run, and why the others would not.

    Args:
        topk_ids_or_shape: the ids, or their shape as an int or a tuple of ints.
        block_size: rows per block.
        num_experts: E.
        platform: "cuda" (or "gpu"), "cpu", "tpu" or "rocm", for which to lower; None for this process's
            default backend.
        implementation: as for `moe_align_block_size`.

    Returns:
        `Selection(implementation, form, reasons)`.

    Raises:
        NotImplementedError: the named implementation cannot run for that platform.
        TypeError, ValueError: as `moe_align_block_size`.

    Example:
        >>> select_implementation((4096, 2), block_size=128, num_experts=64, platform="cuda")[:2]
        ('mosaic_gpu', 'cluster')
    """
    function = "select_implementation"
    block_size = checks.check_block_size(function, block_size)
    num_experts = checks.check_num_experts(function, num_experts)
    select.check_implementation(function, implementation)
    shape = getattr(topk_ids_or_shape, "shape", topk_ids_or_shape)
    given = shape if isinstance(shape, (tuple, list)) else (shape,)
    remedy = "Pass topk_ids, or its shape as a tuple of ints."
    try:
        if isinstance(topk_ids_or_shape, (jax.Array, np.ndarray, np.generic)):
            if not np.issubdtype(topk_ids_or_shape.dtype, np.integer):
                raise TypeError
        shape = tuple(checks.check_int(function, "topk_ids_or_shape", d, 0, remedy) for d in given)
    except TypeError:
        rule, got = "be an array or a shape", checks.describe(topk_ids_or_shape)
        raise TypeError(checks.message(function, "topk_ids_or_shape", rule, got, remedy)) from None
    padded = checks.max_num_tokens_padded(
        int(np.prod(shape, dtype=object)), block_size=block_size, num_experts=num_experts
    )
    # The emulator takes the default table everywhere: its results do not depend on the machine.
    tuning = "" if implementation == "emulator" else tuning_tables.table_name(select.gpu_kind())
    problem = AlignProblem(
        int(np.prod(shape, dtype=object)), num_experts, block_size, padded, tuning=tuning
    )
    platform = select.check_platform(function, platform)
    choice = select.choose(function, platform, implementation)
    better = (
        f"the Mosaic GPU kernels run here and are faster (sizes: {tuning_tables.describe(tuning)})"
    )
    reasons = select.reasons_against_others(choice, platform, implementation, better=better)
    if problem.num_pairs == 0:
        form = "empty"
    else:
        form = "sort" if choice == "xla" else tuning_tables.config_for(problem).form
    return Selection(choice, form, reasons)
