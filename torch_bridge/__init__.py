"""torch_bridge: the operations of moe_align_jax on PyTorch tensors.

Imports torch at once and jax only when a call needs it. `torch_bridge.vllm` and
`torch_bridge.sglang` keep the signatures of those projects, so that one import line changes.
"""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "torch_bridge: the import must find PyTorch >= 2.11; got none. "
        "Install the extra: pip install 'moe-align-jax[torch]' (in a checkout: pip install -e '.[torch]')."
    ) from error

from moe_align_jax.types import AlignedBlocks as AlignedBlocks
from torch_bridge import sglang as sglang
from torch_bridge import vllm as vllm
from torch_bridge._direct.store import Miss as Miss
from torch_bridge._direct.warmup import warmup as warmup
from torch_bridge._moe.warmup import warmup_fused_moe as warmup_fused_moe
from torch_bridge._plan import Plan as Plan
from torch_bridge.align import align_blocks as align_blocks
from torch_bridge.align import explain as explain
from torch_bridge.align import moe_align_block_size as moe_align_block_size
from torch_bridge.dlpack import to_jax as to_jax
from torch_bridge.dlpack import to_torch as to_torch
from torch_bridge.moe import explain_fused_moe as explain_fused_moe
from torch_bridge.moe import explain_grouped_matmul as explain_grouped_matmul
from torch_bridge.moe import fused_moe as fused_moe
from torch_bridge.moe import grouped_matmul as grouped_matmul

__all__ = [
    "AlignedBlocks",
    "Miss",
    "Plan",
    "align_blocks",
    "explain",
    "explain_fused_moe",
    "explain_grouped_matmul",
    "fused_moe",
    "grouped_matmul",
    "moe_align_block_size",
    "sglang",
    "to_jax",
    "to_torch",
    "vllm",
    "warmup",
    "warmup_fused_moe",
]
