"""The masked and the contiguous layout against loops over pairs: values, gradients, bits, errors."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from tests.layout.helpers import masked_oracle, routing, rows_by_expert, tokens, weighted_sum


def contiguous_oracle(x, ids, num_experts, alignment, limit):
    top_k, n = ids.shape[1], ids.size
    rows, m_indices, pair_of_row = [], [], []
    row_of_pair = np.full(n, -1)
    for expert, pairs in enumerate(rows_by_expert(ids, num_experts)):
        padding = -len(pairs) % alignment
        for pair in pairs + [n] * padding:
            if pair < n and len(rows) < limit:
                row_of_pair[pair] = len(rows)
            rows.append(x[pair // top_k] if pair < n else np.zeros_like(x[0]))
            m_indices.append(expert)
            pair_of_row.append(pair)
    while len(rows) < limit:
        rows.append(np.zeros_like(x[0]))
        m_indices.append(-1)
        pair_of_row.append(n)
    return (
        np.array(rows[:limit]),
        m_indices[:limit],
        row_of_pair.reshape(ids.shape),
        pair_of_row[:limit],
    )


ROUTINGS = ("distinct", "with holes", "one expert", "nowhere")
SHAPES = [  # T, K, e, M or None for T, alignment, P or None: one compile each
    (1, 1, 1, None, 4, None),
    (9, 3, 4, 27, 1, None),
    (33, 8, 130, 3, 128, 384),  # too little room
    (16, 2, 1, None, 4, None),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda c: "-".join(map(str, c[:3])))
def test_masked_layout_equals_a_loop_over_pairs(shape):
    count, top_k, num_experts, room, *_ = shape
    x = tokens(count, 3)
    weights = np.random.default_rng(1).normal(size=(count, top_k)).astype(np.float32)
    for name in ROUTINGS:
        ids = routing(name, count, top_k, num_experts)
        want = masked_oracle(x, ids, num_experts, room or count)
        rows, found = maj.permute_to_masked(
            x, ids, num_experts=num_experts, max_tokens_per_expert=room
        )
        got = (rows, found.masked_m, found.tokens_per_expert, found.row_of_pair, found.pair_of_row)
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours is rows or ours.dtype == np.int32
        # Rows that are not in use may hold anything.
        y = np.where((want[4] < ids.size)[..., None], np.asarray(rows) * 3, np.nan)
        out = maj.unpermute_from_masked(y, found, weights)
        sums = weighted_sum(y.reshape(-1, 3), want[3], weights)
        np.testing.assert_allclose(out, sums, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda c: "-".join(map(str, c[:3])))
def test_contiguous_layout_equals_a_loop_over_pairs(shape):
    count, top_k, num_experts, _, alignment, limit = shape
    x = tokens(count, 3)
    weights = np.random.default_rng(1).normal(size=(count, top_k)).astype(np.float32)
    worst = maj.max_num_tokens_padded(
        count * top_k, block_size=alignment, num_experts=num_experts, pad_sorted_ids=True
    )
    for name in ROUTINGS:
        ids = routing(name, count, top_k, num_experts)
        want = contiguous_oracle(x, ids, num_experts, alignment, limit or worst)
        rows, found = maj.permute_to_contiguous(
            x, ids, num_experts=num_experts, expert_alignment=alignment, max_num_rows=limit
        )
        got = (rows, found.m_indices, found.row_of_pair, found.pair_of_row)
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        counts = [len(pairs) for pairs in rows_by_expert(ids, num_experts)]
        np.testing.assert_array_equal(found.tokens_per_expert, counts)
        sizes = [want[1].count(expert) for expert in range(num_experts)]
        np.testing.assert_array_equal(found.group_sizes, sizes)
        y = np.where((np.array(want[3]) < ids.size)[:, None], np.asarray(rows) * 3, np.nan)
        out = maj.unpermute_from_contiguous(y, found, weights)
        sums = weighted_sum(y, want[2], weights)
        np.testing.assert_allclose(out, sums, rtol=1e-5, atol=1e-6)


def test_padding_can_be_marked():
    ids = routing("distinct", 9, 2, 4)
    plain, marked = (
        maj.permute_to_contiguous(
            tokens(9, 2), ids, num_experts=4, expert_alignment=4, mark_padding=mark
        )[1]
        for mark in (False, True)
    )
    padding = np.asarray(plain.pair_of_row) == ids.size
    want = np.where(padding, -1, np.asarray(plain.m_indices))
    np.testing.assert_array_equal(marked.m_indices, want)
    assert np.any(np.asarray(plain.m_indices)[padding] >= 0)


@pytest.mark.parametrize("initialize", [True, False])
def test_every_bit_of_a_payload_of_any_dtype(initialize):
    """A pytree, trailing dimensions; rows that are not used are zeros or not compared."""
    rng = np.random.default_rng(2)
    given = {}
    for name in ("int8", "bfloat16", "float8_e4m3fn", "float32"):
        kind = np.dtype(getattr(ml_dtypes, name, name))
        bits = rng.integers(0, 256, (11, 2, 3, kind.itemsize)).astype(np.uint8)
        given[name] = bits.view(kind)[..., 0]
    ids = routing("with holes", 11, 3, 6)
    rows, layout = maj.permute_to_masked(
        given | {"scales": None}, ids, num_experts=6, initialize=initialize
    )
    assert rows.pop("scales") is None
    used = np.asarray(layout.pair_of_row) < ids.size
    for name, got in rows.items():
        assert got.dtype == name
        want = masked_oracle(given[name], ids, 6, 11)[0]
        ours = np.ascontiguousarray(np.asarray(got)[used]).view(np.uint8)
        np.testing.assert_array_equal(ours, np.ascontiguousarray(want[used]).view(np.uint8))
        if initialize:
            assert not np.asarray(got)[~used].view(np.uint8).any()


def test_ids_out_of_range_are_dropped_in_their_own_dtype():
    ids = np.array([[1, 0], [2**32 + 1, 1]], np.int64)
    x = tokens(2, 3)
    rows, layout = maj.permute_to_masked(x, ids, num_experts=2)
    np.testing.assert_array_equal(layout.masked_m, [1, 2])
    np.testing.assert_array_equal(rows, [[x[0], x[0] * 0], [x[0], x[1]]])
    _, layout = maj.permute_to_contiguous(x, ids, num_experts=2, expert_alignment=2)
    np.testing.assert_array_equal(layout.row_of_pair, [[2, 0], [-1, 3]])


def test_no_tokens():
    x, ids = np.zeros((0, 4), np.float32), np.zeros((0, 2), np.int32)
    rows, layout = maj.permute_to_masked(x, ids, num_experts=3)
    assert rows.shape == (3, 1, 4) and not np.any(layout.masked_m)
    assert maj.unpermute_from_masked(rows, layout).shape == (0, 4)
    rows, layout = maj.permute_to_contiguous(x, ids, num_experts=3)
    assert rows.shape == (0, 4) and layout.m_indices.shape == (0,)
    assert maj.unpermute_from_contiguous(rows, layout).shape == (0, 4)


def test_weights_are_applied_in_float32():
    """bfloat16 rows: the sum is that of float32 products, rounded once."""
    rng = np.random.default_rng(3)
    ids = routing("distinct", 16, 8, 8)
    y = rng.normal(size=(8, 16, 32)).astype(ml_dtypes.bfloat16)
    weights = rng.random((16, 8)).astype(np.float32)
    _, layout = maj.permute_to_masked(np.zeros((16, 1), np.float32), ids, num_experts=8)
    total = np.zeros((16, 32), np.float32)
    flat = y.reshape(-1, 32).astype(np.float32)
    for k in range(8):
        total += weights[:, k : k + 1] * flat[np.asarray(layout.row_of_pair)[:, k]]
    got = maj.unpermute_from_masked(y, layout, weights, out_dtype=jnp.float32)
    np.testing.assert_allclose(got, total, rtol=2e-6, atol=1e-6)
    assert maj.unpermute_from_masked(y, layout, weights).dtype == jnp.bfloat16


def both_layouts(num_experts):
    return {
        "masked": (
            functools.partial(
                maj.permute_to_masked, num_experts=num_experts, max_tokens_per_expert=3
            ),
            maj.unpermute_from_masked,
        ),
        "contiguous": (
            functools.partial(
                maj.permute_to_contiguous, num_experts=num_experts, expert_alignment=4
            ),
            maj.unpermute_from_contiguous,
        ),
    }


@pytest.mark.parametrize("kind", ["masked", "contiguous"])
def test_gradients_equal_those_of_the_dense_sum(kind):
    """`out[t] = sum_k w[t, k] * tanh(x[t] * a)`, pairs that were dropped left out; no scatter-add."""
    ids = routing("with holes", 10, 3, 4)
    permute, unpermute = both_layouts(4)[kind]
    x, weights = tokens(10, 5), tokens(10, 3, seed=1)
    direction = tokens(10, 5, seed=2)

    def loss(x, weights):
        rows, layout = permute(x, ids)
        return jnp.sum(unpermute(jnp.tanh(2 * rows), layout, weights) * direction)

    kept = np.asarray(permute(x, ids)[1].row_of_pair) >= 0
    assert kept.sum() < ((ids >= 0) & (ids < 4)).sum() or kind == "contiguous"
    share = np.where(kept, weights, 0).astype(np.float64)
    value = np.tanh(2 * np.asarray(x, np.float64))
    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    d_x, d_weights = step(x, weights)
    want_x = share.sum(1)[:, None] * direction * 2 * (1 - value**2)
    np.testing.assert_allclose(d_x, want_x, rtol=1e-5, atol=1e-6)
    want_weights = np.where(kept, (value * direction).sum(1)[:, None], 0)
    np.testing.assert_allclose(d_weights, want_weights, rtol=1e-5, atol=1e-6)
    # The alignment itself has scatters of integers.
    text = step.lower(x, weights).as_text()
    assert not re.search(r"stablehlo.scatter.*?\n(.*\n){1,8}?.*tensor<\d+x5xf32>", text)
    again = step(x, weights)
    assert all(np.array_equal(a, b) for a, b in zip(again, (d_x, d_weights), strict=True))


def test_gradients_of_rows_alone_and_without_weights():
    """The way back by itself, with its rows as what is differentiated."""
    ids = routing("with holes", 6, 2, 3)
    _, layout = maj.permute_to_masked(tokens(6, 1), ids, num_experts=3)
    y = jnp.asarray(tokens(18, 4).reshape(3, 6, 4), jnp.bfloat16)
    direction = tokens(6, 4, seed=2)
    got = jax.grad(lambda y: jnp.sum(maj.unpermute_from_masked(y, layout) * direction))(
        y.astype(jnp.float32)
    )
    want = masked_oracle(direction, ids, 3, 6)[0]
    np.testing.assert_array_equal(got, want)
    half = jax.grad(
        lambda y: jnp.sum(maj.unpermute_from_masked(y, layout, out_dtype=jnp.float32) * direction)
    )(y)
    np.testing.assert_array_equal(half, want.astype(ml_dtypes.bfloat16))


def test_vmap_equals_one_after_the_other():
    permute, unpermute = both_layouts(4)["masked"]
    ids = np.stack([routing("with holes", 6, 2, 4, seed) for seed in range(3)])
    x = np.stack([tokens(6, 5, seed=seed) for seed in range(3)])

    def there_and_back(x, ids):
        rows, layout = permute(x, ids)
        return unpermute(rows * rows, layout), layout

    got = jax.jit(jax.vmap(there_and_back))(x, ids)
    for i in range(3):
        want = there_and_back(x[i], ids[i])
        for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(ours[i], theirs, rtol=1e-6)


def layout_of(kind="masked"):
    return both_layouts(4)[kind][0](tokens(6, 5), routing("distinct", 6, 2, 4))[1]


BAD = {
    "ids of floats": (
        TypeError,
        "permute_to_masked: topk_ids must be an integer array; got float32",
        lambda: maj.permute_to_masked(tokens(2, 3), tokens(2, 2), num_experts=2),
    ),
    "flat ids": (
        ValueError,
        "permute_to_contiguous: topk_ids must have two dimensions; got int64",
        lambda: maj.permute_to_contiguous(tokens(2, 3), np.zeros(2, np.int64), num_experts=2),
    ),
    "other tokens": (
        ValueError,
        r"permute_to_masked: x must have shape \[2, \.\.\.\]; got float32",
        lambda: maj.permute_to_masked(tokens(3, 3), np.zeros((2, 1), np.int32), num_experts=2),
    ),
    **{
        f"initialize {value!r}": (
            TypeError,
            "permute_to_masked: initialize must be a Python bool; got",
            lambda value=value: maj.permute_to_masked(
                tokens(2, 3), np.zeros((2, 1), np.int32), num_experts=2, initialize=value
            ),
        )
        for value in ("yes", 1, None)
    },
    "no room": (
        ValueError,
        "max_tokens_per_expert must be at least 1; got 0",
        lambda: maj.permute_to_masked(
            tokens(2, 3), np.zeros((2, 1), np.int32), num_experts=2, max_tokens_per_expert=0
        ),
    ),
    "too many rows": (
        ValueError,
        r"max_tokens_per_expert must give a number of rows of at most 2\*\*31 - 1",
        lambda: maj.permute_to_masked(
            tokens(2, 3),
            np.zeros((2, 1), np.int32),
            num_experts=2**16,
            max_tokens_per_expert=2**15,
        ),
    ),
    "part of a block": (
        ValueError,
        r"max_num_rows must be a multiple of expert_alignment \(128\); got 100",
        lambda: maj.permute_to_contiguous(
            tokens(2, 3), np.zeros((2, 1), np.int32), num_experts=2, max_num_rows=100
        ),
    ),
    "another layout": (
        TypeError,
        "unpermute_from_masked: layout must be a MaskedLayout; got ContiguousLayout",
        lambda: maj.unpermute_from_masked(tokens(6, 5), layout_of("contiguous")),
    ),
    "integer rows": (
        TypeError,
        "unpermute_from_contiguous: y must be floating point; got int32",
        lambda: maj.unpermute_from_contiguous(np.zeros((24, 5), np.int32), layout_of("contiguous")),
    ),
    "rows of another shape": (
        ValueError,
        r"unpermute_from_masked: y must have shape \[4, 3, \.\.\.\]; got float32 \[6, 5\]",
        lambda: maj.unpermute_from_masked(tokens(6, 5), layout_of()),
    ),
    "weights of another shape": (
        ValueError,
        "unpermute_from_masked: topk_weights must have shape .6, 2",
        lambda: maj.unpermute_from_masked(
            np.zeros((4, 3, 5), np.float32), layout_of(), tokens(6, 3)
        ),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_argument(case):
    kind, text, call = BAD[case]
    with pytest.raises(kind, match=text):
        call()


# -- Explicit mesh axes, which jax.make_mesh makes by default ----------------------------------------------


@pytest.mark.parametrize("kind", ["masked", "contiguous"])
def test_explicit_axes_split_ids_weights_and_columns_but_not_rows(kind):
    permute = getattr(maj, f"permute_to_{kind}")
    unpermute = getattr(maj, f"unpermute_from_{kind}")
    rng = np.random.default_rng(0)
    x, weights = (rng.normal(size=(8, n)).astype(np.float32) for n in (4, 2))
    ids = rng.integers(-1, 4, (8, 2)).astype(np.int32)
    rows, layout = permute(x, ids, num_experts=4)
    want = unpermute(rows, layout, weights)
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Explicit,))

    def split(array, *spec):
        return jax.device_put(array, NamedSharding(mesh, P(*spec)))

    with jax.set_mesh(mesh):
        moved, of_split = permute(split(x, None, "a"), split(ids, "a"), num_experts=4)
        assert (np.asarray(moved) == np.asarray(rows)).all()
        for one, other in zip(of_split, layout, strict=True):
            assert (np.asarray(one) == np.asarray(other)).all()
        got = unpermute(moved, of_split, split(weights, "a"))
        assert np.allclose(got, want, rtol=1e-6, atol=1e-6)
        words = "must not have rows split over Explicit mesh axes; got .* inside jax.shard_map"
        with pytest.raises(ValueError, match=f"permute_to_{kind}: x {words}"):
            permute({"rows": split(x, "a")}, ids, num_experts=4)
        with pytest.raises(ValueError, match=f"unpermute_from_{kind}: y {words}"):
            unpermute(split(np.asarray(rows), "a"), layout, weights)
