"""Values at the edges: weights of dropped pairs, counts beyond int32, exact scales, no tokens, wrong types.

Also what holds whatever the values: shardings under vmap, and which modes of differentiation there are.
"""

import contextlib
import importlib.util
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax import masked_quant
from tests.expert_parallel.exchanges import MODES, emulate_ragged, mesh_of, over, split
from tests.layout.helpers import tokens, weighted_sum

LAYOUTS = {
    "masked": (maj.permute_to_masked, maj.unpermute_from_masked, {}),
    "too little room": (
        maj.permute_to_masked,
        maj.unpermute_from_masked,
        {"max_tokens_per_expert": 1},
    ),
    "contiguous": (
        maj.permute_to_contiguous,
        maj.unpermute_from_contiguous,
        {"expert_alignment": 2},
    ),
}
POISON = [np.nan, np.inf, -np.inf]


# -- dropped pairs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("poison", POISON)
def test_a_dropped_pairs_weight_may_be_anything(name, poison):
    permute, unpermute, options = LAYOUTS[name]
    ids = np.array([[1, 0], [-1, -1], [1, 5], [0, 1]])
    x = tokens(4, 3)
    rows, layout = permute(x, ids, num_experts=2, **options)
    where = np.asarray(layout.row_of_pair)
    clean = np.random.default_rng(1).random(ids.shape).astype(np.float32)
    weights = np.where(where < 0, np.float32(poison), clean)
    out = unpermute(rows, layout, weights)
    flat = np.asarray(rows).reshape(-1, 3)
    np.testing.assert_allclose(out, weighted_sum(flat, where, clean), rtol=1e-6)

    # Cotangents of tokens without any pair may be anything too.
    cotangent = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)
    cotangent[1] = poison
    pull = jax.jit(lambda y, w: jax.vjp(lambda y, w: unpermute(y, layout, w), y, w)[1](cotangent))
    d_rows, d_weights = pull(rows, weights)
    want_rows, want_weights = np.zeros_like(flat), np.zeros_like(clean)
    for t, k in itertools.product(range(4), range(2)):
        if (row := where[t, k]) >= 0:
            want_rows[row] = clean[t, k] * cotangent[t]
            want_weights[t, k] = flat[row] @ cotangent[t]
    np.testing.assert_allclose(np.asarray(d_rows).reshape(-1, 3), want_rows, rtol=1e-5)
    np.testing.assert_allclose(d_weights, want_weights, rtol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_behind_dropped_pairs_may_be_anything(name):
    permute, unpermute, options = LAYOUTS[name]
    ids = np.array([[1, 0], [-1, -1], [1, 5], [0, 1]])
    x = tokens(4, 3)
    x[1] = np.nan  # a token without experts
    rows, layout = permute(x, ids, num_experts=2, **options)
    weights = np.where(np.asarray(layout.row_of_pair) < 0, np.nan, 1).astype(np.float32)
    used = np.asarray(layout.pair_of_row) < ids.size
    y = np.where(used[..., None], rows, np.nan)

    def loss(x, y, weights):
        rows, layout = permute(x, ids, num_experts=2, **options)
        y = jnp.where(used[..., None], rows, y)
        return jnp.sum(unpermute(y, layout, weights))

    value, gradients = jax.value_and_grad(loss, (0, 1, 2))(jnp.asarray(x), y, weights)
    assert np.isfinite(value)
    for gradient in gradients:
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("transport", ["all_gather", "all_to_all", "ragged_all_to_all"])
@pytest.mark.parametrize("mode", MODES)
def test_dropped_pairs_through_dispatch_and_combine(monkeypatch, transport, mode):
    emulate_ragged(monkeypatch)
    ids = np.array([[1, 0], [-1, -1], [3, 9], [2, 1]])
    clean = np.random.default_rng(1).random(ids.shape).astype(np.float32)
    valid = (ids >= 0) & (ids < 4)
    x = tokens(4, 3)
    x[1] = np.nan

    def body(x, ids, weights):
        got = maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=4, mode=mode, transport=transport
        )
        y = got.x
        if mode == "normal":
            rows, layout = maj.permute_to_contiguous(y, got.topk_ids, num_experts=2)
            y = maj.unpermute_from_contiguous(rows, layout, got.topk_weights)
        return maj.combine(y, got.handle)

    layer = split(mesh_of(2), body)
    weights = np.where(valid, clean, np.nan).astype(np.float32)
    want = np.where(valid, clean, 0).sum(1, keepdims=True) * np.nan_to_num(x)
    out, pull = jax.vjp(jax.jit(lambda x, w: layer(x, ids, w)), x, weights)
    np.testing.assert_allclose(out, want, rtol=1e-6)
    d_x, d_weights = pull(jnp.ones_like(out))
    sums = np.where(valid, clean, 0).sum(1, keepdims=True)
    np.testing.assert_allclose(d_x, np.broadcast_to(sums, x.shape), rtol=1e-6)
    want = np.where(valid, np.nan_to_num(x).sum(1, keepdims=True), 0)
    np.testing.assert_allclose(d_weights, want, rtol=1e-5)


def test_dropped_pairs_in_the_example():
    path = Path(__file__).parents[2] / "examples/moe_layer.py"
    spec = importlib.util.spec_from_file_location("moe_layer", path)
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    params = example.init(jax.random.key(0), hidden=8, ffn=16, num_experts=2)
    ids, x = jnp.array([[1, 0], [1, -1]]), jnp.asarray(tokens(2, 8))

    def loss(x, weights):
        return jnp.sum(example.apply_experts(params, x, weights, ids, block_size=4) ** 2)

    found = [
        jax.value_and_grad(loss, (0, 1))(x, jnp.array([[0.5, 0.25], [1.0, last]]))
        for last in (0.0, jnp.nan, jnp.inf)
    ]
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0], other)
    assert found[0][1][1][1, 1] == 0


# -- counts ----------------------------------------------------------------------------------------


def kept(count, *, mode="normal", jit=False):
    """How many of 3 tokens are sent."""

    def body(x, ids, weights, *given):
        return maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=2, mode=mode,
            num_valid_tokens=given[0] if given else count,
        ).handle.in_use  # fmt: skip

    given = (count,) if jit else ()
    specs = (P("ep"),) * 3 + (P(),) * len(given)
    run = jax.shard_map(body, mesh=mesh_of(1), in_specs=specs, out_specs=P("ep"))
    return int(
        np.sum(jax.jit(run)(tokens(3, 4), np.zeros((3, 2), np.int32), np.ones((3, 2)), *given))
    )


@pytest.mark.parametrize(
    ("count", "want"),
    [
        (2, 2), (0, 0), (-1, 0), (-(2**40), 0), (2**31, 3), (2**32, 3), (2**40, 3), (2**70, 3),
        (np.uint32(2**32 - 1), 3), (np.uint32(1), 1), (np.int64(2**40), 3), (np.int64(2**32 + 1), 3),
        (np.int64(-(2**32) + 2), 0), (np.uint64(2**64 - 1), 3), (np.int8(-1), 0), (np.uint8(2), 2),
        (np.array(2**33, np.int64), 3),
    ],
    ids=lambda v: f"{type(v).__name__} {v}",
)  # fmt: skip
@pytest.mark.parametrize("mode", MODES)
def test_num_valid_tokens_saturates(count, want, mode):
    assert kept(count, mode=mode) == want
    with jax.enable_x64(True):
        assert kept(count, mode=mode) == want


@pytest.mark.parametrize(
    ("count", "want"), [(2**32 - 1, 3), (2**31, 3), (2**31 - 1, 3), (2, 2), (0, 0)]
)
def test_num_valid_tokens_of_a_device_saturates(count, want):
    assert kept(jnp.uint32(count)) == want
    assert kept(jnp.uint32(count), jit=True) == want
    with jax.enable_x64(True):
        assert kept(jnp.int64(count + 2**40), jit=True) == 3
        assert kept(jnp.int64(count - 2**40), jit=True) == 0
        assert kept(jnp.uint64(2**64 - 1), jit=True) == 3


# -- types -----------------------------------------------------------------------------------------

IDS, X = np.array([[1, 0], [1, -1]]), np.ones((2, 128), np.float32)
QUANT = np.ones((2, 4, 256), jnp.bfloat16), np.array([1, 2])


def _align(**options):
    return maj.moe_align_block_size(IDS, **({"block_size": 2, "num_experts": 2} | options))


def _dispatch(**options):
    def body(x, ids, weights):
        given = {"axis_name": "ep", "num_experts": 2} | options
        return maj.dispatch(x, ids, weights, **given).tokens_per_expert

    return over(mesh_of(1), body)(X, IDS, np.ones((2, 2), np.float32))


INTS = {
    ("block_size",): lambda v: _align(block_size=v),
    ("num_experts",): lambda v: _align(num_experts=v),
    ("num_valid_pairs",): lambda v: _align(num_valid_pairs=v),
    ("max_tokens_per_batch",): lambda v: maj.batched_moe_align_block_size(
        IDS[0], max_tokens_per_batch=v, block_size=2
    ),
    ("block_size", "batched"): lambda v: maj.batched_moe_align_block_size(
        IDS[0], max_tokens_per_batch=2, block_size=v
    ),
    ("num_pairs",): lambda v: maj.max_num_tokens_padded(v, block_size=2, num_experts=2),
    ("block_size", "padded"): lambda v: maj.padded_group_sizes(_align(), block_size=v),
    ("num_experts", "masked"): lambda v: maj.permute_to_masked(X, IDS, num_experts=v),
    ("max_tokens_per_expert",): lambda v: maj.permute_to_masked(
        X, IDS, num_experts=2, max_tokens_per_expert=v
    ),
    ("num_experts", "contiguous"): lambda v: maj.permute_to_contiguous(X, IDS, num_experts=v),
    ("expert_alignment",): lambda v: maj.permute_to_contiguous(
        X, IDS, num_experts=2, expert_alignment=v
    ),
    ("max_num_rows",): lambda v: maj.permute_to_contiguous(
        X, IDS, num_experts=2, expert_alignment=1, max_num_rows=v
    ),
    ("num_experts", "dispatch"): lambda v: _dispatch(num_experts=v),
    ("num_valid_tokens",): lambda v: _dispatch(num_valid_tokens=v),
    ("max_low_latency_tokens",): lambda v: _dispatch(max_low_latency_tokens=v),
    ("max_tokens_per_expert", "dispatch"): lambda v: _dispatch(max_tokens_per_expert=v),
    ("group_size",): lambda v: maj.silu_and_mul_masked_quant(*QUANT, group_size=v),
    ("topk_ids_or_shape",): lambda v: maj.select_implementation(
        (v, 2), block_size=2, num_experts=2
    ),
    ("num_tokens",): lambda v: maj.select_transport(v, top_k=2, num_ranks=2),
    ("top_k",): lambda v: maj.select_transport(2, top_k=v, num_ranks=2),
    ("max_low_latency_tokens", "select"): lambda v: maj.select_transport(
        2, top_k=2, num_ranks=2, max_low_latency_tokens=v
    ),
    ("shape",): lambda v: masked_quant.select_quant_implementation((2, v, 256)),
}  # fmt: skip


@pytest.mark.parametrize("argument", INTS, ids=" ".join)
def test_a_bool_is_no_int_and_a_float_no_index(argument):
    for value in (True, False, 1.0, 1.5, np.True_, np.float32(2), jnp.array(True), "1"):
        with pytest.raises(TypeError, match=rf"^\w+: {argument[0]} must .*; got .*\. "):
            INTS[argument](value)


FLAGS = {
    "pad_sorted_ids": lambda v: maj.max_num_tokens_padded(
        4, block_size=2, num_experts=2, pad_sorted_ids=v
    ),
    "return_inverse": lambda v: _align(return_inverse=v),
    "initialize": lambda v: maj.permute_to_masked(X, IDS, num_experts=2, initialize=v),
    "mark_padding": lambda v: maj.permute_to_contiguous(X, IDS, num_experts=2, mark_padding=v),
    "divide": lambda v: maj.silu_and_mul_masked_quant(*QUANT, divide=v),
}


@pytest.mark.parametrize("argument", [*FLAGS, "initialize of dispatch"])
def test_a_flag_is_a_bool(argument):
    call = FLAGS.get(argument, lambda v: _dispatch(initialize=v))
    for value in ("yes", 1, 0.0, jnp.array(True)):
        with pytest.raises(TypeError, match=rf"^\w+: {argument.split()[0]} must .*; got .*\. "):
            call(value)
    call(np.True_)


@pytest.mark.parametrize("wrong", [jnp.int32, "int8", bool, True, 1.0, "float33", np.float32(1)])
def test_sums_have_a_floating_point_dtype(wrong):
    rows, layout = maj.permute_to_masked(X, IDS, num_experts=2)
    flat, contiguous = maj.permute_to_contiguous(X, IDS, num_experts=2)

    def exchange(dtype):
        def body(x, ids, weights):
            got = maj.dispatch(x, ids, weights, axis_name="ep", num_experts=2)
            return maj.combine(got.x, got.handle, out_dtype=dtype)

        return over(mesh_of(1), body)(X, IDS, np.ones((2, 2), np.float32))

    for call in (
        lambda dtype: maj.unpermute_from_masked(rows, layout, out_dtype=dtype),
        lambda dtype: maj.unpermute_from_contiguous(flat, contiguous, out_dtype=dtype),
        exchange,
    ):
        with pytest.raises(TypeError, match=r"^\w+: out_dtype must be a floating point dtype; got"):
            call(wrong)
        assert call("bfloat16").dtype == call(jnp.bfloat16).dtype == jnp.bfloat16


# -- scales ----------------------------------------------------------------------------------------

gpu = pytest.param("mosaic_gpu", marks=pytest.mark.gpu)


def scales_of(amax, implementation, dtype, **options):
    """Of groups whose greatest value is exactly `amax`: silu(gate) is 1, rounded, near 1.278."""
    gate = np.float32(1.2784645)
    assert np.float32(gate / (1 + np.exp(-gate))).astype(dtype) == 1
    x = np.zeros((1, len(amax), 256), dtype)
    x[..., 0], x[0, :, 128] = gate, amax
    run = jax.jit(lambda x, m: maj.silu_and_mul_masked_quant(
        x, m, implementation=implementation, **options
    ))  # fmt: skip
    device = jax.devices("cpu")[0] if implementation == "emulator" else None
    with jax.default_device(device):
        eager = maj.silu_and_mul_masked_quant(
            x, np.array([len(amax)]), implementation=implementation, **options
        )
        jitted = run(x, np.array([len(amax)], np.int32))
    np.testing.assert_array_equal(eager[1], jitted[1])
    return np.asarray(jitted[1]).reshape(-1)


@pytest.mark.parametrize("implementation", ["xla", "emulator", gpu])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_are_the_correctly_rounded_quotient(implementation, dtype):
    dtype = jnp.dtype(dtype)
    one = int(np.array(1, dtype).view(np.uint16))
    two = int(np.array(2, dtype).view(np.uint16))
    amax = np.arange(one, two, (two - one) // 128).astype(np.uint16).view(dtype)
    assert len(amax) == 128
    amax = np.concatenate([amax, amax * np.array(2.0**-9, dtype), amax * np.array(2.0**13, dtype)])
    if implementation == "emulator":  # a row at a time; the next test has every mantissa
        amax = amax[::7]
    want = amax.astype(np.float32) / np.float32(448)
    got = scales_of(amax, implementation, dtype)
    np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))
    # The power of two at or above it.
    want = np.exp2(np.ceil(np.log2(amax.astype(np.float64) / 448))).astype(np.float32)
    np.testing.assert_array_equal(
        scales_of(amax, implementation, dtype, scale_format="ue8m0"), want
    )


def test_the_quotient_by_448_of_any_float32():
    from moe_align_jax._masked_quant.problem import bits_over_448

    every_mantissa = np.arange(0x3F800000, 0x40000000, dtype=np.int32).view(np.float32)
    exponents = np.random.default_rng(0).uniform(-117, 128, 1 << 20)
    for x in (every_mantissa, np.exp2(exponents).astype(np.float32)):
        x = x[np.isfinite(x)]
        got = bits_over_448(x.view(np.int32), lambda a, b: a // b)
        np.testing.assert_array_equal(got, (x / np.float32(448)).view(np.int32))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64])
def test_counts_of_any_dtype_with_many_rows(dtype):
    x = np.ones((1, 300, 256), jnp.bfloat16)
    _, scales = maj.silu_and_mul_masked_quant(x, np.array([100], dtype), implementation="xla")
    assert np.count_nonzero(scales) == 100


# -- NumPy int64 -----------------------------------------------------------------------------------


def test_what_is_seen_of_a_numpy_int64():
    """As the README says: all 64 bits where the array reaches us, the low 32 where jax has narrowed it."""
    ids = np.array([[0, 2**32 + 1]])

    def counts(ids, **options):
        return maj.moe_align_block_size(
            ids, block_size=1, num_experts=2, **options
        ).tokens_per_expert

    with jax.enable_x64(False):
        assert counts(ids).tolist() == [1, 0]
        assert jax.jit(lambda: counts(ids))().tolist() == [1, 0]
        assert jax.jit(counts)(ids).tolist() == [1, 1]
        assert jax.vmap(counts)(ids).tolist() == [[1, 1]]
    with jax.enable_x64(True):
        assert jax.jit(counts)(ids).tolist() == jax.vmap(counts)(ids)[0].tolist() == [1, 0]

    expert_map, plain = np.array([2**32 + 1, 0]), np.array([[0, 1]])

    def blocks(expert_map):
        out = maj.moe_align_block_size(plain, block_size=1, num_experts=2, expert_map=expert_map)
        return out.expert_ids

    with jax.enable_x64(False):
        whole = blocks(expert_map)
        assert whole.tolist() == jax.jit(lambda: blocks(expert_map))().tolist() == [-1, 0]
        assert jax.jit(blocks)(expert_map).tolist() == [1, 0]


# -- meshes and no tokens --------------------------------------------------------------------------


def _round_trip(permute, unpermute):
    def call(x, ids):
        rows, layout = permute(x, ids, num_experts=5)
        return unpermute(2 * rows, layout), layout

    return call


VMAPPED = {
    "align": lambda x, ids: maj.moe_align_block_size(
        ids, block_size=4, num_experts=5, return_inverse=True
    ),
    "align twice": jax.vmap(
        lambda x, ids: maj.moe_align_block_size(ids, block_size=4, num_experts=5)
    ),
    "with a map": lambda x, ids: maj.moe_align_block_size(
        ids, block_size=4, num_experts=5, expert_map=jnp.array([1, 0, -1, 2, 3]), num_valid_pairs=7
    ),
    "batched": lambda x, ids: maj.batched_moe_align_block_size(
        ids[:, 0], max_tokens_per_batch=4, block_size=2
    ),
    "masked": _round_trip(maj.permute_to_masked, maj.unpermute_from_masked),
    "contiguous": _round_trip(maj.permute_to_contiguous, maj.unpermute_from_contiguous),
    "gradient": jax.grad(
        lambda x, ids: jnp.sum(
            _round_trip(maj.permute_to_masked, maj.unpermute_from_masked)(x, ids)[0] ** 2
        )
    ),
    "quant": lambda x, ids: maj.silu_and_mul_masked_quant(
        jnp.broadcast_to(x[:, None].astype(jnp.bfloat16), (6, 5, 256)), ids[:, 0]
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "context"), [(name, bool(i % 2)) for i, name in enumerate(VMAPPED)]
)
def test_vmap_keeps_the_sharding_of_an_explicit_batch(name, context):
    mesh = mesh_of(kind=AxisType.Explicit)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 6, 256)).astype(np.float32)
    ids = rng.integers(-1, 6, (16, 6, 2)).astype(np.int32)
    run = jax.vmap(VMAPPED[name])
    want = run(x, ids)
    given = [jax.device_put(a, NamedSharding(mesh, P("ep"))) for a in (x, ids)]
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        compiled = jax.jit(run).lower(*given).compile()
        assert not re.findall(r"all-(gather|to-all|reduce)\S*\(", compiled.as_text())
        for got in (jax.jit(run)(*given), run(*given) if context else None):
            for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=False):
                assert jax.typeof(ours).sharding.spec[0] == "ep"
                np.testing.assert_array_equal(ours, theirs)


def test_products_of_an_explicit_batch_stay_where_they_are():
    mesh = mesh_of(5, kind=AxisType.Explicit)
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(5, 4, 8)).astype(np.float32), rng.normal(size=(2, 8, 8))
    sizes = np.array([[1, 3], [4, 0], [0, 2], [0, 0], [2, 2]], np.int32)
    run = jax.vmap(lambda x, sizes: maj.ragged_dot(x, w.astype(np.float32), sizes))
    want = [x[b, r] @ w[int(r >= first)] for b, (first, _) in enumerate(sizes) for r in range(4)]
    used = np.arange(4)[None] < sizes.sum(1)[:, None]
    want = np.where(used[..., None], np.reshape(want, x.shape), 0)
    with jax.set_mesh(mesh):
        given = [jax.device_put(a, NamedSharding(mesh, P("ep"))) for a in (x, sizes)]
        got = jax.jit(run)(*given)
        assert jax.typeof(got).sharding.spec[0] == "ep"
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dispatch", ["static", "dynamic", "round_robin"])
def test_slots_keep_the_sharding_of_explicit_ids(dispatch):
    mesh = mesh_of(kind=AxisType.Explicit)
    ids = np.random.default_rng(0).integers(-1, 6, (16, 2)).astype(np.int32)
    location = maj.ExpertLocation.trivial(1, 5, 8, num_gpus=2, dispatch=dispatch).layer(0)
    want = maj.to_physical_ids(ids, location, rank=1)
    with jax.set_mesh(mesh):
        given = jax.device_put(ids, NamedSharding(mesh, P("ep")))
        got = jax.jit(lambda ids: maj.to_physical_ids(ids, location, rank=1))(given)
        assert jax.typeof(got).sharding.spec[0] == "ep"
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("transport", "mode", "jit"),
    [
        (None, "normal", False),
        ("all_gather", "low_latency", True),
        ("all_to_all", "normal", True),
        ("all_to_all", "low_latency", True),
    ],
)
def test_no_tokens_on_five_devices(transport, mode, jit):
    def body(x, ids, weights):
        got = maj.dispatch(
            x, ids, weights, axis_name="ep", num_experts=10, mode=mode, transport=transport
        )
        counts = got.topk_ids if got.masked_m is None else got.masked_m
        return got.x.sum()[None], counts, maj.combine(got.x + 1, got.handle)

    run = split(mesh_of(5), body)
    run = jax.jit(run) if jit else run
    empty = np.zeros((0, 4), np.float32), np.zeros((0, 2), np.int32), np.zeros((0, 2), np.float32)
    total, counts, out = run(*empty)
    assert total.tolist() == [0] * 5 and not np.any(counts) and out.shape == (0, 4)
    gradient = jax.grad(lambda x: jnp.sum(run(x, *empty[1:])[2]))(empty[0])
    assert gradient.shape == (0, 4)


@pytest.mark.parametrize("jit", [True, False])
def test_layouts_of_no_tokens_on_five_devices(jit):
    def body(x, ids):
        rows, layout = maj.permute_to_masked(x, ids, num_experts=2)
        flat, contiguous = maj.permute_to_contiguous(x, ids, num_experts=2)
        back = maj.unpermute_from_masked(rows, layout)
        return rows.sum()[None], *layout[:2], *contiguous[:3], flat, back

    run = split(mesh_of(5), body)
    got = (jax.jit(run) if jit else run)(np.zeros((0, 4), np.float32), np.zeros((0, 2), np.int32))
    assert [a.shape for a in got] == [(5,), (10,), (10,), (0,), (10,), (10,), (0, 4), (0, 4)]
    assert not any(np.any(a) for a in got)


# -- modes of differentiation ----------------------------------------------------------------------

W, SMALL = np.array([[0.5, 0.25], [1.0, 9.0]], np.float32), tokens(2, 3)


def _exchange(mode):
    def body(x, ids, weights):
        got = maj.dispatch(x, ids, weights, axis_name="ep", num_experts=2, mode=mode)
        y = got.x**2
        if mode == "normal":
            y = y * got.topk_weights.sum(1, keepdims=True)
        return maj.combine(y, got.handle)

    return lambda x, w: split(mesh_of(2), body)(x, IDS, w)


def _layout(name):
    permute, unpermute, options = LAYOUTS[name]

    def call(x, w):
        rows, layout = permute(x, IDS, num_experts=2, **options)
        return unpermute(rows**2, layout, w)

    return call


UP, DOWN = np.random.default_rng(0).normal(size=(2, 2, 3, 3)).astype(np.float32)
FORWARD = {
    "fused_moe": lambda x: maj.fused_moe(x, UP, DOWN, W, IDS, gated=False),
    "ragged_dot": lambda x: maj.ragged_dot(x, UP, jnp.array([1, 1])),
    "grouped_matmul": lambda x: maj.grouped_matmul(
        x,
        UP,
        maj.moe_align_block_size(IDS, block_size=2, num_experts=2),
        block_size=2,
        top_k=2,
    ),
    "masked_grouped_matmul": lambda x: maj.masked_grouped_matmul(
        jnp.stack([x, x]), UP, jnp.array([2, 1])
    ),
    "tgmm": lambda x: maj.tgmm(x.T, x, jnp.array([1, 1])),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_of_products_is_refused_in_our_words(name):
    run, match = FORWARD[name], rf"^{name}: its result must be differentiated in reverse mode; got"
    for call in (
        lambda x: jax.jvp(run, (x,), (x,)),
        jax.jit(lambda x: jax.jvp(run, (x,), (x,))),
        jax.jit(jax.jacfwd(run)),
        jax.hessian(lambda x: jnp.sum(run(x))),
    ):
        with pytest.raises(NotImplementedError, match=match):
            call(SMALL)


LAYERS = {
    "masked": _layout("masked"),
    "contiguous": _layout("contiguous"),
    "normal": _exchange("normal"),
    "low_latency": _exchange("low_latency"),
}


@pytest.mark.parametrize(
    ("name", "jit"),
    [("masked", False), ("contiguous", False), *((name, True) for name in LAYERS)],
)
def test_forward_mode_says_what_works(name, jit):
    layer, wrap = LAYERS[name], jax.jit if jit else lambda f: f

    def loss(x, w):
        return jnp.sum(layer(x, w) ** 2)

    for call in (
        lambda x, w: jax.jvp(layer, (x, w), (x, w)),
        lambda x, w: jax.jvp(lambda w: layer(x, w), (w,), (w,)),
        lambda x, w: jax.jvp(lambda x: layer(x, w), (x,), (x,)),
        jax.hessian(loss),
        jax.jacfwd(loss),
    ):
        with pytest.raises(NotImplementedError, match=r"in reverse mode; got .* jax.jacrev\(jax"):
            wrap(call)(SMALL, W)

    # out = (sum of the valid weights) * x**2, so that the loss is s**2 x**4.
    s = np.where((IDS >= 0) & (IDS < 2), W, 0).sum(1)[:, None]
    hessian = wrap(jax.jacrev(jax.jacrev(loss)))(SMALL, W).reshape(6, 6)
    np.testing.assert_allclose(
        hessian, np.diag((12 * s**2 * SMALL**2).ravel()), rtol=1e-5, atol=1e-6
    )
