"""What is to be moved: hashable, so that it can be a parameter of a primitive.

D ranks, T tokens per rank, K top_k, R = D * T rows that a rank can receive, H columns.
"""

from typing import Any, NamedTuple

import numpy as np

from moe_align_jax._core.fp8 import GROUP
from moe_align_jax._simt.language import Devices

type Array = tuple[tuple[int, ...], Any]  # shape, dtype

INT32, FLOAT32 = np.dtype("int32"), np.dtype("float32")


class Field(NamedTuple):
    """What a row has of one array: so many columns, whose bytes are a multiple of 4."""

    columns: int
    dtype: Any

    @property
    def words(self) -> int:
        return self.columns * self.dtype.itemsize // 4

    def part(self, parts: int) -> "Field":
        """Of a row that is cut into so many equal parts."""
        return self._replace(columns=self.columns // parts)


class Send(NamedTuple):
    """Tokens to the ranks of their experts: row `s * T + t` of a rank is token t of rank s.

    Takes `topk_ids [T, K]` int32 (global; an id out of range has no rank), with `routing` also
    `weights [T, K]` float32, and a `[T, c]` array per field. Gives a `[R, c]` array per field, written
    only where the token has an expert of the receiver; with `routing` also `ids [R, K]` (local, -1 for
    others' experts) and `weights [R, K]` (0 for those), written everywhere.

    Attributes:
        quantise: None, or the e4m3 dtype: the one field is bfloat16 and goes as e4m3 and float32 scales of
            128 columns (`Quantised`).
    """

    num_tokens: int
    top_k: int
    fields: tuple[Field, ...]
    devices: Devices
    num_local_experts: int
    routing: bool
    quantise: Any = None

    @property
    def received(self) -> tuple[Field, ...]:
        if self.quantise is None:
            return self.fields
        [field] = self.fields
        return Field(field.columns, self.quantise), Field(field.columns // GROUP, FLOAT32)

    @property
    def inputs(self) -> dict[str, Array]:
        pairs = (self.num_tokens, self.top_k)
        named: dict[str, Array] = {"topk_ids": (pairs, INT32)}
        if self.routing:
            named["weights"] = (pairs, FLOAT32)
        for number, field in enumerate(self.fields):
            named[f"field{number}"] = ((self.num_tokens, field.columns), field.dtype)
        return named

    @property
    def outputs(self) -> dict[str, Array]:
        rows = self.devices.count * self.num_tokens
        named: dict[str, Array] = {
            f"received{number}": ((rows, field.columns), field.dtype)
            for number, field in enumerate(self.received)
        }
        if self.routing:
            named |= {
                "local_weights": ((rows, self.top_k), FLOAT32),
                "local_ids": ((rows, self.top_k), INT32),
            }
        return named

    @property
    def staged(self) -> dict[str, Array]:
        return {}


class Dispatch(NamedTuple):
    """`Send` with routing, and what a rank receives into boxes of M rows for each of its e experts.

    Gives `boxes [e, M, c]` per field received, the `MaskedLayout` of the received ids: `masked_m [e]`,
    `tokens_per_expert [e]`, `row_of_pair [R, K]`, `pair_of_row [e, M]`, and ids and weights as `Send`
    does. Rows of a box from `masked_m` on are zeros with `initialize`, else not written. Staged are the rows
    and weights that came.

    Attributes:
        send: what is sent.
        rows_per_expert: M.
        initialize: whether unused rows are zeros.
    """

    send: Send
    rows_per_expert: int
    initialize: bool = False

    @property
    def num_tokens(self) -> int:
        return self.send.num_tokens

    @property
    def devices(self) -> Devices:
        return self.send.devices

    @property
    def num_pairs(self) -> int:
        """That a rank receives ids of."""
        return self.devices.count * self.num_tokens * self.send.top_k

    @property
    def inputs(self) -> dict[str, Array]:
        return self.send.inputs

    @property
    def outputs(self) -> dict[str, Array]:
        experts = self.send.num_local_experts
        rows = self.devices.count * self.num_tokens
        boxes: dict[str, Array] = {
            f"boxes{number}": ((experts, self.rows_per_expert, field.columns), field.dtype)
            for number, field in enumerate(self.send.received)
        }
        layout: dict[str, Array] = {
            "masked_m": ((experts,), INT32),
            "tokens_per_expert": ((experts,), INT32),
            "row_of_pair": ((rows, self.send.top_k), INT32),
            "pair_of_row": ((experts, self.rows_per_expert), INT32),
        }
        pairs = {name: self.send.outputs[name] for name in ("local_weights", "local_ids")}
        return boxes | layout | pairs

    @property
    def staged(self) -> dict[str, Array]:
        outputs = self.send.outputs
        rows = {name: array for name, array in outputs.items() if name.startswith("received")}
        return rows | {"sent_weights": outputs["local_weights"]}


class ReturnRows(NamedTuple):
    """`rows [R, c]` to `parts [D, T, c]`: row `s * T + t` of rank d is `parts[d, t]` of rank s."""

    num_tokens: int
    field: Field
    devices: Devices

    @property
    def inputs(self) -> dict[str, Array]:
        return {
            "rows": ((self.devices.count * self.num_tokens, self.field.columns), self.field.dtype)
        }

    @property
    def outputs(self) -> dict[str, Array]:
        shape = (self.devices.count, self.num_tokens, self.field.columns)
        return {"parts": (shape, self.field.dtype)}

    @property
    def staged(self) -> dict[str, Array]:
        return {}


class Combine(NamedTuple):
    """The weighted sum of each token's rows of y on every rank, given back, and summed over the ranks.

    Takes `y [num_rows, H]` bfloat16, `row_of_pair [R, K]` int32 (-1 for none), `weights [R, K]` float32, and
    who has an expert of whom: `local_ids [R, K]` as `Send` gave them (-1 for others' experts; one of mine may
    have no row), and my tokens' `topk_ids [T, K]`. Gives `out [T, H]` bfloat16. Staged are the parts that the
    ranks sent, `[D, T, H]`, written only where the rank has an expert of the token. Float32 sums, over K by
    fused multiply-adds in order, rounded to bfloat16 for the way, then over the ranks in order; zeros without
    any.
    """

    num_tokens: int
    top_k: int
    num_rows: int
    columns: int
    dtype: Any  # bfloat16
    devices: Devices
    num_local_experts: int

    @property
    def inputs(self) -> dict[str, Array]:
        pairs = (self.devices.count * self.num_tokens, self.top_k)
        return {
            "y": ((self.num_rows, self.columns), self.dtype),
            "row_of_pair": (pairs, INT32),
            "weights": (pairs, FLOAT32),
            "local_ids": (pairs, INT32),
            "topk_ids": ((self.num_tokens, self.top_k), INT32),
        }

    @property
    def outputs(self) -> dict[str, Array]:
        return {"out": ((self.num_tokens, self.columns), self.dtype)}

    @property
    def staged(self) -> dict[str, Array]:
        return {"parts": ((self.devices.count, self.num_tokens, self.columns), self.dtype)}


type PeerProblem = Send | Dispatch | ReturnRows | Combine


def words(array: Array) -> int:
    shape, dtype = array
    return int(np.prod(shape)) * np.dtype(dtype).itemsize // 4


def most_words(problem: PeerProblem) -> int:
    """Of the largest array: kernels count words in int32."""
    every = problem.inputs | problem.outputs | problem.staged
    return max(words(array) for array in every.values())
