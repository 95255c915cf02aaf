"""Calls of vLLM's router and of its two other aligned ops, for the sanitizers (sanitize.py).

Each result is compared with NumPy, as the programs' own self-tests do. On a CPU the same calls run by torch
and jax.
"""

from collections.abc import Callable

import numpy as np
import torch

from moe_align_jax._align.vllm import selftest as aligned
from moe_align_jax._align.vllm.problem import AdaptersProblem, ReceivedProblem
from moe_align_jax._router import selftest as routed
from moe_align_jax._router.problem import RouteProblem
from torch_bridge import vllm

_ROUTERS = (
    RouteProblem(9, 256, 8, "float32", renormalize=True, with_order=True, id_words=2),
    RouteProblem(
        33, 37, 5, "bfloat16", "sigmoid", bias_rows=1, renormalize=True, with_order=True,
        has_padding=True, keeps_weights=True,
    ),
    RouteProblem(
        17, 64, 6, "float16", "none", bias_rows=1, num_groups=8, topk_groups=4, scaling_factor=2.5,
        renormalize=True,
    ),
)  # fmt: skip
# The forms "warp", "block" and "cluster", then "grid"; capacities are only bounds.
_RECEIVED = (
    ReceivedProblem(32, 32, 16, 512, 8, with_scatter=True),
    ReceivedProblem(504, 32, 16, 1024, 8, psum_words=2, num_ranks=3),
    ReceivedProblem(1000, 32, 64, 4000, 8, with_scatter=True),
    ReceivedProblem(8208, 32, 4, 8400, 8),
)
_ADAPTERS = (
    AdaptersProblem(32, 16, 4, 96, 4, 3, 4, whole_rows=True),
    AdaptersProblem(504, 64, 16, 1500, 8, 3, 4, 2, has_expert_map=True),
    AdaptersProblem(1024, 64, 16, 2000, 8, 2, 3, whole_rows=True),
    AdaptersProblem(8208, 64, 8, 8700, 8, 2, 3, whole_rows=True),
)


def router(device: str) -> None:
    for problem in _ROUTERS:
        tokens = problem.num_tokens
        given = routed.arrays(problem, tokens)
        dtype = getattr(torch, problem.dtype)
        logits = torch.from_numpy(given["logits"].astype(np.float32)).to(device).to(dtype)
        bias = padding = None
        if problem.bias_rows:
            bias = torch.from_numpy(given["correction_bias"]).to(device)
        if problem.has_padding:
            padding = torch.from_numpy(given["is_padding"][:tokens] != 0).to(device)
        shape, ids = (tokens, problem.top_k), (torch.int32, torch.int64)[problem.id_words - 1]
        out = [
            torch.empty(shape, dtype=x, device=device) for x in (torch.float32, ids, torch.int32)
        ]
        scale = problem.scaling_factor
        if problem.scoring == "softmax":
            vllm.topk_softmax(*out, logits, True, bias, padding)
        elif problem.scoring == "sigmoid":
            vllm.topk_sigmoid(*out, logits, True, bias, scale, padding)
        else:
            groups = (problem.num_groups, problem.topk_groups, problem.top_k)
            out = [*vllm.grouped_topk(logits, *groups, True, scale, bias, 0)]  # no indices
        names = ("topk_weights", "topk_ids", "token_expert_indices")
        got = {name: x.cpu().numpy() for name, x in zip(names[: len(out)], out, strict=True)}
        assert routed.mismatch(problem, given, got) == "", problem


def globalize(device: str) -> None:
    for problem in _RECEIVED:
        example = aligned.example(problem, problem.num_pairs, 0)
        sizes = example.sizes
        ids = torch.from_numpy(example.inputs["local_ids"].reshape(-1, problem.top_k)).to(device)
        psum = torch.from_numpy(example.inputs["psum"]).to(device)
        out = {name: torch.from_numpy(x).to(device) for name, x in example.buffers.items()}
        first = sizes["first_expert"]
        numbers = (first, first + sizes["bound"], problem.num_experts, problem.block_size)
        vllm.fused_globalize_align_block_size(ids, psum, *numbers, *out.values())
        for name, x in {**out, "topk_idx": ids}.items():
            want = example.expected[name]
            np.testing.assert_array_equal(x.cpu().numpy().ravel(), want, f"{name} of {problem}")


def lora(device: str) -> None:
    for problem in _ADAPTERS:
        example = aligned.example(problem, problem.num_pairs, 0)
        given = {name: torch.from_numpy(x).to(device) for name, x in example.inputs.items()}
        out = {name: torch.from_numpy(x).to(device) for name, x in example.buffers.items()}
        blocks = out["expert_ids"].numel() // problem.num_adapters
        vllm.moe_lora_align_block_size(
            given["topk_ids"].view(-1, problem.top_k),
            given["token_lora_mapping"],
            problem.num_experts,
            problem.block_size,
            problem.num_adapters,
            example.sizes["capacity"],
            blocks,
            *out.values(),
            given["adapter_enabled"],
            given["lora_ids"],
            given.get("expert_map"),
        )
        for name, x in out.items():
            want = example.expected[name]
            np.testing.assert_array_equal(x.cpu().numpy(), want, f"{name} of {problem}")


STEPS: dict[str, Callable[[str], None]] = {
    "vLLM's router": router,
    "vLLM's globalize": globalize,
    "vLLM's lora": lora,
}
