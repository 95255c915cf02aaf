"""ExpertDistributionRecorder: the handle that an engine holds around the state of `expert_load`."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from moe_align_jax import _checks, expert_load
from moe_align_jax._recorder import arguments, files
from moe_align_jax._recorder.metrics import WINDOWS, Gauges, LoadMetrics, load_metrics
from moe_align_jax._recorder.rows import LoadRecord

logger = logging.getLogger(__name__)
_NAME = "ExpertDistributionRecorder"


class ExpertDistributionRecorder:
    """Starts, stops and dumps the recording of expert load.

    A step under `jit` takes `recorder.state`, records with `record_expert_load`, and gives it back:

        output, recorder.state = step(params, batch, recorder.state)

    Eager code may instead name the pass and the layer, and let the recorder count:

        with recorder.with_forward_pass(7), recorder.with_current_layer(0):
            recorder.on_select_experts(topk_ids)

    Args:
        mode, num_layers, num_physical_experts, num_logical_experts, max_tokens, top_k, num_shards,
        local_experts, sharding: as in `init_expert_load`. Mode None: every hook does nothing, the
            state is empty, and starting, stopping and dumping raise.
        buffer_size: B, the passes that are kept.
        num_gpus: D, a divisor of num_physical_experts, for the metrics; None for no metrics.
        directory: where dumps go; None for $MOE_ALIGN_RECORDER_DIR, else the folder of temporary files.
        file_format: "npz", or "arrow" or "parquet" (extra "arrow").
        registry: a `prometheus_client` registry that `metrics` keeps up to date (extra "metrics").

    Raises:
        TypeError, ValueError: as `init_expert_load`; num_gpus or file_format is impossible.
        ImportError: an extra is missing.

    Example:
        >>> recorder = ExpertDistributionRecorder("stat", num_layers=1, num_physical_experts=3)
        >>> recorder.start_record()
        >>> recorder.state = record_expert_load(recorder.state, None, jnp.array([[5, 6, 7]]))
        >>> recorder.dump_record("object")["logical_count"].tolist()
        [[[5, 6, 7]]]

    Source: SGLang `srt/eplb/expert_distribution.py` (Apache-2.0), its verbs and keys; no code taken.
    """

    def __init__(
        self,
        mode: expert_load.LoadMode | None,
        *,
        num_layers: int,
        num_physical_experts: int,
        num_logical_experts: int | None = None,
        buffer_size: int = 1000,
        num_gpus: int | None = None,
        max_tokens: int | None = None,
        top_k: int | None = None,
        num_shards: int = 1,
        local_experts: bool = False,
        sharding: jax.sharding.Sharding | None = None,
        directory: str | os.PathLike[str] | None = None,
        file_format: Literal["npz", "arrow", "parquet"] = "npz",
        registry: Any = None,
    ):
        if file_format not in files.FORMATS:
            _fail("file_format", f"be one of {', '.join(files.FORMATS)}", repr(file_format), "")
        if num_gpus is not None:
            gpus = _checks.check_positive_int(_NAME, "num_gpus", num_gpus, "Pass the GPUs.")
            if num_physical_experts % gpus:
                got = f"{gpus} GPUs for {num_physical_experts} experts"
                _fail("num_gpus", "divide num_physical_experts", got, "GPUs hold equal shares.")
        self.state = expert_load.init_expert_load(
            mode,
            num_layers=num_layers,
            num_physical_experts=num_physical_experts,
            num_logical_experts=num_logical_experts,
            num_passes=buffer_size,
            max_tokens=max_tokens,
            top_k=top_k,
            num_shards=num_shards,
            local_experts=local_experts,
            sharding=sharding,
        )
        self.num_gpus = num_gpus
        self.file_format = file_format
        default = os.environ.get("MOE_ALIGN_RECORDER_DIR") or tempfile.gettempdir()
        self.directory = Path(default if directory is None else directory)
        self._gauges = None if registry is None else Gauges(registry)
        self._recording = False
        self._disabled = 0
        self._layer: int | None = None
        self._pass: int | None = None
        self._in_pass = False
        self._metadata: deque[tuple[int, Any]] = deque(maxlen=buffer_size)
        self._passes = 0

    @property
    def mode(self) -> str | None:
        return self.state.mode

    @property
    def recording(self) -> bool:
        return self._recording

    # -- control ------------------------------------------------------------------------------------

    def start_record(self) -> None:
        """Clears what was recorded and starts. No program is compiled again.

        Raises:
            RuntimeError: the mode is None, or a layer is being recorded.
        """
        self._need_mode("start_record")
        if self._recording:
            logger.warning("start_record: recording is on already; what it holds is discarded")
        self._clear()
        self._recording = True
        self._switch()

    def stop_record(self) -> None:
        """Stops; what was recorded stays.

        Raises:
            RuntimeError: the mode is None.
        """
        self._need_mode("stop_record")
        if not self._recording:
            logger.warning("stop_record: recording is off already")
        self._recording = False
        self._switch()

    def dump_record(self, output_mode: Literal["file", "object"] = "file") -> Any:
        """Hands out what was recorded, and then clears it; recording stays on or off as it is.

        Args:
            output_mode: "object" returns the dict; "file" writes it to
                `directory/expert_distribution_recorder_{time}.npz` (or the other format; several
                processes add `_{rank}`), whole or not at all, and returns the path.

        Returns:
            The path, or a dict, with N passes, oldest first: "rank", "mode", "buffer_size",
            "forward_pass_id" `[N]`, "logical_count" `[N, L, El]`, "physical_count" `[N, L, Ep]`,
            "average_utilization_rate_over_window" (None without num_gpus); with a map
            "last_physical_to_logical_map" `[L, Ep]`, "physical_to_logical_maps" `[M, L, Ep]` and
            "map_of_pass" `[N]`, which says which of these M was in force; per token "topk_ids"
            `[N, S, L, max_tokens, top_k]` and "num_tokens" `[N, S]`; "metadata", what
            `with_forward_pass` was given for these passes (objects alone, JSON in files).

        Raises:
            RuntimeError: the mode is None.
            ValueError: output_mode is another one.
            OSError: the file cannot be written; nothing is cleared then.
        """
        self._need_mode("dump_record")
        if output_mode not in ("file", "object"):
            _fail("output_mode", 'be "file" or "object"', repr(output_mode), "", "dump_record")
        dump = self._dump(expert_load.collect_expert_load(self.state))
        if output_mode == "file":
            several = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
            name = f"expert_distribution_recorder_{time.time()}{several}.{self.file_format}"
            metadata = dump.pop("metadata")
            if metadata:
                dump["metadata"] = _as_json(metadata)
            path = files.write_dump(self.directory / name, dump, self.file_format)
            logger.info("dump_record: wrote %s", path)
        self._clear()
        return path if output_mode == "file" else dump

    def metrics(self, windows: Sequence[int] = WINDOWS) -> LoadMetrics:
        """Balancedness per layer and window of passes, tokens per GPU; waits for the device.

        What comes to the host are the counts of as many passes as the longest window has.

        Args:
            windows: in passes, each >= 1.

        Raises:
            RuntimeError: the mode is None.
            ValueError: the recorder was made without num_gpus, or a window is impossible.
        """
        self._need_mode("metrics")
        if self.num_gpus is None:
            _fail("num_gpus", "be given for metrics", None, "Pass it to the constructor.")
        if not windows or min(windows) < 1:
            _fail("windows", "be passes >= 1", repr(windows), "", "metrics")
        passes, counts = expert_load.last_physical_counts(self.state, max(windows))
        found = load_metrics(counts, self.num_gpus or 1, windows, passes=passes)
        if self._gauges is not None:
            self._gauges.set(found)
        return found

    # -- passes and layers ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def with_forward_pass(
        self,
        forward_pass_id: int | None = None,
        metadata: Any = None,
        *,
        physical_to_logical_map: Any = None,
    ) -> Iterator[None]:
        """One forward pass. What the hooks saw in it becomes one row at its end, unless it raises.

        Args:
            forward_pass_id: the engine's own; None counts. Use one of the two throughout.
            metadata: anything; kept for the passes of the ring and dumped with them.
            physical_to_logical_map: the placement of this pass, where the hooks record it.
        """
        if self._in_pass:
            raise RuntimeError("with_forward_pass: passes must not nest; got one inside another.")
        self._in_pass = True
        try:
            yield
            if self._active and self.state.pending:
                self.state = _commit(self.state, forward_pass_id, physical_to_logical_map)
            if self._active:
                number = self._passes if forward_pass_id is None else forward_pass_id
                self._passes += 1
                if metadata is not None:
                    self._metadata.append((number, metadata))
        finally:
            self._in_pass = False
            if self.state.pending:
                self.state = dataclasses.replace(self.state, pending={})

    @contextlib.contextmanager
    def with_current_layer(self, layer: int) -> Iterator[None]:
        """The layer that the hooks record."""
        before, self._layer = self._layer, layer
        try:
            yield
        finally:
            self._layer = before

    @contextlib.contextmanager
    def disable_this_region(self) -> Iterator[None]:
        """Records nothing inside, neither the hooks nor a step that is given `state`. May be nested."""
        self._disabled += 1
        self._switch()
        try:
            yield
        finally:
            self._disabled -= 1
            self._switch()

    def on_select_experts(self, topk_ids: Any) -> None:
        """Counts the ids `[num_tokens, top_k]` of the current layer, outside `jit`; -1 is no expert."""
        if self._active:
            layout = self.state.layout
            counts = None
            if layout is not None and layout.mode != "per_token":
                ids = _concrete("on_select_experts", topk_ids)
                ids = arguments.integers("on_select_experts", "topk_ids", ids)
                counts = _count(ids, num_experts=layout.width)
            self._record("on_select_experts", counts, topk_ids)

    def on_align(self, aligned: Any, topk_ids: Any = None) -> None:
        """Takes the counts of an alignment of the current layer, outside `jit`.

        Args:
            aligned: `AlignedBlocks`, or its `tokens_per_expert` `[E]`.
            topk_ids: the aligned ids, for mode "per_token".
        """
        if self._active:
            self._record("on_align", getattr(aligned, "tokens_per_expert", aligned), topk_ids)

    # -- inside -------------------------------------------------------------------------------------------

    @property
    def _active(self) -> bool:
        return self._recording and not self._disabled and self.mode is not None

    def _record(self, hook: str, counts: Any, topk_ids: Any) -> None:
        if self._layer is None or not self._in_pass:
            raise RuntimeError(
                f"{hook}: the call must stand in with_forward_pass and with_current_layer; got none. "
                "They say which row and layer to write."
            )
        self.state = expert_load.record_expert_load(
            self.state, self._layer, _concrete(hook, counts), topk_ids=_concrete(hook, topk_ids)
        )

    def _switch(self) -> None:
        if self.mode is not None:
            self.state = self.state.recording(self._recording and not self._disabled)

    def _clear(self) -> None:
        if self._layer is not None:
            raise RuntimeError(
                f"{_NAME}: data must not be cleared within with_current_layer; got layer "
                f"{self._layer}. Start and dump between forward passes."
            )
        self.state = self.state.cleared()
        self._metadata.clear()
        self._passes = 0

    def _need_mode(self, function: str) -> None:
        if self.mode is None:
            raise RuntimeError(
                f"{function}: mode must be one of {', '.join(expert_load.MODES)}; got None. "
                f"Make the {_NAME} with a mode."
            )

    def _dump(self, record: LoadRecord) -> dict[str, Any]:
        dump: dict[str, Any] = {
            "rank": jax.process_index(),
            "mode": self.mode,
            "buffer_size": self.state.layout.num_passes if self.state.layout else 0,
            "forward_pass_id": record.forward_pass_id,
            "logical_count": record.logical_count,
            "physical_count": record.physical_count,
            "average_utilization_rate_over_window": None,
            "topk_ids": record.topk_ids,
            "num_tokens": record.num_tokens,
        }
        if self.num_gpus is not None and len(record.forward_pass_id):
            found = load_metrics(record.physical_count, self.num_gpus)
            dump["average_utilization_rate_over_window"] = found.average(WINDOWS[-1])
        maps = record.physical_to_logical_map
        if maps is not None and len(maps):
            changed = [i for i in range(len(maps)) if i == 0 or (maps[i] != maps[i - 1]).any()]
            dump["last_physical_to_logical_map"] = maps[-1]
            dump["physical_to_logical_maps"] = maps[changed]
            dump["map_of_pass"] = np.searchsorted(changed, np.arange(len(maps)), side="right") - 1
        kept = set(record.forward_pass_id.tolist())
        dump["metadata"] = {
            number: value for number, value in self._metadata if number & 0xFFFFFFFF in kept
        }
        return dump


@functools.partial(jax.jit, donate_argnums=0)
def _write_row(state: Any, pending: Any, forward_pass_id: Any, maps: Any) -> Any:
    state = dataclasses.replace(state, pending=pending)
    return expert_load.commit_expert_load(
        state, physical_to_logical_map=maps, forward_pass_id=forward_pass_id
    )


def _commit(state: Any, forward_pass_id: int | None, physical_to_logical_map: Any) -> Any:
    number = None
    if forward_pass_id is not None:
        number = np.asarray(np.uint32(forward_pass_id & 0xFFFFFFFF))
    maps = getattr(physical_to_logical_map, "physical_to_logical_map", physical_to_logical_map)
    ring = dataclasses.replace(state, pending={})
    return _write_row(ring, dict(state.pending), number, maps)


def _concrete(hook: str, value: Any) -> Any:
    """The value, which must not be one that jit traces: it would outlive the trace."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{hook}: the hook must run outside jit; got a traced array. Inside, call "
            "record_expert_load and return its state."
        )
    return value


@functools.partial(jax.jit, static_argnames="num_experts")
def _count(topk_ids: jax.Array, num_experts: int) -> jax.Array:
    flat = topk_ids.reshape(-1)
    slot = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    return jnp.zeros(num_experts, jnp.int32).at[slot].add(1, mode="drop")


def _as_json(metadata: dict[int, Any]) -> str:
    return json.dumps({str(number): value for number, value in metadata.items()}, default=str)


def _fail(argument: str, rule: str, got: object, remedy: str, function: str = _NAME) -> None:
    raise ValueError(_checks.message(function, argument, rule, got, remedy).rstrip())
