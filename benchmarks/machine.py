"""Where a row was measured: date, GPU, driver, versions, commit."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# The commit, where the code was copied to a machine without its .git.
COMMIT_VARIABLE = "MOE_ALIGN_COMMIT"
ROOT = Path(__file__).resolve().parent.parent
NAMES = ("date", "gpu", "driver", "cpu", "python", "jax", "torch", "commit")  # of `facts`


def _output(*command: str) -> str:
    """The standard output of a command, "" where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit of this checkout, "+" behind it with local changes; `MOE_ALIGN_COMMIT` comes first, and
    without either it is "unknown"."""
    if given := os.environ.get(COMMIT_VARIABLE):
        return given
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{head}+" if changed else head


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def facts(commit_id: str | None = None) -> dict[str, str | None]:
    """The columns that every row of a run shares. `gpu` is None without one."""
    import jax

    device = jax.devices()[0]
    on_gpu = device.platform in ("gpu", "cuda")
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    values = (
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        device.device_kind if on_gpu else None,
        driver.splitlines()[0] if on_gpu and driver else None,
        platform.processor() or platform.machine(),
        platform.python_version(),
        jax.__version__,
        _version("torch"),
        commit_id or commit(),
    )
    return dict(zip(NAMES, values, strict=True))
