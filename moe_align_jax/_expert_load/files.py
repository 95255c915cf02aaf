"""Dumps on disk: written whole or not at all, as .npz or (extra "arrow") as an Arrow or Parquet table."""

import contextlib
import errno
import json
import os
import secrets
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe_align_jax._core import checks
from moe_align_jax._core.files import check_is_no_pipe, is_pipe, is_table, read_file

FORMATS = ("npz", "arrow", "parquet")
# Arrays with a row per (pass, layer): a table's columns. Everything else goes into its metadata.
_COLUMNS = ("logical_count", "physical_count", "topk_ids")
_METADATA = b"moe_align_jax"
_CHECKSUM = b"moe_align_jax_crc32"  # of the columns and of the metadata: Arrow has none of its own


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], Any]) -> Path:
    """Writes through a temporary file in the same folder, synced and then renamed.

    Whenever the process or the machine stops, `path` is the old file or the new one. Where it is a link, the
    file that it leads to is written, and the link stays.

    Raises:
        OSError: the disk is full, or cannot be written; `path` is as it was, and nothing is left over. It is
            a pipe or a device, in whose place a file must not come; or a folder.
    """
    path = Path(path)
    name = None
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and is_pipe(target):
            raise OSError(errno.EINVAL, "no regular file")
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.parent / f".{target.name}.{secrets.token_hex(8)}"
        # With the mode of any new file. To read the umask is to set it, for all threads, and two that do so
        # at once may leave it at 0.
        handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        name = new
        with open(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException as error:
        if name is not None:
            name.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                error.errno, f"{error.strerror or error} while writing", str(path)
            ) from error
        raise
    # The new name itself. The file is there, also in a folder that may not be read or cannot be synced.
    with contextlib.suppress(OSError):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return path


def check_format(file_format: str) -> None:
    """Raises ImportError where the format's extra is missing: at once, not when hours were recorded."""
    if file_format != "npz":
        rule, got = "be one whose extra is installed", f"{file_format!r} without pyarrow"
        _pyarrow("ExpertDistributionRecorder", "file_format", rule, got)


def write_dump(path: str | os.PathLike[str], dump: dict[str, Any], file_format: str) -> Path:
    """One dump as a file; None values are left out, counts are stored as int32 where all of them fit."""
    dump = {name: _narrow(value) for name, value in dump.items() if value is not None}
    if file_format == "npz":
        return write_atomically(path, lambda file: np.savez(file, **dump))
    return write_atomically(path, lambda file: _write_table(file, dump, file_format))


def _narrow(value: Any) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype != np.int64 or value.ndim < 2:
        return value
    limits = np.iinfo(np.int32)
    fits = not value.size or (value.min() >= limits.min and value.max() <= limits.max)
    return value.astype(np.int32) if fits else value


def _pyarrow(function: str, argument: str, rule: str, got: str) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        remedy = (
            "Install the extra: pip install 'moe-align-jax[arrow]' (in a checkout: "
            "pip install -e '.[arrow]')."
        )
        raise ImportError(checks.message(function, argument, rule, got, remedy)) from error
    return pyarrow


def _write_table(file: BinaryIO, dump: dict[str, Any], file_format: str) -> None:
    """A row per (pass, layer): forward_pass_id, layer, and a list column per array of counts."""
    arrow = _pyarrow("dump_record", "file_format", "be one whose extra is installed", file_format)
    passes, layers = dump["logical_count"].shape[:2]
    columns = {
        "forward_pass_id": arrow.array(np.repeat(dump["forward_pass_id"], layers)),
        "layer": arrow.array(np.tile(np.arange(layers, dtype=np.int32), passes)),
    }
    shapes = {}
    for name in _COLUMNS:
        if name not in dump:
            continue
        value = dump[name]
        if name == "topk_ids":  # [N, S, L, tokens, k]: the layer first
            value = np.moveaxis(value, 2, 1)
        shapes[name] = value.shape
        width = int(np.prod(value.shape[2:]))
        columns[name] = arrow.FixedSizeListArray.from_arrays(
            arrow.array(np.ascontiguousarray(value).reshape(-1)), width
        )
    rest = {
        name: {"dtype": str(value.dtype), "shape": value.shape, "values": value.ravel().tolist()}
        if isinstance(value, np.ndarray)
        else value
        for name, value in dump.items()
        if name not in columns
    }
    text = json.dumps({"shapes": shapes, "rest": rest}).encode()
    table = arrow.table(columns)
    checksum = str(_checksum(table, text)).encode()
    table = table.replace_schema_metadata({_METADATA: text, _CHECKSUM: checksum})
    if file_format == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, file)
    else:
        with arrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)


def _checksum(table: Any, text: bytes) -> int:
    """CRC-32 of the metadata, and of every column's name, rows, dtype and values."""
    total = zlib.crc32(text)
    for name in table.column_names:
        values = _flat(table[name])
        head = f"{name} {len(table[name])} {values.dtype} {len(values)};"
        total = zlib.crc32(head.encode(), total)
        total = zlib.crc32(np.ascontiguousarray(values).view(np.uint8), total)
    return total


def _flat(column: Any) -> np.ndarray:
    """The values of a column, of its lists one after another."""
    column = column.combine_chunks()
    if hasattr(column.type, "list_size"):
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False)


def read_dump(path: str | os.PathLike[str], *, function: str) -> dict[str, Any]:
    """The contents of a dump of any format: of a table as `read_table`, else as `read_file`."""
    if is_table(path, function=function):
        return read_table(path)
    return read_file(path, function=function)


def read_table(path: str | os.PathLike[str]) -> dict[str, Any]:
    """An Arrow or Parquet dump as the dict that was dumped, of NumPy arrays.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged (its checksum says so), a pipe, or no dump of ours.
        ImportError: the extra "arrow" is missing; the message names the file.
    """
    got = f"{os.fspath(path)!r}, a table, without pyarrow"
    arrow = _pyarrow("read_table", "file", "be of a kind whose extra is installed", got)
    check_is_no_pipe(path, function="read_table")
    with open(path, "rb") as file:
        data = file.read()
    try:
        source = arrow.BufferReader(data)
        if data[:4] == b"PAR1":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(source)
        else:
            table = arrow.ipc.open_file(source).read_all()
        metadata = table.schema.metadata or {}
        if metadata[_CHECKSUM] != str(_checksum(table, metadata[_METADATA])).encode():
            raise ValueError("its checksum is another")
        facts = json.loads(metadata[_METADATA])
        dump = {}
        for name, shape in facts["shapes"].items():
            value = _flat(table[name]).reshape(shape)
            dump[name] = np.moveaxis(value, 1, 2) if name == "topk_ids" else value
        for name, value in facts["rest"].items():
            if isinstance(value, dict):
                value = np.array(value["values"], value["dtype"]).reshape(value["shape"])
            dump[name] = value
        layers = max(facts["shapes"]["logical_count"][1], 1)
        dump["forward_pass_id"] = table["forward_pass_id"].to_numpy()[::layers]
        return dump
    # A damaged file fails anywhere in pyarrow or json, with nearly any exception.
    except Exception as error:
        raise ValueError(
            f"read_table: file must be an Arrow or Parquet dump; got {os.fspath(path)!r} "
            f"({type(error).__name__}: {error}). Pass a file that the recorder wrote."
        ) from error
