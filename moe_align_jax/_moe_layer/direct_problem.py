"""What a program of the layer's weighted sum is compiled for, for a launch outside XLA. No jax here."""

from typing import NamedTuple

# Tokens of the programs: few CTAs for few tokens.
BUCKETS = (16, 128, 1024, 1 << 20)
_LEAST_WIDTH, _MOST_TOP_K, _INT32_MAX = 128, 64, 2**31 - 1


class DirectSum(NamedTuple):
    """The weighted sum of each token's rows, as a program of `torch_bridge`; sized at launch.

    Attributes:
        num_tokens: the most that a launch has.
        top_k: rows of a token.
        width: values of a row.
        dtype: of the rows.
        out_dtype: of the sums.
    """

    num_tokens: int
    top_k: int
    width: int
    dtype: str
    out_dtype: str

    name = "sum_rows"
    num_experts = 0

    @property
    def refusal(self) -> str | None:
        """Why there is no such program, or None."""
        item = 4 if self.dtype == "float32" else 2
        if self.width < _LEAST_WIDTH or self.width * item % 16:
            return f"the weighted sum takes rows of at least {_LEAST_WIDTH} values, whole 16 bytes"
        if self.top_k > _MOST_TOP_K:
            return f"the weighted sum takes at most {_MOST_TOP_K} experts of a token"
        return None

    @property
    def max_rows(self) -> int:
        """Rows beyond which the kernel's int32 does not count their values."""
        return _INT32_MAX // self.width

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each value that a launch gives ahead of the result; num_tokens times 256."""
        pairs = (self.num_tokens, self.top_k)
        rows = (min(self.max_rows, self.num_tokens * self.top_k), self.width)
        return {"num_tokens": (1,), "y": rows, "row_of_pair": pairs, "weights": pairs}

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        return {"out": (self.num_tokens, self.width)}


def sum_bucket(num_tokens: int, top_k: int, width: int, dtype: str, out_dtype: str) -> DirectSum:
    """The problem whose program serves so many tokens."""
    most = next((n for n in BUCKETS if n >= num_tokens), num_tokens)
    most = max(num_tokens, min(most, _INT32_MAX // max(1, width)))
    return DirectSum(most, top_k, width, dtype, out_dtype)
