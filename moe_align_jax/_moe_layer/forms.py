"""Which tiles a layer's products have, and how many kernels all batch sizes of a model need. No jax here."""

import functools

from moe_align_jax._core import checks
from moe_align_jax._grouped_matmul import choose_tiles, config, token_sum_config
from moe_align_jax._grouped_matmul.tile_rules import DEFAULT_RULES
from moe_align_jax._moe_layer import plan
from moe_align_jax._moe_layer.plan import LayerProblem, is_static

MOST_KERNELS = 12  # of the two products, that a model's batch sizes need
_MOST_TOKENS = 16_384  # of the batches that are counted


def tiles_of(
    problem: LayerProblem, gpu_kind: str | None, *, copies: bool = True
) -> tuple[str, str]:
    """Names of the tiles of both products under jit; `copies`: whether a launch may copy rows first."""
    both = (problem.first_forward, problem.second)
    if copies:
        both = tuple(choose_tiles.as_multiplied(each, gpu_kind) for each in both)
    first, second = (choose_tiles.config_for(each, gpu_kind).name for each in both)
    sums = problem.token_sum and token_sum_config.config_for(problem.token_sum)
    return first, sums.name if sums else second


def planned(problem: LayerProblem) -> LayerProblem:
    """The same layer, with the least `few_forms` by which its model needs no more than `MOST_KERNELS`.

    Few tokens have most of the forms: without an alignment, several CTAs share what few tiles there are. One
    H200, 2026-11-30, the products' kernels, of their time with 0: 1: GPT-OSS 120B 0.93 to 1, SonicMoE
    30B 0.99 to 1, Qwen3-235B-A22B 0.93 to 1.01; 2: 32 experts of top_k 1 1 to 1.09, [E, H, 2 N] 1 to 1.15.
    """
    if not problem.pairs or problem.scales or not is_static(problem.num_tokens):
        return problem
    if config.unsupported(problem.first) or config.unsupported(problem.second):
        return problem
    smallest = problem._replace(num_tokens=1, num_rows=problem.top_k)
    for few_forms in (0, 1):
        if _num_kernels(smallest._replace(few_forms=few_forms)) <= MOST_KERNELS:
            return problem._replace(few_forms=few_forms)
    return problem._replace(few_forms=2)


@functools.cache
def _num_kernels(model: LayerProblem) -> int:
    """Kernels of both products that batches of up to 16384 tokens need; `model`: any of them."""
    few = model.num_experts // (plan.PAIRS_PER_EXPERT * model.top_k)
    found = set()
    for tokens in [*range(1, few + 1), *_ends_of_forms(model, few)]:
        each = _of_tokens(model, tokens)
        first, second = tiles_of(each, None)
        found |= {("first", each.block_size, first), ("second", each.block_size, second)}
    return len(found)


def _ends_of_forms(model: LayerProblem, few: int) -> list[int]:
    """Batch sizes with an alignment: the last before another block size, or before rows are copied, and the
    next one."""
    rules, kind = DEFAULT_RULES, _kind(model)
    means = [most for most, _ in plan.block_sizes(model.num_experts, kind)]
    means += [rules.permute_rows, rules.spread_rows]
    pairs = [int(min(mean * model.num_experts, _MOST_TOKENS * model.top_k)) for mean in means]
    ends = {n // model.top_k + more for n in pairs for more in (0, 1)}
    return sorted(tokens for tokens in ends if few < tokens <= _MOST_TOKENS)


def _of_tokens(model: LayerProblem, tokens: int) -> LayerProblem:
    """The layer with so many tokens, in the block size of its choice."""
    pairs, experts = tokens * model.top_k, model.num_experts
    if plan.without_alignment(pairs, experts):
        return model._replace(num_tokens=tokens, num_rows=pairs, block_size=1, pairs=True)
    rows = plan.block_size_for(pairs, experts, _kind(model))
    num_rows = checks.max_num_tokens_padded(pairs, block_size=rows, num_experts=experts)
    sizes = {"num_tokens": tokens, "num_rows": num_rows, "block_size": rows}
    return model._replace(**sizes, pairs=False)


def _kind(model: LayerProblem) -> str:
    """Of its blocks."""
    sizes = (model.hidden, model.ffn)
    return plan.kind_of_blocks(model.gate_up, *sizes, bias_down=model.bias_down)
