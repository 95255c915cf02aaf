"""The contract of route_topk, once per implementation, against the router in plain Python and float64."""

import functools
import itertools
import math
import random
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import moe_align_jax as maj
from tests import oracle
from tests.conftest import KERNELS, by_implementation
from tests.helpers import as_jax
from tests.router import router_oracle

DTYPES = ("float32", "bfloat16", "float16")
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")


def check(logits, *, implementation, container="numpy", **options):
    given = dict(options)
    if container == "jax":
        arrays = {n: v for n, v in given.items() if isinstance(v, np.ndarray)}
        given |= {name: jnp.asarray(value) for name, value in arrays.items()}
    got = maj.route_topk(
        jnp.asarray(logits) if container == "jax" else logits,
        implementation=implementation,
        **given,
    )
    router_oracle.assert_routed(got, logits, **options)
    return got


# -- every option alone, and every two together -------------------------------------------------------

FACTORS = {
    "num_tokens": (1, 4, 21),
    "num_experts": (8, 24, 64, 72, 256, 320),
    "top_k": (1, 2, 6, 8),
    "dtype": DTYPES,
    "scoring": SCORINGS,
    "softmax_after_topk": (False, True),
    "renormalize": (False, True),
    "bias": ("none", "random", "unusual", "bfloat16"),
    "groups": ((1, 1), (2, 1), (4, 2), (8, 4), (8, 8)),
    "scaling_factor": (1.0, 2.5, -0.5),
    "mask": (False, True),
    "valid": (None, 0, 3, 100),
    "container": ("numpy", "jax"),
}


def possible(case):
    groups, stay = case["groups"]
    fits = case["top_k"] <= case["num_experts"] // groups * stay
    return fits and (case["scoring"] == "softmax" or not case["softmax_after_topk"])


def pairs_of(case):
    return set(itertools.combinations(case.items(), 2))


def covering():
    """Every level alone (the others plain), then cases in which every two levels meet."""
    plain = {name: levels[0] for name, levels in FACTORS.items()} | {"num_experts": 64, "top_k": 2}
    cases = [plain | {name: level} for name, levels in FACTORS.items() for level in levels]
    rng = random.Random(18)
    draws = ({n: rng.choice(levels) for n, levels in FACTORS.items()} for _ in range(4_000))
    pool = [case for case in draws if possible(case)]
    left = set().union(*map(pairs_of, pool)) - set().union(*map(pairs_of, cases))
    while left:
        sample = rng.sample(pool, 300)
        best = max(sample, key=lambda case: len(pairs_of(case) & left))
        if not pairs_of(best) & left:
            best = next(case for case in pool if pairs_of(case) & left)
        cases.append(best)
        left -= pairs_of(best)
    return [case for case in cases if possible(case)]


COVER = covering()


def name_of(case):
    return "-".join(f"{value}" for value in case.values())


def arguments(case, seed):
    case = dict(case)
    tokens, experts, dtype = (case.pop(n) for n in ("num_tokens", "num_experts", "dtype"))
    rng = np.random.default_rng(seed)
    logits = router_oracle.make_logits(tokens, experts, dtype, seed)
    bias, mask = case.pop("bias"), case.pop("mask")
    groups, stay = case.pop("groups")
    options = {**case, "num_groups": groups, "topk_groups": stay}
    options["num_valid_tokens"] = options.pop("valid")
    if bias != "none":
        values = rng.normal(size=experts).astype(np.float32)
        if bias == "unusual":
            values[::3] = (-np.inf, np.nan, 0.0)[seed % 3]
        options["correction_bias"] = values.astype(bias if bias == "bfloat16" else np.float32)
    if mask:
        options["token_mask"] = rng.random(tokens) < 0.5
    return logits, options


def test_the_cover_holds_every_two_levels():
    seen = set().union(*map(pairs_of, COVER))
    for (a, xs), (b, ys) in itertools.combinations(FACTORS.items(), 2):
        for x, y in itertools.product(xs, ys):
            rest = FACTORS | {a: (x,), b: (y,)}
            meet = (
                dict(zip(rest, values, strict=True))
                for values in itertools.islice(itertools.product(*rest.values()), 0, 200_000, 97)
            )
            assert ((a, x), (b, y)) in seen or not any(map(possible, meet)), (a, x, b, y)


@by_implementation("number", range(len(COVER)), xla=range(0, len(COVER), 2))
def test_route_equals_the_oracle_over_the_cover(implementation, number):
    logits, options = arguments(COVER[number], seed=number)
    check(logits, implementation=implementation, **options)


# -- sizes -------------------------------------------------------------------------------------------

EXPERTS = sorted({2**p + step for p in range(11) for step in (-1, 0, 1)} - {0, 1025})


@by_implementation("num_experts", EXPERTS, xla=EXPERTS[::5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_around_powers_of_two(implementation, num_experts, dtype):
    logits = router_oracle.make_logits(3, num_experts, dtype, num_experts)
    for top_k in sorted({1, min(5, num_experts)}):
        check(logits, implementation=implementation, top_k=top_k)


@pytest.mark.parametrize("num_experts", [1, 2, 7, 17, 31, 32])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_all_experts_are_chosen(implementation, num_experts, scoring):
    logits = router_oracle.make_logits(9, num_experts, "float32", 3)
    _, ids = check(logits, implementation=implementation, top_k=num_experts, scoring=scoring)
    assert (np.sort(ids, axis=1) == np.arange(num_experts)).all()


@pytest.mark.parametrize("num_experts", [48, 1500])
def test_more_than_the_kernel_takes(num_experts):
    """XLA, where it is not named."""
    logits = router_oracle.make_logits(5, num_experts, "float32", 4)
    check(logits, implementation="xla", top_k=num_experts)
    check(logits, implementation=None, top_k=num_experts)


@pytest.mark.parametrize(
    ("num_experts", "groups", "stay"),
    [(9, 3, 2), (24, 24, 7), (64, 32, 5), (60, 5, 1), (160, 8, 3), (96, 6, 4), (33, 11, 10)],
)
@pytest.mark.parametrize("biased", [False, True])
def test_groups_of_any_size(implementation, num_experts, groups, stay, biased):
    for dtype in ("float32", "bfloat16"):
        logits = router_oracle.make_logits(16, num_experts, dtype, groups)
        options = {"num_groups": groups, "topk_groups": stay, "scoring": "sigmoid"}
        if biased:
            bias = np.random.default_rng(stay).normal(size=num_experts)
            options["correction_bias"] = bias.astype(np.float32)
        top_k = min(6, num_experts // groups * stay)
        check(logits, implementation=implementation, top_k=top_k, **options)


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 4, 5, 130])
def test_any_number_of_tokens(implementation, num_tokens):
    logits = router_oracle.make_logits(num_tokens, 16, "float32", 5)
    weights, ids = check(logits, implementation=implementation, top_k=3)
    assert weights.shape == ids.shape == (num_tokens, 3)


# -- unusual logits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -3.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_choose_the_first_experts(implementation, value, scoring, dtype):
    logits = np.full((3, 64), value, dtype)
    for renormalize in (False, True):
        weights, ids = check(
            logits,
            implementation=implementation,
            top_k=8,
            scoring=scoring,
            renormalize=renormalize,
        )
        assert np.asarray(ids).tolist() == [list(range(8))] * 3
        assert np.isfinite(weights).all()


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_id_is_out_of_range_or_comes_twice(implementation, seed, dtype):
    """Any bits at all."""
    rng = np.random.default_rng(seed)
    word = np.uint32 if dtype == "float32" else np.uint16
    bits = rng.integers(0, np.iinfo(word).max, (8, 40), word, endpoint=True)
    logits = bits.view(np.float32 if dtype == "float32" else np.dtype(dtype))
    bias = rng.integers(0, 2**32, 40, np.uint32).view(np.float32)
    for options in ({}, {"correction_bias": bias}, {"num_groups": 4, "topk_groups": 2}):
        for scoring in SCORINGS:
            weights, ids = maj.route_topk(
                logits, top_k=6, scoring=scoring, implementation=implementation, **options
            )
            ids = np.asarray(ids)
            assert ((ids >= 0) & (ids < 40)).all()
            assert all(len(set(row)) == 6 for row in ids.tolist())
            assert not np.isnan(weights).any()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_weights_descend_without_a_bias(implementation, scoring):
    logits = router_oracle.make_logits(64, 96, "float32", 7)
    weights, _ = maj.route_topk(logits, top_k=8, scoring=scoring, implementation=implementation)
    assert (np.diff(np.asarray(weights), axis=1) <= 0).all()


def test_close_logits_are_told_apart_where_their_scores_are_equal(implementation):
    """sigmoid(20) and sigmoid(21) are both 1 in float32; so is the softmax of a row that one logit rules."""
    logits = np.array([[20, 22, 21, 20.5], [0, -300, -200, -250]], np.float32)
    for scoring in SCORINGS:
        _, ids = maj.route_topk(logits, top_k=4, scoring=scoring, implementation=implementation)
        assert np.asarray(ids).tolist() == [[1, 2, 3, 0], [0, 2, 3, 1]]


@pytest.mark.parametrize(("num_experts", "top_k"), [(256, 8), (60, 8), (8, 8), (1000, 32), (33, 1)])
def test_logits_that_differ_in_their_last_bits_are_told_apart(implementation, num_experts, top_k):
    """Among the chosen ones, and between the last of them and the next one."""
    rng = np.random.default_rng(num_experts)
    steps = np.arange(num_experts, dtype=np.float32) * np.float32(
        2**-22
    )  # of 1 unit in the last place
    spread = 1 + rng.permutation(num_experts).astype(np.float32)
    last = np.argsort(-spread)[top_k - 1]
    edge, alone = spread.copy(), np.ones(num_experts, np.float32)
    edge[num_experts - 1 if last != num_experts - 1 else 0] = np.nextafter(
        edge[last], np.float32(1e9)
    )
    alone[-1] = np.nextafter(np.float32(1), np.float32(2))
    rows = [2 + steps, 2 - steps, 2 + steps[rng.permutation(num_experts)], -2 - steps, edge, alone]
    rows += [rng.standard_normal(num_experts).astype(ml_dtypes.bfloat16), np.zeros(num_experts)]
    logits = np.stack([row.astype(np.float32) for row in rows])
    weights, ids = maj.route_topk(
        logits, top_k=top_k, renormalize=True, implementation=implementation
    )
    want = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    assert np.asarray(ids).tolist() == want.tolist()
    chosen = np.take_along_axis(logits, want, axis=1).astype(np.float64)
    powers = np.exp(chosen - chosen[:, :1])
    expected = powers / powers.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.asarray(weights), expected, rtol=2e-5, atol=1e-30)


def test_groups_whose_greatest_logits_differ_in_their_last_bits_are_told_apart(implementation):
    """Each token has the greatest logit in another group, by 1 unit in the last place."""
    for num_experts, groups, stay in ((8, 8, 1), (24, 8, 2), (128, 4, 1), (256, 8, 4)):
        size = num_experts // groups
        logits = np.full((groups, num_experts), -3, np.float32)
        logits[:, ::size] = 1
        for token in range(groups):
            logits[token, token * size] = np.nextafter(np.float32(1), np.float32(2))
        _, ids = maj.route_topk(
            logits, top_k=1, num_groups=groups, topk_groups=stay, implementation=implementation
        )
        assert np.asarray(ids)[:, 0].tolist() == list(range(0, num_experts, size))


# -- which tokens are real ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [-(2**40), -1, 0, 1, 6, 7, 8, 2**31 - 1, 2**31, 2**40])
def test_num_valid_tokens_of_any_size_and_dtype(implementation, count):
    logits = router_oracle.make_logits(7, 12, "float32", 8)
    given = [count]
    for dtype in oracle.ID_DTYPES:
        if np.iinfo(dtype).min <= count <= np.iinfo(dtype).max:
            array = np.array(count, dtype)
            given += [array, array[()], as_jax(array)]
    want = router_oracle.route(logits, top_k=2, num_valid_tokens=count)
    for value in given:
        _, ids = maj.route_topk(
            logits, top_k=2, num_valid_tokens=value, implementation=implementation
        )
        assert np.asarray(ids).tolist() == want.ids


# -- the derivative ----------------------------------------------------------------------------------


def plain_weights(logits, ids, options):
    """By the definition, not by what the library computes."""
    x = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(x, ids, axis=1)
    if options.get("softmax_after_topk"):
        return jnp.exp(chosen) / jnp.exp(chosen).sum(1, keepdims=True)
    scores = {
        "softmax": lambda x: jnp.exp(x) / jnp.exp(x).sum(1, keepdims=True),
        "sigmoid": lambda x: 1 / (1 + jnp.exp(-x)),
        "sqrtsoftplus": lambda x: jnp.sqrt(jnp.log(1 + jnp.exp(x))),
    }[options.get("scoring", "softmax")](x)
    weights = jnp.take_along_axis(scores, ids, axis=1)
    if options.get("renormalize"):
        weights = weights / weights.sum(1, keepdims=True)
    return weights * jnp.float32(options.get("scaling_factor", 1.0))


GRADED = [
    {},
    {"renormalize": True},
    {"softmax_after_topk": True},
    {"scoring": "sigmoid"},
    {"scoring": "sigmoid", "renormalize": True, "scaling_factor": 2.5},
    {"scoring": "sqrtsoftplus", "renormalize": True},
    {"scoring": "sqrtsoftplus", "num_groups": 4, "topk_groups": 2},
]


@pytest.mark.parametrize("options", GRADED, ids=lambda o: "-".join(map(str, o.values())) or "plain")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_in_the_logits(implementation, options, dtype):
    rng = np.random.default_rng(9)
    logits = jnp.asarray(rng.normal(size=(6, 16)).astype(dtype))
    along = jnp.asarray(rng.normal(size=(6, 3)).astype(np.float32))
    route = functools.partial(maj.route_topk, top_k=3, implementation=implementation, **options)
    _, ids = route(logits)

    def loss(x):
        return (route(x)[0] * along).sum()

    plain = jax.jit(lambda x: plain_weights(x, ids, options))
    want = jax.jit(jax.grad(lambda x: (plain(x) * along).sum()))(logits)
    got = jax.jit(jax.grad(loss))(logits)
    assert got.dtype == logits.dtype
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    as32 = functools.partial(np.asarray, dtype=np.float32)
    np.testing.assert_allclose(as32(got), as32(want), rtol=tolerance, atol=1e-6)
    tangent = jnp.asarray(rng.normal(size=(6, 16)).astype(dtype))
    _, moved = jax.jvp(lambda x: route(x)[0], (logits,), (tangent,))
    _, expected = jax.jvp(plain, (logits,), (tangent,))
    np.testing.assert_allclose(as32(moved), as32(expected), rtol=tolerance, atol=1e-5)
    each = jax.vmap(jax.grad(lambda row, a: (route(row[None])[0][0] * a).sum()))(logits, along)
    np.testing.assert_allclose(as32(each), as32(want), rtol=tolerance, atol=1e-6)


def test_gradient_with_a_bias_and_tokens_that_are_not_real(implementation):
    rng = np.random.default_rng(10)
    logits = jnp.asarray(rng.normal(size=(6, 16)).astype(np.float32))
    bias = jnp.asarray(rng.normal(size=16).astype(np.float32))
    mask = np.array([True, False, True, True, False, True])

    def loss(x, b):
        weights, _ = maj.route_topk(
            x,
            top_k=3,
            scoring="sigmoid",
            correction_bias=b,
            token_mask=mask,
            implementation=implementation,
        )
        return (weights**2).sum()

    by_logits, by_bias = jax.grad(loss, argnums=(0, 1))(logits, bias)
    _, ids = maj.route_topk(logits, top_k=3, scoring="sigmoid", correction_bias=bias)
    real = jnp.asarray(mask)[:, None]

    def plain(x):
        weights = plain_weights(x, ids, {"scoring": "sigmoid"})
        return (jnp.where(real, weights, jnp.float32(0)) ** 2).sum()

    np.testing.assert_allclose(by_logits, jax.grad(plain)(logits), rtol=1e-5, atol=1e-7)
    assert not np.asarray(by_bias).any() and not np.asarray(by_logits)[~mask].any()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_gradient_is_finite_for_any_logits(implementation, scoring):
    logits = jnp.asarray(router_oracle.make_logits(40, 16, "float32", 11))

    def loss(x):
        return maj.route_topk(
            x, top_k=3, scoring=scoring, renormalize=True, implementation=implementation
        )[0][:, 0].sum()

    assert np.isfinite(jax.grad(loss)(logits)).all()


# -- transforms --------------------------------------------------------------------------------------


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


BATCHED = [
    (0, None, None, None),
    (1, None, None, None),
    (0, 0, None, None),
    (None, 0, None, None),
    (0, None, 0, None),
    (0, None, None, 0),
    (2, 1, 1, 0),
    (None, None, None, 0),
]


@pytest.mark.parametrize("axes", BATCHED, ids=str)
def test_vmap_of_any_of_the_arguments(implementation, axes):
    rng = np.random.default_rng(12)
    logits = rng.normal(size=(3, 5, 24)).astype(np.float32)
    bias = rng.normal(size=(3, 24)).astype(np.float32)
    mask = rng.random((3, 5)) < 0.6
    count = np.array([2, 5, 0], np.int32)

    def route(x, b, m, n):
        return maj.route_topk(
            x,
            top_k=4,
            scoring="sigmoid",
            correction_bias=b,
            token_mask=m,
            num_valid_tokens=n,
            num_groups=4,
            topk_groups=2,
            implementation=implementation,
        )

    whole = (logits, bias, mask, count)
    given = [
        jnp.asarray(x[0] if axis is None else np.moveaxis(x, 0, axis))
        for x, axis in zip(whole, axes, strict=True)
    ]
    got = jax.vmap(route, in_axes=axes)(*given)
    for i in range(3):
        rows = [x[0 if axis is None else i] for x, axis in zip(whole, axes, strict=True)]
        assert_equal([g[i] for g in got], route(*rows))


def test_vmap_two_deep(implementation):
    rng = np.random.default_rng(13)
    logits = jnp.asarray(rng.normal(size=(2, 3, 4, 16)).astype(np.float32))
    bias = jnp.asarray(rng.normal(size=(2, 16)).astype(np.float32))
    biases = jnp.asarray(rng.normal(size=(3, 16)).astype(np.float32))

    def route(x, b):
        return maj.route_topk(x, top_k=2, correction_bias=b, implementation=implementation)

    outer = jax.vmap(jax.vmap(route, in_axes=(0, None)))(logits, bias)
    inner = jax.vmap(jax.vmap(route), in_axes=(0, None))(logits, biases)
    for i, j in itertools.product(range(2), range(3)):
        assert_equal([x[i, j] for x in outer], route(logits[i, j], bias[i]))
        assert_equal([x[i, j] for x in inner], route(logits[i, j], biases[j]))


def test_scan_over_layers(implementation):
    logits = router_oracle.make_logits(12, 16, "bfloat16", 14).reshape(3, 4, 16)

    def layer(_, x):
        return None, maj.route_topk(x, top_k=2, implementation=implementation)

    _, (weights, ids) = jax.lax.scan(layer, None, jnp.asarray(logits))
    for i in range(3):
        router_oracle.assert_routed((weights[i], ids[i]), logits[i], top_k=2)


@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map_routes_each_shard(check_vma):
    devices = jax.devices("cpu")
    kind = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,), devices=devices)
    spec = jax.sharding.PartitionSpec
    logits = router_oracle.make_logits(32, 24, "float32", 15)
    bias = np.random.default_rng(16).normal(size=24).astype(np.float32)
    for implementation in ("xla", "emulator"):

        def route(x, b, implementation=implementation):
            return maj.route_topk(
                x, top_k=3, scoring="sigmoid", correction_bias=b, implementation=implementation
            )

        def loss(x, b, route=route):
            return jax.grad(lambda x: route(x, b)[0].sum())(x)

        specs = {"mesh": mesh, "in_specs": (spec("x"), spec()), "out_specs": spec("x")}
        got = jax.jit(jax.shard_map(route, check_vma=check_vma, **specs))(logits, bias)
        router_oracle.assert_routed(got, logits, top_k=3, scoring="sigmoid", correction_bias=bias)
        by_shard = jax.jit(jax.shard_map(loss, check_vma=check_vma, **specs))(logits, bias)
        np.testing.assert_allclose(by_shard, loss(jnp.asarray(logits), bias), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_logits_give_the_global_result(kind):
    kind = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,), devices=jax.devices("cpu"))
    logits = router_oracle.make_logits(16, 24, "float32", 17)
    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        given = jax.device_put(logits, sharding)
        got = jax.jit(functools.partial(maj.route_topk, top_k=3))(given)
    router_oracle.assert_routed(got, logits, top_k=3)


@pytest.mark.parametrize("implementation", KERNELS, indirect=True)
def test_same_bits_every_run(implementation):
    logits = jnp.asarray(router_oracle.make_logits(40, 128, "float32", 18))
    runs = [maj.route_topk(logits, top_k=8, implementation=implementation) for _ in range(3)]
    for run in runs[1:]:
        assert_equal(run, runs[0])


# -- errors, and what runs ---------------------------------------------------------------------------

LOGITS = np.zeros((4, 8), np.float32)
ERRORS = [
    ({"logits": [[1.0]]}, TypeError, "logits must be an array; got list"),
    ({"logits": np.zeros((4, 8))}, TypeError, "logits must be float32, bfloat16 or float16; got"),
    ({"logits": np.zeros((4, 8), np.int32)}, TypeError, "logits must be float32"),
    ({"logits": LOGITS[0]}, ValueError, "logits must have shape [num_tokens, num_experts]"),
    ({"logits": LOGITS[:, :0]}, ValueError, "with at least one expert; got float32 [4, 0]"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1; got 0"),
    ({"top_k": 9}, ValueError, "top_k must be at most the number of experts that can be chosen"),
    ({"top_k": 2.0}, TypeError, "top_k must be a static Python int; got float 2.0"),
    ({"top_k": True}, TypeError, "top_k must be a static Python int"),
    ({"scoring": "relu"}, ValueError, "scoring must be one of 'softmax', 'sigmoid'"),
    ({"scoring": None}, ValueError, "scoring must be one of"),
    ({"softmax_after_topk": 1}, TypeError, "softmax_after_topk must be a Python bool"),
    (
        {"softmax_after_topk": True, "scoring": "sigmoid"},
        ValueError,
        "softmax_after_topk must be False unless scoring is 'softmax'; got True with 'sigmoid'",
    ),
    ({"renormalize": None}, TypeError, "renormalize must be a Python bool"),
    ({"correction_bias": np.zeros(7, np.float32)}, ValueError, "correction_bias must have shape"),
    ({"correction_bias": np.zeros(8, int)}, TypeError, "correction_bias must be float32"),
    ({"correction_bias": 1.0}, TypeError, "correction_bias must be float32"),
    ({"num_groups": 3}, ValueError, "num_groups must divide the number of experts; got 3 for 8"),
    ({"topk_groups": 2}, ValueError, "topk_groups must be at most num_groups; got 2 of 1"),
    ({"num_groups": 4, "top_k": 3}, ValueError, "experts that can be chosen; got 3 of 2"),
    ({"num_groups": 0}, ValueError, "num_groups must be at least 1"),
    ({"scaling_factor": math.inf}, ValueError, "scaling_factor must be a finite float32"),
    ({"scaling_factor": 1e39}, ValueError, "scaling_factor must be a finite float32"),
    ({"scaling_factor": "2"}, TypeError, "scaling_factor must be a static number"),
    ({"scaling_factor": jnp.float32(2)}, TypeError, "scaling_factor must be a static number"),
    ({"token_mask": np.zeros(4, int)}, TypeError, "token_mask must be a bool array; got int64 [4]"),
    ({"token_mask": np.zeros(3, bool)}, ValueError, "token_mask must have shape [4]; got bool [3]"),
    ({"num_valid_tokens": True}, TypeError, "num_valid_tokens must be an integer; got bool"),
    ({"num_valid_tokens": 1.0}, TypeError, "num_valid_tokens must be an integer array"),
    ({"num_valid_tokens": np.zeros(2, int)}, ValueError, "num_valid_tokens must be a scalar"),
    ({"implementation": "triton"}, ValueError, "implementation must be None or one of"),
]


@pytest.mark.parametrize(("changed", "error", "words"), ERRORS, ids=str)
@pytest.mark.parametrize("name", ["route_topk", "route_and_align"])
def test_refuses(name, changed, error, words):
    options = {"logits": LOGITS, "top_k": 2} | changed
    if name == "route_and_align":
        options["block_size"] = 4
    with np.errstate(over="ignore"), pytest.raises(error, match=f"^{name}: ") as caught:
        getattr(maj, name)(options.pop("logits"), **options)
    assert words in str(caught.value)
    assert re.match(rf"{name}: \w+ must .*; got .*\. [A-Z].*\.$", str(caught.value), re.DOTALL)


def test_refuses_a_static_option_that_is_traced():
    with pytest.raises(TypeError, match="route_topk: top_k must be a static Python int"):
        jax.jit(lambda k: maj.route_topk(LOGITS, top_k=k))(2)


@pytest.mark.parametrize("name", ["route_topk", "route_and_align"])
@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((4, 1025), {"top_k": 2}, "takes up to 1024 experts; got 1025"),
        ((4, 64), {"top_k": 33}, "takes up to 32 chosen experts; got 33"),
        (
            (4, 66),
            {"top_k": 2, "num_groups": 33, "topk_groups": 2},
            "takes up to 32 groups; got 33",
        ),
    ],
)
def test_a_named_kernel_refuses_what_it_does_not_take(name, shape, options, words):
    if name == "route_and_align":
        options = {**options, "block_size": 4}
    logits = np.zeros(shape, np.float32)
    with pytest.raises(NotImplementedError, match=f"^{name}: implementation") as caught:
        getattr(maj, name)(logits, implementation="emulator", **options)
    assert words in str(caught.value) and "Pass implementation=None" in str(caught.value)
    getattr(maj, name)(logits, **options)


def test_select_says_what_runs_and_why_nothing_else():
    select = maj.select_router_implementation
    on_gpu = select((64, 256), top_k=8, platform="cuda")
    assert on_gpu[:2] == ("mosaic_gpu", "warp")
    assert set(on_gpu.reasons) == {"xla", "emulator"}
    assert "not on 'cpu'" in select((64, 256), top_k=8, platform="cpu").reasons["mosaic_gpu"]
    large = select((64, 2048), top_k=8, platform="cuda")
    assert large[:2] == ("xla", "sort") and "1024 experts" in large.reasons["mosaic_gpu"]
    assert select((65, 256), top_k=8, block_size=16, platform="cuda").form.startswith("warp, ")
    assert select((64, 256), top_k=8, block_size=16, platform="cuda").form == "one launch"
    assert select((0, 256), top_k=8, platform="cpu").form == "empty"
    named = select((64, 256), top_k=8, platform="cpu", implementation="emulator")
    assert named.reasons["xla"] == "implementation='emulator' was asked for"
    with pytest.raises(NotImplementedError, match="run on NVIDIA GPUs only"):
        select((64, 256), top_k=8, platform="cpu", implementation="mosaic_gpu")
    with pytest.raises(TypeError, match="options must be among"):
        select((64, 256), top_k=8, scorings="softmax")
    with pytest.raises(TypeError, match="shape must be a pair of ints"):
        select(64, top_k=8)


def test_dtypes_of_the_oracle_are_those_of_the_library():
    from moe_align_jax._router.problem import GREATEST

    assert {d: float(ml_dtypes.finfo(d).max) for d in DTYPES} == GREATEST


@pytest.mark.parametrize(("lower", "higher"), [(3, 200), (3, 4), (127, 128)])
@pytest.mark.parametrize("top_k", [4, 5])
def test_logits_that_differ_in_their_lowest_bits_alone_are_told_apart(lower, higher, top_k):
    """The greatest two, and then the K-th and the one behind it; an id takes the place of those bits."""
    ordinary = np.linspace(-2, -1, 256, dtype=np.float32)
    logits = np.stack([ordinary, ordinary])
    logits[1, [10, 20, 30, 40][: top_k - 1]] = [9, 8, 7, 6][: top_k - 1]
    logits[:, lower], logits[:, higher] = np.float32(1), np.nextafter(np.float32(1), np.float32(2))
    _, ids = maj.route_topk(logits, top_k=top_k, implementation="emulator")
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=1, kind="stable")[:, :top_k])


@pytest.mark.parametrize(("num_experts", "top_k"), [(256, 8), (60, 5)])
def test_keys_move_by_multiplications_where_tokens_are_many(monkeypatch, num_experts, top_k):
    """The same choice, of few tokens that count as many."""
    from moe_align_jax._router import kernel
    from moe_align_jax._router.problem import RouteProblem
    from moe_align_jax._simt import emulator

    logits = router_oracle.make_logits(6, num_experts, "float32", seed=1)
    calls, multiply_if = [], emulator.EmulatedSimt.multiply_if

    def counted(t, *given):
        calls.append(t)
        return multiply_if(t, *given)

    monkeypatch.setattr(emulator.EmulatedSimt, "multiply_if", counted)
    for first, multiplies in ((7, False), (6, True)):
        monkeypatch.setattr(kernel, "MULTIPLY_FROM", first)
        calls.clear()
        program = kernel.build(RouteProblem(6, num_experts, top_k))
        found = emulator.run(program, [logits.ravel().view(np.int32)])
        weights, ids = (np.asarray(x).reshape(6, top_k) for x in found)
        router_oracle.assert_routed((weights.view(np.float32), ids), logits, top_k=top_k)
        assert bool(calls) == multiplies
