"""The maps between logical experts and physical slots, checked and turned round. NumPy on the host."""

from typing import Any

import numpy as np

from moe_align_jax._core import checks
from moe_align_jax._core.checks import fail


def as_array(function: str, argument: str, value: Any, remedy: str) -> np.ndarray:
    """`np.asarray`, with our own error for lists of different lengths, and for a mask that it would drop."""
    if isinstance(value, np.ma.MaskedArray):
        rule, got = "be an array without a mask", checks.describe(value)
        fail(function, argument, rule, got, "Fill it: array.filled(0).", TypeError)
    try:
        return np.asarray(value)
    except ValueError:
        rule = "be an array, or lists of one length"
        fail(function, argument, rule, "lists of different lengths", remedy)
    except (TypeError, RuntimeError):  # a traced value, or a tensor that NumPy cannot read
        rule, got = "be an array that NumPy can read", checks.describe(value)
        raise TypeError(checks.message(function, argument, rule, got, remedy)) from None


def check_layers(function: str, layer_ids: Any, num_layers: int) -> np.ndarray:
    """`[num_layers]` bool: whether each layer is in a list of layer numbers.

    Raises:
        TypeError: not integers (a mask of bools is none).   ValueError: a layer is out of range.
    """
    argument, remedy = "layer_ids", "Pass the numbers of the layers, such as [0, 2]."
    ids = as_array(function, argument, layer_ids, remedy).reshape(-1)
    # An object array could hold anything, and an empty list is an array of floats.
    if ids.dtype.kind not in "iu" and (ids.size or ids.dtype.kind == "b"):
        got = checks.describe(ids)
        raise TypeError(checks.message(function, argument, "be integers", got, remedy))
    if isinstance(layer_ids, (list, tuple)):
        for each in layer_ids:
            if isinstance(each, (bool, np.bool_)):  # NumPy makes integers of [True, 2]
                got = checks.describe(each)
                raise TypeError(checks.message(function, argument, "be integers", got, remedy))
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < num_layers:
        fail(function, argument, f"be layers in [0, {num_layers})", ids.tolist(), remedy)
    chosen = np.zeros(num_layers, bool)
    chosen[ids.astype(np.int64)] = True
    return chosen


def check_map(function: str, value: Any, num_logical: int | None = None) -> tuple[np.ndarray, int]:
    """(the map `[L, Ep]` int32, El) of a physical_to_logical_map in which no expert is missing.

    Args:
        function: the caller's name, for error messages.
        value: integers `[L, Ep]`.
        num_logical: El; None for one more than the greatest expert in the map.

    Raises:
        TypeError: not integers.   ValueError: a wrong shape, expert, or an expert without a slot.
    """
    argument, remedy = "physical_to_logical_map", "Pass the expert of each slot, [layers, slots]."
    array = as_array(function, argument, value, remedy)
    if array.dtype.kind not in "iu":
        got = checks.describe(array)
        raise TypeError(checks.message(function, argument, "be integers", got, remedy))
    if array.ndim != 2 or 0 in array.shape:
        fail(function, argument, "have shape [L, Ep]", list(array.shape), remedy)
    low, high = int(array.min()), int(array.max())
    if num_logical is None:
        num_logical = high + 1
    else:
        num_logical = checks.check_positive_int(
            function, "num_logical_experts", num_logical, "Pass a count, or None."
        )
    if low < 0 or high >= num_logical:
        fail(function, argument, f"hold experts in [0, {num_logical})", f"[{low}, {high}]", remedy)
    num_layers, num_slots = array.shape
    if num_logical > num_slots:
        got = f"{num_slots} slots"
        fail(function, argument, f"give each of {num_logical} experts a slot", got, remedy)
    present = np.zeros((num_layers, num_logical), bool)
    present[np.arange(num_layers)[:, None], array] = True
    if not present.all():
        layer, expert = (int(where[0]) for where in np.nonzero(~present))
        got = f"none for expert {expert} in layer {layer}"
        fail(function, argument, "give every expert a slot in every layer", got, remedy)
    return array.astype(np.int32), num_logical


def slots_of_experts(
    physical_to_logical: np.ndarray, num_logical: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """(slots `[L, El, width]` int32 ascending, then -1; number of replicas `[L, El]` int32)."""
    layers, num_slots = physical_to_logical.shape
    order = np.argsort(physical_to_logical, axis=1, kind="stable").astype(np.int32)
    expert = np.take_along_axis(physical_to_logical, order, axis=1)
    each = np.arange(layers)[:, None]
    count = np.zeros((layers, num_logical), np.int32)
    np.add.at(count, (each, physical_to_logical), 1)
    first = np.cumsum(count, axis=1) - count
    rank = np.arange(num_slots) - np.take_along_axis(first, expert, axis=1)
    slots = np.full((layers, num_logical, width), -1, np.int32)
    slots[each, expert, rank] = order
    return slots, count


def static_dispatch(
    physical_to_logical: np.ndarray, slots: np.ndarray, count: np.ndarray, num_gpus: int
) -> np.ndarray:
    """The one slot that each GPU sends the tokens of each expert to, `[L, D, El]` int32.

    A GPU with a replica uses its own, the first. The other GPUs take the replicas of expert i in layer l
    by turns, beginning with number `(l + i) % count`: they load any two replicas alike, to within one GPU.
    """
    layers, num_slots = physical_to_logical.shape
    num_logical = slots.shape[1]
    slot = np.arange(num_slots)
    nowhere = np.int32(num_slots)
    local = np.full((layers, num_gpus, num_logical), nowhere, np.int32)
    gpu = slot // (num_slots // num_gpus)
    where = (np.arange(layers)[:, None], gpu, physical_to_logical)
    np.minimum.at(local, where, np.broadcast_to(slot.astype(np.int32), physical_to_logical.shape))
    remote = local == nowhere
    begin = np.arange(layers)[:, None, None] + np.arange(num_logical)
    turn = (np.cumsum(remote, axis=1) - 1 + begin) % count[:, None, :]
    taken = np.take_along_axis(slots.transpose(0, 2, 1), turn, axis=1)
    return np.where(remote, taken, local).astype(np.int32)
