"""silu_and_mul_masked_quant by NumPy, row by row, and the rule that codes are compared by."""

import ml_dtypes
import numpy as np

E4M3 = ml_dtypes.float8_e4m3fn


def row_values(gate, up, dtype, limit=None, alpha=None):
    """float32 values of one row before quantisation. Every step is rounded where the contract says."""
    f32 = np.float32
    with np.errstate(over="ignore", under="ignore"):
        if alpha is not None:
            gate, up = gate.astype(f32), up.astype(f32)
            if limit is not None:
                gate, up = np.minimum(gate, f32(limit)), np.clip(up, -f32(limit), f32(limit))
            return gate / (f32(1) + np.exp(-(gate * f32(alpha)))) * (up + f32(1))
        if limit is not None:
            bound = np.array(limit, dtype)
            gate, up = np.minimum(gate, bound), np.maximum(np.minimum(up, bound), -bound)
        gate = gate.astype(f32)
        silu = (gate / (f32(1) + np.exp(-gate))).astype(dtype)
        return (silu * up).astype(dtype).astype(f32)


def group_scale(values, scale_format="float32", floor=1e-10):
    scale = np.maximum(np.abs(values).max(), np.float32(floor)) / np.float32(448)
    if scale_format != "float32":
        mantissa, exponent = np.frexp(scale)  # scale = mantissa * 2**exponent, mantissa in [0.5, 1)
        scale = np.ldexp(np.float32(1), int(exponent) - (mantissa == 0.5))
    return np.float32(scale)


def expected(
    x,
    masked_m,
    *,
    group_size=128,
    scale_format="float32",
    swiglu_limit=None,
    swiglu_alpha=None,
    amax_floor=1e-10,
    divide=False,
):
    """q `[e, M, N]` and float32 scales `[e, M, G]`, zero in rows that are not valid."""
    experts, rows, width = x.shape[0], x.shape[1], x.shape[2] // 2
    q = np.zeros((experts, rows, width), E4M3)
    scales = np.zeros((experts, rows, width // group_size), np.float32)
    for i in range(experts):
        for t in range(min(max(int(masked_m[i]), 0), rows)):
            gate, up = x[i, t, :width], x[i, t, width:]
            values = row_values(gate, up, x.dtype, swiglu_limit, swiglu_alpha)
            for g in range(width // group_size):
                group = values[g * group_size : (g + 1) * group_size]
                scale = group_scale(group, scale_format, amax_floor)
                scaled = group / scale if divide else group * (np.float32(1) / scale)
                q[i, t, g * group_size : (g + 1) * group_size] = np.clip(scaled, -448, 448)
                scales[i, t, g] = scale
    return q, scales


def steps(q):
    """Codes as integers whose difference counts representable values; -0 and 0 are the same."""
    code = np.asarray(q).view(np.uint8).astype(np.int32)
    magnitude = code & 0x7F
    return np.where(code & 0x80, -magnitude, magnitude)


def unpack(words):
    """int32 `[e, G / 4, M]` to float32 `[e, M, G]`, by the bytes."""
    experts, count, rows = words.shape
    exponent = words.transpose(0, 2, 1).copy().view(np.uint8).reshape(experts, rows, count * 4)
    with np.errstate(over="ignore"):  # rows that are not valid hold anything
        scales = np.ldexp(np.float32(1), exponent.astype(np.int32) - 127)
    return np.where(exponent == 0, np.float32(0), scales)


def assert_close(q, scales, want_q, want_scales, masked_m):
    """The rule for the valid rows: no code off by more than one step, few by one.

    A value may round the other way where `exp` differs in its last bit: by one step of x's dtype, 2**-7 at
    most. That of a group's maximum moves its scale and codes.
    """
    rows = np.arange(want_q.shape[1]) < np.clip(masked_m, 0, want_q.shape[1])[:, None]
    got, want = steps(q)[rows], steps(want_q)[rows]
    assert got.shape == want.shape
    off = np.abs(got - want)
    worst = np.unravel_index(off.argmax(), off.shape) if off.size else None
    assert not off.size or off.max() <= 1, f"code {got[worst]} for {want[worst]} at {worst}"
    assert off.mean() < (0.04 if off.size <= 4096 else 0.005) if off.size else True
    got, want = np.asarray(scales)[rows], want_scales[rows]
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=0)
    assert (np.abs(got - want) > 1e-6 * want).mean() < 0.01 if want.size else True
