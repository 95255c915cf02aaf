"""vLLM's expert layer out of its files: what `fused_experts` launches, without the engine around it.

`python -m benchmarks.fetch vllm` gets them. Its Triton kernel and its rule for sizes are cut out of
fused_moe.py as they stand; the tuned sizes are the wheel's for the GPU in hand, where it has them; alignment
and sum are its compiled ops. Its activation is in another library, of 93 MB: a Triton kernel of ours stands
in for it, which moves the same bytes.
"""

import ast
import functools
import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE, CONFIGS, LIBRARY = "vllm_fused_moe.py", "vllm_moe_configs.json", "vllm_moe.so"
_HEADER = '''
"""Cut out of vLLM's fused_moe.py."""
import types
import triton
import triton.language as tl

envs = types.SimpleNamespace(VLLM_BATCH_INVARIANT=False)
current_platform = types.SimpleNamespace(is_rocm=lambda: False)
'''
_ACTIVATION = """

@triton.jit
def silu_and_mul_kernel(x_ptr, y_ptr, N, total, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < total
    row, column = at // N, at % N
    gate = tl.load(x_ptr + row * 2 * N + column, mask=there, other=0.0)
    up = tl.load(x_ptr + row * 2 * N + N + column, mask=there, other=0.0)
    value = gate.to(tl.float32)
    value = (value / (1.0 + tl.exp(-value))).to(gate.dtype)
    tl.store(y_ptr + at, value * up, mask=there)
"""
_WANTED = ("write_zeros_to_output", "fused_moe_kernel", "get_default_config")
BLOCK = 2048  # values of a program of the activation


def cut(source: str) -> str:
    """The kernel and the rule for sizes, as a module's text.

    Raises:
        ValueError: the file lacks one of them.
    """
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in _WANTED:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    if missing := [name for name in _WANTED if name not in found]:
        raise ValueError(f"fused_moe.py lacks {', '.join(missing)}")
    parts = [_HEADER, *(found[name] for name in _WANTED), _ACTIVATION]
    return "from typing import Any\n" + "\n\n\n".join(parts)


def load(name: str, path: Path) -> Any:
    """A file as a module. Triton reads a kernel's source from its file: it stays while a process runs."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@functools.cache
def module(folder: str) -> Any:
    """The kernels."""
    text = cut(Path(folder, FILE).read_text())
    path = Path(tempfile.mkdtemp(prefix="vllm_moe_"), "kernels.py")
    path.write_text(text)
    return load("vllm_moe_kernels", path)


def config_name(experts: int, ffn: int, device: str) -> str:
    """The file of tuned sizes for bf16 weights."""
    name = device.replace(" ", "_")
    name = "NVIDIA_H200" if "H200" in name.split("_") else name
    return f"E={experts},N={ffn},device_name={name}.json"


def choose_config(
    folder: str, tokens: int, top_k: int, experts: int, hidden: int, ffn: int, device: str
) -> tuple[dict[str, Any], str]:
    """(Sizes of the kernel, where they are from)."""
    tables = json.loads(Path(folder, CONFIGS).read_text())
    name = config_name(experts, ffn, device)
    if table := tables.get(name):
        table = {int(key): value for key, value in table.items() if key != "triton_version"}
        return dict(table[min(table, key=lambda key: abs(key - tokens))]), name
    rule = module(folder).get_default_config
    return dict(rule(tokens, experts, ffn, hidden, top_k, None)), "vLLM's default"


def silu_and_mul(folder: str, x: Any, out: Any) -> None:
    """What stands in for vLLM's op: `[., 2 N]` to `[., N]`."""
    _activate(module(folder), x, out)


def _activate(kernels: Any, x: Any, out: Any) -> None:
    total = out.numel()
    grid = (-(-total // BLOCK),)
    kernels.silu_and_mul_kernel[grid](x, out, out.shape[-1], total, BLOCK=BLOCK)


class Layer:
    """`fused_experts` of one size, with its buffers: `run(x, w13, w2, weights, ids, out)`."""

    def __init__(self, folder: str, tokens: int, top_k: int, experts: int, hidden: int, ffn: int):
        import torch

        torch.ops.load_library(str(Path(folder, LIBRARY).resolve()))
        self.torch, self.kernels = torch, module(folder)
        device = torch.cuda.get_device_name()
        self.config, self.source = choose_config(
            folder, tokens, top_k, experts, hidden, ffn, device
        )
        self.sizes = (tokens, top_k, experts, hidden, ffn)
        self.pairs = tokens * top_k
        self.aligns = self.pairs * 4 > experts
        self.block = self.config["BLOCK_SIZE_M"]
        bf16: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
        shared = torch.empty(self.pairs * max(2 * ffn, hidden), **bf16)
        self.first = shared[: self.pairs * 2 * ffn].view(tokens, top_k, 2 * ffn)
        self.second = shared[: self.pairs * hidden].view(tokens, top_k, hidden)
        self.between = torch.empty(self.pairs, ffn, **bf16)
        int32: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
        if self.aligns:
            capacity = self.pairs + min(self.pairs, experts) * (self.block - 1)
            self.sorted = torch.empty(capacity, **int32)
            self.experts = torch.empty(-(-capacity // self.block), **int32)
        self.count = torch.empty(1, **int32)

    def run(self, x: Any, w13: Any, w2: Any, weights: Any, ids: Any, out: Any) -> None:
        torch, (_, top_k, experts, _, _) = self.torch, self.sizes
        if self.aligns:
            op = torch.ops._moe_C.moe_align_block_size
            spare = len(op.default._schema.arguments) - 6
            arrays = (self.sorted, self.experts, self.count)
            op(ids, experts, self.block, *arrays, *[None] * spare)
            sorted_ids, expert_ids = self.sorted, self.experts
        else:
            self.count.fill_(self.pairs * self.block)
            sorted_ids, expert_ids = None, ids.view(-1)
        self._multiply(x, w13, self.first, weights, sorted_ids, expert_ids, top_k, False)
        _activate(self.kernels, self.first, self.between)
        self._multiply(self.between, w2, self.second, weights, sorted_ids, expert_ids, 1, True)
        torch.ops._moe_C.moe_sum(self.second, out)

    def _multiply(
        self,
        a: Any,
        b: Any,
        c: Any,
        weights: Any,
        sorted_ids: Any,
        expert_ids: Any,
        top_k: int,
        weighted: bool,
    ) -> None:
        """As vLLM's `invoke_fused_moe_triton_kernel` calls it, for weights that are not quantised."""
        import triton.language as tl

        config = dict(self.config)
        config["SPLIT_K"] = 1
        block = config["BLOCK_SIZE_M"]
        rows = self.pairs * block if sorted_ids is None else sorted_ids.shape[0]
        if sorted_ids is not None and a.shape[0] < block:
            rows = min(rows, a.shape[0] * top_k * block)
        n, k = b.shape[1], b.shape[2]
        grid = (-(-rows // block) * -(-n // config["BLOCK_SIZE_N"]),)
        self.kernels.fused_moe_kernel[grid](
            *(a, b, c, None, None, None, weights, sorted_ids, expert_ids, self.count),
            *(n, k, rows, a.shape[0] * top_k),
            *(a.stride(0), a.stride(1), b.stride(0), b.stride(2), b.stride(1)),
            *(c.stride(1), c.stride(2)),
            *[0] * 9,
            MUL_ROUTED_WEIGHT=weighted,
            top_k=top_k,
            compute_type=tl.bfloat16,
            use_fp8_w8a8=False,
            use_int8_w8a8=False,
            use_int8_w8a16=False,
            per_channel_quant=False,
            naive_block_assignment=sorted_ids is None,
            HAS_BIAS=False,
            SWAP_AB=False,
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
