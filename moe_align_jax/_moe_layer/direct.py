"""The kernel of the layer's weighted sum for a launch outside XLA (`torch_bridge`), and its self-test."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_align_jax._layout.kernels import weighted_sum
from moe_align_jax._layout.kernels.sizes import RowSum, sum_config, sum_unsupported
from moe_align_jax._lowering.direct_kernel import DirectKernel
from moe_align_jax._moe_layer.direct_problem import DirectSum


def kernels(direct: DirectSum) -> tuple[DirectKernel, ...]:
    """The one kernel. NotImplementedError where there is none."""
    num_rows = direct.inputs["y"][0]
    problem = RowSum(
        *(direct.num_tokens, direct.top_k, num_rows, direct.width),
        *(direct.dtype, direct.out_dtype, True),
    )
    if reason := direct.refusal or sum_unsupported(problem):
        raise NotImplementedError(reason)
    call = weighted_sum.build(problem, sum_config(problem), sized_at_launch=True)
    inputs = direct.inputs | {"y": problem.grained(num_rows)}
    dtypes = {"y": direct.dtype, "weights": "float32"}
    structs = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtypes.get(name, "int32")))
        for name, shape in inputs.items()
    ]
    outputs = {"out": problem.grained(direct.num_tokens)}
    return (DirectKernel("sum_rows", inputs, outputs, call, structs),)


class Example(NamedTuple):
    """One input of a program, and what it must give.

    Attributes:
        inputs: an array for each operand, as far as the self-test reads it.
        sizes: a number for each size that the launch gives.
        outputs: bytes of each result.
        expected: float32, the result.
    """

    inputs: dict[str, np.ndarray]
    sizes: dict[str, int]
    outputs: dict[str, int]
    expected: np.ndarray


def examples(direct: DirectSum) -> Iterator[Example]:
    """Of one token, and of as many as take two rounds of the grid, some of whose pairs have no row."""
    rng = np.random.default_rng(0)
    for tokens in sorted({1, min(direct.num_tokens, 37)}):
        rows = tokens * direct.top_k
        y = rng.integers(-8, 9, (rows, direct.width)).astype(np.float32)
        row_of_pair = rng.permutation(rows).astype(np.int32).reshape(tokens, direct.top_k)
        row_of_pair[rng.random(row_of_pair.shape) < 0.2] = -1
        weights = rng.integers(-4, 5, row_of_pair.shape).astype(np.float32) / 4
        weights[row_of_pair < 0] = np.nan  # not used
        share = np.where(row_of_pair >= 0, weights, 0)
        expected = np.einsum("tkh,tk->th", y[np.maximum(row_of_pair, 0)], share)
        inputs = {
            "y": y.astype(jnp.dtype(direct.dtype)),
            "row_of_pair": row_of_pair,
            "weights": weights,
        }
        size = tokens * direct.width * jnp.dtype(direct.out_dtype).itemsize
        yield Example(inputs, {"num_tokens": tokens}, {"out": size}, expected)


def mismatch(direct: DirectSum, example: Example, read: Callable) -> str:
    """What is wrong with the results, or "". `read(name, into)` fetches the beginning of an output."""
    got = read("out", np.empty(example.expected.shape, jnp.dtype(direct.out_dtype)))
    off = np.abs(got.astype(np.float32) - example.expected)
    allowed = np.abs(example.expected) * (2**-7 if direct.out_dtype != "float32" else 2**-20)
    if not (off <= allowed).all():
        at = np.unravel_index(np.argmax(np.nan_to_num(off - allowed, nan=np.inf)), off.shape)
        return f"out{list(map(int, at))} is {got[at]}, not {example.expected[at]}"
    return ""
