"""Tiles of the masked layout that a warp finds by votes: those of the list that a launch makes."""

import numpy as np
import pytest

from moe_align_jax._grouped_matmul import found_masked, tile_list
from moe_align_jax._simt import emulator
from tests.matmul.found import by_ctas


def found(counts: np.ndarray, max_rows: int, bm: int, most: int) -> np.ndarray:
    """The values of each of `most` tiles, one CTA for each."""

    def find(t, r):
        return found_masked.tile_of(t, r, len(counts), max_rows, bm, t.cta_id())

    return by_ctas(find, found_masked.FOUND, most, masked_m=counts)


@pytest.mark.parametrize("groups", [1, 6, 31, 32, 33, 70])
@pytest.mark.parametrize("bm", [128, 192])
def test_tiles_are_those_of_the_list(groups, bm):
    rng = np.random.default_rng(groups + bm)
    counts = rng.integers(-3, 700, groups).astype(np.int32)
    counts[rng.random(groups) < 0.3] = 0
    counts[0] = 513  # more rows than there are
    tiles = tile_list.TileList(False, groups, groups, groups * 512, 512, bm)
    [count], expert, start, end = emulator.run(tile_list.build(tiles), [counts])
    values = found(counts, 512, bm, int(count) + 2)
    assert (values[:, 3] == count).all()
    want = np.stack([expert, start, end], 1)[:count]
    assert (values[:count, :3] == want).all()
    assert not values[count:, :3].any()


def test_nothing_is_in_use():
    assert not found(np.zeros(40, np.int32), 512, 128, 2).any()
