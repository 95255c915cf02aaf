"""The kernel where a cluster of CTAs shares a tile, each with a part of k.

On a GPU; and in Pallas' interpreter, whose threads wait for each other: more than a machine with two cores
gives to XLA, so that this runs in a process that says that it has more.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_align_jax as maj
from moe_align_jax._grouped_matmul import choose_tiles, kernel, launch, reference
from moe_align_jax._grouped_matmul import config as tiles
from moe_align_jax._grouped_matmul.problem import MatmulProblem, Weights
from tests.matmul.oracle import error
from tests.matmul.test_matmul import make_case, normal

ROOT = Path(__file__).parents[2]
PLAIN = tiles.Config("swap", 8, 128, 128, 5, group=0)
GATED = tiles.Config("swap", 8, 256, 64, 6, group=0)


def make(
    tokens: int,
    top_k: int,
    experts: int,
    k: int,
    n: int,
    *,
    gated: bool = False,
    transposed: bool = True,
    bias: bool = False,
    dropped: bool = False,
    dtype: str = "bfloat16",
) -> tuple[MatmulProblem, list[Any], np.ndarray]:
    """(Problem of one pair per block, its operands, the float64 result)."""
    rng = np.random.default_rng(0)
    pairs = tokens * top_k
    columns = 2 * n if gated else n
    x = normal(rng, (tokens, k), dtype)
    shape = (experts, columns, k) if transposed else (experts, k, columns)
    w = normal(rng, shape, dtype, k**-0.5)
    expert = rng.integers(-2 if dropped else 0, experts, pairs).astype(np.int32)
    biases = rng.standard_normal((experts, columns)).astype(np.float32)
    lie = Weights(transposed, activation="silu" if gated else None, gated=gated, bias=bias)
    problem = MatmulProblem(
        *("test", "blocks", pairs, k, n, experts, dtype, dtype, lie),
        block_size=1,
        num_tokens=tokens,
        top_k=top_k,
        zero_padding=False,
    )
    named = {"x": x, "w": w, "bias": biases, "expert_ids": expert}
    named |= {"sorted_token_ids": np.arange(pairs, dtype=np.int32)}
    named |= {"num_tokens_post_padded": np.full(1, pairs, np.int32)}
    wide, matrices = np.asarray(x, np.float64), np.asarray(w, np.float64)
    rows = np.full((pairs, n), np.nan)  # blocks without an expert are not read
    for pair in np.flatnonzero(expert >= 0):
        matrix = matrices[expert[pair]]
        product = wide[pair // top_k] @ (matrix.T if transposed else matrix)
        product = product + biases[expert[pair]] * bias
        if gated:
            product = product[:n] / (1 + np.exp(-product[:n])) * product[n:]
        rows[pair] = product
    return problem, [jnp.asarray(named[name]) for name in problem.inputs], rows


def check(given, config: tiles.Config, *, interpret: bool) -> None:
    problem, operands, want = given
    run = jax.jit(functools.partial(launch.run, problem, config=config, interpret=interpret))
    poison = jnp.full(problem.out_shape, jnp.nan, problem.out_dtype)
    jax.block_until_ready(poison).delete()  # the allocator gives this memory to the result
    used = ~np.isnan(want[:, 0])
    first = np.asarray(run(*operands))[used]
    if not interpret:
        for _ in range(3):
            assert np.asarray(run(*operands))[used].tobytes() == first.tobytes()
    assert error(first, want[used]) < 5e-3


def shared(config: tiles.Config, split: int, clusters: int = 0) -> tiles.Config:
    return config._replace(split=split, num_ctas=split * (clusters or 128 // split))


SHARED: dict[str, tuple[dict[str, Any], tiles.Config]] = {}
for split in (2, 4, 8):
    for transposed in (True, False):
        name = f"k in {split}, transposed {transposed}"
        options: dict[str, Any] = {"transposed": transposed, "dropped": True}
        few = {"tokens": 3, "top_k": 3, "experts": 40, "k": 2048, "n": 320} | options
        SHARED[name] = (few, shared(PLAIN, split))
        SHARED[f"{name}, gated"] = (few | {"gated": True, "bias": True}, shared(GATED, split))
        # A cluster has several tiles one after the other.
        SHARED[f"{name}, many"] = (
            few | {"gated": True, "tokens": 40},
            shared(GATED, split, clusters=5),
        )
SHARED["k in 4, ends within a stage"] = (
    {"tokens": 3, "top_k": 2, "experts": 9, "k": 1000, "n": 136, "gated": True},
    shared(GATED, 4),
)
SHARED["k in 2, float16"] = (
    {"tokens": 3, "top_k": 2, "experts": 9, "k": 512, "n": 128, "dtype": "float16"},
    shared(PLAIN, 2),
)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHARED)
def test_shared_tiles_on_a_gpu(name):
    sizes, config = SHARED[name]
    check(make(**sizes), config, interpret=False)


_IN_ANOTHER_PROCESS = """
import jax
from tests.matmul import test_clusters as here
with jax.default_device(jax.devices("cpu")[0]):
    here.in_the_interpreter()
print("right")
"""


def in_the_interpreter() -> None:
    gated = make(2, 2, 3, 256, 64, gated=True, bias=True, dropped=True)
    check(gated, shared(GATED, 2, clusters=2), interpret=True)


def test_shared_tiles_in_the_interpreter():
    environment = os.environ | {"NPROC": "24", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", _IN_ANOTHER_PROCESS],
        cwd=ROOT,
        env=environment,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split()[-1:] == ["right"], done.stderr[-3000:]


# -- which sizes get it ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "transposed", "splits"),
    [
        ((1, 256, 8, 7168, 256), True, (2, 1)),
        ((1, 256, 8, 7168, 256), False, (4, 1)),
        ((2, 256, 8, 7168, 256), True, (2, 1)),
        ((4, 256, 8, 7168, 256), False, (2, 1)),
        ((8, 256, 8, 7168, 256), True, (1, 1)),
        ((1, 128, 8, 2048, 768), True, (1, 1)),
        ((1, 128, 8, 2048, 768), False, (2, 1)),
        ((16, 128, 8, 2048, 768), True, (1, 1)),
        ((1, 8, 2, 4096, 14336), False, (1, 2)),
    ],
    ids=str,
)
def test_few_tiles_are_shared(sizes, transposed, splits):
    """As measured on an H200; the split follows from the shapes alone."""
    tokens, experts, top_k, hidden, ffn = sizes
    down = (experts, hidden, ffn) if transposed else (experts, ffn, hidden)
    given = {"top_k": top_k, "transpose_rhs": transposed, "platform": "cuda"}
    form = maj.select_moe_implementation((tokens, hidden), down, **given).form
    for name, split in zip(form.split(", ")[1:], splits, strict=True):
        assert name.endswith(f"-k{split}") if split > 1 else "-k" not in name, form


@pytest.mark.parametrize(
    ("tokens", "experts", "hidden", "ffn", "shared"),
    [
        (12, 256, 7168, 256, True),
        (32, 256, 7168, 256, True),
        (170, 256, 7168, 256, True),
        (171, 256, 7168, 256, False),  # blocks of more rows
        (16, 128, 7168, 256, False),
        (16, 256, 7168, 264, False),
        (16, 256, 4096, 256, False),
        (16, 256, 7168 + 128, 256, False),  # an odd number of steps
    ],
)
@pytest.mark.parametrize("transposed", [True, False])
def test_tiles_of_short_blocks_are_shared(tokens, experts, hidden, ffn, shared, transposed):
    """Gate and up of DeepSeek-V3 under TP8, in blocks of 8 rows; not the second product."""
    form = maj.select_moe_implementation(
        *((tokens, hidden), (experts, hidden, ffn) if transposed else (experts, ffn, hidden)),
        **{"top_k": 8, "transpose_rhs": transposed, "platform": "cuda"},
    ).form
    _, first, second = form.split(", ")
    assert first.endswith("-k2") == (shared and transposed) and "-k" not in second, form


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("block_size", [1, 40])
def test_tiles_fit_in_shared_memory(block_size, gated):
    """Mosaic refuses a kernel that needs more. Tiles of blocks of one row have been shared on a GPU."""
    problem = MatmulProblem(
        *("test", "blocks", 120, 2048, 256, 2, "bfloat16", "bfloat16"),
        Weights(True, activation="silu" if gated else None, gated=gated),
        block_size=block_size,
        num_tokens=24,
        top_k=2,
    )
    config = choose_tiles.config_for(problem)
    named = {name: jnp.zeros(*array) for name, array in problem.inputs.items()}
    operands = launch.arguments(problem, config, named, None, interpret=False)
    with jax.enable_x64(False):
        traced = jax.jit(kernel.build(problem, config)).trace(*operands)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert config.split == 1 or block_size == 1


def test_a_ring_that_would_wait_for_itself_is_refused():
    problem, *_ = make(3, 2, 3, 256, 64)
    with pytest.raises(ValueError, match="wait for itself"):
        kernel.build(problem, PLAIN._replace(stages=3))


def test_rows_gathered_before_the_product():
    """The same products as with the gather inside."""
    (x, w, aligned), options = make_case(40, 2, 3, 64, 64, 16, activation="silu", routing="dropped")
    used = int(aligned.num_tokens_post_padded[0])
    lie = Weights(activation="silu", gated=True)
    problem = MatmulProblem(
        *("test", "blocks", aligned.sorted_token_ids.shape[0], 64, 64, 3, "bfloat16", "bfloat16"),
        *(lie, options["block_size"]),
        num_tokens=40,
        top_k=2,
    )
    named = dict(zip(problem.inputs, (x, w, *aligned[:3]), strict=True))
    first, changed = launch.permuted(problem, named)
    found = reference.grouped_matmul(first, *[changed[name] for name in first.inputs])
    want = reference.grouped_matmul(problem, *named.values())
    assert first.inputs["x"][0] == (problem.num_rows, 64)
    ids = np.asarray(aligned.sorted_token_ids)
    assert not np.asarray(changed["x"])[(ids < 0) | (ids >= 80)].any()  # of no pair: zeros
    assert np.asarray(found)[:used].tobytes() == np.asarray(want)[:used].tobytes()


@pytest.mark.parametrize(
    "experts, top_k, tokens, columns, first",
    [
        (8, 2, 8192, 14336, True),
        (8, 2, 1024, 14336, True),
        (8, 2, 512, 14336, False),
        (32, 4, 2048, 2880, True),
        (128, 8, 65536, 768, False),
    ],
)
def test_rows_of_many_columns_are_gathered_first(experts, top_k, tokens, columns, first):
    """Where an expert has 200 rows: a gather inside repeats for each tile of columns."""
    lie, pairs = Weights(True, activation="silu", gated=True), tokens * top_k
    problem = MatmulProblem(
        *("test", "blocks", pairs + 191 * experts, 4096, columns, experts, "bfloat16", "bfloat16"),
        *(lie, 192),
        num_tokens=tokens,
        top_k=top_k,
        zero_padding=False,
    )
    assert choose_tiles.permutes_first(problem, "NVIDIA H200") is first
    assert not choose_tiles.permutes_first(problem._replace(num_tokens=0, top_k=0), "NVIDIA H200")
