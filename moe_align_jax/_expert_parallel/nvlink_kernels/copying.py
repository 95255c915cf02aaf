"""Rows of words among the threads of a warpgroup or more, 16 bytes each where their length allows."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moe_align_jax._expert_parallel.nvlink_kernels.problems import PeerProblem
from moe_align_jax._expert_parallel.row_words import Field, Piece, words
from moe_align_jax._simt.language import Int, Kernel, Simt

# CTAs wait for each other's peers: all of them are to be resident, on any GPU that has NVLink.
MIN_SMS = 114
MAX_CTAS = 2 * MIN_SMS  # of one warpgroup, whose threads may have all registers they like


def pieces(fields: Sequence[Field], thread: Int, threads: int) -> Iterator[Piece]:
    """The moves of thread `thread` of `threads` that copy a row of all fields together."""
    for number, field in enumerate(fields):
        width = field.width
        for start in range(0, field.words, threads * width):
            first = thread * width + start
            yield Piece(number, width, first, first < field.words)


def load(t: Simt, ref: Any, piece: Piece, row: Int) -> Any:
    """Loads a piece of the row that starts at word `row`.

    Past the row's end it loads the row's first words again, so that no branch separates two loads.
    """
    at = t.select(piece.inside, row + piece.first, row)
    return t.load4(ref, at) if piece.width == 4 else t.load(ref, at)


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
    """The kernel of a problem between devices: its arrays are those of the problem.

    Args:
        name: of the kernel.
        problem: what is moved.
        body: `body(t, r)`.
        num_warpgroups: of a CTA.
        num_ctas: of the grid; None: one for each token, as far as all are resident.
        **options: of `Kernel`.
    """
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
