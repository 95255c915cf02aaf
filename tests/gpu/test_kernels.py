"""The kernels on a real GPU: poisoned memory, many calls, the same bits every time."""

import functools
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from tests import forms, oracle

pytestmark = pytest.mark.gpu

POISON = 0x5A5A5A5A


def ids_of(size: forms.Size, seed: int = 0) -> np.ndarray:
    return forms.ids_of(size, seed).ravel()


def aligner(size: forms.Size, **options):
    return functools.partial(
        maj.moe_align_block_size,
        block_size=size.block_size,
        num_experts=size.num_experts,
        return_inverse=True,
        implementation="mosaic_gpu",
        **options,
    )


def want_of(size: forms.Size, ids: np.ndarray) -> oracle.Expected:
    return oracle.expected(
        ids, block_size=size.block_size, num_experts=size.num_experts, return_inverse=True
    )


def poison(shapes) -> set[int]:
    """Fills device memory with garbage, frees it, and returns where it was."""
    garbage = [jnp.full(shape, POISON, jnp.int32) for shape in (*shapes, *shapes)]
    garbage.append(jnp.full(1 << 22, POISON, jnp.int32))
    jax.block_until_ready(garbage)
    where = {array.unsafe_buffer_pointer() for array in garbage}
    for array in garbage:
        array.delete()
    return where


@pytest.mark.parametrize("call", ["eager", "jit"])
@pytest.mark.parametrize("size", forms.SIZES, ids=str)
def test_poisoned_outputs_are_all_written(size, call):
    """Every slot of every output is the kernels' own: nothing of what lay there before is left."""
    function = jax.jit(aligner(size)) if call == "jit" else aligner(size)
    shapes = [x.shape for x in function(ids_of(size))]  # compiled before memory is poisoned
    reused = 0
    for seed in range(4):
        ids = ids_of(size, seed)
        given = jax.device_put(ids)
        where = poison(shapes)
        got = function(given)
        reused += len(where & {field.unsafe_buffer_pointer() for field in got})
        oracle.assert_same(got, want_of(size, ids))
    assert reused, "no output lay in poisoned memory: this test shows nothing"


@pytest.mark.parametrize("size", forms.SIZES, ids=str)
def test_same_bits_over_50_runs(size):
    given = jax.device_put(ids_of(size))
    function = jax.jit(aligner(size))
    first = [np.asarray(field).tobytes() for field in function(given)]
    for _ in range(50):
        assert [np.asarray(field).tobytes() for field in function(given)] == first


@pytest.mark.parametrize("size", forms.SIZES, ids=str)
def test_calls_in_flight_do_not_touch_each_other(size):
    """Eighty calls queued without waiting, half of the results dropped at once, their memory reused."""
    function = jax.jit(aligner(size))
    inputs = [ids_of(size, seed) for seed in range(8)]
    placed = [jax.device_put(ids) for ids in inputs]
    kept = []
    for i in range(80):
        out = function(placed[i % 8])
        if i % 2 == 0:
            kept.append((i % 8, out))
        del out
    wants = {i: want_of(size, inputs[i]) for i in {i for i, _ in kept}}
    for i, out in kept:
        oracle.assert_same(out, wants[i])


@pytest.mark.parametrize("num_pairs", [8, 512, 8192])
def test_10000_calls_without_growth(num_pairs):
    size = forms.Size(num_pairs, 64, 64)
    function = jax.jit(aligner(size))
    given = jax.device_put(ids_of(size))
    device = next(iter(given.devices()))

    def run(calls):
        for _ in range(calls):
            out = function(given)
        jax.block_until_ready(out)
        return device.memory_stats()["bytes_in_use"], resource.getrusage(
            resource.RUSAGE_SELF
        ).ru_maxrss

    device_before, host_before = run(200)
    device_after, host_after = run(10_000)
    # The last results may still wait to be freed; a leak would be 256 bytes a call at least.
    assert device_after - device_before < 16 * 10_000
    assert host_after - host_before < 32 * 1024, "kB of host memory"


def test_batch_of_65535_fills_the_grid():
    ids = np.random.default_rng(0).integers(-1, 5, (65_535, 4)).astype(np.int32)
    function = functools.partial(
        maj.moe_align_block_size, block_size=2, num_experts=4, implementation="mosaic_gpu"
    )
    got = jax.jit(jax.vmap(function))(ids)
    want = np.stack([(ids == e).sum(1) for e in range(4)], axis=1)
    assert np.array_equal(got.tokens_per_expert, want)
    for i in (0, 1, 32_767, 65_534):
        one = jax.tree.map(lambda x, i=i: x[i], got)
        oracle.assert_same(one, oracle.expected(ids[i], block_size=2, num_experts=4))


def test_one_exported_program_runs_on_the_gpu_and_on_the_cpu():
    size = forms.Size(8192, 64, 128)
    function = functools.partial(maj.moe_align_block_size, block_size=128, num_experts=64)
    ids = ids_of(size)
    exported = jax.export.export(jax.jit(function), platforms=["cuda", "cpu"])(
        jax.ShapeDtypeStruct(ids.shape, ids.dtype)
    )
    again = jax.export.deserialize(exported.serialize())
    want = oracle.expected(ids, block_size=128, num_experts=64)
    for platform in ("cuda", "cpu"):
        got = again.call(jax.device_put(ids, jax.devices(platform)[0]))
        oracle.assert_same(got, want)


@pytest.mark.parametrize("num_pairs", [7, 500, 5000])
def test_capacity_at_the_int32_limit(num_pairs):
    """P = 2**31 - 1: no index of the fills may wrap. 8.6 GB of output, compared where it lies."""
    capacity = 2**31 - 1
    block_size = capacity - num_pairs + 1  # of one expert's only block
    aligned = jax.jit(
        functools.partial(
            maj.moe_align_block_size,
            block_size=block_size,
            num_experts=1,
            implementation="mosaic_gpu",
        )
    )(jnp.zeros(num_pairs, jnp.int32))
    rows = aligned.sorted_token_ids
    assert rows.shape == (capacity,)
    assert rows[:num_pairs].tolist() == list(range(num_pairs))
    assert int(jnp.max(rows[num_pairs:])) == int(jnp.min(rows[num_pairs:])) == num_pairs
    assert aligned.expert_ids.tolist() == [0, -1]
    assert aligned.num_tokens_post_padded.tolist() == [block_size]
