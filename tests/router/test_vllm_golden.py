"""route_topk against what the compiled ops of vLLM 0.33 gave on an H200, 2026-11-28 (vllm_golden.npz).

The file also holds `topk_softplus_sqrt` with a hash table ("hash") and with a second bias ("vl"), and vLLM's
two other aligned ops ("glob" and "lora"), with their inputs.
"""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj

GOLDEN = dict(np.load(pathlib.Path(__file__).with_name("vllm_golden.npz")))
X, BIAS, PAD = (GOLDEN[f"in.{name}"] for name in ("x", "bias", "pad"))
# vLLM gives rows with an infinity or a NaN the ids 0, 1, ... and weights of 0 ("softmax"), or NaN weights.
USUAL = np.isfinite(X).all(axis=1)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("op", "scoring"),
    [("softmax", "softmax"), ("sigmoid", "sigmoid"), ("softplus", "sqrtsoftplus")],
)
def test_topk_equals_vllm(implementation, op, scoring, renormalize, biased):
    weights, ids = maj.route_topk(
        X,
        top_k=4,
        scoring=scoring,
        renormalize=renormalize,
        correction_bias=BIAS if biased else None,
        scaling_factor=1.0 if op == "softmax" else 2.5,
        token_mask=~PAD,
        implementation=implementation,
    )
    weights, ids = np.asarray(weights), np.asarray(ids)
    for dtype in ("int32", "int64", "uint32"):
        key = f"{op}-{dtype}-{renormalize}-{biased}"
        if f"{key}-True.i" not in GOLDEN:
            continue
        theirs = GOLDEN[f"{key}-True.i"]
        theirs = np.where(theirs == 2**32 - 1, -1, theirs)  # uint32
        np.testing.assert_array_equal(ids[USUAL | PAD], theirs[USUAL | PAD])
        real = USUAL & ~PAD
        np.testing.assert_allclose(weights[real], GOLDEN[f"{key}-True.w"][real], rtol=2e-6)
        order = np.arange(4) * len(X) + np.arange(len(X))[:, None]
        np.testing.assert_array_equal(GOLDEN[f"{key}-True.t"], order)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(64, 8, 3, 6), (256, 8, 4, 8), (160, 8, 3, 6), (64, 1, 1, 4)])
def test_grouped_topk_equals_vllm(implementation, sizes, dtype, renormalize):
    num_experts, groups, stay, top_k = sizes
    x, bias = (GOLDEN[f"gin-{num_experts}-{groups}.{name}"] for name in "xb")
    usual = np.isfinite(x).all(axis=1)
    weights, ids = maj.route_topk(
        jnp.asarray(x).astype(dtype),
        top_k=top_k,
        scoring="sigmoid",
        renormalize=renormalize,
        correction_bias=jnp.asarray(bias).astype(dtype),
        num_groups=groups,
        topk_groups=stay,
        scaling_factor=2.5,
        implementation=implementation,
    )
    key = f"grouped-{num_experts}-{groups}-{stay}-{top_k}-torch.{dtype}-{renormalize}-1"
    np.testing.assert_array_equal(np.asarray(ids)[usual], GOLDEN[f"{key}.i"][usual])
    np.testing.assert_allclose(np.asarray(weights)[usual], GOLDEN[f"{key}.w"][usual], rtol=1e-5)
