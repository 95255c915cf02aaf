"""DeepGEMM's grouped products on our kernels: its names, its signatures, its tensors.

    import torch_bridge.deep_gemm as deep_gemm

in place of `import deep_gemm`: what SGLang 0.5.23 and vLLM 0.33 call of it for experts. See docs/fp8.md.
"""

from torch_bridge.deep_gemm.products import (
    fp8_m_grouped_gemm_nt_masked as fp8_m_grouped_gemm_nt_masked,
)
from torch_bridge.deep_gemm.products import (
    m_grouped_bf16_gemm_nt_contiguous as m_grouped_bf16_gemm_nt_contiguous,
)
from torch_bridge.deep_gemm.products import (
    m_grouped_bf16_gemm_nt_masked as m_grouped_bf16_gemm_nt_masked,
)
from torch_bridge.deep_gemm.products import (
    m_grouped_fp8_gemm_nt_contiguous as m_grouped_fp8_gemm_nt_contiguous,
)
from torch_bridge.deep_gemm.products import (
    m_grouped_fp8_gemm_nt_masked as m_grouped_fp8_gemm_nt_masked,
)
from torch_bridge.deep_gemm.scales import (
    get_mk_alignment_for_contiguous_layout as get_mk_alignment_for_contiguous_layout,
)
from torch_bridge.deep_gemm.scales import (
    get_mn_major_tma_aligned_tensor as get_mn_major_tma_aligned_tensor,
)
from torch_bridge.deep_gemm.scales import (
    get_theoretical_mk_alignment_for_contiguous_layout as get_theoretical_mk_alignment_for_contiguous_layout,
)
from torch_bridge.deep_gemm.scales import get_tma_aligned_size as get_tma_aligned_size
from torch_bridge.deep_gemm.scales import (
    set_mk_alignment_for_contiguous_layout as set_mk_alignment_for_contiguous_layout,
)
from torch_bridge.deep_gemm.scales import (
    transform_sf_into_required_layout as transform_sf_into_required_layout,
)

__all__ = [
    "fp8_m_grouped_gemm_nt_masked",
    "get_mk_alignment_for_contiguous_layout",
    "get_mn_major_tma_aligned_tensor",
    "get_theoretical_mk_alignment_for_contiguous_layout",
    "get_tma_aligned_size",
    "m_grouped_bf16_gemm_nt_contiguous",
    "m_grouped_bf16_gemm_nt_masked",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "set_mk_alignment_for_contiguous_layout",
    "transform_sf_into_required_layout",
]
