"""Expert loads and placements in the files that recorders write: ours and SGLang's. NumPy on the host."""

from typing import Any

import numpy as np

from moe_align_jax._core import checks
from moe_align_jax._core import files as _files
from moe_align_jax._core.checks import fail

_REMEDY = (
    "Pass a recorder's dump (logical_count), or a placement (physical_to_logical_map), such as "
    "`moe-align eplb` writes."
)

_SAME_RECORDING = "Several files must be those of the processes (ranks) of one recording."


def map_in_force(contents: dict[str, Any]) -> np.ndarray | None:
    """The physical_to_logical_map `[L, Ep]` of a file, the last one where it has one per pass; or None."""
    for name in ("physical_to_logical_map", "last_physical_to_logical_map"):
        value = contents.get(name)
        if isinstance(value, np.ndarray) and value.size:
            return value[-1] if value.ndim == 3 else value
    return None


def map_of_files(files: dict[str, dict[str, Any]], *, function: str) -> np.ndarray | None:
    """`map_in_force` of several files, which is one; None if no file has any.

    Raises:
        ValueError: they have different ones.
    """
    first, found = "", None
    for name, contents in files.items():
        slots = map_in_force(contents)
        if found is None:
            first, found = name, slots
        elif slots is not None and not np.array_equal(slots, found):
            rule = f"have the physical_to_logical_map of {first!r}"
            fail(function, name, rule, "another", _SAME_RECORDING)
    return found


def sum_of_files(
    files: dict[str, dict[str, Any]], *, function: str, remedy: str = _REMEDY
) -> np.ndarray:
    """`recorded_load` of the files that several processes wrote of one recording: their sum, pass by pass.

    Args:
        files: name and contents of each, at least one.
        function, remedy: the caller's name and advice, for error messages.

    Raises:
        TypeError, ValueError: as `recorded_load`; or the files are not of the same passes and experts.
    """
    (first, contents), *others = files.items()
    if not others:
        with _files.naming(first):
            return recorded_load(contents, function=function, remedy=remedy)
    _check_ranks(files, function)
    if all(isinstance(each.get("records"), list) for each in files.values()):
        # A record says which pass it is of: those of all files are as good as one file's.
        records = [record for each in files.values() for record in each["records"]]
        slots = map_of_files(files, function=function)
        merged = {"records": records, "last_physical_to_logical_map": slots}
        return recorded_load(merged, function=function, remedy=remedy)
    with _files.naming(first):
        total = widened(recorded_load(contents, function=function, remedy=remedy))
    passes = contents.get("forward_pass_id")
    for name, each in others:
        with _files.naming(name):
            load = widened(recorded_load(each, function=function, remedy=remedy))
        if load.shape != total.shape:
            rule = f"hold passes, layers and experts {list(total.shape)}, as {first!r}"
            fail(function, name, rule, list(load.shape), _SAME_RECORDING)
        ids = each.get("forward_pass_id")
        if ids is not None and passes is not None and not np.array_equal(ids, passes):
            fail(function, name, f"be of the passes of {first!r}", "others", _SAME_RECORDING)
        total = total + load
    return total


def _check_ranks(files: dict[str, dict[str, Any]], function: str) -> None:
    """No two files are of one rank; of records, no two of one rank and pass."""
    seen: dict[Any, str] = {}
    for name, contents in files.items():
        records = contents.get("records")
        parts = records if isinstance(records, list) else [contents]
        keys = {
            (record.get("forward_pass_id") if records is parts else None, record.get("rank"))
            for record in parts
            if isinstance(record, dict) and isinstance(record.get("rank"), int)
        }
        for key in keys:
            if seen.setdefault(key, name) != name:
                rule, got = f"be of another rank than {seen[key]!r}", f"rank {key[1]}"
                fail(function, name, rule, got, _SAME_RECORDING)


def widened(load: np.ndarray) -> np.ndarray:
    """Loads of which a million can be added up: int64, or float64 for floats and for what int64 might not
    hold then."""
    small = load.dtype.kind in "iu" and int(load.max(initial=0)) < 2**42
    return load.astype(np.int64 if small else np.float64)


def recorded_load(contents: dict[str, Any], *, function: str, remedy: str = _REMEDY) -> np.ndarray:
    """The tokens per expert of a recording, step by step.

    Args:
        contents: of the file: `logical_count` `[L, El]` or `[S, L, El]`; or `physical_count` `[S, L, Ep]` or
            SGLang's `records` (one dict per pass and rank with `global_physical_count` or
            `topk_ids_of_layer`), with the map that leads from slots to experts. Records of torch_bridge
            hold `global_logical_count`, too, by the map of their own pass: it is taken.
        function, remedy: the caller's name and advice, for error messages.

    Returns:
        `[S, L, El]`, S >= 1, integer or floating, >= 0 and finite.

    Raises:
        TypeError: loads are not numbers.   ValueError: there are none, or not of one shape.
    """
    name = next((n for n in ("logical_count", "physical_count") if n in contents), None)
    if name is not None:
        load = contents[name]
    elif isinstance(contents.get("records"), list) and contents["records"]:
        name, load = _sum_of_records(contents, function)
    else:
        got = ", ".join(sorted(contents)) or "nothing"
        fail(function, "file", "hold logical_count", got, remedy)
    load = _check_load(function, name, load, remedy)
    if name == "logical_count":
        return load
    return _to_logical(load, map_in_force(contents), function)


def _check_load(function: str, name: str, load: Any, remedy: str) -> np.ndarray:
    if not isinstance(load, np.ndarray) or load.dtype.kind not in "iuf":
        got = checks.describe(load)
        raise TypeError(checks.message(function, name, "be numbers", got, remedy))
    load = load[None] if load.ndim == 2 else load
    if load.ndim != 3 or 0 in load.shape:
        rule = "have shape [L, experts] or [S, L, experts]"
        fail(function, name, rule, list(load.shape), remedy)
    if not (np.isfinite(load).all() and load.min() >= 0):
        bad = load[~(np.isfinite(load) & (load >= 0))].flat[0]
        fail(function, name, "be finite and at least 0", bad, remedy)
    return load


def _to_logical(physical: np.ndarray, slots: np.ndarray | None, function: str) -> np.ndarray:
    argument = "physical_to_logical_map"
    if slots is None:
        fail(function, argument, "come with physical counts", "none", _REMEDY)
    good = slots.dtype.kind in "iu" and slots.shape == physical.shape[1:] and slots.min() >= 0
    if not good or slots.max() >= slots.shape[1]:
        rule = f"be experts of shape {list(physical.shape[1:])}"
        fail(function, argument, rule, checks.describe(slots), _REMEDY)
    physical = widened(physical)  # a slot's counts fit its dtype, those of an expert need not
    logical = np.zeros((*physical.shape[:2], int(slots.max()) + 1), physical.dtype)
    steps, layers = (np.arange(n) for n in physical.shape[:2])
    np.add.at(logical, (steps[:, None, None], layers[:, None], slots[None]), physical)
    return logical


def _sum_of_records(contents: dict[str, Any], function: str) -> tuple[str, np.ndarray]:
    """What is counted, and `[S, L, experts]` from SGLang's records: one per pass and rank, ranks summed."""
    logical = all(
        isinstance(record, dict) and isinstance(record.get("global_logical_count"), np.ndarray)
        for record in contents["records"]
    )
    slots = map_in_force(contents)
    passes: dict[Any, np.ndarray] = {}
    for number, record in enumerate(contents["records"]):
        count = None
        if isinstance(record, dict):
            count = record.get("global_logical_count" if logical else "global_physical_count")
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
        count = widened(count)
        passes[key] = passes[key] + count if key in passes else count
    shapes = {count.shape for count in passes.values()}
    if len(shapes) > 1:
        fail(function, "records", "have one shape", sorted(shapes), _REMEDY)
    return "logical_count" if logical else "physical_count", np.stack(list(passes.values()))


def _count_ids(ids: np.ndarray, num_slots: int) -> np.ndarray | None:
    """`[L, Ep]` from ids `[L, T, K]`; ids out of range are padding."""
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        return None
    flat = ids.reshape(len(ids), -1)
    layer = np.broadcast_to(np.arange(len(ids))[:, None], flat.shape)
    kept = (flat >= 0) & (flat < num_slots)
    at = layer[kept] * num_slots + flat[kept].astype(np.int64)
    return np.bincount(at, minlength=len(ids) * num_slots).reshape(len(ids), num_slots)
