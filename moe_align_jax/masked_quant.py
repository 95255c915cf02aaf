"""silu_and_mul_masked_quant: the experts' activation and its fp8 quantisation, on valid rows only."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_align_jax._core import checks, fork
from moe_align_jax._lowering import select
from moe_align_jax._lowering.sharding import vary_together
from moe_align_jax._masked_quant import primitive
from moe_align_jax._masked_quant.problem import (
    FORMATS,
    GROUPS_PER_WORD,
    LAYOUTS,
    LEAST_FLOOR,
    MaskedQuantProblem,
    ScaleFormat,
    ScaleLayout,
)
from moe_align_jax.types import Implementation, Selection

_DTYPES = ("bfloat16", "float16")


def silu_and_mul_masked_quant(
    x: jax.Array,
    masked_m: jax.Array,
    *,
    group_size: int = 128,
    scale_format: ScaleFormat = "float32",
    scale_layout: ScaleLayout | None = None,
    swiglu_limit: float | None = None,
    swiglu_alpha: float | None = None,
    amax_floor: float = 1e-10,
    divide: bool = False,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`silu(gate) * up` of each expert's valid rows, as e4m3 codes with a scale per group.

    The layout of low-latency expert parallelism: expert i has `masked_m[i]` valid rows of M. The kernel reads
    and writes those alone, so its cost follows `sum(masked_m)`. With u the dtype of x, in this order:

        silu  = u(gate / (1 + exp(-gate)))                       in float32, rounded once
        value = silu * up                                        in u
        scale = max(max(|value|), amax_floor) / 448              over a group, rounded once to float32
        q     = e4m3(clip(value * (1 / scale), -448, 448))       to nearest even

    Args:
        x: `[e, M, 2 N]` bfloat16 or float16. Gate is the first N of a row, up the last N.
        masked_m: `[e]` any integer dtype, valid rows of each expert; clamped to [0, M].
        group_size: values that share a scale; N is a multiple of it. Static.
        scale_format: "float32"; "ue8m0", the power of two at or above it, as float32; or "ue8m0_packed",
            the exponents of the latter: byte i of word j is that of group 4 j + i, of value 2**(byte - 127).
            Packed scales need N / group_size to be a multiple of 4.
        scale_layout: "row_major" `[e, M, G]` (the default), or "column_major" `[e, G, round_up(M, 4)]`, whose
            transpose is what TMA reads. Packed scales are column-major, `[e, G / 4, M]`, and nothing else.
        swiglu_limit: bound: `min(gate, limit)` and `clip(up, -limit, limit)` come first, with the limit
            rounded to x's dtype. Static.
        swiglu_alpha: the other SwiGLU: `gate * sigmoid(alpha * gate) * (up + 1)`, after the bound, all of it
            in float32. Static.
        amax_floor: least maximum of a group: 1e-10 as SGLang's kernel has it, 1e-4 as DeepEP and DeepGEMM.
        divide: `value / scale`, as per-token-group quantisation does, instead of `value * (1 / scale)`.
        implementation: None for the best available ("mosaic_gpu" on a Hopper or newer GPU for sizes that its
            kernel takes, else "xla"), or a name, which runs or raises. Static.

    Returns:
        `(q, scales)`: `[e, M, N]` float8_e4m3fn; float32 scales, or int32 if packed. What stands in rows at
        or past `masked_m` is unspecified ("xla" puts zeros). A group with an infinity or a NaN has codes
        and a scale that are unspecified. A scale is the correctly rounded quotient of its group's greatest
        value on every implementation. Values differ where `exp` does, in the last bit now and then: then by
        one step of a code, or of a scale's value in x's dtype. The kernel's `1 / scale` and `value / scale`
        are the GPU's, good to two units in the last place: a code may differ by one step.

    Raises:
        TypeError: x or masked_m has another dtype, or an option is not static.
        ValueError: shapes do not fit each other or the group size, or an option is out of range.
        NotImplementedError: the named implementation cannot run here (eagerly at the call, under jit at
            lowering); the message says why. There is no derivative either.

    Example:
        >>> x = jnp.ones((2, 4, 256), jnp.bfloat16)
        >>> q, scales = silu_and_mul_masked_quant(x, jnp.array([1, 0]))
        >>> q.shape, str(q.dtype), float(q[0, 0, 0]), scales.shape
        ((2, 4, 128), 'float8_e4m3fn', 448.0, (2, 4, 1))

    Source: contract of SGLang 0.5.23 `silu_and_mul_masked_post_quant_fwd` (Apache-2.0) and DeepEP's casts; no
    code taken.
    """
    function = MaskedQuantProblem.name
    fork.check(function)
    select.check_implementation(function, implementation)
    x, masked_m = _check_arrays(function, x, masked_m)
    problem = make_problem(
        function,
        x.shape,
        str(x.dtype),
        group_size=group_size,
        scale_format=scale_format,
        scale_layout=scale_layout,
        swiglu_limit=swiglu_limit,
        swiglu_alpha=swiglu_alpha,
        amax_floor=amax_floor,
        divide=divide,
    )
    _check_explicitly_sharded(function, x, masked_m)
    return _run(x, masked_m, problem=problem, implementation=implementation)


def select_quant_implementation(
    shape: tuple[int, int, int],
    *,
    dtype: Any = "bfloat16",
    platform: str | None = None,
    implementation: Implementation | None = None,
    **options: Any,
) -> Selection:
    """Says what `silu_and_mul_masked_quant` would run on x of this shape, and why the others would not.

    Args:
        shape: of x, `(e, M, 2 N)`.
        dtype: of x.
        platform: as for `select_implementation`.
        implementation: as for `silu_and_mul_masked_quant`.
        options: its other options.

    Returns:
        `Selection(implementation, form, reasons)`; the form names the kernel's tile, "whole" for "xla".

    Raises:
        NotImplementedError: the named implementation cannot run for that platform and size.
        TypeError, ValueError: as `silu_and_mul_masked_quant`.

    Example:
        >>> select_quant_implementation((32, 1024, 4096), platform="cuda")[0]
        'mosaic_gpu'
        >>> select_quant_implementation((32, 1024, 4096), platform="cuda", group_size=64)[0]
        'xla'
    """
    function = "select_quant_implementation"
    select.check_implementation(function, implementation)
    remedy = "Pass the shape of x, (e, M, 2 N)."
    if not isinstance(shape, (tuple, list)) or len(shape) != 3:
        rule, got = "be three ints", checks.describe(shape)
        raise TypeError(checks.message(function, "shape", rule, got, remedy))
    sizes = [checks.check_int(function, "shape", size, 0, remedy) for size in shape]
    shape = (sizes[0], sizes[1], sizes[2])
    named = {"scale_format": "float32", "group_size": 128, "scale_layout": None}
    dtype = select.check_dtype(function, dtype, _DTYPES).name
    known = inspect.signature(make_problem).parameters
    if unknown := [name for name in options if name not in known or name in ("function", "dtype")]:
        rule, remedy = "be those of silu_and_mul_masked_quant", "See its documentation."
        raise TypeError(checks.message(function, "options", rule, unknown, remedy))
    problem = make_problem(function, shape, dtype, **(named | options))
    platform = select.check_platform(function, platform)
    unsupported = functools.partial(primitive.unsupported, problem)
    choice = select.choose(function, platform, implementation, unsupported)
    better = "the Mosaic GPU kernel runs here, and reads valid rows only"
    reasons = select.reasons_against_others(
        choice, platform, implementation, unsupported, better=better
    )
    if choice == "xla":
        return Selection(choice, "whole", reasons)
    from moe_align_jax._masked_quant import launch as kernels

    return Selection(choice, kernels.config_for(problem).form, reasons)


# -- checks ----------------------------------------------------------------------------------------


def _check_arrays(function: str, x: Any, masked_m: Any) -> tuple[jax.Array, jax.Array]:
    given = {"x": x, "masked_m": masked_m}
    for argument, array in given.items():
        if not checks.is_array(array):
            remedy = checks.array_remedy(array)
            rule = "be an array"
            got = checks.describe(array)
            raise TypeError(checks.message(function, argument, rule, got, remedy))
    if str(x.dtype) not in _DTYPES:
        remedy = "Pass the grouped GEMM's output in one of these."
        rule, got = "be bfloat16 or float16", checks.describe(x)
        raise TypeError(checks.message(function, "x", rule, got, remedy))
    if not jnp.issubdtype(masked_m.dtype, jnp.integer):
        remedy = "Pass the number of valid rows of each expert."
        rule, got = "be an integer array", checks.describe(masked_m)
        raise TypeError(checks.message(function, "masked_m", rule, got, remedy))
    if x.ndim != 3 or x.shape[-1] % 2:
        remedy = "Each row holds gate, then up."
        rule, got = "have shape [e, M, 2 N]", checks.describe(x)
        raise ValueError(checks.message(function, "x", rule, got, remedy))
    if masked_m.shape != x.shape[:1]:
        remedy = "Pass one count per expert of x."
        rule, got = f"have shape [{x.shape[0]}]", checks.describe(masked_m)
        raise ValueError(checks.message(function, "masked_m", rule, got, remedy))
    return jnp.asarray(x), _narrow(masked_m, x.shape[1])


def _narrow(masked_m: Any, rows: Any) -> jax.Array:
    """`masked_m` as int32 in [0, rows], clamped before it is narrowed; rows may be a symbol."""
    if not isinstance(rows, int):
        rows = checks.INT32_MAX  # what runs clamps to the rows
    if isinstance(masked_m, np.ndarray):
        rows = min(rows, int(jnp.iinfo(masked_m.dtype).max))
        return jnp.asarray(np.clip(masked_m, 0, rows).astype(np.int32))
    if masked_m.dtype == jnp.int32:
        return masked_m  # the kernel clamps: no additional operation here
    info = jnp.iinfo(masked_m.dtype)
    low, high = (jnp.asarray(v, masked_m.dtype) for v in (0, min(rows, info.max)))
    return jnp.clip(masked_m, low, high).astype(jnp.int32)


def _check_explicitly_sharded(function: str, *arrays: jax.Array) -> None:
    """With Explicit mesh axes a custom kernel has no rule of its own for a sharded operand."""
    for argument, array in zip(("x", "masked_m"), arrays, strict=True):
        sharding = getattr(jax.typeof(array), "sharding", None)
        spec = getattr(sharding, "spec", ())
        if any(axes is not None for axes in spec):
            rule, got = "not be sharded over Explicit mesh axes", f"{spec}"
            remedy = "Call it inside jax.shard_map, over the axis that the experts lie on."
            raise ValueError(checks.message(function, argument, rule, got, remedy))


def make_problem(
    function: str,
    shape: tuple[int, ...],
    dtype: str,
    *,
    group_size: int,
    scale_format: str,
    scale_layout: str | None,
    swiglu_limit: float | None = None,
    swiglu_alpha: float | None = None,
    amax_floor: float = 1e-10,
    divide: bool = False,
) -> MaskedQuantProblem:
    """The checked problem of x's shape and dtype, and the options."""
    remedy = "Pass how many values share a scale, for example 128."
    group_size = checks.check_positive_int(function, "group_size", group_size, remedy)
    _check_choice(function, "scale_format", scale_format, FORMATS)
    if scale_layout is None:
        scale_layout = "column_major" if scale_format == "ue8m0_packed" else "row_major"
    _check_choice(function, "scale_layout", scale_layout, LAYOUTS)
    if scale_format == "ue8m0_packed" and scale_layout != "column_major":
        rule, remedy = "be column_major for packed scales", "Leave it out."
        message = checks.message(function, "scale_layout", rule, repr(scale_layout), remedy)
        raise ValueError(message)
    experts, rows, width = shape[0], shape[1], shape[2] // 2
    if width % group_size or not width:
        rule = f"have a last dimension of 2 N, with N a positive multiple of {group_size}"
        remedy = "Pad N, or pass another group_size."
        raise ValueError(checks.message(function, "x", rule, list(shape), remedy))
    if scale_format == "ue8m0_packed" and width // group_size % GROUPS_PER_WORD:
        rule = f"have N a multiple of {GROUPS_PER_WORD * group_size} for packed scales"
        raise ValueError(checks.message(function, "x", rule, list(shape), 'Use "ue8m0".'))
    if not isinstance(divide, (bool, np.bool_)):
        rule, got = "be a static bool", checks.describe(divide)
        remedy = "Pass True or False."
        raise TypeError(checks.message(function, "divide", rule, got, remedy))
    rule = f"be at least {LEAST_FLOOR} and a finite float32"
    floor = _check_number(function, "amax_floor", amax_floor, rule, lambda v: v >= LEAST_FLOOR)
    limit, alpha = swiglu_limit, swiglu_alpha
    if limit is not None:
        rule = "be None or at least 0 and a finite float32"
        limit = _check_number(function, "swiglu_limit", limit, rule, lambda v: v >= 0)
    if alpha is not None:
        rule = "be None or positive and a finite float32"
        alpha = _check_number(function, "swiglu_alpha", alpha, rule, lambda v: v > 0)
    return MaskedQuantProblem(
        experts,
        rows,
        width,
        dtype,
        group_size,
        scale_format,
        scale_layout,
        limit,
        alpha,
        floor,
        bool(divide),
    )


def _check_choice(function: str, argument: str, value: object, choices: tuple[str, ...]) -> None:
    if not checks.is_one_of(value, choices):
        rule = f"be one of {', '.join(map(repr, choices))}"
        got, remedy = checks.shown(value), "It is a static string."
        raise ValueError(checks.message(function, argument, rule, got, remedy))


def _check_number(function: str, argument: str, value: Any, rule: str, holds: Any) -> float:
    """A static number that is finite in float32, as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        remedy = "It is compiled into the kernel: pass a Python float."
        got = checks.describe(value)
        raise TypeError(checks.message(function, argument, "be a static number", got, remedy))
    if not checks.is_finite_float32(value) or not holds(value):
        remedy = "See its documentation for common values."
        raise ValueError(checks.message(function, argument, rule, value, remedy))
    return float(value)


# -- what runs -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("problem", "implementation"))
def _run(x, masked_m, *, problem: MaskedQuantProblem, implementation: str | None):
    with jax.named_scope(problem.name):
        if implementation == "emulator" and x.size:
            # Pallas' interpreter works by ordered callbacks, which no lowering rule can emit.
            return _emulate(problem, x, masked_m)
        operands = vary_together([x, masked_m])
        return tuple(
            primitive.masked_quant_p.bind(*operands, problem=problem, implementation=implementation)
        )


def _emulate(problem: MaskedQuantProblem, x, masked_m):
    from moe_align_jax._masked_quant import launch as kernels

    if reason := kernels.unsupported(problem):
        raise select.not_implemented(problem.name, "emulator", reason)
    return tuple(kernels.run(problem, x, masked_m, interpret=True))
