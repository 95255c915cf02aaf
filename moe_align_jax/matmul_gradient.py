"""Sums over the rows of each group: the weights' gradient of a grouped product, by its usual names.

`ragged_dot`, `grouped_matmul` and `fused_moe` have their derivatives: training does not need these functions.
They are for code that has a `custom_vjp` of its own.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_align_jax import matmul
from moe_align_jax._core import checks
from moe_align_jax._grouped_matmul import arguments, derivative
from moe_align_jax._grouped_matmul.problem import MatmulProblem, WeightGradient
from moe_align_jax._lowering import select
from moe_align_jax._lowering.reverse_mode import in_our_words, reverse_mode_only
from moe_align_jax.types import Implementation


def tgmm(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    preferred_element_type: Any = jnp.float32,
    tiling: Any = (128, 128, 128),
    group_offset: jax.Array | int | None = None,
    num_actual_groups: int | None = None,
    existing_out: jax.Array | None = None,
    interpret: bool = False,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """`lhs[:, group] @ rhs[group]` for each group of rows, with the arguments of megablox' `tgmm`.

    With lhs the transpose of a grouped product's rows and rhs the cotangent of its result, this is the
    gradient of its weights.

    Args:
        lhs: `[k, m]` bfloat16, float16 or float32: columns of a group follow each other. `x.T`, which is not
            copied.
        rhs: `[m, n]` of lhs' dtype.
        group_sizes: `[G]` any integer dtype: rows of each group. Groups may be empty. Sizes below 0 count as
            0, and rows that rhs does not have are left out.
        preferred_element_type: the result's dtype. Sums are float32, and rounded once.
        tiling: accepted and ignored: tiles follow from the sizes.
        group_offset: the group of the result's first matrix, a scalar or `[1]`; None for 0.
        num_actual_groups: matrices of the result; None for G. Static.
        existing_out: `[num_actual_groups, k, n]` of the result's dtype, to which the sums are added, in
            float32. None for zeros. Donate it to have it updated in place.
        interpret: accepted and ignored: `implementation="emulator"` runs the kernel in Pallas' interpreter.
        implementation: as for `ragged_dot`. "xla" is a loop over tiles of 128 rows. Static.

    Returns:
        `[num_actual_groups, k, n]`; zeros (or existing_out) for an empty group. Rows past the groups' sum,
        and those of other groups, are in no sum: they may be NaN.

    Raises:
        TypeError, ValueError, NotImplementedError: as `ragged_dot`.

    Example:
        >>> x = jnp.array([[1.0], [2.0], [3.0]])
        >>> toward = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> tgmm(x.T, toward, jnp.array([2, 1])).tolist()
        [[[1.0, 2.0]], [[3.0, 3.0]]]

    Source: the contract of `jax.experimental.pallas.ops.tpu.megablox.tgmm` (Apache-2.0); no code taken.
    """
    del tiling, interpret
    return _tgmm(
        "tgmm",
        lhs,
        rhs,
        group_sizes,
        preferred_element_type=preferred_element_type,
        group_offset=group_offset,
        num_actual_groups=num_actual_groups,
        existing_out=existing_out,
        implementation=implementation,
    )


def _tgmm(
    function: str,
    lhs: Any,
    rhs: Any,
    group_sizes: Any,
    *,
    preferred_element_type: Any = None,
    precision: Any = None,
    group_offset: Any = None,
    num_actual_groups: int | None = None,
    existing_out: Any = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    select.check_implementation(function, implementation)
    lhs = arguments.check_rows(function, "lhs", lhs, 2)
    rhs = arguments.check_rows(function, "rhs", rhs, 2)
    if rhs.dtype != lhs.dtype:
        rule, remedy = f"have the dtype of lhs, {lhs.dtype}", "Cast one of them."
        raise TypeError(checks.message(function, "rhs", rule, checks.describe(rhs), remedy))
    if rhs.shape[0] != lhs.shape[1]:
        rule = f"have shape [m, n] with m = {lhs.shape[1]}, as lhs [k, m] has"
        remedy = "Pass the transpose of the rows as lhs."
        raise ValueError(checks.message(function, "rhs", rule, checks.describe(rhs), remedy))
    sizes = arguments.check_counts(function, "group_sizes", group_sizes, 0, rhs.shape[0])
    offset = arguments.check_offset(function, group_offset)
    groups = sizes.shape[0]
    if num_actual_groups is not None:
        remedy = "It is the shape of the result: pass a Python int."
        groups = checks.check_int(function, "num_actual_groups", num_actual_groups, 0, remedy)
    out_dtype = arguments.result_dtype(function, lhs, preferred_element_type)
    layout = MatmulProblem(
        function,
        "ragged",
        rhs.shape[0],
        lhs.shape[0],
        rhs.shape[1],
        groups,
        str(lhs.dtype),
        "float32" if existing_out is not None else out_dtype,
        num_groups=sizes.shape[0],
        precision=arguments.check_precision(function, precision),
    )
    problem = WeightGradient(layout)
    if existing_out is not None:
        existing_out = arguments.check_array(function, "existing_out", existing_out)
        if existing_out.shape != problem.out_shape or str(existing_out.dtype) != out_dtype:
            rule = f"be {out_dtype}{list(problem.out_shape)}"
            got, remedy = checks.describe(existing_out), "Pass an array like the result."
            raise ValueError(checks.message(function, "existing_out", rule, got, remedy))
    operands = (lhs, rhs, sizes, offset)
    arguments.check_unsharded(function, problem.inputs, operands)
    arguments.check_memory(function, math.prod(problem.out_shape), layout.out_dtype)
    lhs, rhs, sizes, offset = (
        x if isinstance(x, jax.Array) else jnp.asarray(np.asarray(x)) for x in operands
    )
    lhs, rhs = reverse_mode_only(function, (lhs, rhs))
    with in_our_words(function):
        found = derivative.run_weight_gradient(
            (lhs.T, rhs, sizes, offset), problem=problem, implementation=implementation
        )
    if existing_out is None:
        return found
    return (jnp.asarray(existing_out).astype(jnp.float32) + found).astype(out_dtype)


def ragged_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    ragged_dot_dimension_numbers: jax.lax.RaggedDotDimensionNumbers,
    precision: Any = None,
    preferred_element_type: Any = None,
    group_offset: jax.Array | int | None = None,
    out_sharding: Any = None,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot_general` of two kinds: a grouped product, and the gradient of its weights.

    Which kind it is follows from the one ragged dimension of lhs:

        not contracted: `ragged_dot`. lhs has two dimensions, rhs three, of which one is the groups'. The
            contracted one of rhs is read where it lies, so that this is also the gradient of the rows.
        contracted: `tgmm`. lhs and rhs have two dimensions, and the result has one more in front, for groups.

    Args:
        lhs, rhs: arrays of one dtype (rhs of the first kind may be float32), as above.
        group_sizes: `[G]` any integer dtype.
        ragged_dot_dimension_numbers: which dimensions are contracted, ragged, and the groups'. No dimension
            of batches: use `jax.vmap`. Static.
        precision, preferred_element_type, group_offset, out_sharding, implementation: as for `ragged_dot`,
            and for `tgmm`, whose result has G matrices.

    Returns:
        `[m, n]`, or `[G, k, n]`.

    Raises:
        TypeError, ValueError: as `ragged_dot`; ValueError for dimensions that lhs or rhs does not have.
        NotImplementedError: other dimensions, or as `ragged_dot`.

    Example:
        >>> numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        >>> x, toward = jnp.array([[1.0], [2.0], [3.0]]), jnp.ones((3, 1))
        >>> ragged_dot_general(x, toward, jnp.array([2, 1]), numbers).tolist()
        [[[3.0]], [[3.0]]]

    Source: the contract of jax 0.12 `jax.lax.ragged_dot_general` (Apache-2.0); no code taken.
    """
    function = "ragged_dot_general"
    lhs = arguments.check_array(function, "lhs", lhs)
    rhs = arguments.check_array(function, "rhs", rhs)
    numbers = ragged_dot_dimension_numbers
    if not isinstance(numbers, jax.lax.RaggedDotDimensionNumbers):
        rule, got = "be a jax.lax.RaggedDotDimensionNumbers", checks.describe(numbers)
        argument = "ragged_dot_dimension_numbers"
        raise TypeError(checks.message(function, argument, rule, got, "Make one."))
    (left, right), batches = numbers.dot_dimension_numbers
    ragged, groups = tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions)
    for name, array, dimensions in (
        ("lhs", lhs, (left, batches[0], ragged)),
        ("rhs", rhs, (right, batches[1], groups)),
    ):
        # A -1 would be taken for the other one of two. The ragged dimension may be a contracted one.
        given = [d for some in dimensions for d in some]
        if any(not 0 <= d < array.ndim for d in given):
            rule, got = f"name dimensions of {name} from 0 to {array.ndim - 1}", str(numbers)
            argument, remedy = "ragged_dot_dimension_numbers", "Count them from 0."
            raise ValueError(checks.message(function, argument, rule, got, remedy))
    if {*right, *batches[1]} & {*groups}:
        rule, got = "name each dimension of rhs once", str(numbers)
        argument, remedy = (
            "ragged_dot_dimension_numbers",
            "A group's is neither contracted nor of a batch.",
        )
        raise ValueError(checks.message(function, argument, rule, got, remedy))
    known = not any(batches) and len(left) == len(right) == len(ragged) == 1 and lhs.ndim == 2
    options: dict[str, Any] = {
        "precision": precision,
        "preferred_element_type": preferred_element_type,
        "group_offset": group_offset,
        "implementation": implementation,
    }
    if known and ragged != tuple(left) and len(groups) == 1 and rhs.ndim == 3:
        [free] = {0, 1, 2} - {*groups, *right}
        # Rows in front; of a matrix, its dimensions as they lie.
        rows = lhs if tuple(left) == (1,) else lhs.T
        transposed = free < right[0]
        matrices = jnp.moveaxis(jnp.asarray(rhs), groups[0], 0)
        return matmul.ragged_product(
            *(function, rows, matrices, group_sizes),
            out_sharding=out_sharding,
            transpose_rhs=transposed,
            **options,
        )
    if known and ragged == tuple(left) and not groups and rhs.ndim == 2:
        columns = lhs if tuple(left) == (1,) else lhs.T
        rows = rhs if tuple(right) == (0,) else rhs.T
        out = _tgmm(function, columns, rows, group_sizes, **options)
        return out if out_sharding is None else jax.reshard(out, out_sharding)
    rule = "be those of rows and matrices, or of rows and rows"
    remedy = "Transpose or flatten the operands, and use jax.vmap over a batch."
    argument, got = "ragged_dot_dimension_numbers", str(numbers)
    raise NotImplementedError(checks.message(function, argument, rule, got, remedy))
