"""Small kernels for the tests of the emulator."""

import numpy as np

from moe_align_jax._simt import emulator
from moe_align_jax._simt.language import Kernel, Program


def kernel(body, *, name="kernel", inputs=None, outputs=None, num_warpgroups=1, **options):
    return Kernel(
        name=name,
        body=body,
        inputs=inputs or {},
        outputs=outputs or {},
        num_warpgroups=num_warpgroups,
        **options,
    )


def program(*kernels, inputs=None):
    """All outputs of all kernels are results."""
    results = tuple(name for k in kernels for name in k.outputs)
    return Program(inputs=inputs or {}, kernels=kernels, results=results)


def launch(body, *arrays, **options):
    """One kernel whose inputs `a`, `b`, ... are the arrays; its outputs, in order."""
    arrays = [np.asarray(x).astype(np.int32) for x in arrays]
    inputs = {"abcdef"[i]: x.shape for i, x in enumerate(arrays)}
    return emulator.run(program(kernel(body, inputs=inputs, **options), inputs=inputs), arrays)
