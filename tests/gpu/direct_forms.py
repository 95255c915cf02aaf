"""Calls of torch_bridge on one size: every entry point, both id widths, off a boundary, on two streams.

For the sanitizers (sanitize.py). Inputs are copied to the device: initcheck does not see what a kernel writes
that it does not look at, such as torch's. Every result is compared with the oracle. On a CPU the same calls
run through jax, so that this file is tested without a GPU.
"""

import contextlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

import torch_bridge
from moe_align_jax.types import BatchedAlignProblem
from tests import forms, oracle
from tests.bridge.helpers import sized
from tests.gpu.sanitizer_cases import Case
from torch_bridge import sglang, vllm
from torch_bridge._direct import store

# dtype of the ids, and elements that their view lies behind the start of its memory.
INPUTS = (("int32", 0), ("int32", 3), ("int64", 1))
MORE_ROWS = 77  # of the buffers that are larger than the result


def load(cases: Iterable[Case]) -> None:
    """Compiles what `run` needs of these cases on the current GPU, many at once."""
    index = torch.cuda.current_device()
    tuning = store.here.machine.tuning(torch.device("cuda", index))
    wanted: set[Any] = set()
    for case in cases:
        size, options = case.size, case.options
        if case.name == "batched":
            wanted.add(BatchedAlignProblem(*size, tuning=tuning))
            continue
        for dtype in (torch.int32, torch.int64):
            sizes = (*size, dtype)
            wanted.add(sized(*sizes, tuning=tuning))
            wanted.add(sized(*sizes, minus_one=True, tuning=tuning))
            wanted.add(
                sized(
                    *sizes,
                    expert_map=options["map"],
                    has_num_valid_pairs=options["num_valid_pairs"],
                    return_counts=True,
                    return_inverse=options["return_inverse"],
                    tuning=tuning,
                )
            )
    store.here.prepare(index, list(wanted))


def on(device: str, array: np.ndarray, skip: int = 0) -> torch.Tensor:
    """The values as a view that starts `skip` elements into its memory."""
    flat = np.concatenate([np.full(skip, 10**6, array.dtype), array.ravel()])
    return torch.from_numpy(flat).to(device)[skip:]


def check(got: Any, want: oracle.Expected) -> None:
    """Tensors in the order of the oracle's fields, as many as there are; None for what is absent."""
    for name, tensor in zip(want._fields, got, strict=False):
        if tensor is not None:
            expect = np.asarray(getattr(want, name))
            np.testing.assert_array_equal(tensor.cpu().numpy(), expect, err_msg=name)


def run(device: str, case: Case) -> None:
    """Every entry point on one case, by the tuning table of the device."""
    if case.name == "batched":
        run_batched(device, *case.size)
    else:
        run_form(device, case.size, case.options)


def run_form(device: str, size: forms.Size, options: dict[str, Any]) -> None:
    for dtype, skip in INPUTS:
        ids = forms.ids_of(size, dtype=dtype)
        there = on(device, ids, skip)
        run_options(device, ids, there, size, options)
        run_plain(device, ids, there, size)
        run_sglang(ids, there, size)


def run_options(
    device: str, ids: np.ndarray, there: torch.Tensor, size: forms.Size, options: dict[str, Any]
) -> None:
    """`align_blocks` with these options."""
    local = oracle.local_map("second", size.num_experts, 0) if options["map"] else None
    limit = size.num_pairs // 2 if options["num_valid_pairs"] else None
    given = {
        "block_size": size.block_size,
        "num_experts": size.num_experts,
        "ignore_invalid_experts": options["map"] == "filter",
        "return_inverse": options["return_inverse"],
        "pad_sorted_ids": options["pad_sorted_ids"],
    }
    want = oracle.expected(ids, **given, expert_map=local, num_valid_pairs=limit)
    got = torch_bridge.align_blocks(
        there,
        **given,
        expert_map=None if local is None else on(device, local),
        num_valid_pairs=None if limit is None else on(device, np.array([limit], np.int32)),
        path="direct" if device == "cuda" else "auto",
    )
    check(got, want)


def run_plain(device: str, ids: np.ndarray, there: torch.Tensor, size: forms.Size) -> None:
    """New results, the caller's, and buffers that are larger: on the default stream and on another one."""
    sizes = (size.num_experts, size.block_size)
    want = oracle.expected(ids, block_size=size.block_size, num_experts=size.num_experts)
    out = torch_bridge.moe_align_block_size(there, *sizes)
    check(out, want)
    rows, used = len(want.sorted_token_ids) + MORE_ROWS, len(want.expert_ids)
    lengths = (rows, -(-rows // size.block_size), 1)
    larger = [torch.empty(length, dtype=torch.int32, device=device) for length in lengths]
    for side in (False, True) if device == "cuda" else (False,):
        stream = torch.cuda.Stream() if side else None
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            torch_bridge.moe_align_block_size(there, *sizes, out=out)
            vllm.ops_moe_align_block_size(there, *sizes, *larger)
            fresh = torch_bridge.moe_align_block_size(there, *sizes)
            check(out, want)  # waits for this stream
            check(fresh, want)
            filled = [tensor.cpu().numpy() for tensor in larger]
        fills = ((size.num_pairs, rows - MORE_ROWS), (-1, used), (0, 1))
        for (fill, at), got, expect in zip(fills, filled, want[:3], strict=True):
            np.testing.assert_array_equal(got[:at], expect)
            assert (got[at:] == fill).all()


def run_sglang(ids: np.ndarray, there: torch.Tensor, size: forms.Size) -> None:
    """Its bucket of id -1: as one more expert, of ids that are one higher."""
    shifted = np.where((ids >= -1) & (ids < size.num_experts), ids + 1, -1)
    want = oracle.expected(shifted, block_size=size.block_size, num_experts=size.num_experts + 1)
    got = sglang.moe_align_block_size(there, size.block_size, size.num_experts)
    rows, experts, count = (tensor.cpu().numpy() for tensor in got)
    used = want.num_tokens_post_padded[0]
    assert count.tolist() == [used]
    np.testing.assert_array_equal(rows[:used], want.sorted_token_ids[:used])
    assert (rows[used:] == size.num_pairs).all()
    blocks = used // size.block_size
    np.testing.assert_array_equal(experts[:blocks], np.asarray(want.expert_ids[:blocks]) - 1)
    assert (experts[blocks:] == -1).all()


def run_batched(device: str, num_experts: int, max_tokens: int, block_size: int) -> None:
    counts = np.random.default_rng(0).integers(0, max_tokens + 1, num_experts, np.int32)
    sizes = {"max_tokens_per_batch": max_tokens, "block_size": block_size}
    want = oracle.align_batched(counts.tolist(), **sizes)
    for skip in (0, 1):
        there = on(device, counts, skip)
        check(vllm.batched_moe_align_block_size(max_tokens, block_size, there), want)
