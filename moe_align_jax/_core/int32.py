"""int32, which all our indices are: its greatest value, division, numbers brought into its range."""

from typing import Any

import numpy as np

INT32_MAX = 2**31 - 1


def cdiv(a: Any, b: Any) -> Any:
    """`a / b`, rounded up: of ints, and of a kernel's values that are not negative."""
    return (a + (b - 1)) // b


def round_up(a: Any, b: Any) -> Any:
    """The least multiple of b that is at least a."""
    return cdiv(a, b) * b


def saturate(value: Any, least: int = -1) -> np.int32:
    """An integer of any size as int32: `least` for what is below it, 2**31 - 1 for what is above that."""
    return np.int32(min(max(int(value), least), INT32_MAX))


def narrow_on_host(value: Any, limit: Any) -> Any:
    """A NumPy array of ids as int32, -1 for those outside `[0, limit)`: jax would narrow int64 by wrapping.

    `limit`: one, or an array that broadcasts. What is no NumPy array, or int32 already, is returned as it is.
    """
    if not isinstance(value, np.ndarray) or value.dtype == np.int32:
        return value
    in_range = (value >= 0) & (value < limit)
    # Unsigned types cannot hold -1: narrow first (what wraps is out of range and replaced).
    return np.where(in_range, value.astype(np.int32), np.int32(-1))
