"""Self-test of a compiled program of the grouped matrix multiplication against NumPy before its first use."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_align_jax._core.fp8 import GROUP, GROUPS_PER_WORD
from moe_align_jax._grouped_matmul import launch, reference
from moe_align_jax._grouped_matmul.direct_problem import (
    NUM_PAIRS,
    NUM_ROWS,
    SCALE_PITCH,
    DirectMatmul,
)
from moe_align_jax._grouped_matmul.problem import MatmulProblem
from moe_align_jax._grouped_matmul.shape import shape_of

_EXPERTS = 2  # whose weights a trial has
_COLUMNS = 96  # that a trial compares


class Example(NamedTuple):
    """One input of a program, and what it must give, of some columns.

    Attributes:
        inputs: an array for each operand, as far as the self-test reads it.
        sizes: a number for each size that the launch gives.
        outputs: bytes of each result.
        rows: of the result, those that are compared.
        columns: likewise.
        expected: float32 `[rows, columns]`.
    """

    inputs: dict[str, np.ndarray]
    sizes: dict[str, int]
    outputs: dict[str, int]
    rows: np.ndarray
    columns: np.ndarray
    expected: np.ndarray


def examples(direct: DirectMatmul) -> Iterator[Example]:
    """Of some blocks of the first two experts; of a masked layout, of their first rows; of tiles of several
    heights, of a run that is cut into two, and of the lowest one.

    Values are small multiples of an eighth, so that sums of products are exact in float32. Scales are
    powers of two.
    """
    rng = np.random.default_rng(0)
    problem = direct.problem
    given, experts = problem.inputs, min(_EXPERTS, problem.num_experts)
    arrays = {}
    for name, (shape, dtype) in given.items():
        if name in ("w", "gate", "up"):
            arrays[name] = _integers(rng, (experts, *shape[1:]), dtype)
    if problem.weights.bias:
        arrays["bias"] = _integers(rng, (problem.num_experts, problem.w_columns), "float32")
    expert_of_row, used, sizes = _rows(rng, direct, experts, arrays)
    if direct.sized_at_launch:
        x_rows = sizes[NUM_ROWS]
        if problem.top_k:
            x_rows = sizes[NUM_PAIRS] // problem.top_k
    else:  # whole tiles of the last rows are read
        tiles = -(-13 // direct.tiles.bm) * direct.tiles.bm
        x_rows = problem.max_rows * (experts - 1) + min(problem.max_rows, tiles)
    # Eighths, so that what is gated fits into float16.
    x = _integers(rng, (x_rows, problem.k), "float32") / 8
    arrays["x"] = x.astype(jnp.dtype(problem.dtype))
    count = len(expert_of_row)
    source = used
    if problem.top_k:
        source = arrays["sorted_token_ids"][used] // problem.top_k
    columns = np.unique(np.linspace(0, problem.n - 1, _COLUMNS).astype(int))
    wide = _add_scales(rng, direct, experts, arrays, sizes)
    expected = _products(problem, arrays, wide, source, expert_of_row[used], columns)
    if problem.row_weights:
        row_weights = rng.integers(1, 5, count).astype(np.float32) / 4
        arrays["row_weights"] = np.pad(row_weights, (0, direct.spare_rows))
        expected *= row_weights[used, None]
    if "bias" in arrays:
        config = direct.tiles
        bias = launch.bias(problem, shape_of(problem, config), jnp.asarray(arrays["bias"]))
        arrays["bias"] = np.asarray(bias)
    item = jnp.dtype(problem.out_dtype).itemsize
    outputs = {"out": count * problem.n * item}
    inputs = {name: arrays[name] for name in direct.inputs if name in arrays}
    yield Example(inputs, sizes, outputs, used, columns, expected)


def _integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Small ones, of a pattern that is much shorter than the array and fits no row of it."""
    pattern = rng.integers(-2, 3, 65_537).astype(jnp.dtype(dtype))
    return np.resize(pattern, shape)


def _rows(
    rng: np.random.Generator, direct: DirectMatmul, experts: int, arrays: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """(Expert of each row, the rows in use, sizes of the launch); adds the operands that tell them."""
    problem, sizes = direct.problem, {}
    if problem.rows == "masked":
        masked_m = np.zeros(problem.num_experts, np.int32)
        masked_m[:experts] = [min(problem.max_rows, n) for n in (13, 5)][:experts]
        arrays["masked_m"] = masked_m
        count = problem.max_rows * experts
        used = [e * problem.max_rows + np.arange(masked_m[e]) for e in range(experts)]
        return np.arange(count) // problem.max_rows, np.concatenate(used), sizes
    block, blocks = problem.block_size, min(4, problem.num_blocks)
    rows, in_use = min(blocks * block, problem.num_rows), min(3, blocks)
    expert_ids = np.full(blocks, -1, np.int32)
    expert_ids[:in_use] = np.arange(in_use) % experts
    pairs = rows - (block > 1)
    if problem.top_k:
        tokens = max(1, min(problem.num_tokens, pairs // problem.top_k))
        pairs = tokens * problem.top_k
    ids = np.full(rows, pairs, np.int32)
    # The last row of a block holds no pair; of labels, of one block more rows.
    held = np.full(blocks, max(1, block - 1))
    if problem.row_labels:
        held[min(1, in_use - 1)] = min(5, block)
    if direct.tiles.heights and in_use == 3:
        # A run of two blocks is shared by tiles of the second height and the third; then the lowest.
        expert_ids[:in_use] = 0, 0, experts - 1
        held[:in_use] = block, sum(direct.tiles.heights[1:3]) - 3 - block, 5
    holds = np.arange(rows) % block < np.repeat(held, block)[:rows]
    holds &= np.arange(rows) < in_use * block
    if problem.top_k:
        ids[holds] = rng.integers(0, pairs, holds.sum())
    else:
        ids[holds] = np.arange(holds.sum())
    arrays["sorted_token_ids"] = np.pad(ids, (0, direct.spare_rows), constant_values=-1)
    of_rows = np.repeat(expert_ids, block)[:rows]
    arrays["expert_ids"] = np.where(holds, of_rows, -1) if problem.row_labels else expert_ids
    arrays["num_tokens_post_padded"] = np.array([min(in_use * block, rows)], np.int32)
    sizes = {NUM_ROWS: rows, NUM_PAIRS: pairs}
    return of_rows, np.flatnonzero(holds), sizes


def _add_scales(
    rng: np.random.Generator,
    direct: DirectMatmul,
    experts: int,
    arrays: dict[str, np.ndarray],
    sizes: dict[str, int],
) -> dict[str, np.ndarray]:
    """Adds the scales of x and of the weights; returns them as float32 `[rows, G]` and `[experts, ., G]`."""
    problem, scales = direct.problem, direct.problem.scales
    if scales is None:
        return {}
    rows, groups, found = len(arrays["x"]), problem.scale_groups, {}
    for name, (shape, _) in problem.inputs.items():
        if name.endswith("_scales") and name != "x_scales":
            arrays[name] = found[name] = _powers(rng, (experts, *shape[1:]))
    if scales.x == "tensor":
        arrays["x_scales"] = np.full(1, 0.5, np.float32)
        return found | {"x_scales": np.full((rows, groups), 0.5, np.float32)}
    of_rows = found["x_scales"] = _powers(rng, (rows, groups))
    if scales.packed:
        exponents = (of_rows.view(np.int32) >> 23).astype(np.uint8)
        of_rows = np.pad(exponents, ((0, 0), (0, -groups % GROUPS_PER_WORD))).view(np.int32)
    if scales.x == "row_major":
        arrays["x_scales"] = of_rows
        return found
    # The last expert's rows may be a part of them.
    parts, pitch = (1, max(-(-rows // 4) * 4, direct.tiles.bm)), 0
    if problem.rows == "masked":
        parts = experts, scales.pitch
        pitch = problem.max_rows
    else:
        sizes[SCALE_PITCH] = parts[1]
    laid = np.zeros((parts[0], of_rows.shape[1], parts[1]), of_rows.dtype)
    for part in range(parts[0]):
        mine = of_rows[part * pitch : (part + 1) * pitch] if pitch else of_rows
        laid[part, :, : len(mine)] = mine.T
    arrays["x_scales"] = laid if pitch else laid[0]
    return found


def _powers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random powers of two, whose products and sums are exact."""
    return np.exp2(rng.integers(-1, 2, shape)).astype(np.float32)


def _wide(values: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """float32 of values `[., K]` with a scale for each 128 columns, or one for all."""
    values = values.astype(np.float32)
    if scales is None:
        return values
    if scales.shape[1] > 1:
        scales = np.repeat(scales, GROUP, axis=1)[:, : values.shape[1]]
    return values * scales


def _products(
    problem: MatmulProblem,
    arrays: dict[str, np.ndarray],
    scales: dict[str, np.ndarray],
    source: np.ndarray,
    expert: np.ndarray,
    columns: np.ndarray,
) -> np.ndarray:
    """float32 `[rows, columns]`, by the definition of `grouped_matmul`."""
    weights, n = problem.weights, problem.n

    def of_rows(at: np.ndarray) -> np.ndarray:
        return _wide(arrays["x"][at], scales["x_scales"][at] if scales else None)

    def of_columns(name: str, e: int, at: np.ndarray) -> np.ndarray:
        if not weights.transposed:
            return arrays[name][e][:, at].astype(np.float32)
        if not scales:
            return _wide(arrays[name][e][at], None).T
        of_w = scales[f"{name}_scales"][e]
        return _wide(arrays[name][e][at], of_w[at // GROUP] if len(of_w) > 1 else of_w).T

    def product(name: str, at: np.ndarray, bias_at: np.ndarray) -> np.ndarray:
        out = np.empty((len(source), len(at)), np.float32)
        for e in np.unique(expert):
            rows = expert == e
            out[rows] = of_rows(source[rows]) @ of_columns(name, e, at)
            if weights.bias:
                out[rows] += arrays["bias"][e][bias_at]
        return out

    if not weights.gated:
        gate, up = product("w", columns, columns), None
    elif weights.pair:
        gate, up = product("gate", columns, columns), product("up", columns, columns + n)
    elif weights.interleaved:
        gate, up = (product("w", 2 * columns + k, 2 * columns + k) for k in range(2))
    else:
        gate, up = (product("w", columns + k * n, columns + k * n) for k in range(2))
    rounded = jnp.asarray(gate), None if up is None else jnp.asarray(up)
    return np.array(reference.activate(weights, *rounded))


def mismatch(direct: DirectMatmul, example: Example, read: Callable) -> str:
    """What is wrong with the results, or "". `read(name, into)` fetches the beginning of an output."""
    problem, want = direct.problem, example.expected
    item = jnp.dtype(problem.out_dtype)
    got = read(
        "out", np.empty((example.outputs["out"] // item.itemsize // problem.n, problem.n), item)
    )
    got = got[example.rows][:, example.columns].astype(np.float32)
    off, scale = np.abs(got - want), max(1.0, float(np.abs(want).max(initial=0)))
    if not off.size or (off <= np.abs(want) * 2**-6 + scale * 2**-9).all():
        return ""
    at = np.unravel_index(np.argmax(np.nan_to_num(off, nan=np.inf)), off.shape)
    place = [int(example.rows[at[0]]), int(example.columns[at[1]])]
    return f"out{place} is {got[at]}, not {want[at]}"
