"""Rows of arrays as words of 4 bytes, and the moves by which a thread copies its share of a row."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from moe_align_jax._simt.language import Int, Simt

INT32, FLOAT32 = np.dtype("int32"), np.dtype("float32")
VECTOR = 4  # words that a thread moves at once where a row's length allows it
MOST_HELD = 16  # moves of 16 bytes that a thread holds, from its loads to its stores

type Array = tuple[tuple[int, ...], Any]  # shape, dtype


class Field(NamedTuple):
    """What a row has of one array: so many columns, whose bytes are a multiple of 4."""

    columns: int
    dtype: Any

    @property
    def words(self) -> int:
        """Words of a row."""
        return self.columns * self.dtype.itemsize // 4

    @property
    def width(self) -> int:
        """Words that a thread moves at once."""
        return 1 if self.words % VECTOR else VECTOR

    @property
    def units(self) -> int:
        """Moves of a row."""
        return self.words // self.width

    def part(self, parts: int) -> "Field":
        """The field of a row that is cut into so many equal parts."""
        return self._replace(columns=self.columns // parts)


class Piece(NamedTuple):
    """A move: `width` words of a field from `first` on, where `inside` says so."""

    field: int
    width: int
    first: Int
    inside: Int


def words(array: Array) -> int:
    """How many words an array has."""
    shape, dtype = array
    return int(np.prod(shape)) * np.dtype(dtype).itemsize // 4


def batches(pieces: Iterable[Piece], copies: int = 1) -> list[list[Piece]]:
    """The pieces in groups of as many as a thread can hold when it holds each `copies` times."""
    every, most = list(pieces), max(1, MOST_HELD // copies)
    return [every[i : i + most] for i in range(0, len(every), most)]


def store(t: Simt, ref: Any, piece: Piece, row: Int, value: Any) -> None:
    """Stores what a load of the piece gave into the row of `ref` that starts at word `row`.

    It stores also where the piece is not inside: the caller asks.
    """
    (t.store4 if piece.width == 4 else t.store)(ref, row + piece.first, value)
