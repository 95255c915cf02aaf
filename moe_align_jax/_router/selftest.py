"""Self-test of a router's program that is sized at launch, against NumPy, before its first use."""

from typing import Any

import ml_dtypes
import numpy as np

from moe_align_jax._router.problem import GIVEN_SCORES, SUM_FLOOR, RouteProblem

_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_MOST_TOKENS = 1024
# Of what float32 arithmetic chooses by, and of a weight.
_CHOICE, _WEIGHT = 1e-5, 1e-4


def num_tokens(problem: RouteProblem) -> int:
    """Tokens of the trial: no whole number of CTAs where the program takes as many."""
    return max(1, min(problem.num_tokens, _MOST_TOKENS) - 3)


def arrays(problem: RouteProblem, tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The operands of `problem.inputs` but the number of tokens."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((tokens, problem.num_experts)) * 3
    if problem.scoring == GIVEN_SCORES:  # their sum is what weights are divided by
        logits = np.abs(logits) + 0.1
    given: dict[str, np.ndarray] = {"logits": logits.astype(_DTYPES[problem.dtype])}
    if problem.bias_rows:
        bias = rng.standard_normal(problem.num_experts) / 4
        given["correction_bias"] = bias.astype(np.float32)
    if problem.has_padding:
        words = np.zeros(-(-tokens // 4) * 4, np.uint8)
        words[:tokens] = rng.integers(0, 4, tokens) == 0
        given["is_padding"] = words
    return given


def empty(problem: RouteProblem, tokens: int) -> dict[str, np.ndarray]:
    """A place for each result."""
    shape = (tokens, problem.top_k)
    return {name: np.empty(shape, dtype) for name, (_, dtype) in problem.outputs.items()}


def mismatch(
    problem: RouteProblem, given: dict[str, np.ndarray], got: dict[str, np.ndarray]
) -> str:
    """What is wrong with the results, or ""."""
    logits = given["logits"].astype(np.float64)
    tokens, rows = len(logits), np.arange(len(logits))[:, None]
    scores = _scores(problem, logits)
    choice = logits
    if not problem.by_logits:
        choice = scores
    if problem.bias_rows:
        choice = choice + given["correction_bias"]
    exact = problem.by_logits and not problem.bias_rows
    allowed, margin = _in_groups(problem, choice)
    clear = exact | (margin > _CHOICE)
    order = np.argsort(-allowed, axis=1, kind="stable")[:, : problem.top_k]

    ids, weights = got["topk_ids"].astype(np.int64), got["topk_weights"]
    padding = np.zeros(tokens, bool)
    if problem.has_padding:
        padding = given["is_padding"][:tokens] != 0
    if (ids[padding] != -1).any():
        return "a token that is padding has an id other than -1"
    # The weights of padding are kept for the ids that it would have.
    chosen = np.where(padding[:, None], order, ids)
    if chosen.min() < 0 or chosen.max() >= problem.num_experts:
        return f"an id is out of range: {chosen.min()} to {chosen.max()}"
    if (np.diff(np.sort(chosen, axis=1)) == 0).any():
        return "a token has one id twice"
    gap = np.abs(allowed[rows, chosen] - allowed[rows, order])
    wrong = (chosen != order) if exact else ~(gap <= _CHOICE)
    if (wrong & clear[:, None]).any():
        token = int((wrong & clear[:, None]).any(axis=1).argmax())
        return f"token {token} has the ids {ids[token].tolist()}, not {order[token].tolist()}"
    want = _weights(problem, logits, scores, chosen)
    if not problem.keeps_weights:
        want[padding] = 0
    if not np.allclose(weights, want, rtol=_WEIGHT, atol=1e-12):
        token = int(np.argwhere(~np.isclose(weights, want, rtol=_WEIGHT, atol=1e-12))[0, 0])
        return (
            f"token {token} has the weights {weights[token].tolist()}, not {want[token].tolist()}"
        )
    if problem.with_order:
        turn = np.arange(problem.top_k) * tokens + rows
        if (got["token_expert_indices"] != turn).any():
            return "token_expert_indices is not k * num_tokens + token"
    return ""


def _scores(problem: RouteProblem, x: np.ndarray) -> np.ndarray:
    """NumPy's scores of logits, in float64."""
    if problem.scoring == "softmax":
        power = np.exp(x - x.max(axis=1, keepdims=True))
        return power / power.sum(axis=1, keepdims=True)
    if problem.scoring == "sigmoid":
        return 1 / (1 + np.exp(-x))
    return x if problem.scoring == GIVEN_SCORES else np.sqrt(np.logaddexp(0, x))


def _in_groups(problem: RouteProblem, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(what is chosen by, -inf outside the groups that stay; by how much each token's last one stays)."""
    if not problem.limits_groups:
        return choice, np.full(len(choice), np.inf)
    parts = choice.reshape(len(choice), problem.num_groups, problem.group_size)
    best = min(2 if problem.bias_rows else 1, problem.group_size)
    values = np.sort(parts, axis=2)[:, :, -best:].sum(axis=2)
    kept = np.argsort(-values, axis=1, kind="stable")[:, : problem.topk_groups]
    stays = (kept[:, :, None] == np.arange(problem.num_groups)).any(axis=1)
    by_value = -np.sort(-values, axis=1)
    margin = by_value[:, problem.topk_groups - 1] - by_value[:, problem.topk_groups]
    return np.where(stays[:, :, None], parts, -np.inf).reshape(choice.shape), margin


def _weights(problem: RouteProblem, x: np.ndarray, scores: np.ndarray, ids: np.ndarray) -> Any:
    """NumPy's weights of the chosen ids."""
    weights = np.take_along_axis(x if problem.over_chosen else scores, ids, axis=1)
    if problem.over_chosen:
        weights = np.exp(weights - weights.max(axis=1, keepdims=True))
    if problem.over_chosen or (problem.renormalize and problem.scoring != "softmax"):
        weights = weights / (weights.sum(axis=1, keepdims=True) + SUM_FLOOR)
    return weights * problem.scaling_factor
