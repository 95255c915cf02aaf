"""update_expert_weights on eight devices: every bit where the plan says, bounded memory, one compile."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax import expert_weights

D = 8


def mesh_of(kind=AxisType.Auto, shape=(D,), names=("ep",)):
    devices = jax.devices()
    if len(devices) < D:
        devices = jax.devices("cpu")
    types = (kind,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=types, devices=devices[: int(np.prod(shape))])


def random_maps(layers, experts, slots, seed=0):
    rng = np.random.default_rng(seed)

    def one():
        return rng.permutation([*range(experts), *rng.integers(0, experts, slots - experts)])

    return np.array([[one() for _ in range(layers)] for _ in range(2)])


def bits(*shape, dtype="float32", seed=0):
    """Every bit random: NaNs with their payloads, infinities and subnormals too."""
    size = np.dtype(dtype).itemsize
    data = np.random.default_rng(seed).integers(0, 256, (*shape, size)).astype(np.uint8)
    return data.view(dtype)[..., 0]


def as_bytes(array):
    return np.ascontiguousarray(np.asarray(array)).view(np.uint8)


def weights_by_map(physical, *shape, dtype="float32"):
    """Old weights in which two slots of one expert agree, as replicas do."""
    layers, experts = len(physical), int(physical.max()) + 1
    by_expert = bits(layers, experts, *shape, dtype=dtype)
    return by_expert[np.arange(layers)[:, None], physical], by_expert


def place(array, mesh, *spec):
    return jax.device_put(array, NamedSharding(mesh, P(None, "ep", *spec)))


# Sizes of SGLang's own test: experts, slots.
@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize(("experts", "slots"), [(2, 8), (5, 16), (20, 32), (256, 288)])
def test_weights_follow_the_placement(experts, slots, nodes):
    mesh = mesh_of()
    for seed in range(2):
        old, new = random_maps(3, experts, slots, seed)
        before, by_expert = weights_by_map(old, 5)
        moves = maj.plan_expert_moves(old, new, num_gpus=D, num_nodes=nodes)
        given = place(before, mesh)
        got = maj.update_expert_weights(given, moves, layers_per_chunk=2)
        assert got.sharding == given.sharding
        want = by_expert[np.arange(3)[:, None], new]
        np.testing.assert_array_equal(as_bytes(got), as_bytes(want))
        assert given.is_deleted()


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "uint32"]
)
def test_every_bit_of_every_dtype(dtype):
    dtype = getattr(ml_dtypes, dtype) if hasattr(ml_dtypes, dtype) else dtype
    old, new = random_maps(2, 12, 24, 3)
    before, by_expert = weights_by_map(old, 3, 2, dtype=dtype)
    moves = maj.plan_expert_moves(old, new, num_gpus=D)
    got = maj.update_expert_weights(place(before, mesh_of()), moves)
    want = by_expert[np.arange(2)[:, None], new]
    np.testing.assert_array_equal(as_bytes(got), as_bytes(want))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_pytree_over_a_mesh_of_two_axes(kind):
    """Expert-parallel over four, tensor-parallel over two: the other axis stays as it is."""
    mesh = mesh_of(kind, (4, 2), ("ep", "tp"))
    old, new = random_maps(3, 9, 12, 1)
    up, up_by_expert = weights_by_map(old, 4, 6)
    down, down_by_expert = weights_by_map(old, 6, dtype="int8")
    weights = {"up": place(up, mesh, None, "tp"), "scale": [place(down, mesh, "tp")]}
    moves = maj.plan_expert_moves(old, new, num_gpus=4, num_nodes=2)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, weights)
    got = maj.update_expert_weights(weights, moves, layers_per_chunk=3)
    each = np.arange(3)[:, None]
    np.testing.assert_array_equal(as_bytes(got["up"]), as_bytes(up_by_expert[each, new]))
    np.testing.assert_array_equal(as_bytes(got["scale"][0]), as_bytes(down_by_expert[each, new]))
    assert got["up"].sharding == shardings["up"] and got["up"].sharding.spec[3] == "tp"


def test_chunks_move_layer_by_layer_with_the_location():
    """After each chunk, the weights and the location updated for its layers agree."""
    mesh = mesh_of()
    old, new = random_maps(5, 12, 16, 4)
    new[2] = old[2]
    before, by_expert = weights_by_map(old, 2)
    weights = place(before, mesh)
    location, target = (maj.ExpertLocation.from_map(m, 12) for m in (old, new))
    moves = maj.plan_expert_moves(old, new, num_gpus=D)
    seen = []
    for now, layers in maj.update_expert_weights_by_chunks(weights, moves, layers_per_chunk=2):
        location = location.update(target, layers)
        held = np.asarray(location.physical_to_logical_map)
        want = by_expert[np.arange(5)[:, None], held]
        np.testing.assert_array_equal(as_bytes(now), as_bytes(want))
        seen.append(layers)
    assert seen == [[0, 1], [3, 4]]
    assert np.array_equal(location.physical_to_logical_map, new)


def test_a_plan_without_moves_touches_nothing():
    old, _ = random_maps(2, 12, 16)
    weights = place(bits(2, 16, 3), mesh_of())
    moves = maj.plan_expert_moves(old, old, num_gpus=D)
    assert maj.update_expert_weights(weights, moves) is weights
    assert list(maj.update_expert_weights_by_chunks(weights, moves)) == []


def test_another_placement_compiles_nothing():
    mesh = mesh_of()
    expert_weights._move_chunk.clear_cache()
    for seed in range(3):
        old, new = random_maps(5, 12, 16, seed)
        if seed == 2:
            new[1:] = old[1:]  # fewer layers than a chunk
        before, _ = weights_by_map(old, 2)
        moves = maj.plan_expert_moves(old, new, num_gpus=D)
        maj.update_expert_weights(place(before, mesh), moves, layers_per_chunk=2)
    assert expert_weights._move_chunk._cache_size() == 1


@pytest.mark.parametrize("chunk", [1, 4])
def test_extra_memory_is_one_chunk_and_the_weights_stay_in_place(chunk):
    mesh = mesh_of()
    layers, slots, width = 16, 32, 4096
    old, new = random_maps(layers, 24, slots)
    moves = maj.plan_expert_moves(old, new, num_gpus=D)
    weights = place(np.zeros((layers, slots, width), np.float32), mesh)
    routes = expert_weights._plan_routes(moves, list(range(chunk)), chunk)
    compiled = expert_weights._move_chunk.lower(
        weights, routes, mesh=mesh, spec=P(None, "ep", None), axis_name="ep"
    ).compile()
    memory = compiled.memory_analysis()
    expert = width * 4
    local = slots // D * expert
    assert memory.alias_size_in_bytes >= layers * local
    tables = sum(np.asarray(table).nbytes for table in routes)
    # The chunk, an expert on its way out and in, and what the loops keep.
    assert memory.temp_size_in_bytes <= chunk * local + 8 * expert + tables + 4096
    before = [shard.data.unsafe_buffer_pointer() for shard in weights.addressable_shards]
    got = maj.update_expert_weights(weights, moves, layers_per_chunk=chunk)
    assert before == [shard.data.unsafe_buffer_pointer() for shard in got.addressable_shards]


def test_no_collective_but_the_rings():
    """Nothing is gathered: each device holds its own part all the time."""
    mesh = mesh_of()
    old, new = random_maps(2, 12, 16)
    moves = maj.plan_expert_moves(old, new, num_gpus=D)
    routes = expert_weights._plan_routes(moves, [0], 1)
    text = (
        expert_weights._move_chunk.lower(
            place(bits(2, 16, 8), mesh), routes, mesh=mesh, spec=P(None, "ep"), axis_name="ep"
        )
        .compile()
        .as_text()
    )
    assert text.count(" collective-permute(") == D - 1
    assert "all-gather" not in text and "all-reduce" not in text and "all-to-all" not in text


@pytest.mark.parametrize(
    ("weights", "options", "error", "words"),
    [
        (np.zeros((1, 16, 2)), {}, TypeError, "weights must hold jax arrays with values"),
        (jnp.zeros((1, 16, 2)), {}, ValueError, "weights must be sharded over mesh axis 'ep'"),
        (jnp.zeros((2, 16, 2)), {}, ValueError, r"weights must have shape \[1, 16, \.\.\.\]"),
        (jnp.zeros(16), {}, ValueError, "weights must have shape"),
        ((P("ep"), (8, 16)), {}, ValueError, "weights must have shape"),
        ((P(None, None, "ep"), (1, 16, 8)), {}, ValueError, "split over 'ep' in dimension 1"),
        ((P(None, "ep"), (1, 16, 8)), {"axis_name": "x"}, ValueError, "over mesh axis 'x'"),
        ((P(None, "ep"), (1, 16, 8)), {"layers_per_chunk": 0}, ValueError, "at least 1"),
        ((P(None, "ep"), (1, 16, 8)), {"num_gpus": 4}, ValueError, "a plan for 4 GPUs"),
    ],
)
def test_what_does_not_fit_is_refused(weights, options, error, words):
    if isinstance(weights, tuple):
        spec, shape = weights
        weights = jax.device_put(np.zeros(shape, np.float32), NamedSharding(mesh_of(), spec))
    old, new = random_maps(1, 12, 16)
    moves = maj.plan_expert_moves(old, new, num_gpus=options.pop("num_gpus", D))
    with pytest.raises(error, match=f"update_expert_weights: .*{words}"):
        maj.update_expert_weights(weights, moves, **options)
    if isinstance(weights, jax.Array):
        assert not weights.is_deleted()


@pytest.mark.parametrize("moves", [None, (), {"kind": 1}, np.zeros((1, 16))])
def test_a_plan_is_an_expert_moves(moves):
    weights = place(np.zeros((1, 16, 8), np.float32), mesh_of())
    with pytest.raises(TypeError, match="update_expert_weights: moves must be an ExpertMoves"):
        maj.update_expert_weights(weights, moves)
    plan = maj.plan_expert_moves(np.zeros((1, 8), int), np.zeros((1, 16), int), num_gpus=D)
    with pytest.raises(ValueError, match="must be between placements of the same slots and GPUs"):
        maj.update_expert_weights(weights, plan)
    same = maj.plan_expert_moves(*random_maps(1, 12, 16), num_gpus=D)
    with pytest.raises(TypeError, match="axis_name must be the name of a mesh axis"):
        maj.update_expert_weights(weights, same, axis_name=None)
    with pytest.raises(TypeError, match="layers_per_chunk must be a static Python int"):
        maj.update_expert_weights(weights, same, layers_per_chunk=True)
    assert not weights.is_deleted()


@pytest.mark.gpu
def test_weights_follow_the_placement_on_gpus():
    devices = jax.devices("cuda")
    if len(devices) < 2:
        pytest.skip("needs two GPUs")
    mesh = jax.make_mesh((len(devices),), ("ep",), devices=devices)
    slots = 4 * len(devices)
    old, new = random_maps(6, slots - 2, slots)
    before, by_expert = weights_by_map(old, 64, 32, dtype=ml_dtypes.bfloat16)
    moves = maj.plan_expert_moves(old, new, num_gpus=len(devices))
    got = maj.update_expert_weights(place(before, mesh), moves, layers_per_chunk=4)
    want = by_expert[np.arange(6)[:, None], new]
    np.testing.assert_array_equal(as_bytes(got), as_bytes(want))


def test_an_array_in_several_places_is_moved_once_and_not_lost():
    mesh = mesh_of()
    old, new = random_maps(3, 10, 16)
    held, by_expert = weights_by_map(old, 4)
    array, other = place(held, mesh), place(held + 0, mesh)
    tree = {"tied": [array, array], "other": other, "again": array}
    moves = maj.plan_expert_moves(old, new, num_gpus=D)
    moved = maj.update_expert_weights(tree, moves, layers_per_chunk=2)
    want = by_expert[np.arange(3)[:, None], new]
    assert len(jax.tree.leaves(moved)) == 4
    for leaf in jax.tree.leaves(moved):
        assert (as_bytes(leaf) == as_bytes(want)).all()
    assert moved["tied"][0] is moved["tied"][1] is moved["again"] is not moved["other"]


def test_donated_weights_are_refused_before_others_move():
    mesh = mesh_of()
    old, new = random_maps(2, 10, 16)
    held, _ = weights_by_map(old, 4)
    tree = {"a": place(held, mesh), "b": place(held, mesh)}
    tree["b"].delete()
    moves = maj.plan_expert_moves(old, new, num_gpus=D)
    with pytest.raises(ValueError, match="weights must not be deleted; got float32 .* donated"):
        maj.update_expert_weights(tree, moves)
    assert (as_bytes(tree["a"]) == as_bytes(held)).all()
