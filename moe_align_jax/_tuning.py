"""Configurations of the kernels, and which one a size takes. A leaf: imports nothing of ours but types."""

from dataclasses import dataclass

from moe_align_jax.types import AlignProblem, BatchedAlignProblem


@dataclass(frozen=True, kw_only=True)
class BlockAlignMosaicConfig:
    """One way to run `moe_align_block_size` on a GPU.

    Attributes:
        form: "warp", "block", "grid", "radix" or "batched".
        num_warpgroups: warpgroups (of 128 threads) per CTA.
        num_ctas: CTAs of each kernel.
    """

    form: str
    num_warpgroups: int
    num_ctas: int = 1


def config_for(problem: AlignProblem | BatchedAlignProblem) -> BlockAlignMosaicConfig:
    if isinstance(problem, BatchedAlignProblem):
        return BlockAlignMosaicConfig(form="batched", num_warpgroups=4, num_ctas=16)
    return BlockAlignMosaicConfig(form="grid", num_warpgroups=8, num_ctas=32)
