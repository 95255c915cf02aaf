"""The oracle itself: against a result worked out by hand, and its NumPy twin against it."""

import numpy as np
import pytest

from tests import cover, oracle


def test_oracle_gives_the_result_worked_out_by_hand():
    want = oracle.Expected(
        sorted_token_ids=[1, 8, 8, 2, 4, 7, 0, 5, 8] + [8] * 9,
        expert_ids=[0, 2, 3, -1, -1, -1],
        num_tokens_post_padded=[9],
        tokens_per_expert=[1, 0, 3, 2, 0],
        row_of_pair=[6, 0, 3, -1, 4, 7, -1, 5],
    )
    ids = [3, 0, 2, 5, 2, 3, -1, 2]
    got = oracle.align(ids, block_size=3, num_experts=5, return_inverse=True)
    assert got == want


def test_oracle_applies_the_map_in_both_modes():
    ids, options = [0, 1, 2, 3], {"block_size": 2, "num_experts": 4, "expert_map": [1, -1, 0, 1]}
    label = oracle.align(ids, **options)
    assert label.expert_ids == [1, -1, 0, 1] and label.tokens_per_expert == [1, 1, 1, 1]
    kept = oracle.align(ids, ignore_invalid_experts=True, **options)
    assert kept.sorted_token_ids == [2, 4, 0, 3, 4, 4, 4, 4]
    assert kept.expert_ids == [0, 1, -1, -1] and kept.tokens_per_expert == [1, 2, 0, 0]


def test_oracle_capacity_is_the_published_value():
    # 16,320 is what vLLM allocates for (4096 tokens x 2, 64 experts, block 128); 8 pairs use 8 experts.
    assert oracle.capacity(8192, 128, 64, False) == 16320
    assert oracle.capacity(8192, 128, 64, True) == 16384
    assert oracle.capacity(8, 16, 256, False) == 128


def test_batched_oracle_gives_the_result_worked_out_by_hand():
    got = oracle.align_batched([1, -4, 9], max_tokens_per_batch=3, block_size=2)
    assert got.sorted_token_ids == [0, 9, 6, 7, 8, 9] + [9] * 6
    assert got.expert_ids == [0, 2, 2, -1, -1, -1]
    assert got.num_tokens_post_padded == [6] and got.tokens_per_expert == [1, 0, 3]


@pytest.mark.parametrize(
    "case", [c for c in cover.load() if c["num_tokens"] <= 64][::2], ids=cover.name
)
def test_numpy_oracle_equals_the_loops(case):
    ids, options = cover.arguments(case)
    want = oracle.align(ids.ravel().tolist(), **options)
    got = oracle.align_numpy(ids, **options)
    for field in oracle.Expected._fields:
        assert np.array_equal(getattr(got, field), getattr(want, field)) or (
            getattr(got, field) is None and getattr(want, field) is None
        ), field


def test_cover_holds_every_pair_of_levels():
    cases = cover.load()
    seen = set().union(*map(cover.pairs_of, cases))
    assert cover.all_pairs() <= seen
    assert all(corner in cases for corner in cover.extremes())


def test_cover_is_what_its_generator_writes():
    assert cover.load() == cover.generate(seed=2026)


@pytest.mark.parametrize("dtype", oracle.ID_DTYPES)
@pytest.mark.parametrize("routing", oracle.ROUTINGS)
def test_routing_is_what_its_name_says(routing, dtype):
    ids = oracle.route(routing, num_tokens=500, top_k=4, num_experts=100, dtype=dtype, seed=1)
    kept = (ids >= 0) & (ids < 100)
    assert ids.dtype == dtype and ids.shape == (500, 4)
    share = {"minus_30": 0.7, "minus_all": 0.0, "dropped": 0.0, "outside": 0.5}.get(routing, 1.0)
    assert abs(kept.mean() - share) < 0.05
    values, counts = np.unique(ids[kept], return_counts=True)
    if routing == "one":
        assert len(values) == 1
    if routing == "distinct":
        assert all(len(set(row)) == 4 for row in ids.tolist())
    if routing == "zipf":
        assert counts.max() > 5 * np.median(counts)
    if routing == "outside":
        dropped = ids[~kept]
        assert (dropped.min() < 0 or np.iinfo(dtype).min == 0) and dropped.max() >= 100
