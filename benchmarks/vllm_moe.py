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
    name = config_name(experts, ffn, device)
    return tuned_or_default(folder, name, tokens, experts, ffn, hidden, top_k, None)


def tuned_or_default(
    folder: str, name: str, tokens: int, *more_of_rule: Any
) -> tuple[dict[str, Any], str]:
    """(Sizes of the kernel, where they are from): of the tuned table `name` the row nearest to `tokens`, or
    what vLLM's rule gives for `tokens` and the arguments behind it."""
    tables = json.loads(Path(folder, CONFIGS).read_text())
    if table := tables.get(name):
        table = {int(key): value for key, value in table.items() if key != "triton_version"}
        return dict(table[min(table, key=lambda key: abs(key - tokens))]), name
    rule = module(folder).get_default_config
    return dict(rule(tokens, *more_of_rule)), "vLLM's default"


def silu_and_mul(folder: str, x: Any, out: Any) -> None:
    """What stands in for vLLM's op: `[., 2 N]` to `[., N]`."""
    _activate(module(folder), x, out)


def _activate(kernels: Any, x: Any, out: Any) -> None:
    total = out.numel()
    grid = (-(-total // BLOCK),)
    kernels.silu_and_mul_kernel[grid](x, out, out.shape[-1], total, BLOCK=BLOCK)


class Layer:
    """`fused_experts` of one size, with its buffers: `run(x, w13, w2, weights, ids, out)`.

    `expert_map` tells which of all experts are here, or is None.
    """

    # Of weights that are not quantised: how sizes are found, and keywords of the kernel.
    choose_config = staticmethod(choose_config)
    keywords: dict[str, Any] = {"use_fp8_w8a8": False, "SWAP_AB": False}

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

        torch.ops.load_library(str(Path(folder, LIBRARY).resolve()))
        self.torch, self.kernels = torch, module(folder)
        device = torch.cuda.get_device_name()
        sizes = tokens, top_k, experts, hidden, ffn
        self.config, self.source = self.choose_config(folder, *sizes, device)
        self.top_k, self.pairs, self.expert_map = top_k, tokens * top_k, expert_map
        self.of = experts if expert_map is None else len(expert_map)
        self.aligns = self.pairs * 4 > self.of or expert_map is not None
        self.block = self.config["BLOCK_SIZE_M"]
        bf16: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
        shared = torch.empty(self.pairs * max(2 * ffn, hidden), **bf16)
        self.first = shared[: self.pairs * 2 * ffn].view(tokens, top_k, 2 * ffn)
        self.second = shared[: self.pairs * hidden].view(tokens, top_k, hidden)
        self.between = torch.empty(self.pairs, ffn, **bf16)
        int32: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
        if self.aligns:
            capacity = self.pairs + min(self.pairs, self.of) * (self.block - 1)
            self.sorted = torch.empty(capacity, **int32)
            self.experts = torch.empty(-(-capacity // self.block), **int32)
        self.count = torch.empty(1, **int32)

    def run(self, x: Any, w13: Any, w2: Any, weights: Any, ids: Any, out: Any) -> None:
        rows = self.rows(x, 0)
        if self.aligns:
            op = self.torch.ops._moe_C.moe_align_block_size
            spare = len(op.default._schema.arguments) - 7
            arrays = (self.sorted, self.experts, self.count, self.expert_map)
            op(ids, self.of, self.block, *arrays, *[None] * spare)
            blocks = self.sorted, self.experts
        else:
            self.count.fill_(self.pairs * self.block)
            blocks = None, ids.view(-1)
        self._multiply(rows, w13, self.first, weights, *blocks, self.top_k, False)
        _activate(self.kernels, self.first, self.between)
        rows = self.rows(self.between, 1)
        if self.expert_map is not None:
            self.second.zero_()
        self._multiply(rows, w2, self.second, weights, *blocks, 1, True)
        self.torch.ops._moe_C.moe_sum(self.second, out)

    def rows(self, x: Any, which: int) -> Any:
        """The first operand of a product, 0 or 1."""
        del which
        return x

    def operands(self, rows: Any, matrices: Any) -> tuple[Any, Any, tuple[Any, ...], list[int]]:
        """(rows, matrices, scales of both, strides of the scales and, at the end, sizes of their blocks)."""
        return rows, matrices, (None, None), [0] * 9

    def _multiply(
        self,
        rows_of: Any,
        matrices: Any,
        c: Any,
        weights: Any,
        sorted_ids: Any,
        expert_ids: Any,
        top_k: int,
        weighted: bool,
    ) -> None:
        """As vLLM's `invoke_fused_moe_triton_kernel` calls it."""
        import triton.language as tl

        a, b, scales, strides = self.operands(rows_of, matrices)
        config = self.config | self.keywords
        config["SPLIT_K"] = 1
        block = config["BLOCK_SIZE_M"]
        rows = self.pairs * block if sorted_ids is None else sorted_ids.shape[0]
        if sorted_ids is not None and a.shape[0] < block:
            rows = min(rows, a.shape[0] * top_k * block)
        n, k = b.shape[1], b.shape[2]
        grid = (-(-rows // block) * -(-n // config["BLOCK_SIZE_N"]),)
        self.kernels.fused_moe_kernel[grid](
            *(a, b, c, None, *scales, weights, sorted_ids, expert_ids, self.count),
            *(n, k, rows, a.shape[0] * top_k),
            *(a.stride(0), a.stride(1), b.stride(0), b.stride(2), b.stride(1)),
            *(c.stride(1), c.stride(2)),
            *strides,
            MUL_ROUTED_WEIGHT=weighted,
            top_k=top_k,
            compute_type=tl.bfloat16,
            use_int8_w8a8=False,
            use_int8_w8a16=False,
            per_channel_quant=False,
            naive_block_assignment=sorted_ids is None,
            HAS_BIAS=False,
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
