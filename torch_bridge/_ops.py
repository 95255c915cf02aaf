"""The torch operators, with fakes that compute sizes only (they need no jax).

Each has a twin: `NAME` launches directly where that is possible, and can be captured into CUDA graphs;
`NAME_dlpack` goes through jax and is tagged unsafe for CUDA graphs, so that inductor splits its graphs there.
Which of the two a graph holds is decided before tracing, by the device (`chosen`).

`Library.define` and `impl` cost a call about 1 us; `torch.library.custom_op` costs 7. A list of results
costs more than a tuple, and so does each option that could be passed: the plain call has an overload of its
own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_align_jax._core import checks
from torch_bridge import _plan, dlpack
from torch_bridge._direct import call as direct_call
from torch_bridge._direct import fast_path, store
from torch_bridge._dlpack_path import run as dlpack_call
from torch_bridge._specs import AlignSpec, BatchedSpec, SglangSpec, Spec

_NAMESPACE = "moe_align_jax"
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")  # kept: the operators live as long
_COMPLIANT = (torch.Tag.pt2_compliant_tag,)
_UNSAFE = tuple(t for t in (getattr(torch.Tag, "cudagraph_unsafe", None),) if t is not None)

# Trailing defaults cost no time: the dispatcher gives a Python body only the arguments that differ from them.
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


def check_data(
    function: str,
    spec: Spec,
    operands: dict[str, torch.Tensor],
    out: Sequence[torch.Tensor] | None = None,
) -> None:
    """The checks that need tensors with data; they come before a call writes anything.

    Raises:
        TypeError: a tensor has no data, or is not dense.
        ValueError: the padded length exceeds int32, or a tensor of `out` overlaps another one.
    """
    for name, tensor in operands.items():
        dlpack.check_tensor(function, name, tensor)
    spec.check_capacity(function, next(iter(operands)))
    if out is not None:
        check_no_overlap(function, out, operands)


def run(
    spec: Spec,
    operands: dict[str, torch.Tensor],
    max_valid_pairs: int | None = None,
    out: Sequence[torch.Tensor] | None = None,
    path: str = "auto",
    function: str | None = None,
    key: fast_path.Key | None = None,
    larger: direct_call.Buffers | None = None,
) -> Sequence[torch.Tensor]:
    """Decides a call and does it. Its tensors have passed `check_data`.

    Args:
        spec: what is asked.
        operands: its tensors by name.
        max_valid_pairs: num_valid_pairs as an int.
        out: tensors of `spec.outputs` to write; None for new ones.
        path: as for `moe_align_block_size`. With "auto", a program that cannot be had costs one warning, and
            the call takes DLPack.
        function: the name that errors begin with; None for that of the spec.
        key: how the fast path knows the call; None for that of the spec.
        larger: buffers around `out`, which a launch may fill as well. What is returned says whether it did.

    Returns:
        The int32 tensors of `spec.outputs`, in order; those of `larger`, or `out`, where they were written.
    """
    function = function or spec.name
    options = {"key": key, "out": out, "has_limit": max_valid_pairs is not None}
    decided = _plan.resolve(function, spec, operands, path=path, **options)
    if decided.plan.path == "direct" and decided.problem and decided.plan.implementation != "none":
        try:
            return direct_call.first_launch(
                store.here, decided, operands, max_valid_pairs, out, larger
            )
        except store.Unavailable as reason:
            if path == "direct":
                raise NotImplementedError(_plan.direct_refused(function, str(reason))) from None
            store.here.warn_once(str(reason))
        decided = _plan.resolve(function, spec, operands, path="dlpack", **options)
    return dlpack_call.run_in_jax(decided, operands, max_valid_pairs, out)


def run_op(
    path: str,
    spec: Spec,
    operands: dict[str, torch.Tensor],
    max_valid_pairs: int | None = None,
    out: Sequence[torch.Tensor] | None = None,
) -> Sequence[torch.Tensor]:
    """`run` for the body of an operator, which anybody may call: with `check_data`."""
    check_data(spec.name, spec, operands, out)
    return run(spec, operands, max_valid_pairs, out, path)


def align_operands(
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_valid_pairs: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """The tensors that are given, by name."""
    named = {"topk_ids": topk_ids, "expert_map": expert_map, "num_valid_pairs": num_valid_pairs}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _block_align(topk_ids, num_experts, block_size):
    key = (num_experts, block_size, False, False, None, 0)
    last = fast_path.recent.get(key)
    if last is not None and last.matches(topk_ids):
        results = last.run(topk_ids)
    else:
        results = fast_path.find(key, topk_ids)
    if results is not None:
        return results
    return _block_align_cold("auto", topk_ids, num_experts, block_size)


def _block_align_cold(path, topk_ids, num_experts, block_size):
    """The plain operator, where the fast path does not know the call."""
    spec = AlignSpec(topk_ids.numel(), num_experts, block_size)
    return tuple(run_op(path, spec, {"topk_ids": topk_ids}))


def _block_align_dlpack(topk_ids, num_experts, block_size):
    return _block_align_cold("dlpack", topk_ids, num_experts, block_size)


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
        form = fast_path.align_form(with_counts, with_inverse, with_scatter_idx)
        key = (num_experts, block_size, pad_sorted_ids, ignore_invalid_experts, None, form)
        results = fast_path.attempt(key, topk_ids, expert_map, num_valid_pairs)
        if results is not None:
            return list(results)
    spec = AlignSpec(
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
    return list(run_op(path, spec, operands, max_valid_pairs))


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
    spec = AlignSpec(
        topk_ids.numel(), num_experts, block_size, ignore_invalid_experts, pad_sorted_ids
    )
    operands = align_operands(topk_ids, expert_map, num_valid_pairs)
    out = (sorted_token_ids, expert_ids, num_tokens_post_pad)
    run_op(path, spec, operands, max_valid_pairs, out)


def _sglang_block_align(
    path, topk_ids, num_experts, block_size, ignore_invalid_expert, with_inactive_blocks
):
    if path == "auto":
        form = fast_path.sglang_form(with_inactive_blocks)
        key = (num_experts, block_size, False, ignore_invalid_expert, None, form)
        results = fast_path.attempt(key, topk_ids)
        if results is not None:
            return results
    spec = SglangSpec(
        topk_ids.numel(), num_experts, block_size, ignore_invalid_expert, with_inactive_blocks
    )
    return tuple(run_op(path, spec, {"topk_ids": topk_ids}))


def _batched_block_align(path, expert_num_tokens, max_tokens_per_batch, block_size):
    spec = BatchedSpec(expert_num_tokens.shape[0], max_tokens_per_batch, block_size)
    return tuple(run_op(path, spec, {"expert_num_tokens": expert_num_tokens}))


# -- fakes ---------------------------------------------------------------------------------------


def _fake_results(spec: Spec, like: torch.Tensor) -> list[torch.Tensor]:
    """Results of the right shapes, on the device of `like`."""
    return [like.new_empty(shape, dtype=torch.int32) for shape in spec.outputs.values()]


def _block_align_fake(topk_ids, num_experts, block_size):
    spec = AlignSpec(topk_ids.numel(), num_experts, block_size)
    return tuple(_fake_results(spec, topk_ids))


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
    spec = AlignSpec(topk_ids.numel(), num_experts, block_size, *options, **named)
    return _fake_results(spec, topk_ids)


def _block_align_out_fake(*arguments, **named):
    del arguments, named


def _sglang_block_align_fake(topk_ids, *options):
    return tuple(_fake_results(SglangSpec(topk_ids.numel(), *options), topk_ids))


def _batched_block_align_fake(expert_num_tokens, max_tokens_per_batch, block_size):
    spec = BatchedSpec(expert_num_tokens.shape[0], max_tokens_per_batch, block_size)
    return tuple(_fake_results(spec, expert_num_tokens))


def on_path(body: Callable[..., Any], path: str) -> Callable[..., Any]:
    """The body of an operator with its first argument, the path. (Torch takes functions, no partials.)"""
    return lambda *arguments, **named: body(path, *arguments, **named)


def both(body: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A body for an operator and one for its twin."""
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
    """The name of an operator's twin, which goes through jax."""
    name, dot, overload = base.partition(".")
    return f"{name}_dlpack{dot}{overload}"


def returns_nothing(*arguments: Any) -> None:
    """The fake of an operator that writes its results in place."""
    del arguments


def _one_by_one(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Its rule for torch.func.vmap: a call for each element of the batch.

    Torch has such a rule of its own, but not for lists of tensors, and with a warning.
    """

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        def call(index: int) -> list[torch.Tensor]:
            found = operator(
                *(_element(*pair, index) for pair in zip(arguments, in_dims, strict=True))
            )
            return [found] if isinstance(found, torch.Tensor) else list(found)

        # Of no elements the shapes are those of a call with zeros.
        found = [call(i) for i in range(max(1, info.batch_size))]
        stacked = [torch.stack(parts)[: info.batch_size] for parts in zip(*found, strict=True)]
        returns = operator._schema.returns
        if len(returns) > 1:
            return tuple(stacked), (0,) * len(stacked)
        if isinstance(returns[0].type, torch.TensorType):
            return stacked[0], 0
        return stacked, [0] * len(stacked)

    return rule


def _no_batch(base: str) -> Callable[..., Any]:
    """The rule of an operator that writes tensors in place: torch's own refusal names the operator alone."""
    function = base.removesuffix("_into").removesuffix("_out")

    def rule(*_: Any, **__: Any) -> None:
        what, remedy = "a batch of torch.func.vmap", "Leave out= out there, or call it in a loop."
        checks.fail(function, "what it writes", "be one tensor", what, remedy, NotImplementedError)

    return rule


def _element(argument: Any, dim: Any, index: int) -> Any:
    """Element `index` of an argument, or of each of a list, along its dimension of the batch."""
    if isinstance(argument, (list, tuple)):
        dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(argument)
        return [_element(each, at, index) for each, at in zip(argument, dims, strict=True)]
    if dim is None or not isinstance(argument, torch.Tensor):
        return argument
    if not argument.shape[dim]:
        return argument.new_zeros([*argument.shape[:dim], *argument.shape[dim + 1 :]])
    return argument.select(dim, index)


def register(
    base: str,
    schema: str,
    bodies: tuple[Callable[..., Any], Callable[..., Any]],
    fake: Callable[..., Any] = returns_nothing,
) -> None:
    """Defines the operator `base` and its twin.

    Args:
        base: the operator's name, with `.overload` if it has one.
        schema: arguments and results, as torch writes them.
        bodies: what runs on real tensors: the operator's and its twin's.
        fake: what runs on tensors without data.
    """
    names, tags = (base, dlpack_name(base)), (_COMPLIANT, _COMPLIANT + _UNSAFE)
    for name, body, tag in zip(names, bodies, tags, strict=True):
        _library.define(name + schema, tags=tag)
        for key in ("CPU", "CUDA"):
            _library.impl(name, body, key)
        # Without this the dispatcher copies a lazily negated tensor before the body sees it, and the plan
        # would not say so.
        _library.impl(name, torch.library.fallthrough_kernel, "Negative")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_library)
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.moe_align_jax, packet), overload or "default")
        _OPERATORS[name] = operator
        rule = _no_batch(base) if schema.endswith("-> ()") else _one_by_one(operator)
        torch.library.register_vmap(f"{_NAMESPACE}::{name}", rule, lib=_library)


for _base, (_bodies, _fake) in _BODIES.items():
    register(_base, _SCHEMAS[_base], _bodies, _fake)


def name_for(base: str, device: torch.device, path: str = "auto") -> str:
    """The operator for this device: direct where a launch is possible, else DLPack's."""
    if path != "dlpack" and store.launches_on(device.type, device.index):
        return base
    return dlpack_name(base)


def chosen(base: str, device: torch.device, path: str = "auto") -> Callable[..., Any]:
    """The operator that `name_for` names."""
    return _OPERATORS[name_for(base, device, path)]


# -- calls ----------------------------------------------------------------------------------------


def launches_at_once(operands: dict[str, torch.Tensor], out: Sequence[torch.Tensor] = ()) -> bool:
    """Whether a call may go past torch's dispatcher, which takes some host time: plain tensors on a GPU that
    can launch directly, and nothing that records or transforms operators."""
    if not fast_path.open_to_all():
        return False
    for tensor in (*operands.values(), *out):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return False
    return store.here.machine.launches_on(tensor.device)


def aligned(
    spec: AlignSpec,
    operands: dict[str, torch.Tensor],
    limit: int | None,
    path: str,
    key: fast_path.Key | None = None,
) -> Sequence[torch.Tensor]:
    """The results of a call that `check` has passed: at once, or by the torch operator.

    Args:
        spec, operands, limit: from `check`.
        path: as for `moe_align_block_size`.
        key: how the fast path knows the call; None for that of the spec.
    """
    if launches_at_once(operands):
        return run(spec, operands, limit, path=path, key=key)
    device = operands["topk_ids"].device
    if path == "direct" and not store.launches_on(device.type, device.index):
        reason = store.unavailable(device) or "it cannot"
        raise NotImplementedError(_plan.direct_refused(spec.name, reason))
    wanted = (spec.with_counts, spec.with_inverse, spec.with_scatter_idx)
    sizes = (operands["topk_ids"], spec.num_experts, spec.block_size)
    options = (*op_options(spec, operands, limit), *wanted)
    if all(option is None or option is False for option in options):
        return chosen("block_align", device, path)(*sizes)
    return chosen("block_align.options", device, path)(*sizes, *options)


def op_options(
    spec: AlignSpec, operands: dict[str, torch.Tensor], limit: int | None
) -> tuple[Any, ...]:
    """The options that the alignment's operators share, in their order."""
    return (
        operands.get("expert_map"),
        operands.get("num_valid_pairs"),
        limit,
        spec.ignore_invalid_experts,
        spec.pad_sorted_ids,
    )


# -- out= ----------------------------------------------------------------------------------------


def check_no_overlap(
    function: str, out: Sequence[torch.Tensor], operands: dict[str, torch.Tensor]
) -> None:
    """Raises ValueError where a tensor of `out` shares a byte with another of them or with an input."""
    for i, target in enumerate(out):
        others = [(f"out[{j}]", x) for j, x in enumerate(out) if j < i] + list(operands.items())
        for name, other in others:
            if overlaps(target, other):
                raise ValueError(
                    checks.message(
                        function,
                        f"out[{i}]",
                        f"not overlap {name}",
                        "tensors that share memory",
                        "Pass tensors of their own memory, for example from torch.empty.",
                    )
                )


def overlaps(target: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether `target`, which is contiguous, shares a byte with `other`, which may have any strides."""
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
