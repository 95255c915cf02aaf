"""moe_align_block_size on a GPU: count -> scan -> scatter, in one form per size."""

import importlib

from moe_align_jax._align.tables import BlockAlignMosaicConfig
from moe_align_jax._simt.language import Program
from moe_align_jax.types import AlignProblem, BatchedAlignProblem


def build(
    problem: AlignProblem | BatchedAlignProblem,
    config: BlockAlignMosaicConfig,
    *,
    batched: bool = False,
) -> Program:
    """The kernels that solve `problem`.

    Args:
        problem: what to compute.
        config: the form and its sizes.
        batched: rows of a vmapped batch lie one after the other, so that an output may start at any
            word: its 16-byte stores become 4-byte ones unless its length is a multiple of 4.
    """
    form = importlib.import_module(f"moe_align_jax._align.kernels.{config.form}")
    aligned = all(shape[0] % 4 == 0 for shape in problem.outputs.values() if shape[0] > 1)
    return form.build(problem, config, vector=not batched or aligned)
