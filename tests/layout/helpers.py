"""Tokens, routings, and the layouts by expert in plain loops."""

import numpy as np


def rows_by_expert(ids, num_experts) -> list[list[int]]:
    """The flat pairs of each expert, in order."""
    found = [[] for _ in range(num_experts)]
    for pair, expert in enumerate(np.asarray(ids).ravel().tolist()):
        if 0 <= expert < num_experts:
            found[expert].append(pair)
    return found


def masked_oracle(x, ids, num_experts, room):
    """(rows `[e, M, ...]`, masked_m, counts, row_of_pair, pair_of_row) in plain Python."""
    top_k, n = ids.shape[1], ids.size
    rows = np.zeros((num_experts, room, *x.shape[1:]), x.dtype)
    pair_of_row = np.full((num_experts, room), n)
    row_of_pair = np.full(n, -1)
    found = rows_by_expert(ids, num_experts)
    for expert, pairs in enumerate(found):
        for i, pair in enumerate(pairs[:room]):
            rows[expert, i] = x[pair // top_k]
            pair_of_row[expert, i] = pair
            row_of_pair[pair] = expert * room + i
    counts = [len(pairs) for pairs in found]
    masked_m = [min(c, room) for c in counts]
    return rows, masked_m, counts, row_of_pair.reshape(ids.shape), pair_of_row


def weighted_sum(y, row_of_pair, weights):
    """float64: y `[P, ...]`."""
    out = np.zeros((row_of_pair.shape[0], *y.shape[1:]))
    for t, k in np.ndindex(*row_of_pair.shape):
        if row_of_pair[t, k] >= 0:
            out[t] += float(weights[t, k]) * y[row_of_pair[t, k]].astype(np.float64)
    return out


def row_sum_inputs(problem, seed=0):
    """Of a RowSum: y, indices with holes and one token of none, weights or not; NaN where none is read."""
    rng = np.random.default_rng(seed)
    shape = problem.num_tokens, problem.top_k
    rows = rng.integers(0, problem.num_rows, shape).astype(np.int32)
    rows[rng.random(shape) < 0.4] = -1
    rows[problem.num_tokens // 2] = -1
    weights = rng.normal(size=shape).astype(np.float32)
    y = rng.normal(size=(problem.num_rows, problem.width)).astype(problem.dtype)
    y[np.setdiff1d(np.arange(problem.num_rows), rows)] = np.nan
    weights[rows < 0] = np.inf
    return y, rows, [weights] if problem.weighted else []


def assert_row_sums(problem, got, y, rows, weights):
    """Float32 sums within their rounding errors, rounded once to the dtype asked for."""
    got = np.asarray(got)
    assert got.dtype == problem.out_dtype and got.shape == (problem.num_tokens, problem.width)
    y = np.nan_to_num(y.astype(np.float64))
    weights = np.where(rows < 0, 0, weights[0] if weights else 1)
    want = weighted_sum(y, rows, weights)
    size = weighted_sum(np.abs(y), rows, np.abs(weights))
    rounding = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[problem.out_dtype]
    room = rounding * np.abs(want) + problem.top_k * 2.0**-23 * size + 2.0**-25
    assert (np.abs(got.astype(np.float64) - want) <= room).all()


def tokens(count, hidden, dtype="float32", seed=0):
    return np.random.default_rng(seed).normal(size=(count, hidden)).astype(dtype)


def routing(name, count, top_k, num_experts, seed=0):
    rng = np.random.default_rng(seed)
    if name == "one expert":
        return np.full((count, top_k), num_experts - 1, np.int32)
    if name == "nowhere":
        return np.full((count, top_k), -1, np.int32)
    score = rng.random((count, max(num_experts, top_k)))
    ids = np.argsort(score, axis=1)[:, :top_k].astype(np.int32)  # distinct; some may be >= e
    if name == "with holes":
        ids[rng.random(ids.shape) < 0.3] = -1
        ids[rng.random(ids.shape) < 0.1] = num_experts
    return ids
