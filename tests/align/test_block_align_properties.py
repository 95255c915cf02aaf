"""What holds for every input, whatever the oracle says: found by hypothesis."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moe_align_jax as maj
from tests import oracle
from tests.helpers import as_jax


@st.composite
def calls(draw, max_pairs=200):
    """(ids, options): few experts or many, ids in and out of range, every option."""
    num_experts = draw(st.sampled_from([1, 2, 3, 7, 8, 31, 33, 64, 100, 5000]))
    block_size = draw(st.sampled_from([1, 2, 3, 4, 16, 50]))
    dtype = draw(st.sampled_from(oracle.ID_DTYPES))
    info = np.iinfo(dtype)
    low, high = max(info.min, -3), min(info.max, num_experts + 3)
    wild = st.sampled_from([int(info.min), int(info.max), high])
    ids = draw(st.lists(st.integers(low, high) | wild, min_size=1, max_size=max_pairs))
    entry = st.integers(-2, num_experts + 1)
    few = num_experts <= 100
    expert_map = draw(
        st.none() | st.lists(entry, min_size=num_experts, max_size=num_experts)
        if few
        else st.none()
    )
    options = {
        "block_size": block_size,
        "num_experts": num_experts,
        "expert_map": None if expert_map is None else np.array(expert_map, np.int32),
        "ignore_invalid_experts": draw(st.booleans()),
        "pad_sorted_ids": draw(st.booleans()),
        "num_valid_pairs": draw(st.none() | st.integers(-2, len(ids) + 2)),
        "return_inverse": True,
    }
    return np.array(ids, dtype), options


def run(ids, implementation, options):
    out = maj.moe_align_block_size(ids, implementation=implementation, **options)
    return [np.asarray(field) for field in out]


def assert_rows_are_a_permutation_of_the_kept_pairs(ids, options, result):
    rows, blocks, used, counts, inverse = result
    n = ids.size
    kept = rows[rows < n]
    assert len(set(kept.tolist())) == len(kept) == counts.sum()
    assert (rows >= 0).all() and (rows[rows >= n] == n).all()
    assert used[0] % options["block_size"] == 0 and (rows[used[0] :] == n).all()
    assert (blocks[used[0] // options["block_size"] :] == -1).all()
    # row_of_pair is the inverse, and -1 for exactly the pairs that have no row.
    assert np.array_equal(rows[inverse[inverse >= 0]], np.flatnonzero(inverse >= 0))
    assert (inverse >= 0).sum() == len(kept)


def assert_blocks_are_pure_and_groups_are_stable(ids, options, result):
    rows, blocks, used, counts, _ = result
    size, n, expert_map = options["block_size"], ids.size, options["expert_map"]
    groups = []
    for block in range(used[0] // size):
        pairs = rows[block * size : (block + 1) * size]
        pairs = pairs[pairs < n]
        assert len(pairs), "a block in use holds a pair"
        experts = {int(e) for e in ids[pairs]}
        if expert_map is not None and options["ignore_invalid_experts"]:
            experts = {int(expert_map[e]) for e in experts}
            labels = set(experts)
        elif expert_map is not None:
            local = {int(expert_map[e]) for e in experts}
            labels = {e if 0 <= e < options["num_experts"] else -1 for e in local}
        else:
            labels = set(experts)
        assert len(experts) == 1 and labels == {int(blocks[block])}
        groups.append((experts.pop(), pairs.tolist()))
    # Groups in ascending order of expert; ascending pairs within each.
    assert [g for g, _ in groups] == sorted(g for g, _ in groups)
    for expert in {g for g, _ in groups}:
        pairs = [p for g, some in groups if g == expert for p in some]
        assert pairs == sorted(pairs) and len(pairs) == counts[expert]
        # Only the last block of an expert is padded.
        assert all(len(some) == size for g, some in groups if g == expert and some[-1] != pairs[-1])


@given(case=calls())
def test_result_equals_oracle_and_keeps_every_property(implementation, case):
    """All of it about one result: `xla` compiles each size anew."""
    ids, options = case
    got = maj.moe_align_block_size(ids, implementation=implementation, **options)
    oracle.assert_same(got, oracle.expected(ids, **options))
    result = [np.asarray(field) for field in got]
    assert_rows_are_a_permutation_of_the_kept_pairs(ids, options, result)
    assert_blocks_are_pure_and_groups_are_stable(ids, options, result)
    first = [field.tobytes() for field in result]
    assert first == [field.tobytes() for field in run(ids, implementation, options)]
    if implementation != "xla" or ids.dtype == np.int32:  # another dtype is another program
        assert first == [field.tobytes() for field in run(as_jax(ids), implementation, options)]
    if options["num_valid_pairs"] is None:
        # Only sorted_token_ids and row_of_pair know the order of the pairs.
        shuffled = np.random.default_rng(ids.size).permutation(ids)
        again = run(shuffled, implementation, options)
        assert first[1:4] == [field.tobytes() for field in again[1:4]]


@given(
    counts=st.lists(st.integers(-3, 40), min_size=1, max_size=30),
    max_tokens=st.integers(1, 30),
    block_size=st.sampled_from([1, 2, 3, 8, 16, 50]),
)
def test_batched_result_equals_oracle(implementation, counts, max_tokens, block_size):
    got = maj.batched_moe_align_block_size(
        np.array(counts),
        max_tokens_per_batch=max_tokens,
        block_size=block_size,
        implementation=implementation,
    )
    want = oracle.align_batched(counts, max_tokens_per_batch=max_tokens, block_size=block_size)
    oracle.assert_same(got, want)


@pytest.mark.parametrize("pad", [False, True])
@given(
    num_pairs=st.integers(0, 300),
    num_experts=st.integers(1, 40),
    block_size=st.integers(1, 20),
    data=st.data(),
)
def test_capacity_is_enough_and_reached(pad, num_pairs, num_experts, block_size, data):
    """No routing needs more rows than P, and without rounding one needs all but block_size - 1 of them."""
    padded = maj.max_num_tokens_padded(
        num_pairs, block_size=block_size, num_experts=num_experts, pad_sorted_ids=pad
    )
    assert padded == oracle.capacity(num_pairs, block_size, num_experts, pad)
    cuts = st.lists(st.integers(0, num_pairs), min_size=num_experts - 1, max_size=num_experts - 1)
    edges = [0, *sorted(data.draw(cuts)), num_pairs]
    sizes = np.diff(edges)
    assert (-(-sizes // block_size) * block_size).sum() <= padded
    used = min(num_pairs, num_experts)
    worst = [1] * (used - 1) + [num_pairs - used + 1] * (used > 0)
    rows = sum(-(-s // block_size) * block_size for s in worst)
    assert padded - rows < block_size + (block_size if pad else 0)
