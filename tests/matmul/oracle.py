"""Grouped matrix multiplication in float64 NumPy, row by row, from the contract alone."""

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATIONS = {
    "silu": lambda v: v / (1 + np.exp(-v)),
    "gelu": lambda v: 0.5 * v * (1 + _erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "relu2": lambda v: np.maximum(v, 0) ** 2,
}


def row(
    x,
    w,
    *,
    transpose_rhs=False,
    activation=None,
    gated=True,
    interleaved=False,
    swiglu_limit=None,
    swiglu_alpha=None,
    bias=None,
):
    """float64 `[N]`: one row `[K]` times the weights of its expert, `[K, N]` or a pair, and the epilogue."""
    pair = isinstance(w, tuple)
    parts = [np.asarray(each, np.float64) for each in (w if pair else (w,))]
    parts = [each.T if transpose_rhs else each for each in parts]
    product = np.concatenate([np.asarray(x, np.float64) @ each for each in parts])
    if bias is not None:
        product = product + np.asarray(bias, np.float64)
    if activation is None:
        return product
    if not gated:
        return ACTIVATIONS[activation](product)
    half = len(product) // 2
    gate, up = (product[0::2], product[1::2]) if interleaved else (product[:half], product[half:])
    if swiglu_limit is not None:
        gate, up = np.minimum(gate, swiglu_limit), np.clip(up, -swiglu_limit, swiglu_limit)
    if swiglu_alpha is not None:
        return gate / (1 + np.exp(-swiglu_alpha * gate)) * (up + 1)
    return ACTIVATIONS[activation](gate) * up


def of_expert(w, expert):
    return tuple(each[expert] for each in w) if isinstance(w, tuple) else w[expert]


def blocks(x, w, aligned, *, block_size, top_k=None, bias=None, row_weights=None, **options):
    """float64 `[rows in use, N]` of `grouped_matmul`."""
    ids = np.asarray(aligned.sorted_token_ids)
    used = int(np.asarray(aligned.num_tokens_post_padded).reshape(()))
    # The last slot holds the number of pairs, but for blocks of one row: those need no padding.
    num_pairs = len(ids) if block_size == 1 else int(ids[-1])
    width = len(row(x[0], of_expert(w, 0), bias=None if bias is None else bias[0], **options))
    out = np.zeros((used, width))
    for r in range(used):
        expert = int(aligned.expert_ids[r // block_size])
        if expert < 0 or not 0 <= ids[r] < num_pairs:
            continue
        source = x[ids[r] // top_k] if top_k else x[r]
        own = None if bias is None else bias[expert]
        out[r] = row(source, of_expert(w, expert), bias=own, **options)
        if row_weights is not None:
            out[r] *= np.float64(row_weights[r])
    return out


def ragged(lhs, rhs, group_sizes, *, group_offset=0, **options):
    """float64 `[m, n]`: zero behind the last group, and where there is no matrix."""
    width = len(row(lhs[0], of_expert(rhs, 0), **options))
    out, start = np.zeros((len(lhs), width)), 0
    for group, size in enumerate(group_sizes):
        for r in range(start, min(start + int(size), len(lhs))):
            if 0 <= group - group_offset < len(rhs):
                out[r] = row(lhs[r], of_expert(rhs, group - group_offset), **options)
        start += int(size)
    return out


def masked(x, w, masked_m, *, bias=None, **options):
    """A list with float64 `[masked_m[e], N]` of each expert."""
    found = []
    for expert, count in enumerate(masked_m):
        own = None if bias is None else bias[expert]
        rows = [row(r, of_expert(w, expert), bias=own, **options) for r in x[expert][:count]]
        found.append(np.array(rows))
    return found


def error(found, want):
    """Relative Frobenius error; NaN never passes a comparison with it."""
    found = np.asarray(found).astype(np.float64)
    assert found.shape == want.shape, (found.shape, want.shape)
    size = np.linalg.norm(want)
    return np.linalg.norm(found - want) / size if size else np.linalg.norm(found)
