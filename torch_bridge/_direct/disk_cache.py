"""Compiled programs on disk, so that a later process neither imports jax nor compiles, but for PTX.

An entry is one file: magic, SHA-256 of the rest, length and text of a JSON header, and what is loaded of
each kernel: machine code, or PTX of one that moves registers (`driver.is_linked`). The driver assembles PTX
when a process loads it, and keeps the result in a cache of its own. Without that cache (CUDA_CACHE_DISABLE,
or a folder that it cannot write) each process assembles again: 0.13 to 0.15 s a kernel, in place of 0.3 to
0.5 ms (one H200, driver 580.159.04, host's clock, 2026-11-29).

An entry is keyed by everything that could change the machine code or its meaning, written under another
name and moved into place, and checked before use; what does not check is removed and made again. The folder
belongs to the user alone, and its size is bounded. Imports neither jax nor torch.

Only programs are kept, not the reasons why something could not be compiled: each process remembers those
for itself. A reason that holds for a whole machine (no compiler, an unknown jaxlib, a GPU that one process
owns) is found before jax is imported, in the time that a process and its CUDA context take to start. The
call then takes DLPack, which imports jax and starts jax's client on the GPU: that takes longer.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import stat
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

_MAGIC = b"moe-align module 1\n"
_MAX_BYTES = 256 << 20
# Of moe_align_jax: the folders that a program comes from, beside `types.py`.
_SOURCES = (
    *("_align", "_align/kernels", "_align/vllm", "_core", "_grouped_matmul", "_layout/kernels"),
    *("_lowering", "_masked_quant", "_moe_layer", "_router", "_simt"),
)


class Entry(NamedTuple):
    """A compiled program.

    Attributes:
        kernels: for each launch, the fields of `compile_worker.KernelLaunch`.
        between: name and shape of the buffers between its kernels.
        cubins: what is loaded of each launch: machine code, or PTX where that is better (`Driver.assemble`).
    """

    kernels: list[dict[str, Any]]
    between: dict[str, list[int]]
    cubins: list[bytes]


def folder() -> Path:
    """`TORCH_BRIDGE_CACHE_DIR`, or torch_bridge in the user's cache folder."""
    if given := os.environ.get("TORCH_BRIDGE_CACHE_DIR"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "torch_bridge"


@functools.cache
def source_digest() -> str:
    """Of all code and tables that the kernels and their launch come from, and the versions below them."""
    from moe_align_jax._align import tables

    folders = [folder for folder in tables.folders() if folder.is_dir()]
    files = [path for folder in folders for path in _files_in(folder, ".json")]
    return _digest_of(code_digest().encode(), files)


@functools.cache
def code_digest() -> str:
    """Of the code and the versions alone. `import torch_bridge` asks for it: the code is then what this
    process has imported, and the first call need not read 40 files."""
    import moe_align_jax

    start, here = moe_align_jax.__version__, Path(__file__).parent
    root = Path(moe_align_jax.__file__).parent
    files = [root / "types.py"]
    for name in _SOURCES:
        files += _files_in(root / name, ".py")
    for package in ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            start += f"\0{package} {importlib.metadata.version(package)}"
    own = [here / f"{name}.py" for name in ("compile_worker", "driver", "host_code", "selftest")]
    return _digest_of(start.encode(), [*files, *own])


def _files_in(folder: Path, ending: str) -> list[Path]:
    """In the order of their names. (Path.glob takes three times as long.)

    Raises:
        FileNotFoundError: there is no such folder. An empty answer would leave its files out of the key, and
            programs of older sources would be taken for today's.
    """
    return [folder / name for name in sorted(os.listdir(folder)) if name.endswith(ending)]


def _digest_of(start: bytes, files: list[Path]) -> str:
    digest = hashlib.sha256(start)
    for path in files:
        digest.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def key_of(problem: Any, gpu: str) -> str:
    """Key of a program: `gpu` names the card, its capability and the driver."""
    text = repr((type(problem).__name__, tuple(problem), gpu, source_digest()))
    return hashlib.sha256(text.encode()).hexdigest()


def _private_folder() -> Path | None:
    """The folder, made if need be; None (with a warning) where others could write into it."""
    try:
        path = folder()
        if not path.is_dir():
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = path.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        _warn(f"no compiled kernels are kept: {error}")
        return None
    if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o022:
        _warn(f"no compiled kernels are kept: others may write into {path}. chmod 700 it.")
        return None
    return path


@functools.cache
def _warn(text: str) -> None:
    warnings.warn(f"torch_bridge: {text}", stacklevel=3)


def _encode(key: str, entry: Entry) -> bytes:
    header = json.dumps(
        {
            "key": key,
            "kernels": entry.kernels,
            "between": entry.between,
            "sizes": [len(cubin) for cubin in entry.cubins],
        }
    ).encode()
    rest = len(header).to_bytes(8, "little") + header + b"".join(entry.cubins)
    return _MAGIC + hashlib.sha256(rest).digest() + rest


def _decode(key: str, data: bytes) -> Entry | None:
    start = len(_MAGIC) + 32
    rest = data[start:]
    if data[: len(_MAGIC)] != _MAGIC or data[len(_MAGIC) : start] != hashlib.sha256(rest).digest():
        return None
    end = 8 + int.from_bytes(rest[:8], "little")
    header = json.loads(rest[8:end])
    if header["key"] != key:
        return None
    cubins = []
    for size in header["sizes"]:
        cubins.append(rest[end : end + size])
        end += size
    return Entry(header["kernels"], header["between"], cubins)


def load(key: str) -> Entry | None:
    """The entry, or None: there is none, or it is damaged or another's (it is then removed)."""
    if (path := _private_folder()) is None:
        return None
    file = path / f"{key}.mod"
    try:
        data = file.read_bytes()
    except OSError:
        return None
    try:
        entry = _decode(key, data)
    except (ValueError, KeyError, TypeError):
        entry = None
    if entry is None:
        with contextlib.suppress(OSError):
            file.unlink()
    return entry


def holds(key: str) -> bool:
    """Whether there is a file for it; whether that is sound, `load` says."""
    path = _private_folder()
    return path is not None and (path / f"{key}.mod").is_file()


def store(key: str, entry: Entry) -> None:
    """Keeps an entry; where the disk is full or not writable, warns and goes on without."""
    if (path := _private_folder()) is None:
        return
    data = _encode(key, entry)
    try:
        handle, name = tempfile.mkstemp(dir=path, suffix=".new")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, path / f"{key}.mod")
        except BaseException:
            os.unlink(name)
            raise
        _bound(path)
    except OSError as error:
        _warn(f"compiled kernels could not be kept: {error}")


def _bound(path: Path) -> None:
    """Removes the oldest entries beyond the bound."""
    files, total = [], 0
    for file in path.glob("*.mod"):
        with contextlib.suppress(OSError):
            facts = file.stat()
            files.append((facts.st_mtime, facts.st_size, file))
            total += facts.st_size
    for _, size, file in sorted(files):
        if total <= _MAX_BYTES:
            break
        with contextlib.suppress(OSError):
            file.unlink()
        total -= size
