"""Products of rows with the weights of their experts: on aligned blocks, groups, or the masked layout."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_align_jax._core import checks
from moe_align_jax._grouped_matmul import (
    arguments,
    choose_tiles,
    derivative,
    quantized,
    reference,
)
from moe_align_jax._grouped_matmul import choice as implementations
from moe_align_jax._grouped_matmul.problem import E4M3, Activation, MatmulProblem, Scales
from moe_align_jax._lowering import select
from moe_align_jax._lowering.reverse_mode import in_our_words, reverse_mode_only
from moe_align_jax._masked_quant.problem import ScaleLayout
from moe_align_jax.types import AlignedBlocks, Implementation, Selection

type _Quantized = tuple[jax.Array, jax.Array]
type _Rows = jax.Array | _Quantized
type _Weights = jax.Array | tuple[jax.Array, jax.Array] | tuple[_Quantized, _Quantized]


def grouped_matmul(
    x: _Rows,
    w: _Weights,
    aligned: AlignedBlocks,
    *,
    block_size: int,
    top_k: int | None = None,
    transpose_rhs: bool = False,
    activation: Activation | None = None,
    gated: bool = True,
    interleaved: bool = False,
    swiglu_limit: float | None = None,
    swiglu_alpha: float | None = None,
    bias: jax.Array | None = None,
    row_weights: jax.Array | None = None,
    preferred_element_type: Any = None,
    scale_layout: ScaleLayout | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiplies each aligned row with the weights of its block's expert.

    One product per block of `aligned`, accumulated in float32. Bias, activation and row weights are applied
    to the float32 sums, which are rounded once, to the result's dtype. Per row, with e the block's expert:

        product = x_row @ w[e] + bias[e]
        result  = act(gate) * up * row_weight        gate and up are the two halves of the product's columns

    Without `activation` the result is `product * row_weight`; with `gated=False` it is
    `act(product) * row_weight`. With `swiglu_alpha` it is
    `gate * sigmoid(alpha * gate) * (up + 1) * row_weight`.

    Args:
        x: `[P, K]` bfloat16, float16 or float32: the rows in aligned order. With `top_k`, `[T, K]`: the
            tokens, and row r is token `sorted_token_ids[r] // top_k`. The kernel gathers them itself: no
            permuted copy is made. Or (e4m3 values, scales), of `quantize_rowwise`: a scale for each row and
            128 columns in any of its layouts, or one for all. See docs/fp8.md.
        w: `[E, K, N]` of x's dtype; `[E, K, 2 N]` where an activation is gated. Or a pair (gate, up) of
            `[E, K, N]`. Or float32, as master weights: cast to x's dtype here, with a float32 gradient.
            For e4m3 x, (e4m3 values, float32 scales), of `quantize_blockwise`, or a pair of such
            pairs: `[E, N, K]` (`transpose_rhs=True`), a scale for each 128 x 128, or `[E]` or `[]`.
        aligned: from `moe_align_block_size`, P rows. P may be any length that holds the rows in use. One made
            by hand must have, as those do, the pairs of each block ahead of its padding: the kernel takes a
            block's rows behind the first padding for padding. (Eager calls on a CPU check it.)
        block_size: the one that `aligned` was made with. Static.
        top_k: pairs per token, where x holds the tokens; None where x holds the aligned rows. Static.
        transpose_rhs: w is `[E, N, K]` (`[E, 2 N, K]`, or a pair of `[E, N, K]`). Static.
        activation: None, "silu", "gelu" (by erf), "gelu_tanh" or "relu2" (`max(x, 0) ** 2`). Static.
        gated: w holds gate and up. No effect without an activation. Static.
        interleaved: columns 0, 2, 4, ... of w are gate, columns 1, 3, 5, ... are up, in place of gate in the
            first half. Static.
        swiglu_limit: bound, before the activation "silu": `min(gate, limit)` and `clip(up, -limit, limit)`.
            Static.
        swiglu_alpha: the other SwiGLU, of gpt-oss (limit 7, alpha 1.702). Static.
        bias: `[E, N]`, gated `[E, 2 N]`, in the order of w's columns (gate, then up, for a pair). Any float
            dtype.
        row_weights: `[P]`, any float dtype. Those of rows without a pair are not used, and may be NaN.
        preferred_element_type: the result's dtype, bfloat16, float16 or float32; None for x's, and
            bfloat16 for e4m3. Static.
        scale_layout: how scales of x lie, "row_major" or "column_major"; None where the shape tells. Static.
        implementation: None for the best available ("mosaic_gpu" on a Hopper or newer GPU for what its kernel
            takes: see `select_matmul_implementation`), or a name, which runs or raises. "emulator" runs the
            kernel's body in Pallas' interpreter on a CPU. Static.

    Returns:
        `[P, N]`. Blocks of expert -1 and rows in use that hold no pair are zero. Rows at or past
        `num_tokens_post_padded` are unspecified ("xla" puts zeros), and those of x are not read. The
        same call gives the same bits in every run.

    Raises:
        TypeError: an array has another dtype, or an option is not static.
        ValueError: shapes do not fit each other, block_size is not the alignment's, or an option is out of
            range.
        NotImplementedError: the named implementation cannot run here (eagerly at the call, under jit at
            lowering); the message says why.

    Example:
        >>> from moe_align_jax import moe_align_block_size
        >>> ids = jnp.array([[1], [0], [1]])
        >>> blocks = moe_align_block_size(ids, block_size=2, num_experts=2)
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> w = jnp.stack([jnp.eye(2), 10 * jnp.eye(2)])
        >>> grouped_matmul(x, w, blocks, block_size=2, top_k=1)[:4].tolist()
        [[3.0, 4.0], [0.0, 0.0], [10.0, 20.0], [50.0, 60.0]]

    The derivative, for x, w, bias and row_weights: products by the same implementation, each cotangent in
    its primal's dtype. e4m3 has none.

    Source: the contract of vLLM 0.33's `fused_moe_kernel` (Apache-2.0) on the same aligned blocks; no code
    taken.
    """
    function = "grouped_matmul"
    select.check_implementation(function, implementation)
    block_size = checks.check_block_size(function, block_size)
    values, weights, arrays, scales, of_scales = quantized.check_products(
        *(function, x, w, 2),
        scale_layout=scale_layout,
        transposed=transpose_rhs,
        activation=activation,
        gated=gated,
        interleaved=interleaved,
        swiglu_limit=swiglu_limit,
        swiglu_alpha=swiglu_alpha,
        bias=bias is not None,
    )
    where = arguments.check_aligned(function, aligned, block_size)
    num_rows, num_pairs = where[0].shape[0], 0
    if top_k is not None:
        remedy = "Pass the experts per token, topk_ids.shape[1]."
        top_k = checks.check_positive_int(function, "top_k", top_k, remedy)
        arguments.check_pairs(function, values.shape[0] * top_k, aligned, num_rows)
    elif values.shape[0] != num_rows:
        rule = f"have {num_rows} rows, as aligned has"
        remedy = "Pass the rows in aligned order, or the tokens and top_k."
        raise ValueError(checks.message(function, "x", rule, checks.describe(values), remedy))
    else:
        where[0], num_pairs = arguments.pairs_of(aligned, where[0])
    problem = MatmulProblem(
        function,
        "blocks",
        num_rows,
        values.shape[1],
        arguments.result_columns(weights, arrays[0]),
        arrays[0].shape[0],
        str(values.dtype),
        arguments.result_dtype(function, values, preferred_element_type),
        weights,
        block_size=block_size,
        num_tokens=values.shape[0] if top_k else 0,
        top_k=top_k or 0,
        row_weights=row_weights is not None,
        scales=scales,
        num_pairs=num_pairs,
    )
    extras = arguments.check_extras(function, problem, bias, row_weights)
    pairs = num_pairs or problem.num_tokens * problem.top_k
    arguments.check_order(function, where, pairs, block_size, problem.num_experts)
    return _run(problem, implementation, values, *arrays, *extras, *of_scales, *where)


def masked_grouped_matmul(
    x: _Rows,
    w: _Weights,
    masked_m: jax.Array,
    *,
    transpose_rhs: bool = False,
    activation: Activation | None = None,
    gated: bool = True,
    interleaved: bool = False,
    swiglu_limit: float | None = None,
    swiglu_alpha: float | None = None,
    bias: jax.Array | None = None,
    preferred_element_type: Any = None,
    scale_layout: ScaleLayout | None = None,
    expected_m: int | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiplies the first `masked_m[i]` rows of expert i with its weights.

    For the layout of low-latency expert parallelism, which `dispatch` and `permute_to_masked` make. The cost
    follows `sum(masked_m)`, not e * M.

    Args:
        x: `[e, M, K]` bfloat16, float16 or float32; or (e4m3 values, scales), in any layout that `dispatch`,
            `silu_and_mul_masked_quant` and `quantize_rowwise` give them.
        w: `[e, K, N]` of x's dtype or float32, `[e, K, 2 N]` where an activation is gated, or a pair
            (gate, up). For e4m3 x as for `grouped_matmul`.
        masked_m: `[e]` any integer dtype, rows in use of each expert; clamped to [0, M].
        transpose_rhs, activation, gated, interleaved, swiglu_limit, swiglu_alpha, preferred_element_type,
            scale_layout, implementation: as for `grouped_matmul`.
        bias: `[e, N]`, gated `[e, 2 N]`.
        expected_m: rows of a mean expert, as far as the caller knows: the kernel's tiles are chosen for it.
            Behind `dispatch` it is the `expected_m` of its result. None: an eighth of M, maybe far off: each
            tile of an expert's rows reads all of its weights, so where tiles have too few rows they are read
            several times. Static.

    Returns:
        `[e, M, N]`. Rows from `masked_m[i]` on are unspecified, and may be NaN, in x and in the result.

    Raises:
        TypeError, ValueError, NotImplementedError: as `grouped_matmul`.

    Example:
        >>> x = jnp.ones((2, 3, 2))
        >>> w = jnp.stack([jnp.eye(2), 10 * jnp.eye(2)])
        >>> y = masked_grouped_matmul(x, w, jnp.array([1, 2]))
        >>> y[0, :1].tolist(), y[1, :2].tolist()
        ([[1.0, 1.0]], [[10.0, 10.0], [10.0, 10.0]])

    Source: the masked layout of DeepGEMM's `m_grouped_bf16_gemm_nt_masked` (MIT); no code taken.
    """
    function = "masked_grouped_matmul"
    select.check_implementation(function, implementation)
    values, weights, arrays, scales, of_scales = quantized.check_products(
        *(function, x, w, 3),
        scale_layout=scale_layout,
        transposed=transpose_rhs,
        activation=activation,
        gated=gated,
        interleaved=interleaved,
        swiglu_limit=swiglu_limit,
        swiglu_alpha=swiglu_alpha,
        bias=bias is not None,
    )
    experts, rows, k = values.shape
    if expected_m is not None:
        remedy = "Pass the rows that a mean expert has, or None."
        expected_m = checks.check_positive_int(function, "expected_m", expected_m, remedy)
    counts = arguments.check_counts(function, "masked_m", masked_m, 0, rows)
    for argument, array in (("w", arrays[0]), ("masked_m", counts)):
        if array.shape[0] != experts:
            rule = f"have {experts} experts, as x has"
            got = checks.describe(array)
            raise ValueError(checks.message(function, argument, rule, got, "Pass all of them."))
    problem = MatmulProblem(
        function,
        "masked",
        experts * rows,
        k,
        arguments.result_columns(weights, arrays[0]),
        experts,
        str(values.dtype),
        arguments.result_dtype(function, values, preferred_element_type),
        weights,
        max_rows=rows,
        scales=scales,
        # Of a symbolic M it is of no use: "xla" runs, which chooses no tiles.
        expected_rows=min(expected_m or 0, rows) if isinstance(rows, int) else 0,
    )
    operands = (*arrays, *arguments.check_extras(function, problem, bias, None), *of_scales, counts)
    y = _run(problem, implementation, values.reshape(experts * rows, k), *operands)
    return y.reshape(experts, rows, problem.n)


def ragged_dot(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    precision: Any = None,
    preferred_element_type: Any = None,
    group_offset: jax.Array | int | None = None,
    out_sharding: Any = None,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiplies consecutive groups of rows, each with its own matrix: `jax.lax.ragged_dot`'s contract.

    Args:
        lhs: `[m, k]` bfloat16, float16 or float32: the rows, group after group.
        rhs: `[g, k, n]` of lhs' dtype or float32, as for `grouped_matmul`.
        group_sizes: `[G]` any integer dtype: rows of each group. Groups may be empty. Sizes below 0 count
            as 0, and rows that lhs does not have are left out.
        precision: of the products of "xla", as for `jax.lax.dot_general`. The kernel's products are exact,
            and summed in float32. Static.
        preferred_element_type: the result's dtype, bfloat16, float16 or float32; None for lhs'. Static.
        group_offset: the group that `rhs[0]` belongs to, a scalar or `[1]`; None for 0, and then g is G.
            Rows of groups without a matrix are zero.
        out_sharding: None, or a sharding over Explicit mesh axes for the result.
        implementation: as for `grouped_matmul`.

    Returns:
        `[m, n]`. Rows past the sum of `group_sizes` are zero.

    Raises:
        TypeError, ValueError, NotImplementedError: as `grouped_matmul`.

    Example:
        >>> lhs = jnp.ones((4, 2))
        >>> rhs = jnp.stack([jnp.eye(2), 10 * jnp.eye(2)])
        >>> ragged_dot(lhs, rhs, jnp.array([1, 2])).tolist()
        [[1.0, 1.0], [10.0, 10.0], [10.0, 10.0], [0.0, 0.0]]
        >>> ragged_dot(lhs, rhs[1:], jnp.array([1, 2]), group_offset=1).tolist()
        [[0.0, 0.0], [10.0, 10.0], [10.0, 10.0], [0.0, 0.0]]

    Source: the contract of jax 0.12 `jax.lax.ragged_dot` (Apache-2.0); no code taken.
    """
    return ragged_product(
        "ragged_dot",
        lhs,
        rhs,
        group_sizes,
        precision=precision,
        preferred_element_type=preferred_element_type,
        group_offset=group_offset,
        out_sharding=out_sharding,
        implementation=implementation,
    )


def ragged_product(
    function: str,
    lhs: Any,
    rhs: Any,
    group_sizes: Any,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    group_offset: Any = None,
    out_sharding: Any = None,
    transpose_rhs: bool = False,
    implementation: Implementation | None = None,
) -> jax.Array:
    """`ragged_dot` with the options of all functions that are it: `function` names the one for messages."""
    select.check_implementation(function, implementation)
    lhs = arguments.check_rows(function, "lhs", lhs, 2)
    weights, arrays = arguments.check_weights(
        function, rhs, lhs, transposed=transpose_rhs, argument="rhs"
    )
    sizes = arguments.check_counts(function, "group_sizes", group_sizes, 0, lhs.shape[0])
    offset = arguments.check_offset(function, group_offset)
    groups, experts = sizes.shape[0], arrays[0].shape[0]
    if experts > groups or (group_offset is None and experts != groups):
        rule = "have one group per matrix of rhs" if group_offset is None else "have rhs' groups"
        got = f"{checks.describe(sizes)} for rhs {checks.describe(arrays[0])}"
        remedy = "Pass group_offset where rhs holds the matrices of some of the groups."
        raise ValueError(checks.message(function, "group_sizes", rule, got, remedy))
    problem = MatmulProblem(
        function,
        "ragged",
        lhs.shape[0],
        lhs.shape[1],
        arguments.result_columns(weights, arrays[0]),
        experts,
        str(lhs.dtype),
        arguments.result_dtype(function, lhs, preferred_element_type),
        weights,
        num_groups=groups,
        precision=arguments.check_precision(function, precision),
    )
    kinds = (jax.sharding.NamedSharding, jax.sharding.PartitionSpec)
    if out_sharding is not None and not isinstance(out_sharding, kinds):
        rule, remedy = "be None, a NamedSharding or a PartitionSpec", "Leave it out."
        got = checks.describe(out_sharding)
        raise TypeError(checks.message(function, "out_sharding", rule, got, remedy))
    out = _run(problem, implementation, lhs, *arrays, sizes, offset)
    return out if out_sharding is None else jax.reshard(out, out_sharding)


def gmm(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    preferred_element_type: Any = jnp.float32,
    tiling: Any = (128, 128, 128),
    group_offset: jax.Array | int | None = None,
    existing_out: jax.Array | None = None,
    transpose_rhs: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """`ragged_dot` with the arguments of megablox' `gmm`, in their order.

    Args:
        lhs, rhs, group_sizes, group_offset: as for `ragged_dot`.
        preferred_element_type: the result's dtype. float32 by default, as megablox has it.
        tiling: accepted and ignored: tiles follow from the sizes.
        existing_out: `[m, n]` of the result's dtype: what stands in rows of groups for which rhs has no
            matrix, and behind the last group. None for zeros.
        transpose_rhs: rhs is `[g, n, k]`. Static.
        interpret: accepted and ignored; `ragged_dot(..., implementation="emulator")` runs the kernel in
            Pallas' interpreter.

    Returns:
        `[m, n]`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `ragged_dot`.

    Example:
        >>> lhs = jnp.ones((3, 2), jnp.bfloat16)
        >>> rhs = jnp.ones((2, 2, 1), jnp.bfloat16)
        >>> gmm(lhs, rhs, jnp.array([1, 1]), existing_out=jnp.full((3, 1), 7.0)).tolist()
        [[2.0], [2.0], [7.0]]

    Source: the contract of `jax.experimental.pallas.ops.tpu.megablox.gmm` (Apache-2.0); no code taken.
    """
    del tiling, interpret
    function = "gmm"
    out = ragged_product(
        function,
        lhs,
        rhs,
        group_sizes,
        preferred_element_type=preferred_element_type,
        group_offset=group_offset,
        transpose_rhs=transpose_rhs,
    )
    if existing_out is None:
        return out
    old = arguments.check_array(function, "existing_out", existing_out)
    if old.shape != out.shape or old.dtype != out.dtype:
        rule, got = f"be {checks.describe(out)}", checks.describe(old)
        remedy = "Pass an array like the result."
        raise ValueError(checks.message(function, "existing_out", rule, got, remedy))
    sizes = arguments.check_counts(function, "group_sizes", group_sizes, 0, out.shape[0])
    offset = arguments.check_offset(function, group_offset)
    known = reference.rows_with_matrix(sizes, offset[0], rhs.shape[0], out.shape[0])
    return jnp.where(known[:, None], out, old)


def select_matmul_implementation(
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    *,
    block_size: int,
    num_rows: int | None = None,
    top_k: int | None = None,
    dtype: Any = "bfloat16",
    preferred_element_type: Any = None,
    transpose_rhs: bool = False,
    activation: Activation | None = None,
    gated: bool = True,
    interleaved: bool = False,
    bias: bool = False,
    row_weights: bool = False,
    platform: str | None = None,
    implementation: Implementation | None = None,
) -> Selection:
    """Says what `grouped_matmul` would run for these shapes, and why the others would not.

    Args:
        x_shape: of x, `[P, K]`, or with `top_k` `[T, K]`.
        w_shape: of w, `[E, K, N]`, or of gate and of up, where w is a pair.
        block_size, top_k, preferred_element_type, transpose_rhs, activation, gated, interleaved,
            implementation: as for `grouped_matmul`.
        num_rows: P, where x holds tokens; None for the capacity of `moe_align_block_size`.
        dtype: of x and w. For float8_e4m3fn, scales are those of rows and blocks.
        bias, row_weights: whether there are any.
        platform: "cuda", "cpu", ... for which to lower; None for this process's default backend.

    Returns:
        `Selection(implementation, form, reasons)`. The form names the kernel's tile, rows x columns x depth,
        its stages, and how the warpgroups share it; "loop" for "xla".

    Raises:
        NotImplementedError: the named implementation cannot run for that platform and size.
        TypeError, ValueError: as `grouped_matmul`.

    Example:
        >>> select_matmul_implementation(
        ...     (4096, 2048), (128, 2048, 1536), block_size=128, top_k=8, platform="cuda"
        ... )[:2]
        ('mosaic_gpu', '128x256x64s4m-g4-late')
        >>> select_matmul_implementation((64, 20), (4, 20, 16), block_size=16, platform="cuda")[0]
        'xla'
    """
    function = "select_matmul_implementation"
    select.check_implementation(function, implementation)
    block_size = checks.check_block_size(function, block_size)
    x_shape = arguments.check_shape(function, "x_shape", x_shape, 2)
    w_shape = arguments.check_shape(function, "w_shape", w_shape, 3)
    kinds = (*arguments.DTYPES, str(E4M3))
    x = jax.ShapeDtypeStruct(x_shape, select.check_dtype(function, dtype, kinds))
    weights = arguments.make_weights(
        function,
        transposed=transpose_rhs,
        pair=False,
        activation=activation,
        gated=gated,
        interleaved=interleaved,
        bias=checks.check_bool(function, "bias", bias),
    )
    if top_k is not None:
        top_k = checks.check_positive_int(function, "top_k", top_k, "Pass topk_ids.shape[1].")
    if num_rows is not None:
        remedy = "Pass aligned.sorted_token_ids.shape[0]."
        num_rows = checks.check_int(function, "num_rows", num_rows, 0, remedy)
    w = jax.ShapeDtypeStruct(w_shape, x.dtype)
    if num_rows is None and top_k is not None:
        num_rows = checks.max_num_tokens_padded(
            x_shape[0] * top_k, block_size=block_size, num_experts=max(1, w_shape[0])
        )
    problem = MatmulProblem(
        function,
        "blocks",
        x_shape[0] if num_rows is None else num_rows,
        x_shape[1],
        arguments.result_columns(weights, w),
        w_shape[0],
        str(x.dtype),
        arguments.result_dtype(function, x, preferred_element_type),
        weights,
        block_size=block_size,
        num_tokens=x_shape[0] if top_k else 0,
        top_k=top_k or 0,
        row_weights=checks.check_bool(function, "row_weights", row_weights),
        scales=Scales("row_major", "blocks") if x.dtype == E4M3 else None,
    )
    platform = select.check_platform(function, platform)
    choice, reasons = implementations.choose(function, [problem], platform, implementation)
    if choice == "xla":
        return Selection(choice, "loop", reasons)
    kind = None if choice == "emulator" else select.gpu_kind()
    launched = problem if choice == "emulator" else choose_tiles.as_multiplied(problem, kind)
    return Selection(choice, choose_tiles.config_for(launched, kind).name, reasons)


def _run(problem: MatmulProblem, implementation: Any, *operands: jax.Array) -> jax.Array:
    """Checks what only the arrays say, and multiplies."""
    arguments.check_unsharded(problem.function, problem.inputs, operands)
    arguments.check_memory(problem.function, math.prod(problem.out_shape), problem.out_dtype)
    as_given = tuple(
        x if isinstance(x, jax.Array) else jnp.asarray(np.asarray(x)) for x in operands
    )
    if problem.scales is None:  # e4m3 has no derivative at all
        as_given = reverse_mode_only(problem.function, as_given)
    with in_our_words(problem.function):
        return derivative.run(as_given, problem=problem, implementation=implementation)
