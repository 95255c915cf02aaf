"""Expert load as pure state: each forward pass leaves one row in a ring on the device.

The alignment has counted the pairs of every expert already; recording copies these counts, so that a
forward pass costs one `dynamic_update_slice`, whatever the number of layers. Legend of the shapes:
B passes in the ring, L layers, Ep physical and El logical experts, S shards, e = Ep / S.

A row holds its header (see `Layout.header`), the counts (or, per token, the ids) of all layers, and the
physical_to_logical_map that was in force in that pass. Counts and map travel together, so a change
of placement cannot move old counts to other experts, and no scatter runs in the step: the sum over
replicas is made of these rows on the host, in int64.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_align_jax._core import checks, fork
from moe_align_jax._core.int32 import INT32_MAX
from moe_align_jax._expert_load import arguments
from moe_align_jax._expert_load.ring import (
    HEADER,
    MODES,
    Layout,
    LoadMode,
    LoadRecord,
    physical_counts,
    read_rows,
    used_rows,
)
from moe_align_jax._lowering import export

_I32 = jnp.int32


@dataclasses.dataclass(frozen=True)
class ExpertLoad:
    """The state that `record_expert_load` takes and returns. Donate it: the ring is written in place.

    Every array's leading axis is that of the shards, so one `PartitionSpec("ep")` serves the
    whole state as a prefix in `shard_map`. With mode None there are no arrays at all.

    Attributes:
        ring: `[S * (B + 1), row]` int32. Row `pass % B` of a shard is written by each recorded pass;
            row B takes what is written while recording is off. Row: header (pass id, epoch,
            tokens, 0), `L * width` counts or ids, `L * Ep` of the map.
        control: `[S, 2]` int32: the epoch (rows of earlier epochs do not count), and twice the next pass
            id (where the caller gives none), plus 1 while recording. One word holds both, so the update
            reads only itself and stays in place. `[S, 2]`, not `[1]`: XLA would reuse that donation for
            another result of the same shape, and copy the state.
        pending: counts (or ids) of single layers, not yet committed. The layer's number is written as
            text, because jax.export takes no other keys.
        layout: static sizes, None when recording is compiled out.
    """

    ring: Any
    control: Any
    pending: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layout: Layout | None = None

    @property
    def mode(self) -> str | None:
        return self.layout.mode if self.layout else None

    def recording(self, on: bool) -> "ExpertLoad":
        """The state with recording switched `on` or off (a bool; anything else is a TypeError): a device
        value, also inside jit. Compiles nothing, waits for nothing."""
        on = checks.check_bool("recording", "on", on, "True records, False does not.")
        return self._controlled([-1, -2], [0, on])

    def cleared(self) -> "ExpertLoad":
        """The state without its rows: those of earlier epochs do not count. The ring is not touched."""
        return dataclasses.replace(self._controlled([-1, 1], [1, 0]), pending={})

    def _controlled(self, keep: list, add: list) -> "ExpertLoad":
        if self.layout is None:
            return self
        fork.check("ExpertLoad")
        control = _masked(self.control, np.array([keep], np.int32), np.array([add], np.int32))
        traced = isinstance(self.control, jax.core.Tracer)
        if not traced and getattr(self.control, "committed", False):
            # Named as before, so that a jitted step is not traced again.
            control = jax.device_put(control, self.control.sharding)
        return dataclasses.replace(self, control=control)


@jax.jit
def _masked(control: jax.Array, keep: jax.Array, add: jax.Array) -> jax.Array:
    return (control & keep) + add


export.register_static_field(Layout)
export.register_namedtuple(LoadRecord)
export.register_dataclass(
    ExpertLoad, data_fields=["ring", "control", "pending"], meta_fields=["layout"]
)


def init_expert_load(
    mode: LoadMode | None,
    *,
    num_layers: int,
    num_physical_experts: int,
    num_logical_experts: int | None = None,
    num_passes: int = 1000,
    max_tokens: int | None = None,
    top_k: int | None = None,
    num_shards: int = 1,
    local_experts: bool = False,
    sharding: jax.sharding.Sharding | None = None,
    recording: bool = False,
) -> ExpertLoad:
    """Makes the state of the recorder: empty, and off unless `recording`.

    Memory per shard: `4 * (B + 1) * L * (Ep + Ep)` bytes with a map, half of it without one;
    per token `4 * (B + 1) * L * (max_tokens * top_k + Ep)`.

    Args:
        mode: "stat": counts per pass, of which a dump gives the logical ones. "per_pass": the same
            rows; a dump gives one record per pass. "per_token": the ids of every token.
            "stat_approx": as "stat", for counts that come rounded up to a GEMM's alignment. None:
            no arrays, and every recording call is the identity: the compiled program is the
            one without it.
        num_layers: L.
        num_physical_experts: Ep, the experts that the alignment counts.
        num_logical_experts: El <= Ep when a physical_to_logical_map is recorded with every pass;
            None when physical and logical experts are the same.
        num_passes: B, the passes that the ring keeps.
        max_tokens: per token only: tokens of one pass (on one shard).
        top_k: per token only: ids per token.
        num_shards: S, devices of the expert-parallel axis; each records for itself, inside
            `shard_map`, and the host sums them.
        local_experts: each shard counts all tokens on its own e = Ep / S experts (a low-latency
            dispatch), instead of its own tokens on all Ep.
        sharding: of the leading axis of every array, for example
            `NamedSharding(mesh, PartitionSpec("ep"))`; None for the default device.
        recording: whether recording starts on.

    Returns:
        `ExpertLoad`.

    Raises:
        TypeError: a size is not an int.   ValueError: a size or the mode is out of range.

    Example:
        >>> load = init_expert_load("stat", num_layers=2, num_physical_experts=4, num_passes=8)
        >>> load.ring.shape, load.mode
        ((9, 12), 'stat')
        >>> jax.tree.leaves(init_expert_load(None, num_layers=2, num_physical_experts=4))
        []

    Source: SGLang `srt/eplb/expert_distribution.py` (Apache-2.0), its modes; no code taken.
    """
    function = "init_expert_load"
    fork.check(function)
    if mode is None:
        return ExpertLoad(None, None)
    if not checks.is_one_of(mode, MODES):
        rule, remedy = f"be one of {', '.join(MODES)} or None", "None compiles recording out."
        raise ValueError(checks.message(function, "mode", rule, checks.shown(mode), remedy))
    sizes = {
        "num_layers": num_layers,
        "num_physical_experts": num_physical_experts,
        "num_passes": num_passes,
        "num_shards": num_shards,
    }
    if num_logical_experts is not None:
        sizes["num_logical_experts"] = num_logical_experts
    per_token = {"max_tokens": max_tokens, "top_k": top_k}
    sizes |= {n: size for n, size in per_token.items() if mode == "per_token" or size is not None}
    checked = {
        name: checks.check_positive_int(function, name, value, "Pass a size.")
        for name, value in sizes.items()
    }
    physical, shards = checked["num_physical_experts"], checked["num_shards"]
    logical = checked.get("num_logical_experts", physical)
    if logical > physical:
        rule, remedy = f"be at most num_physical_experts = {physical}", "Every expert has a slot."
        raise ValueError(checks.message(function, "num_logical_experts", rule, logical, remedy))
    remedy = "True where a shard counts its own experts alone."
    local_experts = checks.check_bool(function, "local_experts", local_experts, remedy)
    if local_experts and (mode == "per_token" or physical % shards):
        rule = "go with num_physical_experts divisible by num_shards, and with counts"
        got = f"mode {mode!r}, {physical} experts on {shards} shards"
        remedy = "Leave it False where a shard counts all experts."
        raise ValueError(checks.message(function, "local_experts", rule, got, remedy))
    remedy = "Pass True or False."
    recording = checks.check_bool(function, "recording", recording, remedy)
    if sharding is not None and not isinstance(sharding, jax.sharding.Sharding):
        rule, got = "be None or a jax.sharding.Sharding", checks.describe(sharding)
        remedy = "Pass jax.NamedSharding(mesh, jax.P(axis))."
        raise TypeError(checks.message(function, "sharding", rule, got, remedy))
    tokens, k = (checked[name] if mode == "per_token" else 0 for name in per_token)
    layout = Layout(
        mode=mode,
        num_layers=checked["num_layers"],
        num_physical_experts=physical,
        num_logical_experts=logical,
        num_passes=checked["num_passes"],
        width=tokens * k or (physical // shards if local_experts else physical),
        max_tokens=tokens,
        top_k=k,
        has_map=num_logical_experts is not None,
        local_experts=local_experts,
    )
    rows = shards * (layout.num_passes + 1)
    checks.check_fits_int32(function, "num_passes", rows * layout.row, "a ring")
    control = np.tile(np.array([1, recording], np.int32), (shards, 1))
    return ExpertLoad(
        ring=jnp.zeros((rows, layout.row), _I32, device=_of_rank(sharding, 2)),
        control=jnp.asarray(control)
        if sharding is None
        else jax.device_put(control, _of_rank(sharding, 2)),
        layout=layout,
    )


def _of_rank(sharding: jax.sharding.Sharding | None, rank: int) -> jax.sharding.Sharding | None:
    """Named as programs name it that return the state: the first call is then traced like the next.

    With Explicit axes that is a spec as long as the shape, with Auto ones the spec as it was written.
    """
    if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
        return sharding
    spec = (*sharding.spec, *[None] * rank)[:rank]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)


def _check_state(function: str, load: Any) -> None:
    if not isinstance(load, ExpertLoad):
        rule, got = "be an ExpertLoad", checks.describe(load)
        remedy = "Pass what init_expert_load, or the last of these calls, returned."
        raise TypeError(checks.message(function, "load", rule, got, remedy))


def record_expert_load(
    load: ExpertLoad,
    layer: int | None,
    tokens_per_expert: Any,
    *,
    topk_ids: Any = None,
    physical_to_logical_map: Any = None,
    forward_pass_id: Any = None,
) -> ExpertLoad:
    """Records the load of one layer, or (layer None) of a whole forward pass.

    With `layer`, nothing is computed yet: `commit_expert_load` ends the pass and writes its row. Under
    `lax.scan` let the body return `tokens_per_expert`, and record the stacked `[L, E]` once.

    Args:
        load: the state; inside `shard_map` this device's part of it.
        layer: 0 <= layer < L, a Python int; a layer that is recorded twice (micro-batches) is summed,
            one that is not has zeros. None: `tokens_per_expert` has every layer; ends the pass.
        tokens_per_expert: `[E]` integers, `AlignedBlocks.tokens_per_expert`; for layer None
            `[L, E]` or L arrays `[E]`. E is Ep (or e, with `local_experts`). Negative counts are
            zero. Not used per token, and may be None there.
        topk_ids: per token only (otherwise not used): `[num_tokens, top_k]` integers; for layer None
            `[L, num_tokens, top_k]` or L arrays. Ids outside `[0, Ep)` are recorded as -1.
        physical_to_logical_map: `[L, Ep]` integers, the placement of this very pass, or an object with
            this attribute (`ExpertLocation`). Only for layer None, and needed then if the state was
            made with num_logical_experts.
        forward_pass_id: scalar integer, kept with the row, which it also places: row `id % B`, over what
            is there. Ids that step by 1 use the whole ring; of passes with equal ids the last stays.
            None counts the passes in the state (modulo 2**31), at the cost of one more tiny kernel per
            pass. Only for layer None.

    Returns:
        The new state. With mode None, `load` itself.

    Raises:
        TypeError: an array is not of integers, or layer is neither an int nor None.
        ValueError: a shape does not fit, or an argument that the mode needs is missing.

    Example:
        >>> load = init_expert_load("stat", num_layers=2, num_physical_experts=4, recording=True)
        >>> out = moe_align_block_size(jnp.array([[2, 3], [1, -1]]), block_size=4, num_experts=4)
        >>> load = record_expert_load(load, 0, out.tokens_per_expert)
        >>> load = commit_expert_load(record_expert_load(load, 1, out.tokens_per_expert))
        >>> collect_expert_load(load).logical_count.tolist()
        [[[0, 1, 1, 1], [0, 1, 1, 1]]]
    """
    function = "record_expert_load"
    fork.check(function)
    _check_state(function, load)
    layout = load.layout
    if layout is None:
        return load
    per_token = layout.mode == "per_token"
    argument = "topk_ids" if per_token else "tokens_per_expert"
    given = topk_ids if per_token else tokens_per_expert
    if layer is not None:
        index = arguments.check_layer(function, layer, layout.num_layers)
        if physical_to_logical_map is not None or forward_pass_id is not None:
            rule, remedy = (
                "be None while forward_pass_id or a map is given",
                "Pass it to the commit.",
            )
            raise ValueError(checks.message(function, "layer", rule, layer, remedy))
        part = arguments.check_layer_array(function, argument, given, layout)
        key = str(index)
        if key in load.pending:
            before = load.pending[key]
            part = jnp.concatenate([before, part]) if per_token else _added(before, part)
        return dataclasses.replace(load, pending={**load.pending, key: part})
    if load.pending:
        rule, got = "be a layer while single layers are pending", f"None with {len(load.pending)}"
        remedy = "End the pass with commit_expert_load."
        raise ValueError(checks.message(function, "layer", rule, got, remedy))
    parts = arguments.check_all_layers(function, argument, given, layout)
    return _commit(function, load, parts, physical_to_logical_map, forward_pass_id)


def commit_expert_load(
    load: ExpertLoad, *, physical_to_logical_map: Any = None, forward_pass_id: Any = None
) -> ExpertLoad:
    """Ends a forward pass whose layers were recorded one by one: writes its row.

    Args:
        load: the state with the layers that `record_expert_load` left pending.
        physical_to_logical_map: as in `record_expert_load`.
        forward_pass_id: as in `record_expert_load`.

    Returns:
        The new state, nothing pending. With mode None, `load` itself.

    Raises:
        TypeError, ValueError: as `record_expert_load`.

    Example:
        >>> load = init_expert_load("stat", num_layers=1, num_physical_experts=2, recording=True)
        >>> load = record_expert_load(load, 0, jnp.array([3, 4]))
        >>> collect_expert_load(commit_expert_load(load, forward_pass_id=7)).forward_pass_id.tolist()
        [7]
    """
    function = "commit_expert_load"
    fork.check(function)
    _check_state(function, load)
    if load.layout is None:
        return load
    pending = [load.pending.get(str(layer)) for layer in range(load.layout.num_layers)]
    load = dataclasses.replace(load, pending={})
    return _commit(function, load, pending, physical_to_logical_map, forward_pass_id)


def collect_expert_load(load: ExpertLoad, *, all_processes: bool = False) -> LoadRecord:
    """Brings the recorded passes to the host: the one call that waits for the device.

    Args:
        load: the state, with all its shards.
        all_processes: in a program of several processes, whether the shards of all of them are summed: every
            process must make the call, and gets the same. Otherwise each gets those that it can address, and
            with `local_experts` zeros for the experts of the others.

    Returns:
        `LoadRecord` of NumPy arrays, int64 sums over the shards; the state stays as it is.

    Raises:
        TypeError: all_processes is no bool, or the state is traced: the call stands in a jitted function.
        ValueError: recording is compiled out, or the shards recorded different passes.

    Example:
        >>> load = init_expert_load("stat", num_layers=1, num_physical_experts=3,
        ...                         num_logical_experts=2, recording=True)
        >>> load = record_expert_load(load, None, jnp.array([[5, 6, 7]]),
        ...                           physical_to_logical_map=jnp.array([[0, 1, 0]]))
        >>> record = collect_expert_load(load)
        >>> record.physical_count.tolist(), record.logical_count.tolist()
        ([[[5, 6, 7]]], [[[12, 6]]])
    """
    fork.check("collect_expert_load")
    _check_state("collect_expert_load", load)
    layout = _layout_of("collect_expert_load", load)
    remedy = "Pass True in every process, or in none."
    if checks.check_bool("collect_expert_load", "all_processes", all_processes, remedy):
        ring, control = _of_all_processes((load.ring, load.control))
        return read_rows(ring, control, layout)
    numbers = _numbers(load.control)
    return read_rows(_on_host(load.ring), _on_host(load.control), layout, numbers)


def _layout_of(function: str, load: ExpertLoad) -> Layout:
    """The layout of the ring, which a state without a recording mode has not.

    Raises:
        TypeError: the state is one that jit traces.   ValueError: it has no mode.
    """
    if load.layout is None:
        rule, remedy = "have a recording mode", "Make the state with a mode."
        raise ValueError(checks.message(function, "load", rule, None, remedy))
    if isinstance(load.control, jax.core.Tracer):
        rule, got = "have values on its devices", "a state that jit traces"
        remedy = "Return the state from the step, and call it outside."
        raise TypeError(checks.message(function, "load", rule, got, remedy))
    return load.layout


def last_physical_counts(load: ExpertLoad, most: int) -> tuple[int, np.ndarray]:
    """The part of the ring that metrics need: headers and the counts of the last passes, without maps.

    The rows are gathered on their devices, as many as the next power of two, so that a ring that fills
    compiles few programs; each process does this for its own shards alone.

    Returns:
        N, the passes recorded, and `[min(N, most), L, Ep]` int64, oldest first, summed over the shards.
    """
    fork.check("metrics")
    layout = _layout_of("metrics", load)
    parts, numbers = _parts(load.ring).values(), _numbers(load.control)
    headers = np.concatenate([np.asarray(_headers(part, layout)) for part in parts])
    slots = used_rows(headers, _on_host(load.control))
    last = slots[-most:]
    room = min(1 << max(len(last) - 1, 0).bit_length(), layout.num_passes)
    padded = np.full(
        room, layout.num_passes, np.int32
    )  # the spare row, for passes that were not recorded
    padded[: len(last)] = last
    bodies = [_bodies(part, padded, layout) for part in parts]
    body = np.concatenate([np.asarray(x) for x in bodies])[:, : len(last)]
    return len(slots), physical_counts(np.moveaxis(body, 0, 1), layout, numbers)


@functools.partial(jax.jit, static_argnames="layout")
def _headers(ring: jax.Array, layout: Layout) -> jax.Array:
    return ring.reshape(-1, layout.num_passes + 1, layout.row)[:, : layout.num_passes, :HEADER]


@functools.partial(jax.jit, static_argnames="layout")
def _bodies(ring: jax.Array, slots: jax.Array, layout: Layout) -> jax.Array:
    """`[S, n, L, width]` counts (or ids) of the rows `slots` `[n]`."""
    rows = ring.reshape(-1, layout.num_passes + 1, layout.row)
    body = rows[:, slots, HEADER : HEADER + layout.num_layers * layout.width]
    return body.reshape(*body.shape[:2], layout.num_layers, layout.width)


def _on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        return np.asarray(jax.device_get(array))
    return np.concatenate([np.asarray(part) for part in _parts(array).values()])


def _of_all_processes(arrays: Any) -> Any:
    """Whole, on the host: the shards of one array over all processes, or each process's own, in order."""
    if jax.process_count() == 1:
        return jax.tree.map(_on_host, arrays)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(arrays, tiled=True)


def _parts(array: jax.Array | np.ndarray) -> dict[int, Any]:
    """The shards that this process holds, each on its device, by their first row, in order.

    Of a state that was copied to the host (`jax.device_get`, a checkpoint), all of it.
    """
    if isinstance(array, np.ndarray):
        return {0: array}
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return {start: parts[start] for start in sorted(parts)}


def _numbers(control: jax.Array) -> list[int]:
    """Which of all shards this process holds: of each its row of `control`."""
    return [start + k for start, part in _parts(control).items() for k in range(len(part))]


def _commit(
    function: str, load: ExpertLoad, parts: Any, physical_to_logical_map: Any, forward_pass_id: Any
) -> ExpertLoad:
    """One row from the layers' parts (None: nothing recorded), one update of the ring."""
    layout = load.layout
    if layout is None:
        return load
    if load.control.shape[0] != 1:
        rule, got = "be one shard's part", f"all {load.control.shape[0]} shards"
        remedy = "Record inside shard_map, with PartitionSpec of the expert-parallel axis."
        raise ValueError(checks.message(function, "load", rule, got, remedy))
    with jax.named_scope("record_expert_load"):
        if layout.mode == "per_token":
            body, tokens = _token_rows(function, parts, layout)
        else:
            body, tokens = _count_rows(parts, layout), 0
        own = forward_pass_id is None
        epoch, word = load.control[0, 0], load.control[0, 1]
        counted = lax.shift_right_logical(word, _I32(1))
        sequence = counted if own else arguments.pass_id(function, forward_pass_id)
        recording = word & 1
        header = jnp.stack([sequence, epoch, _I32(tokens), _I32(0)])
        row = [header, *body]
        if layout.has_map:
            row.append(arguments.check_map(function, physical_to_logical_map, layout).reshape(-1))
        slot = lax.rem(lax.convert_element_type(sequence, jnp.uint32), np.uint32(layout.num_passes))
        slot = jnp.where(recording != 0, lax.convert_element_type(slot, _I32), layout.num_passes)
        ring = lax.dynamic_update_slice(
            load.ring, jnp.concatenate(row)[None], (slot.astype(_I32), _I32(0))
        )
        control = load.control
        if own:
            # Written after the ring has read it: otherwise XLA copies the donated array first.
            ring, control = lax.optimization_barrier((ring, control))
            control = control + 2 * (control & np.array([[0, 1]], np.int32))
    return dataclasses.replace(load, ring=ring, control=control)


def _added(before: jax.Array, part: jax.Array) -> jax.Array:
    """Their sum, negative counts taken as zero before, and at most what int32 holds."""
    total = jnp.maximum(before, 0) + jnp.maximum(part, 0)
    return jnp.where(total < 0, INT32_MAX, total)  # a sum of two wraps once


def _count_rows(parts: Any, layout: Layout) -> list[Any]:
    if not isinstance(parts, list):
        return [jnp.maximum(parts, 0).reshape(-1)]
    zeros = jnp.zeros(layout.width, _I32)
    return [zeros if part is None else jnp.maximum(part, 0) for part in parts]


def _token_rows(function: str, parts: Any, layout: Layout) -> tuple[list[Any], int]:
    """Every layer's ids, padded with -1 to `max_tokens`, and the tokens of the longest layer."""
    rows, most = [], 0
    for ids in parts:
        tokens = 0 if ids is None else ids.shape[0]
        if tokens > layout.max_tokens:
            rule = f"have at most max_tokens = {layout.max_tokens} rows"
            raise ValueError(
                checks.message(function, "topk_ids", rule, tokens, "Make the state larger.")
            )
        most = max(most, tokens)
        missing = (layout.max_tokens - tokens) * layout.top_k
        if ids is not None:
            valid = (ids >= 0) & (ids < layout.num_physical_experts)
            rows.append(jnp.where(valid, ids, -1).reshape(-1))
        if missing:
            rows.append(jnp.full(missing, -1, _I32))
    return rows, most
