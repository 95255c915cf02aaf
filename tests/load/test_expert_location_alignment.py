"""Logical ids in, blocks of physical slots out: the map by the oracle, then the alignment by the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax._align import kernels
from moe_align_jax._align import tables as _tuning
from moe_align_jax._align.tables import BlockAlignMosaicConfig
from moe_align_jax._simt import emulator
from moe_align_jax.types import AlignProblem
from tests import forms, oracle
from tests.align.test_lowering import ALLOWED, MOSAIC, assert_only_kernels, lower, operations
from tests.helpers import as_jax

L, EL, EP, D, K, BLOCK = 3, 10, 16, 4, 3, 4
FUSED = ("static", "dynamic")
DISPATCHES = (*FUSED, "round_robin")
OPTIONS = {"block_size": BLOCK, "num_experts": EP, "return_inverse": True}
FAR = 2**31 - 5  # a first token from which on token numbers wrap


def location_of(dispatch, seed=0, *, layers=L, logical=EL, slots=EP):
    rng = np.random.default_rng(seed)
    rows = [[*range(logical), *rng.integers(0, logical, slots - logical)] for _ in range(layers)]
    physical = np.array([rng.permutation(row) for row in rows])
    return maj.ExpertLocation.from_map(physical, logical, num_gpus=D, dispatch=dispatch)


def ids_of(*shape, seed=1, logical=EL):
    return np.random.default_rng(seed).integers(-2, logical + 3, shape).astype(np.int32)


def mapped(ids, location, layer, shared=0):
    """The slots of `ids`, by plain Python; `location` of all layers and of one GPU."""
    static = location.static_dispatch_map
    return oracle.physical_ids(
        ids,
        np.asarray(location.physical_to_logical_map)[layer],
        location.dispatch,
        first_token=int(np.asarray(location.first_token)[layer]),
        static=None if static is None else np.asarray(static)[layer],
        shared=shared,
    )


def check(got, ids, location, layer, shared=0, **options):
    slots = mapped(ids, location, layer, shared)
    oracle.assert_same(got, oracle.expected(slots, **OPTIONS | options))


def aligner(implementation, **options):
    return functools.partial(
        maj.moe_align_block_size, implementation=implementation, **OPTIONS | options
    )


def row(result, *index):
    return jax.tree.map(lambda x: np.asarray(x)[index], result)


def with_shared(ids, shared, slots=EP):
    """`ids` whose last columns are slots: also beyond the logical experts, and beyond all slots."""
    last = np.random.default_rng(9).integers(-2, slots + 3, ids.shape)
    return np.where(np.arange(K) >= K - shared, last, ids).astype(np.int32)


# -- every form of the kernels ------------------------------------------------------------------------

CONFIGS = {
    "warp": (30, {"num_ctas": 3}),
    "pairs": (96, {"num_ctas": 2}),
    "block": (300, {}),
    "grid": (360, {"num_ctas": 3}),
    "grid in tiles": (900, {"num_ctas": 3, "rounds": 2}),
    "grid sorted": (900, {"num_ctas": 4, "rounds": 2, "local_sort": True, "cluster": 4}),
    "cluster": (900, {"num_ctas": 4, "rounds": 2}),
    "sorted": (300, {"num_ctas": 2}),
    "sorted in a cluster": (900, {"num_ctas": 8, "cluster": 4}),
    "radix": (300, {"num_ctas": 2}),
}
# map, num_valid_pairs, words per id, layers, shared columns: each value of one with each of the next.
VARIANTS = (
    *(("", False, 1, 0, 0), ("label", True, 2, 0, 1), ("filter", False, 2, 3, 2)),
    *(("", True, 1, 3, K), ("filter", True, 1, 0, 0), ("label", False, 1, 3, 1)),
)


@pytest.mark.parametrize("dispatch", FUSED)
@pytest.mark.parametrize("which", CONFIGS)
def test_every_form_in_the_emulator(which, dispatch):
    num_pairs, sizes = CONFIGS[which]
    config = BlockAlignMosaicConfig(form=which.split()[0], num_warpgroups=1, **sizes)
    location = location_of(dispatch).for_rank(1, first_token=FAR)
    routed, expert_map = ids_of(num_pairs // K, K), oracle.local_map("any", EP, 0)
    for mode, valid, words, layers, shared in VARIANTS:
        layer = layers and 1
        ids = with_shared(routed, shared)
        problem = AlignProblem(
            num_pairs,
            EP,
            BLOCK,
            oracle.capacity(num_pairs, BLOCK, EP, False),
            words,
            mode,
            valid,
            return_inverse=True,
            dispatch=dispatch,
            num_logical=EL,
            replica_width=location.logical_to_physical_map.shape[-1],
            top_k=K,
            num_layers=layers,
            num_shared=shared,
        )
        tables = location if layers else row(location, slice(0, 1))
        names = ("static_dispatch_map", "logical_to_physical_map", "num_replicas", "first_token")
        operands = {name: getattr(tables, name) for name in names} | {
            "topk_ids": ids.astype(f"int{32 * words}").view(np.int32).reshape(-1, words),
            "layer": np.full(1, layer, np.int32),
            "expert_map": expert_map,
            "num_valid_pairs": np.full(1, num_pairs // 2, np.int32),
        }
        program = kernels.build(problem, config)
        given = [np.asarray(operands[n]).reshape(s) for n, s in problem.inputs.items()]
        result = emulator.run(program, given)
        want = oracle.align(
            mapped(ids, location, layer, shared).ravel(),
            expert_map=expert_map if mode else None,
            ignore_invalid_experts=mode == "filter",
            num_valid_pairs=num_pairs // 2 if valid else None,
            **OPTIONS,
        )
        oracle.assert_same(oracle.Expected(*result), want)


# -- the function -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dispatch", "num_tokens"), [("static", 100), ("dynamic", 1000)])
def test_a_layer_of_all_or_one_by_itself(implementation, dispatch, num_tokens):
    location = location_of(dispatch).for_rank(2, first_token=FAR)
    ids = ids_of(num_tokens, K)
    align = aligner(implementation)
    check(align(ids, expert_location=location, layer=2), ids, location, 2)
    check(align(ids, expert_location=location.layer(1)), ids, location, 1)
    given = jnp.asarray(ids)
    check(align(given, expert_location=location, layer=jnp.int32(0)), ids, location, 0)


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("shared", [1, K])
def test_shared_experts_are_left_alone(implementation, dispatch, shared):
    """Their slots may be among the location's, or behind them; `to_physical_ids` does the same."""
    location = location_of(dispatch).for_rank(2, first_token=FAR)
    for slots in (EP, EP + 2):
        ids = with_shared(ids_of(60, K), shared, slots)
        align = aligner(implementation, num_experts=slots, num_fused_shared_experts=shared)
        got = align(ids, expert_location=location, layer=2)
        check(got, ids, location, 2, shared, num_experts=slots)
        beyond = np.asarray(got.tokens_per_expert)[EL:].sum()
        assert beyond >= (np.isin(ids[:, K - shared :], np.arange(EL, slots))).sum() > 0
        wide = ids.astype(np.int64) + (ids == slots - 1) * 2**32
        narrow = np.where(wide == ids, ids, -1)
        got = align(wide, expert_location=location.layer(1))
        check(got, narrow, location, 1, shared, num_experts=slots)
        apart = maj.to_physical_ids(ids, location, layer=2, num_fused_shared_experts=shared)
        np.testing.assert_array_equal(apart, mapped(ids, location, 2, shared))


def test_more_experts_than_histograms_hold(implementation):
    location = location_of("dynamic", layers=2, logical=5000, slots=5004)
    ids = ids_of(140, 2, logical=5000)
    got = aligner(implementation, num_experts=5004)(ids, expert_location=location, layer=1)
    check(got, ids, location, 1, num_experts=5004)


SHAPES = [(), (7,), (1, 1), (2, 3, 4), (0,), (0, 3), (5, 0)]


@pytest.mark.parametrize(
    ("dispatch", "shape"),
    [*(("dynamic", shape) for shape in SHAPES), ("static", (2, 3, 4)), ("static", (0, 3))]
    + [("round_robin", shape) for shape in ((), (7,), (0,), (5, 0))],
)
def test_ids_of_every_shape(dispatch, shape):
    location, ids = location_of(dispatch).for_rank(3), np.array(ids_of(*shape))
    got = aligner("emulator")(ids, expert_location=location.layer(1))
    check(got, ids, location, 1)


@pytest.mark.parametrize(
    ("dispatch", "mode"), [("static", "filter"), ("dynamic", "label"), ("round_robin", "filter")]
)
def test_with_all_options(implementation, dispatch, mode):
    """The expert map is of slots: it comes after the location's."""
    location, ids = location_of(dispatch).for_rank(1), ids_of(60, K)
    options = {
        "expert_map": oracle.local_map("second", EP, 0),
        "ignore_invalid_experts": mode == "filter",
        "num_valid_pairs": 100,
        "pad_sorted_ids": True,
    }
    got = aligner(implementation)(ids, expert_location=location, layer=1, **options)
    check(got, ids, location, 1, **options)


@pytest.mark.parametrize(
    ("dtype", "container", "dispatch"),
    [
        *(("int8", "jax", "dynamic"), ("uint32", "jax", "static"), ("int64", "jax", "round_robin")),
        *(
            ("int64", "jax", "dynamic"),
            ("uint64", "numpy", "dynamic"),
            ("int64", "numpy", "static"),
        ),
        ("uint64", "jax", "static"),
    ],
)
def test_ids_are_compared_before_they_are_narrowed(dtype, container, dispatch):
    size = {"num_tokens": 50, "top_k": K, "num_experts": EL, "dtype": dtype, "seed": 5}
    ids, location = oracle.route("outside", **size), location_of(dispatch).for_rank(0)
    given = as_jax(ids) if container == "jax" else ids
    with jax.enable_x64(dtype == "int64"):
        check(aligner("emulator")(given, expert_location=location, layer=1), ids, location, 1)
    if dispatch == "dynamic":
        check(aligner("xla")(given, expert_location=location, layer=1), ids, location, 1)


def test_a_location_made_of_numpy_or_of_wide_integers():
    ids = ids_of(20, K)
    for dispatch in FUSED:
        location = location_of(dispatch).for_rank(0)
        host = jax.tree.map(np.asarray, location)
        check(aligner("emulator")(ids, expert_location=host.layer(2)), ids, location, 2)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: jnp.asarray(x).astype("int64"), location)
            got = aligner("emulator")(ids, expert_location=wide, layer=jnp.int64(1))
            check(got, ids, location, 1)


def test_tables_of_nonsense_are_read_within_bounds(implementation):
    """Whatever is in the arrays: the result is that of the map and the alignment, one after the other."""
    location, ids = location_of("dynamic"), ids_of(70, K)
    rng = np.random.default_rng(0)
    counts = rng.choice([-(2**31), -5, 0, 1, 7, 8, 2**16, 2**31 - 1], (L, EL)).astype(np.int32)
    slots = rng.integers(-3, EP + 3, location.logical_to_physical_map.shape).astype(np.int32)
    slots[0, 0, 0] = 2**31 - 1
    broken = jax.tree.map(lambda x: x, location)
    object.__setattr__(broken, "num_replicas", jnp.asarray(counts))
    object.__setattr__(broken, "logical_to_physical_map", jnp.asarray(slots))
    for layer in (0, 2):
        got = aligner(implementation)(ids, expert_location=broken, layer=layer)
        physical = np.asarray(maj.to_physical_ids(ids, broken, layer=layer))
        oracle.assert_same(got, oracle.expected(physical, **OPTIONS))
    beyond = aligner(implementation)(ids, expert_location=location, layer=jnp.int32(99))
    check(beyond, ids, location, L - 1)


# -- an update compiles nothing ------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", FUSED)
def test_update_compiles_nothing(implementation, dispatch):
    traces = []

    @jax.jit
    def step(ids, location, layer):
        traces.append(None)
        return aligner(implementation)(ids, expert_location=location, layer=layer)

    ids = ids_of(30, K)
    location = jax.device_put(location_of(dispatch).for_rank(1))
    check(step(ids, location, jnp.int32(1)), ids, location, 1)
    other = location.update(location_of(dispatch, seed=7).for_rank(1, first_token=77), [1, 2])
    assert not np.array_equal(other.physical_to_logical_map[1], location.physical_to_logical_map[1])
    for layer in range(L):
        check(step(ids, other, jnp.int32(layer)), ids, other, layer)
    assert len(traces) == step._cache_size() == 1


def test_no_location_leaves_nothing_of_it_in_the_program():
    """And its layers share one program, whichever way they are numbered."""
    size = forms.Size(512, EP, 16)
    plain = forms.problem(size, forms.OPTIONS[0])
    assert plain == plain._replace(**forms.location_sizes(size, ""))
    assert list(plain.inputs) == ["topk_ids"]


def problem_of(**options):
    """What is compiled for `[5, K]` ids with static dispatch."""
    location = location_of("static").for_rank(0)
    program = jax.make_jaxpr(aligner("xla", expert_location=location, layer=0, **options))
    todo = [program(ids_of(5, K)).jaxpr]
    for jaxpr in todo:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "moe_align_block_size":
                return equation.params["problem"]
            todo += [x.jaxpr for x in equation.params.values() if hasattr(x, "jaxpr")]
    raise AssertionError("no alignment in the program")


def test_no_shared_experts_leave_nothing_of_them_in_the_program():
    plain = problem_of()
    assert plain == problem_of(num_fused_shared_experts=0)
    assert (plain.num_shared, plain.top_k) == (0, 1)
    assert problem_of(num_fused_shared_experts=2) == plain._replace(num_shared=2, top_k=K)


# -- transformations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", FUSED)
def test_scan(implementation, dispatch):
    """Over the location, or over ids alone, with the number of the layer."""
    location, ids = location_of(dispatch).for_rank(1, first_token=5), ids_of(L, 21, K)
    align = aligner(implementation)

    def over_layers(_, part):
        ids, location = part
        return None, align(ids, expert_location=location)

    def numbered(layer, ids):
        return layer + 1, align(ids, expert_location=location, layer=layer)

    if dispatch == "static":
        _, got = jax.lax.scan(over_layers, None, (ids, location))
    else:
        _, got = jax.jit(lambda ids: jax.lax.scan(numbered, jnp.int32(0), ids))(ids)
    for i in range(L):
        check(row(got, i), ids[i], location, i)


IDS, LOCATION, LAYER = 1, 2, 4  # what is batched


@pytest.mark.parametrize(
    ("dispatch", "which"),
    [
        *(("dynamic", IDS), ("dynamic", LOCATION), ("dynamic", LAYER)),
        ("static", IDS + LOCATION + LAYER),
    ],
)
def test_vmap_of_any_of_the_arguments(implementation, dispatch, which):
    locations = [location_of(dispatch, seed).for_rank(1, first_token=seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *locations)
    ids, layers = ids_of(2, 25, K), np.array([2, 1])

    def function(ids, location, layer):
        return aligner(implementation)(ids, expert_location=location, layer=layer)

    pairs = ((ids, ids[0]), (stacked, locations[0]), (layers, layers[0]))
    axes = tuple(0 if which & bit else None for bit in (IDS, LOCATION, LAYER))
    given = [batch if axis == 0 else one for axis, (batch, one) in zip(axes, pairs, strict=True)]
    got = jax.jit(jax.vmap(function, in_axes=axes))(*given)
    for i in range(2):
        a, b, c = (i if axis == 0 else 0 for axis in axes)
        check(row(got, i), ids[a], locations[b], int(layers[c]))


def test_vmap_two_deep_over_layers(implementation):
    location, ids = location_of("dynamic").for_rank(1), ids_of(2, L, 25, K)

    def function(ids, location):
        return aligner(implementation)(ids, expert_location=location)

    got = jax.jit(jax.vmap(jax.vmap(function), in_axes=(0, None)))(ids, location)
    for i, layer in np.ndindex(2, L):
        check(row(got, i, layer), ids[i, layer], location, layer)


def test_gradient_of_the_code_around_it(implementation):
    location, ids = location_of("dynamic").for_rank(1), ids_of(12, K)
    scale = np.random.default_rng(2).normal(size=EP).astype(np.float32)

    @jax.checkpoint
    def loss(scale, location):
        """The scale of its slot, over all pairs, through the blocks."""
        out = aligner(implementation)(ids, expert_location=location, layer=1)
        rows = jnp.repeat(out.expert_ids, BLOCK, total_repeat_length=out.sorted_token_ids.size)
        real = out.sorted_token_ids < ids.size
        return jnp.where(real, scale[rows] ** 2, 0.0).sum()

    got = jax.jit(jax.grad(loss))(scale, location)
    slots = mapped(ids, location, 1)
    np.testing.assert_allclose(
        got, 2 * scale * np.bincount(slots[slots >= 0], minlength=EP), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("dispatch", "kind"),
    [("static", "Auto"), ("dynamic", "Explicit")],
)
def test_each_rank_under_shard_map(dispatch, kind):
    mesh = jax.make_mesh((D,), ("x",), axis_types=(AxisType[kind],), devices=jax.devices("cpu")[:D])
    ids, location = ids_of(D, 21, K), location_of(dispatch)

    def local(ids, location):
        rank = jax.lax.axis_index("x")
        mine = location.for_rank(rank, first_token=rank * ids.shape[1])
        return jax.tree.map(
            lambda x: x[None], aligner("xla")(ids[0], expert_location=mine, layer=2)
        )

    placed = jax.device_put(ids, NamedSharding(mesh, P("x")))
    step = jax.shard_map(local, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    got = jax.jit(step)(placed, jax.device_put(location, NamedSharding(mesh, P())))
    for rank in range(D):
        mine = location.for_rank(rank, first_token=rank * 21)
        check(row(got, rank), ids[rank], mine, 2)


# -- the program for a GPU: kernels and nothing else -----------------------------------------------------


def shapes_of(size, dispatch):
    """A location of `size.num_experts` slots, as shapes."""
    logical = forms.location_sizes(size, "static")["num_logical"]
    slots, width = size.num_experts, size.num_experts - logical + 1
    shapes = ((L, slots), (L, logical, width), (L, logical), (L, logical), (L,))
    return maj.ExpertLocation(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in shapes), dispatch)


FORMS = {size.form: size for size in forms.SIZES if size.num_pairs < 20_000}


@pytest.mark.parametrize(
    ("size", "dispatch"),
    [(size, FUSED[i % 2]) for i, size in enumerate(FORMS.values())],
    ids=str,
)
def test_cuda_program_has_no_kernel_more(size, dispatch):
    def align(ids, location=None, layer=None, shared=0):
        return maj.moe_align_block_size(
            ids,
            num_fused_shared_experts=shared,
            block_size=size.block_size,
            num_experts=size.num_experts,
            expert_location=location,
            layer=layer,
        )

    location, scalar = shapes_of(size, dispatch), jax.ShapeDtypeStruct((), jnp.int32)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), location)
    ids = jax.ShapeDtypeStruct((size.num_pairs, 1), jnp.int32)
    plain = assert_only_kernels(lower(align, ids))
    shared = functools.partial(align, shared=1)
    assert assert_only_kernels(lower(shared, ids, location, scalar)) == plain
    assert assert_only_kernels(lower(align, ids, location, scalar)) == plain
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((5, *x.shape), x.dtype), (ids, one))
    assert assert_only_kernels(lower(jax.vmap(align), *batch)) == plain
    numbered = lower(lambda ids, loc: [align(ids, loc, i) for i in range(L)], ids, location)
    assert operations(numbered)[f"custom_call {MOSAIC}"] == plain  # of one function, called thrice


def test_replicated_static_compiles_the_program_of_dynamic():
    """For CUDA, text by text: no kernel is other than before."""
    ids = ids_of(64, K)

    def text(dispatch, tokens):
        rows = np.tile(np.arange(EP) % EL, (L, 1))
        location = maj.ExpertLocation.from_map(
            rows, EL, num_gpus=D, dispatch=dispatch, tokens=tokens
        )
        align = aligner("mosaic_gpu")
        program = lower(lambda i, loc: align(i, expert_location=loc, layer=1), ids, location)
        assert_only_kernels(program)
        return program.as_text()

    assert text("static", "replicated") == text("dynamic", "per_rank")
    assert text("dynamic", "replicated") == text("dynamic", "per_rank")


def test_round_robin_costs_what_the_docstring_says():
    """The guard of the test above: a map before the alignment shows."""
    location = shapes_of(forms.Size(600, 64, 16), "round_robin")
    align = functools.partial(maj.moe_align_block_size, block_size=16, num_experts=64)
    ids = jax.ShapeDtypeStruct((600, 1), jnp.int32)
    program = lower(lambda ids, loc: align(ids, expert_location=loc, layer=1), ids, location)
    counts = operations(program)
    plain = operations(lower(align, ids))[f"custom_call {MOSAIC}"]
    assert counts[f"custom_call {MOSAIC}"] > plain and not set(counts) <= ALLOWED


# -- errors -----------------------------------------------------------------------------------------------

STATIC, DYNAMIC = location_of("static"), location_of("dynamic")
UNMADE = maj.ExpertLocation.from_map(np.arange(EP)[None] % EL, EL)
object.__setattr__(UNMADE, "dispatch", "static")
REFUSED = [
    (dict(expert_location=np.zeros(3)), TypeError, "expert_location must be an ExpertLocation"),
    (dict(expert_location=DYNAMIC), ValueError, "layer must be given; got None"),
    (dict(expert_location=DYNAMIC, layer=L), ValueError, r"layer must be in \[0, 3\); got 3"),
    (dict(expert_location=DYNAMIC, layer=-1), ValueError, r"layer must be in \[0, 3\); got -1"),
    (dict(expert_location=DYNAMIC, layer=1.0), TypeError, "layer must be an integer array"),
    (dict(expert_location=DYNAMIC, layer=True), TypeError, "layer must be an integer array"),
    (dict(expert_location=DYNAMIC, layer=np.zeros(2, int)), ValueError, "layer must be a scalar"),
    (
        dict(expert_location=DYNAMIC.layer(0), layer=0),
        ValueError,
        "layer must be left out; got int",
    ),
    (
        dict(num_fused_shared_experts=1),
        ValueError,
        "num_fused_shared_experts must be left out; got int 1. They are columns that an",
    ),
    (
        dict(expert_location=DYNAMIC.layer(0), num_fused_shared_experts=K + 1),
        ValueError,
        r"num_fused_shared_experts must be at most the columns of topk_ids; got int 4 for ids \[",
    ),
    (
        dict(expert_location=DYNAMIC.layer(0), num_fused_shared_experts=-1),
        ValueError,
        "num_fused_shared_experts must be at most the columns of topk_ids",
    ),
    (
        dict(expert_location=DYNAMIC.layer(0), num_fused_shared_experts=True),
        TypeError,
        "num_fused_shared_experts must be a static Python int",
    ),
    (
        dict(expert_location=DYNAMIC.layer(0), num_experts=EP - 1, num_fused_shared_experts=1),
        ValueError,
        r"the location's num_physical_experts \(16\), or more for those of shared experts; got 15",
    ),
    (
        dict(expert_location=DYNAMIC.layer(0), num_experts=EP + 1),
        ValueError,
        r"be the location's num_physical_experts \(16\); got 17",
    ),
    (dict(layer=0), ValueError, "layer must be left out; got int 0. It is the layer of an expert"),
    (
        dict(expert_location=DYNAMIC.layer(0), num_experts=EL),
        ValueError,
        r"num_experts must be the location's num_physical_experts \(16\); got 10",
    ),
    (
        dict(expert_location=STATIC, layer=0),
        ValueError,
        "must have the static_dispatch_map of one GPU; .*for_rank",
    ),
    (
        dict(expert_location=STATIC.layer(0)),
        ValueError,
        "must have the static_dispatch_map of one GPU; .*for_rank",
    ),
    (dict(expert_location=UNMADE, layer=0), ValueError, "must hold a static_dispatch_map"),
]


@pytest.mark.parametrize(("options", "error", "words"), REFUSED)
def test_refuses(options, error, words):
    for shape in ((5, K), (0, K)):
        with pytest.raises(error, match=words) as caught:
            aligner("xla")(np.zeros(shape, np.int32), **options)
        assert str(caught.value).startswith("moe_align_block_size: ")


# -- on a GPU, every form at its true size ----------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dispatch", FUSED)
@pytest.mark.parametrize("size", [s for s in forms.SIZES if s.num_experts > 1], ids=str)
def test_every_form_on_a_gpu(size, dispatch):
    logical = forms.location_sizes(size, "static")["num_logical"]
    slots = size.num_experts
    physical = np.concatenate([np.arange(logical), np.arange(slots - logical) ** 2 % logical])
    physical = np.stack([np.roll(physical, 7 * i) for i in range(2)])
    location = maj.ExpertLocation.from_map(physical, logical, num_gpus=1, dispatch=dispatch)
    location = location.for_rank(0, first_token=FAR)
    top_k = 8 if size.num_pairs % 8 == 0 else 1
    ids = ids_of(size.num_pairs // top_k, top_k, logical=logical)
    options = {"block_size": size.block_size, "num_experts": slots, "return_inverse": True}
    align = functools.partial(maj.moe_align_block_size, implementation="mosaic_gpu", **options)
    step = jax.jit(lambda ids, location, layer: align(ids, expert_location=location, layer=layer))
    for layer in range(2):
        want = oracle.expected(mapped(ids, location, layer), **options)
        oracle.assert_same(step(ids, location, jnp.int32(layer)), want)
        oracle.assert_same(align(ids, expert_location=location.layer(layer)), want)
    if top_k > 1:
        last = np.random.default_rng(9).integers(-2, slots + 3, len(ids))
        ids[:, -1] = last
        got = align(ids, expert_location=location, layer=1, num_fused_shared_experts=1)
        oracle.assert_same(got, oracle.expected(mapped(ids, location, 1, 1), **options))
    assert _tuning.config_for(AlignProblem(*size, 0)).form == size.form
