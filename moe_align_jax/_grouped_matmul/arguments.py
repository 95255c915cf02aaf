"""Checks of the arguments that the grouped matrix multiplications share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from moe_align_jax._core import checks
from moe_align_jax._core.int32 import INT32_MAX, saturate
from moe_align_jax._grouped_matmul.options import make_weights
from moe_align_jax._grouped_matmul.problem import E4M3, MatmulProblem, Weights
from moe_align_jax._lowering import select
from moe_align_jax._lowering.sharding import replicate, vary_together

DTYPES = ("bfloat16", "float16", "float32")
# wgmma reads e4m3 along K alone.
TO_E4M3_LAYOUT = (
    "They are [E, N, K]: ExpertWeights.laid_out(transpose_rhs=True) turns a layer's, with scales."
)


def check_array(function: str, argument: str, value: Any) -> Any:
    """The value, which must be an array of NumPy or jax."""
    if not checks.is_array(value):
        remedy = checks.array_remedy(value)
        checks.refuse(TypeError, function, argument, "be an array", value, remedy)
    return value


def check_rows(function: str, argument: str, value: Any, ndim: int) -> Any:
    """x: `[rows, K]`, or `[e, M, K]`."""
    value = check_array(function, argument, value)
    if str(value.dtype) not in DTYPES:
        rule, remedy = f"be one of {', '.join(DTYPES)}", "Cast it, and the weights."
        if value.dtype == E4M3:
            remedy = "Pass (values, scales), as quantize_rowwise makes them."
        checks.refuse(TypeError, function, argument, rule, value, remedy)
    if value.ndim != ndim:
        shape = "[rows, K]" if ndim == 2 else "[e, M, K]"
        remedy = "Flatten the axes in front of the rows." if ndim == 2 else "One axis per expert."
        checks.refuse(ValueError, function, argument, f"have shape {shape}", value, remedy)
    return value


def check_weights(
    function: str, w: Any, x: Any, *, argument: str = "w", **options: Any
) -> tuple[Weights, tuple[Any, ...]]:
    """The options, and the array or the pair of them, which fit x."""
    pair = isinstance(w, (tuple, list))
    weights = make_weights(function, pair=pair, **options)
    if pair and not weights.gated:
        rule = "be one array but for a gated activation"
        got = f"{type(w).__name__} of {len(w)}"
        remedy = "Pass one array, or activation= with gated=True."
        checks.refuse(ValueError, function, argument, rule, got, remedy)
    if pair and len(w) != 2:
        rule, got = "be an array or a pair (gate, up)", f"{type(w).__name__} of {len(w)}"
        checks.refuse(ValueError, function, argument, rule, got, "Pass gate and up.")
    arrays = tuple(
        check_array(function, f"{argument}[{i}]" if pair else argument, each)
        for i, each in enumerate(w if pair else (w,))
    )
    shape = "[E, N, K]" if weights.transposed else "[E, K, N]"
    if weights.gated and not pair:
        shape = shape.replace("N", "2 N")
    k = x.shape[-1]
    for i, each in enumerate(arrays):
        name = f"{argument}[{i}]" if pair else argument
        if each.dtype not in (x.dtype, np.float32):
            rule = f"have the dtype of the rows, {x.dtype}, or float32"
            checks.refuse(TypeError, function, name, rule, each, "Cast one of them.")
        if each.ndim != 3 or each.shape[2 if weights.transposed else 1] != k:
            rule = f"have shape {shape} with K = {k}"
            other = "transpose_rhs=False" if weights.transposed else "transpose_rhs=True"
            remedy = f"Pass {other} where K is the other axis."
            if each.dtype == E4M3:
                remedy = TO_E4M3_LAYOUT
            checks.refuse(ValueError, function, name, rule, each, remedy)
        if each.shape != arrays[0].shape:
            rule = f"have the shape of gate, {list(arrays[0].shape)}"
            checks.refuse(ValueError, function, name, rule, each, "Pass gate and up.")
        if weights.gated and not pair and each.shape[1 if weights.transposed else 2] % 2:
            rule = f"have shape {shape}"
            checks.refuse(ValueError, function, name, rule, each, "It holds gate and up.")
    return weights, arrays


def result_columns(weights: Weights, w: Any) -> int:
    """N."""
    columns = w.shape[1 if weights.transposed else 2]
    return columns // 2 if weights.gated and not weights.pair else columns


def result_dtype(function: str, x: Any, preferred: Any) -> str:
    """The name of the result's dtype: the preferred one, else that of x, of which e4m3 becomes bfloat16."""
    if preferred is None:
        return "bfloat16" if x.dtype == E4M3 else str(x.dtype)
    dtype = select.dtype_of(preferred)
    name = checks.shown(preferred) if dtype is None else dtype.name
    if name not in DTYPES:
        rule = f"be None or one of {', '.join(DTYPES)}"
        remedy = "Cast the result instead."
        checks.refuse(TypeError, function, "preferred_element_type", rule, name, remedy)
    return name


def check_precision(function: str, precision: Any) -> Any:
    """Anything that `jax.lax.dot` takes; a list of two as a tuple."""
    precision = tuple(precision) if isinstance(precision, list) else precision
    if precision is not None and not _is_precision(precision):
        rule, remedy = "be static, and one that jax.lax.dot takes", "Pass None or 'highest'."
        checks.refuse(TypeError, function, "precision", rule, checks.shown(precision), remedy)
    return precision


def _is_precision(value: Any) -> bool:
    """Whether jax's dot products take it as their `precision`."""
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    try:
        hash(value)
        jax.eval_shape(lambda x: jax.lax.dot(x, x, precision=value), one)
    except Exception:  # jax asks for the value's repr, which is anybody's
        return False
    return True


def check_aligned(function: str, aligned: Any, block_size: int) -> list[Any]:
    """`[sorted_token_ids [P], expert_ids [B], num_tokens_post_padded [1]]` int32."""
    found = []
    for name in ("sorted_token_ids", "expert_ids", "num_tokens_post_padded"):
        value = getattr(aligned, name, None)
        argument = f"aligned.{name}"
        if value is None:
            remedy = "Pass what moe_align_block_size returned."
            rule = "be an AlignedBlocks"
            checks.refuse(TypeError, function, "aligned", rule, aligned, remedy)
        value = check_array(function, argument, value)
        if value.dtype != np.int32:
            remedy = "Pass what moe_align_block_size returned."
            checks.refuse(TypeError, function, argument, "be an int32 array", value, remedy)
        found.append(value)
    ids, experts, used = found
    if ids.ndim != 1:
        remedy = "Call jax.vmap for several alignments."
        checks.refuse(
            ValueError, function, "aligned.sorted_token_ids", "have shape [P]", ids, remedy
        )
    blocks = -(-ids.shape[0] // block_size)  # as the alignment writes it, of symbolic sizes too
    if experts.shape != (blocks,):
        rule = f"be the alignment's, with cdiv(P, block_size) = {experts.shape[0]} blocks"
        if experts.ndim != 1:
            rule = "be the alignment's"
        got = f"{block_size}: {blocks} blocks for P = {ids.shape[0]}"
        remedy = "Pass the block_size that aligned was made with."
        checks.refuse(ValueError, function, "block_size", rule, got, remedy)
    if used.size != 1:
        argument, rule = "aligned.num_tokens_post_padded", "have shape [1]"
        remedy = "Pass what moe_align_block_size returned."
        checks.refuse(ValueError, function, argument, rule, used, remedy)
    return [ids, experts, used.reshape(1)]


def check_pairs(function: str, pairs: int, aligned: Any, num_rows: int) -> None:
    """That x's tokens, each with top_k pairs, are those that were aligned."""
    inverse = getattr(aligned, "row_of_pair", None)
    if inverse is None:
        is_off, rule = pairs > num_rows, f"give at most {num_rows} pairs, P of aligned,"
    else:
        is_off, rule = pairs != inverse.size, f"give {inverse.size} pairs, as aligned has,"
    if is_off:
        got = f"{pairs}"
        remedy = "Pass x [T, K] and top_k of the topk_ids [T, top_k] that were aligned."
        checks.refuse(ValueError, function, "x", f"{rule} with top_k", got, remedy)


def pairs_of(aligned: Any, ids: Any) -> tuple[Any, int]:
    """(sorted_token_ids, the bound below which they are pairs) of an alignment, of which x has the rows.

    The alignment may be cut to the rows in use, so that its last slot holds a pair. The inverse tells how
    many pairs there are. Without it, the counts tell whether any slot is padding: if so, it holds the
    greatest id. Padding becomes -1 then. Without counts, and for a number of pairs that only a run knows,
    the bound is 0: the last slot tells.
    """
    inverse = getattr(aligned, "row_of_pair", None)
    if inverse is not None:
        return ids, inverse.size if isinstance(inverse.size, int) else 0
    counts = getattr(aligned, "tokens_per_expert", None)
    if counts is None:
        return ids, 0
    return _without_padding(ids, counts), INT32_MAX


@jax.jit
def _without_padding(ids: jax.Array, counts: jax.Array) -> jax.Array:
    """The ids, -1 in place of padding: known by its value, which is above all pairs."""
    ids, counts = vary_together([jnp.asarray(ids), replicate(jnp.asarray(counts))])
    bound = jnp.max(ids, initial=-1)
    full = jnp.sum(counts, dtype=jnp.int32) >= ids.shape[0]
    return jnp.where(full | (ids < bound), ids, -1)


def check_order(function: str, where: Any, pairs: int, block_size: int, num_experts: int) -> None:
    """That the pairs of each block in use stand ahead of its padding: the kernels count on it.

    Nothing is checked under jit, and of arrays on a GPU, for which the host would have to wait.

    Args:
        function: for the message.
        where: of `check_aligned`.
        pairs: ids below it are pairs; 0 where the last slot tells it.
        block_size: rows per block.
        num_experts: E, of the weights.
    """
    if block_size == 1 or not all(map(is_on_host, where)):
        return
    ids, experts, used = map(np.asarray, where)
    blocks = min(max(checks.cdiv(int(used[0]), block_size), 0), experts.size)
    if not blocks:
        return
    bound, ids = pairs or ids[-1], ids[: blocks * block_size]
    held = np.zeros(blocks * block_size, bool)
    held[: ids.size] = (ids >= 0) & (ids < bound)
    held = held.reshape(blocks, block_size)
    late = held[:, 1:] & ~held[:, :-1]
    late &= ((experts[:blocks] >= 0) & (experts[:blocks] < num_experts))[:, None]
    if late.any():
        block, row = np.argwhere(late)[0].tolist()
        rule = "have the pairs of each block ahead of its padding"
        slot = block * block_size + row
        got = f"padding in slot {slot} and pair {ids[slot + 1]} in slot {slot + 1}"
        remedy = "Align with moe_align_block_size, or move the padding to the block's end."
        checks.refuse(ValueError, function, "aligned.sorted_token_ids", rule, got, remedy)


def check_inverse(function: str, pair_of_row: Any, row_of_pair: Any) -> None:
    """That each pair lies in the row that the inverse names, or in none: checked as `check_order` is."""
    if not all(map(is_on_host, (pair_of_row, row_of_pair))):
        return
    ids, rows = np.asarray(pair_of_row), np.asarray(row_of_pair).reshape(-1)
    [kept] = np.nonzero(rows >= 0)
    there = rows[kept] < ids.size
    there[there] = ids[rows[kept[there]]] == kept[there]
    if not there.all():
        pair = int(kept[np.argmin(there)])
        row = int(rows[pair])
        rule = "be the inverse of aligned.sorted_token_ids"
        holds = f"which holds {ids[row]}" if row < ids.size else f"of {ids.size} rows"
        remedy = "Change both, or align with moe_align_block_size(..., return_inverse=True)."
        got = f"pair {pair} in row {row}, {holds}"
        checks.refuse(ValueError, function, "aligned.row_of_pair", rule, got, remedy)


def is_on_host(value: Any) -> bool:
    """Whether an array's values are known now, in the host's memory: not traced, and not on a GPU."""
    if isinstance(value, np.ndarray):
        return True
    known = isinstance(value, jax.Array) and not isinstance(value, Tracer)
    return (
        known
        and value.is_fully_addressable
        and all(device.platform == "cpu" for device in value.devices())
    )


def check_counts(function: str, argument: str, value: Any, least: int, most: int) -> Any:
    """int32 `[n]`; wider ones clamped in their own dtype."""
    value = check_array(function, argument, value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        remedy = "Pass the number of rows of each."
        checks.refuse(TypeError, function, argument, "be an integer array", value, remedy)
    if value.ndim != 1:
        checks.refuse(ValueError, function, argument, "have one axis", value, "One count for each.")
    return _clamp(value, least, most)


def _clamp(value: Any, least: int, most: int) -> Any:
    """int32, of any integer dtype: what lies beyond the bounds becomes the bound before it is narrowed."""
    if value.dtype == jnp.int32 and isinstance(value, jax.Array):
        return value  # the kernels clamp
    info = jnp.iinfo(value.dtype)
    # The rows of an exported program may be a symbol: then int32 is the bound, and the products clamp.
    bound = most if isinstance(most, int) else INT32_MAX
    low, high = max(least, int(info.min)), min(bound, int(info.max))
    if isinstance(value, np.ndarray):
        return np.clip(value, low, high).astype(np.int32)
    bounds = (jnp.asarray(bound, value.dtype) for bound in (low, high))
    return jnp.clip(value, *bounds).astype(jnp.int32)


def check_offset(function: str, value: Any) -> Any:
    """int32 `[1]`."""
    if value is None:
        return np.zeros(1, np.int32)
    remedy = "Pass the group that rhs[0] belongs to."
    if not checks.is_array(value):
        try:
            value = np.asarray(saturate(checks.index(value), -INT32_MAX))
        except TypeError:
            rule = "be an integer"
            checks.refuse(TypeError, function, "group_offset", rule, value, remedy)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        checks.refuse(TypeError, function, "group_offset", "be an integer", value, remedy)
    if value.shape not in ((), (1,)):
        checks.refuse(ValueError, function, "group_offset", "be a scalar or [1]", value, remedy)
    return _clamp(value, -INT32_MAX, INT32_MAX).reshape(1)


def check_extras(
    function: str, problem: MatmulProblem, bias: Any, row_weights: Any
) -> list[jax.Array]:
    """bias and row weights, those that there are, as float32."""
    found = []
    for argument, value in (("bias", bias), ("row_weights", row_weights)):
        if value is None:
            continue
        value = check_array(function, argument, value)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            rule, remedy = "be a float array", "It is used as float32."
            checks.refuse(TypeError, function, argument, rule, value, remedy)
        shape, _ = problem.inputs[argument]
        if value.shape != shape:
            rule = f"have shape {list(shape)}"
            remedy = (
                "One value for each column of w." if argument == "bias" else "One for each row."
            )
            checks.refuse(ValueError, function, argument, rule, value, remedy)
        found.append(value.astype(np.float32))
    return found


def check_shape(function: str, argument: str, value: Any, length: int) -> tuple[int, ...]:
    """The shape of an array, or a shape as it is: it must have that many sizes, none below 0."""
    shape = getattr(value, "shape", value)
    try:
        shape = tuple(map(checks.index, shape))
    except TypeError:
        remedy = "Pass an array, or its shape."
        rule = "be a shape"
        checks.refuse(TypeError, function, argument, rule, value, remedy)
    if len(shape) != length or min(shape) < 0:
        rule = f"have {length} sizes of at least 0"
        checks.refuse(ValueError, function, argument, rule, str(list(shape)), "Pass all of them.")
    return shape


def check_unsharded(function: str, names: Any, operands: tuple[Any, ...]) -> None:
    """With Explicit mesh axes a custom kernel has no rule of its own for a sharded operand."""
    for argument, array in zip(names, operands, strict=True):
        if not isinstance(array, jax.Array):
            continue
        spec = getattr(getattr(jax.typeof(array), "sharding", None), "spec", ())
        if any(axes is not None for axes in spec):
            rule, remedy = "not be sharded over Explicit mesh axes", "Call it inside jax.shard_map."
            checks.refuse(ValueError, function, argument, rule, str(spec), remedy)


def check_memory(function: str, values: Any, dtype: str) -> None:
    """That one device could hold the result at all."""
    if not isinstance(values, int):
        return  # of a symbolic shape
    needed = values * jnp.dtype(dtype).itemsize
    try:
        stats = jax.local_devices()[0].memory_stats() or {}
    except (RuntimeError, NotImplementedError):  # a backend that does not tell
        stats = {}
    limit = stats.get("bytes_limit", 2**47)
    if needed > limit:
        rule = f"fit the {limit / 1e9:.1f} GB of a device"
        got = f"{needed / 1e9:.1f} GB"
        remedy = "Use fewer rows at a time, or a smaller dtype."
        checks.refuse(ValueError, function, "the result", rule, got, remedy)
