"""Windows that the GPUs of several processes share: for dispatch and combine of few tokens."""

import jax

from moe_align_jax._core import checks, fork
from moe_align_jax._expert_parallel.transports import shared_windows

_GRANULE = 2 << 20  # what the driver maps at once
_DEFAULT_BYTES = 64 << 20


def connect_windows(mesh: jax.sharding.Mesh, *, num_bytes: int = _DEFAULT_BYTES) -> str | None:
    """Lets dispatch and combine use "nvlink_window" over several processes of one host.

    Every process calls it, with the same arguments, behind `jax.distributed.initialize` and before it traces
    a program that is to use windows. Each process makes `num_bytes` of memory on each of its GPUs, beside
    what XLA has, which the others map; it lives as long as the process. Processes hand it to each other
    through a socket in the folder of temporary files, which they must share.

    It is a collective: a process waits for the others to call it. One call is enough for a mesh; a second one
    does nothing. Programs of one process need none.

    Args:
        mesh: all devices of all processes. Dispatch has windows over this mesh, in this order, with experts
            split over all of its axes.
        num_bytes: of a window, a multiple of 2 MiB. What needs more goes by "all_to_all". The default is
            enough for 256 tokens of 7168 columns on each of two GPUs.

    Returns:
        None if there are windows now; else why not, the same text in every process. Dispatch takes
        "all_to_all" then, as without this call.

    Raises:
        TypeError: mesh is no `jax.sharding.Mesh`, or num_bytes no int.   ValueError: num_bytes is no multiple
        of 2 MiB, or the mesh has not all devices.

    Example:
        >>> mesh = jax.make_mesh((jax.device_count(),), ("ep",))
        >>> connect_windows(mesh)  # one process needs none
    """
    function = "connect_windows"
    fork.check(function)
    if not isinstance(mesh, jax.sharding.Mesh):
        rule, got = "be a jax.sharding.Mesh", checks.describe(mesh)
        remedy = "Pass the mesh that dispatch is called over."
        raise TypeError(checks.message(function, "mesh", rule, got, remedy))
    remedy = "Leave it out for 64 MiB."
    num_bytes = checks.check_positive_int(function, "num_bytes", num_bytes, remedy)
    if num_bytes % _GRANULE:
        checks.fail(function, "num_bytes", "be a multiple of 2 MiB", num_bytes, remedy)
    if jax.process_count() == 1:
        return None
    devices = [*mesh.devices.flat]
    if {device.id for device in devices} != {device.id for device in jax.devices()}:
        rule = f"have all {jax.device_count()} devices of the processes"
        remedy = "Make it of jax.devices()."
        checks.fail(function, "mesh", rule, len(devices), remedy)
    return shared_windows.connect(devices, num_bytes)
