"""SGLang's recorder of expert load for PyTorch engines: its verbs, hooks, modes, file names and keys.

Unlike the original: counts are attributed by the placement of their own pass, sums are int64, per_token takes
any top_k, records keep their own objects, ranks that see the same tokens need not be summed, and files
are written whole or not at all, with tensors on the CPU.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from moe_align_jax._core import checks
from moe_align_jax._expert_load.metrics import WINDOWS
from moe_align_jax._expert_load.ring import MODES
from torch_bridge import _checks
from torch_bridge.sglang import accumulate, gather
from torch_bridge.sglang.metrics import History

logger = logging.getLogger("torch_bridge.sglang")
_REMEDY = "See ExpertDistributionRecorder.init_new."
_DIRECTORY = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"


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
                `ep_size`. The buffers live on the map's device. Between passes Ep and ep_size may
                change (elastic scaling), unless a CUDA graph has captured the hooks: its
                kernels write into buffers of the old size.
            rank: of this process among ep_size.
            mode: None records nothing.
            buffer_size: passes that are kept, the last ones; negative: all of them, in a buffer that grows.
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
            TypeError, ValueError: an argument is missing, of another type or impossible.
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
        if not (mode is None or checks.is_one_of(mode, MODES)):
            checks.fail(
                function,
                "mode",
                f"be one of {', '.join(MODES)} or None",
                checks.shown(mode),
                _REMEDY,
            )
        sizes = gather.sizes_of(function, expert_location_metadata, rank)
        try:
            buffer_size = checks.index(buffer_size)
        except TypeError:
            checks.fail(
                function,
                "buffer_size",
                "be an int",
                checks.describe(buffer_size),
                _REMEDY,
                TypeError,
            )
        if buffer_size == 0:
            checks.fail(function, "buffer_size", "not be 0", 0, _REMEDY)
        _checks.check_bool(function, "enable_metrics", enable_metrics)
        _checks.check_bool(function, "replicated_tokens", replicated_tokens)
        for name, value in (("moe_a2a_backend", moe_a2a_backend), ("deepep_mode", deepep_mode)):
            if not isinstance(value, str):
                checks.fail(function, name, "be a str", checks.describe(value), _REMEDY, TypeError)
        if directory is not None and not isinstance(directory, (str, os.PathLike)):
            checks.fail(
                function, "directory", "be a path", checks.describe(directory), _REMEDY, TypeError
            )
        if mode == "per_token":
            tokens, k = (
                checks.check_positive_int(function, name, value, "Mode per_token needs it.")
                for name, value in (("max_tokens", max_tokens), ("top_k", top_k))
            )
            gatherer: gather.Gatherer = gather.Tokens(sizes, tokens, k)
        else:
            gatherer = gather.choose(function, mode, moe_a2a_backend, deepep_mode)(sizes)
        return _Recorder(
            gatherer,
            accumulate.Stat(sizes, buffer_size)
            if mode.startswith("stat")
            else accumulate.Detail(sizes, buffer_size),
            expert_location_metadata,
            enable_metrics=enable_metrics,
            reduce=accumulate.Reduce(group, replicated_tokens),
            directory=Path(directory or os.environ.get(_DIRECTORY) or "/tmp"),
        )

    @contextlib.contextmanager
    def with_current_layer(self, layer_idx: int) -> Iterator[None]:
        """The layer that the hooks record: an int in [0, L)."""
        yield

    @contextlib.contextmanager
    def with_debug_name(self, debug_name: str) -> Iterator[None]:
        """Accepted because SGLang calls it (with a micro-batch's name): all names are recorded together.

        Counts of a layer are summed. In mode per_token the micro-batches' ids stand one after another, as
        the tokens of the pass do: only the last one may be padded, and only in a CUDA graph's replay.
        """
        yield

    @contextlib.contextmanager
    def disable_this_region(self) -> Iterator[None]:
        """The hooks record nothing inside. May be nested."""
        yield

    @contextlib.contextmanager
    def with_forward_pass(
        self, forward_pass_id: int, forward_batch: Any
    ) -> Iterator[dict[str, Any]]:
        """One forward pass. It is recorded at its end, unless it raises. Passes must not nest.

        In mode per_token the tokens are those of `forward_batch`: rows behind them are padding, and
        neither kept nor counted. Without a batch, all rows are tokens.

        Args:
            forward_pass_id: the engine's own.
            forward_batch: read in mode per_token alone: `input_ids`, `positions`,
                `extend_seq_lens_cpu`, `forward_mode`; None without them.

        Yields:
            A dict that holds "metrics" afterwards, with enable_metrics on rank 0.

        Raises:
            TypeError: forward_pass_id is not an int.
            ValueError: the batch has more tokens than max_tokens, or micro-batches are padded.
            RuntimeError: a pass is in progress, in this thread or another; or the placement changed its size
                in a way that the buffers cannot follow.
        """
        yield {}

    def on_select_experts(self, topk_ids: torch.Tensor) -> None:
        """Counts `topk_ids` `[num_tokens, top_k]`, physical ids of the current layer, of any integer dtype;
        ids out of range do not count."""

    def on_tokens_per_expert(self, tokens_per_expert: torch.Tensor) -> None:
        """Instead of `on_select_experts`: `tokens_per_expert` `[Ep]` int32 of `torch_bridge.align_blocks`.
        One addition."""

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
        """What DeepEP's normal dispatch reports: `local_physical_count_of_layer`, a count for each of the `e`
        local experts. Its layout, the other three, is not needed."""

    def on_deepep_dispatch_low_latency(self, local_physical_count_of_layer: torch.Tensor) -> None:
        """`local_physical_count_of_layer`: `masked_m` `[e]`, integers, of DeepEP's low-latency dispatch."""

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
        """Whether passes are recorded now."""
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
        self._lock = threading.RLock()
        self._thread: int | None = None  # that of the pass in progress
        self._captured = False  # a CUDA graph writes into the gatherer's buffers
        self._history: History | None = None
        if enable_metrics:
            self._history = History()
            self.start_record()

    @contextlib.contextmanager
    def with_current_layer(self, layer_idx: int) -> Iterator[None]:
        self._own("with_current_layer")
        # A draft model's layers, which are not recorded, may have other numbers.
        layers = None if self._disabled else self._gatherer.sizes.layers
        layer_idx = gather.check_layer("with_current_layer", layer_idx, layers)
        before, self._layer = self._layer, layer_idx
        try:
            yield
        finally:
            self._layer = before

    @contextlib.contextmanager
    def disable_this_region(self) -> Iterator[None]:
        with self._lock:
            self._disabled += 1
        try:
            yield
        finally:
            with self._lock:
                self._disabled -= 1

    @contextlib.contextmanager
    def with_forward_pass(
        self, forward_pass_id: int, forward_batch: Any
    ) -> Iterator[dict[str, Any]]:
        function, outputs = "with_forward_pass", {}
        try:
            forward_pass_id = checks.index(forward_pass_id)
        except TypeError:
            got = checks.describe(forward_pass_id)
            checks.fail(function, "forward_pass_id", "be an int", got, _REMEDY, TypeError)
        with self._lock:
            self._own(function)
            if self._thread is not None:
                raise RuntimeError(
                    f"{function}: passes must not nest; got one inside another. "
                    "Leave with_forward_pass before the next pass."
                )
            self._thread = threading.get_ident()
        try:
            with self._lock:
                started = self._recording
                if started:
                    self._follow_placement(function)
                    self._gatherer.start(forward_batch)
            yield outputs
            with self._lock:
                if started and self._recording:
                    self._append(function, forward_pass_id, outputs)
        finally:
            self._thread = None

    def _follow_placement(self, function: str) -> None:
        """Buffers for another number of slots, where the placement has one by now."""
        old = self._gatherer.sizes
        new = gather.sizes_of(function, self._metadata, old.rank)
        if new == old:
            return
        fixed = ("layers", "logical", "device")
        if self._captured or any(getattr(new, name) != getattr(old, name) for name in fixed):
            what = (
                "the buffers that a CUDA graph captured" if self._captured else "what is recorded"
            )
            got = f"{new.layers} x {new.physical} slots of {new.logical} experts"
            raise RuntimeError(
                f"{function}: expert_location_metadata must keep the sizes of {what}, {old.layers} x "
                f"{old.physical} slots of {old.logical} experts on {old.device}; got {got} on "
                f"{new.device}. Dump, make a new recorder with init_new, and capture again."
            )
        self._gatherer = self._gatherer.resized(new)

    def _append(self, function: str, forward_pass_id: int, outputs: dict[str, Any]) -> None:
        self._gatherer.finish()
        count = self._gatherer.physical_count()
        maps = self._metadata.physical_to_logical_map
        if maps.shape != count.shape:
            raise RuntimeError(
                f"{function}: expert_location_metadata must keep its size within a pass, "
                f"{list(count.shape)}; got {list(maps.shape)}. Scale between forward passes."
            )
        self._accumulator.append(forward_pass_id, count, maps, self._gatherer)
        if self._history is not None:
            sizes = self._gatherer.sizes
            found = self._history.measure(forward_pass_id, count, sizes, self._reduce)
            if found is not None:
                outputs["metrics"] = found

    def _own(self, function: str) -> None:
        """A forward pass fills one set of buffers: it belongs to the thread that began it."""
        if torch.compiler.is_compiling() or self._thread is None:
            return
        if self._thread != threading.get_ident():
            raise RuntimeError(
                f"{function}: a recorder must be used by one thread at a time; got a call from another "
                "while a forward pass is in progress. Call it between passes, or make a recorder for "
                "each thread."
            )

    # -- hooks: kernels alone, into fixed buffers ---------------------------------------------------

    def _wanted(self) -> bool:
        """Also while a CUDA graph is captured: its replays record when recording is on."""
        capturing = not self._disabled and gather.capturing()
        if self._disabled or not (self._recording or capturing):
            return False
        self._own("ExpertDistributionRecorder")
        self._captured |= capturing
        if self._layer is None:
            raise RuntimeError(
                "ExpertDistributionRecorder: a hook must be called in with_current_layer; got no layer. "
                "It says which layer to write."
            )
        return True

    def on_select_experts(self, topk_ids: torch.Tensor) -> None:
        if self._wanted():
            self._gatherer.on_select_experts(self._layer or 0, topk_ids)

    def on_tokens_per_expert(self, tokens_per_expert: torch.Tensor) -> None:
        if self._wanted():
            self._gatherer.on_tokens_per_expert(self._layer or 0, tokens_per_expert)

    def get_current_pass_count_buffer(self, layer_idx: int) -> torch.Tensor | None:
        function, capturing = "get_current_pass_count_buffer", gather.capturing()
        if self._disabled or not (self._recording or capturing):
            return None
        self._captured |= capturing
        layer = gather.check_layer(function, layer_idx, self._gatherer.sizes.layers)
        return self._gatherer.count_buffer(layer)

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
        with self._lock:
            self._own("start_record")
            if self._recording:
                logger.warning("start_record: recording is on already; what it holds is discarded")
            self._clear()
            self._recording = True

    def stop_record(self) -> None:
        with self._lock:
            self._own("stop_record")
            if not self._recording:
                logger.warning("stop_record: recording is off already")
            self._recording = False

    def dump_record(self, output_mode: Literal["file", "object"] = "file") -> Any:
        if not checks.is_one_of(output_mode, ("file", "object")):
            checks.fail(
                "dump_record",
                "output_mode",
                'be "file" or "object"',
                checks.shown(output_mode),
                _REMEDY,
            )
        with self._lock:
            self._own("dump_record")
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
        return self._history.averages() if self._history is not None else {}

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
