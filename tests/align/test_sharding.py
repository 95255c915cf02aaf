"""shard_map and sharded inputs, over eight CPU devices and over Auto and Explicit meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from tests import oracle

OPTIONS = {"block_size": 4, "num_experts": 10, "return_inverse": True}
AXIS_TYPES = (AxisType.Auto, AxisType.Explicit)


@pytest.fixture(params=AXIS_TYPES, ids=lambda kind: kind.name)
def mesh(request):
    devices = jax.devices("cpu")
    assert len(devices) == 8, "conftest.py asks XLA for eight CPU devices"
    mesh = jax.make_mesh((8,), ("x",), axis_types=(request.param,), devices=devices)
    with jax.set_mesh(mesh):
        yield mesh


def host_ids(*shape):
    return np.random.default_rng(0).integers(-2, 12, shape).astype(np.int32)


def aligner(implementation="xla", **options):
    return functools.partial(
        maj.moe_align_block_size, implementation=implementation, **OPTIONS | options
    )


def part(result, shard, shards=8):
    return jax.tree.map(lambda x: np.asarray(x).reshape(shards, -1)[shard], result)


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("implementation", ["xla", "emulator"])
def test_shard_map_aligns_each_shard_alone(mesh, check_vma, implementation):
    ids = host_ids(8 * 30)
    function = jax.shard_map(
        aligner(implementation), mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=check_vma
    )
    got = jax.jit(function)(jax.device_put(ids, NamedSharding(mesh, P("x"))))
    for shard in range(8):
        want = oracle.expected(ids.reshape(8, 30)[shard], **OPTIONS)
        oracle.assert_same(part(got, shard), want)


@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map_with_replicated_operands(mesh, check_vma):
    """Sharded ids with a map and a count that do not vary, and the other way round."""
    ids = host_ids(8 * 30)
    expert_map = np.array([3, -1, 0, 5, -1, 2, 9, 1, -1, 4], np.int32)

    def function(ids, expert_map, count):
        return aligner(ignore_invalid_experts=True)(
            ids, expert_map=expert_map, num_valid_pairs=count
        )

    counts = np.arange(8, dtype=np.int32) * 5
    for specs in ((P("x"), P(), P()), (P(), P(), P("x")), (P("x"), P(), P("x"))):
        sharded = jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=P("x"), check_vma=check_vma
        )
        given = (ids, expert_map, counts if specs[2] else counts[3:4])
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(given, specs, strict=True)
        ]
        got = jax.jit(sharded)(*placed)
        for shard in range(8):
            mine = ids.reshape(8, 30)[shard] if specs[0] else ids
            count = int(counts[shard] if specs[2] else counts[3])
            want = oracle.align(
                mine.tolist(),
                expert_map=expert_map.tolist(),
                num_valid_pairs=count,
                ignore_invalid_experts=True,
                **OPTIONS,
            )
            oracle.assert_same(part(got, shard), want)


def test_shard_map_of_the_batched_form(mesh):
    counts = np.random.default_rng(1).integers(0, 8, 8 * 5).astype(np.int32)
    function = functools.partial(
        maj.batched_moe_align_block_size, max_tokens_per_batch=7, block_size=4
    )
    sharded = jax.shard_map(function, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    got = jax.jit(sharded)(jax.device_put(counts, NamedSharding(mesh, P("x"))))
    for shard in range(8):
        want = oracle.align_batched(
            counts.reshape(8, 5)[shard].tolist(), max_tokens_per_batch=7, block_size=4
        )
        oracle.assert_same(part(got, shard), want)


@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map_lowers_for_cuda(mesh, check_vma):
    function = jax.shard_map(
        aligner(None), mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=check_vma
    )
    ids = jax.device_put(host_ids(8 * 600), NamedSharding(mesh, P("x")))
    lowered = jax.jit(function).trace(ids).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "mosaic_gpu_v2" in text and "stablehlo.sort" not in text


@pytest.mark.parametrize("call", ["eager", "jit"])
@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P()])
def test_sharded_ids_under_plain_jit_give_the_global_result(mesh, spec, call):
    ids = host_ids(16, 8)
    function = jax.jit(aligner()) if call == "jit" else aligner()
    got = function(jax.device_put(ids, NamedSharding(mesh, spec)))
    oracle.assert_same(got, oracle.expected(ids, **OPTIONS))


@pytest.mark.parametrize("kind", AXIS_TYPES, ids=lambda kind: kind.name)
def test_sharded_ids_outside_a_mesh_context(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,), devices=jax.devices("cpu"))
    ids = host_ids(16, 8)
    given = jax.device_put(ids, NamedSharding(mesh, P("x")))
    oracle.assert_same(aligner()(given), oracle.expected(ids, **OPTIONS))
    oracle.assert_same(jax.jit(aligner())(given), oracle.expected(ids, **OPTIONS))


def test_two_axis_mesh_with_one_manual_axis():
    """shard_map over one axis of a mesh, the other left to the compiler."""
    mesh = jax.make_mesh(
        (4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")
    )
    ids = host_ids(4 * 30)
    function = jax.shard_map(
        aligner(), mesh=mesh, in_specs=P("x"), out_specs=P("x"), axis_names={"x"}
    )
    got = jax.jit(function)(jax.device_put(ids, NamedSharding(mesh, P("x"))))
    for shard in range(4):
        want = oracle.expected(ids.reshape(4, 30)[shard], **OPTIONS)
        oracle.assert_same(part(got, shard, 4), want)


@pytest.mark.gpu
@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("kind", AXIS_TYPES, ids=lambda kind: kind.name)
def test_shard_map_over_the_gpus(kind, check_vma):
    devices = jax.devices("cuda")
    count = len(devices)
    mesh = jax.make_mesh((count,), ("x",), axis_types=(kind,), devices=devices)
    ids = host_ids(count * 3000)
    with jax.set_mesh(mesh):
        function = jax.shard_map(
            aligner("mosaic_gpu"),
            mesh=mesh,
            in_specs=P("x"),
            out_specs=P("x"),
            check_vma=check_vma,
        )
        got = jax.jit(function)(jax.device_put(jnp.asarray(ids), NamedSharding(mesh, P("x"))))
    for shard in range(count):
        want = oracle.expected(ids.reshape(count, 3000)[shard], **OPTIONS)
        oracle.assert_same(part(got, shard, count), want)
