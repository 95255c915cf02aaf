"""fused_moe in training: scanned and rematerialised layers, master weights, donation, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from moe_align_jax._moe_layer import plan
from tests.matmul.oracle import error
from tests.moe_layer.test_moe_layer import normal

TOKENS, TOP_K, EXPERTS, HIDDEN, FFN, LAYERS = 24, 2, 4, 16, 8, 2


def model(seed=0):
    """(bfloat16 x, float32 (gate_up, down) of every layer, weights, ids); an expert has no token."""
    rng = np.random.default_rng(seed)
    x = normal(rng, (TOKENS, HIDDEN), "bfloat16")
    first = normal(rng, (LAYERS, EXPERTS, HIDDEN, 2 * FFN), "float32", HIDDEN**-0.5)
    second = normal(rng, (LAYERS, EXPERTS, FFN, HIDDEN), "float32", FFN**-0.5)
    ids = rng.integers(-1, EXPERTS - 1, (TOKENS, TOP_K)).astype(np.int32)
    weights = rng.uniform(0.2, 1.0, ids.shape).astype(np.float32)
    weights[ids < 0] = np.nan
    return x, (first, second), jnp.asarray(weights), jnp.asarray(ids)


def forward(x, experts, weights, ids, policy):
    @functools.partial(jax.checkpoint, policy=policy)
    def one(x, layer):
        return x + maj.fused_moe(x, *layer, weights, ids), None

    return jax.lax.scan(one, x, experts)[0]


def dense_gradient(x, experts, weights, ids):
    """float64, of the mean square: every expert on every token."""
    with jax.enable_x64(True):
        share = np.zeros((EXPERTS, TOKENS))
        for t, k in np.ndindex(TOKENS, TOP_K):
            if ids[t, k] >= 0:
                share[int(ids[t, k]), t] += float(weights[t, k])
        # bfloat16 is what is multiplied.
        rounded = [np.asarray(w.astype(jnp.bfloat16), np.float64) for w in experts]
        share = jnp.asarray(share)

        def loss(x, experts):
            for first, second in zip(*experts, strict=True):
                gate, up = jnp.split(jnp.einsum("th,ehn->etn", x, first), 2, axis=-1)
                y = jnp.einsum("etn,enh->eth", gate * jax.nn.sigmoid(gate) * up, second)
                x = x + jnp.sum(y * share[..., None], axis=0)
            return jnp.mean(x**2)

        return jax.grad(loss, (0, 1))(jnp.asarray(np.asarray(x, np.float64)), tuple(rounded))


def test_a_training_step():
    """Of float32 master weights that are donated, over scanned layers of which the products are kept."""
    x, experts, weights, ids = model()
    policy = jax.checkpoint_policies.save_only_these_names("fused_moe_gate_up")

    @functools.partial(jax.jit, donate_argnums=1)
    def step(x, experts):
        def loss(x, experts):
            y = forward(x, experts, weights, ids, policy).astype(jnp.float32)
            return jnp.mean(y**2)

        gradients = jax.grad(loss, (0, 1))(x, experts)
        return jax.tree.map(lambda w, g: w - 0.1 * g, experts, gradients[1]), gradients

    want_x, want = dense_gradient(x, experts, weights, ids)
    before = [np.array(w) for w in experts]  # copies: a view would keep them
    after, (d_x, gradients) = step(x, experts)
    assert all(w.is_deleted() for w in experts)
    assert d_x.dtype == jnp.bfloat16 and error(d_x, np.asarray(want_x)) < 2e-2
    for old, new, found, wanted in zip(before, after, gradients, want, strict=True):
        assert found.dtype == jnp.float32
        assert error(found, np.asarray(wanted)) < 2e-2
        assert not np.asarray(found)[:, EXPERTS - 1].any()  # it has no token
        np.testing.assert_allclose(new, old - 0.1 * np.asarray(found), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (jax.checkpoint_policies.save_only_these_names("fused_moe_gate_up"), True),
        (jax.checkpoint_policies.save_only_these_names("fused_moe_out"), False),
        (jax.checkpoint_policies.nothing_saveable, False),
        (jax.checkpoint_policies.everything_saveable, True),
    ],
)
def test_policies_by_name(policy, kept, capsys):
    """What a layer keeps for its derivative: the first products `[P, 2 N]`, or its operands alone."""
    x, (first, second), weights, ids = model()

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(x, first):
        return maj.fused_moe(x, first, second[0], weights, ids, block_size=8)

    jax.ad_checkpoint.print_saved_residuals(layer, x, first[0])
    rows = maj.max_num_tokens_padded(TOKENS * TOP_K, block_size=8, num_experts=EXPERTS)
    rows += -rows % 8
    assert (f"bf16[{rows},{2 * FFN}]" in capsys.readouterr().out) == kept


@pytest.mark.parametrize("policy", ["fused_moe_gate_up", "fused_moe_out", "another name"])
def test_the_second_product_is_never_computed_again(policy):
    """A rematerialised layer computes its first product again, unless the policy keeps it, and that alone."""
    x, (first, second), weights, ids = model()

    def products(layer):
        given = (x, first[0], second[0])
        text = str(jax.make_jaxpr(jax.vjp(layer, *given)[1])(x))
        return text.count("= grouped_matmul[")

    def layer(*given):
        return maj.fused_moe(*given, weights, ids, block_size=8)

    names = jax.checkpoint_policies.save_only_these_names(policy)
    again = products(jax.checkpoint(layer, policy=names)) - products(layer)
    assert again == (policy != "fused_moe_gate_up")


@pytest.mark.parametrize(
    ("dtype", "ffn"),
    [
        pytest.param("float32", 128, id="float32"),
        pytest.param("bfloat16", 128, id="bfloat16"),
        pytest.param("bfloat16", 512, id="bfloat16, rows that are copied"),
        pytest.param("bfloat16", 128, marks=pytest.mark.gpu, id="bfloat16, GPU"),
        pytest.param(
            "bfloat16", 512, marks=pytest.mark.gpu, id="bfloat16, GPU, across by a kernel"
        ),
    ],
)
def test_memory_of_a_derivative_does_not_grow_with_the_experts(dtype, ffn):
    """By XLA's own account: at most 1.2 times x, the first products and their derivative, what the
    activation made of them, and one array of H columns. With the layer's value."""
    tokens, top_k, experts, hidden, block = 2048, 4, 16, 256, 128
    like = jax.ShapeDtypeStruct
    x, routing = like((tokens, hidden), dtype), (tokens, top_k)
    first, second = (experts, hidden, 2 * ffn), (experts, ffn, hidden)
    given = [x, *(like(s, dtype) for s in (first, second)), like(routing, "float32")]

    def gradients(ct, ids, *floats):
        y, pull = jax.vjp(lambda *f: maj.fused_moe(*f, ids, block_size=block), *floats)
        return y, pull(ct)

    compiled = jax.jit(gradients).lower(x, like(routing, "int32"), *given).compile()
    rows = tokens * top_k + experts * (block - 1)
    most = tokens * hidden + rows * (2 * ffn + 2 * ffn + ffn + hidden)
    most *= jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.2 * most


def layer_of(tokens, top_k, experts, hidden, ffn, transposed=False):
    """Operands of a bfloat16 layer, a fifth of whose pairs are dropped and have NaN weights; a cotangent."""
    rng = np.random.default_rng(6)
    order = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    ids = np.where(rng.random(order.shape) < 0.2, -1, order)
    weights = np.where(ids < 0, np.nan, rng.uniform(0.2, 1.0, ids.shape)).astype(np.float32)
    x, ct = (normal(rng, (tokens, hidden), "bfloat16") for _ in range(2))
    first = normal(rng, (experts, hidden, 2 * ffn), "bfloat16", hidden**-0.5)
    second = normal(rng, (experts, ffn, hidden), "bfloat16", ffn**-0.5)
    if transposed:
        first, second = first.swapaxes(1, 2), second.swapaxes(1, 2)
    return (x, first, second, jnp.asarray(weights)), jnp.asarray(ids), ct


def result_and_gradients(floats, ids, ct, **options):
    """[y, the cotangents of x, both weights and the routing weights] by one program; and its text."""

    def both(ct, ids, *floats):
        y, pull = jax.vjp(lambda *f: maj.fused_moe(*f, ids, **options), *floats)
        return y, *pull(ct)

    if options["implementation"] == "emulator":
        return [*both(ct, ids, *floats)], ""
    lowered = jax.jit(both).lower(ct, ids, *floats)
    program = lowered.compile()
    poison = jnp.full((4, ids.size + 8192, floats[0].shape[1]), jnp.nan, jnp.bfloat16)
    jax.block_until_ready(poison).delete()  # the allocator gives this memory to the program
    found = program(ct, ids, *floats)
    for a, b in zip(found, program(ct, ids, *floats), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    return [*found], lowered.as_text()


def compare_gradients(found, want):
    """Each is finite and near."""
    for a, b in zip(found, want, strict=True):
        assert np.isfinite(np.asarray(a, np.float32)).all()
        assert error(a, np.asarray(b, np.float64)) < 1e-2


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("implementation", [None, "emulator"])
def test_a_backward_pass_that_copies_rows(implementation, transposed, monkeypatch):
    """In the interpreter rows that nobody wrote are NaN: what is copied, and what lies between products."""
    monkeypatch.setattr(plan, "_COLUMNS_TO_COPY", 64)
    monkeypatch.setattr(plan, "_PAIRS_TO_COPY", 8)
    floats, ids, ct = layer_of(22, 2, 3, 64, 64, transposed)
    options = {"block_size": 16, "transpose_rhs": transposed}
    run = functools.partial(result_and_gradients, floats, ids, ct, **options)
    want, _ = run(implementation="xla")
    found, text = run(implementation=implementation)
    compare_gradients(found, want)
    if implementation is None:  # the same sums of rows that XLA gathers
        assert [np.asarray(a).tobytes() for a in found] == [np.asarray(b).tobytes() for b in want]


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "rows", "copied"),
    [
        (1800, 8, 2, 176, True),
        (5000, 128, 8, 144, False),
        (7000, 128, 8, 184, True),
        (24100, 128, 8, 192, True),
    ],
)
def test_gradients_of_large_blocks_on_a_gpu(tokens, experts, top_k, rows, copied, transposed):
    """Into poisoned memory: what rows without a pair hold reaches no result. The same bits again."""
    assert maj.moe_block_size(tokens, top_k=top_k, num_experts=experts) == rows
    floats, ids, ct = layer_of(tokens, top_k, experts, 256, 512, transposed)
    options = {"transpose_rhs": transposed}
    found, text = result_and_gradients(floats, ids, ct, implementation="mosaic_gpu", **options)
    assert ("spread_rows" in text) == copied
    want, _ = result_and_gradients(floats, ids, ct, implementation="xla", **options)
    compare_gradients(found, want)


def test_a_second_derivative_is_that_of_dense_experts():
    """The backward pass is differentiated: its step across the activation has a derivative of its own."""
    rng = np.random.default_rng(2)
    experts, hidden, ffn = 3, 8, 16
    x, first, second = (
        jnp.asarray(normal(rng, size, "float32"))
        for size in ((5, hidden), (experts, hidden, 2 * ffn), (experts, ffn, hidden))
    )
    ids = jnp.asarray(rng.integers(0, experts, (5, 2)), jnp.int32)
    weights = jnp.asarray(rng.uniform(0.2, 1.0, (5, 2)), jnp.float32)

    def ours(x, first, second, weights):
        return maj.fused_moe(x, first, second, weights, ids, block_size=8)

    def dense(x, first, second, weights):
        gate, up = jnp.split(jnp.einsum("th,tkhn->tkn", x, first[ids]), 2, axis=-1)
        y = jnp.einsum("tkn,tknh->tkh", jax.nn.silu(gate) * up, second[ids])
        return jnp.einsum("tkh,tk->th", y, weights)

    def of_gradients(layer, given):
        every = (0, 1, 2, 3)
        gradients = jax.grad(lambda *given: jnp.sum(layer(*given) ** 2), every)
        second = jax.grad(lambda *given: sum(jnp.sum(g**2) for g in gradients(*given)), every)
        return jax.jit(second)(*given)

    given = (x, first, second, weights)
    found, want = of_gradients(ours, given), of_gradients(dense, given)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))


def test_a_full_last_block_loses_no_row():
    """`aligned` with exactly the rows in use, which all hold a pair: its last slot is no count of pairs."""
    rng = np.random.default_rng(5)
    sizes = ((16, HIDDEN), (1, HIDDEN, 2 * FFN), (1, FFN, HIDDEN))
    x, first, second = (jnp.asarray(normal(rng, size, "float32")) for size in sizes)
    ids = np.zeros((16, 1), np.int32)
    aligned = maj.moe_align_block_size(ids, block_size=8, num_experts=1, return_inverse=True)
    aligned = aligned._replace(
        sorted_token_ids=aligned.sorted_token_ids[:16], expert_ids=aligned.expert_ids[:2]
    )
    weights = np.ones((16, 1), np.float32)

    def layer(x, **given):
        return maj.fused_moe(x, first, second, weights, ids, block_size=8, **given)

    np.testing.assert_allclose(layer(x, aligned=aligned), layer(x), rtol=1e-5, atol=1e-5)
    got, want = (
        jax.grad(lambda x, given=given: jnp.sum(layer(x, **given) ** 2))(x)
        for given in ({"aligned": aligned}, {})
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
