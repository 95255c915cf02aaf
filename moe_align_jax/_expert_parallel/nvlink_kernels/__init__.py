"""Rows written straight into other GPUs' memory over NVLink: out to the experts' ranks, and back.

Every device launches the same kernel, and XLA has a barrier of all devices ahead of it: from then on their
outputs may be written, and their counters are zero. A CTA takes the same tokens on every device, stores what
is theirs everywhere, then meets the CTAs of its index (`device_sync`): when the kernel ends here, all that
others wrote to this device is there. No row has two writers, and its place is known beforehand. Only
`dispatch` counts, to find places in the experts' boxes, and there every CTA takes the ids of all devices.
"""

import functools

from moe_align_jax._expert_parallel.nvlink_kernels import combine, dispatch, return_rows, send
from moe_align_jax._expert_parallel.nvlink_kernels.dispatch import (
    unsupported as dispatch_unsupported,
)
from moe_align_jax._expert_parallel.nvlink_kernels.problems import (
    Combine,
    Dispatch,
    PeerProblem,
    ReturnRows,
    Send,
)
from moe_align_jax._expert_parallel.row_words import Field
from moe_align_jax._simt.language import Kernel

__all__ = [
    "Combine",
    "Dispatch",
    "Field",
    "ReturnRows",
    "PeerProblem",
    "Send",
    "build",
    "dispatch_unsupported",
]

_BUILDERS = {
    Send: send.build,
    Dispatch: dispatch.build,
    ReturnRows: return_rows.build,
    Combine: combine.build,
}


@functools.lru_cache(256)
def build(problem: PeerProblem) -> Kernel:
    """The kernel of a problem."""
    return _BUILDERS[type(problem)](problem)
