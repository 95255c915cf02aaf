"""A seeded pairwise cover of the sizes and options that users and peers run: the list in cover.json.

The whole grid of sizes alone has 16,905 shapes; any bug that depends on two factors shows in a list that
holds every pair of levels. `python -m tests.cover` writes the list anew; a test checks that it still covers.
"""

import bisect
import itertools
import json
import pathlib
import random
from typing import Any

import numpy as np

from tests import oracle

PATH = pathlib.Path(__file__).with_name("cover.json")

# Sizes: the union of what the tests and benchmarks of vLLM and SGLang run, and E = 65,535.
FACTORS: dict[str, tuple[Any, ...]] = {
    "num_tokens": (0, 1, 3, 4, 8, 16, 64, 128, 256, 1024, 2256, 4096, 8192, 16384, 65536),
    "top_k": (1, 2, 4, 8, 16, 32, 64),
    "num_experts": (
        *(1, 8, 16, 32, 40, 64, 65, 128, 160, 224, 256, 257, 264, 280, 385, 512, 992),
        *(1023, 1024, 1025, 2048, 4095, 9000, 65535),
    ),
    "block_size": (4, 8, 16, 32, 64, 128, 256),
    "dtype": oracle.ID_DTYPES,
    "routing": oracle.ROUTINGS,
    "map": ("none", "second_label", "second_filter", "any_label", "any_filter"),
    "valid": ("none", "half", "zero", "negative", "beyond"),
    "return_inverse": (False, True),
    "pad_sorted_ids": (False, True),
    "container": ("numpy", "jax"),
}

type Case = dict[str, Any]


def pairs_of(case: Case) -> set[tuple]:
    return {((a, case[a]), (b, case[b])) for a, b in itertools.combinations(FACTORS, 2)}


def all_pairs() -> set[tuple]:
    return {
        ((a, x), (b, y))
        for a, b in itertools.combinations(FACTORS, 2)
        for x in FACTORS[a]
        for y in FACTORS[b]
    }


def extremes() -> list[Case]:
    """The corners by size: smallest and largest of each, together."""
    sizes = ("num_tokens", "top_k", "num_experts", "block_size")
    corners = itertools.product(*((FACTORS[s][0], FACTORS[s][-1]) for s in sizes))
    rest = {f: levels[0] for f, levels in FACTORS.items() if f not in sizes}
    return [dict(zip(sizes, corner, strict=True), **rest) for corner in corners]


def generate(seed: int) -> list[Case]:
    """Greedy: each new case starts from a pair not yet covered and takes the best of 40 completions."""
    rng = random.Random(seed)
    cases = extremes()
    left = all_pairs().difference(*map(pairs_of, cases))
    while left:
        # The two factors with the most levels bound the length: serve their pairs first.
        start = max(
            sorted(left, key=repr), key=lambda p: len(FACTORS[p[0][0]]) * len(FACTORS[p[1][0]])
        )
        best: Case = {}
        best_gain = -1
        for _ in range(40):
            case = {f: rng.choice(levels) for f, levels in FACTORS.items()} | dict(start)
            gain = len(pairs_of(case) & left)
            if gain > best_gain:
                best, best_gain = case, gain
        for factor in FACTORS:  # then the best level of each factor in turn
            if factor not in dict(start):
                choices = [best | {factor: level} for level in FACTORS[factor]]
                best = max(choices, key=lambda c: len(pairs_of(c) & left))
        cases.append(best)
        left -= pairs_of(best)
    return cases


def load() -> list[Case]:
    return json.loads(PATH.read_text())


# Sizes that a program without thresholds may treat alike: up to each of these, and beyond.
_COARSE = {
    "num_tokens": (0, 1, 64, 2256),
    "top_k": (1, 8),
    "num_experts": (1, 65, 512, 1025, 9000),
    "block_size": (4, 64),
}


def _coarse_pairs(case: Case) -> set[tuple]:
    levels = {f: bisect.bisect_left(_COARSE[f], x) if f in _COARSE else x for f, x in case.items()}
    levels["dtype"] = case["dtype"].replace("int8", "int16")
    return set(itertools.combinations(levels.items(), 2))


def load_coarse() -> list[Case]:
    """A fifth of the list: every pair of levels where sizes count by order alone, and 8 bits as 16.

    For `xla`, which compiles each of them anew and has no size at which it changes.
    """
    cases = load()
    pairs = [_coarse_pairs(case) for case in cases]
    left, chosen = set().union(*pairs), []
    while left:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & left))
        chosen.append(cases[best])
        left -= pairs[best]
    return chosen


def name(case: Case) -> str:
    sizes = f"T{case['num_tokens']}-k{case['top_k']}-E{case['num_experts']}-b{case['block_size']}"
    flags = "-inverse" * case["return_inverse"] + "-padded" * case["pad_sorted_ids"]
    rest = f"{case['dtype']}-{case['routing']}-map_{case['map']}-valid_{case['valid']}"
    return f"{sizes}-{rest}{flags}-{case['container']}"


def arguments(case: Case) -> tuple[np.ndarray, dict[str, Any]]:
    """The ids and the options of a case, the same every time."""
    seed = sum(map(ord, name(case)))
    sizes = {key: case[key] for key in ("num_tokens", "top_k", "num_experts", "dtype")}
    ids = oracle.route(case["routing"], seed=seed, **sizes)
    kind, _, mode = case["map"].partition("_")
    num_valid = {"none": None, "half": (ids.size + 1) // 2, "zero": 0, "negative": -5}
    options = {
        "block_size": case["block_size"],
        "num_experts": case["num_experts"],
        "expert_map": oracle.local_map(kind, case["num_experts"], seed),
        "ignore_invalid_experts": mode == "filter",
        "pad_sorted_ids": case["pad_sorted_ids"],
        "num_valid_pairs": num_valid.get(case["valid"], ids.size + 7),
        "return_inverse": case["return_inverse"],
    }
    return ids, options


def main() -> None:
    cases = generate(seed=2026)
    lines = ",\n".join(json.dumps(case) for case in cases)
    PATH.write_text(f"[\n{lines}\n]\n")
    print(f"{len(cases)} cases cover {len(all_pairs())} pairs: {PATH.name}")


if __name__ == "__main__":
    main()
