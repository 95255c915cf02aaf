"""Runs a call on the DLPack path: imports its tensors into jax, runs one program, hands the results over.

On CUDA the host never waits for the GPU. Three rules make that safe:
1. XLA's stream waits for torch's current stream at the import (DLPack's stream argument).
2. Results are exported, which makes torch's current stream wait for the program, *before* the
   inputs are released or the caller may overwrite them: torch then reuses input memory only behind
   that wait. So jax need not hold that memory, and does not (`dlpack.call_jax`).
3. Results are copied into torch's memory, and XLA's memory is kept until an event behind that copy
   has passed: XLA orders the reuse of its memory by its own stream, which knows nothing of the copy.
On a CPU the export returns when the program is done, so both sides may do as they like afterwards.
"""

import collections
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from torch_bridge import dlpack
from torch_bridge._specs import Spec

if TYPE_CHECKING:
    from torch_bridge._resolved import Resolved

# XLA memory that may wait for torch's copies before a call waits for the oldest of them.
_MAX_KEPT_BYTES = 256 << 20


def run_in_jax(
    decided: "Resolved",
    operands: Mapping[str, torch.Tensor],
    max_valid_pairs: int | None = None,
    out: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Does what was decided for this path, or gives the results of no pairs.

    Args:
        decided: what is asked, by which implementation, and what is copied.
        operands: its tensors by name, with data.
        max_valid_pairs: num_valid_pairs as an int.
        out: tensors of the results to write; None for new ones.

    Returns:
        The int32 tensors of the results, in order, or `out`.
    """
    spec, plan = decided.spec, decided.plan
    device = next(iter(operands.values())).device
    if plan.implementation == "none":
        return _empty_results(spec, device, out)
    from torch_bridge._dlpack_path import jax_calls

    with dlpack.on_device(device):
        inputs = {
            name: dlpack.compact_copy(x) if name in plan.copies else x
            for name, x in operands.items()
        }
        views = dlpack.call_jax(
            lambda arrays: jax_calls.run(spec, plan.implementation, arrays, max_valid_pairs),
            {name: _flat(name, x) for name, x in inputs.items()},
        )
        return hand_over(views, copy="outputs" in plan.copies, out=out)


def _flat(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """One dimension, so that one compiled program serves every shape of as many ids."""
    return tensor.view(-1) if name == "topk_ids" else tensor


def _empty_results(
    spec: Spec, device: torch.device, out: Sequence[torch.Tensor] | None
) -> list[torch.Tensor]:
    """The results for no pairs, without jax: no rows are in use."""
    if out is None:
        fills = {"num_tokens_post_padded": 0, "tokens_per_expert": 0}
        return [
            torch.full(shape, fills.get(name, -1), dtype=torch.int32, device=device)
            for name, shape in spec.outputs.items()
        ]
    for tensor in out:
        tensor.zero_()  # only the count has elements
    return list(out)


def hand_over(
    views: list[torch.Tensor], *, copy: bool, out: Sequence[torch.Tensor] | None
) -> list[torch.Tensor]:
    """The results of a call.

    Args:
        views: of XLA's memory, from `dlpack.call_jax`.
        copy: copy them into torch's memory.
        out: tensors to copy them into; None for new ones.
    """
    if not copy:
        return views
    targets = list(out) if out is not None else [torch.empty_like(x) for x in views]
    _copy_all(targets, views)
    if views[0].is_cuda:
        kept_memory.keep_until_read(views)
    return targets


def _copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    torch._foreach_copy_(targets, sources)  # type: ignore[reportPrivateImportUsage]


class _KeptMemory:
    """XLA memory that torch's streams have yet to read, with the event that says they have."""

    def __init__(self) -> None:
        self._entries: collections.deque[tuple[Any, list[torch.Tensor], int]] = collections.deque()
        self._bytes = 0
        self._lock = threading.Lock()

    def keep_until_read(self, views: list[torch.Tensor]) -> None:
        """Keeps views of XLA's memory until torch's current stream has done what it holds now."""
        event = torch.cuda.Event()
        event.record()
        size = sum(x.nbytes for x in views)
        released = []
        with self._lock:
            self._entries.append((event, views, size))
            self._bytes += size
            while self._entries and self._entries[0][0].query():
                released.append(self._pop())
        while self._bytes > _MAX_KEPT_BYTES:
            with self._lock:
                entry = self._pop() if self._entries else None
            if entry is None:
                break
            entry[0].synchronize()
            released.append(entry)

    def _pop(self):
        entry = self._entries.popleft()
        self._bytes -= entry[2]
        return entry


kept_memory = _KeptMemory()
