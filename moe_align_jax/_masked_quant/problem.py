"""The static description of one fused activation and quantisation. Imports no jax."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

from moe_align_jax._core.fp8 import GROUPS_PER_WORD

ScaleFormat = Literal["float32", "ue8m0", "ue8m0_packed"]
ScaleLayout = Literal["row_major", "column_major"]
FORMATS, LAYOUTS = get_args(ScaleFormat), get_args(ScaleLayout)
# Of a group's absolute maximum: below, the reciprocal of a scale could overflow.
LEAST_FLOOR = 1e-30

# TMA takes rows whose pitch is a multiple of 16 bytes: 4 scales.
COLUMN_MULTIPLE = 4


def bits_over_448(bits: Any, divide: Callable[[Any, int], Any]) -> Any:
    """The bits of x / 448, rounded to nearest even, from those of x: a float32 of at least 2**-117, finite.

    In integers, since compilers turn the division into a product with the rounded reciprocal (XLA), or
    into an approximation (the GPU's `div.full`): both are off by one in the last place at times.

    Args:
        bits: int32, an array of any kind with operators.
        divide: the quotient of such an array and an int, both positive, without its fraction.
    """
    # 448 = 7 / 4 * 2**8: the significand of the quotient is that of x times 4 / 7, or 8 / 7 below 7 / 4.
    mantissa = bits & 0x7FFFFF
    large = (mantissa >= 0x600000).astype("int32")
    significand = (mantissa | 0x800000) * (8 - 4 * large)
    # A seventh is never halfway between two integers, so that adding 3 rounds to the nearest.
    quotient = divide(significand + 3, 7)
    return (((bits >> 23) - 9 + large) << 23) + (quotient & 0x7FFFFF)


class MaskedQuantProblem(NamedTuple):
    """Everything static about one `silu_and_mul_masked_quant`: the key of every cache.

    Attributes:
        num_experts: e.
        max_rows: M, rows of each expert's part.
        width: N, values of a result row; x has 2 N.
        dtype: of x, "bfloat16" or "float16".
        group_size: values that share a scale.
        scale_format: "float32", "ue8m0" (a power of two, as float32) or "ue8m0_packed" (four exponents to
            an int32).
        scale_layout: "row_major" or "column_major"; packed scales are column-major.
        swiglu_limit: bound of gate and up, None without one.
        swiglu_alpha: None for `silu(gate) * up`; otherwise `gate * sigmoid(alpha * gate) * (up + 1)`.
        amax_floor: the least absolute maximum of a group.
        divide: divide by the scale, instead of multiplying by its reciprocal.
        activates: whether x is gate and up. If not, it has N columns, which are quantised as they are
            (`quantize_rowwise`): 1 / scale is then rounded correctly, and rows at or past `masked_m` that x
            has may be read and written.
    """

    num_experts: int
    max_rows: int
    width: int
    dtype: str = "bfloat16"
    group_size: int = 128
    scale_format: str = "float32"
    scale_layout: str = "row_major"
    swiglu_limit: float | None = None
    swiglu_alpha: float | None = None
    amax_floor: float = 1e-10
    divide: bool = False
    activates: bool = True

    name = "silu_and_mul_masked_quant"

    @property
    def kernel_name(self) -> str:
        """The name of the kernel: that of the function that it computes."""
        return self.name if self.activates else "quantize_rowwise"

    @property
    def num_groups(self) -> int:
        """Groups of a result row, each with a scale."""
        return self.width // self.group_size

    @property
    def packed(self) -> bool:
        """Whether four exponents share an int32."""
        return self.scale_format == "ue8m0_packed"

    @property
    def scales_shape(self) -> tuple[int, int, int]:
        """Shape of the scales as the kernel writes them; by columns with the pitch that TMA asks for."""
        if self.packed:
            return self.num_experts, self.num_groups // GROUPS_PER_WORD, self.max_rows
        if self.scale_layout == "column_major":
            pitch = -(-self.max_rows // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
            return self.num_experts, self.num_groups, pitch
        return self.num_experts, self.max_rows, self.num_groups

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each operand of the kernel, in order."""
        groups = (self.num_groups, self.group_size)
        return {
            "x": (self.num_experts, self.max_rows, 1 + self.activates, *groups),
            "masked_m": (self.num_experts,),
        }

    @property
    def outputs(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name, shape and dtype of each result, in order."""
        q = (self.num_experts, self.max_rows, self.width)
        scales = "int32" if self.packed else "float32"
        return {"q": (q, "float8_e4m3fn"), "scales": (self.scales_shape, scales)}
