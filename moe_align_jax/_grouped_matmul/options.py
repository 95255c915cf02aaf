"""Checks of the options that tell how weights lie, and what becomes of their products. No jax here."""

from typing import Any

import numpy as np

from moe_align_jax._core import checks
from moe_align_jax._grouped_matmul.problem import ACTIVATIONS, Weights


def check_flag(function: str, argument: str, value: Any) -> bool:
    """The flag as a bool; it must be a static one."""
    if not isinstance(value, (bool, np.bool_)):
        remedy = "It changes the compiled program: pass True or False."
        checks.refuse(TypeError, function, argument, "be a static bool", value, remedy)
    return bool(value)


def _check_number(function: str, argument: str, value: Any, least: str) -> float:
    """The number as a float; it must be static, a finite float32 and not negative, or "positive"."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        remedy = "It is compiled into the program: pass a Python float."
        checks.refuse(TypeError, function, argument, "be a static number", value, remedy)
    if not checks.is_finite_float32(value) or value < 0 or (least == "positive" and not value):
        remedy = "See its documentation for common values."
        got = value if isinstance(value, int) else str(value)
        rule = f"be None or {least} and a finite float32"
        checks.refuse(ValueError, function, argument, rule, got, remedy)
    return float(value)


def make_weights(
    function: str,
    *,
    transposed: bool = False,
    pair: bool = False,
    activation: str | None = None,
    gated: bool = True,
    interleaved: bool = False,
    swiglu_limit: float | None = None,
    swiglu_alpha: float | None = None,
    bias: bool = False,
) -> Weights:
    """The checked options of the weights."""
    transposed = check_flag(function, "transpose_rhs", transposed)
    gated = check_flag(function, "gated", gated)
    interleaved = check_flag(function, "interleaved", interleaved)
    if activation is not None and not checks.is_one_of(activation, ACTIVATIONS):
        rule = f"be None or one of {', '.join(map(repr, ACTIVATIONS))}"
        got = checks.shown(activation)
        checks.refuse(ValueError, function, "activation", rule, got, "It is a static string.")
    gated = gated and activation is not None
    for argument, value in (("swiglu_limit", swiglu_limit), ("swiglu_alpha", swiglu_alpha)):
        if value is not None and not (gated and activation == "silu"):
            rule = 'be None but for a gated activation "silu"'
            remedy = 'Pass activation="silu", gated=True.'
            checks.refuse(ValueError, function, argument, rule, value, remedy)
    if swiglu_limit is not None:
        swiglu_limit = _check_number(function, "swiglu_limit", swiglu_limit, "at least 0")
    if swiglu_alpha is not None:
        swiglu_alpha = _check_number(function, "swiglu_alpha", swiglu_alpha, "positive")
    if interleaved and (pair or not gated):
        rule = "be False where w does not hold gate and up together"
        remedy = "Leave it out, or pass one array and an activation."
        checks.refuse(ValueError, function, "interleaved", rule, "True", remedy)
    return Weights(
        transposed,
        pair,
        activation,
        gated,
        interleaved,
        swiglu_limit,
        swiglu_alpha,
        bias,
    )
