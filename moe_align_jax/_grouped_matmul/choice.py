"""Which implementation runs products, and what select_matmul_implementation says about the others."""

from collections.abc import Sequence

from moe_align_jax._grouped_matmul import config
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._lowering import select


def choose(
    function: str, problems: Sequence[MatmulProblem], platform: str, implementation: str | None
) -> tuple[str, dict[str, str]]:
    """(The implementation that runs all of the problems, why each other one does not).

    Raises:
        NotImplementedError: the named one cannot run them for the platform.
    """

    def unsupported() -> str | None:
        return next(filter(None, map(config.unsupported, problems)), None)

    chosen = select.choose(function, platform, implementation, unsupported)
    return chosen, select.reasons_against_others(
        *(chosen, platform, implementation, unsupported),
        better="the Mosaic GPU kernel runs here: one launch, no loop over blocks",
    )
