"""A thread's share of a row that several CTAs, or one, move."""

from collections.abc import Iterator
from typing import Any

from moe_align_jax._expert_parallel.message_kernels.problems import THREADS
from moe_align_jax._expert_parallel.row_words import Field, Piece
from moe_align_jax._simt.language import Int, Simt


def pieces(t: Simt, fields: tuple[Field, ...], part: Int, parts: int) -> Iterator[Piece]:
    """Of the fields of a row: those of my thread in that part of it."""
    for number, field in enumerate(fields):
        for start in range(0, field.units, parts * THREADS):
            unit = part * THREADS + t.thread_id() + start
            yield Piece(number, field.width, unit * field.width, unit < field.units)


def load(t: Simt, ref: Any, piece: Piece, row: Int) -> Any:
    """From a field that starts at word `row`. Past its end the first words are loaded again, so that no
    branch separates two loads."""
    at = row + t.select(piece.inside, piece.first, 0)
    return t.load4(ref, at) if piece.width == 4 else t.load(ref, at)
