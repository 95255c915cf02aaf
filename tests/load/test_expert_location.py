"""ExpertLocation and to_physical_ids against plain loops, under every transformation."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax.types import HASH_MULTIPLIER
from tests import helpers
from tests.oracle import physical_ids as expected
from tests.oracle import replica_by_hash

L, EL, EP, D, K = 3, 10, 16, 4, 4
DISPATCHES = ("static", "dynamic", "round_robin")
SHARDED = P("x")


def random_map(seed=0, layers=L, experts=EL, slots=EP):
    rng = np.random.default_rng(seed)
    rows = [[*range(experts), *rng.integers(0, experts, slots - experts)] for _ in range(layers)]
    return np.array([rng.permutation(row) for row in rows])


def location_of(physical=None, dispatch="static"):
    physical = random_map() if physical is None else physical
    return maj.ExpertLocation.from_map(physical, EL, num_gpus=D, dispatch=dispatch)


LOCATION = location_of()


def random_ids(*shape, seed=1, low=-2, high=EL + 2):
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int32)


def check(got, ids, layer, dispatch, *, rank=0, location=LOCATION, shared=0, first_token=None):
    tokens = ids.size // ids.shape[-1] if ids.ndim > 1 else ids.size
    want = expected(
        ids,
        np.asarray(location.physical_to_logical_map)[layer],
        dispatch,
        first_token=rank * tokens if first_token is None else first_token,
        static=np.asarray(location.static_dispatch_map)[layer, rank],
        shared=shared,
    )
    assert got.dtype == np.int32
    np.testing.assert_array_equal(np.asarray(got), want)


# -- the location -----------------------------------------------------------------------------------------


def assert_invariants(location, num_gpus=None):
    physical, slots, count = (
        np.asarray(x)
        for x in (
            location.physical_to_logical_map,
            location.logical_to_physical_map,
            location.num_replicas,
        )
    )
    assert {x.dtype.name for x in (physical, slots, count)} == {"int32"}
    layers, experts, width = slots.shape
    assert width == physical.shape[1] - experts + 1 and physical.shape[0] == layers
    assert (count.sum(1) == physical.shape[1]).all()
    for layer in range(layers):
        for expert in range(experts):
            row = slots[layer, expert].tolist()
            n = count[layer, expert]
            assert sorted(row[:n]) == np.flatnonzero(physical[layer] == expert).tolist()
            assert row[n:] == [-1] * (width - n)


def test_trivial_location_replicates_the_first_experts():
    location = maj.ExpertLocation.trivial(2, 5, 8)
    assert location.physical_to_logical_map.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]] * 2
    assert_invariants(location)
    assert location.logical_to_physical_map[0, 1].tolist() == [1, 6, -1, -1]
    assert_invariants(maj.ExpertLocation.trivial(1, 4))
    sizes = location.num_layers, location.num_logical_experts, location.num_physical_experts
    assert sizes == (2, 5, 8) and location.layer(0).num_layers is None


def test_location_from_a_map_lists_slots_in_order():
    assert_invariants(LOCATION)
    for layer, row in enumerate(random_map()):
        for expert in range(EL):
            want = np.flatnonzero(row == expert).tolist()
            got = LOCATION.logical_to_physical_map[layer, expert].tolist()
            assert got[: len(want)] == want


@pytest.mark.parametrize("steps", [None, 4])
def test_location_from_counts_is_the_placement_of_eplb(steps):
    load = np.random.default_rng(0).poisson(9, (steps or 1, 2, 12))
    load = load if steps else load[0]
    sizes = {"num_groups": 4, "num_nodes": 2, "num_gpus": 8}
    location = maj.ExpertLocation.from_counts(load, num_physical_experts=16, **sizes)
    placed = maj.rebalance_experts(load, 16, **sizes)
    assert np.array_equal(location.physical_to_logical_map, placed.physical_to_logical_map)
    width = placed.logical_to_physical_map.shape[2]
    assert np.array_equal(location.logical_to_physical_map[..., :width], placed[1])
    assert_invariants(location)
    again = maj.ExpertLocation.from_counts(
        load, num_physical_experts=16, previous=location, **sizes
    )
    assert np.array_equal(again.physical_to_logical_map, location.physical_to_logical_map)


def test_static_map_is_local_where_it_can_be_and_fair_elsewhere():
    gpus, slots = 8, 24
    physical = random_map(3, 4, 10, slots)
    location = maj.ExpertLocation.from_map(physical, num_gpus=gpus, dispatch="static")
    static = np.asarray(location.static_dispatch_map)
    assert static.shape == (4, gpus, 10) and static.min() >= 0
    for layer in range(4):
        for expert in range(10):
            mine = np.flatnonzero(physical[layer] == expert)
            chosen = static[layer, :, expert]
            assert (physical[layer, chosen] == expert).all()
            remote = []
            for gpu in range(gpus):
                local = [p for p in mine if p // (slots // gpus) == gpu]
                assert chosen[gpu] == local[0] if local else True
                remote += [] if local else [int(chosen[gpu])]
            shares = [remote.count(p) for p in mine]
            assert max(shares) - min(shares) <= 1


def test_update_replaces_the_listed_layers_and_no_other():
    other = location_of(random_map(9))
    updated = LOCATION.update(other, [0, 2])
    for name in ("physical_to_logical_map", "logical_to_physical_map", "static_dispatch_map"):
        got, old, new = (np.asarray(getattr(x, name)) for x in (updated, LOCATION, other))
        assert np.array_equal(got[[0, 2]], new[[0, 2]]) and np.array_equal(got[1], old[1])
    assert_invariants(updated)
    assert np.array_equal(LOCATION.update(other, []).num_replicas, LOCATION.num_replicas)


def test_update_neither_traces_again_nor_leaves_its_devices():
    mesh = jax.make_mesh((8,), ("x",), devices=jax.devices("cpu"))
    here = jax.device_put(LOCATION, NamedSharding(mesh, P()))
    traces = []

    @jax.jit
    def step(location, ids):
        traces.append(None)
        return maj.to_physical_ids(ids, location, layer=1, dispatch="dynamic")

    ids = random_ids(20, K)
    check(step(here, ids), ids, 1, "dynamic")
    other = location_of(random_map(9))
    moved = here.update(other, [1])
    assert moved.num_replicas.sharding == here.num_replicas.sharding
    check(step(moved, ids), ids, 1, "dynamic", location=other)
    assert len(traces) == 1


def test_location_is_a_pytree_whose_dispatch_is_static():
    leaves, structure = jax.tree.flatten(LOCATION)
    assert len(leaves) == 5 and all(leaf.dtype == jnp.int32 for leaf in leaves)
    assert structure != jax.tree.structure(location_of(dispatch="round_robin"))
    again = jax.tree.unflatten(structure, leaves)
    assert again.dispatch == "static" and again.num_layers == L


# -- dispatch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("shape", [(37, K), (1, 1), (0, K), (5, 3, K), (29,)])
def test_ids_of_every_shape(dispatch, shape):
    ids = random_ids(*shape)
    got = maj.to_physical_ids(ids, LOCATION, layer=2, dispatch=dispatch, rank=0)
    check(got, ids, 2, dispatch)


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("rank", [3, np.int32(2)])
def test_each_rank_maps_its_own_tokens(dispatch, rank):
    ids = random_ids(33, K)
    got = maj.to_physical_ids(ids, LOCATION, layer=0, dispatch=dispatch, rank=rank)
    check(got, ids, 0, dispatch, rank=int(rank))


def test_location_says_its_dispatch():
    ids = random_ids(33, K)
    check(maj.to_physical_ids(ids, LOCATION, layer=0, rank=1), ids, 0, "static", rank=1)
    for dispatch in ("dynamic", "round_robin"):
        location = location_of(dispatch=dispatch)
        assert location.static_dispatch_map is None
        check(maj.to_physical_ids(ids, location, layer=0), ids, 0, dispatch)


@given(st.integers(-(2**31), 2**31 - 1), st.integers(1, 7))
def test_hash_wraps_as_written(first_token, count):
    physical = np.array([[0] * count + [1]])
    location = maj.ExpertLocation.from_map(physical).layer(0).for_rank(0, first_token=first_token)
    ids = np.zeros((9, 1), np.int32)
    got = maj.to_physical_ids(ids, location)
    want = [[replica_by_hash(first_token + t, count)] for t in range(9)]
    assert got.tolist() == want
    assert HASH_MULTIPLIER % 2**32 == 2654435761


@pytest.mark.parametrize("replicas", [2, 3, 5, 9])
@pytest.mark.parametrize("stride", [1, 2, 8])
def test_hash_spreads_tokens_evenly(replicas, stride):
    """Every stride-th token of a batch, as of an expert that only some tokens choose."""
    location = maj.ExpertLocation.from_map([[0] * replicas + [1]]).layer(0)
    ids = np.full((512, 1), 1)
    ids[::stride] = 0
    got = np.asarray(maj.to_physical_ids(ids, location))[::stride, 0]
    share = np.bincount(got, minlength=replicas)
    assert share.sum() == 512 // stride and share.max() - share.min() <= 8


def test_hash_spreads_one_token_each_of_many_ranks():
    """Decoding: without the rank, all of them would take the first replica."""
    location = maj.ExpertLocation.from_map([[0] * 4 + [1]]).layer(0)
    one = np.zeros((1, 1), np.int32)
    taken = jax.vmap(lambda rank: maj.to_physical_ids(one, location, rank=rank))(jnp.arange(32))
    assert min(np.bincount(taken.ravel(), minlength=4)) >= 7


def test_round_robin_is_exactly_even():
    location = maj.ExpertLocation.from_map([[0, 1, 0, 1, 0, 2]]).layer(0)
    ids = np.random.default_rng(0).integers(0, 3, (100, 2))
    share = np.bincount(
        np.asarray(maj.to_physical_ids(ids, location, dispatch="round_robin")).ravel()
    )
    assert max(share[[0, 2, 4]]) - min(share[[0, 2, 4]]) <= 1
    assert max(share[[1, 3]]) - min(share[[1, 3]]) <= 1
    assert share[5] == (ids == 2).sum()


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_shared_experts_are_left_alone(dispatch):
    ids = random_ids(20, K)
    ids[:, -2:] = [[77, -5]]
    got = maj.to_physical_ids(
        ids, LOCATION, layer=1, dispatch=dispatch, rank=0, num_fused_shared_experts=2
    )
    check(got, ids, 1, dispatch, shared=2)
    assert (np.asarray(got)[:, -2:] == [77, -5]).all()


@pytest.mark.parametrize("container", ["numpy", "jax"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64", "uint64"])
def test_ids_of_every_dtype_are_compared_before_they_are_narrowed(dtype, container):
    values = [0, 3, EL - 1, EL, 100, 2**31 + 3, 2**32 + 3, 2**63 + 3]
    info = np.iinfo(dtype)
    ids = np.array([[v if v <= info.max else info.min] for v in values], dtype)
    wide = jax.enable_x64(True) if container == "jax" else contextlib.nullcontext()
    given_ids = helpers.as_jax(ids) if container == "jax" else ids
    got = maj.to_physical_ids(given_ids, LOCATION, layer=1, dispatch="dynamic")
    want = np.array([[v if 0 <= v < EL else -1] for (v,) in ids.tolist()], np.int32)
    check(got, want, 1, "dynamic")
    with wide:
        check(
            maj.to_physical_ids(given_ids, LOCATION, layer=1, dispatch="dynamic"),
            want,
            1,
            "dynamic",
        )


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_under_jit_vmap_and_scan(dispatch):
    ids = random_ids(L, 21, K)

    def one(ids, location):
        return maj.to_physical_ids(ids, location, dispatch=dispatch, rank=1)

    def body(carry, part):
        return carry, one(*part)

    layer = jnp.int32(2)
    traced = jax.jit(
        lambda ids, layer: maj.to_physical_ids(
            ids, LOCATION, layer=layer, dispatch=dispatch, rank=jnp.int32(1)
        )
    )
    check(traced(ids[0], layer), ids[0], 2, dispatch, rank=1)
    _, scanned = jax.lax.scan(body, None, (ids, LOCATION))
    mapped = jax.vmap(one)(ids, LOCATION)
    for i in range(L):
        check(scanned[i], ids[i], i, dispatch, rank=1)
        check(mapped[i], ids[i], i, dispatch, rank=1)


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit), ids=lambda kind: kind.name)
@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_under_shard_map(dispatch, check_vma, kind):
    mesh = jax.make_mesh((D,), ("x",), axis_types=(kind,), devices=jax.devices("cpu")[:D])
    ids = random_ids(D, 21, K)

    def local(ids, location):
        rank = jax.lax.axis_index("x")
        return maj.to_physical_ids(ids[0], location, layer=0, dispatch=dispatch, rank=rank)[None]

    step = jax.shard_map(
        local, mesh=mesh, in_specs=(SHARDED, P()), out_specs=SHARDED, check_vma=check_vma
    )
    placed = jax.device_put(ids, NamedSharding(mesh, SHARDED))
    location = jax.device_put(LOCATION, NamedSharding(mesh, P()))
    got = jax.jit(step)(placed, location)
    for rank in range(D):
        check(np.asarray(got)[rank], ids[rank], 0, dispatch, rank=rank)


def test_mapped_ids_align_to_slots():
    """What the fused alignment must equal: the map first, then blocks of slots."""
    ids = random_ids(50, K)
    slots = maj.to_physical_ids(ids, LOCATION, layer=1, dispatch="dynamic")
    aligned = maj.moe_align_block_size(slots, block_size=8, num_experts=EP)
    want = expected(ids, random_map()[1], "dynamic")
    assert aligned.tokens_per_expert.tolist() == np.bincount(want[want >= 0], minlength=EP).tolist()


# -- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layer": None}, ValueError, "layer must be given"),
        ({"layer": 3}, ValueError, r"layer must be in \[0, 3\)"),
        ({"layer": -1}, ValueError, r"layer must be in \[0, 3\)"),
        ({"location": LOCATION.layer(0)}, ValueError, "layer must be left out"),
        ({"location": random_map()}, TypeError, "location must be an ExpertLocation"),
        ({"topk_ids": np.ones((2, 2))}, TypeError, "topk_ids must be an integer array"),
        ({"dispatch": "random"}, ValueError, "dispatch must be one of static"),
        ({"dispatch": "static"}, ValueError, "rank must be given"),
        ({"rank": 4}, ValueError, r"rank must be in \[0, 4\)"),
        (
            {"location": location_of(dispatch="dynamic"), "dispatch": "static", "rank": 0},
            ValueError,
            "hold a static_dispatch_map",
        ),
        ({"num_fused_shared_experts": 3}, ValueError, "at most the columns"),
        ({"num_fused_shared_experts": 1.0}, TypeError, "static Python int"),
    ],
)
def test_to_physical_ids_refuses(options, error, words):
    options = {
        **{"topk_ids": np.zeros((2, 2), int), "location": LOCATION},
        **{"layer": 0, "dispatch": "dynamic"},
    } | options
    ids, location = options.pop("topk_ids"), options.pop("location")
    with pytest.raises(error, match=words):
        maj.to_physical_ids(ids, location, **options)


@pytest.mark.parametrize(
    ("given_map", "options", "error", "words"),
    [
        ([[0, 1], [0]], {}, ValueError, "lists of different lengths"),
        ([[0.0, 1.0]], {}, TypeError, "be integers"),
        ([0, 1], {}, ValueError, "have shape"),
        (np.zeros((0, 4), int), {}, ValueError, "have shape"),
        ([[0, -1]], {}, ValueError, r"hold experts in \[0, 1\); got \[-1, 0\]"),
        ([[0, 1]], {"num_logical_experts": 1}, ValueError, "hold experts in"),
        ([[0, 1]], {"num_logical_experts": 3}, ValueError, "each of 3 experts a slot"),
        ([[0, 1, 1], [1, 1, 1]], {}, ValueError, "none for expert 0 in layer 1"),
        ([[0, 1, 1]], {"num_gpus": 2}, ValueError, "num_gpus must divide"),
        ([[0, 1]], {"dispatch": "static"}, ValueError, "num_gpus must be given"),
        ([[0, 1]], {"dispatch": "lp"}, ValueError, "dispatch must be one of"),
    ],
)
def test_from_map_refuses(given_map, options, error, words):
    with pytest.raises(error, match=words):
        maj.ExpertLocation.from_map(given_map, **options)


def test_trivial_and_update_refuse():
    with pytest.raises(ValueError, match="at least num_logical_experts"):
        maj.ExpertLocation.trivial(1, 4, 3)
    with pytest.raises(ValueError, match="other must have this location's sizes"):
        LOCATION.update(maj.ExpertLocation.trivial(L, EL, EP), [0])
    with pytest.raises(ValueError, match="layer_ids must be layers"):
        LOCATION.update(LOCATION, [3])
    with pytest.raises(ValueError, match="must have layers"):
        LOCATION.layer(0).layer(0)


# -- tokens that all GPUs see -----------------------------------------------------------------------------


def random_replicated(rng, dispatch):
    """(location, GPUs, ids): sizes and placement at random, also twins on one GPU."""
    gpus, per_gpu = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    slots = gpus * per_gpu
    experts = int(rng.integers(1, slots + 1))
    physical = random_map(int(rng.integers(1000)), 2, experts, slots)
    location = maj.ExpertLocation.from_map(
        physical, experts, num_gpus=gpus, dispatch=dispatch, tokens="replicated"
    )
    ids = rng.integers(-1, experts + 1, (11, 6)).astype(np.int32)
    return location, gpus, ids


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_each_pair_of_replicated_tokens_is_computed_by_one_gpu(dispatch):
    """Each GPU maps all tokens by itself and keeps the pairs whose slots it holds."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        location, gpus, ids = random_replicated(rng, dispatch)
        slots, experts = location.num_physical_experts, location.num_logical_experts
        per_gpu = slots // gpus
        held = np.asarray(location.physical_to_logical_map)[1]
        computed = np.zeros(ids.shape, int)
        for rank in range(gpus):
            local = np.full(slots, -1)
            local[rank * per_gpu : (rank + 1) * per_gpu] = np.arange(per_gpu)
            aligned = maj.moe_align_block_size(
                ids,
                block_size=4,
                num_experts=slots,
                expert_map=local,
                ignore_invalid_experts=True,
                return_inverse=True,
                expert_location=location.for_rank(rank),
                layer=1,
            )
            kept = np.asarray(aligned.row_of_pair).reshape(ids.shape) >= 0
            computed += kept
            mapped = np.asarray(maj.to_physical_ids(ids, location, layer=1, rank=rank))
            assert ((mapped // per_gpu == rank) == kept).all()
            assert (held[mapped[kept]] == ids[kept]).all()
        assert (computed == ((ids >= 0) & (ids < experts))).all()


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_replicated_tokens_use_all_replicas_evenly(dispatch):
    location = maj.ExpertLocation.from_map(
        [[0, 1, 0, 2, 0, 3, 0, 1]], num_gpus=4, dispatch=dispatch, tokens="replicated"
    )
    ids = np.zeros((400, 1), np.int32)
    got = np.asarray(maj.to_physical_ids(ids, location, layer=0, rank=3))
    share = np.bincount(got.ravel(), minlength=8)[[0, 2, 4, 6]]
    assert share.sum() == 400 and share.max() - share.min() <= 4


def test_replicated_static_is_the_hash_of_the_oracle():
    location = maj.ExpertLocation.from_map(random_map(), EL, dispatch="static", tokens="replicated")
    assert location.static_dispatch_map is None and location.tokens == "replicated"
    ids = random_ids(33, K)
    want = expected(ids, random_map()[1], "dynamic", first_token=0)
    for rank in (None, 0, 3, jnp.int32(2)):
        got = maj.to_physical_ids(ids, location, layer=1, rank=rank)
        np.testing.assert_array_equal(np.asarray(got), want)
    later = location.for_rank(2, first_token=70)
    want = expected(ids, random_map()[1], "dynamic", first_token=70)
    for rank in (None, 1):
        got = maj.to_physical_ids(ids, later, layer=1, rank=rank)
        np.testing.assert_array_equal(np.asarray(got), want)


def test_tokens_is_static_and_of_every_constructor(tmp_path):
    one = maj.ExpertLocation.trivial(1, 4, 8, tokens="replicated")
    counts = maj.ExpertLocation.from_counts(
        np.ones((1, 4)), num_physical_experts=8, num_gpus=2, tokens="replicated"
    )
    (tmp_path / "p.json").write_text('{"physical_to_logical_map": [[0, 1]]}')
    file = maj.ExpertLocation.from_file(tmp_path / "p.json", tokens="replicated")
    loads = maj.ExpertLocation.from_file(
        '{"logical_count": [[1, 2]]}', num_physical_experts=2, num_gpus=1, tokens="replicated"
    )
    for location in (one, counts, file, loads, one.layer(0), one.for_rank(1)):
        assert location.tokens == "replicated"
        leaves, structure = jax.tree.flatten(location)
        assert jax.tree.unflatten(structure, leaves).tokens == "replicated"
    other = maj.ExpertLocation.trivial(1, 4, 8)
    assert other.tokens == "per_rank"
    assert jax.tree.structure(one) != jax.tree.structure(other)
    with pytest.raises(ValueError, match="per_rank tokens for .* replicated tokens"):
        one.update(other, [0])
    with pytest.raises(ValueError, match="tokens must be one of per_rank, replicated"):
        maj.ExpertLocation.trivial(1, 4, tokens="both")


# -- a bool is no int, a float is no index ----------------------------------------------------------------


@pytest.mark.parametrize("bad", [True, np.True_, 1.0, np.float64(1.0), jnp.float32(1), "1", None])
@pytest.mark.parametrize(
    "call",
    [
        lambda bad: LOCATION.layer(bad),
        lambda bad: LOCATION.for_rank(bad),
        lambda bad: LOCATION.for_rank(0, first_token=bad),
        lambda bad: LOCATION.update(LOCATION, [bad]),
        lambda bad: maj.ExpertLocation.trivial(bad, 4),
        lambda bad: maj.ExpertLocation.trivial(1, bad),
        lambda bad: maj.plan_expert_moves([[0]], [[0]], num_gpus=1).layers([bad]),
    ],
    ids=["layer", "rank", "first_token", "update", "layers", "experts", "moves"],
)
def test_neither_bools_nor_floats_are_ints(call, bad):
    with pytest.raises(TypeError, match="must be"):
        call(bad)


@pytest.mark.parametrize("bad", [True, 1.0, np.True_])
def test_optional_sizes_are_ints(bad):
    ids = np.zeros((2, 2), int)
    for call in (
        lambda: maj.ExpertLocation.trivial(1, 1, bad),
        lambda: maj.ExpertLocation.from_map([[0, 1]], bad),
        lambda: maj.ExpertLocation.from_map([[0, 1]], num_gpus=bad),
        lambda: maj.to_physical_ids(ids, LOCATION, layer=bad, dispatch="dynamic"),
        lambda: maj.to_physical_ids(ids, LOCATION, layer=0, rank=bad),
        lambda: maj.plan_expert_moves([[0]], [[0]], num_gpus=1, old_num_gpus=bad),
        lambda: maj.rebalance_experts([[1]], 1, 1, 1, 1, previous=[[0]], previous_num_gpus=bad),
    ):
        with pytest.raises(TypeError, match="must be"):
            call()
    for call in (
        lambda: maj.ExpertLocation.trivial(1, 4, 0),
        lambda: maj.ExpertLocation.from_map([[0, 1]], 0),
    ):
        with pytest.raises(ValueError, match="must be at least 1; got 0"):
            call()


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([False, False, True], TypeError),
        (np.array([False, False, True]), TypeError),
        ([True, 2], TypeError),
        ([2.9], TypeError),
        (np.array([1.0]), TypeError),
        ([-1], ValueError),
        ([[0], [1, 2]], ValueError),
        (np.array([2**63], np.uint64), ValueError),
    ],
)
def test_layers_to_update_are_their_numbers(ids, error):
    other = location_of(random_map(9))
    moves = maj.plan_expert_moves(random_map(), random_map(9), num_gpus=D)
    with pytest.raises(error, match="^ExpertLocation.update: layer_ids must be"):
        LOCATION.update(other, ids)
    with pytest.raises(error, match="^ExpertMoves.layers: layer_ids must be"):
        moves.layers(ids)


def test_integers_of_every_kind_are_layers_and_ranks():
    want = np.asarray(LOCATION.physical_to_logical_map)[1]
    for one in (1, np.int64(1), np.uint8(1), np.array(1), jnp.int32(1)):
        assert np.array_equal(LOCATION.layer(one).physical_to_logical_map, want)
        row = LOCATION.for_rank(one).static_dispatch_map
        assert np.array_equal(row, np.asarray(LOCATION.static_dispatch_map)[:, 1])
    with pytest.raises(ValueError, match=r"layer must be in \[0, 3\); got 3"):
        LOCATION.layer(np.array(3))
    assert LOCATION.update(location_of(random_map(9)), ()).num_layers == L
    with pytest.raises(TypeError, match="other must be an ExpertLocation"):
        LOCATION.update(None, [0])
    with pytest.raises(ValueError, match="rank must be at least 0; got -1"):
        maj.ExpertLocation.trivial(1, 4).for_rank(-1)


def test_token_numbers_wrap_as_the_hash_does():
    location = maj.ExpertLocation.from_map([[0, 0, 0, 1]]).layer(0)
    ids = np.zeros((9, 1), np.int32)
    for first in (2**31 - 3, 2**40 + 5, -(2**35) - 1):
        got = maj.to_physical_ids(ids, location.for_rank(0, first_token=first))
        assert got.tolist() == [[replica_by_hash(first + t, 3)] for t in range(9)]
