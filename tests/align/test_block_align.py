"""The contract of moe_align_block_size, once per implementation, against the plain-Python oracle."""

import itertools
import operator

import numpy as np
import pytest

import moe_align_jax as maj
from tests import cover, forms, oracle
from tests.conftest import KERNELS, by_implementation
from tests.helpers import as_jax, check


@by_implementation("case", cover.load(), xla=cover.load_coarse(), ids=cover.name)
def test_block_align_equals_oracle_over_the_cover(implementation, case):
    ids, options = cover.arguments(case)
    check(ids, implementation=implementation, container=case["container"], **options)


@pytest.mark.parametrize("implementation", KERNELS, indirect=True)
@pytest.mark.parametrize(
    ("size", "options"),
    forms.sizes_and_options(),
    ids=lambda x: str(x) if isinstance(x, forms.Size) else "-".join(map(str, x.values())),
)
def test_block_align_every_form_with_every_option(implementation, size, options):
    """Both sides of each threshold between the kernel forms."""
    check(
        forms.ids_of(size, seed=3),
        implementation=implementation,
        block_size=size.block_size,
        num_experts=size.num_experts,
        expert_map=oracle.local_map("any", size.num_experts, 1) if options["map"] else None,
        ignore_invalid_experts=options["map"] == "filter",
        num_valid_pairs=size.num_pairs * 3 // 4 if options["num_valid_pairs"] else None,
        return_inverse=options["return_inverse"],
        pad_sorted_ids=options["pad_sorted_ids"],
    )


# -- who is empty, and sizes around powers of two ---------------------------------------------------


@pytest.mark.parametrize("num_pairs", [40, 600])
def test_block_align_empty_expert_gets_no_block(implementation, num_pairs):
    """Every one of the 2^8 sets of empty experts."""
    for mask in range(256):
        experts = [e for e in range(8) if mask >> e & 1] or [8]
        ids = np.random.default_rng(mask).choice(experts, num_pairs).astype(np.int32)
        got = check(ids, implementation=implementation, block_size=4, num_experts=8)
        assert set(np.asarray(got.expert_ids).tolist()) - {-1} == set(ids.tolist()) - {8}


EDGES = sorted({2**power + step for power in range(16) for step in (-1, 0, 1)} - {0})


@by_implementation("num_pairs", EDGES, xla=EDGES[::4])
def test_block_align_sizes_around_powers_of_two(implementation, num_pairs):
    ids = oracle.route(
        "minus_30", num_tokens=num_pairs, top_k=1, num_experts=60, dtype="int32", seed=num_pairs
    )
    check(ids, implementation=implementation, block_size=16, num_experts=60, return_inverse=True)


EXPERT_EDGES = [e for e in EDGES if e <= 4097]


@by_implementation("num_experts", EXPERT_EDGES, xla=EXPERT_EDGES[1::4])
def test_block_align_experts_around_powers_of_two(implementation, num_experts):
    ids = oracle.route(
        "outside", num_tokens=700, top_k=1, num_experts=num_experts, dtype="int32", seed=num_experts
    )
    check(ids, implementation=implementation, block_size=8, num_experts=num_experts)


BLOCK_SIZES = [1, 2, 3, 5, 7, 100, 127, 128, 129, 1000, 4096]
SOME_PAIRS = [1, 31, 300, 5000]
PAIRS_AND_BLOCKS = list(itertools.product(SOME_PAIRS, BLOCK_SIZES))
EACH_BLOCK = list(zip(itertools.cycle(SOME_PAIRS), BLOCK_SIZES, strict=False))


@by_implementation("sizes", PAIRS_AND_BLOCKS, xla=EACH_BLOCK)
def test_block_align_any_block_size(implementation, sizes):
    num_pairs, block_size = sizes
    ids = oracle.route(
        "zipf", num_tokens=num_pairs, top_k=1, num_experts=10, dtype="int32", seed=block_size
    )
    for pad in (False, True):
        check(
            ids,
            implementation=implementation,
            block_size=block_size,
            num_experts=10,
            pad_sorted_ids=pad,
            return_inverse=True,
        )


# -- routings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", oracle.ROUTINGS)
@pytest.mark.parametrize("num_pairs", [24, 1000, 8192, 40_000])
def test_block_align_routings(implementation, routing, num_pairs):
    ids = oracle.route(
        routing, num_tokens=num_pairs // 8, top_k=8, num_experts=256, dtype="int32", seed=5
    )
    check(ids, implementation=implementation, block_size=64, num_experts=256, return_inverse=True)


@pytest.mark.parametrize("expert", [0, 1, 31, 32, 62, 63])
def test_block_align_all_pairs_on_one_expert(implementation, expert):
    ids = np.full((600, 8), expert, np.int32)
    got = check(ids, implementation=implementation, block_size=32, num_experts=64)
    assert int(got.num_tokens_post_padded[0]) == 4800


@pytest.mark.parametrize("num_experts", [4, 64, 1000])
def test_block_align_capacity_exactly_full(implementation, num_experts):
    """Every expert one pair over a whole block: all P rows are in use."""
    ids = np.repeat(np.arange(num_experts, dtype=np.int32), 17)
    np.random.default_rng(0).shuffle(ids)
    got = check(ids, implementation=implementation, block_size=16, num_experts=num_experts)
    assert int(got.num_tokens_post_padded[0]) == got.sorted_token_ids.shape[0]
    assert -1 not in np.asarray(got.expert_ids)


@pytest.mark.parametrize("num_pairs", [5, 3000])
def test_block_align_65535_experts(implementation, num_pairs):
    ids = np.random.default_rng(1).integers(0, 65_535, num_pairs).astype(np.int32)
    ids[0], ids[-1] = 65_534, 65_535
    check(ids, implementation=implementation, block_size=4, num_experts=65_535)


# -- no pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0)])
@pytest.mark.parametrize("mode", ["none", "label", "filter"])
def test_block_align_of_no_pairs(implementation, shape, mode):
    got = maj.moe_align_block_size(
        np.zeros(shape, np.int32),
        block_size=16,
        num_experts=5,
        expert_map=None if mode == "none" else np.arange(5),
        ignore_invalid_experts=mode == "filter",
        num_valid_pairs=3,
        return_inverse=True,
        implementation=implementation,
    )
    assert got.sorted_token_ids.shape == got.expert_ids.shape == got.row_of_pair.shape == (0,)
    assert got.num_tokens_post_padded.tolist() == [0] and got.tokens_per_expert.tolist() == [0] * 5
    assert all(field.dtype == np.int32 for field in got)


# -- ids are compared before they are narrowed ---------------------------------------------------------


@pytest.mark.parametrize("container", ["numpy", "jax"])
@pytest.mark.parametrize("dtype", oracle.ID_DTYPES)
def test_block_align_drops_what_only_narrowing_would_keep(implementation, dtype, container):
    info = np.iinfo(dtype)
    values = [2**bits + e for bits in (8, 16, 31, 32, 33, 63) for e in (-1, 0, 3)]
    values += [-v for v in values] + [0, 3, 99, 100, 101, -1, int(info.min), int(info.max)]
    ids = np.array([v for v in values if info.min <= v <= info.max], dtype=dtype)
    check(ids, implementation=implementation, container=container, block_size=4, num_experts=100)


MAPS = list(itertools.product(oracle.ID_DTYPES, [False, True], ["numpy", "jax"]))
# Every two of dtype, use and container: the sums of their places are even.
MAPS_PAIRWISE = [x for i, x in enumerate(MAPS) if (i + i // 2 + i // 4) % 2 == 0]


@by_implementation("given_map", MAPS, xla=MAPS_PAIRWISE)
def test_block_align_map_of_any_dtype(implementation, given_map):
    """Entries outside [-1, E) count as -1, compared before narrowing too."""
    dtype, ignore_invalid_experts, container = given_map
    info = np.iinfo(dtype)
    wild = [2**32 + 3, 2**31, -(2**32) + 2, 2**63 + 1, 20, 21, -1, -2, int(info.min), int(info.max)]
    wild = [v for v in wild if info.min <= v <= info.max and not 0 <= v < 20]
    rng = np.random.default_rng(3)
    values = [int(rng.choice(20)) if rng.random() < 0.6 else wild[i % len(wild)] for i in range(20)]
    expert_map = np.array(values, dtype=dtype)
    options = {"block_size": 4, "num_experts": 20, "ignore_invalid_experts": ignore_invalid_experts}
    ids = rng.integers(-2, 22, 200).astype(np.int32)
    given = as_jax(expert_map) if container == "jax" else expert_map
    got = maj.moe_align_block_size(
        ids, expert_map=given, return_inverse=True, implementation=implementation, **options
    )
    want = oracle.align(ids.tolist(), expert_map=values, return_inverse=True, **options)
    oracle.assert_same(got, want)


VALID = [-(2**40), -1, 0, 1, 57, 99, 100, 101, 2**31 - 1, 2**31, 2**32 + 5, 2**63]


@pytest.mark.parametrize("num_valid_pairs", VALID)
def test_block_align_num_valid_pairs_of_any_size_and_dtype(implementation, num_valid_pairs):
    ids = np.random.default_rng(4).integers(0, 6, (50, 2)).astype(np.int32)
    options = {"block_size": 8, "num_experts": 6, "return_inverse": True}
    want = oracle.align(ids.ravel().tolist(), num_valid_pairs=num_valid_pairs, **options)
    forms = [num_valid_pairs]
    for dtype in oracle.ID_DTYPES:
        if np.iinfo(dtype).min <= num_valid_pairs <= np.iinfo(dtype).max:
            array = np.array(num_valid_pairs, dtype=dtype)
            forms += [array, array[()], as_jax(array)]
    for form in forms:
        got = maj.moe_align_block_size(
            ids, num_valid_pairs=form, implementation=implementation, **options
        )
        oracle.assert_same(got, want)


# -- shapes and layouts of the input ----------------------------------------------------------------------


def test_block_align_flattens_any_shape_in_row_major_order(implementation):
    base = np.random.default_rng(6).integers(0, 12, (4, 6, 10)).astype(np.int32)
    for ids in (
        base,
        base.ravel(),
        base.T,
        base[::2, ::-1, 1::3],
        np.asfortranarray(base),
        base[0, 0, 0],
    ):
        check(np.asarray(ids), implementation=implementation, block_size=4, num_experts=12)


def test_block_align_leaves_its_inputs_alone(implementation):
    ids = np.random.default_rng(7).integers(-3, 12, 500)
    expert_map = np.arange(12)[::-1].copy()
    before = ids.copy(), expert_map.copy()
    check(ids, implementation=implementation, block_size=4, num_experts=12, expert_map=expert_map)
    assert np.array_equal(ids, before[0]) and np.array_equal(expert_map, before[1])


@pytest.mark.parametrize("num_pairs", [8, 512, 5000, 40_000])
def test_block_align_same_bits_every_run(implementation, num_pairs):
    ids = as_jax(np.random.default_rng(8).integers(0, 64, num_pairs).astype(np.int32))
    runs = [
        maj.moe_align_block_size(
            ids, block_size=16, num_experts=64, return_inverse=True, implementation=implementation
        )
        for _ in range(5)
    ]
    first = [np.asarray(field).tobytes() for field in runs[0]]
    assert all([np.asarray(field).tobytes() for field in run] == first for run in runs)


# -- padded_group_sizes, and the batched layout ------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 16, 100])
def test_padded_group_sizes_sum_to_the_rows_in_use(implementation, block_size):
    ids = np.random.default_rng(9).integers(-1, 9, 400).astype(np.int32)
    got = maj.moe_align_block_size(
        ids, block_size=block_size, num_experts=9, implementation=implementation
    )
    sizes = np.asarray(maj.padded_group_sizes(got, block_size=block_size))
    want = [-(-ids.tolist().count(e) // block_size) * block_size for e in range(9)]
    assert sizes.tolist() == want and sum(want) == int(got.num_tokens_post_padded[0])
    assert sizes.dtype == np.int32


BATCHED_LEVELS = ([1, 13, 16, 512], [1, 8, 40, 256], [1, 8, 32, 100])
BATCHED = list(itertools.product(*BATCHED_LEVELS))
# A Latin square: every two levels of different arguments meet.
BATCHED_PAIRWISE = [
    sizes
    for at in itertools.product(range(4), repeat=3)
    if sum(at) % 4 == 0 and (sizes := tuple(map(operator.getitem, BATCHED_LEVELS, at)))
]


@by_implementation("sizes", BATCHED, xla=BATCHED_PAIRWISE)
def test_batched_align_equals_oracle(implementation, sizes):
    max_tokens, num_experts, block_size = sizes
    rng = np.random.default_rng(max_tokens * num_experts + block_size)
    several = {
        "mixed": rng.integers(0, max_tokens + 1, num_experts),
        "empty": np.zeros(num_experts, int),
        "full": np.full(num_experts, max_tokens),
        "clamped": rng.integers(-(2**40), 2**40, num_experts),
        "one in use": np.where(np.arange(num_experts) == num_experts - 1, max_tokens, 0),
    }
    for counts in several.values():
        got = maj.batched_moe_align_block_size(
            counts,
            max_tokens_per_batch=max_tokens,
            block_size=block_size,
            implementation=implementation,
        )
        want = oracle.align_batched(
            counts.tolist(), max_tokens_per_batch=max_tokens, block_size=block_size
        )
        oracle.assert_same(got, want)


@pytest.mark.parametrize("dtype", oracle.ID_DTYPES)
def test_batched_align_clamps_before_it_narrows(implementation, dtype):
    info = np.iinfo(dtype)
    values = [0, 5, 7, 8, 100, -1, 2**31, 2**32 + 3, -(2**32) + 3, 2**63 + 2, info.min, info.max]
    counts = np.array([v for v in values if info.min <= v <= info.max], dtype=dtype)
    want = oracle.align_batched(counts.tolist(), max_tokens_per_batch=7, block_size=4)
    for given in (counts, as_jax(counts)):
        got = maj.batched_moe_align_block_size(
            given, max_tokens_per_batch=7, block_size=4, implementation=implementation
        )
        oracle.assert_same(got, want)


def test_batched_align_many_experts(implementation):
    counts = np.random.default_rng(2).integers(0, 4, 20_000).astype(np.int32)
    got = maj.batched_moe_align_block_size(
        counts, max_tokens_per_batch=3, block_size=2, implementation=implementation
    )
    want = oracle.align_batched(counts.tolist(), max_tokens_per_batch=3, block_size=2)
    oracle.assert_same(got, want)
