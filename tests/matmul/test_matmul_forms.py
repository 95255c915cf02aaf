"""The kernel of the grouped matrix multiplication: each form with each way to load and store.

Small sizes in Pallas' interpreter, which runs the same body on a CPU; all of them on a GPU. Both are compared
with the "xla" reference, which test_matmul.py holds to NumPy.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from moe_align_jax import matmul
from moe_align_jax._core.hopper import MAX_SHARED_BYTES
from moe_align_jax._grouped_matmul import choose_tiles, kernel, launch, reference, tile_list
from moe_align_jax._grouped_matmul import config as tiles
from moe_align_jax._grouped_matmul.problem import MatmulProblem, Weights
from moe_align_jax._grouped_matmul.shape import shape_of
from moe_align_jax._simt import emulator
from tests.matmul.test_matmul import make_case, normal

M = tiles.Config("m", 128, 256, 64, 4, late=True)
N = tiles.Config("n", 64, 256, 64, 4)
SWAP = tiles.Config("swap", 16, 128, 128, 5, group=0)
WIDE = tiles.Config("swap", 16, 256, 64, 6, group=0)
SILU: dict[str, Any] = {"activation": "silu"}
TALL = tiles.Config("m", 256, 128, 64, 4)
MANY_ROWS = tiles.Config("swap", 144, 256, 64, 4)


class Made(Exception):
    """Carries a problem and its operands out of a public function."""


def made(monkeypatch, function, *args, **options) -> tuple[MatmulProblem, tuple[Any, ...]]:
    """What a public function would run."""

    def stop(problem, implementation, *operands):
        raise Made(problem, tuple(jnp.asarray(x) for x in operands))

    with monkeypatch.context() as patch:
        patch.setattr(matmul, "_run", stop)
        with pytest.raises(Made) as caught:
            function(*args, **options)
    return caught.value.args


def blocks(monkeypatch, *sizes, **options):
    operands, given = make_case(*sizes, **options)
    return made(monkeypatch, maj.grouped_matmul, *operands, **given)


def ragged(monkeypatch, sizes, rows, k, n, **options):
    rng = np.random.default_rng(0)
    lhs, rhs = normal(rng, (rows, k), "bfloat16"), normal(rng, (len(sizes), k, n), "bfloat16")
    return made(monkeypatch, maj.ragged_dot, lhs, rhs * k**-0.5, np.array(sizes), **options)


def masked(monkeypatch, counts, rows, k, n, **options):
    rng = np.random.default_rng(0)
    x = np.array(normal(rng, (len(counts), rows, k), "bfloat16"))
    for expert, count in enumerate(counts):
        x[expert, max(count, 0) :] = np.nan
    w = normal(rng, (len(counts), k, n), "bfloat16", k**-0.5)
    return made(monkeypatch, maj.masked_grouped_matmul, x, w, np.array(counts), **options)


def in_use(problem, operands) -> np.ndarray:
    row = np.arange(problem.num_rows)
    if problem.rows == "blocks":
        return row < int(operands[-1][0])
    if problem.rows == "masked":
        return row % problem.max_rows < np.asarray(operands[-1])[row // problem.max_rows]
    return row >= 0


def check(problem, operands, config, *, interpret: bool) -> None:
    """The kernel, into poisoned memory, against the reference; twice on a GPU."""
    config = config or choose_tiles.config_for(problem)
    if config.late and not tiles.may_be_late(problem):
        config = config._replace(late=False)
    if interpret:
        config = config._replace(num_ctas=2)
    run = jax.jit(functools.partial(launch.run, problem, config=config, interpret=interpret))
    want = jax.jit(functools.partial(reference.grouped_matmul, problem))(*operands)
    poison = jnp.full(problem.out_shape, jnp.nan, problem.out_dtype)
    jax.block_until_ready(poison).delete()  # the allocator gives this memory to the result
    used = in_use(problem, operands)
    first = np.asarray(run(*operands))[used]
    if not interpret:
        assert np.asarray(run(*operands))[used].tobytes() == first.tobytes()
    found, want = first.astype(np.float64), np.asarray(want)[used].astype(np.float64)
    size = np.linalg.norm(want)
    assert np.linalg.norm(found - want) <= 5e-3 * size


def check_left(monkeypatch, sizes, config, each: int, *, interpret: bool, **options) -> None:
    """With `leaves_padding`: rows of pairs are right, and of `each` rows without a pair none is written.

    x has NaN in its rows of no pair, as what lies between a layer's products may; zeros in the interpreter,
    where rows that nobody wrote are NaN.
    """
    problem, operands = blocks(monkeypatch, *sizes, **options)
    if interpret:
        operands = (jnp.nan_to_num(operands[0]), *operands[1:])
    problem = problem._replace(zero_padding=False, leaves_padding=True)
    config = config._replace(num_ctas=2) if interpret else config
    run = jax.jit(functools.partial(launch.run, problem, config=config, interpret=interpret))
    want = np.asarray(reference.grouped_matmul(problem, *operands), np.float64)
    for _ in range(1 if interpret else 2):
        poison = jnp.full(problem.out_shape, jnp.nan, problem.out_dtype)
        jax.block_until_ready(poison).delete()  # the allocator gives this memory to the result
        found = np.asarray(run(*operands), np.float64)
        ids = np.asarray(operands[-3])
        held = (ids >= 0) & (ids < sizes[0] * sizes[1]) & in_use(problem, operands)
        error = np.linalg.norm(found[held] - want[held])
        assert error <= 5e-3 * np.linalg.norm(want[held])
        size = problem.num_rows // each * each
        empty = ~held[:size].reshape(-1, each).any(1)
        empty &= np.arange(size // each) * each % problem.block_size > 0  # a block's first rows are
        assert empty.any()
        left = found[:size].reshape(-1, each, problem.n)[empty]
        assert not interpret or np.isnan(left).all()  # memory of the interpreter that nobody wrote


LEFT = [
    ("32 rows", (20, 2, 3, 64, 128, 32), SWAP._replace(bm=32), 16, {"gather": False}),
    ("24 rows, gathered", (9, 2, 3, 64, 128, 24), WIDE._replace(bm=24, stages=5), 8, dict(SILU)),
]
LEFT_ON_A_GPU = [
    *LEFT,
    ("80 rows", (90, 2, 5, 256, 640, 80), WIDE._replace(bm=80, stages=4), 16, {"gather": False}),
    (
        "80 rows, gated",
        (90, 2, 5, 256, 320, 80),
        WIDE._replace(bm=80, stages=4),
        16,
        {"transpose_rhs": True, **SILU},
    ),
    (
        "16 rows, 128 of k",
        (90, 2, 40, 256, 320, 16),
        WIDE._replace(bk=128, stages=3, lag=1),
        8,
        {"transpose_rhs": True, **SILU},
    ),
]


@pytest.mark.parametrize("case", LEFT, ids=[case[0] for case in LEFT])
def test_rows_without_a_pair_are_left_in_the_interpreter(case, monkeypatch):
    _, sizes, config, each, options = case
    with jax.default_device(jax.devices("cpu")[0]):
        check_left(monkeypatch, sizes, config, each, interpret=True, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LEFT_ON_A_GPU, ids=[case[0] for case in LEFT_ON_A_GPU])
def test_rows_without_a_pair_are_left(case, monkeypatch):
    _, sizes, config, each, options = case
    check_left(monkeypatch, sizes, config, each, interpret=False, **options)


# -- in the interpreter ----------------------------------------------------------------------------

FEW = [
    ("m, gathered, gated", lambda m: blocks(m, 9, 2, 2, 64, 64, 128, **SILU), M),
    ("m, late, several tiles", lambda m: blocks(m, 150, 1, 2, 64, 320, 128, gather=False), M),
    ("m, interleaved", lambda m: blocks(m, 9, 1, 2, 64, 64, 128, interleaved=True, **SILU), M),
    ("n, bias", lambda m: blocks(m, 9, 2, 2, 72, 40, 64, bias=True, row_weights=True, **SILU), N),
    ("n, float32", lambda m: blocks(m, 9, 1, 2, 64, 64, 64, preferred_element_type="float32"), N),
    (
        "swap, transposed, interleaved",
        lambda m: blocks(m, 9, 2, 3, 64, 64, 16, transpose_rhs=True, interleaved=True, **SILU),
        WIDE,
    ),
    ("swap, pair", lambda m: blocks(m, 9, 2, 3, 72, 64, 8, pair=True, **SILU), WIDE._replace(bm=8)),
    ("swap, odd", lambda m: blocks(m, 9, 2, 3, 40, 24, 16, gather=False, bias=True), SWAP),
    ("partial", lambda m: blocks(m, 9, 2, 3, 64, 64, 12, gather=False), SWAP),
    (
        "swap, many rows, late",
        lambda m: blocks(m, 9, 1, 1, 64, 640, 144, gather=False),
        MANY_ROWS._replace(late=True),
    ),
    (
        "swap, many rows, zeros",
        lambda m: blocks(m, 150, 1, 3, 64, 128, 144, gather=False, routing="dropped"),
        MANY_ROWS._replace(late=True),
    ),
    (
        "swap, two tiles, zeros",
        lambda m: blocks(m, 150, 1, 2, 64, 128, 192, gather=False),
        MANY_ROWS._replace(bm=96),
    ),
    ("remote", lambda m: blocks(m, 20, 2, 4, 64, 64, 16, routing="dropped", bias=True), SWAP),
    ("ragged", lambda m: ragged(m, [3, 0, 17, 5], 30, 64, 64), SWAP),
    ("ragged, m", lambda m: ragged(m, [130, 3], 140, 64, 64), M),
    # 130 of a tile's 144 rows, which must leave the next group's alone.
    (
        "ragged, many rows, late",
        lambda m: ragged(m, [3, 130, 3], 136, 64, 128),
        MANY_ROWS._replace(late=True),
    ),
    ("masked", lambda m: masked(m, [3, 0, 17], 20, 64, 64), SWAP),
    (
        "masked, by expert",
        lambda m: masked(m, [3, 0, 40, 17], 40, 64, 320),
        SWAP._replace(bm=8, group=3, by_expert=True),
    ),
    # Two experts of 137 and 163 rows: a warpgroup of their second tiles has none.
]


@pytest.mark.parametrize(("make", "config"), [f[1:] for f in FEW], ids=[f[0] for f in FEW])
def test_forms_in_the_interpreter(make, config, monkeypatch):
    with jax.default_device(jax.devices("cpu")[0]):
        check(*make(monkeypatch), config, interpret=True)


def test_tiles_that_do_not_fit_a_problem_are_refused(monkeypatch):
    """Swapped tiles load two rows' ids at once: blocks of one row led to a misaligned address on an H200."""
    problem, _ = blocks(monkeypatch, 9, 2, 40, 64, 128, 1, gather=False)
    with pytest.raises(ValueError, match="even number of rows"):
        kernel.build(problem, SWAP._replace(bm=8))
    kernel.build(problem._replace(zero_padding=False), SWAP._replace(bm=8))
    with pytest.raises(ValueError, match="store 16 bits"):
        kernel.build(problem._replace(out_dtype="float32", zero_padding=False), SWAP)
    with pytest.raises(ValueError, match="interleaved"):
        weights = Weights(activation="silu", gated=True, interleaved=True)
        kernel.build(problem._replace(weights=weights, zero_padding=False), WIDE)
    with pytest.raises(ValueError, match="masked layout"):
        kernel.build(problem, M._replace(by_expert=True))


@pytest.mark.parametrize("gathered", [False, True])
def test_a_last_block_that_is_not_whole_is_not_read(gathered):
    """As many rows in use as an ill alignment likes: ids and row weights end with P. The interpreter refuses
    to read what is behind them."""
    block, rows = 72, 72 + 17
    sizes: dict[str, Any] = {"num_tokens": block, "top_k": 1} if gathered else {"num_pairs": rows}
    weights = Weights(activation="silu", gated=gathered)
    shape = (rows, 64, 64 if gathered else 128, 2)
    kinds = ("bfloat16", "bfloat16", weights)
    problem = MatmulProblem("test", "blocks", *shape, *kinds, block_size=block, **sizes)
    problem = problem._replace(zero_padding=not gathered, row_weights=not gathered)
    rng = np.random.default_rng(0)
    x = normal(rng, (block if gathered else rows, 64), "bfloat16")
    w = normal(rng, (2, 64, 128), "bfloat16", 64**-0.5)
    ids, experts = np.arange(rows, dtype=np.int32), np.array([1, 0], np.int32)
    vector = [np.ones(rows, np.float32)] if problem.row_weights else []
    operands = [x, w, *vector, ids, experts, np.array([1 << 30], np.int32)]
    operands = [jnp.asarray(x) for x in operands]
    config = tiles.Config("swap", block, 256, 64, 3, lag=1, num_ctas=2)
    with jax.default_device(jax.devices("cpu")[0]):
        out = launch.run(problem, *operands, interpret=True, config=config)
        want = reference.grouped_matmul(problem, *operands)
    found, want = (np.asarray(a)[:block].astype(np.float64) for a in (out, want))
    assert np.linalg.norm(found - want) <= 1e-2 * np.linalg.norm(want)


def test_the_emulator_by_its_name():
    """From the public function, under jit, with a derivative."""
    (x, w, aligned), options = make_case(5, 2, 2, 64, 64, 16)
    with jax.default_device(jax.devices("cpu")[0]):
        used = int(aligned.num_tokens_post_padded[0])

        def loss(x, implementation):
            y = maj.grouped_matmul(x, w, aligned, implementation=implementation, **options)
            return jnp.sum(y[:used].astype(jnp.float32) ** 2), y

        step = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
        (got, y), (want, expected) = step(x, "emulator"), step(x, "xla")
    np.testing.assert_allclose(
        np.float32(y[:used]), np.float32(expected[:used]), rtol=2e-2, atol=2e-2
    )
    np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=5e-2, atol=5e-2)


# -- on a GPU --------------------------------------------------------------------------------------


def many() -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []

    def add(name, make, *configs):
        found.extend((f"{name}, {c.name if c else 'usual'}", make, c) for c in configs)

    def of_blocks(name, sizes, *configs, **options):
        add(name, lambda m: blocks(m, *sizes, **options), *configs)

    both = {"bias": True, "row_weights": True}
    for flag in (False, True):
        t: dict[str, Any] = {"transpose_rhs": flag}
        large = (300, 2, 5, 256, 640, 128)
        gated = (300, 2, 5, 256, 320, 128)
        early = M._replace(late=False)
        of_blocks(f"rows {flag}", large, M, early, N, gather=False, **t)
        of_blocks(f"gathered {flag}", large, M, early, N, **t)
        of_blocks(f"silu {flag}", gated, M, N, **SILU, **t)
        of_blocks(f"silu, all {flag}", gated, M, N, **SILU, **t, **both)
        of_blocks(f"silu, rows {flag}", gated, M, N, gather=False, **SILU, **t, **both)
        of_blocks(f"pair {flag}", gated, M, N, pair=True, **SILU, **t)
        swiglu = {"swiglu_limit": 1.0, "swiglu_alpha": 1.702, "interleaved": True, "bias": True}
        of_blocks(f"swiglu {flag}", gated, M, N, **swiglu, **SILU, **t)
        of_blocks(f"interleaved {flag}", gated, M, interleaved=True, **SILU, **t)
        for bm in (8, 16, 24, 40, 64):
            few, stages = (90, 2, 7, 256, 640, bm), 5 if bm < 64 else 4
            of_blocks(f"few {flag}", few, SWAP._replace(bm=bm, stages=stages), gather=False, **t)
            wide = WIDE._replace(bm=bm, stages=6 if bm < 32 else 5)
            of_blocks(f"few, gated {flag}", (90, 2, 7, 256, 320, bm), wide, **SILU, **t, **both)
            if flag and bm <= 24:
                deep = wide._replace(bk=128, stages=3, lag=1)
                of_blocks(f"few, gated {flag}", (90, 2, 7, 256, 320, bm), deep, **SILU, **t, **both)
        of_blocks(f"few, pair {flag}", (90, 2, 7, 256, 320, 16), WIDE, pair=True, **SILU, **t)
        for block, config, over in ((64, N, N), (16, SWAP, WIDE)):
            odd = (61, 3, 7, 200, 136, block)
            of_blocks(f"odd {flag}", odd, config, gather=False, **t)
            of_blocks(f"odd, gated {flag}", odd, over, bias=True, **SILU, **t)
            of_blocks(f"tiny {flag}", (5, 2, 3, 8, 8, block), config, **t)
        of_blocks(f"partial {flag}", (200, 2, 5, 128, 192, 100), M, N, bias=True, **t)
        of_blocks(f"pairs {flag}", (9, 3, 40, 128, 192, 1), WIDE._replace(bm=8), **SILU, **t)
        of_blocks(f"twelve {flag}", (70, 2, 5, 128, 192, 12), SWAP, gather=False, **t)
    of_blocks("tall", (700, 2, 3, 256, 640, 256), TALL, TALL._replace(late=True), gather=False)
    of_blocks("parts", (700, 2, 3, 256, 640, 256), M, gather=False, bias=True)
    for flag in (False, True):
        late = MANY_ROWS._replace(late=True)
        more = (MANY_ROWS, late, MANY_ROWS._replace(bm=192, stages=3, lag=1))
        more = (*more, MANY_ROWS._replace(bm=176, stages=3, lag=1, group=6))
        for tile in more:
            sizes = (700, 2, 3, 256, 640, tile.bm)
            of_blocks(f"swap {flag}", sizes, tile, gather=False, transpose_rhs=flag)
            of_blocks(f"swap, gated {flag}", sizes, tile, transpose_rhs=flag, **SILU)
    of_blocks("many experts", (200, 2, 512, 64, 128, 16), None)
    for routing in ("hot", "half", "dropped"):
        for block in (16, 64, 128, 256):
            size = (300, 2, 8, 256, 640, block)
            of_blocks(f"{routing} {block}", size, None, routing=routing, gather=False)
    for sizes, rows in (
        ([3, 0, 7, 5], 15),
        ([300, 1, 0, 129], 431),
        ([1] * 40, 41),
        ([5, 9, 3], 10),
        ([0, 0], 6),
        ([130, 500, 3, 64, 1000], 1697),
    ):
        add(
            f"ragged {sizes[:5]}",
            lambda m, sizes=sizes, rows=rows: ragged(m, sizes, rows, 256, 640),
            *(M, N, SWAP, MANY_ROWS, MANY_ROWS._replace(late=True)),
        )
    add("ragged, odd", lambda m: ragged(m, [130, 7, 3], 144, 200, 136), N, SWAP)
    for counts in ([3, 0, 17, 20], [0, 0, 0], [20] * 4):
        add(
            f"masked {counts}",
            lambda m, counts=counts: masked(m, counts, 20, 256, 640),
            *(M, N, SWAP),
        )
    by_expert = [M._replace(group=group, by_expert=True) for group in (2, 8)]
    add(
        "masked, gated",
        lambda m: masked(m, [512, 129, 0], 512, 256, 320 * 2, **SILU),
        *(M, N, WIDE, *by_expert),
    )
    for most in (500, 512):  # a tile ends with the expert's rows, or in the next one's
        add(
            f"masked, many rows of {most}",
            lambda m, most=most: masked(m, [300, 10, 64, 0, 450, 129, most], most, 256, 640),
            *(*by_expert, MANY_ROWS._replace(late=True), None),
        )
    of_blocks("zeros", (700, 2, 5, 256, 640, 144), None, gather=False, routing="dropped")
    of_blocks("zeros", (700, 2, 5, 256, 640, 192), None, gather=False, routing="hot")
    of_blocks("zeros", (700, 2, 5, 256, 640, 176), None, gather=False, routing="dropped")
    return found


MANY = many()


@pytest.mark.gpu
@pytest.mark.parametrize(("make", "config"), [c[1:] for c in MANY], ids=[c[0] for c in MANY])
def test_forms_on_a_gpu(make, config, monkeypatch):
    check(*make(monkeypatch), config, interpret=False)


# -- the list of tiles -----------------------------------------------------------------------------


def listed(tiles_, sizes, offset=0):
    """(expert, first row, row behind the last) of each tile, from the kernel's body in NumPy."""
    given = [np.array(sizes, np.int32)]
    if tiles_.ragged:
        given.append(np.array([offset], np.int32))
    count, expert, start, end = emulator.run(tile_list.build(tiles_), given)
    count = int(count[0])
    assert count <= tiles_.capacity
    rows = zip(expert[:count], start[:count], end[:count], strict=True)
    return [(int(e), int(s), min(int(s) + tiles_.bm, int(b))) for e, s, b in rows]


def expected(tiles_, sizes, offset=0):
    found, row = [], 0
    for group, size in enumerate(sizes):
        size = max(size, 0)
        begin = row if tiles_.ragged else group * tiles_.max_rows
        most = tiles_.num_rows if tiles_.ragged else begin + tiles_.max_rows
        end = min(begin + size, most)
        expert = group - offset if tiles_.ragged else group
        expert = expert if 0 <= expert < tiles_.num_experts else -1
        for start in range(begin, end, tiles_.bm):
            found.append((expert, start, min(start + tiles_.bm, end)))
        row = end
    if tiles_.ragged:
        for start in range(row, tiles_.num_rows, tiles_.bm):
            found.append((-1, start, min(start + tiles_.bm, tiles_.num_rows)))
    return found


RAGGED = [
    ([3, 0, 7, 5], 15, 4, 0),
    ([3, 0, 7, 5], 40, 4, 0),
    ([0, 0], 9, 2, 0),
    ([5, 9, 3], 10, 3, 0),
    ([4, -3, 2], 8, 3, 0),
    ([11, 7, 0, 25, 9], 60, 2, 1),
    ([11, 7, 0, 25, 9], 60, 2, -1),
    ([2**30, 2**30, 2**31 - 1, 5], 100, 4, 0),
    ([1] * 1500, 1400, 1500, 0),
    ([700] + [0] * 600 + [13], 900, 602, 3),
]


@pytest.mark.parametrize("bm", [8, 16, 128])
@pytest.mark.parametrize("case", RAGGED, ids=lambda case: str(case)[:40])
def test_list_of_groups(case, bm):
    sizes, rows, experts, offset = case
    tiles_ = tile_list.TileList(True, len(sizes), experts, rows, 0, bm)
    assert listed(tiles_, sizes, offset) == expected(tiles_, sizes, offset)


@pytest.mark.parametrize("bm", [8, 64])
@pytest.mark.parametrize("counts", [[3, 0, 20, 25], [0, 0], [20] * 5, [1, -2] * 300], ids=str)
def test_list_of_the_masked_layout(counts, bm):
    tiles_ = tile_list.TileList(False, len(counts), len(counts), 20 * len(counts), 20, bm)
    assert listed(tiles_, counts) == expected(tiles_, counts)


# -- tiles by size ---------------------------------------------------------------------------------


def test_every_size_gets_tiles_that_fit():
    """Into a block's rows, into shared memory, and into what a form can do."""
    for block in (1, 4, 8, 12, 16, 24, 48, 64, 80, 96, 100, 128, 144, 192, 256, 512):
        for experts in (1, 8, 512):
            for tokens in (1, 64, 4096):
                for options in (
                    {},
                    SILU | {"gated": True},
                    SILU | {"gated": True, "interleaved": True},
                ):
                    for out in ("bfloat16", "float32"):
                        problem = MatmulProblem(
                            *("test", "blocks", tokens + experts * (block - 1), 512, 384, experts),
                            *("bfloat16", out, Weights(**options)),
                            block_size=block,
                        )
                        config = choose_tiles.config_for(problem)
                        item = 4 if out == "float32" else 2
                        ring = config.stages * config.bk * (config.bm + config.bn) * 2
                        rows = shape_of(problem, config).piece_rows
                        pieces = 2 * (1 if config.form == "swap" else 2) * rows * 128
                        assert ring + pieces + 1024 <= MAX_SHARED_BYTES, (problem, config)
                        if config.form == "swap":
                            assert config.bm <= max(block, 8) or block % 8, (problem, config)
                            assert item == 2 and not options.get("interleaved")
                            assert config.bn == (256 if options or config.bm > 64 else 128)


@pytest.mark.parametrize(
    "block, options, rows, bm",
    [
        (144, {}, 2048, 144),
        (192, {}, 2048, 192),
        (192, {"bias": True}, 2048, 96),
        (288, {}, 4096, 144),
        (144, {"activation": "gelu", "gated": True}, 2048, 64),
        (144, {"activation": "silu", "gated": True, "interleaved": True}, 2048, 128),
        (144, {}, 16, 16),
        (128, {}, 2048, 128),
        (256, {}, 2048, 128),
        (80, {}, 512, 80),
    ],
    ids=str,
)
def test_blocks_of_many_rows_are_tiles(block, options, rows, bm):
    """Where they may be; `rows` of 8 experts are in use, as far as the sizes tell."""
    problem = MatmulProblem(
        *("test", "blocks", rows * 4 + 8 * (block - 1), 2048, 1536, 8, "bfloat16", "bfloat16"),
        *(Weights(**options), block),
        zero_padding=False,
    )
    config = choose_tiles.config_for(problem)
    assert config.bm == bm
    assert config.late is (bm in (128, 144))


def test_groups_of_blocks_of_176_rows_hold_1024_rows():
    """Six of them: as many times 1024 rows fill whole groups. Other tiles have the groups that they had."""

    def found(block, experts=8, columns=28672, out_dtype="bfloat16"):
        sizes = (32768, 4096, columns, experts, "bfloat16", out_dtype)
        problem = MatmulProblem("test", "blocks", *sizes, Weights(), block, zero_padding=False)
        config = choose_tiles.config_for(problem, "NVIDIA H200")
        return config.bm, config.group

    assert 5 * 176 < 1024 <= 6 * 176
    assert found(176) == found(176, experts=16) == (176, 6)
    assert found(160) == (160, 8) and found(192) == (192, 8) and found(144) == (144, 4)
    assert found(176, experts=17) == (176, 4) and found(176, columns=512) == (176, 0)
    assert found(176, out_dtype="float32") == (128, 8)


def test_masked_rows_are_taken_expert_by_expert_where_tiles_have_128_rows():
    """Few rows an expert, and other layouts, have the tiles that they had."""
    sizes = {"k": 7168, "n": 4096, "num_experts": 32, "dtype": "bfloat16"}
    sizes |= {"out_dtype": "bfloat16", "weights": Weights()}

    def name(rows, columns=4096, **more):
        problem = MatmulProblem("test", "masked", 32 * rows, **sizes | {"n": columns} | more)
        return choose_tiles.config_for(problem._replace(max_rows=rows), "NVIDIA H200").name

    assert name(1024) == "128x256x64s4m-g8-late-experts"
    assert name(1024, out_dtype="float32") == "128x256x64s4m-g8-experts"
    assert name(1024, 512) == "128x256x64s4m-g0-late"
    assert name(128) == "16x128x128s5swap-g0" and name(512) == "64x256x64s4n-g8"
    blocks_ = MatmulProblem("test", "blocks", 32768, **sizes, block_size=128)
    ragged_ = MatmulProblem("test", "ragged", 32768, **sizes, num_groups=32)
    for problem in (blocks_, ragged_):
        assert not choose_tiles.config_for(problem, "NVIDIA H200").by_expert


def test_few_rows_get_small_tiles_and_many_get_large_ones():
    sizes = {"block_size": 128, "platform": "cuda", "activation": "silu"}
    forms = [
        maj.select_matmul_implementation((tokens, 2048), (128, 2048, 1536), top_k=8, **sizes).form
        for tokens in (16, 512, 8192)
    ]
    assert forms[0].startswith("8x") and "swap" in forms[0]
    assert forms[1].startswith("64x256") and forms[2].startswith("128x256")
