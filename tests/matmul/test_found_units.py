"""Units of the masked layout that the product finds, beside loops: what a cluster of CTAs has at a time."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from moe_align_jax._grouped_matmul import config as tiles
from moe_align_jax._grouped_matmul import cta_tiles, found_masked, kernel
from moe_align_jax._grouped_matmul.problem import E4M3, MatmulProblem, Scales, Weights
from moe_align_jax._grouped_matmul.shape import shape_of
from tests.matmul.found import by_ctas

TALL = tiles.Config("m", 192, 128, 128, 4, group=8, computing=3, skips=True, finds=True)
TALL = TALL._replace(ahead=True, sharing=2, by_expert=True)
BROAD = TALL._replace(bm=128, bn=192, computing=2, shared="w")
# Rows in use of each group: none at all, all of them, more than there are, and around 64, 128 and 192.
COUNTS = {
    "one": [0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 1000],
    "none": [0, 0, 0],
    "all": [1000, 1000],
    "ill": [-3, 2000, 0, 1 << 30, 5],
    "many": [*range(0, 1000, 29), 0, 0, 128, 1],
    "last": [0] * 40 + [129],
}


def problem_of(counts: list[int], n: int) -> MatmulProblem:
    scales = Scales("column_major", "blocks", pitch=1000)
    given: dict[str, Any] = {"max_rows": 1000, "dtype": E4M3, "out_dtype": "bfloat16"}
    given |= {"num_rows": 1000 * len(counts), "num_experts": len(counts), "k": 256, "n": n}
    weights = Weights(transposed=True)
    return MatmulProblem("test", "masked", weights=weights, scales=scales, **given)


def wanted(counts: list[int], config: tiles.Config, n_tiles: int) -> list[tuple[int, ...]]:
    """(Group, first row, end, n, whether the second tile is the next n) of each unit, in order."""
    found = []
    for group, count in enumerate(counts):
        rows = min(max(count, 0), 1000)
        start, many = 1000 * group, -(-rows // config.bm)
        along = many // 2 if config.shares_weights else many
        across = n_tiles if config.shares_weights else -(-n_tiles // 2)
        step = 2 if config.shares_weights else 1
        for first in range(0, along, config.group):
            for n in range(across):
                for unit in range(first, min(first + config.group, along)):
                    row = start + unit * step * config.bm
                    found.append((group, row, start + rows, n, 0))
        if config.shares_weights and many % 2:
            row = start + (many - 1) * config.bm
            found += [(group, row, start + rows, n, 1) for n in range(0, n_tiles, 2)]
    return found


@pytest.mark.parametrize("config", [TALL, BROAD], ids=["x shared", "weights shared"])
@pytest.mark.parametrize(("group", "n_tiles"), [(8, 3), (2, 4), (1, 1)])
@pytest.mark.parametrize("name", COUNTS)
def test_units_are_found_in_order(name, group, n_tiles, config):
    """By votes, in the emulator, and by the interpreter's plain twin."""
    counts, config = COUNTS[name], config._replace(group=group)
    problem = problem_of(counts, n_tiles * config.bn)
    units = wanted(counts, config, n_tiles)
    masked_m, size = np.array(counts, np.int32), max(1, len(units))

    def find(t, r):
        given = found_masked.units_of(problem, config, n_tiles)
        return found_masked.unit_of(t, r, given, t.cta_id())

    found = by_ctas(find, found_masked.FOUND_OF_UNIT, size, masked_m=masked_m)
    assert (found[:, -1] == len(units)).all()
    assert [tuple(row) for row in found[: len(units), :-1].tolist()] == units
    for at in {0, len(units) // 2, max(0, len(units) - 1)}:
        given = problem, config, n_tiles, jnp.asarray(masked_m), jnp.int32(at)
        plain = [int(value) for value in found_masked.find_unit_plainly(*given)]
        assert plain[-1] == len(units)
        assert not units or tuple(plain[:-1]) == units[at]


def test_clusters_have_every_unit_once():
    """Each has as many as any other, or one more, and not the same place among the clusters every time."""
    for clusters in (1, 2, 66):
        for total in (0, 1, 65, 66, 67, 144, 864):
            seen, places = [], set()
            for cluster in range(clusters):
                count = int(found_masked.units_for(jnp.int32(total), jnp.int32(cluster), clusters))
                assert total // clusters <= count <= -(-total // clusters)
                at = np.arange(count, dtype=np.int32)
                mine = [*map(int, found_masked.unit_in_turn(at, np.int32(cluster), clusters))]
                assert mine == sorted(mine)
                seen += mine
                places |= {at % clusters % 6 for at in mine} if cluster == 5 else set()
            assert sorted(seen) == [*range(total)]
            assert total < 864 or clusters < 66 or len(places) == 6


def test_units_hold_every_tile_once():
    """The order of `wanted` is made of loops of its own: that it has each (row, n) once is counted here."""
    for config in (TALL, BROAD):
        for name, counts in COUNTS.items():
            for n_tiles in (1, 3, 4):
                seen = []
                for _, row, end, n, alone in wanted(counts, config, n_tiles):
                    for rank in range(2):
                        if not config.shares_weights:
                            seen.append((row, 2 * n + rank))
                        else:
                            seen.append((row, n + rank) if alone else (row + rank * config.bm, n))
                        assert seen[-1][0] < end, name
                seen = [(row, n) for row, n in seen if n < n_tiles]
                rows = [min(max(count, 0), 1000) for count in counts]
                tiles_of = sum(-(-r // config.bm) for r in rows)
                assert len(seen) == len(set(seen)) == tiles_of * n_tiles


@pytest.mark.parametrize("config", [TALL, BROAD], ids=["x shared", "weights shared"])
@pytest.mark.parametrize("n_tiles", [1, 3, 4])
def test_both_ctas_of_a_cluster_have_their_tiles(n_tiles, config):
    """No tile twice: of the n tile behind the last one a CTA that loads its own rows has none."""
    counts = COUNTS["one"]
    problem = problem_of(counts, n_tiles * config.bn)
    shape = shape_of(problem, config)
    assert shape.n_tiles == n_tiles
    units = jnp.array([(*unit, 0) for unit in wanted(counts, config, n_tiles)], jnp.int32)
    seen = []
    for rank in range(2):
        tiles_of = [cta_tiles.tile_of_unit(problem, config, shape, unit, rank) for unit in units]
        valid = [tile for tile in tiles_of if tile.valid]
        seen += [(int(tile.row), int(tile.n)) for tile in valid if tile.n < n_tiles]
        for tile in valid:
            group = int(tile.expert)
            assert tile.end == 1000 * (group + 1) and tile.row < tile.used <= tile.end
            assert tile.used == 1000 * group + min(counts[group], 1000)
    rows = [range(1000 * e, 1000 * e + min(c, 1000), config.bm) for e, c in enumerate(counts)]
    assert sorted(seen) == [(row, n) for each in rows for row in each for n in range(n_tiles)]


def test_tiles_that_cannot_be_in_this_order_are_refused():
    """The warpgroup that loads finds groups; a CTA leaves out what it loads for itself."""
    problem = problem_of([5, 7], 384)
    with pytest.raises(ValueError, match="listed, or found ahead"):
        kernel.build(problem, BROAD._replace(finds=False))
    with pytest.raises(ValueError, match="load rows for each other"):
        kernel.build(problem, TALL._replace(computing=2, bm=128, trims=True))
    with pytest.raises(ValueError, match="only masked ones of two warpgroups"):
        kernel.build(problem, TALL._replace(trims=True))
