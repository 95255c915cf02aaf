"""Recording expert load: every mode against NumPy's bincount, the ring, shards, and what it costs."""

import contextlib
import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax import expert_load

LAYERS, EXPERTS, LOGICAL, TOKENS, TOP_K = 3, 10, 7, 12, 2
COUNTING = ("stat", "stat_approx", "per_pass")
MODES = (*COUNTING, "per_token")


def make(mode, *, mapped=False, **options):
    sizes = {"num_layers": LAYERS, "num_physical_experts": EXPERTS, "num_passes": 5}
    if mode == "per_token":
        sizes |= {"max_tokens": TOKENS, "top_k": TOP_K}
    if mapped:
        sizes["num_logical_experts"] = LOGICAL
    return maj.init_expert_load(mode, **sizes | {"recording": True} | options)


def random_ids(seed, tokens=TOKENS):
    """Ids with -1, below it, and past the last expert."""
    rng = np.random.default_rng(seed)
    return rng.integers(-3, EXPERTS + 3, (LAYERS, tokens, TOP_K)).astype(np.int32)


def random_map(seed):
    """Every logical expert once, some twice."""
    rng = np.random.default_rng(seed)
    slots = np.concatenate([np.arange(LOGICAL), np.arange(EXPERTS - LOGICAL)])
    return np.stack([rng.permutation(slots) for _ in range(LAYERS)]).astype(np.int32)


def bincount(ids):
    """`[L, E]`, by NumPy: ids out of range are left out."""
    return np.stack(
        [np.bincount(i[(i >= 0) & (i < EXPERTS)].ravel(), minlength=EXPERTS) for i in ids]
    )


def by_logical(counts, maps):
    out = np.zeros((LAYERS, LOGICAL), np.int64)
    for layer in range(LAYERS):
        for slot in range(EXPERTS):
            out[layer, maps[layer, slot]] += counts[layer, slot]
    return out


def align(ids, implementation="xla"):
    return maj.moe_align_block_size(
        ids, block_size=4, num_experts=EXPERTS, implementation=implementation
    ).tokens_per_expert


@functools.partial(jax.jit, donate_argnums=0)
def unrolled(load, ids, maps=None, forward_pass_id=None):
    for layer in range(LAYERS):
        load = maj.record_expert_load(load, layer, align(ids[layer]), topk_ids=ids[layer])
    return maj.commit_expert_load(
        load, physical_to_logical_map=maps, forward_pass_id=forward_pass_id
    )


@functools.partial(jax.jit, donate_argnums=0)
def scanned(load, ids, maps=None, forward_pass_id=None):
    _, counts = jax.lax.scan(lambda carry, ids: (carry, align(ids)), 0, ids)
    return maj.record_expert_load(
        load,
        None,
        counts,
        topk_ids=ids,
        physical_to_logical_map=maps,
        forward_pass_id=forward_pass_id,
    )


@functools.partial(jax.jit, donate_argnums=0)
def counted(load, ids, counts, maps=None, forward_pass_id=None):
    """Without an alignment: for tests of the ring, which then compile faster."""
    return maj.record_expert_load(
        load,
        None,
        counts,
        topk_ids=ids,
        physical_to_logical_map=maps,
        forward_pass_id=forward_pass_id,
    )


STEPS = [("stat", unrolled), ("per_token", unrolled), *((mode, scanned) for mode in MODES)]


@pytest.mark.parametrize(("mode", "step"), STEPS)
def test_counts_equal_bincount(mode, step):
    load, want = make(mode), []
    for seed, tokens in enumerate((TOKENS, 0, 5)):
        ids = random_ids(seed, tokens)
        want.append(bincount(ids))
        load = step(load, ids)
    record = maj.collect_expert_load(load)
    np.testing.assert_array_equal(record.physical_count, want)
    np.testing.assert_array_equal(record.logical_count, want)
    assert record.physical_count.dtype == np.int64 and record.physical_to_logical_map is None
    assert record.forward_pass_id.tolist() == [0, 1, 2]


@settings(max_examples=20)
@given(st.data())
def test_whole_pass_counts_are_the_sum_over_replicas(data):
    small = st.integers(-2, 2**31 - 1)
    counts = np.array(
        data.draw(st.lists(small, min_size=LAYERS * EXPERTS, max_size=LAYERS * EXPERTS))
    ).reshape(LAYERS, EXPERTS)
    maps = random_map(data.draw(st.integers(0, 99)))
    load = counted(make("stat", mapped=True), None, counts.astype(np.int32), maps)
    record = maj.collect_expert_load(load)
    np.testing.assert_array_equal(record.physical_count, np.maximum(counts, 0)[None])
    # Sums of int32 counts: exact beyond int32.
    np.testing.assert_array_equal(
        record.logical_count[0], by_logical(np.maximum(counts, 0).astype(object), maps).astype(int)
    )
    np.testing.assert_array_equal(record.physical_to_logical_map, maps[None])


def test_sums_beyond_int32_are_exact():
    load = make("stat", mapped=True)
    counts = np.full((LAYERS, EXPERTS), 2**31 - 1, np.int32)
    maps = np.zeros((LAYERS, EXPERTS), np.int32)
    for _ in range(5):
        load = maj.record_expert_load(load, None, counts, physical_to_logical_map=maps)
    logical = maj.collect_expert_load(load).logical_count
    assert logical.dtype == np.int64
    assert logical.sum(0)[:, 0].tolist() == [5 * EXPERTS * (2**31 - 1)] * LAYERS


def test_padded_rows_are_not_counted():
    ids = np.abs(random_ids(3)) % EXPERTS
    load = make("stat")
    for layer in range(LAYERS):
        counts = maj.moe_align_block_size(
            ids[layer], block_size=4, num_experts=EXPERTS, num_valid_pairs=7 * TOP_K
        ).tokens_per_expert
        load = maj.record_expert_load(load, layer, counts)
    record = maj.collect_expert_load(maj.commit_expert_load(load))
    np.testing.assert_array_equal(record.physical_count[0], bincount(ids[:, :7]))


def test_a_layer_recorded_twice_is_summed_and_a_missing_one_is_zero():
    first, second = random_ids(0), random_ids(1)
    load = make("stat")
    for ids in (first, second):
        load = maj.record_expert_load(load, 1, align(ids[1]))
    got = maj.collect_expert_load(maj.commit_expert_load(load)).physical_count[0]
    want = np.zeros_like(got)
    want[1] = bincount(first)[1] + bincount(second)[1]
    np.testing.assert_array_equal(got, want)


def test_micro_batches_of_a_layer_are_added_as_one_pass_counts():
    """Sums wrapped, so that the busiest expert had no tokens, and a negative count took from the other's."""
    most = 2**31 - 1
    load = make("stat")
    for counts in ([most, most, 5, -7, 4], [most, 1, -9, -7, 6], [1, 1, 3, 8, 0]):
        load = maj.record_expert_load(load, 1, np.array(counts + [0] * (EXPERTS - 5), np.int32))
    got = maj.collect_expert_load(maj.commit_expert_load(load)).physical_count[0, 1, :5]
    assert got.tolist() == [most, most, 8, 8, 10]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("passes", [0, 1, 4, 5, 6, 15, 17])
def test_ring_keeps_the_last_passes_in_order(mode, passes):
    load, ids = make(mode), [random_ids(seed) for seed in range(passes)]
    for one in ids:
        load = counted(load, one, bincount(one).astype(np.int32))
    record = maj.collect_expert_load(load)
    kept = range(max(0, passes - 5), passes)
    assert record.forward_pass_id.tolist() == list(kept)
    want = [bincount(ids[i]) for i in kept]
    np.testing.assert_array_equal(record.physical_count, np.reshape(want, (-1, LAYERS, EXPERTS)))


def test_per_token_keeps_the_ids_with_invalid_ones_as_minus_one():
    load = make("per_token")
    for seed, tokens in ((0, TOKENS), (1, 5), (2, 0)):
        load = counted(load, random_ids(seed, tokens), None)
    record = maj.collect_expert_load(load)
    assert record.topk_ids.shape == (3, 1, LAYERS, TOKENS, TOP_K)
    assert record.num_tokens.tolist() == [[TOKENS], [5], [0]]
    for seed, tokens in ((0, TOKENS), (1, 5)):
        ids = random_ids(seed, tokens)
        want = np.where((ids < 0) | (ids >= EXPERTS), -1, ids)
        np.testing.assert_array_equal(record.topk_ids[seed, 0, :, :tokens], want)
        assert (record.topk_ids[seed, 0, :, tokens:] == -1).all()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int64", "uint64"])
def test_wide_and_narrow_ids_keep_their_value(dtype):
    ids = np.array([[[0, 3], [9, 10], [11, 12]]] * LAYERS, dtype)
    want = np.array([[0, 3], [9, -1], [-1, -1]])
    if dtype == "int64":
        ids[:, 2] = [2**32 + 3, -(2**32) + 3]  # 3, if they were cut to 32 bits
    if dtype == "uint64":
        ids[:, 2] = [2**63 + 3, 2**32]
    load = maj.record_expert_load(make("per_token"), None, None, topk_ids=ids)
    got = maj.collect_expert_load(load).topk_ids[0, 0, :, :3]
    np.testing.assert_array_equal(got, [want] * LAYERS)


def test_attribution_follows_the_map_of_each_pass():
    load, want = make("stat", mapped=True), []
    for seed in range(7):
        ids, maps = random_ids(seed), random_map(seed // 3)  # the placement changes twice
        want.append(by_logical(bincount(ids), maps))
        load = counted(load, ids, bincount(ids).astype(np.int32), maps)
    record = maj.collect_expert_load(load)
    np.testing.assert_array_equal(record.logical_count, want[2:])
    wrong = [by_logical(c, random_map(2)) for c in record.physical_count]
    assert (np.array(wrong) != record.logical_count).any(), "the maps of this test do not differ"


def test_a_map_is_also_taken_from_an_object_that_has_it():
    class Location:
        physical_to_logical_map = random_map(5)

    ids = random_ids(5)
    load = maj.record_expert_load(
        make("stat", mapped=True), None, bincount(ids), physical_to_logical_map=Location()
    )
    want = by_logical(bincount(ids), Location.physical_to_logical_map)
    np.testing.assert_array_equal(maj.collect_expert_load(load).logical_count, want[None])


def test_start_and_stop_do_not_compile_again_and_stop_keeps_the_data():
    traces = []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(load, ids):
        traces.append(load)
        return maj.record_expert_load(load, None, jnp.stack([align(one) for one in ids]))

    load, want = make("stat", recording=False), []
    for seed in range(6):
        if seed in (1, 4):
            load = load.recording(True)
        if seed == 3:
            load = load.recording(False)
        load = step(load, random_ids(seed))
        if seed in (1, 2, 4, 5):
            want.append(bincount(random_ids(seed)))
        np.testing.assert_array_equal(
            maj.collect_expert_load(load).physical_count, np.reshape(want, (-1, LAYERS, EXPERTS))
        )
    load = step(load.cleared(), random_ids(9))
    got = maj.collect_expert_load(load)
    np.testing.assert_array_equal(got.physical_count, bincount(random_ids(9))[None])
    assert got.forward_pass_id.tolist() == [0] and len(traces) == 1


def test_given_pass_ids_place_the_rows():
    load = make("per_pass")
    for pass_id in (3, 4, 6, 7, 9, 2**31 - 1, 2**31, 2**31 + 3):
        ids = random_ids(pass_id % 97)
        load = counted(load, ids, bincount(ids).astype(np.int32), None, jnp.uint32(pass_id))
    record = maj.collect_expert_load(load)
    ids = record.forward_pass_id.tolist()
    assert set(ids) >= {2**31 - 1, 2**31, 2**31 + 3} and len(ids) <= 5
    for pass_id, count in zip(ids, record.physical_count, strict=True):
        np.testing.assert_array_equal(count, bincount(random_ids(pass_id % 97)))
    again = scanned(make("per_pass"), random_ids(0), None, jnp.int32(8))
    again = scanned(again, random_ids(1), None, jnp.int32(8))
    np.testing.assert_array_equal(
        maj.collect_expert_load(again).physical_count, bincount(random_ids(1))[None]
    )


def test_ids_that_share_a_factor_with_the_ring_or_are_equal_write_over_rows():
    """What docs/expert_load.md says of them: fewer passes, and the later of two equal ones."""
    one = np.ones((LAYERS, EXPERTS), np.int32)
    for stride, kept in ((1, 6), (2, 3), (4, 3), (5, 6), (6, 1)):
        load = make("stat", num_passes=6)
        ids = [stride * i for i in range(13)]
        for pass_id in ids:
            load = counted(load, None, one, None, np.int32(pass_id))
        assert maj.collect_expert_load(load).forward_pass_id.tolist() == ids[-kept:]
    for which in range(2):  # of two micro-batches: once with one id, once with their own
        load = make("stat", num_passes=6)
        for step, batch in np.ndindex(3, 2):
            pass_id = np.int32(2 * step + batch if which else step)
            load = counted(load, None, one * (1 + batch), None, pass_id)
        found = maj.collect_expert_load(load).physical_count[:, 0, 0].tolist()
        assert found == ([1, 2] * 3 if which else [2] * 3)
    twice = make("stat")
    for part in (one, 2 * one):
        for layer in range(LAYERS):
            twice = maj.record_expert_load(twice, layer, part[layer])
    twice = maj.commit_expert_load(twice, forward_pass_id=3)
    np.testing.assert_array_equal(maj.collect_expert_load(twice).physical_count, 3 * one[None])


def test_counted_passes_wrap_in_order():
    load = make("stat")
    control = np.array([[1, -6 + 1]], np.int32)  # the next pass is 2**31 - 3, recording
    load = dataclasses.replace(load, control=jnp.asarray(control))
    counts = [np.full((LAYERS, EXPERTS), i, np.int32) for i in range(5)]
    for one in counts:
        load = counted(load, None, one)
    record = maj.collect_expert_load(load)
    # 0 takes the row of 2**31 - 3: the ring keeps fewer passes this once, still in order.
    assert record.forward_pass_id.tolist() == [2**31 - 1, 0, 1]
    np.testing.assert_array_equal(record.physical_count, counts[2:])


# -- what it costs ----------------------------------------------------------------------------------


def test_without_a_mode_the_program_is_the_same_text():
    def forward(load, ids):
        counts = [align(ids[layer]) for layer in range(LAYERS)]
        if load is not None:
            for layer, one in enumerate(counts):
                load = maj.record_expert_load(load, layer, one, topk_ids=ids[layer])
            load = maj.commit_expert_load(load, forward_pass_id=3)
            load = maj.record_expert_load(load, None, counts)
        return counts, load

    ids = random_ids(0)
    off = maj.init_expert_load(None, num_layers=LAYERS, num_physical_experts=EXPERTS)
    assert jax.tree.leaves(off) == []
    recorded, bare = (jax.jit(forward).lower(load, ids) for load in (off, None))
    assert recorded.as_text() == bare.as_text()
    texts = [instructions(lowered.compile().as_text()) for lowered in (recorded, bare)]
    assert texts[0] == texts[1] and len(texts[0]) > 20
    on = jax.jit(forward).lower(make("stat"), ids)
    assert on.as_text() != bare.as_text()


def instructions(hlo):
    """The lines of compiled HLO without metadata: source lines and the like."""
    lines = [re.sub(r", metadata=\{[^}]*\}", "", line) for line in hlo.splitlines()]
    return [line for line in lines if " = " in line or line.startswith(("ENTRY", "%"))]


@pytest.mark.parametrize(
    ("mode", "step"), [("stat", unrolled), ("stat", scanned), ("per_token", scanned)]
)
def test_one_update_per_pass_in_the_donated_ring(mode, step):
    load = make(mode, mapped=True)
    arguments = (load, random_ids(0), random_map(0), np.int32(3))
    lowered = step.lower(*arguments)
    text = lowered.as_text()
    whole = f"tensor<{load.ring.shape[0]}x{load.ring.shape[1]}xi32>"
    updates = [x for x in text.splitlines() if "dynamic_update_slice" in x and whole in x]
    assert len(updates) == 1
    for banned in ("callback", "outfeed", "send", "infeed"):
        assert banned not in text
    compiled = lowered.compile().as_text()
    alias = re.search(r"input_output_alias=\{(.*?) \}, entry", compiled)
    assert alias, "nothing is donated"
    # the ring and the control words, each written into its own input
    assert re.findall(r"\{(\d)\}: \((\d), ", alias[1]) == [("0", "0"), ("1", "1")]


def test_the_control_words_change_where_the_state_counts_and_only_there():
    """The update of the counter is the second kernel: none with an id of the caller's."""
    for pass_id in (jnp.int32(3), None):
        step = functools.partial(counted.__wrapped__, forward_pass_id=pass_id)
        program = jax.make_jaxpr(step)(make("stat"), None, np.ones((LAYERS, EXPERTS), np.int32))
        given, left = program.jaxpr.invars[1], program.jaxpr.outvars[1]
        assert given.aval.shape == left.aval.shape == (1, 2)
        assert (given is left) == (pass_id is not None)


def test_beside_the_blocks_of_an_alignment_the_donated_state_keeps_its_buffers():
    """Their `[1]` counts must not take the buffer of a scalar of ours: that would cost a copy."""

    @functools.partial(jax.jit, donate_argnums=0)
    def forward(load, ids):
        found = maj.moe_align_block_size(ids, block_size=4, num_experts=EXPERTS)
        counts = jnp.tile(found.tokens_per_expert[None], (LAYERS, 1))
        return found, maj.record_expert_load(load, None, counts, forward_pass_id=np.int32(1))

    text = forward.lower(make("stat"), random_ids(0)[0]).compile().as_text()
    alias = re.search(r"input_output_alias=\{(.*?) \}, entry", text)[1]
    # outputs 0 to 3 are the blocks'
    assert re.findall(r"\{(\d)\}: \((\d), ", alias) == [("4", "0"), ("5", "1")]


# -- shards -----------------------------------------------------------------------------------------


PLATFORMS = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=PLATFORMS)
def devices(request):
    """Several of one platform: eight CPU devices, or all GPUs of the machine."""
    found = jax.devices(request.param)
    if len(found) < 2:
        pytest.skip(f"sharding needs two GPUs; there is {len(found)}")
    return found


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def mesh(request, devices):
    mesh = jax.make_mesh((len(devices),), ("ep",), axis_types=(request.param,), devices=devices)
    with jax.set_mesh(mesh):
        yield mesh


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("mode", ["stat", "per_token"])
def test_shards_record_for_themselves_and_are_summed(mesh, mode, check_vma):
    sharding = NamedSharding(mesh, P("ep"))
    load = make(mode, mapped=True, num_shards=mesh.size, sharding=sharding)

    traces = []

    def forward(load, ids, maps):
        traces.append(load)
        counts = jnp.stack([align(one, implementation=None) for one in ids])
        return maj.record_expert_load(
            load, None, counts, topk_ids=ids, physical_to_logical_map=maps
        )

    step = jax.jit(
        jax.shard_map(
            forward,
            mesh=mesh,
            in_specs=(P("ep"), P(None, "ep"), P()),
            out_specs=P("ep"),
            check_vma=check_vma,
        ),
        donate_argnums=0,
    )
    want = []
    for seed in range(7):
        ids, maps = random_ids(seed, tokens=mesh.size * TOKENS), random_map(seed)
        want.append(by_logical(bincount(ids), maps))
        placed = jax.device_put(ids, NamedSharding(mesh, P(None, "ep")))
        load = step(load, placed, jax.device_put(maps, NamedSharding(mesh, P())))
        load = load.recording(seed != 3)  # the pass with seed 4 is not recorded
    record = maj.collect_expert_load(load)
    np.testing.assert_array_equal(record.logical_count, [want[i] for i in (1, 2, 3, 5, 6)])
    assert load.ring.sharding.is_equivalent_to(sharding, 2) and len(traces) == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("context", [False, True])
def test_the_first_sharded_pass_is_traced_like_the_next(kind, context, devices):
    shards = len(devices)
    mesh = jax.make_mesh((shards,), ("ep",), axis_types=(kind,), devices=devices)
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        load = make("stat", num_shards=shards, sharding=NamedSharding(mesh, P("ep")))
        traces = []

        def forward(load, counts):
            traces.append(load)
            return maj.record_expert_load(load, None, counts)

        step = jax.jit(
            jax.shard_map(
                forward,
                mesh=mesh,
                in_specs=(P("ep"), P()),
                out_specs=P("ep"),
            ),
            donate_argnums=0,
        )
        for on in (True, False, True):
            load = step(load.recording(on).cleared(), COUNTS)
    assert len(traces) == 1
    assert maj.collect_expert_load(load).physical_count.tolist() == [(shards * COUNTS).tolist()]


def test_local_counts_of_all_tokens_equal_the_sum_of_global_counts(mesh):
    """The low-latency dispatch: a shard counts every token on its own experts."""
    experts = 16
    load = maj.init_expert_load(
        "stat",
        num_layers=LAYERS,
        num_physical_experts=experts,
        num_shards=mesh.size,
        local_experts=True,
        sharding=NamedSharding(mesh, P("ep")),
        recording=True,
    )
    ids = np.random.default_rng(0).integers(0, experts, (LAYERS, 50, TOP_K))
    counts = np.stack([np.bincount(one.ravel(), minlength=experts) for one in ids])

    def forward(load, mine):
        return maj.record_expert_load(load, None, mine)

    step = jax.shard_map(forward, mesh=mesh, in_specs=(P("ep"), P(None, "ep")), out_specs=P("ep"))
    placed = jax.device_put(counts.astype(np.int32), NamedSharding(mesh, P(None, "ep")))
    load = jax.jit(step, donate_argnums=0)(load, placed)
    np.testing.assert_array_equal(maj.collect_expert_load(load).physical_count, counts[None])


def test_shards_that_differ_are_an_error():
    load = make("stat", num_shards=2)
    ring = np.array(load.ring)
    ring[0, :2] = [4, 1]  # a pass that the other shard has not
    with pytest.raises(ValueError, match="the same passes on every shard"):
        maj.collect_expert_load(dataclasses.replace(load, ring=jnp.asarray(ring)))


# -- errors -----------------------------------------------------------------------------------------

COUNTS = np.ones((LAYERS, EXPERTS), np.int32)
BAD = {
    "mode": (ValueError, lambda: make("all"), "mode must be one of stat"),
    "size": (TypeError, lambda: make("stat", num_passes=2.0), "num_passes"),
    "zero": (ValueError, lambda: make("stat", num_layers=0), "num_layers must be at least 1"),
    "logical": (ValueError, lambda: make("stat", num_logical_experts=11), "at most num_physical"),
    "tokens": (TypeError, lambda: make("per_token", max_tokens=None), "max_tokens"),
    "huge": (ValueError, lambda: make("stat", num_passes=2**30), "num_passes must give a ring"),
    "local": (
        ValueError,
        lambda: make("stat", num_shards=3, local_experts=True),
        "divisible by num_shards",
    ),
    "floats": (
        TypeError,
        lambda: maj.record_expert_load(make("stat"), 0, np.ones(EXPERTS)),
        "tokens_per_expert must be an integer array; got float64",
    ),
    "shape": (
        ValueError,
        lambda: maj.record_expert_load(make("stat"), 0, np.ones(EXPERTS + 1, np.int32)),
        "have shape",
    ),
    "layers": (
        ValueError,
        lambda: maj.record_expert_load(make("stat"), None, COUNTS[:2]),
        "3 arrays",
    ),
    "list": (
        ValueError,
        lambda: maj.record_expert_load(make("stat"), None, list(COUNTS[:2])),
        "3 arrays",
    ),
    "layer": (ValueError, lambda: maj.record_expert_load(make("stat"), 3, COUNTS[0]), r"\[0, 3\)"),
    "bool": (
        TypeError,
        lambda: maj.record_expert_load(make("stat"), True, COUNTS[0]),
        "Python int",
    ),
    "no ids": (
        TypeError,
        lambda: maj.record_expert_load(make("per_token"), None, COUNTS),
        "topk_ids must be an integer array; got None",
    ),
    "too many": (
        ValueError,
        lambda: maj.record_expert_load(
            make("per_token"), None, None, topk_ids=random_ids(0, TOKENS + 1)
        ),
        "at most max_tokens = 12",
    ),
    "no map": (
        TypeError,
        lambda: maj.record_expert_load(make("stat", mapped=True), None, COUNTS),
        "physical_to_logical_map must be an integer array; got None",
    ),
    "map": (
        ValueError,
        lambda: maj.record_expert_load(
            make("stat", mapped=True), None, COUNTS, physical_to_logical_map=COUNTS[:1]
        ),
        "physical_to_logical_map must have shape",
    ),
    "map at a layer": (
        ValueError,
        lambda: maj.record_expert_load(
            make("stat", mapped=True), 0, COUNTS[0], physical_to_logical_map=COUNTS
        ),
        "Pass it to the commit",
    ),
    "id": (
        ValueError,
        lambda: maj.record_expert_load(
            make("stat"), None, COUNTS, forward_pass_id=np.arange(2, dtype=np.int32)
        ),
        "forward_pass_id must be a scalar",
    ),
    "pending": (
        ValueError,
        lambda: maj.record_expert_load(
            maj.record_expert_load(make("stat"), 0, COUNTS[0]), None, COUNTS
        ),
        "End the pass with commit_expert_load",
    ),
    "shards": (
        ValueError,
        lambda: maj.record_expert_load(make("stat", num_shards=2), None, COUNTS),
        "Record inside shard_map",
    ),
    "off": (
        ValueError,
        lambda: maj.collect_expert_load(
            maj.init_expert_load(None, num_layers=1, num_physical_experts=1)
        ),
        "have a recording mode",
    ),
    "off, for metrics": (
        ValueError,
        lambda: expert_load.last_physical_counts(
            maj.init_expert_load(None, num_layers=1, num_physical_experts=1), 1
        ),
        "metrics: load must have a recording mode",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_use_is_a_clear_error(name):
    kind, call, text = BAD[name]
    with pytest.raises(kind, match=text):
        call()


def test_a_traced_layer_says_what_to_do_under_scan():
    def body(load, layer):
        return maj.record_expert_load(load, layer, COUNTS[0]), None

    with pytest.raises(TypeError, match="Under lax.scan return the counts"):
        jax.lax.scan(body, make("stat"), jnp.arange(LAYERS))


def test_the_code_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (pathlib.Path(__file__).parents[2] / "docs" / "expert_load.md").read_text()
    step, recorder, moving, by_layer = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(step, names)
    assert names["record"].logical_count.shape == (3, 2, 8)
    for pass_id, counts in enumerate(names["record"].logical_count):
        ids = np.asarray(jax.random.randint(jax.random.key(pass_id), (2, 64, 2), 0, 8))
        for layer in range(2):
            assert counts[layer].tolist() == np.bincount(ids[layer].ravel(), minlength=8).tolist()
    exec(recorder, names)  # each block goes on where the one before it ends
    [file] = tmp_path.rglob("*.npz")
    assert file.parent.name == "dumps" and file == tmp_path / names["path"]
    with np.load(file) as dumped:
        recorded = dumped["logical_count"]
    assert recorded.shape == (5, 2, 8)
    for pass_id, counts in enumerate(recorded):
        ids = np.asarray(jax.random.randint(jax.random.key(pass_id), (2, 64, 2), 0, 8))
        for layer in range(2):
            assert counts[layer].tolist() == np.bincount(ids[layer].ravel(), minlength=8).tolist()

    def check_moved(held, before):
        slots = np.asarray(names["new"].physical_to_logical_map)
        want = names["experts"][np.arange(6)[:, None], slots].astype(np.float32)
        np.testing.assert_array_equal(held, want)
        np.testing.assert_array_equal(names["location"].physical_to_logical_map, slots)
        assert (slots != before).any(axis=1).all()
        return slots

    exec(moving, names)
    slots = check_moved(names["weights"]["up"], names["slots"])
    exec(by_layer, names)
    check_moved(np.stack([layer["up"] for layer in names["model"]]), slots)
    assert all(layer["up"].sharding.spec[0] == "ep" for layer in names["model"])


def test_recording_is_switched_inside_a_program():
    @jax.jit
    def run(load, on, counts):
        def draft(load):
            off = maj.record_expert_load(load.recording(False), None, counts + 100)
            return off.recording(True)

        load = jax.lax.cond(on, draft, lambda load: load.cleared(), load)
        return maj.record_expert_load(load, None, counts)

    load = make("stat")
    ones = jnp.ones((LAYERS, EXPERTS), jnp.int32)
    for on, counts in ((True, ones), (True, 2 * ones), (False, 3 * ones), (True, 4 * ones)):
        load = run(load, on, counts)
    assert maj.collect_expert_load(load).physical_count[:, 0, 0].tolist() == [3, 4]


def test_a_state_on_the_host_is_read_and_switched():
    """As `jax.device_get`, or a checkpoint, gives it."""
    counts = np.arange(LAYERS * EXPERTS, dtype=np.int32).reshape(LAYERS, EXPERTS)
    load = maj.record_expert_load(make("stat"), None, counts)
    load = jax.device_get(load)
    assert isinstance(load.ring, np.ndarray)
    record = maj.collect_expert_load(load)
    assert record.physical_count.tolist() == [counts.tolist()]
    passes, last = expert_load.last_physical_counts(load, 3)
    assert passes == 1 and last.tolist() == [counts.tolist()]
    load = maj.record_expert_load(load.recording(False), None, counts)
    assert len(maj.collect_expert_load(load).forward_pass_id) == 1
    assert not len(maj.collect_expert_load(jax.device_get(load).cleared()).forward_pass_id)


def test_a_traced_state_is_not_collected():
    words = "collect_expert_load: load must have values on its devices; got a state that jit traces"
    with pytest.raises(TypeError, match=words):
        jax.jit(lambda load: maj.collect_expert_load(load))(make("stat"))


def test_counts_and_ids_split_over_explicit_axes_are_recorded():
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Explicit,))
    ids = random_ids(0)
    counts = bincount(ids).astype(np.int32)
    with jax.set_mesh(mesh):
        load = make("stat")
        for layer in range(LAYERS):
            split = jax.device_put(counts[layer], NamedSharding(mesh, P("a")))
            load = maj.record_expert_load(load, layer, split)
        load = maj.commit_expert_load(load)
        split = jax.device_put(counts, NamedSharding(mesh, P(None, "a")))
        load = jax.jit(lambda load, x: maj.record_expert_load(load, None, x))(load, split)
        assert maj.collect_expert_load(load).physical_count.tolist() == [counts.tolist()] * 2
        sizes = {"num_layers": LAYERS, "num_physical_experts": EXPERTS}
        recorder = maj.ExpertDistributionRecorder("stat", **sizes)
        recorder.start_record()
        with recorder.with_forward_pass():
            for layer in range(LAYERS):
                with recorder.with_current_layer(layer):
                    split = jax.device_put(ids[layer], NamedSharding(mesh, P("a")))
                    recorder.on_select_experts(split)
        assert (recorder.dump_record("object")["physical_count"] == counts).all()
