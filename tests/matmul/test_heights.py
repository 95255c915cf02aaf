"""Tiles of several heights: the list that cuts an expert's blocks anew, and the product by them.

Blocks are made by hand, as a caller may make them: without an expert, of one expert in two places, not full
before an expert's last one.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

import moe_align_jax as maj
from moe_align_jax._grouped_matmul import (
    choose_tiles,
    cut_list,
    found_cut,
    kernel,
    launch,
    reference,
)
from moe_align_jax._grouped_matmul import config as tiles
from moe_align_jax._grouped_matmul.direct_problem import DirectMatmul
from moe_align_jax._grouped_matmul.problem import MatmulProblem, Weights
from moe_align_jax._simt import emulator
from tests.matmul.found import by_ctas

ROOT = Path(__file__).parents[2]
TALL = tiles.Config("swap", 192, 256, 64, 3, lag=1)


class Made(NamedTuple):
    """Blocks, each of an expert with so many pairs, as arrays.

    Attributes:
        ids, experts, used: sorted_token_ids, expert_ids and num_tokens_post_padded.
        held: which rows hold a pair of an expert.
    """

    ids: np.ndarray
    experts: np.ndarray
    used: np.ndarray
    held: np.ndarray


def made(block: int, num_experts: int, given: list[tuple[int, int]], spare: int = 1) -> Made:
    """`given`: expert and pairs of each block; `spare` blocks behind them are not in use."""
    pairs = sum(count for _, count in given)
    ids = np.full((len(given) + spare) * block, pairs, np.int32)
    held, after = np.zeros(len(ids), bool), 0
    for at, (expert, count) in enumerate(given):
        ids[at * block : at * block + count] = np.arange(after, after + count)
        held[at * block : at * block + count] = 0 <= expert < num_experts
        after += count
    experts = np.array([expert for expert, _ in given] + [0] * spare, np.int32)
    return Made(ids, experts, np.array([len(given) * block], np.int32), held)


# Of blocks of 144 rows, three experts: some tiles less than full, a block of no expert between two of one
# expert, one expert twice, one row, all full, none of a pair, and blocks that are not full before the last.
ODD = [(0, 144), (0, 144), (0, 100), (-1, 0), (0, 7), (1, 144), (1, 1), (2, 1), (0, 144), (0, 144)]
ODD += [(1, 144), (1, 0), (2, 10), (2, 100), (7, 30), (2, 144)]
LISTS: dict[str, tuple[int, list[tuple[int, int]]]] = {
    "odd": (144, ODD),
    "nothing": (144, []),
    "many": (192, [(e, p) for e in range(180) for p in (192, 192, 1 + e)]),
    "few": (184, [(e, 184) for e in range(2) for _ in range(20)] + [(2, 184), (2, 5)]),
    "no expert": (144, [(-1, 0)] * 3 + [(0, 144), (0, 120)]),
}


def check_tile(where, block, heights, seen, expert, start, end, pairs, empty, behind) -> int:
    """Rows that a tile multiplies. Those and the ones that it clears are counted in `seen`."""
    assert end - start in (0, *heights) and 0 <= pairs <= end - start
    assert where.held[start : start + pairs].all()
    assert not where.held[start + pairs : end].any() and not where.held[empty:behind].any()
    own = where.experts[start // block : -(-(start + pairs) // block)] if pairs else ()
    assert (own == expert).all() if pairs else True
    seen[start:end] += 1
    seen[empty:behind] += 1
    return end - start


@pytest.mark.parametrize("kind", ["exact", "even", "falling"])
@pytest.mark.parametrize("known", [True, False], ids=["pairs are known", "the last id tells"])
@pytest.mark.parametrize("case", LISTS)
def test_list_of_tiles(case, known, kind):
    """Each row in use is one tile's, whose rows to multiply hold all pairs, and of its expert alone."""
    exact = kind == "exact"
    block, given = LISTS[case]
    num_experts = max([e for e, _ in given if e != 7], default=0) + 1
    heights = tuple(range(block, block // 2, -8))
    where = made(block, num_experts, given)
    cut = cut_list.CutList(
        *(len(where.ids), block, len(where.experts), num_experts),
        *(int(where.ids[-1]) if known else 0, heights, exact, kind == "falling"),
    )
    count, *listed = emulator.run(cut_list.build(cut), [where.ids, where.experts, where.used])
    assert count[0] == len(given)
    seen, computed = np.zeros(len(where.ids), int), 0
    for tile in zip(*(a[: count[0]] for a in listed), strict=True):
        computed += check_tile(where, block, heights, seen, *tile)
    assert (seen == (np.arange(len(seen)) < where.used[0])).all()
    if kind == "falling":
        rows = (listed[2] - listed[1])[: count[0]]
        assert (np.diff(rows) <= 0).all()
        # Of one height, in the order of their rows: an expert's tiles remain neighbours.
        same = np.flatnonzero(np.diff(rows) == 0)
        assert (listed[1][same] < listed[1][same + 1]).all()
    usual = block * sum(p > 0 and 0 <= e < num_experts for e, p in given)
    if case == "few":  # one step of rows at most behind the pairs of each expert of many blocks
        least = 2 * 20 * 184 + 192
        assert computed == least if exact else computed <= usual
    if case == "many":
        assert computed <= usual
        assert computed < 0.9 * usual


# (Runs, tiles of each, tiles of a round, CTAs that take a tile of the last round: none, where the tiles are
# not dealt out).
DEALT = [
    (50, 3, 33, 18),
    (56, 3, 33, 3),
    (51, 3, 33, 21),
    (53, 3, 33, 0),  # 27 are more than two thirds
    (55, 3, 33, 0),  # whole rounds
    (36, 4, 33, 12),
    (40, 4, 33, 0),
    (70, 1, 11, 4),
    (45, 3, 22, 3),
    (4, 3, 11, 1),
    (3, 3, 33, 0),  # less than a round
]


@pytest.mark.parametrize(("runs", "tiles", "a_round", "low"), DEALT)
def test_tiles_that_are_dealt_out(runs, tiles, a_round, low):
    """The CTAs that take a tile of the last round have the lowest ones in all rounds; heights fall."""
    block, rng = 192, np.random.default_rng(0)
    given = [
        (e, pairs)
        for e, last in enumerate(rng.integers(1, block + 1, runs))
        for pairs in [block] * (tiles - 1) + [int(last)]
    ]
    where = made(block, runs, given)
    heights = (192, 184, 176, 168, 152, 96)
    cut = cut_list.CutList(
        *(len(where.ids), block, len(where.experts), runs, 0, heights, False, True)
    )
    operands = [where.ids, where.experts, where.used]
    count, *plain = emulator.run(cut_list.build(cut), operands)
    _, *dealt = emulator.run(cut_list.build(cut._replace(a_round=a_round)), operands)
    of_plain, of_dealt = ([tuple(row) for row in zip(*x, strict=True)] for x in (plain, dealt))
    count = int(count[0])
    assert count == len(given) == runs * tiles
    assert sorted(of_plain[:count]) == sorted(of_dealt[:count])
    if not low:
        assert of_plain[:count] == of_dealt[:count]
        return
    rows = np.full(-(-count // a_round) * a_round, -1)
    rows[:count] = (dealt[2] - dealt[1])[:count]
    rounds = rows.reshape(-1, a_round)  # a column is a CTA's
    assert ((rounds[-1] >= 0) == (np.arange(a_round) < low)).all()
    assert (np.diff(rounds[:, :low], axis=0) <= 0).all()
    assert (np.diff(rounds[:-1, low:], axis=0) <= 0).all()
    assert rounds[:, :low].max() <= rounds[:-1, low:].min()


class _Memory:
    """An array as a kernel reads it: by an index, or a slice that begins at one."""

    def __init__(self, values: np.ndarray):
        self.values = jnp.asarray(values)

    def __getitem__(self, at: Any) -> jax.Array:
        if isinstance(at, pl.Slice):
            return lax.dynamic_slice(self.values, (at.start,), (at.size,))
        return self.values[at]


def found_by_votes(cut: cut_list.CutList, where: Made, used: int) -> list[np.ndarray]:
    """The values of each tile, as a CTA finds them in the emulator."""

    def find(t, r):
        limit = cut_list.limit_of(t, cut, r.sorted_token_ids)
        return found_cut.tile_of(t, r, cut, t.cta_id(), t.const(used), limit)

    given = {"sorted_token_ids": where.ids, "expert_ids": where.experts}
    return list(by_ctas(find, found_cut.FOUND, used, **given).T)


LONG = [(e, p) for e, c in enumerate((31, 32, 33, 64, 97)) for p in [144] * c + [1 + e]]
LONG += [(5, 144)] * 32 + [(6, 144)] * 65 + [(7, 9)]
FOUND_LISTS = LISTS | {"long": (144, LONG)}


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "even"])
@pytest.mark.parametrize("known", [True, False], ids=["pairs are known", "the last id tells"])
@pytest.mark.parametrize("case", [case for case in FOUND_LISTS if case != "nothing"])
def test_tiles_that_are_found(case, known, exact):
    """Each row in use is one tile's; where blocks but the last are full, they are those of the list."""
    block, given = FOUND_LISTS[case]
    num_experts = max([e for e, _ in given if e != 7 or case == "long"], default=0) + 1
    where = made(block, num_experts, given)
    heights = tuple(range(block, block // 2, -8))
    problem = problem_of(where, block, num_experts, 64, 128)
    if not known:
        problem = problem._replace(num_pairs=0)
    cut = cut_list.of(problem, heights, exact)
    listed = found_by_votes(cut, where, len(given))
    seen = np.zeros(len(where.ids), int)
    for tile in zip(*listed, strict=True):
        check_tile(where, block, heights, seen, *tile)
    assert (seen == (np.arange(len(seen)) < where.used[0])).all()
    if case != "odd":
        count, *want = emulator.run(cut_list.build(cut), [where.ids, where.experts, where.used])
        for found, one in zip(listed[1:], want[1:], strict=True):
            assert found.tolist() == one[: count[0]].tolist()
    config = TALL._replace(bm=block, heights=heights, exact=exact, finds=True)
    experts, ids = _Memory(where.experts), _Memory(where.ids)

    @jax.vmap
    def plainly(at):
        used, limit = (jnp.int32(value) for value in (len(given), where.ids[-1]))
        return found_cut.find_plainly(problem, config, experts, ids, at, used, limit)

    for found, one in zip(listed, plainly(jnp.arange(len(given), dtype=jnp.int32)), strict=True):
        assert found.tolist() == one.tolist()


@pytest.mark.parametrize(
    ("pairs", "exact", "even"),
    [
        ((192, 192, 96), [176, 176, 176], [176, 176, 176]),  # not 176, 152 and 152
        ((192, 192, 1), [152, 152, 152], [152, 152, 152]),
        ((192, 192, 141), [176, 176, 176], [176, 176, 176]),
        ((192, 192, 145), [184, 176, 176], [184, 184, 184]),
        ((192, 77), [152, 152], [152, 152]),
        ((192, 192, 192, 192, 1), [176, 176, 152, 152, 152], [176] * 5),
        ((8,), [152], [152]),
    ],
)
def test_each_tile_has_the_least_height_for_its_share(pairs, exact, even):
    """Of those that `config_for` gives to blocks of 192 rows, between which heights are left out."""
    where = made(192, 1, [(0, count) for count in pairs])
    cut = cut_list.CutList(
        *(len(where.ids), 192, len(where.experts), 1),
        int(where.ids[-1]),
        (192, 184, 176, 152),
        True,
    )
    for one, heights in ((cut, exact), (cut._replace(exact=False), even)):
        count, _, start, end, *_ = emulator.run(
            cut_list.build(one), [where.ids, where.experts, where.used]
        )
        assert (end - start)[: count[0]].tolist() == heights


@pytest.mark.parametrize("pairs", [(144, 144, 144, 80), (144, 144, 1), (144, 144), (1,), (0,)])
def test_each_tile_of_a_run_clears_as_many_rows(pairs):
    """Where the last one cleared them all, the CTA that had it in each run fell behind the others."""
    where = made(144, 1, [(0, count) for count in pairs])
    cut = cut_list.CutList(
        *(len(where.ids), 144, len(where.experts), 1, int(where.ids[-1])),
        *((144, 136, 128, 120, 104), True),
    )
    count, _, start, end, _, empty, behind = emulator.run(
        cut_list.build(cut), [where.ids, where.experts, where.used]
    )
    cleared = np.maximum(behind - empty, 0)[: count[0]]
    left = where.used[0] - (end - start)[: count[0]].sum()
    assert cleared.sum() == left
    assert (cleared <= -(-left // len(pairs))).all()


def problem_of(where: Made, block: int, num_experts: int, k: int, n: int, **more: Any):
    options: dict[str, Any] = {"block_size": block, "num_pairs": int(where.ids[-1])} | more
    weights = Weights(transposed=options.pop("transposed", False))
    kinds = options.pop("dtype", "bfloat16")
    return MatmulProblem(
        *("test", "blocks", len(where.ids), k, n, num_experts, kinds, kinds, weights), **options
    )


def check(where: Made, problem: MatmulProblem, config: tiles.Config, *, interpret: bool) -> None:
    """Right, and zeros in rows in use that hold no pair; on a GPU always the bits of tiles of one height."""
    assert config.heights
    rng = np.random.default_rng(0)
    x = rng.normal(size=(problem.num_rows, problem.k)).astype(np.float32)
    x[~where.held] = np.nan
    lies = (problem.n, problem.k) if problem.weights.transposed else (problem.k, problem.n)
    w = rng.normal(size=(problem.num_experts, *lies)).astype(np.float32) * problem.k**-0.5
    operands = [jnp.asarray(x, problem.dtype), jnp.asarray(w, problem.dtype)]
    operands += [jnp.asarray(a) for a in where[:3]]
    usual = config._replace(heights=(), exact=False, falling=False, finds=False, trims=False)
    usual = usual._replace(mixes=False, deals=False)
    if interpret:
        config = config._replace(num_ctas=2)

    def run(tiles_):
        call = functools.partial(launch.run, problem, config=tiles_, interpret=interpret)
        program = jax.jit(call)
        jax.block_until_ready(jnp.full(problem.out_shape, jnp.nan, problem.out_dtype)).delete()
        return [np.asarray(program(*operands)) for _ in range(1 if interpret else 2)]

    found = run(config)
    used = np.arange(problem.num_rows) < where.used[0]
    want = np.asarray(reference.grouped_matmul(problem, *operands), np.float64)[where.held]
    for one in found:
        error = np.linalg.norm(one[where.held].astype(np.float64) - want)
        assert error <= 5e-3 * np.linalg.norm(want)
        if problem.zero_padding:
            assert not one[used & ~where.held].any()
    rows = used if problem.zero_padding else where.held
    for one in found[1:] if interpret else (*found[1:], *run(usual)):
        assert one[rows].tobytes() == found[0][rows].tobytes()


HEIGHTS = (8, 16, 24, 40)
FOUND = [(0, 144), (0, 60), (-1, 0), (1, 144), (1, 144), (1, 3), (2, 1), (3, 144)]


@pytest.mark.parametrize("late", [True, False], ids=["late", "at once"])
def test_tiles_that_are_found_in_the_interpreter(late):
    """Tiles of two heights, of none, and behind the rows in use; each is told to the other warpgroups."""
    where = made(144, 4, FOUND)
    problem = problem_of(where, 144, 4, 320, 128)
    usual = tiles.Config("swap", 144, 256, 64, 4, group=2)
    more = {"finds": True, "late": late, "trims": late}
    config = tiles.with_heights(problem, usual, HEIGHTS, True, **more)
    assert config.cuts and config.late == late
    with jax.default_device(jax.devices("cpu")[0]):
        check(where, problem, config, interpret=True)
        nothing = where._replace(used=np.zeros(1, np.int32), held=np.zeros(len(where.ids), bool))
        check(nothing, problem, config, interpret=True)
        beyond = where._replace(used=np.full(1, 9 * len(where.ids), np.int32))
        check(beyond, problem, config, interpret=True)


_IN_ANOTHER_PROCESS = """
import jax
from tests.matmul import test_heights as here
with jax.default_device(jax.devices("cpu")[0]):
    here.gathered_in_the_interpreter()
print("right")
"""


def test_gathered_tiles_that_are_found_in_the_interpreter():
    """Also of many blocks of no expert behind others: where the warpgroup that loads told of them before it
    had said that the last rows are there, all waited for each other. In a process that can be ended."""
    done = subprocess.run(
        [sys.executable, "-c", _IN_ANOTHER_PROCESS],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split()[-1:] == ["right"], done.stderr[-3000:]


def gathered_in_the_interpreter() -> None:
    """Gate and up of gathered rows: blocks of one expert, cut anew, hold any tokens."""
    where = made(144, 4, FOUND + [(-1, 0)] * 8)
    pairs, tokens = int(where.ids[-1]), 128
    rng = np.random.default_rng(2)
    ids = where.ids.copy()
    ids[where.ids < pairs] = rng.permutation(5 * tokens)[:pairs]
    ids[where.ids >= pairs] = 5 * tokens
    problem = problem_of(where, 144, 4, 128, 128, num_tokens=tokens, top_k=5, zero_padding=False)
    problem = problem._replace(weights=Weights(activation="silu", gated=True), num_pairs=0)
    usual = tiles.Config("swap", 144, 256, 64, 4, group=2, lag=2)
    config = tiles.with_heights(problem, usual, HEIGHTS, True, finds=True, late=True)
    assert config.cuts
    x = rng.normal(size=(tokens, 128))
    w = rng.normal(size=(4, 128, 256)) * 128**-0.5
    operands = [jnp.asarray(x, "bfloat16"), jnp.asarray(w, "bfloat16"), jnp.asarray(ids)]
    operands += [jnp.asarray(a) for a in (where.experts, where.used)]
    out = launch.run(problem, *operands, interpret=True, config=config._replace(num_ctas=2))
    want = np.asarray(reference.grouped_matmul(problem, *operands), np.float64)[where.held]
    error = np.linalg.norm(np.asarray(out, np.float64)[where.held] - want)
    assert error <= 5e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("falling", [False, True])
def test_product_in_the_interpreter(falling):
    """Half of the tile's columns are there; rows of a piece that has not all of its own."""
    given = [(0, 152), (0, 100), (-1, 0), (0, 7), (1, 152), (1, 1), (2, 10), (2, 100)]
    where = made(152, 3, given)
    problem = problem_of(where, 152, 3, 64, 128)
    with jax.default_device(jax.devices("cpu")[0]):
        usual = TALL._replace(bm=152)
        config = tiles.with_heights(problem, usual, (16,), not falling, falling=falling)
        check(where, problem, config, interpret=True)


def test_what_cannot_be_cut_is_refused():
    where = made(184, 3, ODD)
    problem = problem_of(where, 184, 3, 64, 384)
    usual = TALL._replace(bm=184)
    tall = tiles.with_heights(problem, usual, HEIGHTS, True)
    assert tall.heights == (184, 176, 168, 160, 144)
    kernel.build(problem, tall)
    for refused, reason in [
        (tall._replace(late=True), "stored at once"),
        (usual._replace(finds=True), "in the masked layout alone"),
        (tall._replace(heights=(184, 0)), "multiples of 8"),
        (tall._replace(heights=(184, 180)), "multiples of 8"),
        (tall._replace(heights=(176, 168)), "fall from a block's"),
        (tall._replace(bm=92), "each as high"),
        (tall._replace(falling=True), "by falling height"),
        (tall._replace(falling=True, exact=False, finds=True), "by falling height"),
        (tall._replace(sharing=2), "one CTA each"),
    ]:
        with pytest.raises(ValueError, match=reason):
            kernel.build(problem, refused)
    for other in (
        {"block_size": 368},
        {"row_weights": True},
        {"num_tokens": 9, "top_k": 1},
        {"weights": Weights(bias=True)},
        {"n": 40},
    ):
        assert tiles.with_heights(problem._replace(**other), usual, HEIGHTS, True) == usual
    low = problem._replace(block_size=144)
    late = tiles.Config("swap", 144, 256, 64, 4, late=True)
    assert tiles.with_heights(low, late, (8, 72), True) == late
    assert tiles.with_heights(low, late, HEIGHTS, True, late=True).late
    gathered = low._replace(num_tokens=9, top_k=1)
    for lag in (2, 3):  # of three steps a tile of one step would wait for itself
        found = tiles.with_heights(gathered, late._replace(lag=lag), HEIGHTS, True, finds=True)
        assert bool(found.heights) == (lag == 2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("block", "padding", "transposed", "exact"),
    [
        *((176, padding, True, True) for padding in ("zeros", "any", "left")),
        *((184, padding, True, True) for padding in ("zeros", "any", "left")),
        *((block, "zeros", False, True) for block in (176, 184, 192)),
        *((184, "left", False, True), (192, "zeros", True, True), (192, "left", False, True)),
        *((192, "any", True, False), (192, "left", True, False), (192, "any", False, False)),
    ],
)
def test_products_on_a_gpu(block, padding, transposed, exact):
    given = [(e, block if p == 144 else p) for e, p in ODD]
    given += [(e, p) for e in range(8) for p in [block] * (2 * e) + [1 + 17 * e]]
    where = made(block, 8, given)
    options = {"zero_padding": padding == "zeros", "leaves_padding": padding == "left"}
    problem = problem_of(where, block, 8, 448, 640, transposed=transposed, **options)
    config = tiles.with_heights(problem, TALL._replace(bm=block), HEIGHTS, exact)
    check(where, problem, config, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("block", "padding", "transposed", "late"),
    [
        *((144, padding, False, late) for padding in ("zeros", "left") for late in (True, False)),
        *((144, padding, True, True) for padding in ("zeros", "any", "left")),
        (176, "zeros", False, False),
        (184, "left", True, False),
        (192, "any", False, False),
    ],
)
def test_tiles_that_are_found_on_a_gpu(block, padding, transposed, late):
    """Of runs of up to 97 blocks, and of blocks that are no run of full ones."""
    given = [(e, block if p == 144 else p) for e, p in ODD + LONG]
    where = made(block, 8, given)
    options = {"zero_padding": padding == "zeros", "leaves_padding": padding == "left"}
    problem = problem_of(where, block, 8, 448, 640, transposed=transposed, **options)
    stages = 4 if block == 144 else 3
    usual = tiles.Config("swap", block, 256, 64, stages, group=4)
    more = {"finds": True, "late": late, "trims": padding == "zeros"}
    config = tiles.with_heights(problem, usual, HEIGHTS, block < 192, **more)
    check(where, problem, config, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [176, 184, 192])
@pytest.mark.parametrize("transposed", [True, False])
def test_tiles_by_height_on_a_gpu(block, transposed):
    """Right, and the bits of tiles of one height."""
    given = [(e, block if p == 144 else p) for e, p in ODD]
    given += [(e, p) for e in range(8) for p in [block] * (2 * e) + [1 + 17 * e]]
    where = made(block, 8, given)
    problem = problem_of(where, block, 8, 448, 1024, transposed=transposed)
    more = {"falling": True, "trims": True}
    config = tiles.with_heights(problem, TALL._replace(bm=block), HEIGHTS, **more)
    check(where, problem, config, interpret=False)


def test_which_products_take_them():
    """Blocks of 144 rows; of few experts those of 176 and more, but no gate and up; of many, by a list, those
    of 184 and 192."""

    def chosen(block, experts, k=4096, n=14336, rows=7, **more):
        weights = more.pop("weights", Weights())
        given = problem_of(made(block, experts, []), block, experts, k, n, **more)
        given = given._replace(num_rows=experts * block * rows, weights=weights)
        found = choose_tiles.config_for(given)
        assert found.bm == block
        if not found.heights:
            assert not (found.finds or found.falling or found.exact or found.trims)
            return None
        assert found.heights[0] == block
        kind = "exact" if found.exact else "falling" if found.falling else "even"
        flags = found.finds, found.late, found.trims
        return found.heights[1:], kind, found.group, *flags

    any_rows: dict[str, bool] = {"zero_padding": False, "consecutive": True}
    silu = Weights(activation="silu", gated=True)
    gather = {"num_tokens": 4096, "top_k": 8, "zero_padding": False}
    low, lowest = (136, 128, 120, 104), (136, 128, 120, 104, 80)
    assert chosen(144, 128) == (low, "exact", 4, True, True, True)
    assert chosen(144, 128, 4096, 2048, **any_rows) == (low, "exact", 0, True, True, True)
    assert chosen(144, 128, 2048, 2048, **any_rows) == (lowest, "exact", 0, True, True, True)
    assert chosen(144, 8, n=2048, rows=3) == (low, "exact", 4, True, True, True)
    assert chosen(144, 128, 2048, 768, weights=silu, **gather) == (
        lowest,
        *("exact", 0),
        True,
        True,
        False,
    )
    assert chosen(144, 128, 1536, n=2048, **any_rows) == (low, "exact", 4, True, True, True)
    assert chosen(144, 128, 2048, 2048, **gather) == (low, "exact", 0, True, False, False)
    assert chosen(144, 128, 2048, 1088, weights=silu, **gather)[2] == 4
    assert chosen(192, 8) == ((184, 176, 152), "exact", 8, True, False, False)
    assert chosen(176, 8, rows=3, **any_rows) == ((168, 160, 136), "exact", 6, True, False, False)
    tall = 4, True, False, False
    assert chosen(184, 256, 1024, **any_rows) == ((176, 168, 160, 144), "exact", *tall)
    of_184 = (176, 168, 160, 144), "exact", 6, True, False
    both: dict[str, Any] = {"consecutive": True, **gather}
    assert chosen(184, 128, 2048, 768, weights=silu, **both) == (*of_184, False)
    assert chosen(184, 128, 768, 2048, **any_rows) == (*of_184, True)
    assert chosen(144, 256, 7168, 256, weights=silu, **gather)[3:] == (True, False, False)
    assert chosen(184, 64, 2048, 768, weights=silu, **both) is None
    of_192 = (184, 176, 168, 152), "exact", 4, True, False
    assert chosen(192, 128, 1024, **any_rows) == (*of_192, True)
    assert chosen(192, 128, 4096, 512, weights=silu, **both) == (*of_192, False)
    falling = "falling", 0, False, False, True
    assert chosen(184, 256, 7168, 1024, **any_rows) == ((176, 168, 160, 144), *falling)
    assert chosen(192, 256, 7168, 1024, **any_rows) == ((184, 176, 168, 152), *falling)
    for others in (
        chosen(144, 128, row_weights=True),
        chosen(144, 128, weights=Weights(bias=True)),
        chosen(144, 128, weights=Weights(activation="gelu_tanh")),
        *(chosen(block, 8, weights=Weights(activation="silu")) for block in (176, 184, 192)),
        chosen(176, 8, weights=silu),
        chosen(176, 8, **gather),
        chosen(176, 8, row_weights=True),
        chosen(192, 128, 2048, **any_rows),
        chosen(184, 255, 7168, 1024, **any_rows),
        chosen(184, 256, 7168, 1024, row_weights=True, **any_rows),
        chosen(184, 256, 2048, 512, rows=3, **any_rows),
        chosen(184, 128, 1024),
        chosen(184, 256, 7168, 1024),
        chosen(184, 64, 1024, **any_rows),
        chosen(176, 128, 1024, **any_rows),
    ):
        assert others is None


def test_launches_outside_jit_have_no_listed_tiles():
    """They have those of one height, with their order, where a launch would list the others."""
    given = problem_of(made(192, 256, []), 192, 256, 7168, 14336, zero_padding=False)
    given = given._replace(num_rows=256 * 192 * 7, consecutive=True)
    assert choose_tiles.config_for(given).falling
    for config in (None, choose_tiles.config_for(given, lists=False)):
        found = DirectMatmul(given, config=config).tiles
        assert found == TALL._replace(bm=192, group=4, lag=found.lag, stages=found.stages)


@pytest.mark.parametrize(("experts", "block"), [(8, 176), (256, 144), (256, 184)])
def test_launches_outside_jit_find_their_tiles(experts, block):
    given = problem_of(made(block, experts, []), block, experts, 1024, 7168, zero_padding=False)
    given = given._replace(num_rows=experts * block * 7, consecutive=True)
    found = DirectMatmul(given).tiles
    assert found.heights and found.finds and found == choose_tiles.config_for(given)


@pytest.mark.gpu
def test_the_public_function_takes_them(monkeypatch):
    """As `moe_align_block_size` makes blocks, some experts of which have nothing."""
    rng = np.random.default_rng(1)
    counts = [4000, 0, 4100, 4096, 1, 4224, 3999, 4300]
    ids = np.repeat(np.arange(8, dtype=np.int32), counts)
    rng.shuffle(ids)
    aligned = maj.moe_align_block_size(jnp.asarray(ids[:, None]), block_size=192, num_experts=8)
    sorted_ids, experts = np.asarray(aligned.sorted_token_ids), np.asarray(aligned.expert_ids)
    real = (sorted_ids < len(ids)) & (
        np.arange(len(sorted_ids)) < int(aligned.num_tokens_post_padded[0])
    )
    x = rng.normal(size=(len(sorted_ids), 512)).astype(np.float32)
    x[~real] = np.nan
    w = rng.normal(size=(8, 512, 2048)).astype(np.float32) / 20
    x, w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
    taken = []
    build = kernel.build
    monkeypatch.setattr(
        kernel,
        "build",
        lambda problem, config, **o: taken.append(config) or build(problem, config, **o),
    )
    out = np.asarray(maj.grouped_matmul(x, w, aligned, block_size=192), np.float64)
    assert any(config.heights for config in taken)
    used = np.arange(len(out)) < int(aligned.num_tokens_post_padded[0])
    assert not out[used & ~real].any()
    some = np.flatnonzero(real)[::97]
    w64, x64 = np.asarray(w, np.float64), np.asarray(x, np.float64)
    want = np.stack([x64[r] @ w64[experts[r // 192]] for r in some])
    assert np.linalg.norm(out[some] - want) < 5e-3 * np.linalg.norm(want)
