"""Compiled programs on disk: what is kept, what is refused, and that nothing foreign is ever loaded."""

import concurrent.futures
import hashlib
import importlib.metadata
import os
import stat
import subprocess
import sys
import time

import pytest

import moe_align_jax
from moe_align_jax._align import tables
from moe_align_jax.types import AlignProblem, BatchedAlignProblem
from torch_bridge._direct import disk_cache

KEY = hashlib.sha256(b"a program").hexdigest()
# The module in a process that has neither torch nor jax.
BY_PATH = f"""
import importlib.util, sys
sys.modules["torch"] = sys.modules["jax"] = None
spec = importlib.util.spec_from_file_location("modules", {disk_cache.__file__!r})
modules = importlib.util.module_from_spec(spec)
spec.loader.exec_module(modules)
"""
OTHER = hashlib.sha256(b"another").hexdigest()
ENTRY = disk_cache.Entry(
    [{"entry": "align", "grid": [16, 1, 1], "parameters": ["topk_ids", "expert_ids"]}] * 2,
    {"block_expert": [128], "keys1": [2048]},
    [bytes(range(256)), b""],
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setenv("TORCH_BRIDGE_CACHE_DIR", str(path))
    disk_cache._warn.cache_clear()
    yield path
    disk_cache._warn.cache_clear()


def file_of(folder, key=KEY):
    return folder / f"{key}.mod"


def test_round_trip(folder):
    assert disk_cache.load(KEY) is None
    disk_cache.store(KEY, ENTRY)
    assert disk_cache.load(KEY) == ENTRY
    assert [path.name for path in folder.iterdir()] == [f"{KEY}.mod"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    other = ENTRY._replace(cubins=[b"x", b"y"])
    disk_cache.store(KEY, other)
    assert disk_cache.load(KEY) == other


def test_no_damaged_byte_goes_unseen(folder):
    disk_cache.store(KEY, ENTRY)
    whole = file_of(folder).read_bytes()
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        file_of(folder).write_bytes(data)
        assert disk_cache.load(KEY) is None, f"byte {at}"
        assert not file_of(folder).exists(), f"byte {at}"
    file_of(folder).write_bytes(whole)
    assert disk_cache.load(KEY) == ENTRY


def test_truncated_or_longer_entries_are_removed(folder):
    disk_cache.store(KEY, ENTRY)
    whole = file_of(folder).read_bytes()
    for data in (*(whole[:size] for size in range(0, len(whole), 7)), whole + b"\0"):
        file_of(folder).write_bytes(data)
        assert disk_cache.load(KEY) is None, len(data)
        assert not file_of(folder).exists()


def test_entry_of_another_key_is_removed(folder):
    """Whole and sound, but another program's, under this name."""
    disk_cache.store(OTHER, ENTRY)
    os.rename(file_of(folder, OTHER), file_of(folder))
    assert disk_cache.load(KEY) is None
    assert not file_of(folder).exists()


@pytest.mark.parametrize("header", [b"[1]", b"{}", b'"x"', b'{"key": 1', b"\xff\xfe"])
def test_sound_checksum_over_a_strange_header(folder, header):
    rest = len(header).to_bytes(8, "little") + header
    disk_cache.store(KEY, ENTRY)
    file_of(folder).write_bytes(disk_cache._MAGIC + hashlib.sha256(rest).digest() + rest)
    assert disk_cache.load(KEY) is None
    assert not file_of(folder).exists()


def test_many_writers_and_readers_at_once():
    """Whoever reads sees a whole entry: one of those that were written."""
    entries = [ENTRY._replace(cubins=[bytes([k]) * 200_000, b""]) for k in range(8)]
    disk_cache.store(KEY, entries[0])

    def write(k):
        for _ in range(20):
            disk_cache.store(KEY, entries[k])
        return "wrote"

    def read(_):
        return [disk_cache.load(KEY) in entries for _ in range(60)]

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        readers = [pool.submit(read, k) for k in range(4)]
        writers = [pool.submit(write, k) for k in range(8)]
        assert all(all(x.result()) for x in readers)
        assert [x.result() for x in writers] == ["wrote"] * 8
    assert [path.suffix for path in disk_cache.folder().iterdir()] == [".mod"]


def test_writers_in_other_processes(folder):
    code = f"""{BY_PATH}
entry = modules.Entry([], {{}}, [sys.argv[1].encode() * 100_000])
for _ in range(200):
    modules.store({KEY!r}, entry)
"""
    running = [subprocess.Popen([sys.executable, "-c", code, str(k)]) for k in range(2)]
    want = [disk_cache.Entry([], {}, [str(k).encode() * 100_000]) for k in range(2)]
    seen = 0
    while any(process.poll() is None for process in running):
        if (entry := disk_cache.load(KEY)) is not None:
            assert entry in want
            seen += 1
    assert [process.wait() for process in running] == [0, 0]
    assert seen and disk_cache.load(KEY) in want
    assert [path.name for path in folder.iterdir()] == [f"{KEY}.mod"]


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_folder_that_others_may_write_is_not_used(folder, mode):
    disk_cache.store(KEY, ENTRY)
    folder.chmod(mode)
    with pytest.warns(UserWarning, match="others may write") as caught:
        assert disk_cache.load(KEY) is None
        disk_cache.store(OTHER, ENTRY)
    assert len(caught) == 1 and "chmod 700" in str(caught[0].message)
    assert not file_of(folder, OTHER).exists()
    folder.chmod(0o755)  # others may read
    assert disk_cache.load(KEY) == ENTRY


def test_folder_of_another_user_is_not_used(folder, monkeypatch):
    disk_cache.store(KEY, ENTRY)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.warns(UserWarning, match="no compiled kernels are kept"):
        assert disk_cache.load(KEY) is None


def test_folder_that_cannot_be_made(folder):
    folder.write_text("a file stands in the way")
    with pytest.warns(UserWarning, match="no compiled kernels are kept"):
        disk_cache.store(KEY, ENTRY)
    assert disk_cache.load(KEY) is None
    assert folder.read_text() == "a file stands in the way"


class _FullDisk:
    """A file on which a part of what is written fits."""

    def __init__(self, file):
        self._file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, data):
        self._file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["write", "replace", "mkstemp"])
def test_full_disk_costs_a_warning_and_leaves_nothing_half_written(folder, step, monkeypatch):
    disk_cache.store(OTHER, ENTRY)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    if step == "write":
        fdopen = os.fdopen
        monkeypatch.setattr(os, "fdopen", lambda *given: _FullDisk(fdopen(*given)))
    elif step == "replace":
        monkeypatch.setattr(os, "replace", full)
    else:
        monkeypatch.setattr(disk_cache.tempfile, "mkstemp", full)
    with pytest.warns(UserWarning, match="could not be kept.*No space left"):
        disk_cache.store(KEY, ENTRY)
    assert [path.name for path in folder.iterdir()] == [f"{OTHER}.mod"]
    assert disk_cache.load(KEY) is None and disk_cache.load(OTHER) == ENTRY


def test_size_is_bounded_and_the_oldest_go_first(folder, monkeypatch):
    monkeypatch.setattr(disk_cache, "_MAX_BYTES", 35_000)
    entry = ENTRY._replace(cubins=[bytes(9_000)])
    keys = [hashlib.sha256(bytes([k])).hexdigest() for k in range(6)]
    for age, key in enumerate(keys):
        disk_cache.store(key, entry)
        then = time.time() - 1000 + age
        os.utime(file_of(folder, key), (then, then))
    held = [key for key in keys if file_of(folder, key).exists()]
    assert held == keys[-3:]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 35_000


def test_folder_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_BRIDGE_CACHE_DIR", str(tmp_path / "here"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert disk_cache.folder() == tmp_path / "here"
    monkeypatch.delenv("TORCH_BRIDGE_CACHE_DIR")
    assert disk_cache.folder() == tmp_path / "xdg" / "torch_bridge"
    disk_cache.store(KEY, ENTRY)
    assert file_of(tmp_path / "xdg" / "torch_bridge").exists()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert disk_cache.folder() == tmp_path / "home" / ".cache" / "torch_bridge"


def test_user_without_a_home_keeps_nothing(monkeypatch, tmp_path):
    """No HOME, and no entry in the passwd file: a container that runs under a number."""
    for name in ("TORCH_BRIDGE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(disk_cache.Path, "home", no_home)
    with pytest.warns(UserWarning, match="no compiled kernels are kept: Could not determine home"):
        assert disk_cache.load(KEY) is None
    disk_cache.store(KEY, ENTRY)
    assert not disk_cache.holds(KEY)


# -- keys -----------------------------------------------------------------------------------------

PROBLEM = AlignProblem(8, 8, 4, 32, sized_at_launch=True)


def forget_digests():
    disk_cache.source_digest.cache_clear()
    disk_cache.code_digest.cache_clear()


@pytest.fixture
def fresh_digest():
    forget_digests()
    yield
    forget_digests()


def test_key_names_the_problem_and_the_gpu():
    changed = [
        PROBLEM._replace(**{field: value})
        for field, value in {
            "num_pairs": 9,
            "num_experts": 9,
            "block_size": 5,
            "capacity": 33,
            "id_words": 2,
            "expert_map": "label",
            "has_num_valid_pairs": True,
            "return_inverse": True,
            "minus_one": True,
            "return_counts": False,
            "sized_at_launch": False,
            "tuning": "heuristic",
            "dispatch": "static",
            "num_logical": 7,
            "replica_width": 2,
            "top_k": 2,
            "num_layers": 3,
            "num_shared": 1,
            "num_local": 5,
        }.items()
    ]
    assert len(changed) == len(PROBLEM._fields)
    batched = BatchedAlignProblem(8, 8, 4)
    keys = [disk_cache.key_of(p, "H200 sm_90 driver 13000") for p in (PROBLEM, *changed, batched)]
    keys += [
        disk_cache.key_of(PROBLEM, gpu)
        for gpu in ("H100 sm_90 driver 13000", "H200 sm_90 driver 1")
    ]
    assert len(set(keys)) == len(keys)
    assert disk_cache.key_of(PROBLEM, "H200 sm_90 driver 13000") == keys[0]


@pytest.mark.parametrize(
    "what", ["our version", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin"]
)
def test_key_changes_with_a_version(what, monkeypatch, fresh_digest):
    before = disk_cache.key_of(PROBLEM, "gpu")
    forget_digests()
    if what == "our version":
        monkeypatch.setattr(moe_align_jax, "__version__", "0.0.0")
    else:
        version = importlib.metadata.version
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: "9.9" if name == what else version(name)
        )
    assert disk_cache.key_of(PROBLEM, "gpu") != before


def test_key_changes_with_the_source_of_kernels_and_of_their_launch(monkeypatch, fresh_digest):
    """Each file that the machine code comes from, one at a time."""
    before, read = disk_cache.source_digest(), disk_cache.Path.read_bytes
    opened = []
    monkeypatch.setattr(disk_cache.Path, "read_bytes", lambda p: opened.append(p) or read(p))
    forget_digests()
    assert disk_cache.source_digest() == before
    parts = {path.parent.name + "/" + path.name for path in opened}
    for name in (
        "kernels/warp.py",
        "kernels/sorted.py",
        "_simt/mosaic.py",
        "_masked_quant/kernel.py",
    ):
        assert name in parts
    for name in (
        *("_align/tables.py", "_align/config.py", "_core/checks.py", "_lowering/select.py"),
        *("_masked_quant/problem.py", "moe_align_jax/types.py"),
    ):
        assert name in parts
    assert {"_direct/compile_worker.py", "_direct/driver.py", "_direct/selftest.py"} <= parts
    assert "tuning/nvidia_h200.json" in parts
    for changed in list(opened):
        monkeypatch.setattr(
            disk_cache.Path, "read_bytes", lambda p, c=changed: read(p) + b"#" * (p == c)
        )
        forget_digests()
        assert disk_cache.source_digest() != before, changed


def test_a_source_folder_that_is_not_there_is_an_error(monkeypatch, fresh_digest):
    """It would hash as empty, and kernels that moved elsewhere would no longer change the key."""
    monkeypatch.setattr(disk_cache, "_SOURCES", (*disk_cache._SOURCES, "_moved_elsewhere"))
    forget_digests()
    with pytest.raises(FileNotFoundError, match="_moved_elsewhere"):
        disk_cache.code_digest()


def test_a_folder_of_tables_that_is_not_there_has_no_tables(monkeypatch, fresh_digest, tmp_path):
    monkeypatch.setenv(tables.FOLDER_VARIABLE, str(tmp_path / "none"))
    forget_digests()
    assert len(disk_cache.source_digest()) == 64


def test_neither_jax_nor_torch_is_imported_to_read_an_entry():
    disk_cache.store(KEY, ENTRY)
    code = f"""{BY_PATH}
print(len(modules.load({KEY!r}).cubins), len(modules.source_digest()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "64"], done.stderr
