"""`moe-align info`: versions, devices, which implementations run here and why not the rest."""

import importlib.metadata
import platform

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import moe_align_jax
from moe_align_jax import select_implementation
from moe_align_jax._align import tables
from moe_align_jax._lowering.select import (
    IMPLEMENTATIONS,
    gpu_kind,
    jax_version,
    kernels_unavailable,
)

# The jax releases under which we have run the kernels on GPUs, and how much of the test suite ran there, as
# docs/notebook/ records it. With other releases they were compiled only.
JAX_RUN_ON_A_GPU: dict[tuple[int, ...], str] = {
    (0, 11, 2): "",
    (
        0,
        12,
        0,
    ): "the library's tests on an H100, and the first 76 of torch_bridge's, 2026-11-22; of the kernels "
    'since then a sample on H200s, 2026-11-29, and the tests of "nvlink_window" on two',
}
_SIZE = {"topk_ids_or_shape": (4096, 8), "block_size": 64, "num_experts": 256}


def _distribution(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Name -> version, or why there is none."""
    from jaxlib.version import __version__ as jaxlib_version

    found = {
        "moe-align-jax": moe_align_jax.__version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib_version,
        "jax-cuda plugin": next(
            (
                f"{version} ({name})"
                for name in ("jax-cuda13-plugin", "jax-cuda12-plugin")
                if (version := _distribution(name)) != "not installed"
            ),
            "not installed",
        ),
    }
    try:
        import torch

        cuda = "sees a GPU" if torch.cuda.is_available() else "sees no GPU"
        found["torch"] = f"{torch.__version__} ({cuda})"
    except ImportError as error:
        found["torch"] = "not installed" if error.name == "torch" else f"does not import: {error}"
    found["triton"] = _distribution("triton")
    return found


def gpu_experience() -> str:
    """What of the kernels we have run on a GPU under this jax; "" when that is everything."""
    if (ran := JAX_RUN_ON_A_GPU.get(jax_version())) is None:
        known = ", ".join(".".join(map(str, v)) for v in JAX_RUN_ON_A_GPU)
        return (
            f"with jax {jax.__version__}: lowered only, never run on a GPU of ours ({known} were)"
        )
    return ran and f"with jax {jax.__version__}: run on GPUs of ours in part: {ran}"


def implementations(target: str | None = None) -> dict[str, tuple[bool, str]]:
    """Name -> (whether it runs on a platform, why it is or is not the default there)."""
    best = select_implementation(**_SIZE, platform=target)
    found = {}
    for name in IMPLEMENTATIONS:
        try:
            select_implementation(**_SIZE, platform=target, implementation=name)
        except NotImplementedError as error:
            found[name] = False, best.reasons.get(name, str(error))
        else:
            found[name] = True, best.reasons.get(name, "the default")
    return found


def run(console: Console) -> int:
    """Prints everything; 0."""
    table = Table(title="versions", title_justify="left", show_header=False)
    for name, version in versions().items():
        table.add_row(name, escape(version))
    console.print(table)

    table = Table(title="devices", title_justify="left")
    for title in ("device", "kind", "compute capability"):
        table.add_column(title)
    for device in jax.devices():
        capability = getattr(device, "compute_capability", None) or "-"
        table.add_row(f"{device.platform}:{device.id}", device.device_kind, str(capability))
    console.print(table)

    table = Table(title=f"implementations on {jax.default_backend()}", title_justify="left")
    for title in ("name", "runs here", "why"):
        table.add_column(title, overflow="fold")
    for name, (runs, why) in implementations().items():
        table.add_row(name, "[green]yes[/]" if runs else "[red]no[/]", escape(why))
    console.print(table)

    reason = kernels_unavailable("cuda")
    lowering = f"no: {reason}" if reason else "yes: implementation=None gives mosaic_gpu"
    console.print(f"lowering for cuda from here: {escape(lowering)}", highlight=False)
    sizes = tables.describe(tables.table_name(gpu_kind()))
    console.print(f"form and sizes of the kernels: {escape(sizes)}", highlight=False)
    if experience := gpu_experience():
        console.print(f"mosaic_gpu {escape(experience)}", highlight=False)
    return 0
