"""jit, vmap, grad, scan, remat, x64, tracing: the op inside the transforms of JAX."""

import contextlib
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from tests import oracle
from tests.helpers import as_jax

OPTIONS = {"block_size": 4, "num_experts": 10, "return_inverse": True}


def aligner(implementation, **options):
    return functools.partial(
        maj.moe_align_block_size, implementation=implementation, **OPTIONS | options
    )


def ids_of(*shape, seed=0):
    return np.random.default_rng(seed).integers(-2, 12, shape).astype(np.int32)


def row(result, *index):
    return jax.tree.map(lambda x: x[index], result)


def test_without_jit_it_is_the_same(implementation):
    ids = ids_of(40)
    with jax.disable_jit():
        got = aligner(implementation)(ids)
    oracle.assert_same(got, oracle.expected(ids, **OPTIONS))


def test_the_masked_activation_without_jit_is_the_same():
    x = np.random.default_rng(0).standard_normal((2, 3, 256)).astype(np.float32)
    given = jnp.asarray(x, jnp.bfloat16), np.array([2, 3], np.int32)
    want = maj.silu_and_mul_masked_quant(*given)
    with jax.disable_jit():
        got = maj.silu_and_mul_masked_quant(*given)
    for mine, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))


@pytest.mark.parametrize("num_pairs", [6, 400, 3000])
def test_jit_equals_oracle(implementation, num_pairs):
    ids = ids_of(num_pairs)
    got = jax.jit(aligner(implementation))(ids)
    oracle.assert_same(got, oracle.expected(ids, **OPTIONS))


@pytest.mark.parametrize("num_pairs", [6, 400, 3000])
def test_vmap_one_deep(implementation, num_pairs):
    ids = ids_of(5, num_pairs)
    got = jax.vmap(aligner(implementation))(ids)
    for i in range(5):
        oracle.assert_same(row(got, i), oracle.expected(ids[i], **OPTIONS))


@pytest.mark.parametrize("in_axes", [(0, 0), (1, 0), (0, 1), (1, 1), (2, 2)])
def test_vmap_two_deep_over_any_axes(implementation, in_axes):
    ids = ids_of(3, 3, 40)
    outer, inner = in_axes
    inner = min(inner, 1)
    got = jax.jit(jax.vmap(jax.vmap(aligner(implementation), in_axes=inner), in_axes=outer))(ids)
    moved = np.moveaxis(ids, outer, 0)
    moved = np.stack([np.moveaxis(x, inner, 0) for x in moved])
    for i, j in np.ndindex(moved.shape[:2]):
        oracle.assert_same(row(got, i, j), oracle.expected(moved[i, j], **OPTIONS))


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_vmap_of_any_of_the_operands(implementation, dtype):
    """Ids, map and count batched or not, one and two deep, in ten combinations; int64 in four."""
    ids = as_jax(ids_of(3, 2, 70).astype(dtype))
    maps = jnp.asarray(np.random.default_rng(1).integers(-1, 10, (3, 2, 10)), jnp.int32)
    counts = jnp.asarray([[0, 70], [35, -1], [69, 80]], jnp.int32)

    def function(ids, expert_map, count):
        return aligner(implementation, ignore_invalid_experts=True)(
            ids, expert_map=expert_map, num_valid_pairs=count
        )

    operands = (ids, maps, counts)
    masks = (1, 2, 4, 7, 0o11, 0o24, 0o41, 0o52, 0o63, 0o77)
    for mask in masks if dtype == "int32" else (1, 4, 0o52, 0o77):
        # Low digit: which of the three the outer vmap maps; high digit: which the inner one does.
        outer = tuple(0 if mask >> i & 1 else None for i in range(3))
        inner = tuple(0 if mask >> (i + 3) & 1 else None for i in range(3))
        given = [
            x if (a, b) == (0, 0) else x[:, 0] if a == 0 else x[0] if b == 0 else x[0, 0]
            for x, a, b in zip(operands, outer, inner, strict=True)
        ]
        function_in = function if not mask >> 3 else jax.vmap(function, in_axes=inner)
        got = jax.vmap(function_in, in_axes=outer)(*given)
        for i in range(3):
            for j in range(2 if mask >> 3 else 1):
                at = (i, j) if mask >> 3 else (i,)
                mine = [
                    np.asarray(x)[(i,) * (a == 0) + (j,) * (b == 0)].tolist()
                    for x, a, b in zip(given, outer, inner, strict=True)
                ]
                want = oracle.align(
                    mine[0],
                    expert_map=mine[1],
                    num_valid_pairs=mine[2],
                    ignore_invalid_experts=True,
                    **OPTIONS,
                )
                oracle.assert_same(row(got, *at), want)


def test_vmap_of_the_batched_form(implementation):
    counts = np.random.default_rng(0).integers(-1, 9, (4, 3, 6)).astype(np.int32)
    function = functools.partial(
        maj.batched_moe_align_block_size,
        max_tokens_per_batch=7,
        block_size=4,
        implementation=implementation,
    )
    got = jax.vmap(jax.vmap(function))(counts)
    for i, j in np.ndindex(4, 3):
        want = oracle.align_batched(counts[i, j].tolist(), max_tokens_per_batch=7, block_size=4)
        oracle.assert_same(row(got, i, j), want)


def test_vmap_batch_of_100000():
    ids = ids_of(100_000, 4)
    got = jax.jit(jax.vmap(aligner("xla")))(ids)
    for i in (0, 1, 65_534, 65_535, 65_536, 99_999):
        oracle.assert_same(row(got, i), oracle.expected(ids[i], **OPTIONS))
    want = np.stack([(ids == e).sum(1) for e in range(10)], axis=1)
    assert np.array_equal(got.tokens_per_expert, want)


@pytest.mark.gpu
def test_vmap_batch_of_100000_is_an_error_on_a_gpu():
    with pytest.raises(ValueError, match="must be at most 65535 on a GPU; got 100000"):
        jax.vmap(aligner("mosaic_gpu"))(ids_of(100_000, 4))


# -- control flow -------------------------------------------------------------------------------------


def test_scan_and_map_over_layers(implementation):
    layers = ids_of(6, 50)

    def step(total, ids):
        out = aligner(implementation)(ids)
        return total + out.num_tokens_post_padded, out

    total, outs = jax.jit(lambda x: jax.lax.scan(step, jnp.zeros(1, jnp.int32), x))(layers)
    mapped = jax.lax.map(aligner(implementation), layers)
    rows = 0
    for i in range(6):
        want = oracle.expected(layers[i], **OPTIONS)
        rows += want.num_tokens_post_padded[0]
        oracle.assert_same(row(outs, i), want)
        oracle.assert_same(row(mapped, i), want)
    assert total.tolist() == [rows]


def test_cond_runs_only_the_chosen_branch(implementation):
    ids = ids_of(50)

    def function(flag, ids):
        return jax.lax.cond(
            flag, aligner(implementation), aligner(implementation, block_size=4), ids
        )

    got = jax.jit(function)(True, ids)
    oracle.assert_same(got, oracle.expected(ids, **OPTIONS))


def test_num_valid_pairs_is_a_device_value_under_jit(implementation):
    ids = ids_of(60)
    traces = []

    @jax.jit
    def function(ids, count):
        traces.append(None)
        return aligner(implementation)(ids, num_valid_pairs=count)

    for count in (0, 1, 59, 60, 61, -3):
        want = oracle.expected(ids, num_valid_pairs=count, **OPTIONS)
        oracle.assert_same(function(ids, jnp.int32(count)), want)
    assert len(traces) == 1


# -- derivatives of the float code around it ----------------------------------------------------------


def layer(implementation, weights, activations, ids):
    """Each pair's row scaled by its expert's weight: a tiny layer whose answer is known."""
    aligned = aligner(implementation)(ids.ravel())
    top_k = ids.shape[1]
    pairs = ids.size
    used = jnp.repeat(aligned.expert_ids, 4, total_repeat_length=aligned.sorted_token_ids.size)
    rows = jnp.append(activations, jnp.zeros_like(activations[:1]), axis=0)[
        jnp.minimum(aligned.sorted_token_ids // top_k, activations.shape[0])
    ]
    scaled = rows * weights[jnp.maximum(used, 0)][:, None]
    kept = (aligned.row_of_pair >= 0)[:, None]
    back = jnp.where(kept, scaled[jnp.maximum(aligned.row_of_pair, 0)], 0.0)
    assert back.shape[0] == pairs
    return back.reshape(*ids.shape, -1).sum(1)


def dense(weights, activations, ids):
    kept = (ids >= 0) & (ids < 10)
    return (jnp.where(kept, weights[jnp.clip(ids, 0, 9)], 0.0)).sum(1)[:, None] * activations


@pytest.mark.parametrize("wrap", ["plain", "jit", "remat", "vmap"])
def test_gradients_of_the_code_around_it(implementation, wrap):
    ids = ids_of(12, 3)
    rng = np.random.default_rng(2)
    weights = jnp.asarray(rng.normal(size=10), jnp.float32)
    activations = jnp.asarray(rng.normal(size=(12, 5)), jnp.float32)
    mine = functools.partial(layer, implementation)
    mine = {"remat": jax.checkpoint(mine), "jit": jax.jit(mine)}.get(wrap, mine)

    def loss(function, weights, activations):
        out = function(weights, activations, ids)
        return (out * jnp.sin(out)).sum()

    arguments = (weights, activations)
    if wrap == "vmap":
        arguments = tuple(jnp.stack([x, 2 * x]) for x in arguments)
    results = []
    for function in (mine, dense):
        grad = jax.grad(functools.partial(loss, function), argnums=(0, 1))
        grad = jax.vmap(grad) if wrap == "vmap" else grad
        # One by one, each operation of the code around would be compiled by itself: once is enough.
        results.append((grad if wrap == "plain" else jax.jit(grad))(*arguments))
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_jvp_has_no_tangent_for_the_integers(implementation):
    ids = ids_of(12, 3)
    weights = jnp.arange(10, dtype=jnp.float32)
    activations = jnp.ones((12, 5), jnp.float32)
    mine = functools.partial(layer, implementation)
    tangents = (jnp.ones_like(weights), jnp.zeros_like(activations))
    primal, tangent = jax.jvp(lambda w, a: mine(w, a, ids), (weights, activations), tangents)
    want, want_tangent = jax.jvp(lambda w, a: dense(w, a, ids), (weights, activations), tangents)
    np.testing.assert_allclose(primal, want, rtol=1e-6)
    np.testing.assert_allclose(tangent, want_tangent, rtol=1e-6)


# -- tracing ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted_traces():
    """The events that jax itself reports for each trace, lowering and compile."""
    events = []

    def listen(name, seconds, **_):
        if "trace" in name or "lower" in name or "compile" in name:
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_eager_calls_do_not_trace_again(implementation):
    host = ids_of(77)
    device = jnp.asarray(host)
    expert_map = np.arange(10, dtype=np.int32)

    def calls(ids, count):
        aligner(implementation)(ids)
        aligner(implementation)(ids, num_valid_pairs=count)
        aligner(implementation)(ids, num_valid_pairs=jnp.int32(count))
        aligner(implementation, ignore_invalid_experts=True)(ids, expert_map=expert_map)
        maj.batched_moe_align_block_size(
            expert_map, max_tokens_per_batch=9, block_size=2, implementation=implementation
        )

    with counted_traces() as events:
        calls(host, 5)
        calls(device, 6)
    assert events, "the listener hears nothing"
    with counted_traces() as events:
        for count in (7, -1, 2**40):
            calls(ids_of(77, seed=count % 5), min(count, 2**31 - 1))
            calls(device, 8)
    assert not events


def test_jit_of_the_same_size_traces_once(implementation):
    function = jax.jit(aligner(implementation))
    function(ids_of(78))
    with counted_traces() as events:
        want = [oracle.expected(ids_of(78, seed=s), **OPTIONS) for s in range(3)]
        for seed in range(3):
            oracle.assert_same(function(ids_of(78, seed=seed)), want[seed])
    assert not events


def test_names_resolved_within_a_trace_do_not_have_it_made_again():
    """In a process of its own, where the step is the first to use a name of ours."""
    program = """
import jax
import moe_align_jax as maj
traces = []
@jax.jit
def step(ids):
    traces.append(None)
    return maj.moe_align_block_size(ids, block_size=4, num_experts=8).expert_ids
ids = jax.numpy.arange(8, dtype="int32")
step(ids), step(ids)
print(len(traces))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr


def test_named_scope_is_in_the_program(implementation):
    platform = "cuda" if implementation == "mosaic_gpu" else "cpu"
    traced = jax.jit(aligner(implementation)).trace(ids_of(30))
    text = traced.lower(lowering_platforms=(platform,)).as_text(debug_info=True)
    assert "moe_align_block_size" in text


# -- 64-bit jax ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint64"])
def test_outputs_are_int32_with_and_without_x64(implementation, x64, dtype):
    ids = np.array([3, 2, 9, 3, 2**31 - 1, 0, 5, 5], dtype=dtype)
    if ids.dtype.itemsize == 8:
        ids[4] = 2**32 + 3
    given = as_jax(ids)
    with jax.enable_x64(x64):
        want = oracle.expected(ids, **OPTIONS)
        oracle.assert_same(aligner(implementation)(given), want)
        oracle.assert_same(aligner(implementation)(ids), want)
        oracle.assert_same(jax.jit(aligner(implementation))(given), want)
        sizes = maj.padded_group_sizes(aligner(implementation)(given), block_size=4)
    assert sizes.dtype == np.int32
    counts = maj.batched_moe_align_block_size(
        given, max_tokens_per_batch=6, block_size=4, implementation=implementation
    )
    want = oracle.align_batched(ids.tolist(), max_tokens_per_batch=6, block_size=4)
    oracle.assert_same(counts, want)
