"""The router's kernel: a warp chooses for one token (warp_router.py).

Bytes: every logit read once, every result written once. Grid: a CTA for each 4 tokens, or 8 where they are
many. Deterministic.
"""

from types import SimpleNamespace
from typing import Any

from moe_align_jax._router.lanes import MAX_EXPERTS, MAX_GROUPS, MAX_TOP_K
from moe_align_jax._router.problem import RouteProblem
from moe_align_jax._router.warp_router import Router
from moe_align_jax._simt.language import WARP, WARPGROUP, Int, Kernel, Program, Simt

# From so many tokens on two warpgroups to a CTA are 3 to 12% faster than one (H200, 2026-11-28).
MANY_TOKENS = 4096

# From so many tokens on keys move by multiplications (`Router`). E = 256, with them and without, in us: 8192
# tokens take 5.11 and 5.36, but 64 take 1.54 and 1.49, 32 take 1.53 and 1.48. A launch of two warps to a
# scheduler is slower with them, too (`split.py`, 64 tokens: 2.12 and 2.09), which is how dense the 132 SMs
# of an H200 are at 1056 tokens. H200, under jit, device spans, 2026-11-29; sizes between were not measured.
MULTIPLY_FROM = 1057


def unsupported(problem: RouteProblem) -> str | None:
    """Why the kernel cannot run this, or None."""
    for what, value, limit in (
        ("experts", problem.num_experts, MAX_EXPERTS),
        ("chosen experts", problem.top_k, MAX_TOP_K),
        ("groups", problem.num_groups if problem.limits_groups else 1, MAX_GROUPS),
        ("logits", problem.num_tokens * problem.num_experts, 2**31 - 1),
    ):
        if value > limit:
            return f"the router's kernel takes up to {limit} {what}; got {value}"
    return None


def kernel_inputs(problem: RouteProblem) -> dict[str, tuple[int, ...]]:
    """Words of each operand, flat."""
    sizes = {}
    for name, shape in problem.inputs.items():
        size = shape[0] * (shape[1] if len(shape) > 1 else 1)
        halves = name == "logits" and problem.dtype != "float32"
        sizes[name] = (-(-size // 2) if halves else size,)
    return sizes


def outputs(problem: RouteProblem) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Words of each result, flat; and what is no int32 outside."""
    size = problem.num_tokens * problem.top_k
    shape = (size,)
    names = dict.fromkeys(problem.outputs, shape)
    names["topk_ids"] = (size * problem.id_words,)
    return names, {"topk_weights": (shape, "float32")}


def store(router: Router, token: Int, weight: Int, expert: Int) -> None:
    """Lane k's weight and expert."""
    t, r, problem, lane = router.t, router.r, router.problem, router.lane
    with t.if_(lane < problem.top_k):
        at = token * problem.top_k + lane
        t.store(r.topk_weights, at, weight)
        if problem.id_words == 1:
            t.store(r.topk_ids, at, expert)
        else:
            t.store2(r.topk_ids, at * 2, (expert, 0 - (expert >> 31)))
        if problem.with_order:
            t.store(r.token_expert_indices, at, lane * router.num_tokens + token)


def build(problem: RouteProblem) -> Program:
    """`(logits, ...) -> (topk_weights, topk_ids)`, all flat."""
    num_warpgroups = 1 if problem.num_tokens < MANY_TOKENS else 2
    warps = num_warpgroups * WARPGROUP // WARP

    def body(t: Simt, r: SimpleNamespace) -> None:
        tid = t.thread_id()
        lane, warp = tid & (WARP - 1), tid >> 5
        token = t.cta_id() * warps + warp
        t.grid_dependency_wait()
        t.launch_dependents()
        router = Router(t, r, problem, lane, multiplies=problem.num_tokens >= MULTIPLY_FROM)
        exact = problem.num_tokens % warps == 0 and not problem.sized_at_launch
        asked = token if exact else t.select(token < router.num_tokens, token, 0)
        loaded = router.load(asked)
        with t.if_(token < router.num_tokens):
            store(router, token, *router.choose(loaded))

    names, arrays = outputs(problem)
    kernel = Kernel(
        name="route_topk",
        body=body,
        inputs=kernel_inputs(problem),
        outputs=names,
        num_warpgroups=num_warpgroups,
        num_ctas=-(-problem.num_tokens // warps),
        arrays=arrays,
        starts_at_once=True,
    )
    return Program(inputs=kernel.inputs, kernels=(kernel,), results=tuple(names))
