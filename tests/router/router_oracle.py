"""The router in plain Python and float64, straight from its definition; inputs for its tests."""

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# Of a choice or a weight that float32 arithmetic found.
ROUNDING = 3e-6


class Routed(NamedTuple):
    """What one call must give.

    Attributes:
        weights, ids: of each token, in order.
        choice: of each token, what each expert is chosen by; None for one that cannot be.
        scores: of each token, each expert's score, or for a softmax over the chosen ones its logit.
    """

    weights: list[list[float]]
    ids: list[list[int]]
    choice: list[list[float | None]]


def _finite(x: float, greatest: float) -> float:
    return -greatest if math.isnan(x) else min(max(x, -greatest), greatest)


def _softmax(xs: list[float]) -> list[float]:
    powers = [math.exp(max(x - max(xs), -1e4)) for x in xs]
    return [p / sum(powers) for p in powers]


def _score(scoring: str, xs: list[float]) -> list[float]:
    if scoring == "softmax":
        return _softmax(xs)
    small = [math.exp(max(-abs(x), -1e4)) for x in xs]
    if scoring == "sigmoid":
        return [(s if x < 0 else 1) / (1 + s) for x, s in zip(xs, small, strict=True)]
    return [math.sqrt(max(x, 0) + math.log1p(s)) for x, s in zip(xs, small, strict=True)]


def weights_of(logits: list[float], ids: list[int], options: dict[str, Any]) -> list[float]:
    """Of chosen experts."""
    scoring = options.get("scoring", "softmax")
    if options.get("softmax_after_topk"):
        weights = _softmax([logits[e] for e in ids])
    elif scoring == "softmax" and options.get("renormalize"):
        # The same as all scores, divided; without a sum that underflows.
        weights = _softmax([logits[e] for e in ids])
    else:
        scores = _score(scoring, logits)
        weights = [scores[e] for e in ids]
        if options.get("renormalize"):
            total = sum(weights) + 1e-20
            weights = [w / total for w in weights]
    return [w * options.get("scaling_factor", 1.0) for w in weights]


def finite(logits: np.ndarray) -> list[list[float]]:
    greatest = float(ml_dtypes.finfo(logits.dtype).max)
    return [[_finite(x, greatest) for x in row] for row in logits.astype(np.float64).tolist()]


def route(logits: np.ndarray, *, top_k: int, **options: Any) -> Routed:
    bias = options.get("correction_bias")
    mask, valid = options.get("token_mask"), options.get("num_valid_tokens")
    groups, stay = options.get("num_groups", 1), options.get("topk_groups", 1)
    routed = Routed([], [], [])
    for token, row in enumerate(finite(logits)):
        choice: list[float | None] = list(row)
        if bias is not None:
            scores = row
            if not options.get("softmax_after_topk"):
                scores = _score(options.get("scoring", "softmax"), row)
            choice = [s + float(b) for s, b in zip(scores, bias, strict=True)]
            choice = [-math.inf if math.isnan(c) else c for c in choice]
        size = len(row) // groups
        parts = [choice[g * size : (g + 1) * size] for g in range(groups)]
        best = 1 if bias is None else 2
        values = [sum(sorted(part, reverse=True)[:best]) for part in parts]  # type: ignore[type-var]
        values = [-math.inf if math.isnan(v) else v for v in values]
        kept = sorted(range(groups), key=lambda g: (-values[g], g))[:stay]
        candidates = [e for e in range(len(row)) if e // size in kept]
        ids = sorted(candidates, key=lambda e: (-choice[e], e))[:top_k]  # type: ignore[operator]
        real = (mask is None or bool(mask[token])) and (valid is None or token < valid)
        routed.choice.append([c if e in candidates else None for e, c in enumerate(choice)])
        routed.weights.append(weights_of(row, ids, options) if real else [0.0] * top_k)
        routed.ids.append(ids if real else [-1] * top_k)
    return routed


def assert_routed(got: Any, logits: np.ndarray, *, top_k: int, **options: Any) -> None:
    """ids equal but where what they are chosen by differs by no more than rounding; weights to rounding."""
    weights, ids = map(np.asarray, got)
    shape = (logits.shape[0], top_k)
    assert weights.shape == ids.shape == shape
    assert weights.dtype == np.float32 and ids.dtype == np.int32
    want = route(logits, top_k=top_k, **options)
    exact = options.get("correction_bias") is None
    for token, row in enumerate(finite(logits)):
        mine, theirs = ids[token].tolist(), want.ids[token]
        assert len(set(mine)) == top_k or theirs[0] == -1, (token, mine)
        if mine != theirs:
            assert not exact, (token, mine, theirs)
            choice = want.choice[token]
            for k, (a, b) in enumerate(zip(mine, theirs, strict=True)):
                assert 0 <= a < len(row) and choice[a] is not None, (token, k, a)
                gap = abs(choice[a] - choice[b])
                assert 0 < gap <= ROUNDING * (1 + abs(choice[b])), (token, k, mine, theirs)
        expected = [0.0] * top_k
        if theirs[0] != -1:
            expected = weights_of(row, mine, options)
        # A logit far below the greatest is rounded before exp takes it.
        far = max(max(row) - min(row), 1.0)
        relative = ROUNDING + 1.2e-7 * min(far, 200.0)
        # A score below 2**-126 is 0 in float32, and 1e-20 divides it where all of them are about 0.
        least = 1e-17 if options.get("renormalize") else 1e-30
        np.testing.assert_allclose(weights[token], expected, rtol=relative, atol=least)


def make_logits(num_tokens: int, num_experts: int, dtype: Any, seed: int) -> np.ndarray:
    """Random ones; every fourth row holds what is unusual."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_tokens, num_experts)).astype(np.float32) * 3
    rows = [
        lambda r: r * 0,
        lambda r: np.where(np.arange(r.size) % 2, r, np.nan),
        lambda r: np.where(np.arange(r.size) % 3 == 1, np.inf, r),
        lambda r: np.full_like(r, -np.inf),
        lambda r: np.full_like(r, np.nan),
        lambda r: np.round(r),
        lambda r: np.where(np.arange(r.size) % 2, 0.0, -0.0),
        lambda r: r * 30,
        lambda r: np.where(np.arange(r.size) % 5 == 2, -np.inf, r),
    ]
    for k, token in enumerate(range(1, num_tokens, 4)):
        x[token] = rows[(k + seed) % len(rows)](x[token])
    with np.errstate(over="ignore"):
        return x.astype(dtype)
