"""Rows written straight into other GPUs' memory over NVLink: `send` to the experts' ranks, `give_back` to the
tokens' rank.

Every device launches the same kernel, and XLA has a barrier of all devices ahead of it: from then on their
outputs may be written. A CTA copies the rows of its tokens to all devices, then meets the CTA of its index
on each (`device_sync`): when the kernel ends here, all that others wrote to this device is there. No
row has two writers, and its place is known beforehand, so nothing is counted first.

D ranks, T tokens per rank, K top_k, R = D * T. A row goes as 16-byte words where its length allows.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from moe_align_jax._simt.language import WARPGROUP, Devices, Int, Kernel, Simt

type Array = tuple[tuple[int, ...], Any]  # shape, dtype

# CTAs of one warpgroup; all of them must be resident, here and on the peers, for they wait for each other.
MAX_CTAS = 264
# Registers that hold loads in flight, in 16-byte words of a thread.
MOST_IN_FLIGHT = 16


class Field(NamedTuple):
    """What a row has of one array.

    Attributes:
        columns: its elements.
        dtype: theirs; a row is a multiple of 4 bytes.
        sparse: whether a row goes only to the ranks that have one of its token's experts.
    """

    columns: int
    dtype: Any
    sparse: bool

    @property
    def words(self) -> int:
        return self.columns * self.dtype.itemsize // 4


class _Piece(NamedTuple):
    """A thread's share of a row: words `first + thread * width`, where `inside` says so."""

    field: int
    width: int
    first: Int
    inside: Int


def _pieces(t: Simt, fields: Sequence[Field]) -> Iterable[_Piece]:
    for number, field in enumerate(fields):
        width = 4 if field.words % 4 == 0 else 1
        for start in range(0, field.words, WARPGROUP * width):
            first = t.thread_id() * width + start
            yield _Piece(number, width, first, first < field.words)


def _batches(pieces: Iterable[_Piece], copies: int) -> list[list[_Piece]]:
    """As many as fit into registers when each is held `copies` times."""
    pieces, most = list(pieces), max(1, MOST_IN_FLIGHT // copies)
    return [pieces[i : i + most] for i in range(0, len(pieces), most)]


def _load(t: Simt, ref: Any, piece: _Piece, row: Int) -> Any:
    at = t.select(piece.inside, row + piece.first, row)
    return t.load4(ref, at) if piece.width == 4 else t.load(ref, at)


def _store(t: Simt, ref: Any, piece: _Piece, row: Int, value: Any) -> None:
    (t.store4 if piece.width == 4 else t.store)(ref, row + piece.first, value)


def _for_tokens(t: Simt, num_tokens: int, num_ctas: int, body: Callable[[Int], None]) -> None:
    if num_tokens == num_ctas:
        body(t.cta_id())
    else:
        for token in t.for_range(t.cta_id(), num_tokens, num_ctas):
            body(token)


def _names(kind: str, fields: Sequence[Field]) -> list[str]:
    return [f"{kind}{i}" for i in range(len(fields))]


class Send(NamedTuple):
    """`topk_ids [T, K]` int32 (global) and fields `[T, c]` to `[R, c]`: row `s * T + t` is token t of rank s.

    Of a sparse field, rows of tokens without an expert of the receiver are not written.
    """

    num_tokens: int
    top_k: int
    fields: tuple[Field, ...]
    devices: Devices
    num_local_experts: int

    @property
    def outputs(self) -> list[Array]:
        rows = self.devices.count * self.num_tokens
        return [((rows, field.columns), field.dtype) for field in self.fields]


class GiveBack(NamedTuple):
    """`rows [R, c]` to `parts [D, T, c]`: row `s * T + t` of rank d is `parts[d, t]` of rank s."""

    num_tokens: int
    field: Field
    devices: Devices

    @property
    def outputs(self) -> list[Array]:
        return [((self.devices.count, self.num_tokens, self.field.columns), self.field.dtype)]


@functools.lru_cache(256)
def build(problem: Send | GiveBack) -> Kernel:
    return _send(problem) if isinstance(problem, Send) else _give_back(problem)


def _send(problem: Send) -> Kernel:
    num_tokens, top_k, fields, devices, num_local_experts = problem
    sources, targets = _names("field", fields), _names("received", fields)
    num_ctas = min(num_tokens, MAX_CTAS)

    def body(t: Simt, r: SimpleNamespace) -> None:
        t.grid_dependency_wait()
        me = t.rank()
        ranks = [(me + k) % devices.count for k in range(devices.count)]
        there = [[t.remote(getattr(r, name), rank) for name in targets] for rank in ranks]

        def one(token: Int) -> None:
            ids = [t.load(r.topk_ids, token * top_k + k) for k in range(top_k)]
            for batch in _batches(_pieces(t, fields), 1):
                held = [
                    _load(t, getattr(r, sources[p.field]), p, token * fields[p.field].words)
                    for p in batch
                ]
                for rank, refs in zip(ranks, there, strict=True):
                    first = rank * num_local_experts
                    wanted = (ids[0] - first).below(num_local_experts)
                    for expert in ids[1:]:
                        wanted = wanted | (expert - first).below(num_local_experts)
                    row = me * num_tokens + token
                    for piece, value in zip(batch, held, strict=True):
                        field = fields[piece.field]
                        goes = piece.inside & wanted if field.sparse else piece.inside
                        with t.if_(goes):
                            _store(t, refs[piece.field], piece, row * field.words, value)

        _for_tokens(t, num_tokens, num_ctas, one)
        t.device_sync()

    arrays: dict[str, Any] = {"topk_ids": ((num_tokens, top_k), "int32")}
    arrays |= {n: ((num_tokens, f.columns), f.dtype) for n, f in zip(sources, fields, strict=True)}
    arrays |= dict(zip(targets, problem.outputs, strict=True))
    rows = devices.count * num_tokens
    return Kernel(
        name="moe_dispatch_send",
        body=body,
        inputs={
            "topk_ids": (num_tokens * top_k,),
            **{n: (num_tokens * f.words,) for n, f in zip(sources, fields, strict=True)},
        },
        outputs={n: (rows * f.words,) for n, f in zip(targets, fields, strict=True)},
        num_warpgroups=1,
        num_ctas=num_ctas,
        arrays=arrays,
        partial=frozenset(n for n, f in zip(targets, fields, strict=True) if f.sparse),
        devices=devices,
    )


def _give_back(problem: GiveBack) -> Kernel:
    num_tokens, field, devices = problem
    num_ctas, rows = min(num_tokens, MAX_CTAS), devices.count * num_tokens

    def body(t: Simt, r: SimpleNamespace) -> None:
        t.grid_dependency_wait()
        me = t.rank()
        ranks = [(me + k) % devices.count for k in range(devices.count)]
        there = [t.remote(r.parts, rank) for rank in ranks]

        def one(token: Int) -> None:
            target = (me * num_tokens + token) * field.words
            for batch in _batches(_pieces(t, [field]), devices.count):
                held = [
                    [_load(t, r.rows, p, (rank * num_tokens + token) * field.words) for p in batch]
                    for rank in ranks
                ]
                for ref, values in zip(there, held, strict=True):
                    for piece, value in zip(batch, values, strict=True):
                        with t.if_(piece.inside):
                            _store(t, ref, piece, target, value)

        _for_tokens(t, num_tokens, num_ctas, one)
        t.device_sync()

    return Kernel(
        name="moe_combine_give_back",
        body=body,
        inputs={"rows": (rows * field.words,)},
        outputs={"parts": (rows * field.words,)},
        num_warpgroups=1,
        num_ctas=num_ctas,
        arrays={
            "rows": ((rows, field.columns), field.dtype),
            "parts": problem.outputs[0],
        },
        devices=devices,
    )
