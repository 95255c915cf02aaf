"""fused_moe in e4m3, and checkpoints of DeepSeek-V3's kind, against NumPy on dequantised operands."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import moe_align_jax as maj
from moe_align_jax import ExpertWeights
from tests.layout.test_quantization import oracle_blockwise, oracle_rowwise
from tests.matmul import oracle as matmul_oracle
from tests.matmul.oracle import error
from tests.matmul.test_fp8 import laid_out
from tests.moe_layer import oracle

gpu = pytest.param("mosaic_gpu", marks=pytest.mark.gpu)
T, H, N, E, K = 11, 256, 128, 4, 2


def wide_rows(q, scales):
    return q.astype(np.float64) * np.repeat(scales.astype(np.float64), 128, -1)


def wide_blocks(q, scales):
    each = np.repeat(np.repeat(scales.astype(np.float64), 128, -2), 128, -1)
    return q.astype(np.float64) * each[..., : q.shape[-2], : q.shape[-1]]


def block_weights(rng, *shape):
    """((e4m3, scales), float64): by NumPy."""
    w = rng.standard_normal(shape).astype(np.float32) * np.float32(shape[-1] ** -0.5)
    q, scales = map(
        np.stack, zip(*(oracle_blockwise(each, 1e-4, False, False) for each in w), strict=True)
    )
    return (q, scales), wide_blocks(q, scales)


def rows(rng, layout, tokens=T):
    x = rng.standard_normal((tokens, H)).astype(np.float32)
    power_of_two = "scale_format" in layout
    q, scales = oracle_rowwise(x, 1e-4, power_of_two, False)
    return (q, laid_out(scales, **layout)), wide_rows(q, scales)


def wanted(x, w_gate_up, w_down, shares, ids, *, weights_on_input=False, expert_map=None):
    """float64 `[T, H]`; what lies between the products is rounded and quantised as the contract says."""
    out = np.zeros(x.shape)
    for (t, k), e in np.ndenumerate(
        oracle.experts_of_pairs(ids, len(w_down), expert_map=expert_map)
    ):
        if e < 0:
            continue
        share = np.float64(shares[t, k])
        row = x[t] * share if weights_on_input else x[t]
        w = matmul_oracle.of_expert(w_gate_up, e)
        hidden = matmul_oracle.row(row, w, transpose_rhs=True, activation="silu")
        hidden = hidden.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
        hidden = wide_rows(*oracle_rowwise(hidden[None], 1e-10, False, False))[0]
        y = matmul_oracle.row(hidden, w_down[e], transpose_rhs=True)
        out[t] += y if weights_on_input else share * y
    return out


CASES = {
    "rows": ({}, {}),
    "packed, pair, expert map": (
        {"scale_format": "ue8m0_packed"},
        {"pair": True, "expert_map": np.array([-1, 2, 0, 3, -1, 1], np.int32)},
    ),
    "columns, weights on input": ({"scale_layout": "column_major"}, {"weights_on_input": True}),
    "few tokens, no alignment": ({}, {"tokens": 1, "experts": 8}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["xla", gpu])
def test_layer(name, implementation):
    layout, options = CASES[name][0], dict(CASES[name][1])
    rng = np.random.default_rng(2)
    pair, experts = options.pop("pair", False), options.pop("experts", E)
    x, wide_x = rows(rng, layout, options.pop("tokens", T))
    made = [block_weights(rng, experts, N if pair else 2 * N, H) for _ in range(1 + pair)]
    w_gate_up, wide_first = (each if pair else each[0] for each in zip(*made, strict=True))
    w_down, wide_down = block_weights(rng, experts, H, N)
    slots = len(options.get("expert_map", range(experts)))
    ids = rng.integers(-1, slots, (len(wide_x), K)).astype(np.int32)
    shares = rng.uniform(0.2, 1, ids.shape).astype(np.float32)
    y = maj.fused_moe(
        *(x, w_gate_up, w_down, shares, ids),
        transpose_rhs=True,
        implementation=implementation,
        **options,
    )
    want = wanted(wide_x, wide_first, wide_down, shares, ids, **options)
    assert y.dtype == jnp.bfloat16 and y.shape == want.shape
    # A value between the products may round to the next code of e4m3: 2**-4 of it.
    assert error(y, want) < 8e-3


def test_errors_of_the_layer():
    rng = np.random.default_rng(0)
    x, _ = rows(rng, {})
    first, down = block_weights(rng, E, 2 * N, H)[0], block_weights(rng, E, H, N)[0]
    odd = first[0][:, : 2 * 96], first[1]
    ids, shares = np.zeros((T, K), np.int32), np.ones((T, K), np.float32)
    f32 = np.float32
    for kind, text, change in (
        (TypeError, r"w_down must be \(values, scales\), as x is", {"w_down": down[0].astype(f32)}),
        (TypeError, r"x must be \(values, scales\), as w_gate_up", {"x": x[0].astype(f32)}),
        (ValueError, "transpose_rhs must be True", {"transpose_rhs": False}),
        (ValueError, r"scales of w_down must have shape \[4, 2, 1\]", {"w_down": (down[0], x[1])}),
        (
            ValueError,
            "w_down must have an N that is a multiple of 128",
            {"w_gate_up": odd, "w_down": (down[0][..., :96], down[1])},
        ),
    ):
        given = {"x": x, "w_gate_up": first, "w_down": down, "transpose_rhs": True} | change
        with pytest.raises(kind, match=f"^fused_moe: {text}.*; got "):
            maj.fused_moe(topk_weights=shares, topk_ids=ids, **given)


# -- checkpoints -----------------------------------------------------------------------------------


PREFIX = "model.layers.3.mlp.experts."


def deepseek(rng, ffn):
    """Tensors by DeepSeek-V3's names, and gate, up and down, each (float64, codes, scales) of all experts."""
    tensors = {"model.norm.weight": np.ones(3, ml_dtypes.bfloat16)}
    made = []
    for name, shape in (("gate_proj", (ffn, H)), ("up_proj", (ffn, H)), ("down_proj", (H, ffn))):
        (q, scales), wide = block_weights(rng, E, *shape)
        made.append((wide, q, scales))
        for i in range(E):
            tensors[f"{PREFIX}{i}.{name}.weight"] = q[i]
            tensors[f"{PREFIX}{i}.{name}.weight_scale_inv"] = scales[i]
    return tensors, made


def equal(found, want):
    np.testing.assert_array_equal(np.asarray(found).view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize("files", ["one", "folder", "index"])
def test_a_checkpoint_of_deepseeks_kind(files, tmp_path):
    """Written by safetensors itself; read, and multiplied."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(4)
    tensors, (gate, up, down) = deepseek(rng, N)
    path = tmp_path / "model.safetensors"
    if files == "one":
        save_file(tensors, path)
    else:
        names = sorted(tensors)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, mine in parts.items():
            save_file({name: tensors[name] for name in mine}, tmp_path / file)
        path = tmp_path
    if files == "index":
        where = {name: file for file, mine in parts.items() for name in mine}
        index = {"metadata": {}, "weight_map": where | {"model.other": "not-there.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = ExpertWeights.from_safetensors(path, PREFIX)
    assert weights.transpose_rhs and not weights.pair
    values, scales = weights.w_gate_up
    assert values.dtype == ml_dtypes.float8_e4m3fn and scales.dtype == np.float32
    equal(values, np.concatenate([gate[1], up[1]], axis=1))
    equal(scales, np.concatenate([gate[2], up[2]], axis=1))
    equal(weights.w_down[0], down[1])
    equal(weights.w_down[1], down[2])
    if files != "one":
        return
    x, wide_x = rows(rng, {})
    ids = rng.integers(0, E, (T, K)).astype(np.int32)
    shares = rng.uniform(0.2, 1, ids.shape).astype(np.float32)
    y = maj.fused_moe(x, *weights, shares, ids, **weights.options)
    want = wanted(wide_x, np.concatenate([gate[0], up[0]], 1), down[0], shares, ids)
    assert error(y, want) < 8e-3


def test_gate_and_up_whose_blocks_would_mix_stay_a_pair():
    tensors, (gate, up, _) = deepseek(np.random.default_rng(5), 192)
    weights = ExpertWeights.from_hugging_face(tensors, PREFIX)
    assert weights.pair
    for (values, scales), want in zip(weights.w_gate_up, (gate, up), strict=True):
        equal(values, want[1])
        equal(scales, want[2])
    with pytest.raises(ValueError, match="^laid_out: the layout must keep gate and up in blocks"):
        weights.laid_out(pair=False)


def test_other_layouts_of_quantized_weights():
    tensors, (gate, up, down) = deepseek(np.random.default_rng(6), N)
    weights = ExpertWeights.from_hugging_face(tensors, PREFIX)
    pair = weights.laid_out(pair=True)
    for (values, scales), want in zip(pair.w_gate_up, (gate, up), strict=True):
        equal(np.ascontiguousarray(values), want[1])
        equal(np.ascontiguousarray(scales), want[2])
    turned = pair.laid_out(transpose_rhs=False)
    for (values, scales), want in zip(
        (*turned.w_gate_up, turned.w_down), (gate, up, down), strict=True
    ):
        assert values.shape == want[1].swapaxes(1, 2).shape
        wide = wide_blocks(np.asarray(values), np.asarray(scales))
        np.testing.assert_array_equal(wide, want[0].swapaxes(1, 2))
    back = turned.laid_out(transpose_rhs=True, pair=False)
    equal(np.ascontiguousarray(back.w_gate_up[0]), weights.w_gate_up[0])
    equal(np.ascontiguousarray(back.w_gate_up[1]), weights.w_gate_up[1])
    with pytest.raises(ValueError, match="^laid_out: the layout must keep gate and up in blocks"):
        weights.laid_out(interleaved=True)
    vllm = ExpertWeights.from_vllm(weights.w_gate_up, weights.w_down)
    assert not vllm.pair and vllm.w_down is weights.w_down
    one = np.arange(1, E + 1, dtype=np.float32)
    values = weights.w_gate_up[0]
    single = ExpertWeights.from_vllm((values, one), weights.w_down).laid_out(pair=True)
    assert all(scales is one for _, scales in single.w_gate_up)
    apart = ExpertWeights(
        (single.w_gate_up[0], (single.w_gate_up[1][0], 2 * one)), weights.w_down, transpose_rhs=True
    )
    with pytest.raises(ValueError, match="^laid_out: gate and up must stay a pair"):
        apart.laid_out(pair=False)


def test_scales_that_do_not_fit_their_matrices():
    """Those of one expert alone were NumPy's error, and exponents in integers were taken for scales."""
    tensors, made = deepseek(np.random.default_rng(8), N)
    name = f"{PREFIX}1.gate_proj.weight_scale_inv"
    for scales, kind, text in (
        (np.ones((1, 1), np.float32), ValueError, "must have shape"),
        (np.ones(2, np.float32), ValueError, "must have shape"),
        (np.ones(tensors[name].shape, np.int32), TypeError, "must be a float array"),
        (np.float32(1)[...], ValueError, "must hold scales of blocks for all experts, or for none"),
    ):
        with pytest.raises(kind, match=f"^from_hugging_face: tensors.* {text}.*; got "):
            ExpertWeights.from_hugging_face(tensors | {name: scales}, PREFIX)
    # A scale for each matrix of one kind, and of blocks for the other: gate and up stay a pair.
    ones = {f"{PREFIX}{i}.up_proj.weight_scale_inv": np.float32(1)[...] for i in range(E)}
    mixed = ExpertWeights.from_hugging_face(tensors | ones, PREFIX)
    assert mixed.pair and mixed.w_gate_up[1][1].shape == (E,)
    equal(mixed.w_gate_up[0][1], made[0][2])


def test_faulty_files_and_tensors(tmp_path):
    from safetensors.numpy import save_file

    tensors, _ = deepseek(np.random.default_rng(7), N)
    name = f"{PREFIX}2.up_proj.weight"
    for broken, text in (
        (
            {k: v for k, v in tensors.items() if k != f"{name}_scale_inv"},
            "tensors must hold .*2.up_proj.weight_scale_inv",
        ),
        (
            tensors | {name: np.zeros((N, H), np.float32)},
            "tensors must hold float8_e4m3fn .*2.up_proj.weight beside .*_scale_inv",
        ),
        (
            {k: v for k, v in tensors.items() if k != f"{name}_scale_inv"}
            | {name: np.zeros((N, H), np.float32)},
            "tensors must hold e4m3 matrices of all",
        ),
        (
            tensors
            | {
                f"{PREFIX}{i}.down_proj.weight_scale_inv": np.ones((1, 1), np.float32)
                for i in range(E)
            },
            r"tensors\['.*0\.down_proj\.weight_scale_inv'\] must have shape",
        ),
    ):
        with pytest.raises(ValueError, match=f"{text}.*; got "):
            ExpertWeights.from_hugging_face(broken, PREFIX)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    whole = path.read_bytes()
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    entries = [
        *(good | {"data_offsets": [a, b]} for a, b in ((-8, 0), (8, 0), (0, 7), (0.0, 8))),
        *(good | {"shape": shape} for shape in ([-1], [3], "ab", None)),
        *(good | {"dtype": dtype} for dtype in (["F32"], "F3", None)),
        *(
            {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
            for shape, end in (([1] * 70, 4), ([0, 2**70], 0), ({}, 4))
        ),
        *({k: v for k, v in good.items() if k != name} for name in good),
        *(None, [], good | {"data_offsets": [0, 4, 8]}),
    ]
    headers = [json.dumps({f"{PREFIX}x": entry}).encode() for entry in entries]
    headers += [b"[]", b"[" * 100_000, b"7"]
    faulty = [len(h).to_bytes(8, "little") + h + bytes(16) for h in headers]
    for content in (b"", b"PK\x03\x04" * 9, whole[:100], whole[:-7], *faulty):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^from_safetensors: path must .*; got "):
            ExpertWeights.from_safetensors(path, PREFIX)
    for index in (
        "{",
        "{}",
        "[]",
        '{"weight_map": 3}',
        f'{{"weight_map": {{"{PREFIX}x": "../p"}}}}',
    ):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match="^from_safetensors: path must have an index.*; got "):
            ExpertWeights.from_safetensors(tmp_path, PREFIX)
    with pytest.raises(
        ValueError, match="^from_safetensors: path must be a safetensors file, or a"
    ):
        ExpertWeights.from_safetensors(tmp_path / "nowhere", PREFIX)
