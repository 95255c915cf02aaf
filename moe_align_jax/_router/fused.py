"""The router and the alignment behind it in one launch, for as many tokens as a cluster holds warps.

Each CTA of a cluster routes its share of the tokens, a warp each, and tells their ids to every CTA: by mail,
or, where it is alone, by shared memory. Then all hold all ids. `split.py` has the code for it, in which some
warps choose and others align. Ids that are mapped before they are counted need another way, in which each
CTA does what one of the alignment's own kernel does with ids in memory: `_align/kernels` is used as it is.
The results are the same.

Bytes: as the two kernels, without the ids' way through memory. Grid: one cluster. Deterministic.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from moe_align_jax._align import config as forms
from moe_align_jax._align import kernels, tables
from moe_align_jax._router import kernel as routing
from moe_align_jax._router import split
from moe_align_jax._router.problem import RouteProblem
from moe_align_jax._router.warp_router import Router
from moe_align_jax._simt.language import WARP, WARPGROUP, Kernel, Program, Simt
from moe_align_jax.types import AlignProblem

# One for each warp of the largest cluster. With two of them 128 tokens take 4.1 us, and the two launches
# apart 3.6 (H200, CUDA graphs, 2026-11-28).
MAX_TOKENS = 64
_MAX_CTAS = 8
_CELLS_PER_CTA = 8192  # rows of output that make another CTA worth its part in the cluster


@dataclass(frozen=True)
class FusedConfig:
    """How one launch is made.

    Attributes:
        form: "split" (`split.py`), or of the alignment, "warp" or "block" as that alone has them.
        num_warpgroups: of a CTA.
        num_ctas: CTAs of the cluster.
    """

    form: str
    num_warpgroups: int
    num_ctas: int


def config_for(problem: RouteProblem, align: AlignProblem) -> FusedConfig | None:
    """None where it takes two launches."""
    pairs = align.num_pairs
    if problem.num_tokens > MAX_TOKENS or routing.unsupported(problem):
        return None
    if pairs <= forms.MAX_WARP_PAIRS:
        form = "warp"
    elif pairs <= tables.MAX_BLOCK_PAIRS and align.num_experts <= forms.MAX_HISTOGRAM_EXPERTS:
        form = "block"
    else:
        return None
    warps = WARPGROUP // WARP
    if split.takes(align, problem.num_tokens):
        # More than 4 routing warps to a CTA wait for each other; a cluster of more than 8 is not portable.
        routers = warps if problem.num_tokens <= _MAX_CTAS * warps else 2 * warps
        return FusedConfig("split", routers // warps + 1, _num_ctas(problem, align, routers))
    groups = 1 if problem.num_tokens <= warps else 2
    return FusedConfig(form, groups, _num_ctas(problem, align, groups * warps))


def _num_ctas(problem: RouteProblem, align: AlignProblem, routers: int) -> int:
    """For so many tokens to a CTA, and for the output."""
    wanted = max(-(-problem.num_tokens // routers), align.capacity // _CELLS_PER_CTA, 1)
    return min(_MAX_CTAS, forms.power_of_two(wanted))


def _by_form(problem: RouteProblem, inner: Kernel, num_ctas: int, everyone: int) -> Any:
    """The router ahead of a kernel of the alignment, as that is."""
    warps, by_mail = everyone // num_ctas, num_ctas > 1

    def body(t: Simt, r: SimpleNamespace) -> None:
        tid = t.thread_id()
        lane, warp = tid & (WARP - 1), tid >> 5
        t.grid_dependency_wait()
        t.launch_dependents()
        router = Router(t, r, problem, lane)
        first = t.cta_id() * warps + warp
        tokens = [first + k for k in range(0, problem.num_tokens, everyone)]
        # All tokens' logits are asked for before one of them is waited for.
        asked = [t.select(token < problem.num_tokens, token, 0) for token in tokens]
        rows = [router.load(token) for token in asked]
        if by_mail:
            t.cluster_ready()
        for token, row in zip(tokens, rows, strict=True):
            with t.if_(token < problem.num_tokens):
                weight, expert = router.choose(row)
                routing.store(router, token, weight, expert)
                with t.if_(lane < problem.top_k):
                    at = token * problem.top_k + lane
                    if by_mail:
                        for cta in range(num_ctas):
                            t.post(cta, at, expert)
                    else:
                        t.store(r.chosen, at, expert)
        if by_mail:
            ids = t.mail()
        else:
            t.block_sync()
            ids = r.chosen
        inner.body(t, SimpleNamespace(**{**vars(r), "topk_ids": ids}))

    return body


def build(problem: RouteProblem, align: AlignProblem, config: FusedConfig) -> Program:
    """`(logits, ..., [the alignment's operands but its ids]) -> (topk_weights, topk_ids, [its results])`."""
    pairs, by_mail = align.num_pairs, config.num_ctas > 1
    if config.form == "split":
        code = split.Split(
            problem,
            align,
            num_warpgroups=config.num_warpgroups,
            num_ctas=config.num_ctas,
        )
        body, shared, mailbox = code.body, code.shared, code.num_words
        tail = code.threads
    else:
        [inner] = kernels.build(
            align,
            forms.BlockAlignMosaicConfig(
                form=config.form, num_warpgroups=config.num_warpgroups, num_ctas=config.num_ctas
            ),
        ).kernels
        everyone = config.num_warpgroups * WARPGROUP // WARP * config.num_ctas
        body, mailbox = _by_form(problem, inner, config.num_ctas, everyone), pairs
        shared = {**inner.shared, **({} if by_mail else {"chosen": pairs})}
        tail = 0

    names, arrays = routing.outputs(problem)
    inputs = {**routing.kernel_inputs(problem), **align.inputs}
    del inputs["topk_ids"]
    outputs = {**names, **align.outputs}
    kernel = Kernel(
        name="route_and_align",
        body=body,
        inputs=inputs,
        outputs=outputs,
        shared=shared,
        num_warpgroups=config.num_warpgroups,
        num_ctas=config.num_ctas,
        cluster=config.num_ctas,
        mailbox=mailbox if by_mail else 0,
        opens_mailbox=by_mail and config.form == "split",
        tail_threads=tail,
        arrays=arrays,
        starts_at_once=config.form == "split",
    )
    return Program(inputs=inputs, kernels=(kernel,), results=tuple(outputs))
