"""The expert layer's kernels on a machine without a GPU: what they do, in NumPy, on the very memory.

Arrays that a kernel copies by TMA are found by their descriptors alone, the others by their pointers. A
launch that a GPU would not take is an AssertionError.
"""

import ctypes
import math
from typing import Any

import ml_dtypes
import numpy as np

from moe_align_jax._grouped_matmul.direct_problem import (
    LAUNCH_VALUES,
    NUM_PAIRS,
    NUM_ROWS,
    SCALE_PITCH,
    DirectMatmul,
)
from moe_align_jax._grouped_matmul.shape import shape_of
from torch_bridge._direct import compile_worker, host_code

_DTYPES = {
    **{"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32},
    **{"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "int32": np.int32},
}
_CODES = {"bfloat16": 9, "float16": 6, "float32": 7, "float8_e4m3fn": 0, "int32": 3}
_BY_VALUE = (*LAUNCH_VALUES, "num_tokens")


def launch_of(kernel: Any, problem: Any) -> compile_worker.KernelLaunch:
    """As the compiler reads it from Mosaic's host code."""
    shapes, maps = {**kernel.inputs, **kernel.outputs}, []
    if isinstance(problem, DirectMatmul):
        by_tma = ["w", "gate", "up", "out"] + ["x"] * (not problem.problem.top_k)
        scales = problem.problem.scales
        if scales and scales.x == "column_major":
            if not shape_of(problem.problem, problem.tiles).scales_by_rows:
                by_tma.append("x_scales")
        for name in by_tma:
            if name in shapes:
                maps.append(_map_of(name, shapes[name], problem, kernel))
    passed = [name for name in shapes if name not in [one["buffer"] for one in maps]]
    if maps:
        passed.insert(len(passed) // 2, host_code.TENSOR_MAPS)
    return compile_worker.KernelLaunch(
        *(kernel.name, (132, 1, 1), (1, 1, 1), (384, 1, 1), 4096, tuple(passed), tuple(maps)),
        waits=False,
    )


def _map_of(name: str, shape: tuple, problem: DirectMatmul, kernel: Any) -> dict:
    dtype = problem.problem.out_dtype
    if name != "out":
        dtype = problem.problem.inputs[name][1]
    item = np.dtype(_DTYPES[dtype]).itemsize
    sizes = tuple(reversed(shape))
    strides = tuple(item * math.prod(sizes[:k]) for k in range(1, len(sizes)))
    found = host_code.TensorMap(name, _CODES[dtype], sizes, strides, (8,) * len(sizes), 3)
    if name in kernel.rows:
        found = found.with_rows(kernel.rows[name], shape)
    elif name in kernel.pitches:
        found = found.with_pitch(kernel.pitches[name], shape)
    return found._asdict()


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
    steps = tuple(one["strides"])
    if one["rows"] and one["axis"] == 0:
        steps = tuple(step // one["sizes"][0] * lengths[0] for step in steps)
    assert strides[: len(strides) - 1] == steps and all(step % 16 == 0 for step in steps)
    assert address % 16 == 0 and address
    return address


def _array(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = (ctypes.c_uint8 * max(size, 1)).from_address(address)
    return np.frombuffer(memory, np.uint8)[:size].view(dtype).reshape(shape)


def _matrix(problem: Any, places: dict[str, int], name: str, expert: int) -> np.ndarray:
    """float32: an array of weights of one expert, scaled. Others may not be in memory."""
    _, *shape = problem.inputs[name][0]
    dtype = np.dtype(_DTYPES[problem.dtype])
    place = places[name] + expert * math.prod(shape) * dtype.itemsize
    matrix = _array(place, tuple(shape), dtype).astype(np.float32)
    if problem.scales:
        name = f"{name}_scales"
        _, *blocks = problem.inputs[name][0]
        place = places[name] + expert * math.prod(blocks) * 4
        scales = _array(place, tuple(blocks), np.float32)
        if problem.scales.w == "blocks":
            scales = scales.repeat(128, 0)[: shape[0]].repeat(128, 1)[:, : shape[1]]
        matrix *= scales
    return matrix.T if problem.weights.transposed else matrix


def _row_scales(problem: Any, address: int, first: int, rows: int, pitch: int) -> np.ndarray:
    """float32 `[rows, k]`, of rows from `first` on; `pitch` of scales by columns."""
    if problem.scales.x == "tensor":
        return _array(address, (1,), np.float32)
    shape, dtype = problem.inputs["x_scales"]
    words = shape[-1 if problem.scales.x == "row_major" else -2]
    if problem.scales.x == "row_major":
        found = _array(address + first * words * 4, (rows, words), _DTYPES[dtype])
    else:
        found = _array(address, (words, pitch), _DTYPES[dtype])[:, first : first + rows].T
    if problem.scales.packed:
        exponents = np.ascontiguousarray(found).view(np.uint8)
        found = (exponents.astype(np.int32) << 23).view(np.float32)
    return np.repeat(found, 128, axis=1)[:, : problem.k]


def _tiles(direct: DirectMatmul, places: dict[str, int]) -> list[tuple[int, int, int]]:
    """(Expert, first row, end) of each."""
    problem, bm = direct.problem, direct.tiles.bm
    if not direct.tiles.finds:
        [count] = _array(places["count"], (1,), np.int32)
        listed = [_array(places[name], (count,), np.int32) for name in ("expert", "start", "end")]
        return list(zip(*map(np.ndarray.tolist, listed), strict=True))
    found = []
    for expert, used in enumerate(_array(places["masked_m"], (problem.num_experts,), np.int32)):
        first = expert * problem.max_rows
        end = first + min(max(int(used), 0), problem.max_rows)
        found += [(expert, row, end) for row in range(first, end, bm)]
    return found


def _multiply_tiles(direct: DirectMatmul, places: dict[str, int]) -> None:
    """Row by row of the tiles that are listed, or that `masked_m` makes, of the masked layout."""
    problem, bm = direct.problem, direct.tiles.bm
    dtype, most = np.dtype(_DTYPES[problem.dtype]), problem.max_rows
    for expert, start, end in _tiles(direct, places):
        rows = min(start + bm, end) - start
        assert start // most == expert == (start + rows - 1) // most
        place = places["x"] + start * problem.k * dtype.itemsize
        x = _array(place, (rows, problem.k), dtype).astype(np.float32)
        if problem.scales:
            address, first, pitch = places["x_scales"], start, problem.scales.pitch
            if pitch:
                first, words = start - expert * most, problem.inputs["x_scales"][0][1]
                address += expert * words * pitch * 4
            x = x * _row_scales(problem, address, first, rows, pitch)
        product = x @ _matrix(problem, places, "w", expert)
        out_dtype = np.dtype(_DTYPES[problem.out_dtype])
        place = places["out"] + start * problem.n * out_dtype.itemsize
        out = _array(place, (rows, problem.n), out_dtype)
        for row in range(rows):
            out[row] = _finish(problem, product[row], None)


def _multiply(direct: DirectMatmul, places: dict[str, int], sizes: dict[str, int]) -> None:
    """Row by row of the blocks in use."""
    problem, weights = direct.problem, direct.problem.weights
    if problem.rows == "masked":
        return _multiply_tiles(direct, places)
    rows, dtype = sizes[NUM_ROWS], _DTYPES[problem.dtype]
    assert rows <= problem.num_rows
    blocks = -(-rows // problem.block_size)
    if problem.row_labels:
        count = rows
        experts = _array(places["expert_ids"], (rows,), np.int32)[:: problem.block_size]
    else:
        count = int(_array(places["num_tokens_post_padded"], (1,), np.int32)[0])
        experts = _array(places["expert_ids"], (blocks,), np.int32)
    ids = None
    if "sorted_token_ids" in places:
        ids = _array(places["sorted_token_ids"], (rows,), np.int32)
    tokens = sizes[NUM_PAIRS] // problem.top_k if problem.top_k else rows
    x = _array(places["x"], (tokens, problem.k), dtype).astype(np.float32)
    names = [name for name in ("w", "gate", "up") if name in places]
    if problem.scales:
        pitch = sizes.get(SCALE_PITCH, 0)
        assert pitch % 4 == 0
        x = x * _row_scales(problem, places["x_scales"], 0, tokens, pitch)
    matrices: dict[tuple[str, int], np.ndarray] = {}
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
        limit = sizes.get(NUM_PAIRS, rows) if problem.counts_pairs else None
        holds = 0 <= expert < problem.num_experts
        if ids is not None and problem.counts_pairs:
            holds = holds and 0 <= pair < limit
        elif ids is not None:
            holds = holds and 0 <= pair < ids[-1]
        if not holds:
            left = problem.leaves_padding and ids is not None and not 0 <= pair < limit
            out[row] = np.nan if left else 0
            continue
        source = x[pair // problem.top_k] if problem.top_k else x[row]
        parts = []
        for name in names:
            at = name, int(expert)
            if at not in matrices:
                matrices[at] = _matrix(problem, places, *at)
            parts.append(source @ matrices[at])
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
