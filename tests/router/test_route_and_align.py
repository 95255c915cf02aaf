"""route_and_align: bit for bit the router and the alignment apart, in one launch where it says so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from moe_align_jax._router import fused, split
from moe_align_jax._router.problem import RouteProblem
from moe_align_jax._simt import emulator, mosaic
from moe_align_jax._simt.emulator import faults
from moe_align_jax.types import AlignProblem
from tests import oracle
from tests.align.test_lowering import MOSAIC, lower, operations
from tests.router import router_oracle


def bits(x):
    return np.asarray(x).view(np.int32).tolist()


def check(logits, *, implementation, block_size, routing, aligning, location=None):
    """Against the two functions, and the alignment's oracle."""
    weights, ids, aligned = maj.route_and_align(
        logits,
        block_size=block_size,
        expert_location=location,
        implementation=implementation,
        **routing,
        **aligning,
    )
    want_weights, want_ids = maj.route_topk(logits, implementation=implementation, **routing)
    assert bits(weights) == bits(want_weights) and bits(ids) == bits(want_ids)
    slots = location.num_physical_experts if location else logits.shape[1]
    aligning = {"return_inverse": True} | aligning
    want = maj.moe_align_block_size(
        want_ids,
        block_size=block_size,
        num_experts=slots,
        expert_location=location,
        implementation=implementation,
        **aligning,
    )
    assert (aligned.row_of_pair is None) == (want.row_of_pair is None)
    for got, expected in zip(jax.tree.leaves(aligned), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(got, expected)
    if location is None:
        ids = np.asarray(want_ids)
        options = {"block_size": block_size, "num_experts": slots, **aligning}
        oracle.assert_same(aligned, oracle.expected(ids, **options))


# Both sides of each way to launch it: 4, 8 and 64 tokens, 32 and 2048 pairs, clusters of each size.
SIZES = [
    (1, 8, 256, 16),
    (4, 8, 64, 128),
    (5, 6, 64, 16),
    (8, 8, 256, 16),
    (9, 8, 256, 64),
    (17, 1, 8, 4),
    (33, 8, 160, 16),
    (64, 8, 256, 128),
    (64, 32, 60, 16),
    (65, 2, 16, 8),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_two_apart(implementation, size, dtype):
    tokens, top_k, experts, block_size = size
    check(
        router_oracle.make_logits(tokens, experts, dtype, tokens),
        implementation=implementation,
        block_size=block_size,
        routing={"top_k": top_k},
        aligning={},
    )


ROUTINGS = [
    {"scoring": "sigmoid", "renormalize": True, "scaling_factor": 2.5, "bias": True},
    {"num_groups": 4, "topk_groups": 2, "mask": True},
    {"softmax_after_topk": True, "valid": 5},
    {"scoring": "sqrtsoftplus", "renormalize": True, "mask": True, "valid": 9, "bias": True},
]
ALIGNINGS = [
    {"return_inverse": False},
    {"map": "label"},
    {"map": "filter"},
]


@pytest.mark.parametrize("num_tokens", [3, 12])
@pytest.mark.parametrize("which", range(len(ROUTINGS)))
def test_with_every_option(implementation, num_tokens, which):
    routing, rng = dict(ROUTINGS[which]), np.random.default_rng(which)
    logits = router_oracle.make_logits(num_tokens, 32, "float32", which)
    if routing.pop("bias", False):
        routing["correction_bias"] = rng.normal(size=32).astype(np.float32)
    if routing.pop("mask", False):
        routing["token_mask"] = rng.random(num_tokens) < 0.6
    if "valid" in routing:
        routing["num_valid_tokens"] = routing.pop("valid")
    for aligning in ALIGNINGS:
        aligning = dict(aligning)
        if use := aligning.pop("map", None):
            expert_map = rng.permutation(np.arange(32))
            aligning["expert_map"] = np.where(expert_map < 20, expert_map, -1)
            aligning["ignore_invalid_experts"] = use == "filter"
        check(
            logits,
            implementation=implementation,
            block_size=4,
            routing={"top_k": 3, **routing},
            aligning=aligning,
        )


SPLIT = [
    ((1, 256, 8), 16, {}, {}),
    ((4, 64, 8), 128, {}, {"expert_map": "label"}),
    ((5, 64, 6), 4, {"has_token_mask": True}, {"return_inverse": True}),
    ((12, 64, 8), 4, {"has_token_mask": True}, {"return_inverse": True}),
    ((12, 128, 5), 16, {"has_token_mask": True}, {"return_inverse": True}),
    ((33, 160, 8), 16, {}, {"return_inverse": True}),
    ((64, 256, 8), 64, {"has_token_mask": True, "bias_rows": 1}, {"return_inverse": True}),
    ((64, 60, 32), 16, {"renormalize": True}, {"has_num_valid_pairs": True}),
    ((17, 8, 1), 3, {}, {"return_counts": False}),
    ((9, 16, 4), 2, {"softmax_after_topk": True}, {"return_inverse": True}),
]


def shapes_of(tokens, pairs):
    """4 and 8 routing warps to a CTA; and the launch that has the alignment's own kernel in it."""
    for routers in (4, 8):
        ctas = 1 << (-(-tokens // routers) - 1).bit_length()
        if ctas <= 8 and routers <= max(tokens, 4):
            yield fused.FusedConfig("split", routers // 4 + 1, ctas)
    yield fused.FusedConfig("warp" if pairs <= 32 else "block", 2, ctas)


@pytest.mark.parametrize("on_gpu", [False, pytest.param(True, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("sizes", "block_size", "routing", "aligning"), SPLIT)
def test_warps_with_two_tasks_give_the_same_bits(sizes, block_size, routing, aligning, on_gpu):
    """As the program that has the alignment's own kernel in it, which is held to the oracle."""
    problem = RouteProblem(*sizes, **routing)
    tokens, experts, top_k = sizes
    pairs = tokens * top_k
    capacity = maj.max_num_tokens_padded(pairs, block_size=block_size, num_experts=experts)
    align = AlignProblem(pairs, experts, block_size, capacity, **aligning)
    assert split.takes(align, tokens)
    rng = np.random.default_rng(tokens)
    floats = {
        "logits": rng.standard_normal((tokens, experts)),
        "correction_bias": rng.standard_normal(experts),
    }
    words = {name: x.astype(np.float32).ravel() for name, x in floats.items()}
    words["token_mask"] = (rng.random(tokens) < 0.7).astype(np.int32)
    words["expert_map"] = rng.integers(-2, experts, experts).astype(np.int32)
    words["num_valid_pairs"] = np.array([pairs // 2], np.int32)
    *shapes, plain = shapes_of(tokens, pairs)
    last = fused.build(problem, align, plain)

    def run(program):
        given = [words[name] for name in program.inputs]
        if not on_gpu:
            return emulator.run(program, [x.view(np.int32) for x in given])
        return jax.jit(lambda *operands: mosaic.run(program, operands))(*given)

    want = run(last)
    for shape in shapes:
        got = run(fused.build(problem, align, shape))
        for name, mine, theirs in zip(last.results, got, want, strict=True):
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs), f"{shape}: {name}")


def test_the_aligning_warps_of_a_cluster_need_both_their_barriers(monkeypatch):
    """Masks are cleared, then bits are set, then counted: the emulator reports either barrier's absence."""
    problem = RouteProblem(9, 16, 4)
    align = AlignProblem(36, 16, 2, 52, return_inverse=True)
    program = fused.build(problem, align, fused.FusedConfig("split", 3, 2))
    logits = np.random.default_rng(0).standard_normal(9 * 16).astype(np.float32).view(np.int32)
    emulator.run(program, [logits])
    sync = emulator.EmulatedSimt.tail_sync
    for left_out in (0, 1):
        calls = []

        def some(t, left_out=left_out, calls=calls):
            calls.append(t)
            if len(calls) - 1 != left_out:
                sync(t)

        monkeypatch.setattr(emulator.EmulatedSimt, "tail_sync", some)
        with pytest.raises(faults.RaceError, match="race on masks"):
            emulator.run(program, [logits])


def test_logits_that_are_kept_give_the_weights_of_any_logits(monkeypatch):
    """Of 8 routing warps to a CTA: infinite ones, NaN, and ones that the short keys cannot tell apart. The
    launch of 4 to a CTA, which keeps none, says what is right; and without the barrier between a warp's
    stores and loads the emulator reports a race."""
    problem = RouteProblem(9, 128, 8, renormalize=True)
    align = AlignProblem(72, 128, 16, 2048)
    logits = np.random.default_rng(1).standard_normal((9, 128)).astype(np.float32)
    logits[1, 5:8], logits[2, 3], logits[3, 4:6], logits[4] = np.inf, np.nan, -np.inf, 0
    logits[5, 9], logits[5, 2] = 4, np.nextafter(np.float32(4), np.float32(5))
    given = [logits.ravel().view(np.int32)]
    keeps, loads_again = (
        fused.build(problem, align, fused.FusedConfig("split", *shape))
        for shape in ((3, 2), (2, 4))
    )
    assert "kept" in keeps.kernels[0].shared and "kept" not in loads_again.kernels[0].shared
    for got, want in zip(emulator.run(keeps, given), emulator.run(loads_again, given), strict=True):
        np.testing.assert_array_equal(got, want)
    monkeypatch.setattr(emulator.EmulatedSimt, "warp_sync", lambda t: None)
    with pytest.raises(faults.RaceError, match="race on kept"):
        emulator.run(keeps, given)


@pytest.mark.parametrize(
    "aligning",
    [{"expert_map": "filter"}, {"dispatch": "static", "num_logical": 4}],
)
def test_ids_that_are_mapped_before_they_are_counted_are_not_told_by_bits(aligning):
    """Two experts of a token may become one."""
    assert not split.takes(AlignProblem(8, 8, 4, 40, **aligning), 4)
    assert not split.takes(AlignProblem(65, 8, 4, 89), 65)


@pytest.mark.parametrize("dispatch", ["static", "dynamic", "round_robin"])
@pytest.mark.parametrize("num_tokens", [4, 40, 200])
def test_with_an_expert_location(implementation, dispatch, num_tokens):
    slots = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 1, 1, 6, 2]])
    gpus = 2 if dispatch == "static" else None
    location = maj.ExpertLocation.from_map(slots, num_gpus=gpus, dispatch=dispatch).layer(0)
    if dispatch == "static":
        location = location.for_rank(1)
    check(
        router_oracle.make_logits(num_tokens, 8, "float32", 5),
        implementation=implementation,
        block_size=4,
        routing={"top_k": 2},
        aligning={},
        location=location,
    )


def test_of_no_tokens(implementation):
    weights, ids, aligned = maj.route_and_align(
        np.zeros((0, 8), np.float32), top_k=2, block_size=4, implementation=implementation
    )
    assert weights.shape == ids.shape == (0, 2)
    assert aligned.sorted_token_ids.shape == aligned.row_of_pair.shape == (0,)
    assert aligned.tokens_per_expert.tolist() == [0] * 8


def test_vmap_and_gradient(implementation):
    logits = jnp.asarray(router_oracle.make_logits(15, 16, "float32", 6).reshape(3, 5, 16))
    call = functools.partial(
        maj.route_and_align, top_k=2, block_size=4, implementation=implementation
    )
    got = jax.vmap(call)(logits)
    for i in range(3):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(call(logits[i])), strict=True):
            np.testing.assert_array_equal(a[i], b)

    def loss(function, x):
        return (function(x)[0] ** 2).sum()

    apart = functools.partial(maj.route_topk, top_k=2, implementation=implementation)
    want = jax.grad(functools.partial(loss, apart))(logits[0])
    np.testing.assert_array_equal(jax.grad(functools.partial(loss, call))(logits[0]), want)


def test_shard_map_routes_and_aligns_each_shard():
    kind = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,), devices=jax.devices("cpu"))
    spec = jax.sharding.PartitionSpec("x")
    logits = router_oracle.make_logits(40, 16, "float32", 7)
    for implementation in ("xla", "emulator"):
        call = functools.partial(
            maj.route_and_align, top_k=2, block_size=4, implementation=implementation
        )
        got = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec))(logits)
        for shard, part in enumerate(np.split(logits, 8)):
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(call(part)), strict=True):
                np.testing.assert_array_equal(np.split(np.asarray(a), 8)[shard], b)


def test_refuses_what_does_not_fit():
    logits = np.zeros((4, 8), np.float32)
    location = maj.ExpertLocation.from_map(np.arange(9)[None])
    call = functools.partial(maj.route_and_align, logits, top_k=2)
    for options, error, words in (
        ({"block_size": 0}, ValueError, "block_size must be at least 1"),
        ({"block_size": 4, "return_inverse": 1}, TypeError, "return_inverse must be a Python bool"),
        ({"block_size": 4, "expert_map": np.zeros(7, int)}, ValueError, "expert_map must have"),
        ({"block_size": 4, "expert_location": 3}, TypeError, "expert_location must be an"),
        ({"block_size": 4, "expert_location": location}, ValueError, "must be of one layer"),
        (
            {"block_size": 4, "expert_location": location.layer(0)},
            ValueError,
            "expert_location must have 8 logical experts, as the logits have; got 9",
        ),
        ({"block_size": 2**30}, ValueError, "give a padded length P of at most"),
    ):
        with pytest.raises(error, match="^route_and_align: ") as caught:
            call(**options)
        assert words in str(caught.value)


# -- what stands in a program for CUDA -----------------------------------------------------------------


@pytest.mark.parametrize(("num_tokens", "kernels"), [(1, 1), (4, 1), (64, 1), (65, 2), (8192, 3)])
def test_cuda_program_is_one_launch_for_few_tokens(num_tokens, kernels):
    """65 tokens: the router, and the alignment. 8192: the alignment's own two kernels."""
    logits = jax.ShapeDtypeStruct((num_tokens, 256), jnp.bfloat16)
    call = functools.partial(maj.route_and_align, top_k=8, block_size=64, renormalize=True)
    counts = operations(lower(call, logits))
    assert counts.pop(f"custom_call {MOSAIC}") == kernels
    counts = operations(lower(functools.partial(maj.route_topk, top_k=8), logits))
    assert counts.pop(f"custom_call {MOSAIC}") == 1
    batched = jax.ShapeDtypeStruct((3, num_tokens, 256), jnp.bfloat16)
    counts = operations(lower(jax.vmap(functools.partial(maj.route_topk, top_k=8)), batched))
    assert counts.pop(f"custom_call {MOSAIC}") == 1
    beside = {name for name in counts if not name.startswith(("builtin.", "func."))}
    assert beside <= {"stablehlo.reshape", "stablehlo.transpose"}, counts


def test_export_for_two_platforms():
    logits = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    call = functools.partial(maj.route_and_align, top_k=2, block_size=4)
    lowered = jax.jit(call).trace(logits).lower(lowering_platforms=("cpu", "cuda"))
    assert operations(lowered)[f"custom_call {MOSAIC}"] == 1
