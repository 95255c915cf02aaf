"""How even each pass of `torch_bridge.sglang.recorder` was, as SGLang's metrics."""

import dataclasses
from collections import deque
from collections.abc import Callable

import torch

from moe_align_jax._expert_load.metrics import WINDOWS
from torch_bridge.sglang.accumulate import Reduce
from torch_bridge.sglang.gather import Sizes


@dataclasses.dataclass
class ExpertDistributionMetrics:
    """What a pass with metrics leaves in its outputs, on rank 0: tensors, so that nothing waits.

    Attributes:
        forward_pass_id: of the pass.
        eplb_balancedness: scalar float32, mean over the layers of mean / max tokens per GPU. As in SGLang, a
            layer without a token counts as 1.
        gpu_physical_count_sum: scalar int64, (token, k) pairs of all layers and ranks.
        reset_server_log_history: whether this is the first pass after a start or a dump, so that means of
            earlier passes are to be forgotten.

    Source: SGLang 0.5.23 `srt/eplb/expert_distribution.py` (Apache-2.0), its contract; no code taken.
    """

    forward_pass_id: int
    eplb_balancedness: torch.Tensor
    gpu_physical_count_sum: torch.Tensor | None
    reset_server_log_history: bool

    def map_device_tensors(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Puts `fn(tensor)`, for example a copy on the host, in place of each tensor."""
        self.eplb_balancedness = fn(self.eplb_balancedness)
        if self.gpu_physical_count_sum is not None:
            self.gpu_physical_count_sum = fn(self.gpu_physical_count_sum)


class History:
    """The balancedness of the last passes, on the device."""

    def __init__(self) -> None:
        self._values: deque[torch.Tensor] = deque(maxlen=WINDOWS[-1])
        self._new = True

    def measure(
        self, forward_pass_id: int, count: torch.Tensor, sizes: Sizes, reduce: Reduce
    ) -> ExpertDistributionMetrics | None:
        """The metrics of a pass with counts `[L, Ep]`, summed over the ranks; None but on the first."""
        per_gpu = count.reshape(sizes.layers, sizes.ranks, sizes.local).sum(-1, dtype=torch.int64)
        if not reduce.to_first(per_gpu):
            return None
        mean, most = per_gpu.float().mean(-1), per_gpu.amax(-1).float()
        balance = ((mean + 1e-5) / (most + 1e-5)).mean()
        self._values.append(balance)
        first, self._new = self._new, False
        return ExpertDistributionMetrics(forward_pass_id, balance, per_gpu.sum(), first)

    def averages(self) -> dict[int, float]:
        """The mean per window; empty without a pass. Waits for the device."""
        if not self._values:
            return {}
        values = torch.stack(list(self._values)).cpu()
        return {window: float(values[-window:].mean()) for window in WINDOWS}

    def clear(self) -> None:
        self._values.clear()
        self._new = True
