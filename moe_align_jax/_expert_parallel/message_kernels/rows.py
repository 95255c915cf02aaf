"""A thread's share of a row that several CTAs, or one, move."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from moe_align_jax._expert_parallel.message_kernels.problems import THREADS, Field
from moe_align_jax._simt.language import Int, Simt

MOST_HELD = 16  # moves of 16 bytes that a thread holds, from its loads to its stores


class Piece(NamedTuple):
    """A move: `width` words of a field from `first` on, where `inside` says so."""

    field: int
    width: int
    first: Int
    inside: Int


def pieces(t: Simt, fields: tuple[Field, ...], part: Int, parts: int) -> Iterator[Piece]:
    """Of the fields of a row: those of my thread in that part of it."""
    for number, field in enumerate(fields):
        for start in range(0, field.units, parts * THREADS):
            unit = part * THREADS + t.thread_id() + start
            yield Piece(number, field.width, unit * field.width, unit < field.units)


def batches(every: Iterator[Piece]) -> list[list[Piece]]:
    """As many as a thread can hold."""
    found = list(every)
    return [found[i : i + MOST_HELD] for i in range(0, len(found), MOST_HELD)]


def load(t: Simt, ref: Any, piece: Piece, row: Int) -> Any:
    """From a field that starts at word `row`. Past its end the first words are loaded again, so that no
    branch separates two loads."""
    at = row + t.select(piece.inside, piece.first, 0)
    return t.load4(ref, at) if piece.width == 4 else t.load(ref, at)


def store(t: Simt, ref: Any, piece: Piece, row: Int, value: Any) -> None:
    (t.store4 if piece.width == 4 else t.store)(ref, row + piece.first, value)
