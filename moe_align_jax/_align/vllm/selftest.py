"""Self-test of the programs of vLLM's two other aligned ops, against NumPy, before their first use."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moe_align_jax._align.vllm.problem import AdaptersProblem, ReceivedProblem
from moe_align_jax._core.int32 import cdiv

_UNWRITTEN = 0x5EED5EED  # what the outputs hold before, as the compiling process fills them


class Example(NamedTuple):
    """One call, and what it must give.

    Attributes:
        sizes: what the launch gives by value.
        inputs: an array for each other operand.
        buffers: what each result holds before; `topk_idx` is not among them: it lies where `local_ids` does.
        expected: what each result holds behind.
        aliases: outputs that are one piece of memory with an input.
    """

    sizes: dict[str, int]
    inputs: dict[str, Any]
    buffers: dict[str, Any]
    expected: dict[str, Any]
    aliases: dict[str, str] = {}  # noqa: RUF012

    @property
    def outputs(self) -> dict[str, int]:
        """Bytes of each result that has memory of its own."""
        return {name: array.nbytes for name, array in self.buffers.items()}


def examples(problem: ReceivedProblem | AdaptersProblem) -> list[Example]:
    """A call of the most pairs, and a smaller one."""
    most = problem.num_pairs // problem.top_k
    tokens = sorted({most, max(1, most * 3 // 4 - 1)})
    return [example(problem, count * problem.top_k, seed) for seed, count in enumerate(tokens)]


def mismatch(
    problem: ReceivedProblem | AdaptersProblem, example: Example, read: Callable[[str, Any], Any]
) -> str:
    """What is wrong with the results, or "". `read(name, into)` reads one into an array."""
    del problem
    for name, want in example.expected.items():
        got = read(name, np.empty_like(want))
        if (wrong := np.flatnonzero(got != want)).size:
            at = int(wrong[0])
            return f"{name}[{at}] is {got[at]}, not {want[at]}"
    return ""


def aligned(
    ids: np.ndarray, num_experts: int, block_size: int, capacity: int
) -> dict[str, np.ndarray]:
    """The alignment of flat ids; those outside [0, num_experts) are dropped."""
    n = len(ids)
    [kept] = np.nonzero((ids >= 0) & (ids < num_experts))
    order = kept[np.argsort(ids[kept], kind="stable")]
    counts = np.bincount(ids[kept], minlength=num_experts)
    padded = -(-counts // block_size) * block_size
    place = np.arange(len(order)) - (np.cumsum(counts) - counts)[ids[order]]
    rows = np.full(capacity, n, np.int32)
    rows[(np.cumsum(padded) - padded)[ids[order]] + place] = order
    blocks = np.full(cdiv(capacity, block_size), -1, np.int32)
    labels = np.repeat(np.arange(num_experts), padded // block_size)
    blocks[: len(labels)] = labels
    total = np.array([padded.sum()], np.int32)
    return {"sorted_token_ids": rows, "expert_ids": blocks, "num_tokens_post_padded": total}


def example(problem: ReceivedProblem | AdaptersProblem, n: int, seed: int) -> Example:
    """A call of n pairs with random ids, some of them out of range.

    Args:
        problem: of the program.
        n: pairs, a multiple of top_k, up to the problem's.
        seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)
    capacity = n + min(n, problem.num_experts) * (problem.block_size - 1)
    capacity = min(-(-capacity // 4) * 4, problem.capacity)
    if isinstance(problem, ReceivedProblem):
        return _received(problem, n, capacity, rng)
    if not problem.whole_rows:
        capacity += capacity % 4 == 0
    return _adapters(problem, n, capacity, rng)


def _received(problem: ReceivedProblem, n: int, capacity: int, rng: Any) -> Example:
    """An example of n pairs with what NumPy makes of it: ids out of range, tokens that did not come."""
    experts, first = problem.num_experts, 7
    bound = max(1, experts - 1)  # the last one lies beyond the global experts
    ids = rng.integers(-2, experts + 1, n)
    ids[rng.integers(0, n, n // 16)] = 2**32
    tokens = n // problem.top_k
    received = tokens - tokens // 8
    psum = np.full(problem.num_ranks, received, np.int64 if problem.psum_words == 2 else np.int32)
    psum[:-1] = 0
    kept = (ids >= 0) & (ids < bound) & (np.arange(n) // problem.top_k < received)
    expected = aligned(np.where(kept, ids, -1), experts, problem.block_size, capacity)
    expected["topk_idx"] = np.where(kept, ids + first, -1)
    if problem.with_scatter:
        expected["scatter_idx"] = np.where(kept, np.arange(n), -1).astype(np.int32)
    sizes = {
        "num_pairs": n,
        "capacity": capacity,
        "first_expert": first,
        "bound": bound,
        "last_rank": problem.num_ranks - 1,
    }
    buffers = {
        name: np.full_like(want, _UNWRITTEN)
        for name, want in expected.items()
        if name != "topk_idx"
    }
    inputs = {"local_ids": ids, "psum": psum}
    return Example(sizes, inputs, buffers, expected, {"topk_idx": "local_ids"})


def _adapters(problem: AdaptersProblem, n: int, capacity: int, rng: Any) -> Example:
    """An example of n pairs with what NumPy makes of it: adapters that are not in use, tokens without one."""
    adapters, experts = problem.num_adapters, problem.num_experts
    ids = rng.integers(-2, experts + 2, n).astype(np.int64 if problem.id_words == 2 else np.int32)
    mapping = rng.integers(-1, adapters, n // problem.top_k).astype(np.int32)
    enabled = (rng.integers(0, 4, adapters) > 0).astype(np.int32)
    enabled[0] = 5  # not 0
    in_use = rng.integers(-1, adapters + 1, problem.num_lora_ids).astype(np.int32)
    in_use[-1] = 0
    inputs = {
        "topk_ids": ids,
        "token_lora_mapping": mapping,
        "adapter_enabled": enabled,
        "lora_ids": in_use,
    }
    local = ids
    if problem.has_expert_map:
        expert_map = rng.integers(-2, experts + 1, experts).astype(np.int32)
        inputs["expert_map"] = expert_map
        valid = (ids >= 0) & (ids < experts)
        local = np.where(valid, expert_map[np.where(valid, ids, 0)], -1)
    buffers: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    for adapter in range(adapters):
        mine = np.repeat(mapping == adapter, problem.top_k)
        want = aligned(np.where(mine, local, -1), experts, problem.block_size, capacity)
        for name, row in want.items():
            before = np.full_like(row, _UNWRITTEN)
            buffers.setdefault(name, []).append(before)
            active = enabled[adapter] and adapter in in_use
            expected.setdefault(name, []).append(row if active else before)
    sizes = {"num_pairs": n, "capacity": capacity}
    buffers, expected = (
        {name: np.concatenate(rows) for name, rows in each.items()} for each in (buffers, expected)
    )
    return Example(sizes, inputs, buffers, expected)
