"""Arrays of safetensors files by their names, e4m3 and bfloat16 among them, without a copy.

safetensors' own loaders for NumPy and JAX (0.8) know no float8: they raise AttributeError. The format: 8
bytes with the header's length, the header in JSON (`{name: {dtype, shape, data_offsets}}`), and the data,
row-major and little-endian.
"""

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moe_align_jax._core import checks

_FUNCTION = "from_safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    **{
        f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}")
        for kind in "IU"
        for size in (1, 2, 4, 8)
    },
    "BOOL": np.bool_,
}


def read(path: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays whose names begin with `prefix`, read from the file when they are used.

    Args:
        path: a file, or the folder of a checkpoint: its index says which file has which name; without one,
            all of its files are looked into.
        prefix: of the names.

    Raises:
        ValueError: there is no such file, or it is no safetensors file.
    """
    found: dict[str, np.ndarray] = {}
    for file in _files(Path(path), prefix):
        found |= _read_file(file, prefix)
    return found


def _files(path: Path, prefix: str) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / _INDEX
    if index.is_file():
        try:
            names = json.loads(index.read_text())["weight_map"]
            wanted = {file for name, file in names.items() if name.startswith(prefix)}
            outside = [file for file in wanted if Path(file).name != file]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            rule, remedy = f"have an index {_INDEX} with a weight_map", "Download the index again."
            checks.fail(_FUNCTION, "path", rule, f"{index}: {error!r}", remedy)
        if outside:
            rule = "have an index that names files of its own folder"
            checks.fail(
                _FUNCTION,
                "path",
                rule,
                repr(outside[0]),
                "Do not read a checkpoint that you do not trust.",
            )
        files = sorted(path / file for file in wanted)
    else:
        files = sorted(path.glob("*.safetensors"))
        if not files:
            rule, remedy = (
                "be a safetensors file, or a folder with some",
                "Download the checkpoint.",
            )
            checks.fail(_FUNCTION, "path", rule, path, remedy)
    if missing := [file for file in files if not file.is_file()]:
        rule, remedy = (
            f"hold {missing[0].name}, which its index names",
            "Download the whole checkpoint.",
        )
        checks.fail(_FUNCTION, "path", rule, path, remedy)
    return files


def _read_file(path: Path, prefix: str) -> dict[str, np.ndarray]:
    size, remedy = path.stat().st_size, "Download the file again."
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            checks.fail(
                _FUNCTION, "path", "be a safetensors file", f"{path} of {size} bytes", remedy
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            checks.fail(_FUNCTION, "path", "be a safetensors file", f"{path}: {error}", remedy)
    if not isinstance(header, dict):
        checks.fail(
            _FUNCTION,
            "path",
            "be a safetensors file",
            f"{path} with a header of {type(header)}",
            remedy,
        )
    found, data = (
        {},
        np.memmap(path, np.uint8, "r") if size > 8 + length else np.zeros(8 + length, np.uint8),
    )
    for name, entry in header.items():
        if name == "__metadata__" or not name.startswith(prefix):
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            sizes = [*shape, begin, end]
        except (TypeError, KeyError, ValueError):
            checks.fail(_FUNCTION, "path", f"describe {name}", f"{path}: {entry!r}", remedy)
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            rule = f"hold {name} in one of {', '.join(_DTYPES)}"
            checks.fail(_FUNCTION, "path", rule, f"{dtype!r}", "Convert the checkpoint.")
        fits = all(type(value) is int and value >= 0 for value in sizes)
        if not fits or end - begin != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
            checks.fail(_FUNCTION, "path", f"describe {name}", f"{path}: {entry!r}", remedy)
        if 8 + length + end > size:
            checks.fail(_FUNCTION, "path", f"hold all of {name}", f"{path} of {size} bytes", remedy)
        part = data[8 + length + begin : 8 + length + end]
        try:
            found[name] = part.view(_DTYPES[dtype]).reshape(shape)
        except (ValueError, TypeError, OverflowError):  # more axes, or longer ones, than NumPy has
            checks.fail(_FUNCTION, "path", f"describe {name}", f"{path}: {entry!r}", remedy)
    return found
