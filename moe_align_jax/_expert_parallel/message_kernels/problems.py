"""The rows of a low-latency exchange, and what the kernels beside its collective have to do.

A message is rows of W int32 words, `[T, W]`: for each token the payload, its scales, the weights and the ids,
each from a multiple of 16 bytes on. Every rank gets the messages of all, `[R, W]`, in the order of the ranks,
and keeps the pairs of its own experts: ids are global.

D ranks, T tokens per rank, K top_k, R = D * T rows received, n = R * K pairs, e local experts.
"""

import itertools
from typing import NamedTuple

import numpy as np

from moe_align_jax._core.fp8 import GROUP
from moe_align_jax._core.hopper import NUM_SMS
from moe_align_jax._core.int32 import INT32_MAX
from moe_align_jax._expert_parallel.row_words import FLOAT32, INT32, VECTOR, Array, Field, words

WARP, THREADS = 32, 128
MAX_TOP_K = WARP  # a lane holds a pair
# A thread holds n / 128 ids and compares each with every pair of a token.
MAX_PAIRS = 64 * THREADS
_MAX_CTAS = 8 * NUM_SMS
# CTAs up to which rows are cut into parts where boxes are filled, while a CTA makes few comparisons: each
# part compares its row's ids with all others. `pack` does nothing twice for that. H200, 2026-11-30,
# two ranks of 36, 64 and 128 tokens, top 8, H = 7168, us with NUM_SMS, 2 and 4 times as many: of messages
# 2.88, 2.56, 2.53; 3.20, 2.88, 2.94; 4.54, 4.54, 4.35; gathered 3.94, 3.33, 2.82; 4.32, 3.49, 3.39; 5.63,
# 5.63, 5.25. 8 times: 128 tokens 4.83 and 5.70. With more comparisons than 128 tokens make none was timed.
_FILLING_CTAS = 4 * NUM_SMS
_FEW_COMPARED = 1 << 14


class Message(NamedTuple):
    """The rows of one exchange.

    Attributes:
        num_ranks, num_tokens, top_k, num_local_experts: D, T, K, e.
        payload: what is sent of a token beside weights and ids.
    """

    num_ranks: int
    num_tokens: int
    top_k: int
    num_local_experts: int
    payload: tuple[Field, ...]

    @property
    def fields(self) -> tuple[Field, ...]:
        """All that a row has, in order: the payload, the weights, the ids."""
        return (*self.payload, Field(self.top_k, FLOAT32), Field(self.top_k, INT32))

    @property
    def starts(self) -> tuple[int, ...]:
        """The first word of each field, and W."""
        lengths = (-(-field.words // VECTOR) * VECTOR for field in self.fields)
        return tuple(itertools.accumulate(lengths, initial=0))

    @property
    def words(self) -> int:
        """W."""
        return self.starts[-1]

    @property
    def padded(self) -> bool:
        """Whether some of the W words belong to no field."""
        return self.words > sum(field.words for field in self.fields)

    @property
    def num_rows(self) -> int:
        """R."""
        return self.num_ranks * self.num_tokens

    @property
    def num_pairs(self) -> int:
        """n."""
        return self.num_rows * self.top_k

    def array(self, rows: int) -> Array:
        """Shape and dtype of a message of so many rows."""
        return (rows, self.words), INT32


class Pack(NamedTuple):
    """Tokens to a message: `topk_ids [T, K]` int32, `weights [T, K]` float32 and a `[T, c]` array for each
    field to `message [T, W]`.

    Attributes:
        message: its rows.
        quantise: whether the one array given, bfloat16, becomes the payload's e4m3 codes and float32 scales.
    """

    message: Message
    quantise: bool

    @property
    def given(self) -> tuple[Field, ...]:
        """The fields of the arrays that are given."""
        return _given(self.message, self.quantise)

    @property
    def parts(self) -> int:
        """CTAs that a token's row is cut for."""
        return _parts(self.message.num_tokens, self.given, _MAX_CTAS)

    @property
    def num_ctas(self) -> int:
        """CTAs of the grid: each takes a unit or more."""
        return min(self.message.num_tokens * self.parts, _MAX_CTAS)

    @property
    def inputs(self) -> dict[str, Array]:
        """Name, shape and dtype of each input, in order."""
        tokens, pairs = self.message.num_tokens, (self.message.num_tokens, self.message.top_k)
        named = {"topk_ids": (pairs, INT32), "weights": (pairs, FLOAT32)}
        for number, field in enumerate(self.given):
            named[f"field{number}"] = ((tokens, field.columns), field.dtype)
        return named

    @property
    def outputs(self) -> dict[str, Array]:
        """Name, shape and dtype of the result."""
        return {"message": self.message.array(self.message.num_tokens)}


class Unpack(NamedTuple):
    """Rows that came to the experts' boxes: row `s * T + t` is token t of rank s.

    `rank [1]` int32 is this one. They come as `message [R, W]`; or, `gathered`, as `topk_ids [R, K]` int32,
    `pair_weights [R, K]` float32 and a `[R, c]` array for each field of the payload. Ids are global: one of
    another rank's expert, or of none, is left out.

    Gives `boxes [e, M, c]` of each field of the payload; the `MaskedLayout` of the ids: `masked_m [e]`,
    `tokens_per_expert [e]`, `row_of_pair [R, K]`, `pair_of_row [e, M]`; and `weights` and `ids`, each
    `[R, K]`. Rows of a box from `masked_m` on are not written.

    Attributes:
        message: the rows, as they are or would be in a message.
        rows_per_expert: M, the rows of a box.
        gathered: whether no kernel has packed them.
        quantise: of gathered rows: whether the one array given, bfloat16, becomes the payload's e4m3 codes
            and float32 scales.
    """

    message: Message
    rows_per_expert: int
    gathered: bool = False
    quantise: bool = False

    @property
    def given(self) -> tuple[Field, ...]:
        """The fields of the rows that came."""
        return _given(self.message, self.quantise)

    @property
    def parts(self) -> int:
        """CTAs that a row is cut for."""
        few = self.message.num_pairs * self.message.top_k <= _FEW_COMPARED
        return _parts(self.message.num_rows, self.given, _FILLING_CTAS if few else NUM_SMS)

    @property
    def num_ctas(self) -> int:
        """CTAs of the grid: each takes a unit or more."""
        return min(self.message.num_rows * self.parts, _MAX_CTAS)

    @property
    def inputs(self) -> dict[str, Array]:
        """Name, shape and dtype of each input, in order."""
        rows, pairs = self.message.num_rows, (self.message.num_rows, self.message.top_k)
        named: dict[str, Array] = {"rank": ((1,), INT32)}
        if not self.gathered:
            return named | {"message": self.message.array(rows)}
        named |= {"topk_ids": (pairs, INT32), "pair_weights": (pairs, FLOAT32)}
        for number, field in enumerate(self.given):
            named[f"field{number}"] = ((rows, field.columns), field.dtype)
        return named

    @property
    def outputs(self) -> dict[str, Array]:
        """Name, shape and dtype of each result, in order."""
        experts, pairs = self.message.num_local_experts, (self.message.num_rows, self.message.top_k)
        boxes: dict[str, Array] = {
            f"boxes{number}": ((experts, self.rows_per_expert, field.columns), field.dtype)
            for number, field in enumerate(self.message.payload)
        }
        return boxes | {
            "masked_m": ((experts,), INT32),
            "tokens_per_expert": ((experts,), INT32),
            "row_of_pair": (pairs, INT32),
            "pair_of_row": ((experts, self.rows_per_expert), INT32),
            "weights": (pairs, FLOAT32),
            "ids": (pairs, INT32),
        }


def _given(message: Message, quantise: bool) -> tuple[Field, ...]:
    """The arrays of which a payload is made."""
    if not quantise:
        return message.payload
    import ml_dtypes

    return (Field(message.payload[0].columns, np.dtype(ml_dtypes.bfloat16)),)


def quantised(columns: int) -> tuple[Field, Field]:
    """The payload of rows of so many bfloat16 that are quantised on the way."""
    import ml_dtypes

    return (
        Field(columns, np.dtype(ml_dtypes.float8_e4m3fn)),
        Field(columns // GROUP, FLOAT32),
    )


def _parts(rows: int, fields: tuple[Field, ...], ctas: int) -> int:
    """As many as give every CTA's threads a move of the longest field, up to so many CTAs of all rows."""
    most = max(-(-field.units // THREADS) for field in fields)
    return max(1, min(most, ctas // rows))


def unsupported(*problems: Pack | Unpack) -> str | None:
    """Why the kernels do not take an exchange, or None."""
    message = problems[0].message
    if any(f.columns * f.dtype.itemsize % 4 or not f.columns for f in message.payload):
        return "rows are moved by words of 4 bytes"
    if not 1 <= message.top_k <= MAX_TOP_K or not message.num_rows:
        return f"a lane holds a pair of a token, of at most {MAX_TOP_K}"
    if message.num_pairs > MAX_PAIRS:
        return f"every CTA compares all pairs, at most {MAX_PAIRS}"
    arrays = [a for p in problems for a in (*p.inputs.values(), *p.outputs.values())]
    if max(map(words, arrays)) > INT32_MAX:
        return "the kernels count words in int32"
    return None
