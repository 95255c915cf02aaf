"""Units of masked groups that have tiles of two shapes, beside loops: what a cluster has at a time."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from moe_align_jax._grouped_matmul import config as tiles
from moe_align_jax._grouped_matmul import cta_tiles, found_masked, found_turned, kernel
from moe_align_jax._grouped_matmul.problem import E4M3, MatmulProblem, Scales, Weights
from moe_align_jax._grouped_matmul.shape import shape_of
from tests.matmul.found import by_ctas

TURNED = tiles.Config("m", 128, 192, 128, 4, group=8, ahead=True, skips=True, finds=True)
TURNED = TURNED._replace(by_expert=True, sharing=2, shared="w", turned=True)
MOST = 1024
COUNTS = {
    "one": [0, 1, 63, 64, 65, 128, 129, 192, 193, 256, 257, 320, 321, 384, 385, 449, 513, 1024],
    "none": [0, 0, 0],
    "all": [1024, 1024],
    "ill": [-3, 2000, 0, 1 << 30, 5],
    "many": [*range(0, 1000, 33), 128],
    "no pair": [192, 384, 5, 300],
    "last": [0] * 31 + [200],
    "two": [200, 0, 230],
}
PAIR, ALONE, TALL, HALF = range(4)


def problem_of(counts: list[int], n: int, **more: Any) -> MatmulProblem:
    given: dict[str, Any] = {"max_rows": MOST, "dtype": E4M3, "out_dtype": "bfloat16"}
    given |= {"num_rows": MOST * len(counts), "num_experts": len(counts), "k": 256, "n": n}
    given |= {"scales": Scales("column_major", "blocks", pitch=MOST)}
    given |= {"weights": Weights(transposed=True)}
    return MatmulProblem("test", "masked", **given | more)


def cut(rows: int) -> tuple[int, int]:
    """(Turned tiles, pairs) of a group of more than 128 rows: by trying, the least rows that hold all of
    them, and the fewest turned tiles."""
    found = [(192 * a + 256 * b - rows, a, b) for a in range(4) for b in range(9)]
    return min(each for each in found if each[0] >= 0)[1:]


def wanted(counts: list[int], n: int, clusters: int) -> list[tuple[int, ...]]:
    """(Group, first row, end, n, kind) of each unit, in order."""
    wide, first, later = -(-n // 192), [], []
    for group, count in enumerate(counts):
        rows = min(max(count, 0), MOST)
        start, end = MOST * group, MOST * group + rows
        if rows <= 128:
            first += [(group, start, end, at, ALONE) for at in range(0, wide, 2) if rows]
            continue
        turned, pairs = cut(rows)
        into = later if pairs else first
        for at in range(n // 256):
            into += [(group, start + 192 * i, end, at, TALL) for i in range(turned)]
        start += 192 * turned
        for at in range(wide):
            into += [(group, start + 256 * i, end, at, PAIR) for i in range(pairs)]
    units = first + later
    whole = len(units) // clusters * clusters
    last = units[whole:]
    if later and len(last) <= min(clusters // 2, wide):
        units = units[:whole]
        for group, row, end, at, _ in last:
            units += [(group, row + down, end, at, HALF) for down in (0, 128)]
    return units


@pytest.mark.parametrize("ctas", [2, 12, 132])
@pytest.mark.parametrize("n", [256, 768, 1024])
@pytest.mark.parametrize("name", COUNTS)
def test_units_are_found(name, n, ctas):
    """By votes, in the emulator, and by the interpreter's plain twin."""
    counts, config = COUNTS[name], TURNED._replace(num_ctas=ctas)
    problem, units = problem_of(counts, n), wanted(counts, n, ctas // 2)
    masked_m, size, wide = np.array(counts, np.int32), max(1, len(units)), -(-n // 192)

    def find(t, r):
        given = found_turned.units_of(problem, config, wide)
        return found_turned.unit_of(t, r, given, t.cta_id())

    found = by_ctas(find, found_turned.FOUND, size, masked_m=masked_m)
    assert (found[:, -1] == len(units)).all()
    assert [tuple(row) for row in found[: len(units), :-1].tolist()] == units
    for at in {0, len(units) // 2, max(0, len(units) - 1)}:
        given = problem, config, wide, jnp.asarray(masked_m), jnp.int32(at)
        plain = [int(value) for value in found_turned.find_plainly(*given)]
        assert plain[-1] == len(units)
        assert not units or tuple(plain[:-1]) == units[at]


@pytest.mark.parametrize(("n", "ctas"), [(256, 2), (768, 12), (1024, 132)])
@pytest.mark.parametrize("name", COUNTS)
def test_tiles_hold_every_row_and_column_once(name, n, ctas):
    """Of rows in use; no warpgroup stores rows of another group or behind the array."""
    counts = COUNTS[name]
    problem, config = problem_of(counts, n), TURNED._replace(num_ctas=ctas)
    shape, held = shape_of(problem, config), np.zeros((len(counts) * MOST, 1024 + 384), int)
    for unit in wanted(counts, n, ctas // 2):
        for rank in range(2):
            given = jnp.array([*unit, 0], jnp.int32), jnp.int32(rank)
            tile = cta_tiles.turned_tile_of_unit(problem, config, shape, *given)
            row, used, at = int(tile.row), int(tile.used), int(tile.n)
            assert bool(tile.turned) == (unit[4] == TALL) and int(tile.expert) == unit[0]
            if tile.turned:
                assert row + 192 <= MOST * (unit[0] + 1) and 128 * at < n
                held[row : row + 192, 128 * at : 128 * at + 128] += 1
                continue
            for first in (row, row + 64):
                if tile.there and first < used:
                    assert first + 64 <= MOST * (unit[0] + 1)
                    held[first : first + 64, 192 * at : 192 * at + 192] += 1
    held = held[:, :n]
    for group, count in enumerate(counts):
        rows = min(max(count, 0), MOST)
        assert (held[MOST * group : MOST * group + rows] == 1).all()
        assert (held[MOST * group : MOST * (group + 1)] <= 1).all()


def test_turns_are_those_of_other_units():
    """Of a last turn of halves, too: `CtaTiles` takes the numbers of found_masked.py."""
    for total in (0, 8, 66, 74, 132):
        seen = []
        for cluster in range(66):
            count = int(found_masked.units_for(jnp.int32(total), jnp.int32(cluster), 66))
            at = jnp.arange(count, dtype=jnp.int32)
            seen += map(int, found_masked.unit_in_turn(at, jnp.int32(cluster), 66))
        assert sorted(seen) == [*range(total)]


@pytest.mark.parametrize(
    ("more", "changes", "match"),
    [
        ({"scales": Scales("row_major", "blocks")}, {}, "of x by columns"),
        ({"scales": Scales("column_major", "blocks", pitch=1022)}, {}, "that TMA loads"),
        ({"n": 384}, {}, "come by twos"),
        ({"max_rows": 256, "num_rows": 512}, {}, "room for two"),
        ({"max_rows": 1000, "num_rows": 2000}, {}, "whole tiles"),
        ({"num_experts": 33, "num_rows": 33 * MOST}, {}, "at most 32 groups"),
        ({"weights": Weights(transposed=True, bias=True)}, {}, "stored as they are"),
        ({}, {"sharing": 0}, "clusters that share weights"),
        ({}, {"bn": 128}, "128 x 192"),
        ({}, {"trims": True}, "128 x 192"),
    ],
)
def test_tiles_that_cannot_be_are_refused(more, changes, match):
    problem = problem_of([5, 7], **{"n": 512} | more)
    with pytest.raises(ValueError, match=match):
        kernel.build(problem, TURNED._replace(**changes))
