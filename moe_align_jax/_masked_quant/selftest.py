"""Self-test of a compiled kernel against NumPy before its first use: rows of the first two experts."""

from collections.abc import Callable

import ml_dtypes
import numpy as np

from moe_align_jax._core.fp8 import E4M3_MAX
from moe_align_jax._masked_quant.problem import MaskedQuantProblem

_ROWS = 5
_CODES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def arrays(problem: MaskedQuantProblem) -> dict[str, np.ndarray]:
    """Inputs; x ends after its last valid row, and nothing behind it may be read."""
    rng, rows = np.random.default_rng(0), min(_ROWS, problem.max_rows)
    masked_m = np.zeros(problem.num_experts, np.int32)
    masked_m[:2] = (rows, -(-rows // 2))[: problem.num_experts]
    used = problem.max_rows * (min(2, problem.num_experts) - 1) + rows
    x = np.zeros((used, 2 * problem.width), _CODES[problem.dtype])
    for start, count in _valid(problem, masked_m):
        x[start : start + count] = rng.standard_normal((count, 2 * problem.width)) * 3
    return {"x": x, "masked_m": masked_m}


def sizes(problem: MaskedQuantProblem, given: dict[str, np.ndarray]) -> dict[str, int]:
    """Bytes of each output that the trial needs."""
    experts = min(2, problem.num_experts)
    _, one, two = problem.scales_shape
    return {"q": given["x"].shape[0] * problem.width, "scales": experts * one * two * 4}


def mismatch(
    problem: MaskedQuantProblem,
    given: dict[str, np.ndarray],
    read: Callable[[str, np.ndarray], np.ndarray],
) -> str:
    """What is wrong with the results, or "". `read(name, into)` fetches the beginning of an output."""
    x, masked_m = given["x"], given["masked_m"]
    q = read("q", np.empty((x.shape[0], problem.width), np.uint8))
    _, one, two = problem.scales_shape
    shape = (min(2, problem.num_experts), one, two)
    stored = read("scales", np.empty(shape, np.int32 if problem.packed else np.float32))
    scales = _row_major(problem, stored)
    for expert, (start, count) in enumerate(_valid(problem, masked_m)):
        rows = slice(start, start + count)
        codes, want = _expected(problem, x[rows])
        off = np.abs(_steps(q[rows]) - _steps(codes.view(np.uint8)))
        if off.size and off.max() > 1:
            return f"a code of expert {expert} is off by {off.max()} steps"
        got = scales[expert, :count]
        if not np.allclose(got, want, rtol=2**-7, atol=0):
            return f"a scale of expert {expert} is {got.flat[0]}, not {want.flat[0]}, or alike"
    return ""


def _valid(problem: MaskedQuantProblem, masked_m: np.ndarray) -> list[tuple[int, int]]:
    """(first row, rows) of the experts that are compared."""
    return [(i * problem.max_rows, int(n)) for i, n in enumerate(masked_m[:2])]


def _steps(codes: np.ndarray) -> np.ndarray:
    """Codes as integers whose differences count e4m3's values between them."""
    magnitude = (codes & 0x7F).astype(np.int32)
    return np.where(codes & 0x80, -magnitude, magnitude)


def _row_major(problem: MaskedQuantProblem, scales: np.ndarray) -> np.ndarray:
    """`[e, M, G]` float32."""
    if problem.packed:
        exponents = np.ascontiguousarray(scales.transpose(0, 2, 1)).view(np.uint8)
        return np.ldexp(np.float32(1), np.minimum(exponents.astype(np.int32), 254) - 127)
    return scales if problem.scale_layout == "row_major" else scales.transpose(0, 2, 1)


def _expected(problem: MaskedQuantProblem, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """NumPy's (codes, scales) of rows of x."""
    f32, dtype = np.float32, x.dtype
    gate, up = x[:, : problem.width].astype(f32), x[:, problem.width :].astype(f32)
    limit, alpha = problem.swiglu_limit, problem.swiglu_alpha
    if limit is not None:
        bound = f32(limit) if alpha is not None else np.array(limit, dtype).astype(f32)
        gate, up = np.minimum(gate, bound), np.clip(up, -bound, bound)
    if alpha is not None:
        value = gate / (1 + np.exp(-gate * f32(alpha))) * (up + 1)
    else:
        silu = (gate / (1 + np.exp(-gate))).astype(dtype)
        value = (silu * up.astype(dtype)).astype(f32)
    value = value.reshape(len(x), problem.num_groups, problem.group_size)
    scale = np.maximum(np.abs(value).max(axis=-1), f32(problem.amax_floor)) / f32(E4M3_MAX)
    if problem.scale_format != "float32":
        mantissa, exponent = np.frexp(scale)
        scale = np.ldexp(f32(1), exponent - (mantissa == 0.5))
    scaled = np.clip(value / scale[..., None], -E4M3_MAX, E4M3_MAX)
    return scaled.astype(ml_dtypes.float8_e4m3fn).reshape(len(x), -1), scale
