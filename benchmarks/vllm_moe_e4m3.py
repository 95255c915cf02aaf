"""vLLM's expert layer in e4m3 with scales of 128 x 128: what `fused_experts` launches for `use_fp8_w8a8`.

Its Triton kernel is cut out of vLLM's own file, by `benchmarks.vllm_moe`, with the tuned sizes of the wheel
and its rule for which operand comes first (SWAP_AB). Its casts are in a library of 500 MB, as its activation
is: Triton kernels of ours stand in for both, which move the same bytes.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import vllm_moe

GROUP = 128
_LARGEST, _LEAST_AMAX = 448.0, 1e-10
_CAST = '''
"""Rows as e4m3 codes with a scale for each 128 columns."""
import triton
import triton.language as tl


@triton.jit
def quantize_kernel(x_ptr, q_ptr, scale_ptr, total, least, largest, GROUPS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    there = group < total
    at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + at, mask=there[:, None], other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 1), least) / largest
    q = tl.clamp(x / scale[:, None], -largest, largest)
    tl.store(q_ptr + at, q.to(q_ptr.dtype.element_ty), mask=there[:, None])
    tl.store(scale_ptr + group, scale, mask=there)
'''
_GROUPS = 16  # of a program of the cast


@functools.cache
def _cast() -> Any:
    path = Path(tempfile.mkdtemp(prefix="vllm_cast_"), "vllm_cast.py")
    path.write_text(_CAST)
    return vllm_moe.load("vllm_cast", path).quantize_kernel


def config_name(experts: int, ffn: int, device: str) -> str:
    """The file of tuned sizes for e4m3 weights in blocks."""
    stem = vllm_moe.config_name(experts, ffn, device).removesuffix(".json")
    return f"{stem},dtype=fp8_w8a8,block_shape=[{GROUP},{GROUP}].json"


def choose_config(
    folder: str, tokens: int, top_k: int, experts: int, hidden: int, ffn: int, device: str
) -> tuple[dict[str, Any], str]:
    """(Sizes of the kernel, where they are from)."""
    name = config_name(experts, ffn, device)
    of_rule = (experts, ffn, hidden, top_k, "fp8_w8a8", [GROUP, GROUP])
    return vllm_moe.tuned_or_default(folder, name, tokens, *of_rule)


def swaps(config: dict[str, Any]) -> bool:
    """vLLM's rule on Hopper."""
    return config["BLOCK_SIZE_M"] < 64 and config["BLOCK_SIZE_N"] >= 64


class Layer(vllm_moe.Layer):
    """As `vllm_moe.Layer`; each of the weights is (values, scales)."""

    choose_config = staticmethod(choose_config)

    def __init__(
        self, folder: str, tokens: int, top_k: int, experts: int, hidden: int, ffn: int, **options
    ):
        super().__init__(folder, tokens, top_k, experts, hidden, ffn, **options)
        self.keywords = {
            "use_fp8_w8a8": True,
            "SWAP_AB": swaps(self.config),
            "BLOCK_SIZE_K": min(self.config["BLOCK_SIZE_K"], GROUP),
        }
        e4m3: dict[str, Any] = {"dtype": self.torch.float8_e4m3fn, "device": "cuda"}
        shapes = (tokens, hidden), (self.pairs, ffn)
        self.quantised = [self.torch.empty(*shape, **e4m3) for shape in shapes]
        self.scales = [
            self.torch.empty(q.shape[0], q.shape[1] // GROUP, device="cuda") for q in self.quantised
        ]

    def rows(self, x: Any, which: int) -> tuple[Any, Any]:
        q, scales = self.quantised[which], self.scales[which]
        total = scales.numel()
        grid = (-(-total // _GROUPS),)
        _cast()[grid](x, q, scales, total, _LEAST_AMAX, _LARGEST, GROUPS=_GROUPS)
        return q, scales

    def operands(self, rows: Any, matrices: Any) -> tuple[Any, Any, tuple[Any, ...], list[int]]:
        (a, a_scales), (b, b_scales) = rows, matrices
        of_a = (a_scales.stride(0), a_scales.stride(1))
        of_b = (b_scales.stride(0), b_scales.stride(2), b_scales.stride(1))
        return a, b, (a_scales, b_scales), [*of_a, *of_b, 0, 0, GROUP, GROUP]
