"""Expert loads and placements in the files that recorders write: ours and SGLang's. NumPy on the host."""

from typing import Any

import numpy as np

from moe_align_jax import _checks
from moe_align_jax._eplb.maps import fail

_REMEDY = (
    "Pass a recorder's dump (logical_count), or a placement (physical_to_logical_map), such as "
    "`moe-align eplb` writes."
)


def map_in_force(contents: dict[str, Any]) -> np.ndarray | None:
    """The physical_to_logical_map `[L, Ep]` of a file, the last one where it has one per pass; or None."""
    for name in ("physical_to_logical_map", "last_physical_to_logical_map"):
        value = contents.get(name)
        if isinstance(value, np.ndarray) and value.size:
            return value[-1] if value.ndim == 3 else value
    return None


def recorded_load(contents: dict[str, Any], *, function: str) -> np.ndarray:
    """The tokens per expert of a recording, step by step.

    Args:
        contents: of the file: `logical_count` `[L, El]` or `[S, L, El]`; or `physical_count` `[S, L, Ep]` or
            SGLang's `records` (one dict per pass and rank with `global_physical_count` or
            `topk_ids_of_layer`), with the map that leads from slots to experts.
        function: the caller's name, for error messages.

    Returns:
        `[S, L, El]`, S >= 1, integer or floating, >= 0 and finite.

    Raises:
        TypeError: loads are not numbers.   ValueError: there are none, or not of one shape.
    """
    name = next((n for n in ("logical_count", "physical_count") if n in contents), None)
    if name is not None:
        load = contents[name]
    elif isinstance(contents.get("records"), list) and contents["records"]:
        name, load = "physical_count", _sum_of_records(contents, function)
    else:
        got = ", ".join(sorted(contents)) or "nothing"
        fail(function, "file", "hold logical_count", got, _REMEDY)
    load = _check_load(function, name, load)
    if name == "logical_count":
        return load
    return _to_logical(load, map_in_force(contents), function)


def _check_load(function: str, name: str, load: Any) -> np.ndarray:
    if not isinstance(load, np.ndarray) or load.dtype.kind not in "iuf":
        got = _checks.describe(load)
        raise TypeError(_checks.message(function, name, "be numbers", got, _REMEDY))
    load = load[None] if load.ndim == 2 else load
    if load.ndim != 3 or 0 in load.shape:
        fail(function, name, "have shape [L, experts] or [S, L, experts]", load.shape, _REMEDY)
    if not (np.isfinite(load).all() and load.min() >= 0):
        fail(function, name, "be finite and at least 0", load.min(), _REMEDY)
    return load


def _to_logical(physical: np.ndarray, slots: np.ndarray | None, function: str) -> np.ndarray:
    argument = "physical_to_logical_map"
    if slots is None:
        fail(function, argument, "come with physical counts", "none", _REMEDY)
    good = slots.dtype.kind in "iu" and slots.shape == physical.shape[1:] and slots.min() >= 0
    if not good or slots.max() >= slots.shape[1]:
        rule = f"be experts of shape {list(physical.shape[1:])}"
        fail(function, argument, rule, _checks.describe(slots), _REMEDY)
    logical = np.zeros((*physical.shape[:2], int(slots.max()) + 1), physical.dtype)
    steps, layers = (np.arange(n) for n in physical.shape[:2])
    np.add.at(logical, (steps[:, None, None], layers[:, None], slots[None]), physical)
    return logical


def _sum_of_records(contents: dict[str, Any], function: str) -> np.ndarray:
    """`[S, L, Ep]` from SGLang's records: one per forward pass and rank, ranks summed."""
    slots = map_in_force(contents)
    passes: dict[Any, np.ndarray] = {}
    for number, record in enumerate(contents["records"]):
        count = None
        if isinstance(record, dict):
            count = record.get("global_physical_count")
            ids = record.get("topk_ids_of_layer")
            if count is None and isinstance(ids, np.ndarray) and slots is not None:
                count = _count_ids(ids, slots.shape[-1])
        if not isinstance(count, np.ndarray) or count.ndim != 2 or count.dtype.kind not in "iuf":
            rule = "hold global_physical_count or topk_ids_of_layer"
            fail(function, f"records[{number}]", rule, type(record).__name__, _REMEDY)
        key = record.get("forward_pass_id", number)
        key = key if isinstance(key, (int, str)) else number
        if key in passes and passes[key].shape != count.shape:
            rule = f"count {list(passes[key].shape)}"
            fail(function, f"records[{number}]", rule, list(count.shape), _REMEDY)
        passes[key] = passes[key] + count if key in passes else count
    shapes = {count.shape for count in passes.values()}
    if len(shapes) > 1:
        fail(function, "records", "have one shape", sorted(shapes), _REMEDY)
    return np.stack(list(passes.values()))


def _count_ids(ids: np.ndarray, num_slots: int) -> np.ndarray | None:
    """`[L, Ep]` from ids `[L, T, K]`; ids out of range are padding."""
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        return None
    flat = ids.reshape(len(ids), -1)
    layer = np.broadcast_to(np.arange(len(ids))[:, None], flat.shape)
    kept = (flat >= 0) & (flat < num_slots)
    at = layer[kept] * num_slots + flat[kept].astype(np.int64)
    return np.bincount(at, minlength=len(ids) * num_slots).reshape(len(ids), num_slots)
