"""silu_and_mul_masked_quant on a GPU: which sizes the kernel takes, and its launch."""

import jax

from moe_align_jax._kernels.masked_quant.config import GROUP, Config
from moe_align_jax._kernels.masked_quant.config import config_for as config_for
from moe_align_jax._kernels.masked_quant.config import unsupported as unsupported
from moe_align_jax._quant import MaskedQuantProblem


def run(
    problem: MaskedQuantProblem,
    x: jax.Array,
    masked_m: jax.Array,
    *,
    interpret: bool = False,
    config: Config | None = None,
) -> list[jax.Array]:
    """`[q, scales]`. With `interpret`, by Pallas' own interpreter, on a CPU."""
    from moe_align_jax._kernels.masked_quant import kernel

    shape = (problem.num_experts, problem.max_rows, 2, problem.num_groups, GROUP)
    launch = kernel.build(problem, config or config_for(problem), interpret=interpret)
    q, scales = launch(x.reshape(shape), masked_m)
    return [q.reshape(*shape[:2], problem.width), scales]
