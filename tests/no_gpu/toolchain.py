"""What a compile without a GPU needs: a C compiler, ptxas, libdevice, and jax's CUDA plugin.

Everything is put into folders of the checkout that git ignores.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# The plugins without the CUDA libraries that they would need to run anything.
_PLUGIN_PACKAGES = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
LIBRARY = "libcuda.so.1"


class Missing(RuntimeError):
    """Something that the compile needs is not there; the message says what would bring it."""


class Toolchain(NamedTuple):
    """Where everything is.

    Attributes:
        folder: where the workers run. It holds `libcuda.so.1`, and `cuda_sdk_lib`, the first place in which
            XLA looks for ptxas and libdevice; a CUDA toolkit of the machine is not used.
        plugin: the library with Mosaic's compiler.
        runtime: the library that the compiled host code calls.
    """

    folder: Path
    plugin: Path
    runtime: Path

    @property
    def ptxas(self) -> Path:
        return self.folder / "cuda_sdk_lib/bin/ptxas"

    def environment(self) -> dict[str, str]:
        """For a process that compiles: the recording libcuda comes before a real one."""
        paths = [str(self.folder), os.environ.get("LD_LIBRARY_PATH", "")]
        given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        python = [str(ROOT), *(os.path.abspath(path) for path in given)]  # it runs elsewhere
        return os.environ | {
            "LD_LIBRARY_PATH": ":".join(filter(None, paths)),
            "PYTHONPATH": os.pathsep.join(python),
            "JAX_PLATFORMS": "cpu",
        }


def _package_folder(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def _roots() -> list[tuple[Path, Path]]:
    """(ptxas, libdevice) of packages that torch or jax bring, then of a toolkit on PATH."""
    found = []
    if triton := _package_folder("triton"):
        nvidia = triton / "backends/nvidia"
        found.append((nvidia / "bin/ptxas", nvidia / "lib/libdevice.10.bc"))
    if cuda := _package_folder("nvidia.cu13"):
        found.append((cuda / "bin/ptxas", cuda / "nvvm/libdevice/libdevice.10.bc"))
    if on_path := shutil.which("ptxas"):
        toolkit = Path(on_path).resolve().parents[1]
        found.append((Path(on_path), toolkit / "nvvm/libdevice/libdevice.10.bc"))
    return found


def _link(target: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() and link.readlink() == target:
        return
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _build_recorder(folder: Path) -> None:
    source = Path(__file__).with_name("recorder.c")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Missing("there is no C compiler: install gcc or clang, or name one in CC")
    command = [*compiler.split(), "-shared", "-fPIC", "-O1", "-o", str(folder / LIBRARY)]
    try:
        done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    except OSError as error:
        raise Missing(f"the C compiler does not run: {error}") from error
    if done.returncode:
        raise Missing(f"{' '.join(command)} {source.name} failed: {done.stderr.strip()}")


def _plugin_folder(version: str) -> Path:
    """The plugins of this jaxlib, from the package index if need be: about 400 MB unpacked."""
    folder = ROOT / f".cuda-plugin-{version}"
    if (folder / ".complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    wanted = [f"{name}=={version}" for name in _PLUGIN_PACKAGES]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "--no-compile", "--no-deps", "--target", str(folder), *wanted])
    if done.returncode:
        raise Missing(f"pip could not install {' and '.join(wanted)}: its message is above")
    (folder / ".complete").touch()
    return folder


def set_up() -> Toolchain:
    """Builds and links what is missing.

    Raises:
        Missing: something cannot be had here.
    """
    import jaxlib.version

    version = jaxlib.version.__version__
    folder = ROOT / ".no-gpu" / version
    folder.mkdir(parents=True, exist_ok=True)
    tools = next((pair for pair in _roots() if all(path.exists() for path in pair)), None)
    if tools is None:
        looked = "triton (PyTorch for CUDA brings it), nvidia-cuda-nvcc with nvidia-nvvm, PATH"
        raise Missing(f"there is no ptxas with its libdevice.10.bc; looked in: {looked}")
    ptxas, libdevice = tools
    _build_recorder(folder)
    plugins = _plugin_folder(version)
    toolchain = Toolchain(
        folder,
        plugins / "jax_plugins/xla_cuda13/xla_cuda_plugin.so",
        plugins / "jax_cuda13_plugin/libmosaic_gpu_runtime.so",
    )
    _link(ptxas, toolchain.ptxas)
    _link(libdevice, folder / "cuda_sdk_lib/nvvm/libdevice" / libdevice.name)
    for path in (toolchain.plugin, toolchain.runtime):
        if not path.exists():
            raise Missing(f"{path} is not in the plugins of jaxlib {version}")
    return toolchain
