"""The kernel of the weights' gradient: its body in Pallas' interpreter, and on a GPU, against "xla".

test_gradients.py holds "xla" to NumPy.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from moe_align_jax._grouped_matmul import (
    inline_wgmma,
    launch,
    reference,
    weight_gradient,
    weight_gradient_tiles,
)
from moe_align_jax._grouped_matmul import weight_gradient_kernel as kernel
from moe_align_jax._grouped_matmul.problem import MatmulProblem, WeightGradient
from moe_align_jax._grouped_matmul.weight_gradient_compute import unread_stores
from moe_align_jax._grouped_matmul.weight_gradient_cta_tiles import (
    LISTED,
    ROWS_OF_TILE,
    Dealt,
    Turns,
    deal,
)
from moe_align_jax._grouped_matmul.weight_gradient_experts import cut, located
from moe_align_jax._grouped_matmul.weight_gradient_plan import SLOTS
from moe_align_jax._grouped_matmul.weight_gradient_tiles import (
    STEPS_OF_PIECE,
    Tiles,
    cutting,
    gathers_first,
    tiles_for,
)
from tests.matmul.test_matmul import ids_of, normal


def ragged(sizes, rows, k, n, *, out="bfloat16", experts=None, offset=0, dtype="bfloat16"):
    """(problem, operands), with NaN in rows behind the groups."""
    experts = len(sizes) if experts is None else experts
    layout = MatmulProblem(
        *("test", "ragged", rows, k, n, experts, dtype, out), num_groups=len(sizes)
    )
    rng, total = np.random.default_rng(0), int(np.maximum(sizes, 0).sum())
    lhs, rhs = (normal(rng, (rows, c), dtype).at[total:].set(jnp.nan) for c in (k, n))
    where = jnp.array(sizes, jnp.int32), jnp.array([offset], jnp.int32)
    return WeightGradient(layout), (lhs, rhs, *where)


def masked(counts, rows, k, n, *, out="bfloat16"):
    experts = len(counts)
    layout = MatmulProblem(
        *("test", "masked", experts * rows, k, n, experts, "bfloat16", out), max_rows=rows
    )
    rng = np.random.default_rng(0)
    there = (np.arange(rows)[None] < np.array(counts)[:, None]).reshape(-1, 1)
    lhs, rhs = (
        jnp.where(there, normal(rng, (experts * rows, c), "bfloat16"), jnp.nan) for c in (k, n)
    )
    return WeightGradient(layout), (lhs, rhs, jnp.array(counts, jnp.int32))


def blocks(tokens, top_k, experts, k, n, block, *, gathered, routing="uniform", out="bfloat16"):
    """The operand that is not gathered has NaN in rows without a pair."""
    aligned = maj.moe_align_block_size(
        ids_of(routing, tokens, top_k, experts),
        block_size=block,
        num_experts=experts,
        pad_sorted_ids=True,
        implementation="xla",
    )
    where = aligned[:3]
    rows = where[0].shape[0]
    more = {"num_tokens": tokens, "top_k": top_k} if gathered else {}
    layout = MatmulProblem(
        *("test", "blocks", rows, k, n, experts, "bfloat16", out), block_size=block, **more
    )
    rng, real = np.random.default_rng(0), np.asarray(reference.row_mask(layout, *where))
    given = [
        normal(rng, (tokens, c), "bfloat16")
        if gathered == name
        else jnp.where(real[:, None], normal(rng, (rows, c), "bfloat16"), jnp.nan)
        for name, c in (("lhs", k), ("rhs", n))
    ]
    return WeightGradient(layout, gathered), (*given, *where)


def check(problem, operands, tiles=None, *, interpret):
    """Into poisoned memory, against the reference; twice on a GPU."""
    run = jax.jit(functools.partial(kernel.run, problem, interpret=interpret, tiles=tiles))
    want = jax.jit(functools.partial(reference.weight_gradient, problem))(*operands)
    poison = jnp.full(problem.out_shape, jnp.nan, problem.layout.out_dtype)
    jax.block_until_ready(poison).delete()  # the allocator gives this memory to the result
    found = np.asarray(run(*operands))
    assert found.dtype == jnp.dtype(problem.layout.out_dtype)
    if not interpret:
        assert np.asarray(run(*operands)).tobytes() == found.tobytes()
    want = np.asarray(want).astype(np.float64)
    bound = 1e-5 if problem.layout.out_dtype == "float32" else 5e-3
    assert np.linalg.norm(found.astype(np.float64) - want) <= bound * np.linalg.norm(want)


# An empty expert, and rows of both operands by cp.async, into float32. Then lhs gathered and rhs by TMA,
# late, with two tiles of columns.
SHORT = Tiles(bk=16, late=False)  # rows are copied one by one there
FEW = [
    ("ragged, odd, float32", lambda: ragged([0, 20], 30, 24, 24, out="float32"), SHORT),
    (
        "gathered, late",
        lambda: blocks(9, 2, 2, 64, 320, 64, gathered="lhs", routing="dropped"),
        None,
    ),
    (
        "cut, late",
        lambda: blocks(140, 2, 2, 128, 256, 64, gathered=None, routing="hot"),
        Tiles(bk=16, pieces=3),
    ),
    (
        "three tiles by two, in groups of two, all rounds but the first back",
        lambda: blocks(9, 2, 2, 384, 320, 64, gathered=None, routing="dropped"),
        Tiles(bk=16, group=2, back=True),
    ),
    (
        "256 columns of lhs by 128 of rhs, which is gathered; the last tiles half outside",
        lambda: blocks(40, 2, 3, 320, 192, 16, gathered="rhs", routing="dropped"),
        Tiles(bm=256, bn=128, lag=1, short=True),
    ),
    (
        "a hot expert's tile beside three of others, then two tiles for each CTA",
        lambda: ragged([0, 400, 7, 11, 40, 9, 24, 2], 500, 24, 24),
        Tiles(bk=16, level=True),
    ),
]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("n", [8, 64, 72, 320, 512, 1440, 2880])
@pytest.mark.parametrize("bn", [64, 128, 256])
def test_no_band_is_put_into_a_slot_that_a_store_still_reads(n, bn, itemsize):
    """Band after band of two experts' tiles, each store as late as the wait ahead of a band lets it be."""
    piece, reading = 128 // itemsize, []
    most = unread_stores(n, bn, piece)
    for _ in range(2):
        for column in range(0, n, bn):
            for q in range(-(-min(bn, n - column) // piece)):
                reading = reading[len(reading) - most :] if most else []
                assert q % SLOTS not in reading
                reading.append(q % SLOTS)


@pytest.mark.parametrize(("make", "tiles"), [f[1:] for f in FEW], ids=[f[0] for f in FEW])
def test_in_the_interpreter(make, tiles):
    with jax.default_device(jax.devices("cpu")[0]):
        check(*make(), tiles, interpret=True)


def dealt(counts: list[int], per_expert: int, ctas: int) -> tuple[list[list[int]], int]:
    """(Each CTA's tiles that are dealt, how many those are), and all CTAs know of the same."""
    rows, each, ends = sorted(counts, reverse=True), [], set()
    for cta in range(ctas):
        noted: dict[int, int] = {}
        with jax.disable_jit():
            found = deal(
                jnp.int32(cta),
                lambda rank: jnp.int32(rows[int(rank)]),
                lambda at, tile, noted=noted: noted.update({int(at): int(tile)}),
                num_experts=len(counts),
                per_expert=per_expert,
                num_ctas=ctas,
            )
        assert sorted(noted) == list(range(int(found.listed)))
        each.append([noted[k] for k in sorted(noted)])
        ends.add(int(found.begin))
    [end] = ends
    assert sorted(tile for tiles in each for tile in tiles) == list(range(end))
    return each, end


def test_a_hot_experts_ctas_get_fewer_tiles():
    """By Zipf's law, 1200 rows of the first expert: CTAs' rows differ by three common tiles at most."""
    counts, per, ctas = [1200 // (k + 1) for k in range(24)], 5, 12
    each, _ = dealt(counts, per, ctas)
    loads = [sum(counts[t // per] + ROWS_OF_TILE for t in tiles) for tiles in each]
    common = 1200 // 13 + ROWS_OF_TILE
    # One at most of the tiles that a class was dealt last is an expert later than its first.
    assert max(loads) - min(loads) <= 3 * common
    assert len(each[0]) < len(each[-1])


@pytest.mark.parametrize("counts", [[500, 520, 480, 505] * 5, [0] * 20], ids=["even", "none"])
def test_nothing_is_dealt_where_experts_have_about_as_many_rows(counts):
    each, end = dealt(counts, 5, 12)
    assert end == 12 and all(len(tiles) == 1 for tiles in each)


def test_a_cta_is_dealt_no_more_tiles_than_its_list_holds():
    """All rows on one expert: the others' tiles take less time together than the first one."""
    counts = [10**6, *[0] * 299]
    each, end = dealt(counts, 1, 2)
    assert [len(tiles) for tiles in each] == [1, LISTED] and end == 1 + LISTED


LEVELED = {  # rows of each expert, tiles of each, CTAs
    "Zipf": ([1200 // (k + 1) for k in range(24)], 5, 12),
    "Zipf, rounds of an odd number": ([900 // (k + 1) for k in range(31)], 7, 13),
    "four classes of one size": ([5000, 800, 300, *[40] * 17], 3, 12),
    "four classes, the last of one CTA": ([700, 600, 3, *[2] * 30], 4, 13),
    "two hot experts": ([4000, 4000, *[10] * 14], 6, 11),
    "all are dealt": ([10**6, *[0] * 6], 4, 13),
    "all are dealt, the last in part": ([10**6, *[0] * 4], 7, 17),
    "a full list": ([10**6, *[0] * 299], 1, 2),
    "nothing is dealt": ([100] * 9, 5, 12),
    "no rows": ([0] * 9, 5, 12),
}


@pytest.mark.parametrize("name", LEVELED)
def test_ctas_have_every_tile_once_where_some_were_dealt(name):
    """Those of the lists, then the others from both ends in turn."""
    counts, per, ctas = LEVELED[name]
    each, end = dealt(counts, per, ctas)
    total = len(counts) * per
    assert {"all": end == total, "nothing": end == ctas}.get(name.split()[0], True)
    for back in (True, False):
        seen = []
        for cta, listed in enumerate(each):
            found = Dealt(jnp.int32(len(listed)), jnp.int32(end))
            turns = Turns(
                *(jnp.int32(cta), ctas, total),
                back=back,
                dealt=found,
                tile_listed=lambda place, listed=listed: jnp.array(listed, jnp.int32)[place],
            )
            mine = jax.vmap(turns.tile)(jnp.arange(int(turns.mine), dtype=jnp.int32)).tolist()
            assert mine[: len(listed)] == listed
            assert len(mine) - len(listed) in ((total - end) // ctas, -(-(total - end) // ctas))
            seen += mine
        assert sorted(seen) == list(range(total))


@pytest.mark.parametrize("back", [True, False])
@pytest.mark.parametrize("total", [0, 1, 4, 5, 6, 15, 19])
def test_ctas_have_every_tile_once_where_none_is_dealt(total, back):
    """Of a number that is known, or is not."""
    for in_use in (total, jnp.int32(total)):
        seen = []
        for cta in range(5):
            turns = Turns(jnp.int32(cta), 5, in_use, back=back)
            seen += [int(turns.tile(jnp.int32(i))) for i in range(int(turns.mine))]
        assert sorted(seen) == list(range(total))


@pytest.mark.parametrize("operand", ["lhs", "rhs"])
def test_rows_are_gathered_before_the_kernel_where_it_reads_them_often(operand, monkeypatch):
    """The same sums of a copy of the tokens' rows; the other operand is NaN in rows without a pair."""
    problem, operands = blocks(9, 2, 2, 64, 48, 64, gathered=operand, routing="dropped")
    columns = 48 if operand == "lhs" else 64  # of the other operand
    monkeypatch.setattr(weight_gradient_tiles, "_COLUMNS_TO_GATHER_FIRST", columns + 1)
    assert not gathers_first(problem)
    monkeypatch.setattr(weight_gradient_tiles, "_COLUMNS_TO_GATHER_FIRST", columns)
    assert gathers_first(problem)
    copied, given = kernel.gathered(problem, *operands)
    assert copied.gathered is None and not gathers_first(copied)
    assert [(x.shape, str(x.dtype)) for x in given] == [*copied.inputs.values()]
    want = reference.weight_gradient(problem, *operands)
    np.testing.assert_array_equal(reference.weight_gradient(copied, *given), want)


def test_which_weights_gradients_gather_first_and_which_tiles_they_have():
    """Those of DeepSeek-V3's layers, split over eight devices, and Mixtral's; of rows in order, too."""

    def found(tokens, top_k, experts, k, n, gathered):
        sizes = {"block_size": 64, "num_tokens": tokens, "top_k": top_k}
        layout = MatmulProblem(
            "test", "blocks", tokens * top_k, k, n, experts, *["bfloat16"] * 2, **sizes
        )
        problem = WeightGradient(layout, gathered)
        tiles = tiles_for(problem)
        return gathers_first(problem), (tiles.bm, tiles.bn)

    wide, tall = (128, 256), (256, 128)
    assert found(8192, 8, 256, 7168, 512, "lhs") == (False, wide)
    assert found(8192, 8, 256, 256, 7168, "rhs") == (False, tall)
    assert found(8192, 8, 256, 256, 7168, None) == (False, wide)
    assert found(8192, 8, 256, 128, 7168, "rhs") == (False, wide)
    assert found(8192, 8, 256, 384, 7168, "rhs") == (False, wide)  # half of a tile would be empty
    assert found(8192, 2, 8, 4096, 28672, "lhs") == (True, wide)


def test_a_product_and_a_weight_gradient_share_the_rows_that_are_gathered_first():
    """A layer's backward pass reads the rows of the result's cotangent in both."""
    problem, (other, tokens, *where) = blocks(
        9, 2, 2, 64, 48, 64, gathered="rhs", routing="dropped"
    )

    def both(tokens, *where):
        named = {"x": tokens, "sorted_token_ids": where[0]}
        _, of_product = launch.permuted(problem.layout, named)
        _, of_gradient = kernel.gathered(problem, other, tokens, *where)
        return of_product["x"], of_gradient[1]

    text = jax.jit(both).lower(tokens, *where).compile().as_text()
    assert text.count(" gather(") == 1


def test_the_order_of_tiles_follows_from_the_matrix():
    """In groups where it is wide, and all rounds but the first back where it has at most 66 tiles."""

    def order(k, n):
        tiles = tiles_for(ragged([3, 5], 8, k, n)[0])
        return tiles.group, tiles.back

    sizes = ((64, 256), (128, 4088), (128, 4096), (640, 4096), (768, 2048), (2048, 1536))
    want = [(0, True), (0, True), (16, True), (16, False), (0, True), (0, False)]
    assert [order(*size) for size in sizes] == want


LAST = (0, 1, 15, 16, 17, 31, 33, 48, 63, 64, 65, 0, 127, 192)  # rows of an expert


def of_whole_numbers(rows, k, n, out, sizes=LAST):
    """(problem, operands, NumPy's answer) of whole numbers, whose sums are exact in any order.

    NaN behind each expert's rows in "blocks", which TMA reads, and behind all rows of "ragged".
    """
    block, rng = 64, np.random.default_rng(0)
    first, at = [], 0
    for size in sizes:
        first.append(at)
        at += -(-size // block) * block if rows == "blocks" else size
    num_rows = at + block
    lhs, rhs = np.full((num_rows, k), np.nan), np.full((num_rows, n), np.nan)
    ids, want = np.full(num_rows, sum(sizes)), np.zeros((len(sizes), k, n))
    for expert, (begin, size) in enumerate(zip(first, sizes, strict=True)):
        mine = slice(begin, begin + size)
        lhs[mine], rhs[mine] = (rng.integers(-3, 4, (size, columns)) for columns in (k, n))
        ids[mine] = np.arange(size) + sum(sizes[:expert])
        want[expert] = lhs[mine].T @ rhs[mine]
    more, where = {"num_groups": len(sizes)}, [np.array(sizes), np.zeros(1)]
    if rows == "blocks":
        blocks_of = [-(-size // block) for size in sizes]
        experts = np.append(np.repeat(np.arange(len(sizes)), blocks_of), 0)
        more = {"block_size": block, "num_pairs": sum(sizes), "consecutive": True}
        where = [ids, experts, np.array([at])]
    layout = MatmulProblem(*("test", rows, num_rows, k, n, len(sizes), "bfloat16", out), **more)
    operands = [jnp.asarray(x, "bfloat16") for x in (lhs, rhs)]
    operands += [jnp.asarray(each, jnp.int32) for each in where]
    return WeightGradient(layout), operands, want.astype(jnp.dtype(out))


@pytest.mark.parametrize(("rows", "out"), [("blocks", "bfloat16"), ("ragged", "float32")])
def test_each_number_of_last_rows_in_the_interpreter(rows, out):
    """The product of the last rows alone, beside NaN, equals NumPy's."""
    problem, operands, want = of_whole_numbers(rows, 128, 256, out)
    tiles = tiles_for(problem)
    assert tiles.short
    with jax.default_device(jax.devices("cpu")[0]):
        run = functools.partial(kernel.run, problem, interpret=True, tiles=tiles)
        np.testing.assert_array_equal(np.asarray(jax.jit(run)(*operands)), want)


def test_a_jax_without_the_parts_of_wgmma_takes_whole_steps(monkeypatch):
    problem, *_ = of_whole_numbers("blocks", 128, 256, "bfloat16")
    monkeypatch.setattr(inline_wgmma, "_wgmma", None)
    assert not tiles_for(problem).short
    with pytest.raises(ValueError, match="this jax"):
        kernel.build(problem, Tiles(short=True))
    kernel.build(problem, Tiles())


def test_last_rows_are_of_stages_of_64_rows():
    """Parts of other stages would need other instructions."""
    problem, *_ = of_whole_numbers("blocks", 128, 256, "bfloat16")
    with pytest.raises(ValueError, match="64 rows"):
        kernel.build(problem, Tiles(bk=32, short=True))


def many() -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    early = Tiles(late=False)

    def add(name, make, *tiles):
        found.extend((f"{name}, {t.name if t else 'usual'}", make, t) for t in tiles)

    sizes_and_results = [(256, 640, "bfloat16"), (256, 640, "float32"), (200, 136, "float32")]
    sizes_and_results += [(c, d, "bfloat16") for c, d in ((192, 320), (64, 64), (200, 136), (8, 8))]
    for k, n, out in sizes_and_results:
        every = (None, early) if out == "bfloat16" else (None,)
        for sizes, rows in (
            ([300, 1, 0, 129], 431),
            ([0, 0], 6),
            ([130, 500, 3, 64, 1000], 1697),
        ):
            make = functools.partial(ragged, sizes, rows, k, n, out=out)
            add(f"ragged {sizes} {k} {n} {out}", make, *every)
        for counts, rows in (([3, 0, 17, 20], 20), ([64, 512, 129, 0], 512)):
            make = functools.partial(masked, counts, rows, k, n, out=out)
            add(f"masked {counts} {k} {n} {out}", make, *every)
        for block, routing in ((8, "uniform"), (12, "uniform"), (64, "hot"), (128, "dropped")):
            for gathered in (None, "lhs", "rhs"):
                size = (300, 2, 8, k, n, block)
                more = {"gathered": gathered, "routing": routing, "out": out}
                make = functools.partial(blocks, *size, **more)
                add(f"blocks {block} {routing} {gathered} {k} {n} {out}", make, None)
    for k, n, out in ((256, 640, "bfloat16"), (200, 136, "float32"), (64, 64, "bfloat16")):
        tiles = Tiles(late=out == "bfloat16", pieces=5)
        for sizes in ([3000, 1, 0, 129], [2000, 1300, 40, 1100], [600] * 9):
            make = functools.partial(ragged, sizes, sum(sizes), k, n, out=out)
            add(f"cut {sizes} {k} {n} {out}", make, tiles)
        for gathered in (None, "lhs", "rhs"):
            more = {"gathered": gathered, "routing": "hot", "out": out}
            make = functools.partial(blocks, 1500, 2, 8, k, n, 128, **more)
            add(f"cut hot {gathered} {k} {n} {out}", make, tiles._replace(lag=1))
    grouped = Tiles(group=2, back=True)
    for gathered in (None, "lhs", "rhs"):
        wide = functools.partial(blocks, 300, 2, 8, 640, 8192, 128, gathered=gathered)
        add(f"wide {gathered}", wide, None, grouped._replace(lag=1))
    zipf = [3000 // (k + 1) for k in range(16)]
    for tiles in (Tiles(level=True), Tiles(level=True, short=True, lag=1)):
        for sizes in (
            zipf,
            zipf[::-1],
            [2000, *[0] * 15],
            [300] * 16,
        ):  # 48 tiles, 3 of which are a class'
            level = functools.partial(ragged, sizes, sum(sizes), 768, 2048)
            add(f"level, ragged {sizes[:2]}", level, tiles)
        for gathered in (None, "lhs", "rhs"):
            hot = functools.partial(blocks, 1500, 2, 16, 768, 2048, 128, gathered=gathered)
            add(f"level, hot, {gathered}", functools.partial(hot, routing="hot"), tiles)
    tall = Tiles(bm=256, bn=128, lag=1, short=True)
    for k, n in ((512, 4096), (768, 2048), (320, 192), (200, 136)):
        for routing in ("uniform", "hot"):
            more = {"gathered": "rhs", "routing": routing}
            make = functools.partial(blocks, 1500, 2, 16, k, n, 128, **more)
            add(f"tall, {routing}", make, tall, tall._replace(level=True, group=16, back=True))
    for gathered in (None, "lhs"):
        make = functools.partial(blocks, 1500, 2, 16, 320, 192, 128, gathered=gathered)
        add(f"tall, {gathered}", make, tall)
    add("ragged, grouped", lambda: ragged([130, 500, 3, 64], 700, 640, 1536), grouped)
    add("many experts", lambda: ragged([1] * 500, 501, 256, 256), None)
    add("offset", lambda: ragged([30, 0, 70, 5], 120, 128, 256, experts=2, offset=1), None, early)
    add("float16", lambda: ragged([30, 70], 100, 128, 256, dtype="float16", out="float16"), None)
    return found


MANY = many()


@pytest.mark.gpu
@pytest.mark.parametrize(("make", "tiles"), [m[1:] for m in MANY], ids=[m[0] for m in MANY])
def test_on_a_gpu(make, tiles):
    check(*make(), tiles, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_of_the_layer_on_a_gpu(transposed, dtype):
    """By the kernels, against "xla"; weights of x's dtype, and float32 master weights."""
    from tests.moe_layer.test_moe_layer import make_layer

    operands, options = make_layer(
        *(500, 4, 8, 256, 192),
        dtype="bfloat16",
        routing="dropped",
        bias=True,
        transpose_rhs=transposed,
    )
    x, first, second, weights, ids = operands
    first, second = first.astype(dtype), second.astype(dtype)
    direction = normal(np.random.default_rng(1), x.shape, "float32")

    def gradients(implementation):
        def loss(x, first, second, weights):
            y = maj.fused_moe(
                *(x, first, second, weights, ids), implementation=implementation, **options
            )
            return jnp.sum(y.astype(jnp.float32) * direction)

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(x, first, second, weights)

    for found, want in zip(gradients("mosaic_gpu"), gradients("xla"), strict=True):
        found, want = (np.asarray(g, np.float64) for g in (found, want))
        assert np.linalg.norm(found - want) <= 1e-2 * np.linalg.norm(want)


def python_experts(problem, where):
    """{expert: its rows} with rows, by a loop."""
    layout = problem.layout
    rows = np.flatnonzero(np.asarray(reference.row_mask(layout, *where)))
    found: dict[int, list[int]] = {}
    if layout.rows == "blocks":
        of = {int(r): int(where[1][r // layout.block_size]) for r in rows}
    elif layout.rows == "masked":
        of = {int(r): int(r) // layout.max_rows for r in rows}
    else:
        groups = np.repeat(np.arange(layout.num_groups), np.maximum(where[0], 0))
        of = {int(r): int(groups[r]) - int(where[1][0]) for r in rows}
    for row, expert in of.items():
        found.setdefault(expert, []).append(row)
    return found


@pytest.mark.parametrize(
    "make",
    [
        lambda: ragged([3, 0, 7, 5], 12, 8, 8),
        lambda: ragged([3, -1, 7, 5], 40, 8, 8, experts=3, offset=2),
        lambda: ragged([3, 2], 40, 8, 8, experts=3, offset=-(2**31)),
        lambda: masked([3, 0, 9, -2], 9, 8, 8),
        lambda: blocks(20, 2, 6, 8, 8, 4, gathered="lhs", routing="dropped"),
        lambda: blocks(20, 2, 6, 8, 8, 4, gathered=None, routing="half"),
    ],
)
def test_where_experts_are(make):
    problem, (_, _, *where) = make()
    (start, count, order), _ = located(problem, *where)
    want = python_experts(problem, [np.asarray(w) for w in where])
    assert {
        e: list(range(s, s + c)) for e, (s, c) in enumerate(zip(start, count, strict=True)) if c
    } == want
    sizes = [int(count[e]) for e in order]
    assert sizes == sorted(sizes, reverse=True)
    assert sorted(order.tolist()) == list(range(problem.layout.num_experts))


@pytest.mark.parametrize(
    ("sizes", "pieces"),
    [
        ([1000], 3),
        ([700, 0, 5, 295], 7),
        ([10, 20, 30], 4),  # too few rows for two pieces
        ([0, 0], 3),
        ([500, 500, 500, 500], 8),
        ([4097, 1, 333], 11),
    ],
)
def test_how_hot_experts_are_cut(sizes, pieces, bk=8):
    """Against Python: the pieces of an expert are its rows in order, each below twice the bound."""
    problem, (_, _, *where) = ragged(sizes, max(1, sum(sizes)), 8, 8)
    whole, _ = located(problem, *where)
    left, found = cut(whole, pieces, bk)
    bound = max(-(-sum(sizes) // pieces), STEPS_OF_PIECE * bk)
    starts, counts = (np.asarray(a) for a in found.experts[:2])
    used = int(found.used[0])
    assert used <= pieces and not counts[used:].any()
    taken = 0
    for e, size in enumerate(sizes):
        begin, end = int(found.begin[e]), int(found.end[e])
        if size < 2 * bound:
            assert begin == end and int(left.count[e]) == size
            continue
        assert begin == taken and end > begin + 1 and int(left.count[e]) == 0
        taken = end
        rows = [r for p in range(begin, end) for r in range(starts[p], starts[p] + counts[p])]
        first = int(whole.start[e])
        assert rows == list(range(first, first + size))
        assert max(counts[begin:end]) < 2 * bound
        assert all((starts[p] - first) % bk == 0 for p in range(begin, end) if counts[p])
    assert used == taken
    assert np.asarray(left.order).tolist() == sorted(
        range(len(sizes)), key=lambda e: (-int(left.count[e]), e)
    )


def test_which_experts_are_cut_by_default():
    """Where a matrix has fewer tiles than the GPU has multiprocessors, and there are rows enough."""

    def pieces(k, n, rows):
        sizes = ("test", "ragged", rows, k, n, 8, "bfloat16", "bfloat16")
        return cutting(WeightGradient(MatmulProblem(*sizes, num_groups=8))).pieces

    assert pieces(768, 2048, 65536) == 132 * 4 // 48
    assert pieces(7168, 1024, 65536) == pieces(2048, 768 * 4, 65536) == 0
    assert pieces(64, 64, 4096) == 4096 // 512
    assert pieces(64, 64, 1000) == 0


def shared(experts_of_ids, k, n, block, *, gathered=None):
    """Blocks of an alignment whose expert map gives several experts the same local id."""
    expert_map = np.asarray(experts_of_ids, np.int32)
    ids = np.repeat(np.arange(len(expert_map), dtype=np.int32), 11).reshape(-1, 1)
    aligned = maj.moe_align_block_size(
        ids,
        block_size=block,
        num_experts=len(expert_map),
        expert_map=expert_map,
        pad_sorted_ids=True,
    )
    where, tokens, experts = aligned[:3], ids.size, int(expert_map.max()) + 1
    rows = where[0].shape[0]
    more = {"num_tokens": tokens, "top_k": 1} if gathered else {"num_pairs": tokens}
    layout = MatmulProblem(
        *("test", "blocks", rows, k, n, experts, "bfloat16", "float32"), block_size=block, **more
    )
    rng = np.random.default_rng(0)
    lhs, rhs = (
        normal(rng, (tokens if gathered == name else rows, c), "bfloat16")
        for name, c in (("lhs", k), ("rhs", n))
    )
    return WeightGradient(layout, gathered), (lhs, rhs, *where)


def dense_sums(problem, operands):
    """float64, row by row."""
    lhs, rhs, ids, experts, used = (np.asarray(x) for x in operands)
    layout, out = problem.layout, np.zeros(problem.out_shape)
    pairs = layout.num_tokens * layout.top_k or layout.num_pairs
    for row in range(int(used[0])):
        expert = int(experts[row // layout.block_size])
        if 0 <= expert < layout.num_experts and ids[row] < pairs:
            left = lhs[ids[row] // layout.top_k if problem.gathered == "lhs" else row]
            out[expert] += np.outer(left.astype(np.float64), rhs[row].astype(np.float64))
    return out


# Of experts with one local id: apart; beside each other, the first with a block that is not full; all whole.
SHARED = {"apart": ([0, 1, 0], 16), "a gap": ([0, 0, 1], 8), "none": ([1, 0, 2], 8)}


@pytest.mark.parametrize("name", SHARED)
def test_whether_rows_follow_each_other(name):
    problem, operands = shared(SHARED[name][0], 8, 8, SHARED[name][1])
    assert bool(located(problem, *operands[2:])[1]) == (name == "none")


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("apart", "emulator"),
        *(pytest.param(name, "mosaic_gpu", marks=pytest.mark.gpu) for name in SHARED),
    ],
)
def test_experts_that_share_a_local_id(name, implementation):
    problem, operands = shared(SHARED[name][0], 8, 8, SHARED[name][1])
    interpret = implementation == "emulator"
    tiles = SHORT if interpret else None
    device = jax.devices("cpu")[0] if interpret else None
    with jax.default_device(device):
        found = jax.jit(functools.partial(kernel.run, problem, interpret=interpret, tiles=tiles))(
            *operands
        )
    want = dense_sums(problem, operands)
    assert np.linalg.norm(np.asarray(found, np.float64) - want) <= 1e-5 * np.linalg.norm(want)


def test_where_a_kernel_is_the_default():
    problem, operands = ragged([3, 5], 8, 64, 64)
    assert weight_gradient.choose(problem, "cpu", None) == "xla"
    assert weight_gradient.choose(problem, "cuda", None) == "mosaic_gpu"
    assert weight_gradient.choose(problem, "cuda", "mosaic_gpu") == "mosaic_gpu"
    assert weight_gradient.implementation_for(problem, None) is None
    assert weight_gradient.implementation_for(problem, "mosaic_gpu") == "mosaic_gpu"
    narrow, _ = ragged([3, 5], 8, 60, 64)
    assert weight_gradient.implementation_for(narrow, "mosaic_gpu") == "xla"
    assert weight_gradient.choose(narrow, "cuda", None) == "xla"
    lhs, rhs, sizes, _ = operands
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match="^tgmm: implementation must be one that"):
            maj.tgmm(lhs.T, rhs, sizes, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="^tgmm: implementation must.* multiple of 8"):
        maj.tgmm(lhs[:, :60].T, rhs, sizes, implementation="emulator")
    lowered = jax.jit(functools.partial(maj.tgmm, implementation="mosaic_gpu"))
    traced = lowered.trace(lhs.T, rhs, sizes).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in traced.as_text()


def test_a_training_step_on_a_gpu_runs_kernels():
    """Lowered without one: every product and both weights' gradients are kernels, and nothing is a loop."""
    like = jax.ShapeDtypeStruct
    x, ids = like((256, 256), "bfloat16"), like((256, 2), "int32")
    weights = like((256, 2), "float32")
    first, second = like((8, 256, 256), "bfloat16"), like((8, 128, 256), "bfloat16")

    def loss(x, first, second, weights, ids):
        y = maj.fused_moe(x, first, second, weights, ids)
        return jnp.sum(y.astype(jnp.float32))

    step = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
    traced = step.trace(x, first, second, weights, ids)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # The first product again, two inputs' gradients, two of the weights', and the alignment.
    assert text.count("@mosaic_gpu") >= 6
    # The alignment is ours, so that no expert's rows can lie apart: nothing tests it on the device.
    assert not re.search(r"stablehlo\.(while|case|scatter)", text)


def test_a_callers_alignment_within_shard_map():
    """Whether its rows follow each other is asked on the device: both ways have results of one type."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def loss(w, x, ids):
        sizes = {"block_size": 16, "num_experts": 3}
        aligned = maj.moe_align_block_size(ids, return_inverse=True, **sizes)
        y = maj.grouped_matmul(x, w, aligned, block_size=16, top_k=2)
        return jnp.sum(y.at[aligned.row_of_pair].get(mode="fill", fill_value=0), dtype=jnp.float32)

    step = jax.shard_map(
        jax.grad(loss), mesh=mesh, in_specs=(spec(), spec("d"), spec("d")), out_specs=spec()
    )
    like = jax.ShapeDtypeStruct
    w, x = like((3, 64, 128), jnp.bfloat16), like((64, 64), jnp.bfloat16)
    traced = jax.jit(step).trace(w, x, like((64, 2), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.case" in text and "grouped_weight_gradient" in text


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(128, 256), (384, 320), (200, 136)])
@pytest.mark.parametrize(
    ("rows", "out", "late"),
    [
        *((rows, "bfloat16", late) for rows in ("blocks", "ragged") for late in (True, False)),
        *((rows, "float32", False) for rows in ("blocks", "ragged")),
    ],
)
def test_each_number_of_last_rows_on_a_gpu(rows, out, late, size):
    """NumPy's bits, and those of whole steps, with an expert for each number of rows up to 130."""
    problem, operands, want = of_whole_numbers(rows, *size, out, (*LAST, *range(131)))
    for short in (True, False):
        tiles = Tiles(late=late, short=short)
        run = jax.jit(functools.partial(kernel.run, problem, tiles=tiles))
        for _ in range(2):
            np.testing.assert_array_equal(np.asarray(run(*operands)), want)


@pytest.mark.gpu
@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("gathered", [None, "lhs", "rhs"])
def test_gathered_last_rows_on_a_gpu(gathered, late):
    """The bits of whole steps, of values whose sums are rounded."""
    problem, operands = blocks(310, 4, 24, 384, 512, 64, gathered=gathered)
    tiles = Tiles(late=late, short=True, lag=1)
    check(problem, operands, tiles, interpret=False)
    found, whole = (
        np.asarray(kernel.run(problem, *operands, tiles=each))
        for each in (tiles, tiles._replace(short=False))
    )
    assert found.tobytes() == whole.tobytes()
