"""Losses of the router, the bias update, and dropping by capacity, against plain NumPy and Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec

import moe_align_jax as maj
from tests.matmul.oracle import error
from tests.moe_layer import oracle
from tests.moe_layer.test_moe_layer import make_layer

TOKENS, EXPERTS, TOP_K = 24, 6, 2


def routed(seed=0):
    """(float32 logits, the top-2 ids of them, pairs of each expert)."""
    logits = np.random.default_rng(seed).standard_normal((TOKENS, EXPERTS)).astype(np.float32)
    ids = np.argsort(-logits, axis=1)[:, :TOP_K].astype(np.int32)
    return logits, ids, np.bincount(ids.reshape(-1), minlength=EXPERTS).astype(np.int32)


def probabilities(logits, scoring):
    wide = np.asarray(logits, np.float64)
    score = np.exp(wide) if scoring == "softmax" else 1 / (1 + np.exp(-wide))
    return score / score.sum(axis=1, keepdims=True)


def balance(logits, counts, scoring="softmax"):
    p = probabilities(logits, scoring).mean(axis=0)
    return len(counts) * float((counts / counts.sum() * p).sum())


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_load_balancing_loss(scoring):
    logits, _, counts = routed()
    ours = jax.value_and_grad(maj.load_balancing_loss)(logits, counts, scoring=scoring)
    np.testing.assert_allclose(ours[0], balance(logits, counts, scoring), rtol=1e-5)
    step = 1e-4
    for t, e in ((0, 0), (5, 3), (23, 5)):
        more, less = logits.astype(np.float64), logits.astype(np.float64)
        more[t, e] += step
        less[t, e] -= step
        slope = (balance(more, counts, scoring) - balance(less, counts, scoring)) / (2 * step)
        np.testing.assert_allclose(ours[1][t, e], slope, rtol=1e-3, atol=1e-7)


def test_load_balancing_loss_beside_transformers():
    """Theirs counts each of the K choices as a whole: K times ours."""
    logits, ids, counts = routed()
    routing = probabilities(logits, "softmax")
    mask = np.eye(EXPERTS)[ids]  # [T, K, E]
    theirs = (mask.mean(axis=0) * routing.mean(axis=0)[None]).sum() * EXPERTS
    np.testing.assert_allclose(TOP_K * maj.load_balancing_loss(logits, counts), theirs, rtol=1e-5)


def test_z_loss():
    logits, _, _ = routed()
    z = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    loss, slope = jax.value_and_grad(maj.router_z_loss)(logits)
    np.testing.assert_allclose(loss, (z**2).mean(), rtol=1e-5)
    want = 2 * z[:, None] * probabilities(logits, "softmax") / TOKENS
    np.testing.assert_allclose(slope, want, rtol=1e-4, atol=1e-7)
    large = maj.router_z_loss(np.full((2, 4), 1e4, np.float32))  # exp would overflow
    np.testing.assert_allclose(large, (1e4 + np.log(4)) ** 2, rtol=1e-5)


def test_tokens_that_are_not_real_count_nowhere():
    logits, ids, _ = routed()
    counts = np.bincount(ids[:9].reshape(-1), minlength=EXPERTS)
    dirty = logits.copy()
    dirty[9:] = np.nan

    @jax.jit
    def both(logits, count):
        loss = maj.load_balancing_loss(logits, counts, num_valid_tokens=count)
        return loss, maj.router_z_loss(logits, num_valid_tokens=count)

    for found, want in zip(
        both(dirty, jnp.int32(9)),
        (balance(logits[:9], counts), float(maj.router_z_loss(logits[:9]))),
        strict=True,
    ):
        np.testing.assert_allclose(found, want, rtol=1e-5)
    slope = jax.grad(lambda x: sum(both(x, jnp.int32(9))))(dirty)
    assert np.isfinite(slope).all() and not np.asarray(slope)[9:].any()
    assert float(maj.router_z_loss(dirty, num_valid_tokens=0)) == 0
    nothing = np.zeros(EXPERTS, np.int32)
    assert float(maj.load_balancing_loss(dirty, nothing, num_valid_tokens=0)) == 0


def test_bias_update():
    counts = np.array([7, 2, 4, 3, 4], np.int32)
    bias = np.array([0.5, -0.25, 0.0, 1.0, 2.0], np.float32)
    want = bias + np.float32(0.125) * np.sign(counts.mean() - counts).astype(np.float32)
    np.testing.assert_array_equal(maj.update_router_bias(bias, counts, rate=0.125), want)
    # The mean 2**24 + 1/3 is no float32, and its neighbours are told from it.
    near = np.array([2**24, 2**24, 2**24 + 1], np.int32)
    moved = maj.update_router_bias(np.zeros(3, np.float32), near, rate=1.0)
    assert np.asarray(moved).tolist() == [1.0, 1.0, -1.0]
    half = maj.update_router_bias(jnp.zeros(3, jnp.bfloat16), jnp.array([1, 1, 1], jnp.uint8))
    assert half.dtype == jnp.bfloat16 and not np.asarray(half).any()


def test_counts_whose_sum_or_value_does_not_fit_int32():
    for counts in ([2**30] * 3 + [5], [2**31 - 1] * 4, [2**31 - 1, 2**31 - 2, 2**31 - 3, 0]):
        mean = sum(counts) / len(counts)
        want = [-1.0 if c > mean else 1.0 if c < mean else 0.0 for c in counts]
        counts = np.array(counts, np.int32)
        assert maj.update_router_bias(np.zeros(4, np.float32), counts, rate=1.0).tolist() == want
    wide = np.array([2**33, 1, 1, 1])  # its low 32 bits are 0
    bias = maj.update_router_bias(np.zeros(4, np.float32), wide, rate=1.0)
    assert bias.tolist() == [-1.0, 1.0, 1.0, 1.0]
    logits = np.zeros((4, 2), np.float32)
    assert float(maj.load_balancing_loss(logits, np.array([2**40, 2**40]))) == 1.0


def test_sigmoid_scores_that_are_nearly_zero_have_a_gradient():
    logits = np.full((2, 3), -60, np.float32)
    got = jax.grad(maj.load_balancing_loss)(logits, np.ones(3, np.int32), scoring="sigmoid")
    assert np.isfinite(got).all()


def test_losses_of_tokens_on_several_devices():
    """Those of all tokens, the same on each device; the gradient too."""
    logits, _, counts = routed()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    parts = np.stack(
        [np.bincount(part.reshape(-1), minlength=EXPERTS) for part in np.split(routed()[1], 4)]
    ).astype(np.int32)

    def body(logits, part):
        part = part[0]
        balance = maj.load_balancing_loss(logits, part, axis_name="data")
        z = maj.router_z_loss(logits, axis_name="data")
        bias = maj.update_router_bias(jnp.zeros(EXPERTS, jnp.float32), part, axis_name="data")
        return balance, z, bias

    split = jax.jit(
        jax.shard_map(
            body, mesh=mesh, in_specs=(Spec("data"), Spec("data")), out_specs=(Spec(),) * 3
        )
    )
    found = split(logits, parts)
    np.testing.assert_allclose(found[0], balance(logits, counts), rtol=1e-5)
    np.testing.assert_allclose(found[1], maj.router_z_loss(logits), rtol=1e-5)
    zero = np.zeros(EXPERTS, np.float32)
    np.testing.assert_array_equal(found[2], maj.update_router_bias(zero, counts))
    slope = jax.grad(lambda x: sum(split(x, parts)[:2]))(logits)
    whole = jax.grad(lambda x: maj.load_balancing_loss(x, counts) + maj.router_z_loss(x))(logits)
    np.testing.assert_allclose(slope, whole, rtol=1e-4, atol=1e-6)


LOGITS, COUNTS = np.zeros((4, 3), np.float32), np.zeros(3, np.int32)


@pytest.mark.parametrize(
    ("kind", "text", "call"),
    [
        (TypeError, "logits must be a float array", lambda f: f(LOGITS.astype(int), COUNTS)),
        (ValueError, r"logits must have shape \[T, E\]", lambda f: f(LOGITS[0], COUNTS)),
        (ValueError, r"tokens_per_expert must have shape \[3\]", lambda f: f(LOGITS, COUNTS[:2])),
        (TypeError, "tokens_per_expert must be an array", lambda f: f(LOGITS, [0, 0, 0])),
        (ValueError, "scoring must be", lambda f: f(LOGITS, COUNTS, scoring="tanh")),
        (TypeError, "num_valid_tokens must be", lambda f: f(LOGITS, COUNTS, num_valid_tokens=1.0)),
    ],
)
def test_errors_of_the_losses(kind, text, call):
    with pytest.raises(kind, match=f"^load_balancing_loss: {text}.*; got .*\\. "):
        call(maj.load_balancing_loss)
    with pytest.raises(TypeError, match="^update_router_bias: tokens_per_expert must be an int"):
        maj.update_router_bias(np.zeros(3, np.float32), np.zeros(3, np.float32))


# -- capacity --------------------------------------------------------------------------------------


def capped(ids, weights, experts, capacity, drop, valid=None):
    """(ids, kept, dropped) by a loop over the pairs in the rule's order."""
    ids = np.asarray(ids)
    tokens, top_k = ids.shape
    pairs = [(t, k) for t in range(tokens) for k in range(top_k)]
    if drop == "choice":
        pairs.sort(key=lambda pair: pair[1])
    elif drop == "weight":
        pairs.sort(key=lambda pair: -float(np.nan_to_num(weights[pair], nan=-np.inf)))
    out = np.full(ids.shape, -1, np.int32)
    kept, dropped = np.zeros(experts, np.int32), np.zeros(experts, np.int32)
    for t, k in pairs:
        e = int(ids[t, k])
        if not 0 <= e < experts or (valid is not None and t >= valid):
            continue
        if kept[e] < capacity:
            out[t, k] = e
            kept[e] += 1
        else:
            dropped[e] += 1
    return out, kept, dropped


@pytest.mark.parametrize("drop", ["position", "choice", "weight"])
@pytest.mark.parametrize(("capacity", "valid"), [(3, None), (1, None), (100, None), (4, 11)])
def test_who_is_dropped(drop, capacity, valid):
    rng = np.random.default_rng(3)
    ids = rng.integers(-2, EXPERTS + 1, (TOKENS, 3))
    ids[4, 1] = 2**33 + 1  # would be 1 in 32 bits
    weights = np.round(rng.uniform(0, 1, ids.shape), 1).astype(np.float32)  # many are equal
    weights[5] = np.nan
    found = maj.drop_over_capacity(
        ids, weights, num_experts=EXPERTS, capacity=capacity, drop=drop, num_valid_tokens=valid
    )
    for ours, want in zip(found, capped(ids, weights, EXPERTS, capacity, drop, valid), strict=True):
        assert ours.dtype == jnp.int32
        np.testing.assert_array_equal(ours, want)


def test_capacity_of_a_factor():
    assert maj.expert_capacity(4096, top_k=2, num_experts=64, capacity_factor=1.25) == 160
    assert maj.expert_capacity(10, top_k=1, num_experts=4, capacity_factor=1.0) == 3
    assert maj.expert_capacity(1000, top_k=1, num_experts=10, capacity_factor=1.1) == 110
    assert maj.expert_capacity(0, top_k=1, num_experts=4, capacity_factor=1.0) == 1
    ids = np.zeros((10, 1), np.int32)
    kept = maj.drop_over_capacity(ids, num_experts=4, capacity_factor=1.0)
    assert kept.tokens_per_expert.tolist() == [3, 0, 0, 0]
    assert kept.dropped_per_expert.tolist() == [7, 0, 0, 0]
    none = maj.drop_over_capacity(ids[:0], num_experts=4, capacity_factor=1.0)
    assert none.topk_ids.shape == (0, 1) and not none.tokens_per_expert.any()


@pytest.mark.parametrize(
    ("kind", "text", "change"),
    [
        (TypeError, "rate must be a real number", {"rate": "x"}),
        (TypeError, "rate must be a real number", {"rate": None}),
        (TypeError, "rate must be a real number", {"rate": 1j}),
        (TypeError, "rate must be a real number", {"rate": True}),
        (ValueError, "rate must be a scalar", {"rate": np.zeros(3)}),
        (ValueError, "rate must be finite", {"rate": float("nan")}),
        (ValueError, "rate must be finite", {"rate": 10**400}),
        (ValueError, "rate must be finite", {"rate": np.float16(np.inf)}),
        (TypeError, "axis_name must be the name", {"axis_name": ["data"]}),
        (TypeError, "axis_name must be the name", {"axis_name": ("data", 5)}),
    ],
)
def test_errors_of_the_bias(kind, text, change):
    with pytest.raises(kind, match=f"^update_router_bias: {text}.*; got .*\\. "):
        maj.update_router_bias(jnp.zeros(3), jnp.array([1, 2, 3]), **change)
    if "axis_name" in change:
        with pytest.raises(kind, match=f"^router_z_loss: {text}.*; got .*\\. "):
            maj.router_z_loss(jnp.zeros((4, 3)), **change)
        with pytest.raises(kind, match=f"^load_balancing_loss: {text}.*; got .*\\. "):
            maj.load_balancing_loss(jnp.zeros((4, 3)), jnp.array([1, 2, 3]), **change)


def test_a_layer_with_dropped_pairs():
    """Its values, and gradients of the kept pairs alone, under jit."""
    (x, first, second, weights, ids), _ = make_layer(routing="uniform")
    want_ids = capped(ids, np.asarray(weights), 4, 3, "weight")[0]

    @jax.jit
    def layer(x, weights):
        kept = maj.drop_over_capacity(ids, weights, num_experts=4, capacity=3, drop="weight")
        return maj.fused_moe(x, first, second, weights, kept.topk_ids)

    want, _ = oracle.layer(*map(np.asarray, (x, first, second, weights)), want_ids)
    assert error(layer(x, weights), want) < 1e-5
    slope = np.asarray(jax.grad(lambda w: layer(x, w).sum())(weights))
    assert not slope[want_ids < 0].any() and slope[want_ids >= 0].all()
    # The layer is linear in the weights: a pair's slope is what it gives with weight 1.
    ones = np.ones_like(slope)
    for k in range(2):
        alone = np.where(np.arange(2)[None] == k, want_ids, -1)
        want, _ = oracle.layer(*map(np.asarray, (x, first, second, ones)), alone)
        np.testing.assert_allclose(slope[:, k], want.sum(axis=1), rtol=1e-4, atol=1e-5)


def test_a_capacity_of_symbolic_tokens_is_the_callers():
    """It was an error of jax' own about the truth of an array."""
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("t, 2"), jnp.int32)
    ids = jnp.array([[0, 1], [0, 2], [0, 1]], jnp.int32)

    def export(**options):
        def drop(ids):
            return maj.drop_over_capacity(ids, num_experts=3, drop="position", **options).topk_ids

        return jax.export.export(jax.jit(drop))(shape)

    with pytest.raises(ValueError, match="capacity_factor must be left out where .* is symbolic"):
        export(capacity_factor=1.0)
    assert export(capacity=2).call(ids).tolist() == [[0, 1], [0, 2], [-1, 1]]


@pytest.mark.parametrize(
    ("kind", "text", "change"),
    [
        (ValueError, "capacity must be given", {"capacity": None}),
        (ValueError, "capacity must be given", {"capacity_factor": 1.0}),
        (ValueError, "capacity must be at least 1", {"capacity": 0}),
        (ValueError, "capacity_factor must be above 0", {"capacity": None, "capacity_factor": 0}),
        (TypeError, "capacity_factor must be", {"capacity": None, "capacity_factor": "1"}),
        (ValueError, "drop must be one of", {"drop": "random"}),
        (ValueError, "topk_weights must be given", {"drop": "weight"}),
        (TypeError, "topk_ids must be an integer", {"topk_ids": np.zeros((3, 2))}),
        (ValueError, r"topk_ids must have shape \[T, K\]", {"topk_ids": np.zeros(3, np.int32)}),
    ],
)
def test_errors_of_capacity(kind, text, change):
    given = {"topk_ids": np.zeros((3, 2), np.int32), "num_experts": 4, "capacity": 2} | change
    with pytest.raises(kind, match=f"^drop_over_capacity: {text}.*; got .*\\. "):
        maj.drop_over_capacity(**given)
