"""ExpertDistributionRecorder: the handle that an engine holds around the state of `expert_load`."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.core
import numpy as np

from moe_align_jax import expert_load
from moe_align_jax._core import checks
from moe_align_jax._core.checks import fail
from moe_align_jax._expert_load import arguments, files, passes
from moe_align_jax._expert_load.metrics import WINDOWS, Gauges, LoadMetrics, load_metrics
from moe_align_jax._expert_load.ring import MODES, LoadMode, LoadRecord

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
        mode: as in `init_expert_load`. None: every hook does nothing, the state is empty, and starting,
            stopping and dumping raise.
        num_layers, num_physical_experts, num_logical_experts: as in `init_expert_load`.
        max_tokens, top_k, num_shards, local_experts, sharding: as in `init_expert_load`.
        buffer_size: B, the passes that are kept.
        num_gpus: D, a divisor of num_physical_experts, for the metrics; None for no metrics.
        directory: where dumps go; None for $MOE_ALIGN_RECORDER_DIR, else the folder of temporary files.
        file_format: "npz", or "arrow" or "parquet" (extra "arrow").
        registry: a `prometheus_client` registry that `metrics` keeps up to date (extra "metrics"). Several
            recorders may share one.
        name: the value of the gauges' label `name`, which tells recorders in one registry apart. None: ""
            for the first recorder without a name, then "2", "3", ...

    Raises:
        TypeError, ValueError: as `init_expert_load`; num_gpus, file_format, directory or name is
            impossible.
        ImportError: the extra of file_format or registry is missing.

    Threads: each thread may run forward passes of its own with the hooks, and start, stop and dump from
    any. `state` is one object: steps that take and assign it must not run at the same time.

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
        mode: LoadMode | None,
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
        name: str | None = None,
    ):
        if not checks.is_one_of(file_format, files.FORMATS):
            fail(
                _NAME,
                "file_format",
                f"be one of {', '.join(files.FORMATS)}",
                checks.shown(file_format),
                'The last two need the extra "arrow".',
            )
        files.check_format(file_format)
        if name is not None and not isinstance(name, str):
            got, remedy = checks.describe(name), "Pass the label of its metrics."
            fail(_NAME, "name", "be a str or None", got, remedy, TypeError)
        if directory is not None and not isinstance(directory, (str, os.PathLike)):
            got, remedy = checks.describe(directory), "Pass a folder."
            fail(_NAME, "directory", "be a path or None", got, remedy, TypeError)
        room = checks.check_positive_int(_NAME, "buffer_size", buffer_size, "Pass the passes.")
        self._lock = threading.RLock()
        self._current = passes.Current()
        self._disabled = 0
        self._state = expert_load.init_expert_load(
            mode,
            num_layers=num_layers,
            num_physical_experts=num_physical_experts,
            num_logical_experts=num_logical_experts,
            num_passes=room,
            max_tokens=max_tokens,
            top_k=top_k,
            num_shards=num_shards,
            local_experts=local_experts,
            sharding=sharding,
        )
        if num_gpus is not None:
            gpus = checks.check_positive_int(_NAME, "num_gpus", num_gpus, "Pass the GPUs.")
            if self.mode is not None and num_physical_experts % gpus:
                got = f"{gpus} GPUs for {num_physical_experts} experts"
                fail(
                    _NAME, "num_gpus", "divide num_physical_experts", got, "GPUs hold equal shares."
                )
        self.num_gpus = num_gpus
        self.file_format = file_format
        default = os.environ.get("MOE_ALIGN_RECORDER_DIR") or tempfile.gettempdir()
        self.directory = Path(default if directory is None else directory)
        self._gauges = None if registry is None else Gauges(registry, name)
        self._recording = False
        self._metadata: deque[passes.Metadata] = deque(maxlen=room)

    @property
    def state(self) -> expert_load.ExpertLoad:
        """The state, for a step to take; assign what the step returns, outside of jit.

        Raises:
            TypeError: what is assigned is no `ExpertLoad` with values; the recorder keeps the one it has.
        """
        return self._state

    @state.setter
    def state(self, state: expert_load.ExpertLoad) -> None:
        # At once, and not hours later in a dump.
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(state))
        if traced or not isinstance(state, expert_load.ExpertLoad):
            got = "one that jit traces" if traced else checks.describe(state)
            remedy = "Assign the state that the step returned, outside of jit."
            fail(_NAME, "state", "be an ExpertLoad with values", got, remedy, TypeError)
        self._state = state
        self._current.wrote |= not self._disabled

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
        with self._lock:
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
        with self._lock:
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
        if not checks.is_one_of(output_mode, ("file", "object")):
            fail(
                "dump_record", "output_mode", 'be "file" or "object"', checks.shown(output_mode), ""
            )
        with self._lock:
            self._need_no_layer()
            dump = self._dump(expert_load.collect_expert_load(self._state))
            metadata = dump["metadata"]
            if output_mode == "object":
                dump["metadata"] = {number: each.value for number, each in metadata.items()}
                result: Any = dump
            else:
                several = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
                name = f"expert_distribution_recorder_{time.time()}{several}.{self.file_format}"
                lines = (f"{json.dumps(str(n))}: {each.text}" for n, each in metadata.items())
                dump["metadata"] = f"{{{', '.join(lines)}}}" if metadata else None
                result = files.write_dump(self.directory / name, dump, self.file_format)
                logger.info("dump_record: wrote %s", result)
            self._clear()
        return result

    def metrics(self, windows: Sequence[int] = WINDOWS) -> LoadMetrics:
        """Balancedness per layer and window of passes, tokens per GPU; waits for the device.

        What comes to the host are the counts of as many passes as the longest window has.

        Args:
            windows: in passes, each >= 1.

        Raises:
            RuntimeError: the mode is None.
            TypeError: a window is not an int.
            ValueError: the recorder was made without num_gpus, or a window is impossible.
        """
        self._need_mode("metrics")
        if self.num_gpus is None:
            fail(_NAME, "num_gpus", "be given for metrics", None, "Pass it to the constructor.")
        try:
            sizes = [checks.index(window) for window in windows]
        except TypeError:
            got, remedy = checks.describe(windows), "Pass for example (10, 100, 1000)."
            fail("metrics", "windows", "be ints", got, remedy, TypeError)
        if not sizes or min(sizes) < 1:
            got, remedy = checks.describe(windows), "Pass for example (10, 100, 1000)."
            fail("metrics", "windows", "be passes >= 1", got, remedy)
        with self._lock:
            number, counts = expert_load.last_physical_counts(self._state, max(sizes))
            found = load_metrics(counts, self.num_gpus or 1, sizes, passes=number)
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
            metadata: what JSON can hold (other values than numbers, strings, lists and dicts become
                strings in files); dumped with the rows that this pass wrote, and with no other.
            physical_to_logical_map: the placement of this pass, where the hooks record it.

        Raises:
            TypeError: forward_pass_id is not an int, or metadata has keys that JSON has not; before
                anything is recorded.
            ValueError: metadata contains itself.
            RuntimeError: the thread is in a forward pass already.
        """
        function, current = "with_forward_pass", self._current
        if current.in_pass:
            raise RuntimeError(
                f"{function}: passes must not nest; got one inside another. "
                "Leave with_forward_pass before the next pass."
            )
        if forward_pass_id is not None:
            try:
                forward_pass_id = checks.index(forward_pass_id)
            except TypeError:
                got, remedy = checks.describe(forward_pass_id), "None counts the passes."
                rule = "be an int or None"
                fail(function, "forward_pass_id", rule, got, remedy, TypeError)
        if metadata is not None:
            passes.check_metadata(function, metadata)
        layout = self._state.layout
        if physical_to_logical_map is not None and layout is not None and layout.has_map:
            physical_to_logical_map = arguments.check_map(function, physical_to_logical_map, layout)
        current.in_pass, current.wrote = True, False
        counts = metadata is not None and forward_pass_id is None and self._active
        current.first = self._next_pass() if counts else 0
        try:
            yield
            with self._lock:
                if self._active and (current.pending or self._state.pending):
                    self._commit(forward_pass_id, physical_to_logical_map)
                if self._active and metadata is not None and current.wrote:
                    self._keep(forward_pass_id, metadata)
        finally:
            current.in_pass, current.pending = False, {}
            if self._state.pending:
                self._state = dataclasses.replace(self._state, pending={})

    @contextlib.contextmanager
    def with_current_layer(self, layer: int) -> Iterator[None]:
        """The layer that the hooks record.

        Raises:
            TypeError: layer is not an int.   ValueError: it is not in [0, num_layers).
        """
        if self._state.layout is not None:
            layer = arguments.check_layer(
                "with_current_layer", layer, self._state.layout.num_layers
            )
        current = self._current
        before, current.layer = current.layer, layer
        try:
            yield
        finally:
            current.layer = before

    @contextlib.contextmanager
    def disable_this_region(self) -> Iterator[None]:
        """Records nothing inside, neither the hooks nor a step that is given `state`. May be nested."""
        self._disable(1)
        try:
            yield
        finally:
            self._disable(-1)

    def on_select_experts(self, topk_ids: Any) -> None:
        """Counts the experts of the current layer's tokens, outside `jit`.

        Args:
            topk_ids: `[num_tokens, top_k]` integers; -1 is no expert.

        Raises:
            TypeError: topk_ids are no integers, or are traced.
            RuntimeError: no pass or no layer is in progress.
        """
        if self._active:
            layout = self._state.layout
            counts = None
            if layout is not None and layout.mode != "per_token":
                ids = passes.concrete("on_select_experts", topk_ids)
                ids = arguments.integers("on_select_experts", "topk_ids", ids)
                counts = passes.count(ids, num_experts=layout.width)
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
        current = self._current
        if current.layer is None or not current.in_pass:
            raise RuntimeError(
                f"{hook}: the call must stand in with_forward_pass and with_current_layer; got none. "
                "They say which row and layer to write."
            )
        counts, topk_ids = passes.concrete(hook, counts), passes.concrete(hook, topk_ids)
        current.pending = self._with_layer(current.pending, current.layer, counts, topk_ids)

    def _with_layer(self, pending: Any, layer: int, counts: Any, topk_ids: Any) -> dict[str, Any]:
        """The pending layers with one more; of the state, only its layout is read."""
        empty = expert_load.ExpertLoad(None, None, pending, self._state.layout)
        empty = expert_load.record_expert_load(empty, layer, counts, topk_ids=topk_ids)
        return dict(empty.pending)

    def _commit(self, forward_pass_id: int | None, physical_to_logical_map: Any) -> None:
        """Writes the row of this thread's layers, and of those that the caller recorded in `state`."""
        current, pending = self._current, dict(self._state.pending)
        for layer, part in current.pending.items():
            pending = self._with_layer(pending, int(layer), part, part)
        current.wrote = True
        self._state = _commit(self._state, pending, forward_pass_id, physical_to_logical_map)

    def _keep(self, forward_pass_id: int | None, metadata: Any) -> None:
        if forward_pass_id is not None:
            first, last = forward_pass_id, forward_pass_id + 1
        else:
            first, last = self._current.first, self._next_pass()
        text = passes.text_of(metadata)
        self._metadata.append(passes.Metadata(first, last, metadata, text))

    def _next_pass(self) -> Any:
        """The pass id that the state gives next: a copy on the device, as the state may be donated."""
        with self._lock:
            control = self._state.control
            if isinstance(control, jax.Array):
                control = control.addressable_shards[0].data
            return passes.next_pass(control)

    def _disable(self, change: int) -> None:
        with self._lock:
            self._disabled += change
            self._switch()

    def _switch(self) -> None:
        if self.mode is not None:
            self._state = self._state.recording(self._recording and not self._disabled)

    def _need_no_layer(self) -> None:
        if self._current.layer is not None:
            raise RuntimeError(
                f"{_NAME}: data must not be cleared within with_current_layer; got layer "
                f"{self._current.layer}. Start and dump between forward passes."
            )

    def _clear(self) -> None:
        self._need_no_layer()
        self._state = self._state.cleared()
        self._metadata.clear()
        self._current.first = 0

    def _need_mode(self, function: str) -> None:
        if self.mode is None:
            raise RuntimeError(
                f"{function}: mode must be one of {', '.join(MODES)}; got None. "
                f"Make the {_NAME} with a mode."
            )

    def _dump(self, record: LoadRecord) -> dict[str, Any]:
        dump: dict[str, Any] = {
            "rank": jax.process_index(),
            "mode": self.mode,
            "buffer_size": self._state.layout.num_passes if self._state.layout else 0,
            "forward_pass_id": record.forward_pass_id,
            "logical_count": record.logical_count,
            "physical_count": record.physical_count,
            "average_utilization_rate_over_window": None,
            "topk_ids": record.topk_ids,
            "num_tokens": record.num_tokens,
        }
        if self.num_gpus is not None and len(record.forward_pass_id):
            found = load_metrics(record.physical_count, self.num_gpus)
            average = found.average(WINDOWS[-1])
            if not np.isnan(average):
                dump["average_utilization_rate_over_window"] = average
        maps = record.physical_to_logical_map
        if maps is not None and len(maps):
            changed = [i for i in range(len(maps)) if i == 0 or (maps[i] != maps[i - 1]).any()]
            dump["last_physical_to_logical_map"] = maps[-1]
            dump["physical_to_logical_maps"] = maps[changed]
            dump["map_of_pass"] = np.searchsorted(changed, np.arange(len(maps)), side="right") - 1
        kept = set(record.forward_pass_id.tolist())
        # By the ids that the rows have: of two passes with one row, what was said of the later.
        dump["metadata"] = {
            number & 0xFFFFFFFF: each
            for each in self._metadata
            for number in range(int(each.first), int(each.last))
            if number & 0xFFFFFFFF in kept
        }
        return dump


@functools.partial(jax.jit, donate_argnums=0)
def _write_row(state: Any, pending: Any, forward_pass_id: Any, maps: Any) -> Any:
    state = dataclasses.replace(state, pending=pending)
    return expert_load.commit_expert_load(
        state, physical_to_logical_map=maps, forward_pass_id=forward_pass_id
    )


def _commit(
    state: Any, pending: Any, forward_pass_id: int | None, physical_to_logical_map: Any
) -> Any:
    number = None
    if forward_pass_id is not None:
        number = np.asarray(np.uint32(forward_pass_id & 0xFFFFFFFF))
    maps = getattr(physical_to_logical_map, "physical_to_logical_map", physical_to_logical_map)
    return _write_row(dataclasses.replace(state, pending={}), pending, number, maps)
