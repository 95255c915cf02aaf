"""What one forward pass leaves behind, for the recorder of `torch_bridge.sglang.recorder`.

Every gatherer writes into buffers that live as long as it does and never moves: a hook that a CUDA graph
captured counts on every replay. Nothing here waits for the device.

L layers, Ep physical experts, e of them on this rank, K ids per token.
"""

import logging
from typing import Any, NamedTuple

import torch

from moe_align_jax._core import checks
from torch_bridge import _checks

logger = logging.getLogger("torch_bridge.sglang")


class Sizes(NamedTuple):
    """Static facts of a recorder: L, Ep, El, ranks, this rank, and the device of the buffers."""

    layers: int
    physical: int
    logical: int
    ranks: int
    rank: int
    device: torch.device

    @property
    def local(self) -> int:
        return self.physical // self.ranks


def scatter_slots(ids: torch.Tensor, size: int) -> torch.Tensor:
    """int64 columns in a row of `size + 2`: id i at i + 1, anything out of range in the first or last."""
    return ids.to(torch.int64).clamp(-1, size).add_(1)


def _counts(function: str, argument: str, value: Any, size: int, device: torch.device) -> Any:
    """`[size]` integers on the buffers' device; another length would be broadcast, or fail in torch."""
    remedy = "One count per expert."
    value = _checks.check_integer_tensor(function, argument, value, remedy, device)
    if value.shape != (size,):
        rule, got = f"have shape [{size}]", checks.describe(value)
        raise ValueError(checks.message(function, argument, rule, got, remedy))
    return value


class Gatherer:
    """A gatherer of one pass. Its hooks do nothing unless it needs them."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes

    def resized(self, sizes: Sizes) -> "Gatherer":
        """One like it for another number of slots, with buffers of its own."""
        return type(self)(sizes)

    def start(self, forward_batch: Any) -> None:
        """Forgets the last pass."""

    def finish(self) -> None:
        """Checks the pass, before it is recorded."""

    def on_select_experts(self, layer: int, topk_ids: torch.Tensor) -> None: ...

    def on_tokens_per_expert(self, layer: int, tokens_per_expert: torch.Tensor) -> None: ...

    def on_deepep_dispatch_normal(
        self,
        layer: int,
        local_physical_count_of_layer: list[int],
        num_tokens_per_rank: Any,
        num_tokens_per_rdma_rank: Any,
        num_tokens_per_expert: Any,
    ) -> None: ...

    def on_deepep_dispatch_low_latency(
        self, layer: int, local_physical_count_of_layer: torch.Tensor
    ) -> None: ...

    def count_buffer(self, layer: int) -> torch.Tensor | None:
        """`[Ep]` int32 that a fused kernel may add to; None where it would not be read."""
        return None

    def physical_count(self) -> torch.Tensor:
        """`[L, Ep]` int32 of this pass; valid until the next one starts."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """What else a detailed record keeps of this pass."""
        return {}


class SelectExperts(Gatherer):
    """This rank's tokens over all physical experts: a scatter-add, or counts that exist already."""

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        shape = (sizes.layers, sizes.physical + 2)
        self._data = torch.zeros(shape, dtype=torch.int32, device=sizes.device)
        self._one = torch.ones(1, dtype=torch.int32, device=sizes.device)

    def start(self, forward_batch: Any) -> None:
        self._data.zero_()

    def on_select_experts(self, layer: int, topk_ids: torch.Tensor) -> None:
        function, remedy = "on_select_experts", "Pass the physical expert ids."
        _checks.check_integer_tensor(function, "topk_ids", topk_ids, remedy, self.sizes.device)
        slots = scatter_slots(topk_ids.reshape(-1), self.sizes.physical)
        self._data[layer].scatter_add_(0, slots, self._one.expand(slots.numel()))

    def on_tokens_per_expert(self, layer: int, tokens_per_expert: torch.Tensor) -> None:
        name, size = "tokens_per_expert", self.sizes.physical
        function, device = "on_tokens_per_expert", self.sizes.device
        self._data[layer, 1:-1] += _counts(function, name, tokens_per_expert, size, device)

    def count_buffer(self, layer: int) -> torch.Tensor:
        return self._data[layer, 1:-1]

    def physical_count(self) -> torch.Tensor:
        return self._data[:, 1:-1]


class LowLatency(Gatherer):
    """All ranks' tokens on this rank's experts; two micro-batches of a layer are summed."""

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        self._data = torch.zeros(
            (sizes.layers, sizes.physical), dtype=torch.int32, device=sizes.device
        )
        first = sizes.rank * sizes.local
        self._mine = self._data[:, first : first + sizes.local]

    def start(self, forward_batch: Any) -> None:
        self._data.zero_()

    def on_deepep_dispatch_low_latency(
        self, layer: int, local_physical_count_of_layer: torch.Tensor
    ) -> None:
        name, function = "local_physical_count_of_layer", "on_deepep_dispatch_low_latency"
        size, device = self.sizes.local, self.sizes.device
        self._mine[layer] += _counts(function, name, local_physical_count_of_layer, size, device)

    def physical_count(self) -> torch.Tensor:
        return self._data


class DispatchLists(Gatherer):
    """The counts that a normal dispatch reports on the host: aligned, so only approximate."""

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        self._of_layer: dict[int, list[int]] = {}

    def start(self, forward_batch: Any) -> None:
        self._of_layer = {}

    def on_deepep_dispatch_normal(
        self,
        layer: int,
        local_physical_count_of_layer: list[int],
        num_tokens_per_rank: Any,
        num_tokens_per_rdma_rank: Any,
        num_tokens_per_expert: Any,
    ) -> None:
        function, name = "on_deepep_dispatch_normal", "local_physical_count_of_layer"
        remedy = "One per expert of this rank."
        try:
            counts = [checks.index(count) for count in local_physical_count_of_layer]
        except TypeError:
            got = checks.describe(local_physical_count_of_layer)
            raise TypeError(checks.message(function, name, "be ints", got, remedy)) from None
        if len(counts) != self.sizes.local:
            rule = f"have {self.sizes.local} counts"
            raise ValueError(checks.message(function, name, rule, len(counts), remedy))
        before = self._of_layer.get(layer, [0] * len(counts))
        self._of_layer[layer] = [a + b for a, b in zip(before, counts, strict=True)]

    def physical_count(self) -> torch.Tensor:
        out = torch.zeros((self.sizes.layers, self.sizes.physical), dtype=torch.int32)
        first = self.sizes.rank * self.sizes.local
        for layer, counts in self._of_layer.items():
            out[layer, first : first + self.sizes.local] = torch.tensor(counts, dtype=torch.int32)
        return out.to(self.sizes.device, non_blocking=True)


class Tokens(Gatherer):
    """The ids of every token, with what the engine says about the tokens.

    Several calls for one layer of a pass are micro-batches: their rows are written one after another. Where
    the next row goes is counted on the device, so that a CUDA graph's replays find their places too.
    """

    def __init__(self, sizes: Sizes, max_tokens: int, top_k: int):
        super().__init__(sizes)
        self._max_tokens = max_tokens
        # One additional row, for tokens that find no room in a replay.
        shape = (sizes.layers, max_tokens + 1, top_k)
        self._ids = torch.full(shape, -1, dtype=torch.int32, device=sizes.device)
        self._rows = torch.zeros(sizes.layers, dtype=torch.int64, device=sizes.device)
        self._order = torch.arange(max_tokens, device=sizes.device)
        self._metadata: dict[str, Any] = {}
        self._misc: list[dict[str, Any]] = []
        self._num_tokens: int | None = None
        self._calls: dict[int, list[int]] = {}

    def resized(self, sizes: Sizes) -> "Tokens":
        return Tokens(sizes, self._max_tokens, self._ids.shape[2])

    def start(self, forward_batch: Any) -> None:
        function = "with_forward_pass"
        self._ids.fill_(-1)
        self._rows.zero_()
        self._misc, self._metadata, self._calls, self._num_tokens = [], {}, {}, None
        if forward_batch is None:
            return
        tokens = forward_batch.input_ids.shape[0]
        if tokens > self._max_tokens:
            rule = f"have at most max_tokens = {self._max_tokens} input_ids"
            remedy = "Make the recorder with a larger max_tokens."
            raise ValueError(checks.message(function, "forward_batch", rule, tokens, remedy))
        lengths = forward_batch.extend_seq_lens_cpu
        self._metadata = {
            "input_ids": to_host(forward_batch.input_ids),
            "positions": to_host(forward_batch.positions),
            "extend_seq_lens": list(lengths) if isinstance(lengths, list) else to_host(lengths),
            "forward_mode": getattr(forward_batch.forward_mode, "value", None),
        }
        self._num_tokens = tokens

    def on_select_experts(self, layer: int, topk_ids: torch.Tensor) -> None:
        function, remedy = "on_select_experts", "Pass the physical expert ids."
        _checks.check_integer_tensor(function, "topk_ids", topk_ids, remedy, self.sizes.device)
        room, got = self._ids[layer], list(topk_ids.shape)
        before = self._calls.get(layer, [])
        tokens = topk_ids.shape[0] if topk_ids.dim() else 0
        full = sum(before) + tokens > self._max_tokens
        if topk_ids.dim() != 2 or full or topk_ids.shape[1] > room.shape[1]:
            rule = f"fit into {[self._max_tokens, room.shape[1]]}"
            got = f"{got} after {sum(before)} rows" if before else got
            remedy = "Make the recorder with larger max_tokens and top_k."
            raise ValueError(checks.message(function, "topk_ids", rule, got, remedy))
        if not capturing():  # a capture is not a pass: its rows are written when it is replayed
            self._calls[layer] = [*before, tokens]
        rows = (self._order[:tokens] + self._rows[layer]).clamp_(max=self._max_tokens)
        # 64-bit ids are saturated, so that they stay out of range.
        ids = topk_ids.to(torch.int64).clamp(-(2**31), 2**31 - 1).to(torch.int32)
        room[:, : topk_ids.shape[1]].index_copy_(0, rows, ids)
        self._rows[layer] += tokens

    def finish(self) -> None:
        for layer, calls in self._calls.items():
            if len(calls) > 1 and self._num_tokens is not None and sum(calls) > self._num_tokens:
                rule = f"have the {self._num_tokens} tokens of the pass in all, without padding"
                got = f"micro-batches of {' + '.join(map(str, calls))} rows in layer {layer}"
                remedy = (
                    "Which of their rows are padding is not known: pass the tokens' rows alone."
                )
                function = "on_select_experts"
                raise ValueError(checks.message(function, "topk_ids", rule, got, remedy))

    def on_deepep_dispatch_normal(
        self,
        layer: int,
        local_physical_count_of_layer: list[int],
        num_tokens_per_rank: Any,
        num_tokens_per_rdma_rank: Any,
        num_tokens_per_expert: Any,
    ) -> None:
        self._misc.append(
            {
                "layer_id": layer,
                "num_tokens_per_rank": to_host(num_tokens_per_rank),
                "num_tokens_per_rdma_rank": to_host(num_tokens_per_rdma_rank),
                "num_tokens_per_expert": to_host(num_tokens_per_expert),
            }
        )

    def _recorded(self) -> torch.Tensor:
        """The rows of the pass's tokens; what a batch was padded with lies behind them."""
        return self._ids[:, : self._max_tokens if self._num_tokens is None else self._num_tokens]

    def physical_count(self) -> torch.Tensor:
        layers, physical = self.sizes.layers, self.sizes.physical
        slots = scatter_slots(self._recorded().reshape(layers, -1), physical)
        out = torch.zeros((layers, physical + 2), dtype=torch.int32, device=self.sizes.device)
        out.scatter_add_(1, slots, out.new_ones(1, 1).expand(slots.shape))
        return out[:, 1:-1]

    def record(self) -> dict[str, Any]:
        return {
            **self._metadata,
            "topk_ids_of_layer": to_host(self._recorded()),
            "misc_objects": list(self._misc),
            # For `trim`, which reads them when the device was waited for.
            ROWS: (to_host(self._rows), self._max_tokens, self._num_tokens),
        }


ROWS = "rows"


def trim(record: dict[str, Any]) -> None:
    """Cuts the ids of a record to the rows that were written, where the engine named no tokens."""
    if ROWS not in record:
        return
    rows, most, tokens = record.pop(ROWS)
    written = int(rows.max()) if rows.numel() else 0
    if written > most:
        logger.warning(
            "per_token: pass %s had %d rows in a layer, more than max_tokens = %d; the last are lost",
            record["forward_pass_id"],
            written,
            most,
        )
    if tokens is None:
        record["topk_ids_of_layer"] = record["topk_ids_of_layer"][:, :written].clone()


def capturing() -> bool:
    """Whether a CUDA graph is captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def to_host(value: Any) -> Any:
    """A copy of a tensor on the CPU, on its way; it may be read after the device was waited for."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.clone() if value.device.type == "cpu" else value.to("cpu", non_blocking=True)


# -- choosing ---------------------------------------------------------------------------------------------


def sizes_of(function: str, metadata: Any, rank: Any) -> Sizes:
    """The static facts of a placement, checked."""
    maps = metadata.physical_to_logical_map
    if (
        not isinstance(maps, torch.Tensor)
        or maps.ndim != 2
        or maps.dtype not in _checks.INTEGER_DTYPES
    ):
        rule, got = "have physical_to_logical_map [L, Ep] of integers", checks.describe(maps)
        remedy = "Pass the placement in force."
        raise TypeError(checks.message(function, "expert_location_metadata", rule, got, remedy))
    logical, ranks = (
        checks.check_positive_int(function, name, getattr(metadata, name), "Of the placement.")
        for name in ("num_logical_experts", "ep_size")
    )
    try:
        rank = checks.index(rank)
    except TypeError:
        got, remedy = checks.describe(rank), "Of this process."
        raise TypeError(checks.message(function, "rank", "be an int", got, remedy)) from None
    layers, physical = maps.shape
    if physical % ranks or not 0 <= rank < ranks:
        rule = "be below ep_size, which divides the physical experts"
        got = f"{rank} of {ranks} for {physical} experts"
        raise ValueError(checks.message(function, "rank", rule, got, "Ranks hold equal shares."))
    return Sizes(layers, physical, logical, ranks, rank, maps.device)


def check_layer(function: str, layer: Any, num_layers: int | None = None) -> int:
    """An int, in [0, num_layers) where that is given."""
    remedy = "Layers count from 0, one for each row of physical_to_logical_map."
    try:
        number = checks.index(layer)
    except TypeError:
        got = checks.describe(layer)
        raise TypeError(checks.message(function, "layer_idx", "be an int", got, remedy)) from None
    if num_layers is not None and not 0 <= number < num_layers:
        rule = f"be in [0, {num_layers})"
        raise ValueError(checks.message(function, "layer_idx", rule, number, remedy))
    return number


def choose(function: str, mode: str, backend: str, deepep_mode: str) -> type[Gatherer]:
    """The gatherer that sees what this dispatch reports.

    Raises:
        NotImplementedError: none does.
    """
    if backend == "mori":
        return LowLatency
    if mode == "stat_approx":
        if backend == "none" or deepep_mode != "normal":
            rule = 'be "stat" unless DeepEP dispatches in mode "normal"'
            got = f"{mode!r} with {backend!r}, {deepep_mode!r}"
            remedy = "Only that dispatch reports aligned counts on the host."
            raise NotImplementedError(checks.message(function, "mode", rule, got, remedy))
        return DispatchLists
    if backend != "deepep" or deepep_mode == "normal":
        return SelectExperts
    if deepep_mode == "low_latency":
        return LowLatency
    rule, remedy = 'be "normal" or "low_latency"', "The hook that counts must be known beforehand."
    raise NotImplementedError(
        checks.message(function, "deepep_mode", rule, checks.shown(deepep_mode), remedy)
    )
