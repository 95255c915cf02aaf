"""What `_plan.resolve` decides of a call, and hands down: how it runs, by which program, and why."""

from collections.abc import Mapping
from typing import NamedTuple

from torch_bridge._direct import fast_path
from torch_bridge._direct.problems import KernelProblem
from torch_bridge._specs import Spec


class Plan(NamedTuple):
    """How one call runs.

    Attributes:
        path: "direct", launched on torch's current stream, or "dlpack", through jax.
        implementation: the one of moe_align_jax: "mosaic_gpu" or "xla"; "none" for zero pairs.
        copies: for each argument that is copied (and "outputs" where a result is), why.
        reasons: for each path and implementation not taken, why.
    """

    path: str
    implementation: str
    copies: Mapping[str, str]
    reasons: Mapping[str, str]


class Resolved(NamedTuple):
    """One call, decided.

    Attributes:
        function: the name that its errors begin with.
        spec: what is asked.
        key: how the fast path knows calls that ask for it.
        plan: the path, and why not another.
        problem: on the direct path, which program serves it; None elsewhere.
    """

    function: str
    spec: Spec
    key: fast_path.Key
    plan: Plan
    problem: KernelProblem | None
