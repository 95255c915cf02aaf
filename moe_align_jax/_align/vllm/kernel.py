"""The programs of vLLM's two other aligned ops: the alignment's own kernels, on refs that stand for others.

`fused_globalize_align_block_size`: an id is read as a pair of words, and counts or does not. Where the
alignment would write a pair's row (`row_of_pair`), its global id is written instead, over the local one. By
then all who read that id must have read it. So either one CTA reads all ids, or each reads its own part of
them ("cluster"; and "grid", whose second kernel writes, and waits for the first).

`moe_lora_align_block_size`: L times the CTAs. Those of adapter l take its tokens' pairs alone, and write its
row of each buffer; an adapter that is not in use has neither pairs nor rows.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

from moe_align_jax._align import kernels, tables
from moe_align_jax._align.vllm.problem import MAX_LORA_IDS, AdaptersProblem, ReceivedProblem
from moe_align_jax._align.vllm.views import Computed, Further, PartOfGrid
from moe_align_jax._core.int32 import INT32_MAX, cdiv
from moe_align_jax._simt.language import WARP, Int, Kernel, Program, Simt

# The forms that read a pair's id in one CTA alone, or can.
_FORMS = ("warp", "pairs", "block", "cluster", "grid")
_ONE_CTA = ("warp", "pairs", "block")  # otherwise every CTA reads all ids
_ALIGNED = 64  # words: where a buffer between the kernels begins


def unsupported(problem: ReceivedProblem | AdaptersProblem) -> str | None:
    """Why the kernels do not take this, or None."""
    form = tables.config_for(problem.align).form
    if form not in _FORMS:
        return f"{problem.num_experts} experts take the form {form!r}, not one of {_FORMS}"
    if isinstance(problem, AdaptersProblem) and problem.num_lora_ids > MAX_LORA_IDS:
        return f"the kernels look through {MAX_LORA_IDS} lora_ids; got {problem.num_lora_ids}"
    return None


def build(problem: ReceivedProblem | AdaptersProblem) -> Program:
    """The kernels of a call that is not `unsupported`."""
    config = tables.config_for(problem.align)
    if isinstance(problem, AdaptersProblem):
        return _adapters(problem, kernels.build(problem.align, config))
    if config.form in _ONE_CTA:
        config = dataclasses.replace(config, num_ctas=1)
    return _received(problem, kernels.build(problem.align, config))


def _begin(t: Simt, is_first: bool) -> None:
    """The first kernel of a program waits for those before it. What the others read here, ahead of their own
    wait, was written before the first one began to work: it lets the next one start after its own wait."""
    if is_first:
        t.grid_dependency_wait()
        t.launch_dependents()


# -- for DeepEP ----------------------------------------------------------------------------------------------


def _received(problem: ReceivedProblem, inner: Program) -> Program:
    """The kernels of the alignment `inner`, on refs that stand for what DeepEP received."""
    given, results = problem.inputs, problem.outputs
    built = []
    for kernel in inner.kernels:
        between = {k: v for k, v in kernel.inputs.items() if k not in problem.align.inputs}
        outputs = {k: v for k, v in kernel.outputs.items() if k != "row_of_pair"}
        if "row_of_pair" in kernel.outputs:
            outputs |= {k: v for k, v in results.items() if k in ("topk_idx", "scatter_idx")}
        built.append(
            dataclasses.replace(
                kernel,
                name=kernel.name.replace("moe_align", "globalize_align"),
                body=_of_received(problem, kernel, not built),
                inputs={**given, **between},
                outputs=outputs,
            )
        )
    return Program(inputs=given, kernels=tuple(built), results=tuple(results))


def _of_received(problem: ReceivedProblem, kernel: Kernel, is_first: bool) -> Any:
    """A kernel of the alignment that reads what was received."""

    def body(t: Simt, r: SimpleNamespace) -> None:
        first, bound = t.launch_value(r.first_expert), t.launch_value(r.bound)
        last = t.launch_value(r.last_rank) * problem.psum_words
        _begin(t, is_first)
        received = t.load(r.psum, last)
        if problem.psum_words == 2:
            # More than int32 holds is every token; less than 0 is none.
            high = t.load(r.psum, last + 1)
            most = t.select(high.eq(0) & (received >= 0), received, INT32_MAX)
            received = t.select(high < 0, 0, most)

        def local(pair: Int) -> Int:
            low, high = (t.load(r.local_ids, pair * 2 + k) for k in range(2))
            counts = low.below(bound) & high.eq(0) & (pair // problem.top_k < received)
            return t.select(counts, low, -1)

        def globalize(pair: Int, row: Int) -> None:
            kept = row >= 0
            low = t.select(kept, t.load(r.local_ids, pair * 2) + first, -1)
            t.store2(r.topk_idx, pair * 2, (low, t.select(kept, 0, -1)))
            if problem.with_scatter:
                t.store(r.scatter_idx, pair, t.select(kept, pair, -1))

        refs = {
            **vars(r),
            "topk_ids": Computed(local),
            "first_id": Computed(lambda _: t.const(0)),
            "row_of_pair": Computed(put=globalize),
        }
        part = PartOfGrid(t, kernel.num_ctas, waited=is_first)
        kernel.body(cast(Simt, part), SimpleNamespace(**refs))

    return body


# -- for LoRA ------------------------------------------------------------------------------------------------


def _adapters(problem: AdaptersProblem, inner: Program) -> Program:
    """The kernels of the alignment `inner`, each once more for every adapter, in one grid."""
    own = problem.inputs
    built, between = [], {}
    for kernel in inner.kernels:
        inputs = {**own, **{k: between[k] for k in kernel.inputs if k in between}}
        outputs = {}
        for name, shape in kernel.outputs.items():
            if name in problem.outputs:
                outputs[name] = problem.outputs[name]
            else:
                between[name] = outputs[name] = (problem.num_adapters * _stride(shape),)
        built.append(
            dataclasses.replace(
                kernel,
                name=kernel.name.replace("moe_align", "moe_lora_align"),
                body=_of_an_adapter(problem, kernel, not built),
                inputs=inputs,
                outputs=outputs,
                num_ctas=problem.num_adapters * kernel.num_ctas,
                partial=frozenset(outputs),
            )
        )
    return Program(inputs=own, kernels=tuple(built), results=tuple(problem.outputs))


def _stride(shape: tuple[int, ...]) -> int:
    """Words from one adapter's part of a buffer between the kernels to the next one's."""
    [words] = shape
    return cdiv(words, _ALIGNED) * _ALIGNED


def _of_an_adapter(problem: AdaptersProblem, kernel: Kernel, is_first: bool) -> Any:
    """A kernel of the alignment, as the CTAs of each adapter run it."""

    def body(t: Simt, r: SimpleNamespace) -> None:
        adapter = t.cta_id() // kernel.num_ctas
        n, most = t.launch_value(r.num_pairs), t.launch_value(r.capacity)
        _begin(t, is_first)
        in_use = _in_use(t, r, problem, adapter)
        capacity = t.select(in_use, most, 0)

        def served(at: Any) -> Int:
            pair = at[0] if isinstance(at, tuple) else at
            mine = t.load(r.token_lora_mapping, pair // problem.top_k).eq(adapter)
            return t.select(mine & in_use, t.load(r.topk_ids, at), -1)

        blocks = cdiv(most, problem.block_size)
        refs = {
            **vars(r),
            "topk_ids": Computed(served),
            "num_pairs": Computed(lambda _: n),
            "capacity": Computed(lambda _: capacity),
            "first_id": Computed(lambda _: t.const(0)),
        }
        parts = {
            "sorted_token_ids": Further(None, adapter * most, problem.whole_rows),
            "expert_ids": Further(None, adapter * blocks, False),
            "num_tokens_post_padded": Further(None, adapter, False, in_use),
        }
        for name in (*kernel.inputs, *kernel.outputs):
            if name in parts:
                refs[name] = dataclasses.replace(parts[name], ref=refs[name])
            elif name not in problem.align.inputs:
                words = _stride({**kernel.inputs, **kernel.outputs}[name])
                refs[name] = Further(refs[name], adapter * words, True)
        part = PartOfGrid(t, kernel.num_ctas, adapter, waited=is_first)
        kernel.body(cast(Simt, part), SimpleNamespace(**refs))

    return body


def _in_use(t: Simt, r: SimpleNamespace, problem: AdaptersProblem, adapter: Int) -> Int:
    """Whether `lora_ids` names the adapter, and it is enabled. By whole warps."""
    lane, count = t.thread_id() & (WARP - 1), problem.num_lora_ids
    enabled = t.load(r.adapter_enabled, adapter)
    named = t.const(0)
    for start in range(0, count, WARP):
        at = lane + start
        # The last one again, where a lane has none.
        found = t.load(
            r.lora_ids, at if start + WARP <= count else t.select(at < count, at, count - 1)
        )
        named = named | t.ballot(found.eq(adapter))
    return named.ne(0) & enabled.ne(0)
