"""The adapters for MaxText, haliax and Equinox: their signatures, and their results against plain NumPy."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import moe_align_jax as maj
from moe_align_jax.adapters import haliax, maxtext
from tests.models.example import load

F32 = np.float32
SIZES = np.array([3, 0, 5, 2], np.int32)
M, K, N, G = 12, 8, 16, 4  # two rows behind the last group


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    lhs, rhs = (rng.standard_normal(s).astype(F32) for s in ((M, K), (G, K, N)))
    return lhs, rhs


def product(lhs, rhs, sizes, offset=0):
    """float64; zero for rows of groups that rhs does not have."""
    out, row = np.zeros((len(lhs), rhs.shape[2])), 0
    for group, size in enumerate(sizes):
        if 0 <= group - offset < len(rhs):
            out[row : row + size] = lhs[row : row + size].astype(float) @ rhs[group - offset]
        row += size
    return out


def close(got, want):
    np.testing.assert_allclose(np.asarray(got, float), want, rtol=2e-5, atol=2e-5)


# -- MaxText's gmm ----------------------------------------------------------------------------------------

# `maxtext.kernels.megablox.ops.gmm` at commit e591f30 of August 2026: names in order, and their defaults.
MAXTEXT_GMM = {
    "lhs": inspect.Parameter.empty,
    "rhs": inspect.Parameter.empty,
    "group_sizes": inspect.Parameter.empty,
    "preferred_element_type": jnp.float32,
    "tiling": (128,) * 9,
    "group_offset": None,
    "existing_out": None,
    "transpose_rhs": False,
    "interpret": None,
    "lhs_quantize_dtype": None,
    "rhs_quantize_dtype": None,
    "use_qwix_quantization": False,
    "use_tokamax_backend": False,
    "weight_gather_axes": None,
    "lhs_vma_axes": (),
    "rhs_vma_axes": (),
    "qwix_rule": None,
    "use_manual_quantization": False,
    "use_gmm_v2": False,
    "use_gmm_v2_heuristic_tiling": False,
    "partial_sum": None,
}
MAXTEXT_SPARSE_MATMUL = """inputs gate_logits pre_bias_logits w0_kernel w1_kernel wo_kernel w0_bias w1_bias
wo_bias input_ids"""


def test_the_signatures_are_those_of_the_other_projects():
    parameters = inspect.signature(maxtext.gmm).parameters
    assert {name: p.default for name, p in parameters.items()} == MAXTEXT_GMM
    assert list(parameters) == list(MAXTEXT_GMM)
    parameters = inspect.signature(maxtext.sparse_matmul).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == MAXTEXT_SPARSE_MATMUL.split()
    parameters = inspect.signature(haliax.ragged_dot).parameters
    assert list(parameters) == ["lhs_", "rhs_", "group_sizes_", "ar", "implementation"]
    assert parameters["ar"].default is False and parameters["implementation"].default == "auto"


def test_maxtext_gmm_as_maxtext_calls_it():
    lhs, rhs = arrays()
    parts = np.random.default_rng(1).standard_normal((M, N)).astype(F32)
    options = {
        "tiling": (512,) * 9,
        "lhs_quantize_dtype": None,
        "rhs_quantize_dtype": None,
        "use_qwix_quantization": False,
        "use_tokamax_backend": True,
        "weight_gather_axes": [],
        "lhs_vma_axes": (),
        "rhs_vma_axes": (),
        "use_gmm_v2": True,
        "use_gmm_v2_heuristic_tiling": True,
        "interpret": True,
    }

    @jax.jit
    def run(lhs, rhs, sizes, parts):
        plain = maxtext.gmm(
            lhs=lhs,
            rhs=rhs,
            group_sizes=sizes,
            preferred_element_type=F32,
            group_offset=0,
            **options,
        )
        summed = maxtext.gmm(
            lhs=lhs,
            rhs=rhs[1:3],
            group_sizes=sizes,
            preferred_element_type=jnp.bfloat16,
            group_offset=jnp.int32(1),
            partial_sum=parts,
            **options,
        )
        return plain, summed

    plain, summed = run(lhs, rhs, SIZES, parts)
    close(plain, product(lhs, rhs, SIZES))
    assert summed.dtype == jnp.bfloat16
    want = product(lhs, rhs[1:3], SIZES, offset=1) + parts
    np.testing.assert_allclose(np.asarray(summed, float), want, rtol=2**-8, atol=1e-6)


def test_maxtext_gmm_without_an_offset_takes_the_first_groups():
    """As megablox does: rhs may hold fewer matrices than there are groups."""
    lhs, rhs = arrays()
    old = np.full((M, N), 7, F32)
    got = maxtext.gmm(
        lhs, rhs[:3].swapaxes(1, 2).copy(), SIZES, F32, existing_out=old, transpose_rhs=True
    )
    want = product(lhs, rhs[:3], SIZES)
    want[8:] = 7  # the fourth group's rows, and those behind it
    close(got, want)


def test_the_gradients_of_maxtext_gmm():
    lhs, rhs = arrays()
    direction = np.random.default_rng(2).standard_normal((M, N)).astype(F32)

    def loss(lhs, rhs, parts):
        return jnp.sum(maxtext.gmm(lhs, rhs, SIZES, partial_sum=parts) * direction)

    d_lhs, d_rhs, d_parts = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(
        lhs, rhs, np.zeros_like(direction)
    )
    close(d_lhs, product(direction, rhs.swapaxes(1, 2), SIZES))
    edges = [0, *np.cumsum(SIZES)]
    for group, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        close(d_rhs[group], lhs[a:b].T.astype(float) @ direction[a:b])
    close(d_parts, direction)


def test_maxtext_gmm_inside_a_shard_map_over_experts():
    """A ring of experts: all rows on each device, which multiplies those of its own experts."""
    lhs, rhs = arrays()
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def body(lhs, rhs, sizes):
        start = jax.lax.axis_index("expert") * 2
        out = maxtext.gmm(lhs, rhs, sizes, F32, group_offset=start, lhs_vma_axes=("expert",))
        return jax.lax.psum(out, "expert")

    run = jax.shard_map(body, mesh=mesh, in_specs=(P(), P("expert"), P()), out_specs=P())
    close(jax.jit(run)(lhs, rhs, SIZES), product(lhs, rhs, SIZES))


@pytest.mark.parametrize(
    "options",
    [
        {"lhs_quantize_dtype": jnp.int8},
        {"rhs_quantize_dtype": jnp.int8},
        {"use_qwix_quantization": True},
        {"qwix_rule": object()},
        {"use_manual_quantization": True},
        {"weight_gather_axes": [("fsdp", 0)]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_maxtext_gmm_refuses_what_it_would_leave_out(options):
    [name] = options
    with pytest.raises(
        NotImplementedError, match=rf"adapters\.maxtext\.gmm: {name} must be left out; got"
    ):
        maxtext.gmm(*arrays(), SIZES, **options)


@pytest.mark.parametrize("value", [np.zeros(0), np.ones((2, 2)), jnp.ones(2)], ids=repr)
def test_maxtext_gmm_asks_no_array_whether_it_is_true(value):
    """NumPy's own errors came out."""
    for name in ("use_qwix_quantization", "use_manual_quantization", "weight_gather_axes"):
        with pytest.raises(NotImplementedError, match=rf"gmm: {name} must be left out; got "):
            maxtext.gmm(*arrays(), SIZES, **{name: value})
    shape = jax.ShapeDtypeStruct((M, N), F32)
    with pytest.raises(TypeError, match="partial_sum must be a float array; got float32"):
        maxtext.gmm(*arrays(), SIZES, partial_sum=shape)


def test_maxtext_gmm_names_wrong_arguments():
    lhs, rhs = arrays()
    with pytest.raises(
        ValueError, match=r"partial_sum must have shape \[12, 16\]; got float32 \[12, 15\]"
    ):
        maxtext.gmm(lhs, rhs, SIZES, partial_sum=np.zeros((M, N - 1), F32))
    with pytest.raises(TypeError, match="use_gmm_v2_heuristic_tiling must be True or False; got"):
        maxtext.gmm(lhs, rhs, SIZES, *list(MAXTEXT_GMM.values())[3:19], np.zeros((M, N), F32))
    with pytest.raises(TypeError, match="partial_sum must be a float array; got int32"):
        maxtext.gmm(lhs, rhs, SIZES, partial_sum=np.zeros((M, N), np.int32))
    both = {"partial_sum": np.zeros((M, N), F32), "existing_out": np.zeros((M, N), F32)}
    with pytest.raises(ValueError, match="existing_out must be None beside partial_sum"):
        maxtext.gmm(lhs, rhs, SIZES, **both)


@pytest.mark.parametrize("parts", [None, np.ones((M, N), F32)])
def test_maxtext_gmm_has_the_dtype_that_is_asked_for(parts):
    """With a partial sum None gave float32, int8 cut the sums, and another word was NumPy's to refuse."""
    lhs, rhs = (jnp.asarray(a, jnp.bfloat16) for a in arrays())
    for wanted, dtype in ((None, "bfloat16"), ("float16", "float16"), (jnp.float32, "float32")):
        got = maxtext.gmm(lhs, rhs, SIZES, wanted, partial_sum=parts)
        want = product(np.asarray(lhs, F32), np.asarray(rhs, F32), SIZES)
        want += 0 if parts is None else parts
        assert str(got.dtype) == dtype
        np.testing.assert_allclose(np.asarray(got, float), want, rtol=1e-2, atol=1e-2)
    for other in ("int8", "float64", "float8_e4m3fn", "none such"):
        with pytest.raises(TypeError, match="preferred_element_type must be None or one of bfloat"):
            maxtext.gmm(lhs, rhs, SIZES, other, partial_sum=parts)


class Wrapped:
    """What a framework puts around an array: jax.numpy takes it, the functions here do not."""

    __module__ = "framework"

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __jax_array__(self):
        return self.array


def test_a_wrapped_array_is_called_by_its_class():
    """It was "must be an array; got float32 [12, 8]", of a Flax variable that was passed as it is."""
    lhs, rhs = map(jnp.asarray, arrays())
    inputs, logits, w0, w1, wo, *_ = map(jnp.asarray, block())
    ids = np.zeros((M, 1), np.int32)
    calls = {
        "lhs": lambda: haliax.ragged_dot(Wrapped(lhs), rhs, SIZES),
        "rhs": lambda: maxtext.gmm(lhs, Wrapped(rhs), SIZES),
        "group_sizes": lambda: maxtext.gmm(lhs, rhs, Wrapped(jnp.asarray(SIZES))),
        "w_down": lambda: maj.fused_moe(lhs, rhs, Wrapped(rhs), np.ones((M, 1), F32), ids),
        "topk_ids": lambda: maj.fused_moe(lhs, rhs, rhs[:, :, :8], lhs[:, :1], Wrapped(ids)),
        "logits": lambda: maj.route_topk(Wrapped(lhs), top_k=1),
        "correction_bias": lambda: maj.route_topk(lhs, top_k=1, correction_bias=Wrapped(lhs[0])),
        "inputs": lambda: maxtext.sparse_matmul(
            *(Wrapped(inputs), logits, None, w0, w1, wo), num_experts_per_tok=1
        ),
        "w1_kernel": lambda: maxtext.sparse_matmul(
            *(inputs, logits, None, w0, Wrapped(w1), wo), num_experts_per_tok=1
        ),
    }
    for name, call in calls.items():
        said = rf"{name} must be an? [a-z ]*array; got a Wrapped of \w+ \[.*\]\. Pass the array that it"
        with pytest.raises(TypeError, match=said):
            call()


# -- MaxText's sparse_matmul ------------------------------------------------------------------------------

BATCH, LENGTH, HIDDEN, FFN, EXPERTS, TOP_K = 2, 5, 8, 6, 8, 3


def block(seed=0):
    """inputs, logits, w0, w1, wo and their biases."""
    rng = np.random.default_rng(seed)
    shapes = [(BATCH, LENGTH, HIDDEN), (BATCH, LENGTH, EXPERTS)]
    shapes += [(EXPERTS, HIDDEN, FFN)] * 2 + [(EXPERTS, FFN, HIDDEN)]
    shapes += [(EXPERTS, FFN)] * 2 + [(EXPERTS, HIDDEN)]
    return [rng.standard_normal(s).astype(F32) for s in shapes]


def experts_of(inputs, weights, ids, w0, w1, wo, b0, b1, bo):
    """float64, one pair at a time; weights and ids are `[batch, length, K]`."""
    out = np.zeros(inputs.shape)
    for place in np.ndindex(*ids.shape):
        e, x = ids[place], inputs[place[:2]].astype(float)
        gate, up = x @ w0[e] + b0[e], x @ w1[e] + b1[e]
        out[place[:2]] += weights[place] * ((gate / (1 + np.exp(-gate)) * up) @ wo[e] + bo[e])
    return out


def test_maxtext_sparse_matmul_with_a_softmax_of_the_chosen_logits():
    inputs, logits, w0, w1, wo, *_ = block()
    got, loss, update = jax.jit(
        lambda *arrays: maxtext.sparse_matmul(
            arrays[0],
            arrays[1],
            None,
            *arrays[2:],
            num_experts_per_tok=TOP_K,
            norm_topk_prob=True,
            load_balance_loss_weight=0.5,
            routed_bias_update_rate=0.25,
        )
    )(inputs, logits, w0, w1, wo)
    ids = np.argsort(-logits, axis=2)[..., :TOP_K]
    picked = np.exp(np.take_along_axis(logits, ids, 2).astype(float))
    weights = picked / picked.sum(2, keepdims=True)
    none = np.zeros((EXPERTS, 1))
    close(got, experts_of(inputs, weights, ids, w0, w1, wo, none, none, none))
    probabilities = np.exp(logits.astype(float))
    probabilities /= probabilities.sum(2, keepdims=True)
    want = 0.0
    for b in range(BATCH):
        share = np.bincount(ids[b].ravel(), minlength=EXPERTS) / LENGTH
        want += EXPERTS * np.sum(share * probabilities[b].mean(0)) / BATCH
    close(loss, 0.5 * want)
    counts = np.bincount(ids.ravel(), minlength=EXPERTS)
    close(update, 0.25 * np.sign(ids.size / EXPERTS - counts))


def test_maxtext_biases_may_differ_in_dtype():
    """Where jax is configured to promote nothing, that was an error of jax' own about a concatenation."""
    inputs, logits, w0, w1, wo, b0, b1, bo = map(jnp.asarray, block())
    b0, bo = b0.astype(jnp.bfloat16), bo.astype(jnp.float16)

    def run(*biases):
        given = inputs, logits, None, w0, w1, wo, *biases
        return maxtext.sparse_matmul(*given, num_experts_per_tok=TOP_K)[0]

    want = run(*(b.astype(jnp.float32) for b in (b0, b1, bo)))
    with jax.numpy_dtype_promotion("strict"):
        np.testing.assert_array_equal(run(b0, b1, bo), want)
        derivative = jax.grad(lambda *biases: jnp.sum(run(*biases)), argnums=(0, 1, 2))(b0, b1, bo)
    assert [str(d.dtype) for d in derivative] == ["bfloat16", "float32", "float16"]


@pytest.mark.parametrize("shape", [(0, LENGTH), (BATCH, 0)])
def test_maxtext_sparse_matmul_of_no_tokens(shape):
    """The loss is 0, as that of `load_balancing_loss`: it was NaN, and so was a loss that it was added to."""
    _, _, *weights = map(jnp.asarray, block())
    inputs, logits = (jnp.zeros((*shape, size), F32) for size in (HIDDEN, EXPERTS))
    options = {"num_experts_per_tok": TOP_K, "load_balance_loss_weight": 0.5}

    def loss_of(logits):
        return maxtext.sparse_matmul(inputs, logits, None, *weights, **options)[1]

    out, loss, _ = maxtext.sparse_matmul(inputs, logits, None, *weights, **options)
    assert out.shape == inputs.shape and loss.dtype == jnp.float32 and float(loss) == 0.0
    assert jax.grad(loss_of)(logits).shape == logits.shape


def test_maxtext_sparse_matmul_with_the_groups_and_the_bias_of_deepseek():
    inputs, logits, w0, w1, wo, b0, b1, bo = block(1)
    scores = 1 / (1 + np.exp(-logits.astype(float)))
    bias = np.random.default_rng(3).uniform(-0.5, 0.5, EXPERTS)
    got, loss, update = maxtext.sparse_matmul(
        inputs,
        (scores + bias).astype(F32),
        scores.astype(F32),
        *(w0, w1, wo, b0, b1, bo),
        num_experts_per_tok=TOP_K,
        routed_score_func="sigmoid",
        routed_scaling_factor=2.5,
        n_routing_groups=4,
        topk_routing_group=2,
    )
    assert loss is None and update is None
    ids = np.zeros((BATCH, LENGTH, TOP_K), int)
    for place in np.ndindex(BATCH, LENGTH):
        biased = (scores[place] + bias).reshape(4, 2)
        kept = np.argsort(-biased.sum(1))[:2]
        masked = np.full((4, 2), -np.inf)
        masked[kept] = biased[kept]
        ids[place] = np.argsort(-masked.ravel())[:TOP_K]
    picked = np.take_along_axis(scores, ids, 2)
    weights = 2.5 * picked / picked.sum(2, keepdims=True)
    close(got, experts_of(inputs, weights, ids, w0, w1, wo, b0, b1, bo))


def test_maxtext_sparse_matmul_names_wrong_arguments():
    inputs, logits, w0, w1, wo, b0, *_ = block()
    call, options = maxtext.sparse_matmul, {"num_experts_per_tok": 2}
    with pytest.raises(NotImplementedError, match="input_ids must be None"):
        call(inputs, logits, None, w0, w1, wo, input_ids=np.zeros((2, 5), np.int32), **options)
    with pytest.raises(ValueError, match=r"inputs must have shape \[batch, length, H\]"):
        call(inputs[0], logits, None, w0, w1, wo, **options)
    with pytest.raises(ValueError, match="w1_bias must be there with w0_bias"):
        call(inputs, logits, None, w0, w1, wo, b0, **options)
    with pytest.raises(ValueError, match="pre_bias_logits must have shape"):
        call(inputs, logits, logits[:, :, 1:], w0, w1, wo, **options)
    with pytest.raises(ValueError, match="topk_routing_group must be"):
        call(inputs, logits, logits, w0, w1, wo, n_routing_groups=4, **options)
    with pytest.raises(ValueError, match="n_routing_groups must"):
        call(
            inputs, logits, logits, w0, w1, wo, n_routing_groups=3, topk_routing_group=1, **options
        )


def test_maxtext_sparse_matmul_refuses_tokens_of_another_batch():
    """As many tokens in another order of batch and length were multiplied by each other's experts."""
    inputs, logits, w0, w1, wo, *_ = block()
    turned = logits.reshape(logits.shape[1], logits.shape[0], -1)
    rule = r"gate_logits must have shape \[2, 5, E\], as inputs has; got float32 \[5, 2, "
    with pytest.raises(ValueError, match=rule):
        maxtext.sparse_matmul(inputs, turned, None, w0, w1, wo, num_experts_per_tok=2)


@pytest.mark.parametrize(
    "name", ["inputs", "gate_logits", "pre_bias_logits", "w0_kernel", "wo_kernel", "w1_bias"]
)
def test_maxtext_sparse_matmul_takes_arrays_alone(name):
    inputs, logits, w0, w1, wo, b0, b1, bo = block()
    given = dict(
        zip(
            ("inputs", "gate_logits", "pre_bias_logits", "w0_kernel", "w1_kernel", "wo_kernel"),
            (inputs, logits, logits, w0, w1, wo),
            strict=True,
        )
    )
    given |= {"w0_bias": b0, "w1_bias": b1, "wo_bias": bo, "num_experts_per_tok": 2}
    shape = jax.ShapeDtypeStruct(given[name].shape, F32)  # as a tensor of PyTorch: no array of jax
    with pytest.raises(TypeError, match=rf"sparse_matmul: {name} must be a (jax|float) array"):
        maxtext.sparse_matmul(**{**given, name: shape})


@pytest.mark.parametrize("name", ["w0_bias", "w1_bias", "wo_bias"])
def test_maxtext_sparse_matmul_speaks_of_its_own_biases(name):
    inputs, logits, w0, w1, wo, b0, b1, bo = block()
    biases = {"w0_bias": b0, "w1_bias": b1, "wo_bias": bo}
    for value, kind in ((biases[name][:, 1:], ValueError), (True, TypeError)):
        with pytest.raises(kind, match=rf"adapters\.maxtext\.sparse_matmul: {name} must "):
            maxtext.sparse_matmul(
                *(inputs, logits, None, w0, w1, wo),
                **{**biases, name: value},
                num_experts_per_tok=2,
            )


def test_maxtext_weights_of_the_configuration_may_be_ints_of_any_size():
    """An int beyond int32 was an OverflowError of jax'."""
    inputs, logits, w0, w1, wo, *_ = block()
    options = {"num_experts_per_tok": 2, "routed_bias_update_rate": 2**40}
    given = inputs, logits, None, w0, w1, wo
    _, one, _ = maxtext.sparse_matmul(*given, load_balance_loss_weight=1, **options)
    _, many, update = maxtext.sparse_matmul(*given, load_balance_loss_weight=2**40, **options)
    np.testing.assert_allclose(many, 2.0**40 * one)
    assert set(np.abs(np.asarray(update))) <= {0, 2.0**40}


@pytest.mark.parametrize(
    "argument, value, kind",
    [
        # A name that it does not know was taken for none: weights of a sum other than 1, in silence.
        ("routed_score_func", "Sigmoid", ValueError),
        ("routed_score_func", None, ValueError),
        ("num_experts_per_tok", 10**6, ValueError),
        ("routed_scaling_factor", None, TypeError),
        ("routed_scaling_factor", float("nan"), ValueError),
        ("load_balance_loss_weight", "0.01", TypeError),
        ("routed_bias_update_rate", [0.1], TypeError),
        ("routed_bias_update_rate", float("inf"), ValueError),
        ("n_routing_groups", None, TypeError),
        ("n_routing_groups", -2, ValueError),
        ("topk_routing_group", 1.0, TypeError),
    ],
)
def test_maxtext_sparse_matmul_checks_its_configuration(argument, value, kind):
    inputs, logits, w0, w1, wo, *_ = block()
    options = {"num_experts_per_tok": 2} | {argument: value}
    with pytest.raises(kind, match=rf"adapters\.maxtext\.sparse_matmul: {argument} must "):
        maxtext.sparse_matmul(inputs, logits, logits, w0, w1, wo, **options)


# -- haliax and Equinox -----------------------------------------------------------------------------------


def test_haliax_ragged_dot_and_its_sum_over_the_model_axis():
    lhs, rhs = arrays()
    close(haliax.ragged_dot(lhs, rhs, SIZES), product(lhs, rhs, SIZES))
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    run = jax.shard_map(
        lambda lhs, rhs, sizes: haliax.ragged_dot(lhs, rhs, sizes, True, "xla"),
        mesh=mesh,
        in_specs=(P(None, "model"), P(None, "model"), P()),
        out_specs=P(),
    )
    close(jax.jit(run)(lhs, rhs, SIZES), product(lhs, rhs, SIZES))


def test_haliax_sum_needs_the_model_axis():
    """Outside of it jax' NameError of an unbound axis came out."""
    with pytest.raises(ValueError, match=r"ar must be False outside of a jax\.shard_map over"):
        haliax.ragged_dot(*arrays(), SIZES, ar=True)
    with pytest.raises(TypeError, match="ar must be a Python bool; got int 1"):
        haliax.ragged_dot(*arrays(), SIZES, ar=1)


def test_haliax_kernels_are_not_ours():
    with pytest.raises(
        ValueError, match=r"ragged_dot: implementation must be one of .*got 'triton'"
    ):
        haliax.ragged_dot(*arrays(), SIZES, implementation="triton")


def test_an_equinox_block_learns():
    example = load("equinox_moe", "equinox")
    with example.settings():
        errors = example.main(steps=30)
    assert errors[-1] < 0.6 * errors[0]
    assert all(np.isfinite(errors))
