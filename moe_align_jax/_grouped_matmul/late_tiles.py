"""Late tiles: the sums of one wait in registers, rounded, and are stored between the products of the next."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

_I32 = jnp.int32


class Waiting(NamedTuple):
    """A late tile, in registers, and where the next one begins.

    Attributes:
        ring: steps of the ring before the next tile's.
        rows: 0 if no tile waits. Otherwise its height where tiles have several, else 1.
        at: three numbers: where it belongs in the result.
        pieces: of the result.
    """

    ring: jax.Array
    rows: jax.Array
    at: tuple[jax.Array, ...]
    pieces: list[jax.Array]


# Stores that piece of the tile that waits.
type Put = Callable[[Waiting, int], None]


def all_tiles(
    mine: Any,
    later: Callable[[jax.Array, Waiting], Waiting],
    put: Put,
    nothing: list[jax.Array],
) -> None:
    """The loop over a CTA's tiles, and the last one's stores.

    Args:
        mine: how many tiles.
        later: multiplies the i-th tile, stores the one that waits, and gives what waits then.
        put: see `Put`.
        nothing: pieces to begin with, of no tile.
    """
    zero = _I32(0)
    first = Waiting(zero, zero, (zero, zero, zero), nothing)
    last = lax.fori_loop(0, mine, later, first)

    @pl.when(last.rows > 0)
    def _():
        for q in range(len(last.pieces)):
            put(last, q)


def put_if(waiting: Waiting, put: Put, when: Callable[[int], Any]) -> None:
    """Stores the pieces q of the tile that waits, if any does, that `when(q)` holds for."""
    for q in range(len(waiting.pieces)):
        pl.when(when(q) & (waiting.rows > 0))(lambda q=q: put(waiting, q))
