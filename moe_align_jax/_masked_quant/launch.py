"""silu_and_mul_masked_quant on a GPU: which sizes the kernel takes, and its launch."""

import jax

from moe_align_jax._lowering.direct_kernel import DirectKernel
from moe_align_jax._masked_quant.config import Config
from moe_align_jax._masked_quant.config import config_for as config_for
from moe_align_jax._masked_quant.config import unsupported as unsupported
from moe_align_jax._masked_quant.problem import MaskedQuantProblem


def run(
    problem: MaskedQuantProblem,
    x: jax.Array,
    masked_m: jax.Array,
    *,
    interpret: bool = False,
    config: Config | None = None,
) -> list[jax.Array]:
    """`[q, scales]`. With `interpret`, by Pallas' own interpreter, on a CPU."""
    from moe_align_jax._masked_quant import kernel

    shape = problem.inputs["x"]
    launch = kernel.build(problem, config or config_for(problem), interpret=interpret)
    with jax.enable_x64(False):  # its indices are int32; plgpu makes 64-bit ones otherwise
        q, scales = launch(x.reshape(shape), masked_m)
    return [q.reshape(*shape[:2], problem.width), scales]


def direct_kernel(problem: MaskedQuantProblem) -> DirectKernel:
    """For `torch_bridge`. NotImplementedError where the kernel does not take the problem."""
    from moe_align_jax._masked_quant import kernel

    if reason := unsupported(problem):
        raise NotImplementedError(reason)
    call = kernel.build(problem, config_for(problem)._replace(pdl=True))
    dtypes = {"x": problem.dtype, "masked_m": "int32"}
    structs = [jax.ShapeDtypeStruct(s, dtypes[name]) for name, s in problem.inputs.items()]
    outputs = {name: shape for name, (shape, _) in problem.outputs.items()}
    return DirectKernel(problem.kernel_name, problem.inputs, outputs, call, structs)
