"""Operands that are quantised: (values e4m3, scales). What they are taken apart into, and its checks."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_align_jax._core import checks
from moe_align_jax._core.fp8 import GROUP, GROUPS_PER_WORD
from moe_align_jax._grouped_matmul import arguments
from moe_align_jax._grouped_matmul.problem import E4M3, Scales, Weights

_LAYOUTS = ("row_major", "column_major")
# What a column of scales is padded to a multiple of.
_COLUMN_MULTIPLE = 4


class Checked(NamedTuple):
    """Operands of a product whose dtypes and shapes fit each other.

    Attributes:
        x: the rows, or their values.
        weights: how the weights lie.
        w: one array, or gate and up; or their values.
        scales: how the scales lie; None where nothing is quantised.
        scale_arrays: of x, then of each array of the weights.
    """

    x: Any
    weights: Weights
    w: tuple[Any, ...]
    scales: Scales | None
    scale_arrays: tuple[Any, ...]


def _is_e4m3(value: Any) -> bool:
    """Whether it is an array of e4m3 codes."""
    return str(getattr(value, "dtype", "")) == E4M3


def is_quantized(value: Any) -> bool:
    """Whether it is (values, scales): a pair whose first is e4m3, and whose second is not."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    return _is_e4m3(value[0]) and not _is_e4m3(value[1]) and hasattr(value[1], "dtype")


def check_rows(function: str, argument: str, value: Any, ndim: int) -> tuple[Any, Any]:
    """(x, None), or (values, scales)."""
    if not isinstance(value, (tuple, list)):
        return arguments.check_rows(function, argument, value, ndim), None
    if not is_quantized(value):
        rule = f"be an array, or (values, scales) with {E4M3} values"
        got = f"{type(value).__name__} of {', '.join(map(checks.describe, value)) or 'nothing'}"
        checks.refuse(
            TypeError, function, argument, rule, got, "quantize_rowwise makes such a pair."
        )
    x, scales = value
    arguments.check_array(function, argument, x)
    if x.ndim != ndim:
        rule = f"have values of shape {'[rows, K]' if ndim == 2 else '[e, M, K]'}"
        checks.refuse(
            ValueError, function, argument, rule, x, "Scales follow the shape of the values."
        )
    return x, scales


def split_weights(function: str, argument: str, w: Any) -> tuple[Any, list[Any] | None]:
    """(w, None), or the values (an array, or gate and up) and a list with the scales of each."""
    if is_quantized(w):
        return w[0], [w[1]]
    parts = list(w) if isinstance(w, (tuple, list)) else [w]
    if not any(map(is_quantized, parts)):
        if any(map(_is_e4m3, parts)):
            rule = f"be (values, scales) where it is {E4M3}, each of a pair"
            got = ", ".join(map(checks.describe, parts))
            checks.refuse(
                TypeError, function, argument, rule, got, "quantize_blockwise makes such a pair."
            )
        return w, None
    for i, part in enumerate(parts):
        if not is_quantized(part):
            rule, remedy = "be (values, scales), as the other of the pair is", "Quantise both."
            got = part if hasattr(part, "dtype") else type(part).__name__
            checks.refuse(TypeError, function, f"{argument}[{i}]", rule, got, remedy)
    return tuple(part[0] for part in parts), [part[1] for part in parts]


def check_products(
    function: str, x: Any, w: Any, ndim: int, *, scale_layout: Any, **options: Any
) -> Checked:
    """Of `grouped_matmul` and `masked_grouped_matmul`; `options` are those of the weights."""
    x, x_scales = check_rows(function, "x", x, ndim)
    w, w_scales = split_weights(function, "w", w)
    check_both(function, x_scales, "w", w_scales, options.get("transposed"))
    weights, arrays = arguments.check_weights(function, w, x, **options)
    if x_scales is None or w_scales is None:
        check_unused_layout(function, scale_layout)
        return Checked(x, weights, arrays, None, ())
    rows = x.shape[:-1]
    kind, scales_of_x = check_x_scales(function, x_scales, rows, x.shape[-1], scale_layout)
    names = ["w[0]", "w[1]"] if weights.pair else ["w"]
    of_w, scales_of_w = check_w_scales(function, names, arrays, w_scales)
    scales = kind._replace(w=of_w)
    check_groups(function, "x", scales, x.shape[-1])
    return Checked(x, weights, arrays, scales, (scales_of_x, *scales_of_w))


def check_both(function: str, x_scales: Any, argument: str, w_scales: Any, transposed: Any) -> None:
    """That rows and weights are both quantised or neither; and `[E, N, K]`."""
    if (x_scales is None) != (w_scales is None):
        which, other = ("x", argument) if x_scales is None else (argument, "x")
        rule = f"be (values, scales), as {other} is"
        got = "an array that is not quantised"
        remedy = f"Pass quantize_{'row' if which == 'x' else 'block'}wise({which})."
        checks.refuse(TypeError, function, which, rule, got, remedy)
    if w_scales is not None and transposed is False:
        rule, got = f"be True for {E4M3} weights", "False"
        checks.refuse(ValueError, function, "transpose_rhs", rule, got, arguments.TO_E4M3_LAYOUT)


def check_unused_layout(function: str, scale_layout: Any) -> None:
    """Raises ValueError where a layout of scales is given, but x has none."""
    if scale_layout is not None:
        rule, remedy = "be None but for (values, scales)", "It tells how the scales of x lie."
        got = scale_layout if isinstance(scale_layout, str) else type(scale_layout).__name__
        checks.refuse(ValueError, function, "scale_layout", rule, got, remedy)


def check_groups(function: str, argument: str, scales: Scales, k: int) -> None:
    """That scales of 128 columns fit K."""
    if (scales.x, scales.w) != ("tensor", "tensor") and k % GROUP:
        rule = f"have a K that is a multiple of {GROUP}, as many columns as share a scale"
        remedy = "Pad K with zeros in the values, or quantise with one scale for the whole tensor."
        checks.refuse(ValueError, function, argument, rule, f"K = {k}", remedy)


def _as_array(function: str, argument: str, scales: Any) -> Any:
    """A NumPy scalar is an array here: one scale for a whole tensor."""
    scales = np.asarray(scales) if isinstance(scales, np.generic) else scales
    return arguments.check_array(function, argument, scales)


def check_x_scales(
    function: str, scales: Any, rows: tuple[int, ...], k: int, layout: Any
) -> tuple[Scales, Any]:
    """How the scales of x lie, by their shape, and the array that `MatmulProblem.inputs` names.

    Args:
        function: for messages.
        scales: as they were given.
        rows: `(rows,)`, or `(e, M)`.
        k: columns of x.
        layout: what the caller says about it, or None.
    """
    argument = "scales of x"
    if layout is not None and (not isinstance(layout, str) or layout not in _LAYOUTS):
        rule = f"be None or one of {', '.join(map(repr, _LAYOUTS))}"
        got = layout if isinstance(layout, str) else type(layout).__name__
        checks.refuse(ValueError, function, "scale_layout", rule, got, "It is a static string.")
    scales = _as_array(function, argument, scales)
    if scales.dtype not in (jnp.float32, jnp.int32):
        rule = "be float32, or int32 with four exponents in each"
        checks.refuse(TypeError, function, argument, rule, scales, "Cast them to float32.")
    packed = scales.dtype == jnp.int32
    if not packed and scales.shape in ((), (1,)):
        if layout is not None:
            rule, remedy = "be None for a single scale", "It has no layout."
            checks.refuse(ValueError, function, "scale_layout", rule, layout, remedy)
        return Scales("tensor", ""), scales.reshape(1)
    *lead, most = rows
    groups = checks.cdiv(k, GROUP)
    words = checks.cdiv(groups, GROUPS_PER_WORD) if packed else groups
    as_rows = (*lead, most, words)
    # Rounded up as the casts write it: symbols of an exported program are compared by their form.
    pitches = (most, most + -most % _COLUMN_MULTIPLE)
    as_columns = [(*lead, words, pitch) for pitch in pitches]
    fits = {"row_major": scales.shape == as_rows, "column_major": scales.shape in as_columns}
    fitting = [name for name in _LAYOUTS if fits[name] and layout in (None, name)]
    if not fitting:
        wanted = {"row_major": f"{list(as_rows)}", "column_major": f"{list(as_columns[-1])}"}
        shapes = [f"{wanted[name]} {name}" for name in _LAYOUTS if layout in (None, name)]
        rule = f"have shape {' or '.join(shapes)}"
        if not packed:
            rule += ", or be a scalar"
        remedy = "One scale for each row and 128 columns; quantize_rowwise makes them."
        checks.refuse(ValueError, function, argument, rule, scales, remedy)
    one = most == words == 1  # of each expert, if x is of experts: in both layouts it lies alike
    if len(fitting) == 2 and not one and 0 not in scales.shape:
        rule = "be given where scales fit both layouts"
        got = f"None for scales {checks.describe(scales)} of {most} rows"
        remedy = 'Pass "row_major" or "column_major".'
        checks.refuse(ValueError, function, "scale_layout", rule, got, remedy)
    if fitting[0] == "column_major":
        return Scales("column_major", "", packed, scales.shape[-1]), scales
    return Scales("row_major", "", packed), scales.reshape(-1, words) if lead else scales


def check_w_scales(
    function: str, names: list[str], w: Any, scales: list[Any]
) -> tuple[str, list[Any]]:
    """ "tensor" or "blocks", and the arrays that `MatmulProblem.inputs` names."""
    found, kinds = [], []
    for name, values, each in zip(names, w, scales, strict=True):
        argument = f"scales of {name}"
        each = _as_array(function, argument, each)
        if each.dtype != jnp.float32:
            remedy = "Those of weights are not packed: cast them."
            checks.refuse(TypeError, function, argument, "be float32", each, remedy)
        experts, n, k = values.shape
        blocks = (experts, checks.cdiv(n, GROUP), checks.cdiv(k, GROUP))
        if each.shape == blocks:
            kinds.append("blocks")
            found.append(each)
        elif each.shape in ((), (1,), (experts,)):
            kinds.append("tensor")
            xp = np if isinstance(each, np.ndarray) else jnp
            found.append(xp.broadcast_to(each.reshape(-1), (experts,)).reshape(experts, 1, 1))
        else:
            rule = f"have shape {list(blocks)}, [{experts}] or []"
            remedy = "One scale for each 128 x 128, or for each expert; see quantize_blockwise."
            checks.refuse(ValueError, function, argument, rule, each, remedy)
    if len(set(kinds)) > 1:
        rule, remedy = "be both of blocks, or both of tensors", "Quantise both alike."
        checks.refuse(ValueError, function, f"scales of {names[1]}", rule, scales[1], remedy)
    return kinds[0], found
