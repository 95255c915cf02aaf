"""The rows of the ring: their layout, and what the host makes of them. NumPy alone."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from moe_align_jax._core import checks

LoadMode = Literal["stat", "stat_approx", "per_pass", "per_token"]
MODES = get_args(LoadMode)
HEADER = 4  # words: 16 bytes, so that the counts behind it stay aligned


class Layout(NamedTuple):
    """What a row of the ring looks like. Static: part of the state's tree structure.

    Attributes:
        mode: of `init_expert_load`.
        num_layers: L.
        num_physical_experts: Ep.
        num_logical_experts: El.
        num_passes: B.
        width: counts (or ids) per layer in a row: Ep, e, or max_tokens * top_k.
        max_tokens: tokens per pass that a row has room for; 0 unless per token.
        top_k: ids per token; 0 unless per token.
        has_map: whether the row holds the map.
        local_experts: whether a shard counts its own experts only.
    """

    mode: str
    num_layers: int
    num_physical_experts: int
    num_logical_experts: int
    num_passes: int
    width: int
    max_tokens: int = 0
    top_k: int = 0
    has_map: bool = False
    local_experts: bool = False

    @property
    def row(self) -> int:
        """Words of a row."""
        maps = self.num_physical_experts if self.has_map else 0
        return HEADER + self.num_layers * (self.width + maps)


class LoadRecord(NamedTuple):
    """What the ring holds, oldest pass first: N <= B passes, summed over the shards.

    Attributes:
        forward_pass_id: `[N]` int64.
        physical_count: `[N, L, Ep]` int64, (token, k) pairs per physical expert.
        logical_count: `[N, L, El]` int64, the same by the map that was in force in each pass.
        physical_to_logical_map: `[N, L, Ep]` int32, that map; None where the state holds none.
        topk_ids: `[N, S, L, max_tokens, top_k]` int32, -1 where nothing was chosen; None unless
            per token.
        num_tokens: `[N, S]` int64, rows of `topk_ids` that a pass filled; None unless per token.
    """

    forward_pass_id: np.ndarray
    physical_count: np.ndarray
    logical_count: np.ndarray
    physical_to_logical_map: np.ndarray | None = None
    topk_ids: np.ndarray | None = None
    num_tokens: np.ndarray | None = None


def to_logical(
    physical_count: np.ndarray, physical_to_logical_map: np.ndarray, num_logical_experts: int
) -> np.ndarray:
    """`[N, L, Ep]` counts summed to `[N, L, El]` int64; map entries outside `[0, El)` are dropped.

    The map is `[N, L, Ep]`, or `[L, Ep]` for all passes.
    """
    passes, layers, width = physical_count.shape
    ids = np.broadcast_to(physical_to_logical_map, physical_count.shape)
    valid = (ids >= 0) & (ids < num_logical_experts)
    # A column more, for what is dropped.
    flat = (
        np.where(valid, ids, num_logical_experts).reshape(passes * layers, width).astype(np.int64)
    )
    flat += np.arange(passes * layers, dtype=np.int64)[:, None] * (num_logical_experts + 1)
    out = np.zeros(passes * layers * (num_logical_experts + 1), np.int64)
    np.add.at(out, flat.reshape(-1), physical_count.reshape(-1).astype(np.int64))
    return out.reshape(passes, layers, num_logical_experts + 1)[..., :num_logical_experts]


def count_ids(topk_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """`[N, L, num_experts]` int64 from ids `[N, S, L, tokens, top_k]`; ids out of range are dropped."""
    passes, shards, layers, tokens, top_k = topk_ids.shape
    ids = np.moveaxis(topk_ids, 2, 1).reshape(passes, layers, shards * tokens * top_k)
    return to_logical(np.ones_like(ids, dtype=np.int64), ids, num_experts)


def used_rows(headers: np.ndarray, control: np.ndarray) -> np.ndarray:
    """`[N]` the rows of the present epoch in order of time, from `[S, B, HEADER]` and `[S, 2]`.

    Raises:
        ValueError: the shards did not record the same passes.
    """
    used = headers[:, :, 1] == control[:, :1]
    if (used != used[0]).any() or (headers[:, used[0], 0] != headers[0, used[0], 0]).any():
        rule, got = "have recorded the same passes on every shard", "shards that differ"
        remedy = "Every shard must run the same recording calls."
        raise ValueError(checks.message("collect_expert_load", "load", rule, got, remedy))
    slots = np.flatnonzero(used[0])
    if slots.size:
        # Ids are modulo 2**31 or 2**32: order them by their distance from one of them, without its top bit.
        ids = headers[0, slots, 0]
        with np.errstate(over="ignore"):
            slots = slots[np.argsort((ids - ids[0]) << 1, kind="stable")]
    return slots


def physical_counts(
    body: np.ndarray, layout: Layout, numbers: Sequence[int] | None = None
) -> np.ndarray:
    """`[N, L, Ep]` int64, summed over the shards, from counts (or ids) `[N, S, L, width]`.

    `numbers`: which shards these are; None for all.
    """
    if layout.mode == "per_token":
        ids = body.reshape(*body.shape[:3], layout.max_tokens, layout.top_k)
        return count_ids(ids, layout.num_physical_experts)
    if layout.local_experts:
        sizes = (len(body), layout.num_layers, layout.num_physical_experts)
        every = np.zeros((*sizes[:2], sizes[2] // layout.width, layout.width), np.int64)
        every[:, :, slice(None) if numbers is None else numbers] = np.moveaxis(body, 1, 2)
        return every.reshape(sizes)
    return body.sum(axis=1, dtype=np.int64)


def read_rows(
    ring: np.ndarray, control: np.ndarray, layout: Layout, numbers: Sequence[int] | None = None
) -> LoadRecord:
    """The rows of the present epoch in order of time, from `[S * (B + 1), row]` and `[S, 2]`.

    `numbers`: which shards these are; None for all.

    Raises:
        ValueError: the shards did not record the same passes.
    """
    shards, sizes = control.shape[0], (layout.num_layers, layout.num_physical_experts)
    rows = ring.reshape(shards, layout.num_passes + 1, layout.row)[:, : layout.num_passes]
    slots = used_rows(rows[:, :, :HEADER], control)
    rows = np.moveaxis(rows[:, slots], 0, 1)  # [N, S, row]
    count = len(slots)
    body = rows[:, :, HEADER : HEADER + layout.num_layers * layout.width]
    body = body.reshape(count, shards, layout.num_layers, layout.width)
    physical = physical_counts(body, layout, numbers)
    maps = None
    if layout.has_map:
        maps = rows[:, 0, HEADER + layout.num_layers * layout.width :].reshape(count, *sizes)
    topk_ids = num_tokens = None
    if layout.mode == "per_token":
        topk_ids = body.reshape(*body.shape[:3], layout.max_tokens, layout.top_k)
        num_tokens = rows[:, :, 2].astype(np.int64)
    logical = physical if maps is None else to_logical(physical, maps, layout.num_logical_experts)
    ids = rows[:, 0, 0].astype(np.int64) & 0xFFFFFFFF
    return LoadRecord(ids, physical, logical, maps, topk_ids, num_tokens)
