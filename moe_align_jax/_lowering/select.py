"""Which implementation runs: what can run for a platform, what was asked for, and why nothing else."""

import re
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from moe_align_jax._core import checks
from moe_align_jax._lowering.primitive import PLATFORMS
from moe_align_jax.types import Implementation

IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

# The jax releases whose Mosaic GPU lowering our kernels were checked with: [oldest, first unknown).
OLDEST_JAX, UNKNOWN_JAX = (0, 11, 2), (0, 13, 0)


def jax_version() -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", jax.__version__)[:3])


def _cuda_capability() -> float | None:
    """Lowest compute capability among this process's CUDA devices; None without one."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError:  # no CUDA backend here: lowering ahead of time
        return None
    return min(float(getattr(d, "compute_capability", "0")) for d in devices)


def gpu_kind() -> str | None:
    """The kind of this process's CUDA devices: the first one's, which is the same in every process of a
    distributed program; None without one."""
    try:
        return getattr(jax.devices("cuda")[0], "device_kind", None)
    except RuntimeError:  # no CUDA backend here
        return None


def kernels_unavailable(platform: str) -> str | None:
    """Why the Mosaic GPU kernels cannot be lowered for `platform`, or None when they can."""
    if platform != "cuda":
        return f"Mosaic GPU kernels run on NVIDIA GPUs only, not on {platform!r}"
    version = jax_version()
    if not OLDEST_JAX <= version < UNKNOWN_JAX:
        low, high = (".".join(map(str, v)) for v in (OLDEST_JAX, UNKNOWN_JAX))
        return f"the kernels need jax >= {low}, < {high}; this is jax {jax.__version__}"
    try:
        import moe_align_jax._simt.mosaic  # noqa: F401
    except ImportError as error:
        return f"Pallas' Mosaic GPU lowering does not import here: {error}"
    capability = _cuda_capability()
    if capability is not None and capability < 9.0:
        return f"the kernels need compute capability 9.0 (Hopper) or newer; a GPU here has {capability}"
    return None


def unavailable(
    implementation: str, platform: str, unsupported: Callable[[], str | None] | None = None
) -> str | None:
    """Why a named implementation cannot run for `platform`, or None.

    Args:
        implementation: its name.
        platform: as jax names it, "cuda" for NVIDIA GPUs.
        unsupported: why our kernel, on a GPU or emulated, does not take the problem, or None where it does.
    """
    if implementation == "mosaic_gpu" and (reason := kernels_unavailable(platform)):
        return reason
    if implementation == "emulator" and platform != "cpu":
        return f"the emulator runs the kernel bodies by NumPy on a CPU, not on {platform!r}"
    if implementation == "xla" or unsupported is None:
        return None
    return unsupported()


def choose(
    function: str,
    platform: str,
    implementation: str | None,
    unsupported: Callable[[], str | None] | None = None,
) -> str:
    """The implementation that runs: the named one, or for None the best available.

    Raises:
        NotImplementedError: the named one cannot run for the platform.
    """
    if implementation is None:
        return "xla" if unavailable("mosaic_gpu", platform, unsupported) else "mosaic_gpu"
    if reason := unavailable(implementation, platform, unsupported):
        raise not_implemented(function, implementation, reason)
    return implementation


def reasons_against_others(
    choice: str,
    platform: str,
    implementation: str | None,
    unsupported: Callable[[], str | None] | None = None,
    *,
    better: str,
) -> dict[str, str]:
    """Why each implementation but `choice` does not run; `better`: what our kernel has over "xla"."""
    reasons = {}
    for other in IMPLEMENTATIONS:
        if other == choice:
            continue
        if reason := unavailable(other, platform, unsupported):
            reasons[other] = reason
        elif implementation is not None:
            reasons[other] = f"implementation={implementation!r} was asked for"
        elif other == "emulator":
            reasons[other] = "it runs only when named: it is for tests and debugging"
        else:
            reasons[other] = better
    return reasons


def not_implemented(function: str, implementation: str, reason: str) -> NotImplementedError:
    return NotImplementedError(
        checks.message(
            function,
            "implementation",
            "be one that can run here",
            repr(implementation),
            f"{reason[0].upper()}{reason[1:]}. Pass implementation=None for the best available.",
        )
    )


def check_implementation(function: str, implementation: object) -> None:
    if implementation is not None and not checks.is_one_of(implementation, IMPLEMENTATIONS):
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(
            checks.message(
                function,
                "implementation",
                f"be None or one of {names}",
                checks.shown(implementation),
                "Pass None for the best available.",
            )
        )


def dtype_of(value: Any) -> np.dtype | None:
    """The dtype that it is or names; None where it is none, such as an array."""
    try:
        if value is None or isinstance(value, (jax.Array, np.ndarray, np.generic)):
            return None
        return jnp.dtype(value)
    except Exception:  # NumPy asks for the value's repr, which is anybody's
        return None


def check_dtype(function: str, value: object, names: Sequence[str]) -> np.dtype:
    """`dtype=` of a function that says what would run: one of these."""
    found = dtype_of(value)
    if found is None or found.name not in names:
        got = checks.shown(value) if found is None else found.name
        rule, remedy = f"be one of {', '.join(names)}", "It is that of the rows."
        raise TypeError(checks.message(function, "dtype", rule, got, remedy))
    return found


def check_platform(function: str, platform: str | None) -> str:
    """The platform to lower for: one that jax has a name for, or that this process has devices of."""
    if platform is None:
        platform = jax.default_backend()
    if checks.is_one_of(platform, ("gpu",)):
        return "cuda"
    if not checks.is_one_of(platform, (*PLATFORMS, *(d.platform for d in jax.devices()))):
        names = ", ".join(map(repr, ("gpu", *PLATFORMS)))
        remedy = "Leave it out for this process's default."
        rule = f"be None or one of {names}"
        raise ValueError(checks.message(function, "platform", rule, checks.shown(platform), remedy))
    return platform
