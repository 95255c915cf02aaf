"""What the recorder of `torch_bridge.sglang.recorder` keeps of its passes, and how it is dumped."""

import io
import logging
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from moe_align_jax._expert_load.files import write_atomically
from torch_bridge.sglang.gather import Sizes, scatter_slots, to_host, trim

logger = logging.getLogger("torch_bridge.sglang")


def by_logical(
    count: torch.Tensor, maps: torch.Tensor, num_logical: int, out: torch.Tensor
) -> torch.Tensor:
    """`out` `[L, El + 2]` int32 (zeroed here) gets the sums over replicas; its middle is returned."""
    slots = scatter_slots(maps.to(count.device), num_logical)
    return out.zero_().scatter_add_(1, slots, count)[:, 1:-1]


class Stat:
    """A ring (or a growing buffer) of logical counts, made by the placement of each pass."""

    def __init__(self, sizes: Sizes, buffer_size: int):
        self._sizes, self._grows = sizes, buffer_size < 0
        self._ring = self._zeros(128 if self._grows else buffer_size)
        self._next, self._wrapped = 0, False

    def _zeros(self, rows: int) -> torch.Tensor:
        shape = (rows, self._sizes.layers, self._sizes.logical + 2)
        return torch.zeros(shape, dtype=torch.int32, device=self._sizes.device)

    def append(self, forward_pass_id: int, count: Any, maps: Any, gatherer: Any) -> None:
        rows = len(self._ring)
        if self._next == rows:
            if self._grows:
                # A caller's inference mode must not make a buffer that is read-only outside of it.
                with torch.inference_mode(False):
                    larger = self._zeros(2 * rows)
                    larger[:rows] = self._ring
                self._ring = larger
            else:
                self._next, self._wrapped = 0, True
        by_logical(count, maps, self._sizes.logical, self._ring[self._next])
        self._next += 1

    def clear(self) -> None:
        self._ring.zero_()
        self._next, self._wrapped = 0, False

    def dump(self, metadata: Any, reduce: "Reduce", average: float | None) -> tuple[dict, str]:
        kept = self._ring[..., 1:-1]
        if self._grows:
            kept = kept[: self._next]
        elif self._wrapped:
            kept = kept.roll(-self._next, 0)
        total = reduce.everywhere(kept.to(torch.int64).contiguous())
        dump = {
            "rank": self._sizes.rank,
            "logical_count": total,
            "average_utilization_rate_over_window": average,
        }
        first = self._sizes.rank == 0
        return dump, f"expert_distribution_recorder_{time.time()}.pt" if first else ""


class Detail:
    """A record per pass, copied to the host without waiting for it; the last `buffer_size`, or all."""

    def __init__(self, sizes: Sizes, buffer_size: int):
        self._sizes = sizes
        limit = None if buffer_size < 0 else buffer_size
        self._records: deque[dict[str, Any]] = deque(maxlen=limit)

    def append(self, forward_pass_id: int, count: Any, maps: Any, gatherer: Any) -> None:
        shape = (self._sizes.layers, self._sizes.logical + 2)
        logical = torch.empty(shape, dtype=torch.int32, device=count.device)
        self._records.append(
            {
                "forward_pass_id": forward_pass_id,
                "rank": self._sizes.rank,
                "gatherer_key": "primary",
                "global_physical_count": to_host(count),
                "global_logical_count": to_host(
                    by_logical(count, maps, self._sizes.logical, logical)
                ),
                **gatherer.record(),
            }
        )

    def clear(self) -> None:
        self._records.clear()

    def dump(self, metadata: Any, reduce: "Reduce", average: float | None) -> tuple[dict, str]:
        if self._sizes.device.type == "cuda":
            torch.cuda.synchronize(self._sizes.device)  # the copies to the host
        records = [_listed(record) for record in self._records]
        last = metadata.physical_to_logical_map.clone()
        name = f"expert_distribution_recorder_{time.time()}_{self._sizes.rank}.pt"
        return {"records": records, "last_physical_to_logical_map": last}, name


def _listed(record: dict[str, Any]) -> dict[str, Any]:
    """Tensors are lists where SGLang's records have lists."""
    record = dict(record)
    trim(record)
    for name in ("input_ids", "positions"):
        if isinstance(record.get(name), torch.Tensor):
            record[name] = record[name].tolist()
    if "misc_objects" in record:
        record["misc_objects"] = [
            {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in one.items()}
            for one in record["misc_objects"]
        ]
    return record


class Reduce:
    """Sums over the ranks, where there are several and they see different tokens."""

    def __init__(self, group: Any, replicated_tokens: bool):
        self._group, self._replicated = group, bool(replicated_tokens)

    def _alone(self) -> bool:
        distributed = torch.distributed
        return self._replicated or not (distributed.is_available() and distributed.is_initialized())

    def everywhere(self, value: torch.Tensor) -> torch.Tensor:
        if not self._alone():
            torch.distributed.all_reduce(value, group=self._group)
        return value

    def to_first(self, value: torch.Tensor) -> bool:
        """Whether this rank has the sum."""
        if self._alone():
            return True
        torch.distributed.reduce(value, group_dst=0, group=self._group)
        return torch.distributed.get_rank(self._group) == 0

    def from_first(self, value: float | None) -> float | None:
        """The first rank's value, on all of them."""
        if self._alone():
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, group_src=0, group=self._group)
        return box[0]


def save(path: Path, dump: dict[str, Any]) -> Path:
    on_host = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in dump.items()}
    buffer = io.BytesIO()  # torch's own writer reports a full disk in ways of its own
    torch.save(on_host, buffer)
    written = write_atomically(path, lambda file: file.write(buffer.getbuffer()))
    logger.info("dump_record: wrote %s", written)
    return written
