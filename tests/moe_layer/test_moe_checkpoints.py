"""ExpertWeights: a checkpoint in each layout gives the layer that its own matrices give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from moe_align_jax import ExpertWeights
from tests.matmul.oracle import error
from tests.moe_layer import oracle

E, H, N, T, K = 4, 24, 16, 9, 2


def matrices(seed=0):
    """Gate, up `[E, H, N]` and down `[E, N, H]`, and the biases of each."""
    rng = np.random.default_rng(seed)
    shapes = [(E, H, N), (E, H, N), (E, N, H), (E, N), (E, N), (E, H)]
    return [rng.standard_normal(s).astype(np.float32) / 4 for s in shapes]


def interleave(a, b):
    out = np.empty((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
    out[..., 0::2], out[..., 1::2] = a, b
    return out


def t(x):
    return np.ascontiguousarray(np.swapaxes(x, 1, 2))


def per_expert(names, gate, up, down):
    found = {}
    for i in range(E):
        for name, matrix in zip(names, (gate, up, down), strict=True):
            found[f"layers.3.{i}.{name}.weight"] = matrix[i].T
    found["layers.30.0.other.weight"] = np.zeros(1)
    return found


def checkpoints():
    gate, up, down, bias_gate, bias_up, bias_down = matrices()
    both = np.concatenate([gate, up], axis=2)
    biases = np.concatenate([bias_gate, bias_up], axis=1)
    take = ExpertWeights.from_hugging_face
    mixtral = per_expert(("w1", "w3", "w2"), gate, up, down)
    qwen = per_expert(("gate_proj", "up_proj", "down_proj"), gate, up, down)
    scanned = [np.stack([np.zeros_like(a), a], axis=1) for a in (gate, up, down)]
    return {
        "Mixtral": (take(mixtral, "layers.3."), False),
        "Qwen3": (take(qwen, "layers.3."), False),
        "transformers 5": (take({"m.gate_up_proj": t(both), "m.down_proj": t(down)}, "m."), False),
        "Llama 4": (take({"gate_up_proj": both, "down_proj": down}), False),
        "GPT-OSS": (
            take(
                {
                    "gate_up_proj": interleave(gate, up),
                    "gate_up_proj_bias": interleave(bias_gate, bias_up),
                    "down_proj": down,
                    "down_proj_bias": bias_down,
                },
                interleaved=True,
            ),
            True,
        ),
        "vLLM": (ExpertWeights.from_vllm(t(both), t(down), biases, bias_down), True),
        "vLLM, GPT-OSS": (
            ExpertWeights.from_vllm(
                t(interleave(gate, up)),
                t(down),
                interleave(bias_gate, bias_up),
                bias_down,
                interleaved=True,
            ),
            True,
        ),
        "MaxText": (ExpertWeights.from_maxtext(gate, up, down), False),
        "MaxText, scanned, biases": (
            ExpertWeights.from_maxtext(
                *scanned,
                layer=1,
                bias_gate=np.stack([0 * bias_gate, bias_gate], axis=1),
                bias_up=np.stack([0 * bias_up, bias_up], axis=1),
                bias_down=np.stack([0 * bias_down, bias_down], axis=1),
            ),
            True,
        ),
    }


CHECKPOINTS = checkpoints()


def layer(weights):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((T, H)).astype(np.float32)
    ids = rng.integers(0, E, (T, K)).astype(np.int32)
    shares = rng.uniform(0.2, 1.0, (T, K)).astype(np.float32)
    return maj.fused_moe(x, *weights, shares, ids, **weights.options), (x, shares, ids)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_gives_the_layer_of_its_matrices(name):
    weights, biased = CHECKPOINTS[name]
    gate, up, down, bias_gate, bias_up, bias_down = matrices()
    y, (x, shares, ids) = layer(weights)
    more = {}
    if biased:
        more["bias_gate_up"] = np.concatenate([bias_gate, bias_up], axis=1)
        more["bias_down"] = bias_down
    want, _ = oracle.layer(x, (gate, up), down, shares, ids, **more)
    assert error(y, want) < 1e-5


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize(
    "layout",
    [
        {"transpose_rhs": True, "interleaved": False, "pair": False},
        {"transpose_rhs": False, "pair": True},
        {"transpose_rhs": True, "pair": True},
        {"transpose_rhs": False, "interleaved": True, "pair": False},
        {"transpose_rhs": True, "interleaved": True, "pair": False},
        {},
    ],
    ids=str,
)
def test_another_layout_holds_the_same_values(name, layout):
    weights, biased = CHECKPOINTS[name]
    other = weights.laid_out(**layout)
    if "transpose_rhs" in layout:
        assert other.transpose_rhs == layout["transpose_rhs"] and other.pair == layout["pair"]
    assert other.interleaved == layout.get("interleaved", weights.interleaved and not other.pair)
    gate, up, down, bias_gate, bias_up, bias_down = matrices()
    pair = (t(gate), t(up)) if other.transpose_rhs else (gate, up)
    if not other.pair:
        axis = 1 if other.transpose_rhs else 2
        pair = interleave(gate, up) if other.interleaved else np.concatenate([gate, up], 2)
        pair = t(pair) if axis == 1 else pair
    for found, want in zip(
        other.w_gate_up if other.pair else [other.w_gate_up],
        pair if other.pair else [pair],
        strict=True,
    ):
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, want)
    np.testing.assert_array_equal(other.w_down, t(down) if other.transpose_rhs else down)
    if biased:
        both = (
            interleave(bias_gate, bias_up)
            if other.interleaved
            else np.concatenate([bias_gate, bias_up], 1)
        )
        np.testing.assert_array_equal(other.bias_gate_up, both)
        np.testing.assert_array_equal(other.bias_down, bias_down)


def test_jax_arrays_stay_jax_arrays():
    import jax.numpy as jnp

    gate, up, down, *_ = matrices()
    weights = ExpertWeights.from_maxtext(*map(jnp.asarray, (gate, up, down)))
    other = weights.laid_out(transpose_rhs=True, interleaved=True, pair=False)
    assert isinstance(other.w_gate_up, jnp.ndarray)
    np.testing.assert_array_equal(other.w_gate_up, t(interleave(gate, up)))


def test_what_is_right_already_is_not_copied():
    weights, _ = CHECKPOINTS["Llama 4"]
    same = weights.laid_out(transpose_rhs=False, interleaved=False, pair=False)
    assert same.w_gate_up is weights.w_gate_up and same.w_down is weights.w_down


def maxtext_with(bias_gate, bias_up):
    weights = (np.zeros(s) for s in ((E, H, N), (E, H, N), (E, N, H)))
    return ExpertWeights.from_maxtext(*weights, bias_gate=bias_gate, bias_up=bias_up)


ERRORS = {
    "prefix": (
        lambda: ExpertWeights.from_hugging_face({"a.gate_up_proj": np.zeros((1, 2, 2))}, "b."),
        "from_hugging_face: tensors must hold b.gate_up_proj",
    ),
    "down": (
        lambda: ExpertWeights.from_hugging_face({"gate_up_proj": np.zeros((E, H, 2 * N))}),
        "from_hugging_face: tensors must hold down_proj",
    ),
    "hole": (
        lambda: ExpertWeights.from_hugging_face(
            {
                f"{i}.{name}.weight": np.zeros((N, H))
                for i in (0, 2)
                for name in ("gate_proj", "up_proj", "down_proj")
            }
        ),
        "from_hugging_face: tensors must hold 1.gate_proj.weight",
    ),
    "shapes": (
        lambda: ExpertWeights.from_vllm(np.zeros((E, H, 2 * N)), np.zeros((E, H, N))),
        "ExpertWeights: w_gate_up must have shape",
    ),
    "bias": (
        lambda: ExpertWeights.from_vllm(
            np.zeros((E, 2 * N, H)), np.zeros((E, H, N)), np.zeros((E, N))
        ),
        r"ExpertWeights: bias_gate_up must have shape \[4, 32\]",
    ),
    "weights of vLLM": (
        lambda: ExpertWeights.from_vllm(np.zeros((2 * N, H)), np.zeros((E, H, N))),
        "from_vllm: w13_weight must have 3 dimensions",
    ),
    "bias of vLLM": (
        lambda: ExpertWeights.from_vllm(
            np.zeros((E, 2 * N, H)), np.zeros((E, H, N)), None, np.zeros(H)
        ),
        "from_vllm: w2_bias must have 2 dimensions",
    ),
    "half a bias": (  # NumPy's words on arrays that are joined
        lambda: maxtext_with(np.zeros((E + 1, N)), np.zeros((E, N))),
        r"from_maxtext: bias_gate must have shape \[4, 16\] beside wi_0",
    ),
    "the other half": (  # its width with the first one's was that of both
        lambda: maxtext_with(np.zeros((E, N - 1)), np.zeros((E, N + 1))),
        r"from_maxtext: bias_gate must have shape \[4, 16\] beside wi_0",
    ),
    "one bias": (
        lambda: ExpertWeights.from_maxtext(
            *(np.zeros(s) for s in ((E, H, N), (E, H, N), (E, N, H))), bias_up=np.zeros((E, N))
        ),
        "from_maxtext: bias_up must be there with bias_gate",
    ),
    "biases of single experts": (  # they were left out, and the layer computed without them
        lambda: ExpertWeights.from_hugging_face({**MATRICES, "e.1.up_proj.bias": np.ones(N)}, "e."),
        "from_hugging_face: tensors must hold no biases of single experts",
    ),
    "pair": (
        lambda: CHECKPOINTS["MaxText"][0].laid_out(interleaved=True),
        "laid_out: interleaved must be False for a pair",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_missing(name):
    make, text = ERRORS[name]
    with pytest.raises(ValueError, match=rf"^{text}.*; got .*\. .+"):
        make()


MATRICES = {
    f"e.{i}.{name}.weight": np.zeros(shape, np.float32)
    for i in range(2)
    for name, shape in {"gate_proj": (N, H), "up_proj": (N, H), "down_proj": (H, N)}.items()
}
SCANNED = {"wi_0": (E, 3, H, N), "wi_1": (E, 3, H, N), "wo": (E, 3, N, H)}
SCANNED = {name: np.zeros(shape, np.float32) for name, shape in SCANNED.items()}
NO_ARRAYS = [None, 1, "x", [[1.0]], np.zeros((2, 2), int), np.ma.zeros((N, H)), [np.zeros(2), None]]
NO_FLAGS = [1, "no", [], np.zeros((2, 2)), np.zeros(0)]
NO_STRINGS = [None, 1, b"e.", ["e."], np.zeros(2)]


def test_what_a_loader_does_not_take_is_a_type_error():
    """It was an AttributeError of Python's, or NumPy's words on arrays as truths."""
    weights = ExpertWeights.from_hugging_face(MATRICES, "e.")
    take, read = ExpertWeights.from_hugging_face, ExpertWeights.from_safetensors
    calls = [
        *(("laid_out", a, lambda v, a=a: weights.laid_out(**{a: v}), NO_FLAGS)
          for a in ("transpose_rhs", "interleaved", "pair")),
        ("from_hugging_face", "interleaved", lambda v: take(MATRICES, interleaved=v), NO_FLAGS),
        ("from_hugging_face", "prefix", lambda v: take(MATRICES, v), NO_STRINGS),
        ("from_hugging_face", "tensors", lambda v: take(v), [None, 1, "x", [1], np.zeros((2, 2))]),
        ("from_hugging_face", "tensors['e.1.up_proj.weight']",
         lambda v: take(MATRICES | {"e.1.up_proj.weight": v}, "e."), NO_ARRAYS),
        ("from_hugging_face", "tensors['down_proj']",
         lambda v: take({"gate_up_proj": np.zeros((E, H, 2 * N)), "down_proj": v}), NO_ARRAYS[1:]),
        ("from_safetensors", "path", read, [None, 1, [], b"x", np.zeros(2)]),
        ("from_safetensors", "prefix", lambda v: read("none", v), NO_STRINGS),
        ("from_safetensors", "interleaved", lambda v: read("none", interleaved=v), NO_FLAGS),
        ("from_maxtext", "wi_1",
         lambda v: ExpertWeights.from_maxtext(**SCANNED | {"wi_1": v}, layer=0), NO_ARRAYS),
        *(("from_maxtext", a,
           lambda v, a=a: ExpertWeights.from_maxtext(**SCANNED, **{"layer": 0} | {a: v}),
           [1.5, "x", True, np.zeros(2)]) for a in ("layer", "layer_axis")),
    ]  # fmt: skip
    for function, argument, call, values in calls:
        for value in values:
            with pytest.raises(TypeError) as raised:
                call(value)
            start = f"{function}: {argument} must "
            assert str(raised.value).startswith(start) and "; got " in str(raised.value)


def test_biases_that_are_joined_are_arrays():
    """Weights may be shapes alone, as of jax.eval_shape; NumPy cannot join those."""
    shape = jax.ShapeDtypeStruct((E, N), np.float32)
    with pytest.raises(TypeError, match="^from_maxtext: bias_gate must be an array"):
        maxtext_with(shape, shape)


def test_layers_and_matrices_that_are_not_there():
    """jax's take gave NaN for a layer beyond the last, and NumPy an error of its own."""
    for layer in (3, 10**30):
        with pytest.raises(ValueError, match="^from_maxtext: layer must be .*; got "):
            ExpertWeights.from_maxtext(**jax.tree.map(jnp.asarray, SCANNED), layer=layer)
    with pytest.raises(ValueError, match="^from_maxtext: layer_axis must be an axis of wi_0"):
        ExpertWeights.from_maxtext(**SCANNED, layer=0, layer_axis=4)
    one = MATRICES | {"e.1.down_proj.weight": np.zeros((H, N + 1), np.float32)}
    with pytest.raises(ValueError, match=r"e\.1\.down_proj\.weight'\] must have the shape of e\.0"):
        ExpertWeights.from_hugging_face(one, "e.")


def test_weights_that_are_no_arrays():
    first, down = np.zeros((2, 8, 8), np.float32), np.zeros((2, 4, 8), np.float32)
    for change, text in (
        ({"w_gate_up": None}, "w_gate_up must be a float array"),
        ({"w_gate_up": (first[..., :4], None)}, "w_gate_up must be a float array"),
        ({"w_down": down.tolist()}, "w_down must be a float array"),
        ({"w_down": down.astype(int)}, "w_down must be a float array"),
        ({"bias_down": [1.0] * 8}, "bias_down must be a float array"),
        ({"transpose_rhs": "no"}, "transpose_rhs must be a Python bool"),
        ({"interleaved": 2}, "interleaved must be a Python bool"),
    ):
        given = {"w_gate_up": first, "w_down": down} | change
        with pytest.raises(TypeError, match=rf"^ExpertWeights: {text}.*; got .*\. .+"):
            ExpertWeights(**given)


def single_experts(dtype=np.float32):
    shapes = {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}
    return {
        f"m.{i}.{name}.weight": np.full(shape, i, dtype)
        for i in range(3)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("lost", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("expert", [1, 2])
def test_an_expert_of_whom_a_matrix_is_missing_is_not_left_out(lost, expert):
    """The last one, too, as where the file with its gate has not been downloaded."""
    tensors = single_experts()
    assert ExpertWeights.from_hugging_face(tensors, "m.").w_down.shape == (3, 16, 8)
    del tensors[f"m.{expert}.{lost}.weight"]
    with pytest.raises(ValueError, match=f"must hold m.{expert}.{lost}.weight; got none"):
        ExpertWeights.from_hugging_face(tensors, "m.")


@pytest.mark.parametrize("dtype", [np.float32, jnp.float8_e5m2])
def test_scales_beside_values_that_are_not_e4m3_are_not_left_out(dtype):
    tensors = single_experts(dtype)
    scaled = tensors | {"m.1.up_proj.weight_scale_inv": np.full((1, 1), 2.0, np.float32)}
    words = "hold float8_e4m3fn m.1.up_proj.weight beside m.1.up_proj.weight_scale_inv; got float"
    with pytest.raises(ValueError, match=words):
        ExpertWeights.from_hugging_face(scaled, "m.")
    fused = {"gate_up_proj": np.zeros((3, 16, 16), dtype), "down_proj": np.zeros((3, 16, 8), dtype)}
    fused["down_proj_scale_inv"] = np.ones((3, 1, 1), np.float32)
    with pytest.raises(ValueError, match="beside down_proj_scale_inv"):
        ExpertWeights.from_hugging_face(fused)


def test_shapes_alone_are_not_moved():
    shapes = {name: jax.ShapeDtypeStruct(t.shape, t.dtype) for name, t in single_experts().items()}
    words = "ExpertWeights: weights must be arrays where they are moved; got"
    with pytest.raises(TypeError, match=words):
        ExpertWeights.from_hugging_face(shapes, "m.")
    up, down = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((3, 16, 16), (3, 16, 8)))
    weights = ExpertWeights.from_vllm(up, down)
    for layout in ({"pair": True}, {"interleaved": True}, {"transpose_rhs": False}):
        with pytest.raises(TypeError, match=words):
            weights.laid_out(**layout)
    moved = jax.eval_shape(
        lambda a, b: [*ExpertWeights.from_vllm(a, b).laid_out(pair=True)], up, down
    )
    assert [leaf.shape for leaf in jax.tree.leaves(moved)] == [(3, 8, 16), (3, 8, 16), (3, 16, 8)]
