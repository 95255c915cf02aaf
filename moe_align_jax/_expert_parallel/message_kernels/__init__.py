"""What stands around a collective of a low-latency exchange, in one kernel each.

`pack` quantises tokens and writes their messages; `unpack` counts the pairs that came and copies the rows
into the experts' boxes, with the layout, also of rows that no kernel has packed, and quantises those. XLA
makes some nine kernels of the same (quantise, pack, repeat, unpack, align, copy), each of which the host
launches, or records anew where a buffer has moved.
"""

from moe_align_jax._expert_parallel.message_kernels.problems import Message as Message
from moe_align_jax._expert_parallel.message_kernels.problems import Pack as Pack
from moe_align_jax._expert_parallel.message_kernels.problems import Unpack as Unpack
from moe_align_jax._expert_parallel.message_kernels.problems import quantised as quantised
from moe_align_jax._expert_parallel.message_kernels.problems import unsupported as unsupported
from moe_align_jax._expert_parallel.row_words import Field as Field
from moe_align_jax._simt.language import Kernel


def build(problem: Pack | Unpack) -> Kernel:
    """The kernel of a problem."""
    from moe_align_jax._expert_parallel.message_kernels import pack, unpack

    return pack.build(problem) if isinstance(problem, Pack) else unpack.build(problem)
