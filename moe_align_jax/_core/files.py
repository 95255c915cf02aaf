"""Reads named arrays from .json, .npz and PyTorch's .pt files, without torch. Imports no jax.

A file may come from anywhere: nothing in it is run, and whatever is wrong with it is one ValueError that
names the file. npz and pt are both zip archives; they are told apart by what they hold, not by name.
"""

import collections
import contextlib
import io
import json
import math
import os
import pickle
import stat
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_align_jax._core import checks

# Room for a ring of a thousand passes of 61 layers x 288 experts, many times over; less than a zip bomb.
MAX_BYTES = 8 * 2**30
# What all tensors of a .pt may hold together, beyond four times its own data: views may share a storage, and
# one element may be expanded to any size.
MAX_EXPANSION = 2**28
_MAX_DIMENSIONS = 32
_REMEDY = (
    "Pass a .json, .npz or .pt file of named arrays, as a recorder or `moe-align eplb` writes."
)


def read_file(path: str | os.PathLike[str], *, function: str = "read_file") -> dict[str, Any]:
    """The named contents of a .json, .npz or .pt file.

    Args:
        path: the file. Its kind is read from its contents.
        function: the caller's name, for error messages.

    Returns:
        A dict. Tensors, and (nested) lists of numbers in JSON, are NumPy arrays; bfloat16 is widened to
        float32. Strings, plain numbers and lists of dicts stay what they are.

    Raises:
        OSError: the file cannot be opened or read.
        ValueError: it is damaged, a pipe, of another kind, or holds something other than plain data.
    """
    name = os.fspath(path)
    check_is_no_pipe(name, function=function)
    with open(name, "rb") as file:
        start = file.read(4)
        file.seek(0)
        try:
            if start[:2] == b"PK":
                with zipfile.ZipFile(file) as archive:
                    return _read_zip(archive)
            if not start:
                raise ValueError("it is empty")
            return _read_json(file.read(MAX_BYTES))
        # A damaged file can fail anywhere in zipfile, zlib, pickle, json or NumPy's header parser, with
        # nearly any exception: this is the boundary at which all of them mean the same.
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise ValueError(
                checks.message(function, "file", "be readable", f"{name!r} ({reason})", _REMEDY)
            ) from error


def is_pipe(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a pipe or a device, neither a file nor a folder.

    Raises:
        OSError: there is no such file.
    """
    mode = os.stat(path).st_mode
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def check_is_no_pipe(path: str | os.PathLike[str], *, function: str) -> None:
    """Refuses what gives its bytes once, such as bash's `<(command)`: files are opened more than once.

    Raises:
        OSError: there is no such file.   ValueError: it is a pipe or a device.
    """
    if is_pipe(path):
        got, remedy = f"{os.fspath(path)!r}, a pipe or a device", "Write it to a file first."
        raise ValueError(checks.message(function, "file", "be a regular file", got, remedy))


def is_table(path: str | os.PathLike[str], *, function: str) -> bool:
    """Whether a file is one of Arrow or Parquet, which `_expert_load.files.read_table` reads.

    Raises:
        OSError, ValueError: as `check_is_no_pipe`.
    """
    check_is_no_pipe(path, function=function)
    with open(path, "rb") as file:
        return file.read(6).startswith((b"PAR1", b"ARROW1"))


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An error about the contents of a file names the file, too."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name = os.fspath(path)
        if repr(name) in str(error):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{error} The file is {name!r}.") from error


def parse_json(text: str | bytes, *, function: str = "parse_json") -> dict[str, Any]:
    """The same from JSON text.

    Raises:
        ValueError: it is no JSON object of names.
    """
    try:
        return _read_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            checks.message(
                function, "text", "be a JSON object", f"{text[:40]!r}... ({error})", _REMEDY
            )
        ) from error


def _read_json(text: str | bytes) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"JSON holds a {type(value).__name__}, not an object of names")
    return {name: _listed(item) for name, item in value.items()}


def _listed(value: Any) -> Any:
    """A list of numbers, nested evenly, as an array; anything else unchanged."""
    if not isinstance(value, list):
        return value
    try:
        array = np.asarray(value)
    except ValueError:  # ragged
        return value
    # Integers beyond int64 make an object array, strings a string array: neither is numbers.
    return array if array.dtype.kind in "bif" else value


# -- zip archives -----------------------------------------------------------------------------------------


def _read_zip(archive: zipfile.ZipFile) -> dict[str, Any]:
    members = {info.filename: info for info in archive.infolist()}
    total = sum(info.file_size for info in members.values())
    if total > MAX_BYTES:
        raise ValueError(f"it unpacks to {total} bytes, more than {MAX_BYTES}")
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) == 1:
        return _read_torch(archive, pickles[0].removesuffix("data.pkl"), members)
    if members and all(name.endswith(".npy") for name in members):
        return {name[:-4]: _read_npy(archive.read(name)) for name in members}
    raise ValueError("the archive holds neither .npy arrays nor one data.pkl")


def _read_npy(data: bytes) -> np.ndarray:
    stream = io.BytesIO(data)
    major, _ = np.lib.format.read_magic(stream)
    if major not in (1, 2):
        raise ValueError(f".npy format {major} is not known")
    readers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = readers[major](stream)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects")
    if dtype.kind == "V" and dtype.itemsize in (1, 2) and dtype.names is None:
        raise ValueError(
            f"an array of {dtype}, as NumPy writes bfloat16 and float8: save it as float32"
        )
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"an array of {dtype} {list(shape)} does not fit its data")
    flat = np.frombuffer(data, dtype, count, stream.tell())
    array = flat.reshape(shape, order="F" if fortran else "C")
    return array.item() if array.ndim == 0 else array


# -- PyTorch's zip format ---------------------------------------------------------------------------------

_STORAGE_DTYPES = {
    **{"DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": "u2"},
    **{"LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1"},
    **{"ByteStorage": "u1", "BoolStorage": "?"},
}


class _Rebuild:
    """Stands for torch._utils._rebuild_tensor_v2 in an unpickler; makes arrays of `limit` bytes in all.

    No attribute of it can be set: files may try.
    """

    __slots__ = ("_left",)

    def __init__(self, limit: int = MAX_BYTES):
        object.__setattr__(self, "_left", [limit])

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)

    def __call__(
        self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any
    ) -> np.ndarray | float:
        if not isinstance(storage, np.ndarray):
            raise ValueError("a tensor without storage")
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or len(size) > _MAX_DIMENSIONS:
            raise ValueError("a tensor whose size and stride do not fit")
        if not all(type(n) is int and 0 <= n <= MAX_BYTES for n in numbers):
            raise ValueError("a tensor with an impossible size or stride")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        item = storage.itemsize
        if count and last >= storage.size:
            raise ValueError("a tensor that reaches beyond its storage")
        self._left[0] -= count * item
        if self._left[0] < 0:
            raise ValueError("its tensors expand to many times the data of the file")
        view = np.lib.stride_tricks.as_strided(
            storage[offset if count else 0 :],
            size if count else (*size,),
            [step * item for step in stride],
            writeable=False,
        )
        return np.ascontiguousarray(view).reshape(size)


class _StorageKind(str):
    """The name of a torch storage class."""

    __slots__ = ()


class _Unpickler(pickle.Unpickler):
    """Reads tensors and plain containers, and nothing else: no name in the file is ever imported."""

    def __init__(self, data: bytes, load_storage: Any, limit: int = MAX_BYTES):
        super().__init__(io.BytesIO(data))
        self._load_storage = load_storage
        self._known = {
            ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(limit),
            ("torch", "Size"): tuple,
            ("collections", "OrderedDict"): collections.OrderedDict,
            **{("torch", kind): _StorageKind(kind) for kind in _STORAGE_DTYPES},
        }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise ValueError(f"it holds {module}.{name}, which is no plain tensor") from None

    def persistent_load(self, pid: Any) -> np.ndarray:
        tag, kind, key, _, count = pid
        if tag != "storage" or not isinstance(kind, _StorageKind) or not isinstance(key, str):
            raise ValueError("a storage of an unknown kind")
        return self._load_storage(kind, key, count)


def _read_torch(
    archive: zipfile.ZipFile, folder: str, members: dict[str, zipfile.ZipInfo]
) -> dict[str, Any]:
    order = "<"
    if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") == b"big":
        order = ">"
    storages: dict[str, np.ndarray] = {}

    def load_storage(kind: _StorageKind, key: str, count: Any) -> np.ndarray:
        if key not in storages:
            dtype = np.dtype(_STORAGE_DTYPES[kind]).newbyteorder(order)
            flat = np.frombuffer(archive.read(f"{folder}data/{key}"), dtype)
            if flat.size != count:
                raise ValueError(f"storage {key} holds {flat.size} elements, not {count}")
            flat = flat.astype(dtype.newbyteorder("="), copy=False)
            if kind == "BFloat16Storage":
                flat = (flat.astype(np.uint32) << 16).view(np.float32)
            storages[key] = flat
        return storages[key]

    stored = sum(info.file_size for name, info in members.items() if name.startswith(folder))
    limit = min(MAX_BYTES, MAX_EXPANSION + 4 * stored)
    value = _Unpickler(archive.read(f"{folder}data.pkl"), load_storage, limit).load()
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not a dict of tensors")
    if not all(isinstance(name, str) for name in value):
        raise ValueError("its names are not strings")
    return dict(value)
