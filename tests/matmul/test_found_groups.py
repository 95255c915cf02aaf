"""Tiles of several heights of consecutive groups, which the product finds itself: ragged_dot's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_align_jax._grouped_matmul import choose_tiles, found_groups, launch, reference, tile_order
from moe_align_jax._grouped_matmul import config as tiles
from moe_align_jax._grouped_matmul.problem import MatmulProblem, Weights
from tests.matmul.found import by_ctas

BLOCK = 144
HEIGHTS = (144, 136, 128, 120, 104)
LATE = tiles.Config("swap", BLOCK, 256, 64, 4, group=0, late=True)
FOUND = LATE._replace(heights=HEIGHTS, exact=True, finds=True, trims=True)

# Rows of each group, those of the array, the first group with weights, and how many have some.
CASES: dict[str, tuple[list[int], int, int, int]] = {
    "odd": ([0, 1, 144, 145, 0, 0, 288, 289, 7, 103, 104, 105, 0, 300], 1700, 0, 14),
    "one": ([1000], 1000, 0, 1),
    "nothing": ([0, 0, 0], 300, 0, 3),
    "too many": ([-5, 2**31 - 1, 40, 2**31 - 1], 700, 0, 4),
    "some weights": ([150, 20, 300, 40, 500, 0, 90], 1300, 2, 3),
    "none before": ([150, 20, 300], 600, -2, 3),
    "many": ([(7 * g) % 331 for g in range(256)], 42000, 0, 256),
    "large": ([5000, 0, 12000, 3], 17003, 0, 4),
}


def problem_of(case: str, k: int = 64, n: int = 128, **more: Any) -> MatmulProblem:
    sizes, rows, _, experts = CASES[case]
    kinds = "bfloat16", "bfloat16", Weights(transposed=more.pop("transposed", False))
    return MatmulProblem(
        "test", "ragged", rows, k, n, experts, *kinds, num_groups=len(sizes), **more
    )


def operands_of(case: str) -> tuple[np.ndarray, np.ndarray]:
    sizes, _, offset, _ = CASES[case]
    return np.array(sizes, np.int32), np.array([offset], np.int32)


def by_votes(problem: MatmulProblem, config: tiles.Config, case: str) -> list[np.ndarray]:
    """The values of each tile, as a CTA finds them in the emulator."""
    groups = found_groups.of(problem, config)
    most = -(-problem.num_rows // BLOCK) + problem.num_groups + 1

    def find(t, r):
        count = found_groups.count_of(t, r, groups)
        there = t.cta_id() < count
        tile = found_groups.tile_of(t, r, groups, t.select(there, t.cta_id(), 0))
        return count, *tile

    sizes, offset = operands_of(case)
    found = by_ctas(find, 1 + found_groups.FOUND, most, sizes=sizes, offset=offset)
    count, *tiles_of = found.T
    assert (count == count[0]).all() and count[0] <= most
    return [values[: count[0]] for values in tiles_of]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "even"])
@pytest.mark.parametrize("case", CASES)
def test_tiles_that_are_found(case, exact):
    """Each row is in a tile of its group, of the fewest that hold it, or is zeroed by one tile."""
    sizes, rows, offset, experts = CASES[case]
    problem, config = problem_of(case), FOUND._replace(exact=exact)
    listed = by_votes(problem, config, case)
    ends = np.minimum(np.cumsum(np.maximum(np.array(sizes, np.int64), 0)), rows)
    group = np.searchsorted(ends, np.arange(rows), side="right")
    expert = np.where((group >= offset) & (group < offset + experts), group - offset, -1)
    expert[group >= len(sizes)] = -1
    held, zeroed = np.zeros(rows, int), np.zeros(rows, int)
    for own, row, end, pairs, empty, behind in zip(*listed, strict=True):
        assert end - row in (0, *HEIGHTS) and 0 <= pairs <= end - row
        assert (expert[row : row + pairs] == own).all()
        assert len(set(group[row : row + pairs])) <= 1
        if 0 < pairs < end - row:  # of a group that is less than a tile
            assert (group == group[row]).sum() == pairs
        held[row : row + pairs] += 1
        zeroed[empty:behind] += 1
    assert ((held > 0) == (expert >= 0)).all()
    assert (zeroed == (expert < 0)).all()
    counts = np.bincount(group, minlength=len(sizes) + 1)
    assert len(listed[0]) == (-(-counts // BLOCK)).sum()

    @jax.vmap
    def plainly(at):
        where = (jnp.asarray(a) for a in operands_of(case))
        return found_groups.find_plainly(problem, config, *where, at)

    with jax.enable_x64(False):  # as launches of kernels have it
        told = plainly(jnp.arange(len(listed[0]), dtype=jnp.int32))
        count = found_groups.count_plainly(
            problem, config, *(jnp.asarray(a) for a in operands_of(case))
        )
    for found, one in zip(listed, told, strict=True):
        assert found.tolist() == one.tolist()
    assert int(count) == len(listed[0])


def check(case: str, problem: MatmulProblem, config: tiles.Config, *, interpret: bool) -> None:
    """Right, with zeros in rows without weights; on a GPU always the bits of tiles of one height."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(problem.num_rows, problem.k)), problem.dtype)
    lies = (problem.n, problem.k) if problem.weights.transposed else (problem.k, problem.n)
    w = rng.normal(size=(problem.num_experts, *lies)) * problem.k**-0.5
    operands = [x, jnp.asarray(w, problem.dtype), *(jnp.asarray(a) for a in operands_of(case))]
    want = np.asarray(reference.grouped_matmul(problem, *operands), np.float64)

    def run(chosen):
        program = jax.jit(lambda *a: launch.run(problem, *a, config=chosen, interpret=interpret))
        jax.block_until_ready(jnp.full(problem.out_shape, jnp.nan, problem.out_dtype)).delete()
        return [np.asarray(program(*operands)) for _ in range(1 if interpret else 2)]

    if interpret:
        config = config._replace(num_ctas=2)
    found = run(config)
    error = np.linalg.norm(found[0].astype(np.float64) - want)
    assert error <= 5e-3 * max(np.linalg.norm(want), 1e-30)
    zero = ~want.any(axis=1)
    assert not found[0][zero].any()
    if not interpret:
        found += run(LATE._replace(late=False))
    for one in found[1:]:
        assert one.tobytes() == found[0].tobytes()


@pytest.mark.parametrize("case", ["odd", "some weights", "nothing"])
def test_products_in_the_interpreter(case):
    with jax.default_device(jax.devices("cpu")[0]):
        check(case, problem_of(case, 320, 128), FOUND, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("case", CASES)
def test_products_on_a_gpu(case, group, transposed):
    """Right, and the bits of tiles of one height, which come from a list."""
    problem = problem_of(case, 448, 640, transposed=transposed)
    check(case, problem, FOUND._replace(group=group), interpret=False)


SORTED = {"falling": [9, 7, 5, 4, 3, 2] + [1] * 24, "rising": [1] * 24 + [2, 3, 4, 5, 7, 9]}


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("case", ["falling", "rising", "alike", "one", "two", "no expert"])
def test_blocks_are_mixed_where_experts_are_sorted(case, group):
    """Each tile once; two tiles of the part with most rows, then one of the part with most experts."""
    n_tiles, num_experts = 6, 30
    held = SORTED.get(case) or {"one": [1], "two": [1, 1]}.get(case) or [2] * num_experts
    experts = np.repeat(np.arange(len(held), dtype=np.int32), held)
    if case == "no expert":
        experts[:] = -1
    count, read = len(experts), jnp.asarray(experts)
    known = tile_order.mixing(group, read, num_experts, jnp.int32(count))
    places = jnp.arange(count * n_tiles, dtype=jnp.int32)
    rows, columns = jax.vmap(
        lambda t: tile_order.in_groups(group, t, jnp.int32(count), n_tiles, known)
    )(places)
    every = [(row, n) for row in range(count) for n in range(n_tiles)]
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == every
    plain, _ = jax.vmap(lambda t: tile_order.in_groups(group, t, jnp.int32(count), n_tiles))(places)
    assert (rows.tolist() == plain.tolist()) == (case not in SORTED)
    if case in SORTED:  # at no time are all tiles of experts with one block
        singles = np.flatnonzero(np.array(held) == 1)
        third = count // 3 * n_tiles
        for part in (rows[:third], rows[third : 2 * third], rows[2 * third :]):
            some = np.isin(experts[np.asarray(part)], singles)
            assert 0.2 < some.mean() < 0.8


@pytest.mark.parametrize("a_round", [1, 2, 3, 22, 66, 132])
def test_every_block_is_dealt_once(a_round):
    """However many there are, and whichever part is the small one."""
    places = jnp.arange(300, dtype=jnp.int32)

    @jax.jit
    def dealt(units, falls):
        small = units // 3
        parts = jnp.where(falls, 0, small), jnp.where(falls, units - small, 0)
        known = tile_order.Mixing(small, *parts, units, a_round)
        return jax.vmap(lambda at: tile_order.mixed(known, at))(places)

    for units in (*range(1, 140), 256, 291, 300):
        for falls in (True, False):
            found = np.asarray(dealt(jnp.int32(units), falls))
            assert sorted(found[:units].tolist()) == list(range(units)), (units, falls)
            assert found[units:].tolist() == list(range(units, 300))


@pytest.mark.parametrize("falls", [True, False])
def test_ctas_get_as_much_work_where_blocks_are_dealt(falls):
    """Zipf over 128 experts in 288 blocks, of which 22 are taken in a round: those that take 14 blocks, not
    13, have about three more small ones. Most small ones stand in the rounds of experts with many rows."""
    blocks = -(-(6033 // np.arange(1, 129)) // 144)[:: 1 if falls else -1]
    experts = np.repeat(np.arange(128, dtype=np.int32), blocks)
    units, a_round = len(experts), 22
    known = tile_order.mixing(0, jnp.asarray(experts), 128, jnp.int32(units), a_round)
    places = jnp.arange(units, dtype=jnp.int32)
    order = np.asarray(jax.vmap(lambda at: tile_order.mixed(known, at))(places))
    third = units // 3
    small = order >= units - third if falls else order < third
    more = units % a_round
    of_place = [int(small[place::a_round].sum()) for place in range(a_round)]
    most, least = of_place[:more], of_place[more:]
    assert max(most) - min(most) <= 1 and max(least) - min(least) <= 1
    assert 2 <= min(most) - max(least) <= 4
    rounds = [int(part.sum()) for part in np.split(small, range(a_round, units, a_round))][:-1]
    rounds = np.array(rounds if falls else rounds[::-1])
    assert (np.diff(rounds) <= 2).all() and rounds[:4].mean() > 3 * rounds[-4:].mean()
    large = order[~small]  # remain in their order but for those of a round
    assert np.abs(large - np.arange(len(large)) - (0 if falls else third)).max() < a_round


def test_where_blocks_are_dealt_by_rounds():
    """Where a round is whole, and no product of numbers of blocks overflows."""
    problem = problem_of("odd")._replace(rows="blocks", block_size=144, num_rows=144 * 2000)
    assert tile_order.a_round_of(problem, 132, 6) == 22
    assert tile_order.a_round_of(problem, 132, 8) == 0
    assert tile_order.a_round_of(problem, 132, 66) == 2
    assert tile_order.a_round_of(problem, 132, 132) == 0


def mixed_case(k: int, n: int) -> tuple[Any, MatmulProblem]:
    """Blocks of experts that are sorted by their rows."""
    from tests.matmul import test_heights

    held = [(0, 144), (0, 144), (0, 100), (1, 144), (1, 30), *((e, 12 * e) for e in range(2, 9))]
    where = test_heights.made(144, 18, held)
    return where, test_heights.problem_of(where, 144, 18, k, n)


DEALT = FOUND._replace(heights=(*HEIGHTS, 80), mixes=True, deals=True)


@pytest.mark.parametrize("group, deals", [(0, False), (2, False), (0, True)])
def test_products_of_mixed_blocks_in_the_interpreter(group, deals, monkeypatch):
    """Right; and the kernel takes its tiles in that order."""
    from tests.matmul import test_heights

    where, problem = mixed_case(64, 128)
    config = DEALT if deals else FOUND._replace(group=group, mixes=True)
    assert tiles.refused(problem, config) is None
    name, asked = "dealt" if deals else "mixed", []
    usual = getattr(tile_order, name)
    monkeypatch.setattr(tile_order, name, lambda known, at: asked.append(at) or usual(known, at))
    with jax.default_device(jax.devices("cpu")[0]):
        test_heights.check(where, problem, config, interpret=True)
    assert asked


@pytest.mark.gpu
@pytest.mark.parametrize("n", [256, 1536])
def test_products_of_dealt_blocks_on_a_gpu(n):
    """Right, and the bits of tiles of one height, which are taken in order."""
    from tests.matmul import test_heights

    where, problem = mixed_case(448, n)
    test_heights.check(where, problem, DEALT, interpret=False)


def test_what_cannot_be_dealt():
    """Groups of blocks, and blocks that are not mixed."""
    problem = mixed_case(64, 128)[1]
    assert tiles.refused(problem, DEALT) is None
    for other in (DEALT._replace(group=4), DEALT._replace(mixes=False)):
        assert "dealt" in (tiles.refused(problem, other) or "")


def test_groups_are_mixed():
    """Groups that are sorted by their rows: each stretch of tiles has some of small and of large ones."""
    sizes = (3000 // np.arange(1, 65)).astype(np.int32)
    rows = int(sizes.sum())
    problem = problem_of("odd")._replace(num_rows=rows, num_groups=64, num_experts=64)
    where = jnp.asarray(sizes), jnp.zeros(1, jnp.int32)
    count = int(found_groups.count_plainly(problem, FOUND, *where))
    expert, *_ = jax.vmap(lambda at: found_groups.find_plainly(problem, FOUND, *where, at))(
        jnp.arange(count, dtype=jnp.int32)
    )
    assert (np.diff(np.flatnonzero(np.asarray(expert) == 0)) == 1).all()  # remain neighbours
    for part in np.array_split(np.asarray(expert)[21:], 4):  # behind the first one's
        assert 0.2 < (sizes[part] <= 144).mean() < 0.9


def test_which_products_take_them():
    """From 64 rows a group on, of more than 16 experts; of few, where two tiles of 144 rows hold a group."""

    def chosen(rows, groups, k=2048, n=1536, **more):
        weights = more.pop("weights", Weights())
        kinds = "bfloat16", more.pop("out_dtype", "bfloat16"), weights
        given = MatmulProblem(
            "test", "ragged", rows, k, n, groups, *kinds, num_groups=groups, **more
        )
        return choose_tiles.config_for(given)

    assert chosen(32768, 128) == FOUND
    for experts in (8, 128):
        blocks = MatmulProblem(
            *("test", "blocks", experts * 400, 2048, 1536, experts, "bfloat16", "bfloat16"),
            **{"block_size": BLOCK, "zero_padding": False, "num_pairs": experts * 256},
        )
        chosen_of_blocks = choose_tiles.config_for(blocks)
        many = experts == 128
        assert (chosen_of_blocks.mixes, chosen_of_blocks.deals) == (many, many)
        assert chosen_of_blocks.heights[-1] == (80 if many else 104)
        long = choose_tiles.config_for(blocks._replace(k=4096))
        assert (long.mixes, long.deals, long.heights[-1]) == (many, False, 104)
    assert chosen(8192, 128) == FOUND
    assert chosen(65536, 128, 768, 2048) == FOUND._replace(group=4)
    assert chosen(2048, 8) == FOUND._replace(group=4)
    assert chosen(131072, 256, weights=Weights(transposed=True)) == FOUND
    for usual in (
        chosen(32768, 8),
        chosen(8191, 128),
        chosen(131072, 257),
        chosen(32768, 128, n=64),
        chosen(32768, 128, k=2056),
        chosen(32768, 128, out_dtype="float32"),
        chosen(32768, 128, weights=Weights(bias=True)),
    ):
        assert not usual.heights and not usual.finds
