"""SGLang's recorder of expert load for PyTorch engines: its verbs, hooks, modes, file names and keys.

Unlike the original: counts are attributed by the placement of their own pass, sums are int64, per_token takes
any top_k, records keep their own objects, ranks that see the same tokens need not be summed, and files
are written whole or not at all, with tensors on the CPU.
"""

import contextlib
import logging
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from moe_align_jax import _checks
from torch_bridge import sglang_accumulate as accumulate
from torch_bridge import sglang_gather as gather

logger = logging.getLogger("torch_bridge.sglang")
MODES = ("stat", "stat_approx", "per_pass", "per_token")
WINDOWS = (10, 100, 1000)
_DIRECTORY = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"


class ExpertDistributionMetrics(NamedTuple):
    """What a pass with metrics leaves in its outputs, on rank 0: tensors, so that nothing waits.

    Attributes:
        forward_pass_id: of the pass.
        eplb_balancedness: scalar float32, mean over the layers of mean / max tokens per GPU.
        gpu_physical_count_sum: scalar int64, (token, k) pairs of all layers and ranks.
    """

    forward_pass_id: int
    eplb_balancedness: torch.Tensor
    gpu_physical_count_sum: torch.Tensor


class ExpertDistributionRecorder:
    """The recorder that does nothing: its hooks pass, starting, stopping and dumping raise.

    `init_new` gives one that records.

    Source: SGLang 0.5.23 `srt/eplb/expert_distribution.py` (Apache-2.0), its contract; no code taken.
    """

    @staticmethod
    def init_new(
        expert_location_metadata: Any,
        rank: int,
        *,
        mode: Literal["stat", "stat_approx", "per_pass", "per_token"] | None,
        buffer_size: int = 1000,
        moe_a2a_backend: str = "none",
        deepep_mode: str = "normal",
        max_tokens: int | None = None,
        top_k: int | None = None,
        enable_metrics: bool = False,
        group: Any = None,
        replicated_tokens: bool = False,
        directory: str | os.PathLike[str] | None = None,
    ) -> "ExpertDistributionRecorder":
        """A recorder for the mode; what SGLang reads from its server arguments is passed here.

        Args:
            expert_location_metadata: SGLang's object, or any with `physical_to_logical_map` `[L, Ep]`
                (a tensor, read anew at the end of every pass), `num_logical_experts` and
                `ep_size`. The buffers live on the map's device.
            rank: of this process among ep_size.
            mode: None records nothing.
            buffer_size: passes that "stat" keeps; negative: all of them, in a buffer that grows.
            moe_a2a_backend: "deepep" chooses the hooks by deepep_mode; "mori" those of low
                latency; any other counts in `on_select_experts`.
            deepep_mode: "normal" or "low_latency".
            max_tokens: per_token only: tokens of the largest pass.
            top_k: per_token only: ids per token.
            enable_metrics: starts at once, and every pass leaves `ExpertDistributionMetrics` in its
                outputs; this sums over the ranks in every pass.
            group: of `torch.distributed`, over which dumps are summed; None for all ranks.
            replicated_tokens: every rank sees the same tokens (tensor parallelism): do not sum.
            directory: where files go; None for $SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR, else /tmp.

        Returns:
            The recorder, or for mode None one whose hooks do nothing.

        Raises:
            TypeError, ValueError: an argument is missing or impossible.
            NotImplementedError: the mode needs another dispatch.

        Example:
            >>> from types import SimpleNamespace
            >>> location = SimpleNamespace(
            ...     physical_to_logical_map=torch.tensor([[0, 1, 0]]), num_logical_experts=2, ep_size=1)
            >>> recorder = ExpertDistributionRecorder.init_new(location, 0, mode="stat", buffer_size=2)
            >>> recorder.start_record()
            >>> with recorder.with_forward_pass(0, None), recorder.with_current_layer(0):
            ...     recorder.on_select_experts(torch.tensor([[2, -1], [1, 0]]))
            >>> recorder.dump_record("object")["logical_count"].tolist()
            [[[2, 1]], [[0, 0]]]
        """
        if mode is None:
            return ExpertDistributionRecorder()
        function = "ExpertDistributionRecorder.init_new"
        if mode not in MODES:
            _fail(function, "mode", f"be one of {', '.join(MODES)} or None", repr(mode))
        sizes = gather.sizes_of(function, expert_location_metadata, rank)
        if buffer_size == 0:
            _fail(function, "buffer_size", "not be 0", 0)
        if mode == "per_token":
            tokens, k = (
                _checks.check_positive_int(function, name, value, "Mode per_token needs it.")
                for name, value in (("max_tokens", max_tokens), ("top_k", top_k))
            )
            gatherer: gather.Gatherer = gather.Tokens(sizes, tokens, k)
        else:
            gatherer = gather.choose(function, mode, moe_a2a_backend, deepep_mode)(sizes)
        return _Recorder(
            gatherer,
            accumulate.Stat(sizes, buffer_size)
            if mode.startswith("stat")
            else accumulate.Detail(sizes),
            expert_location_metadata,
            enable_metrics=bool(enable_metrics),
            reduce=accumulate.Reduce(group, replicated_tokens),
            directory=Path(directory or os.environ.get(_DIRECTORY) or "/tmp"),
        )

    @contextlib.contextmanager
    def with_current_layer(self, layer_idx: int) -> Iterator[None]:
        """The layer that the hooks record."""
        yield

    @contextlib.contextmanager
    def with_debug_name(self, debug_name: str) -> Iterator[None]:
        """Accepted for SGLang's call sites; all names are recorded together."""
        yield

    @contextlib.contextmanager
    def disable_this_region(self) -> Iterator[None]:
        """The hooks record nothing inside. May be nested."""
        yield

    @contextlib.contextmanager
    def with_forward_pass(
        self, forward_pass_id: int, forward_batch: Any
    ) -> Iterator[dict[str, Any]]:
        """One forward pass. It is recorded at its end, unless it raises.

        Args:
            forward_pass_id: the engine's own.
            forward_batch: read in mode per_token alone: `input_ids`, `positions`,
                `extend_seq_lens_cpu`, `forward_mode`; None without them.

        Yields:
            A dict that holds "metrics" afterwards, with enable_metrics on rank 0.
        """
        yield {}

    def on_select_experts(self, topk_ids: torch.Tensor) -> None:
        """The physical ids `[num_tokens, top_k]` of the current layer; ids out of range do not count."""

    def on_tokens_per_expert(self, tokens_per_expert: torch.Tensor) -> None:
        """Instead of `on_select_experts`: `[Ep]` counts of `torch_bridge.align_blocks`. One addition."""

    def get_current_pass_count_buffer(self, layer_idx: int) -> torch.Tensor | None:
        """`[Ep]` int32 of a layer that a fused kernel may add to; None when nothing is recorded."""
        return None

    def on_deepep_dispatch_normal(
        self,
        local_physical_count_of_layer: list[int],
        num_tokens_per_rank: Any,
        num_tokens_per_rdma_rank: Any,
        num_tokens_per_expert: Any,
    ) -> None:
        """What DeepEP's normal dispatch reports: a list per local expert, and its layout."""

    def on_deepep_dispatch_low_latency(self, local_physical_count_of_layer: torch.Tensor) -> None:
        """`masked_m` of DeepEP's low-latency dispatch: `[e]` integers."""

    def start_record(self) -> None:
        """Clears what was recorded, and starts."""
        self._refuse("start_record")

    def stop_record(self) -> None:
        """Stops; what was recorded stays."""
        self._refuse("stop_record")

    def dump_record(self, output_mode: Literal["file", "object"] = "file") -> Any:
        """Hands out what was recorded, then clears it; recording stays on or off as it is.

        Args:
            output_mode: "object" returns the dict (tensors on the device); "file" writes it, loadable with
                `torch.load(weights_only=True)` anywhere, and returns the path.

        Returns:
            stat, stat_approx: `dict(rank, logical_count, average_utilization_rate_over_window)`,
            `logical_count` `[B, L, El]` int64, summed over the ranks, oldest pass first, zeros where
            nothing was written; file `expert_distribution_recorder_{time}.pt` of rank 0 (None
            elsewhere). per_pass, per_token: `dict(records, last_physical_to_logical_map)`, file
            `expert_distribution_recorder_{time}_{rank}.pt` of every rank; a record has
            forward_pass_id, rank, gatherer_key, `global_physical_count` `[L, Ep]`,
            `global_logical_count` `[L, El]`; per_token also topk_ids_of_layer
            `[L, num_tokens, K]`, misc_objects, and input_ids, positions, extend_seq_lens,
            forward_mode of the batch.

        Raises:
            RuntimeError: the mode is None.   ValueError: output_mode is another one.
            OSError: the file cannot be written; nothing is cleared then.
        """
        self._refuse("dump_record")

    @property
    def recording(self) -> bool:
        return False

    def _refuse(self, function: str) -> None:
        raise RuntimeError(
            f"{function}: mode must be one of {', '.join(MODES)}; got None. "
            "Set expert_distribution_recorder_mode."
        )


class _Recorder(ExpertDistributionRecorder):
    def __init__(
        self,
        gatherer: gather.Gatherer,
        accumulator: Any,
        metadata: Any,
        *,
        enable_metrics: bool,
        reduce: accumulate.Reduce,
        directory: Path,
    ):
        self._gatherer, self._accumulator, self._metadata = gatherer, accumulator, metadata
        self._reduce, self._directory = reduce, directory
        self._recording = False
        self._disabled = 0
        self._layer: int | None = None
        self._history: deque[torch.Tensor] | None = None
        if enable_metrics:
            self._history = deque(maxlen=WINDOWS[-1])
            self.start_record()

    @contextlib.contextmanager
    def with_current_layer(self, layer_idx: int) -> Iterator[None]:
        before, self._layer = self._layer, layer_idx
        try:
            yield
        finally:
            self._layer = before

    @contextlib.contextmanager
    def disable_this_region(self) -> Iterator[None]:
        self._disabled += 1
        try:
            yield
        finally:
            self._disabled -= 1

    @contextlib.contextmanager
    def with_forward_pass(
        self, forward_pass_id: int, forward_batch: Any
    ) -> Iterator[dict[str, Any]]:
        outputs: dict[str, Any] = {}
        started = self._recording
        if started:
            self._gatherer.start(forward_batch)
        yield outputs
        if started and self._recording:
            count = self._gatherer.physical_count()
            maps = self._metadata.physical_to_logical_map
            self._accumulator.append(forward_pass_id, count, maps, self._gatherer)
            if self._history is not None:
                self._measure(forward_pass_id, count, outputs)

    # -- hooks: kernels alone, into fixed buffers ---------------------------------------------------

    def _wanted(self) -> bool:
        """Also while a CUDA graph is captured: its replays record when recording is on."""
        if self._disabled or not (self._recording or _capturing()):
            return False
        if self._layer is None:
            raise RuntimeError(
                "ExpertDistributionRecorder: a hook must be called in with_current_layer; got no layer."
            )
        return True

    def on_select_experts(self, topk_ids: torch.Tensor) -> None:
        if self._wanted():
            self._gatherer.on_select_experts(self._layer or 0, topk_ids)

    def on_tokens_per_expert(self, tokens_per_expert: torch.Tensor) -> None:
        if self._wanted():
            self._gatherer.on_tokens_per_expert(self._layer or 0, tokens_per_expert)

    def get_current_pass_count_buffer(self, layer_idx: int) -> torch.Tensor | None:
        if self._disabled or not (self._recording or _capturing()):
            return None
        return self._gatherer.count_buffer(layer_idx)

    def on_deepep_dispatch_normal(
        self,
        local_physical_count_of_layer: list[int],
        num_tokens_per_rank: Any,
        num_tokens_per_rdma_rank: Any,
        num_tokens_per_expert: Any,
    ) -> None:
        if self._wanted():
            self._gatherer.on_deepep_dispatch_normal(
                self._layer or 0,
                local_physical_count_of_layer,
                num_tokens_per_rank,
                num_tokens_per_rdma_rank,
                num_tokens_per_expert,
            )

    def on_deepep_dispatch_low_latency(self, local_physical_count_of_layer: torch.Tensor) -> None:
        if self._wanted():
            self._gatherer.on_deepep_dispatch_low_latency(
                self._layer or 0, local_physical_count_of_layer
            )

    # -- control --------------------------------------------------------------------------------------

    @property
    def recording(self) -> bool:
        return self._recording

    def start_record(self) -> None:
        if self._recording:
            logger.warning("start_record: recording is on already; what it holds is discarded")
        self._clear()
        self._recording = True

    def stop_record(self) -> None:
        if not self._recording:
            logger.warning("stop_record: recording is off already")
        self._recording = False

    def dump_record(self, output_mode: Literal["file", "object"] = "file") -> Any:
        if output_mode not in ("file", "object"):
            _fail("dump_record", "output_mode", 'be "file" or "object"', repr(output_mode))
        self._need_no_layer()
        average = None
        if self._history is not None:
            average = self._reduce.from_first(self.average_balancedness().get(WINDOWS[-1]))
        dump, name = self._accumulator.dump(self._metadata, self._reduce, average)
        if output_mode == "file":
            result = accumulate.save(self._directory / name, dump) if name else None
        else:
            result = dump
        self._clear()
        return result

    def average_balancedness(self) -> dict[int, float]:
        """Mean balancedness over the last 10, 100 and 1000 passes (fewer if fewer were recorded).

        Empty without enable_metrics, without a pass, and on ranks other than 0. Waits for the device.
        """
        if not self._history:
            return {}
        values = torch.stack(list(self._history)).cpu()
        return {window: float(values[-window:].mean()) for window in WINDOWS}

    def _measure(self, forward_pass_id: int, count: torch.Tensor, outputs: dict[str, Any]) -> None:
        sizes = self._gatherer.sizes
        per_gpu = count.reshape(sizes.layers, sizes.ranks, sizes.local).sum(-1, dtype=torch.int64)
        if self._reduce.to_first(per_gpu):
            mean, most = per_gpu.float().mean(-1), per_gpu.amax(-1).float()
            balance = ((mean + 1e-5) / (most + 1e-5)).mean()
            outputs["metrics"] = ExpertDistributionMetrics(forward_pass_id, balance, per_gpu.sum())
            if self._history is not None:
                self._history.append(balance)

    def _clear(self) -> None:
        self._need_no_layer()
        self._accumulator.clear()
        if self._history is not None:
            self._history.clear()

    def _need_no_layer(self) -> None:
        if self._layer is not None:
            raise RuntimeError(
                "ExpertDistributionRecorder: data must not be cleared within with_current_layer; got "
                f"layer {self._layer}. Start and dump between forward passes."
            )


# -- the recorder of the process, and checks --------------------------------------------------------------

_global: ExpertDistributionRecorder = ExpertDistributionRecorder()


def get_global_expert_distribution_recorder() -> ExpertDistributionRecorder:
    """The recorder of this process; one that does nothing until another is set."""
    return _global


def set_global_expert_distribution_recorder(value: ExpertDistributionRecorder) -> None:
    """Sets the recorder of this process."""
    global _global
    _global = value


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _fail(function: str, argument: str, rule: str, got: object) -> None:
    remedy = "See ExpertDistributionRecorder.init_new."
    raise ValueError(_checks.message(function, argument, rule, got, remedy))
