"""What one forward pass leaves behind, for the recorder of `torch_bridge.sglang_recorder`.

Every gatherer writes into buffers that live as long as it does and never moves: a hook that a CUDA graph
captured counts on every replay. Nothing here waits for the device.

L layers, Ep physical experts, e of them on this rank, K ids per token.
"""

from typing import Any, NamedTuple

import torch

from moe_align_jax import _checks


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


class Gatherer:
    """A gatherer of one pass. Its hooks do nothing unless it needs them."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes

    def start(self, forward_batch: Any) -> None:
        """Forgets the last pass."""

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
        slots = scatter_slots(topk_ids.reshape(-1), self.sizes.physical)
        self._data[layer].scatter_add_(0, slots, self._one.expand(slots.numel()))

    def on_tokens_per_expert(self, layer: int, tokens_per_expert: torch.Tensor) -> None:
        self._data[layer, 1:-1] += tokens_per_expert

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
        self._mine[layer] += local_physical_count_of_layer

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
        counts = list(local_physical_count_of_layer)
        if len(counts) != self.sizes.local:
            rule, remedy = f"have {self.sizes.local} counts", "One per expert of this rank."
            raise ValueError(
                _checks.message(
                    "on_deepep_dispatch_normal",
                    "local_physical_count_of_layer",
                    rule,
                    len(counts),
                    remedy,
                )
            )
        before = self._of_layer.get(layer, [0] * len(counts))
        self._of_layer[layer] = [a + b for a, b in zip(before, counts, strict=True)]

    def physical_count(self) -> torch.Tensor:
        out = torch.zeros((self.sizes.layers, self.sizes.physical), dtype=torch.int32)
        first = self.sizes.rank * self.sizes.local
        for layer, counts in self._of_layer.items():
            out[layer, first : first + self.sizes.local] = torch.tensor(counts, dtype=torch.int32)
        return out.to(self.sizes.device, non_blocking=True)


class Tokens(Gatherer):
    """The ids of every token, with what the engine says about the tokens."""

    def __init__(self, sizes: Sizes, max_tokens: int, top_k: int):
        super().__init__(sizes)
        shape = (sizes.layers, max_tokens, top_k)
        self._ids = torch.full(shape, -1, dtype=torch.int32, device=sizes.device)
        self._metadata: dict[str, Any] = {}
        self._misc: list[dict[str, Any]] = []
        self._num_tokens = 0

    def start(self, forward_batch: Any) -> None:
        self._ids.fill_(-1)
        self._misc, self._metadata, self._num_tokens = [], {}, 0
        if forward_batch is None:
            return
        self._metadata = {
            "input_ids": to_host(forward_batch.input_ids),
            "positions": to_host(forward_batch.positions),
            "extend_seq_lens": forward_batch.extend_seq_lens_cpu,
            "forward_mode": getattr(forward_batch.forward_mode, "value", None),
        }
        self._num_tokens = forward_batch.input_ids.shape[0]

    def on_select_experts(self, layer: int, topk_ids: torch.Tensor) -> None:
        tokens, k = topk_ids.shape
        if tokens > self._ids.shape[1] or k > self._ids.shape[2]:
            rule, got = f"fit into {list(self._ids.shape[1:])}", list(topk_ids.shape)
            remedy = "Make the recorder with larger max_tokens and top_k."
            raise ValueError(_checks.message("on_select_experts", "topk_ids", rule, got, remedy))
        self._ids[layer, :tokens, :k] = topk_ids
        if not self._metadata:
            self._num_tokens = max(self._num_tokens, tokens)

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

    def physical_count(self) -> torch.Tensor:
        layers, physical = self.sizes.layers, self.sizes.physical
        slots = scatter_slots(self._ids.view(layers, -1), physical)
        out = torch.zeros((layers, physical + 2), dtype=torch.int32, device=self.sizes.device)
        out.scatter_add_(1, slots, out.new_ones(1, 1).expand(slots.shape))
        return out[:, 1:-1]

    def record(self) -> dict[str, Any]:
        return {
            **self._metadata,
            "topk_ids_of_layer": to_host(self._ids[:, : self._num_tokens]),
            "misc_objects": list(self._misc),
        }


def to_host(value: Any) -> Any:
    """A copy of a tensor on the CPU, on its way; it may be read after the device was waited for."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.clone() if value.device.type == "cpu" else value.to("cpu", non_blocking=True)


# -- choosing ---------------------------------------------------------------------------------------------


def sizes_of(function: str, metadata: Any, rank: Any) -> Sizes:
    """The static facts of a placement, checked."""
    maps = metadata.physical_to_logical_map
    if not isinstance(maps, torch.Tensor) or maps.ndim != 2 or maps.is_floating_point():
        rule, got = "have physical_to_logical_map [L, Ep] of integers", _checks.describe(maps)
        remedy = "Pass the placement in force."
        raise TypeError(_checks.message(function, "expert_location_metadata", rule, got, remedy))
    logical, ranks = (
        _checks.check_positive_int(function, name, getattr(metadata, name), "Of the placement.")
        for name in ("num_logical_experts", "ep_size")
    )
    layers, physical = maps.shape
    if physical % ranks or not 0 <= rank < ranks:
        rule = "be below ep_size, which divides the physical experts"
        got = f"{rank} of {ranks} for {physical} experts"
        raise ValueError(_checks.message(function, "rank", rule, got, "Ranks hold equal shares."))
    return Sizes(layers, physical, logical, ranks, int(rank), maps.device)


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
            raise NotImplementedError(_checks.message(function, "mode", rule, got, remedy))
        return DispatchLists
    if backend != "deepep" or deepep_mode == "normal":
        return SelectExperts
    if deepep_mode == "low_latency":
        return LowLatency
    rule, remedy = 'be "normal" or "low_latency"', "The hook that counts must be known beforehand."
    raise NotImplementedError(
        _checks.message(function, "deepep_mode", rule, repr(deepep_mode), remedy)
    )
