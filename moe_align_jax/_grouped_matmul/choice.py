"""What select_matmul_implementation and select_moe_implementation say about the implementations."""

from collections.abc import Sequence

from moe_align_jax._grouped_matmul import primitive
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._lowering import select


def reasons(
    problems: Sequence[MatmulProblem], choice: str, implementation: str | None, platform: str
) -> dict[str, str]:
    """Why the implementations other than `choice` do not run `problems`."""
    found = {}
    for other in select.IMPLEMENTATIONS:
        if other == choice:
            continue
        unavailable = [primitive.unavailable(each, other, platform) for each in problems]
        if reason := next(filter(None, unavailable), None):
            found[other] = reason
        elif implementation is not None:
            found[other] = f"implementation={implementation!r} was asked for"
        elif other == "emulator":
            found[other] = "it runs only when named: it is for tests and debugging"
        else:
            found[other] = "the Mosaic GPU kernel runs here: one launch, no loop over blocks"
    return found
