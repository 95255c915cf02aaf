"""Rows of words among the threads of a warpgroup or more, 16 bytes each where their length allows."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from moe_align_jax._expert_parallel.nvlink_kernels.problems import Field, PeerProblem, words
from moe_align_jax._simt.language import Int, Kernel, Simt

# CTAs wait for each other's peers: all of them are to be resident, on any GPU that has NVLink.
MIN_SMS = 114
MAX_CTAS = 2 * MIN_SMS  # of one warpgroup, whose threads may have all registers they like
# 16-byte words that a thread holds, from its loads to its stores.
MOST_HELD = 16


class Piece(NamedTuple):
    """A thread's share of a row: `width` words from `first` on, where `inside` says so."""

    field: int
    width: int
    first: Int
    inside: Int


def pieces(t: Simt, fields: Sequence[Field], thread: Int, threads: int) -> Iterator[Piece]:
    for number, field in enumerate(fields):
        width = 4 if field.words % 4 == 0 else 1
        for start in range(0, field.words, threads * width):
            first = thread * width + start
            yield Piece(number, width, first, first < field.words)


def batches(all_pieces: Iterator[Piece], copies: int = 1) -> list[list[Piece]]:
    """As many as fit into registers when each is held `copies` times."""
    every, most = list(all_pieces), max(1, MOST_HELD // copies)
    return [every[i : i + most] for i in range(0, len(every), most)]


def load(t: Simt, ref: Any, piece: Piece, row: Int) -> Any:
    at = t.select(piece.inside, row + piece.first, row)
    return t.load4(ref, at) if piece.width == 4 else t.load(ref, at)


def store(t: Simt, ref: Any, piece: Piece, row: Int, value: Any) -> None:
    (t.store4 if piece.width == 4 else t.store)(ref, row + piece.first, value)


def for_tokens(t: Simt, num_tokens: int, body: Callable[[Int], None]) -> None:
    """The tokens of my CTA: on every device those of the same numbers."""
    if num_tokens == t.num_ctas:
        body(t.cta_id())
    else:
        for token in t.for_range(t.cta_id(), num_tokens, t.num_ctas):
            body(token)


def everyone(t: Simt, count: int) -> list[Int]:
    """All ranks, mine first: no two devices write to one at the same time."""
    me = t.rank()
    return [(me + k) % count for k in range(count)]


def kernel(
    name: str,
    problem: PeerProblem,
    body: Any,
    *,
    num_warpgroups: int = 1,
    num_ctas: int | None = None,
    **options: Any,
) -> Kernel:
    return Kernel(
        name=name,
        body=body,
        inputs={n: (words(a),) for n, a in problem.inputs.items()},
        outputs={n: (words(a),) for n, a in problem.outputs.items()},
        staged={n: (words(a),) for n, a in problem.staged.items()},
        arrays={**problem.inputs, **problem.outputs, **problem.staged},
        num_ctas=num_ctas or min(problem.num_tokens, MAX_CTAS),
        num_warpgroups=num_warpgroups,
        devices=problem.devices,
        **options,
    )
