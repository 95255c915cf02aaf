"""The expert layer's kernels on a machine without a GPU: what they do, in NumPy, on the very memory.

Arrays that a kernel copies by TMA are found by their descriptors alone, the others by their pointers; a launch
that a GPU would not take is an AssertionError.
"""

import ctypes
import math
from typing import Any

import ml_dtypes
import numpy as np

from moe_align_jax._grouped_matmul.direct_problem import NUM_PAIRS, NUM_ROWS, DirectMatmul
from torch_bridge._direct import compile_worker, host_code

_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
_CODES = {"bfloat16": 9, "float16": 6, "float32": 7}
_BY_VALUE = (NUM_ROWS, NUM_PAIRS, "num_tokens")


def launch_of(kernel: Any, problem: Any) -> compile_worker.KernelLaunch:
    """As the compiler reads it from Mosaic's host code."""
    shapes, maps = {**kernel.inputs, **kernel.outputs}, []
    if isinstance(problem, DirectMatmul):
        by_tma = ["w", "gate", "up", "out"] + ["x"] * (not problem.problem.top_k)
        for name in by_tma:
            if name in shapes:
                maps.append(_map_of(name, shapes[name], problem, kernel.rows))
    passed = [name for name in shapes if name not in [one["buffer"] for one in maps]]
    if maps:
        passed.insert(len(passed) // 2, host_code.TENSOR_MAPS)
    return compile_worker.KernelLaunch(
        *(kernel.name, (132, 1, 1), (1, 1, 1), (384, 1, 1), 4096, tuple(passed), tuple(maps)),
        waits=False,
    )


def _map_of(name: str, shape: tuple, problem: DirectMatmul, rows: dict[str, str]) -> dict:
    dtype = problem.problem.out_dtype if name == "out" else problem.problem.dtype
    item = 4 if dtype == "float32" else 2
    sizes = tuple(reversed(shape))
    strides = tuple(item * math.prod(sizes[:k]) for k in range(1, len(sizes)))
    found = host_code.TensorMap(name, _CODES[dtype], sizes, strides, (8,) * len(sizes), 3)
    return (found.with_rows(rows[name], shape) if name in rows else found)._asdict()


def run(fake: Any, kernel: Any, problem: Any, how: Any, pointers: Any) -> None:
    places, sizes = {}, {}
    for name, pointer in zip(how.parameters, pointers, strict=True):
        if name == host_code.TENSOR_MAPS:
            assert pointer % 64 == 0
            for k, one in enumerate(how.tensor_maps):
                number = ctypes.c_uint64.from_address(pointer + 128 * k).value
                places[one["buffer"]] = _described(fake.described[number], one, sizes)
            continue
        value = ctypes.c_uint64.from_address(pointer).value
        if name in _BY_VALUE:
            assert value % 256 == 0
            sizes[name] = value >> 8
        else:
            assert value % 256 == 0 and value, name
            places[name] = value
    if isinstance(problem, DirectMatmul):
        _multiply(problem, places, sizes)
    else:
        _add_up(problem, places, sizes)


def _described(found: tuple, one: dict, sizes: dict) -> int:
    """The address in a descriptor, which must be that of the kernel; notes its rows."""
    dtype, address, lengths, strides, box, swizzle = found
    wanted = list(one["sizes"])
    if one["rows"]:
        sizes[one["rows"]] = wanted[one["axis"]] = lengths[one["axis"]]
    assert (dtype, list(lengths), box, swizzle) == (
        *(one["dtype"], wanted, tuple(one["box"])),
        one["swizzle"],
    )
    assert strides[: len(strides) - 1] == tuple(one["strides"]) and address % 16 == 0 and address
    return address


def _array(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = (ctypes.c_uint8 * max(size, 1)).from_address(address)
    return np.frombuffer(memory, np.uint8)[:size].view(dtype).reshape(shape)


def _multiply(direct: DirectMatmul, places: dict[str, int], sizes: dict[str, int]) -> None:
    """Row by row of the blocks in use."""
    problem, weights = direct.problem, direct.problem.weights
    rows, dtype = sizes[NUM_ROWS], _DTYPES[problem.dtype]
    assert rows <= problem.num_rows
    blocks = -(-rows // problem.block_size)
    count = int(_array(places["num_tokens_post_padded"], (1,), np.int32)[0])
    experts = _array(places["expert_ids"], (blocks,), np.int32)
    ids = None
    if "sorted_token_ids" in places:
        ids = _array(places["sorted_token_ids"], (rows,), np.int32)
    tokens = sizes[NUM_PAIRS] // problem.top_k if problem.top_k else rows
    x = _array(places["x"], (tokens, problem.k), dtype).astype(np.float32)
    arrays = {
        name: _array(places[name], problem.inputs[name][0], dtype)
        for name in ("w", "gate", "up")
        if name in places
    }
    out = _array(places["out"], (rows, problem.n), _DTYPES[problem.out_dtype])
    bias = None
    if weights.bias:
        bias = _array(places["bias"], direct.inputs["bias"], np.float32)
    scale = np.ones(rows, np.float32)
    if problem.row_weights:
        scale = _array(places["row_weights"], (rows,), np.float32)
    assert count <= rows
    for row in range(count):
        expert = experts[row // problem.block_size]
        pair = row if ids is None else int(ids[row])
        limit = sizes.get(NUM_PAIRS, rows) if problem.top_k else None
        holds = 0 <= expert < problem.num_experts
        if problem.top_k:
            holds = holds and 0 <= pair < limit
        elif ids is not None:
            holds = holds and 0 <= pair < ids[-1]
        if not holds:
            out[row] = 0
            continue
        source = x[pair // problem.top_k] if problem.top_k else x[row]
        parts = []
        for w in arrays.values():
            matrix = w[expert].astype(np.float32)
            parts.append(source @ (matrix.T if weights.transposed else matrix))
        product = np.concatenate(parts)
        out[row] = _finish(problem, product, None if bias is None else bias[expert]) * scale[row]


def _finish(problem: Any, product: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    weights, n = problem.weights, problem.n
    if not weights.gated:
        product = product if bias is None else product + bias[:n]
        return product if weights.activation is None else _activate(weights, product)
    gate, up = product[:n], product[n:]
    if weights.interleaved:
        gate, up = product[0::2], product[1::2]
    if bias is not None:
        if weights.interleaved and not weights.transposed:
            gate, up = gate + bias[0 : 2 * n : 2], up + bias[1 : 2 * n : 2]
        else:
            half = bias.size // 2
            gate, up = gate + bias[:n], up + bias[half : half + n]
    if weights.swiglu_limit is not None:
        gate = np.minimum(gate, weights.swiglu_limit)
        up = np.clip(up, -weights.swiglu_limit, weights.swiglu_limit)
    if weights.swiglu_alpha is not None:
        return gate / (1 + np.exp(-weights.swiglu_alpha * gate)) * (up + 1)
    return _activate(weights, gate) * up


def _activate(weights: Any, x: np.ndarray) -> np.ndarray:
    if weights.activation == "relu2":
        return np.maximum(x, 0) ** 2
    assert weights.activation == "silu"
    return x / (1 + np.exp(-x))


def _add_up(problem: Any, places: dict[str, int], sizes: dict[str, int]) -> None:
    tokens, top_k = sizes["num_tokens"], problem.top_k
    assert tokens <= problem.num_tokens
    row_of_pair = _array(places["row_of_pair"], (tokens, top_k), np.int32)
    weights = _array(places["weights"], (tokens, top_k), np.float32)
    rows = int(row_of_pair.max(initial=-1)) + 1
    y = _array(places["y"], (rows, problem.width), _DTYPES[problem.dtype])
    out = _array(places["out"], (tokens, problem.width), _DTYPES[problem.out_dtype])
    for token in range(tokens):
        total = np.zeros(problem.width, np.float32)
        for k in range(top_k):
            if row_of_pair[token, k] >= 0:
                total += weights[token, k] * y[row_of_pair[token, k]].astype(np.float32)
        out[token] = total
