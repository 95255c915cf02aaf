"""The torch operators, with fakes of pure size arithmetic (they need no jax).

Each has two: `NAME` launches directly where that is possible, and can be captured into CUDA graphs;
`NAME_dlpack` goes through jax and is tagged unsafe for them, so that inductor splits its graphs
there. Which one is called is decided before tracing, by the device (`chosen`).
`Library.define` and `impl` cost a call about 1 us; `torch.library.custom_op` costs 7. A list of
results costs more than a tuple, and so does each option that could be passed: the plain call has an
overload of its own.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_align_jax._core import checks as _checks
from torch_bridge import _checks as checks
from torch_bridge import _plan, dlpack
from torch_bridge._direct import fast_path, program
from torch_bridge._dlpack_path import run as call
from torch_bridge._specs import AlignProblem, BatchedProblem, Problem, SglangProblem

_NAMESPACE = "moe_align_jax"
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")
_COMPLIANT = (torch.Tag.pt2_compliant_tag,)
_UNSAFE = tuple(t for t in (getattr(torch.Tag, "cudagraph_unsafe", None),) if t is not None)

# Trailing defaults cost nothing: the dispatcher hands a Python body only what differs from them.
_ALIGN_SIZES = "Tensor topk_ids, int num_experts, int block_size"
_ALIGN_OPTIONS = (
    "Tensor? expert_map=None, Tensor? num_valid_pairs=None, SymInt? max_valid_pairs=None, "
    "bool ignore_invalid_experts=False, bool pad_sorted_ids=False"
)
_SCHEMAS = {
    "block_align": f"({_ALIGN_SIZES}) -> (Tensor, Tensor, Tensor)",
    "block_align.options": (
        f"({_ALIGN_SIZES}, {_ALIGN_OPTIONS}, bool with_counts=False, bool with_inverse=False, "
        "bool with_scatter_idx=False) -> Tensor[]"
    ),
    "block_align_out": (
        f"({_ALIGN_SIZES}, Tensor(a!) sorted_token_ids, Tensor(b!) expert_ids, "
        f"Tensor(c!) num_tokens_post_pad, {_ALIGN_OPTIONS}) -> ()"
    ),
    "sglang_block_align": (
        "(Tensor topk_ids, int num_experts, int block_size, bool ignore_invalid_expert, "
        "bool with_inactive_blocks) -> (Tensor, Tensor, Tensor)"
    ),
    "batched_block_align": (
        "(Tensor expert_num_tokens, int max_tokens_per_batch, int block_size) "
        "-> (Tensor, Tensor, Tensor)"
    ),
}


# -- bodies on real tensors ----------------------------------------------------------------------


def plan_call(
    function: str,
    problem: Problem,
    operands: dict[str, torch.Tensor],
    out: Sequence[torch.Tensor] | None,
    path: str = "auto",
) -> _plan.Plan:
    """The guards that need data, then the plan: all that comes before a call writes anything."""
    for name, tensor in operands.items():
        dlpack.check_tensor(function, name, tensor)
    first = next(iter(operands))
    checks.check_capacity(function, first, problem.capacity)
    if out is not None:
        check_no_overlap(function, out, operands)
    return _plan.make_plan(problem, operands, path=path, out=out, function=function)


def run(
    problem: Problem,
    operands: dict[str, torch.Tensor],
    max_valid_pairs: int | None = None,
    out: Sequence[torch.Tensor] | None = None,
    path: str = "auto",
    function: str | None = None,
    whole: tuple[Problem, Sequence[torch.Tensor]] | None = None,
) -> list[torch.Tensor]:
    """Plans a call and does it. With "auto", a program that cannot be made costs one warning.

    `whole`: a problem and `out` of more rows, which a launch may fill as well; what is returned says whether.
    """
    the_plan = plan_call(function or problem.name, problem, operands, out, path)
    if the_plan.path == "direct" and max_valid_pairs is None:
        fast_path.keep(problem, operands)
    try:
        if whole and the_plan.path == "direct":
            with contextlib.suppress(program.TooManyRows):
                return call.execute(the_plan, whole[0], operands, out=whole[1])
        return call.execute(the_plan, problem, operands, max_valid_pairs=max_valid_pairs, out=out)
    except program.Unavailable as reason:
        if path == "direct":
            remedy = f"{reason} Pass path='auto' or 'dlpack'."
            text = _checks.message(
                problem.name, "path", "be one that can run here", "'direct'", remedy
            )
            raise NotImplementedError(text) from None
        program.warn_once(str(reason))
    the_plan = plan_call(function or problem.name, problem, operands, out, "dlpack")
    return call.execute(the_plan, problem, operands, max_valid_pairs=max_valid_pairs, out=out)


def align_operands(topk_ids, expert_map, num_valid_pairs) -> dict[str, torch.Tensor]:
    named = {"topk_ids": topk_ids, "expert_map": expert_map, "num_valid_pairs": num_valid_pairs}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _block_align(topk_ids, num_experts, block_size):
    sizes = (num_experts, block_size)
    last = fast_path.recent.get(sizes)
    if last is not None and last.fits(topk_ids):
        results = last.run(topk_ids)
    else:
        results = fast_path.look_up(topk_ids, sizes)
    if results is not None:
        return results
    return tuple(_block_align_options("auto", topk_ids, num_experts, block_size))


def _block_align_dlpack(topk_ids, num_experts, block_size):
    return tuple(_block_align_options("dlpack", topk_ids, num_experts, block_size))


def _block_align_options(
    path,
    topk_ids,
    num_experts,
    block_size,
    expert_map=None,
    num_valid_pairs=None,
    max_valid_pairs=None,
    ignore_invalid_experts=False,
    pad_sorted_ids=False,
    with_counts=False,
    with_inverse=False,
    with_scatter_idx=False,
):
    if path == "auto" and max_valid_pairs is None:
        results = fast_path.attempt(
            topk_ids,
            num_experts,
            block_size,
            pad_sorted_ids,
            expert_map,
            ignore_invalid_experts,
            num_valid_pairs=num_valid_pairs,
            form=fast_path.align_form(with_counts, with_inverse, with_scatter_idx),
        )
        if results is not None:
            return list(results)
    problem = AlignProblem(
        topk_ids.numel(),
        num_experts,
        block_size,
        ignore_invalid_experts,
        pad_sorted_ids,
        with_counts,
        with_inverse,
        with_scatter_idx,
    )
    operands = align_operands(topk_ids, expert_map, num_valid_pairs)
    return run(problem, operands, max_valid_pairs, path=path)


def _block_align_out(
    path,
    topk_ids,
    num_experts,
    block_size,
    sorted_token_ids,
    expert_ids,
    num_tokens_post_pad,
    expert_map=None,
    num_valid_pairs=None,
    max_valid_pairs=None,
    ignore_invalid_experts=False,
    pad_sorted_ids=False,
):
    problem = AlignProblem(
        topk_ids.numel(), num_experts, block_size, ignore_invalid_experts, pad_sorted_ids
    )
    operands = align_operands(topk_ids, expert_map, num_valid_pairs)
    out = (sorted_token_ids, expert_ids, num_tokens_post_pad)
    run(problem, operands, max_valid_pairs, out, path)


def _sglang_block_align(
    path, topk_ids, num_experts, block_size, ignore_invalid_expert, with_inactive_blocks
):
    if path == "auto":
        form = fast_path.sglang_form(with_inactive_blocks)
        results = fast_path.attempt(
            topk_ids,
            num_experts,
            block_size,
            ignore_invalid_experts=ignore_invalid_expert,
            form=form,
        )
        if results is not None:
            return results
    problem = SglangProblem(
        topk_ids.numel(), num_experts, block_size, ignore_invalid_expert, with_inactive_blocks
    )
    return tuple(run(problem, {"topk_ids": topk_ids}, path=path))


def _batched_block_align(path, expert_num_tokens, max_tokens_per_batch, block_size):
    problem = BatchedProblem(expert_num_tokens.shape[0], max_tokens_per_batch, block_size)
    return tuple(run(problem, {"expert_num_tokens": expert_num_tokens}, path=path))


# -- fakes ---------------------------------------------------------------------------------------


def _fake_results(problem: Problem, like: torch.Tensor) -> list[torch.Tensor]:
    return [like.new_empty(shape, dtype=torch.int32) for shape in problem.outputs.values()]


def _block_align_fake(topk_ids, num_experts, block_size):
    problem = AlignProblem(topk_ids.numel(), num_experts, block_size)
    return tuple(_fake_results(problem, topk_ids))


def _block_align_options_fake(
    topk_ids,
    num_experts,
    block_size,
    expert_map=None,
    num_valid_pairs=None,
    max_valid_pairs=None,
    *options,
    **named,
):
    problem = AlignProblem(topk_ids.numel(), num_experts, block_size, *options, **named)
    return _fake_results(problem, topk_ids)


def _block_align_out_fake(*arguments, **named):
    del arguments, named


def _sglang_block_align_fake(topk_ids, *options):
    return tuple(_fake_results(SglangProblem(topk_ids.numel(), *options), topk_ids))


def _batched_block_align_fake(expert_num_tokens, max_tokens_per_batch, block_size):
    problem = BatchedProblem(expert_num_tokens.shape[0], max_tokens_per_batch, block_size)
    return tuple(_fake_results(problem, expert_num_tokens))


def on_path(body: Callable[..., Any], path: str) -> Callable[..., Any]:
    """The body with its first argument. (Torch takes functions only.)"""
    return lambda *arguments, **named: body(path, *arguments, **named)


def both(body: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A body for each of the two paths."""
    return on_path(body, "auto"), on_path(body, "dlpack")


_BODIES = {
    "block_align": ((_block_align, _block_align_dlpack), _block_align_fake),
    "block_align.options": (both(_block_align_options), _block_align_options_fake),
    "block_align_out": (both(_block_align_out), _block_align_out_fake),
    "sglang_block_align": (both(_sglang_block_align), _sglang_block_align_fake),
    "batched_block_align": (both(_batched_block_align), _batched_block_align_fake),
}
_OPERATORS: dict[str, Callable[..., Any]] = {}


def dlpack_name(base: str) -> str:
    """The name of an operator's twin."""
    name, dot, overload = base.partition(".")
    return f"{name}_dlpack{dot}{overload}"


def register(
    library: torch.library.Library,
    base: str,
    schema: str,
    bodies: tuple[Callable[..., Any], Callable[..., Any]],
    fake: Callable[..., Any],
) -> None:
    """Defines the operator `base` and its twin through DLPack."""
    names, tags = (base, dlpack_name(base)), (_COMPLIANT, _COMPLIANT + _UNSAFE)
    for name, body, tag in zip(names, bodies, tags, strict=True):
        library.define(name + schema, tags=tag)
        for key in ("CPU", "CUDA"):
            library.impl(name, body, key)
        # Otherwise the dispatcher resolves a neg-bit view by a copy that no plan knows of.
        library.impl(name, torch.library.fallthrough_kernel, "Negative")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=library)
        packet, _, overload = name.partition(".")
        _OPERATORS[name] = getattr(getattr(torch.ops.moe_align_jax, packet), overload or "default")


for _base, (_bodies, _fake) in _BODIES.items():
    register(_library, _base, _SCHEMAS[_base], _bodies, _fake)


def name_for(base: str, device: torch.device, path: str = "auto") -> str:
    """The operator for this device: direct where a launch is possible, else DLPack's."""
    if path != "dlpack" and device.type == "cuda" and program.launches_on(device.index):
        return base
    return dlpack_name(base)


def chosen(base: str, device: torch.device, path: str = "auto") -> Callable[..., Any]:
    """The operator that `name_for` names."""
    return _OPERATORS[name_for(base, device, path)]


# -- out= ----------------------------------------------------------------------------------------


def check_no_overlap(
    function: str, out: Sequence[torch.Tensor], operands: dict[str, torch.Tensor]
) -> None:
    """No tensor of `out` shares a byte with another of them or with an input."""
    for i, target in enumerate(out):
        others = [(f"out[{j}]", x) for j, x in enumerate(out) if j < i] + list(operands.items())
        for name, other in others:
            if overlaps(target, other):
                raise ValueError(
                    _checks.message(
                        function,
                        f"out[{i}]",
                        f"not overlap {name}",
                        "tensors that share memory",
                        "Pass tensors of their own memory, for example from torch.empty.",
                    )
                )


def overlaps(target: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a contiguous tensor shares a byte with another one of any strides."""
    if not target.numel() or not other.numel():
        return False
    start, end = target.data_ptr(), target.data_ptr() + target.nbytes
    reach = sum((n - 1) * s for n, s in zip(other.shape, other.stride(), strict=True))
    first, last = other.data_ptr(), other.data_ptr() + (reach + 1) * other.element_size()
    if last <= start or end <= first:
        return False
    if other.is_contiguous():
        return True
    # Rare: the spans cross, but a strided tensor may step over the target. Look at its elements.
    offsets = torch.zeros((), dtype=torch.int64)
    for n, s in zip(other.shape, other.stride(), strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(n) * s
    addresses = first + offsets * other.element_size()
    return bool(((addresses < end) & (addresses + other.element_size() > start)).any())
