"""Tiles of several heights: the list that cuts an expert's blocks anew, and the product by them.

Blocks are made by hand, as a caller may make them: without an expert, of one expert in two places, not full
before an expert's last one.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from moe_align_jax._grouped_matmul import config as tiles
from moe_align_jax._grouped_matmul import cut_list, kernel, launch, reference
from moe_align_jax._grouped_matmul.direct_problem import DirectMatmul
from moe_align_jax._grouped_matmul.problem import MatmulProblem, Weights
from moe_align_jax._simt import emulator

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
    for expert, start, end, pairs, behind in zip(*(a[: count[0]] for a in listed), strict=True):
        assert end - start in (0, *heights) and 0 <= pairs <= end - start
        assert where.held[start : start + pairs].all()
        assert not where.held[start + pairs : behind].any()
        own = where.experts[start // block : -(-(start + pairs) // block)] if pairs else ()
        assert (own == expert).all() if pairs else True
        seen[start:behind] += 1
        computed += end - start
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
    usual = config._replace(heights=(), exact=False, falling=False)
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
        (tall._replace(heights=(184, 0)), "multiples of 8"),
        (tall._replace(heights=(184, 180)), "multiples of 8"),
        (tall._replace(heights=(176, 168)), "fall from a block's"),
        (tall._replace(bm=92), "each as high"),
        (tall._replace(falling=True), "not taken by height"),
        (tall._replace(sharing=2), "stored at once"),
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
    assert tiles.with_heights(low, late, HEIGHTS, True) == late


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
@pytest.mark.parametrize("block", [176, 184, 192])
@pytest.mark.parametrize("transposed", [True, False])
def test_tiles_by_height_on_a_gpu(block, transposed):
    """Right, and the bits of tiles of one height."""
    given = [(e, block if p == 144 else p) for e, p in ODD]
    given += [(e, p) for e in range(8) for p in [block] * (2 * e) + [1 + 17 * e]]
    where = made(block, 8, given)
    problem = problem_of(where, block, 8, 448, 1024, transposed=transposed)
    config = tiles.with_heights(problem, TALL._replace(bm=block), HEIGHTS, falling=True)
    check(where, problem, config, interpret=False)


def test_which_products_take_them():
    """Blocks of 176 rows and more of few experts, 184 and 192 of many: by height where K is long."""

    def chosen(block, experts, k=4096, n=14336, **more):
        given = problem_of(made(block, experts, []), block, experts, k, n, **more)
        found = tiles.config_for(given._replace(num_rows=experts * block * 7))
        assert found.bm == block and not (found.heights and found.late)
        kind = "exact" if found.exact else "falling" if found.falling else "even"
        assert found.falling == (found.group == 0)
        return found.heights[1:], kind if found.heights else ""

    any_rows: dict[str, bool] = {"zero_padding": False, "consecutive": True}
    assert chosen(192, 8) == ((184, 176, 152), "exact")
    assert chosen(176, 8, **any_rows) == ((168, 160, 136), "exact")
    assert chosen(184, 256, 1024, **any_rows) == ((176, 168, 160, 144), "exact")
    assert chosen(192, 128, 1024, **any_rows) == ((184, 176, 168, 152), "even")
    assert chosen(184, 256, 7168, 1024, **any_rows) == ((176, 168, 160, 144), "falling")
    assert chosen(192, 256, 7168, 1024, **any_rows) == ((184, 176, 168, 152), "falling")
    for others in (
        chosen(144, 8),
        chosen(192, 8, n=7168),
        chosen(144, 128, 1024, **any_rows),
        chosen(192, 128, 2048, **any_rows),
        chosen(184, 255, 7168, 1024, **any_rows),
        chosen(184, 256, 7168, 1024, row_weights=True, **any_rows),
        chosen(184, 128, 1024),
        chosen(184, 256, 7168, 1024),
        chosen(184, 64, 1024, **any_rows),
        chosen(176, 128, 1024, **any_rows),
        chosen(176, 8, row_weights=True),
    ):
        assert others == ((), "")


@pytest.mark.parametrize(("experts", "k"), [(8, 4096), (256, 1024), (256, 7168)])
def test_launches_outside_jit_have_the_tiles_of_one_height(experts, k):
    """All of them, with their order: no launch lists the others."""
    given = problem_of(made(192, experts, []), 192, experts, k, 14336, zero_padding=False)
    given = given._replace(num_rows=experts * 192 * 7, consecutive=True)
    listed = tiles.config_for(given)
    group = 8 if experts == 8 else 4
    assert listed.heights
    for config in (None, tiles.config_for(given, lists=False)):
        found = DirectMatmul(given, config=config).tiles
        assert found == TALL._replace(bm=192, group=group, lag=found.lag, stages=found.stages)


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
    monkeypatch.setattr(tiles, "_LEAST_WORK_OF_HEIGHTS", 0)
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
