"""vLLM's two other aligned ops on our alignment: for DeepEP's received tokens, and for LoRA adapters.

Public as names of `torch_bridge.vllm`. On a GPU each is a launch of kernels of its own (`_vllm_launch.py`).
Elsewhere, and for what those kernels do not take, it is torch's own elementwise operations around
`ops_moe_align_block_size`, which run wherever that op runs, and can be captured where it can.
"""

from collections.abc import Mapping, Sequence

import torch

from moe_align_jax._core import checks
from torch_bridge import _checks, _ops, _vllm_launch, dlpack
from torch_bridge._direct import inplace, store
from torch_bridge._specs import AlignSpec
from torch_bridge._vllm_ops import ops_moe_align_block_size

_REMEDY = "See torch_bridge.vllm for what each tensor holds."
_SCHEMAS = {
    "globalize_align_into": (
        "(Tensor(a!) topk_idx, Tensor psum, int first, int everyone, int experts, int block_size, "
        "Tensor(b!) sorted_ids, Tensor(c!) expert_ids, Tensor(d!) num_tokens_post_pad, "
        "Tensor(e!)? scatter_idx) -> ()"
    ),
    "lora_align_into": (
        "(Tensor topk_ids, Tensor token_lora_mapping, Tensor adapter_enabled, Tensor lora_ids, "
        "Tensor? expert_map, int experts, int block_size, int adapters, SymInt capacity, "
        "SymInt blocks, Tensor(a!) sorted_token_ids, Tensor(b!) experts_ids, "
        "Tensor(c!) num_tokens_post_pad) -> ()"
    ),
}


def fused_globalize_align_block_size(
    topk_idx: torch.Tensor,
    psum: torch.Tensor,
    rank_expert_offset: int,
    global_num_experts: int,
    local_num_experts: int,
    block_size: int,
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    scatter_idx: torch.Tensor | None = None,
) -> None:
    """vLLM's op `fused_globalize_align_block_size`: aligns what DeepEP received, and makes its ids global.

    A pair counts if its token is one of the first `psum[-1]`, its id is in [0, local_num_experts), and that
    expert's global id is below global_num_experts.

    Args:
        topk_idx: `[num_tokens, topk]` int64, local expert ids. Written in place: the global id,
            `id + rank_expert_offset`, of each pair that counts, -1 elsewhere.
        psum: `[ranks]` integers: tokens received up to each rank; the last one counts all of them.
        rank_expert_offset: global id of this rank's first expert, >= 0.
        global_num_experts, local_num_experts: of all ranks, and of this one.
        block_size: rows per GEMM block.
        sorted_ids, expert_ids, num_tokens_post_pad, scatter_idx: as for `ops_moe_align_block_size`, of local
            experts.

    The buffers are as those of `ops_moe_align_block_size`. Nothing is written when an error is raised.

    Returns:
        None.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a size, shape, device or layout does not fit, or tensors share memory.
        NotImplementedError, RuntimeError: as `torch_bridge.moe_align_block_size`.

    Example:
        >>> idx, received = torch.tensor([[1, 0], [-1, 1], [0, 1]]), torch.tensor([1, 2], dtype=torch.int32)
        >>> rows, blocks, count = (torch.empty(n, dtype=torch.int32) for n in (8, 4, 1))
        >>> fused_globalize_align_block_size(idx, received, 4, 8, 2, 2, rows, blocks, count)
        >>> idx.tolist(), rows.tolist(), blocks.tolist(), count.tolist()
        ([[5, 4], [-1, 5], [-1, -1]], [1, 6, 0, 3, 6, 6, 6, 6], [0, 1, -1, -1], [4])

    Source: vllm 0.33 `_custom_ops.py` and its op's schema (Apache-2.0), signature and contract; no code
    taken.
    """
    function = "fused_globalize_align_block_size"
    key = (function, rank_expert_offset, global_num_experts, local_num_experts, block_size)
    buffers = (sorted_ids, expert_ids, num_tokens_post_pad, scatter_idx)
    if _vllm_launch.calls.repeat(key, (topk_idx, psum, *buffers)):
        return
    remedy = "Pass the expert ids that DeepEP received."
    ids = _checks.check_integer_tensor(function, "topk_idx", topk_idx, remedy)
    if ids.dtype != torch.int64:
        checks.refuse(TypeError, function, "topk_idx", "be int64", ids, _REMEDY)
    if ids.dim() != 2 or ids.shape[1] < 1:
        checks.refuse(
            ValueError, function, "topk_idx", "have shape [num_tokens, topk]", ids, _REMEDY
        )
    if any(size > 1 and step == 0 for size, step in zip(ids.shape, ids.stride(), strict=True)):
        checks.refuse(
            ValueError, function, "topk_idx", "hold each id in memory of its own", ids, _REMEDY
        )
    remedy = "Pass the tokens received up to each rank."
    received = _checks.check_integer_tensor(function, "psum", psum, remedy, ids.device)
    if received.dim() != 1 or received.shape[0] < 1:
        checks.refuse(ValueError, function, "psum", "have shape [ranks]", received, _REMEDY)
    remedy = "Pass the sizes of the expert-parallel group."
    first = checks.check_int(function, "rank_expert_offset", rank_expert_offset, 0, remedy)
    everyone = checks.check_positive_int(function, "global_num_experts", global_num_experts, remedy)
    experts = checks.check_positive_int(function, "local_num_experts", local_num_experts, remedy)
    rows = checks.check_block_size(function, block_size)
    spec = AlignSpec(ids.numel(), experts, rows, with_scatter_idx=scatter_idx is not None)
    buffers = [sorted_ids, expert_ids, num_tokens_post_pad]
    names = ["sorted_ids", "expert_ids", "num_tokens_post_pad"]
    if scatter_idx is not None:
        buffers, names = [*buffers, scatter_idx], [*names, "scatter_idx"]
    written = dict(zip(names, buffers, strict=True))
    least = inplace.least_sizes(spec)
    _check_buffers(function, written, ids.device, [least[name] for name in spec.outputs])
    _check_data(function, {**written, "topk_idx": ids}, {"psum": received})
    sizes = (first, everyone, experts, rows)
    if _ops.launches_at_once({"topk_idx": ids, "psum": received}, buffers):
        _globalize("auto", ids, received, *sizes, *buffers, key=key)
    elif store.launches_on(ids.device.type, ids.device.index):
        three = (sorted_ids, expert_ids, num_tokens_post_pad)
        op = _ops.chosen("globalize_align_into", ids.device)
        op(ids, received, *sizes, *three, scatter_idx)
    else:
        _globalize("dlpack", ids, received, *sizes, *buffers)


def _globalize(path, ids, psum, first, everyone, experts, block_size, *buffers, key=None) -> None:
    """Does a call of `fused_globalize_align_block_size` that its checks have passed."""
    names = ("sorted_ids", "expert_ids", "num_tokens_post_pad", "scatter_idx")
    given = {k: x for k, x in zip(names, buffers, strict=False) if x is not None}
    if path == "auto" and _vllm_launch.globalize(
        "fused_globalize_align_block_size",
        ids,
        psum,
        given,
        first=first,
        everyone=everyone,
        experts=experts,
        block_size=block_size,
        key=key,
    ):
        return
    token = torch.arange(ids.shape[0], device=ids.device)[:, None]
    counts = token < psum[-1].to(torch.int64)
    counts = counts & (ids >= 0) & (ids < min(experts, everyone - first))
    local = torch.where(counts, ids, -1).to(torch.int32)
    three = (given["sorted_ids"], given["expert_ids"], given["num_tokens_post_pad"])
    ops_moe_align_block_size(local, experts, block_size, *three, None, given.get("scatter_idx"))
    ids.copy_(torch.where(counts, ids + first, -1))


def moe_lora_align_block_size(
    topk_ids: torch.Tensor,
    token_lora_mapping: torch.Tensor,
    num_experts: int,
    block_size: int,
    max_loras: int,
    max_num_tokens_padded: int,
    max_num_m_blocks: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    adapter_enabled: torch.Tensor,
    lora_ids: torch.Tensor,
    expert_map: torch.Tensor | None = None,
) -> None:
    """vLLM's op `moe_lora_align_block_size`: an alignment of its own for the tokens of each LoRA adapter.

    Row l of each buffer gets the alignment of the tokens that adapter l serves, if `lora_ids` names it and
    it is enabled; the other rows are left as they are.

    Args:
        topk_ids: `[num_tokens, topk]` any integer dtype.
        token_lora_mapping: `[num_tokens]` integers: each token's adapter, -1 for none.
        num_experts: number of global experts.
        block_size: rows per GEMM block.
        max_loras: L, adapters.
        max_num_tokens_padded: P, at least `max_num_tokens_padded(num_tokens * topk, ...)`.
        max_num_m_blocks: B, at least P // block_size.
        sorted_token_ids: L * P elements, of any shape: indices of pairs, num_tokens * topk past the result.
        experts_ids: L * B elements: -1 past the last used block.
        num_tokens_post_pad: L elements.
        adapter_enabled: `[L]` or longer, integers or bool: whether an adapter is (not 0).
        lora_ids: one dimension, integers: the adapters in use; numbers outside [0, L) name none.
        expert_map: `[num_experts]`: as for `ops_moe_align_block_size`.

    The buffers are as those of `ops_moe_align_block_size`. Nothing is written when an error is raised.

    Returns:
        None.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as `fused_globalize_align_block_size`.

    Example:
        >>> ids, mapping = torch.tensor([[1], [0], [1]], dtype=torch.int32), torch.tensor([1, 0, 1])
        >>> rows, blocks, count = (torch.zeros(2, n, dtype=torch.int32) for n in (5, 3, 1))
        >>> enabled, in_use = torch.tensor([0, 1, 0]), torch.tensor([-1, 0, 1])
        >>> moe_lora_align_block_size(ids, mapping, 2, 2, 2, 5, 3, rows, blocks, count, enabled, in_use)
        >>> rows.tolist(), blocks.tolist(), count.flatten().tolist()
        ([[0, 0, 0, 0, 0], [0, 2, 3, 3, 3]], [[0, 0, 0], [1, -1, -1]], [0, 2])

    Source: as `fused_globalize_align_block_size`.
    """
    function = "moe_lora_align_block_size"
    sizes = (num_experts, block_size, max_loras, max_num_tokens_padded, max_num_m_blocks)
    key = (function, *sizes)
    given = (topk_ids, token_lora_mapping, adapter_enabled, lora_ids, expert_map)
    buffers = (sorted_token_ids, experts_ids, num_tokens_post_pad)
    if _vllm_launch.calls.repeat(key, (*given, *buffers)):
        return
    spec, operands, _ = _checks.check_alignment(
        function, topk_ids, num_experts, block_size, None, expert_map, False, False, None
    )
    device = topk_ids.device
    if topk_ids.dim() != 2 or topk_ids.shape[1] < 1:
        checks.refuse(
            ValueError, function, "topk_ids", "have shape [num_tokens, topk]", topk_ids, _REMEDY
        )
    remedy = "Pass the sizes of the buffers."
    loras = checks.check_positive_int(function, "max_loras", max_loras, remedy)
    least = inplace.least_sizes(spec)
    sizes = [
        checks.check_int(
            function,
            "max_num_tokens_padded",
            max_num_tokens_padded,
            least["sorted_token_ids"],
            remedy,
        ),
        checks.check_int(
            function, "max_num_m_blocks", max_num_m_blocks, least["expert_ids"], remedy
        ),
        1,
    ]
    written = {
        "sorted_token_ids": sorted_token_ids,
        "experts_ids": experts_ids,
        "num_tokens_post_pad": num_tokens_post_pad,
    }
    exact = [loras * size for size in sizes]
    _check_buffers(function, written, device, exact, at_least=False)
    mapping = _integers(function, "token_lora_mapping", token_lora_mapping, device)
    if mapping.shape[0] != topk_ids.shape[0]:
        checks.refuse(
            ValueError,
            function,
            "token_lora_mapping",
            f"have shape [{topk_ids.shape[0]}]",
            mapping,
            _REMEDY,
        )
    enabled = _integers(function, "adapter_enabled", adapter_enabled, device)
    if enabled.shape[0] < loras:
        checks.refuse(
            ValueError,
            function,
            "adapter_enabled",
            f"have at least {loras} elements",
            enabled,
            _REMEDY,
        )
    in_use = _integers(function, "lora_ids", lora_ids, device)
    given = {"token_lora_mapping": mapping, "adapter_enabled": enabled, "lora_ids": in_use}
    _check_data(function, written, {**operands, **given})

    three = (mapping, enabled, in_use)
    local = operands.get("expert_map")
    numbers = (spec.num_experts, spec.block_size, loras, *sizes[:2])
    if _ops.launches_at_once({**operands, **given}, tuple(written.values())):
        _align_adapters("auto", topk_ids, *three, local, *numbers, *written.values(), key=key)
    elif store.launches_on(device.type, device.index):
        op = _ops.chosen("lora_align_into", device)
        op(topk_ids, *three, local, *numbers, *written.values())
    else:
        _align_adapters("dlpack", topk_ids, *three, local, *numbers, *written.values())


def _align_adapters(
    path,
    ids,
    mapping,
    enabled,
    in_use,
    expert_map,
    experts,
    block_size,
    adapters,
    capacity,
    blocks,
    *buffers,
    key=None,
) -> None:
    """Does a call of `moe_lora_align_block_size` that its checks have passed."""
    if ids.dtype not in (torch.int32, torch.int64):
        ids, key = _narrowed(ids, experts), None
    if path == "auto":
        operands = {
            "topk_ids": ids,
            "token_lora_mapping": mapping,
            "adapter_enabled": enabled,
            "lora_ids": in_use,
            **({} if expert_map is None else {"expert_map": expert_map}),
        }
        names = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")
        if _vllm_launch.align_adapters(
            "moe_lora_align_block_size",
            operands,
            dict(zip(names, buffers, strict=True)),
            experts=experts,
            block_size=block_size,
            adapters=adapters,
            capacity=capacity,
            blocks=blocks,
            key=key,
        ):
            return
    mapping, enabled, in_use = (x.to(torch.int64) for x in (mapping, enabled, in_use))
    sizes = (capacity, blocks, 1)
    numbers = torch.arange(adapters, device=ids.device)
    active = (in_use[:, None] == numbers).any(dim=0) & (enabled[:adapters] != 0)
    aligned: list[list[torch.Tensor]] = [[], [], []]
    for adapter in range(adapters):
        mine = torch.where((mapping == adapter)[:, None], ids, -1)
        parts = [torch.empty(size, dtype=torch.int32, device=ids.device) for size in sizes]
        rows, named, count = parts
        ops_moe_align_block_size(mine, experts, block_size, rows, named, count, expert_map)
        for results, part in zip(aligned, parts, strict=True):
            results.append(part)
    for buffer, results, size in zip(buffers, aligned, sizes, strict=True):
        rows = buffer.view(adapters, size)
        rows.copy_(torch.where(active[:, None], torch.stack(results), rows))


def _narrowed(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """int64, of the dtypes of which torch has few operations; an id that is no expert may become another
    such one."""
    if ids.dtype == torch.uint64:
        ids = ids.view(torch.int64)
    elif ids.dtype == torch.uint32:
        ids = ids.view(torch.int32)
    return ids.to(torch.int64).clamp(-1, num_experts)


def _integers(
    function: str, argument: str, value: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """A vector of integers, bool among them, which become uint8."""
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        value = value.to(torch.uint8)
    value = _checks.check_integer_tensor(function, argument, value, _REMEDY, device)
    if value.dim() != 1:
        checks.refuse(ValueError, function, argument, "have one dimension", value, _REMEDY)
    return value


def _check_buffers(
    function: str,
    buffers: Mapping[str, torch.Tensor],
    device: torch.device,
    sizes: Sequence[int],
    at_least: bool = True,
) -> None:
    """Raises unless each is a contiguous int32 tensor of so many elements; with at_least, the first two may
    be longer."""
    for position, (name, buffer) in enumerate(buffers.items()):
        inplace.check_buffer(function, name, buffer, device)
        longer = at_least and position < 2
        size = sizes[position]
        if not _checks.sizes_are_known() or buffer.numel() == size:
            continue
        if not longer or buffer.numel() < size:
            rule = f"have {'at least ' if longer else ''}{size} elements"
            checks.refuse(ValueError, function, name, rule, buffer, _REMEDY)


def _check_data(
    function: str, written: Mapping[str, torch.Tensor], read: Mapping[str, torch.Tensor]
) -> None:
    """The checks that need data."""
    if not _checks.sizes_are_known() or any(map(dlpack.is_fake, written.values())):
        return
    for name, tensor in {**written, **read}.items():
        dlpack.check_tensor(function, name, tensor)
    inplace.check_plain(function, written)
    inplace.check_no_overlap(function, written, read)


# -- operators -----------------------------------------------------------------------------------


for _base, _body in (
    ("globalize_align_into", _globalize),
    ("lora_align_into", _align_adapters),
):
    _ops.register(_base, _SCHEMAS[_base], _ops.both(_body))
