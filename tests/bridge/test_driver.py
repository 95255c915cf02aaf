"""driver.py without a GPU: which release of the driver a program was assembled by."""

import ctypes
import os
import types

import pytest
import torch

from tests.bridge.helpers import sized
from torch_bridge._direct import disk_cache, driver
from torch_bridge._direct.machine import Machine

# What the kernel modules print, the closed and the open one.
CLOSED = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:00:00 UTC 2025\n"
    "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
)
OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (a@b)\n"
    "GCC version:  gcc version 12.3.0 \n"
)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """Any driver: `said` is what its kernel module prints, `loaded` the file that was loaded."""
    machine = types.SimpleNamespace(said=tmp_path / "version", loaded="/lib/libcuda.so.1")
    monkeypatch.setattr(driver, "KERNEL_MODULE_VERSION", machine.said)
    monkeypatch.setattr(driver, "file_of", lambda function: machine.loaded)
    return machine


def driver_of_the_machine():
    def get_version(version):
        version._obj.value = 13000
        return 0

    return driver.Driver(types.SimpleNamespace(cuDriverGetVersion=get_version))


@pytest.mark.parametrize(
    ("loaded", "said", "release"),
    [
        ("/lib/libcuda.so.580.65.06", OPEN, "580.65.06"),  # what is loaded counts
        ("/lib/libcuda.so.1", CLOSED, "580.65.06"),
        ("/lib/wsl/libcuda.so.1.1", OPEN, "580.159.04"),
        ("", OPEN, "580.159.04"),
        ("/lib/libcuda.so.1", "something else 12.3.0\n", ""),
        ("", None, ""),
    ],
)
def test_release(loaded, said, release, machine):
    machine.loaded = loaded
    if said is not None:
        machine.said.write_text(said)
    assert driver_of_the_machine().release == release


def test_file_of_a_foreign_function(monkeypatch):
    monkeypatch.undo()
    library = ctypes.CDLL("libm.so.6")
    path = driver.file_of(library.cos)
    assert os.path.isfile(path) and path == os.path.realpath(path) and "libm" in path


def test_releases_of_one_cuda_version_share_no_program(machine, monkeypatch):
    facts = types.SimpleNamespace(name="H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    problem, keys = sized(5, 16, 8), set()
    for release in ("580.65.06", "580.159.04"):
        machine.loaded = f"/lib/libcuda.so.{release}"
        here = Machine()
        here.driver = driver_of_the_machine()
        gpu = here.gpu(0)
        assert gpu == f"H200 sm_90 driver 13000 {release}"
        keys.add(disk_cache.key_of(problem, gpu))
    assert len(keys) == 2


class Assembler:
    """The driver's linker, and what it loaded."""

    def __init__(self):
        self.linked, self.loaded = [], []
        self.cubin = ctypes.create_string_buffer(b"cubin", 5)

    def __getattr__(self, name):
        return lambda *arguments: 0

    def cuLinkAddData_v2(self, state, kind, text, size, *rest):
        self.linked.append(text)
        return 0

    def cuLinkComplete(self, state, image, size):
        image._obj.value, size._obj.value = ctypes.addressof(self.cubin), 5
        return 0

    def cuModuleLoadData(self, module, image):
        self.loaded.append(image)
        return 0

    def cuModuleGetFunction(self, function, module, name):
        function._obj.value = 1
        return 0


def test_the_linker_gets_no_kernel_that_moves_registers():
    """It ignores setmaxnreg, and sums were spilled. Such PTX is loaded as it is, and ends with a zero."""
    library = Assembler()
    loading = driver.Driver(library)
    fields = {"entry": "kernel", "shared_bytes": 0, "parameters": ()}
    fields |= dict.fromkeys(("grid", "cluster", "block"), (1, 1, 1))
    plain, moving = ".entry kernel() {}", ".entry kernel() {setmaxnreg.inc.sync.aligned.u32 232;}"
    images = [loading.assemble(text) for text in (plain, moving)]
    assert images == [b"cubin", moving.encode() + b"\0"]
    assert library.linked == [plain.encode() + b"\0"]
    loading.load_kernels([fields] * 2, images, ())
    assert library.loaded == images


class Loader:
    """A driver whose call `fails` returns 2 (no memory) at the second kernel; `held` is what is loaded."""

    def __init__(self, fails):
        self.fails, self.held, self.calls = fails, [], dict.fromkeys((fails, "loads"), 0)

    def __getattr__(self, name):
        def call(*arguments):
            if name != self.fails:
                return 0
            self.calls[name] += 1
            return 2 * (self.calls[name] == 2)

        return call

    def cuModuleLoadData(self, module, image):
        if result := self.__getattr__("cuModuleLoadData")():
            return result
        self.calls["loads"] += 1
        module._obj.value = self.calls["loads"]
        self.held.append(module._obj.value)
        return 0

    def cuModuleGetFunction(self, function, module, name):
        function._obj.value = 100 + module.value
        return self.__getattr__("cuModuleGetFunction")()

    def cuModuleUnload(self, module):
        self.held.remove(module.value)
        return 3  # which must not hide what failed


FIELDS = {"entry": "kernel", "shared_bytes": 0, "parameters": ("x",)}
FIELDS |= dict.fromkeys(("grid", "cluster", "block"), (1, 1, 1))


@pytest.mark.parametrize("fails", ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"])
def test_kernels_before_one_that_does_not_load_are_unloaded(fails):
    library = Loader(fails)
    with pytest.raises(driver.DriverError, match="CUDA driver error 2"):
        driver.Driver(library).load_kernels([FIELDS] * 3, [b"cubin"] * 3, ("x",))
    assert library.calls["loads"] in (1, 2) and not library.held


def test_kernels_of_other_arguments_are_unloaded():
    library = Loader("")
    with pytest.raises(KeyError):
        driver.Driver(library).load_kernels([FIELDS] * 2, [b"cubin"] * 2, ("y",))
    assert library.calls["loads"] == 1 and not library.held


def test_kernels_that_load_stay():
    library = Loader("")
    specs = driver.Driver(library).load_kernels([FIELDS] * 2, [b"cubin"] * 2, ("x",))
    assert [spec.function for spec in specs] == [101, 102] and library.held == [1, 2]
