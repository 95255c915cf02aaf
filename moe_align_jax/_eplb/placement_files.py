"""Placements of experts in the files of several engines: read, told apart and written. NumPy on the host.

"sglang": JSON with `physical_to_logical_map` alone, which SGLang's `--init-expert-location` takes.
"vllm-ascend": `expert_map.json`, the experts of each device of each layer.
"tensorrt-llm": YAML of the load balancer, with `num_slots` and `initial_global_assignments`.
"""

import json
import os
from typing import Any, Literal, NamedTuple

import numpy as np

from moe_align_jax._core import checks, files
from moe_align_jax._core.checks import fail
from moe_align_jax._eplb import loads
from moe_align_jax._eplb.maps import as_array

Format = Literal["sglang", "vllm-ascend", "tensorrt-llm"]
# The name that each format is known by, in the same order.
NAMES = ("physical_to_logical_map", "layer_list", "initial_global_assignments")

# A map of 100 layers and 10,000 slots is 5 MB of YAML.
_MOST_YAML_BYTES = 64 * 2**20
_REMEDY = (
    "Pass a placement: JSON with physical_to_logical_map, vllm-ascend's expert_map.json, or the YAML of "
    "TensorRT-LLM's load balancer."
)


class FoundPlacement(NamedTuple):
    """A placement of a file: the map `[L, Ep]`, layers in ascending order, and the GPUs if it tells them."""

    slots: np.ndarray
    num_gpus: int | None = None


def read(path: str | os.PathLike[str], *, function: str) -> dict[str, Any]:
    """The contents of a placement's file: YAML by its name's ending, a recorder's table, else whatever
    `read_file` reads.

    Raises:
        OSError: the file cannot be read.   ImportError: YAML needs pyyaml, and tables pyarrow.
        ValueError: it is damaged, or a pipe.
    """
    name = os.fspath(path)
    if not name.lower().endswith((".yaml", ".yml")):
        from moe_align_jax._expert_load.files import read_dump

        return read_dump(path, function=function)
    try:
        import yaml
    except ImportError:
        raise ImportError(
            f"{function}: reading {name!r} needs pyyaml: pip install 'moe-align-jax[yaml]' "
            "(in a checkout: pip install -e '.[yaml]')"
        ) from None
    files.check_is_no_pipe(name, function=function)
    with open(name, "rb") as file:
        data = file.read(_MOST_YAML_BYTES + 1)
    try:
        if len(data) > _MOST_YAML_BYTES:
            raise ValueError(f"it is larger than {_MOST_YAML_BYTES} bytes")
        value = yaml.safe_load(data)
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, not a mapping")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            checks.message(function, "file", "be readable", f"{name!r} ({reason})", _REMEDY)
        ) from error
    return value


def find(contents: dict[str, Any], *, function: str) -> FoundPlacement | None:
    """The placement in the contents of a file, of whichever format; None if there is none.

    Raises:
        ValueError: it is of a format, but breaks its rules.
    """
    if "layer_list" in contents:
        return _from_vllm_ascend(contents, function)
    if "initial_global_assignments" in contents:
        return _from_tensorrt_llm(contents, function)
    slots = loads.map_in_force(contents)
    if slots is None and NAMES[0] in contents:  # of YAML, or no array
        value, remedy = contents[NAMES[0]], "Pass the expert of each slot, [layers, slots]."
        slots = as_array(function, NAMES[0], value, remedy)
        if slots.dtype.kind not in "iu" or slots.ndim != 2 or slots.size == 0:
            rule = "be integers, [layers, slots]"
            fail(function, NAMES[0], rule, checks.describe(slots), remedy)
    return None if slots is None else FoundPlacement(slots)


def to_text(slots: np.ndarray, num_gpus: int, file_format: Format, first_layer: int = 0) -> str:
    """A file's text.

    Args:
        slots: `[L, Ep]` integers, the physical_to_logical_map.
        num_gpus: a divisor of Ep.
        file_format: the format.
        first_layer: the number of the first layer, where the format numbers them.
    """
    if file_format == "sglang":
        return json.dumps({"physical_to_logical_map": slots.tolist()}) + "\n"
    if file_format == "vllm-ascend":
        layers = []
        for layer, row in enumerate(slots, start=first_layer):
            parts = row.reshape(num_gpus, -1).tolist()
            devices = [
                {"device_id": device, "device_expert": part} for device, part in enumerate(parts)
            ]
            layers.append({"layer_id": layer, "device_count": num_gpus, "device_list": devices})
        return json.dumps({"moe_layer_count": len(slots), "layer_list": layers}) + "\n"
    # Of plain integers alone, so that nothing needs quotes, and pyyaml is not needed to write it.
    lines = [f"num_slots: {slots.shape[1]}", "initial_global_assignments:"]
    lines += [f"  {layer}: {row}" for layer, row in enumerate(slots.tolist(), start=first_layer)]
    return "\n".join([*lines, "layer_updates_per_iter: 0"]) + "\n"


def _from_vllm_ascend(contents: dict[str, Any], function: str) -> FoundPlacement:
    layers = contents["layer_list"]
    rows: dict[int, list[list[int]]] = {}
    argument = "layer_list"
    if not isinstance(layers, list) or not all(isinstance(each, dict) for each in layers):
        fail(function, argument, "be a list of layers", type(layers).__name__, _REMEDY)
    for each in layers:
        layer = _whole(function, "layer_id", each.get("layer_id"))
        argument = f"device_list of layer {layer}"
        devices = each.get("device_list")
        if not isinstance(devices, list) or not all(isinstance(d, dict) for d in devices):
            fail(function, argument, "be a list of devices", type(devices).__name__, _REMEDY)
        held: dict[int, list[int]] = {}
        for device in devices:
            number = _whole(function, "device_id", device.get("device_id"))
            if number in held:
                fail(function, argument, "hold each device once", f"{number} twice", _REMEDY)
            name = f"device_expert of device {number} in layer {layer}"
            held[number] = _experts(function, name, device.get("device_expert"))
        if sorted(held) != list(range(len(held))) or not held:
            fail(function, argument, "number its devices from 0", sorted(held), _REMEDY)
        count = each.get("device_count", len(held))
        if count != len(held):
            rule = f"hold device_count ({count}) devices"
            fail(function, argument, rule, len(held), _REMEDY)
        if layer in rows:
            fail(function, "layer_list", "hold each layer once", f"{layer} twice", _REMEDY)
        rows[layer] = [held[number] for number in range(len(held))]
    count = contents.get("moe_layer_count", len(rows))
    if count != len(rows) or not rows:
        rule = f"hold moe_layer_count ({count}) layers, at least one"
        fail(function, "layer_list", rule, len(rows), _REMEDY)
    sizes = {(len(row), *map(len, row)) for row in rows.values()}
    per_device = {len(part) for row in rows.values() for part in row}
    if len(sizes) > 1 or len(per_device) > 1:
        rule = "hold as many devices in each layer, and experts on each device"
        fail(function, "layer_list", rule, sorted(sizes), _REMEDY)
    slots = np.array([sum(rows[layer], []) for layer in sorted(rows)], np.int64)
    return FoundPlacement(slots, len(rows[min(rows)]))


def _from_tensorrt_llm(contents: dict[str, Any], function: str) -> FoundPlacement:
    argument = "initial_global_assignments"
    given = contents[argument]
    if not isinstance(given, dict) or not given:
        fail(function, argument, "map layers to experts", type(given).__name__, _REMEDY)
    rows: dict[int, list[int]] = {}
    for key, experts in given.items():
        layer = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        layer = _whole(function, f"a layer of {argument}", layer)
        if layer in rows:
            fail(function, argument, "hold each layer once", f"{layer} twice", _REMEDY)
        rows[layer] = _experts(function, f"{argument} of layer {layer}", experts)
    sizes = sorted({len(row) for row in rows.values()})
    num_slots = contents.get("num_slots", sizes[0])
    if sizes != [num_slots]:
        rule = f"name the expert of each of num_slots ({num_slots}) slots"
        fail(function, argument, rule, f"{sizes} experts", _REMEDY)
    return FoundPlacement(np.array([rows[layer] for layer in sorted(rows)], np.int64))


def _whole(function: str, argument: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        fail(function, argument, "be an integer of at least 0", checks.shown(value), _REMEDY)
    return value


def _experts(function: str, argument: str, value: Any) -> list[int]:
    """The experts of consecutive slots; -1 where one holds nothing."""
    # JSON's lists of numbers arrive as arrays, where they are not within a list of layers.
    if isinstance(value, np.ndarray):
        value = value.tolist()
    good = isinstance(value, list) and all(
        isinstance(each, int) and not isinstance(each, bool) and -1 <= each < 2**31
        for each in value
    )
    if not good or not value:
        got = checks.describe(value)
        fail(function, argument, "be a list of experts", got, _REMEDY)
    return value
