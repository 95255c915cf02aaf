"""What the CTAs of a product find about their tiles, in the emulator."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np

from moe_align_jax._simt import emulator
from moe_align_jax._simt.language import Int, Kernel, Program, Simt


def by_ctas(
    find: Callable[[Simt, SimpleNamespace], Sequence[Int]],
    values: int,
    num_ctas: int,
    **inputs: np.ndarray,
) -> np.ndarray:
    """`[num_ctas, values]` int32: what `find(t, r)` gives in each CTA of one warpgroup.

    Args:
        find: run by every thread; those of a warp that is not the first one are kept.
        values: how many it gives.
        num_ctas: of the launch.
        inputs: int32 arrays by the names that `find` reads them by.
    """

    def body(t, r):
        found = find(t, r)
        with t.if_(t.thread_id().eq(32)):
            for place, value in enumerate(found):
                t.store(r.found, t.cta_id() * values + place, value)

    sizes = {name: array.shape for name, array in inputs.items()}
    outputs = {"found": (num_ctas * values,)}
    machine = Kernel(
        name="found", body=body, inputs=sizes, outputs=outputs, num_warpgroups=1, num_ctas=num_ctas
    )
    program = Program(inputs=sizes, kernels=(machine,), results=("found",))
    [found] = emulator.run(program, list(inputs.values()))
    return found.reshape(num_ctas, values)
