"""vLLM's expert layer in e4m3 with scales of 128 x 128: what `fused_experts` launches for `use_fp8_w8a8`.

Its Triton kernel is cut out of vLLM's own file, by `benchmarks.vllm_moe`, with the tuned sizes of the wheel
and its rule for which operand comes first (SWAP_AB). Its casts are in a library of 500 MB, as its activation
is: Triton kernels of ours stand in for both, which move the same bytes.
"""

import functools
import json
import tempfile
from collections.abc import Callable
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
    tables = json.loads(Path(folder, vllm_moe.CONFIGS).read_text())
    name = config_name(experts, ffn, device)
    if table := tables.get(name):
        table = {int(key): value for key, value in table.items() if key != "triton_version"}
        return dict(table[min(table, key=lambda key: abs(key - tokens))]), name
    rule = vllm_moe.module(folder).get_default_config
    block = [GROUP, GROUP]
    return dict(rule(tokens, experts, ffn, hidden, top_k, "fp8_w8a8", block)), "vLLM's default"


def swaps(config: dict[str, Any]) -> bool:
    """vLLM's rule on Hopper."""
    return config["BLOCK_SIZE_M"] < 64 and config["BLOCK_SIZE_N"] >= 64


class Layer:
    """`fused_experts` of one size, with its buffers: `run(x, w13, w2, weights, ids, out)`.

    Each of the weights is (values, scales); `expert_map` tells which of `of` experts are here, or is None.
    """

    def __init__(
        self,
        folder: str,
        tokens: int,
        top_k: int,
        experts: int,
        hidden: int,
        ffn: int,
        expert_map: Any = None,
    ):
        import torch

        torch.ops.load_library(str(Path(folder, vllm_moe.LIBRARY).resolve()))
        self.torch, self.kernels = torch, vllm_moe.module(folder)
        device = torch.cuda.get_device_name()
        sizes = tokens, top_k, experts, hidden, ffn
        self.config, self.source = choose_config(folder, *sizes, device)
        self.sizes, self.pairs, self.expert_map = sizes, tokens * top_k, expert_map
        self.of = experts if expert_map is None else len(expert_map)
        self.aligns = self.pairs * 4 > self.of or expert_map is not None
        self.block = self.config["BLOCK_SIZE_M"]
        bf16: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
        shared = torch.empty(self.pairs * max(2 * ffn, hidden), **bf16)
        self.first = shared[: self.pairs * 2 * ffn].view(tokens, top_k, 2 * ffn)
        self.second = shared[: self.pairs * hidden].view(tokens, top_k, hidden)
        self.between = torch.empty(self.pairs, ffn, **bf16)
        e4m3: dict[str, Any] = {"dtype": torch.float8_e4m3fn, "device": "cuda"}
        self.quantised = [torch.empty(tokens, hidden, **e4m3), torch.empty(self.pairs, ffn, **e4m3)]
        self.scales = [
            torch.empty(q.shape[0], q.shape[1] // GROUP, device="cuda") for q in self.quantised
        ]
        int32: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
        if self.aligns:
            capacity = self.pairs + min(self.pairs, self.of) * (self.block - 1)
            self.sorted = torch.empty(capacity, **int32)
            self.experts = torch.empty(-(-capacity // self.block), **int32)
        self.count = torch.empty(1, **int32)

    def run(self, x: Any, w13: Any, w2: Any, weights: Any, ids: Any, out: Any) -> None:
        torch, (_, top_k, _, _, ffn) = self.torch, self.sizes
        a = self._quantise(x, 0)
        if self.aligns:
            op = torch.ops._moe_C.moe_align_block_size
            spare = len(op.default._schema.arguments) - 7
            arrays = (self.sorted, self.experts, self.count, self.expert_map)
            op(ids, self.of, self.block, *arrays, *[None] * spare)
            sorted_ids, expert_ids = self.sorted, self.experts
        else:
            self.count.fill_(self.pairs * self.block)
            sorted_ids, expert_ids = None, ids.view(-1)
        self._multiply(a, w13, self.first, weights, sorted_ids, expert_ids, top_k, False)
        total = self.pairs * ffn
        block = vllm_moe.BLOCK
        grid = (-(-total // block),)
        self.kernels.silu_and_mul_kernel[grid](self.first, self.between, ffn, total, BLOCK=block)
        a = self._quantise(self.between, 1)
        if self.expert_map is not None:
            self.second.zero_()
        self._multiply(a, w2, self.second, weights, sorted_ids, expert_ids, 1, True)
        torch.ops._moe_C.moe_sum(self.second, out)

    def _quantise(self, x: Any, which: int) -> tuple[Any, Any]:
        q, scales = self.quantised[which], self.scales[which]
        total = scales.numel()
        grid = (-(-total // _GROUPS),)
        _cast()[grid](x, q, scales, total, _LEAST_AMAX, _LARGEST, GROUPS=_GROUPS)
        return q, scales

    def _multiply(
        self,
        rows_of: tuple[Any, Any],
        matrices: tuple[Any, Any],
        c: Any,
        weights: Any,
        sorted_ids: Any,
        expert_ids: Any,
        top_k: int,
        weighted: bool,
    ) -> None:
        """As vLLM's `invoke_fused_moe_triton_kernel` calls it; rows and matrices are (values, scales)."""
        import triton.language as tl

        (a, a_scales), (b, b_scales) = rows_of, matrices
        config = dict(self.config)
        config["SPLIT_K"] = 1
        config["BLOCK_SIZE_K"] = min(config["BLOCK_SIZE_K"], GROUP)
        block = config["BLOCK_SIZE_M"]
        rows = self.pairs * block if sorted_ids is None else sorted_ids.shape[0]
        if sorted_ids is not None and a.shape[0] < block:
            rows = min(rows, a.shape[0] * top_k * block)
        n, k = b.shape[1], b.shape[2]
        grid = (-(-rows // block) * -(-n // config["BLOCK_SIZE_N"]),)
        self.kernels.fused_moe_kernel[grid](
            *(a, b, c, None, a_scales, b_scales, weights, sorted_ids, expert_ids, self.count),
            *(n, k, rows, a.shape[0] * top_k),
            *(a.stride(0), a.stride(1), b.stride(0), b.stride(2), b.stride(1)),
            *(c.stride(1), c.stride(2)),
            *(a_scales.stride(0), a_scales.stride(1)),
            *(b_scales.stride(0), b_scales.stride(2), b_scales.stride(1)),
            *(0, 0),
            *(GROUP, GROUP),
            MUL_ROUTED_WEIGHT=weighted,
            top_k=top_k,
            compute_type=tl.bfloat16,
            use_fp8_w8a8=True,
            use_int8_w8a8=False,
            use_int8_w8a16=False,
            per_channel_quant=False,
            naive_block_assignment=sorted_ids is None,
            HAS_BIAS=False,
            SWAP_AB=swaps(config),
            USE_TD=False,
            **config,
        )


def calls(
    layer: Layer, x: Any, sets: Any, weights: Any, ids: Any, outs: Any
) -> list[Callable[[], None]]:
    """A call per set of weights."""
    return [
        functools.partial(layer.run, x, w13, w2, weights, ids, out)
        for (w13, w2), out in zip(sets, outs, strict=True)
    ]
