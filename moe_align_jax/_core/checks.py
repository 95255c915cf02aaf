"""Sizes, argument checks and the one template of error messages. No jax here."""

import operator
import sys
from collections.abc import Container, Mapping
from typing import Any, NoReturn, TypeGuard

import numpy as np

from moe_align_jax._core.int32 import INT32_MAX, round_up
from moe_align_jax._core.int32 import cdiv as cdiv

# The remedy for an argument that must be static.
STATIC_REMEDY = "It changes the compiled program, so it is static."


def message(function: str, argument: str, rule: str, got: object, remedy: str) -> str:
    """The text of every error: `{function}: {argument} must {rule}; got {what}. {remedy}`."""
    if isinstance(got, int) and got.bit_length() > _SHOWN_BITS:
        got = _long_int(got)
    if got == "":
        got = "''"
    return f"{function}: {argument} must {rule}; got {got}. {remedy}"


def fail(
    function: str,
    argument: str,
    rule: str,
    got: object,
    remedy: str,
    kind: type[Exception] = ValueError,
) -> NoReturn:
    """Raises our error, of that kind, and not "during the handling of" one of Python's."""
    raise kind(message(function, argument, rule, got, remedy).rstrip()) from None


def refuse(
    kind: type[Exception], function: str, argument: str, rule: str, got: object, remedy: str
) -> NoReturn:
    """As `fail`, of a value as the caller gave it: what is neither text nor a number is described."""
    shown = got if isinstance(got, (str, int)) else describe(got)
    fail(function, argument, rule, shown, remedy, kind)


def describe(value: object) -> str:
    """`dtype [shape]` of an array, otherwise the type and value."""
    try:
        dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    except Exception:  # PyTorch's nested tensors have no shape, and say so
        return f"a {type(value).__name__}"
    # np.float32 itself, a class, has both: they describe its numbers.
    if dtype is not None and shape is not None and not isinstance(value, type):
        kind = "masked " if isinstance(value, np.ma.MaskedArray) else ""
        if not isinstance(value, (np.ndarray, np.generic)) and package_of(value) not in _ARRAYS:
            kind = f"a {type(value).__name__} of "  # else "must be an array; got float32 [4, 8]"
        return f"{kind}{getattr(dtype, 'name', dtype)} {list(shape)}"
    if isinstance(value, int) and value.bit_length() > _SHOWN_BITS:
        return _long_int(value)
    try:
        text = repr(value)
    except (
        Exception
    ):  # it may hold a number of more digits than Python writes, or be anybody's class
        return f"a {type(value).__name__}"
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# Whose arrays are called by their dtype alone.
_ARRAYS = ("jax", "jaxlib", "numpy", "torch")


def package_of(value: object) -> str:
    """The package that its class is from."""
    return type(value).__module__.partition(".")[0]


def array_remedy(value: object, remedy: str = "Pass a jax or NumPy array.") -> str:
    """What to pass in place of a value that is no array: `remedy`, but for arrays in others' wrappings."""
    if package_of(value) == "torch":
        return "Call torch_bridge for PyTorch tensors."
    if not is_array(value) and hasattr(type(value), "__jax_array__"):  # as what jit traces has it
        return "Pass the array that it holds: param[...] of Flax NNX, named.array of haliax."
    return remedy


# Python refuses to write an int of more than 4,300 digits, and nobody reads one of a hundred.
_SHOWN_BITS = 128


def _long_int(value: int) -> str:
    return f"an int of {value.bit_length()} bits"


def is_array(value: object) -> TypeGuard[Any]:
    """Whether it is an array of NumPy or, traced or not, of jax. One with a mask is none: jax refuses it, and
    NumPy's functions would drop the mask. Nor is one of dates or spans of time, which NumPy has among the
    signed integers."""
    if isinstance(value, np.ndarray):
        return not isinstance(value, np.ma.MaskedArray) and value.dtype.kind not in "mM"
    jax = sys.modules.get("jax")  # while it is not imported, nothing is an array of it
    return jax is not None and isinstance(value, jax.Array)


def is_one_of(value: object, names: Container[str]) -> bool:
    """Whether it is one of these strings. `in` alone would compare an array with them, value by value."""
    return isinstance(value, str) and value in names


def shown(value: object) -> str:
    """A string in its quotation marks; what anything else is."""
    return repr(value) if isinstance(value, str) else describe(value)


def is_finite(value: Any) -> bool:
    """Whether a number is a finite float64. (math.isfinite raises for an int beyond, and does not trace.)"""
    if isinstance(value, int):
        return abs(value) <= sys.float_info.max
    return -float("inf") < value < float("inf")


# From it on a number rounds to an infinity of float32.
_BEYOND_FLOAT32 = float(2**128 - 2**103)


def is_finite_float32(value: Any) -> bool:
    """Whether a number that a program computes with in float32 is finite there."""
    number = float(value) if isinstance(value, np.generic) else value
    return abs(number) < _BEYOND_FLOAT32


def leading(shape, rest: str = "...") -> str:
    """`[2, 4, ...]`: a shape of which only the first sizes are numbers."""
    return f"[{', '.join(map(str, (*shape, rest)))}]"


def index(value: object) -> int:
    """The int that a Python int, a NumPy integer or an integer scalar of an array is.

    Raises:
        TypeError: it is anything else: a bool is no int, a float is no index.
    """
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        raise TypeError("a bool")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except ValueError as error:  # some of jax's own, for a traced array
        raise TypeError(str(error)) from None


def check_positive_int(function: str, argument: str, value: object, remedy: str) -> int:
    """A static Python int (or NumPy integer) in [1, 2**31 - 1], as an int: sizes and offsets are int32."""
    return check_int(function, argument, value, 1, remedy)


def check_int(function: str, argument: str, value: object, least: int, remedy: str) -> int:
    """A static Python int (or NumPy integer) in [least, 2**31 - 1], as an int; no bool, no float."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        # ValueError: jax raises it for a traced or non-scalar array (its own kinds of TypeError too).
        raise TypeError(
            message(function, argument, "be a static Python int", describe(value), remedy)
        ) from None
    if number < least:
        raise ValueError(message(function, argument, f"be at least {least}", number, remedy))
    if number > INT32_MAX:
        raise ValueError(message(function, argument, "be at most 2**31 - 1", number, remedy))
    return number


def check_bool(function: str, argument: str, value: object, remedy: str = STATIC_REMEDY) -> bool:
    """A static Python bool (or NumPy's); a string or a number is none."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(message(function, argument, "be a Python bool", describe(value), remedy))
    return bool(value)


def check_bools(function: str, flags: Mapping[str, object], remedy: str = STATIC_REMEDY) -> None:
    """`check_bool` of several arguments, by name."""
    for argument, value in flags.items():
        check_bool(function, argument, value, remedy)


def check_block_size(function: str, value: object) -> int:
    remedy = "Pass the rows per GEMM block (its BLOCK_M), for example 64."
    return check_int(function, "block_size", value, 1, remedy)


def check_num_experts(function: str, value: object) -> int:
    remedy = "Pass the number of global (physical) experts."
    return check_int(function, "num_experts", value, 1, remedy)


def capacity(num_pairs, *, block_size: int, num_experts: int, pad_sorted_ids: bool, minimum=min):
    """P of `max_num_tokens_padded`, unchecked; `minimum` serves symbolic sizes."""
    padded = num_pairs + minimum(num_pairs, num_experts) * (block_size - 1)
    return round_up(padded, block_size) if pad_sorted_ids else padded


def check_fits_int32(function: str, argument: str, value: int, what: str) -> int:
    if value > INT32_MAX:
        raise ValueError(
            message(
                function,
                argument,
                f"give {what} of at most 2**31 - 1",
                value,
                "Offsets are int32: use fewer pairs, fewer experts or a smaller block_size.",
            )
        )
    return value


def max_num_tokens_padded(
    num_pairs: int, *, block_size: int, num_experts: int, pad_sorted_ids: bool = False
) -> int:
    """Rows that `sorted_token_ids` needs in the worst case: P, its static length.

    P = n + min(n, E) * (block_size - 1), the value that vLLM 0.33 computes: each of the at most
    min(n, E) experts in use wastes at most block_size - 1 rows.

    Args:
        num_pairs: n, the number of (token, k) pairs, >= 0.
        block_size: rows per block, >= 1.
        num_experts: E, >= 1.
        pad_sorted_ids: round P up to a multiple of block_size.

    Returns:
        P, 0 for no pairs.

    Raises:
        TypeError: an argument is not an int, or pad_sorted_ids not a bool.
        ValueError: an argument is out of range, or P exceeds int32.

    Example:
        >>> max_num_tokens_padded(8192, block_size=128, num_experts=64)
        16320
        >>> max_num_tokens_padded(8, block_size=16, num_experts=256)
        128
    """
    function = "max_num_tokens_padded"
    block_size = check_block_size(function, block_size)
    num_experts = check_num_experts(function, num_experts)
    pad_sorted_ids = check_bool(function, "pad_sorted_ids", pad_sorted_ids)
    num_pairs = check_int(function, "num_pairs", num_pairs, 0, "Pass topk_ids.size.")
    padded = capacity(
        num_pairs, block_size=block_size, num_experts=num_experts, pad_sorted_ids=pad_sorted_ids
    )
    return check_fits_int32(function, "num_pairs", padded, "a padded length P")
